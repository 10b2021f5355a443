//! What is kept on disk: the account, the certificates, what has failed, and what an authority is about to ask for.
//!
//! One directory below the configured one for each authority, so that a trial with another leaves everything as it was. Gateways that
//! share it take turns: whoever has locked it orders, the others read.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use cofferdam_tenant::{HostName, Secret, TlsFiles};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::schedule::Failures;

/// After which time nobody is at work any more with what is being written, or asked for.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);

/// What an authority will ask for to see that a host is served here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Challenge {
    pub(crate) token: String,
    pub(crate) authorization: String,
}

/// The directory of one authority.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the directory of an authority, and makes it if there is none.
    pub(crate) fn open(state_directory: &Path, authority: &str) -> io::Result<Self> {
        let name =
            url::Url::parse(authority).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default();
        // An IPv6 address has colons and brackets.
        let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
        let digest = hex::encode(&Sha256::digest(authority.as_bytes())[..4]);
        let root = state_directory.join(format!("{name}-{digest}"));
        for part in ["certificates", "challenges"] {
            DirBuilder::new().recursive(true).mode(0o700).create(root.join(part))?;
        }
        Ok(Self { root })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The right to order, until the file is dropped; `None` while somebody else has it.
    pub(crate) fn lock(&self) -> io::Result<Option<File>> {
        let path = self.root.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    pub(crate) fn account(&self) -> io::Result<Option<String>> {
        read(&self.root.join("account.json"))
    }

    pub(crate) fn set_account(&self, credentials: &str) -> io::Result<()> {
        self.write(&self.root.join("account.json"), credentials)
    }

    pub(crate) fn forget_account(&self) -> io::Result<()> {
        let account = self.root.join("account.json");
        // An operator may have bound it to something.
        match fs::rename(&account, self.root.join("account.unknown.json")) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// When certificates or failures were written last.
    pub(crate) fn changed(&self) -> io::Result<SystemTime> {
        let certificates = fs::metadata(self.root.join("certificates"))?.modified()?;
        Ok(fs::metadata(&self.root)?.modified()?.max(certificates))
    }

    /// Removes what processes that were killed have left behind.
    pub(crate) fn sweep(&self, now: SystemTime) -> io::Result<()> {
        for (part, ours) in [("certificates", ".tmp"), ("challenges", "")] {
            for entry in fs::read_dir(self.root.join(part))? {
                let entry = entry?;
                let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(ours));
                let modified = entry.metadata().and_then(|about| about.modified());
                if is_ours && modified.is_ok_and(|at| now.duration_since(at).is_ok_and(|since| since > LEFT_BEHIND)) {
                    remove(&entry.path())?;
                }
            }
        }
        Ok(())
    }

    /// What has failed, by host. What cannot be read is as if nothing had: it is written anew.
    pub(crate) fn failures(&self) -> BTreeMap<String, Failures> {
        json(&self.root.join("failures.json")).unwrap_or_default()
    }

    pub(crate) fn set_failures(&self, failures: &BTreeMap<String, Failures>) -> io::Result<()> {
        self.write(&self.root.join("failures.json"), &serde_json::to_string(failures)?)
    }

    /// The hosts that there are certificates for, with the time at which each was written.
    pub(crate) fn certificates(&self) -> io::Result<Vec<(String, SystemTime)>> {
        let mut hosts = Vec::new();
        for entry in fs::read_dir(self.root.join("certificates"))? {
            let entry = entry?;
            let name = entry.file_name();
            let host = name.to_str().and_then(|name| name.strip_suffix(".pem"));
            if let Some(host) = host.filter(|host| is_host(host)) {
                // It may be gone by now.
                if let Ok(written) = entry.metadata().and_then(|about| about.modified()) {
                    hosts.push((host.to_owned(), written));
                }
            }
        }
        Ok(hosts)
    }

    /// The certificate of a host, with its key.
    pub(crate) fn certificate(&self, host: &str) -> io::Result<Option<TlsFiles>> {
        let Some(text) = read(&self.file("certificates", host, ".pem"))? else { return Ok(None) };
        let at = text.find("-----BEGIN CERTIFICATE-----").ok_or_else(|| invalid("no certificate"))?;
        let (key, certificate) = text.split_at(at);
        Ok(Some(TlsFiles { certificate: certificate.to_owned(), key: Secret::new(key) }))
    }

    /// Keeps a certificate. Key and chain are one file, so that nobody ever reads a pair that does not fit.
    pub(crate) fn set_certificate(&self, host: &str, files: &TlsFiles) -> io::Result<()> {
        let text = format!("{}\n{}", files.key.expose().trim_end(), files.certificate);
        self.write(&self.file("certificates", host, ".pem"), &text)
    }

    pub(crate) fn remove_certificate(&self, host: &str) -> io::Result<()> {
        remove(&self.file("certificates", host, ".pem"))
    }

    pub(crate) fn challenge(&self, host: &str) -> Option<Challenge> {
        is_host(host).then(|| json(&self.file("challenges", host, ".json"))).flatten()
    }

    pub(crate) fn set_challenge(&self, host: &str, challenge: &Challenge) -> io::Result<()> {
        self.write(&self.file("challenges", host, ".json"), &serde_json::to_string(challenge)?)
    }

    pub(crate) fn remove_challenge(&self, host: &str) -> io::Result<()> {
        remove(&self.file("challenges", host, ".json"))
    }

    fn file(&self, part: &str, host: &str, end: &str) -> PathBuf {
        self.root.join(part).join(format!("{host}{end}"))
    }

    /// Whole or not at all, and for nobody else to read.
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(&self.root))?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }
}

