//! A small HTTP client, and load made with it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// An answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Headers with lower-case names, in order.
    pub headers: Vec<(String, String)>,
    /// The body, decoded.
    pub body: Vec<u8>,
    /// Whether the connection can be used again.
    pub reusable: bool,
}

impl Response {
    /// The first header with this lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// One HTTP/1.1 connection.
#[derive(Debug)]
pub struct HttpClient {
    stream: TcpStream,
    buffer: BytesMut,
}

impl HttpClient {
    /// Connects.
    pub async fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: BytesMut::new() })
    }

    /// `GET path`.
    pub async fn get(&mut self, host: &str, path: &str) -> io::Result<Response> {
        self.request("GET", host, path, &[], &[]).await
    }

    /// One request and its answer.
    pub async fn request(
        &mut self,
        method: &str,
        host: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Response> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() || method == "POST" {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        let mut request = head.into_bytes();
        request.extend_from_slice(body);
        self.send(&request).await?;
        self.response(method == "HEAD").await
    }

    /// Sends raw bytes.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Reads one answer.
    pub async fn response(&mut self, head_only: bool) -> io::Result<Response> {
        loop {
            let mut response = self.head().await?;
            if response.status == 100 {
                continue;
            }
            let none = head_only || matches!(response.status, 101 | 204 | 304);
            let chunked = response.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked"));
            let length: Option<usize> = response.header("content-length").and_then(|v| v.parse().ok());
            response.body = match (none, chunked, length) {
                (true, ..) => Vec::new(),
                (_, true, _) => self.chunked().await?,
                (_, _, Some(length)) => self.take(length).await?,
                _ => {
                    while self.fill().await? > 0 {}
                    self.buffer.split().to_vec()
                }
            };
            let closes = response.header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
            response.reusable = !closes && (none || chunked || length.is_some());
            return Ok(response);
        }
    }

    /// The socket itself, after an upgrade.
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }

    async fn head(&mut self) -> io::Result<Response> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 64];
            let mut parsed = httparse::Response::new(&mut headers);
            if let httparse::Status::Complete(length) = parsed.parse(&self.buffer).map_err(io::Error::other)? {
                let response = Response {
                    status: parsed.code.unwrap_or(0),
                    headers: parsed
                        .headers
                        .iter()
                        .map(|h| (h.name.to_ascii_lowercase(), String::from_utf8_lossy(h.value).into_owned()))
                        .collect(),
                    body: Vec::new(),
                    reusable: false,
                };
                self.buffer.advance(length);
                return Ok(response);
            }
            if self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    async fn chunked(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = loop {
                if let Some(end) = self.buffer.windows(2).position(|w| w == b"\r\n") {
                    let line = self.buffer.split_to(end);
                    self.buffer.advance(2);
                    break line;
                }
                if self.fill().await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            };
            let size = std::str::from_utf8(&line).ok().and_then(|l| usize::from_str_radix(l.trim(), 16).ok());
            let size = size.ok_or_else(|| io::Error::other("malformed chunk"))?;
            body.extend(self.take(size).await?);
            self.take(2).await?;
            if size == 0 {
                return Ok(body);
            }
        }
    }

    async fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < length {
            if self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(self.buffer.split_to(length).to_vec())
    }

    async fn fill(&mut self) -> io::Result<usize> {
        self.buffer.reserve(64 << 10);
        self.stream.read_buf(&mut self.buffer).await
    }
}

/// What a load has seen so far.
#[derive(Debug)]
pub struct Measured {
    latencies: std::sync::Mutex<Histogram<u64>>,
    /// Answers below 400.
    pub served: AtomicU64,
    /// Everything else.
    pub failed: AtomicU64,
}

impl Default for Measured {
    fn default() -> Self {
        Self { latencies: std::sync::Mutex::new(empty()), served: AtomicU64::default(), failed: AtomicU64::default() }
    }
}

/// From a microsecond to ten minutes, three digits.
fn empty() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000, 3).unwrap_or_else(|_| unreachable!("constant bounds are valid"))
}

impl Measured {
    fn note(&self, began: Instant, served: bool) {
        let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.latencies.lock().unwrap_or_else(std::sync::PoisonError::into_inner).saturating_record(micros.max(1));
        if served { &self.served } else { &self.failed }.fetch_add(1, Ordering::Relaxed);
    }

    /// A quantile of the latencies.
    pub fn quantile(&self, q: f64) -> Duration {
        let latencies = self.latencies.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Duration::from_micros(if latencies.is_empty() { 0 } else { latencies.value_at_quantile(q) })
    }

