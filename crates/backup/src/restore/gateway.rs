//! The gateway's console: transactions wait there while databases change their names.

use std::time::Duration;

use crate::Error;
use crate::server::Server;

/// The console of a gateway, which speaks as PgBouncer's does.
#[derive(Debug, Clone)]
pub struct GatewayConsole {
    server: Server,
    database: String,
}

impl GatewayConsole {
    /// A console: its address, its administrator, and the name it answers to (`cofferdam` or `pgbouncer`).
    pub fn new(server: Server, database: impl Into<String>) -> Self {
        Self { server, database: database.into() }
    }

    /// From here on no transaction of a database begins. Returns when none runs and no server connection to it is open;
    /// when that takes longer than `limit`, everything goes on as before and an error says so.
    pub(super) async fn pause(&self, database: &str, limit: Duration) -> Result<(), Error> {
        let paused = tokio::time::timeout(limit, self.say(&format!("PAUSE {}", console_name(database)?))).await;
        match paused {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                let _ = self.resume(database).await;
                Err(error)
            }
            Err(_) => {
                self.resume(database).await?;
                let long = format!("a transaction of {database} runs for longer than {} s", limit.as_secs());
                Err(Error::Refused(format!("{long}: nothing was changed")))
            }
        }
    }

    pub(super) async fn resume(&self, database: &str) -> Result<(), Error> {
        self.say(&format!("RESUME {}", console_name(database)?)).await
    }

    async fn say(&self, command: &str) -> Result<(), Error> {
        let client = self.server.connect(&self.database).await?;
        client.simple_query(command).await.map_err(|e| self.server.failed(&self.database, &e))?;
        Ok(())
    }
}

/// The console takes words, not statements: a name with anything else in it could be another command.
fn console_name(database: &str) -> Result<&str, Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if !database.is_empty() && database.chars().all(plain) {
        return Ok(database);
    }
    let found = format!("the console cannot be told the name `{database}`");
    Err(Error::Refused(format!("{found}: expected letters, digits, `_`, `-` and `.`; nothing was changed")))
}
