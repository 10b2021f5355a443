//! `cofferdam backup`, `restore` and `drill`.

pub(crate) mod args;
mod drill;
mod keep;
mod progress;
mod restore;

pub(crate) use progress::stop_signal;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::anyhow;
use cofferdam_backup::config::{Setup, TenantSetup};
use cofferdam_backup::model::{BackupSet, RestorePoint, SetId};

use crate::setup::File;
use args::{BackupArgs, DrillArgs, RestoreArgs};

pub(crate) fn backup(args: &BackupArgs) -> anyhow::Result<ExitCode> {
    FILE.with(&args.common.config, |setup| keep::run(args, setup))
}

pub(crate) fn restore(args: &RestoreArgs) -> anyhow::Result<ExitCode> {
    FILE.with(&args.common.config, |setup| restore::run(args, setup))
}

pub(crate) fn drill(args: &DrillArgs) -> anyhow::Result<ExitCode> {
    if let args::DrillCommand::Report { file, public_key } = &args.command {
        return drill::report(file, public_key.as_deref(), args.common.json);
    }
    FILE.with(&args.common.config, |setup| drill::run(args, setup))
}

pub(crate) const FILE: File<Setup> = File { catalog_of: Setup::catalog_of, read: Setup::read };

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
