//! pgBackRest, as a program.
//!
//! Everything is said on its command line, with `--no-config`: what it would find in files of the machine's is somebody
//! else's. Several of its commands succeed when there is nothing; what they print is what counts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::wal::Archive;
use crate::Error;
use crate::plan::RecoverabilityWindow;
use crate::scratch::unprivileged_command;

/// What makes backups of a whole cluster and its log, and gives one database's files back. Everything blocks.
///
/// Restored files belong to the account that PostgreSQL's private servers run as: `postgres`, or `nobody`, when the
/// caller is root.
pub trait PhysicalEngine: std::fmt::Debug + Send + Sync {
    /// Makes a backup of the whole cluster.
    fn backup(&self, kind: BackupKind) -> Result<(), Error>;

    /// What there is: backups and archived log. May read a long list.
    fn stanza(&self) -> Result<Stanza, Error>;

    /// Restores one database's files, and those that no server runs without, and leaves a configuration with which a server
    /// that is started there replays the log up to an instant and is then open.
    fn restore(&self, into: &RecoveryPlace<'_>, label: &str, database: &str, at: Timestamp) -> Result<(), Error>;

    /// What can be recovered of the cluster, and so of every tenant on it.
    fn window(&self) -> Result<RecoverabilityWindow, Error> {
        let stanza = self.stanza()?;
        Ok(stanza.archive.window(&stanza.backups))
    }
}

/// Where files are restored to.
#[derive(Debug, Clone, Copy)]
pub struct RecoveryPlace<'a> {
    /// A private directory, for whatever else is needed.
    pub root: &'a Path,
    /// The data directory, below it. Not there yet.
    pub data: &'a Path,
}

/// How much a backup copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupKind {
    /// Everything.
    Full,
    /// What has changed since the last full one.
    Differential,
    /// What has changed since the last one.
    Incremental,
}

/// A stanza of pgBackRest: one cluster and its repository.
#[derive(Debug, Clone)]
pub struct PgBackRest {
    /// The program.
    pub program: PathBuf,
    /// The stanza.
    pub stanza: String,
    /// Where the repository is: `--repo1-path=…`, and whatever else it needs. No secrets: those it takes from the
    /// environment, as `PGBACKREST_REPO1_CIPHER_PASS`.
    pub repository: Vec<String>,
    /// The cluster, for backups: `--pg1-path=…`, `--pg1-port=…`, `--pg1-socket-path=…`, `--pg1-user=…`.
    pub cluster: Vec<String>,
    /// What only backups want: `--compress-type=…`, `--repo1-bundle`, `--repo1-retention-full=…`. The program refuses
    /// options that a command does not know.
    pub backup_options: Vec<String>,
    /// A directory for its locks that the account it runs as may write to.
    pub locks: PathBuf,
}

/// A backup of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhysicalBackup {
    /// Its name.
    pub label: String,
    /// `full`, `diff` or `incr`.
    pub kind: String,
    /// When it began.
    pub started: Timestamp,
    /// When it was complete: the first instant that can be reached from it.
    pub stopped: Timestamp,
    /// The first segment of the log that it needs.
    pub first_segment: String,
    /// It met pages with wrong checksums.
    pub error: bool,
}

/// What a stanza has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stanza {
    /// Backups, oldest first.
    pub backups: Vec<PhysicalBackup>,
    /// The archived log.
    pub archive: Archive,
}

#[derive(Deserialize)]
struct Info {
    status: Status,
    #[serde(default)]
    backup: Vec<InfoBackup>,
    #[serde(default)]
    archive: Vec<InfoArchive>,
}

#[derive(Deserialize)]
struct Status {
    code: i64,
    message: String,
}

#[derive(Deserialize)]
struct InfoBackup {
    label: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    error: Option<bool>,
    timestamp: InfoTime,
    archive: InfoSegments,
}

#[derive(Deserialize)]
struct InfoTime {
    start: i64,
    stop: i64,
}

#[derive(Deserialize)]
struct InfoSegments {
    start: Option<String>,
}

#[derive(Deserialize)]
struct InfoArchive {
    id: String,
}

#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    time: i64,
}

impl PgBackRest {
    /// Prepares the repository for the cluster. May be repeated.
    pub fn create_stanza(&self) -> Result<(), Error> {
        self.run(true, &["stanza-create"]).map(drop)
    }
}

impl PhysicalEngine for PgBackRest {
    fn backup(&self, kind: BackupKind) -> Result<(), Error> {
        let kind = match kind {
            BackupKind::Full => "--type=full",
            BackupKind::Differential => "--type=diff",
            BackupKind::Incremental => "--type=incr",
        };
        let mut arguments = vec![kind, "--start-fast"];
        arguments.extend(self.backup_options.iter().map(String::as_str));
        arguments.push("backup");
        self.run(true, &arguments).map(drop)
    }

