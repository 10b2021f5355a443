//! The scheduler itself: sans-IO, deterministic, O(log tenants) per decision.
//!
//! Every tenant has a virtual time in slot-seconds per weight. A grant charges the estimate at once, so that a burst of
//! grants spreads; completion corrects the charge to what was measured; long work is charged while it runs. The
//! tenant with the least virtual time goes next. A tenant that wakes up starts at the virtual time of the gate: idling
//! earns no credit. Work that computes, where cores bound it, is ordered by clocks of its own, of work without its waits; and
//! short and expensive work each by one of its lane, since one may wait for long while the other goes on.
//!
//! Order alone does not protect short work, because running work cannot be taken back. So work is put into two *lanes*:
//! what is expected to be expensive may hold only a part of the slots, and what turns out to be expensive changes lane
//! while it runs. How much unproven work of one tenant runs as short at once is bounded by *trust*, which begins at
//! the tenant's part of the slots among all *registered* tenants and grows with each piece that was short indeed.

mod account;
mod charges;
mod clocks;
mod cores;
mod order;
mod slots;
mod usage;
mod waits;

use std::collections::BTreeSet;
use std::time::Duration;

use cofferdam_tenant::{Class, TenantId};
use rustc_hash::FxHashMap;
use slab::Slab;

use crate::adaptive::{Concurrency, Headroom};
use crate::budget::Rate;
use crate::share::{GateConfig, Policy, Reason, Rejection, Share};
use crate::time::{SlotSeconds, Timestamp};

use account::{Account, Lane, Place, Rank, Running, Waiting};
pub use account::{Queue, TenantUsage};
use clocks::{Charged, Clocks};
pub use cores::OnCores;
pub use usage::{Pressure, Usage};
pub use waits::Waits;

/// Nested work of a tenant that is held back: enough for a transaction to come to its end.
const NESTED_RATE: Rate = Rate::one_per_second(5);

/// Waiting work. Tickets sort in the order in which they were given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    serial: u64,
    account: u32,
    class: Class,
}

/// Running work: the right to a slot, to be given back with [`Scheduler::complete`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a grant that is not completed holds its slot for ever"]
pub struct Grant {
    key: usize,
    serial: u64,
    queue: Queue,
}

impl Grant {
    /// Out of which queue the slot was granted. Work that turns out to be expensive changes it while it runs; that is
    /// not seen here.
    pub fn queue(&self) -> Queue {
        self.queue
    }

    /// The same, to name the work with; not to be completed.
    pub(crate) fn again(&self) -> Self {
        Self { ..*self }
    }
}

/// The answer to a submission.
#[derive(Debug, PartialEq, Eq)]
pub enum Submitted {
    /// A slot was free: go.
    Granted(Grant),
    /// Wait for [`Scheduler::next_grant`] or [`Scheduler::next_rejected`] to name the ticket.
    Queued(Ticket),
    /// Not admitted.
    Rejected(Rejection),
}

/// How many of the slots are open: to everybody, to tenants with much short work, and to expensive work.
#[derive(Debug, Clone, Copy, Default)]
struct Open {
    slots: u32,
    /// Of these, those that only modest work may have.
    kept: u32,
    more: u32,
    expensive: u32,
}

