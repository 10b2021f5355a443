//! Between a logged-in client and the server connections it borrows: one task, both sockets.

pub(crate) mod acquire;
mod leave;
mod limits;
mod listening;
mod maintenance;
mod wait;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use cofferdam_fairness::Permit;
use cofferdam_processes::Working;
use cofferdam_tenant::Catalog;
use tokio::time::Instant;

use crate::cache::{Leased, Pinned};
use crate::client::Established;
use crate::listener::Subscription;
use crate::pause::Fence;
use crate::plane::{PostgresPlane, Snapshot};
use crate::process::Holding;
use crate::route::{Route, route};
use crate::session::{ClientStep, INSPECT, ServerStep, Session, Violation, set_name};
use crate::signal::{Ear, Listener};
use crate::stats::Work;
use crate::stream::Stream;
use crate::wire::{Frame, Reply, Severity, Side, frame};
use listening::hearing;

/// Above this, no more is read for a side that does not take what it has got (rule 8).
const HIGH_WATER: usize = 256 << 10;
/// A client that takes nothing for this long while a slot is held for it is gone.
const SLOW_READER: Duration = Duration::from_secs(60);
/// Bytes of a long transfer that are charged at a time.
const CHARGED_EVERY: u64 = 1 << 20;
/// What a client has sent before it said goodbye, or just left, is finished for so long before it is cancelled.
const FINISH_AFTER_GOODBYE: Duration = Duration::from_secs(60);
const FINISH_AFTER_LEAVING: Duration = Duration::from_secs(1);
/// Bytes of a large message that count as a sign of life.
const SIGN_OF_LIFE: usize = 64 << 10;
/// Time for `DISCARD ALL` before a connection is thrown away instead.
const RESET_LIMIT: Duration = Duration::from_secs(5);

/// One client's relay.
pub(crate) struct Relay {
    plane: Arc<PostgresPlane>,
    snapshot: Arc<Snapshot>,
    client: Stream,
    /// From the client, not judged yet.
    inbound: BytesMut,
    /// To the client, not written yet.
    outbound: BytesMut,
    session: Session,
    lease: Option<Box<Leased>>,
    /// Held while the connection is kept between transactions.
    pin: Option<Pinned>,
    permit: Option<Slot>,
    /// Bytes moved that have not been charged yet.
    moved: u64,
    /// What has not been counted yet.
    work: Work,
    /// The client's part in the connection that listens for its database.
    subscription: Option<Box<Subscription>>,
    /// The client's current message is a `LISTEN`, and it has been subscribed.
    is_subscribed: bool,
    established: Established,
    /// What is left of the client's current message, and of the server's.
    passing: Passing,
    server_passing: Passing,
    /// Judging the client's messages stopped because the server did not take more.
    stalled: bool,
    /// It stopped because too many replies are owed; the server has been asked to send those it has.
    overwhelmed: bool,
    /// It stopped because the next message waits for answers: nothing is read behind it, not even that the client has left.
    held: bool,
    /// Until when the client, which holds a slot, has to give a sign of life.
    idle_until: Option<Instant>,
    /// Bytes of the client's current message since its last sign of life.
    silent: usize,
    /// The client has sent Terminate.
    said_goodbye: bool,
    /// The server has said why it ends the connection.
    farewell_seen: bool,
    /// The plan's limits on time, when it has any.
    limits: Option<Box<TimeLimits>>,
    /// Databases that are out of the way of what the client does.
    fences: Vec<Fence>,
    draining: Listener,
    /// Since when the client is to leave as soon as it is quiet.
    drains: Option<Instant>,
    moved_away: Ear,
}

/// A slot of the gate, and that the client's process holds it.
struct Slot {
    /// When the transaction has to be over, by the plan.
    until: Option<Instant>,
    /// The server's process, while its priority is that of the work. Fields drop in order: what it says of the work has to
    /// come before that is over.
    working: Option<Working>,
    permit: Permit,
    _holding: Option<Holding>,
}

/// A message that has been judged and whose bytes still come.
#[derive(Debug, Clone, Copy, Default)]
struct Passing {
    remaining: usize,
    forward: bool,
}

enum Event {
    Client,
    Server,
    Notification,
    Draining,
}

