//! The binary `cofferdam`: parse arguments, read the configuration, call the library.
#![forbid(unsafe_code)]

mod args;
mod backup;
mod bench;
mod check;
mod demo;
mod health;
mod serve;
mod setup;
mod top;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Arguments, Command, SchemaKind};

/// What the exit codes mean; `--help` says the same.
pub(crate) mod exit {
    /// Something failed; the message says what.
    pub(crate) const FAILED: u8 = 1;
    /// The configuration has errors.
    pub(crate) const CONFIG: u8 = 3;
    /// The drain ended before everything in flight had finished.
    pub(crate) const INCOMPLETE: u8 = 4;
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Serve(serve) => serve::run(&serve),
        Command::Check(check) => check::run(&check),
        Command::Demo(demo) => demo::run(&demo),
        Command::Top(top) => top::run(&top),
        Command::Bench(bench) => bench::run(&bench),
        Command::Backup(args) => backup::backup(&args),
        Command::Restore(args) => backup::restore(&args),
        Command::Drill(args) => backup::drill(&args),
        Command::Health(args) => health::run(&args),
        Command::Schema { kind } => schema(kind),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "cofferdam", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("cofferdam: {error:#}");
        ExitCode::from(exit::FAILED)
    })
}

fn schema(kind: SchemaKind) -> anyhow::Result<ExitCode> {
    let schema = match kind {
        SchemaKind::Gateway => cofferdam::tenant::gateway_schema(),
        SchemaKind::Tenant => cofferdam::tenant::tenant_schema(),
        SchemaKind::Backup => cofferdam_backup::config::backup_schema(),
        SchemaKind::Health => cofferdam_health::config::health_schema(),
    };
    println!("{}", serde_json::to_string_pretty(schema)?);
    Ok(ExitCode::SUCCESS)
}
