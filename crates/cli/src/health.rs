//! `cofferdam health`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use cofferdam::admin::{HealthView, IsolationRow};
use cofferdam::tenant::Diagnostics;
use cofferdam_health::alert::{AlertOptions, Alerts, Notice, Phase};
use cofferdam_health::config::Setup;
use cofferdam_health::engine::Picture;
use cofferdam_health::metrics::{Sources, render};
use cofferdam_health::model::{Status, Subject};
use cofferdam_health::page::{Isolation, PageSources, page};
use cofferdam_health::sink::Sinks;
use cofferdam_health::slo::{Budget, Counts};
use cofferdam_health::{Watcher, explain, rules, service};
use comfy_table::{Table, presets};
use jiff::Timestamp;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::exit;
use crate::setup::File;

/// Look at tenants and what they share, and say what is really wrong.
#[derive(Debug, Args)]
pub(crate) struct HealthArgs {
    /// What is to be looked at.
    #[arg(short, long, env = "COFFERDAM_HEALTH_CONFIG", default_value = "health.yaml", global = true)]
    config: PathBuf,
    /// Print the result as JSON on standard output.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: HealthCommand,
}

#[derive(Debug, Subcommand)]
enum HealthCommand {
    /// Look at everything once. Exit code 1 when something fails.
    Check {
        /// Print what passes too.
        #[arg(long)]
        all: bool,
    },
    /// Look at everything until SIGTERM or Ctrl-C, and tell troubles when they begin and end.
    Watch {
        /// A file for Prometheus' textfile collector, written anew every few seconds.
        #[arg(long, value_name = "PATH")]
        textfile: Option<PathBuf>,
        /// Where to serve a page for people, `/api/v1/health`, `/api/v1/tenants/{slug}/health`, `/api/v1/services` and `/metrics`.
        #[arg(long, value_name = "ADDRESS")]
        listen: Option<SocketAddr>,
        /// The environment variable with the token that whoever asks must have; needed to listen beyond loopback.
        #[arg(long, value_name = "VARIABLE", requires = "listen")]
        token_env: Option<String>,
    },
    /// Say in words why a tenant is unwell: the likely cause first.
    Explain {
        /// Which.
        tenant: String,
    },
    /// Write Prometheus' rules with their unit tests, Alertmanager's time intervals, and Grafana's dashboards.
    Rules {
        /// The directory for the files.
        #[arg(long, value_name = "DIRECTORY", default_value = ".")]
        directory: PathBuf,
    },
}

/// How often is told what has changed: a tenth of the interval, within reason.
fn step_of(setup: &Setup) -> Duration {
    (setup.file.interval.0 / 10).clamp(Duration::from_millis(200), Duration::from_secs(5))
}

/// How often Alertmanager hears what is still open.
const REFRESH: Duration = Duration::from_secs(60);

const FILE: File<Setup> = File { catalog_of: Setup::catalog_of, read: Setup::read };

pub(crate) fn run(args: &HealthArgs) -> anyhow::Result<ExitCode> {
    FILE.with(&args.config, async |setup| match &args.command {
        HealthCommand::Check { all } => check(&setup, *all, args.json).await,
        HealthCommand::Watch { textfile, listen, token_env } => {
            let token = match token_env {
                Some(name) => Some(std::env::var(name).map_err(|_| anyhow!("{name} is not set"))?),
                None => None,
            };
            watch(setup, textfile.as_deref(), *listen, token).await
        }
        HealthCommand::Explain { tenant } => tell_why(&setup, tenant).await,
        HealthCommand::Rules { directory } => write_rules(&setup, directory),
    })
}

async fn check(setup: &Setup, all: bool, json: bool) -> anyhow::Result<ExitCode> {
    let watcher = setup.watcher(true);
    watcher.look_once().await;
    let picture = watcher.picture(Timestamp::now());
    let services = service::states(&setup.file.services, &picture);
    let failed = picture.checks.values().any(|state| state.status == Status::Fail);
    if json {
        let answer = serde_json::json!({ "checks": picture.checks, "services": services });
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        print_services(&services);
        print_checks(&picture, all);
    }
    Ok(if failed { ExitCode::from(exit::FAILED) } else { ExitCode::SUCCESS })
}

