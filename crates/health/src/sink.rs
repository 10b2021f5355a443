//! Where notices go: a webhook, Alertmanager. What cannot be sent is tried again with the next.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::alert::{Notice, Phase};
use crate::model::Subject;
use crate::slo::Urgency;

/// Sends notices.
#[derive(Debug)]
pub struct Sinks {
    client: reqwest::Client,
    sinks: Vec<Sink>,
}

#[derive(Debug)]
struct Sink {
    url: String,
    kind: Kind,
    /// What could not be sent yet, oldest first.
    waiting: VecDeque<Notice>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Webhook,
    Alertmanager,
}

/// More than this is not kept for a sink that does not answer: the oldest go.
const WAITING: usize = 1_000;
const LIMIT: Duration = Duration::from_secs(5);

impl Sinks {
    /// Sinks for a webhook's address and Alertmanager's, where there are any.
    pub fn new(webhook: Option<&str>, alertmanager: Option<&str>) -> Result<Self, String> {
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(crate::probe::client_config()?)
            .timeout(LIMIT)
            .build()
            .map_err(|e| e.to_string())?;
        let sink = |url: &str, kind| Sink { url: url.to_owned(), kind, waiting: VecDeque::new() };
        let webhook = webhook.map(|url| sink(url, Kind::Webhook));
        let alertmanager =
            alertmanager.map(|url| sink(&format!("{}/api/v2/alerts", url.trim_end_matches('/')), Kind::Alertmanager));
        Ok(Self { client, sinks: webhook.into_iter().chain(alertmanager).collect() })
    }

    /// Tells Alertmanager what is still open: what it has not heard of for five minutes is over for it. To be called every
    /// minute.
    pub async fn refresh(&self, open: &[&Notice]) -> Vec<String> {
        let mut problems = Vec::new();
        let body = Value::Array(open.iter().map(|notice| to_alertmanager(notice)).collect());
        for sink in self.sinks.iter().filter(|sink| sink.kind == Kind::Alertmanager && !open.is_empty()) {
            let sent = self.client.post(&sink.url).json(&body).send().await;
            if let Err(error) = sent.and_then(reqwest::Response::error_for_status) {
                problems.push(format!("{:?}: {}", sink.kind, error.without_url()));
            }
        }
        problems
    }

    /// Sends notices, and those that are still waiting. What went wrong, by sink; what was not sent then waits.
    pub async fn send(&mut self, notices: &[Notice]) -> Vec<String> {
        let mut problems = Vec::new();
        for sink in &mut self.sinks {
            sink.waiting.extend(notices.iter().cloned());
            while sink.waiting.len() > WAITING {
                sink.waiting.pop_front();
            }
            if sink.waiting.is_empty() {
                continue;
            }
            let all: Vec<Notice> = sink.waiting.iter().cloned().collect();
            let body = match sink.kind {
                Kind::Webhook => json!({ "notices": all }),
                Kind::Alertmanager => Value::Array(all.iter().map(to_alertmanager).collect()),
            };
            let sent = self.client.post(&sink.url).json(&body).send().await;
            match sent.and_then(reqwest::Response::error_for_status) {
                Ok(_) => sink.waiting.clear(),
                // Without the address, which may have a token in it.
                Err(error) => problems.push(format!("{:?}: {}", sink.kind, error.without_url())),
            }
        }
        problems
    }
}

/// As `POST /api/v2/alerts` of Alertmanager takes it.
fn to_alertmanager(notice: &Notice) -> Value {
    let (kind, name) = match &notice.check.subject {
        Subject::Tenant(name) => ("tenant", name),
        Subject::Shared(name) => ("shared", name),
    };
    let severity = match notice.urgency {
        Urgency::Page => "page",
        Urgency::Ticket => "ticket",
    };
    let mut alert = json!({
        "labels": {
            "alertname": "CofferdamHealth",
            "key": notice.key,
            kind: name,
            "aspect": notice.check.aspect,
            "topic": notice.topic,
        },
        "annotations": { "summary": notice.summary, "severity": severity, "consequences": notice.consequences.to_string() },
        "startsAt": notice.since.to_string(),
    });
    if notice.phase == Phase::Resolved
        && let Some(alert) = alert.as_object_mut()
    {
        alert.insert("endsAt".to_owned(), json!(Timestamp::now().to_string()));
    }
    alert
}
