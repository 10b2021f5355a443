//! Objectives, and how fast their budgets are spent.
//!
//! An objective says which part of looks, or of requests, must be good over thirty days. What may be bad is a budget; how
//! many times too fast it is being spent is its burn rate. Two windows must agree before anybody is told: the long one says
//! that it matters, the short one that it is still going on. (`reference`: Health, "burn-rate rules (14.4/6/3/1)".)

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Counts of good and of all, in buckets that grow coarser with age. A few kilobytes, however long it runs.
#[derive(Debug, Clone)]
pub struct Counts {
    rings: [Ring; 3],
    /// When counting began.
    first: Option<Timestamp>,
}

#[derive(Debug, Clone)]
struct Ring {
    width: i64,
    buckets: Vec<Bucket>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    /// Which stretch of time it counts, since 1970; another one has been overwritten.
    number: i64,
    good: u32,
    all: u32,
}

/// Width of a bucket in seconds, and how many there are: six hours, three days, thirty days.
const RINGS: [(i64, usize); 3] = [(60, 360), (1_800, 144), (21_600, 120)];

impl Ring {
    fn length(&self) -> i64 {
        i64::try_from(self.buckets.len()).unwrap_or(i64::MAX)
    }
}

impl Default for Counts {
    fn default() -> Self {
        let ring = |(width, number): (i64, usize)| Ring { width, buckets: vec![Bucket::default(); number + 1] };
        Self { rings: RINGS.map(ring), first: None }
    }
}

impl Counts {
    /// Counts something that was good or not.
    pub fn add(&mut self, at: Timestamp, good: bool) {
        self.first = Some(self.first.map_or(at, |first| first.min(at)));
        for ring in &mut self.rings {
            let number = at.as_second().div_euclid(ring.width);
            let length = ring.length();
            let Ok(index) = usize::try_from(number.rem_euclid(length)) else { continue };
            let bucket = &mut ring.buckets[index];
            if bucket.number < number || bucket.all == 0 {
                *bucket = Bucket { number, good: 0, all: 0 };
            }
            if bucket.number == number {
                bucket.all = bucket.all.saturating_add(1);
                bucket.good = bucket.good.saturating_add(u32::from(good));
            }
        }
    }

    /// Which part was bad in a window that ends at an instant. The time before anything was counted was good: whoever has
    /// looked for a minute does not know that a month is lost.
    pub fn bad(&self, now: Timestamp, window: Duration) -> f64 {
        let (good, all) = self.window(now, window);
        let Some(first) = self.first.filter(|_| all > 0) else { return 0.0 };
        let known = (now.duration_since(first).as_secs_f64().max(0.0) + RINGS[0].0 as f64) / window.as_secs_f64();
        (1.0 - good as f64 / all as f64) * known.min(1.0)
    }

    /// How many were bad in a window that ends at an instant.
    pub fn number_bad(&self, now: Timestamp, window: Duration) -> u64 {
        let (good, all) = self.window(now, window);
        all - good
    }

    /// How many were good, and how many there were.
    fn window(&self, now: Timestamp, window: Duration) -> (u64, u64) {
        let seconds = window.as_secs().cast_signed();
        let ring = self.rings.iter().find(|ring| seconds <= ring.width * (ring.length() - 1));
        let ring = ring.unwrap_or(&self.rings[2]);
        let last = now.as_second().div_euclid(ring.width);
        // The bucket of now is not full: as many full ones as the window has go with it.
        let first = last - (seconds / ring.width).max(1) + 1;
        let (mut good, mut all) = (0_u64, 0_u64);
        for bucket in ring.buckets.iter().filter(|b| b.all > 0 && (first..=last).contains(&b.number)) {
            good += u64::from(bucket.good);
            all += u64::from(bucket.all);
        }
        (good, all)
    }
}

/// So many bad looks a rule needs: one alone says nothing of how fast a budget is spent, however rarely is looked.
const LEAST: u64 = 3;

/// How urgent a burning budget is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Urgency {
    /// Somebody should look in working hours.
    Ticket,
    /// Somebody is woken.
    Page,
}

/// A pair of windows and the rate above which both must be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BurnRule {
    /// The budget is spent this many times too fast.
    pub rate: f64,
    /// The window that says that it matters.
    pub long: Duration,
    /// The window that says that it still goes on.
    pub short: Duration,
    /// How urgent it is.
    pub urgency: Urgency,
}

const HOUR: u64 = 3_600;

/// The usual four: two per cent of a month's budget in an hour, five in six, ten in a day, ten in three.
pub const BURN_RULES: [BurnRule; 4] = [
    BurnRule { rate: 14.4, long: Duration::from_secs(HOUR), short: Duration::from_secs(300), urgency: Urgency::Page },
    BurnRule {
        rate: 6.0,
        long: Duration::from_secs(6 * HOUR),
        short: Duration::from_secs(1_800),
        urgency: Urgency::Page,
    },
    BurnRule {
        rate: 3.0,
        long: Duration::from_secs(24 * HOUR),
        short: Duration::from_secs(2 * HOUR),
        urgency: Urgency::Ticket,
    },
    BurnRule {
        rate: 1.0,
        long: Duration::from_secs(72 * HOUR),
        short: Duration::from_secs(6 * HOUR),
        urgency: Urgency::Ticket,
    },
];

/// The time that an objective is about.
pub const PERIOD: Duration = Duration::from_secs(30 * 24 * HOUR);

/// What has become of a budget.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Budget {
    /// The part that must be good, such as 0.999.
    pub objective: f64,
    /// What is left of what may be bad, from 1 to 0; below nought it is overdrawn.
    pub left: f64,
    /// The same without what something shared has spent.
    pub own_left: f64,
    /// How many times too fast it is being spent, by the most urgent rule that is met.
    pub burning: Option<(f64, Urgency)>,
}

