//! One database at one instant, out of a shared cluster's backup.
//!
//! The neighbours' files are not restored, but the log speaks of them: where they were vacuumed or dropped meanwhile, the
//! server finds references to pages that are not there, and would stop. It is told to go on, and every such reference is
//! looked at afterwards: one to the wanted database, or to what all share, means that the result cannot be trusted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::pgbackrest::{PhysicalEngine, RecoveryPlace};
use crate::drill::amcheck;
use crate::logical::blocking;
use crate::scratch::{Place, ScratchCluster};
use crate::server::Server;
use crate::{Control, Error};

/// A recovery that somebody asks for.
#[derive(Debug, Clone)]
pub struct Recovery {
    /// The cluster's backups.
    pub engine: Arc<dyn PhysicalEngine>,
    /// The database.
    pub database: String,
    /// The instant: nothing that was committed later is in the result.
    pub at: Timestamp,
    /// The directory of PostgreSQL's programs, of the cluster's version; the newest installed if none.
    pub programs: Option<std::path::PathBuf>,
    /// Where the recovered files are for a while; the directory for temporary files if none.
    pub place: Option<std::path::PathBuf>,
}

/// A private server with the recovered database in it. Gone when it is dropped.
pub struct Recovered {
    cluster: ScratchCluster,
    /// References to pages of neighbours that were not restored, which harm nobody.
    pub foreign_pages: u64,
    /// The backup that it was made from.
    pub label: String,
}

impl std::fmt::Debug for Recovered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recovered")
            .field("label", &self.label)
            .field("foreign_pages", &self.foreign_pages)
            .finish_non_exhaustive()
    }
}

impl Recovered {
    /// How to connect to it, as its superuser `postgres`.
    pub fn server(&self) -> &Server {
        &self.cluster.server
    }
}

/// How long replaying the log may take.
const REPLAY: Duration = Duration::from_secs(6 * 3_600);

impl Recovery {
    /// Recovers. Whether the instant can be reached is found out first, before anything is written.
    pub async fn run(&self, control: &Control) -> Result<Recovered, Error> {
        control.phase("looking at the archived log", None);
        let (programs, place) = (self.programs.clone(), self.place.clone());
        let engine = Arc::clone(&self.engine);
        let (place, found) = blocking(move || {
            let found = engine.stanza()?;
            Ok((Place::new(programs.as_deref(), place.as_deref())?, found))
        })
        .await?;
        let coverage = found
            .archive
            .covers(&found.backups, self.at)
            .map_err(|e| Error::Refused(format!("{e}; nothing was changed")))?;
        let label = coverage.backup.label;
        control.phase("restoring the cluster's files", None);
        let (engine, database, at, set) = (Arc::clone(&self.engine), self.database.clone(), self.at, label.clone());
        let cluster = blocking(move || {
            engine.restore(&RecoveryPlace { root: place.path(), data: &place.data() }, &set, &database, at)?;
            let hba = place.path().join("hba.conf");
            let config = place.path().join("scratch.conf");
            for (path, text) in [(&hba, "local all all trust\n"), (&config, "")] {
                std::fs::write(path, text).map_err(|e| Error::files(path, &e))?;
            }
            let (hba, config) = (hba.display().to_string(), config.display().to_string());
            place.start(&[
                ("config_file", &config),
                ("hba_file", &hba),
                ("archive_mode", "off"),
                ("ssl", "off"),
                // So that a connection means that the instant is reached, and not somewhere before it.
                ("hot_standby", "off"),
                ("ignore_invalid_pages", "on"),
                ("restart_after_crash", "off"),
                ("shared_preload_libraries", ""),
                ("max_logical_replication_workers", "0"),
                ("log_min_messages", "warning"),
                ("log_line_prefix", ""),
                ("lc_messages", "C"),
            ])
        })
        .await?;
        control.phase("replaying the log", None);
        self.wait(&cluster, control).await?;
        let wanted = self.oid(&cluster).await?;
        let log = cluster.log();
        let foreign_pages = classify(&log, wanted)
            .map_err(|reason| Error::Mismatch { what: format!("database {}", self.database), reason })?;
        control.phase("examining", None);
        if amcheck(&cluster.server, &self.database).await?.is_none() {
            control.warn("amcheck is not installed: indexes and tables were not compared");
        }
        Ok(Recovered { cluster, foreign_pages, label })
    }

