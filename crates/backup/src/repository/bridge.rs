//! A [`Store`] as the format's library wants to see it, with a seal on it.
//!
//! The library writes the snapshot, which makes a backup visible, as soon as it has read everything, also when files
//! could not be read. Here that one write is held back until the caller has looked and says that the backup is good.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustic_core::{
    BytesList, ErrorKind, FileType, Id, ReadBackend, RepositoryBackends, RusticError, RusticResult, WriteBackend,
};

use super::store::{Store, StoreError};

/// What passes between the library and a store.
#[derive(Debug)]
pub(super) struct Bridge {
    store: Arc<dyn Store>,
    /// While set, snapshots are not written.
    sealed: AtomicBool,
    /// Bytes written to the store.
    written: AtomicU64,
    /// Names written since the bridge was made: what has to be locked.
    names: Mutex<Vec<String>>,
    /// The only key that is shown, if not all are: the library takes the first that a password opens, and it may be one of
    /// a repository that was never finished.
    key: Option<Id>,
    /// The first failure to write: the library only logs some of them.
    failure: Mutex<Option<StoreError>>,
}

impl Bridge {
    pub(super) fn new(store: Arc<dyn Store>) -> Arc<Self> {
        Self::with_key(store, None)
    }

    /// A bridge on which there is one key only.
    pub(super) fn with_key(store: Arc<dyn Store>, key: Option<Id>) -> Arc<Self> {
        Arc::new(Self {
            store,
            key,
            sealed: AtomicBool::new(false),
            written: AtomicU64::new(0),
            names: Mutex::default(),
            failure: Mutex::default(),
        })
    }

    pub(super) fn backends(self: &Arc<Self>) -> RepositoryBackends {
        RepositoryBackends::new(Arc::new(Link(Arc::clone(self))), None)
    }

    /// From now on snapshots are, or are not, written.
    pub(super) fn seal(&self, sealed: bool) {
        self.sealed.store(sealed, Ordering::SeqCst);
    }

    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    pub(super) fn take_failure(&self) -> Option<StoreError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(super) fn take_names(&self) -> Vec<String> {
        std::mem::take(&mut *self.names.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, name: String, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let size: usize = parts.iter().map(Bytes::len).sum();
        if name == CONFIG {
            // It belongs to one key: whoever comes second must not replace it.
            let content: Vec<u8> = parts.concat();
            if !self.store.write_new(&name, content.into())? {
                let reason = "somebody else has just made a repository here".to_owned();
                return Err(StoreError::Failed { store: self.store.location(), action: "write", name, reason });
            }
        } else {
            self.store.write(&name, parts)?;
        }
        self.written.fetch_add(size as u64, Ordering::Relaxed);
        self.names.lock().unwrap_or_else(PoisonError::into_inner).push(name);
        Ok(())
    }
}

const CONFIG: &str = "config";

/// The name of a file of a repository, as restic lays it out.
pub(super) fn object_name(kind: FileType, id: &Id) -> String {
    let hex = id.to_hex();
    match kind {
        FileType::Config => CONFIG.to_owned(),
        FileType::Pack => format!("data/{}/{}", hex.get(..2).unwrap_or_default(), hex.as_str()),
        _ => format!("{}/{}", kind.dirname(), hex.as_str()),
    }
}

#[derive(Debug)]
struct Link(Arc<Bridge>);

impl Link {
    fn failed(error: StoreError) -> Box<RusticError> {
        RusticError::new(ErrorKind::Backend, error.to_string())
    }
}

impl ReadBackend for Link {
    fn location(&self) -> String {
        self.0.store.location()
    }

    fn list_with_size(&self, kind: FileType) -> RusticResult<Vec<(Id, u32)>> {
        let prefix = match kind {
            FileType::Config => CONFIG.to_owned(),
            _ => format!("{}/", kind.dirname()),
        };
        let objects = self.0.store.list(&prefix).map_err(Self::failed)?;
        let mut found = Vec::with_capacity(objects.len());
        for object in objects {
            let size = u32::try_from(object.size).unwrap_or(u32::MAX);
            if kind == FileType::Config {
                if object.name == CONFIG {
                    found.push((Id::default(), size));
                }
            } else if let Some(id) = object.name.rsplit('/').next().and_then(|name| name.parse().ok()) {
                // Anything else that lies there is not part of the repository.
                if kind != FileType::Key || self.0.key.is_none_or(|key| key == id) {
                    found.push((id, size));
                }
            }
        }
        Ok(found)
    }

    fn read_full(&self, kind: FileType, id: &Id) -> RusticResult<Bytes> {
        self.0.store.read(&object_name(kind, id)).map_err(Self::failed)
    }

    fn read_partial(&self, kind: FileType, id: &Id, _: bool, offset: u32, length: u32) -> RusticResult<Bytes> {
        let start = u64::from(offset);
        self.0.store.read_range(&object_name(kind, id), start..start + u64::from(length)).map_err(Self::failed)
    }

    fn warmup_path(&self, kind: FileType, id: &Id) -> String {
        object_name(kind, id)
    }
}

impl WriteBackend for Link {
    fn write_bytes(&self, kind: FileType, id: &Id, _: bool, content: BytesList) -> RusticResult<()> {
        if kind == FileType::Snapshot && self.0.sealed.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.0.write(object_name(kind, id), content.into_vec()).map_err(|error| {
            let told = RusticError::new(ErrorKind::Backend, error.to_string());
            self.0.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            told
        })
    }

    fn remove(&self, kind: FileType, id: &Id, _: bool) -> RusticResult<()> {
        self.0.store.remove(&object_name(kind, id)).map_err(Self::failed)
    }
}
