//! HTTP/2 requests that are malformed, or could be read differently once they are HTTP/1, written frame by frame; with an origin
//! that takes nothing but the strict form. Either the gateway refuses, and the origin hears nothing; or the origin gets what the
//! client meant, and not one request more.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::sync::Arc;
use std::time::Duration;

use cofferdam::Gateway;
use cofferdam_testkit::TenantDirectory;
use cofferdam_tests::strict::{Seen, origin};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

const SMUGGLED: &[u8] = b"GET /smuggled HTTP/1.1\r\nHost: acme.example.com\r\n\r\n";

type Field<'a> = (&'a str, &'a str);

const METHOD: Field<'_> = (":method", "GET");
const SCHEME: Field<'_> = (":scheme", "https");
const AUTHORITY: Field<'_> = (":authority", "acme.example.com");
const PATH: Field<'_> = (":path", "/a");

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// An HPACK integer with so many bits in its first byte.
fn integer(value: usize, bits: u8, first: u8) -> Vec<u8> {
    let most = (1usize << bits) - 1;
    if value < most {
        return vec![first | value as u8];
    }
    let (mut out, mut rest) = (vec![first | most as u8], value - most);
    while rest >= 128 {
        out.push((rest % 128 + 128) as u8);
        rest /= 128;
    }
    out.push(rest as u8);
    out
}

