//! A page for people: what the business does on top, then what is wrong, then everybody, then who waits.
//!
//! Written here as a whole, without a font or a picture from anywhere; a few lines of script fetch it again every five
//! seconds. A status is a sign and a word, and only then a colour.

use std::collections::BTreeSet;
use std::fmt::Write;

use jiff::Timestamp;

use crate::engine::{CheckState, Picture};
use crate::model::{Status, Subject, Topic};
use crate::probe::seconds;
use crate::service::ServiceState;
use crate::slo::{Budget, ByObjective, Objective};

/// How a tenant fares among the others, from whoever knows.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Isolation {
    /// Its name.
    pub tenant: String,
    /// Work running.
    pub running: u32,
    /// Work waiting.
    pub waiting: u32,
    /// How long granted work has waited on average, in seconds.
    pub mean_wait: f64,
    /// All but one in a hundred of the last grants had waited for so many seconds at most.
    pub p99_wait: f64,
    /// Work so far, in slot-seconds.
    pub work: f64,
    /// Work turned away so far.
    pub rejected: u64,
    /// What holds it back, in words.
    pub warnings: Vec<String>,
}

/// What a page is made from.
#[derive(Debug, Clone, Copy)]
pub struct PageSources<'a> {
    /// How everything is.
    pub picture: &'a Picture,
    /// How services are.
    pub services: &'a [ServiceState],
    /// What is left of budgets.
    pub budgets: &'a ByObjective<Budget>,
    /// How tenants fare among each other; empty where nobody knows.
    pub isolation: &'a [Isolation],
}

/// The page.
pub fn page(sources: &PageSources<'_>, now: Timestamp) -> String {
    let PageSources { picture, services, budgets, isolation } = *sources;
    let worst = Status::worst(picture.checks.values().map(|state| state.status));
    let mut body = String::new();
    let _ = write!(
        body,
        "<header class={worst}><h1>{} <span>Health</span></h1><p>{} of {} checks pass · <time>{}</time></p></header>",
        badge(worst),
        picture.checks.values().filter(|state| state.status == Status::Pass).count(),
        picture.checks.len(),
        now.strftime("%Y-%m-%d %H:%M:%S UTC")
    );
    if !services.is_empty() {
        body.push_str("<section><h2>Business services</h2><ul class=cards>");
        for service in services {
            let reason = service.reasons.first().map_or("as it should be", String::as_str);
            let _ = write!(
                body,
                "<li class={}>{}<h3>{}</h3><p>{}</p></li>",
                service.status,
                badge(service.status),
                escaped(&service.title),
                escaped(reason)
            );
        }
        body.push_str("</ul></section>");
    }
    causes(&mut body, picture, now);
    tenants(&mut body, picture, budgets);
    who_waits(&mut body, isolation);
    backups(&mut body, picture);
    format!(
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content=\"width=device-width, initial-scale=1\">\
         <title>{} Health</title><style>{STYLE}</style></head><body><main>{body}</main><p id=lost hidden>✗ not reached any more: what is \
         shown is old</p><script>{SCRIPT}</script></body></html>",
        worst.sign()
    )
}

fn causes(body: &mut String, picture: &Picture, now: Timestamp) {
    body.push_str("<section><h2>What is really wrong</h2>");
    let causes = picture.causes();
    if causes.is_empty() {
        body.push_str("<p class=calm>✓ nothing</p></section>");
        return;
    }
    body.push_str("<ol class=causes>");
    for cause in causes.iter().take(MOST) {
        let follow = picture.consequences(&cause.check).len();
        let follow = if follow > 0 { format!(" · {follow} others follow from it") } else { String::new() };
        let _ = write!(
            body,
            "<li class={}>{}<strong>{}</strong><p>{}</p><small>for {}{follow}</small></li>",
            cause.status,
            badge(cause.status),
            escaped(&cause.check.to_string()),
            escaped(&cause.observation.text),
            seconds(now.duration_since(cause.since).as_secs_f64().max(0.0))
        );
    }
    body.push_str("</ol>");
    if causes.len() > MOST {
        let _ = write!(body, "<p>and {} more</p>", causes.len() - MOST);
    }
    body.push_str("</section>");
}

