//! The logical engine: `pg_dump` on an exported snapshot, and exactly the files that the snapshot refers to.
//!
//! The order is what makes it right: raise the fence, take the snapshot, start `pg_dump` on it, copy the files, lower the
//! fence, let the dump stream. Odoo's own backup, and others after it, copy the files first: an attachment made between
//! the two is in the dump and not among the files.

mod dump;
mod fence;
mod filestore;
mod sequences;

use std::io::{self, Cursor};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, mpsc};
use std::time::{Duration, Instant};

use cofferdam_tenant::Slug;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

pub use dump::RowCounts;
pub(crate) use dump::{Stream, count_rows, last_words, part_path};
pub(crate) use fence::filtered_in;
pub(crate) use filestore::{DEEPEST, is_sha1, stays_below};
pub use filestore::{Manifest, ManifestFile};

use crate::model::{
    BackupPolicy, BackupSet, Consistency, DatabaseArtifact, DumpFormat, EngineKind, FilestoreSummary, LockAttestation,
    Phases,
};
use crate::repository::{Entry, Repository, RepositoryKey, Store};
use crate::server::Server;
use crate::{Control, Error};
use dump::{Dump, Subject, dump_version};
use fence::{Fence, FenceReport, Snapshot, Table, Tenancy};
use filestore::{Files, SharedFindings};
use sequences::Sequence;

/// What is to be backed up, and where to.
#[derive(Debug, Clone)]
pub struct Backup {
    /// Whose.
    pub tenant: Slug,
    /// The server of its database.
    pub server: Server,
    /// Where `pg_dump` connects, if that is not the server itself: a gateway, which makes its work wait its turn.
    pub dump_through: Option<Server>,
    /// The database.
    pub database: String,
    /// The directory of its files, `<data_dir>/filestore/<database>`.
    pub filestore: PathBuf,
    /// Where the objects go.
    pub store: Arc<dyn Store>,
    /// The key of the tenant's repository.
    pub key: RepositoryKey,
    /// How.
    pub policy: BackupPolicy,
}

/// The paths in a set.
pub(crate) mod paths {
    pub(crate) const FILESTORE: &str = "filestore";
    pub(crate) const MANIFEST: &str = "manifest.json";
    pub(crate) const DUMP: &str = "odoo.dump";
    pub(crate) const SEQUENCES: &str = "sequences.sql";
    pub(crate) const STREAMS: &str = "streams.json";
    pub(crate) const TABLES: &str = "tables.json";
}

/// Without a fence a file may go while others are copied: then everything is tried again, with a new snapshot.
const ATTEMPTS: u32 = 3;

impl Backup {
    /// Makes a backup set.
    ///
    /// The set exists when this returns, and not before; on any error, and whenever the future or the process is
    /// dropped, there is none, no fence and no half of anything that looks whole. What was stored meanwhile speeds the
    /// next run up, and goes with a prune if there is none.
    pub async fn run(&self, control: &Control) -> Result<BackupSet, Error> {
        let started = Instant::now();
        control.phase("opening the repository", None);
        let (tenant, store, key) = (self.tenant.clone(), Arc::clone(&self.store), self.key.clone());
        let repository = blocking(move || Ok(Repository::open_or_create(tenant, store, &key)?)).await?;
        let repository = Arc::new(repository);
        let mut attempt = 1;
        loop {
            let (set, retry) = self.attempt(&repository, control, started).await?;
            let last = attempt == ATTEMPTS || !retry;
            match set {
                Candidate::Complete(publish) => return publish.now().await,
                Candidate::Incomplete(publish) if last => {
                    let set = publish.now().await?;
                    let FilestoreSummary { missing, damaged, .. } = set.filestore;
                    control.warn(format!("of the filestore {missing} files are missing and {damaged} differ"));
                    return Ok(set);
                }
                Candidate::Incomplete(_) => {
                    control.warn("files went while they were copied without a fence: once more");
                    attempt += 1;
                }
                Candidate::Changed(reason) if last => {
                    let reason = format!("{reason}; try again");
                    return Err(Error::Database {
                        server: self.server.name(),
                        database: self.database.clone(),
                        reason,
                    });
                }
                Candidate::Changed(reason) => {
                    control.warn(format!("{reason}: once more"));
                    attempt += 1;
                }
            }
        }
    }

