//! WebSockets: a handshake with the gevent port, then bytes in both directions. No worker slot is held.

use std::pin::pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use cofferdam_fairness::Class;
use cofferdam_tenant::TenantId;
use pingora_core::protocols::http::v1::client::HttpSession as ServerSession;

use crate::client::Client;
use crate::exchange::{Failure, Outcome};
use crate::headers;
use crate::plane::HttpPlane;
use crate::reply::Refusal;
use crate::request::Request;
use crate::upstream::connect;

/// An unmasked Close frame with code 1001, "going away" (RFC 6455, 7.4.1): browsers come again on their own.
const GOING_AWAY: [u8; 4] = [0x88, 0x02, 0x03, 0xe9];

/// The longest time over which the goodbyes of a drain are spread.
const LONGEST_SPREAD: Duration = Duration::from_secs(15);

/// Serves one WebSocket, or a plain request to the gevent port.
pub(crate) async fn serve(request: &Request<'_>, client: &mut Client) -> Result<Outcome, Failure> {
    request.note(|record| record.class = Some(Class::Websocket));
    let pool = &request.access.pool;
    let upgrade = !client.is_two() && headers::wants_websocket(client.head());
    if !upgrade {
        return Err(Refusal::new(426, "Upgrade required", "this path speaks WebSocket only").into());
    }
    let own = |host: &str| request.snapshot.catalog.by_host(host).is_some_and(|t| t.id == request.tenant.id);
    if !headers::origin_is_own(&client.head().headers, own) {
        return Err(request.forbidden("a page of another site may not open a WebSocket here").into());
    }
    let Some(_counted) = Counted::new(request) else {
        let limit = request.tenant.plan.max_websockets;
        let detail = format!("tenant {}: the limit of {limit} WebSockets is in use", request.tenant.slug);
        let mut refusal = Refusal::new(429, "Too many requests", detail);
        refusal.retry_after = Some(Duration::from_secs(30));
        return Err(refusal.into());
    };
    let mut order: Vec<_> = request.access.order(request.tenant.slug.as_str());
    order.sort_by_key(|n| !request.access.servers()[*n].health.is_well());
    let order = order.into_iter().map(|n| &request.access.servers()[n]);
    let mut server = None;
    for gevent in order.filter_map(|load| load.server.gevent.as_ref()) {
        match connect(gevent, pool.connect_timeout).await {
            Ok(connected) => {
                server = Some(connected);
                break;
            }
            Err(error) => tracing::warn!(pool = %pool.name, server = %gevent, %error, "cannot connect"),
        }
    }
    let Some(mut server) = server else {
        return Err(Refusal::new(503, "Service unavailable", "this site has no WebSocket server").into());
    };
    let head = request.to_server(client.head(), None, true)?;
    let handshake = async {
        server.write_request_header(Box::new(head)).await?;
        loop {
            server.read_response().await?;
            let interim = server.get_status().is_some_and(|s| s.is_informational() && s.as_u16() != 101);
            if !interim {
                return Ok::<(), Box<pingora_error::Error>>(());
            }
        }
    };
    let answered = tokio::time::timeout(pool.connect_timeout, handshake).await;
    if !matches!(answered, Ok(Ok(()))) {
        return Err(Refusal::new(502, "Bad gateway", "the WebSocket server did not answer the handshake").into());
    }
    let Some(head) = server.resp_header() else { return Err(Failure::Broken) };
    let switched = head.status == http::StatusCode::SWITCHING_PROTOCOLS;
    let head = request.to_client(head, client.head().version, false)?;
    client.write_head(head).await?;
    if switched {
        relay(request, client, &mut server).await?;
        return Ok(Outcome::Close);
    }
    loop {
        let read = tokio::time::timeout(pool.read_timeout, server.read_body_bytes()).await;
        let Some(chunk) = read.map_err(|_| Failure::Broken)?? else { break };
        client.write_body(chunk).await?;
    }
    client.finish().await?;
    Ok(Outcome::Done)
}

/// Where the frames of one direction begin and end (RFC 6455, 5.2): a frame of our own must not land inside another.
#[derive(Debug, Default)]
struct Frames {
    /// The head of a frame, as far as it has come.
    head: Vec<u8>,
    /// Bytes of a frame that are still to come behind its head.
    left: u64,
}

