//! A role for an hour, that may do what one owner may and nothing else.
//!
//! What is loaded was written by a tenant: tables bring their triggers, defaults and indexed expressions, and those run as
//! whoever loads, or as whoever that one can become. So nothing is loaded by the role that restores, which may create
//! databases and perhaps everything: a role is made that can become the owner and nobody else, and goes afterwards.

use tokio_postgres::Client;

use super::Restore;
use crate::server::{Server, literal, quoted};
use crate::{Control, Error};

/// The role, and the server as it sees it.
#[derive(Debug)]
pub(crate) struct Loader {
    /// The server, to be connected to as the role.
    pub(crate) server: Server,
    /// Whom it loads for.
    pub(crate) owner: String,
}

/// What the roles are called.
const PREFIX: &str = "cofferdam_load_";

impl Loader {
    /// Makes the role, for one database.
    pub(crate) async fn create(admin: &Server, database: &str, owner: &str) -> Result<Self, Error> {
        let client = admin.connect(&admin.maintenance).await?;
        let failed = |e: &tokio_postgres::Error| admin.failed(database, e);
        let (name, password) = (format!("{PREFIX}{}", random(8)?), random(32)?);
        // The server never sees the password, neither in the statement nor in what it logs of it.
        let verifier = postgres_protocol::password::scram_sha_256(password.as_bytes());
        let create = format!(
            "BEGIN; CREATE ROLE {0} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION INHERIT PASSWORD {1}; \
             GRANT {2} TO {0}; GRANT CONNECT ON DATABASE {3} TO {0}; COMMIT",
            quoted(&name),
            literal(&verifier),
            quoted(owner),
            quoted(database)
        );
        client.batch_execute(&create).await.map_err(|e| {
            if e.code() == Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE) {
                let needs = format!("it must have CREATEROLE, and be able to grant {owner}");
                return Error::Refused(format!(
                    "{}: {} may not make the role that loads {database}: {needs}; nothing was changed",
                    admin.name(),
                    admin.user
                ));
            }
            failed(&e)
        })?;
        let server = Server { user: name, password: Some(cofferdam_tenant::Secret::new(password)), ..admin.clone() };
        Ok(Self { server, owner: owner.to_owned() })
    }

    /// A connection that works as the owner, in the owner's schema.
    pub(crate) async fn connect(&self, database: &str) -> Result<Client, Error> {
        let client = self.server.connect(database).await?;
        let become_owner = format!("SET ROLE {}; SET search_path = public", quoted(&self.owner));
        client.batch_execute(&become_owner).await.map_err(|e| self.server.failed(database, &e))?;
        Ok(client)
    }

    /// Removes the role. Whatever it owns in the database, because something that was loaded has tried to be clever, is
    /// the owner's from then on.
    pub(crate) async fn remove(self, admin: &Server, database: &str, control: &Control) {
        let name = quoted(&self.server.user);
        let work = async {
            let client = admin.connect(database).await?;
            let leave = format!(
                "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE usename = {}",
                literal(&self.server.user)
            );
            let drop = format!(
                "{leave}; GRANT {name} TO CURRENT_USER; REASSIGN OWNED BY {name} TO {}; DROP OWNED BY {name}; \
                 DROP ROLE {name}",
                quoted(&self.owner)
            );
            client.batch_execute(&drop).await.map_err(|e| admin.failed(database, &e))
        };
        if let Err(error) = work.await {
            control
                .warn(format!("the role {} stays, which can log in as nobody knows whom: {error}", self.server.user));
        }
    }
}

impl Restore {
    /// Who shall own the restored database: whoever was asked for, or whoever owns the tenant's.
    ///
    /// Refused where that is the restoring role itself or a superuser: what the tenant has written would then run with
    /// all that role may, and where it is Odoo's role too, Odoo's workers would find the half-loaded database and run its jobs.
    pub(crate) async fn owner(&self) -> Result<String, Error> {
        let client = self.server.connect(&self.server.maintenance).await?;
        let failed = |e: &tokio_postgres::Error| self.server.failed(&self.database, e);
        let query = "SELECT r.rolname::text, r.rolsuper FROM pg_catalog.pg_roles r \
                     WHERE CASE WHEN $1::text IS NULL \
                     THEN r.oid = (SELECT datdba FROM pg_catalog.pg_database WHERE datname = $2) ELSE r.rolname = $1 END";
        let row = client.query_opt(query, &[&self.owner, &self.database]).await.map_err(|e| failed(&e))?;
        let refused = |found: String| {
            let expected = "expected a role of the tenant's own, in `owner`";
            Err(Error::Refused(format!("{}: {found}: {expected}; nothing was changed", self.tenant)))
        };
        let Some(row) = row else {
            return refused(match &self.owner {
                Some(owner) => format!("there is no role {owner} that could own what is restored"),
                None => format!("there is no database {}, whose owner would own what is restored", self.database),
            });
        };
        let (owner, superuser): (String, bool) = (row.get(0), row.get(1));
        if superuser {
            return refused(format!("what is restored would belong to {owner}, who may do everything"));
        }
        if owner == self.server.user {
            return refused(format!("what is restored would belong to {owner}, who restores it"));
        }
        Ok(owner)
    }
}

fn random(bytes: usize) -> Result<String, Error> {
    let mut random = vec![0; bytes];
    getrandom::fill(&mut random)
        .map_err(|e| Error::Program { program: "cofferdam".to_owned(), reason: format!("no random numbers: {e}") })?;
    Ok(hex::encode(random))
}
