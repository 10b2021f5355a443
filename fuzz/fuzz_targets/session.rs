//! The session machine fed with whatever a client and a server may send, in any order.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cofferdam_fuzz::session::run(data));
