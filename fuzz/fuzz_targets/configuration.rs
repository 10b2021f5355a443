//! A tenant's file and a main file, as text.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam_fuzz::configuration::run(data));
