//! What once went wrong between tenants, as sentences.
#![allow(clippy::unwrap_used, clippy::panic, unused_must_use)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use cofferdam_fairness::*;
use cofferdam_tenant::TenantId;
use common::{A, B, FAR, R, ms};

/// Submits `n` short pieces; the granted ones are completed 10 ms later; then the gate ticks for ten minutes.
fn served_of_a_burst(mut s: Scheduler, n: u32) -> (u32, Usage) {
    let (mut served, mut running) = (0, Vec::new());
    for _ in 0..n {
        if let Submitted::Granted(g) = s.submit(ms(1_000), A, Class::Rpc, FAR) {
            running.push(g);
        }
    }
    for tick in 0..12_000 {
        let now = ms(1_010 + tick * 50);
        for g in running.drain(..) {
            served += 1;
            s.complete(now, g);
        }
        s.advance(now);
        while let Some((_, g)) = s.next_grant(now) {
            running.push(g);
        }
    }
    (served, s.usage())
}

#[test]
fn a_burst_is_served_on_an_idle_gate_beside_an_idle_reservation() {
    let mut s = Scheduler::new(GateConfig { expensive_slots: 8, ..GateConfig::slots(16) });
    s.register(A, Share::default());
    s.register(R, Share { reserved: 8, ..Share::default() });
    let (served, usage) = served_of_a_burst(s, 10);
    assert_eq!(served, 10, "{usage:?}");
}

#[test]
fn the_same_with_default_expensive_slots_and_min_slots_8_reserved_2() {
    let mut s = Scheduler::new(GateConfig { least_slots: 8, ..GateConfig::slots(40) });
    s.register(A, Share::default());
    s.register(R, Share { reserved: 2, ..Share::default() });
    let (served, usage) = served_of_a_burst(s, 10);
    assert_eq!(served, 10, "{usage:?}");
}

#[test]
fn reservations_of_as_much_as_min_slots_leave_something_for_the_others() {
    let mut s = Scheduler::new(GateConfig { least_slots: 4, ..GateConfig::slots(40) });
    s.register(A, Share::default());
    s.register(R, Share { reserved: 4, ..Share::default() });
    let (served, usage) = served_of_a_burst(s, 1);
    assert_eq!(served, 1, "{usage:?}");
}

/// B keeps one more Background piece than its class limit of 1 allows, for ten minutes; A uses the gate.
#[test]
fn waiting_for_ones_own_class_limit_earns_no_credit() {
    let mut s = Scheduler::new(GateConfig::slots(8));
    s.register(A, Share { queue: 10_000, ..Share::default() });
    let mut classes = [ClassShare::default(); Class::ALL.len()];
    classes[Class::Background as usize].limit = 1;
    s.register(B, Share { classes, queue: 10_000, ..Share::default() });
    let step = 100u64;
    let mut running: Vec<(TenantId, Class, u64, Grant)> = Vec::new();
    let mut owner: HashMap<Ticket, (TenantId, Class)> = HashMap::new();
    let mut granted = [0u32; 2];
    let put = |s: &mut Scheduler, running: &mut Vec<_>, owner: &mut HashMap<_, _>, t: u64, who, class| match s.submit(
        ms(t),
        who,
        class,
        FAR,
    ) {
        Submitted::Granted(g) => running.push((who, class, t, g)),
        Submitted::Queued(k) => drop(owner.insert(k, (who, class))),
        Submitted::Rejected(r) => panic!("{r}"),
    };
    // one long background piece that sleeps for the whole time, and one that waits behind it
    let mut t = 1_000;
    put(&mut s, &mut running, &mut owner, t, B, Class::Background);
    put(&mut s, &mut running, &mut owner, t, B, Class::Background);
    for _ in 0..40 {
        put(&mut s, &mut running, &mut owner, t, A, Class::Rpc);
    }
    let end_of_idle = t + 600_000;
    let end = end_of_idle + 60_000;
    let mut stormed = false;
    while t < end {
        t += step;
        if t >= end_of_idle && !stormed {
            stormed = true;
            for _ in 0..40 {
                put(&mut s, &mut running, &mut owner, t, B, Class::Rpc);
            }
        }
        let mut again = Vec::new();
        let mut i = 0;
        while i < running.len() {
            if running[i].1 == Class::Rpc && t >= running[i].2 + step {
                let (who, class, _, g) = running.swap_remove(i);
                s.complete(ms(t), g);
                again.push((who, class));
            } else {
                i += 1;
            }
        }
        for (who, class) in again {
            if stormed {
                granted[who.0 as usize] += 1;
            }
            put(&mut s, &mut running, &mut owner, t, who, class);
        }
        while let Some((k, g)) = s.next_grant(ms(t)) {
            let (who, class) = owner.remove(&k).unwrap();
            running.push((who, class, t, g));
        }
    }
    assert!(
        granted[0] * 3 >= granted[1],
        "in the minute after, A was served {} times and B {} times",
        granted[0],
        granted[1]
    );
}

