//! The file as it is written.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use cofferdam_tenant::calendar::CalendarConfig;
use cofferdam_tenant::{HumanDuration, ServerTls};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::service::ServiceConfig;

/// The file.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthFile {
    /// The gateway's `cofferdam.yaml`: its tenants with a database are looked at too, on the cluster that is named like theirs.
    pub catalog: Option<PathBuf>,
    /// How often everything is looked at.
    #[serde(default = "half_a_minute")]
    pub interval: HumanDuration,
    /// How many looks of each kind there are at a time.
    #[serde(default = "eight")]
    pub concurrency: u32,
    /// Clusters of PostgreSQL, by name.
    #[serde(default)]
    pub clusters: BTreeMap<String, ClusterFile>,
    /// Redis servers, by name.
    #[serde(default)]
    pub redis: BTreeMap<String, RedisFile>,
    /// Gateways, by name.
    #[serde(default)]
    pub gateways: BTreeMap<String, GatewayFile>,
    /// Clusters of Kubernetes, by name.
    #[serde(default)]
    pub kubernetes: BTreeMap<String, KubernetesFile>,
    /// Tenants, by name.
    #[serde(default)]
    pub tenants: BTreeMap<String, TenantFile>,
    /// The file that `cofferdam backup run --textfile` writes.
    pub backups: Option<PathBuf>,
    /// Business calendars, by name.
    #[serde(default)]
    pub calendars: BTreeMap<String, CalendarConfig>,
    /// Business services, by name.
    #[serde(default)]
    pub services: BTreeMap<String, ServiceConfig>,
    /// Which part of looks must be good over thirty days, in per cent.
    #[serde(default = "three_nines")]
    pub availability: f64,
    /// Which part of looks must be fast enough over thirty days, in per cent.
    #[serde(default = "two_nines")]
    pub latency: f64,
    /// What is promised to tenants of a tier, by its name. Where a tenant of the catalog names no other, its plan is its tier.
    #[serde(default)]
    pub tiers: BTreeMap<String, TierFile>,
    /// Directories on whose file systems there must be room, by name.
    #[serde(default)]
    pub disks: BTreeMap<String, DiskFile>,
    /// The `backup.yaml` whose repository is written to and read from every five minutes.
    pub repository: Option<PathBuf>,
    /// Where changes are kept.
    pub history: Option<HistoryFile>,
    /// A directory that remembers what was told and is not over, and looks of thirty days: whoever is started anew tells nothing
    /// twice and of every end, and counts on.
    pub state_directory: Option<PathBuf>,
    /// Where notices go.
    #[serde(default)]
    pub notices: NoticesFile,
}

/// A cluster.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    /// Its name, address, or the directory of its socket.
    pub host: String,
    /// Its port.
    #[serde(default = "postgres_port")]
    pub port: u16,
    /// The role, which needs `pg_monitor`.
    pub user: String,
    /// The file with the role's password.
    pub password_file: Option<PathBuf>,
    /// The environment variable with the role's password.
    pub password_env: Option<String>,
    /// How connections are encrypted.
    #[serde(default)]
    pub tls: ServerTls,
    /// A database that is always there.
    #[serde(default = "maintenance")]
    pub maintenance: String,
    /// The role that looks into tenants' databases, if it is another. It needs `CONNECT`, and `SELECT` on `ir_module_module`,
    /// `ir_cron`, `ir_cron_trigger`, `mail_mail` and `queue_job` there, and must have nothing else.
    pub tenant_user: Option<String>,
    /// The file with its password.
    pub tenant_password_file: Option<PathBuf>,
    /// So many replicas must follow.
    #[serde(default)]
    pub replicas: u32,
    /// The gateway in front, through which tenants' databases are asked too. It must know the role that looks into them.
    pub gateway: Option<FrontFile>,
}

/// Where a gateway takes connections for PostgreSQL.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FrontFile {
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// How connections are encrypted.
    #[serde(default)]
    pub tls: ServerTls,
}

/// What is promised to tenants of a tier.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TierFile {
    /// Which part of looks must be good over thirty days, in per cent.
    pub availability: Option<f64>,
    /// Which part of looks must be fast enough over thirty days, in per cent.
    pub latency: Option<f64>,
    /// A page is fast enough when it comes within so long; five times that is a failure.
    pub page_within: Option<HumanDuration>,
}

/// A directory on whose file system there must be room.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskFile {
    /// The directory, on this machine.
    pub path: PathBuf,
    /// Per cent used that are a warning.
    #[serde(default = "four_fifths")]
    pub warn: f64,
    /// Per cent used that are a failure.
    #[serde(default = "nearly_all")]
    pub fail: f64,
}

