//! Calendars beside `python-dateutil` and `holidays`, over sixteen years.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use cofferdam_tenant::calendar::{BusinessDays, Country, Recurrence};
use jiff::civil::{Date, Weekday, date};
use serde_json::json;

/// Asks the oracle; none where it is not installed.
fn ask(questions: &[serde_json::Value]) -> Option<Vec<Vec<String>>> {
    let python = cofferdam_testkit::tools::installed("python3")?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("calendar_oracle.py");
    let mut oracle = Command::new(python);
    let mut oracle = oracle.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = oracle.stdin.take().unwrap();
    let questions: Vec<String> = questions.iter().map(ToString::to_string).collect();
    let number = questions.len();
    let writer = std::thread::spawn(move || {
        for question in questions {
            if writeln!(stdin, "{question}").is_err() {
                return;
            }
        }
    });
    let answers: Vec<Vec<String>> = BufReader::new(oracle.stdout.take().unwrap())
        .lines()
        .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
        .collect();
    writer.join().unwrap();
    if !oracle.wait().unwrap().success() && answers.is_empty() {
        eprintln!("skipped: python-dateutil and holidays are not installed; `make install-test` does that");
        return None;
    }
    assert_eq!(answers.len(), number, "the oracle has answered everything");
    Some(answers)
}

/// A rule that may stand in a calendar. Weekdays with and without number are not mixed: there the two read RFC 5545
/// differently.
fn random_rule(random: &mut fastrand::Rng) -> String {
    let names = ["MO", "TU", "WE", "TH", "FR", "SA", "SU"];
    let frequency = ["YEARLY", "MONTHLY", "WEEKLY", "DAILY"][random.usize(..4)];
    let mut rule = format!("FREQ={frequency};INTERVAL={}", random.u32(1..4));
    let some = |random: &mut fastrand::Rng, most: usize, make: &dyn Fn(&mut fastrand::Rng) -> String| {
        (0..random.usize(1..=most)).map(|_| make(random)).collect::<Vec<_>>().join(",")
    };
    let mut by = false;
    if random.u8(..4) == 0 {
        by = true;
        let months = some(random, 3, &|r| r.u32(1..=12).to_string());
        rule.push_str(&format!(";BYMONTH={months}"));
    }
    let numbered = matches!(frequency, "YEARLY" | "MONTHLY") && random.bool();
    if random.u8(..3) == 0 {
        by = true;
        let days = some(random, 3, &|r| {
            let number = if numbered { [-2, -1, 1, 2, 3][r.usize(..5)].to_string() } else { String::new() };
            format!("{number}{}", names[r.usize(..7)])
        });
        rule.push_str(&format!(";BYDAY={days}"));
    } else if frequency != "WEEKLY" && random.bool() {
        by = true;
        let days = some(random, 3, &|r| (r.i32(1..=31) * if r.bool() { 1 } else { -1 }).to_string());
        rule.push_str(&format!(";BYMONTHDAY={days}"));
    }
    if by && random.u8(..4) == 0 && frequency != "DAILY" {
        let positions = some(random, 2, &|r| [-2, -1, 1, 2][r.usize(..4)].to_string());
        rule.push_str(&format!(";BYSETPOS={positions}"));
    }
    match random.u8(..4) {
        0 => rule.push_str(&format!(";COUNT={}", random.u32(1..60))),
        1 => rule.push_str(&format!(";UNTIL=20{}0615", random.u32(21..36))),
        _ => {}
    }
    if random.bool() {
        rule.push_str(&format!(";WKST={}", names[random.usize(..7)]));
    }
    rule
}

#[test]
fn three_hundred_rules_give_the_days_that_dateutil_gives() {
    let mut random = fastrand::Rng::with_seed(5545);
    let mut questions = Vec::new();
    for _ in 0..300 {
        let (rule, start) =
            (random_rule(&mut random), date(random.i16(2018..2024), random.i8(1..=12), random.i8(1..=28)));
        questions.push(json!({ "rule": rule, "start": start }));
    }
    let Some(answers) = ask(&questions) else { return };
    let (first, last) = (date(2020, 1, 1), date(2035, 12, 31));
    let mut days_compared = 0;
    for (question, expected) in questions.iter().zip(answers) {
        let rule: Recurrence = question["rule"].as_str().unwrap().parse().unwrap();
        let start: Date = question["start"].as_str().unwrap().parse().unwrap();
        let found: Vec<String> = rule
            .days(start)
            .take_while(|day| *day <= last)
            .filter(|day| *day >= first)
            .map(|day| day.to_string())
            .collect();
        assert_eq!(found, expected, "{question}");
        days_compared += found.len();
    }
    assert!(days_compared > 50_000, "{days_compared}");
}

#[test]
fn business_days_of_ten_countries_and_sixteen_states_are_those_of_the_holidays_package() {
    let mut places: Vec<(Country, Option<&str>)> = Country::ALL.iter().map(|country| (*country, None)).collect();
    places.extend(Country::DE.regions().iter().map(|region| (Country::DE, Some(*region))));
    // The oracle knows the United Kingdom by its parts.
    let questions: Vec<_> = places
        .iter()
        .map(|(country, region)| {
            let region = if *country == Country::GB { Some("ENG") } else { *region };
            json!({ "country": country, "region": region })
        })
        .collect();
    let Some(answers) = ask(&questions) else { return };
    let mut wrong = Vec::new();
    for ((country, region), expected) in places.into_iter().zip(answers) {
        let weekend = [Weekday::Saturday, Weekday::Sunday];
        let business = BusinessDays::new(weekend, Some((country, region.map(str::to_owned))), [], []);
        let mut day = date(2020, 1, 1);
        while day <= date(2035, 12, 31) {
            let weekday = !matches!(day.weekday(), Weekday::Saturday | Weekday::Sunday);
            let holiday = expected.binary_search(&day.to_string()).is_ok();
            if business.includes(day) != (weekday && !holiday) {
                wrong.push(format!("{country:?} {region:?} {day}: a holiday there: {holiday}"));
            }
            day = day.tomorrow().unwrap();
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