/// A alone runs twenty ten-minute pieces on an otherwise idle gate. Then B and C come with as much work as they can.
#[test]
fn who_used_an_idle_gate_is_not_locked_out_afterwards() {
    let mut s = Scheduler::new(GateConfig::slots(20));
    for t in [A, B, R] {
        s.register(t, Share { queue: 10_000, ..Share::default() });
    }
    let mut long = Vec::new();
    for _ in 0..15 {
        if let Submitted::Granted(g) = s.submit(ms(0), A, Class::Report, FAR) {
            long.push(g);
        }
    }
    assert!(long.len() >= 10, "{}", long.len());
    let mut t = 0;
    while t < 600_000 {
        t += 100;
        s.advance(ms(t));
    }
    for g in long {
        s.complete(ms(t), g);
    }
    // All idle now. A minute later all three have work waiting, always.
    t += 60_000;
    let mut owner: HashMap<Ticket, TenantId> = HashMap::new();
    let mut running = Vec::new();
    let mut served = [0u32; 3];
    for _ in 0..30 {
        for who in [A, B, R] {
            match s.submit(ms(t), who, Class::Rpc, FAR) {
                Submitted::Granted(g) => running.push((who, g)),
                Submitted::Queued(k) => drop(owner.insert(k, who)),
                Submitted::Rejected(r) => panic!("{r}"),
            }
        }
    }
    let end = t + 60_000;
    while t < end {
        t += 100;
        let done = std::mem::take(&mut running);
        for (who, g) in done {
            s.complete(ms(t), g);
            served[who.0 as usize] += 1;
            match s.submit(ms(t), who, Class::Rpc, FAR) {
                Submitted::Granted(g) => running.push((who, g)),
                Submitted::Queued(k) => drop(owner.insert(k, who)),
                Submitted::Rejected(r) => panic!("{r}"),
            }
        }
        while let Some((k, g)) = s.next_grant(ms(t)) {
            running.push((owner.remove(&k).unwrap(), g));
        }
    }
    assert!(served[0] * 3 >= served[1], "served in the minute after: {served:?}");
}

/// the overdraft is full for a moment when nested work is asked for; afterwards it is empty, but nobody looks.
#[test]
fn nested_work_that_had_to_wait_uses_the_overdraft_as_soon_as_there_is_room() {
    let mut s = Scheduler::new(GateConfig { overdraft: 1, ..GateConfig::slots(8) });
    s.register(A, Share { limit: 1, ..Share::default() });
    s.register(B, Share::default());
    let (Submitted::Granted(_outer_a), Submitted::Granted(outer_b)) =
        (s.submit(ms(0), A, Class::Rpc, FAR), s.submit(ms(0), B, Class::Rpc, FAR))
    else {
        panic!()
    };
    let Submitted::Granted(nested_b) = s.submit_nested(ms(0), B, Class::Rpc, FAR) else { panic!() };
    let Submitted::Queued(_nested_a) = s.submit_nested(ms(1), A, Class::Rpc, FAR) else { panic!() };
    s.complete(ms(2), nested_b);
    s.complete(ms(2), outer_b);
    let mut granted = false;
    for t in 0..600 {
        s.advance(ms(3 + t * 50));
        granted |= s.next_grant(ms(3 + t * 50)).is_some();
    }
    assert!(granted, "A waits for itself until its deadline; {:?}", s.usage());
}

