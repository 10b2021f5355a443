//! One client from its first byte to its login; then the relay takes over.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use bytes::{Buf, BufMut, BytesMut};
use cofferdam_fairness::{Rate, Timestamp};
use cofferdam_tenant::TlsMode;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, SemaphorePermit};
use tokio_rustls::TlsAcceptor;

use crate::cache::LeaseError;
use crate::cancel::ClientInfo;
use crate::console::{Console, is_console};
use crate::passage::Passage;
use crate::plane::{PostgresPlane, Snapshot};
use crate::process::Process;
use crate::relay::Relay;
use crate::route::{ClientCount, Requested, Route, route};
use crate::stats::{Stats, Work};
use crate::stream::{Stream, put_away};
use crate::tls::ALPN;
use crate::upstream::UpstreamError;
use crate::wire::{
    CancelKey, Frame, Reply, Severity, Side, Startup, StartupError, StartupParameters, TransactionStatus, frame,
    startup,
};

/// A client asks for each kind of encryption once.
const MAX_ENCRYPTION_REQUESTS: u32 = 2;
/// Clients for which there is no room that are heard at once before they are told so, and for how long.
pub(crate) const TURNED_AWAY: usize = 64;
const HEARD_FOR: Duration = Duration::from_secs(2);
/// A client that has not said a word is waited for so long when the gateway drains.
const QUIET: Duration = Duration::from_secs(1);
/// A password message longer than this is not one.
const MAX_PASSWORD_MESSAGE: usize = 4_096;

/// A login that ends with an ErrorResponse, or without a word.
pub(crate) enum Refusal {
    Fatal { code: &'static str, message: String },
    Upstream(LeaseError),
    Gone,
}

impl From<std::io::Error> for Refusal {
    fn from(_: std::io::Error) -> Self {
        Self::Gone
    }
}

pub(crate) fn fatal(code: &'static str, message: impl Into<String>) -> Refusal {
    Refusal::Fatal { code, message: message.into() }
}

/// Serves one client until it leaves.
pub(crate) async fn serve(plane: Arc<PostgresPlane>, tcp: TcpStream, peer: SocketAddr) {
    // Boxed one by one: an idle client pays for what it is, not for all that it has been.
    let Ok(_connection) = plane.connections.try_acquire() else {
        let message = "the gateway has no connection left (limit `postgres.max_connections`)";
        return Box::pin(turn_away(&plane, tcp, peer, message)).await;
    };
    match Box::pin(arrive(&plane, tcp, peer)).await {
        Some(Visitor::Session(relay)) => relay.run().await,
        Some(Visitor::Console(console)) => Box::pin(console.run()).await,
        Some(Visitor::Replication(passage)) => Box::pin(passage.run()).await,
        None => {}
    }
}

/// Somebody who is logged in.
enum Visitor {
    Session(Box<Relay>),
    Console(Box<Console>),
    Replication(Box<Passage>),
}

/// Logs a client in; `None` when it is gone or was refused.
async fn arrive(plane: &Arc<PostgresPlane>, tcp: TcpStream, peer: SocketAddr) -> Option<Visitor> {
    let _ = tcp.set_nodelay(true);
    keep_alive(&tcp);
    let snapshot = plane.snapshot();
    // A burst of logins waits a little, each address behind its own.
    let patience = snapshot.login_timeout / 2;
    let front = snapshot.catalog.postgres.as_ref();
    let limit = front.map_or(u32::MAX, |front| front.config.max_unauthenticated_per_address);
    let Some(knock) = plane.door.knock(peer.ip(), limit, patience).await else {
        let message = "too many logins at once from this address (limit `postgres.max_unauthenticated_per_address`)";
        say_goodbye(tcp.into(), "53300", message).await;
        return None;
    };
    let Ok(Ok(unauthenticated)) = tokio::time::timeout(patience, plane.unauthenticated.acquire()).await else {
        turn_away(plane, tcp, peer, "too many logins at once (limit `postgres.max_unauthenticated`)").await;
        return None;
    };
    let mut login = LoginTask {
        plane,
        knock: Some(knock),
        peer,
        local: tcp.local_addr().ok(),
        snapshot: &snapshot,
        stream: Some(tcp.into()),
        buffer: BytesMut::new(),
        unauthenticated: Some(unauthenticated),
    };
    let outcome = tokio::time::timeout(snapshot.login_timeout, login.run()).await;
    let (stream, mut buffer) = (login.stream.take(), std::mem::take(&mut login.buffer));
    drop(login);
    let refusal = match outcome {
        Ok(Ok(Arrival::Session(established))) => {
            plane.counters.logins.fetch_add(1, Ordering::Relaxed);
            put_away(&mut buffer);
            let relay = Relay::new(Arc::clone(plane), snapshot, stream?, buffer, *established);
            return Some(Visitor::Session(Box::new(relay)));
        }
        Ok(Ok(Arrival::Console { is_admin, registration })) => {
            let console = Console::new(Arc::clone(plane), stream?, buffer, is_admin, registration);
            return Some(Visitor::Console(Box::new(console)));
        }
        Ok(Ok(Arrival::Replication(passage))) => {
            plane.counters.logins.fetch_add(1, Ordering::Relaxed);
            return Some(Visitor::Replication(passage));
        }
        Ok(Ok(Arrival::Cancel(key))) => {
            // Not within the time for a login: a delivery must be seen to its end.
            plane.counters.cancels.fetch_add(1, Ordering::Relaxed);
            plane.cancels.cancel(&key).await;
            return None;
        }
        Ok(Err(refusal)) => refusal,
        Err(_) => fatal("57P05", "the login took too long (limit `postgres.login_timeout`)"),
    };
    let (code, message) = match refusal {
        Refusal::Fatal { code, message } => (code.to_owned(), message),
        Refusal::Upstream(error) => describe(&error),
        Refusal::Gone => return None,
    };
    plane.counters.login_failures.fetch_add(1, Ordering::Relaxed);
    tracing::info!(%peer, code, "PostgreSQL login refused");
    say_goodbye(stream?, &code, &message).await;
    None
}

/// Ends a while after the gateway has begun to drain.
async fn quiet(draining: Arc<crate::signal::Signal>) {
    draining.given().await;
    tokio::time::sleep(QUIET).await;
}

/// A peer whose machine is gone without a word is noticed after two minutes.
pub(crate) fn keep_alive(tcp: &TcpStream) {
    let probes = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4);
    let _ = socket2::SockRef::from(tcp).set_tcp_keepalive(&probes);
}

