//! One measured combination, and how it is written.

use serde::Serialize;

/// Latency as victims saw it, in milliseconds from when the transaction was due.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// Half were faster.
    pub p50_ms: f64,
    /// 99 of 100 were faster.
    pub p99_ms: f64,
    /// 999 of 1,000 were faster.
    pub p999_ms: f64,
}

/// The victims, alone and contended.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Victim {
    /// Before the aggressors begin.
    pub alone: Latency,
    /// While they are at it.
    pub contended: Latency,
    /// Transactions that succeeded, of those that were due.
    pub served_ratio: f64,
}

/// One plane, one peer, one workload, so many aggressors.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// `postgres`, `http` or `both`.
    pub plane: &'static str,
    /// What stands in between.
    pub peer: String,
    /// What the aggressors do.
    pub workload: &'static str,
    /// How many tenants do it.
    pub aggressors: u32,
    /// What the victims saw.
    pub victim: Victim,
    /// The victims' p99 contended over alone.
    pub inflation: f64,
    /// Slots, or cores of the machine, in use while contended, whichever is nearer to its end, from 0 to 1. The cores
    /// serve the load generator too.
    pub utilisation: f64,
    /// Pieces of work per second, all aggressors together.
    pub aggressor_throughput: f64,
    /// Jain's index of the aggressors' finished work, of which all pieces are alike.
    pub jain: f64,
    /// The least finished work of an aggressor over the most.
    pub min_max: f64,
    /// From the aggressors' first call until the beginning of the first second in which the victims' latency was in
    /// bounds; `null`: there was none.
    pub reaction_ms: Option<f64>,
}

impl Latency {
    /// From latencies in milliseconds, in any order.
    pub(super) fn of(mut ms: Vec<f64>) -> Self {
        ms.sort_unstable_by(f64::total_cmp);
        let at = |q: f64| {
            let last = ms.len().saturating_sub(1);
            ms.get((last as f64 * q).round() as usize).copied().unwrap_or(f64::NAN)
        };
        Self { p50_ms: at(0.5), p99_ms: at(0.99), p999_ms: at(0.999) }
    }
}

/// Jain's index and min/max of some amounts.
pub(super) fn fairness(amounts: &[f64]) -> (f64, f64) {
    let (sum, squares) = (amounts.iter().sum::<f64>(), amounts.iter().map(|a| a * a).sum::<f64>());
    let (min, max) = amounts.iter().fold((f64::MAX, 0.0f64), |(lo, hi), a| (lo.min(*a), hi.max(*a)));
    let jain = if squares > 0.0 { sum * sum / (amounts.len() as f64 * squares) } else { 1.0 };
    (jain, if max > 0.0 { min / max } else { 1.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_amounts_are_fair_and_unequal_ones_are_not() {
        assert_eq!(fairness(&[2.0, 2.0, 2.0]), (1.0, 1.0));
        let (jain, min_max) = fairness(&[1.0, 3.0]);
        assert!((jain - 0.8).abs() < 1e-9 && (min_max - 1.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn the_shape_of_a_cell_is_the_documented_one() {
        let latency = Latency::of((1..=1000).map(f64::from).collect());
        let cell = Cell {
            plane: "postgres",
            peer: "direct".into(),
            workload: "sleep",
            aggressors: 1,
            victim: Victim { alone: latency, contended: latency, served_ratio: 1.0 },
            inflation: 1.0,
            utilisation: 0.9,
            aggressor_throughput: 10.0,
            jain: 1.0,
            min_max: 1.0,
            reaction_ms: None,
        };
        let json = serde_json::to_value(&cell).unwrap_or_default();
        assert_eq!(json["victim"]["alone"]["p99_ms"], 990.0);
        for key in [
            "plane",
            "peer",
            "workload",
            "aggressors",
            "inflation",
            "utilisation",
            "aggressor_throughput",
            "jain",
            "min_max",
            "reaction_ms",
        ] {
            assert!(json.get(key).is_some(), "{key}");
        }
    }
}
