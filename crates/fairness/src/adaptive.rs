//! How many slots are worth using now: the concurrency that short work pays nothing for.
//!
//! A server has a point beyond which more work at once finishes no more work and only makes all of it slower. Where
//! that point lies depends on what the work does: forty transactions that wait for a lock or sleep cost nobody
//! anything, forty that compute on two cores make every one of them twenty times slower. The controller finds the
//! point by marginal throughput, with *inflation* as the measure: how much longer work takes than the same tenant's
//! same class of work took when the gate was half empty. By Little's law throughput is concurrency over time, so
//! inflation that rises with concurrency is throughput that does not. Where it is known what work computes, the time in which it
//! wanted no core may be all that is compared: `evidence_of` in `scheduler/cores.rs` says when.
//!
//! * It begins at the least level and grows only when work waited for want of slots *and* work finished meanwhile
//!   without inflation: no evidence, no growth. So ten-second transactions on a quiet morning cannot take every slot
//!   before anybody knows what they are.
//! * When a growth was answered by inflation that eats up much of it, it is taken back.
//! * When active tenants see inflation on average it shrinks, at once by much when it is high, gently when it lasts, and
//!   remembers the level for a while.
//! * When there is some inflation it grows by one to see whether that makes it worse, ever more rarely if it does.
//! * When shrinking has not helped, or growing has not hurt, concurrency was not the cause: the new times are
//!   normal.
//!
//! The idea of judging by what one more admission brings is Protego's (OSDI 2023); keeping an unloaded baseline and
//! comparing with it is TCP Vegas' and BBR's.

use std::time::Duration;

use crate::time::Timestamp;

/// How often the level may change.
pub(crate) const STEP: Duration = Duration::from_millis(100);
/// Inflation (as a natural logarithm) below which there is room for more: a sixth more time.
const ROOM: f64 = 0.15;
/// Inflation from which concurrency is much too high: half as much again.
const TOO_MUCH: f64 = 0.4;
/// The most that the standard error of what times are compared with counts.
const MOST_BIAS: f64 = 0.25;
/// The part of the added concurrency that may be lost to inflation; with more, growing was not worth it.
const WASTE: f64 = 0.4;
/// The part of the concurrency given up that must come back as less inflation; with less, concurrency was not the cause.
const RELIEF: f64 = 0.15;
const GROWTH: f64 = 1.5;
/// Near the least level, where each slot counts for more.
const CAREFUL_GROWTH: f64 = 1.25;
const SHRINK: f64 = 0.6;
const SHRINK_GENTLY: f64 = 0.8;
/// After a change, and after work has begun to wait, the effect is awaited for this long.
const SETTLE: Duration = Duration::from_millis(400);
/// What happens in this time after work has begun to wait is not looked at.
const ONSET: Duration = Duration::from_millis(600);
/// When this long has passed, the better guess may decide where convincing evidence did not.
const JUDGED: Duration = Duration::from_secs(1);
/// After this time a change that nothing speaks against is right.
const UNDECIDED: Duration = Duration::from_secs(5);
/// Inflation that is not much too high but does not go away is answered after this time.
const LASTING: Duration = Duration::from_secs(2);
/// A level that was too high is not tried again for this long at first; doubled each time.
const FIRST_CAUTION: Duration = Duration::from_secs(5);
/// The same for a level that was much too high.
const HARD_CAUTION: Duration = Duration::from_secs(30);
const LONGEST_CAUTION: Duration = Duration::from_secs(600);
/// For so long work that was admitted at a higher level is waited for before the lower one is judged.
const LONGEST_EXCESS: Duration = Duration::from_secs(10);
/// A gate that had slots to spare for this long starts again from below.
const FORGET: Duration = Duration::from_secs(10);

/// A measured inflation, as a natural logarithm, and its standard error.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Evidence {
    pub(crate) inflation: f64,
    pub(crate) error: f64,
    /// The standard error of what it is compared with: the same again and again, so it says nothing about differences.
    pub(crate) bias: f64,
}

/// What happened since the last step.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Observed {
    /// Work waited although its tenant was within its own limits.
    pub(crate) limited: bool,
    /// How much longer work takes than on a nearly empty gate, from work that began after the last change.
    pub(crate) evidence: Option<Evidence>,
    /// Work still runs that was admitted at a higher level.
    pub(crate) excess: bool,
}

/// What a step has decided beside the level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing more.
    Keep,
    /// What tenants see now is normal: the baselines are to be taken anew.
    Rebase,
}

