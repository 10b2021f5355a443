//! The PostgreSQL plane against a real server.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use cofferdam_testkit::postgres::connect;
use cofferdam_testkit::tools::{Target, postgres_tool, python_with, run};
use cofferdam_tests::raw::{self, Raw, parse, query, sync};
use cofferdam_tests::{POOL_LOGIN, Site, SiteOptions, eventually};
use tokio::io::AsyncWriteExt;
use tokio_postgres::SimpleQueryMessage;

/// The first column of the first row of a simple query.
async fn value(client: &tokio_postgres::Client, sql: &str) -> String {
    client
        .simple_query(sql)
        .await
        .unwrap()
        .iter()
        .find_map(|m| match m {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .unwrap()
}

fn code(error: &tokio_postgres::Error) -> String {
    error.code().map_or_else(|| format!("{error}"), |c| c.code().to_owned())
}

#[tokio::test]
async fn psql_scripts_run_as_they_do_directly() {
    let site = Site::start().await;
    let script = r"
        CREATE TABLE t (id int primary key, note text);
        BEGIN; INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 1000) i; COMMIT;
        \copy (SELECT * FROM t ORDER BY id LIMIT 3) TO STDOUT
        COPY t FROM STDIN;
5000	copied
\.
        SELECT count(*), max(id) FROM t;
        BEGIN; SAVEPOINT a; INSERT INTO t VALUES (1, 'twice'); ROLLBACK TO a; SELECT 'still here'; COMMIT;
        SELECT 1/0;
        DO $$ BEGIN RAISE NOTICE 'hello from the server'; END $$;
        \echo :SERVER_VERSION_NUM
        SELECT pg_sleep(0.05), repeat('x', 200000) IS NOT NULL AS big;
    ";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), script).unwrap();
    let mut outputs = Vec::new();
    for port in [site.address().port(), site.cluster.port()] {
        let target = Target { port, ..site.target("acme") };
        let out = run(postgres_tool("psql", &target).unwrap().args(["-XAt", "-f"]).arg(file.path())).await.unwrap();
        assert!(out.stderr.contains("division by zero") && out.stderr.contains("hello from the server"), "{out:?}");
        outputs.push(out);
        run(postgres_tool("psql", &target).unwrap().args(["-XAtc", "DROP TABLE t"])).await.unwrap();
    }
    assert_eq!(outputs[0].stdout, outputs[1].stdout);
    assert!(outputs[0].stdout.contains("1001|5000") && outputs[0].stdout.contains("still here"));
}

#[tokio::test]
async fn pgbench_runs_64_clients_on_4_connections_in_every_mode_without_an_error() {
    let site = Site::start_with(SiteOptions { cluster: "    connections: 4".into(), ..SiteOptions::default() }).await;
    let target = site.target("acme");
    let out = run(postgres_tool("pgbench", &target).unwrap().args(["-i", "-q", "-s", "1"])).await.unwrap();
    assert!(out.success, "{}", out.stderr);
    for mode in ["simple", "extended", "prepared"] {
        let out =
            run(postgres_tool("pgbench", &target).unwrap().args(["-n", "-M", mode, "-c", "64", "-j", "2", "-t", "30"]))
                .await
                .unwrap();
        assert!(out.success, "{mode}: {}", out.stderr);
        assert!(out.stdout.contains("number of failed transactions: 0"), "{mode}: {}", out.stdout);
        assert!(out.stdout.contains("1920/1920"), "{mode}: {}", out.stdout);
    }
    let open = site.gateway.postgres_plane().unwrap().usage().connections["pg"].open;
    assert!(open <= 4, "{open} server connections");
}

#[tokio::test]
async fn psycopg2_goes_through_the_sequence_that_odoo_uses() {
    let site = Site::start().await;
    let python = python_with("psycopg2").await.unwrap();
    let mut command = tokio::process::Command::new(python);
    command.envs(site.target("acme").environment()).arg("-c").arg(include_str!("odoo_sequence.py"));
    let out = run(command.kill_on_drop(true)).await.unwrap();
    assert!(out.success, "{}\n{}", out.stdout, out.stderr);
    assert!(out.stdout.ends_with("all done\n"), "{}", out.stdout);
}

/// The gateway answers before it has spoken to any server.
#[tokio::test]
async fn an_unknown_database_is_fatal_3d000_without_a_server() {
    let mut site = Site::start().await;
    site.cluster.kill();
    let error = connect(site.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, "nobody").await.unwrap_err();
    assert!(error.to_string().contains("3D000") || format!("{error:?}").contains("3D000"), "{error:?}");
    assert!(format!("{error:?}").contains("database \\\"nobody\\\" does not exist"), "{error:?}");
}

#[tokio::test]
async fn credentials_of_one_tenant_never_reach_the_database_of_another() {
    let site = Site::start().await;
    let port = site.address().port();
    assert!(connect(port, "acme_role", "acme-secret", "acme_db").await.is_ok());
    for (user, password, database) in [
        ("acme_role", "acme-secret", "bolt_db"),
        ("acme_role", "acme-secret", "postgres"),
        ("acme_role", "acme-secret", "template1"),
        ("acme_role", "bolt-secret", "acme_db"),
        ("bolt_role", "acme-secret", "bolt_db"),
        ("postgres", "super-secret", "acme_db"),
        ("nobody", "", "acme_db"),
        (POOL_LOGIN.0, "wrong", "acme_db"),
    ] {
        let error = connect(port, user, password, database).await.unwrap_err();
        let text = format!("{error:?}");
        assert!(text.contains("28P01") || text.contains("3D000"), "{user} on {database}: {text}");
    }
    // The server connections of one login are not given to another, although both may open the database.
    let own = connect(port, "acme_role", "acme-secret", "acme_db").await.unwrap();
    assert_eq!(value(&own, "SELECT current_user").await, "acme_role");
    let pool = site.connect("acme").await;
    assert_eq!(value(&pool, "SELECT current_user").await, "odoo");
    assert_eq!(value(&own, "SELECT session_user").await, "acme_role");
}

#[tokio::test]
async fn control_c_in_psql_cancels() {
    let site = Site::start().await;
    let mut psql = postgres_tool("psql", &site.target("acme")).unwrap();
    let child = psql
        .args(["-XAtc", "SELECT pg_sleep(60)"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let admin = site.cluster.admin("acme_db").await.unwrap();
    let running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND state = 'active' \
                   AND pid <> pg_backend_pid()";
    eventually(|| async { value(&admin, running).await == "1" }).await;
    let pid = child.id().unwrap().to_string();
    tokio::process::Command::new("kill").args(["-INT", &pid]).status().await.unwrap();
    let out = child.wait_with_output().await.unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("canceling statement due to user request"), "{text}");
    eventually(|| async { value(&admin, running).await == "0" }).await;
}

/// Rule 16: a cancel hits its client's query or nothing.
#[tokio::test]
async fn a_cancel_of_an_idle_client_does_not_hit_who_uses_the_connection_now() {
    let site = Site::start_with(SiteOptions { cluster: "    connections: 4".into(), ..SiteOptions::default() }).await;
    let idle = site.connect("acme").await;
    value(&idle, "SELECT 1").await;
    let busy = site.connect("acme").await;
    let work = tokio::spawn(async move { value(&busy, "SELECT pg_sleep(1)::text || 'done'").await });
    for _ in 0..20 {
        idle.cancel_token().cancel_query(tokio_postgres::NoTls).await.unwrap();
    }
    assert_eq!(work.await.unwrap(), "done");
}

/// Rule 25.
#[tokio::test]
async fn a_killed_client_leaves_no_open_transaction_and_no_running_query() {
    let site = Site::start().await;
    let admin = site.cluster.admin("acme_db").await.unwrap();
    let mut clients = Vec::new();
    for sql in ["BEGIN; CREATE TABLE lost (a int)", "BEGIN; SELECT pg_sleep(60)", "BEGIN; SELECT 1/0"] {
        let mut psql = postgres_tool("psql", &site.target("acme")).unwrap();
        let mut child = psql.arg("-XAt").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(format!("{sql};\n").as_bytes()).await.unwrap();
        clients.push((child, stdin));
    }
    let open = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'acme_db' AND usename = 'odoo' \
                AND state <> 'idle'";
    eventually(|| async { value(&admin, open).await == "3" }).await;
    for (child, _) in &mut clients {
        child.kill().await.unwrap();
    }
    eventually(|| async { value(&admin, open).await == "0" }).await;
    eventually(|| async { site.gateway.postgres_plane().unwrap().gates().get("pg").unwrap().usage().running == 0 })
        .await;
    assert_eq!(value(&admin, "SELECT to_regclass('lost') IS NULL").await, "t");
}

#[tokio::test]
async fn a_killed_server_gives_a_clear_error_and_later_connections_work() {
    let mut site = Site::start().await;
    let idle = site.connect("acme").await;
    value(&idle, "SELECT 1").await;
    let busy = site.connect("acme").await;
    busy.simple_query("BEGIN").await.unwrap();
    site.cluster.kill();
    let error = busy.simple_query("SELECT 1").await.unwrap_err();
    assert!(["57P01", "57P02", "08006"].contains(&code(&error).as_str()), "{error:?}");
    // An idle client keeps its session and is told when it asks for something.
    let error = idle.simple_query("SELECT 1").await.unwrap_err();
    assert_eq!(code(&error), "08006", "{error:?}");
    assert!(error.to_string().contains("cannot be reached") || format!("{error:?}").contains("cannot be reached"));
    assert!(!format!("{error:?}").contains(&site.cluster.port().to_string()), "an address leaked: {error:?}");
    site.cluster.launch().unwrap();
    assert_eq!(value(&idle, "SELECT 42").await, "42");
    assert_eq!(value(&site.connect("bolt").await, "SELECT 43").await, "43");
}

/// Rules 10 and 11.
#[tokio::test]
async fn session_state_stays_with_its_client() {
    let site = Site::start_with(SiteOptions { cluster: "    connections: 5".into(), ..SiteOptions::default() }).await;
    let first = site.connect("acme").await;
    for sql in [
        "SET statement_timeout = 12345",
        "SELECT set_config('my.secret', 'acme only', false)",
        "CREATE TEMP TABLE mine (a int)",
        "SELECT pg_advisory_lock(7)",
        "PREPARE q AS SELECT 1",
        "LISTEN something",
        "SET ROLE odoo",
    ] {
        first.simple_query(sql).await.unwrap();
    }
    for _ in 0..8 {
        let other = site.connect("acme").await;
        assert_eq!(value(&other, "SHOW statement_timeout").await, "0");
        assert_eq!(value(&other, "SELECT coalesce(current_setting('my.secret', true), '')").await, "");
        assert_eq!(value(&other, "SELECT to_regclass('pg_temp.mine') IS NULL").await, "t");
        assert_eq!(value(&other, "SELECT count(*) FROM pg_prepared_statements").await, "0");
        assert_eq!(value(&other, "SELECT pg_try_advisory_xact_lock(7)").await, "f");
    }
    assert_eq!(value(&first, "SHOW statement_timeout").await, "12345ms");
    assert_eq!(value(&first, "EXECUTE q").await, "1");
    first.simple_query("DISCARD ALL").await.unwrap();
    assert_eq!(value(&first, "SHOW statement_timeout").await, "0");
    let other = site.connect("acme").await;
    assert_eq!(value(&other, "SELECT pg_try_advisory_xact_lock(7)").await, "t");
    // A client that leaves without cleaning up leaves nothing behind either.
    first.simple_query("SET statement_timeout = 777; SELECT pg_advisory_lock(8)").await.unwrap();
    first.simple_query("DO $$ BEGIN PERFORM set_config('my.opaque', 'x', false); END $$").await.unwrap();
    drop(first);
    eventually(|| async { value(&other, "SELECT pg_try_advisory_xact_lock(8)").await == "t" }).await;
    for _ in 0..8 {
        let other = site.connect("acme").await;
        assert_eq!(value(&other, "SHOW statement_timeout").await, "0");
        assert_eq!(value(&other, "SELECT coalesce(current_setting('my.opaque', true), '')").await, "");
    }
}

/// Rule 13.
#[tokio::test]
async fn discard_all_is_answered_locally_when_clean_and_fails_inside_a_transaction() {
    let site = Site::start().await;
    let client = site.connect("acme").await;
    let before = site.gateway.postgres_plane().unwrap().usage().transactions;
    for _ in 0..10 {
        client.simple_query("DISCARD ALL").await.unwrap();
    }
    assert_eq!(site.gateway.postgres_plane().unwrap().usage().transactions, before);
    client.simple_query("BEGIN").await.unwrap();
    let error = client.simple_query("DISCARD ALL").await.unwrap_err();
    assert_eq!(code(&error), "25001");
    client.simple_query("ROLLBACK").await.unwrap();
}

#[tokio::test]
async fn application_names_follow_their_clients_over_shared_connections() {
    let site =
        Site::start_with(SiteOptions { slots: 1, cluster: "    connections: 1".into(), ..SiteOptions::default() })
            .await;
    let mut clients = Vec::new();
    for n in 0..3 {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(site.address().port()).user("odoo").password("odoo-secret").dbname("acme_db");
        config.application_name(format!("odoo-{n}'\\"));
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        clients.push((n, client));
    }
    for _ in 0..3 {
        for (n, client) in &clients {
            assert_eq!(value(client, "SHOW application_name").await, format!("odoo-{n}'\\"));
        }
    }
}

/// Whoever gives its name back gets the one that it had at login, and not that of whoever opened the connection.
#[tokio::test]
async fn a_name_that_is_reset_is_the_clients_own() {
    let site =
        Site::start_with(SiteOptions { slots: 1, cluster: "    connections: 1".into(), ..SiteOptions::default() })
            .await;
    let mut clients = Vec::new();
    for name in ["first", "odoo-17"] {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(site.address().port()).user("odoo").password("odoo-secret").dbname("acme_db");
        let (client, connection) = config.application_name(name).connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.simple_query("SELECT 1").await.unwrap();
        clients.push((name, client));
    }
    for reset in ["RESET application_name", "SET application_name = DEFAULT", "RESET ALL", "DISCARD ALL"] {
        for (name, client) in &clients {
            client.simple_query("SET application_name = 'other'").await.unwrap();
            client.simple_query("SET lock_timeout = '1s'").await.unwrap();
            client.simple_query(reset).await.unwrap();
            assert_eq!(value(client, "SHOW application_name").await, *name, "{reset}");
            client.simple_query("DISCARD ALL").await.unwrap();
        }
    }
}

/// Whoever takes a connection gives it its name and settings first; a statement that waits for what is before it must not wait
/// for that, or give the connection back meanwhile and begin again.
#[tokio::test]
async fn statements_named_by_sql_get_on_when_many_share_few_connections() {
    let cluster = "    connections: 2".to_owned();
    let site = Site::start_with(SiteOptions { slots: 1, cluster, ..SiteOptions::default() }).await;
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..8 {
        let mut client = Raw::connect_as(site.address().port(), "acme_db", &format!("client-{n}")).await;
        clients.spawn(async move {
            let timeout = format!("SET statement_timeout = '{}s'", 60 + n);
            for round in 0..20 {
                // Each has a text of its own.
                let text = format!("SELECT $1::int + {}", 100 * n + round);
                let mut batches = vec![
                    vec![query(&timeout), parse("Mine", &text), sync()],
                    vec![query("EXECUTE \"Mine\"(40)")],
                    vec![query("EXPLAIN (COSTS OFF) EXECUTE \"Mine\"(1)")],
                    vec![query("DEALLOCATE \"Mine\"")],
                ];
                if round % 7 == 6 {
                    batches.push(vec![query("RESET ALL")]);
                }
                batches.push(vec![query("SHOW application_name")]);
                let said = raw::run(&mut client, &batches).await.join("|");
                let sum = (40 + 100 * n + round).to_string();
                let is_right =
                    !said.contains("E ERROR") && said.contains(&sum) && said.contains(&format!("client-{n}"));
                assert!(is_right, "{said}");
            }
        });
    }
    let all = async {
        while let Some(done) = clients.join_next().await {
            done.unwrap();
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), all).await.expect("somebody does not get on");
}

/// What is told of a statement that cannot be prepared again is why.
#[tokio::test]
async fn who_executes_what_cannot_be_prepared_any_more_is_told_why() {
    let site =
        Site::start_with(SiteOptions { slots: 1, cluster: "    connections: 2".into(), ..SiteOptions::default() })
            .await;
    let (one, two) = (site.connect("acme").await, site.connect("acme").await);
    one.batch_execute("CREATE TABLE gone (a int)").await.unwrap();
    let _statement = one.prepare("SELECT a FROM gone").await.unwrap();
    two.batch_execute("DROP TABLE gone; DISCARD ALL").await.unwrap_err();
    two.batch_execute("DROP TABLE gone").await.unwrap();
    let console = one.simple_query("EXECUTE s0").await.unwrap_err();
    assert!(matches!(code(&console).as_str(), "42P01"), "{console:?}");
    one.simple_query("SELECT 1").await.unwrap();
}

#[tokio::test]
async fn listen_and_notify_work_through_transaction_pooling() {
    let site = Site::start().await;
    let python = python_with("psycopg2").await.unwrap();
    let mut command = tokio::process::Command::new(python);
    command.envs(site.target("acme").environment()).arg("-c").arg(include_str!("listen.py"));
    let out = run(command.kill_on_drop(true)).await.unwrap();
    assert!(out.success, "{}\n{}", out.stdout, out.stderr);
    // Waiting for notifications holds a connection but no slot.
    assert_eq!(site.gateway.postgres_plane().unwrap().gates().get("pg").unwrap().usage().running, 0);
}

/// A connection, and the notifications that arrive on it as `channel payload`.
async fn listening(
    site: &Site,
    database: &str,
) -> (tokio_postgres::Client, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(site.address().port()).user(POOL_LOGIN.0).password(POOL_LOGIN.1).dbname(database);
    let (client, mut connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    let (told, heard) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let tokio_postgres::AsyncMessage::Notification(n) = message {
                let _ = told.send(format!("{} {}", n.channel(), n.payload()));
            }
        }
    });
    (client, heard)
}

