//! A place for backups: whether what is written there can be read again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;

use super::{Alone, Probe, graded, seconds};
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Writes something, reads it again, compares, removes it; says in words what went wrong. May block.
pub type WriteAndRead = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Writes to a store and reads from it.
#[derive(Clone)]
pub struct RepositoryProbe {
    /// What it is called.
    pub name: String,
    /// What writes and reads.
    pub try_it: WriteAndRead,
    /// How often to look.
    pub interval: Duration,
    alone: Alone,
}

impl RepositoryProbe {
    /// A probe of a place for backups.
    pub fn new(name: &str, try_it: WriteAndRead, interval: Duration) -> Self {
        Self { name: name.to_owned(), try_it, interval, alone: Alone::default() }
    }
}

impl std::fmt::Debug for RepositoryProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RepositoryProbe").field("name", &self.name).finish_non_exhaustive()
    }
}

#[async_trait]
impl Probe for RepositoryProbe {
    fn name(&self) -> String {
        format!("repository {}", self.name)
    }

    fn kind(&self) -> &'static str {
        "repository"
    }

    fn checks(&self) -> Vec<CheckId> {
        vec![self.reachability()]
    }

    fn reachability(&self) -> CheckId {
        CheckId::shared(&format!("repository {}", self.name), "writes and reads")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    fn topic(&self) -> Topic {
        Topic::RecoveryPoint
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(60)
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let started = Instant::now();
        let try_it = Arc::clone(&self.try_it);
        let tried = self.alone.run(move || try_it()).await.and_then(|tried| tried);
        let took = started.elapsed().as_secs_f64();
        let (status, text) = match tried {
            Ok(()) => (graded(took, 10.0, f64::INFINITY), format!("written and read again in {}", seconds(took))),
            Err(error) => (Status::Fail, format!("what is written cannot be read again: {error}")),
        };
        vec![
            Observation::pass(self.reachability(), Topic::RecoveryPoint, now, text)
                .with(status)
                .figure(Evidence::new("written_and_read_in", took, "s").limited(10.0)),
        ]
    }
}
