//! Traces of requests, sent to a collector by OTLP: a span for the request, one for its wait for a worker, and one for the
//! worker's time.
//!
//! A request costs nothing but a hash where it is not recorded. Where it is, its spans are made when it has ended and put
//! into a bounded queue, which a thread of its own sends; what finds the queue full is dropped, and no request waits.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use cofferdam_tenant::{Network, Secret, TracesConfig};
use http::HeaderValue;
use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE};
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor,
};

use crate::access::{Line, Record};
use crate::trace::Trace;

/// Spans that wait to be sent, at most.
const MOST_WAITING: usize = 8_192;
/// How long a span waits for others.
const EVERY: Duration = Duration::from_secs(2);
/// How long the collector may take for one batch.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What an exporter is made from: as long as it stays the same, so does the exporter.
pub(crate) type Wanted = (TracesConfig, Option<Secret>);

/// Decides which requests are recorded, and sends what is known of them.
pub(crate) struct Spans {
    wanted: Wanted,
    /// Of 2⁶⁴, those below are recorded.
    below: u64,
    /// Nobody can choose a trace that is always recorded.
    seed: u64,
    next: AtomicU64,
    scope: InstrumentationScope,
    /// Taken when this is dropped.
    processor: Option<BatchSpanProcessor>,
}

impl fmt::Debug for Spans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spans").field("endpoint", &self.wanted.0.endpoint).finish_non_exhaustive()
    }
}

