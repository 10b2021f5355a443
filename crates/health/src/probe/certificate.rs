//! A certificate as whoever connects is shown it, and how long it will still be good.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use x509_parser::parse_x509_certificate;

use super::Probe;
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Looks at the certificate that a server shows for a name.
#[derive(Debug, Clone)]
pub struct CertificateProbe {
    /// Whose.
    pub tenant: String,
    /// The name in the certificate.
    pub host: String,
    /// Where to connect, as `host:port`.
    pub connect: String,
    /// It ends in fewer days: a warning, a failure.
    pub limits: (f64, f64),
    /// How often to look.
    pub interval: Duration,
}

/// How long a server may take to show it.
const FETCH: Duration = Duration::from_secs(4);

/// Takes any certificate: this is about when it ends. Whether it is trusted is seen by whoever fetches a page.
#[derive(Debug)]
struct Any(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Any {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl CertificateProbe {
    /// When the shown certificate ends, in seconds since 1970, and for which names it is.
    async fn fetch(&self) -> Result<(i64, Vec<String>), String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Any(provider)))
            .with_no_client_auth();
        let host = self.host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host).map_err(|_| format!("`{}` is no host name", self.host))?;
        let tcp = TcpStream::connect(&self.connect).await.map_err(|e| e.to_string())?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, tcp).await.map_err(|e| e.to_string())?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let first = chain.first().ok_or("it shows no certificate")?;
        let (_, certificate) = parse_x509_certificate(first).map_err(|e| e.to_string())?;
        let names = certificate.subject_alternative_name().ok().flatten().map(|names| {
            let text = |name: &x509_parser::extensions::GeneralName<'_>| match name {
                x509_parser::extensions::GeneralName::DNSName(name) => Some((*name).to_owned()),
                x509_parser::extensions::GeneralName::IPAddress(bytes) => match bytes.len() {
                    4 => <[u8; 4]>::try_from(*bytes).ok().map(|ip| std::net::Ipv4Addr::from(ip).to_string()),
                    _ => <[u8; 16]>::try_from(*bytes).ok().map(|ip| std::net::Ipv6Addr::from(ip).to_string()),
                },
                _ => None,
            };
            names.value.general_names.iter().filter_map(text).collect()
        });
        Ok((certificate.validity().not_after.timestamp(), names.unwrap_or_default()))
    }
}

#[async_trait]
impl Probe for CertificateProbe {
    fn name(&self) -> String {
        format!("certificate of {}", self.host)
    }

    fn kind(&self) -> &'static str {
        "certificate"
    }

    fn checks(&self) -> Vec<CheckId> {
        vec![self.reachability()]
    }

    fn reachability(&self) -> CheckId {
        CheckId::tenant(&self.tenant, &format!("certificate of {}", self.host))
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    fn topic(&self) -> Topic {
        Topic::Security
    }

    fn waits(&self) -> bool {
        true
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let observation =
            |status, text: String| Observation::pass(self.reachability(), Topic::Security, now, text).with(status);
        let fetched = tokio::time::timeout(FETCH, self.fetch()).await;
        let fetched = fetched.unwrap_or_else(|_| Err(format!("no answer within {} s", FETCH.as_secs())));
        let (ends, names) = match fetched {
            Ok(found) => found,
            // That says nothing of the certificate: whether somebody is there, a page says.
            Err(error) => {
                let text = format!("no certificate could be seen: {}: {error}", self.connect);
                return vec![observation(Status::Unknown, text)];
            }
        };
        // Until when it is good is compared with the clock, not with the date of the look.
        let days = (ends - Timestamp::now().as_second()) as f64 / 86_400.0;
        let (warn, fail) = self.limits;
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let fits = names.iter().any(|name| fits(name, host));
        let (status, text) = if !fits {
            (Status::Fail, format!("the certificate is for {}, not for {}", names.join(", "), self.host))
        } else if days <= 0.0 {
            (Status::Fail, format!("the certificate of {} has ended {:.0} days ago", self.host, -days))
        } else {
            let status = match days {
                d if d < fail => Status::Fail,
                d if d < warn => Status::Warn,
                _ => Status::Pass,
            };
            (status, format!("the certificate of {} is good for {days:.0} days more", self.host))
        };
        vec![observation(status, text).figure(Evidence::new("certificate_days_left", days, "").limited(fail))]
    }
}

/// Whether a name in a certificate, perhaps with a star for its first part, is for a host.
fn fits(name: &str, host: &str) -> bool {
    match name.strip_prefix("*.") {
        Some(rest) => host.split_once('.').is_some_and(|(_, domain)| domain.eq_ignore_ascii_case(rest)),
        None => name.eq_ignore_ascii_case(host),
    }
}
