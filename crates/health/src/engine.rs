//! From observations to a picture: what is really so, what is only a consequence of something else, and since when.
//!
//! Pure: the time comes with the observations. Memory is bounded by the number of checks and by the history that each keeps.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::model::{CheckId, Observation, Status, Subject, Topic};

/// How much it takes to believe a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hysteresis {
    /// So many looks in a row must be worse before it is worse.
    pub worse_after: u32,
    /// So many must be better before it is better.
    pub better_after: u32,
}

impl Default for Hysteresis {
    fn default() -> Self {
        Self { worse_after: 2, better_after: 2 }
    }
}

/// How an engine judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// How much it takes to believe a change.
    pub hysteresis: Hysteresis,
    /// An observation that is older than this says nothing any more.
    pub stale_after: Duration,
    /// Changes of status that each check remembers.
    pub history: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { hysteresis: Hysteresis::default(), stale_after: Duration::from_secs(150), history: 32 }
    }
}

/// A change of a check's status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// When it was believed.
    pub at: Timestamp,
    /// From.
    pub from: Status,
    /// To.
    pub to: Status,
    /// What was seen then.
    pub text: String,
}

#[derive(Debug)]
struct Check {
    status: Status,
    since: Timestamp,
    latest: Observation,
    /// The last looks, oldest first: when, and whether they have failed.
    recent: VecDeque<(Timestamp, bool)>,
    /// What the very first look has seen, while it is the only one and was not believed.
    first: Option<Status>,
    /// What the last looks have seen, if not what is believed, and how often in a row.
    doubt: Option<(Status, u32)>,
    /// Since when failures have been seen that were not believed, and when the last of them was.
    flapping: Option<(Timestamp, Timestamp)>,
    history: VecDeque<Change>,
}

/// A check as it is now.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckState {
    /// Which.
    pub check: CheckId,
    /// How it is.
    pub status: Status,
    /// Since when.
    pub since: Timestamp,
    /// What kind of trouble it is.
    pub topic: Topic,
    /// What was seen last.
    pub observation: Observation,
    /// The check that explains this one: nothing needs to be done here but there.
    pub because_of: Option<CheckId>,
}

impl CheckState {
    /// Whether it is in trouble, and not for another's sake.
    pub fn is_cause(&self) -> bool {
        self.status != Status::Pass && self.because_of.is_none()
    }
}

/// Everything as it is now.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Picture {
    /// Every check, by name.
    pub checks: BTreeMap<String, CheckState>,
}

impl Picture {
    /// The checks of a subject.
    pub fn of(&self, subject: &Subject) -> impl Iterator<Item = &CheckState> {
        // The names of its checks begin with its own, and so does the name of another perhaps.
        let begin = format!("{subject}: ");
        let named = self.checks.range(begin.clone()..).take_while(move |(name, _)| name.starts_with(&begin));
        named.map(|(_, state)| state).filter(move |state| state.check.subject == *subject)
    }

    /// The worst of a subject's checks. Unknown if there is none.
    pub fn status_of(&self, subject: &Subject) -> Status {
        self.of(subject).map(|state| state.status).max().unwrap_or(Status::Unknown)
    }

    /// What really is in trouble: the worst and longest first.
    pub fn causes(&self) -> Vec<&CheckState> {
        let mut causes: Vec<&CheckState> = self.checks.values().filter(|state| state.is_cause()).collect();
        causes.sort_by(|a, b| b.status.cmp(&a.status).then(a.since.cmp(&b.since)).then(a.check.cmp(&b.check)));
        causes
    }

    /// What is in trouble only because of a check.
    pub fn consequences(&self, cause: &CheckId) -> Vec<&CheckState> {
        self.checks.values().filter(|state| state.because_of.as_ref() == Some(cause)).collect()
    }
}

/// Failures that are farther apart than this are not one that comes and goes.
const CALM: SignedDuration = SignedDuration::from_secs(600);

/// So many looks are remembered one by one.
const RECENT: usize = 8;