/// Hands out the slots of one gate.
#[derive(Debug)]
pub struct Scheduler {
    config: GateConfig,
    /// The configured threshold, in seconds.
    expensive_from: f32,
    accounts: Vec<Account>,
    index: FxHashMap<TenantId, usize>,
    /// Σ weight of the registered tenants, and their number.
    registered_weight: u64,
    registered: u32,
    /// Tenants that could take a slot now, by [`Place`], in the order of its clock.
    ready: [BTreeSet<(Rank, usize)>; Place::ALL.len()],
    /// The same, least virtual time first.
    by_slots: [BTreeSet<(Rank, usize)>; Place::ALL.len()],
    /// Tenants whose work waits for a bound of their own.
    held: BTreeSet<(Rank, usize)>,
    running: Slab<Running>,
    /// Slots held, by the queue out of which they were granted.
    held_by: [u32; Queue::ALL.len()],
    busy: cores::Busy,
    nested: u32,
    /// Of the slots of expensive work, those of what began as short work and lasts, though it has cost little.
    lasting: u32,
    waiting: u32,
    /// Σ over tenants of the reserved slots that they do not use: kept free for them.
    unmet_reserved: u64,
    /// Σ reserved.
    reserved: u64,
    deadlines: BTreeSet<(Timestamp, Ticket)>,
    throttled: BTreeSet<(Timestamp, usize)>,
    /// Of the waiting work, that inside other work of its tenant.
    nested_waiting: BTreeSet<Ticket>,
    shed: Vec<(Ticket, Rejection)>,
    clocks: Clocks,
    next_id: u64,
    now: Timestamp,
    recharged_at: Timestamp,
    concurrency: Concurrency,
    /// Slots in use now, as the concurrency controller and the load of modest work set them.
    open: Open,
    headroom: Headroom,
    /// Accounts with work completed in the controller's window, which has a number and a beginning.
    touched: Vec<usize>,
    window: u32,
    window_since: Timestamp,
    inflation: f64,
}

impl Scheduler {
    /// A scheduler without tenants.
    pub fn new(config: GateConfig) -> Self {
        let config = config.sane();
        let mut scheduler = Self {
            config,
            expensive_from: config.expensive_from.as_secs_f32(),
            accounts: Vec::new(),
            index: FxHashMap::default(),
            registered_weight: 0,
            registered: 0,
            ready: Default::default(),
            by_slots: Default::default(),
            held: BTreeSet::new(),
            running: Slab::new(),
            held_by: [0; Queue::ALL.len()],
            busy: cores::Busy::default(),
            nested: 0,
            lasting: 0,
            waiting: 0,
            unmet_reserved: 0,
            reserved: 0,
            deadlines: BTreeSet::new(),
            throttled: BTreeSet::new(),
            nested_waiting: BTreeSet::new(),
            shed: Vec::new(),
            clocks: Clocks::default(),
            next_id: 0,
            now: Timestamp::default(),
            recharged_at: Timestamp::default(),
            concurrency: Concurrency::new(config.least_slots, config.slots),
            open: Open::default(),
            headroom: Headroom::default(),
            touched: Vec::new(),
            window: 1,
            window_since: Timestamp::default(),
            inflation: 0.0,
        };
        scheduler.open_slots();
        scheduler
    }

    /// Changes the slots. Work that runs keeps its slot even when there are fewer now.
    pub fn configure(&mut self, config: GateConfig) {
        let config = config.sane();
        let was = std::mem::replace(&mut self.config, config).policy;
        if was == Policy::Fifo && config.policy == Policy::Fair {
            self.forget_debts();
        }
        self.expensive_from = config.expensive_from.as_secs_f32();
        self.concurrency.set_bounds(config.least_slots, config.slots);
        self.open_slots();
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
        let share = Share { weight: share.weight.max(1), ..share };
        self.count_registered(account, false);
        self.with_reservation(account, |a| a.share = share);
        self.count_registered(account, true);
        self.open_slots();
        self.rank(account);
    }

    /// Forgets what a tenant is entitled to: it counts no more among those who divide the slots. What bounds it stays,
    /// for the work of it that still waits or comes.
    pub fn unregister(&mut self, tenant: TenantId) {
        let Some(&account) = self.index.get(&tenant) else { return };
        self.count_registered(account, false);
        self.with_reservation(account, |a| a.share = Share { reserved: 0, weight: 1, ..a.share });
        self.open_slots();
        self.rank(account);
    }

    /// A known tenant's share.
    pub fn share(&self, tenant: TenantId) -> Option<Share> {
        self.index.get(&tenant).map(|a| &self.accounts[*a]).filter(|a| a.registered).map(|a| a.share)
    }

    /// Lowers a tenant's limit for as long as its work elsewhere is stuck; `None` lifts that.
    pub fn squeeze(&mut self, tenant: TenantId, limit: Option<u32>) {
        let Some(&account) = self.index.get(&tenant) else { return };
        if self.accounts[account].squeeze != limit {
            self.accounts[account].squeeze = limit;
            self.rank(account);
        }
    }

