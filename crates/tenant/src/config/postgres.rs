//! What the files may say about the PostgreSQL plane and its clusters.

use std::net::SocketAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Priorities, Scheduling, default_connections, seconds, socket_addresses};
use crate::units::{Endpoint, HumanDuration, Secret};

/// The PostgreSQL plane.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PostgresConfig {
    /// Addresses to listen on.
    #[schemars(with = "Vec<String>")]
    #[serde(deserialize_with = "socket_addresses")]
    pub listen: Vec<SocketAddr>,
    /// How clients prove their password.
    #[serde(default)]
    pub auth: AuthMethod,
    /// TLS for clients; absent: SSLRequest is answered with `N`.
    pub tls: Option<ClientTlsConfig>,
    /// File with passwords by role, in PgBouncer's format: for logins that give none of their own.
    pub user_list: Option<PathBuf>,
    /// Time a client may take from connect to the end of authentication.
    #[serde(default = "seconds::<15>")]
    pub login_timeout: HumanDuration,
    /// Most client connections at once.
    #[serde(default = "default_connections")]
    pub max_connections: u32,
    /// Most connections that have not authenticated yet, all together.
    #[serde(default = "default_unauthenticated")]
    pub max_unauthenticated: u32,
    /// The same for one client address: those whose wrong password is being answered slowly, included.
    #[serde(default = "default_unauthenticated_per_address")]
    pub max_unauthenticated_per_address: u32,
    /// Who may use the console: the database `cofferdam`, or `pgbouncer`. Absent: nobody.
    #[serde(default)]
    pub console: ConsoleConfig,
}

/// Users of the console.
#[derive(Debug, Clone, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Those who may give every command.
    #[serde(default)]
    pub admins: Vec<LoginConfig>,
    /// Those who may only look: `SHOW`.
    #[serde(default)]
    pub viewers: Vec<LoginConfig>,
}

/// Which of Odoo's notifications on the maintenance database workers see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NotificationPolicy {
    /// Those of the pool's own tenants, the default.
    #[default]
    Own,
    /// All of the cluster.
    All,
}

/// How clients prove their password to the gateway.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AuthMethod {
    /// SCRAM-SHA-256, the default.
    #[default]
    #[serde(rename = "scram-sha-256", alias = "scram-sha256")]
    ScramSha256,
    /// MD5, for old drivers only.
    Md5,
    /// A certificate of a `client_ca`, whose common name is the role, instead of a password.
    Cert,
}

impl AuthMethod {
    /// The name used in configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ScramSha256 => "scram-sha-256",
            Self::Md5 => "md5",
            Self::Cert => "cert",
        }
    }
}

/// TLS for the clients of the PostgreSQL plane: PEM files, and what is demanded.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClientTlsConfig {
    /// What clients must do.
    #[serde(default = "TlsMode::prefer")]
    pub mode: TlsMode,
    /// PEM file with the certificate chain, leaf first.
    pub certificate: PathBuf,
    /// PEM file with the private key.
    pub key: PathBuf,
    /// PEM file with the authorities that sign the clients' certificates.
    pub client_ca: Option<PathBuf>,
}

/// One PostgreSQL server.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// Where it listens.
    pub address: Endpoint,
    /// Other servers of the cluster. Which one is the primary is found out; any may become it.
    #[serde(default)]
    pub replicas: Vec<Endpoint>,
    /// Where transactions go that say that they only read. `replica` needs `service`.
    #[serde(default)]
    pub read_only: ReadOnlyRouting,
    /// A replica that is further behind gets no transactions.
    #[serde(default = "seconds::<10>")]
    pub max_replica_lag: HumanDuration,
    /// The login that the gateway itself uses, to look after the servers and for `auth_query`.
    pub service: Option<ServiceConfig>,
    /// Asks the cluster for passwords of logins that give none. Needs `service`.
    pub auth_query: Option<AuthQueryConfig>,
    /// How often each server is looked at.
    #[serde(default = "seconds::<5>")]
    pub health_interval: HumanDuration,
    /// How long a transaction waits for a server that cannot be reached before it fails.
    #[serde(default = "seconds::<15>")]
    pub reconnect_wait: HumanDuration,
    /// Most transactions that run at once, all tenants together. Without `min_slots` about 1.5 to 2 per core is a good start.
    #[schemars(range(min = 1, max = 100_000))]
    pub slots: u32,
    /// Fewest slots to shrink to when more at once only make everything slower. About 2 per core lets `slots` be high. Default: `slots`, a fixed number.
    #[schemars(range(min = 1))]
    pub min_slots: Option<u32>,
    /// Most slots that expensive work may hold, all tenants together. Default: fifteen sixteenths.
    #[schemars(range(min = 1))]
    pub expensive_slots: Option<u32>,
    /// Open server connections at most: executing, pinned and idle. Default: four times the slots plus 20.
    #[schemars(range(min = 1))]
    pub connections: Option<u32>,
    /// The order in which waiting transactions are served.
    #[serde(default)]
    pub scheduling: Scheduling,
    /// Has the operating system favour modest work, where the server runs on the gateway's machine. Needs CAP_SYS_NICE.
    pub priorities: Option<Priorities>,
    /// TLS towards the server.
    #[serde(default)]
    pub tls: TlsMode,
    /// PEM file with the certificate authorities, for `verify-ca` and `verify-full`.
    pub tls_ca: Option<PathBuf>,
    /// PEM file with the certificate that the gateway shows to the server.
    pub tls_certificate: Option<PathBuf>,
    /// PEM file with its private key.
    pub tls_key: Option<PathBuf>,
    /// Time to connect and log in.
    #[serde(default = "seconds::<5>")]
    pub connect_timeout: HumanDuration,
    /// Time after which an idle server connection is closed.
    #[serde(default = "seconds::<600>")]
    pub idle_timeout: HumanDuration,
    /// Age at which a server connection is replaced, give or take a tenth. `0s`: never.
    #[serde(default = "seconds::<3600>")]
    pub lifetime: HumanDuration,
    /// Idle connections that are kept open for each database and login with clients, within `connections`.
    #[serde(default)]
    pub warm: u32,
}

