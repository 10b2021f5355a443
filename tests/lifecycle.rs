//! Reload and drain under load: nothing is lost.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cofferdam::{Gateway, Runtimes};
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::{HttpClient, Target};
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use cofferdam_testkit::postgres::Cluster;
use cofferdam_testkit::tools::{self, postgres_tool, run};
use cofferdam_tests::{POOL_LOGIN, TENANTS, tenant_file};
use tokio_util::sync::CancellationToken;

/// Odoo behind the HTTP plane, its databases behind the PostgreSQL plane.
struct House {
    gateway: Gateway,
    directory: TenantDirectory,
    main: String,
    odoo: MiniOdoo,
    _cluster: Cluster,
}

async fn house(runtimes: Runtimes) -> House {
    let cluster = tokio::task::spawn_blocking(Cluster::start).await.unwrap().unwrap();
    cluster.create_role(POOL_LOGIN.0, POOL_LOGIN.1).await.unwrap();
    for slug in TENANTS {
        cluster.create_database(&format!("{slug}_db"), POOL_LOGIN.0).await.unwrap();
    }
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let databases: HashMap<_, _> = TENANTS.map(|t| (format!("{t}.example.com"), format!("{t}_db"))).into();
    let odoo = MiniOdoo::start(OdooOptions {
        workers: 3,
        databases,
        postgres: Some(socket.local_addr().unwrap()),
        login: (POOL_LOGIN.0.into(), POOL_LOGIN.1.into()),
        ..OdooOptions::default()
    })
    .await
    .unwrap();
    let (role, password) = POOL_LOGIN;
    let main = format!(
        "http: {{ listen: ['127.0.0.1:0'] }}
postgres: {{ listen: ['127.0.0.1:0'] }}
pools:
  odoo: {{ servers: [{{ address: '{}' }}], slots: 3, login: {{ role: {role}, password: {password} }}, maintenance: pg }}
clusters:
  pg: {{ address: '127.0.0.1:{}', slots: 6 }}
plans:
  standard: {{ weight: 1 }}
drain_timeout: 30s
",
        odoo.http(),
        cluster.port()
    );
    let directory = TenantDirectory::new(&main).unwrap();
    for slug in TENANTS {
        directory.tenant(slug, &tenant_file(slug, "")).unwrap();
    }
    let gateway = Gateway::builder()
        .config_file(directory.path())
        .postgres_listener(socket)
        .runtimes(runtimes)
        .start()
        .await
        .unwrap();
    House { gateway, directory, main, odoo, _cluster: cluster }
}

impl House {
    fn page(&self, slug: &str) -> Target {
        Target::logged_in(self.gateway.http_addresses()[0], format!("{slug}.example.com"), "/web?ms=5")
    }

