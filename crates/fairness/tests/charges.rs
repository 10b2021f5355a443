//! What is charged to a tenant's virtual time: seconds of work, and not those in which it waited for a core.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::HashMap;

use cofferdam_fairness::*;
use cofferdam_tenant::TenantId;
use common::{A, B, FAR, R, ms};

/// Pieces of work of one tenant: how long each takes with all its waits, and for what part of that it waits for a core.
#[derive(Clone, Copy)]
struct Piece {
    takes: u64,
    waited: f32,
}

/// Tenants that always have twenty pieces waiting, on a gate of 20 slots and so many cores, beside R's modest work.
struct Loops<'a> {
    scheduler: Scheduler,
    piece: &'a dyn Fn(TenantId) -> Piece,
    running: Vec<(u64, TenantId, Grant)>,
    owners: HashMap<Ticket, TenantId>,
    done: HashMap<TenantId, u32>,
    now: u64,
    is_looked_at: bool,
}

impl<'a> Loops<'a> {
    fn new(cores: u32, piece: &'a dyn Fn(TenantId) -> Piece) -> Self {
        let mut scheduler = Scheduler::new(GateConfig { cores: Some(cores), ..GateConfig::slots(20) });
        for tenant in [A, B, R] {
            scheduler.register(tenant, Share::default());
        }
        let (running, owners, done) = Default::default();
        Self { scheduler, piece, running, owners, done, now: 1_000, is_looked_at: true }
    }

    fn wants(&mut self, tenant: TenantId, n: usize) {
        for _ in 0..n {
            match self.scheduler.submit(ms(self.now), tenant, Class::Rpc, FAR) {
                Submitted::Granted(grant) => self.begins(tenant, grant),
                Submitted::Queued(ticket) => {
                    self.owners.insert(ticket, tenant);
                }
                Submitted::Rejected(rejection) => panic!("{rejection}"),
            }
        }
    }

    fn begins(&mut self, tenant: TenantId, grant: Grant) {
        let takes = (self.piece)(tenant).takes;
        self.running.push((self.now + takes, tenant, grant));
    }

    /// Time passes. What runs is looked at every 100 ms and at its end, R has a millisecond's work every 200 ms.
    fn run(&mut self, for_ms: u64, has_modest: bool) {
        for _ in 0..for_ms {
            self.now += 1;
            self.scheduler.advance(ms(self.now));
            let (over, running) =
                std::mem::take(&mut self.running).into_iter().partition::<Vec<_>, _>(|(ends, ..)| *ends <= self.now);
            self.running = running;
            if self.now.is_multiple_of(100) {
                let running = std::mem::take(&mut self.running);
                for (_, tenant, grant) in &running {
                    self.look(*tenant, grant);
                }
                self.running = running;
            }
            for (_, tenant, grant) in over {
                self.look(tenant, &grant);
                self.scheduler.complete(ms(self.now), grant);
                *self.done.entry(tenant).or_default() += 1;
                self.wants(tenant, 1);
            }
            while let Some((ticket, grant)) = self.scheduler.next_grant(ms(self.now)) {
                let tenant = self.owners.remove(&ticket).unwrap();
                self.begins(tenant, grant);
            }
            if has_modest
                && self.now.is_multiple_of(200)
                && let Some(grant) = self.scheduler.try_start(ms(self.now), R, Class::Interactive)
            {
                self.scheduler.complete(ms(self.now), grant);
            }
        }
    }

    fn look(&mut self, tenant: TenantId, grant: &Grant) {
        if self.is_looked_at {
            let seen = OnCores { wanted: 1.0, waited: (self.piece)(tenant).waited, gives_way: true };
            self.scheduler.note_cores(grant, seen);
        }
    }

    /// What A has had done for each piece of B's since the last time this was asked.
    fn ratio(&mut self) -> f64 {
        let mut done = |tenant| f64::from(self.done.insert(tenant, 0).unwrap_or_default());
        done(A) / done(B)
    }
}

/// The operating system gives one tenant's processes a core sooner than another's: a piece of the same work takes three times as long
/// there. Both get as much done.
#[test]
fn who_waits_longer_for_a_core_gets_as_much_done() {
    for takes in [10, 30, 400] {
        let piece = |tenant| {
            if tenant == A { Piece { takes, waited: 0.0 } } else { Piece { takes: 3 * takes, waited: 2.0 / 3.0 } }
        };
        let mut loops = Loops::new(2, &piece);
        loops.wants(A, 20);
        loops.wants(B, 20);
        loops.run(10_000, true);
        loops.ratio();
        loops.run(20_000, true);
        let ratio = loops.ratio();
        assert!((ratio - 1.0).abs() < 0.05, "pieces of {takes} ms: A gets {ratio:.2} times what B gets");
    }
}

/// Where nobody has modest work slots are what everybody waits for, and who holds one is charged for it, whatever it does there.
#[test]
fn where_slots_are_waited_for_who_holds_one_pays_for_it() {
    let piece = |tenant| if tenant == A { Piece { takes: 40, waited: 0.9 } } else { Piece { takes: 40, waited: 0.0 } };
    let mut loops = Loops::new(2, &piece);
    loops.wants(A, 40);
    loops.wants(B, 40);
    loops.run(20_000, false);
    loops.ratio();
    loops.run(20_000, false);
    let ratio = loops.ratio();
    assert!((ratio - 1.0).abs() < 0.05, "A gets {ratio:.2} times what B gets");
}

/// Before it is known that it computes, whoever comes first holds nearly all slots while all of that waits for cores. It had no
/// more of the cores for that, and does not repay the slots.
#[test]
fn slots_in_which_all_waited_for_cores_are_not_repaid() {
    let piece = |_| Piece { takes: 400, waited: 0.0 };
    let onset = |_| Piece { takes: 4_000, waited: 0.9 };
    let mut loops = Loops::new(2, &onset);
    loops.is_looked_at = false;
    loops.run(1_000, true);
    loops.wants(A, 40);
    loops.run(1_000, true);
    let held = loops.running.len();
    assert!(held > 10, "A holds {held} slots");
    loops.is_looked_at = true;
    loops.run(100, true);
    loops.wants(B, 20);
    loops.run(3_000, true);
    loops.ratio();
    loops.piece = &piece;
    loops.run(6_000, true);
    let ratio = loops.ratio();
    assert!((0.6..1.6).contains(&ratio), "A gets {ratio:.2} times what B gets");
}
