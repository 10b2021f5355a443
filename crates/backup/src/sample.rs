//! Sets for tests of decisions.

use jiff::Timestamp;

use crate::model::{
    BackupSet, Consistency, DatabaseArtifact, DatabaseLocale, DumpFormat, EngineKind, FilestoreSummary, LegalHold,
    LocaleProvider, LockAttestation, LockMode, Phases, SetId, Stored,
};

pub(crate) fn set(number: usize, taken_at: Timestamp, consistency: Consistency) -> BackupSet {
    BackupSet {
        id: SetId(format!("set{number}")),
        tenant: cofferdam_tenant::Slug::parse("acme").unwrap(),
        database: "acme".into(),
        taken_at,
        finished_at: taken_at,
        engine: EngineKind::Logical,
        consistency,
        note: None,
        artifact: DatabaseArtifact {
            format: DumpFormat::Custom,
            bytes: 1,
            sha256: None,
            server_version: "15".into(),
            dump_version: "15".into(),
            lsn: None,
            uuid: None,
            database_bytes: 1,
            locale: DatabaseLocale {
                encoding: "UTF8".into(),
                collate: "C".into(),
                ctype: "C".into(),
                provider: LocaleProvider::Libc,
                locale: None,
                icu_rules: None,
            },
            extensions: Vec::new(),
            changes: None,
            tables: 0,
            rows: 0,
        },
        filestore: FilestoreSummary::default(),
        key_id: None,
        lock: LockAttestation::NotAsked,
        stored: Stored::default(),
        phases: Phases::default(),
        hold: None,
    }
}

pub(crate) fn hold() -> LegalHold {
    LegalHold { reason: "case 7".into(), by: "counsel".into(), since: Timestamp::UNIX_EPOCH }
}

pub(crate) fn lock(until: Timestamp) -> LockAttestation {
    LockAttestation::Locked { mode: LockMode::Compliance, until, objects: 1 }
}
