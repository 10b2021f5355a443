//! Rules for Prometheus, their unit tests, and dashboards for Grafana: written from what the metrics promise, so that what
//! watches from outside judges as the own engine does.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use cofferdam_tenant::calendar::Calendar;
use jiff::civil::Time;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::slo::{BURN_RULES, Urgency};

/// Windows of burn rates, as Prometheus writes them, shortest first.
const WINDOWS: [&str; 7] = ["5m", "30m", "1h", "2h", "6h", "1d", "3d"];

/// Recording and alerting rules; those about backups only where there are `backups`.
pub fn prometheus(backups: bool) -> String {
    let mut text = String::from("# Written by `cofferdam health rules`.\ngroups:\n");
    text.push_str("  - name: cofferdam-objectives\n    rules:\n");
    for window in WINDOWS {
        let _ = writeln!(
            text,
            "      - record: cofferdam:bad_looks:ratio_rate{window}\n        expr: >-\n          \
             sum by (tenant, objective) (rate(cofferdam_health_looks_total{{result=\"bad\"}}[{window}]))\n          \
             / sum by (tenant, objective) (rate(cofferdam_health_looks_total[{window}]))"
        );
    }
    // Looks that were bad because of something that is shared are not among the bad ones: that is told once.
    for urgency in [Urgency::Page, Urgency::Ticket] {
        let mut pairs = Vec::new();
        for rule in BURN_RULES.iter().filter(|rule| rule.urgency == urgency) {
            let (long, short) = (window(rule.long.as_secs()), window(rule.short.as_secs()));
            let above = |window| {
                let allowed = format!("({} * (1 - cofferdam_health_objective))", rule.rate);
                format!("cofferdam:bad_looks:ratio_rate{window} > on (tenant, objective) {allowed}")
            };
            // One bad look alone says nothing of how fast a budget is spent.
            let some = format!(
                "on (tenant, objective) sum by (tenant, objective) \
                 (increase(cofferdam_health_looks_total{{result=\"bad\"}}[{long}])) > 2.5"
            );
            pairs.push(format!("({} and {} and {some})", above(long), above(short)));
        }
        let (name, severity) = match urgency {
            Urgency::Page => ("CofferdamBudgetBurnsFast", "page"),
            Urgency::Ticket => ("CofferdamBudgetBurns", "ticket"),
        };
        alert(
            &mut text,
            name,
            &pairs.join(" or "),
            "2m",
            severity,
            "never",
            "{{ $labels.tenant }} spends its budget of {{ $labels.objective }} too fast",
        );
    }
    alert(
        &mut text,
        "CofferdamBudgetExhausted",
        // What something shared has spent was told where it is.
        "cofferdam_health_budget_own_left <= 0",
        "5m",
        "ticket",
        "never",
        "nothing is left of {{ $labels.tenant }}'s budget of {{ $labels.objective }}",
    );
    text.push_str("  - name: cofferdam-health\n    rules:\n");
    alert(
        &mut text,
        "CofferdamFails",
        // Where nothing has a limit, no calendar can move it.
        "cofferdam_health_cause == 1 and (cofferdam_health_status{topic!~\"latency|backlog\"} == 3 \
         or (cofferdam_health_status{topic=~\"latency|backlog\"} == 3 unless on (kind, subject, aspect) cofferdam_health_limit))",
        "1m",
        "page",
        "never",
        "{{ $labels.subject }}: {{ $labels.aspect }} fails",
    );
    alert(
        &mut text,
        "CofferdamWarns",
        "cofferdam_health_cause == 1 and cofferdam_health_status{topic!~\"latency|backlog\"} > 0 \
         and cofferdam_health_status == 1",
        "15m",
        "ticket",
        "never",
        "{{ $labels.subject }}: {{ $labels.aspect }} is not quite well",
    );
    // Thresholds move with the tenant's calendar; a tenant without one has a factor of one.
    let factor = "on (subject) group_left () (label_replace(business_calendar_latency_factor, \"subject\", \"$1\", \
                  \"tenant\", \"(.*)\") or on (subject) (max by (subject) (cofferdam_health_limit or cofferdam_health_warn_limit) * 0 + 1))";
    alert(
        &mut text,
        "CofferdamSlow",
        &format!(
            "cofferdam_health_figure >= (cofferdam_health_limit * {factor}) \
             and on (kind, subject, aspect) cofferdam_health_cause{{topic=~\"latency|backlog\"}} == 1 \
             and on (kind, subject, aspect) cofferdam_health_status{{topic=~\"latency|backlog\"}} == 3"
        ),
        "5m",
        "page",
        "calendar",
        "{{ $labels.subject }}: {{ $labels.figure }} is {{ $value | humanize }}",
    );
    let beyond = |limit: &str| {
        format!("on (kind, subject, aspect) (cofferdam_health_figure >= (cofferdam_health_{limit} * {factor}))")
    };
    let is = |status: u8| {
        format!(
            "cofferdam_health_cause{{topic=~\"latency|backlog\"}} == 1 \
             and on (kind, subject, aspect) cofferdam_health_status{{topic=~\"latency|backlog\"}} == {status}"
        )
    };
    let limited = "on (kind, subject, aspect) (cofferdam_health_warn_limit or cofferdam_health_limit)";
    let waits = format!(
        "({0} unless {limited}) or ({0} and {1}) or ({0} and {2}) or (({3} and {1} or {3} and {2}) \
         unless on (kind, subject, aspect) ALERTS{{alertname=\"CofferdamSlow\", alertstate=\"firing\"}})",
        is(1),
        beyond("warn_limit"),
        beyond("limit"),
        is(3)
    );
    alert(
        &mut text,
        "CofferdamWaits",
        &waits,
        "1h",
        "ticket",
        "calendar",
        "{{ $labels.subject }}: {{ $labels.aspect }} is slower than it should be",
    );
    alert(
        &mut text,
        "CofferdamCannotLook",
        "cofferdam_health_cause == 1 and cofferdam_health_status == 2",
        "15m",
        "ticket",
        "never",
        "{{ $labels.subject }}: nobody could look at {{ $labels.aspect }} lately",
    );
    if backups {
        text.push_str("  - name: cofferdam-backups\n    rules:\n");
        about_backups(&mut text);
    }
    text.push_str("  - name: cofferdam-watch\n    rules:\n");
    alert(
        &mut text,
        "CofferdamNobodyWatches",
        "(time() - max(cofferdam_health_time_seconds) > 300) or absent(cofferdam_health_time_seconds)",
        "5m",
        "page",
        "never",
        "nobody writes health's metrics",
    );
    text
}

