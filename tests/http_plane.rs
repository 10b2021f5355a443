//! The HTTP plane in front of a miniature Odoo.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use cofferdam::Gateway;
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::load::{HttpClient, Response};
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use cofferdam_tests::eventually;
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

struct HttpSite {
    odoo: MiniOdoo,
    gateway: Gateway,
    directory: TenantDirectory,
}

struct Options {
    workers: usize,
    plan: &'static str,
    pool: &'static str,
    http: &'static str,
    limit_time_real: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { workers: 2, plan: "", pool: "", http: "", limit_time_real: Duration::from_secs(120) }
    }
}

impl HttpSite {
    async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    async fn start_with(options: Options) -> Self {
        let databases: HashMap<_, _> = ["acme", "bolt"].map(|t| (format!("{t}.example.com"), format!("{t}_db"))).into();
        let odoo = MiniOdoo::start(OdooOptions {
            workers: options.workers,
            databases,
            limit_time_real: options.limit_time_real,
            ..OdooOptions::default()
        })
        .await
        .unwrap();
        let main = format!(
            "http:\n  listen: ['127.0.0.1:0']\n{}\npools:\n  odoo:\n    servers: [{{ address: '{}', gevent: '{}' }}]\n    slots: {}\n{}\nplans:\n  standard:\n    weight: 1\n{}\ndrain_timeout: 20s\n",
            options.http,
            odoo.http(),
            odoo.gevent(),
            options.workers,
            options.pool,
            options.plan
        );
        let directory = TenantDirectory::new(&main).unwrap();
        for t in ["acme", "bolt"] {
            let text = format!(
                "tenant: {t}\nhosts: [{t}.example.com]\ndatabase: {t}_db\nplacement: {{ pool: odoo }}\nplan: standard\n"
            );
            directory.tenant(t, &text).unwrap();
        }
        let gateway = Gateway::builder().config_file(directory.path()).start().await.unwrap();
        Self { odoo, gateway, directory }
    }

    fn address(&self) -> SocketAddr {
        self.gateway.http_addresses()[0]
    }

    async fn client(&self) -> HttpClient {
        HttpClient::connect(self.address()).await.unwrap()
    }

    /// Sends raw bytes and reads everything until the gateway closes.
    async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut out = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut out)).await;
        String::from_utf8_lossy(&out).into_owned()
    }

    fn running(&self) -> u32 {
        self.gateway.http_plane().unwrap().gates().get("odoo").unwrap().usage().running
    }

    fn waiting(&self) -> u32 {
        self.gateway.http_plane().unwrap().gates().get("odoo").unwrap().usage().waiting
    }
}

const ACME: &str = "acme.example.com";

#[tokio::test]
async fn a_browser_keeps_one_connection_and_the_server_sees_the_forwarded_headers() {
    let site = HttpSite::start().await;
    let mut client = site.client().await;
    for n in 0..5 {
        let path = format!("/testkit/echo?n={n}");
        let headers = [("Accept", "text/html"), ("Cookie", "session_id=1"), ("X-Forwarded-For", "6.6.6.6")];
        let response = client.request("GET", ACME, &path, &headers, &[]).await.unwrap();
        assert_eq!(response.status, 200);
        assert!(response.reusable, "the connection was closed: {response:?}");
        let text = response.text();
        for line in [
            "database: acme_db",
            "header host: acme.example.com",
            "header x-forwarded-host: acme.example.com",
            "header x-forwarded-proto: http",
            "header x-forwarded-for: 127.0.0.1",
            "header x-real-ip: 127.0.0.1",
            "header connection: close",
            "header cookie: session_id=1",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} is missing in\n{text}");
        }
        assert!(!text.contains("6.6.6.6"), "{text}");
    }
}

