//! What can be said about a request from its head alone: whose it is, who sent it, and whether it may go on.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use cofferdam_fairness::Class;
use cofferdam_tenant::{DatabaseName, InternalRouteConfig, Network, Tenant, normalize_host};
use http::{HeaderValue, Method, Version, header};
use pingora_error::Result as HeaderResult;
use pingora_http::{RequestHeader, ResponseHeader};

use crate::access::Record;
use crate::boundary::{self, Carrier, Denied};
use crate::cache::{self, Validators};
use crate::client::Client;
use crate::connection::{Connection, MAX_HEADER};
use crate::headers::{self, Forwarded};
use crate::plane::{HttpPlane, Snapshot};
use crate::policy::{self, Choice};
use crate::pool::PoolAccess;
use crate::reply::Refusal;
use crate::route::{self, Route};
use crate::session;
use crate::trace::{self, Trace};

const NO_PATH: &str = "the request target is no path";

/// A judged request.
pub(crate) struct Request<'a> {
    pub(crate) plane: &'a Arc<HttpPlane>,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) tenant: &'a Arc<Tenant>,
    pub(crate) access: &'a Arc<PoolAccess>,
    /// Who sent it, as far as the proxies in between can be believed.
    pub(crate) client: IpAddr,
    /// How the client reached the first of us.
    pub(crate) scheme: &'static str,
    pub(crate) host: String,
    /// The path in its canonical form.
    pub(crate) path: String,
    pub(crate) id: String,
    /// Whether one of the pool's own workers calls back.
    pub(crate) from_workers: bool,
    pub(crate) trace: Trace,
    /// Whether its spans are sent.
    pub(crate) is_recorded: bool,
    /// Which of two pools it goes to, where there are two.
    choice: Option<Choice>,
    record: Mutex<Record>,
    /// Set when the answer is to be kept: with what the server is asked in the place of the client's own conditions.
    validators: OnceLock<Validators>,
}

/// Whom a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// A worker; and how the body may name a database.
    Worker(Class, Carrier),
    /// The gevent port.
    Websocket,
}

