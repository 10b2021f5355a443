//! Certificates of an authority: Pebble, which Let's Encrypt tests clients with. It refuses a part of all nonces, so that retries are
//! seen too. Tests skip with a word where it is not installed.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cofferdam::Gateway;
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::acme::{Authority, AuthorityOptions};
use cofferdam_testkit::load::HttpClient;
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use cofferdam_testkit::postgres::free_port;
use cofferdam_tests::eventually;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// An authority with its own certificate, the ports at which it looks, and an Odoo.
struct House {
    authority: Option<Authority>,
    directory_ca: String,
    http: u16,
    https: u16,
    odoo: MiniOdoo,
    state: tempfile::TempDir,
}

impl House {
    async fn new(validity: Duration) -> Option<Self> {
        Self::with(validity, 0, None).await
    }

    async fn with(validity: Duration, slow: u32, external_account: Option<(&str, &str)>) -> Option<Self> {
        let identity = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let identity = (identity.cert.pem(), identity.signing_key.serialize_pem());
        let (http, https) = (free_port().unwrap(), free_port().unwrap());
        let options = AuthorityOptions {
            identity: identity.clone(),
            http_port: http,
            tls_port: https,
            validity,
            slow,
            external_account: external_account.map(|(name, key)| (name.to_owned(), key.to_owned())),
        };
        let Some(authority) = Authority::start(&options).unwrap() else {
            eprintln!("pebble is not installed: skipped");
            return None;
        };
        let hosts = ["acme", "bolt", "chem", "lost"].map(|t| (format!("{t}.example.com"), format!("{t}_db")));
        let odoo = OdooOptions { workers: 8, databases: hosts.into(), ..OdooOptions::default() };
        let odoo = MiniOdoo::start(odoo).await.unwrap();
        let state = tempfile::tempdir().unwrap();
        Some(Self { authority: Some(authority), directory_ca: identity.0, http, https, odoo, state })
    }

    fn authority(&self) -> &Authority {
        self.authority.as_ref().unwrap()
    }

    /// A configuration, with more lines for `http`, `http.tls`, and `http.tls.acme`.
    fn configuration(&self, ports: (u16, u16), [http, tls, acme]: [&str; 3]) -> TenantDirectory {
        let directory = self.authority().directory();
        let main = format!(
            "http:\n  listen: ['127.0.0.1:{}']\n  session_key: a key of this test alone\n{http}  tls:\n    listen: ['127.0.0.1:{}']\n{tls}    acme:\n      directory: {directory}\n      \
             directory_ca: ca.crt\n      agree_to_terms: true\n      contacts: [ops@example.com]\n      \
             state_directory: '{}'\n{acme}admin: {{ listen: '127.0.0.1:0' }}\n\
             pools:\n  odoo:\n    servers: [{{ address: '{}', gevent: '{}' }}]\n    slots: 8\nplans:\n  standard: {{}}\n",
            ports.0,
            ports.1,
            self.state.path().display(),
            self.odoo.http(),
            self.odoo.gevent(),
        );
        let directory = TenantDirectory::new(&main).unwrap();
        std::fs::write(beside(&directory, "ca.crt"), &self.directory_ca).unwrap();
        directory
    }

    /// Where everything is that is kept of the authority.
    fn kept(&self) -> PathBuf {
        std::fs::read_dir(self.state.path()).unwrap().next().unwrap().unwrap().path()
    }

    async fn handshake(&self, address: SocketAddr, host: &str) -> Option<tokio_rustls::client::TlsStream<TcpStream>> {
        let root = self.authority.as_ref().map(|authority| authority.root().unwrap());
        handshake(address, host, root.as_deref()).await
    }

    /// The certificate that a host shows, if it is one of the authority's.
    async fn leaf(&self, address: SocketAddr, host: &str) -> Option<Vec<u8>> {
        let stream = self.handshake(address, host).await?;
        Some(stream.get_ref().1.peer_certificates().unwrap()[0].to_vec())
    }
}

