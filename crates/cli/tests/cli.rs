//! The binary as a person or a service manager uses it.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::{HttpClient, Target};
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};

const BINARY: &str = env!("CARGO_BIN_EXE_cofferdam");
const ACME: &str =
    "tenant: acme\nhosts: [acme.example.com]\ndatabase: acme_db\nplacement: { pool: odoo }\nplan: standard\n";

fn main_file(odoo: &str) -> String {
    format!(
        "http: {{ listen: ['127.0.0.1:0'] }}\nadmin: {{ listen: '127.0.0.1:0' }}\npools:\n  odoo: {{ servers: [{{ address: '{odoo}' }}], slots: 4 }}\nplans: {{ standard: {{}} }}\n"
    )
}

fn cofferdam(args: &[&str]) -> Output {
    Command::new(BINARY).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A gateway in a process of its own, with its log lines.
struct Serving {
    child: Child,
    lines: mpsc::Receiver<String>,
    http: SocketAddr,
}

impl Serving {
    fn start(directory: &TenantDirectory) -> Self {
        Self::start_by(Command::new(BINARY), directory)
    }

    /// Started by a command that runs the program with the arguments that are added to it.
    fn start_by(mut command: Command, directory: &TenantDirectory) -> Self {
        let mut child = command
            .args(["serve", "--log-format", "json", "--config"])
            .arg(directory.path())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (send, lines) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(|l| drop(send.send(l))));
        let mut this = Self { child, lines, http: SocketAddr::from(([127, 0, 0, 1], 0)) };
        loop {
            let line = this.next_line();
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            let fields = &line["fields"];
            if fields["plane"] == "http" {
                this.http = fields["address"].as_str().unwrap().parse().unwrap();
            }
            if fields["message"] == "ready" {
                return this;
            }
        }
    }

    fn next_line(&self) -> String {
        self.lines.recv_timeout(Duration::from_secs(20)).expect("no log line within 20 s")
    }

    fn wait_for(&self, what: &str) -> String {
        loop {
            let line = self.next_line();
            if line.contains(what) {
                return line;
            }
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    async fn exit_code(mut self) -> Option<i32> {
        tokio::task::spawn_blocking(move || self.child.wait().unwrap().code()).await.unwrap()
    }
}

async fn odoo() -> MiniOdoo {
    let databases = [("acme.example.com".to_owned(), "acme_db".to_owned())].into();
    MiniOdoo::start(OdooOptions { workers: 4, databases, ..OdooOptions::default() }).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_finishes_what_is_in_flight_and_exits_with_0() {
    let odoo = odoo().await;
    let directory = TenantDirectory::new(&main_file(&odoo.http().to_string())).unwrap();
    directory.tenant("acme", ACME).unwrap();
    let serving = Serving::start(&directory);
    let requests: Vec<_> = (0..12)
        .map(|_| {
            let target = Target::logged_in(serving.http, "acme.example.com", "/web?ms=400");
            tokio::spawn(async move { target.once().await })
        })
        .collect();
    let idle = HttpClient::connect(serving.http).await.unwrap();
    while odoo.busy() < 4 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // All twelve are in the gateway by now, eight of them waiting for a worker.
    tokio::time::sleep(Duration::from_millis(100)).await;
    serving.signal("TERM");
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap().status, 200);
    }
    assert_eq!(serving.exit_code().await, Some(0));
    drop(idle);
}

/// A command that runs the program with a file system of a mebibyte in a directory, or nothing where that is not permitted.
fn with_little_disk(directory: &Path) -> Option<Command> {
    let mut command = Command::new("unshare");
    let mount = "mount -t tmpfs -o size=1m none \"$1\" && shift && exec \"$@\"";
    command.args(["-r", "-m", "sh", "-c", mount, "sh"]).arg(directory);
    let mut probe = Command::new("unshare");
    probe.args(command.get_args()).arg("true").stderr(Stdio::null());
    let is_permitted = probe.status().is_ok_and(|status| status.success());
    command.arg(BINARY);
    is_permitted.then_some(command)
}

/// Bodies that wait are refused with a word on when to come again; answers that do not fit come as fast as their client reads; and
/// what is small goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_costs_large_bodies_their_turn_and_nobody_an_answer() {
    let odoo = odoo().await;
    let spool = tempfile::tempdir().unwrap();
    let Some(command) = with_little_disk(spool.path()) else {
        eprintln!("SKIPPED: a file system of its own may not be mounted here");
        return;
    };
    let settings = format!("spool_threshold: 64KiB, spool_directory: '{}', listen:", spool.path().display());
    let directory =
        TenantDirectory::new(&main_file(&odoo.http().to_string()).replacen("listen:", &settings, 1)).unwrap();
    directory.tenant("acme", ACME).unwrap();
    let serving = Serving::start_by(command, &directory);
    for round in 0..20 {
        let mut slow = HttpClient::connect(serving.http).await.unwrap();
        let head = "GET /web/content/6000000 HTTP/1.1\r\nHost: acme.example.com\r\nCookie: session_id=0123456789abcdef\r\n\r\n";
        slow.send(head.as_bytes()).await.unwrap();
        serving.wait_for("not read ahead of its client");
        let mut large = HttpClient::connect(serving.http).await.unwrap();
        let body = vec![b'x'; 3 << 20];
        let refused = large.request("POST", "acme.example.com", "/testkit/echo", &[], &body).await.unwrap();
        assert_eq!(refused.status, 503, "{round}: {}", refused.text());
        assert_eq!(refused.header("retry-after"), Some("30"));
        let mut small = HttpClient::connect(serving.http).await.unwrap();
        let echo = small.request("POST", "acme.example.com", "/testkit/echo", &[], &body[..1000]).await.unwrap();
        assert!(echo.status == 200 && echo.text().contains("1000 bytes"), "{round}: {}", echo.text());
        let answer = slow.response(false).await.unwrap();
        assert_eq!((answer.status, answer.body.len()), (200, 6_000_000), "{round}");
    }
    assert_eq!(odoo.busy(), 0, "a worker is still held");
    serving.signal("TERM");
    assert_eq!(serving.exit_code().await, Some(0));
}

