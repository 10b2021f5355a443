//! Cores that work keeps busy, where that is known: storms and expensive work leave some of them alone.
//!
//! A gate's slots say how much work runs, not whether it wants a core: forty transactions that sleep want none, and two that
//! compute want both cores of a small machine. Somebody who sees what runs (the operating system, where the server is on
//! the gateway's machine) may say so with [`Scheduler::note_cores`]. With [`GateConfig::cores`](crate::GateConfig::cores) what
//! computes then waits for a core as it waits for a slot, while other tenants have modest work.

use std::time::Duration;

use cofferdam_tenant::Class;

use super::account::{Lane, Queue, Running};
use super::{Grant, Scheduler};
use crate::adaptive::Inflated;
use crate::time::Timestamp;

/// Other tenants' modest work counts for this long after the last of it has begun.
const COMPANY: Duration = Duration::from_secs(10);
/// Work that keeps less than this part of a core busy does not compute.
const COMPUTES: Cores = Cores(100);
/// No more than this part of its time has work waited for a core, however often that is seen: what is left is measured too
/// roughly to say how much of a core it had.
pub(super) const MOST_WAITED: f32 = 0.75;
/// Nor are more than this part of its slot-seconds taken for waiting: work that is seen wrongly must not be free.
pub(super) const MOST_FREE: f32 = 0.95;
/// The weight of one measurement in the parts of its time in which work wanted and waited for a core lately.
const LATELY: f32 = 0.3;
/// While work that no core bounds has no more than this part of the cores, it is not what others wait for.
const SPARE: f64 = 0.6;
/// So long after the last measurement nothing is known of what computes: it may be that the server runs elsewhere now.
const KNOWN: Duration = Duration::from_secs(60);
/// Thousandths of a core that have to be free for work that computes, whatever it wants itself: what wants less must not
/// overtake what wants more for ever.
const ENOUGH: u64 = 500;
/// So many pieces of a storm's work that gives way entirely count as one among the cores.
///
/// What has run on what others leave is behind them all, and they take the core from it at once; with one piece for each core
/// each would come anew every time, and whoever wakes up then waits for the kernel's next tick.
const STORM_TO_A_CORE: u64 = 4;
/// The weight of one measurement in what a tenant's work of a class is expected to want: it rises fast and decays slowly.
const RISE: f32 = 0.5;
const DECAY: f32 = 0.1;

/// What work was seen to want of the machine's cores.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct OnCores {
    /// Cores that it wanted: had, or waited for. 0 for work that sleeps, 1 for work that computes all the time.
    pub wanted: f32,
    /// The part of its time in which it waited for one, from 0 to 1.
    pub waited: f32,
    /// Whoever else wants a core takes it from this work at once: then more of a storm's may run than there are cores.
    pub gives_way: bool,
}

/// Thousandths of a core.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cores(u32);

impl Cores {
    fn of(cores: f32) -> Self {
        // No single piece of work keeps more than a few busy; what is no number is none.
        Self((cores.clamp(0.0, 64.0) * 1_000.0) as u32)
    }

    pub(super) fn computes(self) -> bool {
        self >= COMPUTES
    }

    fn learn(&mut self, measured: Self) {
        let (known, measured) = (self.0 as f32, measured.0 as f32);
        let rate = if measured > known { RISE } else { DECAY };
        self.0 = (known + rate * (measured - known)).round() as u32;
    }
}

/// What work wants now, and who has modest work.
#[derive(Debug, Default)]
pub(super) struct Busy {
    storms: Wanted,
    expensive: Wanted,
    /// What began as short work and lasts, though it has cost little: it is in the way of neither.
    lasting: Wanted,
    /// Thousandths of a core that work has which no core bounds: modest, or too little of a core to be counted.
    unbounded: u64,
    /// When somebody last said what work wants.
    measured: Option<Timestamp>,
    /// The last two tenants whose modest work began, and when that was.
    company: [Option<(usize, Timestamp)>; 2],
}

/// What work of a kind wants.
#[derive(Debug, Default)]
struct Wanted {
    thousandths: u64,
    /// The same, as it counts against the cores that there are.
    counted: u64,
    /// Pieces of work that compute.
    computing: u32,
}

impl Wanted {
    /// Whether one more piece may compute on so many cores. One always may.
    fn leaves_one_of(&self, cores: u32) -> bool {
        self.computing == 0 || self.counted + ENOUGH <= 1_000 * u64::from(cores)
    }
}

impl Busy {
    /// The cores that storms and expensive work want, and what lasts of them.
    pub(super) fn cores(&self) -> f64 {
        (self.storms.thousandths + self.expensive.thousandths + self.lasting.thousandths) as f64 / 1e3
    }

    pub(super) fn add(&mut self, run: &Running) {
        self.unbounded += run.unbounded();
        if let Some(wanted) = self.wanted_with(run) {
            wanted.thousandths += u64::from(run.cores.0);
            wanted.counted += run.counted();
            wanted.computing += u32::from(run.cores.computes());
        }
    }