/// A connection whose certificate is for the host and signed by this root; by anybody without one.
async fn handshake(
    address: SocketAddr,
    host: &str,
    root: Option<&str>,
) -> Option<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    if let Some(root) = root {
        roots.add(CertificateDer::from_pem_slice(root.as_bytes()).unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from(host.to_owned()).unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.ok()
}

fn beside(directory: &TenantDirectory, name: &str) -> PathBuf {
    directory.path().parent().unwrap().join(name)
}

fn tenant(directory: &TenantDirectory, name: &str, more: &str) {
    let text = format!(
        "tenant: {name}\nhosts: [{name}.example.com]\ndatabase: {name}_db\nplacement: {{ pool: odoo }}\nplan: standard\n{more}"
    );
    directory.tenant(name, &text).unwrap();
}

async fn start(directory: &TenantDirectory) -> Gateway {
    Gateway::builder().config_file(directory.path()).start().await.unwrap()
}

async fn stop(gateway: Gateway) {
    gateway.drain();
    gateway.wait().await;
}

async fn get(address: SocketAddr, host: &str, path: &str) -> (u16, String) {
    let answer = HttpClient::connect(address).await.unwrap().get(host, path).await.unwrap();
    (answer.status, answer.text())
}

/// What the admin surface says of a host.
async fn told(gateway: &Gateway, host: &str) -> serde_json::Value {
    let (status, text) = get(gateway.admin_address().unwrap(), "localhost", "/api/v1/certificates").await;
    assert_eq!(status, 200);
    let all: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    all.into_iter().find(|one| one["host"] == host).unwrap_or_default()
}

#[tokio::test]
async fn hosts_get_certificates_and_one_that_leads_elsewhere_fails_alone() {
    let Some(mut house) = House::new(YEAR).await else { return };
    house.authority().lead("lost.example.com", "127.0.0.9").unwrap();
    let directory = house.configuration((house.http, house.https), ["", "", ""]);
    tenant(&directory, "acme", "");
    // Nobody gets in here, and the authority does.
    tenant(&directory, "bolt", "networks: { allow: [192.0.2.1] }\nmaintenance_mode: {}\n");
    tenant(&directory, "chem", "tls: { acme: false }\n");
    tenant(&directory, "lost", "");
    let gateway = start(&directory).await;
    let (plain, tls) = (gateway.http_addresses()[0], gateway.https_addresses()[0]);
    for host in ["acme.example.com", "bolt.example.com"] {
        eventually(|| async { house.leaf(tls, host).await.is_some() }).await;
        assert!(told(&gateway, host).await["not_after"].is_u64());
    }
    eventually(|| async { told(&gateway, "lost.example.com").await["failures"] == 1 }).await;
    let lost = told(&gateway, "lost.example.com").await;
    assert!(lost["error"].as_str().unwrap().contains("127.0.0.9"), "{lost}");
    assert!(lost["not_after"].is_null() && house.leaf(tls, "lost.example.com").await.is_none());
    assert!(told(&gateway, "chem.example.com").await.is_null(), "it wants none");
    assert!(house.leaf(tls, "chem.example.com").await.is_none());
    let metrics = get(gateway.admin_address().unwrap(), "localhost", "/metrics").await.1;
    for line in [
        "cofferdam_http_certificates{state=\"held\"} 2",
        "cofferdam_http_certificates{state=\"missing\"} 1",
        "cofferdam_http_certificates_failing 1",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }

    // It is served over the certificate; what is asked for in plain, and is no challenge, is sent there.
    let mut stream = house.handshake(tls, "acme.example.com").await.unwrap();
    let request = "GET /testkit/echo HTTP/1.1\r\nHost: acme.example.com\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text).await;
    assert!(text.contains("database: acme_db"), "{text}");
    for token in ["", "x", "..%2f..%2faccount.json", "%2e%2e/account.json"] {
        let (status, text) = get(plain, "acme.example.com", &format!("/.well-known/acme-challenge/{token}")).await;
        assert!([308, 400].contains(&status), "{token}: {status} {text}");
    }

    // A host that comes later gets one without a restart; what is there is there after one, with nobody to ask.
    tenant(&directory, "chem", "");
    gateway.reload().await.unwrap();
    eventually(|| async { house.leaf(tls, "chem.example.com").await.is_some() }).await;
    let before = house.leaf(tls, "acme.example.com").await.unwrap();
    let root = house.authority().root().unwrap();
    let lost = told(&gateway, "lost.example.com").await;
    stop(gateway).await;
    // What has failed is not tried at once, and what is there is served; first as if nothing had happened, …
    let gateway = start(&directory).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(told(&gateway, "lost.example.com").await, lost);
    assert_eq!(house.leaf(gateway.https_addresses()[0], "acme.example.com").await.unwrap(), before);
    stop(gateway).await;
    // … then with nobody to ask, and a file that nobody can read.
    house.authority = None;
    std::fs::write(house.kept().join("certificates/chem.example.com.pem"), [0xff, 0]).unwrap();
    let gateway = start(&directory).await;
    let stream = handshake(gateway.https_addresses()[0], "acme.example.com", Some(&root)).await.unwrap();
    assert_eq!(stream.get_ref().1.peer_certificates().unwrap()[0].to_vec(), before);
    eventually(|| async { told(&gateway, "chem.example.com").await["error"].is_string() }).await;
    let chem = told(&gateway, "chem.example.com").await;
    assert!(chem["not_after"].is_null() && chem["failures"] == 0, "the authority is what has failed: {chem}");
    assert_eq!(told(&gateway, "lost.example.com").await["failures"], lost["failures"]);
    stop(gateway).await;
}

#[tokio::test]
async fn a_configured_certificate_is_not_ordered_and_challenges_may_be_shown_by_tls() {
    let Some(house) = House::new(YEAR).await else { return };
    let own = rcgen::generate_simple_self_signed(["bolt.example.com".to_owned()]).unwrap();
    let files = "    certificates: [{ certificate: bolt.crt, key: bolt.key }]\n";
    // The port of plain requests is not the one that the authority knows.
    let directory = house.configuration((0, house.https), ["", files, "      challenge: tls-alpn-01\n"]);
    std::fs::write(beside(&directory, "bolt.crt"), own.cert.pem()).unwrap();
    std::fs::write(beside(&directory, "bolt.key"), own.signing_key.serialize_pem()).unwrap();
    // Browsers must show certificates there, and the authority has none.
    tenant(&directory, "acme", "tls: { client_ca: ca.crt }\n");
    tenant(&directory, "bolt", "");
    let gateway = start(&directory).await;
    let tls = gateway.https_addresses()[0];
    eventually(|| async { house.leaf(tls, "acme.example.com").await.is_some() }).await;
    assert!(told(&gateway, "bolt.example.com").await.is_null());
    let stream = handshake(tls, "bolt.example.com", Some(&own.cert.pem())).await.unwrap();
    assert_eq!(stream.get_ref().1.peer_certificates().unwrap()[0], *own.cert.der());
    stop(gateway).await;
}

#[tokio::test]
async fn certificates_are_renewed_and_connections_go_on() {
    let Some(house) = House::new(Duration::from_secs(16)).await else { return };
    let directory = house.configuration((house.http, house.https), ["", "", ""]);
    tenant(&directory, "acme", "");
    let gateway = start(&directory).await;
    let tls = gateway.https_addresses()[0];
    let host = "acme.example.com";
    eventually(|| async { house.leaf(tls, host).await.is_some() }).await;
    let mut open = house.handshake(tls, host).await.unwrap();
    let first = open.get_ref().1.peer_certificates().unwrap()[0].to_vec();
    eventually(|| async { house.leaf(tls, host).await.is_some_and(|leaf| leaf != first) }).await;
    let request = format!("GET /web HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    open.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    let _ = open.read_to_string(&mut text).await;
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    stop(gateway).await;
}

#[tokio::test]
async fn reloads_do_not_begin_orders_anew() {
    let Some(house) = House::with(YEAR, 3, None).await else { return };
    let directory = house.configuration((house.http, house.https), ["", "", ""]);
    tenant(&directory, "acme", "");
    let gateway = start(&directory).await;
    let tls = gateway.https_addresses()[0];
    // The authority takes its time, and the configuration changes all the while.
    eventually(|| async {
        gateway.reload().await.unwrap();
        house.leaf(tls, "acme.example.com").await.is_some()
    })
    .await;
    let told = told(&gateway, "acme.example.com").await;
    assert_eq!(told["failures"], 0, "{told}");
    stop(gateway).await;
}

/// Ordered at once again, it would be ordered for ever: the clock is wrong, or the authority.
#[tokio::test]
async fn a_certificate_that_is_over_when_it_comes_is_a_failure() {
    let Some(house) = House::new(Duration::from_secs(1)).await else { return };
    let directory = house.configuration((house.http, house.https), ["", "", ""]);
    tenant(&directory, "acme", "");
    let gateway = start(&directory).await;
    eventually(|| async { told(&gateway, "acme.example.com").await["failures"] == 1 }).await;
    let told = told(&gateway, "acme.example.com").await;
    assert!(told["error"].as_str().unwrap().contains("clock"), "{told}");
    stop(gateway).await;
}

#[tokio::test]
async fn of_two_gateways_one_orders_both_serve_and_the_other_takes_over() {
    let Some(house) = House::new(YEAR).await else { return };
    // The authority asks the second, which does not trust it and can order nothing.
    let one = house.configuration((0, 0), ["", "", ""]);
    let two = house.configuration((house.http, house.https), ["", "", ""]);
    let other = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(beside(&two, "ca.crt"), other.cert.pem()).unwrap();
    tenant(&one, "acme", "");
    tenant(&two, "acme", "");
    let second = start(&two).await;
    let first = start(&one).await;
    let (a, b) = (first.https_addresses()[0], second.https_addresses()[0]);
    let host = "acme.example.com";
    eventually(|| async { house.leaf(a, host).await.is_some() }).await;
    eventually(|| async { house.leaf(b, host).await.is_some() }).await;
    assert_eq!(house.leaf(a, host).await, house.leaf(b, host).await, "each has got its own");
    stop(first).await;
    tenant(&two, "bolt", "");
    second.reload().await.unwrap();
    eventually(|| async { told(&second, "bolt.example.com").await["error"].is_string() }).await;
    std::fs::write(beside(&two, "ca.crt"), &house.directory_ca).unwrap();
    second.reload().await.unwrap();
    eventually(|| async { house.leaf(b, "bolt.example.com").await.is_some() }).await;
    stop(second).await;
}

#[tokio::test]
async fn an_authority_may_want_an_account_that_it_knows() {
    const KEY: &str = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";
    let Some(house) = House::with(YEAR, 0, Some(("kid-1", KEY))).await else { return };
    let account = format!("      external_account: {{ key_id: kid-1, hmac_key: {KEY} }}\n");
    let directory = house.configuration((house.http, house.https), ["", "", &account]);
    tenant(&directory, "acme", "");
    let gateway = start(&directory).await;
    eventually(|| async { house.leaf(gateway.https_addresses()[0], "acme.example.com").await.is_some() }).await;
    stop(gateway).await;
}

#[tokio::test]
async fn what_is_wrong_about_an_authority_is_said_with_its_place() {
    let directory = TenantDirectory::new(
        "http:\n  listen: ['127.0.0.1:0']\n  tls:\n    listen: ['127.0.0.1:0']\n    acme:\n      directory: http://ca.example/dir\n      \
         agree_to_terms: false\n      contacts: ['mailto:ops@example.com']\n      state_directory: state\n      \
         external_account: { key_id: k, hmac_key: '%%' }\npools: {}\nplans: {}\n",
    )
    .unwrap();
    let error = Gateway::builder().config_file(directory.path()).start().await.unwrap_err().to_string();
    for (line, word) in [(6, "https://"), (7, "agree"), (8, "mail address"), (10, "base64url")] {
        assert!(error.contains(&format!("cofferdam.yaml:{line}:")) && error.contains(word), "{word} in {error}");
    }
    assert!(!error.contains("%%"), "a key is never shown: {error}");
    assert!(!beside(&directory, "state").exists(), "nothing is made for a configuration that is not served");
}
