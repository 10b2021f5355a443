//! The filestore fence: for as long as it is up, Odoo's collector deletes no file that the snapshot refers to.
//!
//! One transaction holds `ir_attachment` in `ROW EXCLUSIVE` mode from before the snapshot is taken. Writers take the same mode and
//! are not held up. The collector wants `SHARE`, waits ten seconds, and gives up instead of deleting. But whoever comes
//! after the waiting collector waits behind it: so somebody watches, and lowers the fence when anybody has waited too
//! long. The transaction ends with the connection, and the connection with the process: no fence outlives its backup.
//! (`reference`: Backup, "Filestore fence".)

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::sequences::{Reading, Sequence, read_sequences, sequences};
use crate::model::{ChangeCounter, DatabaseLocale, Extension, FenceLimits};
use crate::server::{Server, changes_of, extensions_of, literal, locale_of, quoted};
use crate::{Control, Error, Event};
use cofferdam_rows::{self as rows, Read};

/// The lock that keeps the collector from deleting, or the reason why there is none.
pub(super) struct Fence {
    client: Client,
    /// The ids of what it holds.
    holds: Vec<u32>,
    unfenced: Option<String>,
    raised: Instant,
}

/// A snapshot of a database that others can use while it is held.
pub(super) struct Snapshot {
    client: Client,
    /// For `pg_dump --snapshot` and `SET TRANSACTION SNAPSHOT`.
    pub(super) id: String,
    /// The instant whose state it shows, by the server's clock.
    pub(super) taken_at: Timestamp,
    /// How far the server is behind the one that it follows.
    pub(super) behind: Option<Duration>,
    /// The log position, where the server has one to tell.
    pub(super) lsn: Option<String>,
    pub(super) server_version: String,
    pub(super) server_major: u32,
    /// Bytes of the database.
    pub(super) database_bytes: u64,
    pub(super) changes: Option<ChangeCounter>,
    pub(super) locale: DatabaseLocale,
    pub(super) extensions: Vec<Extension>,
}

/// How it went with the fence.
#[derive(Debug, Clone, Default)]
pub(super) struct FenceReport {
    /// Why it was not up until everything was copied; none: it was.
    pub(super) lowered: Option<String>,
    pub(super) up: Duration,
    pub(super) longest_wait: Duration,
}

/// The fence is raised at once or not at all: waiting for it would make others wait behind us.
const RAISE: &str = "SET LOCAL lock_timeout = '1s'";
/// Should this process hang, the server ends its transactions; and nobody can hold us up by holding a table.
const ALIVE: &str = "SET LOCAL idle_in_transaction_session_timeout = '60s'; SET LOCAL lock_timeout = '30s'";
/// How long it may take to read where sequences are: whoever changes them holds them.
const SEQUENCES: Duration = Duration::from_secs(300);
/// How often a transaction that is only held speaks.
const SPEAK: Duration = Duration::from_secs(10);
/// How often somebody looks who waits.
const WATCH: Duration = Duration::from_millis(250);

impl Fence {
    /// Raises the fence. That it cannot be had is no error: the backup is then verified instead.
    pub(super) async fn raise(server: &Server, database: &str, limits: &FenceLimits) -> Result<Self, Error> {
        let client = server.connect_to_tenant(database).await?;
        let failed = |e: &tokio_postgres::Error| server.failed(database, e);
        client.batch_execute(&format!("BEGIN; {ALIVE}; {RAISE}")).await.map_err(|e| failed(&e))?;
        let mut unfenced = (!limits.enabled).then(|| "the policy wants none".to_owned());
        // A standby grants this lock, which holds up nobody at the primary.
        let query = "SELECT pg_is_in_recovery()";
        if client.query_one(query, &[]).await.map_err(|e| failed(&e))?.get(0) {
            unfenced = Some("the server follows another, where files are deleted".to_owned());
        }
        // `fs_file_gc` belongs to a module that collects on its own, and is there or not.
        for (table, needed) in [("ir_attachment", true), ("fs_file_gc", false)] {
            if unfenced.is_some() {
                break;
            }
            let raise = format!("SAVEPOINT fence; LOCK TABLE public.{table} IN ROW EXCLUSIVE MODE; RELEASE fence");
            if let Err(error) = client.batch_execute(&raise).await {
                client.batch_execute("ROLLBACK TO fence").await.map_err(|e| failed(&e))?;
                if error.code() != Some(&SqlState::UNDEFINED_TABLE) {
                    let reason = error.as_db_error().map_or_else(|| error.to_string(), |e| e.message().to_owned());
                    unfenced = Some(format!("{table} could not be locked: {reason}"));
                } else if needed {
                    unfenced = Some("there are no attachments".to_owned());
                }
            }
        }
        let holds = "SELECT array_agg(l.relation) FROM pg_locks l WHERE l.pid = pg_backend_pid() AND l.mode = 'RowExclusiveLock' \
                     AND l.relation IS NOT NULL";
        let holds = client.query_one(holds, &[]).await.map_err(|e| failed(&e))?;
        let holds = holds.get::<_, Option<Vec<u32>>>(0).unwrap_or_default();
        Ok(Self { client, holds, unfenced, raised: Instant::now() })
    }

