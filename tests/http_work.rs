//! How requests come to servers, who is kept waiting, and what is written down.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cofferdam::Gateway;
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::{HttpClient, Response};
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use cofferdam_tests::eventually;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, Span};
use prost::Message;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const ACME: &str = "acme.example.com";

struct House {
    gateway: Gateway,
    directory: TenantDirectory,
    main: String,
}

/// A gateway in front of servers; `http` and `pool` are lines of the configuration.
async fn house(servers: &[SocketAddr], http: &str, pool: &str) -> House {
    let servers: Vec<_> = servers.iter().map(|address| format!("{{ address: '{address}' }}")).collect();
    let main = format!(
        "http:\n  listen: ['127.0.0.1:0']\n{http}pools:\n  odoo:\n    servers: [{}]\n    slots: 8\n{pool}plans:\n  standard: {{}}\n",
        servers.join(", ")
    );
    let directory = TenantDirectory::new(&main).unwrap();
    for t in ["acme", "bolt"] {
        directory.tenant(t, &tenant(t, "")).unwrap();
    }
    let gateway = Gateway::builder().config_file(directory.path()).start().await.unwrap();
    House { gateway, directory, main }
}

fn tenant(slug: &str, more: &str) -> String {
    format!(
        "tenant: {slug}\nhosts: [{slug}.example.com]\ndatabase: {slug}_db\nplacement: {{ pool: odoo }}\nplan: standard\n{more}"
    )
}

async fn odoo() -> MiniOdoo {
    let databases: HashMap<_, _> = ["acme", "bolt"].map(|t| (format!("{t}.example.com"), format!("{t}_db"))).into();
    MiniOdoo::start(OdooOptions { workers: 8, databases, ..OdooOptions::default() }).await.unwrap()
}

impl House {
    async fn ask(&self, method: &str, host: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
        let mut client = HttpClient::connect(self.gateway.http_addresses()[0]).await.unwrap();
        client.request(method, host, path, headers, body.as_bytes()).await.unwrap()
    }

    async fn get(&self, path: &str) -> Response {
        self.ask("GET", ACME, path, &[], "").await
    }
}

/// A server that answers, or closes without an answer, as it is told.
struct Moody {
    address: SocketAddr,
    answers: Arc<AtomicBool>,
    asked: Arc<AtomicU32>,
}

async fn moody(answers: bool) -> Moody {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let moody = Moody {
        address: listener.local_addr().unwrap(),
        answers: Arc::new(AtomicBool::new(answers)),
        asked: Arc::default(),
    };
    let (answers, asked) = (Arc::clone(&moody.answers), Arc::clone(&moody.asked));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (answers, asked) = (Arc::clone(&answers), Arc::clone(&asked));
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.windows(4).any(|w| w == b"\r\n\r\n") {
                    if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                asked.fetch_add(1, Ordering::Relaxed);
                if answers.load(Ordering::Relaxed) {
                    let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nmoody").await;
                }
            });
        }
    });
    moody
}

#[tokio::test]
async fn what_is_safe_is_asked_again_and_what_is_not_is_not() {
    let odoo = odoo().await;
    // Which server is asked first for a tenant depends on their ports.
    let (silent, house) = loop {
        let silent = moody(false).await;
        let house = house(&[silent.address, odoo.http()], "", "").await;
        let answer = house.get("/testkit/echo").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        if silent.asked.load(Ordering::Relaxed) == 1 {
            break (silent, house);
        }
    };
    // A form must not be sent twice.
    let form = async || house.ask("POST", ACME, "/testkit/echo", &[], "a=1").await;
    let refused = form().await;
    assert_eq!(refused.status, 502, "{}", refused.text());
    assert!(refused.text().contains("closed the connection without an answer"), "{}", refused.text());
    // After five in a row it is asked last, so nobody meets it.
    for _ in 0..3 {
        form().await;
    }
    for _ in 0..20 {
        assert_eq!(form().await.status, 200);
    }
    assert_eq!(silent.asked.load(Ordering::Relaxed), 5);
}

