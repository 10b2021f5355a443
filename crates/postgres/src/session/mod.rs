//! One client's session in front of changing server connections, without I/O.
//!
//! [`Session`] is fed the messages of both sides and writes what each side shall receive. It knows which replies are
//! still owed, which prepared statements exist where, and whether the client has left state behind that keeps the
//! server connection with it. The same machine is driven by sockets, by property tests and by the fuzzer.

mod listening;
mod pipeline;
mod statements;

pub use pipeline::{Owed, Pipeline, Statements};
pub(crate) use statements::PREFIX;
pub use statements::{Backend, Statement, StatementRegistry};

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use crate::sql::{self, Listen, Only};
use crate::wire::{Frame, Reply, Severity, TransactionStatus, cstr};
use listening::{INSTEAD_OF_LISTEN, instead_of_listen};
use statements::server_name;

/// A message up to this size is read whole when its content matters.
pub const INSPECT: usize = 1 << 20;
/// Named prepared statements one client may hold, and the bytes of their texts.
const MAX_STATEMENTS: usize = 10_000;
const MAX_STATEMENT_BYTES: usize = 16 << 20;
/// With so many replies owed, the client's next message has to wait.
const MAX_OWED: usize = 10_000;

/// What becomes of a client's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientStep {
    /// The first `consumed` bytes have been dealt with; the rest of the message goes to the server unchanged.
    Forward {
        /// Bytes of the message, header included, that are already done.
        consumed: usize,
    },
    /// The message is done with, or to be skipped unread.
    Drop,
    /// The message needs a server connection: get one, and offer the message again.
    NeedServer,
    /// What the message means depends on what the server has not answered yet: offer it again then.
    Later,
    /// The client says goodbye.
    Terminate,
}

/// What becomes of a server's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerStep {
    /// It goes to the client.
    Forward,
    /// It answers something the client did not ask.
    Drop,
}

/// A message that ends the connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Violation {
    /// The SQLSTATE.
    pub code: &'static str,
    /// What was wrong.
    pub message: String,
}

impl Violation {
    fn new(message: impl Into<String>) -> Self {
        Self { code: "08P01", message: message.into() }
    }
}

/// One client's session.
#[derive(Debug)]
pub struct Session {
    registry: Arc<StatementRegistry>,
    statements: Statements,
    /// Bytes of the texts in `statements`, or more: what was closed counts until all are.
    statement_bytes: usize,
    /// The body of the last Parse without a name, when it may be needed on another connection.
    unnamed: Option<Vec<u8>>,
    unnamed_effect: sql::Effect,
    /// Whether the leased connection has the client's unnamed statement.
    unnamed_here: bool,
    pipeline: Pipeline,
    status: TransactionStatus,
    /// A server connection is held, perhaps without a slot.
    leased: bool,
    pinned: bool,
    /// A reported setting is not what it was on the fresh connection.
    altered: bool,
    dirty: bool,
    /// `DISCARD ALL` has taken from the connection the name that the client gave itself at login.
    nameless: bool,
    parses: u64,
    /// `LISTEN` is the gateway's business: it must not reach a server connection that others use.
    shares_listener: bool,
    /// Named statements, and portals, that are `LISTEN` or `UNLISTEN`; and the unnamed statement.
    listen_statements: HashMap<Bytes, Listen>,
    listen_portals: HashMap<Bytes, Listen>,
    unnamed_listen: Option<Listen>,
    /// The channels that the client listens to.
    listening: BTreeSet<String>,
    /// What the open transaction has said about that, in order.
    pending: Vec<Listen>,
    /// Whether a ROLLBACK has ended, and whether there was an error, since the last ReadyForQuery or COMMIT.
    rolled_back: bool,
    failed: bool,
    /// The query that is running says `UNLISTEN *` among other things.
    unlistens_all: bool,
    /// Notifications of the leased connection itself are not for this client.
    deaf: bool,
    /// Told the client an error of our own inside a batch: skip its messages until Sync, which we answer.
    refused: bool,
}

