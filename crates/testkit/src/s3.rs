//! Private stores of objects: S3-compatible ones, of which one means its locks and one forgets them, and Azure's.
//!
//! They come as packages that `make test` installs below `target/tools`. Where they are not, tests that need them
//! say so and skip.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::tools::installed;
use crate::{TestkitError, io};

/// Who may use the servers.
pub const CREDENTIALS: (&str, &str) = ("test", "test-secret");
/// The account of Azure's emulator, and its key.
pub const ACCOUNT: (&str, &str) = ("account", "dGhlIGtleSBvZiB0ZXN0cw==");
const START_LIMIT: Duration = Duration::from_secs(60);

/// A running server. Stops and disappears when dropped.
#[derive(Debug)]
pub struct ObjectStore {
    child: Child,
    port: u16,
    _directory: TempDir,
}

impl ObjectStore {
    /// A server with full lock semantics (SeaweedFS); `None` where it is not installed.
    pub fn strict() -> Result<Option<Self>, TestkitError> {
        let Some(program) = installed("weed") else { return Ok(None) };
        for attempt in 0..5 {
            let directory = tempfile::Builder::new().prefix("cofferdam-s3-").tempdir().map_err(io("directory"))?;
            let base = free_range()?;
            let port = base + 6;
            let mut command = Command::new(&program);
            command.args(["-logtostderr=true", "server", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]);
            command.arg(format!("-dir={}", directory.path().display()));
            for (name, offset) in [("master", 0), ("volume", 2), ("filer", 4), ("s3", 6)] {
                command.arg(format!("-{name}.port={}", base + offset));
            }
            command.args(["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]);
            // By default it refuses writes when less than a hundredth of the disk is free: after a build it may be.
            command.args(["-volume.minFreeSpace=16MiB", "-volume.max=100", "-master.volumeSizeLimitMB=64"]);
            command.env("AWS_ACCESS_KEY_ID", CREDENTIALS.0).env("AWS_SECRET_ACCESS_KEY", CREDENTIALS.1);
            match Self::launch(command, port, "/status", directory) {
                Err(_) if attempt < 4 => {}
                other => return other.map(Some),
            }
        }
        Ok(None)
    }

    /// A server that takes a lock with an upload in parts, answers 200, and forgets it (MiniStack); `None` where it is
    /// not installed.
    pub fn forgetful() -> Result<Option<Self>, TestkitError> {
        let Some(program) = installed("ministack") else { return Ok(None) };
        let directory = tempfile::Builder::new().prefix("cofferdam-s3-").tempdir().map_err(io("directory"))?;
        let port = crate::postgres::free_port()?;
        let mut command = Command::new(program);
        command.env("GATEWAY_PORT", port.to_string()).env("MINISTACK_HOST", "127.0.0.1");
        command.env("HOME", directory.path());
        Self::launch(command, port, "/", directory).map(Some)
    }

    /// Azure's Blob Storage, with a container (Azurite); `None` where it is not installed.
    pub fn azure(container: &str) -> Result<Option<Self>, TestkitError> {
        let (Some(node), Some(program)) = (installed("node"), installed("azurite-blob.js")) else { return Ok(None) };
        let directory = tempfile::Builder::new().prefix("cofferdam-azure-").tempdir().map_err(io("directory"))?;
        let port = crate::postgres::free_port()?;
        let mut command = Command::new(node);
        command.arg(std::fs::canonicalize(program).map_err(io("azurite"))?);
        command.args(["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--blobHost", "127.0.0.1"]);
        command.args(["--blobPort", &port.to_string()]).arg("--location").arg(directory.path());
        command.env("AZURITE_ACCOUNTS", format!("{}:{}", ACCOUNT.0, ACCOUNT.1));
        let server = Self::launch(command, port, "/", directory)?;
        // Containers are made by administrators, and not by what keeps objects in them.
        let made = Command::new("python3")
            .args(["-c", MAKE_CONTAINER, &server.endpoint(), ACCOUNT.0, ACCOUNT.1, container])
            .output()
            .map_err(io("python3"))?;
        if !made.status.success() {
            let output = String::from_utf8_lossy(&made.stderr).into_owned();
            return Err(TestkitError::Failed { program: "making a container".into(), output });
        }
        Ok(Some(server))
    }

    fn launch(mut command: Command, port: u16, probe: &str, directory: TempDir) -> Result<Self, TestkitError> {
        command.current_dir(directory.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.process_group(0).spawn().map_err(io("starting an object store"))?;
        let mut server = Self { child, port, _directory: directory };
        let deadline = Instant::now() + START_LIMIT;
        while !answers(port, probe) {
            let ended = server.child.try_wait().map_err(io("an object store"))?.is_some();
            if ended || Instant::now() > deadline {
                return Err(TestkitError::Failed { program: "object store".into(), output: "it did not start".into() });
            }
            pause();
        }
        Ok(server)
    }

    /// Where it answers.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

/// A request with a shared key, as Azure's documentation has it.
const MAKE_CONTAINER: &str = r#"
import base64, email.utils, hashlib, hmac, sys, urllib.request
endpoint, account, key, container = sys.argv[1:]
date, version = email.utils.formatdate(usegmt=True), "2021-12-02"
resource = f"/{account}/{account}/{container}\nrestype:container"
text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n{resource}"
signature = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {account}:{signature}"}
url = f"{endpoint}/{account}/{container}?restype=container"
urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers))
"#;

impl Drop for ObjectStore {
    fn drop(&mut self) {
        // The whole group: servers start helpers of their own.
        let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", self.child.id())]).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ports `n`, `n + 2`, `n + 4`, `n + 6`, and those 10,000 above, on which nobody listens now.
fn free_range() -> Result<u16, TestkitError> {
    for _ in 0..100 {
        let base = 20_000 + crate::postgres::free_port()? % 10_000;
        let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if (0..4).all(|n| free(base + 2 * n) && free(base + 2 * n + 10_000)) {
            return Ok(base);
        }
    }
    Err(TestkitError::Failed { program: "object store".into(), output: "no free ports".into() })
}

fn answers(port: u16, path: &str) -> bool {
    use std::io::{Read, Write};
    let address = ([127, 0, 0, 1], port).into();
    let Ok(mut stream) = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)) else {
        return false;
    };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    let mut start = [0; 12];
    stream.write_all(request.as_bytes()).is_ok() && stream.read_exact(&mut start).is_ok() && start.starts_with(b"HTTP/")
}

#[allow(clippy::disallowed_methods)] // start-up of a server that signals nothing
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_millis(50));
}
