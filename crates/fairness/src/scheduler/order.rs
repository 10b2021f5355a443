//! Who goes next: the ready sets, each in the order of its clock, and each by virtual time too.

use std::collections::BTreeSet;

use super::account::{Lane, Place, Queue, Rank};
use super::{Scheduler, Ticket};
use crate::share::Policy;

impl Scheduler {
    /// The account that gets the next slot, and as what it was waiting.
    pub(super) fn peek(&self) -> Option<(usize, Place)> {
        let heads = Place::ALL.into_iter().filter_map(|place| self.first_ready(place).map(|(r, a)| (r, a, place)));
        // Short work waits on one clock, whether there is little of it or much.
        let mut next: [Option<(Rank, usize, Place)>; Place::GROUPS] = [None; Place::GROUPS];
        for head in heads {
            let first = &mut next[head.2.group()];
            if first.is_none_or(|first| head.0 < first.0) {
                *first = Some(head);
            }
        }
        // What they have been charged for slots is what those of different clocks have in common.
        let next = next.into_iter().flatten().min_by_key(|(rank, _, _)| rank.by_slots())?;
        let others = Place::ALL.into_iter().filter(|place| place.group() != next.2.group());
        // Nor does anybody wait behind the first on its clock for a slot that it has more claim to than whoever would get it.
        let before_it =
            others.filter_map(|place| self.first_by_slots(place)).filter(|(rank, _, _)| *rank < next.0.by_slots());
        let (_, account, place) = before_it.min_by_key(|(rank, _, _)| *rank).unwrap_or(next);
        Some((account, place))
    }

    /// Who has been charged least for slots of those who wait in a place and could go.
    fn first_by_slots(&self, place: Place) -> Option<(Rank, usize, Place)> {
        let (rank, account) = self.below_single_limit(&self.by_slots[place.index()])?;
        self.may_go(account, rank, place).then_some((rank, account, place))
    }

    /// The first that has not all the slots which a single tenant may have. At most a tenant or two can have: this looks at few.
    fn below_single_limit(&self, set: &BTreeSet<(Rank, usize)>) -> Option<(Rank, usize)> {
        let most = self.single_tenant_limit();
        let is_below =
            |account: usize| self.config.policy == Policy::Fifo || self.accounts[account].usage.running < most;
        set.iter().find(|(_, account)| is_below(*account)).copied()
    }

    pub(super) fn first_ready(&self, place: Place) -> Option<(Rank, usize)> {
        let (rank, account) = self.below_single_limit(&self.ready[place.index()])?;
        self.may_go(account, rank, place).then_some((rank, account))
    }

    fn may_go(&self, account: usize, rank: Rank, place: Place) -> bool {
        let has_core = || !place.wants_cores || !rank.above_reserved || self.may_compute(account, place);
        let class = || self.candidates(account)[place.queue.lane() as usize].map(|next| next.class);
        let count_lasting = self.waits_for_what_lasts(account, place.queue, class);
        self.has_free_slot(place.queue, !rank.above_reserved, count_lasting) && has_core()
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
        let held = self.held_by_their_own(account);
        self.accounts[account].candidates(self.expensive_from, self.config.policy == Policy::Fair, held)
    }