/// Why the relay ends.
pub(crate) enum End {
    /// The client has left, or cannot be written to.
    ClientGone,
    /// The client is told why.
    Fatal { code: &'static str, message: String },
    /// The server connection is lost; the client is told unless the server did.
    ServerGone,
}

impl From<Violation> for End {
    fn from(v: Violation) -> Self {
        Self::Fatal { code: v.code, message: v.message }
    }
}

enum Pump {
    Wait,
    NeedServer { kind: u8 },
    Listen { kind: u8, channel: String },
    Maintain { kind: u8, text: Option<Vec<u8>> },
}

/// How long things may take, by the plan.
#[derive(Debug, Clone, Copy, Default)]
struct TimeLimits {
    statement: Option<Duration>,
    transaction: Option<Duration>,
    idle: Option<Duration>,
    /// The statement that runs under one.
    busy: Option<limits::Busy>,
}

impl TimeLimits {
    fn of(route: &Route) -> Option<Box<Self>> {
        let Route { statement_timeout: statement, transaction_timeout: transaction, idle_timeout: idle, .. } = *route;
        let any = statement.is_some() || transaction.is_some() || idle.is_some();
        any.then(|| Box::new(Self { statement, transaction, idle, busy: None }))
    }
}

impl Relay {
    pub(crate) fn new(
        plane: Arc<PostgresPlane>,
        snapshot: Arc<Snapshot>,
        client: Stream,
        inbound: BytesMut,
        established: Established,
    ) -> Self {
        let draining = plane.draining.listen();
        let mut session = Session::new(Arc::clone(established.route.pool.statements()));
        hearing(&mut session, &snapshot, &established);
        if established.database() == Catalog::MAINTENANCE_DATABASE {
            session.maintains();
        }
        session.is_called(established.requested().application_name.to_owned());
        let limits = TimeLimits::of(&established.route);
        Self {
            session,
            plane,
            snapshot,
            client,
            inbound,
            outbound: BytesMut::new(),
            lease: None,
            pin: None,
            permit: None,
            moved: 0,
            work: Work::default(),
            subscription: None,
            is_subscribed: false,
            established,
            passing: Passing::default(),
            server_passing: Passing::default(),
            stalled: false,
            held: false,
            overwhelmed: false,
            idle_until: None,
            silent: 0,
            said_goodbye: false,
            farewell_seen: false,
            limits,
            fences: Vec::new(),
            draining,
            drains: None,
            moved_away: Ear::default(),
        }
    }

    /// Serves the client until it leaves; then leaves the server connection fit for others, or closes it.
    pub(crate) async fn run(mut self: Box<Self>) {
        let (handle, mut ear) = (Arc::clone(&self.established.registration.handle), Ear::default());
        let outcome = {
            let mut serving = std::pin::pin!(self.serve());
            std::future::poll_fn(|cx| match serving.as_mut().poll(cx) {
                Poll::Ready(outcome) => Poll::Ready(outcome),
                Poll::Pending if ear.poll(&handle.killed, cx).is_ready() => {
                    let message = "terminating connection due to administrator command".to_owned();
                    Poll::Ready(Err(End::Fatal { code: "57P01", message }))
                }
                Poll::Pending => Poll::Pending,
            })
            .await
        };
        let end = match outcome {
            Ok(()) => End::ClientGone,
            Err(end) => end,
        };
        if matches!(end, End::ClientGone) && self.lease.is_some() {
            let limit = if self.said_goodbye { FINISH_AFTER_GOODBYE } else { FINISH_AFTER_LEAVING };
            let _ = Box::pin(tokio::time::timeout(limit, self.finish())).await;
        }
        let server_lost = matches!(end, End::ServerGone);
        let farewell = match end {
            End::ClientGone => None,
            End::Fatal { code, message } => Some((code, message)),
            End::ServerGone if self.farewell_seen => None,
            End::ServerGone => {
                Some(("08006", "cofferdam: the database server closed the connection unexpectedly".to_owned()))
            }
        };
        if let Some((code, message)) = farewell {
            self.outbound.error(Severity::Fatal, code, &message, None);
        }
        if !self.outbound.is_empty() {
            let goodbye = self.client.drain(&mut self.outbound);
            let _ = Box::pin(tokio::time::timeout(Duration::from_secs(1), goodbye)).await;
        }
        if server_lost {
            self.lease = None;
        }
        Box::pin(self.abandon()).await;
    }

