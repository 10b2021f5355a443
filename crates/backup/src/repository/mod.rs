//! One tenant's repository: encrypted, deduplicated, in the format of `restic`, so that leaving is easy.
//!
//! Each tenant has a repository and a key of its own: nothing is shared between tenants, and destroying a key destroys
//! one tenant's backups and no other's. A backup is a snapshot with `<tenant>/filestore/…`, `<tenant>/manifest.json`,
//! `<tenant>/odoo.dump` and `<tenant>/tables.json`; what is known of it as a whole stands in the snapshot's description.
//!
//! Everything here blocks. The rest of the crate calls it from threads that may wait.

mod archive;
mod bridge;
mod cloud;
pub mod conformance;
mod directory;
mod key;
mod lock;
mod read;
mod s3;
mod store;
mod upkeep;

use std::sync::Arc;

use cofferdam_tenant::Slug;
use rustic_core::repofile::SnapshotFile;
use rustic_core::{ConfigOptions, Credentials, KeyOptions, OpenStatus, RepositoryOptions, RusticError};

pub(crate) use archive::{Archived, Entry, modified};
pub(crate) use cloud::is_address;
pub use cloud::{AzureOptions, Cloud, GoogleOptions};
pub use directory::Directory;
pub use key::{KeyError, KeySource, RepositoryKey};
pub(crate) use read::Reader;
pub use s3::{S3, S3Options};
pub use store::{Locks, Object, ObjectLock, Store, StoreError};
pub use upkeep::{Depth, Fault, Pruned, Verification};

use crate::model::{BackupSet, RestorePoint, SetId};
use bridge::Bridge;

/// Why a repository did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepositoryError {
    /// There is none.
    #[error("{location}: there is no repository; the first backup makes one")]
    Absent {
        /// Where one was looked for.
        location: String,
    },
    /// The key does not open it.
    #[error("{location}: the key of {tenant} does not open this repository")]
    WrongKey {
        /// Where it is.
        location: String,
        /// Whose key.
        tenant: String,
    },
    /// The place of the objects failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no such set.
    #[error("{tenant} has no backup {wanted}; {known}")]
    NoSet {
        /// Whose.
        tenant: String,
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: String,
    },
    /// The repository is damaged, or its library met something that it does not know.
    #[error("{location}: {reason}")]
    Broken {
        /// Where.
        location: String,
        /// What was met, in one line.
        reason: String,
    },
    /// What was to be saved could not be read.
    #[error("{path}: {reason}")]
    Source {
        /// What.
        path: String,
        /// Why.
        reason: String,
    },
    /// Somebody has asked to stop.
    #[error("stopped on request")]
    Cancelled,
}

/// One tenant's repository, opened.
pub struct Repository {
    tenant: Slug,
    bridge: Arc<Bridge>,
    store: Arc<dyn Store>,
    open: rustic_core::Repository<OpenStatus>,
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not what is inside: the library's types hold the key.
        f.debug_struct("Repository")
            .field("tenant", &self.tenant)
            .field("location", &self.location())
            .finish_non_exhaustive()
    }
}

impl Repository {
    /// Opens the repository that is in a store.
    pub fn open(tenant: Slug, store: Arc<dyn Store>, key: &RepositoryKey) -> Result<Self, RepositoryError> {
        let mut bridge = Bridge::new(Arc::clone(&store));
        let credentials = Credentials::password(key.expose());
        let closed = Self::closed(&bridge, &store)?;
        if closed.config_id().map_err(|e| broken(&store, &e))?.is_none() {
            return Err(RepositoryError::Absent { location: store.location() });
        }
        let opened = match closed.open(&credentials) {
            Err(error) if !error.is_incorrect_password() => {
                // Two who make a repository at the same time, or one who dies over it, leave a key to nothing.
                let mut found = Err(error);
                for id in key_ids(&store)? {
                    let alone = Bridge::with_key(Arc::clone(&store), Some(id));
                    if let Ok(open) = Self::closed(&alone, &store)?.open(&credentials) {
                        (bridge, found) = (alone, Ok(open));
                        break;
                    }
                }
                found
            }
            other => other,
        };
        let open = opened.map_err(|error| {
            if error.is_incorrect_password() {
                RepositoryError::WrongKey { location: store.location(), tenant: tenant.to_string() }
            } else {
                broken(&store, &error)
            }
        })?;
        Ok(Self { tenant, bridge, store, open })
    }

    /// Opens the repository in a store, and makes one where there is none.
    pub fn open_or_create(tenant: Slug, store: Arc<dyn Store>, key: &RepositoryKey) -> Result<Self, RepositoryError> {
        match Self::open(tenant.clone(), Arc::clone(&store), key) {
            Err(RepositoryError::Absent { .. }) => {}
            other => return other,
        }
        let bridge = Bridge::new(Arc::clone(&store));
        // Keys and configuration are locked with the first backup like everything else.
        let options = KeyOptions::default().hostname("cofferdam".to_owned()).with_created(true);
        let made = Self::closed(&bridge, &store)?
            .init(&Credentials::password(key.expose()), &options, &ConfigOptions::default().set_version(2_u32))
            .map(drop)
            .map_err(|e| broken(&store, &e));
        let opened = match Self::open(tenant, Arc::clone(&store), key) {
            // Nobody else has made it either.
            Err(RepositoryError::Absent { location }) => {
                return made.and(Err(RepositoryError::Absent { location }));
            }
            other => other?,
        };
        if made.is_err() {
            // Somebody else was faster. A key that opens nothing only slows opening down; where it is locked already, it stays.
            let used = opened.key_id().map(|id| format!("keys/{id}"));
            for name in
                bridge.take_names().iter().filter(|name| name.starts_with("keys/") && used.as_ref() != Some(name))
            {
                let _ = store.remove(name);
            }
        }
        Ok(opened)
    }

