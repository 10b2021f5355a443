//! One request: judge it, read its body, wait for a slot, ask a server, pass the answer on, write it down.

use std::io::{self, ErrorKind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cofferdam_fairness::{Class, Permit};
use cofferdam_tenant::{DatabaseName, TenantId};
use http::header::{self, HeaderValue};

use crate::access::Line;
use crate::answer::{self, Moved, Sample, Wishes};
use crate::boundary::{self, Attempt, Carrier, ToldBy};
use crate::cache::{self, Found};
use crate::client::{Client, Unwritten};
use crate::connection::Connection;
use crate::plane::{HttpPlane, Snapshot};
use crate::reply::{self, Refusal};
use crate::request::{self, Asked, Request};
use crate::spool::Spool;
use crate::{upstream, websocket};

/// Bytes a second that a request body must come with, beside the time allowed without any.
const MIN_BODY_RATE: u64 = 1 << 10;

/// When a client may come again that found the disk full.
const NO_ROOM: Duration = Duration::from_secs(30);

/// What becomes of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The answer is complete; the connection may serve another request if both sides want.
    Done,
    /// The connection is over.
    Close,
}

/// Why an exchange ends early.
pub(crate) enum Failure {
    /// The client is told.
    Refused(Refusal),
    /// There is nobody left to tell, or the answer is already on its way and cannot be taken back.
    Broken,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Unwritten> for Failure {
    fn from(_: Unwritten) -> Self {
        Self::Broken
    }
}

impl From<Box<pingora_error::Error>> for Failure {
    fn from(_: Box<pingora_error::Error>) -> Self {
        Self::Broken
    }
}

/// Serves one request.
pub(crate) async fn serve(
    plane: &Arc<HttpPlane>,
    snapshot: &Snapshot,
    client: &mut Client,
    connection: &Connection,
    id: String,
) -> Outcome {
    let begun = Instant::now();
    plane.counters.requests.fetch_add(1, Ordering::Relaxed);
    match request::judge(plane, snapshot, client, connection, &id) {
        Err(refusal) => {
            // Not of a site of ours, as far as is known: nothing is said of how it is reached.
            let outcome = refuse(client, &refusal, &id, None).await;
            account(snapshot, client, connection, None, &id, begun);
            outcome
        }
        Ok(request) => {
            if let Some(authorization) = request.acme_authorization(client.head()).await {
                let sent = reply::plain(client, authorization).await;
                account(snapshot, client, connection, Some(&request), &id, begun);
                return if sent { Outcome::Done } else { Outcome::Close };
            }
            let served = match request.asked(client.head(), connection) {
                Err(refusal) => Err(refusal.into()),
                Ok(Asked::Websocket) => websocket::serve(&request, client).await,
                Ok(Asked::Worker(class, carrier)) => ask_worker(&request, class, carrier, client).await,
            };
            let outcome = match served {
                Ok(outcome) => outcome,
                Err(Failure::Refused(refusal)) => refuse(client, &refusal, &id, request.hsts()).await,
                Err(Failure::Broken) => Outcome::Close,
            };
            account(snapshot, client, connection, Some(&request), &id, begun);
            outcome
        }
    }
}

/// Writes down what has become of a request.
fn account(
    snapshot: &Snapshot,
    client: &Client,
    connection: &Connection,
    request: Option<&Request<'_>>,
    id: &str,
    begun: Instant,
) {
    let took = begun.elapsed();
    let is_slow = snapshot.slow_request.is_some_and(|slow| took >= slow);
    let spans = request.filter(|r| r.is_recorded).and(snapshot.spans.as_deref());
    if snapshot.access_log.is_none() && spans.is_none() && !is_slow && !tracing::enabled!(tracing::Level::DEBUG) {
        return;
    }
    let head = client.head();
    let target = String::from_utf8_lossy(head.raw_path());
    let whose = request.map_or(connection.peer.ip(), |r| r.client);
    let line = Line {
        tenant: request.map(|r| r.tenant.slug.as_str()),
        method: head.method.as_str(),
        host: request.map_or("", |r| &r.host),
        path: target.split('?').next().unwrap_or_default(),
        status: client.answered().unwrap_or(0),
        bytes_out: client.bytes_sent() as u64,
        total_ms: took.as_secs_f64() * 1e3,
        trace_id: request.map(|r| r.trace.id.as_str()),
        ..Line::of(whose, if client.is_two() { "h2" } else { "http/1" }, id)
    };
    let record = request.map(|r| r.record());
    let line = match &record {
        Some(record) => line.fill(record),
        None => line,
    };
    if let Some(log) = &snapshot.access_log {
        log.write(&line);
    }
    if let (Some(spans), Some(request), Some(record)) = (spans, request, &record) {
        spans.ended(&request.trace, &line, record, begun, request.scheme);
    }
    let (tenant, path, status) = (line.tenant.unwrap_or_default(), line.path, line.status);
    if is_slow {
        tracing::warn!(
            target: "cofferdam::slow", tenant, class = line.class, method = line.method, path, status,
            seconds = took.as_secs_f64(), wait_ms = line.wait_ms, worker_ms = line.worker_ms, upstream = line.upstream,
            request_id = id, "slow request",
        );
    } else {
        tracing::debug!(
            target: "cofferdam::access", tenant, method = line.method, path, status, bytes = line.bytes_out,
            seconds = took.as_secs_f64(), request_id = id, "request",
        );
    }
}

async fn refuse(client: &mut Client, refusal: &Refusal, id: &str, hsts: Option<&HeaderValue>) -> Outcome {
    if refusal.send(client, id, hsts).await && !refusal.close { Outcome::Done } else { Outcome::Close }
}

async fn ask_worker(
    request: &Request<'_>,
    class: Class,
    carrier: Carrier,
    client: &mut Client,
) -> Result<Outcome, Failure> {
    request.note(|record| record.class = Some(class));
    if class == Class::Static
        && let Some(key) = request.cache_key(client.head())
    {
        return static_file(request, class, client, &key).await;
    }
    // Held as long as the body is.
    let (mut body, _held) = read_body(request, client).await?.unzip();
    request.note(|record| record.bytes_in = body.as_ref().map_or(0, Spool::len));
    let attempt = match &mut body {
        Some(body) => look_into(request, carrier, body, client).await?,
        None => None,
    };
    let Some(attempt) = attempt else {
        let outcome = forward(request, class, &mut body, client, Wishes::default()).await;
        if client.answered().is_some_and(|status| (200..400).contains(&status))
            && let Some(key) = request.changed_key(client.head())
        {
            request.snapshot.cache.forget(&key);
        }
        return outcome;
    };
    let plane = request.plane;
    let config = &request.snapshot.login_protection;
    let trial = plane.logins.begin(
        config,
        request.tenant.id,
        request.client,
        &attempt.login,
        attempt.told_by != ToldBy::Refusal,
        plane.now(),
    );
    let trial = trial.map_err(|wait| request.too_many_logins(wait))?;
    let mut sample = Sample::default();
    let wishes = Wishes { sample: Some(&mut sample), ..Wishes::default() };
    let outcome = forward(request, class, &mut body, client, wishes).await;
    let said = attempt.told_by.verdict(sample.status, sample.location.as_deref(), &sample.body);
    // Whoever leaves before the answer is through has seen enough of it, or wants it not to count.
    let left = matches!(outcome, Err(Failure::Broken)) && attempt.told_by != ToldBy::Nothing;
    let right = said.or(left.then_some(false));
    match trial {
        Some(trial) if attempt.told_by == ToldBy::Nothing => plane.logins.used(config, &trial, plane.now()),
        Some(trial) => plane.logins.end(config, &trial, right, plane.now()),
        None => {}
    }
    if right == Some(false) {
        request.audit("a login has failed");
    }
    outcome
}

/// How long somebody waits for a file that another has asked for.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// A static file or a compiled asset: from what is kept, or fetched by one for all who want it.
async fn static_file(
    request: &Request<'_>,
    class: Class,
    client: &mut Client,
    key: &cache::Key,
) -> Result<Outcome, Failure> {
    let cache = &request.snapshot.cache;
    let mut wishes = Wishes::default();
    let mut waited = false;
    loop {
        match cache.find(key, request.plane.now()) {
            Found::Fresh(kept) => {
                request.note(|record| record.cache = Some("hit"));
                return answer::send_kept(request, client, &kept).await;
            }
            Found::Stale(..) | Found::Nothing(_) if waited => break,
            Found::Stale(kept, fetch) => {
                request.fetches(kept.validators());
                (wishes.stale, wishes.fetch) = (Some(kept), Some(fetch));
                break;
            }
            Found::Nothing(fetch) => {
                request.fetches(cache::Validators::default());
                request.note(|record| record.cache = Some("miss"));
                wishes.fetch = Some(fetch);
                break;
            }
            // Once is enough: what was not kept by now cannot be, or its client takes its time.
            Found::Wait(_) if waited => break,
            Found::Wait(mut fetched) => {
                let patience = request.tenant.plan.http.max_wait(class).min(LONGEST_WAIT);
                tokio::select! {
                    _ = tokio::time::timeout(patience, fetched.changed()) => {}
                    () = client.gone() => return Err(Failure::Broken),
                };
                waited = true;
            }
        }
    }
    forward(request, class, &mut None, client, wishes).await
}

/// Waits for a slot, asks a server and passes its answer on.
async fn forward(
    request: &Request<'_>,
    class: Class,
    body: &mut Option<Spool>,
    client: &mut Client,
    wishes: Wishes<'_>,
) -> Result<Outcome, Failure> {
    // The slot of a report is held while its renderer calls back: a tenant with no slot left would wait for itself.
    let permit = if request.from_workers { None } else { Some(slot(request, class, client).await?) };
    match upstream::send(request, client, body, permit).await {
        Ok((server, occupied)) => answer::answer(request, client, server, occupied, wishes).await,
        Err(failure) => {
            request.plane.counters.failed.fetch_add(1, Ordering::Relaxed);
            Err(failure)
        }
    }
}

/// Reads the whole body before a worker is asked for, so that a slow sender costs nobody a worker.
async fn read_body(request: &Request<'_>, client: &mut Client) -> Result<Option<(Spool, Held)>, Failure> {
    if client.is_body_empty() && client.header(header::CONTENT_LENGTH).is_none() {
        return Ok(None);
    }
    let limit = request.tenant.plan.max_body;
    let too_large = || {
        let detail = format!("the request body is larger than this site's limit of {limit} bytes");
        Failure::from(Refusal::new(413, "Content too large", detail).closing())
    };
    let announced =
        client.header(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limit) {
        return Err(too_large());
    }
    if client.header(header::EXPECT).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        client.write_continue().await?;
    }
    let snapshot = request.snapshot;
    let mut pace = Pace::new(Instant::now(), snapshot.timeouts.body);
    let mut spool = Spool::new(snapshot.spool_threshold, snapshot.spool_directory.clone());
    let mut moved = Moved::new(request);
    let mut held = Held::new(request);
    loop {
        let chunk = client.read_body().await.map_err(|error| match error.etype() {
            _ if client.malformed().is_some() => {
                let detail = client.malformed().map_or("", |malformed| malformed.0);
                Refusal::new(400, "Bad request", detail).closing().into()
            }
            pingora_error::ErrorType::ReadTimedout => {
                Failure::from(Refusal::new(408, "Request timeout", "the request body did not arrive in time").closing())
            }
            pingora_error::ErrorType::ConnectionClosed | pingora_error::ErrorType::ReadError => Failure::Broken,
            _ => Refusal::new(400, "Bad request", "the request body is malformed").closing().into(),
        })?;
        let Some(chunk) = chunk else { break };
        if !pace.keeps_up(Instant::now(), chunk.len()) {
            let detail = format!("the request body came slower than {MIN_BODY_RATE} bytes a second");
            return Err(Refusal::new(408, "Request timeout", detail).closing().into());
        }
        moved.add(chunk.len() as u64);
        if !held.add(chunk.len() as u64) {
            let mut refusal = Refusal::new(503, "Service busy", "too many request bodies wait at once").closing();
            refusal.retry_after = Some(Duration::from_secs(5));
            return Err(refusal.into());
        }
        if spool.len() + chunk.len() as u64 > limit {
            return Err(too_large());
        }
        spool.push(&chunk).await.map_err(|error| spool_failed(&error))?;
    }
    spool.rewind().await.map_err(|error| spool_failed(&error))?;
    Ok(Some((spool, held)))
}

