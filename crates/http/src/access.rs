//! What is known of a request when it has ended, and the log of all of them.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_fairness::Class;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Bytes of lines that may wait to be written; beyond, they are dropped and counted.
const MOST_WAITING: usize = 32 << 20;

/// So many bytes are written at once, without waiting for more.
const MANY: usize = 256 << 10;

/// The longest time that a line waits for others.
const EVERY: Duration = Duration::from_millis(100);

/// What becomes known of a request on its way.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) class: Option<Class>,
    /// Since when it was queued for a worker, and for how long.
    pub(crate) queued: Option<(Instant, Duration)>,
    /// When the last server was asked.
    pub(crate) asked: Option<Instant>,
    pub(crate) server: Option<String>,
    /// What the cache had to do with it.
    pub(crate) cache: Option<&'static str>,
    pub(crate) bytes_in: u64,
    pub(crate) attempts: u32,
    /// How long the server took; zero while it has not finished.
    pub(crate) work: Arc<Work>,
}

/// The time that a server has worked, in microseconds.
#[derive(Debug, Default)]
pub(crate) struct Work(AtomicU64);

impl Work {
    pub(crate) fn since(&self, begun: Instant) {
        self.0.store(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }

    pub(crate) fn time(&self) -> Option<Duration> {
        let micros = self.0.load(Ordering::Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros))
    }
}

/// One line of the log. Without the query: it may hold what nobody else should read.
#[derive(Debug, Serialize)]
pub(crate) struct Line<'a> {
    pub(crate) time: String,
    pub(crate) tenant: Option<&'a str>,
    pub(crate) class: Option<&'static str>,
    pub(crate) client: String,
    pub(crate) protocol: &'static str,
    pub(crate) method: &'a str,
    pub(crate) host: &'a str,
    pub(crate) path: &'a str,
    /// 0 when there was nobody left to be answered.
    pub(crate) status: u16,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    pub(crate) total_ms: f64,
    pub(crate) wait_ms: f64,
    pub(crate) worker_ms: Option<f64>,
    pub(crate) upstream: Option<&'a str>,
    pub(crate) attempts: u32,
    pub(crate) cache: Option<&'static str>,
    pub(crate) request_id: &'a str,
    pub(crate) trace_id: Option<&'a str>,
}

impl<'a> Line<'a> {
    /// Of a request of which nothing is known but who has sent it.
    pub(crate) fn of(client: IpAddr, protocol: &'static str, request_id: &'a str) -> Self {
        Self {
            time: timestamp(),
            tenant: None,
            class: None,
            client: client.to_string(),
            protocol,
            method: "",
            host: "",
            path: "",
            status: 0,
            bytes_in: 0,
            bytes_out: 0,
            total_ms: 0.0,
            wait_ms: 0.0,
            worker_ms: None,
            upstream: None,
            attempts: 0,
            cache: None,
            request_id,
            trace_id: None,
        }
    }

    /// What a record says of it.
    pub(crate) fn fill(mut self, record: &'a Record) -> Self {
        self.class = record.class.map(Class::as_str);
        self.wait_ms = record.queued.map_or(0.0, |(_, wait)| wait.as_secs_f64() * 1e3);
        self.worker_ms = record.work.time().map(|time| time.as_secs_f64() * 1e3);
        self.upstream = record.server.as_deref();
        self.attempts = record.attempts;
        self.cache = record.cache;
        self.bytes_in = record.bytes_in;
        self
    }
}

/// The time now, as the log writes it.
fn timestamp() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}

/// A file that lines are written to, many at a time, by a thread of its own: a request costs a copy and no system call.
pub(crate) struct AccessLog {
    shared: Arc<Shared>,
    path: PathBuf,
}

struct Shared {
    lines: Mutex<Vec<u8>>,
    /// Says that there is much to write, or nothing more to come.
    wake: Condvar,
    target: Mutex<Box<dyn Write + Send>>,
    is_closed: AtomicBool,
    dropped: AtomicU64,
}

impl std::fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessLog").field("path", &self.path).finish_non_exhaustive()
    }
}

impl AccessLog {
    /// Opens the log; `-` is standard output.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let target: Box<dyn Write + Send> = if path == Path::new("-") {
            Box::new(io::stdout())
        } else {
            Box::new(OpenOptions::new().create(true).append(true).open(path)?)
        };
        let shared = Arc::new(Shared {
            lines: Mutex::default(),
            wake: Condvar::new(),
            target: Mutex::new(target),
            is_closed: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
        });
        let writer = Arc::clone(&shared);
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || writer.run())?;
        Ok(Self { shared, path: path.to_owned() })
    }

    pub(crate) fn write(&self, line: &Line<'_>) {
        let mut text = Vec::with_capacity(512);
        if serde_json::to_writer(&mut text, line).is_err() {
            return;
        }
        text.push(b'\n');
        let mut lines = self.shared.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() + text.len() > MOST_WAITING {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        lines.extend_from_slice(&text);
        let many = lines.len() > MANY;
        drop(lines);
        if many {
            self.shared.wake.notify_one();
        }
    }

    /// Lines that were dropped because the disk was too slow.
    pub(crate) fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Writes what waits, now. Blocks as long as the disk does.
    pub(crate) fn flush(&self) {
        self.shared.write_out();
    }
}

impl Drop for AccessLog {
    /// The thread writes what is left and ends; nobody waits for it.
    fn drop(&mut self) {
        self.shared.is_closed.store(true, Ordering::Release);
        self.shared.wake.notify_one();
    }
}

impl Shared {
    fn run(&self) {
        while !self.is_closed.load(Ordering::Acquire) {
            let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.wake.wait_timeout_while(lines, EVERY, |lines| {
                lines.len() <= MANY && !self.is_closed.load(Ordering::Acquire)
            });
            drop(waited);
            self.write_out();
        }
        self.write_out();
    }

    fn write_out(&self) {
        let mut target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = std::mem::take(&mut *self.lines.lock().unwrap_or_else(PoisonError::into_inner));
        if !lines.is_empty() && target.write_all(&lines).and_then(|()| target.flush()).is_err() {
            let count = lines.split_inclusive(|b| *b == b'\n').count();
            self.dropped.fetch_add(count as u64, Ordering::Relaxed);
        }
    }
}