    fn database(&self, slug: &str) -> tools::Target {
        let port = self.gateway.postgres_addresses()[0].port();
        tools::Target::new(port, POOL_LOGIN.0, POOL_LOGIN.1, &format!("{slug}_db"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_reloads_under_load_lose_nothing() {
    let house = house(Runtimes::PerCore(2)).await;
    let init = run(postgres_tool("pgbench", &house.database("acme")).unwrap().args(["-i", "-q"])).await.unwrap();
    assert!(init.success, "{}", init.stderr);
    let stop = CancellationToken::new();
    let (served, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut load = Vec::new();
    for n in 0..6 {
        let target = house.page(TENANTS[n % 2]);
        let (stop, served, failed) = (stop.clone(), Arc::clone(&served), Arc::clone(&failed));
        load.push(tokio::spawn(async move {
            while !stop.is_cancelled() {
                match target.once().await {
                    Ok(response) if response.status == 200 => served.fetch_add(1, Ordering::Relaxed),
                    other => {
                        eprintln!("{other:?}");
                        failed.fetch_add(1, Ordering::Relaxed)
                    }
                };
            }
        }));
    }
    // As long as the reloads take: it is stopped by a signal, which pgbench takes as the end of its run.
    let mut pgbench = postgres_tool("pgbench", &house.database("acme")).unwrap();
    let pgbench = pgbench.args(["-n", "-M", "prepared", "-c", "8", "-j", "2", "-t", "400"]);
    let pgbench = tokio::spawn(run_owned(std::mem::replace(pgbench, tokio::process::Command::new("true"))));
    for n in 0..1_000u32 {
        // Something really changes each time: shares, a limit, a tenant that comes and goes.
        house.directory.main(&house.main.replace("weight: 1", &format!("weight: {}", 1 + n % 5))).unwrap();
        if n % 2 == 0 {
            house.directory.tenant("guest", &tenant_file("guest", "")).unwrap();
        } else {
            house.directory.remove("guest").unwrap();
        }
        house.gateway.reload().await.unwrap();
    }
    let out = pgbench.await.unwrap();
    stop.cancel();
    for task in load {
        task.await.unwrap();
    }
    assert!(out.success && out.stdout.contains("3200/3200"), "{}\n{}", out.stdout, out.stderr);
    assert!(out.stdout.contains("number of failed transactions: 0"), "{}", out.stdout);
    assert_eq!(failed.load(Ordering::Relaxed), 0);
    assert!(served.load(Ordering::Relaxed) > 20, "{}", served.load(Ordering::Relaxed));
    assert_eq!(house.gateway.reload().await.unwrap().generation, 1_002);
}

async fn run_owned(mut command: tokio::process::Command) -> tools::Output {
    run(&mut command).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_everything_in_flight_finish() {
    let house = house(Runtimes::Callers).await;
    let address = house.gateway.http_addresses()[0];
    let mut idle = HttpClient::connect(address).await.unwrap();
    assert_eq!(idle.get("acme.example.com", "/web/static/a.js").await.map_or(0, |r| r.status), 200);
    let psql = tokio::spawn(run_owned({
        let mut command = postgres_tool("psql", &house.database("bolt")).unwrap();
        command.args(["-XAt", "-c", "BEGIN", "-c", "SELECT pg_sleep(2)", "-c", "SELECT 'finished'", "-c", "COMMIT"]);
        command
    }));
    let gate = house.gateway.postgres_plane().unwrap().gates().get("pg").unwrap();
    cofferdam_tests::eventually(|| async { gate.usage().running == 1 }).await;
    let mut requests = Vec::new();
    // Three are with Odoo, which still has to begin its transactions; three wait in the gateway.
    for n in 0..6 {
        let target = Target::logged_in(address, format!("{}.example.com", TENANTS[n % 2]), "/web?ms=800&queries=4");
        requests.push(tokio::spawn(async move { target.once().await }));
    }
    let gate = house.gateway.http_plane().unwrap().gates().get("odoo").unwrap();
    cofferdam_tests::eventually(|| async { gate.usage().running == 3 && gate.usage().waiting == 3 }).await;
    house.gateway.drain();
    let report = tokio::time::timeout(Duration::from_secs(25), house.gateway.wait()).await.unwrap();
    assert!(report.complete);
    for request in requests {
        let response = request.await.unwrap().unwrap();
        assert_eq!(response.status, 200, "{}", response.text());
    }
    assert!(psql.await.unwrap().stdout.contains("finished"));
    assert!(HttpClient::connect(address).await.is_err(), "still listening");
    assert_eq!(house.odoo.busy(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_takes_too_long_ends_anyway() {
    let house = house(Runtimes::PerCore(2)).await;
    house.directory.main(&house.main.replace("drain_timeout: 30s", "drain_timeout: 1s")).unwrap();
    house.gateway.reload().await.unwrap();
    let target = Target::logged_in(house.gateway.http_addresses()[0], "acme.example.com", "/web?ms=60000&queries=1");
    let request = tokio::spawn(async move { target.once().await });
    let gate = house.gateway.postgres_plane().unwrap().gates().get("pg").unwrap();
    cofferdam_tests::eventually(|| async { gate.usage().running == 1 }).await;
    house.gateway.drain();
    let report = tokio::time::timeout(Duration::from_secs(20), house.gateway.wait()).await.unwrap();
    assert!(!report.complete);
    assert!(request.await.unwrap().is_err());
    assert_eq!(gate.usage().running, 0);
}

#[tokio::test]
async fn tenants_that_swap_their_hosts_in_one_reload_are_never_mixed_up() {
    let house = house(Runtimes::Callers).await;
    let before = house.gateway.catalog();
    let swap = |own: &str, other: &str| tenant_file(own, "").replace(&format!("[{own}."), &format!("[{other}."));
    for (own, other) in [("acme", "bolt"), ("bolt", "acme")] {
        house.directory.tenant(own, &swap(own, other)).unwrap();
    }
    house.gateway.reload().await.unwrap();
    let after = house.gateway.catalog();
    for slug in TENANTS {
        assert_eq!(before.by_slug(slug).unwrap().id, after.by_slug(slug).unwrap().id);
        assert_ne!(
            before.by_host(&format!("{slug}.example.com")).unwrap().slug,
            after.by_host(&format!("{slug}.example.com")).unwrap().slug
        );
    }
}
