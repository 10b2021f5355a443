//! From options to a running gateway.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use cofferdam_admin::HealthView;
use cofferdam_fairness::{Clock, MonotonicClock};
use cofferdam_http::{HttpError, HttpPlane};
use cofferdam_postgres::{PostgresError, PostgresPlane};
use cofferdam_tenant::{Catalog, Diagnostics, NoSecrets, Secrets, SourceSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::console::Console;
use crate::files::{Remembered, SystemSecrets, load_sources};
use crate::gateway::{Gateway, Inner, Origin};
use crate::handover::Sockets;
use crate::listeners::Listening;
use crate::{coupling, quotas, view, watch};

/// Why a gateway could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration has errors; all of them.
    #[error("{0}")]
    Config(#[from] Diagnostics),
    /// Neither a file nor sources were given.
    #[error("no configuration was given: call `config_file` or `sources`")]
    NoConfig,
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// Which.
        address: String,
        /// Why.
        error: io::Error,
    },
    /// Of the sockets given to [`Builder::inherit`] none listens at a configured address: they belong to something else.
    #[error(
        "none of the {0} sockets taken over listens at an address of this configuration: they belong to something else"
    )]
    Inherited(usize),
    /// The HTTP plane cannot be set up.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The PostgreSQL plane cannot be set up.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    /// A runtime of its own could not be started.
    #[error("cannot start a runtime: {0}")]
    Runtime(io::Error),
}

/// Where the planes run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Runtimes {
    /// On the runtime that calls [`Builder::start`].
    #[default]
    Callers,
    /// On this many threads of the gateway's own, each with a single-threaded runtime and sockets of its own: a
    /// connection is served by one core from beginning to end. What the binary does.
    PerCore(usize),
}

/// See [`keep_time`].
const NEAR: std::time::Duration = std::time::Duration::from_millis(25);

/// Options of a gateway.
#[derive(Default)]
#[must_use = "a builder does nothing until `start`"]
pub struct Builder {
    origin: Option<Origin>,
    secrets: Option<Arc<dyn Secrets + Send + Sync>>,
    http_listeners: Vec<TcpListener>,
    https_listeners: Vec<TcpListener>,
    postgres_listeners: Vec<TcpListener>,
    admin_listener: Option<TcpListener>,
    health: Option<Arc<dyn HealthView>>,
    inherited: Sockets,
    runtimes: Runtimes,
    real_time: bool,
    watch: bool,
}

