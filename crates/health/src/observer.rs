//! Looks, counts, remembers, tells: everything that a watch does, for whoever runs one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::alert::{self, AlertOptions, Alerts, AtOnce, Calendars, Notice, eased};
use crate::config::Setup;
use crate::engine::Picture;
use crate::memory::{LOOKS, Memory, TOLD};
use crate::metrics::{Sources, render};
use crate::model::{CheckId, Status, Subject};
use crate::page::{Isolation, PageSources, page};
use crate::service::{ServiceState, health_json, states};
use crate::sink::Sinks;
use crate::slo::{Budget, ByObjective, Look, Objective, Tally};
use crate::{History, Watcher};

/// A running watch. Looks in tasks of its own until it is stopped; [`Observer::step`] is to be called every few seconds.
pub struct Observer {
    setup: Setup,
    watcher: Watcher,
    told: Arc<Mutex<Told>>,
    sinks: Arc<tokio::sync::Mutex<Sinks>>,
    history: Option<History>,
    memory: Option<Memory>,
    looking: CancellationToken,
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observer").field("setup", &self.setup).finish_non_exhaustive()
    }
}

/// What a watch remembers.
struct Told {
    alerts: Alerts,
    /// What is remembered of what was told.
    kept: alert::Told,
    /// Whether looks were counted that are not remembered.
    uncounted: bool,
    tallies: ByObjective<Tally>,
    budgets: ByObjective<Budget>,
    counted: Timestamp,
    /// When what was counted last of a check was seen: no look is counted twice.
    seen: BTreeMap<CheckId, Timestamp>,
    /// Bad looks of which it is not known yet whether something shared was at fault, and for how many each stands.
    open: Vec<(String, Objective, CheckId, Timestamp, u32)>,
    /// How often nothing was counted, because what was good, or bad, had not been looked at again.
    waited: ByObjective<[u32; 2]>,
    /// The clock at the last step, and one that nobody sets.
    clock: (Timestamp, Instant),
    /// When Alertmanager was last told what is open.
    refreshed: Timestamp,
    /// Notices that nobody sends yet.
    unsent: Vec<Notice>,
    /// What went wrong in sending that nobody has heard of yet.
    problems: Vec<String>,
}

/// What a step has come to.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// Who is told what.
    pub notices: Vec<Notice>,
    /// What could not be sent, in words.
    pub problems: Vec<String>,
}

/// How often Alertmanager hears what is still open.
const REFRESH: Duration = Duration::from_secs(60);
/// Clocks that part by more than this have been set, or have slept.
const JUMP: SignedDuration = SignedDuration::from_secs(10);
/// A step that comes so late comes after a pause in which nobody looked.
const LATE: SignedDuration = SignedDuration::from_secs(60);
/// How long a step waits for its notices to be sent.
const PATIENCE: Duration = Duration::from_secs(2);

impl Observer {
    /// Begins to look, on the runtime that is current, until `stop`. Fails, in words, where notices cannot be sent.
    pub fn start(setup: Setup, stop: &CancellationToken) -> Result<Arc<Self>, String> {
        let mut observer = Self::of(setup, stop)?;
        let until = observer.patience();
        if let Some(memory) = &observer.memory {
            let mut told = observer.told();
            match memory.recall(TOLD) {
                Ok(open) => told.alerts.resume(open, until),
                Err(problem) => told.problems.push(problem),
            }
            told.kept = told.alerts.told();
            match memory.recall::<Vec<((String, Objective), Tally)>>(LOOKS) {
                // Of whoever is still promised something.
                Ok(looks) => {
                    let promised = |key: &(String, Objective)| observer.setup.objectives.contains_key(key);
                    told.tallies.extend(looks.into_iter().filter(|(key, _)| promised(key)));
                }
                Err(problem) => told.problems.push(problem),
            }
        }
        observer.look();
        Ok(Arc::new(observer))
    }

