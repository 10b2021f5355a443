//! A connection to a server whose messages are not larger than somebody has room for.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream of PostgreSQL's messages of which none may be larger than a bound: reading one is an error, before any of it is
/// kept. One row is one message, and what is in it is a tenant's.
#[derive(Debug)]
pub struct Bounded<S> {
    inner: S,
    largest: u32,
    state: State,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// The answer to the question for TLS: one byte.
    Negotiating,
    /// What comes is TLS, in which somebody else looks.
    Opaque,
    /// So many bytes of a message's type and length, and the length so far.
    Head(u8, u32),
    /// So many bytes of a message.
    Body(u32),
}

impl<S> Bounded<S> {
    /// A stream on which messages begin at once.
    pub fn new(inner: S, largest: u32) -> Self {
        Self { inner, largest, state: State::Head(0, 0) }
    }

    /// A stream on which TLS is asked for first.
    pub fn negotiating(inner: S, largest: u32) -> Self {
        Self { inner, largest, state: State::Negotiating }
    }

    fn look(&mut self, mut read: &[u8]) -> io::Result<()> {
        while let Some((first, rest)) = read.split_first() {
            match self.state {
                State::Opaque => return Ok(()),
                State::Negotiating => {
                    self.state = if *first == b'S' { State::Opaque } else { State::Head(0, 0) };
                    read = rest;
                }
                State::Head(0, _) => {
                    self.state = State::Head(1, 0);
                    read = rest;
                }
                State::Head(4, length) => {
                    let length = length << 8 | u32::from(*first);
                    if length > self.largest {
                        return Err(io::Error::other(format!(
                            "it sends a message of {length} bytes, and there is room for {}",
                            self.largest
                        )));
                    }
                    // The length counts itself.
                    let body = length.saturating_sub(4);
                    self.state = if body == 0 { State::Head(0, 0) } else { State::Body(body) };
                    read = rest;
                }
                State::Head(at, length) => {
                    self.state = State::Head(at + 1, length << 8 | u32::from(*first));
                    read = rest;
                }
                State::Body(left) => {
                    let passed = u32::try_from(read.len()).unwrap_or(u32::MAX).min(left);
                    self.state = if passed == left { State::Head(0, 0) } else { State::Body(left - passed) };
                    read = &read[passed as usize..];
                }
            }
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        Poll::Ready(self.look(&buffer.filled()[before..]))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(largest: u32, bytes: &[u8], step: usize) -> bool {
        let mut bounded = Bounded::new((), largest);
        bytes.chunks(step).all(|chunk| bounded.look(chunk).is_ok())
    }

    #[test]
    fn messages_are_measured_however_they_are_cut() {
        let message = |length: u32, body: usize| {
            let mut bytes = vec![b'd'];
            bytes.extend(length.to_be_bytes());
            bytes.resize(bytes.len() + body, 0xff);
            bytes
        };
        let good = [message(4, 0), message(104, 100), message(1_000, 996), message(5, 1)].concat();
        let bad = [message(104, 100), message(1_001, 3)].concat();
        for step in 1..64 {
            assert!(passes(1_000, &good, step), "{step}");
            assert!(!passes(1_000, &bad, step), "{step}");
        }
        let mut asked = Bounded::negotiating((), 10);
        assert!(asked.look(b"S").is_ok() && asked.look(&[0xff; 100]).is_ok());
        let mut refused = Bounded::negotiating((), 10);
        assert!(refused.look(b"N").is_ok() && refused.look(&[0xff; 100]).is_err());
    }
}
