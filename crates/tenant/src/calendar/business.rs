//! Business days: which days count, and what happens to an event that falls on one that does not.

use std::collections::BTreeSet;

use jiff::civil::{Date, Weekday};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Country;

/// What becomes of an event on a day that is no business day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Convention {
    /// It stays where it is.
    #[default]
    Unadjusted,
    /// The next business day.
    Following,
    /// The next one, but not in another month: then the one before.
    ModifiedFollowing,
    /// The business day before.
    Preceding,
    /// The one before, but not in another month: then the next.
    ModifiedPreceding,
}

/// Which days somebody works.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BusinessDays {
    weekend: BTreeSet<i8>,
    country: Option<(Country, Option<String>)>,
    extra: BTreeSet<Date>,
    except: BTreeSet<Date>,
}

impl BusinessDays {
    /// Days that are neither on a weekend, nor a holiday of the country and region, nor in `extra`; those in `except` are
    /// business days whatever else they are.
    pub fn new(
        weekend: impl IntoIterator<Item = Weekday>,
        country: Option<(Country, Option<String>)>,
        extra: impl IntoIterator<Item = Date>,
        except: impl IntoIterator<Item = Date>,
    ) -> Self {
        Self {
            weekend: weekend.into_iter().map(Weekday::to_monday_one_offset).collect(),
            country,
            extra: extra.into_iter().collect(),
            except: except.into_iter().collect(),
        }
    }

    /// Whether work is done on a day.
    pub fn includes(&self, day: Date) -> bool {
        if self.except.contains(&day) {
            return true;
        }
        let holiday = || {
            self.country
                .as_ref()
                .is_some_and(|(country, region)| country.holidays(region.as_deref(), day.year()).contains(&day))
        };
        !self.weekend.contains(&day.weekday().to_monday_one_offset()) && !self.extra.contains(&day) && !holiday()
    }

    /// The first business day at or after a day. None if there is none within a year.
    pub fn following(&self, day: Date) -> Option<Date> {
        walk(day, |day| day.tomorrow().ok()).find(|day| self.includes(*day))
    }

    /// The last business day at or before a day. None if there is none within a year.
    pub fn preceding(&self, day: Date) -> Option<Date> {
        walk(day, |day| day.yesterday().ok()).find(|day| self.includes(*day))
    }

    /// Moves a day by a convention.
    pub fn adjust(&self, day: Date, convention: Convention) -> Option<Date> {
        let same_month = |other: Option<Date>| other.filter(|other| other.month() == day.month());
        match convention {
            Convention::Unadjusted => Some(day),
            Convention::Following => self.following(day),
            Convention::Preceding => self.preceding(day),
            Convention::ModifiedFollowing => same_month(self.following(day)).or_else(|| self.preceding(day)),
            Convention::ModifiedPreceding => same_month(self.preceding(day)).or_else(|| self.following(day)),
        }
    }

    /// The first `number` business days of the month of a day, or the last ones if negative, in order.
    pub fn of_month(&self, month: Date, number: i32) -> Vec<Date> {
        let (first, last) = (month.first_of_month(), month.last_of_month());
        let all: Vec<Date> = walk(first, |day| day.tomorrow().ok())
            .take_while(|day| *day <= last)
            .filter(|day| self.includes(*day))
            .collect();
        let wanted = (number.unsigned_abs() as usize).min(all.len());
        if number >= 0 { all[..wanted].to_vec() } else { all[all.len() - wanted..].to_vec() }
    }

    /// So many business days later, or earlier if negative. Nought: the day itself, or the next one if it is none.
    pub fn add(&self, day: Date, number: i32) -> Option<Date> {
        if number == 0 {
            return self.following(day);
        }
        let mut at = day;
        for _ in 0..number.unsigned_abs() {
            at = if number > 0 { self.following(at.tomorrow().ok()?)? } else { self.preceding(at.yesterday().ok()?)? };
        }
        Some(at)
    }
}

/// A year of days.
fn walk(from: Date, step: impl Fn(Date) -> Option<Date>) -> impl Iterator<Item = Date> {
    std::iter::successors(Some(from), move |day| step(*day)).take(366)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn berlin() -> BusinessDays {
        let weekend = [Weekday::Saturday, Weekday::Sunday];
        BusinessDays::new(weekend, Some((Country::DE, Some("BE".into()))), [], [])
    }

    fn day(text: &str) -> Date {
        text.parse().unwrap()
    }

    #[test]
    fn the_last_three_business_days_of_december_step_around_christmas() {
        let days: Vec<String> = berlin().of_month(day("2026-12-05"), -3).iter().map(Date::to_string).collect();
        assert_eq!(days, ["2026-12-29", "2026-12-30", "2026-12-31"]);
        let days: Vec<String> = berlin().of_month(day("2026-05-20"), 2).iter().map(Date::to_string).collect();
        assert_eq!(days, ["2026-05-04", "2026-05-05"], "the first of May is a Friday and a holiday");
    }

    #[test]
    fn an_event_on_a_day_without_business_moves_as_agreed() {
        // 2026-10-31 is a Saturday, 2026-11-01 a Sunday.
        let move_to = |text: &str, convention| berlin().adjust(day(text), convention).unwrap().to_string();
        assert_eq!(move_to("2026-10-31", Convention::Unadjusted), "2026-10-31");
        assert_eq!(move_to("2026-10-31", Convention::Following), "2026-11-02");
        assert_eq!(move_to("2026-10-31", Convention::ModifiedFollowing), "2026-10-30");
        assert_eq!(move_to("2026-11-01", Convention::Preceding), "2026-10-30");
        assert_eq!(move_to("2026-11-01", Convention::ModifiedPreceding), "2026-11-02");
    }

    #[test]
    fn days_are_counted_over_weekends_and_holidays() {
        assert_eq!(berlin().add(day("2026-12-23"), 2), Some(day("2026-12-28")));
        assert_eq!(berlin().add(day("2026-12-28"), -2), Some(day("2026-12-23")));
        assert_eq!(berlin().add(day("2026-12-25"), 0), Some(day("2026-12-28")));
        let never = BusinessDays::new((1..=7).map(|n| Weekday::from_monday_one_offset(n).unwrap()), None, [], []);
        assert_eq!(never.following(day("2026-01-01")), None);
        let extra = BusinessDays::new([Weekday::Sunday], None, [day("2026-12-24")], [day("2026-12-27")]);
        assert!(!extra.includes(day("2026-12-24")) && extra.includes(day("2026-12-27")));
    }
}
