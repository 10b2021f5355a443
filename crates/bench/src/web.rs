//! What a proxy costs: `wrk` directly, through NGINX, HAProxy, an engine without our logic, and Cofferdam, in turn; and what
//! idle connections weigh.
//!
//! The origin is an NGINX that closes each connection after its answer, as Odoo's workers do: every proxy has to connect
//! anew for each request.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::postgres::free_port;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::peers::{Running, launch, open_to_all};

/// The one host.
const HOST: &str = "tenant.example.com";

/// What is measured.
#[derive(Debug, Clone)]
pub struct Options {
    /// Connections of the load.
    pub connections: Vec<u32>,
    /// What is asked for.
    pub loads: Vec<Load>,
    /// How long one measurement takes.
    pub seconds: u64,
    /// How often each is repeated; the median counts.
    pub rounds: usize,
    /// Idle connections to weigh; 0 for none.
    pub idle: u32,
    /// Cofferdam's program.
    pub cofferdam: PathBuf,
    /// An engine without our logic, if it was built.
    pub bare: Option<PathBuf>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// 1 KB over connections that are kept.
    Small,
    /// 1 KB, each over a new connection.
    New,
    /// 1 MB over connections that are kept.
    Large,
    /// 1 KB over TLS.
    Tls,
    /// 1 KB that may be kept by the proxy.
    Cached,
}

impl Load {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Small, Self::New, Self::Large, Self::Tls, Self::Cached];

    /// The name in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Small => "1 KB",
            Self::New => "1 KB, new connections",
            Self::Large => "1 MB",
            Self::Tls => "1 KB, TLS",
            Self::Cached => "1 KB, cached",
        }
    }

    fn path(self) -> &'static str {
        match self {
            Self::Large => "/web/content/large",
            Self::Cached => "/web/static/small.js",
            _ => "/web/small",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Through {
    Direct,
    Nginx,
    HaProxy,
    Bare,
    Cofferdam,
}

impl Through {
    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Nginx => "nginx",
            Self::HaProxy => "haproxy",
            Self::Bare => "bare pingora",
            Self::Cofferdam => "cofferdam",
        }
    }

    fn can(self, load: Load) -> bool {
        match self {
            Self::Direct => load != Load::Tls,
            Self::Bare => !matches!(load, Load::Tls | Load::Cached),
            _ => true,
        }
    }
}

/// One measurement: the median of its rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// What was asked for.
    pub load: Load,
    /// Connections.
    pub connections: u32,
    /// Through what.
    pub proxy: &'static str,
    /// Requests per second.
    pub rate: f64,
    /// Half of them took no longer, in milliseconds.
    pub p50_ms: f64,
    /// 99 of a hundred took no longer, in milliseconds.
    pub p99_ms: f64,
    /// Processor time of the proxy per request, in microseconds.
    pub cpu_us: f64,
    /// Answers that were no success.
    pub errors: u64,
}

/// What idle connections weigh.
#[derive(Debug, Clone, Serialize)]
pub struct Idle {
    /// Through what.
    pub proxy: &'static str,
    /// How many.
    pub connections: u32,
    /// Resident bytes each.
    pub bytes: f64,
}

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Rates and times.
    pub cells: Vec<Cell>,
    /// Memory.
    pub idle: Vec<Idle>,
}

struct Bed {
    directory: TempDir,
    origin: u16,
    _origin: Running,
    plain: Vec<(Through, Running)>,
    tls: Vec<(Through, Running)>,
}

/// Measures everything, proxies in turn within each cell.
pub async fn measure(options: &Options, say: impl Fn(&str)) -> anyhow::Result<Report> {
    let bed = Bed::start(options).await?;
    let mut report = Report { cells: Vec::new(), idle: Vec::new() };
    for &load in &options.loads {
        for &connections in &options.connections {
            let proxies = if load == Load::Tls { &bed.tls } else { &bed.plain };
            let mut rounds: Vec<(Through, Vec<Cell>)> = Vec::new();
            for _ in 0..options.rounds {
                for (proxy, running) in proxies.iter().filter(|(proxy, _)| proxy.can(load)) {
                    let cell = one(*proxy, running, load, connections, options.seconds).await?;
                    match rounds.iter_mut().find(|(p, _)| p == proxy) {
                        Some((_, cells)) => cells.push(cell),
                        None => rounds.push((*proxy, vec![cell])),
                    }
                }
            }
            for (_, cells) in rounds {
                let cell = median(cells);
                say(&brief(&cell));
                report.cells.push(cell);
            }
        }
    }
    if options.idle > 0 {
        for (proxy, running) in bed.plain.iter().filter(|(proxy, _)| *proxy != Through::Direct) {
            let idle = weigh(*proxy, running, options.idle).await?;
            say(&format!("{:14} {} idle connections: {:.0} bytes each", idle.proxy, idle.connections, idle.bytes));
            report.idle.push(idle);
        }
    }
    Ok(report)
}