impl Spans {
    /// Begins to send. Connects to nobody yet. `run` is this process's number.
    pub(crate) fn new(wanted: Wanted, run: u64) -> Result<Self, String> {
        // The client has a runtime of its own, which may not be made within another.
        let making = wanted.clone();
        let exporter = std::thread::spawn(move || exporter(&making)).join();
        let exporter = exporter.map_err(|_| "the client could not be made".to_owned())??;
        let config =
            BatchConfigBuilder::default().with_max_queue_size(MOST_WAITING).with_scheduled_delay(EVERY).build();
        let mut processor = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
        let about = [
            KeyValue::new("service.name", "cofferdam"),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", format!("{run:016x}")),
        ];
        processor.set_resource(&Resource::builder().with_attributes(about).build());
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).map_err(|e| e.to_string())?;
        let seed = u64::from_le_bytes(seed);
        let share = wanted.0.share;
        // As a whole, all of them: the largest number too.
        let below = if share >= 1.0 { u64::MAX } else { (share.max(0.0) * 2_f64.powi(64)) as u64 };
        let scope = InstrumentationScope::builder("cofferdam-http").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self { wanted, below, seed, next: AtomicU64::new(seed), scope, processor: Some(processor) })
    }

    pub(crate) fn is_of(&self, wanted: &Wanted) -> bool {
        self.wanted == *wanted
    }

    /// Whether somebody is believed who says that a trace is recorded.
    pub(crate) fn believes(&self, address: IpAddr) -> bool {
        Network::any(&self.wanted.0.believe, address)
    }

    /// Whether a trace belongs to the share that is recorded; every request of a trace does, or none.
    pub(crate) fn chooses(&self, trace: u128) -> bool {
        mixed((trace >> 64) as u64 ^ mixed(trace as u64 ^ self.seed)) <= self.below && self.below > 0
    }

    /// Sends what a recorded request was.
    pub(crate) fn ended(&self, trace: &Trace, line: &Line<'_>, record: &Record, begun: Instant, scheme: &'static str) {
        let Some(processor) = &self.processor else { return };
        let (end, now) = (SystemTime::now(), Instant::now());
        // The clock may be set meanwhile; how long things took does not come from it.
        let at = |moment: Instant| end.checked_sub(now.saturating_duration_since(moment)).unwrap_or(end);
        // Whoever asks makes up methods, and each would be a name.
        let method = METHODS.into_iter().find(|known| *known == line.method);
        let of_request = SpanId::from_hex(line.request_id).unwrap_or(SpanId::INVALID);
        let mut about = vec![
            KeyValue::new("http.request.method", method.unwrap_or("_OTHER")),
            KeyValue::new("url.scheme", scheme),
            KeyValue::new("url.path", shown(line.path)),
            KeyValue::new("server.address", line.host.to_owned()),
            KeyValue::new("client.address", line.client.clone()),
            KeyValue::new("network.protocol.name", "http"),
            KeyValue::new("network.protocol.version", if line.protocol == "h2" { "2" } else { "1.1" }),
            KeyValue::new("http.request.body.size", whole(line.bytes_in)),
            KeyValue::new("http.response.body.size", whole(line.bytes_out)),
        ];
        if method.is_none() {
            let original: String = line.method.chars().take(32).collect();
            about.push(KeyValue::new("http.request.method_original", original));
        }
        about.extend(line.tenant.map(|tenant| KeyValue::new("cofferdam.tenant", tenant.to_owned())));
        about.extend(line.class.map(|class| KeyValue::new("cofferdam.class", class)));
        about.extend(line.cache.map(|cache| KeyValue::new("cofferdam.cache", cache)));
        let status = match line.status {
            // Nobody was left to be answered: that is no fault of the server's.
            0 => Status::Unset,
            code => {
                about.push(KeyValue::new("http.response.status_code", i64::from(code)));
                if code < 500 {
                    Status::Unset
                } else {
                    about.push(KeyValue::new("error.type", code.to_string()));
                    Status::error("")
                }
            }
        };
        let parent = trace.parent.as_deref().and_then(|id| SpanId::from_hex(id).ok());
        let span = |id, parent: Option<SpanId>, kind, name: String, (start, end), about, status| SpanData {
            span_context: SpanContext::new(
                TraceId::from_hex(&trace.id).unwrap_or(TraceId::INVALID),
                id,
                TraceFlags::SAMPLED,
                false,
                TraceState::NONE,
            ),
            parent_span_id: parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: parent.is_some() && id == of_request,
            span_kind: kind,
            name: name.into(),
            start_time: start,
            end_time: end,
            attributes: about,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status,
            instrumentation_scope: self.scope.clone(),
        };
        // Few names: a path is not one, there are as many as records in a database.
        let method = method.unwrap_or("HTTP");
        let name = match line.class {
            Some(class) => format!("{method} {class}"),
            None => method.to_owned(),
        };
        if let Some((queued, wait)) = record.queued {
            let time = (at(queued), at(queued + wait));
            let kind = SpanKind::Internal;
            let name = "wait for a worker".to_owned();
            processor.on_end(span(self.id(), Some(of_request), kind, name, time, Vec::new(), Status::Unset));
        }
        if let (Some(asked), Some(work)) = (record.asked, record.work.time()) {
            let mut about = vec![KeyValue::new("cofferdam.attempts", i64::from(record.attempts))];
            if let Some((address, port)) = record.server.as_deref().and_then(|server| server.rsplit_once(':')) {
                about.push(KeyValue::new("server.address", address.to_owned()));
                about.extend(port.parse().ok().map(|port: i64| KeyValue::new("server.port", port)));
            }
            let time = (at(asked), at(asked + work));
            let name = "worker".to_owned();
            processor.on_end(span(self.id(), Some(of_request), SpanKind::Client, name, time, about, Status::Unset));
        }
        processor.on_end(span(of_request, parent, SpanKind::Server, name, (at(begun), end), about, status));
    }

    /// A span's number, which no other of its trace has.
    fn id(&self) -> SpanId {
        SpanId::from(mixed(self.next.fetch_add(1, Ordering::Relaxed)).max(1))
    }

    /// Sends what waits, now. Blocks as long as the collector takes, within bounds.
    pub(crate) fn flush(&self) {
        if let Some(processor) = &self.processor
            && let Err(error) = processor.force_flush()
        {
            tracing::warn!(endpoint = %self.wanted.0.endpoint, %error, "spans were not sent");
        }
    }
}

impl Drop for Spans {
    /// A thread sends what is left and ends; nobody waits for it.
    fn drop(&mut self) {
        if let Some(processor) = self.processor.take() {
            let _ = std::thread::Builder::new().name("spans-end".to_owned()).spawn(move || processor.shutdown());
        }
    }
}

