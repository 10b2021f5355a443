//! Who is told of what: one notice for each cause, none for its consequences, and none for what everybody expects.
//!
//! Pure: a picture and an instant go in, notices come out. What business events make bearable is borne while they last;
//! what would be lost, what keeps others out, and an exhausted budget never are.

use std::collections::{BTreeMap, BTreeSet};
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
pub struct Told(BTreeMap<String, Open>);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Open {
    notice: Notice,
    told: Timestamp,
    /// It goes on, and follows from something else for now, or is borne: nobody is told of it meanwhile.
    folded: bool,
    /// It was told by name; otherwise only as one of many, and so is its end.
    named: bool,
}

/// How often is repeated that nothing is left.
const DAILY: SignedDuration = SignedDuration::from_hours(24);

/// Remembers who was told what.
#[derive(Debug, Default)]
pub struct Alerts {
    options: AlertOptions,
    open: BTreeMap<String, Open>,
    /// The last instant at which a trouble was there and was borne, by key.
    borne: BTreeMap<String, Timestamp>,
    minute: (i64, u32),
    /// Until then, what was told by whoever was here before is not over for not having been looked at yet.
    patient_until: Option<Timestamp>,
}

/// The business calendar of a subject, if it has one.
pub trait Calendars {
    /// What is different at an instant for a subject.
    fn effects(&self, subject: &Subject, at: Timestamp) -> Effects;
}

impl Calendars for BTreeMap<String, Calendar> {
    /// By the names of tenants. What is shared follows nobody's calendar.
    fn effects(&self, subject: &Subject, at: Timestamp) -> Effects {
        match subject {
            Subject::Tenant(name) => self.get(name).map_or_else(Effects::default, |calendar| calendar.effects(at)),
            Subject::Shared(_) => Effects::default(),
        }
    }
}

/// How an observation would be judged if everything were allowed to take longer, by a factor.
///
/// A figure beyond its limit, but not beyond the wider one, is borne: it counts as passing.
pub fn eased(observation: &Observation, topic: Topic, effects: &Effects) -> bool {
    topic.is_bearable()
        && effects.latency > 1.0
        && observation.evidence.iter().any(|figure| figure.limit.is_some())
        && observation
            .evidence
            .iter()
            .all(|figure| figure.limit.is_none_or(|limit| figure.value < limit * effects.latency))
}

