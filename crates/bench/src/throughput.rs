//! What a pooler costs: `pgbench` directly, through PgBouncer and through Cofferdam, in turn; and what ten thousand
//! idle clients cost.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use cofferdam_testkit::postgres::{Cluster, ClusterOptions};
use cofferdam_testkit::tools::{self, Output, Target, postgres_tool};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::Instant;

use crate::peers::{Behind, Peer, Running, knows_statements};
use crate::plot::{Bar, Group, bars};

const DATABASE: &str = "pgbench";
const PASSWORD: &str = "throughput-secret";
/// Connections to the server, the same for every pooler.
const POOL: u32 = 20;
/// One transaction of so many is written down for the percentiles: writing costs the load generator time.
const SAMPLED: f64 = 0.2;

/// What a transaction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Script {
    /// One row by its key: `pgbench -S`.
    Select,
    /// The one like TPC-B, of seven statements, on a scale that conflicts little.
    TpcB,
}

/// How statements are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // pgbench's words
pub enum Protocol {
    Simple,
    Extended,
    Prepared,
}

impl Protocol {
    fn as_str(self) -> &'static str {
        match self {
            Self::Simple => "simple",
            Self::Extended => "extended",
            Self::Prepared => "prepared",
        }
    }
}

impl Script {
    fn as_str(self) -> &'static str {
        match self {
            Self::Select => "select",
            Self::TpcB => "tpcb",
        }
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Through whom.
    pub peers: Vec<Peer>,
    /// What a transaction is.
    pub scripts: Vec<Script>,
    /// How statements are sent.
    pub protocols: Vec<Protocol>,
    /// Clients at once.
    pub clients: Vec<u32>,
    /// How long one measurement takes.
    pub seconds: u64,
    /// How often each is repeated, all peers in turn; the median counts.
    pub rounds: usize,
    /// Numbers of idle clients to weigh.
    pub idle: Vec<u32>,
    /// The program to measure.
    pub cofferdam: PathBuf,
    /// PgBouncer's program.
    pub pgbouncer: PathBuf,
}

/// One measurement: the medians of its rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// What a transaction is.
    pub script: Script,
    /// How statements are sent.
    pub protocol: Protocol,
    /// Clients at once.
    pub clients: u32,
    /// Through whom.
    pub peer: String,
    /// Transactions per second.
    pub tps: f64,
    /// The median latency in milliseconds.
    pub p50_ms: f64,
    /// The 99th percentile of the latency in milliseconds.
    pub p99_ms: f64,
    /// Microseconds of processor time that the pooler itself used per transaction.
    pub cpu_us: f64,
}

/// What idle clients cost.
#[derive(Debug, Clone, Serialize)]
pub struct Idle {
    /// Through whom.
    pub peer: String,
    /// How many there were.
    pub clients: u32,
    /// How many of them still answered afterwards.
    pub alive: u32,
    /// How long it took until all were logged in, in seconds.
    pub connect_s: f64,
    /// Resident memory of the pooler per client, in bytes.
    pub bytes: f64,
}

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Transactions.
    pub cells: Vec<Cell>,
    /// Idle clients.
    pub idle: Vec<Idle>,
}

/// Measures every combination.
pub async fn measure(options: &Options, mut progress: impl FnMut(&str)) -> anyhow::Result<Report> {
    let cluster = start().await.context("PostgreSQL")?;
    let tenants = [DATABASE.to_owned()];
    let behind = Behind {
        postgres: Some(cluster.port()),
        postgres_front: None,
        http: None,
        workers: 0,
        tenants: &tenants,
        password: PASSWORD,
        pgbouncer: options.pgbouncer.clone(),
        slots: POOL,
        least_slots: POOL,
        priorities: false,
    };
    let mut report = Report { cells: Vec::new(), idle: Vec::new() };
    let carries = knows_statements(&options.pgbouncer).await;
    if !carries {
        progress("this PgBouncer is older than 1.21: it has no part in `prepared`");
    }
    for script in &options.scripts {
        for protocol in &options.protocols {
            for clients in &options.clients {
                // PostgreSQL itself takes only so many.
                let can = |peer: &Peer| match peer {
                    Peer::Direct => *clients <= 100,
                    Peer::PgBouncer(_) | Peer::PgBouncers(_) => carries || *protocol != Protocol::Prepared,
                    _ => true,
                };
                let peers = options.peers.iter().copied().filter(can);
                let mut rounds: Vec<(Peer, Vec<Cell>)> = peers.map(|p| (p, Vec::new())).collect();
                for _ in 0..options.rounds {
                    for (peer, cells) in &mut rounds {
                        let running = Running::start(*peer, &behind, &options.cofferdam).await?;
                        cells.push(one(&running, *peer, *script, *protocol, *clients, options).await?);
                    }
                }
                for (_, cells) in rounds {
                    let Some(cell) = median(cells) else { continue };
                    progress(&brief(&cell));
                    report.cells.push(cell);
                }
            }
        }
    }
    for clients in &options.idle {
        for peer in options.peers.iter().filter(|p| **p != Peer::Direct) {
            let running = Running::start(*peer, &behind, &options.cofferdam).await?;
            let idle = idle(&running, *peer, *clients).await.with_context(|| peer.name())?;
            progress(&format!(
                "{:>6} idle clients, {:14} {:>7.0} bytes each, connected in {:.1} s, {} answer afterwards",
                idle.clients, idle.peer, idle.bytes, idle.connect_s, idle.alive
            ));
            report.idle.push(idle);
        }
    }
    Ok(report)
}