/// Whether a body comes fast enough. Who is ahead of the least rate may rest for as long as a body may take to begin with, and no
/// longer: what came fast is no credit for hours.
struct Pace {
    late: Instant,
    rest: Duration,
}

impl Pace {
    fn new(now: Instant, rest: Duration) -> Self {
        Self { late: now + rest, rest }
    }

    fn keeps_up(&mut self, now: Instant, bytes: usize) -> bool {
        let is_in_time = now <= self.late;
        self.late = (self.late + Duration::from_secs_f64(bytes as f64 / MIN_BODY_RATE as f64)).min(now + self.rest);
        is_in_time
    }
}

/// What a body takes of the room that there is for all of them.
struct Held {
    plane: Arc<HttpPlane>,
    tenant: TenantId,
    bytes: u64,
}

impl Held {
    fn new(request: &Request<'_>) -> Self {
        Self { plane: Arc::clone(request.plane), tenant: request.tenant.id, bytes: 0 }
    }

    /// Whether there is room for more.
    fn add(&mut self, bytes: u64) -> bool {
        let fits = self.plane.bodies.take(self.tenant, self.bytes, bytes);
        self.bytes += if fits { bytes } else { 0 };
        fits
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.plane.bodies.give_back(self.tenant, self.bytes);
        }
    }
}

