//! How far what is in the way of others is lowered: as far as it is wanted, but never so far that it gets nothing at all.
//!
//! What runs with the least priority gets what others leave. Where something else keeps every core busy, which the gateway
//! knows nothing of, that is nothing: work that was begun does not end, keeps its slot, and whoever waits for that slot waits as long. So
//! what those got that are lowered is counted, and as long as it is next to nothing they are lowered less far.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_sched::cores_but;

use crate::wanted::Wanted;

/// By how much at most, from one level to the next. The weights of ordinary processes with these values are 15, 110, 335 and 1,024.
const LEVELS: [i32; 4] = [19, 10, 5, 0];
/// For how long what they get is counted before anything is decided.
const WINDOW: Duration = Duration::from_millis(500);
/// With less than this part of what they want, and there is, they get next to nothing.
const STARVED: f64 = 0.05;
/// Who wants a core for less than this part of the time says nothing.
const ENOUGH: f64 = 0.5;
/// How long a level is kept before the next further down is tried; each time that was too far, twice as long.
const HOLD: Duration = Duration::from_secs(20);
const LONGEST_HOLD: Duration = Duration::from_secs(120);
/// Who gets nothing so soon after a level was tried gets nothing because of that.
const TRIAL: Duration = Duration::from_secs(2);

static OF_THIS_MACHINE: LazyLock<Lowering> = LazyLock::new(|| Lowering::new(Instant::now(), cores_but(0)));

/// How far processes are lowered now.
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
    /// When a level was tried because that had passed.
    tried: Option<Instant>,
}

impl Lowering {
    /// Of all servers on this machine: they share its cores.
    pub fn of_this_machine() -> &'static Self {
        &OF_THIS_MACHINE
    }

    fn new(now: Instant, cores: u32) -> Self {
        let counted = Counted { since: now, wanted: Wanted::default(), changed: now, hold: HOLD, tried: None };
        Self { cores: f64::from(cores.max(1)), level: AtomicUsize::new(0), counted: Mutex::new(counted) }
    }

    /// The most by which a `nice` value is raised.
    pub(crate) fn most(&self) -> i32 {
        LEVELS[self.level.load(Ordering::Relaxed).min(LEVELS.len() - 1)]
    }

    /// What a process wanted and had while it was lowered.
    pub(crate) fn count(&self, measured: Wanted) {
        let wanted = &mut self.counted.lock().unwrap_or_else(PoisonError::into_inner).wanted;
        *wanted = Wanted { had: wanted.had + measured.had, waited: wanted.waited + measured.waited };
    }

    /// Decides how far it goes from now on. To be called about every 100 ms, by whoever looks at processes.
    pub fn step(&self, now: Instant) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let window = now.saturating_duration_since(counted.since);
        if window < WINDOW {
            return;
        }
        let Wanted { had, waited } = std::mem::take(&mut counted.wanted);
        counted.since = now;
        let window = window.as_secs_f64();
        let wanted = (had + waited).as_secs_f64();
        let is_starved = wanted >= ENOUGH * window && had.as_secs_f64() < STARVED * wanted.min(self.cores * window);
        let level = self.level.load(Ordering::Relaxed);
        if !is_starved && counted.tried.is_some_and(|tried| now.saturating_duration_since(tried) >= TRIAL) {
            // That was not too far.
            (counted.tried, counted.hold) = (None, HOLD);
        }
        let kept_for = now.saturating_duration_since(counted.changed);
        let next = if is_starved && level + 1 < LEVELS.len() {
            let was_too_far = counted.tried.take().is_some_and(|tried| now.saturating_duration_since(tried) < TRIAL);
            if was_too_far {
                counted.hold = (2 * counted.hold).min(LONGEST_HOLD);
            } else if kept_for > 2 * counted.hold {
                // Something has changed.
                counted.hold = HOLD;
            }
            level + 1
        } else if level > 0 && kept_for >= counted.hold {
            counted.tried = Some(now);
            level - 1
        } else {
            return;
        };
        counted.changed = now;
        self.level.store(next, Ordering::Relaxed);
        tracing::debug!(most = LEVELS[next], "priorities are lowered by no more than this");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine on which so many processes are lowered, and want a core all the time.
    struct Machine {
        processes: u32,
        lowering: Lowering,
        now: Instant,
    }

    impl Machine {
        /// For so many seconds they have as many cores together as they get at that level.
        fn passes(&mut self, seconds: u32, gets: impl Fn(i32) -> f64) -> Vec<i32> {
            let tick = Duration::from_millis(100);
            let ticks = 0..10 * seconds;
            let levels = ticks.map(|_| {
                self.now += tick;
                let had = tick.mul_f64(gets(self.lowering.most()));
                let waited = (self.processes * tick).saturating_sub(had);
                self.lowering.count(Wanted { had, waited });
                self.lowering.step(self.now);
                self.lowering.most()
            });
            levels.collect()
        }
    }

    fn machine(cores: u32, processes: u32) -> Machine {
        let now = Instant::now();
        Machine { processes, lowering: Lowering::new(now, cores), now }
    }

    #[test]
    fn what_gets_something_stays_lowered_as_far_as_was_wanted() {
        let mut few = machine(2, 3);
        assert!(few.passes(60, |_| 0.2).into_iter().all(|most| most == 19));
        // One has all that it wants, which is a small part of many cores.
        let mut many = machine(64, 1);
        assert!(many.passes(60, |_| 1.0).into_iter().all(|most| most == 19));
    }

    /// Two loops beside it, of which the gateway knows nothing.
    #[test]
    fn what_gets_nothing_is_lowered_less_far_within_a_second_and_further_again_when_it_would_get_something() {
        for processes in [1, 12] {
            let mut machine = machine(2, processes);
            let beside_loops = |most| if most == 19 { 0.03 } else { 0.3 };
            assert_eq!(machine.passes(1, beside_loops).last(), Some(&10));
            assert_eq!(machine.passes(15, beside_loops).last(), Some(&10));
            assert_eq!(machine.passes(25, |_| 1.0).last(), Some(&19), "the loops are gone");
            assert_eq!(machine.passes(2, |_| 0.0).last(), Some(&0), "as far up as there is");
        }
    }

    /// At one level it has plenty, at the next nothing: that is tried more and more seldom.
    #[test]
    fn what_was_too_far_is_tried_again_after_longer_and_longer() {
        let mut machine = machine(2, 3);
        let levels = machine.passes(300, |most| if most == 19 { 0.0 } else { 1.0 });
        let too_far = levels.iter().filter(|most| **most == 19).count();
        assert!(levels.iter().all(|most| *most >= 10));
        assert!((15..50).contains(&too_far), "{too_far} of 3000 tenths of a second");
    }

    #[test]
    fn nothing_that_wants_a_core_says_nothing() {
        let mut machine = machine(2, 3);
        machine.passes(2, |_| 0.0);
        let before = machine.lowering.most();
        assert!(before < 10);
        for _ in 0..700 {
            machine.now += Duration::from_millis(100);
            machine.lowering.step(machine.now);
        }
        assert_eq!(machine.lowering.most(), 19);
    }
}
