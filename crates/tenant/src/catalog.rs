//! The catalog: everything a request needs to know, checked as a whole, immutable once built.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::check;
use crate::config::{
    AcmeConfig, AuthMethod, Class, DatabaseCommands, GatewayConfig, HeaderPolicyConfig, HealthConfig, HttpConfig,
    InternalRouteConfig, NetworksConfig, NotificationPolicy, PoolingMode, PostgresConfig, Priorities, ReadOnlyRouting,
    Scheduling, TlsMode, WakeConfig,
};
use crate::diagnostic::Diagnostics;
use crate::ids::{ClusterName, DatabaseName, HostName, PlanName, PoolName, Slug, TenantId};
use crate::units::{Endpoint, Network, Secret};
use crate::{Secrets, SourceSet};

/// So much per second, and how much can be saved up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerSecond {
    /// Per second; at least 1.
    pub amount: u64,
    /// At once; at least 1.
    pub burst: u64,
}

/// Bounds of one class of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassQuota {
    /// Slots never exceeded; `u32::MAX` without a bound of its own.
    pub limit: u32,
    /// Work that may wait; `u32::MAX` without a bound of its own.
    pub queue: u32,
    /// Longest wait for a slot.
    pub max_wait: Duration,
}

/// Quotas of one tenant on one pool or cluster, with defaults filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaneQuota {
    /// Slots guaranteed.
    pub reserved: u32,
    /// Slots never exceeded.
    pub limit: u32,
    /// Work that may wait.
    pub queue: u32,
    /// Longest wait for a slot.
    pub max_wait: Duration,
    /// Requests or transactions.
    pub rate: Option<PerSecond>,
    /// Milliseconds in slots.
    pub work: Option<PerSecond>,
    /// Bytes.
    pub bandwidth: Option<PerSecond>,
    /// By [`Class::index`].
    pub classes: [ClassQuota; Class::ALL.len()],
}

impl PlaneQuota {
    /// Longest wait of a class of work.
    pub fn max_wait(&self, class: Class) -> Duration {
        self.classes[class.index()].max_wait
    }
}

/// A plan with defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Its name.
    pub name: PlanName,
    /// Share under contention.
    pub weight: u32,
    /// Quotas on the pool. `limit` is `u32::MAX` when the plan sets none.
    pub http: PlaneQuota,
    /// Quotas on the cluster. `limit` is `u32::MAX` when the plan sets none.
    pub postgres: PlaneQuota,
    /// Largest request body, in bytes.
    pub max_body: u64,
    /// Largest head of a request, in bytes.
    pub max_header: u64,
    /// Longest request target, in bytes.
    pub max_url: u64,
    /// PostgreSQL client connections at once.
    pub max_clients: u32,
    /// WebSockets at once.
    pub max_websockets: u32,
    /// Longest idle time inside a transaction.
    pub idle_in_transaction_timeout: Duration,
    /// Longest time of one statement.
    pub statement_timeout: Option<Duration>,
    /// Longest time of one transaction.
    pub transaction_timeout: Option<Duration>,
    /// Longest time that a PostgreSQL client may do nothing.
    pub idle_timeout: Option<Duration>,
    /// PostgreSQL logins per second.
    pub login_rate: Option<u32>,
}

/// A PostgreSQL role and its password, resolved.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Login {
    /// The role.
    pub role: String,
    /// Its password, or what is known of it.
    pub password: Password,
}

impl Login {
    /// A login with a password that is known.
    pub fn new(role: impl Into<String>, password: impl Into<String>) -> Self {
        Self { role: role.into(), password: Password::Plain(Secret::new(password)) }
    }
}

/// What is known of a password.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Password {
    /// The password itself.
    Plain(Secret),
    /// What PostgreSQL stores of it: `SCRAM-SHA-256$…`, or `md5` and 32 hexadecimal digits.
    Stored(Secret),
    /// Nothing: the cluster is asked, with its `auth_query`.
    Asked,
}

