//! What one decision of the scheduler costs, by number of tenants; and a slot through the gate.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use cofferdam_fairness::{
    Class, Gate, GateConfig, Grant, Ledger, LedgerConfig, MonotonicClock, Pressure, Scheduler, Share, Submitted,
    Timestamp,
};
use cofferdam_tenant::TenantId;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

const TENANTS: [u32; 4] = [10, 1_000, 10_000, 100_000];
const SLOTS: u32 = 16;
const FAR: Timestamp = Timestamp::from_millis(u64::MAX / 2_000_000);

/// A scheduler with all slots in use, and two pieces of work of every tenant, most of which wait.
fn busy(tenants: u32) -> (Scheduler, Vec<Grant>) {
    let mut scheduler = Scheduler::new(GateConfig::slots(SLOTS));
    let mut running = Vec::new();
    for tenant in 0..tenants {
        scheduler.register(TenantId(tenant), Share::default());
        for _ in 0..2 {
            let submitted = scheduler.submit(Timestamp::default(), TenantId(tenant), Class::Rpc, FAR);
            if let Submitted::Granted(grant) = submitted {
                running.push(grant);
            }
        }
    }
    (scheduler, running)
}

/// Slots are free and every tenant has work waiting: who gets one?
fn decision(c: &mut Criterion) {
    let mut group = c.benchmark_group("decision with every tenant waiting");
    for tenants in TENANTS {
        let (mut scheduler, mut running) = busy(tenants);
        let (mut now, mut next) = (0, 0);
        group.bench_function(BenchmarkId::from_parameter(tenants), |b| {
            b.iter_custom(|wanted| {
                let (mut spent, mut made) = (Duration::ZERO, 0);
                while made < wanted {
                    now += 10_000;
                    let at = Timestamp::from_nanos(now);
                    let free = running.len();
                    running.drain(..).for_each(|grant| scheduler.complete(at, grant));
                    let begun = Instant::now();
                    while let Some((_, grant)) = scheduler.next_grant(at) {
                        running.push(grant);
                    }
                    spent += begun.elapsed();
                    assert!(!running.is_empty(), "nobody waits");
                    made += running.len() as u64;
                    for _ in 0..free.max(running.len()) {
                        next = (next + 7) % tenants;
                        black_box(scheduler.submit(at, TenantId(next), Class::Rpc, FAR));
                    }
                }
                spent.mul_f64(wanted as f64 / made as f64)
            });
        });
    }
    group.finish();
}

/// The same with all that belongs to it: one piece of work ends, the next is chosen, another is submitted.
fn turn(c: &mut Criterion) {
    let mut group = c.benchmark_group("an end, a decision and a submission");
    for tenants in TENANTS {
        let (mut scheduler, mut running) = busy(tenants);
        let (mut now, mut next) = (0, 0);
        group.bench_function(BenchmarkId::from_parameter(tenants), |b| {
            b.iter(|| {
                now += 10_000;
                let at = Timestamp::from_nanos(now);
                scheduler.complete(at, running.swap_remove(0));
                if let Some((_, grant)) = scheduler.next_grant(at) {
                    running.push(grant);
                }
                next = (next + 7) % tenants;
                black_box(scheduler.submit(at, TenantId(next), Class::Rpc, FAR));
            });
        });
    }
    group.finish();
}

/// Nobody waits: what every transaction pays.
fn gate(c: &mut Criterion) {
    let gate = Gate::new(GateConfig::slots(16), Arc::new(MonotonicClock::since(Instant::now())));
    c.bench_function("a free slot through the gate", |b| {
        b.iter(|| black_box(gate.try_acquire(TenantId(1), Class::Rpc)));
    });
}

/// A slot that somebody waits for: asked for by one, given back by the other, handed over and woken.
fn hand_over(c: &mut Criterion) {
    let gate = Gate::new(GateConfig::slots(1), Arc::new(MonotonicClock::since(Instant::now())));
    gate.register((0..2).map(|t| (TenantId(t), Share::default())));
    let mut context = Context::from_waker(Waker::noop());
    let mut held = gate.try_acquire(TenantId(0), Class::Rpc);
    let mut tenant = 0;
    c.bench_function("a slot handed to one who waits", |b| {
        b.iter(|| {
            tenant = 1 - tenant;
            let mut wait = Box::pin(gate.acquire(TenantId(tenant), Class::Rpc, Duration::from_secs(3_600)));
            assert!(wait.as_mut().poll(&mut context).is_pending());
            drop(held.take());
            if let Poll::Ready(Ok(permit)) = wait.as_mut().poll(&mut context) {
                held = Some(permit);
            }
        });
    });
}

/// What the coupling of the planes costs, ten times a second: tenants whose database work waits, all of them squeezed.
fn ledger(c: &mut Criterion) {
    let mut group = c.benchmark_group("ledger update, tenants that wait");
    for tenants in [10u32, 1_000, 10_000] {
        let waiting: Vec<Pressure> = (0..tenants)
            .map(|t| Pressure { tenant: TenantId(t), running: 1, waiting: 3, oldest_wait: Duration::from_millis(200) })
            .collect();
        let mut ledger = Ledger::new(LedgerConfig::default());
        let mut now = 0;
        group.bench_function(BenchmarkId::from_parameter(tenants), |b| {
            b.iter(|| {
                now += 100;
                black_box(ledger.observe(Timestamp::from_millis(now), &waiting, |_| 8))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decision, turn, gate, hand_over, ledger);
criterion_main!(benches);
