//! The database's part of a backup: `pg_dump` as a stream, or as several, and how many rows there are to find again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};

use cofferdam_rows as rows;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::fence::Table;
use super::paths;
use super::sequences::Sequence;
use crate::program::Running;
use crate::repository::Entry;
use crate::server::{Server, literal, quoted};
use crate::{Control, Error};

/// Rows by `schema.table`, in the snapshot.
pub type RowCounts = BTreeMap<String, u64>;

/// One stream of a dump. A dump has one, or others besides for the rows of its largest tables.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stream {
    /// The tables of whose rows it is, as `schema.table`; none: of everything that is in no other.
    pub(crate) tables: Vec<String>,
    pub(crate) bytes: u64,
    /// In hexadecimal.
    pub(crate) sha256: String,
    /// The numbers of its parts.
    pub(crate) parts: Vec<u32>,
    /// Whether the program has said that this is all.
    #[serde(skip)]
    pub(crate) done: bool,
}

/// What is known of the streams.
pub(super) type Shared = Arc<Mutex<Vec<Stream>>>;

/// A running `pg_dump`, or several on the same snapshot, whose streams come in parts: the repository wants to know the size
/// of a file before it has read it, and parts are stored side by side. Nothing but a few parts is ever in memory, and
/// nothing on disk. Dropped, the programs are stopped.
pub(super) struct Dump {
    parts: mpsc::Receiver<io::Result<Part>>,
    number: u32,
    saved_at: Timestamp,
    streams: Shared,
    _stop: DropGuard,
}

/// A group of tables whose rows one program dumps.
type Group<'a> = Vec<&'a Table>;

/// Tables in so many groups, about as large as each other: the largest goes where least is.
fn groups(tables: &[Table], number: usize) -> Vec<Group<'_>> {
    let mut groups: Vec<(u64, Group<'_>)> = (0..number.min(tables.len())).map(|_| (0, Vec::new())).collect();
    for table in tables {
        if let Some((bytes, group)) = groups.iter_mut().min_by_key(|(bytes, _)| *bytes) {
            *bytes += table.bytes;
            group.push(table);
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

/// Bytes of a part. A multiple of what the repository cuts, so that a change moves few cuts.
const PART: usize = 16 << 20;
/// Parts in memory at a time, besides one of each program.
const PARTS: usize = 3;

/// How many parts are in memory.
#[derive(Debug)]
struct Room {
    free: Mutex<usize>,
    freed: Condvar,
}

impl Room {
    fn of(places: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::new(places), freed: Condvar::new() })
    }

    fn take(self: &Arc<Self>) -> Place {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        Place(Arc::clone(self))
    }
}

struct Place(Arc<Room>);

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

/// A part of a stream, which frees its place when it has been read.
struct Part {
    stream: usize,
    bytes: Cursor<Vec<u8>>,
    _place: Place,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.bytes.read(buffer)
    }
}

/// What is dumped.
pub(super) struct Subject<'a> {
    /// The server, or a gateway in front of it.
    pub(super) server: &'a Server,
    pub(super) database: &'a str,
    /// The snapshot's name.
    pub(super) snapshot: &'a str,
    pub(super) sequences: &'a [Sequence],
    /// Tables whose rows it would select, and which are not saved.
    pub(super) filtered: &'a [String],
    /// Tables whose rows other programs dump, largest first.
    pub(super) large: &'a [Table],
    /// Programs, at most.
    pub(super) jobs: usize,
    pub(super) saved_at: Timestamp,
}

impl Dump {
    /// Starts `pg_dump` on a snapshot. `begun` is cancelled when every program has the snapshot, and its locks: all of them start
    /// at once. One that started later would find what was done to its tables meanwhile, and wait behind whoever waits for
    /// those that run.
    pub(super) fn start(
        subject: &Subject<'_>,
        begun: CancellationToken,
        control: &Control,
    ) -> Result<(Self, Shared), Error> {
        let Subject { server, database, snapshot, sequences, filtered, large, jobs, saved_at } = *subject;
        // Uncompressed: the repository compresses, and what has not changed since the last time is stored once.
        let command = || {
            let mut command = server.program("pg_dump", database);
            command.args(["--format=custom", "--compress=0", "--no-password", "--lock-wait-timeout=30s"]);
            command.arg(format!("--snapshot={snapshot}"));
            // With a table come the sequences that it owns: of no program's does anybody read one by its name.
            for name in sequences.iter().map(|sequence| &sequence.name).chain(filtered) {
                command.arg(format!("--exclude-table-data={name}"));
            }
            command
        };
        let mut all = command();
        for table in large {
            all.arg(format!("--exclude-table-data={}", table.quoted));
        }
        let (mut commands, mut streams) = (vec![all], vec![Stream::default()]);
        for group in groups(large, jobs.saturating_sub(1)) {
            let mut one = command();
            one.args(["--data-only", "--strict-names"]);
            one.args(group.iter().map(|table| format!("--table={}", table.quoted)));
            commands.push(one);
            let tables = group.iter().map(|table| table.name.clone()).collect();
            streams.push(Stream { tables, ..Stream::default() });
        }
        let programs = commands.len();
        let streams: Shared = Arc::new(Mutex::new(streams));
        let (sender, parts) = mpsc::channel();
        let control = control.child();
        let work = Arc::new(Work {
            left: AtomicUsize::new(programs),
            begun,
            room: Room::of(PARTS + programs),
            streams: Arc::clone(&streams),
            control: control.clone(),
            runtime: tokio::runtime::Handle::try_current().ok(),
        });
        for (stream, command) in commands.into_iter().enumerate() {
            let (work, sender) = (Arc::clone(&work), sender.clone());
            let failed = |e: io::Error| Error::Program { program: "pg_dump".to_owned(), reason: e.to_string() };
            std::thread::Builder::new()
                .name("dump".to_owned())
                .spawn(move || {
                    let _runtime = work.runtime.as_ref().map(tokio::runtime::Handle::enter);
                    if let Err(error) = work.read(stream, command, &sender) {
                        let _ = sender.send(Err(error));
                    }
                })
                .map_err(failed)?;
        }
        let dump = Self { parts, number: 0, saved_at, streams: Arc::clone(&streams), _stop: control.stop_on_drop() };
        Ok((dump, streams))
    }
}

