//! In place of what is there: one transaction renames two databases, and another would rename them back.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::loader::Loader;
use super::settings::{self, Access};
use super::{LOCKS, LONGEST_NAME, Restore, files, stopped};
use crate::logical::blocking;
use crate::model::{BackupSet, RestorePlan, Restored};
use crate::repository::Repository;
use crate::server::{literal, quoted};
use crate::{Control, Error};

/// How long transactions that run may hold up a swap.
const PATIENCE: Duration = Duration::from_secs(30);
/// For how long is tried to rename while somebody keeps connecting.
const INSISTENCE: Duration = Duration::from_secs(15);
const BEFORE: &str = "__before_";
/// How far a cache's number goes ahead: further than it can be counted until the databases have changed places.
const AHEAD: i64 = 1_000;

/// A database that a swap has left for a way back.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Previous {
    /// Its name now.
    pub database: String,
    /// When it was replaced.
    pub since: Timestamp,
}

impl Restore {
    pub(super) async fn swap(
        &self,
        repository: &Arc<Repository>,
        set: &BackupSet,
        plan: &RestorePlan,
        target: &Path,
        control: &Control,
    ) -> Result<(Option<String>, Option<u64>), Error> {
        files::add(repository, set, target, control).await?;
        let previous = self.free_name().await?;
        let kept = self.keep_files(target, &previous).await.and_then(|()| stopped(control));
        self.or_without_files(kept, &previous, control).await?;
        control.phase("changing places", None);
        let owner = self.owner().await?;
        let changed = self.change_places(&plan.database, &previous, &plan.staging, &owner, true, control).await;
        let paused = self.or_without_files(changed, &previous, control).await?;
        // Files of transactions that ended between the two belong to what was replaced.
        self.keep_late_files(target, &previous, control).await;
        // A collector may have run between the writing of a file and the change: what it took is written again.
        // The change has happened: whatever fails now is no reason to call it undone.
        if let Err(error) = files::add(repository, set, target, &Control::default()).await {
            control.warn(format!("the database is in place, but not every file: {error}"));
        }
        Ok((Some(previous), paused.map(|p| p.as_millis() as u64)))
    }

    /// Puts back what a swap has replaced. What is there now is kept in turn.
    pub async fn revert(&self, previous: &str, control: &Control) -> Result<Restored, Error> {
        let started = Instant::now();
        let known = self.previous().await?;
        if !known.iter().any(|p| p.database == previous) {
            let names: Vec<_> = known.iter().map(|p| p.database.as_str()).collect();
            let there = if names.is_empty() { "there is none".to_owned() } else { names.join(", ") };
            let reason = format!("`{previous}` is not a database that a swap of {} has left: {there}", self.database);
            return Err(Error::Refused(format!("{reason}; nothing was changed")));
        }
        control.phase("changing places", None);
        let target = self.filestores.join(&self.database);
        let kept = self.filestores.join(previous);
        // First every file that the old database refers to, then the database.
        let (from, to) = (kept.clone(), target.clone());
        blocking(move || files::link_tree(&from, &to)).await?;
        let replaced = self.free_name().await?;
        let opened = async {
            self.keep_files(&target, &replaced).await?;
            self.open_quietly(previous).await
        };
        let owner = self.or_without_files(opened.await, &replaced, control).await?;
        let changed = async {
            let loader = Loader::create(&self.server, previous, &owner).await?;
            let outdated = control.unless_cancelled(self.outdate_caches(&loader, &self.database, previous)).await;
            loader.remove_after(outdated, &self.server, previous, control).await?;
            self.change_places(&self.database, &replaced, previous, &owner, false, control).await
        };
        let changed = changed.await;
        let paused = match self.or_without_files(changed, &replaced, control).await {
            Ok(paused) => paused,
            Err(error) => {
                // As it was: closed, and its owner's.
                if let Err(left) = self.close_again(previous, &owner).await {
                    control.warn(format!("{previous} stays open: {left}"));
                }
                return Err(error);
            }
        };
        self.keep_late_files(&target, &replaced, control).await;
        // Once more, now that the old state is there again: a collector may have taken what only that refers to.
        let (from, to) = (kept.clone(), target.clone());
        match blocking(move || files::link_tree(&from, &to)).await {
            Ok(()) => drop(tokio::fs::remove_dir_all(&kept).await),
            Err(error) => control.warn(format!("the database is in place, but perhaps not every file: {error}")),
        }
        Ok(Restored {
            set: crate::model::SetId::default(),
            taken_at: Timestamp::now(),
            database: self.database.clone(),
            filestore: Some(target.display().to_string()),
            previous: Some(replaced),
            files: 0,
            took_ms: started.elapsed().as_millis() as u64,
            paused_ms: paused.map(|p| p.as_millis() as u64),
        })
    }

