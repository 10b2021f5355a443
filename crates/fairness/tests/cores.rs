//! What computes leaves cores alone while others have modest work, where somebody says what computes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_fairness::*;
use cofferdam_tenant::TenantId;
use common::{A, B, FAR, R, ms, on};

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
                self.scheduler.note_cores(grant, on(cores_of(*tenant), self.gives_way));
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
            s.scheduler.note_cores(grant, on(Server::of(*tenant), gives_way));
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
            s.scheduler.note_cores(grant, on(cores(*tenant), false));
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
    watch.note_cores(on(0.8, false));
    assert!((busy() - 0.8).abs() < 1e-3);
    drop(first);
    assert!(busy().abs() < 1e-9);
    let second = gate.try_acquire(A, Class::Report).unwrap();
    let expected = busy();
    assert!(expected > 0.3, "what is expected of it counts until it is measured: {expected}");
    watch.note_cores(on(1.0, false));
    assert!((busy() - expected).abs() < 1e-9);
    drop(second);
    assert!(busy().abs() < 1e-9);
}

/// The slots that are open on average of a gate of 4 to 40, with two cores or where nobody knows of them, while A always has 100
/// pieces of work waiting that take half a second, and each of eight others has 4 ms of work 20 times a second.
/// `modest` says how long that takes, at a moment and with so many of A's pieces running, and what is seen of it then; each of A's
/// pieces keeps `part` of a core busy.
fn open_beside(known: bool, part: f32, modest: impl Fn(u64, usize) -> (u64, OnCores)) -> f64 {
    let cores = known.then_some(2);
    let mut scheduler = Scheduler::new(GateConfig { cores, least_slots: 4, ..GateConfig::slots(40) });
    let others: Vec<TenantId> = (1..9).map(TenantId).collect();
    for tenant in others.iter().chain([&A]) {
        scheduler.register(*tenant, Share { queue: 1_000, ..Share::default() });
    }
    let mut running: Vec<(u64, TenantId, OnCores, Grant)> = Vec::new();
    let mut waiting: HashMap<Ticket, TenantId> = HashMap::new();
    let (mut owed, mut open, mut steps) = (vec![A; 100], 0.0, 0.0);
    for now in (1_000..60_000).step_by(2) {
        let (over, still) = std::mem::take(&mut running).into_iter().partition::<Vec<_>, _>(|(end, ..)| *end <= now);
        running = still;
        for (_, tenant, seen, grant) in over {
            owed.extend((tenant == A).then_some(A));
            if known {
                scheduler.note_cores(&grant, seen);
            }
            scheduler.complete(ms(now), grant);
        }
        let come = others.iter().enumerate().filter(|(n, _)| (now / 2 + 3 * *n as u64).is_multiple_of(25));
        owed.extend(come.map(|(_, tenant)| *tenant));
        let mut started = Vec::new();
        for tenant in std::mem::take(&mut owed) {
            let class = if tenant == A { Class::Rpc } else { Class::Interactive };
            match scheduler.submit(ms(now), tenant, class, FAR) {
                Submitted::Granted(grant) => started.push((tenant, grant)),
                Submitted::Queued(ticket) => drop(waiting.insert(ticket, tenant)),
                Submitted::Rejected(rejection) => panic!("{rejection}"),
            }
        }
        while let Some((ticket, grant)) = scheduler.next_grant(ms(now)) {
            started.push((waiting.remove(&ticket).unwrap(), grant));
        }
        for (tenant, grant) in started {
            let of_a = running.iter().filter(|(_, tenant, ..)| *tenant == A).count();
            let (takes, seen) = if tenant == A { (500, on(part, false)) } else { modest(now, of_a) };
            running.push((now + takes, tenant, seen, grant));
        }
        if now >= 10_000 {
            open += f64::from(scheduler.usage().open_slots);
            steps += 1.0;
        }
    }
    open / steps
}

#[test]
fn modest_work_that_waits_for_a_core_closes_no_slot_of_what_sleeps() {
    // Something else on the machine computes, now and then.
    let noise = |now: u64, _| {
        let waits = (now / 1_700).is_multiple_of(2);
        if waits { (12, OnCores { wanted: 0.95, waited: 0.66, gives_way: false }) } else { (4, on(0.9, false)) }
    };
    let (open, blind) = (open_beside(true, 0.0, noise), open_beside(false, 0.0, noise));
    assert!(open > 34.0, "{open} of 40 slots open");
    assert!(blind < 0.6 * open, "{blind} of 40 slots open where nobody knows what computes: then this shows nothing");
}