/// So many changes wait for somebody to take them.
const NEWS: usize = 10_000;

/// Gathers observations.
#[derive(Debug, Default)]
pub struct Engine {
    options: EngineOptions,
    checks: BTreeMap<CheckId, Check>,
    /// What cannot be well where the other is not.
    needs: BTreeMap<CheckId, BTreeSet<CheckId>>,
    needs_of_subject: BTreeMap<Subject, BTreeSet<CheckId>>,
    /// How old observations may be, of checks that are looked at more rarely than others.
    within: BTreeMap<CheckId, Duration>,
    /// Changes that nobody has taken yet, oldest first.
    news: VecDeque<(CheckId, Change)>,
}

impl Engine {
    /// An engine that knows nothing yet.
    pub fn new(options: EngineOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// One check cannot be well where another is not.
    pub fn needs(&mut self, check: CheckId, other: CheckId) {
        self.needs.entry(check).or_default().insert(other);
    }

    /// None of a subject's checks can be well where a check is not.
    pub fn subject_needs(&mut self, subject: Subject, other: CheckId) {
        self.needs_of_subject.entry(subject).or_default().insert(other);
    }

    /// What was seen of a check says nothing any more when it is older than this, or than what holds for all.
    pub fn expect_within(&mut self, check: CheckId, age: Duration) {
        self.within.insert(check, age);
    }

    /// Goes on from what another engine has believed, as far as the same is looked at.
    pub fn go_on_from(&mut self, before: &mut Self) {
        let known = std::mem::take(&mut before.checks);
        self.checks = known.into_iter().filter(|(check, _)| self.within.contains_key(check)).collect();
        self.news = std::mem::take(&mut before.news);
    }

    /// Takes an observation in.
    pub fn observe(&mut self, mut observation: Observation) {
        let Hysteresis { worse_after, better_after } = self.options.hysteresis;
        let Some(check) = self.checks.get_mut(&observation.check) else {
            let (seen, since) = (observation.status, observation.at);
            // Nobody is woken by the first look, and nobody is told that all is well where the first look has failed.
            let doubt = (seen == Status::Fail && worse_after > 1).then_some((seen, 1));
            let status = if doubt.is_some() { Status::Unknown } else { seen };
            let latest = observation.clone();
            let recent = VecDeque::from([(since, seen == Status::Fail)]);
            let first = doubt.is_some().then_some(seen);
            let check = Check { status, since, latest, recent, first, doubt, flapping: None, history: VecDeque::new() };
            self.checks.insert(observation.check, check);
            return;
        };
        // Late ones are old news; but a clock that was set back is no reason to see nothing until it has caught up.
        let back = check.latest.at.duration_since(observation.at);
        if back > SignedDuration::ZERO && back < SignedDuration::from_secs(60) {
            return;
        }
        let seen = observation.status;
        if check.recent.len() == RECENT {
            check.recent.pop_front();
        }
        check.recent.push_back((observation.at, seen == Status::Fail));
        if seen == Status::Unknown {
            // Whoever could not look does not know what kind of trouble it would have been.
            observation.topic = check.latest.topic;
        }
        if seen == check.status {
            check.doubt = None;
        } else {
            // Of several looks that differ in how bad it is, the mildest counts.
            let worse = seen > check.status;
            let (so_far, times) = match check.doubt {
                Some((other, times)) if (other > check.status) == worse => {
                    (if worse { other.min(seen) } else { other.max(seen) }, times + 1)
                }
                _ => (seen, 1),
            };
            // Where nothing was believed yet, two looks say something whatever they say: the milder of them.
            let (so_far, begins) = match check.first.filter(|_| seen != Status::Unknown) {
                Some(first) => (first.min(seen), true),
                None => (so_far, false),
            };
            if begins || times >= if worse { worse_after } else { better_after } {
                check.first = None;
                if self.options.history > 0 {
                    if check.history.len() >= self.options.history {
                        check.history.pop_front();
                    }
                    let (at, from, text) = (observation.at, check.status, observation.text.clone());
                    let change = Change { at, from, to: so_far, text };
                    if self.news.len() >= NEWS {
                        self.news.pop_front();
                    }
                    self.news.push_back((observation.check.clone(), change.clone()));
                    check.history.push_back(change);
                }
                (check.status, check.since, check.doubt) = (so_far, observation.at, None);
            } else {
                check.doubt = Some((so_far, times));
            }
        }
        // Several looks, however rare they are.
        let calm = CALM.max(SignedDuration::try_from(self.options.stale_after).unwrap_or(CALM));
        check.flapping = match check.flapping {
            _ if check.status == Status::Fail => None,
            Some((since, last)) if seen == Status::Fail && observation.at.duration_since(last) < calm => {
                Some((since, observation.at))
            }
            _ if seen == Status::Fail => Some((observation.at, observation.at)),
            flapping => flapping,
        };
        check.latest = observation;
    }

    /// What has changed since this was asked the last time, oldest first; of very much, the newest.
    pub fn take_news(&mut self) -> Vec<(CheckId, Change)> {
        self.news.drain(..).collect()
    }

    /// Forgets checks that nobody makes any more.
    pub fn retain(&mut self, keep: impl Fn(&CheckId) -> bool) {
        self.checks.retain(|check, _| keep(check));
    }

    /// What a check has been, oldest first.
    pub fn history(&self, check: &CheckId) -> Vec<Change> {
        self.checks.get(check).map(|check| check.history.iter().cloned().collect()).unwrap_or_default()
    }

    /// How everything is at an instant.
    pub fn picture(&self, now: Timestamp) -> Picture {
        // Since when what was seen of a check says nothing, if it does not.
        let blind_since = |check: &Check| {
            let own = self.within.get(&check.latest.check).copied().unwrap_or_default();
            let stale = SignedDuration::try_from(self.options.stale_after.max(own)).unwrap_or(SignedDuration::MAX);
            let since = check.latest.at.checked_add(stale).unwrap_or(Timestamp::MAX);
            (now > since).then_some(since)
        };
        let status_of = |check: &Check| if blind_since(check).is_some() { Status::Unknown } else { check.status };
        let checks = self.checks.iter().map(|(id, check)| {
            let blind = blind_since(check);
            let (status, since) = blind.map_or((check.status, check.since), |since| (Status::Unknown, since));
            let mut observation = check.latest.clone();
            if blind.is_some() {
                let last = check.latest.at.strftime("%Y-%m-%d %H:%M:%S UTC");
                observation.text = format!("not looked at since {last}; then: {}", check.latest.text);
            }
            // What was seen and is not believed yet has its reason too.
            let troubled = status != Status::Pass || check.latest.status != Status::Pass;
            let state = CheckState {
                check: id.clone(),
                status,
                since,
                topic: check.latest.topic,
                observation,
                because_of: troubled.then(|| self.cause(id, &status_of, now)).flatten(),
            };
            (id.to_string(), state)
        });
        Picture { checks: checks.collect() }
    }

    /// Whether something else was at fault when a check failed at an instant: none while it has not been looked at since.
    pub fn explained(&self, check: &CheckId, at: Timestamp) -> Option<bool> {
        let mut seen = vec![check];
        let (mut fails, mut known) = (false, true);
        let mut next = 0;
        while let Some(one) = seen.get(next).copied() {
            next += 1;
            let needs = self.needs.get(one).into_iter().chain(self.needs_of_subject.get(&one.subject)).flatten();
            for other in needs {
                if seen.contains(&other) {
                    continue;
                }
                seen.push(other);
                if let Some(other) = self.checks.get(other).filter(|other| other.latest.check.subject != check.subject)
                {
                    // The last look before it, and the first after it.
                    let before = other.recent.iter().rfind(|(when, _)| *when <= at);
                    let after = other.recent.iter().find(|(when, _)| *when > at);
                    fails |= other.status == Status::Fail || before.into_iter().chain(after).any(|(_, failed)| *failed);
                    known &= after.is_some();
                }
            }
        }
        if fails { Some(true) } else { known.then_some(false) }
    }

    /// The check farthest down of those that a check needs and that fail. Of several that need each other, the first by
    /// name stands for all.
    fn cause(&self, check: &CheckId, status_of: &dyn Fn(&Check) -> Status, now: Timestamp) -> Option<CheckId> {
        // A failure that was seen and is not believed yet explains others already: who needs it is not told of first. But not
        // for ever: one that comes and goes, and is never believed, explains nobody's lasting trouble.
        let patience = SignedDuration::try_from(self.options.stale_after).unwrap_or(SignedDuration::MAX);
        let lately = |c: &Check| c.flapping.is_none_or(|(since, _)| now.duration_since(since) <= patience);
        let fails = |c: &Check| status_of(c) == Status::Fail || c.latest.status == Status::Fail && lately(c);
        let failing = |other: &&CheckId| self.checks.get(*other).is_some_and(fails);
        let mut seen = vec![check.clone()];
        loop {
            let at = seen.last()?;
            // Of what keeps others out, only that it could not be looked at.
            let seen_to_be_bad = |c: &Check| c.latest.topic == Topic::Security && c.latest.status != Status::Unknown;
            let bad = self.checks.get(at).is_some_and(seen_to_be_bad);
            let own = self.needs.get(at).filter(|_| !bad).into_iter().flatten();
            // What would be lost, and what keeps others out, is nobody else's fault: only what such a check itself needs
            // explains it.
            let topic = self.checks.get(at).map(|c| c.latest.topic);
            let apart = matches!(topic, Some(Topic::RecoveryPoint | Topic::Security));
            let subject = self.needs_of_subject.get(&at.subject).filter(|_| !apart).into_iter().flatten();
            let Some(next) = own.chain(subject).find(failing) else { break };
            if let Some(begin) = seen.iter().position(|one| one == next) {
                let first = seen[begin..].iter().min()?.clone();
                return (first != *check).then_some(first);
            }
            seen.push(next.clone());
        }
        (seen.len() > 1).then(|| seen.pop()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn look(check: &CheckId, status: Status, seconds: i64) -> Observation {
        Observation::pass(check.clone(), Topic::Availability, at(seconds), status.as_str()).with(status)
    }

    #[test]
    fn one_bad_look_is_no_trouble_and_two_are() {
        let mut engine = Engine::new(EngineOptions::default());
        let check = CheckId::tenant("acme", "database");
        let status = |engine: &Engine, s| engine.picture(at(s)).checks["tenant acme: database"].status;
        engine.observe(look(&check, Status::Pass, 0));
        engine.observe(look(&check, Status::Fail, 10));
        assert_eq!(status(&engine, 10), Status::Pass);
        engine.observe(look(&check, Status::Pass, 20));
        engine.observe(look(&check, Status::Fail, 30));
        assert_eq!(status(&engine, 30), Status::Pass, "in a row, that is");
        engine.observe(look(&check, Status::Warn, 40));
        assert_eq!(status(&engine, 40), Status::Warn, "of a failure and a warning, the warning is believed");
        engine.observe(look(&check, Status::Pass, 50));
        engine.observe(look(&check, Status::Pass, 60));
        assert_eq!(status(&engine, 60), Status::Pass);
        let history: Vec<_> = engine.history(&check).iter().map(|c| (c.from, c.to)).collect();
        assert_eq!(history, [(Status::Pass, Status::Warn), (Status::Warn, Status::Pass)]);
    }

    #[test]
    fn what_alternates_from_the_beginning_is_the_milder_of_what_it_is() {
        for (other, expected) in [(Status::Warn, Status::Warn), (Status::Pass, Status::Pass)] {
            let mut engine = Engine::new(EngineOptions::default());
            let check = CheckId::tenant("acme", "database");
            for n in 0..9 {
                engine.observe(look(&check, if n % 2 == 0 { Status::Fail } else { other }, n * 30));
                let status = engine.picture(at(n * 30)).checks["tenant acme: database"].status;
                assert_eq!(status, if n == 0 { Status::Unknown } else { expected });
            }
        }
    }

    #[test]
    fn the_first_look_alone_wakes_nobody() {
        let mut engine = Engine::new(EngineOptions::default());
        let check = CheckId::tenant("acme", "database");
        let status = |engine: &Engine, s| engine.picture(at(s)).checks["tenant acme: database"].status;
        engine.observe(look(&check, Status::Fail, 0));
        assert_eq!(status(&engine, 0), Status::Unknown);
        engine.observe(look(&check, Status::Fail, 30));
        assert_eq!(status(&engine, 30), Status::Fail);
    }

    /// One look that is not believed explains others for a while; one that comes and goes does not for ever.
    #[test]
    fn a_server_that_comes_and_goes_does_not_explain_a_tenant_that_stays_away() {
        let mut engine = Engine::new(EngineOptions::default());
        let (cluster, page) = (CheckId::shared("cluster main", "reachable"), CheckId::tenant("acme", "page"));
        engine.subject_needs(page.subject.clone(), cluster.clone());
        let mut explained = Vec::new();
        for n in 0..40 {
            let status = if n % 2 == 0 { Status::Fail } else { Status::Pass };
            engine.observe(look(&cluster, status, n * 30));
            engine.observe(look(&page, Status::Fail, n * 30 + 1));
            let picture = engine.picture(at(n * 30 + 1));
            explained.push(picture.checks["tenant acme: page"].because_of.is_some());
        }
        assert!(explained[2], "at first it may be the server");
        assert!(explained[10..].iter().all(|explained| !explained), "{explained:?}");
    }

    #[test]
    fn what_nobody_looks_at_any_more_is_unknown() {
        let mut engine = Engine::new(EngineOptions::default());
        let check = CheckId::tenant("acme", "database");
        engine.observe(look(&check, Status::Pass, 0));
        assert_eq!(engine.picture(at(150)).status_of(&check.subject), Status::Pass);
        assert_eq!(engine.picture(at(151)).status_of(&check.subject), Status::Unknown);
        // Since then, and not since it was well.
        let state = &engine.picture(at(200)).checks["tenant acme: database"];
        assert_eq!(state.since, at(150));
        assert!(state.observation.text.starts_with("not looked at since "), "{}", state.observation.text);
        engine.expect_within(check.clone(), Duration::from_secs(1_500));
        assert_eq!(
            engine.picture(at(1_500)).status_of(&check.subject),
            Status::Pass,
            "this one is looked at more rarely"
        );
        assert_eq!(engine.picture(at(1_501)).status_of(&check.subject), Status::Unknown);
        // A clock that is set back by an hour does not blind anybody.
        engine.observe(look(&check, Status::Fail, -3_600));
        engine.observe(look(&check, Status::Fail, -3_570));
        assert_eq!(engine.picture(at(-3_570)).status_of(&check.subject), Status::Fail);
        engine.retain(|_| false);
        assert!(engine.picture(at(0)).checks.is_empty());
    }

    #[test]
    fn when_a_server_is_down_there_is_one_cause_and_everybody_elses_trouble_follows_from_it() {
        let options =
            EngineOptions { hysteresis: Hysteresis { worse_after: 1, better_after: 1 }, ..Default::default() };
        let mut engine = Engine::new(options);
        let (cluster, disk) = (CheckId::shared("cluster main", "reachable"), CheckId::shared("host db1", "disk"));
        engine.needs(cluster.clone(), disk.clone());
        for n in 0..200 {
            let check = CheckId::tenant(&format!("t{n}"), "database");
            engine.subject_needs(check.subject.clone(), cluster.clone());
            engine.observe(look(&check, if n < 199 { Status::Fail } else { Status::Pass }, 0));
        }
        engine.observe(look(&cluster, Status::Pass, 0));
        assert_eq!(engine.picture(at(0)).causes().len(), 199, "the server is well: each has trouble of its own");
        engine.observe(look(&cluster, Status::Fail, 1));
        let picture = engine.picture(at(1));
        assert_eq!(picture.causes().iter().map(|c| &c.check).collect::<Vec<_>>(), [&cluster]);
        assert_eq!(picture.consequences(&cluster).len(), 199);
        engine.observe(look(&disk, Status::Fail, 2));
        let picture = engine.picture(at(2));
        assert_eq!(picture.causes()[0].check, disk, "the cause of the cause is the cause");
        assert_eq!(picture.consequences(&disk).len(), 200);
    }

    #[test]
    fn what_would_be_lost_is_not_explained_by_a_server_that_is_down() {
        let options =
            EngineOptions { hysteresis: Hysteresis { worse_after: 1, better_after: 1 }, ..Default::default() };
        let mut engine = Engine::new(options);
        let (cluster, backup) = (CheckId::shared("cluster main", "reachable"), CheckId::tenant("acme", "backup"));
        engine.subject_needs(backup.subject.clone(), cluster.clone());
        engine.observe(look(&cluster, Status::Fail, 0));
        let missed = Observation { topic: Topic::RecoveryPoint, ..look(&backup, Status::Fail, 0) };
        engine.observe(missed);
        assert_eq!(engine.picture(at(0)).causes().len(), 2);
    }

    /// "Security … never": that a certificate could not be seen follows from a page that is gone; that it has ended does not.
    #[test]
    fn what_was_seen_of_a_certificate_is_explained_by_nothing() {
        let options =
            EngineOptions { hysteresis: Hysteresis { worse_after: 1, better_after: 1 }, ..Default::default() };
        let mut engine = Engine::new(options);
        let (page, certificate) = (CheckId::tenant("acme", "page"), CheckId::tenant("acme", "certificate of acme"));
        engine.needs(certificate.clone(), page.clone());
        engine.observe(look(&page, Status::Fail, 0));
        let seen = |status| Observation { topic: Topic::Security, ..look(&certificate, status, 0) };
        engine.observe(seen(Status::Unknown));
        assert_eq!(engine.picture(at(0)).causes().len(), 1);
        engine.observe(seen(Status::Fail));
        assert_eq!(engine.picture(at(0)).causes().len(), 2);
    }

    #[test]
    fn a_circle_of_needs_ends() {
        let options =
            EngineOptions { hysteresis: Hysteresis { worse_after: 1, better_after: 1 }, ..Default::default() };
        let mut engine = Engine::new(options);
        let (a, b) = (CheckId::shared("a", "x"), CheckId::shared("b", "x"));
        engine.needs(a.clone(), b.clone());
        engine.needs(b.clone(), a.clone());
        engine.observe(look(&a, Status::Fail, 0));
        engine.observe(look(&b, Status::Fail, 0));
        let picture = engine.picture(at(0));
        assert_eq!(picture.causes().iter().map(|c| &c.check).collect::<Vec<_>>(), [&a], "somebody is told");
    }

    proptest::proptest! {
        /// However looks come, the history is bounded and each change is one.
        #[test]
        fn history_is_bounded_and_true(looks in proptest::collection::vec(0_u8..4, 0..300)) {
            let mut engine = Engine::new(EngineOptions { history: 5, ..EngineOptions::default() });
            let check = CheckId::tenant("acme", "database");
            for (n, look_at) in (0..).zip(&looks) {
                let status = [Status::Pass, Status::Warn, Status::Unknown, Status::Fail][*look_at as usize];
                engine.observe(look(&check, status, n));
            }
            let history = engine.history(&check);
            proptest::prop_assert!(history.len() <= 5);
            proptest::prop_assert!(history.iter().all(|change| change.from != change.to));
            proptest::prop_assert!(history.windows(2).all(|pair| pair[0].to == pair[1].from));
        }
    }
}