/// What a connection turns out to be.
enum Arrival {
    Session(Box<Established>),
    /// A client of the console.
    Console {
        is_admin: bool,
        registration: crate::cancel::Registration,
    },
    /// A client that replicates.
    Replication(Box<Passage>),
    /// It was only there to cancel another's query.
    Cancel(CancelKey),
}

/// What a client wants, before it has proved anything.
enum Heard {
    Cancel(CancelKey),
    Session { parameters: StartupParameters, encrypted: bool },
}

/// What a login has established.
pub(crate) struct Established {
    pub(crate) route: Route,
    pub(crate) registration: crate::cancel::Registration,
    /// The Odoo process that the client belongs to.
    pub(crate) process: Option<Arc<Process>>,
    pub(crate) stats: Arc<Stats>,
    /// Held for its `Drop`.
    pub(crate) _counted: ClientCount,
}

impl Established {
    pub(crate) fn user(&self) -> &str {
        &self.registration.handle.info.user
    }

    pub(crate) fn database(&self) -> &str {
        &self.registration.handle.info.database
    }

    /// What the client has asked for at login. Whoever asks for the same shares it: most clients are alike.
    pub(crate) fn requested(&self) -> Requested<'_> {
        Requested {
            user: self.user(),
            database: self.database(),
            application_name: &self.registration.handle.info.application_name,
            settings: &self.route.pool.key().settings,
        }
    }
}

