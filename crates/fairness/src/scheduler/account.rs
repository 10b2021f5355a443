//! What the scheduler knows of one tenant.

use std::collections::VecDeque;
use std::time::Duration;

use cofferdam_tenant::{Class, TenantId};

use crate::adaptive::{Baseline, Seen};
use crate::budget::{Gcra, Postpaid};
use crate::share::{Reason, Share, first_estimate, handicap};
use crate::time::{SlotSeconds, Timestamp};

use super::clocks::{Charged, Clocks};
use super::cores::Cores;
use super::waits::Waits;
use super::{Grant, Ticket};

/// A tenant that did nothing for this long has to earn trust again.
const FORGET_TRUST: Duration = Duration::from_secs(1);
/// A tenant with no more than this running and waiting is no storm.
const MODEST: u32 = 3;

/// What one tenant uses of a gate now, and has used so far.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TenantUsage {
    /// Slots held.
    pub running: u32,
    /// Slots held beside these by nested work.
    pub nested: u32,
    /// Work waiting.
    pub waiting: u32,
    /// Work finished and running so far, in slot-seconds.
    pub used: SlotSeconds,
    /// Slots granted so far.
    pub granted: u64,
    /// Work turned away so far.
    pub rejected: u64,
    /// Time that granted work had waited, summed.
    pub waited: Duration,
    /// How long work has waited lately.
    pub waits: Waits,
    /// The lower limit that the coupling of the planes sets at the moment.
    pub squeezed_to: Option<u32>,
    /// Whether the rate, the work budget or the byte budget holds the tenant back at the moment.
    pub throttled: bool,
    /// Slot-milliseconds left of the work budget; negative in debt. `None` without one.
    pub work_balance: Option<f64>,
}

/// The two kinds of work, by what it is expected to cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    Short = 0,
    Expensive = 1,
}

impl Lane {
    pub(super) const ALL: [Self; 2] = [Self::Short, Self::Expensive];
}

/// The sets of tenants that could be next; each is served under a condition of its own. What is granted out of a later
/// one is more in the way of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Queue {
    /// Short work of tenants that have little running and waiting, or less running than is reserved for them.
    First = 0,
    /// Short work of the others.
    More = 1,
    /// Expensive work.
    Expensive = 2,
}

impl Queue {
    pub(super) const ALL: [Self; 3] = [Self::First, Self::More, Self::Expensive];

    pub(super) fn lane(self) -> Lane {
        match self {
            Self::First | Self::More => Lane::Short,
            Self::Expensive => Lane::Expensive,
        }
    }
}

/// A set of ready tenants: a queue, and whether their next work waits for cores too. Those that do must not stand in the
/// way of those that do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) queue: Queue,
    pub(super) wants_cores: bool,
}

impl Place {
    pub(super) const ALL: [Self; 5] = [
        Self { queue: Queue::First, wants_cores: false },
        Self { queue: Queue::More, wants_cores: false },
        Self { queue: Queue::Expensive, wants_cores: false },
        Self { queue: Queue::More, wants_cores: true },
        Self { queue: Queue::Expensive, wants_cores: true },
    ];

    /// How many clocks there are by which those who are ready wait: of each lane, and of each lane those who wait for cores.
    pub(super) const GROUPS: usize = 4;

    /// By which of them those wait that are here.
    pub(super) fn group(self) -> usize {
        self.queue.lane() as usize + if self.wants_cores { 2 } else { 0 }
    }

    /// Where those of a queue are that wait for cores.
    pub(super) fn of_cores(queue: Queue) -> Self {
        Self { queue, wants_cores: true }
    }