    async fn attempt(
        &self,
        repository: &Arc<Repository>,
        control: &Control,
        started: Instant,
    ) -> Result<(Candidate, bool), Error> {
        let limits = &self.policy.fence;
        // Dropping this future stops what runs in other threads.
        let control = &control.child();
        let _stop = control.stop_on_drop();
        let database = self.database.clone();
        let copied = CancellationToken::new();
        let idle = AbortOnDropHandle::new(tokio::spawn(idle(control.clone())));
        let fence = Fence::raise(&self.server, &database, limits).await?;
        // Watched from the first moment: what comes next may itself have to wait for somebody who waits for the fence.
        let fence = fence.guard(self.server.clone(), database.clone(), *limits, copied.clone(), control.clone());
        let fence = AbortOnDropHandle::new(tokio::spawn(fence));
        let snapshot = Snapshot::take(&self.server, &database).await?;
        let schemas = snapshot.schemas().await.map_err(|e| self.server.failed(&database, &e))?;
        let Tenancy { uuid, attachments, modules, undumped, filtered, unknown, sequences, unrestorable, tables } =
            control.unless_cancelled(snapshot.read(&self.server, &database)).await?;
        // A gateway lets a tenant's background work in one by one.
        let jobs = if self.dump_through.is_some() { 1 } else { self.policy.parallel.jobs_for(snapshot.database_bytes) };
        let large = large(tables, snapshot.database_bytes, jobs);
        let dump_server = self.dump_through.as_ref().unwrap_or(&self.server).clone();
        let version = {
            let (server, major) = (dump_server.clone(), snapshot.server_major);
            blocking(move || dump_version(&server, major)).await?
        };
        control.phase("reading database and files", Some(snapshot.database_bytes));
        // A time that no other set has: what is saved under one is not looked into if it bears the same.
        let saved_at = Timestamp::now();
        let (taken_at, begun, counting) = (snapshot.taken_at, CancellationToken::new(), CancellationToken::new());
        let subject = Subject {
            server: &dump_server,
            database: &database,
            snapshot: &snapshot.id,
            sequences: &sequences,
            filtered: &filtered,
            large: &large,
            jobs: jobs as usize,
            saved_at,
        };
        let (dump, streams) = Dump::start(&subject, begun.clone(), control)?;
        let (rows_in, rows_out) = mpsc::sync_channel::<Result<RowCounts, Error>>(1);
        {
            let (server, database, id) = (self.server.clone(), database.clone(), snapshot.id.clone());
            let (stop, imported) = (control.clone(), counting.clone());
            tokio::spawn(async move {
                let counted = tokio::select! {
                    counted = count_rows(&server, &database, Some(&id), &imported) => counted,
                    () = stop.cancelled() => Err(Error::Cancelled),
                };
                imported.cancel();
                let _ = rows_in.send(counted);
            });
        }
        let manifest = Arc::new(Manifest { modules, ..Manifest::of(attachments) });
        let findings = SharedFindings::default();
        let rows: Arc<std::sync::Mutex<RowCounts>> = Arc::default();
        let files =
            Files::new(Arc::clone(&manifest), &self.filestore, findings.clone(), control.clone(), copied.clone());
        let entries = entries(files, &manifest, (dump, &streams), &sequences, (rows_out, &rows), saved_at)?;
        let behind = snapshot.behind;
        let (lsn, locale, database_bytes) = (snapshot.lsn.clone(), snapshot.locale.clone(), snapshot.database_bytes);
        let (extensions, changes) = (snapshot.extensions.clone(), snapshot.changes);
        let server_version = snapshot.server_version.clone();
        let archive = {
            let repository = Arc::clone(repository);
            blocking(move || {
                let parent = repository.sets()?.into_iter().rev().find(|set| set.consistency.is_complete());
                Ok(repository.archive(entries, parent.as_ref().map(|p| &p.id), taken_at)?)
            })
        };
        let archive = async {
            let archived = archive.await;
            // Whatever came of it, nobody needs fence or snapshot any more.
            copied.cancel();
            begun.cancel();
            counting.cancel();
            archived
        };
        let users = [begun.clone(), counting.clone()];
        let (archived, fence, changed) = tokio::join!(archive, fence, snapshot.hold(&self.server, &database, &users));
        if idle.is_finished() {
            let reason = format!("nothing has moved for {} minutes: somebody holds up pg_dump", IDLE.as_secs() / 60);
            return Err(Error::Program { program: "pg_dump".to_owned(), reason });
        }
        if control.is_cancelled() {
            return Err(Error::Cancelled);
        }
        // This explains whatever else has failed.
        let reason = match (&changed, schemas.changed(&self.server, &database).await) {
            (Ok(Some(table)), _) => {
                Some(format!("{table} was emptied, rewritten, replaced or altered after the snapshot"))
            }
            (_, Ok(schema)) => schema.map(|what| format!("{what} was renamed, changed or removed during the backup")),
            (_, Err(error)) => {
                archived?;
                changed?;
                return Err(error);
            }
        };
        if let Some(reason) = reason {
            return Ok((Candidate::Changed(reason), true));
        }
        let archived = archived?;
        changed?;
        // A watcher that lost its connection has lost the fence, at a time that nobody knows.
        let fence = fence.unwrap_or_else(|error| Err(Error::panicked(&error)));
        let fence =
            fence.unwrap_or_else(|error| FenceReport { lowered: Some(error.to_string()), ..Default::default() });
        let Some(streams) = dump::whole(&streams) else {
            return Err(Error::Program { program: "pg_dump".to_owned(), reason: "it did not finish".to_owned() });
        };
        let rows = std::mem::take(&mut *rows.lock().unwrap_or_else(PoisonError::into_inner));
        let filestore = findings.summary();
        let complete = filestore.missing == 0 && filestore.damaged == 0;
        let consistency = match (&fence.lowered, complete) {
            (_, false) => Consistency::Unverified,
            (None, true) => Consistency::Fenced,
            (Some(_), true) => Consistency::Verified,
        };
        let mut notes: Vec<String> =
            fence.lowered.iter().map(|reason| format!("no fence to the end: {reason}")).collect();
        if let Some(behind) = behind {
            let told = format!("the server follows another, and was {} s behind it", behind.as_secs());
            control.warn(told.clone());
            notes.push(told);
        }
        if !undumped.is_empty() {
            let names = undumped.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
            let left_out =
                format!("the rows of {} tables of extensions are not saved, such as {names}", undumped.len());
            control.warn(left_out.clone());
            notes.push(left_out);
        }
        if !unknown.is_empty() {
            let names = unknown.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
            let told = format!(
                "where {} sequences begin that were not used yet is not saved, such as {names}: only a superuser may read it, of a \
                 server that follows no other",
                unknown.len()
            );
            control.warn(told.clone());
            notes.push(told);
        }
        if !unrestorable.is_empty() {
            let names = unrestorable.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
            let told = format!(
                "a restore will fail at {names}: only a superuser could create that, or it stands on what is left out"
            );
            control.warn(told.clone());
            notes.push(told);
        }
        let note = (!notes.is_empty()).then(|| notes.join("; "));
        let retry = fence.lowered.is_some() && filestore.missing > 0;
        let set = BackupSet {
            id: crate::model::SetId::default(),
            tenant: self.tenant.clone(),
            database: self.database.clone(),
            taken_at,
            finished_at: Timestamp::now(),
            engine: EngineKind::Logical,
            consistency,
            note,
            artifact: DatabaseArtifact {
                format: if large.is_empty() { DumpFormat::Custom } else { DumpFormat::Streams },
                bytes: streams.iter().map(|stream| stream.bytes).sum(),
                sha256: streams.first().map(|stream| stream.sha256.clone()),
                server_version,
                dump_version: version,
                lsn,
                uuid,
                database_bytes,
                locale,
                extensions,
                changes,
                tables: rows.len() as u64,
                rows: rows.values().sum(),
            },
            filestore,
            key_id: repository.key_id(),
            lock: LockAttestation::NotAsked,
            stored: archived.stored,
            phases: Phases {
                fence_ms: fence.up.as_millis() as u64,
                stall_ms: fence.longest_wait.as_millis() as u64,
                total_ms: started.elapsed().as_millis() as u64,
            },
            hold: None,
        };
        let publish = Publish { repository: Arc::clone(repository), archived, set };
        let candidate = if complete { Candidate::Complete(publish) } else { Candidate::Incomplete(publish) };
        Ok((candidate, retry))
    }
}