/// Whether a name may be a file's: hosts come from clients too.
fn is_host(name: &str) -> bool {
    name.len() <= 240 && !name.starts_with('.') && HostName::parse(name).is_ok_and(|host| host.as_str() == name)
}

fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_str(&read(path).ok()??).ok()
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_kept_is_for_nobody_else_and_one_orders_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "https://[::1]:14000/dir").unwrap();
        let files = TlsFiles {
            certificate: "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n".to_owned(),
            key: Secret::new("-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"),
        };
        store.set_certificate("a.example", &files).unwrap();
        let read = store.certificate("a.example").unwrap().unwrap();
        assert_eq!(read.certificate, files.certificate);
        assert_eq!(read.key.expose().trim_end(), files.key.expose().trim_end());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(store.root()), 0o700);
        assert_eq!(mode(&store.file("certificates", "a.example", ".pem")), 0o600);

        let held = store.lock().unwrap().unwrap();
        let other = Store::open(directory.path(), "https://[::1]:14000/dir").unwrap();
        assert!(other.lock().unwrap().is_none());
        drop(held);
        assert!(other.lock().unwrap().is_some());

        let elsewhere = Store::open(directory.path(), "https://[::1]:14000/other").unwrap();
        assert!(elsewhere.certificate("a.example").unwrap().is_none(), "another authority has other certificates");
    }

    #[test]
    fn a_name_that_a_client_has_made_up_reads_no_other_file() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "https://ca.example/dir").unwrap();
        let challenge = Challenge { token: "t".to_owned(), authorization: "t.x".to_owned() };
        store.set_challenge("a.example", &challenge).unwrap();
        assert_eq!(store.challenge("a.example"), Some(challenge));
        fs::write(store.root().join("x.json"), r#"{"token":"t","authorization":"t.x"}"#).unwrap();
        for name in ["../x", "..", "", "A.example", "a.example/", "*.example.com", "a\0.example"] {
            assert_eq!(store.challenge(name), None, "{name}");
        }
        store.remove_challenge("a.example").unwrap();
        store.remove_challenge("a.example").unwrap();
        assert_eq!(store.challenge("a.example"), None);
    }
}
