//! The priority of server processes that run on the gateway's own machine.
//!
//! A gate decides what begins; what runs it cannot take back, and on a busy core the operating system gives every
//! process its slice. Where a cluster has `priorities`, the process that serves a storm or expensive work runs with a
//! higher `nice` value, and gives way to those that serve modest work whenever one of them wakes up. A server process
//! belongs to one database, hence to one tenant: its value changes seldom, and nothing is asked of the system when it stays.
//! Without `priorities` the processes are only looked at: what they compute is measured, which needs no privilege.
//!
//! The number of a process means something only where it runs. So one is taken for the server's only when its title names
//! the very port of our connection, and only when its priority can be given back as well as taken.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_fairness::{OnCores, Queue, Watch};
use cofferdam_sched::set_scheduling;
use cofferdam_tenant::Priorities;
use rustix::process::{Pid, getpriority_process, setpriority_process};

/// The least urgent that there is.
const NICEST: i32 = 19;
/// How long a process is looked at before it is said that it computes.
const LOOK: Duration = Duration::from_millis(100);
/// In what portions a process that gives way gets a core: longer than the kernel's own, which are up to 3 ms, so that all others
/// take it away as soon as they want it; and short, because processes that give way wait for each other's, and one of them may
/// hold a lock of the server's.
const PORTION: Duration = Duration::from_millis(10);
/// A process that does short work is looked at when it has worked for so long altogether.
const LOOK_AT_SHORT: Duration = Duration::from_millis(20);

/// A process of a server on this machine.
#[derive(Debug)]
pub(crate) struct ServerProcess {
    pid: Pid,
    /// Its `nice` value when it began.
    usual: i32,
    group: Option<Autogroup>,
    /// Where it may be set.
    priorities: Option<Priorities>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    nice: i32,
    /// Whether its session's group has the priority that belongs to this value.
    group_follows: bool,
    /// Since when it works, and on what.
    work: Option<(Instant, Watch)>,
    /// How long it had worked before that, since it was last looked at.
    worked: Duration,
    /// For how long it had wanted a core, and waited for one, when it was last looked at.
    wanted: Wanted,
    /// When that was, if it has done the same work since then, and whether it had a core or waited for one at that moment.
    seen: Option<(Instant, bool)>,
}

/// A server process while it works.
#[derive(Debug)]
pub(crate) struct Working(Arc<ServerProcess>);

/// Why the priority of a server process is left alone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Untouched {
    /// It runs elsewhere, or cannot be told from others.
    NotHere,
    /// The system would not let it be given back.
    Denied,
    /// The kernel gives cores to sessions and not to processes, and the group's priority may not be set.
    Grouped,
}

impl fmt::Display for Untouched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotHere => {
                f.write_str("no process with this number and this connection runs on the gateway's machine")
            }
            Self::Denied => f.write_str("not permitted: the gateway needs CAP_SYS_NICE"),
            Self::Grouped => f.write_str(
                "the kernel gives cores to sessions and not to processes (kernel.sched_autogroup_enabled), and the gateway may \
                 not write /proc/<pid>/autogroup",
            ),
        }
    }
}

