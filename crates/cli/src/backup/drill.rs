//! `cofferdam drill …`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use cofferdam_backup::config::Setup;
use cofferdam_backup::drill::{SignedReport, write_report};
use cofferdam_backup::model::CheckState;
use comfy_table::{Table, presets};

use super::args::{DrillArgs, DrillCommand};
use super::progress::Shown;
use super::{print_json, seconds, tenants};
use crate::exit;

pub(super) async fn run(args: &DrillArgs, setup: Setup) -> anyhow::Result<ExitCode> {
    let DrillCommand::Run { tenants: names } = &args.command else { return Ok(ExitCode::SUCCESS) };
    let common = &args.common;
    let drills = setup.drills.as_ref();
    let mut passed = true;
    let mut all = Vec::new();
    for setup in tenants(&setup, names)? {
        let shown = Shown::new(setup.tenant.as_str(), common.quiet);
        let drill = setup.drill(drills.map_or(&[], |d| &d.check_command)).await;
        let report = match drill {
            Ok(drill) => drill.run(&shown.control).await,
            Err(error) => Err(error),
        };
        drop(shown);
        let report = match report {
            Ok(report) => report,
            Err(error @ cofferdam_backup::Error::Cancelled) => return Err(error.into()),
            // One tenant's failure is not the next one's.
            Err(error) => {
                eprintln!("cofferdam: {}: {error}", setup.tenant);
                passed = false;
                continue;
            }
        };
        passed &= report.passed;
        let signed = SignedReport::new(report, drills.and_then(|d| d.key.as_deref()));
        if !common.json {
            show(&signed);
        }
        if let Some(drills) = drills {
            let path = write_report(&drills.reports, &signed)?;
            eprintln!("report: {}", path.display());
        }
        all.push(signed);
    }
    if common.json {
        print_json(&all)?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILED) })
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
