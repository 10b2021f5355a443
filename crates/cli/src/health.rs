//! `cofferdam health`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use cofferdam::admin::{HealthView, IsolationRow};
use cofferdam::tenant::{Diagnostics, HumanDuration};
use cofferdam_health::alert::Phase;
use cofferdam_health::config::Setup;
use cofferdam_health::engine::Picture;
use cofferdam_health::model::{Status, Subject};
use cofferdam_health::page::Isolation;
use cofferdam_health::probe::RepositoryProbe;
use cofferdam_health::{Observer, Step, explain, rules, service};
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
    /// Say what has changed lately, newest first; where `health.yaml` says that changes are kept.
    History {
        /// Of which tenant; of everything if left out.
        tenant: Option<String>,
        /// How far back.
        #[arg(long, value_name = "DURATION", default_value = "7d", value_parser = duration)]
        since: HumanDuration,
        /// At most so many.
        #[arg(long, value_name = "NUMBER", default_value_t = 100)]
        limit: u32,
    },
    /// Write Prometheus' rules with their unit tests, Alertmanager's time intervals, and Grafana's dashboards.
    Rules {
        /// The directory for the files.
        #[arg(long, value_name = "DIRECTORY", default_value = ".")]
        directory: PathBuf,
    },
}

fn duration(text: &str) -> Result<HumanDuration, String> {
    HumanDuration::parse(text).ok_or_else(|| "expected a whole number with a unit, such as `36h` or `7d`".to_owned())
}

const FILE: File<Setup> = File { catalog_of: Setup::catalog_of, read: Setup::read };

pub(crate) fn run(args: &HealthArgs) -> anyhow::Result<ExitCode> {
    FILE.with(&args.config, async |setup| {
        let setup = match with_repository(setup, &args.config) {
            Ok(setup) => setup?,
            Err(faults) => {
                crate::check::print(&faults);
                return Ok(ExitCode::from(exit::CONFIG));
            }
        };
        command(args, setup).await
    })
}

/// What a `backup.yaml` says of its repository is looked at too, where the file names one.
fn with_repository(mut setup: Setup, path: &Path) -> Result<anyhow::Result<Setup>, Diagnostics> {
    let Some(file) = &setup.file.repository else { return Ok(Ok(setup)) };
    let backups = crate::backup::FILE.read(&path.parent().unwrap_or(Path::new(".")).join(file))?;
    Ok(backups.write_and_read().map_err(anyhow::Error::from).map(|write_and_read| {
        let try_it = Arc::new(move || write_and_read().map_err(|error| error.to_string()));
        setup.add(Arc::new(RepositoryProbe::new("backups", try_it, Duration::from_secs(300))));
        setup
    }))
}

