//! What stands between the load and the servers: Cofferdam, a peer, or nothing. Each runs as a process of its own with
//! a configuration in a temporary directory, on a free port.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::postgres::free_port;
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Cofferdam.
    Cofferdam,
    /// Cofferdam with the priorities of the server's processes left alone.
    Plain,
    /// Cofferdam with priorities, and a core that storms and expensive work leave alone.
    Spare,
    /// Cofferdam with priorities, its threads in real time.
    RealTime,
    /// Cofferdam, first come first served: what it would be without its scheduler.
    Fifo,
    /// PgBouncer in transaction mode, one pool of so many connections per database.
    PgBouncer(u32),
    /// The same as two processes that share a port.
    PgBouncers(u32),
    /// HAProxy; a tenant with more requests at once has a lower priority in the queue.
    HaProxy,
    /// NGINX with a limit of requests at once per tenant, a quarter of the workers.
    Nginx,
    /// Nothing.
    Direct,
}

impl Peer {
    pub(crate) fn is_cofferdam(self) -> bool {
        matches!(self, Self::Cofferdam | Self::Plain | Self::Spare | Self::RealTime | Self::Fifo)
    }

    /// The name in tables.
    pub fn name(self) -> String {
        match self {
            Self::Cofferdam => "cofferdam".into(),
            Self::Plain => "cofferdam-plain".into(),
            Self::Spare => "cofferdam-spare".into(),
            Self::RealTime => "cofferdam-rt".into(),
            Self::Fifo => "cofferdam-fifo".into(),
            Self::PgBouncer(size) => format!("pgbouncer-{size}"),
            Self::PgBouncers(size) => format!("pgbouncer-2x{}", size / 2),
            Self::HaProxy => "haproxy".into(),
            Self::Nginx => "nginx".into(),
            Self::Direct => "direct".into(),
        }
    }
}

/// A peer that runs. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    /// Where PostgreSQL is spoken.
    pub(crate) postgres: u16,
    /// Where HTTP is spoken.
    pub(crate) http: u16,
    children: Vec<Child>,
    _files: Option<Files>,
}

/// A configuration, held until the peer has ended: dropping it removes the files.
#[derive(Debug)]
#[allow(dead_code)] // held for its Drop
enum Files {
    Plain(TempDir),
    Tenants(TenantDirectory),
}

/// What a peer is put in front of.
#[derive(Debug, Clone)]
pub(crate) struct Behind<'a> {
    /// PostgreSQL, if it is.
    pub(crate) postgres: Option<u16>,
    /// The port where Cofferdam speaks PostgreSQL when Odoo already knows it.
    pub(crate) postgres_front: Option<u16>,
    /// Odoo, if it is.
    pub(crate) http: Option<u16>,
    /// Odoo's workers.
    pub(crate) workers: u32,
    pub(crate) tenants: &'a [String],
    pub(crate) password: &'a str,
    /// PgBouncer's program.
    pub(crate) pgbouncer: PathBuf,
    /// Slots of the cluster: the most transactions at once.
    pub(crate) slots: u32,
    /// The fewest slots that adapting may leave.
    pub(crate) least_slots: u32,
    /// Whether Cofferdam sets the priorities of the server's processes.
    pub(crate) priorities: bool,
}

impl Running {
    /// Processor time that the peer's processes have used so far.
    pub(crate) fn cpu(&self) -> Duration {
        self.pids().map(cpu_of).sum()
    }

    /// Resident memory of the peer's processes, in bytes.
    pub(crate) fn resident(&self) -> u64 {
        self.pids().map(resident_of).sum()
    }

    /// The processes and what they have started themselves: NGINX works in children.
    fn pids(&self) -> impl Iterator<Item = u32> {
        let children = |pid: u32| {
            let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            text.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<u32>>()
        };
        self.children.iter().filter_map(Child::id).flat_map(move |pid| [pid].into_iter().chain(children(pid)))
    }

