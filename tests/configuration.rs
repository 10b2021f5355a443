//! Wrong configurations: each kind gives a helpful message with its place, and changes nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;

use cofferdam::{Gateway, ReloadError};
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::HttpClient;
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use cofferdam_tests::eventually;

const MAIN: &str = "\
http:
  listen: ['127.0.0.1:0']
  header_timeout: 5s
postgres:
  listen: ['127.0.0.1:0']
admin:
  listen: '127.0.0.1:0'
pools:
  odoo:
    servers: [{ address: 'ODOO' }]
    slots: 4
    login: { role: odoo, password: odoo-secret }
    maintenance: pg
clusters:
  pg:
    address: '127.0.0.1:1'
    slots: 4
plans:
  standard:
    weight: 2
    http: { reserved: 1, limit: 3, max_wait: 5s }
";

const ACME: &str = "\
tenant: acme
hosts: [acme.example.com]
database: acme_db
placement: { pool: odoo, cluster: pg }
plan: standard
";

/// One kind of mistake: a change to a file, where the message must point, and what it must say.
struct Wrong {
    file: File,
    from: &'static str,
    to: &'static str,
    place: &'static str,
    says: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq)]
enum File {
    Main,
    Acme,
    /// A second tenant, made from acme's file.
    Bolt,
}
use File::{Acme, Bolt, Main};

const fn wrong(
    file: File,
    from: &'static str,
    to: &'static str,
    place: &'static str,
    says: &'static [&'static str],
) -> Wrong {
    Wrong { file, from, to, place, says }
}

