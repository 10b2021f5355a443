//! What an operator promises and how it is kept: objectives, schedules, retention, immutability.

use cofferdam_tenant::{ByteSize, HumanDuration};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How much may be lost, and how long it may take to be back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RecoveryObjective {
    /// Recovery point objective: the newest recoverable point is never older than this.
    #[serde(default = "a_day")]
    pub rpo: HumanDuration,
    /// Recovery time objective: a restore takes no longer. A drill measures it.
    #[serde(default = "four_hours")]
    pub rto: HumanDuration,
}

impl Default for RecoveryObjective {
    fn default() -> Self {
        Self { rpo: a_day(), rto: four_hours() }
    }
}

/// How the backups of a tenant are made and how long they stay.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BackupPolicy {
    /// When backups are made.
    pub schedule: Schedule,
    /// What they are to achieve.
    pub objective: RecoveryObjective,
    /// Which of them stay.
    pub retention: Retention,
    /// For how long nobody can delete them, where the store can enforce it.
    pub immutability: Option<Immutability>,
    /// How much a backup may get in the way of the tenant.
    pub fence: FenceLimits,
    /// How large databases are dumped and loaded.
    pub parallel: Parallel,
}

/// How a large database is dumped and loaded: by several programs at a time, on one snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Parallel {
    /// A database is large when it takes more than this on its server.
    pub above: ByteSize,
    /// How many programs dump it, or load its rows and make its indexes, at a time. 1: never more than one.
    pub jobs: u32,
}

impl Parallel {
    /// How many programs work on a database that takes so many bytes.
    pub fn jobs_for(&self, database_bytes: u64) -> u32 {
        if database_bytes > self.above.0 { self.jobs.max(1) } else { 1 }
    }
}

impl Default for Parallel {
    fn default() -> Self {
        Self { above: ByteSize(10 << 30), jobs: 4 }
    }
}

/// When backups are made: a cron expression in a time zone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Five fields: minute, hour, day of month, month, day of week.
    pub cron: String,
    /// A zone of the IANA database, such as `Europe/Berlin`.
    pub time_zone: String,
    /// A run begins up to this much later, by chance but the same for a tenant each time.
    pub jitter: HumanDuration,
    /// Whether a run that was missed, because nothing was running, is made up for.
    pub catch_up: bool,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            cron: "0 2 * * *".to_owned(),
            time_zone: "UTC".to_owned(),
            jitter: HumanDuration(Duration::from_secs(1_800)),
            catch_up: true,
        }
    }
}

/// Why a schedule cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// The expression is not one.
    #[error("`{cron}` ({reason})")]
    Cron {
        /// What was given.
        cron: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The zone is not in the IANA database.
    #[error("`{0}`, which is not a zone of the IANA time zone database")]
    Zone(String),
    /// The expression names no time that will ever come.
    #[error("`{0}`, which never comes")]
    Never(String),
}

impl Schedule {
    /// The first time strictly after `after`, without jitter. A local time that a zone skips is moved past the gap; one
    /// that comes twice is used once.
    pub fn next(&self, after: Timestamp) -> Result<Timestamp, ScheduleError> {
        let zone = TimeZone::get(&self.time_zone).map_err(|_| ScheduleError::Zone(self.time_zone.clone()))?;
        let cron: croner::Cron = self.cron.parse().map_err(|e: croner::errors::CronError| ScheduleError::Cron {
            cron: self.cron.clone(),
            reason: e.to_string(),
        })?;
        let from: Zoned = after.to_zoned(zone);
        let next = cron.find_next_occurrence(&from, false).map_err(|_| ScheduleError::Never(self.cron.clone()))?;
        Ok(next.timestamp())
    }

    /// Whether the schedule can be followed at all.
    pub fn check(&self) -> Result<(), ScheduleError> {
        self.next(Timestamp::UNIX_EPOCH).map(|_| ())
    }
}

/// Which sets stay: the newest, and the last of each of so many hours, days, weeks, months and years
/// (grandfather, father, son). A set stays when any rule wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// The newest sets, however close together.
    pub last: u32,
    /// Hours of which the last set stays.
    pub hourly: u32,
    /// Days of which the last set stays.
    pub daily: u32,
    /// ISO weeks of which the last set stays.
    pub weekly: u32,
    /// Months of which the last set stays.
    pub monthly: u32,
    /// Years of which the last set stays.
    pub yearly: u32,
}

impl Default for Retention {
    fn default() -> Self {
        Self { last: 3, hourly: 0, daily: 7, weekly: 5, monthly: 12, yearly: 3 }
    }
}

/// For how long an object can be deleted by nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Immutability {
    /// Who can still lift the lock.
    #[serde(default)]
    pub mode: LockMode,
    /// How long from each backup on. Everything that a new set refers to is locked anew for this long.
    pub period: HumanDuration,
}

/// S3's two kinds of object lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LockMode {
    /// An account with a special right can lift it.
    Governance,
    /// Nobody can, not even the owner of the account.
    #[default]
    Compliance,
}

/// How much a backup may get in the way of the tenant it saves.
///
/// While the fence is up, Odoo's collector of unused files waits for it and gives up; whoever writes attachments after
/// the collector has begun to wait, waits with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FenceLimits {
    /// Whether there is a fence at all. Without one every file is only verified afterwards.
    pub enabled: bool,
    /// The longest the fence is up.
    pub hold: HumanDuration,
    /// The longest anybody may wait because of it.
    pub stall: HumanDuration,
}

impl Default for FenceLimits {
    fn default() -> Self {
        Self {
            enabled: true,
            hold: HumanDuration(Duration::from_secs(600)),
            stall: HumanDuration(Duration::from_secs(2)),
        }
    }
}

fn a_day() -> HumanDuration {
    HumanDuration(Duration::from_secs(86_400))
}

fn four_hours() -> HumanDuration {
    HumanDuration(Duration::from_secs(14_400))
}
