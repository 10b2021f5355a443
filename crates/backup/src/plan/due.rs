//! Which run is due: schedules, jitter, and runs that were missed.

use jiff::{SignedDuration, Timestamp};

use crate::model::{Schedule, ScheduleError};

/// What a schedule says of a tenant at an instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Due {
    /// When the next run begins, jitter included. In the past or now: it is due.
    pub at: Timestamp,
    /// Scheduled runs that have not taken place, the one that is due not counted.
    pub missed: u32,
}

impl Due {
    /// Whether a run is due.
    pub fn is_due(&self, now: Timestamp) -> bool {
        self.at <= now
    }
}

/// More missed runs than this are not counted one by one.
const MOST_MISSED: u32 = 1_000;

/// When a tenant's next run is, after the one that began at `last` (or, if there never was one, since `watched`, when
/// somebody began to look at the schedule).
///
/// Jitter is a share of the schedule's, the same for a name each time: runs keep their distance. Several missed runs
/// are made up for by one, and only if the schedule says so.
pub fn due(
    schedule: &Schedule,
    tenant: &str,
    last: Option<Timestamp>,
    watched: Timestamp,
    now: Timestamp,
) -> Result<Due, ScheduleError> {
    let jitter = jitter(schedule, tenant);
    // A run that came late by its jitter still was the run of its time.
    let mut at = schedule.next(last.map_or(watched, |last| last - jitter))? + jitter;
    let mut missed = 0;
    while at <= now && missed < MOST_MISSED {
        let following = schedule.next(at - jitter)? + jitter;
        if following > now {
            break;
        }
        missed += 1;
        at = following;
    }
    // What is left at or before `now` is the newest run that should have begun. Where somebody has watched, it is not
    // missed but waits for others.
    if at <= now && !schedule.catch_up && at < watched && now.duration_since(at) > GRACE {
        missed += 1;
        at = schedule.next(now - jitter)? + jitter;
    }
    Ok(Due { at, missed })
}

/// A run that is late by less than this was not missed: schedulers look only now and then.
const GRACE: SignedDuration = SignedDuration::from_secs(300);

/// Whether a repository is pruned after a backup at `now`, when the one before it was at `before`: with the first of each
/// seven days. Tenants have different ones, so that not everybody prunes on the same day.
pub fn prune_is_due(tenant: &str, before: Option<Timestamp>, now: Timestamp) -> bool {
    let week = |at: Timestamp| (at.as_second().div_euclid(86_400) + (part(tenant) % 7).cast_signed()).div_euclid(7);
    before.is_some_and(|before| week(before) != week(now))
}

/// The first bytes of the SHA-256 of a tenant's name.
fn part(tenant: &str) -> u64 {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(tenant.as_bytes());
    digest.iter().take(4).fold(0_u64, |sum, byte| (sum << 8) | u64::from(*byte))
}

