//! What one decision of the scheduler costs, by number of tenants; and a slot through the gate.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use cofferdam_fairness::{
    Class, Gate, GateConfig, Ledger, LedgerConfig, MonotonicClock, Pressure, Scheduler, Share, Submitted, Timestamp,
};
use cofferdam_tenant::TenantId;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

/// Every tenant has work waiting; one piece of work ends, the next is chosen, another is submitted.
fn decision(c: &mut Criterion) {
    let mut group = c.benchmark_group("decision with every tenant waiting");
    for tenants in [10u32, 1_000, 10_000, 100_000] {
        let mut scheduler = Scheduler::new(GateConfig::slots(16));
        let far = Timestamp::from_millis(u64::MAX / 2_000_000);
        let mut running = Vec::new();
        let mut now = 0;
        for tenant in 0..tenants {
            scheduler.register(TenantId(tenant), Share::default());
            for _ in 0..2 {
                if let Submitted::Granted(grant) =
                    scheduler.submit(Timestamp::default(), TenantId(tenant), Class::Rpc, far)
                {
                    running.push(grant);
                }
            }
        }
        let mut next = 0;
        group.bench_function(BenchmarkId::from_parameter(tenants), |b| {
            b.iter(|| {
                now += 10_000;
                let at = Timestamp::from_nanos(now);
                scheduler.complete(at, running.swap_remove(0));
                if let Some((_, grant)) = scheduler.next_grant(at) {
                    running.push(grant);
                }
                next = (next + 7) % tenants;
                black_box(scheduler.submit(at, TenantId(next), Class::Rpc, far));
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

criterion_group!(benches, decision, gate, hand_over, ledger);
criterion_main!(benches);
