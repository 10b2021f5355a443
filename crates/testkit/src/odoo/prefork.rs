//! Workers that are processes, as Odoo's are: forked by one that listens, each with one connection at a time.
//!
//! A worker gets the listening socket as its standard input, and says on its standard output when it begins a request and
//! when it has ended one. As in Odoo, another thread than the first does the work. It ends with the process that has started it,
//! which starts another when it ends before.

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::parent_id;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use super::server::{OdooOptions, State, one_request, rounds_in_a_millisecond};

/// Where a worker finds its options and its number.
const OPTIONS: &str = "MINIATURE_ODOO";
const NUMBER: &str = "MINIATURE_ODOO_WORKER";
/// And how much it computes in a millisecond.
pub(super) const ROUNDS: &str = "MINIATURE_ODOO_ROUNDS";
const BEGINS: u8 = b'+';
const ENDS: u8 = b'-';

/// A program that is a worker: it calls [`work`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Program {
    /// Where it is.
    pub path: PathBuf,
    /// What it is called with.
    pub arguments: Vec<OsString>,
}

/// Keeps one worker running until it is dropped.
pub(super) async fn keep(state: Arc<State>, program: Program, listener: Arc<TcpListener>, number: usize) {
    loop {
        if let Err(error) = run(&state, &program, &listener, number).await {
            tracing::error!(%error, program = %program.path.display(), "a worker cannot run");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

async fn run(state: &State, program: &Program, listener: &TcpListener, number: usize) -> io::Result<()> {
    let socket: OwnedFd = listener.try_clone()?.into();
    let mut child = Command::new(&program.path)
        .args(&program.arguments)
        .env(OPTIONS, serde_json::to_string(&state.options)?)
        .env(NUMBER, number.to_string())
        .env(ROUNDS, rounds_in_a_millisecond().to_string())
        .stdin(Stdio::from(socket))
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut said = child.stdout.take().ok_or_else(|| io::Error::other("no standard output"))?;
    let mut is_busy = false;
    while let Ok(byte) = said.read_u8().await {
        match byte {
            BEGINS if !is_busy => {
                is_busy = true;
                state.begins();
                state.requests.fetch_add(1, Ordering::Relaxed);
            }
            ENDS if is_busy => {
                is_busy = false;
                state.ends();
            }
            _ => {}
        }
    }
    if is_busy {
        state.ends();
    }
    child.wait().await?;
    Ok(())
}

/// Is a worker, in a process of its own, until the one that has started it is gone.
///
/// Fails when it was not started as one.
pub fn work() -> io::Result<()> {
    let missing = |name: &str| io::Error::new(io::ErrorKind::NotFound, format!("{name} is not set"));
    let options: OdooOptions =
        serde_json::from_str(&std::env::var(OPTIONS).map_err(|_| missing(OPTIONS))?).map_err(io::Error::other)?;
    let number = std::env::var(NUMBER).ok().and_then(|n| n.parse().ok()).ok_or_else(|| missing(NUMBER))?;
    let listener = TcpListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    let parent = parent_id();
    let serving = std::thread::spawn(move || serve(options, number, &listener));
    while !serving.is_finished() && parent_id() == parent {
        std::thread::park_timeout(Duration::from_millis(200));
    }
    if serving.is_finished() { serving.join().unwrap_or_else(|_| Err(io::Error::other("panicked"))) } else { Ok(()) }
}

fn serve(options: OdooOptions, number: usize, listener: &TcpListener) -> io::Result<()> {
    let limit = options.limit_time_real;
    let state = State::new(options, true);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let say = |what| {
        let mut out = io::stdout().lock();
        out.write_all(&[what]).and_then(|()| out.flush())
    };
    loop {
        // Whoever waits longest is woken, and nobody else.
        let (stream, _) = listener.accept()?;
        say(BEGINS)?;
        stream.set_nonblocking(true)?;
        runtime.block_on(async {
            let stream = tokio::net::TcpStream::from_std(stream)?;
            let _ = tokio::time::timeout(limit, one_request(&state, number, stream)).await;
            Ok::<(), io::Error>(())
        })?;
        say(ENDS)?;
    }
}
