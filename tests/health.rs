//! Health, on real parts: what is broken is found, for the right reason, and for nobody else.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use cofferdam_health::alert::{AlertOptions, Alerts, Phase};
use cofferdam_health::config::Setup;
use cofferdam_health::engine::{Engine, EngineOptions, Hysteresis, Picture};
use cofferdam_health::model::{CheckId, Observation, Status, Subject, Topic};
use cofferdam_health::probe::{
    CertificateProbe, ClusterLimits, ClusterProbe, Database, DiskProbe, HttpProbe, LoginProbe, Probe, RedisProbe,
    RepositoryProbe, TenantLimits, TenantProbe, ThroughProbe, Tls, WebSocketProbe, conformance, look,
};
use cofferdam_health::sink::Sinks;
use cofferdam_health::{History, Observer, Watcher, explain, rules};
use cofferdam_tenant::{Secret, ServerTls, Source, TlsMode};
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions, USER};
use cofferdam_testkit::postgres::{Cluster, ClusterOptions, SUPERUSER};
use cofferdam_testkit::redis::Redis;
use cofferdam_testkit::tools::installed;
use cofferdam_tests::eventually;
use cofferdam_tests::house::blocking;
use jiff::Timestamp;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// The tables of Odoo's that health is read from.
const TABLES: &str = "
CREATE TABLE ir_module_module (id serial PRIMARY KEY, name text, state text);
INSERT INTO ir_module_module (name, state) VALUES ('base', 'installed'), ('sale', 'installed');
CREATE TABLE ir_cron (id serial PRIMARY KEY, cron_name text, active bool DEFAULT true,
    nextcall timestamp DEFAULT (now() AT TIME ZONE 'UTC' + interval '1 hour'), failure_count int DEFAULT 0, first_failure_date timestamp);
INSERT INTO ir_cron (cron_name) VALUES ('Mail: Email Queue Manager'), ('Procurement: run scheduler');
CREATE TABLE ir_cron_trigger (id serial PRIMARY KEY, cron_id int, call_at timestamp);
CREATE TABLE mail_mail (id serial PRIMARY KEY, state text, create_date timestamp DEFAULT (now() AT TIME ZONE 'UTC'));
CREATE TABLE queue_job (id serial PRIMARY KEY, state text, date_created timestamp DEFAULT (now() AT TIME ZONE 'UTC'),
    eta timestamp);
";

/// Who looks into tenants' databases, and may nothing else.
const WATCHER: (&str, &str) = ("watcher", "watcher-secret");

async fn watcher(cluster: &Cluster) {
    let admin = cluster.admin("postgres").await.unwrap();
    let create = format!("CREATE ROLE {} LOGIN PASSWORD '{}'", WATCHER.0, WATCHER.1);
    // By the first of the cluster's tenants.
    let _ = admin.batch_execute(&create).await;
}

async fn tenant(cluster: &Cluster, name: &str) {
    watcher(cluster).await;
    cluster.create_database(name, SUPERUSER.0).await.unwrap();
    let admin = cluster.admin(name).await.unwrap();
    admin.batch_execute(TABLES).await.unwrap();
    admin.batch_execute(GRANT).await.unwrap();
}

/// All that whoever looks may do.
const GRANT: &str = "GRANT SELECT ON ir_module_module, ir_cron, ir_cron_trigger, mail_mail, queue_job TO watcher";

fn server(cluster: &Cluster, database: &str) -> Database {
    Database {
        host: "127.0.0.1".into(),
        port: cluster.port(),
        user: SUPERUSER.0.into(),
        password: Some(Secret::new(SUPERUSER.1)),
        tls: None,
        database: database.into(),
    }
}

fn probe_of(cluster: &Cluster, tenant: &str) -> TenantProbe {
    let password = Some(Secret::new(WATCHER.1));
    let database = Database { user: WATCHER.0.into(), password, ..server(cluster, tenant) };
    TenantProbe::new(tenant, database, TenantLimits::default(), Duration::from_secs(30))
}

fn setup(text: &str) -> Setup {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("health.yaml");
    Setup::read(&Source::new(path, text), None, &Passwords).unwrap()
}

/// Files as they are.
struct Files;

impl cofferdam_tenant::Secrets for Files {
    fn file(&self, path: &Path) -> std::io::Result<String> {
        std::fs::read_to_string(path)
    }

    fn env(&self, _: &str) -> Option<String> {
        None
    }
}

struct Passwords;

impl cofferdam_tenant::Secrets for Passwords {
    fn env(&self, _: &str) -> Option<String> {
        Some(SUPERUSER.1.to_owned())
    }

    fn file(&self, _: &Path) -> Result<String, std::io::Error> {
        Ok(WATCHER.1.to_owned())
    }
}

fn cluster_entry(name: &str, cluster: &Cluster) -> String {
    format!(
        "  {name}: {{ host: 127.0.0.1, port: {}, user: {}, password_env: P, tenant_user: {}, tenant_password_file: f }}\n",
        cluster.port(),
        SUPERUSER.0,
        WATCHER.0
    )
}

async fn seen(watcher: &Watcher) -> Picture {
    watcher.look_once().await;
    watcher.picture(Timestamp::now())
}

fn status(picture: &Picture, check: &str) -> Status {
    picture.checks.get(check).unwrap_or_else(|| panic!("{check} is not among {:?}", picture.checks.keys())).status
}

/// Keys are derived once and kept: with each way to log in, and when the password changes.
#[test]
fn whoever_looks_logs_in_as_the_server_asks_and_with_the_password_that_holds_now() {
    runtime().block_on(async {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".into()]).unwrap().self_signed(&key).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let ca_file = directory.path().join("ca.pem");
        std::fs::write(&ca_file, certificate.pem()).unwrap();
        let encrypted = |mode| Tls::read(&ServerTls { mode, ca_file: Some(ca_file.clone()) }).unwrap();
        for auth in ["scram-sha-256", "md5", "password", "trust"] {
            let tls = Some((certificate.pem(), key.serialize_pem()));
            let cluster = Cluster::start_with(&ClusterOptions { auth, tls, ..ClusterOptions::default() }).unwrap();
            tenant(&cluster, "acme").await;
            let admin = cluster.admin("postgres").await.unwrap();
            let modes = [TlsMode::Disable, TlsMode::Prefer, TlsMode::Require, TlsMode::VerifyFull];
            for (n, password) in ["first-secret", "second-secret"].into_iter().enumerate() {
                admin.batch_execute(&format!("ALTER ROLE watcher PASSWORD '{password}'")).await.unwrap();
                for mode in modes {
                    let look = async |password: &str| {
                        let (password, tls) = (Some(Secret::new(password)), encrypted(mode));
                        let database = Database { user: WATCHER.0.into(), password, tls, ..server(&cluster, "acme") };
                        let probe =
                            TenantProbe::new("acme", database, TenantLimits::default(), Duration::from_secs(30));
                        probe.look(Timestamp::now()).await.swap_remove(0)
                    };
                    for _ in 0..2 {
                        let seen = look(password).await;
                        assert_eq!(seen.status, Status::Pass, "{auth} {mode:?} {n}: {}", seen.text);
                    }
                    let seen = look(if n == 0 { "wrong-secret" } else { "first-secret" }).await;
                    let refused = seen.text.contains("password authentication failed") && seen.text.contains("28P01");
                    assert_eq!(refused, auth != "trust", "{auth} {mode:?} {n}: {}", seen.text);
                }
            }
        }
    });
}

/// `reference`, Health: "`?db_server_status=1` only opens a connection to `postgres`: a broken tenant database still passes.
/// Probe the tenant's own database."
#[test]
fn a_tenant_whose_database_is_gone_fails_within_one_look_while_odoo_says_it_is_well() {
    runtime().block_on(async {
        let cluster = Cluster::start().unwrap();
        for name in ["acme", "beta"] {
            tenant(&cluster, name).await;
        }
        let odoo = MiniOdoo::start(OdooOptions::default()).await.unwrap();
        let text = format!(
            "clusters:\n{}tenants:\n  acme: {{ page: 'http://{2}/web/health?db_server_status=1', expect: pass }}\n  beta: {{}}\n\
             services: {{ payroll: {{ title: Payroll, tenants: [acme] }}, close: {{ title: Month-end close, tenants: [beta] }} }}\n{1}",
            cluster_entry("main", &cluster),
            "",
            odoo.http()
        );
        let setup = setup(&text);
        let watcher = setup.watcher(true);
        let picture = seen(&watcher).await;
        assert!(picture.causes().is_empty(), "{:?}", picture.causes());
        cluster.admin("postgres").await.unwrap().batch_execute("DROP DATABASE acme WITH (FORCE)").await.unwrap();
        let picture = seen(&watcher).await;
        assert_eq!(status(&picture, "tenant acme: page"), Status::Pass, "Odoo says that all is well");
        assert_eq!(status(&picture, "tenant acme: database"), Status::Fail);
        assert_eq!(picture.status_of(&Subject::Tenant("beta".into())), Status::Pass);
        assert_eq!(status(&picture, "cluster main: reachable"), Status::Pass);
        let lines = explain("acme", &picture, Timestamp::now());
        assert!(lines[1].contains("most likely because of tenant acme: database"), "{lines:#?}");
        assert!(lines[1].contains("database \"acme\" does not exist"), "{lines:#?}");
        let services = cofferdam_health::service::states(&setup.file.services, &picture);
        let states: Vec<_> = services.iter().map(|s| (s.title.as_str(), s.status)).collect();
        assert_eq!(states, [("Month-end close", Status::Pass), ("Payroll", Status::Fail)]);
        // A database that is there and empty is no better.
        cluster.create_database("acme", SUPERUSER.0).await.unwrap();
        let picture = seen(&watcher).await;
        assert!(picture.checks["tenant acme: database"].observation.text.contains("not Odoo's tables"));
    });
}

