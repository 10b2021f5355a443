//! Certificates for the hosts of many tenants, from an authority that speaks ACME (RFC 8555): ordered, kept, and renewed.
//!
//! Each host has a certificate of its own, so that one whose name leads elsewhere fails alone. [`Acme::run`] orders what is missing and
//! renews what gets old; [`Acme::certificates`] tells of each change. What the authority asks for meanwhile is answered by whoever
//! listens: [`Acme::authorization`] for `http-01`, [`Acme::challenge_certificate`] for `tls-alpn-01`.
//!
//! Gateways may share one state directory: one of them orders, all of them serve what was got and answer the authority. When the
//! one that orders ends, another takes its place within seconds.
#![forbid(unsafe_code)]

mod client;
mod kept;
mod order;
mod schedule;
mod store;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use cofferdam_tenant::{AcmeFront, TlsFiles};
use instant_acme::{Account, Error};
use rustls::crypto::ring;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::kept::{Kept, LONGEST_SILENCE, domain};
use crate::order::blocking;
use crate::schedule::Failures;
use crate::store::{Challenge, Store};

/// Orders at a time.
const ORDERS: usize = 4;

/// How often is looked what others have got, and whether there is something to order.
const TURN: Duration = Duration::from_secs(5);

/// How long an authority is left alone that has refused hosts of so many domains in a row for being asked too often.
const LESS_OFTEN: Duration = Duration::from_secs(15 * 60);
const LIMITED_DOMAINS: usize = 3;

/// How long an order may take altogether.
const LONGEST_ORDER: Duration = Duration::from_secs(600);

/// How long an answer to an authority may take: the directory may be far away.
const LOOKING: Duration = Duration::from_secs(5);

/// Characters that are kept of what an authority says.
const LONGEST_REASON: usize = 500;

/// Why certificates cannot be had at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcmeError {
    /// The state directory cannot be used.
    #[error("http.tls.acme.state_directory: {path}: {error}")]
    State {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        error: io::Error,
    },
    /// No request can be made.
    #[error("http.tls.acme: {0}")]
    Client(String),
}

/// What is known of one host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostState {
    /// The host.
    pub host: String,
    /// Until when its certificate is valid, if it has one.
    pub not_after: Option<SystemTime>,
    /// When the authority is asked next.
    pub next: SystemTime,
    /// Failures in a row.
    pub failures: u32,
    /// What the last of them was, or why the authority cannot be asked at all.
    pub reason: Option<String>,
}

/// The certificates that there are, by host.
pub type Certificates = HashMap<String, Arc<TlsFiles>>;

/// Orders, keeps and renews.
#[derive(Debug)]
pub struct Acme {
    front: AcmeFront,
    store: Store,
    hosts: watch::Sender<Arc<BTreeSet<String>>>,
    certificates: watch::Sender<Arc<Certificates>>,
    kept: Mutex<Kept>,
    /// Held by who looks for a challenge that another gateway has put there.
    looking: Arc<tokio::sync::Mutex<()>>,
    /// Held by who writes what has failed, so that what is older is never written later.
    writing: tokio::sync::Mutex<()>,
}

/// Orders that go on when nobody waits for them any more, and have the right to order as long as they do. Each gives the id of its account
/// where the authority does not know that.
#[derive(Debug, Default)]
struct Orders(JoinSet<Option<String>>);

impl Drop for Orders {
    fn drop(&mut self) {
        self.0.detach_all();
    }
}

impl Acme {
    /// Opens the state directory, and reads what is there. Blocks for as long as that takes.
    pub fn open(front: &AcmeFront) -> Result<Arc<Self>, AcmeError> {
        let path = &front.config.state_directory;
        let failed = |error| AcmeError::State { path: path.clone(), error };
        let store = Store::open(path, &front.config.directory).map_err(failed)?;
        client::Client::new(front.directory_ca.as_deref())?;
        let acme = Self {
            front: front.clone(),
            store,
            hosts: watch::Sender::new(Arc::default()),
            certificates: watch::Sender::new(Arc::default()),
            kept: Mutex::default(),
            looking: Arc::default(),
            writing: tokio::sync::Mutex::default(),
        };
        acme.read().map_err(failed)?;
        Ok(Arc::new(acme))
    }