#[tokio::test]
async fn a_server_that_is_ill_is_asked_last_until_it_is_well() {
    let (server, odoo) = (moody(true).await, odoo().await);
    let health = "    health: { interval: 100ms, timeout: 500ms, path: /web/health }\n";
    let house = house(&[server.address, odoo.http()], "", health).await;
    let is_well = || {
        let usage = house.gateway.http_plane().unwrap().usage();
        usage.servers.iter().find(|s| s.address.port == server.address.port()).unwrap().is_well
    };
    eventually(|| async { server.asked.load(Ordering::Relaxed) >= 2 }).await;
    assert!(is_well());
    server.answers.store(false, Ordering::Relaxed);
    eventually(|| async { !is_well() }).await;
    for host in [ACME, "bolt.example.com"] {
        for _ in 0..5 {
            assert_eq!(house.ask("POST", host, "/testkit/echo", &[], "a=1").await.status, 200);
        }
    }
    server.answers.store(true, Ordering::Relaxed);
    eventually(|| async { is_well() }).await;
    // Without the section nobody looks any more, and what was thought is forgotten.
    server.answers.store(false, Ordering::Relaxed);
    eventually(|| async { !is_well() }).await;
    house.directory.main(&house.main.replace(health, "")).unwrap();
    house.gateway.reload().await.unwrap();
    assert!(is_well());
}

