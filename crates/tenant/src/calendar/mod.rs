//! Business calendars: when wages are paid and books are closed, in the zone of those who do it.
//!
//! A calendar has a zone, business days (weekends, holidays of a country, exceptions) and events. Everything is a function
//! of what it is given: the instant comes from the caller.
//!
//! ```
//! use cofferdam_tenant::calendar::{Calendar, CalendarConfig};
//!
//! let config: CalendarConfig = serde_json::from_value(serde_json::json!({
//!     "time_zone": "Europe/Berlin",
//!     "holidays": { "country": "DE", "region": "BY" },
//!     "events": [{ "name": "month-end close", "kind": "month_end_close", "business_days": -3, "from": "08:00", "until": "20:00",
//!                  "effects": { "latency": 2.0, "freeze": true } }],
//! }))?;
//! let calendar = Calendar::new(&config).unwrap();
//! let at = "2026-12-30T10:00:00Z".parse()?;
//! assert_eq!(calendar.active(at)[0].event.name, "month-end close");
//! assert_eq!(calendar.effects(at).latency, 2.0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod business;
mod event;
mod holidays;
mod recurrence;

use jiff::civil::{Date, Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use business::{BusinessDays, Convention};
pub use event::{Days, Effects, Event, EventKind, Occurrence};
pub use holidays::{Country, easter};
pub use recurrence::{Recurrence, RecurrenceError};

/// A calendar as it is written.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CalendarConfig {
    /// The zone of all its times: a name of the IANA time zone database.
    pub time_zone: String,
    /// Days of the week on which nobody works.
    #[serde(default = "saturday_and_sunday")]
    pub weekend: Vec<DayOfWeek>,
    /// Holidays.
    #[serde(default)]
    pub holidays: HolidaysConfig,
    /// What happens when.
    #[serde(default)]
    pub events: Vec<EventConfig>,
}

/// Holidays as they are written.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HolidaysConfig {
    /// The public ones of a country.
    pub country: Option<Country>,
    /// And of a part of it, such as `BY`.
    pub region: Option<String>,
    /// Days on which nobody works either.
    #[schemars(with = "Vec<String>")]
    pub extra: Vec<Date>,
    /// Days on which work is done nevertheless.
    #[schemars(with = "Vec<String>")]
    pub except: Vec<Date>,
}

/// A day of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // the days speak for themselves
pub enum DayOfWeek {
    Monday,
    Tuesday,
    Wednesday,
    Thursday,
    Friday,
    Saturday,
    Sunday,
}

/// An event as it is written. Its days are exactly one of `business_days`, `business_day`, `rule` and `days`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EventConfig {
    /// What people call it.
    pub name: String,
    /// What kind it is.
    pub kind: EventKind,
    /// The first so many business days of each month; the last three: `-3`.
    pub business_days: Option<i32>,
    /// The business day with this number in each month; the last but one: `-2`.
    pub business_day: Option<i32>,
    /// A rule of RFC 5545, such as `FREQ=MONTHLY;BYMONTHDAY=25`.
    pub rule: Option<String>,
    /// The rule's first day.
    #[schemars(with = "Option<String>")]
    pub start: Option<Date>,
    /// What becomes of a day of the rule's that is no business day.
    #[serde(default)]
    pub convention: Convention,
    /// Days, one by one.
    #[schemars(with = "Option<Vec<String>>")]
    pub days: Option<Vec<Date>>,
    /// It begins so many business days before its day.
    #[serde(default)]
    pub lead: u32,
    /// The local time at which it begins.
    #[serde(default = "midnight")]
    #[schemars(with = "String")]
    pub from: Time,
    /// The local time at which it ends; at or before `from`, on the next day.
    #[serde(default = "midnight")]
    #[schemars(with = "String")]
    pub until: Time,
    /// What it changes.
    #[serde(default)]
    pub effects: Effects,
}

/// Why a calendar cannot be followed: the field, what was found, what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: found {found}, expected {expected}", field.join("."))]
pub struct CalendarError {
    /// The way to the field.
    pub field: Vec<String>,
    /// What stands there.
    pub found: String,
    /// What could.
    pub expected: String,
}

