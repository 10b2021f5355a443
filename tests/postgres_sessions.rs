//! What a client makes of its session is its own: it follows the client, and nobody else meets it. Direct PostgreSQL is the
//! oracle.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use cofferdam_tests::raw::{Batch, Raw, bind, execute, named, parse, query, readable, run, site, sync};
use cofferdam_tests::{Site, SiteOptions};

/// What one of several clients does next to its session's settings.
fn random_setting(random: &mut fastrand::Rng) -> Batch {
    let name = ["statement_timeout", "work_mem", "DateStyle", "search_path", "timezone", "IntervalStyle", "my.app"];
    let value = [
        ["5000", "'7s'", "0", "'nonsense'"],
        ["'5MB'", "65536", "4096", "-1"],
        ["ISO, DMY", "German", "'SQL, MDY'", "Postgres,YMD"],
        ["public", "a, b", "'x''y', public", "'$user'"],
        ["'UTC'", "'Asia/Tokyo'", "'Europe/Berlin'", "'Nowhere/None'"],
        ["iso_8601", "postgres", "'sql_standard'", "none"],
        ["'one'", "two", "3", "'vier'"],
    ];
    let n = random.usize(..name.len());
    let (name, value) = (name[n], random.choice(value[n]).unwrap());
    let set = match random.usize(..4) {
        0 => format!("SET {name} = {value}"),
        1 => format!("set session {name} to {value};"),
        2 => format!("SET {name} TO DEFAULT"),
        _ => format!("SET {name} TO {value}"),
    };
    let by_extended = |sql: &str| vec![parse("", sql), bind("", "", &[]), execute("", 0), sync()];
    match random.usize(..20) {
        0..7 => vec![query(&set)],
        7 => vec![query(&set), query(&format!("SHOW {name}"))],
        8 => by_extended(&set),
        9 => vec![query(&format!("SET LOCAL {name} TO {value}"))],
        10 => vec![query(&format!("RESET {name}"))],
        11 => vec![query("RESET ALL")],
        12 => vec![query("BEGIN")],
        13 => vec![query("COMMIT")],
        14 => vec![query("ROLLBACK")],
        15 => vec![query("SAVEPOINT s")],
        16 => vec![query("ROLLBACK TO s")],
        17 => vec![query(&format!("{set}; SELECT 1"))],
        _ => vec![query("ROLLBACK"), query("DISCARD ALL")],
    }
}