    /// Whether this is what these settings ask for.
    pub fn is_of(&self, front: &AcmeFront) -> bool {
        self.front == *front
    }

    /// The hosts that want certificates, from now on.
    pub fn set_hosts(&self, hosts: BTreeSet<String>) {
        self.hosts.send_if_modified(|old| {
            let changes = **old != hosts;
            *old = Arc::new(hosts);
            changes
        });
    }

    /// The certificates that there are, and a word of each change.
    pub fn certificates(&self) -> watch::Receiver<Arc<Certificates>> {
        self.certificates.subscribe()
    }

    /// What the authority shall read at `/.well-known/acme-challenge/<token>` of a host, if it is about to ask for that.
    ///
    /// Cancel-safe.
    pub async fn authorization(self: &Arc<Self>, host: &str, token: &str) -> Option<String> {
        let is_one = !token.is_empty()
            && token.len() <= 256
            && token.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        let challenge = if is_one { self.challenge(host).await? } else { return None };
        (challenge.token == token).then_some(challenge.authorization)
    }

    /// What the authority shall be shown when it speaks `acme-tls/1` to a host, if it is about to.
    ///
    /// Cancel-safe.
    pub async fn challenge_certificate(self: &Arc<Self>, host: &str) -> Option<TlsFiles> {
        let challenge = self.challenge(host).await?;
        let made = order::shown(host, &challenge);
        made.inspect_err(|error| tracing::error!(host, %error, "an authority cannot be shown a certificate")).ok()
    }

    /// What is known of each host that wants a certificate.
    pub fn states(&self) -> Vec<HostState> {
        let (hosts, now) = (Arc::clone(&self.hosts.borrow()), SystemTime::now());
        let kept = self.kept();
        let silent_until = kept.silent_until();
        let state = |host: &String| {
            let failures = kept.failures.get(host);
            let next = kept.due(host, now);
            let authority = kept.authority.as_ref().filter(|_| next <= now);
            HostState {
                host: host.clone(),
                not_after: kept.valid.get(host).map(|(valid, _)| valid.end),
                next: silent_until.map_or(next, |until| next.max(until)),
                failures: failures.map_or(0, |failures| failures.count),
                reason: authority.or(failures).map(|failures| failures.reason.clone()),
            }
        };
        hosts.iter().map(state).collect()
    }