    /// The same with another setup, in place of this one, which looks and tells no more: what was believed, told and counted
    /// goes over, as far as the same is looked at. Fails, in words, where notices cannot be sent; this one then goes on.
    pub fn go_on_with(&self, setup: Setup, stop: &CancellationToken) -> Result<Arc<Self>, String> {
        let mut observer = Self::of(setup, stop)?;
        self.looking.cancel();
        observer.watcher.go_on_from(&self.watcher);
        let until = observer.patience();
        {
            let (before, mut told) = (&mut *self.told(), observer.told());
            told.alerts.go_on_from(std::mem::take(&mut before.alerts), until);
            // What is to be remembered is written anew.
            told.tallies = std::mem::take(&mut before.tallies);
            told.budgets.clone_from(&before.budgets);
            told.seen = std::mem::take(&mut before.seen);
            told.open = std::mem::take(&mut before.open);
            let promised = |key: &(String, Objective)| observer.setup.objectives.contains_key(key);
            told.open.retain(|(tenant, objective, ..)| promised(&(tenant.clone(), *objective)));
            told.unsent = std::mem::take(&mut before.unsent);
            told.problems = std::mem::take(&mut before.problems);
            told.counted = before.counted;
            told.waited = std::mem::take(&mut before.waited);
            told.waited.retain(|key, _| promised(key));
            told.tallies.retain(|key, _| promised(key));
            told.uncounted = true;
        }
        // One of us remembers in a directory.
        if self.setup.state() == observer.setup.state() {
            observer.memory.clone_from(&self.memory);
        }
        // Whoever has yet to be told by the same ways is.
        let same = |of: &Setup| serde_json::to_value(&of.file.notices).ok();
        if same(&self.setup) == same(&observer.setup) {
            observer.sinks = Arc::clone(&self.sinks);
        }
        observer.look();
        Ok(Arc::new(observer))
    }

    /// One that does not look yet, and knows nothing.
    fn of(setup: Setup, stop: &CancellationToken) -> Result<Self, String> {
        let (watcher, sinks, history) = (setup.watcher(false), setup.sinks()?, setup.history());
        let (notices, defaults) = (&setup.file.notices, AlertOptions::default());
        let options = AlertOptions {
            // Sooner, a cause may not have been seen yet, and its consequences would be told instead.
            after: notices.after.map_or(defaults.after, |after| after.0).max(setup.file.interval.0 * 2),
            repeat: notices.repeat.map_or(defaults.repeat, |repeat| repeat.0),
            ..defaults
        };
        let now = Timestamp::now();
        let told = Told {
            alerts: Alerts::new(options),
            kept: alert::Told::default(),
            uncounted: false,
            tallies: BTreeMap::new(),
            budgets: BTreeMap::new(),
            counted: now,
            seen: BTreeMap::new(),
            open: Vec::new(),
            waited: BTreeMap::new(),
            clock: (now, Instant::now()),
            refreshed: now,
            unsent: Vec::new(),
            problems: Vec::new(),
        };
        let memory = setup.state().map(Memory::new);
        Ok(Self {
            setup,
            watcher,
            told: Arc::new(Mutex::new(told)),
            sinks: Arc::new(tokio::sync::Mutex::new(sinks)),
            history,
            memory,
            looking: stop.child_token(),
        })
    }

    /// Until when nothing is over for not having been seen: everything is looked at twice until then.
    fn patience(&self) -> Timestamp {
        let patience = self.watcher.longest().max(self.setup.file.interval.0 * 5) * 3;
        let patience = SignedDuration::try_from(patience).unwrap_or(SignedDuration::MAX);
        Timestamp::now().checked_add(patience).unwrap_or(Timestamp::MAX)
    }

    fn look(&mut self) {
        let (watcher, looking) = (self.watcher.clone(), self.looking.clone());
        tokio::spawn(async move { watcher.run(&looking).await });
    }

    /// Writes down what is not yet remembered. To be called at the end.
    pub async fn close(&self) -> Result<(), String> {
        self.remember().await
    }

    /// What is watched.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// How often to step: a tenth of the interval, within reason.
    pub fn every(&self) -> Duration {
        (self.setup.file.interval.0 / 10).clamp(Duration::from_millis(200), Duration::from_secs(5))
    }

