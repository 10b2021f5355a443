//! The modelled server: cores shared by everything that computes, and waiting that is free.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Processor sharing keeps one clock of *work done per computing job*: a job that needs `c` more finishes when the
/// clock has advanced by `c`. So starting and finishing cost O(log n), however many compute at once.
#[derive(Debug)]
pub(super) struct Server {
    cores: f64,
    now: u64,
    /// Seconds of computing that each computing job has been given so far.
    clock: f64,
    computing: BinaryHeap<Reverse<(OrderedF64, usize)>>,
    /// What jobs wait for after computing, by job.
    waits: std::collections::HashMap<usize, f64>,
    waiting: BinaryHeap<Reverse<(u64, usize)>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct OrderedF64(f64);

impl Eq for OrderedF64 {}

impl PartialOrd for OrderedF64 {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for OrderedF64 {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl Server {
    pub(super) fn new(cores: f64) -> Self {
        Self {
            cores,
            now: 0,
            clock: 0.0,
            computing: BinaryHeap::new(),
            waits: std::collections::HashMap::new(),
            waiting: BinaryHeap::new(),
        }
    }

    /// Jobs that compute or wait.
    pub(super) fn running(&self) -> usize {
        self.computing.len() + self.waiting.len()
    }

    pub(super) fn busy_cores(&self) -> f64 {
        (self.computing.len() as f64).min(self.cores)
    }

    pub(super) fn start(&mut self, now: u64, job: usize, compute: f64, wait: f64) {
        self.advance(now);
        if compute > 0.0 {
            self.waits.insert(job, wait);
            self.computing.push(Reverse((OrderedF64(self.clock + compute), job)));
        } else {
            self.waiting.push(Reverse((now + super::nanos(wait), job)));
        }
    }

    /// When the next job has finished, if nothing starts before.
    pub(super) fn next_completion(&mut self) -> Option<u64> {
        loop {
            let computed = self.computed_at();
            let waited = self.waiting.peek().map(|Reverse((at, _))| *at);
            match (computed, waited) {
                // Its computing ends first, but then it waits.
                (Some(c), w) if w.is_none_or(|w| c <= w) => {
                    let Reverse((_, job)) = self.computing.peek().copied()?;
                    let wait = self.waits.get(&job).copied().unwrap_or(0.0);
                    if wait <= 0.0 {
                        return Some(c);
                    }
                    self.advance(c);
                    self.computing.pop();
                    self.waits.remove(&job);
                    self.waiting.push(Reverse((c + super::nanos(wait), job)));
                }
                (_, w) => return w,
            }
        }
    }

    /// Takes out the job that [`next_completion`](Self::next_completion) spoke of.
    pub(super) fn complete(&mut self) -> Option<usize> {
        let at = self.next_completion()?;
        let computed = self.computed_at();
        self.advance(at);
        if computed.is_some_and(|c| c <= at) {
            let Reverse((_, job)) = self.computing.pop()?;
            self.waits.remove(&job);
            return Some(job);
        }
        self.waiting.pop().map(|Reverse((_, job))| job)
    }

    pub(super) fn advance(&mut self, now: u64) {
        if now > self.now {
            let seconds = (now - self.now) as f64 / 1e9;
            self.clock += seconds * self.speed();
            self.now = now;
        }
    }

    /// The part of a core that each computing job gets.
    fn speed(&self) -> f64 {
        (self.cores / (self.computing.len().max(1) as f64)).min(1.0)
    }

    fn computed_at(&self) -> Option<u64> {
        let Reverse((at, _)) = self.computing.peek()?;
        Some(self.now + super::nanos(((at.0 - self.clock) / self.speed()).max(0.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn computing_jobs_share_the_cores_and_waiting_jobs_do_not() {
        let mut server = Server::new(2.0);
        for job in 0..4 {
            server.start(0, job, 1.0, 0.0);
        }
        server.start(0, 9, 0.0, 1.5);
        assert_eq!(server.complete(), Some(9));
        assert!(
            (server.next_completion().unwrap() as f64 / 1e9 - 2.0).abs() < 1e-6,
            "four seconds of work on two cores"
        );
    }

    #[test]
    fn a_job_that_computes_and_then_waits_takes_both() {
        let mut server = Server::new(1.0);
        server.start(0, 1, 0.5, 0.25);
        assert!((server.next_completion().unwrap() as f64 / 1e9 - 0.75).abs() < 1e-6);
        assert_eq!(server.complete(), Some(1));
        assert_eq!(server.running(), 0);
    }
}
