//! A tenant's own database, and what Odoo says in it of its work.
//!
//! (`reference`: Health, "Probe the tenant's own database"; Health and upgrades, the tables.)

use std::collections::HashMap;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio_postgres::Client;

use super::postgres::{Database, reason};
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
}

impl Default for TenantLimits {
    fn default() -> Self {
        Self { latency: (0.5, 2.0), cron: (900.0, 3_600.0), mail: (1_800.0, 14_400.0), queue: (900.0, 3_600.0) }
    }
}

/// Looks into a tenant's database.
#[derive(Debug, Clone)]
pub struct TenantProbe {
    /// Whose.
    pub tenant: String,
    /// Its database.
    pub database: Database,
    /// Beyond what it is in trouble.
    pub limits: TenantLimits,
    /// How often to look.
    pub interval: Duration,
}

const ASPECTS: [&str; 7] = ["database", "database latency", "cron", "mail", "queue", "modules", "bloat"];
const TABLES: [&str; 5] = ["ir_module_module", "ir_cron", "ir_cron_trigger", "mail_mail", "queue_job"];

/// Columns of a tenant's tables that may be read, with their types.
struct Columns {
    types: HashMap<(String, String), u32>,
    /// Tables that are there and could not be held, and why.
    held_by_others: HashMap<String, String>,
}

impl Columns {
    fn has(&self, table: &str, column: &str) -> bool {
        self.types.contains_key(&(table.to_owned(), column.to_owned()))
    }

    fn is_time(&self, table: &str, column: &str) -> bool {
        self.types.get(&(table.to_owned(), column.to_owned())) == Some(&TIMESTAMP)
    }
}

/// `timestamp without time zone`.
const TIMESTAMP: u32 = 1_114;

impl TenantProbe {
    fn id(&self, aspect: &str) -> CheckId {
        CheckId::tenant(&self.tenant, aspect)
    }

    /// Functions in a tenant's indexes are evaluated when a query of its tables is planned, as whoever asks. So whoever asks
    /// must be nobody: a role that sees and does no more than the tenant itself.
    async fn refuse_too_much(&self, client: &Client) -> Result<Option<String>, tokio_postgres::Error> {
        let query = "SELECT rolname::text FROM pg_roles r WHERE r.rolname = current_user AND (\
                         r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls \
                         OR EXISTS (SELECT FROM pg_roles p WHERE p.rolname LIKE 'pg\\_%' AND p.rolname <> 'pg_read_all_data' \
                                    AND pg_has_role(r.oid, p.oid, 'MEMBER')))";
        let role: Option<String> = client.query_opt(query, &[]).await?.map(|row| row.get(0));
        Ok(role.map(|role| {
            format!(
                "not looked at: what a tenant has put into its indexes would run as {role}, who may do or see more than a \
                 tenant; expected `tenant_user`, a role with CONNECT and SELECT and nothing else"
            )
        }))
    }

