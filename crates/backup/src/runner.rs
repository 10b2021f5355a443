//! All tenants' backups and drills by their schedules, a few at a time.
//!
//! What has been done is read from the repositories, not remembered: a runner that was down, or that runs on another
//! machine now, sees what was missed and makes up for it.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::config::{DrillSetup, Setup, TenantSetup};
use crate::drill::{SignedReport, newest_report, write_report};
use crate::logical::blocking;
use crate::model::{BackupSet, ChangeCounter, LockAttestation};
use crate::plan::{RecoverabilityWindow, due, prune_is_due, retention};
use crate::repository::{Pruned, Repository, RepositoryError};
use crate::server::{Server, changes_of};
use crate::{Control, Error};

/// What a runner tells.
#[derive(Debug)]
#[non_exhaustive]
pub enum Told {
    /// A backup has begun.
    Begun {
        /// Whose.
        tenant: String,
        /// Scheduled runs before it that did not take place.
        missed: u32,
    },
    /// A backup is there.
    Done {
        /// The set.
        set: Box<BackupSet>,
        /// Sets that the retention policy has let go.
        forgotten: usize,
    },
    /// A drill is over, whatever it has found.
    Drilled {
        /// Its report.
        report: Box<SignedReport>,
        /// Where it was written.
        path: PathBuf,
    },
    /// A backup or a drill could not be made. It is tried again.
    Failed {
        /// Whose.
        tenant: String,
        /// Why.
        error: Error,
    },
}

/// Runs backups and drills by their schedules until it is cancelled.
#[derive(Debug, Clone)]
pub struct Runner {
    setup: Arc<Setup>,
    control: Control,
}

/// How often schedules are looked at.
const TICK: Duration = Duration::from_secs(5);
/// How often servers are asked whether anything has changed since the last backup.
const ASK: SignedDuration = SignedDuration::from_secs(60);
/// How long a repository may take to say what is in it.
const LOOK: Duration = Duration::from_secs(60);
/// After a failure the next try is this much later, and twice as much after each further one, up to an hour.
const AGAIN: SignedDuration = SignedDuration::from_secs(60);
const LONGEST: SignedDuration = SignedDuration::from_hours(1);
/// What is freed is removed by a prune at least this much later: no backup takes longer.
pub const PRUNE_GRACE: SignedDuration = SignedDuration::from_hours(23);
/// A backup that takes longer is stopped.
const LONGEST_RUN: Duration = Duration::from_secs(22 * 3_600);
/// A drill that takes so many times as long as a recovery may take is stopped, because the next one waits for it: it has
/// failed by then. Short ones are given an hour.
const PATIENCE: u32 = 4;
const SHORTEST_PATIENCE: Duration = Duration::from_secs(3_600);
/// What has been asked to stop has so long to tidy up.
const GRACE: Duration = Duration::from_secs(120);
/// How long a server may take to say what has changed.
const ANSWER: Duration = Duration::from_secs(20);
/// Drills that run at a time: each has a server of its own.
const DRILLS: usize = 1;

/// What a runner knows of a tenant.
#[derive(Debug, Default)]
struct State {
    /// When the newest run began, as its set says.
    last: Option<Timestamp>,
    known: bool,
    running: bool,
    failures: u32,
    not_before: Option<Timestamp>,
    /// The newest complete set: when, and how often the database had been written to then.
    saved: Option<(Timestamp, Option<ChangeCounter>)>,
    changes: Option<ChangeCounter>,
    last_drill: Option<Timestamp>,
    drill_not_before: Option<Timestamp>,
}

impl State {
    fn learn(&mut self, sets: &[BackupSet]) {
        (self.last, self.known) = (sets.iter().map(BackupSet::began_at).max(), true);
        let complete = sets.iter().rev().find(|set| set.consistency.is_complete());
        self.saved = complete.map(|set| (set.taken_at, set.artifact.changes));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    Backup,
    Drill,
}

enum Outcome {
    Saved(Result<(Vec<BackupSet>, usize), Error>),
    Drilled(Result<(SignedReport, PathBuf), Error>),
}

impl Runner {
    /// A runner for a configuration. Cancelling `control` stops it and what it runs.
    pub fn new(setup: Arc<Setup>, control: Control) -> Self {
        let control = match setup.config.bandwidth {
            Some(bytes) => control.paced(bytes.0),
            None => control,
        };
        Self { setup, control }
    }

