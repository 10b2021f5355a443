//! A tenant's own database, and what Odoo says in it of its work.
//!
//! (`reference`: Health, "Probe the tenant's own database"; Health and upgrades, the tables.)

use std::collections::HashSet;
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

const ASPECTS: [&str; 5] = ["database", "cron", "mail", "queue", "modules"];

impl TenantProbe {
    fn id(&self, aspect: &str) -> CheckId {
        CheckId::tenant(&self.tenant, aspect)
    }

    async fn read(&self, client: &Client, now: Timestamp) -> Result<Vec<Observation>, tokio_postgres::Error> {
        let started = Instant::now();
        // Tables of Odoo's own, so that a database that was emptied, or half-restored, does not pass. They are a tenant's to
        // define: they are held first, so that they stay what they are, and only ordinary tables and columns of PostgreSQL's
        // own plain types are read. Views, casts and output functions of the tenant's would run as us.
        let tables = "SELECT quote_ident(relname) FROM pg_class WHERE relnamespace = to_regnamespace('public') \
                      AND relkind IN ('r', 'p') AND NOT relrowsecurity AND NOT relhassubclass \
                      AND relname IN ('ir_module_module', 'ir_cron', 'ir_cron_trigger', 'mail_mail', 'queue_job')";
        for row in client.query(tables, &[]).await? {
            let table: String = row.try_get(0)?;
            client.batch_execute(&format!("LOCK TABLE public.{table} IN ACCESS SHARE MODE")).await?;
        }
        let columns = "SELECT c.relname::text, a.attname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid \
                       JOIN pg_locks l ON l.relation = c.oid AND l.pid = pg_backend_pid() AND l.mode = 'AccessShareLock' \
                       WHERE c.relnamespace = to_regnamespace('public') AND c.relkind IN ('r', 'p') AND a.attnum > 0 \
                       AND NOT a.attisdropped AND a.atttypid IN (16, 20, 21, 23, 25, 701, 1043, 1114, 1184) \
                       AND c.relname IN ('ir_module_module', 'ir_cron', 'ir_cron_trigger', 'mail_mail', 'queue_job')";
        let rows = client.query(columns, &[]).await?;
        let there: HashSet<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let has = |table: &str, column: &str| there.contains(&(table.to_owned(), column.to_owned()));
        let mut found = Vec::new();
        if !has("ir_module_module", "state") || !has("ir_module_module", "name") {
            let text = "the database is there, but not Odoo's tables: it is empty, or another's";
            found.push(Observation::pass(self.id("database"), Topic::Availability, now, text).with(Status::Fail));
            return Ok(found);
        }
        found.push(self.modules(client, now).await?);
        let latency = started.elapsed().as_secs_f64();
        let (warn, fail) = self.limits.latency;
        found.push(
            Observation::pass(
                self.id("database"),
                Topic::Latency,
                now,
                format!("it answers in {}, {} is expected", seconds(latency), seconds(warn)),
            )
            // Slow is not gone.
            .with(if latency >= fail { Status::Fail } else { graded(latency, warn, f64::INFINITY) })
            .figure(Evidence::new("answered_in", latency, "s").limited(fail)),
        );
        if has("ir_cron", "nextcall") && has("ir_cron", "active") && has("ir_cron", "id") {
            let name = ["cron_name", "name"].into_iter().find(|column| has("ir_cron", column));
            let counts = has("ir_cron", "failure_count") && has("ir_cron", "first_failure_date");
            found.push(self.cron(client, now, name, counts, has("ir_cron_trigger", "call_at")).await?);
        }
        if has("mail_mail", "state") && has("mail_mail", "create_date") {
            found.push(self.mail(client, now).await?);
        }
        if has("queue_job", "state") && has("queue_job", "date_created") {
            found.push(self.queue(client, now).await?);
        }
        for aspect in ["cron", "mail", "queue"] {
            if !found.iter().any(|observation| observation.check == self.id(aspect)) {
                let text = "the module is not installed";
                found.push(Observation::pass(self.id(aspect), Topic::Backlog, now, text));
            }
        }
        Ok(found)
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
        name: Option<&str>,
        counts_failures: bool,
        has_triggers: bool,
    ) -> Result<Observation, tokio_postgres::Error> {
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

    async fn mail(&self, client: &Client, now: Timestamp) -> Result<Observation, tokio_postgres::Error> {
        let query = "SELECT count(*) FILTER (WHERE state = 'outgoing')::float8, \
                     extract(epoch FROM (clock_timestamp() AT TIME ZONE 'UTC') - min(create_date) \
                       FILTER (WHERE state = 'outgoing'))::float8, \
                     count(*) FILTER (WHERE state = 'exception' \
                       AND create_date > (clock_timestamp() AT TIME ZONE 'UTC') - interval '1 day')::float8 \
                     FROM public.mail_mail WHERE state IN ('outgoing', 'exception')";
        let row = client.query_one(query, &[]).await?;
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

    async fn queue(&self, client: &Client, now: Timestamp) -> Result<Observation, tokio_postgres::Error> {
        let query = "SELECT state::text, count(*)::float8, \
                     extract(epoch FROM (clock_timestamp() AT TIME ZONE 'UTC') - min(date_created))::float8 \
                     FROM public.queue_job WHERE state IN ('pending', 'enqueued', 'started', 'failed') GROUP BY 1";
        let (mut waiting, mut age, mut failed, mut running) = (0.0, 0.0_f64, 0.0, 0.0);
        for row in client.query(query, &[]).await? {
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