fn about_backups(text: &mut String) {
    alert(
        text,
        "CofferdamRecoveryPointMissed",
        "cofferdam_backup_rpo_seconds > on (tenant) cofferdam_backup_rpo_objective_seconds",
        "5m",
        "page",
        "never",
        "more of {{ $labels.tenant }} would be lost now than is allowed",
    );
    alert(
        text,
        "CofferdamDrillFailed",
        "cofferdam_drill_passed == 0",
        "1m",
        "page",
        "never",
        "a backup of {{ $labels.tenant }} could not be restored",
    );
    alert(
        text,
        "CofferdamNobodyMakesBackups",
        "absent(cofferdam_backup_rpo_seconds) or (time() - max(cofferdam_backup_time_seconds) > 600)",
        "15m",
        "page",
        "never",
        "nobody writes backups' metrics",
    );
}

fn alert(text: &mut String, name: &str, expr: &str, lasts: &str, severity: &str, muted: &str, summary: &str) {
    let _ = writeln!(
        text,
        "      - alert: {name}\n        expr: >-\n          {expr}\n        for: {lasts}\n        labels:\n          \
         severity: {severity}\n          muted_by: {muted}\n        annotations:\n          summary: {}",
        json!(summary)
    );
}

fn window(seconds: u64) -> &'static str {
    match seconds {
        300 => "5m",
        1_800 => "30m",
        3_600 => "1h",
        7_200 => "2h",
        21_600 => "6h",
        86_400 => "1d",
        _ => "3d",
    }
}

