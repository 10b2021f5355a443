//! Who a tenant is: identifiers, hosts, databases, placement, plans, and the checked catalog of them all.
//!
//! This crate is pure: it opens no socket, reads no clock and no file. Text comes in as [`Source`]s, and
//! either a complete [`Catalog`] comes out or every [`Diagnostic`] that stands in its way, each with file,
//! line, column, what was found and what was expected.
//!
//! ```
//! use cofferdam_tenant::{Catalog, NoSecrets, Source, SourceSet};
//!
//! let set = SourceSet {
//!     main: Source::new("cofferdam.yaml", "
//! http: { listen: ['127.0.0.1:8080'] }
//! pools: { odoo: { servers: [{ address: '127.0.0.1:8069' }], slots: 4 } }
//! plans: { standard: {} }
//! "),
//!     tenants: vec![Source::new("acme.yaml", "
//! tenant: acme
//! hosts: [acme.example.com]
//! placement: { pool: odoo }
//! plan: standard
//! ")],
//! };
//! let catalog = Catalog::build(&set, &NoSecrets, None).unwrap();
//! assert_eq!(catalog.by_host("acme.example.com").unwrap().slug.as_str(), "acme");
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod calendar;
mod catalog;
mod check;
mod config;
mod diagnostic;
mod ids;
mod schema;
mod units;
pub mod yaml;

pub use catalog::{
    AcmeFront, Canary, Catalog, ClassQuota, Cluster, ConsoleUser, FilestoreBucket, HttpFront, Login, Maintenance,
    Password, PerSecond, Plan, PlaneQuota, Pool, PostgresFront, Server, Tenant, TenantTls, TlsFiles,
};
pub use config::{
    AcmeChallenge, AcmeConfig, AdminConfig, AuthMethod, AuthQueryConfig, CacheConfig, CanaryConfig, CertificateConfig,
    Class, ClassQuotaConfig, ClientTlsConfig, ClusterConfig, ConsoleConfig, DatabaseCommands, ExternalAccountConfig,
    FilestoreBucketConfig, GatewayConfig, HeaderChanges, HeaderPolicyConfig, HealthConfig, HttpConfig, HttpTlsConfig,
    InternalRouteConfig, LoginConfig, LoginProtectionConfig, MaintenanceConfig, NetworksConfig, NotificationPolicy,
    Placement, PlanConfig, PoolConfig, PoolingMode, PostgresConfig, Priorities, QuotaConfig, ReadOnlyRouting,
    Scheduling, Scheme, ServerConfig, ServerTls, ServiceConfig, TenantFile, TenantTlsConfig, TlsMode, TracesConfig,
    WakeConfig,
};
pub use diagnostic::{Diagnostic, Diagnostics};
pub use ids::{ClusterName, DatabaseName, HostName, PlanName, PoolName, Slug, TenantId, normalize_host};
pub use schema::{gateway_schema, tenant_schema};
pub use units::{ByteSize, Endpoint, HumanDuration, Network, Secret};

use std::path::{Path, PathBuf};

/// One file of configuration: where it came from, and its text.
#[derive(Debug, Clone)]
pub struct Source {
    /// The path that messages name.
    pub path: PathBuf,
    /// The whole text.
    pub text: String,
}

impl Source {
    /// A source from a path and its text.
    pub fn new(path: impl Into<PathBuf>, text: impl Into<String>) -> Self {
        Self { path: path.into(), text: text.into() }
    }
}

/// Everything a catalog is built from: `cofferdam.yaml` and one file per tenant.
#[derive(Debug, Clone)]
pub struct SourceSet {
    /// The main configuration file.
    pub main: Source,
    /// One source per tenant, in the order in which errors shall be reported.
    pub tenants: Vec<Source>,
}

/// How secrets that a configuration only points at are read.
///
/// The catalog asks for each `password_file` and `password_env` once while it is built, so that a missing secret
/// is a configuration error and not a surprise at the first login.
pub trait Secrets {
    /// The content of a secret file, without its final line break.
    fn file(&self, path: &Path) -> std::io::Result<String>;
    /// The value of an environment variable.
    fn env(&self, name: &str) -> Option<String>;
    /// Where a secret file really is: for those who watch it.
    fn locate(&self, path: &Path) -> PathBuf {
        path.to_owned()
    }
}

/// A [`Secrets`] that has none: each reference is an error.
#[derive(Debug, Clone, Copy)]
pub struct NoSecrets;

impl Secrets for NoSecrets {
    fn file(&self, _: &Path) -> std::io::Result<String> {
        Err(std::io::ErrorKind::NotFound.into())
    }
    fn env(&self, _: &str) -> Option<String> {
        None
    }
}