/// The rule "busy is alive": a probe neither waits behind users nor takes their worker.
#[tokio::test]
async fn a_server_with_all_workers_busy_is_well() {
    let databases: HashMap<_, _> = [(ACME.to_owned(), "acme_db".to_owned())].into();
    let odoo = MiniOdoo::start(OdooOptions { workers: 1, databases, ..OdooOptions::default() }).await.unwrap();
    let health = "    health: { interval: 100ms, timeout: 200ms, unhealthy_after: 1 }\n";
    let house = house(&[odoo.http()], "", health).await;
    house.directory.main(&house.main.replace("slots: 8", "slots: 1")).unwrap();
    house.gateway.reload().await.unwrap();
    let address = house.gateway.http_addresses()[0];
    let busy = tokio::spawn(async move {
        HttpClient::connect(address).await.unwrap().get(ACME, "/testkit/work?wait=1500").await.unwrap().status
    });
    eventually(|| async { odoo.busy() == 1 && house.gateway.http_plane().unwrap().usage().servers[0].in_flight == 1 })
        .await;
    while !busy.is_finished() {
        assert!(house.gateway.http_plane().unwrap().usage().servers[0].is_well);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(busy.await.unwrap(), 200);
}

#[tokio::test]
async fn a_site_under_maintenance_says_so_and_lets_its_workers_in() {
    let odoo = odoo().await;
    let house = house(&[odoo.http()], "  trusted_proxies: [127.0.0.1]\n", "").await;
    std::fs::write(house.directory.path().parent().unwrap().join("page.html"), "<h1>Back at noon</h1>").unwrap();
    let mode = "maintenance_mode: { message: 'the upgrade takes until noon', page: page.html, retry_after: 10m, allow: [192.0.2.0/24] }\n";
    house.directory.tenant("acme", &tenant("acme", mode)).unwrap();
    house.gateway.reload().await.unwrap();
    let program = house.get("/testkit/echo").await;
    assert_eq!((program.status, program.header("retry-after")), (503, Some("600")));
    assert!(program.text().contains("the upgrade takes until noon"), "{}", program.text());
    let browser = house.ask("GET", ACME, "/web", &[("Accept", "text/html")], "").await;
    assert_eq!((browser.status, browser.text()), (503, "<h1>Back at noon</h1>".to_owned()));
    let admin = house.ask("GET", ACME, "/testkit/echo", &[("X-Forwarded-For", "192.0.2.7")], "").await;
    assert_eq!(admin.status, 200);
    assert_eq!(house.ask("GET", "bolt.example.com", "/testkit/echo", &[], "").await.status, 200);
    // All sites of a pool.
    house.directory.tenant("acme", &tenant("acme", "")).unwrap();
    house.directory.main(&house.main.replace("    slots: 8\n", "    slots: 8\n    maintenance_mode: {}\n")).unwrap();
    house.gateway.reload().await.unwrap();
    for host in [ACME, "bolt.example.com"] {
        assert_eq!(house.ask("GET", host, "/testkit/echo", &[], "").await.status, 503);
    }
}

/// The rule "`/web/login`, … limit per address and login".
#[tokio::test]
async fn who_guesses_passwords_waits_and_who_knows_one_does_not() {
    let odoo = odoo().await;
    let http = "  trusted_proxies: [127.0.0.1]\n  login_protection: { attempts: 3, first_delay: 600s, trusted: [198.51.100.0/24] }\n";
    let house = house(&[odoo.http()], http, "").await;
    let form = ("Content-Type", "application/x-www-form-urlencoded");
    let log_in = async |from: &str, login: &str, password: &str| {
        let body = format!("login={login}&password={password}");
        house.ask("POST", ACME, "/web/login", &[form, ("X-Forwarded-For", from)], &body).await
    };
    for _ in 0..3 {
        assert_eq!(log_in("192.0.2.1", "admin", "guess").await.status, 200);
    }
    let before = odoo.requests();
    let refused = log_in("192.0.2.1", "admin", "admin-secret").await;
    assert_eq!(refused.status, 429, "{}", refused.text());
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() > 500);
    assert_eq!(odoo.requests(), before, "Odoo has nothing to do with it");
    // By another way it is the same login.
    let json = r#"{"jsonrpc":"2.0","params":{"db":"acme_db","login":"ADMIN","password":"admin-secret"}}"#;
    let headers = [("Content-Type", "application/json"), ("X-Forwarded-For", "192.0.2.1")];
    assert_eq!(house.ask("POST", ACME, "/web/session/authenticate", &headers, json).await.status, 429);
    // The right one from elsewhere, and a trusted network.
    assert_eq!(log_in("192.0.2.2", "admin", "admin-secret").await.status, 303);
    for _ in 0..10 {
        assert_eq!(log_in("198.51.100.9", "admin", "guess").await.status, 200);
    }
    // What JSON answers is understood too.
    let wrong = json.replace("admin-secret", "guess");
    let headers = [("Content-Type", "application/json"), ("X-Forwarded-For", "192.0.2.3")];
    for _ in 0..3 {
        assert_eq!(house.ask("POST", ACME, "/web/session/authenticate", &headers, &wrong).await.status, 200);
    }
    assert_eq!(house.ask("POST", ACME, "/web/session/authenticate", &headers, &wrong).await.status, 429);
    // Whoever leaves before the answer is through has been wrong all the same.
    let address = house.gateway.http_addresses()[0];
    for _ in 0..3 {
        let mut hasty = HttpClient::connect(address).await.unwrap();
        let body = "login=admin&password=guess&ms=300";
        let head = format!(
            "POST /web/login HTTP/1.1\r\nHost: {ACME}\r\nX-Forwarded-For: 192.0.2.4\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n{body}",
            form.1,
            body.len()
        );
        let before = odoo.requests();
        hasty.send(head.as_bytes()).await.unwrap();
        eventually(|| async { odoo.requests() > before }).await;
        drop(hasty);
    }
    eventually(|| async { log_in("192.0.2.4", "admin", "guess").await.status == 429 }).await;
    // Looking at the form is free.
    let look = house.ask("GET", ACME, "/web/login", &[("X-Forwarded-For", "192.0.2.1")], "").await;
    assert_eq!(look.status, 200);
}

