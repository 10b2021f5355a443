//! Public holidays, as rules: fixed days, days that go by Easter, numbered weekdays, and the exceptions that laws make.

use std::collections::BTreeSet;

use jiff::ToSpan;
use jiff::civil::{Date, Weekday};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A country whose public holidays are known here. Others are given as lists of days.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Country {
    /// Austria.
    AT,
    /// Belgium.
    BE,
    /// Germany. Its states have holidays of their own: `region: BY`.
    DE,
    /// Spain: the national ones.
    ES,
    /// France.
    FR,
    /// England and Wales.
    GB,
    /// Italy: the national ones.
    IT,
    /// The Netherlands.
    NL,
    /// Poland.
    PL,
    /// The United States: federal ones, with the days on which they are observed.
    US,
}

impl Country {
    /// Every country that is known here.
    pub const ALL: [Self; 10] =
        [Self::AT, Self::BE, Self::DE, Self::ES, Self::FR, Self::GB, Self::IT, Self::NL, Self::PL, Self::US];

    /// Regions with holidays of their own.
    pub fn regions(self) -> &'static [&'static str] {
        match self {
            Self::DE => {
                &["BB", "BE", "BW", "BY", "HB", "HE", "HH", "MV", "NI", "NW", "RP", "SH", "SL", "SN", "ST", "TH"]
            }
            _ => &[],
        }
    }

    /// The holidays of a year; those of a region too.
    pub fn holidays(self, region: Option<&str>, year: i16) -> BTreeSet<Date> {
        let mut days = BTreeSet::new();
        let mut rules = self.rules();
        if let (Self::DE, Some(region)) = (self, region) {
            rules.extend(german(region));
        }
        for Rule { when, from, to } in rules {
            if (from..=to).contains(&year)
                && let Some(day) = when.in_year(year)
            {
                days.insert(day);
            }
        }
        match self {
            Self::US => american(&mut days, year),
            Self::GB => british(&mut days, year),
            Self::NL => {
                // Liberation Day is free every five years.
                if year % 5 == 0 {
                    days.extend(Date::new(year, 5, 5));
                }
                // The King's birthday is not celebrated on a Sunday.
                if let Ok(day) = Date::new(year, 4, 27) {
                    let sunday = day.weekday() == Weekday::Sunday;
                    days.extend(if sunday { day.yesterday() } else { Ok(day) });
                }
            }
            _ => {}
        }
        days
    }

    fn rules(self) -> Vec<Rule> {
        use When::{Easter, Fixed};
        let of = |days: &[When]| days.iter().map(|when| Rule::always(*when)).collect::<Vec<_>>();
        match self {
            Self::AT => of(&[
                Fixed(1, 1),
                Fixed(1, 6),
                Easter(1),
                Fixed(5, 1),
                Easter(39),
                Easter(50),
                Easter(60),
                Fixed(8, 15),
                Fixed(10, 26),
                Fixed(11, 1),
                Fixed(12, 8),
                Fixed(12, 25),
                Fixed(12, 26),
            ]),
            Self::BE => of(&[
                Fixed(1, 1),
                Easter(1),
                Fixed(5, 1),
                Easter(39),
                Easter(50),
                Fixed(7, 21),
                Fixed(8, 15),
                Fixed(11, 1),
                Fixed(11, 11),
                Fixed(12, 25),
            ]),
            Self::DE => of(&[
                Fixed(1, 1),
                Easter(-2),
                Easter(1),
                Fixed(5, 1),
                Easter(39),
                Easter(50),
                Fixed(10, 3),
                Fixed(12, 25),
                Fixed(12, 26),
            ]),
            Self::ES => of(&[
                Fixed(1, 1),
                Fixed(1, 6),
                Easter(-2),
                Fixed(5, 1),
                Fixed(8, 15),
                Fixed(10, 12),
                Fixed(11, 1),
                Fixed(12, 6),
                Fixed(12, 8),
                Fixed(12, 25),
            ]),
            Self::FR => of(&[
                Fixed(1, 1),
                Easter(1),
                Fixed(5, 1),
                Fixed(5, 8),
                Easter(39),
                Easter(50),
                Fixed(7, 14),
                Fixed(8, 15),
                Fixed(11, 1),
                Fixed(11, 11),
                Fixed(12, 25),
            ]),
            Self::IT => {
                let mut rules = of(&[
                    Fixed(1, 1),
                    Fixed(1, 6),
                    Easter(1),
                    Fixed(4, 25),
                    Fixed(5, 1),
                    Fixed(6, 2),
                    Fixed(8, 15),
                    Fixed(11, 1),
                    Fixed(12, 8),
                    Fixed(12, 25),
                    Fixed(12, 26),
                ]);
                rules.push(Rule::since(Fixed(10, 4), 2026));
                rules
            }
            Self::NL => of(&[Fixed(1, 1), Easter(-2), Easter(1), Easter(39), Easter(50), Fixed(12, 25), Fixed(12, 26)]),
            Self::PL => {
                let mut rules = of(&[
                    Fixed(1, 1),
                    Fixed(1, 6),
                    Easter(1),
                    Fixed(5, 1),
                    Fixed(5, 3),
                    Easter(60),
                    Fixed(8, 15),
                    Fixed(11, 1),
                    Fixed(11, 11),
                    Fixed(12, 25),
                    Fixed(12, 26),
                ]);
                rules.push(Rule::since(Fixed(12, 24), 2025));
                rules
            }
            Self::GB => of(&[Easter(-2), Easter(1)]),
            Self::US => Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum When {
    /// Month and day.
    Fixed(i8, i8),
    /// So many days after Easter Sunday.
    Easter(i32),
    /// The last weekday before a month and day.
    Before(i8, i8, Weekday),
}

impl When {
    fn in_year(self, year: i16) -> Option<Date> {
        match self {
            Self::Fixed(month, day) => Date::new(year, month, day).ok(),
            Self::Easter(days) => easter(year)?.checked_add(days.days()).ok(),
            Self::Before(month, day, weekday) => Date::new(year, month, day).ok()?.nth_weekday(-1, weekday).ok(),
        }
    }
}

/// A holiday and the years in which it is one.
#[derive(Debug, Clone, Copy)]
struct Rule {
    when: When,
    from: i16,
    to: i16,
}

impl Rule {
    const fn always(when: When) -> Self {
        Self { when, from: i16::MIN, to: i16::MAX }
    }

    const fn since(when: When, year: i16) -> Self {
        Self { when, from: year, to: i16::MAX }
    }

    const fn once(when: When, year: i16) -> Self {
        Self { when, from: year, to: year }
    }
}

/// What a German state has beside the federal ones.
fn german(state: &str) -> Vec<Rule> {
    use When::{Before, Easter, Fixed};
    let mut rules = Vec::new();
    let mut of = |states: &[&str], rule: Rule| {
        if states.contains(&state) {
            rules.push(rule);
        }
    };
    of(&["BW", "BY", "ST"], Rule::always(Fixed(1, 6)));
    of(&["BE"], Rule::since(Fixed(3, 8), 2019));
    of(&["MV"], Rule::since(Fixed(3, 8), 2023));
    of(&["BE"], Rule::once(Fixed(5, 8), 2020));
    of(&["BE"], Rule::once(Fixed(5, 8), 2025));
    of(&["BW", "BY", "HE", "NW", "RP", "SL"], Rule::always(Easter(60)));
    of(&["SL"], Rule::always(Fixed(8, 15)));
    of(&["TH"], Rule::since(Fixed(9, 20), 2019));
    of(&["BB", "MV", "SN", "ST", "TH"], Rule::always(Fixed(10, 31)));
    of(&["HB", "HH", "NI", "SH"], Rule::since(Fixed(10, 31), 2018));
    of(&["BW", "BY", "NW", "RP", "SL"], Rule::always(Fixed(11, 1)));
    of(&["SN"], Rule::always(Before(11, 23, Weekday::Wednesday)));
    rules
}

/// Federal holidays. On a Saturday they are observed the day before, on a Sunday the day after.
fn american(days: &mut BTreeSet<Date>, year: i16) {
    let nth = |month, n, weekday| Date::new(year, month, 1).ok()?.nth_weekday_of_month(n, weekday).ok();
    days.extend(nth(1, 3, Weekday::Monday));
    days.extend(nth(2, 3, Weekday::Monday));
    days.extend(nth(5, -1, Weekday::Monday));
    days.extend(nth(9, 1, Weekday::Monday));
    days.extend(nth(10, 2, Weekday::Monday));
    days.extend(nth(11, 4, Weekday::Thursday));
    let fixed = [(year, 1, 1), (year, 7, 4), (year, 11, 11), (year, 12, 25)].into_iter();
    let juneteenth = (year >= 2021).then_some((year, 6, 19));
    // The next New Year may be observed on the last day of this one.
    let next = year.checked_add(1).map(|next| (next, 1, 1));
    for (of, month, day) in fixed.chain(juneteenth).chain(next) {
        let Ok(day) = Date::new(of, month, day) else { continue };
        let observed = match day.weekday() {
            Weekday::Saturday => day.yesterday(),
            Weekday::Sunday => day.tomorrow(),
            _ => Ok(day),
        };
        days.extend([Ok(day), observed].into_iter().flatten().filter(|day| day.year() == year));
    }
}

/// Bank holidays of England and Wales: those that fall on a weekend are made up for by the next free weekday.
fn british(days: &mut BTreeSet<Date>, year: i16) {
    let nth = |month, n| Date::new(year, month, 1).ok()?.nth_weekday_of_month(n, Weekday::Monday).ok();
    let fixed = |month, day| Date::new(year, month, day).ok();
    // In 2020 for the end of the war, in 2022 for the Queen's jubilee.
    days.extend(if year == 2020 { fixed(5, 8) } else { nth(5, 1) });
    days.extend(if year == 2022 { fixed(6, 2) } else { nth(5, -1) });
    days.extend(nth(8, -1));
    for (of, month, day) in [(2022, 6, 3), (2022, 9, 19), (2023, 5, 8)] {
        if of == year {
            days.extend(fixed(month, day));
        }
    }
    let weekend = |day: &Date| matches!(day.weekday(), Weekday::Saturday | Weekday::Sunday);
    for group in [&[fixed(1, 1)][..], &[fixed(12, 25), fixed(12, 26)]] {
        let group: Vec<Date> = group.iter().flatten().copied().collect();
        days.extend(&group);
        for day in group.iter().filter(|day| weekend(day)) {
            let mut other = *day;
            while weekend(&other) || days.contains(&other) {
                let Ok(next) = other.tomorrow() else { break };
                other = next;
            }
            days.insert(other);
        }
    }
}

/// Easter Sunday of the Gregorian calendar, by the rule of 1876 that needs no exceptions.
pub fn easter(year: i16) -> Option<Date> {
    let y = i32::from(year);
    let (century, in_century) = (y.div_euclid(100), y.rem_euclid(100));
    let golden = y.rem_euclid(19);
    let correction = (century - century / 4 - (century - (century + 8) / 25 + 1) / 3 + 19 * golden + 15).rem_euclid(30);
    let weekday = (32 + 2 * (century % 4) + 2 * (in_century / 4) - correction - in_century % 4).rem_euclid(7);
    let late = (golden + 11 * correction + 22 * weekday) / 451;
    let sum = correction + weekday - 7 * late + 114;
    Date::new(year, (sum / 31).try_into().ok()?, (sum % 31 + 1).try_into().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn easter_is_when_the_almanac_says() {
        let days: Vec<String> =
            [1818, 2000, 2008, 2024, 2025, 2026, 2038].iter().map(|y| easter(*y).unwrap().to_string()).collect();
        assert_eq!(
            days,
            ["1818-03-22", "2000-04-23", "2008-03-23", "2024-03-31", "2025-04-20", "2026-04-05", "2038-04-25"]
        );
    }
}
