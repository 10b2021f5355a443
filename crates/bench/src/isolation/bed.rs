//! The servers at the back, and what is asked of them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions, Program};
use cofferdam_testkit::postgres::{Cluster, ClusterOptions, free_port};
use tokio::time::Instant;

use super::load::Target;
use super::{Plane, Workload, host};
use crate::peers::{Behind, Running};

/// Tenants with a little to do all the time.
pub(super) const VICTIMS: usize = 8;
/// The most aggressors there can be.
const AGGRESSORS: usize = 4;
/// Workers of the miniature Odoo.
pub(super) const WORKERS: u32 = 40;
/// Slots of the cluster: the most transactions at once.
const POSTGRES_SLOTS: u32 = 40;
const PASSWORD: &str = "isolation-secret";
/// How long a piece of the aggressors' long work takes: sleeping, and computing alone on a core.
const SLEEP: Duration = Duration::from_secs(1);
const BURN: Duration = Duration::from_millis(400);
/// How long a piece of a storm computes.
const GUST: Duration = Duration::from_millis(3);
/// A piece of a storm that writes: some row, once.
const WRITE: &str = "UPDATE accounts SET balance = balance + 1 WHERE aid = (SELECT 1 + (random() * 9999)::int)";

/// The back of one plane.
pub(super) struct Bed {
    plane: Plane,
    cluster: Option<Cluster>,
    watcher: Option<tokio_postgres::Client>,
    odoo: Option<MiniOdoo>,
    /// The port at which the gateway must speak PostgreSQL to Odoo.
    postgres_front: Option<u16>,
    tenants: Vec<String>,
    /// Rows to count for a millisecond of computing.
    rows_per_ms: f64,
}

impl Bed {
    /// `durable`: whoever commits waits for the disk.
    pub(super) async fn make(plane: Plane, durable: bool) -> anyhow::Result<Self> {
        let tenants: Vec<String> =
            (1..=VICTIMS).map(|n| format!("victim{n}")).chain((1..=AGGRESSORS).map(|n| format!("noisy{n}"))).collect();
        let mut bed =
            Self { plane, cluster: None, watcher: None, odoo: None, postgres_front: None, tenants, rows_per_ms: 0.0 };
        if plane != Plane::Http {
            bed.start_postgres(durable).await.context("PostgreSQL")?;
        }
        if plane == Plane::Http {
            bed.start_odoo(None).await?;
        }
        Ok(bed)
    }

    /// With both planes Odoo has to know where its PostgreSQL is: behind the gateway, or PostgreSQL itself.
    pub(super) async fn prepare(&mut self, through_gateway: bool) -> anyhow::Result<()> {
        if self.plane == Plane::Both {
            let server = self.cluster.as_ref().map_or(0, Cluster::port);
            let front = if through_gateway { free_port()? } else { server };
            self.postgres_front = through_gateway.then_some(front);
            self.odoo = None;
            self.start_odoo(Some(front)).await?;
        }
        Ok(())
    }

    async fn start_postgres(&mut self, durable: bool) -> anyhow::Result<()> {
        let mut settings = vec!["max_connections = 400", "jit = off", "max_parallel_workers_per_gather = 0"];
        if durable {
            settings.extend(["fsync = on", "synchronous_commit = on"]);
        }
        let settings = settings.into_iter().map(str::to_owned).collect();
        let options = ClusterOptions { settings, ..ClusterOptions::default() };
        let cluster = tokio::task::spawn_blocking(move || Cluster::start_with(&options)).await??;
        for tenant in &self.tenants {
            cluster.create_role(tenant, PASSWORD).await?;
            cluster.create_database(tenant, tenant).await?;
            let client = cluster.connect(tenant, PASSWORD, tenant).await?;
            client
                .batch_execute(
                    "CREATE TABLE accounts (aid int PRIMARY KEY, balance int NOT NULL);
                     INSERT INTO accounts SELECT g, 0 FROM generate_series(1, 10000) g; ANALYZE accounts",
                )
                .await?;
        }
        let watcher = cluster.admin("postgres").await?;
        // The fastest of a few: how many rows are counted in a millisecond by a core that has nothing else to do.
        let mut fastest = Duration::MAX;
        for _ in 0..5 {
            let begun = Instant::now();
            watcher.batch_execute(&count(400_000)).await?;
            fastest = fastest.min(begun.elapsed());
        }
        self.rows_per_ms = 400_000.0 / (fastest.as_secs_f64() * 1e3);
        self.cluster = Some(cluster);
        self.watcher = Some(watcher);
        Ok(())
    }