/// Disks and locks: what modest work waits for then is no core, and fewer slots help.
#[test]
fn modest_work_that_waits_for_something_else_keeps_slots_closed() {
    for from in [8, 12, 16] {
        let contended = |_, of_a: usize| {
            let takes = if of_a > from { 4 + (of_a - from) as u64 } else { 4 };
            (takes, on(0.95 * 4.0 / takes as f32, false))
        };
        let (open, blind) = (open_beside(true, 0.0, contended), open_beside(false, 0.0, contended));
        assert!(open < 1.3 * blind + 2.0, "{open} of 40 slots open, {blind} where nobody knows what computes");
    }
}

/// Pieces that want too little of a core to be counted, and all together more than there are.
#[test]
fn many_that_compute_a_little_are_no_excuse_for_modest_work_that_waits_for_a_core() {
    let contended = |_, of_a: usize| {
        let wanted = 0.09 * of_a as f32;
        let takes = (4.0 * (wanted / 2.0).max(1.0)).round() as u64 + u64::from(wanted > 2.0);
        (takes, OnCores { wanted: 0.95, waited: 1.0 - 4.0 / takes as f32, gives_way: false })
    };
    let (open, blind) = (open_beside(true, 0.09, contended), open_beside(false, 0.09, contended));
    assert!(open < 1.3 * blind + 2.0, "{open} of 40 slots open, {blind} where nobody knows what computes");
}

/// Whoever comes afterwards finds them all running.
#[test]
fn who_computes_alone_does_not_get_every_slot() {
    let open = |known: bool| {
        let cores = known.then_some(2);
        let mut scheduler = Scheduler::new(GateConfig { cores, least_slots: 4, ..GateConfig::slots(40) });
        scheduler.register(A, Share { queue: 1_000, ..Share::default() });
        scheduler.register(B, Share::default());
        let (mut running, mut owed): (Vec<(u64, Grant)>, _) = (Vec::new(), 100);
        for now in (1_000..60_000).step_by(10) {
            let (over, still) = std::mem::take(&mut running).into_iter().partition::<Vec<_>, _>(|(end, _)| *end <= now);
            running = still;
            for (_, grant) in over {
                owed += 1;
                if known {
                    scheduler.note_cores(&grant, OnCores { wanted: 1.0, waited: 0.5, gives_way: false });
                }
                scheduler.complete(ms(now), grant);
            }
            let mut started = Vec::new();
            for _ in 0..std::mem::take(&mut owed) {
                if let Submitted::Granted(grant) = scheduler.submit(ms(now), A, Class::Rpc, FAR) {
                    started.push(grant);
                }
            }
            while let Some((_, grant)) = scheduler.next_grant(ms(now)) {
                started.push(grant);
            }
            for grant in started {
                running.push((now + 200 * (running.len() as u64 / 2).max(1), grant));
            }
        }
        scheduler.usage().open_slots
    };
    let (known, blind) = (open(true), open(false));
    assert!(known <= blind + 4 && known < 30, "{known} of 40 slots open, {blind} where nobody knows what computes");
}

/// The server may run elsewhere after a failover.
#[test]
fn what_is_not_seen_any_more_counts_for_nothing_after_a_while() {
    let mut scheduler = Scheduler::new(GateConfig { cores: Some(32), least_slots: 4, ..GateConfig::slots(40) });
    scheduler.register(A, Share::default());
    let mut now = 1_000;
    let mut work = |scheduler: &mut Scheduler, seen: bool| {
        let Submitted::Granted(grant) = scheduler.submit(ms(now), A, Class::Rpc, FAR) else { panic!("it waits") };
        if seen {
            scheduler.note_cores(&grant, on(1.0, false));
        } else {
            scheduler.forget_cores(&grant);
        }
        now += 100;
        scheduler.complete(ms(now), grant);
        scheduler.usage().open_slots
    };
    assert_eq!(work(&mut scheduler, false), 4);
    let open = (0..10).map(|_| work(&mut scheduler, true)).last();
    assert!(open.is_some_and(|open| open >= 32), "{open:?} slots open");
    let open = (0..700).map(|_| work(&mut scheduler, false)).last();
    assert_eq!(open, Some(4), "where the server runs now nobody knows of cores");
    let Submitted::Granted(grant) = scheduler.submit(ms(100_000), A, Class::Rpc, FAR) else { panic!("it waits") };
    assert!(scheduler.usage().busy_cores < 0.01);
    scheduler.complete(ms(100_100), grant);
}

