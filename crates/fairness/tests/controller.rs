//! What once went wrong with the number of slots, as sentences. Deterministic: simulated time, seeded work.
#![allow(clippy::unwrap_used, clippy::panic, unused_must_use)]

mod common;

use std::collections::HashMap;
use std::time::Duration;

use cofferdam_fairness::*;
use cofferdam_tenant::TenantId;
use common::{A, B, FAR, R, ms};

struct Rng(u64);
impl Rng {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }
    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// Like t4, but the others come first and A a second later: A gets nothing until they have used what it used.
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
    let mut t = 0;
    while t < 600_000 {
        t += 100;
        s.advance(ms(t));
    }
    for g in long {
        s.complete(ms(t), g);
    }
    let mut owner: HashMap<Ticket, TenantId> = HashMap::new();
    let mut running = Vec::new();
    let mut served = [0u32; 3];
    let put = |s: &mut Scheduler, running: &mut Vec<(TenantId, Grant)>, owner: &mut HashMap<_, _>, t: u64, who| match s
        .submit(ms(t), who, Class::Rpc, FAR)
    {
        Submitted::Granted(g) => running.push((who, g)),
        Submitted::Queued(k) => drop(owner.insert(k, who)),
        Submitted::Rejected(r) => panic!("{r}"),
    };
    t += 60_000;
    for who in [B, R] {
        (0..30).for_each(|_| put(&mut s, &mut running, &mut owner, t, who));
    }
    let (begin, end) = (t, t + 300_000);
    while t < end {
        t += 100;
        if t == begin + 1_000 {
            (0..30).for_each(|_| put(&mut s, &mut running, &mut owner, t, A));
        }
        for (who, g) in std::mem::take(&mut running) {
            s.complete(ms(t), g);
            served[who.0 as usize] += 1;
            put(&mut s, &mut running, &mut owner, t, who);
        }
        while let Some((k, g)) = s.next_grant(ms(t)) {
            running.push((owner.remove(&k).unwrap(), g));
        }
    }
    assert!(served[0] * 3 >= served[1], "served in the five minutes after: {served:?}");
}

/// Work that sleeps, of which one tenant always has 100 pieces waiting; how many slots are open every two minutes for
/// an hour. After a quiet time it takes `longer` times as long as before, whatever the concurrency.
fn timeline(seed: u64, longer: f64) -> Vec<u32> {
    let config = GateConfig { least_slots: 4, expensive_from: Duration::from_millis(500), ..GateConfig::slots(40) };
    let mut s = Scheduler::new(config);
    s.register(A, Share { queue: 10_000, ..Share::default() });
    s.register(B, Share::default());
    let (mut rng, mut t, mut trace) = (Rng(seed), 1_000u64, Vec::new());
    let mut draw = |mean: f64| (((mean * (0.7 * rng.normal()).exp()) * 1000.0) as u64).max(1);
    for _ in 0..200 {
        let Submitted::Granted(g) = s.submit(ms(t), A, Class::Rpc, FAR) else { panic!() };
        t += draw(2.0);
        s.complete(ms(t), g);
    }
    let (begin, end, mut owed, mut running) = (t, t + 3_600_000, 100, Vec::<(u64, Grant)>::new());
    while t < end {
        t += 50;
        if (t - begin) % 120_000 == 0 {
            trace.push(s.usage().open_slots);
        }
        let (done, going) = std::mem::take(&mut running).into_iter().partition::<Vec<_>, _>(|(end, _)| *end <= t);
        running = going;
        for (_, g) in done {
            s.complete(ms(t), g);
            owed += 1;
        }
        for _ in 0..std::mem::take(&mut owed) {
            if let Submitted::Granted(g) = s.submit(ms(t), A, Class::Rpc, FAR) {
                running.push((t + draw(2.0 * longer), g));
            }
        }
        while let Some((_, g)) = s.next_grant(ms(t)) {
            running.push((t + draw(2.0 * longer), g));
        }
    }
    trace
}

