//! Names that the scenarios share.
#![allow(dead_code)] // each test binary uses some of them

use cofferdam_fairness::Timestamp;
use cofferdam_tenant::TenantId;

/// A deadline that never comes.
pub(crate) const FAR: Timestamp = Timestamp::from_millis(1_000_000_000);
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
