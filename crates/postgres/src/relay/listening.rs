//! Notifications: what a client listens to, and what it hears.

use std::sync::Arc;
use std::task::{Context, Poll};

use cofferdam_tenant::PoolingMode;

use super::acquire::{Waiting, cancelled, unless_client_leaves};
use super::{End, Relay};
use crate::client::{Established, describe};
use crate::listener::{ListenError, notification};
use crate::notify::{Visible, hears_all, visible};
use crate::plane::Snapshot;
use crate::session::Session;
use crate::wire::{Frame, Reply};

impl Relay {
    /// Passes on a notification that the client may see; false when there will be no more.
    pub(super) fn poll_notification(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let Some(subscription) = &mut self.subscription else { return Poll::Pending };
        loop {
            match subscription.poll(cx) {
                Poll::Ready(Some(message)) => {
                    let Some((channel, payload)) = notification(&message) else { continue };
                    if !self.session.listening().contains(channel) {
                        continue;
                    }
                    match visible(&self.plane, &self.established, channel, payload) {
                        Visible::All => self.outbound.extend_from_slice(&message),
                        Visible::Part(payload) => self.outbound.message(b'A', |b| {
                            b.extend_from_slice(&message[Frame::HEADER..Frame::HEADER + 4]);
                            for text in [channel, &payload] {
                                b.extend_from_slice(text.as_bytes());
                                b.extend_from_slice(&[0]);
                            }
                        }),
                        Visible::Nothing => continue,
                    }
                    return Poll::Ready(true);
                }
                Poll::Ready(None) => return Poll::Ready(false),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Subscribes to a channel before the client is told that it listens; whether that holds shows when its transaction
    /// ends.
    pub(super) async fn listen(&mut self, channel: &str) -> Result<Result<(), (String, String)>, End> {
        if self.lease.is_none()
            && let Err(refusal) = self.ready_to_begin().await?
        {
            return Ok(Err(refusal));
        }
        let handle = Arc::clone(&self.established.registration.handle);
        let (route, subscription) = (&self.established.route, &mut self.subscription);
        let work = async move {
            // A listening connection may end just when somebody wants it.
            for _ in 0..3 {
                if subscription.is_none() {
                    let joined = route.access.cache.listeners().join(&route.pool, route.max_wait).await?;
                    *subscription = Some(Box::new(joined));
                }
                let Some(known) = subscription else { continue };
                match known.listen(channel).await {
                    Err(ListenError::Lost) if !known.listens_to_any() => *subscription = None,
                    other => return other,
                }
            }
            Err(ListenError::Lost)
        };
        let work = Box::pin(tokio::time::timeout(route.max_wait, work));
        handle.forget_stale();
        handle.waits(true);
        let _waiting = Waiting(&handle);
        let outcome = unless_client_leaves(work, &mut self.client, &mut self.inbound, &mut self.moved, &handle).await?;
        Ok(match outcome {
            Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(ListenError::Lease(error)))) => Err(describe(&error)),
            Some(Ok(Err(ListenError::Refused(code, message)))) => Err((code, message)),
            Some(Ok(Err(ListenError::Lost)) | Err(_)) => {
                Err(("08006".into(), "cofferdam: cannot listen now; try again".into()))
            }
            None => Err(cancelled("a connection that listens")),
        })
    }
}

/// How a session hears of notifications: through the shared connection, if it pools transactions and reads UTF-8.
pub(super) fn hearing(session: &mut Session, snapshot: &Snapshot, established: &Established) {
    let encoding = established.requested().settings.get("client_encoding").map(|e| e.to_ascii_lowercase());
    let is_utf8 = encoding.is_none_or(|e| matches!(e.trim_matches('\''), "utf8" | "utf-8" | "unicode" | "auto"));
    session.share_listener(is_utf8 && established.route.pooling == PoolingMode::Transaction);
    session.be_deaf(!hears_all(snapshot, established));
}