    fn stanza(&self) -> Result<Stanza, Error> {
        let text = self.run(false, &["--output=json", "info"])?;
        let stanzas: Vec<Info> = self.parse(&text)?;
        let Some(info) = stanzas.into_iter().next().filter(|info| info.status.code != 1) else {
            return Err(self.failed(format!("there is no stanza {}", self.stanza)));
        };
        if info.status.code != 0 && info.status.code != 2 {
            return Err(self.failed(format!("stanza {}: {}", self.stanza, info.status.message)));
        }
        let mut segments = Vec::new();
        for InfoArchive { id } in info.archive {
            let path = format!("archive/{}/{id}", self.stanza);
            let text = self.run(false, &["--output=json", "--recurse", "repo-ls", &path])?;
            let listed: BTreeMap<String, Listed> = self.parse(&text)?;
            segments.extend(listed.into_iter().filter_map(|(name, Listed { time })| {
                // `0000000100000000/000000010000000000000003-<sha1>.lz4`
                let file = name.rsplit('/').next()?;
                let (segment, rest) = file.split_at_checked(24)?;
                let whole = rest.strip_prefix('-').is_some_and(|r| r.len() >= 40 && r.is_char_boundary(40));
                whole.then(|| Some((segment.to_owned(), Timestamp::from_second(time).ok()?)))?
            }));
        }
        let time = |seconds| Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH);
        let backups = info.backup.into_iter().map(|backup| PhysicalBackup {
            label: backup.label,
            kind: backup.kind,
            started: time(backup.timestamp.start),
            stopped: time(backup.timestamp.stop),
            first_segment: backup.archive.start.unwrap_or_default(),
            error: backup.error.unwrap_or(false),
        });
        Ok(Stanza { backups: backups.collect(), archive: Archive::new(segments) })
    }

    fn restore(&self, into: &RecoveryPlace<'_>, label: &str, database: &str, at: Timestamp) -> Result<(), Error> {
        let (data, locks) = (into.data.display(), into.root.join("locks").display().to_string());
        // What the program writes for itself would lack half of what it was told.
        let mut fetch =
            vec![self.program.display().to_string(), "--no-config".into(), format!("--stanza={}", self.stanza)];
        fetch.extend(self.repository.iter().cloned());
        fetch.push(format!("--pg1-path={data}"));
        fetch.push(format!("--lock-path={locks}"));
        fetch.extend(["--log-level-file=off", "--log-level-console=off", "archive-get"].map(str::to_owned));
        let fetch = fetch.iter().map(|word| shell(word)).collect::<Vec<_>>().join(" ");
        let target = at.strftime("%Y-%m-%d %H:%M:%S.%6f+00");
        let mut command = self.command()?;
        command.arg(format!("--lock-path={locks}"));
        command.args([format!("--pg1-path={data}"), format!("--set={label}"), format!("--db-include={database}")]);
        command.args(["--type=time", "--target-action=promote", "--archive-mode=off"]);
        command.arg(format!("--target={target}"));
        command.arg(format!("--recovery-option=restore_command={fetch} %f \"%p\""));
        command.arg("restore");
        self.finish(command).map(drop)
    }
}

impl PgBackRest {
    fn command(&self) -> Result<Command, Error> {
        // As the account that PostgreSQL runs as: what it writes must be readable to it.
        let mut command = unprivileged_command(&self.program)?;
        command.arg("--no-config").arg(format!("--stanza={}", self.stanza)).args(&self.repository);
        command.args(["--log-level-file=off", "--log-level-console=off", "--log-level-stderr=warn"]);
        Ok(command)
    }

    fn run(&self, with_cluster: bool, arguments: &[&str]) -> Result<String, Error> {
        let mut command = self.command()?;
        if with_cluster {
            command.args(&self.cluster).arg(format!("--lock-path={}", self.locks.display()));
        }
        command.args(arguments);
        self.finish(command)
    }

    fn finish(&self, mut command: Command) -> Result<String, Error> {
        let output = command.output().map_err(|e| self.failed(e.to_string()))?;
        if output.status.success() {
            return String::from_utf8(output.stdout).map_err(|e| self.failed(e.to_string()));
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let words: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        Err(self.failed(if words.is_empty() { output.status.to_string() } else { words.join(" ") }))
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, text: &str) -> Result<T, Error> {
        serde_json::from_str(text).map_err(|e| self.failed(format!("what it prints is not understood: {e}")))
    }

    fn failed(&self, reason: String) -> Error {
        Error::Program { program: self.program.display().to_string(), reason }
    }
}

/// A word for the shell that runs a `restore_command`.
fn shell(word: &str) -> String {
    let plain = word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_=./:,@+".contains(&b));
    // A per cent sign has a meaning to PostgreSQL.
    let word = word.replace('%', "%%");
    if plain { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
}