async fn notify(client: &tokio_postgres::Client, channel: &str, payload: &str) {
    client.simple_query(&format!("SELECT pg_notify('{channel}', '{payload}')")).await.unwrap();
}

#[tokio::test]
async fn twenty_listeners_share_one_server_connection_and_hear_only_their_channels() {
    let site = Site::start_with(SiteOptions { cluster: "    connections: 6".into(), ..SiteOptions::default() }).await;
    let mut listeners = Vec::new();
    for n in 0..20 {
        let (client, heard) = listening(&site, "acme_db").await;
        client.simple_query(&format!("LISTEN channel_{}", n % 2)).await.unwrap();
        listeners.push((client, heard));
    }
    let sender = site.connect("acme").await;
    notify(&sender, "channel_0", "even").await;
    notify(&sender, "channel_1", "odd").await;
    notify(&sender, "channel_2", "nobody").await;
    for (n, (_, heard)) in listeners.iter_mut().enumerate() {
        let expected = if n % 2 == 0 { "channel_0 even" } else { "channel_1 odd" };
        assert_eq!(heard.recv().await.unwrap(), expected, "listener {n}");
    }
    listeners[0].0.simple_query("UNLISTEN channel_0").await.unwrap();
    notify(&sender, "channel_0", "again").await;
    assert_eq!(listeners[2].1.recv().await.unwrap(), "channel_0 again");
    let (client, mut heard) = listeners.swap_remove(0);
    client.simple_query("LISTEN channel_9").await.unwrap();
    notify(&sender, "channel_9", "new").await;
    assert_eq!(heard.recv().await.unwrap(), "channel_9 new", "and not what came while it did not listen");
    let open = site.gateway.postgres_plane().unwrap().usage().connections["pg"].open;
    assert!(open <= 6, "{open} server connections");
    // No connection of the pool listens: what a client of another kind gets is fresh.
    assert_eq!(value(&sender, "SELECT count(*) FROM pg_listening_channels()").await, "0");
}

