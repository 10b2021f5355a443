//! `cofferdam drill …`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use cofferdam::tenant::HumanDuration;
use cofferdam_backup::config::{Setup, TenantSetup};
use cofferdam_backup::drill::{Drill, ReportKey, SignedReport, write_report};
use cofferdam_backup::model::{CheckState, RestoreDrill, RestorePoint};
use comfy_table::{Table, presets};

use super::args::{DrillArgs, DrillCommand};
use super::progress::Shown;
use super::{print_json, seconds, tenants};
use crate::exit;

/// How long an application's own check may take.
const CHECK: Duration = Duration::from_secs(600);

pub(super) async fn run(args: &DrillArgs, setup: Setup) -> anyhow::Result<ExitCode> {
    let DrillCommand::Run { tenants: names } = &args.command else { return Ok(ExitCode::SUCCESS) };
    let common = &args.common;
    let base = common.config.parent().unwrap_or(Path::new("."));
    let drills = setup.config.drills.as_ref();
    let key = match drills.and_then(|d| d.signing_key_file.as_ref()) {
        Some(file) => {
            let path = base.join(file);
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            Some(ReportKey::from_hex(&text).with_context(|| path.display().to_string())?)
        }
        None => None,
    };
    let mut passed = true;
    let mut all = Vec::new();
    for setup in tenants(&setup, names)? {
        let shown = Shown::new(setup.tenant.as_str(), common.quiet);
        let report = drill_of(setup, drills.map(|d| d.check_command.clone()).unwrap_or_default()).await?;
        let report = report.run(&shown.control).await.with_context(|| setup.tenant.to_string())?;
        drop(shown);
        passed &= report.passed;
        let signed = SignedReport::new(report, key.as_ref());
        if !common.json {
            show(&signed);
        }
        if let Some(drills) = drills {
            let path = write_report(&base.join(&drills.reports), &signed)?;
            eprintln!("report: {}", path.display());
        }
        all.push(signed);
    }
    if common.json {
        print_json(&all)?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILED) })
}

async fn drill_of(setup: &TenantSetup, check_command: Vec<String>) -> anyhow::Result<Drill> {
    let backup = setup.backup().await?;
    Ok(Drill {
        request: RestoreDrill {
            tenant: setup.tenant.clone(),
            point: RestorePoint::Latest,
            check_command,
            check_limit: HumanDuration(CHECK),
        },
        objective: setup.policy.objective,
        store: backup.store,
        key: backup.key,
        programs: backup.server.programs,
        place: None,
    })
}

pub(super) fn report(file: &Path, public_key: Option<&str>, json: bool) -> anyhow::Result<ExitCode> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let signed: SignedReport = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
    let genuine = public_key.map(|key| signed.is_signed_by(key));
    if json {
        print_json(&serde_json::json!({ "signed": genuine, "report": signed }))?;
    } else {
        show(&signed);
        match (genuine, &signed.signature) {
            (Some(true), _) => println!("signed by that key, and unchanged since"),
            (None, Some(signature)) => {
                println!("signature not checked: say --public-key; it claims {}", signature.public_key);
            }
            (None, None) => println!("not signed"),
            (Some(false), _) => {}
        }
    }
    if genuine == Some(false) {
        return Err(anyhow!("{}: not signed by that key, or changed since", file.display()));
    }
    Ok(ExitCode::SUCCESS)
}

fn show(signed: &SignedReport) {
    let report = &signed.report;
    let verdict = if report.passed { "passed" } else { "FAILED" };
    println!(
        "{}: drill {verdict}; recovery time {}, backup {}",
        report.tenant,
        seconds(report.rto_ms),
        report.set.short()
    );
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    for check in &report.checks {
        let state = match check.state {
            CheckState::Pass => "  ✓ pass",
            CheckState::Fail => "  ✗ FAIL",
            CheckState::Skipped => "  – skipped",
        };
        table.add_row([state, &check.name, &check.detail]);
    }
    println!("{table}");
}