    pub(super) fn remove(&mut self, run: &Running) {
        self.unbounded -= run.unbounded();
        if let Some(wanted) = self.wanted_with(run) {
            wanted.thousandths -= u64::from(run.cores.0);
            wanted.counted -= run.counted();
            wanted.computing -= u32::from(run.cores.computes());
        }
    }

    /// What counts together with this work, if cores bound it.
    fn wanted_with(&mut self, run: &Running) -> Option<&mut Wanted> {
        match run.queue {
            _ if !run.is_bounded_by_cores() => None,
            _ if run.lasts => Some(&mut self.lasting),
            Queue::More => Some(&mut self.storms),
            _ => Some(&mut self.expensive),
        }
    }

    pub(super) fn modest_work_begins(&mut self, account: usize, now: Timestamp) {
        match &mut self.company {
            [Some((last, at)), _] if *last == account => *at = now,
            [last, before] => {
                *before = last.replace((account, now));
            }
        }
    }

    /// Whether somebody else than `account` has modest work.
    pub(super) fn is_in_company(&self, account: usize, now: Timestamp) -> bool {
        self.company.iter().flatten().any(|(other, at)| *other != account && now.since(*at) < COMPANY)
    }
}

impl Scheduler {
    /// What running work wants of the machine's cores, as it was seen since the last time this was said of it, or since it began.
    /// With what is known now it may turn out to be expensive. Returns as what it counts, which may be more in the way of others than it was granted as; nothing when it is over.
    pub fn note_cores(&mut self, work: &Grant, seen: OnCores) -> Option<Queue> {
        let run = self.running.get_mut(work.key).filter(|run| run.grant == *work)?;
        let measured = Cores::of(seen.wanted);
        let (account, of_class) = (run.account, run.class);
        self.busy.remove(run);
        // What is no number is none.
        let waited = if seen.waited.is_nan() { 0.0 } else { seen.waited.clamp(0.0, MOST_FREE) };
        let wanted = seen.wanted.max(waited.min(MOST_WAITED)).min(1.0);
        (run.cores, run.wanted, run.waited, run.gives_way) = (measured, Some(wanted), waited, seen.gives_way);
        self.busy.add(run);
        run.waited_for += self.now.since(run.measured_until).as_secs_f64() * f64::from(waited);
        run.measured_until = self.now;
        self.busy.measured = Some(self.now);
        let class = &mut self.accounts[account].by_class[run.class as usize];
        if run.queue == Queue::More {
            class.gives_way = seen.gives_way;
        }
        let rate = if class.wanted.is_some() { LATELY } else { 1.0 };
        class.waited += rate * (waited - class.waited);
        class.wanted = Some(class.wanted.map_or(wanted, |known| known + LATELY * (wanted - known)));
        let before = class.cores;
        class.cores.learn(measured);
        if class.cores.computes() != before.computes() {
            self.expect_of_class(account, of_class);
            self.rank(account);
        }
        // Only now it is known whether cores bound it.
        let is_bounded = self.running.get(work.key).is_some_and(|run| self.bounds(run));
        if let Some(run) = self.running.get_mut(work.key) {
            run.pass(self.now, is_bounded);
            run.excused += std::mem::take(&mut run.bounded_for) * f64::from(waited);
        }
        if let Some(account) = self.outlasts(work.key) {
            self.trust_its_part(account);
        }
        self.running.get(work.key).map(|run| run.queue)
    }

    /// It shows that work of a class computes, or that it does not any more: what runs of it and was never measured is expected to as well.
    fn expect_of_class(&mut self, account: usize, class: Class) {
        let expected = &self.accounts[account].by_class[class as usize];
        for (_, run) in &mut self.running {
            if run.account == account && run.class == class && run.wanted.is_none() {
                self.busy.remove(run);
                (run.cores, run.wanted, run.waited, run.gives_way) =
                    (expected.cores, expected.wanted, expected.waited, expected.gives_way);
                self.busy.add(run);
            }
        }
    }

    /// Nobody can say what running work wants: it counts for nothing, and what its tenant's work of the class is expected to want
    /// is forgotten little by little.
    pub fn forget_cores(&mut self, work: &Grant) {
        let Some(run) = self.running.get_mut(work.key).filter(|run| run.grant == *work) else { return };
        self.busy.remove(run);
        (run.cores, run.wanted, run.waited) = (Cores::default(), None, 0.0);
        (run.bounded_for, run.counted_until, run.measured_until) = (0.0, self.now, self.now);
        self.busy.add(run);
        let account = run.account;
        let class = &mut self.accounts[account].by_class[run.class as usize];
        class.wanted = None;
        class.waited -= LATELY * class.waited;
        let computed = class.cores.computes();
        class.cores.learn(Cores::default());
        if class.cores.computes() != computed {
            self.rank(account);
        }
    }

    /// Whether a tenant's next work of a class waits for cores too, and not only for a slot.
    pub(super) fn wants_cores(&self, account: usize, class: Class) -> bool {
        self.config.cores.is_some() && self.accounts[account].by_class[class as usize].cores.computes()
    }

