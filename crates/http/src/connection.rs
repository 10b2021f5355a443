//! One client connection: request after request, with a deadline for each step.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use pingora_core::protocols::Stream;
use pingora_core::protocols::http::v1::server::HttpSession;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::exchange::{self, Outcome};
use crate::plane::HttpPlane;
use crate::socket::Socket;

/// Most request headers fit into this.
const FIRST_READ: usize = 4 << 10;

/// A connection may be just open, and its request on the way, when the plane begins to drain.
const QUIET: Duration = Duration::from_secs(1);

/// Ends when a connection without a request has been waited for long enough. With a successor nothing is in a hurry, and
/// one that has not asked for anything yet has somebody behind it who is about to.
async fn quiet(plane: &HttpPlane, is_new: bool, header: Duration) {
    plane.draining.cancelled().await;
    tokio::time::sleep(if is_new && plane.has_successor() { header } else { QUIET }).await;
}

/// Serves a connection until one side ends it.
pub(crate) async fn serve(plane: &Arc<HttpPlane>, tcp: TcpStream, peer: SocketAddr) {
    let mut stream: Stream = Box::new(Socket::new(tcp, peer));
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
        let mut session = HttpSession::new(stream);
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
                tracing::debug!(%peer, %error, "malformed request");
                // There may be no parsed request to answer: a raw answer.
                bad_request(session).await;
                return;
            }
            Err(_) => return,
        }
        if plane.draining.is_cancelled() {
            session.set_server_keepalive(None);
        }
        // The catalog as it is now, not as it was when the connection fell idle.
        let snapshot = plane.snapshot();
        match exchange::serve(plane, &snapshot, &mut session, peer, request_id).await {
            Outcome::Done => {}
            Outcome::Close => {
                session.shutdown().await;
                return;
            }
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

async fn bad_request(session: HttpSession) {
    const ANSWER: &[u8] =
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 26\r\nConnection: close\r\n\r\nthe request is malformed.\n";
    let mut stream = session.into_inner();
    let _ = stream.write_all(ANSWER).await;
    let _ = stream.flush().await;
    let _ = stream.shutdown().await;
}
