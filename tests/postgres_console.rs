//! The console of the PostgreSQL plane, as operators and their tools use it.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::Duration;

use cofferdam_testkit::postgres::connect;
use cofferdam_testkit::tools::{Target, postgres_tool, run};
use cofferdam_tests::{POOL_LOGIN, Site, SiteOptions, eventually};
use tokio_postgres::{Client, SimpleQueryMessage};

const USERS: &str = "  console:\n    admins: [{ role: chief, password: chief-secret }]\n    \
                     viewers: [{ role: watcher, password: watcher-secret }]\n";

async fn site() -> Site {
    Site::start_with(SiteOptions { postgres: USERS.into(), ..SiteOptions::default() }).await
}

async fn console(site: &Site, role: &str) -> Client {
    connect(site.address().port(), role, &format!("{role}-secret"), "cofferdam").await.unwrap()
}

/// Column names and rows of a command.
async fn table(client: &Client, command: &str) -> (Vec<String>, Vec<Vec<Option<String>>>) {
    let (mut columns, mut rows) = (Vec::new(), Vec::new());
    for message in client.simple_query(command).await.unwrap_or_else(|e| panic!("{command}: {e}")) {
        match message {
            SimpleQueryMessage::RowDescription(all) => columns = all.iter().map(|c| c.name().to_owned()).collect(),
            SimpleQueryMessage::Row(row) => {
                rows.push((0..row.len()).map(|n| row.get(n).map(str::to_owned)).collect());
            }
            _ => {}
        }
    }
    (columns, rows)
}

/// The field `column` of the row whose field `key` is `value`.
async fn field(client: &Client, command: &str, (key, value): (&str, &str), column: &str) -> Option<String> {
    let (columns, rows) = table(client, command).await;
    let at = |name: &str| columns.iter().position(|c| c == name).unwrap_or_else(|| panic!("{name} in {columns:?}"));
    let (key, column) = (at(key), at(column));
    rows.iter().find(|row| row[key].as_deref() == Some(value)).and_then(|row| row[column].clone())
}

async fn backend(client: &Client) -> String {
    table(client, "SELECT pg_backend_pid()").await.1[0][0].clone().unwrap()
}

/// What `pgbouncer_exporter` and dashboards look for: the tables, their columns, and types that numbers are read from.
#[tokio::test]
async fn the_tables_have_the_columns_of_pgbouncer() {
    let site = site().await;
    let worker = site.connect("acme").await;
    worker.simple_query("SELECT 1").await.unwrap();
    let console = console(&site, "watcher").await;
    let (columns, rows) = table(&console, "SHOW POOLS;").await;
    assert_eq!(
        columns.join(" "),
        "database user cl_active cl_waiting cl_active_cancel_req cl_waiting_cancel_req sv_active sv_active_cancel \
         sv_being_canceled sv_idle sv_used sv_tested sv_login maxwait maxwait_us pool_mode load_balance_hosts"
    );
    let acme = rows.iter().find(|r| r[0].as_deref() == Some("acme_db")).unwrap();
    assert_eq!((acme[1].as_deref(), acme[2].as_deref(), acme[9].as_deref()), (Some("odoo"), Some("1"), Some("1")));
    let (columns, _) = table(&console, "SHOW STATS_TOTALS").await;
    assert_eq!(
        columns.join(" "),
        "database server_assignment_count xact_count query_count bytes_received bytes_sent xact_time query_time \
         wait_time client_parse_count server_parse_count bind_count client_login_count"
    );
    assert_eq!(field(&console, "SHOW STATS", ("database", "acme_db"), "total_xact_count").await.as_deref(), Some("1"));
    assert_eq!(
        field(&console, "SHOW DATABASES", ("name", "acme_db"), "current_connections").await.as_deref(),
        Some("1")
    );
    assert_eq!(field(&console, "SHOW LISTS", ("list", "databases"), "items").await.as_deref(), Some("2"));
    assert_eq!(field(&console, "SHOW CONFIG", ("key", "max_client_conn"), "value").await.as_deref(), Some("20000"));
    assert_eq!(field(&console, "SHOW CLIENTS", ("database", "acme_db"), "state").await.as_deref(), Some("idle"));
    assert_eq!(field(&console, "SHOW SERVERS", ("database", "acme_db"), "state").await.as_deref(), Some("idle"));
    assert_eq!(field(&console, "SHOW TENANTS", ("tenant", "acme"), "clients").await.as_deref(), Some("1"));
    assert_eq!(field(&console, "SHOW GATE", ("cluster", "pg"), "slots").await.as_deref(), Some("4"));
    for other in [
        "USERS",
        "SOCKETS",
        "TOTALS",
        "STATS_AVERAGES",
        "STATE",
        "VERSION",
        "MEM",
        "PEERS",
        "DNS_HOSTS",
        "LEDGER",
        "HELP",
    ] {
        table(&console, &format!("SHOW {other}")).await;
    }
    // Drivers that always use the extended protocol get their answers too.
    let rows = console.query("SHOW STATE", &[]).await.unwrap();
    assert_eq!((rows.len(), rows[0].get::<_, &str>(0)), (3, "active"));
}

