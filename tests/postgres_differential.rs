//! What a client gets through the gateway is what it gets from PostgreSQL: the same messages in the same order, for
//! scripts that somebody thought of and for thousands that nobody did. Direct PostgreSQL is the oracle.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::Duration;

use bytes::BufMut;
use cofferdam_tests::raw::{Batch, Raw, bind, execute, message, named, parse, query, readable, run, shown, site, sync};
use cofferdam_tests::{Site, SiteOptions, eventually};

/// Random batches of messages that make sense often enough.
fn random_script(random: &mut fastrand::Rng) -> Vec<Batch> {
    const SQL: [&str; 19] = [
        "SELECT 1",
        "SELECT 1; SELECT 2",
        "SELECT 1/0",
        "SELECT 1; SELECT 1/0; SELECT 2",
        "BEGIN",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT a",
        "ROLLBACK TO a",
        "SELECT generate_series(1, 5)",
        "SELEC",
        "INSERT INTO t VALUES (1) RETURNING a",
        "DELETE FROM t",
        "COPY (SELECT generate_series(1, 3)) TO STDOUT",
        "SELECT repeat('x', 20000)",
        "DISCARD ALL",
        "DEALLOCATE ALL",
        "LISTEN channel",
        "UNLISTEN *",
    ];
    const PREPARED: [&str; 8] = [
        "SELECT $1::int",
        "SELECT 1",
        "SELECT generate_series(1, $1::int)",
        "SELECT 1/$1::int",
        "SELEC",
        "BEGIN",
        "ROLLBACK",
        "INSERT INTO t VALUES ($1::int) RETURNING a",
    ];
    // Statements of the protocol, named by SQL.
    const BY_NAME: [&str; 7] = [
        "EXECUTE s1",
        "EXECUTE s1(3)",
        "EXECUTE \"s2\"(2)",
        "EXPLAIN (COSTS OFF) EXECUTE s3(1)",
        "DEALLOCATE s1",
        "DEALLOCATE PREPARE S2",
        "RESET application_name",
    ];
    const NAMES: [&str; 4] = ["", "s1", "s2", "s3"];
    const PORTALS: [&str; 3] = ["", "p1", "p2"];
    let mut batches = Vec::new();
    for _ in 0..random.usize(2..7) {
        let mut batch = Vec::new();
        for _ in 0..random.usize(1..9) {
            let (name, portal) = (NAMES[random.usize(..4)], PORTALS[random.usize(..3)]);
            let parameters: &[&str] = [&[][..], &["1"], &["0"], &["3"]][random.usize(..4)];
            match random.u8(..22) {
                0..=3 => batch.push(query(SQL[random.usize(..SQL.len())])),
                4..=7 => batch.push(parse(name, PREPARED[random.usize(..PREPARED.len())])),
                8..=10 => batch.push(bind(portal, name, parameters)),
                11 => batch.push(named(b'D', b'S', name)),
                12 => batch.push(named(b'D', b'P', portal)),
                13..=15 => batch.push(execute(portal, [0, 2][random.usize(..2)])),
                16 => batch.push(named(b'C', b'S', name)),
                17 => batch.push(named(b'C', b'P', portal)),
                18 => batch.push(message(b'H', &[])),
                19..=20 => batch.extend([sync(), query(BY_NAME[random.usize(..BY_NAME.len())])]),
                _ => batch.push(sync()),
            }
        }
        batch.push(sync());
        batches.push(batch);
    }
    // Nothing stays behind for the next script.
    batches.push(vec![sync(), query("ROLLBACK"), query("DISCARD ALL"), query("DELETE FROM t")]);
    batches
}