/// The controller of one gate.
#[derive(Debug, Clone)]
pub(crate) struct Concurrency {
    least: f64,
    most: f64,
    level: f64,
    stepped: Timestamp,
    /// Work that began before this says nothing about now: the level was another, or nothing waited yet.
    since: Timestamp,
    /// When the level last fell.
    shrunk: Timestamp,
    /// When work last waited for want of slots.
    limited: Timestamp,
    is_limited: bool,
    /// Not above this until then.
    ceiling: Option<(f64, Timestamp)>,
    caution: Duration,
    /// What the last change of the level came from, while it is not known yet whether it was right.
    trial: Option<Trial>,
}

/// The level and the inflation before a change.
#[derive(Debug, Clone, Copy)]
struct Trial {
    from: f64,
    before: Evidence,
    /// It grew although work was inflated, to see whether that has to do with concurrency at all.
    despite: bool,
}

impl Concurrency {
    pub(crate) fn new(least: u32, most: u32) -> Self {
        let least = f64::from(least.clamp(1, most.max(1)));
        Self {
            least,
            most: f64::from(most.max(1)),
            level: least,
            stepped: Timestamp::default(),
            since: Timestamp::default(),
            shrunk: Timestamp::default(),
            limited: Timestamp::default(),
            is_limited: false,
            ceiling: None,
            caution: FIRST_CAUTION,
            trial: None,
        }
    }

    /// Other bounds, keeping what was learnt as far as they allow.
    pub(crate) fn set_bounds(&mut self, least: u32, most: u32) {
        self.most = f64::from(most.max(1));
        self.least = f64::from(least.clamp(1, most.max(1)));
        self.level = self.level.clamp(self.least, self.most);
    }

    /// How far between the least (0) and the most (1).
    pub(crate) fn fraction(&self) -> f64 {
        if self.is_fixed() { 1.0 } else { (self.level - self.least) / (self.most - self.least) }
    }

    pub(crate) fn is_fixed(&self) -> bool {
        self.most <= self.least
    }

    /// From when on work has begun that is evidence.
    pub(crate) fn since(&self) -> Timestamp {
        self.since
    }

    pub(crate) fn is_due(&self, now: Timestamp) -> bool {
        !self.is_fixed() && now.since(self.stepped) >= STEP
    }

    pub(crate) fn step(&mut self, now: Timestamp, seen: Observed) -> Verdict {
        self.stepped = now;
        if seen.limited {
            self.limited = now;
            if !self.is_limited {
                // Until now nobody wanted more than there was: what was measured says nothing about what comes.
                self.is_limited = true;
                // What comes in the first moment, connections and cold caches, is not what will come.
                self.since = now + ONSET;
                self.trial = None;
            }
        } else if now.since(self.limited) >= FORGET {
            self.is_limited = false;
            if self.level > self.least {
                self.limited = now;
                self.set(now, self.level / 2.0, None, false);
            }
        }
        if seen.excess && now.since(self.shrunk) < LONGEST_EXCESS {
            // What it costs to have fewer shows when there are fewer.
            self.since = now;
            return Verdict::Keep;
        }
        let settled = now.since(self.since);
        if settled < SETTLE {
            return Verdict::Keep;
        }
        let Some(evidence) = seen.evidence else { return Verdict::Keep };
        let Evidence { inflation, error, bias } = evidence;
        // Not without end: a tenant whose times vary much must not keep the gate from seeing threefold times.
        let doubt = error.hypot(bias.min(MOST_BIAS));
        let likely = settled >= LASTING && inflation < ROOM / 2.0;
        let (has_room, is_inflated) = (inflation + error < ROOM || likely, inflation - 3.0 * doubt > ROOM);
        let is_too_much = inflation - 2.0 * doubt > TOO_MUCH;
        // To be sure of it for long takes more than that, or a false alarm of the first seconds costs capacity for half a minute.
        let is_surely = inflation - 3.0 * doubt > TOO_MUCH;
        if let Some(trial) = self.trial {
            let step = (self.level / trial.from).ln();
            let errors = error + trial.before.error;
            // Convincing evidence decides at once, and the better guess as soon as it is more than a guess. When it
            // never is, the change stands.
            let enough = settled >= JUDGED && errors < WASTE * step.abs() / 2.0 || settled >= UNDECIDED;
            let doubt = if enough && settled < UNDECIDED { 0.0 } else { 2.0 * errors };
            let risen = inflation - trial.before.inflation;
            if step > 0.0 && risen - doubt > WASTE * step {
                self.be_careful(now, trial.from, is_surely);
                self.set(now, trial.from, Some(evidence), false);
                return Verdict::Keep;
            }
            if step < 0.0 && inflation - error > ROOM && enough && risen - doubt > RELIEF * step {
                self.ceiling = None;
                self.set(now, trial.from, None, false);
                return Verdict::Rebase;
            }
            if step < 0.0 && risen + doubt < RELIEF * step {
                self.trial = None; // it helped
            } else if enough {
                self.trial = None; // what comes from now on has another cause
                if trial.despite && step > 0.0 {
                    return Verdict::Rebase;
                }
            }
        }
        if self.trial.is_some_and(|t| t.from > self.level) {
            return Verdict::Keep; // whether having fewer helps is not known yet
        }
        let is_least = self.level <= self.least;
        if !is_least && is_too_much {
            self.be_careful(now, 0.8 * self.level, is_surely);
            self.set(now, SHRINK * self.level, Some(evidence), false);
        } else if !is_least && is_inflated && settled >= LASTING {
            self.be_careful(now, SHRINK_GENTLY * self.level, false);
            self.set(now, SHRINK_GENTLY * self.level, Some(evidence), false);
        } else if seen.limited && (has_room || self.trial.is_none() && settled >= LASTING) {
            let next = self.level + 1.0;
            let careful = !has_room && self.ceiling.is_some();
            let factor = if self.level < 2.0 * self.least { CAREFUL_GROWTH } else { GROWTH };
            let grown = if careful { next } else { next.max(self.level * factor) };
            let top = match self.ceiling {
                Some((ceiling, until)) if until >= now => ceiling.max(self.least),
                // What was too much once is tried again one by one.
                Some((ceiling, _)) => next.max(ceiling),
                None => self.most,
            };
            let grown = grown.min(top).min(self.most);
            if grown > self.level {
                self.set(now, grown, Some(evidence), !has_room);
            }
        }
        Verdict::Keep
    }