async fn command(args: &HealthArgs, setup: Setup) -> anyhow::Result<ExitCode> {
    match &args.command {
        HealthCommand::Check { all } => check(&setup, *all, args.json).await,
        HealthCommand::Watch { textfile, listen, token_env } => {
            let token = match token_env {
                Some(name) => Some(std::env::var(name).map_err(|_| anyhow!("{name} is not set"))?),
                None => None,
            };
            watch(setup, &args.config, textfile.as_deref(), *listen, token).await
        }
        HealthCommand::Explain { tenant } => tell_why(&setup, tenant).await,
        HealthCommand::History { tenant, since, limit } => {
            history(&setup, tenant.as_deref(), *since, *limit, args.json).await
        }
        HealthCommand::Rules { directory } => write_rules(&setup, directory),
    }
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

async fn history(
    setup: &Setup,
    tenant: Option<&str>,
    since: HumanDuration,
    limit: u32,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let history = setup.history().ok_or_else(|| anyhow!("nothing is kept: `history` is not in the configuration"))?;
    if let Some(tenant) = tenant {
        known(setup, tenant)?;
    }
    let since = Timestamp::now().checked_sub(jiff::SignedDuration::try_from(since.0)?)?;
    let kept = history.since(tenant, since, limit).await.map_err(|error| anyhow!("the history: {error}"))?;
    if json {
        println!("{}", serde_json::to_string_pretty(&kept)?);
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = plain();
    for change in &kept {
        table.add_row([
            change.at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
            change.check.to_string(),
            format!("{} → {}", change.from, change.to),
            change.text.clone(),
        ]);
    }
    if kept.is_empty() {
        println!("nothing has changed");
    } else {
        println!("{table}");
    }
    Ok(ExitCode::SUCCESS)
}

fn known(setup: &Setup, tenant: &str) -> anyhow::Result<()> {
    if setup.knows(tenant) {
        return Ok(());
    }
    Err(anyhow!("there is no tenant `{tenant}` in the configuration; there are: {}", setup.tenants().join(", ")))
}

async fn tell_why(setup: &Setup, tenant: &str) -> anyhow::Result<ExitCode> {
    known(setup, tenant)?;
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
    config: &Path,
    textfile: Option<&Path>,
    listen: Option<SocketAddr>,
    token: Option<String>,
) -> anyhow::Result<ExitCode> {
    let stop = CancellationToken::new();
    println!("watching {} tenants", setup.tenants().len());
    let watch = Arc::new(Watch::start(setup, config, &stop)?);
    let serving = match listen {
        Some(address) => {
            if !address.ip().is_loopback() && token.is_none() {
                return Err(anyhow!("to listen beyond loopback a token is needed: say --token-env"));
            }
            let listener = TcpListener::bind(address).await.with_context(|| address.to_string())?;
            println!("listening on http://{}/", listener.local_addr()?);
            let view: Arc<dyn HealthView> = Arc::new(View(Arc::clone(&watch)));
            Some(tokio::spawn(cofferdam::admin::serve_health(listener, view, token, stop.clone())))
        }
        None => None,
    };
    // Listened for all the time: a signal that comes while something is sent counts too.
    let mut stopping = std::pin::pin!(crate::backup::stop_signal());
    let step = watch.observer().every();
    // With a thousand tenants there are thousands of lines: not more often than anybody collects them.
    let (every, mut written) = ((step * 3).max(Duration::from_millis(500)), None::<Instant>);
    let mut writing: Option<tokio::task::JoinHandle<std::io::Result<()>>> = None;
    loop {
        tokio::select! {
            () = tokio::time::sleep(step) => {}
            signal = &mut stopping => {
                signal?;
                stop.cancel();
                if let Err(problem) = watch.observer().close().await {
                    eprintln!("cofferdam: {problem}");
                }
                if let Some(serving) = serving {
                    serving.await??;
                }
                return Ok(ExitCode::SUCCESS);
            }
        }
        if let Some(said) = watch.read_again().await {
            match said {
                Ok(tenants) => println!("read again: watching {tenants} tenants"),
                Err(fault) => eprintln!("cofferdam: {fault}"),
            }
        }
        let Step { notices, problems } = watch.observer().step().await;
        for problem in problems {
            eprintln!("cofferdam: {problem}");
        }
        for notice in notices {
            let word = if notice.phase == Phase::Firing { "TROUBLE" } else { "over" };
            println!("{} {word} [{:?}] {}", Timestamp::now().strftime("%H:%M:%S"), notice.urgency, notice.summary);
        }
        if let Some(path) = textfile
            && written.is_none_or(|at| at.elapsed() >= every)
        {
            written = Some(Instant::now());
            // A file system that is full, or whose server is gone, is no reason to stop watching.
            if writing.as_ref().is_some_and(|writing| !writing.is_finished()) {
                eprintln!("cofferdam: {}: writing it takes more than {} s", path.display(), every.as_secs());
                continue;
            }
            if let Some(before) = writing.take()
                && let Ok(Err(error)) = before.await
            {
                eprintln!("cofferdam: {}: {error}", path.display());
            }
            let (whole, text) = (path.to_owned(), watch.observer().metrics());
            writing = Some(tokio::task::spawn_blocking(move || {
                // Whole or not at all: the collector may read at any time.
                let beside = whole.with_extension("unfinished");
                std::fs::write(&beside, text)?;
                std::fs::rename(&beside, &whole)
            }));
        }
    }
}

/// Watches beside a gateway, whose admin surface shows what is seen. Ends with `stop`.
pub(crate) fn beside_gateway(
    path: &Path,
    stop: &CancellationToken,
) -> Result<anyhow::Result<Arc<dyn HealthView>>, Diagnostics> {
    let setup = match with_repository(FILE.read(path)?, path)? {
        Ok(setup) => setup,
        Err(error) => return Ok(Err(error)),
    };
    Ok(Watch::start(setup, path, stop).map(|watch| {
        let watch = Arc::new(watch);
        let (stepping, stop, step) = (Arc::clone(&watch), stop.clone(), watch.observer().every());
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(step) => {}
                }
                if let Some(said) = stepping.read_again().await {
                    match said {
                        Ok(tenants) => tracing::info!(tenants, "health was read again"),
                        Err(fault) => tracing::warn!("{fault}"),
                    }
                }
                let Step { notices, problems } = stepping.observer().step().await;
                for problem in problems {
                    tracing::warn!("{problem}");
                }
                for notice in notices {
                    let (summary, phase, urgency) = (&notice.summary, notice.phase, notice.urgency);
                    tracing::warn!(key = notice.key, ?phase, ?urgency, "{summary}");
                }
            }
        });
        Arc::new(View(watch)) as Arc<dyn HealthView>
    }))
}

