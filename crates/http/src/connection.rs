//! One client connection: what it begins with, and request after request, with a deadline for each step.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use pingora_core::protocols::http::v1::server::HttpSession as SessionOne;
use pingora_core::protocols::http::v2::server::{self as two, H2Accept, HttpSession as SessionTwo, default_h2_options};
use pingora_core::protocols::{Digest, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::access::Line;
use crate::client::Client;
use crate::exchange::{self, Outcome};
use crate::framing::{self, Body};
use crate::plane::HttpPlane;
use crate::proxy::{self, Opened};
use crate::socket::{Inbound, Socket};

/// Most request headers fit into this.
const FIRST_READ: usize = 4 << 10;

/// A connection may be just open, and its request on the way, when the plane begins to drain.
const QUIET: Duration = Duration::from_secs(1);

/// Bytes of a head that are looked at; what a tenant may send is in its plan.
pub(crate) const MAX_HEADER: usize = 64 << 10;

/// How long a client may take for the answer to what is no request.
const REFUSAL: Duration = Duration::from_secs(5);

/// Requests that pingora rejects by itself before an HTTP/2 connection has had its chances.
const MOST_REJECTED: usize = 32;

/// Bytes of a body that an HTTP/2 client may send before it hears from us: for one request, and for all of a connection.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;

/// What all requests of a connection have in common.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    /// Who is at its other end, or who is behind the proxy there.
    pub(crate) peer: SocketAddr,
    pub(crate) is_tls: bool,
    /// The authorities by which the client's certificate was checked.
    pub(crate) client_ca: Option<Arc<str>>,
}

/// Ends when a connection without a request has been waited for long enough. With a successor nothing is in a hurry, and
/// one that has not asked for anything yet has somebody behind it who is about to.
async fn quiet(plane: &HttpPlane, is_new: bool, header: Duration) {
    plane.draining.cancelled().await;
    tokio::time::sleep(if is_new && plane.has_successor() { header } else { QUIET }).await;
}

/// Serves a connection until one side ends it.
pub(crate) async fn serve(plane: &Arc<HttpPlane>, tcp: TcpStream, peer: SocketAddr, is_tls: bool) {
    let snapshot = plane.snapshot();
    let _ = tcp.set_nodelay(true);
    let fd = tcp.as_raw_fd();
    let mut connection = Connection { peer, is_tls, client_ca: None };
    let mut place = None;
    let begun = async {
        let mut opened = Opened::from(tcp);
        if snapshot.proxy_protocol && snapshot.trusts(peer.ip()) {
            let (rest, client) = match proxy::read_header(opened.tcp).await {
                Ok(read) => read,
                Err(error) => {
                    tracing::warn!(%peer, %error, "no PROXY header from a trusted proxy");
                    return None;
                }
            };
            opened = rest;
            connection.peer = client.unwrap_or(peer);
        }
        // Behind a proxy of ours is everybody.
        if !snapshot.trusts(connection.peer.ip()) {
            place = plane.crowd.enter(connection.peer.ip(), snapshot.max_per_address);
            if place.is_none() {
                plane.counters.crowded.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(peer = %connection.peer, limit = snapshot.max_per_address, "too many connections");
                return None;
            }
        }
        if !is_tls {
            let socket = Socket::new(opened, fd, connection.peer);
            let inbound = socket.inbound();
            return Some((Box::new(socket) as Stream, inbound, false));
        }
        let (tls, client_ca) = snapshot.tls.load_full()?.accept(opened).await?;
        connection.client_ca = client_ca;
        let is_two = tls.get_ref().1.alpn_protocol() == Some(b"h2");
        let socket = Socket::new(tls, fd, connection.peer);
        let inbound = socket.inbound();
        Some((Box::new(socket) as Stream, inbound, is_two))
    };
    let Ok(Some((stream, inbound, is_two))) = tokio::time::timeout(snapshot.timeouts.header, begun).await else {
        return;
    };
    drop(snapshot);
    if is_two {
        serve_two(plane, stream, connection).await;
    } else {
        serve_one(plane, stream, &inbound, &connection).await;
    }
}

