//! Locking everything that a set refers to, and reading back whether it is locked.
//!
//! With deduplication a new set refers to old objects, whose locks end sooner: each backup extends them. What the store
//! then says is what the set's attestation says.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use rustic_core::repofile::{FileType, Node, SnapshotFile};
use rustic_core::{IndexedFullStatus, TreeId};

use super::bridge::object_name;
use super::store::{Locks, ObjectLock};
use super::{Repository, RepositoryError};
use crate::model::{Immutability, LockAttestation};

type Indexed = rustic_core::Repository<IndexedFullStatus>;

/// Threads that ask the store: each question is a round trip.
const SIDE_BY_SIDE: usize = 16;

impl Repository {
    /// Locks what a snapshot refers to for the policy's period from now on, and reads back what the store makes of it.
    ///
    /// An object that was just `written` with a lock and has none is locked now, and the set is still said not to be:
    /// a store that forgets once forgets again, and whoever reads the attestation must know.
    pub(super) fn attest(
        &self,
        snapshot: &SnapshotFile,
        written: &BTreeSet<String>,
    ) -> Result<LockAttestation, RepositoryError> {
        let Some(locks) = self.store.locks() else { return Ok(LockAttestation::NotAsked) };
        let Some(wanted) = locks.wanted() else { return Ok(LockAttestation::NotAsked) };
        let names: Vec<String> = self.reachable(snapshot)?.into_iter().collect();
        Self::lock_all(locks, wanted, &names, written, Timestamp::now())
    }

    /// Locks objects that are there, side by side.
    fn lock_all(
        locks: &dyn Locks,
        Immutability { mode, period }: Immutability,
        names: &[String],
        written: &BTreeSet<String>,
        now: Timestamp,
    ) -> Result<LockAttestation, RepositoryError> {
        let period = SignedDuration::try_from(period.0).unwrap_or(SignedDuration::ZERO);
        let wanted = ObjectLock { mode, until: now + period };
        let part = names.len().div_ceil(SIDE_BY_SIDE).max(1);
        let outcomes: Vec<Result<Checked, RepositoryError>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                names.chunks(part).map(|names| scope.spawn(move || lock_some(locks, wanted, names, written))).collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread.join().unwrap_or_else(|_| {
                        let reason = "a thread that read locks back has failed".to_owned();
                        Ok(Checked::Not(reason))
                    })
                })
                .collect()
        });
        let mut earliest = None;
        for outcome in outcomes {
            match outcome? {
                Checked::Not(reason) => return Ok(LockAttestation::NotLocked { reason }),
                Checked::Until(until) => earliest = Some(earliest.map_or(until, |e: Timestamp| e.min(until))),
            }
        }
        Ok(match earliest {
            Some(until) => LockAttestation::Locked { mode, until, objects: names.len() as u64 },
            None => LockAttestation::NotLocked { reason: "there is nothing to lock".to_owned() },
        })
    }

    /// Every object without which the snapshot could not be restored, but for its own file.
    fn reachable(&self, snapshot: &SnapshotFile) -> Result<BTreeSet<String>, RepositoryError> {
        let mut names = BTreeSet::from(["config".to_owned()]);
        for prefix in ["keys/", "index/"] {
            names.extend(self.store.list(prefix)?.into_iter().map(|object| object.name));
        }
        let indexed = self.again()?.to_indexed().map_err(|e| self.broken(&e))?;
        let mut seen = BTreeSet::new();
        self.walk(&indexed, snapshot.tree, &mut seen, &mut names)?;
        Ok(names)
    }

    fn walk(
        &self,
        indexed: &Indexed,
        tree: TreeId,
        seen: &mut BTreeSet<TreeId>,
        names: &mut BTreeSet<String>,
    ) -> Result<(), RepositoryError> {
        if !seen.insert(tree) {
            return Ok(());
        }
        let entry = indexed.get_index_entry(&tree).map_err(|e| self.broken(&e))?;
        names.insert(object_name(FileType::Pack, &entry.pack));
        for Node { content, subtree, .. } in indexed.get_tree(&tree).map_err(|e| self.broken(&e))?.nodes {
            for blob in content.iter().flatten() {
                let entry = indexed.get_index_entry(blob).map_err(|e| self.broken(&e))?;
                names.insert(object_name(FileType::Pack, &entry.pack));
            }
            if let Some(subtree) = subtree {
                self.walk(indexed, subtree, seen, names)?;
            }
        }
        Ok(())
    }
}

enum Checked {
    /// Every object is locked until then at least.
    Until(Timestamp),
    /// One is not.
    Not(String),
}

fn lock_some(
    locks: &dyn Locks,
    wanted: ObjectLock,
    names: &[String],
    written: &BTreeSet<String>,
) -> Result<Checked, RepositoryError> {
    let mut earliest = None;
    let mut forgotten = None;
    for name in names {
        let mut lock = locks.lock_of(name)?;
        if !lock.is_some_and(|lock| holds(lock, wanted)) {
            // Older than this backup, or the store has not done what it was told.
            if lock.is_none() && written.contains(name) {
                forgotten.get_or_insert_with(|| format!("{name}: written with a lock, and read back without one"));
            }
            let extended = locks.extend(name, wanted);
            lock = locks.lock_of(name)?;
            if !lock.is_some_and(|lock| holds(lock, wanted)) {
                let said = match (extended, lock) {
                    (Err(error), _) => error.to_string(),
                    (Ok(()), Some(lock)) => format!("read back: {:?} until {}", lock.mode, lock.until),
                    (Ok(()), None) => "read back: no lock".to_owned(),
                };
                return Ok(Checked::Not(format!("{name}: {said}")));
            }
        }
        if let Some(lock) = lock {
            earliest = Some(earliest.map_or(lock.until, |e: Timestamp| e.min(lock.until)));
        }
    }
    if let Some(reason) = forgotten {
        return Ok(Checked::Not(reason));
    }
    Ok(earliest.map_or_else(|| Checked::Not("nothing to lock".to_owned()), Checked::Until))
}

fn holds(lock: ObjectLock, wanted: ObjectLock) -> bool {
    use crate::model::LockMode::{Compliance, Governance};
    // Stricter than asked for is good enough.
    let strict = matches!((lock.mode, wanted.mode), (Compliance, _) | (Governance, Governance));
    strict && lock.until >= wanted.until
}
