//! Message framing of both sides.
#![no_main]

use cofferdam_postgres::wire::{Frame, Side, frame};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
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
});
