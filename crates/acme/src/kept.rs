//! What is known of hosts and of the authority, and what follows from it. Pure: time is passed in.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::time::{Duration, SystemTime};

use crate::schedule::{self, Failures};
use crate::store::Challenge;

/// After so many hosts of one domain that were refused in a row for being asked too often, the others of it wait.
const LIMITED_HOSTS: u32 = 3;

/// The longest time that an authority is left alone because it cannot be reached or gives no account.
pub(crate) const LONGEST_SILENCE: Duration = Duration::from_secs(3600);

/// What is known while a gateway runs: of hosts, of what is under way, and of the authority.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// How long a certificate is valid, and when its file was written.
    pub(crate) valid: HashMap<String, (Range<SystemTime>, SystemTime)>,
    pub(crate) failures: BTreeMap<String, Failures>,
    /// What is being ordered, and since when.
    pub(crate) running: BTreeMap<String, SystemTime>,
    pub(crate) challenges: HashMap<String, Challenge>,
    /// When the directory of certificates was changed last, as far as it was read.
    pub(crate) read: Option<SystemTime>,
    /// What has failed could not be written.
    pub(crate) unwritten: bool,
    /// Why the authority cannot be asked at all.
    pub(crate) authority: Option<Failures>,
    /// The domains that it was asked for too often, since the last answer that said something else.
    pub(crate) limited: BTreeSet<String>,
    /// How often in a row it was asked too often for hosts of a domain, and until when the others of it wait.
    pub(crate) domains: HashMap<String, (u32, SystemTime)>,
    pub(crate) left_alone: Option<SystemTime>,
}

impl Kept {
    pub(crate) fn due(&self, host: &str, now: SystemTime) -> SystemTime {
        let valid = self.valid.get(host).map(|(valid, _)| valid);
        let due = schedule::due(host, valid, self.failures.get(host), now);
        // An authority counts what is new in a domain, and not what is renewed.
        match self.domains.get(domain(host)).filter(|(refused, _)| valid.is_none() && *refused >= LIMITED_HOSTS) {
            Some((_, until)) => due.max(*until),
            None => due,
        }
    }

    /// Until when the authority is asked for nothing.
    pub(crate) fn silent_until(&self) -> Option<SystemTime> {
        let unreachable = self
            .authority
            .as_ref()
            .map(|failures| failures.last + schedule::pause(failures.count).min(LONGEST_SILENCE));
        unreachable.max(self.left_alone)
    }

    /// The hosts that are asked for next: those with the fewest failures first, of those the one that waits longest.
    pub(crate) fn waiting(&self, hosts: &BTreeSet<String>, now: SystemTime) -> Vec<(SystemTime, String)> {
        let hosts = hosts.iter().filter(|host| !self.running.contains_key(*host));
        let mut waiting: Vec<_> = hosts.map(|host| (self.due(host, now), host.clone())).collect();
        let failures = |host: &String| self.failures.get(host).map_or(0, |failures| failures.count);
        waiting.sort_by_cached_key(|(at, host)| (*at > now, failures(host), *at, host.clone()));
        waiting
    }

    /// What a run that ends now must find: what is being ordered counts as failed until it has come.
    pub(crate) fn to_keep(&self, now: SystemTime) -> BTreeMap<String, Failures> {
        let mut all = self.failures.clone();
        for (host, since) in &self.running {
            let count = all.get(host).map_or(0, |failures| failures.count).saturating_add(1);
            let reason = "an order was begun and has not ended".to_owned();
            all.insert(host.clone(), Failures { count, last: *since, limited: false, reason });
        }
        all.retain(|_, failures| failures.is_worth_keeping(now));
        all
    }
}

/// What a host is likely to be limited together with.
pub(crate) fn domain(host: &str) -> &str {
    host.rmatch_indices('.').nth(1).map_or(host, |(at, _)| &host[at + 1..])
}
