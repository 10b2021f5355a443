//! `cofferdam backup`, `restore` and `drill`.

pub(crate) mod args;
mod drill;
mod keep;
mod progress;
mod restore;

pub(crate) use progress::stop_signal;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use cofferdam::tenant::{Catalog, Diagnostic, Diagnostics, Source};
use cofferdam::{SystemSecrets, load_sources};
use cofferdam_backup::config::{Setup, TenantSetup};
use cofferdam_backup::model::{BackupSet, RestorePoint, SetId};

use crate::exit;
use args::{BackupArgs, Common, DrillArgs, RestoreArgs};

pub(crate) fn backup(args: &BackupArgs) -> anyhow::Result<ExitCode> {
    with_setup(&args.common, |setup| keep::run(args, setup))
}

pub(crate) fn restore(args: &RestoreArgs) -> anyhow::Result<ExitCode> {
    with_setup(&args.common, |setup| restore::run(args, setup))
}

pub(crate) fn drill(args: &DrillArgs) -> anyhow::Result<ExitCode> {
    if let args::DrillCommand::Report { file, public_key } = &args.command {
        return drill::report(file, public_key.as_deref(), args.common.json);
    }
    with_setup(&args.common, |setup| drill::run(args, setup))
}

fn with_setup<F, Fut>(common: &Common, work: F) -> anyhow::Result<ExitCode>
where
    F: FnOnce(Setup) -> Fut,
    Fut: Future<Output = anyhow::Result<ExitCode>>,
{
    let setup = match read(&common.config) {
        Ok(setup) => setup,
        Err(faults) => {
            crate::check::print(&faults);
            return Ok(ExitCode::from(exit::CONFIG));
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(work(setup))
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

fn tenant<'a>(setup: &'a Setup, name: &str) -> anyhow::Result<&'a TenantSetup> {
    setup.tenant(name).ok_or_else(|| {
        let known: Vec<_> = setup.tenants.iter().map(|t| t.tenant.as_str()).collect();
        anyhow!("there is no tenant `{name}` in the configuration; there are: {}", known.join(", "))
    })
}

/// The named tenants, or all.
fn tenants<'a>(setup: &'a Setup, names: &[String]) -> anyhow::Result<Vec<&'a TenantSetup>> {
    if names.is_empty() {
        return Ok(setup.tenants.iter().collect());
    }
    names.iter().map(|name| tenant(setup, name)).collect()
}

async fn find(setup: &TenantSetup, id: &str) -> anyhow::Result<BackupSet> {
    let repository = cofferdam_backup::runner::open(setup).await?;
    let point = RestorePoint::Set { id: SetId(id.to_owned()) };
    Ok(tokio::task::spawn_blocking(move || repository.set_at(&point)).await??)
}

fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Asks a person to write a word; whoever is no person must have said `--yes`.
fn agreed(word: &str, yes: bool) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(anyhow!("nobody is here to agree; say --yes"));
    }
    eprint!("Write `{word}` to go on: ");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    if line.trim() == word { Ok(()) } else { Err(anyhow!("nothing was changed")) }
}

/// Bytes as people read them.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut amount = bytes as f64;
    let mut unit = 0;
    while amount >= 1_024.0 && unit + 1 < UNITS.len() {
        amount /= 1_024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{amount:.1} {}", UNITS[unit]) }
}

fn seconds(milliseconds: u64) -> String {
    format!("{:.1} s", milliseconds as f64 / 1_000.0)
}
