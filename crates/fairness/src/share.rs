//! What a tenant is entitled to, what kind of work there is, and how a refusal is said.

use std::fmt;
use std::time::Duration;

use cofferdam_tenant::{Class, PerSecond, PlaneQuota, Scheduling, TenantId};

use crate::budget::{Allowance, Rate};

/// How much later than it came work counts when one tenant's own classes compete. A head start and not a strict
/// priority: nothing starves.
pub(crate) fn handicap(class: Class) -> Duration {
    Duration::from_millis(match class {
        Class::Interactive | Class::Static | Class::Websocket | Class::Admin => 0,
        Class::Rpc | Class::Webhook => 50,
        Class::Report => 1_000,
        Class::Bulk | Class::Background => 2_000,
    })
}

/// What work of a class is believed to cost before the first of it was measured, in slot-seconds.
pub(crate) fn first_estimate(class: Class) -> f32 {
    match class {
        Class::Static | Class::Websocket => 0.005,
        Class::Interactive | Class::Rpc | Class::Admin | Class::Webhook => 0.02,
        Class::Report | Class::Bulk => 2.0,
        Class::Background => 0.5,
    }
}

/// In which order waiting work is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Fair between tenants by measured work, with limits, reservations and the hot lane.
    #[default]
    Fair,
    /// First come, first served, without limits per tenant: what other gateways do, for comparison.
    Fifo,
}

impl From<Scheduling> for Policy {
    fn from(scheduling: Scheduling) -> Self {
        match scheduling {
            Scheduling::Fair => Self::Fair,
            Scheduling::Fifo => Self::Fifo,
        }
    }
}

/// The slots of one gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateConfig {
    /// Most work that may run at once.
    pub slots: u32,
    /// Fewest slots that the gate may shrink to when more at once only makes everything slower; equal to `slots` for
    /// a fixed number.
    pub least_slots: u32,
    /// Most slots that expensive work may hold, all tenants together.
    pub expensive_slots: u32,
    /// From this expected or measured cost on, work counts as expensive.
    pub expensive_from: Duration,
    /// Slots beyond `slots` that short work may use while expensive work, mistaken for short, sits on its part; and
    /// that nested work may use (see [`crate::Scheduler::submit_nested`]). 0 where `slots` is a physical bound.
    pub overdraft: u32,
    /// Most cores that storms may keep busy, and most that expensive work may, while other tenants have modest work, as far
    /// as it is known ([`crate::Scheduler::note_cores`]); one piece of each always may, and a few of a storm's for each core where
    /// they give way to others. `None`: as many as they like.
    pub cores: Option<u32>,
    /// Most work that may wait, all tenants together; beyond it, work of the tenant furthest over its share is shed.
    pub queue: u32,
    /// The order.
    pub policy: Policy,
}

impl GateConfig {
    /// With what makes no sense set right: at least one slot, and no more at least than at most.
    pub(crate) fn sane(self) -> Self {
        let slots = self.slots.max(1);
        Self { slots, least_slots: self.least_slots.clamp(1, slots), ..self }
    }

    /// A fair gate with a fixed number of slots, one in sixteen (at least one) kept for short work.
    pub fn slots(slots: u32) -> Self {
        let slots = slots.max(1);
        Self {
            slots,
            least_slots: slots,
            expensive_slots: slots.saturating_sub(slots.div_ceil(16)).max(1),
            expensive_from: Duration::from_millis(250),
            overdraft: 0,
            cores: None,
            queue: 20_000,
            policy: Policy::Fair,
        }
    }
}

/// What one tenant is entitled to at one gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Share under contention, relative to other tenants; at least 1.
    pub weight: u32,
    /// Slots kept free for this tenant while it uses fewer.
    pub reserved: u32,
    /// Slots never exceeded; at least 1.
    pub limit: u32,
    /// Work that may wait.
    pub queue: u32,
    /// Starts per second.
    pub rate: Option<Rate>,
    /// Slot-milliseconds per second.
    pub work: Option<Allowance>,
    /// Bytes per second, both directions together.
    pub bytes: Option<Allowance>,
    /// Bounds per class, by [`Class::index`].
    pub classes: [ClassShare; Class::ALL.len()],
}

/// Bounds of one class of one tenant, within the tenant's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassShare {
    /// Slots never exceeded; at least 1.
    pub limit: u32,
    /// Work that may wait.
    pub queue: u32,
}

impl Default for ClassShare {
    fn default() -> Self {
        Self { limit: u32::MAX, queue: u32::MAX }
    }
}

