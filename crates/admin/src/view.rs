//! What the admin surface needs to know of a gateway, and how it is shown.

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::health::HealthView;

/// A running gateway, as the admin surface sees it.
#[async_trait]
pub trait GatewayView: Send + Sync + 'static {
    /// The bearer token, when one is demanded.
    fn token(&self) -> Option<String>;
    /// Whether traffic is welcome.
    fn is_ready(&self) -> bool;
    /// Generation and last reload.
    fn status(&self) -> StatusView;
    /// All tenants, by name.
    fn tenants(&self) -> Vec<TenantView>;
    /// One tenant.
    fn tenant(&self, slug: &str) -> Option<TenantView>;
    /// All gates, by plane and name.
    fn gates(&self) -> Vec<GateView>;
    /// Server connections by cluster.
    fn clusters(&self) -> Vec<ClusterView>;
    /// Odoo servers by pool.
    fn servers(&self) -> Vec<OdooServerView>;
    /// Certificates that an authority gives, by host.
    fn certificates(&self) -> Vec<CertificateView>;
    /// Forgets what is kept of static files: of one tenant, by its name, or of all; below a path or everywhere. False when
    /// there is no such tenant.
    fn purge_cache(&self, tenant: Option<&str>, path: Option<&str>) -> bool;
    /// Counts of the whole gateway.
    fn totals(&self) -> TotalsView;
    /// Who knows how everything is, if somebody watches.
    fn health(&self) -> Option<Arc<dyn HealthView>> {
        None
    }
    /// Reads the configuration again.
    async fn reload(&self) -> Result<StatusView, ReloadFailed>;
}

/// A reload that changed nothing because the configuration has errors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReloadFailed {
    /// Every error.
    pub errors: Vec<Fault>,
}

/// One error of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The file.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The column, from 1.
    pub column: usize,
    /// The field.
    pub field: String,
    /// What was found.
    pub found: String,
    /// What was expected.
    pub expected: String,
}

/// What is being served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StatusView {
    /// The version of the gateway.
    pub version: &'static str,
    /// Counts reloads that took effect, from 1.
    pub generation: u64,
    /// Tenants in the catalog.
    pub tenants: usize,
    /// Reloads that took effect since the start.
    pub reloads: u64,
    /// Reloads that failed since the start.
    pub failed_reloads: u64,
    /// Errors of the last reload, if it failed.
    pub last_errors: Vec<Fault>,
    /// Whether the gateway drains.
    pub draining: bool,
}

/// One Odoo server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OdooServerView {
    /// Its pool.
    pub pool: String,
    /// Its address.
    pub address: String,
    /// Whether it is well, as far as is known.
    pub well: bool,
    /// Requests that it works on.
    pub in_flight: u32,
    /// Workers that run with less than their usual priority.
    pub lowered: u32,
}

/// The certificate of a host that an authority gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CertificateView {
    /// The host.
    pub host: String,
    /// Until when its certificate is valid, in seconds since 1970; absent: it has none.
    pub not_after: Option<u64>,
    /// When the authority is asked next, in seconds since 1970.
    pub next: u64,
    /// Times in a row that it was asked in vain.
    pub failures: u32,
    /// What was wrong the last time.
    pub error: Option<String>,
}

/// Counts since the start, and what is open now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct TotalsView {
    /// HTTP requests answered.
    pub http_requests: u64,
    /// HTTP requests for hosts that nobody has.
    pub http_unknown_host: u64,
    /// HTTP requests refused for want of a slot.
    pub http_refused: u64,
    /// HTTP requests that failed at the server.
    pub http_failed: u64,
    /// HTTP requests refused at a tenant's boundary.
    pub http_denied: u64,
    /// HTTP connections closed because their address had as many as one may have.
    pub http_crowded: u64,
    /// Lines of the access log that were dropped since it was opened.
    pub http_log_lines_dropped: u64,
    /// Requests answered from what is kept of static files.
    pub cache_hits: u64,
    /// Requests for static files for which a server was asked.
    pub cache_misses: u64,
    /// Times a server has said that what is kept is still right.
    pub cache_confirmed: u64,
    /// Bytes kept in memory.
    pub cache_memory_bytes: u64,
    /// Bytes kept on disk.
    pub cache_disk_bytes: u64,
    /// WebSockets open.
    pub http_websockets: u64,
    /// PostgreSQL logins.
    pub postgres_logins: u64,
    /// PostgreSQL logins that failed.
    pub postgres_login_failures: u64,
    /// Transactions finished.
    pub postgres_transactions: u64,
    /// Statements refused for want of a slot or connection.
    pub postgres_refused: u64,
    /// Cancel requests.
    pub postgres_cancels: u64,
    /// PostgreSQL clients connected.
    pub postgres_clients: u64,
}

