//! Who goes next: the ready sets, kept in the order of virtual time.

use super::account::{Lane, Place, Queue, Rank};
use super::{Scheduler, Ticket};
use crate::share::Policy;

impl Scheduler {
    /// The account that gets the next slot, and as what it was waiting.
    pub(super) fn peek(&self) -> Option<(usize, Place)> {
        let heads = Place::ALL.into_iter().filter_map(|place| self.first_ready(place).map(|(r, a)| (r, a, place)));
        // What they have been charged for slots is what those of different places have in common.
        let among_all = |rank: &Rank| Rank { clock: rank.virtual_time, ..*rank };
        heads.min_by_key(|(rank, _, _)| among_all(rank)).map(|(_, account, place)| (account, place))
    }

    pub(super) fn first_ready(&self, place: Place) -> Option<(Rank, usize)> {
        let most = self.single_tenant_limit();
        // At most a tenant or two can be at the limit of a single one: this looks at few.
        let (rank, account) = self.ready[place.index()]
            .iter()
            .find(|(_, a)| self.config.policy == Policy::Fifo || self.accounts[*a].usage.running < most)
            .copied()?;
        let has_core = || !place.wants_cores || !rank.above_reserved || self.may_compute(account, place);
        (self.has_free_slot(place.queue, !rank.above_reserved) && has_core()).then_some((rank, account))
    }

    /// Whether work waits that more slots could serve: not what waits for a core.
    pub(super) fn wants_slots(&self) -> bool {
        let waits = |place: &Place| !self.ready[place.index()].is_empty();
        Place::ALL.iter().any(|place| waits(place) && (!place.wants_cores || self.may_compute_next(*place)))
    }

    fn may_compute_next(&self, place: Place) -> bool {
        self.ready[place.index()].first().is_some_and(|(_, account)| self.may_compute(*account, place))
    }

    fn may_compute(&self, account: usize, place: Place) -> bool {
        let next = self.candidates(account)[place.queue.lane() as usize];
        next.is_none_or(|ticket| self.has_free_core(account, ticket.class, place.queue))
    }

    /// The account's work that goes next in each lane.
    pub(super) fn candidates(&self, account: usize) -> [Option<Ticket>; 2] {
        self.accounts[account].candidates(self.expensive_from, self.config.policy == Policy::Fair)
    }

    /// Puts the account where it belongs in the ready sets after anything about it has changed.
    pub(super) fn rank(&mut self, account: usize) {
        self.throttle(account);
        let a = &self.accounts[account];
        let was_held = a.held_as.is_some();
        let first = if a.usage.waiting == 0 { [None; 2] } else { self.candidates(account) };
        let mut ranks = Lane::ALL.map(|lane| self.rank_in(account, lane, first[lane as usize]?));
        if was_held && ranks != [None, None] && self.accounts[account].virtual_time < self.virtual_time {
            // It waited for a bound of its own, which earns no claim on what others were given meanwhile.
            self.accounts[account].virtual_time = self.virtual_time;
            ranks = Lane::ALL.map(|lane| self.rank_in(account, lane, first[lane as usize]?));
        }
        let ranks = Lane::ALL.map(|lane| {
            let (mut rank, next) = (ranks[lane as usize]?, first[lane as usize]?);
            let queue = self.queue(account, lane);
            let wants_cores = queue != Queue::First && self.wants_cores(account, next.class);
            if wants_cores && self.config.policy == Policy::Fair {
                let floor = self.core_time;
                let a = &mut self.accounts[account];
                // Whoever wanted none has no claim on what it did not use.
                if a.ready_as.iter().flatten().all(|(place, _)| !place.wants_cores) {
                    a.core_time = a.core_time.max(floor);
                }
                rank.clock = a.core_time;
            }
            Some((Place { queue, wants_cores }, rank))
        });
        let a = &mut self.accounts[account];
        for (lane, place) in ranks.into_iter().enumerate() {
            if a.ready_as[lane] == place {
                continue;
            }
            if let Some((former, old)) = a.ready_as[lane].take() {
                self.ready[former.index()].remove(&(old, account));
            }
            if let Some((next, new)) = place {
                self.ready[next.index()].insert((new, account));
                a.ready_as[lane] = place;
            }
        }
        let held = (a.usage.waiting > 0 && a.ready_as == [None, None]).then_some(Rank {
            above_reserved: true,
            clock: a.virtual_time,
            virtual_time: a.virtual_time,
            arrival: 0,
        });
        if a.held_as != held {
            if let Some(old) = a.held_as.take() {
                self.held.remove(&(old, account));
            }
            if let Some(new) = held {
                self.held.insert((new, account));
                a.held_as = Some(new);
            }
        }
    }