impl Builder {
    /// Reads `cofferdam.yaml` and its tenants from files; [`Gateway::reload`] reads them again.
    pub fn config_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.origin = Some(Origin::File(path.into()));
        self
    }

    /// Takes the configuration as text; [`Gateway::reload_from`] replaces it.
    pub fn sources(mut self, sources: SourceSet) -> Self {
        self.origin = Some(Origin::Given(Box::new(sources)));
        self
    }

    /// How secrets that the configuration points at are read. Default: files and environment variables for
    /// [`config_file`](Self::config_file), none for [`sources`](Self::sources).
    pub fn secrets(mut self, secrets: Arc<dyn Secrets + Send + Sync>) -> Self {
        self.secrets = Some(secrets);
        self
    }

    /// Serves HTTP on a socket of the caller's instead of the configured addresses.
    pub fn http_listener(mut self, listener: TcpListener) -> Self {
        self.http_listeners.push(listener);
        self
    }

    /// Serves HTTP with TLS on a socket of the caller's instead of the configured addresses. Needs `http.tls`.
    pub fn https_listener(mut self, listener: TcpListener) -> Self {
        self.https_listeners.push(listener);
        self
    }

    /// Uses sockets that are open already, a predecessor's or a service manager's, for the configured addresses where
    /// they listen. The others are bound as usual; sockets for which there is no address any more are closed.
    pub fn inherit(mut self, sockets: Sockets) -> Self {
        self.inherited = sockets;
        self
    }

    /// Serves PostgreSQL on a socket of the caller's instead of the configured addresses.
    pub fn postgres_listener(mut self, listener: TcpListener) -> Self {
        self.postgres_listeners.push(listener);
        self
    }

    /// Serves the admin surface on a socket of the caller's instead of the configured address.
    pub fn admin_listener(mut self, listener: TcpListener) -> Self {
        self.admin_listener = Some(listener);
        self
    }

    /// Shows health on the admin surface: a page, `application/health+json`, metrics.
    pub fn health(mut self, health: Arc<dyn HealthView>) -> Self {
        self.health = Some(health);
        self
    }

    /// Where the planes run. Default: on the caller's runtime.
    pub fn runtimes(mut self, runtimes: Runtimes) -> Self {
        self.runtimes = runtimes;
        self
    }

    /// Lets the gateway's own threads ([`Runtimes::PerCore`]) take a core from everything else on the machine as soon as they have something to
    /// do, which needs CAP_SYS_NICE; without it a warning is logged and they wait like all others. Default: no.
    pub fn real_time(mut self, real_time: bool) -> Self {
        self.real_time = real_time;
        self
    }

    /// Reloads by itself when a configuration file changes. Default: no.
    pub fn watch(mut self, watch: bool) -> Self {
        self.watch = watch;
        self
    }

    /// Starts the gateway; it serves when this returns.
    ///
    /// Must be called inside a tokio runtime with time and I/O enabled. Not cancel-safe: a start that is dropped
    /// half-way may leave listeners open until the runtime ends.
    pub async fn start(self) -> Result<Gateway, StartError> {
        let origin = self.origin.ok_or(StartError::NoConfig)?;
        let secrets: Arc<dyn Secrets + Send + Sync> = match (self.secrets, &origin) {
            (Some(secrets), _) => secrets,
            (None, Origin::File(path)) => Arc::new(SystemSecrets::beside(path)),
            (None, Origin::Given(_)) => Arc::new(NoSecrets),
        };
        let secrets = Arc::new(Remembered::new(secrets));
        let catalog = Arc::new(read_catalog(origin.clone(), Arc::clone(&secrets), None).await?);
        let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::since(Instant::now()));
        let http = catalog.http.is_some().then(|| HttpPlane::new(&catalog, Arc::clone(&clock))).transpose()?;
        let postgres =
            catalog.postgres.is_some().then(|| PostgresPlane::new(&catalog, Arc::clone(&clock))).transpose()?;

        let count = match self.runtimes {
            Runtimes::Callers => 1,
            Runtimes::PerCore(n) => n.max(1),
        };
        let http_addresses = catalog.http.as_ref().map(|h| h.config.listen.clone()).unwrap_or_default();
        let mut inherited = self.inherited;
        let given = inherited.count();
        let http_listening = listen(self.http_listeners, &mut inherited.http, &http_addresses, http.is_some(), count)?;
        let tls = catalog.http.as_ref().and_then(|h| h.config.tls.as_ref());
        let https_addresses = tls.map(|tls| tls.listen.clone()).unwrap_or_default();
        let https_listening =
            listen(self.https_listeners, &mut inherited.http, &https_addresses, tls.is_some(), count)?;
        let postgres_addresses = catalog.postgres.as_ref().map(|c| c.config.listen.clone()).unwrap_or_default();
        let postgres_listening =
            listen(self.postgres_listeners, &mut inherited.postgres, &postgres_addresses, postgres.is_some(), count)?;
        let admin = if let Some(listener) = self.admin_listener {
            Some(Listening::given(listener, 1).map_err(|e| cannot_listen("the admin listener", e))?)
        } else {
            let inherit = |a| Listening::inherit(&mut inherited.admin, a, 1).map_err(|e| cannot_listen(a, e));
            catalog.admin.map(inherit).transpose()?
        };

        if given > 0 && inherited.count() == given {
            return Err(StartError::Inherited(given));
        }
        if let Some(address) = admin.as_ref().map(|l| l.address)
            && !address.ip().is_loopback()
            && catalog.admin_token.is_none()
        {
            let error =
                io::Error::new(io::ErrorKind::PermissionDenied, "an admin listener beyond loopback needs a token");
            return Err(cannot_listen(address, error));
        }
        let inner = Arc::new(Inner::new(origin, secrets, catalog, http, postgres));
        let addresses = |listening: &[Listening]| listening.iter().map(|l| l.address).collect::<Vec<_>>();
        let gateway = Gateway {
            http: addresses(&http_listening),
            https: addresses(&https_listening),
            postgres: addresses(&postgres_listening),
            admin: admin.as_ref().map(|l| l.address),
            inner: Arc::clone(&inner),
        };
        let served = Served { http: http_listening, https: https_listening, postgres: postgres_listening };
        match self.runtimes {
            Runtimes::Callers => {
                if self.real_time {
                    tracing::warn!("the gateway does not run in real time: it has no threads of its own");
                }
                serve(&inner, &inner.tasks, served.share(0, 1)?).map_err(StartError::Runtime)?;
            }
            Runtimes::PerCore(_) => {
                if self.real_time && std::thread::available_parallelism().is_ok_and(|cores| count >= cores.get()) {
                    tracing::warn!(
                        threads = count,
                        "as many threads run in real time as there are cores: whoever keeps them busy leaves next to nothing to anybody else"
                    );
                }
                serve_on_threads(&inner, count, &served, self.real_time)?;
            }
        }
        *inner.sockets() = served.into_sockets();
        if let Some(admin) = admin {
            let address = admin.address;
            let sockets = admin.of_runtime(0, 1).map_err(StartError::Runtime)?;
            inner.sockets().admin = admin.into_sockets();
            for socket in sockets {
                let listener = tokio::net::TcpListener::from_std(socket).map_err(|e| cannot_listen(address, e))?;
                let view = Arc::new(view::View(Arc::clone(&inner), self.health.clone()));
                let stop = inner.admin_stopped.clone();
                inner.tasks.spawn(async move {
                    if let Err(error) = cofferdam_admin::serve(listener, view, stop).await {
                        tracing::error!(%error, "the admin listener has failed");
                    }
                });
            }
        }
        if let Some(plane) = &inner.http {
            inner.tasks.spawn(Arc::clone(plane).housekeeping());
        }
        if let Some(plane) = &inner.postgres {
            plane.set_console_host(Arc::new(Console(Arc::downgrade(&inner))));
            inner.tasks.spawn(Arc::clone(plane).housekeeping());
        }
        // Not among the tasks that are waited for: they end with the gateway.
        tokio::spawn(quotas::run(Arc::downgrade(&inner)));
        tokio::spawn(coupling::run(Arc::downgrade(&inner), clock));
        if self.watch {
            watch::start(&inner);
        }
        Ok(gateway)
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder").field("runtimes", &self.runtimes).finish_non_exhaustive()
    }
}

