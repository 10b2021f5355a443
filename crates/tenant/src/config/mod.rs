//! The shape of the files: what `cofferdam.yaml` and a tenant's file may say. The JSON Schemas are made from here.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::{ClusterName, DatabaseName, HostName, PlanName, PoolName, Slug};
use crate::units::{ByteSize, Endpoint, HumanDuration, Network, Secret};

mod http;
mod postgres;

pub use http::{
    AcmeChallenge, AcmeConfig, CacheConfig, CanaryConfig, CertificateConfig, ExternalAccountConfig,
    FilestoreBucketConfig, HeaderChanges, HeaderPolicyConfig, HealthConfig, HttpConfig, HttpTlsConfig,
    InternalRouteConfig, LoginProtectionConfig, MaintenanceConfig, NetworksConfig, Scheme, TenantTlsConfig,
    TracesConfig, WakeConfig,
};
pub use postgres::{
    AuthMethod, AuthQueryConfig, ClientTlsConfig, ClusterConfig, ConsoleConfig, DatabaseCommands, LoginConfig,
    NotificationPolicy, PostgresConfig, ReadOnlyRouting, ServerTls, ServiceConfig, TlsMode,
};

/// `cofferdam.yaml`: listeners, pools, clusters, plans and the directory of tenants.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GatewayConfig {
    /// The HTTP plane; absent: no HTTP listener.
    pub http: Option<HttpConfig>,
    /// The PostgreSQL plane; absent: no PostgreSQL listener.
    pub postgres: Option<PostgresConfig>,
    /// The admin listener; absent: none.
    pub admin: Option<AdminConfig>,
    /// The directory with one YAML file per tenant, relative to this file.
    #[serde(default = "default_tenants")]
    pub tenants: PathBuf,
    /// Groups of Odoo servers that share workers, by name.
    #[serde(default)]
    pub pools: BTreeMap<PoolName, PoolConfig>,
    /// PostgreSQL servers, by name.
    #[serde(default)]
    pub clusters: BTreeMap<ClusterName, ClusterConfig>,
    /// Named sets of quotas.
    #[serde(default)]
    pub plans: BTreeMap<PlanName, PlanConfig>,
    /// How long a drain may take after SIGTERM before connections are cut.
    #[serde(default = "default_drain")]
    pub drain_timeout: HumanDuration,
}

/// The admin listener.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AdminConfig {
    /// Address to listen on. Anything but loopback needs a token.
    #[serde(default = "default_admin_listen", deserialize_with = "socket_address")]
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// Bearer token, in plain text.
    pub token: Option<Secret>,
    /// File with the bearer token.
    pub token_file: Option<PathBuf>,
    /// Environment variable with the bearer token.
    pub token_env: Option<String>,
}