/// with one transaction kept open, everything else goes as nested, whatever rate, budget and class limit say.
#[test]
fn nested_work_does_not_escape_rate_budget_class_limit_and_squeeze() {
    let mut s = Scheduler::new(GateConfig { overdraft: 20, ..GateConfig::slots(20) });
    let mut classes = [ClassShare::default(); Class::ALL.len()];
    classes[Class::Background as usize].limit = 1;
    s.register(
        A,
        Share {
            rate: Some(Rate::per_second(1, 1)),
            work: Some(Allowance { per_second: 10, burst: 10 }),
            classes,
            ..Share::default()
        },
    );
    let Submitted::Granted(_open) = s.submit(ms(0), A, Class::Background, FAR) else { panic!() };
    let mut n = 0;
    for i in 1..=1000 {
        if let Submitted::Granted(g) = s.submit_nested(ms(i * 10), A, Class::Background, FAR) {
            n += 1;
            s.complete(ms(i * 10 + 10), g);
        }
    }
    assert!(n <= 20, "{n} transactions in 10 s with a rate of 1/s; {:?}", s.tenant_usage(ms(10_020), A));
}

/// one tenant holds the whole overdraft; another one's nested work is refused the way out.
#[test]
fn one_tenant_does_not_take_the_whole_overdraft() {
    let mut s = Scheduler::new(GateConfig { overdraft: 5, ..GateConfig::slots(12) });
    s.register(A, Share::default());
    s.register(B, Share { limit: 1, ..Share::default() });
    for _ in 0..5 {
        s.submit(ms(0), A, Class::Rpc, FAR);
    }
    let Submitted::Granted(_b) = s.submit(ms(0), B, Class::Rpc, FAR) else { panic!() };
    for _ in 0..5 {
        s.submit_nested(ms(0), A, Class::Rpc, FAR);
    }
    assert!(matches!(s.submit_nested(ms(0), B, Class::Rpc, FAR), Submitted::Granted(_)), "{:?}", s.usage());
}

#[test]
fn a_tenant_that_leaves_is_not_freed_of_its_limit() {
    let mut s = Scheduler::new(GateConfig::slots(16));
    s.register(A, Share { limit: 1, ..Share::default() });
    for t in 1..4 {
        s.register(TenantId(t), Share::default());
    }
    // Trust from earlier work.
    for i in 0..50 {
        let Submitted::Granted(g) = s.submit(ms(i * 10), A, Class::Rpc, FAR) else { panic!() };
        s.complete(ms(i * 10 + 5), g);
    }
    for _ in 0..30 {
        s.submit(ms(500), A, Class::Rpc, FAR);
    }
    assert!(s.next_grant(ms(501)).is_none());
    s.unregister(A);
    let mut n = 0;
    while s.next_grant(ms(502)).is_some() {
        n += 1;
    }
    assert!(n <= 1, "{n} more at once by being removed from the catalog");
}

/// waiting background transactions squeeze the tenant's web requests, which do not wait for anything.
#[test]
fn background_work_at_its_own_class_limit_does_not_take_the_web_workers_away() {
    let mut db = Scheduler::new(GateConfig::slots(20));
    let mut classes = [ClassShare::default(); Class::ALL.len()];
    classes[Class::Background as usize].limit = 1;
    db.register(A, Share { classes, ..Share::default() });
    db.register(B, Share::default());
    db.submit(ms(0), A, Class::Background, FAR); // pg_dump, an hour
    db.submit(ms(0), A, Class::Background, FAR); // a cron job that waits for it
    let mut ledger = Ledger::new(LedgerConfig::default());
    let mut limit = None;
    for i in 1..600 {
        let now = ms(i * 100);
        // The web work's transactions are granted at once and take 5 ms: none waits, ever.
        let Submitted::Granted(g) = db.submit(now, A, Class::Rpc, FAR) else { panic!("waited") };
        db.complete(now + Duration::from_millis(5), g);
        for v in ledger.observe(now, &db.pressures(now), |_| 15) {
            limit = v.limit;
        }
    }
    assert!(
        limit.is_none_or(|l| l >= 15),
        "web requests are limited to {limit:?} although no transaction of theirs waited"
    );
}

struct At(std::sync::atomic::AtomicU64);
impl Clock for At {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.0.load(std::sync::atomic::Ordering::Relaxed))
    }
}

