//! A connection to a PostgreSQL server: connect, TLS, log in, cancel, reset.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Buf, BufMut, BytesMut};
use cofferdam_tenant::{Cluster, Endpoint, Login, ServerTls};
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::auth::md5_response;
use crate::session::Backend;
use crate::stream::Stream;
use crate::wire::{Frame, Reply, Side, TransactionStatus, cstr, frame};

/// A message during login longer than this is not one.
const MAX_LOGIN_MESSAGE: usize = 64 << 10;

/// Why a server connection could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpstreamError {
    /// Network trouble.
    #[error("cannot connect to the database server: {0}")]
    Io(#[from] io::Error),
    /// Nothing within the time allowed.
    #[error("the database server did not answer within {0:?}")]
    Timeout(Duration),
    /// TLS was demanded and the server has none.
    #[error("the database server does not support TLS, but it is required")]
    NoTls,
    /// The server wants a method of authentication that the gateway does not speak.
    #[error("the database server asks for an unsupported authentication method ({0})")]
    Authentication(u32),
    /// The server broke the protocol.
    #[error("the database server sent an unexpected message during login")]
    Protocol,
    /// The server said no: its ErrorResponse.
    #[error("{message}")]
    Refused {
        /// SQLSTATE, `XX000` when the server gave none.
        code: String,
        /// The message.
        message: String,
    },
}

/// An open, logged-in connection.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) stream: Stream,
    pub(crate) inbound: BytesMut,
    pub(crate) outbound: BytesMut,
    pub(crate) backend: Backend,
    pub(crate) target: Arc<CancelTarget>,
    /// Reported settings after login, in the server's canonical form.
    pub(crate) reported: Arc<BTreeMap<String, String>>,
}

/// Where and how to cancel what a connection is doing.
#[derive(Debug)]
pub(crate) struct CancelTarget {
    cluster: Arc<Cluster>,
    tls: Option<Arc<ClientConfig>>,
    pub(crate) user: Box<str>,
    pub(crate) database: Box<str>,
    pub(crate) local: Option<SocketAddr>,
    pub(crate) connected: SystemTime,
    pid: u32,
    secret: Vec<u8>,
}

