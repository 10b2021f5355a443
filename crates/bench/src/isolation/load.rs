//! Victims that want something at a steady rate, and aggressors that want as much as they can get.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cofferdam_testkit::load::HttpClient;
use cofferdam_testkit::postgres::connect;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Connections of one victim: so many of its transactions can be under way at once.
const VICTIM_CONNECTIONS: usize = 10;
/// After a refusal an aggressor waits this long.
const BACKOFF: Duration = Duration::from_millis(50);
/// A call that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whom to call, and with what.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// A PostgreSQL server or something that looks like one: the statements of one transaction, one round trip each.
    Postgres { port: u16, user: String, password: String, database: String, statements: Arc<[String]> },
    /// A web server.
    Http { address: SocketAddr, host: String, path: String },
}

enum Connection {
    Postgres(tokio_postgres::Client),
    Http(HttpClient),
}

impl Target {
    async fn connect(&self) -> Result<Connection, String> {
        match self {
            Self::Postgres { port, user, password, database, .. } => {
                connect(*port, user, password, database).await.map(Connection::Postgres).map_err(|e| e.to_string())
            }
            Self::Http { address, .. } => {
                HttpClient::connect(*address).await.map(Connection::Http).map_err(|e| e.to_string())
            }
        }
    }

    /// One piece of work. The connection is gone after a failure.
    async fn call(&self, connection: &mut Option<Connection>) -> Result<(), String> {
        let mut open = match connection.take() {
            Some(open) => open,
            None => self.connect().await?,
        };
        let keep = match (self, &mut open) {
            (Self::Postgres { statements, .. }, Connection::Postgres(client)) => {
                for statement in &**statements {
                    if let Err(error) = client.batch_execute(statement).await {
                        return Err(error.as_db_error().map_or_else(|| error.to_string(), |e| e.message().to_owned()));
                    }
                }
                true
            }
            (Self::Http { host, path, .. }, Connection::Http(client)) => {
                let response = client.get(host, path).await.map_err(|e| e.to_string())?;
                if response.status != 200 {
                    return Err(format!("status {}: {}", response.status, response.text()));
                }
                response.reusable
            }
            _ => false,
        };
        if keep {
            *connection = Some(open);
        }
        Ok(())
    }
}

/// What happened to the victims' transactions, by when they were due.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    samples: Mutex<Vec<Sample>>,
    /// When transactions were due, finished or not.
    due: Mutex<Vec<Instant>>,
    first_error: Mutex<Option<String>>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) due: Instant,
    /// Milliseconds from when it was due; `None`: it failed.
    pub(super) latency_ms: Option<f64>,
}

impl Recorder {
    fn record(&self, due: Instant, outcome: Result<(), String>) {
        let latency_ms = outcome.is_ok().then(|| due.elapsed().as_secs_f64() * 1e3);
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).push(Sample { due, latency_ms });
        if let Err(error) = outcome {
            self.first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    /// What was due in a time.
    pub(super) fn between(&self, from: Instant, to: Instant) -> Vec<Sample> {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.iter().filter(|s| s.due >= from && s.due < to).copied().collect()
    }

    /// How many were due in a time.
    pub(super) fn due_between(&self, from: Instant, to: Instant) -> usize {
        let due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        due.iter().filter(|d| **d >= from && **d < to).count()
    }

    pub(super) fn first_error(&self) -> Option<String> {
        self.first_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Wants `rate` transactions a second, at random moments, whatever becomes of them: latency counts from when one was
/// due, so waiting for a connection is not forgotten.
pub(super) async fn victim(target: Target, rate: f64, seed: u64, recorder: Arc<Recorder>, stop: CancellationToken) {
    let (due, queue) = mpsc::unbounded_channel::<Instant>();
    let queue = Arc::new(tokio::sync::Mutex::new(queue));
    for _ in 0..VICTIM_CONNECTIONS {
        let (target, queue, recorder) = (target.clone(), Arc::clone(&queue), Arc::clone(&recorder));
        let stop = stop.clone();
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            let mut connection = target.connect().await.ok();
            loop {
                let Some(due) = queue.lock().await.recv().await else { return };
                let outcome = tokio::time::timeout(PATIENCE, target.call(&mut connection)).await;
                recorder.record(due, outcome.unwrap_or_else(|_| Err("no answer in time".into())));
            }
        }));
    }
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut next = Instant::now();
    loop {
        next += Duration::from_secs_f64(-(1.0 - rng.f64()).ln() / rate);
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            () = stop.cancelled() => return,
        }
        recorder.due.lock().unwrap_or_else(PoisonError::into_inner).push(next);
        if due.send(next).is_err() {
            return;
        }
    }
}

/// Counts finished work.
#[derive(Debug, Default)]
pub(super) struct Counter {
    done: AtomicU64,
    refused: AtomicU64,
    first_error: Mutex<Option<String>>,
}

impl Counter {
    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    pub(super) fn first_error(&self) -> Option<String> {
        self.first_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// `clients` that each want the next as soon as they have the last.
pub(super) fn aggressor(target: &Target, clients: u32, counter: &Arc<Counter>, stop: &CancellationToken) {
    for _ in 0..clients {
        let (target, counter, stop) = (target.clone(), Arc::clone(counter), stop.clone());
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            let mut connection = None;
            loop {
                match target.call(&mut connection).await {
                    Ok(()) => {
                        counter.done.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(error) => {
                        counter.refused.fetch_add(1, Ordering::Relaxed);
                        counter.first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        tokio::time::sleep(BACKOFF).await;
                    }
                }
            }
        }));
    }
}
