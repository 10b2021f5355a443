//! What computes leaves cores alone while others have modest work, where somebody says what computes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use cofferdam_fairness::*;
use cofferdam_tenant::TenantId;
use common::{A, B, FAR, R, ms};

/// A gate, its work, and the tenants that own it.
struct Server {
    scheduler: Scheduler,
    running: Vec<(TenantId, Grant)>,
    owners: HashMap<Ticket, TenantId>,
    now: u64,
}

impl Server {
    /// 20 slots and a core for storms and expensive work; each tenant has what it submits cost half a second.
    fn new(cores: Option<u32>) -> Self {
        let mut scheduler = Scheduler::new(GateConfig { cores, ..GateConfig::slots(20) });
        for tenant in [A, B, R] {
            scheduler.register(tenant, Share { queue: 1_000, ..Share::default() });
        }
        Self { scheduler, running: Vec::new(), owners: HashMap::new(), now: 1_000 }
    }

    fn submit(&mut self, tenant: TenantId, n: usize) {
        for _ in 0..n {
            match self.scheduler.submit(ms(self.now), tenant, Class::Rpc, FAR) {
                Submitted::Granted(grant) => self.running.push((tenant, grant)),
                Submitted::Queued(ticket) => {
                    self.owners.insert(ticket, tenant);
                }
                Submitted::Rejected(rejection) => panic!("{rejection}"),
            }
        }
    }

    /// A tenant has a millisecond's work.
    fn modest(&mut self, tenant: TenantId) {
        let Submitted::Granted(grant) = self.scheduler.submit(ms(self.now), tenant, Class::Interactive, FAR) else {
            panic!("modest work waits: {:?}", self.scheduler.usage())
        };
        self.now += 1;
        self.scheduler.complete(ms(self.now), grant);
    }

    /// Half a second passes; what runs keeps so many cores busy, which is said after a third of a second; then it ends.
    fn round(&mut self, cores_of: impl Fn(TenantId) -> f32) {
        for (after, ends) in [(330, false), (170, true)] {
            self.now += after;
            self.scheduler.advance(ms(self.now));
            for (tenant, grant) in &self.running {
                self.scheduler.note_cores(grant, cores_of(*tenant));
            }
            if ends {
                for (_, grant) in std::mem::take(&mut self.running) {
                    self.scheduler.complete(ms(self.now), grant);
                }
            }
            while let Some((ticket, grant)) = self.scheduler.next_grant(ms(self.now)) {
                self.running.push((self.owners.remove(&ticket).unwrap(), grant));
            }
        }
    }

    fn running(&self, tenant: TenantId) -> usize {
        self.running.iter().filter(|(owner, _)| *owner == tenant).count()
    }

    /// A computes, B sleeps.
    fn of(tenant: TenantId) -> f32 {
        if tenant == A { 1.0 } else { 0.0 }
    }
}

#[test]
fn one_core_is_computed_on_at_a_time_while_another_tenant_has_modest_work() {
    let mut s = Server::new(Some(1));
    s.submit(A, 60);
    for round in 0..20 {
        s.modest(R);
        s.round(Server::of);
        // In the first rounds nobody knew yet what it is.
        assert!(round < 2 || s.running(A) == 1, "{} of A in round {round}: {:?}", s.running(A), s.scheduler.usage());
        assert!(s.scheduler.usage().busy_cores <= 1.0 || round < 2);
    }
    let mut unbounded = Server::new(None);
    unbounded.submit(A, 400);
    for _ in 0..5 {
        unbounded.modest(R);
        unbounded.round(Server::of);
    }
    assert!(unbounded.running(A) > 5, "{:?}", unbounded.scheduler.usage());
}

#[test]
fn what_sleeps_takes_its_slots_beside_what_waits_for_a_core() {
    let mut s = Server::new(Some(1));
    s.submit(A, 60);
    s.submit(B, 200);
    for round in 0..4 {
        s.modest(R);
        s.round(Server::of);
        assert!(round < 2 || s.running(B) > 10, "{} of B in round {round}: {:?}", s.running(B), s.scheduler.usage());
    }
    assert_eq!(s.running(A), 1);
}

#[test]
fn a_tenant_alone_computes_on_every_core_ten_seconds_after_the_last_modest_work_of_another() {
    let mut s = Server::new(Some(1));
    s.modest(R);
    s.submit(A, 400);
    for _ in 0..4 {
        s.round(Server::of);
    }
    assert_eq!(s.running(A), 1);
    for _ in 0..20 {
        s.round(Server::of);
    }
    assert!(s.running(A) > 5, "{} of A: {:?}", s.running(A), s.scheduler.usage());
}

#[test]
fn two_tenants_that_compute_share_the_core() {
    let mut s = Server::new(Some(1));
    s.submit(A, 200);
    s.submit(B, 200);
    for _ in 0..100 {
        s.modest(R);
        s.round(|tenant| if tenant == R { 0.0 } else { 1.0 });
    }
    let used = |tenant| s.scheduler.tenant_usage(ms(s.now), tenant).used.0;
    assert!((used(A) / used(B) - 1.0).abs() < 0.05, "{} and {} slot-seconds", used(A), used(B));
}

#[test]
fn a_watch_says_nothing_of_what_runs_in_the_slot_after_its_work() {
    let clock = Arc::new(MonotonicClock::since(Instant::now()));
    let gate = Gate::new(GateConfig { cores: Some(1), ..GateConfig::slots(4) }, clock);
    let busy = || gate.usage().busy_cores;
    let first = gate.try_acquire(A, Class::Report).unwrap();
    let watch = first.watch().unwrap();
    watch.note_cores(0.8);
    assert!((busy() - 0.8).abs() < 1e-3);
    drop(first);
    assert!(busy().abs() < 1e-9);
    let second = gate.try_acquire(A, Class::Report).unwrap();
    let expected = busy();
    assert!(expected > 0.3, "what is expected of it counts until it is measured: {expected}");
    watch.note_cores(1.0);
    assert!((busy() - expected).abs() < 1e-9);
    drop(second);
    assert!(busy().abs() < 1e-9);
}
