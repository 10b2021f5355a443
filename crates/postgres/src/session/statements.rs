//! Prepared statements across server connections (rule 14): one name per text for the whole process, and per server
//! connection the set of names that exist there.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::{Bytes, BytesMut};

use super::pipeline::{Owed, Pipeline};
use super::write_close;
use crate::sql::Effect;

/// Statements kept prepared on one server connection; the least recently used goes first.
const PER_CONNECTION: usize = 500;
/// The beginning of every name that the gateway gives.
pub(crate) const PREFIX: &[u8] = b"cofferdam_";

/// A prepared statement: its text and parameter types, and what executing it does to the session.
#[derive(Debug)]
pub struct Statement {
    /// The number in its server-side name.
    pub id: u64,
    /// The body of its Parse message after the name.
    pub body: Bytes,
    /// What it does to the session.
    pub effect: Effect,
    /// Some server connection has accepted it: the next client that prepares it need not wait for one.
    accepted: AtomicBool,
}

impl Statement {
    pub(crate) fn accept(&self) {
        self.accepted.store(true, Ordering::Relaxed);
    }
}

pub(crate) fn server_name(id: u64) -> Vec<u8> {
    let mut name = PREFIX.to_vec();
    name.extend_from_slice(id.to_string().as_bytes());
    name
}

/// The statements that clients with the same database, role and settings have prepared, by text.
#[derive(Debug, Default)]
pub struct StatementRegistry {
    known: Mutex<HashMap<Bytes, Weak<Statement>>>,
}

/// Numbers statements of all registries: a session may come to a connection of another registry when its tenant moves.
static NEXT_STATEMENT: AtomicU64 = AtomicU64::new(0);

impl StatementRegistry {
    /// The statement with this body, the same one for every client as long as somebody holds it.
    pub(crate) fn intern(&self, body: &[u8], effect: Effect) -> Arc<Statement> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(statement) = known.get(body).and_then(Weak::upgrade) {
            return statement;
        }
        if known.len() > 1_000 && known.len().is_power_of_two() {
            known.retain(|_, s| s.strong_count() > 0);
        }
        let id = NEXT_STATEMENT.fetch_add(1, Ordering::Relaxed);
        let body = Bytes::copy_from_slice(body);
        let statement = Arc::new(Statement { id, body: body.clone(), effect, accepted: AtomicBool::new(false) });
        known.insert(body, Arc::downgrade(&statement));
        statement
    }

    /// The statement with this body, if a server connection has accepted it before.
    pub(crate) fn accepted(&self, body: &[u8]) -> Option<Arc<Statement>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(body)?.upgrade().filter(|s| s.accepted.load(Ordering::Relaxed))
    }
}

/// What the gateway knows of one server connection's session.
#[derive(Debug, Default)]
pub struct Backend {
    prepared: HashMap<u64, u64>,
    by_use: BTreeMap<u64, u64>,
    clock: u64,
    /// Reported settings as they were when the connection was fresh.
    baseline: HashMap<Bytes, Bytes>,
    /// The `application_name` that is set there now.
    pub application_name: String,
    /// The `application_name` it was opened with, to which DISCARD ALL returns.
    pub opened_as: String,
}

impl Backend {
    /// A fresh connection with these reported settings.
    pub fn new(reported: &BTreeMap<String, String>, application_name: &str) -> Self {
        let bytes = |s: &String| Bytes::copy_from_slice(s.as_bytes());
        Self {
            baseline: reported.iter().map(|(k, v)| (bytes(k), bytes(v))).collect(),
            application_name: application_name.to_owned(),
            opened_as: application_name.to_owned(),
            ..Self::default()
        }
    }

    /// Whether a statement is prepared here.
    pub(crate) fn has(&self, id: u64) -> bool {
        self.prepared.contains_key(&id)
    }

    /// Notes a use; false when the statement is not prepared here.
    pub(crate) fn touch(&mut self, id: u64) -> bool {
        let Some(used) = self.prepared.get_mut(&id) else { return false };
        self.clock += 1;
        self.by_use.remove(used);
        *used = self.clock;
        self.by_use.insert(self.clock, id);
        true
    }

    /// Notes a statement that is about to be prepared, and closes the least recently used if there are too many.
    pub(crate) fn add(&mut self, id: u64, to_server: &mut BytesMut, owed: &mut Pipeline, to_client: &mut BytesMut) {
        if self.prepared.len() >= PER_CONNECTION
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.prepared.remove(&oldest);
            write_close(to_server, &server_name(oldest));
            owed.owe(Owed::InjectedClose, to_client);
        }
        self.clock += 1;
        self.prepared.insert(id, self.clock);
        self.by_use.insert(self.clock, id);
    }

    pub(crate) fn remove(&mut self, id: u64) {
        if let Some(used) = self.prepared.remove(&id) {
            self.by_use.remove(&used);
        }
    }

    pub(crate) fn forget_statements(&mut self) {
        self.prepared.clear();
        self.by_use.clear();
    }

    /// DISCARD ALL has happened.
    pub(crate) fn discarded(&mut self) {
        self.forget_statements();
        self.application_name.clone_from(&self.opened_as);
    }

    /// A setting was reported; true when it is not what it was on the fresh connection.
    pub(crate) fn report(&mut self, name: &[u8], value: &[u8]) -> bool {
        if name == b"application_name" {
            self.application_name = String::from_utf8_lossy(value).into_owned();
            return self.application_name != self.opened_as;
        }
        // What depends on the role or the transaction, and not on a SET.
        if matches!(name, b"is_superuser" | b"in_hot_standby" | b"default_transaction_read_only") {
            return false;
        }
        self.baseline.get(name).is_none_or(|baseline| baseline != value)
    }
}
