//! What fuzzing has found so far (`fuzz/corpus`) is fed to every parser and to the session machine again, without a fuzzer.
#![allow(clippy::unwrap_used)]

use std::panic::catch_unwind;
use std::path::Path;

// Public for the fuzzer, and loud when something is wrong.
#[allow(unreachable_pub, clippy::expect_used)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

use targets::{auth, configuration, framing, http, session, sql, startup};

/// Runs a target on each file of its corpus, and says which one it fails on.
fn replay(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 10, "{target} has a corpus of {} files", files.len());
    for file in files {
        let data = std::fs::read(&file).unwrap();
        assert!(catch_unwind(|| run(&data)).is_ok(), "{target} fails on {}", file.display());
    }
}

#[test]
fn scram_stands_what_fuzzing_found() {
    replay("auth", auth::run);
}

#[test]
fn configurations_stand_what_fuzzing_found() {
    replay("configuration", configuration::run);
}

#[test]
fn message_framing_stands_what_fuzzing_found() {
    replay("framing", framing::run);
}

#[test]
fn http_framing_and_the_tenants_boundary_stand_what_fuzzing_found() {
    replay("http", http::run);
}

#[test]
fn the_session_machine_stands_what_fuzzing_found() {
    replay("session", session::run);
}

#[test]
fn reading_sql_and_paths_stands_what_fuzzing_found() {
    replay("sql", sql::run);
}

#[test]
fn first_packets_stand_what_fuzzing_found() {
    replay("startup", startup::run);
}
