//! What is charged to whom where cores bound what computes: seconds of work, not of waiting, on a clock of its own.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::HashMap;

use cofferdam_fairness::*;
use cofferdam_tenant::TenantId;
use common::{A, B, FAR, R, ms};

/// One whose work sleeps.
const S: TenantId = TenantId(3);
/// One with reports that compute for long.
const L: TenantId = TenantId(4);

/// Pieces of work: how long each takes with all its waits, and for what part of that it wants and waits for a core.
#[derive(Clone, Copy)]
struct Piece {
    tenant: TenantId,
    class: Class,
    takes: u64,
    wanted: f32,
    waited: f32,
    /// It is looked at each 100 ms when it has lasted so long, and at its end.
    looked_at_after: u64,
    /// Whether another one comes when it is done.
    again: bool,
}

const fn computes(tenant: TenantId, takes: u64, waited: f32) -> Piece {
    Piece { tenant, class: Class::Rpc, takes, wanted: 1.0, waited, looked_at_after: 0, again: true }
}

const fn sleeps(tenant: TenantId, takes: u64) -> Piece {
    Piece { wanted: 0.0, ..computes(tenant, takes, 0.0) }
}

struct Running {
    since: u64,
    piece: Piece,
    grant: Grant,
}

/// Tenants with work on a gate with cores, beside R's modest work each 200 ms.
struct Loops {
    scheduler: Scheduler,
    running: Vec<Running>,
    waiting: HashMap<Ticket, Piece>,
    done: HashMap<TenantId, u32>,
    /// Seconds of a core that a tenant's pieces which are done had.
    computed: HashMap<TenantId, f64>,
    has_modest: bool,
    now: u64,
}

impl Loops {
    fn new(cores: u32, slots: u32) -> Self {
        let mut scheduler = Scheduler::new(GateConfig { cores: Some(cores), ..GateConfig::slots(slots) });
        for tenant in [A, B, R, S, L] {
            scheduler.register(tenant, Share::default());
        }
        Self {
            scheduler,
            running: Vec::new(),
            waiting: HashMap::new(),
            done: HashMap::new(),
            computed: HashMap::new(),
            has_modest: true,
            now: 1_000,
        }
    }

    fn wants(&mut self, piece: Piece, n: usize) {
        for _ in 0..n {
            match self.scheduler.submit(ms(self.now), piece.tenant, piece.class, FAR) {
                Submitted::Granted(grant) => self.running.push(Running { since: self.now, piece, grant }),
                Submitted::Queued(ticket) => {
                    self.waiting.insert(ticket, piece);
                }
                Submitted::Rejected(rejection) => panic!("{rejection}"),
            }
        }
    }

    fn look(&mut self, Running { since, piece, grant }: &Running) {
        if self.now - since >= piece.looked_at_after {
            let seen = OnCores { wanted: piece.wanted, waited: piece.waited, gives_way: true };
            self.scheduler.note_cores(grant, seen);
        }
    }

    fn run(&mut self, for_ms: u64) {
        for _ in 0..for_ms {
            self.now += 1;
            self.scheduler.advance(ms(self.now));
            let running = std::mem::take(&mut self.running);
            if self.now.is_multiple_of(100) {
                for work in &running {
                    self.look(work);
                }
            }
            let (over, running) =
                running.into_iter().partition::<Vec<_>, _>(|work| work.since + work.piece.takes <= self.now);
            self.running = running;
            for work in over {
                self.look(&work);
                let Running { piece, grant, .. } = work;
                self.scheduler.complete(ms(self.now), grant);
                *self.done.entry(piece.tenant).or_default() += 1;
                *self.computed.entry(piece.tenant).or_default() +=
                    piece.takes as f64 / 1e3 * f64::from(piece.wanted - piece.waited);
                self.wants(piece, usize::from(piece.again));
            }
            while let Some((ticket, grant)) = self.scheduler.next_grant(ms(self.now)) {
                let piece = self.waiting.remove(&ticket).unwrap();
                self.running.push(Running { since: self.now, piece, grant });
            }
            if self.has_modest
                && self.now.is_multiple_of(200)
                && let Some(grant) = self.scheduler.try_start(ms(self.now), R, Class::Interactive)
            {
                self.scheduler.complete(ms(self.now), grant);
            }
        }
    }

