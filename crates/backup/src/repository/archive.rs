//! Into the repository: entries in, an invisible snapshot out, and its publication.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use rustic_core::repofile::{Metadata, Node, NodeType, SnapshotFile};
use rustic_core::{
    BackupOptions, CheckOptions, ErrorKind, ReadSource, ReadSourceEntry, ReadSourceOpen, RusticError, RusticResult,
};

use super::{Repository, RepositoryError};
use crate::model::{BackupSet, LockAttestation, SetId, Stored};

/// Something to be saved.
pub(crate) struct Entry {
    /// Where in the snapshot, below the tenant: `filestore/ab/abcd`.
    pub(crate) path: String,
    /// Bytes.
    pub(crate) size: u64,
    /// When it was changed. A file with the size and time that it has in the parent is not read again.
    pub(crate) modified: Option<Timestamp>,
    /// Opens it.
    pub(crate) open: Opener,
}

/// Opens an entry, when its turn has come.
pub(crate) type Opener = Box<dyn FnOnce() -> io::Result<Box<dyn Read + Send>> + Send>;

/// Everything is stored, and nobody sees it yet.
pub(crate) struct Archived {
    snapshot: SnapshotFile,
    pub(crate) stored: Stored,
    /// Objects that were written for it.
    written: BTreeSet<String>,
}

impl Repository {
    /// Stores entries, which must come sorted as bytes by path, and checks that every one of them got there.
    ///
    /// An entry that cannot be had or read fails the whole; one that is not to be part of the set must not be yielded.
    pub(crate) fn archive(
        &self,
        entries: impl Iterator<Item = io::Result<Entry>> + Send + 'static,
        parent: Option<&SetId>,
        taken_at: Timestamp,
    ) -> Result<Archived, RepositoryError> {
        let root = PathBuf::from("/").join(self.tenant.as_str());
        let faults = Faults::default();
        let yielded = Arc::new(AtomicU64::new(0));
        let source = Source {
            entries: Mutex::new(Some(Box::new(entries))),
            root: root.clone(),
            faults: faults.clone(),
            yielded: Arc::clone(&yielded),
        };
        let mut options = BackupOptions::default();
        options.no_scan = true;
        options.parent_opts.ignore_ctime = true;
        options.parent_opts.ignore_inode = true;
        match parent {
            Some(id) => options.parent_opts.parents = vec![id.0.clone()],
            None => options.parent_opts.force = true,
        }
        let snapshot = SnapshotFile {
            time: taken_at.to_zoned(TimeZone::UTC),
            program_version: concat!("cofferdam ", env!("CARGO_PKG_VERSION")).to_owned(),
            hostname: "cofferdam".to_owned(),
            label: self.tenant.to_string(),
            ..SnapshotFile::default()
        };
        let before = self.bridge.written();
        self.bridge.take_names();
        let indexed = self.again()?.to_indexed_ids().map_err(|e| self.broken(&e))?;
        self.bridge.seal(true);
        let outcome = indexed.archive(&options, &source, snapshot, &[root]);
        self.bridge.seal(false);
        if let Some(fault) = faults.take() {
            return Err(fault);
        }
        if let Some(failure) = self.bridge.take_failure() {
            return Err(failure.into());
        }
        let snapshot = outcome.map_err(|e| self.broken(&e))?;
        let Some(summary) = &snapshot.summary else {
            return Err(self.incomplete("the library gave no summary"));
        };
        // The library leaves out what it could not store, and only logs it.
        let yielded = yielded.load(Ordering::SeqCst);
        if summary.total_files_processed != yielded {
            let stored = summary.total_files_processed;
            return Err(self.incomplete(&format!("of {yielded} files only {stored} were stored")));
        }
        let stored = Stored {
            total_bytes: summary.total_bytes_processed,
            new_bytes: summary.data_added_files,
            stored_bytes: self.bridge.written() - before,
            new_files: summary.files_new + summary.files_changed,
        };
        // Whatever the new snapshot refers to is in the index, and every pack of the index is there in its full size.
        let check = self.open.check_with_trees(CheckOptions::default(), vec![snapshot.tree]);
        check.and_then(|results| results.is_ok()).map_err(|e| self.broken(&e))?;
        Ok(Archived { snapshot, stored, written: self.bridge.take_names().into_iter().collect() })
    }