impl ServerProcess {
    /// The process with this number that serves the connection which comes from `local`, and why its priority is left
    /// alone if it is, against what is wanted: then it is only looked at.
    pub(crate) fn find(
        pid: u32,
        local: SocketAddr,
        priorities: Option<Priorities>,
    ) -> Result<(Arc<Self>, Option<Untouched>), Untouched> {
        let is_its = std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|title| serves(&title, local.port()));
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).filter(|_| is_its).ok_or(Untouched::NotHere)?;
        let usual = getpriority_process(Some(pid)).map_err(|_| Untouched::NotHere)?;
        let group = match priorities {
            None => Ok(None),
            // Asked and not tried: whoever may only lower would never be able to give back.
            Some(_) if has_cap_sys_nice() || may_give_back(pid, usual) => Autogroup::of(pid),
            Some(_) => Err(Untouched::Denied),
        };
        let (group, untouched) = group.map_or_else(|why| (None, Some(why)), |group| (group, None));
        let priorities = priorities.filter(|_| untouched.is_none());
        let wanted = wanted(pid).unwrap_or_default();
        let state = State { nice: usual, group_follows: true, work: None, worked: Duration::ZERO, wanted, seen: None };
        Ok((Arc::new(Self { pid, usual, group, priorities, state: Mutex::new(state) }), untouched))
    }

    /// It begins to work, granted out of this queue.
    pub(crate) fn begins(self: &Arc<Self>, queue: Queue, watch: Watch) -> Working {
        let mut state = self.state();
        (state.work, state.seen) = (Some((Instant::now(), watch)), None);
        self.set(&mut state, queue);
        drop(state);
        Working(Arc::clone(self))
    }

    /// Looks at it when it has worked for so long. Lowers it when it wants a core most of the time, and says to what: a
    /// transaction that is only long, because its client thinks or it waits for something, is in nobody's way.
    pub(crate) fn outlasts(&self, now: Instant, limit: Duration) -> Option<Lowered> {
        let mut state = self.state();
        let (since, _) = state.work.as_ref()?;
        if now.saturating_duration_since(*since) < limit {
            return None;
        }
        let wanted = wanted(self.pid)?;
        // A wait for a core is counted when it ends: whoever gets none at all seems to want none.
        let is_runnable = is_runnable(self.pid);
        let Some((looked, was_runnable)) = state.seen else {
            (state.seen, state.wanted, state.worked) = (Some((now, is_runnable)), wanted, Duration::ZERO);
            return (state.nice > self.usual).then_some(Lowered { pid: self.pid, nice: state.nice });
        };
        let between = now.saturating_duration_since(looked);
        let mut noted = None;
        if between >= LOOK {
            let measured = wanted.since(state.wanted);
            let measured = if was_runnable && is_runnable { measured.all_of(between) } else { measured };
            (state.seen, state.wanted) = (Some((now, is_runnable)), wanted);
            if measured.part_of(between).0 >= 0.5 {
                self.set(&mut state, Queue::Expensive);
            }
            let seen = measured.on_cores(between, self.gives_way(&state));
            noted = state.work.as_ref().map(|(_, watch)| (watch.clone(), seen));
        }
        let lowered = (state.nice > self.usual).then_some(Lowered { pid: self.pid, nice: state.nice });
        drop(state);
        if let Some((watch, seen)) = noted {
            watch.note_cores(seen);
        }
        lowered
    }

    /// It has done its work.
    fn ends(&self) {
        let mut state = self.state();
        let Some((since, watch)) = state.work.take() else { return };
        let now = Instant::now();
        // What was looked at while it ran has been said.
        let looked = state.seen.take();
        state.worked += now.saturating_duration_since(looked.map_or(since, |(at, _)| at));
        if state.worked >= LOOK_AT_SHORT
            && let Some(wanted) = wanted(self.pid)
        {
            let seen = wanted.since(state.wanted).on_cores(state.worked, self.gives_way(&state));
            (state.wanted, state.worked) = (wanted, Duration::ZERO);
            drop(state);
            watch.note_cores(seen);
        }
    }

    /// Whether it runs with less than its usual priority.
    pub(crate) fn is_lowered(&self) -> bool {
        self.state().nice != self.usual
    }

    /// Whether it is in nobody's way: it weighs next to nothing beside others, and no core is to be left alone.
    fn gives_way(&self, state: &State) -> bool {
        state.group_follows
            && state.nice - self.usual >= NICEST
            && self.priorities.is_some_and(|priorities| priorities.spare_cores == 0)
    }

    fn set(&self, state: &mut State, queue: Queue) {
        let Some(priorities) = self.priorities else { return };
        let more = match queue {
            Queue::First => 0,
            Queue::More => priorities.storm,
            Queue::Expensive => priorities.expensive,
        };
        let nice = (self.usual + i32::from(more)).min(NICEST);
        if nice != state.nice || !state.group_follows {
            // It may have ended meanwhile; whoever reads from it will notice.
            match set_nice(self.pid, nice, (nice > self.usual).then_some(PORTION)) {
                Ok(()) => {
                    state.nice = nice;
                    state.group_follows = self.group.is_none_or(|group| group.set(self.pid, nice - self.usual));
                }
                Err(error) => tracing::debug!(%error, pid = self.pid.as_raw_nonzero(), "priority not changed"),
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sets a process's `nice` value and its slice, or the `nice` value alone where the system has no call for both.
fn set_nice(pid: Pid, nice: i32, slice: Option<Duration>) -> io::Result<()> {
    set_scheduling(pid.as_raw_nonzero().get(), nice, slice).or_else(|_| Ok(setpriority_process(Some(pid), nice)?))
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.ends();
    }
}

/// The group of a process's session, where the kernel divides cores between sessions: each server process has one of its own,
/// and `nice` counts only inside. Its priority counts between them.
#[derive(Debug, Clone, Copy)]
struct Autogroup {
    usual: i32,
}

impl Autogroup {
    /// The group of a process, if there are such groups.
    fn of(pid: Pid) -> Result<Option<Self>, Untouched> {
        let enabled = std::fs::read("/proc/sys/kernel/sched_autogroup_enabled").unwrap_or_default();
        let group = std::fs::read_to_string(Self::path(pid)).unwrap_or_default();
        let usual = group.trim().rsplit(' ').next().and_then(|nice| nice.parse().ok());
        let Some(usual) = usual.filter(|_| enabled.starts_with(b"1")) else { return Ok(None) };
        if Self::write(pid, usual).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
            return Err(Untouched::Grouped);
        }
        Ok(Some(Self { usual }))
    }

    /// False when it could not be set: whoever is not an administrator may set few in a while.
    fn set(self, pid: Pid, more: i32) -> bool {
        let set = Self::write(pid, (self.usual + more).min(NICEST));
        if let Err(error) = &set {
            tracing::debug!(%error, pid = pid.as_raw_nonzero(), "priority of a session not changed");
        }
        set.is_ok()
    }

    fn write(pid: Pid, nice: i32) -> io::Result<()> {
        std::fs::write(Self::path(pid), nice.to_string())
    }

    fn path(pid: Pid) -> String {
        format!("/proc/{}/autogroup", pid.as_raw_nonzero())
    }
}

fn has_cap_sys_nice() -> bool {
    const CAP_SYS_NICE: u32 = 23;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set >> CAP_SYS_NICE & 1 == 1)
}