impl Frames {
    /// Takes bytes as they pass.
    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let n = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                self.left -= n as u64;
                bytes = &bytes[n..];
                continue;
            }
            self.head.push(bytes[0]);
            bytes = &bytes[1..];
            if let Some(length) = self.length() {
                self.left = length;
                self.head.clear();
            }
        }
    }

    /// The length of the frame, when its head is complete; with a mask, if it has one.
    fn length(&self) -> Option<u64> {
        let second = *self.head.get(1)?;
        let mask = if second & 0x80 != 0 { 4 } else { 0 };
        let (extended, length) = match second & 0x7f {
            126 => (2, self.head.get(2..4).map(|b| b.iter().fold(0, |n, b| n << 8 | u64::from(*b)))?),
            127 => (8, self.head.get(2..10).map(|b| b.iter().fold(0, |n, b| n << 8 | u64::from(*b)))?),
            short => (0, u64::from(short)),
        };
        (self.head.len() == 2 + extended).then(|| length.saturating_add(mask))
    }

    fn is_between(&self) -> bool {
        self.left == 0 && self.head.is_empty()
    }
}

/// When a WebSocket is told to come again while the plane drains: not all at once, or all would come again at once.
fn turn(request: &Request<'_>) -> Duration {
    let spread = (request.snapshot.catalog.drain_timeout / 4).min(LONGEST_SPREAD);
    let lot = u64::from_str_radix(&request.id, 16).unwrap_or(0) % 1_000;
    spread.mul_f64(lot as f64 / 1e3)
}

async fn relay(request: &Request<'_>, client: &mut Client, server: &mut ServerSession) -> Result<(), Failure> {
    enum From {
        Client(Option<Bytes>),
        Server(Option<Bytes>),
        Draining,
    }
    server.maybe_upgrade_body_writer();
    let limit = request.access.pool.websocket_timeout;
    let patience = request.snapshot.timeouts.write;
    let mut frames = Frames::default();
    let mut goes = pin!(async {
        request.plane.draining.cancelled().await;
        tokio::time::sleep(turn(request)).await;
    });
    let mut is_due = false;
    loop {
        if is_due && frames.is_between() {
            client.write_body(Bytes::from_static(&GOING_AWAY)).await?;
            client.finish().await?;
            return Ok(());
        }
        let event = async {
            tokio::select! {
                read = client.read_upgraded() => read.map(From::Client),
                read = server.read_body_bytes() => read.map(From::Server),
                () = &mut goes, if !is_due => Ok(From::Draining),
            }
        };
        match tokio::time::timeout(limit, event).await.map_err(|_| Failure::Broken)?? {
            From::Client(Some(bytes)) => {
                // Whoever takes nothing for so long is gone, and its place is needed.
                tokio::time::timeout(patience, server.write_body(&bytes)).await.map_err(|_| Failure::Broken)??;
            }
            From::Server(Some(bytes)) => {
                frames.pass(&bytes);
                client.write_body(bytes).await?;
            }
            From::Client(None) | From::Server(None) => return Ok(()),
            From::Draining => is_due = true,
        }
    }
}

/// Counts one WebSocket of a tenant as long as it lives.
struct Counted {
    plane: Arc<HttpPlane>,
    tenant: TenantId,
}

impl Counted {
    fn new(request: &Request<'_>) -> Option<Self> {
        let mut open = request.plane.websockets.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(request.tenant.id).or_default();
        if *count >= request.tenant.plan.max_websockets {
            return None;
        }
        *count += 1;
        drop(open);
        Some(Self { plane: Arc::clone(request.plane), tenant: request.tenant.id })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut open = self.plane.websockets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However frames are cut into reads, it is known where one ends.
        #[test]
        fn the_end_of_each_frame_is_known(
            lengths in prop::collection::vec(prop_oneof![0usize..300, Just(125), Just(126), Just(65_535), Just(65_536)], 1..6),
            cut in 1usize..5_000,
        ) {
            let (mut bytes, mut ends) = (Vec::new(), vec![0]);
            for (n, length) in lengths.iter().enumerate() {
                let mask = if n % 2 == 0 { 0x80 } else { 0 };
                bytes.push(0x82);
                match *length {
                    short @ 0..126 => bytes.push(mask + short as u8),
                    middle @ 126..65_536 => {
                        bytes.push(mask + 126);
                        bytes.extend_from_slice(&(middle as u16).to_be_bytes());
                    }
                    long => {
                        bytes.push(mask + 127);
                        bytes.extend_from_slice(&(long as u64).to_be_bytes());
                    }
                }
                bytes.resize(bytes.len() + length + if mask == 0 { 0 } else { 4 }, 0x82);
                ends.push(bytes.len());
            }
            let (mut frames, mut at) = (Frames::default(), 0);
            for part in bytes.chunks(cut) {
                frames.pass(part);
                at += part.len();
                prop_assert_eq!(frames.is_between(), ends.contains(&at), "{} of {:?}", at, ends);
            }
        }
    }
}