impl Session {
    /// A fresh session. Statements are shared through the registry with sessions of the same database and role.
    pub fn new(registry: Arc<StatementRegistry>) -> Self {
        Self {
            registry,
            statements: Statements::new(),
            statement_bytes: 0,
            unnamed: None,
            unnamed_effect: sql::Effect::default(),
            unnamed_here: false,
            pipeline: Pipeline::default(),
            status: TransactionStatus::Idle,
            leased: false,
            pinned: false,
            altered: false,
            dirty: false,
            nameless: false,
            parses: 0,
            shares_listener: false,
            listen_statements: HashMap::new(),
            listen_portals: HashMap::new(),
            unnamed_listen: None,
            listening: BTreeSet::new(),
            pending: Vec::new(),
            rolled_back: false,
            failed: false,
            unlistens_all: false,
            deaf: false,
            refused: false,
        }
    }

    /// How many bytes of a message must have arrived before [`Self::on_client`] can judge it.
    pub fn client_needs(frame: Frame) -> usize {
        match frame.kind {
            // Names stand at the front; a name that does not fit is refused.
            b'B' | b'D' | b'E' | b'C' => frame.total.min(4096),
            b'Q' | b'P' => frame.total.min(INSPECT),
            _ => Frame::HEADER,
        }
    }

    /// How many bytes of a server's message must have arrived before [`Self::on_server`] can judge it.
    pub fn server_needs(frame: Frame) -> usize {
        match frame.kind {
            // What is said after RowDescription must not come in the middle of it.
            b'Z' | b'S' | b'C' | b'T' | b'E' => frame.total.min(INSPECT),
            _ => Frame::HEADER,
        }
    }

    /// Judges a client's message. `seen` begins with the header and holds at least [`Self::client_needs`] bytes.
    ///
    /// Writes to `to_server` and `to_client` what must be said beyond the message itself.
    pub fn on_client(
        &mut self,
        frame: Frame,
        seen: &[u8],
        backend: Option<&mut Backend>,
        to_server: &mut BytesMut,
        to_client: &mut BytesMut,
    ) -> Result<ClientStep, Violation> {
        let body = &seen[Frame::HEADER..];
        if frame.kind == b'X' {
            return Ok(ClientStep::Terminate);
        }
        if self.refused {
            if frame.kind == b'S' {
                self.refused = false;
                to_client.ready(self.status);
            }
            return Ok(ClientStep::Drop);
        }
        match frame.kind {
            b'd' | b'c' | b'f' => {
                // Drivers may send copy data before they have read CopyInResponse. Outside of COPY, PostgreSQL ignores
                // it: what is left of a copy that failed (rule 6).
                if backend.is_none() {
                    return Ok(ClientStep::Drop);
                }
                if frame.kind != b'd' {
                    self.pipeline.copy_ends(to_client);
                }
                return Ok(ClientStep::Forward { consumed: 0 });
            }
            // Inside COPY, PostgreSQL ignores Sync and Flush, and fails the copy for anything else.
            b'S' | b'H' if self.pipeline.copying_in() => return Ok(ClientStep::Drop),
            _ if self.pipeline.copying_in() => {
                self.pipeline.copy_breaks();
                return Ok(ClientStep::Forward { consumed: 0 });
            }
            b'S' if self.pipeline.skipping() => {
                self.pipeline.stop_skipping();
                self.pipeline.owe(Owed::Sync, to_client);
                return Ok(ClientStep::Forward { consumed: 0 });
            }
            _ if self.pipeline.skipping() => return Ok(ClientStep::Drop),
            b'S' if backend.is_none() => {
                to_client.ready(TransactionStatus::Idle);
                return Ok(ClientStep::Drop);
            }
            b'H' if backend.is_none() => return Ok(ClientStep::Drop),
            b'p' => return Err(Violation::new("unexpected password message after authentication")),
            _ => {}
        }
        if self.pipeline.has_barrier() || self.depends_on_answers(frame.kind, body) {
            return Ok(ClientStep::Later);
        }
        match frame.kind {
            b'Q' => Ok(self.query(frame, body, backend, to_server, to_client)),
            b'P' => self.parse(frame, body, backend, to_server, to_client),
            b'B' => self.bind(frame, body, backend, to_server, to_client),
            b'D' => self.describe(frame, body, backend, to_server, to_client),
            b'C' => self.close(frame, body, backend, to_client),
            b'E' => {
                let listen = if self.listen_portals.is_empty() {
                    None
                } else {
                    cstr(body).and_then(|(portal, _)| self.listen_portals.get(portal)).cloned()
                };
                let owed = listen.map_or(Owed::Execute, Owed::ListenExecute);
                Ok(self.simple_owe(owed, backend, to_client))
            }
            b'F' => {
                // Any function, by number: nothing can be seen of what it does.
                self.dirty |= backend.is_some();
                Ok(self.simple_owe(Owed::FunctionCall, backend, to_client))
            }
            b'S' => Ok(self.simple_owe(Owed::Sync, backend, to_client)),
            b'H' => {
                self.pipeline.flushes();
                Ok(ClientStep::Forward { consumed: 0 })
            }
            other => Err(Violation::new(format!("invalid frontend message type {other}"))),
        }
    }