    /// Runs until it is cancelled, or with `once` until every tenant that is due has had its turn.
    pub async fn run(&self, once: bool, mut told: impl FnMut(Told)) {
        let began = Timestamp::now();
        let room = Arc::new(Semaphore::new(self.setup.config.concurrency.max(1) as usize));
        let drills = Arc::new(Semaphore::new(DRILLS));
        let mut states: BTreeMap<String, State> = BTreeMap::new();
        let mut tasks: JoinSet<Outcome> = JoinSet::new();
        let mut jobs: HashMap<tokio::task::Id, (String, Job)> = HashMap::new();
        let mut asked: Option<Timestamp> = None;
        loop {
            let mut waiting = Vec::new();
            for setup in &self.setup.tenants {
                let name = setup.tenant.to_string();
                let state = states.entry(name.clone()).or_default();
                let now = Timestamp::now();
                if state.running {
                    continue;
                }
                if !state.known && state.not_before.is_none_or(|at| now >= at) {
                    match self.look(setup, state).await {
                        Ok(()) => {}
                        Err(error) => {
                            fail(state, now, once);
                            told(Told::Failed { tenant: name.clone(), error });
                        }
                    }
                }
                if !state.known {
                    continue;
                }
                // A tenant that has no backup at all does not wait for the night to get its first.
                let backup = match state.last {
                    None => Some(crate::plan::Due { at: Timestamp::UNIX_EPOCH, missed: 0 }),
                    Some(_) => due(&setup.policy.schedule, &name, state.last, began, now).ok(),
                };
                if let Some(due) = backup.filter(|due| due.is_due(now))
                    && state.not_before.is_none_or(|at| now >= at)
                {
                    waiting.push((due, Job::Backup, setup));
                } else if let Some(due) = self.drill_due(&name, state, began, now) {
                    waiting.push((due, Job::Drill, setup));
                }
            }
            // Who has been due for longest goes first: nobody is passed over for its name.
            waiting.sort_by_key(|(due, _, _)| due.at);
            for (due, job, setup) in waiting {
                let places = if job == Job::Backup { &room } else { &drills };
                let Ok(place) = Arc::clone(places).try_acquire_owned() else { continue };
                let name = setup.tenant.to_string();
                let state = states.entry(name.clone()).or_default();
                state.running = true;
                let (setup, control) = (setup.clone(), self.control.child());
                let handle = match job {
                    Job::Backup => {
                        told(Told::Begun { tenant: name.clone(), missed: due.missed });
                        metrics::counter!("cofferdam_backup_missed_runs_total", "tenant" => name.clone())
                            .increment(u64::from(due.missed));
                        let keep = self.setup.config.keep_previous.0;
                        tasks.spawn(async move {
                            let outcome = within(LONGEST_RUN, &control, one(&setup, &control, keep)).await;
                            drop(place);
                            Outcome::Saved(outcome)
                        })
                    }
                    Job::Drill => {
                        let drills = self.setup.drills.clone();
                        tasks.spawn(async move {
                            let limit = setup.policy.objective.rto.0.saturating_mul(PATIENCE);
                            let limit = limit.clamp(SHORTEST_PATIENCE, LONGEST_RUN);
                            let outcome = within(limit, &control, drill(&setup, drills.as_ref(), &control)).await;
                            drop(place);
                            Outcome::Drilled(outcome)
                        })
                    }
                };
                jobs.insert(handle.id(), (name, job));
            }
            let now = Timestamp::now();
            if asked.is_none_or(|at| now.duration_since(at) >= ASK) {
                asked = Some(now);
                self.ask(&mut states).await;
            }
            observe(&self.setup.tenants, &states);
            if once && tasks.is_empty() {
                return;
            }
            let finished = tokio::select! {
                Some(finished) = tasks.join_next_with_id() => finished,
                () = tokio::time::sleep(TICK), if !once => continue,
                () = self.control.cancelled() => {
                    // What runs sees the same line and ends by itself.
                    while tasks.join_next().await.is_some() {}
                    return;
                }
            };
            let (id, outcome) = match finished {
                Ok((id, outcome)) => (id, Ok(outcome)),
                Err(error) => (error.id(), Err(Error::panicked(&error))),
            };
            let Some((tenant, job)) = jobs.remove(&id) else { continue };
            let state = states.entry(tenant.clone()).or_default();
            state.running = false;
            let now = Timestamp::now();
            match outcome {
                Ok(Outcome::Saved(Ok((sets, forgotten)))) => {
                    state.learn(&sets);
                    (state.failures, state.not_before) = (0, None);
                    if let Some(set) = sets.into_iter().next_back() {
                        told(Told::Done { set: Box::new(set), forgotten });
                    }
                }
                Ok(Outcome::Drilled(Ok((signed, path)))) => {
                    (state.last_drill, state.drill_not_before) = (Some(signed.report.started_at), None);
                    told(Told::Drilled { report: Box::new(signed), path });
                }
                Ok(Outcome::Saved(Err(error)) | Outcome::Drilled(Err(error))) | Err(error) => {
                    if job == Job::Backup {
                        fail(state, now, once);
                    } else {
                        let again = if once { Timestamp::MAX } else { now + LONGEST };
                        state.drill_not_before = Some(again);
                    }
                    told(Told::Failed { tenant, error });
                }
            }
        }
    }

