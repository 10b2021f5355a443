//! Prepared statements across server connections (rule 14): one name per text for the whole process, and per server
//! connection the set of names that exist there.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::{Bytes, BytesMut};

use super::pipeline::{Owed, Pipeline};
use super::prepared::write_close;
use super::settings::Settings;
use crate::sql::{Effect, Setting};

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
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    by_text: HashMap<Bytes, Weak<Statement>>,
    /// With so many entries, those whose clients are gone are forgotten.
    sweep_at: usize,
}

impl Default for Known {
    fn default() -> Self {
        Self { by_text: HashMap::new(), sweep_at: SWEEP }
    }
}

/// The fewest entries for which looking for dead ones is worth it.
const SWEEP: usize = 64;

/// Numbers statements of all registries: a session may come to a connection of another registry when its tenant moves.
static NEXT_STATEMENT: AtomicU64 = AtomicU64::new(0);

impl StatementRegistry {
    /// The statement with this body, the same one for every client as long as somebody holds it.
    pub(crate) fn intern(&self, body: &[u8], effect: Effect) -> Arc<Statement> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(statement) = known.by_text.get(body).and_then(Weak::upgrade) {
            return statement;
        }
        if known.by_text.len() >= known.sweep_at {
            known.by_text.retain(|_, s| s.strong_count() > 0);
            known.sweep_at = (2 * known.by_text.len()).max(SWEEP);
        }
        let id = NEXT_STATEMENT.fetch_add(1, Ordering::Relaxed);
        let body = Bytes::copy_from_slice(body);
        let statement = Arc::new(Statement { id, body: body.clone(), effect, accepted: AtomicBool::new(false) });
        known.by_text.insert(body, Arc::downgrade(&statement));
        statement
    }

    /// Tables, views or types may not be what they were: whoever prepares a text from now on gets a plan of now. Who has
    /// prepared it before is told by the server, as without a gateway.
    pub(crate) fn schema_changed(&self) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).by_text.clear();
    }

    /// The statement with this body, if a server connection has accepted it before.
    pub(crate) fn accepted(&self, body: &[u8]) -> Option<Arc<Statement>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.by_text.get(body)?.upgrade().filter(|s| s.accepted.load(Ordering::Relaxed))
    }
}

/// What the gateway knows of one server connection's session.
#[derive(Debug, Default)]
pub struct Backend {
    prepared: HashMap<u64, u64>,
    by_use: BTreeMap<u64, u64>,
    clock: u64,
    /// Statements that may exist here although they must not be used: they are closed before they are prepared again.
    stale: HashSet<u64>,
    /// Reported settings that are not what they were on the fresh connection.
    altered: HashMap<Bytes, Bytes>,
    /// Reported settings as they were when the connection was fresh.
    baseline: HashMap<Bytes, Bytes>,
    /// Reported settings that a tracked statement has changed, in the server's own form.
    expected: HashMap<Bytes, Bytes>,
    /// The settings that tracked statements have changed.
    pub(super) set: Settings,
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
            // As the server has it, which cuts and cleans it.
            opened_as: reported.get("application_name").map_or(application_name, String::as_str).to_owned(),
            ..Self::default()
        }
    }

    /// Statements prepared here.
    pub(crate) fn statement_count(&self) -> u32 {
        self.prepared.len() as u32
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
        if self.stale.remove(&id) {
            write_close(to_server, &server_name(id));
            owed.owe(Owed::InjectedClose(Some(id)), to_client);
        }
        if self.prepared.len() >= PER_CONNECTION
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.prepared.remove(&oldest);
            write_close(to_server, &server_name(oldest));
            owed.owe(Owed::InjectedClose(Some(oldest)), to_client);
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

    /// A statement may or may not exist here, or must be planned again.
    pub(crate) fn distrust(&mut self, id: u64) {
        self.remove(id);
        self.stale.insert(id);
    }

    /// Everything has been deallocated.
    pub(crate) fn forget_statements(&mut self) {
        self.prepared.clear();
        self.by_use.clear();
        self.stale.clear();
    }

    /// Whether so many statements are in doubt that a reset is the better way.
    pub(crate) fn is_doubtful(&self) -> bool {
        self.stale.len() > PER_CONNECTION
    }

    /// The session is as after login.
    pub(crate) fn reset(&mut self) {
        // What is reported now is how a fresh session is: the server's configuration has changed.
        self.baseline.extend(self.altered.drain());
        self.discarded();
    }

    /// DISCARD ALL has happened.
    pub(crate) fn discarded(&mut self) {
        self.forget_statements();
        self.expected.clear();
        self.set = Settings::default();
        self.application_name.clone_from(&self.opened_as);
    }

    /// What tracked statements have changed here.
    pub(crate) fn settings(&self) -> &Settings {
        &self.set
    }

    /// A setting was reported that the gateway itself has changed for a client.
    pub(super) fn expect(&mut self, name: &[u8], value: &[u8]) {
        if name == b"application_name" {
            return; // kept in step elsewhere
        }
        self.altered.remove(name);
        if self.baseline.get(name).is_some_and(|baseline| baseline == value) {
            self.expected.remove(name);
        } else {
            self.expected.insert(Bytes::copy_from_slice(name), Bytes::copy_from_slice(value));
        }
    }

    /// What was reported of a setting is what a tracked statement has made of it. Says whether any other is not as it
    /// should be.
    pub(super) fn expects_what_is_reported(&mut self, setting: &Setting) -> bool {
        match setting {
            Setting::To(name, _) | Setting::Reset(name) => {
                let mine = |reported: &Bytes, _: &mut Bytes| reported.eq_ignore_ascii_case(name.as_bytes());
                let changed: Vec<_> = self.altered.extract_if(mine).collect();
                if matches!(setting, Setting::Reset(_)) {
                    self.expected.retain(|reported, _| !reported.eq_ignore_ascii_case(name.as_bytes()));
                }
                self.expected.extend(changed);
            }
            Setting::ResetAll => {
                self.expected.clear();
                self.altered.retain(|name, value| self.baseline.get(name) != Some(value));
            }
        }
        !self.altered.is_empty()
    }

    /// A setting was reported. Says whether any is not what it was on the fresh connection.
    pub(crate) fn report(&mut self, name: &[u8], value: &[u8]) -> bool {
        let usual = if name == b"application_name" {
            // Kept in step for each client.
            self.application_name = String::from_utf8_lossy(value).into_owned();
            true
        } else if matches!(name, b"is_superuser" | b"in_hot_standby" | b"default_transaction_read_only") {
            // What depends on the role or the transaction, and not on a SET.
            true
        } else {
            self.expected.get(name).or_else(|| self.baseline.get(name)).is_some_and(|usual| usual == value)
        };
        if usual {
            self.altered.remove(name);
        } else {
            self.altered.insert(Bytes::copy_from_slice(name), Bytes::copy_from_slice(value));
        }
        !self.altered.is_empty()
    }
}
