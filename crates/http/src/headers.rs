//! Headers at the boundary: what clients may not say, what servers may not say, and what we say ourselves.

use std::net::{IpAddr, SocketAddr};

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use pingora_error::{ErrorType, OrErr, Result};
use pingora_http::{RequestHeader, ResponseHeader};

use crate::framing::Malformed;

/// Headers that describe one connection and end at each hop (RFC 9110, 7.6.1).
const HOP_BY_HOP: [&str; 10] = [
    "connection",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Headers by which a client could claim to be somebody else, or to be asking somebody else.
const NEVER_FROM_CLIENTS: [&str; 5] = ["forwarded", "x-real-ip", "x-openerp-session-id", "x-request-id", "via"];
const NEVER_FROM_CLIENTS_PREFIXES: [&str; 4] = ["x-forwarded-", "x-odoo-", "x-sendfile", "x-accel-"];

/// Headers by which a server asks the gateway for something; a client must never see them.
const NEVER_FROM_SERVERS: [&str; 3] = ["x-sendfile", "x-accel-redirect", "x-accel-buffering"];

/// What we tell a server about the client.
pub(crate) struct Forwarded<'a> {
    pub(crate) client: IpAddr,
    pub(crate) scheme: &'a str,
    /// The host as the catalog knows it, with the port that the client gave.
    pub(crate) host: &'a str,
    pub(crate) request_id: &'a str,
    /// The body's length, when there is a body.
    pub(crate) length: Option<u64>,
    /// Whether this is a WebSocket handshake.
    pub(crate) upgrade: bool,
}

/// The host of a Host header, without its port.
pub(crate) fn host_of(value: &str) -> Option<&str> {
    let (host, port) = match value.strip_prefix('[') {
        Some(rest) => {
            let end = rest.find(']')? + 2;
            (&value[..end], &value[end..])
        }
        None => value.split_at(value.find(':').unwrap_or(value.len())),
    };
    let is_port = |p: &str| p.is_empty() || p.bytes().all(|b| b.is_ascii_digit()) && p.parse::<u16>().is_ok();
    let port_ok = port.is_empty() || port.strip_prefix(':').is_some_and(is_port);
    (port_ok && !host.is_empty()).then_some(host)
}

/// Who a request is from, and by which scheme, as proxies in front of the gateway say it.
///
/// Each proxy appends the address that it sees. So the list is believed from its end, up to the first address that is no
/// proxy of ours; what stands before that, the client may have made up.
pub(crate) fn client_of(
    headers: &HeaderMap,
    peer: IpAddr,
    is_proxy: impl Fn(IpAddr) -> bool,
) -> Result<(IpAddr, Option<&'static str>), Malformed> {
    let mut client = peer.to_canonical();
    if !is_proxy(client) {
        return Ok((client, None));
    }
    let hops = headers.get_all("x-forwarded-for").iter().flat_map(|v| v.as_bytes().split(|b| *b == b','));
    for hop in hops.collect::<Vec<_>>().into_iter().rev() {
        // Whoever cannot be told must not pass for the proxy.
        let address = std::str::from_utf8(hop).ok().and_then(|hop| address_of(hop.trim()));
        client = address.ok_or(Malformed("X-Forwarded-For names no address"))?.to_canonical();
        if !is_proxy(client) {
            break;
        }
    }
    let scheme = headers.get_all("x-forwarded-proto").iter().next_back().and_then(|v| v.to_str().ok());
    let scheme = match scheme.and_then(|s| s.rsplit(',').next()).map(str::trim) {
        Some("https") => Some("https"),
        Some("http") => Some("http"),
        _ => None,
    };
    Ok((client, scheme))
}

/// An address, with a port or without.
fn address_of(hop: &str) -> Option<IpAddr> {
    let bare = hop.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(hop);
    bare.parse().ok().or_else(|| Some(hop.parse::<SocketAddr>().ok()?.ip()))
}

/// Whether a WebSocket handshake comes from a page of the site itself, or from no page at all. `is_own` says whether a host
/// is the tenant's. Browsers send cookies with a handshake from any page, so the origin is all that tells them apart.
pub(crate) fn origin_is_own(headers: &HeaderMap, is_own: impl Fn(&str) -> bool) -> bool {
    headers.get_all(header::ORIGIN).iter().all(|origin| {
        let authority = origin.to_str().ok().and_then(|o| o.strip_prefix("https://").or(o.strip_prefix("http://")));
        authority.filter(|a| !a.contains(['/', '@'])).and_then(host_of).is_some_and(&is_own)
    })
}

