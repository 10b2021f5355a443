//! Grandfather, father, son: which sets a policy keeps, and why.

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use crate::model::{BackupSet, Retention, SetId};

/// A set that stays, and every reason for it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Kept {
    /// Which.
    pub set: SetId,
    /// Why: `last`, `daily 2026-11-27`, `legal hold: …`, `locked until …`.
    pub reasons: Vec<String>,
}

/// What a policy would keep and forget.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct RetentionPlan {
    /// Stays, newest first.
    pub keep: Vec<Kept>,
    /// Goes, newest first.
    pub forget: Vec<SetId>,
}

type Rule = (&'static str, u32, fn(Date, i8) -> String);

/// Applies a policy to sets, in any order. Days, weeks and months are those of `zone`.
///
/// Never forgotten are: the newest set with everything in it, whatever the numbers say; sets under a legal hold; sets
/// whose lock has not ended at `now`. Sets with files missing count for no rule but `last`, so that they crowd no
/// complete set out.
pub fn retention(sets: &[BackupSet], policy: &Retention, zone: &TimeZone, now: Timestamp) -> RetentionPlan {
    let mut sets: Vec<&BackupSet> = sets.iter().collect();
    sets.sort_by(|a, b| b.taken_at.cmp(&a.taken_at).then_with(|| b.id.cmp(&a.id)));
    let mut kept: Vec<Vec<String>> = vec![Vec::new(); sets.len()];
    for reasons in kept.iter_mut().take(policy.last as usize) {
        reasons.push("last".to_owned());
    }
    let rules: [Rule; 5] = [
        ("hourly", policy.hourly, |d, hour| format!("{d}T{hour:02}")),
        ("daily", policy.daily, |d, _| d.to_string()),
        ("weekly", policy.weekly, |d, _| {
            let week = d.iso_week_date();
            format!("{}-W{:02}", week.year(), week.week())
        }),
        ("monthly", policy.monthly, |d, _| format!("{}-{:02}", d.year(), d.month())),
        ("yearly", policy.yearly, |d, _| d.year().to_string()),
    ];
    for (name, count, period) in rules {
        let mut seen: Option<String> = None;
        let mut left = count;
        for (set, reasons) in sets.iter().zip(kept.iter_mut()) {
            if left == 0 {
                break;
            }
            if !set.consistency.is_complete() {
                continue;
            }
            let local = set.taken_at.to_zoned(zone.clone());
            let this = period(local.date(), local.hour());
            if seen.as_ref() != Some(&this) {
                reasons.push(format!("{name} {this}"));
                seen = Some(this);
                left -= 1;
            }
        }
    }
    if let Some(newest) = sets.iter().position(|s| s.consistency.is_complete())
        && kept[newest].is_empty()
    {
        kept[newest].push("newest complete".to_owned());
    }
    for (set, reasons) in sets.iter().zip(kept.iter_mut()) {
        if let Some(hold) = &set.hold {
            reasons.push(format!("legal hold: {}", hold.reason));
        }
        if let crate::model::LockAttestation::Locked { until, .. } = set.lock
            && until > now
        {
            reasons.push(format!("locked until {until}"));
        }
    }
    let mut plan = RetentionPlan::default();
    for (set, reasons) in sets.into_iter().zip(kept) {
        if reasons.is_empty() {
            plan.forget.push(set.id.clone());
        } else {
            plan.keep.push(Kept { set: set.id.clone(), reasons });
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Consistency;
    use crate::sample;
    use proptest::prelude::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn nothing() -> Retention {
        Retention { last: 0, hourly: 0, daily: 0, weekly: 0, monthly: 0, yearly: 0 }
    }

    #[test]
    fn a_day_keeps_its_last_set_in_the_zone_of_the_policy() {
        let sets: Vec<_> = ["2026-03-01T22:30:00Z", "2026-03-01T23:30:00Z", "2026-03-02T10:00:00Z"]
            .iter()
            .enumerate()
            .map(|(i, t)| sample::set(i, at(t), Consistency::Fenced))
            .collect();
        let policy = Retention { daily: 2, ..nothing() };
        let plan = retention(&sets, &policy, &TimeZone::UTC, at("2026-03-03T00:00:00Z"));
        let kept: Vec<_> = plan.keep.iter().map(|k| k.set.0.as_str()).collect();
        assert_eq!(kept, ["set2", "set1"]);
        // In Berlin half past eleven in the evening, UTC, is already the next day.
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        let plan = retention(&sets, &policy, &berlin, at("2026-03-03T00:00:00Z"));
        let kept: Vec<_> = plan.keep.iter().map(|k| k.set.0.as_str()).collect();
        assert_eq!(kept, ["set2", "set0"]);
    }

    #[test]
    fn sets_with_missing_files_crowd_no_complete_set_out() {
        let mut sets = vec![sample::set(0, at("2026-03-01T00:00:00Z"), Consistency::Verified)];
        sets.extend((1..5).map(|i| sample::set(i, at("2026-03-02T00:00:00Z"), Consistency::Unverified)));
        let plan = retention(&sets, &Retention { daily: 1, ..nothing() }, &TimeZone::UTC, at("2026-03-03T00:00:00Z"));
        assert_eq!(plan.keep.len(), 1);
        assert_eq!(plan.keep[0].set.0, "set0");
    }

    proptest! {
        /// Whatever the numbers: what was complete and newest stays, holds and locks stay, and nothing is lost or doubled.
        #[test]
        fn the_newest_complete_set_and_whatever_is_held_always_stay(
            ages in prop::collection::vec((0_i64..3_000, any::<bool>(), any::<bool>(), any::<bool>()), 1..40),
            numbers in prop::array::uniform6(0_u32..4),
        ) {
            let now = at("2026-11-27T00:00:00Z");
            let sets: Vec<_> = ages.iter().enumerate().map(|(i, (hours, complete, held, locked))| {
                let taken = now - jiff::SignedDuration::from_hours(*hours);
                let mut set =
                    sample::set(i, taken, if *complete { Consistency::Fenced } else { Consistency::Unverified });
                if *held { set.hold = Some(sample::hold()); }
                if *locked { set.lock = sample::lock(now + jiff::SignedDuration::from_hours(1)); }
                set
            }).collect();
            let [last, hourly, daily, weekly, monthly, yearly] = numbers;
            let policy = Retention { last, hourly, daily, weekly, monthly, yearly };
            let plan = retention(&sets, &policy, &TimeZone::UTC, now);
            prop_assert_eq!(plan.keep.len() + plan.forget.len(), sets.len());
            for set in &sets {
                let kept = plan.keep.iter().any(|k| k.set == set.id);
                prop_assert_ne!(kept, plan.forget.contains(&set.id));
                if set.hold.is_some() || matches!(set.lock, crate::model::LockAttestation::Locked { .. }) {
                    prop_assert!(kept);
                }
            }
            if let Some(newest) = sets.iter().filter(|s| s.consistency.is_complete()).map(|s| s.taken_at).max() {
                let stays = sets.iter().any(|s| s.consistency.is_complete() && s.taken_at == newest
                    && plan.keep.iter().any(|k| k.set == s.id));
                prop_assert!(stays);
            }
        }
    }
}
