//! What an answer says of how long it may be kept, and what of it (RFC 9111).

use std::time::Duration;

use cofferdam_fairness::Timestamp;
use http::StatusCode;
use http::header::{self, HeaderName, HeaderValue};
use pingora_http::ResponseHeader;

/// The longest time that something is kept without asking.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3_600);

/// What is meant for whoever has asked, and is not kept: each hop makes its own, and the cookie is somebody's. What
/// `Connection` names belongs to it (RFC 9111, 3.1).
pub(super) fn of_this_hop(head: &ResponseHeader) -> Vec<HeaderName> {
    let named = head.headers.get_all(header::CONNECTION).iter().filter_map(|v| v.to_str().ok());
    let named = named.flat_map(|v| v.split(',')).filter_map(|name| name.trim().parse().ok());
    let always = [
        header::SET_COOKIE,
        header::CONNECTION,
        header::TRANSFER_ENCODING,
        header::TE,
        header::UPGRADE,
        header::PROXY_AUTHENTICATE,
        header::DATE,
        header::AGE,
        HeaderName::from_static("keep-alive"),
    ];
    always.into_iter().chain(named).collect()
}

/// What tells of the bytes that are kept, and stays as they do.
pub(super) fn is_of_the_body(name: &HeaderName) -> bool {
    [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::CONTENT_TYPE, header::CONTENT_RANGE].contains(name)
}

/// How old an answer is said to be.
pub(super) fn age(head: &ResponseHeader) -> Duration {
    let seconds = head.headers.get(header::AGE).and_then(|v| v.to_str().ok()?.trim().parse::<u64>().ok());
    Duration::from_secs(seconds.unwrap_or_default()).min(LONGEST)
}

pub(super) fn milliseconds(now: Timestamp) -> u64 {
    u64::try_from(now.since(Timestamp::default()).as_millis()).unwrap_or(u64::MAX)
}

/// How long an answer may be kept; `None` when it may not.
pub(super) fn lifetime(head: &ResponseHeader) -> Option<Duration> {
    let value =
        |name| head.headers.get_all(name).iter().filter_map(|v: &HeaderValue| v.to_str().ok()).collect::<Vec<_>>();
    if head.status != StatusCode::OK
        || head.headers.contains_key(header::CONTENT_ENCODING)
        || head.headers.contains_key(header::CONTENT_RANGE)
    {
        return None;
    }
    if !value(header::VARY).iter().flat_map(|v| v.split(',')).all(|v| v.trim().eq_ignore_ascii_case("accept-encoding"))
    {
        return None;
    }
    let control = value(header::CACHE_CONTROL).join(",").to_ascii_lowercase();
    let directives = directives(&control);
    let has = |name: &str| directives.iter().any(|(known, _)| *known == name);
    // With the names of fields they speak of those alone; whoever says so means this answer too, to be sure.
    if !has("public") || has("private") || has("no-store") || has("no-cache") {
        return None;
    }
    let age = |name: &str| directives.iter().find(|(known, _)| *known == name).map(|(_, age)| age);
    // What is there and cannot be read is over (RFC 9111, 4.2.1).
    let seconds = age("s-maxage").or_else(|| age("max-age"))?.trim_matches('"').parse::<u64>().unwrap_or_default();
    (seconds > 0).then(|| Duration::from_secs(seconds).min(LONGEST))
}

/// The directives of a `Cache-Control`, and what stands behind their equals signs: a comma in quotes ends none.
fn directives(control: &str) -> Vec<(&str, &str)> {
    let (mut found, mut from, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, c) in control.char_indices().chain([(control.len(), ',')]) {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ',' if !quoted || at == control.len() => {
                let one = control[from..at].trim();
                let (name, value) = one.split_once('=').unwrap_or((one, ""));
                found.push((name.trim(), value.trim()));
                from = (at + 1).min(control.len());
            }
            _ => {}
        }
    }
    if quoted {
        // Where it ends is anybody's guess.
        found.push(("no-store", ""));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_said_to_be_public_is_kept_and_only_so_long() {
        let of = |headers: &[(&str, &str)], status: u16| {
            let mut head = ResponseHeader::build(status, None).unwrap();
            for (name, value) in headers {
                head.append_header((*name).to_owned(), *value).unwrap();
            }
            lifetime(&head).map(|l| l.as_secs())
        };
        let public = ("Cache-Control", "public, max-age=604800");
        assert_eq!(of(&[public], 200), Some(604_800));
        assert_eq!(of(&[("Cache-Control", "Public, MAX-AGE=60, s-maxage=10")], 200), Some(10));
        assert_eq!(of(&[public, ("Vary", "Accept-Encoding"), ("Set-Cookie", "session_id=1")], 200), Some(604_800));
        for never in [
            &[("Cache-Control", "max-age=60")][..],
            &[("Cache-Control", "public")],
            &[("Cache-Control", "public, max-age=0")],
            &[("Cache-Control", "public, max-age=60, no-cache")],
            &[("Cache-Control", "private, max-age=60, public")],
            &[("Cache-Control", "public, max-age=60, private=\"X-User\"")],
            &[("Cache-Control", "public, max-age=60, no-cache=\"a, b\"")],
            &[("Cache-Control", "max-age=60, x=\"a, public, b\"")],
            &[("Cache-Control", "public, max-age=60, s-maxage=-1")],
            &[("Cache-Control", "public, max-age=60, x=\"unclosed, \\\"")],
            &[public, ("Vary", "Cookie")],
            &[public, ("Content-Encoding", "gzip")],
            &[],
        ] {
            assert_eq!(of(never, 200), None, "{never:?}");
        }
        assert_eq!((of(&[public], 404), of(&[public], 206)), (None, None));
    }
}