/// The head that goes to the server.
pub(crate) fn to_server(client: &RequestHeader, about: &Forwarded<'_>) -> Result<RequestHeader> {
    let mut head = client.clone();
    for name in doomed(&head.headers, |name| {
        HOP_BY_HOP.contains(&name)
            || NEVER_FROM_CLIENTS.contains(&name)
            || NEVER_FROM_CLIENTS_PREFIXES.iter().any(|p| name.starts_with(p))
            // WSGI cannot tell `X_Forwarded_Host` from `X-Forwarded-Host`.
            || name.contains('_')
            || matches!(name, "expect" | "content-length")
    }) {
        head.remove_header(&name);
    }
    // One value each: Odoo takes the last one of a list.
    let client = HeaderValue::try_from(about.client.to_string()).or_err(ErrorType::InvalidHTTPHeader, "an address")?;
    head.insert_header("X-Forwarded-For", client.clone())?;
    head.insert_header("X-Real-IP", client)?;
    head.insert_header("X-Forwarded-Proto", about.scheme)?;
    head.insert_header("X-Forwarded-Host", about.host)?;
    head.insert_header(header::HOST, about.host)?;
    head.insert_header("X-Request-Id", about.request_id)?;
    if let Some(length) = about.length {
        head.insert_header(header::CONTENT_LENGTH, length)?;
    }
    if about.upgrade {
        head.insert_header(header::CONNECTION, "Upgrade")?;
        head.insert_header(header::UPGRADE, "websocket")?;
    } else {
        head.insert_header(header::CONNECTION, "close")?;
    }
    if head.headers.get_all(header::COOKIE).iter().count() > 1 {
        // HTTP/2 splits it; a server of HTTP/1 must see one (RFC 9113, 8.2.3).
        let parts: Vec<&[u8]> = head.headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
        let joined = parts.join(&b"; "[..]);
        head.remove_header(&header::COOKIE);
        head.insert_header(header::COOKIE, joined)?;
    }
    head.set_version(http::Version::HTTP_11);
    Ok(head)
}

/// The head that goes to the client.
pub(crate) fn to_client(
    server: &ResponseHeader,
    client_version: http::Version,
    head_only: bool,
) -> Result<ResponseHeader> {
    let mut head = server.clone();
    let chunked = head.headers.contains_key(header::TRANSFER_ENCODING);
    let upgraded = head.status == http::StatusCode::SWITCHING_PROTOCOLS;
    for name in doomed(&head.headers, |name| {
        (HOP_BY_HOP.contains(&name) && !(upgraded && matches!(name, "connection" | "upgrade")))
            || NEVER_FROM_SERVERS.contains(&name)
    }) {
        head.remove_header(&name);
    }
    let bodiless =
        head_only || upgraded || matches!(head.status, http::StatusCode::NO_CONTENT | http::StatusCode::NOT_MODIFIED);
    if chunked || head.status == http::StatusCode::NO_CONTENT {
        head.remove_header(&header::CONTENT_LENGTH);
    }
    let length_known = head.headers.contains_key(header::CONTENT_LENGTH);
    if !bodiless && !length_known && client_version == http::Version::HTTP_11 {
        // An answer that ended with its connection gets an end of its own.
        head.insert_header(header::TRANSFER_ENCODING, "chunked")?;
    }
    head.set_version(http::Version::HTTP_11);
    Ok(head)
}

/// Names to remove: those that match, and those that Connection names.
fn doomed(headers: &HeaderMap, matches: impl Fn(&str) -> bool) -> Vec<HeaderName> {
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
        .filter(|t| !t.eq_ignore_ascii_case("keep-alive") && !t.eq_ignore_ascii_case("close"))
        .map(str::to_ascii_lowercase)
        // A client that names an end-to-end header which we or the framing need does not get it removed.
        .filter(|t| !matches!(t.as_str(), "host" | "cookie" | "authorization" | "content-type" | "upgrade"))
        .collect();
    let mut out: Vec<HeaderName> = headers
        .keys()
        .filter(|name| matches(name.as_str()) || named.iter().any(|n| n == name.as_str()))
        .cloned()
        .collect();
    out.dedup();
    out
}

