//! Who is told of what: one notice for each cause, none for its consequences, and none for what everybody expects.
//!
//! Pure: a picture and an instant go in, notices come out. What business events make bearable is borne while they last;
//! what would be lost, what keeps others out, and an exhausted budget never are.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cofferdam_tenant::calendar::{Calendar, Effects};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::engine::{CheckState, Picture};
use crate::model::{CheckId, Observation, Status, Subject, Topic};
use crate::slo::{Budget, ByObjective, Objective, Urgency};

/// How notices are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AlertOptions {
    /// A trouble is told when it has lasted for so long.
    pub after: Duration,
    /// What goes on is told again after so long.
    pub repeat: Duration,
    /// At most so many notices in a minute; what is more is told in one.
    pub per_minute: u32,
}

impl Default for AlertOptions {
    fn default() -> Self {
        Self { after: Duration::from_secs(60), repeat: Duration::from_secs(4 * 3_600), per_minute: 20 }
    }
}

/// Whether a trouble begins or ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It is there.
    Firing,
    /// It is over.
    Resolved,
}

/// What somebody is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Notice {
    /// The same for all notices of one trouble.
    pub key: String,
    /// Whether it begins or ends.
    pub phase: Phase,
    /// How urgent it is.
    pub urgency: Urgency,
    /// What it is about.
    pub check: CheckId,
    /// What kind of trouble it is.
    pub topic: Topic,
    /// In a line.
    pub summary: String,
    /// Since when.
    pub since: Timestamp,
    /// How many others are in trouble only because of this.
    pub consequences: usize,
}

/// What somebody was told and is not over: what has to outlive whoever tells.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Told {
    open: BTreeMap<String, Open>,
    /// Ends of what was told only as one of many, of which nobody was told.
    ended: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Open {
    /// How it is now.
    notice: Notice,
    told: Timestamp,
    /// The most urgent that was told since it was last told in full: less is no news, and this again is none either.
    worst: Urgency,
    /// Since when it has been less urgent than that.
    milder: Option<Timestamp>,
    /// It was told that nothing is left of a budget.
    gone: bool,
    /// It was told by name; otherwise only as one of many, and so is its end.
    named: bool,
}

/// What has been less urgent for so long is news when it is urgent again.
const CALM: SignedDuration = SignedDuration::from_hours(1);
/// Nobody is patient for longer after a start.
const PATIENT: SignedDuration = SignedDuration::from_hours(2);
/// How often is repeated that nothing is left.
const DAILY: SignedDuration = SignedDuration::from_hours(24);

/// Remembers who was told what.
#[derive(Debug, Default)]
pub struct Alerts {
    options: AlertOptions,
    open: BTreeMap<String, Open>,
    /// The last instant at which a trouble was there and was borne, by key.
    borne: BTreeMap<String, Timestamp>,
    minute: Minute,
    /// Ends of what was told only as one of many, of which nobody was told.
    ended: usize,
    /// When the clock last jumped: what is older than that has not lasted for so long.
    jumped: Option<Timestamp>,
    /// Until then, what was told by whoever was here before is not over for not having been looked at yet.
    patient_until: Option<Timestamp>,
}

/// What was told in a minute.
#[derive(Debug, Default)]
struct Minute {
    number: i64,
    /// By name.
    told: usize,
    /// Whether what was more has come as one.
    more: bool,
}

/// For so long after a jump nobody is told that something is not known: everything is looked at again until then.
const LOOKED_AGAIN: SignedDuration = SignedDuration::from_secs(330);

/// The business calendar of a subject, if it has one.
pub trait Calendars {
    /// What is different at an instant for a subject.
    fn effects(&self, subject: &Subject, at: Timestamp) -> Effects;
}

impl Calendars for BTreeMap<String, Arc<Calendar>> {
    /// By the names of tenants. What is shared follows nobody's calendar.
    fn effects(&self, subject: &Subject, at: Timestamp) -> Effects {
        match subject {
            Subject::Tenant(name) => self.get(name).map_or_else(Effects::default, |calendar| calendar.effects(at)),
            Subject::Shared(_) => Effects::default(),
        }
    }
}

/// Calendars at one instant: each is worked out once, however many tenants have it.
pub(crate) struct AtOnce<'a> {
    calendars: &'a BTreeMap<String, Arc<Calendar>>,
    at: Timestamp,
    known: Mutex<HashMap<*const Calendar, Effects>>,
}

impl<'a> AtOnce<'a> {
    pub(crate) fn new(calendars: &'a BTreeMap<String, Arc<Calendar>>, at: Timestamp) -> Self {
        Self { calendars, at, known: Mutex::default() }
    }
}

