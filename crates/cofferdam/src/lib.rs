//! Cofferdam keeps many Odoo tenants on shared servers from drowning each other.
//!
//! This crate is what an embedding program depends on. [`Gateway::builder`] runs the whole gateway inside the caller's
//! tokio runtime, with the caller's sockets if given; nothing here is global, prints, or ends the process.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let gateway = cofferdam::Gateway::builder().config_file("/etc/cofferdam/cofferdam.yaml").start().await?;
//! println!("HTTP on {:?}", gateway.http_addresses());
//! // … on SIGHUP:
//! gateway.reload().await?;
//! // … on SIGTERM:
//! gateway.drain();
//! gateway.wait().await;
//! # Ok(())
//! # }
//! ```
//!
//! # Parts
//!
//! The parts are libraries of their own, re-exported here: [`tenant`] (the catalog), [`fairness`] (who goes next),
//! [`http`] and [`postgres`] (the planes), [`admin`] (metrics and API).
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod builder;
mod console;
mod coupling;
mod files;
mod gateway;
pub mod handover;
mod listeners;
mod quotas;
mod view;
mod watch;

pub use builder::{Builder, Runtimes, StartError};
pub use cofferdam_admin as admin;
pub use cofferdam_fairness as fairness;
pub use cofferdam_http as http;
pub use cofferdam_postgres as postgres;
pub use cofferdam_tenant as tenant;
pub use files::{SystemSecrets, load_sources};
pub use gateway::{DrainReport, Gateway, ReloadError, Reloaded};
