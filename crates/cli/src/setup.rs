//! A file beside `cofferdam.yaml`, read, and work done by what it says.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use cofferdam::tenant::{Catalog, Diagnostic, Diagnostics, Secrets, Source};
use cofferdam::{SystemSecrets, load_sources};

use crate::exit;

/// What reads such a file: where the gateway's catalog is that it refers to, and what both say.
pub(crate) struct File<S> {
    pub(crate) catalog_of: fn(&Source) -> Option<PathBuf>,
    pub(crate) read: fn(&Source, Option<&Catalog>, &dyn Secrets) -> Result<S, Diagnostics>,
}

impl<S> File<S> {
    /// Reads the file and does the work on a runtime of its own; or prints every fault of the file.
    pub(crate) fn with<F, Fut>(&self, path: &Path, work: F) -> anyhow::Result<ExitCode>
    where
        F: FnOnce(S) -> Fut,
        Fut: Future<Output = anyhow::Result<ExitCode>>,
    {
        let setup = match self.read(path) {
            Ok(setup) => setup,
            Err(faults) => {
                crate::check::print(&faults);
                return Ok(ExitCode::from(exit::CONFIG));
            }
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("cannot start a runtime")?;
        let outcome = runtime.block_on(work(setup));
        // What hangs on a file system hangs on alone.
        runtime.shutdown_timeout(std::time::Duration::from_secs(5));
        outcome
    }

    /// What the file and the catalog that it refers to say, as a number that is another when anything of it has changed; also
    /// where somebody has only touched it, because a password beside it is another.
    pub(crate) fn fingerprint(&self, path: &Path) -> std::io::Result<u64> {
        let text = std::fs::read_to_string(path)?;
        let mut hasher = DefaultHasher::new();
        (&text, std::fs::metadata(path)?.modified().ok()).hash(&mut hasher);
        if let Some(catalog) = (self.catalog_of)(&Source::new(path, text)) {
            let main = path.parent().unwrap_or(Path::new(".")).join(catalog);
            let sources = load_sources(&main).map_err(|faults| std::io::Error::other(faults.to_string()))?;
            for source in std::iter::once(&sources.main).chain(&sources.tenants) {
                (&source.path, &source.text).hash(&mut hasher);
            }
        }
        Ok(hasher.finish())
    }

    /// Reads the file, and the catalog that it refers to.
    pub(crate) fn read(&self, path: &Path) -> Result<S, Diagnostics> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Diagnostics(vec![Diagnostic::file_level(path, error.to_string(), "a readable YAML file in UTF-8")])
        })?;
        let source = Source::new(path, text);
        let catalog = match (self.catalog_of)(&source) {
            Some(catalog) => {
                let main = path.parent().unwrap_or(Path::new(".")).join(catalog);
                Some(Catalog::build(&load_sources(&main)?, &SystemSecrets::beside(&main), None)?)
            }
            None => None,
        };
        (self.read)(&source, catalog.as_ref(), &SystemSecrets::beside(path))
    }
}