/// One tenant.
#[derive(Debug)]
pub struct Tenant {
    /// Its number in this process, stable across reloads.
    pub id: TenantId,
    /// Its name.
    pub slug: Slug,
    /// The hosts under which it is reached.
    pub hosts: Vec<HostName>,
    /// Its database.
    pub database: Option<DatabaseName>,
    /// Its pool.
    pub pool: Option<Arc<Pool>>,
    /// Its cluster.
    pub cluster: Option<Arc<Cluster>>,
    /// Its plan.
    pub plan: Arc<Plan>,
    /// Its own login, beside that of its pool.
    pub login: Option<Login>,
    /// More logins that may open the database.
    pub users: Vec<Login>,
    /// Used at the server for whoever came with the pool's login or the tenant's own.
    pub server_login: Option<Login>,
    /// Roles that may open replication connections.
    pub replication: Vec<String>,
    /// When server connections change hands.
    pub pooling: PoolingMode,
    /// A second pool for a part of its requests.
    pub canary: Option<Canary>,
    /// What is changed of headers, after what is changed for all.
    pub headers: HeaderPolicyConfig,
    /// What is served instead of its site.
    pub maintenance_mode: Option<Maintenance>,
    /// TLS for its hosts.
    pub tls: TenantTls,
    /// Who may reach its hosts at all.
    pub networks: NetworksConfig,
    /// Closed routes that some addresses may use.
    pub internal_routes: Vec<InternalRouteConfig>,
}

impl Tenant {
    /// The login with this role that may open the tenant's database: its own, its pool's or one of its users.
    pub fn login(&self, role: &str) -> Option<&Login> {
        let pool = self.pool.as_ref().and_then(|p| p.login.as_ref());
        self.login.iter().chain(pool).chain(&self.users).find(|l| l.role == role)
    }

    /// The login used at the server for a client that came with this role.
    pub fn server_login(&self, role: &str) -> Option<&Login> {
        let login = self.login(role)?;
        let is_user = self.users.iter().any(|user| std::ptr::eq(user, login));
        Some(self.server_login.as_ref().filter(|_| !is_user).unwrap_or(login))
    }
}

/// One Odoo server of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// The HTTP port of the prefork workers.
    pub address: Endpoint,
    /// The gevent port.
    pub gevent: Option<Endpoint>,
}

/// A group of Odoo servers that share workers.
#[derive(Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: PoolName,
    /// Its servers.
    pub servers: Vec<Server>,
    /// Requests in flight at once.
    pub slots: u32,
    /// Fewest slots to shrink to.
    pub min_slots: u32,
    /// Whether a tenant whose database work waits gets fewer workers.
    pub coupled: bool,
    /// Which of Odoo's notifications its workers see.
    pub notifications: NotificationPolicy,
    /// Most slots that expensive work may hold.
    pub expensive_slots: u32,
    /// The order in which waiting requests are served.
    pub scheduling: Scheduling,
    /// By how much the `nice` values of its servers' workers on this machine are raised.
    pub priorities: Option<Priorities>,
    /// Time to connect to a server.
    pub connect_timeout: Duration,
    /// Time until a server must have begun its answer.
    pub response_timeout: Duration,
    /// Time without a byte inside an answer.
    pub read_timeout: Duration,
    /// Time without a byte on a WebSocket.
    pub websocket_timeout: Duration,
    /// Addresses from which the workers themselves call back.
    pub workers_from: Vec<Network>,
    /// Odoo's filestore, as the gateway sees it.
    pub filestore: Option<PathBuf>,
    /// The same in a bucket.
    pub filestore_bucket: Option<FilestoreBucket>,
    /// Who wakes its servers.
    pub wake: Option<WakeConfig>,
    /// The name of what is installed.
    pub release: Option<Arc<str>>,
    /// How its servers are looked after.
    pub health: Option<HealthConfig>,
    /// What is served instead of its sites.
    pub maintenance_mode: Option<Maintenance>,
    /// The PostgreSQL login of its workers.
    pub login: Option<Login>,
    /// The cluster on which that login may open the maintenance database.
    pub maintenance: Option<Arc<Cluster>>,
    /// Which databases it may create, drop and rename there.
    pub database_commands: DatabaseCommands,
    /// The account that work on the maintenance database is charged to.
    pub account: TenantId,
}

