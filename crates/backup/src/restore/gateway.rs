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
                // It may have been said before the connection broke.
                self.resume(database).await?;
                Err(error)
            }
            Err(_) => {
                self.resume(database).await?;
                let long = format!("a transaction of {database} runs for longer than {} s", limit.as_secs());
                Err(Error::Refused(format!("{long}: nothing was changed")))
            }
        }
    }

    /// Lets everything go on. Tried again for a while: nobody must be left waiting for a connection that broke.
    pub(super) async fn resume(&self, database: &str) -> Result<(), Error> {
        let command = format!("RESUME {}", console_name(database)?);
        let mut tries = 0;
        loop {
            tries += 1;
            let said = tokio::time::timeout(ANSWER, self.say(&command)).await;
            match said.unwrap_or_else(|_| Err(Error::Refused("the gateway's console does not answer".to_owned()))) {
                Ok(()) => return Ok(()),
                Err(error) if tries >= TRIES => {
                    let advice =
                        format!("transactions of {database} wait until somebody says `{command}` on the console");
                    return Err(Error::Refused(format!("{error}; {advice}")));
                }
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    }

    async fn say(&self, command: &str) -> Result<(), Error> {
        let client = self.server.connect_plainly(&self.database).await?;
        client.simple_query(command).await.map_err(|e| self.server.failed(&self.database, &e))?;
        Ok(())
    }
}

/// How often the gateway is told that it goes on, and how long between.
const TRIES: u32 = 20;
const AGAIN: Duration = Duration::from_millis(500);
/// How long the console may take to say that everything goes on.
const ANSWER: Duration = Duration::from_secs(10);

/// The console takes words, not statements: a name with anything else in it could be another command.
fn console_name(database: &str) -> Result<&str, Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if !database.is_empty() && database.chars().all(plain) {
        return Ok(database);
    }
    let found = format!("the console cannot be told the name `{database}`");
    Err(Error::Refused(format!("{found}: expected letters, digits, `_`, `-` and `.`; nothing was changed")))
}
