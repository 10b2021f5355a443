//! A pool as the plane sees it: its gate, its servers, and what is known of them across reloads.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cofferdam_fairness::{Breaker, BreakerConfig, Gate, RetryBudget, Timestamp};
use cofferdam_tenant::{Endpoint, Pool, Server};

use crate::bucket::Bucket;
use crate::health::Health;
use crate::workers::Workers;

/// A pool, its gate and its servers.
#[derive(Debug)]
pub(crate) struct PoolAccess {
    pub(crate) pool: Arc<Pool>,
    pub(crate) gate: Arc<Gate>,
    servers: Vec<ServerLoad>,
    /// A fifth of what needed none, and a few at once.
    retries: Arc<Mutex<RetryBudget>>,
    /// Held by who wakes the servers.
    pub(crate) waking: Arc<tokio::sync::Mutex<()>>,
    /// Where files are that servers want sent, if they are not in a directory.
    pub(crate) bucket: Option<Arc<Bucket>>,
}

/// A server, and what is known of it.
#[derive(Debug)]
pub(crate) struct ServerLoad {
    pub(crate) server: Server,
    in_flight: Arc<AtomicU32>,
    /// Keeps requests, and their slots, from waiting for a server that cannot be reached. Shared across reloads.
    breaker: Arc<Mutex<Breaker>>,
    /// Puts a server last that closes without an answer time after time. Shared across reloads too.
    answers: Arc<Mutex<Breaker>>,
    pub(crate) health: Arc<Health>,
    /// Its workers, where they are looked at.
    pub(crate) workers: Option<Arc<Workers>>,
}

/// When a server that closes without an answer is put last, and for how long. One such answer is the end of one request.
const UNANSWERED: BreakerConfig =
    BreakerConfig { failures: 5, first_pause: Duration::from_secs(10), longest_pause: Duration::from_secs(300) };

impl PoolAccess {
    /// A pool, with what is known of it from before a reload.
    pub(crate) fn new(pool: &Arc<Pool>, gate: Arc<Gate>, bucket: Option<Arc<Bucket>>, known: Option<&Self>) -> Self {
        let servers_before = known.map_or(&[][..], |access| &access.servers);
        let servers: Vec<_> = pool.servers.iter().map(|s| ServerLoad::new(s.clone(), pool, servers_before)).collect();
        if pool.health.is_none() {
            for load in &servers {
                load.health.forget();
            }
        }
        let fresh = || Arc::new(Mutex::new(RetryBudget::new(20, 10)));
        Self {
            pool: Arc::clone(pool),
            gate,
            servers,
            retries: known.map_or_else(fresh, |access| Arc::clone(&access.retries)),
            waking: known.map_or_else(Arc::default, |access| Arc::clone(&access.waking)),
            bucket,
        }
    }

    /// The servers in the order in which a tenant's request should try them: its own first, because a worker that has
    /// its registry loaded answers faster; a full one last.
    pub(crate) fn order(&self, slug: &str) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.servers.len()).collect();
        order.sort_by_key(|n| {
            let load = &self.servers[*n];
            (self.is_full(load), std::cmp::Reverse(affinity(slug, &load.server.address)))
        });
        order
    }

    /// Whether a server has as much to do as it has workers, as far as the pool's slots tell.
    pub(crate) fn is_full(&self, load: &ServerLoad) -> bool {
        let capacity = self.pool.slots.div_ceil(self.servers.len().max(1) as u32);
        load.in_flight() >= capacity
    }

    pub(crate) fn servers(&self) -> &[ServerLoad] {
        &self.servers
    }

    pub(crate) fn retries(&self) -> MutexGuard<'_, RetryBudget> {
        self.retries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServerLoad {
    /// A server, with what is known of it from before a reload.
    fn new(server: Server, pool: &Pool, known: &[Self]) -> Self {
        let known = known.iter().find(|k| k.server.address == server.address);
        let workers = pool.looks_at_processes().then(|| {
            let known = known.and_then(|k| k.workers.as_ref()).filter(|known| known.priorities() == pool.priorities);
            known.map_or_else(|| Workers::new(&server.address, pool.priorities), Arc::clone)
        });
        if let Some(k) = known {
            Self {
                server,
                workers,
                in_flight: Arc::clone(&k.in_flight),
                breaker: Arc::clone(&k.breaker),
                answers: Arc::clone(&k.answers),
                health: Arc::clone(&k.health),
            }
        } else {
            let breaker = |config| Arc::new(Mutex::new(Breaker::new(config)));
            Self {
                server,
                workers,
                in_flight: Arc::default(),
                breaker: breaker(BreakerConfig::default()),
                answers: breaker(UNANSWERED),
                health: Arc::default(),
            }
        }
    }

    /// Whether it could be reached lately, or it is time to try again.
    pub(crate) fn may_be_tried(&self, now: Timestamp) -> bool {
        self.breaker().allows(now)
    }

    pub(crate) fn connected(&self) {
        self.breaker().succeeded();
    }

    pub(crate) fn unreachable(&self, now: Timestamp) {
        self.breaker().failed(now);
    }

    /// Whether it is one of those that are asked first: well, and one that has answered lately or may show that it does.
    pub(crate) fn is_preferred(&self, now: Timestamp) -> bool {
        self.health.is_well() && self.answers().allows(now)
    }

    pub(crate) fn answered(&self) {
        self.answers().succeeded();
    }

    /// It has closed without an answer.
    pub(crate) fn unanswered(&self, now: Timestamp) {
        self.answers().failed(now);
    }

    fn answers(&self) -> MutexGuard<'_, Breaker> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that it works on.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a request as in flight as long as the guard lives.
    pub(crate) fn begin(&self) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(&self.in_flight))
    }
}

pub(crate) struct InFlight(Arc<AtomicU32>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Rendezvous hashing (Thaler, Ravishankar 1998): a server that comes or goes moves only its own tenants.
fn affinity(slug: &str, server: &Endpoint) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64; // FNV-1a
    for byte in slug.bytes().chain([0]).chain(server.host.bytes()).chain(server.port.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^ (hash >> 29)
}
