//! TLS for clients: which certificate a name gets, and which names want one from the client.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use cofferdam_acme::{Acme, Certificates};
use cofferdam_tenant::{Catalog, HttpFront, Tenant, TlsFiles};
use cofferdam_tls::{TlsError, identity, key_pair, names, pem, roots};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::{Acceptor, ProducesTickets, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, StartHandshake};

use crate::HttpError;

/// What a name gets.
#[derive(Clone)]
struct Chosen {
    config: Arc<ServerConfig>,
    /// The authorities that have signed the certificates of its clients.
    client_ca: Option<Arc<str>>,
}

/// What a configuration was made of: two that are made of the same are one, and its session tickets go on after a reload.
#[derive(PartialEq, Eq, Hash, Clone)]
struct Made {
    files: TlsFiles,
    client_ca: Option<String>,
}

/// The names that there are certificates for.
pub(crate) struct FrontTls {
    by_name: HashMap<String, Chosen>,
    /// By what follows the asterisk.
    by_wildcard: HashMap<String, Chosen>,
    default: Option<Chosen>,
    made: HashMap<Made, Chosen>,
    tickets: Arc<dyn ProducesTickets>,
    /// Where certificates come from that nobody has configured.
    acme: Option<Arc<Acme>>,
    /// The hosts that get theirs there.
    by_acme: BTreeSet<String>,
}

/// The protocol by which an authority looks whether a host is served here (RFC 8737).
const ACME_TLS: &[u8] = b"acme-tls/1";

impl fmt::Debug for FrontTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontTls").field("names", &self.by_name.len()).finish_non_exhaustive()
    }
}

impl FrontTls {
    /// Everything that the catalog has; `None` without a listener for it. An error names the file's place.
    pub(crate) fn new(
        catalog: &Catalog,
        front: &HttpFront,
        acme: Option<&Arc<Acme>>,
        old: Option<&Self>,
    ) -> Result<Option<Arc<Self>>, HttpError> {
        if front.config.tls.is_none() {
            return Ok(None);
        }
        let tickets = match old {
            Some(old) => Arc::clone(&old.tickets),
            None => ring::Ticketer::new().map_err(|error| failed("http.tls", error.into()))?,
        };
        let mut tls = Self {
            by_name: HashMap::new(),
            by_wildcard: HashMap::new(),
            default: None,
            made: HashMap::new(),
            tickets,
            acme: acme.cloned(),
            by_acme: BTreeSet::new(),
        };
        let got = acme.map(|acme| Arc::clone(&acme.certificates().borrow()));
        let mut files_of: HashMap<String, &TlsFiles> = HashMap::new();
        for (i, files) in front.certificates.iter().enumerate() {
            let place = format!("http.tls.certificates[{i}]");
            let chosen = tls.make(files, None, old).map_err(|error| failed(&place, error))?;
            for name in names(files).map_err(|error| failed(&place, error))? {
                files_of.entry(name.clone()).or_insert(files);
                tls.insert(&name, &chosen, false);
            }
            tls.default.get_or_insert(chosen);
        }
        for tenant in catalog.tenants() {
            tls.add_tenant(tenant, front, &files_of, got.as_deref(), old)
                .map_err(|error| failed(&format!("tenant {}: tls", tenant.slug), error))?;
        }
        Ok(Some(Arc::new(tls)))
    }

    fn add_tenant(
        &mut self,
        tenant: &Tenant,
        front: &HttpFront,
        files_of: &HashMap<String, &TlsFiles>,
        by_acme: Option<&Certificates>,
        old: Option<&Self>,
    ) -> Result<(), TlsError> {
        let own = tenant.tls.identity.as_ref();
        let client_ca = tenant.tls.client_ca.as_deref();
        let by_acme = by_acme.filter(|_| own.is_none() && !tenant.tls.without_acme);
        for host in &tenant.hosts {
            let host = host.as_str();
            let wildcard = host.split_once('.').map(|(_, parent)| format!("*.{parent}"));
            let shared = files_of.get(host).or_else(|| files_of.get(&wildcard?)).copied();
            let by_acme = by_acme.filter(|_| shared.is_none() && is_one_name(host));
            if by_acme.is_some() {
                self.by_acme.insert(host.to_owned());
            }
            let got = by_acme.and_then(|all| all.get(host)).map(AsRef::as_ref);
            if own.is_none() && client_ca.is_none() && got.is_none() {
                // It has the one that is for its name, or the first.
                continue;
            }
            let Some(files) = own.or(shared).or(got).or(front.certificates.first()) else {
                if by_acme.is_some() {
                    // Not served before it comes.
                    continue;
                }
                return Err(pem("certificate", format!("there is none for {host}")));
            };
            let chosen = self.make(files, client_ca, old)?;
            self.insert(host, &chosen, true);
        }
        Ok(())
    }