/// Both get the same; on a difference the script is shown. False when PostgreSQL itself has crashed.
async fn same(through: &mut Raw, direct: &mut Raw, batches: &[Batch], what: &str) -> bool {
    let patience = Duration::from_secs(15);
    let hangs = |who: &str| format!("{what}: {who} hangs:\n  {}", readable(batches));
    let expected = tokio::time::timeout(patience, run(direct, batches))
        .await
        .unwrap_or_else(|_| panic!("{}", hangs("PostgreSQL")));
    if expected.last().is_some_and(|last| last == "closed") && !batches.iter().flatten().any(|m| m[0] == b'y') {
        return false;
    }
    let empty = [vec![query("DELETE FROM t")]];
    run(direct, &empty).await;
    let heard = tokio::time::timeout(patience, run(through, batches))
        .await
        .unwrap_or_else(|_| panic!("{}", hangs("the gateway")));
    run(through, &empty).await;
    assert_eq!(heard, expected, "{what}:\n  {}", readable(batches));
    true
}

#[tokio::test]
async fn random_scripts_get_the_same_answers_as_from_postgresql() {
    let site = site().await;
    let seed = std::env::var("DIFFERENTIAL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1u64);
    let scripts = std::env::var("DIFFERENTIAL_SCRIPTS").ok().and_then(|s| s.parse().ok()).unwrap_or(600u64);
    let connect = async || {
        let (server, gateway) = (site.cluster.port(), site.address().port());
        // Two clients in turn share the pool's connections: what one prepares, the other finds there.
        let through = [Raw::connect(gateway, "acme_db").await, Raw::connect(gateway, "acme_db").await];
        (Raw::connect(server, "acme_db").await, through)
    };
    let (mut direct, mut through) = connect().await;
    for n in 0..scripts {
        let mut random = fastrand::Rng::with_seed(seed.wrapping_mul(1_000_003).wrapping_add(n));
        let script = random_script(&mut random);
        let what = format!("script {n} of seed {seed}");
        if !same(&mut through[(n % 2) as usize], &mut direct, &script, &what).await {
            eprintln!("{what} crashes PostgreSQL itself");
            eventually(async || site.cluster.admin("acme_db").await.is_ok()).await;
            (direct, through) = connect().await;
        }
    }
}

#[tokio::test]
async fn scripts_with_a_history_get_the_same_answers_as_from_postgresql() {
    let site = site().await;
    let mut direct = Raw::connect(site.cluster.port(), "acme_db").await;
    let mut through = Raw::connect(site.address().port(), "acme_db").await;
    let sum = "SELECT sum(a) FROM t";
    let scripts: Vec<(&str, Vec<Batch>)> = vec![
        (
            "a pipeline of several Syncs, the second fails",
            vec![vec![
                parse("a", "SELECT 1"),
                bind("", "a", &[]),
                execute("", 0),
                sync(),
                parse("b", "SELECT 1/0"),
                bind("", "b", &[]),
                execute("", 0),
                bind("", "a", &[]),
                execute("", 0),
                sync(),
                bind("", "a", &[]),
                execute("", 0),
                sync(),
            ]],
        ),
        (
            "COPY in whose data comes with the query",
            vec![vec![query("COPY t FROM STDIN"), message(b'd', b"5\n"), message(b'c', &[])], vec![query(sum)]],
        ),
        (
            "COPY in that the client fails",
            vec![
                vec![query("COPY t FROM STDIN"), message(b'd', b"6\n"), message(b'f', b"changed my mind\0")],
                vec![query(sum)],
            ],
        ),
        (
            "COPY in with bad data, and more behind it",
            vec![vec![
                query("COPY t FROM STDIN"),
                message(b'd', b"x\n"),
                message(b'd', b"7\n"),
                message(b'c', &[]),
                query(sum),
            ]],
        ),
        (
            "COPY in by the extended protocol",
            vec![
                vec![
                    parse("", "COPY t FROM STDIN"),
                    bind("", "", &[]),
                    execute("", 0),
                    message(b'd', b"8\n"),
                    message(b'c', &[]),
                    sync(),
                ],
                vec![query(sum)],
            ],
        ),
        (
            "a portal that is fetched from in pieces, in a transaction",
            vec![
                vec![query("BEGIN")],
                vec![parse("", "SELECT generate_series(1, 5)"), bind("p", "", &[]), execute("p", 2), sync()],
                vec![execute("p", 2), sync()],
                vec![execute("p", 0), named(b'C', b'P', "p"), sync()],
                vec![query("COMMIT")],
            ],
        ),
        (
            "SQL-level PREPARE, EXECUTE and DEALLOCATE",
            vec![
                vec![query("PREPARE q AS SELECT 42")],
                vec![query("EXECUTE q"), bind("", "q", &[]), execute("", 0), sync()],
                vec![query("DEALLOCATE q"), query("EXECUTE q")],
                vec![query("DISCARD ALL")],
            ],
        ),
        (
            "DISCARD ALL in a pipeline, and the same name again",
            vec![
                vec![parse("z", "SELECT 7"), sync()],
                vec![query("DISCARD ALL"), parse("z", "SELECT 8"), bind("", "z", &[]), execute("", 0), sync()],
                vec![bind("", "z", &[]), execute("", 0), sync()],
                vec![
                    query("BEGIN"),
                    query("DISCARD ALL"),
                    query("ROLLBACK"),
                    bind("", "z", &[]),
                    execute("", 0),
                    sync(),
                ],
            ],
        ),
        (
            "a function call",
            vec![vec![message(b'F', &{
                let mut body = Vec::new();
                body.put_u32(1_598); // random() has no arguments, and its result is of one length: only errors are compared
                body.put_u16(0);
                body.put_u16(1);
                body.put_u32(1);
                body.put_slice(b"1");
                body.put_u16(0);
                body
            })]],
        ),
        (
            "a plan whose result type changes under it",
            vec![
                vec![
                    query("CREATE TABLE u (a int)"),
                    parse("v", "SELECT * FROM u"),
                    bind("", "v", &[]),
                    execute("", 0),
                    sync(),
                ],
                vec![query("ALTER TABLE u ADD b text")],
                vec![bind("", "v", &[]), execute("", 0), sync()],
                vec![
                    named(b'C', b'S', "v"),
                    parse("v", "SELECT * FROM u"),
                    named(b'D', b'S', "v"),
                    bind("", "v", &[]),
                    execute("", 0),
                    sync(),
                ],
                vec![query("DROP TABLE u")],
            ],
        ),
        (
            "what a failed batch decides about statements that the next one uses",
            vec![
                vec![parse("k", "SELECT 'old'"), sync()],
                vec![parse("", "SELECT nowhere"), named(b'C', b'S', "k"), sync(), parse("k", "SELECT 'new'"), sync()],
                vec![bind("", "k", &[]), execute("", 0), sync()],
                vec![parse("", "SELECT nowhere"), parse("l", "SELECT 'A'"), sync(), parse("l", "SELECT 'B'"), sync()],
                vec![bind("", "l", &[]), execute("", 0), sync()],
                vec![
                    parse("", "SELECT nowhere"),
                    bind("", "k", &[]),
                    execute("", 0),
                    sync(),
                    bind("", "k", &[]),
                    execute("", 0),
                    sync(),
                ],
            ],
        ),
        ("a message of a type that does not exist", vec![vec![query("SELECT 1")], vec![message(b'y', &[]), sync()]]),
    ];
    for (what, script) in &scripts {
        assert!(same(&mut through, &mut direct, script, what).await, "{what}: PostgreSQL has closed the connection");
    }
}

/// The texts of the errors and values in what was heard.
fn holds(heard: &[String], text: &str) -> bool {
    heard.iter().any(|message| message.contains(text))
}

#[tokio::test]
async fn what_is_sent_behind_discard_all_stays_with_its_client() {
    let site = Site::start_with(SiteOptions { cluster: "    connections: 5".into(), ..SiteOptions::default() }).await;
    let mut a = Raw::connect(site.address().port(), "acme_db").await;
    let discard_extended = [parse("", "DISCARD ALL"), bind("", "", &[]), execute("", 0), sync()].concat();
    for discard in [query("DISCARD ALL"), discard_extended] {
        run(&mut a, &[vec![query("SET geqo = off")], vec![discard, query("SET statement_timeout = 54321")]]).await;
        let mut b = Raw::connect(site.address().port(), "acme_db").await;
        let heard = run(&mut b, &[vec![query("SHOW statement_timeout")]]).await;
        assert!(!holds(&heard, "54321"), "{heard:?}");
        run(&mut a, &[vec![query("DISCARD ALL")]]).await;
    }
}

#[tokio::test]
async fn no_client_is_answered_with_the_text_of_another() {
    let site = Site::start().await;
    let port = site.address().port();
    let mut other = Raw::connect(port, "acme_db").await;
    run(&mut other, &[vec![parse("s", "SELECT 'A'"), bind("", "s", &[]), execute("", 0), sync()]]).await;
    let mut holder = Raw::connect(port, "acme_db").await;
    run(&mut holder, &[vec![query("BEGIN")]]).await;
    let mut one = Raw::connect(port, "acme_db").await;
    let lost = vec![parse("", "SELECT nowhere"), parse("s1", "SELECT 'A'"), sync(), parse("s1", "SELECT 'B'"), sync()];
    run(&mut one, &[lost]).await;
    let twice = [bind("", "s", &[]), execute("", 0), sync()];
    let heard = run(&mut other, &[[twice.clone(), twice].concat()]).await;
    assert_eq!(heard.iter().filter(|m| m.starts_with("D ") && m.ends_with('A')).count(), 2, "{heard:?}");
    // Nor can one take away what another has prepared.
    for n in 0..10 {
        let away = format!("DEALLOCATE PREPARE cofferdam_{n}");
        run(&mut one, &[vec![parse("", &away), bind("", "", &[]), execute("", 0), sync()]]).await;
    }
    let heard = run(&mut other, &[vec![bind("", "s", &[]), execute("", 0), sync()]]).await;
    assert!(!holds(&heard, "26000"), "{heard:?}");
}

#[tokio::test]
async fn a_copy_that_fails_in_the_middle_of_a_message_gives_its_slot_back() {
    let site = site().await;
    let gate = site.gateway.postgres_plane().unwrap().gates().get("pg").unwrap();
    let mut client = Raw::connect(site.address().port(), "acme_db").await;
    let rest = message(b'd', &vec![b'1'; 100_000]);
    client.send(&[query("COPY t FROM STDIN"), message(b'd', b"bad\n"), rest[..50_000].to_vec()].concat()).await;
    while client.next().await.unwrap().0 != b'Z' {}
    client.send(&[rest[50_000..].to_vec(), message(b'c', b"")].concat()).await;
    eventually(async || gate.usage().running == 0).await;
    let heard = run(&mut client, &[vec![query("SELECT 42")]]).await;
    assert!(holds(&heard, "42"), "{heard:?}");
}

/// The idle limit is for clients that make the server wait, not for those that wait for it.
#[tokio::test]
async fn the_idle_limit_does_not_run_while_the_server_works() {
    let plan = "    idle_in_transaction_timeout: 500ms".to_owned();
    let site = Site::start_with(SiteOptions { plan, ..SiteOptions::default() }).await;
    let mut client = Raw::connect(site.address().port(), "acme_db").await;
    let flushed = [parse("", "SELECT pg_sleep(1.5)"), bind("", "", &[]), execute("", 0), message(b'H', &[])].concat();
    client.send(&flushed).await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    while client.next().await.expect("it is not cut off").0 != b'C' {}
    let heard = run(&mut client, &[vec![sync()]]).await;
    assert!(!holds(&heard, "25P03"), "{heard:?}");
    // A large message behind a slow one is read when its turn comes.
    let large = query(&format!("SELECT length('{}')", "x".repeat(3_000_000)));
    let heard = run(&mut client, &[vec![query("SELECT pg_sleep(1.5)"), large]]).await;
    assert!(holds(&heard, "3000000"), "{heard:?}");
    // And it does run when the client makes the server wait.
    client.send(&query("BEGIN")).await;
    let mut heard = Vec::new();
    while let Some((kind, body)) = client.next().await {
        heard.push(shown(kind, &body));
    }
    assert!(holds(&heard, "25P03"), "{heard:?}");
}

#[tokio::test]
async fn a_changed_configuration_of_the_server_pins_nobody() {
    let site =
        Site::start_with(SiteOptions { slots: 6, cluster: "    connections: 8".into(), ..SiteOptions::default() })
            .await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = Raw::connect(site.address().port(), "acme_db").await;
        run(&mut client, &[vec![query("BEGIN")]]).await;
        clients.push(client);
    }
    for client in &mut clients {
        run(client, &[vec![query("COMMIT")]]).await;
    }
    let admin = site.cluster.admin("postgres").await.unwrap();
    admin.simple_query("ALTER SYSTEM SET timezone = 'Asia/Tokyo'").await.unwrap();
    admin.simple_query("SELECT pg_reload_conf()").await.unwrap();
    for client in clients.iter_mut().chain([&mut Raw::connect(site.address().port(), "acme_db").await]) {
        for _ in 0..3 {
            let heard = run(client, &[vec![query("SELECT 42")]]).await;
            assert!(holds(&heard, "42"), "{heard:?}");
        }
    }
}

