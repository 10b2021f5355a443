//! The servers of one cluster: which is the primary, which can be reached, how far the replicas are behind.
//!
//! What is known comes from connections that are opened anyway (a server says whether it is a standby), and from the
//! cluster's `service` login, which looks at each server every `health_interval`. A server that cannot be reached is
//! left alone for a time that grows and is never the same for two gateways (rule 24).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_tenant::{Cluster, Endpoint, Login, ReadOnlyRouting};
use rustls::ClientConfig;
use tokio::sync::Notify;

use crate::auth::Verifiers;
use crate::tls::{TlsError, towards};
use crate::upstream::{Target, Upstream, UpstreamError, connect};

/// How long a server is left alone after the first failure; doubled with each that follows.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// The same for a standby that is asked whether it has been promoted.
const LONGEST_DENIAL: Duration = Duration::from_secs(1);
const NONE: usize = usize::MAX;

/// In one row: whether the server is a standby, and how many seconds it is behind. A standby that has replayed all it
/// received is not behind as long as it is connected to its primary.
const LOOK: &str = "SELECT pg_catalog.pg_is_in_recovery(), CASE \
    WHEN NOT pg_catalog.pg_is_in_recovery() THEN 0 \
    WHEN EXISTS (SELECT FROM pg_catalog.pg_stat_wal_receiver) \
        AND pg_catalog.pg_last_wal_receive_lsn() OPERATOR(pg_catalog.=) pg_catalog.pg_last_wal_replay_lsn() THEN 0 \
    ELSE COALESCE(EXTRACT(EPOCH FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) \
        pg_catalog.pg_last_xact_replay_timestamp()), 1e9) END::pg_catalog.float8";

/// Which kind of server a connection shall lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Wanted {
    Primary,
    Replica,
}

/// What a server is known to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ServerRole {
    /// Nobody has been there yet.
    #[default]
    Unknown,
    /// It takes writes.
    Primary,
    /// It follows a primary.
    Replica,
}

impl ServerRole {
    /// The name used in metrics and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Primary => "primary",
            Self::Replica => "replica",
        }
    }
}

/// What is known of one server.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ServerUsage {
    /// Where it listens.
    pub address: Endpoint,
    /// What it is.
    pub role: ServerRole,
    /// Whether it could be reached the last time.
    pub is_up: bool,
    /// How far a replica is behind.
    pub lag: Option<Duration>,
}

/// The servers of one cluster.
pub(crate) struct Servers {
    cluster: Arc<Cluster>,
    tls: Option<Arc<ClientConfig>>,
    verifiers: Arc<Verifiers>,
    all: Vec<Server>,
    primary: AtomicUsize,
    /// Turns among the replicas.
    turn: AtomicUsize,
    /// How often the primary has become another one.
    switches: AtomicU64,
    /// A server that could not be reached can be, or there is a primary.
    reached: Notify,
    looking: AtomicBool,
    looked: Mutex<Option<Instant>>,
}

struct Server {
    address: Endpoint,
    state: Mutex<State>,
    /// The connection through which it is looked at.
    eye: tokio::sync::Mutex<Option<Upstream>>,
}

#[derive(Debug, Default)]
struct State {
    role: ServerRole,
    failures: u32,
    /// Not before, after a failure.
    retry: Option<Instant>,
    /// How often it was asked to be the primary and was not, and when it may be asked again.
    denials: u32,
    denied_until: Option<Instant>,
    /// How far it was behind, and when.
    lag: Option<(Duration, Instant)>,
    /// It was said already why it cannot be looked at.
    complained: bool,
}

impl State {
    /// Until when it is not tried as a primary.
    fn left_alone_until(&self) -> Option<Instant> {
        self.retry.max(self.denied_until)
    }
}

impl std::fmt::Debug for Servers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Servers").field("all", &self.usage()).finish_non_exhaustive()
    }
}

impl Servers {
    pub(crate) fn new(cluster: Arc<Cluster>, verifiers: Arc<Verifiers>) -> Result<Self, TlsError> {
        let server = |address: &Endpoint| Server {
            address: address.clone(),
            state: Mutex::default(),
            eye: tokio::sync::Mutex::default(),
        };
        Ok(Self {
            tls: towards(&cluster)?,
            verifiers,
            all: cluster.servers.iter().map(server).collect(),
            primary: AtomicUsize::new(NONE),
            turn: AtomicUsize::new(0),
            switches: AtomicU64::new(0),
            reached: Notify::new(),
            looking: AtomicBool::new(false),
            looked: Mutex::default(),
            cluster,
        })
    }

