//! What must hold of the scheduler whatever is asked of it, and in whatever order.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::time::Duration;

use cofferdam_fairness::{Class, GateConfig, Grant, OnCores, Scheduler, Share, Submitted, Ticket, Timestamp};
use cofferdam_tenant::TenantId;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    Submit { tenant: u32, class: usize, patience_ms: u64 },
    Complete { which: usize },
    Cancel { which: usize },
    Pass { ms: u64 },
    Slots { n: u32 },
    Nested { tenant: u32, patience_ms: u64 },
    Squeeze { tenant: u32, limit: Option<u32> },
    Leave { tenant: u32 },
    Measure { which: usize, cores: f32 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u32..5, 0usize..8, 1u64..2_000)
            .prop_map(|(tenant, class, patience_ms)| Step::Submit { tenant, class, patience_ms }),
        5 => (0usize..64).prop_map(|which| Step::Complete { which }),
        1 => (0usize..64).prop_map(|which| Step::Cancel { which }),
        4 => (1u64..400).prop_map(|ms| Step::Pass { ms }),
        1 => (3u32..9).prop_map(|n| Step::Slots { n }),
        1 => (0u32..5, 1u64..2_000).prop_map(|(tenant, patience_ms)| Step::Nested { tenant, patience_ms }),
        1 => (0u32..5, proptest::option::of(1u32..4)).prop_map(|(tenant, limit)| Step::Squeeze { tenant, limit }),
        1 => (0u32..5).prop_map(|tenant| Step::Leave { tenant }),
        2 => (0usize..64, 0.0f32..1.2).prop_map(|(which, cores)| Step::Measure { which, cores }),
    ]
}

struct Model {
    scheduler: Scheduler,
    now: Timestamp,
    running: Vec<(TenantId, Grant)>,
    waiting: HashMap<Ticket, (TenantId, Timestamp)>,
    shares: Vec<Share>,
    slots: u32,
    least: u32,
    overdraft: u32,
    cores: Option<u32>,
    virtual_time: f64,
}

impl Model {
    fn new(shares: Vec<Share>) -> Self {
        Self::with(shares, 4, 0, None)
    }