/// Whether a process of the same user may be given back this `nice` value, by its limit (20 for 0).
fn may_give_back(pid: Pid, nice: i32) -> bool {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", pid.as_raw_nonzero())).unwrap_or_default();
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max nice priority")?.split_whitespace().next());
    soft.and_then(|soft| soft.parse::<i32>().ok()).is_some_and(|soft| 20 - soft <= nice)
        && setpriority_process(Some(pid), nice).is_ok()
}

/// For how long a process has had a core, and has waited for one.
#[derive(Debug, Clone, Copy, Default)]
struct Wanted {
    had: Duration,
    waited: Duration,
}

impl Wanted {
    fn since(self, before: Self) -> Self {
        Self { had: self.had.saturating_sub(before.had), waited: self.waited.saturating_sub(before.waited) }
    }

    /// Whoever has wanted a core all the time has waited when it had none.
    fn all_of(self, time: Duration) -> Self {
        Self { waited: time.saturating_sub(self.had), ..self }
    }

    /// The parts of a time in which it wanted a core, and in which it waited for one.
    fn part_of(self, time: Duration) -> (f32, f32) {
        let part = |of: Duration| (of.as_secs_f32() / time.as_secs_f32()).min(1.0);
        (part(self.had + self.waited), part(self.waited))
    }