/// A tenant and what it uses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TenantView {
    /// Its name.
    pub tenant: String,
    /// Its hosts.
    pub hosts: Vec<String>,
    /// Its database.
    pub database: Option<String>,
    /// Its pool.
    pub pool: Option<String>,
    /// Its cluster.
    pub cluster: Option<String>,
    /// Its plan.
    pub plan: String,
    /// What it uses of its pool.
    pub http: Option<PlaneUsage>,
    /// What it uses of its cluster.
    pub postgres: Option<PlaneUsage>,
    /// PostgreSQL clients connected.
    pub postgres_clients: u32,
    /// PostgreSQL clients at once by the plan.
    pub max_clients: u32,
    /// WebSockets open.
    pub websockets: u32,
    /// WebSockets at once by the plan.
    pub max_websockets: u32,
    /// Quotas that are nearly used up, or hold the tenant back already, in words.
    pub warnings: Vec<String>,
}

/// A tenant's use of one gate.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct PlaneUsage {
    /// Slots held.
    pub running: u32,
    /// Slots never exceeded; absent: no limit of its own.
    pub limit: Option<u32>,
    /// Slots guaranteed.
    pub reserved: u32,
    /// Work waiting.
    pub waiting: u32,
    /// Work that may wait.
    pub queue: u32,
    /// Work so far, in slot-seconds.
    pub slot_seconds: f64,
    /// Seconds that granted work had waited, summed.
    pub wait_seconds: f64,
    /// Seconds that all but one in a hundred of the last grants had waited for at most; at most twice too long.
    #[serde(default)]
    pub wait_p99_seconds: f64,
    /// Slots granted so far.
    pub granted: u64,
    /// Work turned away so far.
    pub rejected: u64,
    /// Slots held beside `running` by transactions inside others of the same process.
    pub nested: u32,
    /// The lower limit in force while the tenant's database work is queued.
    pub squeezed_to: Option<u32>,
    /// Whether a rate or a budget holds the tenant back at the moment.
    pub throttled: bool,
    /// Starts per second by the plan.
    pub rate: Option<u64>,
    /// Seconds in slots per second by the plan.
    pub work_per_second: Option<f64>,
    /// Seconds in slots left of what can be saved up; negative in debt.
    pub work_balance: Option<f64>,
    /// Bytes per second by the plan.
    pub bytes_per_second: Option<u64>,
}

impl TenantView {
    /// Work running and waiting on both planes.
    pub fn now(&self) -> u32 {
        [&self.http, &self.postgres].into_iter().flatten().map(|u| u.running + u.nested + u.waiting).sum()
    }

    /// Work so far on both planes, in slot-seconds.
    pub fn work(&self) -> f64 {
        [&self.http, &self.postgres].into_iter().flatten().map(|u| u.slot_seconds).sum()
    }
}

/// A gate and its slots.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GateView {
    /// `http` or `postgres`.
    pub plane: String,
    /// The pool or cluster.
    pub name: String,
    /// Slots in all.
    pub slots: u32,
    /// Slots that are worth using now: fewer when more at once only made everything slower.
    pub open_slots: u32,
    /// Of these, open to expensive work.
    pub open_expensive: u32,
    /// Slots held.
    pub running: u32,
    /// Of these, by expensive work.
    pub expensive: u32,
    /// Slots held beside these by transactions inside others of the same process.
    pub nested: u32,
    /// Work waiting.
    pub waiting: u32,
    /// Cores that storms and expensive work keep busy or wait for, as far as the gateway can see it.
    pub busy_cores: f64,
    /// How many times longer than on a nearly empty gate work took lately.
    pub inflation: f64,
}

/// One server of a cluster.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServerView {
    /// Where it listens.
    pub address: String,
    /// `primary`, `replica`, or `unknown` when nobody has been there yet.
    pub role: String,
    /// Whether it could be reached the last time.
    pub up: bool,
    /// How many seconds a replica is behind.
    pub lag_seconds: Option<f64>,
}

/// Server connections of a cluster.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClusterView {
    /// The cluster.
    pub name: String,
    /// Open connections, idle ones included.
    pub open: u32,
    /// Idle ones.
    pub idle: u32,
    /// Those whose server process runs with less than its usual priority.
    pub lowered: u32,
    /// Its servers.
    pub servers: Vec<ServerView>,
}
