//! Message framing: one type byte, a four-byte length that counts itself, the body.

/// Who sent a message: the same type byte means different things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The client, also called the frontend.
    Client,
    /// The server, also called the backend.
    Server,
}

/// The header of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// The type byte.
    pub kind: u8,
    /// Bytes of the whole message, header included.
    pub total: usize,
}

impl Frame {
    /// Bytes of type and length.
    pub const HEADER: usize = 5;
}

/// A message that PostgreSQL would refuse too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The length is below four, or above what the type allows.
    #[error("invalid length {length} in a message of type {:?}", char::from(*kind))]
    Length {
        /// The type byte.
        kind: u8,
        /// The length as sent.
        length: i32,
    },
    /// No message of this type exists.
    #[error("invalid message type {0:#04x}")]
    Kind(u8),
}

/// PostgreSQL's own bound for messages that may be long (`MaxAllocSize`).
const LARGE: i32 = 0x3fff_ffff;
/// PostgreSQL's own bound for the others (`PQ_SMALL_MESSAGE_LIMIT`).
const SMALL: i32 = 10_000;

/// The header at the front of `bytes`; `None` when it is not complete yet.
///
/// Every length is bounded here, before any arithmetic with it (rule 1 of the PostgreSQL plane).
pub fn frame(side: Side, bytes: &[u8]) -> Result<Option<Frame>, FrameError> {
    let Some(&kind) = bytes.first() else { return Ok(None) };
    let limit = match (side, kind) {
        (Side::Client, b'Q' | b'P' | b'B' | b'F' | b'd' | b'f' | b'p') => LARGE,
        (Side::Client, b'C' | b'D' | b'E') => LARGE,
        (Side::Client, b'H' | b'S' | b'X' | b'c') => SMALL,
        (Side::Client, other) => return Err(FrameError::Kind(other)),
        (Side::Server, b'A'..=b'Z' | b'a'..=b'z' | b'1'..=b'3') => LARGE,
        (Side::Server, other) => return Err(FrameError::Kind(other)),
    };
    let Some(&[_, a, b, c, d]) = bytes.first_chunk::<5>() else { return Ok(None) };
    let length = i32::from_be_bytes([a, b, c, d]);
    if !(4..=limit).contains(&length) {
        return Err(FrameError::Length { kind, length });
    }
    Ok(Some(Frame { kind, total: length.unsigned_abs() as usize + 1 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_length_below_four_or_beyond_all_bounds_is_refused() {
        for length in [0i32, 3, -1, i32::MIN, i32::MAX, LARGE + 1] {
            let mut bytes = vec![b'Q'];
            bytes.extend(length.to_be_bytes());
            assert_eq!(frame(Side::Client, &bytes), Err(FrameError::Length { kind: b'Q', length }));
        }
        assert_eq!(frame(Side::Client, b"S\0\0\xff\xff"), Err(FrameError::Length { kind: b'S', length: 65535 }));
    }

    #[test]
    fn an_unknown_type_is_refused_before_its_length_arrives() {
        assert_eq!(frame(Side::Client, b"!"), Err(FrameError::Kind(b'!')));
        assert_eq!(frame(Side::Client, b"Q\0"), Ok(None));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_framing_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for side in [Side::Client, Side::Server] {
                if let Ok(Some(f)) = frame(side, &bytes) {
                    prop_assert!(f.total >= Frame::HEADER);
                }
            }
        }
    }
}
