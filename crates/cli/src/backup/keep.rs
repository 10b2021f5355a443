//! `cofferdam backup …`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use cofferdam_backup::config::{Setup, TenantSetup};
use cofferdam_backup::model::{BackupSet, LegalHold, LockAttestation};
use cofferdam_backup::repository::Depth;
use cofferdam_backup::runner::{self, Runner, Told};
use cofferdam_backup::{Control, interchange};
use comfy_table::{CellAlignment, Table, presets};
use jiff::Timestamp;

use super::args::{BackupArgs, BackupCommand, Common};
use super::progress::{Shown, stop_signal};
use super::{find, print_json, seconds, size, tenant, tenants};
use crate::exit;

pub(super) async fn run(args: &BackupArgs, setup: Setup) -> anyhow::Result<ExitCode> {
    let common = &args.common;
    match &args.command {
        BackupCommand::Now { tenants: names } => now(common, &setup, names).await,
        BackupCommand::Run { once, textfile } => by_schedule(setup, *once, textfile.as_deref()).await,
        BackupCommand::List { tenant: Some(name) } => {
            let setup = tenant(&setup, name)?;
            let sets = runner::sets(setup).await?;
            let listed = list(common, &sets)?;
            if !common.json {
                gaps(setup, &sets);
            }
            Ok(listed)
        }
        BackupCommand::List { tenant: None } => overview(common, &setup).await,
        BackupCommand::Show { tenant: name, set } => {
            let setup = tenant(&setup, name)?;
            let set = if let Some(id) = set {
                find(setup, id).await?
            } else {
                let repository = runner::open(setup).await?;
                let point = cofferdam_backup::model::RestorePoint::Latest;
                tokio::task::spawn_blocking(move || repository.set_at(&point)).await??
            };
            if common.json {
                print_json(&set)?;
            } else {
                show(&set);
            }
            Ok(ExitCode::SUCCESS)
        }
        BackupCommand::Verify { tenants: names, read_data } => verify(common, &setup, names, *read_data).await,
        BackupCommand::Forget { tenant: name, sets, yes } => forget(common, tenant(&setup, name)?, sets, *yes).await,
        BackupCommand::Prune { tenants: names } => {
            let mut all = Vec::new();
            for setup in tenants(&setup, names)? {
                let pruned = runner::prune(setup, runner::PRUNE_GRACE).await?;
                if !common.json {
                    println!("{}: {} freed or marked to be freed", setup.tenant, size(pruned.freed_bytes));
                }
                all.push(serde_json::json!({ "tenant": setup.tenant, "pruned": pruned }));
            }
            if common.json {
                print_json(&all)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        BackupCommand::Hold { tenant: name, set, reason, by } => {
            let setup = tenant(&setup, name)?;
            let (set, repository) = (find(setup, set).await?, runner::open(setup).await?);
            let hold = LegalHold { reason: reason.clone(), by: by.clone(), since: Timestamp::now() };
            let id = set.id.clone();
            tokio::task::spawn_blocking(move || repository.hold(&id, &hold)).await??;
            println!("{}: backup {} is held until it is released", setup.tenant, set.id.short());
            Ok(ExitCode::SUCCESS)
        }
        BackupCommand::Release { tenant: name, set } => {
            let setup = tenant(&setup, name)?;
            let (set, repository) = (find(setup, set).await?, runner::open(setup).await?);
            let id = set.id.clone();
            tokio::task::spawn_blocking(move || repository.release(&id)).await??;
            println!("{}: backup {} is not held any more", setup.tenant, set.id.short());
            Ok(ExitCode::SUCCESS)
        }
        BackupCommand::Export { tenant: name, file, point } => {
            let setup = tenant(&setup, name)?;
            let repository = runner::open(setup).await?;
            let shown = Shown::new(name, common.quiet);
            let point = super::restore::point_of(point);
            let exported = interchange::export(&repository, &point, setup.server(), file, &shown.control).await?;
            drop(shown);
            if common.json {
                print_json(&exported)?;
            } else {
                let (path, bytes) = (exported.path.display(), size(exported.bytes));
                println!("{name}: {path} has backup {} and {} files, {bytes}", exported.set.id.short(), exported.files);
            }
            Ok(ExitCode::SUCCESS)
        }
        BackupCommand::Check => {
            println!("{}: ok ({} tenants)", common.config.display(), setup.tenants.len());
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn now(common: &Common, setup: &Setup, names: &[String]) -> anyhow::Result<ExitCode> {
    let mut sets = Vec::new();
    let mut failed = false;
    for setup in tenants(setup, names)? {
        let shown = Shown::new(setup.tenant.as_str(), common.quiet);
        let outcome = match setup.backup().await {
            Ok(backup) => backup.run(&shown.control).await,
            Err(error) => Err(error),
        };
        drop(shown);
        match outcome {
            Ok(set) => {
                failed |= !is_good(&set);
                if !common.json {
                    println!("{}", line(&set));
                }
                sets.push(set);
            }
            Err(cofferdam_backup::Error::Cancelled) => {
                eprintln!("cofferdam: {}: {}", setup.tenant, cofferdam_backup::Error::Cancelled);
                return Ok(ExitCode::from(exit::FAILED));
            }
            // One tenant's failure is not the next one's.
            Err(error) => {
                eprintln!("cofferdam: {}: {error}", setup.tenant);
                failed = true;
            }
        }
    }
    if common.json {
        print_json(&sets)?;
    }
    Ok(if failed { ExitCode::from(exit::FAILED) } else { ExitCode::SUCCESS })
}

/// Everything is in it, and it is locked where that was asked for.
fn is_good(set: &BackupSet) -> bool {
    set.consistency.is_complete() && !matches!(set.lock, LockAttestation::NotLocked { .. })
}

fn line(set: &BackupSet) -> String {
    let mut text = format!(
        "{}: backup {} {}: {} files and {} of database, {} new, {} stored, {}",
        set.tenant,
        set.id.short(),
        set.consistency,
        set.filestore.files,
        size(set.artifact.bytes),
        size(set.stored.new_bytes),
        size(set.stored.stored_bytes),
        seconds(set.phases.total_ms)
    );
    if let Some(note) = &set.note {
        text.push_str(&format!(" ({note})"));
    }
    if let LockAttestation::NotLocked { reason } = &set.lock {
        text.push_str(&format!("; NOT LOCKED: {reason}"));
    }
    text
}

async fn by_schedule(setup: Setup, once: bool, textfile: Option<&Path>) -> anyhow::Result<ExitCode> {
    let control = Control::default();
    let stop = control.clone();
    tokio::spawn(async move {
        if stop_signal().await.is_ok() {
            eprintln!("stopping; once more to end at once");
            stop.cancel();
        }
        if stop_signal().await.is_ok() {
            // The work had its chance. What it leaves behind looks like nothing.
            std::process::abort();
        }
    });
    if let Some(path) = textfile {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let (handle, path) = (recorder.handle(), path.to_owned());
        metrics::set_global_recorder(recorder)?;
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(5)).await;
                // Whole or not at all: the collector may read at any time.
                let beside = path.with_extension("unfinished");
                let text = handle.render();
                if tokio::fs::write(&beside, text).await.is_ok() {
                    let _ = tokio::fs::rename(&beside, &path).await;
                }
            }
        });
    }
    let mut failed = false;
    Runner::new(Arc::new(setup), control)
        .run(once, |told| match told {
            Told::Begun { tenant, missed: 0 } => println!("{tenant}: begun"),
            Told::Begun { tenant, missed } => {
                println!("{tenant}: begun; {missed} scheduled runs before it were missed");
            }
            Told::Done { set, forgotten } => {
                failed |= !is_good(&set);
                println!(
                    "{}{}",
                    line(&set),
                    if forgotten > 0 { format!("; {forgotten} older forgotten") } else { String::new() }
                );
            }
            Told::Drilled { report, path } => {
                failed |= !report.report.passed;
                let verdict = if report.report.passed { "passed" } else { "FAILED" };
                println!("{}: drill {verdict}: {}", report.report.tenant, path.display());
            }
            Told::Failed { tenant, error } => {
                failed = true;
                eprintln!("{tenant}: failed: {error}");
            }
            _ => {}
        })
        .await;
    Ok(if once && failed { ExitCode::from(exit::FAILED) } else { ExitCode::SUCCESS })
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header.iter().copied());
    table
}

