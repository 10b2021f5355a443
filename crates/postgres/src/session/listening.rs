//! `LISTEN` and `UNLISTEN` of a client whose transactions go through a pool: what it listens to, with the semantics of
//! transactions.

use std::collections::BTreeSet;

use super::Session;
use crate::sql::{self, Listen};
use crate::wire::{Frame, TransactionStatus, cstr};

/// What a server connection gets in the place of `LISTEN`: it fails where that would, and does nothing, since no
/// connection of a pool listens to anything.
pub(super) const INSTEAD_OF_LISTEN: &str = "UNLISTEN cofferdam_listen";

impl Session {
    /// What the transaction has said about listening holds.
    pub(super) fn committed(&mut self) {
        (self.rolled_back, self.failed) = (false, false);
        for listen in std::mem::take(&mut self.pending) {
            self.hear(listen);
        }
    }

    /// ReadyForQuery has come: what was said about listening holds, or not, or this is not known yet.
    pub(super) fn settle_listening(&mut self) {
        let (rolled_back, failed) = (std::mem::take(&mut self.rolled_back), std::mem::take(&mut self.failed));
        match self.status {
            TransactionStatus::Idle if rolled_back || failed => self.pending.clear(),
            TransactionStatus::Idle => self.committed(),
            // Back to a savepoint, and what was said after it is undone. Who listens too long misses nothing.
            TransactionStatus::Open if rolled_back => self.pending.retain(|listen| matches!(listen, Listen::To(_))),
            _ => {}
        }
        // Portals end with their transaction; those of what has been sent since belong to the next one.
        if self.status == TransactionStatus::Idle && self.pipeline.len() <= 1 {
            self.listen_portals.clear();
        }
    }

    pub(super) fn hear(&mut self, listen: Listen) {
        match listen {
            Listen::To(channel) => drop(self.listening.insert(channel)),
            Listen::Not(channel) => drop(self.listening.remove(&channel)),
            Listen::ToNothing => self.listening.clear(),
        }
    }

    /// The channel that a Query or Execute is about to listen to: it must be heard of before the client is told so.
    pub fn is_about_to_listen(&self, frame: Frame, seen: &[u8]) -> Option<String> {
        if !self.shares_listener || self.refused || self.pipeline.skipping() || self.pipeline.copying_in() {
            return None;
        }
        let body = seen.get(Frame::HEADER..)?;
        let listen = match frame.kind {
            b'Q' if seen.len() >= frame.total => sql::listen(body)?,
            b'E' if !self.listen_portals.is_empty() => self.listen_portals.get(cstr(body)?.0)?.clone(),
            _ => return None,
        };
        if let Listen::To(channel) = listen { Some(channel) } else { None }
    }

    /// The channels that the client listens to.
    pub fn listening(&self) -> &BTreeSet<String> {
        &self.listening
    }

    /// From now on, notifications of the server connection itself are not for this client.
    pub fn be_deaf(&mut self, deaf: bool) {
        self.deaf = deaf;
    }

    /// Whether `LISTEN` is done by the gateway, for this and the following messages.
    pub fn share_listener(&mut self, shares: bool) {
        self.shares_listener = shares;
    }
}

/// The body of a Parse message after its name, if it is a `LISTEN` or `UNLISTEN`, with something harmless in its place.
pub(super) fn instead_of_listen(rest: &[u8]) -> Option<(Listen, Vec<u8>)> {
    let (text, types) = cstr(rest)?;
    Some((sql::listen(text)?, [INSTEAD_OF_LISTEN.as_bytes(), &[0], types].concat()))
}
