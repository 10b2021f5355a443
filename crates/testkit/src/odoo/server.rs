//! The workers and their routes.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::database::{Databases, Work};
use super::prefork::{self, Program};
use super::tenancy::{self, Sessions};
use super::websocket;
use crate::{TestkitError, io as context};

/// Odoo's own socket timeout: an idle connection holds a worker for this long.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);

/// How the miniature is set up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OdooOptions {
    /// Prefork workers: requests at once.
    pub workers: usize,
    /// The database of each host, as `dbfilter` would choose it.
    pub databases: HashMap<String, String>,
    /// Whether `dbfilter` binds each host to its database. Without, a session or `?db=` chooses among all.
    pub dbfilter: bool,
    /// Where it finds PostgreSQL: the gateway. `None`: pages without a database.
    pub postgres: Option<SocketAddr>,
    /// Its login.
    pub login: (String, String),
    /// Instead of `login`: roles named like their databases, all with this password, and no maintenance database.
    pub login_per_database: Option<String>,
    /// A request that takes longer ends like a worker killed by `limit_time_real`: without an answer.
    pub limit_time_real: Duration,
    /// Workers are processes of this program, as Odoo's are processes. `None`: they are tasks, which cannot be told apart
    /// from outside.
    #[serde(skip)]
    pub prefork: Option<Program>,
}

impl Default for OdooOptions {
    fn default() -> Self {
        Self {
            workers: 2,
            databases: HashMap::new(),
            dbfilter: true,
            postgres: None,
            login: ("odoo".into(), "odoo-secret".into()),
            login_per_database: None,
            limit_time_real: Duration::from_secs(120),
            prefork: None,
        }
    }
}

/// A running miniature. Stops when dropped.
#[derive(Debug)]
pub struct MiniOdoo {
    http: SocketAddr,
    gevent: SocketAddr,
    state: Arc<State>,
    _stop: DropGuard,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) options: OdooOptions,
    /// This very process is one worker, and does one thing after the other.
    is_worker: bool,
    databases: Databases,
    pub(super) sessions: Sessions,
    busy: AtomicU32,
    most_busy: AtomicU32,
    pub(super) requests: AtomicU64,
}

impl State {
    /// Of all workers, or of one that is a process.
    pub(super) fn new(options: OdooOptions, is_worker: bool) -> Self {
        Self {
            databases: Databases::new(&options),
            options,
            is_worker,
            sessions: Sessions::default(),
            busy: AtomicU32::new(0),
            most_busy: AtomicU32::new(0),
            requests: AtomicU64::new(0),
        }
    }

    pub(super) fn begins(&self) {
        let busy = self.busy.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_busy.fetch_max(busy, Ordering::Relaxed);
    }

    pub(super) fn ends(&self) {
        self.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

impl MiniOdoo {
    /// Starts it on free ports of 127.0.0.1.
    pub async fn start(options: OdooOptions) -> Result<Self, TestkitError> {
        let socket = TcpSocket::new_v4().map_err(context("socket"))?;
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).map_err(context("bind"))?;
        let listener = socket.listen(8 * options.workers as u32).map_err(context("listen"))?;
        let gevent = TcpListener::bind(("127.0.0.1", 0)).await.map_err(context("gevent"))?;
        let http_address = listener.local_addr().map_err(context("address"))?;
        let gevent_address = gevent.local_addr().map_err(context("address"))?;
        let state = Arc::new(State::new(options, false));
        let stop = CancellationToken::new();
        if let Some(program) = &state.options.prefork {
            let listener = listener.into_std().and_then(|l| l.set_nonblocking(false).map(|()| l));
            let listener = Arc::new(listener.map_err(context("listener"))?);
            for number in 0..state.options.workers {
                let worker = prefork::keep(Arc::clone(&state), program.clone(), Arc::clone(&listener), number);
                tokio::spawn(stop.clone().run_until_cancelled_owned(worker));
            }
        } else {
            tokio::spawn(stop.clone().run_until_cancelled_owned(workers(Arc::clone(&state), listener)));
        }
        tokio::spawn(stop.clone().run_until_cancelled_owned(websocket::serve(gevent)));
        Ok(Self { http: http_address, gevent: gevent_address, state, _stop: stop.drop_guard() })
    }

    /// The HTTP port.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// The gevent port.
    pub fn gevent(&self) -> SocketAddr {
        self.gevent
    }

    /// Requests served so far.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::Relaxed)
    }

