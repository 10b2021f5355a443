//! Benchmarks that compare, in one run on one machine: the isolation of tenants through Cofferdam, through peers and
//! without anything in between; what a pooler
//! costs; what looking after many tenants costs; and scheduling policies in simulation.
//!
//! Figures of a shared machine mean little by themselves. Everything here is a ratio against something measured in
//! the same run: contended against alone, Cofferdam against a peer.
#![forbid(unsafe_code)]

pub mod health;
pub mod isolation;
mod peers;
mod plot;
pub mod simulate;
pub mod throughput;
pub mod web;

pub use peers::Peer;
pub use plot::{Bar, Group, bars};
