//! Redis: is it there, does it throw away what somebody still needs, how long does it take.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use cofferdam_tenant::Secret;
use jiff::Timestamp;
use tokio::sync::Mutex;

use super::{Probe, bytes, graded, seconds};
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Looks at a Redis server.
pub struct RedisProbe {
    name: String,
    client: redis::Client,
    /// Per cent of `maxmemory`: a warning, a failure.
    memory: (f64, f64),
    interval: Duration,
    /// Keys thrown away, when they were last counted.
    evicted: Mutex<Option<u64>>,
}

impl RedisProbe {
    /// A probe of the server with a name, at `host` and `port`. Connects when it looks.
    pub fn new(
        name: &str,
        host: &str,
        port: u16,
        password: Option<&Secret>,
        interval: Duration,
    ) -> Result<Self, String> {
        let mut settings = redis::RedisConnectionInfo::default();
        if let Some(password) = password {
            settings = settings.set_password(password.expose());
        }
        let address = redis::ConnectionAddr::Tcp(host.to_owned(), port);
        let info = redis::IntoConnectionInfo::into_connection_info(address)
            .map_err(|e| e.to_string())?
            .set_redis_settings(settings);
        let client = redis::Client::open(info).map_err(|e| e.to_string())?;
        Ok(Self { name: name.to_owned(), client, memory: (80.0, 95.0), interval, evicted: Mutex::new(None) })
    }

    fn id(&self, aspect: &str) -> CheckId {
        CheckId::shared(&format!("redis {}", self.name), aspect)
    }
}

#[async_trait]
impl Probe for RedisProbe {
    fn name(&self) -> String {
        format!("redis {}", self.name)
    }

    fn checks(&self) -> Vec<CheckId> {
        ["reachable", "memory", "evictions"].iter().map(|aspect| self.id(aspect)).collect()
    }

    fn reachability(&self) -> CheckId {
        self.id("reachable")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let started = Instant::now();
        let read = async {
            let mut connection = self.client.get_multiplexed_async_connection().await?;
            let asked = Instant::now();
            let _: String = redis::cmd("PING").query_async(&mut connection).await?;
            let latency = asked.elapsed();
            let text: String = redis::cmd("INFO").query_async(&mut connection).await?;
            Ok::<_, redis::RedisError>((latency, text))
        };
        let (latency, info) = match read.await {
            Ok(found) => found,
            Err(error) => {
                let text = format!("it does not answer: {error}");
                let failed = Observation::pass(self.reachability(), Topic::Availability, now, text);
                return vec![failed.with(Status::Fail).took(started.elapsed())];
            }
        };
        let value = |name: &str| {
            info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse::<f64>().ok())
        };
        let latency = latency.as_secs_f64();
        let mut found = vec![
            Observation::pass(
                self.reachability(),
                Topic::Availability,
                now,
                format!("it answers in {}", seconds(latency)),
            )
            .figure(Evidence::new("answered_in", latency, "s"))
            .took(started.elapsed()),
        ];
        let (used, most) = (value("used_memory").unwrap_or(0.0), value("maxmemory").unwrap_or(0.0));
        let share = if most > 0.0 { 100.0 * used / most } else { 0.0 };
        let text = if most > 0.0 {
            format!("{} of {} are used", bytes(used), bytes(most))
        } else {
            format!("{} are used, and no limit is set", bytes(used))
        };
        found.push(
            Observation::pass(self.id("memory"), Topic::Capacity, now, text)
                .with(graded(share, self.memory.0, self.memory.1))
                .figure(Evidence::new("memory_used", share, "%").limited(self.memory.1)),
        );
        let evicted = value("evicted_keys").unwrap_or(0.0) as u64;
        let before = self.evicted.lock().await.replace(evicted);
        // A server that was started anew counts from nought.
        let lately = before.map_or(0, |before| evicted.checked_sub(before).unwrap_or(evicted));
        let text = if lately > 0 {
            format!(
                "{lately} keys were thrown away since the last look: sessions end and caches are cold, for want of memory"
            )
        } else {
            "nothing is thrown away".to_owned()
        };
        found.push(
            Observation::pass(self.id("evictions"), Topic::Capacity, now, text)
                .with(if lately > 0 { Status::Fail } else { Status::Pass })
                .figure(Evidence::new("keys_evicted", lately as f64, "").limited(0.0)),
        );
        found
    }
}
