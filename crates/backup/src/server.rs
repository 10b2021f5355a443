//! A PostgreSQL server, or a gateway that looks like one: connections for us, and environments for its programs.

use std::path::PathBuf;
use std::time::Duration;

use cofferdam_tenant::Secret;
use tokio_postgres::{Client, NoTls};

use crate::Error;

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
            maintenance: "postgres".to_owned(),
            programs: None,
        }
    }

    /// What messages call it.
    pub fn name(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    pub(crate) async fn connect(&self, database: &str) -> Result<Client, Error> {
        let mut config = tokio_postgres::Config::new();
        config.host(&self.host).port(self.port).user(&self.user).dbname(database);
        if let Some(password) = &self.password {
            config.password(password.expose());
        }
        // A host that dies without a word is noticed, so that nothing stays locked for its sake.
        config.application_name("cofferdam-backup").connect_timeout(CONNECT);
        config.keepalives_idle(Duration::from_secs(30));
        let (client, connection) = config.connect(NoTls).await.map_err(|e| self.failed(database, &e))?;
        tokio::spawn(async move {
            // Whoever uses the client is told.
            let _ = connection.await;
        });
        Ok(client)
    }

    /// A program of PostgreSQL's, that finds this server and a database through its environment: nothing secret stands in
    /// the list of processes.
    pub(crate) fn program(&self, name: &str, database: &str) -> std::process::Command {
        let path = self.programs.as_ref().map_or_else(|| PathBuf::from(name), |directory| directory.join(name));
        let mut command = std::process::Command::new(path);
        command.env("PGHOST", &self.host).env("PGPORT", self.port.to_string()).env("PGUSER", &self.user);
        command.env("PGDATABASE", database).env("PGCONNECT_TIMEOUT", CONNECT.as_secs().to_string());
        command.env("PGAPPNAME", "cofferdam-backup").env("LC_ALL", "C");
        if let Some(password) = &self.password {
            command.env("PGPASSWORD", password.expose());
        }
        command
    }

    pub(crate) fn failed(&self, database: &str, error: &tokio_postgres::Error) -> Error {
        let reason =
            error.as_db_error().map_or_else(|| error.to_string(), |e| format!("{} ({})", e.message(), e.code().code()));
        Error::Database { server: self.name(), database: database.to_owned(), reason }
    }
}

const CONNECT: Duration = Duration::from_secs(20);

/// A name in double quotes, for a statement.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text in single quotes, for a statement.
pub(crate) fn literal(text: &str) -> String {
    let plain = format!("'{}'", text.replace('\'', "''"));
    if text.contains('\\') { format!("E{}", plain.replace('\\', "\\\\")) } else { plain }
}
