//! The physical engine: the files of a whole cluster and its log, by pgBackRest, and one tenant to a point in time out of
//! them.
//!
//! A cluster is shared by tenants, and one of them wants to go back to a second before a mistake while the others go on.
//! So the cluster's backup is restored beside everything, with the files of that tenant's database alone; the log is
//! replayed to the instant; the database is looked through, dumped, and loaded into the shared cluster as any backup is.

mod pgbackrest;
mod recovery;
mod wal;

pub use pgbackrest::{BackupKind, PgBackRest, PhysicalBackup, PhysicalEngine, RecoveryPlace, Stanza};
pub use recovery::{Recovered, Recovery};
pub use wal::{Archive, Coverage, Uncovered};
