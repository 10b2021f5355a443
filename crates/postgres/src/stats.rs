//! What was done for each database, as PgBouncer counts it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often averages are taken.
const PERIOD: Duration = Duration::from_secs(60);

/// The counters of one database. Sessions add to them once per transaction.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    totals: [AtomicU64; COUNTERS],
    history: Mutex<History>,
}

/// Counters in the order of PgBouncer's columns.
pub(crate) const COUNTERS: usize = 12;

/// What one transaction adds, or everything so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Work {
    /// Server connections handed to clients.
    pub(crate) assignments: u64,
    pub(crate) transactions: u64,
    pub(crate) queries: u64,
    /// Bytes from clients and from servers.
    pub(crate) received: u64,
    pub(crate) sent: u64,
    /// Microseconds with a server connection: in transactions, and in queries.
    pub(crate) transaction_us: u64,
    pub(crate) query_us: u64,
    /// Microseconds of waiting for a slot or a server connection.
    pub(crate) wait_us: u64,
    pub(crate) client_parses: u64,
    pub(crate) server_parses: u64,
    pub(crate) binds: u64,
    pub(crate) logins: u64,
}

impl Work {
    pub(crate) fn figures(&self) -> [u64; COUNTERS] {
        [
            self.assignments,
            self.transactions,
            self.queries,
            self.received,
            self.sent,
            self.transaction_us,
            self.query_us,
            self.wait_us,
            self.client_parses,
            self.server_parses,
            self.binds,
            self.logins,
        ]
    }
}

#[derive(Debug)]
struct History {
    since: Instant,
    then: [u64; COUNTERS],
    averages: [u64; COUNTERS],
}

impl Default for History {
    fn default() -> Self {
        Self { since: Instant::now(), then: [0; COUNTERS], averages: [0; COUNTERS] }
    }
}

impl Stats {
    pub(crate) fn add(&self, work: &Work) {
        for (total, more) in self.totals.iter().zip(work.figures()) {
            if more > 0 {
                total.fetch_add(more, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn totals(&self) -> [u64; COUNTERS] {
        std::array::from_fn(|n| self.totals[n].load(Ordering::Relaxed))
    }

    /// Counts per second over the last whole period; times per transaction or query.
    pub(crate) fn averages(&self) -> [u64; COUNTERS] {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).averages
    }

    /// Takes averages when a period is over.
    pub(crate) fn tick(&self, now: Instant) {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(history.since);
        if passed >= PERIOD {
            let totals = self.totals();
            history.averages = averages(&totals, &history.then, passed);
            (history.since, history.then) = (now, totals);
        }
    }
}

/// Columns that are times, and the column of what they are times of.
const PER: [(usize, usize); 3] = [(5, 1), (6, 2), (7, 1)];

pub(crate) fn averages(now: &[u64; COUNTERS], then: &[u64; COUNTERS], passed: Duration) -> [u64; COUNTERS] {
    let more: [u64; COUNTERS] = std::array::from_fn(|n| now[n].saturating_sub(then[n]));
    std::array::from_fn(|n| match PER.iter().find(|(time, _)| *time == n) {
        Some((_, of)) => more[n] / more[*of].max(1),
        None => (more[n] as f64 / passed.as_secs_f64().max(1e-3)) as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_are_per_second_and_times_per_transaction() {
        let then = Work { transactions: 100, transaction_us: 5_000, ..Work::default() }.figures();
        let now = Work { transactions: 700, transaction_us: 11_000, ..Work::default() }.figures();
        let average = averages(&now, &then, Duration::from_secs(60));
        assert_eq!((average[1], average[5]), (10, 10));
    }
}