#[tokio::test]
async fn curl_gets_pages_posts_forms_and_follows_the_framing() {
    let site = HttpSite::start().await;
    let url = format!("http://{}/testkit/echo", site.address());
    let curl = async |args: &[&str]| {
        let output =
            tokio::process::Command::new("curl").args(["-sS", "--max-time", "20"]).args(args).output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let host = ["-H", "Host: acme.example.com"];
    assert!(curl(&[host[0], host[1], &url]).await.contains("database: acme_db"));
    assert!(curl(&[host[0], host[1], "-d", "a=1&b=2", &url]).await.contains("body: 7 bytes"));
    // Without a length: the gateway reads the chunks and tells Odoo the length.
    let chunked = curl(&[host[0], host[1], "-H", "Transfer-Encoding: chunked", "-d", "hello", &url]).await;
    assert!(chunked.contains("body: 5 bytes") && chunked.contains("header content-length: 5"), "{chunked}");
    assert!(!chunked.contains("transfer-encoding"), "{chunked}");
    assert!(curl(&[host[0], host[1], "-H", "Expect: 100-continue", "-d", "x", &url]).await.contains("body: 1 bytes"));
    assert!(curl(&[host[0], host[1], "--http1.0", &url]).await.contains("database: acme_db"));
    let head = curl(&[host[0], host[1], "-I", &url]).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    // An answer that ends with its connection arrives whole, in chunks.
    let streamed = curl(&[host[0], host[1], "-i", &format!("{url}?streamed=1")]).await;
    assert!(streamed.to_ascii_lowercase().contains("transfer-encoding: chunked"), "{streamed}");
    assert!(streamed.contains("database: acme_db"));
}

#[tokio::test]
async fn an_unknown_host_is_421_and_a_missing_one_400_and_no_server_hears_of_them() {
    let site = HttpSite::start().await;
    let mut client = site.client().await;
    for host in ["nobody.example.com", "acme.example.com.evil.com", "example.com", "127.0.0.1"] {
        let response = client.get(host, "/").await.unwrap();
        assert_eq!(response.status, 421, "{host}");
        assert!(response.text().contains("request_id"), "{}", response.text());
    }
    for raw in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: \r\n\r\n",
        "GET / HTTP/1.1\r\nHost: acme.example.com\r\nHost: bolt.example.com\r\n\r\n",
        "GET / HTTP/1.1\nHost: acme.example.com\n\n",
        "POST / HTTP/1.1\r\nHost: acme.example.com\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: acme.example.com\r\nContent-Length: +3\r\n\r\nabc",
        "GET http://bolt.example.com/ HTTP/1.1\r\nHost: acme.example.com\r\n\r\n",
        "\x16\x03\x01\x02\0\x01\0\x01\r\n\r\n",
    ] {
        let answer = site.raw(raw.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{raw:?}: {answer}");
    }
    let gzip = "POST / HTTP/1.1\r\nHost: acme.example.com\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n";
    assert!(site.raw(gzip.as_bytes()).await.starts_with("HTTP/1.1 501"));
    assert_eq!(site.odoo.requests(), 0);
    assert!(site.raw(b"CONNECT a:80 HTTP/1.1\r\nHost: acme.example.com\r\n\r\n").await.starts_with("HTTP/1.1 4"));
}

#[tokio::test]
async fn a_request_for_one_host_never_reaches_another_tenant_whatever_headers_are_sent() {
    let site = HttpSite::start().await;
    for headers in [
        vec![("X-Forwarded-Host", "bolt.example.com")],
        vec![("X-FORWARDED-HOST", "bolt.example.com"), ("x-forwarded-host", "bolt.example.com")],
        vec![("Forwarded", "host=bolt.example.com")],
        vec![("X-Odoo-Database", "bolt_db")],
        vec![("X-Openerp-Session-Id", "1")],
        vec![("X-Original-Host", "bolt.example.com"), ("X-Host", "bolt.example.com")],
        vec![("Connection", "close, X-Forwarded-Host"), ("X-Forwarded-Host", "bolt.example.com")],
        vec![("Connection", "X-Forwarded-For, X-Forwarded-Host, Host")],
    ] {
        let response = site.client().await.request("GET", ACME, "/testkit/echo", &headers, &[]).await.unwrap();
        let text = response.text();
        assert!(text.contains("database: acme_db\n"), "{headers:?}: {text}");
        assert!(text.contains("header x-forwarded-host: acme.example.com\n"), "{headers:?}: {text}");
        assert!(!text.contains("header x-odoo") && !text.contains("openerp"), "{headers:?}: {text}");
    }
    for host in ["ACME.Example.COM", "acme.example.com.", "acme.example.com:8069"] {
        let text = site.client().await.get(host, "/testkit/echo").await.unwrap().text();
        assert!(text.starts_with("method: GET"), "{host}: {text}");
    }
    let absolute =
        "GET http://acme.example.com/testkit/echo HTTP/1.1\r\nHost: acme.example.com\r\nConnection: close\r\n\r\n";
    let answer = site.raw(absolute.as_bytes()).await;
    assert!(answer.contains("path: /testkit/echo"), "{answer}");
}

#[tokio::test]
async fn internal_routes_are_closed_and_sendfile_headers_stay_inside() {
    let site = HttpSite::start().await;
    let mut client = site.client().await;
    for path in [
        "/web/database/manager",
        "/web/database/selector",
        "/longpolling/poll",
        "/queue_job/runjob",
        "/web//%64atabase/list",
        "//web/database/list",
    ] {
        assert_eq!(client.get(ACME, path).await.unwrap().status, 404, "{path}");
    }
    assert_eq!(site.odoo.requests(), 0);
    let response = client.get(ACME, "/testkit/sendfile").await.unwrap();
    assert_eq!(response.status, 502, "nobody sends the file");
    assert!(response.header("x-sendfile").is_none() && response.header("x-accel-redirect").is_none(), "{response:?}");
}

#[tokio::test]
async fn a_websocket_talks_to_the_gevent_port_and_holds_no_worker() {
    let site = HttpSite::start().await;
    let url = format!("ws://{}/websocket?version=1", site.address());
    let open = async |host: &str| {
        let request = http::Request::builder()
            .uri(&url)
            .header("Host", host)
            .header("Upgrade", "websocket")
            .header("Connection", "keep-alive, Upgrade")
            .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
            .header("Sec-WebSocket-Version", "13")
            .body(())
            .unwrap();
        let stream = TcpStream::connect(site.address()).await.unwrap();
        tokio_tungstenite::client_async(request, stream).await
    };
    let (mut socket, _) = open(ACME).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("hello acme.example.com"));
    for n in 0..20 {
        let text = format!("message {n} {}", "x".repeat(n * 1_000));
        socket.send(Message::text(text.clone())).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text(text));
    }
    assert_eq!(site.running(), 0);
    assert!(open("nobody.example.com").await.is_err());
    assert_eq!(site.client().await.get(ACME, "/websocket").await.unwrap().status, 426);
    // A drain tells the browser to come again instead of cutting it off.
    site.gateway.drain();
    let last = tokio::time::timeout(Duration::from_secs(5), socket.next()).await.unwrap();
    assert!(matches!(last, Some(Ok(Message::Close(Some(frame)))) if u16::from(frame.code) == 1001));
}

