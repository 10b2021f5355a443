//! Workers of an Odoo on the gateway's machine, which are processes: what they compute is seen, and they give way.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::Target;
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions, Program};
use tokio::task::JoinSet;

/// A gateway in front of a miniature Odoo.
struct Gateway {
    child: Child,
    http: SocketAddr,
    admin: SocketAddr,
    /// What it has logged.
    lines: mpsc::Receiver<String>,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Gateway {
    fn start(directory: &TenantDirectory) -> Self {
        Self::start_with(directory, &[])
    }

    fn start_with(directory: &TenantDirectory, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
        command.args(["serve", "--log-format", "json", "--no-watch", "--config"]).arg(directory.path()).args(arguments);
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (send, lines) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(|line| drop(send.send(line))));
        let (mut http, mut admin) = (None, None);
        while http.is_none() || admin.is_none() {
            let line = lines.recv_timeout(Duration::from_secs(30)).expect("it listens");
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            let fields = &line["fields"];
            if fields["message"] == "listening" {
                let address = fields["address"].as_str().unwrap().parse().unwrap();
                *(if fields["plane"] == "admin" { &mut admin } else { &mut http }) = Some(address);
            }
        }
        Self { child, http: http.unwrap(), admin: admin.unwrap(), lines }
    }

    async fn metric(&self, name: &str) -> f64 {
        let text = Target::logged_in(self.admin, "localhost", "/metrics").once().await.unwrap().text();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Workers that give way.
    async fn lowered(&self) -> usize {
        self.metric("cofferdam_http_server_workers_lowered").await as usize
    }

    fn target(&self, tenant: &str, path: &str) -> Target {
        Target::logged_in(self.http, format!("{tenant}.example.com"), path)
    }
}

fn house(odoo: &MiniOdoo, slots: usize, pool: &str) -> TenantDirectory {
    let main = format!(
        "http: {{ listen: ['127.0.0.1:0'] }}\nadmin: {{ listen: '127.0.0.1:0' }}\npools:\n  odoo:\n    servers: [{{ address: '{}' }}]\n    \
         slots: {slots}\n    {pool}\nplans: {{ standard: {{ http: {{ queue: 100, max_wait: 60s }} }} }}\n",
        odoo.http()
    );
    let directory = TenantDirectory::new(&main).unwrap();
    for name in ["acme", "bolt"] {
        let tenant =
            format!("tenant: {name}\nhosts: [{name}.example.com]\nplacement: {{ pool: odoo }}\nplan: standard\n");
        directory.tenant(name, &tenant).unwrap();
    }
    directory
}

async fn prefork(workers: usize) -> MiniOdoo {
    let arguments = vec!["bench".into(), "odoo-worker".into()];
    let program = Program { path: env!("CARGO_BIN_EXE_cofferdam").into(), arguments };
    MiniOdoo::start(OdooOptions { workers, prefork: Some(program), ..OdooOptions::default() }).await.unwrap()
}

async fn eventually(mut check: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !check().await {
        assert!(Instant::now() < deadline, "it did not happen within 30 s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The workers that this very process has started.
fn workers() -> Vec<u32> {
    let threads = fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap().path().join("children"));
    let children = threads.map(|children| fs::read_to_string(children).unwrap_or_default()).collect::<String>();
    let is_worker = |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.ends_with(b"odoo-worker\0"));
    children.split_ascii_whitespace().map(|pid| pid.parse().unwrap()).filter(is_worker).collect()
}

/// The `nice` values of all threads of a process.
fn nice(pid: u32) -> Vec<i64> {
    stat(pid, 16)
}

/// The policies of all threads of a process: 0 for ordinary ones, 5 for those that run on what others leave.
fn policy(pid: u32) -> Vec<i64> {
    stat(pid, 38)
}

/// What the system says of all threads of a process in one place behind their names.
fn stat(pid: u32, n: usize) -> Vec<i64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    let stats = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("stat")).ok());
    stats.map(|stat| stat.rsplit_once(") ").unwrap().1.split(' ').nth(n).unwrap().parse().unwrap()).collect()
}

