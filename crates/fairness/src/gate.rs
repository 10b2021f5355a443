//! The asynchronous shell around the scheduler: wait for a slot, hold it, give it back by dropping it.
//!
//! Works on any executor: it uses only wakers and one short lock that is never held across an await. Timers belong to
//! the caller, who bounds the wait and then asks [`Acquire::give_up`] for the reason.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use cofferdam_tenant::{Class, TenantId};
use rustc_hash::FxHashMap;

use crate::scheduler::{Grant, OnCores, Pressure, Queue, Scheduler, Submitted, TenantUsage, Ticket, Usage};
use crate::share::{GateConfig, Rejection, Share};
use crate::sync::{Arc, Mutex, MutexGuard};
use crate::time::{Clock, Timestamp};

/// The slots of one pool or cluster, shared by all tasks that need one.
pub struct Gate {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
}

struct State {
    scheduler: Scheduler,
    waiters: FxHashMap<Ticket, Waiter>,
}

enum Waiter {
    Waiting(Option<Waker>),
    Granted(Grant),
    Rejected(Rejection),
}

impl Gate {
    /// A gate with these slots.
    pub fn new(config: GateConfig, clock: Arc<dyn Clock>) -> Arc<Self> {
        let state = State { scheduler: Scheduler::new(config), waiters: FxHashMap::default() };
        Arc::new(Self { state: Mutex::new(state), clock })
    }

    /// Asks for a slot for one piece of work, waiting at most `max_wait`.
    ///
    /// Nothing happens until the future is polled. **Cancel-safe**: dropping it takes the work out of the queue, and
    /// a slot that was just handed over goes to the next in line. The future does not wake itself when `max_wait` is
    /// over: bound it with the runtime's timer and call [`Acquire::give_up`]; meanwhile the scheduler will not
    /// grant the slot to work whose time is over.
    pub fn acquire(self: &Arc<Self>, tenant: TenantId, class: Class, max_wait: Duration) -> Acquire {
        Acquire { gate: Arc::clone(self), tenant, class, max_wait, nested: false, stage: Stage::New }
    }

    /// Asks for a slot for work without which work that already holds a slot of the tenant cannot finish. See
    /// [`Scheduler::submit_nested`].
    pub fn acquire_nested(self: &Arc<Self>, tenant: TenantId, class: Class, max_wait: Duration) -> Acquire {
        let mut acquire = self.acquire(tenant, class, max_wait);
        acquire.nested = true;
        acquire
    }

    /// Takes a slot only if one is free for this tenant now.
    pub fn try_acquire(self: &Arc<Self>, tenant: TenantId, class: Class) -> Option<Permit> {
        let now = self.clock.now();
        let mut state = self.lock();
        let grant = state.scheduler.try_start(now, tenant, class);
        self.hand_out(state);
        grant.map(|grant| Permit::new(self, tenant, class, now, grant))
    }

    /// Changes the slots; work that fits now is started.
    pub fn configure(&self, config: GateConfig) {
        let mut state = self.lock();
        state.scheduler.configure(config);
        self.hand_out(state);
    }

    /// Registers tenants or changes their shares.
    pub fn register(&self, shares: impl IntoIterator<Item = (TenantId, Share)>) {
        let mut state = self.lock();
        for (tenant, share) in shares {
            if state.scheduler.share(tenant) != Some(share) {
                state.scheduler.register(tenant, share);
            }
        }
        self.hand_out(state);
    }

    /// Forgets what tenants are entitled to here.
    pub fn unregister(&self, tenants: impl IntoIterator<Item = TenantId>) {
        let mut state = self.lock();
        for tenant in tenants {
            state.scheduler.unregister(tenant);
        }
        self.hand_out(state);
    }

    /// Lets time pass: see [`Scheduler::advance`]. To be called about every 50 to 100 ms.
    pub fn advance(&self) {
        let now = self.clock.now();
        let mut state = self.lock();
        state.scheduler.advance(now);
        self.hand_out(state);
    }

    /// Lowers a tenant's limit while its work elsewhere is stuck; `None` lifts that.
    pub fn squeeze(&self, tenant: TenantId, limit: Option<u32>) {
        let mut state = self.lock();
        state.scheduler.squeeze(tenant, limit);
        self.hand_out(state);
    }

    /// Charges bytes that were moved for a tenant to its byte budget.
    pub fn charge_bytes(&self, tenant: TenantId, bytes: u64) {
        let now = self.clock.now();
        self.lock().scheduler.charge_bytes(now, tenant, bytes);
    }

