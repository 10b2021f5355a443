//! What a backup or a restore tells while it runs, and how it is stopped.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::{CancellationToken, DropGuard};

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
#[non_exhaustive]
pub enum Event {
    /// A phase has begun.
    Phase {
        /// What is done now, in a few words.
        name: &'static str,
        /// Bytes that it will move, if that is known.
        bytes: Option<u64>,
    },
    /// The fence came down before everything was copied.
    FenceLowered {
        /// Why, in words.
        reason: String,
    },
    /// Something that an operator should know, although the work goes on.
    Warning {
        /// What, in words.
        text: String,
    },
}

type Listener = dyn Fn(&Event) + Send + Sync;

/// The line between work and whoever watches it: events and bytes go one way, the wish to stop the other.
#[derive(Clone)]
pub struct Control {
    listener: Arc<Listener>,
    moved: Arc<AtomicU64>,
    stop: CancellationToken,
    pace: Option<Arc<Pace>>,
}

/// So many bytes per second, for everybody who shares it.
#[derive(Debug)]
struct Pace {
    bytes_per_second: u64,
    /// When everything that was let through so far has had its time.
    paid_until: Mutex<Instant>,
}

impl Pace {
    /// Makes a thread wait for what it has read.
    #[allow(clippy::disallowed_methods)] // only threads that may wait read files and dumps
    fn pay(&self, bytes: u64) {
        let wait = {
            let mut paid = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second.max(1) as f64);
            *paid = (*paid).max(now) + cost;
            paid.duration_since(now)
        };
        // Short waits add up to longer ones; sleeping for each would sleep for too long.
        if wait > Duration::from_millis(5) {
            std::thread::sleep(wait.min(Duration::from_secs(1)));
        }
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("moved", &self.moved).finish_non_exhaustive()
    }
}

impl Default for Control {
    fn default() -> Self {
        Self::new(|_| {})
    }
}

impl Control {
    /// A line to a listener, which must not block.
    pub fn new(listener: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        Self { listener: Arc::new(listener), moved: Arc::default(), stop: CancellationToken::new(), pace: None }
    }

    /// Asks the work to stop. It ends with an error soon after and leaves nothing that looks whole.
    pub fn cancel(&self) {
        self.stop.cancel();
    }

    /// Bytes read so far: of a database and its files, or of a repository.
    pub fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// The same line for work that reads at most so many bytes per second, together with everybody else who has this line.
    #[must_use]
    pub fn paced(&self, bytes_per_second: u64) -> Self {
        let pace = Pace { bytes_per_second, paid_until: Mutex::new(Instant::now()) };
        Self { pace: Some(Arc::new(pace)), ..self.clone() }
    }

    /// The same line for a part of the work, which can be stopped alone.
    pub(crate) fn child(&self) -> Self {
        Self { stop: self.stop.child_token(), ..self.clone() }
    }

    pub(crate) fn stop_on_drop(&self) -> DropGuard {
        self.stop.clone().drop_guard()
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.stop.is_cancelled()
    }

    pub(crate) async fn cancelled(&self) {
        self.stop.cancelled().await;
    }

    /// Work that is dropped where it stands when somebody asks to stop: for what waits for others and leaves nothing.
    pub(crate) async fn unless_cancelled<T>(
        &self,
        work: impl Future<Output = Result<T, crate::Error>>,
    ) -> Result<T, crate::Error> {
        tokio::select! {
            biased;
            () = self.cancelled() => Err(crate::Error::Cancelled),
            outcome = work => outcome,
        }
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
        if let Some(pace) = &self.pace {
            pace.pay(bytes);
        }
    }

    pub(crate) fn tell(&self, event: &Event) {
        (self.listener)(event);
    }

    pub(crate) fn phase(&self, name: &'static str, bytes: Option<u64>) {
        self.tell(&Event::Phase { name, bytes });
    }

    pub(crate) fn warn(&self, text: impl Into<String>) {
        self.tell(&Event::Warning { text: text.into() });
    }
}
