//! A role for one restore, that may do what one owner may and nothing else.
//!
//! What is loaded was written by a tenant: tables bring their triggers, defaults and indexed expressions, and those run as
//! whoever loads, or as whoever that one can become. So nothing is loaded by the role that restores, which may create
//! databases and perhaps everything: a role is made that can become the owner and nobody else, and goes afterwards. Nobody
//! knows its password, and what it loads cannot give it another: a transaction of ours that has changed the role stays
//! open, and nothing that was loaded is used where that was lost. Where the process dies in between, the role can log in for up
//! to two more days; the next restore after them removes it.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio_postgres::Client;

use super::Restore;
use crate::server::{Server, literal, quoted};
use crate::{Control, Error};

/// The role, and the server as it sees it.
#[derive(Debug, Clone)]
pub(crate) struct Loader {
    /// The server, to be connected to as the role.
    pub(crate) server: Server,
    /// Whom it loads for.
    pub(crate) owner: String,
    /// Whether it can become the owner.
    becomes: bool,
    /// Says that it cannot log in any more, in a transaction that stays open until that shall be so: whatever else would
    /// change the role waits for it.
    closing: Arc<Closing>,
}

struct Closing {
    client: Client,
    /// The server's process, to be ended where the connection is lost and the server does not know.
    pid: i32,
    /// The transaction was lost while something was loaded.
    is_lost: AtomicBool,
    /// It has ended as it should.
    is_closed: AtomicBool,
}

impl fmt::Debug for Closing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closing")
    }
}

impl Closing {
    async fn begin(admin: &Server, role: &str) -> Result<Self, Error> {
        let client = admin.connect(&admin.maintenance).await?;
        // It stays open for as long as is loaded, and no longer than we are there. Servers before 17 know no limit for a whole
        // transaction.
        let begin = format!(
            "SET tcp_keepalives_idle = 60; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 6; \
             BEGIN; SET LOCAL lock_timeout = '30s'; SET LOCAL idle_in_transaction_session_timeout = 0; \
             SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout'; ALTER ROLE {role} NOLOGIN"
        );
        let failed = |e: &tokio_postgres::Error| admin.failed(&admin.maintenance, e);
        client.batch_execute(&begin).await.map_err(|e| failed(&e))?;
        let pid = client.query_one("SELECT pg_backend_pid()", &[]).await.map_err(|e| failed(&e))?.get(0);
        Ok(Self { client, pid, is_lost: AtomicBool::new(false), is_closed: AtomicBool::new(false) })
    }

    /// The role cannot log in from here on, and whoever has is sent away. An error when the transaction was lost: what was loaded
    /// meanwhile may have given the role a password, and somebody may have come in by it.
    async fn close(&self, admin: &Server, role: &str) -> Result<(), Error> {
        self.is_closed.store(true, Ordering::Release);
        // Nobody who is in shall wait for the end of the transaction.
        if let Ok(client) = admin.connect(&admin.maintenance).await {
            let end =
                format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = {}", literal(role));
            let grant = format!("SET lock_timeout = '2s'; GRANT {} TO CURRENT_USER", quoted(role));
            for step in [&end, &grant, &end] {
                let _ = tokio::time::timeout(STEP, client.batch_execute(step)).await;
            }
        }
        let closed = tokio::time::timeout(ANSWER, self.client.batch_execute("COMMIT")).await;
        if !matches!(closed, Ok(Ok(()))) {
            self.is_lost.store(true, Ordering::Release);
        }
        self.shut(admin, role).await?;
        if self.is_lost.load(Ordering::Acquire) {
            let reason = "the connection that kept what was loaded from becoming somebody else was lost".to_owned();
            return Err(Error::Database { server: admin.name(), database: admin.maintenance.clone(), reason });
        }
        Ok(())
    }