/// The tables whose rows other programs dump, in a database that is large: those that are worth it.
fn large(tables: Vec<Table>, database_bytes: u64, jobs: u32) -> Vec<Table> {
    if jobs == 1 {
        return Vec::new();
    }
    // Smaller ones are a part of the rest.
    let worth = database_bytes / (u64::from(jobs) * 8);
    tables.into_iter().filter(|table| table.bytes > worth).collect()
}

/// A backup of which nothing has moved for so long does not go on: somebody holds what it waits for.
const IDLE: Duration = Duration::from_secs(15 * 60);

/// Ends when nothing has moved for too long, and stops everything then.
async fn idle(control: Control) {
    let (mut moved, mut since) = (control.moved(), Instant::now());
    loop {
        tokio::time::sleep(Duration::from_secs(10)).await;
        let now = control.moved();
        if now != moved {
            (moved, since) = (now, Instant::now());
        } else if since.elapsed() > IDLE {
            control.cancel();
            return;
        }
    }
}

/// The files that a database refers to now.
pub(crate) async fn manifest_of(server: &Server, database: &str) -> Result<Manifest, Error> {
    let snapshot = Snapshot::take(server, database).await?;
    Ok(Manifest::of(snapshot.attachments(server, database).await?))
}

/// A set that is stored and that nobody sees yet.
enum Candidate {
    Complete(Publish),
    Incomplete(Publish),
    /// Nothing that was read can be trusted.
    Changed(String),
}

