//! The plane as a whole: what all connections share, how it is reloaded, and how it is drained.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use cofferdam_acme::{Acme, HostState};
use cofferdam_fairness::{Clock, GateConfig, GateSet, GateSpec, Share, Timestamp};
use cofferdam_sched::cores_but;
use cofferdam_tenant::{
    Catalog, Endpoint, HeaderPolicyConfig, HttpFront, LoginProtectionConfig, Network, PlaneQuota, Pool, PoolName,
    Tenant, TenantId,
};
use http::HeaderValue;
use tokio::net::TcpListener;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::HttpError;
use crate::access::AccessLog;
use crate::bucket::Bucket;
use crate::cache::Store;
use crate::connection;
use crate::crowd::Crowd;
use crate::health;
use crate::login::Logins;
use crate::policy::Changes;
use crate::pool::PoolAccess;
use crate::reply::Refusal;
use crate::room::Room;
use crate::session::SessionKey;
use crate::spans::Spans;
use crate::tls::FrontTls;

/// The expected or measured request time from which on work counts as expensive on this plane.
const EXPENSIVE_FROM: Duration = Duration::from_millis(500);

/// How long is waited after certificates have come: with many hosts they come in numbers.
const CERTIFICATES_PAUSE: Duration = Duration::from_secs(1);

/// How often time passes for the gates.
const GATE_TICK: Duration = Duration::from_millis(50);

/// The HTTP plane.
///
/// Serves on the caller's runtime, and on as many runtimes at once as the caller likes: each calls
/// [`serve`](Self::serve) with a listener of its own.
pub struct HttpPlane {
    snapshot: ArcSwap<Snapshot>,
    /// One at a time changes what is served.
    changing: Mutex<()>,
    /// The authority for certificates may be another one.
    acme_changed: Notify,
    gates: GateSet,
    clock: Arc<dyn Clock>,
    pub(crate) counters: Counters,
    /// Large bodies that are read for the database they name, at once: a reader holds in memory what it reads.
    readers: Arc<Semaphore>,
    /// Tenants whose body is being looked into: one at a time of each.
    reading: Mutex<HashMap<TenantId, Arc<Semaphore>>>,
    /// Bytes of request bodies that wait for a worker.
    pub(crate) bodies: Room,
    /// Bytes of answers that were read ahead of slow clients: beyond its bounds a server is read only as fast as its client
    /// takes, and its slot is held as long.
    pub(crate) ahead: Room,
    pub(crate) websockets: Mutex<HashMap<TenantId, u32>>,
    pub(crate) draining: CancellationToken,
    has_successor: AtomicBool,
    connections: Semaphore,
    pub(crate) crowd: Arc<Crowd>,
    pub(crate) cut: CancellationToken,
    pub(crate) tasks: TaskTracker,
    pub(crate) logins: Logins,
    /// Makes request ids of different runs different.
    pub(crate) run: u64,
    next_request: AtomicU64,
}

/// A place to look into a large body: the tenant's, and one of all.
pub(crate) type Reader = (OwnedSemaphorePermit, OwnedSemaphorePermit);

/// Large bodies that are looked into at once.
const READERS: usize = 4;

/// Counts since the plane was made.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) requests: AtomicU64,
    pub(crate) unknown_host: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) denied: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) crowded: AtomicU64,
}

