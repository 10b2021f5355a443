//! A private PostgreSQL cluster in a temporary directory.
//!
//! PostgreSQL refuses to run as root. When the tests do, the server runs as the `postgres` or `nobody` user.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use crate::{TestkitError, io};

/// The superuser's name and password.
pub const SUPERUSER: (&str, &str) = ("postgres", "super-secret");
const START_LIMIT: Duration = Duration::from_secs(60);

/// How a cluster shall be set up.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// `scram-sha-256`, `md5` or `trust`.
    pub auth: &'static str,
    /// Lines for `postgresql.conf`.
    pub settings: Vec<String>,
    /// Certificate and key in PEM, for a server with TLS.
    pub tls: Option<(String, String)>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self { auth: "scram-sha-256", settings: Vec::new(), tls: None }
    }
}

/// A running cluster. Stops and disappears when dropped, and when the process dies.
#[derive(Debug)]
pub struct Cluster {
    binaries: PathBuf,
    directory: TempDir,
    port: u16,
    owner: Option<Owner>,
    /// A shell that stops the server when it is told to, or when its standard input ends: then it also removes the
    /// directory, so even a killed test leaves nothing behind.
    keeper: Option<Child>,
}

#[derive(Debug, Clone, Copy)]
struct Owner {
    uid: u32,
    gid: u32,
}

impl Cluster {
    /// Creates and starts a cluster with the usual options.
    pub fn start() -> Result<Self, TestkitError> {
        Self::start_with(&ClusterOptions::default())
    }

    /// Creates and starts a cluster.
    pub fn start_with(options: &ClusterOptions) -> Result<Self, TestkitError> {
        let binaries = binaries()?;
        let directory =
            tempfile::Builder::new().prefix("cofferdam-pg-").tempdir().map_err(io("temporary directory"))?;
        let owner = unprivileged()?;
        if let Some(Owner { uid, gid }) = owner {
            std::os::unix::fs::chown(directory.path(), Some(uid), Some(gid)).map_err(io("chown"))?;
        }
        let mut cluster = Self { binaries, directory, port: 0, owner, keeper: None };
        cluster.initialise(options)?;
        // A free port may be taken by somebody else before the server binds it: try another.
        for attempt in 0..5 {
            cluster.port = free_port()?;
            match cluster.launch() {
                Ok(()) => return Ok(cluster),
                Err(error) if attempt == 4 => return Err(error),
                Err(_) => {}
            }
        }
        Ok(cluster)
    }

