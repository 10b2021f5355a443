//! The priority of server processes that run on the gateway's own machine.
//!
//! A gate decides what begins; what runs it cannot take back, and on a busy core the operating system gives every
//! process its slice. Where a cluster has `priorities`, the process that serves a storm or expensive work runs with a
//! higher `nice` value, and gives way to those that serve modest work whenever one of them wakes up. A server process
//! belongs to one database, hence to one tenant: its value changes seldom, and nothing is asked of the system when it stays.
//!
//! The number of a process means something only where it runs. So one is taken for the server's only when its title names
//! the very port of our connection, and only when its priority can be given back as well as taken.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_fairness::Queue;
use cofferdam_tenant::Priorities;
use rustix::process::{Pid, getpriority_process, setpriority_process};

/// The least urgent that there is.
const NICEST: i32 = 19;

/// A process of a server on this machine.
#[derive(Debug)]
pub(crate) struct ServerProcess {
    pid: Pid,
    /// Its `nice` value when it began.
    usual: i32,
    priorities: Priorities,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    nice: i32,
    /// Since when it works.
    since: Option<Instant>,
}

/// A server process while it works.
#[derive(Debug)]
pub(crate) struct Working(Arc<ServerProcess>);

/// Why the priority of a server process is left alone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Untouched {
    /// It runs elsewhere, or cannot be told from others.
    NotHere,
    /// The system does not allow it.
    Denied(rustix::io::Errno),
}

impl fmt::Display for Untouched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotHere => {
                f.write_str("no process with this number and this connection runs on the gateway's machine")
            }
            Self::Denied(errno) => write!(f, "not permitted ({errno}): the gateway needs CAP_SYS_NICE"),
        }
    }
}

impl ServerProcess {
    /// The process with this number that serves the connection which comes from `local`.
    pub(crate) fn find(pid: u32, local: SocketAddr, priorities: Priorities) -> Result<Arc<Self>, Untouched> {
        let is_its = std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|title| serves(&title, local.port()));
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).filter(|_| is_its).ok_or(Untouched::NotHere)?;
        let usual = getpriority_process(Some(pid)).map_err(|_| Untouched::NotHere)?;
        if usual < NICEST {
            // Whoever may only lower would never be able to give back.
            setpriority_process(Some(pid), usual + 1).map_err(Untouched::Denied)?;
            setpriority_process(Some(pid), usual).map_err(Untouched::Denied)?;
        }
        Ok(Arc::new(Self { pid, usual, priorities, state: Mutex::new(State { nice: usual, since: None }) }))
    }

    /// It begins to work, granted out of this queue.
    pub(crate) fn begins(self: &Arc<Self>, queue: Queue) -> Working {
        let mut state = self.state();
        state.since = Some(Instant::now());
        self.set(&mut state, queue);
        drop(state);
        Working(Arc::clone(self))
    }

    /// Lowers it when it has worked for so long, and says to what.
    pub(crate) fn outlasts(&self, now: Instant, limit: Duration) -> Option<Lowered> {
        let mut state = self.state();
        state.since.filter(|since| now.saturating_duration_since(*since) >= limit)?;
        self.set(&mut state, Queue::Expensive);
        Some(Lowered { pid: self.pid, nice: state.nice })
    }

    /// Whether it runs with less than its usual priority.
    pub(crate) fn is_lowered(&self) -> bool {
        self.state().nice != self.usual
    }

    fn set(&self, state: &mut State, queue: Queue) {
        let more = match queue {
            Queue::First => 0,
            Queue::More => self.priorities.storm,
            Queue::Expensive => self.priorities.expensive,
        };
        let nice = (self.usual + i32::from(more)).min(NICEST);
        if nice != state.nice {
            // It may have ended meanwhile; whoever reads from it will notice.
            match setpriority_process(Some(self.pid), nice) {
                Ok(()) => state.nice = nice,
                Err(error) => tracing::debug!(%error, pid = self.pid.as_raw_nonzero(), "priority not changed"),
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.state().since = None;
    }
}

/// A process that does expensive work, and its `nice` value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lowered {
    pid: Pid,
    nice: i32,
}

/// Gives the workers of parallel queries the priority of the processes they work for. Each serves one query and ends: there is
/// nothing to give back.
pub(crate) fn lower_workers(leaders: &[Lowered]) {
    let parents: BTreeSet<i32> = leaders.iter().filter_map(|leader| parent(leader.pid)).collect();
    for parent in parents {
        let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
        for child in children.split_ascii_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
            let title = std::fs::read(format!("/proc/{}/cmdline", child.as_raw_nonzero())).unwrap_or_default();
            let leader = works_for(&title).and_then(|pid| leaders.iter().find(|l| l.pid.as_raw_nonzero().get() == pid));
            if let Some(leader) = leader {
                // It may have ended meanwhile.
                let _ = setpriority_process(Some(child), leader.nice);
            }
        }
    }
}

fn parent(pid: Pid) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name is in parentheses and may have some itself.
    stat.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok()
}

/// The process that a worker of a parallel query works for, by its title (`postgres: parallel worker for PID 4711`).
fn works_for(title: &[u8]) -> Option<i32> {
    let title = String::from_utf8_lossy(title);
    let (_, pid) = title.strip_prefix("postgres: ")?.split_once("parallel worker for PID ")?;
    pid.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Whether the title of a process, as PostgreSQL sets it (`postgres: acme acme 127.0.0.1(40112) idle`), says that it serves
/// the client with this port.
fn serves(title: &[u8], port: u16) -> bool {
    let title = String::from_utf8_lossy(title);
    title.starts_with("postgres: ") && title.contains(&format!("({port})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_the_servers_only_when_its_title_says_so() {
        let title = b"postgres: main: acme acme 127.0.0.1(40112) idle\0\0\0";
        assert!(serves(title, 40112));
        assert!(!serves(title, 4011) && !serves(title, 40_113));
        assert!(!serves(b"vim postgres: (40112)", 40112) && !serves(b"", 40112));
        assert_eq!(works_for(b"postgres: main: parallel worker for PID 4711 \0\0"), Some(4711));
        assert_eq!(works_for(b"postgres: acme acme 127.0.0.1(40112) idle"), None);
        let here = SocketAddr::from(([127, 0, 0, 1], 40112));
        let found = ServerProcess::find(std::process::id(), here, Priorities { storm: 5, expensive: 10 });
        assert_eq!(found.err(), Some(Untouched::NotHere), "this very process is none of PostgreSQL's");
    }
}
