//! What is known of a request when it has ended, and the log of all of them.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cofferdam_fairness::Class;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};

/// Lines that may wait to be written; beyond, they are dropped and counted.
const LINES: usize = 65_536;

/// What becomes known of a request on its way.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) class: Option<Class>,
    pub(crate) wait: Duration,
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

    fn milliseconds(&self) -> Option<f64> {
        let micros = self.0.load(Ordering::Relaxed);
        (micros > 0).then(|| micros as f64 / 1e3)
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
    /// What a record says of it.
    pub(crate) fn fill(mut self, record: &'a Record) -> Self {
        self.class = record.class.map(Class::as_str);
        self.wait_ms = record.wait.as_secs_f64() * 1e3;
        self.worker_ms = record.work.milliseconds();
        self.upstream = record.server.as_deref();
        self.attempts = record.attempts;
        self.cache = record.cache;
        self.bytes_in = record.bytes_in;
        self
    }
}

/// The time now, as the log writes it.
pub(crate) fn timestamp() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}

/// A file that lines are written to, by a thread of its own.
pub(crate) struct AccessLog {
    writer: NonBlocking,
    _thread: WorkerGuard,
    path: PathBuf,
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
        let (writer, thread) = NonBlockingBuilder::default()
            .buffered_lines_limit(LINES)
            .lossy(true)
            .thread_name("access-log")
            .finish(target);
        Ok(Self { writer, _thread: thread, path: path.to_owned() })
    }

    pub(crate) fn write(&self, line: &Line<'_>) {
        let mut text = serde_json::to_vec(line).unwrap_or_default();
        text.push(b'\n');
        let _ = self.writer.clone().write_all(&text);
    }

    /// Lines that were dropped because the disk was too slow.
    pub(crate) fn dropped(&self) -> u64 {
        self.writer.error_counter().dropped_lines() as u64
    }
}