#[tokio::test]
async fn listen_follows_its_transaction_and_every_protocol() {
    let site = Site::start().await;
    let sender = site.connect("acme").await;
    let (client, mut heard) = listening(&site, "acme_db").await;
    client.simple_query("BEGIN; SELECT 1").await.unwrap();
    client.simple_query("LISTEN undone").await.unwrap();
    client.simple_query("ROLLBACK").await.unwrap();
    client.simple_query("BEGIN").await.unwrap();
    client.simple_query("LISTEN kept").await.unwrap();
    notify(&sender, "kept", "in between").await;
    client.simple_query("COMMIT").await.unwrap();
    notify(&sender, "undone", "x").await;
    notify(&sender, "kept", "after").await;
    assert_eq!(heard.recv().await.unwrap(), "kept in between");
    assert_eq!(heard.recv().await.unwrap(), "kept after");
    // In a failed transaction it fails, as everything does.
    client.simple_query("BEGIN; SELECT 1").await.unwrap();
    client.simple_query("SELECT 1/0").await.unwrap_err();
    assert_eq!(code(&client.simple_query("LISTEN failed").await.unwrap_err()), "25P02");
    client.simple_query("ROLLBACK").await.unwrap();
    // Extended protocol, and the tag that PostgreSQL gives.
    let statement = client.prepare("LISTEN extended").await.unwrap();
    client.execute(&statement, &[]).await.unwrap();
    notify(&sender, "extended", "hello").await;
    assert_eq!(heard.recv().await.unwrap(), "extended hello");
    client.simple_query("DISCARD ALL").await.unwrap();
    notify(&sender, "kept", "too late").await;
    client.simple_query("LISTEN last").await.unwrap();
    notify(&sender, "last", "1").await;
    assert_eq!(heard.recv().await.unwrap(), "last 1");
}