    /// Where it is in [`Place::ALL`]. Modest work waits for no core.
    pub(super) fn index(self) -> usize {
        match self.queue {
            Queue::First => 0,
            queue => queue as usize + if self.wants_cores { 2 } else { 0 },
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    pub(super) ticket: Ticket,
    pub(super) since: Timestamp,
    pub(super) deadline: Timestamp,
}

#[derive(Debug)]
pub(super) struct Running {
    pub(super) grant: Grant,
    pub(super) account: usize,
    pub(super) class: Class,
    pub(super) since: Timestamp,
    /// Slot-seconds charged so far, to the virtual time and the clocks of the lanes, and those billed to the work budget.
    pub(super) charged: Charged,
    pub(super) billed: f64,
    /// Out of which queue it was granted; expensive work that was mistaken for short changes it.
    pub(super) queue: Queue,
    pub(super) nested: bool,
    /// The gate was nearly empty when it began.
    pub(super) calm: bool,
    /// The cores that it keeps busy: as expected at first, then as measured.
    pub(super) cores: Cores,
    /// The parts of its time in which it wants one, and waits for one: as expected at first, then as measured.
    pub(super) wanted: Option<f32>,
    pub(super) waited: f32,
    /// Seconds of work charged so far to the clocks of those that wait for cores.
    pub(super) core_charged: Charged,
    /// It lasts longer than short work may, though what it cost by now is short: it waits for cores.
    pub(super) lasts: bool,
    /// Seconds for which it has waited for a core as measured, and until when it was.
    pub(super) waited_for: f64,
    pub(super) measured_until: Timestamp,
    /// Those of them in which cores bounded it.
    pub(super) excused: f64,
    /// Seconds since it was last measured in which cores bounded it, and until when they have been counted.
    pub(super) bounded_for: f64,
    pub(super) counted_until: Timestamp,
    /// Whether it gives way to others at once: as expected at first, then as measured.
    pub(super) gives_way: bool,
    /// Cores bounded it when it began.
    pub(super) core_bound: bool,
}

/// The order among ready tenants: below its reservation first, then the time of its place's clock, then virtual time, then arrival.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rank {
    pub(super) above_reserved: bool,
    /// By which those of one place are ordered: what has been charged in its lane, for cores where they wait for these, for slots otherwise.
    pub(super) clock: f64,
    pub(super) virtual_time: f64,
    pub(super) arrival: u64,
}

impl Rank {
    /// The same by slots, whatever the clock of its place.
    pub(super) fn by_slots(self) -> Self {
        Self { clock: self.virtual_time, ..self }
    }
}

impl Eq for Rank {}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.above_reserved
            .cmp(&other.above_reserved)
            .then(self.clock.total_cmp(&other.clock))
            .then(self.virtual_time.total_cmp(&other.virtual_time))
            .then(self.arrival.cmp(&other.arrival))
    }
}

const _: () = assert!(Class::ALL.len() <= u16::BITS as usize, "`Account::busy` has a bit for each");

/// What the scheduler knows of one tenant's work of one class. It lies together: a decision reads it of many tenants,
/// whom no processor's cache holds.
#[derive(Debug)]
pub(super) struct ClassAccount {
    pub(super) queue: VecDeque<Waiting>,
    /// Seconds that work takes.
    pub(super) estimate: f32,
    pub(super) running: u32,
    /// How many cores work keeps busy, as far as it was measured.
    pub(super) cores: Cores,
    /// Whether it gave way to others when it was last measured as a storm's.
    pub(super) gives_way: bool,
    /// The parts of its time in which it wanted a core, and waited for one, lately.
    pub(super) wanted: Option<f32>,
    pub(super) waited: f32,
    pub(super) baseline: Baseline,
}

