//! Configuration from files: `cofferdam.yaml` and the directory of tenants beside it.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use cofferdam_tenant::{Catalog, Diagnostic, Diagnostics, Secrets, Source, SourceSet};

/// A configuration file larger than this is not one.
const MAX_FILE: u64 = 16 << 20;

/// Reads the main file and every `*.yaml` or `*.yml` in its directory of tenants, by name.
///
/// Blocks on the file system. Errors say what could not be read, or what keeps the main file from being understood.
pub fn load_sources(main: &Path) -> Result<SourceSet, Diagnostics> {
    let source = read(main).map_err(|d| Diagnostics(vec![d]))?;
    // A main file with errors is still checked together with the tenants in their usual place.
    let tenants = Catalog::read_main(&source).map_or_else(|_| PathBuf::from("tenants"), |config| config.tenants);
    let directory = main.parent().unwrap_or(Path::new(".")).join(&tenants);
    let mut faults = Vec::new();
    let mut paths = Vec::new();
    match std::fs::read_dir(&directory) {
        Ok(entries) => {
            for entry in entries {
                match entry {
                    Ok(entry) if is_tenant_file(&entry.path()) => paths.push(entry.path()),
                    Ok(_) => {}
                    Err(error) => faults.push(unreadable(&directory, &error, "a readable directory of tenants")),
                }
            }
        }
        Err(error) => faults.push(unreadable(&directory, &error, "a readable directory of tenants")),
    }
    paths.sort();
    let mut sources = Vec::with_capacity(paths.len());
    for path in paths {
        match read(&path) {
            Ok(source) => sources.push(source),
            Err(fault) => faults.push(fault),
        }
    }
    if faults.is_empty() { Ok(SourceSet { main: source, tenants: sources }) } else { Err(Diagnostics(faults)) }
}

fn is_tenant_file(path: &Path) -> bool {
    let hidden = path.file_name().and_then(|n| n.to_str()).is_none_or(|n| n.starts_with('.'));
    let yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
    yaml && !hidden
}

fn read(path: &Path) -> Result<Source, Diagnostic> {
    let expected = "a readable YAML file in UTF-8";
    let size = std::fs::metadata(path).map_err(|e| unreadable(path, &e, expected))?.len();
    if size > MAX_FILE {
        return Err(Diagnostic::file_level(
            path,
            format!("a file of {size} bytes"),
            format!("at most {MAX_FILE} bytes"),
        ));
    }
    let text = std::fs::read_to_string(path).map_err(|e| unreadable(path, &e, expected))?;
    Ok(Source::new(path, text))
}

fn unreadable(path: &Path, error: &io::Error, expected: &str) -> Diagnostic {
    Diagnostic::file_level(path, format!("{error}"), expected)
}

/// Somebody else's secrets, and which files they were in.
pub(crate) struct Remembered {
    secrets: Arc<dyn Secrets + Send + Sync>,
    files: Mutex<BTreeSet<PathBuf>>,
}

impl Remembered {
    pub(crate) fn new(secrets: Arc<dyn Secrets + Send + Sync>) -> Self {
        Self { secrets, files: Mutex::default() }
    }

    /// Whether something was read from here.
    pub(crate) fn has_read(&self, path: &Path) -> bool {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).contains(path)
    }

    /// Where something was read from.
    pub(crate) fn directories(&self) -> Vec<PathBuf> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.iter().filter_map(|file| file.parent()).map(Path::to_owned).collect()
    }
}

impl Secrets for Remembered {
    fn file(&self, path: &Path) -> io::Result<String> {
        let read = self.secrets.file(path);
        // One that cannot be read now may be there the next time.
        self.files.lock().unwrap_or_else(PoisonError::into_inner).insert(self.secrets.locate(path));
        read
    }

    fn env(&self, name: &str) -> Option<String> {
        self.secrets.env(name)
    }

    fn locate(&self, path: &Path) -> PathBuf {
        self.secrets.locate(path)
    }
}

/// Secrets from files and environment variables; relative paths count from the configuration's directory.
#[derive(Debug, Clone)]
pub struct SystemSecrets {
    base: PathBuf,
}

impl SystemSecrets {
    /// Secrets of the configuration whose main file this is.
    pub fn beside(main: &Path) -> Self {
        Self { base: main.parent().unwrap_or(Path::new(".")).to_owned() }
    }
}

impl Secrets for SystemSecrets {
    fn file(&self, path: &Path) -> io::Result<String> {
        let text = std::fs::read_to_string(self.base.join(path))?;
        Ok(text.strip_suffix('\n').map_or(text.as_str(), |t| t.strip_suffix('\r').unwrap_or(t)).to_owned())
    }

    fn env(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn locate(&self, path: &Path) -> PathBuf {
        self.base.join(path)
    }
}