    fn on_cores(self, time: Duration, gives_way: bool) -> OnCores {
        let (wanted, waited) = self.part_of(time);
        OnCores { wanted, waited, gives_way }
    }
}

/// What a process has wanted so far. Where the kernel does not say that, how long it has computed, in its own time and the
/// system's for it, in hundredths of a second.
fn wanted(pid: Pid) -> Option<Wanted> {
    let path = format!("/proc/{}/schedstat", pid.as_raw_nonzero());
    let scheduled = std::fs::read_to_string(path).unwrap_or_default();
    let mut times = scheduled.split_ascii_whitespace().map_while(|n| n.parse().ok().map(Duration::from_nanos));
    if let (Some(had), Some(waited)) = (times.next(), times.next())
        && !had.is_zero()
    {
        return Some(Wanted { had, waited });
    }
    let stat = stat(pid)?;
    let mut fields = stat.split(' ').skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(Wanted { had: Duration::from_millis(10 * ticks), waited: Duration::ZERO })
}

/// Whether it has a core or waits for one.
fn is_runnable(pid: Pid) -> bool {
    stat(pid).is_some_and(|fields| fields.starts_with('R'))
}

fn parent(pid: Pid) -> Option<i32> {
    stat(pid)?.split(' ').nth(1)?.parse().ok()
}

/// What the system says of a process, behind its name, which is in parentheses and may have some itself.
fn stat(pid: Pid) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    stat.rsplit_once(") ").map(|(_, fields)| fields.to_owned())
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
                // It may have ended meanwhile. It is in its leader's session or in one of its own.
                let _ = set_nice(child, leader.nice, Some(PORTION));
                if let Ok(Some(group)) = Autogroup::of(child) {
                    group.set(child, leader.nice - group.usual);
                }
            }
        }
    }
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
    fn a_process_gives_way_by_all_that_there_is_or_not_entirely() {
        let gives_way = |usual, nice, group_follows, spare_cores| {
            let priorities = Priorities { storm: 19, expensive: 19, spare_cores };
            let (work, worked, wanted, seen) = (None, Duration::ZERO, Wanted::default(), None);
            let state = State { nice, group_follows, work, worked, wanted, seen };
            let pid = Pid::from_raw(1).unwrap();
            let process =
                ServerProcess { pid, usual, group: None, priorities: Some(priorities), state: Mutex::new(state) };
            process.gives_way(&process.state())
        };
        assert!(gives_way(0, 19, true, 0) && gives_way(-5, 14, true, 0));
        assert!(!gives_way(0, 0, true, 0) && !gives_way(0, 10, true, 0), "as urgent as others, or a part of it");
        assert!(!gives_way(5, 19, true, 0) && !gives_way(19, 19, true, 0), "there is not so much left to give");
        assert!(!gives_way(0, 19, false, 0), "its session does not");
        assert!(!gives_way(0, 19, true, 1), "a core is to be left alone");
    }

    #[test]
    fn a_process_is_the_servers_only_when_its_title_says_so() {
        let title = b"postgres: main: acme acme 127.0.0.1(40112) idle\0\0\0";
        assert!(serves(title, 40112));
        assert!(!serves(title, 4011) && !serves(title, 40_113));
        assert!(!serves(b"vim postgres: (40112)", 40112) && !serves(b"", 40112));
        assert_eq!(works_for(b"postgres: main: parallel worker for PID 4711 \0\0"), Some(4711));
        assert_eq!(works_for(b"postgres: acme acme 127.0.0.1(40112) idle"), None);
        let here = SocketAddr::from(([127, 0, 0, 1], 40112));
        let found =
            ServerProcess::find(std::process::id(), here, Some(Priorities { storm: 5, expensive: 10, spare_cores: 0 }));
        assert_eq!(found.map(|_| ()), Err(Untouched::NotHere), "this very process is none of PostgreSQL's");
    }
}
