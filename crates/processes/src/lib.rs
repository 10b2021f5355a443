//! Processes of servers on the gateway's own machine: whose connection they serve, what they compute, and how they give way.
//!
//! A gate decides what begins; what runs it cannot take back, and on a busy core the operating system gives every
//! process its slice. What a process computes is measured here, and said to the gate, which needs no privilege. With
//! [`Priorities`] the process that serves a storm or expensive work also runs with a higher `nice` value and a longer slice, and
//! gives way to those that serve modest work whenever one of them wakes up.
//!
//! The number of a process means something only where it runs: whoever makes a [`Process`] has to know that it serves its
//! connection ([`owner`] tells it of sockets), and a priority is changed only where it can be given back.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::fmt;
use std::io;
use std::slice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_fairness::{OnCores, Queue, Watch};
use cofferdam_sched::{Policy, scheduling, set_idle, set_ordinary, set_scheduling};
use cofferdam_tenant::Priorities;
use rustix::io::Errno;
use rustix::process::{Pid, getpriority_process, setpriority_process};

use crate::group::Autogroup;
use crate::owner::Connection;
use crate::wanted::Wanted;

pub use crate::lowering::Lowering;

mod group;
mod lowering;
pub mod owner;
mod wanted;

/// The least urgent that there is.
const NICEST: i32 = 19;
/// How long a process is looked at before it is said that it computes.
const LOOK: Duration = Duration::from_millis(100);
/// In what portions a process that gives way gets a core: longer than the kernel's own, which are up to 3 ms, so that all others
/// take it away as soon as they want it; and short, because processes that give way wait for each other's, and one of them may
/// hold a lock of the server's.
const PORTION: Duration = Duration::from_millis(10);
/// A process that does a tenant's short work is looked at when it has worked for so long altogether.
const LOOK_AT_SHORT: Duration = Duration::from_millis(20);
/// One that does somebody else's next is looked at after each piece that has taken so long.
const LOOK_AT_ONE: Duration = Duration::from_micros(500);

/// What a process does for whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Works for one tenant, with one thread, in a session of its own, like a server process of PostgreSQL. What it is
    /// set to stays until it begins something else.
    Backend,
    /// Works for one tenant after the other, whoever comes next, with whichever of its threads, in its server's session,
    /// like a worker of Odoo. What it is set to is given back with the end of each piece of work.
    Worker {
        /// The process that has started it, and is never set to anything: its `nice` value is the usual one.
        like: Option<u32>,
    },
}

impl Kind {
    fn is_worker(self) -> bool {
        matches!(self, Self::Worker { .. })
    }
}

/// A process of a server on this machine.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    kind: Kind,
    /// Its `nice` value while it does modest work.
    usual: i32,
    /// Whether it may run on what others leave: a worker, and an ordinary one.
    may_idle: bool,
    group: Option<Autogroup>,
    /// Where it may be set.
    priorities: Option<Priorities>,
    lowering: &'static Lowering,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    nice: i32,
    /// For what work that is.
    queue: Queue,
    /// Whether it is known to have that: not when it could not be set, or somebody else has set another.
    is_certain: bool,
    /// Whether its session's group has the priority that belongs to this value.
    group_follows: bool,
    /// What it works on.
    work: Option<Work>,
    /// How many pieces of work it has begun.
    begun: u64,
    /// How long it had worked before that, since it was last looked at.
    worked: Duration,
    /// For how long it had wanted a core, and waited for one, when it was last looked at.
    wanted: Wanted,
    /// When that was, if it has done the same work since then, and whether it had a core or waited for one at that moment.
    seen: Option<(Instant, bool)>,
    /// Those of a worker, when its work began or it was set to something.
    threads: Vec<Pid>,
}

/// A piece of work.
#[derive(Debug)]
struct Work {
    since: Instant,
    /// Who is told what it wants.
    watch: Watch,
    /// Whether that is measured although it may not last.
    is_measured: bool,
    /// The connection that it came by, if the process serves others after it.
    connection: Option<Connection>,
}

/// A process while it works. Dropping it says that it is done, unless it works on something else by now.
#[derive(Debug)]
pub struct Working {
    process: Arc<Process>,
    /// Which piece of its work this is.
    number: u64,
}

/// What was seen of a process that works.
struct Looked {
    /// Which piece of its work that is.
    number: u64,
    /// Whether it wanted a core most of the time.
    wants: bool,
    /// Whom to tell what.
    noted: Option<(Watch, OnCores)>,
}

/// Why a worker does not work for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotItsOwn {
    /// It serves several at once, so that it is none of them alone that it works for.
    Shared,
    /// It has let go of it by now.
    Over,
}

