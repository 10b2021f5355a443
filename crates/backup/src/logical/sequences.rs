//! Where sequences are. They know no snapshots, and `pg_dump` selects from them by their names, which a tenant may have given to
//! something else: so they are read here, by their ids, and by name only while they are held.

use std::collections::BTreeMap;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use crate::server::{literal, quoted};

/// How many sequences are read at a time.
const AT_A_TIME: usize = 200;

/// A sequence, and where it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sequence {
    /// Schema and name in quotes.
    pub(super) name: String,
    /// Sets it to what it was; none where it belongs to an extension, or is as it was made.
    pub(super) statement: Option<String>,
    oid: u32,
    /// Where it was made to begin, and how far it may go.
    begins: i64,
    least: i64,
    most: i64,
    /// It is where it may not be: it was changed since.
    pub(super) beyond: bool,
    of_extension: bool,
    /// Column and table, of a column of whole numbers whose it is, where it counts upwards.
    numbers: Option<(String, String)>,
}

/// The sequences that a snapshot shows.
pub(super) async fn sequences(client: &Client) -> Result<Vec<Sequence>, tokio_postgres::Error> {
    let query = "SELECT n.nspname::text, c.relname::text, c.oid, s.seqstart, s.seqmin, s.seqmax, s.seqincrement > 0, \
                   EXISTS (SELECT FROM pg_depend e WHERE e.classid = 'pg_class'::regclass AND e.objid = c.oid AND e.deptype = 'e'), \
                   (SELECT ARRAY[format('%I', a.attname), format('%I.%I', o.nspname, t.relname)] FROM pg_depend d \
                    JOIN pg_class t ON t.oid = d.refobjid JOIN pg_namespace o ON o.oid = t.relnamespace \
                    JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid \
                    WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype IN ('a', 'i') \
                    AND d.refclassid = 'pg_class'::regclass AND t.relkind IN ('r', 'p') AND a.atttypid IN (20, 21, 23) \
                    AND NOT t.relforcerowsecurity AND NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = 'pg_class'::regclass \
                      AND e.objid = t.oid AND e.deptype = 'e') LIMIT 1) \
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
            least: row.get(4),
            most: row.get(5),
            beyond: false,
            of_extension: row.get(7),
            numbers: row
                .get::<_, Option<Vec<String>>>(8)
                .filter(|_| row.get(6))
                .and_then(|names| Some((names.first()?.clone(), names.get(1)?.clone()))),
        }
    };
    Ok(rows.iter().map(sequence).collect())
}

/// What came of reading sequences.
pub(super) enum Reading {
    /// Those of which it cannot be known.
    Unknown(Vec<String>),
    /// One that may not be read.
    Forbidden(String),
}

/// Finds out where sequences are. Some at a time where that needs no waiting; otherwise each on its own, so that nothing is held
/// while something is waited for: a backup is no part of anybody's deadlock.
pub(super) async fn read_sequences(
    client: &Client,
    sequences: &mut [Sequence],
) -> Result<Reading, tokio_postgres::Error> {
    client.batch_execute("SET lock_timeout = '30s'").await?;
    let query = "SELECT pg_is_in_recovery(), rolsuper FROM pg_roles WHERE rolname = current_user";
    let row = client.query_one(query, &[]).await?;
    // Servers from 17 on say nothing of a sequence that may not be asked about, as of one that was never used.
    let asked = sequences.iter().filter(|sequence| !sequence.of_extension).map(|sequence| sequence.oid);
    let asked: Vec<u32> = asked.collect();
    let query = "SELECT s.oid::regclass::text FROM unnest($1::oid[]) AS s (oid) \
                 WHERE NOT has_sequence_privilege(s.oid, 'USAGE, SELECT') ORDER BY 1 LIMIT 1";
    if let Some(row) = client.query_opt(query, &[&asked]).await? {
        return Ok(Reading::Forbidden(row.get(0)));
    }
    let (follows, may): (bool, bool) = (row.get(0), row.get(1));
    let may = may && !follows;
    let mut unknown = Vec::new();
    let mut ours: Vec<&mut Sequence> = sequences.iter_mut().filter(|sequence| !sequence.of_extension).collect();
    for some in ours.chunks_mut(AT_A_TIME) {
        let oids: Vec<u32> = some.iter().map(|sequence| sequence.oid).collect();
        let mut known = positions(client, &oids, may, "1ms").await?;
        for sequence in some {
            let known = match &mut known {
                Some(known) => known.remove(&sequence.oid),
                None => position(client, sequence.oid, may).await?,
            };
            sequence.set_to(known);
            if known.is_none() {
                unknown.push(sequence.name.clone());
            }
        }
    }
    Ok(Reading::Unknown(unknown))
}

/// Where a sequence is, and whether that number was taken already.
type Position = (i64, bool);

