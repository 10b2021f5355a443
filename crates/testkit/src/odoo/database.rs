//! The SQL habits: which connections are opened, and what is said on them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use super::server::OdooOptions;

/// Idle connections by worker and database: each worker is a process with a `ConnectionPool` of its own.
#[derive(Debug)]
pub(super) struct Databases {
    config: Option<Config>,
    /// The password of roles named like their databases, where there is no common login.
    password_of_each: Option<String>,
    idle: Mutex<HashMap<(usize, String), Vec<Client>>>,
}

/// What a page asks of its database.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    pub(super) statements: u64,
    /// Milliseconds that all of them sleep.
    pub(super) sleep_ms: u64,
    /// Rows that each counts instead, which computes.
    pub(super) count: Option<u64>,
}

impl Databases {
    pub(super) fn new(options: &OdooOptions) -> Self {
        let config = options.postgres.map(|address| {
            let mut config = Config::new();
            config.host(address.ip().to_string()).port(address.port());
            config.user(&options.login.0).password(&options.login.1);
            config.connect_timeout(Duration::from_secs(30));
            config
        });
        Self { config, password_of_each: options.login_per_database.clone(), idle: Mutex::default() }
    }

    /// One page's worth of database work; the answer is the name of the database that gave it.
    pub(super) async fn page(
        &self,
        worker: usize,
        database: &str,
        anonymous: bool,
        work: Work,
    ) -> Result<String, tokio_postgres::Error> {
        if anonymous && self.password_of_each.is_none() {
            // `db_list`: a new connection to the maintenance database for every request without a session.
            let maintenance = self.connect(worker, "postgres").await?;
            maintenance.simple_query("SELECT datname FROM pg_database WHERE NOT datistemplate ORDER BY 1").await?;
        }
        let key = (worker, database.to_owned());
        let reused = self.lock().get_mut(&key).and_then(Vec::pop).filter(|c| !c.is_closed());
        let client = match reused {
            Some(client) => {
                client.batch_execute("DISCARD ALL").await?;
                client
            }
            None => self.connect(worker, database).await?,
        };
        client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        let seconds = work.sleep_ms as f64 / 1_000.0 / work.statements.max(1) as f64;
        let statement = match work.count {
            Some(rows) => format!("SELECT current_database(), (SELECT count(*) FROM generate_series(1, {rows}))"),
            None => format!("SELECT current_database(), pg_sleep({seconds})"),
        };
        let mut answer = String::new();
        for _ in 0..work.statements {
            let rows = client.simple_query(&statement).await?;
            if let Some(SimpleQueryMessage::Row(row)) = rows.iter().find(|m| matches!(m, SimpleQueryMessage::Row(_))) {
                row.get(0).unwrap_or_default().clone_into(&mut answer);
            }
        }
        client.batch_execute("COMMIT").await?;
        self.lock().entry(key).or_default().push(client);
        Ok(answer)
    }

    async fn connect(&self, worker: usize, database: &str) -> Result<Client, tokio_postgres::Error> {
        let mut config = self.config.clone().unwrap_or_default();
        // Odoo names its connections after the process, which a worker is.
        config.application_name(format!("odoo-{}{worker:03}", std::process::id() % 1_000_000));
        if let Some(password) = &self.password_of_each {
            config.user(database).password(password);
        }
        let (client, connection) = config.dbname(database).connect(NoTls).await?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(client)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(usize, String), Vec<Client>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