/// A calendar, understood.
#[derive(Debug, Clone)]
pub struct Calendar {
    /// The zone of its times.
    pub zone: TimeZone,
    /// Its business days.
    pub business_days: BusinessDays,
    /// Its events.
    pub events: Vec<Event>,
}

impl Calendar {
    /// Understands a calendar, or says everything that is wrong with it.
    pub fn new(config: &CalendarConfig) -> Result<Self, Vec<CalendarError>> {
        let mut errors = Vec::new();
        let mut fault = |field: &[&str], found: String, expected: &str| {
            let field = field.iter().map(|part| (*part).to_owned()).collect();
            errors.push(CalendarError { field, found, expected: expected.to_owned() });
        };
        let zone = TimeZone::get(&config.time_zone);
        if zone.is_err() {
            fault(&["time_zone"], format!("`{}`", config.time_zone), "a time zone such as `Europe/Berlin`");
        }
        let HolidaysConfig { country, region, extra, except } = &config.holidays;
        if let Some(region) = region {
            let known = country.map_or(&[][..], Country::regions);
            if !known.contains(&region.as_str()) {
                let expected = if known.is_empty() {
                    "no region: none has holidays of its own here".to_owned()
                } else {
                    format!("one of {}", known.join(", "))
                };
                fault(&["holidays", "region"], format!("`{region}`"), &expected);
            }
        }
        let weekend = config.weekend.iter().map(|day| day.weekday());
        let country = country.map(|country| (country, region.clone()));
        let business_days = BusinessDays::new(weekend, country, extra.iter().copied(), except.iter().copied());
        let mut events = Vec::new();
        for (index, event) in config.events.iter().enumerate() {
            match understand(event) {
                Ok(event) => {
                    let same = |other: &&Event| (&other.name, other.kind) == (&event.name, event.kind);
                    if events.iter().any(|other| same(&other)) {
                        let found = format!("`{}`, which another event of this kind is called too", event.name);
                        fault(&["events", &index.to_string(), "name"], found, "a name of its own");
                    }
                    events.push(event);
                }
                Err((field, found, expected)) => fault(&["events", &index.to_string(), field], found, &expected),
            }
        }
        match zone {
            Ok(zone) if errors.is_empty() => Ok(Self { zone, business_days, events }),
            _ => Err(errors),
        }
    }

    /// Every event between two instants, in the order in which they begin.
    pub fn between(&self, from: Timestamp, until: Timestamp) -> Vec<Occurrence<'_>> {
        let events = self.events.iter();
        let mut found: Vec<Occurrence<'_>> =
            events.flat_map(|event| event.between(from, until, &self.business_days, &self.zone)).collect();
        found.sort_by_key(|occurrence| (occurrence.from, occurrence.until));
        found
    }

    /// The events that are on at an instant.
    pub fn active(&self, at: Timestamp) -> Vec<Occurrence<'_>> {
        let after = at.checked_add(SignedDuration::from_nanos(1)).unwrap_or(at);
        self.between(at, after)
    }

    /// What all events at an instant change together: the widest thresholds, a freeze if any has one, the most capacity.
    pub fn effects(&self, at: Timestamp) -> Effects {
        self.active(at).iter().fold(Effects::default(), |sum, occurrence| {
            let Effects { latency, freeze, capacity } = occurrence.event.effects;
            Effects {
                latency: sum.latency.max(latency),
                freeze: sum.freeze || freeze,
                capacity: sum.capacity.max(capacity),
            }
        })
    }
}

/// Longer preparations are events of their own.
const LONGEST_LEAD: u32 = 20;

