//! Static files and compiled assets, kept for all browsers of a tenant.
//!
//! Only what Odoo itself says to be public and what lies at the paths of static files: `load_menus` and translations say so
//! too and are not, so they are never kept. A cookie that comes with an asset is not kept either: it is somebody's session.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use cofferdam_fairness::Timestamp;
use cofferdam_tenant::{CacheConfig, TenantId};
use http::header::{self, HeaderMap, HeaderValue};
use moka::sync::Cache;
use pingora_core::protocols::http::compression::Algorithm;
use pingora_http::{RequestHeader, ResponseHeader};
use tokio::sync::watch;

use crate::local::Content;

mod fetch;
mod freshness;
mod key;

pub(crate) use fetch::{Fetch, Fill};
pub(crate) use key::{Key, key, key_of_target};

/// An answer that is kept.
#[derive(Debug)]
pub(crate) struct Kept {
    /// What the server said, without what was meant for one client.
    pub(crate) head: ResponseHeader,
    pub(crate) content: Content,
    lifetime: Duration,
    /// How old it was when it came: others may have kept it too.
    age: Duration,
    /// When it was last known to be right, in milliseconds of the plane's clock.
    confirmed: AtomicU64,
    /// The body in the codings of [`CODINGS`], as they are asked for.
    coded: [OnceLock<Option<Bytes>>; CODINGS.len()],
}

/// In the order of preference, where a client says nothing.
const CODINGS: [Algorithm; 3] = [Algorithm::Zstd, Algorithm::Brotli, Algorithm::Gzip];

/// Codings that a body is kept in are made once and pay for themselves.
const LEVEL: u32 = 6;

/// What the cache has done since it was made.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) confirmed: AtomicU64,
}

/// Everything that is kept.
#[derive(Debug)]
pub(crate) struct Store {
    memory: Cache<Key, Arc<Kept>>,
    disk: Cache<Key, Arc<Kept>>,
    /// What is being fetched: whoever wants the same waits.
    fetches: Mutex<HashMap<Key, Fetching>>,
    pub(crate) counters: Counters,
    /// Counts purges: what was asked for before one must not be kept after it.
    generation: AtomicU64,
    /// Bytes by tenant, in memory and on disk.
    shares: Arc<Mutex<HashMap<TenantId, [u64; 2]>>>,
    config: CacheConfig,
    directory: Option<PathBuf>,
}

/// Something that is being fetched.
#[derive(Debug)]
struct Fetching {
    done: watch::Receiver<()>,
    /// It has been changed meanwhile.
    changed: Arc<AtomicBool>,
}

/// What there is of a key.
pub(crate) enum Found {
    /// It can be sent.
    Fresh(Arc<Kept>),
    /// It has to be asked whether it is still right; by whom has the fetch.
    Stale(Arc<Kept>, Fetch),
    /// There is nothing, and whoever has the fetch has to see to it.
    Nothing(Fetch),
    /// Somebody else is seeing to it.
    Wait(watch::Receiver<()>),
}

impl Store {
    pub(crate) fn new(config: &CacheConfig, directory: Option<PathBuf>) -> Self {
        let shares: Arc<Mutex<HashMap<TenantId, [u64; 2]>>> = Arc::default();
        let store = |place: usize, capacity: u64| {
            let weigh = |key: &Key, kept: &Arc<Kept>| u32::try_from(kept.weight(key)).unwrap_or(u32::MAX);
            let shares = Arc::clone(&shares);
            let gone = move |key: Arc<Key>, kept: Arc<Kept>, _| {
                let mut shares = shares.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(share) = shares.get_mut(&key.tenant) {
                    share[place] = share[place].saturating_sub(kept.weight(&key));
                    if *share == [0, 0] {
                        shares.remove(&key.tenant);
                    }
                }
            };
            let cache = Cache::builder().max_capacity(capacity).weigher(weigh).eviction_listener(gone);
            cache.support_invalidation_closures().build()
        };
        Self {
            memory: store(0, config.memory.0),
            disk: store(1, config.disk.0),
            generation: AtomicU64::new(0),
            shares,
            fetches: Mutex::default(),
            counters: Counters::default(),
            config: config.clone(),
            directory,
        }
    }

