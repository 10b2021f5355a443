//! One request: judge it, read its body, wait for a slot, ask a server, pass the answer on.

use std::os::fd::AsRawFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cofferdam_fairness::{Class, Permit};
use cofferdam_tenant::{DatabaseName, Endpoint};
use http::{Method, header};
use pingora_core::protocols::http::v1::client::HttpSession as ServerSession;
use tokio::net::TcpStream;

use crate::backlog::Backlog;
use crate::boundary::{self, Carrier};
use crate::client::{Client, Unwritten};
use crate::connection::Connection;
use crate::plane::{HttpPlane, InFlight, Snapshot};
use crate::reply::Refusal;
use crate::request::{self, Asked, Request};
use crate::socket::Socket;
use crate::spool::Spool;
use crate::websocket;

/// Bytes a second that a request body must come with, beside the time allowed without any.
const MIN_BODY_RATE: u64 = 1 << 10;

/// What becomes of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The answer is complete; the connection may serve another request if both sides want.
    Done,
    /// The connection is over.
    Close,
}

/// Why an exchange ends early.
pub(crate) enum Failure {
    /// The client is told.
    Refused(Refusal),
    /// There is nobody left to tell, or the answer is already on its way and cannot be taken back.
    Broken,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Unwritten> for Failure {
    fn from(_: Unwritten) -> Self {
        Self::Broken
    }
}

impl From<Box<pingora_error::Error>> for Failure {
    fn from(_: Box<pingora_error::Error>) -> Self {
        Self::Broken
    }
}

/// Serves one request.
pub(crate) async fn serve(
    plane: &Arc<HttpPlane>,
    snapshot: &Snapshot,
    client: &mut Client,
    connection: &Connection,
    id: String,
) -> Outcome {
    let begun = Instant::now();
    plane.counters.requests.fetch_add(1, Ordering::Relaxed);
    let outcome = match request::judge(plane, snapshot, client, connection, &id) {
        Err(refusal) => refuse(client, &refusal, &id).await,
        Ok((request, Asked::Websocket)) => end(websocket::serve(&request, client).await, client, &id).await,
        Ok((request, Asked::Worker(class, carrier))) => {
            end(ask_worker(&request, class, carrier, client).await, client, &id).await
        }
    };
    if tracing::enabled!(tracing::Level::DEBUG) {
        let head = client.head();
        tracing::debug!(
            target: "cofferdam::access",
            request_id = %id,
            method = %head.method,
            path = %String::from_utf8_lossy(head.raw_path()),
            status = client.answered().unwrap_or(0),
            bytes = client.bytes_sent(),
            seconds = begun.elapsed().as_secs_f64(),
            "request",
        );
    }
    outcome
}

async fn end(result: Result<Outcome, Failure>, client: &mut Client, id: &str) -> Outcome {
    match result {
        Ok(outcome) => outcome,
        Err(Failure::Refused(refusal)) => refuse(client, &refusal, id).await,
        Err(Failure::Broken) => Outcome::Close,
    }
}

async fn refuse(client: &mut Client, refusal: &Refusal, id: &str) -> Outcome {
    if refusal.send(client, id).await && !refusal.close { Outcome::Done } else { Outcome::Close }
}

async fn ask_worker(
    request: &Request<'_>,
    class: Class,
    carrier: Option<Carrier>,
    client: &mut Client,
) -> Result<Outcome, Failure> {
    let mut body = read_body(request, client).await?;
    if let (Some(carrier), Some(body)) = (carrier, &mut body) {
        look_into(request, carrier, body, client).await?;
    }
    // The slot of a report is held while its renderer calls back: a tenant with no slot left would wait for itself.
    let permit = if request.from_workers { None } else { Some(slot(request, class, client).await?) };
    let (server, occupied) = match send(request, client, &mut body, permit).await {
        Ok(sent) => sent,
        Err(failure) => {
            request.plane.counters.failed.fetch_add(1, Ordering::Relaxed);
            return Err(failure);
        }
    };
    answer(request, client, server, occupied).await
}

/// Reads the whole body before a worker is asked for, so that a slow sender costs nobody a worker.
async fn read_body(request: &Request<'_>, client: &mut Client) -> Result<Option<Spool>, Failure> {
    if client.is_body_empty() && client.header(header::CONTENT_LENGTH).is_none() {
        return Ok(None);
    }
    let limit = request.tenant.plan.max_body;
    let too_large = || {
        let detail = format!("the request body is larger than this site's limit of {limit} bytes");
        Failure::from(Refusal::new(413, "Content too large", detail).closing())
    };
    let announced =
        client.header(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limit) {
        return Err(too_large());
    }
    if client.header(header::EXPECT).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        client.write_continue().await?;
    }
    let snapshot = request.snapshot;
    let begun = Instant::now();
    let mut spool = Spool::new(snapshot.spool_threshold, snapshot.spool_directory.clone());
    let mut moved = Moved::new(request);
    loop {
        let chunk = client.read_body().await.map_err(|error| match error.etype() {
            _ if client.malformed().is_some() => {
                let detail = client.malformed().map_or("", |malformed| malformed.0);
                Refusal::new(400, "Bad request", detail).closing().into()
            }
            pingora_error::ErrorType::ReadTimedout => {
                Failure::from(Refusal::new(408, "Request timeout", "the request body did not arrive in time").closing())
            }
            pingora_error::ErrorType::ConnectionClosed | pingora_error::ErrorType::ReadError => Failure::Broken,
            _ => Refusal::new(400, "Bad request", "the request body is malformed").closing().into(),
        })?;
        let Some(chunk) = chunk else { break };
        if begun.elapsed() > snapshot.timeouts.body + Duration::from_secs(spool.len() / MIN_BODY_RATE) {
            let detail = format!("the request body came slower than {MIN_BODY_RATE} bytes a second");
            return Err(Refusal::new(408, "Request timeout", detail).closing().into());
        }
        moved.add(chunk.len() as u64);
        if spool.len() + chunk.len() as u64 > limit {
            return Err(too_large());
        }
        spool.push(&chunk).await.map_err(|error| spool_failed(&error))?;
    }
    spool.rewind().await.map_err(|error| spool_failed(&error))?;
    Ok(Some(spool))
}