    /// Counts, decides who is told what, and sends it. What could not be sent waits for the next step; what takes long goes on
    /// beside the next, so that a step takes seconds at most.
    pub async fn step(&self) -> Step {
        if self.looking.is_cancelled() {
            return Step::default();
        }
        let now = Timestamp::now();
        let notices = self.decide(now);
        self.told().unsent.extend(notices.iter().cloned());
        // Whoever is told may take its time: nobody waits for that for long, and what went wrong is told with a later step.
        if let Ok(mut sinks) = Arc::clone(&self.sinks).try_lock_owned() {
            let told = Arc::clone(&self.told);
            let sending = tokio::spawn(async move {
                let unsent = std::mem::take(&mut locked(&told).unsent);
                let mut problems = sinks.send(&unsent).await;
                let open: Option<Vec<Notice>> = {
                    let told = &mut *locked(&told);
                    let due = now.duration_since(told.refreshed).unsigned_abs() >= REFRESH;
                    due.then(|| {
                        told.refreshed = now;
                        told.alerts.open().into_iter().cloned().collect()
                    })
                };
                if let Some(open) = open {
                    problems.extend(sinks.refresh(&open.iter().collect::<Vec<_>>()).await);
                }
                locked(&told).problems.extend(problems);
            });
            let _ = tokio::time::timeout(PATIENCE, sending).await;
        }
        let mut problems = std::mem::take(&mut self.told().problems);
        if let Err(problem) = self.remember().await {
            problems.push(problem);
        }
        let news = self.watcher.with_engine(crate::engine::Engine::take_news);
        if let Some(history) = &self.history
            && let Err(problem) = history.keep(news, now).await
        {
            problems.push(problem);
        }
        Step { notices, problems }
    }

