//! `cofferdam demo`: a noisy neighbour without protection, and with it, on real parts.

mod stage;
mod table;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use cofferdam_testkit::load::{Measured, as_fast_as_possible, at_rate};
use tokio_util::sync::CancellationToken;

use crate::args::DemoArgs;
use stage::{NOISY, QUIET, Stage};
use table::{Live, Summary};

/// Requests per second of each quiet tenant.
const QUIET_RATE: f64 = 5.0;
/// Clients of the noisy tenant, each asking again as soon as it is answered.
const NOISY_CLIENTS: usize = 16;
/// Answers still on their way when a phase ends are waited for this long.
const SETTLE: Duration = Duration::from_secs(10);

/// The three phases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Alone,
    Unprotected,
    Protected,
}

impl Phase {
    const ALL: [Self; 3] = [Self::Alone, Self::Unprotected, Self::Protected];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Alone => "1/3  the quiet tenants alone",
            Self::Unprotected => "2/3  with a noisy neighbour, first come first served",
            Self::Protected => "3/3  with a noisy neighbour, behind Cofferdam's fair queues",
        }
    }

    /// Its part of the time.
    fn seconds(self, total: u64) -> u64 {
        match self {
            Self::Alone => total / 4,
            Self::Unprotected => total * 3 / 8,
            Self::Protected => total - total / 4 - total * 3 / 8,
        }
        .max(2)
    }
}

pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start a runtime")?;
    runtime.block_on(async {
        tokio::select! {
            outcome = play(args) => outcome,
            _ = tokio::signal::ctrl_c() => {
                println!("\ninterrupted; everything that was started has been stopped");
                Ok(ExitCode::SUCCESS)
            }
        }
    })
}

async fn play(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    println!("starting a private PostgreSQL, a miniature Odoo with {} workers and the gateway …", stage::WORKERS);
    let stage = Stage::build().await?;
    println!(
        "HTTP on {}, PostgreSQL on {}, admin on {}\n",
        stage.gateway.http_addresses()[0],
        stage.gateway.postgres_addresses()[0],
        stage.gateway.admin_address().map_or_else(|| "-".to_owned(), |a| a.to_string()),
    );
    stage.warm_up().await;
    let redraw = !args.plain && std::io::stdout().is_terminal();
    let mut summary = Summary::default();
    for phase in Phase::ALL {
        stage.schedule(phase).await?;
        let outcome = run_phase(&stage, phase, Duration::from_secs(phase.seconds(args.seconds)), redraw).await;
        summary.add(phase, &outcome);
    }
    println!("{}", summary.render());
    stage.close().await;
    Ok(ExitCode::SUCCESS)
}

/// What the tenants have seen in one phase: the quiet ones, then the noisy one.
pub(crate) struct Seen {
    pub(crate) tenants: Vec<(String, Arc<Measured>)>,
    pub(crate) length: Duration,
}

async fn run_phase(stage: &Stage, phase: Phase, length: Duration, redraw: bool) -> Seen {
    let stop = CancellationToken::new();
    let mut tenants = Vec::new();
    for slug in QUIET {
        let measured = Arc::new(Measured::default());
        tokio::spawn(at_rate(stage.quiet_target(slug), QUIET_RATE, Arc::clone(&measured), stop.clone()));
        tenants.push((slug.to_owned(), measured));
    }
    let noisy = Arc::new(Measured::default());
    if phase != Phase::Alone {
        let target = stage.noisy_target();
        tokio::spawn(as_fast_as_possible(target, NOISY_CLIENTS, Arc::clone(&noisy), stop.clone()));
    }
    tenants.push((NOISY.to_owned(), noisy));
    let seen = Seen { tenants, length };
    let mut live = Live::new(stage, phase, redraw);
    live.begin(&seen);
    let end = tokio::time::Instant::now() + length;
    let mut tick = tokio::time::interval(Duration::from_secs(if redraw { 1 } else { 3 }));
    tick.tick().await;
    while tokio::time::Instant::now() < end {
        tokio::select! {
            _ = tick.tick() => live.show(&seen),
            () = tokio::time::sleep_until(end) => {}
        }
    }
    live.show(&seen);
    stop.cancel();
    // The next phase begins on an empty house.
    let deadline = tokio::time::Instant::now() + SETTLE;
    while stage.is_busy() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    seen
}
