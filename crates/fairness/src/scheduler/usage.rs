//! What a scheduler says of itself.

use std::time::Duration;

use cofferdam_tenant::{Class, TenantId};

use super::Scheduler;
use super::account::{Queue, TenantUsage};
use crate::time::Timestamp;

/// What a gate is doing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Usage {
    /// Slots in all, as configured.
    pub slots: u32,
    /// Slots that are worth using now: fewer than configured when more only made everything slower.
    pub open_slots: u32,
    /// Of these, open to expensive work.
    pub open_expensive: u32,
    /// Slots held.
    pub running: u32,
    /// Of these, by expensive work.
    pub expensive: u32,
    /// Slots held beside these by nested work.
    pub nested: u32,
    /// Work waiting.
    pub waiting: u32,
    /// Cores that storms and expensive work keep busy or wait for, as far as somebody has said so
    /// ([`Scheduler::note_cores`]); of storms that give way it may be more than there are.
    pub busy_cores: f64,
    /// How many times longer work took lately than on a nearly empty gate; the mean over active tenants. 1 when
    /// unknown, and when the number of slots is fixed.
    pub inflation: f64,
}

/// A tenant whose work waits, as [`Scheduler::pressures`] reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pressure {
    /// Whose work.
    pub tenant: TenantId,
    /// Slots held.
    pub running: u32,
    /// Work waiting.
    pub waiting: u32,
    /// How long the first of it has waited.
    pub oldest_wait: Duration,
}

impl Scheduler {
    /// What the gate is doing.
    pub fn usage(&self) -> Usage {
        Usage {
            slots: self.config.slots,
            open_slots: self.open.slots,
            open_expensive: self.open.expensive,
            running: self.in_slots(),
            expensive: self.held_by[Queue::Expensive as usize],
            nested: self.nested,
            waiting: self.waiting,
            busy_cores: self.busy.cores(),
            inflation: self.inflation.exp(),
        }
    }

    /// What one tenant uses, running work included up to `now`.
    pub fn tenant_usage(&self, now: Timestamp, tenant: TenantId) -> TenantUsage {
        let Some(&account) = self.index.get(&tenant) else { return TenantUsage::default() };
        let a = &self.accounts[account];
        let mut usage = a.usage;
        usage.squeezed_to = a.squeeze;
        usage.throttled = a.held_back(now).is_some();
        usage.work_balance = a.share.work.map(|w| a.work.balance(w, now));
        for (_, run) in self.running.iter().filter(|(_, r)| r.account == account) {
            usage.used += now.since(run.since).into();
        }
        usage
    }

    /// The tenants whose work waits now, as far as somebody waits for it: jobs in the background do not count.
    pub fn pressures(&self, now: Timestamp) -> Vec<Pressure> {
        let mut accounts: Vec<usize> =
            self.ready.iter().flatten().chain(&self.held).map(|(_, account)| *account).collect();
        accounts.sort_unstable();
        accounts.dedup();
        let describe = |account: usize| {
            let a = &self.accounts[account];
            let somebody_waits = |c: &Class| !matches!(c, Class::Background | Class::Bulk | Class::Admin);
            let queues = || Class::ALL.into_iter().filter(somebody_waits).map(|c| &a.by_class[c as usize].queue);
            let since = queues().filter_map(|q| q.front()).map(|w| w.since).min()?;
            Some(Pressure {
                tenant: a.tenant,
                running: a.usage.running + a.usage.nested,
                waiting: queues().map(|q| q.len() as u32).sum(),
                oldest_wait: now.since(since),
            })
        };
        accounts.into_iter().filter_map(describe).collect()
    }
}
