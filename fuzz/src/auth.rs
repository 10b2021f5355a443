//! Both sides of SCRAM, and what PostgreSQL stores of a password, fed with anything.

use cofferdam_postgres::auth::{Derived, Knows, ScramClient, ScramKeys, ScramServer};

/// Up to three parts with a zero byte between them: the first message, the last, and what is stored; with a certificate or not.
pub fn run(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == 0);
    let mut part = || parts.next().unwrap_or_default();
    let (first, last, stored) = (part(), part(), part());
    let plus = data.len().is_multiple_of(2);
    let keys = std::str::from_utf8(stored).ok().and_then(ScramKeys::parse).or_else(|| {
        ScramKeys::parse("SCRAM-SHA-256$1:AAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")
    });
    if let Some(keys) = &keys
        && let Ok(server) = ScramServer::begin(keys, first, "nonce", plus.then_some(b"hash"), plus)
    {
        // Nobody knows a password for these keys.
        assert!(server.finish(last).is_err());
    }
    let mut client = ScramClient::new("n", plus.then_some(b"hash"), plus);
    // Bounded work: a server may ask for many rounds.
    if !first.windows(6).any(|w| w.iter().all(u8::is_ascii_digit)) {
        let _ = client.prove(Knows::Password("x", &Derived::default()), first);
    }
    assert!(client.finish(last).is_err());
}