/// Each script leaves the client listening to `x`, or not, as it does on a connection of its own.
#[tokio::test]
async fn who_listens_after_a_script_is_who_would_listen_on_a_connection_of_its_own() {
    let site = Site::start().await;
    let sender = site.connect("acme").await;
    sender
        .batch_execute("CREATE TABLE d (a int, CONSTRAINT once UNIQUE (a) DEFERRABLE INITIALLY DEFERRED); INSERT INTO d VALUES (1)")
        .await
        .unwrap();
    let listens = true;
    for (script, expected) in [
        (&["LISTEN x", "BEGIN", "LISTEN x", "ROLLBACK"][..], listens),
        (&["LISTEN x", "BEGIN", "UNLISTEN *", "LISTEN x", "COMMIT"], listens),
        (&["LISTEN x", "BEGIN", "SAVEPOINT a", "UNLISTEN x", "ROLLBACK TO a", "COMMIT"], listens),
        (&["LISTEN x", "BEGIN", "UNLISTEN x", "INSERT INTO d VALUES (1)", "COMMIT"], listens),
        (&["LISTEN x", "BEGIN", "UNLISTEN x", "SELECT 1/0", "COMMIT"], listens),
        (&["SET geqo = off", "DISCARD ALL", "LISTEN x"], listens),
        (&["BEGIN", "LISTEN x", "COMMIT AND CHAIN", "ROLLBACK"], listens),
        (&["LISTEN x", "UNLISTEN *; SELECT 1"], !listens),
        (&["UNLISTEN *; SELECT 1", "LISTEN x", "LISTEN z"], listens),
        (&["BEGIN", "LISTEN x", "COMMIT; SELECT 1/0"], listens),
        (&["LISTEN x", "BEGIN", "UNLISTEN x", "COMMIT"], !listens),
        (&["LISTEN x", "DISCARD ALL"], !listens),
        (&["BEGIN", "LISTEN x", "SELECT 1/0", "COMMIT"], !listens),
        (&["LISTEN y"], !listens),
    ] {
        let (client, mut heard) = listening(&site, "acme_db").await;
        for sql in script {
            let _ = client.simple_query(sql).await; // some are meant to fail
        }
        // What arrives in the end arrives last.
        client.simple_query("LISTEN last").await.unwrap();
        notify(&sender, "x", "?").await;
        notify(&sender, "last", "!").await;
        let first = heard.recv().await.unwrap();
        assert_eq!(first == "x ?", expected, "{script:?}: {first}");
    }
    // And with prepared statements, when they are executed.
    let (client, mut heard) = listening(&site, "acme_db").await;
    let (listen, unlisten) = (client.prepare("LISTEN x").await.unwrap(), client.prepare("UNLISTEN x").await.unwrap());
    for _ in 0..2 {
        client.execute(&listen, &[]).await.unwrap();
        notify(&sender, "x", "1").await;
        assert_eq!(heard.recv().await.unwrap(), "x 1");
        client.execute(&unlisten, &[]).await.unwrap();
        notify(&sender, "x", "2").await;
    }
    client.simple_query("LISTEN last").await.unwrap();
    notify(&sender, "last", "!").await;
    assert_eq!(heard.recv().await.unwrap(), "last !");
}

