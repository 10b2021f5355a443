//! What the demo is played on.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::Context;
use cofferdam::{Gateway, Runtimes};
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::Target;
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use cofferdam_testkit::postgres::Cluster;

use super::Phase;

pub(crate) const WORKERS: usize = 6;
pub(crate) const QUIET: [&str; 5] = ["acme-civil", "bolt-bridges", "crane-hire", "delta-works", "east-paving"];
pub(crate) const NOISY: &str = "noisy-group";
const LOGIN: (&str, &str) = ("odoo", "odoo-demo-password");

pub(crate) struct Stage {
    // Dropped in this order: the gateway first, the server last.
    pub(crate) gateway: Gateway,
    odoo: MiniOdoo,
    directory: TenantDirectory,
    cluster: Cluster,
}

impl Stage {
    pub(crate) async fn build() -> anyhow::Result<Self> {
        let cluster = tokio::task::spawn_blocking(Cluster::start).await??;
        cluster.create_role(LOGIN.0, LOGIN.1).await?;
        for slug in QUIET.into_iter().chain([NOISY]) {
            cluster.create_database(slug, LOGIN.0).await?;
        }
        // Odoo must know where the gateway speaks PostgreSQL, and the gateway where Odoo speaks HTTP.
        let socket = TcpListener::bind("127.0.0.1:0").context("no free port")?;
        let postgres = socket.local_addr()?;
        let databases = QUIET.into_iter().chain([NOISY]).map(|slug| (host(slug), slug.to_owned())).collect();
        let odoo = MiniOdoo::start(OdooOptions {
            workers: WORKERS,
            databases,
            postgres: Some(postgres),
            login: (LOGIN.0.into(), LOGIN.1.into()),
            ..OdooOptions::default()
        })
        .await?;
        let directory = TenantDirectory::new(&main_file(&cluster, &odoo, "fair"))?;
        for slug in QUIET.into_iter().chain([NOISY]) {
            directory.tenant(slug, &tenant_file(slug))?;
        }
        let gateway = Gateway::builder()
            .config_file(directory.path())
            .postgres_listener(socket)
            .runtimes(Runtimes::Callers)
            .start()
            .await?;
        Ok(Self { gateway, odoo, directory, cluster })
    }

    /// Opens the connections that a house in use has open, so that the first phase measures work and not start-up.
    pub(crate) async fn warm_up(&self) {
        let mut first = Vec::new();
        for slug in QUIET.into_iter().chain([NOISY]) {
            for _ in 0..2 {
                let target = self.quiet_target(slug);
                first.push(tokio::spawn(async move { target.once().await }));
            }
        }
        for request in first {
            let _ = request.await;
        }
    }

    /// Changes the order of service while everything runs: by configuration, as an operator would.
    pub(crate) async fn schedule(&self, phase: Phase) -> anyhow::Result<()> {
        let scheduling = if phase == Phase::Protected { "fair" } else { "fifo" };
        self.directory.main(&main_file(&self.cluster, &self.odoo, scheduling))?;
        self.gateway.reload().await?;
        Ok(())
    }

    /// A short page of a quiet tenant.
    pub(crate) fn quiet_target(&self, slug: &str) -> Target {
        Target::logged_in(self.gateway.http_addresses()[0], host(slug), "/web?ms=8")
    }

    /// A report of the noisy one.
    pub(crate) fn noisy_target(&self) -> Target {
        Target::logged_in(self.gateway.http_addresses()[0], host(NOISY), "/report/pdf/project.costs/1?ms=1200")
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.odoo.busy() > 0
    }

    /// Drains and stops everything.
    pub(crate) async fn close(self) {
        self.gateway.drain();
        let _ = tokio::time::timeout(Duration::from_secs(5), self.gateway.wait()).await;
    }
}

fn host(slug: &str) -> String {
    format!("{slug}.example.com")
}

fn main_file(cluster: &Cluster, odoo: &MiniOdoo, scheduling: &str) -> String {
    let (http, gevent, port) = (odoo.http(), odoo.gevent(), cluster.port());
    let (role, password) = LOGIN;
    format!(
        "http: {{ listen: ['127.0.0.1:0'] }}
postgres: {{ listen: ['127.0.0.1:0'] }}
admin: {{ listen: '127.0.0.1:0' }}
pools:
  odoo-shared:
    servers: [{{ address: '{http}', gevent: '{gevent}' }}]
    slots: {WORKERS}
    scheduling: {scheduling}
    login: {{ role: {role}, password: {password} }}
    maintenance: pg-shared
clusters:
  pg-shared: {{ address: '127.0.0.1:{port}', slots: {WORKERS}, scheduling: {scheduling} }}
plans:
  standard:
    http: {{ limit: 4, max_wait: 60s }}
    postgres: {{ limit: 8, max_wait: 60s }}
"
    )
}

fn tenant_file(slug: &str) -> String {
    format!(
        "tenant: {slug}
hosts: [{host}]
database: {slug}
placement: {{ pool: odoo-shared, cluster: pg-shared }}
plan: standard
",
        host = host(slug)
    )
}
