//! How a server connection is left: after a transaction, and when its client is gone.

use std::sync::atomic::Ordering;
use std::task::Poll;

use cofferdam_tenant::PoolingMode;

use super::{End, RESET_LIMIT, Relay};

impl Relay {
    /// The transaction is over: gives the slot back, and the connection unless the client has state on it.
    pub(super) async fn release(&mut self) -> Result<(), End> {
        self.plane.counters.transactions.fetch_add(1, Ordering::Relaxed);
        self.fences.clear();
        if let Some(limits) = &mut self.limits {
            limits.busy = None;
        }
        self.charge_bytes(0);
        self.work.transactions += 1;
        self.count();
        let route = &self.established.route;
        if self.session.is_pinned() && self.lease.as_ref().is_some_and(|lease| lease.is_of_replica()) {
            let message = format!(
                "cofferdam: {}: session state was left in a transaction that only reads, on a replica, and cannot be kept there",
                route.name
            );
            return Err(End::Fatal { code: "53400", message });
        }
        if self.session.is_pinned() || route.pooling == PoolingMode::Session {
            if self.pin.is_none() {
                let cache = &route.access.cache;
                let Some(pin) = cache.pin(route.account) else {
                    let message = format!(
                        "cofferdam: {}: {} sessions keep a server connection for their session state, the limit; \
                         DISCARD ALL gives one back",
                        route.name,
                        cache.pin_limit()
                    );
                    return Err(End::Fatal { code: "53400", message });
                };
                self.pin = Some(pin);
            }
            self.rest();
            self.permit = None;
            return Ok(());
        }
        self.pin = None;
        let Some(mut leased) = self.lease.take() else { return Ok(()) };
        if !self.established.registration.handle.disowns_at_once() {
            Box::pin(self.established.registration.handle.disowns()).await;
        }
        let clean = leased.upstream.inbound.is_empty() && leased.upstream.outbound.is_empty();
        let needs_reset = self.session.needs_reset() || leased.upstream.backend.is_doubtful();
        self.rest();
        if clean && (!needs_reset || Box::pin(leased.upstream.reset(RESET_LIMIT)).await.is_ok()) {
            self.established.route.pool.give_back(leased);
        }
        self.session.released();
        self.permit = None;
        Ok(())
    }

    /// Lets the server finish what it has been sent by a client that is gone, as it would without a gateway.
    pub(super) async fn finish(&mut self) {
        if self.passing.remaining > 0 {
            return; // the rest of the message will never come
        }
        while self.session.is_waiting_for_server() && !self.session.waits_for_client() {
            let Some(upstream) = self.lease.as_mut().map(|l| &mut l.upstream) else { return };
            let moved = std::future::poll_fn(|cx| {
                if let Poll::Ready(Err(error)) = upstream.stream.poll_drain(cx, &mut upstream.outbound) {
                    return Poll::Ready(Err(error));
                }
                upstream.stream.poll_fill(cx, &mut upstream.inbound)
            });
            match moved.await {
                Ok(n) if n > 0 => {}
                _ => return,
            }
            if self.pump_server().is_err() {
                return;
            }
            self.outbound.clear();
        }
    }

    /// The client is gone: whatever it was doing is stopped, and the connection is reset or closed.
    pub(super) async fn abandon(&mut self) {
        self.charge_bytes(0);
        let Some(mut leased) = self.lease.take() else { return };
        self.established.registration.handle.disowns().await;
        self.rest();
        if self.session.is_at_rest() && self.passing.remaining == 0 && leased.upstream.inbound.is_empty() {
            if leased.upstream.reset(RESET_LIMIT).await.is_ok() {
                self.established.route.pool.give_back(leased);
            }
            return;
        }
        if self.session.is_waiting_for_server() {
            // The server would only notice at its next write. The slot is held until it has been told.
            if let Err(error) = leased.upstream.target.cancel().await {
                tracing::debug!(%error, "the query of a lost client could not be cancelled");
            }
        }
        drop(leased); // closing the connection rolls back
        drop(self.permit.take());
    }
}
