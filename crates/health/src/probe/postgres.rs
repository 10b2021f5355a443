//! A PostgreSQL cluster: is it there, does it keep up, will it run out of something.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cofferdam_rows::{Bounded, LogsIn, SecureLogin};
use cofferdam_tenant::{Secret, ServerTls, TlsMode};
use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use jiff::Timestamp;
use rustls::ClientConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config, NoTls, Row};
use tokio_util::task::AbortOnDropHandle;

use super::{Probe, bytes, graded, seconds};
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Where a server is and who we are there. To look at a cluster the role needs `pg_monitor`; to look into tenants' databases
/// `CONNECT` and `SELECT`, and it must have nothing else.
#[derive(Debug, Clone)]
pub struct Database {
    /// A host name, an address, or the directory of a socket.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The role.
    pub user: String,
    /// Its password.
    pub password: Option<Secret>,
    /// How connections are encrypted, if they are.
    pub tls: Option<Tls>,
    /// The database.
    pub database: String,
}

/// What connections are encrypted with, read once.
#[derive(Clone)]
pub struct Tls(Arc<ClientConfig>, SslMode);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tls").field(&self.1).finish()
    }
}

impl Tls {
    /// Reads the authorities. None where connections are not encrypted; fails, in words, where it cannot be as it should.
    pub fn read(tls: &ServerTls) -> Result<Option<Self>, String> {
        if tls.mode == TlsMode::Disable {
            return Ok(None);
        }
        let read = |path: &PathBuf| std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()));
        let authorities = tls.ca_file.as_ref().map(read).transpose()?;
        let config = cofferdam_tls::towards_server(tls.mode, "ca_file", authorities.as_deref(), None);
        Ok(Some(Self(Arc::new(config.map_err(|e| e.to_string())?), cofferdam_tls::insistence(tls.mode))))
    }
}

impl Database {
    fn config(&self) -> Config {
        let mut config = Config::new();
        config.host(&self.host).port(self.port).user(&self.user).dbname(&self.database);
        if let Some(password) = &self.password {
            config.password(password.expose());
        }
        config.application_name("cofferdam-health").connect_timeout(Duration::from_secs(5));
        // No look becomes the long transaction, or the lock, that it looks for.
        if let Some(Tls(_, insist)) = &self.tls {
            config.ssl_mode(*insist);
        }
        config.options("-c statement_timeout=4000 -c lock_timeout=1000 -c search_path=pg_catalog -c datestyle=ISO -c default_transaction_read_only=on -c row_security=off -c constraint_exclusion=off");
        config
    }

    /// A connection for one look. A thousand tenants' databases are looked at one after the other: keeping a connection
    /// to each would cost the server a thousand processes.
    pub(crate) async fn connect(&self) -> Result<Look, LookError> {
        let connect = async {
            if self.host.starts_with('/') {
                let path = format!("{}/.s.PGSQL.{}", self.host, self.port);
                self.speak(tokio::net::UnixStream::connect(path).await?).await
            } else {
                let stream = tokio::net::TcpStream::connect((self.host.as_str(), self.port)).await?;
                stream.set_nodelay(true)?;
                self.speak(stream).await
            }
        };
        let late = || io::Error::new(io::ErrorKind::TimedOut, "nobody takes the connection");
        tokio::time::timeout(CONNECT, connect).await.map_err(|_| late())?
    }

    async fn speak<S>(&self, stream: S) -> Result<Look, LookError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Whoever uses the client is told when its connection breaks.
        let password = self.password.clone();
        let (client, socket) = if let Some(Tls(config, _)) = &self.tls {
            let tls = SecureLogin::new(Arc::clone(config), &self.host, password, LARGEST_MESSAGE);
            let stream = Bounded::negotiating(stream, LARGEST_MESSAGE);
            let (client, connection) = self.config().connect_raw(stream, tls).await?;
            (client, tokio::spawn(connection))
        } else {
            let stream = LogsIn::new(Bounded::new(stream, LARGEST_MESSAGE), password);
            let (client, connection) = self.config().connect_raw(stream, NoTls).await?;
            (client, tokio::spawn(connection))
        };
        Ok(Look { client, socket: AbortOnDropHandle::new(socket) })
    }
}

