//! Objectives, and how fast their budgets are spent.
//!
//! An objective says which part of looks, or of requests, must be good over thirty days. What may be bad is a budget; how
//! many times too fast it is being spent is its burn rate. Two windows must agree before anybody is told: the long one says
//! that it matters, the short one that it is still going on. (`reference`: Health, "burn-rate rules (14.4/6/3/1)".)

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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

/// The looks of one objective, counted in buckets that grow coarser with age: ten kilobytes, however long it runs.
#[derive(Debug, Clone, Deserialize)]
#[serde(from = "Kept")]
pub struct Tally {
    rings: [Ring; 3],
    /// When was counted last.
    last: Option<Timestamp>,
    /// Since this was begun, or read: good, bad, and bad because of something that is shared.
    pub looks: [u64; 3],
}

#[derive(Debug, Clone)]
struct Ring {
    width: u32,
    buckets: Vec<Bucket>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Bucket {
    /// Which stretch of time it counts, since 1970; another one has been overwritten.
    number: u32,
    all: u32,
    /// Bad, and for each of them nothing that is shared explains it.
    own: u32,
    /// Bad.
    bad: u32,
    /// Seconds of which anything is known.
    known: u32,
}

/// Width of a bucket in seconds, and how many there are: six hours, three days, thirty days.
const RINGS: [(u32, u32); 3] = [(60, 360), (1_800, 144), (21_600, 120)];

impl Ring {
    fn length(&self) -> u32 {
        u32::try_from(self.buckets.len()).unwrap_or(u32::MAX)
    }

    fn number(&self, at: Timestamp) -> u32 {
        u32::try_from(at.as_second().max(0) / i64::from(self.width)).unwrap_or(u32::MAX)
    }

    fn bucket(&mut self, number: u32) -> &mut Bucket {
        let index = number % self.length();
        &mut self.buckets[index as usize]
    }
}

impl Default for Tally {
    fn default() -> Self {
        let ring = |(width, number)| Ring { width, buckets: vec![Bucket::default(); number as usize + 1] };
        Self { rings: RINGS.map(ring), last: None, looks: [0; 3] }
    }
}

impl Tally {
    /// Counts a look, which stands for so many; the next is expected after an interval.
    pub fn add(&mut self, at: Timestamp, look: Look, times: u32, interval: Duration) {
        self.looks[look as usize] += u64::from(times);
        // A look speaks of the time since the one before it; but of a pause in which nobody looked nothing is known.
        let interval = u32::try_from(interval.as_secs()).unwrap_or(u32::MAX).max(1);
        let since = self.last.map_or(i64::from(interval), |last| at.duration_since(last).as_secs().max(0));
        let known = u32::try_from(since).unwrap_or(u32::MAX).min(interval.saturating_mul(times.saturating_add(1)));
        // One that is counted late, because it was not known whose fault it was; or the clock was set back.
        let late = |last: &Timestamp| (1..3_600).contains(&last.duration_since(at).as_secs());
        self.last = Some(self.last.filter(late).unwrap_or(at));
        for ring in &mut self.rings {
            let number = ring.number(at);
            let bucket = ring.bucket(number);
            // One that is long past; or of a time that has not come yet, because the clock was wrong.
            if bucket.number != number {
                *bucket = Bucket { number, ..Bucket::default() };
            }
            let count = |counts: bool| if counts { times } else { 0 };
            bucket.all = bucket.all.saturating_add(times);
            bucket.own = bucket.own.saturating_add(count(look == Look::Bad));
            bucket.bad = bucket.bad.saturating_add(count(look != Look::Good));
            bucket.known = bucket.known.saturating_add(known);
        }
    }

