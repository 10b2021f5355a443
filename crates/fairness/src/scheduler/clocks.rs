//! The clocks by which tenants are ordered, and what running work was charged to them.

use super::account::Lane;

/// Seconds of slots or of work per weight by which what a tenant does in one lane puts it behind in the other at most. They are the same
/// slots and cores; but where it was given them because nobody else waited in that lane, it must not repay that in the other for
/// hours.
const REMEMBERED: f64 = 10.0;

/// Of a tenant: what it has been charged, per weight. Of the gate: where those stand who were charged least of those who
/// want more.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Clocks {
    /// Slot-seconds: what is compared between those of different places.
    pub(super) slots: f64,
    /// The same among those with work in a lane: one may wait for long for what others hold while the other goes on.
    pub(super) lanes: [f64; Lane::ALL.len()],
    /// Seconds of work, among those who wait for cores, by lane.
    pub(super) cores: [f64; Lane::ALL.len()],
}

impl Clocks {
    /// Puts each no earlier than another.
    pub(super) fn not_before(&mut self, other: &Self) {
        self.come_to_slots(other);
        for lane in Lane::ALL {
            self.come_to_cores(lane, other);
        }
    }

    /// Who comes to slots for which it did not wait has no claim on those that others were given meanwhile, whose clocks show `floors`.
    pub(super) fn come_to_slots(&mut self, floors: &Self) {
        self.slots = self.slots.max(floors.slots);
        for lane in Lane::ALL {
            self.come_to_lane(lane, floors);
        }
    }

    pub(super) fn come_to_lane(&mut self, lane: Lane, floors: &Self) {
        self.lanes[lane as usize] = self.lanes[lane as usize].max(floors.lanes[lane as usize]);
    }

    pub(super) fn come_to_cores(&mut self, lane: Lane, floors: &Self) {
        self.cores[lane as usize] = self.cores[lane as usize].max(floors.cores[lane as usize]);
    }
}

/// What was charged for running work.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Charged {
    /// Altogether.
    pub(super) all: f64,
    /// In each: what it did there, and of what it did in the other as much as is remembered.
    in_lane: [f64; Lane::ALL.len()],
}

impl Charged {
    /// Charges `seconds` in all to the clock of the lane that the work is in; and to that of the other one, which shows `floors[other]` at the gate, as
    /// far as that is remembered there. What was charged too much is given back where it was charged.
    pub(super) fn come_to(
        &mut self,
        seconds: f64,
        lane: Lane,
        clocks: &mut [f64; Lane::ALL.len()],
        floors: [f64; Lane::ALL.len()],
        weight: f64,
    ) {
        let more = seconds - self.all;
        for each in Lane::ALL {
            let (clock, charged) = (&mut clocks[each as usize], &mut self.in_lane[each as usize]);
            let charge = if more < 0.0 {
                (seconds - *charged).min(0.0)
            } else if each == lane {
                more
            } else {
                more.min(((floors[each as usize] + REMEMBERED - *clock) * weight).max(0.0))
            };
            *clock += charge / weight;
            *charged += charge;
        }
        self.all = seconds;
    }

    /// What was charged until now stays, whatever it turns out to be: no more than `seconds` are taken for charged.
    pub(super) fn forget(&mut self, seconds: f64) {
        *self = Self { all: seconds, in_lane: [0.0; Lane::ALL.len()] };
    }
}
