//! What is fuzzed, one function for each target. `tests/corpus.rs` runs them on what was found before, without a fuzzer.

pub mod auth;
pub mod configuration;
pub mod framing;
pub mod http;
pub mod session;
pub mod sql;
pub mod startup;
