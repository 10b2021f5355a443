//! Both sides of SCRAM, and what PostgreSQL stores of a password, fed with anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam_fuzz::auth::run(data));
