//! Out of the repository: single files as streams, directories as trees.

use std::io::Write;
use std::path::Path;

use rustic_core::repofile::{Node, SnapshotFile};
use rustic_core::{IndexedFullStatus, LocalDestination, LsOptions, RestoreOptions};

use super::{Repository, RepositoryError};
use crate::model::SetId;

/// A set, opened for reading.
pub(crate) struct Reader<'a> {
    repository: &'a Repository,
    indexed: rustic_core::Repository<IndexedFullStatus>,
    snapshot: SnapshotFile,
}

impl Repository {
    /// Opens a set for reading. Reads the index.
    pub(crate) fn reader(&self, set: &SetId) -> Result<Reader<'_>, RepositoryError> {
        let snapshot = self.snapshot(set)?;
        let indexed = self.again()?.to_indexed().map_err(|e| self.broken(&e))?;
        Ok(Reader { repository: self, indexed, snapshot })
    }
}

impl Reader<'_> {
    /// Streams a file into a writer. What does not decrypt, or is not what its hash says, is an error.
    pub(crate) fn file(&self, path: &str, to: &mut impl Write) -> Result<(), RepositoryError> {
        let node = self.node(path)?;
        self.indexed.dump(&node, to).map_err(|e| self.repository.broken(&e))
    }

    /// Whether there is something at a path.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.node(path).is_ok()
    }

    /// Writes a directory of the set into one of the file system, which may have files already; those whose size and
    /// time are right are left as they are.
    pub(crate) fn extract(&self, path: &str, to: &Path) -> Result<(), RepositoryError> {
        let broken = |e: Box<rustic_core::RusticError>| self.repository.broken(&e);
        let node = self.node(path)?;
        let mut options = RestoreOptions::default();
        options.no_ownership = true;
        // Times can be set by anybody; the files that are there may be somebody else's.
        options.verify_existing = true;
        let destination = LocalDestination::new(&to.to_string_lossy(), true, false).map_err(broken)?;
        let list = self.indexed.ls(&node, &LsOptions::default()).map_err(broken)?;
        let plan = self.indexed.prepare_restore(&options, list.clone(), &destination, false).map_err(broken)?;
        self.indexed.restore(plan, &options, list, &destination).map_err(broken)
    }

    fn node(&self, path: &str) -> Result<Node, RepositoryError> {
        let path = Path::new(self.repository.tenant.as_str()).join(path);
        self.indexed.node_from_path(self.snapshot.tree, &path).map_err(|e| self.repository.broken(&e))
    }
}