    /// Processes that speak HTTP on a port.
    pub(crate) fn of(children: Vec<Child>, http: u16, files: Option<TenantDirectory>) -> Self {
        Self { postgres: 0, http, children, _files: files.map(Files::Tenants) }
    }

    pub(crate) fn direct(behind: &Behind<'_>) -> Self {
        Self {
            postgres: behind.postgres.unwrap_or_default(),
            http: behind.http.unwrap_or_default(),
            children: Vec::new(),
            _files: None,
        }
    }

    pub(crate) async fn start(peer: Peer, behind: &Behind<'_>, cofferdam: &Path) -> anyhow::Result<Self> {
        match peer {
            Peer::Direct => Ok(Self::direct(behind)),
            Peer::Cofferdam | Peer::RealTime => {
                let arguments = if peer == Peer::RealTime { &["--real-time"][..] } else { &[] };
                Self::cofferdam(behind, cofferdam, arguments, "fair", behind.priorities.then_some("{}")).await
            }
            Peer::Spare => Self::cofferdam(behind, cofferdam, &[], "fair", Some("{ spare_cores: 1 }")).await,
            Peer::Plain => Self::cofferdam(behind, cofferdam, &[], "fair", None).await,
            Peer::Fifo => Self::cofferdam(behind, cofferdam, &[], "fifo", None).await,
            Peer::PgBouncer(size) => Self::pgbouncer(behind, size, 1).await,
            Peer::PgBouncers(size) => Self::pgbouncer(behind, size / 2, 2).await,
            Peer::HaProxy => Self::haproxy(behind).await,
            Peer::Nginx => Self::nginx(behind).await,
        }
    }

    async fn cofferdam(
        behind: &Behind<'_>,
        binary: &Path,
        arguments: &[&str],
        scheduling: &str,
        priorities: Option<&str>,
    ) -> anyhow::Result<Self> {
        let postgres = behind.postgres.map_or(Ok(0), |_| behind.postgres_front.map_or_else(free_port, Ok))?;
        let http = behind.http.map_or(Ok(0), |_| free_port())?;
        let mut main = String::new();
        if let Some(odoo) = behind.http {
            let (slots, expensive) = (behind.workers, behind.workers - behind.workers.div_ceil(20));
            main.push_str(&format!(
                "http: {{ listen: ['127.0.0.1:{http}'] }}\npools:\n  odoo:\n    servers: [{{ address: '127.0.0.1:{odoo}' }}]\n    \
                 slots: {slots}\n    min_slots: 4\n    expensive_slots: {expensive}\n    scheduling: {scheduling}\n"
            ));
            if let Some(priorities) = priorities {
                main.push_str(&format!("    priorities: {priorities}\n"));
            }
        }
        if let Some(server) = behind.postgres {
            let (slots, least) = (behind.slots, behind.least_slots);
            let expensive = slots - slots.div_ceil(20);
            main.push_str(&format!(
                "postgres: {{ listen: ['127.0.0.1:{postgres}'], max_connections: 12000 }}\nclusters:\n  pg:\n    address: '127.0.0.1:{server}'\n    \
                 slots: {slots}\n    min_slots: {least}\n    expensive_slots: {expensive}\n    connections: 150\n    \
                 scheduling: {scheduling}\n"
            ));
            if let Some(priorities) = priorities {
                main.push_str(&format!("    priorities: {priorities}\n"));
            }
        }
        main.push_str(
            "plans:\n  standard:\n    http: { queue: 500, max_wait: 120s }\n    postgres: { queue: 1000, max_wait: 120s }\n    \
             max_clients: 12000\n",
        );
        let directory = TenantDirectory::new(&main)?;
        for tenant in behind.tenants {
            let mut file = format!("tenant: {tenant}\nplan: standard\nplacement:\n");
            if behind.http.is_some() {
                file.push_str("  pool: odoo\n");
            }
            if behind.postgres.is_some() {
                file.push_str("  cluster: pg\n");
                let password = behind.password;
                file.push_str(&format!("database: {tenant}\nlogin: {{ role: {tenant}, password: {password} }}\n"));
            }
            if behind.http.is_some() {
                file.push_str(&format!("hosts: [{}]\n", crate::isolation::host(tenant)));
            }
            directory.tenant(tenant, &file)?;
        }
        let mut command = Command::new(binary);
        command.args(["serve", "--log", "warn", "--config"]).arg(directory.path()).args(arguments);
        let ports = [postgres, http].into_iter().filter(|p| *p != 0).collect::<Vec<_>>();
        let child = launch(command, &ports).await?;
        Ok(Self { postgres, http, children: vec![child], _files: Some(Files::Tenants(directory)) })
    }