    async fn read(&self, client: &Client, now: Timestamp) -> Result<Vec<Observation>, tokio_postgres::Error> {
        let there = Self::hold(client).await?;
        let started = Instant::now();
        let mut found = Vec::new();
        if !there.has("ir_module_module", "state") || !there.has("ir_module_module", "name") {
            let text = "the database is there, but not Odoo's tables: it is empty, or another's";
            found.push(Observation::pass(self.id("database"), Topic::Availability, now, text).with(Status::Fail));
            return Ok(found);
        }
        found.push(self.modules(client, now).await?);
        let latency = started.elapsed().as_secs_f64();
        let (warn, fail) = self.limits.latency;
        let text = format!("it answers in {}", seconds(latency));
        found.push(Observation::pass(self.id("database"), Topic::Availability, now, text.clone()));
        found.push(
            Observation::pass(
                self.id("database latency"),
                Topic::Latency,
                now,
                format!("{text}, {} is expected", seconds(warn)),
            )
            .with(graded(latency, warn, fail))
            .figure(Evidence::new("answered_in", latency, "s").limited(fail)),
        );
        // What is wrong with one table is no reason to say nothing of the others.
        let absent = |aspect: &str, table: &str| match there.held_by_others.get(table) {
            Some(reason) => {
                let text = format!("{table} cannot be looked at: {reason}");
                Observation::pass(self.id(aspect), Topic::Backlog, now, text).with(Status::Unknown)
            }
            None => Observation::pass(self.id(aspect), Topic::Backlog, now, "the module is not installed"),
        };
        found.push(
            if there.has("ir_cron", "nextcall") && there.has("ir_cron", "active") && there.has("ir_cron", "id") {
                self.apart(client, "cron", Topic::Backlog, now, self.cron(client, now, &there)).await?
            } else {
                absent("cron", "ir_cron")
            },
        );
        found.push(if there.has("mail_mail", "state") && there.has("mail_mail", "create_date") {
            self.apart(client, "mail", Topic::Backlog, now, self.mail(client, now, &there)).await?
        } else {
            absent("mail", "mail_mail")
        });
        found.push(if there.has("queue_job", "state") && there.has("queue_job", "date_created") {
            self.apart(client, "queue", Topic::Backlog, now, self.queue(client, now, &there)).await?
        } else {
            absent("queue", "queue_job")
        });
        found.push(self.apart(client, "bloat", Topic::Capacity, now, self.bloat(client, now)).await?);
        Ok(found)
    }

    /// Tables of Odoo's own, so that a database that was emptied, or half-restored, does not pass. They are a tenant's to
    /// define: they are held first, so that they stay what they are, and only ordinary tables and columns of PostgreSQL's
    /// own plain types are read, not views, casts and output functions of the tenant's.
    async fn hold(client: &Client) -> Result<Columns, tokio_postgres::Error> {
        let tables = "SELECT relname::text FROM pg_class WHERE relnamespace = to_regnamespace('public') \
                      AND relkind IN ('r', 'p') AND NOT relrowsecurity AND NOT relhassubclass AND relname = ANY($1)";
        let mut held_by_others = HashMap::new();
        for row in client.query(tables, &[&TABLES.as_slice()]).await? {
            if held_by_others.len() > 1 {
                // Each costs a second: the rest can wait for the next look.
                held_by_others.insert(row.try_get(0)?, "others are held for too long".to_owned());
                continue;
            }
            let table: String = row.try_get(0)?;
            let lock = format!("SAVEPOINT one; LOCK TABLE public.{table} IN ACCESS SHARE MODE; RELEASE one");
            if let Err(error) = client.batch_execute(&lock).await {
                // Without this one there is nothing to say; without another there is less.
                if table == TABLES[0] || client.is_closed() {
                    return Err(error);
                }
                client.batch_execute("ROLLBACK TO one").await?;
                held_by_others.insert(table, reason(&error));
            }
        }
        let columns = "SELECT c.relname::text, a.attname::text, a.atttypid FROM pg_class c \
                       JOIN pg_attribute a ON a.attrelid = c.oid \
                       JOIN pg_locks l ON l.relation = c.oid AND l.pid = pg_backend_pid() AND l.mode = 'AccessShareLock' \
                       WHERE c.relnamespace = to_regnamespace('public') AND c.relkind IN ('r', 'p') AND a.attnum > 0 \
                       AND NOT a.attisdropped AND a.atttypid IN (16, 20, 21, 23, 25, 701, 1043, 1114, 1184) \
                       AND c.relname = ANY($1)";
        let rows = client.query(columns, &[&TABLES.as_slice()]).await?;
        let types = rows.iter().map(|row| ((row.get(0), row.get(1)), row.get(2))).collect();
        Ok(Columns { types, held_by_others })
    }

