//! A gateway: is it there, does it welcome traffic, and is more waiting at its gates than it can work on.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use cofferdam_tenant::Secret;
use jiff::Timestamp;
use serde::Deserialize;

use super::{Probe, graded, seconds};
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Looks at a gateway through its admin listener.
#[derive(Debug)]
pub struct GatewayProbe {
    name: String,
    url: String,
    token: Option<Secret>,
    interval: Duration,
    client: reqwest::Client,
}

/// So many times more work waits than there are open slots: a warning, a failure.
const LIMITS: (f64, f64) = (2.0, 10.0);

#[derive(Debug, Deserialize)]
struct Gate {
    plane: String,
    name: String,
    open_slots: u32,
    running: u32,
    waiting: u32,
}

impl GatewayProbe {
    /// A probe of the gateway with a name whose admin listener is at `url`, such as `http://127.0.0.1:9180`.
    pub fn new(name: &str, url: &str, token: Option<Secret>, interval: Duration) -> Result<Self, String> {
        reqwest::Url::parse(url).map_err(|e| e.to_string())?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(super::client_config()?)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(|e| e.to_string())?;
        let url = url.trim_end_matches('/').to_owned();
        Ok(Self { name: name.to_owned(), url, token, interval, client })
    }

    /// The check that says whether a gateway is there at all.
    pub fn reachable(name: &str) -> CheckId {
        CheckId::shared(&format!("gateway {name}"), "reachable")
    }

    fn id(&self, aspect: &str) -> CheckId {
        CheckId::shared(&format!("gateway {}", self.name), aspect)
    }

    async fn fetch(&self) -> Result<(bool, Vec<Gate>), reqwest::Error> {
        let ready = self.client.get(format!("{}/readyz", self.url)).send().await?.status().is_success();
        let mut request = self.client.get(format!("{}/api/v1/gates", self.url));
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        let gates = request.send().await?.error_for_status()?.json().await?;
        Ok((ready, gates))
    }
}

#[async_trait]
impl Probe for GatewayProbe {
    fn name(&self) -> String {
        format!("gateway {}", self.name)
    }

    fn checks(&self) -> Vec<CheckId> {
        vec![self.id("reachable"), self.id("queues")]
    }

    fn reachability(&self) -> CheckId {
        self.id("reachable")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let started = Instant::now();
        let reachable = |status, text: String| {
            Observation::pass(self.reachability(), Topic::Availability, now, text).with(status).took(started.elapsed())
        };
        let (ready, gates) = match self.fetch().await {
            Ok(found) => found,
            // It is there, and traffic goes through it.
            Err(error) if error.status().is_some_and(|status| status.is_client_error()) => {
                let status = error.status().map_or(0, |status| status.as_u16());
                let text = format!("its admin listener answers {status}: is the token right?");
                return vec![reachable(Status::Warn, text)];
            }
            Err(error) => {
                let text = format!("its admin listener does not answer: {}", error.without_url());
                return vec![reachable(Status::Fail, text)];
            }
        };
        let took = seconds(started.elapsed().as_secs_f64());
        let found = if ready {
            reachable(Status::Pass, format!("it answers in {took}, and welcomes traffic"))
        } else {
            reachable(Status::Warn, "it drains: no new traffic is welcome".to_owned())
        };
        let crowd = |gate: &Gate| f64::from(gate.waiting) / f64::from(gate.open_slots.max(1));
        let worst = gates.iter().max_by(|a, b| crowd(a).total_cmp(&crowd(b)));
        let (share, text) = match worst {
            Some(gate) if gate.waiting > 0 => {
                let Gate { plane, name, open_slots, running, waiting } = gate;
                (crowd(gate), format!("at {plane} {name} {waiting} wait, {running} work on {open_slots} slots"))
            }
            _ => (0.0, format!("nobody waits at {} gates", gates.len())),
        };
        let queues = Observation::pass(self.id("queues"), Topic::Backlog, now, text)
            .with(graded(share, LIMITS.0, LIMITS.1))
            .figure(Evidence::new("waiting_per_slot", share, "").warned(LIMITS.0).limited(LIMITS.1));
        vec![found, queues]
    }
}
