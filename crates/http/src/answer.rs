//! The answer on its way to the client: as it comes, and read ahead of a client that takes it slowly.

use std::pin::{Pin, pin};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, header};
use pingora_core::protocols::http::v1::client::HttpSession as ServerSession;

use crate::backlog::Backlog;
use crate::client::Client;
use crate::exchange::{Failure, Outcome};
use crate::request::Request;
use crate::upstream::{Occupied, until_the_worker_is_free};

/// Passes the answer on as it comes; the slot is free when the server has finished.
pub(crate) async fn answer(
    request: &Request<'_>,
    client: &mut Client,
    server: ServerSession,
    occupied: Occupied,
    sample: Option<&mut Vec<u8>>,
) -> Result<Outcome, Failure> {
    let read_timeout = request.access.pool.read_timeout;
    let (version, head_only) = {
        let head = client.head();
        (head.version, head.method == Method::HEAD)
    };
    let Some(head) = server.resp_header() else { return Err(Failure::Broken) };
    let head = request.to_client(head, version, head_only)?;
    if request.plane.draining.is_cancelled() {
        client.close_after();
    }
    if version < http::Version::HTTP_11 && !head.headers.contains_key(header::CONTENT_LENGTH) {
        client.close_after(); // the end of the connection is the end of the answer
    }
    if let Err(unwritten) = client.write_head(head).await {
        tokio::spawn(until_the_worker_is_free(server, occupied, request.access.pool.response_timeout));
        return Err(unwritten.into());
    }
    pass_on(request, client, server, occupied, read_timeout, sample).await?;
    client.finish().await?;
    Ok(Outcome::Done)
}

/// Bytes of an answer that are looked into.
const SAMPLE: usize = 64 << 10;

/// Copies the body to the client. Whenever the client does not take what there is, the server is read on into a backlog:
/// its worker, and the slot, are free when it has sent everything and not when the client has taken everything.
async fn pass_on(
    request: &Request<'_>,
    client: &mut Client,
    server: ServerSession,
    occupied: Occupied,
    read_timeout: Duration,
    sample: Option<&mut Vec<u8>>,
) -> Result<(), Failure> {
    // The read that is under way, if any, with the server in it: it is never dropped half-way.
    let mut source = Some(Source { read: Box::pin(read_on(server, read_timeout)), _occupied: occupied });
    let outcome = copy(request, client, &mut source, read_timeout, sample).await;
    if let (Err(_), Some(source)) = (&outcome, source) {
        // The client is gone; the worker does not know and goes on.
        tokio::spawn(tokio::time::timeout(request.access.pool.response_timeout, source.until_the_end(read_timeout)));
    }
    outcome
}

/// A server, and what a read from it has brought.
type Read = (ServerSession, Result<Option<Bytes>, Failure>);

/// A server that still sends, and the slot that it holds.
struct Source {
    read: Pin<Box<dyn Future<Output = Read> + Send>>,
    _occupied: Occupied,
}

impl Source {
    async fn until_the_end(mut self, read_timeout: Duration) {
        while let (server, Ok(Some(_))) = self.read.as_mut().await {
            self.read = Box::pin(read_on(server, read_timeout));
        }
    }
}

async fn copy(
    request: &Request<'_>,
    client: &mut Client,
    source: &mut Option<Source>,
    read_timeout: Duration,
    mut sample: Option<&mut Vec<u8>>,
) -> Result<(), Failure> {
    let snapshot = request.snapshot;
    let mut backlog = Backlog::new(snapshot.spool_threshold, snapshot.max_backlog, snapshot.spool_directory.clone());
    let mut moved = Moved::new(request);
    let mut ahead = Ahead { request, bytes: 0 };
    loop {
        ahead.keep(backlog.len());
        let next = match (backlog.next().await.map_err(|e| backlog_failed(&e))?, &mut *source) {
            (Some(bytes), _) => bytes,
            (None, None) => return Ok(()),
            (None, Some(open)) => {
                let (server, chunk) = open.read.as_mut().await;
                let Some(chunk) = advance(source, server, chunk, read_timeout)? else { continue };
                chunk
            }
        };
        moved.add(next.len() as u64);
        if next.is_empty() {
            continue;
        }
        if let Some(sample) = &mut sample {
            let n = next.len().min(SAMPLE.saturating_sub(sample.len()));
            sample.extend_from_slice(&next[..n]);
        }
        let mut write = pin!(client.write_body(next));
        loop {
            let mut may_read = || backlog.len() < snapshot.max_backlog && ahead.reserve(backlog.len());
            let Some(open) = source.as_mut().filter(|_| may_read()) else {
                write.await?;
                break;
            };
            let (server, chunk) = tokio::select! {
                biased;
                written = &mut write => {
                    written?;
                    break;
                }
                read = open.read.as_mut() => read,
            };
            if let Some(chunk) = advance(source, server, chunk, read_timeout)? {
                backlog.push(chunk).await.map_err(|e| backlog_failed(&e))?;
            }
        }
    }
}