impl Bed {
    async fn start(options: &Options) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("cofferdam-web-").tempdir()?;
        let here = directory.path();
        let (small, large) = ("x".repeat(1_000), "x".repeat(1_000_000));
        for (path, text) in [("web/small", &small), ("web/content/large", &large), ("web/static/small.js", &small)] {
            let path = here.join("root").join(path);
            fs::create_dir_all(path.parent().unwrap_or(here))?;
            fs::write(path, text)?;
        }
        let key = rcgen::generate_simple_self_signed(vec![HOST.to_owned()])?;
        fs::write(here.join("crt.pem"), key.cert.pem())?;
        fs::write(here.join("key.pem"), key.signing_key.serialize_pem())?;
        fs::write(here.join("both.pem"), key.cert.pem() + &key.signing_key.serialize_pem())?;
        let origin = free_port()?;
        let text = format!(
            "http {{\n{NGINX_COMMON}  keepalive_timeout 0;\n  server {{\n    listen 127.0.0.1:{origin} backlog=4096;\n    root root;\n    \
             location / {{ }}\n    location /web/static/ {{ add_header Cache-Control 'public, max-age=604800'; }}\n  }}\n}}\n"
        );
        let running = nginx(here, "origin", &text, origin).await?;
        let mut bed = Self { directory, origin, _origin: running, plain: Vec::new(), tls: Vec::new() };
        bed.plain.push((Through::Direct, Running::of(Vec::new(), origin, None)));
        for is_tls in [false, true] {
            for proxy in [Through::Nginx, Through::HaProxy, Through::Bare, Through::Cofferdam] {
                let wanted =
                    options.loads.iter().any(|load| (*load == Load::Tls) == is_tls) || !is_tls && options.idle > 0;
                if !wanted || proxy == Through::Bare && (is_tls || options.bare.is_none()) {
                    continue;
                }
                let running = bed.proxy(proxy, is_tls, options).await?;
                let list = if is_tls { &mut bed.tls } else { &mut bed.plain };
                list.push((proxy, running));
            }
        }
        Ok(bed)
    }

    async fn proxy(&self, proxy: Through, is_tls: bool, options: &Options) -> anyhow::Result<Running> {
        let (port, origin, here) = (free_port()?, self.origin, self.directory.path());
        match proxy {
            Through::Direct => Ok(Running::of(Vec::new(), origin, None)),
            Through::Nginx => {
                let listen = if is_tls {
                    format!(
                        "listen 127.0.0.1:{port} ssl backlog=4096;\n    ssl_certificate crt.pem;\n    ssl_certificate_key key.pem;"
                    )
                } else {
                    format!("listen 127.0.0.1:{port} backlog=4096;")
                };
                let name = if is_tls { "nginx-tls" } else { "nginx" };
                let text = format!(
                    "http {{\n{NGINX_COMMON}  keepalive_requests 1000000000;\n  proxy_cache_path cache-{name} keys_zone=kept:10m;\n  \
                     server {{\n    {listen}\n    proxy_set_header Host $host;\n    proxy_set_header X-Forwarded-For $remote_addr;\n    \
                     proxy_set_header X-Forwarded-Proto $scheme;\n    proxy_set_header X-Forwarded-Host $host;\n    \
                     location / {{ proxy_pass http://127.0.0.1:{origin}; }}\n    \
                     location /web/static/ {{ proxy_pass http://127.0.0.1:{origin}; proxy_cache kept; }}\n  }}\n}}\n"
                );
                nginx(here, name, &text, port).await
            }
            Through::HaProxy => {
                let both = here.join("both.pem");
                let tls = if is_tls { format!(" ssl crt {}", both.display()) } else { String::new() };
                let text = format!(
                    "global\n  maxconn 8000\ncache kept\n  total-max-size 64\n  max-age 600\ndefaults\n  mode http\n  \
                     timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n  option forwardfor\nfrontend front\n  \
                     bind 127.0.0.1:{port}{tls}\n  default_backend origin\nbackend origin\n  \
                     acl static path_beg /web/static/\n  http-request cache-use kept if static\n  \
                     http-response cache-store kept\n  server origin 127.0.0.1:{origin}\n"
                );
                let path = here.join(if is_tls { "haproxy-tls.cfg" } else { "haproxy.cfg" });
                fs::write(&path, text)?;
                let mut command = Command::new("haproxy");
                command.args(["-db", "-q", "-f"]).arg(&path);
                let child = launch(command, &[port]).await.context("HAProxy (Debian: `apt-get install haproxy`)")?;
                Ok(Running::of(vec![child], port, None))
            }
            Through::Bare => {
                let Some(bare) = &options.bare else { bail!("no engine without our logic was given") };
                let mut command = Command::new(bare);
                command.args([format!("127.0.0.1:{port}"), format!("127.0.0.1:{origin}")]);
                Ok(Running::of(vec![launch(command, &[port]).await.context("the bare engine")?], port, None))
            }
            Through::Cofferdam => {
                let plain = if is_tls { free_port()? } else { port };
                let tls = if is_tls {
                    let (crt, key) = (here.join("crt.pem"), here.join("key.pem"));
                    format!(
                        "  tls: {{ listen: ['127.0.0.1:{port}'], certificates: [{{ certificate: '{}', key: '{}' }}] }}\n",
                        crt.display(),
                        key.display()
                    )
                } else {
                    String::new()
                };
                let log = here.join(format!("access-{port}.log"));
                // Everything on: sessions bound, requests written down, logins guarded, limits in force.
                let main = format!(
                    "http:\n  listen: ['127.0.0.1:{plain}']\n{tls}  session_key: 'a key for the benchmark'\n  access_log: '{}'\n\
                     pools:\n  odoo:\n    servers: [{{ address: '127.0.0.1:{origin}' }}]\n    slots: 64\nplans:\n  standard:\n    \
                     http: {{ queue: 5000, max_wait: 60s }}\n",
                    log.display()
                );
                let directory = TenantDirectory::new(&main)?;
                let tenant = format!(
                    "tenant: tenant\nhosts: [{HOST}]\ndatabase: tenant\nplan: standard\nplacement: {{ pool: odoo }}\n"
                );
                directory.tenant("tenant", &tenant)?;
                let mut command = Command::new(&options.cofferdam);
                command.args(["serve", "--log", "warn", "--config"]).arg(directory.path());
                Ok(Running::of(vec![launch(command, &[port]).await?], port, Some(directory)))
            }
        }
    }
}