/// HTTP/1: one request after the other.
async fn serve_one(plane: &Arc<HttpPlane>, mut stream: Stream, inbound: &Arc<Inbound>, connection: &Connection) {
    // What has come of the next request.
    let mut read = BytesMut::new();
    let mut is_new = true;
    loop {
        let timeouts = plane.snapshot().timeouts;
        if read.is_empty() {
            // Between requests a connection may be idle for long; within one it may not. So the first bytes are awaited
            // here, and the head has a deadline of its own.
            read.reserve(FIRST_READ);
            tokio::select! {
                outcome = tokio::time::timeout(timeouts.keepalive, stream.read_buf(&mut read)) => {
                    if !matches!(outcome, Ok(Ok(n)) if n > 0) {
                        return;
                    }
                }
                () = quiet(plane, is_new, timeouts.header) => return,
            }
        }
        is_new = false;
        let head = match tokio::time::timeout(timeouts.header, read_head(&mut stream, &mut read)).await {
            Ok(Ok(length)) => length,
            Ok(Err(Unread::Gone)) | Err(_) => return,
            Ok(Err(Unread::Wrong(answer, reason))) => return refuse(plane, connection, stream, answer, reason).await,
        };
        let framed = framing::check_head(&read[..head]).and_then(|body| match body {
            Body::Chunks => inbound.follow(&read[head..]),
            Body::Length => Ok(()),
        });
        if let Err(malformed) = framed {
            return refuse(plane, connection, stream, BAD_REQUEST, malformed.0).await;
        }
        let mut session = SessionOne::new(stream);
        session.set_pipelining_enabled(true);
        session.set_pipelined_prefix(std::mem::take(&mut read));
        session.set_read_timeout(Some(timeouts.body));
        session.set_write_timeout(Some(timeouts.write));
        session.set_total_drain_timeout(Some(timeouts.body));
        let request_id = plane.request_id();
        match session.read_request().await {
            Ok(Some(_)) => {}
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(peer = %connection.peer, %error, "malformed request");
                return refuse(plane, connection, session.into_inner(), BAD_REQUEST, "the request is malformed").await;
            }
        }
        let mut client = Client::one(session, Arc::clone(inbound), head, timeouts.body, timeouts.write);
        if plane.draining.is_cancelled() {
            client.close_after();
        }
        // The catalog as it is now, not as it was when the connection fell idle.
        let snapshot = plane.snapshot();
        let outcome = exchange::serve(plane, &snapshot, &mut client, connection, request_id).await;
        let Some(mut session) = client.into_one() else { return };
        if outcome == Outcome::Close {
            session.shutdown().await;
            return;
        }
        match session.reuse().await {
            Ok(Some(reusable)) => {
                let (next, pipelined) = reusable.into_parts();
                stream = next;
                read = pipelined.unwrap_or_default();
            }
            Ok(None) | Err(_) => return,
        }
    }
}

/// The requests of an HTTP/2 connection that are being served.
#[derive(Default)]
struct Active {
    count: AtomicUsize,
    none_left: Notify,
}

struct OneActive(Arc<Active>);

impl Drop for OneActive {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.none_left.notify_one();
        }
    }
}

impl Active {
    fn begin(self: &Arc<Self>) -> OneActive {
        self.count.fetch_add(1, Ordering::Relaxed);
        OneActive(Arc::clone(self))
    }

    /// Ends when there has been none for so long.
    async fn idle_for(&self, limit: Duration) {
        while self.count.load(Ordering::Relaxed) != 0 {
            self.none_left.notified().await;
        }
        tokio::time::sleep(limit).await;
    }
}