    /// What has become of the budget.
    pub fn budget(&self, objective: f64, now: Timestamp) -> Budget {
        let allowed = (1.0 - objective).max(f64::EPSILON);
        let window = |window| self.window(now, window);
        let rate = |window| part(window) / allowed;
        let burning = BURN_RULES
            .iter()
            .map(|rule| (rule, window(rule.long), window(rule.short)))
            .filter(|(_, long, _)| long.own >= LEAST)
            .map(|(rule, long, short)| (rule, rate((long.own, long)), rate((short.own, short))))
            .find(|(rule, long, short)| *long > rule.rate && *short > rule.rate)
            .map(|(rule, long, _)| (long, rule.urgency));
        let period = window(PERIOD);
        let (left, own_left) = (1.0 - rate((period.bad, period)), 1.0 - rate((period.own, period)));
        Budget { objective, left, own_left, burning }
    }

    /// What was counted in a window that ends at an instant.
    fn window(&self, now: Timestamp, window: Duration) -> Window {
        let seconds = u32::try_from(window.as_secs()).unwrap_or(u32::MAX);
        let ring = self.rings.iter().find(|ring| seconds <= ring.width * (ring.length() - 1));
        let ring = ring.unwrap_or(&self.rings[2]);
        let last = ring.number(now);
        // The bucket of now is not full: as many full ones as the window has go with it.
        let first = last.saturating_sub((seconds / ring.width).max(1) - 1);
        let mut counted = Window { known: 0.0, all: 0, own: 0, bad: 0 };
        for bucket in ring.buckets.iter().filter(|bucket| (first..=last).contains(&bucket.number)) {
            counted.all += u64::from(bucket.all);
            counted.own += u64::from(bucket.own);
            counted.bad += u64::from(bucket.bad);
            counted.known += f64::from(bucket.known);
        }
        counted.known = (counted.known / window.as_secs_f64()).min(1.0);
        counted
    }
}

/// What was counted in a stretch of time.
#[derive(Debug, Clone, Copy)]
struct Window {
    /// Which part of it anything was counted in.
    known: f64,
    all: u64,
    own: u64,
    bad: u64,
}

/// Which part of a window was bad, by some of its looks. The time in which nothing was counted was good: whoever has looked for a
/// minute does not know that a month is lost.
fn part((bad, window): (u64, Window)) -> f64 {
    if window.all == 0 { 0.0 } else { bad as f64 / window.all as f64 * window.known }
}

/// A tally as it is kept: stretches of buckets that are alike are one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Kept {
    last: Option<Timestamp>,
    rings: [Vec<Run>; 3],
}

/// The first bucket's number, how many there are, and of each: all looks, those that were bad, those of its own fault, and the
/// seconds of which anything is known.
type Run = (u32, u32, u32, u32, u32, u32);

impl Serialize for Tally {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let runs = |ring: &Ring| {
            let mut buckets: Vec<Bucket> = ring.buckets.iter().copied().filter(|bucket| bucket.all > 0).collect();
            buckets.sort_by_key(|bucket| bucket.number);
            let mut runs: Vec<Run> = Vec::new();
            for Bucket { number, all, own, bad, known } in buckets {
                match runs.last_mut() {
                    Some((first, times, a, b, o, k))
                        if *first + *times == number && (*a, *b, *o, *k) == (all, bad, own, known) =>
                    {
                        *times += 1;
                    }
                    _ => runs.push((number, 1, all, bad, own, known)),
                }
            }
            runs
        };
        let rings = [runs(&self.rings[0]), runs(&self.rings[1]), runs(&self.rings[2])];
        Kept { last: self.last, rings }.serialize(serializer)
    }
}

impl From<Kept> for Tally {
    fn from(kept: Kept) -> Self {
        // Metrics begin at nought with each start: a counter that goes back by a little would be taken for one that is new.
        let mut tally = Self { last: kept.last, ..Self::default() };
        for (ring, runs) in tally.rings.iter_mut().zip(kept.rings) {
            for (first, times, all, bad, own, known) in runs {
                let (bad, own) = (bad.min(all), own.min(bad).min(all));
                for number in (first..first.saturating_add(times)).take(ring.buckets.len()) {
                    *ring.bucket(number) = Bucket { number, all, own, bad, known: known.min(ring.width) };
                }
            }
        }
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;

    fn at(minutes: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + minutes * 60).unwrap()
    }