    /// The tenants whose work waits now.
    pub fn pressures(&self) -> Vec<Pressure> {
        let now = self.clock.now();
        self.lock().scheduler.pressures(now)
    }

    /// What the gate is doing.
    pub fn usage(&self) -> Usage {
        self.lock().scheduler.usage()
    }

    /// What one tenant uses of the gate.
    pub fn tenant_usage(&self, tenant: TenantId) -> TenantUsage {
        let now = self.clock.now();
        self.lock().scheduler.tenant_usage(now, tenant)
    }

    /// The slots as configured.
    pub fn config(&self) -> GateConfig {
        self.lock().scheduler.config()
    }

    fn release(&self, grant: Grant) {
        let now = self.clock.now();
        let mut state = self.lock();
        state.scheduler.complete(now, grant);
        self.hand_out(state);
    }

    /// Gives free slots to whoever is next, and wakes them after the lock is released.
    fn hand_out(&self, mut state: MutexGuard<'_, State>) {
        if state.waiters.is_empty() {
            return;
        }
        let now = self.clock.now();
        let mut woken = Vec::new();
        while let Some((ticket, rejection)) = state.scheduler.next_rejected(now) {
            woken.extend(state.settle(now, ticket, Waiter::Rejected(rejection)));
        }
        while let Some((ticket, grant)) = state.scheduler.next_grant(now) {
            woken.extend(state.settle(now, ticket, Waiter::Granted(grant)));
        }
        drop(state);
        woken.into_iter().for_each(Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The scheduler never panics half-way by design; if it did, going on beats stopping every tenant.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("usage", &self.usage()).finish_non_exhaustive()
    }
}

impl State {
    fn settle(&mut self, now: Timestamp, ticket: Ticket, outcome: Waiter) -> Option<Waker> {
        // Whoever has left meanwhile wants to hear nothing; a slot that was handed over goes back.
        let Some(waiter) = self.waiters.get_mut(&ticket) else {
            if let Waiter::Granted(grant) = outcome {
                self.scheduler.complete(now, grant);
            }
            return None;
        };
        match std::mem::replace(waiter, outcome) {
            Waiter::Waiting(waker) => waker,
            _ => None,
        }
    }
}

/// Waiting for a slot. See [`Gate::acquire`].
#[must_use = "futures do nothing unless polled"]
pub struct Acquire {
    gate: Arc<Gate>,
    tenant: TenantId,
    class: Class,
    max_wait: Duration,
    nested: bool,
    stage: Stage,
}

enum Stage {
    New,
    Waiting(Ticket),
    Done,
}

impl Acquire {
    /// Ends the wait because its time is over, and says why the slot was not to be had. A slot that was handed over
    /// at the last moment is taken instead.
    pub fn give_up(mut self) -> Result<Permit, Rejection> {
        let Stage::Waiting(ticket) = std::mem::replace(&mut self.stage, Stage::Done) else {
            // Never polled: nothing was asked for, so the shortest truthful answer is "busy".
            let reason = crate::Reason::GateBusy { slots: self.gate.config().slots };
            let zero = Duration::ZERO;
            return Err(Rejection { tenant: self.tenant, reason, waited: zero, retry_after: Duration::from_secs(1) });
        };
        let now = self.gate.clock.now();
        let mut state = self.gate.lock();
        match state.waiters.remove(&ticket) {
            Some(Waiter::Granted(grant)) => {
                drop(state);
                Ok(Permit::new(&self.gate, self.tenant, self.class, now, grant))
            }
            Some(Waiter::Rejected(rejection)) => Err(rejection),
            _ => {
                let rejection = state.scheduler.expire(now, ticket);
                // Its leaving may have been all that a younger one of the same tenant waited for.
                self.gate.hand_out(state);
                Err(rejection.unwrap_or(Rejection {
                    tenant: self.tenant,
                    reason: crate::Reason::GateBusy { slots: self.gate.config().slots },
                    waited: self.max_wait,
                    retry_after: Duration::from_secs(1),
                }))
            }
        }
    }
}

impl Future for Acquire {
    type Output = Result<Permit, Rejection>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let now = this.gate.clock.now();
        let mut state = this.gate.lock();
        match this.stage {
            Stage::New => {
                let deadline = now + this.max_wait;
                let submitted = if this.nested {
                    state.scheduler.submit_nested(now, this.tenant, this.class, deadline)
                } else {
                    state.scheduler.submit(now, this.tenant, this.class, deadline)
                };
                let outcome = match submitted {
                    Submitted::Granted(grant) => Ok(grant),
                    Submitted::Rejected(rejection) => Err(rejection),
                    Submitted::Queued(ticket) => {
                        state.waiters.insert(ticket, Waiter::Waiting(Some(cx.waker().clone())));
                        this.stage = Stage::Waiting(ticket);
                        // Others may have been shed for it, or time may have opened slots.
                        this.gate.hand_out(state);
                        return Poll::Pending;
                    }
                };
                this.stage = Stage::Done;
                this.gate.hand_out(state);
                Poll::Ready(outcome.map(|grant| Permit::new(&this.gate, this.tenant, this.class, now, grant)))
            }
            Stage::Waiting(ticket) => {
                if let Some(Waiter::Waiting(waker)) = state.waiters.get_mut(&ticket) {
                    match waker {
                        Some(w) if w.will_wake(cx.waker()) => {}
                        _ => *waker = Some(cx.waker().clone()),
                    }
                    Poll::Pending
                } else {
                    this.stage = Stage::Done;
                    match state.waiters.remove(&ticket) {
                        Some(Waiter::Granted(grant)) => {
                            drop(state);
                            Poll::Ready(Ok(Permit::new(&this.gate, this.tenant, this.class, now, grant)))
                        }
                        Some(Waiter::Rejected(rejection)) => Poll::Ready(Err(rejection)),
                        _ => Poll::Pending,
                    }
                }
            }
            Stage::Done => Poll::Pending,
        }
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        if let Stage::Waiting(ticket) = self.stage {
            let now = self.gate.clock.now();
            let mut state = self.gate.lock();
            match state.waiters.remove(&ticket) {
                Some(Waiter::Granted(grant)) => state.scheduler.complete(now, grant),
                Some(Waiter::Waiting(_)) => {
                    state.scheduler.cancel(ticket);
                }
                _ => {}
            }
            self.gate.hand_out(state);
        }
    }
}

