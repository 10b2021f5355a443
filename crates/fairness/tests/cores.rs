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
    /// Whether what runs gives way to others.
    gives_way: bool,
}

impl Server {
    /// 20 slots and a core for storms and expensive work; each tenant has what it submits cost half a second.
    fn new(cores: Option<u32>) -> Self {
        let mut scheduler = Scheduler::new(GateConfig { cores, ..GateConfig::slots(20) });
        for tenant in [A, B, R] {
            scheduler.register(tenant, Share { queue: 50_000, ..Share::default() });
        }
        Self { scheduler, running: Vec::new(), owners: HashMap::new(), now: 1_000, gives_way: false }
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
                self.scheduler.note_cores(grant, cores_of(*tenant), self.gives_way);
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

/// Short work of A, each piece of which computes for 50 ms: how much of it runs at once beside R's modest work, and how much
/// it keeps busy.
fn storm(gives_way: bool) -> (usize, f64) {
    let mut s = Server::new(Some(2));
    s.gives_way = gives_way;
    s.submit(A, 2_000);
    let mut most = (0, 0.0_f64);
    for round in 0..100 {
        s.modest(R);
        s.now += 50;
        s.scheduler.advance(ms(s.now));
        for (tenant, grant) in &s.running {
            s.scheduler.note_cores(grant, Server::of(*tenant), gives_way);
        }
        if round > 50 {
            most = (most.0.max(s.running(A)), most.1.max(s.scheduler.usage().busy_cores));
        }
        for (_, grant) in std::mem::take(&mut s.running) {
            s.scheduler.complete(ms(s.now), grant);
        }
        while let Some((ticket, grant)) = s.scheduler.next_grant(ms(s.now)) {
            s.running.push((s.owners.remove(&ticket).unwrap(), grant));
        }
    }
    most
}

#[test]
fn a_storm_that_gives_way_runs_a_few_to_a_core_and_is_said_to_keep_busy_what_it_does() {
    let (without, with) = (storm(false), storm(true));
    assert_eq!(without.0, 2, "{without:?}");
    assert!((6..=8).contains(&with.0), "{with:?}");
    assert!((with.1 - with.0 as f64).abs() < 1e-3, "each wants a core: {with:?}");
}

/// The same tenant's storm gave way and was counted less; what turns out to be long is not.
#[test]
fn expensive_work_of_a_class_that_was_a_storm_computes_one_to_a_core() {
    let mut s = Server::new(Some(2));
    s.gives_way = true;
    s.submit(A, 400);
    for round in 0..20 {
        s.modest(R);
        s.round(Server::of);
        assert!(round < 3 || s.running(A) == 2, "{} of A in round {round}", s.running(A));
    }
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

/// What wants half a core fits where what wants a whole one does not; it must not go first for ever for that.
#[test]
fn what_wants_a_whole_core_is_not_overtaken_for_ever_by_what_wants_half() {
    let mut s = Server::new(Some(2));
    let cores = |tenant| if tenant == A { 1.0 } else { 0.5 };
    s.submit(A, 8);
    s.submit(B, 8);
    while s.running(A) > 0 {
        s.modest(R);
        s.round(cores);
    }
    s.submit(B, 100);
    s.modest(R);
    s.round(cores);
    assert!(s.running(B) > 2 && s.running(A) == 0, "both cores are B's when A comes");
    s.submit(A, 100);
    let mut served = 0;
    for step in 0..400 {
        if step % 40 == 0 {
            s.modest(R);
        }
        s.now += 100;
        s.scheduler.advance(ms(s.now));
        for (tenant, grant) in &s.running {
            s.scheduler.note_cores(grant, cores(*tenant), false);
        }
        // They end one by one, and whoever is served wants the same again.
        let (tenant, grant) = s.running.remove(0);
        s.scheduler.complete(ms(s.now), grant);
        s.submit(tenant, 1);
        served += u32::from(tenant == A);
        while let Some((ticket, grant)) = s.scheduler.next_grant(ms(s.now)) {
            s.running.push((s.owners.remove(&ticket).unwrap(), grant));
        }
        assert!(s.scheduler.usage().busy_cores <= 3.0 || step < 40, "{:?}", s.scheduler.usage());
    }
    assert!(served > 100, "{served} of 400 were the one's that wants a whole core");
}

/// Whoever waits for a core falls behind those who need none. When it needs to wait no more, that is no claim on what they
/// were given meanwhile, neither its own nor that of somebody who comes then.
#[test]
fn ten_minutes_of_waiting_for_cores_keep_nobody_waiting_afterwards() {
    let mut s = Server::new(Some(1));
    s.submit(A, 4_000);
    for _ in 0..1_200 {
        s.submit(B, 20);
        s.modest(R);
        s.round(Server::of);
    }
    assert!(s.running(A) == 1 && s.running(B) > 10, "{:?}", s.scheduler.usage());
    // Nobody has modest work any more.
    let mut least = usize::MAX;
    for round in 0..60 {
        s.submit(B, 20);
        s.round(Server::of);
        if round > 25 {
            least = least.min(s.running(B));
            assert!(s.running(A) > 1, "A computes on every core: {} in round {round}", s.running(A));
        }
    }
    assert!(least > 3, "B is left with {least} slots");
}

#[test]
fn a_watch_says_nothing_of_what_runs_in_the_slot_after_its_work() {
    let clock = Arc::new(MonotonicClock::since(Instant::now()));
    let gate = Gate::new(GateConfig { cores: Some(1), ..GateConfig::slots(4) }, clock);
    let busy = || gate.usage().busy_cores;
    let first = gate.try_acquire(A, Class::Report).unwrap();
    let watch = first.watch().unwrap();
    watch.note_cores(0.8, false);
    assert!((busy() - 0.8).abs() < 1e-3);
    drop(first);
    assert!(busy().abs() < 1e-9);
    let second = gate.try_acquire(A, Class::Report).unwrap();
    let expected = busy();
    assert!(expected > 0.3, "what is expected of it counts until it is measured: {expected}");
    watch.note_cores(1.0, false);
    assert!((busy() - expected).abs() < 1e-9);
    drop(second);
    assert!(busy().abs() < 1e-9);
}