struct Publish {
    repository: Arc<Repository>,
    archived: crate::repository::Archived,
    set: BackupSet,
}

impl Publish {
    async fn now(self) -> Result<BackupSet, Error> {
        blocking(move || Ok(self.repository.publish(self.archived, self.set)?)).await
    }
}

/// Everything of a set, in the order of its names: files first, so that the fence is short, then the dump.
///
/// What is made anew for each set bears the time of the set, so that it is never taken for the parent's.
fn entries(
    files: Files,
    manifest: &Manifest,
    (dump, streams): (Dump, &dump::Shared),
    sequences: &[Sequence],
    (counted, rows): (mpsc::Receiver<Result<RowCounts, Error>>, &Arc<std::sync::Mutex<RowCounts>>),
    saved_at: Timestamp,
) -> Result<impl Iterator<Item = io::Result<Entry>> + Send + 'static, Error> {
    let text = serde_json::to_vec(manifest)
        .map_err(|e| Error::Mismatch { what: paths::MANIFEST.to_owned(), reason: e.to_string() })?;
    let manifest = document(paths::MANIFEST, text, saved_at);
    let statements: Vec<&str> = sequences.iter().filter_map(|sequence| sequence.statement.as_deref()).collect();
    let sequences = document(paths::SEQUENCES, (statements.join("\n") + "\n").into_bytes(), saved_at);
    let streams = Arc::clone(streams);
    // Which part belongs to which, where there is more than one.
    let streams = std::iter::once_with(move || {
        let whole = dump::whole(&streams).ok_or_else(|| io::Error::other("pg_dump did not finish"));
        match whole {
            Ok(streams) if streams.len() == 1 => None,
            whole => Some(whole.and_then(|s| Ok(document(paths::STREAMS, serde_json::to_vec(&s)?, saved_at)))),
        }
    });
    let rows = Arc::clone(rows);
    let tables = std::iter::once_with(move || {
        let counts = counted
            .recv()
            .map_err(|_| io::Error::other("nobody counts the rows any more"))?
            .map_err(|e| io::Error::other(format!("counting rows: {e}")))?;
        let text = serde_json::to_vec(&counts)?;
        *rows.lock().unwrap_or_else(PoisonError::into_inner) = counts;
        Ok(document(paths::TABLES, text, saved_at))
    });
    Ok(files.chain([Ok(manifest)]).chain(dump).chain([Ok(sequences)]).chain(streams.flatten()).chain(tables))
}

fn document(path: &str, text: Vec<u8>, saved_at: Timestamp) -> Entry {
    Entry {
        path: path.to_owned(),
        size: text.len() as u64,
        modified: Some(saved_at),
        open: Box::new(move || Ok(Box::new(Cursor::new(text)))),
    }
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(Error::panicked(&error)),
    }
}
