//! `cofferdam bench`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use cofferdam_bench::isolation::{self, Options, Plane, Workload};
use cofferdam_bench::{Peer, health, simulate, throughput, web};

use crate::args::{
    BenchCommand, BenchLoad, BenchPeer, BenchPlane, BenchProtocol, BenchScript, BenchWorkload, IsolationArgs,
    SimulateArgs, ThroughputArgs, WatchCostArgs, WebArgs,
};

pub(crate) fn run(command: &BenchCommand) -> anyhow::Result<ExitCode> {
    match command {
        BenchCommand::Simulate(args) => simulated(args),
        BenchCommand::OdooWorker => {
            cofferdam_testkit::odoo::work()?;
            Ok(ExitCode::SUCCESS)
        }
        BenchCommand::Isolation(args) => until_interrupted(isolated(args)),
        BenchCommand::Postgres(args) => until_interrupted(pooled(args)),
        BenchCommand::Http(args) => until_interrupted(proxied(args)),
        BenchCommand::Health(args) => until_interrupted(watched(args)),
    }
}

fn until_interrupted(work: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start a runtime")?;
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = work => outcome,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; everything that was started has been stopped")),
        }
    });
    // Work that still computes must not hold up the exit.
    runtime.shutdown_background();
    outcome
}

async fn pooled(args: &ThroughputArgs) -> anyhow::Result<ExitCode> {
    let all = [Peer::Direct, Peer::PgBouncer(20), Peer::PgBouncers(20), Peer::Cofferdam];
    let options = throughput::Options {
        peers: if args.brief { vec![Peer::PgBouncer(20), Peer::Cofferdam] } else { all.to_vec() },
        scripts: args
            .script
            .iter()
            .map(|s| match s {
                BenchScript::Select => throughput::Script::Select,
                BenchScript::Tpcb => throughput::Script::TpcB,
            })
            .collect(),
        protocols: args
            .protocol
            .iter()
            .map(|p| match p {
                BenchProtocol::Simple => throughput::Protocol::Simple,
                BenchProtocol::Extended => throughput::Protocol::Extended,
                BenchProtocol::Prepared => throughput::Protocol::Prepared,
            })
            .collect(),
        clients: args.clients.clone(),
        seconds: args.seconds,
        rounds: usize::from(args.rounds),
        idle: args.idle.iter().copied().filter(|n| *n > 0).collect(),
        cofferdam: std::env::current_exe().context("cannot tell what program this is")?,
        pgbouncer: args.pgbouncer.clone(),
    };
    let report = throughput::measure(&options, |line| eprintln!("{line}")).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}", throughput::table(&report));
    }
    write(args.svg.as_deref(), || throughput::picture(&report))?;
    Ok(ExitCode::SUCCESS)
}

async fn proxied(args: &WebArgs) -> anyhow::Result<ExitCode> {
    let load = |load: &BenchLoad| match load {
        BenchLoad::Small => web::Load::Small,
        BenchLoad::New => web::Load::New,
        BenchLoad::Large => web::Load::Large,
        BenchLoad::Tls => web::Load::Tls,
        BenchLoad::Cached => web::Load::Cached,
    };
    let options = web::Options {
        loads: if args.load.is_empty() { web::Load::ALL.to_vec() } else { args.load.iter().map(load).collect() },
        connections: args.connections.clone(),
        seconds: args.seconds,
        rounds: usize::from(args.rounds),
        idle: args.idle,
        cofferdam: std::env::current_exe().context("cannot tell what program this is")?,
        bare: args.bare.clone(),
    };
    let report = web::measure(&options, |line| eprintln!("{line}")).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}", web::table(&report));
    }
    Ok(ExitCode::SUCCESS)
}

