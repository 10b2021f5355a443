//! Cancel requests: keys of our own, delivered only while the client still owns the server connection (rule 16).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use subtle::ConstantTimeEq;
use tokio::sync::Notify;

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
    state: Mutex<State>,
    /// Told when no delivery is under way any more.
    quiet: Notify,
    /// Told when the client's query waits for a slot and shall not any more.
    pub(crate) waiting_cancelled: Notify,
}

#[derive(Debug, Default)]
struct State {
    target: Option<Arc<CancelTarget>>,
    waiting: bool,
    in_flight: u32,
}

impl CancelRegistry {
    /// A key for a new client; it is forgotten when the registration is dropped.
    pub(crate) fn register(self: &Arc<Self>) -> Result<Registration, getrandom::Error> {
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
            state: Mutex::default(),
            quiet: Notify::new(),
            waiting_cancelled: Notify::new(),
        });
        clients.insert(pid, Arc::clone(&handle));
        Ok(Registration { registry: Arc::clone(self), handle })
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
        lock(&self.state).target = Some(Arc::clone(target));
    }

    /// The query waits for a slot: a cancel ends the wait.
    pub(crate) fn waits(&self, waiting: bool) {
        lock(&self.state).waiting = waiting;
    }

    /// A cancel that came too late for the last wait must not end the next one.
    pub(crate) fn forget_stale(&self) {
        std::pin::pin!(self.waiting_cancelled.notified()).enable();
    }

    /// The client gives its server connection away. Waits until a cancel that is under way has reached the server:
    /// it must not hit whoever gets the connection next.
    pub(crate) async fn disowns(&self) {
        loop {
            let quiet = self.quiet.notified();
            {
                let mut state = lock(&self.state);
                state.target = None;
                if state.in_flight == 0 {
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