/// A user that was made for looking.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoginFile {
    /// Its login.
    pub user: String,
    /// The file with its password.
    pub password_file: PathBuf,
}

/// A Redis server.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RedisFile {
    /// Its name or address.
    pub host: String,
    /// Its port.
    #[serde(default = "redis_port")]
    pub port: u16,
    /// The file with its password.
    pub password_file: Option<PathBuf>,
}

/// A gateway.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GatewayFile {
    /// Its admin listener, such as `http://127.0.0.1:9180`.
    pub admin: String,
    /// The file with its token.
    pub token_file: Option<PathBuf>,
}

/// A cluster of Kubernetes. Within one, the account of the pod will do: it needs to list nodes, and pods in the namespace.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KubernetesFile {
    /// Its API server.
    #[serde(default = "api_server")]
    pub server: String,
    /// Whose pods are looked at.
    pub namespace: String,
    /// The file with the token; read each time.
    pub token_file: Option<PathBuf>,
    /// PEM file with the authorities that have signed the server's certificate.
    pub ca_file: Option<PathBuf>,
}

/// A tenant.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TenantFile {
    /// Its database; by default it is named like the tenant. Looked at where it has a cluster.
    pub database: Option<String>,
    /// The cluster of its database; may be left out when there is only one.
    pub cluster: Option<String>,
    /// A page of its, such as `https://acme.example.com/web/login`.
    pub page: Option<String>,
    /// The address at which the page is fetched, where that is not the host's own.
    pub connect: Option<SocketAddr>,
    /// What the page must say.
    pub expect: Option<String>,
    /// Whether browsers at the page's site wait for news by WebSocket.
    pub websocket: bool,
    /// Who logs in at the page's site, every five minutes, to see whether anybody can.
    pub login: Option<LoginFile>,
    /// The Redis server with its sessions.
    pub redis: Option<String>,
    /// Its business calendar.
    pub calendar: Option<String>,
    /// What is promised to it; one of `tiers`.
    pub tier: Option<String>,
    /// Which part of looks must be good over thirty days, in per cent.
    pub availability: Option<f64>,
    /// Which part of looks must be fast enough over thirty days, in per cent.
    pub latency: Option<f64>,
    /// A page is fast enough when it comes within so long; five times that is a failure.
    pub page_within: Option<HumanDuration>,
}

/// Where changes are kept.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HistoryFile {
    /// One of `clusters`, whose `user` writes there.
    pub cluster: String,
    /// The database.
    pub database: String,
    /// What is older goes.
    #[serde(default = "a_year")]
    pub keep: HumanDuration,
}

/// Where notices go.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NoticesFile {
    /// An address that each notice is posted to, as JSON.
    pub webhook: Option<String>,
    /// Alertmanager, such as `http://127.0.0.1:9093`.
    pub alertmanager: Option<String>,
    /// Who gets notices by e-mail.
    pub email: Option<EmailFile>,
    /// What goes on is told again after so long.
    pub repeat: Option<HumanDuration>,
    /// A trouble is told when it has lasted for so long; two intervals at least.
    pub after: Option<HumanDuration>,
}

/// How notices are sent by e-mail.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmailFile {
    /// The name or address of the server that takes them.
    pub server: String,
    /// Its port; by default that of the way to encrypt.
    pub port: Option<u16>,
    /// How the connection is encrypted.
    #[serde(default)]
    pub encryption: Encryption,
    /// A file with the authorities that may vouch for the server; those that this machine trusts if left out.
    pub ca_file: Option<PathBuf>,
    /// Who we are there.
    pub user: Option<String>,
    /// The file with the password.
    pub password_file: Option<PathBuf>,
    /// From whom they come, such as `Cofferdam <health@example.com>`.
    pub from: String,
    /// To whom they go.
    pub to: Vec<String>,
}

/// How a connection to a mail server is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Encryption {
    /// By `STARTTLS`, on port 587; a server that does not offer it is refused.
    #[default]
    Starttls,
    /// From the first byte, on port 465.
    Implicit,
    /// Not at all, on port 25.
    None,
}

fn half_a_minute() -> HumanDuration {
    HumanDuration(Duration::from_secs(30))
}

fn eight() -> u32 {
    8
}

fn three_nines() -> f64 {
    99.9
}

fn a_year() -> HumanDuration {
    HumanDuration(Duration::from_secs(400 * 86_400))
}

fn two_nines() -> f64 {
    99.0
}

fn four_fifths() -> f64 {
    80.0
}

fn nearly_all() -> f64 {
    92.0
}

fn postgres_port() -> u16 {
    5432
}

fn api_server() -> String {
    "https://kubernetes.default.svc".to_owned()
}

fn redis_port() -> u16 {
    6379
}

fn maintenance() -> String {
    "postgres".to_owned()
}
