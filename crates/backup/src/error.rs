//! What can go wrong, by what can be done about it.

use crate::repository::{KeyError, RepositoryError};

/// Why a backup, a restore or a drill did not happen. Whatever it was: nothing that looks whole was left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The key cannot be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The repository said no.
    #[error(transparent)]
    Repository(RepositoryError),
    /// A server said no.
    #[error("{server}, database {database}: {reason}")]
    Database {
        /// Which server.
        server: String,
        /// Which database.
        database: String,
        /// What it said.
        reason: String,
    },
    /// A program failed, or is not there.
    #[error("{program}: {reason}")]
    Program {
        /// Which.
        program: String,
        /// What it printed last, or why it did not run.
        reason: String,
    },
    /// The file system said no.
    #[error("{path}: {reason}")]
    Files {
        /// Where.
        path: String,
        /// What it said.
        reason: String,
    },
    /// What was asked for cannot be done; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// What was restored is not what was saved.
    #[error("{what}: {reason}")]
    Mismatch {
        /// What was compared.
        what: String,
        /// The difference.
        reason: String,
    },
    /// Somebody has asked to stop.
    #[error("stopped on request; nothing was left behind that looks whole")]
    Cancelled,
}

impl From<RepositoryError> for Error {
    fn from(error: RepositoryError) -> Self {
        match error {
            RepositoryError::Cancelled => Self::Cancelled,
            other => Self::Repository(other),
        }
    }
}

impl Error {
    pub(crate) fn files(path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::Files { path: path.display().to_string(), reason: error.to_string() }
    }

    /// A panic in a thread of ours or of a library: reported, never passed on.
    pub(crate) fn panicked(error: &tokio::task::JoinError) -> Self {
        Self::Program { program: "cofferdam".to_owned(), reason: format!("a worker has failed: {error}") }
    }
}