/// The shared connection may not have passed on yet what was sent before.
#[tokio::test]
async fn who_listens_to_what_others_hear_already_hears_nothing_from_before() {
    let site = Site::start().await;
    let sender = site.connect("acme").await;
    let (first, mut hears) = listening(&site, "acme_db").await;
    first.simple_query("LISTEN x").await.unwrap();
    for round in 0..100 {
        let (client, mut heard) = listening(&site, "acme_db").await;
        notify(&sender, "x", "before").await;
        client.simple_query("LISTEN x").await.unwrap();
        notify(&sender, "x", "after").await;
        assert_eq!(heard.recv().await.unwrap(), "x after", "{round}");
        assert_eq!(hears.recv().await.unwrap(), "x before");
        assert_eq!(hears.recv().await.unwrap(), "x after");
        if round % 3 == 0 {
            // Who leaves while others come takes nothing with it.
            client.simple_query("UNLISTEN x").await.unwrap();
        }
    }
}

/// Odoo's bus: one database for all tenants of a cluster, and what it says of others' databases is not for everybody.
#[tokio::test]
async fn workers_hear_of_their_own_tenants_only() {
    let site = Site::start().await;
    let (client, mut heard) = listening(&site, "postgres").await;
    client.simple_query("LISTEN imbus").await.unwrap();
    client.simple_query("LISTEN cron_trigger").await.unwrap();
    let admin = site.cluster.admin("postgres").await.unwrap();
    notify(&admin, "imbus", r#"[["elsewhere","res.partner",1]]"#).await;
    notify(&admin, "cron_trigger", "elsewhere").await;
    notify(&admin, "imbus", r#"[["elsewhere","res.partner",1],["bolt_db","res.partner",2]]"#).await;
    notify(&admin, "cron_trigger", "acme_db").await;
    assert_eq!(heard.recv().await.unwrap(), r#"imbus [["bolt_db","res.partner",2]]"#);
    assert_eq!(heard.recv().await.unwrap(), "cron_trigger acme_db");
    // Nor by a LISTEN that the gateway cannot read.
    let (sly, mut heard) = listening(&site, "postgres").await;
    sly.simple_query("/**/LISTEN imbus").await.unwrap();
    sly.simple_query("LISTEN other").await.unwrap();
    notify(&admin, "imbus", r#"[["elsewhere","res.partner",3]]"#).await;
    sly.simple_query("SELECT 1").await.unwrap();
    notify(&admin, "other", "x").await;
    assert_eq!(heard.recv().await.unwrap(), "other x");
}

#[tokio::test]
async fn who_listens_is_disconnected_when_notifications_may_be_lost() {
    let site = Site::start().await;
    let (client, _heard) = listening(&site, "acme_db").await;
    client.simple_query("LISTEN x").await.unwrap();
    let admin = site.cluster.admin("postgres").await.unwrap();
    admin
        .simple_query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cofferdam listener'",
        )
        .await
        .unwrap();
    eventually(async || client.is_closed()).await;
    let (client, mut heard) = listening(&site, "acme_db").await;
    client.simple_query("LISTEN x").await.unwrap();
    notify(&site.connect("acme").await, "x", "again").await;
    assert_eq!(heard.recv().await.unwrap(), "x again");
}

#[tokio::test]
async fn sessions_with_state_of_one_tenant_leave_connections_for_the_others() {
    let site = Site::start_with(SiteOptions { cluster: "    connections: 12".into(), ..SiteOptions::default() }).await;
    let mut listeners = Vec::new();
    for _ in 0..4 {
        let listener = site.connect("acme").await;
        listener.simple_query("CREATE TEMP TABLE mine (n int)").await.unwrap();
        listeners.push(listener);
    }
    // Half of the eight connections that the slots leave: the fifth is told why, and the others live.
    let greedy = site.connect("acme").await;
    let _ = greedy.simple_query("CREATE TEMP TABLE mine (n int)").await;
    let error = greedy.simple_query("SELECT 1").await.unwrap_err();
    assert!(greedy.is_closed() || code(&error) == "53400", "{error:?}");
    for _ in 0..4 {
        assert_eq!(value(&site.connect("bolt").await, "SELECT 1").await, "1");
    }
    assert_eq!(value(&site.connect("acme").await, "SELECT 2").await, "2");
    listeners[0].simple_query("DISCARD ALL").await.unwrap();
    let another = site.connect("acme").await;
    another.simple_query("CREATE TEMP TABLE mine (n int)").await.unwrap();
    assert_eq!(value(&another, "SELECT 3").await, "3");
}

#[tokio::test]
async fn a_refusal_names_tenant_limit_and_wait_and_the_session_survives() {
    let quotas = "{ limit: 1, queue: 1, max_wait: 300ms }".to_owned();
    let site = Site::start_with(SiteOptions { quotas, ..SiteOptions::default() }).await;
    let holder = site.connect("acme").await;
    holder.simple_query("BEGIN").await.unwrap();
    let waiting = site.connect("acme").await;
    let error = waiting.simple_query("SELECT 1").await.unwrap_err();
    let text = format!("{error:?}");
    assert_eq!(code(&error), "XX000");
    assert!(text.contains("tenant acme") && text.contains("limit of 1") && text.contains("0.3 s"), "{text}");
    // Another tenant is not affected.
    assert_eq!(value(&site.connect("bolt").await, "SELECT 1").await, "1");
    // The extended protocol recovers at Sync.
    let error = waiting.query("SELECT 1", &[]).await.unwrap_err();
    assert_eq!(code(&error), "XX000");
    holder.simple_query("COMMIT").await.unwrap();
    assert_eq!(waiting.query_one("SELECT 7", &[]).await.unwrap().get::<_, i32>(0), 7);
    assert_eq!(value(&waiting, "SELECT 1").await, "1");
}

#[tokio::test]
async fn a_cancel_ends_the_wait_for_a_slot() {
    let quotas = "{ limit: 1, max_wait: 60s }".to_owned();
    let site = Site::start_with(SiteOptions { quotas, ..SiteOptions::default() }).await;
    let holder = site.connect("acme").await;
    holder.simple_query("BEGIN").await.unwrap();
    let waiting = site.connect("acme").await;
    let token = waiting.cancel_token();
    let wait = tokio::spawn(async move { waiting.simple_query("SELECT 1").await });
    let gate = site.gateway.postgres_plane().unwrap().gates().get("pg").unwrap();
    eventually(|| async { gate.usage().waiting == 1 }).await;
    token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    assert_eq!(code(&wait.await.unwrap().unwrap_err()), "57014");
    assert_eq!(gate.usage().waiting, 0);
}

#[tokio::test]
async fn an_idle_transaction_is_ended_by_the_plan() {
    let plan = "    idle_in_transaction_timeout: 300ms".to_owned();
    let site = Site::start_with(SiteOptions { plan, ..SiteOptions::default() }).await;
    let client = site.connect("acme").await;
    client.simple_query("BEGIN").await.unwrap();
    let gate = site.gateway.postgres_plane().unwrap().gates().get("pg").unwrap();
    eventually(|| async { gate.usage().running == 0 }).await;
    assert!(client.simple_query("SELECT 1").await.is_err());
    // The same for who stops inside a COPY, which is no transaction that the protocol would show.
    let client = site.connect("acme").await;
    client.simple_query("CREATE TABLE IF NOT EXISTS stalled (a int)").await.unwrap();
    let mut copy = Box::pin(client.copy_in::<_, bytes::Bytes>("COPY stalled FROM STDIN").await.unwrap());
    futures_util::SinkExt::send(&mut copy, bytes::Bytes::from_static(b"1\n")).await.unwrap();
    eventually(|| async { gate.usage().running == 0 }).await;
    assert!(client.simple_query("SELECT 1").await.is_err());
}

#[tokio::test]
async fn session_pooling_keeps_the_connection_until_the_client_leaves() {
    let site = Site::start_with(SiteOptions { tenant: "pooling: session".into(), ..SiteOptions::default() }).await;
    let client = site.connect("acme").await;
    let pid = value(&client, "SELECT pg_backend_pid()").await;
    let other = site.connect("acme").await;
    assert_ne!(value(&other, "SELECT pg_backend_pid()").await, pid);
    client.simple_query("SET statement_timeout = 5000").await.unwrap();
    assert_eq!(value(&client, "SELECT pg_backend_pid()").await, pid);
    drop(client);
    let usage = || site.gateway.postgres_plane().unwrap().usage();
    eventually(|| async { usage().connections["pg"].idle == 1 }).await;
    let third = site.connect("acme").await;
    assert_eq!(value(&third, "SELECT pg_backend_pid()").await, pid);
    assert_eq!(value(&third, "SHOW statement_timeout").await, "0");
}

#[tokio::test]
async fn a_large_result_and_a_large_value_stream_through_in_flat_memory() {
    let site = Site::start().await;
    let before = resident();
    let target = site.target("acme");
    let sql = "COPY (SELECT repeat('x', 10000) FROM generate_series(1, 20000)) TO STDOUT";
    let out = tokio::process::Command::new("sh")
        .args(["-c", &format!("psql -XAtc \"{sql}\" | wc -c")])
        .envs(target.environment())
        .output()
        .await
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "200020000");
    let client = site.connect("acme").await;
    let big = "y".repeat(30_000_000);
    let row = client.query_one("SELECT length($1::text), $1::text", &[&big]).await.unwrap();
    assert_eq!(row.get::<_, i32>(0), 30_000_000);
    drop((row, big));
    let grown = resident().saturating_sub(before);
    assert!(grown < 250 << 20, "resident memory grew by {grown} bytes");
}

fn resident() -> u64 {
    let pages: u64 = std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
