//! The open server connections of one cluster: idle ones by (database, role, settings), and a cap on all of them.
//!
//! Having a connection and being allowed to use it are two things: slots come from the gate, connections from here. A
//! connection serves only clients with the same database, role and startup settings (rule 11), so `RESET` returns
//! to what the client itself asked for.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use cofferdam_tenant::{Cluster, Login, TenantId};
use rustls::ClientConfig;
use tokio::sync::{Notify, Semaphore};

use crate::session::StatementRegistry;
use crate::tls::{TlsError, client_config};
use crate::upstream::{Upstream, UpstreamError, connect};

/// Connections being opened at once per cluster: PostgreSQL forks for each, and a thundering herd helps nobody.
const CONNECTING: usize = 4;

/// What makes two server connections interchangeable.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) database: String,
    pub(crate) login: Login,
    /// Startup settings other than `application_name`, which is kept in step per transaction.
    pub(crate) settings: BTreeMap<String, String>,
}

/// The connections of one cluster.
#[derive(Debug)]
pub(crate) struct ConnectionCache {
    cluster: Arc<Cluster>,
    tls: Option<Arc<ClientConfig>>,
    state: Mutex<State>,
    freed: Notify,
    connecting: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    idle: HashMap<Arc<Key>, Vec<Idle>>,
    idle_count: u32,
    open: u32,
    closed: bool,
    /// Reported settings per key, so that a login needs no server connection.
    greetings: HashMap<Arc<Key>, Arc<BTreeMap<String, String>>>,
    statements: HashMap<Arc<Key>, Weak<StatementRegistry>>,
    /// Connections kept by sessions with state, per account.
    pinned: HashMap<TenantId, u32>,
}

#[derive(Debug)]
struct Idle {
    upstream: Upstream,
    since: Instant,
    core: usize,
    counted: Counted,
}

/// One of the cluster's connections; counts as open until it is dropped.
#[derive(Debug)]
pub(crate) struct Leased {
    // Fields drop in order: the socket closes before the connection stops counting.
    pub(crate) upstream: Upstream,
    pub(crate) key: Arc<Key>,
    counted: Counted,
}

#[derive(Debug)]
struct Counted(Arc<ConnectionCache>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.lock().open -= 1;
        self.0.freed.notify_one();
    }
}

/// One connection that a session keeps between its transactions.
#[derive(Debug)]
pub(crate) struct Pinned {
    cache: Arc<ConnectionCache>,
    account: TenantId,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        if let Some(count) = state.pinned.get_mut(&self.account) {
            *count -= 1;
            if *count == 0 {
                state.pinned.remove(&self.account);
            }
        }
    }
}

/// Why no connection could be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum LeaseError {
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    #[error("all {limit} connections of the cluster are held by sessions with state of their own")]
    Exhausted { limit: u32 },
}

/// What the cache holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheUsage {
    /// Open connections, idle ones included.
    pub open: u32,
    /// Idle ones.
    pub idle: u32,
}

impl ConnectionCache {
    pub(crate) fn new(cluster: Arc<Cluster>) -> Result<Arc<Self>, TlsError> {
        let tls = client_config(cluster.tls, cluster.tls_ca.as_deref())?;
        Ok(Arc::new(Self {
            cluster,
            tls,
            state: Mutex::default(),
            freed: Notify::new(),
            connecting: Semaphore::new(CONNECTING),
        }))
    }

    pub(crate) fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    pub(crate) fn usage(&self) -> CacheUsage {
        let state = self.lock();
        CacheUsage { open: state.open, idle: state.idle_count }
    }

