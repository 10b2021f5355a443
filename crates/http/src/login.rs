//! Guards logins against guessing: who was wrong too often waits, and ever longer.
//!
//! Whoever knows the password is not kept out by somebody else's wrong ones: failures count for an address and a login
//! together, and an address that has logged in before is not touched by what others do to its tenant.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cofferdam_fairness::Timestamp;
use cofferdam_tenant::{LoginProtectionConfig, Network, TenantId};
use moka::ops::compute::Op;
use moka::sync::Cache;
use std::collections::HashMap;

/// Addresses and logins that are remembered; whoever fills this has been waiting for long.
const REMEMBERED: u64 = 100_000;

/// How long a failure is remembered that nothing follows.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3_600);

/// How long an address that has logged in counts as known.
const KNOWN_FOR: Duration = Duration::from_secs(30 * 24 * 3_600);

/// So many more failures are allowed to an address than to a login from it: a whole office may be behind one.
const PER_ADDRESS: u32 = 10;

/// Logins that are being tried, and that have failed.
#[derive(Debug)]
pub(crate) struct Logins {
    failures: Cache<Key, Failures>,
    known: Cache<(TenantId, IpAddr), ()>,
    /// Failures of each tenant within the minute that began then.
    minutes: Mutex<HashMap<TenantId, (Timestamp, u32)>>,
}

/// `None` for all logins from an address.
type Key = (TenantId, IpAddr, Option<u64>);

#[derive(Debug, Clone, Copy)]
struct Failures {
    count: u32,
    /// When the next may be tried.
    next: Timestamp,
}

/// A login that is being tried. From an address that has never logged in it counts as failed until it is known to be right, or
/// a thousand at once would all be first.
#[derive(Debug)]
pub(crate) struct Trial {
    tenant: TenantId,
    address: IpAddr,
    keys: [Key; 2],
    /// Whether it counts as failed already.
    is_counted: bool,
}

impl Default for Logins {
    fn default() -> Self {
        let failures = Cache::builder().max_capacity(REMEMBERED).time_to_idle(FORGOTTEN_AFTER).build();
        let known = Cache::builder().max_capacity(REMEMBERED).time_to_idle(KNOWN_FOR).build();
        Self { failures, known, minutes: Mutex::default() }
    }
}

impl Logins {
    /// Begins a trial, or says how long it has to wait. `login` in any spelling that Odoo takes for the same.
    pub(crate) fn begin(
        &self,
        config: &LoginProtectionConfig,
        tenant: TenantId,
        address: IpAddr,
        login: &str,
        counts_at_once: bool,
        now: Timestamp,
    ) -> Result<Option<Trial>, Duration> {
        if config.attempts == 0 || Network::any(&config.trusted, address) {
            return Ok(None);
        }
        let address = Network::of_one_client(address);
        let keys = [(tenant, address, Some(fingerprint(login))), (tenant, address, None)];
        let waits = keys.iter().filter_map(|key| self.failures.get(key)).map(|f| f.next.since(now)).max();
        if let Some(wait) = waits.filter(|wait| !wait.is_zero()) {
            return Err(wait);
        }
        let known = self.known.contains_key(&(tenant, address));
        if !known {
            let minutes = self.minutes.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((begun, count)) = minutes.get(&tenant)
                && *count >= config.per_minute
                && let left = (*begun + MINUTE).since(now)
                && !left.is_zero()
            {
                return Err(left);
            }
        }
        let trial = Trial { tenant, address, keys, is_counted: counts_at_once && !known };
        if trial.is_counted {
            self.count(config, &trial, now);
        }
        Ok(Some(trial))
    }

    fn count(&self, config: &LoginProtectionConfig, trial: &Trial, now: Timestamp) {
        for (key, allowed) in trial.keys.iter().zip([config.attempts, config.attempts.saturating_mul(PER_ADDRESS)]) {
            self.change(key, |failures| {
                let count = failures.map_or(0, |f| f.count).saturating_add(1);
                Some(Failures { count, next: now + delay(config, count, allowed) })
            });
        }
    }

    /// Ends a trial: it was right, it was wrong, or nobody knows.
    pub(crate) fn end(&self, config: &LoginProtectionConfig, trial: &Trial, right: Option<bool>, now: Timestamp) {
        match right {
            Some(true) => {
                // One right login says nothing about the others from its address.
                self.failures.invalidate(&trial.keys[0]);
                self.uncount(&trial.keys[1], trial, now);
                self.known.insert((trial.tenant, trial.address), ());
            }
            Some(false) => {
                if !trial.is_counted {
                    self.count(config, trial, now);
                }
                let mut minutes = self.minutes.lock().unwrap_or_else(PoisonError::into_inner);
                let minute = minutes.entry(trial.tenant).or_insert((now, 0));
                if now.since(minute.0) >= MINUTE {
                    *minute = (now, 0);
                }
                minute.1 += 1;
            }
            None => {
                for key in &trial.keys {
                    self.uncount(key, trial, now);
                }
            }
        }
    }

    /// Ends a trial of something that must only not be asked for too often.
    pub(crate) fn used(&self, config: &LoginProtectionConfig, trial: &Trial, now: Timestamp) {
        if !trial.is_counted {
            self.count(config, trial, now);
        }
    }

