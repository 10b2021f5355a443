//! `cofferdam top`: the tenants that use most, live.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use cofferdam::admin::{GateView, PlaneUsage, TenantView};
use cofferdam_testkit::load::HttpClient;
use comfy_table::{CellAlignment, Table, presets};
use tokio::time::Instant;

use crate::args::TopArgs;

/// Ask for more than is shown: who comes up next is among them.
const MARGIN: usize = 20;

pub(crate) fn run(args: &TopArgs) -> anyhow::Result<ExitCode> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    runtime.block_on(async {
        tokio::select! {
            outcome = watch(args) => outcome,
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::SUCCESS),
        }
    })
}

async fn watch(args: &TopArgs) -> anyhow::Result<ExitCode> {
    let token = match &args.token_file {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            Some(text.trim().to_owned())
        }
        None => args.token.clone(),
    };
    let admin = Admin { address: args.admin.clone(), token };
    let redraw = !args.once && std::io::stdout().is_terminal();
    let mut before = Sample::take(&admin, args.tenants).await?;
    loop {
        tokio::time::sleep(Duration::from_secs(args.interval)).await;
        let now = Sample::take(&admin, args.tenants).await?;
        let text = render(&before, &now, args.tenants);
        let mut out = std::io::stdout().lock();
        if redraw {
            // Clear, and begin at the top.
            write!(out, "\x1b[2J\x1b[H")?;
        }
        writeln!(out, "{text}")?;
        out.flush()?;
        if args.once {
            return Ok(ExitCode::SUCCESS);
        }
        before = now;
    }
}

struct Admin {
    address: String,
    token: Option<String>,
}

impl Admin {
    async fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let unreachable = || format!("cannot reach the admin listener at {} (option --admin)", self.address);
        let mut addresses = tokio::net::lookup_host(&self.address).await.with_context(unreachable)?;
        let address = addresses.next().with_context(unreachable)?;
        let mut client = HttpClient::connect(address).await.with_context(unreachable)?;
        let bearer = self.token.as_ref().map(|t| format!("Bearer {t}"));
        let headers: Vec<_> = bearer.iter().map(|b| ("Authorization", b.as_str())).collect();
        let answer = client.request("GET", "localhost", path, &headers, &[]).await.with_context(unreachable)?;
        match answer.status {
            200 => serde_json::from_slice(&answer.body).context("the admin listener answered something else"),
            401 => bail!("the admin listener wants its token (option --token-file)"),
            other => bail!("the admin listener answered {other}: {}", answer.text()),
        }
    }
}

/// What the gateway said at one moment.
struct Sample {
    at: Instant,
    gates: Vec<GateView>,
    tenants: HashMap<String, TenantView>,
}

impl Sample {
    async fn take(admin: &Admin, shown: usize) -> anyhow::Result<Self> {
        let gates = admin.get("/api/v1/gates").await?;
        // Who is busy now, and who has been so far: a storm that begins is among the first, a long history among the
        // second.
        let mut tenants = HashMap::new();
        for sort in ["work", "now"] {
            let path = format!("/api/v1/tenants?sort={sort}&limit={}", shown.saturating_mul(4) + MARGIN);
            let some: Vec<TenantView> = admin.get(&path).await?;
            tenants.extend(some.into_iter().map(|t| (t.tenant.clone(), t)));
        }
        Ok(Self { at: Instant::now(), gates, tenants })
    }
}

/// What a tenant did on a plane between two samples, per second.
#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    work: f64,
    granted: f64,
    rejected: f64,
    /// Milliseconds that each granted piece had waited.
    wait_ms: f64,
}

impl Rate {
    fn between(before: Option<&PlaneUsage>, now: Option<&PlaneUsage>, seconds: f64) -> Self {
        let Some(now) = now else { return Self::default() };
        let before = before.copied().unwrap_or_default();
        let granted = now.granted.saturating_sub(before.granted) as f64;
        let waited = (now.wait_seconds - before.wait_seconds).max(0.0);
        Self {
            work: (now.slot_seconds - before.slot_seconds).max(0.0) / seconds,
            granted: granted / seconds,
            rejected: now.rejected.saturating_sub(before.rejected) as f64 / seconds,
            wait_ms: if granted > 0.0 { 1e3 * waited / granted } else { 0.0 },
        }
    }
}

