//! What a pool's login may do to databases through its maintenance database, and what is done around it.
//!
//! `CREATE DATABASE … TEMPLATE`, `DROP DATABASE` and `RENAME` want nobody to be connected. The gateway itself keeps
//! connections open, so it steps aside: no transaction of the database begins, those that run end, idle connections are
//! closed; afterwards everybody goes on.
//!
//! This guards against mistakes and programs that name the wrong database. What protects one tenant's database from the
//! role of another is PostgreSQL's ownership: a function that is called may do anything that its role may.

use std::sync::Arc;
use std::time::Duration;

use cofferdam_tenant::{Catalog, DatabaseCommands, Pool};

use super::{End, Relay};
use crate::client::Established;
use crate::console::until;
use crate::pause::Fence;
use crate::sql::{DatabaseCommand, database_commands};

/// Transactions of a database may take so long to end before a command that wants nobody to be connected is refused.
const STEP_ASIDE: Duration = Duration::from_secs(30);

/// The databases to have out of the way of a text, or why it may not go on.
fn judge(catalog: &Catalog, established: &Established, text: Option<&[u8]>) -> Result<Vec<String>, String> {
    let user = established.user();
    let is_maintenance = established.database() == Catalog::MAINTENANCE_DATABASE;
    // Whose login it is decides, wherever it is connected.
    let pool = if is_maintenance {
        catalog.maintenance(user).map(|(pool, ..)| pool)
    } else {
        let tenant = catalog.by_database(established.database());
        let is_of_pool = |p: &&Arc<Pool>| p.login.as_ref().is_some_and(|login| login.role == user);
        tenant.and_then(|tenant| tenant.pool.as_ref()).filter(is_of_pool)
    };
    // A tenant's own login is what PostgreSQL lets it be.
    let Some(pool) = pool else { return Ok(Vec::new()) };
    let commands = text.map_or_else(|| vec![DatabaseCommand::Unreadable], database_commands);
    let mut quiet = Vec::new();
    for command in &commands {
        quiet.extend(allow(catalog, pool, command).map_err(|why| {
            format!("cofferdam: {}: {why} (`database_commands` of the pool)", established.route.name)
        })?);
    }
    quiet.sort();
    quiet.dedup();
    Ok(quiet)
}

fn allow(catalog: &Catalog, pool: &Pool, command: &DatabaseCommand) -> Result<Vec<String>, String> {
    let is_own = |name: &str| {
        let tenant = catalog.by_database(name);
        tenant.is_some_and(|t| t.pool.as_ref().is_some_and(|p| p.name == pool.name))
    };
    // What a database is copied from may be PostgreSQL's own; what is changed may not.
    let (changed, read, quiet): (Vec<&String>, Option<&String>, Vec<&String>) = match command {
        DatabaseCommand::Create { name, template } => (vec![name], template.as_ref(), template.iter().collect()),
        DatabaseCommand::Drop(name) => (vec![name], None, vec![name]),
        DatabaseCommand::Rename { name, to } => (vec![name, to], None, vec![name, to]),
        DatabaseCommand::Alter(name) => (vec![name], None, Vec::new()),
        DatabaseCommand::Unreadable => (Vec::new(), None, Vec::new()),
    };
    match pool.database_commands {
        DatabaseCommands::Any => {}
        DatabaseCommands::None => return Err("no database may be created, dropped or altered".to_owned()),
        DatabaseCommands::Own if *command == DatabaseCommand::Unreadable => {
            return Err("a statement about databases cannot be read".to_owned());
        }
        DatabaseCommands::Own => {
            let of_postgres = |name: &str| name.starts_with("template") || name == Catalog::MAINTENANCE_DATABASE;
            let foreign = changed.iter().find(|name| !is_own(name));
            let foreign = foreign.copied().or(read.filter(|name| !is_own(name) && !of_postgres(name)));
            if let Some(name) = foreign {
                return Err(format!("database \"{name}\" is not one of a tenant of the pool"));
            }
        }
    }
    Ok(quiet.into_iter().filter(|name| is_own(name)).cloned().collect())
}

impl Relay {
    /// Refuses the client's current message, or has the databases in question out of the way before it goes on.
    pub(super) async fn maintain(&mut self, kind: u8, text: Option<Vec<u8>>) -> Result<(), End> {
        // As the catalog is now: whoever is idle for long has an old one.
        let verdict = judge(&self.plane.snapshot().catalog, &self.established, text.as_deref());
        let (code, message) = match verdict {
            // Preparing it touches nothing.
            Ok(_) if kind == b'P' => {
                self.session.judged();
                return Ok(());
            }
            Ok(databases) => match self.step_aside(databases).await {
                Ok(fence) => {
                    // Those that are out of the way for an earlier message of the transaction stay so.
                    self.fences.extend(fence);
                    self.session.judged();
                    return Ok(());
                }
                Err(message) => ("55006", message),
            },
            Err(message) => ("42501", message),
        };
        if self.session.is_at_rest() {
            self.refuse(kind, code, &message);
            return Ok(());
        }
        // In the middle of a transaction or a batch nothing else can be said that is in order.
        Err(End::Fatal { code, message })
    }

    async fn step_aside(&self, mut databases: Vec<String>) -> Result<Option<Fence>, String> {
        // The client's own transaction is not waited for.
        databases.retain(|name| name != self.established.database());
        if databases.is_empty() {
            return Ok(None);
        }
        let plane = &self.plane;
        let fence = plane.pauses.fence(databases.clone());
        let quiet = async {
            for database in &databases {
                until(|| !plane.has_work(Some(database))).await;
                plane.reconnect(Some(database));
            }
        };
        if tokio::time::timeout(STEP_ASIDE, quiet).await.is_err() {
            let name = &self.established.route.name;
            return Err(format!("cofferdam: {name}: transactions of the database did not end within {STEP_ASIDE:?}"));
        }
        Ok(Some(fence))
    }
}