const MISTAKES: &[Wrong] = &[
    // Not YAML, or not the right shape of it.
    wrong(Main, "slots: 4\n    login", "slots: [4\n    login", "cofferdam.yaml:", &["not YAML"]),
    wrong(Acme, "hosts: [acme.example.com]", "hosts: [acme.example.com\n", "acme.yaml:", &["not YAML"]),
    wrong(Acme, "plan: standard", "plan: standard\nplan: gold", "acme.yaml:6:1", &["`plan`", "again", "line 5"]),
    wrong(Acme, "plan: standard\n", "plan: standard\n---\ntenant: x\n", "acme.yaml:", &["second document"]),
    wrong(Acme, "tenant: acme\nhosts", "[tenant]: acme\nhosts", "acme.yaml:1", &["as a key"]),
    wrong(
        Acme,
        "placement: { pool: odoo, cluster: pg }",
        "placement: odoo",
        "acme.yaml:4:12",
        &["placement", "`odoo`", "a mapping"],
    ),
    wrong(Acme, "hosts: [acme.example.com]", "hosts: acme.example.com", "acme.yaml:2:8", &["hosts", "a list"]),
    wrong(
        Acme,
        "hosts: [acme.example.com]",
        "hosts: [{ name: acme }]",
        "acme.yaml:2:9",
        &["hosts[0]", "a mapping", "string"],
    ),
    // Fields that are missing or do not exist.
    wrong(Acme, "tenant: acme\n", "", "acme.yaml:1:1", &["the required field `tenant`"]),
    wrong(Acme, "plan: standard\n", "", "acme.yaml:1:1", &["the required field `plan`"]),
    wrong(Acme, "placement: { pool: odoo, cluster: pg }\n", "", "acme.yaml:1:1", &["the required field `placement`"]),
    wrong(Acme, "hosts:", "host:", "acme.yaml:2:1", &["unknown field `host`", "did you mean `hosts`?"]),
    wrong(
        Main,
        "header_timeout",
        "header_timout",
        "cofferdam.yaml:3:3",
        &["http.header_timout", "did you mean `header_timeout`?"],
    ),
    wrong(
        Main,
        "    address: '127.0.0.1:1'\n",
        "",
        "cofferdam.yaml:",
        &["clusters.pg.address", "the required field `address`"],
    ),
    wrong(
        Main,
        "clusters:\n  pg:",
        "clusters:\n  PG_Shared:",
        "cofferdam.yaml:",
        &["the key `PG_Shared`", "lower-case letters"],
    ),
    // Who may come, and whom a session belongs to.
    wrong(
        Main,
        "header_timeout: 5s",
        "session_key: short",
        "cofferdam.yaml:3:16",
        &["http.session_key", "fewer than 16 bytes", "openssl rand"],
    ),
    wrong(
        Main,
        "header_timeout: 5s",
        "trusted_proxies: [10.1.0.0/8]",
        "cofferdam.yaml:3:21",
        &["http.trusted_proxies[0]", "`10.1.0.0/8`", "a network such as"],
    ),
    wrong(
        Acme,
        "hosts: [acme.example.com]",
        "hosts: ['*.acme.example.com']",
        "acme.yaml:2:9",
        &["hosts[0]", "`*.acme.example.com`", "`http.wildcard_hosts` is not set"],
    ),
    wrong(
        Acme,
        "plan: standard\n",
        "plan: standard\ninternal_routes: [{ path: 'web/%64atabase', from: [] }]\n",
        "acme.yaml:6:27",
        &["internal_routes[0].path", "a path from the root", "internal_routes[0].from", "an empty list"],
    ),
    wrong(
        Main,
        "header_timeout: 5s",
        "tls: { listen: ['127.0.0.1:0'], certificates: [{ certificate: none.crt, key: none.key }] }",
        "cofferdam.yaml:3:65",
        &["http.tls.certificates[0].certificate", "`none.crt`, which cannot be read", "a readable PEM file"],
    ),
    wrong(Main, "header_timeout: 5s", "proxy_protocol: true", "cofferdam.yaml:3:19", &["`trusted_proxies` beside it"]),
    wrong(
        Main,
        "header_timeout: 5s",
        "headers: { response: { set: { Content-Length: '1' } } }",
        "cofferdam.yaml:3:31",
        &["http.headers.response.set", "`Content-Length`", "does not need itself"],
    ),
    wrong(
        Acme,
        "plan: standard\n",
        "plan: standard\ntls: { certificate: a.crt }\n",
        "acme.yaml:6:6",
        &["`http.tls` in the main file", "a certificate without `key`"],
    ),
    wrong(
        Acme,
        "plan: standard\n",
        "plan: standard\ncanary: { pool: odo, weight: 101 }\n",
        "acme.yaml:6:17",
        &["canary.pool", "did you mean `odoo`?", "a part of a hundred"],
    ),
    wrong(
        Acme,
        "plan: standard\n",
        "plan: standard\nmaintenance_mode: { page: none.html }\n",
        "acme.yaml:6:27",
        &["maintenance_mode.page", "`none.html`, which cannot be read"],
    ),
    // Values of the wrong kind.
    wrong(
        Main,
        "header_timeout: 5s",
        "header_timeout: 5",
        "cofferdam.yaml:3:19",
        &["http.header_timeout", "`5`", "a duration such as"],
    ),
    wrong(Main, "header_timeout: 5s", "header_timeout: 5 parsecs", "cofferdam.yaml:3:19", &["`5 parsecs`", "`250ms`"]),
    wrong(Main, "header_timeout: 5s", "header_timeout: 0s", "cofferdam.yaml:3:19", &["a time above zero"]),
    wrong(
        Main,
        "weight: 2",
        "weight: heavy",
        "cofferdam.yaml:",
        &["plans.standard.weight", "`heavy`", "a whole number"],
    ),
    wrong(Main, "weight: 2", "weight: -1", "cofferdam.yaml:", &["`-1`", "a whole number"]),
    wrong(Main, "weight: 2", "weight: 0", "cofferdam.yaml:", &["a weight from 1 to 10000"]),
    wrong(Main, "weight: 2", "max_body: 10 bananas", "cofferdam.yaml:", &["max_body", "`10 bananas`", "`128MiB`"]),
    wrong(
        Main,
        "listen: ['127.0.0.1:0']\n  header",
        "listen: ['localhost']\n  header",
        "cofferdam.yaml:2:12",
        &["http.listen[0]", "`localhost`", "address and port"],
    ),
    wrong(
        Main,
        "address: '127.0.0.1:1'",
        "address: '127.0.0.1'",
        "cofferdam.yaml:",
        &["clusters.pg.address", "a host and port"],
    ),
    wrong(
        Main,
        "slots: 4\n    login",
        "slots: 0\n    login",
        "cofferdam.yaml:",
        &["pools.odoo.slots", "between 1 and 100000"],
    ),
    wrong(
        Main,
        "slots: 4\n    login",
        "slots: 4\n    expensive_slots: 9\n    login",
        "cofferdam.yaml:",
        &["expensive_slots", "`9`", "the 4 slots"],
    ),
    wrong(
        Main,
        "slots: 4\nplans",
        "slots: 4\n    connections: 2\nplans",
        "cofferdam.yaml:",
        &["connections", "`2`", "the 4 slots"],
    ),
    wrong(
        Main,
        "slots: 4\nplans",
        "slots: 4\n    tls: sometimes\nplans",
        "cofferdam.yaml:",
        &["tls", "`sometimes`", "`verify-full`"],
    ),
    wrong(
        Main,
        "slots: 4\nplans",
        "slots: 4\n    tls: verify-full\nplans",
        "cofferdam.yaml:",
        &["`tls_ca: <PEM file>`"],
    ),
    wrong(
        Main,
        "slots: 4\n    login",
        "slots: 4\n    scheduling: lifo\n    login",
        "cofferdam.yaml:",
        &["scheduling", "`lifo`", "`fair`, `fifo`"],
    ),
    wrong(Acme, "tenant: acme", "tenant: Acme Civil", "acme.yaml:1:9", &["tenant", "`Acme Civil`", "a slug"]),
    wrong(
        Acme,
        "acme.example.com",
        "'http://acme.example.com/'",
        "acme.yaml:2:9",
        &["hosts[0]", "without scheme, port or path"],
    ),
    wrong(Acme, "acme.example.com", "'acme.example.com:80'", "acme.yaml:2:9", &["without scheme, port or path"]),
    // Quotas, in a plan and beside it.
    wrong(
        Main,
        "slots: 4\n    login",
        "slots: 4\n    min_slots: 5\n    login",
        "cofferdam.yaml:",
        &["min_slots", "`5`", "the 4 slots"],
    ),
    wrong(
        Main,
        "http: { reserved: 1, limit: 3, max_wait: 5s }",
        "http: { rate: 0 }",
        "cofferdam.yaml:",
        &["plans.standard.http.rate", "at least 1 per second"],
    ),
    wrong(
        Main,
        "http: { reserved: 1, limit: 3, max_wait: 5s }",
        "http: { rate_burst: 5 }",
        "cofferdam.yaml:",
        &["http.rate_burst", "`rate` too"],
    ),
    wrong(
        Main,
        "slots: 4\n    login",
        "slots: 4\n    filestore: files\n    filestore_bucket: { bucket: files, access_key: a, secret_key: b }\n    login",
        "cofferdam.yaml:",
        &["filestore_bucket", "beside the directory"],
    ),
    wrong(
        Main,
        "slots: 4\n    login",
        "slots: 4\n    filestore_bucket: { bucket: Files, prefix: '../x', endpoint: 'ftp://x', access_key: a }\n    login",
        "cofferdam.yaml:",
        &["`Files`", "small letters", "`../x`", "`ftp://x`", "without `secret_key`"],
    ),
    wrong(Main, "weight: 2", "weight: 2\n    postgres: { work: 0s }", "cofferdam.yaml:", &["postgres.work", "`500ms`"]),
    wrong(
        Main,
        "http: { reserved: 1, limit: 3, max_wait: 5s }",
        "http: { bandwidth: 5 }",
        "cofferdam.yaml:",
        &["http.bandwidth", "`5`", "a size such as"],
    ),
    wrong(
        Main,
        "http: { reserved: 1, limit: 3, max_wait: 5s }",
        "http: { classes: { reports: {} } }",
        "cofferdam.yaml:",
        &["`reports`", "`report`"],
    ),
    wrong(
        Main,
        "http: { reserved: 1, limit: 3, max_wait: 5s }",
        "http: { classes: { report: { limit: 0 } } }",
        "cofferdam.yaml:",
        &["http.classes.report.limit", "at least 1 slot"],
    ),
    wrong(
        Acme,
        "plan: standard",
        "plan: standard\nquotas: { http: { reserved: 3, limit: 2 } }",
        "acme.yaml:6:",
        &["quotas.http.reserved", "`3`", "at most"],
    ),
    wrong(
        Acme,
        "plan: standard",
        "plan: standard\nquotas: { postgres: { work_burst: 9s } }",
        "acme.yaml:6:",
        &["quotas.postgres", "`work_burst`", "`work` too"],
    ),
    wrong(Acme, "plan: standard", "plan: standard\nquotas: { htpp: {} }", "acme.yaml:6:", &["did you mean `http`?"]),
    // Things that only the whole set can tell.
    wrong(
        Acme,
        "plan: standard",
        "plan: standart",
        "acme.yaml:5:7",
        &["plan", "`standart`", "did you mean `standard`?"],
    ),
    wrong(Acme, "pool: odoo", "pool: odooo", "acme.yaml:4:20", &["placement.pool", "`odooo`", "did you mean `odoo`?"]),
    wrong(
        Acme,
        "cluster: pg",
        "cluster: mysql",
        "acme.yaml:4:35",
        &["placement.cluster", "`mysql`", "a cluster: `pg`"],
    ),
    wrong(Main, "maintenance: pg", "maintenance: gp", "cofferdam.yaml:", &["pools.odoo.maintenance", "`gp`"]),
    wrong(
        Main,
        "    login: { role: odoo, password: odoo-secret }\n",
        "",
        "cofferdam.yaml:",
        &["`maintenance` without `login`"],
    ),
    wrong(Bolt, "tenant: acme", "tenant: acme", "bolt.yaml:1:9", &["`acme`, which", "acme.yaml defines too"]),
    wrong(
        Bolt,
        "acme.example.com",
        "ACME.example.com.",
        "bolt.yaml:2:9",
        &["hosts[0]", "`acme.example.com`, which", "has too"],
    ),
    wrong(Bolt, "acme_db", "acme_db", "bolt.yaml:3:11", &["database", "`acme_db`, which", "has too"]),
    wrong(Acme, "database: acme_db", "database: postgres", "acme.yaml:3:11", &["belongs to PostgreSQL itself"]),
    wrong(Acme, "database: acme_db\n", "", "acme.yaml:1:1", &["database", "placed on a cluster"]),
    wrong(Acme, "hosts: [acme.example.com]", "hosts: []", "acme.yaml:2:8", &["at least one host"]),
    wrong(Acme, "pool: odoo, ", "", "acme.yaml:4:12", &["`hosts` without a pool"]),
    wrong(
        Main,
        "reserved: 1, limit: 3",
        "reserved: 4, limit: 3",
        "cofferdam.yaml:",
        &["reserved", "`4`", "limit of 3"],
    ),
    wrong(
        Main,
        "reserved: 1, limit: 3",
        "reserved: 5, limit: 9",
        "cofferdam.yaml:",
        &["pools.odoo.slots", "4 slots", "reserve 5"],
    ),
    wrong(Main, "limit: 3", "limit: 0", "cofferdam.yaml:", &["at least 1 slot"]),
    wrong(Main, "max_wait: 5s", "max_wait: 0s", "cofferdam.yaml:", &["a wait above zero"]),
    wrong(Main, "maintenance: pg", "read_timeout: 0s", "cofferdam.yaml:", &["read_timeout", "a time above zero"]),
    wrong(
        Main,
        "postgres:\n  listen: ['127.0.0.1:0']",
        "postgres:\n  listen: ['127.0.0.1:9180']\n  max_connections: 0",
        "cofferdam.yaml:",
        &["a cap of 0 connections"],
    ),
    wrong(
        Main,
        "postgres:\n  listen: ['127.0.0.1:0']",
        "postgres:\n  listen: ['127.0.0.1:7', '127.0.0.1:7']",
        "cofferdam.yaml:",
        &["`127.0.0.1:7`, which another listener has too"],
    ),
    // Secrets and the admin surface.
    wrong(Main, "password: odoo-secret", "password: ''", "cofferdam.yaml:", &["an empty `password`"]),
    wrong(
        Main,
        "login: { role: odoo, password: odoo-secret }",
        "login: odoo-secret",
        "cofferdam.yaml:",
        &["a value (not shown here)"],
    ),
    wrong(
        Main,
        "password: odoo-secret",
        "password_file: /nonexistent/secret",
        "cofferdam.yaml:",
        &["password_file", "cannot be read"],
    ),
    wrong(
        Main,
        "password: odoo-secret",
        "password_env: COFFERDAM_NOT_SET",
        "cofferdam.yaml:",
        &["password_env", "which is not set"],
    ),
    wrong(
        Main,
        "password: odoo-secret",
        "password: a, password_env: B",
        "cofferdam.yaml:",
        &["2 of `password`", "only one of them"],
    ),
    wrong(Main, ", password: odoo-secret", "", "cofferdam.yaml:", &["a login without a password"]),
    wrong(
        Main,
        "admin:\n  listen: '127.0.0.1:0'",
        "admin:\n  listen: '0.0.0.0:0'",
        "cofferdam.yaml:",
        &["not loopback, without a token", "`token_file`"],
    ),
    wrong(
        Main,
        "admin:\n  listen: '127.0.0.1:0'",
        "admin:\n  token: short",
        "cofferdam.yaml:",
        &["fewer than 16 characters"],
    ),
    wrong(Main, "postgres:\n", "postgres:\n  auth: cert\n", "cofferdam.yaml:", &["`cert` with TLS mode `disable`"]),
    wrong(
        Main,
        "postgres:\n",
        "postgres:\n  tls: { certificate: no.pem, key: no.pem }\n",
        "cofferdam.yaml:",
        &["postgres.tls.certificate", "`no.pem`"],
    ),
    wrong(Main, "tenants", "tenants", "tenants:1:1", &["a readable directory of tenants"]),
];