    async fn serve(&mut self) -> Result<(), End> {
        loop {
            match self.pump_client()? {
                Some(Pump::NeedServer { kind }) => {
                    self.acquire(kind).await?;
                    continue;
                }
                Some(Pump::Listen { kind, channel }) => {
                    match Box::pin(self.listen(&channel)).await? {
                        Ok(()) => self.is_subscribed = true,
                        Err((code, message)) if self.permit.is_none() && self.session.is_at_rest() => {
                            self.refuse(kind, &code, &message);
                        }
                        // In the middle of a transaction or a batch nothing else can be said that is in order.
                        Err((_, message)) => return Err(End::Fatal { code: "57P01", message }),
                    }
                    continue;
                }
                Some(Pump::Maintain { kind, text }) => {
                    Box::pin(self.maintain(kind, text)).await?;
                    continue;
                }
                Some(Pump::Wait) => {}
                None => {
                    self.said_goodbye = true;
                    return Ok(());
                }
            }
            if let Some(subscription) = &mut self.subscription
                && self.session.is_at_rest()
                && !subscription.is(self.session.listening())
            {
                Box::pin(subscription.keep(self.session.listening())).await;
            }
            let listens = !self.session.listening().is_empty();
            let known = &self.established.registration.handle.listens;
            if known.load(Ordering::Relaxed) != listens {
                // In one order with the reload that looks at it: one of the two sees the other.
                known.store(listens, Ordering::SeqCst);
            }
            if listens && self.lease.is_none() && !self.plane.is_current(&self.snapshot) {
                // Silent as it is, it would go on listening at the old place.
                self.follow_catalog()?;
            }
            if self.is_done() {
                self.release().await?;
            }
            if let Some(since) = self.drains
                && self.permit.is_none()
                && self.session.is_at_rest()
                && since.elapsed() >= self.snapshot.catalog.drain_timeout / 2
            {
                // It is never quiet: now, between two transactions, and not in the middle of one.
                return Err(shutting_down());
            }
            let event = self.wait().await?;
            self.charge_bytes(CHARGED_EVERY);
            match event {
                Event::Client | Event::Notification => {}
                Event::Server => {
                    self.idle_until = None;
                    self.pump_server()?;
                    // Before the client's next message is looked at: it has to queue like everybody's.
                    if self.permit.is_some() && self.session.is_at_rest() && self.passing.remaining == 0 {
                        self.release().await?;
                    }
                }
                Event::Draining if self.plane.has_successor() => self.drains = Some(Instant::now()),
                Event::Draining => return Err(shutting_down()),
            }
        }
    }

    /// Whether the slot can be given back, with nothing on its way to the server.
    fn is_done(&self) -> bool {
        let written = |l: &Leased| l.upstream.outbound.is_empty() && !l.upstream.stream.is_unflushed();
        self.permit.is_some()
            && self.session.is_at_rest()
            && self.passing.remaining == 0
            && self.lease.as_deref().is_some_and(written)
    }