#[tokio::test]
async fn every_request_is_a_line_of_json_and_continues_its_trace() {
    let odoo = odoo().await;
    let house = house(&[odoo.http()], "  access_log: access.log\n", "").await;
    let log = house.directory.path().parent().unwrap().join("access.log");
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{trace}-00f067aa0ba902b7-01");
    let headers = [("traceparent", parent.as_str())];
    let echo = house.ask("POST", ACME, "/testkit/echo?secret=1", &headers, "a=1").await;
    let id = echo.header("x-request-id").unwrap().to_owned();
    assert!(echo.text().contains(&format!("header traceparent: 00-{trace}-{id}-01\n")), "{}", echo.text());
    house.get("/report/pdf/x/1?ms=50").await;
    house.get("/web/database/manager").await;
    house.ask("GET", "nobody.example.com", "/x", &[], "").await;
    let written = || {
        let text = std::fs::read_to_string(&log).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<serde_json::Value>>()
    };
    eventually(|| async { written().len() == 4 }).await;
    let lines = written();
    let first = &lines[0];
    assert_eq!(
        (&first["tenant"], &first["class"], &first["method"], &first["path"], &first["status"], &first["bytes_in"]),
        (&"acme".into(), &"interactive".into(), &"POST".into(), &"/testkit/echo".into(), &200.into(), &3.into())
    );
    assert_eq!((&first["request_id"], &first["trace_id"], &first["attempts"]), (&id.into(), &trace.into(), &1.into()));
    assert_eq!(first["upstream"], odoo.http().to_string());
    assert!(first["time"].as_str().unwrap().ends_with('Z') && !first.to_string().contains("secret"), "{first}");
    assert_eq!(first["bytes_out"], echo.body.len());
    assert!(lines[1]["worker_ms"].as_f64().unwrap() >= 50.0 && lines[1]["class"] == "report", "{}", lines[1]);
    assert_eq!((&lines[2]["status"], &lines[2]["upstream"]), (&404.into(), &serde_json::Value::Null));
    assert_eq!((&lines[3]["status"], &lines[3]["tenant"]), (&421.into(), &serde_json::Value::Null));
    // What is no request is written down too.
    let mut stream = TcpStream::connect(house.gateway.http_addresses()[0]).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\nHost: acme.example.com\n\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    eventually(|| async { written().len() == 5 }).await;
    let line = &written()[4];
    assert_eq!((&line["status"], &line["client"], &line["path"]), (&400.into(), &"127.0.0.1".into(), &"".into()));
    assert!(answer.contains(&format!("X-Request-Id: {}\r\n", line["request_id"].as_str().unwrap())), "{answer}");
    // A reload opens the file anew, as log rotation wants it.
    std::fs::rename(&log, log.with_extension("1")).unwrap();
    house.gateway.reload().await.unwrap();
    house.get("/testkit/echo").await;
    eventually(|| async { std::fs::read_to_string(&log).is_ok_and(|text| text.lines().count() == 1) }).await;
}

#[tokio::test]
async fn one_address_does_not_have_all_connections() {
    let odoo = odoo().await;
    let house = house(&[odoo.http()], "  max_connections_per_address: 2\n", "").await;
    let ask = async || {
        let mut stream = TcpStream::connect(house.gateway.http_addresses()[0]).await.unwrap();
        let request = "GET /testkit/echo HTTP/1.1\r\nHost: acme.example.com\r\n\r\n";
        let mut first = [0; 12];
        // Whom it is closed to may still write.
        let answered =
            stream.write_all(request.as_bytes()).await.is_ok() && stream.read_exact(&mut first).await.is_ok();
        answered.then_some((stream, String::from_utf8_lossy(&first).into_owned()))
    };
    let (first, second) = (ask().await.unwrap(), ask().await.unwrap());
    assert_eq!(first.1, "HTTP/1.1 200");
    assert!(ask().await.is_none(), "a third is closed");
    drop(second);
    eventually(|| async { ask().await.is_some() }).await;
    let (_, _) = (first, odoo);
}

/// A collector that takes spans by OTLP over HTTP, and remembers with which authorization they came.
struct Collector {
    address: SocketAddr,
    got: Arc<Mutex<Vec<(String, ResourceSpans)>>>,
}

impl Collector {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, got) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
        let all = Arc::clone(&got);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let all = Arc::clone(&all);
                tokio::spawn(async move {
                    let mut stream = tokio::io::BufReader::new(stream);
                    loop {
                        let (mut length, mut authorization, mut first) = (0, String::new(), String::new());
                        loop {
                            let mut line = String::new();
                            if stream.read_line(&mut line).await.unwrap() == 0 {
                                return;
                            }
                            match line.trim_end().split_once(": ") {
                                Some(("content-length", value)) => length = value.parse().unwrap(),
                                Some(("authorization", value)) => value.clone_into(&mut authorization),
                                None if line.trim_end().is_empty() => break,
                                None => first = line,
                                _ => {}
                            }
                        }
                        assert!(first.starts_with("POST /v1/traces HTTP/1.1"), "{first}");
                        let mut body = vec![0; length];
                        stream.read_exact(&mut body).await.unwrap();
                        let request = ExportTraceServiceRequest::decode(&*body).unwrap();
                        all.lock()
                            .unwrap()
                            .extend(request.resource_spans.into_iter().map(|r| (authorization.clone(), r)));
                        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                    }
                });
            }
        });
        Self { address, got }
    }

    fn spans(&self) -> Vec<Span> {
        let got = self.got.lock().unwrap();
        got.iter().flat_map(|(_, r)| &r.scope_spans).flat_map(|s| s.spans.clone()).collect()
    }
}

