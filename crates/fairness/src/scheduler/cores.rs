//! Cores that work keeps busy, where that is known: storms and expensive work leave some of them alone.
//!
//! A gate's slots say how much work runs, not whether it wants a core: forty transactions that sleep want none, and two that
//! compute want both cores of a small machine. Somebody who sees what runs (the operating system, where the server is on
//! the gateway's machine) may say so with [`Scheduler::note_cores`]. With [`GateConfig::cores`](crate::GateConfig::cores) what
//! computes then waits for a core as it waits for a slot, while other tenants have modest work.

use std::time::Duration;

use cofferdam_tenant::Class;

use super::account::{Queue, Running};
use super::{Grant, Scheduler};
use crate::time::Timestamp;

/// Other tenants' modest work counts for this long after the last of it has begun.
const COMPANY: Duration = Duration::from_secs(10);
/// Work that keeps less than this part of a core busy does not compute.
const COMPUTES: Cores = Cores(100);
/// From this part on, work that takes longer than usual has waited for a core first of all.
const MOSTLY_COMPUTES: Cores = Cores(300);
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
    /// All other work.
    modest: Wanted,
    /// Whether somebody has ever said what work wants.
    is_measured: bool,
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
    /// The cores that storms and expensive work want.
    pub(super) fn cores(&self) -> f64 {
        (self.storms.thousandths + self.expensive.thousandths) as f64 / 1e3
    }

    pub(super) fn add(&mut self, run: &Running) {
        let counted = run.counted();
        let wanted = self.wanted_with(run);
        wanted.thousandths += u64::from(run.cores.0);
        wanted.counted += counted;
        wanted.computing += u32::from(run.cores.computes());
    }

    pub(super) fn remove(&mut self, run: &Running) {
        let counted = run.counted();
        let wanted = self.wanted_with(run);
        wanted.thousandths -= u64::from(run.cores.0);
        wanted.counted -= counted;
        wanted.computing -= u32::from(run.cores.computes());
    }

    fn wanted_with(&mut self, run: &Running) -> &mut Wanted {
        match run.queue {
            _ if !run.is_bounded_by_cores() => &mut self.modest,
            Queue::More => &mut self.storms,
            _ => &mut self.expensive,
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
    /// So many cores does running work keep busy, measured over a while: 0 for work that sleeps, 1 for work that
    /// computes all the time. `gives_way`: whoever else wants a core takes it from this work at once; then more of a storm's may
    /// run than there are cores. Does nothing when it is over.
    pub fn note_cores(&mut self, work: &Grant, cores: f32, gives_way: bool) {
        let Some(run) = self.running.get_mut(work.key).filter(|run| run.grant == *work) else { return };
        let measured = Cores::of(cores);
        let account = run.account;
        self.busy.remove(run);
        (run.cores, run.gives_way) = (measured, gives_way);
        self.busy.add(run);
        self.busy.is_measured = true;
        let class = &mut self.accounts[account].by_class[run.class as usize];
        if run.queue == Queue::More {
            class.gives_way = gives_way;
        }
        let before = class.cores;
        class.cores.learn(measured);
        if class.cores.computes() != before.computes() {
            self.rank(account);
        }
    }

    /// Nobody can say what running work keeps busy. Nothing is learnt from that.
    pub fn forget_cores(&mut self, work: &Grant) {
        let Some(run) = self.running.get_mut(work.key).filter(|run| run.grant == *work) else { return };
        self.busy.remove(run);
        run.cores = Cores::default();
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
        wanted.leaves_one_of(cores) || !self.is_core_bound(account, class)
    }

    /// Whether cores and not slots bound a tenant's work of a class at the moment. Such work falls behind those whom
    /// nothing bounds, which holds nobody's clock back and earns no claim on what they were given meanwhile.
    pub(super) fn is_core_bound(&self, account: usize, class: Class) -> bool {
        self.wants_cores(account, class) && self.busy.is_in_company(account, self.now)
    }

    /// The cores for storms and expensive work, where it is known what computes.
    pub(super) fn known_cores(&self) -> Option<u32> {
        self.config.cores.filter(|_| self.busy.is_measured)
    }

    /// What work that ends says about the number of slots, if anything, when it took longer than usual by this much.
    ///
    /// Where what computes gives way to others, that it takes longer is as it should be. And modest work that waits for a core,
    /// while all of it together wants no more than there are, waits for somebody whom fewer slots do not keep away: what is
    /// bounded by cores already, or whatever else the machine does. Then nothing speaks against more slots.
    pub(super) fn evidence_of(&self, run: &Running, inflation: f64) -> Option<f64> {
        if run.since < self.concurrency.since() {
            return None;
        }
        let Some(cores) = self.known_cores() else { return Some(inflation) };
        if run.is_bounded_by_cores() {
            let gives_way = run.cores.computes() && self.busy.is_in_company(run.account, self.now);
            return (!gives_way).then_some(inflation);
        }
        let is_others = run.cores >= MOSTLY_COMPUTES && self.busy.modest.thousandths <= 1_000 * u64::from(cores);
        Some(if is_others { inflation.min(0.0) } else { inflation })
    }
}

impl Running {
    /// Thousandths of a core, as it counts against those that there are.
    fn counted(&self) -> u64 {
        let many = if self.gives_way && self.queue == Queue::More { STORM_TO_A_CORE } else { 1 };
        u64::from(self.cores.0) / many
    }

    /// Whether it counts as a storm's or as expensive work.
    fn is_bounded_by_cores(&self) -> bool {
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
