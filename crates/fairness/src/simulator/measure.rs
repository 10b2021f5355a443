//! What a run has shown.

use std::collections::BTreeMap;

use super::policy::{Job, Policy};
use super::scenario::Scenario;

/// Latency of the victims, from arrival to completion.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Latency {
    /// Milliseconds.
    pub p50_ms: f64,
    /// Milliseconds.
    pub p99_ms: f64,
    /// Milliseconds.
    pub p999_ms: f64,
}

/// One scenario under one policy.
#[derive(Debug, Clone)]
pub struct Cell {
    /// The scenario.
    pub scenario: &'static str,
    /// The policy.
    pub policy: Policy,
    /// The victims without aggressors; `None` when nobody is a victim.
    pub alone: Option<Latency>,
    /// The victims with aggressors.
    pub contended: Latency,
    /// p99 contended over p99 alone.
    pub inflation: Option<f64>,
    /// Victims' work finished, of what arrived.
    pub served: f64,
    /// Aggressors' work finished per second.
    pub aggressor_throughput: f64,
    /// Slots or cores in use, whichever is nearer to its end.
    pub utilisation: f64,
    /// Jain's index of the aggressors' slot-seconds: 1 when all are equal.
    pub jain: f64,
    /// The aggressors' least slot-seconds over the most.
    pub min_max: f64,
}

#[derive(Debug)]
pub(super) struct Recorder {
    from: u64,
    end: u64,
    slots: f64,
    cores: f64,
    aggressive: Vec<bool>,
    latencies: Vec<f64>,
    arrived: u64,
    finished: u64,
    aggressor_finished: u64,
    slot_seconds: BTreeMap<u32, f64>,
    samples: u64,
    slots_busy: f64,
    cores_busy: f64,
}

impl Recorder {
    pub(super) fn new(scenario: &Scenario) -> Self {
        let mut slot_seconds = BTreeMap::new();
        for source in scenario.sources.iter().filter(|s| s.aggressor) {
            slot_seconds.insert(source.tenants.start, 0.0);
        }
        Self {
            from: super::nanos(scenario.warm_up),
            end: super::nanos(scenario.seconds),
            slots: f64::from(scenario.slots),
            cores: scenario.cores,
            aggressive: scenario.sources.iter().map(|s| s.aggressor).collect(),
            latencies: Vec::new(),
            arrived: 0,
            finished: 0,
            aggressor_finished: 0,
            slot_seconds,
            samples: 0,
            slots_busy: 0.0,
            cores_busy: 0.0,
        }
    }

    pub(super) fn arrived(&mut self, job: &Job) {
        // The last second's may rightly be unfinished.
        self.arrived += u64::from(self.counts(job));
    }

    fn counts(&self, job: &Job) -> bool {
        !self.aggressive[job.source] && job.arrived >= self.from && job.arrived + 1_000_000_000 < self.end
    }

    pub(super) fn finished(&mut self, now: u64, job: &Job) {
        self.use_slot(now, job);
        if self.aggressive[job.source] {
            self.aggressor_finished += u64::from(now >= self.from);
        } else if self.counts(job) {
            self.finished += 1;
            self.latencies.push((now - job.arrived) as f64 / 1e6);
        }
    }

    pub(super) fn cut_off(&mut self, end: u64, job: &Job) {
        self.use_slot(end, job);
        if self.counts(job) {
            self.latencies.push((end - job.arrived) as f64 / 1e6);
        }
    }

    fn use_slot(&mut self, now: u64, job: &Job) {
        if let (true, Some(started)) = (self.aggressive[job.source], job.started) {
            let used = now.saturating_sub(started.max(self.from)) as f64 / 1e9;
            *self.slot_seconds.entry(job.tenant).or_default() += used;
        }
    }

    pub(super) fn sample(&mut self, now: u64, running: usize, cores: f64) {
        if now >= self.from {
            self.samples += 1;
            self.slots_busy += (running as f64 / self.slots).min(1.0);
            self.cores_busy += cores / self.cores;
        }
    }

    fn latency(&mut self) -> Latency {
        self.latencies.sort_unstable_by(f64::total_cmp);
        let at = |q: f64| {
            let last = self.latencies.len().saturating_sub(1);
            self.latencies.get((last as f64 * q).round() as usize).copied().unwrap_or(0.0)
        };
        Latency { p50_ms: at(0.5), p99_ms: at(0.99), p999_ms: at(0.999) }
    }
}

impl Cell {
    pub(super) fn new(scenario: &Scenario, policy: Policy, alone: Option<Recorder>, mut contended: Recorder) -> Self {
        let alone = alone.map(|mut r| r.latency());
        let latency = contended.latency();
        let used: Vec<f64> = contended.slot_seconds.values().copied().collect();
        let (sum, squares) = (used.iter().sum::<f64>(), used.iter().map(|u| u * u).sum::<f64>());
        let (min, max) = used.iter().fold((f64::MAX, 0.0f64), |(lo, hi), u| (lo.min(*u), hi.max(*u)));
        let seconds = scenario.seconds - scenario.warm_up;
        let samples = (contended.samples.max(1)) as f64;
        Self {
            scenario: scenario.name,
            policy,
            alone,
            contended: latency,
            inflation: alone.map(|a| latency.p99_ms / a.p99_ms.max(1e-6)),
            served: contended.finished as f64 / (contended.arrived.max(1)) as f64,
            aggressor_throughput: contended.aggressor_finished as f64 / seconds,
            utilisation: (contended.slots_busy / samples).max(contended.cores_busy / samples),
            jain: if squares > 0.0 { sum * sum / (used.len() as f64 * squares) } else { 1.0 },
            min_max: if max > 0.0 { min / max } else { 1.0 },
        }
    }
}
