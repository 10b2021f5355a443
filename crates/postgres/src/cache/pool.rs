//! The connections of one cluster that are interchangeable: those of one database, login and startup settings.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use cofferdam_tenant::Login;
use tokio::sync::{Notify, Semaphore};

use super::{ConnectionCache, Counted, LeaseError, Leased, lock};
use crate::servers::{Wanted, random_fraction};
use crate::session::StatementRegistry;
use crate::stream::put_away;
use crate::upstream::Upstream;

/// Connections being opened at once per pool, fewer than per cluster, so that logins which hang leave room for others.
pub(super) const CONNECTING_OF_POOL: usize = 2;
/// A server without room for one more connection is asked again after this time.
pub(crate) const CROWDED: Duration = Duration::from_millis(100);

/// What makes two server connections interchangeable.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) database: String,
    pub(crate) login: Login,
    /// Startup settings other than `application_name`, which is kept in step per transaction.
    pub(crate) settings: Arc<BTreeMap<String, String>>,
    pub(crate) wanted: Wanted,
}

/// The connections of one cluster that are interchangeable.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(super) key: Arc<Key>,
    pub(super) cache: Arc<ConnectionCache>,
    pub(super) idle: Mutex<Vec<Idle>>,
    /// What the server reports at login, so that a client's login needs no server connection.
    pub(super) greeting: Mutex<Option<Arc<BTreeMap<String, String>>>>,
    pub(super) statements: Arc<StatementRegistry>,
    pub(super) connecting: Semaphore,
    pub(super) given_back: Notify,
    /// Connections that were opened before this generation are not used again.
    pub(super) generation: Mutex<Arc<()>>,
    /// Earlier generations, as long as connections of theirs are open.
    pub(super) outdated: Mutex<Vec<Weak<()>>>,
}

#[derive(Debug)]
pub(super) struct Idle {
    pub(super) leased: Box<Leased>,
    pub(super) since: Instant,
    pub(super) core: usize,
}

impl Pool {
    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    /// The pool of the same database and login with other settings.
    pub(crate) fn with_settings(&self, settings: BTreeMap<String, String>) -> Arc<Self> {
        self.cache.pool(Key { settings: Arc::new(settings), ..(*self.key).clone() })
    }

    /// The pool of the same connections to a replica.
    pub(crate) fn of_replicas(&self) -> Arc<Self> {
        self.cache.pool(Key { wanted: Wanted::Replica, ..(*self.key).clone() })
    }

    pub(crate) fn idle_count(&self) -> u32 {
        lock(&self.idle).len() as u32
    }

    /// The prepared statements of clients of this pool.
    pub(crate) fn statements(&self) -> &Arc<StatementRegistry> {
        &self.statements
    }

    /// What a client is told at login, if any connection has been opened.
    pub(crate) fn greeting(&self) -> Option<Arc<BTreeMap<String, String>>> {
        lock(&self.greeting).clone()
    }

    /// Closes idle connections, and lets those in use end with their transaction.
    pub(crate) fn reconnect(&self) {
        let outdated = std::mem::take(&mut *lock(&self.generation));
        lock(&self.outdated).push(Arc::downgrade(&outdated));
        drop(outdated);
        let closing = std::mem::take(&mut *lock(&self.idle));
        drop(closing);
    }

    /// Whether connections are open that [`Self::reconnect`] wants closed.
    pub(crate) fn has_outdated(&self) -> bool {
        let mut outdated = lock(&self.outdated);
        outdated.retain(|generation| generation.strong_count() > 0);
        !outdated.is_empty()
    }

    pub(crate) fn connecting(&self) -> u32 {
        CONNECTING_OF_POOL.saturating_sub(self.connecting.available_permits()) as u32
    }

    pub(crate) fn each_idle(&self, mut what: impl FnMut(&Upstream)) {
        lock(&self.idle).iter().for_each(|idle| what(&idle.leased.upstream));
    }

    /// An idle connection, if there is one; `settings` is the digest of what its next user has changed.
    pub(crate) fn take(&self, application_name: &str, settings: u64) -> Option<Box<Leased>> {
        let here = crate::core_number();
        loop {
            let mut idle = lock(&self.idle);
            // The same settings or name save a statement, the same core saves a wake-up across threads; else the warmest.
            let mut best: Option<(u8, usize)> = None;
            for (n, i) in idle.iter().enumerate().rev() {
                let same_name = i.leased.upstream.backend.application_name == application_name;
                let same_settings = i.leased.upstream.backend.settings().digest() == settings;
                let fit = 4 * u8::from(same_settings) + 2 * u8::from(same_name) + u8::from(i.core == here);
                if best.is_none_or(|(known, _)| fit > known) {
                    best = Some((fit, n));
                    if fit == 7 {
                        break;
                    }
                }
            }
            let Idle { leased, .. } = idle.remove(best?.1);
            drop(idle);
            if leased.upstream.is_alive() {
                return Some(leased);
            }
        }
    }

