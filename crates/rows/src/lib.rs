//! Reading a tenant's tables without running anything of the tenant's.
//!
//! A `SELECT` is planned, and planning evaluates expressions of the table's indexes and statistics: functions that the
//! table's owner has written, as whoever asks. `COPY` of an ordinary table is not planned, and knows neither indexes nor
//! rules nor views; with row security off it refuses to apply policies. So tables are read with `COPY`, and what is wanted
//! of their rows is worked out here.
//!
//! Whoever looks at many does not turn a password into keys for each ([`LogsIn`]).
//!
//! Internal to this workspace: its functions speak tokio-postgres and rustls, and nothing that an embedding program sees does.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bounded;
mod login;

pub use bounded::Bounded;
pub use login::{LogsIn, SecureLogin};

use std::borrow::Cow;

use futures_util::TryStreamExt;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

/// What stands under a table's name.
#[derive(Debug, PartialEq, Eq)]
pub enum Read<T> {
    /// Nothing does.
    Nothing,
    /// Something that is no ordinary table, that has children, that lacks one of the columns as a plain type, or that had another name in
    /// the transaction's snapshot.
    Odd,
    /// An ordinary table, and what came of its rows.
    Rows(T),
}

/// Passes the named columns of a table's rows, as text, to somebody. Within a transaction, so that the table stays what it
/// was found to be. The table's name must be safe to stand in a statement.
pub async fn each(
    client: &Client,
    table: &str,
    columns: &[&str],
    mut row: impl FnMut(&[Option<Cow<'_, str>>]),
) -> Result<Read<()>, tokio_postgres::Error> {
    let encoded = match hold(client, table, columns).await? {
        Read::Nothing => return Ok(Read::Nothing),
        Read::Odd => return Ok(Read::Odd),
        Read::Rows(encoded) => encoded,
    };
    // A database without an encoding has bytes that may be anything, and they come as they are.
    let encoding = if encoded { "" } else { " (ENCODING 'SQL_ASCII')" };
    let rows = client.copy_out(&format!("COPY {table} ({}) TO STDOUT{encoding}", columns.join(", "))).await?;
    let mut rows = std::pin::pin!(rows);
    // The protocol promises one row in each message.
    while let Some(line) = rows.try_next().await? {
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        let mut fields = Vec::with_capacity(columns.len());
        fields.extend(line.split(|byte| *byte == b'\t').map(field));
        row(&fields);
    }
    Ok(Read::Rows(()))
}

/// Counts a table's rows, those of its children not among them. Within a transaction, as [`each`].
pub async fn count(client: &Client, table: &str) -> Result<Read<u64>, tokio_postgres::Error> {
    match hold(client, table, &[]).await? {
        Read::Nothing => return Ok(Read::Nothing),
        Read::Odd => return Ok(Read::Odd),
        Read::Rows(_) => {}
    }
    // The narrowest column will do, so that nothing large is fetched from where large values are.
    let narrowest = "SELECT quote_ident(attname) FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 \
                     AND NOT attisdropped AND attgenerated = '' \
                     ORDER BY attlen < 0, attlen, attstorage <> 'p', attnum LIMIT 1";
    let column = client.query_typed(narrowest, &[(&table, Type::TEXT)]).await?;
    let column = column.first().map(|row| row.get::<_, String>(0));
    let column = column.map(|column| format!(" ({column})")).unwrap_or_default();
    // As it is stored: what cannot be said in our encoding counts too.
    let rows = client.copy_out(&format!("COPY {table}{column} TO STDOUT (ENCODING 'SQL_ASCII')")).await?;
    let mut rows = std::pin::pin!(rows);
    let mut count = 0;
    while rows.try_next().await?.is_some() {
        count += 1;
    }
    Ok(Read::Rows(count))
}

/// Takes a table, so that nobody can put another in its place until the transaction ends (but by renaming schemas, which no lock on
/// a table prevents), and looks at it. Tells whether the database's text has an encoding.
async fn hold(client: &Client, table: &str, columns: &[&str]) -> Result<Read<bool>, tokio_postgres::Error> {
    // One journey each: thousands of tables are asked about.
    let kind = "SELECT relkind = 'r', current_setting('server_encoding') <> 'SQL_ASCII' FROM pg_class WHERE oid = to_regclass($1)";
    let encoded = match client.query_typed(kind, &[(&table, Type::TEXT)]).await?.first() {
        None => return Ok(Read::Nothing),
        Some(row) if !row.get::<_, bool>(0) => return Ok(Read::Odd),
        Some(row) => row.get(1),
    };
    match client.batch_execute(&format!("LOCK TABLE {table} IN ACCESS SHARE MODE")).await {
        Err(error) if error.code() == Some(&SqlState::WRONG_OBJECT_TYPE) => return Ok(Read::Odd),
        other => other?,
    }
    // bool, int8, int2, int4, text, varchar, timestamp, timestamptz. Children are another matter only where it is said
    // which columns are wanted: whoever wants those wants all rows. In a snapshot the name must have been this table's then, too:
    // a lock is waited for by name, and follows whoever takes the name meanwhile.
    let query = "SELECT c.relkind = 'r' AND parse_ident($1) = ARRAY[n.nspname::text, c.relname::text] \
                 AND (cardinality($2::text[]) = 0 OR NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = c.oid)) \
                 AND (SELECT count(*) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = ANY($2) \
                      AND NOT a.attisdropped AND a.attgenerated = '' \
                      AND a.atttypid IN (16, 20, 21, 23, 25, 1043, 1114, 1184)) = cardinality($2::text[]) \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass($1)";
    let plain = client.query_typed(query, &[(&table, Type::TEXT), (&columns, Type::TEXT_ARRAY)]).await?;
    Ok(if plain.first().is_some_and(|row| row.get(0)) { Read::Rows(encoded) } else { Read::Odd })
}

/// A field of a line, as `COPY` writes it.
fn field(written: &[u8]) -> Option<Cow<'_, str>> {
    if written == b"\\N" {
        return None;
    }
    if !written.contains(&b'\\') {
        return Some(String::from_utf8_lossy(written));
    }
    let mut plain = Vec::with_capacity(written.len());
    let mut bytes = written.iter();
    while let Some(byte) = bytes.next() {
        plain.push(match (byte, if *byte == b'\\' { bytes.next() } else { None }) {
            (_, Some(b'b')) => 8,
            (_, Some(b't')) => b'\t',
            (_, Some(b'n')) => b'\n',
            (_, Some(b'v')) => 11,
            (_, Some(b'f')) => 12,
            (_, Some(b'r')) => b'\r',
            (_, Some(other)) => *other,
            (byte, None) => *byte,
        });
    }
    Some(Cow::Owned(String::from_utf8_lossy(&plain).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_as_copy_writes_them() {
        assert_eq!(field(b"\\N"), None);
        assert_eq!(field(b"").as_deref(), Some(""));
        assert_eq!(field(b"\\\\N").as_deref(), Some("\\N"));
        assert_eq!(field(b"a\\tb\\nc\\\\d\\re\\bf\\fg\\vh").as_deref(), Some("a\tb\nc\\d\re\u{8}f\u{c}g\u{b}h"));
    }
}
