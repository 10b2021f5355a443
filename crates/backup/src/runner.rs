//! All tenants' backups by their schedules, a few at a time.
//!
//! What has been done is read from the repositories, not remembered: a runner that was down, or that runs on another
//! machine now, sees what was missed and makes up for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::config::{Setup, TenantSetup};
use crate::logical::blocking;
use crate::model::BackupSet;
use crate::plan::{due, logical_window, retention};
use crate::repository::{Pruned, Repository, RepositoryError};
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
    /// A backup, or what comes after it, has failed. It is tried again.
    Failed {
        /// Whose.
        tenant: String,
        /// Why.
        error: Error,
    },
}

/// Runs backups by their schedules until it is cancelled.
#[derive(Debug, Clone)]
pub struct Runner {
    setup: Arc<Setup>,
    control: Control,
}

/// How often schedules are looked at.
const TICK: Duration = Duration::from_secs(5);
/// How long a repository may take to say what is in it.
const LOOK: Duration = Duration::from_secs(60);
/// After a failure the next try is this much later, and twice as much after each further one, up to an hour.
const AGAIN: SignedDuration = SignedDuration::from_secs(60);
const LONGEST: SignedDuration = SignedDuration::from_hours(1);
/// What is freed is removed by a prune at least this much later: no backup takes longer.
pub const PRUNE_GRACE: SignedDuration = SignedDuration::from_hours(23);
/// A repository is pruned after every so many backups.
const PRUNE_EVERY: u64 = 7;

#[derive(Debug, Default)]
struct State {
    /// When the newest run began, as its set says.
    last: Option<Timestamp>,
    known: bool,
    running: bool,
    failures: u32,
    not_before: Option<Timestamp>,
    runs: u64,
}

struct Finished {
    tenant: String,
    outcome: Result<(BackupSet, usize), Error>,
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
        let mut states: BTreeMap<String, State> = BTreeMap::new();
        let mut tasks: JoinSet<Finished> = JoinSet::new();
        loop {
            let mut waiting = Vec::new();
            for setup in &self.setup.tenants {
                let name = setup.tenant.to_string();
                let state = states.entry(name.clone()).or_default();
                let now = Timestamp::now();
                if state.running || state.not_before.is_some_and(|at| now < at) {
                    continue;
                }
                if !state.known {
                    // A store that does not answer must not hold up the others.
                    let found = tokio::time::timeout(LOOK, newest(setup)).await;
                    let found = found.unwrap_or_else(|_| {
                        let reason = format!("no answer within {} s", LOOK.as_secs());
                        Err(RepositoryError::Broken { location: name.clone(), reason }.into())
                    });
                    match found {
                        Ok(last) => (state.last, state.known) = (last, true),
                        Err(error) => {
                            fail(state, now);
                            if once {
                                state.not_before = Some(Timestamp::MAX);
                            }
                            told(Told::Failed { tenant: name, error });
                            continue;
                        }
                    }
                }
                // A tenant that has no backup at all does not wait for the night to get its first.
                let due = match state.last {
                    None => Ok(crate::plan::Due { at: Timestamp::UNIX_EPOCH, missed: 0 }),
                    Some(_) => due(&setup.policy.schedule, &name, state.last, began, now),
                };
                if let Some(due) = due.ok().filter(|due| due.is_due(now)) {
                    waiting.push((due, setup));
                }
            }
            // Who has been due for longest goes first: nobody is passed over for its name.
            waiting.sort_by_key(|(due, _)| due.at);
            for (due, setup) in waiting {
                let Ok(place) = Arc::clone(&room).try_acquire_owned() else { break };
                let name = setup.tenant.to_string();
                let state = states.entry(name.clone()).or_default();
                state.running = true;
                told(Told::Begun { tenant: name.clone(), missed: due.missed });
                metrics::counter!("cofferdam_backup_missed_runs_total", "tenant" => name.clone())
                    .increment(u64::from(due.missed));
                let prune = state.runs % PRUNE_EVERY == PRUNE_EVERY - 1;
                let (setup, control) = (setup.clone(), self.control.child());
                let keep = self.setup.config.keep_previous.0;
                tasks.spawn(async move {
                    let outcome = one(&setup, &control, prune, keep).await;
                    drop(place);
                    Finished { tenant: name, outcome }
                });
            }
            observe(&states);
            if once && tasks.is_empty() {
                return;
            }
            let finished = tokio::select! {
                Some(finished) = tasks.join_next() => finished,
                () = tokio::time::sleep(TICK), if !once => continue,
                () = self.control.cancelled() => {
                    // What runs sees the same line and ends by itself.
                    while tasks.join_next().await.is_some() {}
                    return;
                }
            };
            let Ok(Finished { tenant, outcome }) = finished else { continue };
            let state = states.entry(tenant.clone()).or_default();
            state.running = false;
            match outcome {
                Ok((set, forgotten)) => {
                    (state.last, state.failures, state.not_before) = (Some(set.taken_at), 0, None);
                    state.runs += 1;
                    told(Told::Done { set: Box::new(set), forgotten });
                }
                Err(error) => {
                    fail(state, Timestamp::now());
                    if once {
                        // Its turn is over.
                        state.not_before = Some(Timestamp::MAX);
                    }
                    told(Told::Failed { tenant, error });
                }
            }
        }
    }
}

