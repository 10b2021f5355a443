//! The database's part of a backup: `pg_dump` as a stream, and how many rows there are to find again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::fence::Sequence;
use super::paths;
use crate::program::Running;
use crate::repository::Entry;
use crate::rows;
use crate::server::{Server, literal, quoted};
use crate::{Control, Error};

/// Rows by `schema.table`, in the snapshot.
pub type RowCounts = BTreeMap<String, u64>;

/// What a dump's stream was, when it has ended well.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Streamed {
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

/// A running `pg_dump`, whose stream comes in parts: the repository wants to know the size of a file before it has read
/// it, and parts are stored side by side. Nothing but a few parts is ever in memory, and nothing on disk. Dropped, the
/// program is stopped.
pub(super) struct Dump {
    child: Option<Running>,
    stdout: ChildStdout,
    stderr: File,
    hash: Sha256,
    bytes: u64,
    part: usize,
    control: Control,
    taken_at: Timestamp,
    room: Arc<Room>,
    /// Cancelled when the program has begun to write, and so has its snapshot.
    begun: CancellationToken,
    done: Arc<Mutex<Option<Streamed>>>,
}

/// What is known of the stream when it has ended well.
type Shared = Arc<Mutex<Option<Streamed>>>;

/// Bytes of a part. A multiple of what the repository cuts, so that a change moves few cuts.
const PART: usize = 16 << 20;
/// Parts in memory at a time.
const PARTS: usize = 4;

/// How many parts are in memory.
#[derive(Debug, Default)]
struct Room {
    taken: Mutex<usize>,
    freed: Condvar,
}

impl Room {
    fn take(self: &Arc<Self>) -> Place {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken >= PARTS {
            taken = self.freed.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken += 1;
        Place(Arc::clone(self))
    }
}

struct Place(Arc<Room>);

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

/// A part, which frees its place when it has been read.
struct Part {
    bytes: Cursor<Vec<u8>>,
    _place: Place,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.bytes.read(buffer)
    }
}