#[test]
fn noise_does_not_keep_work_that_sleeps_from_its_slots() {
    for seed in [7, 8, 9] {
        for longer in [1.0, 2.0, 3.0] {
            let trace = timeline(seed, longer);
            let open = f64::from(trace.iter().sum::<u32>()) / trace.len() as f64;
            assert!(open > 15.0, "seed {seed}, {longer} times as long: {open:.1} slots on average, {trace:?}");
        }
    }
}

/// Four cores shared by what runs. 200 tenants, more work than fits. The gateway has just been started.
#[test]
fn a_start_under_load_does_not_open_every_slot_of_a_server_that_computes() {
    let mut s = Scheduler::new(GateConfig { least_slots: 8, ..GateConfig::slots(80) });
    for t in 0..200 {
        s.register(TenantId(t), Share::default());
    }
    let mut rng = Rng(3);
    let mut running: Vec<(f64, Grant)> = Vec::new();
    let mut levels = Vec::new();
    let mut due = 0.0f64;
    let mut worst = 0;
    for tick in 0..120_000u64 {
        let t = 1_000 + tick; // 1 ms
        let speed = (4.0 / running.len().max(1) as f64).min(1.0) * 0.001;
        let mut i = 0;
        while i < running.len() {
            running[i].0 -= speed;
            if running[i].0 <= 0.0 {
                let (_, g) = running.swap_remove(i);
                s.complete(ms(t), g);
            } else {
                i += 1;
            }
        }
        due += 0.130; // 130 requests a second of 40 ms: 5.2 cores
        while due >= 1.0 {
            due -= 1.0;
            let who = TenantId((rng.uniform() * 200.0) as u32);
            if let Submitted::Granted(g) = s.submit(ms(t), who, Class::Rpc, ms(t + 5_000)) {
                running.push((0.04 * (0.3 * rng.normal()).exp(), g));
            }
        }
        while s.next_rejected(ms(t)).is_some() {}
        while let Some((_, g)) = s.next_grant(ms(t)) {
            running.push((0.04 * (0.3 * rng.normal()).exp(), g));
        }
        if tick % 2_000 == 0 {
            levels.push(s.usage().open_slots);
            worst = worst.max(s.usage().open_slots);
        }
    }
    assert!(worst <= 24, "{levels:?}, inflation now {:.2}", s.usage().inflation);
}

/// GateConfig with least_slots 0 (only a documented bound of the library's callers).
#[test]
fn least_slots_of_zero_does_not_panic() {
    let mut s = Scheduler::new(GateConfig { least_slots: 0, expensive_slots: 10, ..GateConfig::slots(10) });
    s.register(A, Share::default());
    s.register(B, Share::default());
    let mut running = Vec::new();
    for t in 0..4_000u64 {
        for g in running.drain(..) {
            s.complete(ms(1_000 + t * 10), g);
        }
        for _ in 0..3 {
            if let Submitted::Granted(g) = s.submit(ms(1_000 + t * 10), A, Class::Rpc, ms(1_000 + t * 10 + 100)) {
                running.push(g);
            }
        }
        while s.next_rejected(ms(1_000 + t * 10)).is_some() {}
        while let Some((_, g)) = s.next_grant(ms(1_000 + t * 10)) {
            running.push(g);
        }
    }
}

/// Abuse: always one more report waiting than the class limit allows makes a tenant's other work go first for ever.
#[test]
fn squeezed_or_throttled_for_ten_minutes_is_no_credit() {
    let mut s = Scheduler::new(GateConfig::slots(8));
    s.register(A, Share { queue: 10_000, ..Share::default() });
    s.register(B, Share { queue: 10_000, ..Share::default() });
    s.squeeze(B, Some(1));
    let mut owner: HashMap<Ticket, TenantId> = HashMap::new();
    let mut running: Vec<(TenantId, Grant)> = Vec::new();
    let put = |s: &mut Scheduler, running: &mut Vec<(TenantId, Grant)>, owner: &mut HashMap<_, _>, t: u64, who| match s
        .submit(ms(t), who, Class::Rpc, FAR)
    {
        Submitted::Granted(g) => running.push((who, g)),
        Submitted::Queued(k) => drop(owner.insert(k, who)),
        Submitted::Rejected(r) => panic!("{r}"),
    };
    for _ in 0..40 {
        put(&mut s, &mut running, &mut owner, 1_000, A);
        put(&mut s, &mut running, &mut owner, 1_000, B);
    }
    let mut served = [0u32; 2];
    for tick in 0..6_600u64 {
        let t = 1_100 + tick * 100;
        if tick == 6_000 {
            s.squeeze(B, None);
            served = [0; 2];
        }
        for (who, g) in std::mem::take(&mut running) {
            s.complete(ms(t), g);
            served[who.0 as usize] += 1;
            put(&mut s, &mut running, &mut owner, t, who);
        }
        while let Some((k, g)) = s.next_grant(ms(t)) {
            running.push((owner.remove(&k).unwrap(), g));
        }
    }
    assert!(served[0] * 3 >= served[1], "in the minute after the squeeze was lifted: {served:?}");
}