#[tokio::test]
async fn psql_can_be_used_under_the_name_of_pgbouncer_too() {
    let site = site().await;
    let target = Target::new(site.address().port(), "chief", "chief-secret", "pgbouncer");
    let out =
        run(postgres_tool("psql", &target).unwrap().args(["-XAtc", "show version", "-c", "show help"])).await.unwrap();
    assert!(out.success && out.stdout.starts_with("Cofferdam "), "{out:?}");
    assert!(out.stderr.contains("KILL_CLIENT"), "{out:?}");
    let out = run(postgres_tool("psql", &target).unwrap().args(["-Xc", "show nothing"])).await.unwrap();
    assert!(out.stderr.contains("cannot show `nothing`, expected one of CLIENTS"), "{out:?}");
}

/// Rule 21.
#[tokio::test]
async fn only_users_of_the_console_get_in_and_only_admins_act() {
    let site = site().await;
    let port = site.address().port();
    for (user, password) in [POOL_LOGIN, ("acme_role", "acme-secret"), ("chief", "watcher-secret"), ("nobody", "x")] {
        let error = connect(port, user, password, "cofferdam").await.unwrap_err();
        assert!(format!("{error:?}").contains("28P01"), "{user}: {error:?}");
    }
    // And a user of the console is none of any database.
    assert!(connect(port, "chief", "chief-secret", "acme_db").await.is_err());
    let watcher = console(&site, "watcher").await;
    for command in
        ["PAUSE", "RESUME", "KILL acme_db", "KILL_CLIENT 1", "RECONNECT", "RELOAD", "SHUTDOWN", "DISABLE acme_db"]
    {
        let error = watcher.simple_query(command).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42501", "{command}");
    }
    let worker = site.connect("acme").await;
    worker.simple_query("SELECT 1").await.expect("nothing was paused");
}

#[tokio::test]
async fn without_users_there_is_no_console() {
    let site = Site::start().await;
    let error = connect(site.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, "pgbouncer").await.unwrap_err();
    assert!(format!("{error:?}").contains("28P01"), "{error:?}");
}

#[tokio::test]
async fn pause_lets_transactions_finish_and_holds_new_ones_until_resume() {
    let site = site().await;
    let chief = console(&site, "chief").await;
    let (busy, other) = (site.connect("acme").await, site.connect("acme").await);
    busy.simple_query("BEGIN; SELECT 1").await.unwrap();
    let pausing = tokio::spawn({
        let chief = console(&site, "chief").await;
        async move { chief.simple_query("PAUSE acme_db").await.map(drop) }
    });
    eventually(async || field(&chief, "SHOW DATABASES", ("name", "acme_db"), "paused").await.as_deref() == Some("1"))
        .await;
    assert!(!pausing.is_finished(), "a transaction is open");
    busy.simple_query("COMMIT").await.unwrap();
    pausing.await.unwrap().unwrap();
    assert_eq!(field(&chief, "SHOW POOLS", ("database", "acme_db"), "sv_idle").await.as_deref(), Some("0"));
    let waiting = tokio::spawn(async move { other.simple_query("SELECT 1").await.map(drop) });
    // Another database is not paused.
    site.connect("bolt").await.simple_query("SELECT 1").await.unwrap();
    eventually(async || {
        field(&chief, "SHOW POOLS", ("database", "acme_db"), "cl_waiting").await.as_deref() == Some("1")
    })
    .await;
    chief.simple_query("RESUME acme_db").await.unwrap();
    waiting.await.unwrap().unwrap();
    assert!(chief.simple_query("RESUME acme_db").await.is_err(), "nothing is paused any more");
    assert_eq!(chief.simple_query("PAUSE nobody").await.unwrap_err().code().unwrap().code(), "3D000");
}