/// The workers all of whose threads, and there are several, have a value.
fn with(value: i64) -> usize {
    workers().into_iter().map(nice).filter(|nice| nice.len() > 1 && nice.iter().all(|n| *n == value)).count()
}

/// Whether this process may lower the `nice` value of others again.
fn may_prioritise() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() >> 23 & 1 == 1
}

/// Odoo with `workers` serves one request per process, with whichever of its threads, and whosever comes next: the process gives way
/// while it computes for long, and not after that. Whoever comes after a gateway that was killed meanwhile gives back what is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_gives_way_while_it_computes_for_long_and_gets_its_priority_back() {
    let odoo = prefork(4).await;
    let directory = house(&odoo, 4, "priorities: { storm: 3, expensive: 7 }");
    let gateway = Gateway::start(&directory);
    eventually(async || workers().len() == 4 && workers().into_iter().all(|pid| nice(pid).len() > 1)).await;
    let usual = nice(std::process::id())[0];
    if !may_prioritise() {
        eprintln!("CAP_SYS_NICE is missing: it is shown only that nothing is touched");
    }
    let lowered = usize::from(may_prioritise());
    let gives_way = async || with(usual + 7) == lowered && with(usual) == 4 - lowered;

    let long = gateway.target("acme", "/testkit/work?compute=3000");
    let computing = tokio::spawn(async move { long.once().await.unwrap().status });
    eventually(gives_way).await;
    assert_eq!(gateway.lowered().await, lowered);
    assert_eq!(computing.await.unwrap(), 200);
    eventually(async || with(usual) == 4).await;

    // One that only waits is in nobody's way.
    let waiting = gateway.target("bolt", "/testkit/work?wait=1500");
    let waiting = tokio::spawn(async move { waiting.once().await.unwrap().status });
    while !waiting.is_finished() {
        assert_eq!(with(usual), 4);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(waiting.await.unwrap(), 200);

    // Workers that are new are found.
    let old = workers();
    for pid in &old {
        assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
    }
    let is_new = |pid: u32| !old.contains(&pid) && nice(pid).len() > 1;
    eventually(async || workers().len() == 4 && workers().into_iter().all(is_new)).await;
    let long = gateway.target("acme", "/testkit/work?compute=6000");
    let computing = tokio::spawn(async move { long.once().await });
    eventually(gives_way).await;

    // The gateway is killed in the middle of it, and another comes.
    drop(gateway);
    assert!(gives_way().await);
    let gateway = Gateway::start(&directory);
    let _ = computing.await;
    eventually(async || {
        let waiting = gateway.target("bolt", "/testkit/work?wait=50").once().await.unwrap();
        waiting.status == 200 && with(usual) == 4
    })
    .await;
}

/// In real time (policy 2) they take a core from all others, so nothing else of the gateway may be: neither its other threads nor those
/// that they start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_threads_that_serve_run_in_real_time_when_told_to_and_no_others() {
    let odoo = prefork(1).await;
    let directory = house(&odoo, 1, "min_slots: 1");
    for arguments in [&["--real-time", "--workers", "2"][..], &[]] {
        let gateway = Gateway::start_with(&directory, arguments);
        let served = gateway.target("acme", "/testkit/work?wait=1").once().await.unwrap();
        assert_eq!(served.status, 200);
        let threads = fs::read_dir(format!("/proc/{}/task", gateway.child.id())).unwrap();
        let threads: Vec<(String, String)> = threads
            .filter_map(|thread| {
                let stat = fs::read_to_string(thread.ok()?.path().join("stat")).ok()?;
                let (name, fields) = stat.rsplit_once(") ")?;
                Some((name.split_once('(')?.1.to_owned(), fields.split(' ').nth(38)?.to_owned()))
            })
            .collect();
        let real: Vec<&String> = threads.iter().filter(|(_, policy)| policy == "2").map(|(name, _)| name).collect();
        let wanted = if arguments.is_empty() || !may_prioritise() { 0 } else { 2 };
        assert_eq!(real.len(), wanted, "{threads:?}");
        assert!(real.iter().all(|name| name.starts_with("cofferdam-")), "{threads:?}");
    }
}

