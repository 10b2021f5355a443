//! The servers behind the gateway: restarts, failover, replicas, lifetimes; and how long clients may do what.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashSet;
use std::process::Stdio;
use std::time::{Duration, Instant};

use cofferdam_testkit::postgres::{Cluster, ClusterOptions, binaries};
use cofferdam_testkit::tools::Target;
use cofferdam_tests::{Site, SiteOptions, eventually};
use tokio::io::AsyncBufReadExt;
use tokio_postgres::{Client, SimpleQueryMessage};

async fn value(client: &Client, sql: &str) -> String {
    let rows = client.simple_query(sql).await.unwrap();
    let row = rows.iter().rev().find_map(|m| if let SimpleQueryMessage::Row(row) = m { Some(row) } else { None });
    row.unwrap().get(0).unwrap_or_default().to_owned()
}

async fn backend(client: &Client) -> String {
    value(client, "SELECT pg_backend_pid()").await
}

/// Rule 24.
#[tokio::test]
async fn a_server_that_restarts_is_waited_for_and_no_client_notices() {
    // The server is killed, and what was committed has to be there afterwards.
    let settings = vec!["synchronous_commit = on".to_owned()];
    let server = ClusterOptions { settings, ..ClusterOptions::default() };
    let site = Site::start_with(SiteOptions { server, ..SiteOptions::default() }).await;
    let clients = [site.connect("acme").await, site.connect("bolt").await];
    for client in &clients {
        client.batch_execute("CREATE TABLE t (n int)").await.unwrap();
    }
    let Site { mut cluster, gateway, directory: _directory } = site;
    cluster.kill();
    let waiting = clients.iter().map(|client| client.execute("INSERT INTO t VALUES (1)", &[]));
    let waiting: Vec<_> = waiting.collect();
    let restart = tokio::task::spawn_blocking(move || {
        cluster.launch().unwrap();
        cluster
    });
    for inserted in waiting {
        assert_eq!(inserted.await.unwrap(), 1);
    }
    let _cluster = restart.await.unwrap();
    for client in &clients {
        assert_eq!(value(client, "SELECT count(*) FROM t").await, "1");
    }
    let usage = gateway.postgres_plane().unwrap().usage();
    assert!(usage.servers["pg"][0].is_up, "{usage:?}");
}

#[tokio::test]
async fn a_server_that_stays_away_is_reported_after_the_time_that_is_configured() {
    let mut site =
        Site::start_with(SiteOptions { cluster: "    reconnect_wait: 1s\n".into(), ..Default::default() }).await;
    let client = site.connect("acme").await;
    site.cluster.kill();
    let begun = Instant::now();
    let error = client.simple_query("SELECT 1").await.unwrap_err();
    assert!(format!("{error:?}").contains("08006") && format!("{error:?}").contains("cannot be reached"), "{error:?}");
    assert!(begun.elapsed() >= Duration::from_secs(1));
    // The session is kept: it goes on when the server is back.
    site.cluster.launch().unwrap();
    eventually(async || client.simple_query("SELECT 1").await.is_ok()).await;
}

