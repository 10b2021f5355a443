//! How long a client may do what: what its plan says, and what keeps a slot from being held for nothing.

use std::time::Duration;

use tokio::time::Instant;

use super::{End, Relay, SLOW_READER};
use crate::wire::Reply;

/// A statement that was cancelled has to end within this time, or its session does.
const CANCELLED: Duration = Duration::from_secs(10);

/// A client that has done nothing for so long will hardly be in the middle of something.
const QUIET: Duration = Duration::from_secs(1);

/// What has to happen until when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limit {
    /// The client takes what was written for it.
    SlowReader,
    /// The client goes on with its transaction.
    IdleInTransaction,
    /// The server answers.
    Statement,
    /// The transaction ends.
    Transaction,
    /// The client does anything.
    Idle,
    /// The same, when the gateway has a successor.
    Draining,
}

/// A statement that runs under a limit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Busy {
    /// What had been answered when it began: with each answer the next statement begins.
    answers: u64,
    until: Instant,
    is_cancelled: bool,
}

impl Relay {
    /// The limit that comes first, and when.
    pub(super) fn next_limit(&mut self, unwritten: bool) -> Option<(Instant, Limit)> {
        // It holds a slot and makes the server wait: in a transaction, in COPY, or in the middle of a message.
        let sent = self.lease.as_ref().is_none_or(|l| l.upstream.outbound.is_empty());
        let in_message = self.passing.forward && self.passing.remaining > 0 && self.session.owes_one_at_most();
        let idles = self.permit.is_some()
            && sent
            && !self.stalled
            && !self.overwhelmed
            && (self.session.waits_for_client() || in_message);
        let route = &self.established.route;
        let first = match (unwritten, idles) {
            (true, _) => Some((Instant::now() + SLOW_READER, Limit::SlowReader)),
            (false, true) => {
                let limit = route.idle_in_transaction;
                let until = *self.idle_until.get_or_insert_with(|| Instant::now() + limit);
                Some((until, Limit::IdleInTransaction))
            }
            (false, false) => {
                self.idle_until = None;
                None
            }
        };
        let is_idle = self.permit.is_none() && self.session.is_at_rest();
        let draining = self.drains.filter(|_| is_idle).map(|_| (Instant::now() + QUIET, Limit::Draining));
        let first = first.or(draining);
        let Some(limits) = &mut self.limits else { return first };
        let runs = self.permit.is_some() && !idles && self.session.is_waiting_for_server();
        limits.busy = match (limits.statement, runs) {
            (Some(limit), true) => {
                let answers = self.session.answers();
                let begun = || Busy { answers, until: Instant::now() + limit, is_cancelled: false };
                Some(limits.busy.filter(|busy| busy.answers == answers).unwrap_or_else(begun))
            }
            _ => None,
        };
        let statement = limits.busy.map(|busy| (busy.until, Limit::Statement));
        let ends = self.permit.as_ref().and_then(|slot| slot.until);
        let transaction = ends.map(|until| (until, Limit::Transaction));
        let is_idle = is_idle && self.session.listening().is_empty();
        let idle = limits.idle.filter(|_| is_idle).map(|limit| (Instant::now() + limit, Limit::Idle));
        [first, statement, transaction, idle].into_iter().flatten().min_by_key(|(until, _)| *until)
    }

    /// A limit is reached. The session ends, unless it is a statement that can be cancelled.
    pub(super) async fn limit_reached(&mut self, limit: Limit) -> Result<(), End> {
        let name = &self.established.route.name;
        let limits = self.limits.as_deref().copied().unwrap_or_default();
        let fatal = |code, what: &str, after: Duration| {
            let message = format!("terminating connection due to {what} ({after:?}, from the plan of {name})");
            Err(End::Fatal { code, message })
        };
        match limit {
            Limit::SlowReader => Err(End::ClientGone),
            Limit::Draining => Err(super::shutting_down()),
            Limit::IdleInTransaction => {
                fatal("25P03", "idle-in-transaction timeout", self.established.route.idle_in_transaction)
            }
            Limit::Transaction => fatal("25P04", "transaction timeout", limits.transaction.unwrap_or_default()),
            Limit::Idle => fatal("57P05", "idle-session timeout", limits.idle.unwrap_or_default()),
            Limit::Statement => {
                let after = limits.statement.unwrap_or_default();
                let Some(target) = self.lease.as_ref().map(|l| &l.upstream.target) else { return Ok(()) };
                if limits.busy.is_some_and(|busy| busy.is_cancelled) {
                    return fatal("57014", "statement timeout", after);
                }
                // The task goes on only when the server has taken the cancel: it hits nobody else (rule 16).
                if let Err(error) = target.cancel().await {
                    tracing::debug!(%error, "a statement that took too long could not be cancelled");
                }
                let answers = self.session.answers();
                if let Some(limits) = &mut self.limits {
                    limits.busy = Some(Busy { answers, until: Instant::now() + CANCELLED, is_cancelled: true });
                }
                if self.server_passing.remaining == 0 {
                    let message =
                        format!("cofferdam: {name}: cancelled after {after:?}, `statement_timeout` of its plan");
                    self.outbound.notice(&message);
                }
                Ok(())
            }
        }
    }
}
