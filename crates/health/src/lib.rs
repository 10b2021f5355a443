//! Health of many Odoo tenants on shared servers: what is really wrong, whom it concerns, and who has to know.
//!
//! ```no_run
//! use std::collections::BTreeMap;
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use cofferdam_health::alert::{AlertOptions, Alerts};
//! use cofferdam_health::engine::{Engine, EngineOptions};
//! use cofferdam_health::model::Subject;
//! use cofferdam_health::probe::{ClusterProbe, ClusterLimits, Database, Probe, TenantLimits, TenantProbe};
//! use cofferdam_health::{Watcher, explain};
//! use jiff::Timestamp;
//!
//! # async fn run() {
//! let server = Database {
//!     host: "127.0.0.1".into(),
//!     port: 5432,
//!     user: "watcher".into(),
//!     password: None,
//!     tls: None,
//!     database: "postgres".into(),
//! };
//! let every = Duration::from_secs(30);
//! let mut engine = Engine::new(EngineOptions::default());
//! let mut probes: Vec<Arc<dyn Probe>> =
//!     vec![Arc::new(ClusterProbe::new("main", &server, ClusterLimits::default(), every))];
//! for tenant in ["acme", "beta"] {
//!     // None of a tenant's checks can be well where its server is not: one cause, told once.
//!     engine.subject_needs(Subject::Tenant(tenant.into()), ClusterProbe::reachable("main"));
//!     let database = Database { database: tenant.into(), ..server.clone() };
//!     probes.push(Arc::new(TenantProbe::new(tenant, database, TenantLimits::default(), every)));
//! }
//! let watcher = Watcher::new(probes, engine, 8);
//! let mut alerts = Alerts::new(AlertOptions::default());
//! watcher.look_once().await;
//! let now = Timestamp::now();
//! let picture = watcher.picture(now);
//! for line in explain("acme", &picture, now) {
//!     println!("{line}");
//! }
//! for notice in alerts.step(now, &picture, &BTreeMap::new(), &BTreeMap::new()) {
//!     println!("{}", notice.summary);
//! }
//! # }
//! ```
//!
//! # Parts
//!
//! [`probe`] looks, [`Watcher`] says when; [`engine`] tells causes from consequences and believes no single look; [`slo`] counts
//! what objectives allow; [`alert`] decides who is told; [`service`] says what it means for the business; [`config`] reads
//! `health.yaml`; [`Observer`] does everything that a watch does. All but probes, watcher, observer and [`sink`] are functions
//! of what they are given.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod alert;
pub mod config;
pub mod engine;
mod explain;
mod history;
mod memory;
pub mod metrics;
pub mod model;
mod observer;
pub mod page;
pub mod probe;
pub mod rules;
pub mod service;
pub mod sink;
pub mod slo;
mod watcher;

pub use explain::explain;
pub use history::{History, Kept};
pub use observer::{Observer, Step};
pub use watcher::Watcher;