fn observe(states: &BTreeMap<String, State>) {
    let now = Timestamp::now();
    for (tenant, state) in states {
        if let Some(last) = state.last {
            let age = now.duration_since(last).as_secs_f64();
            metrics::gauge!("cofferdam_backup_age_seconds", "tenant" => tenant.clone()).set(age);
        }
        metrics::gauge!("cofferdam_backup_failures", "tenant" => tenant.clone()).set(f64::from(state.failures));
    }
}

fn fail(state: &mut State, now: Timestamp) {
    let wait = AGAIN * 2_i32.pow(state.failures.min(10));
    state.failures += 1;
    state.not_before = Some(now + wait.min(LONGEST));
}

async fn newest(setup: &TenantSetup) -> Result<Option<Timestamp>, Error> {
    match sets(setup).await {
        Ok(sets) => Ok(sets.last().map(|set| set.taken_at)),
        Err(Error::Repository(RepositoryError::Absent { .. })) => Ok(None),
        Err(error) => Err(error),
    }
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

/// One backup and what comes after it.
async fn one(setup: &TenantSetup, control: &Control, prune: bool, keep: Duration) -> Result<(BackupSet, usize), Error> {
    let set = setup.backup().await?.run(control).await?;
    let tenant = setup.tenant.to_string();
    let gauge = |name: &'static str, value: f64| metrics::gauge!(name, "tenant" => tenant.clone()).set(value);
    gauge("cofferdam_backup_duration_seconds", set.phases.total_ms as f64 / 1_000.0);
    gauge("cofferdam_backup_bytes", set.stored.total_bytes as f64);
    gauge("cofferdam_backup_stored_bytes", set.stored.stored_bytes as f64);
    gauge("cofferdam_backup_complete", f64::from(u8::from(set.consistency.is_complete())));
    let forgotten = forget_expired(setup, false).await?.len();
    if prune {
        let repository = open(setup).await?;
        blocking(move || Ok(repository.prune(PRUNE_GRACE)?)).await?;
    }
    let sets = sets(setup).await?;
    let rpo = SignedDuration::try_from(setup.policy.objective.rpo.0).unwrap_or(SignedDuration::MAX);
    let now = Timestamp::now();
    let loss = logical_window(&sets, rpo, now).loss(now, None);
    gauge("cofferdam_backup_rpo_seconds", loss.map_or(f64::INFINITY, |loss| loss.as_secs_f64()));
    // The backup is there: what cannot be tidied up is no reason to make it again.
    if let Ok(restore) = setup.restore().await
        && let Err(error) = restore.drop_previous(keep, now).await
    {
        tracing::warn!(tenant, %error, "what swaps have left could not be removed");
    }
    Ok((set, forgotten))
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