    /// Until the role cannot log in, has no password, and nobody who has logged in is left. Each step by itself: what waits for
    /// somebody must not undo what sends him away.
    async fn shut(&self, admin: &Server, role: &str) -> Result<(), Error> {
        let client = admin.connect(&admin.maintenance).await?;
        let failed = |e: &tokio_postgres::Error| admin.failed(&admin.maintenance, e);
        client.batch_execute("SET lock_timeout = '2s'").await.map_err(|e| failed(&e))?;
        let grant = format!("GRANT {} TO CURRENT_USER", quoted(role));
        let close = format!("ALTER ROLE {} NOLOGIN PASSWORD NULL", quoted(role));
        let end = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = {0} OR pid = {1} AND usename = current_user \
             AND application_name = 'cofferdam-backup' AND pid <> pg_backend_pid()",
            literal(role),
            self.pid
        );
        let query = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1 AND rolcanlogin) \
                       OR EXISTS (SELECT FROM pg_stat_activity WHERE usename = $1)";
        let mut last = None;
        for _ in 0..TRIES {
            // Whatever does not work now has to the next time.
            for step in [&grant, &end, &close, &end] {
                last = client.batch_execute(step).await.err().or(last);
            }
            if !client.query_one(query, &[&role]).await.map_err(|e| failed(&e))?.get::<_, bool>(0) {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
        let reason = match &last {
            Some(error) => format!("the role {role} cannot be closed: {}", admin.failed(&admin.maintenance, error)),
            None => format!("the role {role} cannot be closed: somebody who has logged in as it stays"),
        };
        Err(Error::Database { server: admin.name(), database: admin.maintenance.clone(), reason })
    }

    /// Closes the role as soon as the transaction is lost: nothing would keep what is loaded from giving it a password.
    async fn watch(of: Weak<Self>, admin: Server, role: String) {
        loop {
            tokio::time::sleep(LOOK).await;
            let Some(closing) = of.upgrade() else { return };
            // Asked, since a connection that leads nowhere looks as if it were there.
            let answer = tokio::time::timeout(SILENCE, closing.client.batch_execute("SELECT 1")).await;
            if matches!(answer, Ok(Ok(()))) || closing.is_closed.load(Ordering::Acquire) {
                continue;
            }
            closing.is_lost.store(true, Ordering::Release);
            tracing::warn!(role, "a connection of a restore is lost, which ends it");
            match closing.shut(&admin, &role).await {
                Ok(()) => return,
                Err(error) => tracing::error!(role, %error, "what a restore has logged in with stays open"),
            }
        }
    }
}

/// What the roles are called.
const PREFIX: &str = "cofferdam_load_";
/// How long a role can log in. Each program and each connection of a restore logs in once, at its beginning.
const VALID: SignedDuration = SignedDuration::from_hours(48);
/// How long the server may take to end the transaction that closes a role.
const ANSWER: Duration = Duration::from_secs(120);
/// How long one step may take that sends somebody away.
const STEP: Duration = Duration::from_secs(10);
/// How often is looked whether it is there, and how long it may take to say so.
const LOOK: Duration = Duration::from_secs(2);
const SILENCE: Duration = Duration::from_secs(60);
/// How often is tried to close a role, and how long is waited in between.
const TRIES: u32 = 30;
const PAUSE: Duration = Duration::from_millis(500);
/// How long one statement of ours may take while it runs what a tenant has written.
const STATEMENT: Duration = Duration::from_secs(600);

impl Loader {
    /// Makes the role, for one database.
    pub(crate) async fn create(admin: &Server, database: &str, owner: &str) -> Result<Self, Error> {
        Self::make(admin, database, owner, true).await
    }

    /// Makes a role that can become nobody, and that owns what it loads until that is handed over: for what somebody else
    /// than the owner has written. The database's schemas, which are ours, become its.
    pub(crate) async fn stranger(admin: &Server, database: &str, owner: &str) -> Result<Self, Error> {
        let loader = Self::make(admin, database, owner, false).await?;
        let given = async {
            let client = admin.connect(database).await?;
            let failed = |e: &tokio_postgres::Error| admin.failed(database, e);
            let name = quoted(&loader.server.user);
            let query = "SELECT quote_ident(nspname) FROM pg_namespace WHERE oid >= 16384 OR nspname = 'public'";
            let schemas = client.query(query, &[]).await.map_err(|e| failed(&e))?;
            let (owner, of) = (quoted(owner), quoted(database));
            let mut give = format!("GRANT CREATE, TEMPORARY ON DATABASE {of} TO {name}, {owner}");
            for row in schemas {
                give.push_str(&format!("; ALTER SCHEMA {} OWNER TO {name}", row.get::<_, String>(0)));
            }
            client.batch_execute(&give).await.map_err(|e| failed(&e))
        };
        match given.await {
            Ok(()) => Ok(loader),
            Err(error) => {
                let _ = loader.hand_over(admin, database).await;
                Err(error)
            }
        }
    }