fn print_services(services: &[service::ServiceState]) {
    if services.is_empty() {
        return;
    }
    let mut table = plain();
    for service in services {
        let reason = service.reasons.first().cloned().unwrap_or_default();
        table.add_row([format!("{} {}", service.status.sign(), service.status), service.title.clone(), reason]);
    }
    println!("{table}\n");
}

fn print_checks(picture: &Picture, all: bool) {
    let mut table = plain();
    for cause in picture.causes() {
        let follow = picture.consequences(&cause.check).len();
        let follow = if follow > 0 { format!(" ({follow} others follow from it)") } else { String::new() };
        table.add_row([
            format!("{} {}", cause.status.sign(), cause.status),
            cause.check.to_string(),
            format!("{}{follow}", cause.observation.text),
        ]);
    }
    if all {
        for state in picture.checks.values().filter(|state| !state.is_cause()) {
            let because = state.because_of.as_ref().map_or_else(String::new, |cause| format!(" (because of {cause})"));
            table.add_row([
                format!("{} {}", state.status.sign(), state.status),
                state.check.to_string(),
                format!("{}{because}", state.observation.text),
            ]);
        }
    }
    if table.row_count() > 0 {
        println!("{table}");
    }
    let well = picture.checks.values().filter(|state| state.status == Status::Pass).count();
    println!("{well} of {} checks pass", picture.checks.len());
}

fn plain() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table
}

async fn tell_why(setup: &Setup, tenant: &str) -> anyhow::Result<ExitCode> {
    if !setup.objectives.contains_key(tenant) {
        let known: Vec<&str> = setup.objectives.keys().map(String::as_str).collect();
        return Err(anyhow!("there is no tenant `{tenant}` in the configuration; there are: {}", known.join(", ")));
    }
    let watcher = setup.watcher(true);
    watcher.look_once().await;
    let now = Timestamp::now();
    let picture = watcher.picture(now);
    for line in explain(tenant, &picture, now) {
        println!("{line}");
    }
    let failed = picture.status_of(&Subject::Tenant(tenant.to_owned())) == Status::Fail;
    Ok(if failed { ExitCode::from(exit::FAILED) } else { ExitCode::SUCCESS })
}

async fn watch(
    setup: Setup,
    textfile: Option<&Path>,
    listen: Option<SocketAddr>,
    token: Option<String>,
) -> anyhow::Result<ExitCode> {
    let stop = CancellationToken::new();
    println!("watching {} tenants", setup.objectives.len());
    let observer = Observer::start(setup, &stop)?;
    let serving = match listen {
        Some(address) => {
            if !address.ip().is_loopback() && token.is_none() {
                return Err(anyhow!("to listen beyond loopback a token is needed: say --token-env"));
            }
            let listener = TcpListener::bind(address).await.with_context(|| address.to_string())?;
            println!("listening on http://{}/", listener.local_addr()?);
            let view: Arc<dyn HealthView> = Arc::clone(&observer) as _;
            Some(tokio::spawn(cofferdam::admin::serve_health(listener, view, token, stop.clone())))
        }
        None => None,
    };
    // Listened for all the time: a signal that comes while something is sent counts too.
    let mut stopping = std::pin::pin!(crate::backup::stop_signal());
    let step = step_of(&observer.setup);
    // With a thousand tenants there are thousands of lines: not more often than anybody collects them.
    let (every, mut written) = ((step * 3).max(Duration::from_millis(500)), None::<std::time::Instant>);
    loop {
        tokio::select! {
            () = tokio::time::sleep(step) => {}
            signal = &mut stopping => {
                signal?;
                stop.cancel();
                if let Some(serving) = serving {
                    serving.await??;
                }
                return Ok(ExitCode::SUCCESS);
            }
        }
        for notice in observer.step().await {
            let word = if notice.phase == Phase::Firing { "TROUBLE" } else { "over" };
            println!("{} {word} [{:?}] {}", Timestamp::now().strftime("%H:%M:%S"), notice.urgency, notice.summary);
        }
        if let Some(path) = textfile
            && written.is_none_or(|at| at.elapsed() >= every)
        {
            written = Some(std::time::Instant::now());
            // Whole or not at all: the collector may read at any time.
            let beside = path.with_extension("unfinished");
            let write = async {
                tokio::fs::write(&beside, observer.metrics()).await?;
                tokio::fs::rename(&beside, path).await
            };
            // A full disk is no reason to stop watching.
            if let Err(error) = write.await {
                eprintln!("cofferdam: {}: {error}", path.display());
            }
        }
    }
}

