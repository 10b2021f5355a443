//! The policies that are compared.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use cofferdam_tenant::{Class, TenantId};

use crate::scheduler::{Grant, Scheduler, Submitted, Ticket};
use crate::share::{GateConfig, Share};
use crate::time::Timestamp;

use super::Scenario;

/// A piece of work.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) source: usize,
    pub(super) tenant: u32,
    pub(super) arrived: u64,
    pub(super) started: Option<u64>,
    pub(super) compute: f64,
    pub(super) wait: f64,
}

/// Who goes next.
pub trait Discipline {
    /// Work has arrived.
    fn submit(&mut self, now: Timestamp, job: usize, tenant: u32, class: Class);
    /// The job that starts now, if any. Asked until it says `None`.
    fn next(&mut self, now: Timestamp) -> Option<usize>;
    /// Work has finished.
    fn complete(&mut self, now: Timestamp, job: usize, tenant: u32);
    /// Time has passed.
    fn tick(&mut self, _now: Timestamp) {}
}

/// A policy by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// First come, first served: what gateways and connection poolers do.
    Fifo,
    /// One from each tenant in turn.
    RoundRobin,
    /// A fixed number of slots per tenant: PgBouncer with one pool per database.
    PoolPerTenant,
    /// Start-time fair queueing over slots, costs estimated and corrected.
    Sfq,
    /// Two-dimensional fair queueing: expensive work is kept off some of the slots by its size (Mace 2016).
    TwoDfq,
    /// Cofferdam with a fixed number of slots.
    Fixed,
    /// Cofferdam with a number of slots that adapts.
    Adaptive,
}

impl Policy {
    /// All of them, the simplest first.
    pub const ALL: [Self; 7] =
        [Self::Fifo, Self::RoundRobin, Self::PoolPerTenant, Self::Sfq, Self::TwoDfq, Self::Fixed, Self::Adaptive];

    /// The name in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fifo => "fifo",
            Self::RoundRobin => "round-robin",
            Self::PoolPerTenant => "pool-per-tenant",
            Self::Sfq => "sfq",
            Self::TwoDfq => "2dfq",
            Self::Fixed => "cofferdam-fixed",
            Self::Adaptive => "cofferdam",
        }
    }

    pub(super) fn discipline(self, scenario: &Scenario) -> Box<dyn Discipline> {
        let slots = scenario.slots;
        match self {
            Self::Fifo => Box::new(Fifo { slots, running: 0, queue: VecDeque::new() }),
            Self::RoundRobin => Box::new(Turns::new(slots, u32::MAX)),
            Self::PoolPerTenant => Box::new(Turns::new(u32::MAX, scenario.pool_per_tenant)),
            Self::Sfq => Box::new(Virtual::new(slots, false)),
            Self::TwoDfq => Box::new(Virtual::new(slots, true)),
            Self::Fixed => Box::new(Ours::new(scenario, scenario.slots)),
            Self::Adaptive => Box::new(Ours::new(scenario, scenario.least_slots)),
        }
    }
}

struct Fifo {
    slots: u32,
    running: u32,
    queue: VecDeque<usize>,
}

impl Discipline for Fifo {
    fn submit(&mut self, _: Timestamp, job: usize, _: u32, _: Class) {
        self.queue.push_back(job);
    }

    fn next(&mut self, _: Timestamp) -> Option<usize> {
        let job = (self.running < self.slots).then(|| self.queue.pop_front()).flatten()?;
        self.running += 1;
        Some(job)
    }

    fn complete(&mut self, _: Timestamp, _: usize, _: u32) {
        self.running -= 1;
    }
}

/// One from each tenant in turn, with at most so many of one tenant at once.
struct Turns {
    slots: u32,
    per_tenant: u32,
    running: u32,
    of_tenant: HashMap<u32, u32>,
    queues: BTreeMap<u32, VecDeque<usize>>,
    last: u32,
}

impl Turns {
    fn new(slots: u32, per_tenant: u32) -> Self {
        Self { slots, per_tenant, running: 0, of_tenant: HashMap::new(), queues: BTreeMap::new(), last: 0 }
    }
}

impl Discipline for Turns {
    fn submit(&mut self, _: Timestamp, job: usize, tenant: u32, _: Class) {
        self.queues.entry(tenant).or_default().push_back(job);
    }

    fn next(&mut self, _: Timestamp) -> Option<usize> {
        if self.running >= self.slots {
            return None;
        }
        let has_room = |t: &u32| self.of_tenant.get(t).copied().unwrap_or(0) < self.per_tenant;
        let after = self.queues.range(self.last + 1..).map(|(t, _)| *t).find(has_room);
        let tenant = after.or_else(|| self.queues.keys().copied().find(has_room))?;
        let queue = self.queues.get_mut(&tenant)?;
        let job = queue.pop_front()?;
        if queue.is_empty() {
            self.queues.remove(&tenant);
        }
        self.last = tenant;
        self.running += 1;
        *self.of_tenant.entry(tenant).or_default() += 1;
        Some(job)
    }

    fn complete(&mut self, _: Timestamp, _: usize, tenant: u32) {
        self.running -= 1;
        if let Some(n) = self.of_tenant.get_mut(&tenant) {
            *n -= 1;
        }
    }
}

