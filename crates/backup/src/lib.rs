//! Backups of Odoo tenants that prove themselves.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod config;
pub mod drill;
mod error;
mod events;
pub mod logical;
pub mod model;
pub mod physical;
pub mod plan;
pub mod repository;
pub mod restore;
pub mod runner;
#[cfg(test)]
mod sample;
mod scratch;
mod server;

pub use error::Error;
pub use events::{Control, Event};
pub use server::Server;