/// A storm's short requests too, and from the beginning; whoever gives way by all that there is runs on what others leave.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_of_a_storm_run_on_what_others_leave_and_are_ordinary_ones_after_it() {
    if !may_prioritise() {
        eprintln!("SKIPPED: needs CAP_SYS_NICE");
        return;
    }
    let odoo = prefork(4).await;
    let gateway = Gateway::start(&house(&odoo, 4, "priorities: {}"));
    eventually(async || workers().len() == 4 && workers().into_iter().all(|pid| nice(pid).len() > 1)).await;
    let all = |pid: u32, wanted: i64| policy(pid).len() > 1 && policy(pid).iter().all(|policy| *policy == wanted);
    let mut storm = JoinSet::new();
    for _ in 0..12 {
        let target = gateway.target("acme", "/testkit/work?compute=20");
        storm.spawn(async move { while target.once().await.is_ok() {} });
    }
    eventually(async || workers().into_iter().any(|pid| all(pid, 5))).await;
    storm.abort_all();
    while storm.join_next().await.is_some() {}
    eventually(async || workers().into_iter().all(|pid| all(pid, 0)) && with(nice(std::process::id())[0]) == 4).await;
}

/// Nobody has to ask for it where the number of slots adapts: what computes waits for one of the machine's cores while
/// another tenant has modest work.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_computes_at_workers_waits_for_the_machines_cores() {
    // The machine's, whichever of them this process may use.
    let cores = fs::read_to_string("/proc/cpuinfo").unwrap().lines().filter(|l| l.starts_with("processor")).count();
    if cores > 8 {
        eprintln!("SKIPPED: to keep more than {cores} cores busy would be in everybody's way");
        return;
    }
    let odoo = prefork(cores + 6).await;
    let directory = house(&odoo, cores + 6, &format!("min_slots: {}", cores + 5));
    let gateway = Gateway::start(&directory);
    let mut work = JoinSet::new();
    for _ in 0..5 + cores {
        let target = gateway.target("acme", "/testkit/work?compute=700");
        work.spawn(async move { while target.once().await.is_ok() {} });
    }
    eventually(async || odoo.busy() > cores as u32).await;
    let modest = gateway.target("bolt", "/testkit/work?wait=2");
    work.spawn(async move { while modest.once().await.is_ok() {} });
    // The modest one may be busy too.
    eventually(async || {
        for _ in 0..10 {
            if odoo.busy() > cores as u32 + 1 {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        true
    })
    .await;
    // And it is seen.
    eventually(async || gateway.metric("cofferdam_gate_busy_cores").await > 0.0).await;
    work.abort_all();
}

/// A process that serves many requests at once is nobody's alone: it is not touched, and that is said once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_serves_many_requests_in_one_process_is_left_alone() {
    let odoo = MiniOdoo::start(OdooOptions { workers: 4, ..OdooOptions::default() }).await.unwrap();
    let gateway = Gateway::start(&house(&odoo, 4, "priorities: {}"));
    let before = nice(std::process::id())[0];
    for _ in 0..3 {
        let long = gateway.target("acme", "/testkit/work?compute=700").once().await.unwrap();
        assert_eq!(long.status, 200);
        assert!(nice(std::process::id()).iter().all(|nice| *nice == before));
    }
    assert_eq!(gateway.lowered().await, 0);
    let said: Vec<_> =
        gateway.lines.try_iter().filter(|line| line.contains("priorities of workers are not set")).collect();
    assert_eq!(said.len(), 1, "{said:?}");
}
