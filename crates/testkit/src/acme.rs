//! A private authority for certificates: Pebble, which Let's Encrypt tests clients with, beside a name server of its own.

use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::postgres::free_port;
use crate::tools::installed;
use crate::{TestkitError, io};

const START_LIMIT: Duration = Duration::from_secs(30);

/// How an authority shall behave.
#[derive(Debug, Clone)]
pub struct AuthorityOptions {
    /// The certificate that the authority itself shows, and its key, as PEM text; for 127.0.0.1.
    pub identity: (String, String),
    /// The port of each host at which `http-01` looks.
    pub http_port: u16,
    /// The port of each host at which `tls-alpn-01` looks.
    pub tls_port: u16,
    /// How long its certificates are valid.
    pub validity: Duration,
    /// It takes up to so many seconds to look at a host.
    pub slow: u32,
    /// Accounts must be bound to this one: the name of a key, and the key in base64url.
    pub external_account: Option<(String, String)>,
}

/// A running authority. Stops and disappears when dropped.
#[derive(Debug)]
pub struct Authority {
    pebble: Child,
    names: Child,
    port: u16,
    management: u16,
    names_management: u16,
    directory: TempDir,
}

impl Authority {
    /// Starts one for which every name leads to 127.0.0.1; `None` where Pebble is not installed.
    pub fn start(options: &AuthorityOptions) -> Result<Option<Self>, TestkitError> {
        let (Some(pebble), Some(names)) = (installed("pebble"), installed("pebble-challtestsrv")) else {
            return Ok(None);
        };
        // Somebody else may take a port between it is found free and it is used.
        let mut attempts = 0;
        loop {
            match Self::launch(&pebble, &names, options) {
                Err(_) if attempts < 4 => attempts += 1,
                other => return other.map(Some),
            }
        }
    }

    fn launch(pebble: &Path, names: &Path, options: &AuthorityOptions) -> Result<Self, TestkitError> {
        let directory = tempfile::Builder::new().prefix("cofferdam-acme-").tempdir().map_err(io("directory"))?;
        let path = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(path("own.crt"), &options.identity.0).map_err(io("a certificate"))?;
        std::fs::write(path("own.key"), &options.identity.1).map_err(io("a key"))?;
        let (port, management, names_management, dns) = (free_port()?, free_port()?, free_port()?, free_name_port()?);
        let mut config = serde_json::json!({
            "listenAddress": format!("127.0.0.1:{port}"),
            "managementListenAddress": format!("127.0.0.1:{management}"),
            "certificate": path("own.crt"),
            "privateKey": path("own.key"),
            "httpPort": options.http_port,
            "tlsPort": options.tls_port,
            "certificateValidityPeriod": options.validity.as_secs(),
            "externalAccountBindingRequired": options.external_account.is_some(),
        });
        if let Some((name, key)) = &options.external_account {
            config["externalAccountMACKeys"] = serde_json::json!({ name: key });
        }
        let config = serde_json::json!({ "pebble": config }).to_string();
        std::fs::write(path("pebble.json"), config).map_err(io("a configuration"))?;

        let quiet = |command: &mut Command| {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(io("pebble"))
        };
        let names = quiet(
            Command::new(names).args(["-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv6", ""]).args([
                "-dns01",
                &format!("127.0.0.1:{dns}"),
                "-management",
                &format!("127.0.0.1:{names_management}"),
            ]),
        )?;
        let pebble = quiet(
            Command::new(pebble)
                .args(["-config", &path("pebble.json"), "-dnsserver", &format!("127.0.0.1:{dns}")])
                .env("PEBBLE_VA_NOSLEEP", if options.slow == 0 { "1" } else { "0" })
                .env("PEBBLE_VA_SLEEPTIME", options.slow.max(1).to_string())
                // Of a hundred nonces that are good: what is refused is asked for anew, but not for ever.
                .env("PEBBLE_WFE_NONCEREJECT", "1"),
        );
        let pebble = match pebble {
            Ok(pebble) => pebble,
            Err(error) => {
                let mut names = names;
                end(&mut names);
                return Err(error);
            }
        };
        let mut authority = Self { pebble, names, port, management, names_management, directory };
        let deadline = Instant::now() + START_LIMIT;
        while TcpListener::bind(("127.0.0.1", port)).is_ok()
            || TcpListener::bind(("127.0.0.1", names_management)).is_ok()
        {
            let ended =
                [&mut authority.pebble, &mut authority.names].into_iter().any(|c| !matches!(c.try_wait(), Ok(None)));
            if ended || Instant::now() > deadline {
                return Err(TestkitError::Failed { program: "pebble".into(), output: "it did not start".into() });
            }
            crate::s3::pause();
        }
        Ok(authority)
    }

    /// The address of its directory.
    pub fn directory(&self) -> String {
        format!("https://127.0.0.1:{}/dir", self.port)
    }

    /// The certificate with which it signs in the end, as PEM text.
    pub fn root(&self) -> Result<String, TestkitError> {
        self.curl(&[&format!("https://127.0.0.1:{}/roots/0", self.management)])
    }

    /// Lets a name lead to another address.
    pub fn lead(&self, name: &str, address: &str) -> Result<(), TestkitError> {
        let body = serde_json::json!({ "host": name, "addresses": [address] }).to_string();
        self.curl(&["-d", &body, &format!("http://127.0.0.1:{}/add-a", self.names_management)]).map(|_| ())
    }

    fn curl(&self, args: &[&str]) -> Result<String, TestkitError> {
        let mut command = Command::new("curl");
        command
            .args(["-sS", "--fail", "--max-time", "10", "--cacert"])
            .arg(self.directory.path().join("own.crt"))
            .args(args);
        let output = command.output().map_err(io("curl"))?;
        if !output.status.success() {
            let output = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(TestkitError::Failed { program: "curl".into(), output });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        end(&mut self.pebble);
        end(&mut self.names);
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// A port on which nobody listens now, neither for connections nor for datagrams.
fn free_name_port() -> Result<u16, TestkitError> {
    for _ in 0..100 {
        let port = free_port()?;
        if UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    Err(TestkitError::Failed { program: "a name server".into(), output: "there is no free port".into() })
}
