//! The plane as a whole: what all clients share, how it is reloaded, and how it is drained.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use cofferdam_fairness::{Clock, Gate, GateConfig, GateSet, GateSpec, Share};
use cofferdam_sched::cores_but;
use cofferdam_tenant::{AuthMethod, Catalog, Cluster, ClusterName, TenantId};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::PostgresError;
use crate::auth::Verifiers;
use crate::cache::{CacheUsage, ConnectionCache, Pool};
use crate::cancel::{CancelHandle, CancelRegistry};
use crate::client;
use crate::console::ConsoleHost;
use crate::door::Door;
use crate::pause::Pauses;
use crate::process::Processes;
use crate::servers::ServerUsage;
use crate::signal::Signal;
use crate::stats::Stats;
use crate::tls::FrontTls;

/// The expected or measured transaction time from which on work counts as expensive on this plane.
const EXPENSIVE_FROM: Duration = Duration::from_millis(200);
/// How often time passes for the gates.
const GATE_TICK: Duration = Duration::from_millis(50);
/// How often idle server connections are looked through.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// How often it is looked whether enough of them are ready.
const WARMING: Duration = Duration::from_secs(1);

/// The PostgreSQL plane.
///
/// Serves on the caller's runtime, and on as many runtimes at once as the caller likes: each calls
/// [`serve`](Self::serve) with a listener of its own.
pub struct PostgresPlane {
    snapshot: ArcSwap<Snapshot>,
    gates: GateSet,
    pub(crate) cancels: Arc<CancelRegistry>,
    pub(crate) processes: Arc<Processes>,
    pub(crate) verifiers: Arc<Verifiers>,
    pub(crate) connections: Semaphore,
    pub(crate) unauthenticated: Semaphore,
    /// Places for those who are told that there is none.
    pub(crate) turned_away: Semaphore,
    pub(crate) door: Arc<Door>,
    pub(crate) clients: Mutex<HashMap<TenantId, u32>>,
    pub(crate) counters: Counters,
    pub(crate) pauses: Arc<Pauses>,
    stats: Mutex<HashMap<String, Arc<Stats>>>,
    host: OnceLock<Arc<dyn ConsoleHost>>,
    begun: Instant,
    pub(crate) draining: Arc<Signal>,
    has_successor: AtomicBool,
    cut: Arc<Signal>,
    tasks: TaskTracker,
}

/// Counts since the plane was made.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) logins: AtomicU64,
    pub(crate) login_failures: AtomicU64,
    pub(crate) transactions: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) cancels: AtomicU64,
}

/// One consistent view for everything that a transaction needs to know.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) clusters: HashMap<ClusterName, ClusterAccess>,
    pub(crate) tls: Option<FrontTls>,
    pub(crate) auth: AuthMethod,
    pub(crate) login_timeout: Duration,
}

#[derive(Debug, Clone)]
pub(crate) struct ClusterAccess {
    pub(crate) gate: Arc<Gate>,
    pub(crate) cache: Arc<ConnectionCache>,
}

/// A catalog that this plane can serve: everything that could fail has been done.
#[derive(Debug)]
pub struct Prepared {
    catalog: Arc<Catalog>,
    tls: Option<FrontTls>,
    caches: BTreeMap<ClusterName, Arc<ConnectionCache>>,
}

/// What the plane is doing.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct PostgresUsage {
    /// Clients connected, by tenant number.
    pub clients: HashMap<TenantId, u32>,
    /// Server connections by cluster.
    pub connections: BTreeMap<String, CacheUsage>,
    /// Servers by cluster, and what is known of them.
    pub servers: BTreeMap<String, Vec<ServerUsage>>,
    /// Logins that succeeded so far.
    pub logins: u64,
    /// Logins that failed so far.
    pub login_failures: u64,
    /// Transactions finished so far.
    pub transactions: u64,
    /// Statements refused for want of a slot or connection so far.
    pub refused: u64,
    /// Cancel requests so far.
    pub cancels: u64,
}

