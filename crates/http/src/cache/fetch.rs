//! An answer on its way into the store.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cofferdam_fairness::Timestamp;
use http::header::{self, HeaderName};
use pingora_http::ResponseHeader;
use tokio::sync::watch;

use super::freshness::{age, is_of_the_body, lifetime, milliseconds, of_this_hop};
use super::{Kept, Key, Store};
use crate::local::Content;

/// Objects up to this size are kept in memory, greater ones in files.
const IN_MEMORY: u64 = 8 << 20;
/// No tenant may have more than this part of what is kept: anybody can ask for the same file under many names.
const SHARE: u64 = 4;

/// Somebody who sees to it that something is kept. Whoever waits for it goes on when this is dropped.
#[derive(Debug)]
pub(crate) struct Fetch {
    pub(super) store: Arc<Store>,
    pub(super) key: Key,
    pub(super) generation: u64,
    pub(super) changed: Arc<AtomicBool>,
    pub(super) _done: watch::Sender<()>,
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.store.fetches.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

impl Fetch {
    /// The server says that what is kept is still right, and perhaps what is to be said of it from now on (RFC 9111, 3.2):
    /// what goes to the client.
    pub(crate) fn confirm(self, kept: &Arc<Kept>, said: &ResponseHeader, now: Timestamp) -> Arc<Kept> {
        self.store.counters.confirmed.fetch_add(1, Ordering::Relaxed);
        let tag = |head: &ResponseHeader| {
            let tag = head.headers.get(header::ETAG)?.to_str().ok()?;
            Some(tag.strip_prefix("W/").unwrap_or(tag).to_owned())
        };
        if tag(said).is_some_and(|said| Some(said) != tag(&kept.head)) {
            // It speaks of other bytes than those that are kept (RFC 9111, 4.3.4): nothing is learnt from it.
            return Arc::clone(kept);
        }
        let mut head = kept.head.clone();
        let of_this_hop = of_this_hop(said);
        let renews = |name: &HeaderName| !is_of_the_body(name) && !of_this_hop.contains(name);
        for name in said.headers.keys().filter(|name| renews(name)) {
            head.remove_header(name);
            for value in said.headers.get_all(name) {
                // It came in a head and fits into one.
                let _ = head.append_header(name.clone(), value.clone());
            }
        }
        let (since, age) = (milliseconds(now), age(said));
        if head.headers == kept.head.headers && age == kept.age {
            if self.is_current() {
                kept.confirmed.store(since, Ordering::Relaxed);
            }
            return Arc::clone(kept);
        }
        let lifetime = lifetime(&head);
        let renewed = Arc::new(Kept {
            head,
            content: kept.content.clone(),
            lifetime: lifetime.unwrap_or_default(),
            age,
            confirmed: AtomicU64::new(since),
            coded: kept.coded.clone(),
        });
        if lifetime.is_some() {
            self.keep(&renewed, u64::MAX);
            let made = Arc::clone(&renewed);
            tokio::task::spawn_blocking(move || made.code());
        } else {
            self.store.memory.invalidate(&self.key);
            self.store.disk.invalidate(&self.key);
        }
        renewed
    }

    /// Keeps it, if its tenant has not more than `most` bytes then. False when it is not kept.
    fn keep(&self, kept: &Arc<Kept>, most: u64) -> bool {
        let place = usize::from(matches!(kept.content, Content::File(..)));
        let weight = kept.weight(&self.key);
        {
            let mut shares = self.store.shares.lock().unwrap_or_else(PoisonError::into_inner);
            let share = &mut shares.entry(self.key.tenant).or_default()[place];
            if *share + weight > most {
                return false;
            }
            *share += weight;
        }
        let cache = if place == 1 { &self.store.disk } else { &self.store.memory };
        cache.insert(self.key.clone(), Arc::clone(kept));
        // A purge that came meanwhile meant this too.
        let current = self.is_current();
        if !current {
            cache.invalidate(&self.key);
        }
        current
    }

    /// Whether nothing was purged since it was begun.
    fn is_current(&self) -> bool {
        !self.changed.load(Ordering::SeqCst) && self.store.generation.load(Ordering::SeqCst) == self.generation
    }

    /// Begins to keep an answer; `None` when it may not be kept.
    pub(crate) fn begin(self, head: &ResponseHeader) -> Option<Fill> {
        let lifetime = lifetime(head)?;
        let length = head.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if length.is_some_and(|length| length > self.store.config.max_object.0) {
            return None;
        }
        // The end of a connection may be the end of a worker, and what came before it a half.
        if length.is_none() && !head.headers.contains_key(header::TRANSFER_ENCODING) {
            return None;
        }
        let mut kept = head.clone();
        // Each hop makes its own, and the cookie is somebody's.
        for name in of_this_hop(head) {
            kept.remove_header(&name);
        }
        Some(Fill {
            fetch: self,
            head: kept,
            lifetime,
            age: age(head),
            length,
            memory: BytesMut::new(),
            file: None,
            written: 0,
        })
    }
}

/// An answer that is kept as it comes.
#[derive(Debug)]
pub(crate) struct Fill {
    fetch: Fetch,
    head: ResponseHeader,
    lifetime: Duration,
    age: Duration,
    /// As announced.
    length: Option<u64>,
    memory: BytesMut,
    file: Option<Arc<File>>,
    written: u64,
}

impl Fill {
    /// Takes a part of the body. `None` when it cannot be kept after all.
    pub(crate) async fn push(mut self, part: Bytes) -> Option<Self> {
        let length = self.written + part.len() as u64;
        if length > self.fetch.store.config.max_object.0 {
            return None;
        }
        if self.file.is_none() && length > IN_MEMORY {
            let directory = self.fetch.store.directory.clone();
            let create = move || match directory {
                Some(directory) => tempfile::tempfile_in(directory),
                None => tempfile::tempfile(),
            };
            let file = Arc::new(tokio::task::spawn_blocking(create).await.ok()?.ok()?);
            let before = std::mem::take(&mut self.memory).freeze();
            write(&file, before, 0).await?;
            self.file = Some(file);
        }
        match &self.file {
            Some(file) => write(file, part, self.written).await?,
            None => self.memory.extend_from_slice(&part),
        }
        self.written = length;
        Some(self)
    }

    /// The body is complete.
    pub(crate) fn finish(self, now: Timestamp) {
        if self.length.is_some_and(|length| length != self.written) {
            return;
        }
        let content = match self.file {
            Some(file) => Content::File(file, self.written),
            None => Content::Memory(self.memory.freeze()),
        };
        let config = &self.fetch.store.config;
        let capacity = if matches!(content, Content::File(..)) { config.disk.0 } else { config.memory.0 };
        let kept = Arc::new(Kept {
            head: self.head,
            content,
            lifetime: self.lifetime,
            age: self.age,
            confirmed: AtomicU64::new(milliseconds(now)),
            coded: Default::default(),
        });
        if self.fetch.keep(&kept, capacity / SHARE) {
            // Whoever asks before they are ready gets it as it is.
            tokio::task::spawn_blocking(move || kept.code());
        }
        // Those who wait find it when the fetch is dropped, which is now.
    }
}

async fn write(file: &Arc<File>, part: Bytes, at: u64) -> Option<()> {
    let file = Arc::clone(file);
    tokio::task::spawn_blocking(move || file.write_all_at(&part, at)).await.ok()?.ok()
}
