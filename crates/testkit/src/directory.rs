//! A directory with a gateway's configuration, written as an operator would.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{TestkitError, io};

/// `cofferdam.yaml` and `tenants/` in a temporary directory.
#[derive(Debug)]
pub struct TenantDirectory {
    directory: TempDir,
}

impl TenantDirectory {
    /// A directory with this main file and no tenants.
    pub fn new(main: &str) -> Result<Self, TestkitError> {
        let directory = tempfile::Builder::new().prefix("cofferdam-conf-").tempdir().map_err(io("configuration"))?;
        fs::create_dir(directory.path().join("tenants")).map_err(io("tenants"))?;
        let this = Self { directory };
        this.main(main)?;
        Ok(this)
    }

    /// Replaces the main file.
    pub fn main(&self, text: &str) -> Result<(), TestkitError> {
        self.replace(&self.path(), text)
    }

    /// Adds or replaces a tenant.
    pub fn tenant(&self, slug: &str, text: &str) -> Result<(), TestkitError> {
        self.replace(&self.tenant_path(slug), text)
    }

    /// Removes a tenant.
    pub fn remove(&self, slug: &str) -> Result<(), TestkitError> {
        fs::remove_file(self.tenant_path(slug)).map_err(io("removing a tenant"))
    }

    /// The main file.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("cofferdam.yaml")
    }

    /// A tenant's file.
    pub fn tenant_path(&self, slug: &str) -> PathBuf {
        self.directory.path().join("tenants").join(format!("{slug}.yaml"))
    }

    /// Writes beside and renames, as careful editors and Git do: a reader never sees half a file.
    fn replace(&self, path: &Path, text: &str) -> Result<(), TestkitError> {
        let beside = self.directory.path().join(".new");
        fs::write(&beside, text).map_err(io("configuration"))?;
        fs::rename(&beside, path).map_err(io("configuration"))
    }
}
