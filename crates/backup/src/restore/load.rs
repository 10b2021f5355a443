//! A dump into a database that nobody else can reach, and whether everything arrived.

use std::io::{self, Write};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::CancellationToken;

use crate::logical::{RowCounts, blocking, count_rows, last_words, paths};
use crate::model::{BackupSet, DatabaseLocale};
use crate::repository::Repository;
use crate::server::{Server, literal, quoted};
use crate::{Control, Error};

/// Loads a set's dump into an empty database.
pub(super) async fn database(
    server: &Server,
    name: &str,
    owner: Option<&str>,
    keep_grants: bool,
    repository: &Arc<Repository>,
    set: &BackupSet,
    control: &Control,
) -> Result<(), Error> {
    let mut command = pg_restore(server, name, owner, keep_grants);
    let (repository, set, control) = (Arc::clone(repository), set.clone(), control.clone());
    blocking(move || {
        let failed = |reason: String| Error::Program { program: "pg_restore".to_owned(), reason };
        let mut stderr = tempfile::tempfile().map_err(|e| failed(e.to_string()))?;
        let written = stderr.try_clone().map_err(|e| failed(e.to_string()))?;
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(written);
        let mut child = command.spawn().map_err(|e| failed(e.to_string()))?;
        let Some(stdin) = child.stdin.take() else { return Err(failed("it has no input".to_owned())) };
        let fed = feed(&repository, &set, stdin, &control);
        if matches!(fed, Err(Error::Cancelled)) {
            let _ = child.kill();
        }
        let status = child.wait().map_err(|e| failed(e.to_string()))?;
        if control.is_cancelled() {
            return Err(Error::Cancelled);
        }
        // Why the program stopped reading is in what it printed; that its input broke then follows from it.
        if !status.success() {
            let words = last_words(&mut stderr, status);
            return match fed {
                Err(error) if !matches!(error, Error::Program { .. }) => Err(error),
                _ => Err(failed(words)),
            };
        }
        fed
    })
    .await
}

/// The parts of a dump, one after the other.
fn feed(repository: &Repository, set: &BackupSet, stdin: ChildStdin, control: &Control) -> Result<(), Error> {
    let reader = repository.reader(&set.id)?;
    let mut sink = Counted { inner: stdin, control: control.clone(), broken: None };
    let mut part = 0;
    let mut bytes = 0;
    while bytes < set.artifact.bytes {
        let before = control.moved();
        let path = format!("{}/{part:08}", paths::DUMP);
        let read = reader.file(&path, &mut sink);
        if control.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if let Some(error) = sink.broken.take() {
            return Err(Error::Program { program: "pg_restore".to_owned(), reason: error.to_string() });
        }
        read?;
        bytes += control.moved() - before;
        part += 1;
    }
    if bytes != set.artifact.bytes {
        let reason = format!("{bytes} bytes were read and {} were saved", set.artifact.bytes);
        return Err(Error::Mismatch { what: paths::DUMP.to_owned(), reason });
    }
    Ok(())
}

/// A program's input that counts, stops when it shall, and remembers why it broke.
struct Counted {
    inner: ChildStdin,
    control: Control,
    broken: Option<io::Error>,
}

impl Write for Counted {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.control.is_cancelled() {
            return Err(io::Error::other("stopped"));
        }
        match self.inner.write(buffer) {
            Ok(written) => {
                self.control.add(written as u64);
                Ok(written)
            }
            Err(error) => {
                self.broken.get_or_insert_with(|| io::Error::new(error.kind(), error.to_string()));
                Err(error)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Creates a database that only its creator can connect to, for things that will belong to somebody. `made` says whether
/// it was created, also when what follows fails.
pub(super) async fn create_for(
    server: &Server,
    name: &str,
    locale: &DatabaseLocale,
    owner: Option<&str>,
    made: &AtomicBool,
) -> Result<(), Error> {
    let client = server.connect(&server.maintenance).await?;
    let create = format!(
        "CREATE DATABASE {} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}",
        quoted(name),
        literal(&locale.encoding),
        literal(&locale.collate),
        literal(&locale.ctype)
    );
    client.batch_execute(&create).await.map_err(|e| server.failed(name, &e))?;
    made.store(true, Ordering::SeqCst);
    let close = format!("REVOKE ALL ON DATABASE {} FROM PUBLIC", quoted(name));
    client.batch_execute(&close).await.map_err(|e| server.failed(name, &e))?;
    if let Some(owner) = owner.filter(|owner| *owner != server.user) {
        // So that what is restored belongs to whom it shall belong, while the database is not yet theirs.
        let client = server.connect(name).await?;
        let grant = format!(
            "GRANT CREATE, CONNECT, TEMPORARY ON DATABASE {} TO {1}; ALTER SCHEMA public OWNER TO {1}",
            quoted(name),
            quoted(owner)
        );
        client.batch_execute(&grant).await.map_err(|e| server.failed(name, &e))?;
    }
    Ok(())
}

/// `pg_restore` into a database, as its future owner.
pub(super) fn pg_restore(server: &Server, name: &str, owner: Option<&str>, keep_grants: bool) -> Command {
    let mut command = server.program("pg_restore", name);
    command.args(["--no-owner", "--exit-on-error", "--no-password", "--dbname"]).arg(name);
    if let Some(owner) = owner.filter(|owner| *owner != server.user) {
        command.arg(format!("--role={owner}"));
    }
    if !keep_grants {
        // Who may read a copy is not who may read the original; some of them may not even be here.
        command.arg("--no-privileges");
    }
    command
}

/// Compares the rows of every table with those that were counted in the snapshot.
pub(super) async fn compare_rows(
    server: &Server,
    name: &str,
    repository: &Arc<Repository>,
    set: &BackupSet,
) -> Result<(), Error> {
    compare(server, name, &saved_rows(repository, set).await?).await
}

/// Compares the rows of every table with what was counted.
pub(super) async fn compare(server: &Server, name: &str, saved: &RowCounts) -> Result<(), Error> {
    let found = count_rows(server, name, None, &CancellationToken::new()).await?;
    let wrong: Vec<String> = saved
        .iter()
        .filter_map(|(table, rows)| match found.get(table) {
            Some(found) if found == rows => None,
            Some(found) => Some(format!("{table} has {found} rows instead of {rows}")),
            None => Some(format!("{table} is missing")),
        })
        .chain(found.keys().filter(|t| !saved.contains_key(*t)).map(|t| format!("{t} was not in the backup")))
        .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    let reason = wrong.into_iter().take(10).collect::<Vec<_>>().join("; ");
    Err(Error::Mismatch { what: format!("database {name}"), reason })
}

/// How many rows each table had when it was saved.
pub(crate) async fn saved_rows(repository: &Arc<Repository>, set: &BackupSet) -> Result<RowCounts, Error> {
    let (repository, id) = (Arc::clone(repository), set.id.clone());
    blocking(move || {
        let mut text = Vec::new();
        repository.reader(&id)?.file(paths::TABLES, &mut text)?;
        serde_json::from_slice(&text)
            .map_err(|e| Error::Mismatch { what: paths::TABLES.to_owned(), reason: e.to_string() })
    })
    .await
}

#[allow(clippy::disallowed_methods)] // in a thread that may wait, for a program that signals nothing
pub(super) fn pause() {
    std::thread::sleep(std::time::Duration::from_millis(20));
}