fn render(before: &Sample, now: &Sample, shown: usize) -> String {
    let seconds = (now.at - before.at).as_secs_f64().max(0.001);
    let mut out = String::new();
    let mut gates = grid(&["gate", "slots", "open", "running", "expensive", "nested", "waiting", "inflation"]);
    for gate in &now.gates {
        gates.add_row([
            format!("{} {}", gate.plane, gate.name),
            gate.slots.to_string(),
            gate.open_slots.to_string(),
            gate.running.to_string(),
            format!("{}/{}", gate.expensive, gate.open_expensive),
            gate.nested.to_string(),
            gate.waiting.to_string(),
            format!("×{:.2}", gate.inflation),
        ]);
    }
    out.push_str(&aligned(gates));
    out.push_str("\n\n");
    let mut rows: Vec<(&TenantView, [Rate; 2])> = now
        .tenants
        .values()
        .map(|tenant| {
            let old = before.tenants.get(&tenant.tenant);
            let http = Rate::between(old.and_then(|o| o.http.as_ref()), tenant.http.as_ref(), seconds);
            let postgres = Rate::between(old.and_then(|o| o.postgres.as_ref()), tenant.postgres.as_ref(), seconds);
            // Whoever was not among the first before has done what it has done over all its time: no rate.
            (tenant, if old.is_some() { [http, postgres] } else { [Rate::default(); 2] })
        })
        .collect();
    let waiting = |t: &TenantView| [&t.http, &t.postgres].into_iter().flatten().map(|u| u.waiting).sum::<u32>();
    rows.sort_by(|(a, x), (b, y)| {
        let work = |r: &[Rate; 2]| r[0].work + r[1].work;
        work(y).total_cmp(&work(x)).then(waiting(b).cmp(&waiting(a))).then(a.tenant.cmp(&b.tenant))
    });
    let mut table = grid(&[
        "tenant", "http s/s", "req/s", "run", "wait", "ms", "refused", "sql s/s", "tx/s", "run", "wait", "ms",
        "refused", "",
    ]);
    for (tenant, rates) in rows.iter().take(shown) {
        let mut row = vec![tenant.tenant.clone()];
        for (usage, rate) in [&tenant.http, &tenant.postgres].into_iter().zip(rates) {
            match usage {
                Some(usage) => row.extend([
                    format!("{:.2}", rate.work),
                    format!("{:.1}", rate.granted),
                    usage.limit.map_or(usage.running.to_string(), |limit| format!("{}/{limit}", usage.running)),
                    usage.waiting.to_string(),
                    format!("{:.0}", rate.wait_ms),
                    format!("{:.1}", rate.rejected),
                ]),
                None => row.extend(["-"; 6].map(str::to_owned)),
            }
        }
        row.push(tenant.warnings.first().map_or(String::new(), |w| format!("! {w}")));
        table.add_row(row);
    }
    out.push_str(&aligned(table));
    out
}

fn grid(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

/// Figures to the right; lines without what is beyond the last figure.
fn aligned(mut table: Table) -> String {
    for n in 1..table.column_count() {
        let last = n == 13;
        if let Some(column) = table.column_mut(n).filter(|_| !last) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(slot_seconds: f64, granted: u64, wait_seconds: f64) -> PlaneUsage {
        PlaneUsage { slot_seconds, granted, wait_seconds, ..PlaneUsage::default() }
    }

    #[test]
    fn rates_are_what_happened_between_two_samples() {
        let rate = Rate::between(Some(&usage(10.0, 100, 1.0)), Some(&usage(14.0, 120, 2.0)), 2.0);
        assert!(
            (rate.work - 2.0).abs() < 1e-9 && (rate.granted - 10.0).abs() < 1e-9 && (rate.wait_ms - 50.0).abs() < 1e-9
        );
        // A gateway that was started again counts from zero.
        let rate = Rate::between(Some(&usage(10.0, 100, 1.0)), Some(&usage(1.0, 10, 0.0)), 2.0);
        assert!(rate.work.abs() < 1e-9 && rate.granted.abs() < 1e-9);
    }
}