#[tokio::test]
async fn reconnect_replaces_server_connections_and_wait_close_waits_for_the_last() {
    let site = site().await;
    let chief = console(&site, "chief").await;
    let (idle, busy) = (site.connect("acme").await, site.connect("acme").await);
    busy.simple_query("BEGIN").await.unwrap();
    // Who listens is told that its connection is gone.
    let listener = site.connect("acme").await;
    listener.simple_query("LISTEN x").await.unwrap();
    let before = backend(&idle).await;
    chief.simple_query("RECONNECT").await.unwrap();
    assert_ne!(backend(&idle).await, before);
    let waiting = tokio::spawn(async move { chief.simple_query("WAIT_CLOSE acme_db").await.map(drop) });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished(), "the open transaction still has an old connection");
    busy.simple_query("COMMIT").await.unwrap();
    waiting.await.unwrap().unwrap();
    assert!(listener.is_closed());
}

/// A transaction that waits for a slot while PAUSE returns does not begin afterwards.
#[tokio::test]
async fn pause_holds_who_waits_for_a_slot() {
    let site = Site::start_with(SiteOptions { slots: 1, postgres: USERS.into(), ..SiteOptions::default() }).await;
    let chief = console(&site, "chief").await;
    let (bolt, acme) = (site.connect("bolt").await, site.connect("acme").await);
    bolt.simple_query("BEGIN").await.unwrap();
    let waiting = tokio::spawn(async move { acme.simple_query("SELECT 1").await.map(drop) });
    eventually(async || {
        field(&chief, "SHOW CLIENTS", ("database", "acme_db"), "state").await.as_deref() == Some("waiting")
    })
    .await;
    chief.simple_query("PAUSE acme_db").await.unwrap();
    bolt.simple_query("COMMIT").await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!waiting.is_finished());
    chief.simple_query("RESUME acme_db").await.unwrap();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn kill_cuts_off_the_clients_of_one_database_and_stops_what_they_run() {
    let site = site().await;
    let chief = console(&site, "chief").await;
    let (victim, bystander) = (site.connect("acme").await, site.connect("bolt").await);
    let sleeping = tokio::spawn(async move { victim.simple_query("SELECT pg_sleep(60)").await.map(drop) });
    eventually(async || {
        field(&chief, "SHOW CLIENTS", ("database", "acme_db"), "state").await.as_deref() == Some("active")
    })
    .await;
    chief.simple_query("KILL acme_db").await.unwrap();
    assert_eq!(sleeping.await.unwrap().unwrap_err().code().unwrap().code(), "57P01");
    bystander.simple_query("SELECT 1").await.unwrap();
    let admin = site.cluster.admin("postgres").await.unwrap();
    eventually(async || {
        table(&admin, "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()")
            .await
            .1
            .is_empty()
    })
    .await;
    chief.simple_query("RESUME acme_db").await.unwrap();
    let again = site.connect("acme").await;
    again.simple_query("SELECT 1").await.unwrap();
    let id = field(&chief, "SHOW CLIENTS", ("database", "acme_db"), "id").await.unwrap();
    chief.simple_query(&format!("KILL_CLIENT {id}")).await.unwrap();
    eventually(async || again.simple_query("SELECT 1").await.is_err()).await;
}

#[tokio::test]
async fn disable_turns_new_clients_away_and_reload_says_what_is_wrong() {
    let site = site().await;
    let chief = console(&site, "chief").await;
    let there = site.connect("acme").await;
    chief.simple_query("DISABLE acme_db").await.unwrap();
    let error = connect(site.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.unwrap_err();
    assert!(format!("{error:?}").contains("disabled"), "{error:?}");
    there.simple_query("SELECT 1").await.expect("who is there stays");
    chief.simple_query("ENABLE acme_db").await.unwrap();
    site.connect("acme").await;
    chief.simple_query("RELOAD").await.unwrap();
    site.directory.tenant("acme", "tenant: acme\nnonsense: 1\n").unwrap();
    let error = chief.simple_query("RELOAD").await.unwrap_err();
    assert!(format!("{error:?}").contains("nonsense"), "{error:?}");
}
