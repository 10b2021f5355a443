//! Looking after a repository: verifying, forgetting, pruning, holding.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use jiff::Span;
use rustic_core::repofile::{FileType, IndexFile, SnapshotId};
use rustic_core::{CheckOptions, PruneOptions};
use sha2::{Digest, Sha256};

use super::bridge::object_name;
use super::{Repository, RepositoryError, StoreError};
use crate::model::{LegalHold, LockAttestation, SetId};

/// How deep a verification looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Every object that a set refers to is there in its full size. Reads the index and the trees.
    Structure,
    /// Besides, every object is read, and its content is what its name says.
    Everything,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Fault {
    /// The object, where one is to blame.
    pub object: Option<String>,
    /// What is wrong with it.
    pub problem: String,
}

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct Verification {
    /// Sets whose parts were looked at.
    pub sets: u64,
    /// Objects that were read.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Everything that is wrong; empty: the repository is whole.
    pub faults: Vec<Fault>,
}

/// What pruning did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Pruned {
    /// Bytes that no set refers to and that were removed, or marked to be removed when they are old enough.
    pub freed_bytes: u64,
    /// Bytes that were written again to free others.
    pub rewritten_bytes: u64,
}

const HOLDS: &str = "holds/";

impl Repository {
    /// Looks whether everything is there. What is wrong is in the result; an error means that it could not be told.
    pub fn verify(&self, depth: Depth) -> Result<Verification, RepositoryError> {
        let mut found = Verification::default();
        if depth == Depth::Everything {
            self.read_everything(&mut found)?;
        }
        let snapshots = match self.snapshots() {
            Ok(snapshots) => snapshots,
            Err(error) if !found.faults.is_empty() => {
                found.faults.push(Fault { object: None, problem: error.to_string() });
                return Ok(found);
            }
            Err(error) => return Err(error),
        };
        found.sets = snapshots.len() as u64;
        let known = found.faults.len();
        self.missing_packs(&mut found)?;
        let named: Vec<String> = found.faults[known..].iter().filter_map(|fault| fault.object.clone()).collect();
        // The library calls objects by the beginnings of their names.
        let said = |problem: &str| {
            named.iter().filter_map(|o| o.rsplit('/').next()?.get(..8)).any(|short| problem.contains(short))
        };
        let trees = snapshots.iter().map(|snapshot| snapshot.tree).collect();
        match self.open.check_with_trees(CheckOptions::default(), trees) {
            Ok(results) => {
                let wrong = if results.is_ok().is_err() { results.0 } else { Vec::new() };
                let wrong = wrong.into_iter().map(|(_, error)| error.to_string()).filter(|problem| !said(problem));
                found.faults.extend(wrong.map(|problem| Fault { object: None, problem }));
            }
            Err(error) => found.faults.push(Fault { object: None, problem: self.broken(&error).to_string() }),
        }
        Ok(found)
    }

    /// Every pack that the index knows is there in its full size.
    fn missing_packs(&self, found: &mut Verification) -> Result<(), RepositoryError> {
        let there: HashMap<String, u64> =
            self.store.list("data/")?.into_iter().map(|object| (object.name, object.size)).collect();
        for file in self.open.stream_files::<IndexFile>().map_err(|e| self.broken(&e))? {
            let (_, index) = file.map_err(|e| self.broken(&e))?;
            for pack in index.packs {
                let name = object_name(FileType::Pack, &pack.id);
                let expected = u64::from(pack.pack_size());
                let problem = match there.get(&name) {
                    Some(size) if *size == expected => continue,
                    Some(size) => format!("{name}: it has {size} bytes instead of {expected}"),
                    None => format!("{name}: it is missing"),
                };
                found.faults.push(Fault { object: Some(name), problem });
            }
        }
        Ok(())
    }

    /// Every object of the format is named after the SHA-256 of its content, but for the configuration.
    fn read_everything(&self, found: &mut Verification) -> Result<(), RepositoryError> {
        for prefix in ["keys/", "snapshots/", "index/", "data/"] {
            for object in self.store.list(prefix)? {
                found.objects += 1;
                found.bytes += object.size;
                let name = object.name.rsplit('/').next().unwrap_or_default();
                match self.store.read(&object.name) {
                    Ok(bytes) if hex::encode(Sha256::digest(&bytes)) == name => {}
                    Ok(_) => found.faults.push(Fault {
                        problem: format!("{}: its content is not what its name says", object.name),
                        object: Some(object.name),
                    }),
                    Err(error) => {
                        found.faults.push(Fault { problem: error.to_string(), object: Some(object.name) });
                    }
                }
            }
        }
        Ok(())
    }

