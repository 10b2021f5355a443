//! Budgets over time: how often, how much work, how many bytes.

use std::time::Duration;

use crate::time::Timestamp;

/// So many per second, with a burst: requests or transactions, counted when they start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    interval: Duration,
    burst: u32,
}

impl Rate {
    /// `per_second` starts a second on average, at most `burst` at once. Both at least 1.
    pub fn per_second(per_second: u32, burst: u32) -> Self {
        Self { interval: Duration::from_secs(1) / per_second.max(1), burst: burst.max(1) }
    }

    pub(crate) const fn one_per_second(burst: u32) -> Self {
        Self { interval: Duration::from_secs(1), burst }
    }

    /// Starts a second.
    pub fn frequency(self) -> u32 {
        (1.0 / self.interval.as_secs_f64()).round() as u32
    }

    /// Starts at once.
    pub fn burst(self) -> u32 {
        self.burst
    }

    /// The time between two starts at the average rate.
    pub(crate) fn interval(self) -> Duration {
        self.interval
    }
}

/// The state of a [`Rate`], as the generic cell rate algorithm keeps it (ITU-T I.371): one timestamp.
///
/// ```
/// use cofferdam_fairness::{Gcra, Rate, Timestamp};
/// let rate = Rate::per_second(10, 2);
/// let (mut state, t) = (Gcra::default(), Timestamp::from_millis(5_000));
/// state.take(rate, t);
/// state.take(rate, t);
/// assert_eq!(state.ready_at(rate), Timestamp::from_millis(5_100));
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Gcra {
    /// When the next one would be due if they came evenly: the theoretical arrival time.
    due: Timestamp,
}

impl Gcra {
    /// From when on one more conforms.
    pub fn ready_at(self, rate: Rate) -> Timestamp {
        self.due.before(rate.interval * (rate.burst - 1))
    }

    /// Counts one that starts now, whether it conforms or not.
    pub fn take(&mut self, rate: Rate, now: Timestamp) {
        self.due = self.due.max(now) + rate.interval;
    }
}

/// So many units a second, with a burst, paid afterwards: slot-milliseconds of work, or bytes. Units are the caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// Units earned per second; at least 1.
    pub per_second: u64,
    /// Units that can be saved up; at least 1.
    pub burst: u64,
}

/// The state of an [`Allowance`]. What things cost is known only afterwards, so it may fall below zero: then nothing
/// starts until it has recovered.
#[derive(Debug, Clone, Copy, Default)]
pub struct Postpaid {
    /// Units spent and not earned back yet; at most `burst` are never earned in advance.
    spent: f64,
    at: Timestamp,
}

impl Postpaid {
    /// Charges units that were used up to now.
    pub fn charge(&mut self, allowance: Allowance, now: Timestamp, units: f64) {
        self.spent = self.spent_at(allowance, now) + units;
        self.at = self.at.max(now);
    }

    /// From when on something may start: when no more than the burst is spent.
    pub fn ready_at(self, allowance: Allowance) -> Timestamp {
        let debt = self.spent - allowance.burst.max(1) as f64;
        if debt < 0.0 {
            return Timestamp::default();
        }
        self.at
            + Duration::from_secs_f64((debt / allowance.per_second.max(1) as f64).min(1e9))
            + Duration::from_nanos(1)
    }

    /// Units left of the burst; negative in debt.
    pub fn balance(self, allowance: Allowance, now: Timestamp) -> f64 {
        allowance.burst.max(1) as f64 - self.spent_at(allowance, now)
    }

    fn spent_at(self, allowance: Allowance, now: Timestamp) -> f64 {
        (self.spent - now.since(self.at).as_secs_f64() * allowance.per_second.max(1) as f64).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whoever_waits_until_it_conforms_never_exceeds_rate_and_burst(
            per_second in 1u32..1_000, burst in 1u32..50, gaps in proptest::collection::vec(0u64..400, 1..300),
        ) {
            let rate = Rate::per_second(per_second, burst);
            let (mut state, mut now, mut starts) = (Gcra::default(), Timestamp::from_millis(10_000), Vec::new());
            for gap in gaps {
                now = (now + Duration::from_millis(gap)).max(state.ready_at(rate));
                state.take(rate, now);
                starts.push(now);
            }
            for (i, first) in starts.iter().enumerate() {
                for (n, last) in starts[i..].iter().enumerate() {
                    let allowed = f64::from(burst) + last.since(*first).as_secs_f64() * f64::from(per_second);
                    prop_assert!((n + 1) as f64 <= allowed + 1e-3);
                }
            }
        }

        #[test]
        fn work_paid_afterwards_averages_out_at_the_allowance(costs in proptest::collection::vec(1u64..5_000, 20..100)) {
            let allowance = Allowance { per_second: 500, burst: 1_000 };
            let (mut state, mut now, mut used) = (Postpaid::default(), Timestamp::from_millis(1_000), 0u64);
            let begun = now;
            for cost in costs {
                now = now.max(state.ready_at(allowance));
                prop_assert!(state.balance(allowance, now) > -1e-6);
                now = now + Duration::from_millis(cost / 10);
                state.charge(allowance, now, cost as f64);
                used += cost;
            }
            let earned = 1_000.0 + now.since(begun).as_secs_f64() * 500.0;
            prop_assert!(used as f64 <= earned + 5_000.0, "one piece of work beyond what was earned at most");
        }
    }

    #[test]
    fn a_debt_is_waited_for_and_idling_saves_no_more_than_the_burst() {
        let allowance = Allowance { per_second: 100, burst: 200 };
        let mut state = Postpaid::default();
        state.charge(allowance, Timestamp::from_millis(1_000), 500.0);
        assert_eq!(state.ready_at(allowance).since(Timestamp::from_millis(4_000)).as_millis(), 0);
        assert!(state.ready_at(allowance) > Timestamp::from_millis(4_000));
        assert!((state.balance(allowance, Timestamp::from_millis(3_600_000)) - 200.0).abs() < 1e-9);
    }
}
