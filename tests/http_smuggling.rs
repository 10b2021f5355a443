//! Requests that two parsers could read differently, over raw sockets, with an origin that takes nothing but the strict form
//! and writes down what it saw. Either the gateway refuses, and the origin hears nothing; or the origin gets what the client
//! meant, and not one request more.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::Duration;

use cofferdam::Gateway;
use cofferdam_testkit::TenantDirectory;
use cofferdam_tests::strict::{Seen, origin};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What must become of a case.
enum Expected {
    /// The first answer has one of these statuses, or there is none for want of a readable request, and the connection is
    /// closed; the origin hears nothing.
    Refused(&'static [u16]),
    /// The origin gets these requests, in this order, and the client as many answers with 200.
    Served(&'static [&'static str]),
    /// The same, and what follows on the connection is refused.
    ServedThenRefused(&'static [&'static str]),
}

use Expected::{Refused, Served, ServedThenRefused};

/// A request that would be smuggled in.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: acme.example.com\r\n\r\n";

/// A usual request line and host; what a case adds follows.
fn get(more: &str) -> String {
    format!("GET /a HTTP/1.1\r\nHost: acme.example.com\r\n{more}\r\n")
}

fn post(more: &str, body: &str) -> String {
    format!("POST /a HTTP/1.1\r\nHost: acme.example.com\r\n{more}\r\n{body}")
}

fn chunked(body: &str) -> String {
    post("Transfer-Encoding: chunked\r\n", body)
}

