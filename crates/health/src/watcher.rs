//! Looking at everything, each at its time, a few at once.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::engine::{Engine, Picture};
use crate::model::{Observation, Status, Topic};
use crate::probe::{Probe, look};

/// Runs probes and gathers what they see.
#[derive(Clone)]
pub struct Watcher {
    probes: Arc<Vec<Arc<dyn Probe>>>,
    engine: Arc<Mutex<Engine>>,
    concurrency: usize,
}

impl Watcher {
    /// A watcher of probes. At most `concurrency` of a kind look at a time: those that hang keep out nobody of another kind.
    ///
    /// What a probe cannot look at because nothing answers is a consequence of that.
    pub fn new(probes: Vec<Arc<dyn Probe>>, mut engine: Engine, concurrency: usize) -> Self {
        for probe in &probes {
            let reachability = probe.reachability();
            for check in probe.checks() {
                engine.expect_within(check, probe.interval() * 5 + probe.timeout());
            }
            for check in probe.checks().into_iter().filter(|check| *check != reachability) {
                engine.needs(check, reachability.clone());
            }
        }
        Self { probes: Arc::new(probes), engine: Arc::new(Mutex::new(engine)), concurrency: concurrency.max(1) }
    }

    /// How everything is now.
    pub fn picture(&self, now: Timestamp) -> Picture {
        self.with_engine(|engine| engine.picture(now))
    }