    fn insert(&mut self, name: &str, chosen: &Chosen, replace: bool) {
        let (map, name) = match name.strip_prefix("*.") {
            Some(parent) => (&mut self.by_wildcard, parent),
            None => (&mut self.by_name, name),
        };
        if replace || !map.contains_key(name) {
            map.insert(name.to_owned(), chosen.clone());
        }
    }

    fn make(&mut self, files: &TlsFiles, client_ca: Option<&str>, old: Option<&Self>) -> Result<Chosen, TlsError> {
        let made = Made { files: files.clone(), client_ca: client_ca.map(str::to_owned) };
        if let Some(chosen) = self.made.get(&made).or_else(|| old?.made.get(&made)).cloned() {
            self.made.insert(made, chosen.clone());
            return Ok(chosen);
        }
        let provider = Arc::new(ring::default_provider());
        let key = key_pair(files, &provider)?;
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let builder = match client_ca {
            Some(authorities) => {
                let roots = Arc::new(roots("client_ca", authorities)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|e| pem("client_ca", e))?)
            }
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::new(key))));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // A ticket of one configuration opens no other: a client that has shown no certificate must not resume a session
        // where one is demanded.
        config.ticketer = match client_ca {
            Some(_) => ring::Ticketer::new()?,
            None => Arc::clone(&self.tickets),
        };
        let chosen = Chosen { config: Arc::new(config), client_ca: client_ca.map(Arc::from) };
        self.made.insert(made, chosen.clone());
        Ok(chosen)
    }

    fn choose(&self, name: Option<&str>) -> Option<&Chosen> {
        let name = name.map(str::to_ascii_lowercase).unwrap_or_default();
        let wildcard = || self.by_wildcard.get(name.split_once('.')?.1);
        self.by_name.get(&name).or_else(wildcard).or(self.default.as_ref())
    }

    /// The hosts that get their certificates from an authority.
    pub(crate) fn by_acme(&self) -> &BTreeSet<String> {
        &self.by_acme
    }

    /// Shows an authority that a host is served here. That is all that such a connection is for.
    async fn prove<S: AsyncRead + AsyncWrite + Unpin>(&self, host: &str, start: StartHandshake<S>) {
        let Some(acme) = &self.acme else { return };
        let Some(files) = acme.challenge_certificate(host).await else { return };
        let config = (|| {
            let provider = Arc::new(ring::default_provider());
            // Made here, and with an extension that a look at whether they fit does not know.
            let (chain, key) = identity(&files)?;
            let key = Arc::new(CertifiedKey::new(chain, provider.key_provider.load_private_key(key)?));
            let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
            let resolver = Arc::new(SingleCertAndKey::from(key));
            let mut config = builder.with_no_client_auth().with_cert_resolver(resolver);
            config.alpn_protocols = vec![ACME_TLS.to_vec()];
            Ok::<_, TlsError>(config)
        })();
        match config {
            Ok(config) => match start.into_stream(Arc::new(config)).await {
                Ok(mut stream) => drop(stream.shutdown().await),
                Err(error) => tracing::debug!(host, %error, "an authority has not looked to the end"),
            },
            Err(error) => tracing::error!(host, %error, "an authority cannot be shown a certificate"),
        }
    }

    /// A handshake; `None` when it fails. Gives the authorities by which the client has been checked, if it was.
    pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
    ) -> Option<(TlsStream<S>, Option<Arc<str>>)> {
        let start = match LazyConfigAcceptor::new(Acceptor::default(), stream).await {
            Ok(start) => start,
            Err(error) => {
                tracing::debug!(%error, "no TLS");
                return None;
            }
        };
        let hello = start.client_hello();
        if self.acme.is_some() && hello.alpn().is_some_and(|mut offered| offered.any(|name| name == ACME_TLS)) {
            let name = hello.server_name().map(str::to_ascii_lowercase);
            self.prove(&name?, start).await;
            return None;
        }
        let chosen = self.choose(hello.server_name())?.clone();
        match start.into_stream(chosen.config).await {
            Ok(stream) => Some((stream, chosen.client_ca)),
            Err(error) => {
                tracing::debug!(%error, "a TLS handshake failed");
                None
            }
        }
    }
}

/// Whether an authority gives a certificate for a host without being shown the whole domain.
fn is_one_name(host: &str) -> bool {
    let is_name = host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-'));
    is_name && host != "localhost" && host.parse::<IpAddr>().is_err()
}

fn failed(place: &str, error: TlsError) -> HttpError {
    HttpError::Tls { place: place.to_owned(), error }
}