    /// Whether a message names a statement of which an earlier batch, not answered yet, decides what it is.
    fn depends_on_answers(&self, kind: u8, body: &[u8]) -> bool {
        if self.pipeline.is_empty() {
            return false;
        }
        let name = match (kind, body.first()) {
            (b'P', _) => cstr(body),
            (b'B', _) => cstr(body).and_then(|(_, rest)| cstr(rest)),
            (b'D' | b'C', Some(b'S')) => cstr(&body[1..]),
            _ => None,
        };
        let Some((name, _)) = name.filter(|(name, _)| !name.is_empty()) else { return false };
        self.pipeline.decides_on_name(name)
            || self.statements.get(name).is_some_and(|s| self.pipeline.decides_on_statement(s.id))
    }

    fn simple_owe(&mut self, owed: Owed, backend: Option<&mut Backend>, to_client: &mut BytesMut) -> ClientStep {
        if backend.is_none() {
            return ClientStep::NeedServer;
        }
        self.pipeline.owe(owed, to_client);
        ClientStep::Forward { consumed: 0 }
    }

    fn query(
        &mut self,
        frame: Frame,
        body: &[u8],
        backend: Option<&mut Backend>,
        to_server: &mut BytesMut,
        to_client: &mut BytesMut,
    ) -> ClientStep {
        let mut effect = sql::effect(body);
        effect.opaque |= Frame::HEADER + body.len() < frame.total;
        if self.shares_listener
            && let Some(listen) = sql::listen(body)
        {
            if backend.is_none() && !self.leased {
                to_client.complete(listen.tag());
                to_client.ready(TransactionStatus::Idle);
                self.hear(listen);
                return ClientStep::Drop;
            }
            if backend.is_none() {
                return ClientStep::NeedServer;
            }
            self.unnamed = None;
            self.unnamed_here = false;
            to_server.query(INSTEAD_OF_LISTEN);
            self.pipeline.owe(Owed::ListenQuery(listen), to_client);
            return ClientStep::Drop;
        }
        if let (None, Some(only), false) = (&backend, effect.only, self.needs_reset() || self.leased) {
            // The session is clean: there is nothing to discard but what we keep ourselves.
            if matches!(only, Only::DiscardAll | Only::DeallocateAll) {
                self.forget_statements();
            }
            if matches!(only, Only::DiscardAll | Only::UnlistenAll) {
                self.hear(Listen::ToNothing);
            }
            to_client.complete(only.tag());
            to_client.ready(TransactionStatus::Idle);
            return ClientStep::Drop;
        }
        if backend.is_none() {
            return ClientStep::NeedServer;
        }
        self.unnamed = None;
        self.unnamed_here = false;
        self.apply(effect);
        let is_barrier = effect.deallocates || effect.unlistens_all;
        self.unlistens_all = effect.unlistens_all && self.shares_listener;
        self.pipeline.owe(if is_barrier { Owed::Barrier } else { Owed::Query }, to_client);
        ClientStep::Forward { consumed: 0 }
    }