pub(crate) struct LoginTask<'a> {
    pub(crate) plane: &'a Arc<PostgresPlane>,
    pub(crate) peer: SocketAddr,
    local: Option<SocketAddr>,
    pub(crate) snapshot: &'a Arc<Snapshot>,
    /// Present except while TLS takes it over.
    pub(crate) stream: Option<Stream>,
    buffer: BytesMut,
    /// A place among those who have not proved who they are; given back as soon as they have.
    pub(crate) unauthenticated: Option<SemaphorePermit<'a>>,
    /// The same among those of one address.
    knock: Option<OwnedSemaphorePermit>,
}

impl LoginTask<'_> {
    /// Whatever comes before a client says who it is: encryption, or that it only wants to cancel.
    async fn hear(&mut self) -> Result<Heard, Refusal> {
        let tls = self.snapshot.tls.as_ref().map(|t| t.acceptor.clone());
        let mut encrypted = false;
        if let Some(acceptor) = &tls {
            let mut first = [0];
            let peeked = tokio::select! {
                peeked = self.stream()?.socket().peek(&mut first) => peeked?,
                () = quiet(Arc::clone(&self.plane.draining)) => return Err(Refusal::Gone),
            };
            if peeked == 1 && first[0] == 0x16 {
                self.encrypt(acceptor, true).await?;
                encrypted = true;
            }
        }
        let mut requests = 0;
        loop {
            requests += 1;
            match self.startup().await? {
                Startup::Ssl | Startup::GssEnc if requests > MAX_ENCRYPTION_REQUESTS => {
                    return Err(fatal("08P01", "expected a startup packet, received one more request for encryption"));
                }
                Startup::Ssl | Startup::GssEnc if !self.buffer.is_empty() => {
                    // Whoever sends plaintext behind the request hopes that we take it for encrypted (rule 2).
                    return Err(fatal("08P01", "received unencrypted data after the encryption request"));
                }
                Startup::Ssl if !encrypted && tls.is_some() => {
                    self.send(|b| b.put_u8(b'S')).await?;
                    if let Some(acceptor) = &tls {
                        self.encrypt(acceptor, false).await?;
                    }
                    encrypted = true;
                }
                Startup::Ssl | Startup::GssEnc => self.send(|b| b.put_u8(b'N')).await?,
                Startup::Cancel(key) => return Ok(Heard::Cancel(key)),
                Startup::Session(parameters) => return Ok(Heard::Session { parameters, encrypted }),
            }
        }
    }

    async fn run(&mut self) -> Result<Arrival, Refusal> {
        let (mut parameters, encrypted) = match self.hear().await? {
            Heard::Cancel(key) => return Ok(Arrival::Cancel(key)),
            Heard::Session { parameters, encrypted } => (parameters, encrypted),
        };
        match self.snapshot.tls.as_ref().map_or(TlsMode::Disable, |tls| tls.mode) {
            mode if mode.is_required() && !encrypted => {
                return Err(fatal("28000", "connections without TLS are not allowed"));
            }
            mode if mode.is_verified() && !self.has_certificate() => {
                return Err(fatal("28000", "connection requires a valid client certificate"));
            }
            TlsMode::VerifyFull if self.certificate_name().as_ref() != Some(&parameters.user) => {
                let user = &parameters.user;
                let message = format!("the client certificate is not for user \"{user}\"");
                return Err(fatal("28000", message));
            }
            _ => {}
        }
        if parameters.minor > 0 || !parameters.protocol_options.is_empty() {
            let options = parameters.protocol_options.clone();
            self.send(|b| {
                b.message(b'v', |b| {
                    b.put_u32(196_608); // protocol 3.0
                    b.put_u32(options.len() as u32);
                    for option in &options {
                        crate::wire::put_cstr(b, option);
                    }
                });
            })
            .await?;
        }
        self.authenticate(&parameters).await?;
        // A tenant whose server is slow to connect to must not take the places of others who log in.
        self.unauthenticated = None;
        self.knock = None;
        if is_console(&parameters.database) {
            return self.console(&parameters, encrypted).await;
        }
        if self.plane.pauses.is_disabled(&parameters.database) {
            return Err(fatal("57P03", format!("database \"{}\" is disabled at the moment", parameters.database)));
        }
        let application_name = parameters.settings.remove("application_name").unwrap_or_default();
        let settings = Arc::new(std::mem::take(&mut parameters.settings));
        let requested = Requested {
            user: &parameters.user,
            database: &parameters.database,
            application_name: &application_name,
            settings: &settings,
        };
        let route = route(self.snapshot, requested)
            .ok_or_else(|| fatal("3D000", format!("database \"{}\" does not exist", parameters.database)))?;
        let counted = ClientCount::new(self.plane, &route).ok_or_else(|| {
            fatal("53300", format!("{} has {} connections open, its limit", route.name, route.max_clients))
        })?;
        self.turn(&route).await?;
        let is_off = |kind: &str| matches!(kind, "false" | "off" | "no" | "0" | "");
        if let Some(kind) = parameters.replication.as_deref().filter(|kind| !is_off(kind)) {
            return self.replication(kind, &parameters, &application_name, route, counted, encrypted).await;
        }
        let greeting = if let Some(greeting) = route.pool.greeting() {
            greeting
        } else {
            self.plane.pauses.resumed(&parameters.database).await;
            let leased =
                route.pool.lease_patiently(&application_name, self.patience()).await.map_err(Refusal::Upstream)?;
            let greeting = Arc::clone(&leased.upstream.reported);
            route.pool.give_back(leased);
            greeting
        };
        let registration = self.register(&parameters, &application_name, encrypted)?;
        self.greet(reported(&greeting), &application_name, &registration).await?;
        let stats = self.plane.stats_of(&parameters.database);
        stats.add(&Work { logins: 1, ..Work::default() });
        let process = self.plane.processes.of_client(self.peer.ip(), &application_name);
        Ok(Arrival::Session(Box::new(Established { route, registration, process, stats, _counted: counted })))
    }

    /// Waits for the tenant's turn when it logs in more often than it may.
    async fn turn(&self, route: &Route) -> Result<(), Refusal> {
        let Some(per_second) = route.login_rate else { return Ok(()) };
        let (rate, now) =
            (Rate::per_second(per_second, per_second), Timestamp::from_nanos(self.plane.age().as_nanos() as u64));
        let patience = self.snapshot.login_timeout / 2;
        let Some(wait) = self.plane.door.admit(route.account, rate, now, patience) else {
            let message = format!(
                "{} logs in more than {per_second} times a second, its limit, and would have to wait longer than {patience:?}",
                route.name
            );
            return Err(fatal("53300", message));
        };
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// How long a server is waited for: whoever waits in vain is told why, before the login as a whole takes too long.
    fn patience(&self) -> Duration {
        self.snapshot.login_timeout * 3 / 4
    }

    /// A connection for replication: of the client's own, and nothing of it is looked at.
    async fn replication(
        &mut self,
        kind: &str,
        parameters: &StartupParameters,
        application_name: &str,
        route: Route,
        counted: ClientCount,
        encrypted: bool,
    ) -> Result<Arrival, Refusal> {
        let catalog = &self.snapshot.catalog;
        let tenant = catalog.by_database(&parameters.database);
        let may = tenant.is_some_and(|t| t.replication.contains(&parameters.user));
        if !may {
            let message = format!(
                "{}: \"{}\" may not open replication connections (`replication` of the tenant)",
                route.name, parameters.user
            );
            return Err(fatal("42501", message));
        }
        // Physical replication knows no databases: it is not a tenant's, and the database named here means nothing.
        if kind != "database" {
            return Err(fatal("0A000", "only logical replication (`replication=database`) goes through the gateway"));
        }
        let cache = &route.access.cache;
        let pinned = cache.pin(route.account).ok_or_else(|| {
            fatal(
                "53400",
                format!("{}: {} sessions keep a server connection, the limit", route.name, cache.pin_limit()),
            )
        })?;
        let mut settings = (*route.pool.key().settings).clone();
        settings.insert("replication".to_owned(), kind.to_owned());
        let pool = route.pool.with_settings(settings);
        let leased = pool.lease_patiently(application_name, self.patience()).await.map_err(Refusal::Upstream)?;
        let registration = self.register(parameters, application_name, encrypted)?;
        self.greet(reported(&leased.upstream.reported), application_name, &registration).await?;
        Ok(Arrival::Replication(Box::new(Passage {
            plane: Arc::clone(self.plane),
            client: self.stream.take().ok_or(Refusal::Gone)?,
            inbound: std::mem::take(&mut self.buffer),
            leased,
            registration,
            _pinned: pinned,
            _counted: counted,
        })))
    }

    fn register(
        &self,
        parameters: &StartupParameters,
        application_name: &str,
        encrypted: bool,
    ) -> Result<crate::cancel::Registration, Refusal> {
        let info = ClientInfo {
            user: parameters.user.as_str().into(),
            database: parameters.database.as_str().into(),
            application_name: application_name.into(),
            peer: self.peer,
            local: self.local,
            connected: SystemTime::now(),
            encrypted,
        };
        self.plane.cancels.register(info).map_err(|_| fatal("58000", "no randomness for a cancel key"))
    }

    /// AuthenticationOk and what follows it.
    async fn greet(
        &mut self,
        reported: impl Iterator<Item = (&str, &str)>,
        application_name: &str,
        registration: &crate::cancel::Registration,
    ) -> Result<(), Refusal> {
        let (pid, secret) = (registration.handle.pid, registration.handle.secret);
        self.send(|b| {
            b.authentication(0, &[]);
            reported.for_each(|(name, value)| b.parameter(name, value));
            b.parameter("application_name", application_name);
            b.message(b'K', |b| {
                b.put_u32(pid);
                b.put_slice(&secret);
            });
            b.ready(TransactionStatus::Idle);
        })
        .await
    }

    /// Lets somebody in to the console, who has proved to be one of its users.
    async fn console(&mut self, parameters: &StartupParameters, encrypted: bool) -> Result<Arrival, Refusal> {
        let front = self.snapshot.catalog.postgres.as_ref();
        let user = front.and_then(|f| f.console.iter().find(|u| u.login.role == parameters.user));
        let Some(is_admin) = user.map(|u| u.is_admin) else { return Err(Refusal::Gone) };
        let application_name = parameters.settings.get("application_name").cloned().unwrap_or_default();
        let registration = self.register(parameters, &application_name, encrypted)?;
        let version = concat!(env!("CARGO_PKG_VERSION"), "/cofferdam");
        let reported = [
            ("server_version", version),
            ("client_encoding", "UTF8"),
            ("server_encoding", "UTF8"),
            ("DateStyle", "ISO"),
            ("TimeZone", "GMT"),
            ("standard_conforming_strings", "on"),
            ("is_superuser", "off"),
            ("integer_datetimes", "on"),
        ];
        self.greet(reported.into_iter(), &application_name, &registration).await?;
        Ok(Arrival::Console { is_admin, registration })
    }

    async fn startup(&mut self) -> Result<Startup, Refusal> {
        loop {
            match startup(&self.buffer) {
                Ok(Some((packet, length))) => {
                    self.buffer.advance(length);
                    return Ok(packet);
                }
                // Somebody who has connected just now may be about to speak, and whoever is silent is not waited for.
                Ok(None) => {
                    let quiet = quiet(Arc::clone(&self.plane.draining));
                    tokio::select! {
                        filled = self.fill() => filled?,
                        () = quiet => return Err(Refusal::Gone),
                    }
                }
                // Whoever speaks something else is told nothing, as by PostgreSQL: a driver that gives up before it has begun sends
                // its farewell first, and would take the answer for an error of its connection.
                Err(StartupError::Length | StartupError::CancelKey) => {
                    tracing::debug!(peer = %self.peer, "a first packet of no length that there is");
                    return Err(Refusal::Gone);
                }
                Err(error @ StartupError::NoUser) => return Err(fatal("28000", error.to_string())),
                Err(error) => return Err(fatal("08P01", error.to_string())),
            }
        }
    }

    async fn encrypt(&mut self, acceptor: &TlsAcceptor, direct: bool) -> Result<(), Refusal> {
        let Some(Stream::Plain(tcp)) = self.stream.take() else { return Err(Refusal::Gone) };
        let tls = acceptor.accept(tcp).await?;
        if direct && tls.get_ref().1.alpn_protocol() != Some(ALPN) {
            return Err(Refusal::Gone);
        }
        self.stream = Some(Stream::Tls(Box::new(tls.into()), false));
        Ok(())
    }

    pub(crate) async fn password(&mut self) -> Result<BytesMut, Refusal> {
        loop {
            match frame(Side::Client, &self.buffer) {
                Ok(Some(f)) if f.kind != b'p' || f.total > MAX_PASSWORD_MESSAGE => {
                    return Err(fatal("08P01", "expected a password response"));
                }
                Ok(Some(f)) if self.buffer.len() >= f.total => {
                    let mut whole = self.buffer.split_to(f.total);
                    whole.advance(Frame::HEADER);
                    return Ok(whole);
                }
                Ok(_) => self.fill().await?,
                Err(error) => return Err(fatal("08P01", error.to_string())),
            }
        }
    }

    async fn fill(&mut self) -> Result<(), Refusal> {
        let stream = self.stream.as_mut().ok_or(Refusal::Gone)?;
        if stream.fill(&mut self.buffer).await? == 0 { Err(Refusal::Gone) } else { Ok(()) }
    }

    pub(crate) async fn send(&mut self, write: impl FnOnce(&mut BytesMut)) -> Result<(), Refusal> {
        let mut out = BytesMut::new();
        write(&mut out);
        self.stream.as_mut().ok_or(Refusal::Gone)?.drain(&mut out).await?;
        Ok(())
    }

    fn stream(&self) -> Result<&Stream, Refusal> {
        self.stream.as_ref().ok_or(Refusal::Gone)
    }
}