impl PostgresPlane {
    /// A plane that serves a catalog. Must have a `postgres` section.
    pub fn new(catalog: &Arc<Catalog>, clock: Arc<dyn Clock>) -> Result<Arc<Self>, PostgresError> {
        let front = catalog.postgres.as_ref().ok_or(PostgresError::NotConfigured)?;
        let plane = Arc::new(Self {
            snapshot: ArcSwap::from_pointee(Snapshot::empty(Arc::clone(catalog))),
            gates: GateSet::new(clock),
            cancels: Arc::default(),
            processes: Arc::default(),
            verifiers: Arc::new(Verifiers::new()?),
            connections: Semaphore::new(front.config.max_connections as usize),
            unauthenticated: Semaphore::new(front.config.max_unauthenticated as usize),
            turned_away: Semaphore::new(client::TURNED_AWAY),
            door: Arc::default(),
            clients: Mutex::default(),
            counters: Counters::default(),
            pauses: Arc::default(),
            stats: Mutex::default(),
            host: OnceLock::new(),
            begun: Instant::now(),
            draining: Arc::default(),
            has_successor: AtomicBool::new(false),
            cut: Arc::default(),
            tasks: TaskTracker::new(),
        });
        let prepared = plane.prepare(Arc::clone(catalog))?;
        plane.commit(prepared);
        Ok(plane)
    }

    /// Does everything about a new catalog that can fail, and changes nothing.
    pub fn prepare(&self, catalog: Arc<Catalog>) -> Result<Prepared, PostgresError> {
        let front = catalog.postgres.as_ref().ok_or(PostgresError::NotConfigured)?;
        let place = || "postgres.tls".to_owned();
        let tls = crate::tls::front(front).map_err(|error| PostgresError::Tls { place: place(), error })?;
        let old = self.snapshot.load();
        let mut caches = BTreeMap::new();
        for (name, cluster) in &catalog.clusters {
            let kept = old.clusters.get(name).filter(|a| a.cache.cluster() == cluster);
            let cache = match kept {
                Some(access) => Arc::clone(&access.cache),
                None => ConnectionCache::new(
                    Arc::clone(cluster),
                    Arc::clone(&self.verifiers),
                    old.clusters.get(name).map(|access| &*access.cache),
                )
                .map_err(|error| PostgresError::Tls { place: format!("clusters.{name}"), error })?,
            };
            caches.insert(name.clone(), cache);
        }
        Ok(Prepared { catalog, tls, caches })
    }

    /// Serves a prepared catalog from the next transaction on.
    pub fn commit(&self, prepared: Prepared) {
        let Prepared { catalog, tls, caches } = prepared;
        self.gates.reconcile(catalog.clusters.values().map(|cluster| gate_spec(&catalog, cluster)));
        let clusters = caches
            .into_iter()
            .filter_map(|(name, cache)| {
                let gate = self.gates.get(name.as_str())?;
                Some((name, ClusterAccess { gate, cache }))
            })
            .collect();
        let mut snapshot = Snapshot { clusters, tls, ..Snapshot::empty(Arc::clone(&catalog)) };
        if let Some(front) = &catalog.postgres {
            snapshot.auth = front.auth;
            snapshot.login_timeout = front.config.login_timeout.0;
        }
        let old = self.snapshot.swap(Arc::new(snapshot));
        let new = self.snapshot.load();
        // Who listens and says nothing would go on listening at the old place.
        let place = |snapshot: &Snapshot, client: &CancelHandle| {
            let catalog = &snapshot.catalog;
            if *client.info.database == *Catalog::MAINTENANCE_DATABASE {
                return catalog.maintenance(&client.info.user).map(|(_, _, cluster)| cluster.name.clone());
            }
            catalog.by_database(&client.info.database).and_then(|t| t.cluster.as_ref().map(|c| c.name.clone()))
        };
        for client in self.cancels.all().iter().filter(|client| client.listens.load(Ordering::SeqCst)) {
            if place(&old, client) != place(&new, client) {
                client.moved.give();
            }
        }
        for (name, access) in &old.clusters {
            if !new.clusters.get(name).is_some_and(|a| Arc::ptr_eq(&a.cache, &access.cache)) {
                access.cache.close();
            }
        }
    }

