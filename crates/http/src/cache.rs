//! Static files and compiled assets, kept for all browsers of a tenant.
//!
//! Only what Odoo itself says to be public and what lies at the paths of static files: `load_menus` and translations say so
//! too and are not, so they are never kept. A cookie that comes with an asset is not kept either: it is somebody's session.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cofferdam_fairness::Timestamp;
use cofferdam_tenant::{CacheConfig, Pool, PoolName, TenantId};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};
use moka::sync::Cache;
use pingora_core::protocols::http::compression::Algorithm;
use pingora_http::{RequestHeader, ResponseHeader};
use tokio::sync::watch;

use crate::local::Content;

/// Objects up to this size are kept in memory, greater ones in files.
const IN_MEMORY: u64 = 8 << 20;

/// No tenant may have more than this part of what is kept: anybody can ask for the same file under many names.
const SHARE: u64 = 4;

/// The longest time that something is kept without asking.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3_600);

/// What an answer is kept under. Files of the program are the same for all tenants of a release, but what a tenant serves in
/// the place of such a file need not be, and must not reach another's browser: so everything is kept per tenant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) tenant: TenantId,
    /// Another pool has other files, and so has another release.
    pub(crate) pool: PoolName,
    pub(crate) release: Option<Arc<str>>,
    pub(crate) scheme: &'static str,
    pub(crate) host: String,
    /// The target as it was sent, with its query.
    pub(crate) target: Vec<u8>,
}

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

/// The key of a request, if its answer may be kept: `None` for everything that is not a static file or a compiled asset.
pub(crate) fn key(
    head: &RequestHeader,
    path: &str,
    scheme: &'static str,
    host: &str,
    tenant: TenantId,
    pool: &Pool,
) -> Option<Key> {
    let readable =
        matches!(head.method, Method::GET | Method::HEAD) && !head.headers.contains_key(header::AUTHORIZATION);
    if readable { key_of_target(head, path, scheme, host, tenant, pool) } else { None }
}

/// The key of a target, whatever is done with it.
pub(crate) fn key_of_target(
    head: &RequestHeader,
    path: &str,
    scheme: &'static str,
    host: &str,
    tenant: TenantId,
    pool: &Pool,
) -> Option<Key> {
    let mut segments = path.split('/').skip(1);
    let (first, second, third) = (segments.next()?, segments.next()?, segments.next()?);
    let raw = head.raw_path();
    let is_asset = (first, second) == ("web", "assets");
    // These stand for whatever is newest, or are made for one developer.
    let is_newest = || matches!(third, "any" | "%") || raw.windows(5).any(|w| w == b"debug");
    if !(second == "static" || is_asset && !is_newest()) {
        return None;
    }
    // What is not in its plain form may mean something else to the server than to us.
    let plain = raw.split(|b| *b == b'?').next() == Some(path.as_bytes());
    plain.then(|| Key {
        tenant,
        pool: pool.name.clone(),
        release: pool.release.clone(),
        scheme,
        host: host.to_owned(),
        target: raw.to_vec(),
    })
}

/// Somebody who sees to it that something is kept. Whoever waits for it goes on when this is dropped.
#[derive(Debug)]
pub(crate) struct Fetch {
    store: Arc<Store>,
    key: Key,
    generation: u64,
    changed: Arc<AtomicBool>,
    _done: watch::Sender<()>,
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

/// What is meant for whoever has asked, and is not kept: each hop makes its own, and the cookie is somebody's. What
/// `Connection` names belongs to it (RFC 9111, 3.1).
fn of_this_hop(head: &ResponseHeader) -> Vec<HeaderName> {
    let named = head.headers.get_all(header::CONNECTION).iter().filter_map(|v| v.to_str().ok());
    let named = named.flat_map(|v| v.split(',')).filter_map(|name| name.trim().parse().ok());
    let always = [
        header::SET_COOKIE,
        header::CONNECTION,
        header::TRANSFER_ENCODING,
        header::TE,
        header::UPGRADE,
        header::PROXY_AUTHENTICATE,
        header::DATE,
        header::AGE,
        HeaderName::from_static("keep-alive"),
    ];
    always.into_iter().chain(named).collect()
}

/// What tells of the bytes that are kept, and stays as they do.
fn is_of_the_body(name: &HeaderName) -> bool {
    [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::CONTENT_TYPE, header::CONTENT_RANGE].contains(name)
}

/// How old an answer is said to be.
fn age(head: &ResponseHeader) -> Duration {
    let seconds = head.headers.get(header::AGE).and_then(|v| v.to_str().ok()?.trim().parse::<u64>().ok());
    Duration::from_secs(seconds.unwrap_or_default()).min(LONGEST)
}

fn milliseconds(now: Timestamp) -> u64 {
    u64::try_from(now.since(Timestamp::default()).as_millis()).unwrap_or(u64::MAX)
}

/// How long an answer may be kept; `None` when it may not.
fn lifetime(head: &ResponseHeader) -> Option<Duration> {
    let value =
        |name| head.headers.get_all(name).iter().filter_map(|v: &HeaderValue| v.to_str().ok()).collect::<Vec<_>>();
    if head.status != StatusCode::OK
        || head.headers.contains_key(header::CONTENT_ENCODING)
        || head.headers.contains_key(header::CONTENT_RANGE)
    {
        return None;
    }
    if !value(header::VARY).iter().flat_map(|v| v.split(',')).all(|v| v.trim().eq_ignore_ascii_case("accept-encoding"))
    {
        return None;
    }
    let control = value(header::CACHE_CONTROL).join(",").to_ascii_lowercase();
    let directives = directives(&control);
    let has = |name: &str| directives.iter().any(|(known, _)| *known == name);
    // With the names of fields they speak of those alone; whoever says so means this answer too, to be sure.
    if !has("public") || has("private") || has("no-store") || has("no-cache") {
        return None;
    }
    let age = |name: &str| directives.iter().find(|(known, _)| *known == name).map(|(_, age)| age);
    // What is there and cannot be read is over (RFC 9111, 4.2.1).
    let seconds = age("s-maxage").or_else(|| age("max-age"))?.trim_matches('"').parse::<u64>().unwrap_or_default();
    (seconds > 0).then(|| Duration::from_secs(seconds).min(LONGEST))
}

/// The directives of a `Cache-Control`, and what stands behind their equals signs: a comma in quotes ends none.
fn directives(control: &str) -> Vec<(&str, &str)> {
    let (mut found, mut from, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, c) in control.char_indices().chain([(control.len(), ',')]) {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ',' if !quoted || at == control.len() => {
                let one = control[from..at].trim();
                let (name, value) = one.split_once('=').unwrap_or((one, ""));
                found.push((name.trim(), value.trim()));
                from = (at + 1).min(control.len());
            }
            _ => {}
        }
    }
    if quoted {
        // Where it ends is anybody's guess.
        found.push(("no-store", ""));
    }
    found
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

#[cfg(test)]
mod tests {
    use cofferdam_tenant::{Catalog, NoSecrets, Source, SourceSet};