    fn set(&mut self, now: Timestamp, level: f64, before: Option<Evidence>, despite: bool) {
        self.trial = before.map(|before| Trial { from: self.level, before, despite });
        if level < self.level {
            self.shrunk = now;
        }
        self.level = level.clamp(self.least, self.most);
        self.since = now;
    }

    /// Remembers that what is above `ceiling` was too much.
    fn be_careful(&mut self, now: Timestamp, ceiling: f64, hard: bool) {
        let first = if hard { HARD_CAUTION } else { FIRST_CAUTION };
        match &mut self.ceiling {
            Some((known, until)) if *until >= now => {
                *known = known.min(ceiling);
                *until = (*until).max(now + first);
            }
            other => {
                let again = other.is_some_and(|(_, until)| now.since(until) < self.caution);
                self.caution = if again { (2 * self.caution).clamp(first, LONGEST_CAUTION) } else { first };
                *other = Some((ceiling, now + self.caution));
            }
        }
    }
}

/// The inflation that one tenant has seen in one window of the controller.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    window: u32,
    count: u32,
    sum: f64,
    /// Sum of the parts of a single measurement's variance that the baselines have.
    baselines: f64,
    /// Mean and variance of single measurements, over the long run.
    mean: f32,
    variance: f32,
}

impl Default for Seen {
    fn default() -> Self {
        Self { window: 0, count: 0, sum: 0.0, baselines: 0.0, mean: 0.0, variance: 0.25 }
    }
}

impl Seen {
    /// Takes in one measurement; true for the first of a window.
    pub(crate) fn add(&mut self, window: u32, inflation: f64, baseline: f32) -> bool {
        let first = self.window != window;
        if first {
            (self.window, self.count, self.sum, self.baselines) = (window, 0, 0.0, 0.0);
        }
        self.count += 1;
        self.sum += inflation;
        self.baselines += f64::from(baseline);
        let deviation = inflation as f32 - self.mean;
        self.mean += 0.05 * deviation;
        self.variance += 0.05 * (deviation * deviation - self.variance);
        first
    }

    pub(crate) fn mean(&self) -> f64 {
        self.sum / f64::from(self.count.max(1))
    }

    /// Of the mean of the window.
    pub(crate) fn variance_of_mean(&self) -> f64 {
        f64::from(self.variance) / f64::from(self.count.max(1))
    }

    /// Of the baseline that it is compared with.
    pub(crate) fn variance_of_baseline(&self) -> f64 {
        f64::from(self.variance) * self.baselines / f64::from(self.count.max(1))
    }
}

