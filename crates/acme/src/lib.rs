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
mod order;
mod schedule;
mod store;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use cofferdam_tenant::{AcmeFront, TlsFiles};
use instant_acme::{Account, Error};
use rustls::crypto::ring;
use tokio::sync::watch;
use tokio::task::{self, JoinSet};

use crate::order::blocking;
use crate::schedule::Failures;
use crate::store::{Challenge, Store};

/// Orders at a time.
const ORDERS: usize = 4;

/// How often a gateway that does not order looks whether it may, and what the other has got.
const TURN: Duration = Duration::from_secs(5);

/// The longest time that nothing is looked at.
const LONGEST_REST: Duration = Duration::from_secs(600);

/// How long an authority is left alone that wants to be asked less often.
const LESS_OFTEN: Duration = Duration::from_secs(15 * 60);

/// How long an order may take altogether.
const LONGEST_ORDER: Duration = Duration::from_secs(600);

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
    /// What the last of them was.
    pub reason: Option<String>,
}

/// The certificates that there are, by host.
pub type Certificates = HashMap<String, TlsFiles>;

#[derive(Debug, Default)]
struct Kept {
    valid: HashMap<String, (Range<SystemTime>, SystemTime)>,
    failures: BTreeMap<String, Failures>,
    challenges: HashMap<String, Challenge>,
    /// Whether this is the gateway that orders.
    orders: bool,
}

