//! Restarts that nobody notices: the listening sockets go from one process to the next.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::HttpClient;
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use cofferdam_testkit::postgres::{Cluster, connect};

const BINARY: &str = env!("CARGO_BIN_EXE_cofferdam");
const ACME: &str = "tenant: acme\nhosts: [acme.example.com]\ndatabase: acme_db\nplacement: { pool: odoo, cluster: pg }\nplan: standard\n";

fn main_file(odoo: SocketAddr, postgres: u16) -> String {
    format!(
        "http: {{ listen: ['127.0.0.1:0'] }}
postgres: {{ listen: ['127.0.0.1:0'] }}
admin: {{ listen: '127.0.0.1:0' }}
pools:
  odoo: {{ servers: [{{ address: '{odoo}' }}], slots: 4, login: {{ role: odoo, password: odoo-secret }} }}
clusters:
  pg: {{ address: '127.0.0.1:{postgres}', slots: 8 }}
plans: {{ standard: {{ max_clients: 1000 }} }}
drain_timeout: 20s
"
    )
}

/// The log of a chain of processes, which all write to the same place.
struct Log(mpsc::Receiver<String>);

impl Log {
    fn of(child: &mut Child) -> Self {
        let (send, lines) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(|l| drop(send.send(l))));
        Self(lines)
    }

    /// The fields of the next line with this message.
    fn wait_for(&self, message: &str) -> serde_json::Value {
        loop {
            let line = self.0.recv_timeout(Duration::from_secs(20)).expect(message);
            let Ok(line) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
            if line["fields"]["message"] == message {
                return line["fields"].clone();
            }
        }
    }

    fn addresses(&self) -> [SocketAddr; 2] {
        ["http", "postgres"].map(|plane| {
            loop {
                let fields = self.wait_for("listening");
                if fields["plane"] == plane {
                    return fields["address"].as_str().unwrap().parse().unwrap();
                }
            }
        })
    }
}

fn serve(directory: &TenantDirectory, handover: &Path) -> Command {
    let mut command = Command::new(BINARY);
    command.args(["serve", "--workers", "2", "--log-format", "json", "--no-watch", "--config"]).arg(directory.path());
    command.arg("--handover").arg(handover).stdin(Stdio::null()).stderr(Stdio::piped());
    command
}

fn signal(name: &str, pid: u32) {
    assert!(Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap().success());
}

fn is_running(pid: u32) -> bool {
    // A process that has ended and is not reaped yet does not run.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Processes of which each has started the next; none is left when a test fails.
struct Chain(Vec<u32>);

impl Drop for Chain {
    fn drop(&mut self) {
        for pid in self.0.iter().filter(|pid| is_running(**pid)) {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        }
    }
}

struct House {
    directory: TenantDirectory,
    _cluster: Cluster,
    _odoo: MiniOdoo,
}

async fn house() -> House {
    let cluster = tokio::task::spawn_blocking(Cluster::start).await.unwrap().unwrap();
    cluster.create_role("odoo", "odoo-secret").await.unwrap();
    cluster.create_database("acme_db", "odoo").await.unwrap();
    let databases = [("acme.example.com".to_owned(), "acme_db".to_owned())].into();
    let odoo = MiniOdoo::start(OdooOptions { workers: 4, databases, ..OdooOptions::default() }).await.unwrap();
    let directory = TenantDirectory::new(&main_file(odoo.http(), cluster.port())).unwrap();
    directory.tenant("acme", ACME).unwrap();
    House { directory, _cluster: cluster, _odoo: odoo }
}

/// Rule 27.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_process_after_the_other_serves_and_no_client_is_refused() {
    let house = house().await;
    let place = tempfile::tempdir().unwrap();
    let handover = place.path().join("handover.sock");
    let mut first = serve(&house.directory, &handover).spawn().unwrap();
    let log = Log::of(&mut first);
    let [http, postgres] = log.addresses();
    log.wait_for("ready");
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let load: Vec<_> = (0..6)
        .map(|n| {
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    if n % 2 == 0 {
                        let mut client = HttpClient::connect(http).await.expect("HTTP connect");
                        let answer = client.get("acme.example.com", "/web/login").await.expect("HTTP request");
                        assert_eq!(answer.status, 200);
                    } else {
                        let port = postgres.port();
                        let client = connect(port, "odoo", "odoo-secret", "acme_db").await.expect("login");
                        client.simple_query("SELECT 1").await.expect("query");
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    // A transaction that is open stays with its process until it has ended.
    let open = connect(postgres.port(), "odoo", "odoo-secret", "acme_db").await.unwrap();
    open.batch_execute("BEGIN; CREATE TEMP TABLE t (n int)").await.unwrap();
    let mut pids = Chain(vec![first.id()]);
    for _ in 0..3 {
        let before = done.load(Ordering::Relaxed);
        signal("USR2", *pids.0.last().unwrap());
        pids.0.push(log.wait_for("SIGUSR2: a successor starts")["pid"].as_u64().unwrap() as u32);
        log.wait_for("the predecessor drains");
        let deadline = Instant::now() + Duration::from_secs(20);
        while done.load(Ordering::Relaxed) < before + 50 {
            assert!(Instant::now() < deadline, "no work is done any more");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert!(is_running(pids.0[0]), "the first still has an open transaction");
    open.batch_execute("INSERT INTO t VALUES (1); COMMIT").await.unwrap();
    assert_eq!(tokio::task::spawn_blocking(move || first.wait()).await.unwrap().unwrap().code(), Some(0));
    // A successor that cannot start changes nothing.
    house.directory.tenant("acme", &ACME.replace("plan: standard", "plan: none")).unwrap();
    let last = *pids.0.last().unwrap();
    signal("USR2", last);
    log.wait_for("the successor has ended");
    let before = done.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(done.load(Ordering::Relaxed) > before && is_running(last));
    stop.store(true, Ordering::Relaxed);
    for client in load {
        client.await.unwrap();
    }
    signal("TERM", last);
    let deadline = Instant::now() + Duration::from_secs(20);
    while pids.0.iter().any(|pid| is_running(*pid)) {
        assert!(Instant::now() < deadline, "a process is left over");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_of_a_service_manager_are_served_and_it_is_told() {
    let house = house().await;
    let place = tempfile::tempdir().unwrap();
    let notify = place.path().join("notify.sock");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    // The shell gives the socket the number that service managers begin with.
    let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=http exec \"$0\" serve --no-watch --log-format json --config \"$1\"";
    let mut child = Command::new("/bin/sh")
        .args(["-c", script, BINARY])
        .arg(house.directory.path())
        .env("NOTIFY_SOCKET", &notify)
        .stdin(OwnedFd::from(socket))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = Log::of(&mut child);
    let [http, _postgres] = log.addresses();
    assert_eq!(http, address);
    let mut client = HttpClient::connect(address).await.unwrap();
    assert_eq!(client.get("acme.example.com", "/web/login").await.unwrap().status, 200);
    let mut told = [0; 200];
    let n = manager.recv(&mut told).unwrap();
    let told = String::from_utf8_lossy(&told[..n]).into_owned();
    assert!(told.contains("READY=1") && told.contains(&format!("MAINPID={}", child.id())), "{told}");
    signal("TERM", child.id());
    assert_eq!(tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap().code(), Some(0));
}
