//! What is charged for running work: seconds of a slot to the virtual time and the work budget, seconds of work to the clocks of
//! those that wait for cores.

use std::time::Duration;

use super::Scheduler;
use super::account::{Account, Lane, Queue, Running};
use super::clocks::Clocks;
use super::cores::MOST_FREE;
use crate::time::Timestamp;

/// How often running work is charged for the time it has run so far.
pub(super) const EVERY: Duration = Duration::from_millis(100);
/// Seconds for which work that is not measured is believed to wait for cores as what was measured last did.
const BELIEVED: f64 = 1.0;
/// The part of what makes work expensive that it must have cost before it is taken for long because its tenant has much more of it.
const LITTLE: f64 = 0.125;

impl Scheduler {
    /// Charges work that runs longer than was charged for, and moves it to the expensive lane when it belongs there.
    pub(super) fn recharge(&mut self) {
        let threshold = self.config.expensive_from.as_secs_f64();
        let floors = self.clocks;
        let (mut touched, mut lasting) = (Vec::new(), Vec::new());
        let cores: Vec<_> = self.running.iter().map(|(_, run)| (self.bounds(run), self.is_of_cores(run))).collect();
        for ((key, run), (is_bounded, is_of_cores)) in self.running.iter_mut().zip(cores) {
            run.pass(self.now, is_bounded);
            let elapsed = self.now.since(run.since).as_secs_f64();
            let a = &mut self.accounts[run.account];
            if elapsed > run.charged.all {
                a.charge_slots(run, elapsed, &floors);
                touched.push(run.account);
            }
            let worked = run.worked(self.now);
            if is_of_cores && worked > run.core_charged.all {
                a.charge_cores(run, worked, &floors);
                touched.push(run.account);
            }
            if elapsed > run.billed {
                a.bill(self.now, elapsed - run.billed);
                run.billed = elapsed;
                if a.share.work.is_some() {
                    touched.push(run.account);
                }
            }
            if run.outlasts(elapsed, threshold) {
                lasting.push(key);
            }
        }
        touched.extend(lasting.into_iter().filter_map(|key| self.outlasts(key)));
        for account in touched {
            self.trust_its_part(account);
        }
        self.catch_up();
    }

    /// Whatever it did, a tenant has its part of the slots.
    pub(super) fn trust_its_part(&mut self, account: usize) {
        let entitlement = self.entitlement(account);
        self.accounts[account].trust = self.accounts[account].trust.max(entitlement);
        self.rank(account);
    }

    /// Work that has run for longer than short work may, if it has, counts as expensive, and what it cost is expected of its class. What only waits for cores that
    /// long teaches nothing, and is not moved where it is modest: whoever else computes makes nobody's work expensive.
    /// Returns whom that concerns.
    pub(super) fn outlasts(&mut self, key: usize) -> Option<usize> {
        let threshold = self.config.expensive_from.as_secs_f64();
        let is_seen = self.known_cores().is_some();
        let run = self.running.get(key)?;
        let elapsed = self.now.since(run.since).as_secs_f64();
        if !run.outlasts(elapsed, threshold) {
            return None;
        }
        let wants_cores = self.wants_cores(run.account, run.class);
        let run = self.running.get_mut(key)?;
        let a = &mut self.accounts[run.account];
        let cost = run.cost(self.now);
        // Whoever looks at what runs has looked at it by then.
        let is_known = !is_seen || run.is_measured() || elapsed >= 2.0 * threshold;
        let costs_much = is_known && cost >= threshold;
        let is_modest = a.is_modest() || a.usage.running <= a.share.reserved || !is_known || cost < threshold * LITTLE;
        if run.queue == Queue::First && is_modest && !costs_much {
            return None;
        }
        self.busy.remove(run);
        if run.queue != Queue::Expensive {
            if !run.nested {
                self.headroom.pass(self.now, self.held_by[Queue::First as usize]);
                self.held_by[run.queue as usize] -= 1;
                self.held_by[Queue::Expensive as usize] += 1;
                a.short -= 1;
                a.lasting += 1;
                self.lasting += 1;
                a.trust /= 2;
            }
            if run.queue == Queue::First {
                // It waited for cores in nobody's way, and is not charged for that now.
                run.excused = run.waited_for;
            }
            (run.queue, run.lasts) = (Queue::Expensive, true);
            if a.ready_as[Lane::Expensive as usize].is_none() {
                a.clocks.come_to_lane(Lane::Expensive, &self.clocks);
            }
            if wants_cores && run.is_bounded_by_cores() {
                a.come_to_cores(run.queue, &self.clocks);
            }
        }
        if costs_much && std::mem::take(&mut run.lasts) {
            a.lasting -= u32::from(!run.nested);
            self.lasting -= u32::from(!run.nested);
            // Do not wait for its end to know that this tenant's work of this kind is long.
            a.learn(run.class, cost);
        }
        self.busy.add(run);
        Some(run.account)
    }

