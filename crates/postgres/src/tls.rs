//! TLS on both sides, from PEM text.

use std::fmt;
use std::sync::Arc;

use cofferdam_tenant::{Cluster, PostgresFront, TlsMode};
pub use cofferdam_tls::TlsError;
use cofferdam_tls::{identity, pem, roots};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest, Sha256, Sha384, Sha512};
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
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let verifier: Arc<dyn ServerCertVerifier> = match cluster.tls {
        TlsMode::Disable => return Ok(None),
        TlsMode::Allow | TlsMode::Prefer | TlsMode::Require => Arc::new(Lenient { provider, signed_by: None }),
        mode @ (TlsMode::VerifyCa | TlsMode::VerifyFull) => {
            let roots = Arc::new(roots("tls_ca", cluster.tls_ca.as_deref().unwrap_or_default())?);
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
            let verifier = verifier.map_err(|e| pem("tls_ca", e))?;
            match mode {
                TlsMode::VerifyFull => verifier,
                _ => Arc::new(Lenient { provider, signed_by: Some(verifier) }),
            }
        }
    };
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = match &cluster.tls_identity {
        Some(files) => {
            let (chain, key) = identity(files)?;
            builder.with_client_auth_cert(chain, key)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Some(Arc::new(config)))
}

/// The channel binding `tls-server-end-point` of a certificate (RFC 5929): its hash, by the hash function that it is
/// signed with. `None` for signatures without one, such as Ed25519.
pub(crate) fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    match parsed.signature_algorithm.algorithm.to_id_string().as_str() {
        // MD5 and SHA-1 are replaced by SHA-256; RSA and ECDSA.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.10045.4.1"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.3.2" => Some(Sha256::digest(certificate).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Some(Sha384::digest(certificate).to_vec()),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Some(Sha512::digest(certificate).to_vec()),
        _ => None,
    }
}

/// The common name of a certificate, when it has exactly one.
pub(crate) fn common_name(certificate: &[u8]) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let mut names = parsed.subject().iter_common_name();
    let name = names.next()?.as_str().ok()?.to_owned();
    names.next().is_none().then_some(name)
}

/// Checks less than the name: what libpq does below `verify-full`.
#[derive(Debug)]
struct Lenient {
    provider: Arc<CryptoProvider>,
    /// Checks who signed, whatever the name (`verify-ca`); without it nobody is checked (`prefer`, `require`).
    signed_by: Option<Arc<WebPkiServerVerifier>>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(signed_by) = &self.signed_by else { return Ok(ServerCertVerified::assertion()) };
        // The chain is looked at first: a wrong name means that it is good.
        match signed_by.verify_server_cert(leaf, chain, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