/// One consistent view for everything that a request needs to know.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) catalog: Arc<Catalog>,
    pools: HashMap<PoolName, Arc<PoolAccess>>,
    pub(crate) timeouts: Timeouts,
    /// Connections that one address may have.
    pub(crate) max_per_address: u32,
    pub(crate) scheme: &'static str,
    pub(crate) spool_threshold: u64,
    pub(crate) spool_directory: Option<PathBuf>,
    /// Bytes of an answer that are read ahead of a slow client.
    pub(crate) max_backlog: u64,
    pub(crate) trusted_proxies: Vec<Network>,
    pub(crate) session_key: Option<SessionKey>,
    /// Replaced when a certificate comes from an authority.
    pub(crate) tls: ArcSwapOption<FrontTls>,
    pub(crate) acme: Option<Arc<Acme>>,
    pub(crate) proxy_protocol: bool,
    /// Whether plain requests are sent to https.
    pub(crate) redirect: bool,
    /// The value of Strict-Transport-Security.
    pub(crate) hsts: Option<HeaderValue>,
    pub(crate) access_log: Option<AccessLog>,
    pub(crate) spans: Option<Arc<Spans>>,
    pub(crate) slow_request: Option<Duration>,
    pub(crate) cache: Arc<Store>,
    pub(crate) compression: u32,
    policy: Option<(Changes, Changes)>,
    policies: HashMap<TenantId, (Changes, Changes)>,
    pub(crate) login_protection: LoginProtectionConfig,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    pub(crate) header: Duration,
    pub(crate) body: Duration,
    pub(crate) keepalive: Duration,
    pub(crate) write: Duration,
}

/// How long the last spans may take to be sent.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the plane is doing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct HttpUsage {
    /// WebSockets open, by tenant number.
    pub websockets: HashMap<TenantId, u32>,
    /// Requests answered so far.
    pub requests: u64,
    /// Requests for hosts that nobody has so far.
    pub unknown_host: u64,
    /// Requests refused for want of a slot so far.
    pub refused: u64,
    /// Requests refused at a tenant's boundary so far: for what they name, where they come from or where they want to go.
    pub denied: u64,
    /// Requests that failed at the server so far.
    pub failed: u64,
    /// Connections closed because their address had as many as one may have, so far.
    pub crowded: u64,
    /// Lines of the access log that were dropped, since the disk was too slow, since it was opened.
    pub log_lines_dropped: u64,
    /// The servers of all pools.
    pub servers: Vec<ServerUsage>,
    /// What is kept of static files.
    pub cache: CacheUsage,
}

/// What is kept of static files, and what it was good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CacheUsage {
    /// Requests answered from what is kept so far.
    pub hits: u64,
    /// Requests for which a server was asked so far.
    pub misses: u64,
    /// Times a server has said that what is kept is still right.
    pub confirmed: u64,
    /// Objects in memory.
    pub memory_objects: u64,
    /// Bytes in memory.
    pub memory_bytes: u64,
    /// Objects on disk.
    pub disk_objects: u64,
    /// Bytes on disk.
    pub disk_bytes: u64,
}

/// One server of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerUsage {
    /// Its pool.
    pub pool: PoolName,
    /// Its address.
    pub address: Endpoint,
    /// Whether it is well, as far as is known.
    pub is_well: bool,
    /// Requests that it works on.
    pub in_flight: u32,
    /// Workers that run with less than their usual priority.
    pub lowered: u32,
}

impl HttpPlane {
    /// A plane that serves a catalog. Must have an `http` section.
    pub fn new(catalog: &Arc<Catalog>, clock: Arc<dyn Clock>) -> Result<Arc<Self>, HttpError> {
        let front = catalog.http.as_ref().ok_or(HttpError::NotConfigured)?;
        let mut run = [0; 8];
        // Request ids only tell requests apart: a zero here would merely make two runs look alike.
        let _ = getrandom::fill(&mut run);
        let plane = Arc::new(Self {
            snapshot: ArcSwap::from_pointee(Snapshot::new(Arc::clone(catalog), front)),
            changing: Mutex::default(),
            acme_changed: Notify::new(),
            gates: GateSet::new(Arc::clone(&clock)),
            clock,
            counters: Counters::default(),
            readers: Arc::new(Semaphore::new(READERS)),
            reading: Mutex::default(),
            bodies: Room::default(),
            ahead: Room::default(),
            websockets: Mutex::default(),
            draining: CancellationToken::new(),
            has_successor: AtomicBool::new(false),
            connections: Semaphore::new(front.config.max_connections as usize),
            crowd: Arc::default(),
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
            logins: Logins::default(),
            run: u64::from_le_bytes(run),
            next_request: AtomicU64::new(0),
        });
        plane.reload(catalog)?;
        Ok(plane)
    }

