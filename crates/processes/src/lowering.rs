//! How far what is in the way of others is lowered: as far as it is wanted, but never so far that it gets nothing at all.
//!
//! What runs with the least priority gets what others leave. Where something else keeps every core busy, which the gateway
//! knows nothing of, that is nothing: work that was begun does not end, keeps its slot, and whoever waits for that slot waits as long. So
//! what those got that are lowered is counted, and as long as it is next to nothing they are lowered less far.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::wanted::Wanted;

/// By how much at most, from one level to the next. The weights that belong to them are 15, 110, 335 and 1,024.
const LEVELS: [i32; 4] = [19, 10, 5, 0];
/// For how long what they get is counted before anything is decided.
const WINDOW: Duration = Duration::from_millis(300);
/// With less than this part of the machine's cores they get next to nothing.
const STARVED: f64 = 0.05;
/// With as much as this, a level further down they would still get more than nothing.
const PLENTY: f64 = 0.4;
/// How long a level is kept before the next further down is tried; each time that was too far, twice as long.
const HOLD: Duration = Duration::from_secs(5);
const LONGEST_HOLD: Duration = Duration::from_secs(60);
/// Who gets nothing so soon after a level was tried gets nothing because of that.
const TRIAL: Duration = Duration::from_secs(2);

/// How far the processes of a server are lowered now.
#[derive(Debug)]
pub struct Lowering {
    /// The cores of the machine.
    cores: f64,
    level: AtomicUsize,
    counted: Mutex<Counted>,
}

#[derive(Debug)]
struct Counted {
    since: Instant,
    wanted: Wanted,
    /// Since when there is this level, and how long it stays.
    changed: Instant,
    hold: Duration,
    /// Whether it was tried because that had passed.
    is_tried: bool,
}

impl Lowering {
    /// As far as is wanted, on a machine with so many cores.
    pub fn new(now: Instant, cores: u32) -> Self {
        let counted = Counted { since: now, wanted: Wanted::default(), changed: now, hold: HOLD, is_tried: false };
        Self { cores: f64::from(cores.max(1)), level: AtomicUsize::new(0), counted: Mutex::new(counted) }
    }

    /// The most by which a `nice` value is raised.
    pub(crate) fn most(&self) -> i32 {
        LEVELS[self.level.load(Ordering::Relaxed).min(LEVELS.len() - 1)]
    }

    /// What a process wanted and had that was lowered meanwhile.
    pub(crate) fn count(&self, measured: Wanted) {
        let wanted = &mut self.counted.lock().unwrap_or_else(PoisonError::into_inner).wanted;
        *wanted = Wanted { had: wanted.had + measured.had, waited: wanted.waited + measured.waited };
    }

    /// Decides how far it goes from now on. To be called about every 100 ms.
    pub fn step(&self, now: Instant) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let window = now.saturating_duration_since(counted.since);
        if window < WINDOW {
            return;
        }
        let Wanted { had, waited } = std::mem::take(&mut counted.wanted);
        counted.since = now;
        // One at least wanted a core all the time.
        let is_wanted = had + waited >= window;
        let part = had.as_secs_f64() / (self.cores * window.as_secs_f64());
        let level = self.level.load(Ordering::Relaxed);
        let kept_for = now.saturating_duration_since(counted.changed);
        let is_starved = is_wanted && part < STARVED;
        let next = if is_starved && level + 1 < LEVELS.len() {
            let was_too_far = counted.is_tried && kept_for < TRIAL;
            counted.hold = if was_too_far { (2 * counted.hold).min(LONGEST_HOLD) } else { HOLD };
            level + 1
        } else if level > 0 && kept_for >= counted.hold && (!is_wanted || part >= PLENTY) {
            level - 1
        } else {
            return;
        };
        (counted.changed, counted.is_tried) = (now, next < level);
        self.level.store(next, Ordering::Relaxed);
        tracing::debug!(most = LEVELS[next], "priorities are lowered by no more than this");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with two cores, on which one piece of work or more is lowered.
    struct Machine {
        lowering: Lowering,
        now: Instant,
    }

    impl Machine {
        /// For so many seconds what is lowered wants cores all the time and has as many as it gets at that level.
        fn passes(&mut self, seconds: u32, gets: impl Fn(i32) -> f64) -> Vec<i32> {
            let tick = Duration::from_millis(100);
            let ticks = 0..10 * seconds;
            let levels = ticks.map(|_| {
                self.now += tick;
                let had = tick.mul_f64(gets(self.lowering.most()));
                self.lowering.count(Wanted { had, waited: 3 * tick });
                self.lowering.step(self.now);
                self.lowering.most()
            });
            levels.collect()
        }
    }

    fn machine() -> Machine {
        let now = Instant::now();
        Machine { lowering: Lowering::new(now, 2), now }
    }

    #[test]
    fn what_gets_something_stays_lowered_as_far_as_was_wanted() {
        let mut machine = machine();
        assert!(machine.passes(60, |_| 0.2).into_iter().all(|most| most == 19));
    }

    /// Two loops beside it, of which the gateway knows nothing.
    #[test]
    fn what_gets_nothing_is_lowered_less_far_within_a_second_and_further_again_when_it_would_get_something() {
        let mut machine = machine();
        let beside_loops = |most| if most == 19 { 0.03 } else { 0.3 };
        assert_eq!(machine.passes(1, beside_loops).last(), Some(&10));
        assert!(
            machine.passes(60, beside_loops).into_iter().all(|most| most == 10),
            "it is not tried while it would be too far"
        );
        assert_eq!(machine.passes(2, |_| 1.5).last(), Some(&19), "the loops are gone");
        assert_eq!(machine.passes(2, |_| 0.0).last(), Some(&0), "as far up as there is");
    }

    /// At one level it has plenty, at the next nothing: that is tried more and more seldom.
    #[test]
    fn what_was_too_far_is_tried_again_after_longer_and_longer() {
        let mut machine = machine();
        let levels = machine.passes(300, |most| if most == 19 { 0.0 } else { 1.0 });
        let too_far = levels.iter().filter(|most| **most == 19).count();
        assert!(levels.iter().all(|most| *most >= 10));
        assert!((20..60).contains(&too_far), "{too_far} of 3000 tenths of a second");
    }

    #[test]
    fn nothing_that_wants_a_core_says_nothing() {
        let mut machine = machine();
        machine.passes(1, |_| 0.0);
        let before = machine.lowering.most();
        assert!(before < 10);
        for _ in 0..200 {
            machine.now += Duration::from_millis(100);
            machine.lowering.step(machine.now);
        }
        assert_eq!(machine.lowering.most(), 19);
    }
}