/// What an objective is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// It could be worked with.
    Availability,
    /// It was fast enough.
    Latency,
}

impl Objective {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Availability, Self::Latency];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Availability => "availability",
            Self::Latency => "latency",
        }
    }

    /// The aspects of a tenant that say whether it was met.
    pub fn aspects(self) -> [&'static str; 2] {
        match self {
            Self::Availability => ["database", "page"],
            Self::Latency => ["database latency", "page latency"],
        }
    }
}

/// Something of each objective of each tenant.
pub type ByObjective<T> = std::collections::BTreeMap<(String, Objective), T>;

/// How a look counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Good.
    Good,
    /// Bad, and nothing that is shared explains it.
    Bad,
    /// Bad, because of something that is shared: it counts for what is left, and whoever is responsible is told elsewhere.
    Shared,
}

/// The looks of one objective.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    all: Counts,
    own: Counts,
    /// So far: good, bad, and bad because of something that is shared.
    pub looks: [u64; 3],
}

impl Tally {
    /// Counts a look.
    pub fn add(&mut self, at: Timestamp, look: Look) {
        self.all.add(at, look == Look::Good);
        self.own.add(at, look != Look::Bad);
        self.looks[look as usize] += 1;
    }

    /// What has become of the budget.
    pub fn budget(&self, objective: f64, now: Timestamp) -> Budget {
        let (all, own) = (Budget::of(&self.all, objective, now), Budget::of(&self.own, objective, now));
        Budget { burning: own.burning, own_left: own.left, ..all }
    }
}

impl Budget {
    /// Looks at a budget.
    pub fn of(counts: &Counts, objective: f64, now: Timestamp) -> Self {
        let allowed = (1.0 - objective).max(f64::EPSILON);
        let rate = |window| counts.bad(now, window) / allowed;
        let burning = BURN_RULES
            .iter()
            .filter(|rule| counts.number_bad(now, rule.long) >= LEAST)
            .find(|rule| rate(rule.long) > rule.rate && rate(rule.short) > rule.rate)
            .map(|rule| (rate(rule.long), rule.urgency));
        let left = 1.0 - rate(PERIOD);
        Self { objective, left, own_left: left, burning }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(minutes: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + minutes * 60).unwrap()
    }

    fn looks(counts: &mut Counts, minutes: std::ops::Range<i64>, good: impl Fn(i64) -> bool) {
        for minute in minutes {
            counts.add(at(minute), good(minute));
            counts.add(at(minute), good(minute));
        }
    }

    #[test]
    fn an_outage_burns_at_once_and_stops_burning_when_it_is_over() {
        let mut counts = Counts::default();
        looks(&mut counts, 0..1_440, |_| true);
        assert_eq!(Budget::of(&counts, 0.999, at(1_440)).burning, None);
        looks(&mut counts, 1_440..1_443, |_| false);
        let budget = Budget::of(&counts, 0.999, at(1_442));
        assert!(matches!(budget.burning, Some((rate, Urgency::Page)) if rate > 14.4), "{budget:?}");
        looks(&mut counts, 1_443..1_480, |_| true);
        // The hour still says that it matters, the half hour that it is over.
        assert!(counts.bad(at(1_479), Duration::from_secs(3_600)) > 0.01);
        assert!(!matches!(Budget::of(&counts, 0.999, at(1_479)).burning, Some((_, Urgency::Page))));
    }

    #[test]
    fn a_slow_burn_is_a_ticket_and_an_empty_budget_is_told() {
        let mut counts = Counts::default();
        // One look in a hundred is bad, for three days: ten times too many for 99.9 per cent, and a month's budget.
        looks(&mut counts, 0..4_400, |minute| minute % 100 != 0);
        let budget = Budget::of(&counts, 0.999, at(4_399));
        assert!(budget.burning.is_some() && budget.left <= 0.0, "{budget:?}");
        // For a minute, and nothing is known of the month.
        let mut counts = Counts::default();
        looks(&mut counts, 0..2, |minute| minute == 0);
        let budget = Budget::of(&counts, 0.999, at(1));
        assert!(budget.left > 0.9, "{budget:?}");
        // Four in ten thousand of 99.9: neither.
        let mut counts = Counts::default();
        looks(&mut counts, 0..10_000, |minute| minute % 2_500 != 7);
        let budget = Budget::of(&counts, 0.999, at(9_999));
        assert!(budget.burning.is_none() && budget.left > 0.5, "{budget:?}");
    }

    #[test]
    fn what_something_shared_has_spent_is_gone_and_burns_for_nobody() {
        let mut tally = Tally::default();
        for minute in 0..120 {
            let look = if (60..80).contains(&minute) { Look::Shared } else { Look::Good };
            tally.add(at(minute), look);
        }
        let budget = tally.budget(0.999, at(80));
        assert!(budget.burning.is_none() && budget.left < 0.7, "{budget:?}");
        for minute in 120..140 {
            tally.add(at(minute), Look::Bad);
        }
        assert!(matches!(tally.budget(0.999, at(139)).burning, Some((_, Urgency::Page))));
        assert_eq!(tally.looks, [100, 20, 20]);
    }

    #[test]
    fn what_is_long_past_does_not_count() {
        let mut counts = Counts::default();
        looks(&mut counts, 0..60, |_| false);
        looks(&mut counts, 31 * 1_440..31 * 1_440 + 10, |_| true);
        assert!(counts.bad(at(31 * 1_440 + 9), PERIOD) < f64::EPSILON);
        assert!(Counts::default().bad(at(0), PERIOD) < f64::EPSILON);
    }
}
