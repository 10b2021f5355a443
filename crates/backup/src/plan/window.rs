//! What can be recovered: points, stretches of time, and the gaps between them.

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::BackupSet;

/// A stretch of time of which every instant can be recovered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Range {
    /// The first instant.
    pub from: Timestamp,
    /// The last.
    pub to: Timestamp,
}

/// A stretch of time of which nothing can be recovered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Gap {
    /// The last instant before it that can be recovered.
    pub from: Timestamp,
    /// The first after it, or none if the gap is open.
    pub to: Option<Timestamp>,
    /// Why, such as `segment 000000010000000000000007 is missing`.
    pub reason: String,
}

/// What can be recovered of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct RecoverabilityWindow {
    /// Single instants, in order: backup sets.
    pub points: Vec<Timestamp>,
    /// Whole stretches, in order: where the log of the cluster is archived.
    pub ranges: Vec<Range>,
    /// What is in between, where there should be something.
    pub gaps: Vec<Gap>,
}

impl RecoverabilityWindow {
    /// The newest instant that can be recovered.
    pub fn newest(&self) -> Option<Timestamp> {
        let point = self.points.last().copied();
        let range = self.ranges.last().map(|r| r.to);
        point.max(range)
    }

    /// Whether an instant can be recovered exactly.
    pub fn contains(&self, at: Timestamp) -> bool {
        self.points.contains(&at) || self.ranges.iter().any(|r| r.from <= at && at <= r.to)
    }

    /// How much would be lost now. Computed from what is there, not from a schedule: when the newest change is saved,
    /// nothing would be lost, however long ago that was. `None`: everything.
    pub fn loss(&self, now: Timestamp, last_change: Option<Timestamp>) -> Option<SignedDuration> {
        let newest = self.newest()?;
        match last_change {
            Some(changed) if changed <= newest => Some(SignedDuration::ZERO),
            _ => Some(now.duration_since(newest).max(SignedDuration::ZERO)),
        }
    }
}

/// The window that sets alone give: the instants of the complete ones, and a gap wherever two of them are farther apart
/// than `rpo`.
pub fn logical_window(sets: &[BackupSet], rpo: SignedDuration, now: Timestamp) -> RecoverabilityWindow {
    let mut points: Vec<_> = sets.iter().filter(|s| s.consistency.is_complete()).map(|s| s.taken_at).collect();
    points.sort_unstable();
    let mut gaps = Vec::new();
    for pair in points.windows(2) {
        if pair[1].duration_since(pair[0]) > rpo {
            gaps.push(Gap { from: pair[0], to: Some(pair[1]), reason: "no complete backup".to_owned() });
        }
    }
    if let Some(last) = points.last()
        && now.duration_since(*last) > rpo
    {
        gaps.push(Gap { from: *last, to: None, reason: "no complete backup".to_owned() });
    }
    RecoverabilityWindow { points, ranges: Vec::new(), gaps }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Consistency;
    use crate::sample;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn an_idle_tenant_with_everything_saved_has_lost_nothing() {
        let set = sample::set(0, at("2026-11-20T02:00:00Z"), Consistency::Fenced);
        let now = at("2026-11-27T02:00:00Z");
        let window = logical_window(&[set], SignedDuration::from_hours(24), now);
        assert_eq!(window.loss(now, Some(at("2026-11-19T18:00:00Z"))), Some(SignedDuration::ZERO));
        assert_eq!(window.loss(now, Some(at("2026-11-20T18:00:00Z"))), Some(SignedDuration::from_hours(7 * 24)));
        assert_eq!(window.loss(now, None), Some(SignedDuration::from_hours(7 * 24)));
        assert_eq!(RecoverabilityWindow::default().loss(now, None), None);
    }

    #[test]
    fn nights_without_a_complete_backup_are_gaps() {
        let sets = [
            sample::set(0, at("2026-11-20T02:00:00Z"), Consistency::Fenced),
            sample::set(1, at("2026-11-21T02:00:00Z"), Consistency::Unverified),
            sample::set(2, at("2026-11-22T02:00:00Z"), Consistency::Verified),
        ];
        let window = logical_window(&sets, SignedDuration::from_hours(25), at("2026-11-24T02:00:00Z"));
        assert_eq!(window.points.len(), 2);
        assert_eq!(window.gaps.len(), 2);
        assert_eq!(window.gaps[0].to, Some(at("2026-11-22T02:00:00Z")));
        assert_eq!(window.gaps[1].to, None);
    }
}