    fn parse(
        &mut self,
        frame: Frame,
        body: &[u8],
        backend: Option<&mut Backend>,
        to_server: &mut BytesMut,
        to_client: &mut BytesMut,
    ) -> Result<ClientStep, Violation> {
        let Some((name, rest)) = cstr(body) else { return Err(Violation::new("invalid string in message")) };
        let whole = Frame::HEADER + body.len() == frame.total;
        let instead = if whole && self.shares_listener { instead_of_listen(rest) } else { None };
        let listen = instead.as_ref().map(|(listen, _)| listen.clone());
        let listens = listen.is_some();
        let rest = instead.as_ref().map_or(rest, |(_, body)| body);
        let Some(backend) = backend else {
            // Known to be good: the client need not wait for a slot to prepare it. It is prepared where it is used.
            if whole
                && !name.is_empty()
                && !self.statements.contains_key(name)
                && self.has_room(rest.len())
                && let Some(statement) = self.registry.accepted(rest)
            {
                self.hold(Bytes::copy_from_slice(name), statement, listen);
                to_client.message(b'1', |_| {});
                return Ok(ClientStep::Drop);
            }
            return Ok(ClientStep::NeedServer);
        };
        let mut effect = sql::effect(cstr(rest).map_or(rest, |(text, _)| text));
        // In a batch nobody waits for what it takes away.
        effect.opaque |= !whole || effect.deallocates;
        if name.is_empty() {
            self.apply(effect);
            self.unnamed_listen = listen;
            self.unnamed_effect = effect;
            self.unnamed_here = true;
            if whole {
                let kept = self.unnamed.get_or_insert_default();
                kept.clear();
                kept.extend_from_slice(rest);
            } else {
                self.unnamed = None;
            }
            self.parses += 1;
            self.pipeline.owe(Owed::Parse(None), to_client);
            if listens {
                write_parse(to_server, b"", rest);
                return Ok(ClientStep::Drop);
            }
            return Ok(ClientStep::Forward { consumed: 0 });
        }
        if !whole || !self.has_room(rest.len()) {
            return Err(Violation {
                code: "54000",
                message: format!(
                    "a named prepared statement must be shorter than {INSPECT} bytes, and a client may hold \
                     {MAX_STATEMENTS} of {MAX_STATEMENT_BYTES} bytes together"
                ),
            });
        }
        if let Some(existing) = self.statements.get(name).cloned() {
            // PostgreSQL refuses to prepare a name twice: let it say so, under the name it knows.
            self.ensure_prepared(&existing, backend, to_server, to_client);
            write_parse(to_server, &server_name(existing.id), rest);
            self.pipeline.owe(Owed::Parse(None), to_client);
            return Ok(ClientStep::Drop);
        }
        let statement = self.registry.intern(rest, effect);
        if self.pipeline.decides_on_statement(statement.id) {
            return Ok(ClientStep::Later);
        }
        self.apply(effect);
        let name = Bytes::copy_from_slice(name);
        self.hold(name.clone(), Arc::clone(&statement), listen);
        if backend.has(statement.id) && self.status == TransactionStatus::Failed {
            // In a failed transaction PostgreSQL refuses most statements already here: let it, under another name.
            let probe = [&server_name(statement.id)[..], b"_probe"].concat();
            write_parse(to_server, &probe, rest);
            self.pipeline.owe(Owed::ProbeParse(name), to_client);
            write_close(to_server, &probe);
            self.pipeline.owe(Owed::InjectedClose(None), to_client);
        } else if backend.has(statement.id) {
            self.pipeline.owe(Owed::LocalParse(name), to_client);
        } else {
            backend.add(statement.id, to_server, &mut self.pipeline, to_client);
            self.parses += 1;
            write_parse(to_server, &server_name(statement.id), rest);
            self.pipeline.owe(Owed::Parse(Some((name, statement))), to_client);
        }
        Ok(ClientStep::Drop)
    }

