//! TLS, HTTP/2 and the PROXY protocol in front of a miniature Odoo.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cofferdam::Gateway;
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// Whoever signs the certificates of these tests.
struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    certificate: String,
}

impl Authority {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "an authority");
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).unwrap().pem();
        Self { issuer: rcgen::Issuer::new(parameters, key), certificate }
    }

    /// A certificate and its key, as PEM text.
    fn sign(&self, names: &[&str]) -> (String, String) {
        let names = names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let key = rcgen::KeyPair::generate().unwrap();
        let signed = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        (signed.pem(), key.serialize_pem())
    }
}

struct House {
    _odoo: MiniOdoo,
    gateway: Gateway,
    directory: TenantDirectory,
    authority: Authority,
}

/// `acme` has the gateway's wildcard certificate, `bolt` one of its own, `chem` lets in who has a certificate.
async fn house(http: &str) -> House {
    let tenants = ["acme", "bolt", "chem"];
    let databases: HashMap<_, _> = tenants.map(|t| (format!("{t}.example.com"), format!("{t}_db"))).into();
    let odoo = MiniOdoo::start(OdooOptions { workers: 8, databases, ..OdooOptions::default() }).await.unwrap();
    let main = format!(
        "http:\n  listen: ['127.0.0.1:0']\n  tls:\n    listen: ['127.0.0.1:0']\n    certificates: [{{ certificate: all.crt, \
         key: all.key }}]\n    hsts: 365d\n  trusted_proxies: [127.0.0.2]\n{http}\
         pools:\n  odoo:\n    servers: [{{ address: '{}', gevent: '{}' }}]\n    slots: 8\nplans:\n  standard: {{}}\n",
        odoo.http(),
        odoo.gevent(),
    );
    let directory = TenantDirectory::new(&main).unwrap();
    let authority = Authority::new();
    let house = |text: &str, name: &str| std::fs::write(beside(&directory, name), text).unwrap();
    for (name, hosts) in [("all", &["*.example.com"][..]), ("bolt", &["bolt.example.com"])] {
        let (certificate, key) = authority.sign(hosts);
        house(&certificate, &format!("{name}.crt"));
        house(&key, &format!("{name}.key"));
    }
    house(&authority.certificate, "ca.crt");
    for t in tenants {
        let tls = match t {
            "bolt" => "tls: { certificate: bolt.crt, key: bolt.key }\n",
            "chem" => "tls: { client_ca: ca.crt }\n",
            _ => "",
        };
        let text = format!(
            "tenant: {t}\nhosts: [{t}.example.com]\ndatabase: {t}_db\nplacement: {{ pool: odoo }}\nplan: standard\n{tls}"
        );
        directory.tenant(t, &text).unwrap();
    }
    let gateway = Gateway::builder().config_file(directory.path()).start().await.unwrap();
    House { _odoo: odoo, gateway, directory, authority }
}

fn beside(directory: &TenantDirectory, name: &str) -> PathBuf {
    directory.path().parent().unwrap().join(name)
}

impl House {
    fn tls(&self) -> SocketAddr {
        self.gateway.https_addresses()[0]
    }

    fn plain(&self) -> SocketAddr {
        self.gateway.http_addresses()[0]
    }

    async fn dial(
        &self,
        name: &str,
        alpn: &[&str],
        identity: Option<(String, String)>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(self.tls()).await?;
        self.handshake(tcp, name, alpn, identity).await
    }