async fn watched(args: &WatchCostArgs) -> anyhow::Result<ExitCode> {
    let options = health::Options {
        tenants: args.tenants,
        databases: args.databases,
        seconds: args.seconds,
        interval: args.interval,
        cofferdam: std::env::current_exe().context("cannot tell what program this is")?,
    };
    let report = health::measure(&options, |line| eprintln!("{line}")).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}", health::table(&report));
    }
    Ok(ExitCode::SUCCESS)
}

fn simulated(args: &SimulateArgs) -> anyhow::Result<ExitCode> {
    let cells = simulate::simulate(args.seed, args.large, |name| eprintln!("simulating {name} …"));
    println!("{}", simulate::table(&cells));
    write(args.svg.as_deref(), || simulate::picture(&cells))?;
    Ok(ExitCode::SUCCESS)
}

async fn isolated(args: &IsolationArgs) -> anyhow::Result<ExitCode> {
    let options = Options {
        plane: match args.plane {
            BenchPlane::Postgres => Plane::Postgres,
            BenchPlane::Http => Plane::Http,
            BenchPlane::Both => Plane::Both,
        },
        peers: peers(args),
        workloads: match &args.workload[..] {
            [] => Workload::ALL.to_vec(),
            some => some
                .iter()
                .map(|w| match w {
                    BenchWorkload::Sleep => Workload::Sleep,
                    BenchWorkload::Burn => Workload::Burn,
                    BenchWorkload::Storm => Workload::Storm,
                    BenchWorkload::Write => Workload::Write,
                })
                .collect(),
        },
        aggressors: args.aggressors.clone(),
        seconds: args.seconds,
        cofferdam: std::env::current_exe().context("cannot tell what program this is")?,
    };
    let cells = isolation::measure(&options, |line| eprintln!("{line}")).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&cells)?);
    } else {
        println!("{}", isolation::table(&cells));
    }
    if args.alone {
        let lines: Vec<String> = isolation::aggressor_alone(&options)
            .await?
            .into_iter()
            .map(|alone| {
                let (workload, fair, fifo) = (alone.workload.as_str(), alone.fair, alone.fifo);
                let part = 100.0 * fair / fifo;
                format!(
                    "one aggressor alone, {workload}: {fair:.1}/s, first come first served {fifo:.1}/s: {part:.0} %"
                )
            })
            .collect();
        // Beside JSON these are for people.
        if args.json { eprintln!("{}", lines.join("\n")) } else { println!("{}", lines.join("\n")) }
    }
    write(args.svg.as_deref(), || isolation::picture(&cells))?;
    Ok(ExitCode::SUCCESS)
}

/// The peers asked for and Cofferdam; by default all that stand in front of the plane.
fn peers(args: &IsolationArgs) -> Vec<Peer> {
    let wanted = match (&args.peer[..], args.plane) {
        ([], BenchPlane::Postgres) => {
            &[BenchPeer::Direct, BenchPeer::Pgbouncer, BenchPeer::Plain, BenchPeer::Spare][..]
        }
        ([], BenchPlane::Http) => &[BenchPeer::Direct, BenchPeer::Nginx, BenchPeer::Haproxy],
        ([], BenchPlane::Both) => &[BenchPeer::Direct, BenchPeer::Plain],
        (some, _) => some,
    };
    let each = wanted.iter().flat_map(|peer| match peer {
        BenchPeer::Pgbouncer => vec![Peer::PgBouncer(20), Peer::PgBouncer(4)],
        BenchPeer::Haproxy => vec![Peer::HaProxy],
        BenchPeer::Nginx => vec![Peer::Nginx],
        BenchPeer::Direct => vec![Peer::Direct],
        BenchPeer::Plain => vec![Peer::Plain],
        BenchPeer::Spare => vec![Peer::Spare],
        BenchPeer::RealTime => vec![Peer::RealTime],
        BenchPeer::Fifo => vec![Peer::Fifo],
    });
    each.chain([Peer::Cofferdam]).collect()
}

fn write(path: Option<&Path>, picture: impl FnOnce() -> anyhow::Result<String>) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, picture()?).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("the picture is in {}", path.display());
    Ok(())
}
