//! A private PostgreSQL for a drill: on a socket that nobody else can reach, gone when the drill is.

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
pub(super) struct ScratchCluster {
    directory: TempDir,
    keeper: Option<Child>,
    pub(super) server: Server,
}

const START: Duration = Duration::from_secs(60);

impl ScratchCluster {
    /// Creates and starts a server below `place`. Blocks for a second or two.
    pub(super) fn start(programs: Option<&Path>, place: Option<&Path>) -> Result<Self, Error> {
        let programs = server_programs(programs)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix("cofferdam-drill-");
        let made = place.map_or_else(|| builder.tempdir(), |place| builder.tempdir_in(place));
        let directory = made.map_err(|e| Error::files(place.unwrap_or(Path::new("temporary directory")), &e))?;
        let root = directory.path().to_owned();
        // PostgreSQL refuses to run as root.
        let account = unprivileged()?;
        if let Some((uid, gid)) = account {
            std::os::unix::fs::chown(&root, Some(uid), Some(gid)).map_err(|e| Error::files(&root, &e))?;
        }
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).map_err(|e| Error::files(&root, &e))?;
        let run = |program: &Path| {
            let mut command = Command::new(program);
            if let Some((uid, gid)) = account {
                command.uid(uid).gid(gid);
            }
            command.current_dir(&root).env("LC_ALL", "C");
            command
        };
        let failed = |program: &str, reason: String| Error::Program { program: program.to_owned(), reason };
        let output = run(&programs.join("initdb"))
            .args(["--no-sync", "--no-instructions", "--username=postgres", "--encoding=UTF8", "--locale=C"])
            .args(["--auth-local=trust", "--auth-host=reject", "--pgdata"])
            .arg(root.join("data"))
            .output()
            .map_err(|e| failed("initdb", e.to_string()))?;
        if !output.status.success() {
            return Err(failed("initdb", String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        // Nothing here outlives the drill, so that nothing needs to be safe from a crash.
        let settings = "listen_addresses = ''\nunix_socket_permissions = 0700\nfsync = off\nfull_page_writes = off\n\
                        synchronous_commit = off\nautovacuum = off\nmax_wal_size = 4GB\nmaintenance_work_mem = 256MB\n";
        let file = root.join("data/postgresql.conf");
        let append = fs::OpenOptions::new().append(true).open(&file);
        append
            .and_then(|mut f| write!(f, "\n{settings}unix_socket_directories = '{}'\n", root.display()))
            .map_err(|e| Error::files(&file, &e))?;
        let script = r#""$1" -D "$2" >"$3" 2>&1 & server=$!; read -r word; kill -QUIT $server; wait $server
                        [ "$word" = stop ] || rm -rf "$4""#;
        let log = root.join("log");
        let keeper = run(Path::new("/bin/sh"))
            .args(["-c", script, "sh"])
            .arg(programs.join("postgres"))
            .arg(root.join("data"))
            .arg(&log)
            .arg(&root)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|e| failed("postgres", e.to_string()))?;
        let mut server = Server::new(root.display().to_string(), 5432, "postgres", None);
        server.programs = Some(programs.clone());
        let cluster = Self { directory, keeper: Some(keeper), server };
        let started = Instant::now();
        let ready = || {
            let check = Command::new(programs.join("pg_isready")).arg("-q").arg("-h").arg(&root).status();
            check.is_ok_and(|status| status.success())
        };
        while !ready() {
            let text = fs::read_to_string(&log).unwrap_or_default();
            if text.contains("FATAL") || started.elapsed() > START {
                let words: Vec<&str> = text.lines().rev().take(3).collect();
                return Err(failed("postgres", words.join("; ")));
            }
            pause();
        }
        Ok(cluster)
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
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
        reason: "it was not found; a drill needs PostgreSQL's server programs (say where in the server's `programs`)"
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
    found
        .map(Some)
        .ok_or_else(|| Error::Refused("a drill cannot run PostgreSQL as root; run it as another user".into()))
}

#[allow(clippy::disallowed_methods)] // called from a thread that may wait; the server signals nothing
fn pause() {
    std::thread::sleep(Duration::from_millis(30));
}