    /// Forgets sets. Their bytes go with the next [`Repository::prune`]. A set under a legal hold, or whose lock lasts, is
    /// refused, and then none is forgotten.
    pub fn forget(&self, sets: &[SetId]) -> Result<(), RepositoryError> {
        let holds = self.holds()?;
        let now = jiff::Timestamp::now();
        let locked = self.sets()?.into_iter().filter(|set| sets.contains(&set.id)).find_map(|set| match set.lock {
            LockAttestation::Locked { until, .. } if until > now => Some((set.id, until)),
            _ => None,
        });
        if let Some((id, until)) = locked {
            return Err(RepositoryError::Broken {
                location: self.location(),
                reason: format!("backup {} is locked until {until}", id.short()),
            });
        }
        if let Some((id, hold)) = sets.iter().find_map(|id| holds.get_key_value(id)) {
            return Err(RepositoryError::Broken {
                location: self.location(),
                reason: format!("backup {} is under a legal hold ({}, by {})", id.short(), hold.reason, hold.by),
            });
        }
        let ids = sets
            .iter()
            .map(|set| {
                set.0.parse::<rustic_core::Id>().map(SnapshotId::from).map_err(|_| RepositoryError::NoSet {
                    tenant: self.tenant.to_string(),
                    wanted: set.0.clone(),
                    known: "ids are 64 hexadecimal digits".to_owned(),
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        self.open.delete_snapshots(&ids).map_err(|e| self.broken(&e))
    }

    /// Frees what no set refers to. There is no lock between programs: what is freed is first marked, and removed by a
    /// prune at least `grace` later, so that a backup running meanwhile can still use it.
    pub fn prune(&self, grace: jiff::SignedDuration) -> Result<Pruned, RepositoryError> {
        let grace = Span::new()
            .try_seconds(grace.as_secs())
            .map_err(|e| RepositoryError::Broken { location: self.location(), reason: e.to_string() })?;
        let options = PruneOptions::default().keep_delete(grace).keep_pack(grace);
        let plan = self.open.prune_plan(&options).map_err(|e| self.broken(&e))?;
        let sizes = plan.stats.size_sum();
        let pruned = Pruned {
            freed_bytes: sizes.remove + sizes.repackrm + plan.stats.size_unref,
            rewritten_bytes: sizes.repack,
        };
        self.open.prune(&options, plan).map_err(|e| self.broken(&e))?;
        Ok(pruned)
    }

    /// Sets that must not be deleted, and why.
    pub fn holds(&self) -> Result<BTreeMap<SetId, LegalHold>, RepositoryError> {
        let mut holds = BTreeMap::new();
        for object in self.store.list(HOLDS)? {
            let Some(id) = object.name.strip_prefix(HOLDS).and_then(|name| name.strip_suffix(".json")) else {
                continue;
            };
            let text = self.store.read(&object.name)?;
            // A hold that cannot be read still holds.
            let hold = serde_json::from_slice(&text).unwrap_or_else(|e| LegalHold {
                reason: format!("unreadable: {e}"),
                by: "unknown".to_owned(),
                since: jiff::Timestamp::UNIX_EPOCH,
            });
            holds.insert(SetId(id.to_owned()), hold);
        }
        Ok(holds)
    }

    /// Puts a set under a legal hold, or changes the reason.
    pub fn hold(&self, set: &SetId, hold: &LegalHold) -> Result<(), RepositoryError> {
        let text = serde_json::to_vec(hold)
            .map_err(|e| RepositoryError::Broken { location: self.location(), reason: e.to_string() })?;
        Ok(self.store.write(&hold_name(set), vec![Bytes::from(text)])?)
    }

    /// Lifts a legal hold.
    pub fn release(&self, set: &SetId) -> Result<(), RepositoryError> {
        match self.store.remove(&hold_name(set)) {
            Err(StoreError::Missing { .. }) => Ok(()),
            other => Ok(other?),
        }
    }
}

fn hold_name(set: &SetId) -> String {
    format!("{HOLDS}{}.json", set.0)
}