/// Eight tenants with 20 transactions of 2 ms a second each beside four that always have 20 of 400 ms waiting, on two cores
/// and a gate of 4 to 40 slots. For one second all of the eight's transactions take 240 ms, whatever that came from, and a few of
/// each tenant's come together. Says how long those that came in each second after that waited at most.
fn waits_after_a_stall() -> Vec<u64> {
    let config = GateConfig { cores: Some(2), least_slots: 4, ..GateConfig::slots(40) };
    let mut scheduler = Scheduler::new(config);
    let victims: Vec<TenantId> = (10..18).map(TenantId).collect();
    let noisy: Vec<TenantId> = (0..4).map(TenantId).collect();
    for tenant in victims.iter().chain(&noisy) {
        scheduler.register(*tenant, Share { queue: 1_000, ..Share::default() });
    }
    let mut running: Vec<(u64, TenantId, Grant)> = Vec::new();
    let mut waiting: HashMap<Ticket, (TenantId, u64)> = HashMap::new();
    let mut owed: Vec<TenantId> = Vec::new();
    let mut waits = vec![0; 30];
    let stalled = 15_000..16_000;
    for now in (1_000..46_000).step_by(2) {
        let of = |tenant: TenantId| match tenant.0 {
            0..4 => 400,
            _ if stalled.contains(&now) => 240,
            _ => 2,
        };
        if now == 5_000 {
            owed.extend(noisy.iter().flat_map(|tenant| [*tenant; 20]));
        }
        let (over, still) = std::mem::take(&mut running).into_iter().partition::<Vec<_>, _>(|(end, ..)| *end <= now);
        running = still;
        if now % 100 == 0 {
            scheduler.advance(ms(now));
            for (_, _, grant) in &running {
                scheduler.note_cores(grant, on(1.0, false));
            }
        }
        for (_, tenant, grant) in over {
            owed.extend((tenant.0 < 4).then_some(tenant));
            scheduler.note_cores(&grant, on(if tenant.0 < 4 { 1.0 } else { 0.4 }, false));
            scheduler.complete(ms(now), grant);
        }
        let come = victims.iter().enumerate().filter(|(n, _)| (now / 2 + 3 * *n as u64).is_multiple_of(25));
        let come: Vec<TenantId> = come.map(|(_, tenant)| *tenant).chain(std::mem::take(&mut owed)).collect();
        for tenant in come {
            match scheduler.submit(ms(now), tenant, Class::Interactive, FAR) {
                Submitted::Granted(grant) => running.push((now + of(tenant), tenant, grant)),
                Submitted::Queued(ticket) => drop(waiting.insert(ticket, (tenant, now))),
                Submitted::Rejected(rejection) => panic!("{rejection}"),
            }
        }
        while let Some((ticket, grant)) = scheduler.next_grant(ms(now)) {
            let (tenant, since) = waiting.remove(&ticket).unwrap();
            running.push((now + of(tenant), tenant, grant));
            if tenant.0 >= 4 && since >= stalled.end {
                let second = &mut waits[((since - stalled.end) / 1_000) as usize];
                *second = (*second).max(now - since);
            }
        }
    }
    for (_, since) in waiting.values().filter(|(tenant, since)| tenant.0 >= 4 && *since >= stalled.end) {
        let second = &mut waits[((since - stalled.end) / 1_000) as usize];
        *second = (*second).max(46_000 - since);
    }
    waits
}

#[test]
fn a_second_in_which_everything_takes_long_keeps_nobody_waiting_for_longer() {
    let waits = waits_after_a_stall();
    assert!(waits[1..].iter().all(|wait| *wait < 50), "waits in ms, by the second after: {waits:?}");
}

