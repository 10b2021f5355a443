//! A socket, plain or under TLS, with reads that need no buffer until bytes are there.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;
use tokio_util::io::poll_read_buf;

/// Bytes asked for in one read.
const READ: usize = 16 << 10;

/// Buffers that nobody needs at the moment, per thread: clients that are idle have none.
const SPARE: usize = 64;

thread_local! {
    static SPARE_BUFFERS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// Makes room for a read.
fn make_room(buf: &mut BytesMut) {
    if buf.capacity() == 0
        && let Some(spare) = SPARE_BUFFERS.with_borrow_mut(Vec::pop)
    {
        *buf = spare;
    }
    if buf.capacity() - buf.len() < READ / 4 {
        buf.reserve(READ);
    }
}

/// Takes an empty buffer away from a connection that will not need it for a while.
pub(crate) fn put_away(buf: &mut BytesMut) {
    if buf.is_empty() && buf.capacity() > 0 {
        let mut spare = std::mem::take(buf);
        // What has been consumed in front is room again.
        if spare.try_reclaim(READ) && spare.capacity() <= 2 * READ {
            SPARE_BUFFERS.with_borrow_mut(|all| {
                if all.len() < SPARE {
                    all.push(spare);
                }
            });
        }
    }
}

/// A connection to a client or a server.
#[derive(Debug)]
pub(crate) enum Stream {
    Plain(TcpStream),
    /// And whether bytes have been given to TLS that the socket has not taken yet.
    Tls(Box<TlsStream<TcpStream>>, bool),
}

impl Stream {
    pub(crate) fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls, _) => tls.get_ref().0,
        }
    }

    /// Reads what is there into `buf`; 0 at the end of the stream.
    ///
    /// An idle plain connection holds no buffer: room is made only when the socket is readable.
    pub(crate) fn poll_fill(&mut self, cx: &mut Context<'_>, buf: &mut BytesMut) -> Poll<io::Result<usize>> {
        if let Self::Plain(tcp) = self {
            ready!(tcp.poll_read_ready(cx))?;
        }
        make_room(buf);
        let result = match self {
            Self::Plain(tcp) => poll_read_buf(Pin::new(tcp), cx, buf),
            Self::Tls(tls, _) => poll_read_buf(Pin::new(&mut **tls), cx, buf),
        };
        if result.is_pending() && buf.is_empty() {
            put_away(buf);
        }
        result
    }

    /// Writes `buf` out as far as the socket takes it; ready when it is empty.
    pub(crate) fn poll_drain(&mut self, cx: &mut Context<'_>, buf: &mut BytesMut) -> Poll<io::Result<()>> {
        while !buf.is_empty() {
            let written = match self {
                Self::Plain(tcp) => ready!(Pin::new(tcp).poll_write(cx, buf))?,
                Self::Tls(tls, unflushed) => {
                    let written = ready!(Pin::new(&mut **tls).poll_write(cx, buf))?;
                    *unflushed = true;
                    written
                }
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            buf.advance(written);
        }
        match self {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(tls, unflushed) => {
                ready!(Pin::new(&mut **tls).poll_flush(cx))?;
                *unflushed = false;
                Poll::Ready(Ok(()))
            }
        }
    }

    /// Whether [`Self::poll_drain`] has something to do although the buffer is empty.
    pub(crate) fn is_unflushed(&self) -> bool {
        matches!(self, Self::Tls(_, true))
    }

    pub(crate) async fn fill(&mut self, buf: &mut BytesMut) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_fill(cx, buf)).await
    }

    pub(crate) async fn drain(&mut self, buf: &mut BytesMut) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_drain(cx, buf)).await
    }
}

impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Self {
        Self::Plain(tcp)
    }
}
