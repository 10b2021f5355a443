//! The SQL habits: which connections are opened, and what is said on them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use super::server::OdooOptions;

/// Idle connections by database, as in Odoo's `ConnectionPool`.
#[derive(Debug)]
pub(super) struct Databases {
    config: Option<Config>,
    idle: Mutex<HashMap<String, Vec<Client>>>,
}

impl Databases {
    pub(super) fn new(options: &OdooOptions) -> Self {
        let config = options.postgres.map(|address| {
            let mut config = Config::new();
            config.host(address.ip().to_string()).port(address.port());
            config.user(&options.login.0).password(&options.login.1);
            config.application_name(format!("odoo-{}", std::process::id())).connect_timeout(Duration::from_secs(30));
            config
        });
        Self { config, idle: Mutex::default() }
    }

    /// One page's worth of database work; the answer is the name of the database that gave it.
    pub(super) async fn page(
        &self,
        database: &str,
        anonymous: bool,
        statements: u64,
        sleep_ms: u64,
    ) -> Result<String, tokio_postgres::Error> {
        if anonymous {
            // `db_list`: a new connection to the maintenance database for every request without a session.
            let maintenance = self.connect("postgres").await?;
            maintenance.simple_query("SELECT datname FROM pg_database WHERE NOT datistemplate ORDER BY 1").await?;
        }
        let reused = self.lock().get_mut(database).and_then(Vec::pop).filter(|c| !c.is_closed());
        let client = match reused {
            Some(client) => {
                client.batch_execute("DISCARD ALL").await?;
                client
            }
            None => self.connect(database).await?,
        };
        client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        let seconds = sleep_ms as f64 / 1_000.0 / statements.max(1) as f64;
        let mut answer = String::new();
        for _ in 0..statements {
            let rows = client.simple_query(&format!("SELECT current_database(), pg_sleep({seconds})")).await?;
            if let Some(SimpleQueryMessage::Row(row)) = rows.iter().find(|m| matches!(m, SimpleQueryMessage::Row(_))) {
                row.get(0).unwrap_or_default().clone_into(&mut answer);
            }
        }
        client.batch_execute("COMMIT").await?;
        self.lock().entry(database.to_owned()).or_default().push(client);
        Ok(answer)
    }

    async fn connect(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        let mut config = self.config.clone().unwrap_or_default();
        let (client, connection) = config.dbname(database).connect(NoTls).await?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(client)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Vec<Client>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
