//! What a pool's login may do to databases through its maintenance database, and what is done around it.
//!
//! `CREATE DATABASE … TEMPLATE`, `DROP DATABASE` and `RENAME` want nobody to be connected. The gateway itself keeps
//! connections open, so it steps aside: no transaction of the database begins, those that run end, idle connections are
//! closed; afterwards everybody goes on.

use std::time::Duration;

use cofferdam_tenant::{Catalog, DatabaseCommands};

use super::{End, Relay};
use crate::client::Established;
use crate::pause::Fence;
use crate::plane::Snapshot;
use crate::sql::{DatabaseCommand, database_command};
use crate::wire::{Frame, cstr};

/// Transactions of a database may take so long to end before a command that wants nobody to be connected is refused.
const STEP_ASIDE: Duration = Duration::from_secs(30);
/// How often it is looked whether they have.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What has been decided about the client's current message.
#[derive(Debug, Default)]
pub(super) enum Decided {
    #[default]
    Nothing,
    /// It may go on, with these databases out of the way.
    Allowed(Option<Fence>),
}

/// A command about databases that is to be refused, or to be carried out with some of them out of the way.
pub(super) struct Maintenance {
    verdict: Result<Vec<String>, String>,
}

/// Whether a message is about databases, and what is to be done then.
pub(super) fn about_databases(
    snapshot: &Snapshot,
    established: &Established,
    kind: u8,
    message: &[u8],
) -> Option<Maintenance> {
    let body = message.get(Frame::HEADER..)?;
    let text = match kind {
        b'Q' => cstr(body).map_or(body, |(text, _)| text),
        b'P' => cstr(cstr(body)?.1).map(|(text, _)| text)?,
        _ => return None,
    };
    let command = database_command(text)?;
    Some(Maintenance { verdict: judge(&snapshot.catalog, established, &command) })
}

/// The databases to have out of the way, or why not.
fn judge(catalog: &Catalog, established: &Established, command: &DatabaseCommand) -> Result<Vec<String>, String> {
    let Some((pool, ..)) = catalog.maintenance(&established.parameters.user) else { return Ok(Vec::new()) };
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
    let refused = match pool.database_commands {
        DatabaseCommands::Any => None,
        DatabaseCommands::None => Some("no database may be created, dropped or altered".to_owned()),
        DatabaseCommands::Own if *command == DatabaseCommand::Unreadable => {
            Some("the statement cannot be read".to_owned())
        }
        DatabaseCommands::Own => {
            let of_postgres = |name: &str| name.starts_with("template") || name == Catalog::MAINTENANCE_DATABASE;
            let foreign = changed.iter().find(|name| !is_own(name));
            let foreign = foreign.copied().or(read.filter(|name| !is_own(name) && !of_postgres(name)));
            foreign.map(|name| format!("database \"{name}\" is not one of a tenant of the pool"))
        }
    };
    match refused {
        Some(why) => Err(format!("cofferdam: {}: {why} (`database_commands` of the pool)", established.route.name)),
        None => Ok(quiet.into_iter().filter(|name| is_own(name)).cloned().collect()),
    }
}

impl Relay {
    /// Refuses the client's current message, or has the databases in question out of the way before it goes on.
    pub(super) async fn maintain(&mut self, kind: u8, maintenance: Maintenance) -> Result<(), End> {
        let refusal = match maintenance.verdict {
            Ok(databases) if databases.is_empty() => {
                self.decided = Decided::Allowed(None);
                return Ok(());
            }
            Ok(databases) => match self.step_aside(databases).await {
                Ok(fence) => {
                    self.decided = Decided::Allowed(Some(fence));
                    return Ok(());
                }
                Err(message) => ("55006", message),
            },
            Err(message) => ("42501", message),
        };
        let (code, message) = refusal;
        if self.permit.is_none() && self.session.is_at_rest() {
            self.refuse(kind, code, &message);
            return Ok(());
        }
        // In the middle of a transaction or a batch nothing else can be said that is in order.
        Err(End::Fatal { code, message })
    }

    async fn step_aside(&self, databases: Vec<String>) -> Result<Fence, String> {
        let plane = &self.plane;
        let fence = plane.pauses.fence(databases.clone());
        let quiet = async {
            for database in &databases {
                while plane.has_work(Some(database)) {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                plane.reconnect(Some(database));
            }
        };
        if tokio::time::timeout(STEP_ASIDE, quiet).await.is_err() {
            let name = &self.established.route.name;
            return Err(format!("cofferdam: {name}: transactions of the database did not end within {STEP_ASIDE:?}"));
        }
        Ok(fence)
    }
}