#[tokio::test]
async fn every_kind_of_wrong_configuration_is_explained_and_changes_nothing() {
    assert!(MISTAKES.len() >= 30);
    let databases: HashMap<_, _> = [("acme.example.com".to_owned(), "acme_db".to_owned())].into();
    let odoo = MiniOdoo::start(OdooOptions { databases, ..OdooOptions::default() }).await.unwrap();
    let main = MAIN.replace("ODOO", &odoo.http().to_string());
    let directory = TenantDirectory::new(&main).unwrap();
    directory.tenant("acme", ACME).unwrap();
    let gateway = Gateway::builder().config_file(directory.path()).start().await.unwrap();
    let running = gateway.catalog();
    for mistake in MISTAKES {
        let Wrong { file, from, to, place, says } = mistake;
        let original = if *file == Main { &main } else { ACME };
        // The directory of tenants itself: named, but not there.
        let text = if *from == "tenants" {
            format!("tenants: elsewhere/tenants\n{main}")
        } else {
            assert!(original.contains(from), "the case does not apply: {from}");
            original.replacen(from, to, 1)
        };
        match file {
            Main => directory.main(&text).unwrap(),
            Acme => directory.tenant("acme", &text).unwrap(),
            Bolt => directory.tenant("bolt", &text).unwrap(),
        }
        let Err(ReloadError::Config(faults)) = gateway.reload().await else {
            panic!("accepted: {to:?}");
        };
        let message = faults.to_string();
        assert!(message.contains(place), "{to:?} should be reported at {place}:\n{message}");
        for part in *says {
            assert!(message.contains(part), "{to:?} should say {part}:\n{message}");
        }
        assert!(!message.contains("odoo-secret"), "a secret leaked:\n{message}");
        assert!(std::sync::Arc::ptr_eq(&running, &gateway.catalog()), "{to:?} changed what is served");
        directory.main(&main).unwrap();
        directory.tenant("acme", ACME).unwrap();
        let _ = directory.remove("bolt");
    }
    let mut client = HttpClient::connect(gateway.http_addresses()[0]).await.unwrap();
    assert_eq!(client.get("acme.example.com", "/web").await.unwrap().status, 200);
    assert_eq!(gateway.reload().await.unwrap().generation, 2);
}