    /// What swaps have left for a way back, oldest first. A name alone proves nothing, because others may create databases:
    /// it must belong to the tenant's owner, or to us after a way back that was interrupted.
    pub async fn previous(&self) -> Result<Vec<Previous>, Error> {
        let now = Timestamp::now() + SignedDuration::from_mins(5);
        let query = "SELECT datname::text FROM pg_database WHERE datdba IN (\
                       SELECT datdba FROM pg_database WHERE datname = $1 \
                       UNION SELECT oid FROM pg_roles WHERE rolname IN (current_user, $2)) ORDER BY 1";
        let owner = self.owner.as_deref().unwrap_or_default();
        Ok(self.named(query, &[&self.database, &owner]).await?.into_iter().filter(|p| p.since < now).collect())
    }

    async fn named(
        &self,
        query: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<Previous>, Error> {
        let client = self.server.connect(&self.server.maintenance).await?;
        let rows = client.query(query, parameters).await.map_err(|e| self.server.failed(&self.database, &e))?;
        Ok(rows.iter().filter_map(|row| parse_before(&self.database, row.get(0))).collect())
    }

    /// Removes what swaps have left, database and files, when it has been there for longer than `keep`.
    pub async fn drop_previous(&self, keep: Duration, now: Timestamp) -> Result<Vec<Previous>, Error> {
        let (mut dropped, mut failed) = (Vec::new(), None);
        for previous in self.previous().await? {
            let age = now.duration_since(previous.since);
            if age.as_secs() < 0 || age.unsigned_abs() < keep {
                continue;
            }
            if let Err(error) = self.drop_database(&previous.database).await {
                failed = Some(error);
                continue;
            }
            let _ = tokio::fs::remove_dir_all(self.filestores.join(&previous.database)).await;
            dropped.push(previous);
        }
        self.drop_orphans(keep, now).await?;
        failed.map_or(Ok(dropped), Err)
    }

    /// Removes files that were kept for a way back whose database is not there: what kept them has died.
    async fn drop_orphans(&self, keep: Duration, now: Timestamp) -> Result<(), Error> {
        let there = self.named("SELECT datname::text FROM pg_database", &[]).await?;
        let Ok(mut entries) = tokio::fs::read_dir(&self.filestores).await else { return Ok(()) };
        while let Ok(Some(entry)) = entries.next_entry().await {
            let Some(kept) = entry.file_name().to_str().and_then(|name| parse_before(&self.database, name)) else {
                continue;
            };
            let age = now.duration_since(kept.since);
            // One that is being made is younger than a day.
            let old = age.as_secs() >= 0 && age.unsigned_abs() >= keep.max(Duration::from_secs(86_400));
            if old && !there.contains(&kept) {
                let _ = tokio::fs::remove_dir_all(entry.path()).await;
            }
        }
        Ok(())
    }

    /// The name for what is replaced now; a second later where there is one of this second.
    pub(super) async fn free_name(&self) -> Result<String, Error> {
        let taken = self.named("SELECT datname::text FROM pg_database", &[]).await?;
        let mut now = Timestamp::now();
        loop {
            let name = before_name(&self.database, now)?;
            if !taken.iter().any(|previous| previous.database == name) {
                return Ok(name);
            }
            now += SignedDuration::from_secs(1);
        }
    }

    pub(super) async fn keep_files(&self, target: &Path, previous: &str) -> Result<(), Error> {
        let (from, to) = (target.to_owned(), self.filestores.join(previous));
        blocking(move || files::link_tree(&from, &to)).await
    }

    /// The outcome of a change; where it has not happened, what was kept for the way back is removed.
    pub(super) async fn or_without_files<T>(
        &self,
        changed: Result<T, Error>,
        kept: &str,
        control: &Control,
    ) -> Result<T, Error> {
        if changed.is_err() {
            // An error may have come after the change: then the files belong to what was replaced.
            match self.previous().await {
                Ok(known) if !known.iter().any(|previous| previous.database == kept) => {
                    let _ = tokio::fs::remove_dir_all(self.filestores.join(kept)).await;
                }
                _ => control.warn(format!("the files of {kept} stay")),
            }
        }
        changed
    }

    pub(super) async fn keep_late_files(&self, target: &Path, previous: &str, control: &Control) {
        if let Err(error) = self.keep_files(target, previous).await {
            control.warn(format!("{previous} may lack the files of its last moments: {error}"));
        }
    }

    /// `current` becomes `away`, `next` becomes `current` and `owner`'s, at one instant. Transactions wait meanwhile, where
    /// there is a gateway; without one everybody is disconnected. With `inherit`, who may connect, how often and with which
    /// settings goes over to what comes in.
    pub(super) async fn change_places(
        &self,
        current: &str,
        away: &str,
        next: &str,
        owner: &str,
        inherit: bool,
        control: &Control,
    ) -> Result<Option<Duration>, Error> {
        let client = self.server.connect(&self.server.maintenance).await?;
        let mut give = format!("ALTER DATABASE {} OWNER TO {}; ", quoted(next), quoted(owner));
        if inherit {
            let failed = |e: &tokio_postgres::Error| self.server.failed(current, e);
            let access = Access::of(&client, current).await.map_err(|e| failed(&e))?;
            give.push_str(&access.grant(next));
            for statement in settings::of(&client, current, next).await.map_err(|e| failed(&e))? {
                // Not worth a failure: what it is may be more than we may set.
                if let Err(error) = client.batch_execute(&statement).await {
                    control.warn(format!("a setting of {current} is not taken over: {}", failed(&error)));
                }
            }
        }
        let started = Instant::now();
        if let Some(gateway) = &self.gateway {
            gateway.pause(current, PATIENCE).await?;
        }
        let renamed = self.rename(&client, current, away, next, &give).await;
        if let Some(gateway) = &self.gateway {
            // Whatever came of it: nobody is left waiting.
            let resumed = gateway.resume(current).await;
            match (renamed, resumed) {
                (Err(error), _) => return Err(error),
                // It has happened, and is not called anything else.
                (Ok(()), Err(error)) => control.warn(format!("{current} is in place, but its gateway waits: {error}")),
                (Ok(()), Ok(())) => {}
            }
            return Ok(Some(started.elapsed()));
        }
        renamed.map(|()| None)
    }

    /// Lets us into a database that a swap has closed, and nobody else: Odoo's workers look at every database of their
    /// role's that is open, and would run its jobs. Its owner; where a revert has died that had made it ours, the owner of
    /// the tenant's database.
    async fn open_quietly(&self, database: &str) -> Result<String, Error> {
        let client = self.server.connect(&self.server.maintenance).await?;
        let failed = |e: &tokio_postgres::Error| self.server.failed(database, e);
        let query = "SELECT r.rolname::text FROM pg_catalog.pg_database d JOIN pg_catalog.pg_roles r ON r.oid = d.datdba \
                     WHERE d.datname = $1";
        let owner: String = client.query_one(query, &[&database]).await.map_err(|e| failed(&e))?.get(0);
        let owner = if owner == self.server.user { self.owner().await? } else { owner };
        let open = format!(
            "BEGIN; {LOCKS}; ALTER DATABASE {0} OWNER TO CURRENT_USER; ALTER DATABASE {0} WITH ALLOW_CONNECTIONS true; COMMIT",
            quoted(database)
        );
        client.batch_execute(&open).await.map_err(|e| failed(&e))?;
        Ok(owner)
    }

    async fn close_again(&self, database: &str, owner: &str) -> Result<(), Error> {
        let client = self.server.connect(&self.server.maintenance).await?;
        let close = format!(
            "BEGIN; {LOCKS}; ALTER DATABASE {0} WITH ALLOW_CONNECTIONS false; ALTER DATABASE {0} OWNER TO {1}; COMMIT",
            quoted(database),
            quoted(owner)
        );
        client.batch_execute(&close).await.map_err(|e| self.server.failed(database, &e))
    }

    /// Everything in one transaction: there is no instant at which Odoo's workers, who visit every database that is their
    /// role's and open, would find the old one beside the new.
    async fn rename(&self, client: &Client, current: &str, away: &str, next: &str, give: &str) -> Result<(), Error> {
        let failed = |e: &tokio_postgres::Error| self.server.failed(current, e);
        let swap = format!(
            "{give}ALTER DATABASE {0} RENAME TO {1}; ALTER DATABASE {1} WITH ALLOW_CONNECTIONS false; \
             ALTER DATABASE {2} RENAME TO {0}",
            quoted(current),
            quoted(away),
            quoted(next)
        );
        let incoming = oid_of(client, next).await.map_err(|e| failed(&e))?;
        let Err(error) = self.insist(client, &[current, next], &swap).await else { return Ok(()) };
        // Where the connection was lost, nobody has said whether it has happened: whoever is there now does.
        if client.is_closed()
            && let Ok(client) = self.server.connect(&self.server.maintenance).await
            && incoming.is_some()
            && oid_of(&client, current).await.is_ok_and(|there| there == incoming)
        {
            return Ok(());
        }
        Err(failed(&error))
    }

    /// Odoo's workers compare numbers in the database with those they remember, to see whether what they have cached is
    /// still true. The database that comes in must have numbers that nobody has seen.
    pub(super) async fn outdate_caches(&self, loader: &Loader, current: &str, next: &str) -> Result<(), Error> {
        let (now, then) = (self.server.connect_to_tenant(current).await?, loader.connect(next).await?);
        let failed = |e: &tokio_postgres::Error| self.server.failed(next, e);
        // Where everybody's right to the schema was taken away, the owner has it as the database's owner, which it is not now.
        let ours = self.server.connect(next).await?;
        let may = "SELECT has_schema_privilege($1, 'public', 'USAGE') FROM pg_namespace WHERE nspname = 'public'";
        let may = ours.query_opt(may, &[&loader.owner]).await.map_err(|e| failed(&e))?.is_none_or(|row| row.get(0));
        let owner = quoted(&loader.owner);
        if !may {
            let enter = format!("GRANT USAGE ON SCHEMA public TO {owner}");
            ours.batch_execute(&enter).await.map_err(|e| failed(&e))?;
        }
        // To 18 sequences, from 19 on tables with a serial id.
        let query = "SELECT quote_ident(schemaname) || '.' || quote_ident(sequencename), coalesce(last_value, 0) \
                     FROM pg_catalog.pg_sequences WHERE schemaname = 'public' \
                     AND (sequencename LIKE 'base\\_%\\_signaling%' \
                     OR sequencename LIKE 'orm\\_signaling\\_%\\_id\\_seq')";
        let seen = now.query(query, &[]).await.map_err(|e| failed(&e))?;
        for row in then.query(query, &[]).await.map_err(|e| failed(&e))? {
            let (sequence, value): (String, i64) = (row.get(0), row.get(1));
            let old = seen.iter().find(|r| r.get::<_, String>(0) == sequence).map_or(0, |r| r.get::<_, i64>(1));
            let set = format!("SELECT setval({}, {})", literal(&sequence), value.max(old).saturating_add(AHEAD));
            then.batch_execute(&set).await.map_err(|e| failed(&e))?;
            if let Some(table) = sequence.strip_suffix("_id_seq") {
                let insert = format!("INSERT INTO {table} DEFAULT VALUES");
                then.batch_execute(&insert).await.map_err(|e| failed(&e))?;
            }
        }
        if !may {
            let leave = format!("REVOKE USAGE ON SCHEMA public FROM {owner}");
            ours.batch_execute(&leave).await.map_err(|e| failed(&e))?;
        }
        Ok(())
    }
}

impl Restore {
    /// [`insist`], and where the connection is lost in between, until the server has ended what it was asked for: whoever looks
    /// then sees what has come of it.
    pub(super) async fn insist(
        &self,
        client: &Client,
        databases: &[&str],
        statements: &str,
    ) -> Result<(), tokio_postgres::Error> {
        let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
        let done = insist(client, databases, statements).await;
        if done.is_err() && client.is_closed() {
            let started = Instant::now();
            while started.elapsed() < SETTLED {
                let there = async {
                    let client = self.server.connect(&self.server.maintenance).await.ok()?;
                    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND application_name = 'cofferdam-backup'";
                    Some(!client.query(end, &[&pid]).await.ok()?.is_empty())
                };
                if there.await == Some(false) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
        done
    }
}

async fn oid_of(client: &Client, database: &str) -> Result<Option<u32>, tokio_postgres::Error> {
    let query = "SELECT oid FROM pg_catalog.pg_database WHERE datname = $1";
    Ok(client.query_opt(query, &[&database]).await?.map(|row| row.get(0)))
}

/// For so long is waited until a server has ended what it was doing for a connection that is lost.
const SETTLED: Duration = Duration::from_secs(60);

/// Does what can be done only while nobody is connected to some databases, in one transaction: sends everybody away and
/// tries, and again while somebody comes back.
async fn insist(client: &Client, databases: &[&str], statements: &str) -> Result<(), tokio_postgres::Error> {
    let names = databases.iter().map(|name| literal(name)).collect::<Vec<_>>().join(", ");
    let leave = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname IN ({names}) AND pid <> pg_backend_pid()"
    );
    let transaction = format!("BEGIN; {LOCKS}; {statements}; COMMIT");
    let started = Instant::now();
    loop {
        // Who may not be sent away by us may be gone by themselves; if not, the server says that they are there.
        let left = client.batch_execute(&leave).await.err();
        let Err(error) = client.batch_execute(&transaction).await else { return Ok(()) };
        let _ = client.batch_execute("ROLLBACK").await;
        if error.code() != Some(&SqlState::OBJECT_IN_USE) || started.elapsed() > INSISTENCE {
            return Err(left.unwrap_or(error));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn before_name(database: &str, now: Timestamp) -> Result<String, Error> {
    let name = format!("{database}{BEFORE}{}", now.strftime("%Y%m%dt%H%M%S"));
    if name.len() > LONGEST_NAME {
        let longest = LONGEST_NAME - (name.len() - database.len());
        let found = format!("the name {database} leaves no room for the one that is replaced");
        return Err(Error::Refused(format!("{found}: expected at most {longest} bytes; nothing was changed")));
    }
    Ok(name)
}

fn parse_before(database: &str, name: &str) -> Option<Previous> {
    let stamp = name.strip_prefix(database)?.strip_prefix(BEFORE)?;
    let since = jiff::civil::DateTime::strptime("%Y%m%dt%H%M%S", stamp).ok()?;
    let since = since.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
    Some(Previous { database: name.to_owned(), since })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_what_was_replaced_says_whose_it_is_and_since_when() {
        let now: Timestamp = "2026-11-27T08:15:30Z".parse().unwrap();
        let name = before_name("acme", now).unwrap();
        assert_eq!(name, "acme__before_20261127t081530");
        assert_eq!(parse_before("acme", &name), Some(Previous { database: name.clone(), since: now }));
        // Neither another tenant's nor anything else is taken for it.
        assert_eq!(parse_before("acm", &name), None);
        assert_eq!(parse_before("acme", "acme__before_christmas"), None);
        assert_eq!(parse_before("acme", "acme_eu__before_20261127t081530"), None);
        assert!(before_name(&"x".repeat(60), now).unwrap_err().to_string().contains("at most 39 bytes"));
    }
}
