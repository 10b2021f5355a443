//! Certificates, keys and authorities from PEM text, in the form that both planes use.
//!
//! Internal to this workspace: its functions speak rustls, and nothing that an embedding program sees does.
#![forbid(unsafe_code)]

mod server;

pub use server::{connector, end_point, insistence, towards_server};

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cofferdam_tenant::TlsFiles;
use rustls::crypto::CryptoProvider;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use rustls_platform_verifier::BuilderVerifierExt;
use x509_parser::prelude::{ASN1Time, FromDer, GeneralName, X509Certificate};

/// A certificate, key or authority that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The PEM text holds no usable certificate or key.
    #[error("{what}: {reason}")]
    Pem {
        /// Which of them.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificate and key do not go together, or are of a kind that is not supported.
    #[error("certificate and key cannot be used: {0}")]
    Rustls(#[from] rustls::Error),
}

/// The error of a PEM text.
pub fn pem(what: &'static str, reason: impl ToString) -> TlsError {
    TlsError::Pem { what, reason: reason.to_string() }
}

/// The chain, leaf first, and its private key.
pub fn identity(files: &TlsFiles) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let chain = certificates("certificate", &files.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(files.key.expose().as_bytes()).map_err(|e| pem("key", e))?;
    Ok((chain, key))
}

/// The host names in a certificate, in small letters.
pub fn names(files: &TlsFiles) -> Result<Vec<String>, TlsError> {
    let leaf = leaf(files)?;
    let (_, parsed) = X509Certificate::from_der(&leaf).map_err(|e| pem("certificate", e))?;
    let names = parsed.subject_alternative_name().map_err(|e| pem("certificate", e))?;
    let names = names.iter().flat_map(|names| &names.value.general_names);
    let hosts = names.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    });
    Ok(hosts.collect())
}

/// From when and until when a certificate is valid.
pub fn validity(files: &TlsFiles) -> Result<Range<SystemTime>, TlsError> {
    let leaf = leaf(files)?;
    let (_, parsed) = X509Certificate::from_der(&leaf).map_err(|e| pem("certificate", e))?;
    let time = |time: ASN1Time| {
        let seconds = u64::try_from(time.timestamp()).map_err(|_| pem("certificate", "a time before 1970"))?;
        let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
        time.ok_or_else(|| pem("certificate", "a time too far away"))
    };
    Ok(time(parsed.validity().not_before)?..time(parsed.validity().not_after)?)
}

fn leaf(files: &TlsFiles) -> Result<CertificateDer<'static>, TlsError> {
    let chain = certificates("certificate", &files.certificate)?;
    chain.into_iter().next().ok_or_else(|| pem("certificate", "an empty chain"))
}

/// The chain with its key in the form in which handshakes need it; an error when the two do not go together.
pub fn key_pair(files: &TlsFiles, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
    let (chain, key) = identity(files)?;
    let key = CertifiedKey::new(chain, provider.key_provider.load_private_key(key)?);
    key.keys_match()?;
    Ok(key)
}

/// Authorities to check certificates against. `what` names the text in errors.
pub fn roots(what: &'static str, text: &str) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(what, text)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

/// TLS as browsers speak it: with the authorities that this machine trusts.
pub fn towards_anybody() -> Result<ClientConfig, TlsError> {
    Ok(ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_platform_verifier()?
        .with_no_client_auth())
}

/// TLS towards a service that shows a certificate of these authorities, or of one that this machine trusts.
pub fn towards_those(authorities: Option<&str>) -> Result<ClientConfig, TlsError> {
    let Some(authorities) = authorities else { return towards_anybody() };
    Ok(ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots("certificate authority", authorities)?)
        .with_no_client_auth())
}

/// All certificates of a text; at least one.
pub fn certificates(what: &'static str, text: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<_, _>>().map_err(|e| pem(what, e))?;
    if chain.is_empty() { Err(pem(what, "no certificate in the file")) } else { Ok(chain) }
}