    /// Charges bytes that were moved for a tenant to its byte budget.
    pub fn charge_bytes(&mut self, now: Timestamp, tenant: TenantId, bytes: u64) {
        let Some(&account) = self.index.get(&tenant) else { return };
        let a = &mut self.accounts[account];
        if let Some(allowance) = a.share.bytes {
            a.bytes.charge(allowance, now, bytes as f64);
            self.rank(account);
        }
    }

    /// Asks for a slot. A tenant that nobody registered gets the default share.
    pub fn submit(&mut self, now: Timestamp, tenant: TenantId, class: Class, deadline: Timestamp) -> Submitted {
        self.ask(now, tenant, class, deadline, false)
    }

    fn ask(&mut self, now: Timestamp, tenant: TenantId, class: Class, deadline: Timestamp, nested: bool) -> Submitted {
        let account = match self.try_at_once(now, tenant, class) {
            Ok(grant) => return Submitted::Granted(grant),
            Err(account) => account,
        };
        if self.config.policy == Policy::Fair
            && !nested
            && let Some(rejection) = self.turned_away(account, class, deadline)
        {
            return Submitted::Rejected(rejection);
        }
        let ticket = Ticket { serial: self.id(), account: account as u32, class };
        let waiting = Waiting { ticket, since: now, deadline };
        let a = &mut self.accounts[account];
        a.by_class[class as usize].queue.push_back(waiting);
        a.busy |= 1 << class as u16;
        a.usage.waiting += 1;
        self.waiting += 1;
        self.deadlines.insert((deadline, ticket));
        self.rank(account);
        Submitted::Queued(ticket)
    }

    /// Asks for a slot for work without which other work, that holds a slot of the same tenant, cannot finish: Odoo
    /// opens a second transaction inside the first. It does not wait for the slots of the gate or the tenant's limit,
    /// or a tenant would block itself: it comes out of the overdraft, at most one for each slot that the tenant
    /// holds and no more than half of the overdraft for one tenant. Until there is room it waits like any other work,
    /// and goes first when there is. A tenant that its rate or a budget holds back gets one a second.
    pub fn submit_nested(&mut self, now: Timestamp, tenant: TenantId, class: Class, deadline: Timestamp) -> Submitted {
        self.advance(now);
        let account = self.account(tenant);
        if self.may_nest(account) {
            let queue = self.queue(account, self.lane(account, class));
            return Submitted::Granted(self.start(account, class, queue, now, true));
        }
        // As many as the tenant holds slots are not turned away because its queue is full: the outer ones wait for them.
        let a = &self.accounts[account].usage;
        let is_one_per_slot = (self.nested_waiting.len() as u64) < u64::from(a.running);
        let submitted = self.ask(now, tenant, class, deadline, is_one_per_slot);
        if let Submitted::Queued(ticket) = submitted {
            self.nested_waiting.insert(ticket);
        }
        submitted
    }

    fn may_nest(&self, account: usize) -> bool {
        let a = &self.accounts[account];
        let part = if self.registered > 1 { (self.config.overdraft / 2).max(1) } else { self.config.overdraft };
        self.config.policy == Policy::Fair
            && a.usage.nested < a.usage.running.min(part)
            && self.nested < self.config.overdraft
            && (a.held_back(self.now).is_none() || a.nested_rate.ready_at(NESTED_RATE) <= self.now)
    }

    /// The first nested work that can go. Looked for only while the overdraft has room.
    fn next_nested(&self) -> Option<Ticket> {
        if self.nested_waiting.is_empty() || self.nested >= self.config.overdraft || self.config.policy == Policy::Fifo
        {
            return None;
        }
        self.nested_waiting.iter().copied().find(|t| self.may_nest(t.account as usize))
    }

    /// Takes a slot if one is free for this tenant now, and never waits.
    pub fn try_start(&mut self, now: Timestamp, tenant: TenantId, class: Class) -> Option<Grant> {
        self.try_at_once(now, tenant, class).ok()
    }