fn spool_failed(error: &std::io::Error) -> Failure {
    tracing::error!(%error, "a request body could not be spooled");
    Refusal::new(500, "Internal error", "the request body could not be stored while it waited").closing().into()
}

/// Lets a body through that names no other database than the tenant's.
async fn look_into(request: &Request<'_>, carrier: Carrier, body: &mut Spool, client: &Client) -> Result<(), Failure> {
    let content_type = client.header(header::CONTENT_TYPE).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    let database = request.tenant.database.clone();
    let path = request.path.clone();
    let _reader = if body.is_large() { request.plane.readers.acquire().await.ok() } else { None };
    let verdict = body.inspect(move |body| {
        let database = database.as_ref().map(DatabaseName::as_str);
        boundary::check_body(carrier, &path, content_type.as_deref(), body, database)
    });
    verdict.await.map_err(|error| spool_failed(&error))?.map_err(|denied| request.denied(denied).into())
}

/// Waits for a worker slot, and notices when the client leaves meanwhile.
async fn slot(request: &Request<'_>, class: Class, client: &mut Client) -> Result<Permit, Failure> {
    let tenant = request.tenant;
    let max_wait = tenant.plan.http.max_wait(class);
    let mut acquire = request.access.gate.acquire(tenant.id, class, max_wait);
    let mut timer = pin!(tokio::time::sleep(max_wait));
    let outcome = tokio::select! {
        biased;
        outcome = &mut acquire => outcome,
        () = &mut timer => acquire.give_up(),
        () = client.gone() => return Err(Failure::Broken),
    };
    outcome.map_err(|rejection| {
        request.plane.counters.refused.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(tenant = %tenant.slug, %rejection, "request refused");
        Refusal::no_slot(tenant.slug.as_str(), &rejection).into()
    })
}

