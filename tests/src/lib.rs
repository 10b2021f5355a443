//! What the tests of the whole share: a real PostgreSQL cluster with two tenants behind a gateway.
#![allow(clippy::missing_panics_doc, clippy::unwrap_used, clippy::expect_used)]

pub mod house;
pub mod raw;
pub mod strict;

use std::net::SocketAddr;
use std::time::Duration;

use cofferdam::{Gateway, Runtimes};
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::HttpClient;
use cofferdam_testkit::postgres::{Cluster, ClusterOptions, connect};
use cofferdam_testkit::tools::Target;
use tokio_postgres::Client;

/// The login of the pool's workers, which opens every tenant's database.
pub const POOL_LOGIN: (&str, &str) = ("odoo", "odoo-secret");
/// Tenants, each with a database and a login of its own: `<slug>_db`, `<slug>_role`, `<slug>-secret`.
pub const TENANTS: [&str; 2] = ["acme", "bolt"];

/// How a site differs from the usual one.
#[derive(Debug, Clone)]
pub struct SiteOptions {
    /// Slots of the cluster.
    pub slots: u32,
    /// Lines under `clusters.pg`, indented by four.
    pub cluster: String,
    /// Lines under `postgres`, indented by two.
    pub postgres: String,
    /// The plan's `postgres` quotas, as a flow mapping.
    pub quotas: String,
    /// More lines under the plan, indented by four.
    pub plan: String,
    /// More lines in each tenant's file.
    pub tenant: String,
    /// How the server is set up.
    pub server: ClusterOptions,
    /// Where the gateway runs.
    pub runtimes: Runtimes,
}

impl Default for SiteOptions {
    fn default() -> Self {
        Self {
            slots: 4,
            cluster: String::new(),
            postgres: String::new(),
            quotas: "{}".into(),
            plan: String::new(),
            tenant: String::new(),
            server: ClusterOptions::default(),
            runtimes: Runtimes::Callers,
        }
    }
}

/// A cluster, a gateway in front of it, and its configuration.
#[derive(Debug)]
pub struct Site {
    /// The PostgreSQL server.
    pub cluster: Cluster,
    /// The gateway.
    pub gateway: Gateway,
    /// Its configuration.
    pub directory: TenantDirectory,
}

impl Site {
    /// The usual site.
    pub async fn start() -> Self {
        Self::start_with(SiteOptions::default()).await
    }

    /// A site with options.
    pub async fn start_with(options: SiteOptions) -> Self {
        let server = options.server.clone();
        let cluster = tokio::task::spawn_blocking(move || Cluster::start_with(&server)).await.unwrap().unwrap();
        cluster.create_role(POOL_LOGIN.0, POOL_LOGIN.1).await.unwrap();
        for slug in TENANTS {
            cluster.create_role(&format!("{slug}_role"), &format!("{slug}-secret")).await.unwrap();
            cluster.create_database(&format!("{slug}_db"), POOL_LOGIN.0).await.unwrap();
            let admin = cluster.admin(&format!("{slug}_db")).await.unwrap();
            admin.batch_execute("GRANT ALL ON SCHEMA public TO public").await.unwrap();
        }
        let directory = TenantDirectory::new(&main_file(cluster.port(), &options)).unwrap();
        for slug in TENANTS {
            directory.tenant(slug, &tenant_file(slug, &options.tenant)).unwrap();
        }
        let gateway =
            Gateway::builder().config_file(directory.path()).runtimes(options.runtimes).start().await.unwrap();
        Self { cluster, gateway, directory }
    }

    /// Where the gateway speaks PostgreSQL.
    pub fn address(&self) -> SocketAddr {
        self.gateway.postgres_addresses()[0]
    }

    /// A connection through the gateway with the pool's login.
    pub async fn connect(&self, slug: &str) -> Client {
        connect(self.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, &format!("{slug}_db")).await.unwrap()
    }

    /// What the admin surface tells Prometheus.
    pub async fn metrics(&self) -> String {
        let address = self.gateway.admin_address().unwrap();
        let mut admin = HttpClient::connect(address).await.unwrap();
        admin.get("localhost", "/metrics").await.unwrap().text()
    }

    /// A target for programs, through the gateway, with the pool's login.
    pub fn target(&self, slug: &str) -> Target {
        Target::new(self.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, &format!("{slug}_db"))
    }
}

/// The main file of a site.
pub fn main_file(port: u16, options: &SiteOptions) -> String {
    let SiteOptions { slots, cluster, postgres, quotas, plan, .. } = options;
    let (role, password) = POOL_LOGIN;
    format!(
        "postgres:\n  listen: ['127.0.0.1:0']\n{postgres}
admin: {{ listen: '127.0.0.1:0' }}
pools:
  odoo:
    servers: [{{ address: '127.0.0.1:1' }}]
    slots: 4
    login: {{ role: {role}, password: {password} }}
    maintenance: pg
clusters:
  pg:
    address: '127.0.0.1:{port}'
    slots: {slots}
{cluster}
plans:
  standard:
    postgres: {quotas}
{plan}
drain_timeout: 20s
"
    )
}

/// A tenant's file.
pub fn tenant_file(slug: &str, more: &str) -> String {
    format!(
        "tenant: {slug}
hosts: [{slug}.example.com]
database: {slug}_db
placement: {{ pool: odoo, cluster: pg }}
plan: standard
login: {{ role: {slug}_role, password: {slug}-secret }}
{more}
"
    )
}

/// Waits until something is true that has no signal of its own; fails after 20 seconds.
pub async fn eventually(mut check: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !check().await {
        assert!(tokio::time::Instant::now() < deadline, "it did not happen within 20 s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