/// Something else keeps the machine's cores busy for two seconds: modest work takes a hundred times as long, and so does what computes, of which much was
/// begun. When it is over modest work goes on at once, and does not wait behind all that as if it were expensive itself.
#[test]
fn who_had_to_wait_for_cores_is_not_expensive_for_that() {
    let config = GateConfig { least_slots: 4, expensive_slots: 19, ..GateConfig::slots(20) };
    let mut s = Scheduler::new(GateConfig { cores: Some(2), expensive_from: Duration::from_millis(200), ..config });
    (0..12).for_each(|t| s.register(TenantId(t), Share::default()));
    let is_modest = |tenant: u32| tenant < 8;
    let (mut running, mut waiting) = (Vec::<(u64, u64, u32, Grant)>::new(), HashMap::new());
    let (mut wanted, mut done) = (Vec::new(), 0);
    for now in 0..12_000 {
        let is_busy = (5_000..7_000).contains(&now);
        let takes = |tenant| match (is_modest(tenant), is_busy) {
            (true, false) => 4,
            (true, true) => 400,
            (false, _) => 10_000,
        };
        s.advance(ms(now));
        if now % 50 == 0 {
            wanted.extend(0..8);
        }
        if now == 5_000 {
            wanted.extend((8..12).flat_map(|t| [t; 20]));
        }
        if now % 100 == 0 {
            for (_, since, tenant, work) in &running {
                if now - since >= 200 {
                    let waited = if is_busy || !is_modest(*tenant) { 0.95 } else { 0.1 };
                    s.note_cores(work, OnCores { wanted: 1.0, waited, gives_way: !is_modest(*tenant) });
                }
            }
        }
        let (over, rest) = running.into_iter().partition::<Vec<_>, _>(|(until, ..)| *until <= now);
        running = rest;
        for (_, _, tenant, grant) in over {
            s.complete(ms(now), grant);
            done += u32::from(is_modest(tenant) && now >= 9_000);
        }
        for tenant in std::mem::take(&mut wanted) {
            match s.submit(ms(now), TenantId(tenant), Class::Rpc, FAR) {
                Submitted::Granted(grant) => running.push((now + takes(tenant), now, tenant, grant)),
                Submitted::Queued(ticket) => drop(waiting.insert(ticket, tenant)),
                Submitted::Rejected(_) => {}
            }
        }
        while let Some((ticket, grant)) = s.next_grant(ms(now)) {
            let tenant = waiting.remove(&ticket).unwrap();
            running.push((now + takes(tenant), now, tenant, grant));
        }
    }
    assert!(running.iter().any(|work| !is_modest(work.2)), "what computes still runs");
    assert!(done >= 400, "{done} modest pieces of 480 are done in three seconds");
}

/// Whose work, of what class, and how many milliseconds of a core it needs.
type Needs = (TenantId, Class, f64);

/// A machine whose cores are shared evenly by all that computes, each piece looked at from 200 ms on and at its end.
struct Shared {
    scheduler: Scheduler,
    cores: f64,
    /// What each piece still needs of what it needed, and since when it runs.
    running: Vec<(f64, Needs, u64, Grant)>,
    waiting: HashMap<Ticket, Needs>,
    done: HashMap<(TenantId, Class), u32>,
    now: u64,
}

impl Shared {
    fn new(cores: u32, slots: u32, tenants: u32) -> Self {
        let config =
            GateConfig { cores: Some(cores), expensive_from: Duration::from_millis(200), ..GateConfig::slots(slots) };
        let mut scheduler = Scheduler::new(config);
        (0..tenants).for_each(|t| scheduler.register(TenantId(t), Share::default()));
        let (running, waiting, done) = (Vec::new(), HashMap::new(), HashMap::new());
        Self { scheduler, cores: f64::from(cores), running, waiting, done, now: 0 }
    }

    fn wants(&mut self, tenant: u32, class: Class, needs: f64) {
        let piece = (TenantId(tenant), class, needs);
        match self.scheduler.submit(ms(self.now), piece.0, class, FAR) {
            Submitted::Granted(grant) => self.running.push((needs, piece, self.now, grant)),
            Submitted::Queued(ticket) => drop(self.waiting.insert(ticket, piece)),
            Submitted::Rejected(rejection) => panic!("{rejection}"),
        }
    }