    /// Keeps the fence up until `copied` says that every file is copied, or until it would hurt.
    pub(super) async fn guard(
        self,
        server: Server,
        database: String,
        limits: FenceLimits,
        copied: CancellationToken,
        control: Control,
    ) -> Result<FenceReport, Error> {
        let mut report = FenceReport { lowered: self.unfenced.clone(), ..FenceReport::default() };
        // The collector is the only one who asks for SHARE, and gives up by itself.
        // Since when is in the lock, from PostgreSQL 14 on; what a statement's beginning says is too early where a connection
        // has waited for others before.
        let waiting = "SELECT coalesce(extract(epoch FROM max(clock_timestamp() - \
                         coalesce((to_jsonb(l) ->> 'waitstart')::timestamptz, a.query_start))), 0)::float8 \
                       FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
                       WHERE NOT l.granted AND l.mode <> 'ShareLock' AND l.relation = ANY($1) \
                       AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        while !copied.is_cancelled() && report.lowered.is_none() {
            // Within a transaction the server tells what it has told before, otherwise.
            let fresh = self.client.batch_execute("SELECT pg_stat_clear_snapshot()").await;
            fresh.map_err(|e| server.failed(&database, &e))?;
            let row = self.client.query_one(waiting, &[&self.holds]).await.map_err(|e| server.failed(&database, &e))?;
            let waited = Duration::from_secs_f64(row.get::<_, f64>(0).max(0.0));
            report.longest_wait = report.longest_wait.max(waited);
            if waited > limits.stall.0 {
                report.lowered = Some(format!("somebody had waited {:.1} s for it", waited.as_secs_f64()));
            } else if self.raised.elapsed() > limits.hold.0 {
                report.lowered = Some(format!("it had been up for {}", limits.hold));
            } else {
                tokio::select! {
                    () = copied.cancelled() => {}
                    () = control.cancelled() => return Err(Error::Cancelled),
                    () = tokio::time::sleep(WATCH) => {}
                }
            }
        }
        if let (Some(reason), None) = (&report.lowered, &self.unfenced) {
            control.tell(&Event::FenceLowered { reason: reason.clone() });
        }
        if self.unfenced.is_none() {
            report.up = self.raised.elapsed();
        }
        // Nothing was written: how it ends makes no difference to the database.
        let _ = self.client.batch_execute("ROLLBACK").await;
        Ok(report)
    }
}

impl Snapshot {
    /// Takes a snapshot. What it shows is protected when the fence is up already.
    pub(super) async fn take(server: &Server, database: &str) -> Result<Self, Error> {
        let client = server.connect_to_tenant(database).await?;
        let failed = |e: &tokio_postgres::Error| server.failed(database, e);
        // Before the snapshot: a change between the two counts as one that is not saved.
        let changes = changes_of(&client, &[database]).await.map_err(|e| failed(&e))?.remove(database);
        let begin = format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {ALIVE}");
        client.batch_execute(&begin).await.map_err(|e| failed(&e))?;
        let row = client
            .query_one(
                "SELECT pg_export_snapshot(), extract(epoch FROM clock_timestamp())::float8, \
                 current_setting('server_version'), current_setting('server_version_num')::int, \
                 pg_database_size(current_database()), \
                 (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END)::text",
                &[],
            )
            .await
            .map_err(|e| failed(&e))?;
        let (seconds, behind) = (row.get::<_, f64>(1), behind(&client).await.map_err(|e| failed(&e))?);
        let seconds = seconds - behind;
        let locale = locale_of(&client).await.map_err(|e| failed(&e))?;
        let extensions = extensions_of(&client).await.map_err(|e| failed(&e))?;
        Ok(Self {
            id: row.get(0),
            taken_at: Timestamp::from_microsecond((seconds * 1e6) as i64).unwrap_or(Timestamp::UNIX_EPOCH),
            behind: (behind > 0.0).then(|| Duration::from_secs_f64(behind)),
            lsn: row.get(5),
            server_version: row.get(2),
            server_major: u32::try_from(row.get::<_, i32>(3) / 10_000).unwrap_or(0),
            database_bytes: u64::try_from(row.get::<_, i64>(4)).unwrap_or(0),
            changes,
            locale,
            extensions,
            client,
        })
    }