impl CancelTarget {
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn address(&self) -> &Endpoint {
        &self.cluster.address
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Sends the cancel and waits until the server has closed the connection.
    pub(crate) async fn cancel(&self) -> io::Result<()> {
        if self.secret.is_empty() {
            return Ok(());
        }
        let deliver = async {
            // Encrypted as the connection itself: the secret is worth as much as a password while it lives.
            let mut stream = open(&self.cluster, self.tls.as_ref()).await.map_err(io::Error::other)?;
            let mut packet = BytesMut::new();
            packet.packet(80_877_102, |b| {
                b.put_u32(self.pid);
                b.put_slice(&self.secret);
            });
            stream.drain(&mut packet).await?;
            let mut rest = BytesMut::new();
            while stream.fill(&mut rest).await? > 0 {
                rest.clear();
            }
            Ok(())
        };
        tokio::time::timeout(self.cluster.connect_timeout, deliver)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// Opens a connection and logs in.
pub(crate) async fn connect(
    cluster: &Arc<Cluster>,
    tls: Option<&Arc<ClientConfig>>,
    login: &Login,
    database: &str,
    settings: &BTreeMap<String, String>,
    application_name: &str,
) -> Result<Upstream, UpstreamError> {
    let work = log_in(cluster, tls, login, database, settings, application_name);
    tokio::time::timeout(cluster.connect_timeout, work)
        .await
        .unwrap_or(Err(UpstreamError::Timeout(cluster.connect_timeout)))
}

/// A connection on which nothing has been said yet.
async fn open(cluster: &Cluster, tls: Option<&Arc<ClientConfig>>) -> Result<Stream, UpstreamError> {
    let address = &cluster.address;
    let tcp = TcpStream::connect((address.host.as_str(), address.port)).await?;
    tcp.set_nodelay(true)?;
    crate::client::keep_alive(&tcp);
    match tls {
        Some(config) => encrypted(tcp, cluster, config).await,
        None => Ok(Stream::Plain(tcp)),
    }
}

async fn log_in(
    cluster: &Arc<Cluster>,
    tls: Option<&Arc<ClientConfig>>,
    login: &Login,
    database: &str,
    settings: &BTreeMap<String, String>,
    application_name: &str,
) -> Result<Upstream, UpstreamError> {
    let mut stream = open(cluster, tls).await?;
    let (is_encrypted, local) = (matches!(stream, Stream::Tls(..)), stream.socket().local_addr().ok());
    let mut outbound = BytesMut::new();
    outbound.packet(196_608, |b| {
        let pairs = [("user", login.role.as_str()), ("database", database), ("application_name", application_name)];
        let settings = settings.iter().map(|(k, v)| (k.as_str(), v.as_str()));
        for (name, value) in pairs.into_iter().filter(|(_, v)| !v.is_empty()).chain(settings) {
            for text in [name, value] {
                b.put_slice(text.as_bytes());
                b.put_u8(0);
            }
        }
        b.put_u8(0);
    });
    stream.drain(&mut outbound).await?;
    let mut inbound = BytesMut::new();
    let mut scram: Option<ScramSha256> = None;
    let mut reported = BTreeMap::new();
    let mut key = (0, Vec::new());
    loop {
        let (kind, body) = message(&mut stream, &mut inbound).await?;
        match kind {
            b'R' => authenticate(&body, login, &mut scram, &mut outbound)?,
            b'S' => {
                if let Some((name, value)) = cstr(&body).and_then(|(n, rest)| Some((n, cstr(rest)?.0))) {
                    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
                    reported.insert(text(name), text(value));
                }
            }
            b'K' if body.len() >= 8 => {
                key = (u32::from_be_bytes([body[0], body[1], body[2], body[3]]), body[4..].to_vec());
            }
            b'E' => return Err(refused(&body)),
            b'Z' => break,
            b'N' | b'v' => {}
            _ => return Err(UpstreamError::Protocol),
        }
        stream.drain(&mut outbound).await?;
    }
    Ok(Upstream {
        stream,
        inbound,
        outbound,
        backend: Backend::new(&reported, application_name),
        target: Arc::new(CancelTarget {
            cluster: Arc::clone(cluster),
            tls: tls.filter(|_| is_encrypted).cloned(),
            user: login.role.as_str().into(),
            database: database.into(),
            local,
            connected: SystemTime::now(),
            pid: key.0,
            secret: key.1,
        }),
        reported: Arc::new(reported),
    })
}

async fn encrypted(mut tcp: TcpStream, cluster: &Cluster, config: &Arc<ClientConfig>) -> Result<Stream, UpstreamError> {
    let mut request = BytesMut::new();
    request.packet(80_877_103, |_| {});
    tcp.write_all(&request).await?;
    let mut answer = [0];
    tcp.read_exact(&mut answer).await?;
    match answer[0] {
        b'S' => {
            let name = ServerName::try_from(cluster.address.host.clone())
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
            let tls = TlsConnector::from(Arc::clone(config)).connect(name, tcp).await?;
            Ok(Stream::Tls(Box::new(tls.into()), false))
        }
        b'N' if cluster.tls == ServerTls::Prefer => Ok(Stream::Plain(tcp)),
        b'N' => Err(UpstreamError::NoTls),
        _ => Err(UpstreamError::Protocol),
    }
}

fn authenticate(
    body: &[u8],
    login: &Login,
    scram: &mut Option<ScramSha256>,
    out: &mut BytesMut,
) -> Result<(), UpstreamError> {
    let Some((code, data)) = body.split_first_chunk::<4>() else { return Err(UpstreamError::Protocol) };
    let password = login.password.expose();
    match u32::from_be_bytes(*code) {
        0 => {}
        3 => out.message(b'p', |b| {
            b.put_slice(password.as_bytes());
            b.put_u8(0);
        }),
        5 => {
            let salt = *data.first_chunk::<4>().ok_or(UpstreamError::Protocol)?;
            let answer = md5_response(&login.role, password, salt);
            out.message(b'p', |b| {
                b.put_slice(answer.as_bytes());
                b.put_u8(0);
            });
        }
        10 => {
            if !data.split(|b| *b == 0).any(|m| m == SCRAM_SHA_256.as_bytes()) {
                return Err(UpstreamError::Authentication(10));
            }
            let client = scram.insert(ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported()));
            out.message(b'p', |b| {
                b.put_slice(SCRAM_SHA_256.as_bytes());
                b.put_u8(0);
                b.put_u32(client.message().len() as u32);
                b.put_slice(client.message());
            });
        }
        11 => {
            let client = scram.as_mut().ok_or(UpstreamError::Protocol)?;
            client.update(data)?;
            out.message(b'p', |b| b.put_slice(client.message()));
        }
        12 => scram.as_mut().ok_or(UpstreamError::Protocol)?.finish(data)?,
        other => return Err(UpstreamError::Authentication(other)),
    }
    Ok(())
}

/// Reads one message, header checked and body complete.
async fn message(stream: &mut Stream, inbound: &mut BytesMut) -> Result<(u8, BytesMut), UpstreamError> {
    loop {
        match frame(Side::Server, inbound) {
            Ok(Some(f)) if f.total > MAX_LOGIN_MESSAGE => return Err(UpstreamError::Protocol),
            Ok(Some(f)) if inbound.len() >= f.total => {
                let mut whole = inbound.split_to(f.total);
                whole.advance(Frame::HEADER);
                return Ok((f.kind, whole));
            }
            Ok(_) => {}
            Err(_) => return Err(UpstreamError::Protocol),
        }
        if stream.fill(inbound).await? == 0 {
            return Err(UpstreamError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// An ErrorResponse as an error. One without SQLSTATE or message is tolerated (rule 1).
fn refused(body: &[u8]) -> UpstreamError {
    let (code, message) = error_fields(body);
    UpstreamError::Refused { code, message }
}

/// SQLSTATE and message of an ErrorResponse.
pub(crate) fn error_fields(body: &[u8]) -> (String, String) {
    let (mut code, mut message) = (String::from("XX000"), String::from("the database server refused the connection"));
    let mut rest = body;
    while let Some((&field, after)) = rest.split_first().filter(|(f, _)| **f != 0) {
        let Some((text, after)) = cstr(after) else { break };
        match field {
            b'C' => code = String::from_utf8_lossy(text).into_owned(),
            b'M' => message = String::from_utf8_lossy(text).into_owned(),
            _ => {}
        }
        rest = after;
    }
    (code, message)
}

impl Upstream {
    /// Makes the session as fresh as after login: `DISCARD ALL`. An error means that the connection must be closed.
    pub(crate) async fn reset(&mut self, limit: Duration) -> Result<(), UpstreamError> {
        let work = async {
            self.outbound.query("DISCARD ALL");
            self.stream.drain(&mut self.outbound).await?;
            let mut failed = false;
            loop {
                let (kind, body) = message(&mut self.stream, &mut self.inbound).await?;
                match kind {
                    b'S' => {
                        if let Some((name, value)) = cstr(&body).and_then(|(n, rest)| Some((n, cstr(rest)?.0))) {
                            self.backend.report(name, value);
                        }
                    }
                    b'E' => failed = true,
                    b'Z' if !failed
                        && body.first().copied().and_then(TransactionStatus::from_byte)
                            == Some(TransactionStatus::Idle) =>
                    {
                        return Ok(());
                    }
                    b'Z' => return Err(UpstreamError::Protocol),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(limit, work).await.unwrap_or(Err(UpstreamError::Timeout(limit)))?;
        self.backend.reset();
        Ok(())
    }

    /// Whether an idle connection is still good: open, and with nothing to say.
    pub(crate) fn is_alive(&self) -> bool {
        let mut byte = [0];
        match self.stream.socket().try_read(&mut byte) {
            Err(e) => e.kind() == io::ErrorKind::WouldBlock && self.inbound.is_empty(),
            // The end of the stream, or a farewell that nobody asked for.
            Ok(_) => false,
        }
    }
}