    /// Makes a stored backup visible, with what is known of it. From here on it exists.
    pub(crate) fn publish(&self, archived: Archived, mut set: BackupSet) -> Result<BackupSet, RepositoryError> {
        let mut snapshot = archived.snapshot;
        set.id = SetId::default();
        set.lock = self.attest(&snapshot, &archived.written)?;
        snapshot.tags.add(set.consistency.to_string());
        let description = serde_json::to_string(&set)
            .map_err(|e| RepositoryError::Broken { location: self.location(), reason: e.to_string() })?;
        snapshot.description = Some(description);
        self.open.save_snapshots(vec![snapshot]).map_err(|e| self.broken(&e))?;
        // A snapshot's name is the hash of what was written, which only the store has seen.
        let name = self.bridge.take_names().into_iter().find_map(|n| n.strip_prefix("snapshots/").map(str::to_owned));
        set.id = SetId(name.ok_or_else(|| self.incomplete("the snapshot was not written"))?);
        if matches!(set.lock, LockAttestation::Locked { .. })
            && let Some(locks) = self.store.locks()
            && locks.lock_of(&format!("snapshots/{}", set.id))?.is_none()
        {
            set.lock = LockAttestation::NotLocked { reason: format!("snapshots/{}: read back: no lock", set.id) };
        }
        Ok(set)
    }

    fn incomplete(&self, reason: &str) -> RepositoryError {
        RepositoryError::Broken { location: self.location(), reason: reason.to_owned() }
    }
}

/// The first thing that went wrong while entries were read.
#[derive(Debug, Clone, Default)]
struct Faults(Arc<Mutex<Option<RepositoryError>>>);

impl Faults {
    fn note(&self, path: &str, error: &io::Error) {
        let fault = if error.kind() == io::ErrorKind::Interrupted {
            RepositoryError::Cancelled
        } else {
            RepositoryError::Source { path: path.to_owned(), reason: error.to_string() }
        };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
    }

    fn is_set(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn take(&self) -> Option<RepositoryError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

struct Source {
    entries: Mutex<Option<Box<dyn Iterator<Item = io::Result<Entry>> + Send>>>,
    root: PathBuf,
    faults: Faults,
    yielded: Arc<AtomicU64>,
}

impl ReadSource for Source {
    type Open = Open;
    type Iter = Box<dyn Iterator<Item = RusticResult<ReadSourceEntry<Open>>> + Send>;

    fn size(&self) -> RusticResult<Option<u64>> {
        Ok(None)
    }

    fn entries(&self) -> Self::Iter {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (root, faults, yielded) = (self.root.clone(), self.faults.clone(), Arc::clone(&self.yielded));
        // After the first fault the rest is not read: the backup has failed.
        let going = faults.clone();
        let entries = entries.into_iter().flatten().map_while(move |entry| match entry {
            Ok(entry) => (!going.is_set()).then_some(entry),
            Err(error) => {
                going.note("reading", &error);
                None
            }
        });
        Box::new(entries.map(move |entry| {
            yielded.fetch_add(1, Ordering::SeqCst);
            let path = root.join(&entry.path);
            let meta = Metadata { mode: Some(0o640), mtime: entry.modified, size: entry.size, ..Metadata::default() };
            let node = Node::new_node(path.file_name().unwrap_or_default(), NodeType::File, meta);
            let open = Some(Open { path: entry.path, opener: entry.open, faults: faults.clone() });
            Ok(ReadSourceEntry { path, node, open })
        }))
    }
}

struct Open {
    path: String,
    opener: Opener,
    faults: Faults,
}

impl ReadSourceOpen for Open {
    type Reader = Watched;

    fn open(self) -> RusticResult<Watched> {
        match (self.opener)() {
            Ok(inner) => Ok(Watched { path: self.path, inner, faults: self.faults }),
            Err(error) => {
                self.faults.note(&self.path, &error);
                Err(RusticError::new(ErrorKind::InputOutput, error.to_string()))
            }
        }
    }
}

/// A reader whose errors are not forgotten.
struct Watched {
    path: String,
    inner: Box<dyn Read + Send>,
    faults: Faults,
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.faults.is_set() {
            return Err(io::Error::other("another file could not be read"));
        }
        self.inner.read(buffer).map_err(|error| {
            self.faults.note(&self.path, &error);
            // `Interrupted` would be tried again.
            io::Error::other(error.to_string())
        })
    }
}

/// The modification time of a file, to the second as Odoo's file systems keep it everywhere.
pub(crate) fn modified(metadata: &std::fs::Metadata) -> Option<Timestamp> {
    Timestamp::try_from(metadata.modified().ok()?).ok()
}