    /// Judges what the client has sent so far. `None` when it said goodbye.
    fn pump_client(&mut self) -> Result<Option<Pump>, End> {
        self.held = false;
        loop {
            let mut upstream = self.lease.as_mut().map(|l| &mut l.upstream);
            if self.passing.remaining > 0 {
                let n = self.passing.remaining.min(self.inbound.len());
                if self.passing.forward {
                    let Some(upstream) = upstream else { return Err(End::ServerGone) };
                    if upstream.outbound.len() >= HIGH_WATER {
                        self.stalled = true;
                        return Ok(Some(Pump::Wait));
                    }
                    upstream.outbound.extend_from_slice(&self.inbound[..n]);
                }
                self.inbound.advance(n);
                self.passing.remaining -= n;
                self.silent += n;
                if self.silent >= SIGN_OF_LIFE {
                    self.alive();
                }
                if self.passing.remaining > 0 {
                    return Ok(Some(Pump::Wait));
                }
                continue;
            }
            if upstream.as_ref().is_some_and(|u| u.outbound.len() >= HIGH_WATER) {
                self.stalled = true;
                return Ok(Some(Pump::Wait));
            }
            if self.session.is_overwhelmed() {
                // What the server keeps in its buffer until Sync has to come first.
                if let (Some(upstream), false) = (upstream, self.overwhelmed) {
                    upstream.outbound.message(b'H', |_| {});
                }
                self.overwhelmed = true;
                return Ok(Some(Pump::Wait));
            }
            self.overwhelmed = false;
            let header =
                frame(Side::Client, &self.inbound).map_err(|e| End::Fatal { code: "08P01", message: e.to_string() })?;
            let Some(header) = header else { return Ok(Some(Pump::Wait)) };
            let needs = Session::client_needs(header);
            if self.inbound.len() < needs {
                self.inbound.reserve(needs - self.inbound.len());
                return Ok(Some(Pump::Wait));
            }
            let seen = self.inbound.len().min(header.total);
            // A pinned connection without a slot does not count: its client has to queue like everybody.
            let mut nowhere = BytesMut::new();
            let (backend, to_server) = match upstream.as_mut().filter(|_| self.permit.is_some()) {
                Some(u) => (Some(&mut u.backend), &mut u.outbound),
                None => (None, &mut nowhere),
            };
            let bytes = &self.inbound[..seen];
            let counted = match header.kind {
                b'Q' | b'E' | b'F' => Some(&mut self.work.queries),
                b'P' => Some(&mut self.work.client_parses),
                b'B' => Some(&mut self.work.binds),
                _ => None,
            };
            if header.kind == b'Q'
                && self.established.database() == Catalog::MAINTENANCE_DATABASE
                && let Some(process) = &self.established.process
                && listens_for_cron(&bytes[Frame::HEADER.min(bytes.len())..])
            {
                process.runs_cron();
            }
            if !self.is_subscribed
                && let Some(channel) = self.session.is_about_to_listen(header, bytes)
            {
                return Ok(Some(Pump::Listen { kind: header.kind, channel }));
            }
            match self.session.on_client(header, bytes, backend, to_server, &mut self.outbound)? {
                ClientStep::Forward { consumed } => {
                    to_server.extend_from_slice(&self.inbound[consumed.min(seen)..seen]);
                    self.passing = Passing { remaining: header.total - seen, forward: true };
                }
                ClientStep::Drop => self.passing = Passing { remaining: header.total - seen, forward: false },
                // It will be offered again.
                ClientStep::NeedServer => return Ok(Some(Pump::NeedServer { kind: header.kind })),
                ClientStep::Judge => {
                    let text = self.session.databases_text(header, bytes);
                    return Ok(Some(Pump::Maintain { kind: header.kind, text }));
                }
                ClientStep::Later => {
                    self.held = true;
                    return Ok(Some(Pump::Wait));
                }
                ClientStep::Terminate => return Ok(None),
            }
            if let Some(counted) = counted {
                *counted += 1;
            }
            self.is_subscribed = false;
            self.inbound.advance(seen);
            self.alive();
        }
    }

    /// The client has given a sign of life.
    fn alive(&mut self) {
        self.idle_until = None;
        self.silent = 0;
    }

    /// Judges what the server has sent so far, and appends what the client shall see to `outbound`.
    fn pump_server(&mut self) -> Result<(), End> {
        let Some(lease) = self.lease.as_mut() else { return Ok(()) };
        let upstream = &mut lease.upstream;
        let mut after = BytesMut::new(); // allocates nothing until something is said
        // `run..at` are judged bytes that go to the client and are not copied yet.
        let (mut run, mut at) = (0, 0);
        let bytes = &upstream.inbound;
        let outcome = loop {
            if self.server_passing.remaining > 0 {
                let n = self.server_passing.remaining.min(bytes.len() - at);
                if !self.server_passing.forward {
                    self.outbound.extend_from_slice(&bytes[run..at]);
                    run = at + n;
                }
                at += n;
                self.server_passing.remaining -= n;
                if self.server_passing.remaining > 0 {
                    break Ok(());
                }
            }
            let rest = &bytes[at..];
            let header = match frame(Side::Server, rest) {
                Ok(Some(header)) => header,
                Ok(None) => break Ok(()),
                Err(_) => break Err(End::ServerGone),
            };
            if rest.len() < Session::server_needs(header) {
                break Ok(());
            }
            let seen = rest.len().min(header.total);
            if header.kind == b'E' && is_fatal(&rest[..seen]) {
                self.farewell_seen = true;
            }
            let step = match self.session.on_server(header, &rest[..seen], &mut upstream.backend, &mut after) {
                Ok(step) => step,
                Err(violation) => break Err(violation.into()),
            };
            if step == ServerStep::Drop {
                self.outbound.extend_from_slice(&bytes[run..at]);
                run = at + seen;
            }
            at += seen;
            self.server_passing = Passing { remaining: header.total - seen, forward: step == ServerStep::Forward };
            if !after.is_empty() {
                self.outbound.extend_from_slice(&bytes[run..at]);
                run = at;
                self.outbound.extend_from_slice(&after);
                after.clear();
            }
        };
        self.outbound.extend_from_slice(&bytes[run..at]);
        upstream.inbound.advance(at);
        if let Ok(Some(header)) = frame(Side::Server, &upstream.inbound) {
            let missing = Session::server_needs(header).saturating_sub(upstream.inbound.len());
            upstream.inbound.reserve(missing);
        }
        outcome
    }