    /// A slot at once, or the account that has to wait for one.
    fn try_at_once(&mut self, now: Timestamp, tenant: TenantId, class: Class) -> Result<Grant, usize> {
        self.advance(now);
        let account = self.account(tenant);
        let (floors, entitlement) = (self.clocks, self.entitlement(account));
        let a = &mut self.accounts[account];
        a.wake(now, entitlement);
        // Whoever wanted nothing that it could have had has no claim on what it did not use.
        match a.ready_as {
            [None, None] => a.clocks.come_to_slots(&floors),
            [None, Some(_)] => a.clocks.come_to_lane(Lane::Short, &floors),
            [Some(_), None] => a.clocks.come_to_lane(Lane::Expensive, &floors),
            [Some(_), Some(_)] => {}
        }
        // Whoever waits cannot go now (their limit, the lane), but this work can: no queue, no ticket.
        if self.may_start(account, class) && (self.waiting == 0 || self.peek().is_none()) {
            let queue = self.queue(account, self.lane(account, class));
            Ok(self.start(account, class, queue, now, false))
        } else {
            Err(account)
        }
    }

    /// The waiting work that gets a slot now, if any. To be called until it returns `None` after each completion,
    /// cancellation, [`advance`](Self::advance) and reconfiguration.
    pub fn next_grant(&mut self, now: Timestamp) -> Option<(Ticket, Grant)> {
        self.now = self.now.max(now);
        let (ticket, queue, nested) = if let Some(ticket) = self.next_nested() {
            let account = ticket.account as usize;
            (ticket, self.queue(account, self.lane(account, ticket.class)), true)
        } else {
            let (account, place) = self.peek()?;
            (self.candidates(account)[place.queue.lane() as usize]?, place.queue, false)
        };
        let waiting = self.take_out(ticket)?;
        let grant = self.start(ticket.account as usize, ticket.class, queue, waiting.since, nested);
        Some((ticket, grant))
    }

    /// Gives a slot back and charges what the work really took.
    pub fn complete(&mut self, now: Timestamp, grant: Grant) {
        self.advance(now);
        if self.running.get(grant.key).is_none_or(|r| r.grant != grant) {
            return;
        }
        let mut run = self.running.remove(grant.key);
        run.pass(now, self.bounds(&run));
        let actual = now.since(run.since).as_secs_f64();
        let calm = run.calm && self.is_calm();
        let cost = run.cost(now);
        let expensive_from = self.config.expensive_from.as_secs_f64();
        self.accounts[run.account].learn(run.class, cost);
        let short = run.queue != Queue::Expensive && cost < expensive_from;
        if !self.concurrency.is_fixed() {
            let baseline = &mut self.accounts[run.account].by_class[run.class as usize].baseline;
            let took = baseline.learn(actual, run.wanted, calm);
            let evidence = took.and_then(|took| Some((self.evidence_of(&run, took)?, took.baseline)));
            let seen = &mut self.accounts[run.account].seen;
            if evidence.is_some_and(|(inflation, baseline)| seen.add(self.window, inflation, baseline)) {
                self.touched.push(run.account);
            }
        }
        self.busy.remove(&run);
        // What computes no more is charged no more either, but not what was only expected of it.
        let worked = if self.is_of_cores(&run) { run.worked(now) } else { run.worked(now).min(run.core_charged.all) };
        let a = &mut self.accounts[run.account];
        if short && !run.nested {
            a.trust = a.trust.saturating_add(1).min(self.config.slots);
        }
        a.usage.used += SlotSeconds(actual);
        a.charge_slots(&mut run, actual, &self.clocks);
        a.charge_cores(&mut run, worked, &self.clocks);
        a.by_class[run.class as usize].running -= 1;
        a.bill(now, actual - run.billed);
        if run.nested {
            self.nested -= 1;
            a.usage.nested -= 1;
        } else {
            self.headroom.pass(now, self.held_by[Queue::First as usize]);
            self.held_by[run.queue as usize] -= 1;
            a.short -= u32::from(run.queue != Queue::Expensive);
            a.lasting -= u32::from(run.lasts);
            self.lasting -= u32::from(run.lasts);
            self.with_reservation(run.account, |a| a.usage.running -= 1);
        }
        let a = &mut self.accounts[run.account];
        if a.usage.running == 0 {
            a.idle_since = now;
        }
        self.rank(run.account);
    }