    /// What a tenant's repository and reports say.
    async fn look(&self, setup: &TenantSetup, state: &mut State) -> Result<(), Error> {
        // A store that does not answer must not hold up the others.
        let found = tokio::time::timeout(LOOK, sets(setup)).await.unwrap_or_else(|_| {
            let (location, reason) = (setup.tenant.to_string(), format!("no answer within {} s", LOOK.as_secs()));
            Err(RepositoryError::Broken { location, reason }.into())
        });
        let sets = match found {
            Ok(sets) => sets,
            Err(Error::Repository(RepositoryError::Absent { .. })) => Vec::new(),
            Err(error) => return Err(error),
        };
        state.learn(&sets);
        if let Some(drills) = &self.setup.drills {
            let (directory, tenant) = (drills.reports.clone(), setup.tenant.clone());
            let newest = blocking(move || Ok(newest_report(&directory, tenant.as_str()))).await?;
            if let Some(signed) = newest {
                told_of_drill(&signed.report);
                state.last_drill = Some(signed.report.started_at);
            }
        }
        Ok(())
    }

    /// A drill needs a backup, and a schedule.
    fn drill_due(&self, tenant: &str, state: &State, began: Timestamp, now: Timestamp) -> Option<crate::plan::Due> {
        let schedule = self.setup.drills.as_ref()?.schedule.as_ref()?;
        if state.saved.is_none() || state.drill_not_before.is_some_and(|at| now < at) {
            return None;
        }
        due(schedule, tenant, state.last_drill, began, now).ok().filter(|due| due.is_due(now))
    }