/// Connects to a server, sends the request and reads the head of the answer.
async fn send(
    request: &Request<'_>,
    client: &mut Client,
    body: &mut Option<Spool>,
    permit: Option<Permit>,
) -> Result<(ServerSession, Occupied), Failure> {
    let pool = &request.access.pool;
    let mut connected = None;
    // Nothing has been sent yet, so trying the next server is safe whatever the method.
    for load in request.access.order(request.tenant.slug.as_str()) {
        if !load.may_be_tried(request.plane.now()) {
            continue;
        }
        match connect(&load.server.address, pool.connect_timeout).await {
            Ok(server) => {
                load.connected();
                connected = Some((server, load.begin()));
                break;
            }
            Err(error) => {
                load.unreachable(request.plane.now());
                tracing::warn!(pool = %pool.name, server = %load.server.address, %error, "cannot connect");
            }
        }
    }
    let Some((mut server, in_flight)) = connected else {
        let mut refusal = Refusal::new(502, "Bad gateway", "no server of this site can be reached");
        refusal.retry_after = Some(Duration::from_secs(5));
        return Err(refusal.into());
    };
    let head = request.to_server(client.head(), body.as_ref().map(Spool::len), false)?;
    let exchange = async {
        server.write_request_header(Box::new(head)).await?;
        if let Some(body) = body {
            loop {
                let chunk = body.next().await.map_err(|e| spool_failed(&e))?;
                if chunk.is_empty() {
                    break;
                }
                if server.write_body(&chunk).await.is_err() {
                    break; // it may have answered without reading everything
                }
            }
            let _ = server.finish_body().await;
        }
        loop {
            server.read_response().await?;
            let informational = server.get_status().is_some_and(|s| s.is_informational());
            if !informational {
                return Ok::<(), Failure>(());
            }
        }
    };
    let outcome = tokio::select! {
        biased;
        outcome = tokio::time::timeout(pool.response_timeout, exchange) => Some(outcome),
        () = client.gone() => None,
    };
    let occupied = Occupied { _permit: permit, _in_flight: in_flight };
    match outcome {
        Some(Ok(Ok(()))) => Ok((server, occupied)),
        Some(Ok(Err(Failure::Refused(refusal)))) => Err(refusal.into()),
        Some(Ok(Err(Failure::Broken))) => {
            Err(Refusal::new(502, "Bad gateway", "the server closed the connection without an answer").into())
        }
        None => {
            tokio::spawn(until_the_worker_is_free(server, occupied, pool.response_timeout));
            Err(Failure::Broken)
        }
        Some(Err(_)) => {
            tokio::spawn(until_the_worker_is_free(server, occupied, pool.response_timeout));
            let limit = pool.response_timeout.as_secs();
            Err(Refusal::new(504, "Gateway timeout", format!("the server did not answer within {limit} s")).into())
        }
    }
}

/// What a request holds of its pool.
struct Occupied {
    /// None for what the workers themselves ask.
    _permit: Option<Permit>,
    _in_flight: InFlight,
}

/// The client has left, but Odoo's worker does not know and goes on: its slot stays taken until it is really free, or a
/// tenant could have every worker by asking and leaving. Bounded by the time that an answer may take.
async fn until_the_worker_is_free(mut server: ServerSession, occupied: Occupied, limit: Duration) {
    let rest = async {
        if server.resp_header().is_none() && server.read_response().await.is_err() {
            return;
        }
        while let Ok(Some(_)) = server.read_body_bytes().await {}
    };
    let _ = tokio::time::timeout(limit, rest).await;
    drop(occupied);
}