    /// A standby that follows this cluster, with a copy of its data.
    pub fn standby(&self) -> Result<Self, TestkitError> {
        let directory =
            tempfile::Builder::new().prefix("cofferdam-pg-").tempdir().map_err(io("temporary directory"))?;
        if let Some(Owner { uid, gid }) = self.owner {
            std::os::unix::fs::chown(directory.path(), Some(uid), Some(gid)).map_err(io("chown"))?;
        }
        let mut standby =
            Self { binaries: self.binaries.clone(), directory, port: free_port()?, owner: self.owner, keeper: None };
        let output = standby
            .as_owner(self.binaries.join("pg_basebackup"))
            .env("PGPASSWORD", SUPERUSER.1)
            .args(["-h", "127.0.0.1", "-U", SUPERUSER.0, "-p", &self.port.to_string()])
            .args(["--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync", "-D"])
            .arg(standby.data())
            .output()
            .map_err(io("pg_basebackup"))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(TestkitError::Failed { program: "pg_basebackup".into(), output: text });
        }
        standby.launch()?;
        Ok(standby)
    }

    /// Makes a primary of a standby.
    pub async fn promote(&self) -> Result<(), TestkitError> {
        self.admin("postgres").await?.execute("SELECT pg_promote(true, 60)", &[]).await?;
        Ok(())
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Stops the server the hard way: clients see their connections break.
    pub fn kill(&mut self) {
        self.keeper = self.keeper.take().and_then(|mut keeper| {
            tell_to_stop(&mut keeper);
            None
        });
    }

    /// Starts a stopped server again, on the same port and with the same data.
    pub fn launch(&mut self) -> Result<(), TestkitError> {
        let data = self.data();
        let log = self.directory.path().join("log");
        let script = r#"
            "$1/postgres" -D "$2" -p "$3" >>"$4" 2>&1 &
            server=$!
            read -r word
            kill -QUIT $server 2>/dev/null
            wait $server
            [ "$word" = stop ] || rm -rf "$5""#;
        let mut command = self.as_owner("/bin/sh");
        command.args(["-c", script, "sh"]).arg(&self.binaries).arg(&data).arg(self.port.to_string()).arg(&log);
        command.arg(self.directory.path());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let mut keeper = command.spawn().map_err(io("starting PostgreSQL"))?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if self.is_ready() {
                self.keeper = Some(keeper);
                return Ok(());
            }
            let log = fs::read_to_string(&log).unwrap_or_default();
            let failed = log.contains("could not create any TCP/IP sockets") || log.contains("FATAL:  lock file");
            if failed || Instant::now() > deadline {
                tell_to_stop(&mut keeper);
                let tail: String = log.lines().rev().take(15).collect::<Vec<_>>().join("\n");
                let _ = fs::remove_file(self.directory.path().join("log"));
                return Err(TestkitError::Failed { program: "postgres".into(), output: tail });
            }
            pause();
        }
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// A superuser's connection, directly to the server.
    pub async fn admin(&self, database: &str) -> Result<Client, TestkitError> {
        self.connect(SUPERUSER.0, SUPERUSER.1, database).await
    }

    /// A connection directly to the server.
    pub async fn connect(&self, user: &str, password: &str, database: &str) -> Result<Client, TestkitError> {
        connect(self.port, user, password, database).await
    }

    /// Makes a role that may log in.
    pub async fn create_role(&self, role: &str, password: &str) -> Result<(), TestkitError> {
        let admin = self.admin("postgres").await?;
        admin.batch_execute(&format!("CREATE ROLE \"{role}\" LOGIN PASSWORD '{password}'")).await?;
        Ok(())
    }

    /// Makes a database.
    pub async fn create_database(&self, database: &str, owner: &str) -> Result<(), TestkitError> {
        let admin = self.admin("postgres").await?;
        admin.batch_execute(&format!("CREATE DATABASE \"{database}\" OWNER \"{owner}\"")).await?;
        Ok(())
    }

    fn initialise(&self, options: &ClusterOptions) -> Result<(), TestkitError> {
        let password = self.directory.path().join("password");
        self.write(&password, SUPERUSER.1, 0o600)?;
        let data = self.data();
        let output = self
            .as_owner(self.binaries.join("initdb"))
            .args(["--no-sync", "--no-instructions", "--username", SUPERUSER.0, "--encoding=UTF8", "--locale=C"])
            .arg(format!("--auth={}", options.auth))
            .arg("--pwfile")
            .arg(&password)
            .arg("--pgdata")
            .arg(&data)
            .args((options.auth == "md5").then_some("--set=password_encryption=md5"))
            .output()
            .map_err(io("initdb"))?;
        // `--set` came with PostgreSQL 16: without it, say it in the file before the password is set again.
        let output = if !output.status.success() && options.auth == "md5" {
            let _ = fs::remove_dir_all(&data);
            self.as_owner(self.binaries.join("initdb"))
                .args(["--no-sync", "--no-instructions", "--username", SUPERUSER.0, "--encoding=UTF8", "--locale=C"])
                .arg("--auth=md5")
                .arg("--pwfile")
                .arg(&password)
                .arg("--pgdata")
                .arg(&data)
                .output()
                .map_err(io("initdb"))?
        } else {
            output
        };
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(TestkitError::Failed { program: "initdb".into(), output: text });
        }
        let mut settings = vec![
            "listen_addresses = '127.0.0.1'".to_owned(),
            format!("unix_socket_directories = '{}'", self.directory.path().display()),
            "fsync = off".into(),
            "synchronous_commit = off".into(),
            "full_page_writes = off".into(),
            "max_connections = 200".into(),
            "shared_buffers = 32MB".into(),
            "logging_collector = off".into(),
        ];
        if options.auth == "md5" {
            settings.push("password_encryption = md5".into());
        }
        if let Some((certificate, key)) = &options.tls {
            self.write(&data.join("server.crt"), certificate, 0o600)?;
            self.write(&data.join("server.key"), key, 0o600)?;
            settings.push("ssl = on".into());
        }
        settings.extend(options.settings.iter().cloned());
        let file = data.join("postgresql.conf");
        let mut file = fs::OpenOptions::new().append(true).open(file).map_err(io("postgresql.conf"))?;
        file.write_all(format!("\n{}\n", settings.join("\n")).as_bytes()).map_err(io("postgresql.conf"))
    }

    fn write(&self, path: &Path, text: &str, mode: u32) -> Result<(), TestkitError> {
        fs::write(path, text).map_err(io(path.display().to_string()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io("chmod"))?;
        if let Some(Owner { uid, gid }) = self.owner {
            std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(io("chown"))?;
        }
        Ok(())
    }

    /// Where its Unix socket is.
    pub fn socket_directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its data directory.
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn is_ready(&self) -> bool {
        Command::new(self.binaries.join("pg_isready"))
            .args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()])
            .status()
            .is_ok_and(|s| s.success())
    }

    fn as_owner(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        if let Some(Owner { uid, gid }) = self.owner {
            command.uid(uid).gid(gid);
        }
        command.current_dir(self.directory.path()).env("LC_ALL", "C");
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Connects to a PostgreSQL server, or to a gateway that speaks like one, on 127.0.0.1.
pub async fn connect(port: u16, user: &str, password: &str, database: &str) -> Result<Client, TestkitError> {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port).user(user).password(password).dbname(database);
    config.application_name("testkit").connect_timeout(Duration::from_secs(20));
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(client)
}