/// The reported settings as a client is told them; the name is its own.
fn reported(greeting: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    greeting.iter().filter(|(name, _)| *name != "application_name").map(|(name, value)| (name.as_str(), value.as_str()))
}

/// What a client may see of a failure towards the server: what the server said about the client's own database, but
/// no addresses of ours.
pub(crate) fn describe(error: &LeaseError) -> (String, String) {
    match error {
        LeaseError::Upstream(UpstreamError::Refused { code, message }) => (code.clone(), message.clone()),
        LeaseError::Upstream(UpstreamError::Io(cause)) => {
            tracing::warn!(error = %cause, "cannot reach a database server");
            ("08006".into(), "cofferdam: the database server cannot be reached; try again".into())
        }
        LeaseError::Upstream(other) => ("08006".into(), format!("cofferdam: {other}")),
        LeaseError::Exhausted { .. } | LeaseError::Crowded(_) => ("XX000".into(), format!("cofferdam: {error}")),
    }
}

/// Tells a client that there is no room for it. What is said before its request for encryption is answered is shown to
/// nobody by libpq, so a few are heard first, for a moment; and whoever only wants to cancel does not need a place.
async fn turn_away(plane: &Arc<PostgresPlane>, tcp: TcpStream, peer: SocketAddr, message: &str) {
    let Ok(_turn) = plane.turned_away.try_acquire() else {
        return say_goodbye(tcp.into(), "53300", message).await;
    };
    let snapshot = plane.snapshot();
    let mut login = LoginTask {
        plane,
        knock: None,
        peer,
        local: tcp.local_addr().ok(),
        snapshot: &snapshot,
        stream: Some(tcp.into()),
        buffer: BytesMut::new(),
        unauthenticated: None,
    };
    let heard = tokio::time::timeout(HEARD_FOR, login.hear()).await;
    let stream = login.stream.take();
    match (heard, stream) {
        (Ok(Ok(Heard::Cancel(key))), _) => {
            plane.counters.cancels.fetch_add(1, Ordering::Relaxed);
            plane.cancels.cancel(&key).await;
        }
        (_, None) => {}
        (_, Some(stream)) => say_goodbye(stream, "53300", message).await,
    }
}

async fn say_goodbye(mut stream: Stream, code: &str, message: &str) {
    let mut out = BytesMut::new();
    out.error(Severity::Fatal, code, message, None);
    let _ = tokio::time::timeout(Duration::from_secs(1), stream.drain(&mut out)).await;
}