/// More than this nobody reads.
const MOST: usize = 50;

fn tenants(body: &mut String, picture: &Picture, budgets: &ByObjective<Budget>) {
    let names: BTreeSet<&str> = picture
        .checks
        .values()
        .filter_map(|state| match &state.check.subject {
            Subject::Tenant(name) => Some(name.as_str()),
            Subject::Shared(_) => None,
        })
        .collect();
    if names.is_empty() {
        return;
    }
    let mut rows: Vec<(Status, &str, Vec<&CheckState>)> = names
        .into_iter()
        .map(|name| {
            let states: Vec<&CheckState> = picture.of(&Subject::Tenant(name.to_owned())).collect();
            (Status::worst(states.iter().map(|state| state.status)), name, states)
        })
        .collect();
    rows.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(b.1)));
    body.push_str("<section><h2>Tenants</h2><ul class=grid>");
    for (status, name, states) in rows {
        let unwell: Vec<&str> = states
            .iter()
            .filter(|state| state.status != Status::Pass)
            .map(|state| state.check.aspect.as_str())
            .collect();
        let detail = if unwell.is_empty() { "well".to_owned() } else { unwell.join(", ") };
        let left = |objective| budgets.get(&(name.to_owned(), objective)).map(|budget| 100.0 * budget.left.max(0.0));
        let budget = match (left(Objective::Availability), left(Objective::Latency)) {
            (None, None) => String::new(),
            (Some(works), None) => format!("<small>budget: {works:.0} % left</small>"),
            (None, Some(fast)) => format!("<small>budget for speed: {fast:.0} % left</small>"),
            (Some(works), Some(fast)) => {
                format!("<small>budget: {works:.0} % left, for speed {fast:.0} %</small>")
            }
        };
        let _ = write!(
            body,
            "<li class={status}>{}<strong>{}</strong><span>{}</span>{budget}</li>",
            badge(status),
            escaped(name),
            escaped(&detail)
        );
    }
    body.push_str("</ul></section>");
}

fn who_waits(body: &mut String, isolation: &[Isolation]) {
    if isolation.is_empty() {
        return;
    }
    let mut rows: Vec<&Isolation> = isolation.iter().collect();
    rows.sort_by(|a, b| (b.running + b.waiting).cmp(&(a.running + a.waiting)).then(b.work.total_cmp(&a.work)));
    body.push_str(
        "<section><h2>Who works and who waits</h2><div class=wide><table><thead><tr><th>tenant<th>running<th>waiting\
         <th>mean wait<th>p99 lately<th>work so far<th>turned away<th></tr></thead><tbody>",
    );
    for row in rows.iter().take(MOST) {
        let _ = write!(
            body,
            "<tr><th scope=row>{}<td>{}<td>{}<td>{}<td>{}<td>{:.0} s<td>{}<td>{}</tr>",
            escaped(&row.tenant),
            row.running,
            row.waiting,
            seconds(row.mean_wait),
            seconds(row.p99_wait),
            row.work,
            row.rejected,
            escaped(&row.warnings.join("; "))
        );
    }
    body.push_str("</tbody></table></div></section>");
}

fn backups(body: &mut String, picture: &Picture) {
    let states: Vec<&CheckState> =
        picture.checks.values().filter(|state| state.topic == Topic::RecoveryPoint).collect();
    if states.is_empty() {
        return;
    }
    let mut states = states;
    states.sort_by(|a, b| b.status.cmp(&a.status).then(a.check.cmp(&b.check)));
    body.push_str("<section><h2>Backups</h2><ul class=lines>");
    for state in states.iter().take(MOST) {
        let _ = write!(
            body,
            "<li class={}>{}<strong>{}</strong> {}</li>",
            state.status,
            badge(state.status),
            escaped(&state.check.to_string()),
            escaped(&state.observation.text)
        );
    }
    body.push_str("</ul></section>");
}