/// What every NGINX here has in common: nothing is logged, and whatever it writes is in its directory.
const NGINX_COMMON: &str = "  access_log off;\n  client_body_temp_path tmp;\n  proxy_temp_path tmp;\n  fastcgi_temp_path tmp;\n  \
    uwsgi_temp_path tmp;\n  scgi_temp_path tmp;\n  sendfile on;\n  tcp_nopush on;\n";

async fn nginx(directory: &Path, name: &str, http: &str, port: u16) -> anyhow::Result<Running> {
    let workers = std::thread::available_parallelism().map_or(1, |n| (n.get() / 2).max(1));
    let user = if fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0) {
        "user root;\n"
    } else {
        ""
    };
    let text = format!(
        "daemon off;\n{user}worker_processes {workers};\npid {name}.pid;\nerror_log stderr crit;\n\
         events {{ worker_connections 8000; }}\n{http}"
    );
    let path = directory.join(format!("{name}.conf"));
    fs::write(&path, text)?;
    open_to_all(directory)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(directory).arg("-c").arg(&path).args(["-e", "stderr"]);
    let child = launch(command, &[port]).await.context("NGINX (Debian: `apt-get install nginx-light`)")?;
    Ok(Running::of(vec![child], port, None))
}

async fn one(proxy: Through, running: &Running, load: Load, connections: u32, seconds: u64) -> anyhow::Result<Cell> {
    let scheme = if load == Load::Tls { "https" } else { "http" };
    let url = format!("{scheme}://127.0.0.1:{}{}", running.http, load.path());
    let mut command = Command::new("wrk");
    command.args(["-t", if connections == 1 { "1" } else { "2" }, "-c", &connections.to_string()]);
    command.args(["-d", &format!("{seconds}s"), "--latency", "--timeout", "30s", "-H", &format!("Host: {HOST}")]);
    if load == Load::New {
        command.args(["-H", "Connection: close"]);
    }
    command.arg(&url).stdin(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true);
    let before = running.cpu();
    let output = command.output().await.context("wrk (Debian: `apt-get install wrk`)")?;
    let cpu = running.cpu().saturating_sub(before);
    let text = String::from_utf8_lossy(&output.stdout);
    let report = parse(&text).with_context(|| format!("what wrk says cannot be read:\n{text}"))?;
    let proxy = proxy.name();
    Ok(Cell {
        load,
        connections,
        proxy,
        rate: report.rate,
        p50_ms: report.p50_ms,
        p99_ms: report.p99_ms,
        cpu_us: cpu.as_secs_f64() * 1e6 / report.requests.max(1.0),
        errors: report.errors,
    })
}

struct Wrk {
    requests: f64,
    rate: f64,
    p50_ms: f64,
    p99_ms: f64,
    errors: u64,
}

