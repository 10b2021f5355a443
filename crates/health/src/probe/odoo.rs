//! A tenant's own database, and what Odoo says in it of its work.
//!
//! (`reference`: Health, "Probe the tenant's own database"; Health and upgrades, the tables.)

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cofferdam_rows::{self as rows, Read};
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error};

use super::postgres::{Database, LookError, reason};
use super::{Probe, graded, seconds};
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Beyond what a tenant is in trouble: first a warning, then a failure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TenantLimits {
    /// The database answers a query of Odoo's own tables in so many seconds.
    pub latency: (f64, f64),
    /// A scheduled job is late by so many seconds.
    pub cron: (f64, f64),
    /// A mail has waited for so many seconds.
    pub mail: (f64, f64),
    /// A job of `queue_job` has waited for so many seconds.
    pub queue: (f64, f64),
    /// So many mails, or jobs of `queue_job`, have failed within a day.
    pub failed: (f64, f64),
    /// A job of `queue_job` has been running for so many seconds: perhaps nobody works on it any more. A warning.
    pub running: f64,
}

impl Default for TenantLimits {
    fn default() -> Self {
        Self {
            latency: (0.5, 2.0),
            cron: (900.0, 3_600.0),
            mail: (1_800.0, 14_400.0),
            queue: (900.0, 3_600.0),
            failed: (20.0, 200.0),
            running: 6.0 * 3_600.0,
        }
    }
}

/// Looks into a tenant's database.
///
/// What a tenant has put into the indexes and statistics of its tables is evaluated whenever a query of them is planned. So
/// nothing is: tables are read with `COPY`, which costs as much as they are large. A table whose reading has taken long is
/// read again after fifty times as long, and what was seen stands until then.
#[derive(Debug, Clone)]
pub struct TenantProbe {
    tenant: String,
    database: Database,
    limits: TenantLimits,
    interval: Duration,
    /// What took long to see, by aspect.
    kept: Arc<Mutex<HashMap<&'static str, Kept>>>,
}

#[derive(Debug, Clone)]
struct Kept {
    at: Instant,
    took: Duration,
    seen: Observation,
}

const ASPECTS: [&str; 7] = ["database", "database latency", "cron", "mail", "queue", "modules", "bloat"];
const TABLES: [&str; 5] = ["ir_module_module", "ir_cron", "ir_cron_trigger", "mail_mail", "queue_job"];

/// Reading that takes no longer than this is done each time.
const QUICKLY: Duration = Duration::from_millis(200);
/// Otherwise reading takes no more of the time than a part of so many.
const PART: u32 = 50;
/// Bytes of a table that is read at all.
const LARGEST: i64 = 2 << 30;
/// Characters of a name that are told.
const NAME: usize = 100;

/// A tenant's tables, from the catalog, and when it was asked.
struct Tables {
    columns: HashSet<(String, String)>,
    bytes: HashMap<String, i64>,
    /// The server's clock.
    now: Timestamp,
}

impl Tables {
    fn has(&self, table: &str, column: &str) -> bool {
        self.columns.contains(&(table.to_owned(), column.to_owned()))
    }

    fn is_there(&self, table: &str) -> bool {
        self.bytes.contains_key(table)
    }