/// Whether a connection is encrypted and the other side checked, named as in libpq.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    /// Never.
    #[default]
    Disable,
    /// To a server: only if it refuses without. From clients: as they like.
    Allow,
    /// To a server: if it offers it, its certificate is not checked. From clients: as they like.
    Prefer,
    /// Always; the other side's certificate is not checked.
    Require,
    /// Always; the other side's certificate is checked against the authorities.
    VerifyCa,
    /// Always; and the certificate must be for this host, or for this role when it is a client's.
    VerifyFull,
}

impl TlsMode {
    const fn prefer() -> Self {
        Self::Prefer
    }

    /// Whether a connection without TLS is out of the question.
    pub fn is_required(self) -> bool {
        matches!(self, Self::Require | Self::VerifyCa | Self::VerifyFull)
    }

    /// Whether the other side's certificate is checked.
    pub fn is_verified(self) -> bool {
        matches!(self, Self::VerifyCa | Self::VerifyFull)
    }

    /// The name used in configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Allow => "allow",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        }
    }
}

/// How connections to a PostgreSQL server are encrypted, for whoever is not the gateway.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServerTls {
    /// Whether, and whether the server's certificate is checked.
    pub mode: TlsMode,
    /// PEM file with the certificate authorities, for `verify-ca` and `verify-full`.
    pub ca_file: Option<PathBuf>,
}

/// Where transactions go that say that they only read: `BEGIN READ ONLY`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReadOnlyRouting {
    /// To the primary, as all others.
    #[default]
    Primary,
    /// To a replica that is not too far behind; to the primary when there is none.
    Replica,
}

/// The login that the gateway itself uses at a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceConfig {
    /// The role.
    pub role: String,
    /// Its password, in plain text.
    pub password: Option<Secret>,
    /// File with the password.
    pub password_file: Option<PathBuf>,
    /// Environment variable with the password.
    pub password_env: Option<String>,
    /// The database to connect to.
    #[serde(default = "default_service_database")]
    pub database: String,
}

impl ServiceConfig {
    pub(crate) fn login(&self) -> LoginConfig {
        LoginConfig {
            role: self.role.clone(),
            password: self.password.clone(),
            password_file: self.password_file.clone(),
            password_env: self.password_env.clone(),
        }
    }
}

/// How the passwords of logins that give none of their own are asked of the server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthQueryConfig {
    /// A query with the role as `$1` whose row has role and stored password. Default: `pg_authid`, with `VALID UNTIL` respected.
    pub query: Option<String>,
}

/// What a pool's login may do to databases through its maintenance database.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DatabaseCommands {
    /// Nothing: CREATE, DROP and ALTER DATABASE are refused.
    None,
    /// CREATE, DROP and ALTER of the databases of the pool's own tenants, the default.
    #[default]
    Own,
    /// Whatever the server allows.
    Any,
}

/// A PostgreSQL role and its password. Without one here it comes from `postgres.user_list` or the cluster's `auth_query`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoginConfig {
    /// The role.
    pub role: String,
    /// Its password, in plain text.
    pub password: Option<Secret>,
    /// File with the password.
    pub password_file: Option<PathBuf>,
    /// Environment variable with the password.
    pub password_env: Option<String>,
}

fn default_unauthenticated() -> u32 {
    500
}
fn default_unauthenticated_per_address() -> u32 {
    100
}
fn default_service_database() -> String {
    "postgres".to_owned()
}
