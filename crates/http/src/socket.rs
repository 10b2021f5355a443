//! Our sockets in the shape that pingora wants: writes buffered, the peer's address known without asking the system.

use std::io;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use pingora_core::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
    raw_connect::ProxyDigest,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufWriter, ReadBuf};

use crate::framing::{Chunks, Malformed};

/// Header and first body bytes leave in one write.
const WRITE_BUFFER: usize = 8 << 10;

/// A connection to a client or a server, with TLS or without.
#[derive(Debug)]
pub(crate) struct Socket<S: AsyncWrite> {
    io: BufWriter<S>,
    fd: RawFd,
    digest: Arc<SocketDigest>,
    inbound: Arc<Inbound>,
}

/// What is checked of the bytes that come in, before the engine sees them.
#[derive(Debug, Default)]
pub(crate) struct Inbound(Mutex<Watched>);

#[derive(Debug, Default)]
struct Watched {
    chunks: Option<Chunks>,
    malformed: Option<Malformed>,
}

impl Inbound {
    /// Follows a body in chunks, of which some bytes have come already.
    pub(crate) fn follow(&self, read: &[u8]) -> Result<(), Malformed> {
        let mut chunks = Chunks::default();
        chunks.push(read)?;
        self.watched().chunks = Some(chunks).filter(|chunks| !chunks.is_done());
        Ok(())
    }

    /// What was wrong with it.
    pub(crate) fn malformed(&self) -> Option<Malformed> {
        self.watched().malformed
    }

    fn check(&self, bytes: &[u8]) -> io::Result<()> {
        let mut watched = self.watched();
        let Some(chunks) = &mut watched.chunks else { return Ok(()) };
        match chunks.push(bytes) {
            Ok(_) if chunks.is_done() => watched.chunks = None,
            Ok(_) => {}
            Err(malformed) => {
                watched.malformed = Some(malformed);
                return Err(io::Error::new(io::ErrorKind::InvalidData, malformed));
            }
        }
        Ok(())
    }

    fn watched(&self) -> std::sync::MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: AsyncWrite> Socket<S> {
    /// `fd` is the socket's that is under the stream.
    pub(crate) fn new(stream: S, fd: RawFd, peer: SocketAddr) -> Self {
        let digest = SocketDigest::from_raw_fd(fd);
        let _ = digest.peer_addr.set(Some(pingora_core::protocols::l4::socket::SocketAddr::Inet(peer)));
        let io = BufWriter::with_capacity(WRITE_BUFFER, stream);
        Self { io, fd, digest: Arc::new(digest), inbound: Arc::default() }
    }

    /// What is checked of the bytes that come in.
    pub(crate) fn inbound(&self) -> Arc<Inbound> {
        Arc::clone(&self.inbound)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Socket<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(self.io.get_mut()).poll_read(cx, buf))?;
        Poll::Ready(self.inbound.check(&buf.filled()[before..]))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[async_trait]
impl<S: AsyncWrite + Unpin + Send + Sync> Shutdown for Socket<S> {
    async fn shutdown(&mut self) {
        // What a client does not take by now it does not want.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(1), self.io.shutdown()).await;
    }
}

impl<S: AsyncWrite> UniqueID for Socket<S> {
    fn id(&self) -> i32 {
        self.fd
    }
}

impl<S: AsyncWrite> Ssl for Socket<S> {}

#[async_trait]
impl<S: AsyncWrite + Send> Peek for Socket<S> {}

impl<S: AsyncWrite> GetTimingDigest for Socket<S> {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
    fn get_read_pending_time(&self) -> std::time::Duration {
        std::time::Duration::ZERO
    }
    fn get_write_pending_time(&self) -> std::time::Duration {
        std::time::Duration::ZERO
    }
}

impl<S: AsyncWrite> GetProxyDigest for Socket<S> {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl<S: AsyncWrite> GetSocketDigest for Socket<S> {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        Some(Arc::clone(&self.digest))
    }
}
