//! The scheduler itself: sans-IO, deterministic, O(log tenants) per decision.
//!
//! Every tenant has a virtual time in slot-seconds per weight. A grant charges the estimate at once, so that a burst of
//! grants spreads; completion corrects the charge to what was measured; long work is charged while it runs. The
//! tenant with the least virtual time goes next. A tenant that wakes up starts at the virtual time of the gate: idling
//! earns no credit.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use cofferdam_tenant::TenantId;

use crate::share::{Class, GateConfig, Policy, Reason, Rejection, Share};
use crate::time::{SlotSeconds, Timestamp};

/// How often running work is charged for the time it has run so far.
const RECHARGE_EVERY: Duration = Duration::from_millis(100);

/// Waiting work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// Running work: the right to a slot, to be given back with [`Scheduler::complete`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a grant that is not completed holds its slot for ever"]
pub struct Grant(u64);

/// The answer to a submission.
#[derive(Debug, PartialEq, Eq)]
pub enum Submitted {
    /// A slot was free: go.
    Granted(Grant),
    /// Wait for [`Scheduler::next_grant`] to name the ticket.
    Queued(Ticket),
    /// Not admitted.
    Rejected(Rejection),
}

/// What one tenant uses of a gate now, and has used so far.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TenantUsage {
    /// Slots held.
    pub running: u32,
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
}

/// What a gate is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Slots in all.
    pub slots: u32,
    /// Slots held.
    pub running: u32,
    /// Of these, by expensive work.
    pub expensive: u32,
    /// Work waiting.
    pub waiting: u32,
}

/// Hands out the slots of one gate.
#[derive(Debug)]
pub struct Scheduler {
    config: GateConfig,
    accounts: Vec<Account>,
    index: HashMap<TenantId, usize>,
    /// Tenants that could take a slot now for short work, least virtual time first; and those for expensive work.
    ready: [BTreeSet<(Rank, usize)>; 2],
    running: HashMap<u64, Running>,
    expensive: u32,
    waiting: u32,
    /// Σ over tenants of the reserved slots that they do not use: kept free for them.
    unmet_reserved: u32,
    deadlines: BTreeSet<(Timestamp, Ticket)>,
    tickets: HashMap<Ticket, (usize, Class)>,
    virtual_time: f64,
    next_id: u64,
    recharged_at: Timestamp,
}

#[derive(Debug)]
struct Account {
    tenant: TenantId,
    share: Share,
    virtual_time: f64,
    queues: [VecDeque<Waiting>; Class::ALL.len()],
    estimates: [f64; Class::ALL.len()],
    usage: TenantUsage,
    /// The key under which the account stands in each of `ready`.
    ready_as: [Option<Rank>; 2],
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    ticket: Ticket,
    since: Timestamp,
    deadline: Timestamp,
}

#[derive(Debug)]
struct Running {
    account: usize,
    class: Class,
    since: Timestamp,
    /// Slot-seconds charged to the account so far.
    charged: f64,
    expensive: bool,
}

/// The order among ready tenants: below its reservation first, then virtual time, then arrival.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Rank {
    above_reserved: bool,
    virtual_time: f64,
    arrival: u64,
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
            .then(self.virtual_time.total_cmp(&other.virtual_time))
            .then(self.arrival.cmp(&other.arrival))
    }
}

/// Index into `ready`: short work and expensive work.
const LANES: [bool; 2] = [false, true];

impl Scheduler {
    /// A scheduler without tenants.
    pub fn new(config: GateConfig) -> Self {
        Self {
            config,
            accounts: Vec::new(),
            index: HashMap::new(),
            ready: [BTreeSet::new(), BTreeSet::new()],
            running: HashMap::new(),
            expensive: 0,
            waiting: 0,
            unmet_reserved: 0,
            deadlines: BTreeSet::new(),
            tickets: HashMap::new(),
            virtual_time: 0.0,
            next_id: 0,
            recharged_at: Timestamp::default(),
        }
    }

    /// Changes the slots. Work that runs keeps its slot even when there are fewer now.
    pub fn configure(&mut self, config: GateConfig) {
        self.config = config;
        for account in 0..self.accounts.len() {
            self.rank(account);
        }
    }

    /// The slots as configured.
    pub fn config(&self) -> GateConfig {
        self.config
    }

