//! The picture as metrics. Their names are a promise: [`NAMES`] lists them, and rules and dashboards are made from it.
//!
//! Series are bounded: one status for each check, one figure for each kind of evidence, a handful for each tenant.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::Arc;

use cofferdam_tenant::calendar::Calendar;
use jiff::Timestamp;

use crate::engine::Picture;
use crate::model::{Status, Subject};
use crate::service::ServiceState;
use crate::slo::{Budget, ByObjective};

/// Every metric: its name, its type, its labels, and what it says.
pub const NAMES: [(&str, &str, &[&str], &str); 13] = [
    ("cofferdam_health_time_seconds", "gauge", &[], "When this was written, in seconds since 1970."),
    (
        "cofferdam_health_status",
        "gauge",
        &["kind", "subject", "aspect", "topic"],
        "How a check is: 0 pass, 1 warn, 2 unknown, 3 fail.",
    ),
    (
        "cofferdam_health_cause",
        "gauge",
        &["kind", "subject", "aspect", "topic"],
        "1 where a check is in trouble and nothing else explains it.",
    ),
    (
        "cofferdam_health_figure",
        "gauge",
        &["kind", "subject", "aspect", "figure"],
        "What was measured, in seconds, bytes, per cent or numbers.",
    ),
    (
        "cofferdam_health_limit",
        "gauge",
        &["kind", "subject", "aspect", "figure"],
        "From this on a figure is a failure.",
    ),
    (
        "cofferdam_health_warn_limit",
        "gauge",
        &["kind", "subject", "aspect", "figure"],
        "From this on a figure is a warning.",
    ),
    ("cofferdam_health_service_status", "gauge", &["service"], "How a business service is: 0 to 3, as for checks."),
    (
        "cofferdam_health_objective",
        "gauge",
        &["tenant", "objective"],
        "The part of looks that must be good, such as 0.999; `objective` is `availability` or `latency`.",
    ),
    (
        "cofferdam_health_budget_left",
        "gauge",
        &["tenant", "objective"],
        "What is left of thirty days' budget, from 1 to below 0.",
    ),
    (
        "cofferdam_health_budget_own_left",
        "gauge",
        &["tenant", "objective"],
        "The same without what something shared has spent.",
    ),
    (
        "cofferdam_health_looks_total",
        "counter",
        &["tenant", "objective", "result"],
        "Looks at a tenant: `good`, `bad`, and `shared` for those that were bad because of something that is shared.",
    ),
    ("business_calendar_active", "gauge", &["tenant", "event", "kind"], "1 while an event of the calendar is on."),
    (
        "business_calendar_latency_factor",
        "gauge",
        &["tenant"],
        "By how much thresholds for latency and backlog are widened now.",
    ),
];

/// What metrics are made from.
#[derive(Debug, Clone, Copy)]
pub struct Sources<'a> {
    /// How everything is.
    pub picture: &'a Picture,
    /// How services are.
    pub services: &'a [ServiceState],
    /// What is left of budgets.
    pub budgets: &'a ByObjective<Budget>,
    /// Looks so far: good, bad, and bad because of something that is shared.
    pub looks: &'a ByObjective<[u64; 3]>,
    /// Calendars, by tenant.
    pub calendars: &'a BTreeMap<String, Arc<Calendar>>,
}

/// Everything in Prometheus' text format.
pub fn render(sources: &Sources<'_>, now: Timestamp) -> String {
    let Sources { picture, services, budgets, looks, calendars } = *sources;
    let add = |name: &'static str, labels: Vec<&str>, value: f64| {
        let labels: Vec<String> = labels.into_iter().map(str::to_owned).collect();
        (name, labels, value)
    };
    let mut all: Vec<(&'static str, Vec<String>, f64)> = Vec::new();
    all.push(add("cofferdam_health_time_seconds", Vec::new(), now.as_second() as f64));
    for state in picture.checks.values() {
        let (kind, subject) = match &state.check.subject {
            Subject::Tenant(name) => ("tenant", name.as_str()),
            Subject::Shared(name) => ("shared", name.as_str()),
        };
        let topic = topic_word(state.topic);
        let labels = vec![kind, subject, state.check.aspect.as_str(), topic.as_str()];
        all.push(add("cofferdam_health_status", labels.clone(), number(state.status)));
        all.push(add("cofferdam_health_cause", labels, f64::from(u8::from(state.is_cause()))));
        for figure in &state.observation.evidence {
            let labels = vec![kind, subject, state.check.aspect.as_str(), figure.name.as_str()];
            all.push(add("cofferdam_health_figure", labels.clone(), figure.value));
            if let Some(limit) = figure.limit {
                all.push(add("cofferdam_health_limit", labels.clone(), limit));
            }
            if let Some(warn) = figure.warn {
                all.push(add("cofferdam_health_warn_limit", labels, warn));
            }
        }
    }
    for service in services {
        all.push(add("cofferdam_health_service_status", vec![&service.name], number(service.status)));
    }
    for ((tenant, objective), budget) in budgets {
        let labels = vec![tenant.as_str(), objective.as_str()];
        all.push(add("cofferdam_health_objective", labels.clone(), budget.objective));
        all.push(add("cofferdam_health_budget_left", labels.clone(), budget.left));
        all.push(add("cofferdam_health_budget_own_left", labels, budget.own_left));
    }
    for ((tenant, objective), looks) in looks {
        for (result, number) in ["good", "bad", "shared"].into_iter().zip(looks) {
            let labels = vec![tenant.as_str(), objective.as_str(), result];
            all.push(add("cofferdam_health_looks_total", labels, *number as f64));
        }
    }
    // Each is worked out once, however many tenants have it.
    let mut now_on = HashMap::new();
    for (tenant, calendar) in calendars {
        let (on, latency) = now_on
            .entry(Arc::as_ptr(calendar))
            .or_insert_with(|| (calendar.active(now), calendar.effects(now).latency));
        for event in &calendar.events {
            let active = on
                .iter()
                .any(|occurrence| (&occurrence.event.name, occurrence.event.kind) == (&event.name, event.kind));
            let labels = vec![tenant.as_str(), &event.name, event.kind.as_str()];
            all.push(add("business_calendar_active", labels, f64::from(u8::from(active))));
        }
        all.push(add("business_calendar_latency_factor", vec![tenant], *latency));
    }
    let mut text = String::new();
    for (name, kind, labels, help) in NAMES {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (_, values, value) in all.iter().filter(|(of, _, _)| *of == name) {
            let pairs: Vec<String> =
                labels.iter().zip(values).map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
            let _ = writeln!(text, "{name}{{{}}} {value}", pairs.join(","));
        }
    }
    text
}

fn number(status: Status) -> f64 {
    match status {
        Status::Pass => 0.0,
        Status::Warn => 1.0,
        Status::Unknown => 2.0,
        Status::Fail => 3.0,
    }
}

fn topic_word(topic: crate::model::Topic) -> String {
    serde_json::to_value(topic).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
