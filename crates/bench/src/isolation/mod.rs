//! How much a noisy neighbour costs the others: eight tenants with a little to do, beside one or four with a lot, through
//! Cofferdam, through peers, and directly.

mod bed;
mod cell;
mod load;

use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use comfy_table::{CellAlignment, Table, presets};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use cell::{Cell, Latency, Victim};

use crate::peers::{Peer, Running};
use crate::plot::{Bar, Group, bars};
use bed::Bed;
use cell::fairness;
use load::{Counter, Recorder, Sample, aggressor, victim};

/// Transactions or requests per second of each victim.
const VICTIM_RATE: f64 = 20.0;
/// The victims run this long before anything is measured.
const WARM_UP: Duration = Duration::from_secs(2);
/// What happens in this time after the aggressors' first call counts for the reaction time, not for the rest.
const ONSET: Duration = Duration::from_secs(6);
const WINDOW: Duration = Duration::from_millis(250);
/// What still runs when a measurement is over is waited for this long.
const DRAIN: Duration = Duration::from_secs(30);

/// What stands between the load and what it asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plane {
    /// PostgreSQL alone.
    Postgres,
    /// HTTP alone: a miniature Odoo that needs no database.
    Http,
    /// HTTP, and PostgreSQL behind it.
    Both,
}

impl Plane {
    /// The name in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Http => "http",
            Self::Both => "both",
        }
    }
}

/// What aggressors do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Long work that only waits.
    Sleep,
    /// Long work that computes.
    Burn,
    /// Short work that computes, without a pause.
    Storm,
    /// Short work that writes and commits, without a pause: whoever is slowed down while it holds a lock of the server's slows
    /// down all. PostgreSQL only.
    Write,
}

impl Workload {
    /// Those that both planes have.
    pub const ALL: [Self; 3] = [Self::Sleep, Self::Burn, Self::Storm];

    /// The name in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sleep => "sleep",
            Self::Burn => "burn",
            Self::Storm => "storm",
            Self::Write => "write",
        }
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// What stands in between.
    pub plane: Plane,
    /// Through whom.
    pub peers: Vec<Peer>,
    /// What the aggressors do.
    pub workloads: Vec<Workload>,
    /// How many aggressors: 1 has 60 clients, several have 20 each.
    pub aggressors: Vec<u32>,
    /// How long the victims are measured alone, and then contended.
    pub seconds: u64,
    /// The program to measure.
    pub cofferdam: PathBuf,
}

/// Measures every combination.
pub async fn measure(options: &Options, mut progress: impl FnMut(&str)) -> anyhow::Result<Vec<Cell>> {
    let mut bed = Bed::make(options.plane, options.workloads.contains(&Workload::Write)).await?;
    let mut cells = Vec::new();
    for workload in &options.workloads {
        for n in &options.aggressors {
            for peer in &options.peers {
                let name = format!("{} {}x {}", workload.as_str(), n, peer.name());
                bed.prepare(peer.is_cofferdam()).await?;
                let running = Running::start(*peer, &bed.behind(), &options.cofferdam).await?;
                let (cell, note) =
                    one(&bed, &running, *peer, *workload, *n, options).await.with_context(|| name.clone())?;
                progress(&format!("{name:32} {}", brief(&cell)));
                if let Some(note) = note {
                    progress(&format!("  {}: {note}", peer.name()));
                }
                cells.push(cell);
            }
        }
    }
    Ok(cells)
}

/// What one aggressor gets done per second by itself.
#[derive(Debug, Clone, Copy)]
pub struct Alone {
    /// Doing what.
    pub workload: Workload,
    /// With Cofferdam's scheduling.
    pub fair: f64,
    /// First come first served with the same slots.
    pub fifo: f64,
}

/// How often one and then the other is measured: a machine that is slower for a while is so for both.
const ROUNDS: u32 = 5;

/// The work that one aggressor gets done by itself with Cofferdam's scheduling, over what it gets first come first
/// served with the same slots: what protection costs when there is nobody to protect.
pub async fn aggressor_alone(options: &Options) -> anyhow::Result<Vec<Alone>> {
    if options.plane == Plane::Both {
        bail!("one aggressor alone is measured on one plane: two gateways cannot both be Odoo's way to PostgreSQL");
    }
    let mut bed = Bed::make(options.plane, options.workloads.contains(&Workload::Write)).await?;
    let mut results = Vec::new();
    for workload in &options.workloads {
        bed.prepare(true).await?;
        let fair = Running::start(Peer::Cofferdam, &bed.behind(), &options.cofferdam).await?;
        let fifo = Running::start(Peer::Fifo, &bed.behind(), &options.cofferdam).await?;
        // Slots open as work shows that it does no harm: what counts is what it comes to.
        rate(&bed, &fair, *workload, 4 * ONSET, Duration::ZERO).await?;
        // When all slots compute at once, the first piece of work is done when nearly all of them are.
        let warm_up = if *workload == Workload::Burn { 2 * ONSET } else { WARM_UP };
        let length = Duration::from_secs(options.seconds);
        let mut rates = [0.0; 2];
        for _ in 0..ROUNDS {
            for (sum, peer) in rates.iter_mut().zip([&fair, &fifo]) {
                *sum += rate(&bed, peer, *workload, warm_up, length).await? / f64::from(ROUNDS);
            }
        }
        results.push(Alone { workload: *workload, fair: rates[0], fifo: rates[1] });
    }
    Ok(results)
}

