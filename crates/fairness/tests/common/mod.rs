//! Names that the scenarios share.
#![allow(dead_code)] // each test binary uses some of them

use cofferdam_fairness::{OnCores, Timestamp};
use cofferdam_tenant::TenantId;

/// A deadline that never comes.
pub(crate) const FAR: Timestamp = Timestamp::from_millis(1_000_000_000);
/// Work that keeps so many cores busy and never waited for one.
pub(crate) fn on(wanted: f32, gives_way: bool) -> OnCores {
    OnCores { wanted, waited: 0.0, gives_way }
}
/// A tenant.
pub(crate) const A: TenantId = TenantId(0);
/// Another.
pub(crate) const B: TenantId = TenantId(1);
/// One with a reservation, or a third.
pub(crate) const R: TenantId = TenantId(2);

/// Milliseconds after the beginning.
pub(crate) const fn ms(n: u64) -> Timestamp {
    Timestamp::from_millis(n)
}
