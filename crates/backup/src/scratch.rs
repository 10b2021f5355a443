//! A private PostgreSQL for a drill or a recovery: on a socket that nobody else can reach, gone when its purpose is.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::Error;
use crate::server::Server;

/// A running server, stopped and removed when it is dropped, and also when this process is killed.
pub(crate) struct ScratchCluster {
    place: Place,
    keeper: Option<Child>,
    pub(crate) server: Server,
}

const START: Duration = Duration::from_secs(60);

/// A directory for a server, and whom the server runs as.
pub(crate) struct Place {
    directory: TempDir,
    account: Option<(u32, u32)>,
    programs: PathBuf,
}

impl Place {
    /// A directory below `place`, or where temporary files are, that nobody else can look into.
    pub(crate) fn new(programs: Option<&Path>, place: Option<&Path>) -> Result<Self, Error> {
        let programs = server_programs(programs)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix("cofferdam-scratch-");
        let made = place.map_or_else(|| builder.tempdir(), |place| builder.tempdir_in(place));
        let directory = made.map_err(|e| Error::files(place.unwrap_or(Path::new("temporary directory")), &e))?;
        let root = directory.path();
        // PostgreSQL refuses to run as root.
        let account = unprivileged()?;
        if let Some((uid, gid)) = account {
            std::os::unix::fs::chown(root, Some(uid), Some(gid)).map_err(|e| Error::files(root, &e))?;
        }
        fs::set_permissions(root, fs::Permissions::from_mode(0o700)).map_err(|e| Error::files(root, &e))?;
        Ok(Self { directory, account, programs })
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path().join("data")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path().join("log")
    }

    /// A program that runs as the server's account.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        if let Some((uid, gid)) = self.account {
            command.uid(uid).gid(gid);
        }
        command.current_dir(self.path()).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// Starts a server on the data directory, with nothing but a socket here to reach it by.
    pub(crate) fn start(self, settings: &[(&str, &str)]) -> Result<ScratchCluster, Error> {
        let script = r#"program="$1" log="$2" root="$3"; shift 3; "$program" "$@" >"$log" 2>&1 & server=$!
                        read -r word; kill -QUIT $server; wait $server; [ "$word" = stop ] || rm -rf "$root""#;
        let root = self.path().to_owned();
        let mut command = self.command("/bin/sh");
        command.args(["-c", script, "sh"]).arg(self.programs.join("postgres")).arg(self.log()).arg(&root);
        command.arg("-D").arg(self.data());
        let directory = root.display().to_string();
        // Nothing here outlives its purpose, so that nothing needs to be safe from a crash.
        let always = [
            ("listen_addresses", ""),
            ("unix_socket_directories", directory.as_str()),
            ("unix_socket_permissions", "0700"),
            ("port", "5432"),
            ("fsync", "off"),
            ("full_page_writes", "off"),
            ("synchronous_commit", "off"),
            ("autovacuum", "off"),
            ("max_wal_size", "4GB"),
            ("maintenance_work_mem", "256MB"),
            ("logging_collector", "off"),
            ("log_destination", "stderr"),
        ];
        for (name, value) in always.iter().chain(settings) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let keeper = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|e| Error::Program { program: "postgres".to_owned(), reason: e.to_string() })?;
        let mut server = Server::new(directory, 5432, "postgres", None);
        server.programs = Some(self.programs.clone());
        Ok(ScratchCluster { place: self, keeper: Some(keeper), server })
    }
}

impl ScratchCluster {
    /// Creates and starts an empty server below `place`. Blocks for a second or two.
    pub(crate) fn fresh(programs: Option<&Path>, place: Option<&Path>) -> Result<Self, Error> {
        let place = Place::new(programs, place)?;
        let failed = |program: &str, reason: String| Error::Program { program: program.to_owned(), reason };
        let output = place
            .command(place.programs.join("initdb"))
            .args(["--no-sync", "--no-instructions", "--username=postgres", "--encoding=UTF8", "--locale=C"])
            .args(["--auth-local=trust", "--auth-host=reject", "--pgdata"])
            .arg(place.data())
            .output()
            .map_err(|e| failed("initdb", e.to_string()))?;
        if !output.status.success() {
            return Err(failed("initdb", String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        let cluster = place.start(&[])?;
        let started = Instant::now();
        let ready = || {
            let check = Command::new(cluster.place.programs.join("pg_isready"))
                .arg("-q")
                .arg("-h")
                .arg(cluster.path())
                .status();
            check.is_ok_and(|status| status.success())
        };
        while !ready() {
            let text = cluster.log();
            // Whoever asks too early is told so with FATAL as well.
            let failed_to_start = text.lines().any(|line| line.contains("FATAL") && !line.contains("is starting up"));
            if failed_to_start || started.elapsed() > START {
                let words: Vec<&str> = text.lines().rev().take(3).collect();
                return Err(failed("postgres", words.join("; ")));
            }
            pause();
        }
        Ok(cluster)
    }

    /// What the server has logged.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.place.log()).unwrap_or_default()).into_owned()
    }

    /// Whether the server has ended by itself.
    pub(crate) fn has_ended(&self) -> bool {
        !self.place.data().join("postmaster.pid").exists()
    }

    pub(crate) fn path(&self) -> &Path {
        self.place.path()
    }
}

impl Drop for ScratchCluster {
    fn drop(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            if let Some(mut stdin) = keeper.stdin.take() {
                let _ = stdin.write_all(b"stop\n");
            }
            let _ = keeper.wait();
        }
    }
}

/// A program that runs as the account of servers, in a directory that it can read.
pub(crate) fn unprivileged_command(program: &Path) -> Result<Command, Error> {
    let mut command = Command::new(program);
    if let Some((uid, gid)) = unprivileged()? {
        command.uid(uid).gid(gid);
    }
    command.current_dir("/").env("LC_ALL", "C").stdin(Stdio::null());
    Ok(command)
}

/// The directory of `initdb` and `postgres`: the given one, or the newest that Debian has installed.
fn server_programs(given: Option<&Path>) -> Result<PathBuf, Error> {
    if let Some(given) = given.filter(|path| path.join("initdb").exists()) {
        return Ok(given.to_owned());
    }
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, path): &(u32, PathBuf)| path.join("initdb").exists())
        .collect();
    found.sort();
    found.pop().map(|(_, path)| path).ok_or_else(|| Error::Program {
        program: "initdb".to_owned(),
        reason: "it was not found; this needs PostgreSQL's server programs (say where in the server's `programs`)"
            .to_owned(),
    })
}

/// Whom to run the server as, when we are root.
fn unprivileged() -> Result<Option<(u32, u32)>, Error> {
    let me = fs::metadata("/proc/self").map_err(|e| Error::files(Path::new("/proc/self"), &e))?;
    if me.uid() != 0 {
        return Ok(None);
    }
    let accounts = fs::read_to_string("/etc/passwd").map_err(|e| Error::files(Path::new("/etc/passwd"), &e))?;
    let find = |name: &str| {
        accounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            match fields[..] {
                [account, _, uid, gid, ..] if account == name => Some((uid.parse().ok()?, gid.parse().ok()?)),
                _ => None,
            }
        })
    };
    let found = find("postgres").or_else(|| find("nobody"));
    found.map(Some).ok_or_else(|| Error::Refused("PostgreSQL does not run as root; run this as another user".into()))
}

#[allow(clippy::disallowed_methods)] // called from a thread that may wait; the server signals nothing
fn pause() {
    std::thread::sleep(Duration::from_millis(30));
}
