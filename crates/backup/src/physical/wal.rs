//! Whether the log of a cluster is archived without a gap from a backup to an instant: decided before anything is
//! restored, because a recovery finds out only after hours.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::pgbackrest::PhysicalBackup;
use crate::plan::{Gap, Range, RecoverabilityWindow};

/// The segments of a log that are archived, by their names of 24 hexadecimal digits, and when each was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Archive {
    /// By position in the log, whatever the time line: after a promotion the log goes on under another.
    segments: BTreeMap<u64, (String, Timestamp)>,
}

/// Everything that a recovery needs is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    /// The backup that it starts from.
    pub backup: PhysicalBackup,
    /// The last segment that it reads, as far as can be told.
    pub last: String,
}

/// Why an instant cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Uncovered {
    /// No backup had ended by then.
    #[error("no backup of the cluster was complete before {at}; the first was at {first}")]
    NoBackup {
        /// What was asked for.
        at: Timestamp,
        /// When the first backup was complete, or `never`.
        first: String,
    },
    /// A segment is missing.
    #[error(
        "segment {segment} of the log is missing: nothing between {from} and the next backup can be reached, {at} neither"
    )]
    Gap {
        /// What was asked for.
        at: Timestamp,
        /// The first that is missing.
        segment: String,
        /// When the last before it was archived.
        from: Timestamp,
    },
    /// The log is not archived that far.
    #[error(
        "the log is archived up to about {until}, {at} is later; if the cluster is idle, let it switch its log (SELECT pg_switch_wal())"
    )]
    NotYet {
        /// What was asked for.
        at: Timestamp,
        /// When the last segment was archived.
        until: Timestamp,
    },
}

/// Segments of 16 MiB, which nearly everybody has, are 256 in each of the log's files of 4 GiB.
const PER_FILE: u64 = 256;

impl Archive {
    /// From names and times. What is no segment is left out.
    pub fn new(names: impl IntoIterator<Item = (String, Timestamp)>) -> Self {
        let mut archive = Self::default();
        for (name, at) in names {
            let Some(position) = position(&name) else { continue };
            let entry = archive.segments.entry(position).or_insert_with(|| (name.clone(), at));
            // Of two time lines the later one.
            if entry.0 < name {
                *entry = (name, at);
            }
        }
        archive
    }

    /// Whether an instant can be reached from one of the backups.
    ///
    /// A segment is archived when it is full: the one that was archived first at or after the instant, or one before it,
    /// holds what happened then. That a commit after the instant is in the log too is for the recovery to find out.
    pub fn covers(&self, backups: &[PhysicalBackup], at: Timestamp) -> Result<Coverage, Uncovered> {
        let good = || backups.iter().filter(|backup| !backup.error);
        let Some(backup) = good().filter(|b| b.stopped < at).max_by_key(|b| b.stopped) else {
            let first = good().map(|b| b.stopped).min().map_or_else(|| "never".to_owned(), |t| t.to_string());
            return Err(Uncovered::NoBackup { at, first });
        };
        let mut next = position(&backup.first_segment).unwrap_or(0);
        let mut until = backup.stopped;
        while let Some((segment, archived)) = self.segments.get(&next) {
            until = *archived;
            if *archived >= at {
                return Ok(Coverage { backup: backup.clone(), last: segment.clone() });
            }
            next += 1;
        }
        if self.segments.range(next..).next().is_some() {
            return Err(Uncovered::Gap { at, segment: name_of(&backup.first_segment, next), from: until });
        }
        Err(Uncovered::NotYet { at, until })
    }

    /// What can be recovered, and what cannot.
    pub fn window(&self, backups: &[PhysicalBackup]) -> RecoverabilityWindow {
        let mut window = RecoverabilityWindow::default();
        let mut good: Vec<&PhysicalBackup> = backups.iter().filter(|b| !b.error).collect();
        good.sort_by_key(|b| b.stopped);
        for backup in good {
            // Within what an earlier backup reaches.
            if window.ranges.last().is_some_and(|r| r.to >= backup.stopped) {
                continue;
            }
            if let (Some(gap), true) = (window.gaps.last_mut(), !window.ranges.is_empty()) {
                gap.to.get_or_insert(backup.stopped);
            }
            let mut next = position(&backup.first_segment).unwrap_or(0);
            let mut to = backup.stopped;
            while let Some((_, archived)) = self.segments.get(&next) {
                to = to.max(*archived);
                next += 1;
            }
            window.ranges.push(Range { from: backup.stopped, to });
            if self.segments.range(next..).next().is_some() {
                let segment = name_of(&backup.first_segment, next);
                window.gaps.push(Gap { from: to, to: None, reason: format!("segment {segment} is missing") });
            }
        }
        window
    }
}

fn position(name: &str) -> Option<u64> {
    if name.len() != 24 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let file = u64::from_str_radix(name.get(8..16)?, 16).ok()?;
    let segment = u64::from_str_radix(name.get(16..24)?, 16).ok()?;
    Some(file * PER_FILE + segment)
}

fn name_of(like: &str, position: u64) -> String {
    format!("{}{:08X}{:08X}", like.get(..8).unwrap_or("00000001"), position / PER_FILE, position % PER_FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(minute: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + minute * 60).unwrap()
    }

    fn backup(minute: i64, segment: &str) -> PhysicalBackup {
        PhysicalBackup {
            label: format!("b{minute}"),
            kind: "full".into(),
            started: at(minute - 1),
            stopped: at(minute),
            first_segment: segment.into(),
            error: false,
        }
    }

    fn segments(numbers: &[u64]) -> Archive {
        Archive::new(
            numbers.iter().map(|n| (format!("00000001{:08X}{:08X}", n / 256, n % 256), at((*n).cast_signed()))),
        )
    }

    #[test]
    fn a_missing_segment_is_named_before_anything_is_restored() {
        let backups = [backup(254, "0000000100000000000000FE")];
        let whole = segments(&[254, 255, 256, 257, 258]);
        assert_eq!(whole.covers(&backups, at(257)).unwrap().last, "000000010000000100000001");
        let gap = segments(&[254, 255, 257, 258]);
        let error = gap.covers(&backups, at(257)).unwrap_err();
        assert!(error.to_string().starts_with("segment 000000010000000100000000 of the log is missing"), "{error}");
        // What lies before the gap can still be reached.
        gap.covers(&backups, at(255)).unwrap();
        assert!(matches!(whole.covers(&backups, at(300)), Err(Uncovered::NotYet { .. })));
        assert!(matches!(whole.covers(&backups, at(254)), Err(Uncovered::NoBackup { .. })));
        // A later backup is on the other side of it.
        let later = [backups[0].clone(), backup(258, "000000010000000100000001")];
        gap.covers(&later, at(259)).unwrap_err();
        let window = segments(&[254, 255, 257, 258, 259, 260]).window(&later);
        assert_eq!(window.ranges.len(), 2);
        assert_eq!(window.gaps.len(), 1);
        assert_eq!((window.gaps[0].from, window.gaps[0].to), (at(255), Some(at(258))));
    }

    #[test]
    fn after_a_promotion_the_log_goes_on_under_another_time_line() {
        let mut names: Vec<_> = (1..4).map(|n| (format!("0000000100000000{n:08X}"), at(n))).collect();
        names.extend((3..6).map(|n| (format!("0000000200000000{n:08X}"), at(n))));
        names.push(("00000002.history".into(), at(3)));
        let archive = Archive::new(names);
        let coverage = archive.covers(&[backup(1, "000000010000000000000001")], at(5)).unwrap();
        assert_eq!(coverage.last, "000000020000000000000005");
    }
}