/// Reads and checks a configuration, away from the runtime's threads.
pub(crate) async fn read_catalog(
    origin: Origin,
    secrets: Arc<Remembered>,
    previous: Option<Arc<Catalog>>,
) -> Result<Catalog, Diagnostics> {
    let work = move || {
        let sources = match origin {
            Origin::File(path) => load_sources(&path)?,
            Origin::Given(sources) => *sources,
        };
        Catalog::build(&sources, &*secrets, previous.as_deref())
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn listen(
    given: Vec<TcpListener>,
    inherited: &mut Vec<TcpListener>,
    configured: &[SocketAddr],
    wanted: bool,
    runtimes: usize,
) -> Result<Vec<Listening>, StartError> {
    if !wanted {
        return Ok(Vec::new());
    }
    if given.is_empty() {
        let mut inherit = |a: &SocketAddr| Listening::inherit(inherited, *a, runtimes).map_err(|e| cannot_listen(a, e));
        return configured.iter().map(&mut inherit).collect();
    }
    given.into_iter().map(|l| Listening::given(l, runtimes).map_err(|e| cannot_listen("a given socket", e))).collect()
}

fn cannot_listen(address: impl ToString, error: io::Error) -> StartError {
    StartError::Listen { address: address.to_string(), error }
}

/// What one of several runtimes serves.
fn share(listening: &[Listening], number: usize, runtimes: usize) -> Result<Vec<TcpListener>, StartError> {
    let mut all = Vec::new();
    for listening in listening {
        all.extend(listening.of_runtime(number, runtimes).map_err(StartError::Runtime)?);
    }
    Ok(all)
}

/// Sockets by what is served on them.
struct Served<T> {
    http: Vec<T>,
    https: Vec<T>,
    postgres: Vec<T>,
}

impl Served<Listening> {
    /// What one of several runtimes serves.
    fn share(&self, number: usize, runtimes: usize) -> Result<Served<TcpListener>, StartError> {
        let share = |listening| share(listening, number, runtimes);
        Ok(Served { http: share(&self.http)?, https: share(&self.https)?, postgres: share(&self.postgres)? })
    }

    fn into_sockets(self) -> Sockets {
        let all = |listening: Vec<Listening>| listening.into_iter().flat_map(Listening::into_sockets);
        // A successor looks for them by address, and for those without a port of their own in this order.
        Sockets {
            http: all(self.http).chain(all(self.https)).collect(),
            postgres: all(self.postgres).collect(),
            admin: Vec::new(),
        }
    }
}

fn serve(inner: &Inner, tasks: &TaskTracker, served: Served<TcpListener>) -> io::Result<()> {
    let Served { http, https, postgres } = served;
    if let Some(plane) = &inner.http {
        for socket in http {
            tasks.spawn(logged("HTTP", Arc::clone(plane).serve(tokio::net::TcpListener::from_std(socket)?)));
        }
        for socket in https {
            tasks.spawn(logged("HTTPS", Arc::clone(plane).serve_tls(tokio::net::TcpListener::from_std(socket)?)));
        }
    }
    if let Some(plane) = &inner.postgres {
        for socket in postgres {
            tasks.spawn(logged("PostgreSQL", Arc::clone(plane).serve(tokio::net::TcpListener::from_std(socket)?)));
        }
    }
    Ok(())
}

async fn logged(plane: &'static str, serving: impl Future<Output = io::Result<()>>) {
    if let Err(error) = serving.await {
        tracing::error!(plane, %error, "a listener has failed");
    }
}

/// A timer that ends before the one that the runtime sleeps for costs a system call to wake it. Every request sets a few, and
/// hardly any is ever due: with one that is always near, none of them is the first.
async fn keep_time() {
    let mut near = tokio::time::interval(NEAR);
    near.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        near.tick().await;
    }
}

/// One thread and one runtime per core; each ends when the gateway has stopped.
fn serve_on_threads(
    inner: &Arc<Inner>,
    count: usize,
    listening: &Served<Listening>,
    real_time: bool,
) -> Result<(), StartError> {
    for n in 0..count {
        let served = listening.share(n, count)?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(StartError::Runtime)?;
        let (worker, stopped): (Arc<Inner>, CancellationToken) = (Arc::clone(inner), inner.stopped.clone());
        let (report, started) = std::sync::mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name(format!("cofferdam-{n}"))
            .spawn(move || {
                if real_time
                    && let Err(error) = cofferdam_sched::go_before_others()
                    && n == 0
                {
                    tracing::warn!(%error, "the gateway does not run in real time: it needs CAP_SYS_NICE or a limit on real-time priorities");
                }
                runtime.block_on(async move {
                    let tasks = TaskTracker::new();
                    tasks.spawn(keep_time());
                    let _ = report.send(serve(&worker, &tasks, served));
                    drop(worker);
                    stopped.cancelled().await;
                });
            })
            .map_err(StartError::Runtime)?;
        started.recv().map_err(io::Error::other).and_then(|r| r).map_err(StartError::Runtime)?;
    }
    Ok(())
}
