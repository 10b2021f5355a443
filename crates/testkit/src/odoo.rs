//! A miniature Odoo: the prefork server's limits, routes, headers, cookies and SQL habits, and nothing else.
//!
//! What it imitates was read in the sources of Odoo 16 to 19: one request per worker and connection, HTTP/1.0 answers,
//! a two-second client timeout, `X-Forwarded-Host` believed when present, a new connection to `postgres` for every
//! anonymous request, and `DISCARD ALL`, `BEGIN ISOLATION LEVEL REPEATABLE READ`, …, `COMMIT` for every cursor.

mod database;
mod estate;
mod prefork;
mod server;
mod tenancy;
mod websocket;

pub use estate::{Busy, Counts, Estate};
pub use prefork::{Program, work};
pub use server::{MiniOdoo, OdooOptions};
pub use tenancy::{USER, secret};