impl Sequence {
    fn set_to(&mut self, position: Option<Position>) {
        let name = literal(&self.name);
        self.statement = match position {
            Some((value, called)) => {
                self.beyond = !(self.least..=self.most).contains(&value);
                (called || value != self.begins).then(|| format!("SELECT pg_catalog.setval({name}, {value}, {called});"))
            }
            // Better after what is there than in it.
            None => self.numbers.as_ref().map(|(column, table)| {
                format!(
                    "SELECT pg_catalog.setval({name}, m + 1, false) FROM (SELECT max({column})::bigint AS m FROM {table}) t \
                     WHERE m >= {} AND m < {};",
                    self.begins, self.most
                )
            }),
        };
    }
}

/// Where one sequence is; none where it cannot be known.
async fn position(client: &Client, oid: u32, may: bool) -> Result<Option<Position>, tokio_postgres::Error> {
    // By its id; the statement is a transaction of its own, and waits for whoever changes it.
    match client.query_typed("SELECT pg_sequence_last_value($1)", &[(&oid, Type::OID)]).await {
        Err(error) if error.code().is_some_and(is_gone) => {}
        read => {
            if let Some(value) = read?.first().and_then(|row| row.get::<_, Option<i64>>(0)) {
                return Ok(Some((value, true)));
            }
        }
    }
    if !may {
        return Ok(None);
    }
    Ok(positions(client, &[oid], may, "5s").await?.and_then(|mut known| known.remove(&oid)))
}

/// A relation that was asked for by its id and is not there any more.
fn is_gone(code: &SqlState) -> bool {
    [SqlState::UNDEFINED_TABLE, SqlState::INTERNAL_ERROR].contains(code)
}

/// Where sequences are. From some nothing was taken, and they begin where `ALTER SEQUENCE … RESTART` or `setval` has put them, as
/// Odoo sets the next number of an invoice. No function tells that by an id, so that they are selected from by their names: while they
/// are held, so that they cannot be renamed or moved, and then the schemas that they are in. Only who `may` do that does.
///
/// None where one is gone, or is not to be had within `patience`, or its schema at once; those whose names mean something
/// else for a moment are not among what is known.
async fn positions(
    client: &Client,
    oids: &[u32],
    may: bool,
    patience: &str,
) -> Result<Option<BTreeMap<u32, Position>>, tokio_postgres::Error> {
    // A standby writes nothing, and a schema is held by writing.
    let access = if may { "READ WRITE" } else { "READ ONLY" };
    let begin = format!("BEGIN ISOLATION LEVEL READ COMMITTED {access}; SET LOCAL lock_timeout = '{patience}'");
    client.batch_execute(&begin).await?;
    let read = held_positions(client, oids, may).await;
    client.batch_execute("ROLLBACK").await?;
    match read {
        Err(error) if error.code().is_some_and(|code| *code == SqlState::LOCK_NOT_AVAILABLE || is_gone(code)) => {
            Ok(None)
        }
        other => other.map(Some),
    }
}

/// Within a transaction, until whose end everything is held.
async fn held_positions(
    client: &Client,
    oids: &[u32],
    may: bool,
) -> Result<BTreeMap<u32, Position>, tokio_postgres::Error> {
    // Asking holds them.
    let last = "SELECT s.oid, pg_sequence_last_value(s.oid) FROM unnest($1::oid[]) AS s (oid)";
    let (mut known, mut unused) = (BTreeMap::new(), Vec::new());
    for row in client.query_typed(last, &[(&oids, Type::OID_ARRAY)]).await? {
        match row.get::<_, Option<i64>>(1) {
            Some(value) => drop(known.insert(row.get(0), (value, true))),
            None => unused.push(row.get::<_, u32>(0)),
        }
    }
    if unused.is_empty() || !may {
        return Ok(known);
    }
    // Nothing is waited for while they are held: whoever holds their schema may be waiting for one of them.
    let named = "SELECT c.oid, format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.oid = ANY($1) AND c.relkind = 'S' FOR SHARE OF n NOWAIT";
    let named = client.query_typed(named, &[(&unused, Type::OID_ARRAY)]).await?;
    let (oids, names): (Vec<_>, Vec<_>) =
        named.iter().map(|row| (row.get::<_, u32>(0), row.get::<_, String>(1))).unzip();
    // What a name means is looked up in what this connection knows of the catalog, which may be behind what was read from
    // it: a change is seen a moment before it is told. Once a name means a sequence, it cannot mean anything else while
    // both are held.
    let means = "SELECT s.oid, s.name FROM unnest($1::oid[], $2::text[]) AS s (oid, name) WHERE to_regclass(s.name)::oid = s.oid";
    let means = client.query_typed(means, &[(&oids, Type::OID_ARRAY), (&names, Type::TEXT_ARRAY)]).await?;
    let each = means.iter().map(|row| {
        let (oid, name): (u32, String) = (row.get(0), row.get(1));
        format!("SELECT {oid}::oid, last_value, is_called FROM {name}")
    });
    let select = each.collect::<Vec<_>>().join(" UNION ALL ");
    if !select.is_empty() {
        let rows = client.query_typed(&select, &[]).await?;
        known.extend(rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))));
    }
    Ok(known)
}
