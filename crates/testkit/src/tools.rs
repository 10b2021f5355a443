//! Client programs that tests run against the gateway.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use crate::TestkitError;
use crate::postgres::binaries;

/// What a program printed, and whether it succeeded.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit status 0.
    pub success: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Whom to connect as, and where.
#[derive(Debug, Clone)]
pub struct Target {
    /// Port on 127.0.0.1.
    pub port: u16,
    /// Role.
    pub user: String,
    /// Password.
    pub password: String,
    /// Database.
    pub database: String,
}

impl Target {
    /// A target.
    pub fn new(port: u16, user: &str, password: &str, database: &str) -> Self {
        Self { port, user: user.into(), password: password.into(), database: database.into() }
    }

    /// The environment that libpq reads.
    pub fn environment(&self) -> [(&'static str, String); 6] {
        [
            ("PGHOST", "127.0.0.1".to_owned()),
            ("PGPORT", self.port.to_string()),
            ("PGUSER", self.user.clone()),
            ("PGPASSWORD", self.password.clone()),
            ("PGDATABASE", self.database.clone()),
            ("PGCONNECT_TIMEOUT", "20".to_owned()),
        ]
    }
}

/// A program of PostgreSQL's (`psql`, `pgbench`), aimed at a target.
pub fn postgres_tool(name: &str, target: &Target) -> Result<Command, TestkitError> {
    let path = binaries()?.join(name);
    let mut command = Command::new(if path.exists() { path } else { PathBuf::from(name) });
    command.envs(target.environment()).stdin(Stdio::null()).kill_on_drop(true);
    Ok(command)
}

/// Runs a command to its end.
pub async fn run(command: &mut Command) -> Result<Output, TestkitError> {
    let output = command.output().await.map_err(crate::io("running a program"))?;
    Ok(Output {
        success: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// A Python that has a module.
pub async fn python_with(module: &str) -> Result<PathBuf, TestkitError> {
    for candidate in ["python3", "/usr/bin/python3"] {
        let check = Command::new(candidate).args(["-c", &format!("import {module}")]).output().await;
        if check.is_ok_and(|o| o.status.success()) {
            return Ok(candidate.into());
        }
    }
    Err(TestkitError::Missing {
        what: format!("a Python with the module {module}"),
        hint: format!("install it (Debian: `apt-get install python3-{module}`)"),
    })
}

/// A program that `make test` has installed below `target/tools`, or one that is on the path.
pub fn installed(name: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let installed = target.join("tools/bin").join(name);
    let on_path = std::env::var_os("PATH")
        .and_then(|path| std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.exists()));
    Some(installed).filter(|path| path.exists()).or(on_path)
}