/// Unit tests for the rules, which `promtool test rules` runs beside the file `rules`.
pub fn promtool_tests(rules: &str, backups: bool) -> String {
    let labels = r#"kind="tenant", subject="acme", aspect="page latency""#;
    let slow = |factor: &str| {
        format!(
            "    input_series:\n      \
             - {{ series: 'cofferdam_health_figure{{{labels}, figure=\"page_takes\"}}', values: '2x240' }}\n      \
             - {{ series: 'cofferdam_health_limit{{{labels}, figure=\"page_takes\"}}', values: '1x240' }}\n      \
             - {{ series: 'cofferdam_health_status{{{labels}, topic=\"latency\"}}', values: '3x240' }}\n      \
             - {{ series: 'cofferdam_health_cause{{{labels}, topic=\"latency\"}}', values: '1x240' }}\n      \
             - {{ series: 'business_calendar_latency_factor{{tenant=\"acme\"}}', values: '{factor}' }}\n      \
             - {{ series: 'cofferdam_backup_rpo_seconds{{tenant=\"acme\"}}', values: '100000x240' }}\n      \
             - {{ series: 'cofferdam_backup_rpo_objective_seconds{{tenant=\"acme\"}}', values: '86400x240' }}\n"
        )
    };
    let is_slow = |at: &str| {
        format!(
            "      - eval_time: {at}\n        alertname: CofferdamSlow\n        exp_alerts:\n          - exp_labels: \
             {{ severity: page, muted_by: calendar, {}, figure: page_takes }}\n            \
             exp_annotations: {{ summary: 'acme: page_takes is 2' }}\n",
            labels.replace('=', ": ")
        )
    };
    let is_not_slow = |at: &str| format!("      - {{ eval_time: {at}, alertname: CofferdamSlow, exp_alerts: [] }}\n");
    let rpo = |at: &str| {
        if !backups {
            return String::new();
        }
        format!(
            "      - eval_time: {at}\n        alertname: CofferdamRecoveryPointMissed\n        exp_alerts:\n          - \
             exp_labels: {{ severity: page, muted_by: never, tenant: acme }}\n            \
             exp_annotations: {{ summary: 'more of acme would be lost now than is allowed' }}\n"
        )
    };
    let cluster = r#"kind="shared", subject="cluster main", aspect="reachable", topic="availability""#;
    let mut down = String::from("    input_series:\n");
    let _ = writeln!(down, "      - {{ series: 'cofferdam_health_status{{{cluster}}}', values: '0 0 3x20' }}");
    let _ = writeln!(down, "      - {{ series: 'cofferdam_health_cause{{{cluster}}}', values: '0 0 1x20' }}");
    for n in 0..200 {
        let labels = format!(r#"kind="tenant", subject="t{n}", aspect="database", topic="availability""#);
        let _ = writeln!(down, "      - {{ series: 'cofferdam_health_status{{{labels}}}', values: '0 0 3x20' }}");
        let _ = writeln!(down, "      - {{ series: 'cofferdam_health_cause{{{labels}}}', values: '0x22' }}");
        let _ = writeln!(
            down,
            "      - {{ series: 'cofferdam_health_looks_total{{tenant=\"t{n}\", objective=\"availability\", result=\"shared\"}}', values: '0 0 0+2x20' }}"
        );
        let _ = writeln!(
            down,
            "      - {{ series: 'cofferdam_health_looks_total{{tenant=\"t{n}\", objective=\"availability\", result=\"good\"}}', values: '0 2 4x20' }}"
        );
        let _ = writeln!(
            down,
            "      - {{ series: 'cofferdam_health_objective{{tenant=\"t{n}\", objective=\"availability\"}}', values: '0.999x22' }}"
        );
    }
    let one = format!(
        "    alert_rule_test:\n      - eval_time: 10m\n        alertname: CofferdamFails\n        exp_alerts:\n          - \
         exp_labels: {{ severity: page, muted_by: never, {} }}\n            \
         exp_annotations: {{ summary: 'cluster main: reachable fails' }}\n      \
         - {{ eval_time: 10m, alertname: CofferdamBudgetBurnsFast, exp_alerts: [] }}\n",
        cluster.replace('=', ": ")
    );
    // Two of three tenants' looks are bad: one that is promised 99.9 per cent, and one that is promised 60.
    let mut own = String::from("    input_series:\n");
    for (tenant, objective) in [("strict", "0.999"), ("lenient", "0.6")] {
        for (result, values) in [("good", "0+1x120"), ("bad", "0+1x120")] {
            let _ = writeln!(
                own,
                "      - {{ series: 'cofferdam_health_looks_total{{tenant=\"{tenant}\", objective=\"latency\", result=\"{result}\"}}', \
                 values: '{values}' }}"
            );
        }
        let _ = writeln!(
            own,
            "      - {{ series: 'cofferdam_health_objective{{tenant=\"{tenant}\", objective=\"latency\"}}', values: '{objective}x120' }}"
        );
    }
    let burns = "    alert_rule_test:\n      - eval_time: 90m\n        alertname: CofferdamBudgetBurnsFast\n        exp_alerts:\n          \
                 - exp_labels: { severity: page, muted_by: never, tenant: strict, objective: latency }\n            \
                 exp_annotations: { summary: 'strict spends its budget of latency too fast' }\n";
    format!(
        "# Written by `cofferdam health rules`.\nrule_files: [{rules}]\nevaluation_interval: 1m\ntests:\n  \
         - name: in a normal week a slow page is told of, and so is what would be lost\n    interval: 1m\n{}\
         \x20   alert_rule_test:\n{}{}{}  \
         - name: while wages are paid a slow page is borne, five minutes later it is not, and what would be lost never is\n    \
         interval: 1m\n{}    alert_rule_test:\n{}{}{}{}  \
         - name: a shared server that is down is one alert\n    interval: 1m\n{down}{one}  \
         - name: each tenant has an objective of its own\n    interval: 1m\n{own}{burns}",
        slow("1x240"),
        is_not_slow("4m"),
        is_slow("10m"),
        rpo("10m"),
        // Three times as long is allowed for two hours.
        slow("3x120 1x120"),
        is_not_slow("60m"),
        rpo("60m"),
        is_not_slow("124m"),
        is_slow("127m"),
    )
}

/// A dashboard of Grafana's for those who run the business: services and budgets.
pub fn executive_dashboard() -> Value {
    dashboard(
        "Cofferdam: services",
        "cofferdam-services",
        &[
            ("Business services", "stat", "max by (service) (cofferdam_health_service_status)", "{{service}}"),
            (
                "What is left of budgets",
                "bargauge",
                "min by (tenant, objective) (cofferdam_health_budget_left)",
                "{{tenant}}, {{objective}}",
            ),
            ("Business events now", "table", "business_calendar_active == 1", "{{tenant}}: {{event}}"),
            ("What would be lost now", "bargauge", "max by (tenant) (cofferdam_backup_rpo_seconds)", "{{tenant}}"),
        ],
    )
}

/// A dashboard for those who run the platform: causes, gates, pools, backups.
pub fn platform_dashboard() -> Value {
    dashboard(
        "Cofferdam: platform",
        "cofferdam-platform",
        &[
            ("What is really wrong", "table", "cofferdam_health_cause == 1", "{{subject}}: {{aspect}}"),
            ("Checks that do not pass", "timeseries", "count by (aspect) (cofferdam_health_status > 0)", "{{aspect}}"),
            ("Replicas behind", "timeseries", "cofferdam_health_figure{figure=\"replay_lag\"}", "{{subject}}"),
            (
                "Oldest transaction",
                "timeseries",
                "cofferdam_health_figure{figure=\"oldest_transaction\"}",
                "{{subject}}",
            ),
            ("Connections used", "timeseries", "cofferdam_health_figure{figure=\"connections_used\"}", "{{subject}}"),
            ("Jobs late", "timeseries", "cofferdam_health_figure{figure=\"latest_job_late_by\"}", "{{subject}}"),
            ("Backups that failed", "timeseries", "cofferdam_backup_failures", "{{tenant}}"),
            ("Age of the last drill", "bargauge", "cofferdam_drill_age_seconds", "{{tenant}}"),
        ],
    )
}

fn dashboard(title: &str, uid: &str, panels: &[(&str, &str, &str, &str)]) -> Value {
    let panels: Vec<Value> = (0_u32..)
        .zip(panels)
        .map(|(n, (title, kind, expr, legend))| {
            json!({
                "id": n + 1,
                "title": title,
                "type": kind,
                "datasource": { "type": "prometheus", "uid": "${datasource}" },
                "gridPos": { "h": 8, "w": 12, "x": 12 * (n % 2), "y": 8 * (n / 2) },
                "targets": [{ "refId": "A", "expr": expr, "legendFormat": legend, "instant": *kind != "timeseries" }],
            })
        })
        .collect();
    json!({
        "title": title,
        "uid": uid,
        "schemaVersion": 39,
        "editable": true,
        "refresh": "30s",
        "time": { "from": "now-6h", "to": "now" },
        "templating": { "list": [{ "name": "datasource", "type": "datasource", "query": "prometheus" }] },
        "panels": panels,
    })
}

/// Alertmanager's time intervals for the events of calendars in the next 90 days, by name of the calendar: rules such as
/// "the last three business days" are beyond it, so that they are written out, and have to be written again in time.
pub fn alertmanager_intervals(calendars: &BTreeMap<String, Arc<Calendar>>, now: Timestamp) -> String {
    let until = now.checked_add(SignedDuration::from_hours(90 * 24)).unwrap_or(now);
    let mut text =
        format!("# Written by `cofferdam health rules`; good until {}.\ntime_intervals:\n", until.strftime("%Y-%m-%d"));
    for (name, calendar) in calendars {
        let zone = calendar.zone.iana_name().unwrap_or("UTC");
        // Events of one name, of whichever kind, are one: a name may stand there once.
        let mut named: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for event in &calendar.events {
            let intervals = named.entry(&event.name).or_default();
            for occurrence in event.between(now, until, &calendar.business_days, &calendar.zone) {
                let local = |at: Timestamp| at.to_zoned(calendar.zone.clone()).datetime();
                // Whole minutes, around what is meant.
                let from = local(occurrence.from);
                let to = local(occurrence.until.checked_add(SignedDuration::from_secs(59)).unwrap_or(occurrence.until));
                let minute = |time: Time| time.strftime("%H:%M").to_string();
                let mut day = from.date();
                // An interval of Alertmanager's ends at midnight.
                while day < to.date() || day == to.date() && minute(to.time()) != "00:00" {
                    let start = if day == from.date() { minute(from.time()) } else { "00:00".to_owned() };
                    let end = if day == to.date() { minute(to.time()) } else { "24:00".to_owned() };
                    if start < end {
                        intervals.push(format!(
                            "{{ years: ['{}'], months: ['{}'], days_of_month: ['{}'], times: [{{ start_time: '{start}', \
                             end_time: '{end}' }}], location: '{zone}' }}",
                            day.year(),
                            day.month(),
                            day.day(),
                        ));
                    }
                    let Ok(next) = day.tomorrow() else { break };
                    day = next;
                }
            }
        }
        for (event, mut intervals) in named {
            let _ = writeln!(text, "  - name: {}\n    time_intervals:", json!(format!("{name}: {event}")));
            if intervals.is_empty() {
                // A name without a time would be an error, and one that is used and missing too: never.
                intervals.push("{ years: ['1970'] }".to_owned());
            }
            for interval in intervals {
                let _ = writeln!(text, "      - {interval}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_the_next_quarter_are_written_out_for_alertmanager() {
        let config = serde_json::json!({
            "time_zone": "Europe/Berlin", "holidays": { "country": "DE" },
            "events": [
                { "name": "close", "kind": "month_end_close", "business_days": -1, "from": "22:00", "until": "06:00" },
                { "name": "tender", "kind": "tender", "days": ["2020-01-01"] },
                { "name": "twice", "kind": "tender", "days": ["2026-12-03"], "from": "08:00:10", "until": "08:00:40" },
                { "name": "twice", "kind": "payroll", "days": ["2026-12-04"], "from": "08:00:30", "until": "09:00" },
            ],
        });
        let calendar = Calendar::new(&serde_json::from_value(config).unwrap()).unwrap();
        let calendars = BTreeMap::from([("de".to_owned(), Arc::new(calendar))]);
        let text = alertmanager_intervals(&calendars, "2026-11-27T12:00:00Z".parse().unwrap());
        assert!(text.contains("good until 2027-02-25"), "{text}");
        for expected in [
            "- name: \"de: close\"",
            "{ years: ['2026'], months: ['11'], days_of_month: ['30'], times: [{ start_time: '22:00', end_time: '24:00' }], location: 'Europe/Berlin' }",
            "{ years: ['2026'], months: ['12'], days_of_month: ['1'], times: [{ start_time: '00:00', end_time: '06:00' }], location: 'Europe/Berlin' }",
            "{ years: ['1970'] }",
            "days_of_month: ['3'], times: [{ start_time: '08:00', end_time: '08:01' }]",
            "days_of_month: ['4'], times: [{ start_time: '08:00', end_time: '09:00' }]",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
        assert_eq!(text.matches("name: \"de: twice\"").count(), 1, "a name may stand there once: {text}");
    }
}