    /// The schemas that the snapshot shows.
    pub(super) async fn schemas(&self) -> Result<Schemas, tokio_postgres::Error> {
        Schemas::of(&self.client).await
    }

    /// Reads what the snapshot says of the tenant, while it is held.
    pub(super) async fn read(&self, server: &Server, database: &str) -> Result<Tenancy, Error> {
        self.while_held(self.tenancy(server, database)).await
    }

    /// Reads which files the snapshot refers to, while it is held.
    pub(super) async fn attachments(&self, server: &Server, database: &str) -> Result<Vec<Attachment>, Error> {
        let reading = async {
            let client = self.connect(server, database).await?;
            let files = attachments(&client).await.map_err(|e| server.failed(database, &e))?;
            files.ok_or_else(|| odd(server, database, "ir_attachment"))
        };
        self.while_held(reading).await
    }

    async fn while_held<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(SPEAK) => self.speak().await,
            }
        }
    }

    /// Not idle, so that the server does not end it.
    async fn speak(&self) {
        let _ = self.client.batch_execute("SELECT 1").await;
    }

    /// A connection that sees the snapshot.
    async fn connect(&self, server: &Server, database: &str) -> Result<Client, Error> {
        let client = server.connect_to_tenant(database).await?;
        let begin = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {ALIVE}; SET TRANSACTION SNAPSHOT {}",
            literal(&self.id)
        );
        client.batch_execute(&begin).await.map_err(|e| server.failed(database, &e))?;
        Ok(client)
    }

    /// What the snapshot says of the tenant: the identity of its database, and the files that it refers to.
    ///
    /// In a transaction of its own, which ends at once: whoever held the table while others wait for it, and while `pg_dump`
    /// waits behind those, would wait for itself.
    async fn tenancy(&self, server: &Server, database: &str) -> Result<Tenancy, Error> {
        let client = self.connect(server, database).await?;
        let failed = |e: &tokio_postgres::Error| server.failed(database, e);
        let plain = |read: Read<()>, table: &str| match read {
            Read::Odd => Err(odd(server, database, table)),
            _ => Ok(()),
        };
        let mut uuid = None;
        let parameters = rows::each(&client, "public.ir_config_parameter", &["key", "value"], |row| {
            if let [Some(key), value] = row
                && key == "database.uuid"
            {
                uuid = value.as_deref().map(str::to_owned);
            }
        });
        plain(parameters.await.map_err(|e| failed(&e))?, "ir_config_parameter")?;
        // Which files there are cannot be known otherwise, and a set without them would look whole.
        let attachments = attachments(&client).await.map_err(|e| failed(&e))?;
        let attachments = attachments.ok_or_else(|| odd(server, database, "ir_attachment"))?;
        let mut modules = BTreeMap::new();
        let installed = rows::each(&client, "public.ir_module_module", &["name", "latest_version", "state"], |row| {
            if let [Some(name), Some(version), Some(state)] = row
                && state == "installed"
            {
                modules.insert(name.to_string(), version.to_string());
            }
        });
        plain(installed.await.map_err(|e| failed(&e))?, "ir_module_module")?;
        let (filtered, mut undumped) =
            (filtered(&client).await.map_err(|e| failed(&e))?, undumped(&client).await.map_err(|e| failed(&e))?);
        undumped.extend(filtered.iter().cloned());
        let mut sequences = sequences(&client).await.map_err(|e| failed(&e))?;
        let unrestorable = unrestorable(&client).await.map_err(|e| failed(&e))?;
        let tables = tables(&client).await.map_err(|e| failed(&e))?;
        let _ = client.batch_execute("ROLLBACK").await;
        // Sequences know no snapshots.
        let reading = tokio::time::timeout(SEQUENCES, read_sequences(&client, &mut sequences)).await;
        let late = |_| {
            let reason = format!("it takes more than {} s to read where sequences are", SEQUENCES.as_secs());
            Error::Database { server: server.name(), database: database.to_owned(), reason }
        };
        let unknown = match reading.map_err(late)?.map_err(|e| failed(&e))? {
            Reading::Unknown(unknown) => unknown,
            Reading::Forbidden(name) => {
                let reason = format!("the sequence {name} may not be read, and a restore would not know where it is");
                return Err(Error::Database { server: server.name(), database: database.to_owned(), reason });
            }
        };
        // A restore could not set it to where it is.
        if let Some(beyond) = sequences.iter().find(|sequence| sequence.beyond) {
            let reason = format!("the sequence {} was changed after the snapshot; try again", beyond.name);
            return Err(Error::Database { server: server.name(), database: database.to_owned(), reason });
        }
        Ok(Tenancy { uuid, attachments, modules, undumped, filtered, unknown, sequences, unrestorable, tables })
    }

    /// Holds the snapshot until everybody who needs it has it, and its locks. A table to which something was done before,
    /// of which the snapshot knows nothing: an old snapshot finds no rows in a table that was emptied since, and somebody
    /// else's in one that was put under its name.
    pub(super) async fn hold(
        self,
        server: &Server,
        database: &str,
        everybody: &[CancellationToken],
    ) -> Result<Option<String>, Error> {
        for one in everybody {
            while !one.is_cancelled() {
                tokio::select! {
                    () = one.cancelled() => {}
                    () = tokio::time::sleep(SPEAK) => self.speak().await,
                }
            }
        }
        let held = self.changed(server, database).await;
        let _ = self.client.batch_execute("ROLLBACK").await;
        held
    }

    async fn changed(&self, server: &Server, database: &str) -> Result<Option<String>, Error> {
        let failed = |e: &tokio_postgres::Error| server.failed(database, e);
        // The catalog is read as of the snapshot, what the functions say is as of now.
        let query = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                     WHERE c.relkind IN ('r', 'p', 'S', 'v', 'm', 'f') AND c.relpersistence <> 't' AND n.nspname <> 'information_schema' \
                     AND n.nspname NOT LIKE 'pg\\_%' AND (c.relkind = 'r' AND pg_relation_filenode(c.oid) IS DISTINCT FROM c.relfilenode \
                       OR to_regclass(format('%I.%I', n.nspname, c.relname)) IS DISTINCT FROM c.oid::regclass) ORDER BY 1 LIMIT 1";
        let changed = self.client.query_opt(query, &[]).await.map_err(|e| failed(&e))?;
        if let Some(changed) = changed {
            return Ok(Some(changed.get(0)));
        }
        // `pg_dump` takes the names of columns from the snapshot, and what they mean from the catalog of now. From here on its locks
        // keep them.
        let then = columns(&self.client).await.map_err(|e| failed(&e))?;
        let client = server.connect_to_tenant(database).await?;
        let now = columns(&client).await.map_err(|e| failed(&e))?;
        let changed = then.into_iter().find(|(oid, was)| now.get(oid) != Some(was));
        if let Some((_, (name, _))) = changed {
            return Ok(Some(name));
        }
        let then = definitions(&self.client).await.map_err(|e| failed(&e))?;
        let now = definitions(&client).await.map_err(|e| failed(&e))?;
        Ok(then.into_iter().find(|(which, was)| now.get(which) != Some(was)).map(|(_, (name, _))| name))
    }
}