/// Watches beside a gateway, whose admin surface shows what is seen. Ends with `stop`.
pub(crate) fn beside_gateway(
    path: &Path,
    stop: &CancellationToken,
) -> Result<anyhow::Result<Arc<dyn HealthView>>, Diagnostics> {
    let setup = FILE.read(path)?;
    Ok(Observer::start(setup, stop).map(|observer| {
        let (stepping, stop, step) = (Arc::clone(&observer), stop.clone(), step_of(&observer.setup));
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(step) => {}
                }
                for notice in stepping.step().await {
                    let (summary, phase, urgency) = (&notice.summary, notice.phase, notice.urgency);
                    tracing::warn!(key = notice.key, ?phase, ?urgency, "{summary}");
                }
            }
        });
        observer as Arc<dyn HealthView>
    }))
}

/// Looks, remembers, tells.
struct Observer {
    setup: Setup,
    watcher: Watcher,
    told: Mutex<Told>,
    sinks: tokio::sync::Mutex<Sinks>,
}

/// What a watch remembers.
struct Told {
    alerts: Alerts,
    counts: BTreeMap<String, Counts>,
    looks: BTreeMap<String, (u64, u64)>,
    budgets: BTreeMap<String, Budget>,
    counted: Timestamp,
    /// When Alertmanager was last told what is open.
    refreshed: Timestamp,
}

impl Observer {
    fn start(setup: Setup, stop: &CancellationToken) -> anyhow::Result<Arc<Self>> {
        let watcher = setup.watcher(false);
        let notices = &setup.file.notices;
        let sinks = Sinks::new(notices.webhook.as_deref(), notices.alertmanager.as_deref())
            .map_err(|error| anyhow!("notices cannot be sent: {error}"))?;
        let defaults = AlertOptions::default();
        let options = AlertOptions {
            // Sooner, a cause may not have been seen yet, and its consequences would be told instead.
            after: notices.after.map_or(defaults.after, |after| after.0).max(setup.file.interval.0 * 2),
            repeat: notices.repeat.map_or(defaults.repeat, |repeat| repeat.0),
            ..defaults
        };
        let told = Told {
            alerts: Alerts::new(options),
            counts: BTreeMap::new(),
            looks: BTreeMap::new(),
            budgets: BTreeMap::new(),
            counted: Timestamp::now(),
            refreshed: Timestamp::now(),
        };
        let (looking, stop) = (watcher.clone(), stop.clone());
        tokio::spawn(async move { looking.run(&stop).await });
        Ok(Arc::new(Self { setup, watcher, told: Mutex::new(told), sinks: tokio::sync::Mutex::new(sinks) }))
    }

    /// Counts, decides who is told what, and sends it.
    async fn step(&self) -> Vec<Notice> {
        let notices = self.decide();
        let mut sinks = self.sinks.lock().await;
        let mut problems = sinks.send(&notices).await;
        let open: Option<Vec<Notice>> = {
            let told = &mut *self.told();
            let now = Timestamp::now();
            let due = now.duration_since(told.refreshed).unsigned_abs() >= REFRESH;
            due.then(|| {
                told.refreshed = now;
                told.alerts.open().into_iter().cloned().collect()
            })
        };
        if let Some(open) = open {
            problems.extend(sinks.refresh(&open.iter().collect::<Vec<_>>()).await);
        }
        for problem in problems {
            tracing::warn!("a notice was not sent yet: {problem}");
            eprintln!("cofferdam: a notice was not sent yet: {problem}");
        }
        notices
    }

