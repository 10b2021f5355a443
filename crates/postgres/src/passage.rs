//! Replication connections: bytes from one side to the other, through a server connection of the client's own.
//!
//! What is said on them is not looked at, so they cannot be shared, and they hold no slot: they last for days.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;

use crate::cache::{Leased, Pinned};
use crate::cancel::Registration;
use crate::plane::PostgresPlane;
use crate::route::ClientCount;
use crate::signal::Ear;
use crate::stream::Stream;

/// Above this, no more is read for a side that does not take what it has got (rule 8).
const HIGH_WATER: usize = 256 << 10;

/// A client and its server connection.
pub(crate) struct Passage {
    pub(crate) plane: Arc<PostgresPlane>,
    pub(crate) client: Stream,
    /// From the client, for the server.
    pub(crate) inbound: BytesMut,
    pub(crate) leased: Box<Leased>,
    pub(crate) registration: Registration,
    pub(crate) _pinned: Pinned,
    pub(crate) _counted: ClientCount,
}

impl Passage {
    /// Serves until one side leaves, the gateway drains, or an operator wants the client gone.
    pub(crate) async fn run(mut self) {
        let handle = Arc::clone(&self.registration.handle);
        handle.owns(&self.leased.upstream.target);
        let (mut draining, mut ear) = (self.plane.draining.listen(), Ear::default());
        let mut outbound = BytesMut::new();
        // Nothing is said at the end: what has been passed on may have stopped in the middle of a message.
        std::future::poll_fn(|cx| match self.poll(cx, &mut outbound) {
            Poll::Pending if draining.poll(cx).is_pending() && ear.poll(&handle.killed, cx).is_pending() => {
                Poll::Pending
            }
            _ => Poll::Ready(()),
        })
        .await;
        let last = self.client.drain(&mut outbound);
        let _ = tokio::time::timeout(Duration::from_secs(1), last).await;
        handle.disowns().await;
    }

    /// Moves what can be moved; ready when a side has left.
    fn poll(&mut self, cx: &mut Context<'_>, outbound: &mut BytesMut) -> Poll<()> {
        let server = &mut self.leased.upstream.stream;
        loop {
            let mut moved = false;
            if self.inbound.len() < HIGH_WATER
                && let Poll::Ready(read) = self.client.poll_fill(cx, &mut self.inbound)
            {
                match read {
                    Ok(n) if n > 0 => moved = true,
                    _ => return Poll::Ready(()),
                }
            }
            if outbound.len() < HIGH_WATER
                && let Poll::Ready(read) = server.poll_fill(cx, outbound)
            {
                match read {
                    Ok(n) if n > 0 => moved = true,
                    _ => return Poll::Ready(()),
                }
            }
            for (stream, bytes) in [(&mut *server, &mut self.inbound), (&mut self.client, &mut *outbound)] {
                if bytes.is_empty() && !stream.is_unflushed() {
                    continue;
                }
                // Room again is a reason to read again.
                let was_full = bytes.len() >= HIGH_WATER;
                if let Poll::Ready(Err(_)) = stream.poll_drain(cx, bytes) {
                    return Poll::Ready(());
                }
                moved |= was_full && bytes.len() < HIGH_WATER;
            }
            if !moved {
                return Poll::Pending;
            }
        }
    }
}