/// How long a server may take to take a connection.
const CONNECT: Duration = Duration::from_secs(4);
/// Bytes of a message, which a row is, at most: what a tenant has written is in it.
const LARGEST_MESSAGE: u32 = 1 << 20;

/// Why a look has failed.
#[derive(Debug)]
pub(crate) enum LookError {
    Socket(io::Error),
    Server(tokio_postgres::Error),
}

impl From<io::Error> for LookError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error)
    }
}

impl From<tokio_postgres::Error> for LookError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Server(error)
    }
}

impl LookError {
    /// In one line.
    pub(crate) fn reason(&self) -> String {
        match self {
            Self::Socket(error) => error.to_string(),
            Self::Server(error) => reason(error),
        }
    }
}

/// A connection for one look. Its socket closes with it, whatever the server is still doing.
pub(crate) struct Look {
    pub(crate) client: Client,
    socket: AbortOnDropHandle<Result<(), tokio_postgres::Error>>,
}

impl Look {
    /// Why something has failed: where the connection broke, what broke it.
    pub(crate) async fn reason(self, error: &tokio_postgres::Error) -> String {
        if error.is_closed()
            && let Ok(Err(broken)) = self.socket.await
        {
            return reason(&broken);
        }
        reason(error)
    }
}

/// Why a server did not answer, in one line.
pub(crate) fn reason(error: &tokio_postgres::Error) -> String {
    if let Some(error) = error.as_db_error() {
        return format!("{} ({})", error.message(), error.code().code());
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

/// Beyond what a cluster is in trouble.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClusterLimits {
    /// Replicas are this far behind, in seconds.
    pub lag: (f64, f64),
    /// A transaction is this old, in seconds.
    pub transaction: (f64, f64),
    /// Somebody has waited this long for a lock, in seconds.
    pub lock: (f64, f64),
    /// Connections used, in per cent of those that anybody may have.
    pub connections: (f64, f64),
    /// Transaction numbers used before the server stops to save itself, in per cent.
    pub wraparound: (f64, f64),
    /// Log that a slot keeps, in bytes.
    pub slot: (f64, f64),
    /// Log that has not been archived for so long, in seconds.
    pub archive: (f64, f64),
    /// So many replicas there should be; fewer are a failure.
    pub replicas: u32,
}

impl Default for ClusterLimits {
    fn default() -> Self {
        Self {
            lag: (30.0, 300.0),
            transaction: (900.0, 3_600.0),
            lock: (30.0, 300.0),
            connections: (80.0, 95.0),
            wraparound: (50.0, 75.0),
            slot: (10e9, 50e9),
            archive: (900.0, 3_600.0),
            replicas: 0,
        }
    }
}

/// Looks at a cluster as a whole, through one connection that is kept.
pub struct ClusterProbe {
    name: String,
    pool: Pool,
    limits: ClusterLimits,
    interval: Duration,
}

impl ClusterProbe {
    /// A probe of the cluster with a name. Connects when it looks.
    pub fn new(name: &str, server: &Database, limits: ClusterLimits, interval: Duration) -> Self {
        let recycling_method = RecyclingMethod::Fast;
        let options = ManagerConfig { recycling_method };
        let manager = match &server.tls {
            Some(Tls(config, _)) => {
                let connector = tokio_postgres_rustls::MakeRustlsConnect::new(config.as_ref().clone());
                Manager::from_config(server.config(), connector, options)
            }
            None => Manager::from_config(server.config(), NoTls, options),
        };
        let limit = Some(Duration::from_secs(4));
        let pool = Pool::builder(manager)
            .max_size(1)
            .runtime(Runtime::Tokio1)
            .wait_timeout(limit)
            .create_timeout(limit)
            .build()
            // It only fails without a runtime for its time limits.
            .unwrap_or_else(|_| unreachable!("a runtime is given"));
        Self { name: name.to_owned(), pool, limits, interval }
    }

    /// The check that says whether a cluster is there at all.
    pub fn reachable(name: &str) -> CheckId {
        CheckId::shared(&format!("cluster {name}"), "reachable")
    }

    fn id(&self, aspect: &str) -> CheckId {
        CheckId::shared(&format!("cluster {}", self.name), aspect)
    }

    fn observe(&self, row: &Row, unarchived: Option<f64>, now: Timestamp) -> Vec<Observation> {
        let limits = &self.limits;
        let number = |name: &str| row.try_get::<_, Option<f64>>(name).ok().flatten();
        let text = |name: &str| row.try_get::<_, Option<String>>(name).ok().flatten().unwrap_or_default();
        let mut found = Vec::new();
        let mut add = |aspect: &str, topic, status, text: String, evidence: Evidence| {
            found.push(Observation::pass(self.id(aspect), topic, now, text).with(status).figure(evidence));
        };
        let used = 100.0 * number("connections").unwrap_or(0.0) / number("max_connections").unwrap_or(1.0).max(1.0);
        add(
            "connections",
            Topic::Capacity,
            graded(used, limits.connections.0, limits.connections.1),
            format!("{used:.0} % of the server's connections are used"),
            Evidence::new("connections_used", used, "%").limited(limits.connections.1),
        );
        let age = number("transaction_age").unwrap_or(0.0);
        let whose = text("transaction_of");
        add(
            "transactions",
            Topic::Capacity,
            graded(age, limits.transaction.0, limits.transaction.1),
            if age > 0.0 {
                format!(
                    "the oldest transaction is {} old, in {whose}: nothing newer than it can be vacuumed",
                    seconds(age)
                )
            } else {
                "no transaction is open".to_owned()
            },
            Evidence::new("oldest_transaction", age, "s").limited(limits.transaction.1),
        );
        let waited = number("lock_wait").unwrap_or(0.0);
        add(
            "locks",
            Topic::Capacity,
            graded(waited, limits.lock.0, limits.lock.1),
            if waited > 0.0 {
                format!("somebody in {} has waited {} for a lock", text("lock_of"), seconds(waited))
            } else {
                "nobody waits for a lock".to_owned()
            },
            Evidence::new("longest_lock_wait", waited, "s").limited(limits.lock.1),
        );
        let wrapped = number("wraparound").unwrap_or(0.0);
        add(
            "wraparound",
            Topic::Capacity,
            graded(wrapped, limits.wraparound.0, limits.wraparound.1),
            format!("{wrapped:.0} % of the transaction numbers are used, most in {}", text("wraparound_of")),
            Evidence::new("transaction_numbers", wrapped, "%").limited(limits.wraparound.1),
        );
        let lag = number("lag");
        let replicas = number("replicas").unwrap_or(0.0);
        let gone = number("is_replica") != Some(1.0) && replicas < f64::from(limits.replicas);
        add(
            "replication",
            Topic::Availability,
            if gone { Status::Fail } else { lag.map_or(Status::Pass, |lag| graded(lag, limits.lag.0, limits.lag.1)) },
            match lag {
                _ if gone => format!("{replicas:.0} replicas follow, and there should be {}", limits.replicas),
                Some(lag) if number("is_replica") == Some(1.0) => {
                    format!("this replica is {} behind, and the primary has gone on", seconds(lag))
                }
                Some(lag) => {
                    format!("of {replicas:.0} replicas the last, {}, is {} behind", text("lag_of"), seconds(lag))
                }
                None => "there is no replica".to_owned(),
            },
            Evidence::new("replay_lag", lag.unwrap_or(0.0), "s").limited(limits.lag.1),
        );
        let kept = number("slot_bytes").unwrap_or(0.0);
        add(
            "slots",
            Topic::Capacity,
            graded(kept, limits.slot.0, limits.slot.1),
            if kept > 0.0 {
                format!("replication slot {} keeps {} of log", text("slot_of"), bytes(kept))
            } else {
                "no replication slot keeps log".to_owned()
            },
            Evidence::new("slot_keeps", kept, "B").limited(limits.slot.1),
        );
        // A program that fails is counted; one that hangs is not, and segments wait.
        let hanging = unarchived.filter(|age| *age >= limits.archive.0);
        let failing = number("archive_failing").or(hanging);
        add(
            "archive",
            Topic::RecoveryPoint,
            failing.map_or(Status::Pass, |age| graded(age, limits.archive.0, limits.archive.1).max(Status::Warn)),
            match failing {
                Some(age) if number("archive_failing").is_none() => {
                    format!("a segment of the log has waited {} to be archived: `archive_command` hangs", seconds(age))
                }
                Some(age) => {
                    format!("the log cannot be archived since {}: {} failed last", seconds(age), text("archive_failed"))
                }
                None if number("archives") == Some(1.0) => "the log is archived".to_owned(),
                None => "the log is not archived, and need not be".to_owned(),
            },
            Evidence::new("archive_failing_for", failing.unwrap_or(0.0), "s").limited(limits.archive.1),
        );
        found
    }
}

/// Sooner than a look ends, so that a connection that hangs is given up and not handed back.
const ANSWER: Duration = Duration::from_secs(4);

const ASPECTS: [&str; 8] =
    ["reachable", "connections", "transactions", "locks", "wraparound", "replication", "slots", "archive"];

/// For how long the oldest segment that waits to be archived has waited.
const UNARCHIVED: &str = "SELECT extract(epoch FROM clock_timestamp() - min(modification))::float8 \
                          FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'";

/// Everything in one statement. PostgreSQL 13 does not know since when somebody waits. Whoever takes the log without replaying it,
/// as `pg_receivewal` and logical subscribers do, is no replica. A replica says how far it is behind itself, unless it has
/// everything that was sent: for how long nothing was replayed, and if nothing ever was, since when it runs.
const QUERY: &str = "
WITH activity AS (
  SELECT * FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'
), oldest AS (
  SELECT datname, extract(epoch FROM clock_timestamp() - xact_start)::float8 AS age FROM activity
  WHERE xact_start IS NOT NULL ORDER BY xact_start LIMIT 1
), waiting AS (
  SELECT a.datname, extract(epoch FROM clock_timestamp()
    - coalesce((to_jsonb(l)->>'waitstart')::timestamptz, a.state_change))::float8 AS age
  FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted ORDER BY 2 DESC LIMIT 1
), wrapped AS (
  SELECT datname, 100.0 * greatest(age(datfrozenxid), mxid_age(datminmxid)) / 2000000000 AS used FROM pg_database
  ORDER BY 2 DESC LIMIT 1
), behind AS (
  SELECT coalesce(nullif(application_name, ''), client_addr::text) AS name,
    extract(epoch FROM replay_lag)::float8 AS lag FROM pg_stat_replication WHERE replay_lsn IS NOT NULL
    AND NOT EXISTS (SELECT FROM pg_replication_slots s WHERE s.active_pid = pg_stat_replication.pid AND s.slot_type = 'logical')
  ORDER BY replay_lag DESC NULLS LAST LIMIT 1
), slot AS (
  SELECT slot_name, pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
    ELSE pg_current_wal_lsn() END, restart_lsn)::float8 AS kept
  FROM pg_replication_slots WHERE restart_lsn IS NOT NULL ORDER BY 2 DESC LIMIT 1
), archiver AS (
  SELECT last_failed_wal, CASE WHEN last_failed_time > coalesce(last_archived_time, '-infinity')
    THEN extract(epoch FROM clock_timestamp() - coalesce(last_archived_time, stats_reset, last_failed_time))::float8 END AS failing
  FROM pg_stat_archiver
)
SELECT (SELECT count(*)::float8 FROM activity) AS connections,
  (current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int)::float8 AS max_connections,
  (SELECT age FROM oldest) AS transaction_age, (SELECT datname::text FROM oldest) AS transaction_of,
  (SELECT age FROM waiting) AS lock_wait, (SELECT datname::text FROM waiting) AS lock_of,
  (SELECT used::float8 FROM wrapped) AS wraparound, (SELECT datname::text FROM wrapped) AS wraparound_of,
  CASE WHEN pg_is_in_recovery() THEN CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()
      AND EXISTS (SELECT FROM pg_stat_wal_receiver) THEN 0
    ELSE extract(epoch FROM clock_timestamp()
      - coalesce(pg_last_xact_replay_timestamp(), pg_postmaster_start_time()))::float8 END
  ELSE CASE WHEN EXISTS (SELECT FROM behind) THEN coalesce((SELECT lag FROM behind), 0) END END AS lag,
  (SELECT name FROM behind) AS lag_of,
  (SELECT count(*)::float8 FROM pg_stat_replication r WHERE state = 'streaming' AND replay_lsn IS NOT NULL
    AND NOT EXISTS (SELECT FROM pg_replication_slots s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')) AS replicas,
  CASE WHEN pg_is_in_recovery() THEN 1.0 ELSE 0.0 END::float8 AS is_replica,
  (SELECT kept FROM slot) AS slot_bytes, (SELECT slot_name::text FROM slot) AS slot_of,
  (SELECT failing FROM archiver) AS archive_failing, (SELECT last_failed_wal FROM archiver) AS archive_failed,
  CASE WHEN current_setting('archive_mode') = 'off' THEN 0.0 ELSE 1.0 END::float8 AS archives
";

#[async_trait]
impl Probe for ClusterProbe {
    fn name(&self) -> String {
        format!("cluster {}", self.name)
    }

    fn kind(&self) -> &'static str {
        "cluster"
    }

    fn checks(&self) -> Vec<CheckId> {
        ASPECTS.iter().map(|aspect| self.id(aspect)).collect()
    }

    fn reachability(&self) -> CheckId {
        self.id("reachable")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(10)
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let started = Instant::now();
        let row = match self.pool.get().await {
            Ok(client) => {
                let ask = async {
                    let row = client.query_one(QUERY, &[]).await?;
                    // Whoever may not look there knows less, and that is all.
                    let unarchived = client.query_opt(UNARCHIVED, &[]).await.ok().flatten();
                    Ok::<_, tokio_postgres::Error>((row, unarchived.and_then(|row| row.try_get(0).ok().flatten())))
                };
                let row = tokio::time::timeout(ANSWER, ask).await;
                let row = row.map_or_else(
                    |_| Err(format!("no answer within {} s", ANSWER.as_secs())),
                    |row| row.map_err(|e| reason(&e)),
                );
                if row.is_err() {
                    // A connection that has failed once, or that nothing comes from, is not kept.
                    drop(deadpool_postgres::Object::take(client));
                }
                row
            }
            Err(deadpool_postgres::PoolError::Backend(error)) => Err(reason(&error)),
            Err(error) => Err(error.to_string()),
        };
        let answered = |status, text: String| {
            Observation::pass(self.reachability(), Topic::Availability, now, text)
                .with(status)
                .took(started.elapsed())
                .figure(Evidence::new("answered_in", started.elapsed().as_secs_f64(), "s"))
        };
        match row {
            Ok((row, unarchived)) => {
                let mut found = self.observe(&row, unarchived, now);
                found.push(answered(
                    Status::Pass,
                    format!("it answers in {}", seconds(started.elapsed().as_secs_f64())),
                ));
                found
            }
            Err(reason) => vec![answered(Status::Fail, format!("it does not answer: {reason}"))],
        }
    }
}