fn badge(status: Status) -> String {
    format!("<b class=badge>{} {status}</b>", status.sign())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const STYLE: &str = "\
:root{color-scheme:light dark;--pass:#17703a;--warn:#8a5a00;--unknown:#5a5f66;--fail:#b3261e;--line:#8884;--card:#8881}\
@media(prefers-color-scheme:dark){:root{--pass:#6fd08c;--warn:#f0b95a;--unknown:#a9b0b8;--fail:#ff8a80}}\
body{font:16px/1.45 system-ui,sans-serif;margin:0;padding:1rem;max-width:70rem;margin-inline:auto}\
h1{font-size:1.5rem;margin:0;display:flex;gap:.6rem;align-items:baseline}h2{font-size:1.1rem;margin:1.6rem 0 .5rem}h3{font-size:1rem;margin:.3rem 0}\
header p{margin:.2rem 0;opacity:.75}ul,ol{list-style:none;padding:0;margin:0;display:grid;gap:.6rem}\
.cards{grid-template-columns:repeat(auto-fill,minmax(16rem,1fr))}.grid{grid-template-columns:repeat(auto-fill,minmax(11rem,1fr))}\
li{border:1px solid var(--line);border-left:.35rem solid var(--tone,var(--line));border-radius:.5rem;padding:.6rem .75rem;background:var(--card);overflow-wrap:anywhere}\
.grid li{display:grid;gap:.1rem;align-content:start}li p{margin:.2rem 0}.lines li{padding:.35rem .75rem}\
.pass{--tone:var(--pass)}.warn{--tone:var(--warn)}.unknown{--tone:var(--unknown)}.fail{--tone:var(--fail)}\
.badge{color:var(--tone);font-size:.85rem;white-space:nowrap;margin-right:.5rem}small{opacity:.75}.calm{opacity:.75}\
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid var(--line)}\
th:first-child,td:last-child{text-align:left}#lost{position:sticky;bottom:0;background:var(--fail);color:#fff;padding:.6rem;margin:0}";

/// Replaces what is shown by what the server says now; tells when it says nothing.
const SCRIPT: &str = "\
const lost=document.getElementById('lost');\
setInterval(async()=>{try{const a=await fetch(location.href,{cache:'no-store'});if(!a.ok)throw a.status;\
const d=new DOMParser().parseFromString(await a.text(),'text/html');\
document.querySelector('main').replaceWith(d.querySelector('main'));document.title=d.title;lost.hidden=true}\
catch{lost.hidden=false}},5000);";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Engine, EngineOptions};
    use crate::model::{CheckId, Observation};

    #[test]
    fn the_page_says_in_words_and_signs_what_is_wrong_and_shows_no_tags_of_tenants() {
        let mut engine = Engine::new(EngineOptions::default());
        let now = Timestamp::UNIX_EPOCH;
        let evil = "<script>alert(1)</script>";
        let failed =
            Observation::pass(CheckId::tenant("acme", "cron"), Topic::Backlog, now, format!("job `{evil}` is late"));
        engine.observe(failed.with(Status::Fail));
        let picture = engine.picture(now);
        let services = [ServiceState {
            name: "payroll".into(),
            title: format!("Payroll {evil}"),
            status: Status::Fail,
            reasons: vec![evil.into()],
        }];
        let isolation =
            [Isolation { tenant: "acme".into(), waiting: 3, warnings: vec![evil.into()], ..Isolation::default() }];
        let sources =
            PageSources { picture: &picture, services: &services, budgets: &ByObjective::new(), isolation: &isolation };
        let page = page(&sources, now);
        assert!(!page.contains(evil), "{page}");
        for expected in ["✗ fail", "Payroll &lt;script&gt;", "Who works and who waits", "What is really wrong"] {
            assert!(page.contains(expected), "{expected}");
        }
    }
}
