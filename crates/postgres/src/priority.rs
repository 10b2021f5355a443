//! The priority of server processes that run on the gateway's own machine.
//!
//! A server process belongs to one database, hence to one tenant: its value changes seldom, and nothing is asked of the system
//! when it stays. The number of a process means something only where it runs. So one is taken for the server's only when its
//! title names the very port of our connection.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use cofferdam_processes::{Kind, Lowered, Process, Untouched, children, parent};
use cofferdam_tenant::Priorities;

/// The process with this number that serves the connection which comes from `local`, and why its priority is left
/// alone if it is, against what is wanted: then it is only looked at.
pub(crate) fn server_process(
    pid: u32,
    local: SocketAddr,
    priorities: Option<Priorities>,
) -> Result<(Arc<Process>, Option<Untouched>), Untouched> {
    if !serves(&title(pid), local.port()) {
        return Err(Untouched::NotHere);
    }
    Process::new(pid, Kind::Backend, priorities)
}

/// Gives the workers of parallel queries the priority of the processes they work for. Each serves one query and ends: there is
/// nothing to give back.
pub(crate) fn lower_workers(leaders: &[Lowered]) {
    let parents: BTreeSet<u32> = leaders.iter().filter_map(|leader| parent(leader.pid())).collect();
    for child in parents.into_iter().flat_map(children) {
        let leader = works_for(&title(child)).and_then(|pid| leaders.iter().find(|leader| leader.pid() == pid));
        if let Some(leader) = leader {
            leader.followed_by(child);
        }
    }
}

/// What a process calls itself.
fn title(pid: u32) -> Vec<u8> {
    std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

/// The process that a worker of a parallel query works for, by its title (`postgres: parallel worker for PID 4711`).
fn works_for(title: &[u8]) -> Option<u32> {
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
        let priorities = Some(Priorities { storm: 5, expensive: 10, spare_cores: 0 });
        let found = server_process(std::process::id(), here, priorities);
        assert_eq!(found.map(|_| ()), Err(Untouched::NotHere), "this very process is none of PostgreSQL's");
    }
}