impl Calendars for AtOnce<'_> {
    fn effects(&self, subject: &Subject, _: Timestamp) -> Effects {
        let Subject::Tenant(name) = subject else { return Effects::default() };
        let Some(calendar) = self.calendars.get(name) else { return Effects::default() };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        *known.entry(Arc::as_ptr(calendar)).or_insert_with(|| calendar.effects(self.at))
    }
}

/// How bad an observation can be at most while everything may take longer, by a factor: a figure is compared with limits that
/// are that much wider.
pub fn eased(observation: &Observation, topic: Topic, effects: &Effects) -> Status {
    let factor = effects.latency;
    let figures: Vec<_> =
        observation.evidence.iter().filter(|figure| figure.limit.is_some() || figure.warn.is_some()).collect();
    if !topic.is_bearable() || factor <= 1.0 || figures.is_empty() {
        return Status::Fail;
    }
    let beyond = |value: f64, limit: Option<f64>| limit.is_some_and(|limit| value >= limit * factor);
    Status::worst(figures.into_iter().map(|figure| {
        if beyond(figure.value, figure.limit) {
            Status::Fail
        } else if beyond(figure.value, figure.warn) {
            Status::Warn
        } else {
            Status::Pass
        }
    }))
}

impl Alerts {
    /// Nobody was told anything yet.
    pub fn new(options: AlertOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// Goes on from what was told before. Until `patient_until` what nobody has looked at yet is not over.
    pub fn resume(&mut self, told: Told, patient_until: Timestamp) {
        (self.open, self.ended, self.patient_until) = (told.open, told.ended, Some(patient_until));
    }

    /// Goes on from what others have told, with options of its own. Until `patient_until` what nobody has looked at yet is not
    /// over.
    pub fn go_on_from(&mut self, before: Self, patient_until: Timestamp) {
        let options = self.options;
        *self = Self { options, patient_until: Some(patient_until), ..before };
    }

    /// The clock was set, or the machine has slept: what was seen before says little of how long anything has lasted.
    pub fn clock_jumped(&mut self, now: Timestamp) {
        self.jumped = Some(now);
        // Nothing was told later than now, and there is no more patience than there was.
        for open in self.open.values_mut() {
            open.told = open.told.min(now);
            open.milder = open.milder.map(|since| since.min(now));
        }
        let longest = now.checked_add(PATIENT).unwrap_or(now);
        self.patient_until = self.patient_until.map(|until| until.min(longest));
    }

    /// What somebody was told and is not over.
    pub fn told(&self) -> Told {
        Told { open: self.open.clone(), ended: self.ended }
    }

    /// What was told and is not over, the most urgent first.
    pub fn open(&self) -> Vec<&Notice> {
        let mut open: Vec<&Notice> = self.open.values().map(|open| &open.notice).collect();
        open.sort_by(|a, b| b.urgency.cmp(&a.urgency).then(a.since.cmp(&b.since)));
        open
    }

    /// Looks at everything and says who has to be told what now.
    pub fn step(
        &mut self,
        now: Timestamp,
        picture: &Picture,
        budgets: &ByObjective<Budget>,
        calendars: &dyn Calendars,
    ) -> Vec<Notice> {
        let mut wanted: BTreeMap<String, Notice> = BTreeMap::new();
        let mut budgets_gone = BTreeSet::new();
        // When what explained a trouble is over, there is patience with what it leaves behind.
        for state in picture.checks.values().filter(|state| state.because_of.is_some()) {
            self.borne.insert(state.check.to_string(), now);
        }
        let mut consequences: HashMap<&CheckId, usize> = HashMap::new();
        for cause in picture.checks.values().filter_map(|state| state.because_of.as_ref()) {
            *consequences.entry(cause).or_default() += 1;
        }
        for state in picture.causes() {
            let key = state.check.to_string();
            let effects = calendars.effects(&state.check.subject, now);
            let mut status = state.status;
            if status != Status::Unknown {
                status = status.min(eased(&state.observation, state.topic, &effects));
            }
            if status == Status::Pass {
                self.borne.insert(key, now);
                continue;
            }
            // What was borne counts from the end of that.
            let since = self.borne.get(&key).map_or(state.since, |borne| state.since.max(*borne));
            // Before the clock was set back it was later.
            let since = if since > now { self.jumped.unwrap_or(now) } else { since };
            if let Some(notice) =
                self.notice(&key, (state, status), since, consequences.get(&state.check).copied().unwrap_or(0), now)
            {
                wanted.insert(key, notice);
            }
        }
        for ((tenant, objective), budget) in budgets {
            if let Some(notice) = of_budget(tenant, *objective, budget, now) {
                if budget.burning.is_none() {
                    budgets_gone.insert(notice.key.clone());
                }
                wanted.insert(notice.key.clone(), notice);
            }
        }
        self.borne.retain(|key, _| picture.checks.get(key).is_some_and(|state| state.status != Status::Pass));
        let mut over = Vec::new();
        let mut ended = None;
        let (borne, patient_until) = (&self.borne, self.patient_until);
        self.open.retain(|key, open| {
            let state = picture.checks.get(key);
            // A trouble that has become another's consequence is not over, and it is not told of either.
            // The same holds for one that is borne from now on.
            let goes_on = state.is_some_and(|state| state.status != Status::Pass) && borne.get(key) == Some(&now);
            // What was looked at once has not been seen to be well either.
            let unsure = state.is_none_or(|state| {
                state.status == Status::Unknown || state.status == Status::Pass && state.since == state.observation.at
            });
            let waits = unsure && patient_until.is_some_and(|until| now < until);
            if wanted.contains_key(key) || goes_on || waits {
                return true;
            }
            let end = Notice { phase: Phase::Resolved, consequences: 0, ..open.notice.clone() };
            if open.named {
                over.push(end);
            } else {
                self.ended += 1;
                ended = Some(end);
            }
            false
        });
        let mut told = Vec::new();
        let repeat = SignedDuration::try_from(self.options.repeat).unwrap_or(SignedDuration::MAX);
        for (key, notice) in wanted {
            let gone = budgets_gone.contains(&key);
            let Some(open) = self.open.get_mut(&key) else {
                told.push(notice);
                continue;
            };
            let notice = Notice { since: open.notice.since, ..notice };
            // That a month's budget is gone changes slowly.
            let repeat = if gone && open.gone { repeat.max(DAILY) } else { repeat };
            let again = now.duration_since(open.told) >= repeat;
            open.milder = (notice.urgency < open.worst).then(|| open.milder.unwrap_or(now));
            if open.milder.is_some_and(|since| now.duration_since(since) >= CALM) {
                (open.worst, open.milder) = (notice.urgency, None);
            }
            if again || notice.urgency > open.worst || gone && !open.gone {
                told.push(notice);
            } else {
                open.notice = notice;
            }
        }
        told.sort_by(|a, b| b.urgency.cmp(&a.urgency).then(a.key.cmp(&b.key)));
        let mut told = self.limited(now, told, &budgets_gone);
        // Whoever was told of many as one hears of their ends with the next, or when the last of them is over.
        let last = self.open.values().all(|open| open.named);
        if over.is_empty() && last {
            over.extend(ended);
            self.ended = self.ended.saturating_sub(over.len());
        }
        if let (Some(end), 1..) = (over.last_mut(), self.ended) {
            let ended = std::mem::take(&mut self.ended);
            end.summary = format!("{}; with it {ended} of those that were told as one are over", end.summary);
        }
        // Ends are as many as what was told by name.
        told.extend(over);
        told
    }

    fn notice(
        &self,
        key: &str,
        (state, status): (&CheckState, Status),
        since: Timestamp,
        consequences: usize,
        now: Timestamp,
    ) -> Option<Notice> {
        let lasted = now.duration_since(self.jumped.map_or(since, |jumped| since.max(jumped)));
        let mut patience = SignedDuration::try_from(self.options.after).unwrap_or(SignedDuration::MAX);
        let mut unsure = false;
        if state.status == Status::Unknown {
            if self.jumped.is_some_and(|jumped| since <= jumped) {
                patience = patience.max(LOOKED_AGAIN);
            }
            // One look has failed, and is not believed yet: the next one says.
            unsure = state.observation.status != Status::Unknown && state.since <= state.observation.at;
        }
        if (lasted < patience || unsure) && !self.open.contains_key(key) {
            return None;
        }
        let urgency = match status {
            Status::Pass => return None,
            Status::Fail => Urgency::Page,
            Status::Warn | Status::Unknown => Urgency::Ticket,
        };
        let others = if consequences > 0 { format!(" ({consequences} others follow from it)") } else { String::new() };
        Some(Notice {
            key: key.to_owned(),
            phase: Phase::Firing,
            urgency,
            check: state.check.clone(),
            topic: state.topic,
            summary: format!("{}: {}{others}", state.check, state.observation.text),
            since,
            consequences,
        })
    }

    /// What is more than anybody can read comes as one, once in a minute; what is more than that waits for the next. Remembers
    /// what is told.
    fn limited(&mut self, now: Timestamp, told: Vec<Notice>, gone: &BTreeSet<String>) -> Vec<Notice> {
        let number = now.as_second().div_euclid(60);
        if self.minute.number != number {
            self.minute = Minute { number, ..Minute::default() };
        }
        let room = (self.options.per_minute as usize).saturating_sub(self.minute.told).min(told.len());
        let more = if self.minute.more { 0 } else { told.len() - room };
        self.minute.told += room;
        self.minute.more |= more > 0;
        let mut said = Vec::new();
        for (place, notice) in told.into_iter().take(room + more).enumerate() {
            let was = self.open.get(&notice.key);
            let open = Open {
                notice: notice.clone(),
                told: now,
                worst: notice.urgency,
                milder: None,
                gone: gone.contains(&notice.key) || was.is_some_and(|was| was.gone),
                named: place <= room || was.is_some_and(|was| was.named),
            };
            self.open.insert(notice.key.clone(), open);
            match place.cmp(&room) {
                Ordering::Less => said.push(notice),
                Ordering::Equal => {
                    let summary = format!("{more} more at once, of which the first: {}", notice.summary);
                    said.push(Notice { summary, ..notice });
                }
                Ordering::Greater => {}
            }
        }
        said
    }
}

/// A budget that burns, or that is gone. What something shared has spent does not burn: that is told where it is.
fn of_budget(tenant: &str, objective: Objective, budget: &Budget, now: Timestamp) -> Option<Notice> {
    let word = match objective {
        Objective::Availability => "that it works",
        Objective::Latency => "that it is fast",
    };
    // As it was written, without what a binary fraction makes of it.
    let per_cent = format!("{:.3}", 100.0 * budget.objective);
    let goal = format!("{} % of the time {word}", per_cent.trim_end_matches('0').trim_end_matches('.'));
    let (urgency, summary) = match budget.burning {
        Some((rate, urgency)) => {
            let left = 100.0 * budget.left.max(0.0);
            (urgency, format!("its budget for {goal} is spent {rate:.0} times too fast; {left:.0} % are left"))
        }
        // What something shared has spent was told where it is.
        None if budget.own_left <= 0.0 => (Urgency::Ticket, format!("nothing is left of its budget for {goal}")),
        None => return None,
    };
    let subject = Subject::Tenant(tenant.to_owned());
    let check = CheckId { subject, aspect: format!("{} budget", objective.as_str()) };
    Some(Notice {
        key: check.to_string(),
        phase: Phase::Firing,
        urgency,
        summary: format!("{check}: {summary}"),
        check,
        topic: match objective {
            Objective::Availability => Topic::Availability,
            Objective::Latency => Topic::Latency,
        },
        since: now,
        consequences: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Engine, EngineOptions, Hysteresis};
    use crate::model::Evidence;
    use cofferdam_tenant::calendar::CalendarConfig;

    fn engine() -> Engine {
        Engine::new(EngineOptions {
            hysteresis: Hysteresis { worse_after: 1, better_after: 1 },
            stale_after: Duration::from_secs(1_000_000_000),
            ..EngineOptions::default()
        })
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn none() -> BTreeMap<String, Arc<Calendar>> {
        BTreeMap::new()
    }

    fn seen(check: &CheckId, topic: Topic, status: Status, at: Timestamp) -> Observation {
        Observation::pass(check.clone(), topic, at, "seen").with(status)
    }

    /// "Shared PostgreSQL stopped with 200 tenants: one alert, 200 inhibited; … recovery within one interval."
    #[test]
    fn a_shared_server_that_stops_is_one_notice_and_its_return_another() {
        let (mut engine, mut alerts) = (engine(), Alerts::new(AlertOptions::default()));
        let cluster = CheckId::shared("cluster main", "reachable");
        let tenants: Vec<CheckId> = (0..200).map(|n| CheckId::tenant(&format!("t{n}"), "database")).collect();
        let dedicated = CheckId::tenant("big", "database");
        for tenant in &tenants {
            engine.subject_needs(tenant.subject.clone(), cluster.clone());
        }
        let start = at("2026-11-27T10:00:00Z");
        let mut step = |engine: &mut Engine, seconds: i64, status: Status| {
            let now = start + SignedDuration::from_secs(seconds);
            for tenant in &tenants {
                engine.observe(seen(tenant, Topic::Availability, status, now));
            }
            engine.observe(seen(&cluster, Topic::Availability, status, now));
            engine.observe(seen(&dedicated, Topic::Availability, Status::Pass, now));
            alerts.step(now, &engine.picture(now), &BTreeMap::new(), &none())
        };
        assert_eq!(step(&mut engine, 0, Status::Pass), []);
        assert_eq!(step(&mut engine, 30, Status::Fail), [], "it may be a moment's");
        let told = step(&mut engine, 90, Status::Fail);
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!((told[0].consequences, told[0].urgency, told[0].phase), (200, Urgency::Page, Phase::Firing));
        assert_eq!(step(&mut engine, 120, Status::Fail), [], "it was told");
        let told = step(&mut engine, 150, Status::Pass);
        assert_eq!(
            told.iter().map(|n| (n.key.as_str(), n.phase)).collect::<Vec<_>>(),
            [("cluster main: reachable", Phase::Resolved)]
        );
    }

    /// Whoever is started anew goes on from what was told: nothing is told twice, and what has ended meanwhile is said to be over.
    #[test]
    fn what_was_told_before_a_restart_is_not_told_again_and_its_end_is() {
        let (database, page) = (CheckId::tenant("acme", "database"), CheckId::tenant("beta", "page"));
        let gone = CheckId::tenant("left", "page");
        let start = at("2026-11-27T10:00:00Z");
        let step = |alerts: &mut Alerts, engine: &Engine, seconds: i64| {
            let now = start + SignedDuration::from_secs(seconds);
            let told = alerts.step(now, &engine.picture(now), &BTreeMap::new(), &none());
            told.iter().map(|notice| (notice.key.clone(), notice.phase)).collect::<Vec<_>>()
        };
        let (mut before, mut alerts) = (engine(), Alerts::new(AlertOptions::default()));
        for check in [&database, &page, &gone] {
            before.observe(seen(check, Topic::Availability, Status::Fail, start));
        }
        assert_eq!(step(&mut alerts, &before, 100).len(), 3);
        let kept = serde_json::to_string(&alerts.told()).unwrap();

        let (mut after, mut alerts) = (engine(), Alerts::new(AlertOptions::default()));
        alerts.resume(serde_json::from_str(&kept).unwrap(), start + SignedDuration::from_secs(300));
        assert_eq!(step(&mut alerts, &after, 200), [], "nobody has looked yet");
        after.observe(seen(&database, Topic::Availability, Status::Fail, start + SignedDuration::from_secs(210)));
        after.observe(seen(&page, Topic::Availability, Status::Pass, start + SignedDuration::from_secs(210)));
        assert_eq!(step(&mut alerts, &after, 220), [], "one look is not enough");
        after.observe(seen(&page, Topic::Availability, Status::Pass, start + SignedDuration::from_secs(240)));
        assert_eq!(step(&mut alerts, &after, 250), [("tenant beta: page".to_owned(), Phase::Resolved)]);
        assert_eq!(step(&mut alerts, &after, 290), [], "it goes on and was told");
        // Nobody looks after this one any more.
        assert_eq!(step(&mut alerts, &after, 301), [("tenant left: page".to_owned(), Phase::Resolved)]);
    }

    /// With the engine's own hysteresis the first look after a restart is not believed, and the second is: no news either.
    #[test]
    fn a_restart_tells_nothing_again_and_neither_does_what_is_worse_better_worse_or_not_looked_at() {
        let check = CheckId::tenant("acme", "database");
        let start = at("2026-11-27T10:00:00Z");
        let mut engine = Engine::new(EngineOptions::default());
        let mut alerts = Alerts::new(AlertOptions::default());
        let mut told = Vec::new();
        let mut step = |alerts: &mut Alerts, engine: &mut Engine, seconds: i64, status: Option<Status>| {
            let now = start + SignedDuration::from_secs(seconds);
            if let Some(status) = status {
                engine.observe(seen(&check, Topic::Availability, status, now));
            }
            let notices = alerts.step(now, &engine.picture(now), &BTreeMap::new(), &none());
            told.extend(notices.iter().map(|notice| (seconds, notice.phase, notice.urgency)));
        };
        for n in 0..10 {
            step(&mut alerts, &mut engine, n * 30, Some(Status::Fail));
        }
        let kept = serde_json::to_string(&alerts.told()).unwrap();
        let mut engine = Engine::new(EngineOptions::default());
        let mut alerts = Alerts::new(AlertOptions::default());
        alerts.resume(serde_json::from_str(&kept).unwrap(), start + SignedDuration::from_secs(600));
        for n in 10..60 {
            step(&mut alerts, &mut engine, n * 30, Some(if n / 4 % 2 == 0 { Status::Fail } else { Status::Warn }));
        }
        for n in 60..120 {
            step(&mut alerts, &mut engine, n * 30, (n % 20 < 10).then_some(Status::Fail));
        }
        assert_eq!(told, [(90, Phase::Firing, Urgency::Page)]);
    }

    #[test]
    fn what_was_milder_for_an_hour_is_news_when_it_fails_again() {
        let check = CheckId::tenant("acme", "mail");
        let start = at("2026-11-27T10:00:00Z");
        let (mut engine, mut alerts) = (Engine::new(EngineOptions::default()), Alerts::new(AlertOptions::default()));
        let mut told = Vec::new();
        for second in (0..12_000).step_by(30) {
            let now = start + SignedDuration::from_secs(second);
            let status = if (600..9_000).contains(&second) { Status::Warn } else { Status::Fail };
            engine.observe(seen(&check, Topic::Backlog, status, now));
            let notices = alerts.step(now, &engine.picture(now), &BTreeMap::new(), &none());
            told.extend(notices.iter().map(|notice| (second, notice.urgency)));
        }
        assert_eq!(told, [(90, Urgency::Page), (9_030, Urgency::Page)]);
    }

    /// Nobody is told of one bad look, however long it takes to the next.
    #[test]
    fn one_bad_look_of_a_check_that_is_looked_at_rarely_is_not_told() {
        let check = CheckId::tenant("acme", "login");
        let start = at("2026-11-27T10:00:00Z");
        let mut engine = Engine::new(EngineOptions::default());
        engine.expect_within(check.clone(), Duration::from_secs(1_500));
        let mut alerts = Alerts::new(AlertOptions::default());
        let mut told = Vec::new();
        for second in (0..900).step_by(3) {
            let now = start + SignedDuration::from_secs(second);
            if second % 300 == 0 {
                engine.observe(seen(&check, Topic::Availability, Status::Fail, now));
            }
            let notices = alerts.step(now, &engine.picture(now), &BTreeMap::new(), &none());
            told.extend(notices.iter().map(|notice| (second, notice.urgency)));
        }
        assert_eq!(told, [(360, Urgency::Page)]);
    }

    #[test]
    fn a_clock_that_jumps_wakes_nobody_and_hides_nothing() {
        let start = at("2026-11-27T10:00:00Z");
        let checks: Vec<CheckId> = (0..100).map(|n| CheckId::tenant(&format!("t{n}"), "page")).collect();
        for by in [7_200, -3_600] {
            let (mut engine, mut alerts) =
                (Engine::new(EngineOptions::default()), Alerts::new(AlertOptions::default()));
            for check in &checks {
                engine.observe(seen(check, Topic::Availability, Status::Pass, start));
            }
            for second in [10, 40] {
                let now = start + SignedDuration::from_secs(second);
                engine.observe(seen(&checks[0], Topic::Availability, Status::Fail, now));
            }
            let jumped = start + SignedDuration::from_secs(50 + by);
            alerts.clock_jumped(jumped);
            let mut told = Vec::new();
            for second in (0..200).step_by(3) {
                let now = jumped + SignedDuration::from_secs(second);
                // They are looked at again, one after the other.
                if let Some(check) = checks.get(usize::try_from(second / 3).unwrap()) {
                    let status = if *check == checks[0] { Status::Fail } else { Status::Pass };
                    engine.observe(seen(check, Topic::Availability, status, now));
                }
                if second == 30 {
                    engine.observe(seen(&checks[0], Topic::Availability, Status::Fail, now));
                }
                let notices = alerts.step(now, &engine.picture(now), &BTreeMap::new(), &none());
                told.extend(notices.iter().map(|notice| (second, notice.key.clone())));
            }
            assert_eq!(told.len(), 1, "{by}: {told:?}");
            assert!(told[0].1 == "tenant t0: page" && told[0].0 <= 150, "{by}: {told:?}");
        }
    }

    /// The server is believed to be well before all of its tenants are: they look on beats of their own.
    #[test]
    fn when_a_shared_server_comes_back_its_tenants_are_given_time() {
        let (mut engine, mut alerts) = (engine(), Alerts::new(AlertOptions::default()));
        let (cluster, own) = (CheckId::shared("cluster main", "reachable"), CheckId::tenant("acme", "database"));
        engine.subject_needs(own.subject.clone(), cluster.clone());
        let start = at("2026-11-27T10:00:00Z");
        let mut step = |seconds: i64, server: Status, tenant: Status| {
            let now = start + SignedDuration::from_secs(seconds);
            engine.observe(seen(&cluster, Topic::Availability, server, now));
            engine.observe(seen(&own, Topic::Availability, tenant, now));
            let told = alerts.step(now, &engine.picture(now), &BTreeMap::new(), &none());
            told.iter().map(|notice| (notice.check.aspect.clone(), notice.phase)).collect::<Vec<_>>()
        };
        step(0, Status::Fail, Status::Fail);
        assert_eq!(step(600, Status::Fail, Status::Fail), [("reachable".to_owned(), Phase::Firing)]);
        assert_eq!(step(630, Status::Pass, Status::Fail), [("reachable".to_owned(), Phase::Resolved)]);
        assert_eq!(step(650, Status::Pass, Status::Pass), []);
        // But if it does not come back with its server, it is told of.
        step(660, Status::Fail, Status::Fail);
        step(715, Status::Fail, Status::Fail);
        assert_eq!(step(720, Status::Pass, Status::Fail), []);
        assert_eq!(step(785, Status::Pass, Status::Fail), [("database".to_owned(), Phase::Firing)]);
    }

    fn payroll() -> BTreeMap<String, Arc<Calendar>> {
        let config: CalendarConfig = serde_json::from_value(serde_json::json!({
            "time_zone": "Europe/Berlin",
            "events": [{ "name": "payroll week", "kind": "payroll", "days": ["2026-11-27"], "from": "00:00", "until": "12:00",
                         "effects": { "latency": 3.0 } }],
        }))
        .unwrap();
        BTreeMap::from([("acme".to_owned(), Arc::new(Calendar::new(&config).unwrap()))])
    }

    /// "Latency of 2 s: alert in a normal week, none in payroll week, alert again five minutes after it; RPO alert in both."
    #[test]
    fn latency_is_borne_while_wages_are_paid_and_what_would_be_lost_never_is() {
        let (slow, backup) = (CheckId::tenant("acme", "page latency"), CheckId::tenant("acme", "backup"));
        let options = AlertOptions { after: Duration::from_secs(300), ..AlertOptions::default() };
        for (day, in_payroll) in [("2026-11-20", false), ("2026-11-27", true)] {
            let (mut engine, mut alerts) = (engine(), Alerts::new(options));
            let begin = at(&format!("{day}T08:00:00Z"));
            let mut told: Vec<(i64, String)> = Vec::new();
            for minute in 0..240 {
                let now = begin + SignedDuration::from_mins(minute);
                let page = seen(&slow, Topic::Latency, Status::Fail, now)
                    .figure(Evidence::new("page_takes", 2.0, "s").limited(1.0));
                engine.observe(page);
                let rpo = Evidence::new("would_be_lost", 100_000.0, "s").limited(86_400.0);
                engine.observe(seen(&backup, Topic::RecoveryPoint, Status::Fail, now).figure(rpo));
                let notices = alerts.step(now, &engine.picture(now), &BTreeMap::new(), &payroll());
                told.extend(notices.into_iter().map(|notice| (minute, notice.key)));
            }
            let latency = told.iter().find(|(_, key)| key.contains("latency")).map(|(minute, _)| *minute);
            // Until noon in Berlin, which is three hours later; and then five minutes more.
            assert_eq!(latency, Some(if in_payroll { 179 + 5 } else { 5 }), "{told:?}");
            assert!(told.contains(&(5, "tenant acme: backup".to_owned())), "{told:?}");
        }
        // What is beyond the wider limit too is not borne.
        let effects = Effects { latency: 3.0, ..Effects::default() };
        let page = |takes| {
            seen(&slow, Topic::Latency, Status::Fail, at("2026-11-27T08:00:00Z"))
                .figure(Evidence::new("page_takes", takes, "s").limited(1.0))
        };
        assert_eq!(eased(&page(2.9), Topic::Latency, &effects), Status::Pass);
        assert_eq!(eased(&page(3.1), Topic::Latency, &effects), Status::Fail);
        assert_eq!(eased(&page(2.0), Topic::Availability, &effects), Status::Fail);
        // Warnings have a limit of their own: it is not that of failures that is wider.
        let effects = Effects { latency: 1.1, ..Effects::default() };
        let page = |takes| {
            seen(&slow, Topic::Latency, Status::Warn, at("2026-11-27T08:00:00Z"))
                .figure(Evidence::new("page_takes", takes, "s").warned(2.0).limited(10.0))
        };
        let judged = [2.1, 2.3, 9.9, 10.5, 11.5].map(|takes| eased(&page(takes), Topic::Latency, &effects));
        assert_eq!(judged, [Status::Pass, Status::Warn, Status::Warn, Status::Warn, Status::Fail]);
    }

    #[test]
    fn more_than_anybody_can_read_comes_as_one_and_what_goes_on_is_told_again() {
        let (mut engine, mut alerts) =
            (engine(), Alerts::new(AlertOptions { after: Duration::ZERO, ..AlertOptions::default() }));
        let now = at("2026-11-27T10:00:00Z");
        for n in 0..100 {
            engine.observe(seen(&CheckId::tenant(&format!("t{n}"), "cron"), Topic::Availability, Status::Fail, now));
        }
        let told = alerts.step(now, &engine.picture(now), &BTreeMap::new(), &none());
        assert_eq!(told.len(), 21);
        assert!(told[20].summary.starts_with("80 more at once"), "{}", told[20].summary);
        assert_eq!(alerts.open().len(), 100);
        let later = now + SignedDuration::from_hours(4);
        assert_eq!(alerts.step(later, &engine.picture(later), &BTreeMap::new(), &none()).len(), 21, "once more");
    }

    #[test]
    fn a_budget_that_burns_or_is_gone_is_told_whatever_the_calendar_says() {
        let engine = engine();
        let now = at("2026-11-27T08:00:00Z");
        let key = ("acme".to_owned(), Objective::Availability);
        let burning = Budget { objective: 0.999, left: 0.4, own_left: 0.4, burning: Some((20.0, Urgency::Page)) };
        let mut alerts = Alerts::new(AlertOptions::default());
        let told = alerts.step(now, &engine.picture(now), &BTreeMap::from([(key.clone(), burning)]), &payroll());
        assert_eq!(told.len(), 1);
        let expected = "its budget for 99.9 % of the time that it works is spent 20 times too fast; 40 % are left";
        assert!(told[0].summary.contains(expected), "{}", told[0].summary);
        let gone = Budget { objective: 0.999, left: -0.2, own_left: -0.2, burning: None };
        let mut alerts = Alerts::new(AlertOptions::default());
        let told = alerts.step(now, &engine.picture(now), &BTreeMap::from([(key, gone)]), &payroll());
        assert!(told.iter().any(|n| n.summary.contains("nothing is left of its budget for 99.9 %")), "{told:?}");
    }

    #[test]
    fn that_nothing_is_left_is_told_at_once_after_it_has_burned_and_then_daily() {
        let engine = engine();
        let start = at("2026-11-27T00:00:00Z");
        let key = ("acme".to_owned(), Objective::Availability);
        let mut alerts = Alerts::new(AlertOptions::default());
        let mut told = Vec::new();
        for hour in 0..30 {
            let (left, burning) = if hour < 2 { (0.4, Some((20.0, Urgency::Page))) } else { (-0.2, None) };
            let budget = Budget { objective: 0.999, left, own_left: left, burning };
            let now = start + SignedDuration::from_hours(hour);
            let budgets = BTreeMap::from([(key.clone(), budget)]);
            let notices = alerts.step(now, &engine.picture(now), &budgets, &none());
            told.extend(notices.iter().map(|notice| (hour, notice.summary.contains("nothing is left"))));
        }
        assert_eq!(told, [(0, false), (2, true), (26, true)]);
    }

    /// A shared check that flickers explains what was told before, for a moment.
    #[test]
    fn what_was_told_is_not_told_again_because_something_shared_flickers_and_its_end_is_told() {
        let (mut engine, mut alerts) =
            (engine(), Alerts::new(AlertOptions { after: Duration::ZERO, ..AlertOptions::default() }));
        let (own, cluster) = (CheckId::tenant("acme", "cron"), CheckId::shared("cluster main", "reachable"));
        engine.subject_needs(own.subject.clone(), cluster.clone());
        let start = at("2026-11-27T10:00:00Z");
        let mut step = |seconds: i64, shared: Status, tenant: Status| {
            let now = start + SignedDuration::from_secs(seconds);
            engine.observe(seen(&own, Topic::Availability, tenant, now));
            engine.observe(seen(&cluster, Topic::Availability, shared, now));
            let told = alerts.step(now, &engine.picture(now), &BTreeMap::new(), &none());
            told.iter().map(|notice| (notice.check.aspect.clone(), notice.phase)).collect::<Vec<_>>()
        };
        assert_eq!(step(0, Status::Pass, Status::Fail), [("cron".to_owned(), Phase::Firing)]);
        assert_eq!(step(30, Status::Fail, Status::Fail), [("reachable".to_owned(), Phase::Firing)]);
        assert_eq!(step(60, Status::Pass, Status::Fail), [("reachable".to_owned(), Phase::Resolved)], "and no more");
        assert_eq!(step(90, Status::Pass, Status::Pass), [("cron".to_owned(), Phase::Resolved)]);
    }

    #[test]
    fn every_end_of_what_was_told_by_name_is_told() {
        let (mut engine, mut alerts) =
            (engine(), Alerts::new(AlertOptions { after: Duration::ZERO, ..AlertOptions::default() }));
        let now = at("2026-11-27T10:00:00Z");
        let mut step = |status: Status, now: Timestamp| {
            for n in 0..50 {
                let check = CheckId::tenant(&format!("t{n}"), "cron");
                engine.observe(seen(&check, Topic::Availability, status, now));
            }
            alerts.step(now, &engine.picture(now), &BTreeMap::new(), &none())
        };
        let told = step(Status::Warn, now);
        // They get worse all at once, and not one of those that were told by name becomes nameless.
        let worse = step(Status::Fail, now + SignedDuration::from_secs(61));
        assert_eq!(worse.len(), 21);
        let over = step(Status::Pass, now + SignedDuration::from_secs(66));
        let told: Vec<Notice> = told.into_iter().chain(worse).collect();
        let keys = |notices: &[Notice]| notices.iter().map(|n| n.key.clone()).collect::<BTreeSet<_>>();
        assert_eq!(keys(&told), keys(&over));
        assert!(over.iter().any(|notice| notice.summary.contains("with it 29 of those")), "{over:#?}");
    }
}
