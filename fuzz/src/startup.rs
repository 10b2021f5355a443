//! The first packet of a PostgreSQL client: parsed from anybody, before authentication.

use cofferdam_postgres::wire::{Startup, startup};

/// Panics when something is wrong.
pub fn run(data: &[u8]) {
    match startup(data) {
        Ok(Some((packet, length))) => {
            assert!((8..=10_000).contains(&length) && length <= data.len());
            if let Startup::Session(parameters) = packet {
                assert!(!parameters.user.is_empty() && !parameters.database.is_empty());
            }
            // A packet that is complete stays the same whatever follows it.
            let again = startup(&data[..length]).expect("the same bytes");
            assert_eq!(again.map(|(_, n)| n), Some(length));
        }
        Ok(None) => assert!(data.len() < 10_000),
        Err(_) => {}
    }
}
