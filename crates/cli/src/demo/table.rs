//! The live table and the closing summary.

use std::collections::HashMap;
use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cofferdam_testkit::load::{Measured, Window};
use comfy_table::{Cell, CellAlignment, Table, presets};

use super::stage::{NOISY, Stage};
use super::{Phase, Seen};

/// Figures over less than this say nothing.
const SHORTEST_WINDOW: Duration = Duration::from_millis(500);

/// Redraws one table in place, or prints it again and again where there is no terminal.
pub(crate) struct Live<'a> {
    stage: &'a Stage,
    phase: Phase,
    redraw: bool,
    drawn: usize,
    windows: HashMap<String, Window>,
    database_seconds: HashMap<String, f64>,
    last: Instant,
}

impl<'a> Live<'a> {
    pub(crate) fn new(stage: &'a Stage, phase: Phase, redraw: bool) -> Self {
        println!("{}", phase.title());
        Self {
            stage,
            phase,
            redraw,
            drawn: 0,
            windows: HashMap::new(),
            database_seconds: HashMap::new(),
            last: Instant::now(),
        }
    }

    /// Begins the first window: what is shown later is what has happened since.
    pub(crate) fn begin(&mut self, seen: &Seen) {
        self.last = Instant::now();
        for (slug, measured) in &seen.tenants {
            measured.window(self.windows.entry(slug.clone()).or_default());
            let used = self.usage(slug).database_seconds;
            self.database_seconds.insert(slug.clone(), used);
        }
    }

    pub(crate) fn show(&mut self, seen: &Seen) {
        if self.last.elapsed() < SHORTEST_WINDOW {
            return;
        }
        let elapsed = self.last.elapsed().as_secs_f64().max(0.001);
        self.last = Instant::now();
        let mut table = grid(&["tenant", "req/s", "p50 ms", "p99 ms", "waiting", "slots", "db s/s"]);
        for (slug, measured) in &seen.tenants {
            let (p50, p99, count) = measured.window(self.windows.entry(slug.clone()).or_default());
            let usage = self.usage(slug);
            let before = self.database_seconds.insert(slug.clone(), usage.database_seconds);
            let database = (usage.database_seconds - before.unwrap_or(usage.database_seconds)) / elapsed;
            if slug == NOISY && self.phase == Phase::Alone {
                continue;
            }
            table.add_row(row(
                slug,
                [
                    format!("{:.1}", count as f64 / elapsed),
                    milliseconds(p50),
                    milliseconds(p99),
                    usage.waiting.to_string(),
                    usage.running.to_string(),
                    format!("{database:.2}"),
                ],
            ));
        }
        let text = table.to_string();
        let mut out = std::io::stdout().lock();
        if self.redraw && self.drawn > 0 {
            let _ = write!(out, "\x1b[{}A\x1b[J", self.drawn);
        }
        self.drawn = text.lines().count() + 1;
        let _ = writeln!(out, "{text}\n");
        let _ = out.flush();
    }

    fn usage(&self, slug: &str) -> Usage {
        let gateway = &self.stage.gateway;
        let catalog = gateway.catalog();
        let mut usage = Usage::default();
        let Some(tenant) = catalog.by_slug(slug) else { return usage };
        if let Some(gate) = gateway.http_plane().and_then(|p| p.gates().get("odoo-shared")) {
            let http = gate.tenant_usage(tenant.id);
            usage.waiting += http.waiting;
            usage.running += http.running;
        }
        if let Some(gate) = gateway.postgres_plane().and_then(|p| p.gates().get("pg-shared")) {
            usage.database_seconds = gate.tenant_usage(tenant.id).used.0;
        }
        usage
    }
}

#[derive(Default)]
struct Usage {
    waiting: u32,
    running: u32,
    database_seconds: f64,
}

/// The three phases side by side.
#[derive(Default)]
pub(crate) struct Summary {
    quiet: Vec<(Phase, Duration, Duration, u64)>,
    noisy: Vec<(Phase, f64)>,
}

impl Summary {
    pub(crate) fn add(&mut self, phase: Phase, seen: &Seen) {
        let all = Measured::default();
        for (slug, measured) in &seen.tenants {
            if slug == NOISY {
                let served = measured.served.load(Ordering::Relaxed) as f64;
                self.noisy.push((phase, served / seen.length.as_secs_f64()));
            } else {
                all.merge(measured);
            }
        }
        self.quiet.push((phase, all.quantile(0.5), all.quantile(0.99), all.failed.load(Ordering::Relaxed)));
    }

    pub(crate) fn render(&self) -> String {
        let mut table = grid(&["quiet tenants", "p50 ms", "p99 ms", "p99 × alone", "errors", "noisy req/s"]);
        let alone = self.quiet.first().map_or(Duration::ZERO, |(_, _, p99, _)| *p99);
        for ((phase, p50, p99, failed), (_, noisy)) in self.quiet.iter().zip(&self.noisy) {
            let name = match phase {
                Phase::Alone => "alone",
                Phase::Unprotected => "with a noisy neighbour, unprotected",
                Phase::Protected => "with a noisy neighbour, protected",
            };
            table.add_row(row(
                name,
                [
                    milliseconds(*p50),
                    milliseconds(*p99),
                    format!("{:.1}", p99.as_secs_f64() / alone.as_secs_f64().max(1e-6)),
                    failed.to_string(),
                    format!("{noisy:.1}"),
                ],
            ));
        }
        table.to_string()
    }
}

fn grid(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(
        header
            .iter()
            .enumerate()
            .map(|(i, h)| Cell::new(h).set_alignment(if i == 0 { CellAlignment::Left } else { CellAlignment::Right })),
    );
    table
}

fn row<const N: usize>(name: &str, figures: [String; N]) -> Vec<Cell> {
    let figures = figures.into_iter().map(|f| Cell::new(f).set_alignment(CellAlignment::Right));
    std::iter::once(Cell::new(name)).chain(figures).collect()
}

fn milliseconds(d: Duration) -> String {
    format!("{:.1}", d.as_secs_f64() * 1_000.0)
}