fn understand(event: &EventConfig) -> Result<Event, (&'static str, String, String)> {
    let wrong = |field, found: String, expected: &str| Err((field, found, expected.to_owned()));
    let given =
        [event.business_days.is_some(), event.business_day.is_some(), event.rule.is_some(), event.days.is_some()];
    let given = given.iter().filter(|given| **given).count();
    if given != 1 {
        let found = format!("{given} of them");
        return wrong("name", found, "exactly one of `business_days`, `business_day`, `rule` and `days`");
    }
    let number = |field, number: i32| {
        if (1..=23).contains(&number.abs()) {
            return Ok(number);
        }
        Err((field, number.to_string(), "1 to 23, or -1 to -23: no month has more business days".to_owned()))
    };
    let days = if let Some(n) = event.business_days {
        Days::BusinessDaysOfMonth(number("business_days", n)?)
    } else if let Some(n) = event.business_day {
        Days::BusinessDayOfMonth(number("business_day", n)?)
    } else if let Some(rule) = &event.rule {
        let rule: Recurrence = rule.parse().map_err(|e: RecurrenceError| ("rule", e.part, e.expected.to_owned()))?;
        let Some(start) = event.start else {
            return wrong("start", "nothing".to_owned(), "the first day of the rule, such as `2026-01-01`");
        };
        Days::Rule { rule, start, convention: event.convention }
    } else {
        Days::Listed(event.days.clone().unwrap_or_default())
    };
    if event.lead > LONGEST_LEAD {
        return wrong("lead", event.lead.to_string(), "at most 20 business days");
    }
    let Effects { latency, capacity, .. } = event.effects;
    if !(1.0..=100.0).contains(&latency) {
        return wrong("effects", format!("latency {latency}"), "a factor from 1 to 100");
    }
    if !(0.01..=100.0).contains(&capacity) {
        return wrong("effects", format!("capacity {capacity}"), "a factor from 0.01 to 100");
    }
    Ok(Event {
        name: event.name.clone(),
        kind: event.kind,
        days,
        lead: i32::try_from(event.lead).unwrap_or(0),
        from: event.from,
        until: event.until,
        effects: event.effects,
    })
}

impl DayOfWeek {
    fn weekday(self) -> Weekday {
        match self {
            Self::Monday => Weekday::Monday,
            Self::Tuesday => Weekday::Tuesday,
            Self::Wednesday => Weekday::Wednesday,
            Self::Thursday => Weekday::Thursday,
            Self::Friday => Weekday::Friday,
            Self::Saturday => Weekday::Saturday,
            Self::Sunday => Weekday::Sunday,
        }
    }
}

fn saturday_and_sunday() -> Vec<DayOfWeek> {
    vec![DayOfWeek::Saturday, DayOfWeek::Sunday]
}

