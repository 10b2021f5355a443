//! What backups are made of, as data: policies, sets, requests, reports.
//!
//! Everything here serializes, has a JSON Schema, and does nothing: planning is in [`crate::plan`], work elsewhere.

mod drill;
mod policy;
mod restore;
mod set;

pub use drill::{CheckOutcome, CheckState, DrillReport, RestoreDrill};
pub use policy::{
    BackupPolicy, FenceLimits, Immutability, LockMode, Parallel, RecoveryObjective, Retention, Schedule, ScheduleError,
};
pub use restore::{RestoreMode, RestorePlan, RestorePoint, RestoreRequest, Restored};
pub use set::{
    BackupSet, ChangeCounter, Consistency, DatabaseArtifact, DatabaseLocale, DumpFormat, EngineKind, Extension,
    FilestoreSummary, LegalHold, LocaleProvider, LockAttestation, Phases, SetId, Stored,
};
