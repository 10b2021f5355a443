//! Looks, counts, remembers, tells: everything that a watch does, for whoever runs one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::alert::{self, AlertOptions, Alerts, Calendars, Notice, eased};
use crate::config::Setup;
use crate::engine::Picture;
use crate::metrics::{Sources, render};
use crate::model::{Status, Subject};
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
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observer").field("setup", &self.setup).finish_non_exhaustive()
    }
}

/// What a watch remembers.
struct Told {
    alerts: Alerts,
    /// What the file remembers of what was told.
    kept: alert::Told,
    tallies: ByObjective<Tally>,
    budgets: ByObjective<Budget>,
    counted: Timestamp,
    /// When what was counted last of an objective was seen: nothing is counted twice.
    seen: ByObjective<Timestamp>,
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
/// How long a step waits for its notices to be sent.
const PATIENCE: Duration = Duration::from_secs(2);

impl Observer {
    /// Begins to look, on the runtime that is current, until `stop`. Fails, in words, where notices cannot be sent.
    pub fn start(setup: Setup, stop: &CancellationToken) -> Result<Arc<Self>, String> {
        let watcher = setup.watcher(false);
        let sinks = setup.sinks()?;
        let notices = &setup.file.notices;
        let defaults = AlertOptions::default();
        let options = AlertOptions {
            // Sooner, a cause may not have been seen yet, and its consequences would be told instead.
            after: notices.after.map_or(defaults.after, |after| after.0).max(setup.file.interval.0 * 2),
            repeat: notices.repeat.map_or(defaults.repeat, |repeat| repeat.0),
            ..defaults
        };
        let mut alerts = Alerts::new(options);
        let mut problems = Vec::new();
        if let Some(path) = setup.state() {
            match remembered(path) {
                Ok(told) => {
                    let patience = SignedDuration::try_from(setup.file.interval.0 * 10).unwrap_or(SignedDuration::MAX);
                    let until = Timestamp::now().checked_add(patience).unwrap_or(Timestamp::MAX);
                    alerts.resume(told, until);
                }
                Err(error) => problems.push(format!("what was told before is not known: {}: {error}", path.display())),
            }
        }
        let kept = alerts.told();
        let told = Told {
            alerts,
            kept,
            tallies: BTreeMap::new(),
            budgets: BTreeMap::new(),
            counted: Timestamp::now(),
            seen: BTreeMap::new(),
            refreshed: Timestamp::now(),
            unsent: Vec::new(),
            problems,
        };
        let (looking, stop) = (watcher.clone(), stop.clone());
        tokio::spawn(async move { looking.run(&stop).await });
        let history = setup.history();
        Ok(Arc::new(Self {
            setup,
            watcher,
            told: Arc::new(Mutex::new(told)),
            sinks: Arc::new(tokio::sync::Mutex::new(sinks)),
            history,
        }))
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

    /// Writes down what was told, where it has changed.
    async fn remember(&self) -> Result<(), String> {
        let Some(path) = self.setup.state() else { return Ok(()) };
        let now = self.told().alerts.told();
        if self.told().kept == now {
            return Ok(());
        }
        let text = serde_json::to_vec(&now).map_err(|e| e.to_string())?;
        let beside = path.with_extension("unfinished");
        let write = async {
            tokio::fs::write(&beside, text).await?;
            tokio::fs::rename(&beside, path).await
        };
        write.await.map_err(|error| format!("what was told is not remembered: {}: {error}", path.display()))?;
        self.told().kept = now;
        Ok(())
    }

    fn decide(&self, now: Timestamp) -> Vec<Notice> {
        let picture = self.watcher.picture(now);
        let told = &mut *self.told();
        // Each interval counts once.
        if now.duration_since(told.counted).unsigned_abs() >= self.setup.file.interval.0 {
            told.counted = now;
            for key in self.setup.objectives.keys() {
                let judged = judge(&picture, &key.0, key.1, &self.setup.calendars, now);
                if let Some((look, seen)) = judged
                    && told.seen.insert(key.clone(), seen) != Some(seen)
                {
                    told.tallies.entry(key.clone()).or_default().add(now, look);
                }
            }
        }
        let budget = |(key, tally): (&(String, Objective), &Tally)| {
            Some((key.clone(), tally.budget(*self.setup.objectives.get(key)?, now)))
        };
        told.budgets = told.tallies.iter().filter_map(budget).collect();
        told.alerts.step(now, &picture, &told.budgets, &self.setup.calendars)
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

fn remembered(path: &Path) -> Result<alert::Told, String> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|e| e.to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(alert::Told::default()),
        Err(error) => Err(error.to_string()),
    }
}

fn locked(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a tenant's checks count for an objective now, and when the last of them was seen; none where nobody could look.
fn judge(
    picture: &Picture,
    tenant: &str,
    objective: Objective,
    calendars: &dyn Calendars,
    now: Timestamp,
) -> Option<(Look, Timestamp)> {
    let subject = Subject::Tenant(tenant.to_owned());
    let effects = calendars.effects(&subject, now);
    let mut look: Option<(Look, Timestamp)> = None;
    for state in picture.of(&subject).filter(|state| objective.aspects().contains(&state.check.aspect.as_str())) {
        // What was seen, believed or not: whoever was sent away by every second look was not served half of the time. What is
        // too old says nothing.
        let seen = state.observation.status;
        let bad = match (objective, seen) {
            (_, Status::Unknown) => continue,
            _ if state.since > state.observation.at => continue,
            (Objective::Availability, status) => status == Status::Fail,
            (Objective::Latency, status) => status != Status::Pass && !eased(&state.observation, state.topic, &effects),
        };
        let another = state.because_of.as_ref().is_some_and(|cause| cause.subject != subject);
        let this = match (bad, another) {
            (false, _) => Look::Good,
            (true, false) => Look::Bad,
            (true, true) => Look::Shared,
        };
        // The worst of them: a fault of its own counts before another's.
        let (so_far, seen) = look.unwrap_or((Look::Good, state.observation.at));
        let worst = match (so_far, this) {
            (Look::Bad, _) | (_, Look::Bad) => Look::Bad,
            (Look::Shared, _) | (_, Look::Shared) => Look::Shared,
            _ => Look::Good,
        };
        look = Some((worst, seen.max(state.observation.at)));
    }
    look
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
        let calendars: BTreeMap<String, Calendar> = BTreeMap::new();
        let mut step = |check: &CheckId, status: Status| {
            engine.observe(Observation::pass(check.clone(), Topic::Availability, now, "seen").with(status));
            judge(&engine.picture(now), "acme", Objective::Availability, &calendars, now).map(|(look, _)| look)
        };
        assert_eq!(step(&database, Status::Unknown), None);
        assert_eq!(step(&database, Status::Warn), Some(Look::Good));
        assert_eq!(step(&page, Status::Fail), Some(Look::Bad));
        assert_eq!(step(&cluster, Status::Fail), Some(Look::Shared));
        assert_eq!(step(&database, Status::Fail), Some(Look::Shared));
        assert_eq!(step(&cluster, Status::Pass), Some(Look::Bad));
    }

    /// "Which part of looks": a look that is not believed, because the next is good, is a bad look all the same.
    #[test]
    fn looks_that_fail_now_and_then_count_each() {
        let mut engine = Engine::new(EngineOptions::default());
        let page = CheckId::tenant("acme", "page");
        let start: Timestamp = "2026-11-27T08:00:00Z".parse().unwrap();
        let calendars: BTreeMap<String, Calendar> = BTreeMap::new();
        let mut bad = 0;
        for n in 0..1_000 {
            let now = start + SignedDuration::from_secs(30 * n);
            let status = if n % 2 == 0 { Status::Pass } else { Status::Fail };
            engine.observe(Observation::pass(page.clone(), Topic::Availability, now, "seen").with(status));
            let picture = engine.picture(now);
            let (look, seen) = judge(&picture, "acme", Objective::Availability, &calendars, now).unwrap();
            assert_eq!(seen, now);
            bad += u32::from(look == Look::Bad);
        }
        assert_eq!(bad, 500);
        let late = start + SignedDuration::from_secs(30 * 2_000);
        assert_eq!(judge(&engine.picture(late), "acme", Objective::Availability, &calendars, late), None);
    }

    #[test]
    fn what_a_calendar_makes_bearable_is_no_bad_look() {
        let mut engine = Engine::new(EngineOptions::default());
        let now: Timestamp = "2026-11-27T08:00:00Z".parse().unwrap();
        let slow = Observation::pass(CheckId::tenant("acme", "page latency"), Topic::Latency, now, "slow")
            .with(Status::Fail)
            .figure(Evidence::new("page_takes", 2.0, "s").limited(1.0));
        engine.observe(slow);
        let judged = |calendars: &BTreeMap<String, Calendar>| {
            judge(&engine.picture(now), "acme", Objective::Latency, calendars, now).map(|(look, _)| look)
        };
        assert_eq!(judged(&BTreeMap::new()), Some(Look::Bad));
        let config: CalendarConfig = serde_json::from_value(serde_json::json!({
            "time_zone": "Europe/Berlin",
            "events": [{ "name": "payroll", "kind": "payroll", "days": ["2026-11-27"], "effects": { "latency": 3.0 } }],
        }))
        .unwrap();
        assert_eq!(judged(&BTreeMap::from([("acme".to_owned(), Calendar::new(&config).unwrap())])), Some(Look::Good));
    }
}
