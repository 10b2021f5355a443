//! Answers whose body is here: in the cache, or a file. Conditional requests and ranges are answered here too.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use pingora_http::ResponseHeader;

use crate::answer::Moved;
use crate::bucket::{Download, Object};
use crate::client::Client;
use crate::exchange::{Failure, Outcome};
use crate::reply::Refusal;
use crate::request::Request;

/// Bytes of a file that are read at a time.
const CHUNK: u64 = 256 << 10;

/// A body that is here.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    Memory(Bytes),
    /// So many bytes of a file.
    File(Arc<File>, u64),
    /// So many bytes in a bucket.
    Object(Object, u64),
}

impl Content {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(_, length) | Self::Object(_, length) => *length,
        }
    }

    /// A part of it, to be read from its beginning to its end.
    async fn open(&self, from: u64, length: u64) -> io::Result<Part> {
        let source = match self {
            Self::Memory(bytes) => Source::Memory(bytes.clone()),
            Self::File(file, _) => Source::File(Arc::clone(file)),
            Self::Object(object, whole) => Source::Object(object.get(from, length, *whole).await?),
        };
        Ok(Part { source, from, left: length })
    }
}

/// A part of a body that is being read.
struct Part {
    source: Source,
    from: u64,
    left: u64,
}

enum Source {
    Memory(Bytes),
    File(Arc<File>),
    Object(Download),
}

impl Part {
    /// The next bytes; `None` at the end. An error where the body ends too early.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        if self.left == 0 {
            return Ok(None);
        }
        let (from, length) = (self.from, self.left.min(CHUNK));
        let bytes = match &mut self.source {
            Source::Memory(bytes) => bytes.slice(from as usize..(from + length) as usize),
            Source::File(file) => {
                let file = Arc::clone(file);
                let read = move || {
                    let mut part = vec![0; length as usize];
                    file.read_exact_at(&mut part, from).map(|()| Bytes::from(part))
                };
                tokio::task::spawn_blocking(read).await.map_err(io::Error::other)??
            }
            Source::Object(download) => {
                let bytes = download.next().await?.filter(|bytes| bytes.len() as u64 <= self.left);
                bytes.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the object has another length"))?
            }
        };
        self.from += bytes.len() as u64;
        self.left -= bytes.len() as u64;
        Ok(Some(bytes))
    }
}

/// What part of a body a request wants.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Whole,
    /// The client has it.
    Nothing,
    Range {
        from: u64,
        length: u64,
    },
    /// A range beyond the end.
    Unsatisfiable,
}

/// Sends an answer. `head` is what the server said of the whole body.
pub(crate) async fn send(
    request: &Request<'_>,
    client: &mut Client,
    mut head: ResponseHeader,
    content: &Content,
) -> Result<Outcome, Failure> {
    // Ranges are of the body as it is, not of a coding of it.
    let is_coded = head.headers.contains_key(header::CONTENT_ENCODING);
    let wanted = match wanted(&client.head().method, &client.head().headers, &head.headers, content.len()) {
        Wanted::Range { .. } | Wanted::Unsatisfiable if is_coded => Wanted::Whole,
        wanted => wanted,
    };
    let (from, length) = match wanted {
        Wanted::Whole => (0, content.len()),
        Wanted::Nothing => {
            head.set_status(StatusCode::NOT_MODIFIED)?;
            (0, 0)
        }
        Wanted::Range { from, length } => {
            head.set_status(StatusCode::PARTIAL_CONTENT)?;
            head.insert_header(header::CONTENT_RANGE, format!("bytes {from}-{}/{}", from + length - 1, content.len()))?;
            (from, length)
        }
        Wanted::Unsatisfiable => {
            head.set_status(StatusCode::RANGE_NOT_SATISFIABLE)?;
            head.insert_header(header::CONTENT_RANGE, format!("bytes */{}", content.len()))?;
            (0, 0)
        }
    };
    head.remove_header(&header::TRANSFER_ENCODING);
    if wanted == Wanted::Nothing {
        head.remove_header(&header::CONTENT_LENGTH);
    } else {
        head.insert_header(header::CONTENT_LENGTH, length)?;
        if !is_coded {
            head.insert_header(header::ACCEPT_RANGES, "bytes")?;
        }
    }
    let length = if client.head().method == Method::HEAD { 0 } else { length };
    // As long as nothing has been said, a store that does not give it is a reason to say so.
    let mut part =
        if length == 0 { None } else { Some(content.open(from, length).await.map_err(|e| unread(request, &e))?) };
    client.write_head(head).await?;
    let mut moved = Moved::new(request);
    while let Some(part) = &mut part {
        let next = part.next().await.map_err(|error| {
            // The head is on its way: all that is left is to break off.
            tracing::error!(%error, request_id = %request.id, "a file could not be read to its end");
            Failure::Broken
        })?;
        let Some(bytes) = next else { break };
        moved.add(bytes.len() as u64);
        client.write_body(bytes).await?;
    }
    client.finish().await?;
    Ok(Outcome::Done)
}