    /// First come first served knows no clock, but they go on while it lasts: nobody owes anybody anything for that.
    pub(super) fn forget_debts(&mut self) {
        self.accounts.iter().for_each(|a| self.clocks.not_before(&a.clocks));
        self.accounts.iter_mut().for_each(|a| a.clocks = self.clocks);
        // Nor is anything given back of what was charged until now.
        for (_, run) in &mut self.running {
            run.charged.forget(run.charged.all.min(self.now.since(run.since).as_secs_f64()));
            if run.core_charged.all > 0.0 {
                run.core_charged.forget(run.worked(self.now));
            }
        }
    }

    /// Whether what runs is charged to the clock of those that wait for cores.
    pub(super) fn is_of_cores(&self, run: &Running) -> bool {
        run.is_bounded_by_cores() && self.wants_cores(run.account, run.class)
    }

    /// Whether cores and not slots bound what runs. Then what it waits for is a core, and nobody else waits for its slot.
    pub(super) fn bounds(&self, run: &Running) -> bool {
        run.is_bounded_by_cores() && self.is_core_bound(run.account, run.class)
    }
}

impl Running {
    /// Counts the time since this was last called, if cores bound the work. How much of that it has waited is said when it is
    /// measured. What was not known to compute until now counts from its beginning.
    pub(super) fn pass(&mut self, now: Timestamp, is_bounded: bool) {
        if self.wanted.is_some() {
            self.bounded_for += if is_bounded { now.since(self.counted_until).as_secs_f64() } else { 0.0 };
            self.counted_until = now;
        }
    }

    /// Whether it has run for longer than short work may, and is not known to be expensive.
    fn outlasts(&self, elapsed: f64, threshold: f64) -> bool {
        elapsed >= threshold && (self.queue != Queue::Expensive || self.lasts)
    }

    fn is_measured(&self) -> bool {
        self.wanted.is_some() && self.measured_until > self.since
    }

    /// Seconds that it has taken until now but for those in which it waited for a core, as far as that was measured: what it would take
    /// on a machine at rest. Whoever else computes makes nobody's work expensive.
    pub(super) fn cost(&self, now: Timestamp) -> f64 {
        let took = now.since(self.since).as_secs_f64();
        let expected = now.since(self.measured_until).as_secs_f64().min(BELIEVED) * f64::from(self.waited);
        (took - self.waited_for - expected).max(took * f64::from(1.0 - MOST_FREE))
    }

    /// Seconds of work of it until now, as they are charged: not those in which it waited for a core where cores bounded it. As long as it was not
    /// measured itself it is taken to wait as others of its class do, but only for so long.
    pub(super) fn worked(&self, now: Timestamp) -> f64 {
        let expected = self.bounded_for.min(BELIEVED) * f64::from(self.waited);
        (now.since(self.since).as_secs_f64() - self.excused - expected).max(0.0)
    }
}

impl Account {
    /// Charges running work for so many slot-seconds in all.
    pub(super) fn charge_slots(&mut self, run: &mut Running, seconds: f64, floors: &Clocks) {
        let weight = f64::from(self.share.weight);
        self.clocks.slots += (seconds - run.charged.all) / weight;
        run.charged.come_to(seconds, run.queue.lane(), &mut self.clocks.lanes, floors.lanes, weight);
    }

    /// Charges running work for `worked` seconds in all, to the clocks of what waits for cores.
    pub(super) fn charge_cores(&mut self, run: &mut Running, worked: f64, floors: &Clocks) {
        let weight = f64::from(self.share.weight);
        run.core_charged.come_to(worked, run.queue.lane(), &mut self.clocks.cores, floors.cores, weight);
    }

