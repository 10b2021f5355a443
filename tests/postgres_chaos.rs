//! Everything that can break breaks: clients and servers that are cut off at every byte, server processes that are killed.
//! Nothing hangs, nothing is left behind, and no answer is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use cofferdam_testkit::postgres::{ClusterOptions, connect};
use cofferdam_tests::{POOL_LOGIN, Site, SiteOptions, eventually, main_file};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_postgres::{Client, SimpleQueryMessage};

async fn value(client: &Client, sql: &str) -> Result<String, tokio_postgres::Error> {
    let rows = client.simple_query(sql).await?;
    let row = rows.iter().rev().find_map(|m| if let SimpleQueryMessage::Row(row) = m { Some(row) } else { None });
    Ok(row.and_then(|row| row.get(0)).unwrap_or_default().to_owned())
}

/// A proxy that passes on so many bytes in each direction and then cuts the connection, by turns with and without a word.
struct Cutter {
    port: u16,
    /// Bytes from the server, and from the client, before the cut.
    down: Arc<AtomicUsize>,
    up: Arc<AtomicUsize>,
}

impl Cutter {
    async fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (down, up) = (Arc::new(AtomicUsize::new(usize::MAX)), Arc::new(AtomicUsize::new(usize::MAX)));
        let limits = (Arc::clone(&down), Arc::clone(&up));
        tokio::spawn(async move {
            let mut resets = false;
            loop {
                let (client, _) = listener.accept().await.unwrap();
                resets = !resets;
                let (down, up) = (limits.0.load(Ordering::SeqCst), limits.1.load(Ordering::SeqCst));
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(("127.0.0.1", to)).await else { return };
                    if resets {
                        let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
                        let _ = socket2::SockRef::from(&server).set_linger(Some(Duration::ZERO));
                    }
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = server.into_split();
                    let up = async { copy(&mut from_client, &mut to_server, up).await };
                    let down = async { copy(&mut from_server, &mut to_client, down).await };
                    // Whichever is over first takes the other with it.
                    tokio::select! { () = up => {}, () = down => {} }
                });
            }
        });
        Self { port, down, up }
    }

    fn heal(&self) {
        self.down.store(usize::MAX, Ordering::SeqCst);
        self.up.store(usize::MAX, Ordering::SeqCst);
    }
}