#[tokio::test]
async fn two_hundred_megabytes_pass_in_both_directions_in_flat_memory() {
    const SIZE: u64 = 200 << 20;
    let site = HttpSite::start_with(Options { plan: "    max_body: 1GiB", ..Options::default() }).await;
    let before = resident();
    let mut stream = TcpStream::connect(site.address()).await.unwrap();
    let head =
        format!("POST /testkit/echo HTTP/1.1\r\nHost: {ACME}\r\nContent-Length: {SIZE}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let part = vec![b'u'; 1 << 20];
    for _ in 0..SIZE >> 20 {
        stream.write_all(&part).await.unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains(&format!("body: {SIZE} bytes")), "{answer}");
    assert!(answer.contains(&format!("header content-length: {SIZE}")), "{answer}");

    let mut stream = TcpStream::connect(site.address()).await.unwrap();
    let head = format!("GET /web/content/{SIZE} HTTP/1.1\r\nHost: {ACME}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut received = 0u64;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = stream.read(&mut buffer).await.unwrap();
        if n == 0 {
            break;
        }
        received += n as u64;
    }
    assert!((SIZE..SIZE + 2_000).contains(&received), "{received}");
    let grown = resident().saturating_sub(before);
    assert!(grown < 60 << 20, "resident memory grew by {grown} bytes");
}

#[tokio::test]
async fn a_client_that_disappears_frees_its_slot_and_its_place_in_the_queue() {
    let site = HttpSite::start_with(Options { workers: 1, ..Options::default() }).await;
    let ask = format!("GET /web?ms=2500 HTTP/1.1\r\nHost: {ACME}\r\n\r\n");
    let mut holder = TcpStream::connect(site.address()).await.unwrap();
    holder.write_all(ask.as_bytes()).await.unwrap();
    eventually(|| async { site.running() == 1 }).await;
    let mut waiter = TcpStream::connect(site.address()).await.unwrap();
    waiter.write_all(ask.as_bytes()).await.unwrap();
    eventually(|| async { site.waiting() == 1 }).await;
    drop(waiter);
    eventually(|| async { site.waiting() == 0 }).await;
    assert_eq!(site.running(), 1);
    drop(holder);
    // Odoo's worker does not know that its client has left: the slot is free when the worker is, and not before.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((site.running(), site.odoo.busy()), (1, 1));
    eventually(|| async { site.odoo.busy() == 0 }).await;
    eventually(|| async { site.running() == 0 }).await;
    // Half a body is no request: it never asks for a slot.
    let mut half = TcpStream::connect(site.address()).await.unwrap();
    half.write_all(format!("POST /web HTTP/1.1\r\nHost: {ACME}\r\nContent-Length: 10\r\n\r\nhalf").as_bytes())
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((site.running(), site.waiting()), (0, 0));
}

fn retry_after(response: &Response) -> u64 {
    response.header("retry-after").expect("no Retry-After").parse().unwrap()
}

#[tokio::test]
async fn over_its_own_quota_a_tenant_gets_429_and_others_are_served() {
    let plan = "    http: { limit: 1, queue: 1, max_wait: 300ms }";
    let site = HttpSite::start_with(Options { workers: 3, plan, ..Options::default() }).await;
    let address = site.address();
    let holder =
        tokio::spawn(async move { HttpClient::connect(address).await.unwrap().get(ACME, "/web?ms=1500").await });
    eventually(|| async { site.running() == 1 }).await;
    let waits = site.client().await.get(ACME, "/web").await.unwrap();
    assert_eq!(waits.status, 429);
    assert!(retry_after(&waits) >= 1);
    let text = waits.text();
    assert!(text.contains("tenant acme") && text.contains("limit of 1") && text.contains("0.3 s"), "{text}");
    let queued = tokio::spawn(async move { HttpClient::connect(address).await.unwrap().get(ACME, "/web").await });
    eventually(|| async { site.waiting() == 1 }).await;
    let full = site.client().await.request("GET", ACME, "/web", &[("Accept", "text/html")], &[]).await.unwrap();
    assert_eq!(full.status, 429);
    assert!(
        full.text().contains("<h1>Too many requests</h1>") && full.text().contains("queue is full"),
        "{}",
        full.text()
    );
    assert_eq!(site.client().await.get("bolt.example.com", "/web").await.unwrap().status, 200);
    let _ = queued.await;
    assert_eq!(holder.await.unwrap().unwrap().status, 200);
}

#[tokio::test]
async fn when_the_pool_is_full_of_others_a_tenant_gets_503() {
    let plan = "    http: { max_wait: 300ms }";
    let site = HttpSite::start_with(Options { workers: 1, plan, ..Options::default() }).await;
    let address = site.address();
    let holder =
        tokio::spawn(async move { HttpClient::connect(address).await.unwrap().get(ACME, "/web?ms=1500").await });
    eventually(|| async { site.running() == 1 }).await;
    let busy = site.client().await.get("bolt.example.com", "/web").await.unwrap();
    assert_eq!(busy.status, 503);
    assert!(retry_after(&busy) >= 1);
    assert!(busy.text().contains("all 1 slots were busy"), "{}", busy.text());
    assert!(!busy.text().contains("acme"), "another tenant is named: {}", busy.text());
    assert_eq!(holder.await.unwrap().unwrap().status, 200);
}

#[tokio::test]
async fn servers_that_fail_give_502_and_504_and_slots_come_back() {
    let pool = "    response_timeout: 1s";
    let site =
        HttpSite::start_with(Options { pool, limit_time_real: Duration::from_millis(300), ..Options::default() }).await;
    let killed = site.client().await.get(ACME, "/web?ms=5000").await.unwrap();
    assert_eq!(killed.status, 502, "{}", killed.text());
    let site = HttpSite::start_with(Options { pool, ..Options::default() }).await;
    let silent = site.client().await.get(ACME, "/testkit/silent").await.unwrap();
    assert_eq!(silent.status, 504, "{}", silent.text());
    eventually(|| async { site.running() == 0 }).await;
    let HttpSite { odoo, gateway, directory: _directory } = site;
    drop(odoo);
    let gone = HttpClient::connect(gateway.http_addresses()[0]).await.unwrap().get(ACME, "/web").await.unwrap();
    assert_eq!(gone.status, 502, "{}", gone.text());
    assert!(!gone.text().contains("127.0.0.1"), "an address leaked: {}", gone.text());
}

#[tokio::test]
async fn bodies_headers_and_slow_clients_are_bounded() {
    let site = HttpSite::start_with(Options {
        plan: "    max_body: 1KiB",
        http: "  header_timeout: 300ms\n  body_timeout: 300ms\n  keepalive_timeout: 300ms",
        ..Options::default()
    })
    .await;
    let body = vec![b'x'; 2_000];
    let response = site.client().await.request("POST", ACME, "/web", &[], &body).await.unwrap();
    assert_eq!(response.status, 413);
    assert!(response.text().contains("1024 bytes"), "{}", response.text());
    let chunked = format!(
        "POST /web HTTP/1.1\r\nHost: {ACME}\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n{}\r\n0\r\n\r\n",
        "x".repeat(2000)
    );
    assert!(site.raw(chunked.as_bytes()).await.starts_with("HTTP/1.1 413"));
    let broken = format!("POST /web HTTP/1.1\r\nHost: {ACME}\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n");
    assert!(site.raw(broken.as_bytes()).await.starts_with("HTTP/1.1 400"));
    let huge = format!("GET /web HTTP/1.1\r\nHost: {ACME}\r\nX-Huge: {}\r\n\r\n", "h".repeat(70_000));
    assert!(site.raw(huge.as_bytes()).await.starts_with("HTTP/1.1 431"));
    // One byte now and then does not keep a header open; a body that stops is 408; an idle connection is closed.
    let mut slow = TcpStream::connect(site.address()).await.unwrap();
    for b in b"GET / HTTP/1.1\r\nHost: acme.exa" {
        if slow.write_all(&[*b]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let mut rest = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(5), slow.read_to_end(&mut rest)).await;
    assert!(closed.is_ok(), "the slow header was not cut off");
    let stalled = format!("POST /web HTTP/1.1\r\nHost: {ACME}\r\nContent-Length: 10\r\n\r\nhalf");
    assert!(site.raw(stalled.as_bytes()).await.starts_with("HTTP/1.1 408"));
    // A byte now and then does not keep a body open either.
    let mut drip = TcpStream::connect(site.address()).await.unwrap();
    drip.write_all(format!("POST /web HTTP/1.1\r\nHost: {ACME}\r\nContent-Length: 900\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut answer = [0; 12];
    let dripping = async {
        loop {
            tokio::select! {
                read = drip.read_exact(&mut answer) => return read.map(|_| ()),
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
            let _ = drip.write_all(b"x").await;
        }
    };
    tokio::time::timeout(Duration::from_secs(8), dripping).await.unwrap().unwrap();
    assert_eq!(&answer, b"HTTP/1.1 408");
    assert!(site.raw(b"").await.is_empty());
}

/// A client that reads nothing must not keep a worker's slot, whatever kind of answer it does not read.
#[tokio::test]
async fn a_client_that_reads_nothing_frees_its_slot() {
    let site = HttpSite::start_with(Options { http: "  write_timeout: 500ms", ..Options::default() }).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(2_048).unwrap();
    let mut deaf = socket.connect(site.address()).await.unwrap();
    let ask = format!("HEAD /testkit/echo HTTP/1.1\r\nHost: {ACME}\r\n\r\n").repeat(100);
    // Until neither side takes any more.
    while let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(2), deaf.write_all(ask.as_bytes())).await {}
    eventually(|| async { site.running() == 0 && site.waiting() == 0 }).await;
    assert_eq!(site.client().await.get(ACME, "/web").await.unwrap().status, 200);
}

#[tokio::test]
async fn an_open_connection_is_served_by_the_catalog_of_its_next_request() {
    let site = HttpSite::start().await;
    let (mut used, mut fresh) = (site.client().await, site.client().await);
    assert_eq!(used.get(ACME, "/testkit/echo").await.unwrap().status, 200);
    let text =
        "tenant: acme\nhosts: [other.example.com]\ndatabase: acme_db\nplacement: { pool: odoo }\nplan: standard\n";
    site.directory.tenant("acme", text).unwrap();
    site.gateway.reload().await.unwrap();
    for client in [&mut used, &mut fresh] {
        assert_eq!(client.get(ACME, "/testkit/echo").await.unwrap().status, 421);
    }
}

#[tokio::test]
async fn a_refusal_follows_100_continue() {
    let plan = "    http: { limit: 1, queue: 0 }";
    let site = HttpSite::start_with(Options { plan, ..Options::default() }).await;
    let address = site.address();
    let holder =
        tokio::spawn(async move { HttpClient::connect(address).await.unwrap().get(ACME, "/web?ms=800").await });
    eventually(|| async { site.running() == 1 }).await;
    let expect = [("Expect", "100-continue")];
    let refused = site.client().await.request("POST", ACME, "/web", &expect, b"x").await.unwrap();
    assert_eq!(refused.status, 429);
    let _ = holder.await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let site = HttpSite::start().await;
    let mut client = site.client().await;
    let mut bytes = Vec::new();
    for n in 0..4 {
        bytes.extend(format!("GET /testkit/echo?n={n} HTTP/1.1\r\nHost: {ACME}\r\n\r\n").into_bytes());
    }
    client.send(&bytes).await.unwrap();
    for _ in 0..4 {
        let response = client.response(false).await.unwrap();
        assert!(response.text().contains("database: acme_db"), "{response:?}");
    }
}

#[tokio::test]
async fn requests_in_flight_never_exceed_the_workers() {
    let site = HttpSite::start_with(Options { workers: 3, ..Options::default() }).await;
    let address = site.address();
    let tasks: Vec<_> = (0..30)
        .map(|n| {
            let host = if n % 2 == 0 { ACME } else { "bolt.example.com" };
            tokio::spawn(async move { HttpClient::connect(address).await.unwrap().get(host, "/web?ms=20").await })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.unwrap().unwrap().status, 200);
    }
    assert!(site.odoo.most_busy() <= 3);
    assert_eq!(site.running(), 0);
}

fn resident() -> u64 {
    let pages: u64 = std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