    /// Whether it was made from this.
    pub(crate) fn is_of(&self, config: &CacheConfig, directory: Option<&PathBuf>) -> bool {
        self.config == *config && self.directory.as_ref() == directory
    }

    pub(crate) fn find(self: &Arc<Self>, key: &Key, now: Timestamp) -> Found {
        let kept = self.memory.get(key).or_else(|| self.disk.get(key));
        if let Some(kept) = &kept
            && kept.age(now) < kept.lifetime
        {
            self.counters.hits.fetch_add(1, Ordering::Relaxed);
            return Found::Fresh(Arc::clone(kept));
        }
        let mut fetches = self.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fetch) = fetches.get(key) {
            return Found::Wait(fetch.done.clone());
        }
        let (done, waits) = watch::channel(());
        let changed = Arc::new(AtomicBool::new(false));
        fetches.insert(key.clone(), Fetching { done: waits, changed: Arc::clone(&changed) });
        let generation = self.generation.load(Ordering::SeqCst);
        let fetch = Fetch { store: Arc::clone(self), key: key.clone(), generation, changed, _done: done };
        if let Some(kept) = kept {
            return Found::Stale(kept, fetch);
        }
        self.counters.misses.fetch_add(1, Ordering::Relaxed);
        Found::Nothing(fetch)
    }

    /// Forgets what is kept: of one tenant or of all, below a path or everywhere.
    pub(crate) fn purge(&self, tenant: Option<TenantId>, path: Option<&str>) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        for cache in [&self.memory, &self.disk] {
            let path = path.map(|path| path.as_bytes().to_vec());
            let doomed = move |key: &Key, _: &Arc<Kept>| {
                tenant.is_none_or(|tenant| key.tenant == tenant)
                    && path.as_ref().is_none_or(|path| key.target.starts_with(path))
            };
            // It cannot fail: the caches were built for it.
            let _ = cache.invalidate_entries_if(doomed);
        }
    }

    /// Forgets one answer: something has been changed where it comes from.
    pub(crate) fn forget(&self, key: &Key) {
        // What is being fetched of it, and of nothing else, is not kept.
        if let Some(fetch) = self.fetches.lock().unwrap_or_else(PoisonError::into_inner).get(key) {
            fetch.changed.store(true, Ordering::SeqCst);
        }
        self.memory.invalidate(key);
        self.disk.invalidate(key);
    }

    /// Answers that are kept, and the bytes they take: in memory, and on disk.
    pub(crate) fn size(&self) -> [(u64, u64); 2] {
        [&self.memory, &self.disk].map(|cache| (cache.entry_count(), cache.weighted_size()))
    }
}

impl Kept {
    fn confirmed(&self) -> Timestamp {
        Timestamp::from_millis(self.confirmed.load(Ordering::Relaxed))
    }

    fn age(&self, now: Timestamp) -> Duration {
        self.age + now.since(self.confirmed())
    }

    /// What it counts for: what it is in other codings too.
    fn weight(&self, key: &Key) -> u64 {
        let coded = if self.may_be_coded() { self.content.len() } else { 0 };
        self.content.len() + coded + key.target.len() as u64 + 512
    }

    fn may_be_coded(&self) -> bool {
        let control = self.head.headers.get_all(header::CACHE_CONTROL).iter();
        let fixed = control.filter_map(|v| v.to_str().ok()).any(|v| v.contains("no-transform"));
        matches!(self.content, Content::Memory(_)) && is_text(&self.head.headers) && !fixed
    }