    /// What A has had done for each piece of B's since the last time this was asked.
    fn ratio(&mut self) -> f64 {
        let mut done = |tenant| f64::from(self.done.insert(tenant, 0).unwrap_or_default());
        done(A) / done(B)
    }

    fn running(&self, tenant: TenantId) -> usize {
        self.running.iter().filter(|work| work.piece.tenant == tenant).count()
    }
}

/// The operating system gives one tenant's processes a core sooner than another's: a piece of the same work takes three times as long
/// there. Both get as much done.
#[test]
fn who_waits_longer_for_a_core_gets_as_much_done() {
    for takes in [10, 30, 400] {
        let mut loops = Loops::new(2, 20);
        loops.wants(computes(A, takes, 0.0), 20);
        loops.wants(computes(B, 3 * takes, 2.0 / 3.0), 20);
        loops.run(10_000);
        loops.ratio();
        loops.run(20_000);
        let ratio = loops.ratio();
        assert!((ratio - 1.0).abs() < 0.05, "pieces of {takes} ms: A gets {ratio:.2} times what B gets");
    }
}

/// Where nobody has modest work slots are what everybody waits for, and who holds one is charged for it, whatever it does there.
#[test]
fn where_slots_are_waited_for_who_holds_one_pays_for_it() {
    let mut loops = Loops::new(2, 20);
    loops.has_modest = false;
    loops.wants(computes(A, 40, 0.9), 40);
    loops.wants(computes(B, 40, 0.0), 40);
    loops.run(20_000);
    loops.ratio();
    loops.run(20_000);
    let ratio = loops.ratio();
    assert!((ratio - 1.0).abs() < 0.05, "A gets {ratio:.2} times what B gets");
}

/// Before it is known that it computes, whoever comes first holds nearly all slots while all of that waits for cores. It had no
/// more of the cores for that, and does not repay the slots.
#[test]
fn slots_in_which_all_waited_for_cores_are_not_repaid() {
    let mut loops = Loops::new(2, 20);
    loops.run(1_000);
    let onset = Piece { looked_at_after: 1_000, ..computes(A, 4_000, 0.9) };
    loops.wants(onset, 40);
    loops.run(1_000);
    assert!(loops.running(A) > 10, "A holds {} slots", loops.running(A));
    loops.run(100);
    loops.wants(computes(B, 400, 0.0), 20);
    for piece in loops.waiting.values_mut() {
        *piece = computes(piece.tenant, 400, 0.0);
    }
    while loops.running.iter().any(|work| work.piece.takes > 400) {
        for work in &mut loops.running {
            work.piece.again = work.piece.takes <= 400;
        }
        loops.run(100);
    }
    loops.run(20_000);
    let (a, b) = (loops.computed[&A], loops.computed[&B]);
    assert!((a / b - 1.0).abs() < 0.1, "A has had {a:.1} s of the cores and B {b:.1} s");
}

/// The clock of the reports stands still while a long one is waited for; that of the storms goes on.
#[test]
fn who_waits_for_long_with_a_report_lets_no_newcomer_go_before_the_other_storms() {
    let mut loops = Loops::new(2, 20);
    let report = |tenant, takes| Piece { class: Class::Report, again: false, ..computes(tenant, takes, 0.0) };
    loops.wants(report(B, 1_000), 1);
    loops.run(2_000);
    loops.wants(report(L, 120_000), 4);
    loops.run(5_000);
    loops.wants(report(B, 1_000), 1);
    loops.wants(computes(A, 40, 0.0), 20);
    loops.run(60_000);
    assert_eq!(loops.waiting.values().filter(|piece| piece.class == Class::Report).count(), 1, "B's report waits");
    loops.wants(computes(S, 40, 0.0), 20);
    loops.run(1_000);
    loops.done.clear();
    loops.run(10_000);
    let (newcomer, other) = (loops.done[&S], loops.done[&A]);
    assert!(
        newcomer < other * 11 / 10 && other < newcomer * 11 / 10,
        "the newcomer gets {newcomer}, the other {other}"
    );
}

