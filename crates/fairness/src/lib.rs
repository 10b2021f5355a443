//! Who goes next: fair scheduling of execution slots between tenants, charged in measured seconds of work.
//!
//! A pool of Odoo workers or a PostgreSQL cluster has N *slots*. Work arrives as (tenant, class, deadline); what it
//! costs is known only afterwards, as slot-seconds. [`Scheduler`] decides who gets the next free slot. It is sans-IO:
//! no socket, no runtime, no clock; time comes in as a [`Timestamp`]. [`Gate`] is the thin, cancel-safe `async` shell
//! around it, for any executor (feature `gate`, on by default).
//!
//! The order is start-time fair queueing (Goyal, Vin, Cheng: *Start-time Fair Queuing*, 1996) over a black box of N
//! servers (Jin, Chase, Kaur: *SFQ(D)*, 2004) with costs estimated before and corrected after; plus a guaranteed and a
//! greatest number of slots per tenant, bounded queues with deadlines, and a *hot lane*: work that is expected to be
//! expensive may hold only some of the slots, because running work cannot be preempted and ordering alone does not
//! protect short work from it.
//!
//! ```
//! use cofferdam_fairness::{Class, GateConfig, Scheduler, Share, Submitted, Timestamp};
//! use cofferdam_tenant::TenantId;
//!
//! let mut scheduler = Scheduler::new(GateConfig::slots(1));
//! scheduler.register(TenantId(0), Share::default());
//! let now = Timestamp::from_millis(0);
//! let deadline = Timestamp::from_millis(1_000);
//! let Submitted::Granted(first) = scheduler.submit(now, TenantId(0), Class::Rpc, deadline) else { panic!() };
//! let Submitted::Queued(second) = scheduler.submit(now, TenantId(0), Class::Rpc, deadline) else { panic!() };
//! scheduler.complete(Timestamp::from_millis(10), first);
//! assert_eq!(scheduler.next_grant(Timestamp::from_millis(10)).unwrap().0, second);
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod adaptive;
mod breaker;
mod budget;
#[cfg(feature = "gate")]
mod gate;
#[cfg(feature = "gate")]
mod gate_set;
mod ledger;
mod scheduler;
mod share;
#[cfg(feature = "simulator")]
pub mod simulator;
#[cfg(feature = "gate")]
mod sync;
mod time;

pub use breaker::{Breaker, BreakerConfig, RetryBudget};
pub use budget::{Allowance, Gcra, Postpaid, Rate};
pub use cofferdam_tenant::Class;
#[cfg(feature = "gate")]
pub use gate::{Acquire, Gate, Permit, Watch};
#[cfg(feature = "gate")]
pub use gate_set::{GateSet, GateSpec};
pub use ledger::{Ledger, LedgerConfig, Verdict};
pub use scheduler::{Grant, OnCores, Pressure, Queue, Scheduler, Submitted, TenantUsage, Ticket, Usage, Waits};
pub use share::{ClassShare, GateConfig, Policy, Reason, Rejection, Share};
#[cfg(feature = "gate")]
pub use time::{Clock, MonotonicClock};
pub use time::{SlotSeconds, Timestamp};
