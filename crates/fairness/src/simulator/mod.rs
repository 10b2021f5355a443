//! Deterministic simulations: the same arrivals through different scheduling policies, on a modelled server.
//!
//! The server has slots and cores. Work first computes, sharing the cores with all other work that computes, and then
//! waits (for a disk, a lock, another service), which costs nobody anything. That is what makes the number of slots
//! matter: forty transactions that wait are no trouble, forty that compute make each other twenty times slower.
//!
//! Everything follows from the seed. `cofferdam bench simulate` prints [`Cell`]s as a table and a picture.

mod measure;
mod policy;
mod scenario;
mod server;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::time::Timestamp;

pub use measure::{Cell, Latency};
pub use policy::{Discipline, Policy};
pub use scenario::{Cost, Scenario, Source};

use measure::Recorder;
use policy::Job;
use server::Server;

/// How often policies that look at running work are given the chance.
const TICK_MS: u64 = 50;

/// Runs a scenario under a policy, with and without its aggressors.
pub fn run(scenario: &Scenario, policy: Policy, seed: u64) -> Cell {
    let alone = if scenario.has_both() { Some(play(scenario, policy, seed, false)) } else { None };
    let contended = play(scenario, policy, seed, true);
    Cell::new(scenario, policy, alone, contended)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrival { source: usize },
    Tick,
}

/// One run: events in order of time until the scenario is over.
fn play(scenario: &Scenario, policy: Policy, seed: u64, aggressors: bool) -> Recorder {
    let mut discipline = policy.discipline(scenario);
    let mut server = Server::new(scenario.cores);
    let mut recorder = Recorder::new(scenario);
    let mut events = BinaryHeap::new();
    let mut sources: Vec<fastrand::Rng> = Vec::new();
    let mut seeds = fastrand::Rng::with_seed(seed);
    for (i, source) in scenario.sources.iter().enumerate() {
        let mut rng = fastrand::Rng::with_seed(seeds.u64(..));
        if aggressors || !source.is_aggressor() {
            for at in source.first_arrivals(&mut rng) {
                events.push(Reverse((at, i as u64, Event::Arrival { source: i })));
            }
        }
        sources.push(rng);
    }
    let end = nanos(scenario.seconds);
    events.push(Reverse((0, u64::MAX, Event::Tick)));
    let mut jobs: slab::Slab<Job> = slab::Slab::new();
    loop {
        let next = events.peek().map_or(u64::MAX, |Reverse((at, _, _))| *at);
        let (now, finished) = match server.next_completion() {
            Some(at) if at <= next => (at, server.complete()),
            _ => (next, None),
        };
        if now >= end {
            break;
        }
        server.advance(now);
        let at = Timestamp::from_nanos(now);
        if let Some(key) = finished {
            let job = jobs.remove(key);
            discipline.complete(at, key, job.tenant);
            recorder.finished(now, &job);
            let source = &scenario.sources[job.source];
            if let Some(think) = source.again(&mut sources[job.source]) {
                events.push(Reverse((now + think, job.source as u64, Event::Arrival { source: job.source })));
            }
        } else if let Some(Reverse((_, _, event))) = events.pop() {
            match event {
                Event::Tick => {
                    discipline.tick(at);
                    recorder.sample(now, server.running(), server.busy_cores());
                    events.push(Reverse((now + TICK_MS * 1_000_000, u64::MAX, Event::Tick)));
                }
                Event::Arrival { source } => {
                    let s = &scenario.sources[source];
                    let rng = &mut sources[source];
                    let (compute, wait) = s.cost(rng);
                    let (tenant, class) = (s.tenant(rng), s.class);
                    let job = Job { source, tenant, arrived: now, started: None, compute, wait };
                    recorder.arrived(&job);
                    let key = jobs.insert(job);
                    discipline.submit(at, key, tenant, class);
                    if let Some(gap) = s.next_arrival(rng)
                        && now + gap < end
                    {
                        events.push(Reverse((now + gap, source as u64, Event::Arrival { source })));
                    }
                }
            }
        }
        while let Some(key) = discipline.next(at) {
            let job = &mut jobs[key];
            job.started = Some(now);
            server.start(now, key, job.compute, job.wait);
        }
    }
    // What still runs has used slots too, and what still waits has waited.
    for (_, job) in &jobs {
        recorder.cut_off(end, job);
    }
    recorder
}

fn nanos(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}
