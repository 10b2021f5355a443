//! Backups of Odoo tenants that prove themselves: database and files as of one instant, in restic's format, restored in one
//! call, and tried.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use cofferdam_backup::logical::Backup;
//! use cofferdam_backup::model::{BackupPolicy, Parallel, RestoreMode, RestorePoint};
//! use cofferdam_backup::repository::{Directory, KeySource};
//! use cofferdam_backup::restore::Restore;
//! use cofferdam_backup::{Control, Event, Server};
//! use cofferdam_tenant::{Secret, Slug};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let server = Server::new("127.0.0.1", 5432, "odoo", Some(Secret::new("odoo's password")));
//! let tenant = Slug::parse("acme")?;
//! let store = Arc::new(Directory::new("/var/backups/acme"));
//! let key = KeySource::File("/etc/keys/{tenant}.key".into()).key("acme")?;
//! let control = Control::new(|event| {
//!     if let Event::Warning { text } = event {
//!         eprintln!("{text}");
//!     }
//! });
//!
//! let backup = Backup {
//!     tenant: tenant.clone(),
//!     server: server.clone(),
//!     dump_through: None,
//!     database: "acme".into(),
//!     filestore: "/var/lib/odoo/filestore/acme".into(),
//!     store: store.clone(),
//!     key: key.clone(),
//!     policy: BackupPolicy::default(),
//! };
//! let set = backup.run(&control).await?;
//! println!("{} is {}", set.id, set.consistency);
//!
//! let restore = Restore {
//!     tenant,
//!     server,
//!     database: "acme".into(),
//!     owner: None,
//!     filestores: "/var/lib/odoo/filestore".into(),
//!     store,
//!     key,
//!     gateway: None,
//!     parallel: Parallel::default(),
//! };
//! let restored = restore.run(&RestorePoint::Latest, &RestoreMode::Scratch, &control).await?;
//! println!("look into {}", restored.database);
//! # Ok(())
//! # }
//! ```
//!
//! # Parts
//!
//! [`model`] is what everything is made of, as data with a JSON Schema; [`plan`] decides without doing; [`repository`] is
//! where sets lie; [`logical`] and [`physical`] are the engines; [`restore`] and [`drill`] bring back and try; [`interchange`] is Odoo's own format; [`runner`]
//! does it by schedule; [`config`] reads `backup.yaml`. Nothing here prints, and nothing is global.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod config;
pub mod drill;
mod error;
mod events;
pub mod interchange;
pub mod logical;
pub mod model;
pub mod physical;
pub mod plan;
mod program;
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