    async fn pgbouncer(behind: &Behind<'_>, size: u32, processes: usize) -> anyhow::Result<Self> {
        let Some(server) = behind.postgres else { bail!("PgBouncer stands in front of PostgreSQL only") };
        let port = free_port()?;
        let directory = tempfile::Builder::new().prefix("cofferdam-peer-").tempdir()?;
        let password = behind.password;
        let mut users = String::new();
        let mut main = "[databases]\n".to_owned();
        for tenant in behind.tenants {
            main.push_str(&format!("{tenant} = host=127.0.0.1 port={server} dbname={tenant}\n"));
            users.push_str(&format!("\"{tenant}\" \"{password}\"\n"));
        }
        let users_file = directory.path().join("users.txt");
        main.push_str(&format!(
            "[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\n\
             auth_file = {}\npool_mode = transaction\ndefault_pool_size = {size}\nmax_client_conn = 12000\n\
             so_reuseport = {}\n{}\
             ignore_startup_parameters = extra_float_digits,options\nlog_connections = 0\nlog_disconnections = 0\n",
            users_file.display(),
            u32::from(processes > 1),
            if knows_statements(&behind.pgbouncer).await { "max_prepared_statements = 200\n" } else { "" },
        ));
        fs::write(&users_file, users)?;
        let path = directory.path().join("pgbouncer.ini");
        fs::write(&path, main)?;
        open_to_all(directory.path())?;
        let mut children = Vec::new();
        for _ in 0..processes {
            let mut command = Command::new(&behind.pgbouncer);
            command.arg("-q").arg(&path);
            if is_root() {
                command.args(["-u", "postgres"]);
            }
            children.push(launch(command, &[port]).await.context("PgBouncer (Debian: `apt-get install pgbouncer`)")?);
        }
        Ok(Self { postgres: port, http: 0, children, _files: Some(Files::Plain(directory)) })
    }

    async fn haproxy(behind: &Behind<'_>) -> anyhow::Result<Self> {
        let Some(server) = behind.http else { bail!("HAProxy stands in front of HTTP only") };
        let port = free_port()?;
        let workers = behind.workers;
        let text = format!(
            "global\n  maxconn 4000\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 120s\n  timeout server 120s\n  \
             timeout queue 120s\nfrontend front\n  bind 127.0.0.1:{port}\n  \
             stick-table type string len 64 size 10k expire 60s store conn_cur\n  \
             http-request track-sc0 req.hdr(host)\n  http-request set-priority-class sc_conn_cur(0)\n  \
             default_backend odoo\nbackend odoo\n  server odoo 127.0.0.1:{server} maxconn {workers}\n"
        );
        Self::web(port, "haproxy.cfg", &text, |path| {
            let mut command = Command::new("haproxy");
            command.args(["-db", "-q", "-f"]).arg(path);
            command
        })
        .await
        .context("HAProxy (Debian: `apt-get install haproxy`)")
    }

