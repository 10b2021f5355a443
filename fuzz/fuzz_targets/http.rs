//! The frame of HTTP requests, and the database that one names.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam_fuzz::http::run(data));
