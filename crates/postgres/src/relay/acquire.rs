//! What a transaction needs before it begins: that nobody has paused its database, a slot, a server connection.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use cofferdam_fairness::Class;
use cofferdam_tenant::PoolingMode;
use tokio::time::Instant;

use super::{End, Passing, Relay, Slot, shutting_down};
use crate::cache::{CROWDED, LeaseError, Leased, Pool};
use crate::client::describe;
use crate::stream::Stream;
use crate::wire::{Frame, Side, cstr, frame};

/// Bytes of a client that are read ahead while it waits for a slot.
const READ_AHEAD: usize = 64 << 10;

/// The last message of a client that leaves in peace.
const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

impl Relay {
    /// Waits until an operator lets transactions of this database begin, and follows the catalog.
    pub(super) async fn ready_to_begin(&mut self) -> Result<Result<(), (String, String)>, End> {
        if self.plane.pauses.is_paused(self.established.database())
            && let Err(refusal) = Box::pin(self.resumed()).await?
        {
            return Ok(Err(refusal));
        }
        if !self.plane.is_current(&self.snapshot) {
            self.follow_catalog()?;
        }
        Ok(Ok(()))
    }

    /// Gets a slot, and a server connection if there is none. A refusal goes to the client and is no error here.
    pub(super) async fn acquire(&mut self, kind: u8) -> Result<(), End> {
        let (mut given_up, mut replicas) = (None, true);
        if self.lease.as_ref().is_some_and(|lease| lease.is_at_a_former_primary()) {
            // Its state is there, and nothing may be written there.
            let message = "terminating connection: the database has another primary now".to_owned();
            return Err(End::Fatal { code: "57P01", message });
        }
        loop {
            // Who has a connection goes on: PAUSE waits for that.
            if self.lease.is_none()
                && let Err((code, message)) = self.ready_to_begin().await?
            {
                self.refuse(kind, &code, &message);
                return Ok(());
            }
            // Rule 22: the slot first, just before use; a connection that had to be opened is opened with it.
            match self.slot().await? {
                Ok(permit) => self.permit = Some(permit),
                Err((code, message)) => {
                    self.refuse(kind, &code, &message);
                    return Ok(());
                }
            }
            if let Some(lease) = &self.lease {
                self.established.registration.handle.owns(&lease.upstream.target);
                if self.session.take_nameless() {
                    self.name_connection();
                }
                self.prioritise();
                return Ok(());
            }
            let replica = if replicas { self.replicas_for(kind) } else { None };
            let pool = replica.as_ref().unwrap_or(&self.established.route.pool);
            let leased = match pool.take(self.session.name(), self.session.settings().digest()) {
                Some(leased) => Ok(leased),
                // Boxed, as all that happens rarely: an idle client pays for the largest of its futures.
                None => Box::pin(self.connection(replica.as_deref())).await?,
            };
            let leased = match leased {
                Ok(leased) => leased,
                Err(Some(error)) if replica.is_some() => {
                    // The primary serves it too.
                    tracing::debug!(%error, "no connection to a replica");
                    (self.permit, replicas) = (None, false);
                    continue;
                }
                Err(Some(error)) if error.is_temporary() => {
                    // Rule 22: whoever waits for a server holds no slot meanwhile.
                    self.permit = None;
                    let wait = self.established.route.access.cache.cluster().reconnect_wait;
                    let until =
                        *given_up.get_or_insert_with(|| Instant::now() + wait.min(self.established.route.max_wait));
                    let pause = if error.is_crowded() { CROWDED } else { Duration::ZERO };
                    match Box::pin(self.reachable(pause, until)).await? {
                        Some(true) => continue,
                        Some(false) => {
                            let (code, message) = describe(&error);
                            self.refuse(kind, &code, &message);
                        }
                        None => {
                            let (code, message) = cancelled("a database server");
                            self.refuse(kind, &code, &message);
                        }
                    }
                    return Ok(());
                }
                Err(error) => {
                    self.permit = None;
                    let (code, message) = error.map_or_else(|| cancelled("a server connection"), |e| describe(&e));
                    self.refuse(kind, &code, &message);
                    return Ok(());
                }
            };
            // Seen by PAUSE from here on; and if it came before, it has the last word.
            let handle = &self.established.registration.handle;
            handle.owns(&leased.upstream.target);
            if !self.plane.pauses.is_paused(self.established.database()) {
                self.take_over(leased);
                return Ok(());
            }
            handle.disowns().await;
            self.established.route.pool.give_back(leased);
            self.permit = None;
        }
    }

