//! The first packet of a PostgreSQL client: parsed from anybody, before authentication.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam_fuzz::startup::run(data));
