//! Looking at things, without ever becoming what one looks for.
//!
//! A [`Probe`] looks at one thing and says what it has found. It is given a deadline; it opens few connections and closes
//! them; it never retries. Whoever runs it ([`crate::Watcher`]) spreads probes over their interval and bounds how many run.

mod backups;
mod certificate;
pub mod conformance;
mod disk;
mod flow;
mod gateway;
mod http;
mod kubernetes;
mod odoo;
mod postgres;
mod repository;
mod store;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

pub use backups::BackupsProbe;
pub use certificate::CertificateProbe;
pub use disk::DiskProbe;
pub use flow::{LoginProbe, WebSocketProbe};
pub use gateway::GatewayProbe;
pub use http::HttpProbe;
pub use kubernetes::{KubernetesApi, KubernetesProbe, KubernetesServer};
pub use odoo::{TenantLimits, TenantProbe, ThroughProbe};
pub use postgres::{ClusterLimits, ClusterProbe, Database, Tls};
pub(crate) use postgres::{Look, LookError, reason};
pub use repository::{RepositoryProbe, WriteAndRead};
pub use store::RedisProbe;

use crate::model::{CheckId, Observation, Status, Topic};

/// Something that can be looked at.
#[async_trait]
pub trait Probe: Send + Sync {
    /// What it is called where probes are listed; unique.
    fn name(&self) -> String;

    /// Everything that it looks at, so that what it cannot say can be said for it: when it takes too long, all of this is
    /// unknown or, where the probe says so, failing.
    fn checks(&self) -> Vec<CheckId>;

    /// The check that fails when there is no answer at all.
    fn reachability(&self) -> CheckId;

    /// How often it should be looked at.
    fn interval(&self) -> Duration;

    /// Its kind. Those of one kind share a bound on how many look at a time.
    fn kind(&self) -> &'static str {
        "other"
    }

    /// What kind of trouble it would be if nothing could be seen.
    fn topic(&self) -> Topic {
        Topic::Availability
    }

    /// Whether a look that lasts costs whoever is looked at nothing more: an open connection. Others do not wait for it then.
    fn waits(&self) -> bool {
        false
    }

    /// How long looking may take.
    fn timeout(&self) -> Duration {
        Duration::from_secs(5)
    }

    /// Looks once. `now` is what observations are dated with. Cancel-safe: whatever it has opened closes when the future is
    /// dropped.
    async fn look(&self, now: Timestamp) -> Vec<Observation>;
}

/// Looks within the probe's time. What has not been said by then is said here.
pub async fn look(probe: &dyn Probe, now: Timestamp) -> Vec<Observation> {
    let started = std::time::Instant::now();
    let limit = probe.timeout();
    let mut found = tokio::time::timeout(limit, probe.look(now)).await.unwrap_or_else(|_| {
        let text = format!("no answer within {} s", limit.as_secs_f64());
        vec![Observation::pass(probe.reachability(), probe.topic(), now, text).with(Status::Fail)]
    });
    for check in probe.checks() {
        if !found.iter().any(|observation| observation.check == check) {
            let text = "it could not be looked at";
            found.push(Observation::pass(check, probe.topic(), now, text).with(Status::Unknown));
        }
    }
    for observation in &mut found {
        observation.text = one_line(&observation.text);
    }
    let took = started.elapsed();
    for observation in found.iter_mut().filter(|observation| observation.took_ms == 0.0) {
        observation.took_ms = took.as_secs_f64() * 1_000.0;
    }
    found
}

/// What a tenant may have written is in it: no line of its own, and no more than anybody reads.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST_TEXT).collect()
}

const LONGEST_TEXT: usize = 500;

/// Runs something that may block, and perhaps for ever: not a second time while the first still hangs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Alone(Arc<AtomicBool>);

impl Alone {
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
        struct Leaves(Arc<AtomicBool>);
        impl Drop for Leaves {
            fn drop(&mut self) {
                self.0.store(false, Ordering::SeqCst);
            }
        }
        if self.0.swap(true, Ordering::SeqCst) {
            return Err("the look before this one still hangs".to_owned());
        }
        let leaves = Leaves(Arc::clone(&self.0));
        let work = move || {
            let _leaves = leaves;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())
    }
}

/// Seconds as people say them.
pub(crate) fn seconds(value: f64) -> String {
    match value {
        v if v < 1.0 => format!("{:.0} ms", v * 1_000.0),
        v if v < 120.0 => format!("{v:.0} s"),
        v if v < 7_200.0 => format!("{:.0} min", v / 60.0),
        v if v < 172_800.0 => format!("{:.0} h", v / 3_600.0),
        v => format!("{:.0} days", v / 86_400.0),
    }
}

/// Bytes as people say them.
pub(crate) fn bytes(value: f64) -> String {
    let mut amount = value;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if amount < 1_024.0 {
            return format!("{amount:.0} {unit}");
        }
        amount /= 1_024.0;
    }
    format!("{amount:.1} TiB")
}

/// Below `warn` it passes, below `fail` it is a warning.
pub(crate) fn graded(value: f64, warn: f64, fail: f64) -> Status {
    if value >= fail {
        Status::Fail
    } else if value >= warn {
        Status::Warn
    } else {
        Status::Pass
    }
}

/// TLS as browsers speak it, with the authorities that this machine trusts.
pub(crate) fn client_config() -> Result<rustls::ClientConfig, String> {
    cofferdam_tls::towards_anybody().map_err(|e| e.to_string())
}
