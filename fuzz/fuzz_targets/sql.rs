//! Reading what a statement does to the session, and what kind of work a path is.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam_fuzz::sql::run(data));