impl Alerts {
    /// Nobody was told anything yet.
    pub fn new(options: AlertOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// Goes on from what was told before. Until `patient_until` what nobody has looked at yet is not over.
    pub fn resume(&mut self, told: Told, patient_until: Timestamp) {
        (self.open, self.patient_until) = (told.0, Some(patient_until));
    }

    /// What somebody was told and is not over.
    pub fn told(&self) -> Told {
        Told(self.open.clone())
    }

    /// What is open now, the most urgent first.
    pub fn open(&self) -> Vec<&Notice> {
        let mut open: Vec<&Notice> = self.open.values().filter(|open| !open.folded).map(|open| &open.notice).collect();
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
        for state in picture.causes() {
            let key = state.check.to_string();
            let effects = calendars.effects(&state.check.subject, now);
            if state.status != Status::Unknown && eased(&state.observation, state.topic, &effects) {
                self.borne.insert(key, now);
                continue;
            }
            // What was borne counts from the end of that.
            let since = self.borne.get(&key).map_or(state.since, |borne| state.since.max(*borne));
            if let Some(notice) = self.notice(&key, state, since, picture, now) {
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
        let (mut over, mut unnamed_over) = (Vec::new(), 0);
        let (borne, patient_until) = (&self.borne, self.patient_until);
        self.open.retain(|key, open| {
            // A trouble that has become another's consequence is not over, and it is not told of either.
            // The same holds for one that is borne from now on.
            let goes_on = picture.checks.get(key).is_some_and(|state| state.status != Status::Pass)
                && borne.get(key) == Some(&now);
            open.folded = !wanted.contains_key(key) && goes_on;
            // What was looked at once and is not believed yet has not been seen to be well either.
            let unseen = picture.checks.get(key).is_none_or(|state| state.status == Status::Unknown);
            let waits = unseen && patient_until.is_some_and(|until| now < until);
            if wanted.contains_key(key) || goes_on || waits {
                return true;
            }
            if open.named {
                over.push(Notice { phase: Phase::Resolved, consequences: 0, ..open.notice.clone() });
            } else {
                unnamed_over += 1;
            }
            false
        });
        let mut told = Vec::new();
        let repeat = SignedDuration::try_from(self.options.repeat).unwrap_or(SignedDuration::MAX);
        for (key, notice) in wanted {
            let again = self.open.get(&key).is_none_or(|open| {
                // That a month's budget is gone changes slowly.
                let repeat = if budgets_gone.contains(&key) { repeat.max(DAILY) } else { repeat };
                now.duration_since(open.told) >= repeat || notice.urgency > open.notice.urgency
            });
            let since = self.open.get(&key).map_or(notice.since, |open| open.notice.since);
            let notice = Notice { since, ..notice };
            if again {
                told.push(notice.clone());
                self.open.insert(key, Open { notice, told: now, folded: false, named: true });
            } else if let Some(open) = self.open.get_mut(&key) {
                open.notice = notice;
            }
        }
        told.sort_by(|a, b| b.urgency.cmp(&a.urgency).then(a.key.cmp(&b.key)));
        let mut told = self.limited(now, told);
        if unnamed_over > 0
            && let Some(last) = over.last_mut()
        {
            last.summary = format!("{}; with it {unnamed_over} of those that were told as one are over", last.summary);
        }
        // Ends are as many as what was told by name.
        told.extend(over);
        told
    }

    fn notice(
        &self,
        key: &str,
        state: &CheckState,
        since: Timestamp,
        picture: &Picture,
        now: Timestamp,
    ) -> Option<Notice> {
        let lasted = now.duration_since(since);
        let patience = SignedDuration::try_from(self.options.after).unwrap_or(SignedDuration::MAX);
        if lasted < patience && !self.open.contains_key(key) {
            return None;
        }
        let urgency = match state.status {
            Status::Pass => return None,
            Status::Fail => Urgency::Page,
            Status::Warn | Status::Unknown => Urgency::Ticket,
        };
        let consequences = picture.consequences(&state.check).len();
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

    /// What is more than anybody can read comes as one.
    fn limited(&mut self, now: Timestamp, mut told: Vec<Notice>) -> Vec<Notice> {
        let minute = now.as_second().div_euclid(60);
        if self.minute.0 != minute {
            self.minute = (minute, 0);
        }
        let room = self.options.per_minute.saturating_sub(self.minute.1) as usize;
        self.minute.1 = self.minute.1.saturating_add(u32::try_from(told.len()).unwrap_or(u32::MAX));
        if told.len() > room {
            let more = told.split_off(room);
            for notice in more.iter().skip(1) {
                if let Some(open) = self.open.get_mut(&notice.key) {
                    open.named = false;
                }
            }
            let number = more.len();
            if let Some(first) = more.into_iter().next() {
                let summary = format!("{number} more troubles at once, of which the first: {}", first.summary);
                told.push(Notice { summary, ..first });
            }
        }
        told
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

    fn none() -> BTreeMap<String, Calendar> {
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
        assert_eq!(step(&mut alerts, &after, 220), [("tenant beta: page".to_owned(), Phase::Resolved)]);
        assert_eq!(step(&mut alerts, &after, 290), [], "it goes on and was told");
        // Nobody looks after this one any more.
        assert_eq!(step(&mut alerts, &after, 301), [("tenant left: page".to_owned(), Phase::Resolved)]);
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

    fn payroll() -> BTreeMap<String, Calendar> {
        let config: CalendarConfig = serde_json::from_value(serde_json::json!({
            "time_zone": "Europe/Berlin",
            "events": [{ "name": "payroll week", "kind": "payroll", "days": ["2026-11-27"], "from": "00:00", "until": "12:00",
                         "effects": { "latency": 3.0 } }],
        }))
        .unwrap();
        BTreeMap::from([("acme".to_owned(), Calendar::new(&config).unwrap())])
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
        assert!(eased(&page(2.9), Topic::Latency, &effects) && !eased(&page(3.1), Topic::Latency, &effects));
        assert!(!eased(&page(2.0), Topic::Availability, &effects));
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
        assert!(told[20].summary.starts_with("80 more troubles at once"), "{}", told[20].summary);
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
        let told = step(Status::Fail, now);
        let over = step(Status::Pass, now + SignedDuration::from_secs(5));
        let keys = |notices: &[Notice]| notices.iter().map(|n| n.key.clone()).collect::<BTreeSet<_>>();
        assert_eq!((told.len(), keys(&told)), (21, keys(&over)));
        assert!(over.iter().any(|notice| notice.summary.contains("with it 29 of those")), "{over:#?}");
    }
}