    /// Registers a tenant, or changes its share.
    pub fn register(&mut self, tenant: TenantId, share: Share) {
        let account = self.account(tenant);
        self.with_reservation(account, |a| a.share = share);
        self.rank(account);
    }

    /// A registered tenant's share.
    pub fn share(&self, tenant: TenantId) -> Option<Share> {
        self.index.get(&tenant).map(|a| self.accounts[*a].share)
    }

    /// Asks for a slot. A tenant that nobody registered gets the default share.
    pub fn submit(&mut self, now: Timestamp, tenant: TenantId, class: Class, deadline: Timestamp) -> Submitted {
        self.recharge(now);
        let account = self.account(tenant);
        // Whoever has nothing waiting has no claim on what it did not use, also while something of its runs.
        if self.accounts[account].usage.waiting == 0 {
            let floor = self.virtual_time;
            let a = &mut self.accounts[account];
            a.virtual_time = a.virtual_time.max(floor);
        }
        // Whoever waits cannot go now (their limit, the hot lane), but this work can: no queue, no ticket.
        if self.may_start(account, class) && (self.waiting == 0 || self.peek().is_none()) {
            return Submitted::Granted(self.start(now, account, class, now));
        }
        let a = &self.accounts[account];
        if a.usage.waiting >= a.share.queue && self.config.policy == Policy::Fair {
            let reason = Reason::QueueFull { queue: a.share.queue };
            return Submitted::Rejected(self.reject(account, reason, Duration::ZERO));
        }
        let ticket = Ticket(self.id());
        let waiting = Waiting { ticket, since: now, deadline };
        self.accounts[account].queues[class as usize].push_back(waiting);
        self.accounts[account].usage.waiting += 1;
        self.waiting += 1;
        self.tickets.insert(ticket, (account, class));
        self.deadlines.insert((deadline, ticket));
        self.rank(account);
        Submitted::Queued(ticket)
    }

    /// The waiting work that gets a slot now, if any. To be called until it returns `None` after each completion,
    /// cancellation and reconfiguration.
    pub fn next_grant(&mut self, now: Timestamp) -> Option<(Ticket, Grant)> {
        let (account, lane) = self.peek()?;
        let class = self.candidate(account, lane)?;
        let a = &mut self.accounts[account];
        let waiting = a.queues[class as usize].pop_front()?;
        a.usage.waiting -= 1;
        self.waiting -= 1;
        self.tickets.remove(&waiting.ticket);
        self.deadlines.remove(&(waiting.deadline, waiting.ticket));
        let grant = self.start(now, account, class, waiting.since);
        Some((waiting.ticket, grant))
    }

    /// Gives a slot back and charges what the work really took.
    pub fn complete(&mut self, now: Timestamp, grant: Grant) {
        self.recharge(now);
        let Some(run) = self.running.remove(&grant.0) else { return };
        let actual = now.since(run.since).as_secs_f64();
        if run.expensive {
            self.expensive -= 1;
        }
        let a = &mut self.accounts[run.account];
        a.learn(run.class, actual);
        a.usage.used += SlotSeconds(actual);
        a.virtual_time += (actual - run.charged) / f64::from(a.share.weight);
        self.with_reservation(run.account, |a| a.usage.running -= 1);
        self.rank(run.account);
    }

    /// Takes waiting work out of its queue. False when it was not waiting any more.
    pub fn cancel(&mut self, ticket: Ticket) -> bool {
        let Some((account, class)) = self.tickets.remove(&ticket) else { return false };
        let queue = &mut self.accounts[account].queues[class as usize];
        let Some(position) = queue.iter().position(|w| w.ticket == ticket) else { return false };
        if let Some(waiting) = queue.remove(position) {
            self.deadlines.remove(&(waiting.deadline, ticket));
        }
        self.accounts[account].usage.waiting -= 1;
        self.waiting -= 1;
        self.rank(account);
        true
    }

    /// The next waiting work whose deadline has passed, taken out of its queue.
    pub fn next_expired(&mut self, now: Timestamp) -> Option<(Ticket, Rejection)> {
        let (deadline, ticket) = *self.deadlines.first()?;
        if deadline > now {
            return None;
        }
        self.expire(now, ticket).map(|r| (ticket, r))
    }