pub(crate) fn spool_failed(error: &io::Error) -> Failure {
    tracing::error!(%error, "a request body could not be spooled");
    let is_full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    let mut refusal = if is_full {
        Refusal::new(503, "Service busy", "the gateway has no room left for request bodies that wait")
    } else {
        Refusal::new(500, "Internal error", "the request body could not be stored while it waited")
    };
    refusal.retry_after = is_full.then_some(NO_ROOM);
    refusal.closing().into()
}

/// Lets a body through that names no other database than the tenant's.
async fn look_into(
    request: &Request<'_>,
    carrier: Carrier,
    body: &mut Spool,
    client: &Client,
) -> Result<Option<Attempt>, Failure> {
    let content_type = client.header(header::CONTENT_TYPE).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    let database = request.tenant.database.clone();
    let path = request.path.clone();
    let _reader =
        if body.is_large() { Some(request.plane.reader(request.tenant, request.snapshot).await?) } else { None };
    let verdict = body.inspect(move |body| {
        let database = database.as_ref().map(DatabaseName::as_str);
        boundary::check_body(carrier, &path, content_type.as_deref(), body, database)
    });
    verdict.await.map_err(|error| spool_failed(&error))?.map_err(|denied| request.denied(denied).into())
}

/// Waits for a worker slot, and notices when the client leaves meanwhile.
async fn slot(request: &Request<'_>, class: Class, client: &mut Client) -> Result<Permit, Failure> {
    let tenant = request.tenant;
    let max_wait = tenant.plan.http.max_wait(class);
    let begun = Instant::now();
    let mut acquire = request.access.gate.acquire(tenant.id, class, max_wait);
    let mut timer = pin!(tokio::time::sleep(max_wait));
    let outcome = tokio::select! {
        biased;
        outcome = &mut acquire => outcome,
        () = &mut timer => acquire.give_up(),
        () = client.gone() => return Err(Failure::Broken),
    };
    request.note(|record| record.queued = Some((begun, begun.elapsed())));
    outcome.map_err(|rejection| {
        request.plane.counters.refused.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(tenant = %tenant.slug, %rejection, "request refused");
        Refusal::no_slot(tenant.slug.as_str(), &rejection).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that came fast are no credit for hours of rest, with the room that they hold.
    #[test]
    fn a_body_may_rest_for_a_while_however_fast_it_came_and_be_slow_if_it_keeps_coming() {
        let (rest, begun) = (Duration::from_secs(30), Instant::now());
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        let mut fast = Pace::new(begun, rest);
        assert!(fast.keeps_up(at(1), 128 << 20));
        assert!(fast.keeps_up(at(11), 1) && fast.keeps_up(at(21), 1) && !fast.keeps_up(at(32), 1));
        let mut steady = Pace::new(begun, rest);
        let chunk = 10 * MIN_BODY_RATE as usize;
        assert!((1..1_000).all(|n| steady.keeps_up(at(10 * n), chunk)));
        assert!(steady.keeps_up(at(10_020), 0) && !steady.keeps_up(at(10_021), 0));
    }
}
