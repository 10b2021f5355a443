//! Recurrence rules of RFC 5545, for days.
//!
//! A business event happens on days; the time of day is the event's, in its zone. So a rule here yields dates, and the
//! parts of RFC 5545 that go below a day (`BYHOUR` and the like, `FREQ=HOURLY`) are refused, not ignored.

use std::fmt;
use std::str::FromStr;

use jiff::ToSpan;
use jiff::civil::{Date, Weekday};

/// A rule such as `FREQ=MONTHLY;BYDAY=-1FR`: how an event repeats from its first day on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recurrence {
    text: String,
    frequency: Frequency,
    interval: u32,
    count: Option<u32>,
    until: Option<Date>,
    week_start: Weekday,
    months: Vec<i8>,
    month_days: Vec<i8>,
    year_days: Vec<i16>,
    week_days: Vec<(i16, Weekday)>,
    positions: Vec<i32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frequency {
    Yearly,
    Monthly,
    Weekly,
    Daily,
}

/// Why a text is no rule that can be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{part}`: expected {expected}")]
pub struct RecurrenceError {
    /// The part of the rule that is wrong.
    pub part: String,
    /// What could stand there.
    pub expected: &'static str,
}

impl FromStr for Recurrence {
    type Err = RecurrenceError;

    /// Reads the value of an `RRULE` property, with or without that name in front.
    fn from_str(text: &str) -> Result<Self, RecurrenceError> {
        let mut rule = Self {
            text: text.trim().trim_start_matches("RRULE:").to_owned(),
            frequency: Frequency::Daily,
            interval: 1,
            count: None,
            until: None,
            week_start: Weekday::Monday,
            months: Vec::new(),
            month_days: Vec::new(),
            year_days: Vec::new(),
            week_days: Vec::new(),
            positions: Vec::new(),
        };
        let mut frequency = None;
        for part in rule.text.clone().split(';') {
            let wrong = |expected| RecurrenceError { part: part.to_owned(), expected };
            let Some((name, value)) = part.split_once('=') else { return Err(wrong("a name, `=` and a value")) };
            match name.to_ascii_uppercase().as_str() {
                "FREQ" => {
                    frequency = Some(match value.to_ascii_uppercase().as_str() {
                        "YEARLY" => Frequency::Yearly,
                        "MONTHLY" => Frequency::Monthly,
                        "WEEKLY" => Frequency::Weekly,
                        "DAILY" => Frequency::Daily,
                        _ => return Err(wrong("YEARLY, MONTHLY, WEEKLY or DAILY")),
                    });
                }
                "INTERVAL" => {
                    rule.interval = value
                        .parse()
                        .ok()
                        .filter(|n| (1..=1_000).contains(n))
                        .ok_or_else(|| wrong("a number from 1 to 1000"))?;
                }
                "COUNT" => {
                    let count = value.parse().ok().filter(|n| *n > 0).ok_or_else(|| wrong("a number from 1 on"))?;
                    rule.count = Some(count);
                }
                "UNTIL" => rule.until = Some(date(value).ok_or_else(|| wrong("a date such as 20261231"))?),
                "WKST" => rule.week_start = weekday(value).ok_or_else(|| wrong("MO, TU, WE, TH, FR, SA or SU"))?,
                "BYMONTH" => rule.months = list(value, 1, 12, false).ok_or_else(|| wrong("months from 1 to 12"))?,
                "BYMONTHDAY" => {
                    rule.month_days = list(value, 1, 31, true).ok_or_else(|| wrong("days 1 to 31, or -1 to -31"))?;
                }
                "BYYEARDAY" => {
                    rule.year_days = list(value, 1, 366, true).ok_or_else(|| wrong("days 1 to 366, or -1 to -366"))?;
                }
                "BYSETPOS" => {
                    rule.positions =
                        list(value, 1, 366, true).ok_or_else(|| wrong("positions 1 to 366, or -1 to -366"))?;
                }
                "BYDAY" => {
                    let days: Option<Vec<_>> = value.split(',').map(numbered_weekday).collect();
                    rule.week_days = days.ok_or_else(|| wrong("weekdays such as `MO`, `2TU` or `-1FR`"))?;
                }
                "BYWEEKNO" => return Err(wrong("another part: weeks by number are not followed")),
                "BYHOUR" | "BYMINUTE" | "BYSECOND" => {
                    return Err(wrong("nothing below a day: an event has its own times"));
                }
                _ => return Err(wrong("a part of RFC 5545's recurrence rules")),
            }
        }
        rule.frequency =
            frequency.ok_or_else(|| RecurrenceError { part: rule.text.clone(), expected: "`FREQ=` and how often" })?;
        if rule.count.is_some() && rule.until.is_some() {
            return Err(RecurrenceError { part: rule.text, expected: "one of `COUNT` and `UNTIL`" });
        }
        let numbered = rule.week_days.iter().any(|(number, _)| *number != 0);
        if numbered && matches!(rule.frequency, Frequency::Weekly | Frequency::Daily) {
            return Err(RecurrenceError { part: rule.text, expected: "weekdays without a number in a week or a day" });
        }
        if !rule.year_days.is_empty() && rule.frequency != Frequency::Yearly {
            return Err(RecurrenceError { part: rule.text, expected: "`BYYEARDAY` only with `FREQ=YEARLY`" });
        }
        if !rule.positions.is_empty()
            && rule.week_days.is_empty()
            && rule.month_days.is_empty()
            && rule.months.is_empty()
            && rule.year_days.is_empty()
        {
            return Err(RecurrenceError { part: rule.text, expected: "`BYSETPOS` only beside another `BY…`" });
        }
        Ok(rule)
    }
}

