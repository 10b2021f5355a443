//! What looking after many tenants costs: one process that looks at each of them, its processor time, memory and connections, and
//! how many series it writes.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use cofferdam_testkit::postgres::{Cluster, SUPERUSER};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use tokio::time::Instant;

use crate::peers::{cpu_of, resident_of};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Tenants that are looked at.
    pub tenants: u32,
    /// Databases that they have; several tenants look into one, because a server with so many takes long to make.
    pub databases: u32,
    /// How long is measured, after everything was looked at once.
    pub seconds: u64,
    /// How often each is looked at, in seconds.
    pub interval: u64,
    /// The program.
    pub cofferdam: PathBuf,
}

/// What it came to.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Tenants that were looked at.
    pub tenants: u32,
    /// How often, in seconds.
    pub interval: u64,
    /// How long was measured, in seconds.
    pub seconds: f64,
    /// Looks at tenants in that time.
    pub looks: f64,
    /// Of one processor, in per cent.
    pub cpu: f64,
    /// Processor time for a look at a tenant, in milliseconds.
    pub cpu_per_look: f64,
    /// Memory, in bytes.
    pub resident: u64,
    /// The most connections to the server at a time.
    pub connections: i64,
    /// Series, all together.
    pub series: usize,
    /// Series of a tenant.
    pub series_per_tenant: f64,
    /// Checks that do not pass: there should be none.
    pub failing: usize,
}

/// Tables as a small Odoo has them.
const TABLES: &str = "
CREATE TABLE ir_module_module (id serial PRIMARY KEY, name text, state text);
INSERT INTO ir_module_module (name, state) SELECT 'module_' || n, CASE WHEN n % 5 = 0 THEN 'installed' ELSE 'uninstalled' END FROM generate_series(1, 600) n;
CREATE TABLE ir_cron (id serial PRIMARY KEY, cron_name text, active bool DEFAULT true,
    nextcall timestamp DEFAULT (now() AT TIME ZONE 'UTC' + interval '1 day'), failure_count int DEFAULT 0, first_failure_date timestamp);
INSERT INTO ir_cron (cron_name) SELECT 'job ' || n FROM generate_series(1, 50) n;
CREATE TABLE ir_cron_trigger (id serial PRIMARY KEY, cron_id int, call_at timestamp);
CREATE TABLE mail_mail (id serial PRIMARY KEY, state text, create_date timestamp DEFAULT (now() AT TIME ZONE 'UTC'), body_html text);
INSERT INTO mail_mail (state, body_html) SELECT 'sent', repeat('x', 500) FROM generate_series(1, 500) n;
CREATE TABLE queue_job (id serial PRIMARY KEY, state text, date_created timestamp DEFAULT (now() AT TIME ZONE 'UTC'), eta timestamp, date_started timestamp);
INSERT INTO queue_job (state) SELECT 'done' FROM generate_series(1, 2000) n;
GRANT SELECT ON ir_module_module, ir_cron, ir_cron_trigger, mail_mail, queue_job TO watcher;
ANALYZE";

/// Measures. `progress` is told what goes on.
pub async fn measure(options: &Options, progress: impl Fn(&str)) -> anyhow::Result<Report> {
    progress("making databases …");
    let cluster = Cluster::start()?;
    let admin = cluster.admin("postgres").await?;
    admin.batch_execute("CREATE ROLE watcher LOGIN PASSWORD 'watcher-secret'").await?;
    cluster.create_database("d0", SUPERUSER.0).await?;
    cluster.admin("d0").await?.batch_execute(TABLES).await?;
    for n in 1..options.databases {
        admin.batch_execute(&format!("CREATE DATABASE d{n} TEMPLATE d0")).await?;
    }
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    fs::write(at("password"), SUPERUSER.1)?;
    fs::write(at("watcher"), "watcher-secret")?;
    let mut text = format!(
        "interval: {}s\nclusters:\n  main: {{ host: 127.0.0.1, port: {}, user: {}, password_file: password, tenant_user: watcher, \
         tenant_password_file: watcher }}\ntenants:\n",
        options.interval,
        cluster.port(),
        SUPERUSER.0
    );
    for n in 0..options.tenants {
        text.push_str(&format!("  t{n}: {{ database: d{} }}\n", n % options.databases));
    }
    fs::write(at("health.yaml"), text)?;
    let textfile = at("health.prom");
    let mut watch = Command::new(&options.cofferdam);
    watch.args(["health", "watch", "--config"]).arg(at("health.yaml")).arg("--textfile").arg(&textfile);
    watch.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    let mut watch = Stopped(watch.spawn().context("cannot start the watch")?);
    let pid = watch.0.id();
    progress("everything is looked at once …");
    let series = |text: &str| text.lines().filter(|line| !line.starts_with('#')).count();
    let passing = |text: &str| {
        let status = text.lines().filter(|line| line.starts_with("cofferdam_health_status{kind=\"tenant\""));
        let (all, bad) = status.fold((0, 0), |(all, bad), line| (all + 1, bad + usize::from(!line.ends_with(" 0"))));
        (all, bad)
    };
    let deadline = Instant::now() + Duration::from_secs(options.interval * 4 + 60);
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        if let Some(status) = watch.0.try_wait()? {
            bail!("the watch has ended: {status}");
        }
        let text = fs::read_to_string(&textfile).unwrap_or_default();
        if passing(&text).0 >= options.tenants as usize * 7 {
            break;
        }
        if Instant::now() > deadline {
            bail!("not every tenant was looked at within {} s", options.interval * 4 + 60);
        }
    }
    progress("measuring …");
    let (begun, before) = (Instant::now(), cpu_of(pid));
    let (mut connections, mut resident) = (0, 0);
    while begun.elapsed() < Duration::from_secs(options.seconds) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cofferdam-health'";
        connections = connections.max(admin.query_one(query, &[]).await?.get(0));
        resident = resident.max(resident_of(pid));
    }
    let (took, spent) = (begun.elapsed().as_secs_f64(), cpu_of(pid).saturating_sub(before).as_secs_f64());
    let text = fs::read_to_string(&textfile)?;
    let looks = f64::from(options.tenants) * took / options.interval as f64;
    let all = series(&text);
    let of_tenants = text.lines().filter(|line| line.contains("subject=\"t") || line.contains("tenant=\"t")).count();
    Ok(Report {
        tenants: options.tenants,
        interval: options.interval,
        seconds: took,
        looks,
        cpu: 100.0 * spent / took,
        cpu_per_look: 1e3 * spent / looks,
        resident,
        connections,
        series: all,
        series_per_tenant: of_tenants as f64 / f64::from(options.tenants),
        failing: passing(&text).1,
    })
}

/// As a table.
pub fn table(report: &Report) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_header(["", "value"]);
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for (name, value) in [
        ("tenants", report.tenants.to_string()),
        ("looked at every", format!("{} s", report.interval)),
        ("of one processor", format!("{:.1} %", report.cpu)),
        ("processor time for a look at a tenant", format!("{:.2} ms", report.cpu_per_look)),
        ("memory", format!("{} MB", report.resident / 1_000_000)),
        ("connections at a time, at most", report.connections.to_string()),
        ("series", report.series.to_string()),
        ("series of a tenant", format!("{:.1}", report.series_per_tenant)),
        ("checks that do not pass", report.failing.to_string()),
    ] {
        table.add_row([name.to_owned(), value]);
    }
    table.to_string()
}

/// A program that ends with the measurement.
struct Stopped(std::process::Child);

impl Drop for Stopped {
    #[allow(clippy::disallowed_methods)] // it has been killed
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