/// Takes what a read has brought and begins the next; at the end of the body, or when the server fails, the slot is free.
fn advance(
    source: &mut Option<Source>,
    server: ServerSession,
    chunk: Result<Option<Bytes>, Failure>,
    read_timeout: Duration,
) -> Result<Option<Bytes>, Failure> {
    match (chunk, source.as_mut()) {
        (Ok(Some(chunk)), Some(open)) => {
            open.read = Box::pin(read_on(server, read_timeout));
            Ok(Some(chunk))
        }
        (Ok(_), _) => {
            *source = None;
            Ok(None)
        }
        (Err(failure), _) => {
            *source = None;
            Err(failure)
        }
    }
}

/// The part of what may be read ahead that one answer has taken.
struct Ahead<'a> {
    request: &'a Request<'a>,
    bytes: u64,
}

/// Room is taken for so much at a time: more than one read brings.
const AHEAD_STEP: u64 = 1 << 20;

impl Ahead<'_> {
    /// Whether there is room for one more read beside `len` bytes.
    fn reserve(&mut self, len: u64) -> bool {
        while self.bytes < len + AHEAD_STEP / 4 {
            if !self.request.plane.ahead.take(self.request.tenant.id, AHEAD_STEP) {
                return false;
            }
            self.bytes += AHEAD_STEP;
        }
        true
    }

    /// Gives back what is not needed for `len` bytes.
    fn keep(&mut self, len: u64) {
        let wanted = len.div_ceil(AHEAD_STEP) * AHEAD_STEP;
        if self.bytes > wanted + AHEAD_STEP {
            self.request.plane.ahead.give_back(self.request.tenant.id, self.bytes - wanted);
            self.bytes = wanted;
        }
    }
}

impl Drop for Ahead<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.request.plane.ahead.give_back(self.request.tenant.id, self.bytes);
        }
    }
}

/// Charges the bytes that were moved for a tenant as they are moved, and the rest however the exchange ends.
pub(crate) struct Moved<'a> {
    request: &'a Request<'a>,
    bytes: u64,
}

/// Bytes of a long answer that are charged at a time.
const CHARGED_EVERY: u64 = 1 << 20;

impl<'a> Moved<'a> {
    pub(crate) fn new(request: &'a Request<'a>) -> Self {
        Self { request, bytes: 0 }
    }

    pub(crate) fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes >= CHARGED_EVERY {
            self.charge();
        }
    }

    fn charge(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes > 0 && self.request.tenant.plan.http.bandwidth.is_some() {
            self.request.access.gate.charge_bytes(self.request.tenant.id, bytes);
        }
    }
}

impl Drop for Moved<'_> {
    fn drop(&mut self) {
        self.charge();
    }
}

/// The next part of a body, and the server it came from.
async fn read_on(mut server: ServerSession, limit: Duration) -> Read {
    let chunk = match tokio::time::timeout(limit, server.read_body_bytes()).await {
        Ok(Ok(chunk)) => Ok(chunk),
        Ok(Err(_)) | Err(_) => Err(Failure::Broken),
    };
    (server, chunk)
}

fn backlog_failed(error: &std::io::Error) -> Failure {
    tracing::error!(%error, "an answer could not be stored while its client was slow");
    Failure::Broken
}