    /// The first of some columns that is there.
    fn one_of(&self, table: &str, columns: &[&'static str]) -> Option<&'static str> {
        columns.iter().copied().find(|column| self.has(table, column))
    }

    /// For how many seconds something is past; before nought it is yet to come.
    fn since(&self, time: Option<&str>) -> Option<f64> {
        Some(self.now.duration_since(utc(time?)?).as_secs_f64())
    }
}

/// Odoo's times are UTC, without a zone. What is no time, such as `infinity`, is none.
fn utc(text: &str) -> Option<Timestamp> {
    Some(text.parse::<DateTime>().ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp())
}

/// What came of reading a part.
enum Part {
    Seen(Observation),
    /// It cannot be looked at, and why.
    Odd(String),
}

const DAY: f64 = 86_400.0;

impl TenantProbe {
    /// A probe of a tenant's database. Connects when it looks.
    pub fn new(tenant: &str, database: Database, limits: TenantLimits, interval: Duration) -> Self {
        Self { tenant: tenant.to_owned(), database, limits, interval, kept: Arc::default() }
    }

    fn id(&self, aspect: &str) -> CheckId {
        CheckId::tenant(&self.tenant, aspect)
    }

    fn seen(&self, aspect: &str, topic: Topic, now: Timestamp, text: impl Into<String>) -> Observation {
        Observation::pass(self.id(aspect), topic, now, text)
    }

    /// Nothing of a tenant's is run as whoever looks; and if it were after all, it would be nobody.
    async fn refuse_too_much(&self, client: &Client) -> Result<Option<String>, Error> {
        let query = "SELECT rolname::text FROM pg_roles r WHERE r.rolname = current_user AND (\
                         r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls \
                         OR EXISTS (SELECT FROM pg_roles p WHERE p.oid <> r.oid AND pg_has_role(r.oid, p.oid, 'MEMBER') \
                              AND (p.rolname LIKE 'pg\\_%' OR p.rolsuper OR p.rolcreaterole OR p.rolcreatedb OR p.rolreplication \
                                OR p.rolbypassrls OR EXISTS (SELECT FROM pg_database d WHERE d.datdba = p.oid))) \
                         OR has_table_privilege('pg_catalog.pg_authid', 'SELECT'))";
        let role: Option<String> = client.query_typed(query, &[]).await?.first().map(|row| row.get(0));
        Ok(role.map(|role| {
            format!(
                "not looked at: as {role}, who may do or see more than a tenant; expected `tenant_user`, a role with CONNECT, \
                 with SELECT on the tables that are looked at, and nothing else, not pg_read_all_data either"
            )
        }))
    }

    async fn read(&self, client: &Client, now: Timestamp) -> Result<Vec<Observation>, Error> {
        let there = Self::tables(client, now).await?;
        let started = Instant::now();
        let mut found = Vec::new();
        if !there.is_there("ir_module_module") {
            let text = "the database is there, but not Odoo's tables: it is empty, or another's";
            found.push(self.seen("database", Topic::Availability, now, text).with(Status::Fail));
            return Ok(found);
        }
        let modules = match self.modules(client, now).await? {
            Part::Seen(modules) => modules,
            Part::Odd(reason) => {
                let text = format!("Odoo's tables are there and cannot be read: {reason}");
                found.push(self.seen("database", Topic::Availability, now, text).with(Status::Fail));
                return Ok(found);
            }
        };
        found.push(modules);
        let latency = started.elapsed().as_secs_f64();
        let (warn, fail) = self.limits.latency;
        let text = format!("it answers in {}", seconds(latency));
        found.push(self.seen("database", Topic::Availability, now, text.clone()));
        let expected = format!("{text}, {} is expected", seconds(warn));
        found.push(
            self.seen("database latency", Topic::Latency, now, expected)
                .with(graded(latency, warn, fail))
                .figure(Evidence::new("answered_in", latency, "s").warned(warn).limited(fail)),
        );
        // What is wrong with one table is no reason to say nothing of the others.
        let absent = |aspect: &str, text: &str| self.seen(aspect, Topic::Backlog, now, text);
        found.push(if there.is_there("ir_cron") {
            self.part(client, "cron", "ir_cron", &there, now, self.cron(client, now, &there)).await?
        } else {
            absent("cron", "the table of scheduled jobs is missing: no job runs").with(Status::Fail)
        });
        found.push(if there.is_there("mail_mail") {
            self.part(client, "mail", "mail_mail", &there, now, self.mail(client, now, &there)).await?
        } else {
            absent("mail", "the module is not installed")
        });
        found.push(if there.is_there("queue_job") {
            self.part(client, "queue", "queue_job", &there, now, self.queue(client, now, &there)).await?
        } else {
            absent("queue", "the module is not installed")
        });
        found.push(self.apart(client, "bloat", Topic::Capacity, now, self.bloat(client, now)).await?);
        Ok(found)
    }

    /// Which tables there are, which columns of PostgreSQL's own plain types they have, and how large they were when they were
    /// last vacuumed. Nothing of the tenant's is read for that, and no table is waited for.
    async fn tables(client: &Client, now: Timestamp) -> Result<Tables, Error> {
        let query = "SELECT c.relname::text, greatest(c.relpages, 0)::int8 * current_setting('block_size')::int8, \
                       coalesce((SELECT array_agg(a.attname::text) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 \
                         AND NOT a.attisdropped AND a.attgenerated = '' AND a.atttypid IN (16, 20, 21, 23, 25, 1043, 1114, 1184)), '{}'), \
                       extract(epoch FROM clock_timestamp())::float8 \
                     FROM pg_class c WHERE c.relnamespace = to_regnamespace('public') AND c.relname = ANY($1)";
        let mut tables = Tables { columns: HashSet::new(), bytes: HashMap::new(), now };
        for row in client.query_typed(query, &[(&TABLES.as_slice(), Type::TEXT_ARRAY)]).await? {
            let (table, bytes): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
            for column in row.try_get::<_, Vec<String>>(2)? {
                tables.columns.insert((table.clone(), column));
            }
            tables.bytes.insert(table, bytes);
            let clock = SignedDuration::try_from_secs_f64(row.try_get(3)?).unwrap_or_default();
            tables.now = Timestamp::from_duration(clock).unwrap_or(now);
        }
        Ok(tables)
    }

    /// Reads a table's part, if that is due.
    async fn part(
        &self,
        client: &Client,
        aspect: &'static str,
        table: &str,
        there: &Tables,
        now: Timestamp,
        work: impl Future<Output = Result<Part, Error>>,
    ) -> Result<Observation, Error> {
        if let Some(kept) = self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(aspect)
            && kept.took > QUICKLY
            && kept.at.elapsed() < kept.took * PART
        {
            let ago = seconds(kept.at.elapsed().as_secs_f64());
            let text = format!("{} (seen {ago} ago: reading the table takes long)", kept.seen.text);
            return Ok(Observation { at: now, text, ..kept.seen.clone() });
        }
        if there.bytes.get(table).is_some_and(|bytes| *bytes > LARGEST) {
            let text = format!("{table} is too large to be read: more than {} GiB", LARGEST >> 30);
            return Ok(self.seen(aspect, Topic::Backlog, now, text).with(Status::Unknown));
        }
        let at = Instant::now();
        let seen = async {
            Ok(match work.await? {
                Part::Seen(seen) => seen,
                Part::Odd(reason) => {
                    let text = format!("{table} cannot be looked at: {reason}");
                    self.seen(aspect, Topic::Backlog, now, text).with(Status::Unknown)
                }
            })
        };
        let seen = self.apart(client, aspect, Topic::Backlog, now, seen).await?;
        let kept = Kept { at, took: at.elapsed(), seen: seen.clone() };
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(aspect, kept);
        Ok(seen)
    }

    /// A part of a look whose failure is its own.
    async fn apart(
        &self,
        client: &Client,
        aspect: &str,
        topic: Topic,
        now: Timestamp,
        work: impl Future<Output = Result<Observation, Error>>,
    ) -> Result<Observation, Error> {
        client.batch_execute("SAVEPOINT one").await?;
        match work.await {
            Ok(observation) => {
                client.batch_execute("RELEASE one").await?;
                Ok(observation)
            }
            Err(error) => {
                if client.is_closed() {
                    return Err(error);
                }
                client.batch_execute("ROLLBACK TO one").await?;
                let text = format!("it cannot be looked at: {}", reason(&error));
                Ok(self.seen(aspect, topic, now, text).with(Status::Unknown))
            }
        }
    }

    /// Tables of which more is dead than alive: a hint, from what the server has counted.
    async fn bloat(&self, client: &Client, now: Timestamp) -> Result<Observation, Error> {
        let query = "SELECT relname::text, n_dead_tup::float8, n_live_tup::float8, \
                       extract(epoch FROM clock_timestamp() - greatest(last_vacuum, last_autovacuum))::float8 \
                     FROM pg_stat_user_tables WHERE n_dead_tup > 100000 ORDER BY n_dead_tup DESC LIMIT 1";
        let rows = client.query_typed(query, &[]).await?;
        let Some(row) = rows.first() else {
            let text = "no table has many dead rows";
            return Ok(self.seen("bloat", Topic::Capacity, now, text));
        };
        let (table, dead, alive): (String, f64, f64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let vacuumed = row.try_get::<_, Option<f64>>(3)?;
        let vacuumed = vacuumed.map_or_else(|| "never".to_owned(), |age| format!("{} ago", seconds(age)));
        let share = 100.0 * dead / (dead + alive).max(1.0);
        let text = format!("{share:.0} % of the rows of {table} are dead ({dead:.0}); it was vacuumed {vacuumed}");
        Ok(self
            .seen("bloat", Topic::Capacity, now, text)
            .with(graded(share, 50.0, f64::INFINITY))
            .figure(Evidence::new("dead_rows", share, "%").warned(50.0)))
    }

    /// Modules that wait to be installed, upgraded or removed stop every scheduled job.
    async fn modules(&self, client: &Client, now: Timestamp) -> Result<Part, Error> {
        let (mut waiting, mut installed, mut names) = (0_u64, 0_u64, Vec::new());
        let read = rows::each(client, "public.ir_module_module", &["name", "state"], |row| {
            let [name, Some(state)] = row else { return };
            if state == "installed" {
                installed += 1;
            } else if state.starts_with("to ") {
                waiting += 1;
                names.push(short(name.as_deref().unwrap_or_default()));
                names.sort();
                names.truncate(3);
            }
        });
        if let Some(odd) = odd(&read.await?) {
            return Ok(odd);
        }
        let text = if waiting > 0 {
            let names = names.join(", ");
            let modules = if waiting > 1 { format!("{waiting} modules wait") } else { "a module waits".to_owned() };
            format!("{modules} to be changed ({names}): until then no scheduled job runs")
        } else {
            format!("{installed} modules are installed, and none waits")
        };
        let status = if waiting > 0 { Status::Fail } else { Status::Pass };
        let seen = self.seen("modules", Topic::Availability, now, text).with(status);
        Ok(Part::Seen(seen.figure(Evidence::new("modules_waiting", waiting as f64, "").limited(0.0))))
    }

    async fn cron(&self, client: &Client, now: Timestamp, there: &Tables) -> Result<Part, Error> {
        let name = there.one_of("ir_cron", &["cron_name", "name"]);
        let counts_failures = there.has("ir_cron", "failure_count") && there.has("ir_cron", "first_failure_date");
        let mut columns = vec!["id", "active", "nextcall"];
        if counts_failures {
            columns.extend(["failure_count", "first_failure_date"]);
        }
        columns.extend(name);
        let named = |row: &[Option<Cow<'_, str>>]| match (name, row.last()) {
            (Some(_), Some(Some(name))) => short(name),
            _ => format!("job {}", short(row[0].as_deref().unwrap_or("?"))),
        };
        let mut late: Option<(f64, String)> = None;
        let mut failing: Option<(f64, Option<f64>, String)> = None;
        let read = rows::each(client, "public.ir_cron", &columns, |row| {
            if row[1].as_deref() != Some("t") {
                return;
            }
            if let Some(by) =
                there.since(row[2].as_deref()).filter(|by| late.as_ref().is_none_or(|(most, _)| by > most))
            {
                late = Some((by, named(row)));
            }
            let failures = if counts_failures { row[3].as_deref().and_then(|n| n.parse().ok()) } else { None };
            if let Some(failures) = failures.filter(|n| *n > 0.0)
                && failing.as_ref().is_none_or(|(most, ..)| failures > *most)
            {
                failing = Some((failures, there.since(row[4].as_deref()), named(row)));
            }
        });
        if let Some(odd) = odd(&read.await?) {
            return Ok(odd);
        }
        let mut due = 0_u64;
        if there.has("ir_cron_trigger", "call_at") && there.bytes.get("ir_cron_trigger").is_some_and(|b| *b <= LARGEST)
        {
            let triggers = rows::each(client, "public.ir_cron_trigger", &["call_at"], |row| {
                due += u64::from(there.since(row[0].as_deref()).is_some_and(|by| by >= 0.0));
            });
            triggers.await?;
        }
        let (late, job) = late.map_or((0.0, String::new()), |(by, job)| (by.max(0.0), job));
        let (warn, fail) = self.limits.cron;
        let mut status = graded(late, warn, fail);
        let mut in_a_row = 0.0;
        let mut text = if late >= warn {
            format!("job `{job}` should have run {} ago: nobody runs jobs, or it runs for as long", seconds(late))
        } else {
            "scheduled jobs run in time".to_owned()
        };
        if let Some((failures, since, job)) = failing {
            in_a_row = failures;
            let since = since.map_or_else(String::new, |s| format!(" for {}", seconds(s)));
            text = format!("job `{job}` has failed {failures:.0} times in a row{since}; {text}");
            // From five failures over a week Odoo switches the job off.
            status = status.max(Status::Warn);
        }
        let seen = self
            .seen("cron", Topic::Backlog, now, text)
            .with(status)
            .figure(Evidence::new("latest_job_late_by", late, "s").warned(warn).limited(fail))
            // No business event makes a job fail.
            .figure(Evidence::new("failures_in_a_row", in_a_row, "").warned(f64::EPSILON))
            .figure(Evidence::new("triggers_due", due as f64, ""));
        Ok(Part::Seen(seen))
    }

    async fn mail(&self, client: &Client, now: Timestamp, there: &Tables) -> Result<Part, Error> {
        let mut columns = vec!["state", "create_date"];
        // Up to Odoo 15 the column is a text.
        columns.extend(there.one_of("mail_mail", &["scheduled_date"]));
        let (mut waiting, mut failed, mut age) = (0_u64, 0_u64, 0.0_f64);
        let read = rows::each(client, "public.mail_mail", &columns, |row| {
            // Most rows are done with, and their times nobody's business.
            let created = || there.since(row[1].as_deref());
            match row[0].as_deref() {
                Some("outgoing") => {
                    // A mail for later does not wait.
                    let scheduled = row.get(2).and_then(|time| there.since(time.as_deref()));
                    if scheduled.is_none_or(|by| by >= 0.0) {
                        waiting += 1;
                        age = age.max(created().unwrap_or(0.0).min(scheduled.unwrap_or(f64::INFINITY)));
                    }
                }
                Some("exception") => failed += u64::from(created().is_some_and(|age| age < DAY)),
                _ => {}
            }
        });
        if let Some(odd) = odd(&read.await?) {
            return Ok(odd);
        }
        let (warn, fail) = self.limits.mail;
        let text = if waiting > 0 {
            let mails = if waiting > 1 { format!("{waiting} mails wait") } else { "a mail waits".to_owned() };
            format!("{mails}, the first for {}; {failed} have failed in a day", seconds(age))
        } else {
            format!("no mail waits; {failed} have failed in a day")
        };
        let failures = graded(failed as f64, self.limits.failed.0, self.limits.failed.1);
        let seen = self
            .seen("mail", Topic::Backlog, now, text)
            .with(graded(age, warn, fail).max(failures))
            .figure(Evidence::new("mails_waiting", waiting as f64, ""))
            .figure(Evidence::new("first_mail_waits", age, "s").warned(warn).limited(fail))
            .figure(
                Evidence::new("mails_failed", failed as f64, "")
                    .warned(self.limits.failed.0)
                    .limited(self.limits.failed.1),
            );
        Ok(Part::Seen(seen))
    }

    async fn queue(&self, client: &Client, now: Timestamp, there: &Tables) -> Result<Part, Error> {
        let mut columns = vec!["state", "date_created"];
        let optional = ["eta", "date_started"].map(|column| there.one_of("queue_job", &[column]));
        columns.extend(optional.iter().flatten());
        let (eta, started) = (optional[0].map(|_| 2), optional[1].map(|_| columns.len() - 1));
        let (mut waiting, mut failed, mut running) = (0_u64, 0_u64, 0_u64);
        let (mut failed_lately, mut age, mut longest) = (0_u64, 0.0_f64, 0.0_f64);
        let read = rows::each(client, "public.queue_job", &columns, |row| {
            let at = |column: Option<usize>| column.and_then(|column| there.since(row[column].as_deref()));
            let created = || at(Some(1));
            match row[0].as_deref() {
                Some(state @ ("pending" | "enqueued")) => {
                    // A job for later does not wait.
                    let eta = at(eta);
                    if state == "enqueued" || eta.is_none_or(|by| by >= 0.0) {
                        waiting += 1;
                        age =
                            age.max(created().unwrap_or(0.0).min(eta.filter(|by| *by >= 0.0).unwrap_or(f64::INFINITY)));
                    }
                }
                Some("started") => {
                    running += 1;
                    longest = longest.max(at(started).unwrap_or(0.0));
                }
                Some("failed") => {
                    failed += 1;
                    failed_lately += u64::from(created().is_some_and(|age| age < DAY));
                }
                _ => {}
            }
        });
        if let Some(odd) = odd(&read.await?) {
            return Ok(odd);
        }
        let (warn, fail) = self.limits.queue;
        let mut text = if waiting > 0 {
            let waited = seconds(age);
            format!("{waiting} jobs wait, the first for {waited}; {running} run, {failed} have failed")
        } else {
            format!("no job waits; {running} run, {failed} have failed")
        };
        let mut status =
            graded(age, warn, fail).max(graded(failed_lately as f64, self.limits.failed.0, self.limits.failed.1));
        if longest >= self.limits.running {
            text =
                format!("a job has been running for {}: perhaps nobody works on it any more; {text}", seconds(longest));
            status = status.max(Status::Warn);
        }
        let seen = self
            .seen("queue", Topic::Backlog, now, text)
            .with(status)
            .figure(Evidence::new("jobs_waiting", waiting as f64, ""))
            .figure(Evidence::new("first_job_waits", age, "s").warned(warn).limited(fail))
            .figure(Evidence::new("jobs_failed", failed as f64, ""))
            .figure(
                Evidence::new("jobs_failed_lately", failed_lately as f64, "")
                    .warned(self.limits.failed.0)
                    .limited(self.limits.failed.1),
            )
            .figure(Evidence::new("longest_job_runs", longest, "s").warned(self.limits.running));
        Ok(Part::Seen(seen))
    }
}

/// Why a table was not read.
fn odd(read: &Read<()>) -> Option<Part> {
    let reason = match read {
        Read::Rows(()) => return None,
        Read::Nothing => "it has gone meanwhile",
        Read::Odd => "it is no ordinary table with the columns of Odoo's",
    };
    Some(Part::Odd(reason.to_owned()))
}

fn short(name: &str) -> String {
    name.chars().take(NAME).collect()
}

#[async_trait]
impl Probe for TenantProbe {
    fn name(&self) -> String {
        format!("database of {}", self.tenant)
    }

    fn kind(&self) -> &'static str {
        "database"
    }

    fn checks(&self) -> Vec<CheckId> {
        ASPECTS.iter().map(|aspect| self.id(aspect)).collect()
    }

    fn reachability(&self) -> CheckId {
        self.id("database")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let failed = |reason: String| {
            let text = format!("database {} does not answer: {reason}", self.database.database);
            vec![self.seen("database", Topic::Availability, now, text).with(Status::Fail)]
        };
        let look = match self.database.connect().await {
            Ok(look) => look,
            Err(error) => return failed(error.reason()),
        };
        let read = async {
            let client = &look.client;
            if let Some(text) = self.refuse_too_much(client).await? {
                return Ok(vec![self.seen("database", Topic::Security, now, text).with(Status::Fail)]);
            }
            // One snapshot for everything.
            client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
            self.read(client, now).await
        };
        match read.await {
            Ok(found) => found,
            Err(error) => failed(look.reason(&error).await),
        }
    }
}

/// Asks a tenant's database something through the gateway, the way that Odoo goes.
#[derive(Debug, Clone)]
pub struct ThroughProbe {
    /// Whose.
    pub tenant: String,
    /// Its database, at the gateway.
    pub database: Database,
    /// It answers in so many seconds: a warning.
    pub latency: f64,
    /// How often to look.
    pub interval: Duration,
}

#[async_trait]
impl Probe for ThroughProbe {
    fn name(&self) -> String {
        format!("database of {} through the gateway", self.tenant)
    }

    fn kind(&self) -> &'static str {
        "through the gateway"
    }

    fn checks(&self) -> Vec<CheckId> {
        vec![self.reachability()]
    }

    fn reachability(&self) -> CheckId {
        CheckId::tenant(&self.tenant, "database through the gateway")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let started = Instant::now();
        let ask = async {
            let look = self.database.connect().await?;
            // Nothing of the tenant's own: that is asked beside the gateway.
            Ok::<_, LookError>(look.client.query_one("SELECT count(*) FROM pg_catalog.pg_namespace", &[]).await?)
        };
        let answer = ask.await;
        let took = started.elapsed().as_secs_f64();
        let (status, text) = match answer {
            // Slow is not gone.
            Ok(_) => (graded(took, self.latency, f64::INFINITY), format!("it answers in {}", seconds(took))),
            Err(error) => (Status::Fail, format!("it does not answer: {}", error.reason())),
        };
        vec![
            Observation::pass(self.reachability(), Topic::Availability, now, text)
                .with(status)
                .figure(Evidence::new("answered_in", took, "s").warned(self.latency)),
        ]
    }
}
