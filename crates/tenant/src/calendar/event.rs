//! Events of a business: what happens when, and what it means for those who watch.

use jiff::civil::{Date, Time};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::business::{BusinessDays, Convention};
use super::recurrence::Recurrence;

/// What kind of event it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// Books are closed.
    MonthEndClose,
    /// Wages are calculated and paid.
    Payroll,
    /// Invoices are written in numbers.
    InvoicePeak,
    /// A tender closes.
    Tender,
    /// A report to an authority is due.
    ReportingDeadline,
    /// Something else.
    Other,
}

impl EventKind {
    /// As it is written, `month_end_close`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MonthEndClose => "month_end_close",
            Self::Payroll => "payroll",
            Self::InvoicePeak => "invoice_peak",
            Self::Tender => "tender",
            Self::ReportingDeadline => "reporting_deadline",
            Self::Other => "other",
        }
    }
}

/// What an event changes while it lasts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Effects {
    /// Latency thresholds times this: 2 lets everything take twice as long before anybody is told.
    pub latency: f64,
    /// Whether changes are frozen: no deployments, no upgrades.
    pub freeze: bool,
    /// Capacity times this is advised, for those who scale.
    pub capacity: f64,
}

impl Default for Effects {
    fn default() -> Self {
        Self { latency: 1.0, freeze: false, capacity: 1.0 }
    }
}

/// On which days an event happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Days {
    /// The first so many business days of each month; the last ones if negative.
    BusinessDaysOfMonth(i32),
    /// The business day with this number in each month; from the end if negative.
    BusinessDayOfMonth(i32),
    /// By a rule, from a first day on.
    Rule {
        /// The rule.
        rule: Recurrence,
        /// Its first day.
        start: Date,
        /// What becomes of a day that is no business day.
        convention: Convention,
    },
    /// Days that are listed.
    Listed(Vec<Date>),
}

/// An event, understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// What people call it.
    pub name: String,
    /// What kind it is.
    pub kind: EventKind,
    /// Its days.
    pub days: Days,
    /// It begins so many business days earlier than its day: preparations.
    pub lead: i32,
    /// The local time at which it begins.
    pub from: Time,
    /// The local time at which it ends; at or before `from`: on the next day.
    pub until: Time,
    /// What it changes.
    pub effects: Effects,
}

/// An event at one time.
#[derive(Debug, Clone, PartialEq)]
pub struct Occurrence<'a> {
    /// Which.
    pub event: &'a Event,
    /// When it begins.
    pub from: Timestamp,
    /// When it is over: the first instant after it.
    pub until: Timestamp,
}

/// Days that make one occurrence are looked for this far around.
const AROUND: i32 = 40;

impl Event {
    /// Every time that it happens between two instants, in order. Business days that follow each other are times of their
    /// own, so that nights between them are not part of it.
    ///
    /// A local time that a zone skips when its clocks go forward is moved past the gap by the length of it; one that comes twice
    /// when they go back is taken the first time, for the beginning, and the second time, for the end: an event is never shorter
    /// than it is said to be.
    pub fn between(
        &self,
        from: Timestamp,
        until: Timestamp,
        days: &BusinessDays,
        zone: &TimeZone,
    ) -> Vec<Occurrence<'_>> {
        let first = from.to_zoned(zone.clone()).date().saturating_sub(AROUND.days());
        // What begins earlier than its day is looked for as far ahead: of seven days one may be a business day.
        let ahead = AROUND.saturating_add(self.lead.max(0).saturating_mul(8));
        let last = until.to_zoned(zone.clone()).date().saturating_add(ahead.days());
        let mut found: Vec<Occurrence<'_>> = self
            .dates(first, last, days)
            .into_iter()
            .filter_map(|day| self.on(day, days, zone))
            .filter(|occurrence| occurrence.from < until && occurrence.until > from)
            .collect();
        found.sort_by_key(|occurrence| occurrence.from);
        found.dedup();
        found
    }

    /// The days of the event between two.
    pub fn dates(&self, first: Date, last: Date, days: &BusinessDays) -> Vec<Date> {
        let months = || {
            std::iter::successors(Some(first.first_of_month()), |month| month.checked_add(1.month()).ok())
                .take_while(|month| *month <= last)
        };
        let mut found: Vec<Date> = match &self.days {
            Days::BusinessDaysOfMonth(number) => months().flat_map(|month| days.of_month(month, *number)).collect(),
            Days::BusinessDayOfMonth(number) => months()
                .filter_map(|month| {
                    let so_many = days.of_month(month, *number);
                    let enough = so_many.len() == number.unsigned_abs() as usize;
                    let one = if *number > 0 { so_many.last() } else { so_many.first() };
                    one.copied().filter(|_| enough)
                })
                .collect(),
            Days::Rule { rule, start, convention } => rule
                .days(*start)
                .take_while(|day| day.saturating_sub(AROUND.days()) <= last)
                .filter_map(|day| days.adjust(day, *convention))
                .collect(),
            Days::Listed(listed) => listed.clone(),
        };
        found.retain(|day| (first..=last).contains(day));
        found.sort_unstable();
        found.dedup();
        found
    }

    fn on(&self, day: Date, days: &BusinessDays, zone: &TimeZone) -> Option<Occurrence<'_>> {
        let begins = if self.lead > 0 { days.add(day, -self.lead)? } else { day };
        let ends = if self.until <= self.from { day.tomorrow().ok()? } else { day };
        let from = zone.to_ambiguous_timestamp(begins.to_datetime(self.from)).compatible().ok()?;
        let until = zone.to_ambiguous_timestamp(ends.to_datetime(self.until)).later().ok()?;
        // Of an event whose beginning is moved past the gap, the end may not be: it lasts as long as it was said to.
        let until = if until <= from {
            let lasts = ends.to_datetime(self.until).duration_since(begins.to_datetime(self.from));
            from.checked_add(lasts).ok()?
        } else {
            until
        };
        (from < until).then_some(Occurrence { event: self, from, until })
    }
}