/// Where slots are what everybody waits for, whoever computes and has held few gets one, though another one who computes has held many
/// and is before it on the clock of the cores.
#[test]
fn nobody_waits_for_a_slot_behind_one_who_has_held_many() {
    let mut loops = Loops::new(8, 12);
    loops.wants(sleeps(S, 80), 60);
    loops.wants(computes(A, 80, 0.95), 20);
    loops.wants(computes(B, 80, 0.0), 20);
    loops.run(20_000);
    loops.done.clear();
    loops.run(20_000);
    let done = [A, B, S].map(|tenant| loops.done[&tenant]);
    let (least, most) = (done.iter().min().unwrap(), done.iter().max().unwrap());
    assert!(least * 11 >= most * 10, "pieces of 80 ms done: {done:?}");
}

/// Who has waited long for cores has no claim on the slots that others were given meanwhile.
#[test]
fn who_has_waited_for_cores_has_no_claim_on_slots() {
    let mut loops = Loops::new(2, 20);
    loops.wants(sleeps(S, 100), 60);
    loops.wants(computes(B, 400, 0.5), 20);
    loops.run(60_000);
    loops.wants(Piece { class: Class::Webhook, ..sleeps(B, 100) }, 60);
    let (mut mine, mut others) = (0, 0);
    for _ in 0..100 {
        loops.run(20);
        mine += loops.running(B);
        others += loops.running(S);
    }
    assert!(mine * 2 < others * 3, "{mine} slots for who comes to them, {others} for who was there");
}

/// What has waited as a storm's piece runs as one, though none waits behind it any more.
#[test]
fn what_has_waited_in_a_storm_counts_as_of_a_storm() {
    let mut scheduler = Scheduler::new(GateConfig::slots(1));
    let held = scheduler.try_start(ms(0), R, Class::Rpc).unwrap();
    for _ in 0..4 {
        let submitted = scheduler.submit(ms(1), A, Class::Rpc, FAR);
        assert!(matches!(submitted, Submitted::Queued(_)), "{submitted:?}");
    }
    scheduler.complete(ms(2), held);
    let (_, grant) = scheduler.next_grant(ms(2)).unwrap();
    assert_eq!(grant.queue(), Queue::More);
}

/// What a long report was given where nobody else waited is forgotten but for a little, and not given back with the next one either,
/// of which too much is expected.
#[test]
fn too_much_expected_of_a_report_is_no_claim_for_a_storm() {
    let mut loops = Loops::new(2, 20);
    let report = |takes| Piece { class: Class::Report, again: false, ..computes(A, takes, 0.0) };
    loops.wants(computes(A, 40, 0.0), 20);
    loops.wants(computes(B, 40, 0.0), 20);
    loops.wants(report(200_000), 1);
    loops.run(280_000);
    loops.wants(report(300), 1);
    loops.ratio();
    loops.run(5_000);
    let ratio = loops.ratio();
    assert!((ratio - 1.0).abs() < 0.1, "A gets {ratio:.2} times what B gets");
}

/// Reports that used to compute for long sleep now: what was expected of the first of these is not charged to those that compute again.
#[test]
fn what_was_only_expected_is_given_back_when_it_does_not_compute() {
    let mut loops = Loops::new(2, 20);
    let report = |tenant, takes, again| Piece { class: Class::Report, again, ..computes(tenant, takes, 0.0) };
    loops.wants(report(B, 500, true), 4);
    loops.wants(report(A, 200_000, false), 1);
    loops.run(205_000);
    loops.wants(Piece { wanted: 0.0, ..report(A, 4_000, false) }, 1);
    loops.run(5_000);
    loops.wants(report(A, 500, true), 4);
    loops.ratio();
    loops.run(10_000);
    let ratio = loops.ratio();
    assert!((ratio - 1.0).abs() < 0.2, "A gets {ratio:.2} times what B gets");
}

/// What is seen may be wrong: nothing that computes is free.
#[test]
fn who_is_said_to_wait_all_the_time_is_charged_nevertheless() {
    let mut loops = Loops::new(1, 20);
    loops.wants(computes(A, 40, 1.0), 20);
    loops.wants(computes(B, 40, 0.0), 20);
    loops.run(20_000);
    loops.ratio();
    loops.run(60_000);
    let ratio = loops.ratio();
    assert!((15.0..25.0).contains(&ratio), "A gets {ratio:.2} times what B gets");
}

