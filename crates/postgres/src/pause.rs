//! Databases for which no transaction begins: `PAUSE`, `SUSPEND`, `KILL` and `DISABLE` of the console.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// What is paused or disabled now.
#[derive(Debug, Default)]
pub(crate) struct Pauses {
    /// Whether there is anything to look up at all.
    any: AtomicBool,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    everything: bool,
    suspended: bool,
    paused: HashSet<String>,
    disabled: HashSet<String>,
    /// Databases that are being dropped, renamed or copied, and by how many.
    fenced: HashMap<String, u32>,
}

/// Databases for which no transaction begins while this lives.
#[derive(Debug)]
pub(crate) struct Fence {
    pauses: Arc<Pauses>,
    databases: Vec<String>,
}

impl Drop for Fence {
    fn drop(&mut self) {
        self.pauses.change(|state| {
            for database in &self.databases {
                if let Some(count) = state.fenced.get_mut(database) {
                    *count -= 1;
                    if *count == 0 {
                        state.fenced.remove(database);
                    }
                }
            }
        });
    }
}

impl Pauses {
    /// Lets no transaction of these databases begin while the fence stands. An operator's pause is another matter.
    pub(crate) fn fence(self: &Arc<Self>, databases: Vec<String>) -> Fence {
        self.change(|state| {
            for database in &databases {
                *state.fenced.entry(database.clone()).or_default() += 1;
            }
        });
        Fence { pauses: Arc::clone(self), databases }
    }

    /// Whether transactions of this database have to wait.
    pub(crate) fn is_paused(&self, database: &str) -> bool {
        self.any.load(Ordering::Acquire) && {
            let state = self.lock();
            state.everything
                || state.suspended
                || state.paused.contains(database)
                || state.fenced.contains_key(database)
        }
    }

    /// Whether new clients of this database are turned away.
    pub(crate) fn is_disabled(&self, database: &str) -> bool {
        self.any.load(Ordering::Acquire) && self.lock().disabled.contains(database)
    }

    /// `active`, `paused` and `suspended` of `SHOW STATE`.
    pub(crate) fn summary(&self) -> (bool, bool, bool) {
        let state = self.lock();
        (!state.everything && !state.suspended, state.everything, state.suspended)
    }

    /// Waits until transactions of this database may begin.
    pub(crate) async fn resumed(&self, database: &str) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if !self.is_paused(database) {
                return;
            }
            changed.await;
        }
    }

    /// Pauses one database, or all.
    pub(crate) fn pause(&self, database: Option<&str>) {
        self.change(|state| match database {
            Some(database) => drop(state.paused.insert(database.to_owned())),
            None => state.everything = true,
        });
    }

    pub(crate) fn suspend(&self) {
        self.change(|state| state.suspended = true);
    }

    /// Lets transactions begin again; false when nothing was paused.
    pub(crate) fn resume(&self, database: Option<&str>) -> bool {
        let mut was = false;
        self.change(|state| {
            if let Some(database) = database {
                was = state.paused.remove(database);
            } else {
                was = state.everything || state.suspended || !state.paused.is_empty();
                (state.everything, state.suspended) = (false, false);
                state.paused.clear();
            }
        });
        was
    }

    pub(crate) fn disable(&self, database: &str, disabled: bool) {
        self.change(|state| {
            if disabled {
                state.disabled.insert(database.to_owned());
            } else {
                state.disabled.remove(database);
            }
        });
    }

    fn change(&self, how: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        how(&mut state);
        let named = !state.paused.is_empty() || !state.disabled.is_empty() || !state.fenced.is_empty();
        let any = state.everything || state.suspended || named;
        self.any.store(any, Ordering::Release);
        drop(state);
        self.changed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
