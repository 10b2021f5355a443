//! What the files say about the HTTP plane.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::{Check, Place};
use crate::catalog::{AcmeFront, Canary, FilestoreBucket, HttpFront, Maintenance, Pool, TenantTls, TlsFiles};
use crate::config::{
    AcmeConfig, FilestoreBucketConfig, GatewayConfig, HeaderPolicyConfig, MaintenanceConfig, TenantFile, TracesConfig,
};
use crate::diagnostic::one_of;
use crate::ids::PoolName;
use crate::units::Secret;

/// Headers by which the gateway frames messages, keeps tenants apart, or says who asks.
const OURS: [&str; 14] = [
    "host",
    "connection",
    "content-length",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "cookie",
    "set-cookie",
    "x-real-ip",
    "x-request-id",
    "x-odoo-database",
    "x-sendfile",
    "x-accel-redirect",
];

/// When to come again, if nothing else is said.
const BACK_SOON: Duration = Duration::from_secs(300);

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
        if http.compression > 9 {
            self.fault(main, &["http", "compression"], format!("`{}`", http.compression), "a level from 0 to 9");
        }
        self.header_policy(main, &["http", "headers"], &http.headers);
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
        let traces_authorization = http.traces.as_ref().and_then(|traces| self.traces(main, traces));
        let acme = http.tls.as_ref().and_then(|tls| tls.acme.as_ref()).map(|acme| self.acme(main, acme));
        let mut certificates = Vec::new();
        if let Some(tls) = &http.tls {
            if tls.listen.is_empty() {
                self.fault(main, &["http", "tls", "listen"], "an empty list", "at least one address");
            }
            for (i, files) in tls.certificates.iter().enumerate() {
                let place = ["http", "tls", "certificates", &i.to_string()];
                certificates.extend(self.identity(main, &place, &files.certificate, &files.key));
            }
        }
        if http.proxy_protocol && http.trusted_proxies.is_empty() {
            let expected = "`trusted_proxies` beside it: the proxies that send the header";
            self.fault(main, &["http", "proxy_protocol"], "`true` without a proxy", expected);
        }
        let mut config = http.clone();
        for path in [&mut config.access_log, &mut config.spool_directory].into_iter().flatten() {
            // Like all files: beside the configuration, if not said otherwise.
            if path.as_path() != Path::new("-") {
                *path = self.secrets.locate(path);
            }
        }
        Some(HttpFront { config, session_key, traces_authorization, certificates, acme })
    }

    /// A bucket with filestores.
    pub(super) fn filestore_bucket(
        &mut self,
        main: &Place<'_>,
        at: &[&str; 3],
        config: &FilestoreBucketConfig,
    ) -> Option<FilestoreBucket> {
        let field = |name| [at[0], at[1], at[2], name];
        let named = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
        if !(3..=63).contains(&config.bucket.len()) || !config.bucket.bytes().all(named) {
            let expected = "a bucket's name: 3 to 63 small letters, digits, dots and hyphens";
            self.fault(main, &field("bucket"), format!("`{}`", config.bucket), expected);
        }
        if config.prefix.starts_with('/') || config.prefix.split('/').any(|part| matches!(part, "." | "..")) {
            let expected = "what names of objects begin with, such as `filestore/`";
            self.fault(main, &field("prefix"), format!("`{}`", config.prefix), expected);
        }
        if config.region.is_empty() || !config.region.bytes().all(named) {
            self.fault(main, &field("region"), format!("`{}`", config.region), "a region, such as `eu-central-1`");
        }
        let endpoint = config.endpoint.clone().unwrap_or_else(|| format!("https://s3.{}.amazonaws.com", config.region));
        let good = plain_address(&endpoint)
            .is_some_and(|url| matches!(url.scheme(), "http" | "https") && url.query().is_none() && url.path() == "/");
        if !good {
            self.fault(
                main,
                &field("endpoint"),
                format!("`{endpoint}`"),
                "an address such as `https://s3.example.com`",
            );
        }
        let ca = config.ca_file.as_ref().and_then(|path| self.pem(main, &field("ca_file"), path));
        let given = (config.access_key.as_ref(), config.access_key_file.as_ref(), config.access_key_env.as_ref());
        let access_key = self.needed_secret(main, at, ("a bucket", "access_key"), given);
        let given = (config.secret_key.as_ref(), config.secret_key_file.as_ref(), config.secret_key_env.as_ref());
        let secret_key = self.needed_secret(main, at, ("a bucket", "secret_key"), given);
        Some(FilestoreBucket {
            bucket: config.bucket.clone(),
            prefix: config.prefix.clone(),
            region: config.region.clone(),
            path_style: config.path_style.unwrap_or(config.endpoint.is_some()),
            endpoint,
            ca,
            access_key: access_key?,
            secret_key: secret_key?,
        })
    }

    /// The authority that is asked for certificates.
    fn acme(&mut self, main: &Place<'_>, acme: &AcmeConfig) -> AcmeFront {
        const AT: [&str; 3] = ["http", "tls", "acme"];
        let field = |name| [AT[0], AT[1], AT[2], name];
        let good = plain_address(&acme.directory).is_some_and(|url| url.scheme() == "https");
        if !good {
            let expected =
                "an address that begins with `https://`, such as Let's Encrypt's, which is taken without this field";
            self.fault(main, &field("directory"), format!("`{}`", acme.directory), expected);
        }
        if !acme.agree_to_terms {
            let expected = "`true`, which says that you agree to the authority's terms of service";
            self.fault(main, &field("agree_to_terms"), "`false`", expected);
        }
        for (i, contact) in acme.contacts.iter().enumerate() {
            let parts = contact.split_once('@');
            let plain =
                |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_graphic() && !b"@:?,".contains(&b));
            if !parts.is_some_and(|(name, host)| plain(name) && plain(host)) {
                let at = [AT[0], AT[1], AT[2], "contacts", &i.to_string()];
                self.fault(main, &at, format!("`{contact}`"), "a mail address, such as `ops@example.com`");
            }
        }
        let directory_ca = acme.directory_ca.as_ref().and_then(|path| self.pem(main, &field("directory_ca"), path));
        let external_key = acme.external_account.as_ref().and_then(|account| {
            let at = field("external_account");
            let given = (account.hmac_key.as_ref(), account.hmac_key_file.as_ref(), account.hmac_key_env.as_ref());
            let key = self.needed_secret(main, &at, ("an account", "hmac_key"), given)?;
            let key = key.expose().trim_end_matches('=');
            if URL_SAFE_NO_PAD.decode(key).is_ok_and(|key| !key.is_empty()) {
                return Some(Secret::new(key));
            }
            self.fault(main, &at, "a key that cannot be read", "base64url, as the authority has given it");
            None
        });
        let mut config = acme.clone();
        config.state_directory = self.secrets.locate(&config.state_directory);
        AcmeFront { config, directory_ca, external_key }
    }

    /// Where traces go; what the collector wants to see of us, if anything.
    fn traces(&mut self, main: &Place<'_>, traces: &TracesConfig) -> Option<Secret> {
        let good = plain_address(&traces.endpoint)
            .is_some_and(|url| matches!(url.scheme(), "http" | "https") && url.query().is_none());
        if !good {
            let found = format!("`{}`", traces.endpoint);
            self.fault(main, &["http", "traces", "endpoint"], found, "an address such as `http://127.0.0.1:4318`");
        }
        if !(0.0..=1.0).contains(&traces.share) {
            self.fault(main, &["http", "traces", "share"], format!("`{}`", traces.share), "a number from 0 to 1");
        }
        let authorization = self.secret(
            main,
            &["http", "traces"],
            "authorization",
            traces.authorization.as_ref(),
            traces.authorization_file.as_ref(),
            traces.authorization_env.as_ref(),
        )?;
        if authorization.expose().bytes().all(|b| matches!(b, b' '..=b'~')) {
            return Some(authorization);
        }
        self.fault(main, &["http", "traces", "authorization"], "other than printable characters", "plain text");
        None
    }

    /// A page that is served instead of a site.
    pub(super) fn maintenance_mode(
        &mut self,
        place: &Place<'_>,
        path: &[&str],
        config: Option<&MaintenanceConfig>,
    ) -> Option<Maintenance> {
        let config = config?;
        let page = config.page.as_ref().and_then(|file| match self.secrets.file(file) {
            Ok(text) => Some(text),
            Err(error) => {
                let at: Vec<&str> = path.iter().copied().chain(["page"]).collect();
                let found = format!("`{}`, which cannot be read ({error})", file.display());
                self.fault(place, &at, found, "a readable file with a page of HTML");
                None
            }
        });
        let message = config.message.clone();
        Some(Maintenance {
            message: message.unwrap_or_else(|| "this site is being worked on and will be back soon".to_owned()),
            page,
            retry_after: config.retry_after.map_or(BACK_SOON, |d| d.0),
            allow: config.allow.clone(),
        })
    }

    /// A second pool for a part of a tenant's requests.
    pub(super) fn canary(
        &mut self,
        place: &Place<'_>,
        file: &TenantFile,
        pools: &BTreeMap<PoolName, Arc<Pool>>,
    ) -> Option<Canary> {
        let config = file.canary.as_ref()?;
        if config.weight > 100 {
            self.fault(place, &["canary", "weight"], format!("`{}`", config.weight), "a part of a hundred");
        }
        if file.placement.pool.is_none() || file.placement.pool.as_ref() == Some(&config.pool) {
            let found = format!("`{}`, and no other pool in `placement`", config.pool);
            self.fault(place, &["canary", "pool"], found, "a pool beside the tenant's own");
        }
        let Some(pool) = pools.get(config.pool.as_str()) else {
            let expected = one_of("a pool", config.pool.as_str(), pools.keys().map(PoolName::as_str));
            self.fault(place, &["canary", "pool"], format!("`{}`", config.pool), expected);
            return None;
        };
        let header = config.header.as_ref().map(|name| name.to_ascii_lowercase());
        Some(Canary { pool: Arc::clone(pool), weight: config.weight, header })
    }

    /// Headers may be changed, but not those that the gateway itself stands for.
    pub(super) fn header_policy(&mut self, place: &Place<'_>, path: &[&str], policy: &HeaderPolicyConfig) {
        for (side, changes) in [("request", &policy.request), ("response", &policy.response)] {
            for (field, name) in
                changes.remove.iter().map(|name| ("remove", name)).chain(changes.set.keys().map(|name| ("set", name)))
            {
                let small = name.to_ascii_lowercase();
                let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
                let at: Vec<&str> = path.iter().copied().chain([side, field]).collect();
                if name.is_empty() || !name.bytes().all(token) {
                    self.fault(place, &at, format!("`{name}`"), "the name of a header");
                } else if OURS.contains(&small.as_str()) || small.starts_with("x-forwarded-") {
                    self.fault(place, &at, format!("`{name}`"), "a header that the gateway does not need itself");
                }
            }
            for (name, value) in &changes.set {
                if !value.bytes().all(|b| matches!(b, b' '..=b'~')) {
                    let at: Vec<&str> = path.iter().copied().chain([side, "set", name.as_str()]).collect();
                    self.fault(place, &at, "a value with other than printable characters", "plain text");
                }
            }
        }
    }

    fn identity(&mut self, place: &Place<'_>, path: &[&str], certificate: &Path, key: &Path) -> Option<TlsFiles> {
        let at = |field| path.iter().copied().chain([field]).collect::<Vec<_>>();
        let certificate = self.pem(place, &at("certificate"), certificate);
        let key = self.pem(place, &at("key"), key);
        Some(TlsFiles { certificate: certificate?, key: Secret::new(key?) })
    }

    /// TLS for a tenant's hosts. `offered`: whether there is a listener with TLS at all.
    pub(super) fn tenant_tls(&mut self, place: &Place<'_>, file: &TenantFile, offered: bool) -> TenantTls {
        let Some(tls) = &file.tls else { return TenantTls::default() };
        if !offered {
            self.fault(
                place,
                &["tls"],
                "TLS for the tenant's hosts",
                "`http.tls` in the main file, which listens for it",
            );
        }
        let identity = match (&tls.certificate, &tls.key) {
            (Some(certificate), Some(key)) => self.identity(place, &["tls"], certificate, key),
            (None, None) => None,
            (Some(_), None) => {
                self.fault(place, &["tls", "certificate"], "a certificate without `key`", "both or none of them");
                None
            }
            (None, Some(_)) => {
                self.fault(place, &["tls", "key"], "a key without `certificate`", "both or none of them");
                None
            }
        };
        let client_ca = tls.client_ca.as_ref().and_then(|path| self.pem(place, &["tls", "client_ca"], path));
        TenantTls { identity, client_ca, without_acme: !tls.acme }
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

/// An address of a server, without a password and without a part of what is there.
fn plain_address(text: &str) -> Option<url::Url> {
    url::Url::parse(text).ok().filter(|url| {
        url.host_str().is_some_and(|host| !host.is_empty())
            && url.port() != Some(0)
            && url.username().is_empty()
            && url.password().is_none()
            && url.fragment().is_none()
    })
}
