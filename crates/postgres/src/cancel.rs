//! Who is connected; and cancel requests: keys of our own, delivered only while the client still owns the server
//! connection (rule 16).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use subtle::ConstantTimeEq;
use tokio::sync::Notify;

use crate::signal::Word;
use crate::upstream::CancelTarget;
use crate::wire::CancelKey;

/// All clients' cancel keys.
#[derive(Debug, Default)]
pub(crate) struct CancelRegistry {
    clients: Mutex<HashMap<u32, Arc<CancelHandle>>>,
    next: AtomicU32,
}

/// One client's key, and what its cancel would hit now.
#[derive(Debug)]
pub(crate) struct CancelHandle {
    pub(crate) pid: u32,
    pub(crate) secret: [u8; 4],
    pub(crate) info: ClientInfo,
    /// Given when an operator wants the client gone.
    pub(crate) killed: Word,
    /// Given when the database of a client that listens is somewhere else now.
    pub(crate) moved: Word,
    /// Whether the client listens to anything.
    pub(crate) listens: AtomicBool,
    /// Prepared statements, as the client last left a transaction.
    prepared: AtomicU32,
    state: Mutex<State>,
    /// Told when no delivery is under way any more.
    quiet: Notify,
    /// Told when the client's query waits for a slot and shall not any more.
    pub(crate) waiting_cancelled: Notify,
}

/// Who a client is.
#[derive(Debug)]
pub(crate) struct ClientInfo {
    pub(crate) user: Box<str>,
    pub(crate) database: Box<str>,
    pub(crate) application_name: Box<str>,
    pub(crate) peer: SocketAddr,
    pub(crate) local: Option<SocketAddr>,
    pub(crate) connected: SystemTime,
    pub(crate) encrypted: bool,
}

/// What a client is doing, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    Nothing,
    Waiting(Duration),
    Working(Duration),
}

#[derive(Debug, Default)]
struct State {
    target: Option<Arc<CancelTarget>>,
    waiting: bool,
    since: Option<Instant>,
    in_flight: u32,
}

impl CancelRegistry {
    /// A key for a new client; it is forgotten when the registration is dropped.
    pub(crate) fn register(self: &Arc<Self>, info: ClientInfo) -> Result<Registration, getrandom::Error> {
        let mut secret = [0; 4];
        getrandom::fill(&mut secret)?;
        let mut clients = lock(&self.clients);
        let pid = loop {
            // Positive as a signed number: some drivers print it so.
            let pid = self.next.fetch_add(1, Ordering::Relaxed) & 0x7fff_ffff;
            if pid != 0 && !clients.contains_key(&pid) {
                break pid;
            }
        };
        let handle = Arc::new(CancelHandle {
            pid,
            secret,
            info,
            killed: Word::default(),
            moved: Word::default(),
            listens: AtomicBool::new(false),
            prepared: AtomicU32::new(0),
            state: Mutex::default(),
            quiet: Notify::new(),
            waiting_cancelled: Notify::new(),
        });
        clients.insert(pid, Arc::clone(&handle));
        Ok(Registration { registry: Arc::clone(self), handle })
    }

    /// Everybody who is logged in, by number.
    pub(crate) fn all(&self) -> Vec<Arc<CancelHandle>> {
        let mut all: Vec<_> = lock(&self.clients).values().cloned().collect();
        all.sort_by_key(|client| client.pid);
        all
    }

    /// Carries out a cancel request. Unknown keys and idle clients are ignored, as PostgreSQL does.
    pub(crate) async fn cancel(&self, key: &CancelKey) {
        let handle = lock(&self.clients).get(&key.pid).cloned();
        let Some(handle) = handle else { return };
        if key.secret.len() != handle.secret.len() || !bool::from(key.secret.ct_eq(&handle.secret)) {
            return;
        }
        handle.cancel().await;
    }
}

impl CancelHandle {
    /// From now on a cancel hits this server connection.
    pub(crate) fn owns(&self, target: &Arc<CancelTarget>) {
        let mut state = lock(&self.state);
        state.target = Some(Arc::clone(target));
        state.since = Some(Instant::now());
    }

    pub(crate) fn target(&self) -> Option<Arc<CancelTarget>> {
        lock(&self.state).target.clone()
    }

    pub(crate) fn server_pid(&self) -> Option<u32> {
        lock(&self.state).target.as_ref().map(|t| t.pid())
    }

    pub(crate) fn doing(&self, now: Instant) -> Doing {
        let state = lock(&self.state);
        let since = state.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        match (state.waiting, &state.target) {
            (true, _) => Doing::Waiting(since),
            (false, Some(_)) => Doing::Working(since),
            (false, None) => Doing::Nothing,
        }
    }

    pub(crate) fn prepared(&self) -> u32 {
        self.prepared.load(Ordering::Relaxed)
    }

    pub(crate) fn note_prepared(&self, statements: u32) {
        self.prepared.store(statements, Ordering::Relaxed);
    }

    /// How long the client has had its server connection.
    pub(crate) fn owned_for(&self) -> Duration {
        let state = lock(&self.state);
        state.target.as_ref().and(state.since).map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The query waits for a slot: a cancel ends the wait.
    pub(crate) fn waits(&self, waiting: bool) {
        let mut state = lock(&self.state);
        state.waiting = waiting;
        if waiting {
            state.since = Some(Instant::now());
        }
    }

    /// A cancel that came too late for the last wait must not end the next one.
    pub(crate) fn forget_stale(&self) {
        std::pin::pin!(self.waiting_cancelled.notified()).enable();
    }

    /// The client gives its server connection away; false when a cancel is under way: see [`Self::disowns`].
    pub(crate) fn disowns_at_once(&self) -> bool {
        let mut state = lock(&self.state);
        state.target = None;
        state.in_flight == 0
    }

    /// The client gives its server connection away. Waits until a cancel that is under way has reached the server:
    /// it must not hit whoever gets the connection next.
    pub(crate) async fn disowns(&self) {
        loop {
            let quiet = self.quiet.notified();
            {
                if self.disowns_at_once() {
                    return;
                }
            }
            quiet.await;
        }
    }

    async fn cancel(&self) {
        let target = {
            let mut state = lock(&self.state);
            if state.waiting {
                self.waiting_cancelled.notify_one();
                return;
            }
            let Some(target) = state.target.clone() else { return };
            state.in_flight += 1;
            target
        };
        // Ends when the server has closed the cancel connection, that is, when the signal has been sent.
        let delivery = InFlight(self);
        if let Err(error) = target.cancel().await {
            tracing::debug!(%error, "cancel request could not be delivered");
        }
        drop(delivery);
    }
}

struct InFlight<'a>(&'a CancelHandle);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).in_flight -= 1;
        self.0.quiet.notify_waiters();
    }
}

/// Keeps a client's key known.
#[derive(Debug)]
pub(crate) struct Registration {
    registry: Arc<CancelRegistry>,
    pub(crate) handle: Arc<CancelHandle>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.registry.clients).remove(&self.handle.pid);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
