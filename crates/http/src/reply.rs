//! Answers that the gateway gives itself: short, with a reason, and never a word about another tenant.

use std::time::Duration;

use bytes::Bytes;
use cofferdam_fairness::Rejection;
use cofferdam_tenant::Maintenance;
use http::header::{self, HeaderValue};
use pingora_http::ResponseHeader;

use crate::client::Client;

/// An answer of our own.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) title: &'static str,
    pub(crate) detail: String,
    pub(crate) retry_after: Option<Duration>,
    /// Where to go instead.
    pub(crate) location: Option<String>,
    /// A page of somebody else's making, for browsers.
    pub(crate) page: Option<Bytes>,
    /// The connection cannot be used again: its bytes cannot be trusted or were not all read.
    pub(crate) close: bool,
}

impl Refusal {
    pub(crate) fn new(status: u16, title: &'static str, detail: impl Into<String>) -> Self {
        Self { status, title, detail: detail.into(), retry_after: None, location: None, page: None, close: false }
    }

    /// The same request at another address, for good.
    pub(crate) fn moved(location: String) -> Self {
        let mut refusal = Self::new(308, "Permanent redirect", "this site is served by https only");
        refusal.location = Some(location);
        refusal
    }

    /// The site is being worked on.
    pub(crate) fn maintenance(mode: &Maintenance) -> Self {
        let mut refusal = Self::new(503, "Under maintenance", mode.message.as_str());
        refusal.retry_after = Some(mode.retry_after);
        refusal.page = mode.page.as_ref().map(|page| Bytes::copy_from_slice(page.as_bytes()));
        refusal
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
    pub(crate) async fn send(&self, client: &mut Client, request_id: &str, hsts: Option<&HeaderValue>) -> bool {
        if client.answered().is_some() {
            return false;
        }
        let html = client.header(header::ACCEPT).is_some_and(|v| v.as_bytes().windows(9).any(|w| w == b"text/html"));
        let page = self.page.clone().unwrap_or_else(|| self.html(request_id));
        let body = if html { page } else { self.json(request_id) };
        let Ok(mut head) = ResponseHeader::build(self.status, Some(6)) else { return false };
        let kind = if html { "text/html; charset=utf-8" } else { "application/problem+json" };
        let written = (|| {
            head.insert_header(header::CONTENT_TYPE, kind)?;
            head.insert_header(header::CONTENT_LENGTH, body.len())?;
            head.insert_header(header::CACHE_CONTROL, "no-store")?;
            head.insert_header("X-Request-Id", request_id)?;
            if let Some(hsts) = hsts {
                head.insert_header(header::STRICT_TRANSPORT_SECURITY, hsts.clone())?;
            }
            if let Some(location) = &self.location {
                head.insert_header(header::LOCATION, location.as_str())?;
            }
            if let Some(after) = self.retry_after {
                head.insert_header(header::RETRY_AFTER, after.as_secs().max(1))?;
            }
            Ok::<_, Box<pingora_error::Error>>(())
        })();
        if written.is_err() {
            return false;
        }
        if self.close {
            client.close_after();
        }
        let bodiless = client.head().method == http::Method::HEAD;
        client.write_head(head).await.is_ok()
            && (bodiless || client.write_body(body).await.is_ok())
            && client.finish().await.is_ok()
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

/// Sends a plain text that is not for browsers. False when the client is gone.
pub(crate) async fn plain(client: &mut Client, text: String) -> bool {
    let Ok(mut head) = ResponseHeader::build(200, Some(3)) else { return false };
    let written = head
        .insert_header(header::CONTENT_TYPE, "text/plain")
        .and_then(|()| head.insert_header(header::CONTENT_LENGTH, text.len()))
        .and_then(|()| head.insert_header(header::CACHE_CONTROL, "no-store"));
    let bodiless = client.head().method == http::Method::HEAD;
    written.is_ok()
        && client.write_head(head).await.is_ok()
        && (bodiless || client.write_body(Bytes::from(text)).await.is_ok())
        && client.finish().await.is_ok()
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
