//! Time and work as types: nothing here reads a clock, except the one clock that is handed to a gate.

use std::fmt;
use std::ops::{Add, AddAssign};
use std::time::Duration;
#[cfg(feature = "gate")]
use std::time::Instant;

/// A moment: nanoseconds since an origin that the caller chose. Only differences mean anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(u64);

impl Timestamp {
    /// Milliseconds after the origin.
    pub const fn from_millis(ms: u64) -> Self {
        Self(ms * 1_000_000)
    }

    /// Nanoseconds after the origin.
    pub const fn from_nanos(ns: u64) -> Self {
        Self(ns)
    }

    /// Nanoseconds after the origin.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// So much earlier; the origin when that is before it.
    pub(crate) fn before(self, d: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// The time from `earlier` to `self`; zero when `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;
    fn add(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }
}

/// Work: seconds for which a slot was held.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct SlotSeconds(pub f64);

impl From<Duration> for SlotSeconds {
    fn from(d: Duration) -> Self {
        Self(d.as_secs_f64())
    }
}

impl AddAssign for SlotSeconds {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl fmt::Display for SlotSeconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}s", self.0)
    }
}

#[cfg(feature = "gate")]
/// Where a [`crate::Gate`] gets the time from: the process's monotonic clock, or a test's own.
pub trait Clock: Send + Sync {
    /// The current moment. Must never go back.
    fn now(&self) -> Timestamp;
}

#[cfg(feature = "gate")]
/// The process's monotonic clock, for gates that serve real work.
#[derive(Debug, Clone)]
pub struct MonotonicClock {
    origin: Instant,
}

#[cfg(feature = "gate")]
impl MonotonicClock {
    /// A clock whose origin is the given instant, taken by the caller.
    pub fn since(origin: Instant) -> Self {
        Self { origin }
    }
}

#[cfg(feature = "gate")]
impl Clock for MonotonicClock {
    fn now(&self) -> Timestamp {
        Timestamp(u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}
