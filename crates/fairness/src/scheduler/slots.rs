//! How many slots are open, to whom, and whether one is free.

use std::time::Duration;

use cofferdam_tenant::Class;

use super::account::{Lane, Queue};
use super::{Open, Scheduler};
use crate::adaptive::{Evidence, Observed, Seen, Verdict};
use crate::share::Policy;

/// For how long measurements are gathered when the number of slots does not change.
const WINDOW: Duration = Duration::from_secs(10);
/// The most that one tenant's inflation counts, as a logarithm.
const LOUDEST: f64 = 1.1;

impl Scheduler {
    /// One step of the controller of the number of slots.
    pub(super) fn adapt(&mut self) {
        let evidence = self.evidence();
        let observed = Observed {
            limited: self.wants_slots(),
            evidence,
            excess: self.in_slots() - self.lasting > self.open.slots,
        };
        if let Some(evidence) = evidence {
            self.inflation = evidence.inflation.max(0.0);
        } else if self.now.since(self.window_since) >= WINDOW {
            self.inflation = 0.0;
        }
        if self.concurrency.step(self.now, observed) == Verdict::Rebase {
            for account in &self.touched {
                let classes = self.accounts[*account].by_class.iter_mut();
                classes.for_each(|class| class.baseline.rebase());
            }
        }
        if self.concurrency.since() == self.now || self.now.since(self.window_since) >= WINDOW {
            self.touched.clear();
            self.window = self.window.wrapping_add(1);
            self.window_since = self.now;
        }
        self.open_slots();
    }

    /// The inflation that the active tenants see, each with one voice that is not louder than threefold, and its
    /// standard error. Not the median: times are skewed, and the median of few is not their mean.
    pub(super) fn evidence(&self) -> Option<Evidence> {
        let count = self.touched.len() as f64;
        let seen = || self.touched.iter().map(|a| &self.accounts[*a].seen);
        let sum: f64 = seen().map(|s| s.mean().clamp(-LOUDEST, LOUDEST)).sum();
        let error = seen().map(Seen::variance_of_mean).sum::<f64>().sqrt() / count;
        let bias = seen().map(Seen::variance_of_baseline).sum::<f64>().sqrt() / count;
        (count > 0.0).then(|| Evidence { inflation: sum / count, error, bias })
    }

    /// Sets the slots in use from the controller's level.
    pub(super) fn open_slots(&mut self) {
        let between = |least: u32, most: u32| {
            let least = least.min(most);
            least + (f64::from(most - least) * self.concurrency.fraction()).round() as u32
        };
        let (least, most) = (self.config.least_slots, self.config.slots);
        let expensive = self.config.expensive_slots.clamp(1, most);
        // A storm of short work may have all but a few; one tenant alone, all.
        let more = if self.registered > 1 { most.saturating_sub(most.div_ceil(16)).max(1) } else { most };
        // With few slots most of them stay with modest work, whatever part it is with many.
        let least_of = |most: u32| if least >= self.config.slots { most } else { (least / 4).max(1) };
        // What is reserved is there, and one for those without a reservation.
        let reserved = u32::try_from(self.reserved.saturating_add(1)).unwrap_or(u32::MAX);
        // Where what computes is bounded by cores, few slots would only keep modest work waiting.
        let modest = self.known_cores().map_or(0, |cores| cores.saturating_add(self.headroom.slots()));
        let slots = between(least, most).max(reserved.min(most)).max(modest.min(most));
        // What modest work has needed lately stays free for it, up to a third of the slots.
        let kept = if self.registered > 1 { self.headroom.slots().min(slots / 3) } else { 0 };
        let below = |n: u32| n.min(slots - kept).max(1);
        self.open = Open {
            slots,
            kept,
            more: below(between(least_of(more), more)),
            expensive: below(between(least_of(expensive), expensive)),
        };
    }

    /// Whether so little runs that how long work takes now is how long it takes.
    pub(super) fn is_calm(&self) -> bool {
        self.running.len() as u32 <= (self.config.least_slots / 2).max(1)
    }

    pub(super) fn lane(&self, account: usize, class: Class) -> Lane {
        let expected = self.accounts[account].by_class[class as usize].estimate;
        if expected >= self.expensive_from { Lane::Expensive } else { Lane::Short }
    }

