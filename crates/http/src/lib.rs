//! The HTTP plane: host → tenant → pool → server, Odoo-aware, on pingora's HTTP engine.
//!
//! Odoo's prefork workers serve one request each and are blocked by whoever is slow. So the plane takes work away from
//! them: it reads the whole request before it asks for a worker, asks the pool's fair
//! [`Gate`](cofferdam_fairness::Gate) for a slot, sends one request per connection, and gives the slot back when the
//! server has finished its answer.
//!
//! pingora does HTTP: parsing, keep-alive, upgrades, HTTP/2. The sockets, TLS, the strict check of what comes in
//! ([`framing`]), the runtime and the order of steps are ours (`docs/decisions/0003-pingora-core.md`, `0016`). No pingora type appears in this crate's public interface.
//!
//! # Manual
//!
//! - **Boundary.** A host belongs to one tenant; an unknown host is answered with 421 and no server hears of it.
//!   `X-Forwarded-*`, `Forwarded`, `X-Real-IP` and `X-Odoo-*` of clients are dropped, ours are set; hop-by-hop headers end
//!   here; `X-Sendfile` and `X-Accel-Redirect` never leave. Database manager and other internal routes are closed but to
//!   whom the tenant opens them. A request that names another database is refused ([`boundary`]), and a session opens for
//!   its own tenant only.
//! - **Refusals.** Over the tenant's own quota: 429. Pool overloaded: 503. Both with `Retry-After` and a body that names
//!   limit and wait.
//! - **Slots.** A slot is free when the server has finished, also when the client has left before: the worker goes on.
//! - **Files.** What Odoo says to be public, and lies where static files do, is kept per tenant; files of its filestore are
//!   sent in its place.
//! - **WebSocket.** `/websocket` goes to the gevent port, holds no worker slot, and is counted per tenant.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod access;
mod answer;
mod backlog;
pub mod boundary;
mod bucket;
mod cache;
mod client;
mod connection;
mod crowd;
mod exchange;
pub mod framing;
mod headers;
mod health;
mod local;
mod login;
mod plane;
mod policy;
mod pool;
mod proxy;
mod reply;
mod request;
mod room;
mod route;
mod sendfile;
mod session;
mod socket;
mod spans;
mod spool;
mod tls;
mod trace;
mod upstream;
mod websocket;
mod workers;

pub use cofferdam_acme::{AcmeError, HostState};
pub use cofferdam_tls::TlsError;
pub use plane::{CacheUsage, HttpPlane, HttpUsage, ServerUsage};
pub use route::{Route, route};

/// The plane cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The configuration has no `http` section.
    #[error("the configuration has no `http` section")]
    NotConfigured,
    /// Traces cannot be sent.
    #[error("http.traces: {0}")]
    Traces(String),
    /// The access log cannot be opened.
    #[error("http.access_log: `{path}` cannot be opened: {error}")]
    AccessLog {
        /// The file.
        path: std::path::PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// A certificate, key or authority cannot be used.
    #[error("{place}: {error}")]
    Tls {
        /// Where it is configured.
        place: String,
        /// What is wrong with it.
        error: TlsError,
    },
    /// A bucket with filestores cannot be used.
    #[error("pools.{pool}.filestore_bucket: {reason}")]
    Bucket {
        /// The pool.
        pool: cofferdam_tenant::PoolName,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificates cannot be got from an authority.
    #[error(transparent)]
    Acme(#[from] AcmeError),
}
