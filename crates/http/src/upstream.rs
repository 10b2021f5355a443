//! The way to a server: which one, how often, and what is held meanwhile.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_fairness::Permit;
use cofferdam_tenant::{Endpoint, WakeConfig};
use http::Method;
use pingora_core::protocols::http::v1::client::HttpSession as ServerSession;
use tokio::net::TcpStream;

use crate::access::Work;
use crate::client::Client;
use crate::exchange::{Failure, spool_failed};
use crate::pool::InFlight;
use crate::reply::Refusal;
use crate::request::Request;
use crate::socket::Socket;
use crate::spool::Spool;
use crate::workers::{Ends, Look};

/// A server that closes without an answer within this time has not worked on the request: another may be asked. One that
/// closes later was killed at it, and so would the next be.
const QUICKLY: Duration = Duration::from_secs(2);

/// A server that was reached, and that it is busy with one request more.
type Reached = (usize, (ServerSession, Ends), InFlight);

/// What a request holds of its pool. Fields drop in order: what is said of the worker has to be said before the slot is free.
pub(crate) struct Occupied {
    /// Who looks for the worker, where the server's are looked at.
    look: Option<Look>,
    /// None for what the workers themselves ask.
    permit: Option<Permit>,
    _in_flight: InFlight,
    begun: Instant,
    work: Arc<Work>,
}

impl Drop for Occupied {
    fn drop(&mut self) {
        self.work.since(self.begun);
    }
}

/// Sends a request to a server and reads the head of its answer.
///
/// Whatever is safe to repeat is sent to another server when the first closes at once without an answer, as one does that is
/// being restarted; within the pool's budget, so that retries cannot multiply an overload.
pub(crate) async fn send(
    request: &Request<'_>,
    client: &mut Client,
    body: &mut Option<Spool>,
    mut permit: Option<Permit>,
) -> Result<(ServerSession, Occupied), Failure> {
    let safe = body.is_none() && matches!(client.head().method, Method::GET | Method::HEAD | Method::OPTIONS);
    request.access.retries().attempted();
    let mut tried: Vec<usize> = Vec::new();
    loop {
        let begun = Instant::now();
        let (n, (server, ends), in_flight) = tokio::select! {
            reached = reach(request, &tried) => reached?,
            () = client.gone() => return Err(Failure::Broken),
        };
        let load = &request.access.servers()[n];
        let work = {
            let mut record = request.record();
            record.server = Some(load.server.address.to_string());
            record.attempts += 1;
            record.asked = Some(begun);
            Arc::clone(&record.work)
        };
        let look = load.workers.as_ref().zip(permit.as_ref());
        let look = look.and_then(|(workers, permit)| Some(workers.look(ends, permit.queue(), permit.watch()?)));
        let occupied = Occupied { look, permit: permit.take(), _in_flight: in_flight, begun, work };
        match attempt(request, client, body, server, occupied).await {
            Ok(answered) => {
                load.answered();
                return Ok(answered);
            }
            Err((Failure::Broken, Some(mut occupied))) => {
                load.unanswered(request.plane.now());
                tried.push(n);
                let others = request.access.servers().len() > tried.len();
                let again = safe && begun.elapsed() < QUICKLY && others && request.access.retries().take();
                if !again {
                    let detail = "the server closed the connection without an answer";
                    return Err(Refusal::new(502, "Bad gateway", detail).into());
                }
                permit = occupied.permit.take();
                tracing::debug!(server = %load.server.address, request_id = %request.id, "asked another server");
            }
            Err((failure, _)) => return Err(failure),
        }
    }
}

/// Connects to a server that was not tried yet. Nothing has been sent then, so trying the next is safe whatever the method.
async fn reach(request: &Request<'_>, tried: &[usize]) -> Result<Reached, Failure> {
    let access = request.access;
    let order = access.order(request.tenant.slug.as_str()).into_iter().filter(|n| !tried.contains(n));
    // Those that are ill, or have closed without an answer too often, are asked when nobody else can be reached.
    let (first, last): (Vec<_>, Vec<_>) = order.partition(|n| access.servers()[*n].is_preferred(request.plane.now()));
    for n in first.into_iter().chain(last) {
        let load = &access.servers()[n];
        if !load.may_be_tried(request.plane.now()) {
            continue;
        }
        match dial(&load.server.address, access.pool.connect_timeout).await {
            Ok(server) => {
                load.connected();
                return Ok((n, server, load.begin()));
            }
            Err(error) => {
                load.unreachable(request.plane.now());
                tracing::warn!(pool = %access.pool.name, server = %load.server.address, %error, "cannot connect");
            }
        }
    }
    if let Some(wake) = &access.pool.wake
        && tried.is_empty()
        && let Some(reached) = woken(request, wake).await
    {
        return Ok(reached);
    }
    let mut refusal = Refusal::new(502, "Bad gateway", "no server of this site can be reached");
    refusal.retry_after = Some(Duration::from_secs(5));
    Err(refusal.into())
}

/// How often it is tried whether a server is awake.
const AWAKE_YET: Duration = Duration::from_millis(250);