    /// Orders what is missing and renews what gets old, for as long as it is polled; and reads what others have got.
    ///
    /// Cancel-safe: orders that are under way go on by themselves, and nobody else orders meanwhile.
    pub async fn run(self: &Arc<Self>) {
        let mut hosts = self.hosts.subscribe();
        loop {
            self.reread().await;
            let wanted = Arc::clone(&hosts.borrow_and_update());
            let rest = self.rest(&wanted);
            if rest.is_zero() {
                let store = self.store.clone();
                match blocking(move || store.lock()).await {
                    Ok(Some(lock)) => self.order_due(Arc::new(lock)).await,
                    Ok(None) => {}
                    Err(error) => {
                        tracing::error!(directory = %self.store.root().display(), %error, "certificates cannot be ordered");
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(if rest.is_zero() { TURN } else { rest.min(TURN) }) => {}
                changed = hosts.changed() => if changed.is_err() { return },
            }
        }
    }

    /// How long there is nothing to order.
    fn rest(&self, hosts: &BTreeSet<String>) -> Duration {
        let (kept, now) = (self.kept(), SystemTime::now());
        let Some(first) =
            hosts.iter().filter(|host| !kept.running.contains_key(*host)).map(|host| kept.due(host, now)).min()
        else {
            return TURN;
        };
        let first = kept.silent_until().map_or(first, |until| first.max(until));
        first.duration_since(now).unwrap_or_default()
    }

    /// Orders as long as there is something to order. The lock is everybody's turn: it is not held for longer.
    async fn order_due(self: &Arc<Self>, lock: Arc<File>) {
        // Whoever ordered before may have got something since it was read last.
        self.kept().read = None;
        self.reread().await;
        self.clean().await;
        let mut hosts = self.hosts.subscribe();
        let mut orders = Orders::default();
        let mut account: Option<Account> = None;
        let mut was_forgotten = false;
        loop {
            let wanted = Arc::clone(&hosts.borrow_and_update());
            while orders.0.len() < ORDERS {
                let now = SystemTime::now();
                let next = {
                    let kept = self.kept();
                    let is_silent = kept.silent_until().is_some_and(|until| until > now);
                    kept.waiting(&wanted, now).into_iter().next().filter(|(at, _)| *at <= now && !is_silent)
                };
                let Some((_, host)) = next else { break };
                let known = match &account {
                    Some(account) => account.clone(),
                    None => match self.account().await {
                        Ok(made) => account.insert(made).clone(),
                        Err(error) => {
                            self.silenced(&error);
                            break;
                        }
                    },
                };
                // What cannot be written must not be begun: it would be asked for again and again.
                self.kept().running.insert(host.clone(), now);
                if let Err(error) = self.write().await {
                    self.kept().running.remove(&host);
                    self.silenced(&Error::Other(Box::new(error)));
                    break;
                }
                let (acme, lock) = (Arc::clone(self), Arc::clone(&lock));
                orders.0.spawn(async move {
                    let unknown = acme.order(&known, &host).await;
                    drop(lock);
                    unknown
                });
            }
            if orders.0.is_empty() {
                break;
            }
            tokio::select! {
                ended = orders.0.join_next() => {
                    if let Some(Ok(Some(id))) = ended
                        && account.as_ref().is_some_and(|account| account.id() == id)
                    {
                        account = None;
                        if std::mem::replace(&mut was_forgotten, true) {
                            self.silenced(&Error::Str("the authority does not know the account that it has just made"));
                        }
                        self.forget_account().await;
                    }
                }
                changed = hosts.changed() => if changed.is_err() { return },
            }
        }
    }

    /// The account with the authority; a new one only where it can be kept.
    async fn account(&self) -> Result<Account, Error> {
        self.write().await.map_err(|error| Error::Other(Box::new(error)))?;
        let account = order::account(&self.front, &self.store).await?;
        self.kept().authority = None;
        Ok(account)
    }

    /// Writes down what has failed, and what is being ordered: for this process, and for whoever comes after it.
    async fn write(&self) -> io::Result<()> {
        let _writing = self.writing.lock().await;
        let failures = self.kept().to_keep(SystemTime::now());
        let store = self.store.clone();
        let written = blocking(move || store.set_failures(&failures)).await;
        self.kept().unwritten = written.is_err();
        written
    }

    /// One order, from its beginning to what is kept of it. The account's id where the authority does not know it.
    async fn order(&self, account: &Account, host: &str) -> Option<String> {
        // If the order breaks down, it is over all the same.
        let _running = Running(self, host);
        let got = tokio::time::timeout(LONGEST_ORDER, order::certificate(account, host, self)).await;
        let got = got.unwrap_or(Err(Error::Timeout(None))).and_then(|files| {
            check(host, &files).map_err(|error| Error::Other(error.into()))?;
            Ok(files)
        });
        let unknown =
            got.as_ref().err().filter(|error| order::is_unknown_account(error)).map(|_| account.id().to_owned());
        self.ended(host, got).await;
        unknown
    }

    /// Makes known what the authority will ask for, here and wherever the state directory is read.
    async fn publish(&self, host: &str, challenge: Challenge) -> io::Result<()> {
        self.kept().challenges.insert(host.to_owned(), challenge.clone());
        let (store, host) = (self.store.clone(), host.to_owned());
        blocking(move || store.set_challenge(&host, &challenge)).await
    }

    /// Keeps what an order has brought, and tells of it. What cannot be written is used all the same: an authority gives only so many.
    async fn ended(&self, host: &str, got: Result<TlsFiles, Error>) {
        let now = SystemTime::now();
        let files = match got {
            Ok(files) => {
                let count = self.kept().failures.remove(host).map_or(0, |failures| failures.count);
                self.take([(host.to_owned(), files.clone(), now)]);
                let mut kept = self.kept();
                kept.limited.clear();
                kept.domains.remove(domain(host));
                if kept.due(host, now) <= now {
                    // Ordered again at once, it would be ordered for ever.
                    let reason =
                        "the certificate that came is due to be renewed already: is the clock right?".to_owned();
                    tracing::error!(host, reason, "a host gets no certificate");
                    let failures = Failures { count: count.saturating_add(1), last: now, limited: false, reason };
                    kept.failures.insert(host.to_owned(), failures);
                } else {
                    tracing::info!(host, "a host has a new certificate");
                }
                Some(files)
            }
            Err(error) => {
                let mut kept = self.kept();
                let limited = order::is_rate_limited(&error);
                let before = kept.failures.get(host).map_or(0, |failures| failures.count);
                // Being asked too often is not the host's fault.
                let count = if limited { before.max(1) } else { before.saturating_add(1) };
                let failures = Failures { count, last: now, limited, reason: reason(&error) };
                let again = failures.until(host);
                let again_in = again.duration_since(now).unwrap_or_default();
                tracing::warn!(host, error = failures.reason, count, ?again_in, "a host gets no certificate");
                kept.failures.insert(host.to_owned(), failures);
                if limited {
                    let (refused, until) = kept.domains.entry(domain(host).to_owned()).or_insert((0, now));
                    *refused = refused.saturating_add(1);
                    *until = again;
                    kept.limited.insert(domain(host).to_owned());
                    if kept.limited.len() >= LIMITED_DOMAINS {
                        kept.limited.clear();
                        kept.left_alone = now.checked_add(LESS_OFTEN);
                        tracing::warn!(again_in = ?LESS_OFTEN, "the authority for certificates wants to be asked less often");
                    }
                } else {
                    kept.limited.clear();
                }
                None
            }
        };
        {
            let mut kept = self.kept();
            kept.challenges.remove(host);
            kept.running.remove(host);
        }
        let (store, host) = (self.store.clone(), host.to_owned());
        let written = blocking(move || {
            if let Some(files) = &files {
                store.set_certificate(&host, files)?;
            }
            store.remove_challenge(&host)
        });
        for written in [written.await, self.write().await] {
            if let Err(error) = written {
                tracing::error!(directory = %self.store.root().display(), %error, "a certificate cannot be kept");
            }
        }
    }

    /// Nothing can be ordered for a while.
    fn silenced(&self, error: &Error) {
        let mut kept = self.kept();
        let count = kept.authority.as_ref().map_or(0, |failures| failures.count).saturating_add(1);
        let failures = Failures { count, last: SystemTime::now(), limited: false, reason: reason(error) };
        let (directory, again_in) = (&self.front.config.directory, schedule::pause(count).min(LONGEST_SILENCE));
        tracing::error!(directory, error = failures.reason, ?again_in, "an authority for certificates cannot be asked");
        kept.authority = Some(failures);
    }

    async fn forget_account(&self) {
        tracing::warn!(directory = self.front.config.directory, "the authority does not know the account any more");
        let store = self.store.clone();
        if let Err(error) = blocking(move || store.forget_account()).await {
            tracing::error!(%error, "the account cannot be forgotten");
        }
    }

    /// Removes what nobody wants and nobody could use any more. Only for who has the lock.
    async fn clean(&self) {
        let (hosts, now) = (Arc::clone(&self.hosts.borrow()), SystemTime::now());
        let is_over =
            |valid: &Range<SystemTime>| now.duration_since(valid.end).is_ok_and(|since| since > schedule::KEPT);
        let over: Vec<_> = {
            let kept = self.kept();
            let gone = kept.valid.iter().filter(|(host, (valid, _))| !hosts.contains(*host) && is_over(valid));
            gone.map(|(host, _)| host.clone()).collect()
        };
        let store = self.store.clone();
        let removed = over.clone();
        let cleaned = blocking(move || {
            over.iter().try_for_each(|host| store.remove_certificate(host))?;
            store.sweep(now)
        });
        match cleaned.await {
            Ok(()) => self.kept().valid.retain(|host, _| !removed.contains(host)),
            Err(error) => {
                tracing::warn!(directory = %self.store.root().display(), %error, "what is old cannot be removed");
            }
        }
    }

    async fn reread(self: &Arc<Self>) {
        let acme = Arc::clone(self);
        if let Err(error) = blocking(move || acme.read()).await {
            tracing::error!(directory = %self.store.root().display(), %error, "certificates cannot be read");
        }
    }

    /// Reads what is on disk and not known yet. What is wrong with one host's file is no other host's trouble.
    fn read(&self) -> io::Result<()> {
        let now = SystemTime::now();
        let changed = self.store.changed()?;
        // A file system tells times apart only so well.
        let is_settled = now.duration_since(changed).is_ok_and(|since| since > Duration::from_secs(2));
        if is_settled && self.kept().read == Some(changed) {
            return Ok(());
        }
        let mut read = Vec::new();
        for (host, written) in self.store.certificates()? {
            if self.kept().valid.get(&host).is_some_and(|(_, at)| *at >= written) {
                continue;
            }
            let files = match self.store.certificate(&host) {
                Ok(Some(files)) => check(&host, &files).map(|()| files),
                Ok(None) => continue,
                Err(error) => Err(error.to_string()),
            };
            match files {
                Ok(files) => read.push((host, files, written)),
                Err(error) => tracing::warn!(host, error, "what is kept for a host is no certificate"),
            }
        }
        self.take(read);
        let mut failures = self.store.failures();
        for failures in failures.values_mut().filter(|failures| failures.last > now) {
            // Written by a clock that was wrong: when it was is not known, and that it is over is not wrong for long.
            failures.last = now.checked_sub(schedule::pause(failures.count)).unwrap_or(now);
            failures.limited = false;
        }
        {
            let mut kept = self.kept();
            // What is being ordered here counts as failed for others only.
            failures.retain(|host, _| !kept.running.contains_key(host));
            for (host, known) in std::mem::take(&mut kept.failures) {
                let is_newer = failures.get(&host).is_none_or(|there| there.last < known.last);
                if kept.running.contains_key(&host) || (kept.unwritten && is_newer) {
                    failures.insert(host, known);
                }
            }
            kept.failures = failures;
            kept.read = Some(changed);
        }
        Ok(())
    }

    /// Serves these from now on.
    fn take(&self, new: impl IntoIterator<Item = (String, TlsFiles, SystemTime)>) {
        let mut kept = self.kept();
        let mut fresh = Vec::new();
        for (host, files, written) in new {
            if let Ok(valid) = cofferdam_tls::validity(&files) {
                kept.valid.insert(host.clone(), (valid, written));
                fresh.push((host, Arc::new(files)));
            }
        }
        if !fresh.is_empty() {
            self.certificates.send_modify(|all| {
                let mut changed = Certificates::clone(all);
                changed.extend(fresh);
                *all = Arc::new(changed);
            });
        }
    }

    async fn challenge(self: &Arc<Self>, host: &str) -> Option<Challenge> {
        if let Some(challenge) = self.kept().challenges.get(host) {
            return Some(challenge.clone());
        }
        // Nobody is asked about a host that is none.
        if !self.hosts.borrow().contains(host) {
            return None;
        }
        // One at a time, whoever asks: a directory that hangs must not take all threads that read files.
        let look = async {
            let turn = Arc::clone(&self.looking).lock_owned().await;
            let (store, host) = (self.store.clone(), host.to_owned());
            let found = blocking(move || {
                let _turn = turn;
                Ok(store.challenge(&host))
            });
            found.await.ok()?
        };
        tokio::time::timeout(LOOKING, look).await.ok()?
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A host that is being ordered.
struct Running<'a>(&'a Acme, &'a str);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut kept = self.0.kept();
        kept.challenges.remove(self.1);
        if let Some(since) = kept.running.remove(self.1) {
            let count = kept.failures.get(self.1).map_or(0, |failures| failures.count).saturating_add(1);
            let reason = "the order has broken down".to_owned();
            kept.failures.insert(self.1.to_owned(), Failures { count, last: since, limited: false, reason });
        }
    }
}

/// Whether these can be served for a host, now or once.
fn check(host: &str, files: &TlsFiles) -> Result<(), String> {
    cofferdam_tls::key_pair(files, &ring::default_provider()).map_err(|error| error.to_string())?;
    let names = cofferdam_tls::names(files).map_err(|error| error.to_string())?;
    if !names.iter().any(|name| name == host) {
        return Err(format!("the certificate is for {} and not for {host}", names.join(", ")));
    }
    cofferdam_tls::validity(files).map_err(|error| error.to_string())?;
    Ok(())
}

/// An error with what is behind it, since the outermost of a request's says nothing.
fn reason(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = error.source();
    }
    text.chars().take(LONGEST_REASON).collect()
}