impl ClassAccount {
    fn new(class: Class) -> Self {
        Self {
            queue: VecDeque::new(),
            estimate: first_estimate(class),
            running: 0,
            cores: Cores::default(),
            gives_way: false,
            wanted: None,
            waited: 0.0,
            baseline: Baseline::default(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Account {
    pub(super) tenant: TenantId,
    pub(super) registered: bool,
    pub(super) share: Share,
    pub(super) clocks: Clocks,
    pub(super) by_class: [ClassAccount; Class::ALL.len()],
    /// Which of the queues are not empty, a bit for each.
    pub(super) busy: u16,
    /// Cores bounded its work lately: its virtual time may be behind everybody's.
    pub(super) core_bound: bool,
    pub(super) usage: TenantUsage,
    /// Of the running work, that in the short lane.
    pub(super) short: u32,
    /// Of the running work, what lasts although it has cost little.
    pub(super) lasting: u32,
    /// Most of the short work at once, until more has shown that it is short.
    pub(super) trust: u32,
    pub(super) idle_since: Timestamp,
    /// The coupling's limit.
    pub(super) squeeze: Option<u32>,
    pub(super) rate: Gcra,
    /// Of nested work while the tenant is held back.
    pub(super) nested_rate: Gcra,
    pub(super) work: Postpaid,
    pub(super) bytes: Postpaid,
    /// Held back by rate or budgets until then.
    pub(super) throttled: Option<Timestamp>,
    /// How much longer its work takes than it should.
    pub(super) seen: Seen,
    /// The key under which the account stands in each of the ready sets, or among those held back.
    pub(super) ready_as: [Option<(Place, Rank)>; 2],
    pub(super) held_as: Option<Rank>,
}

impl Account {
    pub(super) fn new(tenant: TenantId, clocks: Clocks) -> Self {
        Self {
            tenant,
            registered: false,
            share: Share::default(),
            clocks,
            by_class: Class::ALL.map(ClassAccount::new),
            busy: 0,
            core_bound: false,
            usage: TenantUsage::default(),
            short: 0,
            lasting: 0,
            trust: 0,
            idle_since: Timestamp::default(),
            squeeze: None,
            rate: Gcra::default(),
            nested_rate: Gcra::default(),
            work: Postpaid::default(),
            bytes: Postpaid::default(),
            throttled: None,
            seen: Seen::default(),
            ready_as: [None; 2],
            held_as: None,
        }
    }

    /// The account waits or runs for cores with work of a queue: whoever did not wait for them has no claim
    /// on what others were given meanwhile.
    pub(super) fn come_to_cores(&mut self, queue: Queue, floors: &Clocks) {
        let lane = queue.lane();
        if self.ready_as[lane as usize].is_none_or(|(place, _)| place != Place::of_cores(queue)) {
            self.clocks.come_to_cores(lane, floors);
        }
    }

    pub(super) fn is_modest(&self) -> bool {
        self.usage.running + self.usage.waiting <= MODEST
    }

    pub(super) fn unmet_reserved(&self) -> u32 {
        self.share.reserved.saturating_sub(self.usage.running)
    }

    /// The greatest number of slots, the coupling's limit included.
    pub(super) fn limit(&self) -> u32 {
        self.share.limit.min(self.squeeze.unwrap_or(u32::MAX)).max(1)
    }

    pub(super) fn class_has_room(&self, class: Class) -> bool {
        self.by_class[class as usize].running < self.share.classes[class as usize].limit.max(1)
    }

    /// What bounds start and when it lifts, if rate or budgets hold the tenant back at `now`.
    pub(super) fn held_back(&self, now: Timestamp) -> Option<(Timestamp, Reason)> {
        let rate = self.share.rate.map(|r| (self.rate.ready_at(r), Reason::RateLimit { per_second: r.frequency() }));
        let work = self.share.work.map(|w| (self.work.ready_at(w), Reason::WorkBudget { per_second: w.per_second }));
        let bytes = self.share.bytes.map(|b| (self.bytes.ready_at(b), Reason::ByteBudget { per_second: b.per_second }));
        [rate, work, bytes].into_iter().flatten().filter(|(at, _)| *at > now).max_by_key(|(at, _)| *at)
    }

    /// Why work of a class has not been granted, as far as the tenant's own bounds explain it.
    pub(super) fn own_reason(&self, now: Timestamp, class: Class) -> Option<Reason> {
        if let Some((_, reason)) = self.held_back(now) {
            return Some(reason);
        }
        if self.usage.running >= self.share.limit {
            return Some(Reason::TenantLimit { limit: self.share.limit });
        }
        if self.squeeze.is_some_and(|s| self.usage.running >= s.max(1)) {
            return Some(Reason::DatabaseQueued { limit: self.limit() });
        }
        (!self.class_has_room(class))
            .then(|| Reason::ClassLimit { class, limit: self.share.classes[class as usize].limit })
    }

    /// Rises fast, decays slowly: a tenant that sometimes sends long work is treated as one that may.
    pub(super) fn learn(&mut self, class: Class, actual: f64) {
        let estimate = &mut self.by_class[class as usize].estimate;
        let rate = if actual > f64::from(*estimate) { 0.5 } else { 0.1 };
        *estimate += ((actual - f64::from(*estimate)) * rate) as f32;
    }

    /// The account comes back from doing nothing: what it may do at once is small again.
    pub(super) fn wake(&mut self, now: Timestamp, entitlement: u32) {
        let idle = self.usage.running == 0 && self.usage.waiting == 0;
        if self.trust < entitlement || (idle && now.since(self.idle_since) >= FORGET_TRUST) {
            self.trust = entitlement;
        }
    }

    /// The work that goes next in each lane: who came first, with the class's handicap. `threshold`: from this estimate
    /// on work is expensive. `bounded`: classes at their limit are left out, and of short work those with a bit in `held`.
    pub(super) fn candidates(&self, threshold: f32, bounded: bool, held: u16) -> [Option<Ticket>; 2] {
        let mut best: [Option<(Timestamp, Ticket)>; 2] = [None; 2];
        let mut busy = self.busy;
        while busy != 0 {
            let class = Class::ALL[busy.trailing_zeros() as usize];
            let is_held = held & busy & busy.wrapping_neg() != 0;
            busy &= busy - 1;
            if bounded && !self.class_has_room(class) {
                continue;
            }
            let of_class = &self.by_class[class as usize];
            let Some(first) = of_class.queue.front() else { continue };
            let lane = usize::from(of_class.estimate >= threshold);
            if bounded && is_held && lane == Lane::Short as usize {
                continue;
            }
            let key = (first.since + handicap(class), first.ticket);
            if best[lane].is_none_or(|b| key < b) {
                best[lane] = Some(key);
            }
        }
        best.map(|b| b.map(|(_, ticket)| ticket))
    }
}
