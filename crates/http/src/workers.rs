//! The workers of a server on this machine: which of them serves a request, what it computes, and how it gives way.
//!
//! Odoo with `workers` forks processes of which each serves one request after the other, whosever it is. The kernel tells
//! which process holds the other end of a connection ([`cofferdam_processes::owner`]); from then on the process is that request's, until the
//! server has finished. Storms and expensive work are looked for before anything is sent, so that they give way from the
//! beginning; other requests when they last, and now and then one that does not.
//!
//! A server that is no prefork server, one process for many requests, is left alone: what is not one request's can neither
//! be measured for it nor give way for it.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_fairness::{Queue, Watch};
use cofferdam_processes::owner::{Accepted, Connection, Inode, Sockets, holders};
use cofferdam_processes::{Kind, Lowering, NotItsOwn, Process, Untouched, Working, parent};
use cofferdam_tenant::{Endpoint, Priorities};

use timer::Timer;

mod timer;

/// A request that has lasted so long is looked for.
const LASTS: Duration = Duration::from_millis(20);
/// One in so long is looked for that does not last.
const SAMPLE: Duration = Duration::from_millis(20);
/// How long it may take a worker to accept, and the longest pause before it is looked for again.
const SOON: Duration = Duration::from_millis(1);
const LATER: Duration = Duration::from_millis(50);
/// For how long it is looked for before anything is sent, and after how long for the second time: nothing computes meanwhile.
const BEFORE: Duration = Duration::from_millis(4);
const AT_ONCE: Duration = Duration::from_micros(100);
/// The shortest and the longest time between two searches among all processes.
const SEARCH: Duration = Duration::from_secs(1);
const SEARCH_SELDOM: Duration = Duration::from_secs(60);

/// Both ends of a connection to a server.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ends {
    pub(crate) server: SocketAddr,
    pub(crate) gateway: SocketAddr,
}

/// The workers of one server.
#[derive(Debug)]
pub(crate) struct Workers {
    address: Endpoint,
    priorities: Option<Priorities>,
    known: Mutex<Known>,
    is_searching: AtomicBool,
    /// When it was, in milliseconds since `begun`, that a request was looked for that does not last.
    sampled: AtomicU64,
    begun: Instant,
}

#[derive(Debug)]
struct Known {
    /// `None` where the system cannot be asked.
    sockets: Option<Sockets>,
    workers: Vec<Worker>,
    /// When all processes may be searched next, and how long after that again.
    search_from: Instant,
    pause: Duration,
    /// What was said already of why they are left alone.
    said: Vec<Untouched>,
    /// One process serves many requests.
    is_shared: bool,
}

#[derive(Debug, Clone)]
struct Worker {
    process: Arc<Process>,
    /// The descriptor that its last connection had: the next has the same most of the time.
    descriptor: Option<u32>,
}

/// Who serves a connection.
enum Found {
    Worker(Arc<Process>, Connection),
    /// Nobody has accepted it.
    NotYet,
    /// One of those that are known may hold this, or somebody new.
    Somebody(Inode),
    /// Nobody on this machine, or nobody that can be told.
    Nobody,
}

impl Workers {
    pub(crate) fn new(address: &Endpoint, priorities: Option<Priorities>) -> Arc<Self> {
        let begun = Instant::now();
        let known = Known {
            sockets: Sockets::open().ok(),
            workers: Vec::new(),
            search_from: begun,
            pause: SEARCH,
            said: Vec::new(),
            is_shared: false,
        };
        Arc::new(Self {
            address: address.clone(),
            priorities,
            known: Mutex::new(known),
            is_searching: AtomicBool::new(false),
            sampled: AtomicU64::new(0),
            begun,
        })
    }

    /// By what their `nice` values may be raised.
    pub(crate) fn priorities(&self) -> Option<Priorities> {
        self.priorities
    }

    /// What a request is looked for with that was granted out of this queue.
    pub(crate) fn look(self: &Arc<Self>, ends: Ends, queue: Queue, watch: Watch) -> Look {
        let is_measured = self.is_due();
        Look { workers: Arc::clone(self), ends, queue, watch, is_measured, working: None }
    }

    /// Looks at those that have worked for so long.
    pub(crate) fn look_at_what_lasts(&self, limit: Duration) {
        let now = Instant::now();
        Lowering::of_this_machine().step(now);
        let workers: Vec<_> = self.known().workers.iter().map(|worker| Arc::clone(&worker.process)).collect();
        for process in workers {
            process.outlasts(now, limit);
        }
    }