    /// Charges the bytes that were moved, when the plan counts them.
    fn charge_bytes(&mut self, from: u64) {
        if self.moved >= from.max(1) {
            let route = &self.established.route;
            if route.metered {
                route.access.gate.charge_bytes(route.account, self.moved);
            }
            self.moved = 0;
        }
    }

    /// Adds what was done to the counters of the database.
    fn count(&mut self) {
        let handle = &self.established.registration.handle;
        let held = handle.owned_for().as_micros() as u64;
        self.work.transaction_us += held;
        self.work.query_us += held;
        self.work.server_parses += self.session.take_parses();
        handle.note_prepared(self.session.statement_count());
        self.established.stats.add(&self.work);
        self.work = Work::default();
    }

    fn take_over(&mut self, leased: Box<Leased>) {
        self.session.leased(leased.is_of_replica());
        self.server_passing = Passing::default();
        self.farewell_seen = false;
        self.work.assignments += 1;
        self.lease = Some(leased);
        if let Some(upstream) = self.lease.as_mut().map(|l| &mut l.upstream) {
            self.session.restore(&mut upstream.backend, &mut upstream.outbound, &mut self.outbound);
        }
        self.name_connection();
        self.prioritise();
    }

    /// Has the server's process looked at, and run with the priority of the work that begins.
    fn prioritise(&mut self) {
        if let (Some(slot), Some(lease)) = (&mut self.permit, &self.lease)
            && self.established.route.access.cache.cluster().looks_at_processes()
            && let Some(watch) = slot.permit.watch()
        {
            match &lease.process {
                Some(process) => slot.working = Some(process.begins(slot.permit.queue(), watch)),
                None => watch.forget_cores(),
            }
        }
    }

    /// The server's process has done its work; said before another client may have it.
    fn rest(&mut self) {
        if let Some(slot) = &mut self.permit {
            slot.working = None;
        }
    }

    /// Gives the connection the name that the client gave itself at login, in the same write as the first query (rule 12).
    fn name_connection(&mut self) {
        let Some(upstream) = self.lease.as_mut().map(|l| &mut l.upstream) else { return };
        if upstream.backend.application_name != self.session.name() {
            let sql = set_name(self.session.name());
            self.session.inject(&sql, &mut upstream.outbound, &mut self.outbound);
            self.session.name().clone_into(&mut upstream.backend.application_name);
        }
    }

    /// The catalog has changed: the session goes on where its tenant is now.
    fn follow_catalog(&mut self) -> Result<(), End> {
        self.snapshot = self.plane.snapshot();
        if let Some(route) = route(&self.snapshot, self.established.requested()) {
            if route.pool.key() != self.established.route.pool.key() {
                // The password has changed; who logged in with the old one stays, with the new one at the server.
                tracing::debug!(account = %route.name, "login changed");
            }
            let moved = !Arc::ptr_eq(&route.access.cache, &self.established.route.access.cache);
            if moved && !self.session.listening().is_empty() {
                let message =
                    "terminating connection: the database has moved, and notifications may be lost".to_owned();
                return Err(End::Fatal { code: "57P01", message });
            }
            if moved {
                self.subscription = None;
                self.is_subscribed = false;
            }
            self.limits = TimeLimits::of(&route);
            self.established.route = route;
            hearing(&mut self.session, &self.snapshot, &self.established);
            Ok(())
        } else {
            let message = "terminating connection: the database is not served here any more".to_owned();
            Err(End::Fatal { code: "57P01", message })
        }
    }
}

fn shutting_down() -> End {
    End::Fatal { code: "57P01", message: "terminating connection: the gateway is shutting down".to_owned() }
}

/// Whether a query is `LISTEN cron_trigger`, which only Odoo's cron workers say. Every worker may *notify* the channel.
fn listens_for_cron(query: &[u8]) -> bool {
    let text = std::str::from_utf8(query).unwrap_or_default().trim_end_matches('\0');
    let mut words = text.split(|c: char| c.is_whitespace() || c == ';' || c == '"').filter(|w| !w.is_empty());
    words.next().is_some_and(|w| w.eq_ignore_ascii_case("listen"))
        && words.next().is_some_and(|w| w.eq_ignore_ascii_case("cron_trigger"))
}

/// Whether an ErrorResponse ends the connection. Its severity stands in the first fields.
fn is_fatal(message: &[u8]) -> bool {
    let head = &message[Frame::HEADER..message.len().min(64)];
    [&b"FATAL\0"[..], b"PANIC\0"].iter().any(|s| head.windows(s.len()).any(|w| w == *s))
}