    /// Whether a storm's or expensive work may compute now. Storms wait for storms only: what is short must not wait for the
    /// end of what is long, for in that time more of it comes, and then it waits again.
    pub(super) fn has_free_core(&self, account: usize, class: Class, queue: Queue) -> bool {
        let Some(cores) = self.config.cores else { return true };
        let wanted = if queue == Queue::More { &self.busy.storms } else { &self.busy.expensive };
        // Where something lasts, not so many that it takes more than half of all slots when they come to last too.
        let storms = self.busy.storms.computing + self.lasting;
        let may_last = queue != Queue::More || self.lasting == 0 || storms < self.config.slots.div_ceil(2);
        (may_last && wanted.leaves_one_of(cores) && !self.waits_for_its_own(account, queue))
            || !self.is_core_bound(account, class)
    }

    /// Whether so much of a tenant's short work lasts, waiting for cores, that more of it would only wait as well. Others' storms do not wait
    /// for what lasts, and without this one it would make room for itself for ever.
    fn waits_for_its_own(&self, account: usize, queue: Queue) -> bool {
        queue == Queue::More && self.config.cores.is_some_and(|cores| self.accounts[account].lasting >= cores.max(1))
    }

    /// The classes of a tenant's short work that wait for it where cores bound them, a bit for each.
    pub(super) fn held_by_their_own(&self, account: usize) -> u16 {
        let a = &self.accounts[account];
        if a.lasting == 0 || !self.waits_for_its_own(account, self.queue(account, Lane::Short)) {
            return 0;
        }
        let waiting = Class::ALL.into_iter().filter(|class| a.busy & (1 << *class as u16) != 0);
        waiting.filter(|class| self.is_core_bound(account, *class)).fold(0, |held, class| held | 1 << class as u16)
    }

    /// Whether cores and not slots bound a tenant's work of a class at the moment. Such work falls behind those whom
    /// nothing bounds, which holds nobody's clock back and earns no claim on what they were given meanwhile.
    pub(super) fn is_core_bound(&self, account: usize, class: Class) -> bool {
        self.wants_cores(account, class) && self.busy.is_in_company(account, self.now)
    }

    /// The cores for storms and expensive work, where it is known what computes.
    pub(super) fn known_cores(&self) -> Option<u32> {
        self.config.cores.filter(|_| self.busy.measured.is_some_and(|at| self.now.since(at) < KNOWN))
    }

    /// What work that ends says about the number of slots, if anything.
    ///
    /// Where what computes gives way to others, that it takes longer is as it should be. And while the work that no core bounds has only
    /// a part of the cores, whoever waits for one, or computes for longer, does so because of somebody whom fewer slots do not keep
    /// away: what is bounded by cores already, or whatever else the machine does. Then only the time counts in which work
    /// wanted no core.
    pub(super) fn evidence_of(&self, run: &Running, took: Inflated) -> Option<f64> {
        if run.since < self.concurrency.since() {
            return None;
        }
        let Some(cores) = self.known_cores() else { return Some(took.altogether) };
        if run.queue != Queue::First && run.cores.computes() {
            // Who computes alone is bounded by slots only, and somebody may come.
            return (!self.busy.is_in_company(run.account, self.now)).then_some(took.altogether);
        }
        let is_others_fault = self.busy.unbounded as f64 <= SPARE * 1e3 * f64::from(cores);
        Some(if is_others_fault { took.beside_cores } else { took.altogether })
    }
}

impl Running {
    /// Thousandths of a core, as it counts against those that there are.
    fn counted(&self) -> u64 {
        let many = if self.gives_way && self.queue == Queue::More { STORM_TO_A_CORE } else { 1 };
        u64::from(self.cores.0) / many
    }

    /// Thousandths of a core that it has, if no core bounds it.
    fn unbounded(&self) -> u64 {
        let is_bounded = self.is_bounded_by_cores() && self.cores.computes();
        let had = self.cores.0.saturating_sub((self.waited.min(MOST_WAITED) * 1_000.0) as u32);
        if is_bounded { 0 } else { u64::from(had) }
    }

    /// Whether it counts as a storm's or as expensive work.
    pub(super) fn is_bounded_by_cores(&self) -> bool {
        self.queue != Queue::First && !self.nested
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn company_is_another_tenants_modest_work_of_the_last_seconds() {
        let mut busy = Busy::default();
        let at = Timestamp::from_millis;
        busy.modest_work_begins(1, at(1_000));
        assert!(!busy.is_in_company(1, at(1_001)) && busy.is_in_company(2, at(1_001)));
        busy.modest_work_begins(2, at(2_000));
        busy.modest_work_begins(2, at(9_000));
        assert!(busy.is_in_company(2, at(10_999)) && !busy.is_in_company(2, at(11_001)));
        assert!(busy.is_in_company(1, at(18_999)) && !busy.is_in_company(1, at(19_001)));
    }

    #[test]
    fn what_is_no_number_is_no_core() {
        assert_eq!(Cores::of(f32::NAN), Cores(0));
        assert_eq!((Cores::of(-1.0), Cores::of(f32::INFINITY)), (Cores(0), Cores(64_000)));
    }
}