    fn looks(tally: &mut Tally, minutes: std::ops::Range<i64>, good: impl Fn(i64) -> bool) {
        for minute in minutes {
            let look = if good(minute) { Look::Good } else { Look::Bad };
            tally.add(at(minute), look, 1, EACH);
            tally.add(at(minute) + SignedDuration::from_secs(30), look, 1, EACH);
        }
    }

    const EACH: Duration = Duration::from_secs(30);

    fn bad(tally: &Tally, now: Timestamp, window: Duration) -> f64 {
        let window = tally.window(now, window);
        part((window.own, window))
    }

    #[test]
    fn an_outage_burns_at_once_and_stops_burning_when_it_is_over() {
        let mut tally = Tally::default();
        looks(&mut tally, 0..1_440, |_| true);
        assert_eq!(tally.budget(0.999, at(1_440)).burning, None);
        looks(&mut tally, 1_440..1_443, |_| false);
        let budget = tally.budget(0.999, at(1_442));
        assert!(matches!(budget.burning, Some((rate, Urgency::Page)) if rate > 14.4), "{budget:?}");
        looks(&mut tally, 1_443..1_480, |_| true);
        // The hour still says that it matters, the half hour that it is over.
        assert!(bad(&tally, at(1_479), Duration::from_secs(3_600)) > 0.01);
        assert!(!matches!(tally.budget(0.999, at(1_479)).burning, Some((_, Urgency::Page))));
    }

    #[test]
    fn a_slow_burn_is_a_ticket_and_an_empty_budget_is_told() {
        let mut tally = Tally::default();
        // One look in a hundred is bad, for three days: ten times too many for 99.9 per cent, and a month's budget.
        looks(&mut tally, 0..4_400, |minute| minute % 100 != 0);
        let budget = tally.budget(0.999, at(4_399));
        assert!(budget.burning.is_some() && budget.left <= 0.0, "{budget:?}");
        // For a minute, and nothing is known of the month.
        let mut tally = Tally::default();
        looks(&mut tally, 0..2, |minute| minute == 0);
        let budget = tally.budget(0.999, at(1));
        assert!(budget.left > 0.9, "{budget:?}");
        // Four in ten thousand of 99.9: neither.
        let mut tally = Tally::default();
        looks(&mut tally, 0..10_000, |minute| minute % 2_500 != 7);
        let budget = tally.budget(0.999, at(9_999));
        assert!(budget.burning.is_none() && budget.left > 0.5, "{budget:?}");
    }

    #[test]
    fn what_something_shared_has_spent_is_gone_and_burns_for_nobody() {
        let mut tally = Tally::default();
        for minute in 0..120 {
            let look = if (60..80).contains(&minute) { Look::Shared } else { Look::Good };
            tally.add(at(minute), look, 1, EACH * 2);
        }
        let budget = tally.budget(0.999, at(80));
        assert!(budget.burning.is_none() && budget.left < 0.7, "{budget:?}");
        for minute in 120..140 {
            tally.add(at(minute), Look::Bad, 1, EACH * 2);
        }
        assert!(matches!(tally.budget(0.999, at(139)).burning, Some((_, Urgency::Page))));
        assert_eq!(tally.looks, [100, 20, 20]);
    }

