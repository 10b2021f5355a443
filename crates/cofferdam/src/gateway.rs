//! A running gateway, and what can be done with it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use cofferdam_http::{HttpError, HttpPlane};
use cofferdam_postgres::{PostgresError, PostgresPlane};
use cofferdam_tenant::{Catalog, Diagnostic, Diagnostics, Secret, SourceSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::builder::{Builder, read_catalog};
use crate::files::Remembered;
use crate::handover::Sockets;

/// Time for transactions to end when HTTP has used up the drain's own.
const POSTGRES_GRACE: Duration = Duration::from_secs(2);
/// Time for the last answers of the admin listener after everything else has ended.
const ADMIN_GRACE: Duration = Duration::from_secs(1);

/// Where the configuration comes from.
#[derive(Debug, Clone)]
pub(crate) enum Origin {
    File(PathBuf),
    Given(Box<SourceSet>),
}

/// A running gateway. Clones are handles to the same one; it goes on when the last is dropped.
#[derive(Clone, Debug)]
pub struct Gateway {
    pub(crate) inner: Arc<Inner>,
    pub(crate) http: Vec<SocketAddr>,
    pub(crate) https: Vec<SocketAddr>,
    pub(crate) postgres: Vec<SocketAddr>,
    pub(crate) admin: Option<SocketAddr>,
}

pub(crate) struct Inner {
    pub(crate) origin: Mutex<Origin>,
    pub(crate) secrets: Arc<Remembered>,
    pub(crate) first_admin_token: Option<Secret>,
    pub(crate) catalog: ArcSwap<Catalog>,
    pub(crate) http: Option<Arc<HttpPlane>>,
    pub(crate) postgres: Option<Arc<PostgresPlane>>,
    pub(crate) draining: CancellationToken,
    pub(crate) stopped: CancellationToken,
    /// The admin surface goes with everything else, or as soon as a successor has one.
    pub(crate) admin_stopped: CancellationToken,
    /// What is listened on; none once the gateway drains.
    sockets: Mutex<Sockets>,
    pub(crate) tasks: TaskTracker,
    pub(crate) generation: AtomicU64,
    pub(crate) failed_reloads: AtomicU64,
    pub(crate) last_errors: Mutex<Vec<Diagnostic>>,
    /// One reload at a time, in the order in which they were asked for.
    reloading: tokio::sync::Mutex<()>,
}

/// A reload that took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reloaded {
    /// Counts reloads that took effect, from 1 for the start.
    pub generation: u64,
    /// Tenants in the catalog.
    pub tenants: usize,
}

/// A reload that changed nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReloadError {
    /// The configuration has errors; all of them.
    #[error("{0}")]
    Config(#[from] Diagnostics),
    /// The HTTP plane cannot serve it.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The PostgreSQL plane cannot serve it.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DrainReport {
    /// Whether everything in flight had finished before the deadline.
    pub complete: bool,
}

impl Gateway {
    /// A gateway to be configured.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Where HTTP is served.
    pub fn http_addresses(&self) -> &[SocketAddr] {
        &self.http
    }

    /// Where HTTP is served with TLS.
    pub fn https_addresses(&self) -> &[SocketAddr] {
        &self.https
    }

    /// Where PostgreSQL is served.
    pub fn postgres_addresses(&self) -> &[SocketAddr] {
        &self.postgres
    }

    /// Where the admin surface is served.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// The catalog that is served now.
    pub fn catalog(&self) -> Arc<Catalog> {
        self.inner.catalog.load_full()
    }

    /// The HTTP plane, when there is one.
    pub fn http_plane(&self) -> Option<&Arc<HttpPlane>> {
        self.inner.http.as_ref()
    }

    /// The PostgreSQL plane, when there is one.
    pub fn postgres_plane(&self) -> Option<&Arc<PostgresPlane>> {
        self.inner.postgres.as_ref()
    }

    /// Reads the configuration again and serves it from the next request and transaction on. Atomic: with any
    /// error the running configuration stays as it is. Listen addresses and connection caps are read only at the start.
    pub async fn reload(&self) -> Result<Reloaded, ReloadError> {
        self.inner.reload(None).await
    }

    /// Serves another configuration, given as text.
    pub async fn reload_from(&self, sources: SourceSet) -> Result<Reloaded, ReloadError> {
        self.inner.reload(Some(sources)).await
    }

    /// More handles for the sockets that are listened on, for a successor; `None` when the gateway drains.
    pub fn sockets(&self) -> std::io::Result<Option<Sockets>> {
        let sockets = self.inner.sockets();
        if self.inner.draining.is_cancelled() { Ok(None) } else { sockets.try_clone().map(Some) }
    }

    /// A successor serves on the same sockets: the admin surface is its, and this gateway drains.
    pub(crate) fn hand_over(&self) {
        self.inner.admin_stopped.cancel();
        if let Some(plane) = &self.inner.http {
            plane.will_be_succeeded();
        }
        if let Some(plane) = &self.inner.postgres {
            plane.will_be_succeeded();
        }
        self.drain();
        // Odoo finds the database at the successor: nothing here has to wait for the last request.
        if let Some(plane) = &self.inner.postgres {
            plane.drain();
        }
    }

    /// Stops accepting. Requests, transactions and what is in flight finish; idle connections are closed.
    ///
    /// With both planes, the PostgreSQL plane goes on until [`wait`](Self::wait) has seen the last HTTP request end:
    /// Odoo needs its database to answer it.
    pub fn drain(&self) {
        self.inner.drain();
    }