    async fn wait(&self, cluster: &ScratchCluster, control: &Control) -> Result<(), Error> {
        let started = Instant::now();
        let mut seen = false;
        loop {
            if control.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if cluster.server.connect("postgres").await.is_ok() {
                return Ok(());
            }
            let ended = cluster.has_ended();
            seen |= !ended;
            if seen && ended || started.elapsed() > REPLAY || !seen && started.elapsed() > Duration::from_secs(60) {
                return Err(self.failed(&cluster.log()));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Why the server gave up, in the words that help.
    fn failed(&self, log: &str) -> Error {
        if log.contains("recovery ended before configured recovery target was reached") {
            let at = self.at;
            let reason = format!("the archived log ends before anything that was committed after {at}");
            let advice = "let the cluster commit something and switch its log, or choose an earlier time";
            return Error::Refused(format!("{reason}; {advice}; nothing was changed"));
        }
        let words: Vec<&str> = log.lines().filter(|l| l.starts_with("FATAL") || l.starts_with("PANIC")).collect();
        let reason = if words.is_empty() {
            log.lines().last().unwrap_or("it did not start").to_owned()
        } else {
            words.join("; ")
        };
        Error::Program { program: "postgres".to_owned(), reason }
    }

    async fn oid(&self, cluster: &ScratchCluster) -> Result<u32, Error> {
        let client = cluster.server.connect("postgres").await?;
        let query = "SELECT oid FROM pg_database WHERE datname = $1";
        let row = client.query_opt(query, &[&self.database]).await;
        let row = row.map_err(|e| cluster.server.failed(&self.database, &e))?;
        let missing =
            || Error::Refused(format!("there was no database {} at {}; nothing was changed", self.database, self.at));
        Ok(row.ok_or_else(missing)?.get(0))
    }
}

/// `template1`, `template0` and `postgres`, which are restored whole.
const SYSTEM: [u32; 3] = [1, 4, 5];

/// How many pages the log spoke of that are not there and need not be; or which one should have been.
fn classify(log: &str, wanted: u32) -> Result<u64, String> {
    let mut foreign = 0;
    for line in log.lines() {
        let Some(text) = line.strip_prefix("WARNING:  page ") else { continue };
        let Some((_, relation)) = text.split_once(" of relation ") else { continue };
        let path = relation.split(' ').next().unwrap_or_default();
        // `base/16385/16390`, `pg_tblspc/16400/PG_15_202209061/16385/16390`, `global/1262`.
        let parts: Vec<&str> = path.split('/').collect();
        let database = match parts[..] {
            ["base", database, _] | ["pg_tblspc", _, _, database, _] => database.parse::<u32>().ok(),
            _ => None,
        };
        match database {
            Some(oid) if oid != wanted && !SYSTEM.contains(&oid) => foreign += 1,
            _ => return Err(format!("the log needs a page that is not there: {text}")),
        }
    }
    Ok(foreign)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As PostgreSQL 15 has written them.
    const LOG: &str = "\
LOG:  starting point-in-time recovery
WARNING:  page 0 of relation base/16434/16436 is uninitialized
CONTEXT:  WAL redo at 0/87307B8 for Heap2/VISIBLE: cutoff xid 0 flags 0x01; blkref #0: rel 1663/16434/16436, fork 2, blk 0
WARNING:  page 3 of relation pg_tblspc/16400/PG_15_202209061/16434/16499_vm does not exist
WARNING:  WAL contains references to invalid pages
";

    /// `reference`, Backup: "the warnings must be classified: only other databases' OIDs may appear".
    #[test]
    fn pages_of_neighbours_may_be_missing_and_no_others() {
        assert_eq!(classify(LOG, 16_500), Ok(2));
        assert!(classify(LOG, 16_434).unwrap_err().contains("page"));
        for path in ["global/1262", "base/1/2619", "base/5/2619", "somewhere/else"] {
            let log = format!("WARNING:  page 0 of relation {path} does not exist");
            assert!(classify(&log, 16_500).is_err(), "{path}");
        }
    }
}
