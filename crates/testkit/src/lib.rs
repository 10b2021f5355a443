//! Real servers for tests and for the demo: PostgreSQL clusters on free ports, a miniature Odoo, load generators.
//!
//! Nothing here installs anything, uses a fixed port, or touches a system service. Whatever is started lives in a
//! temporary directory, ends with the value that stands for it, and also ends when the process dies.
#![forbid(unsafe_code)]
#![allow(clippy::missing_panics_doc)]

pub mod acme;
pub mod browser;
mod directory;
pub mod load;
pub mod odoo;
pub mod postgres;
pub mod redis;
pub mod s3;
pub mod tools;

pub use directory::TenantDirectory;

/// What went wrong in a server of the testkit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestkitError {
    /// Something is not installed.
    #[error("{what} was not found; {hint}")]
    Missing {
        /// What.
        what: String,
        /// How to get it.
        hint: String,
    },
    /// A program failed.
    #[error("{program} failed: {output}")]
    Failed {
        /// Which.
        program: String,
        /// What it printed.
        output: String,
    },
    /// Input or output.
    #[error("{context}: {error}")]
    Io {
        /// During what.
        context: String,
        /// Why.
        error: std::io::Error,
    },
    /// PostgreSQL said no.
    #[error(transparent)]
    Postgres(#[from] tokio_postgres::Error),
}

pub(crate) fn io(context: impl Into<String>) -> impl FnOnce(std::io::Error) -> TestkitError {
    let context = context.into();
    move |error| TestkitError::Io { context, error }
}
