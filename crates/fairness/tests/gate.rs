//! The asynchronous gate loses no slot, whatever is cancelled when.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_fairness::{Class, Gate, GateConfig, MonotonicClock, Reason, Share};
use cofferdam_tenant::TenantId;

const LONG: Duration = Duration::from_secs(600);

fn gate(slots: u32) -> Arc<Gate> {
    Gate::new(GateConfig::slots(slots), Arc::new(MonotonicClock::since(Instant::now())))
}

#[tokio::test]
async fn a_dropped_permit_goes_to_the_one_who_waits() {
    let gate = gate(1);
    let first = gate.acquire(TenantId(0), Class::Rpc, LONG).await.unwrap();
    let waiter = tokio::spawn(gate.acquire(TenantId(1), Class::Rpc, LONG));
    while gate.usage().waiting == 0 {
        tokio::task::yield_now().await;
    }
    drop(first);
    let second = waiter.await.unwrap().unwrap();
    assert_eq!(second.tenant(), TenantId(1));
    drop(second);
    assert_eq!(gate.usage().running, 0);
}

#[tokio::test]
async fn a_cancelled_waiter_returns_its_slot_even_after_the_hand_over() {
    let gate = gate(1);
    let first = gate.acquire(TenantId(0), Class::Rpc, LONG).await.unwrap();
    let mut waiter = Box::pin(gate.acquire(TenantId(1), Class::Rpc, LONG));
    assert!(futures_poll(waiter.as_mut()).is_none());
    drop(first); // hands the slot to the waiter, which never looks again
    assert_eq!(gate.usage().running, 1);
    drop(waiter);
    assert_eq!(gate.usage().running, 0);
}

#[tokio::test]
async fn giving_up_says_whether_the_own_limit_or_the_gate_was_in_the_way() {
    let gate = gate(2);
    gate.register([(TenantId(0), Share { limit: 1, ..Share::default() })]);
    let _held = gate.acquire(TenantId(0), Class::Rpc, LONG).await.unwrap();
    let mut own = Box::pin(gate.acquire(TenantId(0), Class::Rpc, Duration::from_millis(1)));
    assert!(futures_poll(own.as_mut()).is_none());
    assert_eq!(std::pin::Pin::into_inner(own).give_up().unwrap_err().reason, Reason::TenantLimit { limit: 1 });

    let _other = gate.acquire(TenantId(1), Class::Rpc, LONG).await.unwrap();
    let mut busy = Box::pin(gate.acquire(TenantId(2), Class::Rpc, Duration::from_millis(1)));
    assert!(futures_poll(busy.as_mut()).is_none());
    let rejection = std::pin::Pin::into_inner(busy).give_up().unwrap_err();
    assert_eq!(rejection.reason, Reason::GateBusy { slots: 2 });
    assert!(!rejection.is_own_quota());
    assert_eq!(gate.usage().waiting, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn under_random_cancellation_no_permit_is_lost_and_none_is_made() {
    let gate = gate(3);
    let mut tasks = Vec::new();
    for task in 0..64u32 {
        let gate = Arc::clone(&gate);
        tasks.push(tokio::spawn(async move {
            let mut seed = u64::from(task) + 1;
            for _ in 0..300 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let patience = Duration::from_micros(seed >> 33 & 0x3ff);
                let acquire = gate.acquire(TenantId(task % 7), Class::Rpc, LONG);
                if let Ok(Ok(permit)) = tokio::time::timeout(patience, acquire).await {
                    assert!(gate.usage().running <= 3);
                    if seed & 1 == 0 {
                        tokio::task::yield_now().await;
                    }
                    drop(permit);
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let usage = gate.usage();
    assert_eq!((usage.running, usage.waiting, usage.expensive), (0, 0, 0));
    // All three slots are still there.
    let permits: Vec<_> = (0..3).map(|i| gate.try_acquire(TenantId(i), Class::Rpc)).collect();
    assert!(permits.iter().all(Option::is_some));
    assert!(gate.try_acquire(TenantId(9), Class::Rpc).is_none());
}

fn futures_poll<F: Future>(future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.poll(&mut context) {
        std::task::Poll::Ready(out) => Some(out),
        std::task::Poll::Pending => None,
    }
}
