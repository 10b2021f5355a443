//! Looks after servers, apart from what users ask of them.
//!
//! A prefork server with all workers busy answers nobody, and is alive: it is asked only while it has a worker to spare, and
//! counts as well when it can be connected to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cofferdam_fairness::Timestamp;
use cofferdam_tenant::HealthConfig;
use http::header;
use pingora_http::RequestHeader;

use crate::plane::HttpPlane;
use crate::pool::{PoolAccess, ServerLoad};
use crate::upstream;

/// How often it is looked whether a server is due.
const TICK: Duration = Duration::from_millis(100);

/// What is known of a server's health.
#[derive(Debug)]
pub(crate) struct Health {
    is_well: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When it is looked at next.
    due: Option<Timestamp>,
    is_asked: bool,
    /// Answers in a row that say otherwise than `is_well`.
    against: u32,
    /// How often everything was forgotten: an answer to a question from before counts no more.
    forgotten: u64,
}

impl Default for Health {
    fn default() -> Self {
        Self { is_well: AtomicBool::new(true), state: Mutex::default() }
    }
}

impl Health {
    pub(crate) fn is_well(&self) -> bool {
        self.is_well.load(Ordering::Relaxed)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is time to ask; then somebody has to, and bring the number back with the answer.
    fn is_due(&self, now: Timestamp) -> Option<u64> {
        let mut state = self.state();
        let due = !state.is_asked && state.due.is_none_or(|due| now >= due);
        state.is_asked |= due;
        due.then_some(state.forgotten)
    }

    /// Takes an answer. True when it changes what is thought of the server.
    fn answered(&self, config: &HealthConfig, asked: u64, well: bool, now: Timestamp) -> bool {
        let mut state = self.state();
        if state.forgotten != asked {
            return false;
        }
        state.is_asked = false;
        state.due = Some(now + config.interval.0);
        if well == self.is_well() {
            state.against = 0;
            return false;
        }
        state.against += 1;
        let enough = if well { config.healthy_after } else { config.unhealthy_after };
        let changes = state.against >= enough.max(1);
        if changes {
            state.against = 0;
            self.is_well.store(well, Ordering::Relaxed);
        }
        changes
    }

    /// Nobody looks after it any more.
    pub(crate) fn forget(&self) {
        let mut state = self.state();
        *state = State { forgotten: state.forgotten + 1, ..State::default() };
        self.is_well.store(true, Ordering::Relaxed);
    }
}

/// Looks after all servers of all pools that want it, until the plane is cut.
pub(crate) async fn run(plane: Arc<HttpPlane>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tick.tick().await;
        let (snapshot, now) = (plane.snapshot(), plane.now());
        for access in snapshot.pools() {
            let Some(config) = &access.pool.health else { continue };
            for (n, load) in access.servers().iter().enumerate() {
                if let Some(asked) = load.health.is_due(now) {
                    let (plane, access, config) = (Arc::clone(&plane), Arc::clone(access), config.clone());
                    tokio::spawn(async move { look_at(&plane, &access, n, &config, asked).await });
                }
            }
        }
    }
}

async fn look_at(plane: &HttpPlane, access: &PoolAccess, n: usize, config: &HealthConfig, asked_at: u64) {
    let Some(load) = access.servers().get(n) else { return };
    let is_busy = || access.is_full(load);
    let asked = tokio::time::timeout(config.timeout.0, ask(load, config, is_busy())).await;
    // It may have become busy while it was asked.
    let well = asked.unwrap_or_else(|_| is_busy());
    if load.health.answered(config, asked_at, well, plane.now()) {
        let (pool, server) = (&access.pool.name, &load.server.address);
        if well {
            tracing::info!(%pool, %server, "a server is well again");
        } else {
            tracing::warn!(%pool, %server, "a server is ill: it is asked last");
        }
    }
}

async fn ask(load: &ServerLoad, config: &HealthConfig, is_busy: bool) -> bool {
    let Ok(mut server) = upstream::connect(&load.server.address, config.timeout.0).await else { return false };
    if is_busy {
        return true;
    }
    let Ok(mut head) = RequestHeader::build("GET", config.path.as_bytes(), None) else { return false };
    let filled = head
        .insert_header(header::HOST, load.server.address.to_string())
        .and_then(|()| head.insert_header(header::CONNECTION, "close"));
    filled.is_ok()
        && server.write_request_header(Box::new(head)).await.is_ok()
        && server.read_response().await.is_ok()
        && server.resp_header().is_some_and(|head| head.status.as_u16() < 500)
}
