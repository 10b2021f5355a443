//! The open server connections of one cluster, and a cap on all of them.
//!
//! Having a connection and being allowed to use it are two things: slots come from the gate, connections from here. A
//! [`Pool`] holds those of one (database, login, startup settings), so that `RESET` returns to what the client itself
//! asked for and no connection ever changes its role (rule 11). Sessions keep their pool at hand: what happens for each
//! transaction takes one short lock that only clients of the same pool want.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use cofferdam_processes::{Lowered, Lowering, Process, Untouched};
use cofferdam_tenant::{Cluster, Login, Password, Secret, TenantId};
use tokio::sync::{Notify, Semaphore};

use crate::auth::Verifiers;
use crate::listener::Listeners;
use crate::priority::{lower_workers, server_process};
use crate::servers::{Servers, Wanted};
use crate::tls::TlsError;
use crate::upstream::{Upstream, UpstreamError};

mod pool;

use pool::{CONNECTING_OF_POOL, Idle};
pub(crate) use pool::{CROWDED, Key, Pool};

/// Connections being opened at once per cluster: PostgreSQL forks for each, and a thundering herd helps nobody.
const CONNECTING: usize = 8;

/// Workers of parallel queries are looked for so often, while there is expensive work.
const LOOK_FOR_WORKERS: Duration = Duration::from_millis(250);

/// What a server said about a password is believed for so long.
const BELIEVED: Duration = Duration::from_secs(30);
/// The same after a wrong password.
const DOUBTED: Duration = Duration::from_secs(1);

/// The connections of one cluster.
#[derive(Debug)]
pub(crate) struct ConnectionCache {
    cluster: Arc<Cluster>,
    servers: Arc<Servers>,
    /// How many changes of the primary the pools have followed.
    followed: AtomicU64,
    /// Passwords that the cluster was asked for, by role.
    asked: Mutex<HashMap<String, Asked>>,
    /// The connection over which they are asked for.
    asker: tokio::sync::Mutex<Option<Upstream>>,
    pools: Mutex<HashMap<Arc<Key>, Arc<Pool>>>,
    /// Open connections, idle ones included.
    open: AtomicU32,
    closed: AtomicBool,
    /// Another process takes over: of idle connections only what is needed is kept.
    retiring: AtomicBool,
    /// Connections kept by sessions with state, per account.
    pinned: Mutex<HashMap<TenantId, u32>>,
    freed: Notify,
    connecting: Semaphore,
    listeners: Arc<Listeners>,
    /// The server's processes on this machine, where the cluster's are looked at.
    processes: Mutex<Vec<Weak<Process>>>,
    /// When workers of parallel queries were last looked for.
    looked_for_workers: Mutex<Instant>,
    /// It has been said that they cannot be.
    untouched: AtomicBool,
}

/// What the cluster stores of a password.
#[derive(Debug, Clone)]
struct Asked {
    stored: Option<Secret>,
    /// When it said so.
    at: Instant,
    /// It has not helped somebody.
    doubted: bool,
}

impl Asked {
    fn is_fresh(&self) -> bool {
        self.at.elapsed() < if self.doubted { DOUBTED } else { BELIEVED }
    }
}

/// One of the cluster's connections; counts as open until it is dropped.
#[derive(Debug)]
pub(crate) struct Leased {
    // Fields drop in order: the socket closes before the connection stops counting.
    pub(crate) upstream: Upstream,
    /// The process that serves it, where its priority is ours to set.
    pub(crate) process: Option<Arc<Process>>,
    wanted: Wanted,
    /// How often the primary had changed when it was opened.
    switches: u64,
    /// When it is replaced by a new one.
    expires: Option<Instant>,
    generation: Arc<()>,
    counted: Counted,
}

impl Leased {
    pub(crate) fn is_of_replica(&self) -> bool {
        self.wanted == Wanted::Replica
    }

    /// Whether it leads to a server that is not the primary any more.
    pub(crate) fn is_at_a_former_primary(&self) -> bool {
        let servers = &self.counted.0.servers;
        self.wanted == Wanted::Primary && self.switches != servers.switches()
    }

    fn has_expired(&self, now: Instant) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }
}