    /// A part of a look whose failure is its own.
    async fn apart(
        &self,
        client: &Client,
        aspect: &str,
        topic: Topic,
        now: Timestamp,
        work: impl Future<Output = Result<Observation, tokio_postgres::Error>>,
    ) -> Result<Observation, tokio_postgres::Error> {
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
                Ok(Observation::pass(self.id(aspect), topic, now, text).with(Status::Unknown))
            }
        }
    }

    /// Tables of which more is dead than alive: a hint, from what the server has counted.
    async fn bloat(&self, client: &Client, now: Timestamp) -> Result<Observation, tokio_postgres::Error> {
        let query = "SELECT relname::text, n_dead_tup::float8, n_live_tup::float8, \
                       extract(epoch FROM clock_timestamp() - greatest(last_vacuum, last_autovacuum))::float8 \
                     FROM pg_stat_user_tables WHERE n_dead_tup > 100000 ORDER BY n_dead_tup DESC LIMIT 1";
        let Some(row) = client.query_opt(query, &[]).await? else {
            let text = "no table has many dead rows";
            return Ok(Observation::pass(self.id("bloat"), Topic::Capacity, now, text));
        };
        let (table, dead, alive): (String, f64, f64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let vacuumed = row.try_get::<_, Option<f64>>(3)?;
        let vacuumed = vacuumed.map_or_else(|| "never".to_owned(), |age| format!("{} ago", seconds(age)));
        let share = 100.0 * dead / (dead + alive).max(1.0);
        let text = format!("{share:.0} % of the rows of {table} are dead ({dead:.0}); it was vacuumed {vacuumed}");
        Ok(Observation::pass(self.id("bloat"), Topic::Capacity, now, text)
            .with(graded(share, 50.0, f64::INFINITY))
            .figure(Evidence::new("dead_rows", share, "%").limited(50.0)))
    }

    /// Modules that wait to be installed, upgraded or removed stop every scheduled job.
    async fn modules(&self, client: &Client, now: Timestamp) -> Result<Observation, tokio_postgres::Error> {
        let query = "SELECT count(*) FILTER (WHERE state::text LIKE 'to %')::float8, \
                     coalesce((array_agg(name::text ORDER BY name) FILTER (WHERE state::text LIKE 'to %'))[1:3], '{}'), \
                     count(*) FILTER (WHERE state::text = 'installed')::float8 FROM public.ir_module_module";
        let row = client.query_one(query, &[]).await?;
        let (waiting, names, installed): (f64, Vec<String>, f64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let observation = Observation::pass(
            self.id("modules"),
            Topic::Availability,
            now,
            if waiting > 0.0 {
                let names = names.join(", ");
                let modules =
                    if waiting > 1.0 { format!("{waiting:.0} modules wait") } else { "a module waits".to_owned() };
                format!("{modules} to be changed ({names}): until then no scheduled job runs")
            } else {
                format!("{installed:.0} modules are installed, and none waits")
            },
        );
        let status = if waiting > 0.0 { Status::Fail } else { Status::Pass };
        Ok(observation.with(status).figure(Evidence::new("modules_waiting", waiting, "").limited(0.0)))
    }

    async fn cron(
        &self,
        client: &Client,
        now: Timestamp,
        there: &Columns,
    ) -> Result<Observation, tokio_postgres::Error> {
        let name = ["cron_name", "name"].into_iter().find(|column| there.has("ir_cron", column));
        let counts_failures = there.has("ir_cron", "failure_count") && there.has("ir_cron", "first_failure_date");
        let has_triggers = there.has("ir_cron_trigger", "call_at");
        let name = name.map_or_else(
            || "'job ' || c.id::text".to_owned(),
            |column| format!("coalesce(c.{column}::text, 'job ' || c.id::text)"),
        );
        let (failures, since) = if counts_failures {
            ("coalesce(c.failure_count, 0)", "c.first_failure_date")
        } else {
            ("0", "NULL::timestamp")
        };
        // Odoo's times are UTC, without a zone.
        let query = format!(
            "SELECT {name}, extract(epoch FROM (clock_timestamp() AT TIME ZONE 'UTC') - c.nextcall)::float8, \
             {failures}::float8, extract(epoch FROM (clock_timestamp() AT TIME ZONE 'UTC') - {since})::float8 \
             FROM public.ir_cron c WHERE c.active ORDER BY 3 DESC, 2 DESC NULLS LAST LIMIT 1"
        );
        let failing = client.query_opt(&query, &[]).await?;
        let late = format!(
            "SELECT {name}, extract(epoch FROM (clock_timestamp() AT TIME ZONE 'UTC') - c.nextcall)::float8, \
             count(*) OVER ()::float8 FROM public.ir_cron c WHERE c.active ORDER BY c.nextcall LIMIT 1"
        );
        let late = client.query_opt(&late, &[]).await?;
        let triggers = if has_triggers {
            let query = "SELECT count(*)::float8 FROM public.ir_cron_trigger \
                         WHERE call_at <= (clock_timestamp() AT TIME ZONE 'UTC')";
            client.query_one(query, &[]).await?.try_get(0)?
        } else {
            0.0
        };
        let (job, late): (String, f64) = match &late {
            Some(row) => (row.try_get(0)?, row.try_get::<_, Option<f64>>(1)?.unwrap_or(0.0).max(0.0)),
            None => (String::new(), 0.0),
        };
        let (warn, fail) = self.limits.cron;
        let mut status = graded(late, warn, fail);
        let mut in_a_row = 0.0;
        let mut text = if late >= warn {
            format!("job `{job}` should have run {} ago: nobody runs jobs, or it runs for as long", seconds(late))
        } else {
            "scheduled jobs run in time".to_owned()
        };
        if let Some(row) = failing {
            let (job, failures): (String, f64) = (row.try_get(0)?, row.try_get(2)?);
            in_a_row = failures;
            if failures > 0.0 {
                let since =
                    row.try_get::<_, Option<f64>>(3)?.map_or_else(String::new, |s| format!(" for {}", seconds(s)));
                text = format!("job `{job}` has failed {failures:.0} times in a row{since}; {text}");
                // From five failures over a week Odoo switches the job off.
                status = status.max(Status::Warn);
            }
        }
        Ok(Observation::pass(self.id("cron"), Topic::Backlog, now, text)
            .with(status)
            .figure(Evidence::new("latest_job_late_by", late, "s").limited(fail))
            // No business event makes a job fail.
            .figure(Evidence::new("failures_in_a_row", in_a_row, "").limited(f64::EPSILON))
            .figure(Evidence::new("triggers_due", triggers, "")))
    }

    async fn mail(
        &self,
        client: &Client,
        now: Timestamp,
        there: &Columns,
    ) -> Result<Observation, tokio_postgres::Error> {
        // A mail for later does not wait. Up to Odoo 15 the column is a text.
        let (since, due) = if there.is_time("mail_mail", "scheduled_date") {
            (
                "greatest(create_date, scheduled_date)",
                "coalesce(scheduled_date <= clock_timestamp() AT TIME ZONE 'UTC', true)",
            )
        } else {
            ("create_date", "true")
        };
        let query = format!(
            "SELECT count(*) FILTER (WHERE state = 'outgoing' AND {due})::float8, \
             extract(epoch FROM (clock_timestamp() AT TIME ZONE 'UTC') - min({since}) \
               FILTER (WHERE state = 'outgoing' AND {due}))::float8, \
             count(*) FILTER (WHERE state = 'exception' \
               AND create_date > (clock_timestamp() AT TIME ZONE 'UTC') - interval '1 day')::float8 \
             FROM public.mail_mail WHERE state IN ('outgoing', 'exception')"
        );
        let row = client.query_one(&query, &[]).await?;
        let (waiting, failed): (f64, f64) = (row.try_get(0)?, row.try_get(2)?);
        let age = row.try_get::<_, Option<f64>>(1)?.unwrap_or(0.0);
        let (warn, fail) = self.limits.mail;
        let text = if waiting > 0.0 {
            let mails = if waiting > 1.0 { format!("{waiting:.0} mails wait") } else { "a mail waits".to_owned() };
            format!("{mails}, the first for {}; {failed:.0} have failed in a day", seconds(age))
        } else {
            format!("no mail waits; {failed:.0} have failed in a day")
        };
        Ok(Observation::pass(self.id("mail"), Topic::Backlog, now, text)
            .with(graded(age, warn, fail))
            .figure(Evidence::new("mails_waiting", waiting, ""))
            .figure(Evidence::new("first_mail_waits", age, "s").limited(fail)))
    }

    async fn queue(
        &self,
        client: &Client,
        now: Timestamp,
        there: &Columns,
    ) -> Result<Observation, tokio_postgres::Error> {
        // A job for later (`eta`) does not wait.
        let (since, due) = if there.is_time("queue_job", "eta") {
            (
                "greatest(date_created, eta)",
                "AND (eta IS NULL OR state <> 'pending' OR eta <= clock_timestamp() AT TIME ZONE 'UTC')",
            )
        } else {
            ("date_created", "")
        };
        let query = format!(
            "SELECT state::text, count(*)::float8, \
             extract(epoch FROM (clock_timestamp() AT TIME ZONE 'UTC') - min({since}))::float8 \
             FROM public.queue_job WHERE state IN ('pending', 'enqueued', 'started', 'failed') {due} GROUP BY 1"
        );
        let (mut waiting, mut age, mut failed, mut running) = (0.0, 0.0_f64, 0.0, 0.0);
        for row in client.query(&query, &[]).await? {
            let (state, number): (String, f64) = (row.try_get(0)?, row.try_get(1)?);
            match state.as_str() {
                "failed" => failed = number,
                "started" => running = number,
                _ => {
                    waiting += number;
                    age = age.max(row.try_get::<_, Option<f64>>(2)?.unwrap_or(0.0));
                }
            }
        }
        let (warn, fail) = self.limits.queue;
        let text = if waiting > 0.0 {
            let waited = seconds(age);
            format!("{waiting:.0} jobs wait, the first for {waited}; {running:.0} run, {failed:.0} have failed")
        } else {
            format!("no job waits; {running:.0} run, {failed:.0} have failed")
        };
        Ok(Observation::pass(self.id("queue"), Topic::Backlog, now, text)
            .with(graded(age, warn, fail))
            .figure(Evidence::new("jobs_waiting", waiting, ""))
            .figure(Evidence::new("first_job_waits", age, "s").limited(fail))
            .figure(Evidence::new("jobs_failed", failed, "")))
    }
}

#[async_trait]
impl Probe for TenantProbe {
    fn name(&self) -> String {
        format!("database of {}", self.tenant)
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
        let read = async {
            let look = self.database.connect().await?;
            let client = &look.client;
            if let Some(text) = self.refuse_too_much(client).await? {
                let refused = Observation::pass(self.id("database"), Topic::Security, now, text);
                return Ok(vec![refused.with(Status::Fail)]);
            }
            // What a tenant has written can hold up its look for longer than its time, also against the server's limits: the
            // next look ends it.
            let leftovers = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = current_user \
                             AND datname = current_database() AND pid <> pg_backend_pid() \
                             AND backend_start < clock_timestamp() - interval '10 seconds'";
            client.query(leftovers, &[]).await?;
            // One snapshot for everything.
            client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
            self.read(client, now).await
        };
        read.await.unwrap_or_else(|error| {
            let text = format!("database {} does not answer: {}", self.database.database, reason(&error));
            vec![Observation::pass(self.id("database"), Topic::Availability, now, text).with(Status::Fail)]
        })
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
            look.client.query_one("SELECT count(*) FROM pg_catalog.pg_namespace", &[]).await
        };
        let answer = ask.await;
        let took = started.elapsed().as_secs_f64();
        let (status, text) = match answer {
            // Slow is not gone.
            Ok(_) => (graded(took, self.latency, f64::INFINITY), format!("it answers in {}", seconds(took))),
            Err(error) => (Status::Fail, format!("it does not answer: {}", reason(&error))),
        };
        vec![
            Observation::pass(self.reachability(), Topic::Availability, now, text)
                .with(status)
                .figure(Evidence::new("answered_in", took, "s").limited(self.latency)),
        ]
    }
}