fn exporter((config, authorization): &Wanted) -> Result<SpanExporter, String> {
    let client = reqwest::blocking::Client::builder()
        .tls_backend_preconfigured(cofferdam_tls::towards_anybody().map_err(|e| e.to_string())?)
        .redirect(reqwest::redirect::Policy::none())
        // What the environment says of proxies is meant for others.
        .no_proxy()
        .timeout(TIMEOUT)
        .build()
        .map_err(|e| e.to_string())?;
    let authorization = authorization.as_ref().map(|value| {
        let mut value = HeaderValue::from_str(value.expose()).map_err(|e| e.to_string())?;
        value.set_sensitive(true);
        Ok::<_, String>(value)
    });
    let client = Client { inner: client, authorization: authorization.transpose()? };
    SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(format!("{}/v1/traces", config.endpoint.trim_end_matches('/')))
        .with_timeout(TIMEOUT)
        .build()
        .map_err(|e| e.to_string())
}

/// Sends what the configuration says and nothing that the environment says.
#[derive(Debug)]
struct Client {
    inner: reqwest::blocking::Client,
    authorization: Option<HeaderValue>,
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, mut request: http::Request<Bytes>) -> Result<http::Response<Bytes>, HttpError> {
        let headers = request.headers_mut();
        let kept = [CONTENT_TYPE, CONTENT_ENCODING].map(|name| headers.remove(&name).map(|value| (name, value)));
        headers.clear();
        headers.extend(kept.into_iter().flatten());
        if let Some(value) = &self.authorization {
            headers.insert(AUTHORIZATION, value.clone());
        }
        self.inner.send_bytes(request).await
    }
}

/// What anybody may ask with.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// A path without what opens something to whoever has it: links to sign up, to share and to answer have it in the path.
fn shown(path: &str) -> String {
    let shown: String = path.chars().take(LONGEST_PATH).collect();
    let segments = shown.split('/').map(|segment| {
        let (digits, letters) = (segment.contains(char::is_numeric), segment.contains(char::is_alphabetic));
        let opens = segment.len() >= 16 && digits && letters || segment.len() > 64;
        if opens && !segment.contains('.') { "…" } else { segment }
    });
    segments.collect::<Vec<_>>().join("/")
}

/// Characters of a path that are sent.
const LONGEST_PATH: usize = 512;

fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A number that looks like any other (the finalizer of SplitMix64).
fn mixed(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(share: f64) -> Spans {
        let config = TracesConfig { share, ..TracesConfig::to("http://127.0.0.1:1") };
        Spans::new((config, None), 1).unwrap()
    }

    #[test]
    fn paths_are_sent_without_what_opens_something() {
        for (path, expected) in [
            ("/web/dataset/call_kw/sale.order/web_search_read", "/web/dataset/call_kw/sale.order/web_search_read"),
            ("/survey/start/0e8b7c1a-55a4-4c0e-9d0f-2f6f0c0a9b1d", "/survey/start/…"),
            ("/mail/unsubscribe/a8f5f167f44f4964e6c998dee827110c/42", "/mail/unsubscribe/…/42"),
            ("/web/assets/1/a1b2c3d/web.assets_backend.min.js", "/web/assets/1/a1b2c3d/web.assets_backend.min.js"),
            ("/web/content/18446744073709551615", "/web/content/18446744073709551615"),
        ] {
            assert_eq!(shown(path), expected);
        }
        assert_eq!(shown(&format!("/{}", "x".repeat(5_000))), "/…");
    }

    #[test]
    fn the_share_of_traces_is_the_one_that_was_asked_for() {
        let chosen = |share: f64| {
            let spans = spans(share);
            (0..20_000_u128).filter(|n| spans.chooses((7 << 64) | n)).count()
        };
        assert_eq!((chosen(0.0), chosen(1.0)), (0, 20_000));
        let tenth = chosen(0.1);
        assert!((1_700..2_300).contains(&tenth), "{tenth}");
        // Always the same about one trace.
        let spans = spans(0.5);
        assert!((0..1_000_u128).all(|n| spans.chooses(n) == spans.chooses(n)));
    }
}