/// How often is looked whether the file has changed.
const AGAIN: Duration = Duration::from_secs(30);

/// A watch that follows its file.
struct Watch {
    observer: RwLock<Arc<Observer>>,
    config: PathBuf,
    /// What was read, and when it was looked at last.
    read: Mutex<(Option<u64>, Instant)>,
    stop: CancellationToken,
}

impl Watch {
    fn start(setup: Setup, config: &Path, stop: &CancellationToken) -> anyhow::Result<Self> {
        let read = FILE.fingerprint(config).ok();
        let observer = Observer::start(setup, stop).map_err(unsent)?;
        let (observer, read) = (RwLock::new(observer), Mutex::new((read, Instant::now())));
        Ok(Self { observer, config: config.to_owned(), read, stop: stop.clone() })
    }

    fn observer(&self) -> Arc<Observer> {
        Arc::clone(&self.observer.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Goes on with what the file says now, if that is something else than before, and says of how many tenants it is. With
    /// faults it goes on as before.
    async fn read_again(&self) -> Option<Result<usize, String>> {
        let config = self.config.clone();
        let before = {
            let (before, looked) = &mut *self.read.lock().unwrap_or_else(PoisonError::into_inner);
            // Each tenant may have a file of its own.
            if looked.elapsed() < self.observer().setup().file.interval.0.min(AGAIN) {
                return None;
            }
            *looked = Instant::now();
            *before
        };
        // A file that is not there for a moment, because somebody writes it anew, is no change.
        let read = tokio::task::spawn_blocking(move || {
            let now = FILE.fingerprint(&config).ok().filter(|now| Some(*now) != before)?;
            Some((now, FILE.read(&config).and_then(|setup| with_repository(setup, &config))))
        });
        let (now, setup) = read.await.ok()??;
        self.read.lock().unwrap_or_else(PoisonError::into_inner).0 = Some(now);
        let setup = match setup {
            Ok(Ok(setup)) => setup,
            Ok(Err(error)) => return Some(Err(format!("nothing has changed: {error:#}"))),
            Err(faults) => return Some(Err(format!("nothing has changed: {faults}"))),
        };
        let tenants = setup.tenants().len();
        Some(self.observer().go_on_with(setup, &self.stop).map_err(|error| unsent(error).to_string()).map(|observer| {
            *self.observer.write().unwrap_or_else(PoisonError::into_inner) = observer;
            tenants
        }))
    }
}

fn unsent(error: String) -> anyhow::Error {
    anyhow!("notices cannot be sent: {error}")
}

/// What the admin surface shows of a watch.
struct View(Arc<Watch>);

impl HealthView for View {
    fn health(&self) -> Value {
        self.0.observer().health()
    }

    fn tenant_health(&self, slug: &str) -> Option<Value> {
        self.0.observer().health_of(slug)
    }

    fn services(&self) -> Value {
        serde_json::json!({ "services": self.0.observer().services() })
    }

    fn metrics(&self) -> String {
        self.0.observer().metrics()
    }

    fn page(&self, isolation: &[IsolationRow]) -> String {
        let rows: Vec<Isolation> = isolation
            .iter()
            .map(|row| Isolation {
                tenant: row.tenant.clone(),
                running: row.running,
                waiting: row.waiting,
                mean_wait: row.mean_wait,
                p99_wait: row.p99_wait,
                work: row.work,
                rejected: row.rejected,
                warnings: row.warnings.clone(),
            })
            .collect();
        self.0.observer().page(&rows)
    }
}

fn write_rules(setup: &Setup, directory: &Path) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let files = [
        ("cofferdam.rules.yml", rules::prometheus(setup.file.backups.is_some())),
        ("cofferdam.rules.test.yml", rules::promtool_tests("cofferdam.rules.yml", setup.file.backups.is_some())),
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