impl Default for Share {
    fn default() -> Self {
        Self {
            weight: 1,
            reserved: 0,
            limit: u32::MAX,
            queue: 200,
            rate: None,
            work: None,
            bytes: None,
            classes: Default::default(),
        }
    }
}

impl Share {
    /// The share that a plan gives on one plane.
    pub fn from_quota(weight: u32, quota: &PlaneQuota) -> Self {
        let allowance = |p: PerSecond| Allowance { per_second: p.amount, burst: p.burst };
        let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Self {
            weight: weight.max(1),
            reserved: quota.reserved,
            limit: quota.limit.max(1),
            queue: quota.queue,
            rate: quota.rate.map(|r| Rate::per_second(count(r.amount), count(r.burst))),
            work: quota.work.map(allowance),
            bytes: quota.bandwidth.map(allowance),
            classes: quota.classes.map(|c| ClassShare { limit: c.limit.max(1), queue: c.queue }),
        }
    }
}

/// Why work was not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The tenant already has as much work waiting as its plan allows.
    QueueFull {
        /// Work that may wait.
        queue: u32,
    },
    /// The deadline passed while the tenant was at its own limit of slots.
    TenantLimit {
        /// Slots the tenant may use.
        limit: u32,
    },
    /// The class of work already has as much running or waiting as the plan allows it.
    ClassLimit {
        /// The class.
        class: Class,
        /// Work of the class that may run, or wait.
        limit: u32,
    },
    /// More starts per second than the plan allows.
    RateLimit {
        /// Starts per second.
        per_second: u32,
    },
    /// More seconds of work than the plan allows were used.
    WorkBudget {
        /// Slot-milliseconds per second.
        per_second: u64,
    },
    /// More bytes than the plan allows were moved.
    ByteBudget {
        /// Bytes per second.
        per_second: u64,
    },
    /// The tenant's own database work is queued; until it clears, no more of its requests are let through to wait for
    /// it inside a worker.
    DatabaseQueued {
        /// Requests at once meanwhile.
        limit: u32,
    },
    /// The deadline passed while the gate was busy with others.
    GateBusy {
        /// Slots of the gate.
        slots: u32,
    },
    /// The gate has as much waiting as it can hold, and this tenant is the furthest over its share.
    Shed {
        /// Work that may wait, all tenants together.
        queue: u32,
    },
}

/// Work that was not admitted: who, why, after what wait, and when to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub struct Rejection {
    /// Whose work it was.
    pub tenant: TenantId,
    /// Why.
    pub reason: Reason,
    /// How long it had waited.
    pub waited: Duration,
    /// When trying again has a chance.
    pub retry_after: Duration,
}

impl Rejection {
    /// Whether the tenant's own quota is the cause (HTTP 429), and not the gate's load (HTTP 503).
    pub fn is_own_quota(&self) -> bool {
        !matches!(self.reason, Reason::GateBusy { .. } | Reason::Shed { .. })
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waited = self.waited.as_secs_f64();
        match self.reason {
            Reason::QueueFull { queue } => write!(f, "the tenant's queue is full (limit {queue} waiting)")?,
            Reason::TenantLimit { limit } => {
                write!(f, "the tenant's limit of {limit} at once was in use for {waited:.1} s")?;
            }
            Reason::ClassLimit { class, limit } => {
                write!(f, "the tenant's limit of {limit} for {} work was in use for {waited:.1} s", class.as_str())?;
            }
            Reason::RateLimit { per_second } => {
                write!(f, "the tenant's limit of {per_second} a second is used up (waited {waited:.1} s)")?;
            }
            Reason::WorkBudget { per_second } => {
                let seconds = per_second as f64 / 1000.0;
                write!(f, "the tenant's budget of {seconds} s of work a second is used up (waited {waited:.1} s)")?;
            }
            Reason::ByteBudget { per_second } => {
                write!(f, "the tenant's budget of {per_second} bytes a second is used up (waited {waited:.1} s)")?;
            }
            Reason::DatabaseQueued { limit } => {
                write!(
                    f,
                    "the tenant's database work is queued, so it may have {limit} at once for now; waited {waited:.1} s"
                )?;
            }
            Reason::Shed { queue } => {
                write!(
                    f,
                    "the queue of all tenants is full (limit {queue}) and this tenant is furthest over its share"
                )?;
            }
            Reason::GateBusy { slots } => write!(f, "all {slots} slots were busy for {waited:.1} s")?,
        }
        write!(f, "; try again in {} s", self.retry_after.as_secs().max(1))
    }
}