/// "Shared PostgreSQL stopped with 200 tenants: one alert, 200 inhibited; dedicated tenants pass; recovery within one
/// interval."
#[test]
fn two_hundred_tenants_of_a_server_that_stops_are_one_notice() {
    runtime().block_on(async {
        let (mut shared, dedicated) = (Cluster::start().unwrap(), Cluster::start().unwrap());
        tenant(&shared, "all").await;
        tenant(&dedicated, "big").await;
        let mut text = format!(
            "clusters:\n{}{}tenants:\n  big: {{ cluster: own }}\n",
            cluster_entry("main", &shared),
            cluster_entry("own", &dedicated)
        );
        for n in 0..200 {
            text.push_str(&format!("  t{n}: {{ cluster: main, database: all }}\n"));
        }
        let setup = setup(&text);
        let watcher = setup.watcher(true);
        let mut alerts = Alerts::new(AlertOptions { after: Duration::ZERO, ..AlertOptions::default() });
        let mut step = |picture: &Picture| {
            alerts.step(Timestamp::now(), picture, &std::collections::BTreeMap::new(), &setup.calendars)
        };
        assert_eq!(step(&seen(&watcher).await), []);
        shared.kill();
        let picture = seen(&watcher).await;
        let told = step(&picture);
        assert_eq!(told.len(), 1, "{told:#?}");
        assert_eq!((told[0].key.as_str(), told[0].phase), ("cluster main: reachable", Phase::Firing));
        // Their databases fail; what could not be looked at there is unknown, and because of the same.
        assert!(told[0].consequences >= 200, "{}", told[0].consequences);
        assert_eq!(picture.status_of(&Subject::Tenant("big".into())), Status::Pass);
        assert_eq!(picture.status_of(&Subject::Tenant("t7".into())), Status::Fail);
        shared.launch().unwrap();
        let picture = seen(&watcher).await;
        let told = step(&picture);
        assert_eq!(
            told.iter().map(|n| (n.key.as_str(), n.phase)).collect::<Vec<_>>(),
            [("cluster main: reachable", Phase::Resolved)]
        );
        assert!(picture.causes().is_empty(), "{:?}", picture.causes());
    });
}

#[test]
fn what_is_stuck_in_a_tenants_work_is_found_with_its_cause_and_text() {
    runtime().block_on(async {
        let cluster = Cluster::start().unwrap();
        tenant(&cluster, "acme").await;
        let client = cluster.admin("acme").await.unwrap();
        let probe = probe_of(&cluster, "acme");
        let all_pass = look(&probe, Timestamp::now()).await;
        assert!(all_pass.iter().all(|o| o.status == Status::Pass), "{all_pass:#?}");
        for (broken, mended, aspect, expected, words) in [
            (
                "UPDATE ir_cron SET nextcall = now() AT TIME ZONE 'UTC' - interval '2 hours' WHERE id = 2",
                "UPDATE ir_cron SET nextcall = now() AT TIME ZONE 'UTC' + interval '1 hour'",
                "cron",
                Status::Fail,
                "job `Procurement: run scheduler` should have run 2 h ago",
            ),
            (
                "UPDATE ir_cron SET failure_count = 3, first_failure_date = now() AT TIME ZONE 'UTC' - interval '1 day' WHERE id = 1",
                "UPDATE ir_cron SET failure_count = 0",
                "cron",
                Status::Warn,
                "job `Mail: Email Queue Manager` has failed 3 times in a row for 24 h",
            ),
            (
                "INSERT INTO queue_job (state, date_created) SELECT 'pending', now() AT TIME ZONE 'UTC' - interval '20 minutes' \
                 FROM generate_series(1, 500)",
                "DELETE FROM queue_job",
                "queue",
                Status::Warn,
                "500 jobs wait, the first for 20 min",
            ),
            (
                "INSERT INTO queue_job (state, date_created, eta) SELECT 'pending', now() AT TIME ZONE 'UTC' - interval '20 hours', \
                 now() AT TIME ZONE 'UTC' + make_interval(mins => 20 - 40 * n) FROM generate_series(0, 1) n",
                "DELETE FROM queue_job",
                "queue",
                Status::Warn,
                "1 jobs wait, the first for 20 min",
            ),
            (
                "INSERT INTO mail_mail (state, create_date) VALUES ('outgoing', now() AT TIME ZONE 'UTC' - interval '5 hours')",
                "DELETE FROM mail_mail",
                "mail",
                Status::Fail,
                "a mail waits, the first for 5 h",
            ),
            (
                "INSERT INTO mail_mail (state) SELECT 'exception' FROM generate_series(1, 300)",
                "DELETE FROM mail_mail",
                "mail",
                Status::Fail,
                "no mail waits; 300 have failed in a day",
            ),
            (
                "INSERT INTO queue_job (state) SELECT 'failed' FROM generate_series(1, 30)",
                "DELETE FROM queue_job",
                "queue",
                Status::Warn,
                "no job waits; 0 run, 30 have failed",
            ),
            (
                "ALTER TABLE queue_job ADD date_started timestamp; \
                 INSERT INTO queue_job (state, date_started) VALUES ('started', now() AT TIME ZONE 'UTC' - interval '9 days')",
                "DELETE FROM queue_job",
                "queue",
                Status::Warn,
                "a job has been running for 9 days",
            ),
            (
                "ALTER TABLE ir_cron ENABLE ROW LEVEL SECURITY",
                "ALTER TABLE ir_cron DISABLE ROW LEVEL SECURITY",
                "cron",
                Status::Unknown,
                "row-level security",
            ),
            (
                "ALTER TABLE ir_cron RENAME TO elsewhere",
                "ALTER TABLE elsewhere RENAME TO ir_cron",
                "cron",
                Status::Fail,
                "the table of scheduled jobs is missing",
            ),
            (
                "UPDATE ir_module_module SET state = 'to upgrade' WHERE name = 'sale'",
                "UPDATE ir_module_module SET state = 'installed'",
                "modules",
                Status::Fail,
                "a module waits to be changed (sale): until then no scheduled job runs",
            ),
        ] {
            client.batch_execute(broken).await.unwrap();
            let found = look(&probe, Timestamp::now()).await;
            for observation in &found {
                let wanted = if observation.check.aspect == aspect { expected } else { Status::Pass };
                assert_eq!(observation.status, wanted, "{broken}: {observation:#?}");
            }
            let one = found.iter().find(|o| o.check.aspect == aspect).unwrap();
            assert!(one.text.contains(words), "{}", one.text);
            client.batch_execute(mended).await.unwrap();
        }
        // Up to Odoo 15 it is a text when a mail is to go.
        let later = "ALTER TABLE mail_mail ADD scheduled_date varchar; INSERT INTO mail_mail (state, create_date, scheduled_date) \
                     SELECT 'outgoing', now() AT TIME ZONE 'UTC' - interval '9 hours', \
                       to_char(now() AT TIME ZONE 'UTC' + make_interval(hours => n), 'YYYY-MM-DD HH24:MI:SS') \
                     FROM unnest('{-1, 100}'::int[]) n";
        client.batch_execute(later).await.unwrap();
        let found = look(&probe, Timestamp::now()).await;
        let mail = found.iter().find(|o| o.check.aspect == "mail").unwrap();
        assert!(mail.status == Status::Warn && mail.text.contains("a mail waits, the first for 60 min"), "{mail:#?}");
        client.batch_execute("DELETE FROM mail_mail").await.unwrap();
        // One table that is held by somebody is no reason to say nothing of the others.
        let holder = cluster.admin("acme").await.unwrap();
        holder.batch_execute("BEGIN; LOCK TABLE mail_mail").await.unwrap();
        client.batch_execute("UPDATE ir_cron SET nextcall = now() AT TIME ZONE 'UTC' - interval '2 hours' WHERE id = 2").await.unwrap();
        let found = look(&probe, Timestamp::now()).await;
        for (aspect, expected) in [("database", Status::Pass), ("cron", Status::Fail), ("queue", Status::Pass)] {
            assert_eq!(found.iter().find(|o| o.check.aspect == aspect).unwrap().status, expected, "{found:#?}");
        }
        holder.batch_execute("ROLLBACK").await.unwrap();
        client.batch_execute("UPDATE ir_cron SET nextcall = now() AT TIME ZONE 'UTC' + interval '1 hour'").await.unwrap();
        // Odoo 16 knows no failures and has other columns; what is not installed is no trouble.
        client
            .batch_execute(
                "ALTER TABLE ir_cron DROP COLUMN failure_count, DROP COLUMN first_failure_date; DROP TABLE ir_cron_trigger, \
                 queue_job, mail_mail; ALTER TABLE ir_cron RENAME cron_name TO name",
            )
            .await
            .unwrap();
        let found = look(&probe, Timestamp::now()).await;
        assert!(found.iter().all(|o| o.status == Status::Pass), "{found:#?}");
    });
}