/// Fields as HPACK literals; every char is a byte.
fn block(fields: &[Field<'_>]) -> Vec<u8> {
    let text = |s: &str| {
        let bytes: Vec<u8> = s.chars().map(|c| c as u8).collect();
        [integer(bytes.len(), 7, 0), bytes].concat()
    };
    fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

fn raw(fields: &[Field<'_>]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(fields))
}

/// A GET with more fields.
fn get(more: &[Field<'_>]) -> Vec<u8> {
    raw(&[&[METHOD, SCHEME, AUTHORITY, PATH], more].concat())
}

/// A GET in which one pseudo header is another.
fn with(other: Field<'_>) -> Vec<u8> {
    raw(&[METHOD, SCHEME, AUTHORITY, PATH].map(|field| if field.0 == other.0 { other } else { field }))
}

fn open_post(more: &[Field<'_>]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, 1, &block(&[&[(":method", "POST"), SCHEME, AUTHORITY, PATH], more].concat()))
}

fn post(more: &[Field<'_>], body: &[u8]) -> Vec<u8> {
    [open_post(more), frame(DATA, END_STREAM, 1, body)].concat()
}

fn trailed(more: &[Field<'_>], trailers: &[Field<'_>]) -> Vec<u8> {
    let end = frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(trailers));
    [open_post(more), frame(DATA, 0, 1, b"abcd"), end].concat()
}

/// A request whose head comes in many frames.
fn long(fields: &[Field<'_>]) -> Vec<u8> {
    let all = block(&[&[METHOD, SCHEME, AUTHORITY, PATH], fields].concat());
    let parts: Vec<&[u8]> = all.chunks(16_000).collect();
    let last = parts.len() - 1;
    let of = |(n, part): (usize, &&[u8])| {
        let kind = if n == 0 { HEADERS } else { CONTINUATION };
        let end = if n == last { END_HEADERS } else { 0 };
        frame(kind, end | if n == 0 { END_STREAM } else { 0 }, 1, part)
    };
    parts.iter().enumerate().flat_map(of).collect()
}

/// What the origin may get: nothing, or these requests.
type Expected = &'static [&'static str];

const REFUSED: Expected = &[];
const SERVED: Expected = &["GET /a"];
const POSTED: Expected = &["POST /a abcd"];

#[allow(clippy::too_many_lines, reason = "a table")]
fn cases() -> Vec<(String, Vec<u8>, Expected)> {
    let mut all: Vec<(String, Vec<u8>, Expected)> = Vec::new();
    let mut case = |name: &str, bytes: Vec<u8>, expected| all.push((name.to_owned(), bytes, expected));
    case("a usual GET", get(&[]), SERVED);
    case("a usual POST", post(&[("content-length", "4")], b"abcd"), POSTED);
    case("a POST without a length", post(&[], b"abcd"), POSTED);
    case("te: trailers", get(&[("te", "trailers")]), SERVED);
    case("two cookies", get(&[("cookie", "a=b"), ("cookie", "c=d")]), SERVED);
    case("a name with an underscore", get(&[("content_length", "5"), ("x_forwarded_host", "evil")]), SERVED);
    case("settings of an upgrade", get(&[("http2-settings", "AAMAAABk")]), SERVED);
    for name in [
        "X-Upper",
        "x a",
        "x-a ",
        "x:a",
        "",
        "x\ra",
        "x\na",
        "x: 1\r\ny",
        "x\0a",
        "x\ta",
        "x\u{e4}",
        "x(a)",
        "x\u{7f}",
        "transfer-encoding: chunked\r\nx",
        ":unknown",
        ":status",
        ":Path",
    ] {
        case(&format!("the name {name:?}"), get(&[(name, "1")]), REFUSED);
    }
    for value in [
        "a\rb",
        "a\nb",
        "a\r\nx: 1",
        "a\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n",
        "a\0b",
        " a",
        "a\t",
        "a\u{b}b",
        "a\u{1b}b",
        "a\u{7f}b",
    ] {
        case(&format!("the value {value:?}"), get(&[("x", value)]), REFUSED);
        case(&format!("the cookie {value:?}"), get(&[("cookie", value)]), REFUSED);
    }
    for field in [
        ("connection", "close"),
        ("connection", "x-a"),
        ("transfer-encoding", "chunked"),
        ("transfer-encoding", "identity"),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "keep-alive"),
        ("upgrade", "websocket"),
        ("te", "gzip"),
        ("te", "trailers, chunked"),
    ] {
        case(&format!("{}: {}", field.0, field.1), get(&[field]), REFUSED);
    }
    let chunks = [b"0\r\n\r\n", SMUGGLED].concat();
    case("chunks in DATA", post(&[("transfer-encoding", "chunked")], &chunks), REFUSED);
    for (n, field) in [METHOD, SCHEME, AUTHORITY, PATH].into_iter().enumerate() {
        let mut fields = vec![METHOD, SCHEME, AUTHORITY, PATH];
        case(&format!("{} twice", field.0), raw(&[&fields[..], &[field]].concat()), REFUSED);
        fields.remove(n);
        let late = raw(&[&fields[..], &[("x", "1"), field]].concat());
        case(&format!("{} after a field", field.0), late, REFUSED);
        case(&format!("no {}", field.0), raw(&fields), REFUSED);
    }
    case("a host alone", raw(&[METHOD, SCHEME, PATH, ("host", "acme.example.com")]), SERVED);
    case("the same host", get(&[("host", "acme.example.com")]), SERVED);
    for host in ["evil.example.com", "acme.example.com:80", "", "acme.example.com\r\nx: 1"] {
        case(&format!("{host:?} beside the authority"), get(&[("host", host)]), REFUSED);
    }
    let twice = [METHOD, SCHEME, PATH, ("host", "acme.example.com"), ("host", "evil.example.com")];
    case("two hosts", raw(&twice), REFUSED);
    for method in
        ["", "GET /smuggled HTTP/1.1", "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET", "GE\0T", "GET:", "TRACE", "CONNECT"]
    {
        case(&format!("the method {method:?}"), with((":method", method)), REFUSED);
    }
    for path in [
        "",
        "a",
        "*",
        "https://acme.example.com/a",
        "http://evil.example.com/a",
        "/a b",
        "/a HTTP/1.1",
        "/a\rb",
        "/a\nb",
        "/a HTTP/1.1\r\nHost: acme.example.com\r\n\r\nGET /smuggled HTTP/1.1",
        "/a\0",
        "/a\tb",
        "/a\u{7f}",
        "/a/../web/database",
    ] {
        case(&format!("the path {path:?}"), with((":path", path)), REFUSED);
    }
    case("a path with an encoded line end", with((":path", "/a%0d%0aX:1")), &["GET /a%0d%0aX:1"]);
    for authority in [
        "u:p@acme.example.com",
        "acme.example.com@evil.example.com",
        "acme.example.com evil",
        "acme.example.com\r\nX: 1",
        "acme.example.com\nX",
        "acme.example.com\0",
        "acme.example.com/x",
        "",
        "acme.example.com:port",
        "acme.example.com:1:2",
        "acme.example.com:99999",
        "acme.example.com,evil.example.com",
        "acme.example.com?x",
        "evil.example.com",
        "https://acme.example.com",
    ] {
        case(&format!("the authority {authority:?}"), with((":authority", authority)), REFUSED);
    }
    case("an authority with a port that is empty", with((":authority", "acme.example.com:")), SERVED);
    case("an authority in capitals", with((":authority", "ACME.example.com")), SERVED);
    for scheme in ["https\r\nx: 1", "https://evil/x?"] {
        case(&format!("the scheme {scheme:?}"), with((":scheme", scheme)), REFUSED);
    }
    for length in [
        "2",
        "10",
        "0",
        "+4",
        "-1",
        "4, 4",
        "4,5",
        "0x4",
        "",
        "4;",
        "4\u{b}",
        "99999999999999999999",
        "4.0",
        "1e1",
        "\u{b2}",
    ] {
        case(&format!("4 bytes of {length:?}"), post(&[("content-length", length)], b"abcd"), REFUSED);
    }
    case("two different lengths", post(&[("content-length", "4"), ("content-length", "0")], b"abcd"), REFUSED);
    case("a length and no body", get(&[("content-length", "5")]), REFUSED);
    case("a length of 0", get(&[("content-length", "0")]), SERVED);
    case(
        "a body that is a request",
        post(&[], SMUGGLED),
        &["POST /a GET /smuggled HTTP/1.1\r\nHost: acme.example.com"],
    );
    let midway = [open_post(&[("content-length", "4")]), frame(DATA, 0, 1, b"ab")].concat();
    case("half a body", midway.clone(), REFUSED);
    case("half a body and a reset", [midway, frame(RST_STREAM, 0, 1, &8u32.to_be_bytes())].concat(), REFUSED);
    let again = frame(HEADERS, END_HEADERS, 1, &block(&[("x", "1")]));
    case("two heads", [open_post(&[]), again].concat(), REFUSED);
    case(
        "padding beyond its frame",
        [open_post(&[]), frame(DATA, END_STREAM | PADDED, 1, b"\xffabc")].concat(),
        REFUSED,
    );
    case("trailers", trailed(&[], &[("x-t", "1")]), POSTED);
    for trailer in [("x", "a\r\nb"), ("X-T", "a"), ("transfer-encoding", "chunked"), ("connection", "close")] {
        case(&format!("the trailer {trailer:?}"), trailed(&[], &[trailer]), REFUSED);
    }
    case("trailers and another length", trailed(&[("content-length", "9")], &[("x-t", "1")]), REFUSED);
    let extended = [(":method", "CONNECT"), (":protocol", "websocket"), SCHEME, AUTHORITY, (":path", "/websocket")];
    case("CONNECT, extended", raw(&extended), REFUSED);
    case("CONNECT to the origin", raw(&[(":method", "CONNECT"), (":authority", "127.0.0.1:8069")]), REFUSED);
    let large = "a".repeat(16_000);
    case("a head of 128 KB", long(&vec![("x", large.as_str()); 8]), REFUSED);
    case("a path of 20 KB", long(&[(":path", &"/a".repeat(10_000))]), REFUSED);
    let named: Vec<String> = (0..3_000).map(|n| format!("a{n}")).collect();
    case("3,000 fields", long(&named.iter().map(|n| (n.as_str(), "1")).collect::<Vec<_>>()), REFUSED);
    let usual = block(&[METHOD, SCHEME, AUTHORITY, PATH]);
    let ended = |tail: &[u8]| frame(HEADERS, END_HEADERS | END_STREAM, 1, &[&usual[..], tail].concat());
    let remembered = [&[0x40][..], &block(&[("x", &"b".repeat(3_900))])[1..], &[0xbe; 10_000]].concat();
    case("39 MB out of 14 KB", ended(&remembered), REFUSED);
    for (name, tail) in [
        ("index 0", &b"\x80"[..]),
        ("an index beyond the table", b"\xff\x80\x10"),
        ("an integer without end", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        ("wrong Huffman code", b"\0\x01x\x84\xff\xff\xff\xff"),
        ("half a string", b"\0\x05ab"),
        ("a new size at the end", b"\x20"),
    ] {
        case(&format!("HPACK: {name}"), ended(tail), REFUSED);
    }
    let elsewhere = [frame(HEADERS, END_STREAM, 1, &usual), frame(CONTINUATION, END_HEADERS, 3, b"")].concat();
    case("the rest of a head on another stream", elsewhere, REFUSED);
    case("a body on stream 0", frame(DATA, END_STREAM, 0, b"x"), REFUSED);
    case("a request on an even stream", frame(HEADERS, END_HEADERS | END_STREAM, 2, &usual), REFUSED);
    case("a frame beyond the greatest", frame(HEADERS, END_HEADERS | END_STREAM, 1, &vec![0; 20_000]), REFUSED);
    case("a push from a client", frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2], &usual[..]].concat()), REFUSED);
    case("a window that grows by nothing", [frame(WINDOW_UPDATE, 0, 0, &[0; 4]), get(&[])].concat(), REFUSED);
    let most = frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffffu32.to_be_bytes());
    case("a window beyond its greatest", [most.clone(), most, get(&[])].concat(), REFUSED);
    all
}

/// Whether the answer on the first stream was 200; `None` when nothing ended it in time.
async fn served(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<bool> {
    let mut bytes = Vec::new();
    let mut good = false;
    let read = async {
        loop {
            while let Some(length) =
                bytes.get(..3).map(|l| usize::from(l[0]) << 16 | usize::from(l[1]) << 8 | usize::from(l[2]))
            {
                if bytes.len() < 9 + length {
                    break;
                }
                let one: Vec<u8> = bytes.drain(..9 + length).collect();
                // `:status: 200` has an index of its own, and stands first.
                good |= one[3] == HEADERS && one.get(9) == Some(&0x88);
                let ends = matches!(one[3], HEADERS | DATA) && one[4] & END_STREAM != 0;
                if ends || one[3] == RST_STREAM || one[3] == GOAWAY {
                    return good;
                }
            }
            if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                return good;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), read).await.ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_malformed_in_frames_is_refused_and_nothing_is_smuggled_out_of_them() {
    let (origin, log) = origin().await;
    let main = format!(
        "http:\n  listen: ['127.0.0.1:0']\n  tls: {{ listen: ['127.0.0.1:0'], certificates: [{{ certificate: all.crt, key: all.key }}] }}\n  \
         keepalive_timeout: 300ms\n  header_timeout: 1s\n  body_timeout: 1s\npools:\n  odoo:\n    \
         servers: [{{ address: '{origin}', gevent: '{origin}' }}]\n    slots: 16\nplans:\n  standard: {{}}\n"
    );
    let directory = TenantDirectory::new(&main).unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["acme.example.com".to_owned()]).unwrap();
    let main = directory.path();
    let beside = main.parent().unwrap();
    std::fs::write(beside.join("all.crt"), made.cert.pem()).unwrap();
    std::fs::write(beside.join("all.key"), made.signing_key.serialize_pem()).unwrap();
    let tenant =
        "tenant: acme\nhosts: [acme.example.com]\ndatabase: acme_db\nplacement: { pool: odoo }\nplan: standard\n";
    directory.tenant("acme", tenant).unwrap();
    let gateway = Gateway::builder().config_file(directory.path()).start().await.unwrap();

    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(made.cert.pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));

    let cases = cases();
    assert!(cases.len() >= 120, "{} cases", cases.len());
    let mut faults = Vec::new();
    for (name, frames, expected) in cases {
        *log.lock().unwrap() = Seen::default();
        let tcp = TcpStream::connect(gateway.https_addresses()[0]).await.unwrap();
        let host = ServerName::try_from("acme.example.com").unwrap();
        let mut stream = connector.connect(host, tcp).await.unwrap();
        let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &[]), frames].concat();
        // The gateway may refuse before everything is written.
        let _ = stream.write_all(&preface).await;
        let _ = stream.flush().await;
        let served = served(&mut stream).await;
        let seen = log.lock().unwrap().clone();
        if seen.requests != expected || served != Some(!expected.is_empty()) || !seen.violations.is_empty() {
            faults.push(format!("{name}: served {served:?}, {seen:?}"));
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}