fn said(span: &Span, key: &str) -> Option<String> {
    let value = span.attributes.iter().find(|a| a.key == key)?.value.clone()?.value?;
    Some(match value {
        any_value::Value::StringValue(text) => text,
        any_value::Value::IntValue(number) => number.to_string(),
        other => panic!("{other:?}"),
    })
}

fn in_hex(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|b| [b >> 4, b & 15]).map(|n| char::from_digit(n.into(), 16).unwrap()).collect()
}

/// "OTLP traces": a span for a request, with its wait and its worker's time inside, in the trace that it continues.
#[tokio::test]
async fn spans_of_recorded_requests_reach_a_collector_and_those_of_others_do_not() {
    let (odoo, collector) = (odoo().await, Collector::start().await);
    let traces = |share: &str| {
        let endpoint = format!("'http://{}/'", collector.address);
        format!(
            "  traces: {{ endpoint: {endpoint}, share: {share}, believe: [127.0.0.1], authorization: Bearer sesame }}\n"
        )
    };
    let trusting = "believe: [127.0.0.1], ";
    let house = house(&[odoo.http()], &traces("0"), "").await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = |flags: &str| format!("00-{trace}-00f067aa0ba902b7-{flags}");
    // A proxy that is believed says what is recorded; of what else comes nothing is.
    house.ask("POST", ACME, "/testkit/echo?secret=1", &[("traceparent", &parent("00"))], "a=1").await;
    let recorded = parent("01");
    let report = house.ask("GET", ACME, "/report/pdf/x/1?ms=50", &[("traceparent", &recorded)], "").await;
    let id = report.header("x-request-id").unwrap().to_owned();
    eventually(|| async { collector.spans().len() >= 3 }).await;
    let spans = collector.spans();
    assert_eq!(spans.len(), 3, "{spans:#?}");
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let (request, wait, worker) = (named("GET report"), named("wait for a worker"), named("worker"));
    assert!(spans.iter().all(|span| in_hex(&span.trace_id) == trace));
    assert_eq!((in_hex(&request.span_id), in_hex(&request.parent_span_id)), (id, "00f067aa0ba902b7".into()));
    assert!(
        [wait, worker].iter().all(|span| span.parent_span_id == request.span_id && span.span_id != request.span_id)
    );
    assert_ne!(wait.span_id, worker.span_id);
    let about = ["cofferdam.tenant", "cofferdam.class", "url.path", "http.response.status_code", "http.request.method"];
    let found: Vec<_> = about.iter().map(|key| said(request, key).unwrap()).collect();
    assert_eq!(found, ["acme", "report", "/report/pdf/x/1", "200", "GET"]);
    assert_eq!(said(worker, "server.port"), Some(odoo.http().port().to_string()));
    let lasted = |span: &Span| span.end_time_unix_nano - span.start_time_unix_nano;
    assert!(lasted(worker) >= 50_000_000 && lasted(request) >= lasted(worker), "{spans:#?}");
    assert!(
        wait.start_time_unix_nano >= request.start_time_unix_nano
            && wait.end_time_unix_nano <= worker.start_time_unix_nano + 1_000_000
    );
    assert!(!format!("{spans:?}").contains("secret"));
    let (authorization, of) = collector.got.lock().unwrap()[0].clone();
    assert_eq!(authorization, "Bearer sesame");
    let service = of.resource.unwrap().attributes.into_iter().find(|a| a.key == "service.name").unwrap();
    assert!(format!("{service:?}").contains("cofferdam"));

    // Nobody else is believed. What is recorded by choice is told to the server, and an error is one.
    let before = collector.spans().len();
    house.directory.main(&house.main.replace(trusting, "")).unwrap();
    house.gateway.reload().await.unwrap();
    let echo = house.ask("GET", ACME, "/testkit/echo", &[("traceparent", &recorded)], "").await;
    assert!(echo.text().contains(&format!("-{}-01\n", echo.header("x-request-id").unwrap())), "passed on as it came");
    house.directory.main(&house.main.replace(trusting, "").replace("share: 0", "share: 1")).unwrap();
    house.gateway.reload().await.unwrap();
    let echo = house.get("/testkit/echo").await;
    assert!(echo.text().contains(&format!("{}-01\n", echo.header("x-request-id").unwrap())), "{}", echo.text());
    house.get("/web/database/manager").await;
    house.get("/websocketless").await;
    house.ask("MADE-UP", ACME, "/survey/start/0e8b7c1a-55a4-4c0e-9d0f-2f6f0c0a9b1d", &[], "").await;
    eventually(|| async { collector.spans().len() >= before + 10 }).await;
    let spans = collector.spans().split_off(before);
    assert_eq!(spans.iter().filter(|span| span.kind == SpanKind::Server as i32).count(), 4, "{spans:#?}");
    let made_up = spans.iter().find(|span| said(span, "http.request.method").as_deref() == Some("_OTHER")).unwrap();
    assert_eq!(
        (made_up.name.as_str(), said(made_up, "url.path").unwrap().as_str()),
        ("HTTP interactive", "/survey/start/…")
    );
    let failed: Vec<_> = spans.iter().filter(|s| s.status.as_ref().is_some_and(|s| s.code == 2)).collect();
    assert_eq!(failed.iter().map(|span| said(span, "error.type").unwrap()).collect::<Vec<_>>(), ["500"]);
    let closed = spans.iter().find(|span| said(span, "http.response.status_code").as_deref() == Some("404")).unwrap();
    assert_eq!(closed.name, "GET");
    // What waits when the gateway ends is sent.
    let before = collector.spans().len();
    house.get("/testkit/echo").await;
    house.gateway.drain();
    assert!(house.gateway.wait().await.complete);
    assert!(collector.spans().len() >= before + 3);
}

