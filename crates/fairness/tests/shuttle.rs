//! The hand-over of slots between tasks, under every schedule that a model checker tries.
//!
//! Run with `cargo test -p cofferdam-fairness --features shuttle --test shuttle`.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;
use std::time::Duration;

use cofferdam_fairness::{Class, Clock, Gate, GateConfig, Share, Timestamp};
use cofferdam_tenant::TenantId;
use shuttle::future::{self, block_on};

const PATIENCE: Duration = Duration::from_secs(60);
const SCHEDULES: usize = 3_000;

/// Time stands still: what is checked is who wakes whom.
struct Still;

impl Clock for Still {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_000)
    }
}

fn gate(slots: u32) -> Arc<Gate> {
    let gate = Gate::new(GateConfig { overdraft: 0, ..GateConfig::slots(slots) }, Arc::new(Still));
    gate.register((0..3).map(|t| (TenantId(t), Share::default())));
    gate
}

fn check(body: impl Fn() + Send + Sync + 'static) {
    shuttle::check_pct(body, SCHEDULES, 3);
}

#[test]
fn every_waiter_is_woken_and_no_slot_is_held_twice() {
    check(|| {
        let gate = gate(2);
        let running = Arc::new(AtomicU32::new(0));
        let tasks: Vec<_> = (0..5)
            .map(|n| {
                let (gate, running) = (Arc::clone(&gate), Arc::clone(&running));
                future::spawn(async move {
                    let permit = gate.acquire(TenantId(n % 3), Class::Rpc, PATIENCE).await.unwrap();
                    assert!(running.fetch_add(1, Ordering::SeqCst) < 2, "more slots than there are");
                    future::yield_now().await;
                    running.fetch_sub(1, Ordering::SeqCst);
                    drop(permit);
                })
            })
            .collect();
        for task in tasks {
            block_on(task).unwrap();
        }
        let usage = gate.usage();
        assert_eq!((usage.running, usage.waiting), (0, 0));
    });
}

#[test]
fn a_wait_that_is_dropped_while_its_slot_is_handed_over_passes_it_on() {
    check(|| {
        let gate = gate(1);
        let held = block_on(gate.acquire(TenantId(0), Class::Rpc, PATIENCE)).unwrap();
        let impatient = {
            let gate = Arc::clone(&gate);
            future::spawn(async move {
                let mut wait = Box::pin(gate.acquire(TenantId(1), Class::Rpc, PATIENCE));
                // Asked for once or twice, and then dropped, whatever has become of it.
                std::future::poll_fn(|cx| {
                    let _ = Future::poll(wait.as_mut(), cx);
                    Poll::Ready(())
                })
                .await;
                future::yield_now().await;
                drop(wait);
            })
        };
        let patient = {
            let gate = Arc::clone(&gate);
            future::spawn(async move { drop(gate.acquire(TenantId(2), Class::Rpc, PATIENCE).await.unwrap()) })
        };
        drop(held);
        block_on(impatient).unwrap();
        block_on(patient).unwrap();
        let usage = gate.usage();
        assert_eq!((usage.running, usage.waiting), (0, 0));
    });
}

#[test]
fn giving_up_at_the_last_moment_takes_the_slot_or_leaves_it_to_others() {
    check(|| {
        let gate = gate(1);
        let held = block_on(gate.acquire(TenantId(0), Class::Rpc, PATIENCE)).unwrap();
        let late = {
            let gate = Arc::clone(&gate);
            future::spawn(async move {
                let mut wait = gate.acquire(TenantId(1), Class::Rpc, PATIENCE);
                let first =
                    std::future::poll_fn(|cx| Poll::Ready(Future::poll(std::pin::Pin::new(&mut wait), cx))).await;
                future::yield_now().await;
                match first {
                    Poll::Ready(outcome) => drop(outcome),
                    Poll::Pending => drop(wait.give_up()),
                }
            })
        };
        drop(held);
        block_on(late).unwrap();
        drop(block_on(gate.acquire(TenantId(2), Class::Rpc, PATIENCE)).unwrap());
        assert_eq!(gate.usage().running, 0);
    });
}

#[test]
fn a_gate_that_grows_wakes_who_waits() {
    check(|| {
        let gate = gate(1);
        let held = block_on(gate.acquire(TenantId(0), Class::Rpc, PATIENCE)).unwrap();
        let waiting = {
            let gate = Arc::clone(&gate);
            future::spawn(async move { drop(gate.acquire(TenantId(1), Class::Rpc, PATIENCE).await.unwrap()) })
        };
        gate.configure(GateConfig::slots(4));
        block_on(waiting).unwrap();
        drop(held);
    });
}
