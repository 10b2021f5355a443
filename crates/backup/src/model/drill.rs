//! Drills, as data: what was tried and what came of it.

use cofferdam_tenant::{HumanDuration, Slug};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::policy::RecoveryObjective;
use super::restore::RestorePoint;
use super::set::SetId;

/// A drill that somebody asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreDrill {
    /// Whose backups.
    #[schemars(with = "String")]
    pub tenant: Slug,
    /// Which state.
    pub point: RestorePoint,
    /// A program that is started when the restored database is up, with `COFFERDAM_DATABASE`, `COFFERDAM_FILESTORE` and
    /// `PGHOST`, `PGPORT`, `PGUSER` set. The drill passes only when it ends with 0.
    #[serde(default)]
    pub check_command: Vec<String>,
    /// How long that program may take.
    pub check_limit: HumanDuration,
}

/// What came of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckState {
    /// As it should be.
    Pass,
    /// Not as it should be.
    Fail,
    /// Not looked at, for the reason given.
    Skipped,
}

/// One check of a drill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckOutcome {
    /// What was checked.
    pub name: String,
    /// What came of it.
    pub state: CheckState,
    /// The evidence, in words.
    pub detail: String,
}

/// What a drill found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DrillReport {
    /// Whose backups.
    #[schemars(with = "String")]
    pub tenant: Slug,
    /// The set that was restored.
    pub set: SetId,
    /// When the drill began.
    pub started_at: Timestamp,
    /// Whether every check passed and both objectives were met.
    pub passed: bool,
    /// The objectives.
    pub objective: RecoveryObjective,
    /// From the beginning until the restored tenant could be used, in milliseconds: the recovery time really reached.
    pub rto_ms: u64,
    /// How old the restored state was when the drill began, in milliseconds: the recovery point really reached.
    pub rpo_ms: u64,
    /// Each check.
    pub checks: Vec<CheckOutcome>,
}