    async fn nginx(behind: &Behind<'_>) -> anyhow::Result<Self> {
        let Some(server) = behind.http else { bail!("NGINX stands in front of HTTP only") };
        let port = free_port()?;
        let limit = (behind.workers / 4).max(1);
        let text = format!(
            "daemon off;\nworker_processes auto;\npid nginx.pid;\nerror_log stderr crit;\nevents {{ worker_connections 2000; }}\n\
             http {{\n  access_log off;\n  client_body_temp_path tmp;\n  proxy_temp_path tmp;\n  fastcgi_temp_path tmp;\n  \
             uwsgi_temp_path tmp;\n  scgi_temp_path tmp;\n  limit_conn_zone $host zone=tenants:1m;\n  server {{\n    \
             listen 127.0.0.1:{port} backlog=1024;\n    limit_conn tenants {limit};\n    location / {{\n      \
             proxy_pass http://127.0.0.1:{server};\n      proxy_set_header Host $host;\n      proxy_read_timeout 120s;\n    }}\n  \
             }}\n}}\n"
        );
        Self::web(port, "nginx.conf", &text, |path| {
            let mut command = Command::new("nginx");
            command.arg("-p").arg(path.parent().unwrap_or(path)).arg("-c").arg(path).args(["-e", "stderr"]);
            command
        })
        .await
        .context("NGINX (Debian: `apt-get install nginx-light`)")
    }

    async fn web(port: u16, name: &str, text: &str, command: impl FnOnce(&Path) -> Command) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("cofferdam-peer-").tempdir()?;
        open_to_all(directory.path())?;
        let path = directory.path().join(name);
        fs::write(&path, text)?;
        let child = launch(command(&path), &[port]).await?;
        Ok(Self { postgres: 0, http: port, children: vec![child], _files: Some(Files::Plain(directory)) })
    }
}

impl Drop for Running {
    /// NGINX's workers do not notice when their parent is killed.
    fn drop(&mut self) {
        let pids: Vec<String> = self.pids().map(|pid| pid.to_string()).collect();
        if !pids.is_empty() {
            let _ = std::process::Command::new("kill").arg("-TERM").args(pids).stderr(Stdio::null()).status();
        }
    }
}

/// Whether this PgBouncer carries prepared statements from one server connection to another: from 1.21 on.
pub(crate) async fn knows_statements(program: &Path) -> bool {
    let output = Command::new(program).arg("--version").output().await;
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let minor = text.split_whitespace().nth(1).and_then(|version| version.split('.').nth(1)?.parse::<u32>().ok());
    minor.is_some_and(|minor| minor >= 21)
}

/// Starts a program and waits until it listens.
pub(crate) async fn launch(mut command: Command, ports: &[u16]) -> anyhow::Result<Child> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true);
    let mut child = command.spawn().context("it cannot be started")?;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    for port in ports {
        while tokio::net::TcpStream::connect(("127.0.0.1", *port)).await.is_err() {
            if let Some(status) = child.try_wait()? {
                bail!("it ended at once: {status}");
            }
            if tokio::time::Instant::now() > deadline {
                bail!("it does not listen");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(child)
}

/// Peers drop their privileges and must still read their files.
pub(crate) fn open_to_all(directory: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let mode = if entry.file_type()?.is_dir() { 0o755 } else { 0o644 };
        fs::set_permissions(entry.path(), fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

/// Processor time of a process and all its threads, from the kernel's accounting in ticks of a hundredth of a second.
pub(crate) fn cpu_of(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may contain anything; what counts comes after it: the state, and eleven fields later utime
    // and stime.
    let fields = stat.rsplit(')').next().unwrap_or("").split_whitespace().skip(11).take(2);
    let ticks: u64 = fields.filter_map(|f| f.parse::<u64>().ok()).sum();
    Duration::from_millis(10 * ticks)
}

pub(crate) fn resident_of(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or("");
    line.split_whitespace().next().and_then(|kb| kb.parse::<u64>().ok()).unwrap_or(0) << 10
}
