//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Keeps many Odoo tenants on shared servers from drowning each other.
///
/// Cofferdam stands in front of the shared Odoo workers (HTTP) and of the shared PostgreSQL server (wire protocol),
/// knows which tenant every request and every transaction belongs to, and decides who goes next.
#[derive(Debug, Parser)]
#[command(name = "cofferdam", version, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  success
  1  something failed; the message says what
  2  the command line is wrong
  3  the configuration has errors; all of them are printed
  4  the gateway was stopped before everything in flight had finished

See it work:      cofferdam demo
Start for real:   cofferdam check cofferdam.yaml && cofferdam serve --config cofferdam.yaml";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the gateway until SIGTERM or Ctrl-C.
    Serve(ServeArgs),
    /// Check a configuration as a whole and print every error in it.
    Check(CheckArgs),
    /// Show what a noisy neighbour does without Cofferdam, and with it.
    Demo(DemoArgs),
    /// Print the JSON Schema of a configuration file, for editors.
    Schema {
        /// Which file.
        kind: SchemaKind,
    },
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Run the gateway until SIGTERM or Ctrl-C.
///
/// SIGHUP, a changed file and `POST /api/v1/reload` read the configuration again; a configuration with errors changes
/// nothing. SIGTERM drains: no new connections, everything in flight finishes, exit code 0. A second signal ends at once.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The main configuration file.
    #[arg(short, long, env = "COFFERDAM_CONFIG", default_value = "cofferdam.yaml")]
    pub(crate) config: PathBuf,
    /// Threads that serve, each with sockets of its own. Default: one per core.
    #[arg(short, long)]
    pub(crate) workers: Option<usize>,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    /// What is logged, such as `info`, `debug` or `cofferdam_http=debug,info`.
    #[arg(long, env = "COFFERDAM_LOG", default_value = "info")]
    pub(crate) log: String,
    /// Do not reload by itself when a configuration file changes.
    #[arg(long)]
    pub(crate) no_watch: bool,
}

/// Check a configuration as a whole and print every error in it.
///
/// Reads the main file and every tenant. Each error is one line, `file:line:column: field: found …, expected …`,
/// followed by the line of the file. Exit code 3 when there is any.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The main configuration file.
    #[arg(env = "COFFERDAM_CONFIG", default_value = "cofferdam.yaml")]
    pub(crate) config: PathBuf,
    /// Print the result as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show what a noisy neighbour does without Cofferdam, and with it.
///
/// Starts a private PostgreSQL, a miniature Odoo with few workers, and the gateway with five quiet tenants and one noisy
/// one, all on free ports in a temporary directory. Three phases: the quiet tenants alone; with the noisy one, first come
/// first served; with the noisy one, fair. Everything is gone when it ends, also after Ctrl-C.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// How long the three phases take together.
    #[arg(long, default_value_t = 45, value_parser = clap::value_parser!(u64).range(9..=3600))]
    pub(crate) seconds: u64,
    /// Never redraw: print the tables one below the other, as without a terminal.
    #[arg(long)]
    pub(crate) plain: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// For machines: one JSON object per line.
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SchemaKind {
    /// `cofferdam.yaml`.
    Gateway,
    /// A tenant's file.
    Tenant,
}