async fn copy(from: &mut (impl AsyncReadExt + Unpin), to: &mut (impl AsyncWriteExt + Unpin), mut left: usize) {
    let mut buffer = [0; 4_096];
    while left > 0 {
        let most = buffer.len().min(left);
        match from.read(&mut buffer[..most]).await {
            Ok(n) if n > 0 => {
                left -= n;
                if to.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}

/// No slot is held, nobody waits, no server connection is lost count of, and nothing is open at the server.
async fn nothing_is_left(site: &Site) {
    let plane = site.gateway.postgres_plane().unwrap();
    let gate = plane.gates().get("pg").unwrap();
    eventually(async || {
        let usage = (gate.usage(), plane.usage());
        let (connections, clients) = (usage.1.connections["pg"], &usage.1.clients);
        usage.0.running == 0 && usage.0.waiting == 0 && connections.open == connections.idle && clients.is_empty()
    })
    .await;
    let admin = site.cluster.admin("postgres").await.unwrap();
    let open = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'odoo' AND xact_start IS NOT NULL";
    eventually(async || admin.query_one(open, &[]).await.unwrap().get::<_, i64>(0) == 0).await;
}

/// Where it is cut, in turns for each direction: at every byte with `CHAOS_STEP=1`, at every fifth usually.
fn offsets(end: usize) -> impl Iterator<Item = usize> {
    let step = std::env::var("CHAOS_STEP").ok().and_then(|s| s.parse().ok()).unwrap_or(5);
    (0..end).step_by(step)
}

/// What a client does in these tests: something of each protocol. The sum of what it has seen.
async fn work(client: &mut Client) -> Result<i64, tokio_postgres::Error> {
    client.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await?;
    let row = client.query_one("SELECT $1::int8 + 41", &[&1i64]).await?;
    let sink = client.copy_in("COPY t FROM STDIN").await?;
    let mut sink = std::pin::pin!(sink);
    futures_util::SinkExt::send(&mut sink, bytes::Bytes::from_static(b"2\n3\n")).await?;
    sink.finish().await?;
    client.batch_execute("ROLLBACK").await?;
    Ok(row.get(0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_are_cut_off_at_any_byte_leave_nothing_behind() {
    let site = Site::start().await;
    let admin = site.cluster.admin("acme_db").await.unwrap();
    admin.batch_execute("CREATE TABLE t (n int); ALTER TABLE t OWNER TO odoo").await.unwrap();
    let cutter = Cutter::start(site.address().port()).await;
    let attempt = async || {
        let mut client = connect(cutter.port, POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.ok()?;
        work(&mut client).await.ok()
    };
    assert_eq!(attempt().await, Some(42));
    let mut finished = 0;
    for n in offsets(760) {
        let (limit, other) = if n % 2 == 0 { (&cutter.up, &cutter.down) } else { (&cutter.down, &cutter.up) };
        limit.store(n, Ordering::SeqCst);
        other.store(usize::MAX, Ordering::SeqCst);
        let outcome = tokio::time::timeout(Duration::from_secs(20), attempt()).await;
        let outcome = outcome.unwrap_or_else(|_| panic!("cut after {n} bytes, it hangs"));
        assert!(outcome.is_none_or(|seen| seen == 42), "{outcome:?}");
        finished += u32::from(outcome.is_some());
    }
    assert!(finished < offsets(700).count() as u32, "hardly anything was cut: {finished}");
    nothing_is_left(&site).await;
    cutter.heal();
    assert_eq!(attempt().await, Some(42));
    assert_eq!(admin.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_are_cut_off_at_any_byte_are_survived() {
    let site = Site::start().await;
    let admin = site.cluster.admin("acme_db").await.unwrap();
    admin.batch_execute("CREATE TABLE t (n int); ALTER TABLE t OWNER TO odoo").await.unwrap();
    let cutter = Cutter::start(site.cluster.port()).await;
    let options = SiteOptions { cluster: "    reconnect_wait: 50ms\n".into(), ..SiteOptions::default() };
    site.directory.main(&main_file(cutter.port, &options)).unwrap();
    site.gateway.reload().await.unwrap();
    let port = site.address().port();
    // The greeting is known, so that a login needs no server.
    drop(connect(port, POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.unwrap());
    let plane = site.gateway.postgres_plane().unwrap();
    for n in offsets(700) {
        let (limit, other) = if n % 2 == 0 { (&cutter.up, &cutter.down) } else { (&cutter.down, &cutter.up) };
        limit.store(n, Ordering::SeqCst);
        other.store(usize::MAX, Ordering::SeqCst);
        // A new connection each time: the limits are those of its beginning.
        let attempt = async {
            let mut client = connect(port, POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.ok()?;
            work(&mut client).await.ok()
        };
        let outcome = tokio::time::timeout(Duration::from_secs(20), attempt).await;
        let outcome = outcome.unwrap_or_else(|_| panic!("cut after {n} bytes, it hangs"));
        assert!(outcome.is_none_or(|seen| seen == 42), "{outcome:?}");
    }
    cutter.heal();
    eventually(async || {
        let Ok(mut client) = connect(port, POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await else { return false };
        work(&mut client).await.is_ok_and(|seen| seen == 42)
    })
    .await;
    nothing_is_left(&site).await;
    assert!(plane.usage().connections["pg"].open <= 4);
    assert_eq!(admin.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0), 0);
}

/// Server processes are ended hundreds of times, and now and then one is killed so that the server restarts: what a client
/// was told is committed is there, and what it was told has failed is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_committed_is_there_however_many_server_processes_are_killed() {
    let settings = vec!["synchronous_commit = on".to_owned()];
    let server = ClusterOptions { settings, ..ClusterOptions::default() };
    let site = Site::start_with(SiteOptions { slots: 8, server, ..SiteOptions::default() }).await;
    let admin = site.cluster.admin("acme_db").await.unwrap();
    admin.batch_execute("CREATE TABLE t (who int, n int); ALTER TABLE t OWNER TO odoo").await.unwrap();
    let port = site.address().port();
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..6)
        .map(|who| {
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            tokio::spawn(async move {
                let (mut committed, mut doubtful, mut failed) = (Vec::new(), Vec::new(), 0u32);
                let mut client = None;
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let Some(connected) = &client else {
                        client = connect(port, POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.ok();
                        continue;
                    };
                    let insert = format!("INSERT INTO t VALUES ({who}, {n})");
                    let own = value(connected, &format!("SELECT {n}")).await;
                    // The answer to somebody else's question would be the end of everything.
                    assert!(own.as_ref().is_ok_and(|v| *v == n.to_string()) || own.is_err(), "{own:?} for {n}");
                    match connected.batch_execute(&insert).await {
                        Ok(()) => committed.push(n),
                        // Ended while it committed, perhaps.
                        Err(_) => doubtful.push(n),
                    }
                    if connected.is_closed() {
                        failed += 1;
                        client = None;
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
                (committed, doubtful, failed)
            })
        })
        .collect();
    let mut admin = site.cluster.admin("postgres").await.unwrap();
    for round in 0..240 {
        let pid = "SELECT pid FROM pg_stat_activity WHERE usename = 'odoo' ORDER BY random() LIMIT 1";
        let Ok(Some(row)) = admin.query_opt(pid, &[]).await else { continue };
        let pid: i32 = row.get(0);
        if round % 80 == 79 {
            // Killed like this, the server takes all its processes down and recovers.
            let _ = std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status();
            eventually(async || match site.cluster.admin("postgres").await {
                Ok(again) => {
                    admin = again;
                    true
                }
                Err(_) => false,
            })
            .await;
        } else {
            let _ = admin.execute("SELECT pg_terminate_backend($1)", &[&pid]).await;
        }
        tokio::time::sleep(Duration::from_millis(8)).await;
    }
    let before = done.load(Ordering::Relaxed);
    eventually(async || done.load(Ordering::Relaxed) > before + 50).await;
    stop.store(true, Ordering::Relaxed);
    let admin = site.cluster.admin("acme_db").await.unwrap();
    let mut noticed = 0;
    for (who, client) in clients.into_iter().enumerate() {
        let (committed, doubtful, failed) = client.await.unwrap();
        noticed += failed;
        let rows = admin.query("SELECT n FROM t WHERE who = $1", &[&i32::try_from(who).unwrap()]).await.unwrap();
        let there: std::collections::HashSet<i32> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(there.len(), rows.len(), "something was done twice");
        let lost = committed.iter().filter(|n| !there.contains(n)).count();
        assert_eq!(lost, 0, "of {}", committed.len());
        let invented = there.iter().filter(|n| !committed.contains(n) && !doubtful.contains(n)).count();
        assert_eq!(invented, 0, "rows that nobody has written");
    }
    assert!(noticed > 20, "hardly anybody was hit: {noticed}");
    nothing_is_left(&site).await;
}
