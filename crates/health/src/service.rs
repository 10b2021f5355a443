//! Business services: what people do, and what it needs to be well.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::engine::{CheckState, Picture};
use crate::model::{Status, Subject};

/// A service as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceConfig {
    /// What people call it.
    pub title: String,
    /// The tenants that it is done with.
    #[serde(default)]
    pub tenants: Vec<String>,
    /// Which of their checks matter, such as `database`, `page`, `queue`; all if left out.
    #[serde(default)]
    pub checks: Vec<String>,
}

/// A service as it is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServiceState {
    /// Its name in addresses.
    pub name: String,
    /// What people call it.
    pub title: String,
    /// How it is: the worst of what it needs.
    pub status: Status,
    /// Why, if it is not well: the causes, the worst first.
    pub reasons: Vec<String>,
}

impl ServiceConfig {
    /// How the service is.
    pub fn state(&self, name: &str, picture: &Picture) -> ServiceState {
        let matters = |state: &&CheckState| self.checks.is_empty() || self.checks.contains(&state.check.aspect);
        let subjects: Vec<Subject> = self.tenants.iter().map(|tenant| Subject::Tenant(tenant.clone())).collect();
        let mut states: Vec<&CheckState> =
            subjects.iter().flat_map(|subject| picture.of(subject)).filter(matters).collect();
        states.sort_by(|a, b| b.status.cmp(&a.status).then(a.check.cmp(&b.check)));
        // Somebody about whom nothing is known is not well.
        let known = subjects.iter().all(|subject| states.iter().any(|state| state.check.subject == *subject));
        let worst = Status::worst(states.iter().map(|state| state.status));
        let mut reasons: Vec<String> = Vec::new();
        for state in states.iter().filter(|state| state.status != Status::Pass) {
            let reason = match &state.because_of {
                Some(cause) => picture
                    .checks
                    .get(&cause.to_string())
                    .map_or_else(|| cause.to_string(), |cause| format!("{}: {}", cause.check, cause.observation.text)),
                None => format!("{}: {}", state.check, state.observation.text),
            };
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
        let status = if known { worst } else { worst.max(Status::Unknown) };
        ServiceState { name: name.to_owned(), title: self.title.clone(), status, reasons }
    }
}

/// Every service as it is, by name.
pub fn states(services: &BTreeMap<String, ServiceConfig>, picture: &Picture) -> Vec<ServiceState> {
    services.iter().map(|(name, service)| service.state(name, picture)).collect()
}

/// `application/health+json`, as `draft-inadarei-api-health-check` has it, of the checks that are given.
///
/// (`reference`: Health, "`application/health+json` (draft-inadarei)".)
pub fn health_json<'a>(description: &str, checks: impl IntoIterator<Item = &'a CheckState>) -> Value {
    let checks: Vec<&CheckState> = checks.into_iter().collect();
    let mut by_name: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for state in &checks {
        let (kind, id) = match &state.check.subject {
            Subject::Tenant(name) => ("tenant", name),
            Subject::Shared(name) => ("shared", name),
        };
        let figure = state.observation.evidence.first();
        let mut entry = json!({
            "componentId": id,
            "componentType": kind,
            "status": word(state.status),
            "time": state.observation.at.to_string(),
            "output": state.observation.text,
        });
        if let (Some(figure), Some(entry)) = (figure, entry.as_object_mut()) {
            entry.insert("observedValue".to_owned(), json!(figure.value));
            entry.insert("observedUnit".to_owned(), json!(figure.unit));
        }
        if let (Some(cause), Some(entry)) = (&state.because_of, entry.as_object_mut()) {
            entry.insert("becauseOf".to_owned(), json!(cause.to_string()));
        }
        by_name.entry(state.check.aspect.clone()).or_default().push(entry);
    }
    let status = checks.iter().map(|state| state.status).max().unwrap_or(Status::Unknown);
    json!({ "status": word(status), "description": description, "checks": by_name })
}

/// The draft has three words: what nobody knows is a warning in it.
fn word(status: Status) -> &'static str {
    match status {
        Status::Pass => "pass",
        Status::Warn | Status::Unknown => "warn",
        Status::Fail => "fail",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Engine, EngineOptions, Hysteresis};
    use crate::model::{CheckId, Evidence, Observation, Topic};
    use jiff::Timestamp;

    #[test]
    fn a_service_is_as_well_as_the_worst_that_it_needs_and_says_why() {
        let hysteresis = Hysteresis { worse_after: 1, better_after: 1 };
        let mut engine = Engine::new(EngineOptions { hysteresis, ..EngineOptions::default() });
        let now = Timestamp::UNIX_EPOCH;
        let cluster = CheckId::shared("cluster main", "reachable");
        let see = |check: CheckId, status, text: &str| {
            Observation::pass(check, Topic::Availability, now, text).with(status).figure(Evidence::new("x", 1.0, "s"))
        };
        for tenant in ["acme", "beta"] {
            engine.subject_needs(Subject::Tenant(tenant.into()), cluster.clone());
            engine.observe(see(CheckId::tenant(tenant, "database"), Status::Fail, "gone"));
            engine.observe(see(CheckId::tenant(tenant, "mail"), Status::Warn, "mails wait"));
        }
        engine.observe(see(cluster, Status::Fail, "it does not answer"));
        let picture = engine.picture(now);
        let payroll = ServiceConfig {
            title: "Payroll".into(),
            tenants: vec!["acme".into(), "beta".into()],
            checks: vec!["database".into()],
        };
        let state = payroll.state("payroll", &picture);
        assert_eq!(state.status, Status::Fail);
        assert_eq!(state.reasons, ["cluster main: reachable: it does not answer"], "one cause, once");
        let unknown = ServiceConfig { tenants: vec!["nobody".into()], ..payroll };
        assert_eq!(unknown.state("x", &picture).status, Status::Unknown);

        let json = health_json("acme", picture.of(&Subject::Tenant("acme".into())));
        assert_eq!(json["status"], "fail");
        assert_eq!(json["checks"]["database"][0]["becauseOf"], "cluster main: reachable");
        assert_eq!(json["checks"]["mail"][0]["status"], "warn");
        assert_eq!(health_json("nothing", [])["status"], "warn");
    }
}
