//! A connection to a PostgreSQL server: connect, TLS, log in, cancel, reset.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Buf, BufMut, BytesMut};
use cofferdam_tenant::{Cluster, Endpoint, Login, Password, TlsMode};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::auth::{
    ClientKeys, Derived, Knows, SCRAM, SCRAM_PLUS, ScramClient, ScramError, Verifiers, md5_response, md5_stored, nonce,
};
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
    /// No server of the wanted kind is to be had now.
    #[error("no {0} of the cluster can be reached at the moment")]
    NoServer(&'static str),
    /// The password is known only as PostgreSQL stores it, and no client has shown yet that it has it.
    #[error("the password is not known: a client has to log in with SCRAM first")]
    NoPassword,
    /// TLS was demanded and the server has none.
    #[error("the database server does not support TLS, but it is required")]
    NoTls,
    /// The server wants a method of authentication that the gateway does not speak.
    #[error("the database server asks for an unsupported authentication method ({0})")]
    Authentication(u32),
    /// The server's side of a SCRAM exchange is wrong, or our keys are for another password.
    #[error("cannot prove the password to the database server: {0}")]
    Scram(#[from] ScramError),
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

impl UpstreamError {
    /// Whether the server could not be reached, or not yet: trying again may help.
    pub fn is_unreachable(&self) -> bool {
        match self {
            // A certificate that is not the right one does not get better by waiting.
            Self::Io(error) => !matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput),
            Self::Timeout(_) | Self::NoServer(_) => true,
            // It starts, stops or recovers.
            Self::Refused { code, .. } => code == "57P03" || code == "57P01" || code == "57P02",
            _ => false,
        }
    }

    /// Whether the server has no room for one more connection: it may have some in a moment.
    pub fn is_crowded(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if code == "53300")
    }
}

/// A server, and how to get there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) cluster: &'a Arc<Cluster>,
    pub(crate) address: &'a Endpoint,
    pub(crate) tls: Option<&'a Arc<ClientConfig>>,
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
    address: Endpoint,
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
        &self.address
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
            let to = Target { cluster: &self.cluster, address: &self.address, tls: self.tls.as_ref() };
            let mut stream = open(to).await.map_err(io::Error::other)?;
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
    to: Target<'_>,
    verifiers: &Verifiers,
    login: &Login,
    database: &str,
    settings: &BTreeMap<String, String>,
    application_name: &str,
) -> Result<Upstream, UpstreamError> {
    let limit = to.cluster.connect_timeout;
    let shown = verifiers.shown(login);
    let credentials = Credentials { login, shown: shown.as_deref(), derived: &verifiers.derived };
    let try_it = |to| log_in(to, credentials, database, settings, application_name);
    let work = async {
        // As libpq: `allow` encrypts when the server insists, `prefer` does without when the server insists on that.
        let is_rule = |error: &UpstreamError| matches!(error, UpstreamError::Refused { code, .. } if code == "28000");
        match to.cluster.tls {
            TlsMode::Allow => match try_it(Target { tls: None, ..to }).await {
                Err(error) if is_rule(&error) => try_it(to).await,
                other => other,
            },
            TlsMode::Prefer => match try_it(to).await {
                Err(error) if is_rule(&error) => try_it(Target { tls: None, ..to }).await,
                other => other,
            },
            _ => try_it(to).await,
        }
    };
    let outcome = tokio::time::timeout(limit, work).await.unwrap_or(Err(UpstreamError::Timeout(limit)));
    if shown.is_some() && matches!(&outcome, Err(UpstreamError::Refused { code, .. }) if code == "28P01") {
        // The password was changed: whoever comes next has to show the new one (rule 17).
        verifiers.forget(login);
    }
    outcome
}

/// A connection on which nothing has been said yet.
async fn open(to: Target<'_>) -> Result<Stream, UpstreamError> {
    let tcp = TcpStream::connect((to.address.host.as_str(), to.address.port)).await?;
    tcp.set_nodelay(true)?;
    crate::client::keep_alive(&tcp);
    match to.tls {
        Some(config) => encrypted(tcp, to, config).await,
        None => Ok(Stream::Plain(tcp)),
    }
}