    fn bind(
        &mut self,
        frame: Frame,
        body: &[u8],
        backend: Option<&mut Backend>,
        to_server: &mut BytesMut,
        to_client: &mut BytesMut,
    ) -> Result<ClientStep, Violation> {
        let Some((portal, after)) = cstr(body) else { return Err(Violation::new("a portal name is too long")) };
        let Some((name, after)) = cstr(after) else { return Err(Violation::new("a statement name is too long")) };
        let consumed = seen_until(body, after);
        let Some(backend) = backend else { return Ok(ClientStep::NeedServer) };
        let (renamed, id) = self.renamed(name, backend, to_server, to_client);
        let listen = if name.is_empty() { self.unnamed_listen.as_ref() } else { self.listen_statements.get(name) };
        match listen {
            Some(listen) if self.listen_portals.len() < MAX_STATEMENTS => {
                self.listen_portals.insert(Bytes::copy_from_slice(portal), listen.clone());
            }
            _ if self.listen_portals.is_empty() => {}
            _ => drop(self.listen_portals.remove(portal)),
        }
        let rest = frame.total - consumed;
        to_server.put_u8(b'B');
        to_server.put_u32((4 + portal.len() + 1 + renamed.len() + 1 + rest) as u32);
        to_server.put_slice(portal);
        to_server.put_u8(0);
        to_server.put_slice(&renamed);
        to_server.put_u8(0);
        self.pipeline.owe(Owed::Bind(id), to_client);
        Ok(ClientStep::Forward { consumed })
    }

    fn describe(
        &mut self,
        frame: Frame,
        body: &[u8],
        backend: Option<&mut Backend>,
        to_server: &mut BytesMut,
        to_client: &mut BytesMut,
    ) -> Result<ClientStep, Violation> {
        let Some(backend) = backend else { return Ok(ClientStep::NeedServer) };
        if let Some((b'S', name)) = body.split_first() {
            let Some((name, _)) = cstr(name) else { return Err(Violation::new("a statement name is too long")) };
            let (renamed, id) = self.renamed(name, backend, to_server, to_client);
            to_server.message(b'D', |b| {
                b.put_u8(b'S');
                b.put_slice(&renamed);
                b.put_u8(0);
            });
            self.pipeline.owe(Owed::Describe(id), to_client);
            return Ok(ClientStep::Drop);
        }
        debug_assert!(frame.kind == b'D');
        self.pipeline.owe(Owed::Describe(None), to_client);
        Ok(ClientStep::Forward { consumed: 0 })
    }

    fn close(
        &mut self,
        frame: Frame,
        body: &[u8],
        backend: Option<&mut Backend>,
        to_client: &mut BytesMut,
    ) -> Result<ClientStep, Violation> {
        debug_assert!(frame.kind == b'C');
        if backend.is_none() {
            return Ok(ClientStep::NeedServer);
        }
        if let Some((b'S', name)) = body.split_first() {
            let Some((name, _)) = cstr(name) else { return Err(Violation::new("a statement name is too long")) };
            if !name.is_empty() {
                // The statement stays on the server for the next client that prepares the same text.
                let closed = self.statements.remove(name);
                self.pipeline.owe(Owed::LocalClose(closed.map(|s| (Bytes::copy_from_slice(name), s))), to_client);
                return Ok(ClientStep::Drop);
            }
            self.unnamed = None;
            self.unnamed_here = false;
        }
        self.pipeline.owe(Owed::Close, to_client);
        Ok(ClientStep::Forward { consumed: 0 })
    }