async fn start() -> anyhow::Result<Cluster> {
    let options = ClusterOptions {
        settings: vec!["max_connections = 200".into(), "synchronous_commit = off".into()],
        ..ClusterOptions::default()
    };
    let cluster = tokio::task::spawn_blocking(move || Cluster::start_with(&options)).await??;
    cluster.create_role(DATABASE, PASSWORD).await?;
    cluster.create_database(DATABASE, DATABASE).await?;
    let mut init = postgres_tool("pgbench", &target(cluster.port()))?;
    let output = tools::run(init.args(["-i", "-q", "-s", "20"])).await?;
    if !output.success {
        bail!("pgbench -i: {}", output.stderr);
    }
    Ok(cluster)
}

fn target(port: u16) -> Target {
    Target::new(port, DATABASE, PASSWORD, DATABASE)
}

async fn one(
    running: &Running,
    peer: Peer,
    script: Script,
    protocol: Protocol,
    clients: u32,
    options: &Options,
) -> anyhow::Result<Cell> {
    let logs = tempfile::Builder::new().prefix("cofferdam-pgbench-").tempdir()?;
    let mut command = postgres_tool("pgbench", &target(running.postgres))?;
    let threads = clients.min(2).to_string();
    // Logins are within the time: a pooler that derives keys for each takes some milliseconds for one.
    let seconds = options.seconds + u64::from(clients / 128);
    command.args(["--no-vacuum", "--log", "--protocol", protocol.as_str(), "--jobs", &threads]);
    command.args(["--client", &clients.to_string(), "--time", &seconds.to_string()]);
    command.args(["--sampling-rate", &SAMPLED.to_string()]);
    if script == Script::Select {
        command.arg("--select-only");
    }
    command.current_dir(logs.path());
    command.args(["--progress", "1"]);
    let (output, cpu_us) = run(&mut command, running).await?;
    let failed = || format!("pgbench through {}: {}{}", peer.name(), output.stdout, output.stderr);
    if !output.success {
        bail!(failed());
    }
    let figure = |start: &str| {
        let line = output.stdout.lines().find_map(|l| l.strip_prefix(start))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    let tps = figure("tps = ").with_context(failed)?;
    let mut latencies = Vec::new();
    for file in std::fs::read_dir(logs.path())? {
        // Client, number, latency in microseconds, …
        let text = std::fs::read_to_string(file?.path())?;
        latencies.extend(text.lines().filter_map(|l| l.split(' ').nth(2)?.parse::<f64>().ok()));
    }
    latencies.sort_by(f64::total_cmp);
    let quantile = |q: f64| latencies.get((q * (latencies.len() as f64 - 1.0)) as usize).map_or(0.0, |us| us / 1e3);
    Ok(Cell {
        script,
        protocol,
        clients,
        peer: peer.name(),
        tps,
        p50_ms: quantile(0.5),
        p99_ms: quantile(0.99),
        cpu_us,
    })
}

/// Runs pgbench; with the pooler's processor time per transaction between the first second and the last, so that
/// logins do not count.
async fn run(command: &mut Command, running: &Running) -> anyhow::Result<(Output, f64)> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("pgbench")?;
    let (mut stderr, mut transactions) = (String::new(), 0.0);
    let (mut first, mut last) = (None, Duration::ZERO);
    if let Some(pipe) = child.stderr.take() {
        let mut lines = BufReader::new(pipe).lines();
        while let Some(line) = lines.next_line().await? {
            // `progress: 1.0 s, 12345.6 tps, lat …`
            let words: Vec<&str> = line.split([' ', ',']).collect();
            if let ["progress:", _, "s", "", tps, "tps", ..] = words[..] {
                last = running.cpu();
                match first {
                    None => first = Some(last),
                    Some(_) => transactions += tps.parse::<f64>().unwrap_or(0.0),
                }
            }
            stderr.push_str(&line);
            stderr.push('\n');
        }
    }
    let output = child.wait_with_output().await?;
    let used = last.saturating_sub(first.unwrap_or_default());
    let output = Output {
        success: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr,
    };
    Ok((output, used.as_secs_f64() * 1e6 / f64::max(transactions, 1.0)))
}

