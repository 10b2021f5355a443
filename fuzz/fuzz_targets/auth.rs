//! Both sides of SCRAM, and what PostgreSQL stores of a password, fed with anything.
#![no_main]

use cofferdam_postgres::auth::{Derived, Knows, ScramClient, ScramKeys, ScramServer};

libfuzzer_sys::fuzz_target!(|parts: (Vec<u8>, Vec<u8>, String, bool)| {
    let (first, last, stored, plus) = parts;
    let keys = ScramKeys::parse(&stored).or_else(|| {
        ScramKeys::parse("SCRAM-SHA-256$1:AAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")
    });
    if let Some(keys) = &keys
        && let Ok(server) = ScramServer::begin(keys, &first, "nonce", plus.then_some(b"hash"), plus)
    {
        // Nobody knows a password for these keys.
        assert!(server.finish(&last).is_err());
    }
    let mut client = ScramClient::new("n", plus.then_some(b"hash"), plus);
    // Bounded work: a server may ask for many rounds.
    if !last.windows(8).any(|w| w.iter().all(u8::is_ascii_digit)) {
        let _ = client.prove(Knows::Password("x", &Derived::default()), &first);
    }
    assert!(client.finish(&last).is_err());
});