    /// Takes waiting work out of its queue. False when it was not waiting any more.
    pub fn cancel(&mut self, ticket: Ticket) -> bool {
        let found = self.take_out(ticket).is_some();
        if found {
            self.rank(ticket.account as usize);
        }
        found
    }

    /// Takes waiting work out of its queue; the account is to be ranked afterwards.
    fn take_out(&mut self, ticket: Ticket) -> Option<Waiting> {
        let a = self.accounts.get_mut(ticket.account as usize)?;
        let queue = &mut a.by_class[ticket.class as usize].queue;
        // Nearly always the first.
        let position = queue.iter().position(|w| w.ticket == ticket)?;
        let waiting = queue.remove(position)?;
        if queue.is_empty() {
            a.busy &= !(1 << ticket.class as u16);
        }
        self.deadlines.remove(&(waiting.deadline, ticket));
        if !self.nested_waiting.is_empty() {
            self.nested_waiting.remove(&ticket);
        }
        a.usage.waiting -= 1;
        self.waiting -= 1;
        Some(waiting)
    }

    /// The next waiting work that is not going to be served: its deadline has passed, or it was shed.
    pub fn next_rejected(&mut self, now: Timestamp) -> Option<(Ticket, Rejection)> {
        if let Some(shed) = self.shed.pop() {
            return Some(shed);
        }
        let (deadline, ticket) = *self.deadlines.first()?;
        if deadline > now {
            return None;
        }
        self.expire(now, ticket).map(|r| (ticket, r))
    }

    /// Takes waiting work out of its queue because its deadline has passed, and says why it had to wait.
    /// `None` when it was not waiting any more.
    pub fn expire(&mut self, now: Timestamp, ticket: Ticket) -> Option<Rejection> {
        self.now = self.now.max(now);
        let (account, class) = (ticket.account as usize, ticket.class);
        let since =
            self.accounts.get(account)?.by_class[class as usize].queue.iter().find(|w| w.ticket == ticket)?.since;
        let own = (self.config.policy == Policy::Fair).then(|| self.accounts[account].own_reason(self.now, class));
        let reason = own.flatten().unwrap_or(Reason::GateBusy { slots: self.config.slots });
        self.cancel(ticket);
        Some(self.reject(account, reason, now.since(since)))
    }

    /// The earliest moment at which [`advance`](Self::advance) has something to do that no other call would notice:
    /// a deadline, or a budget that has recovered.
    pub fn next_event(&self) -> Option<Timestamp> {
        let deadline = self.deadlines.first().map(|(d, _)| *d);
        let throttled = self.throttled.first().map(|(t, _)| *t);
        deadline.into_iter().chain(throttled).min()
    }

    /// Lets time pass: charges running work for the time it has run, moves work that turned out to be expensive to the
    /// other lane, lets budgets recover, and adapts the number of slots. Every other call that takes the time does so
    /// too; a gate without traffic wants it about every 100 ms.
    pub fn advance(&mut self, now: Timestamp) {
        self.now = self.now.max(now);
        while let Some(&(at, account)) = self.throttled.first()
            && at <= self.now
        {
            self.throttled.pop_first();
            self.accounts[account].throttled = None;
            self.rank(account);
        }
        if now.since(self.recharged_at) >= charges::EVERY {
            self.recharged_at = now;
            self.recharge();
            self.headroom.step(now, self.held_by[Queue::First as usize]);
            self.open_slots();
        }
        if self.concurrency.is_due(now) {
            self.adapt();
        }
    }

    /// The gate's virtual time, which never goes back.
    pub fn virtual_time(&self) -> f64 {
        self.clocks.slots
    }

    fn account(&mut self, tenant: TenantId) -> usize {
        if let Some(&account) = self.index.get(&tenant) {
            return account;
        }
        let account = self.accounts.len();
        self.accounts.push(Account::new(tenant, self.clocks));
        self.index.insert(tenant, account);
        account
    }