/// What one aggressor gets done per second, after a while.
async fn rate(
    bed: &Bed,
    peer: &Running,
    workload: Workload,
    warm_up: Duration,
    length: Duration,
) -> anyhow::Result<f64> {
    let (counter, stop) = (Arc::new(Counter::default()), CancellationToken::new());
    let _stop = stop.clone().drop_guard();
    for target in bed.aggressors(peer, workload, 1) {
        aggressor(&target, 60, &counter, &stop);
    }
    tokio::time::sleep(warm_up).await;
    let (begun, before) = (Instant::now(), counter.done());
    tokio::time::sleep(length).await;
    let rate = (counter.done() - before) as f64 / begun.elapsed().as_secs_f64();
    stop.cancel();
    settle(bed).await?;
    Ok(rate)
}

async fn one(
    bed: &Bed,
    peer: &Running,
    kind: Peer,
    workload: Workload,
    n: u32,
    options: &Options,
) -> anyhow::Result<(Cell, Option<String>)> {
    let recorder = Arc::new(Recorder::default());
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    for (seed, target) in bed.victims(peer).into_iter().enumerate() {
        tokio::spawn(victim(target, VICTIM_RATE, seed as u64, Arc::clone(&recorder), stop.clone()));
    }
    tokio::time::sleep(WARM_UP).await;
    let length = Duration::from_secs(options.seconds);
    let begun = Instant::now();
    tokio::time::sleep(length).await;
    let onset = Instant::now();
    let alone = recorder.between(begun, onset);
    let clients = if n == 1 { 60 } else { 20 };
    let mut counters = Vec::new();
    for target in bed.aggressors(peer, workload, n) {
        let counter = Arc::new(Counter::default());
        aggressor(&target, clients, &counter, &stop);
        counters.push(counter);
    }
    tokio::time::sleep(ONSET).await;
    let from = Instant::now();
    let before: Vec<u64> = counters.iter().map(|c| c.done()).collect();
    let usage = watch(bed, length).await?;
    let to = Instant::now();
    // All pieces of a workload are alike: as many as were done, so many slot-seconds were used.
    let done: Vec<f64> = counters.iter().zip(before).map(|(c, before)| (c.done() - before) as f64).collect();
    let aggressor_throughput = done.iter().sum::<f64>() / (to - from).as_secs_f64();
    let (jain, min_max) = fairness(&done);
    // Victims' work that was due in time has a moment to finish.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let contended = recorder.between(from, to);
    let due = Instant::now();
    let reaction_ms = reaction(&recorder.between(onset, due), &alone, onset);
    stop.cancel();
    settle(bed).await?;
    let served = |samples: &[Sample]| samples.iter().filter_map(|s| s.latency_ms).collect::<Vec<_>>();
    // What has not come back counts as having taken until now, and as not served.
    let due_in_all = recorder.due_between(from, to);
    let mut latencies = served(&contended);
    let finished = latencies.len();
    let missing = due_in_all.saturating_sub(finished);
    latencies.extend(std::iter::repeat_n((due - from).as_secs_f64() * 1e3, missing));
    let victim = Victim {
        alone: Latency::of(served(&alone)),
        contended: Latency::of(latencies),
        served_ratio: finished as f64 / due_in_all.max(1) as f64,
    };
    let errors = counters.iter().map(|c| c.first_error()).chain([recorder.first_error()]);
    let note = errors.flatten().next().map(|e| e.lines().next().unwrap_or_default().to_owned());
    let cell = Cell {
        plane: options.plane.as_str(),
        peer: kind.name(),
        workload: workload.as_str(),
        aggressors: n,
        victim,
        inflation: victim.contended.p99_ms / victim.alone.p99_ms,
        utilisation: usage.slots.max(usage.cores),
        aggressor_throughput,
        jain,
        min_max,
        reaction_ms,
    };
    Ok((cell, note))
}

/// What was in use, from 0 to 1.
struct InUse {
    slots: f64,
    cores: f64,
}

/// Looks every 50 ms at what runs at the back.
async fn watch(bed: &Bed, length: Duration) -> anyhow::Result<InUse> {
    let begun = Instant::now();
    let cpu = cpu_times();
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    let (mut samples, mut slots) = (0.0, 0.0);
    while begun.elapsed() < length {
        tick.tick().await;
        slots += (f64::from(bed.running().await?) / f64::from(bed.slots())).min(1.0);
        samples += 1.0;
    }
    let cores = match (cpu, cpu_times()) {
        (Some((busy, all)), Some((busy_after, all_after))) if all_after > all => {
            (busy_after - busy) / (all_after - all)
        }
        _ => 0.0,
    };
    Ok(InUse { slots: slots / samples, cores })
}