#[tokio::test]
async fn all_errors_of_all_files_are_reported_at_once_and_shown_by_the_admin_surface() {
    let directory = TenantDirectory::new(&MAIN.replace("ODOO", "127.0.0.1:1")).unwrap();
    directory.tenant("acme", ACME).unwrap();
    let gateway = Gateway::builder().config_file(directory.path()).start().await.unwrap();
    let mut admin = HttpClient::connect(gateway.admin_address().unwrap()).await.unwrap();
    let metrics = admin.get("localhost", "/metrics").await.unwrap().text();
    assert!(metrics.contains("cofferdam_config_errors 0"), "{metrics}");
    // A page in a browser on this machine reads nothing under a name of its own, and changes nothing.
    assert_eq!(admin.get("rebound.example.com:9180", "/api/v1/tenants").await.unwrap().status, 403);
    assert_eq!(admin.get("[::1]:9180", "/api/v1/tenants").await.unwrap().status, 200);
    for (origin, status) in [("https://evil.example.com", 403), ("null", 403)] {
        let headers = [("Origin", origin)];
        let answer = admin.request("POST", "localhost", "/api/v1/reload", &headers, &[]).await.unwrap();
        assert_eq!(answer.status, status, "{origin}");
    }

    directory
        .main(&MAIN.replace("ODOO", "127.0.0.1:1").replace("weight: 2", "weight: two").replace("5s", "five"))
        .unwrap();
    directory.tenant("acme", &ACME.replace("hosts", "host").replace("acme_db", "''")).unwrap();
    directory.tenant("bolt", "tenant: bolt\n").unwrap();
    let response = admin.request("POST", "localhost", "/api/v1/reload", &[], &[]).await.unwrap();
    assert_eq!(response.status, 422);
    let body: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
    let errors = body["errors"].as_array().unwrap();
    assert!(errors.len() >= 7, "{errors:#?}");
    for field in ["line", "column", "found", "expected", "file", "field"] {
        assert!(errors.iter().all(|e| !e[field].is_null()), "{field}");
    }
    let status = admin.get("localhost", "/api/v1/status").await.unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.body).unwrap();
    assert_eq!(status["generation"], 1);
    assert_eq!(status["failed_reloads"], 1);
    assert_eq!(status["last_errors"].as_array().unwrap().len(), errors.len());
    let metrics = admin.get("localhost", "/metrics").await.unwrap().text();
    assert!(metrics.contains("cofferdam_reloads_total{result=\"failed\"} 1"), "{metrics}");
    assert!(!metrics.contains("cofferdam_config_errors 0"), "{metrics}");
}