    fn uncount(&self, key: &Key, trial: &Trial, now: Timestamp) {
        if trial.is_counted {
            self.change(key, |failures| {
                let count = failures.map_or(0, |f| f.count).saturating_sub(1);
                (count > 0).then_some(Failures { count, next: now })
            });
        }
    }

    fn change(&self, key: &Key, change: impl FnOnce(Option<Failures>) -> Option<Failures>) {
        self.failures.entry(*key).and_compute_with(|entry| match change(entry.map(moka::Entry::into_value)) {
            Some(failures) => Op::Put(failures),
            None => Op::Remove,
        });
    }
}

const MINUTE: Duration = Duration::from_secs(60);

/// How long to wait after so many failures.
fn delay(config: &LoginProtectionConfig, failures: u32, allowed: u32) -> Duration {
    let Some(beyond) = failures.checked_sub(allowed) else { return Duration::ZERO };
    let factor = 1u32.checked_shl(beyond).unwrap_or(u32::MAX);
    config.first_delay.0.saturating_mul(factor).min(config.longest_delay.0)
}

/// What is remembered of a login: not what was typed, which may be a password in the wrong field.
fn fingerprint(login: &str) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    use std::sync::OnceLock;
    static STATE: OnceLock<RandomState> = OnceLock::new();
    STATE.get_or_init(RandomState::new).hash_one(login.trim().to_lowercase())
}

#[cfg(test)]
mod tests {
    use cofferdam_tenant::HumanDuration;

    use super::*;

    const ACME: TenantId = TenantId(0);
    const BOLT: TenantId = TenantId(1);

    fn config() -> LoginProtectionConfig {
        LoginProtectionConfig {
            attempts: 3,
            first_delay: HumanDuration(Duration::from_secs(2)),
            longest_delay: HumanDuration(Duration::from_secs(60)),
            per_minute: 20,
            trusted: vec![Network::parse("10.0.0.0/8").unwrap()],
        }
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    /// Tries and fails; the wait that the next would have is what is given.
    fn fail(logins: &Logins, tenant: TenantId, from: IpAddr, login: &str, now: Timestamp) -> Result<(), Duration> {
        let trial = logins.begin(&config(), tenant, from, login, true, now)?;
        if let Some(trial) = trial {
            logins.end(&config(), &trial, Some(false), now);
        }
        Ok(())
    }

    #[test]
    fn the_wait_doubles_with_each_failure_and_has_an_end() {
        let logins = Logins::default();
        let mut now = 0;
        let mut waits = Vec::new();
        for _ in 0..10 {
            while let Err(wait) = fail(&logins, ACME, address(1), "admin", at(now)) {
                waits.push(wait.as_secs());
                now += wait.as_secs();
            }
        }
        assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn a_right_password_is_not_kept_waiting_by_the_wrong_ones_of_others() {
        let logins = Logins::default();
        for _ in 0..3 {
            fail(&logins, ACME, address(1), "admin", at(0)).unwrap();
        }
        assert!(fail(&logins, ACME, address(1), " ADMIN", at(0)).is_err());
        for (tenant, from, login) in
            [(ACME, address(2), "admin"), (ACME, address(1), "demo"), (BOLT, address(1), "admin")]
        {
            let trial = logins.begin(&config(), tenant, from, login, true, at(0)).unwrap().unwrap();
            logins.end(&config(), &trial, Some(true), at(0));
        }
    }

    #[test]
    fn a_success_or_an_answer_that_says_nothing_leaves_no_trace() {
        let logins = Logins::default();
        for right in [Some(true), None] {
            for _ in 0..20 {
                let trial = logins.begin(&config(), ACME, address(1), "admin", true, at(0)).unwrap().unwrap();
                logins.end(&config(), &trial, right, at(0));
            }
        }
        fail(&logins, ACME, address(1), "admin", at(0)).unwrap();
    }

    #[test]
    fn trials_at_the_same_time_count_before_they_have_ended() {
        let logins = Logins::default();
        let begun: Vec<_> = (0..10).map(|_| logins.begin(&config(), ACME, address(1), "admin", true, at(0))).collect();
        assert_eq!(begun.iter().filter(|b| b.is_ok()).count(), 3);
    }

    #[test]
    fn many_addresses_are_slowed_down_together_but_not_those_that_are_known_or_trusted() {
        let logins = Logins::default();
        let trial = logins.begin(&config(), ACME, address(200), "demo", true, at(0)).unwrap().unwrap();
        logins.end(&config(), &trial, Some(true), at(0));
        for n in 0..20 {
            fail(&logins, ACME, address(n), "admin", at(1)).unwrap();
        }
        assert_eq!(fail(&logins, ACME, address(100), "admin", at(11)), Err(Duration::from_secs(50)));
        assert_eq!(fail(&logins, ACME, address(200), "demo", at(11)), Ok(()));
        assert_eq!(fail(&logins, ACME, IpAddr::from([10, 0, 0, 1]), "admin", at(11)), Ok(()));
        assert_eq!(fail(&logins, BOLT, address(100), "admin", at(11)), Ok(()));
        assert_eq!(fail(&logins, ACME, address(100), "admin", at(61)), Ok(()));
    }

    #[test]
    fn one_network_of_ipv6_is_one_address() {
        let logins = Logins::default();
        let from = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
        for n in 0..3 {
            fail(&logins, ACME, from(n), "admin", at(0)).unwrap();
        }
        assert!(fail(&logins, ACME, from(9), "admin", at(0)).is_err());
    }
}