/// A group of Odoo servers that share workers.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// The servers.
    pub servers: Vec<ServerConfig>,
    /// Workers of all servers together: requests in flight at once.
    #[schemars(range(min = 1, max = 100_000))]
    pub slots: u32,
    /// Fewest slots to shrink to when more at once only make everything slower. Default: `slots`, a fixed number.
    #[schemars(range(min = 1))]
    pub min_slots: Option<u32>,
    /// Most slots that expensive work may hold, all tenants together; the rest stays for short work. Default: fifteen sixteenths.
    #[schemars(range(min = 1))]
    pub expensive_slots: Option<u32>,
    /// Whether a tenant whose database work waits gets fewer workers until it clears. Default: true.
    #[serde(default = "yes")]
    pub coupled: bool,
    /// Which of Odoo's notifications (`imbus`, `cron_trigger`) on the maintenance database the pool's workers see.
    #[serde(default)]
    pub notifications: NotificationPolicy,
    /// The order in which waiting requests are served.
    #[serde(default)]
    pub scheduling: Scheduling,
    /// Has the operating system favour modest work, where servers with `workers` run on the gateway's machine. Needs CAP_SYS_NICE, and
    /// CAP_SYS_PTRACE where they are another user's.
    pub priorities: Option<Priorities>,
    /// Time to connect to a server.
    #[serde(default = "seconds::<5>")]
    pub connect_timeout: HumanDuration,
    /// Time until a server must have begun its answer.
    #[serde(default = "seconds::<300>")]
    pub response_timeout: HumanDuration,
    /// Time without a byte from a server inside an answer.
    #[serde(default = "seconds::<60>")]
    pub read_timeout: HumanDuration,
    /// Time without a byte in either direction on a WebSocket.
    #[serde(default = "seconds::<3600>")]
    pub websocket_timeout: HumanDuration,
    /// Addresses from which the workers themselves call back, as wkhtmltopdf does for a report: such a request waits for no slot, since the one it belongs to holds one, and brings its session as Odoo gave it.
    #[serde(default)]
    pub workers_from: Vec<Network>,
    /// Odoo's filestore, as the gateway sees it: files that Odoo (with `--x-sendfile`) wants sent are sent from here.
    pub filestore: Option<PathBuf>,
    /// The filestore in an S3-compatible bucket instead.
    pub filestore_bucket: Option<FilestoreBucketConfig>,
    /// Wakes the servers when none of them can be reached; requests wait until one can.
    pub wake: Option<WakeConfig>,
    /// The name of what is installed. Another one makes everything forgotten that was kept of the pool's static files.
    pub release: Option<String>,
    /// Looks after the servers, apart from what users ask. Absent: a server counts as well until it cannot be reached.
    pub health: Option<HealthConfig>,
    /// Serves a page that says so instead of the pool's sites.
    pub maintenance_mode: Option<MaintenanceConfig>,
    /// The PostgreSQL login of this pool's workers: it opens every database of the tenants placed in the pool.
    pub login: Option<LoginConfig>,
    /// The cluster on which the pool's login may open the maintenance database `postgres`.
    pub maintenance: Option<ClusterName>,
    /// Which databases the pool's login may create, drop and rename there.
    #[serde(default)]
    pub database_commands: DatabaseCommands,
}

/// One Odoo server of a pool.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// The HTTP port of the prefork workers.
    pub address: Endpoint,
    /// The gevent port for `/websocket`; absent: WebSockets are answered with 503.
    pub gevent: Option<Endpoint>,
}

/// By how much the `nice` values of server processes are raised while they do work that is in the way of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Priorities {
    /// For short work of tenants that have much of it.
    #[serde(default = "Priorities::storm")]
    #[schemars(range(max = 19))]
    pub storm: u8,
    /// For expensive work.
    #[serde(default = "Priorities::expensive")]
    #[schemars(range(max = 19))]
    pub expensive: u8,
    /// Cores of the machine that storms leave alone, and expensive work too, but for one piece of work of each, while other
    /// tenants have modest work.
    #[serde(default)]
    pub spare_cores: u32,
}

impl Priorities {
    const fn storm() -> u8 {
        19
    }

    const fn expensive() -> u8 {
        19
    }
}

/// The order in which waiting work is served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scheduling {
    /// Fair between tenants by measured work, with the limits of their plans.
    #[default]
    Fair,
    /// First come, first served, without limits per tenant; for comparison only.
    Fifo,
}