    fn with(shares: Vec<Share>, least: u32, overdraft: u32, cores: Option<u32>) -> Self {
        let config = GateConfig { least_slots: least, overdraft, cores, ..GateConfig::slots(4) };
        let mut scheduler = Scheduler::new(config);
        for (i, share) in shares.iter().enumerate() {
            scheduler.register(TenantId(i as u32), *share);
        }
        Self {
            scheduler,
            now: Timestamp::from_millis(0),
            running: Vec::new(),
            waiting: HashMap::new(),
            shares,
            slots: 4,
            least,
            overdraft,
            cores,
            virtual_time: 0.0,
        }
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Submit { tenant, class, patience_ms } => {
                let tenant = TenantId(tenant);
                let deadline = self.now + Duration::from_millis(patience_ms);
                let class = Class::ALL[class];
                match self.scheduler.submit(self.now, tenant, class, deadline) {
                    Submitted::Granted(grant) => self.running.push((tenant, grant)),
                    Submitted::Queued(ticket) => {
                        self.waiting.insert(ticket, (tenant, deadline));
                    }
                    Submitted::Rejected(_) => {}
                }
            }
            Step::Complete { which } if !self.running.is_empty() => {
                let (_, grant) = self.running.swap_remove(which % self.running.len());
                self.scheduler.complete(self.now, grant);
            }
            Step::Cancel { which } if !self.waiting.is_empty() => {
                let mut tickets: Vec<Ticket> = self.waiting.keys().copied().collect();
                tickets.sort();
                let ticket = tickets[which % tickets.len()];
                assert!(self.scheduler.cancel(ticket));
                self.waiting.remove(&ticket);
            }
            Step::Pass { ms } => self.now = self.now + Duration::from_millis(ms),
            Step::Slots { n } => {
                self.slots = n;
                let (least_slots, overdraft, cores) = (self.least, self.overdraft, self.cores);
                self.scheduler.configure(GateConfig { least_slots, overdraft, cores, ..GateConfig::slots(n) });
            }
            Step::Nested { tenant, patience_ms } => {
                let tenant = TenantId(tenant);
                let deadline = self.now + Duration::from_millis(patience_ms);
                match self.scheduler.submit_nested(self.now, tenant, Class::Rpc, deadline) {
                    Submitted::Granted(grant) => self.running.push((tenant, grant)),
                    Submitted::Queued(ticket) => {
                        self.waiting.insert(ticket, (tenant, deadline));
                    }
                    Submitted::Rejected(_) => {}
                }
            }
            Step::Squeeze { tenant, limit } => self.scheduler.squeeze(TenantId(tenant), limit),
            Step::Leave { tenant } => {
                // It comes back with the next reload.
                self.scheduler.unregister(TenantId(tenant));
                self.scheduler.register(TenantId(tenant), self.shares[tenant as usize]);
            }
            Step::Measure { which, cores } if !self.running.is_empty() => {
                let (_, grant) = &self.running[which % self.running.len()];
                self.scheduler
                    .note_cores(grant, OnCores { wanted: cores, waited: cores / 2.0, gives_way: cores > 0.4 });
            }
            Step::Complete { .. } | Step::Cancel { .. } | Step::Measure { .. } => {}
        }
        self.drain();
        self.check();
    }

    fn drain(&mut self) {
        while let Some((ticket, rejection)) = self.scheduler.next_rejected(self.now) {
            let (tenant, deadline) = self.waiting.remove(&ticket).unwrap();
            assert!(deadline <= self.now);
            assert_eq!(rejection.tenant, tenant);
        }
        let mut before = self.scheduler.usage().running;
        while let Some((ticket, grant)) = self.scheduler.next_grant(self.now) {
            let (tenant, _) = self.waiting.remove(&ticket).unwrap();
            self.running.push((tenant, grant));
            let usage = self.scheduler.usage();
            // When slots were taken away, what runs goes on; but no more comes.
            let is_there = usage.running == before || usage.running <= self.slots + self.overdraft;
            assert!(is_there, "a slot was granted that does not exist");
            before = usage.running;
            assert!(usage.nested <= self.overdraft, "more nested than the overdraft");
        }
    }

    fn check(&mut self) {
        let usage = self.scheduler.usage();
        assert_eq!((usage.running + usage.nested) as usize, self.running.len());
        assert_eq!(usage.waiting as usize, self.waiting.len());
        let mut held = [0u32; 5];
        for (tenant, _) in &self.running {
            held[tenant.0 as usize] += 1;
        }
        for (i, share) in self.shares.iter().enumerate() {
            let mine = self.scheduler.tenant_usage(self.now, TenantId(i as u32));
            assert_eq!(mine.running + mine.nested, held[i]);
            assert!(mine.running <= share.limit, "above its limit");
            assert!(mine.nested <= self.overdraft);
            // Nested work may wait beside the queue, one for each slot.
            assert!(mine.waiting <= share.queue.saturating_add(share.limit), "more waiting than the queue holds");
        }
        // Nobody is left waiting past the deadline, and nobody below a reservation waits while a slot is free for
        // short work.
        assert!(self.waiting.values().all(|(_, deadline)| *deadline > self.now));
        assert!(self.scheduler.virtual_time() >= self.virtual_time, "virtual time went back");
        self.virtual_time = self.scheduler.virtual_time();
    }
}