    /// Those that run with less than their usual priority now.
    pub(crate) fn lowered(&self) -> u32 {
        self.known().workers.iter().filter(|worker| worker.process.is_lowered()).count() as u32
    }

    /// Whether it is time to look for a request that may not last.
    fn is_due(&self) -> bool {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let last = self.sampled.load(Ordering::Relaxed);
        now.saturating_sub(last) >= SAMPLE.as_millis() as u64
            && self.sampled.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Who serves a connection.
    async fn find(self: &Arc<Self>, ends: Ends) -> Found {
        match self.known().serving(ends) {
            Found::Somebody(_) => {}
            found => return found,
        }
        // Elsewhere, because it may take long; one at a time, because the next finds what the first has found.
        if self.is_searching.swap(true, Ordering::Acquire) {
            return Found::NotYet;
        }
        let searching = Searching(Arc::clone(self));
        let searched = tokio::task::spawn_blocking(move || searching.0.search(ends));
        searched.await.unwrap_or(Found::Nobody)
    }

    /// Searches the processes that are known, and all others when it is time to.
    fn search(&self, ends: Ends) -> Found {
        let (inode, workers) = {
            let mut known = self.known();
            match known.serving(ends) {
                Found::Somebody(inode) => (inode, known.workers.clone()),
                found => return found,
            }
        };
        for worker in workers {
            if let Some(held) = Connection::of(worker.process.pid(), inode) {
                return self.known().has(&worker.process, held);
            }
        }
        let listening = {
            let mut known = self.known();
            let now = Instant::now();
            if now < known.search_from {
                return known.nobody_yet();
            }
            known.pause = (2 * known.pause).min(SEARCH_SELDOM);
            known.search_from = now + known.pause;
            known.sockets.as_ref().and_then(|sockets| sockets.listening(ends.server).ok().flatten())
        };
        let pids = listening.map(holders).unwrap_or_default();
        let found = self.learn(&pids, inode);
        let mut known = self.known();
        if known.workers.is_empty() {
            drop(known);
            self.say(Untouched::NotHere);
            return Found::Nobody;
        }
        if !matches!((&found, known.serving(ends)), (Found::Nobody, Found::Somebody(_))) {
            known.pause = SEARCH;
            known.search_from = Instant::now() + SEARCH;
        }
        if matches!(found, Found::Nobody) { Found::NotYet } else { found }
    }

    /// Whoever listens, and was started by the one who listened first, is a worker.
    fn learn(&self, listening: &[u32], inode: Inode) -> Found {
        let all: HashSet<u32> = listening.iter().copied().collect();
        let mut workers: Vec<Worker> = self.known().workers.clone();
        workers.retain(|worker| all.contains(&worker.process.pid()));
        let known: HashSet<u32> = workers.iter().map(|worker| worker.process.pid()).collect();
        for pid in listening.iter().copied().filter(|pid| !known.contains(pid)) {
            // Not by one that listens for a server, as a service manager does, nor by a worker.
            let is_master =
                |pid: &u32| *pid != 1 && all.contains(pid) && parent(*pid).is_none_or(|p| !all.contains(&p));
            let Some(master) = parent(pid).filter(is_master) else { continue };
            if let Ok((process, untouched)) = Process::new(pid, Kind::Worker { like: Some(master) }, self.priorities) {
                if let Some(why) = untouched {
                    self.say(why);
                }
                workers.push(Worker { process, descriptor: None });
            }
        }
        let mut holder = Found::Nobody;
        for worker in &mut workers {
            if let Some(held) = Connection::of(worker.process.pid(), inode) {
                worker.descriptor = Some(held.descriptor);
                holder = Found::Worker(Arc::clone(&worker.process), held);
            }
        }
        self.known().workers = workers;
        holder
    }

    fn say(&self, why: Untouched) {
        let mut known = self.known();
        let is_news = !known.said.contains(&why) && !known.is_shared;
        if is_news {
            known.said.push(why);
        }
        drop(known);
        if is_news && self.priorities.is_some() {
            tracing::warn!(server = %self.address, %why, "priorities of workers are not set");
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Who serves a connection, as far as few questions tell.
    fn serving(&mut self, ends: Ends) -> Found {
        let Some(sockets) = self.sockets.as_ref().filter(|_| !self.is_shared) else { return Found::Nobody };
        let inode = match sockets.accepted(ends.server, ends.gateway) {
            Ok(Some(Accepted::By(inode))) => inode,
            Ok(Some(Accepted::NotYet)) => return Found::NotYet,
            // With our end open the other is elsewhere; otherwise it is over.
            Ok(None) => {
                let is_open = sockets.is_open(ends.server, ends.gateway).unwrap_or(false);
                return if is_open { Found::Nobody } else { Found::NotYet };
            }
            Err(_) => return self.nobody_yet(),
        };
        let held = self.workers.iter().enumerate().find_map(|(n, worker)| {
            let held = Connection { inode, descriptor: worker.descriptor? };
            held.is_held_by(worker.process.pid()).then_some((n, held))
        });
        let Some((n, held)) = held else { return Found::Somebody(inode) };
        // Whoever has waited longest accepts the next, and is asked first.
        let worker = self.workers.remove(n);
        let process = Arc::clone(&worker.process);
        self.workers.push(worker);
        Found::Worker(process, held)
    }

    /// Nobody was found now: where there are workers, it may be found to be one of them later.
    fn nobody_yet(&self) -> Found {
        if self.workers.is_empty() { Found::Nobody } else { Found::NotYet }
    }

    fn has(&mut self, process: &Arc<Process>, held: Connection) -> Found {
        if let Some(worker) = self.workers.iter_mut().find(|worker| Arc::ptr_eq(&worker.process, process)) {
            worker.descriptor = Some(held.descriptor);
        }
        Found::Worker(Arc::clone(process), held)
    }
}

/// A request whose worker is looked for. Dropping it says that the worker has done its work.
#[derive(Debug)]
pub(crate) struct Look {
    workers: Arc<Workers>,
    ends: Ends,
    queue: Queue,
    watch: Watch,
    /// Whether what it wants is measured although it may not last.
    is_measured: bool,
    working: Option<Working>,
}

/// A search; others do not begin one as long as it lives.
struct Searching(Arc<Workers>);

impl Drop for Searching {
    fn drop(&mut self) {
        self.0.is_searching.store(false, Ordering::Release);
    }
}

impl Look {
    /// Looks for the worker before it has anything to do, where what it does is in the way of others. Returns soon
    /// whether or not it was found. **Cancel-safe.**
    pub(crate) async fn before(&mut self) {
        if self.queue == Queue::First || self.workers.priorities.is_none() {
            return;
        }
        let looking = async {
            if self.is_settled().await {
                return;
            }
            let (mut timer, mut pause) = (Timer::new(), AT_ONCE);
            loop {
                let paused = match &mut timer {
                    Ok(timer) => timer.pause(pause).await.is_ok(),
                    Err(_) => false,
                };
                if !paused {
                    tokio::time::sleep(SOON).await;
                }
                if self.is_settled().await {
                    return;
                }
                pause = (2 * pause).min(SOON);
            }
        };
        let _ = tokio::time::timeout(BEFORE, looking).await;
    }

    /// Looks for the worker while it works. **Cancel-safe.**
    pub(crate) async fn while_it_works(&mut self) {
        let is_expected = self.queue != Queue::First && self.workers.priorities.is_some();
        let mut pause = if is_expected || self.is_measured { SOON } else { LASTS };
        while self.working.is_none() {
            tokio::time::sleep(pause).await;
            if self.is_settled().await {
                return;
            }
            pause = (2 * pause).min(LATER);
        }
    }

    /// Whether there is nothing more to look for.
    async fn is_settled(&mut self) -> bool {
        match self.workers.find(self.ends).await {
            Found::Worker(process, connection) => {
                // Of a storm's pieces not each is measured.
                let is_measured = self.is_measured || self.queue != Queue::More;
                let working = process.serves(connection, self.queue, self.watch.clone(), is_measured);
                if matches!(working, Err(NotItsOwn::Shared)) {
                    let address = &self.workers.address;
                    tracing::warn!(server = %address, "a process serves several requests at once: it is left alone");
                    self.workers.known().is_shared = true;
                }
                self.working = working.ok();
                true
            }
            Found::NotYet | Found::Somebody(_) => false,
            Found::Nobody => {
                self.workers.say(Untouched::NotHere);
                self.watch.forget_cores();
                true
            }
        }
    }
}
