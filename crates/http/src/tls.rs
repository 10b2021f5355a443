//! TLS for clients: which certificate a name gets, and which names want one from the client.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use cofferdam_tenant::{Catalog, HttpFront, Tenant, TlsFiles};
use cofferdam_tls::{TlsError, identity, pem, roots};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::{Acceptor, ProducesTickets, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

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
}

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
        old: Option<&Self>,
    ) -> Result<Option<Arc<Self>>, HttpError> {
        if front.config.tls.is_none() {
            return Ok(None);
        }
        let tickets = match old {
            Some(old) => Arc::clone(&old.tickets),
            None => ring::Ticketer::new().map_err(|error| failed("http.tls", error.into()))?,
        };
        let mut tls =
            Self { by_name: HashMap::new(), by_wildcard: HashMap::new(), default: None, made: HashMap::new(), tickets };
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
        for tenant in catalog.tenants().iter().filter(|t| t.tls.identity.is_some() || t.tls.client_ca.is_some()) {
            tls.add_tenant(tenant, front, &files_of, old)
                .map_err(|error| failed(&format!("tenant {}: tls", tenant.slug), error))?;
        }
        Ok(Some(Arc::new(tls)))
    }

    fn add_tenant(
        &mut self,
        tenant: &Tenant,
        front: &HttpFront,
        files_of: &HashMap<String, &TlsFiles>,
        old: Option<&Self>,
    ) -> Result<(), TlsError> {
        for host in &tenant.hosts {
            let host = host.as_str();
            let wildcard = host.split_once('.').map(|(_, parent)| format!("*.{parent}"));
            let shared = files_of.get(host).or_else(|| files_of.get(&wildcard?)).copied();
            let Some(files) = tenant.tls.identity.as_ref().or(shared).or(front.certificates.first()) else {
                return Err(pem("certificate", format!("there is none for {host}")));
            };
            let chosen = self.make(files, tenant.tls.client_ca.as_deref(), old)?;
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
        let (chain, key) = identity(files)?;
        let key = CertifiedKey::new(chain, provider.key_provider.load_private_key(key)?);
        key.keys_match()?;
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
        let chosen = self.choose(start.client_hello().server_name())?.clone();
        match start.into_stream(chosen.config).await {
            Ok(stream) => Some((stream, chosen.client_ca)),
            Err(error) => {
                tracing::debug!(%error, "a TLS handshake failed");
                None
            }
        }
    }
}

fn failed(place: &str, error: TlsError) -> HttpError {
    HttpError::Tls { place: place.to_owned(), error }
}

/// The host names in a certificate.
fn names(files: &TlsFiles) -> Result<Vec<String>, TlsError> {
    let (chain, _) = identity(files)?;
    let leaf = chain.first().map(AsRef::as_ref).unwrap_or_default();
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| pem("certificate", e))?;
    let names = parsed.subject_alternative_name().map_err(|e| pem("certificate", e))?;
    let names = names.iter().flat_map(|names| &names.value.general_names);
    let hosts = names.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    });
    Ok(hosts.collect())
}