/// Whether a request asks for a WebSocket.
pub(crate) fn wants_websocket(head: &RequestHeader) -> bool {
    let is = |v: &HeaderValue, token: &str| {
        v.to_str().is_ok_and(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case(token)))
    };
    head.method == http::Method::GET
        && head.headers.get(header::UPGRADE).is_some_and(|v| is(v, "websocket"))
        && head.headers.get_all(header::CONNECTION).iter().any(|v| is(v, "upgrade"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> Forwarded<'static> {
        Forwarded {
            client: IpAddr::from([192, 0, 2, 7]),
            scheme: "https",
            host: "acme.example.com",
            request_id: "r1",
            length: Some(5),
            upgrade: false,
        }
    }

    #[test]
    fn what_a_client_claims_about_itself_is_replaced() {
        let mut client = RequestHeader::build("POST", b"/x", None).unwrap();
        for (name, value) in [
            ("Host", "acme.example.com"),
            ("X-Forwarded-Host", "victim.example.com"),
            ("X-Forwarded-For", "10.0.0.1"),
            ("X-FORWARDED-PROTO", "http"),
            ("X-Forwarded-Anything", "x"),
            ("Forwarded", "host=victim"),
            ("X-Odoo-Database", "victim"),
            ("X-Real-IP", "10.0.0.1"),
            ("X-Openerp-Session-Id", "stolen"),
            ("X_Forwarded_Host", "victim.example.com"),
            ("X_Odoo_Database", "victim"),
            ("Content_Length", "7"),
            ("X-Sendfile-Type", "X-Accel-Redirect"),
            ("Connection", "close, X-Private"),
            ("X-Private", "1"),
            ("Cookie", "session_id=1"),
        ] {
            client.append_header(name, value).unwrap();
        }
        let head = to_server(&client, &about()).unwrap();
        let all: Vec<_> = head.headers.iter().map(|(k, v)| format!("{k}: {}", v.to_str().unwrap())).collect();
        let all = all.join("\n");
        assert!(!all.contains("victim") && !all.contains("10.0.0.1") && !all.contains("stolen"), "{all}");
        assert!(!all.contains("x-private") && !all.contains("x-odoo") && !all.contains("x-sendfile"), "{all}");
        assert_eq!(head.headers["x-forwarded-for"], "192.0.2.7");
        assert_eq!(head.headers["x-forwarded-host"], "acme.example.com");
        assert_eq!(head.headers["x-forwarded-proto"], "https");
        assert_eq!(head.headers["connection"], "close");
        assert_eq!(head.headers["cookie"], "session_id=1");
        assert_eq!(head.headers["content-length"], "5");
    }

    #[test]
    fn what_a_server_asks_of_the_gateway_never_reaches_a_client() {
        let mut server = ResponseHeader::build(200, None).unwrap();
        for (name, value) in [
            ("X-Sendfile", "/data/filestore/acme/ab/abc"),
            ("X-Accel-Redirect", "/web/filestore/acme/ab/abc"),
            ("Connection", "close"),
            ("Keep-Alive", "x"),
            ("Content-Type", "text/html"),
        ] {
            server.append_header(name, value).unwrap();
        }
        let head = to_client(&server, http::Version::HTTP_11, false).unwrap();
        let names: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["content-type", "transfer-encoding"]);
        let old = to_client(&server, http::Version::HTTP_10, false).unwrap();
        assert!(!old.headers.contains_key("transfer-encoding"));
    }

    #[test]
    fn addresses_are_believed_from_proxies_and_from_nobody_else() {
        let client = |peer: &str, forwarded: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in forwarded {
                headers.append("x-forwarded-for", value.parse().unwrap());
            }
            let is_proxy = |a: IpAddr| a.is_loopback() || a.to_string().starts_with("10.");
            client_of(&headers, peer.parse().unwrap(), is_proxy)
                .map_or("refused".into(), |(client, _)| client.to_string())
        };
        assert_eq!(client("192.0.2.1", &["198.51.100.7"]), "192.0.2.1");
        assert_eq!(client("127.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(client("::ffff:127.0.0.1", &["6.6.6.6, 198.51.100.7, 10.0.0.2"]), "198.51.100.7");
        assert_eq!(client("127.0.0.1", &["6.6.6.6", "198.51.100.7:4711"]), "198.51.100.7");
        assert_eq!(client("127.0.0.1", &["unknown, 198.51.100.7, 10.0.0.2"]), "198.51.100.7");
        assert_eq!(client("127.0.0.1", &["[2001:db8::1], [2001:db8::2]"]), "2001:db8::2");
        for unknown in ["6.6.6.6, unknown, 10.0.0.2", "\u{ff}, 10.0.0.2", "", "198.51.100.7,"] {
            assert_eq!(client("127.0.0.1", &[unknown]), "refused", "{unknown}");
        }
        assert_eq!(client("127.0.0.1", &[]), "127.0.0.1");
        assert_eq!(client("127.0.0.1", &["10.0.0.3"]), "10.0.0.3");
    }

    #[test]
    fn a_handshake_from_a_page_of_another_site_is_foreign() {
        let own = |origin: &str| {
            let mut headers = HeaderMap::new();
            headers.append("origin", origin.parse().unwrap());
            origin_is_own(&headers, |host| host == "acme.example.com")
        };
        assert!(origin_is_own(&HeaderMap::new(), |_| false));
        assert!(own("https://acme.example.com") && own("http://acme.example.com:8069"));
        for foreign in [
            "https://bolt.example.com",
            "null",
            "",
            "acme.example.com",
            "https://acme.example.com.evil",
            "https://evil@acme.example.com",
            "https://acme.example.com/x",
            "file://acme.example.com",
        ] {
            assert!(!own(foreign), "{foreign}");
        }
    }

    #[test]
    fn a_host_is_cut_from_its_port_and_nothing_else() {
        for (value, host) in [
            ("acme.example.com", Some("acme.example.com")),
            ("acme.example.com:8080", Some("acme.example.com")),
            ("[::1]:80", Some("[::1]")),
            ("[::1]", Some("[::1]")),
            ("acme.example.com:80:90", None),
            ("acme.example.com:http", None),
            (":80", None),
            ("[::1", None),
            ("", None),
        ] {
            assert_eq!(host_of(value), host, "{value}");
        }
    }
}