    /// The name under which the leased server connection knows a client's statement, which is made to exist there, and
    /// its number if it has one.
    fn renamed(
        &mut self,
        name: &[u8],
        backend: &mut Backend,
        to_server: &mut BytesMut,
        to_client: &mut BytesMut,
    ) -> (Vec<u8>, Option<u64>) {
        if name.is_empty() {
            if self.unnamed_here {
                return (Vec::new(), None);
            }
            let Some(body) = &self.unnamed else {
                // There may be one on the connection, but it is somebody else's.
                return (b"cofferdam_unnamed".to_vec(), None);
            };
            // Parsed in an earlier transaction, on a connection that may have been another one.
            write_parse(to_server, b"", body);
            self.pipeline.owe(Owed::Injected, to_client);
            self.unnamed_here = true;
            let effect = self.unnamed_effect;
            self.apply(effect);
            return (Vec::new(), None);
        }
        match self.statements.get(name).cloned() {
            Some(statement) => {
                self.ensure_prepared(&statement, backend, to_server, to_client);
                self.apply(statement.effect);
                (server_name(statement.id), Some(statement.id))
            }
            // PostgreSQL will say that it does not exist; a name that looks like one of ours must not exist either.
            None if name.starts_with(PREFIX) => ([b"?".as_slice(), name].concat(), None),
            None => (name.to_vec(), None),
        }
    }

    fn ensure_prepared(
        &mut self,
        statement: &Statement,
        backend: &mut Backend,
        to_server: &mut BytesMut,
        to_client: &mut BytesMut,
    ) {
        if backend.touch(statement.id) {
            return;
        }
        backend.add(statement.id, to_server, &mut self.pipeline, to_client);
        self.parses += 1;
        write_parse(to_server, &server_name(statement.id), &statement.body);
        self.pipeline.owe(Owed::InjectedParse(statement.id), to_client);
    }

    /// Judges a server's message. `seen` begins with the header and holds at least [`Self::server_needs`] bytes.
    ///
    /// Writes to `after` what the client shall receive after the message.
    pub fn on_server(
        &mut self,
        frame: Frame,
        seen: &[u8],
        backend: &mut Backend,
        after: &mut BytesMut,
    ) -> Result<ServerStep, Violation> {
        let body = &seen[Frame::HEADER..];
        let injected = self.pipeline.front_is_injected_query();
        let forward = if injected { ServerStep::Drop } else { ServerStep::Forward };
        match frame.kind {
            b'D' | b'd' | b'T' | b't' | b'N' | b'A' | b'V' | b'c' => {
                if frame.kind == b'T' {
                    self.pipeline.paid(b'T', after);
                }
                match frame.kind {
                    b'A' if self.deaf => return Ok(ServerStep::Drop),
                    b'N' | b'A' => return Ok(ServerStep::Forward), // may come at any time (rule 9)
                    _ => {}
                }
                Ok(forward)
            }
            b'S' => {
                if injected {
                    return Ok(ServerStep::Drop);
                }
                if let Some((name, value)) = cstr(body).and_then(|(n, rest)| Some((n, cstr(rest)?.0))) {
                    // Whatever changed it, and whatever changes it back.
                    self.altered = backend.report(name, value);
                }
                Ok(ServerStep::Forward)
            }
            b'C' => {
                if !injected {
                    let tag = cstr(body).map_or(body, |(tag, _)| tag);
                    match tag {
                        b"COMMIT" => self.committed(),
                        b"ROLLBACK" => self.rolled_back = true,
                        b"UNLISTEN" if self.unlistens_all && matches!(self.pipeline.front(), Some(Owed::Barrier)) => {
                            self.pending.push(Listen::ToNothing);
                        }
                        b"DISCARD ALL" => {
                            self.deallocated(backend);
                            backend.discarded();
                            self.nameless = true;
                            self.pending.push(Listen::ToNothing);
                            // What was sent behind it may have left its own state already.
                            let is_last = self.pipeline.nothing_behind_front();
                            self.pinned &= !is_last;
                            self.dirty &= !is_last;
                        }
                        b"DEALLOCATE ALL" => self.deallocated(backend),
                        _ => {}
                    }
                }
                if let Some(Owed::ListenQuery(listen) | Owed::ListenExecute(listen)) = self.pipeline.front() {
                    after.complete(listen.tag());
                    self.pending.push(listen.clone());
                    self.pipeline.paid(b'C', after);
                    return Ok(ServerStep::Drop);
                }
                self.pipeline.paid(b'C', after);
                Ok(forward)
            }
            b'1' | b'2' | b'3' | b'n' | b'I' | b's' => {
                Ok(if self.pipeline.paid(frame.kind, after) { ServerStep::Forward } else { ServerStep::Drop })
            }
            b'G' => {
                self.pipeline.copy_in_begins();
                Ok(forward)
            }
            b'H' => Ok(forward),
            b'E' => {
                self.failed |= !injected;
                self.heal(body, backend);
                let statements = &mut self.statements;
                let batch = self.pipeline.failed(|lost| match lost {
                    Owed::Parse(Some((name, statement))) => {
                        statements.remove(name);
                        backend.distrust(statement.id);
                    }
                    Owed::LocalParse(name) | Owed::ProbeParse(name) => {
                        statements.remove(name);
                    }
                    Owed::InjectedParse(id) | Owed::InjectedClose(Some(id)) => backend.distrust(*id),
                    Owed::LocalClose(Some((name, statement))) => {
                        statements.insert(name.clone(), Arc::clone(statement));
                    }
                    _ => {}
                });
                if batch && !self.pipeline.owes_unnamed_parse() {
                    // Its Parse may have been skipped or not: nobody can rely on it any more.
                    self.unnamed = None;
                    self.unnamed_here = false;
                }
                Ok(forward)
            }
            b'Z' => {
                let Some(status) = body.first().copied().and_then(TransactionStatus::from_byte) else {
                    return Err(Violation::new("the server sent an invalid transaction status"));
                };
                if !injected {
                    self.status = status;
                    self.settle_listening();
                }
                if !self.pipeline.ready(after) {
                    return Err(Violation::new("the server sent ReadyForQuery that nobody asked for"));
                }
                Ok(forward)
            }
            b'W' => {
                Err(Violation { code: "0A000", message: "replication is not supported through the gateway".into() })
            }
            b'R' | b'K' => Err(Violation::new("the server asked for authentication a second time")),
            other => Err(Violation::new(format!("the server sent a message of unknown type {other}"))),
        }
    }

