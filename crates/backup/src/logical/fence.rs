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
use tokio_postgres::types::Type;
use tokio_util::sync::CancellationToken;

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
const SEQUENCES: Duration = Duration::from_secs(60);
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
        let seconds: f64 = row.get(1);
        let locale = locale_of(&client).await.map_err(|e| failed(&e))?;
        let extensions = extensions_of(&client).await.map_err(|e| failed(&e))?;
        Ok(Self {
            id: row.get(0),
            taken_at: Timestamp::from_microsecond((seconds * 1e6) as i64).unwrap_or(Timestamp::UNIX_EPOCH),
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

    /// Reads what the snapshot says of the tenant, while it is held.
    pub(super) async fn read(&self, server: &Server, database: &str) -> Result<Tenancy, Error> {
        let mut reading = std::pin::pin!(self.tenancy(server, database));
        loop {
            tokio::select! {
                read = &mut reading => return read,
                () = tokio::time::sleep(SPEAK) => self.speak().await,
            }
        }
    }

    /// Not idle, so that the server does not end it.
    async fn speak(&self) {
        let _ = self.client.batch_execute("SELECT 1").await;
    }

    /// What the snapshot says of the tenant: the identity of its database, and the files that it refers to.
    ///
    /// In a transaction of its own, which ends at once: whoever held the table while others wait for it, and while `pg_dump`
    /// waits behind those, would wait for itself.
    async fn tenancy(&self, server: &Server, database: &str) -> Result<Tenancy, Error> {
        let client = server.connect_to_tenant(database).await?;
        let failed = |e: &tokio_postgres::Error| server.failed(database, e);
        let begin = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {ALIVE}; SET TRANSACTION SNAPSHOT {}",
            literal(&self.id)
        );
        client.batch_execute(&begin).await.map_err(|e| failed(&e))?;
        let mut uuid = None;
        let parameters = rows::each(&client, "public.ir_config_parameter", &["key", "value"], |row| {
            if let [Some(key), value] = row
                && key == "database.uuid"
            {
                uuid = value.as_deref().map(str::to_owned);
            }
        });
        parameters.await.map_err(|e| failed(&e))?;
        let mut files: BTreeMap<String, Attachment> = BTreeMap::new();
        let columns = ["store_fname", "checksum", "file_size"];
        let attachments = rows::each(&client, "public.ir_attachment", &columns, |row| {
            let [Some(name), checksum, size] = row else { return };
            if name.is_empty() {
                return;
            }
            let file = files.entry(name.to_string()).or_insert_with(|| Attachment::named(name));
            file.checksum = file.checksum.take().max(checksum.as_deref().map(str::to_owned));
            file.size = file.size.max(size.as_ref().and_then(|size| size.parse().ok()));
        });
        // Which files there are cannot be known then, and a set without them would look whole.
        if attachments.await.map_err(|e| failed(&e))? == Read::Odd {
            let reason =
                "ir_attachment is not a table with the columns store_fname, checksum and file_size of plain types";
            return Err(Error::Database {
                server: server.name(),
                database: database.to_owned(),
                reason: reason.to_owned(),
            });
        }
        let mut modules = BTreeMap::new();
        let installed = rows::each(&client, "public.ir_module_module", &["name", "latest_version", "state"], |row| {
            if let [Some(name), Some(version), Some(state)] = row
                && state == "installed"
            {
                modules.insert(name.to_string(), version.to_string());
            }
        });
        installed.await.map_err(|e| failed(&e))?;
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
        let unknown = reading.map_err(late)?.map_err(|e| failed(&e))?;
        Ok(Tenancy {
            uuid,
            filtered,
            unknown,
            attachments: files.into_values().collect(),
            modules,
            undumped,
            sequences,
            unrestorable,
            tables,
        })
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
        // The catalog is read as of the snapshot, what the functions say is as of now.
        let query = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                     WHERE c.relkind IN ('r', 'p', 'S', 'v', 'm', 'f') AND c.relpersistence = 'p' AND n.nspname <> 'information_schema' \
                     AND n.nspname NOT LIKE 'pg\\_%' AND (c.relkind = 'r' AND pg_relation_filenode(c.oid) IS DISTINCT FROM c.relfilenode \
                       OR to_regclass(format('%I.%I', n.nspname, c.relname)) IS DISTINCT FROM c.oid::regclass) ORDER BY 1 LIMIT 1";
        let changed = self.client.query_opt(query, &[]).await;
        let _ = self.client.batch_execute("ROLLBACK").await;
        let changed = changed.map_err(|e| server.failed(database, &e))?;
        Ok(changed.map(|row| row.get(0)))
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

/// A sequence, whose value is read here and not by `pg_dump`: that selects from it by its name, under which a tenant could
/// have put a table with an index meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sequence {
    /// Schema and name in quotes.
    pub(super) name: String,
    /// Sets it to what it was; none where it belongs to an extension, or is as it was made.
    pub(super) statement: Option<String>,
    oid: u32,
    /// Where it was made to begin, and how far it may go.
    begins: i64,
    most: i64,
    of_extension: bool,
    /// Column and table, of a column of whole numbers whose it is, where it counts upwards.
    numbers: Option<(String, String)>,
}

fn set(name: &str, value: i64, called: bool) -> String {
    format!("SELECT pg_catalog.setval({}, {value}, {called});", literal(name))
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

async fn sequences(client: &Client) -> Result<Vec<Sequence>, tokio_postgres::Error> {
    let query = "SELECT n.nspname::text, c.relname::text, c.oid, s.seqstart, s.seqmax, s.seqincrement > 0, \
                   EXISTS (SELECT FROM pg_depend e WHERE e.classid = 'pg_class'::regclass AND e.objid = c.oid AND e.deptype = 'e'), \
                   (SELECT ARRAY[format('%I', a.attname), format('%I.%I', o.nspname, t.relname)] FROM pg_depend d \
                    JOIN pg_class t ON t.oid = d.refobjid JOIN pg_namespace o ON o.oid = t.relnamespace \
                    JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid \
                    WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype IN ('a', 'i') \
                    AND d.refclassid = 'pg_class'::regclass AND t.relkind IN ('r', 'p') AND a.atttypid IN (20, 21, 23) LIMIT 1) \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_sequence s ON s.seqrelid = c.oid \
                 WHERE c.relkind = 'S' AND c.relpersistence <> 't' ORDER BY 1, 2";
    let rows = client.query(query, &[]).await?;
    let sequence = |row: &tokio_postgres::Row| {
        let (schema, name): (String, String) = (row.get(0), row.get(1));
        Sequence {
            name: format!("{}.{}", quoted(&schema), quoted(&name)),
            statement: None,
            oid: row.get(2),
            begins: row.get(3),
            most: row.get(4),
            of_extension: row.get(6),
            numbers: row
                .get::<_, Option<Vec<String>>>(7)
                .filter(|_| row.get(5))
                .and_then(|names| Some((names.first()?.clone(), names.get(1)?.clone()))),
        }
    };
    Ok(rows.iter().map(sequence).collect())
}

/// Finds out where sequences are, each on its own, so that nothing is held while something is waited for: a backup is no part of
/// anybody's deadlock. Those of which it cannot be known.
async fn read_sequences(client: &Client, sequences: &mut [Sequence]) -> Result<Vec<String>, tokio_postgres::Error> {
    client.batch_execute("SET lock_timeout = '30s'").await?;
    let last = client.prepare_typed("SELECT pg_sequence_last_value($1)", &[Type::OID]).await?;
    let query = "SELECT pg_is_in_recovery(), rolsuper FROM pg_roles WHERE rolname = current_user";
    let row = client.query_one(query, &[]).await?;
    let (follows, may): (bool, bool) = (row.get(0), row.get(1));
    let mut unknown = Vec::new();
    for sequence in sequences.iter_mut().filter(|sequence| !sequence.of_extension) {
        // By its id; each statement is a transaction of its own.
        let value = match client.query_one(&last, &[&sequence.oid]).await {
            Err(error) if error.code().is_some_and(is_gone) => None,
            value => value?.get::<_, Option<i64>>(0).map(|value| (value, true)),
        };
        let known = match value {
            None if may && !follows => begins(client, sequence.oid).await?,
            value => value,
        };
        match known {
            Some((value, called)) if called || value != sequence.begins => {
                sequence.statement = Some(set(&sequence.name, value, called));
            }
            Some(_) => {}
            None => {
                unknown.push(sequence.name.clone());
                // Better after what is there than in it.
                sequence.statement = sequence.numbers.as_ref().map(|(column, table)| {
                    format!(
                        "SELECT pg_catalog.setval({}, m + 1, false) FROM (SELECT max({column})::bigint AS m FROM {table}) t \
                         WHERE m >= {} AND m < {};",
                        literal(&sequence.name),
                        sequence.begins,
                        sequence.most
                    )
                });
            }
        }
    }
    Ok(unknown)
}

/// A relation that was asked for by its id and is not there any more.
fn is_gone(code: &SqlState) -> bool {
    [SqlState::UNDEFINED_TABLE, SqlState::INTERNAL_ERROR].contains(code)
}

/// Where a sequence begins from which nothing was taken: by `ALTER SEQUENCE … RESTART`, as Odoo sets the next number of an
/// invoice, or by `setval`. No function tells that by its id, so that it is selected from by its name: while it is held, so that it
/// cannot be renamed or moved, and then the schema that it is in. None where the schema cannot be held at once, where its
/// name means something else for a moment, or where it is gone.
async fn begins(client: &Client, oid: u32) -> Result<Option<(i64, bool)>, tokio_postgres::Error> {
    client.batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL lock_timeout = '5s'").await?;
    let read: Result<_, tokio_postgres::Error> = async {
        // Asking holds it, until the transaction ends.
        client.query_typed("SELECT pg_sequence_last_value($1)", &[(&oid, Type::OID)]).await?;
        // Nothing is waited for while it is held: whoever holds its schema may be waiting for it.
        let name = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                    WHERE c.oid = $1 AND c.relkind = 'S' FOR SHARE OF n NOWAIT";
        let Some(name) =
            client.query_typed(name, &[(&oid, Type::OID)]).await?.first().map(|row| row.get::<_, String>(0))
        else {
            return Ok(None);
        };
        // What a name means is looked up in what this connection knows of the catalog, which may be behind what was read from
        // it: a change is seen a moment before it is told. Once the name means the sequence, it cannot mean anything else while
        // both are held.
        let means = "SELECT to_regclass($1)::oid IS NOT DISTINCT FROM $2";
        let means = client.query_typed(means, &[(&name, Type::TEXT), (&oid, Type::OID)]).await?;
        if !means.first().is_some_and(|row| row.get(0)) {
            return Ok(None);
        }
        let row = client.query_one(&format!("SELECT last_value, is_called FROM {name}"), &[]).await?;
        Ok(Some((row.get(0), row.get(1))))
    }
    .await;
    client.batch_execute("ROLLBACK").await?;
    match read {
        Err(error) if error.code().is_some_and(|code| *code == SqlState::LOCK_NOT_AVAILABLE || is_gone(code)) => {
            Ok(None)
        }
        other => other,
    }
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