/// Has the servers of a pool woken, once for all who wait, and waits until one can be reached.
async fn woken(request: &Request<'_>, wake: &WakeConfig) -> Option<Reached> {
    let access = request.access;
    let until = tokio::time::Instant::now() + wake.timeout.0;
    let reached = async || {
        for n in access.order(request.tenant.slug.as_str()) {
            let load = &access.servers()[n];
            if let Ok(server) = dial(&load.server.address, access.pool.connect_timeout).await {
                load.connected();
                return Some((n, server, load.begin()));
            }
        }
        None
    };
    let waiting = async {
        let waking = access.waking.lock().await;
        // Whoever was first has woken them for all.
        if let Some(reached) = reached().await {
            return reached;
        }
        tracing::info!(pool = %access.pool.name, tenant = %request.tenant.slug, "waking the servers");
        // Whoever wakes them may take its time to answer; what counts is whether they are awake.
        let (wake, pool, tenant) = (wake.clone(), access.pool.name.clone(), request.tenant.slug.clone());
        tokio::spawn(async move {
            if let Err(error) = call(&wake, pool.as_str(), tenant.as_str()).await {
                tracing::warn!(%pool, address = %wake.address, %error, "whoever wakes the servers does not answer");
            }
        });
        loop {
            if let Some(reached) = reached().await {
                drop(waking);
                return reached;
            }
            tokio::time::sleep(AWAKE_YET).await;
        }
    };
    tokio::time::timeout_at(until, waiting).await.ok()
}

/// Asks who wakes the servers to do so.
async fn call(wake: &WakeConfig, pool: &str, tenant: &str) -> pingora_error::Result<()> {
    // Names of pools and tenants need no escapes.
    let body = format!("{{\"pool\":\"{pool}\",\"tenant\":\"{tenant}\"}}\n");
    let failed =
        |error: io::Error| pingora_error::Error::because(pingora_error::ErrorType::ConnectError, "connecting", error);
    let mut server = connect(&wake.address, wake.timeout.0).await.map_err(failed)?;
    let mut head = pingora_http::RequestHeader::build("POST", wake.path.as_bytes(), None)?;
    head.insert_header(http::header::HOST, wake.address.to_string())?;
    head.insert_header(http::header::CONTENT_TYPE, "application/json")?;
    head.insert_header(http::header::CONTENT_LENGTH, body.len())?;
    head.insert_header(http::header::CONNECTION, "close")?;
    server.write_request_header(Box::new(head)).await?;
    server.write_body(body.as_bytes()).await?;
    server.finish_body().await?;
    server.read_response().await?;
    match server.get_status() {
        Some(status) if status.is_success() => Ok(()),
        status => pingora_error::Error::e_explain(pingora_error::ErrorType::InternalError, format!("{status:?}")),
    }
}

/// One attempt. `Broken` with what was held means that the server has closed without an answer.
async fn attempt(
    request: &Request<'_>,
    client: &mut Client,
    body: &mut Option<Spool>,
    mut server: ServerSession,
    mut occupied: Occupied,
) -> Result<(ServerSession, Occupied), (Failure, Option<Occupied>)> {
    let pool = &request.access.pool;
    let head = match request.to_server(client.head(), body.as_ref().map(Spool::len), false) {
        Ok(head) => head,
        Err(error) => return Err((error.into(), None)),
    };
    if let Some(look) = &mut occupied.look {
        look.before().await;
    }
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
        () = looking(&mut occupied.look) => None,
    };
    match outcome {
        Some(Ok(Ok(()))) => Ok((server, occupied)),
        Some(Ok(Err(failure))) => Err((failure, Some(occupied))),
        None => {
            tokio::spawn(until_the_worker_is_free(server, occupied, pool.response_timeout));
            Err((Failure::Broken, None))
        }
        Some(Err(_)) => {
            tokio::spawn(until_the_worker_is_free(server, occupied, pool.response_timeout));
            let limit = pool.response_timeout.as_secs();
            let detail = format!("the server did not answer within {limit} s");
            Err((Refusal::new(504, "Gateway timeout", detail).into(), None))
        }
    }
}

/// Looks for the worker for as long as it works. Never ends.
async fn looking(look: &mut Option<Look>) {
    if let Some(look) = look {
        look.while_it_works().await;
    }
    std::future::pending::<()>().await;
}

/// The client has left, but Odoo's worker does not know and goes on: its slot stays taken until it is really free, or a
/// tenant could have every worker by asking and leaving. Bounded by the time that an answer may take.
pub(crate) async fn until_the_worker_is_free(mut server: ServerSession, mut occupied: Occupied, limit: Duration) {
    let rest = async {
        if server.resp_header().is_none() && server.read_response().await.is_err() {
            return;
        }
        while let Ok(Some(_)) = server.read_body_bytes().await {}
    };
    tokio::select! {
        biased;
        _ = tokio::time::timeout(limit, rest) => {}
        () = looking(&mut occupied.look) => {}
    }
    drop(occupied);
}

/// A fresh connection.
pub(crate) async fn connect(address: &Endpoint, limit: Duration) -> io::Result<ServerSession> {
    Ok(dial(address, limit).await?.0)
}

/// A fresh connection, and its ends: Odoo's workers serve one request per connection.
async fn dial(address: &Endpoint, limit: Duration) -> io::Result<(ServerSession, Ends)> {
    let dial = TcpStream::connect((address.host.as_str(), address.port));
    let tcp = tokio::time::timeout(limit, dial).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let peer = tcp.peer_addr()?;
    let ends = Ends { server: peer, gateway: tcp.local_addr()? };
    let _ = tcp.set_nodelay(true);
    let fd = tcp.as_raw_fd();
    Ok((ServerSession::new(Box::new(Socket::new(tcp, fd, peer))), ends))
}