/// The directory with PostgreSQL's server programs: the newest version installed.
pub fn binaries() -> Result<PathBuf, TestkitError> {
    if let Some(given) = std::env::var_os("COFFERDAM_POSTGRES_BIN") {
        return Ok(given.into());
    }
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            let bin = entry.path().join("bin");
            bin.join("initdb").exists().then_some((version, bin))
        })
        .collect();
    found.sort();
    if let Some((_, bin)) = found.pop() {
        return Ok(bin);
    }
    let on_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).find(|dir| dir.join("initdb").exists() && dir.join("postgres").exists())
    });
    on_path.ok_or_else(|| TestkitError::Missing {
        what: "a PostgreSQL server (initdb, postgres)".into(),
        hint: "install it (Debian: `apt-get install postgresql`), or set COFFERDAM_POSTGRES_BIN to its directory"
            .into(),
    })
}

/// Whom to run the server as: `None` for ourselves, when that is not root.
fn unprivileged() -> Result<Option<Owner>, TestkitError> {
    let me = fs::metadata("/proc/self").map_err(io("/proc/self"))?;
    if std::os::unix::fs::MetadataExt::uid(&me) != 0 {
        return Ok(None);
    }
    let accounts = fs::read_to_string("/etc/passwd").map_err(io("/etc/passwd"))?;
    let find = |name: &str| {
        accounts.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (account, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            (account == name).then_some(Owner { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
        })
    };
    find("postgres").or_else(|| find("nobody")).map(Some).ok_or_else(|| TestkitError::Missing {
        what: "an unprivileged account to run PostgreSQL as".into(),
        hint: "run the tests as a user other than root".into(),
    })
}

/// A port on 127.0.0.1 that nobody listens on now.
pub fn free_port() -> Result<u16, TestkitError> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(io("free port"))?;
    Ok(listener.local_addr().map_err(io("free port"))?.port())
}

/// Ends the server and keeps its directory. A keeper that is told nothing, because this process has died, removes it.
fn tell_to_stop(keeper: &mut Child) {
    if let Some(mut stdin) = keeper.stdin.take() {
        let _ = stdin.write_all(b"stop\n");
    }
    let _ = keeper.wait();
}

#[allow(clippy::disallowed_methods)] // start-up of a server that signals nothing; no runtime is assumed here
fn pause() {
    std::thread::sleep(Duration::from_millis(30));
}
