//! When a host is asked for. Pure: time is passed in.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// How long is waited after so many failures. An authority counts: Let's Encrypt refuses a name for an hour after five.
const PAUSES: [Duration; 7] = [
    Duration::from_secs(60),
    Duration::from_secs(5 * 60),
    Duration::from_secs(20 * 60),
    Duration::from_secs(3600),
    Duration::from_secs(3 * 3600),
    Duration::from_secs(6 * 3600),
    Duration::from_secs(12 * 3600),
];

/// How long a host is left alone at least for which the authority was asked too often.
const LIMITED: Duration = Duration::from_secs(3600);

/// How long is kept what nobody has wanted.
pub(crate) const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// A certificate that lives no longer than this is renewed after half of its life, every other after two thirds.
const SHORT: Duration = Duration::from_secs(10 * 24 * 3600);

/// What has gone wrong for a host since its last certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failures {
    pub(crate) count: u32,
    pub(crate) last: SystemTime,
    /// The authority was asked too often.
    #[serde(default)]
    pub(crate) limited: bool,
    /// What the authority said, or why it could not be asked.
    pub(crate) reason: String,
}

impl Failures {
    /// From when on it may be tried again. What was asked too often is spread over an hour.
    pub(crate) fn until(&self, host: &str) -> SystemTime {
        let limited = LIMITED + LIMITED.mul_f64(spread(host));
        let pause = if self.limited { pause(self.count).max(limited) } else { pause(self.count) };
        self.last.checked_add(pause).unwrap_or(self.last)
    }

    /// Whether it still says something.
    pub(crate) fn is_worth_keeping(&self, now: SystemTime) -> bool {
        now.duration_since(self.last).is_ok_and(|since| since < KEPT)
    }
}

/// How long is waited after so many failures in a row.
pub(crate) fn pause(count: u32) -> Duration {
    let step = (count.max(1) - 1) as usize;
    PAUSES[step.min(PAUSES.len() - 1)]
}

/// When a certificate is renewed. Hosts whose certificates were given at one time are spread over a thirtieth of their life.
pub(crate) fn renewal(host: &str, valid: &Range<SystemTime>) -> SystemTime {
    let life = valid.end.duration_since(valid.start).unwrap_or_default();
    let left = if life <= SHORT { life / 2 } else { life / 3 };
    valid.end.checked_sub(left + (life / 30).mul_f64(spread(host))).unwrap_or(valid.start)
}

/// A number from 0 to 1 that is always the same for a host.
fn spread(host: &str) -> f64 {
    let mut hash = DefaultHasher::new();
    host.hash(&mut hash);
    (hash.finish() % 1000) as f64 / 1000.0
}

/// When a host is asked for next.
pub(crate) fn due(
    host: &str,
    valid: Option<&Range<SystemTime>>,
    failures: Option<&Failures>,
    now: SystemTime,
) -> SystemTime {
    let wanted = valid.map_or(now, |valid| renewal(host, valid));
    failures.map_or(wanted, |failures| wanted.max(failures.until(host)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn at(days: u32) -> SystemTime {
        SystemTime::UNIX_EPOCH + DAY * days
    }

    #[test]
    fn a_certificate_is_renewed_when_a_third_of_its_life_is_left_and_a_short_one_at_its_half() {
        let long = renewal("a.example", &(at(100)..at(190)));
        assert!(at(157) <= long && long <= at(160), "{long:?}");
        let short = renewal("a.example", &(at(100)..at(106)));
        assert!(short <= at(103) && short >= at(103) - DAY / 5, "{short:?}");
    }

    #[test]
    fn what_has_failed_waits_longer_each_time_and_fails_at_most_four_times_in_an_hour() {
        let mut now = at(1);
        let mut tries = Vec::new();
        for count in 1..=20 {
            tries.push(now);
            now = Failures { count, last: now, limited: false, reason: String::new() }.until("a");
        }
        for window in tries.windows(5) {
            assert!(window[4].duration_since(window[0]).unwrap() > Duration::from_secs(3600));
        }
        assert!(tries.windows(2).all(|pair| pair[1].duration_since(pair[0]).unwrap() <= DAY / 2));
    }

    proptest! {
        /// Whatever a certificate says, it is renewed before it ends, and never before it began.
        #[test]
        fn renewal_is_within_the_life(host in "[a-z]{1,8}", from in 0u64..1 << 40, life in 0u64..1 << 33) {
            let start = SystemTime::UNIX_EPOCH + Duration::from_secs(from);
            let valid = start..start + Duration::from_secs(life);
            let at = renewal(&host, &valid);
            prop_assert!(at >= valid.start && at <= valid.end);
        }

        /// A host without certificate and failures is asked for at once; one that failed, never before its pause is over.
        #[test]
        fn nothing_is_asked_for_in_its_pause(count in 1u32..u32::MAX, ago in 0u64..1 << 20) {
            let now = at(20_000);
            let failures = Failures { count, last: now - Duration::from_secs(ago), limited: false, reason: String::new() };
            prop_assert_eq!(due("a", None, None, now), now);
            let next = due("a", None, Some(&failures), now);
            prop_assert!(next >= failures.last + pause(count));
        }
    }
}
