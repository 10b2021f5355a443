//! Message framing of both sides.

use cofferdam_postgres::wire::{Frame, Side, frame};

/// Panics when something is wrong.
pub fn run(data: &[u8]) {
    for side in [Side::Client, Side::Server] {
        let mut rest = data;
        while let Ok(Some(f)) = frame(side, rest) {
            assert!(f.total >= Frame::HEADER && f.total <= 0x4000_0000);
            match rest.get(f.total..) {
                Some(after) => rest = after,
                None => break,
            }
        }
    }
}
