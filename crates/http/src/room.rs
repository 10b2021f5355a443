//! Room for bytes that wait: request bodies for their worker, and answers for their client.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use cofferdam_tenant::TenantId;

/// Most bytes that wait: in all, and for one tenant. A tenant has never more than half of what is left, either (after
/// Choudhury's and Hahne's dynamic thresholds): however few fill their part, there is room for whoever comes next.
const MOST: u64 = 2 << 30;
const MOST_OF_ONE: u64 = 512 << 20;

/// What is as small as this always fits: with it nobody can fill the room, since it is less than what a connection takes itself.
pub(crate) const SMALL: u64 = 32 << 10;

/// Room for bytes that wait, in memory or on disk, shared between tenants.
#[derive(Debug, Default)]
pub(crate) struct Room {
    all: AtomicU64,
    by_tenant: Mutex<HashMap<TenantId, u64>>,
}

impl Room {
    /// Takes room for more bytes of something of which `held` wait already, if there is.
    pub(crate) fn take(&self, tenant: TenantId, held: u64, bytes: u64) -> bool {
        let mut by_tenant = self.by_tenant.lock().unwrap_or_else(PoisonError::into_inner);
        let own = by_tenant.get(&tenant).copied().unwrap_or_default() + bytes;
        let left = MOST.saturating_sub(self.all.load(Ordering::Relaxed) + bytes);
        let fits = held + bytes <= SMALL || own <= MOST_OF_ONE.min(left / 2);
        if fits {
            by_tenant.insert(tenant, own);
            self.all.fetch_add(bytes, Ordering::Relaxed);
        }
        fits
    }

    /// Gives back what was taken.
    pub(crate) fn give_back(&self, tenant: TenantId, bytes: u64) {
        let mut by_tenant = self.by_tenant.lock().unwrap_or_else(PoisonError::into_inner);
        self.all.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(own) = by_tenant.get_mut(&tenant) {
            *own -= bytes;
            if *own == 0 {
                by_tenant.remove(&tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_fill_their_part_what_is_small_fits_and_there_is_room_for_the_next() {
        let (room, step) = (Room::default(), 1 << 20);
        let fill = |tenant| {
            let mut taken = 0;
            while room.take(TenantId(tenant), taken, step) {
                taken += step;
            }
            taken
        };
        assert_eq!(fill(0), MOST_OF_ONE, "one alone is bounded by its own limit");
        for tenant in 1..4 {
            fill(tenant);
        }
        let next = fill(4);
        assert!(next >= 128 << 20, "{next}");
        for tenant in 5..40 {
            fill(tenant);
        }
        for tenant in [0, 50] {
            assert!(room.take(TenantId(tenant), 0, SMALL));
        }
        assert!(!room.take(TenantId(0), SMALL, SMALL));
        room.give_back(TenantId(0), MOST_OF_ONE);
        assert!(fill(50) >= 128 << 20, "what one gives back is there for others");
    }
}