    /// Charges seconds of work to the work budget.
    pub(super) fn bill(&mut self, now: Timestamp, seconds: f64) {
        if let Some(allowance) = self.share.work {
            self.work.charge(allowance, now, seconds.max(0.0) * 1_000.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_tenant::{Class, TenantId};

    use super::*;
    use crate::budget::Allowance;
    use crate::scheduler::{Grant, OnCores};
    use crate::share::{GateConfig, Share};

    /// Whether others have modest work changes all the time. What was not charged because they had is not charged later because
    /// they have none any more, nor given back when they have some again.
    #[test]
    fn what_was_charged_stays_when_company_comes_and_goes() {
        let at = Timestamp::from_millis;
        let mut scheduler = Scheduler::new(GateConfig { cores: Some(1), ..GateConfig::slots(8) });
        let (long, other) = (TenantId(0), TenantId(1));
        for tenant in [long, other] {
            scheduler.register(tenant, Share::default());
        }
        let work = scheduler.try_start(at(0), long, Class::Report).unwrap();
        let clock = |scheduler: &Scheduler| scheduler.accounts[0].clocks.cores[Lane::Expensive as usize];
        let begun = clock(&scheduler);
        let mut charged = begun;
        for second in 1..=90 {
            // In company from 0 s to 30 s and from 60 s on, and for ten seconds after that.
            for tenth in 0..10 {
                let now = at(1_000 * second + 100 * tenth);
                if !(30..60).contains(&second) {
                    let modest = scheduler.try_start(now, other, Class::Interactive).unwrap();
                    scheduler.complete(now, modest);
                }
                scheduler.advance(now);
                scheduler.note_cores(&work, OnCores { wanted: 1.0, waited: 0.9, gives_way: true });
            }
            let before = std::mem::replace(&mut charged, clock(&scheduler));
            assert!((-0.01..1.3).contains(&(charged - before)), "{} s in second {second}", charged - before);
        }
        let in_all = charged - begun;
        // A tenth of seventy seconds, and the twenty without company.
        assert!((24.0..30.0).contains(&in_all), "{in_all} s are charged");
        scheduler.complete(at(91_000), work);
        assert!((clock(&scheduler) - charged).abs() < 0.5);
        let used = scheduler.tenant_usage(at(91_000), long).used.0;
        assert!((used - 91.0).abs() < 0.1, "a slot-second is one: {used} s of the slot");
    }

    /// What nobody could say for long is not taken for what is seen at last.
    #[test]
    fn what_could_not_be_measured_is_not_excused_afterwards() {
        let at = Timestamp::from_millis;
        let (mut scheduler, work) = in_company(Share::default());
        scheduler.note_cores(&work, OnCores { wanted: 1.0, waited: 0.0, gives_way: true });
        for tenth in 1..=300 {
            let modest = scheduler.try_start(at(100 * tenth), TenantId(1), Class::Interactive).unwrap();
            scheduler.complete(at(100 * tenth), modest);
            scheduler.forget_cores(&work);
        }
        scheduler.advance(at(30_100));
        scheduler.note_cores(&work, OnCores { wanted: 1.0, waited: 0.9, gives_way: true });
        scheduler.complete(at(30_100), work);
        let charged = scheduler.accounts[0].clocks.cores[Lane::Expensive as usize];
        assert!(charged > 29.5, "{charged} s of 30 are charged");
    }

    #[test]
    fn a_work_budget_pays_for_the_slot_and_not_for_the_core() {
        let at = Timestamp::from_millis;
        let work = Some(Allowance { per_second: 1, burst: 60_000 });
        let (mut scheduler, grant) = in_company(Share { work, ..Share::default() });
        scheduler.note_cores(&grant, OnCores { wanted: 1.0, waited: 0.9, gives_way: true });
        for second in 1..=20 {
            let modest = scheduler.try_start(at(1_000 * second), TenantId(1), Class::Interactive).unwrap();
            scheduler.complete(at(1_000 * second), modest);
            scheduler.note_cores(&grant, OnCores { wanted: 1.0, waited: 0.9, gives_way: true });
        }
        scheduler.complete(at(20_000), grant);
        let left = scheduler.tenant_usage(at(20_000), TenantId(0)).work_balance.unwrap();
        assert!((left - 40_000.0).abs() < 100.0, "{left} ms of 60 s are left after 20 s");
    }

    /// A report that begins at 0 on a gate with a core, and somebody with modest work.
    fn in_company(share: Share) -> (Scheduler, Grant) {
        let mut scheduler = Scheduler::new(GateConfig { cores: Some(1), ..GateConfig::slots(8) });
        scheduler.register(TenantId(0), share);
        scheduler.register(TenantId(1), Share::default());
        let modest = scheduler.try_start(Timestamp::default(), TenantId(1), Class::Interactive).unwrap();
        scheduler.complete(Timestamp::default(), modest);
        let report = scheduler.try_start(Timestamp::default(), TenantId(0), Class::Report).unwrap();
        (scheduler, report)
    }
}