/// What the columns of each table are called and what they are, and who has changed that last, in a number.
async fn columns(client: &Client) -> Result<BTreeMap<u32, (String, i64)>, tokio_postgres::Error> {
    let query = "SELECT c.oid, format('%I.%I', n.nspname, c.relname), \
                   hashtextextended(string_agg(concat_ws(' ', a.attnum, a.attname, a.atttypid, a.xmin), ',' ORDER BY a.attnum), 0) \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid \
                 WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND a.attnum > 0 AND NOT a.attisdropped \
                 AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%' GROUP BY 1, 2";
    let rows = client.query(query, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect())
}

/// Functions and types, and who has changed them last: the snapshot says what they were called, and functions of the server what they
/// are called now. `pg_dump` has read all that when it begins to write.
async fn definitions(client: &Client) -> Result<BTreeMap<(String, u32), (String, i64)>, tokio_postgres::Error> {
    let query = "SELECT 'p', p.oid, format('%I.%I', n.nspname, p.proname), p.xmin::text::int8 \
                     FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE p.oid >= 16384 AND n.nspname NOT LIKE 'pg\\_t%' UNION ALL \
                     SELECT 't', t.oid, format('%I.%I', n.nspname, t.typname), hashtextextended(concat_ws(' ', t.typnamespace, t.typname, t.xmin), 0) \
                     FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.oid >= 16384 AND t.typtype IN ('c', 'd', 'e', 'r') \
                     AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = t.typrelid AND c.relkind <> 'c') \
                     AND n.nspname NOT LIKE 'pg\\_t%'";
    let rows = client.query(query, &[]).await?;
    Ok(rows.iter().map(|row| ((row.get(0), row.get(1)), (row.get(2), row.get(3)))).collect())
}