    /// Asks the engine something.
    pub fn with_engine<T>(&self, ask: impl FnOnce(&mut Engine) -> T) -> T {
        ask(&mut self.engine.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Goes on from what another watcher has seen, which has to look no more.
    pub(crate) fn go_on_from(&self, before: &Self) {
        before.with_engine(|before| self.with_engine(|engine| engine.go_on_from(before)));
    }

    /// How long it takes until everything has been looked at, wherever looks end in time.
    pub fn longest(&self) -> Duration {
        self.probes.iter().map(|probe| probe.interval() + probe.timeout()).max().unwrap_or_default()
    }

    /// Looks at everything once.
    pub async fn look_once(&self) {
        let mut rooms = Rooms::of(self.concurrency);
        let mut looks = JoinSet::new();
        for probe in self.probes.iter() {
            let (probe, room) = (Arc::clone(probe), rooms.of_kind(probe.kind()));
            looks.spawn(async move { room.look(probe.as_ref()).await });
        }
        while let Some(found) = looks.join_next().await {
            // A probe that panics has seen nothing, and what it looks at stays unknown.
            self.take(found.unwrap_or_default());
        }
    }

    /// Looks at everything at its time until it is cancelled. Probes are spread over their interval by their names, so that
    /// a thousand of them never look at the same moment.
    ///
    /// A probe that has not ended when its time comes again is not started twice.
    pub async fn run(&self, stop: &CancellationToken) {
        let begun = Instant::now();
        let mut times: BinaryHeap<Reverse<(Instant, usize)>> = self
            .probes
            .iter()
            .enumerate()
            .map(|(index, probe)| Reverse((begun + offset(&probe.name(), probe.interval()), index)))
            .collect();
        let mut rooms = Rooms::of(self.concurrency);
        let mut looks: JoinSet<Vec<Observation>> = JoinSet::new();
        let mut running: HashMap<tokio::task::Id, usize> = HashMap::new();
        loop {
            let next = times.peek().map(|Reverse((at, _))| *at);
            tokio::select! {
                () = stop.cancelled() => return,
                Some(found) = looks.join_next_with_id() => {
                    let (id, found) = found.map_or_else(|error| (error.id(), None), |(id, found)| (id, Some(found)));
                    if let Some(index) = running.remove(&id) {
                        let probe = &self.probes[index];
                        // A fault of ours: it says so, and does not just vanish.
                        let found = found.unwrap_or_else(|| {
                            let unknown = |check| {
                                let text = "the probe has broken: please report it";
                                Observation::pass(check, Topic::Availability, Timestamp::now(), text).with(Status::Unknown)
                            };
                            probe.checks().into_iter().map(unknown).collect()
                        });
                        let interval = probe.interval().max(Duration::from_millis(100));
                        // On its own beat, whatever it took.
                        let late = (Instant::now() - begun).saturating_sub(offset(&probe.name(), interval));
                        let beats = late.as_nanos() / interval.as_nanos() + 1;
                        let beats = u32::try_from(beats).unwrap_or(u32::MAX);
                        times.push(Reverse((begun + offset(&probe.name(), interval) + interval * beats, index)));
                        self.take(found);
                    }
                }
                () = tokio::time::sleep_until(next.unwrap_or(begun)), if next.is_some() => {
                    if let Some(Reverse((_, index))) = times.pop() {
                        let probe = Arc::clone(&self.probes[index]);
                        let room = rooms.of_kind(probe.kind());
                        let handle = looks.spawn(async move { room.look(probe.as_ref()).await });
                        running.insert(handle.id(), index);
                    }
                }
            }
        }
    }

    fn take(&self, found: Vec<Observation>) {
        self.with_engine(|engine| {
            for observation in found {
                engine.observe(observation);
            }
        });
    }
}

/// Room for looks of one kind.
struct Room {
    places: Arc<Semaphore>,
    /// For those that have waited for so long that they keep out others, who may be answered at once.
    waiting: Arc<Semaphore>,
}

/// A look that only waits gives its place to another after so long.
const SHORT: Duration = Duration::from_secs(1);
/// As many as this wait for each that looks.
const WAITING: usize = 8;

impl Room {
    async fn look(&self, probe: &dyn Probe) -> Vec<Observation> {
        let place = self.places.acquire().await;
        let mut looking = std::pin::pin!(look(probe, Timestamp::now()));
        if probe.waits() {
            tokio::select! {
                found = &mut looking => return found,
                () = tokio::time::sleep(SHORT) => {}
            }
            tokio::select! {
                found = &mut looking => return found,
                waits = self.waiting.acquire() => {
                    drop(place);
                    let _waits = waits;
                    return looking.await;
                }
            }
        }
        looking.await
    }
}

/// Room for looks, by their kind.
struct Rooms {
    each: usize,
    rooms: HashMap<&'static str, Arc<Room>>,
}

impl Rooms {
    fn of(each: usize) -> Self {
        Self { each, rooms: HashMap::new() }
    }

    fn of_kind(&mut self, kind: &'static str) -> Arc<Room> {
        let room = |places| Arc::new(Semaphore::new(places));
        let made = || Arc::new(Room { places: room(self.each), waiting: room(self.each * WAITING) });
        Arc::clone(self.rooms.entry(kind).or_insert_with(made))
    }
}

/// A probe's place in its interval.
fn offset(name: &str, interval: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    interval.mul_f64(hasher.finish() as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineOptions;
    use crate::model::CheckId;
    use async_trait::async_trait;
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct Counting {
        number: usize,
        running: Arc<AtomicUsize>,
        most: Arc<AtomicUsize>,
        looks: Arc<AtomicUsize>,
    }

    #[async_trait]
    impl Probe for Counting {
        fn name(&self) -> String {
            format!("probe {}", self.number)
        }

        fn checks(&self) -> Vec<CheckId> {
            vec![self.reachability()]
        }

        fn reachability(&self) -> CheckId {
            CheckId::tenant(&format!("t{}", self.number), "x")
        }

        fn interval(&self) -> Duration {
            Duration::from_secs(10)
        }

        async fn look(&self, now: Timestamp) -> Vec<Observation> {
            struct Leaves<'a>(&'a AtomicUsize);
            impl Drop for Leaves<'_> {
                fn drop(&mut self) {
                    self.0.fetch_sub(1, Ordering::SeqCst);
                }
            }
            let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
            let _leaves = Leaves(&self.running);
            self.most.fetch_max(running, Ordering::SeqCst);
            tokio::time::sleep(if self.number == 0 { Duration::from_secs(60) } else { Duration::from_millis(20) })
                .await;
            self.looks.fetch_add(1, Ordering::SeqCst);
            vec![Observation::pass(self.reachability(), Topic::Availability, now, "well")]
        }
    }

    /// Looks of its kind hang for as long as they may, or are done at once, or break.
    struct OfKind(&'static str, usize, Arc<AtomicUsize>);

    #[async_trait]
    impl Probe for OfKind {
        fn name(&self) -> String {
            format!("{} {}", self.0, self.1)
        }

        fn kind(&self) -> &'static str {
            if self.waits() { "page" } else { self.0 }
        }

        fn checks(&self) -> Vec<CheckId> {
            vec![self.reachability()]
        }

        fn reachability(&self) -> CheckId {
            CheckId::tenant(&format!("{}{}", self.0, self.1), "x")
        }

        fn interval(&self) -> Duration {
            if self.waits() { Duration::from_secs(30) } else { Duration::from_secs(10) }
        }

        fn waits(&self) -> bool {
            self.0.contains("page")
        }

        fn timeout(&self) -> Duration {
            Duration::from_secs(15)
        }

        async fn look(&self, now: Timestamp) -> Vec<Observation> {
            match self.0 {
                "hangs" | "page that hangs" => tokio::time::sleep(Duration::from_secs(60)).await,
                "breaks" => panic!("a fault of ours"),
                _ => drop(self.2.fetch_add(1, Ordering::SeqCst)),
            }
            vec![Observation::pass(self.reachability(), Topic::Availability, now, "well")]
        }
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_hang_keep_out_nobody_of_another_kind_and_one_that_breaks_says_so() {
        let looks = Arc::new(AtomicUsize::new(0));
        let of = |kind, n| -> Arc<dyn Probe> { Arc::new(OfKind(kind, n, Arc::clone(&looks))) };
        let mut probes: Vec<_> = (0..100).map(|n| of("hangs", n)).collect();
        probes.extend([of("quick", 0), of("breaks", 0)]);
        let watcher = Watcher::new(probes, Engine::new(EngineOptions::default()), 2);
        let stop = CancellationToken::new();
        let (running, ends) = (watcher.clone(), stop.clone());
        let task = tokio::spawn(async move { running.run(&ends).await });
        tokio::time::sleep(Duration::from_secs(101)).await;
        stop.cancel();
        task.await.unwrap();
        assert!((9..=11).contains(&looks.load(Ordering::SeqCst)), "{looks:?}");
        let picture = watcher.picture(Timestamp::now());
        let broken = &picture.checks["tenant breaks0: x"];
        assert!(broken.status == Status::Unknown && broken.observation.text.contains("has broken"), "{broken:#?}");
    }

    /// All pages of a hundred tenants hang, or of a thousand: those that do not are looked at all the same.
    #[tokio::test(start_paused = true)]
    async fn pages_that_hang_are_known_soon_and_blind_nobody() {
        let looks = Arc::new(AtomicUsize::new(0));
        for (hanging, well) in [(100, 900), (1_000, 0)] {
            let of = |kind, n| -> Arc<dyn Probe> { Arc::new(OfKind(kind, n, Arc::clone(&looks))) };
            let probes: Vec<_> =
                (0..hanging).map(|n| of("page that hangs", n)).chain((0..well).map(|n| of("page", n))).collect();
            let watcher = Watcher::new(probes, Engine::new(EngineOptions::default()), 8);
            let stop = CancellationToken::new();
            let (running, ends) = (watcher.clone(), stop.clone());
            let task = tokio::spawn(async move { running.run(&ends).await });
            looks.store(0, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_secs(600)).await;
            stop.cancel();
            task.await.unwrap();
            // Nearly twenty looks at each.
            assert!(looks.load(Ordering::SeqCst) >= well * 17, "{looks:?}");
            let picture = watcher.picture(Timestamp::now());
            let failing = picture.checks.values().filter(|state| state.status == Status::Fail).count();
            assert!(failing >= hanging * 9 / 10, "{failing} of {hanging} are known");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn looks_are_spread_and_few_at_a_time_and_who_hangs_is_told_of() {
        let (running, most, looks) = (Arc::default(), Arc::default(), Arc::default());
        let probes: Vec<Arc<dyn Probe>> = (0..200)
            .map(|number| -> Arc<dyn Probe> {
                let (running, most, looks) = (Arc::clone(&running), Arc::clone(&most), Arc::clone(&looks));
                Arc::new(Counting { number, running, most, looks })
            })
            .collect();
        let watcher = Watcher::new(probes, Engine::new(EngineOptions::default()), 8);
        let stop = CancellationToken::new();
        let running = watcher.clone();
        let ends = stop.clone();
        let task = tokio::spawn(async move { running.run(&ends).await });
        tokio::time::sleep(Duration::from_secs(65)).await;
        stop.cancel();
        task.await.unwrap();
        let looks = looks.load(Ordering::SeqCst);
        assert!((199 * 5..=199 * 7).contains(&looks), "{looks}");
        assert!(most.load(Ordering::SeqCst) <= 8, "{most:?}");
        let picture = watcher.picture(Timestamp::now());
        assert_eq!(picture.checks["tenant t0: x"].status, Status::Fail);
        assert!(picture.checks["tenant t0: x"].observation.text.contains("no answer within 5 s"));
        assert_eq!(picture.checks["tenant t1: x"].status, Status::Pass);
    }
}