    /// An idle connection, or a new one; at the cap, another pool's idle connection makes room.
    ///
    /// Cancel-safe: a connection that was being opened is closed and stops counting.
    pub(crate) async fn lease(
        &self,
        application_name: &str,
        settings: u64,
        patience: Duration,
    ) -> Result<Box<Leased>, LeaseError> {
        let deadline = tokio::time::Instant::now() + patience;
        let cache = &self.cache;
        loop {
            let mut freed = std::pin::pin!(cache.freed.notified());
            freed.as_mut().enable();
            if let Some(leased) = self.take(application_name, settings) {
                return Ok(leased);
            }
            let Some(counted) = cache.may_open() else {
                if tokio::time::timeout_at(deadline, freed).await.is_err() {
                    return Err(LeaseError::Exhausted { limit: cache.cluster.connections });
                }
                continue;
            };
            let turn = async { (self.connecting.acquire().await, cache.connecting.acquire().await) };
            let mut turn = std::pin::pin!(tokio::time::timeout_at(deadline, turn));
            let turn = loop {
                tokio::select! {
                    biased;
                    turn = &mut turn => break turn,
                    // One of this pool: that is faster than opening another.
                    () = self.given_back.notified() => if let Some(leased) = self.take(application_name, settings) {
                        return Ok(leased);
                    },
                }
            };
            let Ok((Ok(_of_pool), Ok(_of_cluster))) = turn else {
                return Err(LeaseError::Crowded(patience));
            };
            // Meanwhile somebody may have given one back.
            if let Some(leased) = self.take(application_name, settings) {
                return Ok(leased);
            }
            return self.open(application_name, counted).await;
        }
    }

    /// As [`Self::lease`]; a server that cannot be reached is waited for.
    pub(crate) async fn lease_patiently(
        &self,
        application_name: &str,
        patience: Duration,
    ) -> Result<Box<Leased>, LeaseError> {
        let deadline = tokio::time::Instant::now() + patience.min(self.cache.cluster.reconnect_wait);
        loop {
            match self.lease(application_name, 0, patience).await {
                Err(error) if error.is_temporary() => {
                    let again = async {
                        if error.is_crowded() {
                            tokio::time::sleep(CROWDED).await;
                        }
                        self.cache.servers.worth_trying().await;
                    };
                    if tokio::time::timeout_at(deadline, again).await.is_err() {
                        return Err(error);
                    }
                }
                other => return other,
            }
        }
    }

    pub(super) async fn open(&self, application_name: &str, counted: Counted) -> Result<Box<Leased>, LeaseError> {
        let cache = &self.cache;
        let generation = Arc::clone(&lock(&self.generation));
        let switches = cache.servers.switches();
        let Key { database, login, settings, wanted } = &*self.key;
        let upstream = cache.servers.open(*wanted, login, database, settings, application_name).await?;
        if *wanted == Wanted::Primary {
            *lock(&self.greeting) = Some(Arc::clone(&upstream.reported));
        }
        // Not all at once: those that were opened together would be replaced together.
        let age = cache.cluster.lifetime.mul_f64(0.9 + random_fraction() / 5.0);
        let expires = (!age.is_zero()).then(|| Instant::now() + age);
        let process = cache.process_of(&upstream);
        // Boxed: it goes from hand to hand, and a client that is idle has room for none.
        Ok(Box::new(Leased { upstream, process, wanted: *wanted, switches, expires, generation, counted }))
    }

    /// Puts a clean connection back; false when it was closed instead.
    pub(crate) fn give_back(&self, mut leased: Box<Leased>) -> bool {
        if leased.wanted != self.key.wanted {
            return self.of_replicas().give_back(leased);
        }
        let now = Instant::now();
        if leased.has_expired(now) {
            return false;
        }
        put_away(&mut leased.upstream.inbound);
        put_away(&mut leased.upstream.outbound);
        let idle = Idle { leased, since: now, core: crate::core_number() };
        let mut all = lock(&self.idle);
        // Looked at under the lock: `close` and `reconnect` empty the pool after they have changed these.
        let enough = self.cache.retiring.load(Ordering::Acquire) && !all.is_empty();
        if enough
            || self.cache.closed.load(Ordering::Acquire)
            || !Arc::ptr_eq(&idle.leased.generation, &lock(&self.generation))
        {
            drop(all);
            drop(idle);
            return false;
        }
        all.push(idle);
        drop(all);
        self.given_back.notify_one();
        self.cache.freed.notify_one();
        true
    }
}
