//! The PROXY protocol: a proxy's first words say who its client is.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use ppp::{HeaderResult, PartialResult, v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// The longest header that is accepted: version 2 with addresses and a few additions.
const LONGEST: usize = 4 << 10;

/// A connection of which some bytes have been read already.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) tcp: TcpStream,
    read: Bytes,
}

impl From<TcpStream> for Opened {
    fn from(tcp: TcpStream) -> Self {
        Self { tcp, read: Bytes::new() }
    }
}

/// Reads the header, and gives the client that it names; `None` when the proxy speaks for itself.
pub(crate) async fn read_header(mut tcp: TcpStream) -> io::Result<(Opened, Option<SocketAddr>)> {
    let mut buffer = BytesMut::with_capacity(256);
    loop {
        if tcp.read_buf(&mut buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let parsed = HeaderResult::parse(&buffer);
        if parsed.is_complete() {
            let (client, length) = client_of(parsed)?;
            buffer.advance(length);
            return Ok((Opened { tcp, read: buffer.freeze() }, client));
        }
        if buffer.len() > LONGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a PROXY header that does not end"));
        }
    }
}

fn client_of(header: HeaderResult<'_>) -> io::Result<(Option<SocketAddr>, usize)> {
    let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
    match header {
        HeaderResult::V1(header) => {
            let header = header.map_err(|e| invalid(e.to_string()))?;
            let client = match header.addresses {
                v1::Addresses::Tcp4(a) => Some((IpAddr::V4(a.source_address), a.source_port)),
                v1::Addresses::Tcp6(a) => Some((IpAddr::V6(a.source_address), a.source_port)),
                v1::Addresses::Unknown => None,
            };
            Ok((client.map(SocketAddr::from), header.header.len()))
        }
        HeaderResult::V2(header) => {
            let header = header.map_err(|e| invalid(e.to_string()))?;
            let client = match header.addresses {
                v2::Addresses::IPv4(a) => Some((IpAddr::V4(a.source_address), a.source_port)),
                v2::Addresses::IPv6(a) => Some((IpAddr::V6(a.source_address), a.source_port)),
                v2::Addresses::Unix(_) | v2::Addresses::Unspecified => None,
            };
            let client = client.filter(|_| header.command == v2::Command::Proxy);
            Ok((client.map(SocketAddr::from), header.len()))
        }
    }
}

impl AsyncRead for Opened {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.tcp).poll_read(cx, buf);
        }
        let n = self.read.len().min(buf.remaining());
        buf.put_slice(&self.read.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Opened {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