fn midnight() -> Time {
    Time::midnight()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calendar(events: &str) -> Result<Calendar, Vec<CalendarError>> {
        let text =
            format!(r#"{{ "time_zone": "Europe/Berlin", "holidays": {{ "country": "DE" }}, "events": [{events}] }}"#);
        Calendar::new(&serde_json::from_str(&text).unwrap())
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn an_event_is_on_in_its_hours_on_its_days_and_not_in_the_nights_between() {
        let close = r#"{ "name": "close", "kind": "month_end_close", "business_days": -3, "from": "08:00", "until": "20:00",
            "effects": { "latency": 2.0, "freeze": true } }"#;
        let calendar = calendar(close).unwrap();
        let november = calendar.between(at("2026-11-01T00:00:00Z"), at("2026-12-01T00:00:00Z"));
        let times: Vec<String> = november.iter().map(|o| format!("{} {}", o.from, o.until)).collect();
        assert_eq!(
            times,
            [
                "2026-11-26T07:00:00Z 2026-11-26T19:00:00Z",
                "2026-11-27T07:00:00Z 2026-11-27T19:00:00Z",
                "2026-11-30T07:00:00Z 2026-11-30T19:00:00Z"
            ]
        );
        assert!(calendar.effects(at("2026-11-27T18:59:59Z")).freeze);
        assert_eq!(calendar.effects(at("2026-11-27T19:00:00Z")), Effects::default());
    }

    /// On 2026-03-29 there is no half past two in Berlin; on 2026-10-25 there are two.
    #[test]
    fn clocks_that_change_make_no_event_shorter() {
        let night = r#"{ "name": "night", "kind": "other", "days": ["2026-03-29", "2026-10-25"], "from": "02:30", "until": "02:45" }"#;
        let calendar = calendar(night).unwrap();
        let found = calendar.between(at("2026-01-01T00:00:00Z"), at("2026-12-31T00:00:00Z"));
        let times: Vec<String> = found.iter().map(|o| format!("{} {}", o.from, o.until)).collect();
        // Past the gap, at 03:30; and from the first half past two to the second quarter to three.
        assert_eq!(times, ["2026-03-29T01:30:00Z 2026-03-29T01:45:00Z", "2026-10-25T00:30:00Z 2026-10-25T01:45:00Z"]);
    }

    #[test]
    fn an_event_over_midnight_and_one_with_preparations() {
        let gap = r#"{ "name": "gap", "kind": "other", "days": ["2026-03-29"], "from": "02:30", "until": "03:15" }"#;
        let in_gap = calendar(gap).unwrap();
        let found = in_gap.between(at("2026-03-28T00:00:00Z"), at("2026-03-30T00:00:00Z"));
        assert_eq!((found[0].from, found[0].until), (at("2026-03-29T01:30:00Z"), at("2026-03-29T02:15:00Z")));
        let events = r#"{ "name": "payroll", "kind": "payroll", "rule": "FREQ=MONTHLY;BYMONTHDAY=25", "start": "2026-01-25",
            "convention": "preceding", "lead": 2, "from": "22:00", "until": "06:00" }"#;
        let calendar = calendar(events).unwrap();
        // 2026-10-25 is a Sunday: the Friday before it, prepared from the Wednesday on.
        let found = calendar.between(at("2026-10-20T00:00:00Z"), at("2026-10-28T00:00:00Z"));
        let times: Vec<String> = found.iter().map(|o| format!("{} {}", o.from, o.until)).collect();
        assert_eq!(times, ["2026-10-21T20:00:00Z 2026-10-24T04:00:00Z"]);
        // Where business is done on two days of a week, twenty of them are ten weeks.
        let config = serde_json::json!({
            "time_zone": "Europe/Berlin", "weekend": ["monday", "tuesday", "wednesday", "saturday", "sunday"],
            "events": [{ "name": "audit", "kind": "other", "days": ["2026-12-18"], "lead": 20 }],
        });
        let calendar = Calendar::new(&serde_json::from_value(config).unwrap()).unwrap();
        assert_eq!(calendar.active(at("2026-10-20T12:00:00Z")).len(), 1);
        assert_eq!(calendar.active(at("2026-10-08T12:00:00Z")).len(), 0);
    }

    #[test]
    fn everything_that_is_wrong_is_told_with_its_field() {
        let config = serde_json::json!({
            "time_zone": "Mars/Olympus", "holidays": { "country": "DE", "region": "XX" },
            "events": [
                { "name": "a", "kind": "payroll" },
                { "name": "b", "kind": "payroll", "business_days": 0 },
                { "name": "c", "kind": "payroll", "rule": "FREQ=NEVER", "start": "2026-01-01" },
                { "name": "d", "kind": "payroll", "rule": "FREQ=DAILY" },
                { "name": "e", "kind": "payroll", "days": ["2026-01-01"], "effects": { "latency": 0.5 } },
            ],
        });
        let errors = Calendar::new(&serde_json::from_value(config).unwrap()).unwrap_err();
        let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
        for (error, expected) in text.iter().zip([
            "time_zone: found `Mars/Olympus`",
            "holidays.region: found `XX`, expected one of BB",
            "events.0.name: found 0 of them, expected exactly one of",
            "events.1.business_days: found 0, expected 1 to 23",
            "events.2.rule: found FREQ=NEVER, expected YEARLY",
            "events.3.start: found nothing",
            "events.4.effects: found latency 0.5",
        ]) {
            assert!(error.contains(expected), "{expected}: {error}");
        }
        assert_eq!(text.len(), 7);
    }
}
