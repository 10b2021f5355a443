//! WebSockets: a handshake with the gevent port, then bytes in both directions. No worker slot is held.

use std::sync::{Arc, PoisonError};

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
        refusal.retry_after = Some(std::time::Duration::from_secs(30));
        return Err(refusal.into());
    };
    let order = request.access.order(request.tenant.slug.as_str()).into_iter().map(|n| &request.access.servers()[n]);
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

async fn relay(request: &Request<'_>, client: &mut Client, server: &mut ServerSession) -> Result<(), Failure> {
    enum From {
        Client(Option<Bytes>),
        Server(Option<Bytes>),
        Draining,
    }
    server.maybe_upgrade_body_writer();
    let limit = request.access.pool.websocket_timeout;
    let patience = request.snapshot.timeouts.write;
    loop {
        let event = async {
            tokio::select! {
                read = client.read_upgraded() => read.map(From::Client),
                read = server.read_body_bytes() => read.map(From::Server),
                () = request.plane.draining.cancelled() => Ok(From::Draining),
            }
        };
        match tokio::time::timeout(limit, event).await.map_err(|_| Failure::Broken)?? {
            From::Client(Some(bytes)) => {
                // Whoever takes nothing for so long is gone, and its place is needed.
                tokio::time::timeout(patience, server.write_body(&bytes)).await.map_err(|_| Failure::Broken)??;
            }
            From::Server(Some(bytes)) => {
                client.write_body(bytes).await?;
            }
            From::Client(None) | From::Server(None) => return Ok(()),
            From::Draining => {
                client.write_body(Bytes::from_static(&GOING_AWAY)).await?;
                client.finish().await?;
                return Ok(());
            }
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