fn list(common: &Common, sets: &[BackupSet]) -> anyhow::Result<ExitCode> {
    if common.json {
        print_json(&sets)?;
        return Ok(ExitCode::SUCCESS);
    }
    if sets.is_empty() {
        println!("no backups");
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = table(&["backup", "taken", "consistency", "files", "total", "stored", "took", ""]);
    for set in sets {
        let mut remarks = Vec::new();
        if set.hold.is_some() {
            remarks.push("held".to_owned());
        }
        match &set.lock {
            LockAttestation::Locked { until, .. } => remarks.push(format!("locked until {}", minute(*until))),
            LockAttestation::NotLocked { .. } => remarks.push("NOT LOCKED".to_owned()),
            LockAttestation::NotAsked => {}
        }
        table.add_row([
            set.id.short().to_owned(),
            minute(set.taken_at),
            set.consistency.to_string(),
            set.filestore.files.to_string(),
            size(set.stored.total_bytes),
            size(set.stored.stored_bytes),
            seconds(set.phases.total_ms),
            remarks.join(", "),
        ]);
    }
    right(&mut table, &[3, 4, 5, 6]);
    println!("{table}");
    Ok(ExitCode::SUCCESS)
}

/// What of the last week cannot be recovered although it should. Older sets are let go on purpose.
fn gaps(setup: &TenantSetup, sets: &[BackupSet]) {
    let (now, rpo) = (Timestamp::now(), setup.policy.objective.rpo);
    let week = now - jiff::SignedDuration::from_hours(7 * 24);
    let allowed = jiff::SignedDuration::try_from(rpo.0).unwrap_or(jiff::SignedDuration::MAX);
    let window = cofferdam_backup::plan::logical_window(sets, allowed, now);
    for gap in window.gaps.iter().filter(|gap| gap.to.is_none_or(|to| to > week)) {
        let to = gap.to.map_or_else(|| "now".to_owned(), minute);
        println!("gap: {} from {} to {to}, longer than the objective of {rpo}", gap.reason, minute(gap.from));
    }
}

async fn overview(common: &Common, setup: &Setup) -> anyhow::Result<ExitCode> {
    let mut rows = Vec::new();
    let mut table = table(&["tenant", "backups", "newest complete", "loss now", "objective", "next"]);
    let now = Timestamp::now();
    for setup in &setup.tenants {
        let (sets, problem) = match runner::sets(setup).await {
            Ok(sets) => (sets, None),
            Err(cofferdam_backup::Error::Repository(cofferdam_backup::repository::RepositoryError::Absent {
                ..
            })) => (Vec::new(), None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let newest = sets.iter().rev().find(|set| set.consistency.is_complete()).map(|set| set.taken_at);
        let loss = runner::loss_now(setup, &sets, now).await.map(|loss| loss.as_secs());
        let rpo = setup.policy.objective.rpo;
        let met = loss.is_some_and(|loss| u64::try_from(loss).unwrap_or(0) <= rpo.0.as_secs());
        let last = sets.iter().map(BackupSet::began_at).max();
        let due = cofferdam_backup::plan::due(&setup.policy.schedule, setup.tenant.as_str(), last, now, now);
        table.add_row([
            setup.tenant.to_string(),
            problem.clone().unwrap_or_else(|| sets.len().to_string()),
            newest.map_or_else(|| "none".to_owned(), minute),
            loss.map_or_else(|| "everything".to_owned(), |s| format!("{} h {:02} min", s / 3_600, s % 3_600 / 60)),
            format!("{rpo}{}", if met { "" } else { " MISSED" }),
            due.map_or_else(|e| e.to_string(), |due| minute(due.at)),
        ]);
        rows.push(serde_json::json!({
            "tenant": setup.tenant, "backups": sets.len(), "newest_complete": newest, "loss_seconds": loss,
            "rpo_seconds": rpo.0.as_secs(), "rpo_met": met, "error": problem,
        }));
    }
    if common.json {
        print_json(&rows)?;
    } else {
        println!("{table}");
    }
    Ok(ExitCode::SUCCESS)
}

fn show(set: &BackupSet) {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("backup", set.id.0.clone());
    row("tenant, database", format!("{}, {}", set.tenant, set.database));
    row("state of", format!("{} (complete at {})", set.taken_at, set.finished_at));
    row("consistency", set.consistency.to_string());
    if let Some(note) = &set.note {
        row("", note.clone());
    }
    let artifact = &set.artifact;
    row("database", format!("{} dumped, {} on the server", size(artifact.bytes), size(artifact.database_bytes)));
    row("", format!("{} rows in {} tables", artifact.rows, artifact.tables));
    row("", format!("server {}, {}", artifact.server_version, artifact.dump_version));
    row("log position", artifact.lsn.clone().unwrap_or_else(|| "unknown".to_owned()));
    let files = &set.filestore;
    row("files", format!("{} with {}", files.files, size(files.bytes)));
    if files.missing + files.damaged > 0 {
        row("", format!("{} MISSING, {} DIFFER", files.missing, files.damaged));
        for example in &files.examples {
            row("", example.clone());
        }
    }
    if files.remote > 0 {
        row("", format!("{} more in an object store of Odoo's, not saved here", files.remote));
    }
    row("stored", format!("{} new, {} written", size(set.stored.new_bytes), size(set.stored.stored_bytes)));
    let (total, fence) = (seconds(set.phases.total_ms), seconds(set.phases.fence_ms));
    row("took", format!("{total}, fence up {fence}, longest wait {}", seconds(set.phases.stall_ms)));
    row("key", set.key_id.clone().unwrap_or_default());
    row(
        "lock",
        match &set.lock {
            LockAttestation::NotAsked => "none asked for".to_owned(),
            LockAttestation::Locked { mode, until, objects } => {
                format!("{mode:?} until {until}, {objects} objects read back")
            }
            LockAttestation::NotLocked { reason } => format!("NOT LOCKED: {reason}"),
        },
    );
    if let Some(hold) = &set.hold {
        row("legal hold", format!("{} (by {}, since {})", hold.reason, hold.by, hold.since));
    }
    println!("{table}");
}

async fn verify(common: &Common, setup: &Setup, names: &[String], read_data: bool) -> anyhow::Result<ExitCode> {
    let depth = if read_data { Depth::Everything } else { Depth::Structure };
    let mut all = Vec::new();
    let mut whole = true;
    for setup in tenants(setup, names)? {
        let repository = runner::open(setup).await?;
        let found = tokio::task::spawn_blocking(move || repository.verify(depth)).await??;
        whole &= found.faults.is_empty();
        if !common.json {
            let read = if read_data { format!(", {} read", size(found.bytes)) } else { String::new() };
            let verdict = if found.faults.is_empty() { "whole" } else { "DAMAGED" };
            println!("{}: {verdict}, {} backups{read}", setup.tenant, found.sets);
            for fault in &found.faults {
                println!("  {}", fault.problem);
            }
        }
        all.push(serde_json::json!({ "tenant": setup.tenant, "verification": found }));
    }
    if common.json {
        print_json(&all)?;
    }
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILED) })
}

async fn forget(common: &Common, setup: &TenantSetup, ids: &[String], yes: bool) -> anyhow::Result<ExitCode> {
    let going = if ids.is_empty() {
        runner::forget_expired(setup, true).await?
    } else {
        let mut going = Vec::new();
        for id in ids {
            going.push(find(setup, id).await?);
        }
        going
    };
    list(common, &going)?;
    if going.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    if !yes {
        eprintln!("nothing was forgotten; say --yes to forget these {}", going.len());
        return Ok(ExitCode::SUCCESS);
    }
    let repository = runner::open(setup).await?;
    let ids: Vec<_> = going.iter().map(|set| set.id.clone()).collect();
    tokio::task::spawn_blocking(move || repository.forget(&ids)).await??;
    eprintln!("forgotten; `cofferdam backup prune` frees their room");
    Ok(ExitCode::SUCCESS)
}

fn minute(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M UTC").to_string()
}

fn right(table: &mut Table, columns: &[usize]) {
    for column in columns {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}
