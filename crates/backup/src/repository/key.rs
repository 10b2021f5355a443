//! Where a tenant's key comes from. Whoever destroys the key has destroyed the backups (crypto-shredding).

use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use zeroize::Zeroizing;

/// Where the password of a tenant's repository is to be found.
///
/// `{tenant}` in a path, a name or an argument stands for the tenant, so that each has a key of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// The first line of a file.
    File(PathBuf),
    /// An environment variable. For a tenant `acme-eu`, `{tenant}` becomes `ACME_EU`.
    Env(String),
    /// What a command prints, up to the first line break. No shell is involved.
    Command(Vec<String>),
}

/// A password. Never displayed, and wiped when it is dropped.
#[derive(Clone)]
pub struct RepositoryKey(Zeroizing<String>);

/// Why there is no key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the key of {tenant} cannot be had from {source_name}: {reason}")]
pub struct KeyError {
    /// Whose.
    pub tenant: String,
    /// From where: a path, the name of a variable, or a command.
    pub source_name: String,
    /// What went wrong. Contains nothing of the key.
    pub reason: String,
}

impl RepositoryKey {
    /// A key that the caller has got by means of its own. Shorter than 16 characters is refused with `None`.
    pub fn new(password: impl Into<String>) -> Option<Self> {
        let password = Zeroizing::new(password.into());
        (password.chars().count() >= SHORTEST).then_some(Self(password))
    }

    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for RepositoryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RepositoryKey(…)")
    }
}

const SHORTEST: usize = 16;

impl KeySource {
    /// Whether each tenant has a key of its own.
    pub(crate) fn is_of_a_tenant(&self) -> bool {
        let has = |text: &str| text.contains("{tenant}");
        match self {
            Self::File(path) => has(&path.to_string_lossy()),
            Self::Env(name) => has(name),
            Self::Command(words) => words.iter().any(|word| has(word)),
        }
    }

    /// Fetches a tenant's key. Blocks: a command may take its time.
    pub fn key(&self, tenant: &str) -> Result<RepositoryKey, KeyError> {
        let fail = |source_name: String, reason: String| KeyError { tenant: tenant.to_owned(), source_name, reason };
        let (name, text) = match self {
            Self::File(path) => {
                let path = path.to_string_lossy().replace("{tenant}", tenant);
                let text = std::fs::read_to_string(&path).map_err(|e| fail(format!("file {path}"), e.to_string()))?;
                (format!("file {path}"), text)
            }
            Self::Env(variable) => {
                let upper = tenant.to_ascii_uppercase().replace('-', "_");
                let variable = variable.replace("{tenant}", &upper);
                let text = std::env::var(&variable)
                    .map_err(|_| fail(format!("variable {variable}"), "it is not set".to_owned()))?;
                (format!("variable {variable}"), text)
            }
            Self::Command(words) => {
                let words: Vec<String> = words.iter().map(|word| word.replace("{tenant}", tenant)).collect();
                let name = format!("command `{}`", words.join(" "));
                let Some((program, arguments)) = words.split_first() else {
                    return Err(fail(name, "it is empty".to_owned()));
                };
                let output =
                    Command::new(program).args(arguments).output().map_err(|e| fail(name.clone(), e.to_string()))?;
                if !output.status.success() {
                    // What it printed may be half a key.
                    return Err(fail(name, format!("it ended with {}", output.status)));
                }
                let text = String::from_utf8(output.stdout)
                    .map_err(|_| fail(name.clone(), "what it prints is not UTF-8".to_owned()))?;
                (name, text)
            }
        };
        let text = Zeroizing::new(text);
        let line = text.lines().next().unwrap_or_default().trim_end();
        RepositoryKey::new(line).ok_or_else(|| {
            fail(name, format!("found {} characters, expected at least {SHORTEST}", line.chars().count()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn each_tenant_has_a_key_of_its_own_from_file_and_command() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("acme.key"), "a-secret-of-acme-only\n").unwrap();
        let file = KeySource::File(directory.path().join("{tenant}.key"));
        assert_eq!(file.key("acme").unwrap().expose(), "a-secret-of-acme-only");
        assert!(file.key("beta").unwrap_err().to_string().contains("beta.key"));
        let command = KeySource::Command(["echo", "the-secret-of-{tenant}"].map(str::to_owned).to_vec());
        assert_eq!(command.key("acme").unwrap().expose(), "the-secret-of-acme");
    }

    #[test]
    fn a_key_is_never_shown() {
        let key = RepositoryKey::new("correct horse battery staple").unwrap();
        assert!(!format!("{key:?}").contains("horse"));
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("short"), "too-short").unwrap();
        let error = KeySource::File(Path::new(directory.path()).join("short")).key("acme").unwrap_err();
        assert!(error.to_string().contains("found 9 characters, expected at least 16"));
        assert!(!error.to_string().contains("too-short"));
        let failing = KeySource::Command(["sh", "-c", "echo half-a-secret-key-1; exit 3"].map(str::to_owned).to_vec());
        let error = failing.key("acme").unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && !error.contains("half-a-secret-key-1\n"), "{error}");
    }
}