/// A named set of quotas; and what a tenant has different from its plan.
#[derive(Debug, Clone, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanConfig {
    /// Share under contention, relative to the other tenants. Default 1.
    #[schemars(range(min = 1, max = 10_000))]
    pub weight: Option<u32>,
    /// Quotas on the pool.
    #[serde(default)]
    pub http: QuotaConfig,
    /// Quotas on the cluster.
    #[serde(default)]
    pub postgres: QuotaConfig,
    /// Largest request body. Default 128MiB.
    pub max_body: Option<ByteSize>,
    /// Largest head of a request, with its request line. Default and most: `64KiB`.
    pub max_header: Option<ByteSize>,
    /// Longest request target. Default: `16KiB`.
    pub max_url: Option<ByteSize>,
    /// PostgreSQL client connections at once. Default 200.
    #[schemars(range(min = 1))]
    pub max_clients: Option<u32>,
    /// HTTP WebSockets at once. Default 200.
    #[schemars(range(min = 1))]
    pub max_websockets: Option<u32>,
    /// Time a transaction may stay idle before the gateway ends it: it holds a slot and locks. Default 10m.
    pub idle_in_transaction_timeout: Option<HumanDuration>,
    /// Time a statement may take before the gateway cancels it. Default: as long as it takes.
    pub statement_timeout: Option<HumanDuration>,
    /// Time a transaction may take before the gateway ends it and the session. Default: as long as it takes.
    pub transaction_timeout: Option<HumanDuration>,
    /// Time a PostgreSQL client may stay connected and do nothing. Default: for ever.
    pub idle_timeout: Option<HumanDuration>,
    /// PostgreSQL logins per second; more of them wait for their turn. Default: as many as come.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub login_rate: Option<u32>,
}

/// Quotas of one tenant on one pool or cluster.
#[derive(Debug, Clone, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuotaConfig {
    /// Slots guaranteed. Default 0.
    pub reserved: Option<u32>,
    /// Slots never exceeded: requests or transactions at once. Default: all of them.
    #[schemars(range(min = 1))]
    pub limit: Option<u32>,
    /// Work that may wait. Default 200.
    pub queue: Option<u32>,
    /// Longest wait for a slot. Default 30s.
    pub max_wait: Option<HumanDuration>,
    /// Requests or transactions per second. Default: as many as come.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rate: Option<u32>,
    /// How many may come at once when there were fewer before. Default: as many as `rate`.
    #[schemars(range(min = 1))]
    pub rate_burst: Option<u32>,
    /// Time in slots that may be used per second: `2s` is two slots all the time. Default: as much as the slots give.
    pub work: Option<HumanDuration>,
    /// Time in slots that can be saved up. Default: ten seconds' worth of `work`.
    pub work_burst: Option<HumanDuration>,
    /// Bytes per second, both directions together. Default: as many as come.
    pub bandwidth: Option<ByteSize>,
    /// Bytes that can be saved up. Default: ten seconds' worth of `bandwidth`.
    pub bandwidth_burst: Option<ByteSize>,
    /// Bounds per class of work.
    #[serde(default)]
    pub classes: BTreeMap<Class, ClassQuotaConfig>,
}

/// Bounds of one class of work, within those of the tenant.
#[derive(Debug, Clone, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClassQuotaConfig {
    /// Slots never exceeded. Default: the tenant's.
    #[schemars(range(min = 1))]
    pub limit: Option<u32>,
    /// Work that may wait. Default: the tenant's.
    pub queue: Option<u32>,
    /// Longest wait for a slot. Default: the tenant's.
    pub max_wait: Option<HumanDuration>,
}

/// What kind of work a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Class {
    /// A page somebody waits for.
    Interactive = 0,
    /// A call by a client program or by the web client behind a page; any transaction of which no more is known.
    Rpc,
    /// A static file that Odoo still has to serve.
    Static,
    /// A WebSocket handshake.
    Websocket,
    /// Administration.
    Admin,
    /// A report: seconds to minutes.
    Report,
    /// Imports, exports, uploads.
    Bulk,
    /// What other services call: payment providers, registries, automation.
    Webhook,
    /// Scheduled jobs, backups.
    Background,
}

impl Class {
    /// All classes.
    pub const ALL: [Self; 9] = [
        Self::Interactive,
        Self::Rpc,
        Self::Static,
        Self::Websocket,
        Self::Admin,
        Self::Report,
        Self::Bulk,
        Self::Webhook,
        Self::Background,
    ];

    /// Its place in [`Class::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The name used in configuration, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Rpc => "rpc",
            Self::Static => "static",
            Self::Websocket => "websocket",
            Self::Admin => "admin",
            Self::Report => "report",
            Self::Bulk => "bulk",
            Self::Webhook => "webhook",
            Self::Background => "background",
        }
    }
}

