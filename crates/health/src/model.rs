//! What is known of something's health: a status, words, and the figures behind them.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How something is. In order: the later, the worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Pass,
    /// Still working; somebody should look soon.
    Warn,
    /// Nobody knows: it could not be looked at, or not lately.
    #[default]
    Unknown,
    /// Not working.
    Fail,
}

impl Status {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Warn => "warn",
            Self::Unknown => "unknown",
            Self::Fail => "fail",
        }
    }

    /// A sign for those who do not see colours.
    pub fn sign(self) -> &'static str {
        match self {
            Self::Pass => "✓",
            Self::Warn => "!",
            Self::Unknown => "?",
            Self::Fail => "✗",
        }
    }

    /// The worst of several; pass if there is none.
    pub fn worst(all: impl IntoIterator<Item = Self>) -> Self {
        all.into_iter().max().unwrap_or(Self::Pass)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a check is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Subject {
    /// One tenant.
    Tenant(String),
    /// A server or a service that tenants share: a PostgreSQL cluster, a pool of Odoo workers, Redis.
    Shared(String),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tenant(name) => write!(f, "tenant {name}"),
            Self::Shared(name) => f.write_str(name),
        }
    }
}

/// What kind of trouble a check is about. Some kinds can be borne for a while, when everybody knows why; some never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Topic {
    /// It works at all.
    Availability,
    /// It works fast enough. Thresholds move with the business calendar.
    Latency,
    /// Work that waits: jobs, mails, queues. Thresholds move with the business calendar.
    Backlog,
    /// Room: disk, memory, connections, transaction numbers.
    Capacity,
    /// What would be lost. Never muted.
    RecoveryPoint,
    /// Certificates, and whatever else keeps others out. Never muted.
    Security,
}

impl Topic {
    /// Whether a business event may be a reason to bear it.
    pub fn is_bearable(self) -> bool {
        matches!(self, Self::Latency | Self::Backlog)
    }
}

/// A figure behind a status.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Evidence {
    /// What was measured, such as `replay_lag`.
    pub name: String,
    /// How much.
    pub value: f64,
    /// In what: `s`, `B`, `%`, or nothing for numbers.
    pub unit: String,
    /// From this on it is a failure.
    pub limit: Option<f64>,
    /// From this on it is a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warn: Option<f64>,
}

impl Evidence {
    /// A figure.
    pub fn new(name: &str, value: f64, unit: &str) -> Self {
        Self { name: name.to_owned(), value, unit: unit.to_owned(), limit: None, warn: None }
    }

    /// A figure and from where on it is a warning.
    #[must_use]
    pub fn warned(mut self, warn: f64) -> Self {
        self.warn = Some(warn);
        self
    }

    /// A figure and from where on it is a failure.
    #[must_use]
    pub fn limited(mut self, limit: f64) -> Self {
        self.limit = Some(limit);
        self
    }
}

/// The name of a check: what it is about and what it looks at, `tenant/acme/cron`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct CheckId {
    /// What it is about.
    pub subject: Subject,
    /// What it looks at, such as `database` or `cron`.
    pub aspect: String,
}

impl CheckId {
    /// A check of a tenant's.
    pub fn tenant(tenant: &str, aspect: &str) -> Self {
        Self { subject: Subject::Tenant(tenant.to_owned()), aspect: aspect.to_owned() }
    }

    /// A check of something that is shared.
    pub fn shared(name: &str, aspect: &str) -> Self {
        Self { subject: Subject::Shared(name.to_owned()), aspect: aspect.to_owned() }
    }
}

impl fmt::Display for CheckId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.aspect)
    }
}

/// What one look at something has found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Observation {
    /// Of what.
    pub check: CheckId,
    /// What kind of trouble it would be.
    pub topic: Topic,
    /// How it is.
    pub status: Status,
    /// In words, for somebody who has just been woken: what is, and what should be.
    pub text: String,
    /// The figures.
    pub evidence: Vec<Evidence>,
    /// When.
    pub at: Timestamp,
    /// How long looking took, in milliseconds.
    pub took_ms: f64,
}

impl Observation {
    /// An observation that all is well.
    pub fn pass(check: CheckId, topic: Topic, at: Timestamp, text: impl Into<String>) -> Self {
        Self { check, topic, status: Status::Pass, text: text.into(), evidence: Vec::new(), at, took_ms: 0.0 }
    }

    /// With a status.
    #[must_use]
    pub fn with(mut self, status: Status) -> Self {
        self.status = status;
        self
    }

    /// With a figure.
    #[must_use]
    pub fn figure(mut self, evidence: Evidence) -> Self {
        self.evidence.push(evidence);
        self
    }

    /// With the time that looking took.
    #[must_use]
    pub fn took(mut self, took: Duration) -> Self {
        self.took_ms = took.as_secs_f64() * 1_000.0;
        self
    }
}
