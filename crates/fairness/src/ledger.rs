//! What couples the planes: a tenant whose database work waits gets fewer Odoo workers.
//!
//! A request that has a worker and whose transaction waits for a slot of the cluster does nothing but hold the worker.
//! With enough of them one tenant has every worker, and the gate of the pool has protected nobody: its slots were
//! handed out fairly to requests that only wait elsewhere. So while a tenant's transactions are queued, its requests
//! wait where waiting costs nothing: at the gateway.
//!
//! The limit falls by half at each observation with queued database work, to no less than what its database work can
//! use; it doubles again as soon as the queue has cleared, and is gone within a second.

use std::collections::HashMap;
use std::time::Duration;

use cofferdam_tenant::TenantId;

use crate::scheduler::Pressure;
use crate::time::Timestamp;

/// When the coupling begins to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LedgerConfig {
    /// A queue that clears faster than this is of no concern.
    pub tolerated_wait: Duration,
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self { tolerated_wait: Duration::from_millis(50) }
    }
}

/// A change of a tenant's limit at the gate of its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Whose limit.
    pub tenant: TenantId,
    /// Requests at once from now on; `None`: as many as its plan allows.
    pub limit: Option<u32>,
}

/// Remembers whose database work is stuck. Sans-IO: feed it what the clusters' gates report, apply what it says to the
/// pools' gates.
///
/// ```
/// use std::time::Duration;
/// use cofferdam_fairness::{Ledger, LedgerConfig, Pressure, Timestamp, Verdict};
/// use cofferdam_tenant::TenantId;
///
/// let mut ledger = Ledger::new(LedgerConfig::default());
/// let stuck = Pressure { tenant: TenantId(7), running: 2, waiting: 6, oldest_wait: Duration::from_secs(1) };
/// // It has 8 requests with workers; two of them have a transaction that runs.
/// let verdicts = ledger.observe(Timestamp::from_millis(100), &[stuck], |_| 8);
/// assert_eq!(verdicts, [Verdict { tenant: TenantId(7), limit: Some(4) }]);
/// ```
#[derive(Debug)]
pub struct Ledger {
    config: LedgerConfig,
    stuck: HashMap<TenantId, Stuck>,
}

#[derive(Debug)]
struct Stuck {
    limit: u32,
    seen: Timestamp,
}

/// A limit that has grown to this is no limit.
const ENOUGH: u32 = 1 << 10;

impl Ledger {
    /// An empty ledger.
    pub fn new(config: LedgerConfig) -> Self {
        Self { config, stuck: HashMap::new() }
    }

    /// Takes in which tenants' database work waits now, and says which limits change. To be called about every 100 ms.
    ///
    /// `in_workers` says how many workers a tenant's requests hold at the moment.
    pub fn observe(
        &mut self,
        now: Timestamp,
        database: &[Pressure],
        in_workers: impl Fn(TenantId) -> u32,
    ) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for p in database.iter().filter(|p| p.waiting > 0 && p.oldest_wait >= self.config.tolerated_wait) {
            // One request per transaction that can run, and one that prepares the next.
            let floor = p.running.saturating_add(1);
            let start = || in_workers(p.tenant).max(floor);
            let stuck = self.stuck.entry(p.tenant).or_insert_with(|| Stuck { limit: start(), seen: now });
            stuck.seen = now;
            stuck.limit = (stuck.limit / 2).max(floor);
            verdicts.push(Verdict { tenant: p.tenant, limit: Some(stuck.limit) });
        }
        self.stuck.retain(|tenant, stuck| {
            if stuck.seen == now {
                return true;
            }
            stuck.limit = stuck.limit.saturating_mul(2);
            let over = stuck.limit >= ENOUGH;
            verdicts.push(Verdict { tenant: *tenant, limit: (!over).then_some(stuck.limit) });
            !over
        });
        verdicts
    }

    /// Tenants whose limit is lowered now.
    pub fn squeezed(&self) -> usize {
        self.stuck.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stuck(waiting: u32) -> Pressure {
        Pressure { tenant: TenantId(1), running: 1, waiting, oldest_wait: Duration::from_millis(500) }
    }

    #[test]
    fn a_stuck_tenant_is_brought_down_to_what_its_database_can_use_and_recovers_within_a_second() {
        let mut ledger = Ledger::new(LedgerConfig::default());
        let mut limit = None;
        for ms in (0..1_000).step_by(100) {
            limit = ledger.observe(Timestamp::from_millis(ms), &[stuck(20)], |_| 40)[0].limit;
        }
        assert_eq!(limit, Some(2), "one transaction that runs, and one that prepares");
        let mut recovered = None;
        for ms in (1_000..3_000).step_by(100) {
            for verdict in ledger.observe(Timestamp::from_millis(ms), &[], |_| 2) {
                if verdict.limit.is_none() {
                    recovered.get_or_insert(ms);
                }
            }
        }
        assert!(recovered.unwrap() < 2_000, "{recovered:?}");
        assert_eq!(ledger.squeezed(), 0);
    }

    #[test]
    fn a_queue_that_clears_at_once_is_no_concern() {
        let mut ledger = Ledger::new(LedgerConfig::default());
        let short = Pressure { oldest_wait: Duration::from_millis(5), ..stuck(3) };
        assert!(ledger.observe(Timestamp::default(), &[short], |_| 3).is_empty());
    }
}