/// Busy time and all time of the machine's cores so far, in ticks.
fn cpu_times() -> Option<(f64, f64)> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let ticks: Vec<f64> = text.lines().next()?.split_whitespace().skip(1).filter_map(|t| t.parse().ok()).collect();
    let all: f64 = ticks.iter().take(8).sum();
    Some((all - ticks.get(3)? - ticks.get(4)?, all))
}

/// From the onset to the beginning of the first second in which nine of ten transactions of every quarter are in
/// bounds: twice the p99 of before, and at least five milliseconds more than it.
fn reaction(since: &[Sample], alone: &[Sample], onset: Instant) -> Option<f64> {
    let before = Latency::of(alone.iter().filter_map(|s| s.latency_ms).collect()).p99_ms;
    let bound = (2.0 * before).max(before + 5.0);
    let last = since.iter().map(|s| s.due).max()?;
    let windows = ((last - onset).as_millis() / WINDOW.as_millis()) as u32;
    let is_good = |n: u32| {
        let (from, to) = (onset + WINDOW * n, onset + WINDOW * (n + 1));
        let due: Vec<&Sample> = since.iter().filter(|s| s.due >= from && s.due < to).collect();
        let good = due.iter().filter(|s| s.latency_ms.is_some_and(|ms| ms <= bound)).count();
        !due.is_empty() && good * 10 >= due.len() * 9
    };
    (0..windows.saturating_sub(3)).find(|n| (*n..n + 4).all(is_good)).map(|n| (WINDOW * n).as_secs_f64() * 1e3)
}

/// Waits until nothing runs at the back any more.
async fn settle(bed: &Bed) -> anyhow::Result<()> {
    let deadline = Instant::now() + DRAIN;
    while bed.running().await? > 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

pub(crate) fn host(tenant: &str) -> String {
    format!("{tenant}.example.com")
}

fn brief(cell: &Cell) -> String {
    let reaction = cell.reaction_ms.map_or("never".into(), |ms| format!("{ms:.0} ms"));
    format!(
        "p99 {:7.1} -> {:8.1} ms  ×{:6.2}  served {:5.1} %  in use {:3.0} %  aggressors {:7.1}/s  jain {:.3}  min/max {:.2}  reaction {reaction}",
        cell.victim.alone.p99_ms,
        cell.victim.contended.p99_ms,
        cell.inflation,
        100.0 * cell.victim.served_ratio,
        100.0 * cell.utilisation,
        cell.aggressor_throughput,
        cell.jain,
        cell.min_max,
    )
}

/// The results as text, one table per workload and number of aggressors.
pub fn table(cells: &[Cell]) -> String {
    let mut out = String::new();
    let mut seen: Vec<(&str, u32)> = Vec::new();
    for cell in cells {
        let key = (cell.workload, cell.aggressors);
        if seen.contains(&key) {
            continue;
        }
        seen.push(key);
        let clients = if cell.aggressors == 1 { 60 } else { 20 };
        let _ = writeln!(
            out,
            "{}: {} aggressor(s) with {clients} clients each, {}",
            cell.plane, cell.aggressors, cell.workload
        );
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header([
            "through",
            "p50 ms",
            "p99 ms",
            "p99.9 ms",
            "p99 alone",
            "inflation",
            "served",
            "in use",
            "aggressors/s",
            "jain",
            "min/max",
            "reaction",
        ]);
        for c in cells.iter().filter(|c| (c.workload, c.aggressors) == key) {
            table.add_row([
                c.peer.clone(),
                figure(c.victim.contended.p50_ms),
                figure(c.victim.contended.p99_ms),
                figure(c.victim.contended.p999_ms),
                figure(c.victim.alone.p99_ms),
                if c.inflation.is_finite() { format!("×{:.2}", c.inflation) } else { "-".into() },
                format!("{:.2} %", 100.0 * c.victim.served_ratio),
                format!("{:.0} %", 100.0 * c.utilisation),
                format!("{:.1}", c.aggressor_throughput),
                format!("{:.3}", c.jain),
                format!("{:.2}", c.min_max),
                c.reaction_ms.map_or("never".into(), |ms| format!("{ms:.0} ms")),
            ]);
        }
        for column in 1..12 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let _ = writeln!(out, "{table}\n");
    }
    out
}

/// A dash where nobody was served.
fn figure(ms: f64) -> String {
    if ms.is_finite() { format!("{ms:.1}") } else { "-".into() }
}

/// The victims' inflation as a picture.
pub fn picture(cells: &[Cell]) -> anyhow::Result<String> {
    let mut groups: Vec<Group> = Vec::new();
    for cell in cells {
        let label = format!("{} {}×", cell.workload, cell.aggressors);
        if groups.last().is_none_or(|g| g.label != label) {
            groups.push(Group { label, bars: Vec::new() });
        }
        if let Some(group) = groups.last_mut() {
            group.bars.push(Bar { series: cell.peer.clone(), value: Some(cell.inflation).filter(|i| i.is_finite()) });
        }
    }
    let plane = cells.first().map_or("", |c| c.plane);
    bars(&format!("Victims' p99 with noisy neighbours, against alone ({plane})"), "times as long", Some(1.3), &groups)
}
