//! The PostgreSQL plane: clients speak to the gateway as to a PostgreSQL server, and share server connections behind it.
//!
//! Odoo uses one database per tenant, so a server connection can never serve two tenants. Hence two things are apart:
//! the *cache* of open server connections per (database, role, settings), and the *slots* of a cluster, which a fair
//! [`Gate`](cofferdam_fairness::Gate) hands out per transaction.
//!
//! The protocol machines ([`session`], [`wire`], [`auth`], [`sql`]) are sans-IO. Around them one task per client
//! owns the server connection while it has it: there is no second task and no channel between the two sockets.
//!
//! # Manual
//!
//! - **Pooling.** In `transaction` mode a server connection is taken with the first message of a transaction and given
//!   back at ReadyForQuery with status idle and nothing owed. What a client sets outside of a transaction is set
//!   again wherever it gets a connection. A statement that leaves other state behind (temporary tables, session advisory
//!   locks, `SET` inside a transaction, …) *pins* the connection to the client until `DISCARD ALL`; what cannot be
//!   seen through (`DO`, `CALL`, a function call by number) has the connection reset before anybody else gets it. A pinned connection holds no
//!   slot while it is idle; one tenant may keep half of the connections that the slots leave.
//! - **Limits of that.** A plain `SELECT` of a function that leaves unreported session state behind is not noticed.
//!   Login event triggers and `ALTER ROLE … SET` act per server connection, not per client.
//! - **Refusals.** When no slot is to be had in time, the statement fails with `XX000` and a message that names tenant,
//!   limit and wait; the client keeps its session. (Odoo would log its user out on `53300`.)
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod auth;
pub mod session;
mod signal;
pub mod sql;
pub mod wire;

mod cache;
mod cancel;
mod client;
mod console;
mod door;
mod listener;
mod login;
mod notify;
mod passage;
mod pause;
mod plane;
mod priority;
mod process;
mod relay;
mod route;
mod servers;
mod stats;
mod stream;
mod tls;
mod upstream;

pub use cache::CacheUsage;
pub use console::ConsoleHost;
pub use plane::{PostgresPlane, PostgresUsage, Prepared};
pub use servers::{ServerRole, ServerUsage};
pub use tls::TlsError;
pub use upstream::UpstreamError;

/// The plane cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PostgresError {
    /// A certificate or key cannot be used.
    #[error("{place}: {error}")]
    Tls {
        /// Where in the configuration.
        place: String,
        /// Why.
        error: TlsError,
    },
    /// The system gives no randomness.
    #[error("the system's random number generator failed: {0}")]
    Random(#[from] getrandom::Error),
    /// The configuration has no `postgres` section.
    #[error("the configuration has no `postgres` section")]
    NotConfigured,
}

/// A small number for the thread that runs this: connections are first looked for where they were last used.
pub(crate) fn core_number() -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    MINE.with(|mine| *mine)
}