/// What the programs have in common.
struct Work {
    /// How many have not begun to write.
    left: AtomicUsize,
    begun: CancellationToken,
    room: Arc<Room>,
    streams: Shared,
    control: Control,
    runtime: Option<tokio::runtime::Handle>,
}

impl Work {
    /// One more program has its snapshot.
    fn has_begun(&self) {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.begun.cancel();
        }
    }

    /// Runs a program to its end, and passes on what it writes. A stream is good only if the program says so.
    fn read(&self, stream: usize, mut command: Command, parts: &mpsc::Sender<io::Result<Part>>) -> io::Result<()> {
        let mut stderr = tempfile::tempfile()?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr.try_clone()?);
        let mut child = command.spawn().map_err(|e| io::Error::other(format!("pg_dump: {e}")))?;
        let stdout = child.stdout.take();
        let child = Running::new(child, &self.control);
        let mut stdout = stdout.ok_or_else(|| io::Error::other("pg_dump has no output"))?;
        let (mut hash, mut bytes) = (Sha256::new(), 0_u64);
        let mut buffer = vec![0; 256 << 10];
        let mut ended = false;
        while !ended {
            let place = self.room.take();
            let mut part = Vec::new();
            while part.len() < PART {
                if self.control.is_cancelled() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                let wanted = buffer.len().min(PART - part.len());
                let read = match stdout.read(&mut buffer[..wanted]) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    read => read?,
                };
                if read == 0 {
                    ended = true;
                    break;
                }
                if bytes == 0 && part.is_empty() {
                    self.has_begun();
                }
                self.control.add(read as u64);
                part.extend_from_slice(&buffer[..read]);
            }
            if ended {
                // Before the last part is passed on: who has all of them has a dump.
                let status = child.wait()?;
                if self.control.is_cancelled() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                if !status.success() {
                    return Err(io::Error::other(format!("pg_dump: {}", last_words(&mut stderr, status))));
                }
            }
            hash.update(&part);
            bytes += part.len() as u64;
            if ended {
                let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(known) = streams.get_mut(stream) {
                    (known.bytes, known.sha256, known.done) = (bytes, hex::encode(hash.finalize_reset()), true);
                }
            }
            if !part.is_empty() && parts.send(Ok(Part { stream, bytes: Cursor::new(part), _place: place })).is_err() {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        Ok(())
    }
}

impl Iterator for Dump {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<io::Result<Entry>> {
        // At the end nobody is left who could send.
        let part = match self.parts.recv().ok()? {
            Ok(part) => part,
            Err(error) => return Some(Err(error)),
        };
        let number = self.number;
        self.number += 1;
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let path = part_path(number, (streams.len() > 1).then_some(part.stream));
        if let Some(stream) = streams.get_mut(part.stream) {
            stream.parts.push(number);
        }
        drop(streams);
        Some(Ok(Entry {
            path,
            size: part.bytes.get_ref().len() as u64,
            modified: Some(self.saved_at),
            open: Box::new(move || Ok(Box::new(part))),
        }))
    }
}

/// Where a part is: numbered as they came, of whichever stream, because what is stored must come sorted.
pub(crate) fn part_path(number: u32, stream: Option<usize>) -> String {
    match stream {
        None => format!("{}/{number:08}", paths::DUMP),
        Some(stream) => format!("{}/{number:08}.{stream:04}", paths::DUMP),
    }
}

/// The streams of a dump, if every one of them has ended well.
pub(super) fn whole(streams: &Shared) -> Option<Vec<Stream>> {
    let streams = streams.lock().unwrap_or_else(PoisonError::into_inner);
    streams.iter().all(|stream| stream.done).then(|| streams.clone())
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
             WHERE c.relkind = 'r' AND (c.relpersistence = 'p' OR c.relpersistence = 'u' AND NOT pg_is_in_recovery()) \
             AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%' AND has_table_privilege(c.oid, 'SELECT') \
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
            let reason = format!("{schema}.{table} was renamed, or is no table any more; try again");
            return Err(Error::Database { server: server.name(), database: database.to_owned(), reason });
        };
        // The table was locked to be counted, and perhaps waited for: the snapshot knows nothing of what was done to it before.
        let rewritten =
            "SELECT pg_relation_filenode(oid) IS DISTINCT FROM relfilenode FROM pg_class WHERE oid = to_regclass($1)";
        let rewritten = client.query_opt(rewritten, &[&name]).await.map_err(|e| failed(&e))?;
        if snapshot.is_some() && rewritten.is_none_or(|row| row.get(0)) {
            let reason = format!("{schema}.{table} was emptied or rewritten while its rows were counted; try again");
            return Err(Error::Database { server: server.name(), database: database.to_owned(), reason });
        }
        client.batch_execute("ROLLBACK TO one; RELEASE one").await.map_err(|e| failed(&e))?;
        counts.insert(format!("{schema}.{table}"), count);
    }
    Ok(counts)
}