#[derive(Debug)]
struct Counted(Arc<ConnectionCache>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
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
        let mut pinned = lock(&self.cache.pinned);
        if let Some(count) = pinned.get_mut(&self.account) {
            *count -= 1;
            if *count == 0 {
                pinned.remove(&self.account);
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
    #[error("no server connection could be opened within {0:?}: others are being opened")]
    Crowded(Duration),
}

/// What the cache holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheUsage {
    /// Open connections, idle ones included.
    pub open: u32,
    /// Idle ones.
    pub idle: u32,
    /// Those whose server process runs with less than its usual priority.
    pub lowered: u32,
}

impl LeaseError {
    /// Whether trying again may help: the server could not be reached, or had no room.
    pub(crate) fn is_temporary(&self) -> bool {
        matches!(self, Self::Upstream(error) if error.is_unreachable() || error.is_crowded())
    }

    pub(crate) fn is_crowded(&self) -> bool {
        matches!(self, Self::Upstream(error) if error.is_crowded())
    }
}

impl ConnectionCache {
    /// `former` is the cache that this one replaces: what it was told of passwords is known here too.
    pub(crate) fn new(
        cluster: Arc<Cluster>,
        verifiers: Arc<Verifiers>,
        former: Option<&Self>,
    ) -> Result<Arc<Self>, TlsError> {
        Ok(Arc::new(Self {
            servers: Arc::new(Servers::new(Arc::clone(&cluster), verifiers)?),
            followed: AtomicU64::new(0),
            asked: Mutex::new(former.map(|former| lock(&former.asked).clone()).unwrap_or_default()),
            asker: tokio::sync::Mutex::default(),
            cluster,
            pools: Mutex::default(),
            open: AtomicU32::new(0),
            closed: AtomicBool::new(false),
            retiring: AtomicBool::new(false),
            pinned: Mutex::default(),
            freed: Notify::new(),
            connecting: Semaphore::new(CONNECTING),
            listeners: Arc::default(),
            processes: Mutex::default(),
            looked_for_workers: Mutex::new(Instant::now()),
            untouched: AtomicBool::new(false),
        }))
    }

    pub(crate) fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    pub(crate) fn usage(&self) -> CacheUsage {
        let idle = self.pools().iter().map(|p| p.idle_count()).sum();
        CacheUsage { open: self.open.load(Ordering::Acquire), idle, lowered: self.lowered() }
    }

    pub(crate) fn servers(&self) -> &Arc<Servers> {
        &self.servers
    }

    /// A login with what can be known of its password: the last answer of the cluster, when it has to be asked.
    pub(crate) fn resolve(&self, login: &Login) -> Login {
        if login.password != Password::Asked {
            return login.clone();
        }
        let known = lock(&self.asked).get(&login.role).and_then(|asked| asked.stored.clone());
        Login { role: login.role.clone(), password: known.map_or(Password::Asked, Password::Stored) }
    }

    /// Asks the cluster for a login's password, unless it is known from elsewhere or was asked a moment ago. What it said
    /// last is good enough when it cannot be asked now.
    pub(crate) async fn ask(&self, login: &Login) -> Result<Login, UpstreamError> {
        let is_fresh =
            || login.password != Password::Asked || lock(&self.asked).get(&login.role).is_some_and(Asked::is_fresh);
        if is_fresh() {
            return Ok(self.resolve(login));
        }
        // One question at a time, over one connection: who knocks costs the server nothing more.
        let mut asker = self.asker.lock().await;
        if !is_fresh() {
            match self.servers.ask_password(&mut asker, &login.role).await {
                Ok(stored) => {
                    let asked = Asked { stored: stored.map(Secret::new), at: Instant::now(), doubted: false };
                    let mut all = lock(&self.asked);
                    all.insert(login.role.clone(), asked);
                }
                Err(error) => {
                    *asker = None;
                    let known = self.resolve(login);
                    return if known.password == Password::Asked { Err(error) } else { Ok(known) };
                }
            }
        }
        Ok(self.resolve(login))
    }

    /// The cluster is asked again the next time: what it said last has not helped.
    pub(crate) fn ask_again(&self, role: &str) {
        if let Some(asked) = lock(&self.asked).get_mut(role) {
            asked.doubted = true;
        }
    }

    /// Has all pools open new connections: the primary is another one than before.
    pub(crate) fn follow_primary(&self) {
        let switches = self.servers.switches();
        if self.followed.swap(switches, Ordering::AcqRel) != switches {
            self.pools().iter().for_each(|pool| pool.reconnect());
            self.listeners.end(None);
        }
    }

    /// Opens what the cluster wants to be kept ready, while there is room.
    pub(crate) fn warm_up(self: &Arc<Self>) {
        let warm = self.cluster.warm;
        if warm == 0 || self.retiring.load(Ordering::Acquire) || !self.servers.is_worth_trying(Instant::now()) {
            return;
        }
        for pool in self.pools() {
            // Somebody else has it than the cache and this loop: clients.
            let has_clients = Arc::strong_count(&pool) > 2;
            if !has_clients || pool.idle_count() >= warm || pool.connecting() > 0 {
                continue;
            }
            tokio::spawn(async move {
                let Ok(_turn) = pool.connecting.acquire().await else { return };
                // One that is not kept, because the cluster was removed or everything is opened anew, is the last.
                while pool.idle_count() < warm
                    && let Ok(_turn_of_cluster) = pool.cache.connecting.acquire().await
                    && let Some(counted) = pool.cache.may_open_one_more()
                    && let Ok(leased) = pool.open("", counted).await
                    && pool.give_back(leased)
                {}
            });
        }
    }

    /// The process that serves a connection, where it runs on this machine and the cluster's are looked at.
    fn process_of(&self, upstream: &Upstream) -> Option<Arc<Process>> {
        if !self.cluster.looks_at_processes() {
            return None;
        }
        let priorities = self.cluster.priorities;
        let (local, peer) = (upstream.target.local?, upstream.stream.socket().peer_addr().ok()?);
        let is_here = local.ip() == peer.ip();
        let found =
            if is_here { server_process(upstream.target.pid(), local, priorities) } else { Err(Untouched::NotHere) };
        match found {
            Ok((process, untouched)) => {
                if let Some(why) = untouched {
                    self.say_untouched(why);
                }
                lock(&self.processes).push(Arc::downgrade(&process));
                Some(process)
            }
            Err(why) => {
                self.say_untouched(why);
                None
            }
        }
    }

    fn say_untouched(&self, why: Untouched) {
        if self.cluster.priorities.is_some() && !self.untouched.swap(true, Ordering::Relaxed) {
            tracing::warn!(cluster = %self.cluster.name, %why, "priorities of server processes are not set");
        }
    }

    /// Looks at server processes that have worked for so long, and lowers their priority where that is wanted.
    pub(crate) fn look_at_what_lasts(&self, limit: Duration) {
        if !self.cluster.looks_at_processes() {
            return;
        }
        let now = Instant::now();
        Lowering::of_this_machine().step(now);
        let long: Vec<Lowered> = self.live_processes().iter().filter_map(|p| p.outlasts(now, limit)).collect();
        let mut looked = lock(&self.looked_for_workers);
        if !long.is_empty() && now.saturating_duration_since(*looked) >= LOOK_FOR_WORKERS {
            *looked = now;
            tokio::task::spawn_blocking(move || lower_workers(&long));
        }
    }

    /// Server processes that run with less than their usual priority now.
    fn lowered(&self) -> u32 {
        self.live_processes().iter().filter(|process| process.is_lowered()).count() as u32
    }

    /// The server's processes, in hand, so that nothing is done with them under the lock.
    fn live_processes(&self) -> Vec<Arc<Process>> {
        let mut live = Vec::new();
        lock(&self.processes).retain(|process| process.upgrade().map(|process| live.push(process)).is_some());
        live
    }

    pub(crate) fn listeners(&self) -> &Arc<Listeners> {
        &self.listeners
    }

    /// All pools, in no order.
    pub(crate) fn pools(&self) -> Vec<Arc<Pool>> {
        lock(&self.pools).values().cloned().collect()
    }

    /// The pool of connections with this key.
    pub(crate) fn pool(self: &Arc<Self>, key: Key) -> Arc<Pool> {
        let mut pools = lock(&self.pools);
        if let Some(pool) = pools.get(&key) {
            return Arc::clone(pool);
        }
        // The same statements have the same names wherever they are prepared.
        let sibling = pools.get(&Key { wanted: Wanted::Primary, ..key.clone() });
        let statements = sibling.map(|sibling| Arc::clone(&sibling.statements)).unwrap_or_default();
        let key = Arc::new(key);
        let pool = Arc::new(Pool {
            key: Arc::clone(&key),
            cache: Arc::clone(self),
            idle: Mutex::default(),
            greeting: Mutex::default(),
            statements,
            connecting: Semaphore::new(CONNECTING_OF_POOL),
            given_back: Notify::new(),
            generation: Mutex::default(),
            outdated: Mutex::default(),
        });
        pools.insert(key, Arc::clone(&pool));
        pool
    }

    /// Connections that the sessions of one account may keep: half of what the slots leave, so that no tenant can take
    /// from the others the connections they need to use their slots.
    pub(crate) fn pin_limit(&self) -> u32 {
        (self.cluster.connections.saturating_sub(self.cluster.slots) / 2).max(1)
    }

    /// Notes that a session keeps its connection; `None` when its account keeps too many already.
    pub(crate) fn pin(self: &Arc<Self>, account: TenantId) -> Option<Pinned> {
        let mut pinned = lock(&self.pinned);
        let count = pinned.entry(account).or_default();
        if *count >= self.pin_limit() {
            return None;
        }
        *count += 1;
        Some(Pinned { cache: Arc::clone(self), account })
    }

    /// Closes connections that have been idle for longer than the cluster allows, and forgets pools that nobody uses.
    pub(crate) fn close_idle(&self, now: Instant) {
        let limit = self.cluster.idle_timeout;
        for pool in self.pools() {
            let closing: Vec<Idle> = {
                let mut idle = lock(&pool.idle);
                let warm = self.cluster.warm as usize;
                let mut left = idle.len();
                let old = |i: &mut Idle| {
                    let idle_too_long = now.saturating_duration_since(i.since) >= limit && left > warm;
                    let goes = idle_too_long || i.leased.has_expired(now) || !i.leased.upstream.is_alive();
                    left -= usize::from(goes);
                    goes
                };
                idle.extract_if(.., old).collect()
            };
            drop(closing);
        }
        // A pool that somebody looks up meanwhile is held by two and stays.
        lock(&self.pools).retain(|_, pool| Arc::strong_count(pool) > 1 || pool.idle_count() > 0);
    }

    /// Closes idle connections and keeps hardly any from now on: the server's are needed by the process that takes over.
    pub(crate) fn retire(&self) {
        self.retiring.store(true, Ordering::Release);
        for pool in self.pools() {
            let closing = std::mem::take(&mut *lock(&pool.idle));
            drop(closing);
        }
    }

    /// Closes all idle connections and keeps none from now on: the cluster was removed or has moved.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.listeners.close();
        for pool in self.pools() {
            let closing = std::mem::take(&mut *lock(&pool.idle));
            drop(closing);
        }
        lock(&self.pools).clear();
        self.freed.notify_waiters();
    }

    /// The right to open a connection while there is room.
    fn may_open_one_more(self: &Arc<Self>) -> Option<Counted> {
        let limit = self.cluster.connections;
        let one_more = |open| (open < limit).then_some(open + 1);
        self.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).ok().map(|_| Counted(Arc::clone(self)))
    }

    /// The right to open a connection. At the cap the database with most idle ones gives one up: who opens pools with
    /// ever new settings only displaces itself.
    fn may_open(self: &Arc<Self>) -> Option<Counted> {
        if let Some(counted) = self.may_open_one_more() {
            return Some(counted);
        }
        loop {
            let pools = self.pools();
            let mut idle_of: HashMap<&str, u32> = HashMap::new();
            for pool in &pools {
                *idle_of.entry(&pool.key.database).or_default() += pool.idle_count();
            }
            let (richest, _) = idle_of.into_iter().filter(|(_, idle)| *idle > 0).max_by_key(|(_, idle)| *idle)?;
            let of_richest = pools.iter().filter(|p| p.key.database == richest);
            let oldest = of_richest.filter_map(|p| Some((lock(&p.idle).first()?.since, p))).min_by_key(|(s, _)| *s);
            // Another may have been faster.
            let evicted = oldest.and_then(|(_, pool)| {
                let mut idle = lock(&pool.idle);
                if idle.is_empty() { None } else { Some(idle.remove(0).leased) }
            });
            if let Some(leased) = evicted {
                // Its place is taken over, so that nobody slips in between.
                let Leased { upstream, counted, .. } = *leased;
                drop(upstream);
                return Some(counted);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