/// Rule 12: what a client has set is in force wherever it gets a connection, in the server's own form, and what was rolled
/// back is not; and nobody else has it.
#[tokio::test]
async fn settings_follow_their_client_from_connection_to_connection() {
    // Transactions that are open and idle hold a slot each.
    let options = SiteOptions { slots: 16, cluster: "    connections: 60".into(), ..SiteOptions::default() };
    let site = Site::start_with(options).await;
    let seed = std::env::var("DIFFERENTIAL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1u64);
    let steps = std::env::var("DIFFERENTIAL_SCRIPTS").ok().and_then(|s| s.parse().ok()).unwrap_or(600u64);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut twins = Vec::new();
    for _ in 0..4 {
        let through = Raw::connect(site.address().port(), "acme_db").await;
        twins.push((through, Raw::connect(site.cluster.port(), "acme_db").await, Vec::new()));
    }
    let show = "SELECT name, setting FROM pg_settings WHERE name IN ('statement_timeout', 'work_mem', 'DateStyle', \
        'search_path', 'TimeZone', 'IntervalStyle', 'transaction_isolation') ORDER BY name";
    for n in 0..steps {
        let (through, direct, history) = random.choice(&mut twins).unwrap();
        let mut script = random_setting(&mut random);
        script.push(query(show));
        script.push(query("SELECT current_setting('my.app', true)"));
        history.push(script.clone());
        let (heard, expected) = (run(through, &[script.clone()]).await, run(direct, &[script]).await);
        // Before a placeholder has been heard of, it is nothing; afterwards it is empty: for PostgreSQL that is a
        // difference that lasts as long as the connection.
        let same = |lines: &[String]| {
            lines.iter().map(|l| l.replace(r"\xff\xff\xff\xff", r"\x00\x00\x00\x00")).collect::<Vec<_>>()
        };
        assert_eq!(same(&heard), same(&expected), "step {n} of seed {seed}:\n  {}", readable(history));
    }
}

/// Everything that a client can leave behind on a connection.
const LEFT_BEHIND: [&str; 26] = [
    "SET work_mem = '7MB'",
    "SET DateStyle = German",
    "SET search_path TO pg_catalog",
    "SET timezone TO 'Asia/Tokyo'",
    "SET ROLE acme_role",
    "SET SESSION AUTHORIZATION DEFAULT",
    "SET client_encoding = LATIN1",
    "SET default_transaction_isolation = 'serializable'",
    "SET default_transaction_read_only = on",
    "SET my.app = 'mine'",
    "SELECT set_config('statement_timeout', '54321', false)",
    "DO $$ BEGIN PERFORM set_config('lock_timeout', '54321', false); END $$",
    "CREATE TEMP TABLE left_behind (n int)",
    "CREATE TEMP SEQUENCE left_behind_too",
    "CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "SELECT * INTO TEMP TABLE left_there FROM generate_series(1, 3)",
    "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
    "SELECT pg_advisory_lock(42)",
    "SELECT pg_try_advisory_lock_shared(43)",
    "SELECT pg_advisory_xact_lock(44)",
    "PREPARE p AS SELECT 1",
    "LISTEN channel_of_a",
    "SET LOCAL work_mem = '9MB'",
    "SET enable_seqscan = off",
    "SET application_name = 'somebody else'",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
];

/// Rule 10: whatever one client has done to its session, the next one finds a fresh connection.
#[tokio::test]
async fn whatever_a_client_leaves_behind_the_next_finds_a_fresh_session() {
    let site = site().await;
    let admin = site.cluster.admin("acme_db").await.unwrap();
    admin.batch_execute("GRANT acme_role TO odoo").await.unwrap();
    let seed = std::env::var("DIFFERENTIAL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1u64);
    let mut random = fastrand::Rng::with_seed(seed);
    let looks: [&str; 8] = [
        // A library that was loaded is no state, and stays.
        "SELECT name, setting, reset_val FROM pg_settings WHERE name NOT LIKE 'plpgsql.%' ORDER BY name",
        // What the gateway prepares for others has names of its own.
        "SELECT name, statement FROM pg_prepared_statements WHERE name NOT LIKE 'cofferdam\\_%'",
        "SELECT name FROM pg_cursors WHERE name <> ''",
        "SELECT classid, objid, mode FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'",
        "SELECT relname FROM pg_class WHERE relnamespace = pg_my_temp_schema() AND pg_my_temp_schema() <> 0 ORDER BY 1",
        "SELECT proname FROM pg_proc WHERE pronamespace = pg_my_temp_schema() AND pg_my_temp_schema() <> 0",
        "SELECT pg_listening_channels()",
        "SELECT current_user, session_user, coalesce(current_setting('my.app', true), ''), current_schemas(false)",
    ];
    let mut met = std::collections::HashMap::<String, u32>::new();
    for round in 0..60 {
        let mut a = Raw::connect(site.address().port(), "acme_db").await;
        let mut done = Vec::new();
        for _ in 0..random.usize(1..8) {
            let what = random.choice(LEFT_BEHIND).unwrap();
            let script = match random.usize(..5) {
                0 => vec![query("BEGIN"), query(what), query(random.choice(["COMMIT", "ROLLBACK"]).unwrap())],
                1 => vec![parse("", what), bind("", "", &[]), execute("", 0), sync()],
                2 => vec![query("BEGIN"), query("SAVEPOINT s"), query(what), query("ROLLBACK TO s"), query("COMMIT")],
                3 => vec![
                    parse("kept", what),
                    sync(),
                    bind("", "kept", &[]),
                    execute("", 0),
                    named(b'C', b'S', "kept"),
                    sync(),
                ],
                _ => vec![query(what)],
            };
            done.push(script.clone());
            run(&mut a, &[script]).await;
        }
        let pid = run(&mut a, &[vec![query("SELECT pg_backend_pid()")]]).await[1].clone();
        match random.usize(..4) {
            0 => a.leave().await,
            1 => {
                // In the middle of a transaction.
                run(
                    &mut a,
                    &[vec![query("BEGIN"), query("SET work_mem = '3MB'"), query("CREATE TEMP TABLE x (n int)")]],
                )
                .await;
                a.leave().await;
            }
            2 => drop(run(&mut a, &[vec![query("ROLLBACK"), query("DISCARD ALL")]]).await),
            // It stays, with whatever it has: the next one must not see it.
            _ => done.push(vec![query("-- stays")]),
        }
        // Sooner or later on the same connection.
        let mut b = Raw::connect(site.address().port(), "acme_db").await;
        for _ in 0..2 {
            let mine = run(&mut b, &[vec![query("SELECT pg_backend_pid()")]]).await[1].clone();
            *met.entry((mine == pid).to_string()).or_default() += 1;
            let mut fresh = Raw::connect(site.cluster.port(), "acme_db").await;
            for look in looks {
                let (seen, expected) =
                    (run(&mut b, &[vec![query(look)]]).await, run(&mut fresh, &[vec![query(look)]]).await);
                let differing: Vec<_> = seen.iter().filter(|line| !expected.contains(line)).collect();
                assert_eq!(
                    seen,
                    expected,
                    "round {round} of seed {seed}, {look}: {differing:#?}\n  {}",
                    readable(&done)
                );
            }
            fresh.leave().await;
        }
        b.leave().await;
    }
    assert!(met.get("true").is_some_and(|n| *n >= 20), "the same connections were hardly met: {met:?}");
}

#[tokio::test]
async fn a_client_that_has_changed_a_setting_keeps_no_connection() {
    let site = site().await;
    let mut clients = Vec::new();
    for n in 0..6 {
        let mut client = Raw::connect(site.address().port(), "acme_db").await;
        run(&mut client, &[vec![query(&format!("SET statement_timeout = {}", 5_000 + n))]]).await;
        clients.push(client);
    }
    for _ in 0..2 {
        for (n, client) in clients.iter_mut().enumerate() {
            let heard = run(client, &[vec![query("SHOW statement_timeout")]]).await;
            let expected = if n == 0 { "5s".to_owned() } else { format!("{}ms", 5_000 + n) };
            assert!(heard[1].ends_with(&expected), "{heard:?}");
        }
    }
    let usage = site.gateway.postgres_plane().unwrap().usage();
    assert!(usage.connections["pg"].open <= 2, "{usage:?}");
}