impl fmt::Display for Recurrence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Recurrence {
    /// Every day of the rule, in order, from its first day on.
    ///
    /// As RFC 5545 has it: `start` fills in what the rule leaves open, the day of the month for `FREQ=MONTHLY`, say, and a
    /// day that a month does not have is skipped.
    pub fn days(&self, start: Date) -> impl Iterator<Item = Date> + '_ {
        let mut left = self.count.unwrap_or(u32::MAX);
        self.periods(start)
            .flat_map(move |(first, last)| self.in_period(start, first, last))
            .filter(move |day| *day >= start)
            .take_while(move |day| {
                let goes_on = left > 0 && self.until.is_none_or(|until| *day <= until);
                left = left.saturating_sub(1);
                goes_on
            })
    }

    /// First and last day of each period that counts.
    fn periods(&self, start: Date) -> impl Iterator<Item = (Date, Date)> + '_ {
        // Time ends in the year 9999, and so does a rule that never comes true.
        (0..i64::MAX).map_while(move |n| {
            let step = n.checked_mul(i64::from(self.interval))?;
            match self.frequency {
                Frequency::Yearly => {
                    let year = i64::from(start.year()).checked_add(step)?;
                    let first = Date::new(i16::try_from(year).ok()?, 1, 1).ok()?;
                    Some((first, first.last_of_year()))
                }
                Frequency::Monthly => {
                    let first = start.first_of_month().checked_add(step.months()).ok()?;
                    Some((first, first.last_of_month()))
                }
                Frequency::Weekly => {
                    let back = start.weekday().since(self.week_start);
                    let first = start.checked_sub(back.days()).ok()?.checked_add(step.weeks()).ok()?;
                    Some((first, first.checked_add(6.days()).ok()?))
                }
                Frequency::Daily => {
                    let first = start.checked_add(step.days()).ok()?;
                    Some((first, first))
                }
            }
        })
    }

    fn in_period(&self, start: Date, first: Date, last: Date) -> Vec<Date> {
        let mut days = Vec::new();
        let mut day = first;
        loop {
            if self.includes(day, start) {
                days.push(day);
            }
            if day >= last {
                break;
            }
            let Ok(next) = day.tomorrow() else { break };
            day = next;
        }
        if self.positions.is_empty() {
            return days;
        }
        let length = i32::try_from(days.len()).unwrap_or(0);
        let mut chosen: Vec<Date> = self
            .positions
            .iter()
            .filter_map(|p| days.get(usize::try_from(if *p > 0 { p - 1 } else { length + p }).ok()?).copied())
            .collect();
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    }

    fn includes(&self, day: Date, start: Date) -> bool {
        let nothing_said = self.month_days.is_empty() && self.year_days.is_empty() && self.week_days.is_empty();
        let months_fit = match (self.frequency, nothing_said, self.months.is_empty()) {
            (Frequency::Yearly, true, true) => day.month() == start.month(),
            (_, _, true) => true,
            _ => self.months.contains(&day.month()),
        };
        let month_days_fit = if self.month_days.is_empty() {
            let from_start = nothing_said && matches!(self.frequency, Frequency::Yearly | Frequency::Monthly);
            !from_start || day.day() == start.day()
        } else {
            let back = day.day() - day.days_in_month() - 1;
            self.month_days.iter().any(|n| *n == day.day() || *n == back)
        };
        let year_days_fit = self.year_days.is_empty() || {
            let back = day.day_of_year() - day.days_in_year() - 1;
            self.year_days.iter().any(|n| *n == day.day_of_year() || *n == back)
        };
        let week_days_fit = if self.week_days.is_empty() {
            !(nothing_said && self.frequency == Frequency::Weekly) || day.weekday() == start.weekday()
        } else {
            self.week_days.iter().any(|(number, weekday)| *weekday == day.weekday() && self.is_number(day, *number))
        };
        months_fit && month_days_fit && year_days_fit && week_days_fit
    }

    /// Whether a day is the first, second, last … of its weekday, in its month or its year.
    fn is_number(&self, day: Date, number: i16) -> bool {
        if number == 0 {
            return true;
        }
        let in_year = self.frequency == Frequency::Yearly && self.months.is_empty();
        let (at, length) = if in_year {
            (day.day_of_year(), day.days_in_year())
        } else {
            (i16::from(day.day()), i16::from(day.days_in_month()))
        };
        if number > 0 { (at - 1) / 7 + 1 == number } else { (length - at) / 7 + 1 == -number }
    }
}