    /// Writes down what was told and what was counted, where it has changed.
    async fn remember(&self) -> Result<(), String> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let open = self.told().alerts.told();
        if self.told().kept != open {
            memory.keep(TOLD, serde_json::to_vec(&open)).await?;
            self.told().kept = open;
        }
        let looks = {
            let mut told = self.told();
            if !std::mem::take(&mut told.uncounted) {
                return Ok(());
            }
            serde_json::to_vec(&told.tallies.iter().collect::<Vec<_>>())
        };
        let kept = memory.keep(LOOKS, looks).await;
        self.told().uncounted |= kept.is_err();
        kept
    }

    fn decide(&self, now: Timestamp) -> Vec<Notice> {
        let picture = self.watcher.picture(now);
        let told = &mut *self.told();
        let (then, before) = std::mem::replace(&mut told.clock, (now, Instant::now()));
        let passed = SignedDuration::try_from(before.elapsed()).unwrap_or(SignedDuration::MAX);
        if (now.duration_since(then) - passed).abs() > JUMP || passed > LATE {
            told.alerts.clock_jumped(now);
        }
        let calendars = AtOnce::new(&self.setup.calendars, now);
        let interval = self.setup.file.interval.0;
        // Each interval counts once.
        if now.duration_since(told.counted).unsigned_abs() >= interval {
            told.counted = now;
            for key in self.setup.objectives.keys() {
                match judge(&picture, &key.0, key.1, &calendars, now, &mut told.seen) {
                    Some(Judged::Look(look)) => {
                        let [good, bad] = told.waited.remove(key).unwrap_or_default();
                        let stands_for = 1 + if look == Look::Good { good } else { bad };
                        told.tallies.entry(key.clone()).or_default().add(now, look, stands_for, interval);
                        told.uncounted = true;
                    }
                    // What was bad before it and has not been looked at meanwhile was bad meanwhile.
                    Some(Judged::Bad(check, at)) => {
                        let [_, bad] = told.waited.remove(key).unwrap_or_default();
                        told.open.push((key.0.clone(), key.1, check, at, 1 + bad));
                    }
                    Some(Judged::Waits(bad)) => {
                        told.waited.entry(key.clone()).or_default()[usize::from(bad)] += 1;
                    }
                    None => {}
                }
            }
        }
        // Whose fault a bad look was is known when what it needs was looked at after it.
        let patience = SignedDuration::try_from(interval * 3).unwrap_or(SignedDuration::MAX);
        let (tallies, uncounted) = (&mut told.tallies, &mut told.uncounted);
        self.watcher.with_engine(|engine| {
            told.open.retain(|(tenant, objective, check, at, stands_for)| {
                let waited = now.duration_since(*at).abs() > patience;
                let Some(shared) = engine.explained(check, *at).or(waited.then_some(false)) else { return true };
                let look = if shared { Look::Shared } else { Look::Bad };
                tallies.entry((tenant.clone(), *objective)).or_default().add(*at, look, *stands_for, interval);
                *uncounted = true;
                false
            });
        });
        let budget = |(key, tally): (&(String, Objective), &Tally)| {
            Some((key.clone(), tally.budget(*self.setup.objectives.get(key)?, now)))
        };
        told.budgets = told.tallies.iter().filter_map(budget).collect();
        told.alerts.step(now, &picture, &told.budgets, &calendars)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        locked(&self.told)
    }

    /// How everything is now.
    pub fn picture(&self) -> Picture {
        self.watcher.picture(Timestamp::now())
    }

    /// How business services are now.
    pub fn services(&self) -> Vec<ServiceState> {
        states(&self.setup.file.services, &self.picture())
    }

    /// Everything as `application/health+json`.
    pub fn health(&self) -> Value {
        health_json("everything that is looked at", self.picture().checks.values())
    }

    /// A tenant as `application/health+json`; none where nobody knows it.
    pub fn health_of(&self, tenant: &str) -> Option<Value> {
        self.setup.knows(tenant).then_some(())?;
        let picture = self.picture();
        Some(health_json(tenant, picture.of(&Subject::Tenant(tenant.to_owned()))))
    }

    /// Everything in Prometheus' text format.
    pub fn metrics(&self) -> String {
        let (picture, services) = (self.picture(), self.services());
        let told = self.told();
        let looks = told.tallies.iter().map(|(key, tally)| (key.clone(), tally.looks)).collect();
        let sources = Sources {
            picture: &picture,
            services: &services,
            budgets: &told.budgets,
            looks: &looks,
            calendars: &self.setup.calendars,
        };
        render(&sources, Timestamp::now())
    }

    /// The page for people.
    pub fn page(&self, isolation: &[Isolation]) -> String {
        let (picture, services) = (self.picture(), self.services());
        let told = self.told();
        let budgets = &told.budgets;
        page(&PageSources { picture: &picture, services: &services, budgets, isolation }, Timestamp::now())
    }
}

