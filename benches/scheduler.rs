//! What one decision of the scheduler costs, by number of tenants; and a slot through the gate.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use cofferdam_fairness::{Class, Gate, GateConfig, MonotonicClock, Scheduler, Share, Submitted, Timestamp};
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

criterion_group!(benches, decision, gate);
criterion_main!(benches);