/// The tenant's part of the jitter.
fn jitter(schedule: &Schedule, tenant: &str) -> SignedDuration {
    let part = part(tenant);
    let whole = schedule.jitter.0.as_millis() as u64;
    SignedDuration::from_millis((whole.saturating_mul(part) >> 32).cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_tenant::HumanDuration;
    use std::time::Duration;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn nightly() -> Schedule {
        Schedule {
            cron: "0 2 * * *".into(),
            time_zone: "Europe/Berlin".into(),
            jitter: HumanDuration(Duration::ZERO),
            catch_up: true,
        }
    }

    #[test]
    fn two_in_the_morning_is_another_instant_in_summer() {
        let schedule = nightly();
        assert_eq!(schedule.next(at("2026-01-10T12:00:00Z")), Ok(at("2026-01-11T01:00:00Z")));
        assert_eq!(schedule.next(at("2026-07-10T12:00:00Z")), Ok(at("2026-07-11T00:00:00Z")));
    }

    /// On 2026-03-29 there is no two o'clock in Berlin; on 2026-10-25 there are two.
    #[test]
    fn the_night_without_its_hour_has_its_run_and_the_night_with_two_has_one() {
        let schedule = Schedule { cron: "30 2 * * *".into(), ..nightly() };
        let mut runs = Vec::new();
        let mut t = at("2026-03-27T12:00:00Z");
        while t < at("2026-03-31T12:00:00Z") {
            t = schedule.next(t).unwrap();
            runs.push(t);
        }
        let days: Vec<_> =
            runs.iter().map(|t| t.to_zoned(jiff::tz::TimeZone::get("Europe/Berlin").unwrap()).date().day()).collect();
        assert_eq!(days, [28, 29, 30, 31, 1], "{runs:?}");
        let mut autumn = Vec::new();
        let mut t = at("2026-10-24T12:00:00Z");
        while t < at("2026-10-26T12:00:00Z") {
            t = schedule.next(t).unwrap();
            autumn.push(t);
        }
        assert_eq!(autumn.len(), 3, "{autumn:?}");
    }

    #[test]
    fn missed_runs_are_counted_and_made_up_for_once() {
        let last = at("2026-11-20T01:00:05Z");
        let now = at("2026-11-24T10:00:00Z");
        let due = due(&nightly(), "acme", Some(last), last, now).unwrap();
        assert_eq!(due, Due { at: at("2026-11-24T01:00:00Z"), missed: 3 });
        assert!(due.is_due(now));
    }

    #[test]
    fn without_catching_up_the_next_run_is_the_next_night() {
        let schedule = Schedule { catch_up: false, ..nightly() };
        let last = at("2026-11-20T01:00:05Z");
        let now = at("2026-11-24T10:00:00Z");
        let missed = due(&schedule, "acme", Some(last), now, now).unwrap();
        assert_eq!(missed, Due { at: at("2026-11-25T01:00:00Z"), missed: 4 });
        // Whoever has been there since before it was due only waits for a place.
        let late = due(&schedule, "acme", Some(last), at("2026-11-24T00:30:00Z"), now).unwrap();
        assert_eq!(late, Due { at: at("2026-11-24T01:00:00Z"), missed: 3 });
    }

    #[test]
    fn jitter_that_is_longer_than_the_period_skips_no_run() {
        let hourly =
            Schedule { cron: "0 * * * *".into(), jitter: HumanDuration(Duration::from_secs(3 * 3_600)), ..nightly() };
        for tenant in ["acme", "beta", "core", "delta"] {
            let mut last =
                due(&hourly, tenant, None, at("2026-11-20T12:00:00Z"), at("2026-11-20T12:00:00Z")).unwrap().at;
            for _ in 0..10 {
                let next = due(&hourly, tenant, Some(last), last, last).unwrap();
                assert_eq!(next.at.duration_since(last), SignedDuration::from_hours(1), "{tenant}");
                last = next.at;
            }
        }
    }

    #[test]
    fn jitter_is_a_tenants_own_and_stays_the_same() {
        let schedule = Schedule { jitter: HumanDuration(Duration::from_secs(3_600)), ..nightly() };
        let starts: std::collections::BTreeSet<_> =
            (0..100).map(|i| jitter(&schedule, &format!("tenant{i}")).as_secs() / 60).collect();
        assert!(starts.len() > 40, "a hundred tenants begin in {} different minutes", starts.len());
        assert!(starts.iter().all(|minute| (0..60).contains(minute)));
        // The run of a night is over when it has begun, jitter or not: it is not due again.
        let first = due(&schedule, "acme", None, at("2026-11-20T12:00:00Z"), at("2026-11-20T12:00:00Z")).unwrap();
        let again = due(&schedule, "acme", Some(first.at), first.at, first.at).unwrap();
        assert!(again.at > first.at, "{first:?} {again:?}");
    }

    #[test]
    fn a_repository_is_pruned_once_in_seven_days_whoever_runs_how_often() {
        for period in [SignedDuration::from_hours(1), SignedDuration::from_hours(24), SignedDuration::from_hours(200)] {
            let mut before = at("2026-01-01T02:00:00Z");
            let (end, mut pruned, mut runs) = (at("2026-12-31T00:00:00Z"), 0, 0);
            while before < end {
                let now = before + period;
                pruned += usize::from(prune_is_due("acme", Some(before), now));
                (before, runs) = (now, runs + 1);
            }
            assert!(pruned == runs.min(52) || pruned == runs.min(53), "{period:?}: {pruned} of {runs}");
        }
        assert!(!prune_is_due("acme", None, at("2026-01-01T02:00:00Z")), "there is nothing to prune yet");
    }

    #[test]
    fn what_is_no_schedule_is_refused_with_its_reason() {
        let cron = Schedule { cron: "61 * * * *".into(), ..nightly() };
        assert!(cron.check().unwrap_err().to_string().contains("`61 * * * *`"));
        let zone = Schedule { time_zone: "Europe/Atlantis".into(), ..nightly() };
        assert!(zone.check().unwrap_err().to_string().contains("Europe/Atlantis"));
    }
}