/// The queue of the gate is full: who has held most slots for its share loses work, on whatever clock it waits.
#[test]
fn who_has_held_most_slots_loses_work_first() {
    let mut loops = Loops::new(2, 20);
    loops.wants(computes(A, 80, 0.95), 20);
    loops.wants(computes(B, 80, 0.0), 20);
    loops.run(20_000);
    let (running, queue) = (loops.running.len() as u32, loops.waiting.len() as u32);
    loops.scheduler.configure(GateConfig { queue, cores: Some(2), ..GateConfig::slots(running) });
    assert!([A, B].into_iter().all(|tenant| loops.waiting.values().any(|piece| piece.tenant == tenant)));
    let submitted = loops.scheduler.submit(ms(loops.now), L, Class::Rpc, FAR);
    assert!(matches!(submitted, Submitted::Queued(_)), "{submitted:?}");
    let (_, rejection) = loops.scheduler.next_rejected(ms(loops.now)).unwrap();
    assert_eq!(rejection.tenant, A);
}

/// First come first served charges nobody for coming often; nobody owes anything for that when it ends, also not to who is new.
#[test]
fn what_was_done_first_come_first_served_is_no_debt() {
    const NEW: TenantId = TenantId(9);
    let reports = |piece: Piece| Piece { class: Class::Report, takes: 500, ..piece };
    for piece in [sleeps(A, 40), computes(A, 40, 0.0), reports(sleeps(A, 0)), reports(computes(A, 0, 0.0))] {
        for other in [B, NEW] {
            let mut loops = Loops::new(2, 20);
            let config = loops.scheduler.config();
            loops.scheduler.configure(GateConfig { policy: Policy::Fifo, ..config });
            loops.wants(piece, 60);
            loops.run(20_000);
            loops.scheduler.configure(config);
            loops.scheduler.register(other, Share::default());
            loops.wants(Piece { tenant: other, ..piece }, 60);
            loops.run(4_000);
            loops.done.clear();
            loops.run(20_000);
            let (a, others) = (f64::from(loops.done[&A]), f64::from(loops.done[&other]));
            assert!((a / others - 1.0).abs() < 0.15, "A has {a} pieces done and the other {others}: {}", piece.takes);
        }
    }
}

/// One tenant's long work holds all slots that there are for such, and another one waits for these for a minute. Neither somebody who comes
/// anew with short work goes before those who were there meanwhile, nor does the one who waits.
#[test]
fn who_waits_for_slots_of_long_work_lets_nobody_go_before_others_with_short_work() {
    let mut loops = Loops::new(2, 20);
    let report = |tenant| Piece { class: Class::Report, ..sleeps(tenant, 1_000_000) };
    loops.wants(report(L), 40);
    loops.wants(report(S), 1);
    loops.wants(sleeps(A, 50), 60);
    loops.run(60_000);
    assert!(loops.running.iter().all(|work| work.piece.tenant != S), "the other one waits");
    loops.wants(sleeps(B, 50), 60);
    loops.ratio();
    loops.run(3_000);
    let newcomer = loops.ratio();
    assert!((newcomer - 1.0).abs() < 0.1, "A gets {newcomer:.2} times what the newcomer gets");
    loops.wants(sleeps(S, 50), 60);
    loops.done.clear();
    loops.run(3_000);
    let done = |tenant| f64::from(loops.done[&tenant]);
    let waiting = done(A) / done(S);
    assert!((waiting - 1.0).abs() < 0.1, "A gets {waiting:.2} times what the one who waits gets");
}

/// They are the same slots: who holds many with long work has the less for short work, but does not repay an hour of it.
#[test]
fn what_was_held_with_long_work_counts_for_short_work_as_far_as_it_is_remembered() {
    let mut loops = Loops::new(2, 20);
    let report = |tenant| Piece { class: Class::Report, ..sleeps(tenant, 2_000) };
    loops.wants(report(L), 6);
    loops.run(100_000);
    loops.wants(sleeps(L, 50), 60);
    loops.wants(sleeps(A, 50), 60);
    // Each piece takes a twentieth of a second: in ten slots two hundred a second.
    for second in [10, 120] {
        loops.done.clear();
        loops.run(10_000);
        let slots = f64::from(loops.done[&A]) / 200.0;
        assert!(
            (8.5..10.5).contains(&slots),
            "A has {slots:.1} slots of twenty to {second} s, of which L's reports have six"
        );
        loops.run(100_000);
    }
}
