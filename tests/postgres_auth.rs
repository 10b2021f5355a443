//! How clients prove who they are, and how the gateway proves itself to servers; with and without TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::sync::Arc;

use cofferdam_testkit::postgres::{ClusterOptions, connect};
use cofferdam_testkit::tools::{postgres_tool, run};
use cofferdam_tests::{POOL_LOGIN, Site, SiteOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A self-signed certificate for 127.0.0.1, as PEM: certificate and key.
fn certificate() -> (String, String) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

fn files(certificate: &str, key: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("cert.pem"), certificate).unwrap();
    std::fs::write(directory.path().join("key.pem"), key).unwrap();
    directory
}

async fn select_one(site: &Site) {
    for slug in ["acme", "bolt"] {
        let client = site.connect(slug).await;
        let row = client.query_one("SELECT current_database()::text", &[]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), format!("{slug}_db"));
    }
}

#[tokio::test]
async fn servers_with_scram_md5_and_trust_are_logged_in_to() {
    for auth in ["scram-sha-256", "md5", "trust"] {
        let server = ClusterOptions { auth, ..ClusterOptions::default() };
        let site = Site::start_with(SiteOptions { server, ..SiteOptions::default() }).await;
        select_one(&site).await;
        // Whatever the server asks for, the gateway asks its clients for a password.
        let error = connect(site.address().port(), POOL_LOGIN.0, "wrong", "acme_db").await.unwrap_err();
        assert!(format!("{error:?}").contains("28P01"), "{auth}: {error:?}");
    }
}

#[tokio::test]
async fn clients_may_be_asked_for_md5() {
    let site = Site::start_with(SiteOptions { postgres: "  auth: md5\n".into(), ..SiteOptions::default() }).await;
    select_one(&site).await;
    for (user, password) in [(POOL_LOGIN.0, "wrong"), ("nobody", "x"), ("acme_role", "bolt-secret")] {
        let error = connect(site.address().port(), user, password, "acme_db").await.unwrap_err();
        assert!(format!("{error:?}").contains("28P01"), "{error:?}");
    }
}

#[tokio::test]
async fn psql_connects_with_tls_to_a_gateway_that_uses_tls_to_its_server() {
    let (certificate, key) = certificate();
    let pem = files(&certificate, &key);
    let path = |name: &str| pem.path().join(name).display().to_string();
    let options = |mode: &str| SiteOptions {
        postgres: format!(
            "  tls: {{ certificate: '{}', key: '{}' }}\n  require_tls: true\n",
            path("cert.pem"),
            path("key.pem")
        ),
        cluster: format!("    tls: {mode}\n    tls_ca: '{}'\n", path("cert.pem")),
        server: ClusterOptions { tls: Some((certificate.clone(), key.clone())), ..ClusterOptions::default() },
        ..SiteOptions::default()
    };
    for mode in ["require", "verify-full", "prefer"] {
        let site = Site::start_with(options(mode)).await;
        let target = site.target("acme");
        let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        let mut psql = postgres_tool("psql", &target).unwrap();
        psql.env("PGSSLMODE", "verify-full").env("PGSSLROOTCERT", path("cert.pem")).env("PGHOST", "localhost");
        let out = run(psql.args(["-XAt", "-c", "\\conninfo", "-c", sql])).await.unwrap();
        assert!(out.stdout.contains("SSL connection") && out.stdout.ends_with("t\n"), "{mode}: {out:?}");
        // Ten megabytes through two layers of TLS.
        let mut psql = postgres_tool("psql", &target).unwrap();
        let big = run(psql.env("PGSSLMODE", "require").args(["-XAtc", "SELECT repeat('x', 10000000)"])).await.unwrap();
        assert_eq!(big.stdout.len(), 10_000_001, "{}", big.stderr);
        let plain =
            run(postgres_tool("psql", &target).unwrap().env("PGSSLMODE", "disable").args(["-c", "SELECT 1"])).await;
        assert!(plain.unwrap().stderr.contains("connections without TLS are not allowed"));
    }
}

