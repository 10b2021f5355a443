//! `cofferdam health`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use cofferdam::tenant::{Catalog, Diagnostic, Diagnostics, Source};
use cofferdam::{SystemSecrets, load_sources};
use cofferdam_health::alert::{AlertOptions, Alerts, Notice, Phase};
use cofferdam_health::config::Setup;
use cofferdam_health::engine::Picture;
use cofferdam_health::metrics::{Sources, render};
use cofferdam_health::model::{Status, Subject};
use cofferdam_health::sink::Sinks;
use cofferdam_health::slo::{Budget, Counts};
use cofferdam_health::{Watcher, explain, rules, service};
use comfy_table::{Table, presets};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::exit;

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
    },
    /// Say in words why a tenant is unwell: the likely cause first.
    Explain {
        /// Which.
        tenant: String,
    },
    /// Write Prometheus' rules with their unit tests, and Grafana's dashboards.
    Rules {
        /// The directory for the files.
        #[arg(long, value_name = "DIRECTORY", default_value = ".")]
        directory: PathBuf,
    },
}

/// How often is told what has changed.
const STEP: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &HealthArgs) -> anyhow::Result<ExitCode> {
    let setup = match read(&args.config) {
        Ok(setup) => setup,
        Err(faults) => {
            crate::check::print(&faults);
            return Ok(ExitCode::from(exit::CONFIG));
        }
    };
    if let HealthCommand::Rules { directory } = &args.command {
        return write_rules(&setup, directory);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(async {
        match &args.command {
            HealthCommand::Check { all } => check(&setup, *all, args.json).await,
            HealthCommand::Watch { textfile } => watch(&setup, textfile.as_deref()).await,
            HealthCommand::Explain { tenant } => tell_why(&setup, tenant).await,
            HealthCommand::Rules { .. } => Ok(ExitCode::SUCCESS),
        }
    })
}

fn read(path: &Path) -> Result<Setup, Diagnostics> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Diagnostics(vec![Diagnostic::file_level(path, error.to_string(), "a readable YAML file in UTF-8")])
    })?;
    let source = Source::new(path, text);
    let catalog = match Setup::catalog_of(&source) {
        Some(catalog) => {
            let main = path.parent().unwrap_or(Path::new(".")).join(catalog);
            Some(Catalog::build(&load_sources(&main)?, &SystemSecrets::beside(&main), None)?)
        }
        None => None,
    };
    Setup::read(&source, catalog.as_ref(), &SystemSecrets::beside(path))
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

async fn watch(setup: &Setup, textfile: Option<&Path>) -> anyhow::Result<ExitCode> {
    let watcher = setup.watcher(false);
    let stop = CancellationToken::new();
    let looking = tokio::spawn({
        let (watcher, stop) = (watcher.clone(), stop.clone());
        async move { watcher.run(&stop).await }
    });
    let notices = &setup.file.notices;
    let mut sinks = Sinks::new(notices.webhook.as_deref(), notices.alertmanager.as_deref())
        .map_err(|error| anyhow!("notices cannot be sent: {error}"))?;
    let defaults = AlertOptions::default();
    let mut told = Told {
        alerts: Alerts::new(AlertOptions {
            // Sooner, a cause may not have been seen yet, and its consequences would be told instead.
            after: notices.after.map_or(defaults.after, |after| after.0).max(setup.file.interval.0 * 2),
            repeat: notices.repeat.map_or(defaults.repeat, |repeat| repeat.0),
            ..defaults
        }),
        counts: BTreeMap::new(),
        looks: BTreeMap::new(),
        counted: Timestamp::now(),
    };
    println!("watching {} tenants", setup.objectives.len());
    loop {
        tokio::select! {
            () = tokio::time::sleep(STEP) => {}
            signal = crate::backup::stop_signal() => {
                signal?;
                stop.cancel();
                looking.await?;
                return Ok(ExitCode::SUCCESS);
            }
        }
        let notices = told.step(setup, &watcher, textfile).await?;
        for notice in &notices {
            let word = if notice.phase == Phase::Firing { "TROUBLE" } else { "over" };
            println!("{} {word} [{:?}] {}", Timestamp::now().strftime("%H:%M:%S"), notice.urgency, notice.summary);
        }
        for problem in sinks.send(&notices).await {
            eprintln!("cofferdam: a notice was not sent yet: {problem}");
        }
    }
}

/// What a watch remembers.
struct Told {
    alerts: Alerts,
    counts: BTreeMap<String, Counts>,
    looks: BTreeMap<String, (u64, u64)>,
    counted: Timestamp,
}

impl Told {
    async fn step(&mut self, setup: &Setup, watcher: &Watcher, textfile: Option<&Path>) -> anyhow::Result<Vec<Notice>> {
        let now = Timestamp::now();
        let picture = watcher.picture(now);
        // Each interval counts once: could the tenant be worked with?
        if now.duration_since(self.counted).unsigned_abs() >= setup.file.interval.0 {
            self.counted = now;
            for tenant in setup.objectives.keys() {
                let subject = Subject::Tenant(tenant.clone());
                let mut asked = picture.of(&subject).filter(|s| matches!(s.check.aspect.as_str(), "database" | "page"));
                let Some(first) = asked.next() else { continue };
                let good = first.status != Status::Fail && asked.all(|state| state.status != Status::Fail);
                self.counts.entry(tenant.clone()).or_default().add(now, good);
                let looks = self.looks.entry(tenant.clone()).or_default();
                if good { looks.0 += 1 } else { looks.1 += 1 }
            }
        }
        let budget = |(tenant, counts): (&String, &Counts)| {
            let objective = setup.objectives.get(tenant).copied()?;
            Some((tenant.clone(), Budget::of(counts, objective, now)))
        };
        let budgets: BTreeMap<String, Budget> = self.counts.iter().filter_map(budget).collect();
        if let Some(path) = textfile {
            let services = service::states(&setup.file.services, &picture);
            let sources = Sources {
                picture: &picture,
                services: &services,
                budgets: &budgets,
                looks: &self.looks,
                calendars: &setup.calendars,
            };
            // Whole or not at all: the collector may read at any time.
            let beside = path.with_extension("unfinished");
            tokio::fs::write(&beside, render(&sources, now)).await.with_context(|| beside.display().to_string())?;
            tokio::fs::rename(&beside, path).await.with_context(|| path.display().to_string())?;
        }
        Ok(self.alerts.step(now, &picture, &budgets, &setup.calendars))
    }
}

fn write_rules(setup: &Setup, directory: &Path) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let options = rules::RuleOptions { availability: setup.file.availability / 100.0 };
    let files = [
        ("cofferdam.rules.yml", rules::prometheus(options)),
        ("cofferdam.rules.test.yml", rules::promtool_tests("cofferdam.rules.yml")),
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