/// What a tenant has put into its database is read by a role that sees more than the tenant does.
#[test]
fn looking_at_a_tenant_runs_what_it_has_written_as_nobody_or_not_at_all() {
    runtime().block_on(async {
        let cluster = Cluster::start().unwrap();
        watcher(&cluster).await;
        cluster.create_role("acme", "secret").await.unwrap();
        cluster.create_database("acme", "acme").await.unwrap();
        let owner = cluster.connect("acme", "secret", "acme").await.unwrap();
        owner.batch_execute(TABLES).await.unwrap();
        owner.batch_execute(GRANT).await.unwrap();
        owner
            .batch_execute(
                "CREATE FUNCTION run() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'it ran as %', current_user; END $$;
                 CREATE TYPE odd AS (t text);
                 CREATE FUNCTION shown(odd) RETURNS text LANGUAGE sql VOLATILE AS 'SELECT public.run()';
                 CREATE FUNCTION as_json(odd) RETURNS json LANGUAGE sql VOLATILE AS 'SELECT to_json(public.run())';
                 CREATE CAST (odd AS text) WITH FUNCTION shown(odd) AS IMPLICIT;
                 CREATE CAST (odd AS json) WITH FUNCTION as_json(odd);
                 ALTER TABLE ir_cron ALTER cron_name TYPE odd USING ROW(cron_name)::odd;
                 ALTER TABLE queue_job ALTER state TYPE odd USING ROW(state)::odd;
                 INSERT INTO queue_job (state) VALUES (ROW('pending')::odd);
                 ALTER TABLE mail_mail RENAME TO hidden;
                 CREATE VIEW mail_mail AS SELECT h.* FROM hidden h WHERE public.run() = '';
                 GRANT SELECT ON mail_mail TO watcher;
                 CREATE FUNCTION held(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN true; END';
                 CREATE INDEX ON ir_module_module (id) WHERE held(1);
                 CREATE INDEX ON ir_cron (id) WHERE held(1);
                 CREATE STATISTICS s ON held(id), name FROM ir_module_module;
                 CREATE OR REPLACE FUNCTION held(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN public.run() = ''''; END';
                 ALTER DATABASE acme SET search_path = 'evil';
                 ALTER DATABASE acme SET statement_timeout = 1",
            )
            .await
            .unwrap();
        let found = look(&probe_of(&cluster, "acme"), Timestamp::now()).await;
        for observation in &found {
            let expected = match observation.check.aspect.as_str() {
                // A view, and a column that shows itself by a function of the tenant's.
                "mail" | "queue" => Status::Unknown,
                _ => Status::Pass,
            };
            assert_eq!(observation.status, expected, "{observation:#?}");
            assert!(!observation.text.contains("it ran"), "{observation:#?}");
        }
        let admin = cluster.admin("acme").await.unwrap();
        // Whoever can become somebody who may more is refused, and so is whoever can become a tenant.
        admin.batch_execute("SET statement_timeout = 0; CREATE ROLE boss SUPERUSER; CREATE ROLE readers").await.unwrap();
        for (role, passes) in [("boss", false), ("acme", false), ("readers", true)] {
            admin.batch_execute(&format!("GRANT {role} TO watcher")).await.unwrap();
            let found = look(&probe_of(&cluster, "acme"), Timestamp::now()).await;
            let refused = found[0].status == Status::Fail && found[0].text.contains("who may do or see more than a tenant");
            assert_eq!(refused, !passes, "{role}: {found:#?}");
            admin.batch_execute(&format!("REVOKE {role} FROM watcher")).await.unwrap();
        }
        // It is a good witness: whoever plans a query runs it.
        admin.batch_execute("SET statement_timeout = 0").await.unwrap();
        let planned = admin.query("SELECT count(*) FROM public.ir_module_module", &[]).await.unwrap_err();
        assert!(planned.as_db_error().unwrap().message().contains("it ran as"), "{planned}");
        let owner = cluster.connect("acme", "secret", "acme").await.unwrap();
        let alter = "SET statement_timeout = 0; SET search_path = public; DROP STATISTICS s; \
                     DROP INDEX ir_module_module_id_idx; ALTER TABLE ir_module_module ALTER state TYPE odd USING ROW(state)::odd";
        owner.batch_execute(alter).await.unwrap();
        let found = look(&probe_of(&cluster, "acme"), Timestamp::now()).await;
        let database = found.iter().find(|o| o.check.aspect == "database").unwrap();
        assert_eq!(database.status, Status::Fail, "{database:#?}");
        // Functions in indexes are evaluated when a query is planned: nobody who may more looks.
        for (grant, revoke) in [
            ("GRANT pg_monitor TO watcher", "REVOKE pg_monitor FROM watcher"),
            // Who reads everything reads what passwords are checked with.
            ("GRANT pg_read_all_data TO watcher", "REVOKE pg_read_all_data FROM watcher"),
            ("ALTER ROLE watcher CREATEROLE", "ALTER ROLE watcher NOCREATEROLE"),
        ] {
            admin.batch_execute(grant).await.unwrap();
            let found = look(&probe_of(&cluster, "acme"), Timestamp::now()).await;
            let database = found.iter().find(|o| o.check.aspect == "database").unwrap();
            assert!(database.status == Status::Fail && database.text.contains("not looked at"), "{database:#?}");
            admin.batch_execute(revoke).await.unwrap();
        }
    });
}

/// A function in an index can hold up whoever plans a query, also against the server's time limits; a value can be larger than
/// whoever reads it has room for.
#[test]
fn a_tenant_can_neither_hold_up_its_look_nor_fill_the_room_of_who_looks() {
    runtime().block_on(async {
        let cluster = Cluster::start().unwrap();
        tenant(&cluster, "acme").await;
        let admin = cluster.admin("acme").await.unwrap();
        // The index exists before the function is what it is: who makes it evaluates it too.
        admin
            .batch_execute(
                "CREATE FUNCTION held(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN true; END';
                 CREATE INDEX ON ir_module_module (id) WHERE held(1);
                 CREATE OR REPLACE FUNCTION held(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
                   LOOP BEGIN PERFORM pg_catalog.pg_sleep(600); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP;
                 END $$",
            )
            .await
            .unwrap();
        let probe = probe_of(&cluster, "acme");
        let found = look(&probe, Timestamp::now()).await;
        assert!(found.iter().all(|o| o.status == Status::Pass), "{found:#?}");
        let left = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'watcher'";
        eventually(async || admin.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0).await;
        admin
            .batch_execute("DROP INDEX ir_module_module_id_idx; INSERT INTO ir_module_module (name, state) VALUES (repeat('x', 8000000), 'installed')")
            .await
            .unwrap();
        let found = look(&probe, Timestamp::now()).await;
        let database = found.iter().find(|o| o.check.aspect == "database").unwrap();
        assert!(database.status == Status::Fail && database.text.contains("there is room for 1048576"), "{database:#?}");
    });
}

#[test]
fn a_cluster_tells_who_holds_it_up() {
    runtime().block_on(async {
        let cluster = Cluster::start().unwrap();
        tenant(&cluster, "acme").await;
        let standby = cluster.standby().unwrap();
        let limits =
            ClusterLimits { transaction: (0.5, 1.0), lock: (0.2, 0.5), lag: (0.3, 60.0), ..ClusterLimits::default() };
        let interval = Duration::from_secs(30);
        let probe = ClusterProbe::new("main", &server(&cluster, "postgres"), limits, interval);
        conformance::check(&probe, true).await.unwrap();
        let replica = ClusterProbe::new("standby", &server(&standby, "postgres"), limits, interval);
        conformance::check(&replica, true).await.unwrap();
        let (holder, waiter) = (cluster.admin("acme").await.unwrap(), cluster.admin("acme").await.unwrap());
        holder.batch_execute("BEGIN; LOCK ir_cron").await.unwrap();
        let waiting = tokio::spawn(async move { waiter.batch_execute("SELECT * FROM ir_cron").await });
        let paused = standby.admin("postgres").await.unwrap();
        paused.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
        cluster
            .admin("acme")
            .await
            .unwrap()
            .batch_execute("CREATE TABLE more AS SELECT generate_series(1, 9)")
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        let found = look(&probe, Timestamp::now()).await;
        let of = |aspect: &str| found.iter().find(|o| o.check.aspect == aspect).unwrap();
        assert_eq!(of("transactions").status, Status::Fail);
        assert!(of("transactions").text.contains("in acme"), "{}", of("transactions").text);
        assert_eq!(of("locks").status, Status::Fail);
        assert!(of("locks").text.starts_with("somebody in acme has waited"), "{}", of("locks").text);
        // A probe of the tenant meanwhile does not itself wait for the lock: it says what it cannot look at.
        let tenant = look(&probe_of(&cluster, "acme"), Timestamp::now()).await;
        let cron = tenant.iter().find(|o| o.check.aspect == "cron").unwrap();
        assert!(cron.status == Status::Unknown && cron.text.contains("lock timeout"), "{tenant:#?}");
        assert_eq!(tenant.iter().find(|o| o.check.aspect == "database").unwrap().status, Status::Pass, "{tenant:#?}");
        let behind = look(&replica, Timestamp::now()).await;
        let lag = behind.iter().find(|o| o.check.aspect == "replication").unwrap();
        assert_eq!(lag.status, Status::Warn, "{lag:#?}");
        assert!(lag.text.starts_with("this replica is"), "{}", lag.text);
        holder.batch_execute("ROLLBACK").await.unwrap();
        waiting.await.unwrap().unwrap();
        paused.batch_execute("SELECT pg_wal_replay_resume()").await.unwrap();
        drop((holder, standby));
        let gone = ClusterProbe::new("gone", &Database { port: 1, ..server(&cluster, "postgres") }, limits, interval);
        conformance::check(&gone, false).await.unwrap();
        conformance::check(&probe_of(&cluster, "nowhere"), false).await.unwrap();
        conformance::check(&probe_of(&cluster, "acme"), true).await.unwrap();
    });
}

#[test]
fn a_log_that_cannot_be_archived_is_found() {
    runtime().block_on(async {
        let settings =
            vec!["archive_mode = on".into(), "archive_command = 'false'".into(), "wal_level = replica".into()];
        let cluster = Cluster::start_with(&ClusterOptions { settings, ..ClusterOptions::default() }).unwrap();
        let admin = cluster.admin("postgres").await.unwrap();
        let limits = ClusterLimits::default();
        let probe = ClusterProbe::new("main", &server(&cluster, "postgres"), limits, Duration::from_secs(30));
        admin.batch_execute("CREATE TABLE t (i int); INSERT INTO t VALUES (1)").await.unwrap();
        admin.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        eventually(async || {
            let query = "SELECT last_failed_time IS NOT NULL FROM pg_stat_archiver";
            admin.query_one(query, &[]).await.unwrap().get::<_, bool>(0)
        })
        .await;
        let found = look(&probe, Timestamp::now()).await;
        let archive = found.iter().find(|o| o.check.aspect == "archive").unwrap();
        assert_eq!(archive.status, Status::Warn, "{archive:#?}");
        assert_eq!(archive.topic, Topic::RecoveryPoint);
        assert!(archive.text.contains("the log cannot be archived since"), "{}", archive.text);
        assert!(archive.text.contains("failed last"), "{}", archive.text);
    });
}

#[test]
fn a_log_whose_archiving_hangs_and_replicas_that_are_gone_are_found() {
    runtime().block_on(async {
        let settings =
            vec!["archive_mode = on".into(), "archive_command = 'sleep 600'".into(), "wal_level = replica".into()];
        let directory = tempfile::tempdir().unwrap();
        let cluster = Cluster::start_with(&ClusterOptions { settings, ..ClusterOptions::default() }).unwrap();
        let admin = cluster.admin("postgres").await.unwrap();
        let limits = ClusterLimits { archive: (0.5, 60.0), replicas: 1, ..ClusterLimits::default() };
        let probe = ClusterProbe::new("main", &server(&cluster, "postgres"), limits, Duration::from_secs(30));
        admin.batch_execute("CREATE TABLE t (i int); INSERT INTO t VALUES (1)").await.unwrap();
        admin.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        let mut found = Vec::new();
        eventually(async || {
            found = look(&probe, Timestamp::now()).await;
            found.iter().any(|o| o.check.aspect == "archive" && o.status == Status::Warn)
        })
        .await;
        let of = |aspect: &str| found.iter().find(|o| o.check.aspect == aspect).unwrap();
        assert!(of("archive").text.contains("`archive_command` hangs"), "{}", of("archive").text);
        assert_eq!(of("replication").status, Status::Fail);
        assert_eq!(of("replication").text, "0 replicas follow, and there should be 1");
        // Whoever takes the log without replaying it is no replica.
        let mut receiver = Command::new(cofferdam_testkit::postgres::binaries().unwrap().join("pg_receivewal"));
        receiver
            .args(["-h", "127.0.0.1", "-U", SUPERUSER.0, "-p", &cluster.port().to_string(), "-D"])
            .arg(directory.path());
        let _receiver = Stopped(receiver.env("PGPASSWORD", SUPERUSER.1).spawn().unwrap());
        let senders = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
        let admin = cluster.admin("postgres").await.unwrap();
        eventually(async || admin.query_one(senders, &[]).await.unwrap().get::<_, i64>(0) == 1).await;
        let found = look(&probe, Timestamp::now()).await;
        let replication = found.iter().find(|o| o.check.aspect == "replication").unwrap();
        assert_eq!(replication.text, "0 replicas follow, and there should be 1");
    });
}

#[test]
fn room_on_a_disk_and_a_repository_that_loses_things_are_seen() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let disk = |limits, path: &Path| DiskProbe::new("files", path.to_owned(), limits, Duration::from_secs(30));
        let full = look(&disk((0.0, 0.000_001), directory.path()), Timestamp::now()).await;
        assert!(full[0].status == Status::Fail && full[0].text.contains(" are free"), "{full:#?}");
        conformance::check(&disk((99.999, 100.0), directory.path()), true).await.unwrap();
        conformance::check(&disk((80.0, 92.0), &directory.path().join("nowhere")), false).await.unwrap();
        let config = format!(
            "repository: {{ directory: '{}/{{tenant}}', key: {{ env: '{{tenant}}' }} }}\nservers: {{ a: {{ host: h, user: u }} }}\n\
             filestores: /f\ntenants: {{ acme: {{}} }}\n",
            directory.path().join("repository").display()
        );
        let backups = cofferdam_backup::config::Setup::read(&Source::new("backup.yaml", config), None, &Passwords);
        let write_and_read = backups.unwrap().write_and_read().unwrap();
        let try_it = Arc::new(move || write_and_read().map_err(|error| error.to_string()));
        let probe = RepositoryProbe::new("backups", try_it, Duration::from_secs(300));
        conformance::check(&probe, true).await.unwrap();
        // Somebody has put a file where a directory was.
        std::fs::remove_dir_all(directory.path().join("repository")).unwrap();
        std::fs::write(directory.path().join("repository"), "").unwrap();
        conformance::check(&probe, false).await.unwrap();
        // What hangs is not started again and again: each would be a thread that is lost.
        let (started, hang) = (Arc::new(std::sync::atomic::AtomicUsize::new(0)), Arc::new(std::sync::Barrier::new(2)));
        let (count, barrier) = (Arc::clone(&started), Arc::clone(&hang));
        let hangs = move || {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            barrier.wait();
            Ok(())
        };
        let probe = RepositoryProbe::new("hangs", Arc::new(hangs), Duration::from_secs(300));
        for _ in 0..5 {
            let _ = tokio::time::timeout(Duration::from_millis(50), look(&probe, Timestamp::now())).await;
        }
        let found = look(&probe, Timestamp::now()).await;
        assert!(found[0].status == Status::Fail && found[0].text.contains("still hangs"), "{found:#?}");
        assert_eq!(started.load(std::sync::atomic::Ordering::SeqCst), 1);
        hang.wait();
    });
}

/// "History with bounded memory and optional PostgreSQL store."
#[test]
fn changes_are_kept_and_wait_for_a_database_that_is_away() {
    runtime().block_on(async {
        let mut cluster = Cluster::start().unwrap();
        cluster.create_database("health", SUPERUSER.0).await.unwrap();
        let history = History::new(server(&cluster, "health"), Duration::from_secs(30 * 86_400));
        let now: Timestamp = "2026-11-27T08:00:00Z".parse().unwrap();
        let mut engine = Engine::new(EngineOptions {
            hysteresis: Hysteresis { worse_after: 1, better_after: 1 },
            ..EngineOptions::default()
        });
        let mut seen = |tenant: &str, status: Status, hours: i64| {
            let check = CheckId::tenant(tenant, "database");
            let at = now + jiff::SignedDuration::from_hours(hours);
            let text = format!("it is {status}\0");
            engine.observe(Observation::pass(check, Topic::Availability, at, text).with(status));
            engine.take_news()
        };
        assert_eq!(seen("acme", Status::Pass, -900), [], "the first look is no change");
        let long_ago = seen("acme", Status::Fail, -800);
        assert_eq!(long_ago.len(), 1);
        history.keep(long_ago, now).await.unwrap();
        cluster.kill();
        seen("beta", Status::Pass, 0);
        let error = history.keep(seen("beta", Status::Warn, 1), now).await.unwrap_err();
        assert!(error.contains("1 changes are not kept yet"), "{error}");
        cluster.launch().unwrap();
        history.keep(seen("acme", Status::Pass, 2), now + jiff::SignedDuration::from_hours(48)).await.unwrap();
        // What is older than thirty days has gone meanwhile.
        let kept = history.since(None, Timestamp::UNIX_EPOCH, 10).await.unwrap();
        let kept: Vec<_> = kept.iter().map(|k| (k.check.to_string(), k.from.as_str(), k.to.as_str())).collect();
        let expected = [
            ("tenant acme: database".to_owned(), "fail", "pass"),
            ("tenant beta: database".to_owned(), "pass", "warn"),
        ];
        assert_eq!(kept, expected);
        let one = history.since(Some("beta"), now, 10).await.unwrap();
        assert_eq!(
            (one.len(), one[0].text.as_str(), one[0].at),
            (1, "it is warn ", now + jiff::SignedDuration::from_hours(1))
        );
        // A table of that name that somebody else has made is not written to: what stands on it would run as we.
        let admin = cluster.admin("health").await.unwrap();
        let theirs = "CREATE ROLE somebody; ALTER TABLE cofferdam_health_changes OWNER TO somebody; ALTER DATABASE health OWNER TO watcher; \
                      GRANT ALL ON cofferdam_health_changes TO watcher";
        watcher(&cluster).await;
        admin.batch_execute(theirs).await.unwrap();
        let ours = Database {
            user: WATCHER.0.into(),
            password: Some(Secret::new(WATCHER.1)),
            ..server(&cluster, "health")
        };
        let history = History::new(ours, Duration::from_secs(86_400));
        let error = history.keep(seen("beta", Status::Fail, 3), now).await.unwrap_err();
        assert!(error.contains("cofferdam_health_changes is somebody's"), "{error}");
    });
}

/// "Real query through and beside the gateway."
#[test]
fn a_gateway_that_lets_nobody_through_is_seen_while_the_database_is_well() {
    runtime().block_on(async {
        let site = cofferdam_tests::Site::start().await;
        let probe = |password: &str, port| ThroughProbe {
            tenant: "acme".into(),
            database: Database {
                user: "acme_role".into(),
                password: Some(Secret::new(password)),
                port,
                ..server(&site.cluster, "acme_db")
            },
            latency: 5.0,
            interval: Duration::from_secs(30),
        };
        conformance::check(&probe("acme-secret", site.address().port()), true).await.unwrap();
        conformance::check(&probe("wrong", site.address().port()), false).await.unwrap();
        conformance::check(&probe("acme-secret", 1), false).await.unwrap();
    });
}

#[test]
fn nobody_who_can_log_in_and_no_news_for_browsers_are_seen() {
    runtime().block_on(async {
        let databases = std::collections::HashMap::from([("acme.example.com".to_owned(), "acme".to_owned())]);
        let odoo = MiniOdoo::start(OdooOptions { databases, ..OdooOptions::default() }).await.unwrap();
        let url = "http://acme.example.com/web/login";
        let every = Duration::from_secs(300);
        let login = |password: &str| {
            let password = Secret::new(password);
            LoginProbe::new("acme", url, Some(odoo.http()), "acme", USER.0, password, every).unwrap()
        };
        conformance::check(&login(USER.1), true).await.unwrap();
        conformance::check(&login("wrong"), false).await.unwrap();
        let found = look(&login("wrong"), Timestamp::now()).await;
        assert!(found[0].text.contains("nobody can log in") && found[0].text.contains("Access Denied"), "{found:#?}");
        let websocket = |at| WebSocketProbe::new("acme", url, Some(at), every).unwrap();
        conformance::check(&websocket(odoo.gevent()), true).await.unwrap();
        // Where every worker answers, and none keeps a socket.
        conformance::check(&websocket(odoo.http()), false).await.unwrap();
        let found = look(&websocket(odoo.http()), Timestamp::now()).await;
        assert!(found[0].text.contains("answers 500 instead of 101"), "{found:#?}");
    });
}

#[test]
fn redis_that_throws_away_what_is_needed_is_found() {
    runtime().block_on(async {
        let Some(redis) = Redis::start(&["--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru"]).unwrap() else {
            eprintln!("skipped: Redis is not installed");
            return;
        };
        let probe = RedisProbe::new("sessions", "127.0.0.1", redis.port(), None, Duration::from_secs(30)).unwrap();
        conformance::check(&probe, true).await.unwrap();
        let before = look(&probe, Timestamp::now()).await;
        assert!(before.iter().all(|o| o.status == Status::Pass), "{before:#?}");
        let mut fill = String::new();
        for n in 0..3_000 {
            fill.push_str(&format!("SET session:{n} {}\r\n", "x".repeat(1_000)));
        }
        fill.push_str("QUIT\r\n");
        let port = redis.port();
        tokio::task::spawn_blocking(move || {
            use std::io::{Read, Write};
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
            let mut reader = stream.try_clone().unwrap();
            let drain = std::thread::spawn(move || reader.read_to_end(&mut Vec::new()));
            stream.write_all(fill.as_bytes()).unwrap();
            drain.join().unwrap().unwrap();
        })
        .await
        .unwrap();
        let found = look(&probe, Timestamp::now()).await;
        let evictions = found.iter().find(|o| o.check.aspect == "evictions").unwrap();
        assert_eq!(evictions.status, Status::Fail);
        assert!(evictions.text.contains("keys were thrown away since the last look"), "{}", evictions.text);
        let after = look(&probe, Timestamp::now()).await;
        let evictions = after.iter().find(|o| o.check.aspect == "evictions").unwrap();
        assert_eq!(evictions.status, Status::Pass, "only what is new counts");
        drop(redis);
        conformance::check(&probe, false).await.unwrap();
    });
}

#[test]
fn a_certificate_that_ends_soon_or_is_anothers_is_found() {
    runtime().block_on(async {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters =
            rcgen::CertificateParams::new(vec!["acme.example.com".into(), "*.shop.example".into()]).unwrap();
        let now = SystemTime::now();
        parameters.not_before = (now - Duration::from_secs(86_400)).into();
        parameters.not_after = (now + Duration::from_secs(5 * 86_400 + 3_600)).into();
        let certificate = parameters.self_signed(&key).unwrap();
        let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                tokio::spawn(async move { acceptor.accept(tcp).await.map(drop) });
            }
        });
        let probe = |host: &str| CertificateProbe {
            tenant: "acme".into(),
            host: host.into(),
            connect: address.to_string(),
            limits: (21.0, 7.0),
            interval: Duration::from_secs(300),
        };
        for (host, expected, words) in [
            ("acme.example.com", Status::Fail, "is good for 5 days more"),
            ("a.shop.example", Status::Fail, "is good for 5 days more"),
            ("beta.example.com", Status::Fail, "not for beta.example.com"),
        ] {
            let found = look(&probe(host), Timestamp::now()).await;
            assert_eq!(found[0].status, expected);
            assert!(found[0].text.contains(words), "{}", found[0].text);
        }
        let later = CertificateProbe { limits: (21.0, 3.0), ..probe("acme.example.com") };
        assert_eq!(look(&later, Timestamp::now()).await[0].status, Status::Warn);
        // That nobody shows one says nothing of it, and is nobody's certificate that has ended.
        let nobody = CertificateProbe { connect: "127.0.0.1:1".into(), ..probe("acme.example.com") };
        let found = look(&nobody, Timestamp::now()).await;
        assert_eq!((found[0].status, found[0].topic), (Status::Unknown, Topic::Security));
        // A browser would not take it either: nobody here trusts who has signed it.
        let url = format!("https://acme.example.com:{}/web/login", address.port());
        let page = HttpProbe::new("acme", &url, Some(address), None, (2.0, 10.0), Duration::from_secs(30)).unwrap();
        let found = look(&page, Timestamp::now()).await;
        assert_eq!(found[0].status, Status::Fail);
        assert!(found[0].text.to_lowercase().contains("certificate"), "{}", found[0].text);
    });
}

#[test]
fn backups_that_are_missing_stale_or_cannot_be_restored_are_found() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("backup.prom");
        let tenants = ["acme", "beta", "core"].map(str::to_owned).to_vec();
        let (stale_after, drill_age) = (Duration::from_secs(120), (40.0 * 86_400.0, 100.0 * 86_400.0));
        let interval = Duration::from_secs(30);
        let probe = cofferdam_health::probe::BackupsProbe::new(file.clone(), tenants, stale_after, drill_age, interval);
        conformance::check(&probe, false).await.unwrap();
        let metrics = "cofferdam_backup_rpo_seconds{tenant=\"acme\"} 0\n\
             cofferdam_backup_rpo_objective_seconds{tenant=\"acme\"} 86400\n\
             cofferdam_drill_passed{tenant=\"acme\"} 1\ncofferdam_drill_age_seconds{tenant=\"acme\"} 4320000\n\
             cofferdam_backup_rpo_seconds{tenant=\"beta\"} 100000\ncofferdam_backup_rpo_objective_seconds{tenant=\"beta\"} 86400\n\
             cofferdam_backup_failures{tenant=\"beta\"} 3\ncofferdam_drill_passed{tenant=\"beta\"} 0\n";
        std::fs::write(&file, metrics).unwrap();
        conformance::check(&probe, true).await.unwrap();
        let found = look(&probe, Timestamp::now()).await;
        let of = |check: &str| found.iter().find(|o| o.check.to_string() == check).unwrap();
        for (check, expected, words) in [
            ("tenant acme: backup", Status::Pass, "everything is saved"),
            ("tenant acme: drill", Status::Warn, "a restore was tried 50 days ago and was good"),
            ("tenant beta: backup", Status::Fail, "28 h of work would be; at most 24 h are allowed; the last 3 backups have failed"),
            ("tenant beta: drill", Status::Fail, "FAILED"),
            ("tenant core: backup", Status::Fail, "does not know this tenant"),
            ("tenant core: drill", Status::Warn, "nobody has ever tried"),
        ] {
            assert_eq!(of(check).status, expected, "{check}");
            assert!(of(check).text.contains(words), "{}", of(check).text);
        }
        let old = SystemTime::now() - Duration::from_secs(600);
        std::fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
        let found = look(&probe, Timestamp::now()).await;
        assert!(found[0].text.contains("no backups are made"), "{found:#?}");
    });
}

/// Whoever is started anew tells nothing twice and of every end, and a month's budget is a month's.
#[test]
fn what_was_told_and_counted_outlives_a_watch() {
    runtime().block_on(async {
        let cluster = Cluster::start().unwrap();
        tenant(&cluster, "acme").await;
        let directory = tempfile::tempdir().unwrap();
        let text = format!(
            "interval: 1s\nstate_directory: {}\nclusters:\n{}tenants:\n  acme: {{}}\nnotices: {{ after: 1s }}\n",
            directory.path().join("state").display(),
            cluster_entry("main", &cluster)
        );
        let stop = tokio_util::sync::CancellationToken::new();
        let told = Mutex::new(Vec::new());
        let step = async |observer: &Observer| {
            let step = observer.step().await;
            assert_eq!(step.problems, Vec::<String>::new());
            let notices = step.notices.into_iter().filter(|notice| notice.key == "tenant acme: database");
            told.lock().unwrap().extend(notices.map(|notice| notice.phase));
        };
        let bad = |observer: &Observer| {
            let looks = "cofferdam_health_looks_total{tenant=\"acme\",objective=\"availability\",result=\"bad\"} ";
            let number = observer.metrics().lines().find_map(|line| line.strip_prefix(looks)?.parse::<u32>().ok());
            number.unwrap_or_default()
        };
        let left = |observer: &Observer| {
            let left = "cofferdam_health_budget_left{tenant=\"acme\",objective=\"availability\"} ";
            observer.metrics().lines().find_map(|line| line.strip_prefix(left)?.parse::<f64>().ok())
        };
        let observer = Observer::start(setup(&text), &stop).unwrap();
        let admin = cluster.admin("postgres").await.unwrap();
        admin.batch_execute("ALTER DATABASE acme RENAME TO elsewhere").await.unwrap();
        eventually(async || {
            step(&observer).await;
            bad(&observer) >= 4 && !told.lock().unwrap().is_empty()
        })
        .await;
        step(&observer).await;
        observer.close().await.unwrap();
        let before = left(&observer).unwrap();
        assert!(before < 1.0);
        stop.cancel();
        drop(observer);
        // It goes on, and nobody is told again.
        let stop = tokio_util::sync::CancellationToken::new();
        let observer = Observer::start(setup(&text), &stop).unwrap();
        step(&observer).await;
        // Counters begin at nought, as everywhere; what is left does not.
        assert_eq!((left(&observer), bad(&observer)), (Some(before), 0));
        eventually(async || {
            step(&observer).await;
            bad(&observer) >= 4
        })
        .await;
        stop.cancel();
        drop(observer);
        // It ends while nobody looks.
        admin.batch_execute("ALTER DATABASE elsewhere RENAME TO acme").await.unwrap();
        let stop = tokio_util::sync::CancellationToken::new();
        let observer = Observer::start(setup(&text), &stop).unwrap();
        eventually(async || {
            step(&observer).await;
            told.lock().unwrap().len() >= 2
        })
        .await;
        assert_eq!(*told.lock().unwrap(), [Phase::Firing, Phase::Resolved]);
        stop.cancel();
        drop(observer);
        let stop = tokio_util::sync::CancellationToken::new();
        // What cannot be read is told.
        for name in ["told.json", "looks.json"] {
            std::fs::write(directory.path().join("state").join(name), "{").unwrap();
        }
        let observer = Observer::start(setup(&text), &stop).unwrap();
        let problems = observer.step().await.problems;
        assert!(problems.len() == 2 && problems[1].contains("looks.broken now"), "{problems:?}");
    });
}

/// "Sinks: webhook, Alertmanager API; deduplicated, …, resolved notices."
#[test]
fn notices_reach_a_webhook_and_alertmanager_and_wait_for_one_that_does_not_answer() {
    runtime().block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (send, mut posts) = tokio::sync::mpsc::unbounded_channel::<(String, serde_json::Value)>();
        let broken = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let is_broken = Arc::clone(&broken);
        tokio::spawn(async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            loop {
                let (mut tcp, _) = listener.accept().await.unwrap();
                let (send, is_broken) = (send.clone(), Arc::clone(&is_broken));
                tokio::spawn(async move {
                    let mut text = String::new();
                    let mut buffer = vec![0; 64 << 10];
                    let (head, body) = loop {
                        let read = tcp.read(&mut buffer).await.unwrap();
                        text.push_str(&String::from_utf8_lossy(&buffer[..read]));
                        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                        let length = head.to_ascii_lowercase();
                        let length = length.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
                        if body.len() >= length.parse::<usize>().unwrap() {
                            break (head.to_owned(), body.to_owned());
                        }
                    };
                    let path = head.split(' ').nth(1).unwrap().to_owned();
                    let bad = is_broken.load(std::sync::atomic::Ordering::SeqCst);
                    let status = if bad { "500 Internal Server Error" } else { "200 OK" };
                    if !bad {
                        send.send((path, serde_json::from_str(&body).unwrap())).unwrap();
                    }
                    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                    tcp.write_all(answer.as_bytes()).await.unwrap();
                });
            }
        });
        let webhook = format!("http://{address}/hook?token=secret");
        let mut sinks = Sinks::new(Some(&webhook), Some(&format!("http://{address}/"))).unwrap();
        let check = CheckId::tenant("acme", "database");
        let notice = |phase| cofferdam_health::alert::Notice {
            key: check.to_string(),
            phase,
            urgency: cofferdam_health::slo::Urgency::Page,
            check: check.clone(),
            topic: Topic::Availability,
            summary: "it is gone".into(),
            since: Timestamp::UNIX_EPOCH,
            consequences: 4,
        };
        let problems = sinks.send(&[notice(Phase::Firing)]).await;
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems.iter().all(|problem| problem.contains("500") && !problem.contains("secret")), "{problems:?}");
        broken.store(false, std::sync::atomic::Ordering::SeqCst);
        assert_eq!(sinks.send(&[notice(Phase::Resolved)]).await, Vec::<String>::new());
        let mut both = [posts.recv().await.unwrap(), posts.recv().await.unwrap()];
        both.sort_by(|a, b| b.0.cmp(&a.0));
        let [(path, body), alerts] = both;
        assert_eq!(path, "/hook?token=secret");
        let phases: Vec<_> = body["notices"].as_array().unwrap().iter().map(|n| n["phase"].as_str().unwrap()).collect();
        assert_eq!(phases, ["firing", "resolved"], "what could not be sent waited, in its order");
        let (path, body) = alerts;
        assert_eq!(path, "/api/v2/alerts");
        assert_eq!(body[0]["labels"]["tenant"], "acme");
        assert!(body[0].get("endsAt").is_none() && body[1].get("endsAt").is_some(), "{body}");
        assert_eq!(body[0]["labels"], body[1]["labels"], "Alertmanager knows an alert by its labels");
        // Nothing to say: nothing is sent. What is open is said to Alertmanager again.
        assert_eq!(sinks.send(&[]).await, Vec::<String>::new());
        assert_eq!(sinks.refresh(&[&notice(Phase::Firing)]).await, Vec::<String>::new());
        assert_eq!(posts.recv().await.unwrap().0, "/api/v2/alerts");
        assert!(posts.try_recv().is_err());
    });
}

/// What is refused once is refused always: it must not keep back what comes after it.
#[test]
fn notices_that_are_refused_keep_nothing_back_and_those_by_e_mail_arrive() {
    runtime().block_on(async {
        use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
        let check = CheckId::tenant("acme", "database");
        let notice = |phase, summary: &str| cofferdam_health::alert::Notice {
            key: check.to_string(),
            phase,
            urgency: cofferdam_health::slo::Urgency::Page,
            check: check.clone(),
            topic: Topic::Availability,
            summary: summary.into(),
            since: Timestamp::UNIX_EPOCH,
            consequences: 0,
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let webhook = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            for status in ["413 Content Too Large", "200 OK"] {
                let (mut tcp, _) = listener.accept().await.unwrap();
                assert!(tcp.read(&mut vec![0; 64 << 10]).await.unwrap() > 0);
                let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                tcp.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        // Somebody who sends us elsewhere has taken nothing, whatever is said there.
        let elsewhere = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = elsewhere.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut tcp, _) = elsewhere.accept().await.unwrap();
            assert!(tcp.read(&mut vec![0; 64 << 10]).await.unwrap() > 0);
            let answer = format!("HTTP/1.1 302 Found\r\nLocation: http://{at}/login\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            tcp.write_all(answer.as_bytes()).await.unwrap();
        });
        let problems = Sinks::new(Some(&format!("http://{at}/hook")), None).unwrap().send(&[notice(Phase::Firing, "x")]).await;
        assert!(problems[0].contains("1 notices were not sent yet: it answers 302"), "{problems:?}");
        let mut sinks = Sinks::new(Some(&webhook), None).unwrap();
        let problems = sinks.send(&[notice(Phase::Firing, "too much")]).await;
        assert_eq!(problems, ["webhook: 1 notices were refused, and are lost: it answers 413"]);
        assert_eq!(sinks.send(&[notice(Phase::Resolved, "over")]).await, Vec::<String>::new());

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let mut letters = Vec::new();
            for _ in 0..2 {
                let (tcp, _) = listener.accept().await.unwrap();
                let (reader, mut writer) = tcp.into_split();
                let mut lines = BufReader::new(reader).lines();
                writer.write_all(b"220 mail.example.com ESMTP\r\n").await.unwrap();
                let (mut letter, mut in_letter) = (String::new(), false);
                while let Some(line) = lines.next_line().await.unwrap() {
                    if in_letter && line != "." {
                        letter.push_str(&line);
                        letter.push('\n');
                        continue;
                    }
                    let word = line.split(' ').next().unwrap().to_ascii_uppercase();
                    let answer = match word.as_str() {
                        "DATA" => {
                            in_letter = true;
                            "354 go on"
                        }
                        "RCPT" if line.contains("night@") => "550 no such user",
                        "QUIT" => "221 bye",
                        _ => {
                            in_letter = false;
                            "250 ok"
                        }
                    };
                    writer.write_all(format!("{answer}\r\n").as_bytes()).await.unwrap();
                    if word == "QUIT" {
                        break;
                    }
                }
                letters.push(letter);
            }
            letters
        });
        let text = format!(
            "redis: {{ r: {{ host: 127.0.0.1 }} }}\nnotices:\n  email: {{ server: 127.0.0.1, port: {port}, encryption: none, \
             from: 'Cofferdam <health@example.com>', to: ['Operations <ops@example.com>', night@example.com] }}\n"
        );
        let mut sinks = setup(&text).sinks().unwrap();
        let both = [notice(Phase::Firing, "it is gone"), notice(Phase::Resolved, "it is back\nBcc: evil@example.com")];
        // That one of them is not here any more is no reason to tell nobody.
        let problems = sinks.send(&both).await;
        assert_eq!(problems, ["e-mail to night@example.com: 2 notices were refused, and are lost: permanent error (550): no such user"]);
        assert_eq!(sinks.send(&[]).await, Vec::<String>::new(), "it is not tried again");
        // A mail server that takes the connection and says nothing holds up no step for long.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let text = format!(
            "redis: {{ r: {{ host: 127.0.0.1, port: 1 }} }}\ninterval: 1s\nnotices:\n  after: 1s\n  email: {{ server: 127.0.0.1, port: {}, \
             encryption: none, from: a@example.com, to: [b@example.com] }}\n",
            silent.local_addr().unwrap().port()
        );
        let stop = tokio_util::sync::CancellationToken::new();
        let observer = Observer::start(setup(&text), &stop).unwrap();
        eventually(async || !observer.step().await.notices.is_empty()).await;
        let step = tokio::time::timeout(Duration::from_secs(15), observer.step()).await;
        assert!(step.is_ok(), "a step waits for the mail server");
        stop.cancel();
        let letters = server.await.unwrap();
        let letters: Vec<String> = letters.into_iter().filter(|letter| !letter.is_empty()).collect();
        assert_eq!(letters.len(), 1);
        for expected in [
            "Subject: 1 troubles begin, 1 are over, first tenant acme: database",
            "From: Cofferdam <health@example.com>",
            "To: Operations <ops@example.com>, night@example.com",
            "TROUBLE, since 1970-01-01 00:00 UTC: it is gone",
            "over, since 1970-01-01 00:00 UTC: it is back",
        ] {
            assert!(letters[0].contains(expected), "{expected}: {}", letters[0]);
        }
        let head = letters[0].split("\n\n").next().unwrap();
        assert!(!head.contains("Bcc"), "what a tenant has written is no header: {head}");
    });
}

/// What a program prints, line by line, until one has a word in it; the rest of that line. The program goes on.
fn until_it_says(child: &mut std::process::Child, word: &str) -> String {
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    let line = lines.by_ref().map(Result::unwrap).find(|line| line.contains(word)).unwrap();
    // Nobody may stop because nobody reads.
    std::thread::spawn(move || lines.for_each(drop));
    line.split_once(word).unwrap().1.to_owned()
}

struct Stopped(std::process::Child);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// "Alertmanager time intervals … from the catalog", "Alertmanager API": Alertmanager itself takes both.
#[test]
fn alertmanager_shows_what_is_open_and_mutes_what_our_calendar_says() {
    let (Some(alertmanager), Some(amtool)) = (installed("prometheus-alertmanager"), installed("amtool")) else {
        eprintln!("skipped: Alertmanager is not installed");
        return;
    };
    runtime().block_on(async {
        let receiver = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let hook = receiver.local_addr().unwrap();
        let told = Arc::new(Mutex::new(Vec::<String>::new()));
        let all = Arc::clone(&told);
        tokio::spawn(async move {
            use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
            while let Ok((tcp, _)) = receiver.accept().await {
                let all = Arc::clone(&all);
                tokio::spawn(async move {
                    let mut tcp = BufReader::new(tcp);
                    let (mut length, mut line) = (0, String::new());
                    while tcp.read_line(&mut line).await.unwrap() > 2 {
                        if let Some(value) = line.strip_prefix("Content-Length: ") {
                            length = value.trim().parse().unwrap();
                        }
                        line.clear();
                    }
                    let mut body = vec![0; length];
                    tcp.read_exact(&mut body).await.unwrap();
                    let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
                    for alert in body["alerts"].as_array().unwrap() {
                        let text = |v: &serde_json::Value| v.as_str().unwrap_or_default().to_owned();
                        all.lock().unwrap().push(format!("{} {}", text(&alert["labels"]["topic"]), text(&alert["status"])));
                    }
                    tcp.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await.unwrap();
                });
            }
        });
        // An event that is today and one that never is.
        let directory = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        let today = now.to_zoned(jiff::tz::TimeZone::UTC).date();
        let config = serde_json::json!({
            "time_zone": "UTC",
            "events": [
                { "name": "payroll", "kind": "payroll", "days": [today.to_string(), today.tomorrow().unwrap().to_string()] },
                { "name": "tender", "kind": "tender", "days": ["2020-01-01"] },
            ],
        });
        let calendar = cofferdam_tenant::calendar::Calendar::new(&serde_json::from_value(config).unwrap()).unwrap();
        let calendars = std::collections::BTreeMap::from([("de".to_owned(), Arc::new(calendar))]);
        let midnight = now.to_zoned(jiff::tz::TimeZone::UTC).start_of_day().unwrap().timestamp();
        let intervals = rules::alertmanager_intervals(&calendars, midnight);
        let text = format!(
            "route:\n  receiver: hook\n  group_by: ['...']\n  group_wait: 0s\n  group_interval: 1s\n  routes:\n  \
             - {{ matchers: ['topic=\"latency\"'], receiver: hook, mute_time_intervals: ['de: payroll'] }}\n  \
             - {{ matchers: ['topic=\"availability\"'], receiver: hook, mute_time_intervals: ['de: tender'] }}\n\
             receivers:\n- name: hook\n  webhook_configs: [{{ url: 'http://{hook}/' }}]\n{intervals}"
        );
        let file = directory.path().join("alertmanager.yml");
        std::fs::write(&file, text).unwrap();
        let checked = Command::new(&amtool).arg("check-config").arg(&file).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));

        let mut command = Command::new(&alertmanager);
        command.args(["--web.listen-address=127.0.0.1:0", "--cluster.listen-address="]);
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.path={}", directory.path().join("data").display()));
        command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        let mut server = Stopped(command.spawn().unwrap());
        let said = blocking(move || {
            let said = until_it_says(&mut server.0, " address=127.0.0.1:");
            (server, said)
        });
        let (_server, said) = said.await;
        let address = format!("127.0.0.1:{}", said.split_whitespace().next().unwrap());

        let notice = |topic, phase| cofferdam_health::alert::Notice {
            key: format!("{topic:?}"),
            phase,
            urgency: cofferdam_health::slo::Urgency::Page,
            check: CheckId::tenant("acme", "database"),
            topic,
            summary: "it is \"gone\"\n".into(),
            since: now,
            consequences: 0,
        };
        let both = |phase| [Topic::Latency, Topic::Availability].map(|topic| notice(topic, phase));
        let mut sinks = Sinks::new(None, Some(&format!("http://{address}"))).unwrap();
        eventually(async || sinks.send(&both(Phase::Firing)).await.is_empty()).await;
        let open = || {
            let out = Command::new(&amtool).args(["alert", "query", "--output=json"])
                .arg(format!("--alertmanager.url=http://{address}")).output().unwrap();
            let alerts: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            alerts.as_array().unwrap().len()
        };
        eventually(async || open() == 2).await;
        eventually(async || told.lock().unwrap().contains(&"availability firing".to_owned())).await;
        // Again, as every minute: nothing new.
        let firing = both(Phase::Firing);
        assert_eq!(sinks.refresh(&firing.iter().collect::<Vec<_>>()).await, Vec::<String>::new());
        assert_eq!(open(), 2);
        assert_eq!(sinks.send(&both(Phase::Resolved)).await, Vec::<String>::new());
        eventually(async || open() == 0).await;
        eventually(async || told.lock().unwrap().contains(&"availability resolved".to_owned())).await;
        assert_eq!(*told.lock().unwrap(), ["availability firing", "availability resolved"], "payroll is muted");
    });
}

/// A mail server of one's own, whose certificate nobody else has signed.
#[test]
fn letters_go_by_starttls_to_a_server_that_is_checked_and_by_nothing_less() {
    let Some(python) = installed("aiosmtpd").map(|path| path.with_file_name("python")) else {
        eprintln!("skipped: aiosmtpd is not installed");
        return;
    };
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let authority = || {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
            parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            (parameters.self_signed(&key).unwrap().pem(), rcgen::Issuer::new(parameters, key))
        };
        let ((ours, issuer), (others, _)) = (authority(), authority());
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = parameters.signed_by(&key, &issuer).unwrap();
        for (name, text) in [("ca.pem", ours), ("others.pem", others), ("key.pem", key.serialize_pem()), ("cert.pem", certificate.pem()), ("password", "sesame".into())] {
            std::fs::write(at(name), text).unwrap();
        }
        let program = r#"
import asyncio, ssl, sys
from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword
class Handler:
    async def handle_DATA(self, server, session, envelope):
        print("LETTER", session.ssl is not None, session.auth_data and session.auth_data.password.decode(), envelope.rcpt_tos, envelope.content.decode().splitlines(), file=sys.stderr, flush=True)
        return "250 OK"
def authenticate(server, session, envelope, mechanism, data):
    return AuthResult(success=isinstance(data, LoginPassword) and data.password == b"sesame", auth_data=data)
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain("cert.pem", "key.pem")
async def main():
    make = lambda tls: lambda: SMTP(Handler(), hostname="localhost", tls_context=context if tls else None, require_starttls=tls, auth_required=tls, authenticator=authenticate)
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(make(tls), "127.0.0.1", 0) for tls in (True, False)]
    print("PORTS", *(s.sockets[0].getsockname()[1] for s in servers), file=sys.stderr, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"#;
        let mut command = Command::new(&python);
        command.args(["-c", program]).current_dir(directory.path());
        command.stderr(std::process::Stdio::piped()).stdin(std::process::Stdio::null());
        let mut server = Stopped(command.spawn().unwrap());
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(server.0.stderr.take().unwrap()));
        let ports: Vec<u16> = loop {
            let line = lines.next().unwrap().unwrap();
            if let Some(ports) = line.strip_prefix("PORTS ") {
                break ports.split(' ').map(|port| port.parse().unwrap()).collect();
            }
        };
        let notice = cofferdam_health::alert::Notice {
            key: "k".into(),
            phase: Phase::Firing,
            urgency: cofferdam_health::slo::Urgency::Page,
            check: CheckId::tenant("acme", "database"),
            topic: Topic::Availability,
            summary: "it is gone".into(),
            since: Timestamp::UNIX_EPOCH,
            consequences: 0,
        };
        let send = async |port: u16, authority: &str| {
            let text = format!(
                "redis: {{ r: {{ host: 127.0.0.1 }} }}\nnotices:\n  email: {{ server: localhost, port: {port}, user: us, \
                 password_file: '{}', ca_file: '{}', from: health@example.com, to: [ops@example.com] }}\n",
                at("password").display(), at(authority).display()
            );
            let source = Source::new(at("health.yaml"), text);
            Setup::read(&source, None, &Files).unwrap().sinks().unwrap().send(std::slice::from_ref(&notice)).await
        };
        assert_eq!(send(ports[0], "ca.pem").await, Vec::<String>::new());
        let letter = lines.find_map(|line| line.unwrap().strip_prefix("LETTER ").map(str::to_owned)).unwrap();
        assert!(letter.starts_with("True sesame ['ops@example.com'] ") && letter.contains("it is gone"), "{letter}");
        // Of a server that somebody else vouches for, and of one that does not encrypt, the password is not seen.
        let problems = send(ports[0], "others.pem").await;
        assert!(problems[0].contains("certificate"), "{problems:?}");
        let problems = send(ports[1], "ca.pem").await;
        assert!(problems[0].contains("e-mail to ops@example.com: 1 notices were not sent yet"), "{problems:?}");
    });
}

/// "`promtool check rules` and `promtool test rules` pass with unit tests we ship."
#[test]
fn prometheus_judges_as_the_own_engine_does() {
    let Some(promtool) = installed("promtool") else {
        eprintln!("skipped: promtool is not installed");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    for backups in [true, false] {
        write("cofferdam.rules.yml", &rules::prometheus(backups));
        write("tests.yml", &rules::promtool_tests("cofferdam.rules.yml", backups));
        write("all.yml", &every_trouble());
        let mut runs = vec![["check", "rules", "cofferdam.rules.yml"], ["test", "rules", "tests.yml"]];
        if backups {
            runs.push(["test", "rules", "all.yml"]);
        }
        for arguments in runs {
            let output = Command::new(&promtool).args(arguments).current_dir(directory.path()).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{arguments:?}: {text}");
        }
    }
}

/// Whatever kind of trouble it is, and whoever has it: one alert, as urgent as the own engine has it.
fn every_trouble() -> String {
    let mut text = "rule_files: [cofferdam.rules.yml]\nevaluation_interval: 1m\ntests:\n".to_owned();
    let topics = ["availability", "latency", "backlog", "capacity", "recovery_point", "security"];
    for (kind, subject) in [("tenant", "acme"), ("shared", "gateway one")] {
        for topic in topics {
            for (status, limited) in [(1, true), (1, false), (2, true), (3, true), (3, false)] {
                let labels = format!(r#"kind="{kind}", subject="{subject}", aspect="a""#);
                let moves = ["latency", "backlog"].contains(&topic);
                let (wanted, severity, muted) = match (status, moves, limited) {
                    (1, true, _) => ("CofferdamWaits", "ticket", "calendar"),
                    (1, ..) => ("CofferdamWarns", "ticket", "never"),
                    (2, ..) => ("CofferdamCannotLook", "ticket", "never"),
                    (_, true, true) => ("CofferdamSlow", "page", "calendar"),
                    _ => ("CofferdamFails", "page", "never"),
                };
                text.push_str("  - interval: 1m\n    input_series:\n");
                for (metric, more, value) in [
                    ("status", format!(", topic=\"{topic}\""), status),
                    ("cause", format!(", topic=\"{topic}\""), 1),
                    ("figure", ", figure=\"f\"".to_owned(), if status == 3 { 9 } else { 2 }),
                    ("limit", ", figure=\"f\"".to_owned(), 5),
                    ("warn_limit", ", figure=\"f\"".to_owned(), 1),
                ] {
                    if !metric.ends_with("limit") || limited {
                        text.push_str(&format!(
                            "      - {{ series: 'cofferdam_health_{metric}{{{labels}{more}}}', values: '{value}x70' }}\n"
                        ));
                    }
                }
                text.push_str("    alert_rule_test:\n");
                for alert in
                    ["CofferdamWaits", "CofferdamWarns", "CofferdamCannotLook", "CofferdamSlow", "CofferdamFails"]
                {
                    if alert != wanted {
                        text.push_str(&format!("      - {{ eval_time: 65m, alertname: {alert}, exp_alerts: [] }}\n"));
                        continue;
                    }
                    let own =
                        if wanted == "CofferdamSlow" { "figure: f".to_owned() } else { format!("topic: {topic}") };
                    let summary = match wanted {
                        "CofferdamWaits" => format!("{subject}: a is slower than it should be"),
                        "CofferdamWarns" => format!("{subject}: a is not quite well"),
                        "CofferdamCannotLook" => format!("{subject}: nobody could look at a lately"),
                        "CofferdamSlow" => format!("{subject}: f is 9"),
                        _ => format!("{subject}: a fails"),
                    };
                    text.push_str(&format!(
                        "      - eval_time: 65m\n        alertname: {alert}\n        exp_alerts:\n          - exp_labels: {{ severity: \
                         {severity}, muted_by: {muted}, kind: {kind}, subject: '{subject}', aspect: a, {own} }}\n            \
                         exp_annotations: {{ summary: '{summary}' }}\n"
                    ));
                }
            }
        }
    }
    // While an event triples both limits: 5 and 1.
    for (status, takes, wanted) in
        [(1, 2, None), (1, 4, Some("CofferdamWaits")), (3, 9, Some("CofferdamWaits")), (3, 16, Some("CofferdamSlow"))]
    {
        let labels = r#"kind="tenant", subject="acme", aspect="a""#;
        text.push_str("  - interval: 1m\n    input_series:\n");
        for (metric, more, value) in [
            ("status", ", topic=\"latency\"", status),
            ("cause", ", topic=\"latency\"", 1),
            ("figure", ", figure=\"f\"", takes),
            ("limit", ", figure=\"f\"", 5),
            ("warn_limit", ", figure=\"f\"", 1),
        ] {
            text.push_str(&format!(
                "      - {{ series: 'cofferdam_health_{metric}{{{labels}{more}}}', values: '{value}x70' }}\n"
            ));
        }
        text.push_str("      - { series: 'business_calendar_latency_factor{tenant=\"acme\"}', values: '3x70' }\n    alert_rule_test:\n");
        for alert in ["CofferdamWaits", "CofferdamSlow", "CofferdamFails"] {
            if wanted != Some(alert) {
                text.push_str(&format!("      - {{ eval_time: 65m, alertname: {alert}, exp_alerts: [] }}\n"));
                continue;
            }
            let (severity, own, summary) = if alert == "CofferdamSlow" {
                ("page", "figure: f", format!("acme: f is {takes}"))
            } else {
                ("ticket", "topic: latency", "acme: a is slower than it should be".to_owned())
            };
            text.push_str(&format!(
                "      - eval_time: 65m\n        alertname: {alert}\n        exp_alerts:\n          - exp_labels: {{ severity: {severity}, \
                 muted_by: calendar, kind: tenant, subject: acme, aspect: a, {own} }}\n            exp_annotations: {{ summary: '{summary}' }}\n"
            ));
        }
    }
    text
}
