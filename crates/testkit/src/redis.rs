//! A Redis server of one's own.

use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::tools::installed;
use crate::{TestkitError, io};

/// A running server. Killed when it is dropped.
pub struct Redis {
    child: Child,
    port: u16,
    _directory: TempDir,
}

const START_LIMIT: Duration = Duration::from_secs(20);

impl Redis {
    /// Starts a server with settings such as `--maxmemory 4mb`. None where Redis is not installed.
    pub fn start(settings: &[&str]) -> Result<Option<Self>, TestkitError> {
        // Debian's `redis-tools` has the server under another name; it is what it is called as.
        let Some(program) = installed("redis-server").or_else(|| installed("redis-check-rdb")) else { return Ok(None) };
        let directory = tempfile::tempdir().map_err(io("a directory for Redis"))?;
        let named = directory.path().join("redis-server");
        symlink(program, &named).map_err(io("a link to Redis"))?;
        let port = crate::postgres::free_port()?;
        let child = Command::new(&named)
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--daemonize", "no", "--dir"])
            .arg(directory.path())
            .args(settings)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(io("starting Redis"))?;
        let mut server = Self { child, port, _directory: directory };
        let deadline = Instant::now() + START_LIMIT;
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = server.child.try_wait().map_err(io("Redis"))?.is_some();
            if ended || Instant::now() > deadline {
                return Err(TestkitError::Failed { program: "redis-server".into(), output: "it did not start".into() });
            }
            pause();
        }
        Ok(Some(server))
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[allow(clippy::disallowed_methods)] // nothing signals that a port is open
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}
