//! Why a tenant is unwell, in words: the likely cause first, then what follows from it, then what to look at.

use jiff::Timestamp;

use crate::engine::{CheckState, Picture};
use crate::model::{Status, Subject};
use crate::probe::seconds;

/// Lines for somebody who has just been woken.
pub fn explain(tenant: &str, picture: &Picture, now: Timestamp) -> Vec<String> {
    let subject = Subject::Tenant(tenant.to_owned());
    let mut states: Vec<&CheckState> = picture.of(&subject).collect();
    if states.is_empty() {
        return vec![format!("{tenant}: nothing is known of it: no probe looks at it")];
    }
    states.sort_by(|a, b| b.status.cmp(&a.status).then(a.since.cmp(&b.since)));
    let unwell: Vec<&CheckState> = states.iter().copied().filter(|state| state.status != Status::Pass).collect();
    if unwell.is_empty() {
        return vec![format!("{tenant} is well: {} checks pass", states.len())];
    }
    let mut lines = vec![format!("{tenant} is {}", words(picture.status_of(&subject)))];
    let mut causes: Vec<&CheckState> = Vec::new();
    for state in &unwell {
        let cause = state.because_of.as_ref().and_then(|cause| picture.checks.get(&cause.to_string()));
        let cause = cause.unwrap_or(state);
        if !causes.iter().any(|known| known.check == cause.check) {
            causes.push(cause);
        }
    }
    // What is shared explains more than what is the tenant's own.
    causes.sort_by_key(|cause| (cause.check.subject == subject, std::cmp::Reverse(cause.status), cause.since));
    for (number, cause) in causes.iter().enumerate() {
        let what = if number == 0 { "most likely because of" } else { "and also" };
        lines.push(format!("  {what} {}: {}", cause.check, cause.observation.text));
        lines.push(format!("     {} since {} ({})", words(cause.status), cause.since, ago(cause.since, now)));
        for figure in &cause.observation.evidence {
            let limit =
                figure.limit.map_or_else(String::new, |limit| format!(", at most {}", number_of(limit, &figure.unit)));
            lines.push(format!("     {} = {}{limit}", figure.name, number_of(figure.value, &figure.unit)));
        }
        let follows: Vec<String> = unwell
            .iter()
            .filter(|state| state.because_of.as_ref() == Some(&cause.check))
            .map(|state| state.check.aspect.clone())
            .collect();
        if !follows.is_empty() {
            lines.push(format!("     from which follows: {}", follows.join(", ")));
        }
        let others = picture.consequences(&cause.check).iter().filter(|s| s.check.subject != subject).count();
        if others > 0 {
            lines.push(format!("     {others} checks of others are affected by it too"));
        }
        if let Some(advice) = advice(&cause.check.aspect, cause.status) {
            lines.push(format!("     → {advice}"));
        }
    }
    lines
}

fn words(status: Status) -> &'static str {
    match status {
        Status::Pass => "well",
        Status::Warn => "not quite well",
        Status::Unknown => "not known to be well",
        Status::Fail => "NOT well",
    }
}

fn ago(since: Timestamp, now: Timestamp) -> String {
    format!("for {}", seconds(now.duration_since(since).as_secs_f64().max(0.0)))
}

fn number_of(value: f64, unit: &str) -> String {
    match unit {
        "s" => seconds(value),
        "B" => crate::probe::bytes(value),
        "%" => format!("{value:.0} %"),
        _ => format!("{value:.0}"),
    }
}

/// What to look at first.
fn advice(aspect: &str, status: Status) -> Option<&'static str> {
    if status == Status::Pass {
        return None;
    }
    Some(match aspect {
        "database" => "does the database exist, and may the role connect? `cofferdam restore plan` if it is gone",
        "reachable" => "is the server up, and can it be reached from here?",
        "cron" => "do the cron workers run? a module that waits to be changed stops every job",
        "modules" => "finish or undo the upgrade: Odoo runs no scheduled job until then",
        "mail" => "is the mail server configured and reachable? see Settings, Technical, Emails",
        "queue" => "does the job runner run, and are its channels large enough?",
        "replication" => "is the replica up, and does its network keep up?",
        "transactions" => "who left a transaction open? see pg_stat_activity",
        "locks" => "who holds it? see pg_blocking_pids",
        "connections" => "who has opened them? a gateway keeps their number down",
        "wraparound" => "vacuum the oldest tables now: at 100 % the server stops to save itself",
        "slots" => "drop the slot if nobody reads from it any more: it fills the disk",
        "archive" => {
            "the archive_command fails: is there room where it writes? points in time cannot be reached until it does"
        }
        "evictions" | "memory" => "raise maxmemory, or keep sessions apart from caches",
        "backup" | "runner" => "does `cofferdam backup run` run? `cofferdam backup list` says what there is",
        "drill" => "`cofferdam drill run` says what is wrong with the backup",
        "page" => "is there a worker for it? the gateway's /metrics say who waits",
        _ if aspect.starts_with("certificate") => "renew it before browsers turn users away",
        _ => return None,
    })
}
