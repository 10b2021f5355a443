//! What the files say about the HTTP plane.

use super::{Check, Place};
use crate::catalog::HttpFront;
use crate::config::{GatewayConfig, TenantFile};

/// Bytes that a key must have at least.
const SHORTEST_KEY: usize = 16;

impl Check<'_> {
    pub(super) fn http(&mut self, main: &Place<'_>, config: &GatewayConfig) -> Option<HttpFront> {
        let http = config.http.as_ref()?;
        if http.listen.is_empty() {
            self.fault(main, &["http", "listen"], "an empty list", "at least one address");
        }
        for (field, time) in [
            ("header_timeout", http.header_timeout),
            ("body_timeout", http.body_timeout),
            ("keepalive_timeout", http.keepalive_timeout),
            ("write_timeout", http.write_timeout),
        ] {
            if time.0.is_zero() {
                self.fault(main, &["http", field], "`0s`", "a time above zero");
            }
        }
        let session_key = self.secret(
            main,
            &["http"],
            "session_key",
            http.session_key.as_ref(),
            http.session_key_file.as_ref(),
            http.session_key_env.as_ref(),
        );
        if session_key.as_ref().is_some_and(|key| key.expose().len() < SHORTEST_KEY) {
            let found = format!("a key of fewer than {SHORTEST_KEY} bytes");
            self.fault(main, &["http", "session_key"], found, "a longer one, such as `openssl rand -base64 32` gives");
        }
        Some(HttpFront { config: http.clone(), session_key })
    }

    /// What a tenant says about its hosts and who may come.
    pub(super) fn reach(&mut self, place: &Place<'_>, file: &TenantFile, wildcard_hosts: bool) {
        for (i, host) in file.hosts.iter().enumerate() {
            if host.wildcard_of().is_some() && !wildcard_hosts {
                let expected = "a whole name, since `http.wildcard_hosts` is not set";
                self.fault(place, &["hosts", &i.to_string()], format!("`{host}`"), expected);
            }
        }
        for (i, route) in file.internal_routes.iter().enumerate() {
            let i = i.to_string();
            let plain = route.path.starts_with('/')
                && route.path.len() > 1
                && !route.path.ends_with('/')
                && !route.path.contains(['?', '#', '%'])
                && !route.path.split('/').skip(1).any(|segment| matches!(segment, "" | "." | ".."));
            if !plain {
                let expected = "a path from the root, without a query and not encoded, such as `/web/database`";
                self.fault(place, &["internal_routes", &i, "path"], format!("`{}`", route.path), expected);
            }
            if route.from.is_empty() {
                let expected = "the addresses that may use it";
                self.fault(place, &["internal_routes", &i, "from"], "an empty list", expected);
            }
        }
    }
}