    /// Accepts clients until the plane drains.
    ///
    /// Cancel-safe: dropping the future stops accepting; clients that are connected go on.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) -> io::Result<()> {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.draining.given() => return Ok(()),
            };
            match accepted {
                Ok((tcp, peer)) => {
                    let plane = Arc::clone(&self);
                    let mut cut = self.cut.listen();
                    self.tasks.spawn(async move {
                        let mut client = std::pin::pin!(client::serve(plane, tcp, peer));
                        std::future::poll_fn(|cx| match client.as_mut().poll(cx) {
                            Poll::Ready(()) => Poll::Ready(()),
                            Poll::Pending => cut.poll(cx),
                        })
                        .await;
                    });
                }
                // Local pressure (no file descriptors, say) is no reason to stop (rule 24).
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a PostgreSQL client");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// Lets time pass for the gates, and closes server connections that are idle for too long; runs until the plane
    /// has drained. Without it long work is charged late, deadlines of others are noticed late, and the number of
    /// slots does not adapt on a gate where nothing happens.
    pub async fn housekeeping(self: Arc<Self>) {
        let mut tick = tokio::time::interval(GATE_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let (mut cleaned, mut warmed) = (Instant::now(), Instant::now());
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.cut.given() => return,
            }
            let now = Instant::now();
            for access in self.snapshot.load().clusters.values() {
                access.cache.follow_primary();
                access.cache.look_at_what_lasts(EXPENSIVE_FROM);
                if warmed.elapsed() >= WARMING {
                    access.cache.warm_up();
                }
                let servers = access.cache.servers();
                if servers.is_look_due(now) {
                    tokio::spawn(Arc::clone(servers).look());
                }
            }
            // With what was seen just now.
            self.gates.advance();
            if warmed.elapsed() >= WARMING {
                warmed = now;
            }
            if cleaned.elapsed() < HOUSEKEEPING {
                continue;
            }
            cleaned = Instant::now();
            let snapshot = self.snapshot.load_full();
            for access in snapshot.clusters.values() {
                access.cache.close_idle(cleaned);
            }
            self.door.forget(cleaned);
            self.stats().iter().for_each(|(_, stats)| stats.tick(cleaned));
        }
    }

    /// Says that somebody else serves on the same sockets: a drain leaves clients alone until they are quiet, since
    /// they have somewhere to go and nothing is in a hurry.
    pub fn will_be_succeeded(&self) {
        self.has_successor.store(true, Ordering::Release);
        for access in self.snapshot.load().clusters.values() {
            access.cache.retire();
        }
    }

    pub(crate) fn has_successor(&self) -> bool {
        self.has_successor.load(Ordering::Acquire)
    }

    /// Stops accepting. Idle clients are told goodbye, transactions finish.
    pub fn drain(&self) {
        self.draining.give();
        self.tasks.close();
    }

    /// Waits until every client is gone; at the deadline those that are left are cut off. True when none was.
    pub async fn drained(&self, limit: Duration) -> bool {
        self.drain();
        let finished = tokio::time::timeout(limit, self.tasks.wait()).await.is_ok();
        if !finished {
            self.cut.give();
            self.tasks.wait().await;
        }
        self.cut.give();
        for access in self.snapshot.load().clusters.values() {
            access.cache.close();
        }
        finished
    }

    /// The gates by cluster.
    pub fn gates(&self) -> &GateSet {
        &self.gates
    }

    /// What the plane is doing.
    pub fn usage(&self) -> PostgresUsage {
        let count = |c: &AtomicU64| c.load(Ordering::Relaxed);
        PostgresUsage {
            clients: self.clients.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            connections: self
                .snapshot
                .load()
                .clusters
                .iter()
                .map(|(name, access)| (name.as_str().to_owned(), access.cache.usage()))
                .collect(),
            servers: self
                .snapshot
                .load()
                .clusters
                .iter()
                .map(|(name, access)| (name.as_str().to_owned(), access.cache.servers().usage()))
                .collect(),
            logins: count(&self.counters.logins),
            login_failures: count(&self.counters.login_failures),
            transactions: count(&self.counters.transactions),
            refused: count(&self.counters.refused),
            cancels: count(&self.counters.cancels),
        }
    }

    /// Gives the console somebody to carry out `RELOAD` and `SHUTDOWN`. Only the first call counts.
    pub fn set_console_host(&self, host: Arc<dyn ConsoleHost>) {
        let _ = self.host.set(host);
    }

    pub(crate) fn host(&self) -> Option<&Arc<dyn ConsoleHost>> {
        self.host.get()
    }

    pub(crate) fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Clients that have not proved yet who they are.
    pub(crate) fn logging_in(&self) -> usize {
        let front = self.snapshot.load();
        let all = front.catalog.postgres.as_ref().map_or(0, |f| f.config.max_unauthenticated as usize);
        all.saturating_sub(self.unauthenticated.available_permits())
    }

    /// The counters of a database.
    pub(crate) fn stats_of(&self, database: &str) -> Arc<Stats> {
        let mut all = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stats) = all.get(database) {
            return Arc::clone(stats);
        }
        Arc::clone(all.entry(database.to_owned()).or_default())
    }

    /// The counters of every database that somebody has logged in to, by name.
    pub(crate) fn stats(&self) -> Vec<(String, Arc<Stats>)> {
        let all = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = all.iter().map(|(name, stats)| (name.clone(), Arc::clone(stats))).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Whether a database can be reached through this plane.
    pub(crate) fn serves(&self, database: &str) -> bool {
        let snapshot = self.snapshot.load();
        let catalog = &snapshot.catalog;
        catalog.by_database(database).is_some_and(|t| t.cluster.is_some())
            || database == Catalog::MAINTENANCE_DATABASE && catalog.pools.values().any(|p| p.maintenance.is_some())
    }

    /// The pools of one database, or all.
    pub(crate) fn pools_of(&self, database: Option<&str>) -> Vec<Arc<Pool>> {
        let snapshot = self.snapshot.load();
        let pools = snapshot.clusters.values().flat_map(|access| access.cache.pools());
        pools.filter(|pool| database.is_none_or(|name| pool.key().database == name)).collect()
    }

    /// Replaces the server connections of one database, or all.
    pub(crate) fn reconnect(&self, database: Option<&str>) {
        self.pools_of(database).iter().for_each(|pool| pool.reconnect());
        for access in self.snapshot.load().clusters.values() {
            access.cache.listeners().end(database);
        }
    }

    /// Whether clients of one database, or any, have a server connection.
    pub(crate) fn has_work(&self, database: Option<&str>) -> bool {
        let of = |client: &CancelHandle| database.is_none_or(|name| *client.info.database == *name);
        self.cancels.all().iter().any(|client| of(client) && client.target().is_some())
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Whether a snapshot is still the current one.
    pub(crate) fn is_current(&self, snapshot: &Arc<Snapshot>) -> bool {
        Arc::ptr_eq(&self.snapshot.load(), snapshot)
    }
}

impl Drop for PostgresPlane {
    fn drop(&mut self) {
        for access in self.snapshot.load().clusters.values() {
            access.cache.close();
        }
    }
}

impl fmt::Debug for PostgresPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresPlane").field("gates", &self.gates).finish_non_exhaustive()
    }
}

