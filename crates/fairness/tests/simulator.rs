//! What the simulator shows, kept true: the shipped policy protects where simpler ones do not.
//!
//! Everything here is deterministic: simulated time, seeded arrivals.
#![allow(clippy::unwrap_used)]

use cofferdam_fairness::simulator::{Cell, Policy, Scenario, run};

fn cell(scenario: &str, policy: Policy) -> Cell {
    seeded(scenario, policy, 1)
}

fn seeded(scenario: &str, policy: Policy, seed: u64) -> Cell {
    run(Scenario::all().iter().find(|s| s.name == scenario).unwrap(), policy, seed)
}

#[test]
fn sleeping_aggressors_cost_the_victims_little_and_use_the_slots() {
    for scenario in ["sleep-1x60", "sleep-4x20"] {
        let ours = cell(scenario, Policy::Adaptive);
        assert!(ours.inflation.unwrap() <= 1.4, "{ours:?}");
        assert!(ours.utilisation >= 0.9, "{ours:?}");
        assert!(ours.served >= 0.999, "{ours:?}");
        assert!(cell(scenario, Policy::Sfq).inflation.unwrap() > 50.0, "ordering alone does not protect");
    }
}

#[test]
fn computing_aggressors_do_not_drown_the_cores() {
    for (scenario, bound) in [("burn-1x60", 2.0), ("burn-4x20", 2.5), ("storm-1x60", 1.5), ("storm-4x20", 1.5)] {
        let ours = cell(scenario, Policy::Adaptive);
        assert!(ours.inflation.unwrap() <= bound, "{ours:?}");
        let fixed = cell(scenario, Policy::Fixed);
        assert!(fixed.inflation.unwrap() > 3.0 * bound, "with a fixed number of slots they do: {fixed:?}");
    }
}

/// The first heavy tenant of a quiet morning takes no more than its part before anybody knows what its work costs.
#[test]
fn ten_second_work_that_comes_first_does_not_own_the_slots_when_the_others_wake_up() {
    let ours = cell("quiet-morning", Policy::Adaptive);
    assert!(ours.inflation.unwrap() <= 1.5 && ours.served >= 0.999, "{ours:?}");
    assert!(cell("quiet-morning", Policy::Fifo).inflation.unwrap() > 28.0);
}

#[test]
fn ten_minute_reports_are_charged_while_they_run_and_stay_in_their_lane() {
    let ours = cell("ten-minute-reports", Policy::Adaptive);
    assert!(ours.inflation.unwrap() <= 1.5 && ours.served >= 0.999, "{ours:?}");
}

#[test]
fn when_everybody_has_a_peak_nobody_is_left_out() {
    let ours = cell("month-end", Policy::Adaptive);
    assert!(ours.jain >= 0.98, "{ours:?}");
    // How long work takes varies by more than a factor of two: that is no reason to let the server stand idle.
    let mut utilisation: Vec<f64> =
        (1..=5).map(|seed| seeded("month-end", Policy::Adaptive, seed).utilisation).collect();
    utilisation.sort_by(f64::total_cmp);
    assert!(utilisation[2] >= 0.8 && utilisation[0] >= 0.5, "{utilisation:.2?}");
    let fifo = cell("month-end", Policy::Fifo);
    assert!(fifo.jain < 0.6, "first come first served gives it to whoever sends the longest work: {fifo:?}");
    assert!(ours.aggressor_throughput > 3.0 * fifo.aggressor_throughput);
}

#[test]
fn the_same_seed_gives_the_same_figures() {
    let (a, b) = (cell("storm-4x20", Policy::Adaptive), cell("storm-4x20", Policy::Adaptive));
    assert_eq!(format!("{a:?}"), format!("{b:?}"));
}