/// How many seconds a server is behind the one that it follows, at most: none where it follows nobody, or has done everything that comes.
async fn behind(client: &Client) -> Result<f64, tokio_postgres::Error> {
    let query = "SELECT CASE WHEN NOT pg_is_in_recovery() THEN 0 \
                   WHEN pg_last_wal_replay_lsn() >= pg_last_wal_receive_lsn() AND NOT pg_is_wal_replay_paused() \
                     AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming' AND latest_end_lsn <= pg_last_wal_replay_lsn() \
                       AND last_msg_receipt_time > clock_timestamp() - interval '90 s') THEN 0 \
                   ELSE greatest(0, extract(epoch FROM clock_timestamp() - coalesce(pg_last_xact_replay_timestamp(), \
                     (SELECT checkpoint_time FROM pg_control_checkpoint())))) END::float8";
    Ok(client.query_one(query, &[]).await?.get(0))
}

/// The files that a snapshot refers to; none if the table is not what it should be, or was another's when the snapshot was taken.
async fn attachments(client: &Client) -> Result<Option<Vec<Attachment>>, tokio_postgres::Error> {
    let mut files: BTreeMap<String, Attachment> = BTreeMap::new();
    let columns = ["store_fname", "checksum", "file_size"];
    let read = rows::each(client, "public.ir_attachment", &columns, |row| {
        let [Some(name), checksum, size] = row else { return };
        if name.is_empty() {
            return;
        }
        let file = files.entry(name.to_string()).or_insert_with(|| Attachment::named(name));
        file.checksum = file.checksum.take().max(checksum.as_deref().map(str::to_owned));
        file.size = file.size.max(size.as_ref().and_then(|size| size.parse().ok()));
    });
    let read = read.await?;
    Ok((read != Read::Odd).then(|| files.into_values().collect()))
}

fn odd(server: &Server, database: &str, table: &str) -> Error {
    let reason = format!("{table} is not Odoo's table with columns of plain types, or was renamed during the backup");
    Error::Database { server: server.name(), database: database.to_owned(), reason }
}

/// The schemas of a database at one time, the labels of its enumerations, and what its composite types consist of. No lock on a table keeps its schema from being renamed, and
/// `pg_dump` asks for each table's rows by schema and name when it comes to it: between two renamings it would be given another's.
pub(super) struct Schemas(Entries, Entries, Entries);

/// By id what each is called, and a number that is another after a change.
type Entries = BTreeMap<u32, (String, i64)>;

