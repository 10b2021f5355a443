//! Replication connections: bytes from one side to the other, through a server connection of the client's own.
//!
//! What is said on them is not looked at, so they cannot be shared, and they hold no slot: they last for days.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::BytesMut;

use crate::cache::{Leased, Pinned};
use crate::cancel::Registration;
use crate::client::ClientCount;
use crate::plane::PostgresPlane;
use crate::stream::Stream;
use crate::wire::{Reply, Severity};

/// Above this, no more is read for a side that does not take what it has got (rule 8).
const HIGH_WATER: usize = 256 << 10;

/// A client and its server connection.
pub(crate) struct Passage {
    pub(crate) plane: Arc<PostgresPlane>,
    pub(crate) client: Stream,
    /// From the client, for the server.
    pub(crate) inbound: BytesMut,
    pub(crate) leased: Leased,
    pub(crate) registration: Registration,
    pub(crate) _pinned: Pinned,
    pub(crate) _counted: ClientCount,
}

/// Why a passage ends.
enum End {
    OneSideLeft,
    Draining,
}

impl Passage {
    /// Serves until one side leaves, the gateway drains, or an operator wants the client gone.
    pub(crate) async fn run(mut self) {
        let handle = Arc::clone(&self.registration.handle);
        handle.owns(&self.leased.upstream.target);
        let (mut draining, mut killed) = (self.plane.draining.listen(), handle.killed.listen());
        let mut outbound = BytesMut::new();
        let end = std::future::poll_fn(|cx| {
            if draining.poll(cx).is_ready() || killed.poll(cx).is_ready() {
                return Poll::Ready(End::Draining);
            }
            self.poll(cx, &mut outbound).map(|()| End::OneSideLeft)
        })
        .await;
        if matches!(end, End::Draining) {
            // In the middle of a message nothing can be said; the other side sees its connection end.
            let message = "terminating connection due to administrator command";
            if outbound.is_empty() {
                outbound.error(Severity::Fatal, "57P01", message, None);
            }
        }
        let last = self.client.drain(&mut outbound);
        let _ = tokio::time::timeout(std::time::Duration::from_secs(1), last).await;
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
                if (!bytes.is_empty() || stream.is_unflushed())
                    && let Poll::Ready(Err(_)) = stream.poll_drain(cx, bytes)
                {
                    return Poll::Ready(());
                }
            }
            if !moved {
                return Poll::Pending;
            }
        }
    }
}