/// What there is to prove who we are.
#[derive(Debug, Clone, Copy)]
struct Credentials<'a> {
    login: &'a Login,
    /// What a client has shown to have, when the password is not known.
    shown: Option<&'a ClientKeys>,
    derived: &'a Derived,
}

async fn log_in(
    to: Target<'_>,
    credentials: Credentials<'_>,
    database: &str,
    settings: &BTreeMap<String, String>,
    application_name: &str,
) -> Result<Upstream, UpstreamError> {
    let login = credentials.login;
    let mut stream = open(to).await?;
    let binding = match &stream {
        Stream::Tls(tls, _) => {
            let leaf = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            leaf.and_then(|leaf| cofferdam_tls::end_point(leaf))
        }
        Stream::Plain(_) => None,
    };
    // On this machine, or encrypted.
    let peer = stream.socket().peer_addr()?;
    let is_private = matches!(stream, Stream::Tls(..)) || peer.ip().is_loopback();
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
    let mut scram: Option<ScramClient> = None;
    let mut reported = BTreeMap::new();
    let mut key = (0, Vec::new());
    loop {
        let (kind, body) = message(&mut stream, &mut inbound).await?;
        match kind {
            b'R' => authenticate(&body, credentials, binding.as_deref(), is_private, &mut scram, &mut outbound)?,
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
            cluster: Arc::clone(to.cluster),
            address: to.address.clone(),
            tls: to.tls.filter(|_| is_encrypted).cloned(),
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

async fn encrypted(mut tcp: TcpStream, to: Target<'_>, config: &Arc<ClientConfig>) -> Result<Stream, UpstreamError> {
    let mut request = BytesMut::new();
    request.packet(80_877_103, |_| {});
    tcp.write_all(&request).await?;
    let mut answer = [0];
    tcp.read_exact(&mut answer).await?;
    match answer[0] {
        b'S' => {
            let name = ServerName::try_from(to.address.host.clone())
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
            let tls = TlsConnector::from(Arc::clone(config)).connect(name, tcp).await?;
            Ok(Stream::Tls(Box::new(tls.into()), false))
        }
        b'N' if !to.cluster.tls.is_required() => Ok(Stream::Plain(tcp)),
        b'N' => Err(UpstreamError::NoTls),
        _ => Err(UpstreamError::Protocol),
    }
}

fn authenticate(
    body: &[u8],
    credentials: Credentials<'_>,
    binding: Option<&[u8]>,
    is_private: bool,
    scram: &mut Option<ScramClient>,
    out: &mut BytesMut,
) -> Result<(), UpstreamError> {
    let Some((code, data)) = body.split_first_chunk::<4>() else { return Err(UpstreamError::Protocol) };
    let Credentials { login, shown, derived } = credentials;
    let knows = || match (&login.password, shown) {
        (Password::Plain(password), _) => Ok(Knows::Password(password.expose(), derived)),
        (_, Some(keys)) => Ok(Knows::Keys(keys)),
        _ => Err(UpstreamError::NoPassword),
    };
    match u32::from_be_bytes(*code) {
        // A server that does not prove that it knows the password is not the one that was to be proved to.
        0 if scram.is_some() => return Err(UpstreamError::Scram(ScramError::WrongServer)),
        0 => {}
        // Whoever is in between would have the password itself.
        3 if !is_private => return Err(UpstreamError::Authentication(3)),
        3 => {
            let Password::Plain(password) = &login.password else { return Err(UpstreamError::NoPassword) };
            out.message(b'p', |b| {
                b.put_slice(password.expose().as_bytes());
                b.put_u8(0);
            });
        }
        5 => {
            let salt = *data.first_chunk::<4>().ok_or(UpstreamError::Protocol)?;
            let stored = match &login.password {
                Password::Plain(password) => md5_stored(&login.role, password.expose()),
                Password::Stored(stored) if stored.expose().starts_with("md5") => stored.expose().to_owned(),
                _ => return Err(UpstreamError::NoPassword),
            };
            let answer = md5_response(&stored, salt);
            out.message(b'p', |b| {
                b.put_slice(answer.as_bytes());
                b.put_u8(0);
            });
        }
        10 => {
            let offered = |name: &str| data.split(|b| *b == 0).any(|m| m == name.as_bytes());
            let can_bind = binding.is_some();
            let binding = binding.filter(|_| offered(SCRAM_PLUS));
            if binding.is_none() && !offered(SCRAM) {
                return Err(UpstreamError::Authentication(10));
            }
            // Nothing is begun that cannot be ended.
            knows()?;
            let nonce = nonce().map_err(io::Error::from)?;
            let client = scram.insert(ScramClient::new(&nonce, binding, can_bind));
            let first = client.first();
            out.message(b'p', |b| {
                b.put_slice(if binding.is_some() { SCRAM_PLUS } else { SCRAM }.as_bytes());
                b.put_u8(0);
                b.put_u32(first.len() as u32);
                b.put_slice(first.as_bytes());
            });
        }
        11 => {
            let client = scram.as_mut().ok_or(UpstreamError::Protocol)?;
            let proof = client.prove(knows()?, data)?;
            out.message(b'p', |b| b.put_slice(proof.as_bytes()));
        }
        12 => scram.take().ok_or(UpstreamError::Protocol)?.finish(data)?,
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

/// The columns of a DataRow, as text.
fn row(mut body: &[u8]) -> Option<Vec<Option<String>>> {
    let columns = body.try_get_u16().ok()?;
    let mut row = Vec::new();
    for _ in 0..columns {
        let length = body.try_get_i32().ok()?;
        let Ok(length) = usize::try_from(length) else {
            row.push(None);
            continue;
        };
        let (value, rest) = body.split_at_checked(length)?;
        row.push(Some(String::from_utf8_lossy(value).into_owned()));
        body = rest;
    }
    Some(row)
}

/// An ErrorResponse as an error. One without SQLSTATE or message is tolerated (rule 1).
fn refused(body: &[u8]) -> UpstreamError {
    let (code, mut message) = error_fields(body);
    // In whichever language it is said, it names the address from which we have come: of our network, no client's business.
    if code == "28000" && message.contains("pg_hba.conf") {
        tracing::warn!(reason = %message, "a database server does not let us in");
        "the database server's pg_hba.conf does not let this role in through the gateway".clone_into(&mut message);
    }
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
    /// Whether the server is a standby. From PostgreSQL 14 on it has said so; an older one is asked.
    pub(crate) async fn is_standby(&mut self, limit: Duration) -> Result<bool, UpstreamError> {
        if let Some(standby) = self.reported.get("in_hot_standby") {
            return Ok(standby == "on");
        }
        let rows = self.ask("SELECT pg_catalog.pg_is_in_recovery()", &[], limit).await?;
        Ok(rows.first().is_some_and(|row| row.first().is_some_and(|value| value.as_deref() == Some("t"))))
    }

    /// Asks something for the gateway itself: one statement with parameters, all as text. The rows as text.
    pub(crate) async fn ask(
        &mut self,
        sql: &str,
        parameters: &[&str],
        limit: Duration,
    ) -> Result<Vec<Vec<Option<String>>>, UpstreamError> {
        let out = &mut self.outbound;
        out.message(b'P', |b| {
            b.put_u8(0);
            crate::wire::put_cstr(b, sql);
            b.put_u16(0);
        });
        out.message(b'B', |b| {
            b.put_slice(&[0, 0]);
            b.put_u16(0);
            b.put_u16(parameters.len() as u16);
            for parameter in parameters {
                b.put_u32(parameter.len() as u32);
                b.put_slice(parameter.as_bytes());
            }
            b.put_u16(0);
        });
        out.message(b'E', |b| {
            b.put_u8(0);
            b.put_u32(0);
        });
        out.message(b'S', |_| {});
        let work = async {
            self.stream.drain(&mut self.outbound).await?;
            let (mut rows, mut failed) = (Vec::new(), None);
            loop {
                let (kind, body) = message(&mut self.stream, &mut self.inbound).await?;
                match kind {
                    b'D' => rows.push(row(&body).ok_or(UpstreamError::Protocol)?),
                    b'E' => failed = Some(refused(&body)),
                    b'Z' => return failed.map_or(Ok(rows), Err),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(limit, work).await.unwrap_or(Err(UpstreamError::Timeout(limit)))
    }

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
