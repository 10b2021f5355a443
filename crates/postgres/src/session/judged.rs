//! Messages that may make, take away or rename a database: somebody else decides whether they go on.

use super::{ClientStep, Session};
use crate::wire::{Frame, cstr};

impl Session {
    /// A message has to be judged: when what was sent before it is answered, since it may have to be refused.
    pub(super) fn judge(&self) -> ClientStep {
        if self.pipeline.is_empty() || self.pipeline.is_in_batch() { ClientStep::Judge } else { ClientStep::Later }
    }

    /// The text that has to be judged, of a message for which [`ClientStep::Judge`] was said; nothing when it cannot be seen
    /// as a whole.
    pub fn databases_text(&self, frame: Frame, seen: &[u8]) -> Option<Vec<u8>> {
        let body = seen.get(Frame::HEADER..)?;
        match frame.kind {
            b'Q' if seen.len() == frame.total => Some(cstr(body).map_or(body, |(text, _)| text).to_vec()),
            b'P' if seen.len() == frame.total => Some(cstr(cstr(body)?.1)?.0.to_vec()),
            b'B' => {
                let (name, _) = cstr(cstr(body)?.1)?;
                let parsed = if name.is_empty() { self.unnamed.as_deref()? } else { &self.statements.get(name)?.body };
                Some(cstr(parsed)?.0.to_vec())
            }
            _ => None,
        }
    }

    /// The message that is offered next may go on.
    pub fn judged(&mut self) {
        self.judged = true;
    }

    /// The session is one of a pool's login with the maintenance database.
    pub fn maintains(&mut self) {
        self.is_maintenance = true;
    }
}