fn locked(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the looks at a tenant count.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Judged {
    Look(Look),
    /// Bad, and nothing explains it yet: this one, seen then.
    Bad(CheckId, Timestamp),
    /// What was good, or bad if this is true, has not been looked at again.
    Waits(bool),
}

/// How what was seen of a tenant since the last time counts for an objective; none where nobody could look. Each look counts
/// once.
fn judge(
    picture: &Picture,
    tenant: &str,
    objective: Objective,
    calendars: &dyn Calendars,
    now: Timestamp,
    counted: &mut BTreeMap<CheckId, Timestamp>,
) -> Option<Judged> {
    let subject = Subject::Tenant(tenant.to_owned());
    let effects = calendars.effects(&subject, now);
    let (mut good, mut known, mut waits, mut shared, mut own) = (false, false, false, false, None);
    for state in picture.of(&subject).filter(|state| objective.aspects().contains(&state.check.aspect.as_str())) {
        // What was seen, believed or not: whoever was sent away by every second look was not served half of the time. What is
        // too old says nothing.
        let seen = &state.observation;
        let bad = match (objective, seen.status) {
            (_, Status::Unknown) => continue,
            _ if state.since > seen.at && state.status == Status::Unknown => continue,
            (Objective::Availability, status) => status == Status::Fail,
            (Objective::Latency, status) => status.min(eased(seen, state.topic, &effects)) != Status::Pass,
        };
        let fresh = counted.insert(state.check.clone(), seen.at) != Some(seen.at);
        let another = state.because_of.as_ref().is_some_and(|cause| cause.subject != subject);
        match (fresh, bad) {
            (true, false) => good = true,
            (false, false) => known = true,
            // One look that was bad is one, however long the next one takes; and meanwhile it is not good either.
            (false, true) => waits = true,
            (true, true) if another => shared = true,
            (true, true) => own = own.or(Some(Judged::Bad(state.check.clone(), seen.at))),
        }
    }
    match own {
        // A fault of its own counts before another's.
        Some(own) => Some(own),
        None if shared => Some(Judged::Look(Look::Shared)),
        None if waits => Some(Judged::Waits(true)),
        None if good => Some(Judged::Look(Look::Good)),
        None => known.then_some(Judged::Waits(false)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Engine, EngineOptions, Hysteresis};
    use crate::model::{CheckId, Evidence, Observation, Topic};
    use cofferdam_tenant::calendar::{Calendar, CalendarConfig};

    #[test]
    fn a_look_is_a_tenants_own_fault_only_where_nothing_shared_explains_it_and_unknown_is_no_look() {
        let options =
            EngineOptions { hysteresis: Hysteresis { worse_after: 1, better_after: 1 }, ..EngineOptions::default() };
        let mut engine = Engine::new(options);
        let (database, page) = (CheckId::tenant("acme", "database"), CheckId::tenant("acme", "page"));
        let cluster = CheckId::shared("cluster main", "reachable");
        engine.subject_needs(database.subject.clone(), cluster.clone());
        let now: Timestamp = "2026-11-27T08:00:00Z".parse().unwrap();
        let calendars: BTreeMap<String, Arc<Calendar>> = BTreeMap::new();
        let mut counted = BTreeMap::new();
        let mut at = now;
        let mut step = |looks: &[(&CheckId, Status)]| {
            at += SignedDuration::from_secs(30);
            for (check, status) in looks {
                engine.observe(Observation::pass((*check).clone(), Topic::Availability, at, "seen").with(*status));
            }
            let judged = judge(&engine.picture(at), "acme", Objective::Availability, &calendars, at, &mut counted);
            let explained = match &judged {
                Some(Judged::Bad(check, seen)) => engine.explained(check, *seen),
                _ => None,
            };
            let word = judged.map(|judged| match judged {
                Judged::Look(look) => Ok(look),
                Judged::Bad(..) => Ok(Look::Bad),
                Judged::Waits(bad) => Err(bad),
            });
            (word, explained)
        };
        let (well, ill) = (Status::Pass, Status::Fail);
        assert_eq!(step(&[(&database, Status::Unknown)]), (None, None));
        assert_eq!(step(&[(&database, Status::Warn)]), (Some(Ok(Look::Good)), None));
        // Nobody has looked at the server since.
        assert_eq!(
            step(&[(&database, well), (&page, ill)]),
            (Some(Ok(Look::Bad)), Some(false)),
            "it has never been looked at"
        );
        assert_eq!(
            step(&[(&database, well), (&cluster, ill)]),
            (Some(Err(true)), None),
            "the same look is not counted again"
        );
        assert_eq!(step(&[(&database, ill), (&page, ill)]), (Some(Ok(Look::Shared)), None));
        assert_eq!(step(&[(&database, ill), (&page, well), (&cluster, well)]), (Some(Ok(Look::Bad)), None));
        assert_eq!(step(&[(&cluster, well), (&database, well), (&page, well)]), (Some(Ok(Look::Good)), None));
    }

    /// A server that is away for a minute and a half: each tenant's look that falls between that and the server's own is not the
    /// tenant's fault.
    #[test]
    fn a_bad_look_before_the_servers_own_is_the_servers() {
        let mut engine = Engine::new(EngineOptions::default());
        let (database, cluster) = (CheckId::tenant("acme", "database"), CheckId::shared("cluster main", "reachable"));
        engine.subject_needs(database.subject.clone(), cluster.clone());
        let start: Timestamp = "2026-11-27T08:00:00Z".parse().unwrap();
        let seen = |engine: &mut Engine, check: &CheckId, second: i64, status: Status| {
            let at = start + SignedDuration::from_secs(second);
            engine.observe(Observation::pass(check.clone(), Topic::Availability, at, "seen").with(status));
            at
        };
        seen(&mut engine, &cluster, 0, Status::Pass);
        let at = seen(&mut engine, &database, 10, Status::Fail);
        assert_eq!(engine.explained(&database, at), None);
        seen(&mut engine, &cluster, 30, Status::Fail);
        assert_eq!(engine.explained(&database, at), Some(true));
        seen(&mut engine, &cluster, 60, Status::Pass);
        // And so is one after it, though the server is well when it is looked at again.
        let at = seen(&mut engine, &database, 45, Status::Fail);
        assert_eq!(engine.explained(&database, at), Some(true));
        let at = seen(&mut engine, &database, 70, Status::Fail);
        assert_eq!(engine.explained(&database, at), None);
        seen(&mut engine, &cluster, 90, Status::Pass);
        assert_eq!(engine.explained(&database, at), Some(false));
    }

    /// "Which part of looks": a look that is not believed, because the next is good, is a bad look all the same.
    #[test]
    fn looks_that_fail_now_and_then_count_each() {
        let mut engine = Engine::new(EngineOptions::default());
        let page = CheckId::tenant("acme", "page");
        let start: Timestamp = "2026-11-27T08:00:00Z".parse().unwrap();
        let calendars: BTreeMap<String, Arc<Calendar>> = BTreeMap::new();
        let (mut bad, mut counted) = (0, BTreeMap::new());
        for n in 0..1_000 {
            let now = start + SignedDuration::from_secs(30 * n);
            let status = if n % 2 == 0 { Status::Pass } else { Status::Fail };
            engine.observe(Observation::pass(page.clone(), Topic::Availability, now, "seen").with(status));
            let picture = engine.picture(now);
            let judged = judge(&picture, "acme", Objective::Availability, &calendars, now, &mut counted).unwrap();
            bad += u32::from(judged == Judged::Bad(page.clone(), now));
            let again = judge(&picture, "acme", Objective::Availability, &calendars, now, &mut counted);
            assert!(matches!(again, Some(Judged::Waits(_))), "a look counts once: {again:?}");
        }
        assert_eq!(bad, 500);
        let late = start + SignedDuration::from_secs(30 * 2_000);
        counted.clear();
        assert_eq!(judge(&engine.picture(late), "acme", Objective::Availability, &calendars, late, &mut counted), None);
    }

    #[test]
    fn what_a_calendar_makes_bearable_is_no_bad_look() {
        let mut engine = Engine::new(EngineOptions::default());
        let now: Timestamp = "2026-11-27T08:00:00Z".parse().unwrap();
        let slow = Observation::pass(CheckId::tenant("acme", "page latency"), Topic::Latency, now, "slow")
            .with(Status::Fail)
            .figure(Evidence::new("page_takes", 2.0, "s").limited(1.0));
        engine.observe(slow);
        let judged = |calendars: &BTreeMap<String, Arc<Calendar>>| {
            judge(&engine.picture(now), "acme", Objective::Latency, calendars, now, &mut BTreeMap::new())
        };
        assert!(matches!(judged(&BTreeMap::new()), Some(Judged::Bad(..))));
        let config: CalendarConfig = serde_json::from_value(serde_json::json!({
            "time_zone": "Europe/Berlin",
            "events": [{ "name": "payroll", "kind": "payroll", "days": ["2026-11-27"], "effects": { "latency": 3.0 } }],
        }))
        .unwrap();
        assert_eq!(
            judged(&BTreeMap::from([("acme".to_owned(), Arc::new(Calendar::new(&config).unwrap()))])),
            Some(Judged::Look(Look::Good))
        );
    }
}