/// What was sent is done, also when nobody waits for the answer.
#[tokio::test]
async fn a_client_that_leaves_at_once_has_been_heard() {
    let site = site().await;
    let admin = site.cluster.admin("acme_db").await.unwrap();
    let mut one = Raw::connect(site.address().port(), "acme_db").await;
    let insert = [bind("", "i", &[]), execute("", 0), sync()].concat();
    one.send(&[parse("i", "INSERT INTO t VALUES (1)"), insert.clone(), insert, message(b'X', &[])].concat()).await;
    one.leave().await;
    let mut other = Raw::connect(site.address().port(), "acme_db").await;
    other.send(&[query("DISCARD ALL"), query("INSERT INTO t VALUES (1)"), message(b'X', &[])].concat()).await;
    other.leave().await;
    eventually(async || {
        let row = admin.query_one("SELECT count(*) FROM t", &[]).await.unwrap();
        row.get::<_, i64>(0) == 3
    })
    .await;
}

/// Rule 14: what has changed under a statement has changed under it on every connection. Whoever prepares it anew never
/// notices, wherever it comes to.
#[tokio::test]
async fn a_text_that_is_prepared_anew_is_planned_for_the_tables_of_now() {
    let site = site().await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(Raw::connect(site.address().port(), "acme_db").await);
    }
    let anew = |name: &str| {
        vec![parse(name, "SELECT * FROM w"), named(b'D', b'S', name), bind("", name, &[]), execute("", 0), sync()]
    };
    for round in 0..6 {
        let columns = ["a int", "a text, b int", "b point"][round % 3];
        let made = format!("DROP TABLE IF EXISTS w; CREATE TABLE w ({columns})");
        let in_transaction = vec![vec![query("BEGIN")], vec![query(&made)], vec![query("COMMIT")]];
        let script = if round % 2 == 0 { vec![vec![query(&made)]] } else { in_transaction };
        run(&mut clients[round % 3], &script).await;
        // All at once in a transaction: each has a connection of its own, and all of them come to know the statement.
        for client in &mut clients {
            let heard = run(client, &[vec![query("BEGIN")], anew(&format!("s{round}"))]).await;
            assert!(!heard.iter().any(|m| m.starts_with("E ")), "{round}: {heard:?}");
        }
        for client in &mut clients {
            run(client, &[vec![query("COMMIT")]]).await;
        }
    }
    // Behind our back: who has it prepared is told so, and the next one need not know.
    let admin = site.cluster.admin("acme_db").await.unwrap();
    admin.batch_execute("ALTER TABLE w ADD c int").await.unwrap();
    let heard = run(&mut clients[0], &[vec![bind("", "s5", &[]), execute("", 0), sync()]]).await;
    assert!(holds(&heard, "0A000"), "{heard:?}");
    for client in &mut clients {
        let heard = run(client, &[vec![query("BEGIN")], anew("again")]).await;
        assert!(!heard.iter().any(|m| m.starts_with("E ")), "{heard:?}");
    }
}
