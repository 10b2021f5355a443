//! A request's client, by whichever version of HTTP it speaks: what the rest of the plane needs of it, and no more.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AsHeaderName, HeaderValue};
use pingora_core::protocols::http::v1::server::HttpSession as SessionOne;
use pingora_core::protocols::http::v2::server::HttpSession as SessionTwo;
use pingora_error::{Error, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};

use crate::framing::Malformed;
use crate::socket::Inbound;

/// The client of one request.
pub(crate) struct Client {
    version: Version,
    /// Time without a byte inside a body.
    read: Duration,
    /// Time that the client may take for nothing.
    write: Duration,
}

enum Version {
    One(Box<SessionOne>, Arc<Inbound>, usize),
    Two(Box<SessionTwo>),
}

/// The client took nothing for as long as it may, or is gone.
#[derive(Debug)]
pub(crate) struct Unwritten;

impl Client {
    /// `head` is the length of the request's head.
    pub(crate) fn one(
        session: SessionOne,
        inbound: Arc<Inbound>,
        head: usize,
        read: Duration,
        write: Duration,
    ) -> Self {
        Self { version: Version::One(Box::new(session), inbound, head), read, write }
    }

    pub(crate) fn two(mut session: SessionTwo, read: Duration, write: Duration) -> Self {
        session.set_write_timeout(Some(write));
        Self { version: Version::Two(Box::new(session)), read, write }
    }

    /// The session of HTTP/1, to be used again.
    pub(crate) fn into_one(self) -> Option<SessionOne> {
        match self.version {
            Version::One(session, ..) => Some(*session),
            Version::Two(_) => None,
        }
    }

    pub(crate) fn is_two(&self) -> bool {
        matches!(self.version, Version::Two(_))
    }

    pub(crate) fn head(&self) -> &RequestHeader {
        match &self.version {
            Version::One(session, ..) => session.req_header(),
            Version::Two(session) => session.req_header(),
        }
    }

    pub(crate) fn head_mut(&mut self) -> &mut RequestHeader {
        match &mut self.version {
            Version::One(session, ..) => session.req_header_mut(),
            Version::Two(session) => session.req_header_mut(),
        }
    }

    pub(crate) fn header(&self, name: impl AsHeaderName) -> Option<&HeaderValue> {
        self.head().headers.get(name)
    }

    /// Bytes of the request's head, as it came or as it would have come by HTTP/1.
    pub(crate) fn head_length(&self) -> usize {
        match &self.version {
            Version::One(_, _, length) => *length,
            Version::Two(session) => {
                let head = session.req_header();
                let fields = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4);
                head.raw_path().len() + fields.sum::<usize>()
            }
        }
    }

    /// What was wrong with the frame of the body.
    pub(crate) fn malformed(&self) -> Option<Malformed> {
        match &self.version {
            Version::One(_, inbound, _) => inbound.malformed(),
            Version::Two(_) => None,
        }
    }

    pub(crate) fn is_body_empty(&mut self) -> bool {
        match &mut self.version {
            Version::One(session, ..) => session.is_body_empty(),
            Version::Two(session) => session.is_body_empty(),
        }
    }

    /// The next part of the request's body; `None` at its end.
    pub(crate) async fn read_body(&mut self) -> Result<Option<Bytes>> {
        match &mut self.version {
            Version::One(session, ..) => session.read_body_bytes().await,
            Version::Two(session) => tokio::time::timeout(self.read, session.read_body_bytes())
                .await
                .unwrap_or_else(|_| Error::e_explain(ErrorType::ReadTimedout, "no part of the body in time")),
        }
    }

    /// What comes on a connection that was upgraded.
    pub(crate) async fn read_upgraded(&mut self) -> Result<Option<Bytes>> {
        match &mut self.version {
            Version::One(session, ..) => {
                session.set_read_timeout(None);
                session.read_body_bytes().await
            }
            Version::Two(_) => Ok(None),
        }
    }

    /// Ends when the client is gone.
    pub(crate) async fn gone(&mut self) {
        let _ = match &mut self.version {
            Version::One(session, ..) => session.read_body_or_idle(true).await,
            Version::Two(session) => session.read_body_or_idle(true).await,
        };
    }

    /// Says that the body may be sent.
    pub(crate) async fn write_continue(&mut self) -> Result<(), Unwritten> {
        match &mut self.version {
            Version::One(session, ..) => within(self.write, session.write_continue_response()).await,
            // Nobody waits for it there.
            Version::Two(_) => Ok(()),
        }
    }

    /// Writes the head of an answer. pingora bounds the time of bodies only: a client that reads nothing must not hold a slot.
    pub(crate) async fn write_head(&mut self, head: ResponseHeader) -> Result<(), Unwritten> {
        match &mut self.version {
            Version::One(session, ..) => within(self.write, session.write_response_header(Box::new(head))).await,
            Version::Two(session) => session.write_response_header(Box::new(head), false).map_err(|_| Unwritten),
        }
    }

    /// Writes a part of the answer's body.
    pub(crate) async fn write_body(&mut self, part: Bytes) -> Result<(), Unwritten> {
        match &mut self.version {
            Version::One(session, ..) => session.write_body(&part).await.map(|_| ()),
            Version::Two(session) => session.write_body(part, false).await,
        }
        .map_err(|_| Unwritten)
    }

    /// Ends the answer.
    pub(crate) async fn finish(&mut self) -> Result<(), Unwritten> {
        match &mut self.version {
            Version::One(session, ..) => within(self.write, session.finish_body()).await,
            Version::Two(session) => session.finish().map_err(|_| Unwritten),
        }
    }

    /// Closes the connection after the answer, where a connection has one answer at a time.
    pub(crate) fn close_after(&mut self) {
        if let Version::One(session, ..) = &mut self.version {
            session.set_server_keepalive(None);
        }
    }

    /// The status of the answer, if one was begun. `100 Continue` is no answer yet.
    pub(crate) fn answered(&self) -> Option<u16> {
        let written = match &self.version {
            Version::One(session, ..) => session.response_written(),
            Version::Two(session) => session.response_written(),
        };
        written.map(|head| head.status).filter(|status| !status.is_informational()).map(|status| status.as_u16())
    }

    /// Bytes of the answer's body so far.
    pub(crate) fn bytes_sent(&self) -> usize {
        match &self.version {
            Version::One(session, ..) => session.body_bytes_sent(),
            Version::Two(session) => session.body_bytes_sent(),
        }
    }
}

async fn within<T>(limit: Duration, write: impl Future<Output = Result<T>>) -> Result<(), Unwritten> {
    match tokio::time::timeout(limit, write).await {
        Ok(Ok(_)) => Ok(()),
        _ => Err(Unwritten),
    }
}