#[tokio::test]
async fn a_changed_file_is_served_without_being_asked() {
    let databases: HashMap<_, _> = [("new.example.com".to_owned(), "new_db".to_owned())].into();
    let odoo = MiniOdoo::start(OdooOptions { databases, ..OdooOptions::default() }).await.unwrap();
    let directory = TenantDirectory::new(&MAIN.replace("ODOO", &odoo.http().to_string())).unwrap();
    directory.tenant("acme", ACME).unwrap();
    let gateway = Gateway::builder().config_file(directory.path()).watch(true).start().await.unwrap();
    let ask = async || {
        let mut client = HttpClient::connect(gateway.http_addresses()[0]).await.unwrap();
        client.get("new.example.com", "/web").await.unwrap().status
    };
    assert_eq!(ask().await, 421);
    directory.tenant("new", &ACME.replace("acme", "new")).unwrap();
    eventually(|| async { ask().await == 200 }).await;
    directory.remove("new").unwrap();
    eventually(|| async { ask().await == 421 }).await;
}

#[tokio::test]
async fn the_admin_surface_demands_its_token_and_shows_tenants_and_gates() {
    let text = MAIN
        .replace("ODOO", "127.0.0.1:1")
        .replace("admin:\n  listen: '127.0.0.1:0'", "admin:\n  listen: '127.0.0.1:0'\n  token: a-long-enough-token");
    let directory = TenantDirectory::new(&text).unwrap();
    directory.tenant("acme", ACME).unwrap();
    let gateway = Gateway::builder().config_file(directory.path()).start().await.unwrap();
    let mut admin = HttpClient::connect(gateway.admin_address().unwrap()).await.unwrap();
    assert_eq!(admin.get("localhost", "/livez").await.unwrap().status, 200);
    assert_eq!(admin.get("localhost", "/readyz").await.unwrap().status, 200);
    for path in ["/metrics", "/api/v1/tenants", "/api/v1/gates", "/api/v1/status", "/api/v1/tenants/acme"] {
        assert_eq!(admin.get("localhost", path).await.unwrap().status, 401, "{path}");
        let wrong = [("Authorization", "Bearer a-long-enough-tokem")];
        assert_eq!(admin.request("GET", "localhost", path, &wrong, &[]).await.unwrap().status, 401, "{path}");
        let right = [("Authorization", "Bearer a-long-enough-token")];
        assert_eq!(admin.request("GET", "localhost", path, &right, &[]).await.unwrap().status, 200, "{path}");
    }
    assert_eq!(admin.request("POST", "localhost", "/api/v1/reload", &[], &[]).await.unwrap().status, 401);
    let right = [("Authorization", "Bearer a-long-enough-token")];
    let tenant = admin.request("GET", "localhost", "/api/v1/tenants/acme", &right, &[]).await.unwrap();
    let tenant: serde_json::Value = serde_json::from_slice(&tenant.body).unwrap();
    assert_eq!((tenant["http"]["limit"].as_u64(), tenant["http"]["reserved"].as_u64()), (Some(3), Some(1)));
    let gates = admin.request("GET", "localhost", "/api/v1/gates", &right, &[]).await.unwrap();
    let gates: serde_json::Value = serde_json::from_slice(&gates.body).unwrap();
    assert_eq!(gates.as_array().unwrap().len(), 2);
    assert_eq!(gates[0]["slots"], 4);
    // A reload that takes the token away does not open the listener.
    directory.main(&MAIN.replace("ODOO", "127.0.0.1:1")).unwrap();
    gateway.reload().await.unwrap();
    assert_eq!(admin.get("localhost", "/metrics").await.unwrap().status, 401);
    gateway.drain();
    let ready = HttpClient::connect(gateway.admin_address().unwrap()).await.unwrap().get("localhost", "/readyz").await;
    assert_eq!(ready.unwrap().status, 503);
}