/// Passes the answer on as it comes; the slot is free when the server has finished.
async fn answer(
    request: &Request<'_>,
    client: &mut Client,
    server: ServerSession,
    occupied: Occupied,
) -> Result<Outcome, Failure> {
    let read_timeout = request.access.pool.read_timeout;
    let (version, head_only) = {
        let head = client.head();
        (head.version, head.method == Method::HEAD)
    };
    let Some(head) = server.resp_header() else { return Err(Failure::Broken) };
    let head = request.to_client(head, version, head_only)?;
    if request.plane.draining.is_cancelled() {
        client.close_after();
    }
    if version < http::Version::HTTP_11 && !head.headers.contains_key(header::CONTENT_LENGTH) {
        client.close_after(); // the end of the connection is the end of the answer
    }
    if let Err(unwritten) = client.write_head(head).await {
        tokio::spawn(until_the_worker_is_free(server, occupied, request.access.pool.response_timeout));
        return Err(unwritten.into());
    }
    pass_on(request, client, server, occupied, read_timeout).await?;
    client.finish().await?;
    Ok(Outcome::Done)
}

/// Copies the body to the client. Whenever the client does not take what there is, the server is read on into a backlog:
/// its worker, and the slot, are free when it has sent everything and not when the client has taken everything.
async fn pass_on(
    request: &Request<'_>,
    client: &mut Client,
    server: ServerSession,
    occupied: Occupied,
    read_timeout: Duration,
) -> Result<(), Failure> {
    // The read that is under way, if any, with the server in it: it is never dropped half-way.
    let mut source = Some(Source { read: Box::pin(read_on(server, read_timeout)), _occupied: occupied });
    let outcome = copy(request, client, &mut source, read_timeout).await;
    if let (Err(_), Some(source)) = (&outcome, source) {
        // The client is gone; the worker does not know and goes on.
        tokio::spawn(tokio::time::timeout(request.access.pool.response_timeout, source.until_the_end(read_timeout)));
    }
    outcome
}

/// A server, and what a read from it has brought.
type Read = (ServerSession, Result<Option<Bytes>, Failure>);

/// A server that still sends, and the slot that it holds.
struct Source {
    read: Pin<Box<dyn Future<Output = Read> + Send>>,
    _occupied: Occupied,
}

impl Source {
    async fn until_the_end(mut self, read_timeout: Duration) {
        while let (server, Ok(Some(_))) = self.read.as_mut().await {
            self.read = Box::pin(read_on(server, read_timeout));
        }
    }
}

async fn copy(
    request: &Request<'_>,
    client: &mut Client,
    source: &mut Option<Source>,
    read_timeout: Duration,
) -> Result<(), Failure> {
    let snapshot = request.snapshot;
    let mut backlog = Backlog::new(snapshot.spool_threshold, snapshot.max_backlog, snapshot.spool_directory.clone());
    let mut moved = Moved::new(request);
    let mut ahead = Ahead { request, bytes: 0 };
    loop {
        ahead.keep(backlog.len());
        let next = match (backlog.next().await.map_err(|e| backlog_failed(&e))?, &mut *source) {
            (Some(bytes), _) => bytes,
            (None, None) => return Ok(()),
            (None, Some(open)) => {
                let (server, chunk) = open.read.as_mut().await;
                let Some(chunk) = advance(source, server, chunk, read_timeout)? else { continue };
                chunk
            }
        };
        moved.add(next.len() as u64);
        if next.is_empty() {
            continue;
        }
        let mut write = pin!(client.write_body(next));
        loop {
            let mut may_read = || backlog.len() < snapshot.max_backlog && ahead.reserve(backlog.len());
            let Some(open) = source.as_mut().filter(|_| may_read()) else {
                write.await?;
                break;
            };
            let (server, chunk) = tokio::select! {
                biased;
                written = &mut write => {
                    written?;
                    break;
                }
                read = open.read.as_mut() => read,
            };
            if let Some(chunk) = advance(source, server, chunk, read_timeout)? {
                backlog.push(chunk).await.map_err(|e| backlog_failed(&e))?;
            }
        }
    }
}

