//! How long work waits, lately: enough to tell a quantile, in forty bytes.

use std::time::Duration;

/// Waits of the last thousand grants or so, the older the less they count. Each bucket reaches twice as far as the one before it,
/// from a millisecond on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Waits {
    buckets: [u16; BUCKETS],
    total: u16,
}

/// The last is for everything beyond a minute.
const BUCKETS: usize = 18;
/// With so many, each counts half from then on.
const FULL: u16 = 1_024;

impl Waits {
    pub(super) fn note(&mut self, waited: Duration) {
        // Nought for less than a millisecond, then one more with each doubling.
        let milliseconds = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - milliseconds.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)] += 1;
        self.total += 1;
        if self.total >= FULL {
            for bucket in &mut self.buckets {
                *bucket /= 2;
            }
            self.total = self.buckets.iter().sum();
        }
    }

    /// What the given part of the waits stayed below, at most twice too long. Nothing where nobody was granted anything.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let wanted = f64::from(self.total) * part.clamp(0.0, 1.0);
        let mut below = 0.0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            below += f64::from(*bucket);
            if *bucket > 0 && below >= wanted {
                return Some(Duration::from_millis(1 << index));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_at_most_twice_too_long_and_what_is_long_past_is_forgotten() {
        let mut waits = Waits::default();
        assert_eq!(waits.quantile(0.99), None);
        for _ in 0..990 {
            waits.note(Duration::from_micros(300));
        }
        for _ in 0..10 {
            waits.note(Duration::from_millis(700));
        }
        assert_eq!(waits.quantile(0.5), Some(Duration::from_millis(1)));
        assert_eq!(waits.quantile(0.99), Some(Duration::from_millis(1)));
        assert_eq!(waits.quantile(0.999), Some(Duration::from_millis(1_024)));
        for _ in 0..10_000 {
            waits.note(Duration::from_millis(100));
        }
        assert_eq!(waits.quantile(0.999), Some(Duration::from_millis(128)));
        waits.note(Duration::MAX);
        assert_eq!(waits.quantile(1.0), Some(Duration::from_millis(1 << 17)));
    }
}
