//! The answer on its way to the client: as it comes, and read ahead of a client that takes it slowly.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cofferdam_tenant::DatabaseName;
use http::header::{self, HeaderMap};
use http::{Method, StatusCode};
use pingora_core::protocols::http::compression::ResponseCompressionCtx;
use pingora_core::protocols::http::v1::client::HttpSession as ServerSession;
use pingora_http::ResponseHeader;

use crate::backlog::Backlog;
use crate::cache::{Fetch, Fill, Kept, is_text};
use crate::client::Client;
use crate::exchange::{Failure, Outcome};
use crate::reply::Refusal;
use crate::request::Request;
use crate::room::SMALL;
use crate::upstream::{Occupied, until_the_worker_is_free};
use crate::{local, sendfile};

/// What else is done with an answer.
#[derive(Default)]
pub(crate) struct Wishes<'a> {
    /// What a server has said is copied here.
    pub(crate) sample: Option<&'a mut Sample>,
    /// It is kept, if it may be.
    pub(crate) fetch: Option<Fetch>,
    /// What is sent when the server says that it has not changed.
    pub(crate) stale: Option<Arc<Kept>>,
}

/// What a server has said, as far as it is looked into.
#[derive(Default)]
pub(crate) struct Sample {
    /// 0 while it has said nothing.
    pub(crate) status: u16,
    pub(crate) location: Option<String>,
    /// The beginning of its body.
    pub(crate) body: Vec<u8>,
}

/// Passes the answer on as it comes; the slot is free when the server has finished.
pub(crate) async fn answer(
    request: &Request<'_>,
    client: &mut Client,
    server: ServerSession,
    occupied: Occupied,
    mut wishes: Wishes<'_>,
) -> Result<Outcome, Failure> {
    let read_timeout = request.access.pool.read_timeout;
    let response_timeout = request.access.pool.response_timeout;
    let (version, head_only) = {
        let head = client.head();
        (head.version, head.method == Method::HEAD)
    };
    if request.plane.draining.is_cancelled() {
        client.close_after();
    }
    let Some(said) = server.resp_header() else { return Err(Failure::Broken) };
    if let Some(sample) = &mut wishes.sample {
        sample.status = said.status.as_u16();
        sample.location = said.headers.get(header::LOCATION).and_then(|v| v.to_str().ok()).map(str::to_owned);
    }
    let mut head = request.to_client(said, version, head_only)?;
    let database = request.tenant.database.as_ref().map(DatabaseName::as_str);
    if let Some(file) = sendfile::asked_for(&said.headers, database).filter(|_| said.status.is_success()) {
        // What part of it is wanted is decided here.
        head.set_status(StatusCode::OK)?;
        head.remove_header(&header::CONTENT_RANGE);
        // There is nothing more to come from the worker, and nothing to be kept: nobody waits for that.
        drop(wishes.fetch.take());
        tokio::spawn(until_the_worker_is_free(server, occupied, response_timeout));
        return send_file(request, client, head, file).await;
    }
    if let Some(stale) = wishes.stale.filter(|_| said.status == StatusCode::NOT_MODIFIED) {
        let kept = match wishes.fetch {
            Some(fetch) => fetch.confirm(&stale, said, request.plane.now()),
            None => stale,
        };
        tokio::spawn(until_the_worker_is_free(server, occupied, response_timeout));
        request.note(|record| record.cache = Some("confirmed"));
        return send_kept(request, client, &kept).await;
    }
    // A HEAD has no body to keep.
    let fill = wishes.fetch.take().filter(|_| !head_only).and_then(|fetch| fetch.begin(said));
    if fill.is_some() {
        // What is kept for everybody was somebody's first.
        head.remove_header(&header::SET_COOKIE);
    }
    let mut coder = ResponseCompressionCtx::new(request.snapshot.compression, false, false);
    if coder.is_enabled() {
        coder.request_filter(client.head());
        let has_length = head.headers.contains_key(header::CONTENT_LENGTH);
        let status = said.status;
        let as_it_is =
            matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED | StatusCode::PARTIAL_CONTENT);
        let as_it_is = head_only || as_it_is || !is_text(&said.headers) || !may_be_coded(&said.headers);
        coder.response_header_filter(&mut head, as_it_is);
        let loses_length = has_length && !head.headers.contains_key(header::CONTENT_LENGTH);
        if loses_length && version == http::Version::HTTP_11 && !head_only {
            head.insert_header(header::TRANSFER_ENCODING, "chunked")?;
        } else if version != http::Version::HTTP_11 && head.headers.contains_key(header::TRANSFER_ENCODING) {
            head.remove_header(&header::TRANSFER_ENCODING);
        }
    }
    if version < http::Version::HTTP_11 && !head.headers.contains_key(header::CONTENT_LENGTH) {
        client.close_after(); // the end of the connection is the end of the answer
    }
    if let Err(unwritten) = client.write_head(head).await {
        tokio::spawn(until_the_worker_is_free(server, occupied, response_timeout));
        return Err(unwritten.into());
    }
    let taps = Taps { sample: wishes.sample, fill, coder: Some(coder).filter(ResponseCompressionCtx::is_enabled) };
    pass_on(request, client, server, occupied, read_timeout, taps).await?;
    client.finish().await?;
    Ok(Outcome::Done)
}