    /// Puts the account where it belongs in the ready sets after anything about it has changed.
    pub(super) fn rank(&mut self, account: usize) {
        self.throttle(account);
        let first = if self.accounts[account].usage.waiting == 0 { [None; 2] } else { self.candidates(account) };
        let places = Lane::ALL.map(|lane| self.place_in(account, lane, first[lane as usize]?));
        if self.config.policy == Policy::Fair {
            self.lift(account, places);
        }
        let ranks = Lane::ALL.map(|lane| {
            let (place, first) = (places[lane as usize]?, first[lane as usize]?);
            Some((place, self.rank_at(account, place, first)))
        });
        let a = &mut self.accounts[account];
        for (lane, place) in ranks.into_iter().enumerate() {
            if a.ready_as[lane] == place {
                continue;
            }
            if let Some((former, old)) = a.ready_as[lane].take() {
                self.ready[former.index()].remove(&(old, account));
                self.by_slots[former.index()].remove(&(old.by_slots(), account));
            }
            if let Some((next, new)) = place {
                self.ready[next.index()].insert((new, account));
                self.by_slots[next.index()].insert((new.by_slots(), account));
                a.ready_as[lane] = place;
            }
        }
        let held = (a.usage.waiting > 0 && a.ready_as == [None, None]).then_some(Rank {
            above_reserved: true,
            clock: a.clocks.slots,
            virtual_time: a.clocks.slots,
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

    /// In which place an account waits with its first work in a lane, if nothing of its own holds that back.
    fn place_in(&self, account: usize, lane: Lane, first: Ticket) -> Option<Place> {
        let a = &self.accounts[account];
        let is_held =
            a.usage.running >= a.limit() || a.throttled.is_some() || (lane == Lane::Short && a.short >= a.trust);
        if is_held && self.config.policy == Policy::Fair {
            return None;
        }
        let queue = self.queue(account, lane);
        Some(Place { queue, wants_cores: queue != Queue::First && self.wants_cores(account, first.class) })
    }

    fn rank_at(&self, account: usize, place: Place, first: Ticket) -> Rank {
        let (a, lane) = (&self.accounts[account], place.queue.lane() as usize);
        match self.config.policy {
            Policy::Fifo => Rank { above_reserved: false, clock: 0.0, virtual_time: 0.0, arrival: first.serial },
            Policy::Fair => Rank {
                above_reserved: a.usage.running >= a.share.reserved,
                clock: if place.wants_cores { a.clocks.cores[lane] } else { a.clocks.lanes[lane] },
                virtual_time: a.clocks.slots,
                arrival: first.serial,
            },
        }
    }

    /// Puts the clocks of an account where the others are that it comes to with `places`: whoever waited for something else than
    /// they, or for nothing, has no claim on what they were given meanwhile.
    fn lift(&mut self, account: usize, places: [Option<Place>; 2]) {
        let a = &self.accounts[account];
        let mut stood = a.ready_as.iter().flatten().map(|(place, _)| place.wants_cores);
        let waited_for_cores = stood.next().is_some_and(|first| first && stood.all(|wants_cores| wants_cores));
        let comes_to_slots = if a.held_as.is_some() {
            places != [None; 2]
        } else {
            // Where cores do not bound it slots do.
            waited_for_cores
                && places.iter().flatten().any(|place| !place.wants_cores)
                && self.busy.is_in_company(account, self.now)
        };
        let a = &mut self.accounts[account];
        if comes_to_slots {
            a.clocks.come_to_slots(&self.clocks);
        }
        for place in places.into_iter().flatten() {
            let lane = place.queue.lane();
            if place.wants_cores {
                a.come_to_cores(place.queue, &self.clocks);
            } else if a.ready_as[lane as usize].is_none() {
                a.clocks.come_to_lane(lane, &self.clocks);
            }
        }
    }

    /// Time goes on with whoever is active, also when nothing starts: who used an idle gate for an hour owes nothing
    /// to those who come afterwards.
    pub(super) fn catch_up(&mut self) {
        let runs = || self.running.iter().filter(|(_, run)| !run.core_bound);
        let least = runs().map(|(_, run)| self.accounts[run.account].clocks.slots);
        let least = least.chain(self.ready_heads()).min_by(f64::total_cmp);
        let mut clocks = self.clocks;
        clocks.slots = clocks.slots.max(least.unwrap_or(f64::NEG_INFINITY));
        for lane in Lane::ALL {
            let least = runs().filter(|(_, run)| run.queue.lane() == lane);
            let least = least.map(|(_, run)| self.accounts[run.account].clocks.lanes[lane as usize]);
            let least = least.chain(self.lane_heads(lane)).min_by(f64::total_cmp);
            let time = &mut clocks.lanes[lane as usize];
            *time = time.max(least.unwrap_or(f64::NEG_INFINITY));
        }
        for queue in [Queue::More, Queue::Expensive] {
            let computing = self.running.iter().filter(|(_, run)| run.core_charged.all > 0.0 && run.queue == queue);
            let lane = queue.lane() as usize;
            let computing = computing.map(|(_, run)| self.accounts[run.account].clocks.cores[lane]);
            let least = computing.chain(self.core_heads(queue)).min_by(f64::total_cmp);
            clocks.cores[lane] = clocks.cores[lane].max(least.unwrap_or(f64::NEG_INFINITY));
        }
        self.clocks = clocks;
    }

    /// The clocks of those who are first among those who wait for cores with work of a queue, with and without a reservation.
    pub(super) fn core_heads(&self, queue: Queue) -> impl Iterator<Item = f64> {
        heads(&self.ready[Place::of_cores(queue).index()]).map(|rank| rank.clock)
    }

    /// The virtual times of those who have been charged least of those who wait for slots, with and without a reservation: not of
    /// those who wait for a core, nor for what others hold in the lane of expensive work.
    pub(super) fn ready_heads(&self) -> impl Iterator<Item = f64> {
        let expensive = self.held_by[Queue::Expensive as usize] - self.lasting;
        let is_full = self.config.policy == Policy::Fair && expensive >= self.open.expensive;
        let waits_for_its_lane =
            move |place: Place, rank: &Rank| place.queue == Queue::Expensive && rank.above_reserved && is_full;
        let may_compute = |place: &Place| {
            let first = self.by_slots[place.index()].first();
            first.is_some_and(|(_, account)| self.may_compute(*account, *place))
        };
        let places = Place::ALL.into_iter().filter(move |place| !place.wants_cores || may_compute(place));
        let first = places.flat_map(|place| heads(&self.by_slots[place.index()]).map(move |rank| (place, rank)));
        first.filter(move |(place, rank)| !waits_for_its_lane(*place, rank)).map(|(_, rank)| rank.virtual_time)
    }

    /// What the clock of a lane shows of those who are first on it, with and without a reservation.
    pub(super) fn lane_heads(&self, lane: Lane) -> impl Iterator<Item = f64> {
        let places = Place::ALL.into_iter().filter(move |place| !place.wants_cores && place.queue.lane() == lane);
        places.flat_map(|place| heads(&self.ready[place.index()])).map(|rank| rank.clock)
    }
}

/// Who is first in a set, with and without a reservation.
fn heads(set: &BTreeSet<(Rank, usize)>) -> impl Iterator<Item = Rank> {
    let from = Rank { above_reserved: true, clock: f64::NEG_INFINITY, virtual_time: f64::NEG_INFINITY, arrival: 0 };
    let first = set.first();
    // Behind those with a reservation comes who has none.
    let behind = first.filter(|first| !first.0.above_reserved).and_then(|_| set.range((from, 0)..).next());
    [first, behind].into_iter().flatten().map(|(rank, _)| *rank)
}