/// A collector that is away or hangs costs no request anything.
#[tokio::test]
async fn a_collector_that_does_not_answer_holds_nobody_up() {
    let odoo = odoo().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let traces = format!("  traces: {{ endpoint: 'http://{}', share: 1 }}\n", silent.local_addr().unwrap());
    let house = house(&[odoo.http()], &traces, "").await;
    for _ in 0..200 {
        assert_eq!(house.get("/testkit/echo").await.status, 200);
    }
    // Nor does another collector, or none, wait for what the old one was to get.
    house.directory.main(&house.main.replace(&traces, "")).unwrap();
    house.gateway.reload().await.unwrap();
    assert_eq!(house.get("/testkit/echo").await.status, 200);
}

#[tokio::test]
async fn a_canary_gets_its_part_of_the_browsers_and_keeps_them() {
    let (odoo, next) = (odoo().await, moody(true).await);
    let house = house(&[odoo.http()], "", "").await;
    let pool = format!("pools:\n  next:\n    servers: [{{ address: '{}' }}]\n    slots: 4\n  odoo:", next.address);
    house.directory.main(&house.main.replace("pools:\n  odoo:", &pool)).unwrap();
    let canary =
        |weight: u32| tenant("acme", &format!("canary: {{ pool: next, weight: {weight}, header: X-Canary }}\n"));
    house.directory.tenant("acme", &canary(50)).unwrap();
    house.gateway.reload().await.unwrap();
    let is_next = |response: &Response| response.text() == "moody";
    let mut first = HashMap::new();
    for _ in 0..40 {
        let response = house.get("/testkit/echo").await;
        let cookie = response.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
        assert!(cookie.starts_with("cofferdam_canary="), "{cookie}");
        *first.entry((cookie, is_next(&response))).or_insert(0) += 1;
    }
    assert_eq!(first.len(), 2, "both pools, and each with its own cookie: {first:?}");
    for (cookie, was_next) in first.keys() {
        for _ in 0..5 {
            let again = house.ask("GET", ACME, "/testkit/echo", &[("Cookie", cookie)], "").await;
            assert_eq!((is_next(&again), again.header("set-cookie")), (*was_next, None));
        }
    }
    house.directory.tenant("acme", &canary(0)).unwrap();
    house.gateway.reload().await.unwrap();
    let back = house.ask("GET", ACME, "/testkit/echo", &[("Cookie", "cofferdam_canary=1")], "").await;
    assert!(!is_next(&back));
    let asked = house.ask("GET", ACME, "/testkit/echo", &[("x-canary", "yes")], "").await;
    assert!(is_next(&asked));
    assert!(!is_next(&house.ask("GET", "bolt.example.com", "/testkit/echo", &[("x-canary", "yes")], "").await));
}