    fn closed(bridge: &Arc<Bridge>, store: &Arc<dyn Store>) -> Result<rustic_core::Repository<()>, RepositoryError> {
        let mut options = RepositoryOptions::default();
        // A cache in the home directory of whoever runs this would hold one tenant's names beside another's.
        options.no_cache = true;
        rustic_core::Repository::new(&options, &bridge.backends()).map_err(|e| broken(store, &e))
    }

    /// The repository once more, for work that takes it. Skips what makes opening by password slow.
    fn again(&self) -> Result<rustic_core::Repository<OpenStatus>, RepositoryError> {
        let credentials = Credentials::Masterkey(self.open.key());
        Self::closed(&self.bridge, &self.store)?.open(&credentials).map_err(|e| self.broken(&e))
    }

    /// Whose it is.
    pub fn tenant(&self) -> &Slug {
        &self.tenant
    }

    /// Where it is.
    pub fn location(&self) -> String {
        self.store.location()
    }

    /// The id of the key that opened it.
    pub fn key_id(&self) -> Option<String> {
        self.open.key_id().as_ref().map(|id| id.to_hex().to_string())
    }

    /// Every backup set, oldest first. Snapshots that somebody else made in the repository are not among them.
    pub fn sets(&self) -> Result<Vec<BackupSet>, RepositoryError> {
        let holds = self.holds()?;
        let mut sets: Vec<BackupSet> = self
            .snapshots()?
            .into_iter()
            .filter_map(|snapshot| {
                let mut set = described(&snapshot)?;
                set.hold = holds.get(&set.id).cloned();
                Some(set)
            })
            .collect();
        sets.sort_by(|a, b| a.taken_at.cmp(&b.taken_at).then_with(|| a.id.cmp(&b.id)));
        Ok(sets)
    }

    /// The set that a point means: for a time, the newest complete one not after it.
    pub fn set_at(&self, point: &RestorePoint) -> Result<BackupSet, RepositoryError> {
        let sets = self.sets()?;
        let complete = || sets.iter().rev().filter(|set| set.consistency.is_complete());
        let found = match point {
            RestorePoint::Latest => complete().next(),
            RestorePoint::Time { at } => complete().find(|set| set.taken_at <= *at),
            RestorePoint::Set { id } => {
                let mut matching = sets.iter().filter(|set| !id.0.is_empty() && set.id.0.starts_with(&id.0));
                matching.next().filter(|_| matching.next().is_none())
            }
            RestorePoint::Lsn { .. } => None,
        };
        found.cloned().ok_or_else(|| RepositoryError::NoSet {
            tenant: self.tenant.to_string(),
            wanted: match point {
                RestorePoint::Latest => "with every file in it".to_owned(),
                RestorePoint::Time { at } => format!("from {at} or before"),
                RestorePoint::Set { id } => format!("`{id}`, or more than one begins so"),
                RestorePoint::Lsn { lsn } => format!("at {lsn}: a log position needs a physical backup"),
            },
            known: match (sets.first(), sets.last()) {
                (Some(first), Some(last)) => {
                    format!("it has {}, from {} to {}", sets.len(), first.taken_at, last.taken_at)
                }
                _ => "it has none at all".to_owned(),
            },
        })
    }

    fn snapshots(&self) -> Result<Vec<SnapshotFile>, RepositoryError> {
        self.open.get_all_snapshots().map_err(|e| self.broken(&e))
    }

    fn snapshot(&self, id: &SetId) -> Result<SnapshotFile, RepositoryError> {
        self.open.get_snapshots(&[&id.0]).map_err(|e| self.broken(&e))?.pop().ok_or_else(|| RepositoryError::NoSet {
            tenant: self.tenant.to_string(),
            wanted: id.0.clone(),
            known: "it was there a moment ago".to_owned(),
        })
    }

    fn broken(&self, error: &RusticError) -> RepositoryError {
        self.bridge.take_failure().map_or_else(|| broken(&self.store, error), RepositoryError::Store)
    }
}

/// The keys that lie in a store, whatever they open.
fn key_ids(store: &Arc<dyn Store>) -> Result<Vec<rustic_core::Id>, RepositoryError> {
    let objects = store.list("keys/")?;
    Ok(objects.iter().filter_map(|object| object.name.rsplit('/').next()?.parse().ok()).collect())
}

/// What a snapshot's description says, if it is one of ours.
fn described(snapshot: &SnapshotFile) -> Option<BackupSet> {
    let mut set: BackupSet = serde_json::from_str(snapshot.description.as_deref()?).ok()?;
    set.id = SetId(snapshot.id.to_hex().to_string());
    Some(set)
}

fn broken(store: &Arc<dyn Store>, error: &RusticError) -> RepositoryError {
    // The library adds advice and traces for users of its own; what happened comes before them.
    let text = error.display_log();
    let text = text.split(" (kind: ").next().unwrap_or(&text);
    let text = text.strip_prefix("Error: ").unwrap_or(text);
    let reason = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    RepositoryError::Broken { location: store.location(), reason }
}