impl Schemas {
    async fn of(client: &Client) -> Result<Self, tokio_postgres::Error> {
        // Whoever has changed the entry stands in it, also after it was changed back.
        let query = "SELECT oid, nspname::text, xmin::text::int8 FROM pg_namespace \
                     WHERE nspname <> 'information_schema' AND nspname NOT LIKE 'pg\\_%'";
        let schemas = client.query(query, &[]).await?;
        // The labels of enumerations are the other thing that no lock keeps as long as rows are read, which have their numbers and say
        // their names of now.
        let query = "SELECT e.oid, format('%I.%I', n.nspname, t.typname), hashtextextended(concat_ws(' ', e.enumlabel, e.xmin), 0) \
                     FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid JOIN pg_namespace n ON n.oid = t.typnamespace";
        // So it is with what a composite type consists of, in columns that are of it.
        let parts = "SELECT c.oid, format('%I.%I', n.nspname, c.relname), hashtextextended(string_agg(concat_ws(' ', a.attnum, a.attname, \
                       a.atttypid, a.attisdropped, a.xmin), ',' ORDER BY a.attnum), 0) \
                     FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid \
                     WHERE c.relkind = 'c' AND c.oid >= 16384 AND a.attnum > 0 AND n.nspname NOT LIKE 'pg\\_t%' GROUP BY 1, 2";
        let parts = client.query(parts, &[]).await?;
        let labels = client.query(query, &[]).await?;
        let all =
            |rows: &[tokio_postgres::Row]| rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect();
        Ok(Self(all(&schemas), all(&labels), all(&parts)))
    }

    /// One that is not what it was, whatever has happened to it since.
    pub(super) async fn changed(self, server: &Server, database: &str) -> Result<Option<String>, Error> {
        let client = server.connect_to_tenant(database).await?;
        let now = Self::of(&client).await.map_err(|e| server.failed(database, &e))?;
        let changed = |was: Entries, now: &Entries| was.into_iter().find(|(oid, was)| now.get(oid) != Some(was));
        let found = [
            ("schema", changed(self.0, &now.0)),
            ("enumeration", changed(self.1, &now.1)),
            ("type", changed(self.2, &now.2)),
        ];
        let mut found =
            found.into_iter().filter_map(|(what, found)| found.map(|(_, (name, _))| format!("the {what} {name}")));
        Ok(found.next())
    }
}

/// What a snapshot says of the tenant.
pub(super) struct Tenancy {
    pub(super) uuid: Option<String>,
    pub(super) attachments: Vec<Attachment>,
    pub(super) modules: BTreeMap<String, String>,
    /// Tables whose rows are not saved.
    pub(super) undumped: Vec<String>,
    /// Those of them that `pg_dump` would select from.
    pub(super) filtered: Vec<String>,
    /// Sequences from which nothing was taken, and of which it is not known where they begin.
    pub(super) unknown: Vec<String>,
    pub(super) sequences: Vec<Sequence>,
    /// What nobody but a superuser could create, so that no restore could.
    pub(super) unrestorable: Vec<String>,
    /// Ordinary tables whose rows `pg_dump` saves, largest first. None where a constraint, a default or a generated column uses a
    /// function or an operator that is not PostgreSQL's own: it may look into other tables, whose rows must then be there first.
    pub(super) tables: Vec<Table>,
}

/// A table and what it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    /// Schema and name, as in the counts of rows.
    pub(super) name: String,
    /// Schema and name in quotes, in which a pattern of `pg_dump` means itself.
    pub(super) quoted: String,
    /// Without indexes.
    pub(super) bytes: u64,
}

async fn tables(client: &Client) -> Result<Vec<Table>, tokio_postgres::Error> {
    // As they were when they were last vacuumed or analyzed: asking for files would wait for whoever holds a table.
    let query = "SELECT n.nspname::text, c.relname::text, \
                   (greatest(c.relpages, 0) + greatest(coalesce(t.relpages, 0), 0))::int8 * current_setting('block_size')::int8 \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 LEFT JOIN pg_class t ON t.oid = c.reltoastrelid \
                 WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname <> 'information_schema' \
                 AND n.nspname NOT LIKE 'pg\\_%' AND NOT EXISTS (SELECT FROM pg_depend d \
                   WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e') \
                 AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass) \
                   AND d.classid IN ('pg_constraint'::regclass, 'pg_attrdef'::regclass)) ORDER BY 3 DESC, 1, 2";
    let table = |row: &tokio_postgres::Row| {
        let (schema, name): (String, String) = (row.get(0), row.get(1));
        Table {
            quoted: format!("{}.{}", quoted(&schema), quoted(&name)),
            name: format!("{schema}.{name}"),
            bytes: u64::try_from(row.get::<_, i64>(2)).unwrap_or(0),
        }
    };
    Ok(client.query(query, &[]).await?.iter().map(table).collect())
}