fn date(text: &str) -> Option<Date> {
    let digits = text.get(..8).filter(|d| d.bytes().all(|b| b.is_ascii_digit()))?;
    // A time after it says until when on that day, and there is nothing below a day.
    let rest = text.get(8..)?;
    if !(rest.is_empty() || rest.starts_with('T')) {
        return None;
    }
    let part = |range: std::ops::Range<usize>| digits.get(range)?.parse::<i16>().ok();
    Date::new(part(0..4)?, part(4..6)?.try_into().ok()?, part(6..8)?.try_into().ok()?).ok()
}

fn weekday(text: &str) -> Option<Weekday> {
    Some(match text.to_ascii_uppercase().as_str() {
        "MO" => Weekday::Monday,
        "TU" => Weekday::Tuesday,
        "WE" => Weekday::Wednesday,
        "TH" => Weekday::Thursday,
        "FR" => Weekday::Friday,
        "SA" => Weekday::Saturday,
        "SU" => Weekday::Sunday,
        _ => return None,
    })
}

fn numbered_weekday(text: &str) -> Option<(i16, Weekday)> {
    let (number, name) = text.split_at_checked(text.len().checked_sub(2)?)?;
    let number = match number {
        "" => 0,
        number => number.parse().ok().filter(|n: &i16| (1..=53).contains(&n.abs()))?,
    };
    Some((number, weekday(name)?))
}