/// A file that cannot be read.
pub(crate) fn unread(request: &Request<'_>, error: &io::Error) -> Refusal {
    let (tenant, request_id) = (&request.tenant.slug, &request.id);
    if error.kind() == io::ErrorKind::NotFound {
        tracing::warn!(%tenant, %request_id, "a file is not in the filestore");
        return Refusal::new(404, "Not found", "the file is not there");
    }
    if error.kind() == io::ErrorKind::ResourceBusy {
        let mut refusal = Refusal::new(503, "Service busy", "too many files of this site are being sent");
        refusal.retry_after = Some(Duration::from_secs(5));
        return refusal;
    }
    tracing::error!(%tenant, %request_id, %error, "a file cannot be sent");
    Refusal::new(502, "Bad gateway", "the file cannot be read")
}

/// RFC 9110, 13.2.2: the conditions in their order, then the range.
fn wanted(method: &Method, request: &HeaderMap, answer: &HeaderMap, length: u64) -> Wanted {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Wanted::Whole;
    }
    let etag = answer.get(header::ETAG);
    let modified = answer.get(header::LAST_MODIFIED);
    if let Some(known) = request.get(header::IF_NONE_MATCH) {
        if matches_any(known, etag) {
            return Wanted::Nothing;
        }
    } else if let (Some(since), Some(modified)) = (request.get(header::IF_MODIFIED_SINCE), modified) {
        let (since, modified) = (date(since), date(modified));
        if since.zip(modified).is_some_and(|(since, modified)| modified <= since) {
            return Wanted::Nothing;
        }
    }
    let Some(range) = request.get(header::RANGE).filter(|_| *method == Method::GET) else { return Wanted::Whole };
    if let Some(condition) = request.get(header::IF_RANGE) {
        // A weak tag says nothing about bytes, and a date nothing about the coding that the client has a part of.
        let strong = |tag: &HeaderValue| !tag.as_bytes().starts_with(b"W/");
        let same = etag.is_some_and(|etag| etag == condition && strong(etag));
        if !same {
            return Wanted::Whole;
        }
    }
    range.to_str().ok().and_then(|range| part_of(range, length)).unwrap_or(Wanted::Whole)
}

fn matches_any(known: &HeaderValue, etag: Option<&HeaderValue>) -> bool {
    let (Ok(known), Some(Ok(etag))) = (known.to_str(), etag.map(HeaderValue::to_str)) else { return false };
    let opaque = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    known.trim() == "*" || known.split(',').any(|tag| opaque(tag) == opaque(etag))
}

fn date(value: &HeaderValue) -> Option<std::time::SystemTime> {
    httpdate::parse_http_date(value.to_str().ok()?).ok()
}

