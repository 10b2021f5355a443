//! How clients prove who they are, and how the gateway proves itself to servers; with and without TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_testkit::postgres::{Cluster, ClusterOptions, connect};
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

/// What a server says of who has connected names the gateway's own address.
#[tokio::test]
async fn a_server_that_does_not_let_the_gateway_in_does_not_tell_clients_where_it_is() {
    let site = Site::start().await;
    let admin = site.cluster.admin("postgres").await.unwrap();
    let file: String = admin.query_one("SHOW hba_file", &[]).await.unwrap().get(0);
    let rules = "VALUES ('host acme_db all all reject'), ('host all all all scram-sha-256')";
    let reload = format!("COPY ({rules}) TO '{file}'; SELECT pg_reload_conf()");
    admin.batch_execute(&reload).await.unwrap();
    let told = async || match connect(site.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await {
        Err(error) => format!("{error:?}"),
        Ok(client) => format!("{:?}", client.simple_query("SELECT 1").await.map(|_| ())),
    };
    cofferdam_tests::eventually(async || told().await.contains("28000")).await;
    let told = told().await;
    assert!(told.contains("does not let this role in") && !told.contains("127.0.0.1"), "{told}");
    site.connect("bolt").await.simple_query("SELECT 1").await.unwrap();
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
            "  tls: {{ mode: require, certificate: '{}', key: '{}' }}\n",
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
    let _ = tokio::time::timeout(Duration::from_millis(800), stream.read_to_end(&mut out)).await;
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
    for (bytes, says, code) in [
        (packet(131_072, b"user\0x\0\0"), "unsupported frontend protocol 2.0", "08P01"),
        (packet(196_608, b"user\0x"), "invalid startup packet layout", "08P01"),
        (packet(196_608, b"database\0x\0\0"), "no PostgreSQL user name", "28000"),
    ] {
        let text = String::from_utf8_lossy(&answer(site.address(), &bytes).await).into_owned();
        assert!(text.contains(says) && text.contains(code), "{bytes:?}: {text}");
    }
    // What has no length that there is, such as a driver's farewell before its startup packet, is told nothing, as by the server.
    let server = SocketAddr::from(([127, 0, 0, 1], site.cluster.port()));
    for bytes in [vec![0, 0, 0, 4], vec![0x7f, 0xff, 0xff, 0xff], b"X\0\0\0\x04".to_vec(), packet(80_877_102, b"\0\0")]
    {
        assert_eq!(answer(server, &bytes).await, b"", "{bytes:?}");
        assert_eq!(answer(site.address(), &bytes).await, b"", "{bytes:?}");
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
        let text = answer(site.address(), &packet(196_608, b"user\0acme_role\0\0")).await;
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

/// Takes the passwords of the tenants' own logins away: they come from somewhere else.
fn forget_passwords(site: &Site) {
    for slug in cofferdam_tests::TENANTS {
        let file = cofferdam_tests::tenant_file(slug, "");
        site.directory.tenant(slug, &file.replace(&format!(", password: {slug}-secret"), "")).unwrap();
    }
}

async fn stored(cluster: &Cluster, role: &str) -> String {
    let admin = cluster.admin("postgres").await.unwrap();
    let row = admin.query_one("SELECT rolpassword FROM pg_authid WHERE rolname = $1", &[&role]).await.unwrap();
    row.get(0)
}

async fn whoami(port: u16, user: &str, password: &str, database: &str) -> Result<String, String> {
    let client = connect(port, user, password, database).await.map_err(|e| format!("{e:?}"))?;
    let row = client.query_one("SELECT current_user::text", &[]).await.map_err(|e| format!("{e:?}"))?;
    Ok(row.get(0))
}

/// Rule 17: what PostgreSQL stores is enough to check a client, and what the client proves is enough for the server.
#[tokio::test]
async fn a_user_list_with_what_postgresql_stores_opens_the_gateway_and_the_server() {
    for auth in ["scram-sha-256", "md5"] {
        let server = ClusterOptions { auth, ..ClusterOptions::default() };
        let site = Site::start_with(SiteOptions { server: server.clone(), ..SiteOptions::default() }).await;
        let mut list = String::from("; passwords by role\n");
        for slug in cofferdam_tests::TENANTS {
            let role = format!("{slug}_role");
            list += &format!("\"{role}\" \"{}\"\n", stored(&site.cluster, &role).await);
        }
        assert!(list.contains(if auth == "md5" { "\"md5" } else { "\"SCRAM-SHA-256$" }), "{list}");
        let directory = site.directory.path().parent().unwrap().to_owned();
        std::fs::write(directory.join("users.txt"), &list).unwrap();
        let options = SiteOptions { postgres: "  user_list: users.txt\n".into(), ..SiteOptions::default() };
        site.directory.main(&cofferdam_tests::main_file(site.cluster.port(), &options)).unwrap();
        forget_passwords(&site);
        site.gateway.reload().await.unwrap();
        let port = site.address().port();
        assert_eq!(whoami(port, "acme_role", "acme-secret", "acme_db").await.unwrap(), "acme_role", "{auth}");
        assert_eq!(whoami(port, "bolt_role", "bolt-secret", "bolt_db").await.unwrap(), "bolt_role", "{auth}");
        for (user, password, database) in
            [("acme_role", "wrong", "acme_db"), ("acme_role", "", "acme_db"), ("acme_role", "wrong", "bolt_db")]
        {
            let error = whoami(port, user, password, database).await.unwrap_err();
            assert!(error.contains("28P01") || error.contains("password"), "{error}");
        }
        // Somebody else's database is to whoever has a password of another what one is that does not exist.
        for database in ["bolt_db", "nowhere", "postgres"] {
            let error = whoami(port, "acme_role", "acme-secret", database).await.unwrap_err();
            let missing = format!("database \\\"{database}\\\" does not exist");
            assert!(error.contains("3D000") && error.contains(&missing), "{error}");
        }
        // Another password at the server: the old proof does not open it, and it is not tried for ever.
        let admin = site.cluster.admin("postgres").await.unwrap();
        admin.batch_execute("ALTER ROLE acme_role PASSWORD 'another'").await.unwrap();
        admin
            .batch_execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'acme_role'")
            .await
            .unwrap();
        let error = whoami(port, "acme_role", "acme-secret", "acme_db").await.unwrap_err();
        assert!(error.contains("28P01") || error.contains("cannot prove the password"), "{auth}: {error}");
        let changed = list.replace(
            list.lines().find(|l| l.contains("acme_role")).unwrap(),
            &format!("\"acme_role\" \"{}\"", stored(&site.cluster, "acme_role").await),
        );
        std::fs::write(directory.join("users.txt"), changed).unwrap();
        site.gateway.reload().await.unwrap();
        assert_eq!(whoami(port, "acme_role", "another", "acme_db").await.unwrap(), "acme_role", "{auth}");
    }
}

/// Nobody has proved anything when a password is asked for: what the server says of the question is for the log.
#[tokio::test]
async fn why_a_password_cannot_be_asked_for_is_told_to_nobody() {
    let query = "auth_query: { query: \"SELECT usename, passwd FROM not_there WHERE usename = $1\" }";
    let cluster = format!("    service: {{ role: postgres, password: super-secret }}\n    {query}\n");
    let site = Site::start_with(SiteOptions { cluster, ..SiteOptions::default() }).await;
    forget_passwords(&site);
    site.gateway.reload().await.unwrap();
    let error = whoami(site.address().port(), "acme_role", "acme-secret", "acme_db").await.unwrap_err();
    assert!(error.contains("08006") && error.contains("cannot be asked") && !error.contains("not_there"), "{error}");
}

/// libpq shows nothing of what is said before its request for encryption is answered. A cancel needs no place.
#[tokio::test]
async fn whoever_finds_no_room_is_told_so_in_words_that_it_can_read() {
    let site =
        Site::start_with(SiteOptions { postgres: "  max_connections: 1\n".into(), ..SiteOptions::default() }).await;
    let target = site.target("acme");
    let held = site.connect("acme").await;
    let cancel = held.cancel_token();
    let sleeping = tokio::spawn(async move { held.batch_execute("SELECT pg_sleep(60)").await });
    let out = run(postgres_tool("psql", &target).unwrap().env("PGSSLMODE", "prefer").args(["-Xc", "SELECT 1"])).await;
    let out = out.unwrap();
    assert!(out.stderr.contains("no connection left (limit `postgres.max_connections`)"), "{out:?}");
    let admin = site.cluster.admin("postgres").await.unwrap();
    let runs = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'SELECT pg_sleep%'";
    cofferdam_tests::eventually(async || !admin.query(runs, &[]).await.unwrap().is_empty()).await;
    cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
    let error = tokio::time::timeout(Duration::from_secs(20), sleeping).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.code().unwrap().code(), "57014");
}

/// Rule 19.
#[tokio::test]
async fn passwords_are_asked_of_the_server_and_an_expired_one_opens_nothing() {
    let cluster = "    service: { role: postgres, password: super-secret }\n    auth_query: {}\n".to_owned();
    let site = Site::start_with(SiteOptions { cluster, ..SiteOptions::default() }).await;
    forget_passwords(&site);
    site.gateway.reload().await.unwrap();
    let port = site.address().port();
    assert_eq!(whoami(port, "acme_role", "acme-secret", "acme_db").await.unwrap(), "acme_role");
    for (user, password) in [("acme_role", "wrong"), ("bolt_role", "wrong"), ("postgres", "super-secret")] {
        assert!(whoami(port, user, password, "acme_db").await.unwrap_err().contains("28P01"));
    }
    // A wrong password has the server asked again, so a new one is known at the second try.
    let admin = site.cluster.admin("postgres").await.unwrap();
    admin.batch_execute("ALTER ROLE acme_role PASSWORD 'another'").await.unwrap();
    cofferdam_tests::eventually(async || whoami(port, "acme_role", "another", "acme_db").await.is_ok()).await;
    admin.batch_execute("ALTER ROLE acme_role VALID UNTIL '2001-01-01'").await.unwrap();
    cofferdam_tests::eventually(async || {
        let _ = whoami(port, "acme_role", "wrong", "acme_db").await;
        whoami(port, "acme_role", "another", "acme_db").await.is_err_and(|e| e.contains("28P01"))
    })
    .await;
    admin.batch_execute("ALTER ROLE acme_role VALID UNTIL 'infinity'").await.unwrap();
    cofferdam_tests::eventually(async || whoami(port, "acme_role", "another", "acme_db").await.is_ok()).await;
    // Those who only knock cost the server one connection at most.
    let mut knocking = Vec::new();
    for n in 0..40 {
        let mut stream = TcpStream::connect(site.address()).await.unwrap();
        let role = ["acme_role", "bolt_role"][n % 2];
        stream
            .write_all(&packet(196_608, format!("user\0{role}\0database\0{}_db\0\0", &role[..4]).as_bytes()))
            .await
            .unwrap();
        knocking.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let asking = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cofferdam auth_query'";
    assert!(admin.query_one(asking, &[]).await.unwrap().get::<_, i64>(0) <= 1);
    // What a client asks for at login is never in force where passwords are asked for.
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port).user("bolt_role").password("bolt-secret").dbname("bolt_db");
    config.options("-c search_path=evil");
    assert!(config.connect(tokio_postgres::NoTls).await.is_ok());
}

#[tokio::test]
async fn the_pools_login_becomes_the_tenants_own_role_at_the_server() {
    let site = Site::start().await;
    for slug in cofferdam_tests::TENANTS {
        let more = format!(
            "server_login: {{ role: {slug}_role, password: {slug}-secret }}\nusers: [{{ role: reports, password: reports-secret }}]\n"
        );
        // The pool's password opens no database at the server itself.
        let admin = site.cluster.admin(&format!("{slug}_db")).await.unwrap();
        admin
            .batch_execute(&format!(
                "REVOKE CONNECT ON DATABASE {slug}_db FROM public; ALTER DATABASE {slug}_db OWNER TO {slug}_role"
            ))
            .await
            .unwrap();
        let file = cofferdam_tests::tenant_file(slug, &more);
        site.directory.tenant(slug, &file).unwrap();
    }
    site.cluster.create_role("reports", "reports-secret").await.unwrap();
    let admin = site.cluster.admin("postgres").await.unwrap();
    admin.batch_execute("GRANT CONNECT ON DATABASE acme_db TO reports").await.unwrap();
    site.gateway.reload().await.unwrap();
    let port = site.address().port();
    for slug in cofferdam_tests::TENANTS {
        let (role, database) = (format!("{slug}_role"), format!("{slug}_db"));
        assert_eq!(whoami(port, POOL_LOGIN.0, POOL_LOGIN.1, &database).await.unwrap(), role);
        assert!(site.cluster.connect(POOL_LOGIN.0, POOL_LOGIN.1, &database).await.is_err());
    }
    // A user is itself, and has what it was given.
    assert_eq!(whoami(port, "reports", "reports-secret", "acme_db").await.unwrap(), "reports");
    assert!(whoami(port, "reports", "reports-secret", "bolt_db").await.unwrap_err().contains("42501"));
}

/// Rule 18: libpq binds its proof to our certificate, and we bind ours to the server's.
#[tokio::test]
async fn passwords_are_bound_to_the_channel_on_both_sides() {
    let (certificate, key) = certificate();
    let pem = files(&certificate, &key);
    let path = |name: &str| pem.path().join(name).display().to_string();
    let site = Site::start_with(SiteOptions {
        postgres: format!("  tls: {{ certificate: '{}', key: '{}' }}\n", path("cert.pem"), path("key.pem")),
        cluster: format!("    tls: verify-ca\n    tls_ca: '{}'\n", path("cert.pem")),
        server: ClusterOptions {
            tls: Some((certificate.clone(), key.clone())),
            settings: vec!["log_min_messages = debug2".into()],
            ..ClusterOptions::default()
        },
        ..SiteOptions::default()
    })
    .await;
    let mut psql = postgres_tool("psql", &site.target("acme")).unwrap();
    psql.env("PGSSLMODE", "require").env("PGCHANNELBINDING", "require");
    let out = run(psql.args(["-XAtc", "SELECT 'bound'"])).await.unwrap();
    assert_eq!(out.stdout, "bound\n", "{out:?}");
    let mut psql = postgres_tool("psql", &site.target("acme")).unwrap();
    psql.env("PGSSLMODE", "disable").env("PGCHANNELBINDING", "require");
    assert!(run(psql.args(["-XAtc", "SELECT 1"])).await.unwrap().stderr.contains("channel binding"));
}

#[tokio::test]
async fn clients_prove_themselves_by_certificate_and_only_as_whom_it_names() {
    let authority = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = parameters.self_signed(&authority).unwrap();
    let issuer = rcgen::Issuer::new(parameters, authority);
    let issue = |name: &str| {
        let mut parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().unwrap();
        (parameters.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
    };
    let (server, server_key) = certificate();
    let pem = files(&server, &server_key);
    let path = |name: &str| pem.path().join(name).display().to_string();
    std::fs::write(path("ca.pem"), root.pem()).unwrap();
    let write_identity = |name: &str, (certificate, key): (String, String)| {
        std::fs::write(path(&format!("{name}.pem")), certificate).unwrap();
        std::fs::write(path(&format!("{name}.key")), key).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(path(&format!("{name}.key")), mode).unwrap();
    };
    write_identity("acme_role", issue("acme_role"));
    write_identity("stranger", certificate());
    let tls = |mode: &str| {
        format!(
            "  tls: {{ mode: {mode}, certificate: '{}', key: '{}', client_ca: '{}' }}\n",
            path("cert.pem"),
            path("key.pem"),
            path("ca.pem")
        )
    };
    let psql = async |site: &Site, role: &str, identity: Option<&str>| {
        let mut target = site.target("acme");
        (target.user, target.password) = (role.into(), format!("{}-secret", role.trim_end_matches("_role")));
        let mut psql = postgres_tool("psql", &target).unwrap();
        psql.env("PGSSLMODE", "require");
        if let Some(name) = identity {
            psql.env("PGSSLCERT", path(&format!("{name}.pem"))).env("PGSSLKEY", path(&format!("{name}.key")));
        }
        let out = run(psql.args(["-XAtc", "SELECT current_user"])).await.unwrap();
        out.stdout + &out.stderr
    };
    let options = |mode: &str, auth: &str| SiteOptions { postgres: tls(mode) + auth, ..SiteOptions::default() };
    // By certificate alone.
    let site = Site::start_with(options("verify-full", "  auth: cert\n")).await;
    assert_eq!(psql(&site, "acme_role", Some("acme_role")).await, "acme_role\n");
    assert!(psql(&site, "odoo", Some("acme_role")).await.contains("not for user \"odoo\""));
    assert!(psql(&site, "acme_role", None).await.contains("requires a valid client certificate"));
    let stranger = psql(&site, "acme_role", Some("stranger")).await;
    assert!(!stranger.contains("acme_role\n") && !stranger.is_empty(), "{stranger}");
    // By certificate and password.
    let site = Site::start_with(options("verify-ca", "")).await;
    assert_eq!(psql(&site, "acme_role", Some("acme_role")).await, "acme_role\n");
    assert!(psql(&site, "bolt_role", Some("acme_role")).await.contains("database \"acme_db\" does not exist"));
    assert!(psql(&site, "acme_role", None).await.contains("requires a valid client certificate"));
}

#[tokio::test]
async fn a_new_certificate_is_used_as_soon_as_its_files_change() {
    let (first, first_key) = certificate();
    let pem = files(&first, &first_key);
    let path = |name: &str| pem.path().join(name).display().to_string();
    let options = SiteOptions {
        postgres: format!("  tls: {{ certificate: '{}', key: '{}' }}\n", path("cert.pem"), path("key.pem")),
        ..SiteOptions::default()
    };
    let site = Site::start_with(options).await;
    let gateway = cofferdam::Gateway::builder().config_file(site.directory.path()).watch(true).start().await.unwrap();
    let mut target = site.target("acme");
    target.port = gateway.postgres_addresses()[0].port();
    let verified = async |authority: &str| {
        let mut psql = postgres_tool("psql", &target).unwrap();
        psql.env("PGSSLMODE", "verify-full").env("PGSSLROOTCERT", authority).env("PGHOST", "localhost");
        run(psql.args(["-XAtc", "SELECT 1"])).await.unwrap().stdout == "1\n"
    };
    std::fs::write(path("first.pem"), &first).unwrap();
    assert!(verified(&path("first.pem")).await);
    let (second, second_key) = certificate();
    std::fs::write(path("second.pem"), &second).unwrap();
    // Half of it changes nothing.
    std::fs::write(path("cert.pem"), &second).unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(verified(&path("first.pem")).await);
    std::fs::write(path("key.pem"), &second_key).unwrap();
    cofferdam_tests::eventually(async || verified(&path("second.pem")).await).await;
}

/// Rule 20: guessing is slow, and nobody who knows the password pays for it.
#[tokio::test]
async fn wrong_passwords_are_answered_late_and_the_right_one_at_once() {
    let postgres = "  max_unauthenticated_per_address: 4\n  login_timeout: 6s\n".to_owned();
    let site = Site::start_with(SiteOptions { postgres, ..SiteOptions::default() }).await;
    let port = site.address().port();
    let begun = Instant::now();
    for _ in 0..3 {
        connect(port, POOL_LOGIN.0, "wrong", "acme_db").await.unwrap_err();
    }
    assert!(begun.elapsed() >= Duration::from_millis(250 + 500 + 1000));
    // Two guesses are being answered late; the right password is not.
    let guesses: Vec<_> = (0..2)
        .map(|_| tokio::spawn(async move { connect(port, POOL_LOGIN.0, "wrong", "acme_db").await.is_err() }))
        .collect();
    tokio::time::sleep(Duration::from_millis(200)).await;
    select_one(&site).await;
    assert!(guesses.iter().all(|guess| !guess.is_finished()));
    for guess in guesses {
        assert!(guess.await.unwrap());
    }
    // More than there are places for an address wait, and are turned away in the end.
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(TcpStream::connect(site.address()).await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let error = connect(port, POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.unwrap_err();
    assert!(format!("{error:?}").contains("per_address"), "{error:?}");
    drop(silent);
    select_one(&site).await;
    // A burst of more than that gets in, as fast as clients compute their proofs.
    let burst: Vec<_> = (0..12).map(|_| tokio::spawn(connect(port, POOL_LOGIN.0, POOL_LOGIN.1, "acme_db"))).collect();
    for login in burst {
        login.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_tenant_that_logs_in_too_often_waits_for_its_turn_and_nobody_else_does() {
    let site = Site::start_with(SiteOptions { plan: "    login_rate: 5\n".into(), ..SiteOptions::default() }).await;
    let port = site.address().port();
    let begun = Instant::now();
    for _ in 0..8 {
        connect(port, POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.unwrap();
    }
    assert!(begun.elapsed() >= Duration::from_millis(500));
    select_bolt(&site).await;
}

/// The challenge that somebody gets who claims to be a role, without a password.
async fn salt(address: SocketAddr, user: &str, database: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&packet(196_608, format!("user\0{user}\0database\0{database}\0\0").as_bytes())).await.unwrap();
    let first = b"n,,n=,r=abcdefgh";
    let mut answer = b"SCRAM-SHA-256\0".to_vec();
    answer.extend_from_slice(&(first.len() as u32).to_be_bytes());
    answer.extend_from_slice(first);
    let message = [&[b'p'][..], &((4 + answer.len()) as u32).to_be_bytes(), &answer].concat();
    let mut buffer = vec![0; 2_000];
    let _ = stream.read(&mut buffer).await.unwrap();
    stream.write_all(&message).await.unwrap();
    let n = stream.read(&mut buffer).await.unwrap();
    let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
    text.split(',').find_map(|part| part.strip_prefix("s=")).expect("no salt").to_owned()
}

/// Rule 19.
#[tokio::test]
async fn the_challenge_tells_nobody_which_roles_and_databases_there_are() {
    let site = Site::start().await;
    for user in ["acme_role", POOL_LOGIN.0, "nobody"] {
        let first = salt(site.address(), user, "acme_db").await;
        for database in ["acme_db", "bolt_db", "nowhere", "postgres"] {
            assert_eq!(salt(site.address(), user, database).await, first, "{user} at {database}");
        }
    }
    assert_ne!(salt(site.address(), "acme_role", "acme_db").await, salt(site.address(), "nobody", "acme_db").await);
}

/// A server that lets everybody in without proving that it knows the password is not the one that was meant.
#[tokio::test]
async fn a_server_that_breaks_off_the_proof_is_not_spoken_to() {
    let impostor = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = impostor.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = impostor.accept().await.unwrap();
            tokio::spawn(async move {
                let mut buffer = [0; 2_000];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0").await;
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await;
                let _ = stream.read(&mut buffer).await;
            });
        }
    });
    let site = Site::start().await;
    site.directory.main(&cofferdam_tests::main_file(port, &SiteOptions::default())).unwrap();
    site.gateway.reload().await.unwrap();
    let error = connect(site.address().port(), POOL_LOGIN.0, POOL_LOGIN.1, "acme_db").await.unwrap_err();
    assert!(format!("{error:?}").contains("cannot prove the password"), "{error:?}");
}
