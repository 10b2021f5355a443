//! What has been, beyond what fits in memory: changes of checks, kept in PostgreSQL.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use tokio::sync::Mutex;
use tokio_postgres::Client;

use crate::engine::Change;
use crate::model::{CheckId, Subject};
use crate::probe::{Database, Look, LookError, reason};

/// A change of a check, as it was kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Which check.
    pub check: CheckId,
    /// When it was believed.
    pub at: Timestamp,
    /// From which status, as a word.
    pub from: String,
    /// To which.
    pub to: String,
    /// What was seen then.
    pub text: String,
}

/// Keeps changes in a table of a database, `cofferdam_health_changes`, which is made where it is not there.
pub struct History {
    database: Database,
    keep: SignedDuration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What is not kept yet, oldest first.
    waiting: VecDeque<(CheckId, Change)>,
    look: Option<Look>,
    /// A database that is away is left alone for a while: what is to be told must not wait for it.
    not_before: Option<Timestamp>,
    pruned: Option<Timestamp>,
}

impl std::fmt::Debug for History {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("History").field("database", &self.database.database).finish_non_exhaustive()
    }
}

/// More than this does not wait for a database that does not answer: the oldest go.
const WAITING: usize = 10_000;
/// How long keeping may take.
const LIMIT: Duration = Duration::from_secs(10);
/// After a failure the next try is this much later.
const AGAIN: SignedDuration = SignedDuration::from_secs(60);
const TABLE: &str = "CREATE TABLE IF NOT EXISTS public.cofferdam_health_changes (
    at timestamptz NOT NULL, kind text NOT NULL, subject text NOT NULL, aspect text NOT NULL,
    was text NOT NULL, became text NOT NULL, what text NOT NULL, PRIMARY KEY (at, kind, subject, aspect))";

impl History {
    /// A history in a database, of which what is older than `keep` goes. Connects when there is something to keep.
    pub fn new(database: Database, keep: Duration) -> Self {
        let keep = SignedDuration::try_from(keep).unwrap_or(SignedDuration::MAX);
        Self { database, keep, state: Mutex::default() }
    }

    async fn open(&self) -> Result<Look, LookError> {
        let look = self.database.connect().await?;
        // Made as for looking, which writes nothing.
        look.client.batch_execute("SET default_transaction_read_only = off").await?;
        // Where it is there already, whoever only reads and writes needs no more.
        let there = "SELECT to_regclass('public.cofferdam_health_changes') IS NOT NULL";
        if !look.client.query_one(there, &[]).await?.get::<_, bool>(0) {
            look.client.batch_execute(TABLE).await?;
        }
        // Where everybody may create tables, somebody else may have made one of this name: what writes into it would run what
        // its owner has put there, and show it what is written.
        let whose = "SELECT c.relkind = 'r' AND (c.relowner = (SELECT oid FROM pg_roles WHERE rolname = current_user) \
                       OR o.rolsuper OR c.relowner = d.datdba), o.rolname::text \
                     FROM pg_class c JOIN pg_roles o ON o.oid = c.relowner, pg_database d \
                     WHERE c.oid = to_regclass('public.cofferdam_health_changes') AND d.datname = current_database()";
        let row = look.client.query_one(whose, &[]).await?;
        if !row.get::<_, bool>(0) {
            let owner: String = row.get(1);
            let reason = format!(
                "public.cofferdam_health_changes is {owner}'s, and nothing is written there; expected a table of ours"
            );
            return Err(io::Error::other(reason).into());
        }
        Ok(look)
    }

    /// Keeps changes, and those that could not be kept before. What went wrong, in words; it is tried again with the next.
    pub async fn keep(&self, changes: Vec<(CheckId, Change)>, now: Timestamp) -> Result<(), String> {
        let state = &mut *self.state.lock().await;
        state.waiting.extend(changes);
        while state.waiting.len() > WAITING {
            state.waiting.pop_front();
        }
        // A clock that is set back is no reason to wait for longer.
        let early = |at: Timestamp| now < at && at.duration_since(now) <= AGAIN;
        if state.waiting.is_empty() || state.not_before.is_some_and(early) {
            return Ok(());
        }
        let kept = tokio::time::timeout(LIMIT, self.write(state, now)).await;
        let kept = kept.map_or_else(
            |_| Err(format!("no answer within {} s", LIMIT.as_secs())),
            |kept| kept.map_err(|error| error.reason()),
        );
        kept.map_err(|error| {
            (state.look, state.not_before) = (None, now.checked_add(AGAIN).ok());
            format!("{} changes are not kept yet: {error}", state.waiting.len())
        })
    }