    async fn make(admin: &Server, database: &str, owner: &str, becomes: bool) -> Result<Self, Error> {
        let client = admin.connect(&admin.maintenance).await?;
        let failed = |e: &tokio_postgres::Error| admin.failed(database, e);
        allowed(&client, admin, owner).await?;
        sweep(&client).await.map_err(|e| failed(&e))?;
        let (name, password) = (format!("{PREFIX}{}", random(8)?), random(32)?);
        // The server never sees the password, neither in the statement nor in what it logs of it.
        let verifier = postgres_protocol::password::scram_sha_256(password.as_bytes());
        let create = format!(
            "BEGIN; CREATE ROLE {0} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION INHERIT PASSWORD {1} \
             VALID UNTIL {3}; {4}; GRANT CONNECT ON DATABASE {2} TO {0}; COMMIT",
            quoted(&name),
            literal(&verifier),
            quoted(database),
            literal(&(Timestamp::now() + VALID).to_string()),
            // Or we become it, to give it what it is to own.
            if becomes {
                format!("GRANT {} TO {}", quoted(owner), quoted(&name))
            } else {
                format!("GRANT {} TO CURRENT_USER", quoted(&name))
            }
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
        let closing = match Closing::begin(admin, &quoted(&name)).await {
            Ok(closing) => {
                let closing = Arc::new(closing);
                tokio::spawn(Closing::watch(Arc::downgrade(&closing), admin.clone(), name.clone()));
                closing
            }
            Err(error) => {
                let remove =
                    format!("REVOKE ALL ON DATABASE {} FROM {1}; DROP ROLE {1}", quoted(database), quoted(&name));
                let _ = client.batch_execute(&remove).await;
                return Err(error);
            }
        };
        let server = Server { user: name, password: Some(cofferdam_tenant::Secret::new(password)), ..admin.clone() };
        Ok(Self { server, owner: owner.to_owned(), becomes, closing })
    }

    /// A connection that works as the owner, if it can become that, in the owner's schema.
    pub(crate) async fn connect(&self, database: &str) -> Result<Client, Error> {
        let client = self.server.connect(database).await?;
        let role = if self.becomes { quoted(&self.owner) } else { "NONE".to_owned() };
        let begin = format!(
            "SET ROLE {role}; SET search_path = public; SET row_security = off; SET lock_timeout = '30s'; SET statement_timeout = {}",
            STATEMENT.as_millis()
        );
        client.batch_execute(&begin).await.map_err(|e| self.server.failed(database, &e))?;
        Ok(client)
    }

    /// Removes the role after something was loaded, well or not. Whatever it owns in the database, because something that was
    /// loaded has tried to be clever, is the owner's from then on. Nothing that was loaded is used where that fails.
    pub(crate) async fn remove_after<T>(
        self,
        loaded: Result<T, Error>,
        admin: &Server,
        database: &str,
        control: &Control,
    ) -> Result<T, Error> {
        let name = self.server.user.clone();
        let removed = self.hand_over(admin, database).await;
        if let Err(error) = &removed {
            control.warn(format!("the role {name} stays: {error}; the next restore tries again to remove it"));
        }
        let loaded = loaded?;
        removed.map(|()| loaded)
    }

    /// Gives the owner what the role has made, and removes the role.
    pub(crate) async fn hand_over(self, admin: &Server, database: &str) -> Result<(), Error> {
        let name = quoted(&self.server.user);
        // Whatever fails later, nobody logs in as it any more, and nobody who has is left.
        let closed = self.closing.close(admin, &self.server.user).await;
        let client = admin.connect(database).await?;
        client.batch_execute("SET lock_timeout = '30s'").await.map_err(|e| admin.failed(database, &e))?;
        // What a file has prepared would hold what it was about for ever.
        let query =
            "SELECT quote_literal(gid) FROM pg_prepared_xacts WHERE database = current_database() AND owner = $1";
        let prepared = client.query(query, &[&self.server.user]).await.map_err(|e| admin.failed(database, &e))?;
        for row in prepared {
            // In three journeys: it cannot be said in a transaction, which several statements in one are.
            for part in
                [&format!("SET ROLE {name}"), &format!("ROLLBACK PREPARED {}", row.get::<_, String>(0)), "RESET ROLE"]
            {
                client.batch_execute(part).await.map_err(|e| admin.failed(database, &e))?;
            }
        }
        // Schemas first: what is in them can only be given to somebody who may be there.
        let query = "SELECT quote_ident(n.nspname) FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner \
                     WHERE r.rolname = $1";
        let schemas = client.query(query, &[&self.server.user]).await.map_err(|e| admin.failed(database, &e))?;
        for row in schemas {
            let give = format!("ALTER SCHEMA {} OWNER TO {}", row.get::<_, String>(0), quoted(&self.owner));
            client.batch_execute(&give).await.map_err(|e| admin.failed(database, &e))?;
        }
        let drop =
            format!("REASSIGN OWNED BY {name} TO {}; DROP OWNED BY {name}; DROP ROLE {name}", quoted(&self.owner));
        if client.batch_execute(&drop).await.is_err() {
            // An owner who may not be in a schema of its own is given nothing in it.
            let query = "SELECT quote_ident(n.nspname) FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner WHERE r.rolname = $1";
            let schemas = client.query(query, &[&self.owner]).await.map_err(|e| admin.failed(database, &e))?;
            for row in schemas {
                let (schema, owner) = (row.get::<_, String>(0), quoted(&self.owner));
                let let_in = format!("GRANT CREATE, USAGE ON SCHEMA {schema} TO {owner}");
                client.batch_execute(&let_in).await.map_err(|e| admin.failed(database, &e))?;
            }
            client.batch_execute(&drop).await.map_err(|e| admin.failed(database, &e))?;
        }
        closed
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
        let query = "SELECT r.rolname::text FROM pg_catalog.pg_roles r \
                     WHERE CASE WHEN $1::text IS NULL \
                     THEN r.oid = (SELECT datdba FROM pg_catalog.pg_database WHERE datname = $2) ELSE r.rolname = $1 END";
        let row = client.query_opt(query, &[&self.owner, &self.database]).await.map_err(|e| failed(&e))?;
        let Some(row) = row else {
            let found = match &self.owner {
                Some(owner) => format!("there is no role {owner} that could own what is restored"),
                None => format!("there is no database {}, whose owner would own what is restored", self.database),
            };
            return Err(Error::Refused(format!("{}: {found}: {EXPECTED}; nothing was changed", self.tenant)));
        };
        let owner: String = row.get(0);
        allowed(&client, &self.server, &owner).await?;
        Ok(owner)
    }
}

const EXPECTED: &str = "expected a role of the tenant's own, in `owner`";

/// Whether what a tenant has written may run as a role: not as one that may do more than own databases.
async fn allowed(client: &Client, admin: &Server, owner: &str) -> Result<(), Error> {
    let query = "SELECT r.rolsuper OR r.rolcreaterole OR r.rolreplication OR r.rolbypassrls \
                     OR EXISTS (SELECT FROM pg_roles p WHERE pg_has_role(r.oid, p.oid, 'MEMBER') \
                                AND (p.rolsuper OR p.rolcreaterole OR p.rolreplication OR p.rolbypassrls \
                                  OR p.oid < 16384 AND starts_with(p.rolname, 'pg_') AND p.rolname NOT IN ('pg_database_owner', \
                                    'pg_monitor', 'pg_read_all_settings', 'pg_read_all_stats', 'pg_stat_scan_tables'))), \
                     pg_has_role(r.oid, (SELECT oid FROM pg_roles WHERE rolname = current_user), 'MEMBER') \
                 FROM pg_roles r WHERE r.rolname = $1";
    let row = client.query_opt(query, &[&owner]).await.map_err(|e| admin.failed(&admin.maintenance, &e))?;
    let found = match row.map(|row| (row.get(0), row.get(1))) {
        None => format!("there is no role {owner} that could own what is restored"),
        Some((true, _)) => format!("what is restored would belong to {owner}, who may do more than own databases"),
        Some((_, true)) => format!("what is restored would belong to {owner}, who restores it or can become who does"),
        Some((false, false)) => return Ok(()),
    };
    Err(Error::Refused(format!("{}: {found}: {EXPECTED}; nothing was changed", admin.name())))
}

/// Removes the roles of restores whose processes have died. What cannot be removed is tried again the next time.
async fn sweep(client: &Client) -> Result<(), tokio_postgres::Error> {
    client.batch_execute("SET lock_timeout = '5s'").await?;
    let query = "SELECT quote_ident(rolname) FROM pg_roles \
                 WHERE starts_with(rolname, $1) AND rolvaliduntil < now()";
    for row in client.query(query, &[&PREFIX]).await? {
        let name: String = row.get(0);
        let _ = client.batch_execute(&format!("ALTER ROLE {name} NOLOGIN")).await;
        let _ = client.batch_execute(&format!("GRANT {name} TO CURRENT_USER")).await;
        // A session outlives the time until which a role can log in, and even the role.
        let end = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE quote_ident(usename) = {}",
            literal(&name)
        );
        let _ = client.batch_execute(&end).await;
        let _ = client.batch_execute(&format!("DROP OWNED BY {name}; DROP ROLE {name}")).await;
    }
    Ok(())
}

fn random(bytes: usize) -> Result<String, Error> {
    let mut random = vec![0; bytes];
    getrandom::fill(&mut random)
        .map_err(|e| Error::Program { program: "cofferdam".to_owned(), reason: format!("no random numbers: {e}") })?;
    Ok(hex::encode(random))
}