    pub(crate) fn usage(&self) -> Vec<ServerUsage> {
        let usage = |server: &Server| {
            let state = lock(&server.state);
            ServerUsage {
                address: server.address.clone(),
                role: state.role,
                is_up: state.failures == 0,
                lag: state.lag.filter(|_| state.role == ServerRole::Replica).map(|(lag, _)| lag),
            }
        };
        self.all.iter().map(usage).collect()
    }

    /// Where the primary is, or is supposed to be.
    pub(crate) fn primary(&self) -> &Endpoint {
        let known = self.all.get(self.primary.load(Ordering::Acquire));
        known.map_or(&self.cluster.servers[0], |server| &server.address)
    }

    /// Opens a connection to a server of the wanted kind and logs in.
    pub(crate) async fn open(
        &self,
        wanted: Wanted,
        login: &Login,
        database: &str,
        settings: &BTreeMap<String, String>,
        application_name: &str,
    ) -> Result<Upstream, UpstreamError> {
        let mut last = UpstreamError::NoServer(wanted_name(wanted));
        for n in self.candidates(wanted, Instant::now()) {
            let target = Target { cluster: &self.cluster, address: &self.all[n].address, tls: self.tls.as_ref() };
            let opened = connect(target, &self.verifiers, login, database, settings, application_name).await;
            let mut upstream = match opened {
                Ok(upstream) => upstream,
                Err(error) if error.is_unreachable() => {
                    self.failed(n, &error);
                    last = error;
                    continue;
                }
                // What one replica refuses, another or the primary may allow.
                Err(error) if wanted == Wanted::Replica => {
                    lock(&self.all[n].state).lag = None;
                    last = error;
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.answered(n);
            if self.all.len() == 1 {
                return Ok(upstream);
            }
            let is_standby = upstream.is_standby(self.cluster.connect_timeout).await?;
            self.is(n, if is_standby { ServerRole::Replica } else { ServerRole::Primary });
            let is_it = match wanted {
                Wanted::Primary => self.primary.load(Ordering::Acquire) == n,
                Wanted::Replica => is_standby,
            };
            if is_it {
                return Ok(upstream);
            }
            if wanted == Wanted::Primary {
                self.denied(n);
            }
        }
        Err(last)
    }

    /// The servers to try, the likeliest first.
    fn candidates(&self, wanted: Wanted, now: Instant) -> Vec<usize> {
        let mut found: Vec<(u8, usize)> = Vec::new();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        for i in 0..self.all.len() {
            let n = if wanted == Wanted::Replica { (i + turn) % self.all.len() } else { i };
            let state = lock(&self.all[n].state);
            let denied = wanted == Wanted::Primary && state.denied_until.is_some_and(|at| now < at);
            if denied || state.retry.is_some_and(|at| now < at) {
                continue;
            }
            let rank = match (wanted, state.role) {
                (Wanted::Primary, ServerRole::Primary) => 0,
                (Wanted::Primary, ServerRole::Unknown) => 1,
                // It may have been promoted.
                (Wanted::Primary, ServerRole::Replica) => 2,
                (Wanted::Replica, ServerRole::Replica) if self.is_close_enough(&state) => 0,
                (Wanted::Replica, _) => continue,
            };
            found.push((rank, n));
        }
        found.sort_by_key(|(rank, _)| *rank);
        found.into_iter().map(|(_, n)| n).collect()
    }

    fn is_close_enough(&self, state: &State) -> bool {
        // What was measured long ago says nothing.
        let believed = 3 * self.cluster.health_interval + self.cluster.connect_timeout;
        let measured = state.lag.filter(|(_, at)| at.elapsed() <= believed);
        state.failures == 0 && measured.is_some_and(|(lag, _)| lag <= self.cluster.max_replica_lag)
    }

    /// Whether a transaction that only reads can go to a replica.
    pub(crate) fn has_replica(&self) -> bool {
        self.cluster.read_only == ReadOnlyRouting::Replica && {
            let good = |state: &State| state.role == ServerRole::Replica && self.is_close_enough(state);
            self.all.iter().any(|server| good(&lock(&server.state)))
        }
    }

    /// Whether connecting to the primary makes sense now: some server that may be it is not being left alone.
    pub(crate) fn is_worth_trying(&self, now: Instant) -> bool {
        self.all.iter().any(|server| lock(&server.state).left_alone_until().is_none_or(|at| at <= now))
    }

    /// Waits until connecting makes sense again.
    pub(crate) async fn worth_trying(&self) {
        loop {
            let mut reached = std::pin::pin!(self.reached.notified());
            reached.as_mut().enable();
            let now = Instant::now();
            let next = self.all.iter().map(|server| lock(&server.state).left_alone_until().unwrap_or(now)).min();
            let Some(next) = next.filter(|next| *next > now) else { return };
            tokio::select! {
                () = reached => {}
                () = tokio::time::sleep_until(next.into()) => {}
            }
        }
    }

    fn failed(&self, n: usize, error: &UpstreamError) {
        let now = Instant::now();
        let mut state = lock(&self.all[n].state);
        // Those that were under way together count as one.
        if state.retry.is_none_or(|at| at <= now) {
            let pause = FIRST_RETRY.saturating_mul(1 << state.failures.min(10)).min(LONGEST_RETRY);
            state.failures = state.failures.saturating_add(1);
            state.retry = Some(now + pause.mul_f64(0.5 + random_fraction() / 2.0));
            if state.failures == 1 {
                let (cluster, server) = (&self.cluster.name, &self.all[n].address);
                tracing::warn!(%cluster, %server, %error, "a database server cannot be reached");
            }
        }
    }

    fn answered(&self, n: usize) {
        let mut state = lock(&self.all[n].state);
        state.retry = None;
        if std::mem::take(&mut state.failures) > 0 {
            tracing::info!(cluster = %self.cluster.name, server = %self.all[n].address, "a database server is back");
            drop(state);
            self.reached.notify_waiters();
        }
    }

    /// A server was asked to be the primary and is not: the next time later, or waiting for a promotion keeps it busy.
    fn denied(&self, n: usize) {
        let now = Instant::now();
        let mut state = lock(&self.all[n].state);
        if state.denied_until.is_none_or(|at| at <= now) {
            let pause = FIRST_RETRY.saturating_mul(1 << state.denials.min(10)).min(LONGEST_DENIAL);
            state.denials = state.denials.saturating_add(1);
            state.denied_until = Some(now + pause.mul_f64(0.5 + random_fraction() / 2.0));
        }
    }

    fn is(&self, n: usize, role: ServerRole) {
        let old = std::mem::replace(&mut lock(&self.all[n].state).role, role);
        let known = self.primary.load(Ordering::Acquire);
        if role != ServerRole::Primary {
            if known == n {
                // It was demoted and its connections live: they must not be taken for connections to the primary.
                self.primary.store(NONE, Ordering::Release);
                self.switch();
            }
            return;
        }
        if known == n {
            return;
        }
        if known != NONE {
            let mut former = lock(&self.all[known].state);
            if former.role == ServerRole::Primary && former.failures == 0 {
                // Writing to both would be worse than either; whoever has promoted has to say which one it is.
                if old != ServerRole::Primary {
                    let (cluster, server) = (&self.cluster.name, &self.all[n].address);
                    let primary = &self.all[known].address;
                    tracing::error!(%cluster, %server, %primary, "a second server takes writes: the first one stays");
                }
                return;
            }
            former.role = ServerRole::Unknown;
        }
        tracing::info!(cluster = %self.cluster.name, server = %self.all[n].address, "the primary");
        {
            let mut state = lock(&self.all[n].state);
            (state.denials, state.denied_until) = (0, None);
        }
        self.primary.store(n, Ordering::Release);
        if known != NONE {
            self.switch();
        }
        self.reached.notify_waiters();
    }

    fn switch(&self) {
        self.switches.fetch_add(1, Ordering::AcqRel);
    }

    /// How often the primary has become another one: what was opened before is not a connection to it any more.
    pub(crate) fn switches(&self) -> u64 {
        self.switches.load(Ordering::Acquire)
    }

    /// Whether it is time to look at the servers; says so once each time.
    pub(crate) fn is_look_due(&self, now: Instant) -> bool {
        if self.cluster.service.is_none() || self.looking.load(Ordering::Acquire) {
            return false;
        }
        let mut looked = lock(&self.looked);
        // Two gateways shall not look in step.
        let interval = self.cluster.health_interval.mul_f64(0.9 + random_fraction() / 5.0);
        let due = looked.is_none_or(|at| now.saturating_duration_since(at) >= interval);
        if due {
            *looked = Some(now);
            self.looking.store(true, Ordering::Release);
        }
        due
    }

    /// Looks at all servers, each through a connection of its own (rule 23: beside slots and quotas, one per server).
    pub(crate) async fn look(self: Arc<Self>) {
        let mut looks = tokio::task::JoinSet::new();
        for n in 0..self.all.len() {
            let servers = Arc::clone(&self);
            looks.spawn(async move { servers.look_at(n).await });
        }
        while looks.join_next().await.is_some() {}
        self.looking.store(false, Ordering::Release);
    }

    async fn look_at(&self, n: usize) {
        let Some((login, database)) = &self.cluster.service else { return };
        let server = &self.all[n];
        let mut eye = server.eye.lock().await;
        let limit = self.cluster.connect_timeout;
        if !eye.as_ref().is_some_and(Upstream::is_alive) {
            *eye = None;
            let target = Target { cluster: &self.cluster, address: &server.address, tls: self.tls.as_ref() };
            match connect(target, &self.verifiers, login, database, &service_settings(), "cofferdam health").await {
                Ok(upstream) => *eye = Some(upstream),
                Err(error) => {
                    let mut state = lock(&server.state);
                    state.lag = None;
                    if error.is_unreachable() {
                        drop(state);
                        self.failed(n, &error);
                    } else if !std::mem::replace(&mut state.complained, true) {
                        let (cluster, server) = (&self.cluster.name, &server.address);
                        tracing::warn!(%cluster, %server, %error, "the service login is refused");
                    }
                    return;
                }
            }
        }
        let Some(upstream) = eye.as_mut() else { return };
        match upstream.ask(LOOK, &[], limit).await {
            Ok(rows) => {
                self.answered(n);
                let text = |i: usize| rows.first().and_then(|row| row.get(i)?.as_deref());
                let is_standby = text(0) == Some("t");
                let lag = text(1).and_then(|t| t.parse::<f64>().ok()).map(|s| s.clamp(0.0, 1e9));
                let mut state = lock(&server.state);
                state.lag = lag.map(|s| (Duration::from_secs_f64(s), Instant::now()));
                state.complained = false;
                drop(state);
                self.is(n, if is_standby { ServerRole::Replica } else { ServerRole::Primary });
            }
            Err(error) => {
                *eye = None;
                lock(&server.state).lag = None;
                self.failed(n, &error);
            }
        }
    }

    /// Asks the cluster what it stores of a role's password (rule 19). `None` when there is no such role.
    pub(crate) async fn ask_password(
        &self,
        connection: &mut Option<Upstream>,
        role: &str,
    ) -> Result<Option<String>, UpstreamError> {
        let (Some(query), Some((login, database))) = (&self.cluster.auth_query, &self.cluster.service) else {
            return Ok(None);
        };
        let limit = self.cluster.connect_timeout;
        if !connection.as_ref().is_some_and(Upstream::is_alive) {
            let name = "cofferdam auth_query";
            *connection = Some(self.open(Wanted::Primary, login, database, &service_settings(), name).await?);
        }
        let Some(upstream) = connection.as_mut() else { return Ok(None) };
        let rows = upstream.ask(query, &[role], limit).await?;
        let stored = rows.into_iter().next().and_then(|row| row.into_iter().nth(1).flatten());
        Ok(stored.filter(|s| !s.is_empty()))
    }
}

fn wanted_name(wanted: Wanted) -> &'static str {
    match wanted {
        Wanted::Primary => "primary",
        Wanted::Replica => "replica",
    }
}

/// Never a client's, and no schema of anybody's is searched.
fn service_settings() -> BTreeMap<String, String> {
    BTreeMap::from([("search_path".to_owned(), "pg_catalog".to_owned())])
}

/// From 0 to 1, for spreading things over time; without randomness, the middle.
pub(crate) fn random_fraction() -> f64 {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_or(0.5, |()| f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