    #[test]
    fn what_is_long_past_or_of_a_wrong_clock_does_not_count() {
        let mut tally = Tally::default();
        looks(&mut tally, 0..60, |_| false);
        looks(&mut tally, 31 * 1_440..31 * 1_440 + 10, |_| true);
        assert!(bad(&tally, at(31 * 1_440 + 9), PERIOD) < f64::EPSILON);
        assert!(bad(&Tally::default(), at(0), PERIOD) < f64::EPSILON);
        let mut tally = Tally::default();
        looks(&mut tally, 5_000_000..5_000_060, |_| false);
        looks(&mut tally, 0..4_000, |_| true);
        looks(&mut tally, 4_000..4_060, |_| false);
        let lost = bad(&tally, at(4_059), Duration::from_secs(3_600));
        assert!((lost - 1.0).abs() < f64::EPSILON, "{lost}");
    }

    /// Whoever was away knows nothing of that time, and a few looks after it stand for themselves only.
    #[test]
    fn after_a_pause_a_few_looks_do_not_stand_for_a_month() {
        for pause in [120, 73 * 60, 31 * 1_440] {
            let mut tally = Tally::default();
            looks(&mut tally, 0..1_440, |_| true);
            let back = 1_440 + pause;
            looks(&mut tally, back..back + 10, |minute| minute < back + 8);
            let budget = tally.budget(0.99, at(back + 9));
            assert!(budget.burning.is_none() && budget.left > 0.9, "{pause}: {budget:?}");
            let budget = tally.budget(0.999, at(back + 9));
            assert!(budget.left > 0.9, "{pause}: {budget:?}");
        }
    }

    /// A page that hangs is looked at every fifth time: its bad look stands for five, and so does the time of which it speaks.
    #[test]
    fn a_look_that_stands_for_several_speaks_of_their_time() {
        let mut often = Tally::default();
        looks(&mut often, 0..20, |_| false);
        let mut rarely = Tally::default();
        for n in 0..8 {
            rarely.add(at(0) + SignedDuration::from_secs(150 * n), Look::Bad, 5, EACH);
        }
        let (often, rarely) = (often.budget(0.99, at(19)), rarely.budget(0.99, at(19)));
        assert_eq!(often.burning.map(|(_, urgency)| urgency), rarely.burning.map(|(_, urgency)| urgency));
        assert!((often.left - rarely.left).abs() < 0.02, "{often:?} {rarely:?}");
    }

    proptest::proptest! {
        /// What is written down and read back says the same, and goes on counting the same.
        #[test]
        fn a_tally_outlives_whoever_counts(looks in proptest::collection::vec((1_u16..2_000, 0_u8..3), 1..400)) {
            let look = |n: u8| [Look::Good, Look::Bad, Look::Shared][usize::from(n)];
            let mut tally = Tally::default();
            let mut minute = 0;
            for (later, seen) in &looks {
                minute += i64::from(*later % if *seen == 0 { 3 } else { 2_000 });
                tally.add(at(minute), look(*seen), 1, EACH);
            }
            tally.looks = [0; 3];
            let mut again: Tally = serde_json::from_slice(&serde_json::to_vec(&tally).unwrap()).unwrap();
            for (later, seen) in looks.iter().take(10) {
                proptest::prop_assert_eq!(again.budget(0.99, at(minute)), tally.budget(0.99, at(minute)));
                proptest::prop_assert_eq!(again.looks, tally.looks);
                minute += i64::from(*later);
                tally.add(at(minute), look(*seen), 1, EACH);
                again.add(at(minute), look(*seen), 1, EACH);
            }
        }

        #[test]
        fn whatever_is_kept_is_no_reason_to_break(first in 0_u32.., times in 0_u32.., all in 0_u32.., bad in 0_u32..) {
            let kept = serde_json::json!({
                "last": null,
                "rings": [[[first, times, all, bad, bad, all]], [[first, times, all, bad, all, 9]], [[first, times, all, bad, 0, 0]]],
            });
            let tally: Tally = serde_json::from_value(kept).unwrap();
            let budget = tally.budget(0.999, at(0));
            proptest::prop_assert!(budget.left <= 1.0 && budget.own_left >= budget.left);
        }
    }
}