/// A tenant's file.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TenantFile {
    /// The tenant's name.
    pub tenant: Slug,
    /// The hosts under which it is reached.
    #[serde(default)]
    pub hosts: Vec<HostName>,
    /// Its database.
    pub database: Option<DatabaseName>,
    /// Where it lives: its pool and its cluster.
    pub placement: Placement,
    /// The plan that gives its quotas.
    pub plan: PlanName,
    /// What this tenant has different from its plan.
    #[serde(default)]
    pub quotas: PlanConfig,
    /// TLS for its hosts.
    pub tls: Option<TenantTlsConfig>,
    /// A second pool for a part of its requests.
    pub canary: Option<CanaryConfig>,
    /// What is changed of headers.
    #[serde(default)]
    pub headers: HeaderPolicyConfig,
    /// Serves a page that says so instead of the tenant's site.
    pub maintenance_mode: Option<MaintenanceConfig>,
    /// Who may reach its hosts at all.
    #[serde(default)]
    pub networks: NetworksConfig,
    /// Routes that are closed to everybody, such as the database manager, and who may use them all the same.
    #[serde(default)]
    pub internal_routes: Vec<InternalRouteConfig>,
    /// Its own PostgreSQL login, beside that of its pool.
    pub login: Option<LoginConfig>,
    /// More logins that may open the database: reports, interfaces.
    #[serde(default)]
    pub users: Vec<LoginConfig>,
    /// The login that the gateway uses at the server for whoever came with the pool's login or the tenant's own: so that the pool's password opens nothing at the server.
    pub server_login: Option<LoginConfig>,
    /// Roles that may open replication connections to the database. At the server such a role can read the whole cluster: for the operator's own programs only.
    #[serde(default)]
    pub replication: Vec<String>,
    /// When server connections change hands. Default: `transaction`.
    #[serde(default)]
    pub pooling: PoolingMode,
}

/// Which pool and which cluster a tenant uses.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// The pool of Odoo servers; needed for `hosts`.
    pub pool: Option<PoolName>,
    /// The PostgreSQL cluster; needed for `database` to be reachable through the gateway.
    pub cluster: Option<ClusterName>,
}

/// When a server connection may serve another client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PoolingMode {
    /// After each transaction, unless the session holds state.
    #[default]
    Transaction,
    /// When the client leaves.
    Session,
}

impl PoolingMode {
    /// The name used in configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Transaction => "transaction",
            Self::Session => "session",
        }
    }
}

fn default_tenants() -> PathBuf {
    "tenants".into()
}
fn default_drain() -> HumanDuration {
    HumanDuration(Duration::from_secs(60))
}
fn seconds<const N: u64>() -> HumanDuration {
    HumanDuration(Duration::from_secs(N))
}
fn default_spool() -> ByteSize {
    ByteSize(256 << 10)
}
fn default_backlog() -> ByteSize {
    ByteSize(64 << 20)
}
fn default_connections() -> u32 {
    20_000
}
fn default_admin_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9180))
}
fn yes() -> bool {
    true
}

const LISTEN: &str = "an address and port to listen on, such as `127.0.0.1:8069`, `[::]:5432` or `0.0.0.0:0`";

struct ListenAddress(SocketAddr);

impl<'de> Deserialize<'de> for ListenAddress {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse()
            .map(ListenAddress)
            .map_err(|_| serde::de::Error::invalid_value(serde::de::Unexpected::Str(&text), &LISTEN))
    }
}

fn socket_address<'de, D: serde::Deserializer<'de>>(d: D) -> Result<SocketAddr, D::Error> {
    ListenAddress::deserialize(d).map(|a| a.0)
}

fn socket_addresses<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<SocketAddr>, D::Error> {
    Ok(Vec::<ListenAddress>::deserialize(d)?.into_iter().map(|a| a.0).collect())
}