fn list<T>(text: &str, least: i32, most: i32, negative: bool) -> Option<Vec<T>>
where
    T: TryFrom<i32>,
{
    text.split(',')
        .map(|word| {
            let number: i32 = word.parse().ok()?;
            let size = if negative { number.abs() } else { number };
            (least..=most).contains(&size).then_some(number)?.try_into().ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn days(rule: &str, start: &str, number: usize) -> Vec<String> {
        let rule: Recurrence = rule.parse().unwrap();
        rule.days(start.parse().unwrap()).take(number).map(|day| day.to_string()).collect()
    }

    /// Examples of RFC 5545, section 3.8.5.3.
    #[test]
    fn the_examples_of_the_standard_come_out_as_it_says() {
        assert_eq!(days("FREQ=DAILY;COUNT=3", "1997-09-02", 9), ["1997-09-02", "1997-09-03", "1997-09-04"]);
        assert_eq!(
            days("FREQ=MONTHLY;COUNT=6;BYDAY=-2MO", "1997-09-22", 9),
            ["1997-09-22", "1997-10-20", "1997-11-17", "1997-12-22", "1998-01-19", "1998-02-16"]
        );
        assert_eq!(
            days("FREQ=MONTHLY;BYDAY=FR;BYMONTHDAY=13", "1997-09-02", 5),
            ["1998-02-13", "1998-03-13", "1998-11-13", "1999-08-13", "2000-10-13"]
        );
        assert_eq!(
            days("FREQ=WEEKLY;INTERVAL=2;COUNT=4;BYDAY=TU,SU;WKST=MO", "1997-08-05", 9),
            ["1997-08-05", "1997-08-10", "1997-08-19", "1997-08-24"]
        );
        assert_eq!(
            days("FREQ=WEEKLY;INTERVAL=2;COUNT=4;BYDAY=TU,SU;WKST=SU", "1997-08-05", 9),
            ["1997-08-05", "1997-08-17", "1997-08-19", "1997-08-31"]
        );
        assert_eq!(
            days("FREQ=MONTHLY;BYDAY=MO,TU,WE,TH,FR;BYSETPOS=-2", "1997-09-29", 3),
            ["1997-09-29", "1997-10-30", "1997-11-27"]
        );
        assert_eq!(days("FREQ=YEARLY;BYDAY=20MO", "1997-05-19", 3), ["1997-05-19", "1998-05-18", "1999-05-17"]);
        // The 31st is skipped where there is none.
        assert_eq!(days("FREQ=MONTHLY", "2026-01-31", 3), ["2026-01-31", "2026-03-31", "2026-05-31"]);
        assert_eq!(days("FREQ=YEARLY", "2024-02-29", 2), ["2024-02-29", "2028-02-29"]);
    }

    #[test]
    fn what_cannot_be_followed_is_refused_with_what_could() {
        for (rule, part) in [
            ("BYDAY=MO", "`FREQ=` and how often"),
            ("FREQ=HOURLY", "YEARLY, MONTHLY, WEEKLY or DAILY"),
            ("FREQ=DAILY;BYHOUR=9", "nothing below a day"),
            ("FREQ=MONTHLY;BYMONTHDAY=0", "days 1 to 31"),
            ("FREQ=WEEKLY;BYDAY=2TU", "without a number"),
            ("FREQ=DAILY;COUNT=2;UNTIL=20261231", "one of `COUNT` and `UNTIL`"),
            ("FREQ=DAILY;UNTIL=20261331", "a date such as 20261231"),
            ("FREQ=DAILY;INTERVAL=4294967295", "a number from 1 to 1000"),
            ("FREQ=DAILY;EVERY=2", "a part of RFC 5545"),
            ("daily", "a name, `=` and a value"),
        ] {
            let error = rule.parse::<Recurrence>().unwrap_err().to_string();
            assert!(error.contains(part), "{rule}: {error}");
        }
    }

    #[test]
    fn a_rule_that_never_comes_true_ends() {
        assert_eq!(days("FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30", "2026-01-01", 1), Vec::<String>::new());
    }
}
