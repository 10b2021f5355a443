//! `cofferdam serve`.

use std::process::ExitCode;

use anyhow::Context;
use cofferdam::{Gateway, Runtimes, StartError};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::args::{LogFormat, ServeArgs};
use crate::{check, exit};

pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    log(args)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    let outcome = runtime.block_on(serve(args));
    // Threads that still read a file must not hold up the exit.
    runtime.shutdown_background();
    outcome
}

async fn serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtimes = Runtimes::PerCore(args.workers.unwrap_or(cores / 2).max(1));
    // Before anything is served, or a signal in between would end the process the hard way.
    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let started = Gateway::builder().config_file(&args.config).runtimes(runtimes).watch(!args.no_watch).start().await;
    let gateway = match started {
        Ok(gateway) => gateway,
        Err(StartError::Config(faults)) => {
            check::print(&faults);
            return Ok(ExitCode::from(exit::CONFIG));
        }
        Err(other) => return Err(other.into()),
    };
    for address in gateway.http_addresses() {
        tracing::info!(plane = "http", %address, "listening");
    }
    for address in gateway.postgres_addresses() {
        tracing::info!(plane = "postgres", %address, "listening");
    }
    if let Some(address) = gateway.admin_address() {
        tracing::info!(plane = "admin", %address, "listening");
    }
    tracing::info!(tenants = gateway.catalog().tenants().len(), "ready");
    loop {
        tokio::select! {
            _ = hangup.recv() => {
                tracing::info!("SIGHUP: reading the configuration again");
                let _ = gateway.reload().await; // the library logs what happened
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    tracing::info!("draining: no new connections, what is in flight finishes");
    gateway.drain();
    let complete = tokio::select! {
        report = gateway.wait() => report.complete,
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
    };
    if complete {
        tracing::info!("drained");
        Ok(ExitCode::SUCCESS)
    } else {
        tracing::warn!("stopped before everything in flight had finished");
        Ok(ExitCode::from(exit::INCOMPLETE))
    }
}

fn log(args: &ServeArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).with_context(|| format!("--log {:?} is not a filter", args.log))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}