#[test]
fn fifo_is_first_come_first_served_with_class_limits_too() {
    let mut s = Scheduler::new(GateConfig { policy: Policy::Fifo, ..GateConfig::slots(2) });
    let mut classes = [ClassShare::default(); Class::ALL.len()];
    classes[Class::Background as usize].limit = 1;
    s.register(A, Share { classes, ..Share::default() });
    let Submitted::Granted(one) = s.submit(ms(0), A, Class::Background, FAR) else { panic!() };
    let Submitted::Granted(_two) = s.submit(ms(0), A, Class::Background, FAR) else { panic!() };
    let Submitted::Queued(_first) = s.submit(ms(0), A, Class::Background, FAR) else { panic!() };
    s.complete(ms(10), one);
    assert!(
        s.next_grant(ms(10)).is_some() || matches!(s.submit(ms(11), A, Class::Background, FAR), Submitted::Queued(_)),
        "a slot is free, the first in line does not get it, and a newcomer does"
    );
}

/// Work that takes as long as it takes, whatever runs beside it, and not twice the same: there is no inflation, and no reason to close slots.
#[test]
fn times_that_only_vary_close_no_slots() {
    for (tenants, skew) in [(1, 2.0), (3, 1.0)] {
        let mut open: Vec<f64> = (0..5).map(|seed| open_slots(tenants, skew, seed)).collect();
        open.sort_by(f64::total_cmp);
        assert!(open[2] > 36.0 && open[0] > 30.0, "{tenants} tenants: {open:.0?} of 40 slots are open");
    }
}

/// How many of 40 slots are open in the second minute beside 60 clients of each tenant, with pieces of 60 ms times the power of what is
/// exponentially distributed.
fn open_slots(tenants: u32, skew: f64, seed: u64) -> f64 {
    let mut rng = Rng(seed);
    let mut s = Scheduler::new(GateConfig { least_slots: 4, ..GateConfig::slots(40) });
    (0..=tenants).for_each(|t| s.register(TenantId(t), Share::default()));
    let mut takes = || (60.0 * (-rng.uniform().ln()).powf(skew)).clamp(1.0, 2_000.0) as u64;
    let (mut running, mut waiting) = (Vec::new(), HashMap::new());
    let mut wanted: Vec<u32> = (0..tenants).flat_map(|t| [t; 60]).collect();
    let mut open = 0;
    for now in 0..120_000 {
        if now % 10 == 0 {
            s.advance(ms(now));
        }
        let (over, rest) = running.into_iter().partition::<Vec<(u64, u32, Grant)>, _>(|(until, ..)| *until <= now);
        running = rest;
        for (_, tenant, grant) in over {
            s.complete(ms(now), grant);
            wanted.push(tenant);
        }
        for tenant in std::mem::take(&mut wanted) {
            match s.submit(ms(now), TenantId(tenant), Class::Rpc, FAR) {
                Submitted::Granted(grant) => running.push((now + takes(), tenant, grant)),
                Submitted::Queued(ticket) => drop(waiting.insert(ticket, tenant)),
                Submitted::Rejected(r) => panic!("{r}"),
            }
        }
        while let Some((ticket, grant)) = s.next_grant(ms(now)) {
            running.push((now + takes(), waiting.remove(&ticket).unwrap(), grant));
        }
        if now >= 60_000 {
            open += s.usage().open_slots;
        }
    }
    f64::from(open) / 60_000.0
}