    fn count_registered(&mut self, account: usize, registered: bool) {
        let a = &mut self.accounts[account];
        if a.registered {
            self.registered_weight -= u64::from(a.share.weight);
            self.registered -= 1;
        }
        a.registered = registered;
        if registered {
            self.registered_weight += u64::from(a.share.weight);
            self.registered += 1;
        }
    }

    /// The tenant's part of the slots among all registered tenants, active or not; at least 2, and its reservation.
    fn entitlement(&self, account: usize) -> u32 {
        let share = &self.accounts[account].share;
        let weight = u64::from(share.weight);
        let part = u64::from(self.config.slots) * weight / self.registered_weight.max(weight);
        u32::try_from(part).unwrap_or(u32::MAX).max(share.reserved).max(2)
    }

    /// Begins work out of a queue: the one in which it has waited, which may be another than it would have to wait in now.
    fn start(&mut self, account: usize, class: Class, queue: Queue, since: Timestamp, nested: bool) -> Grant {
        let now = self.now;
        let serial = self.id();
        let calm = self.is_calm();
        if queue == Queue::First {
            self.busy.modest_work_begins(account, now);
        }
        let wants_cores = !nested && queue != Queue::First && self.wants_cores(account, class);
        let core_bound = wants_cores && self.is_core_bound(account, class);
        if wants_cores {
            self.accounts[account].come_to_cores(queue, &self.clocks);
        }
        let (lane, floors) = (queue.lane() as usize, self.clocks);
        let a = &mut self.accounts[account];
        if std::mem::replace(&mut a.core_bound, core_bound) && !core_bound {
            a.clocks.come_to_slots(&floors);
        }
        // Nobody looks at it where that does not matter.
        let looked = self.config.cores.map(|_| &a.by_class[class as usize]);
        let (cores, wanted, waited, gives_way) =
            looked.map_or_else(Default::default, |class| (class.cores, class.wanted, class.waited, class.gives_way));
        // It holds its slot while it waits for cores too, but that is no part of what it costs.
        let cost = f64::from(a.by_class[class as usize].estimate);
        let takes = if core_bound { cost / f64::from(1.0 - waited.min(cores::MOST_WAITED)) } else { cost };
        let own = a.clocks;
        a.usage.granted += 1;
        a.usage.waited += now.since(since);
        a.usage.waits.note(now.since(since));
        a.by_class[class as usize].running += 1;
        let held_back = a.held_back(now).is_some();
        if let Some(rate) = a.share.rate {
            a.rate.take(rate, now);
        }
        if nested {
            if held_back {
                a.nested_rate.take(NESTED_RATE, now);
            }
            self.nested += 1;
            a.usage.nested += 1;
        } else {
            self.headroom.pass(now, self.held_by[Queue::First as usize]);
            self.held_by[queue as usize] += 1;
            a.short += u32::from(queue != Queue::Expensive);
            self.with_reservation(account, |a| a.usage.running += 1);
        }
        if !nested {
            // Not beyond whoever else is next: this one may have gone first for its reservation, or in another queue.
            let least = self.ready_heads().fold(own.slots, f64::min);
            self.clocks.slots = self.clocks.slots.max(least);
            let least = self.lane_heads(queue.lane()).fold(own.lanes[lane], f64::min);
            self.clocks.lanes[lane] = self.clocks.lanes[lane].max(least);
        }
        if wants_cores {
            let least = self.core_heads(queue).fold(own.cores[lane], f64::min);
            self.clocks.cores[lane] = self.clocks.cores[lane].max(least);
        }
        let grant = Grant { key: self.running.vacant_key(), serial, queue };
        let mut run = Running {
            grant: grant.again(),
            account,
            class,
            since: now,
            charged: Charged::default(),
            core_charged: Charged::default(),
            billed: 0.0,
            queue,
            nested,
            calm,
            cores,
            wanted,
            waited,
            lasts: false,
            waited_for: 0.0,
            measured_until: now,
            excused: 0.0,
            bounded_for: 0.0,
            counted_until: now,
            gives_way,
            core_bound,
        };
        let a = &mut self.accounts[account];
        a.charge_slots(&mut run, takes, &self.clocks);
        if wants_cores {
            a.charge_cores(&mut run, cost, &self.clocks);
        }
        self.busy.add(&run);
        self.running.insert(run);
        self.rank(account);
        grant
    }