    /// The most workers that were ever busy at once.
    pub fn most_busy(&self) -> u32 {
        self.state.most_busy.load(Ordering::Relaxed)
    }

    /// Workers that serve a request now.
    pub fn busy(&self) -> u32 {
        self.state.busy.load(Ordering::Relaxed)
    }
}

/// A worker takes one connection at a time: whoever comes meanwhile waits in the kernel's backlog.
async fn workers(state: Arc<State>, listener: TcpListener) {
    let free = Arc::new(Semaphore::new(state.options.workers));
    let names = Arc::new(Mutex::new((0..state.options.workers).collect::<Vec<_>>()));
    loop {
        let Ok(worker) = Arc::clone(&free).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else { continue };
        let (state, names) = (Arc::clone(&state), Arc::clone(&names));
        let name = names.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        tokio::spawn(async move {
            state.begins();
            let limit = state.options.limit_time_real;
            let _ = tokio::time::timeout(limit, one_request(&state, name, stream)).await;
            state.ends();
            names.lock().unwrap_or_else(PoisonError::into_inner).push(name);
            drop(worker);
        });
    }
}

pub(super) struct Request {
    method: String,
    pub(super) path: String,
    pub(super) query: HashMap<String, String>,
    pub(super) headers: Vec<(String, String)>,
    length: u64,
    /// The first bytes of the body.
    pub(super) body: Vec<u8>,
}

/// Bytes of a body that are kept to be read; of the rest only a sum.
const KEPT_BODY: usize = 1 << 20;

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().rev().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// A number from the query.
    fn number(&self, name: &str) -> Option<u64> {
        self.query.get(name)?.parse().ok()
    }
}

pub(super) struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Body,
}

enum Body {
    Bytes(Vec<u8>),
    /// So many bytes, sent as they are made.
    Zeros(u64),
}

pub(super) fn text(status: u16, kind: &str, body: impl Into<String>) -> Answer {
    Answer { status, headers: vec![("Content-Type", kind.to_owned())], body: Body::Bytes(body.into().into_bytes()) }
}

pub(super) async fn one_request(state: &State, worker: usize, mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    let Some(mut request) = head(&mut stream, &mut buffer).await? else { return Ok(()) };
    state.requests.fetch_add(1, Ordering::Relaxed);
    // The body is read with the socket timeout between its parts; a gap fails the request.
    let mut received = 0u64;
    let mut sum = 0u64;
    while received < request.length {
        if buffer.is_empty() {
            let read = tokio::time::timeout(CLIENT_TIMEOUT, stream.read_buf(&mut buffer)).await;
            if !matches!(read, Ok(Ok(n)) if n > 0) {
                return Ok(());
            }
        }
        let n = (buffer.len() as u64).min(request.length - received);
        sum = buffer[..n as usize].iter().fold(sum, |s, b| s.wrapping_mul(31).wrapping_add(u64::from(*b)));
        let kept = (n as usize).min(KEPT_BODY.saturating_sub(request.body.len()));
        request.body.extend_from_slice(&buffer[..kept]);
        buffer.advance(n as usize);
        received += n;
    }
    let answer = respond(state, worker, &request, received, sum).await;
    write(&mut stream, &request, answer).await
}