/// Orders, keeps and renews.
#[derive(Debug)]
pub struct Acme {
    front: AcmeFront,
    store: Store,
    hosts: watch::Sender<Arc<BTreeSet<String>>>,
    certificates: watch::Sender<Arc<Certificates>>,
    kept: Mutex<Kept>,
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
        let challenge = self.challenge(host).await?;
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
        let state = |host: &String| {
            let valid = kept.valid.get(host).map(|(valid, _)| valid);
            let failures = kept.failures.get(host);
            HostState {
                host: host.clone(),
                not_after: valid.map(|valid| valid.end),
                next: schedule::due(host, valid, failures, now),
                failures: failures.map_or(0, |failures| failures.count),
                reason: failures.map(|failures| failures.reason.clone()),
            }
        };
        hosts.iter().map(state).collect()
    }

    /// Orders what is missing and renews what gets old, for as long as it is polled.
    ///
    /// Cancel-safe: an order that is dropped begins anew with the next run.
    pub async fn run(self: &Arc<Self>) {
        loop {
            let store = self.store.clone();
            match blocking(move || store.lock()).await {
                Ok(Some(lock)) => {
                    self.order_all().await;
                    drop(lock);
                }
                Ok(None) => self.reread().await,
                Err(error) => {
                    tracing::error!(directory = %self.store.root().display(), %error, "certificates cannot be ordered");
                }
            }
            tokio::time::sleep(TURN).await;
        }
    }

    /// Orders for as long as it is polled, or hosts are told.
    async fn order_all(self: &Arc<Self>) {
        // Whoever ordered before may have got something since it was read last.
        self.reread().await;
        let _turn = Turn::begin(self);
        let mut hosts = self.hosts.subscribe();
        let mut orders = JoinSet::new();
        let mut running: HashMap<task::Id, String> = HashMap::new();
        let mut account: Option<Account> = None;
        let mut left_alone = Instant::now();
        let mut unreachable = 0;
        loop {
            let mut waiting = self.waiting(&hosts.borrow_and_update().clone(), &running);
            let now = SystemTime::now();
            while orders.len() < ORDERS && left_alone <= Instant::now() {
                let Some((at, host)) = waiting.first().cloned().filter(|(at, _)| *at <= now) else { break };
                let known = match &account {
                    Some(account) => account.clone(),
                    None => match order::account(&self.front, &self.store).await {
                        Ok(made) => {
                            unreachable = 0;
                            account.insert(made).clone()
                        }
                        Err(error) => {
                            unreachable += 1;
                            let wait = schedule::pause(unreachable);
                            left_alone = Instant::now() + wait;
                            let directory = &self.front.config.directory;
                            tracing::error!(directory, error = %reason(&error), again_in = ?wait, "an authority for certificates cannot be asked");
                            break;
                        }
                    },
                };
                waiting.remove(&(at, host.clone()));
                let (acme, of) = (Arc::clone(self), host.clone());
                let order = orders.spawn(async move {
                    let got = tokio::time::timeout(LONGEST_ORDER, acme.order(&known, &of)).await;
                    got.unwrap_or(Err(Error::Timeout(None)))
                });
                running.insert(order.id(), host);
            }
            let next = waiting.first().and_then(|(at, _)| at.duration_since(now).ok());
            let rest = next.unwrap_or(if waiting.is_empty() { LONGEST_REST } else { Duration::ZERO });
            let rest = rest.max(left_alone.saturating_duration_since(Instant::now())).max(Duration::from_secs(1));
            tokio::select! {
                ended = orders.join_next_with_id(), if !orders.is_empty() => {
                    let (id, got) = match ended {
                        Some(Ok(ended)) => ended,
                        Some(Err(error)) => (error.id(), Err(Error::Str("the order has broken down"))),
                        None => continue,
                    };
                    let Some(host) = running.remove(&id) else { continue };
                    if let Err(error) = &got {
                        if order::is_unknown_account(error) {
                            account = None;
                            self.forget_account().await;
                        }
                        if order::is_rate_limited(error) {
                            left_alone = Instant::now() + LESS_OFTEN;
                        }
                    }
                    self.ended(host, got).await;
                },
                () = tokio::time::sleep(rest.min(LONGEST_REST)) => {}
                changed = hosts.changed() => if changed.is_err() { return },
            }
        }
    }

    /// The hosts for which nothing is under way, by when they are asked for.
    fn waiting(&self, hosts: &BTreeSet<String>, running: &HashMap<task::Id, String>) -> BTreeSet<(SystemTime, String)> {
        let (kept, now) = (self.kept(), SystemTime::now());
        let running: BTreeSet<_> = running.values().collect();
        let hosts = hosts.iter().filter(|host| !running.contains(host));
        let due = |host: &String| {
            let valid = kept.valid.get(host).map(|(valid, _)| valid);
            (schedule::due(host, valid, kept.failures.get(host), now), host.clone())
        };
        hosts.map(due).collect()
    }

    async fn order(self: &Arc<Self>, account: &Account, host: &str) -> Result<TlsFiles, Error> {
        let files = order::certificate(account, host, self).await?;
        check(host, &files).map_err(|error| Error::Other(error.into()))?;
        Ok(files)
    }

    /// Makes known what the authority will ask for, here and wherever the state directory is read.
    async fn publish(&self, host: &str, challenge: Challenge) -> io::Result<()> {
        self.kept().challenges.insert(host.to_owned(), challenge.clone());
        let (store, host) = (self.store.clone(), host.to_owned());
        blocking(move || store.set_challenge(&host, &challenge)).await
    }

    /// Keeps what an order has brought, and tells of it. What cannot be written is used all the same: an authority gives only so many.
    async fn ended(&self, host: String, got: Result<TlsFiles, Error>) {
        let files = match got {
            Ok(files) => {
                tracing::info!(host, "a host has a new certificate");
                self.kept().failures.remove(&host);
                self.take([(host.clone(), files.clone(), SystemTime::now())]);
                Some(files)
            }
            Err(error) => {
                let mut kept = self.kept();
                let count = kept.failures.get(&host).map_or(0, |failures| failures.count).saturating_add(1);
                let failures = Failures { count, last: SystemTime::now(), reason: reason(&error) };
                let again_in = schedule::pause(count);
                tracing::warn!(host, error = failures.reason, count, ?again_in, "a host gets no certificate");
                kept.failures.insert(host.clone(), failures);
                None
            }
        };
        let failures = {
            let mut kept = self.kept();
            kept.challenges.remove(&host);
            kept.failures.clone()
        };
        let store = self.store.clone();
        let written = blocking(move || {
            if let Some(files) = &files {
                store.set_certificate(&host, files)?;
            }
            store.set_failures(&failures)?;
            store.remove_challenge(&host)
        });
        if let Err(error) = written.await {
            tracing::error!(directory = %self.store.root().display(), %error, "a certificate cannot be kept");
        }
    }

    async fn forget_account(&self) {
        tracing::warn!(directory = self.front.config.directory, "the authority does not know the account any more");
        let store = self.store.clone();
        if let Err(error) = blocking(move || store.forget_account()).await {
            tracing::error!(%error, "the account cannot be forgotten");
        }
    }

    async fn reread(self: &Arc<Self>) {
        let acme = Arc::clone(self);
        if let Err(error) = blocking(move || acme.read()).await {
            tracing::error!(directory = %self.store.root().display(), %error, "certificates cannot be read");
        }
    }

    /// Reads what is on disk and not known yet, and removes what nobody wants and nobody could use any more.
    fn read(&self) -> io::Result<()> {
        let (hosts, now) = (Arc::clone(&self.hosts.borrow()), SystemTime::now());
        let mut read = Vec::new();
        for (host, written) in self.store.certificates()? {
            let known = self.kept().valid.get(&host).cloned();
            if known.as_ref().is_some_and(|(_, at)| *at >= written) {
                let is_over = known.is_some_and(|(valid, _)| valid.end < now);
                if is_over && !hosts.is_empty() && !hosts.contains(&host) {
                    self.store.remove_certificate(&host)?;
                }
                continue;
            }
            let Some(files) = self.store.certificate(&host)? else { continue };
            match check(&host, &files) {
                Ok(()) => read.push((host, files, written)),
                Err(error) => tracing::warn!(host, error, "what is kept for a host is no certificate"),
            }
        }
        self.kept().failures = self.store.failures();
        self.take(read);
        Ok(())
    }

    /// Serves these from now on.
    fn take(&self, new: impl IntoIterator<Item = (String, TlsFiles, SystemTime)>) {
        let mut kept = self.kept();
        let mut fresh = Vec::new();
        for (host, files, written) in new {
            if let Ok(valid) = cofferdam_tls::validity(&files) {
                kept.valid.insert(host.clone(), (valid, written));
                fresh.push((host, files));
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
        {
            let kept = self.kept();
            if let Some(challenge) = kept.challenges.get(host) {
                return Some(challenge.clone());
            }
            // Whoever orders knows all that there are; and nobody is asked about a host that is none.
            if kept.orders || !self.hosts.borrow().contains(host) {
                return None;
            }
        }
        let (store, host) = (self.store.clone(), host.to_owned());
        blocking(move || Ok(store.challenge(&host))).await.ok()?
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time for which this gateway is the one that orders.
struct Turn<'a>(&'a Acme);

impl<'a> Turn<'a> {
    fn begin(acme: &'a Acme) -> Self {
        acme.kept().orders = true;
        Self(acme)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut kept = self.0.kept();
        kept.orders = false;
        kept.challenges.clear();
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
    text
}