#[tokio::test]
async fn headers_are_changed_as_the_operator_says() {
    let odoo = odoo().await;
    let http = "  headers:\n    response: { set: { X-Frame-Options: DENY, X-A: all }, remove: [Server] }\n    request: { set: { X-Site: all } }\n";
    let house = house(&[odoo.http()], http, "").await;
    let own =
        "headers: { request: { set: { X-Site: acme }, remove: [User-Agent] }, response: { set: { X-A: own } } }\n";
    house.directory.tenant("acme", &tenant("acme", own)).unwrap();
    house.gateway.reload().await.unwrap();
    let acme = house.ask("GET", ACME, "/testkit/echo", &[("User-Agent", "x"), ("X-Site", "mine")], "").await;
    assert!(acme.text().contains("header x-site: acme\n") && !acme.text().contains("user-agent"), "{}", acme.text());
    let seen = ["x-frame-options", "x-a", "server"].map(|name| acme.header(name));
    assert_eq!(seen, [Some("DENY"), Some("own"), None]);
    let bolt = house.ask("GET", "bolt.example.com", "/testkit/echo", &[("User-Agent", "x")], "").await;
    assert!(bolt.text().contains("header x-site: all\n") && bolt.text().contains("header user-agent: x\n"));
    assert_eq!(bolt.header("x-a"), Some("all"));
}

/// A sleeping environment: requests are held, one hook is called, and all go on when the first server answers.
#[tokio::test]
async fn requests_wait_while_their_servers_are_woken() {
    let hook = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hook_address = hook.local_addr().unwrap();
    // A port that nobody listens on until the hook is called.
    let asleep = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let house =
        house(&[asleep], "", &format!("    wake: {{ address: '{hook_address}', path: /wake, timeout: 20s }}\n")).await;
    let called = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&called);
    let waker = tokio::spawn(async move {
        let (mut stream, _) = hook.accept().await.unwrap();
        count.fetch_add(1, Ordering::Relaxed);
        let mut asked = Vec::new();
        while !asked.ends_with(b"}\n") {
            stream.read_buf(&mut asked).await.unwrap();
        }
        stream.write_all(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(400)).await;
        let server = TcpListener::bind(asleep).await.unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = server.accept().await {
                tokio::spawn(async move {
                    let _ = stream.read_buf(&mut Vec::with_capacity(4096)).await;
                    let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nawake").await;
                });
            }
        });
        assert!(tokio::time::timeout(Duration::from_millis(500), hook.accept()).await.is_err(), "called twice");
        String::from_utf8(asked).unwrap()
    });
    let address = house.gateway.http_addresses()[0];
    let all: Vec<_> = (0..2)
        .map(|_| {
            tokio::spawn(async move { HttpClient::connect(address).await.unwrap().get(ACME, "/x").await.unwrap() })
        })
        .collect();
    for one in all {
        let answer = one.await.unwrap();
        assert_eq!((answer.status, answer.text()), (200, "awake".to_owned()));
    }
    let asked = waker.await.unwrap();
    assert!(
        asked.starts_with("POST /wake HTTP/1.1\r\n") && asked.ends_with("{\"pool\":\"odoo\",\"tenant\":\"acme\"}\n"),
        "{asked}"
    );
    assert_eq!(called.load(Ordering::Relaxed), 1);
}
