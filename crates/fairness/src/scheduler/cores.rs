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

/// What storms and expensive work want now, and who has modest work. Other work is taken and counted for nothing.
#[derive(Debug, Default)]
pub(super) struct Busy {
    thousandths: u64,
    /// The same, as it counts against the cores that there are.
    counted: u64,
    /// Pieces of work that compute.
    computing: u32,
    /// The last two tenants whose modest work began, and when that was.
    modest: [Option<(usize, Timestamp)>; 2],
}

impl Busy {
    pub(super) fn cores(&self) -> f64 {
        self.thousandths as f64 / 1e3
    }

    pub(super) fn add(&mut self, run: &Running) {
        if !run.is_counted() {
            return;
        }
        self.thousandths += u64::from(run.cores.0);
        self.counted += run.counted();
        self.computing += u32::from(run.cores.computes());
    }

    pub(super) fn remove(&mut self, run: &Running) {
        if !run.is_counted() {
            return;
        }
        self.thousandths -= u64::from(run.cores.0);
        self.counted -= run.counted();
        self.computing -= u32::from(run.cores.computes());
    }

    pub(super) fn modest_work_begins(&mut self, account: usize, now: Timestamp) {
        match &mut self.modest {
            [Some((last, at)), _] if *last == account => *at = now,
            [last, before] => {
                *before = last.replace((account, now));
            }
        }
    }

    /// Whether somebody else than `account` has modest work.
    pub(super) fn is_in_company(&self, account: usize, now: Timestamp) -> bool {
        self.modest.iter().flatten().any(|(other, at)| *other != account && now.since(*at) < COMPANY)
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

    /// Whether a storm's or expensive work may compute now. One piece always may.
    pub(super) fn has_free_core(&self, account: usize, class: Class) -> bool {
        let Some(cores) = self.config.cores else { return true };
        self.busy.computing == 0
            || self.busy.counted + ENOUGH <= 1_000 * u64::from(cores)
            || !self.is_core_bound(account, class)
    }

    /// Whether cores and not slots bound a tenant's work of a class at the moment. Such work falls behind those whom
    /// nothing bounds, which holds nobody's clock back and earns no claim on what they were given meanwhile.
    pub(super) fn is_core_bound(&self, account: usize, class: Class) -> bool {
        self.wants_cores(account, class) && self.busy.is_in_company(account, self.now)
    }

    /// Whether work that ends says anything about the number of slots: where what computes gives way to
    /// others, that it takes longer is as it should be.
    pub(super) fn is_evidence(&self, run: &Running) -> bool {
        let gives_way = self.config.cores.is_some()
            && run.queue != Queue::First
            && run.cores.computes()
            && self.busy.is_in_company(run.account, self.now);
        run.since >= self.concurrency.since() && !gives_way
    }
}

impl Running {
    /// Thousandths of a core, as it counts against those that there are.
    fn counted(&self) -> u64 {
        let many = if self.gives_way && self.queue == Queue::More { STORM_TO_A_CORE } else { 1 };
        u64::from(self.cores.0) / many
    }

    /// Whether the cores it keeps busy count among those of storms and expensive work.
    fn is_counted(&self) -> bool {
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