/// Fair queueing by virtual start time; with `two_dimensional`, a slot with a low number takes only work whose start
/// tag, less a part of its size, has come: expensive work goes to the slots with high numbers.
struct Virtual {
    slots: u32,
    two_dimensional: bool,
    free: BTreeSet<u32>,
    clock: f64,
    tenants: HashMap<u32, Flow>,
    /// Tenants with something waiting, least start tag first.
    ready: BTreeSet<(u64, u32)>,
    running: HashMap<usize, (Timestamp, f64, u32)>,
}

#[derive(Default)]
struct Flow {
    start: f64,
    estimate: f64,
    queue: VecDeque<usize>,
}

impl Virtual {
    fn new(slots: u32, two_dimensional: bool) -> Self {
        Self {
            slots,
            two_dimensional,
            free: (0..slots).collect(),
            clock: 0.0,
            tenants: HashMap::new(),
            ready: BTreeSet::new(),
            running: HashMap::new(),
        }
    }

    /// Non-negative floats sort like their bits.
    fn key(start: f64) -> u64 {
        start.max(0.0).to_bits()
    }
}

impl Discipline for Virtual {
    fn submit(&mut self, _: Timestamp, job: usize, tenant: u32, _: Class) {
        let flow = self.tenants.entry(tenant).or_insert_with(|| Flow { estimate: 0.02, ..Flow::default() });
        if flow.queue.is_empty() {
            flow.start = flow.start.max(self.clock);
            self.ready.insert((Self::key(flow.start), tenant));
        }
        flow.queue.push_back(job);
    }

    fn next(&mut self, now: Timestamp) -> Option<usize> {
        let slot = *self.free.first()?;
        let eligible = |tenant: u32| {
            let flow = &self.tenants[&tenant];
            let part = f64::from(slot) / f64::from(self.slots);
            flow.start - part * flow.estimate <= self.clock
        };
        let least = self.ready.first().copied()?;
        let (key, tenant) = if self.two_dimensional {
            // The least finish tag among the eligible; when nobody is, the least start tag keeps the slot busy.
            let finish = |t: &u32| self.tenants[t].start + self.tenants[t].estimate;
            let chosen = self.ready.iter().take(64).filter(|(_, t)| eligible(*t));
            chosen.min_by(|a, b| finish(&a.1).total_cmp(&finish(&b.1))).copied().unwrap_or(least)
        } else {
            least
        };
        self.ready.remove(&(key, tenant));
        let flow = self.tenants.get_mut(&tenant)?;
        let job = flow.queue.pop_front()?;
        self.clock = self.clock.max(flow.start);
        flow.start += flow.estimate;
        self.running.insert(job, (now, flow.estimate, slot));
        if !flow.queue.is_empty() {
            self.ready.insert((Self::key(flow.start), tenant));
        }
        self.free.remove(&slot);
        Some(job)
    }

    fn complete(&mut self, now: Timestamp, job: usize, tenant: u32) {
        let Some((since, charged, slot)) = self.running.remove(&job) else { return };
        self.free.insert(slot);
        let Some(flow) = self.tenants.get_mut(&tenant) else { return };
        let actual = now.since(since).as_secs_f64();
        self.ready.remove(&(Self::key(flow.start), tenant));
        flow.start += actual - charged;
        flow.estimate += (actual - flow.estimate) * if actual > flow.estimate { 0.5 } else { 0.1 };
        if !flow.queue.is_empty() {
            self.ready.insert((Self::key(flow.start), tenant));
        }
    }
}

/// The scheduler that ships.
struct Ours {
    scheduler: Scheduler,
    jobs: HashMap<Ticket, usize>,
    started: VecDeque<usize>,
    grants: HashMap<usize, Grant>,
}

impl Ours {
    fn new(scenario: &Scenario, least_slots: u32) -> Self {
        let config = GateConfig {
            least_slots,
            expensive_slots: scenario.expensive_slots,
            expensive_from: Duration::from_millis(200),
            overdraft: scenario.slots,
            queue: u32::MAX,
            ..GateConfig::slots(scenario.slots)
        };
        let mut scheduler = Scheduler::new(config);
        for tenant in 0..scenario.tenants {
            scheduler.register(TenantId(tenant), Share { queue: u32::MAX, ..Share::default() });
        }
        Self { scheduler, jobs: HashMap::new(), started: VecDeque::new(), grants: HashMap::new() }
    }
}

impl Discipline for Ours {
    fn submit(&mut self, now: Timestamp, job: usize, tenant: u32, class: Class) {
        match self.scheduler.submit(now, TenantId(tenant), class, now + Duration::from_secs(1_000_000)) {
            Submitted::Granted(grant) => {
                self.grants.insert(job, grant);
                self.started.push_back(job);
            }
            Submitted::Queued(ticket) => {
                self.jobs.insert(ticket, job);
            }
            Submitted::Rejected(_) => {}
        }
    }

    fn next(&mut self, now: Timestamp) -> Option<usize> {
        if let Some(job) = self.started.pop_front() {
            return Some(job);
        }
        let (ticket, grant) = self.scheduler.next_grant(now)?;
        let job = self.jobs.remove(&ticket)?;
        self.grants.insert(job, grant);
        Some(job)
    }

    fn complete(&mut self, now: Timestamp, job: usize, _: u32) {
        if let Some(grant) = self.grants.remove(&job) {
            self.scheduler.complete(now, grant);
        }
    }

    fn tick(&mut self, now: Timestamp) {
        self.scheduler.advance(now);
    }
}
