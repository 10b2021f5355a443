//! Session cookies that are good for one tenant only.
//!
//! All tenants' sessions lie in one directory of Odoo, and whoever has a session's id has the session, under whatever host.
//! So a client never gets the id alone: it gets `<id>.<mac>`, where the MAC is over the tenant's name and the id, and what
//! comes back is opened again, or dropped. It says nothing about who is behind it and needs no memory here, so a rotation
//! by Odoo is merely another id.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use http::header::{self, HeaderMap, HeaderValue};
use pingora_error::Result;
use pingora_http::{RequestHeader, ResponseHeader};
use sha2::Sha256;

use crate::framing::is_token;

/// Odoo's cookie.
const NAME: &str = "session_id";

/// Bytes of the MAC that a cookie carries.
const MAC_LENGTH: usize = 16;

/// The key that binds sessions to tenants.
#[derive(Clone)]
pub(crate) struct SessionKey(Hmac<Sha256>);

impl std::fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionKey(…)")
    }
}

impl SessionKey {
    /// `None` never happens: HMAC takes keys of any length.
    pub(crate) fn new(key: &str) -> Option<Self> {
        Hmac::new_from_slice(key.as_bytes()).ok().map(Self)
    }

    fn mac(&self, tenant: &str, id: &str) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        for part in [b"session\0", tenant.as_bytes(), b"\0", id.as_bytes()] {
            mac.update(part);
        }
        mac
    }

    fn seal(&self, tenant: &str, id: &str) -> String {
        let mac = self.mac(tenant, id).finalize().into_bytes();
        format!("{id}.{}", URL_SAFE_NO_PAD.encode(&mac[..MAC_LENGTH]))
    }

    /// The id, if it was sealed for this tenant.
    fn open<'a>(&self, tenant: &str, sealed: &'a str) -> Option<&'a str> {
        let (id, mac) = sealed.rsplit_once('.')?;
        let mac = URL_SAFE_NO_PAD.decode(mac).ok().filter(|mac| mac.len() == MAC_LENGTH)?;
        self.mac(tenant, id).verify_truncated_left(&mac).is_ok().then_some(id)
    }
}

/// Replaces the sealed session by its id, and drops every session that was not sealed for this tenant. What is left is one
/// header, in which no server can find another session than we did.
pub(crate) fn open_cookies(head: &mut RequestHeader, key: &SessionKey, tenant: &str) -> Result<()> {
    if !head.headers.contains_key(header::COOKIE) {
        return Ok(());
    }
    let mut out: Vec<u8> = Vec::new();
    let mut found = false;
    for (name, value) in cookies(&head.headers) {
        let opened = if name == NAME.as_bytes() {
            let value = std::str::from_utf8(value).unwrap_or_default();
            let Some(id) = key.open(tenant, value).filter(|_| !found) else { continue };
            found = true;
            id.as_bytes()
        } else {
            value
        };
        if !out.is_empty() {
            out.extend_from_slice(b"; ");
        }
        out.extend_from_slice(name);
        out.push(b'=');
        out.extend_from_slice(opened);
    }
    head.remove_header(&header::COOKIE);
    if !out.is_empty()
        && let Ok(value) = HeaderValue::from_bytes(&out)
    {
        head.insert_header(header::COOKIE, value)?;
    }
    Ok(())
}

/// The cookies of a request, by name and value. One whose name is no token is left out: some servers trim more than spaces
/// from a name, or unquote it, and would find another than we do.
pub(crate) fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&[u8], &[u8])> {
    let pairs = headers.get_all(header::COOKIE).iter().flat_map(|header| header.as_bytes().split(|b| *b == b';'));
    pairs.map(<[u8]>::trim_ascii).filter_map(|pair| {
        let (name, value) = match pair.iter().position(|b| *b == b'=') {
            Some(at) => (pair[..at].trim_ascii(), pair[at + 1..].trim_ascii()),
            None => (pair, &b""[..]),
        };
        (!name.is_empty() && name.iter().all(|b| is_token(*b))).then_some((name, value))
    })
}

/// Seals the session that a server sets, and adds what Odoo forgets: SameSite, and Secure where clients come by TLS. Takes
/// away a Domain, which would send it to other tenants too.
pub(crate) fn seal_cookies(
    head: &mut ResponseHeader,
    key: Option<&SessionKey>,
    tenant: &str,
    is_secure: bool,
) -> Result<()> {
    let is_session = |value: &HeaderValue| cookie_name(value.as_bytes()) == NAME.as_bytes();
    if !head.headers.get_all(header::SET_COOKIE).iter().any(is_session) {
        return Ok(());
    }
    let cookies: Vec<HeaderValue> = head.headers.get_all(header::SET_COOKIE).iter().cloned().collect();
    head.remove_header(&header::SET_COOKIE);
    for cookie in cookies {
        let sealed = match cookie.to_str() {
            Ok(text) if is_session(&cookie) => sealed_cookie(text, key, tenant, is_secure),
            // What is no text is no session of Odoo's.
            Err(_) if is_session(&cookie) => continue,
            _ => {
                head.append_header(header::SET_COOKIE, cookie)?;
                continue;
            }
        };
        head.append_header(header::SET_COOKIE, sealed)?;
    }
    Ok(())
}

fn cookie_name(cookie: &[u8]) -> &[u8] {
    cookie.split(|b| matches!(b, b'=' | b';')).next().unwrap_or_default().trim_ascii()
}