/// Why a process is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Untouched {
    /// It runs elsewhere, or cannot be told from others.
    NotHere,
    /// The system would not let its priority be given back.
    Denied,
    /// The kernel gives cores to sessions and not to processes, and the group's priority may not be set.
    Grouped,
}

/// A process that does what is in the way of others, and the `nice` value and slice that it has for that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lowered {
    pid: Pid,
    nice: i32,
    slice: Option<Duration>,
}

impl fmt::Display for Untouched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotHere => {
                f.write_str("no process that is known to serve this connection runs on the gateway's machine")
            }
            Self::Denied => f.write_str("not permitted: the gateway needs CAP_SYS_NICE"),
            Self::Grouped => f.write_str(
                "the kernel gives cores to sessions and not to processes (kernel.sched_autogroup_enabled), and the gateway may \
                 not write /proc/<pid>/autogroup",
            ),
        }
    }
}

impl Process {
    /// A process, and why its priority is left alone if it is, against what is wanted: then it is only looked at. Its
    /// `nice` value of now is taken for its usual one, unless it is a worker that somebody has left lowered.
    pub fn new(
        pid: u32,
        kind: Kind,
        priorities: Option<Priorities>,
    ) -> Result<(Arc<Self>, Option<Untouched>), Untouched> {
        let nice_of = |pid| getpriority_process(Some(pid)).map_err(|_| Untouched::NotHere);
        let pid = numbered(pid).ok_or(Untouched::NotHere)?;
        let nice = nice_of(pid)?;
        let policy_of = |pid: Pid| scheduling(pid.as_raw_nonzero().get()).map(|known| known.policy);
        let (usual, may_idle) = match kind {
            Kind::Worker { like: Some(other) } => {
                let other = numbered(other).ok_or(Untouched::NotHere)?;
                (nice_of(other)?.min(nice), policy_of(other).is_ok_and(|policy| policy == Policy::Ordinary))
            }
            _ => (nice, false),
        };
        let group = match (priorities, kind) {
            (None, _) => Ok(None),
            (Some(_), _) if !group::may_set(pid, usual) => Err(Untouched::Denied),
            (Some(_), Kind::Backend) => Autogroup::of(pid),
            // The group is that of all workers, and among them `nice` counts.
            (Some(_), Kind::Worker { .. }) => Ok(None),
        };
        let (group, untouched) = group.map_or_else(|why| (None, Some(why)), |group| (group, None));
        let priorities = priorities.filter(|_| untouched.is_none());
        let wanted = Wanted::of(pid, &[pid]).unwrap_or_default();
        let state = State {
            nice,
            queue: Queue::First,
            is_certain: !may_idle || policy_of(pid).is_ok_and(|policy| policy == Policy::Ordinary),
            group_follows: true,
            work: None,
            begun: 0,
            worked: Duration::ZERO,
            wanted,
            seen: None,
            threads: Vec::new(),
        };
        let lowering = Lowering::of_this_machine();
        let process = Self { pid, kind, usual, may_idle, group, priorities, lowering, state: Mutex::new(state) };
        // Somebody before us was killed while it did something that is in the way of others.
        process.set(&mut process.state(), Queue::First);
        Ok((Arc::new(process), untouched))
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// A backend begins to work, granted out of this queue.
    pub fn begins(self: &Arc<Self>, queue: Queue, watch: Watch) -> Working {
        self.begin(&mut self.state(), queue, watch, true, None)
    }

    /// A worker begins to work for a connection, granted out of this queue. What it wants is told if it lasts, and otherwise where
    /// `is_measured`.
    ///
    /// What it has worked on before is over when it has let go of that connection; if it has not, that is an error.
    pub fn serves(
        self: &Arc<Self>,
        connection: Connection,
        queue: Queue,
        watch: Watch,
        is_measured: bool,
    ) -> Result<Working, NotItsOwn> {
        let mut state = self.state();
        let before = state.work.as_ref().and_then(|work| work.connection);
        if before.is_some_and(|before| before != connection && before.is_held_by(self.pid())) {
            // Whoever was found is found late: it may be the other that came after this one.
            return Err(if connection.is_held_by(self.pid()) { NotItsOwn::Shared } else { NotItsOwn::Over });
        }
        let told = self.end(&mut state);
        state.threads = wanted::threads(self.pid);
        if self.priorities.is_some() {
            state.is_certain &= self.is_as_believed(&state);
        }
        if is_measured {
            (state.wanted, state.worked) = (self.wanted(&state).unwrap_or_default(), Duration::ZERO);
        }
        let working = self.begin(&mut state, queue, watch, is_measured, Some(connection));
        drop(state);
        tell(told);
        Ok(working)
    }

    fn begin(
        self: &Arc<Self>,
        state: &mut State,
        queue: Queue,
        watch: Watch,
        is_measured: bool,
        connection: Option<Connection>,
    ) -> Working {
        (state.work, state.seen) = (Some(Work { since: Instant::now(), watch, is_measured, connection }), None);
        state.begun += 1;
        self.set(state, queue);
        Working { process: Arc::clone(self), number: state.begun }
    }

    /// Looks at it when it has worked for half so long, and tells what it wants. Lowers it when it wants a core most of the time and
    /// counts as what is in the way of others: work that is only long, because its client thinks or it waits for something, is in
    /// nobody's way. Says to what, if what it does is to be lowered.
    pub fn outlasts(&self, now: Instant, limit: Duration) -> Option<Lowered> {
        let Looked { number, wants, noted } = self.look(now, limit)?;
        let counts_as = noted.and_then(|(watch, seen)| watch.note_cores(seen)).filter(|_| wants);
        let mut state = self.state();
        state.work.as_ref().filter(|_| state.begun == number)?;
        if let Some(queue) = counts_as.filter(|queue| *queue != Queue::First) {
            self.set(&mut state, queue);
        } else if self.nice_of(state.queue) != Some(state.nice) {
            // It may have to be lowered less now than when it began, or further.
            let queue = state.queue;
            self.set(&mut state, queue);
        }
        let is_lowered = state.queue != Queue::First && self.priorities.is_some();
        is_lowered.then(|| Lowered { pid: self.pid, nice: state.nice, slice: self.slice(state.nice) })
    }

    /// Looks at what has worked for half of so long.
    fn look(&self, now: Instant, limit: Duration) -> Option<Looked> {
        let mut state = self.state();
        let number = state.begun;
        let Work { since, connection, is_measured, .. } = *state.work.as_ref()?;
        let lasts = now.saturating_duration_since(since);
        // Half: who has waited for a core meanwhile must not pass for long.
        if lasts < limit / 2 {
            return None;
        }
        if self.kind.is_worker() {
            if connection.is_some_and(|connection| !connection.is_held_by(self.pid())) {
                // What it does now is somebody else's, although the answer to this was not read to its end yet.
                state.work = None;
                self.set(&mut state, Queue::First);
                return None;
            }
            if state.seen.is_none() && !is_measured {
                state.threads = wanted::threads(self.pid);
            }
        }
        let wanted = self.wanted(&state)?;
        // A wait for a core is counted when it ends: whoever gets none at all seems to want none.
        let is_runnable = wanted::is_runnable(self.pid, self.threads(&state));
        let measured = wanted.since(state.wanted);
        let (between, measured) = match state.seen {
            None => (lasts + state.worked, measured),
            Some((before, was_runnable)) => {
                let between = now.saturating_duration_since(before);
                (between, if was_runnable && is_runnable { measured.all_of(between) } else { measured })
            }
        };
        let wants = measured.part_of(between).0 >= 0.5;
        // Where that is not known from its beginning, or it seems to want nothing and may be waiting, only the next look tells.
        let is_first = state.seen.is_none() && (!is_measured || is_runnable && !wants);
        let is_due = state.seen.is_none_or(|(before, _)| now.saturating_duration_since(before) >= LOOK);
        if !is_due {
            return Some(Looked { number, wants: false, noted: None });
        }
        (state.seen, state.wanted, state.worked) = (Some((now, is_runnable)), wanted, Duration::ZERO);
        if is_first {
            return Some(Looked { number, wants: false, noted: None });
        }
        self.count(&state, measured, between);
        let seen = measured.on_cores(between, self.gives_way(&state));
        let noted = state.work.as_ref().map(|work| (work.watch.clone(), seen));
        Some(Looked { number, wants, noted })
    }

    /// It has done this piece of its work.
    fn ends(&self, number: u64) {
        let mut state = self.state();
        if state.begun != number {
            return;
        }
        let told = self.end(&mut state);
        if self.kind.is_worker() {
            self.set(&mut state, Queue::First);
        }
        drop(state);
        tell(told);
    }

    /// Whom to tell what of the work that is over now.
    fn end(&self, state: &mut State) -> Option<(Watch, OnCores)> {
        let Work { since, watch, is_measured, .. } = state.work.take()?;
        let now = Instant::now();
        // What was looked at while it ran has been said.
        let looked = state.seen.take();
        state.worked += now.saturating_duration_since(looked.map_or(since, |(at, _)| at));
        let enough = if self.kind.is_worker() { LOOK_AT_ONE } else { LOOK_AT_SHORT };
        if state.worked < enough || !(is_measured || looked.is_some()) {
            return None;
        }
        let wanted = self.wanted(state)?;
        let measured = wanted.since(state.wanted);
        self.count(state, measured, state.worked);
        let seen = measured.on_cores(state.worked, self.gives_way(state));
        (state.wanted, state.worked) = (wanted, Duration::ZERO);
        Some((watch, seen))
    }

    /// Counts what it wanted in a time in which it was lowered.
    fn count(&self, state: &State, measured: Wanted, time: Duration) {
        if state.nice > self.usual {
            // A wait is counted when it ends, and those that are seen are counted before.
            let threads = u32::try_from(self.threads(state).len()).unwrap_or(u32::MAX);
            let rest = time.saturating_mul(threads).saturating_sub(measured.had);
            self.lowering.count(Wanted { waited: measured.waited.min(rest), ..measured });
        }
    }

    /// Whether a worker's threads have what they were set to; another gateway may have set them too.
    fn is_as_believed(&self, state: &State) -> bool {
        let idle = self.is_idle(state.nice);
        state.threads.iter().all(|thread| {
            let now = scheduling(thread.as_raw_nonzero().get());
            now.is_ok_and(|now| now.nice == state.nice && (now.policy == Policy::Idle) == idle)
        })
    }

    /// Whether a worker with this value runs on what others leave.
    fn is_idle(&self, nice: i32) -> bool {
        self.may_idle && nice > self.usual && nice >= NICEST
    }

    /// Whether it runs with less than its usual priority.
    pub fn is_lowered(&self) -> bool {
        self.state().nice != self.usual
    }

    /// Whether more of a storm's than there are cores is in nobody's way: it weighs next to nothing beside others, and no core is
    /// to be left alone. Of workers more at once only makes more who come anew.
    fn gives_way(&self, state: &State) -> bool {
        !self.kind.is_worker()
            && state.group_follows
            && state.nice - self.usual >= NICEST
            && self.priorities.is_some_and(|priorities| priorities.spare_cores == 0)
    }

    /// What it is to have while it does such work, if it may be set.
    fn nice_of(&self, queue: Queue) -> Option<i32> {
        let priorities = self.priorities?;
        let more = match queue {
            Queue::First => 0,
            Queue::More => priorities.storm,
            Queue::Expensive => priorities.expensive,
        };
        Some((self.usual + i32::from(more).min(self.lowering.most())).min(NICEST))
    }

    fn set(&self, state: &mut State, queue: Queue) {
        state.queue = queue;
        let Some(nice) = self.nice_of(queue) else { return };
        if nice != state.nice || !state.group_follows || !state.is_certain {
            // It may have ended meanwhile; whoever reads from it will notice.
            let set = self.set_nice(state, nice);
            state.is_certain = set.is_ok() || !self.kind.is_worker();
            match set {
                Ok(()) => {
                    state.nice = nice;
                    state.group_follows = self.group.is_none_or(|group| group.set(self.pid, nice - self.usual));
                }
                Err(error) => tracing::debug!(%error, pid = self.pid.as_raw_nonzero(), "priority not changed"),
            }
        }
    }

    fn slice(&self, nice: i32) -> Option<Duration> {
        (nice > self.usual).then_some(PORTION)
    }

    fn set_nice(&self, state: &mut State, nice: i32) -> io::Result<()> {
        let slice = self.slice(nice);
        if !self.kind.is_worker() {
            return set_nice(self.pid, nice, slice);
        }
        // Threads that have begun meanwhile have what the one has that began them.
        state.threads = wanted::threads(self.pid);
        let mut outcome = Ok(());
        for thread in &state.threads {
            let number = thread.as_raw_nonzero().get();
            let set = if self.is_idle(nice) {
                // Its slice counts as long too: it decides whose turn it is among those who are owed time.
                set_nice(*thread, nice, slice).and_then(|()| set_idle(number))
            } else if self.may_idle {
                set_ordinary(number, nice).and_then(|()| slice.map_or(Ok(()), |_| set_nice(*thread, nice, slice)))
            } else {
                set_nice(*thread, nice, slice)
            };
            // One that has ended needs nothing.
            if let Err(error) = set
                && error.raw_os_error() != Some(Errno::SRCH.raw_os_error())
            {
                outcome = Err(error);
            }
        }
        outcome
    }

    fn wanted(&self, state: &State) -> Option<Wanted> {
        Wanted::of(self.pid, self.threads(state))
    }

    /// The threads that work.
    fn threads<'a>(&'a self, state: &'a State) -> &'a [Pid] {
        if self.kind.is_worker() { &state.threads } else { slice::from_ref(&self.pid) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.process.ends(self.number);
    }
}

impl Lowered {
    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Gives another process the same priority, which has none of its own to be given back.
    pub fn followed_by(&self, pid: u32) {
        let Some(pid) = numbered(pid) else { return };
        // It may have ended meanwhile. It is in this one's session or in one of its own.
        let _ = set_nice(pid, self.nice, self.slice);
        if let Ok(Some(group)) = Autogroup::of(pid) {
            group.set_to(pid, self.nice);
        }
    }
}

/// Tells what work wants; under no lock, since it may wake somebody.
fn tell(seen: Option<(Watch, OnCores)>) {
    if let Some((watch, seen)) = seen {
        watch.note_cores(seen);
    }
}

/// The process that has started a process.
pub fn parent(pid: u32) -> Option<u32> {
    let parent = wanted::parent(numbered(pid)?)?;
    Some(parent.as_raw_nonzero().get().unsigned_abs())
}

/// The processes that a process with one thread has started.
pub fn children(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn numbered(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

/// Sets a thread's `nice` value and its slice, or the `nice` value alone where the system has no call for both.
fn set_nice(thread: Pid, nice: i32, slice: Option<Duration>) -> io::Result<()> {
    set_scheduling(thread.as_raw_nonzero().get(), nice, slice).or_else(|_| Ok(setpriority_process(Some(thread), nice)?))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use cofferdam_fairness::{Gate, GateConfig, MonotonicClock};
    use cofferdam_tenant::{Class, TenantId};

    use super::*;

    /// A worker serves one connection after the other; the first may be over before whoever asked has noticed.
    #[test]
    fn a_worker_works_for_the_connection_that_it_holds_and_what_holds_two_works_for_neither() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let me = std::process::id();
        let Ok(sockets) = owner::Sockets::open() else { return };
        let connect = || {
            let client = TcpStream::connect(server).unwrap();
            let (accepted, address) = listener.accept().unwrap();
            let Some(owner::Accepted::By(inode)) = sockets.accepted(server, address).unwrap() else { panic!() };
            (client, accepted, Connection::of(me, inode).unwrap())
        };
        let ((_first, accepted, one), (_second, _accepted, other)) = (connect(), connect());
        let (process, _) = Process::new(me, Kind::Worker { like: None }, None).unwrap();
        let gate = Gate::new(GateConfig::slots(2), Arc::new(MonotonicClock::since(Instant::now())));
        let permit = gate.try_acquire(TenantId(0), Class::Rpc).unwrap();
        let watch = || permit.watch().unwrap();
        let begins = || process.state().begun;
        let before = process.serves(one, Queue::More, watch(), true).unwrap();
        assert_eq!(process.serves(other, Queue::First, watch(), true).map(drop), Err(NotItsOwn::Shared));
        drop(accepted);
        let after = process.serves(other, Queue::First, watch(), true).unwrap();
        assert_eq!(begins(), 2);
        drop(before);
        assert!(process.state().work.is_some(), "the first is over, and the second is not");
        assert_eq!(process.serves(one, Queue::First, watch(), true).map(drop), Err(NotItsOwn::Over));
        drop(after);
        assert!(process.state().work.is_none());
    }

    #[test]
    fn a_process_gives_way_by_all_that_there_is_or_not_entirely() {
        let gives_way = |usual, nice, group_follows, spare_cores| {
            let priorities = Priorities { storm: 19, expensive: 19, spare_cores };
            let (work, worked, wanted, seen) = (None, Duration::ZERO, Wanted::default(), None);
            let (threads, begun, is_certain) = (Vec::new(), 0, true);
            let queue = Queue::More;
            let state = State { nice, queue, is_certain, group_follows, work, begun, worked, wanted, seen, threads };
            let (pid, kind, may_idle, group) = (Pid::from_raw(1).unwrap(), Kind::Backend, false, None);
            let (priorities, state) = (Some(priorities), Mutex::new(state));
            let process =
                Process { pid, kind, usual, may_idle, group, priorities, lowering: Lowering::of_this_machine(), state };
            process.gives_way(&process.state())
        };
        assert!(gives_way(0, 19, true, 0) && gives_way(-5, 14, true, 0));
        assert!(!gives_way(0, 0, true, 0) && !gives_way(0, 10, true, 0), "as urgent as others, or a part of it");
        assert!(!gives_way(5, 19, true, 0) && !gives_way(19, 19, true, 0), "there is not so much left to give");
        assert!(!gives_way(0, 19, false, 0), "its session does not");
        assert!(!gives_way(0, 19, true, 1), "a core is to be left alone");
    }
}
