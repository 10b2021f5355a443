//! The wire protocol, without I/O: frames, startup packets, and the messages that the gateway says itself.

mod frame;
mod reply;
mod startup;

pub use frame::{Frame, FrameError, Side, frame};
pub(crate) use reply::put_cstr;
pub use reply::{Reply, Severity, TransactionStatus};
pub use startup::{CancelKey, Startup, StartupError, StartupParameters, startup};

/// Reads a NUL-terminated string from the front; the text and what follows the NUL.
pub fn cstr(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|b| *b == 0)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}
