//! Where objects lie: a small trait, because a repository needs little.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use jiff::Timestamp;

use crate::model::{Immutability, LockMode};

/// One object and its size in bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Object {
    /// Its name, with `/` between directories.
    pub name: String,
    /// Bytes.
    pub size: u64,
}

/// A lock on an object, as the store tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectLock {
    /// Who can lift it.
    pub mode: LockMode,
    /// Until when.
    pub until: Timestamp,
}

/// Why a store did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no such object.
    #[error("{store}: there is no object {name}")]
    Missing {
        /// Where.
        store: String,
        /// Which.
        name: String,
    },
    /// The store said no, or was not there.
    #[error("{store}: {action} {name}: {reason}")]
    Failed {
        /// Where.
        store: String,
        /// What was tried.
        action: &'static str,
        /// With which object.
        name: String,
        /// What came back.
        reason: String,
    },
    /// The store cannot lock objects.
    #[error("{store} cannot lock objects")]
    NoLocks {
        /// Which.
        store: String,
    },
}

/// A place for objects.
///
/// The interface is as small as a repository allows, and **blocks**: the format's library reads and writes from threads
/// of its own. Call it from a thread that may wait. Whoever implements it runs [`super::conformance`] against it.
///
/// Promises that an implementation makes:
///
/// * [`Store::write`] is all or nothing: an object is there with every byte, or not at all, also when the machine stops.
/// * What was written is read and listed from then on.
/// * [`Store::remove`] of something that is not there is no error, so that a removal can be tried again.
pub trait Store: fmt::Debug + Send + Sync {
    /// What messages call it. Contains no secret.
    fn location(&self) -> String;

    /// Every object whose name begins with `prefix`, in any order.
    fn list(&self, prefix: &str) -> Result<Vec<Object>, StoreError>;

    /// A whole object.
    fn read(&self, name: &str) -> Result<Bytes, StoreError>;

    /// A part of an object. Beyond its end is an error.
    fn read_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError>;

    /// Writes an object, or replaces it. Where [`Store::locks`] holds, it is locked with the same request.
    fn write(&self, name: &str, parts: Vec<Bytes>) -> Result<(), StoreError>;

    /// Writes an object unless there is one of its name, and says whether it has. Of several who try at the same time one
    /// succeeds.
    fn write_new(&self, name: &str, content: Bytes) -> Result<bool, StoreError>;

    /// Removes an object.
    fn remove(&self, name: &str) -> Result<(), StoreError>;

    /// The store's part for locks, if it has any.
    fn locks(&self) -> Option<&dyn Locks> {
        None
    }
}

/// Locks on objects: nobody can delete or replace them before a time.
pub trait Locks: Sync {
    /// What everything that is written gets.
    fn wanted(&self) -> Option<Immutability>;

    /// The lock as the store tells it now; nothing is remembered.
    fn lock_of(&self, name: &str) -> Result<Option<ObjectLock>, StoreError>;

    /// Locks an object, or extends its lock. Never shortens one.
    fn extend(&self, name: &str, lock: ObjectLock) -> Result<(), StoreError>;
}