/// Everything that can be said about a request from its head alone.
pub(crate) fn judge<'a>(
    plane: &'a Arc<HttpPlane>,
    snapshot: &'a Snapshot,
    client: &mut Client,
    connection: &Connection,
    id: &str,
) -> Result<Request<'a>, Refusal> {
    let length = client.head_length();
    if length > MAX_HEADER {
        return Err(header_too_large(MAX_HEADER as u64));
    }
    let is_two = client.is_two();
    let head = client.head_mut();
    if head.method == Method::CONNECT || head.method == Method::TRACE {
        return Err(Refusal::new(405, "Method not allowed", "this method is not served here").closing());
    }
    if head.headers.get_all(header::CONTENT_TYPE).iter().count() > 1 {
        // Servers take the last, and it decides how the body is read.
        return Err(Refusal::new(400, "Bad request", "Content-Type twice").closing());
    }
    if head.headers.get(header::TRANSFER_ENCODING).is_some_and(|v| !v.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        let detail = "a transfer coding other than `chunked` is not understood here";
        return Err(Refusal::new(501, "Not implemented", detail).closing());
    }
    let is_blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    if is_two && head.headers.values().any(|v| is_blank(v.as_bytes().first()) || is_blank(v.as_bytes().last())) {
        // Malformed in HTTP/2 (RFC 9113, 8.2.1), and something else to whoever trims it.
        return Err(Refusal::new(400, "Bad request", "a header field begins or ends with a blank").closing());
    }
    let host_header = head.headers.get(header::HOST).and_then(|h| h.to_str().ok());
    // HTTP/2 says it in `:authority`; pingora has compared the two where both are there.
    let authority = || head.uri.authority().filter(|_| is_two).map(http::uri::Authority::as_str);
    let host_header = host_header.or_else(authority).unwrap_or_default().to_owned();
    let Some(host) = headers::host_of(&host_header) else {
        return Err(Refusal::new(400, "Bad request", "the Host header is missing or malformed").closing());
    };
    if !head.raw_path().starts_with(b"/") {
        // The absolute form, whose authority pingora has compared with Host. Servers get the usual form.
        let raw = head.raw_path().to_ascii_lowercase();
        let absolute = raw.starts_with(b"http://") || raw.starts_with(b"https://");
        let path = head.uri.path_and_query().cloned().filter(|p| absolute && p.as_str().starts_with('/'));
        let Some(path) = path else {
            return Err(Refusal::new(400, "Bad request", NO_PATH).closing());
        };
        head.set_uri(path.into());
    }
    if !head.raw_path().is_ascii() {
        // What curl sends as it is typed, servers get as browsers send it.
        let encoded = encoded(head.raw_path());
        let uri = encoded.parse().map_err(|_| Refusal::new(400, "Bad request", NO_PATH).closing())?;
        head.set_uri(uri);
    }
    // Odoo compares hosts with care for case: it gets the name as the catalog knows it.
    let known = normalize_host(host).map(|name| format!("{name}{}", host_header[host.len()..].trim_end_matches(':')));
    let Some(tenant) = snapshot.catalog.by_host(host) else {
        plane.counters.unknown_host.fetch_add(1, Ordering::Relaxed);
        return Err(Refusal::new(421, "Misdirected request", "no site is served under this name here"));
    };
    let lot = plane.run ^ u64::from_str_radix(id, 16).unwrap_or(0);
    let choice = tenant.canary.as_ref().map(|canary| policy::choose(canary, &head.headers, lot));
    let Some(access) = snapshot.pool(tenant, choice.is_some_and(|choice| choice.canary)) else {
        return Err(Refusal::new(503, "Service unavailable", "this site has no servers"));
    };
    let forwarded = headers::client_of(&head.headers, connection.peer.ip(), |address| snapshot.trusts(address));
    let (client, scheme) = forwarded.map_err(|m| Refusal::new(400, "Bad request", m.0).closing())?;
    let scheme = scheme.unwrap_or(if connection.is_tls { "https" } else { snapshot.scheme });
    let plan = &tenant.plan;
    if length as u64 > plan.max_header {
        return Err(header_too_large(plan.max_header));
    }
    if head.raw_path().len() as u64 > plan.max_url {
        let detail = format!("the request target has more than {} bytes", plan.max_url);
        return Err(Refusal::new(414, "URI too long", detail).closing());
    }
    if head.raw_path().starts_with(b"//") {
        // Some servers take what follows for a host.
        let from = head.raw_path().iter().position(|b| *b != b'/').unwrap_or(head.raw_path().len());
        let target = format!("/{}", String::from_utf8_lossy(&head.raw_path()[from..]));
        head.set_uri(target.parse().map_err(|_| Refusal::new(400, "Bad request", NO_PATH).closing())?);
    }
    let target = String::from_utf8_lossy(head.raw_path());
    let path = route::canonical(&target).into_owned();
    if route::has_dots(&target) {
        // Browsers resolve them before they ask; servers of Odoo's kind do not.
        return Err(Refusal::new(400, "Bad request", "the request target has a segment of dots").closing());
    }
    let mut trace = Trace::of(&head.headers, plane.run, id);
    // A browser that says so is not believed: anybody could have everything recorded.
    let is_recorded = snapshot.spans.as_ref().is_some_and(|spans| {
        trace.is_recorded() && spans.believes(connection.peer.ip()) || spans.chooses(trace.number())
    });
    if is_recorded {
        trace.record();
    }
    let request = Request {
        plane,
        snapshot,
        tenant,
        access,
        client,
        scheme,
        host: known.unwrap_or_default(),
        path,
        id: id.to_owned(),
        from_workers: Network::any(&access.pool.workers_from, client),
        trace,
        is_recorded,
        choice,
        record: Mutex::default(),
        validators: OnceLock::new(),
    };
    Ok(request)
}

