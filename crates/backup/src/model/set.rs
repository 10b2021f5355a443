//! A backup set: one tenant's database and filestore at one instant, and what is known of it.

use std::fmt;

use cofferdam_tenant::Slug;
use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::policy::LockMode;

/// The name of a set: the id of its snapshot in the repository, in hexadecimal. `restic` shows the same.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct SetId(pub String);

impl SetId {
    /// The first eight characters, which people use.
    pub fn short(&self) -> &str {
        self.0.get(..8).unwrap_or(&self.0)
    }
}

impl fmt::Display for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// How it is known that database and files belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// Nothing could be deleted while files were copied, and every file that the database refers to is there with the
    /// right hash.
    Fenced,
    /// Files were copied without protection, or with protection for a part of the time; afterwards every one was
    /// found to be there with the right hash.
    Verified,
    /// Files are missing or differ from what the database says. The database itself is whole. Counts for no objective.
    Unverified,
}

impl Consistency {
    /// Whether everything that the database refers to is in the set.
    pub fn is_complete(self) -> bool {
        !matches!(self, Self::Unverified)
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fenced => "fenced",
            Self::Verified => "verified",
            Self::Unverified => "unverified",
        })
    }
}

/// How the database was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// `pg_dump` with an exported snapshot.
    Logical,
    /// Files of the whole cluster and its log, by pgBackRest.
    Physical,
}

/// How a dump lies in the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DumpFormat {
    /// `pg_dump`'s custom format, uncompressed, because the repository compresses and finds what has not changed. One
    /// stream in parts: `cat odoo.dump/* | pg_restore`.
    Custom,
    /// Several such streams of one snapshot, side by side: the first without the rows of the largest tables, each of the
    /// others with those of some. A part's name ends with the number of its stream: `cat odoo.dump/*.0000 | pg_restore`, and
    /// so on with `--data-only`. `streams.json` says which tables they are.
    Streams,
}

/// The database's part of a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DatabaseArtifact {
    /// How it lies in the repository.
    pub format: DumpFormat,
    /// Bytes of the dump before compression.
    pub bytes: u64,
    /// SHA-256 of the dump's stream, in hexadecimal; of the first, where there are several.
    pub sha256: Option<String>,
    /// The server's version, as in `server_version`.
    pub server_version: String,
    /// What `pg_dump --version` says.
    pub dump_version: String,
    /// The log position at the snapshot, as `16/B374D848`.
    pub lsn: Option<String>,
    /// `database.uuid` of Odoo's parameters.
    pub uuid: Option<String>,
    /// Bytes that the database took on the server.
    pub database_bytes: u64,
    /// Its encoding, collation and character classes, which a copy must have too.
    pub locale: DatabaseLocale,
    /// Its extensions, in the order in which they were created.
    #[serde(default)]
    pub extensions: Vec<Extension>,
    /// How often the database had been written to when it was saved, where the server tells.
    #[serde(default)]
    pub changes: Option<ChangeCounter>,
    /// Tables counted in the snapshot, for drills.
    pub tables: u64,
    /// Their rows together.
    pub rows: u64,
}

/// What a database is created with and cannot change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DatabaseLocale {
    /// As in `pg_encoding_to_char`.
    pub encoding: String,
    /// `LC_COLLATE`.
    pub collate: String,
    /// `LC_CTYPE`.
    pub ctype: String,
    /// Who compares texts.
    #[serde(default)]
    pub provider: LocaleProvider,
    /// The provider's name of the locale, where it is not libc.
    #[serde(default)]
    pub locale: Option<String>,
    /// Rules of ICU's on top of the locale.
    #[serde(default)]
    pub icu_rules: Option<String>,
}

/// A server's count of what is written to a database. As long as it stays the same, nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChangeCounter {
    /// Rows inserted, updated and deleted.
    pub rows: u64,
    /// Since when they are counted; another time is another count.
    pub since: Option<Timestamp>,
}

