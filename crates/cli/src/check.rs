//! `cofferdam check`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

use cofferdam::tenant::{Catalog, Diagnostics};
use cofferdam::{SystemSecrets, load_sources};

use crate::args::CheckArgs;
use crate::exit;

pub(crate) fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let secrets = SystemSecrets::beside(&args.config);
    let checked = load_sources(&args.config).and_then(|sources| Catalog::build(&sources, &secrets, None));
    if args.json {
        let report = match &checked {
            Ok(catalog) => serde_json::json!({ "ok": true, "tenants": catalog.tenants().len(), "errors": [] }),
            Err(Diagnostics(all)) => serde_json::json!({ "ok": false, "errors": all }),
        };
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        match &checked {
            Ok(catalog) => println!(
                "{}: ok ({} tenants, {} pools, {} clusters, {} plans)",
                args.config.display(),
                catalog.tenants().len(),
                catalog.pools.len(),
                catalog.clusters.len(),
                catalog.plans.len()
            ),
            Err(faults) => print(faults),
        }
    }
    Ok(if checked.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(exit::CONFIG) })
}

/// Every error with the line it is about, on standard error.
pub(crate) fn print(faults: &Diagnostics) {
    let mut files: HashMap<PathBuf, String> = HashMap::new();
    for fault in &faults.0 {
        eprintln!("error: {fault}");
        let text =
            files.entry(fault.file.clone()).or_insert_with(|| std::fs::read_to_string(&fault.file).unwrap_or_default());
        if let Some(line) = text.lines().nth(fault.line - 1).filter(|l| !l.trim().is_empty()) {
            // A secret on the line must not end up in a terminal's scrollback or a CI log, also under a misspelt key.
            let secret = ["password", "token", "secret", "login", "admin"]
                .iter()
                .any(|s| line.contains(s) || fault.field.contains(s))
                || fault.found.starts_with("the unknown field");
            if !secret {
                let number = fault.line.to_string();
                let pad = " ".repeat(number.len());
                let indent: String =
                    line.chars().take(fault.column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
                eprintln!(" {pad} |\n {number} | {line}\n {pad} | {indent}^");
            }
        }
    }
    let n = faults.0.len();
    eprintln!("{n} error{}; nothing was changed", if n == 1 { "" } else { "s" });
}