/// A target with what is not ASCII in it encoded.
fn encoded(target: &[u8]) -> String {
    let mut out = String::with_capacity(target.len() + 16);
    for byte in target {
        if byte.is_ascii() {
            out.push(char::from(*byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn header_too_large(limit: u64) -> Refusal {
    let detail = format!("the request header has more than {limit} bytes");
    Refusal::new(431, "Request header too large", detail).closing()
}

impl Request<'_> {
    /// What an authority for certificates asks for, when it does: nothing of the site is shown, so it may come from anywhere and in plain.
    pub(crate) async fn acme_authorization(&self, head: &RequestHeader) -> Option<String> {
        let token = self.path.strip_prefix("/.well-known/acme-challenge/")?;
        let acme = self.snapshot.acme.as_ref().filter(|_| matches!(head.method, Method::GET | Method::HEAD))?;
        acme.authorization(headers::host_of(&self.host)?, token).await
    }

    /// Whom the request is for, or why it may not go on.
    pub(crate) fn asked(&self, head: &RequestHeader, connection: &Connection) -> Result<Asked, Refusal> {
        if self.snapshot.redirect && self.scheme != "https" && !self.from_workers {
            let target = String::from_utf8_lossy(head.raw_path());
            // Another port than ours is none of the client's.
            let host = headers::host_of(&self.host).unwrap_or_default();
            return Err(Refusal::moved(format!("https://{host}{target}")));
        }
        if let Some(wanted) = &self.tenant.tls.client_ca
            && connection.client_ca.as_deref() != Some(wanted)
            && !self.from_workers
        {
            return Err(Refusal::new(
                421,
                "Misdirected request",
                "this connection has shown no certificate for this site",
            ));
        }
        if !self.from_workers && !self.tenant.networks.admits(self.client) {
            return Err(self.forbidden("this site is not served to your address"));
        }
        for closed in [&self.tenant.maintenance_mode, &self.access.pool.maintenance_mode].into_iter().flatten() {
            if !self.from_workers && !Network::any(&closed.allow, self.client) {
                return Err(Refusal::maintenance(closed));
            }
        }
        let route = match route::route_canonical(&self.path) {
            Route::Closed if self.is_opened() => Route::Worker(Class::Admin),
            route => route,
        };
        let database = self.tenant.database.as_ref().map(DatabaseName::as_str);
        if let Some(at) = head.raw_path().iter().position(|b| *b == b'?') {
            let query = &head.raw_path()[at + 1..];
            boundary::check_query(&self.path, query, database).map_err(|denied| self.denied(denied))?;
        }
        match route {
            Route::Closed => {
                self.plane.counters.denied.fetch_add(1, Ordering::Relaxed);
                Err(Refusal::new(404, "Not found", "there is no such page"))
            }
            Route::Websocket => Ok(Asked::Websocket),
            Route::Worker(class) => match boundary::carrier(&self.path) {
                Ok(carrier) => Ok(Asked::Worker(class, carrier)),
                Err(denied) => Err(self.denied(denied)),
            },
        }
    }

    /// Whether this client may use the closed route that it asks for.
    fn is_opened(&self) -> bool {
        let opens = |opened: &InternalRouteConfig| {
            route::is_below(&self.path, &opened.path) && Network::any(&opened.from, self.client)
        };
        self.tenant.internal_routes.iter().any(opens)
    }

    /// What its answer is kept under, if it is one that may be.
    pub(crate) fn cache_key(&self, head: &RequestHeader) -> Option<cache::Key> {
        cache::key(head, &self.path, self.scheme, &self.host, self.tenant.id, &self.access.pool)
    }

    /// What is kept that a request changes: it is not right any more when it succeeds (RFC 9111, 4.4).
    pub(crate) fn changed_key(&self, head: &RequestHeader) -> Option<cache::Key> {
        if head.method.is_safe() {
            return None;
        }
        cache::key_of_target(head, &self.path, self.scheme, &self.host, self.tenant.id, &self.access.pool)
    }

    /// The answer is to be kept, and has to come whole.
    pub(crate) fn fetches(&self, validators: Validators) {
        let _ = self.validators.set(validators);
    }

    /// What is known of the request so far.
    pub(crate) fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note(&self, note: impl FnOnce(&mut Record)) {
        note(&mut self.record());
    }

    /// Something that an operator wants to know of.
    pub(crate) fn audit(&self, reason: &str) {
        tracing::warn!(
            target: "cofferdam::audit",
            tenant = %self.tenant.slug,
            client = %self.client,
            path = ?self.path,
            request_id = %self.id,
            "{reason}",
        );
    }

    /// Somebody tries to reach what is not theirs.
    pub(crate) fn forbidden(&self, detail: &str) -> Refusal {
        self.plane.counters.denied.fetch_add(1, Ordering::Relaxed);
        self.audit(detail);
        Refusal::new(403, "Forbidden", detail)
    }

    /// A login that has to wait.
    pub(crate) fn too_many_logins(&self, wait: Duration) -> Refusal {
        self.plane.counters.denied.fetch_add(1, Ordering::Relaxed);
        self.audit("a login is kept waiting after too many that have failed");
        let detail = format!("too many logins have failed; the next can be tried in {} s", wait.as_secs().max(1));
        let mut refusal = Refusal::new(429, "Too many requests", detail);
        refusal.retry_after = Some(wait);
        refusal
    }

    /// The refusal of a request that names what is not its tenant's.
    pub(crate) fn denied(&self, denied: Denied) -> Refusal {
        let refusal = self.forbidden(&denied.to_string());
        let (status, title) = match denied {
            Denied::Unreadable(_) => (400, "Bad request"),
            Denied::MediaType => (415, "Unsupported media type"),
            _ => return refusal,
        };
        Refusal { status, title, ..refusal }
    }

    /// The head that goes to the server. `length` is the body's, if there is a body.
    pub(crate) fn to_server(
        &self,
        head: &RequestHeader,
        length: Option<u64>,
        upgrade: bool,
    ) -> HeaderResult<RequestHeader> {
        let about = Forwarded {
            client: self.client,
            scheme: self.scheme,
            host: &self.host,
            request_id: &self.id,
            length,
            upgrade,
        };
        let mut head = headers::to_server(head, &about)?;
        for (request, _) in self.snapshot.policies(self.tenant) {
            request.of_request(&mut head)?;
        }
        if let Some(validators) = self.validators.get() {
            validators.apply(&mut head)?;
        }
        head.insert_header(trace::TRACEPARENT, self.trace.header(&self.id))?;
        if let Some(key) = self.session_key() {
            session::open_cookies(&mut head, key, self.tenant.slug.as_str())?;
        }
        Ok(head)
    }

    /// The head that goes to the client.
    pub(crate) fn to_client(
        &self,
        head: &ResponseHeader,
        version: Version,
        head_only: bool,
    ) -> HeaderResult<ResponseHeader> {
        let mut head = headers::to_client(head, version, head_only)?;
        head.insert_header("X-Request-Id", self.id.as_str())?;
        if let Some(hsts) = self.hsts() {
            head.insert_header(header::STRICT_TRANSPORT_SECURITY, hsts.clone())?;
        }
        for (_, response) in self.snapshot.policies(self.tenant) {
            response.of_response(&mut head)?;
        }
        if let Some(cookie) = self.choice.and_then(policy::cookie) {
            head.append_header(header::SET_COOKIE, cookie)?;
        }
        session::seal_cookies(&mut head, self.session_key(), self.tenant.slug.as_str(), self.scheme == "https")?;
        Ok(head)
    }

    /// That the site is to be reached by TLS only, for a client that has.
    pub(crate) fn hsts(&self) -> Option<&HeaderValue> {
        self.snapshot.hsts.as_ref().filter(|_| self.scheme == "https")
    }

    /// A renderer that Odoo has started brings the session as Odoo gave it.
    fn session_key(&self) -> Option<&session::SessionKey> {
        self.snapshot.session_key.as_ref().filter(|_| !self.from_workers)
    }
}
