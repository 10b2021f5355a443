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
    /// Watch the tenants that use most, live.
    Top(TopArgs),
    /// Measure: the isolation of tenants and the cost of pooling beside peers, or scheduling policies in simulation.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Save tenants, database and files, and look after what was saved.
    Backup(crate::backup::args::BackupArgs),
    /// Bring a tenant's state back: beside, as a new tenant, or in place.
    Restore(crate::backup::args::RestoreArgs),
    /// Try whether backups can be restored, and how fast.
    Drill(crate::backup::args::DrillArgs),
    Health(crate::health::HealthArgs),
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
/// nothing. SIGUSR2, with `--handover`, starts a successor that takes over the listening sockets. SIGTERM drains: no new connections, everything in flight finishes, exit code 0. A second signal ends at once.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The main configuration file.
    #[arg(short, long, env = "COFFERDAM_CONFIG", default_value = "cofferdam.yaml")]
    pub(crate) config: PathBuf,
    /// Threads that serve, each with sockets of its own. Default: half as many as cores; the servers need the rest.
    #[arg(short, long)]
    pub(crate) workers: Option<usize>,
    /// These threads take a core from everything else on the machine as soon as they have something to do (`SCHED_RR`). Needs CAP_SYS_NICE; for a
    /// gateway that has Odoo on its own machine.
    #[arg(long, env = "COFFERDAM_REAL_TIME", value_parser = clap::builder::FalseyValueParser::new())]
    pub(crate) real_time: bool,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    /// What is logged, such as `info`, `debug` or `cofferdam_http=debug,info`.
    #[arg(long, env = "COFFERDAM_LOG", default_value = "info")]
    pub(crate) log: String,
    /// Do not reload by itself when a configuration file changes.
    #[arg(long)]
    pub(crate) no_watch: bool,
    /// A Unix socket for restarts without loss: the listening sockets are taken from the gateway that offers them there, and offered to the next.
    #[arg(long, env = "COFFERDAM_HANDOVER", value_name = "PATH")]
    pub(crate) handover: Option<PathBuf>,
    /// Watch health too, as this file says, and show it on the admin listener: a page at `/`, `/api/v1/health`, metrics.
    #[arg(long, env = "COFFERDAM_HEALTH_CONFIG", value_name = "PATH")]
    pub(crate) health: Option<PathBuf>,
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

/// Watch the tenants that use most, live.
///
/// Asks the admin listener of a running gateway every second. `http s/s` and `sql s/s` are seconds of work per second on
/// either plane: how many slots a tenant kept busy. `run` is slots held and the limit of the plan, `wait` is work waiting,
/// `ms` how long granted work had waited. A line with `!` says which quota is nearly used up. Ends with Ctrl-C.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Host and port of the admin listener.
    #[arg(long, env = "COFFERDAM_ADMIN", default_value = "127.0.0.1:9180")]
    pub(crate) admin: String,
    /// File with the bearer token, when the admin listener wants one.
    #[arg(long)]
    pub(crate) token_file: Option<PathBuf>,
    /// The bearer token itself; better in a file.
    #[arg(long, env = "COFFERDAM_ADMIN_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Tenants shown.
    #[arg(short, long, default_value_t = 20)]
    pub(crate) tenants: usize,
    /// Seconds between two looks.
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) interval: u64,
    /// Print once and end.
    #[arg(long)]
    pub(crate) once: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// How much a noisy neighbour costs the others, on real servers, beside peers.
    Isolation(IsolationArgs),
    /// What a pooler costs: pgbench directly, through PgBouncer and through Cofferdam.
    Postgres(ThroughputArgs),
    /// What a proxy costs: wrk directly, through NGINX, HAProxy and Cofferdam.
    Http(WebArgs),
    /// What looking after many tenants costs: processor time, memory, connections, series.
    Health(WatchCostArgs),
    /// The scheduling policies, simulated: the same result on every machine.
    Simulate(SimulateArgs),
    /// A worker of the miniature Odoo, which starts it.
    #[command(hide = true)]
    OdooWorker,
}

