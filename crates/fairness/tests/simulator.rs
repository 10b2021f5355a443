#[test]
fn table() {
    use cofferdam_fairness::simulator::*;
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut all = Scenario::all();
    if only == "100k-tenants" {
        all = vec![Scenario::large()];
    }
    for s in all {
        if !s.name.contains(&only) {
            continue;
        }
        for p in Policy::ALL {
            let t = std::time::Instant::now();
            let c = run(&s, p, 1);
            println!(
                "{:20} {:16} alone {:8.1} p50 {:8.1} p99 {:9.1} p999 {:9.1} x{:7.2} served {:.4} agg {:8.1}/s util {:.3} jain {:.3} minmax {:.3} ({:?})",
                c.scenario,
                c.policy.as_str(),
                c.alone.map_or(0.0, |a| a.p99_ms),
                c.contended.p50_ms,
                c.contended.p99_ms,
                c.contended.p999_ms,
                c.inflation.unwrap_or(0.0),
                c.served,
                c.aggressor_throughput,
                c.utilisation,
                c.jain,
                c.min_max,
                t.elapsed()
            );
        }
    }
}