    /// A statement of the gateway's own, sent before what the client sends; its replies are swallowed.
    pub fn inject(&mut self, sql: &str, to_server: &mut BytesMut, to_client: &mut BytesMut) {
        to_server.query(sql);
        self.pipeline.owe(Owed::InjectedQuery, to_client);
    }

    /// Refuses the message of type `kind` for which no server connection could be had: the error goes to the client,
    /// who keeps its session.
    pub fn refuse(&mut self, kind: u8, code: &str, message: &str, to_client: &mut BytesMut) {
        to_client.error(Severity::Error, code, message, None);
        if matches!(kind, b'Q' | b'F') {
            to_client.ready(TransactionStatus::Idle);
        } else {
            self.refused = true;
        }
    }

    /// To be called when a server connection has been leased for this session.
    pub fn leased(&mut self) {
        self.leased = true;
        self.unnamed_here = false;
        self.status = TransactionStatus::Idle;
    }

    /// Whether every reply has arrived and no transaction is open: the slot can be given back.
    pub fn is_at_rest(&self) -> bool {
        self.status == TransactionStatus::Idle && self.pipeline.is_settled()
    }

    /// Whether no more is owed than the reply to the client's current message.
    pub fn owes_one_at_most(&self) -> bool {
        self.pipeline.len() <= 1
    }

    /// Whether replies are owed.
    pub fn is_waiting_for_server(&self) -> bool {
        !self.pipeline.is_empty()
    }

    /// Whether the next move is the client's: between statements, inside COPY, or inside a batch without its Sync.
    pub fn waits_for_client(&self) -> bool {
        self.pipeline.waits_for_client()
    }

    /// Whether the client has to wait with its next message because too many of its last are unanswered.
    pub fn is_overwhelmed(&self) -> bool {
        self.pipeline.len() >= MAX_OWED
    }