/// Takes what a read has brought and begins the next; at the end of the body, or when the server fails, the slot is free.
fn advance(
    source: &mut Option<Source>,
    server: ServerSession,
    chunk: Result<Option<Bytes>, Failure>,
    read_timeout: Duration,
) -> Result<Option<Bytes>, Failure> {
    match (chunk, source.as_mut()) {
        (Ok(Some(chunk)), Some(open)) => {
            open.read = Box::pin(read_on(server, read_timeout));
            Ok(Some(chunk))
        }
        (Ok(_), _) => {
            *source = None;
            Ok(None)
        }
        (Err(failure), _) => {
            *source = None;
            Err(failure)
        }
    }
}

/// The part of what may be read ahead that one answer has taken.
struct Ahead<'a> {
    request: &'a Request<'a>,
    bytes: u64,
}

/// Room is taken for so much at a time: more than one read brings.
const AHEAD_STEP: u64 = 1 << 20;

impl Ahead<'_> {
    /// Whether there is room for one more read beside `len` bytes.
    fn reserve(&mut self, len: u64) -> bool {
        while self.bytes < len + AHEAD_STEP / 4 {
            if !self.request.plane.ahead.take(self.request.tenant.id, AHEAD_STEP) {
                return false;
            }
            self.bytes += AHEAD_STEP;
        }
        true
    }

    /// Gives back what is not needed for `len` bytes.
    fn keep(&mut self, len: u64) {
        let wanted = len.div_ceil(AHEAD_STEP) * AHEAD_STEP;
        if self.bytes > wanted + AHEAD_STEP {
            self.request.plane.ahead.give_back(self.request.tenant.id, self.bytes - wanted);
            self.bytes = wanted;
        }
    }
}

impl Drop for Ahead<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.request.plane.ahead.give_back(self.request.tenant.id, self.bytes);
        }
    }
}

/// Charges the bytes that were moved for a tenant as they are moved, and the rest however the exchange ends.
struct Moved<'a> {
    request: &'a Request<'a>,
    bytes: u64,
}

/// Bytes of a long answer that are charged at a time.
const CHARGED_EVERY: u64 = 1 << 20;

impl<'a> Moved<'a> {
    fn new(request: &'a Request<'a>) -> Self {
        Self { request, bytes: 0 }
    }

    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes >= CHARGED_EVERY {
            self.charge();
        }
    }

    fn charge(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes > 0 && self.request.tenant.plan.http.bandwidth.is_some() {
            self.request.access.gate.charge_bytes(self.request.tenant.id, bytes);
        }
    }
}

impl Drop for Moved<'_> {
    fn drop(&mut self) {
        self.charge();
    }
}

/// The next part of a body, and the server it came from.
async fn read_on(mut server: ServerSession, limit: Duration) -> Read {
    let chunk = match tokio::time::timeout(limit, server.read_body_bytes()).await {
        Ok(Ok(chunk)) => Ok(chunk),
        Ok(Err(_)) | Err(_) => Err(Failure::Broken),
    };
    (server, chunk)
}

fn backlog_failed(error: &std::io::Error) -> Failure {
    tracing::error!(%error, "an answer could not be stored while its client was slow");
    Failure::Broken
}

/// A fresh connection: Odoo's workers serve one request per connection.
pub(crate) async fn connect(address: &Endpoint, limit: Duration) -> std::io::Result<ServerSession> {
    let dial = TcpStream::connect((address.host.as_str(), address.port));
    let tcp =
        tokio::time::timeout(limit, dial).await.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
    let peer = tcp.peer_addr()?;
    let _ = tcp.set_nodelay(true);
    let fd = tcp.as_raw_fd();
    Ok(ServerSession::new(Box::new(Socket::new(tcp, fd, peer))))
}
