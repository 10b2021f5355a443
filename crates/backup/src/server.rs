//! A PostgreSQL server, or a gateway that looks like one: connections for us, and environments for its programs.

use std::path::PathBuf;
use std::time::Duration;

use cofferdam_tenant::{Secret, ServerTls, TlsMode};
use tokio_postgres::{Client, NoTls};

use crate::Error;
use crate::model::{ChangeCounter, DatabaseLocale, Extension, LocaleProvider};

/// Where a server is and who we are there.
///
/// The role needs no more than the tenant's own database for a backup; for restores it must be able to create
/// databases, and to set their owner.
#[derive(Debug, Clone)]
pub struct Server {
    /// A host name, an address, or the directory of a Unix socket.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The role.
    pub user: String,
    /// Its password, where one is wanted.
    pub password: Option<Secret>,
    /// How connections are encrypted.
    pub tls: ServerTls,
    /// A database that is always there, for creating others from.
    pub maintenance: String,
    /// The directory of `pg_dump` and its kin; without one they are looked for as any program is.
    pub programs: Option<PathBuf>,
}

impl Server {
    /// A server with the usual maintenance database and programs.
    pub fn new(host: impl Into<String>, port: u16, user: impl Into<String>, password: Option<Secret>) -> Self {
        Self {
            host: host.into(),
            port,
            user: user.into(),
            password,
            tls: ServerTls::default(),
            maintenance: "postgres".to_owned(),
            programs: None,
        }
    }

