//! Restoring, as data: what is asked for, what would be done, what was done.

use cofferdam_tenant::Slug;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::set::SetId;

/// Where a restored tenant goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", tag = "mode")]
pub enum RestoreMode {
    /// A database of its own name beside everything, neutralized, for looking at. Nothing refers to it.
    Scratch,
    /// A new tenant from the state of another: new `database.uuid` and secret, neutralized before anything can connect.
    NewTenant {
        /// The new database's name, which the new tenant's filestore bears too.
        database: String,
        /// `web.base.url` of the new tenant, frozen.
        base_url: Option<String>,
        /// Leave mail servers, jobs and integrations as they are.
        #[serde(default)]
        keep_integrations: bool,
    },
    /// In place of what is there now, which is kept beside it under another name for a way back.
    InPlaceSwap,
}

/// Which state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", tag = "point")]
pub enum RestorePoint {
    /// The newest complete set.
    Latest,
    /// This set, by id or the beginning of one.
    Set {
        /// The id, or enough of its beginning.
        id: SetId,
    },
    /// The newest complete set not after an instant, or that instant itself where the log of the cluster is archived.
    Time {
        /// The instant.
        at: Timestamp,
    },
    /// A position in the log of the cluster.
    Lsn {
        /// As `16/B374D848`.
        lsn: String,
    },
}

/// A restore that somebody asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreRequest {
    /// Whose backups.
    #[schemars(with = "String")]
    pub tenant: Slug,
    /// Which state.
    pub point: RestorePoint,
    /// Where to.
    pub to: RestoreMode,
}

/// What a restore would do, for somebody to agree to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestorePlan {
    /// The set it starts from.
    pub set: SetId,
    /// The state it leads to.
    pub taken_at: Timestamp,
    /// The database that will hold it in the end.
    pub database: String,
    /// The database it is loaded into first.
    pub staging: String,
    /// Where its files will be.
    pub filestore: Option<String>,
    /// Bytes that the database and the files will take.
    pub needed_bytes: u64,
    /// Bytes that are free where the files go.
    pub free_bytes: Option<u64>,
    /// The steps, in words and in order.
    pub steps: Vec<String>,
}

/// A restore that was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Restored {
    /// The set it was made from.
    pub set: SetId,
    /// The state it leads to.
    pub taken_at: Timestamp,
    /// The database that holds it.
    pub database: String,
    /// Where its files are.
    pub filestore: Option<String>,
    /// The database that was there before, under its new name.
    pub previous: Option<String>,
    /// Files whose hash was compared after writing.
    pub files: u64,
    /// How long it took, in milliseconds: the recovery time.
    pub took_ms: u64,
    /// For how long requests had to wait, in milliseconds, where there is a gateway.
    pub paused_ms: Option<u64>,
}