/// try_acquire sheds a waiter, tells nobody, and a rejection for a dropped future stays in the map.
#[test]
fn try_acquire_sheds_nobody() {
    let gate = Gate::new(GateConfig { queue: 1, ..GateConfig::slots(1) }, Arc::new(At(1_000.into())));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let mut a = Box::pin(gate.acquire(A, Class::Rpc, Duration::from_secs(60)));
    let std::task::Poll::Ready(Ok(_permit)) = Future::poll(a.as_mut(), &mut cx) else { panic!() };
    let mut waiter = Box::pin(gate.acquire(A, Class::Rpc, Duration::from_secs(60)));
    assert!(Future::poll(waiter.as_mut(), &mut cx).is_pending());
    assert_eq!(gate.usage().waiting, 1);
    assert!(gate.try_acquire(B, Class::Rpc).is_none());
    assert_eq!(gate.usage().waiting, 1, "the waiter has lost its place to a try that did not even queue");
}

/// a work budget that a reload brings bills what ran before it.
#[test]
fn a_budget_begins_when_it_is_given() {
    let mut s = Scheduler::new(GateConfig::slots(4));
    s.register(A, Share::default());
    let Submitted::Granted(_g) = s.submit(ms(0), A, Class::Report, FAR) else { panic!() };
    for t in 0..36_000 {
        s.advance(ms(t * 100));
    }
    let now = ms(3_600_000);
    s.register(A, Share { work: Some(Allowance { per_second: 500, burst: 5_000 }), ..Share::default() });
    s.advance(ms(3_600_100));
    let balance = s.tenant_usage(now, A).work_balance.unwrap();
    assert!(balance > 0.0, "in debt by {:.0} s of budget time at once", -balance / 500.0);
}

/// five tenants, each with plenty of short work: how many of 40 slots are used when few are open to expensive work?
#[test]
fn short_work_uses_the_slots_that_expensive_work_may_not() {
    let mut s = Scheduler::new(GateConfig { expensive_slots: 4, ..GateConfig::slots(40) });
    for t in 0..5 {
        s.register(TenantId(t), Share::default());
    }
    let (mut running, mut most) = (Vec::new(), 0);
    for _ in 0..30 {
        for t in 0..5 {
            if let Submitted::Granted(g) = s.submit(ms(0), TenantId(t), Class::Rpc, FAR) {
                running.push(g);
            }
        }
    }
    for t in 1..50 {
        most = most.max(running.len());
        for g in running.drain(..) {
            s.complete(ms(t * 10), g);
        }
        while let Some((_, g)) = s.next_grant(ms(t * 10)) {
            running.push(g);
        }
        if t == 5 {
            break;
        }
    }
    assert!(most >= 20, "{most} of 40 slots in use at most, {:?}", s.usage());
}

/// A tenant that is always below its reservation goes first whatever it has used. Its time must not become everybody's:
/// who comes next would stand behind all who are there already.
#[test]
fn who_goes_first_for_its_reservation_does_not_set_the_clock_for_newcomers() {
    let mut s = Scheduler::new(GateConfig::slots(20));
    s.register(R, Share { reserved: 8, queue: 10_000, ..Share::default() });
    s.register(A, Share::default());
    for t in 10..30 {
        s.register(TenantId(t), Share { queue: 10_000, ..Share::default() });
    }
    let mut running: Vec<(u64, TenantId, Grant)> = Vec::new();
    let mut owner: HashMap<Ticket, TenantId> = HashMap::new();
    let mut again: Vec<TenantId> = (0..8).map(|_| R).chain((10..30).flat_map(|t| [TenantId(t); 3])).collect();
    let mut newcomer = None;
    let (mut served, mut t) = (false, 1_000);
    while t < 120_000 && !served {
        t += 100;
        if t == 61_000 {
            newcomer = Some(s.submit(ms(t), A, Class::Report, FAR));
        }
        let (done, going) = std::mem::take(&mut running).into_iter().partition::<Vec<_>, _>(|(end, ..)| *end <= t);
        running = going;
        for (_, who, grant) in done {
            s.complete(ms(t), grant);
            again.push(who);
        }
        for who in std::mem::take(&mut again) {
            match s.submit(ms(t), who, Class::Report, FAR) {
                Submitted::Granted(grant) => running.push((t + 2_000, who, grant)),
                Submitted::Queued(ticket) => drop(owner.insert(ticket, who)),
                Submitted::Rejected(r) => panic!("{r}"),
            }
        }
        while let Some((ticket, grant)) = s.next_grant(ms(t)) {
            match owner.remove(&ticket) {
                Some(who) => running.push((t + 2_000, who, grant)),
                None => served = newcomer == Some(Submitted::Queued(ticket)),
            }
        }
    }
    assert!(served && t < 70_000, "the newcomer came at 61 s and was served by {} s: {served}", t / 1_000);
}