    async fn handshake(
        &self,
        tcp: TcpStream,
        name: &str,
        alpn: &[&str],
        identity: Option<(String, String)>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.certificate.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let builder = builder.with_root_certificates(roots);
        let mut config = match identity {
            Some((certificate, key)) => {
                let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
        // With TLS 1.3 the server's verdict about the client's certificate comes with the first read.
        stream.flush().await?;
        Ok(stream)
    }

    async fn curl(&self, args: &[&str], path: &str) -> String {
        let output = tokio::process::Command::new("curl")
            .args(["-sS", "--max-time", "20", "--cacert"])
            .arg(beside(&self.directory, "ca.crt"))
            .args(["--resolve", &format!("*:{}:127.0.0.1", self.tls().port())])
            .args(args)
            .arg(format!("https://acme.example.com:{}{path}", self.tls().port()))
            .output()
            .await
            .unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }
}

fn leaf(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

async fn one(mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin, host: &str, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    if stream.write_all(request.as_bytes()).await.is_err() {
        return String::new();
    }
    let mut out = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut out)).await.unwrap();
    String::from_utf8_lossy(&out).into_owned()
}

#[tokio::test]
async fn each_name_gets_its_certificate_and_a_reload_changes_it() {
    let house = house("").await;
    let acme = house.dial("acme.example.com", &["http/1.1"], None).await.unwrap();
    let bolt = house.dial("bolt.example.com", &[], None).await.unwrap();
    let (shared, own) = (leaf(&acme), leaf(&bolt));
    assert_ne!(shared, own);
    assert!(house.dial("acme.example.net", &[], None).await.is_err(), "no certificate is for that name");
    let answer = one(acme, "acme.example.com", "/testkit/echo").await;
    assert!(answer.contains("database: acme_db") && answer.contains("header x-forwarded-proto: https"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("strict-transport-security: max-age=31536000\r\n"), "{answer}");
    // The gateway's own answers too, but to who names no site of its own.
    for (host, status, said) in [("acme.example.com", " 404 ", true), ("nobody.example.com", " 421 ", false)] {
        let stream = house.dial("acme.example.com", &["http/1.1"], None).await.unwrap();
        let answer = one(stream, host, "/web/database/manager").await;
        assert!(answer.contains(status), "{answer}");
        assert_eq!(answer.to_ascii_lowercase().contains("strict-transport-security"), said, "{answer}");
    }
    let page = one(bolt, "bolt.example.com", "/web").await;
    assert!(page.contains("; SameSite=Lax; Secure\r\n"), "{page}");

    let (certificate, key) = house.authority.sign(&["bolt.example.com"]);
    std::fs::write(beside(&house.directory, "bolt.crt"), &certificate).unwrap();
    let refused = house.gateway.reload().await.unwrap_err().to_string();
    assert!(refused.contains("tenant bolt: tls"), "a certificate without its key was taken: {refused}");
    assert_eq!(leaf(&house.dial("bolt.example.com", &[], None).await.unwrap()), own);
    std::fs::write(beside(&house.directory, "bolt.key"), &key).unwrap();
    house.gateway.reload().await.unwrap();
    assert_ne!(leaf(&house.dial("bolt.example.com", &[], None).await.unwrap()), own);
    assert_eq!(leaf(&house.dial("acme.example.com", &[], None).await.unwrap()), shared);
}

#[tokio::test]
async fn a_site_that_wants_certificates_lets_nobody_else_in_by_no_connection() {
    let house = house("").await;
    let identity = || Some(house.authority.sign(&["somebody"]));
    let stranger = Authority::new().sign(&["somebody"]);
    for identity in [None, Some(stranger)] {
        let answer = match house.dial("chem.example.com", &[], identity).await {
            Ok(stream) => one(stream, "chem.example.com", "/testkit/echo").await,
            Err(error) => error.to_string(),
        };
        assert!(!answer.contains("chem_db"), "{answer}");
    }
    let stream = house.dial("chem.example.com", &[], identity()).await.unwrap();
    assert!(one(stream, "chem.example.com", "/testkit/echo").await.contains("database: chem_db"));
    // A connection made for another name, as browsers reuse one whose certificate fits.
    let stream = house.dial("acme.example.com", &[], identity()).await.unwrap();
    let answer = one(stream, "chem.example.com", "/testkit/echo").await;
    assert!(answer.starts_with("HTTP/1.1 421"), "{answer}");
}

#[tokio::test]
async fn plain_requests_are_sent_to_https() {
    let house = house("").await;
    let plain = TcpStream::connect(house.plain()).await.unwrap();
    let answer = one(plain, "ACME.example.com:8080", "/web?a=1").await;
    assert!(answer.starts_with("HTTP/1.1 308"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("location: https://acme.example.com/web?a=1\r\n"), "{answer}");
    let plain = TcpStream::connect(house.plain()).await.unwrap();
    assert!(one(plain, "nobody.example.com", "/web").await.starts_with("HTTP/1.1 421"));
}

#[tokio::test]
async fn curl_speaks_both_versions_over_tls() {
    let house = house("").await;
    for version in ["--http1.1", "--http2"] {
        let seen = house.curl(&[version, "-w", "\nversion %{http_version}"], "/testkit/echo?x=1").await;
        let number = if version == "--http2" { "2" } else { "1.1" };
        assert!(seen.contains("database: acme_db\n") && seen.ends_with(&format!("version {number}")), "{seen}");
        assert!(seen.contains("header host: acme.example.com:"), "{seen}");
        let post = house.curl(&[version, "-d", "a=1&b=2"], "/testkit/echo").await;
        assert!(post.contains("method: POST\n") && post.contains("body: 7 bytes"), "{post}");
        let cookies = house.curl(&[version, "-H", "Cookie: a=1; b=2"], "/testkit/echo").await;
        assert!(cookies.contains("header cookie: a=1; b=2\n"), "{cookies}");
        let head = house.curl(&[version, "-I"], "/web").await;
        assert!(head.contains(" 200") && head.to_ascii_lowercase().contains("secure"), "{head}");
        let large = house.curl(&[version, "-o", "/dev/null", "-w", "%{size_download}"], "/web/content/5000000").await;
        assert_eq!(large, "5000000");
        let streamed =
            house.curl(&[version, "-w", "%{size_download}", "-o", "/dev/null"], "/web/content/100000?streamed=1").await;
        assert_eq!(streamed, "100000");
        let refused = house.curl(&[version, "-d", "{}"], "/jsonrpc").await;
        assert!(refused.contains("\"status\":400"), "{refused}");
        let body = "x".repeat(3 << 20);
        let file = beside(&house.directory, "large");
        std::fs::write(&file, body).unwrap();
        let sent = house.curl(&[version, "--data-binary", &format!("@{}", file.display())], "/testkit/echo").await;
        assert!(sent.contains("body: 3145728 bytes"), "{sent}");
    }
}

/// Requests over one HTTP/2 connection.
async fn two(house: &House) -> (h2::client::SendRequest<Bytes>, tokio::task::JoinHandle<Result<(), h2::Error>>) {
    let stream = house.dial("acme.example.com", &["h2"], None).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    (sender.ready().await.unwrap(), tokio::spawn(connection))
}

async fn answer(response: h2::client::ResponseFuture) -> Result<(u16, String), h2::Error> {
    let (head, mut body) = response.await?.into_parts();
    let mut out = Vec::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        out.extend_from_slice(&part);
    }
    Ok((head.status.as_u16(), String::from_utf8_lossy(&out).into_owned()))
}

fn get(host: &str, path: &str) -> http::request::Builder {
    http::Request::get(format!("https://{host}{path}"))
}

#[tokio::test]
async fn requests_of_one_connection_run_beside_each_other_and_end_with_a_drain() {
    let house = house("").await;
    let (mut sender, connection) = two(&house).await;
    let mut slow = Vec::new();
    for n in 0..2 {
        let request = get("acme.example.com", &format!("/web?ms=600&n={n}")).body(()).unwrap();
        slow.push(sender.send_request(request, true).unwrap().0);
    }
    let gate = house.gateway.http_plane().unwrap().gates().get("odoo").unwrap();
    cofferdam_tests::eventually(|| async { gate.usage().running == 2 }).await;
    let (quick, _) = sender.send_request(get("bolt.example.com", "/testkit/echo").body(()).unwrap(), true).unwrap();
    assert_eq!(answer(quick).await.unwrap().0, 200);
    assert_eq!(gate.usage().running, 2, "the quick one waited for the slow ones");
    house.gateway.drain();
    for slow in slow {
        assert_eq!(answer(slow).await.unwrap().0, 200);
    }
    connection.await.unwrap().unwrap();
    assert!(house.gateway.wait().await.complete);
}

/// RFC 9113, 8.1.1 and 8.3: what HTTP/1 could be made to misread must not come in by HTTP/2.
#[tokio::test]
async fn an_http2_request_is_held_to_the_same_boundary() {
    let house = house("").await;
    let (mut sender, _connection) = two(&house).await;
    let mut ask = async |request: http::Request<()>| {
        let (response, _) = sender.send_request(request, true).unwrap();
        answer(response).await
    };
    let other = ask(get("bolt.example.com", "/testkit/echo").body(()).unwrap()).await.unwrap();
    assert!(
        other.1.contains("database: bolt_db"),
        "one connection may ask for every host of its certificate: {other:?}"
    );
    for (request, statuses) in [
        (get("acme.example.com", "/x").header("host", "bolt.example.com"), &[400][..]),
        (get("nobody.example.com", "/x"), &[421]),
        (get("chem.example.com", "/x"), &[421]),
        (get("acme.example.com", "/jsonrpc?db=bolt_db"), &[403]),
        (get("acme.example.com", "/web/database/manager"), &[404]),
        (get("user@acme.example.com", "/x"), &[400]),
        (get("acme.example.com", "/x").header("content-length", "1, 2"), &[]),
    ] {
        let answered = ask(request.body(()).unwrap()).await;
        match &answered {
            Ok((status, text)) => assert!(statuses.contains(status) && !text.contains("_db"), "{answered:?}"),
            Err(error) => assert!(statuses.is_empty() && error.is_reset(), "{answered:?}"),
        }
    }
    // A client that goes away frees what it had.
    let (response, _) = sender.send_request(get("acme.example.com", "/web?ms=700").body(()).unwrap(), true).unwrap();
    let gate = house.gateway.http_plane().unwrap().gates().get("odoo").unwrap();
    cofferdam_tests::eventually(|| async { gate.usage().running == 1 }).await;
    drop(response);
    cofferdam_tests::eventually(|| async { gate.usage().running == 0 }).await;
}

#[tokio::test]
async fn a_proxy_says_who_its_client_is_before_anything_else() {
    let house = house("  proxy_protocol: true\n").await;
    let from = async |source: &str, to: SocketAddr| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(format!("{source}:0").parse().unwrap()).unwrap();
        socket.connect(to).await.unwrap()
    };
    let v1 = b"PROXY TCP4 198.51.100.7 192.0.2.1 4711 443\r\n".to_vec();
    let mut v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    v2.extend_from_slice(&[198, 51, 100, 7, 192, 0, 2, 1, 0x12, 0x67, 1, 187]);
    let mut local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec();
    for (header, client) in [(&v1, "198.51.100.7"), (&v2, "198.51.100.7"), (&local, "127.0.0.2")] {
        let mut stream = from("127.0.0.2", house.tls()).await;
        // In two pieces, as a network may deliver it.
        stream.write_all(&header[..9]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        stream.write_all(&header[9..]).await.unwrap();
        let stream = house.handshake(stream, "acme.example.com", &[], None).await.unwrap();
        let answer = one(stream, "acme.example.com", "/testkit/echo").await;
        assert!(answer.contains(&format!("header x-forwarded-for: {client}\n")), "{answer}");
    }
    // Without the header a proxy is not understood, and with it nobody else.
    local.clear();
    let bare = one(from("127.0.0.2", house.plain()).await, "acme.example.com", "/x").await;
    assert_eq!(bare, "");
    let mut liar = from("127.0.0.1", house.plain()).await;
    liar.write_all(&v1).await.unwrap();
    assert!(one(liar, "acme.example.com", "/x").await.starts_with("HTTP/1.1 400"));
    assert!(one(from("127.0.0.1", house.plain()).await, "acme.example.com", "/x").await.starts_with("HTTP/1.1 308"));
}

/// Whoever takes nothing of many small answers holds no worker for them, and others of the same site are served.
#[tokio::test]
async fn answers_that_nobody_takes_hold_no_worker() {
    let house = house("").await;
    let gate = house.gateway.http_plane().unwrap().gates().get("odoo").unwrap();
    let mut held = Vec::new();
    for _ in 0..8 {
        let stream = house.dial("acme.example.com", &["h2"], None).await.unwrap();
        let mut client = h2::client::Builder::new();
        let (mut sender, connection) = client.initial_window_size(0).handshake::<_, Bytes>(stream).await.unwrap();
        tokio::spawn(connection);
        let mut asked = Vec::new();
        for _ in 0..80 {
            sender = sender.ready().await.unwrap();
            let request = get("acme.example.com", "/testkit/echo").body(()).unwrap();
            asked.push(sender.send_request(request, true).unwrap().0);
        }
        for response in asked {
            let response = response.await.unwrap();
            assert_eq!(response.status(), 200, "its head is taken, and nothing of its body");
            held.push(response);
        }
    }
    // 640 of them would fill the room to read ahead if each took as much as a long one.
    cofferdam_tests::eventually(async || gate.usage().running == 0).await;
    let (mut sender, _) = two(&house).await;
    let (next, _) = sender.send_request(get("acme.example.com", "/testkit/echo").body(()).unwrap(), true).unwrap();
    let next = tokio::time::timeout(Duration::from_secs(5), answer(next)).await.expect("the room is full");
    assert_eq!(next.unwrap().0, 200);
    assert_eq!(gate.usage().running, 0, "the last one's worker is free too");
}
