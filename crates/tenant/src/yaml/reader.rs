//! What everybody who reads a configuration does beside decoding it: finding faults, paths and secrets.

use std::path::{Path, PathBuf};

use super::Node;
use crate::{Diagnostic, Diagnostics, Secret, Secrets, ServerTls, Source};

/// A configuration that is being understood. Faults are gathered, so that all of them are told.
pub struct Reader<'a> {
    source: &'a Source,
    node: &'a Node,
    /// Where secrets come from.
    pub secrets: &'a dyn Secrets,
    faults: Vec<Diagnostic>,
}

impl std::fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader")
            .field("source", &self.source.path)
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}

impl<'a> Reader<'a> {
    /// A reader of a document, with the faults that decoding it has found.
    pub fn new(source: &'a Source, node: &'a Node, secrets: &'a dyn Secrets, faults: Vec<Diagnostic>) -> Self {
        Self { source, node, secrets, faults }
    }

    /// Notes a fault at a field, given by its path.
    pub fn fault(&mut self, path: &[&str], found: impl Into<String>, expected: impl Into<String>) {
        let at = self.node.locate(path);
        let mut fault = Diagnostic::file_level(&self.source.path, found, expected);
        (fault.line, fault.column, fault.field) = (at.line, at.column, path.join("."));
        self.faults.push(fault);
    }

    /// Whether there was no fault so far.
    pub fn is_content(&self) -> bool {
        self.faults.is_empty()
    }

    /// What was understood, or every fault in the order of the document.
    pub fn finish<T>(self, understood: T) -> Result<T, Diagnostics> {
        if self.faults.is_empty() {
            return Ok(understood);
        }
        let mut faults = self.faults;
        faults.sort_by_key(|fault| (fault.line, fault.column));
        Err(Diagnostics(faults))
    }

    /// A path of the document: relative ones count from the file.
    pub fn path(&self, path: &Path) -> PathBuf {
        self.source.path.parent().unwrap_or(Path::new(".")).join(path)
    }

    /// The text of a file that a field names; a fault if it cannot be read.
    pub fn file(&mut self, field: &[&str], path: &Path) -> Option<String> {
        match self.secrets.file(path) {
            Ok(text) => Some(text),
            Err(error) => {
                self.fault(field, format!("`{}`: {error}", path.display()), "a file that can be read");
                None
            }
        }
    }

    /// A secret that a field names a file for, if it does; a fault and `None` if that cannot be read.
    pub fn secret_file(&mut self, field: &[&str], path: Option<&Path>) -> Option<Option<Secret>> {
        let Some(path) = path else { return Some(None) };
        Some(Some(Secret::new(self.file(field, path)?)))
    }

    /// How connections are encrypted, with the path of the authorities as it counts from the file; a fault and `None` if the
    /// authorities cannot be read, or are not there where they are needed.
    pub fn tls(&mut self, field: &[&str], tls: &ServerTls) -> Option<ServerTls> {
        let at = [field, &["ca_file"]].concat();
        match &tls.ca_file {
            Some(path) => drop(self.file(&at, path)?),
            None if tls.mode.is_verified() => {
                let found = format!("no `ca_file`, with `{}`", tls.mode.as_str());
                self.fault(field, found, "a file with the authorities that the certificate is checked against");
                return None;
            }
            None => {}
        }
        Some(ServerTls { mode: tls.mode, ca_file: tls.ca_file.as_deref().map(|path| self.path(path)) })
    }

    /// The password that `password_file` or `password_env` below a field name, if one of them does; a fault and `None` if
    /// it cannot be had, or if both are there.
    pub fn password(&mut self, at: &[&str], file: Option<&Path>, variable: Option<&str>) -> Option<Option<Secret>> {
        match (file, variable) {
            (file, None) => self.secret_file(&[at, &["password_file"]].concat(), file),
            (None, Some(variable)) => {
                let value = self.secrets.env(variable);
                if value.is_none() {
                    let found = format!("`{variable}`, which is not set");
                    self.fault(&[at, &["password_env"]].concat(), found, "an environment variable with a password");
                }
                value.map(|value| Some(Secret::new(value)))
            }
            (Some(_), Some(_)) => {
                self.fault(at, "both", "one of `password_file` and `password_env`");
                None
            }
        }
    }
}