    /// Why a submission is not even queued.
    fn turned_away(&mut self, account: usize, class: Class, deadline: Timestamp) -> Option<Rejection> {
        let a = &self.accounts[account];
        if a.usage.waiting >= a.share.queue {
            let reason = Reason::QueueFull { queue: a.share.queue };
            return Some(self.reject(account, reason, Duration::ZERO));
        }
        let queue = a.share.classes[class as usize].queue;
        if a.by_class[class as usize].queue.len() as u64 >= u64::from(queue) {
            return Some(self.reject(account, Reason::ClassLimit { class, limit: queue }, Duration::ZERO));
        }
        if let Some((lifts, reason)) = a.held_back(self.now) {
            // Those who wait already go first, one interval each.
            let ahead = a.share.rate.map_or(Duration::ZERO, |r| r.interval() * a.usage.waiting);
            let turn = lifts + ahead;
            if turn > deadline {
                let mut rejection = self.reject(account, reason, Duration::ZERO);
                rejection.retry_after = turn.since(self.now).max(Duration::from_secs(1));
                return Some(rejection);
            }
        }
        (self.waiting >= self.config.queue).then(|| self.shed(account, class)).flatten()
    }

    /// Makes room among the waiting: the tenant furthest over its share loses its youngest work of the lowest class.
    /// Returns a rejection when that is the very work that is being submitted.
    fn shed(&mut self, submitter: usize, class: Class) -> Option<Rejection> {
        let reason = Reason::Shed { queue: self.config.queue };
        let last = self.by_slots.iter().chain([&self.held]).filter_map(BTreeSet::last);
        let furthest = last.max_by(|a, b| a.0.virtual_time.total_cmp(&b.0.virtual_time)).map(|(_, account)| *account);
        let lowest = |a: &Account| Class::ALL.into_iter().rev().find(|c| !a.by_class[*c as usize].queue.is_empty());
        let victim = furthest.filter(|f| {
            let (theirs, mine) = (&self.accounts[*f], &self.accounts[submitter]);
            *f == submitter || theirs.clocks.slots > mine.clocks.slots
        });
        let Some(victim) = victim else { return Some(self.reject(submitter, reason, Duration::ZERO)) };
        let Some(lost) = lowest(&self.accounts[victim]).filter(|lost| victim != submitter || *lost > class) else {
            return Some(self.reject(submitter, reason, Duration::ZERO));
        };
        let Some(waiting) = self.accounts[victim].by_class[lost as usize].queue.back().copied() else {
            return Some(self.reject(submitter, reason, Duration::ZERO));
        };
        self.cancel(waiting.ticket);
        let rejection = self.reject(victim, reason, self.now.since(waiting.since));
        self.shed.push((waiting.ticket, rejection));
        None
    }

    fn reject(&mut self, account: usize, reason: Reason, waited: Duration) -> Rejection {
        let a = &mut self.accounts[account];
        a.usage.rejected += 1;
        let mean = a.usage.used.0 / (a.usage.granted.max(1) as f64);
        let lanes = f64::from(a.share.limit.min(self.config.slots).max(1));
        let seconds = (f64::from(a.usage.waiting + 1) * mean / lanes).clamp(1.0, 60.0);
        Rejection { tenant: a.tenant, reason, waited, retry_after: Duration::from_secs_f64(seconds.ceil()) }
    }

    /// Changes an account and keeps the sum of unmet reservations true.
    fn with_reservation(&mut self, account: usize, change: impl FnOnce(&mut Account)) {
        let a = &mut self.accounts[account];
        self.unmet_reserved -= u64::from(a.unmet_reserved());
        self.reserved -= u64::from(a.share.reserved);
        change(a);
        self.unmet_reserved += u64::from(a.unmet_reserved());
        self.reserved += u64::from(a.share.reserved);
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}