/// What a pooler costs: pgbench directly, through PgBouncer and through Cofferdam.
///
/// All with 20 connections to one private PostgreSQL, in turn, several times; medians are printed, with the processor
/// time that the pooler itself used per transaction. Then idle clients are weighed. PgBouncer must be installed:
/// `make install-bench`.
#[derive(Debug, Args)]
pub(crate) struct ThroughputArgs {
    /// What a transaction is.
    #[arg(long, value_enum, default_values_t = [BenchScript::Select, BenchScript::Tpcb])]
    pub(crate) script: Vec<BenchScript>,
    /// How statements are sent.
    #[arg(long, value_enum, default_values_t = [BenchProtocol::Simple, BenchProtocol::Extended, BenchProtocol::Prepared])]
    pub(crate) protocol: Vec<BenchProtocol>,
    /// Clients at once.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64, 512], value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) clients: Vec<u32>,
    /// How long one measurement takes.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(crate) seconds: u64,
    /// How often each is repeated.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=99))]
    pub(crate) rounds: u16,
    /// How many idle clients to weigh; 0 for none.
    #[arg(long, value_delimiter = ',', default_values_t = [1000, 9000], value_parser = clap::value_parser!(u32).range(0..=11_000))]
    pub(crate) idle: Vec<u32>,
    /// Leave out what is without a pooler, and PgBouncer as two processes.
    #[arg(long)]
    pub(crate) brief: bool,
    /// PgBouncer's program; before 1.21 it cannot take part in `prepared`.
    #[arg(long, default_value = "pgbouncer")]
    pub(crate) pgbouncer: PathBuf,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write a picture to this file.
    #[arg(long)]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchScript {
    /// One row by its key.
    Select,
    /// Seven statements, three of them updates.
    Tpcb,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchProtocol {
    /// Text in one message.
    Simple,
    /// Parse, Bind, Execute each time.
    Extended,
    /// Parse once by name.
    Prepared,
}

/// What looking after many tenants costs.
///
/// `cofferdam health watch` looks at so many tenants of one private PostgreSQL; counted is what that takes of a processor.
#[derive(Debug, Args)]
pub(crate) struct WatchCostArgs {
    /// Tenants that are looked at.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub(crate) tenants: u32,
    /// Databases that they have.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub(crate) databases: u32,
    /// How often each is looked at, in seconds.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) interval: u64,
    /// How long is measured, in seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: u64,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a proxy costs, beside NGINX, HAProxy and the engine without our logic.
///
/// `wrk` asks an origin that closes each connection, as Odoo's workers do, through each of them in turn. Peers must be
/// installed: `make install-bench`.
#[derive(Debug, Args)]
pub(crate) struct WebArgs {
    /// Measure only these.
    #[arg(long, value_enum)]
    pub(crate) load: Vec<BenchLoad>,
    /// Connections of the load.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64, 512], value_parser = clap::value_parser!(u32).range(1..=4000))]
    pub(crate) connections: Vec<u32>,
    /// How long one measurement takes.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(crate) seconds: u64,
    /// How often each is repeated; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=99))]
    pub(crate) rounds: u16,
    /// How many idle connections to weigh; 0 for none.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(0..=15_000))]
    pub(crate) idle: u32,
    /// The example `bare_pingora` of `cofferdam-http`: the engine without our logic.
    #[arg(long)]
    pub(crate) bare: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchLoad {
    /// 1 KB over connections that are kept.
    Small,
    /// 1 KB, each over a new connection.
    New,
    /// 1 MB.
    Large,
    /// 1 KB over TLS.
    Tls,
    /// 1 KB that may be kept by the proxy.
    Cached,
}

/// How much a noisy neighbour costs the others, on real servers, beside peers.
///
/// Eight tenants want 20 transactions a second each. They are measured alone, and then beside one tenant with 60 clients or
/// four with 20 each, whose work sleeps, computes, or comes in a storm of short pieces: directly, through the peer and
/// through Cofferdam, one after the other in the same run. Peers must be installed: `make install-bench`.
#[derive(Debug, Args)]
pub(crate) struct IsolationArgs {
    /// What stands between the tenants and the servers.
    #[arg(long, value_enum, default_value_t = BenchPlane::Postgres)]
    pub(crate) plane: BenchPlane,
    /// Measure only these beside Cofferdam. Default: all that exist for the plane, and none at all (`direct`).
    #[arg(long, value_enum)]
    pub(crate) peer: Vec<BenchPeer>,
    /// Measure only this kind of aggressor.
    #[arg(long, value_enum)]
    pub(crate) workload: Vec<BenchWorkload>,
    /// How many aggressors: 1 has 60 clients, several have 20 each.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4], value_parser = clap::value_parser!(u32).range(1..=4))]
    pub(crate) aggressors: Vec<u32>,
    /// How long the victims are measured alone, and then contended.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(2..=600))]
    pub(crate) seconds: u64,
    /// Also measure what one aggressor gets done when it is alone, against first come first served; on one plane.
    #[arg(long)]
    pub(crate) alone: bool,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write a picture to this file.
    #[arg(long)]
    pub(crate) svg: Option<PathBuf>,
}

/// The scheduling policies, simulated: the same result on every machine.
#[derive(Debug, Args)]
pub(crate) struct SimulateArgs {
    /// Every random choice follows from it.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Also 100,000 tenants on 1,000 slots; takes some seconds.
    #[arg(long)]
    pub(crate) large: bool,
    /// Write a picture to this file.
    #[arg(long)]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchPlane {
    /// PostgreSQL.
    Postgres,
    /// HTTP, with a miniature Odoo that needs no database.
    Http,
    /// HTTP, with PostgreSQL behind it.
    Both,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchPeer {
    /// PgBouncer in transaction mode, with pools of 20 and of 4 per database.
    Pgbouncer,
    /// HAProxy with priorities in its queue.
    Haproxy,
    /// NGINX with a limit per tenant.
    Nginx,
    /// Nothing in between.
    Direct,
    /// Cofferdam without setting priorities of the server's processes.
    Plain,
    /// Cofferdam with priorities and a core that storms and expensive work leave alone; PostgreSQL only.
    Spare,
    /// Cofferdam with priorities, its threads in real time (`serve --real-time`).
    RealTime,
    /// Cofferdam without its scheduler.
    Fifo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchWorkload {
    /// Long work that only waits.
    Sleep,
    /// Long work that computes.
    Burn,
    /// Short work without a pause.
    Storm,
    /// Short work that writes, without a pause; PostgreSQL only.
    Write,
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
    /// `backup.yaml`.
    Backup,
    /// `health.yaml`.
    Health,
}
