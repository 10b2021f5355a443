//! When not to try: a circuit breaker for one server, and a budget for retries.

use std::time::Duration;

use crate::time::Timestamp;

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerConfig {
    /// Failures in a row that open it.
    pub failures: u32,
    /// How long it stays open at first; doubled after each trial that fails.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self { failures: 3, first_pause: Duration::from_secs(1), longest_pause: Duration::from_secs(30) }
    }
}

/// Keeps attempts away from a server that fails: closed, then open for a while, then one trial at a time.
///
/// ```
/// use cofferdam_fairness::{Breaker, BreakerConfig, Timestamp};
/// let mut breaker = Breaker::new(BreakerConfig::default());
/// let t = Timestamp::from_millis(0);
/// for _ in 0..3 {
///     assert!(breaker.allows(t));
///     breaker.failed(t);
/// }
/// assert!(!breaker.allows(Timestamp::from_millis(999)));
/// assert!(breaker.allows(Timestamp::from_millis(1_000)), "one trial");
/// assert!(!breaker.allows(Timestamp::from_millis(1_000)), "and no second beside it");
/// breaker.succeeded();
/// assert!(breaker.allows(Timestamp::from_millis(1_001)));
/// ```
#[derive(Debug, Clone)]
pub struct Breaker {
    config: BreakerConfig,
    failures: u32,
    pause: Duration,
    open_until: Option<Timestamp>,
    trial_until: Option<Timestamp>,
}

impl Breaker {
    /// A closed breaker.
    pub fn new(config: BreakerConfig) -> Self {
        Self { config, failures: 0, pause: config.first_pause, open_until: None, trial_until: None }
    }

    /// Whether an attempt may be made now. When the pause is over, one attempt is let through as a trial; a trial
    /// whose end nobody reports is given up after another pause.
    pub fn allows(&mut self, now: Timestamp) -> bool {
        let Some(until) = self.open_until else { return true };
        if now < until || self.trial_until.is_some_and(|t| now < t) {
            return false;
        }
        self.trial_until = Some(now + self.pause);
        true
    }

    /// Whether attempts are refused now. Changes nothing.
    pub fn is_open(&self, now: Timestamp) -> bool {
        self.open_until.is_some_and(|until| now < until || self.trial_until.is_some_and(|t| now < t))
    }

    /// An attempt succeeded.
    pub fn succeeded(&mut self) {
        *self = Self::new(self.config);
    }

    /// An attempt failed.
    pub fn failed(&mut self, now: Timestamp) {
        self.failures = self.failures.saturating_add(1);
        if self.open_until.is_some() {
            if self.trial_until.take().is_none() {
                return; // a straggler from before it opened
            }
            self.pause = (2 * self.pause).min(self.config.longest_pause);
        } else if self.failures < self.config.failures.max(1) {
            return;
        }
        self.open_until = Some(now + self.pause);
    }
}

/// Bounds retries to a part of the attempts that needed none, so that retries cannot multiply an overload.
#[derive(Debug, Clone)]
pub struct RetryBudget {
    /// Retries earned by one first attempt.
    ratio: f64,
    most: f64,
    balance: f64,
}

impl RetryBudget {
    /// `percent` retries per hundred first attempts, at most `burst` saved up; it begins with `burst`.
    pub fn new(percent: u32, burst: u32) -> Self {
        let most = f64::from(burst.max(1));
        Self { ratio: f64::from(percent) / 100.0, most, balance: most }
    }

    /// Counts a first attempt.
    pub fn attempted(&mut self) {
        self.balance = (self.balance + self.ratio).min(self.most);
    }

    /// Takes one retry, if there is one left.
    pub fn take(&mut self) -> bool {
        let may = self.balance >= 1.0;
        if may {
            self.balance -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_stays_dead_is_tried_ever_more_rarely() {
        let mut breaker = Breaker::new(BreakerConfig::default());
        let mut attempts = 0;
        for ms in (0..300_000).step_by(10) {
            let now = Timestamp::from_millis(ms);
            if breaker.allows(now) {
                attempts += 1;
                breaker.failed(now);
            }
        }
        // Three to open it, then after 1, 2, 4, 8, 16, 30, 30 … seconds.
        assert!((3 + 12..=3 + 16).contains(&attempts), "{attempts}");
    }

    #[test]
    fn one_success_in_between_keeps_it_closed() {
        let mut breaker = Breaker::new(BreakerConfig::default());
        for _ in 0..10 {
            breaker.failed(Timestamp::default());
            breaker.failed(Timestamp::default());
            breaker.succeeded();
        }
        assert!(breaker.allows(Timestamp::default()));
    }

    #[test]
    fn retries_stay_a_part_of_the_attempts() {
        let mut budget = RetryBudget::new(20, 10);
        let mut retries = 0;
        for _ in 0..1_000 {
            budget.attempted();
            retries += u32::from(budget.take());
        }
        assert!((200..=211).contains(&retries), "{retries}");
    }
}