    /// What messages call it.
    pub fn name(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// A connection on which no name means anything but PostgreSQL's own: settings of a database are its owner's to write,
    /// and so are functions and operators in it.
    pub(crate) async fn connect(&self, database: &str) -> Result<Client, Error> {
        let client = self.open(database, Some(OPTIONS)).await?;
        // Parameters that not every version has.
        let newer = "SET search_path = pg_catalog; SELECT set_config(name, '0', false) FROM pg_settings \
                     WHERE name IN ('idle_session_timeout', 'transaction_timeout')";
        client.batch_execute(newer).await.map_err(|e| self.failed(database, &e))?;
        Ok(client)
    }

    /// A connection with the settings that its database gives it.
    pub(crate) async fn connect_plainly(&self, database: &str) -> Result<Client, Error> {
        self.open(database, None).await
    }

    async fn open(&self, database: &str, options: Option<&str>) -> Result<Client, Error> {
        let mut config = tokio_postgres::Config::new();
        config.host(&self.host).port(self.port).user(&self.user).dbname(database);
        if let Some(password) = &self.password {
            config.password(password.expose());
        }
        // A host that dies without a word is noticed, so that nothing stays locked for its sake.
        config.application_name("cofferdam-backup").connect_timeout(CONNECT);
        if let Some(options) = options {
            config.options(options);
        }
        config.keepalives_idle(Duration::from_secs(30));
        let refused = |reason: String| Error::Database { server: self.name(), database: database.to_owned(), reason };
        let connecting = async {
            if self.tls.mode == TlsMode::Disable {
                let (client, connection) = config.connect(NoTls).await.map_err(|e| self.failed(database, &e))?;
                tokio::spawn(connection);
                return Ok(client);
            }
            let authorities = match &self.tls.ca_file {
                Some(path) => Some(tokio::fs::read_to_string(path).await.map_err(|e| Error::files(path, &e))?),
                None => None,
            };
            let (tls, insist) = cofferdam_tls::connector(self.tls.mode, authorities.as_deref())
                .map_err(|error| refused(error.to_string()))?;
            let (client, connection) =
                config.ssl_mode(insist).connect(tls).await.map_err(|e| self.failed(database, &e))?;
            // Whoever uses the client is told when it breaks.
            tokio::spawn(connection);
            Ok(client)
        };
        let connected = tokio::time::timeout(ANSWER, connecting).await;
        connected.unwrap_or_else(|_| Err(refused(format!("no connection within {} s", ANSWER.as_secs()))))
    }

    /// A connection to a database whose contents a tenant has written: neither views nor policies of the tenant's are
    /// expanded. A statement on a tenant's table still must not be planned here, because planning evaluates what stands in
    /// the table's indexes: what is read is read with [`crate::rows`], or from PostgreSQL's own tables.
    pub(crate) async fn connect_to_tenant(&self, database: &str) -> Result<Client, Error> {
        let client = self.connect(database).await?;
        let guard = "SET row_security = off; \
                     SELECT set_config(name, 'view, foreign-table', false) FROM pg_catalog.pg_settings \
                     WHERE name = 'restrict_nonsystem_relation_kind'";
        client.batch_execute(guard).await.map_err(|e| self.failed(database, &e))?;
        Ok(client)
    }

    /// A program of PostgreSQL's, that finds this server and a database through its environment: nothing secret stands in
    /// the list of processes, and nothing of our own environment goes along.
    pub(crate) fn program(&self, name: &str, database: &str) -> std::process::Command {
        let path = self.programs.as_ref().map_or_else(|| PathBuf::from(name), |directory| directory.join(name));
        let mut command = std::process::Command::new(path);
        command.env_clear();
        for name in ["PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.env("PGHOST", &self.host).env("PGPORT", self.port.to_string()).env("PGUSER", &self.user);
        command.env("PGDATABASE", database).env("PGCONNECT_TIMEOUT", CONNECT.as_secs().to_string());
        command.env("PGAPPNAME", "cofferdam-backup").env("LC_ALL", "C").env("PGSSLMODE", self.tls.mode.as_str());
        command.env("PGOPTIONS", OPTIONS);
        if let Some(path) = &self.tls.ca_file {
            command.env("PGSSLROOTCERT", path);
        }
        if let Some(password) = &self.password {
            command.env("PGPASSWORD", password.expose());
        }
        command
    }

    pub(crate) fn failed(&self, database: &str, error: &tokio_postgres::Error) -> Error {
        let reason = error.as_db_error().map_or_else(
            || {
                // What a library says first is not what helps.
                let mut text = error.to_string();
                let mut source = std::error::Error::source(error);
                while let Some(inner) = source {
                    text = format!("{text}: {inner}");
                    source = inner.source();
                }
                text
            },
            |e| format!("{} ({})", e.message(), e.code().code()),
        );
        Error::Database { server: self.name(), database: database.to_owned(), reason }
    }
}

/// Said at the beginning of a connection: stronger than what the owner of a database has set for it.
const OPTIONS: &str = "-c search_path=pg_catalog -c role=none -c statement_timeout=0 -c lock_timeout=0 \
                       -c idle_in_transaction_session_timeout=0 -c default_transaction_read_only=off \
                       -c default_transaction_isolation=read\\ committed -c default_transaction_deferrable=off";
const CONNECT: Duration = Duration::from_secs(20);
/// With everything that is said until a connection can be used.
const ANSWER: Duration = Duration::from_secs(40);

/// What a database was created with.
pub(crate) async fn locale_of(client: &Client) -> Result<DatabaseLocale, tokio_postgres::Error> {
    // The columns differ from version to version.
    let query = "SELECT pg_encoding_to_char(encoding)::text, datcollate::text, datctype::text, \
                 coalesce(to_jsonb(d) ->> 'datlocprovider', 'c'), \
                 coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'), to_jsonb(d) ->> 'daticurules' \
                 FROM pg_catalog.pg_database d WHERE datname = current_database()";
    let row = client.query_one(query, &[]).await?;
    let provider = match row.get::<_, String>(3).as_str() {
        "i" => LocaleProvider::Icu,
        "b" => LocaleProvider::Builtin,
        _ => LocaleProvider::Libc,
    };
    Ok(DatabaseLocale {
        encoding: row.get(0),
        collate: row.get(1),
        ctype: row.get(2),
        provider,
        locale: row.get(4),
        icu_rules: row.get(5),
    })
}

/// The extensions of a database, in the order in which they were created.
pub(crate) async fn extensions_of(client: &Client) -> Result<Vec<Extension>, tokio_postgres::Error> {
    let query = "SELECT e.extname::text, n.nspname::text, e.extname = 'unaccent' AND EXISTS (\
                   SELECT FROM pg_catalog.pg_proc p WHERE p.pronamespace = n.oid AND p.proname = 'unaccent' \
                   AND p.proargtypes::text = '25' AND p.provolatile = 'i') FROM pg_catalog.pg_extension e \
                 JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname <> 'plpgsql' ORDER BY e.oid";
    let rows = client.query(query, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| Extension { name: row.get(0), schema: row.get(1), immutable_unaccent: row.get(2) })
        .collect())
}

/// How often databases have been written to, by name; nothing of a server that follows another, which only counts what it writes itself.
pub(crate) async fn changes_of(
    client: &Client,
    databases: &[&str],
) -> Result<std::collections::HashMap<String, ChangeCounter>, tokio_postgres::Error> {
    let query = "SELECT datname::text, tup_inserted + tup_updated + tup_deleted, extract(epoch FROM stats_reset)::float8 \
                 FROM pg_catalog.pg_stat_database WHERE datname = ANY($1) AND NOT pg_is_in_recovery()";
    let rows = client.query(query, &[&databases]).await?;
    let counter = |row: &tokio_postgres::Row| {
        let since: Option<f64> = row.get(2);
        let since = since.and_then(|s| jiff::Timestamp::from_microsecond((s * 1e6) as i64).ok());
        ChangeCounter { rows: u64::try_from(row.get::<_, i64>(1)).unwrap_or(0), since }
    };
    Ok(rows.iter().map(|row| (row.get(0), counter(row))).collect())
}

/// A name in double quotes, for a statement.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text in single quotes, for a statement.
pub(crate) fn literal(text: &str) -> String {
    let plain = format!("'{}'", text.replace('\'', "''"));
    if text.contains('\\') { format!("E{}", plain.replace('\\', "\\\\")) } else { plain }
}