/// A site whose second server follows the first.
async fn replicated(more: &str) -> (Site, Cluster) {
    let site = Site::start_with(SiteOptions {
        // Odoo's sequences want many at once.
        slots: 8,
        ..SiteOptions::default()
    })
    .await;
    let standby = {
        let cluster = &site.cluster;
        // A copy of the whole cluster takes a second or two.
        tokio::task::block_in_place(|| cluster.standby().unwrap())
    };
    let options = SiteOptions {
        slots: 8,
        cluster: format!(
            "    replicas: ['127.0.0.1:{}']\n    health_interval: 100ms\n    service: {{ role: postgres, password: super-secret }}\n{more}",
            standby.port()
        ),
        ..SiteOptions::default()
    };
    site.directory.main(&cofferdam_tests::main_file(site.cluster.port(), &options)).unwrap();
    site.gateway.reload().await.unwrap();
    (site, standby)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_primary_is_lost_clients_go_on_at_the_one_that_was_promoted() {
    let (mut site, standby) = replicated("").await;
    let client = site.connect("acme").await;
    client.batch_execute("CREATE TABLE t (n int); INSERT INTO t VALUES (1)").await.unwrap();
    // What was committed has to be there, or it is the standby that lost it.
    let beside = standby.admin("acme_db").await.unwrap();
    eventually(async || beside.query_one("SELECT count(*) FROM t", &[]).await.is_ok_and(|r| r.get::<_, i64>(0) == 1))
        .await;
    site.cluster.kill();
    standby.promote().await.unwrap();
    client.execute("INSERT INTO t VALUES (2)", &[]).await.unwrap();
    assert_eq!(value(&client, "SELECT count(*) FROM t").await, "2");
    assert_eq!(value(&client, "SELECT current_setting('port')").await, standby.port().to_string());
    // And whoever comes new.
    let other = site.connect("bolt").await;
    assert_eq!(value(&other, "SELECT current_setting('port')").await, standby.port().to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_that_only_read_go_to_a_replica_that_is_not_behind() {
    let (site, standby) = replicated("    read_only: replica\n    max_replica_lag: 2s\n").await;
    let (here, there) = (site.cluster.port().to_string(), standby.port().to_string());
    let client = site.connect("acme").await;
    client.batch_execute("CREATE TABLE t (n int)").await.unwrap();
    let reads = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;SELECT current_setting('port')";
    eventually(async || {
        let port = value(&client, reads).await;
        client.batch_execute("COMMIT").await.unwrap();
        port == there
    })
    .await;
    for (sql, port) in [
        ("START TRANSACTION READ ONLY; SELECT current_setting('port')", &there),
        ("BEGIN; SELECT current_setting('port')", &here),
        ("BEGIN READ WRITE; SELECT current_setting('port')", &here),
        ("/* BEGIN READ ONLY */ BEGIN; SELECT current_setting('port')", &here),
        ("BEGIN READ ONLY, READ WRITE; SELECT current_setting('port')", &here),
    ] {
        assert_eq!(&value(&client, sql).await, port, "{sql}");
        client.batch_execute("ROLLBACK").await.unwrap();
    }
    let metrics = site.metrics().await;
    for line in [
        format!("cofferdam_postgres_server_up{{cluster=\"pg\",server=\"127.0.0.1:{here}\",role=\"primary\"}} 1"),
        format!("cofferdam_postgres_server_up{{cluster=\"pg\",server=\"127.0.0.1:{there}\",role=\"replica\"}} 1"),
        format!("cofferdam_postgres_replica_lag_seconds{{cluster=\"pg\",server=\"127.0.0.1:{there}\"}}"),
    ] {
        assert!(metrics.contains(&line), "{line} is missing in\n{metrics}");
    }
    // What ends the transaction in the same text or write has the primary behind it.
    client.batch_execute("BEGIN READ ONLY; SELECT 1; COMMIT; INSERT INTO t VALUES (7)").await.unwrap();
    let (begin, commit, insert) = tokio::join!(
        client.simple_query("BEGIN READ ONLY"),
        client.simple_query("COMMIT"),
        client.simple_query("INSERT INTO t VALUES (8)")
    );
    begin.and(commit).and(insert).unwrap();
    // The same prepared statements in both places.
    let statement = client.prepare("SELECT current_setting('port')").await.unwrap();
    for (begin, port) in [("BEGIN READ ONLY", &there), ("BEGIN", &here), ("BEGIN READ ONLY", &there)] {
        client.batch_execute(begin).await.unwrap();
        assert_eq!(&client.query_one(&statement, &[]).await.unwrap().get::<_, String>(0), port);
        client.batch_execute("COMMIT").await.unwrap();
    }
    client.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    // A replica that stands still is left out.
    let beside = standby.admin("postgres").await.unwrap();
    beside.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
    eventually(async || {
        client.execute("INSERT INTO t VALUES (2)", &[]).await.unwrap();
        let port = value(&client, reads).await;
        client.batch_execute("COMMIT").await.unwrap();
        port == here
    })
    .await;
    drop(beside);
    // And one that is gone is not waited for.
    drop(standby);
    assert_eq!(value(&client, reads).await, here);
}

#[tokio::test]
async fn connections_are_replaced_when_they_are_old() {
    let options = SiteOptions { cluster: "    lifetime: 1s\n".into(), ..SiteOptions::default() };
    let site = Site::start_with(options).await;
    let client = site.connect("acme").await;
    let mut seen = HashSet::new();
    eventually(async || {
        seen.insert(backend(&client).await);
        seen.len() >= 3
    })
    .await;
}

#[tokio::test]
async fn connections_are_kept_ready_before_they_are_needed() {
    let options = SiteOptions { cluster: "    warm: 3\n".into(), ..SiteOptions::default() };
    let site = Site::start_with(options).await;
    let _client = site.connect("acme").await;
    eventually(async || site.gateway.postgres_plane().unwrap().usage().connections["pg"].idle >= 3).await;
}

async fn limited(plan: &str) -> Site {
    Site::start_with(SiteOptions { plan: format!("    {plan}\n"), ..SiteOptions::default() }).await
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_cancelled_and_the_session_goes_on() {
    let site = limited("statement_timeout: 300ms").await;
    let client = site.connect("acme").await;
    let error = client.simple_query("SELECT pg_sleep(20)").await.unwrap_err();
    assert!(format!("{error:?}").contains("57014"), "{error:?}");
    assert_eq!(value(&client, "SELECT 1").await, "1");
    let error = client.query("SELECT pg_sleep(20)", &[]).await.unwrap_err();
    assert!(format!("{error:?}").contains("57014"), "{error:?}");
    // Many short ones are not one long one, in a pipeline neither.
    for _ in 0..4 {
        client.simple_query("SELECT pg_sleep(0.15)").await.unwrap();
    }
    let short = || client.simple_query("SELECT pg_sleep(0.15)");
    let (a, b, c, d) = tokio::join!(short(), short(), short(), short());
    assert!([a, b, c, d].iter().all(Result::is_ok));
    // The one who waits is the server, not the client: time without a statement does not count.
    client.batch_execute("BEGIN").await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    client.batch_execute("COMMIT").await.unwrap();
}

#[tokio::test]
async fn a_transaction_that_takes_too_long_is_ended_with_its_session() {
    let site = limited("transaction_timeout: 400ms").await;
    for sql in ["SELECT pg_sleep(20)", "BEGIN; SELECT 1"] {
        let client = site.connect("acme").await;
        let mut outcome = client.simple_query(sql).await;
        if outcome.is_ok() {
            tokio::time::sleep(Duration::from_millis(700)).await;
            outcome = client.simple_query("SELECT 1").await;
        }
        let error = outcome.unwrap_err();
        assert!(format!("{error:?}").contains("25P04") || error.is_closed(), "{sql}: {error:?}");
        // The server knows it too.
        let admin = site.cluster.admin("acme_db").await.unwrap();
        let active = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'acme_db' AND usename = 'odoo' AND xact_start IS NOT NULL";
        eventually(async || admin.query_one(active, &[]).await.unwrap().get::<_, i64>(0) == 0).await;
    }
}

#[tokio::test]
async fn a_client_that_does_nothing_for_too_long_is_sent_away_unless_it_listens() {
    let site = limited("idle_timeout: 400ms").await;
    let (idle, listens) = (site.connect("acme").await, site.connect("acme").await);
    listens.batch_execute("LISTEN news").await.unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert!(idle.is_closed());
    listens.simple_query("SELECT 1").await.unwrap();
}

/// What Odoo's database manager does, and what it may not.
#[tokio::test]
async fn a_pool_creates_and_drops_the_databases_of_its_tenants_and_no_others() {
    let site = Site::start().await;
    let admin = site.cluster.admin("postgres").await.unwrap();
    admin.batch_execute("ALTER ROLE odoo CREATEDB").await.unwrap();
    admin.batch_execute("CREATE DATABASE foreign_db OWNER odoo").await.unwrap();
    let port = site.address().port();
    let manager = cofferdam_testkit::postgres::connect(port, "odoo", "odoo-secret", "postgres").await.unwrap();
    for (sql, allowed) in [
        ("DROP DATABASE foreign_db", false),
        ("drop /* */ database if exists \"foreign_db\"", false),
        ("ALTER DATABASE foreign_db RENAME TO bolt_db", false),
        ("ALTER DATABASE acme_db RENAME TO elsewhere", false),
        ("CREATE DATABASE acme_copy TEMPLATE acme_db", false),
        ("CREATE DATABASE acme_db TEMPLATE foreign_db", false),
        ("ALTER DATABASE foreign_db SET work_mem = '1MB'", false),
        ("DROP DATABASE U&\"foreign\\005fdb\"", false),
        ("ALTER DATABASE ACME_DB SET work_mem = '1MB'", true),
        ("SELECT 1", true),
    ] {
        let outcome = manager.simple_query(sql).await;
        let refused = outcome.as_ref().err().is_some_and(|e| format!("{e:?}").contains("42501"));
        assert_eq!(!refused && outcome.is_ok(), allowed, "{sql}: {outcome:?}");
        // By the extended protocol too: what is prepared harms nobody, what is executed is looked at.
        if !allowed && let Ok(prepared) = manager.prepare(sql).await {
            let refused = manager.execute(&prepared, &[]).await.unwrap_err();
            let text = format!("{refused:?}");
            assert!(text.contains("42501") || refused.is_closed(), "{sql}: {text}");
            assert!(!manager.is_closed(), "{sql}");
        }
    }
    // Behind something that is allowed, in one text or one write, in a string, behind more than is looked at.
    let own = "ALTER DATABASE acme_db SET work_mem = '1MB'";
    let foreign = "ALTER DATABASE foreign_db RENAME TO stolen";
    for sql in [
        format!("{own}; {foreign}"),
        format!("DO $$ BEGIN EXECUTE '{foreign}'; END $$"),
        "CREATE DATABASE acme_db COLLATION_VERSION template TEMPLATE foreign_db".to_owned(),
        format!("/*{}*/ {foreign}", "x".repeat(1_100_000)),
        format!("SET standard_conforming_strings = off; SELECT 'a\\''; {foreign}; SELECT 'x'"),
    ] {
        let error = manager.simple_query(&sql).await.unwrap_err();
        assert!(format!("{error:?}").contains("42501"), "{}: {error:?}", &sql[..40.min(sql.len())]);
    }
    let (first, second) = tokio::join!(manager.simple_query(own), manager.simple_query(foreign));
    first.unwrap();
    assert!(format!("{:?}", second.unwrap_err()).contains("42501"));
    // Nor from a tenant's database, with the pool's login.
    let inside = site.connect("acme").await;
    assert!(format!("{:?}", inside.simple_query("DROP DATABASE foreign_db").await.unwrap_err()).contains("42501"));
    drop(inside);
    // A batch of which one is refused leaves nothing behind that holds back the other's database.
    let (refused, skipped) = tokio::join!(
        manager.execute("DROP DATABASE foreign_db", &[]),
        manager.execute("ALTER DATABASE acme_db RENAME TO acme_db", &[])
    );
    assert!(refused.is_err() && skipped.is_err());
    let there = admin.query_one("SELECT count(*) FROM pg_database WHERE datname = 'foreign_db'", &[]).await.unwrap();
    assert_eq!(there.get::<_, i64>(0), 1);
    let other = site.connect("acme").await;
    tokio::time::timeout(Duration::from_secs(5), other.simple_query("SELECT 1")).await.unwrap().unwrap();
    drop(other);
    // What the pool may do is what it may do now.
    let stricter = cofferdam_tests::main_file(site.cluster.port(), &SiteOptions::default());
    let stricter = stricter.replace("    maintenance: pg\n", "    maintenance: pg\n    database_commands: none\n");
    site.directory.main(&stricter).unwrap();
    site.gateway.reload().await.unwrap();
    assert!(format!("{:?}", manager.simple_query(own).await.unwrap_err()).contains("42501"));
    site.directory.main(&cofferdam_tests::main_file(site.cluster.port(), &SiteOptions::default())).unwrap();
    site.gateway.reload().await.unwrap();
    // Everybody else is out of the way meanwhile, and goes on afterwards.
    let clients = [site.connect("acme").await, site.connect("acme").await];
    for client in &clients {
        client.simple_query("SELECT 1").await.unwrap();
    }
    manager.simple_query("DROP DATABASE acme_db").await.unwrap();
    manager.simple_query("CREATE DATABASE acme_db TEMPLATE template0").await.unwrap();
    clients[0].batch_execute("CREATE TABLE anew (n int)").await.unwrap();
    assert_eq!(value(&clients[1], "SELECT count(*) FROM anew").await, "0");
    // A transaction that is open has to end first.
    clients[0].batch_execute("BEGIN; SELECT 1").await.unwrap();
    let drop = manager.simple_query("DROP DATABASE acme_db");
    let end = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        clients[0].batch_execute("COMMIT").await.unwrap();
    };
    let (dropped, ()) = tokio::join!(drop, end);
    dropped.unwrap();
    let error = clients[1].simple_query("SELECT 1").await.unwrap_err();
    assert!(format!("{error:?}").contains("3D000"), "{error:?}");
}

/// What was written before a program was told to end.
async fn replicate(target: &Target, arguments: &[&str], until: Option<&str>) -> Result<String, String> {
    let mut program = tokio::process::Command::new(binaries().unwrap().join("pg_recvlogical"));
    program.args(["--host", "127.0.0.1", "--port", &target.port.to_string(), "--username", &target.user]);
    program.args(["--dbname", &target.database, "--slot", "cdc"]).args(arguments).env("PGPASSWORD", &target.password);
    program.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = program.spawn().unwrap();
    let Some(until) = until else {
        let out = child.wait_with_output().await.unwrap();
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        return if out.status.success() { Ok(String::new()) } else { Err(error) };
    };
    let mut lines = tokio::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let mut seen = String::new();
    while !seen.contains(until) {
        let line = tokio::time::timeout(Duration::from_secs(20), lines.next_line()).await;
        match line.expect("nothing was replicated within 20 s").unwrap() {
            Some(line) => seen += &(line + "\n"),
            None => break,
        }
    }
    Ok(seen)
}

#[tokio::test]
async fn changes_are_replicated_to_those_who_may() {
    let settings = vec!["wal_level = logical".to_owned(), "max_replication_slots = 4".to_owned()];
    let server = ClusterOptions { settings, ..ClusterOptions::default() };
    let tenant = "replication: [cdc]\nusers: [{ role: cdc, password: cdc-secret }]\n".to_owned();
    let site = Site::start_with(SiteOptions { server, tenant, ..SiteOptions::default() }).await;
    let admin = site.cluster.admin("acme_db").await.unwrap();
    admin
        .batch_execute("CREATE ROLE cdc LOGIN REPLICATION PASSWORD 'cdc-secret'; ALTER ROLE odoo REPLICATION")
        .await
        .unwrap();
    let target = Target::new(site.address().port(), "cdc", "cdc-secret", "acme_db");
    replicate(&target, &["--create-slot", "--plugin", "test_decoding"], None).await.unwrap();
    let client = site.connect("acme").await;
    client.batch_execute("CREATE TABLE t (n int); INSERT INTO t SELECT generate_series(1, 20000)").await.unwrap();
    let seen = replicate(&target, &["--start", "--file", "-"], Some("n[integer]:20000")).await.unwrap();
    assert_eq!(seen.matches("INSERT: n[integer]").count(), 20_000);
    // It holds no slot, and nothing of it is left.
    eventually(async || site.gateway.postgres_plane().unwrap().usage().connections["pg"].open <= 2).await;
    let refused = replicate(&site.target("acme"), &["--drop-slot"], None).await.unwrap_err();
    assert!(refused.contains("may not open replication connections"), "{refused}");
    // Physical replication would be of everybody's data.
    let mut whole = tokio::process::Command::new(binaries().unwrap().join("pg_receivewal"));
    whole.args(["-h", "127.0.0.1", "-U", "cdc", "-D", "/nonexistent", "-p", &target.port.to_string(), "--create-slot"]);
    let out = whole.args(["--slot", "x"]).env("PGPASSWORD", "cdc-secret").output().await.unwrap();
    assert!(!out.status.success(), "{out:?}");
}

/// Logins at a server so far, by its statistics of sessions.
async fn sessions(server: &Cluster) -> i64 {
    let admin = server.admin("postgres").await.unwrap();
    let sql = "SELECT sum(sessions)::bigint FROM pg_stat_database WHERE datname LIKE '%_db'";
    admin.query_one(sql, &[]).await.unwrap().get(0)
}

/// Rules 22 and 24: whoever waits for a promotion holds no slot, and does not keep the standby busy with logins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_nobody_is_promoted_the_standby_is_left_in_peace() {
    let (mut site, standby) = replicated("    reconnect_wait: 4s\n").await;
    let clients: Vec<_> = [site.connect("acme").await, site.connect("bolt").await, site.connect("acme").await].into();
    site.cluster.kill();
    let before = sessions(&standby).await;
    let waiting: Vec<_> = clients.iter().map(|client| client.simple_query("SELECT 1")).collect();
    let gate = site.gateway.postgres_plane().unwrap().gates().get("pg").unwrap();
    let look = async {
        let mut at_work = 0;
        for _ in 0..60 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            at_work += u32::from(gate.usage().running > 0);
        }
        // Only while somebody tries: on a machine that does much else a try takes long.
        assert!(at_work <= 50, "in {at_work} of 60 looks a slot was held");
    };
    let (outcomes, ()) = tokio::join!(futures_util::future::join_all(waiting), look);
    assert!(outcomes.iter().all(Result::is_err));
    tokio::time::sleep(Duration::from_millis(700)).await;
    let logins = sessions(&standby).await - before;
    // About 24; without pauses there would be hundreds.
    assert!(logins <= 60, "{logins} logins at the standby in four seconds");
    assert_eq!(site.gateway.postgres_plane().unwrap().usage().connections["pg"].open, 0);
}

/// What happens when the lost one comes back: both take writes, and only one of them gets any.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_servers_that_take_writes_the_first_one_stays() {
    let (mut site, standby) = replicated("").await;
    let client = site.connect("acme").await;
    client.batch_execute("CREATE TABLE t (n int)").await.unwrap();
    let pinned = site.connect("acme").await;
    pinned.batch_execute("CREATE TEMP TABLE mine (n int)").await.unwrap();
    let beside = standby.admin("acme_db").await.unwrap();
    eventually(async || beside.query_one("SELECT count(*) FROM t", &[]).await.is_ok()).await;
    site.cluster.kill();
    standby.promote().await.unwrap();
    let there = standby.port().to_string();
    assert_eq!(value(&client, "SELECT current_setting('port')").await, there);
    site.cluster.launch().unwrap();
    for _ in 0..20 {
        assert_eq!(value(&client, "SELECT current_setting('port')").await, there);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The session whose state was there is at an end, and says so.
    assert!(pinned.simple_query("SELECT 1").await.is_err());
}

#[tokio::test]
async fn warming_up_ends_with_its_cluster() {
    let options = SiteOptions { cluster: "    warm: 30\n    connections: 100\n".into(), ..SiteOptions::default() };
    let site = Site::start_with(options).await;
    let _client = site.connect("acme").await;
    eventually(async || site.gateway.postgres_plane().unwrap().usage().connections["pg"].open >= 3).await;
    site.directory.main(&cofferdam_tests::main_file(site.cluster.port(), &SiteOptions::default())).unwrap();
    site.gateway.reload().await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = sessions(&site.cluster).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(sessions(&site.cluster).await <= before + 1);
}

/// Whatever a replica has against it, the primary serves it too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_refuses_is_done_without() {
    let (site, standby) = replicated("    read_only: replica\n").await;
    let client = site.connect("acme").await;
    let reads = "BEGIN READ ONLY;SELECT current_setting('port')";
    let there = standby.port().to_string();
    eventually(async || {
        let port = value(&client, reads).await;
        client.batch_execute("COMMIT").await.unwrap();
        port == there
    })
    .await;
    // Room for one of the role: at the primary the gateway has it, at the replica somebody else.
    let admin = site.cluster.admin("postgres").await.unwrap();
    let beside = standby.admin("postgres").await.unwrap();
    let of_gateway = "pid <> pg_backend_pid() AND usename = 'odoo'";
    let terminate = format!("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {of_gateway}");
    beside.batch_execute(&terminate).await.unwrap();
    let held = standby.connect("odoo", "odoo-secret", "bolt_db").await.unwrap();
    admin.batch_execute("ALTER ROLE odoo CONNECTION LIMIT 1").await.unwrap();
    let limit = "SELECT rolconnlimit FROM pg_roles WHERE rolname = 'odoo'";
    eventually(async || beside.query_one(limit, &[]).await.unwrap().get::<_, i32>(0) == 1).await;
    let here = site.cluster.port().to_string();
    for _ in 0..5 {
        assert_eq!(value(&client, reads).await, here);
        client.batch_execute("COMMIT").await.unwrap();
    }
    drop(held);
}