fn shares() -> impl Strategy<Value = Vec<Share>> {
    proptest::collection::vec((1u32..5, 0u32..2, 1u32..6, 0u32..6), 5).prop_map(|shares| {
        shares
            .into_iter()
            .enumerate()
            // Two of them may have a slot reserved: less than the three that there are at least.
            .map(|(i, (weight, reserved, limit, queue))| Share {
                weight,
                reserved: if i < 2 { reserved } else { 0 },
                limit,
                queue,
                ..Share::default()
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn slots_limits_queues_and_deadlines_hold_in_every_order_of_events(
        shares in shares(),
        least in 1u32..5,
        overdraft in 0u32..3,
        cores in proptest::option::of(1u32..3),
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let mut model = Model::with(shares, least, overdraft, cores);
        for step in steps {
            model.run(step);
        }
        // Everything given back: nothing runs, and who waits is served or expires.
        while let Some((_, grant)) = model.running.pop() {
            model.scheduler.complete(model.now, grant);
            model.drain();
        }
        model.now = model.now + Duration::from_secs(3600);
        model.drain();
        while let Some((_, grant)) = model.running.pop() {
            model.scheduler.complete(model.now, grant);
        }
        prop_assert_eq!(model.scheduler.usage().running, 0);
        prop_assert_eq!(model.scheduler.usage().waiting, 0);
        prop_assert_eq!(model.scheduler.usage().expensive, 0);
        prop_assert!(model.scheduler.usage().busy_cores.abs() < 1e-9);
    }

    /// Whatever has happened: when everything that runs ends in time, everything that waits is served. No limit,
    /// reservation, lane, trust, squeeze, number of slots or of cores keeps anybody waiting for ever.
    #[test]
    fn nobody_starves(
        shares in shares(),
        least in 1u32..5,
        overdraft in 0u32..3,
        cores in proptest::option::of(1u32..3),
        steps in proptest::collection::vec(step(), 1..120),
        classes in proptest::collection::vec(0usize..8, 5),
    ) {
        let shares: Vec<Share> = shares.into_iter().map(|s| Share { queue: 1_000, ..s }).collect();
        let mut model = Model::with(shares, least, overdraft, cores);
        for step in steps {
            model.run(step);
        }
        let far = model.now + Duration::from_secs(100_000);
        let mut owed = Vec::new();
        for (tenant, class) in classes.into_iter().enumerate() {
            for _ in 0..3 {
                let tenant = TenantId(tenant as u32);
                match model.scheduler.submit(model.now, tenant, Class::ALL[class], far) {
                    Submitted::Granted(grant) => model.running.push((tenant, grant)),
                    Submitted::Queued(ticket) => {
                        model.waiting.insert(ticket, (tenant, far));
                        owed.push(ticket);
                    }
                    Submitted::Rejected(r) => prop_assert!(false, "{r}"),
                }
            }
        }
        for round in 0..900 {
            model.now = model.now + Duration::from_millis(150);
            // Some tenants' work computes, more or less, and the fifth has modest work now and then.
            for (tenant, grant) in &model.running {
                let wanted = [1.0, 0.5, 0.3, 0.0, 0.0][tenant.0 as usize];
                model.scheduler.note_cores(grant, OnCores { wanted, waited: 0.0, gives_way: tenant.0 == 1 });
            }
            if round % 30 == 0
                && let Some(grant) = model.scheduler.try_start(model.now, TenantId(4), Class::Interactive)
            {
                model.scheduler.complete(model.now, grant);
            }
            // Never all at once.
            let older = model.running.len().div_ceil(2);
            for (_, grant) in model.running.drain(..older) {
                model.scheduler.complete(model.now, grant);
            }
            model.scheduler.advance(model.now);
            model.drain();
        }
        let left = owed.iter().filter(|t| model.waiting.contains_key(t)).count();
        prop_assert_eq!(left, 0, "still waiting: {:?} {:?}", model.scheduler.usage(), model.scheduler.pressures(model.now));
    }

    #[test]
    fn a_reservation_is_there_at_once_whatever_the_others_do(steps in proptest::collection::vec(step(), 1..100)) {
        let mut shares = vec![Share::default(); 5];
        shares[4].reserved = 2;
        let mut model = Model::new(shares);
        for step in steps {
            // Tenant 4 stays away; the others do what they like.
            match step {
                Step::Submit { tenant: 4, .. }
                | Step::Nested { tenant: 4, .. }
                | Step::Squeeze { tenant: 4, .. }
                | Step::Leave { tenant: 4 }
                | Step::Slots { .. } => {}
                step => model.run(step),
            }
        }
        let deadline = model.now + Duration::from_secs(1);
        for _ in 0..2 {
            let answer = model.scheduler.submit(model.now, TenantId(4), Class::Interactive, deadline);
            if let Submitted::Queued(ticket) = answer {
                model.waiting.insert(ticket, (TenantId(4), deadline));
                model.drain();
                prop_assert!(!model.waiting.contains_key(&ticket), "reserved slot was not free");
            }
        }
    }
}

/// Runs backlogged tenants for a while on one simulated gate and returns their slot-seconds.
fn backlogged(weights: &[u32], cost_ms: &[u64], slots: u32, seconds: u64) -> Vec<f64> {
    let mut scheduler = Scheduler::new(GateConfig { expensive_slots: slots, ..GateConfig::slots(slots) });
    for (i, weight) in weights.iter().enumerate() {
        scheduler.register(TenantId(i as u32), Share { weight: *weight, ..Share::default() });
    }
    let mut now = Timestamp::default();
    let end = now + Duration::from_secs(seconds);
    let mut running: Vec<(Timestamp, usize, Grant)> = Vec::new();
    let mut owners: HashMap<Ticket, usize> = HashMap::new();
    let far = now + Duration::from_secs(3600);
    let start = |now: Timestamp, who: usize| now + Duration::from_millis(cost_ms[who]);
    for who in 0..weights.len() {
        for _ in 0..slots * 2 {
            match scheduler.submit(now, TenantId(who as u32), Class::Rpc, far) {
                Submitted::Granted(g) => running.push((start(now, who), who, g)),
                Submitted::Queued(t) => {
                    owners.insert(t, who);
                }
                Submitted::Rejected(r) => panic!("{r}"),
            }
        }
    }
    while now < end {
        let next = running.iter().enumerate().min_by_key(|(_, (t, ..))| *t).map(|(i, _)| i).unwrap();
        let (at, who, grant) = running.swap_remove(next);
        now = at;
        scheduler.complete(now, grant);
        if let Submitted::Queued(t) = scheduler.submit(now, TenantId(who as u32), Class::Rpc, far) {
            owners.insert(t, who);
        }
        while let Some((ticket, grant)) = scheduler.next_grant(now) {
            let who = owners.remove(&ticket).unwrap();
            running.push((start(now, who), who, grant));
        }
    }
    (0..weights.len()).map(|i| scheduler.tenant_usage(now, TenantId(i as u32)).used.0).collect()
}

#[test]
fn equal_backlogged_tenants_get_equal_seconds_although_one_sends_work_forty_times_as_long() {
    let used = backlogged(&[1, 1, 1], &[10, 10, 400], 4, 30);
    let (min, max) = (used.iter().copied().fold(f64::MAX, f64::min), used.iter().copied().fold(0.0, f64::max));
    assert!(min / max >= 0.95, "{used:?}");
}

#[test]
fn weights_divide_the_slots_in_their_proportion() {
    let used = backlogged(&[1, 2, 4], &[20, 20, 20], 7, 30);
    for (i, weight) in [1.0, 2.0, 4.0].into_iter().enumerate() {
        let share = used[i] / used.iter().sum::<f64>();
        assert!((share / (weight / 7.0) - 1.0).abs() < 0.05, "{used:?}");
    }
}

#[test]
fn expensive_work_never_takes_the_slots_that_are_kept_for_short_work() {
    let mut scheduler = Scheduler::new(GateConfig::slots(4));
    let now = Timestamp::default();
    let far = now + Duration::from_secs(60);
    let mut granted = 0;
    for tenant in 0..10 {
        if let Submitted::Granted(_grant) = scheduler.submit(now, TenantId(tenant), Class::Report, far) {
            granted += 1;
        }
    }
    assert_eq!(granted, 3);
    let short = scheduler.submit(now, TenantId(99), Class::Interactive, far);
    assert!(matches!(short, Submitted::Granted(_)), "the last slot was not open to short work");
}

/// A tenant that always has a little running, but nothing waiting, saves nothing up for later.
#[test]
fn a_tenant_that_is_never_quite_idle_earns_no_credit() {
    let mut scheduler = Scheduler::new(GateConfig::slots(4));
    let (quiet, busy) = (TenantId(0), TenantId(1));
    let far = Timestamp::from_millis(3_600_000);
    let mut now = Timestamp::default();
    let start = |scheduler: &mut Scheduler, now, tenant| match scheduler.submit(now, tenant, Class::Rpc, far) {
        Submitted::Granted(grant) => grant,
        other => panic!("{other:?}"),
    };
    let mut quiet_work = start(&mut scheduler, now, quiet);
    let mut busy_work: Vec<Grant> = (0..2).map(|_| start(&mut scheduler, now, busy)).collect();
    for _ in 0..20_000 {
        now = now + Duration::from_millis(10);
        // The next begins before the last has ended: the tenant is never idle.
        let next = start(&mut scheduler, now, quiet);
        scheduler.complete(now, std::mem::replace(&mut quiet_work, next));
        for grant in busy_work.drain(..) {
            scheduler.complete(now, grant);
        }
        busy_work.extend((0..2).map(|_| start(&mut scheduler, now, busy)));
    }
    // Now both want everything.
    let mut running: std::collections::VecDeque<Grant> = busy_work.into_iter().chain([quiet_work]).collect();
    let mut owners = HashMap::new();
    for tenant in (0..150).flat_map(|_| [quiet, busy]) {
        match scheduler.submit(now, tenant, Class::Rpc, far) {
            Submitted::Queued(ticket) => drop(owners.insert(ticket, tenant)),
            Submitted::Granted(grant) => running.push_back(grant),
            Submitted::Rejected(rejection) => panic!("{rejection}"),
        }
    }
    let mut granted = [0, 0];
    for _ in 0..100 {
        now = now + Duration::from_millis(3);
        scheduler.complete(now, running.pop_front().unwrap());
        while let Some((ticket, grant)) = scheduler.next_grant(now) {
            granted[owners.remove(&ticket).unwrap().0 as usize] += 1;
            running.push_back(grant);
        }
    }
    assert!(granted[1] >= 40, "the busy tenant was starved: {granted:?}");
}
