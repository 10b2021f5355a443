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
use cofferdam_tenant::{Network, TenantId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The first wrong password is answered so late; each further one twice as late.
const FIRST_DELAY: Duration = Duration::from_millis(250);
const LONGEST_DELAY: Duration = Duration::from_secs(8);
/// After this long without a wrong password an address starts afresh.
const FORGIVEN: Duration = Duration::from_secs(600);
/// When there are too many, only those that came within this time are remembered.
const RECENT: Duration = Duration::from_secs(30);
/// Addresses and roles remembered.
const REMEMBERED: usize = 10_000;

/// Who is at the door.
#[derive(Debug, Default)]
pub(crate) struct Door {
    knocking: Mutex<HashMap<IpAddr, Arc<Semaphore>>>,
    failures: Mutex<HashMap<u64, Failures>>,
    hasher: RandomState,
    rates: Mutex<HashMap<TenantId, Gcra>>,
}

#[derive(Debug, Clone, Copy)]
struct Failures {
    count: u32,
    last: Instant,
}

impl Door {
    /// A place for one more from this address, of which it has `limit`; waited for, each address behind its own.
    ///
    /// Cancel-safe: whoever gives up has taken no place.
    pub(crate) async fn knock(&self, address: IpAddr, limit: u32, patience: Duration) -> Option<OwnedSemaphorePermit> {
        let places = {
            let mut knocking = lock(&self.knocking);
            let places = knocking.entry(Network::of_one_client(address));
            Arc::clone(places.or_insert_with(|| Arc::new(Semaphore::new(limit as usize))))
        };
        tokio::time::timeout(patience, places.acquire_owned()).await.ok()?.ok()
    }

    /// Notes a wrong password, and says how late it is to be answered.
    pub(crate) fn failed(&self, address: IpAddr, role: &str, now: Instant) -> Duration {
        let key = self.hasher.hash_one((Network::of_one_client(address), role));
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
            failures.remove(&self.hasher.hash_one((Network::of_one_client(address), role)));
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
        lock(&self.knocking).retain(|_, places| Arc::strong_count(places) > 1);
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
        assert_eq!(Network::of_one_client(address("2001:db8::1")), Network::of_one_client(address("2001:db8::ffff:1")));
        assert_ne!(Network::of_one_client(address("2001:db8::1")), Network::of_one_client(address("2001:db8:0:1::1")));
        assert_eq!(Network::of_one_client(address("::ffff:127.0.0.1")), HERE);
    }

    /// Rule 20.
    #[tokio::test]
    async fn an_address_has_so_many_places_at_the_door_and_gets_them_back() {
        let (door, moment) = (Door::default(), Duration::from_millis(1));
        let places = [door.knock(HERE, 2, moment).await, door.knock(HERE, 2, moment).await];
        assert!(places.iter().all(Option::is_some));
        assert!(door.knock(HERE, 2, moment).await.is_none());
        let later = async {
            tokio::task::yield_now().await;
            drop(places);
        };
        assert!(tokio::join!(door.knock(HERE, 2, Duration::from_secs(60)), later).0.is_some());
        door.forget(Instant::now());
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