    /// Serves another catalog from the next request on. Requests that run keep the one they began with.
    pub fn reload(&self, catalog: &Arc<Catalog>) -> Result<(), HttpError> {
        let front = catalog.http.as_ref().ok_or(HttpError::NotConfigured)?;
        if front.session_key.is_none() {
            tracing::warn!(
                "without `http.session_key` a session of one tenant opens every tenant that shares its servers"
            );
        }
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        // What can fail comes before anything changes.
        let old = self.snapshot.load_full();
        let acme = match (&front.acme, old.acme.clone()) {
            (None, _) => None,
            (Some(wanted), Some(kept)) if kept.is_of(wanted) => Some(kept),
            (Some(wanted), _) => Some(Acme::open(wanted)?),
        };
        let tls = FrontTls::new(catalog, front, acme.as_ref(), old.tls.load().as_deref())?;
        let access_log = front
            .config
            .access_log
            .as_ref()
            .map(|path| AccessLog::open(path).map_err(|error| HttpError::AccessLog { path: path.clone(), error }));
        let access_log = access_log.transpose()?;
        let mut buckets = old.buckets(catalog)?;
        let wanted = front.config.traces.clone().map(|config| (config, front.traces_authorization.clone()));
        let spans = match (wanted, old.spans.clone()) {
            (None, _) => None,
            (Some(wanted), Some(kept)) if kept.is_of(&wanted) => Some(kept),
            (Some(wanted), _) => Some(Arc::new(Spans::new(wanted, self.run).map_err(HttpError::Traces)?)),
        };
        self.gates.reconcile(catalog.pools.values().map(|pool| gate_spec(catalog, pool)));
        let mut snapshot = Snapshot::new(Arc::clone(catalog), front);
        if let (Some(acme), Some(tls)) = (&acme, &tls) {
            acme.set_hosts(tls.by_acme().clone());
        }
        snapshot.tls = ArcSwapOption::new(tls);
        snapshot.acme = acme;
        snapshot.access_log = access_log;
        snapshot.spans = spans;
        if old.cache.is_of(&front.config.cache, front.config.spool_directory.as_ref()) {
            snapshot.cache = Arc::clone(&old.cache);
        }
        snapshot.pools = catalog
            .pools
            .iter()
            .filter_map(|(name, pool)| {
                let gate = self.gates.get(name.as_str())?;
                let access = PoolAccess::new(pool, gate, buckets.remove(name), old.pools.get(name).map(AsRef::as_ref));
                Some((name.clone(), Arc::new(access)))
            })
            .collect();
        let is_same = match (&old.acme, &snapshot.acme) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (old, new) => old.is_none() && new.is_none(),
        };
        self.snapshot.store(Arc::new(snapshot));
        if !is_same {
            self.acme_changed.notify_one();
        }
        Ok(())
    }

    /// Gets certificates from an authority and serves them; ends with the drain.
    async fn certify(self: Arc<Self>) {
        loop {
            let acme = self.snapshot().acme.clone();
            let work = async {
                let Some(acme) = acme else { return std::future::pending().await };
                let mut certificates = acme.certificates();
                // What has come between the reload and now is looked at too.
                certificates.mark_changed();
                let serve = async {
                    while certificates.changed().await.is_ok() {
                        certificates.mark_unchanged();
                        let plane = Arc::clone(&self);
                        let served = tokio::task::spawn_blocking(move || plane.serve_certificates());
                        let _ = served.await;
                        tokio::time::sleep(CERTIFICATES_PAUSE).await;
                    }
                };
                tokio::join!(acme.run(), serve);
            };
            tokio::select! {
                () = work => {}
                () = self.acme_changed.notified() => {}
                () = self.draining.cancelled() => return,
            }
        }
    }

    /// Serves the certificates that an authority has given.
    fn serve_certificates(&self) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let snapshot = self.snapshot();
        let Some(front) = &snapshot.catalog.http else { return };
        match FrontTls::new(&snapshot.catalog, front, snapshot.acme.as_ref(), snapshot.tls.load().as_deref()) {
            Ok(tls) => snapshot.tls.store(tls),
            Err(error) => tracing::error!(%error, "a new certificate cannot be served"),
        }
    }

    /// Accepts clients until the plane drains.
    ///
    /// Cancel-safe: dropping the future stops accepting; connections that are open go on.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) -> io::Result<()> {
        self.accept(listener, false).await
    }

    /// The same on an address of `http.tls`.
    pub async fn serve_tls(self: Arc<Self>, listener: TcpListener) -> io::Result<()> {
        self.accept(listener, true).await
    }

    async fn accept(self: Arc<Self>, listener: TcpListener, is_tls: bool) -> io::Result<()> {
        loop {
            // Whoever comes after the drain has begun is the successor's.
            let accepted = tokio::select! {
                biased;
                () = self.draining.cancelled() => return Ok(()),
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((tcp, peer)) => {
                    let plane = Arc::clone(&self);
                    let cut = self.cut.clone();
                    self.tasks.spawn(async move {
                        // Beyond the limit a connection is closed at once, which a load balancer understands.
                        let Ok(_connection) = plane.connections.try_acquire() else { return };
                        tokio::select! {
                            () = connection::serve(&plane, tcp, peer, is_tls) => {}
                            () = cut.cancelled() => {}
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an HTTP client");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// Lets time pass for the gates; runs until the plane has drained. See `PostgresPlane::housekeeping`.
    pub async fn housekeeping(self: Arc<Self>) {
        let mut tick = tokio::time::interval(GATE_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut health = std::pin::pin!(health::run(Arc::clone(&self)));
        self.tasks.spawn(Arc::clone(&self).certify());
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    let snapshot = self.snapshot();
                    for load in snapshot.pools().flat_map(|access| access.servers()) {
                        if let Some(workers) = &load.workers {
                            workers.look_at_what_lasts(EXPENSIVE_FROM);
                        }
                    }
                    // With what was seen just now.
                    self.gates.advance();
                }
                () = &mut health => return,
                () = self.cut.cancelled() => return,
            }
        }
    }

    /// Says that somebody else serves on the same sockets: a drain gives connections that are just open their time.
    pub fn will_be_succeeded(&self) {
        self.has_successor.store(true, Ordering::Release);
    }

    pub(crate) fn has_successor(&self) -> bool {
        self.has_successor.load(Ordering::Acquire)
    }

    /// Stops accepting. Idle connections are closed, requests finish, WebSockets are told to come again.
    pub fn drain(&self) {
        self.draining.cancel();
        self.tasks.close();
    }

    /// Waits until every connection is gone; at the deadline those that are left are cut off. True when none was.
    pub async fn drained(&self, limit: Duration) -> bool {
        self.drain();
        let finished = tokio::time::timeout(limit, self.tasks.wait()).await.is_ok();
        if !finished {
            self.cut.cancel();
            self.tasks.wait().await;
        }
        self.cut.cancel();
        let snapshot = self.snapshot();
        if let Some(spans) = snapshot.spans.clone() {
            // Beside the log, and not for long: a collector that hangs is no reason to stay.
            let sent = tokio::task::spawn_blocking(move || spans.flush());
            let _ = tokio::time::timeout(FAREWELL, sent).await;
        }
        let _ = tokio::task::spawn_blocking(move || snapshot.access_log.as_ref().map(AccessLog::flush)).await;
        finished
    }

    /// A place to look into a large body, or the refusal when there is none in time.
    pub(crate) async fn reader(&self, tenant: &Tenant, snapshot: &Snapshot) -> Result<Reader, Refusal> {
        let own = {
            let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody uses those of which there is only this one.
            reading.retain(|_, own| Arc::strong_count(own) > 1);
            Arc::clone(reading.entry(tenant.id).or_insert_with(|| Arc::new(Semaphore::new(1))))
        };
        let both = async {
            let own = own.acquire_owned().await.ok()?;
            Some((own, Arc::clone(&self.readers).acquire_owned().await.ok()?))
        };
        let both = tokio::time::timeout(snapshot.timeouts.body, both).await.ok().flatten();
        both.ok_or_else(|| Refusal::new(503, "Service busy", "too many large calls wait to be read"))
    }

    /// The gates by pool.
    pub fn gates(&self) -> &GateSet {
        &self.gates
    }

    /// What is known of the certificates that an authority gives, by host.
    pub fn certificates(&self) -> Vec<HostState> {
        self.snapshot().acme.as_ref().map(|acme| acme.states()).unwrap_or_default()
    }

    /// Forgets what is kept of static files: of one tenant or of all, below a path or everywhere.
    pub fn purge_cache(&self, tenant: Option<TenantId>, path: Option<&str>) {
        self.snapshot().cache.purge(tenant, path);
    }

    /// What the plane is doing.
    pub fn usage(&self) -> HttpUsage {
        let count = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let snapshot = self.snapshot();
        let servers = snapshot.pools().flat_map(|access| access.servers().iter().map(|load| (&access.pool.name, load)));
        let servers = servers.map(|(pool, load)| ServerUsage {
            pool: pool.clone(),
            address: load.server.address.clone(),
            is_well: load.health.is_well(),
            in_flight: load.in_flight(),
            lowered: load.workers.as_ref().map_or(0, |workers| workers.lowered()),
        });
        let cache = &snapshot.cache;
        let [(memory_objects, memory_bytes), (disk_objects, disk_bytes)] = cache.size();
        HttpUsage {
            cache: CacheUsage {
                hits: count(&cache.counters.hits),
                misses: count(&cache.counters.misses),
                confirmed: count(&cache.counters.confirmed),
                memory_objects,
                memory_bytes,
                disk_objects,
                disk_bytes,
            },
            servers: servers.collect(),
            log_lines_dropped: snapshot.access_log.as_ref().map_or(0, AccessLog::dropped),
            websockets: self.websockets.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            requests: count(&self.counters.requests),
            unknown_host: count(&self.counters.unknown_host),
            refused: count(&self.counters.refused),
            denied: count(&self.counters.denied),
            failed: count(&self.counters.failed),
            crowded: count(&self.counters.crowded),
        }
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    pub(crate) fn request_id(&self) -> String {
        let n = self.next_request.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}", self.run.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }
}

impl fmt::Debug for HttpPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpPlane").field("gates", &self.gates).finish_non_exhaustive()
    }
}

impl Snapshot {
    fn new(catalog: Arc<Catalog>, front: &HttpFront) -> Self {
        let config = &front.config;
        let changes = |policy: &HeaderPolicyConfig| {
            let some = *policy != HeaderPolicyConfig::default();
            some.then(|| (Changes::new(&policy.request), Changes::new(&policy.response)))
        };
        Self {
            pools: HashMap::new(),
            timeouts: Timeouts {
                header: config.header_timeout.0,
                body: config.body_timeout.0,
                keepalive: config.keepalive_timeout.0,
                write: config.write_timeout.0,
            },
            max_per_address: config.max_connections_per_address.unwrap_or((config.max_connections / 2).max(1)),
            scheme: config.public_scheme.as_str(),
            spool_threshold: config.spool_threshold.0,
            spool_directory: config.spool_directory.clone(),
            max_backlog: config.max_backlog.0,
            trusted_proxies: config.trusted_proxies.clone(),
            session_key: front.session_key.as_ref().and_then(|key| SessionKey::new(key.expose())),
            tls: ArcSwapOption::empty(),
            acme: None,
            proxy_protocol: config.proxy_protocol,
            access_log: None,
            spans: None,
            cache: Arc::new(Store::new(&config.cache, config.spool_directory.clone())),
            compression: config.compression,
            policy: changes(&config.headers),
            policies: catalog.tenants().iter().filter_map(|t| Some((t.id, changes(&t.headers)?))).collect(),
            catalog,
            slow_request: config.slow_request.map(|slow| slow.0),
            login_protection: config.login_protection.clone(),
            redirect: config.tls.as_ref().is_some_and(|tls| tls.redirect),
            hsts: config
                .tls
                .as_ref()
                .and_then(|tls| tls.hsts)
                .and_then(|age| HeaderValue::from_str(&format!("max-age={}", age.0.as_secs())).ok()),
        }
    }

    /// The buckets with filestores of a new catalog, by pool; those that are used already go on.
    fn buckets(&self, catalog: &Catalog) -> Result<HashMap<PoolName, Arc<Bucket>>, HttpError> {
        let mut buckets = HashMap::new();
        for (name, pool) in &catalog.pools {
            let Some(config) = &pool.filestore_bucket else { continue };
            let kept = self.pools.get(name).and_then(|access| access.bucket.clone());
            let bucket = match kept.filter(|bucket| bucket.is_of(config)) {
                Some(kept) => kept,
                None => {
                    Arc::new(Bucket::new(config).map_err(|reason| HttpError::Bucket { pool: name.clone(), reason })?)
                }
            };
            buckets.insert(name.clone(), bucket);
        }
        Ok(buckets)
    }

    /// Whether a proxy of ours is at this address.
    pub(crate) fn trusts(&self, address: IpAddr) -> bool {
        Network::any(&self.trusted_proxies, address)
    }

    pub(crate) fn pools(&self) -> impl Iterator<Item = &Arc<PoolAccess>> {
        self.pools.values()
    }

    /// The pool of a tenant, or its canary's.
    pub(crate) fn pool(&self, tenant: &Tenant, canary: bool) -> Option<&Arc<PoolAccess>> {
        let pool = tenant.canary.as_ref().filter(|_| canary).map(|canary| &canary.pool);
        self.pools.get(&pool.or(tenant.pool.as_ref())?.name)
    }

    /// What is changed of headers of requests and of answers: for all, and then for the tenant.
    pub(crate) fn policies(&self, tenant: &Tenant) -> impl Iterator<Item = &(Changes, Changes)> {
        self.policy.iter().chain(self.policies.get(&tenant.id))
    }
}

fn gate_spec(catalog: &Catalog, pool: &Arc<Pool>) -> GateSpec {
    let config = GateConfig {
        least_slots: pool.min_slots,
        expensive_slots: pool.expensive_slots,
        expensive_from: EXPENSIVE_FROM,
        cores: pool.looks_at_processes().then(|| cores_but(pool.priorities.map_or(0, |p| p.spare_cores))),
        policy: pool.scheduling.into(),
        ..GateConfig::slots(pool.slots)
    };
    let is_this = |other: &Arc<Pool>| other.name == pool.name;
    let placed = catalog.tenants().iter().filter_map(|t| {
        let canary = t.canary.as_ref().is_some_and(|canary| is_this(&canary.pool));
        // What is reserved is reserved in the tenant's own pool.
        let reserved = if canary { 0 } else { t.plan.http.reserved };
        let quota = PlaneQuota { reserved, ..t.plan.http };
        (canary || t.pool.as_ref().is_some_and(is_this)).then(|| (t.id, Share::from_quota(t.plan.weight, &quota)))
    });
    let shares = placed.collect();
    GateSpec { name: pool.name.as_str().to_owned(), config, shares }
}