    /// The connections to replicas, when the client's next transaction says that it only reads and there is one.
    fn replicas_for(&self, kind: u8) -> Option<Arc<Pool>> {
        let route = &self.established.route;
        // What comes in one batch with it, by the extended protocol, may be anything.
        let may = kind == b'Q' && route.pooling == PoolingMode::Transaction;
        if !may || !route.access.cache.servers().has_replica() {
            return None;
        }
        let text = match frame(Side::Client, &self.inbound) {
            Ok(Some(f)) => self.inbound.get(Frame::HEADER..f.total).unwrap_or_default(),
            _ => &[],
        };
        let text = cstr(text).map_or(text, |(text, _)| text);
        crate::sql::begins_read_only(text).then(|| route.pool.of_replicas())
    }

    /// Waits until a server can be tried again: false when it takes too long, `None` when the client cancels.
    async fn reachable(&mut self, pause: Duration, until: Instant) -> Result<Option<bool>, End> {
        let handle = Arc::clone(&self.established.registration.handle);
        handle.forget_stale();
        handle.waits(true);
        let _waiting = Waiting(&handle);
        let (servers, draining) =
            (Arc::clone(self.established.route.access.cache.servers()), Arc::clone(&self.plane.draining));
        let tried = Box::pin(async move {
            tokio::select! {
                () = async { tokio::time::sleep(pause).await; servers.worth_trying().await } => Ok(true),
                () = tokio::time::sleep_until(until) => Ok(false),
                // It has begun nothing: a successor, if there is one, waits as long as it takes.
                () = draining.given() => Err(shutting_down()),
            }
        });
        let (client, inbound) = (&mut self.client, &mut self.inbound);
        unless_client_leaves(tried, client, inbound, &mut self.moved, &handle).await?.transpose()
    }

    /// Waits until an operator lets transactions of this database begin again.
    pub(super) async fn resumed(&mut self) -> Result<Result<(), (String, String)>, End> {
        let handle = Arc::clone(&self.established.registration.handle);
        handle.forget_stale();
        handle.waits(true);
        let _waiting = Waiting(&handle);
        let (plane, draining) = (Arc::clone(&self.plane), Arc::clone(&self.plane.draining));
        let database = self.established.database().to_owned();
        let resumed = Box::pin(async move {
            tokio::select! {
                () = plane.pauses.resumed(&database) => true,
                () = draining.given() => false,
            }
        });
        let (client, inbound) = (&mut self.client, &mut self.inbound);
        match unless_client_leaves(resumed, client, inbound, &mut self.moved, &handle).await? {
            Some(true) => Ok(Ok(())),
            Some(false) => Err(shutting_down()),
            None => Ok(Err(cancelled("the database to be resumed"))),
        }
    }

    /// A server connection that may have to be opened, to a replica if one is given; or why there is none: nothing when the
    /// client cancels.
    pub(super) async fn connection(
        &mut self,
        replica: Option<&Pool>,
    ) -> Result<Result<Box<Leased>, Option<LeaseError>>, End> {
        let route = &self.established.route;
        let pool = replica.unwrap_or(&route.pool);
        let handle = Arc::clone(&self.established.registration.handle);
        let lease = Box::pin(pool.lease(self.session.name(), self.session.settings().digest(), route.max_wait));
        handle.forget_stale();
        handle.waits(true);
        let _waiting = Waiting(&handle);
        let outcome =
            unless_client_leaves(lease, &mut self.client, &mut self.inbound, &mut self.moved, &handle).await?;
        Ok(outcome.map_or(Err(None), |leased| leased.map_err(Some)))
    }