#[tokio::test]
async fn a_server_that_cannot_be_verified_is_not_spoken_to() {
    let (certificate_of_server, key) = certificate();
    let (other, _) = certificate();
    let pem = files(&other, &key);
    let site = Site::start_with(SiteOptions {
        cluster: format!("    tls: verify-full\n    tls_ca: '{}'\n", pem.path().join("cert.pem").display()),
        server: ClusterOptions { tls: Some((certificate_of_server, key)), ..ClusterOptions::default() },
        ..SiteOptions::default()
    })
    .await;
    let error = connect(site.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.unwrap_err();
    assert!(format!("{error:?}").contains("08006"), "{error:?}");
    // A server without TLS is refused when TLS is demanded.
    let site = Site::start_with(SiteOptions { cluster: "    tls: require\n".into(), ..SiteOptions::default() }).await;
    let error = connect(site.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.unwrap_err();
    assert!(format!("{error:?}").contains("does not support TLS"), "{error:?}");
}

async fn answer(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut out = Vec::new();
    let _ = tokio::time::timeout(std::time::Duration::from_millis(800), stream.read_to_end(&mut out)).await;
    out
}

fn packet(code: u32, body: &[u8]) -> Vec<u8> {
    [&((8 + body.len()) as u32).to_be_bytes()[..], &code.to_be_bytes(), body].concat()
}

/// Rules 1, 2 and 3.
#[tokio::test]
async fn first_packets_are_bounded_negotiated_and_never_mixed_with_plaintext() {
    let (certificate, key) = certificate();
    let pem = files(&certificate, &key);
    let postgres = format!("  tls: {{ certificate: '{0}/cert.pem', key: '{0}/key.pem' }}\n", pem.path().display());
    let site = Site::start_with(SiteOptions { postgres, ..SiteOptions::default() }).await;
    let (ssl, gss) = (packet(80_877_103, b""), packet(80_877_104, b""));
    let startup = packet(196_608, b"user\0odoo\0database\0acme_db\0\0");
    // GSSAPI encryption is declined, and the session goes on.
    let declined = answer(site.address(), &gss).await;
    assert_eq!(declined, b"N");
    // Plaintext behind the request is an attack.
    let smuggled = answer(site.address(), &[ssl.clone(), startup.clone()].concat()).await;
    assert!(String::from_utf8_lossy(&smuggled).contains("unencrypted data"), "{smuggled:?}");
    // Nothing is promised for later versions, and nothing is refused.
    let newer = packet(196_610, b"user\0odoo\0database\0acme_db\0_pq_.fancy\0on\0\0");
    let newer = answer(site.address(), &newer).await;
    assert_eq!(newer[0], b'v', "{newer:?}");
    assert!(String::from_utf8_lossy(&newer).contains("_pq_.fancy") && newer.contains(&b'R'), "{newer:?}");
    for (bytes, says) in [
        (vec![0, 0, 0, 4], "invalid length of startup packet"),
        (vec![0x7f, 0xff, 0xff, 0xff], "invalid length of startup packet"),
        (packet(131_072, b"user\0x\0\0"), "unsupported frontend protocol 2.0"),
        (packet(196_608, b"user\0x"), "invalid startup packet layout"),
        (packet(196_608, b"database\0x\0\0"), "no PostgreSQL user name"),
    ] {
        let text = String::from_utf8_lossy(&answer(site.address(), &bytes).await).into_owned();
        assert!(text.contains(says) && text.contains("08P01"), "{bytes:?}: {text}");
    }
    // TLS from the first byte demands the protocol's name.
    for (alpn, fits) in [(Some("postgresql"), true), (None, false), (Some("http/1.1"), false)] {
        let stream = TcpStream::connect(site.address()).await.unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(rustls::pki_types::pem::PemObject::from_pem_slice(certificate.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|a| a.as_bytes().to_vec()).collect();
        let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
        let connected = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        let mut reply = [0];
        let spoke = match connected {
            Ok(mut tls) => tls.write_all(&startup).await.is_ok() && tls.read_exact(&mut reply).await.is_ok(),
            Err(_) => false,
        };
        assert_eq!(spoke && reply == [b'R'], fits, "{alpn:?}");
    }
}

/// Rule 20: who has not logged in uses a place of its own, and is not waited for.
#[tokio::test]
async fn connections_that_do_not_log_in_are_bounded_in_number_and_time() {
    let postgres = "  max_unauthenticated: 3\n  login_timeout: 500ms\n".to_owned();
    let site = Site::start_with(SiteOptions { postgres, ..SiteOptions::default() }).await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(TcpStream::connect(site.address()).await.unwrap());
    }
    cofferdam_tests::eventually(|| async {
        let text = answer(site.address(), b"").await;
        String::from_utf8_lossy(&text).contains("too many logins at once")
    })
    .await;
    let mut rest = Vec::new();
    for stream in &mut silent {
        stream.read_to_end(&mut rest).await.unwrap();
    }
    assert!(String::from_utf8_lossy(&rest).contains("the login took too long"));
    select_one(&site).await;
}

#[tokio::test]
async fn a_tenant_has_no_more_clients_than_its_plan_allows() {
    let site = Site::start_with(SiteOptions { plan: "    max_clients: 2".into(), ..SiteOptions::default() }).await;
    let (_a, b) = (site.connect("acme").await, site.connect("acme").await);
    let error = connect(site.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.unwrap_err();
    let text = format!("{error:?}");
    assert!(text.contains("53300") && text.contains("tenant acme has 2 connections open, its limit"), "{text}");
    select_bolt(&site).await;
    drop(b);
    cofferdam_tests::eventually(|| async {
        connect(site.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.is_ok()
    })
    .await;
}

async fn select_bolt(site: &Site) {
    let client = site.connect("bolt").await;
    client.simple_query("SELECT 1").await.unwrap();
}