/// How long one tenant's work of one class takes, against how long it took when the gate was half empty at most.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Baseline {
    /// Logarithm of seconds.
    calm: f32,
    recent: f32,
    /// The part of that time in which it wanted a core, once that is known.
    wanted: Option<f32>,
    /// Measurements of which `recent` is made. They are more than those of the baseline, or chance would lower that again and again.
    seen: u16,
    /// Measurements of which the baseline is made.
    count: u16,
}

/// How much longer work took than it usually does, as logarithms.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inflated {
    pub(crate) altogether: f64,
    /// By what was added while it wanted no core.
    pub(crate) beside_cores: f64,
    /// The variance of the baseline, as a part of that of a single measurement.
    pub(crate) baseline: f32,
}

/// A tenant whose work has become faster than this (a logarithm) gets a lower baseline also while the gate is busy.
const FASTER: f32 = 0.7;
/// So many measurements make the first baseline, whatever ran beside them, and are no evidence themselves.
const FIRST: u16 = 8;
/// The weight of one measurement in a baseline, once it is made of many.
const BASELINE_RATE: f32 = 0.01;
/// The same of the part in which it wanted a core, which is known later: it is measured now and then.
const WANTED_RATE: f32 = 0.03;

impl Baseline {
    /// Takes a measurement and says the logarithm of its inflation, once there is a baseline. `wanted`: the part of the time in
    /// which it wanted a core, as far as that is known. `calm`: no more ran meanwhile than half the least slots.
    pub(crate) fn learn(&mut self, seconds: f64, wanted: Option<f32>, calm: bool) -> Option<Inflated> {
        let sample = seconds.max(1e-5).ln() as f32;
        self.seen = self.seen.saturating_add(1);
        let first = self.count < FIRST;
        if first || calm {
            self.count = self.count.saturating_add(1);
        }
        self.recent += (1.0 / f32::from(self.seen)).max(0.05) * (sample - self.recent);
        if first || calm || self.recent < self.calm - FASTER {
            self.calm += (1.0 / f32::from(self.count)).max(BASELINE_RATE) * (sample - self.calm);
        }
        self.wanted = match (self.wanted, wanted) {
            (None, wanted) => wanted,
            (Some(known), Some(wanted)) if calm => Some(known + WANTED_RATE * (wanted - known)),
            (known, _) => known,
        };
        (!first).then(|| {
            let altogether = f64::from(sample - self.calm);
            let beside_cores = wanted.zip(self.wanted).map(|(now, usually)| {
                let added = altogether.exp() * f64::from(1.0 - now) - f64::from(1.0 - usually);
                added.max(-0.9).ln_1p()
            });
            let baseline = (1.0 / f32::from(self.count)).max(BASELINE_RATE / 2.0);
            Inflated { altogether, baseline, beside_cores: beside_cores.unwrap_or(altogether) }
        })
    }

    /// What is seen now is more nearly normal than what was thought so. Not all the way: one wrong guess must not make
    /// the gate blind.
    pub(crate) fn rebase(&mut self) {
        self.calm += 0.4 * (self.recent - self.calm);
    }
}

/// How many slots modest work wants free so that it hardly ever waits: what it held on average lately, and twice the
/// square root of that, as for a queue with several servers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Headroom {
    /// Slot-seconds held since the last step.
    held: f64,
    passed: Timestamp,
    stepped: Timestamp,
    /// Slots held on average over the last seconds, and the most of that over the last minutes.
    load: f64,
    peak: f64,
}

/// Steps, of which there are ten a second, after which a new load counts for two thirds.
const LOAD_STEPS: f64 = 20.0;
/// Steps after which an old peak counts for half.
const PEAK_HALF_LIFE: f64 = 600.0;

impl Headroom {
    /// So many slots were held by modest work until now.
    pub(crate) fn pass(&mut self, now: Timestamp, slots: u32) {
        self.held += now.since(self.passed).as_secs_f64() * f64::from(slots);
        self.passed = self.passed.max(now);
    }

    /// To be called about ten times a second.
    pub(crate) fn step(&mut self, now: Timestamp, slots: u32) {
        self.pass(now, slots);
        let seconds = now.since(self.stepped).as_secs_f64();
        if seconds > 0.0 {
            self.load += (self.held / seconds - self.load) / LOAD_STEPS;
            self.peak = (self.peak * 0.5f64.powf(1.0 / PEAK_HALF_LIFE)).max(self.load);
        }
        self.held = 0.0;
        self.stepped = now;
    }