async fn head(stream: &mut TcpStream, buffer: &mut BytesMut) -> io::Result<Option<Request>> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 100];
        let mut parsed = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(length) = parsed.parse(buffer).map_err(io::Error::other)? {
            let target = parsed.path.unwrap_or("/").to_owned();
            let (path, query) = target.split_once('?').unwrap_or((&target, ""));
            let query = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
            let headers: Vec<_> = parsed
                .headers
                .iter()
                .map(|h| (h.name.to_owned(), String::from_utf8_lossy(h.value).into_owned()))
                .collect();
            let mut request = Request {
                method: parsed.method.unwrap_or("GET").to_owned(),
                path: path.to_owned(),
                query,
                headers,
                length: 0,
                body: Vec::new(),
            };
            request.length = request.header("content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
            buffer.advance(length);
            return Ok(Some(request));
        }
        match tokio::time::timeout(CLIENT_TIMEOUT, stream.read_buf(buffer)).await {
            Ok(Ok(n)) if n > 0 => {}
            _ => return Ok(None),
        }
    }
}

async fn respond(state: &State, worker: usize, request: &Request, received: u64, sum: u64) -> Answer {
    if let Some(answer) = tenancy::respond(state, request) {
        return answer;
    }
    let database = tenancy::database(state, request);
    let path = request.path.as_str();
    match path {
        "/web/health" => return text(200, "application/json", "{\"status\": \"pass\"}"),
        "/testkit/echo" => return echo(request, database.as_deref(), received, sum),
        "/testkit/work" => {
            if let Some(ms) = request.number("compute") {
                if state.is_worker {
                    compute(ms);
                } else {
                    let _ = tokio::task::spawn_blocking(move || compute(ms)).await;
                }
            }
            if let Some(ms) = request.number("wait") {
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
            return text(200, "text/plain", "done");
        }
        "/testkit/silent" => {
            tokio::time::sleep(Duration::from_secs(3600)).await;
        }
        "/testkit/sendfile" => {
            let mut answer = text(200, "application/octet-stream", "");
            let file = request.query.get("file").map_or("acme/ab/abcd", String::as_str);
            answer.headers.push(("X-Sendfile", format!("/data/filestore/{file}")));
            answer.headers.push(("X-Accel-Redirect", format!("/web/filestore/{file}")));
            answer.headers.push(("ETag", "\"of-the-file\"".into()));
            answer.headers.push(("Cache-Control", "private, no-cache".into()));
            return answer;
        }
        p if p.starts_with("/websocket") => {
            return text(
                500,
                "text/html",
                "RuntimeError: Couldn't bind the websocket. Is the connection opened on the evented port?",
            );
        }
        p if p.starts_with("/web/content/") => {
            let bytes = p.rsplit('/').next().and_then(|n| n.parse().ok()).unwrap_or(0);
            let headers = vec![("Content-Type", "application/octet-stream".to_owned())];
            return Answer { status: 200, headers, body: Body::Zeros(bytes) };
        }
        p if p.split('/').nth(2) == Some("static") => {
            if let Some(ms) = request.number("ms") {
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
            let age = request.number("age").unwrap_or(604_800);
            if request.header("if-none-match") == Some("\"1700000000.0-42\"") {
                return text(304, "", "").with("ETag", "\"1700000000.0-42\"");
            }
            let filler = "x = 1;\n".repeat(request.number("lines").unwrap_or(0) as usize);
            let mut answer = text(200, "application/javascript", format!("/* {p} */\n{filler}"));
            answer.headers.push(("Cache-Control", format!("public, max-age={age}")));
            answer.headers.push(("ETag", "\"1700000000.0-42\"".into()));
            return answer;
        }
        p if p.starts_with("/web/assets/") => {
            let mut answer = text(200, "text/css", format!("/* {p} */\n"));
            answer.headers.push(("Cache-Control", "public, max-age=31536000, immutable".into()));
            answer.headers.push(("Set-Cookie", cookie()));
            return answer;
        }
        _ => {}
    }
    let Some(database) = database else {
        return text(303, "text/html", "").with("Location", "/web/database/selector");
    };
    page(state, worker, request, &database).await
}

impl Answer {
    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// A page as Odoo makes it: look the database up, open a cursor, ask a few questions, commit.
async fn page(state: &State, worker: usize, request: &Request, database: &str) -> Answer {
    if state.options.postgres.is_none() {
        if let Some(ms) = request.number("ms") {
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
        return text(200, "text/html", format!("<p>{database}</p>")).with("Set-Cookie", cookie());
    }
    let anonymous = !request.header("cookie").is_some_and(|c| c.contains("session_id="));
    let report = request.path.starts_with("/report/");
    let statements = request.number("queries").unwrap_or(if report { 1 } else { 3 });
    let sleep_ms = request.number("ms").unwrap_or(if report { 2_000 } else { 2 });
    let count = request.number("count");
    let work = Work { statements: if count.is_some() { 1 } else { statements }, sleep_ms, count };
    match state.databases.page(worker, database, anonymous, work).await {
        Ok(answer) => text(200, "text/html", format!("<p>{database}: {answer}</p>")).with("Set-Cookie", cookie()),
        Err(error) => text(500, "text/html", format!("<p>Internal Server Error</p><!-- {error} -->")),
    }
}

fn cookie() -> String {
    "session_id=0123456789abcdef; Expires=Thu, 01 Jan 2099 00:00:00 GMT; Max-Age=604800; HttpOnly; Path=/".into()
}

/// Computes for so many milliseconds of a core that has nothing else to do.
fn compute(ms: u64) {
    spin(rounds_in_a_millisecond() * ms);
}

fn spin(rounds: u64) -> u64 {
    (0..rounds).fold(1, |x, i| std::hint::black_box(x.rotate_left(5) ^ i))
}

/// How much is computed in a millisecond: measured once, in time that this thread has a core, and the same for all workers that are processes.
/// Otherwise a worker that was asked for the first time beside many others would have less to do for ever.
pub(super) fn rounds_in_a_millisecond() -> u64 {
    static ROUNDS: OnceLock<u64> = OnceLock::new();
    *ROUNDS.get_or_init(|| {
        let told = std::env::var(prefork::ROUNDS).ok().and_then(|rounds| rounds.parse().ok());
        told.unwrap_or_else(|| {
            let had = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default();
            let fastest = (0..5).map(|_| {
                let before = had();
                spin(1_000_000);
                had().saturating_sub(before)
            });
            (1_000_000.0 / fastest.min().unwrap_or_default().as_secs_f64().max(1e-6) / 1e3) as u64
        })
    })
}

/// What the server saw, line by line, for tests.
fn echo(request: &Request, database: Option<&str>, received: u64, sum: u64) -> Answer {
    let mut out = format!(
        "method: {}\npath: {}\ndatabase: {}\nbody: {received} bytes, sum {sum}\n",
        request.method,
        request.path,
        database.unwrap_or("-")
    );
    for (name, value) in &request.headers {
        out.push_str(&format!("header {}: {value}\n", name.to_ascii_lowercase()));
    }
    text(200, "text/plain", out)
}

async fn write(stream: &mut TcpStream, request: &Request, answer: Answer) -> io::Result<()> {
    let length = match &answer.body {
        Body::Bytes(bytes) => bytes.len() as u64,
        Body::Zeros(n) => *n,
    };
    let mut head = format!("HTTP/1.0 {} X\r\nServer: Werkzeug/3.0 Python/3.12\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    // Streamed answers of HTTP/1.0 end with the connection.
    if !request.query.contains_key("streamed") {
        head.push_str(&format!("Content-Length: {length}\r\n"));
    }
    head.push_str("Connection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    if request.method != "HEAD" {
        match answer.body {
            Body::Bytes(bytes) => stream.write_all(&bytes).await?,
            Body::Zeros(mut left) => {
                let zeros = vec![0; 64 << 10];
                while left > 0 {
                    let n = left.min(zeros.len() as u64);
                    stream.write_all(&zeros[..n as usize]).await?;
                    left -= n;
                }
            }
        }
    }
    stream.shutdown().await
}