/// `SHUTDOWN` at the console is what PgBouncer's operators know: the process finishes what is in flight and ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_at_the_console_ends_the_process() {
    let port = cofferdam_testkit::postgres::free_port().unwrap();
    let main = format!(
        "http: {{ listen: ['127.0.0.1:0'] }}\npostgres:\n  listen: ['127.0.0.1:{port}']\n  console: {{ admins: [{{ role: chief, password: x }}] }}\n"
    );
    let directory = TenantDirectory::new(&main).unwrap();
    let serving = Serving::start(&directory);
    let console = cofferdam_testkit::postgres::connect(port, "chief", "x", "pgbouncer").await.unwrap();
    console.simple_query("SHUTDOWN").await.unwrap();
    drop(console);
    let code = tokio::time::timeout(Duration::from_secs(20), serving.exit_code()).await.expect("it goes on");
    assert_eq!(code, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_reads_the_configuration_again_and_errors_change_nothing() {
    let odoo = odoo().await;
    let directory = TenantDirectory::new(&main_file(&odoo.http().to_string())).unwrap();
    directory.tenant("acme", ACME).unwrap();
    let serving = Serving::start(&directory);
    directory.tenant("acme", &ACME.replace("plan: standard", "plan: nonsense")).unwrap();
    serving.signal("HUP");
    let line = serving.wait_for("configuration error");
    assert!(line.contains("acme.yaml:5:7: plan: found `nonsense`"), "{line}");
    serving.wait_for("the running one is unchanged");
    let ask =
        async |host: &str| HttpClient::connect(serving.http).await.unwrap().get(host, "/web").await.unwrap().status;
    assert_eq!(ask("acme.example.com").await, 200);
    directory.tenant("acme", &ACME.replace("acme.example.com", "neu.example.com")).unwrap();
    serving.signal("HUP");
    serving.wait_for("configuration reloaded");
    assert_eq!((ask("acme.example.com").await, ask("neu.example.com").await), (421, 303));
    serving.signal("INT");
    assert_eq!(serving.exit_code().await, Some(0));
}

#[test]
fn check_prints_every_error_with_its_line_and_exits_with_3() {
    let directory = TenantDirectory::new(&main_file("127.0.0.1:8069")).unwrap();
    directory.tenant("acme", ACME).unwrap();
    let path = directory.path();
    let path = path.to_str().unwrap();
    let fine = cofferdam(&["check", path]);
    assert_eq!(fine.status.code(), Some(0), "{}", text(&fine.stderr));
    assert!(text(&fine.stdout).contains("ok (1 tenants, 1 pools"), "{}", text(&fine.stdout));

    directory.tenant("acme", &ACME.replace("plan: standard", "plan: gold\npasword: x")).unwrap();
    directory.main(&main_file("127.0.0.1:8069").replace("slots: 4", "slots: none")).unwrap();
    let wrong = cofferdam(&["check", path]);
    assert_eq!(wrong.status.code(), Some(3));
    let message = text(&wrong.stderr);
    for part in ["cofferdam.yaml:4:", "pools.odoo.slots", "acme.yaml:6:1: pasword", "2 errors", "slots: none }", "^"] {
        assert!(message.contains(part), "{part} is missing in\n{message}");
    }
    let json = cofferdam(&["check", "--json", path]);
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((report["ok"].as_bool(), report["errors"].as_array().unwrap().len()), (Some(false), 2));
    let serve = cofferdam(&["serve", "--config", path]);
    assert_eq!(serve.status.code(), Some(3));
    let missing = cofferdam(&["check", "/nonexistent/cofferdam.yaml"]);
    assert_eq!(missing.status.code(), Some(3));
    assert!(text(&missing.stderr).contains("No such file"), "{}", text(&missing.stderr));
}

#[test]
fn help_completions_and_schemas_are_there() {
    let help = text(&cofferdam(&["--help"]).stdout);
    assert!(help.contains("Exit codes:") && help.contains("cofferdam demo"), "{help}");
    for command in ["serve", "check", "demo", "completions", "schema"] {
        let help = cofferdam(&[command, "--help"]);
        assert!(help.status.success() && help.stdout.len() > 100, "{command}");
    }
    assert!(text(&cofferdam(&["completions", "bash"]).stdout).contains("_cofferdam"));
    let schema: serde_json::Value = serde_json::from_slice(&cofferdam(&["schema", "tenant"]).stdout).unwrap();
    assert!(schema["properties"]["placement"].is_object());
    assert_eq!(cofferdam(&["nonsense"]).status.code(), Some(2));
}

#[test]
fn the_demo_runs_without_a_terminal_and_ends_by_itself() {
    let out = cofferdam(&["demo", "--seconds", "9"]);
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    assert!(out.status.success(), "{stdout}\n{stderr}");
    for part in ["1/3", "2/3", "3/3", "noisy-group", "unprotected", "protected", "p99"] {
        assert!(stdout.contains(part), "{part} is missing in\n{stdout}");
    }
    assert!(!stdout.contains('\u{1b}'), "escape sequences without a terminal");
}

#[test]
fn the_demo_cleans_up_after_control_c() {
    let mut child = Command::new(BINARY).args(["demo", "--seconds", "60"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|l| l.contains("1/3")));
    let pid = child.id().to_string();
    let servers = || text(&Command::new("pgrep").args(["-f", "cofferdam-pg-.*/data"]).output().unwrap().stdout);
    let mine: Vec<String> = servers().lines().map(str::to_owned).collect();
    assert!(!mine.is_empty());
    let directories = demo_directories(&mine);
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    // Of this demo nothing is left; other tests may run servers of their own.
    let gone = |d: &String| !Path::new(d).exists();
    assert!(directories.iter().any(gone), "the demo left its directory behind: {directories:?}");
}

fn demo_directories(pids: &[String]) -> Vec<String> {
    let line = |pid: &String| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    pids.iter()
        .map(|pid| text(&line(pid)).replace('\0', " "))
        .filter_map(|line| {
            line.split(' ').find(|w| w.contains("cofferdam-pg-") && w.ends_with("/data")).map(str::to_owned)
        })
        .collect()
}
