//! Fair queueing on real parts: quotas, nested transactions, the coupling of the planes, slow readers.
//!
//! Numbers of rules are those of the project's notes on Odoo and PostgreSQL, which were read in sources or measured.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use cofferdam::Gateway;
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::HttpClient;
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use cofferdam_testkit::postgres::Cluster;
use cofferdam_tests::{POOL_LOGIN, Site, SiteOptions, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::{Client, NoTls};

const ACME: &str = "acme.example.com";
const BOLT: &str = "bolt.example.com";

/// A miniature Odoo behind a gateway; with `postgres` also its database, behind the same gateway.
struct House {
    odoo: MiniOdoo,
    gateway: Gateway,
    directory: TenantDirectory,
    _cluster: Option<Cluster>,
}

impl House {
    async fn start(workers: usize, pool: &str, plan: &str, acme: &str) -> Self {
        Self::build(workers, pool, "", plan, acme, None).await
    }

    async fn build(
        workers: usize,
        pool: &str,
        cluster_lines: &str,
        plan: &str,
        acme: &str,
        cluster: Option<Cluster>,
    ) -> Self {
        let front = TcpListener::bind("127.0.0.1:0").unwrap();
        let odoo = MiniOdoo::start(OdooOptions {
            workers,
            databases: ["acme", "bolt"].map(|t| (format!("{t}.example.com"), format!("{t}_db"))).into(),
            postgres: cluster.as_ref().map(|_| front.local_addr().unwrap()),
            login: (POOL_LOGIN.0.into(), POOL_LOGIN.1.into()),
            ..OdooOptions::default()
        })
        .await
        .unwrap();
        let mut main = format!(
            "http: {{ listen: ['127.0.0.1:0'] }}\npools:\n  odoo:\n    servers: [{{ address: '{}' }}]\n    slots: {workers}\n{pool}\n",
            odoo.http()
        );
        if let Some(cluster) = &cluster {
            let (role, password) = POOL_LOGIN;
            main.push_str(&format!(
                "    login: {{ role: {role}, password: {password} }}\n    maintenance: pg\npostgres: {{ listen: ['127.0.0.1:0'] }}\n\
                 clusters:\n  pg:\n    address: '127.0.0.1:{}'\n{cluster_lines}\n",
                cluster.port()
            ));
        }
        main.push_str(&format!("plans:\n  standard:\n    weight: 1\n{plan}\ndrain_timeout: 20s\n"));
        let directory = TenantDirectory::new(&main).unwrap();
        for (tenant, more) in [("acme", acme), ("bolt", "")] {
            let placement = if cluster.is_some() { "{ pool: odoo, cluster: pg }" } else { "{ pool: odoo }" };
            let text = format!(
                "tenant: {tenant}\nhosts: [{tenant}.example.com]\ndatabase: {tenant}_db\nplacement: {placement}\nplan: standard\n{more}\n"
            );
            directory.tenant(tenant, &text).unwrap();
        }
        let mut builder = Gateway::builder().config_file(directory.path());
        if cluster.is_some() {
            builder = builder.postgres_listener(front);
        }
        Self { odoo, gateway: builder.start().await.unwrap(), directory, _cluster: cluster }
    }

    fn address(&self) -> SocketAddr {
        self.gateway.http_addresses()[0]
    }

    async fn client(&self) -> HttpClient {
        HttpClient::connect(self.address()).await.unwrap()
    }

    /// Asks for a page from a client of its own, in the background.
    fn ask(&self, host: &'static str, path: &'static str) -> tokio::task::JoinHandle<u16> {
        let address = self.address();
        tokio::spawn(async move {
            let mut client = HttpClient::connect(address).await.unwrap();
            client.get(host, path).await.map_or(0, |r| r.status)
        })
    }

    fn pool(&self) -> std::sync::Arc<cofferdam::fairness::Gate> {
        self.gateway.http_plane().unwrap().gates().get("odoo").unwrap()
    }
}

/// Odoo, "Workers" ●: 24 requests of 3 s from one tenant on 2 workers, and a trivial call of another: 26.96 s in Odoo
/// as it is. Here the trivial call is answered while not one of the 24 is.
#[tokio::test]
async fn twenty_four_slow_requests_on_two_workers_do_not_hold_up_a_trivial_call() {
    let house = House::start(2, "", "", "").await;
    let slow: Vec<_> = (0..24).map(|_| house.ask(ACME, "/web?ms=3000")).collect();
    let gate = house.pool();
    eventually(|| async { gate.usage().waiting >= 20 }).await;
    assert_eq!(house.client().await.get(BOLT, "/web?ms=1").await.unwrap().status, 200);
    assert!(slow.iter().all(|s| !s.is_finished()), "the trivial call waited for a slow one");
    slow.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn a_rate_is_a_rate_and_says_when_to_come_again() {
    let plan = "    http: { rate: 5, rate_burst: 5, max_wait: 100ms }";
    let house = House::start(2, "", plan, "").await;
    let mut client = house.client().await;
    let mut answers = Vec::new();
    for _ in 0..20 {
        answers.push(client.get(ACME, "/testkit/echo").await.unwrap());
    }
    let refused: Vec<_> = answers.iter().filter(|a| a.status == 429).collect();
    assert!(refused.len() >= 5, "{} of 20 were refused", refused.len());
    assert!(answers.iter().filter(|a| a.status == 200).count() >= 5);
    assert!(refused[0].text().contains("tenant acme") && refused[0].text().contains("limit of 5 a second"));
    assert!(refused[0].header("retry-after").is_some());
    // Nobody else's.
    assert_eq!(client.get(BOLT, "/testkit/echo").await.unwrap().status, 200);
}

#[tokio::test]
async fn work_beyond_its_budget_is_paid_back_before_more_is_done() {
    let plan = "    http: { work: 50ms, work_burst: 50ms, max_wait: 200ms }";
    let house = House::start(2, "", plan, "").await;
    let mut client = house.client().await;
    assert_eq!(client.get(ACME, "/web?ms=600").await.unwrap().status, 200, "cost is known only afterwards");
    let refused = client.get(ACME, "/web?ms=1").await.unwrap();
    assert_eq!(refused.status, 429);
    assert!(refused.text().contains("budget of 0.05 s of work a second"), "{}", refused.text());
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((5..=20).contains(&wait), "more than half a second at a twentieth: {wait} s");
    assert_eq!(client.get(BOLT, "/web?ms=1").await.unwrap().status, 200);
}

#[tokio::test]
async fn a_class_has_bounds_of_its_own_and_a_tenant_has_its_own_beside_its_plans() {
    let plan = "    http: { max_wait: 20s, classes: { report: { limit: 1, queue: 0 } } }";
    let house = House::start(4, "", plan, "quotas: { http: { classes: { report: { limit: 2 } } } }").await;
    let gate = house.pool();
    for (host, limit) in [(BOLT, 1), (ACME, 2)] {
        let before = gate.usage().running;
        let reports: Vec<_> = (0..limit).map(|_| house.ask(host, "/report/pdf/x/1?ms=3000")).collect();
        eventually(|| async { gate.usage().running == before + limit }).await;
        let refused = house.client().await.get(host, "/report/pdf/x/1").await.unwrap();
        assert_eq!(refused.status, 429, "{host}");
        assert!(refused.text().contains("for report work"), "{}", refused.text());
        reports.iter().for_each(tokio::task::JoinHandle::abort);
    }
    // Pages are no reports.
    assert_eq!(house.client().await.get(ACME, "/web?ms=1").await.unwrap().status, 200);
}

/// Odoo, "Workers": an answer is read fast, whoever it is for. A client that takes nothing keeps no worker, and gets
/// every byte when it comes round to it.
#[tokio::test]
async fn a_client_that_reads_slowly_keeps_no_worker_and_loses_nothing() {
    const LENGTH: usize = 20_000_000;
    let house = House::start(1, "", "", "").await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(8_192).unwrap();
    let mut slow = socket.connect(house.address()).await.unwrap();
    let ask = format!("GET /web/content/{LENGTH} HTTP/1.1\r\nHost: {ACME}\r\nConnection: close\r\n\r\n");
    slow.write_all(ask.as_bytes()).await.unwrap();
    let gate = house.pool();
    eventually(|| async { house.odoo.requests() == 1 && house.odoo.busy() == 0 && gate.usage().running == 0 }).await;
    assert_eq!(house.client().await.get(BOLT, "/testkit/echo").await.unwrap().status, 200, "the only worker is free");
    let mut answer = Vec::new();
    slow.read_to_end(&mut answer).await.unwrap();
    let head = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    assert_eq!(answer.len() - head, LENGTH);
}

/// The ledger: a tenant whose database work waits gets fewer workers. Its plan lets one transaction run. First come,
/// first served, its requests take every worker just to wait there; scheduled fairly, but each plane for itself, half of
/// them; coupled, two: one whose transaction runs, and one that comes next.
#[tokio::test]
async fn a_tenant_whose_database_is_stuck_does_not_keep_the_workers() {
    for (scheduling, coupled) in [("fifo", false), ("fair", false), ("fair", true)] {
        let cluster = tokio::task::spawn_blocking(Cluster::start).await.unwrap().unwrap();
        cluster.create_role(POOL_LOGIN.0, POOL_LOGIN.1).await.unwrap();
        for database in ["acme_db", "bolt_db"] {
            cluster.create_database(database, POOL_LOGIN.0).await.unwrap();
        }
        let pool = format!("    coupled: {coupled}\n    scheduling: {scheduling}");
        let plan = "    postgres: { max_wait: 60s }\n    http: { max_wait: 60s }";
        let acme = "quotas: { postgres: { limit: 1 } }";
        let house = House::build(8, &pool, "    slots: 8", plan, acme, Some(cluster)).await;
        let (gate, tenant) = (house.pool(), house.gateway.catalog().by_slug("acme").unwrap().id);
        let stuck: Vec<_> = (0..20).map(|_| house.ask(ACME, "/web?ms=1500&queries=1")).collect();
        if coupled {
            eventually(|| async { gate.tenant_usage(tenant).squeezed_to.is_some() }).await;
            eventually(|| async { gate.tenant_usage(tenant).running <= 2 }).await;
            assert!(gate.tenant_usage(tenant).waiting > 0, "they wait at the gateway");
            // Nobody else is concerned, and when the queue has cleared, nor is the tenant.
            assert_eq!(house.client().await.get(BOLT, "/web?ms=1").await.unwrap().status, 200);
            stuck.iter().for_each(tokio::task::JoinHandle::abort);
            eventually(|| async { gate.tenant_usage(tenant).squeezed_to.is_none() }).await;
        } else {
            let taken = if scheduling == "fifo" { 8 } else { 4 };
            eventually(|| async { house.odoo.busy() >= taken }).await;
            assert_eq!(gate.tenant_usage(tenant).squeezed_to, None);
            stuck.iter().for_each(tokio::task::JoinHandle::abort);
        }
    }
}

#[tokio::test]
async fn an_operator_is_told_before_a_quota_is_used_up() {
    let plan = "    http: { limit: 4, queue: 10, max_wait: 20s }";
    let house = House::start(8, "", plan, "").await;
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let admin = socket.local_addr().unwrap();
    let gateway = Gateway::builder().config_file(house.directory.path()).admin_listener(socket).start().await.unwrap();
    let http = gateway.http_addresses()[0];
    let slow: Vec<_> = (0..4)
        .map(|_| tokio::spawn(async move { HttpClient::connect(http).await.unwrap().get(ACME, "/web?ms=5000").await }))
        .collect();
    let listed = || async move {
        let mut client = HttpClient::connect(admin).await.unwrap();
        let answer = client.get("localhost", "/api/v1/tenants?sort=work&limit=1").await.unwrap();
        serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap()
    };
    eventually(|| async { listed().await[0]["warnings"][0] == "http slots: 4 of 4" }).await;
    assert_eq!(listed().await[0]["tenant"], "acme");
    assert_eq!(listed().await.as_array().unwrap().len(), 1);
    slow.iter().for_each(tokio::task::JoinHandle::abort);
}

/// A connection as an Odoo process with this number opens it.
async fn odoo_process(site: &Site, pid: u32, database: &str) -> Client {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(site.address().port()).user(POOL_LOGIN.0).password(POOL_LOGIN.1);
    let (client, connection) =
        config.dbname(database).application_name(format!("odoo-{pid}")).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The `nice` value of a process.
fn nice(pid: i32) -> i32 {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return i32::MIN };
    let after_name = stat.rsplit(") ").next().unwrap();
    after_name.split(' ').nth(16).unwrap().parse().unwrap()
}

/// The `nice` value of a process's session, where the kernel divides cores between sessions.
fn nice_of_session(pid: i32) -> Option<i32> {
    let enabled = std::fs::read_to_string("/proc/sys/kernel/sched_autogroup_enabled").ok()?;
    let group = std::fs::read_to_string(format!("/proc/{pid}/autogroup")).ok()?;
    group.trim().rsplit(' ').next()?.parse().ok().filter(|_| enabled.starts_with('1'))
}

/// Whether a priority that was lowered can be given back here.
fn may_prioritise() -> bool {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let renice = |value: &str| {
        let mut renice = std::process::Command::new("renice");
        renice.args(["-n", value, "-p", &child.id().to_string()]).output().unwrap().status.success()
    };
    let may_group = nice_of_session(child.id().cast_signed()).is_none_or(|nice| {
        std::fs::write(format!("/proc/{}/autogroup", child.id()), nice.to_string())
            .map_or_else(|error| error.kind() != std::io::ErrorKind::PermissionDenied, |()| true)
    });
    let may = renice("5") && renice("0") && may_group;
    child.kill().unwrap();
    child.wait().unwrap();
    may
}

/// Running work cannot be taken back, but it can be made to give way: the process of a server on this machine that does
/// expensive work, or a storm's, runs with a higher `nice` value, and with its usual one again when it does modest work.
/// Where that could not be given back, nothing is touched.
#[tokio::test]
async fn server_processes_give_way_while_they_do_what_is_in_the_way_of_others() {
    let cluster = "    priorities: { storm: 3, expensive: 7 }".to_owned();
    let site = Site::start_with(SiteOptions { slots: 4, cluster, ..SiteOptions::default() }).await;
    let (storm, expensive) = if may_prioritise() { (3, 7) } else { (0, 0) };
    let (acme, bolt) = (site.connect("acme").await, site.connect("bolt").await);
    let pid = async |client: &Client| client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0);
    let (long, neighbour) = (pid(&acme).await, pid(&bolt).await);
    let usual = nice(long);

    let sleeping = tokio::spawn(async move {
        acme.batch_execute("SELECT count(*) FROM generate_series(1, 12000000)").await.unwrap();
        acme
    });
    eventually(async || nice(long) == usual + expensive).await;
    assert!(nice_of_session(long).is_none_or(|nice| nice == expensive), "inside its session it is alone");
    let slice = |pid| cofferdam_sched::scheduling(pid).unwrap().slice;
    let has_slices = expensive > 0 && slice(neighbour) > Duration::ZERO;
    assert!(!has_slices || slice(long) > slice(neighbour), "who wakes up takes the core from it at once");
    let lowered =
        format!("cofferdam_postgres_server_connections_lowered{{cluster=\"pg\"}} {}", i32::from(expensive > 0));
    assert!(site.metrics().await.contains(&lowered), "{lowered}");
    assert_eq!((pid(&bolt).await, nice(neighbour)), (neighbour, usual), "the neighbour's goes on as before");

    // What it does now is taken for expensive, until enough of it has been short.
    let acme = sleeping.await.unwrap();
    eventually(async || pid(&acme).await == long && nice(long) == usual).await;

    // A parallel query has others work for it.
    acme.batch_execute("CREATE TABLE many AS SELECT g FROM generate_series(1, 3000) g; ANALYZE many").await.unwrap();
    let sleeping = tokio::spawn(async move {
        let settings = "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0";
        acme.batch_execute(settings).await.unwrap();
        acme.batch_execute("SELECT count(*) FROM many, generate_series(1, 20000) WHERE g % 7 <> 3").await.unwrap();
    });
    let admin = site.cluster.admin("postgres").await.unwrap();
    let workers = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'parallel worker'";
    let is_lowered = |row: tokio_postgres::Row| nice(row.get(0)) == usual + expensive;
    eventually(async || admin.query(workers, &[]).await.unwrap().into_iter().any(is_lowered)).await;
    sleeping.await.unwrap();

    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..12 {
        let client = site.connect("acme").await;
        clients.spawn(async move { while client.batch_execute("SELECT 1").await.is_ok() {} });
    }
    let backends = "SELECT pid FROM pg_stat_activity WHERE datname = 'acme_db'";
    eventually(async || admin.query(backends, &[]).await.unwrap().iter().any(|row| nice(row.get(0)) == usual + storm))
        .await;
    assert_eq!((pid(&bolt).await, nice(neighbour)), (neighbour, usual), "the neighbour's goes on as before");
    clients.abort_all();
}

/// Where the server's processes can be seen, what computes waits for a core while another tenant has modest work.
#[tokio::test]
async fn what_computes_leaves_cores_alone_while_another_tenant_has_modest_work() {
    computing_waits_for_a_core(ONE_CORE, 1, "SELECT 1", "SELECT count(*) FROM generate_series(1, 3000000)").await;
}

/// The same of sessions that keep their connection, and of pieces too short to be looked at while they run.
#[tokio::test]
async fn what_computes_in_sessions_that_keep_their_connection_leaves_cores_alone_too() {
    let statement = "SELECT count(*) FROM generate_series(1, 300000)";
    computing_waits_for_a_core(ONE_CORE, 1, "CREATE TEMP TABLE mine (i int)", statement).await;
}

/// Nobody has to ask for it where the number of slots adapts: then the bound is the machine's cores.
#[tokio::test]
async fn what_computes_waits_for_the_machines_cores_without_priorities() {
    let cores = cofferdam_sched::cores().unwrap();
    if cores > 8 {
        eprintln!("SKIPPED: to keep more than {cores} cores busy would be in everybody's way");
        return;
    }
    let statement = "SELECT count(*) FROM generate_series(1, 3000000)";
    computing_waits_for_a_core("    min_slots: 63", cores, "SELECT 1", statement).await;
}

/// No priority is touched, and of however many cores one is left.
const ONE_CORE: &str = "    priorities: { storm: 0, expensive: 0, spare_cores: 1000 }";

async fn computing_waits_for_a_core(cluster: &str, cores: u32, first: &'static str, statement: &'static str) {
    let cluster = format!("    connections: 200\n{cluster}");
    let site = Site::start_with(SiteOptions { slots: 64, cluster, ..SiteOptions::default() }).await;
    let cores = i32::try_from(cores).unwrap();
    let admin = site.cluster.admin("postgres").await.unwrap();
    let running = async || {
        let sql = "SELECT count(*)::int FROM pg_stat_activity WHERE datname = 'acme_db' AND state = 'active'";
        admin.query_one(sql, &[]).await.unwrap().get::<_, i32>(0)
    };
    let mut work = tokio::task::JoinSet::new();
    for _ in 0..5 + cores {
        let client = site.connect("acme").await;
        client.batch_execute(first).await.unwrap();
        work.spawn(async move { while client.batch_execute(statement).await.is_ok() {} });
    }
    // With nobody else about, more than one computes at once.
    eventually(async || running().await > cores).await;
    let bolt = site.connect("bolt").await;
    work.spawn(async move { while bolt.batch_execute("SELECT 1").await.is_ok() {} });
    // Five more than may want to compute all the time, and when enough is known of them, never more than may do.
    eventually(async || {
        for _ in 0..10 {
            if running().await > cores {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        true
    })
    .await;
    let metrics = site.metrics().await;
    let busy = metrics.lines().find_map(|line| line.strip_prefix("cofferdam_gate_busy_cores{")).unwrap();
    assert!(busy.rsplit(' ').next().unwrap().parse::<f64>().unwrap() < f64::from(cores) + 1.0, "{busy}");
    work.abort_all();
}

/// Odoo, "PostgreSQL habits": two transactions at once per process (nesting). With one slot, held by the outer one, the
/// inner one would wait for ever for what only its own end can free.
#[tokio::test]
async fn a_transaction_inside_another_of_the_same_process_does_not_wait_for_it() {
    let quotas = "{ limit: 1, max_wait: 500ms }".to_owned();
    let site = Site::start_with(SiteOptions { slots: 1, quotas, ..SiteOptions::default() }).await;
    let outer = odoo_process(&site, 4711, "acme_db").await;
    let inner = odoo_process(&site, 4711, "acme_db").await;
    let other = odoo_process(&site, 4712, "acme_db").await;
    outer.batch_execute("BEGIN").await.unwrap();
    inner.batch_execute("BEGIN; SELECT 1; COMMIT").await.unwrap();
    let error = other.batch_execute("SELECT 1").await.unwrap_err();
    assert!(format!("{error:?}").contains("limit of 1"), "another process is no nested transaction: {error:?}");
    outer.batch_execute("COMMIT").await.unwrap();
    other.batch_execute("SELECT 1").await.unwrap();
}

/// Odoo, "PostgreSQL habits": only cron workers listen on `cron_trigger`, on database `postgres`. From then on what the
/// process does is background work.
#[tokio::test]
async fn a_process_that_waits_for_cron_triggers_does_background_work() {
    let quotas = "{ classes: { background: { limit: 1, queue: 0 } } }".to_owned();
    let site = Site::start_with(SiteOptions { quotas, ..SiteOptions::default() }).await;
    let mut jobs = Vec::new();
    for pid in [71, 72] {
        let trigger = odoo_process(&site, pid, "postgres").await;
        trigger.batch_execute("LISTEN cron_trigger").await.unwrap();
        jobs.push((trigger, odoo_process(&site, pid, "acme_db").await));
    }
    let web = odoo_process(&site, 80, "acme_db").await;
    // Every worker may wake cron up, and is no cron worker for that.
    let waker = odoo_process(&site, 80, "postgres").await;
    waker.batch_execute("SELECT pg_notify('cron_trigger', 'acme_db')").await.unwrap();
    waker.batch_execute("NOTIFY cron_trigger, 'acme_db'").await.unwrap();
    jobs[0].1.batch_execute("BEGIN").await.unwrap();
    let error = jobs[1].1.batch_execute("BEGIN").await.unwrap_err();
    assert!(format!("{error:?}").contains("for background work"), "{error:?}");
    web.batch_execute("BEGIN; COMMIT").await.unwrap();
}

/// Reservations as large as the least number of slots leave something for the others, also on a gate where nothing
/// has shown yet that more slots do no harm.
#[tokio::test]
async fn adaptive_slots_and_reservations_go_together() {
    let cluster = "    min_slots: 2\n    connections: 40".to_owned();
    let quotas = "{ reserved: 2 }".to_owned();
    let site = Site::start_with(SiteOptions { slots: 8, cluster, quotas, ..SiteOptions::default() }).await;
    let text = "tenant: free\ndatabase: bolt_db\nplacement: { cluster: pg }\nplan: free\nlogin: { role: bolt_role, password: bolt-secret }\n";
    site.directory.remove("bolt").unwrap();
    site.directory.tenant("free", text).unwrap();
    let main = std::fs::read_to_string(site.directory.path()).unwrap();
    site.directory.main(&main.replace("plans:\n", "plans:\n  free: {}\n")).unwrap();
    site.gateway.reload().await.unwrap();
    let port = site.address().port();
    let client = cofferdam_testkit::postgres::connect(port, "bolt_role", "bolt-secret", "bolt_db").await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), client.batch_execute("SELECT 1")).await.unwrap().unwrap();
}