fn sealed_cookie(cookie: &str, key: Option<&SessionKey>, tenant: &str, is_secure: bool) -> String {
    let mut parts = cookie.split(';').map(str::trim);
    let id = parts.next().and_then(|pair| pair.split_once('=')).map(|(_, id)| id.trim()).unwrap_or_default();
    // An empty one is deleted, and stays empty.
    let value = match key {
        Some(key) if !id.is_empty() => key.seal(tenant, id),
        _ => id.to_owned(),
    };
    let mut out = format!("{NAME}={value}");
    let (mut secure, mut same_site) = (false, false);
    for attribute in parts {
        let name = attribute.split('=').next().unwrap_or_default().trim();
        if name.is_empty() || name.eq_ignore_ascii_case("domain") {
            continue;
        }
        secure |= name.eq_ignore_ascii_case("secure");
        same_site |= name.eq_ignore_ascii_case("samesite");
        out.push_str("; ");
        out.push_str(attribute);
    }
    if !same_site {
        out.push_str("; SameSite=Lax");
    }
    if is_secure && !secure {
        out.push_str("; Secure");
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> SessionKey {
        SessionKey::new("0123456789abcdef").unwrap()
    }

    fn opened(cookies: &[&str]) -> String {
        let mut head = RequestHeader::build("GET", b"/", None).unwrap();
        for cookie in cookies {
            head.append_header("Cookie", *cookie).unwrap();
        }
        open_cookies(&mut head, &key(), "acme").unwrap();
        assert!(head.headers.get_all("cookie").iter().count() <= 1);
        head.headers.get("cookie").map_or(String::new(), |v| String::from_utf8_lossy(v.as_bytes()).into_owned())
    }

    #[test]
    fn a_session_opens_for_its_own_tenant_and_for_no_other() {
        let sealed = key().seal("acme", "abc-1_2");
        assert_eq!(key().open("acme", &sealed), Some("abc-1_2"));
        assert_eq!(key().open("bolt", &sealed), None);
        assert_eq!(SessionKey::new("another key of 16").unwrap().open("acme", &sealed), None);
        for bad in ["abc-1_2", "", ".", "abc-1_2.", &sealed[..sealed.len() - 1], &format!("{sealed}A"), &sealed[1..]] {
            assert_eq!(key().open("acme", bad), None, "{bad}");
        }
    }

    #[test]
    fn one_session_gets_through_and_every_other_cookie_does_too() {
        let own = format!("session_id={}", key().seal("acme", "own"));
        let foreign = format!("session_id={}", key().seal("bolt", "stolen"));
        assert_eq!(opened(&[&format!("tz=UTC; {own}; cids=1")]), "tz=UTC; session_id=own; cids=1");
        assert_eq!(opened(&[&foreign, "tz=UTC"]), "tz=UTC");
        assert_eq!(opened(&["session_id=stolen"]), "");
        assert_eq!(opened(&[&foreign, &own, "session_id=stolen"]), "session_id=own");
        assert_eq!(opened(&["session_id =stolen; session_id\t= stolen; a"]), "a=");
        assert_eq!(opened(&["\u{a0}session_id=stolen; \u{2003}session_id=stolen"]), "");
        assert_eq!(opened(&["\"session_id\"=stolen; \"session\\137id\"=stolen; session\\_id=stolen"]), "");
        assert_eq!(opened(&["x=\"; session_id=stolen; y=\""]), "x=\"; y=\"");
    }

    #[test]
    fn a_session_that_is_set_is_sealed_and_gets_what_it_lacks() {
        let set = |cookies: &[&str], secure: bool| {
            let mut head = ResponseHeader::build(200, None).unwrap();
            for cookie in cookies {
                head.append_header("Set-Cookie", *cookie).unwrap();
            }
            seal_cookies(&mut head, Some(&key()), "acme", secure).unwrap();
            let all = head.headers.get_all("set-cookie").iter();
            all.map(|v| v.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let sealed = key().seal("acme", "abc");
        let plain = "session_id=abc; Max-Age=604800; HttpOnly; Path=/";
        assert_eq!(
            set(&["tz=UTC; Path=/", plain], true),
            [
                "tz=UTC; Path=/".to_owned(),
                format!("session_id={sealed}; Max-Age=604800; HttpOnly; Path=/; SameSite=Lax; Secure")
            ]
        );
        assert_eq!(
            set(&["session_id=abc; Domain=.example.com; samesite=None; secure"], false),
            [format!("session_id={sealed}; samesite=None; secure")]
        );
        assert_eq!(set(&["session_id=; Max-Age=0; Path=/"], false), ["session_id=; Max-Age=0; Path=/; SameSite=Lax"]);
        assert_eq!(set(&["tz=UTC"], true), ["tz=UTC"]);
    }

    proptest! {
        /// However cookies are arranged, a server finds the one session that was sealed for the tenant, or none.
        #[test]
        fn no_arrangement_of_cookies_brings_a_foreign_session(parts in prop::collection::vec(prop::sample::select(vec![
            "session_id", "=", ";", " ", "\"", "\\", "stolen", "own", ",", "\t", "x", "$Path", "session_id=stolen",
        ]), 0..16)) {
            let own = key().seal("acme", "own");
            let text = parts.concat().replace("own", &own);
            let after = opened(&[&text]);
            for pair in after.split(';') {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                prop_assert!(name.trim() != "session_id" || value == "own", "{:?} -> {:?}", text, after);
            }
        }
    }
}