    /// The slots wanted.
    pub(crate) fn slots(&self) -> u32 {
        if self.peak < 0.01 { 0 } else { (self.peak + 2.0 * self.peak.sqrt()).round() as u32 + 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps the controller against a server whose inflation follows from the level, with work always waiting.
    fn drive(c: &mut Concurrency, from_ms: u64, to_ms: u64, inflation: impl Fn(f64) -> Option<f64>) -> Vec<Verdict> {
        (from_ms..to_ms)
            .step_by(100)
            .map(|ms| {
                let evidence = inflation(c.level).map(|i| Evidence { inflation: i.ln(), error: 0.02, bias: 0.0 });
                c.step(Timestamp::from_millis(ms), Observed { limited: true, evidence, excess: false })
            })
            .collect()
    }

    #[test]
    fn work_that_waits_opens_every_slot_within_four_seconds() {
        let mut c = Concurrency::new(4, 40);
        drive(&mut c, 1_000, 5_000, |_| Some(1.0));
        assert!((c.fraction() - 1.0).abs() < 1e-9, "{c:?}");
    }

    #[test]
    fn without_evidence_nothing_opens() {
        let mut c = Concurrency::new(4, 40);
        drive(&mut c, 1_000, 60_000, |_| None);
        assert!((c.level - 4.0).abs() < 1e-9, "{c:?}");
    }

    #[test]
    fn work_that_computes_keeps_the_level_near_the_cores_and_probes_rarely() {
        let mut c = Concurrency::new(4, 40);
        let cores = 4.0;
        let mut above = 0;
        for second in 1..60 {
            drive(&mut c, second * 1_000, second * 1_000 + 1_000, |level| Some((level / cores).max(1.0)));
            above += u32::from(c.level > 8.0);
        }
        assert!(above <= 2, "{above} of 59 seconds above twice the cores: {c:?}");
    }

    #[test]
    fn when_shrinking_does_not_help_the_slots_come_back() {
        let mut c = Concurrency::new(4, 40);
        drive(&mut c, 1_000, 6_000, |_| Some(1.0));
        // The work itself has become ten times longer, whatever the concurrency; each verdict takes off a part.
        let inflation = std::cell::Cell::new(10.0f64.ln());
        for ms in (6_000..30_000).step_by(100) {
            let evidence = Some(Evidence { inflation: inflation.get(), error: 0.02, bias: 0.0 });
            if c.step(Timestamp::from_millis(ms), Observed { limited: true, evidence, excess: false })
                == Verdict::Rebase
            {
                inflation.set(0.6 * inflation.get());
            }
        }
        assert!(inflation.get() < ROOM, "{c:?}");
        assert!((c.fraction() - 1.0).abs() < 1e-9, "{c:?}");
    }

    /// Times that only vary are no inflation, however long nothing calm is seen: the baseline must not follow what is fast by chance.
    #[test]
    fn what_varies_by_chance_does_not_lower_the_baseline() {
        let mut of_all = 0.0;
        for seed in 0..64 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut baseline = Baseline::default();
            let mut time = || -0.1 * (1.0 - rng.f64()).ln();
            let seen: Vec<f64> =
                (0..500).filter_map(|_| baseline.learn(time(), None, false)).map(|i| i.altogether).collect();
            of_all += seen.iter().rev().take(100).sum::<f64>() / 100.0 / 64.0;
        }
        assert!(of_all.abs() < 0.4, "the same work seems to take {:.2} times as long as it did", of_all.exp());
    }

    #[test]
    fn a_quiet_gate_starts_again_from_below() {
        let mut c = Concurrency::new(4, 40);
        drive(&mut c, 1_000, 6_000, |_| Some(1.0));
        for ms in (6_000..90_000).step_by(100) {
            c.step(Timestamp::from_millis(ms), Observed::default());
        }
        assert!((c.level - 4.0).abs() < 1e-9, "{c:?}");
    }

    #[test]
    fn headroom_follows_what_modest_work_holds_and_forgets_it_slowly() {
        let mut headroom = Headroom::default();
        assert_eq!(headroom.slots(), 0);
        for ms in (100..20_000).step_by(100) {
            headroom.step(Timestamp::from_millis(ms), 1);
        }
        assert_eq!(headroom.slots(), 4, "one slot on average wants three more");
        for ms in (20_000..50_000).step_by(100) {
            headroom.step(Timestamp::from_millis(ms), 0);
        }
        assert!((2..=4).contains(&headroom.slots()), "{headroom:?}");
    }
}