impl Snapshot {
    fn empty(catalog: Arc<Catalog>) -> Self {
        Self {
            catalog,
            clusters: HashMap::new(),
            tls: None,
            auth: AuthMethod::ScramSha256,
            login_timeout: Duration::from_secs(15),
        }
    }
}

fn gate_spec(catalog: &Catalog, cluster: &Arc<Cluster>) -> GateSpec {
    let config = GateConfig {
        least_slots: cluster.min_slots,
        expensive_slots: cluster.expensive_slots,
        expensive_from: EXPENSIVE_FROM,
        // Half of the connections beyond the slots; the other half is for clients with state.
        overdraft: (cluster.connections.saturating_sub(cluster.slots) / 2).min(cluster.slots),
        cores: cluster.looks_at_processes().then(|| cores_but(cluster.priorities.map_or(0, |p| p.spare_cores))),
        policy: cluster.scheduling.into(),
        ..GateConfig::slots(cluster.slots)
    };
    let placed = catalog.tenants().iter().filter(|t| t.cluster.as_ref().is_some_and(|c| c.name == cluster.name));
    let tenants = placed.map(|t| (t.id, Share::from_quota(t.plan.weight, &t.plan.postgres)));
    let maintained = catalog.pools.values().filter(|p| p.maintenance.as_ref().is_some_and(|c| c.name == cluster.name));
    let pools = maintained.map(|p| (p.account, Share::default()));
    GateSpec { name: cluster.name.as_str().to_owned(), config, shares: tenants.chain(pools).collect() }
}
