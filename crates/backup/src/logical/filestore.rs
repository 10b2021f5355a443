//! The filestore's part of a backup: which files, whether they are there, whether they are what their names say.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};
use tokio_util::sync::CancellationToken;

use super::fence::Attachment;
use crate::Control;
use crate::model::FilestoreSummary;
use crate::repository::{Entry, modified};

/// `manifest.json`: what a set must contain, written before anybody knows whether it does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Manifest {
    /// 1.
    pub version: u32,
    /// The files that the database refers to, by name.
    pub files: Vec<ManifestFile>,
    /// Attachments that lie in an object store of Odoo's own: their locations.
    pub remote: Vec<String>,
    /// Odoo's installed modules and their versions.
    #[serde(default)]
    pub modules: BTreeMap<String, String>,
}

/// A file of the filestore.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct ManifestFile {
    /// `store_fname`: the path below the filestore.
    pub name: String,
    /// The SHA-1 that it must have, in hexadecimal; none if neither name nor database tell.
    pub sha1: Option<String>,
    /// Bytes, as the database says.
    pub size: Option<u64>,
}

/// What was found while reading.
#[derive(Debug, Default)]
pub(super) struct Findings {
    summary: FilestoreSummary,
}

const EXAMPLES: usize = 10;

impl Findings {
    fn example(&mut self, name: &str, what: &str) {
        if self.summary.examples.len() < EXAMPLES {
            self.summary.examples.push(format!("{name}: {what}"));
        }
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct SharedFindings(Arc<Mutex<Findings>>);

impl SharedFindings {
    fn with<T>(&self, change: impl FnOnce(&mut Findings) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn summary(&self) -> FilestoreSummary {
        self.with(|findings| findings.summary.clone())
    }
}

impl Manifest {
    /// What a snapshot refers to, sorted as the repository wants it.
    pub(super) fn of(attachments: Vec<Attachment>) -> Self {
        let mut manifest = Self { version: 1, files: Vec::new(), remote: Vec::new(), modules: BTreeMap::new() };
        for Attachment { store_fname, checksum, size } in attachments {
            if store_fname.contains("://") {
                manifest.remote.push(store_fname);
                continue;
            }
            let last = store_fname.rsplit('/').next().unwrap_or_default();
            let sha1 = if is_sha1(last) { Some(last.to_owned()) } else { checksum.filter(|sum| is_sha1(sum)) };
            manifest.files.push(ManifestFile { name: store_fname, sha1, size });
        }
        manifest.files.sort_by(|a, b| a.name.split('/').cmp(b.name.split('/')));
        manifest.remote.sort();
        manifest
    }
}

/// Whether a name stays below the filestore. The database is the tenant's to write.
pub(crate) fn stays_below(name: &str) -> bool {
    !name.is_empty()
        && !name.contains('\0')
        && name.split('/').count() <= DEEPEST
        && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Directories below each other, the file among them: Odoo's have one.
pub(crate) const DEEPEST: usize = 8;

pub(crate) fn is_sha1(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The files of a manifest as entries. Each is opened as it is yielded, so that nobody can delete it afterwards; what is
/// not there is noted and left out.
pub(super) struct Files {
    manifest: Arc<Manifest>,
    next: usize,
    root: PathBuf,
    findings: SharedFindings,
    control: Control,
    /// Let go of when the last file has been yielded; the files that are still being read hold it too.
    copied: Option<Arc<Copied>>,
}

/// Tells that everything is copied when the last of those who hold it has let go.
struct Copied(CancellationToken);

impl Drop for Copied {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Files {
    pub(super) fn new(
        manifest: Arc<Manifest>,
        root: &Path,
        findings: SharedFindings,
        control: Control,
        copied: CancellationToken,
    ) -> Self {
        findings.with(|f| f.summary.remote = manifest.remote.len() as u64);
        Self { manifest, next: 0, root: root.to_owned(), findings, control, copied: Some(Arc::new(Copied(copied))) }
    }
}

impl Iterator for Files {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<io::Result<Entry>> {
        loop {
            let next = self.manifest.files.get(self.next).filter(|_| !self.control.is_cancelled());
            let Some(wanted) = next.cloned() else {
                self.copied = None;
                return None;
            };
            self.next += 1;
            let opened = open_below(&self.root, &wanted.name).and_then(|file| {
                let metadata = file.metadata()?;
                // What is much longer than it should be is something else, and may have no end worth waiting for.
                match wanted.size {
                    Some(size) if metadata.len() > size => {
                        let found = metadata.len();
                        Err(io::Error::other(format!("it has {found} bytes, and the database says {size}")))
                    }
                    _ => Ok((file, metadata)),
                }
            });
            let (file, metadata) = match opened {
                Ok(opened) => opened,
                Err(error) => {
                    self.findings.with(|f| {
                        f.summary.files += 1;
                        f.summary.missing += 1;
                        f.example(&wanted.name, &error.to_string());
                    });
                    continue;
                }
            };
            let size = metadata.len();
            self.findings.with(|f| {
                f.summary.files += 1;
                f.summary.bytes += size;
            });
            let reader = Hashed {
                file,
                hash: wanted.sha1.is_some().then(Sha1::new),
                wanted,
                findings: self.findings.clone(),
                control: self.control.clone(),
                _copied: self.copied.clone(),
            };
            return Some(Ok(Entry {
                path: format!("filestore/{}", reader.wanted.name),
                size,
                modified: modified(&metadata),
                open: Box::new(move || Ok(Box::new(reader))),
            }));
        }
    }
}

/// Opens a file below a directory without following a link out of it.
fn open_below(root: &Path, name: &str) -> io::Result<File> {
    if !stays_below(name) {
        return Err(io::Error::other("its name leads out of the filestore"));
    }
    open_beneath(root, name).map_err(|error| match error.raw_os_error() {
        Some(code) if code == rustix::io::Errno::XDEV.raw_os_error() => {
            io::Error::other("a link leads out of the filestore")
        }
        _ => error,
    })
}

/// Opens what a name below a directory leads to, if that is a file, and never waits: the tenant may have put a pipe there.
/// The kernel follows links, as far as they stay below.
fn open_beneath(root: &Path, name: &str) -> io::Result<File> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
    let how = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let directory = rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let opened = match rustix::fs::openat2(&directory, name, how, Mode::empty(), inside) {
        // Before Linux 5.6, and where it is filtered out.
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {
            let real = root.join(name).canonicalize()?;
            if !real.starts_with(root.canonicalize()?) {
                return Err(rustix::io::Errno::XDEV.into());
            }
            rustix::fs::open(&real, how | OFlags::NOFOLLOW, Mode::empty())
        }
        // The kernel could not look without being disturbed.
        Err(rustix::io::Errno::AGAIN) => rustix::fs::openat2(&directory, name, how, Mode::empty(), inside),
        other => other,
    };
    let file = File::from(opened?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a file")) }
}

/// A file whose bytes are compared with its name as they pass.
struct Hashed {
    file: File,
    hash: Option<Sha1>,
    wanted: ManifestFile,
    findings: SharedFindings,
    control: Control,
    _copied: Option<Arc<Copied>>,
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.control.is_cancelled() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let read = self.file.read(buffer)?;
        self.control.add(read as u64);
        if read > 0 {
            if let Some(hash) = &mut self.hash {
                hash.update(&buffer[..read]);
            }
        } else if !buffer.is_empty()
            && let (Some(hash), Some(sha1)) = (self.hash.take(), &self.wanted.sha1)
        {
            let found = hex::encode(hash.finalize());
            if found != *sha1 {
                self.findings.with(|f| {
                    f.summary.damaged += 1;
                    f.example(&self.wanted.name, &format!("its SHA-1 is {found}"));
                });
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(name: &str, checksum: Option<&str>) -> Attachment {
        Attachment { store_fname: name.into(), checksum: checksum.map(str::to_owned), size: None }
    }

    #[test]
    fn locations_in_object_stores_are_kept_apart_and_hashes_come_from_the_name() {
        let sum = "da39a3ee5e6b4b0d3255bfef95601890afd80709";
        let manifest = Manifest::of(vec![
            attachment("s3://bucket/key", None),
            attachment(&format!("da/{sum}"), None),
            attachment("0a/odd", Some(sum)),
            attachment("0a/odder", Some("md5")),
        ]);
        assert_eq!(manifest.remote, ["s3://bucket/key"]);
        let files: Vec<_> = manifest.files.iter().map(|f| (f.name.as_str(), f.sha1.as_deref())).collect();
        assert_eq!(files, [("0a/odd", Some(sum)), ("0a/odder", None), (&*format!("da/{sum}"), Some(sum))]);
    }

    #[test]
    fn no_name_and_no_link_leads_out_of_the_filestore() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "x").unwrap();
        let root = outside.path().canonicalize().unwrap().join("filestore");
        std::fs::create_dir_all(root.join("ab")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("secret"), root.join("ab/link")).unwrap();
        std::os::unix::fs::symlink(outside.path(), root.join("dir")).unwrap();
        let pipe = root.join("ab/pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(open_below(&root, "ab/pipe").unwrap_err().to_string().contains("not a file"), "and nobody waits");
        for name in ["../secret", "ab/../../secret", "/etc/passwd", "ab/link", "dir/secret", ""] {
            assert!(open_below(&root, name).is_err(), "{name}");
        }
    }
}
