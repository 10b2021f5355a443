//! One client's session in front of changing server connections, without I/O.
//!
//! [`Session`] is fed the messages of both sides and writes what each side shall receive. It knows which replies are
//! still owed, which prepared statements exist where, and whether the client has left state behind that keeps the
//! server connection with it. The same machine is driven by sockets, by property tests and by the fuzzer.

mod judged;
mod listening;
mod pipeline;
mod prepared;
mod settings;
mod statements;

pub use pipeline::{Owed, Pipeline, Statements};
pub use settings::Settings;
pub(crate) use statements::PREFIX;
use statements::server_name;
pub use statements::{Backend, Statement, StatementRegistry};

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use crate::sql::{self, Listen, Named, Only, Use};
use crate::wire::{Frame, Reply, Severity, TransactionStatus, cstr};
use listening::INSTEAD_OF_LISTEN;

/// A message up to this size is read whole when its content matters.
pub const INSPECT: usize = 1 << 20;
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
    /// The message may make, take away or rename a database: find out whether it may, by [`Session::databases_text`], and
    /// offer it again after [`Session::judged`].
    Judge,
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
    /// What the client has changed for its session.
    settings: Settings,
    /// They are being said again on another connection.
    restoring: bool,
    /// The open transaction changes tables, views or types.
    alters: bool,
    /// The message that is offered next has been judged.
    judged: bool,
    /// It is a session with the maintenance database: what cannot be seen as a whole has to be judged too.
    is_maintenance: bool,
    /// The leased connection leads to a replica: what comes after its transaction may not go there.
    on_replica: bool,
    /// Statements and batches that the server has answered.
    answers: u64,
    /// A reported setting is neither what it was on the fresh connection nor what the client has made of it.
    altered: bool,
    dirty: bool,
    /// `DISCARD ALL` has taken from the connection the name that the client gave itself at login.
    nameless: bool,
    /// That name.
    name: String,
    /// The client has reset its name, and so many queries of the gateway's own are owed until it has its own again: until then
    /// what the server says it is is another client's.
    renaming: usize,
    /// The client has been told why the query fails that answers next.
    explained: bool,
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
            settings: Settings::default(),
            restoring: false,
            alters: false,
            judged: false,
            is_maintenance: false,
            on_replica: false,
            answers: 0,
            altered: false,
            dirty: false,
            nameless: false,
            name: String::new(),
            renaming: 0,
            explained: false,
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
        if self.pipeline.has_barrier()
            || self.on_replica && self.pipeline.owes_ready()
            || self.depends_on_answers(frame.kind, body)
        {
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
        let is_whole = Frame::HEADER + body.len() == frame.total;
        effect.opaque |= !is_whole;
        let suspicious = effect.databases || self.is_maintenance && !is_whole;
        if suspicious && !std::mem::take(&mut self.judged) {
            return self.judge();
        }
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
        let changes_back = matches!(effect.only, Some(Only::DiscardAll | Only::ResetAll)) && !self.settings.is_empty();
        if let (None, Some(only), false) = (&backend, effect.only, self.needs_reset() || self.leased || changes_back) {
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
        let named = if is_whole && self.may_name_statement() { sql::named(body) } else { None };
        if named.as_ref().is_some_and(|named| self.is_undecided(&named.name)) {
            return ClientStep::Later;
        }
        let renames = is_whole && !self.pipeline.is_in_batch() && sql::resets_name(body);
        // What is said in an open batch waits for what is before the batch, since nothing may be answered before its Sync.
        // What is owed to the gateway alone does not matter: it was said when the connection was taken, just now.
        let in_order = self.pipeline.owes_only_injected() || self.pipeline.is_in_batch() && !self.pipeline.owes_ready();
        if (named.is_some() || renames) && !in_order {
            return ClientStep::Later;
        }
        let named = named.and_then(|named| self.named_statement(named));
        if let Some((Named { what: Use::Deallocate, name, .. }, _)) = &named {
            // It stays on the server for the next client that prepares the same text.
            if let Some(gone) = self.statements.remove(name.as_slice()) {
                self.statement_bytes = self.statement_bytes.saturating_sub(gone.body.len());
            }
            self.listen_statements.remove(name.as_slice());
            self.unnamed = None;
            self.unnamed_here = false;
            to_client.complete("DEALLOCATE");
            to_client.ready(self.status);
            return ClientStep::Drop;
        }
        let Some(backend) = backend else {
            // It is the same message that is offered again.
            self.judged = suspicious;
            return ClientStep::NeedServer;
        };
        self.unnamed = None;
        self.unnamed_here = false;
        if let Some((Named { at, .. }, statement)) = named {
            self.apply(effect);
            self.prepare_for_query(&statement, backend, to_server, to_client);
            let text = [&body[..at.start], &server_name(statement.id), &body[at.end..]].concat();
            to_server.message(b'Q', |b| b.put_slice(&text));
            self.pipeline.owe(if effect.deallocates { Owed::Barrier } else { Owed::Query }, to_client);
            return ClientStep::Drop;
        }
        let setting = if is_whole { self.trackable(body) } else { None };
        if renames {
            to_server.message(b'Q', |b| b.put_slice(body));
        }
        let step = if renames { ClientStep::Drop } else { ClientStep::Forward { consumed: 0 } };
        if let Some(setting) = setting {
            self.pipeline.owe(Owed::Set(setting, false), to_client);
            self.rename(renames, to_server, to_client);
            return step;
        }
        // What it takes back must stay taken back, if its transaction does not.
        effect.pins |= effect.only == Some(Only::ResetAll) && !self.settings.is_empty();
        self.apply(effect);
        let is_barrier = effect.deallocates || effect.unlistens_all;
        self.unlistens_all = effect.unlistens_all && self.shares_listener;
        self.pipeline.owe(if is_barrier { Owed::Barrier } else { Owed::Query }, to_client);
        self.rename(renames, to_server, to_client);
        step
    }

    /// Gives the connection the name that the client gave itself at login, behind a statement that gives it the name of
    /// whoever opened it.
    fn rename(&mut self, wanted: bool, to_server: &mut BytesMut, to_client: &mut BytesMut) {
        if wanted {
            self.inject(&set_name(&self.name), to_server, to_client);
            self.renaming = self.pipeline.injected();
        }
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
        self.answers += u64::from(matches!(frame.kind, b'C' | b'Z' | b's' | b'I'));
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
                    if let Some((name, value)) = cstr(body).and_then(|(n, rest)| Some((n, cstr(rest)?.0))) {
                        backend.expect(name, value);
                        if name == b"application_name" {
                            backend.application_name.clone_from(&self.name);
                        }
                    }
                    return Ok(ServerStep::Drop);
                }
                if let Some((name, value)) = cstr(body).and_then(|(n, rest)| Some((n, cstr(rest)?.0))) {
                    // Whatever changed it, and whatever changes it back.
                    self.altered = backend.report(name, value);
                    if self.renaming > 0 && name == b"application_name" {
                        after.parameter("application_name", &self.name);
                        return Ok(ServerStep::Drop);
                    }
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
                            self.settings = Settings::default();
                            backend.discarded();
                            self.nameless = true;
                            self.pending.push(Listen::ToNothing);
                            // What was sent behind it may have left its own state already.
                            let is_last = self.pipeline.nothing_behind_front();
                            self.pinned &= !is_last;
                            self.dirty &= !is_last;
                        }
                        b"DEALLOCATE ALL" => self.deallocated(backend),
                        b"SET" | b"RESET" => self.pipeline.has_set(),
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
            b'E' if injected && self.restoring => {
                // The session would go on without what the client believes to have.
                Err(Violation { code: "08006", message: "a setting cannot be restored on another connection".into() })
            }
            b'E' => {
                if std::mem::take(&mut self.explained) {
                    return Ok(ServerStep::Drop);
                }
                if let Some(Owed::InjectedPrepare(id)) = self.pipeline.front() {
                    if prepared::sqlstate(body) == Some(b"42P05") {
                        return Ok(ServerStep::Drop); // it is there
                    }
                    // This says why what is executed cannot be; that it is not there, which comes next, says less.
                    backend.distrust(*id);
                    (self.failed, self.explained) = (true, true);
                    return Ok(ServerStep::Forward);
                }
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
                self.restoring &= !injected;
                self.renaming = self.renaming.saturating_sub(usize::from(injected));
                if !injected {
                    self.explained = false;
                    if let Some(setting) = self.pipeline.setting().cloned() {
                        self.set(&setting, backend);
                    }
                    self.status = status;
                    self.settle_listening();
                    if self.alters && status == TransactionStatus::Idle {
                        // What others prepared meanwhile, they prepared for what was before.
                        self.alters = false;
                        self.registry.schema_changed();
                    }
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

    /// Statements and batches that the server has answered so far.
    pub fn answers(&self) -> u64 {
        self.answers
    }

    /// A statement of the gateway's own, sent before what the client sends; its replies are swallowed.
    pub fn inject(&mut self, sql: &str, to_server: &mut BytesMut, to_client: &mut BytesMut) {
        to_server.query(sql);
        self.pipeline.owe(Owed::InjectedQuery, to_client);
    }

    /// Refuses the message of type `kind` for which no server connection could be had: the error goes to the client,
    /// who keeps its session.
    pub fn refuse(&mut self, kind: u8, code: &str, message: &str, to_client: &mut BytesMut) {
        self.judged = false;
        to_client.error(Severity::Error, code, message, None);
        if matches!(kind, b'Q' | b'F') {
            to_client.ready(TransactionStatus::Idle);
        } else {
            self.refused = true;
        }
    }

    /// To be called when a server connection has been leased for this session.
    pub fn leased(&mut self, on_replica: bool) {
        self.leased = true;
        self.on_replica = on_replica;
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

    /// The name that the client gave itself at login.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Notes the name that the client gave itself at login.
    pub fn is_called(&mut self, name: String) {
        self.name = name;
    }

    /// Whether the server connection has lost the name that the client gave itself at login; says so once.
    pub fn take_nameless(&mut self) -> bool {
        std::mem::take(&mut self.nameless)
    }

    /// Whether the client holds state on its server connection.
    pub fn is_pinned(&self) -> bool {
        self.pinned
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
        if effect.alters {
            self.alters = true;
            self.registry.schema_changed();
        }
        self.pinned |= effect.pins;
        self.dirty |= effect.opaque;
    }
}

/// The statement that gives a server connection a client's name.
pub(crate) fn set_name(name: &str) -> String {
    format!("SET application_name TO E'{}'", name.replace('\\', "\\\\").replace('\'', "''"))
}