    /// Takes waiting work out of its queue because its deadline has passed, and says why it had to wait.
    /// `None` when it was not waiting any more.
    pub fn expire(&mut self, now: Timestamp, ticket: Ticket) -> Option<Rejection> {
        let (account, class) = *self.tickets.get(&ticket)?;
        let since = self.accounts[account].queues[class as usize].iter().find(|w| w.ticket == ticket)?.since;
        let a = &self.accounts[account];
        let at_limit = a.usage.running >= a.share.limit && self.config.policy == Policy::Fair;
        let reason = if at_limit {
            Reason::TenantLimit { limit: a.share.limit }
        } else {
            Reason::GateBusy { slots: self.config.slots }
        };
        self.cancel(ticket);
        Some(self.reject(account, reason, now.since(since)))
    }

    /// The earliest deadline among waiting work.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.deadlines.first().map(|(d, _)| *d)
    }

    /// What the gate is doing.
    pub fn usage(&self) -> Usage {
        Usage {
            slots: self.config.slots,
            running: self.running.len() as u32,
            expensive: self.expensive,
            waiting: self.waiting,
        }
    }

    /// What one tenant uses, running work included up to `now`.
    pub fn tenant_usage(&self, now: Timestamp, tenant: TenantId) -> TenantUsage {
        let Some(&account) = self.index.get(&tenant) else { return TenantUsage::default() };
        let mut usage = self.accounts[account].usage;
        for run in self.running.values().filter(|r| r.account == account) {
            usage.used += now.since(run.since).into();
        }
        usage
    }

    /// The gate's virtual time, which never goes back.
    pub fn virtual_time(&self) -> f64 {
        self.virtual_time
    }

    fn account(&mut self, tenant: TenantId) -> usize {
        if let Some(&account) = self.index.get(&tenant) {
            return account;
        }
        let account = self.accounts.len();
        self.accounts.push(Account {
            tenant,
            share: Share::default(),
            virtual_time: self.virtual_time,
            queues: Default::default(),
            estimates: Class::ALL.map(Class::first_estimate),
            usage: TenantUsage::default(),
            ready_as: [None; 2],
        });
        self.index.insert(tenant, account);
        account
    }

    fn start(&mut self, now: Timestamp, account: usize, class: Class, since: Timestamp) -> Grant {
        let id = self.id();
        let expensive = self.is_expensive(account, class);
        self.expensive += u32::from(expensive);
        let a = &mut self.accounts[account];
        let charged = a.estimates[class as usize];
        self.virtual_time = self.virtual_time.max(a.virtual_time);
        a.virtual_time += charged / f64::from(a.share.weight);
        a.usage.granted += 1;
        a.usage.waited += now.since(since);
        self.with_reservation(account, |a| a.usage.running += 1);
        self.running.insert(id, Running { account, class, since: now, charged, expensive });
        self.rank(account);
        Grant(id)
    }

    fn reject(&mut self, account: usize, reason: Reason, waited: Duration) -> Rejection {
        let a = &mut self.accounts[account];
        a.usage.rejected += 1;
        let mean = a.usage.used.0 / (a.usage.granted.max(1) as f64);
        let lanes = f64::from(a.share.limit.min(self.config.slots).max(1));
        let seconds = (f64::from(a.usage.waiting + 1) * mean / lanes).clamp(1.0, 60.0);
        Rejection { tenant: a.tenant, reason, waited, retry_after: Duration::from_secs_f64(seconds.ceil()) }
    }

    /// Charges work that runs longer than was charged for, and marks it expensive when it turns out to be.
    fn recharge(&mut self, now: Timestamp) {
        if now.since(self.recharged_at) < RECHARGE_EVERY {
            return;
        }
        self.recharged_at = now;
        let threshold = self.config.expensive_from.as_secs_f64();
        let mut touched = Vec::new();
        for run in self.running.values_mut() {
            let elapsed = now.since(run.since).as_secs_f64();
            if elapsed > run.charged {
                let a = &mut self.accounts[run.account];
                a.virtual_time += (elapsed - run.charged) / f64::from(a.share.weight);
                run.charged = elapsed;
                touched.push(run.account);
            }
            if elapsed >= threshold && !run.expensive {
                run.expensive = true;
                self.expensive += 1;
                // Do not wait for its end to know that this tenant's work of this kind is long.
                self.accounts[run.account].learn(run.class, elapsed);
                touched.push(run.account);
            }
        }
        for account in touched {
            self.rank(account);
        }
    }

    fn is_expensive(&self, account: usize, class: Class) -> bool {
        self.accounts[account].estimates[class as usize] >= self.config.expensive_from.as_secs_f64()
    }

    fn may_start(&self, account: usize, class: Class) -> bool {
        let a = &self.accounts[account];
        match self.config.policy {
            Policy::Fifo => (self.running.len() as u32) < self.config.slots,
            Policy::Fair => {
                a.usage.running < a.share.limit
                    && self.has_free_slot(a.usage.running < a.share.reserved)
                    && (!self.is_expensive(account, class) || self.expensive < self.config.expensive_slots)
            }
        }
    }

    /// Whether a slot is free: for a tenant below its reservation any, for others only what is not kept for those.
    fn has_free_slot(&self, below_reserved: bool) -> bool {
        let free = self.config.slots.saturating_sub(self.running.len() as u32);
        if below_reserved || self.config.policy == Policy::Fifo { free > 0 } else { free > self.unmet_reserved }
    }

    /// The account that gets the next slot, and whether for expensive work.
    fn peek(&self) -> Option<(usize, bool)> {
        let (rank, account, expensive) = match (self.first_ready(false), self.first_ready(true)) {
            (Some(s), Some(e)) if e.0 < s.0 => (e.0, e.1, true),
            (Some(s), _) => (s.0, s.1, false),
            (None, Some(e)) => (e.0, e.1, true),
            (None, None) => return None,
        };
        self.has_free_slot(!rank.above_reserved).then_some((account, expensive))
    }

    fn first_ready(&self, expensive: bool) -> Option<(Rank, usize)> {
        if expensive && self.config.policy == Policy::Fair && self.expensive >= self.config.expensive_slots {
            return None;
        }
        self.ready[usize::from(expensive)].first().copied()
    }

    /// The class of the account's work that should go next in a lane: who came first, with the class's handicap.
    fn candidate(&self, account: usize, expensive: bool) -> Option<Class> {
        let a = &self.accounts[account];
        Class::ALL
            .into_iter()
            .filter(|c| self.is_expensive(account, *c) == expensive)
            .filter_map(|c| a.queues[c as usize].front().map(|w| (w.since + c.handicap(), w.ticket, c)))
            .min()
            .map(|(_, _, class)| class)
    }

    /// Puts the account where it belongs in the ready sets after anything about it has changed.
    fn rank(&mut self, account: usize) {
        for expensive in LANES {
            let lane = usize::from(expensive);
            let rank = self.rank_in(account, expensive);
            let a = &mut self.accounts[account];
            if a.ready_as[lane] == rank {
                continue;
            }
            if let Some(old) = a.ready_as[lane].take() {
                self.ready[lane].remove(&(old, account));
            }
            if let Some(new) = rank {
                self.ready[lane].insert((new, account));
                a.ready_as[lane] = Some(new);
            }
        }
    }

    fn rank_in(&self, account: usize, expensive: bool) -> Option<Rank> {
        let a = &self.accounts[account];
        if a.usage.waiting == 0 {
            return None;
        }
        let class = self.candidate(account, expensive)?;
        let arrival = a.queues[class as usize].front().map_or(0, |w| w.ticket.0);
        match self.config.policy {
            Policy::Fifo => Some(Rank { above_reserved: false, virtual_time: 0.0, arrival }),
            Policy::Fair if a.usage.running >= a.share.limit => None,
            Policy::Fair => Some(Rank {
                above_reserved: a.usage.running >= a.share.reserved,
                virtual_time: a.virtual_time,
                arrival,
            }),
        }
    }

    /// Changes an account and keeps the sum of unmet reservations true.
    fn with_reservation(&mut self, account: usize, change: impl FnOnce(&mut Account)) {
        let a = &mut self.accounts[account];
        self.unmet_reserved -= a.unmet_reserved();
        change(a);
        self.unmet_reserved += a.unmet_reserved();
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

impl Account {
    fn unmet_reserved(&self) -> u32 {
        self.share.reserved.saturating_sub(self.usage.running)
    }

    /// Rises fast, decays slowly: a tenant that sometimes sends long work is treated as one that may.
    fn learn(&mut self, class: Class, actual: f64) {
        let estimate = &mut self.estimates[class as usize];
        let rate = if actual > *estimate { 0.5 } else { 0.1 };
        *estimate += (actual - *estimate) * rate;
    }
}
