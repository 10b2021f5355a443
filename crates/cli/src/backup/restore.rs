//! `cofferdam restore …`.

use std::process::ExitCode;

use anyhow::anyhow;
use cofferdam_backup::config::Setup;
use cofferdam_backup::interchange::{Identity, Import};
use cofferdam_backup::model::{RestoreMode, RestorePlan, RestorePoint, Restored, SetId};

use super::args::{Common, Point, RestoreArgs, RestoreCommand};
use super::progress::Shown;
use super::{agreed, print_json, seconds, size, tenant};

pub(super) async fn run(args: &RestoreArgs, setup: Setup) -> anyhow::Result<ExitCode> {
    let common = &args.common;
    match &args.command {
        RestoreCommand::Plan { tenant: name, point } => {
            let restore = tenant(&setup, name)?.restore().await?;
            let plan = restore.plan(&point_of(point), &RestoreMode::InPlaceSwap).await?;
            if common.json {
                print_json(&plan)?;
            } else {
                show(&plan);
            }
            Ok(ExitCode::SUCCESS)
        }
        RestoreCommand::Scratch { tenant: name, point } => {
            carry_out(common, &setup, name, point, RestoreMode::Scratch, None).await
        }
        RestoreCommand::New { tenant: name, database, base_url, keep_integrations, point } => {
            let mode = RestoreMode::NewTenant {
                database: database.clone(),
                base_url: base_url.clone(),
                keep_integrations: *keep_integrations,
            };
            carry_out(common, &setup, name, point, mode, None).await
        }
        RestoreCommand::Swap { tenant: name, point, yes } => {
            carry_out(common, &setup, name, point, RestoreMode::InPlaceSwap, Some(*yes)).await
        }
        RestoreCommand::Pitr { tenant: name, at, swap, yes } => {
            let setup = tenant(&setup, name)?;
            let recovery = setup.recovery(*at).ok_or_else(|| {
                anyhow!("{name}: its server has no `pgbackrest` in the configuration, so there is no log to go back in")
            })?;
            let mode = if *swap { RestoreMode::InPlaceSwap } else { RestoreMode::Scratch };
            if *swap {
                eprintln!("{name} goes back to its state at {at}; what is there now is kept");
                agreed(name, *yes)?;
            }
            let restore = setup.restore().await?;
            let shown = Shown::new(name, common.quiet);
            let restored = restore.to_time(&recovery, &mode, &shown.control).await?;
            drop(shown);
            told(common, name, &restored)
        }
        RestoreCommand::Import { tenant: name, file, copy, base_url, keep_integrations } => {
            let identity = if *copy {
                Identity::Copied { base_url: base_url.clone(), keep_integrations: *keep_integrations }
            } else {
                Identity::Moved
            };
            let import = Import { restore: tenant(&setup, name)?.restore().await?, file: file.clone(), identity };
            let shown = Shown::new(name, common.quiet);
            let restored = import.run(&shown.control).await?;
            drop(shown);
            told(common, name, &restored)
        }
        RestoreCommand::Revert { tenant: name, previous, yes } => {
            let restore = tenant(&setup, name)?.restore().await?;
            let previous = if let Some(previous) = previous {
                previous.clone()
            } else {
                let newest = restore.previous().await?.pop();
                newest.ok_or_else(|| anyhow!("{name}: no swap has left anything to go back to"))?.database
            };
            eprintln!("{previous} comes back, and what is there now is kept in turn");
            agreed(name, *yes)?;
            let shown = Shown::new(name, common.quiet);
            let restored = restore.revert(&previous, &shown.control).await?;
            drop(shown);
            told(common, name, &restored)
        }
    }
}

async fn carry_out(
    common: &Common,
    setup: &Setup,
    name: &str,
    point: &Point,
    mode: RestoreMode,
    ask: Option<bool>,
) -> anyhow::Result<ExitCode> {
    let restore = tenant(setup, name)?.restore().await?;
    let point = point_of(point);
    if let Some(yes) = ask {
        let plan = restore.plan(&point, &mode).await?;
        if !yes {
            show(&plan);
        }
        agreed(name, yes)?;
    }
    let shown = Shown::new(name, common.quiet);
    let restored = restore.run(&point, &mode, &shown.control).await?;
    drop(shown);
    told(common, name, &restored)
}

pub(super) fn point_of(point: &Point) -> RestorePoint {
    match (&point.set, point.at) {
        (Some(id), _) => RestorePoint::Set { id: SetId(id.clone()) },
        (None, Some(at)) => RestorePoint::Time { at },
        (None, None) => RestorePoint::Latest,
    }
}

fn show(plan: &RestorePlan) {
    eprintln!("This would bring back the state of {} from backup {}:", plan.taken_at, plan.set.short());
    for (number, step) in plan.steps.iter().enumerate() {
        eprintln!("  {}. {step}", number + 1);
    }
    let free = plan.free_bytes.map_or_else(|| "unknown".to_owned(), size);
    eprintln!("It needs {}; free: {free}.", size(plan.needed_bytes));
}

fn told(common: &Common, name: &str, restored: &Restored) -> anyhow::Result<ExitCode> {
    if common.json {
        print_json(restored)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{name}: database {} is there, {} files, {}",
        restored.database,
        restored.files,
        seconds(restored.took_ms)
    );
    if let Some(paused) = restored.paused_ms {
        println!("transactions waited for {}", seconds(paused));
    }
    if let Some(previous) = &restored.previous {
        println!("what was there is kept as {previous}; `cofferdam restore revert {name}` brings it back");
    }
    Ok(ExitCode::SUCCESS)
}