    /// A slot, or the error for the client. Ends early when the client leaves or cancels.
    pub(super) async fn slot(&mut self) -> Result<Result<Slot, (String, String)>, End> {
        let route = &self.established.route;
        let process = self.established.process.as_ref();
        let (class, max_wait) = match process {
            Some(p) if p.is_cron() => (Class::Background, route.background_wait),
            _ => (route.class, route.max_wait),
        };
        let gate = &route.access.gate;
        let mut acquire = if process.is_some_and(|p| p.holds(route.account)) {
            gate.acquire_nested(route.account, class, max_wait)
        } else {
            gate.acquire(route.account, class, max_wait)
        };
        // The usual case: a slot is free.
        let first = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut acquire).poll(cx))).await;
        let outcome = match first {
            Poll::Ready(outcome) => outcome,
            Poll::Pending => {
                let handle = Arc::clone(&self.established.registration.handle);
                handle.forget_stale();
                handle.waits(true);
                let _waiting = Waiting(&handle);
                let begun = Instant::now();
                let waited = {
                    let in_time = Box::pin(tokio::time::timeout(max_wait, &mut acquire));
                    let (client, inbound) = (&mut self.client, &mut self.inbound);
                    Box::pin(unless_client_leaves(in_time, client, inbound, &mut self.moved, &handle)).await?
                };
                self.work.wait_us += begun.elapsed().as_micros() as u64;
                match waited {
                    Some(Ok(outcome)) => outcome,
                    Some(Err(_)) => acquire.give_up(),
                    None => return Ok(Err(cancelled("a slot"))),
                }
            }
        };
        Ok(outcome
            .map(|permit| Slot {
                until: self.limits.as_ref().and_then(|limits| Some(Instant::now() + limits.transaction?)),
                permit,
                _holding: process.map(|p| p.hold(route.account)),
                working: None,
            })
            .map_err(|rejection| ("XX000".into(), route.refusal(&rejection))))
    }

    pub(super) fn refuse(&mut self, kind: u8, code: &str, message: &str) {
        self.plane.counters.refused.fetch_add(1, Ordering::Relaxed);
        self.is_subscribed = false;
        self.fences.clear();
        tracing::debug!(account = %self.established.route.name, code, "statement refused");
        self.session.refuse(kind, code, message, &mut self.outbound);
        if let Ok(Some(header)) = frame(Side::Client, &self.inbound) {
            self.passing = Passing { remaining: header.total, forward: false };
        }
    }
}

/// Waits for something on behalf of a client, reading ahead a little; `None` when the client cancels.
pub(crate) async fn unless_client_leaves<T>(
    mut work: Pin<Box<impl Future<Output = T>>>,
    client: &mut Stream,
    inbound: &mut BytesMut,
    moved: &mut u64,
    handle: &crate::cancel::CancelHandle,
) -> Result<Option<T>, End> {
    // Who has said goodbye waits for nothing, and still has what it sent before done.
    let mut said_goodbye = false;
    loop {
        let read_ahead = inbound.len() < READ_AHEAD && !said_goodbye;
        tokio::select! {
            biased;
            outcome = work.as_mut() => return Ok(Some(outcome)),
            () = handle.waiting_cancelled.notified() => return Ok(None),
            read = client.fill(inbound), if read_ahead => match read {
                Ok(n) if n > 0 => *moved += n as u64,
                Ok(_) if inbound.ends_with(&TERMINATE) => said_goodbye = true,
                _ => return Err(End::ClientGone),
            },
        }
    }
}

pub(super) fn cancelled(waiting_for: &str) -> (String, String) {
    ("57014".into(), format!("canceling statement due to user request, while waiting for {waiting_for}"))
}

/// Resets the "waiting for a slot" mark however the wait ends.
pub(super) struct Waiting<'a>(pub(super) &'a crate::cancel::CancelHandle);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waits(false);
    }
}