    /// The latencies since the last call, as p50 and p99, and how many there were. They stay in the total.
    pub fn window(&self, seen: &mut Window) -> (Duration, Duration, u64) {
        let latencies = self.latencies.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut fresh = latencies.clone();
        drop(latencies);
        let _ = fresh.subtract(&seen.0);
        seen.0.add(&fresh).unwrap_or_default();
        let at = |q| Duration::from_micros(if fresh.is_empty() { 0 } else { fresh.value_at_quantile(q) });
        (at(0.5), at(0.99), fresh.len())
    }

    /// Adds another measurement to this one.
    pub fn merge(&self, other: &Self) {
        let theirs = other.latencies.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let mut mine = self.latencies.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        mine.add(&theirs).unwrap_or_default();
        self.served.fetch_add(other.served.load(Ordering::Relaxed), Ordering::Relaxed);
        self.failed.fetch_add(other.failed.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// Where a reader of [`Measured::window`] has got to.
#[derive(Debug)]
pub struct Window(Histogram<u64>);

impl Default for Window {
    fn default() -> Self {
        Self(empty())
    }
}

/// What a load asks for.
#[derive(Debug, Clone)]
pub struct Target {
    /// Where the gateway listens.
    pub address: SocketAddr,
    /// The Host header.
    pub host: String,
    /// The path.
    pub path: String,
    /// The Cookie header: somebody who is logged in.
    pub cookie: Option<String>,
}

impl Target {
    /// Somebody with a session who asks for a path.
    pub fn logged_in(address: SocketAddr, host: impl Into<String>, path: impl Into<String>) -> Self {
        Self { address, host: host.into(), path: path.into(), cookie: Some("session_id=0123456789abcdef".into()) }
    }

    /// Asks once, on a connection of its own.
    pub async fn once(&self) -> io::Result<Response> {
        self.ask(&mut HttpClient::connect(self.address).await?).await
    }

    async fn ask(&self, client: &mut HttpClient) -> io::Result<Response> {
        let cookie = self.cookie.as_deref().map(|c| ("Cookie", c));
        client.request("GET", &self.host, &self.path, cookie.as_slice(), &[]).await
    }
}

/// Asks at a steady rate whether or not answers come back (an open loop), so that waiting is counted in full.
pub async fn at_rate(target: Target, per_second: f64, measured: Arc<Measured>, stop: CancellationToken) {
    let mut seed = target.host.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    let mut next = tokio::time::Instant::now();
    loop {
        // Exponential gaps make it a Poisson process; the seed makes it the same one each time.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = ((seed >> 11) as f64 / (1u64 << 53) as f64).max(1e-9);
        next += Duration::from_secs_f64(-uniform.ln() / per_second);
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            () = stop.cancelled() => return,
        }
        let (target, measured, stop) = (target.clone(), Arc::clone(&measured), stop.clone());
        tokio::spawn(async move {
            let began = Instant::now();
            tokio::select! {
                outcome = target.once() => measured.note(began, outcome.is_ok_and(|r| r.status < 400)),
                () = stop.cancelled() => {}
            }
        });
    }
}

/// `clients` connections that ask again as soon as they are answered (a closed loop).
pub async fn as_fast_as_possible(target: Target, clients: usize, measured: Arc<Measured>, stop: CancellationToken) {
    let mut all = Vec::new();
    for _ in 0..clients {
        let (target, measured, stop) = (target.clone(), Arc::clone(&measured), stop.clone());
        all.push(tokio::spawn(async move {
            let mut client = None;
            while !stop.is_cancelled() {
                let began = Instant::now();
                let ask = async {
                    let mut connected = match client.take() {
                        Some(client) => client,
                        None => HttpClient::connect(target.address).await?,
                    };
                    let response = target.ask(&mut connected).await?;
                    Ok::<_, io::Error>((connected, response))
                };
                tokio::select! {
                    outcome = ask => {
                        let served = match outcome {
                            Ok((connected, response)) => {
                                client = response.reusable.then_some(connected);
                                response.status < 400
                            }
                            Err(_) => false,
                        };
                        measured.note(began, served);
                        if !served {
                            // A refused client does not hammer; it was told to come later.
                            tokio::time::sleep(Duration::from_millis(100)).await;
                        }
                    }
                    () = stop.cancelled() => return,
                }
            }
        }));
    }
    for task in all {
        let _ = task.await;
    }
}
