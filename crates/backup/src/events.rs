//! What a backup or a restore tells while it runs, and how it is stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
        Self { listener: Arc::new(listener), moved: Arc::default(), stop: CancellationToken::new() }
    }

    /// Asks the work to stop. It ends with an error soon after and leaves nothing that looks whole.
    pub fn cancel(&self) {
        self.stop.cancel();
    }

    /// Bytes read so far: of a database and its files, or of a repository.
    pub fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
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

    pub(crate) fn add(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
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
