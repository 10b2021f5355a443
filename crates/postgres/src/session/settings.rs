//! Settings that a client has changed for its session: said again on each connection it gets (rule 12).
//!
//! Only what is one statement outside of a transaction is tracked: it has happened or not, and nothing takes it back.
//! Inside a transaction PostgreSQL itself keeps the value, with all that ROLLBACK and savepoints mean for it, and the
//! connection stays with the client. See `docs/decisions/0004-connections-by-settings.md`.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use bytes::BytesMut;

use super::{Backend, Owed, Session};
use crate::sql::Setting;
use crate::wire::{Reply, TransactionStatus};

/// A client that changes more settings keeps its connection.
const MAX_SETTINGS: usize = 64;

/// Settings that are not what they were after login, by name; values as they were written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    changed: BTreeMap<String, String>,
    digest: u64,
}

impl Settings {
    /// Whether everything is as after login.
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty()
    }

    /// The same for the same settings; zero for none.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    pub(super) fn apply(&mut self, setting: &Setting) {
        match setting {
            Setting::To(name, value) => drop(self.changed.insert(name.clone(), value.clone())),
            Setting::Reset(name) => drop(self.changed.remove(name)),
            Setting::ResetAll => self.changed.clear(),
        }
        self.digest = if self.changed.is_empty() {
            0
        } else {
            let mut hasher = DefaultHasher::new();
            self.changed.hash(&mut hasher);
            hasher.finish().max(1)
        };
    }

    /// The statements that make `wanted` of these settings.
    fn difference(&self, wanted: &Self) -> String {
        let mut sql = String::new();
        for name in self.changed.keys().filter(|name| !wanted.changed.contains_key(*name)) {
            sql += &format!("RESET {name};");
        }
        for (name, value) in &wanted.changed {
            if self.changed.get(name) != Some(value) {
                sql += &format!("SET {name} TO {value};");
            }
        }
        sql
    }
}

impl Session {
    /// The setting that a statement changes, when it can be tracked: nothing is under way that could take it back.
    pub(super) fn trackable(&self, body: &[u8]) -> Option<Setting> {
        let is_alone = self.status == TransactionStatus::Idle && self.pipeline.owes_only_injected() && !self.pinned;
        let setting = crate::sql::setting(body).filter(|_| is_alone)?;
        let has_room = self.settings.changed.len() < MAX_SETTINGS || !matches!(setting, Setting::To(..));
        has_room.then_some(setting)
    }

    /// A tracked statement has succeeded: its settings are the session's from now on, and the connection has them.
    pub(super) fn set(&mut self, setting: &Setting, backend: &mut Backend) {
        self.settings.apply(setting);
        backend.set.apply(setting);
        self.altered = backend.expects_what_is_reported(setting);
    }

    /// What the client has changed is the same for its next connection, wherever it gets one.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Makes the connection's settings the session's, in front of what the client sends (rule 12).
    pub fn restore(&mut self, backend: &mut Backend, to_server: &mut BytesMut, to_client: &mut BytesMut) {
        if backend.set.digest == self.settings.digest {
            return;
        }
        let sql = backend.set.difference(&self.settings);
        to_server.query(&sql);
        self.pipeline.owe(Owed::InjectedQuery, to_client);
        backend.set = self.settings.clone();
        self.restoring = true;
    }
}