impl Dump {
    /// Starts `pg_dump` on a snapshot.
    pub(super) fn start(
        server: &Server,
        database: &str,
        (snapshot, sequences): (&str, &[Sequence]),
        taken_at: Timestamp,
        begun: CancellationToken,
        control: Control,
    ) -> Result<(Self, Shared), Error> {
        let failed = |reason: String| Error::Program { program: "pg_dump".to_owned(), reason };
        let stderr = tempfile::tempfile().map_err(|e| failed(e.to_string()))?;
        let written = stderr.try_clone().map_err(|e| failed(e.to_string()))?;
        let mut command = server.program("pg_dump", database);
        // Uncompressed: the repository compresses, and what has not changed since the last time is stored once.
        command.args(["--format=custom", "--compress=0", "--no-password", "--lock-wait-timeout=30s"]);
        command.arg(format!("--snapshot={snapshot}"));
        for sequence in sequences {
            command.arg(format!("--exclude-table-data={}", sequence.name));
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(written);
        let mut child = command.spawn().map_err(|e| failed(e.to_string()))?;
        let Some(stdout) = child.stdout.take() else { return Err(failed("it has no output".to_owned())) };
        let done = Arc::new(Mutex::new(None));
        let dump = Self {
            child: Some(Running::new(child, &control)),
            stdout,
            stderr,
            hash: Sha256::new(),
            bytes: 0,
            part: 0,
            control,
            taken_at,
            room: Arc::default(),
            begun,
            done: Arc::clone(&done),
        };
        Ok((dump, done))
    }

    /// The end of the stream: good only if the program says so.
    fn finish(&mut self) -> io::Result<()> {
        let Some(child) = self.child.take() else { return Ok(()) };
        let status = child.wait()?;
        if !status.success() {
            return Err(io::Error::other(format!("pg_dump: {}", last_words(&mut self.stderr, status))));
        }
        Ok(())
    }
}

impl Dump {
    /// The next part; empty at the end.
    fn read_part(&mut self) -> io::Result<Vec<u8>> {
        let mut part = Vec::new();
        let mut buffer = vec![0; 256 << 10];
        while part.len() < PART {
            if self.control.is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let wanted = buffer.len().min(PART - part.len());
            let read = match self.stdout.read(&mut buffer[..wanted]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            };
            if read == 0 {
                self.finish()?;
                break;
            }
            self.begun.cancel();
            self.control.add(read as u64);
            part.extend_from_slice(&buffer[..read]);
        }
        self.hash.update(&part);
        self.bytes += part.len() as u64;
        if self.child.is_none() {
            let sha256 = hex::encode(std::mem::take(&mut self.hash).finalize());
            *self.done.lock().unwrap_or_else(PoisonError::into_inner) = Some(Streamed { bytes: self.bytes, sha256 });
        }
        Ok(part)
    }
}

impl Iterator for Dump {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<io::Result<Entry>> {
        self.child.as_ref()?;
        let place = self.room.take();
        let bytes = match self.read_part() {
            Ok(bytes) if bytes.is_empty() => return None,
            Ok(bytes) => bytes,
            Err(error) => return Some(Err(error)),
        };
        let path = format!("{}/{:08}", paths::DUMP, self.part);
        self.part += 1;
        Some(Ok(Entry {
            path,
            size: bytes.len() as u64,
            modified: Some(self.taken_at),
            open: Box::new(move || Ok(Box::new(Part { bytes: Cursor::new(bytes), _place: place }))),
        }))
    }
}

/// What a program printed last before it failed, without what stands in the statement it names.
pub(crate) fn last_words(stderr: &mut File, status: std::process::ExitStatus) -> String {
    let mut bytes = Vec::new();
    let read = stderr.seek(SeekFrom::Start(0)).and_then(|_| stderr.read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    let words: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match (read, words.len()) {
        (Ok(_), 1..) => {
            // What it said first about what went wrong, and how it ended: what is between is context, and may be long.
            let first = words.iter().position(|line| line.contains("ERROR:") || line.contains("error:"));
            let last = words.len().saturating_sub(3);
            let first = first.filter(|at| *at < last).map(|at| words[at]);
            first.into_iter().chain(words[last..].iter().copied()).collect::<Vec<_>>().join("; ")
        }
        _ => status.to_string(),
    }
}

/// The version of `pg_dump`, which must not be older than the server.
pub(super) fn dump_version(server: &Server, server_major: u32) -> Result<String, Error> {
    let failed = |reason: String| Error::Program { program: "pg_dump".to_owned(), reason };
    let mut command: Command = server.program("pg_dump", &server.maintenance);
    let output = command.arg("--version").output().map_err(|e| failed(e.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let major = text
        .split_whitespace()
        .find_map(|word| word.split('.').next()?.parse::<u32>().ok())
        .ok_or_else(|| failed(format!("`pg_dump --version` says `{text}`")))?;
    if major < server_major {
        return Err(failed(format!("its version is {major}, the server's {server_major}; it must not be older")));
    }
    Ok(text)
}

/// Counts the rows of every table, in a snapshot that somebody else holds or in the present. `imported` is cancelled when
/// the snapshot may end.
pub(crate) async fn count_rows(
    server: &Server,
    database: &str,
    snapshot: Option<&str>,
    imported: &CancellationToken,
) -> Result<RowCounts, Error> {
    let client = server.connect_to_tenant(database).await?;
    let failed = |e: &tokio_postgres::Error| server.failed(database, e);
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = '30s'";
    client.batch_execute(begin).await.map_err(|e| failed(&e))?;
    if let Some(snapshot) = snapshot {
        let import = format!("SET TRANSACTION SNAPSHOT {}", literal(snapshot));
        client.batch_execute(&import).await.map_err(|e| failed(&e))?;
    }
    imported.cancel();
    let tables = client
        .query(
            "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname <> 'information_schema' \
             AND n.nspname NOT LIKE 'pg\\_%' AND has_table_privilege(c.oid, 'SELECT') \
             AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.classid = 'pg_class'::regclass \
                             AND d.deptype = 'e') ORDER BY 1, 2",
            &[],
        )
        .await
        .map_err(|e| failed(&e))?;
    let mut counts = RowCounts::new();
    for row in tables {
        let (schema, table): (String, String) = (row.get(0), row.get(1));
        let name = format!("{}.{}", quoted(&schema), quoted(&table));
        // Rolled back, so that no table is held for longer than it is counted.
        client.batch_execute("SAVEPOINT one").await.map_err(|e| failed(&e))?;
        let rows::Read::Rows(count) = rows::count(&client, &name).await.map_err(|e| failed(&e))? else {
            let reason = format!("{schema}.{table} has become something else than a table");
            return Err(Error::Database { server: server.name(), database: database.to_owned(), reason });
        };
        client.batch_execute("ROLLBACK TO one; RELEASE one").await.map_err(|e| failed(&e))?;
        counts.insert(format!("{schema}.{table}"), count);
    }
    Ok(counts)
}