/// HTTP/2: many requests at once, each in a task of its own.
async fn serve_two(plane: &Arc<HttpPlane>, stream: Stream, connection: Connection) {
    let timeouts = plane.snapshot().timeouts;
    let digest = Arc::new(Digest {
        ssl_digest: None,
        timing_digest: Vec::new(),
        proxy_digest: None,
        socket_digest: stream.get_socket_digest(),
    });
    let mut options = default_h2_options();
    options.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
    let handshake = tokio::time::timeout(timeouts.header, two::handshake(stream, Some(options)));
    let Ok(Ok(mut h2)) = handshake.await else { return };
    let active = Arc::new(Active::default());
    let (mut rejected, mut going) = (0, false);
    let connection = Arc::new(connection);
    loop {
        let accepted = tokio::select! {
            biased;
            () = plane.draining.cancelled(), if !going => {
                // The client hears of it, what it has asked is answered, and then it asks elsewhere.
                h2.graceful_shutdown();
                going = true;
                continue;
            }
            accepted = SessionTwo::from_h2_conn(&mut h2, Arc::clone(&digest)) => accepted,
            () = active.idle_for(if going { QUIET } else { timeouts.keepalive }) => return,
        };
        let session = match accepted {
            Ok(Some(H2Accept::Session(session))) => session,
            Ok(Some(H2Accept::Rejected)) if rejected < MOST_REJECTED => {
                rejected += 1;
                continue;
            }
            Ok(Some(H2Accept::Rejected) | None) => return,
            Err(error) => {
                tracing::debug!(peer = %connection.peer, %error, "an HTTP/2 connection has failed");
                return;
            }
        };
        let (plane, connection, one) = (Arc::clone(plane), Arc::clone(&connection), active.begin());
        let cut = plane.cut.clone();
        plane.clone().tasks.spawn(cut.run_until_cancelled_owned(async move {
            let _one = one;
            let snapshot = plane.snapshot();
            let mut client = Client::two(session, snapshot.timeouts.body, snapshot.timeouts.write);
            let id = plane.request_id();
            // Whatever is not finished is reset when the client is dropped.
            let _ = exchange::serve(&plane, &snapshot, &mut client, &connection, id).await;
        }));
    }
}

/// Why there is no head.
enum Unread {
    /// The client has left.
    Gone,
    /// It is none: the status, and the reason.
    Wrong((u16, &'static str), &'static str),
}

/// Reads the head of a request, and gives its length.
async fn read_head(stream: &mut Stream, read: &mut BytesMut) -> Result<usize, Unread> {
    let mut looked_at = 0;
    loop {
        // An empty line before a request, of old clients after a form (RFC 9112, 2.2).
        while looked_at == 0 && read.starts_with(b"\r\n") {
            read.advance(2);
        }
        if !(looked_at == 0 && &read[..] == b"\r") {
            match framing::head_end(read, looked_at) {
                Ok(Some(end)) => return Ok(end),
                Ok(None) => looked_at = read.len(),
                Err(malformed) => return Err(Unread::Wrong(BAD_REQUEST, malformed.0)),
            }
        }
        if read.len() > MAX_HEADER {
            return Err(Unread::Wrong(TOO_LARGE, "the request header is too large"));
        }
        match stream.read_buf(read).await {
            Ok(n) if n > 0 => {}
            _ => return Err(Unread::Gone),
        }
    }
}

const BAD_REQUEST: (u16, &str) = (400, "Bad Request");
const TOO_LARGE: (u16, &str) = (431, "Request Header Fields Too Large");

/// An answer to what is no request, which is written down too: who sends such things is who probes.
async fn refuse(
    plane: &HttpPlane,
    connection: &Connection,
    mut stream: Stream,
    (status, title): (u16, &str),
    reason: &str,
) {
    tracing::debug!(peer = %connection.peer, reason, "malformed request");
    let (begun, id) = (Instant::now(), plane.request_id());
    let length = reason.len() + 2;
    let answer = format!(
        "HTTP/1.1 {status} {title}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nX-Request-Id: {id}\r\n\
         Connection: close\r\n\r\n{reason}.\n"
    );
    let written = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.flush().await?;
        stream.shutdown().await
    };
    let written = tokio::time::timeout(REFUSAL, written).await.is_ok_and(|written| written.is_ok());
    if let Some(log) = &plane.snapshot().access_log {
        log.write(&Line {
            status: if written { status } else { 0 },
            bytes_out: if written { length as u64 } else { 0 },
            total_ms: begun.elapsed().as_secs_f64() * 1e3,
            ..Line::of(connection.peer.ip(), "http/1", &id)
        });
    }
}