/// One PostgreSQL server.
#[derive(Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Its name.
    pub name: ClusterName,
    /// Its servers, the one written first at the front. Which is the primary has to be found out; at least one.
    pub servers: Vec<Endpoint>,
    /// Where transactions go that only read.
    pub read_only: ReadOnlyRouting,
    /// A replica further behind gets none.
    pub max_replica_lag: Duration,
    /// The login that the gateway itself uses, and the database.
    pub service: Option<(Login, String)>,
    /// The query that asks for passwords, with the role as `$1`.
    pub auth_query: Option<String>,
    /// How often each server is looked at.
    pub health_interval: Duration,
    /// How long a transaction waits for a server that cannot be reached.
    pub reconnect_wait: Duration,
    /// Transactions that run at once.
    pub slots: u32,
    /// Fewest slots to shrink to.
    pub min_slots: u32,
    /// Most slots that expensive work may hold.
    pub expensive_slots: u32,
    /// Open server connections at most.
    pub connections: u32,
    /// The order in which waiting transactions are served.
    pub scheduling: Scheduling,
    /// By how much the `nice` values of server processes on this machine are raised.
    pub priorities: Option<Priorities>,
    /// TLS towards the server.
    pub tls: TlsMode,
    /// The certificate authorities, as PEM text, for `verify-ca` and `verify-full`.
    pub tls_ca: Option<String>,
    /// What the gateway shows to the server.
    pub tls_identity: Option<TlsFiles>,
    /// Time to connect and log in.
    pub connect_timeout: Duration,
    /// Time after which an idle server connection is closed.
    pub idle_timeout: Duration,
    /// Age at which a server connection is replaced, give or take a tenth; zero: never.
    pub lifetime: Duration,
    /// Idle connections kept open for each database and login with clients.
    pub warm: u32,
}

impl Pool {
    /// Whether the workers of its servers, where they run on this machine, are looked at: whose `nice` values may be raised, and
    /// those behind a gate whose number of slots adapts.
    pub fn looks_at_processes(&self) -> bool {
        self.priorities.is_some() || self.min_slots < self.slots
    }
}

impl Cluster {
    /// Whether the server's processes, where they run on this machine, are looked at: whose `nice` values may be raised, and
    /// those behind a gate whose number of slots adapts.
    pub fn looks_at_processes(&self) -> bool {
        self.priorities.is_some() || self.min_slots < self.slots
    }
}

/// Certificate and key of a listener, as PEM text.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TlsFiles {
    /// The chain, leaf first.
    pub certificate: String,
    /// The private key.
    pub key: Secret,
}

/// A bucket with filestores.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FilestoreBucket {
    /// Its name.
    pub bucket: String,
    /// What all objects' names begin with.
    pub prefix: String,
    /// The region.
    pub region: String,
    /// Where the store is, without the bucket.
    pub endpoint: String,
    /// The bucket is in the path and not in the host name.
    pub path_style: bool,
    /// The authorities that have signed the store's certificate, as PEM text.
    pub ca: Option<String>,
    /// The access key.
    pub access_key: Secret,
    /// The secret key.
    pub secret_key: Secret,
}

/// A second pool for a part of a tenant's requests.
#[derive(Debug, Clone)]
pub struct Canary {
    /// The pool.
    pub pool: Arc<Pool>,
    /// Of a hundred browsers, how many go there.
    pub weight: u32,
    /// A request with this header goes there; in small letters.
    pub header: Option<String>,
}

/// A page instead of a site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Maintenance {
    /// What is said to clients.
    pub message: String,
    /// A page of HTML for browsers.
    pub page: Option<String>,
    /// When to come again.
    pub retry_after: Duration,
    /// Addresses that are served all the same.
    pub allow: Vec<Network>,
}

/// TLS for the hosts of one tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TenantTls {
    /// Its own certificate.
    pub identity: Option<TlsFiles>,
    /// The authorities of its clients' certificates, as PEM text.
    pub client_ca: Option<String>,
    /// Its hosts get no certificates by ACME.
    pub without_acme: bool,
}

/// The authority that is asked for certificates, with what the files say of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AcmeFront {
    /// The settings as written; the directory is where it really is.
    pub config: AcmeConfig,
    /// The authorities of the directory's own certificate, as PEM text.
    pub directory_ca: Option<String>,
    /// The key of the external account, in base64url without padding.
    pub external_key: Option<Secret>,
}

/// Listener settings of the HTTP plane, with what they point at.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct HttpFront {
    /// The settings as written.
    pub config: HttpConfig,
    /// What binds session cookies to their tenant.
    pub session_key: Option<Secret>,
    /// What the collector of traces wants to see.
    pub traces_authorization: Option<Secret>,
    /// The certificates for hosts of any tenant.
    pub certificates: Vec<TlsFiles>,
    /// Where the others come from.
    pub acme: Option<AcmeFront>,
}

/// Listener settings of the PostgreSQL plane that a reload may change.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PostgresFront {
    /// How clients prove their password.
    pub auth: AuthMethod,
    /// Certificate for clients.
    pub tls: Option<TlsFiles>,
    /// What is demanded of clients; `disable` without a certificate.
    pub tls_mode: TlsMode,
    /// The authorities of the clients' certificates, as PEM text.
    pub client_ca: Option<String>,
    /// The settings as written.
    pub config: PostgresConfig,
    /// Who may use the console.
    pub console: Vec<ConsoleUser>,
}