/// Answers every question with something that fits.
struct AnySecret;

impl cofferdam::tenant::Secrets for AnySecret {
    fn file(&self, _: &std::path::Path) -> std::io::Result<String> {
        Ok("-----BEGIN SOMETHING-----".into())
    }
    fn env(&self, _: &str) -> Option<String> {
        Some("a-long-enough-secret".into())
    }
}

#[test]
fn the_configurations_in_the_documents_are_valid() {
    use cofferdam::tenant::{Catalog, Source, SourceSet};
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for document in ["README.md", "docs/configuration.md"] {
        let text = std::fs::read_to_string(root.join(document)).unwrap();
        let blocks: Vec<String> = text
            .split("```yaml\n")
            .skip(1)
            .map(|rest| rest.split("```").next().unwrap().to_owned())
            .filter(|block| block.contains(": "))
            .collect();
        let main = blocks.iter().find(|b| b.contains("pools:")).unwrap_or_else(|| panic!("no main file in {document}"));
        let tenants: Vec<_> =
            blocks.iter().filter(|b| b.contains("tenant: ")).map(|b| Source::new(document, b.as_str())).collect();
        assert!(!tenants.is_empty(), "no tenant in {document}");
        let set = SourceSet { main: Source::new(document, main.as_str()), tenants };
        Catalog::build(&set, &AnySecret, None).unwrap_or_else(|faults| panic!("{document}:\n{faults}"));
    }
}

#[test]
fn so_are_those_of_backups_and_health() {
    use cofferdam_tenant::Source;
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let first = |document: &str| {
        let text = std::fs::read_to_string(root.join(document)).unwrap();
        let block = text.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap().to_owned();
        Source::new(document, block)
    };
    let setup = cofferdam_backup::config::Setup::read(&first("backup.md"), None, &AnySecret)
        .unwrap_or_else(|faults| panic!("backup.md:\n{faults}"));
    assert!(setup.tenant("acme").is_some());
    let setup = cofferdam_health::config::Setup::read(&first("health.md"), None, &AnySecret)
        .unwrap_or_else(|faults| panic!("health.md:\n{faults}"));
    assert!(setup.knows("acme") && setup.sinks().is_ok());
}