    /// Work in slots, nested work not counted.
    pub(super) fn in_slots(&self) -> u32 {
        self.held_by.iter().sum()
    }

    /// The most slots that one tenant may hold while there are others: never all of them.
    pub(super) fn single_tenant_limit(&self) -> u32 {
        if self.registered > 1 { (self.open.slots - 1).max(1) } else { u32::MAX }
    }

    /// Under which condition a tenant's work in a lane gets a slot.
    pub(super) fn queue(&self, account: usize, lane: Lane) -> Queue {
        let a = &self.accounts[account];
        match lane {
            Lane::Short if a.is_modest() || a.usage.running < a.share.reserved => Queue::First,
            Lane::Short => Queue::More,
            Lane::Expensive => Queue::Expensive,
        }
    }

    pub(super) fn may_start(&self, account: usize, class: Class) -> bool {
        let a = &self.accounts[account];
        let lane = self.lane(account, class);
        match self.config.policy {
            Policy::Fifo => self.in_slots() < self.config.slots,
            Policy::Fair => {
                a.usage.running < a.limit().min(self.single_tenant_limit())
                    && a.class_has_room(class)
                    && a.throttled.is_none()
                    && a.held_back(self.now).is_none()
                    && (lane == Lane::Expensive || a.short < a.trust)
                    && self.has_room(account, class, lane)
            }
        }
    }

    fn has_room(&self, account: usize, class: Class, lane: Lane) -> bool {
        let queue = self.queue(account, lane);
        let a = &self.accounts[account];
        let below_reserved = a.usage.running < a.share.reserved;
        self.has_free_slot(queue, below_reserved, self.waits_for_what_lasts(account, queue, || Some(class)))
            && (queue == Queue::First || below_reserved || self.has_free_core(account, class, queue))
    }

    /// Whether a storm's work waits for slots, and so for those too in which other storms last. Where cores bound it it waits for these.
    pub(super) fn waits_for_what_lasts(
        &self,
        account: usize,
        queue: Queue,
        class: impl FnOnce() -> Option<Class>,
    ) -> bool {
        queue == Queue::More && self.lasting > 0 && class().is_some_and(|class| !self.is_core_bound(account, class))
    }

    /// Whether a slot is free for a queue: for a tenant below its reservation any, for others only what is not kept
    /// for those. Whether to `count_lasting` says [`waits_for_what_lasts`](Self::waits_for_what_lasts).
    pub(super) fn has_free_slot(&self, queue: Queue, below_reserved: bool, count_lasting: bool) -> bool {
        let [first, more, expensive] = self.held_by;
        let running = first + more + expensive;
        if self.config.policy == Policy::Fifo {
            return running < self.config.slots;
        }
        let open = self.open;
        let kept = if below_reserved {
            0
        } else {
            u32::try_from(self.unmet_reserved).unwrap_or(u32::MAX / 4).min(u32::MAX / 4)
        };
        // What lasts because it waits for cores takes no slot from what is expensive.
        let expensive = expensive - self.lasting;
        let storms = more + if count_lasting { self.lasting } else { 0 };
        // Expensive work beyond its part was mistaken for short, or was admitted when there were more slots: short
        // work need not wait for it where the server can bear more.
        let bearable = expensive.min(open.expensive);
        let most = self.config.slots.saturating_add(self.config.overdraft);
        let is_bearable = running + self.nested + kept < most;
        let is_open = first + more + bearable + kept < open.slots && is_bearable;
        // The last of all are for modest work, whatever lasts.
        let leaves_some = self.lasting == 0 || running + self.nested + kept + open.kept < most;
        // What is kept from storms and from expensive work is kept, to one half, from both together.
        let spare = open.slots - open.more.max(open.expensive);
        let is_shared = more + bearable < open.slots - spare / 2;
        match queue {
            Queue::First => is_open,
            Queue::More => is_open && is_shared && leaves_some && storms < open.more,
            Queue::Expensive if below_reserved => is_open,
            Queue::Expensive => {
                first + more + expensive + kept < open.slots && leaves_some && is_shared && expensive < open.expensive
            }
        }
    }
}