/// Whose rules of comparison a database follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LocaleProvider {
    /// The operating system's.
    #[default]
    Libc,
    /// ICU's, from PostgreSQL 15 on.
    Icu,
    /// PostgreSQL's own, from 17 on.
    Builtin,
}

/// An extension of a database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Extension {
    /// Its name.
    pub name: String,
    /// The schema of its objects.
    pub schema: String,
    /// Whether `unaccent(text)` was made immutable, as Odoo does to index by it. No dump says so.
    #[serde(default)]
    pub immutable_unaccent: bool,
}

/// The filestore's part of a set. The whole list is in the repository, as `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct FilestoreSummary {
    /// Files that the database refers to.
    pub files: u64,
    /// Their bytes together.
    pub bytes: u64,
    /// Of them, files that were not there.
    pub missing: u64,
    /// Of them, files whose SHA-1 is not their name.
    pub damaged: u64,
    /// Attachments that lie in an object store of Odoo's own; their locations are recorded, their bytes are not here.
    pub remote: u64,
    /// A few names of missing and damaged files.
    pub examples: Vec<String>,
}

/// How much went where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Stored {
    /// Bytes that the set refers to.
    pub total_bytes: u64,
    /// Of them, bytes that were new to the repository.
    pub new_bytes: u64,
    /// What the new ones take, compressed and encrypted.
    pub stored_bytes: u64,
    /// Files that were not in the set before.
    pub new_files: u64,
}

/// How long a backup's phases took, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Phases {
    /// The fence was up.
    pub fence_ms: u64,
    /// Somebody waited because of the fence, at the longest.
    pub stall_ms: u64,
    /// Everything.
    pub total_ms: u64,
}

/// What the store says about deleting the objects of a set, read back after writing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum LockAttestation {
    /// Nobody asked for a lock.
    NotAsked,
    /// Every object that the set refers to is locked until then at least.
    Locked {
        /// Who can lift it.
        mode: LockMode,
        /// The earliest end of any lock.
        until: Timestamp,
        /// Objects that were read back.
        objects: u64,
    },
    /// A lock was asked for, and the store does not hold it.
    NotLocked {
        /// What was read back instead, with the name of an object.
        reason: String,
    },
}

/// A set must not be deleted, whatever the policy says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LegalHold {
    /// Why: a case number, say.
    pub reason: String,
    /// Who has asked for it.
    pub by: String,
    /// Since when.
    pub since: Timestamp,
}

/// One tenant's database and filestore at one instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BackupSet {
    /// Its name; not stored with it.
    #[serde(default)]
    pub id: SetId,
    /// Whose.
    #[schemars(with = "String")]
    pub tenant: Slug,
    /// The database it was made from.
    pub database: String,
    /// The instant whose state it holds.
    pub taken_at: Timestamp,
    /// When it was complete.
    pub finished_at: Timestamp,
    /// How the database was read.
    pub engine: EngineKind,
    /// How it is known that its parts belong together.
    pub consistency: Consistency,
    /// Why it is not fenced, if it is not.
    pub note: Option<String>,
    /// The database.
    pub artifact: DatabaseArtifact,
    /// The files.
    pub filestore: FilestoreSummary,
    /// Which key of the repository opened it.
    pub key_id: Option<String>,
    /// What the store says about deleting it.
    pub lock: LockAttestation,
    /// How much it took.
    pub stored: Stored,
    /// How long it took.
    pub phases: Phases,
    /// Not to be deleted.
    #[serde(default)]
    pub hold: Option<LegalHold>,
}

impl BackupSet {
    /// When its run began, or the instant whose state it holds where that is later: what a server that follows another has may be of
    /// long before.
    pub fn began_at(&self) -> Timestamp {
        let took = SignedDuration::from_millis(i64::try_from(self.phases.total_ms).unwrap_or(i64::MAX));
        self.finished_at.checked_sub(took).map_or(self.taken_at, |began| began.max(self.taken_at))
    }
}