/// Somebody who may use the console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleUser {
    /// Role and password.
    pub login: Login,
    /// Whether every command is allowed, or only `SHOW`.
    pub is_admin: bool,
}

/// Everything a request needs to know, checked as a whole and immutable.
///
/// A request reads one catalog and keeps it until it ends.
#[derive(Debug)]
pub struct Catalog {
    pub(crate) tenants: Vec<Arc<Tenant>>,
    pub(crate) by_host: HashMap<HostName, Arc<Tenant>>,
    /// By what follows the asterisk.
    pub(crate) by_wildcard: HashMap<String, Arc<Tenant>>,
    pub(crate) by_database: HashMap<DatabaseName, Arc<Tenant>>,
    pub(crate) by_slug: HashMap<Slug, Arc<Tenant>>,
    pub(crate) by_role: HashMap<String, Login>,
    /// Pools by name.
    pub pools: BTreeMap<PoolName, Arc<Pool>>,
    /// Clusters by name.
    pub clusters: BTreeMap<ClusterName, Arc<Cluster>>,
    /// Plans by name.
    pub plans: BTreeMap<PlanName, Arc<Plan>>,
    /// HTTP listener settings.
    pub http: Option<HttpFront>,
    /// PostgreSQL listener settings.
    pub postgres: Option<PostgresFront>,
    /// Where the admin listener listens.
    pub admin: Option<SocketAddr>,
    /// The admin bearer token.
    pub admin_token: Option<Secret>,
    /// How long a drain may take.
    pub drain_timeout: Duration,
    /// The directory of tenant files, as written.
    pub tenants_directory: PathBuf,
    /// Numbers given to names so far: a tenant that comes back gets its old number, and with it its ledger.
    pub(crate) numbers: Arc<HashMap<String, TenantId>>,
}

impl Catalog {
    /// The name of the database that the pools' logins use for maintenance.
    pub const MAINTENANCE_DATABASE: &'static str = "postgres";

    /// Builds a catalog, or says everything that stands in its way.
    ///
    /// `previous` is the catalog it will replace: tenants keep their numbers.
    pub fn build(set: &SourceSet, secrets: &dyn Secrets, previous: Option<&Self>) -> Result<Self, Diagnostics> {
        check::build(set, secrets, previous)
    }

    /// The main file alone, decoded but not yet checked against anything: enough to learn where the tenants are.
    pub fn read_main(source: &crate::Source) -> Result<GatewayConfig, Diagnostics> {
        check::read_main(source).map(|(config, _)| config)
    }

    /// The tenant of a host; the host in any case, without port.
    pub fn by_host(&self, host: &str) -> Option<&Arc<Tenant>> {
        let host = crate::ids::normalize_host(host)?;
        let exact = self.by_host.get(host.as_ref());
        exact.or_else(|| self.by_wildcard.get(host.split_once('.')?.1))
    }

    /// The tenant that owns a database.
    pub fn by_database(&self, database: &str) -> Option<&Arc<Tenant>> {
        self.by_database.get(database)
    }

    /// The tenant with a name.
    pub fn by_slug(&self, slug: &str) -> Option<&Arc<Tenant>> {
        self.by_slug.get(slug)
    }

    /// All tenants, in the order of their names.
    pub fn tenants(&self) -> &[Arc<Tenant>] {
        &self.tenants
    }

    /// Any login with this role, of whatever tenant or pool.
    pub fn any_login(&self, role: &str) -> Option<&Login> {
        let of_pools = self.pools.values().filter_map(|p| p.login.as_ref()).find(|l| l.role == role);
        of_pools.or_else(|| self.by_role.get(role))
    }

    /// Every login that there is.
    pub fn logins(&self) -> impl Iterator<Item = &Login> {
        let of_pools = self.pools.values().filter_map(|p| p.login.as_ref());
        of_pools.chain(self.tenants.iter().flat_map(|t| t.login.iter().chain(&t.users)))
    }

    /// The pool whose login has this role and which may open the maintenance database.
    pub fn maintenance(&self, role: &str) -> Option<(&Arc<Pool>, &Login, &Arc<Cluster>)> {
        self.pools.values().find_map(|pool| {
            let login = pool.login.as_ref().filter(|l| l.role == role)?;
            Some((pool, login, pool.maintenance.as_ref()?))
        })
    }
}