/// The medians of every figure.
fn median(cells: Vec<Cell>) -> Option<Cell> {
    let of = |figure: fn(&Cell) -> f64| {
        let mut values: Vec<f64> = cells.iter().map(figure).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    let (tps, p50_ms, p99_ms, cpu_us) = (of(|c| c.tps), of(|c| c.p50_ms), of(|c| c.p99_ms), of(|c| c.cpu_us));
    cells.into_iter().next().map(|cell| Cell { tps, p50_ms, p99_ms, cpu_us, ..cell })
}

/// Logs in so many clients, leaves them alone, and asks each once.
async fn idle(running: &Running, peer: Peer, clients: u32) -> anyhow::Result<Idle> {
    let config = {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(running.postgres).user(DATABASE).password(PASSWORD).dbname(DATABASE);
        config.connect_timeout(Duration::from_secs(60));
        Arc::new(config)
    };
    // The first client makes the pooler open what it opens only once.
    let (first, connection) = config.connect(tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    first.simple_query("SELECT 1").await?;
    let before = running.resident();
    let begun = Instant::now();
    let at_once = Arc::new(tokio::sync::Semaphore::new(64));
    let logins: Vec<_> = (0..clients)
        .map(|_| {
            let (config, at_once) = (Arc::clone(&config), Arc::clone(&at_once));
            tokio::spawn(async move {
                let _place = at_once.acquire().await;
                let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
                tokio::spawn(connection);
                Ok::<_, tokio_postgres::Error>(client)
            })
        })
        .collect();
    let mut connected = Vec::new();
    for login in logins {
        connected.push(login.await??);
    }
    let connect_s = begun.elapsed().as_secs_f64();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let bytes = running.resident().saturating_sub(before) as f64 / f64::from(clients);
    let mut alive = 0;
    for client in &connected {
        alive += u32::from(client.simple_query("SELECT 1").await.is_ok());
    }
    Ok(Idle { peer: peer.name(), clients, alive, connect_s, bytes })
}

fn brief(cell: &Cell) -> String {
    format!(
        "{:6} {:8} {:>4} clients  {:14} {:>8.0} tps  p50 {:>7.3} ms  p99 {:>7.3} ms  {:>5.1} µs of CPU",
        cell.script.as_str(),
        cell.protocol.as_str(),
        cell.clients,
        cell.peer,
        cell.tps,
        cell.p50_ms,
        cell.p99_ms,
        cell.cpu_us
    )
}

/// The report as tables.
pub fn table(report: &Report) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["script", "protocol", "clients", "through", "tps", "p50 ms", "p99 ms", "CPU µs"]);
    for c in &report.cells {
        table.add_row([
            c.script.as_str().to_owned(),
            c.protocol.as_str().to_owned(),
            c.clients.to_string(),
            c.peer.clone(),
            format!("{:.0}", c.tps),
            format!("{:.3}", c.p50_ms),
            format!("{:.3}", c.p99_ms),
            format!("{:.1}", c.cpu_us),
        ]);
    }
    align(&mut table, &[2, 4, 5, 6, 7]);
    let mut text = if report.cells.is_empty() { String::new() } else { table.to_string() };
    if !report.idle.is_empty() {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_FULL_CONDENSED);
        table.set_header(["idle clients", "through", "bytes each", "connected in s", "answer afterwards"]);
        for i in &report.idle {
            table.add_row([
                i.clients.to_string(),
                i.peer.clone(),
                format!("{:.0}", i.bytes),
                format!("{:.1}", i.connect_s),
                i.alive.to_string(),
            ]);
        }
        align(&mut table, &[0, 2, 3, 4]);
        text.push('\n');
        text.push_str(&table.to_string());
    }
    text
}

fn align(table: &mut Table, right: &[usize]) {
    for column in right {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// Processor time per transaction, over PgBouncer's in the same cell.
pub fn picture(report: &Report) -> anyhow::Result<String> {
    let mut groups: Vec<Group> = Vec::new();
    for cell in report.cells.iter().filter(|c| c.cpu_us > 0.0) {
        let label = format!("{} {} {}", cell.script.as_str(), cell.protocol.as_str(), cell.clients);
        let bar = Bar { series: cell.peer.clone(), value: Some(cell.cpu_us) };
        match groups.iter_mut().find(|g| g.label == label) {
            Some(group) => group.bars.push(bar),
            None => groups.push(Group { label, bars: vec![bar] }),
        }
    }
    bars("Processor time of the pooler per transaction", "microseconds", None, &groups)
}