    async fn write(&self, state: &mut State, now: Timestamp) -> Result<(), LookError> {
        if state.look.as_ref().is_none_or(|look| look.client.is_closed()) {
            state.look = Some(self.open().await?);
        }
        let Some(Look { client, .. }) = &state.look else { return Ok(()) };
        while !state.waiting.is_empty() {
            let some = state.waiting.len().min(500);
            let column = |value: &dyn Fn(&(CheckId, Change)) -> String| -> Vec<String> {
                state.waiting.iter().take(some).map(value).collect()
            };
            // Nought is no character of a text in PostgreSQL.
            let plain = |text: &str| text.replace('\0', " ");
            let insert = "INSERT INTO public.cofferdam_health_changes \
                          SELECT at::timestamptz, kind, subject, aspect, was, became, what \
                          FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[]) \
                          AS t (at, kind, subject, aspect, was, became, what) ON CONFLICT DO NOTHING";
            client
                .execute(
                    insert,
                    &[
                        &column(&|(_, change)| change.at.to_string()),
                        &column(&|(check, _)| kind_and_name(&check.subject).0.to_owned()),
                        &column(&|(check, _)| plain(kind_and_name(&check.subject).1)),
                        &column(&|(check, _)| plain(&check.aspect)),
                        &column(&|(_, change)| change.from.to_string()),
                        &column(&|(_, change)| change.to.to_string()),
                        &column(&|(_, change)| plain(&change.text)),
                    ],
                )
                .await?;
            state.waiting.drain(..some);
        }
        if state.pruned.is_none_or(|at| now.duration_since(at) > SignedDuration::from_hours(24)) {
            state.pruned = Some(now);
            let oldest = now.checked_sub(self.keep).unwrap_or(Timestamp::MIN).to_string();
            let prune = "DELETE FROM public.cofferdam_health_changes WHERE at < $1::text::timestamptz";
            client.execute(prune, &[&oldest]).await?;
        }
        Ok(())
    }

    /// What was kept since an instant, of a tenant or of everybody, newest first, at most `limit`.
    pub async fn since(&self, tenant: Option<&str>, since: Timestamp, limit: u32) -> Result<Vec<Kept>, String> {
        let look = self.open().await.map_err(|error| error.reason())?;
        read(&look.client, tenant, since, limit).await.map_err(|error| reason(&error))
    }
}

async fn read(
    client: &Client,
    tenant: Option<&str>,
    since: Timestamp,
    limit: u32,
) -> Result<Vec<Kept>, tokio_postgres::Error> {
    let query = "SELECT (extract(epoch FROM at) * 1000000)::int8, kind, subject, aspect, was, became, what \
                 FROM public.cofferdam_health_changes WHERE at >= $1::text::timestamptz \
                 AND ($2::text IS NULL OR kind = 'tenant' AND subject = $2) ORDER BY at DESC, kind, subject, aspect LIMIT $3";
    let rows = client.query(query, &[&since.to_string(), &tenant, &i64::from(limit)]).await?;
    let kept = |row: &tokio_postgres::Row| {
        let (kind, name): (String, String) = (row.get(1), row.get(2));
        let subject = if kind == "tenant" { Subject::Tenant(name) } else { Subject::Shared(name) };
        Kept {
            check: CheckId { subject, aspect: row.get(3) },
            at: Timestamp::from_microsecond(row.get(0)).unwrap_or(Timestamp::UNIX_EPOCH),
            from: row.get(4),
            to: row.get(5),
            text: row.get(6),
        }
    };
    Ok(rows.iter().map(kept).collect())
}

fn kind_and_name(subject: &Subject) -> (&'static str, &str) {
    match subject {
        Subject::Tenant(name) => ("tenant", name),
        Subject::Shared(name) => ("shared", name),
    }
}
