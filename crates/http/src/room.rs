//! Room for bytes that wait: request bodies for their worker, and answers for their client.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use cofferdam_tenant::TenantId;

/// Most bytes that wait: in all, and for one tenant.
const MOST: u64 = 2 << 30;
const MOST_OF_ONE: u64 = 512 << 20;

/// Room for bytes that wait, in memory or on disk, shared between tenants.
#[derive(Debug, Default)]
pub(crate) struct Room {
    all: AtomicU64,
    by_tenant: Mutex<HashMap<TenantId, u64>>,
}

impl Room {
    /// Takes room for more bytes, if there is.
    pub(crate) fn take(&self, tenant: TenantId, bytes: u64) -> bool {
        let mut by_tenant = self.by_tenant.lock().unwrap_or_else(PoisonError::into_inner);
        let own = by_tenant.entry(tenant).or_default();
        let fits = *own + bytes <= MOST_OF_ONE && self.all.load(Ordering::Relaxed) + bytes <= MOST;
        if fits {
            *own += bytes;
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