fn parse(text: &str) -> Option<Wrk> {
    let line = |begin: &str| text.lines().find_map(|l| l.trim().strip_prefix(begin)).map(str::trim);
    let requests = text.lines().find_map(|l| l.trim().split_once(" requests in"))?.0.trim().parse().ok()?;
    let errors = line("Non-2xx or 3xx responses:").and_then(|n| n.parse().ok()).unwrap_or(0);
    let socket: u64 = line("Socket errors:")
        .map_or(0, |l| l.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u64>().ok()).sum());
    Some(Wrk {
        requests,
        rate: line("Requests/sec:")?.parse().ok()?,
        p50_ms: milliseconds(line("50%")?)?,
        p99_ms: milliseconds(line("99%")?)?,
        errors: errors + socket,
    })
}

fn milliseconds(text: &str) -> Option<f64> {
    let at = text.find(|c: char| c.is_ascii_alphabetic())?;
    let value: f64 = text[..at].parse().ok()?;
    Some(match &text[at..] {
        "us" => value / 1e3,
        "ms" => value,
        "s" => value * 1e3,
        "m" => value * 60e3,
        _ => return None,
    })
}

/// The cell with the middle processor time.
fn median(mut cells: Vec<Cell>) -> Cell {
    cells.sort_by(|a, b| a.cpu_us.total_cmp(&b.cpu_us));
    let errors = cells.iter().map(|c| c.errors).sum();
    let mut cell = cells.swap_remove(cells.len() / 2);
    cell.errors = errors;
    cell
}

async fn weigh(proxy: Through, running: &Running, connections: u32) -> anyhow::Result<Idle> {
    let ask = format!("GET /web/small HTTP/1.1\r\nHost: {HOST}\r\n\r\n");
    let open = async || -> anyhow::Result<TcpStream> {
        let mut stream = TcpStream::connect(("127.0.0.1", running.http)).await?;
        stream.write_all(ask.as_bytes()).await?;
        let mut answer = Vec::new();
        // The body is a thousand times the same letter.
        while !answer.ends_with(&[b'x'; 1_000]) {
            if stream.read_buf(&mut answer).await? == 0 {
                bail!("{} has closed", proxy.name());
            }
        }
        Ok(stream)
    };
    let mut open_now = vec![open().await?];
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = running.resident();
    for _ in 0..connections {
        open_now.push(open().await?);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let bytes = running.resident().saturating_sub(before) as f64 / f64::from(connections);
    Ok(Idle { proxy: proxy.name(), connections, bytes })
}

fn brief(c: &Cell) -> String {
    format!(
        "{:22} {:>4} connections  {:14} {:>8.0}/s  p50 {:>7.2} ms  p99 {:>7.2} ms  {:>6.1} µs of CPU{}",
        c.load.as_str(),
        c.connections,
        c.proxy,
        c.rate,
        c.p50_ms,
        c.p99_ms,
        c.cpu_us,
        if c.errors > 0 { format!("  {} errors", c.errors) } else { String::new() }
    )
}

/// The report as tables.
pub fn table(report: &Report) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "load",
        "connections",
        "through",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "CPU µs",
        "× nginx",
        "errors",
    ]);
    for c in &report.cells {
        let nginx =
            report.cells.iter().find(|n| n.proxy == "nginx" && n.load == c.load && n.connections == c.connections);
        let ratio = nginx.filter(|n| n.cpu_us > 0.0 && c.cpu_us > 0.0).map(|n| c.cpu_us / n.cpu_us);
        table.add_row([
            c.load.as_str().to_owned(),
            c.connections.to_string(),
            c.proxy.to_owned(),
            format!("{:.0}", c.rate),
            format!("{:.2}", c.p50_ms),
            format!("{:.2}", c.p99_ms),
            format!("{:.1}", c.cpu_us),
            ratio.map_or(String::new(), |r| format!("{r:.2}")),
            c.errors.to_string(),
        ]);
    }
    for column in [1, 3, 4, 5, 6, 7, 8] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = table.to_string();
    for idle in &report.idle {
        text.push_str(&format!(
            "\n{}: {:.0} bytes for each of {} idle connections",
            idle.proxy, idle.bytes, idle.connections
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_says_is_read() {
        let text = "Running 2s test @ http://127.0.0.1/\n  2 threads and 64 connections\n  Thread Stats   Avg\n  Latency Distribution\n     \
                    50%    1.50ms\n     75%    2.00ms\n     90%    3.00ms\n     99%  870.00us\n  12345 requests in 2.00s, 1.0MB read\n  \
                    Socket errors: connect 0, read 3, write 0, timeout 1\n  Non-2xx or 3xx responses: 7\nRequests/sec:   6172.50\n";
        let wrk = parse(text).unwrap();
        assert_eq!((wrk.requests, wrk.rate, wrk.p50_ms, wrk.p99_ms, wrk.errors), (12345.0, 6172.5, 1.5, 0.87, 11));
        assert!(parse("unable to connect").is_none());
    }
}
