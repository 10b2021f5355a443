//! What kind of work a path is, as Odoo 16 to 19 route it. A hint for scheduling; and what is closed from outside.

use std::borrow::Cow;

use cofferdam_fairness::Class;

use crate::boundary::without_language;

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// To a worker, as work of a class.
    Worker(Class),
    /// To the gevent port.
    Websocket,
    /// To nobody: internal or administrative.
    Closed,
}

/// Routes that only operators need; Odoo guards some of them badly and others not at all.
const CLOSED: [&str; 9] = [
    "/web/database",
    "/web/health",
    "/base_import_module/login_upload",
    "/web/tests",
    "/web/set_profiling",
    "/queue_job/runjob",
    "/web/filestore",
    "/longpolling",
    "/web/webclient/qweb_debug",
];

const BULK: [&str; 7] = [
    "/web/export",
    "/web/pivot/export_xlsx",
    "/base_import/set_file",
    "/web/binary/upload_attachment",
    "/mail/attachment/upload",
    "/documents/upload",
    "/web/content/zip",
];

/// What other services call by themselves.
const WEBHOOKS: [&str; 3] = ["/web/hook", "/peppol/webhook", "/base_automation/webhook"];

/// The last words of a payment provider's own calls; what else is below `/payment` are pages.
const NOTIFICATIONS: [&str; 4] = ["webhook", "notification", "notify", "ipn"];

const RPC: [&str; 5] = ["/web/dataset", "/jsonrpc", "/xmlrpc", "/json", "/api"];

/// The route of a path. `path` may carry a query.
pub fn route(path: &str) -> Route {
    route_canonical(&canonical(path))
}

/// A path as Odoo's router would understand it at its most generous: decoded, without a query, with `//`, `/./` and `/../`
/// resolved, without a slash at its end. What would be read differently after decoding is judged by what it decodes to.
pub(crate) fn canonical(path: &str) -> Cow<'_, str> {
    let path = path.split(['?', '#']).next().unwrap_or_default();
    match decode(path) {
        Some(decoded) => Cow::Owned(decoded),
        None => Cow::Borrowed(path.trim_end_matches('/')),
    }
}

/// Whether a target has a segment that is `.` or `..`, encoded or not.
pub(crate) fn has_dots(target: &str) -> bool {
    let path = target.split('?').next().unwrap_or_default();
    if !(path.contains("/.") || path.contains('%')) {
        return false;
    }
    percent_decoded(path).split(|b| *b == b'/').any(|segment| matches!(segment, b"." | b".."))
}

/// The route of a path in its canonical form.
pub(crate) fn route_canonical(path: &str) -> Route {
    let closed = |path: &str| CLOSED.iter().any(|p| is_below(path, p));
    if closed(path) || without_language(path).is_some_and(closed) {
        return Route::Closed;
    }
    if is_below(path, "/websocket") {
        return Route::Websocket;
    }
    Route::Worker(if is_static(path) {
        Class::Static
    } else if is_below(path, "/report") {
        Class::Report
    } else if BULK.iter().any(|p| is_below(path, p)) {
        Class::Bulk
    } else if is_webhook(path) {
        Class::Webhook
    } else if RPC.iter().any(|p| is_below(path, p)) {
        Class::Rpc
    } else {
        Class::Interactive
    })
}

/// A path below one of the known ones, or a notification to a payment provider's or a terminal's module.
fn is_webhook(path: &str) -> bool {
    let notifies = || path.rsplit('/').next().is_some_and(|last| NOTIFICATIONS.contains(&last));
    WEBHOOKS.iter().any(|p| is_below(path, p))
        || ((is_below(path, "/payment") || path.starts_with("/pos_")) && notifies())
}

/// `/<module>/static/…` and compiled assets.
fn is_static(path: &str) -> bool {
    let mut segments = path.split('/').skip(1);
    let (first, second) = (segments.next(), segments.next());
    second == Some("static") && segments.next().is_some() || (first, second) == (Some("web"), Some("assets"))
}

pub(crate) fn is_below(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn percent_decoded(path: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&b, after)) = rest.split_first() {
        let digit = |at: usize| after.get(at).and_then(|d| char::from(*d).to_digit(16));
        if let (b'%', Some(high), Some(low)) = (b, digit(0), digit(1)) {
            let value = (high * 16 + low) as u8;
            bytes.push(value);
            rest = &after[2..];
        } else {
            bytes.push(b);
            rest = after;
        }
    }
    bytes
}

/// The path after percent-decoding, with `//`, `/./` and `/../` resolved; `None` when that changes nothing.
fn decode(path: &str) -> Option<String> {
    let odd = path.contains('%') || path.contains("//") || path.contains("/.");
    if !odd {
        return None;
    }
    let bytes = percent_decoded(path);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let mut segments: Vec<&str> = Vec::new();
    for segment in text.split('/') {
        match segment {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            other => segments.push(other),
        }
    }
    Some(if segments.is_empty() { String::new() } else { format!("/{}", segments.join("/")) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_are_classed_as_odoo_routes_them() {
        for (path, expected) in [
            ("/", Route::Worker(Class::Interactive)),
            ("/web/login?redirect=/web", Route::Worker(Class::Interactive)),
            ("/web/static/src/a.js", Route::Worker(Class::Static)),
            ("/static/x", Route::Worker(Class::Interactive)),
            ("/web/assets/1a2b/web.min.js", Route::Worker(Class::Static)),
            ("/web/dataset/call_kw/res.partner/read", Route::Worker(Class::Rpc)),
            ("/jsonrpc", Route::Worker(Class::Rpc)),
            ("/xmlrpc/2/object", Route::Worker(Class::Rpc)),
            ("/json/2/res.partner/read", Route::Worker(Class::Rpc)),
            ("/report/pdf/account.invoice/1", Route::Worker(Class::Report)),
            ("/reporting", Route::Worker(Class::Interactive)),
            ("/web/export/xlsx", Route::Worker(Class::Bulk)),
            ("/payment/stripe/webhook", Route::Worker(Class::Webhook)),
            ("/web/hook/7e1c", Route::Worker(Class::Webhook)),
            ("/pos_adyen/notification", Route::Worker(Class::Webhook)),
            ("/payment/pay", Route::Worker(Class::Interactive)),
            ("/websocket?version=1", Route::Websocket),
            ("/websocket/health", Route::Websocket),
        ] {
            assert_eq!(route(path), expected, "{path}");
        }
    }

    #[test]
    fn internal_routes_are_closed_however_they_are_spelt() {
        for path in [
            "/web/database/manager",
            "/web/database/",
            "/web/database",
            "/web//database/manager",
            "/web/%64atabase/manager",
            "/x/../web/database/manager",
            "/web/./database/selector",
            "/longpolling/poll",
            "/queue_job/runjob?db=x",
            "/web/filestore/acme/ab/abcd",
            "/web/health?db_server_status=1",
            "/fr/web/database/manager",
            "/pt_BR/web/tests",
        ] {
            assert_eq!(route(path), Route::Closed, "{path}");
        }
        assert_eq!(route("/web/databases"), Route::Worker(Class::Interactive));
    }

    proptest! {
        #[test]
        fn no_path_makes_the_router_panic(path in "[/.%a-f0-9?#\\PC]{0,40}") {
            let _ = route(&path);
        }
    }
}