/// What a restore would have to be a superuser for: functions, and what is made of them; and what stands on foreign tables, which
/// are left out.
async fn unrestorable(client: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let query = "WITH made (class, id, name) AS (\
                   SELECT 'pg_proc'::regclass, p.oid, p.oid::regprocedure::text FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang \
                     WHERE p.proleakproof OR NOT l.lanpltrusted AND l.lanname <> 'sql' \
                   UNION ALL SELECT 'pg_type'::regclass, t.oid, 'type ' || format_type(t.oid, NULL) FROM pg_type t \
                     WHERE t.typtype = 'b' AND t.typelem = 0 \
                   UNION ALL SELECT 'pg_opclass'::regclass, o.oid, 'operator class ' || o.opcname FROM pg_opclass o \
                   UNION ALL SELECT 'pg_opfamily'::regclass, o.oid, 'operator family ' || o.opfname FROM pg_opfamily o \
                   UNION ALL SELECT 'pg_am'::regclass, a.oid, 'access method ' || a.amname FROM pg_am a \
                   UNION ALL SELECT 'pg_language'::regclass, l.oid, 'language ' || l.lanname FROM pg_language l WHERE NOT l.lanpltrusted \
                   UNION ALL SELECT 'pg_cast'::regclass, c.oid, format('cast from %s to %s', format_type(c.castsource, NULL), \
                     format_type(c.casttarget, NULL)) FROM pg_cast c WHERE c.castmethod = 'b' \
                   UNION ALL SELECT 'pg_ts_template'::regclass, t.oid, 'text search template ' || t.tmplname FROM pg_ts_template t \
                   UNION ALL SELECT 'pg_ts_parser'::regclass, t.oid, 'text search parser ' || t.prsname FROM pg_ts_parser t \
                   UNION ALL SELECT d.classid, d.objid, coalesce(pg_describe_object(d.classid, d.objid, 0), 'something') || ', which stands on a foreign table' FROM pg_class f \
                     JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = f.oid \
                       OR d.refclassid = 'pg_type'::regclass AND d.refobjid = f.reltype \
                     WHERE f.relkind = 'f' AND d.deptype IN ('n', 'a') \
                     AND d.classid IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass, 'pg_rewrite'::regclass, \
                       'pg_statistic_ext'::regclass) \
                     AND NOT EXISTS (SELECT FROM pg_rewrite r JOIN pg_depend e ON e.classid = 'pg_class'::regclass \
                       AND e.objid = r.ev_class AND e.deptype = 'e' WHERE d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid)) \
                 SELECT DISTINCT name FROM made WHERE id >= 16384 AND NOT EXISTS (SELECT FROM pg_depend d \
                   WHERE d.classid = made.class AND d.objid = made.id AND d.deptype = 'e') ORDER BY 1";
    // What was dropped meanwhile has no name any more.
    Ok(client.query(query, &[]).await?.iter().filter_map(|row| row.get(0)).collect())
}

/// Tables of extensions some of whose rows an extension wants to be saved: `pg_dump` would select them, and what is selected is
/// planned, as whoever dumps, with what a tenant has put into indexes, or in the table's place.
async fn filtered(client: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let query = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_extension e \
                 CROSS JOIN unnest(e.extconfig, e.extcondition) AS t (oid, condition) \
                 JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE t.condition <> '' ORDER BY 1";
    Ok(client.query(query, &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// The same for whoever dumps without a snapshot of ours.
pub(crate) async fn filtered_in(server: &Server, database: &str) -> Result<Vec<String>, Error> {
    let client = server.connect_to_tenant(database).await?;
    filtered(&client).await.map_err(|e| server.failed(database, &e))
}

/// Ordinary tables that were made part of an extension: `pg_dump` saves their rows only where the extension asks for it.
async fn undumped(client: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let query = "SELECT n.nspname || '.' || c.relname FROM pg_depend d JOIN pg_class c ON c.oid = d.objid \
                 JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_extension e ON e.oid = d.refobjid \
                 WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_extension'::regclass \
                 AND d.deptype = 'e' AND c.relkind = 'r' AND c.relpersistence = 'p' \
                 AND NOT c.oid = ANY(coalesce(e.extconfig, '{}')) ORDER BY 1";
    Ok(client.query(query, &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// A file that the database refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attachment {
    pub(super) store_fname: String,
    pub(super) checksum: Option<String>,
    pub(super) size: Option<u64>,
}

impl Attachment {
    fn named(name: &str) -> Self {
        Self { store_fname: name.to_owned(), checksum: None, size: None }
    }
}
