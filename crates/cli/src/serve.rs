//! `cofferdam serve`.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use cofferdam::handover::{Offer, Predecessor, Sockets};
use cofferdam::{Gateway, Runtimes, StartError};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::args::{LogFormat, ServeArgs};
use crate::{check, exit, health};

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
    let mut replace = signal(SignalKind::user_defined2())?;
    let offer = match &args.handover {
        Some(path) => {
            Some(Offer::prepare(path).with_context(|| format!("nothing can be handed over at {}", path.display()))?)
        }
        None => None,
    };
    let (predecessor, sockets) = inherit(args)?;
    let mut builder = Gateway::builder().config_file(&args.config).runtimes(runtimes);
    builder = builder.real_time(args.real_time).watch(!args.no_watch);
    let watching = CancellationToken::new();
    let _ends_with_us = watching.clone().drop_guard();
    if let Some(path) = &args.health {
        match health::beside_gateway(path, &watching) {
            Ok(view) => builder = builder.health(view?),
            Err(faults) => {
                check::print(&faults);
                return Ok(ExitCode::from(exit::CONFIG));
            }
        }
    }
    let started = builder.inherit(sockets).start().await;
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
    for address in gateway.https_addresses() {
        tracing::info!(plane = "https", %address, "listening");
    }
    for address in gateway.postgres_addresses() {
        tracing::info!(plane = "postgres", %address, "listening");
    }
    if let Some(address) = gateway.admin_address() {
        tracing::info!(plane = "admin", %address, "listening");
    }
    tracing::info!(tenants = gateway.catalog().tenants().len(), "ready");
    tell_service_manager(&[NotifyState::MainPid(std::process::id()), NotifyState::Ready]);
    if let Some(predecessor) = predecessor {
        // It may have a lot to do; nothing here waits for it.
        tokio::task::spawn_blocking(move || match predecessor.dismiss() {
            Ok(()) => tracing::info!("the predecessor drains"),
            Err(error) => tracing::warn!(%error, "the predecessor cannot be dismissed"),
        });
    }
    let offered = offer.map(|offer| {
        let gateway = gateway.clone();
        tokio::spawn(async move {
            if let Err(error) = offer.serve(&gateway).await {
                tracing::error!(%error, "the listening sockets cannot be offered to a successor any more");
                // Not the end: everything else works.
                std::future::pending::<()>().await;
            }
        })
    });
    let mut taken_over = std::pin::pin!(async {
        match offered {
            Some(offered) => drop(offered.await),
            None => std::future::pending().await,
        }
    });
    let (mut succeeded, starting) = (false, Arc::new(AtomicBool::new(false)));
    loop {
        tokio::select! {
            () = &mut taken_over => {
                // The service goes on: the successor speaks for it.
                succeeded = true;
                break;
            }
            _ = replace.recv() => start_successor(args, &starting),
            _ = hangup.recv() => {
                tracing::info!("SIGHUP: reading the configuration again");
                let _ = gateway.reload().await; // the library logs what happened
            }
            // `SHUTDOWN` at the console.
            () = gateway.draining() => break,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    if !succeeded {
        tell_service_manager(&[NotifyState::Stopping]);
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

/// Sockets that are open already: a predecessor's, or a service manager's.
fn inherit(args: &ServeArgs) -> anyhow::Result<(Option<Predecessor>, Sockets)> {
    if let Some(path) = &args.handover {
        let taken = Predecessor::take(path).with_context(|| format!("cannot take over from {}", path.display()))?;
        if let Some((predecessor, sockets)) = taken {
            tracing::info!(path = %path.display(), "taking over from the gateway that runs");
            return Ok((Some(predecessor), sockets));
        }
    }
    Ok((None, Sockets::from_service_manager().context("the sockets of the service manager cannot be used")?))
}

/// Starts this program again, as it is installed now; it takes over when it serves.
fn start_successor(args: &ServeArgs, starting: &Arc<AtomicBool>) {
    if args.handover.is_none() {
        tracing::warn!("SIGUSR2: nothing to hand over with; start with --handover PATH");
        return;
    }
    if starting.swap(true, Ordering::AcqRel) {
        tracing::warn!("SIGUSR2: a successor is starting already");
        return;
    }
    let mut arguments = std::env::args_os();
    let Some(program) = arguments.next() else { return };
    match std::process::Command::new(program).args(arguments).spawn() {
        Ok(mut child) => {
            tracing::info!(pid = child.id(), "SIGUSR2: a successor starts");
            // Reaped when it ends before this process does.
            let starting = Arc::clone(starting);
            std::thread::spawn(move || {
                let ended = child.wait();
                starting.store(false, Ordering::Release);
                if let Ok(status) = ended {
                    tracing::warn!(%status, "the successor has ended");
                }
            });
        }
        Err(error) => {
            starting.store(false, Ordering::Release);
            tracing::error!(%error, "SIGUSR2: a successor cannot be started");
        }
    }
}

/// Does nothing without a service manager that wants to know.
fn tell_service_manager(what: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(what) {
        tracing::debug!(%error, "the service manager cannot be told");
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