    /// Whether the server connection has lost the name that the client gave itself at login; says so once.
    pub fn take_nameless(&mut self) -> bool {
        std::mem::take(&mut self.nameless)
    }

    /// Whether the client holds state on its server connection.
    pub fn is_pinned(&self) -> bool {
        self.pinned
    }

    /// Whether a reported setting is not what it was, although no statement said so: a function has set it, or the
    /// server's configuration has changed.
    pub fn is_altered(&self) -> bool {
        self.altered
    }

    /// Whether the server connection must be reset before it serves somebody else.
    pub fn needs_reset(&self) -> bool {
        self.pinned || self.altered || self.dirty
    }

    /// To be called when the server connection has been given back or reset.
    pub fn released(&mut self) {
        self.leased = false;
        self.pinned = false;
        self.altered = false;
        self.dirty = false;
        self.nameless = false;
    }

    /// Parse messages sent to servers since the last call.
    pub fn take_parses(&mut self) -> u64 {
        std::mem::take(&mut self.parses)
    }

    /// Named prepared statements that the client holds.
    pub fn statement_count(&self) -> u32 {
        self.statements.len() as u32
    }

    /// The transaction status last reported.
    pub fn status(&self) -> TransactionStatus {
        self.status
    }

    fn apply(&mut self, effect: sql::Effect) {
        self.pinned |= effect.pins;
        self.dirty |= effect.opaque;
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.statements.len() < MAX_STATEMENTS && self.statement_bytes + bytes <= MAX_STATEMENT_BYTES
    }

    fn hold(&mut self, name: Bytes, statement: Arc<Statement>, listen: Option<Listen>) {
        match listen {
            Some(listen) => drop(self.listen_statements.insert(name.clone(), listen)),
            None if self.listen_statements.is_empty() => {}
            None => drop(self.listen_statements.remove(&name)),
        }
        if self.statements.is_empty() {
            self.statement_bytes = 0;
        }
        self.statement_bytes += statement.body.len();
        self.statements.insert(name, statement);
    }

    fn forget_statements(&mut self) {
        self.statements.clear();
        self.listen_statements.clear();
        self.unnamed_listen = None;
        self.unnamed = None;
    }

    /// The server has deallocated everything.
    fn deallocated(&mut self, backend: &mut Backend) {
        self.forget_statements();
        backend.forget_statements();
    }

    /// Learns from an error about a prepared statement: the next use prepares it again (rule 14).
    fn heal(&mut self, error: &[u8], backend: &mut Backend) {
        let id = match self.pipeline.front() {
            Some(Owed::Bind(Some(id)) | Owed::Describe(Some(id)) | Owed::InjectedParse(id)) => *id,
            Some(Owed::Parse(Some((_, statement)))) => statement.id,
            _ => return,
        };
        // 0A000: its plan must not change its result type. 26000: it is not there. 42P05: it is there already.
        if matches!(sqlstate(error), Some(b"0A000" | b"26000" | b"42P05")) {
            backend.distrust(id);
        }
    }
}

/// The code in an ErrorResponse, if it has one (rule 1).
fn sqlstate(error: &[u8]) -> Option<&[u8]> {
    let mut rest = error;
    while let Some((&field, after)) = rest.split_first() {
        let (text, next) = cstr(after)?;
        if field == b'C' {
            return Some(text);
        }
        rest = next;
    }
    None
}

/// Bytes of the message up to where `after` begins inside its body.
fn seen_until(body: &[u8], after: &[u8]) -> usize {
    Frame::HEADER + body.len() - after.len()
}

pub(crate) fn write_close(out: &mut BytesMut, name: &[u8]) {
    out.message(b'C', |b| {
        b.put_u8(b'S');
        b.put_slice(name);
        b.put_u8(0);
    });
}

fn write_parse(out: &mut BytesMut, name: &[u8], rest: &[u8]) {
    out.message(b'P', |b| {
        b.put_slice(name);
        b.put_u8(0);
        b.put_slice(rest);
    });
}