    /// Notes until when rate and budgets hold an account back that has something waiting.
    pub(super) fn throttle(&mut self, account: usize) {
        let a = &mut self.accounts[account];
        let until =
            (a.usage.waiting > 0 && self.config.policy == Policy::Fair).then(|| a.held_back(self.now)).flatten();
        let until = until.map(|(at, _)| at);
        if a.throttled != until {
            if let Some(old) = a.throttled.take() {
                self.throttled.remove(&(old, account));
            }
            if let Some(new) = until {
                self.throttled.insert((new, account));
                a.throttled = Some(new);
            }
        }
    }

    /// Where an account stands with its first work in a lane.
    pub(super) fn rank_in(&self, account: usize, lane: Lane, first: Ticket) -> Option<Rank> {
        let a = &self.accounts[account];
        match self.config.policy {
            Policy::Fifo => Some(Rank { above_reserved: false, clock: 0.0, virtual_time: 0.0, arrival: first.serial }),
            Policy::Fair if a.usage.running >= a.limit() || a.throttled.is_some() => None,
            Policy::Fair if lane == Lane::Short && a.short >= a.trust => None,
            Policy::Fair => Some(Rank {
                above_reserved: a.usage.running >= a.share.reserved,
                clock: a.virtual_time,
                virtual_time: a.virtual_time,
                arrival: first.serial,
            }),
        }
    }

    /// Time goes on with whoever is active, also when nothing starts: who used an idle gate for an hour owes nothing
    /// to those who come afterwards.
    pub(super) fn catch_up(&mut self) {
        let runs = self.running.iter().filter(|(_, run)| !run.core_bound);
        let runs = runs.map(|(_, run)| self.accounts[run.account].virtual_time);
        let least = runs.chain(self.ready_heads()).min_by(f64::total_cmp);
        self.virtual_time = self.virtual_time.max(least.unwrap_or(f64::NEG_INFINITY));
        let computing = self.running.iter().filter(|(_, run)| run.core_charged > 0.0);
        let computing = computing.map(|(_, run)| self.accounts[run.account].core_time);
        let least = computing.chain(self.core_heads()).min_by(f64::total_cmp);
        self.core_time = self.core_time.max(least.unwrap_or(f64::NEG_INFINITY));
    }

    /// The clocks of those who are first among those who wait for cores, with and without a reservation.
    pub(super) fn core_heads(&self) -> impl Iterator<Item = f64> {
        Place::ALL
            .into_iter()
            .filter(|place| place.wants_cores)
            .flat_map(|place| self.heads(place))
            .map(|rank| rank.clock)
    }

    /// The virtual times of those who are first in the ready sets, with and without a reservation; but for those who wait
    /// for a core.
    pub(super) fn ready_heads(&self) -> impl Iterator<Item = f64> {
        let places = Place::ALL.into_iter().filter(|place| !place.wants_cores || self.may_compute_next(*place));
        places.flat_map(|place| self.heads(place)).map(|rank| rank.virtual_time)
    }

    fn heads(&self, place: Place) -> impl Iterator<Item = Rank> {
        let from = Rank { above_reserved: true, clock: f64::NEG_INFINITY, virtual_time: f64::NEG_INFINITY, arrival: 0 };
        let set = &self.ready[place.index()];
        let first = set.first();
        // Behind those with a reservation comes who has none.
        let behind = first.filter(|first| !first.0.above_reserved).and_then(|_| set.range((from, 0)..).next());
        [first, behind].into_iter().flatten().map(|(rank, _)| *rank)
    }
}