/// Whether an answer may be coded on its way: a stream of events would be held back by the coder, and so would any other
/// whose length is not known.
fn may_be_coded(headers: &HeaderMap) -> bool {
    let fixed =
        headers.get_all(header::CACHE_CONTROL).iter().any(|v| v.to_str().is_ok_and(|v| v.contains("no-transform")));
    headers.contains_key(header::CONTENT_LENGTH) && !fixed
}

/// Sends what is kept.
pub(crate) async fn send_kept(request: &Request<'_>, client: &mut Client, kept: &Kept) -> Result<Outcome, Failure> {
    let (head, content) = kept.for_client(&client.head().headers, request.plane.now())?;
    let head = request.to_client(&head, client.head().version, client.head().method == Method::HEAD)?;
    local::send(request, client, head, &content).await
}

/// Sends a file of the filestore that an answer has asked for.
async fn send_file(
    request: &Request<'_>,
    client: &mut Client,
    head: ResponseHeader,
    file: Result<String, ()>,
) -> Result<Outcome, Failure> {
    let Ok(file) = file else {
        request.audit("a server wants a file sent that is not in its tenant's filestore");
        return Err(Refusal::new(502, "Bad gateway", "the server asks for a file that is not this site's").into());
    };
    let content = match (&request.access.bucket, &request.access.pool.filestore) {
        (Some(bucket), _) => bucket.find(&file, request.tenant.id).await,
        (None, Some(directory)) => sendfile::open(directory, file).await,
        (None, None) => {
            let detail = "the server leaves a file to be sent, and its pool has no `filestore` to send it from";
            return Err(Refusal::new(502, "Bad gateway", detail).into());
        }
    };
    match content {
        Ok(content) => local::send(request, client, head, &content).await,
        Err(error) => Err(local::unread(request, &error).into()),
    }
}

/// Bytes of an answer that are looked into.
const SAMPLE: usize = 64 << 10;

/// What is done with the bytes of a body as they come from the server, and as they go to the client.
struct Taps<'a> {
    sample: Option<&'a mut Sample>,
    fill: Option<Fill>,
    coder: Option<ResponseCompressionCtx>,
}

impl Taps<'_> {
    /// A part has come.
    async fn take(&mut self, part: &Bytes) {
        if let Some(sample) = &mut self.sample {
            let n = part.len().min(SAMPLE.saturating_sub(sample.body.len()));
            sample.body.extend_from_slice(&part[..n]);
        }
        if let Some(fill) = self.fill.take() {
            self.fill = fill.push(part.clone()).await;
        }
    }

    /// What goes to the client for a part; `None` for the end of the body.
    fn code(&mut self, part: Option<Bytes>) -> Option<Bytes> {
        match &mut self.coder {
            Some(coder) => coder.response_body_filter(part.as_ref(), part.is_none()),
            None => part,
        }
    }
}