    /// Makes the codings, which takes its time.
    fn code(&self) {
        let Content::Memory(body) = &self.content else { return };
        if !self.may_be_coded() || self.coded.iter().all(|made| made.get().is_some()) {
            return;
        }
        for (coding, made) in CODINGS.iter().zip(&self.coded) {
            let coded = coding.compressor(LEVEL).and_then(|mut coder| coder.encode(body, true).ok());
            let _ = made.set(coded.filter(|coded| coded.len() < body.len()));
        }
    }

    /// The head and the body for a client: coded, if it understands a coding and the body gains by it.
    pub(crate) fn for_client(
        &self,
        request: &HeaderMap,
        now: Timestamp,
    ) -> pingora_error::Result<(ResponseHeader, Content)> {
        let mut head = self.head.clone();
        head.insert_header(header::AGE, self.age(now).as_secs())?;
        if !self.may_be_coded() || request.contains_key(header::RANGE) {
            return Ok((head, self.content.clone()));
        }
        head.insert_header(header::VARY, "Accept-Encoding")?;
        for (coding, made) in CODINGS.iter().zip(&self.coded) {
            if !accepts(request, coding.as_str()) {
                continue;
            }
            if let Some(Some(coded)) = made.get() {
                head.insert_header(header::CONTENT_ENCODING, coding.as_str())?;
                // Another representation has another tag (RFC 9110, 8.8.3).
                let etag = head.headers.get(header::ETAG).and_then(|tag| tag.to_str().ok()).map(weakened);
                if let Some(etag) = etag {
                    head.insert_header(header::ETAG, etag)?;
                }
                return Ok((head, Content::Memory(coded.clone())));
            }
        }
        Ok((head, self.content.clone()))
    }

    /// What a server is asked with, whether it is still right.
    pub(crate) fn validators(&self) -> Validators {
        let of = |name| self.head.headers.get(name).cloned();
        Validators { etag: of(header::ETAG), modified: of(header::LAST_MODIFIED) }
    }
}

fn weakened(tag: &str) -> String {
    if tag.starts_with("W/") { tag.to_owned() } else { format!("W/{tag}") }
}

/// What a server is asked with, whether something is still right.
#[derive(Debug, Default, Clone)]
pub(crate) struct Validators {
    etag: Option<HeaderValue>,
    modified: Option<HeaderValue>,
}

impl Validators {
    /// Puts them in the place of the client's own: what is fetched must be whole, whatever part this client wants.
    pub(crate) fn apply(&self, head: &mut RequestHeader) -> pingora_error::Result<()> {
        for name in
            [header::IF_NONE_MATCH, header::IF_MODIFIED_SINCE, header::IF_MATCH, header::IF_RANGE, header::RANGE]
        {
            head.remove_header(&name);
        }
        head.remove_header(&header::ACCEPT_ENCODING);
        if let Some(etag) = &self.etag {
            head.insert_header(header::IF_NONE_MATCH, etag.clone())?;
        }
        if let Some(modified) = &self.modified {
            head.insert_header(header::IF_MODIFIED_SINCE, modified.clone())?;
        }
        Ok(())
    }
}

fn accepts(request: &HeaderMap, coding: &str) -> bool {
    let values = request.get_all(header::ACCEPT_ENCODING).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).any(|one| {
        let mut parts = one.split(';').map(str::trim);
        let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case(coding));
        named && !parts.any(|p| p.strip_prefix("q=").is_some_and(|q| q.parse::<f32>().is_ok_and(|q| q <= 0.0)))
    })
}

/// Types that gain by a coding.
pub(crate) fn is_text(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kind.starts_with("text/")
        || ["javascript", "json", "xml", "wasm", "ttf", "otf"].iter().any(|word| kind.ends_with(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coding_is_chosen_by_what_the_client_takes() {
        let accepted = |value: &str, coding| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, value.parse().unwrap());
            accepts(&headers, coding)
        };
        assert!(accepted("gzip, deflate, br;q=0.5", "br") && accepted("GZIP", "gzip"));
        assert!(!accepted("gzip;q=0, br", "gzip") && !accepted("deflate", "br") && !accepted("", "gzip"));
    }
}