    fn decide(&self) -> Vec<Notice> {
        let now = Timestamp::now();
        let picture = self.watcher.picture(now);
        let told = &mut *self.told();
        // Each interval counts once: could the tenant be worked with?
        if now.duration_since(told.counted).unsigned_abs() >= self.setup.file.interval.0 {
            told.counted = now;
            for tenant in self.setup.objectives.keys() {
                let subject = Subject::Tenant(tenant.clone());
                let mut asked = picture.of(&subject).filter(|s| matches!(s.check.aspect.as_str(), "database" | "page"));
                let Some(first) = asked.next() else { continue };
                let good = first.status != Status::Fail && asked.all(|state| state.status != Status::Fail);
                told.counts.entry(tenant.clone()).or_default().add(now, good);
                let looks = told.looks.entry(tenant.clone()).or_default();
                if good { looks.0 += 1 } else { looks.1 += 1 }
            }
        }
        let budget = |(tenant, counts): (&String, &Counts)| {
            let objective = self.setup.objectives.get(tenant).copied()?;
            Some((tenant.clone(), Budget::of(counts, objective, now)))
        };
        told.budgets = told.counts.iter().filter_map(budget).collect();
        told.alerts.step(now, &picture, &told.budgets, &self.setup.calendars)
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn picture(&self) -> (Picture, Vec<service::ServiceState>) {
        let picture = self.watcher.picture(Timestamp::now());
        let services = service::states(&self.setup.file.services, &picture);
        (picture, services)
    }
}

impl HealthView for Observer {
    fn health(&self) -> Value {
        service::health_json("everything that is looked at", self.picture().0.checks.values())
    }

    fn tenant_health(&self, slug: &str) -> Option<Value> {
        self.setup.objectives.get(slug)?;
        let (picture, _) = self.picture();
        Some(service::health_json(slug, picture.of(&Subject::Tenant(slug.to_owned()))))
    }

    fn services(&self) -> Value {
        serde_json::json!({ "services": self.picture().1 })
    }

    fn metrics(&self) -> String {
        let (picture, services) = self.picture();
        let told = self.told();
        let sources = Sources {
            picture: &picture,
            services: &services,
            budgets: &told.budgets,
            looks: &told.looks,
            calendars: &self.setup.calendars,
        };
        render(&sources, Timestamp::now())
    }

    fn page(&self, isolation: &[IsolationRow]) -> String {
        let (picture, services) = self.picture();
        let rows: Vec<Isolation> = isolation
            .iter()
            .map(|row| Isolation {
                tenant: row.tenant.clone(),
                running: row.running,
                waiting: row.waiting,
                mean_wait: row.mean_wait,
                work: row.work,
                rejected: row.rejected,
                warnings: row.warnings.clone(),
            })
            .collect();
        let told = self.told();
        let sources = PageSources { picture: &picture, services: &services, budgets: &told.budgets, isolation: &rows };
        page(&sources, Timestamp::now())
    }
}

fn write_rules(setup: &Setup, directory: &Path) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let options = rules::RuleOptions { availability: setup.file.availability / 100.0 };
    let files = [
        ("cofferdam.rules.yml", rules::prometheus(options)),
        ("cofferdam.rules.test.yml", rules::promtool_tests("cofferdam.rules.yml")),
        ("cofferdam.time_intervals.yml", rules::alertmanager_intervals(&setup.named_calendars, Timestamp::now())),
        ("cofferdam-services.json", serde_json::to_string_pretty(&rules::executive_dashboard())?),
        ("cofferdam-platform.json", serde_json::to_string_pretty(&rules::platform_dashboard())?),
    ];
    for (name, text) in files {
        let path = directory.join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}