/// Copies the body to the client. Whenever the client does not take what there is, the server is read on into a backlog:
/// its worker, and the slot, are free when it has sent everything and not when the client has taken everything.
async fn pass_on(
    request: &Request<'_>,
    client: &mut Client,
    server: ServerSession,
    occupied: Occupied,
    read_timeout: Duration,
    taps: Taps<'_>,
) -> Result<(), Failure> {
    // The read that is under way, if any, with the server in it: it is never dropped half-way.
    let mut source = Some(Source { read: Box::pin(read_on(server, read_timeout)), _occupied: occupied });
    let outcome = copy(request, client, &mut source, read_timeout, taps).await;
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
    mut taps: Taps<'_>,
) -> Result<(), Failure> {
    let snapshot = request.snapshot;
    let mut backlog = Backlog::new(snapshot.spool_threshold, snapshot.max_backlog, snapshot.spool_directory.clone());
    let mut moved = Moved::new(request);
    let mut ahead = Ahead { request, bytes: 0 };
    loop {
        ahead.keep(backlog.len());
        let next = match (backlog.next().await.map_err(|e| backlog_failed(&e))?, &mut *source) {
            (Some(bytes), _) => bytes,
            (None, None) => {
                if let Some(last) = taps.code(None) {
                    client.write_body(last).await?;
                }
                return Ok(());
            }
            (None, Some(open)) => {
                let (server, chunk) = open.read.as_mut().await;
                let Some(chunk) = advance(request, source, server, chunk, read_timeout, &mut taps).await? else {
                    continue;
                };
                chunk
            }
        };
        moved.add(next.len() as u64);
        if next.is_empty() {
            continue;
        }
        let Some(next) = taps.code(Some(next)).filter(|coded| !coded.is_empty()) else { continue };
        let mut write = pin!(client.write_body(next));
        loop {
            let Some(open) = source.as_mut() else {
                write.await?;
                break;
            };
            if backlog.len() >= snapshot.max_backlog {
                write.await?;
                break;
            }
            if backlog.is_stuck() || !ahead.reserve(backlog.len()) {
                // Others have the room, on the disk or of its tenant's, and it holds a worker: a part that is not taken in time is
                // the last.
                match tokio::time::timeout(PATIENCE_WITHOUT_ROOM, &mut write).await {
                    Ok(written) => written?,
                    Err(_) if !backlog.is_stuck() && ahead.reserve(backlog.len()) => continue,
                    Err(_) => return Err(Failure::Broken),
                }
                break;
            }
            let (server, chunk) = tokio::select! {
                biased;
                written = &mut write => {
                    written?;
                    break;
                }
                read = open.read.as_mut() => read,
            };
            if let Some(chunk) = advance(request, source, server, chunk, read_timeout, &mut taps).await? {
                backlog.push(chunk).await.map_err(|e| backlog_failed(&e))?;
            }
        }
    }
}

/// Takes what a read has brought and begins the next; at the end of the body, or when the server fails, the slot is free.
async fn advance(
    request: &Request<'_>,
    source: &mut Option<Source>,
    server: ServerSession,
    chunk: Result<Option<Bytes>, Failure>,
    read_timeout: Duration,
    taps: &mut Taps<'_>,
) -> Result<Option<Bytes>, Failure> {
    match (chunk, source.as_mut()) {
        (Ok(Some(chunk)), Some(open)) => {
            open.read = Box::pin(read_on(server, read_timeout));
            taps.take(&chunk).await;
            Ok(Some(chunk))
        }
        (Ok(_), _) => {
            *source = None;
            if let Some(fill) = taps.fill.take() {
                fill.finish(request.plane.now());
            }
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

/// Room is taken for so much at a time, more than one read brings; for an answer that is small only as much as always fits.
const AHEAD_STEP: u64 = 1 << 20;

/// A part of an answer, of 64 KiB at most, has to be taken within this time while the answer holds a worker and there is no room to
/// read ahead of its client.
const PATIENCE_WITHOUT_ROOM: Duration = Duration::from_secs(20);

impl Ahead<'_> {
    /// Whether there is room for one more read beside `len` bytes.
    fn reserve(&mut self, len: u64) -> bool {
        loop {
            let step = if self.bytes < 8 * SMALL { SMALL } else { AHEAD_STEP };
            if self.bytes >= len + step / 4 {
                return true;
            }
            if !self.request.plane.ahead.take(self.request.tenant.id, self.bytes, step) {
                return false;
            }
            self.bytes += step;
        }
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