    /// Passes a millisecond, after which whatever is done comes again, and the last tenant has modest work each 100 ms.
    fn pass(&mut self, last: u32) {
        self.now += 1;
        self.scheduler.advance(ms(self.now));
        let part = (self.cores / self.running.len().max(1) as f64).min(1.0);
        let seen = OnCores { wanted: 1.0, waited: 1.0 - part as f32, gives_way: true };
        if self.now.is_multiple_of(100) {
            if let Some(modest) = self.scheduler.try_start(ms(self.now), TenantId(last), Class::Interactive) {
                self.scheduler.complete(ms(self.now), modest);
            }
            for (_, _, since, work) in &self.running {
                if self.now - since >= 200 {
                    self.scheduler.note_cores(work, seen);
                }
            }
        }
        self.running.iter_mut().for_each(|work| work.0 -= part);
        let (over, rest) = std::mem::take(&mut self.running).into_iter().partition::<Vec<_>, _>(|work| work.0 <= 0.0);
        self.running = rest;
        for (_, (tenant, class, needs), _, work) in over {
            self.scheduler.note_cores(&work, seen);
            self.scheduler.complete(ms(self.now), work);
            *self.done.entry((tenant, class)).or_default() += 1;
            self.wants(tenant.0, class, needs);
        }
        while let Some((ticket, grant)) = self.scheduler.next_grant(ms(self.now)) {
            let piece = self.waiting.remove(&ticket).unwrap();
            self.running.push((piece.2, piece, self.now, grant));
        }
    }
}

/// What a tenant of sixty clients had let in as its only work, before it was known to have more, counts as a storm's as soon as it lasts,
/// and so does what comes of it later: that all of it waits for cores makes it no cheaper than it is.
#[test]
fn what_waits_for_cores_because_of_its_own_storm_stays_in_it() {
    let mut machine = Shared::new(2, 40, 2);
    (0..60).for_each(|_| machine.wants(0, Class::Rpc, 50.0));
    let mut most = 0;
    for now in 0..20_000 {
        machine.pass(1);
        most = most.max(if now >= 5_000 { machine.running.len() } else { 0 });
    }
    assert!(most <= 12, "{most} pieces at once, of which four to a core are let in");
    let done = machine.done[&(A, Class::Rpc)];
    assert!(done >= 700, "{done} of 800 that two cores can do in that time");
}

/// Storms of four tenants last longer than short work may, all of them waiting for cores. That is no expensive work, behind which a report would
/// have to wait.
#[test]
fn a_report_does_not_wait_for_the_end_of_storms() {
    let mut machine = Shared::new(2, 40, 6);
    (0..4).for_each(|tenant| (0..20).for_each(|_| machine.wants(tenant, Class::Rpc, 120.0)));
    (0..20_000).for_each(|_| machine.pass(5));
    let report = (TenantId(4), Class::Report);
    machine.wants(4, Class::Report, 300.0);
    (0..40_000).for_each(|_| machine.pass(5));
    let done = machine.done.get(&report).copied().unwrap_or_default();
    assert!(done >= 10, "{done} reports of 300 ms are done in 40 s");
    assert!(machine.running.len() < 30, "{} pieces at once", machine.running.len());
}

/// Whatever else the machine does, what lasts leaves slots for modest work.
#[test]
fn what_lasts_leaves_slots_for_modest_work() {
    // Each of ten tenants' pieces gets hardly anything of a core.
    let mut machine = Shared::new(2, 12, 11);
    machine.cores = 0.2;
    machine.pass(10);
    (0..10).for_each(|tenant| (0..20).for_each(|_| machine.wants(tenant, Class::Rpc, 50.0)));
    (0..20_000).for_each(|_| machine.pass(10));
    for second in 0..60 {
        (0..1_000).for_each(|_| machine.pass(10));
        let now = ms(machine.now);
        let modest = machine.scheduler.try_start(now, TenantId(10), Class::Interactive);
        let modest =
            modest.unwrap_or_else(|| panic!("{} pieces at once after another {second} s", machine.running.len()));
        machine.scheduler.complete(now, modest);
    }
}
