//! How many connections each address has, so that no one address has them all.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use cofferdam_tenant::Network;

/// The connections of every address that has some.
#[derive(Debug, Default)]
pub(crate) struct Crowd(Mutex<HashMap<IpAddr, u32>>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    crowd: Arc<Crowd>,
    address: IpAddr,
}

impl Crowd {
    /// One more connection of an address; none if it has `limit` already.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr, limit: u32) -> Option<Place> {
        let address = Network::of_one_client(address);
        let mut crowd = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = crowd.entry(address).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Place { crowd: Arc::clone(self), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut crowd = self.crowd.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = crowd.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                crowd.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_no_more_places_than_it_may_and_leaves_nothing_behind() {
        let crowd = Arc::<Crowd>::default();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let first = crowd.enter(address("192.0.2.1"), 2).unwrap();
        // The same, as a socket for both protocols has it.
        let second = crowd.enter(address("::ffff:192.0.2.1"), 2).unwrap();
        assert!(crowd.enter(address("192.0.2.1"), 2).is_none());
        let other = crowd.enter(address("192.0.2.2"), 2).unwrap();
        drop(second);
        let second = crowd.enter(address("192.0.2.1"), 2).unwrap();
        let home = crowd.enter(address("2001:db8:0:1::1"), 1).unwrap();
        assert!(crowd.enter(address("2001:db8:0:1:ffff::2"), 1).is_none());
        let neighbour = crowd.enter(address("2001:db8:0:2::1"), 1).unwrap();
        drop((first, second, other, home, neighbour));
        assert!(crowd.0.lock().unwrap().is_empty());
    }
}
