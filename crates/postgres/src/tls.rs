//! TLS on both sides, from PEM text.

use std::fmt;
use std::sync::Arc;

use cofferdam_tenant::{Cluster, PostgresFront, TlsMode};
pub use cofferdam_tls::TlsError;
use cofferdam_tls::{end_point, identity, pem, roots};
use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ServerConfig};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The protocol name that direct TLS demands (rule 2).
pub(crate) const ALPN: &[u8] = b"postgresql";

/// TLS as clients meet it.
#[derive(Clone)]
pub(crate) struct FrontTls {
    pub(crate) acceptor: TlsAcceptor,
    /// What a client may bind its password to.
    pub(crate) end_point: Option<Arc<[u8]>>,
    pub(crate) mode: TlsMode,
}

impl fmt::Debug for FrontTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontTls").field("mode", &self.mode).finish_non_exhaustive()
    }
}

/// TLS for clients; `None` when there is none.
pub(crate) fn front(front: &PostgresFront) -> Result<Option<FrontTls>, TlsError> {
    let Some(files) = &front.tls else { return Ok(None) };
    let provider = Arc::new(ring::default_provider());
    let (chain, key) = identity(files)?;
    let end_point = chain.first().and_then(|leaf| end_point(leaf)).map(Arc::from);
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match &front.client_ca {
        // Who comes without one is told so in the protocol's own words, after the handshake.
        Some(authorities) => {
            let roots = Arc::new(roots("client_ca", authorities)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).allow_unauthenticated();
            builder.with_client_cert_verifier(verifier.build().map_err(|e| pem("client_ca", e))?)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(chain, key)?;
    // A client that negotiates by SSLRequest sends no ALPN at all; one that does must mean PostgreSQL.
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Some(FrontTls { acceptor: TlsAcceptor::from(Arc::new(config)), end_point, mode: front.tls_mode }))
}

/// The configuration towards a cluster's servers; `None` when TLS is not wanted.
pub(crate) fn towards(cluster: &Cluster) -> Result<Option<Arc<ClientConfig>>, TlsError> {
    if cluster.tls == TlsMode::Disable {
        return Ok(None);
    }
    let identity = cluster.tls_identity.as_ref();
    let mut config = cofferdam_tls::towards_server(cluster.tls, "tls_ca", cluster.tls_ca.as_deref(), identity)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Some(Arc::new(config)))
}

/// The common name of a certificate, when it has exactly one.
pub(crate) fn common_name(certificate: &[u8]) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let mut names = parsed.subject().iter_common_name();
    let name = names.next()?.as_str().ok()?.to_owned();
    names.next().is_none().then_some(name)
}