    use super::*;

    fn key_of(method: &str, target: &str, headers: &[(&str, &str)]) -> Option<Key> {
        let mut head = RequestHeader::build(method, target.as_bytes(), None).unwrap();
        for (name, value) in headers {
            head.append_header((*name).to_owned(), *value).unwrap();
        }
        let path = crate::route::canonical(target).into_owned();
        let main = "http: { listen: ['127.0.0.1:0'] }\npools: { odoo: { servers: [{ address: 'a:1' }], slots: 1 } }\n";
        let set = SourceSet { main: Source::new("main", main), tenants: Vec::new() };
        let catalog = Catalog::build(&set, &NoSecrets, None).unwrap();
        key(&head, &path, "https", "acme.example.com", TenantId(1), catalog.pools.values().next().unwrap())
    }

    /// The table of routes: what may be kept, and what never.
    #[test]
    fn static_files_and_compiled_assets_are_kept_and_nothing_else() {
        for kept in ["/web/static/src/a.js?v=1", "/sale/static/description/icon.png", "/web/assets/1a2b3c4/web.min.js"]
        {
            assert!(key_of("GET", kept, &[]).is_some(), "{kept}");
        }
        for never in [
            "/web/assets/any/web.assets_web.min.js",
            "/web/assets/debug/web.assets_web.js",
            "/web/assets/1a2b3c4/debug/x.js",
            "/web/assets/1a2b3c4/x.js?debug=assets",
            "/web/assets/%/x.js",
            "/web/static/%2e%2e/x",
            "/web//static/x.js",
            "/web/webclient/load_menus/1a2b",
            "/web/webclient/translations/1a2b",
            "/web/content/1",
            "/web/image/1",
            "/web/static",
            "/",
        ] {
            assert_eq!(key_of("GET", never, &[]), None, "{never}");
        }
        assert_eq!(key_of("POST", "/web/static/a.js", &[]), None);
        assert_eq!(key_of("GET", "/web/static/a.js", &[("Authorization", "Bearer x")]), None);
    }

    #[test]
    fn only_what_is_said_to_be_public_is_kept_and_only_so_long() {
        let of = |headers: &[(&str, &str)], status: u16| {
            let mut head = ResponseHeader::build(status, None).unwrap();
            for (name, value) in headers {
                head.append_header((*name).to_owned(), *value).unwrap();
            }
            lifetime(&head).map(|l| l.as_secs())
        };
        let public = ("Cache-Control", "public, max-age=604800");
        assert_eq!(of(&[public], 200), Some(604_800));
        assert_eq!(of(&[("Cache-Control", "Public, MAX-AGE=60, s-maxage=10")], 200), Some(10));
        assert_eq!(of(&[public, ("Vary", "Accept-Encoding"), ("Set-Cookie", "session_id=1")], 200), Some(604_800));
        for never in [
            &[("Cache-Control", "max-age=60")][..],
            &[("Cache-Control", "public")],
            &[("Cache-Control", "public, max-age=0")],
            &[("Cache-Control", "public, max-age=60, no-cache")],
            &[("Cache-Control", "private, max-age=60, public")],
            &[("Cache-Control", "public, max-age=60, private=\"X-User\"")],
            &[("Cache-Control", "public, max-age=60, no-cache=\"a, b\"")],
            &[("Cache-Control", "max-age=60, x=\"a, public, b\"")],
            &[("Cache-Control", "public, max-age=60, s-maxage=-1")],
            &[("Cache-Control", "public, max-age=60, x=\"unclosed, \\\"")],
            &[public, ("Vary", "Cookie")],
            &[public, ("Content-Encoding", "gzip")],
            &[],
        ] {
            assert_eq!(of(never, 200), None, "{never:?}");
        }
        assert_eq!((of(&[public], 404), of(&[public], 206)), (None, None));
    }

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