    /// Asks each server once, for all of its tenants. What cannot be asked counts as changed.
    async fn ask(&self, states: &mut BTreeMap<String, State>) {
        let mut servers: Vec<(&Server, Vec<&TenantSetup>)> = Vec::new();
        for setup in &self.setup.tenants {
            let server = setup.server();
            let same = |known: &&mut (&Server, Vec<_>)| {
                (&known.0.host, known.0.port, &known.0.user) == (&server.host, server.port, &server.user)
            };
            match servers.iter_mut().find(same) {
                Some((_, tenants)) => tenants.push(setup),
                None => servers.push((server, vec![setup])),
            }
        }
        // All at once, so that one that does not answer holds up nobody for the sum of all.
        let asked = servers.into_iter().map(async |(server, tenants)| {
            let names: Vec<&str> = tenants.iter().map(|setup| setup.database.as_str()).collect();
            (counted(server, &names).await, tenants)
        });
        for (mut counted, tenants) in futures_util::future::join_all(asked).await {
            for setup in tenants {
                if let Some(state) = states.get_mut(setup.tenant.as_str()) {
                    state.changes = counted.remove(&setup.database);
                }
            }
        }
    }
}

/// Ends what takes longer than it may, and what somebody has asked to stop, also where it does not listen.
async fn within<T>(
    limit: Duration,
    control: &Control,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut work = std::pin::pin!(work);
    let stopped = tokio::select! {
        outcome = &mut work => return outcome,
        () = control.cancelled() => Error::Cancelled,
        () = tokio::time::sleep(limit) => {
            let limit = cofferdam_tenant::HumanDuration(limit);
            Error::Refused(format!("stopped after {limit}: nothing was left behind that looks whole"))
        }
    };
    control.cancel();
    match tokio::time::timeout(GRACE, work).await {
        // It was over before it heard.
        Ok(Ok(done)) => Ok(done),
        _ => Err(stopped),
    }
}

/// How often databases have been written to, as their server says, if it says so soon.
async fn counted(server: &Server, names: &[&str]) -> HashMap<String, ChangeCounter> {
    let ask = async {
        let client = server.connect(&server.maintenance).await.ok()?;
        changes_of(&client, names).await.ok()
    };
    tokio::time::timeout(ANSWER, ask).await.ok().flatten().unwrap_or_default()
}

/// How much of a tenant would be lost now: nothing, if nothing was written since its newest complete set; `None`:
/// everything, because there is no set.
pub fn loss(
    saved: Option<(Timestamp, Option<ChangeCounter>)>,
    changes: Option<ChangeCounter>,
    now: Timestamp,
) -> Option<SignedDuration> {
    let (at, counted) = saved?;
    let unchanged = counted.is_some() && counted == changes;
    let window = RecoverabilityWindow { points: vec![at], ..RecoverabilityWindow::default() };
    window.loss(now, unchanged.then_some(at))
}

/// How much of a tenant would be lost now, by its sets, oldest first, and by what its server says has changed since.
pub async fn loss_now(setup: &TenantSetup, sets: &[BackupSet], now: Timestamp) -> Option<SignedDuration> {
    let complete = sets.iter().rev().find(|set| set.consistency.is_complete())?;
    let changes = counted(setup.server(), &[&setup.database]).await.remove(&setup.database);
    loss(Some((complete.taken_at, complete.artifact.changes)), changes, now)
}

fn observe(tenants: &[TenantSetup], states: &BTreeMap<String, State>) {
    let now = Timestamp::now();
    // So that whoever reads the others knows how old they are.
    metrics::gauge!("cofferdam_backup_time_seconds").set(now.as_second() as f64);
    for setup in tenants {
        let Some(state) = states.get(setup.tenant.as_str()).filter(|state| state.known) else { continue };
        let tenant = setup.tenant.to_string();
        let gauge = |name: &'static str, value: f64| metrics::gauge!(name, "tenant" => tenant.clone()).set(value);
        if let Some(last) = state.last {
            gauge("cofferdam_backup_age_seconds", now.duration_since(last).as_secs_f64());
        }
        gauge("cofferdam_backup_failures", f64::from(state.failures));
        let loss = loss(state.saved, state.changes, now).map_or(f64::INFINITY, |loss| loss.as_secs_f64());
        gauge("cofferdam_backup_rpo_seconds", loss);
        gauge("cofferdam_backup_rpo_objective_seconds", setup.policy.objective.rpo.0.as_secs_f64());
        if let Some(drilled) = state.last_drill {
            gauge("cofferdam_drill_age_seconds", now.duration_since(drilled).as_secs_f64());
        }
    }
}

fn fail(state: &mut State, now: Timestamp, once: bool) {
    let wait = AGAIN * 2_i32.pow(state.failures.min(10));
    state.failures += 1;
    // Whoever runs once has had its turn.
    state.not_before = Some(if once { Timestamp::MAX } else { now + wait.min(LONGEST) });
}

/// A drill, and its report.
async fn drill(
    setup: &TenantSetup,
    drills: Option<&DrillSetup>,
    control: &Control,
) -> Result<(SignedReport, PathBuf), Error> {
    let Some(drills) = drills.cloned() else { return Err(Error::Refused("no drills are configured".to_owned())) };
    let report = setup.drill(&drills.check_command).await?.run(control).await?;
    told_of_drill(&report);
    let signed = SignedReport::new(report, drills.key.as_deref());
    let (written, directory) = (signed.clone(), drills.reports);
    let path = blocking(move || write_report(&directory, &written)).await?;
    Ok((signed, path))
}

fn told_of_drill(report: &crate::model::DrillReport) {
    let tenant = report.tenant.to_string();
    let gauge = |name: &'static str, value: f64| metrics::gauge!(name, "tenant" => tenant.clone()).set(value);
    gauge("cofferdam_drill_passed", f64::from(u8::from(report.passed)));
    gauge("cofferdam_drill_rto_seconds", report.rto_ms as f64 / 1_000.0);
}

/// A tenant's sets, oldest first.
pub async fn sets(setup: &TenantSetup) -> Result<Vec<BackupSet>, Error> {
    let repository = open(setup).await?;
    blocking(move || Ok(repository.sets()?)).await
}

/// A tenant's repository, opened.
pub async fn open(setup: &TenantSetup) -> Result<Arc<Repository>, Error> {
    let (tenant, key) = (setup.tenant.clone(), setup.key().clone());
    let store = setup.store().map_err(RepositoryError::from)?;
    blocking(move || {
        let key = key.key(tenant.as_str())?;
        Ok(Arc::new(Repository::open(tenant, store, &key)?))
    })
    .await
}

/// One backup and what comes after it: every set that there is then, oldest first, and how many were forgotten.
async fn one(setup: &TenantSetup, control: &Control, keep: Duration) -> Result<(Vec<BackupSet>, usize), Error> {
    let set = setup.backup().await?.run(control).await?;
    let tenant = setup.tenant.to_string();
    let gauge = |name: &'static str, value: f64| metrics::gauge!(name, "tenant" => tenant.clone()).set(value);
    gauge("cofferdam_backup_duration_seconds", set.phases.total_ms as f64 / 1_000.0);
    gauge("cofferdam_backup_bytes", set.stored.total_bytes as f64);
    gauge("cofferdam_backup_stored_bytes", set.stored.stored_bytes as f64);
    gauge("cofferdam_backup_complete", f64::from(u8::from(set.consistency.is_complete())));
    gauge("cofferdam_backup_locked", f64::from(u8::from(matches!(set.lock, LockAttestation::Locked { .. }))));
    // The backup is there: what cannot be tidied up is no reason to make it again.
    let forgotten = match tidy(setup, &set, keep).await {
        Ok(forgotten) => forgotten,
        Err(error) => {
            control.warn(format!("the backup is there, but what is old was not tidied up: {error}"));
            tracing::warn!(tenant, %error, "what is old was not tidied up");
            0
        }
    };
    Ok((sets(setup).await.unwrap_or_else(|_| vec![set]), forgotten))
}

/// Lets go what the policy lets go, frees its room now and then, and drops what swaps have left for long enough.
async fn tidy(setup: &TenantSetup, set: &BackupSet, keep: Duration) -> Result<usize, Error> {
    let others = sets(setup).await?;
    let before = others.iter().filter(|other| other.id != set.id).map(BackupSet::began_at).max();
    let forgotten = forget_expired(setup, false).await?.len();
    if prune_is_due(setup.tenant.as_str(), before, set.began_at()) {
        prune(setup, PRUNE_GRACE).await?;
    }
    // Not every tenant can be restored in place.
    if let Ok(restore) = setup.restore().await {
        restore.drop_previous(keep, Timestamp::now()).await?;
    }
    Ok(forgotten)
}

/// Forgets the sets that a tenant's retention policy lets go, or with `dry` only says which.
pub async fn forget_expired(setup: &TenantSetup, dry: bool) -> Result<Vec<BackupSet>, Error> {
    let repository = open(setup).await?;
    let policy = setup.policy.clone();
    blocking(move || {
        let zone = jiff::tz::TimeZone::get(&policy.schedule.time_zone).unwrap_or(jiff::tz::TimeZone::UTC);
        let sets = repository.sets()?;
        let plan = retention(&sets, &policy.retention, &zone, Timestamp::now());
        if !dry && !plan.forget.is_empty() {
            repository.forget(&plan.forget)?;
        }
        Ok(sets.into_iter().filter(|set| plan.forget.contains(&set.id)).collect())
    })
    .await
}

/// Frees what no set refers to.
pub async fn prune(setup: &TenantSetup, grace: SignedDuration) -> Result<Pruned, Error> {
    let repository = open(setup).await?;
    blocking(move || Ok(repository.prune(grace)?)).await
}