#[rustfmt::skip]
fn cases() -> Vec<(&'static str, Vec<u8>, Expected)> {
    let bad: &[u16] = &[400];
    let a: &[&str] = &["GET /a"];
    let text: Vec<(&'static str, String, Expected)> = vec![
        // The line ends of RFC 9112, 2.2.
        ("a bare line feed after the request line", "GET /a HTTP/1.1\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("bare line feeds throughout", "GET /a HTTP/1.1\nHost: acme.example.com\n\n".into(), Refused(bad)),
        ("a bare line feed between fields", get("A: b\nC: d\r\n"), Refused(bad)),
        ("a bare line feed at the end", format!("{}\n", get("").trim_end_matches("\r\n")), Refused(bad)),
        ("a carriage return inside a value", get("A: b\rC: d\r\n"), Refused(bad)),
        ("a carriage return before the line end", get("A: b\r\r\n"), Refused(bad)),
        ("a NUL in a value", get("A: b\0c\r\n"), Refused(bad)),
        ("a NUL in a name", get("A\0: b\r\n"), Refused(bad)),
        ("a vertical tab in a value", get("A: b\x0bc\r\n"), Refused(bad)),
        ("an empty line before the request", format!("\r\n{}", get("")), Served(a)),
        ("folding", get("A: b\r\n c\r\n"), Refused(bad)),
        ("folding with a tab", get("A: b\r\n\tc\r\n"), Refused(bad)),
        ("folding of the first field", "GET /a HTTP/1.1\r\n Host: acme.example.com\r\n\r\n".into(), Refused(bad)),
        // Fields, 5.1.
        ("space before the colon", get("A : b\r\n"), Refused(bad)),
        ("a tab before the colon", get("A\t: b\r\n"), Refused(bad)),
        ("a field without a colon", get("A\r\n"), Refused(bad)),
        ("a field without a name", get(": b\r\n"), Refused(bad)),
        ("a name with a space", get("A B: c\r\n"), Refused(bad)),
        ("a name with a bracket", get("A(b): c\r\n"), Refused(bad)),
        ("a name that is not ASCII", get("\u{c4}: c\r\n"), Refused(bad)),
        ("an empty value", get("A:\r\n"), Served(a)),
        ("a value with spaces around it", get("A:   b  \r\n"), Served(a)),
        ("a value that is not ASCII", get("A: \u{c4}\r\n"), Served(a)),
        // The request line, 3.
        ("no version", "GET /a\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("HTTP/0.9", "GET /a\r\n\r\n".into(), Refused(bad)),
        ("HTTP/1.2", "GET /a HTTP/1.2\r\nHost: acme.example.com\r\n\r\n".into(), Refused(&[400, 505])),
        ("HTTP/2.0 as text", "GET /a HTTP/2.0\r\nHost: acme.example.com\r\n\r\n".into(), Refused(&[400, 505])),
        ("HTTP/1.10", "GET /a HTTP/1.10\r\nHost: acme.example.com\r\n\r\n".into(), Refused(&[400, 505])),
        ("http/1.1", "GET /a http/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), Refused(&[400, 505])),
        ("two spaces before the target", "GET  /a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("two spaces behind the target", "GET /a  HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("a space in the target", "GET /a b HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("tabs for spaces", "GET\t/a\tHTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("space before the method", " GET /a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("a method with a bracket", "GE(T /a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("no method", " /a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("a method of its own", "BREW /a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Served(&["BREW /a"])),
        ("a method in small letters", "get /a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Served(&["get /a"])),
        ("CONNECT", "CONNECT acme.example.com:443 HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(&[400, 405])),
        ("TRACE", "TRACE /a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(&[405])),
        ("the asterisk", "OPTIONS * HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("a target without a slash", "GET a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("an empty target", "GET  HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("a fragment", "GET /a#b HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("a NUL in the target", "GET /a\0b HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("a carriage return in the target", "GET /a\rb HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("a DEL in the target", "GET /a\x7fb HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("a target that is not ASCII", "GET /\u{c4} HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Served(&["GET /%C3%84"])),
        ("the absolute form", "GET http://acme.example.com/a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Served(a)),
        ("the absolute form of another host", "GET http://bolt.example.com/a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("the absolute form with a user", "GET http://acme.example.com@bolt.example.com/a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("the absolute form without a path", "GET http://acme.example.com HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Served(&["GET /"])),
        ("the absolute form of another scheme", "GET ftp://acme.example.com/a HTTP/1.1\r\nHost: acme.example.com\r\n\r\n".into(), Refused(bad)),
        ("a target of 100,000 bytes", format!("GET /{} HTTP/1.1\r\nHost: acme.example.com\r\n\r\n", "a".repeat(100_000)), Refused(&[400, 414, 431])),
        ("a target of 20,000 bytes", format!("GET /{} HTTP/1.1\r\nHost: acme.example.com\r\n\r\n", "a".repeat(20_000)), Refused(&[414])),
        // Host, 3.2.
        ("no host", "GET /a HTTP/1.1\r\nA: b\r\n\r\n".into(), Refused(bad)),
        ("an empty host", "GET /a HTTP/1.1\r\nHost:\r\n\r\n".into(), Refused(bad)),
        ("two hosts", get("Host: bolt.example.com\r\n"), Refused(bad)),
        ("the same host twice", get("Host: acme.example.com\r\n"), Refused(bad)),
        ("a host with a comma", "GET /a HTTP/1.1\r\nHost: acme.example.com, bolt.example.com\r\n\r\n".into(), Refused(&[400, 421])),
        ("a host with a user", "GET /a HTTP/1.1\r\nHost: x@acme.example.com\r\n\r\n".into(), Refused(&[400, 421])),
        ("a host with a path", "GET /a HTTP/1.1\r\nHost: acme.example.com/b\r\n\r\n".into(), Refused(&[400, 421])),
        ("a host with a space", "GET /a HTTP/1.1\r\nHost: acme.example.com bolt\r\n\r\n".into(), Refused(&[400, 421])),
        ("a host with a word for a port", "GET /a HTTP/1.1\r\nHost: acme.example.com:http\r\n\r\n".into(), Refused(bad)),
        ("a host with two ports", "GET /a HTTP/1.1\r\nHost: acme.example.com:80:80\r\n\r\n".into(), Refused(bad)),
        ("a host that nobody has", "GET /a HTTP/1.1\r\nHost: nobody.example.com\r\nConnection: close\r\n\r\n".into(), Refused(&[421])),
        ("an address for a host", "GET /a HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".into(), Refused(&[421])),
        ("a host in capitals with a dot and a port", "GET /a HTTP/1.1\r\nHost: ACME.example.COM.:8069\r\n\r\n".into(), Served(a)),
        ("HTTP/1.0 without a host", "GET /a HTTP/1.0\r\n\r\n".into(), Refused(bad)),
        ("HTTP/1.0 with a host", "GET /a HTTP/1.0\r\nHost: acme.example.com\r\n\r\n".into(), Served(a)),
        // Content-Length, 6.2 and 6.3.
        ("a length", post("Content-Length: 3\r\n", "abc"), Served(&["POST /a abc"])),
        ("a length of nothing", post("Content-Length: 0\r\n", ""), Served(&["POST /a"])),
        ("a length with a sign", post("Content-Length: +3\r\n", "abc"), Refused(bad)),
        ("a negative length", post("Content-Length: -3\r\n", "abc"), Refused(bad)),
        ("a length in hexadecimal", post("Content-Length: 0x3\r\n", "abc"), Refused(bad)),
        ("a length with a letter", post("Content-Length: 3a\r\n", "abc"), Refused(bad)),
        ("a length with a space inside", post("Content-Length: 3 3\r\n", "abc"), Refused(bad)),
        ("an empty length", post("Content-Length:\r\n", ""), Refused(bad)),
        ("a length with a fraction", post("Content-Length: 3.0\r\n", "abc"), Refused(bad)),
        ("a length that overflows", post("Content-Length: 99999999999999999999999\r\n", "abc"), Refused(&[400, 413])),
        ("a length of 2^64 + 3", post("Content-Length: 18446744073709551619\r\n", "abc"), Refused(&[400, 413])),
        ("two lengths", post("Content-Length: 3\r\nContent-Length: 4\r\n", "abcd"), Refused(bad)),
        ("the same length twice", post("Content-Length: 3\r\nContent-Length: 3\r\n", "abc"), Refused(bad)),
        ("a list of lengths", post("Content-Length: 3, 4\r\n", "abcd"), Refused(bad)),
        ("a list of equal lengths", post("Content-Length: 3, 3\r\n", "abc"), Served(&["POST /a abc"])),
        ("a length beyond the plan", post("Content-Length: 2000000000\r\n", "abc"), Refused(&[413])),
        ("a length by another name", post("Content_Length: 3\r\n", ""), Served(&["POST /a"])),
        ("a body that is a request", post(&format!("Content-Length: {}\r\n", SMUGGLED.len()), SMUGGLED), Served(&["POST /a GET /smuggled HTTP/1.1\r\nHost: acme.example.com"])),
        ("a body of GET that is a request", get(&format!("Content-Length: {}\r\n", SMUGGLED.len())) + SMUGGLED, Served(&["GET /a GET /smuggled HTTP/1.1\r\nHost: acme.example.com"])),
        ("less length than body", post("Content-Length: 1\r\n", "abc"), ServedThenRefused(&["POST /a a"])),
        ("no length at all", post("", "abc\r\n\r\n"), ServedThenRefused(&["POST /a"])),
        // Transfer-Encoding, 6.1 and 6.3.
        ("chunks", chunked("3\r\nabc\r\n0\r\n\r\n"), Served(&["POST /a abc"])),
        ("chunks in capitals", post("Transfer-Encoding: CHUNKED\r\n", "3\r\nabc\r\n0\r\n\r\n"), Served(&["POST /a abc"])),
        ("a length and chunks", post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"), Refused(bad)),
        ("chunks and a length", post("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", "0\r\n\r\n"), Refused(bad)),
        ("chunks and a length with a request behind", post("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", &format!("0\r\n\r\n{SMUGGLED}")), Refused(bad)),
        ("chunked twice in a list", post("Transfer-Encoding: chunked, chunked\r\n", "0\r\n\r\n"), Refused(&[400, 501])),
        ("chunked twice in two fields", post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"), Refused(bad)),
        ("chunked and identity", post("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", "0\r\n\r\n"), Refused(bad)),
        ("identity", post("Transfer-Encoding: identity\r\nContent-Length: 3\r\n", "abc"), Refused(bad)),
        ("gzip, chunked", post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"), Refused(&[400, 501])),
        ("chunked, gzip", post("Transfer-Encoding: chunked, gzip\r\n", "0\r\n\r\n"), Refused(&[400, 501])),
        ("xchunked", post("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"), Refused(&[400, 501])),
        ("chunked with a parameter", post("Transfer-Encoding: chunked;q=1\r\n", "0\r\n\r\n"), Refused(&[400, 501])),
        ("chunked in quotes", post("Transfer-Encoding: \"chunked\"\r\n", "0\r\n\r\n"), Refused(&[400, 501])),
        ("chunked after a vertical tab", post("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n"), Refused(&[400, 501])),
        ("chunked before a comma", post("Transfer-Encoding: chunked,\r\n", "0\r\n\r\n"), Refused(&[400, 501])),
        ("chunked with a space before the colon", post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"), Refused(bad)),
        ("chunked folded", post("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n"), Refused(bad)),
        ("chunked by another name", post("Transfer_Encoding: chunked\r\nContent-Length: 5\r\n", "0\r\n\r\n"), Served(&["POST /a 0"])),
        ("chunked in HTTP/1.0", "POST /a HTTP/1.0\r\nHost: acme.example.com\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(), Refused(bad)),
        ("an empty coding", post("Transfer-Encoding:\r\n", "0\r\n\r\n"), Refused(&[400, 501])),
        ("chunked that Connection names", post("Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"), Served(&["POST /a abc"])),
        ("a length that Connection names", post("Connection: Content-Length\r\nContent-Length: 3\r\n", "abc"), Served(&["POST /a abc"])),
        // Chunks, 7.1.
        ("a chunk size in hexadecimal", chunked("0A\r\n0123456789\r\n0\r\n\r\n"), Served(&["POST /a 0123456789"])),
        ("a chunk size with a prefix", chunked("0x3\r\nabc\r\n0\r\n\r\n"), Refused(bad)),
        ("a chunk size with a sign", chunked("+3\r\nabc\r\n0\r\n\r\n"), Refused(bad)),
        ("a negative chunk size", chunked("-3\r\nabc\r\n0\r\n\r\n"), Refused(bad)),
        ("a chunk size that is no number", chunked("G\r\nabc\r\n0\r\n\r\n"), Refused(bad)),
        ("an empty chunk size", chunked("\r\nabc\r\n0\r\n\r\n"), Refused(bad)),
        ("a chunk size that overflows", chunked("FFFFFFFFFFFFFFFFF\r\nabc\r\n0\r\n\r\n"), Refused(&[400, 413])),
        ("a chunk size of 2^64 + 3", chunked("10000000000000003\r\nabc\r\n0\r\n\r\n"), Refused(&[400, 413])),
        ("a space before the chunk size", chunked(" 3\r\nabc\r\n0\r\n\r\n"), Refused(bad)),
        ("a bare line feed after the chunk size", chunked("3\nabc\r\n0\r\n\r\n"), Refused(bad)),
        ("a bare line feed after the chunk", chunked("3\r\nabc\n0\r\n\r\n"), Refused(bad)),
        ("more data than the chunk size", chunked("3\r\nabcd\r\n0\r\n\r\n"), Refused(bad)),
        ("less data than the chunk size", chunked("5\r\nabc\r\n0\r\n\r\n"), Refused(bad)),
        ("no line end after the chunk", chunked("3\r\nabc0\r\n\r\n"), Refused(bad)),
        ("a chunk extension", chunked("3;a=b\r\nabc\r\n0\r\n\r\n"), Served(&["POST /a abc"])),
        ("a bare line feed in a chunk extension", chunked("3;a=b\nGET\r\nabc\r\n0\r\n\r\n"), Refused(bad)),
        ("a carriage return in a chunk extension", chunked("3;a\rb\r\nabc\r\n0\r\n\r\n"), Refused(bad)),
        ("a trailer", chunked("3\r\nabc\r\n0\r\nX-Forwarded-Host: bolt.example.com\r\n\r\n"), Served(&["POST /a abc"])),
        ("a trailer with a length", chunked("3\r\nabc\r\n0\r\nContent-Length: 100\r\n\r\n"), Served(&["POST /a abc"])),
        ("a request behind the last chunk", format!("{}{SMUGGLED}", chunked("3\r\nabc\r\n0\r\n\r\n")), Served(&["POST /a abc", "GET /smuggled"])),
        // One request after the other.
        ("two requests at once", get("") + &get(""), Served(&["GET /a", "GET /a"])),
        ("a request behind one that closes", get("Connection: close\r\n") + SMUGGLED, Served(a)),
        ("a request behind a refused one", format!("GET /a HTTP/1.1\r\nHost: acme.example.com\r\nA : b\r\n\r\n{SMUGGLED}"), Refused(bad)),
        ("a request behind one that is too large", post("Content-Length: 2000000000\r\n", SMUGGLED), Refused(&[413])),
        // Upgrades and expectations.
        ("an upgrade to h2c", get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"), Served(a)),
        ("an upgrade of a page", get("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"), Served(a)),
        ("an upgrade with a request behind", get("Connection: Upgrade\r\nUpgrade: websocket\r\n") + SMUGGLED, Served(&["GET /a", "GET /smuggled"])),
        ("a plain request where WebSockets are", "GET /websocket HTTP/1.1\r\nHost: acme.example.com\r\nConnection: close\r\n\r\n".into(), Refused(&[426])),
        ("an expectation that nobody meets", post("Expect: 200-ok\r\nContent-Length: 3\r\n", "abc"), Served(&["POST /a abc"])),
        // Sizes.
        ("300 fields", get(&"A: b\r\n".repeat(300)), Refused(&[400, 431])),
        ("a field of 100,000 bytes", get(&format!("A: {}\r\n", "a".repeat(100_000))), Refused(&[400, 431])),
    ];
    let mut all: Vec<_> = text.into_iter().map(|(name, text, expected)| (name, text.into_bytes(), expected)).collect();
    all.push(("TLS to a plain port", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03".to_vec(), Refused(bad)));
    all.push(("bytes that are no text", vec![0xff; 600], Refused(bad)));
    all.push(("a host that is not UTF-8", b"GET /a HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n".to_vec(), Refused(bad)));
    all
}

fn statuses(answer: &str) -> Vec<u16> {
    let mut rest = answer;
    let mut out = Vec::new();
    while let Some(at) = rest.find("HTTP/1.1 ") {
        let status = rest[at + 9..].get(..3).and_then(|s| s.parse().ok()).unwrap_or(0);
        if status != 100 {
            out.push(status);
        }
        rest = &rest[at + 9..];
    }
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_two_parsers_could_read_differently_is_refused_or_made_plain() {
    let (origin, log) = origin().await;
    let main = format!(
        "http:\n  listen: ['127.0.0.1:0']\n  keepalive_timeout: 300ms\n  header_timeout: 1s\n  body_timeout: 1s\npools:\n  odoo:\n    \
         servers: [{{ address: '{origin}', gevent: '{origin}' }}]\n    slots: 16\nplans:\n  standard: {{}}\n"
    );
    let directory = TenantDirectory::new(&main).unwrap();
    let tenant =
        "tenant: acme\nhosts: [acme.example.com]\ndatabase: acme_db\nplacement: { pool: odoo }\nplan: standard\n";
    directory.tenant("acme", tenant).unwrap();
    let gateway = Gateway::builder().config_file(directory.path()).start().await.unwrap();
    let cases = cases();
    assert!(cases.len() >= 100, "{} cases", cases.len());
    let mut faults = Vec::new();
    for (name, bytes, expected) in cases {
        *log.lock().unwrap() = Seen::default();
        let mut stream = TcpStream::connect(gateway.http_addresses()[0]).await.unwrap();
        // The gateway may refuse before everything is written.
        let _ = stream.write_all(&bytes).await;
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let seen = log.lock().unwrap().clone();
        let statuses = statuses(&answer);
        let right = match expected {
            Refused(allowed) => {
                seen.requests.is_empty() && statuses.len() <= 1 && statuses.iter().all(|s| allowed.contains(s))
            }
            Served(requests) => seen.requests == requests && statuses == vec![200; requests.len()],
            ServedThenRefused(requests) => {
                let (first, rest) = statuses.split_at(requests.len().min(statuses.len()));
                seen.requests == requests && first == vec![200; requests.len()] && rest.iter().all(|s| *s == 400)
            }
        };
        if read.is_err() || !right || !seen.violations.is_empty() {
            faults.push(format!("{name}: closed {}, {statuses:?}, {seen:?}", read.is_ok()));
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}