    /// An idle connection, or a new one; at the cap, another key's idle connection makes room.
    ///
    /// Cancel-safe: a connection that was being opened is closed and stops counting.
    pub(crate) async fn lease(
        self: &Arc<Self>,
        key: &Arc<Key>,
        application_name: &str,
        patience: Duration,
    ) -> Result<Leased, LeaseError> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let freed = self.freed.notified();
            match self.take(key, application_name) {
                Taken::Idle(leased) if leased.upstream.is_alive() => return Ok(*leased),
                Taken::Idle(_) => {} // it has died while it was idle: the next one
                Taken::MayOpen(counted) => {
                    let Ok(_turn) = self.connecting.acquire().await else {
                        return Err(LeaseError::Exhausted { limit: self.cluster.connections });
                    };
                    let Key { database, login, settings } = &**key;
                    let tls = self.tls.as_ref();
                    let upstream = connect(&self.cluster, tls, login, database, settings, application_name).await?;
                    self.lock().greet(key, &upstream.reported);
                    return Ok(Leased { upstream, key: Arc::clone(key), counted });
                }
                Taken::Full => {
                    if tokio::time::timeout_at(deadline, freed).await.is_err() {
                        return Err(LeaseError::Exhausted { limit: self.cluster.connections });
                    }
                }
            }
        }
    }

    /// Puts a clean connection back.
    pub(crate) fn give_back(&self, leased: Leased) {
        let Leased { mut upstream, key, counted } = leased;
        upstream.inbound = bytes::BytesMut::new();
        upstream.outbound = bytes::BytesMut::new();
        let idle = Idle { upstream, since: Instant::now(), core: crate::core_number(), counted };
        let mut state = self.lock();
        if state.closed {
            drop(state);
            drop(idle);
            return;
        }
        state.idle.entry(key).or_default().push(idle);
        state.idle_count += 1;
        drop(state);
        self.freed.notify_one();
    }

    /// Connections that the sessions of one account may keep: half of what the slots leave, so that no tenant can take
    /// from the others the connections they need to use their slots.
    pub(crate) fn pin_limit(&self) -> u32 {
        (self.cluster.connections.saturating_sub(self.cluster.slots) / 2).max(1)
    }

    /// Notes that a session keeps its connection; `None` when its account keeps too many already.
    pub(crate) fn pin(self: &Arc<Self>, account: TenantId) -> Option<Pinned> {
        let mut state = self.lock();
        let count = state.pinned.entry(account).or_default();
        if *count >= self.pin_limit() {
            return None;
        }
        *count += 1;
        Some(Pinned { cache: Arc::clone(self), account })
    }

    /// What a client with this key is told at login, if any connection with this key has been opened.
    pub(crate) fn greeting(&self, key: &Arc<Key>) -> Option<Arc<BTreeMap<String, String>>> {
        self.lock().greetings.get(key).cloned()
    }

    /// The prepared statements of clients with this key, shared as long as one of them is there.
    pub(crate) fn statements(&self, key: &Arc<Key>) -> Arc<StatementRegistry> {
        let mut state = self.lock();
        if let Some(registry) = state.statements.get(key).and_then(Weak::upgrade) {
            return registry;
        }
        let registry = Arc::new(StatementRegistry::default());
        state.statements.retain(|_, r| r.strong_count() > 0);
        state.statements.insert(Arc::clone(key), Arc::downgrade(&registry));
        registry
    }

    /// Closes connections that have been idle for longer than the cluster allows.
    pub(crate) fn close_idle(&self, now: Instant) {
        let limit = self.cluster.idle_timeout;
        let mut closing = Vec::new();
        {
            let mut state = self.lock();
            for idle in state.idle.values_mut() {
                let (old, young) = std::mem::take(idle)
                    .into_iter()
                    .partition(|i| now.saturating_duration_since(i.since) >= limit || !i.upstream.is_alive());
                *idle = young;
                closing.extend::<Vec<Idle>>(old);
            }
            state.idle.retain(|_, idle| !idle.is_empty());
            state.idle_count -= closing.len() as u32;
        }
        drop(closing);
    }

    /// Closes all idle connections and keeps none from now on: the cluster was removed or has moved.
    pub(crate) fn close(&self) {
        let idle = {
            let mut state = self.lock();
            state.closed = true;
            state.idle_count = 0;
            std::mem::take(&mut state.idle)
        };
        drop(idle);
    }

    fn take(self: &Arc<Self>, key: &Arc<Key>, application_name: &str) -> Taken {
        let mut state = self.lock();
        if let Some(idle) = state.idle.get_mut(key) {
            // The same name saves a statement, the same core saves a wake-up across threads; else the warmest.
            let here = crate::core_number();
            let fits = |i: &Idle| {
                2 * u8::from(i.upstream.backend.application_name == application_name) + u8::from(i.core == here)
            };
            let best = idle.iter().enumerate().max_by_key(|(_, i)| fits(i)).map(|(n, _)| n);
            if let Some(Idle { upstream, counted, .. }) = best.map(|n| idle.remove(n)) {
                if idle.is_empty() {
                    state.idle.remove(key);
                }
                state.idle_count -= 1;
                return Taken::Idle(Box::new(Leased { upstream, key: Arc::clone(key), counted }));
            }
        }
        if state.open >= self.cluster.connections {
            let oldest = state
                .idle
                .iter()
                .filter_map(|(k, idle)| idle.first().map(|i| (i.since, k)))
                .min_by_key(|(since, _)| *since)
                .map(|(_, k)| Arc::clone(k));
            let Some(victim) = oldest else { return Taken::Full };
            let evicted = state.idle.get_mut(&victim).map(|idle| idle.remove(0));
            if state.idle.get(&victim).is_some_and(Vec::is_empty) {
                state.idle.remove(&victim);
            }
            state.idle_count -= 1;
            state.open += 1; // before the other stops counting, so that nobody slips in between
            drop(state);
            drop(evicted);
            return Taken::MayOpen(Counted(Arc::clone(self)));
        }
        state.open += 1;
        Taken::MayOpen(Counted(Arc::clone(self)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Taken {
    Idle(Box<Leased>),
    MayOpen(Counted),
    Full,
}

impl State {
    fn greet(&mut self, key: &Arc<Key>, reported: &Arc<BTreeMap<String, String>>) {
        const MANY: usize = 50_000;
        if self.greetings.len() >= MANY {
            self.greetings.clear();
        }
        self.greetings.insert(Arc::clone(key), Arc::clone(reported));
    }
}
