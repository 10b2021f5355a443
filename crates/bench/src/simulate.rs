//! Scheduling policies in simulation: the table, and the picture.

use std::fmt::Write;

use cofferdam_fairness::simulator::{Cell, Policy, Scenario, run};
use comfy_table::{CellAlignment, Table, presets};

use crate::plot::{Bar, Group, bars};

/// Runs every scenario under every policy; with `large` also 100,000 tenants on 1,000 slots.
pub fn simulate(seed: u64, large: bool, mut progress: impl FnMut(&str)) -> Vec<Cell> {
    let mut scenarios = Scenario::all();
    if large {
        scenarios.push(Scenario::large());
    }
    let mut cells = Vec::new();
    for scenario in &scenarios {
        progress(scenario.name);
        cells.extend(Policy::ALL.into_iter().map(|policy| run(scenario, policy, seed)));
    }
    cells
}

/// The results as text, one table per scenario.
pub fn table(cells: &[Cell]) -> String {
    let mut out = String::new();
    let mut scenarios = Scenario::all();
    scenarios.push(Scenario::large());
    for scenario in scenarios {
        let cells: Vec<&Cell> = cells.iter().filter(|c| c.scenario == scenario.name).collect();
        if cells.is_empty() {
            continue;
        }
        let _ = writeln!(out, "{}: {}", scenario.name, scenario.about);
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header([
            "policy",
            "p50 ms",
            "p99 ms",
            "p99.9 ms",
            "p99 alone",
            "inflation",
            "served",
            "aggressors/s",
            "in use",
            "min/max",
        ]);
        for cell in cells {
            let latency =
                |ms: f64| if cell.alone.is_some() && cell.served > 0.0 { format!("{ms:.1}") } else { "-".into() };
            table.add_row([
                cell.policy.as_str().to_owned(),
                latency(cell.contended.p50_ms),
                latency(cell.contended.p99_ms),
                latency(cell.contended.p999_ms),
                cell.alone.map_or("-".into(), |a| format!("{:.1}", a.p99_ms)),
                cell.inflation.filter(|_| cell.served > 0.0).map_or("-".into(), |i| format!("×{i:.2}")),
                if cell.alone.is_some() { format!("{:.1} %", 100.0 * cell.served) } else { "-".into() },
                format!("{:.1}", cell.aggressor_throughput),
                format!("{:.0} %", 100.0 * cell.utilisation),
                format!("{:.2}", cell.min_max),
            ]);
        }
        for column in 1..10 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let _ = writeln!(out, "{table}\n");
    }
    out
}

/// The victims' inflation as a picture.
pub fn picture(cells: &[Cell]) -> anyhow::Result<String> {
    let mut groups: Vec<Group> = Vec::new();
    for cell in cells.iter().filter(|c| c.alone.is_some()) {
        if groups.last().is_none_or(|g| g.label != cell.scenario) {
            groups.push(Group { label: cell.scenario.to_owned(), bars: Vec::new() });
        }
        if let Some(group) = groups.last_mut() {
            let value = cell.inflation.filter(|_| cell.served > 0.0);
            group.bars.push(Bar { series: cell.policy.as_str().to_owned(), value });
        }
    }
    bars("Victims' p99 with a noisy neighbour, against alone (simulated)", "times as long", Some(1.3), &groups)
}