impl fmt::Debug for Acquire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acquire").field("tenant", &self.tenant).field("class", &self.class).finish_non_exhaustive()
    }
}

/// A slot, held. Dropping it gives it back and charges the time it was held.
pub struct Permit {
    gate: Arc<Gate>,
    tenant: TenantId,
    class: Class,
    since: Timestamp,
    queue: Queue,
    grant: Option<Grant>,
}

impl Permit {
    fn new(gate: &Arc<Gate>, tenant: TenantId, class: Class, since: Timestamp, grant: Grant) -> Self {
        Self { gate: Arc::clone(gate), tenant, class, since, queue: grant.queue(), grant: Some(grant) }
    }

    /// Whose slot it is.
    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// The kind of work it was taken for.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Out of which queue it was granted.
    pub fn queue(&self) -> Queue {
        self.queue
    }

    /// For whoever can see what the work keeps busy while it runs.
    pub fn watch(&self) -> Option<Watch> {
        self.grant.as_ref().map(|grant| Watch { gate: Arc::clone(&self.gate), work: grant.again() })
    }

    /// How long it has been held.
    pub fn held(&self) -> Duration {
        self.gate.clock.now().since(self.since)
    }
}

/// Running work, told apart from what runs later in its slot. Holds no slot.
pub struct Watch {
    gate: Arc<Gate>,
    work: Grant,
}

impl Watch {
    /// Says what the work wants of the machine's cores. See [`Scheduler::note_cores`]. Nothing happens when it is over. Wakes who gets a slot by that, so no lock may be held.
    pub fn note_cores(&self, seen: OnCores) -> Option<Queue> {
        let mut state = self.gate.lock();
        let counts_as = state.scheduler.note_cores(&self.work, seen);
        self.gate.hand_out(state);
        counts_as
    }

    /// Says that nobody can see what the work keeps busy. See [`Scheduler::forget_cores`].
    pub fn forget_cores(&self) {
        let mut state = self.gate.lock();
        state.scheduler.forget_cores(&self.work);
        self.gate.hand_out(state);
    }
}

impl Clone for Watch {
    fn clone(&self) -> Self {
        Self { gate: Arc::clone(&self.gate), work: self.work.again() }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("work", &self.work).finish_non_exhaustive()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(grant) = self.grant.take() {
            self.gate.release(grant);
        }
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit").field("tenant", &self.tenant).field("class", &self.class).finish_non_exhaustive()
    }
}
