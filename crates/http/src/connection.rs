//! One client connection: what it begins with, and request after request, with a deadline for each step.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use pingora_core::protocols::http::v1::server::HttpSession as SessionOne;
use pingora_core::protocols::http::v2::server::{self as two, H2Accept, HttpSession as SessionTwo, default_h2_options};
use pingora_core::protocols::{Digest, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::client::Client;
use crate::exchange::{self, Outcome};
use crate::plane::HttpPlane;
use crate::proxy::{self, Opened};
use crate::socket::Socket;

/// Most request headers fit into this.
const FIRST_READ: usize = 4 << 10;

/// A connection may be just open, and its request on the way, when the plane begins to drain.
const QUIET: Duration = Duration::from_secs(1);

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
        if !is_tls {
            return Some((Box::new(Socket::new(opened, fd, connection.peer)) as Stream, false));
        }
        let (tls, client_ca) = snapshot.tls.as_ref()?.accept(opened).await?;
        connection.client_ca = client_ca;
        let is_two = tls.get_ref().1.alpn_protocol() == Some(b"h2");
        Some((Box::new(Socket::new(tls, fd, connection.peer)) as Stream, is_two))
    };
    let Ok(Some((stream, is_two))) = tokio::time::timeout(snapshot.timeouts.header, begun).await else { return };
    drop(snapshot);
    if is_two {
        serve_two(plane, stream, connection).await;
    } else {
        serve_one(plane, stream, &connection).await;
    }
}

/// HTTP/1: one request after the other.
async fn serve_one(plane: &Arc<HttpPlane>, mut stream: Stream, connection: &Connection) {
    let mut prefix: Option<BytesMut> = None;
    let mut is_new = true;
    loop {
        let timeouts = plane.snapshot().timeouts;
        if prefix.is_none() {
            // Between requests a connection may be idle for long; within one it may not. So the first bytes are awaited
            // here, and the rest of the header has a deadline of its own.
            let mut first = BytesMut::with_capacity(FIRST_READ);
            tokio::select! {
                read = tokio::time::timeout(timeouts.keepalive, stream.read_buf(&mut first)) => {
                    if !matches!(read, Ok(Ok(n)) if n > 0) {
                        return;
                    }
                }
                () = quiet(plane, is_new, timeouts.header) => return,
            }
            prefix = Some(first);
        }
        is_new = false;
        let mut session = SessionOne::new(stream);
        session.set_pipelining_enabled(true);
        if let Some(prefix) = prefix.take() {
            session.set_pipelined_prefix(prefix);
        }
        session.set_read_timeout(Some(timeouts.body));
        session.set_write_timeout(Some(timeouts.write));
        session.set_total_drain_timeout(Some(timeouts.body));
        // pingora bounds each read; the whole header needs a deadline too, or one byte a second keeps a connection.
        let request_id = plane.request_id();
        match tokio::time::timeout(timeouts.header, session.read_request()).await {
            Ok(Ok(Some(_))) => {}
            Ok(Ok(None)) => return,
            Ok(Err(error)) => {
                tracing::debug!(peer = %connection.peer, %error, "malformed request");
                // There may be no parsed request to answer: a raw answer.
                bad_request(session).await;
                return;
            }
            Err(_) => return,
        }
        let mut client = Client::one(session, timeouts.body, timeouts.write);
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
                prefix = pipelined;
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

async fn bad_request(session: SessionOne) {
    const ANSWER: &[u8] =
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 26\r\nConnection: close\r\n\r\nthe request is malformed.\n";
    let mut stream = session.into_inner();
    let _ = stream.write_all(ANSWER).await;
    let _ = stream.flush().await;
    let _ = stream.shutdown().await;
}
