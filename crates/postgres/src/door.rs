//! Who may knock how often: clients that have not proved yet who they are, per address (rule 20), and logins per tenant.
//!
//! Whoever shows the right password is never kept waiting for somebody else's wrong ones: a wrong password is answered
//! late, and the later the more of them came from the address for the role. Guessing is slow because every address
//! has only so many guesses under way. See `docs/decisions/0012-wrong-passwords-are-answered-late.md`.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_fairness::{Gcra, Rate, Timestamp};
use cofferdam_tenant::TenantId;

/// The first wrong password is answered so late; each further one twice as late.
const FIRST_DELAY: Duration = Duration::from_millis(250);
const LONGEST_DELAY: Duration = Duration::from_secs(8);
/// How often somebody without a place looks whether there is one.
const KNOCK_AGAIN: Duration = Duration::from_millis(20);
/// After this long without a wrong password an address starts afresh.
const FORGIVEN: Duration = Duration::from_secs(600);
/// When there are too many, only those that came within this time are remembered.
const RECENT: Duration = Duration::from_secs(30);
/// Addresses and roles remembered.
const REMEMBERED: usize = 10_000;

/// Who is at the door.
#[derive(Debug, Default)]
pub(crate) struct Door {
    knocking: Mutex<HashMap<IpAddr, u32>>,
    failures: Mutex<HashMap<u64, Failures>>,
    hasher: RandomState,
    rates: Mutex<HashMap<TenantId, Gcra>>,
}

#[derive(Debug, Clone, Copy)]
struct Failures {
    count: u32,
    last: Instant,
}

/// A place of an address among those who have not proved who they are.
#[derive(Debug)]
pub(crate) struct Knock {
    door: Arc<Door>,
    address: IpAddr,
}

impl Drop for Knock {
    fn drop(&mut self) {
        let mut knocking = lock(&self.door.knocking);
        if let Some(count) = knocking.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                knocking.remove(&self.address);
            }
        }
    }
}

impl Door {
    /// A place for one more from this address, if it has fewer than `limit`.
    pub(crate) fn knock(self: &Arc<Self>, address: IpAddr, limit: u32) -> Option<Knock> {
        let address = network(address);
        let mut knocking = lock(&self.knocking);
        let count = knocking.entry(address).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Knock { door: Arc::clone(self), address })
    }

    /// As [`Self::knock`]; a place is waited for.
    pub(crate) async fn knock_patiently(
        self: &Arc<Self>,
        address: IpAddr,
        limit: u32,
        patience: Duration,
    ) -> Option<Knock> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let knock = self.knock(address, limit);
            if knock.is_some() || tokio::time::Instant::now() >= deadline {
                return knock;
            }
            tokio::time::sleep(KNOCK_AGAIN).await;
        }
    }

    /// Notes a wrong password, and says how late it is to be answered.
    pub(crate) fn failed(&self, address: IpAddr, role: &str, now: Instant) -> Duration {
        let key = self.hasher.hash_one((network(address), role));
        let mut failures = lock(&self.failures);
        if failures.len() >= REMEMBERED {
            failures.retain(|_, f| now.saturating_duration_since(f.last) < RECENT);
        }
        if failures.len() >= REMEMBERED {
            failures.clear();
        }
        let known = failures.entry(key).or_insert(Failures { count: 0, last: now });
        if now.saturating_duration_since(known.last) >= FORGIVEN {
            known.count = 0;
        }
        *known = Failures { count: known.count.saturating_add(1), last: now };
        FIRST_DELAY.saturating_mul(1 << (known.count - 1).min(10)).min(LONGEST_DELAY)
    }

    /// The right password came.
    pub(crate) fn succeeded(&self, address: IpAddr, role: &str) {
        let mut failures = lock(&self.failures);
        if !failures.is_empty() {
            failures.remove(&self.hasher.hash_one((network(address), role)));
        }
    }

    /// When a tenant's next login is due, counting it; `None` when it would have to wait longer than `patience`.
    pub(crate) fn admit(&self, tenant: TenantId, rate: Rate, now: Timestamp, patience: Duration) -> Option<Duration> {
        let mut rates = lock(&self.rates);
        let state = rates.entry(tenant).or_default();
        let wait = state.ready_at(rate).since(now);
        if wait > patience {
            return None;
        }
        state.take(rate, now);
        Some(wait)
    }

    /// Forgets what is long past.
    pub(crate) fn forget(&self, now: Instant) {
        lock(&self.failures).retain(|_, f| now.saturating_duration_since(f.last) < FORGIVEN);
    }
}

/// Who has one IPv6 address has all of its network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & !u128::from(u64::MAX)).into()),
        v4 @ IpAddr::V4(_) => v4,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn wrong_passwords_are_answered_ever_later_and_the_right_one_makes_up_for_them() {
        let (door, now) = (Door::default(), Instant::now());
        let delays: Vec<_> = (0..8).map(|_| door.failed(HERE, "odoo", now).as_millis()).collect();
        assert_eq!(delays, [250, 500, 1000, 2000, 4000, 8000, 8000, 8000]);
        assert_eq!(door.failed(HERE, "other", now), FIRST_DELAY);
        door.succeeded(HERE, "odoo");
        assert_eq!(door.failed(HERE, "odoo", now), FIRST_DELAY);
        door.failed(HERE, "odoo", now);
        assert_eq!(door.failed(HERE, "odoo", now + FORGIVEN), FIRST_DELAY);
    }

    #[test]
    fn what_is_remembered_of_wrong_passwords_is_bounded() {
        let (door, now) = (Door::default(), Instant::now());
        for n in 0..REMEMBERED as u64 + 500 {
            door.failed(HERE, &n.to_string(), now + Duration::from_millis(n));
        }
        assert!(lock(&door.failures).len() <= REMEMBERED);
    }

    #[test]
    fn one_ipv6_network_is_one_address() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(network(address("2001:db8::1")), network(address("2001:db8::ffff:1")));
        assert_ne!(network(address("2001:db8::1")), network(address("2001:db8:0:1::1")));
        assert_eq!(network(address("::ffff:127.0.0.1")), HERE);
    }

    /// Rule 20.
    #[test]
    fn an_address_has_so_many_places_at_the_door_and_gets_them_back() {
        let door = Arc::<Door>::default();
        let places: Vec<_> = (0..3).filter_map(|_| door.knock(HERE, 2)).collect();
        assert_eq!(places.len(), 2);
        drop(places);
        assert!(door.knock(HERE, 1).is_some());
        assert!(lock(&door.knocking).is_empty());
    }

    #[test]
    fn logins_above_the_rate_wait_for_their_turn_and_are_refused_when_that_is_too_long() {
        let (door, now) = (Door::default(), Timestamp::from_millis(1_000));
        let rate = Rate::per_second(10, 2);
        let waits: Vec<_> = (0..5)
            .map(|_| door.admit(TenantId(1), rate, now, Duration::from_millis(250)).map(|w| w.as_millis()))
            .collect();
        assert_eq!(waits, [Some(0), Some(0), Some(100), Some(200), None]);
    }
}
