//! Answers that the gateway gives itself: short, with a reason, and never a word about another tenant.

use std::time::Duration;

use bytes::Bytes;
use cofferdam_fairness::Rejection;
use http::header;
use pingora_core::protocols::http::v1::server::HttpSession;
use pingora_http::ResponseHeader;

/// When a session has no write timeout of its own.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// An answer of our own.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) title: &'static str,
    pub(crate) detail: String,
    pub(crate) retry_after: Option<Duration>,
    /// The connection cannot be used again: its bytes cannot be trusted or were not all read.
    pub(crate) close: bool,
}

impl Refusal {
    pub(crate) fn new(status: u16, title: &'static str, detail: impl Into<String>) -> Self {
        Self { status, title, detail: detail.into(), retry_after: None, close: false }
    }

    pub(crate) fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// No slot in time: 429 when the tenant's own quota is the cause, 503 when the pool is overloaded.
    pub(crate) fn no_slot(tenant: &str, rejection: &Rejection) -> Self {
        let (status, title) = if rejection.is_own_quota() { (429, "Too many requests") } else { (503, "Service busy") };
        let mut refusal = Self::new(status, title, format!("tenant {tenant}: {rejection}"));
        refusal.retry_after = Some(rejection.retry_after);
        refusal
    }

    /// Sends it: HTML for a browser, JSON for everybody else. False when the client is gone.
    pub(crate) async fn send(&self, session: &mut HttpSession, request_id: &str) -> bool {
        // `100 Continue` is no answer yet.
        if session.response_written().is_some_and(|r| !r.status.is_informational()) {
            return false;
        }
        let html = session.get_header_bytes(header::ACCEPT).windows(9).any(|w| w == b"text/html");
        let body = if html { self.html(request_id) } else { self.json(request_id) };
        let Ok(mut head) = ResponseHeader::build(self.status, Some(6)) else { return false };
        let kind = if html { "text/html; charset=utf-8" } else { "application/problem+json" };
        let written = (|| {
            head.insert_header(header::CONTENT_TYPE, kind)?;
            head.insert_header(header::CONTENT_LENGTH, body.len())?;
            head.insert_header(header::CACHE_CONTROL, "no-store")?;
            head.insert_header("X-Request-Id", request_id)?;
            if let Some(after) = self.retry_after {
                head.insert_header(header::RETRY_AFTER, after.as_secs().max(1))?;
            }
            Ok::<_, Box<pingora_error::Error>>(())
        })();
        if written.is_err() {
            return false;
        }
        if self.close {
            session.set_server_keepalive(None);
        }
        write_head(session, head).await.is_ok()
            && session.write_body(&body).await.is_ok()
            && finish(session).await.is_ok()
    }

    fn json(&self, request_id: &str) -> Bytes {
        let retry = self.retry_after.map_or(String::new(), |r| format!(",\"retry_after\":{}", r.as_secs().max(1)));
        Bytes::from(format!(
            "{{\"title\":{},\"status\":{},\"detail\":{},\"request_id\":{}{retry}}}\n",
            quoted(self.title),
            self.status,
            quoted(&self.detail),
            quoted(request_id),
        ))
    }

    fn html(&self, request_id: &str) -> Bytes {
        let (title, detail) = (escaped(self.title), escaped(&self.detail));
        Bytes::from(format!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{status} {title}</title>\
             <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:36em;margin:15vh auto;padding:0 1em;color:#222}}\
             h1{{font-size:1.4em}}small{{color:#777}}</style>\
             <h1>{title}</h1><p>{detail}</p><small>{status} · request {id}</small></html>\n",
            status = self.status,
            id = escaped(request_id),
        ))
    }
}

/// The client took nothing for as long as it may.
#[derive(Debug)]
pub(crate) struct Unwritten;

/// Writes the head of an answer within the session's write timeout, which pingora applies to bodies only: a client that
/// reads nothing must not hold a slot.
pub(crate) async fn write_head(session: &mut HttpSession, head: ResponseHeader) -> Result<(), Unwritten> {
    let limit = session.get_write_timeout().unwrap_or(WRITE_TIMEOUT);
    match tokio::time::timeout(limit, session.write_response_header(Box::new(head))).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(Unwritten),
    }
}

/// Ends the body of an answer within the session's write timeout.
pub(crate) async fn finish(session: &mut HttpSession) -> Result<(), Unwritten> {
    let limit = session.get_write_timeout().unwrap_or(WRITE_TIMEOUT);
    match tokio::time::timeout(limit, session.finish_body()).await {
        Ok(Ok(_)) => Ok(()),
        _ => Err(Unwritten),
    }
}

fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