    /// Waits until it begins to drain, whoever has it do so: an operator at the console, or the embedding program.
    pub async fn draining(&self) {
        self.inner.draining.cancelled().await;
    }

    /// Waits until somebody calls [`drain`](Self::drain) and everything in flight has finished, or the configured
    /// `drain_timeout` is over and the rest was cut off.
    pub async fn wait(&self) -> DrainReport {
        self.inner.draining.cancelled().await;
        let limit = self.inner.catalog.load().drain_timeout;
        let begun = tokio::time::Instant::now();
        let mut complete = true;
        let http = async {
            match &self.inner.http {
                Some(plane) => plane.drained(limit).await,
                None => true,
            }
        };
        let postgres = async |limit| match &self.inner.postgres {
            Some(plane) => plane.drained(limit).await,
            None => true,
        };
        if self.inner.admin_stopped.is_cancelled() {
            // There is a successor: both at once.
            let (http, postgres) = tokio::join!(http, postgres(limit));
            complete &= http && postgres;
        } else {
            complete &= http.await;
            complete &= postgres(limit.saturating_sub(begun.elapsed()).max(POSTGRES_GRACE)).await;
        }
        self.inner.stopped.cancel();
        self.inner.admin_stopped.cancel();
        self.inner.tasks.close();
        let _ = tokio::time::timeout(ADMIN_GRACE, self.inner.tasks.wait()).await;
        DrainReport { complete }
    }
}

impl Inner {
    pub(crate) fn new(
        origin: Origin,
        secrets: Arc<Remembered>,
        catalog: Arc<Catalog>,
        http: Option<Arc<HttpPlane>>,
        postgres: Option<Arc<PostgresPlane>>,
    ) -> Self {
        Self {
            origin: Mutex::new(origin),
            secrets,
            first_admin_token: catalog.admin_token.clone(),
            catalog: ArcSwap::new(catalog),
            http,
            postgres,
            draining: CancellationToken::new(),
            stopped: CancellationToken::new(),
            admin_stopped: CancellationToken::new(),
            sockets: Mutex::default(),
            tasks: TaskTracker::new(),
            generation: AtomicU64::new(1),
            failed_reloads: AtomicU64::new(0),
            last_errors: Mutex::default(),
            reloading: tokio::sync::Mutex::new(()),
        }
    }

    pub(crate) fn sockets(&self) -> MutexGuard<'_, Sockets> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn drain(&self) {
        self.draining.cancel();
        // Nobody shall wait at a socket that is not served.
        *self.sockets() = Sockets::default();
        match (&self.http, &self.postgres) {
            (Some(http), _) => http.drain(),
            (None, Some(postgres)) => postgres.drain(),
            (None, None) => {}
        }
    }

    pub(crate) async fn reload(&self, sources: Option<SourceSet>) -> Result<Reloaded, ReloadError> {
        let _turn = self.reloading.lock().await;
        let outcome = self.try_reload(sources).await;
        match &outcome {
            Ok(done) => {
                self.last_errors.lock().unwrap_or_else(PoisonError::into_inner).clear();
                tracing::info!(generation = done.generation, tenants = done.tenants, "configuration reloaded");
            }
            Err(error) => {
                self.failed_reloads.fetch_add(1, Ordering::Relaxed);
                let errors = match error {
                    ReloadError::Config(Diagnostics(all)) => all.clone(),
                    other => {
                        vec![Diagnostic::file_level(self.main_path(), other.to_string(), "a usable configuration")]
                    }
                };
                for error in &errors {
                    tracing::error!(%error, "configuration error");
                }
                tracing::error!(errors = errors.len(), "configuration not reloaded: the running one is unchanged");
                *self.last_errors.lock().unwrap_or_else(PoisonError::into_inner) = errors;
            }
        }
        outcome
    }

    async fn try_reload(&self, sources: Option<SourceSet>) -> Result<Reloaded, ReloadError> {
        let origin = match sources {
            Some(sources) => Origin::Given(Box::new(sources)),
            None => self.origin.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        };
        let previous = self.catalog.load_full();
        let catalog = Arc::new(read_catalog(origin.clone(), Arc::clone(&self.secrets), Some(previous)).await?);
        // Everything that can fail comes first; then all parts change.
        if self.http.is_some() && catalog.http.is_none() {
            return Err(HttpError::NotConfigured.into());
        }
        let prepared = match &self.postgres {
            Some(plane) => Some((plane, plane.prepare(Arc::clone(&catalog))?)),
            None => None,
        };
        if let Some(plane) = &self.http {
            plane.reload(&catalog)?;
        }
        if let Some((plane, prepared)) = prepared {
            plane.commit(prepared);
        }
        *self.origin.lock().unwrap_or_else(PoisonError::into_inner) = origin;
        let tenants = catalog.tenants().len();
        self.catalog.store(catalog);
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(Reloaded { generation, tenants })
    }

    pub(crate) fn main_path(&self) -> PathBuf {
        match &*self.origin.lock().unwrap_or_else(PoisonError::into_inner) {
            Origin::File(path) => path.clone(),
            Origin::Given(sources) => sources.main.path.clone(),
        }
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("http", &self.http).field("postgres", &self.postgres).finish_non_exhaustive()
    }
}