    async fn start_odoo(&mut self, postgres: Option<u16>) -> anyhow::Result<()> {
        let databases = self.tenants.iter().map(|t| (host(t), t.clone())).collect();
        let odoo = MiniOdoo::start(OdooOptions {
            workers: WORKERS as usize,
            databases,
            postgres: postgres.map(|port| SocketAddr::from(([127, 0, 0, 1], port))),
            login_per_database: postgres.map(|_| PASSWORD.to_owned()),
            prefork: Some(Program {
                path: std::env::current_exe()?,
                arguments: vec!["bench".into(), "odoo-worker".into()],
            }),
            ..OdooOptions::default()
        })
        .await?;
        self.odoo = Some(odoo);
        Ok(())
    }

    pub(super) fn behind(&self) -> Behind<'_> {
        Behind {
            postgres: self.cluster.as_ref().map(Cluster::port),
            postgres_front: self.postgres_front,
            http: self.odoo.as_ref().map(|o| o.http().port()),
            workers: WORKERS,
            tenants: &self.tenants,
            password: PASSWORD,
            pgbouncer: "pgbouncer".into(),
            slots: POSTGRES_SLOTS,
            least_slots: 4,
            priorities: true,
        }
    }

    pub(super) fn victims(&self, peer: &Running) -> Vec<Target> {
        let page = if self.plane == Plane::Both { "/web?ms=1&queries=2" } else { "/testkit/work?wait=2" };
        let statements: Arc<[String]> = [
            "BEGIN",
            "SELECT balance FROM accounts WHERE aid = 4711",
            "SELECT sum(balance) FROM accounts WHERE aid BETWEEN 1000 AND 3000",
            "UPDATE accounts SET balance = balance + 1 WHERE aid = 4711",
            "COMMIT",
        ]
        .map(str::to_owned)
        .into();
        self.tenants[..VICTIMS].iter().map(|t| self.target(peer, t, Arc::clone(&statements), page)).collect()
    }

    pub(super) fn aggressors(&self, peer: &Running, workload: Workload, n: u32) -> Vec<Target> {
        let rows = |d: Duration| (self.rows_per_ms * d.as_secs_f64() * 1e3) as u64;
        let in_transaction =
            |statement: String| -> Arc<[String]> { ["BEGIN".into(), statement, "COMMIT".into()].into() };
        let statements: Arc<[String]> = match workload {
            Workload::Sleep => in_transaction(format!("SELECT pg_sleep({})", SLEEP.as_secs_f64())),
            Workload::Burn => in_transaction(count(rows(BURN))),
            Workload::Storm => [count(rows(GUST))].into(),
            Workload::Write => [WRITE.to_owned()].into(),
        };
        let page = match (workload, self.plane) {
            (Workload::Sleep, Plane::Both) => format!("/web?ms={}&queries=1", SLEEP.as_millis()),
            (Workload::Burn, Plane::Both) => format!("/web?count={}", rows(BURN)),
            (Workload::Storm | Workload::Write, Plane::Both) => format!("/web?count={}", rows(GUST)),
            (Workload::Sleep, _) => format!("/testkit/work?wait={}", SLEEP.as_millis()),
            (Workload::Burn, _) => format!("/testkit/work?compute={}", BURN.as_millis()),
            (Workload::Storm | Workload::Write, _) => format!("/testkit/work?compute={}", GUST.as_millis()),
        };
        let tenants = &self.tenants[VICTIMS..VICTIMS + n as usize];
        tenants.iter().map(|t| self.target(peer, t, Arc::clone(&statements), &page)).collect()
    }

    fn target(&self, peer: &Running, tenant: &str, statements: Arc<[String]>, page: &str) -> Target {
        if self.plane == Plane::Postgres {
            Target::Postgres {
                port: peer.postgres,
                user: tenant.into(),
                password: PASSWORD.into(),
                database: tenant.into(),
                statements,
            }
        } else {
            let address = SocketAddr::from(([127, 0, 0, 1], peer.http));
            Target::Http { address, host: host(tenant), path: page.into() }
        }
    }

    pub(super) fn slots(&self) -> u32 {
        if self.plane == Plane::Postgres { POSTGRES_SLOTS } else { WORKERS }
    }

    /// Pieces of work that run at the back now.
    pub(super) async fn running(&self) -> anyhow::Result<u32> {
        if let Some(odoo) = &self.odoo {
            return Ok(odoo.busy());
        }
        let Some(watcher) = &self.watcher else { return Ok(0) };
        let row = watcher
            .query_one(
                "SELECT count(*)::int FROM pg_stat_activity
                 WHERE backend_type = 'client backend' AND state <> 'idle' AND pid <> pg_backend_pid()",
                &[],
            )
            .await?;
        Ok(row.get::<_, i32>(0).max(0) as u32)
    }
}

fn count(rows: u64) -> String {
    format!("SELECT count(*) FROM generate_series(1, {rows})")
}