/// One range; `None` for what is no range, or several, which may be answered with the whole.
fn part_of(range: &str, length: u64) -> Option<Wanted> {
    let spec = range.strip_prefix("bytes=")?.trim();
    let (first, last) = spec.split_once('-')?;
    let number = |s: &str| -> Option<u64> {
        let digits = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| s.parse().unwrap_or(u64::MAX))
    };
    let (first, last) = match (first.is_empty(), last.is_empty()) {
        (true, true) => return None,
        // The last so many bytes.
        (true, false) => {
            let n = number(last)?.min(length);
            if n == 0 {
                return Some(Wanted::Unsatisfiable);
            }
            (length - n, length - 1)
        }
        (false, true) => (number(first)?, length.saturating_sub(1)),
        (false, false) => {
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return None;
            }
            (first, last.min(length.saturating_sub(1)))
        }
    };
    Some(if first >= length { Wanted::Unsatisfiable } else { Wanted::Range { from: first, length: last - first + 1 } })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MODIFIED: &str = "Tue, 15 Nov 1994 12:45:26 GMT";

    fn ask(request: &[(&str, &str)]) -> Wanted {
        let map = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|(k, v)| (k.parse::<header::HeaderName>().unwrap(), v.parse().unwrap()));
            pairs.collect::<HeaderMap>()
        };
        let answer = map(&[("etag", "\"a\""), ("last-modified", MODIFIED)]);
        wanted(&Method::GET, &map(request), &answer, 100)
    }

    #[test]
    fn a_client_that_has_it_gets_nothing() {
        for known in ["\"a\"", "W/\"a\"", "\"b\", \"a\"", "*"] {
            assert_eq!(ask(&[("if-none-match", known)]), Wanted::Nothing, "{known}");
        }
        assert_eq!(ask(&[("if-none-match", "\"b\"")]), Wanted::Whole);
        assert_eq!(ask(&[("if-modified-since", MODIFIED)]), Wanted::Nothing);
        assert_eq!(ask(&[("if-modified-since", "Tue, 15 Nov 1994 12:45:25 GMT")]), Wanted::Whole);
        // The tag is the better condition, and the date is not looked at beside it.
        assert_eq!(ask(&[("if-none-match", "\"b\""), ("if-modified-since", MODIFIED)]), Wanted::Whole);
    }

    #[test]
    fn a_range_is_a_part_and_anything_else_the_whole() {
        let range = |from, length| Wanted::Range { from, length };
        for (text, expected) in [
            ("bytes=0-9", range(0, 10)),
            ("bytes=90-", range(90, 10)),
            ("bytes=90-1000", range(90, 10)),
            ("bytes=-5", range(95, 5)),
            ("bytes=-1000", range(0, 100)),
            ("bytes=100-", Wanted::Unsatisfiable),
            ("bytes=-0", Wanted::Unsatisfiable),
            ("bytes=9-0", Wanted::Whole),
            ("bytes=0-1,5-6", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
            ("bytes=+1-2", Wanted::Whole),
            ("lines=0-1", Wanted::Whole),
        ] {
            assert_eq!(ask(&[("range", text)]), expected, "{text}");
        }
        assert_eq!(ask(&[("range", "bytes=0-9"), ("if-range", "\"a\"")]), range(0, 10));
        assert_eq!(ask(&[("range", "bytes=0-9"), ("if-range", MODIFIED)]), Wanted::Whole);
        assert_eq!(ask(&[("range", "bytes=0-9"), ("if-range", "\"b\"")]), Wanted::Whole);
        assert_eq!(ask(&[("range", "bytes=0-9"), ("if-none-match", "\"a\"")]), Wanted::Nothing);
    }

    proptest! {
        #[test]
        fn a_range_never_reaches_beyond_the_body(text in "bytes=[0-9,-]{0,30}", length in 0u64..200) {
            if let Some(Wanted::Range { from, length: n }) = part_of(&text, length) {
                prop_assert!(n > 0 && from + n <= length);
            }
        }
    }
}
