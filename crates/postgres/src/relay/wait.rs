//! Waiting until a socket has something, while writing what is to be written; and for how long.

use std::task::{Context, Poll};

use super::limits::Limit;
use super::{End, Event, HIGH_WATER, INSPECT, Relay};
use crate::stream::put_away;

impl Relay {
    /// Waits until a socket has something, while writing what is to be written.
    pub(super) async fn wait(&mut self) -> Result<Event, End> {
        loop {
            if self.is_unwritten() {
                // The usual case: the socket takes everything, and what is waited for next is the other side.
                let written = std::future::poll_fn(|cx| Poll::Ready(self.client.poll_drain(cx, &mut self.outbound)));
                if let Poll::Ready(Err(_)) = written.await {
                    return Err(End::ClientGone);
                }
            }
            if let Some(upstream) = self.lease.as_mut().map(|l| &mut l.upstream)
                && !upstream.outbound.is_empty()
            {
                // The same; an error shows when the server is read.
                let drain = |cx: &mut Context<'_>| Poll::Ready(upstream.stream.poll_drain(cx, &mut upstream.outbound));
                let _ = std::future::poll_fn(drain).await;
            }
            let unwritten = self.is_unwritten();
            let Some((until, limit)) = self.next_limit(unwritten) else { return self.next_event().await };
            match tokio::time::timeout_at(until, self.next_event()).await {
                Ok(event) => return event,
                // It was written meanwhile: what is waited for is something else now.
                Err(_) if limit == Limit::SlowReader && !self.is_unwritten() => {}
                Err(_) => Box::pin(self.limit_reached(limit)).await?,
            }
        }
    }

    pub(super) async fn next_event(&mut self) -> Result<Event, End> {
        let may_drain = self.permit.is_none() && self.session.is_at_rest();
        std::future::poll_fn(|cx| {
            if self.is_unwritten()
                && let Poll::Ready(Err(_)) = self.client.poll_drain(cx, &mut self.outbound)
            {
                return Poll::Ready(Err(End::ClientGone));
            }
            if self.permit.is_none() {
                put_away(&mut self.outbound);
                put_away(&mut self.inbound);
            }
            let mut server_full = false;
            if let Some(lease) = &mut self.lease {
                let upstream = &mut lease.upstream;
                let was_full = !upstream.outbound.is_empty();
                if (was_full || upstream.stream.is_unflushed())
                    && let Poll::Ready(Err(_)) = upstream.stream.poll_drain(cx, &mut upstream.outbound)
                {
                    // What the server said before it closed is still to be read.
                    upstream.outbound.clear();
                }
                server_full = upstream.outbound.len() >= HIGH_WATER;
                let written = upstream.outbound.is_empty() && !upstream.stream.is_unflushed();
                let is_done = self.permit.is_some() && self.session.is_at_rest() && self.passing.remaining == 0;
                if written && (was_full || is_done) {
                    // What is waited for is something else now: the last that the server does not answer has gone out,
                    // or it is the client's turn.
                    return Poll::Ready(Ok(Event::Client));
                }
                if self.stalled && !server_full {
                    // What the client has sent long ago can go on now.
                    self.stalled = false;
                    return Poll::Ready(Ok(Event::Client));
                }
                if self.outbound.len() < HIGH_WATER {
                    match upstream.stream.poll_fill(cx, &mut upstream.inbound) {
                        Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(End::ServerGone)),
                        Poll::Ready(Ok(n)) => {
                            self.moved += n as u64;
                            self.work.sent += n as u64;
                            return Poll::Ready(Ok(Event::Server));
                        }
                        Poll::Pending => {}
                    }
                }
            }
            if self.session.is_at_rest() && self.server_passing.remaining == 0 && self.outbound.len() < HIGH_WATER {
                match self.poll_notification(cx) {
                    Poll::Ready(true) => return Poll::Ready(Ok(Event::Notification)),
                    Poll::Ready(false) => {
                        let message = "the connection that listened for notifications was lost, or too many waited";
                        return Poll::Ready(Err(End::Fatal { code: "57P01", message: message.to_owned() }));
                    }
                    Poll::Pending => {}
                }
            }
            let client_full = self.outbound.len() >= HIGH_WATER;
            if !server_full && !client_full && !self.held && self.inbound.len() < INSPECT + HIGH_WATER {
                match self.client.poll_fill(cx, &mut self.inbound) {
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(End::ClientGone)),
                    Poll::Ready(Ok(n)) => {
                        self.moved += n as u64;
                        self.work.received += n as u64;
                        return Poll::Ready(Ok(Event::Client));
                    }
                    Poll::Pending => {}
                }
            }
            if may_drain && self.drains.is_none() && self.draining.poll(cx).is_ready() {
                return Poll::Ready(Ok(Event::Draining));
            }
            if may_drain && self.moved_away.poll(&self.established.registration.handle.moved, cx).is_ready() {
                let message =
                    "terminating connection: the database has moved, and notifications may be lost".to_owned();
                return Poll::Ready(Err(End::Fatal { code: "57P01", message }));
            }
            Poll::Pending
        })
        .await
    }

    /// Whether there are bytes that the client's socket has not taken.
    pub(super) fn is_unwritten(&self) -> bool {
        !self.outbound.is_empty() || self.client.is_unflushed()
    }
}
