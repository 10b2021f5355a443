//! Prepared statements of a client (rule 14): under which name the leased connection knows them, that they exist there,
//! and what a failure takes back.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use super::listening::instead_of_listen;
use super::statements::{PREFIX, server_name};
use super::{Backend, ClientStep, INSPECT, Owed, Session, Statement, Violation};
use crate::sql::{self, Listen, Named, Use};
use crate::wire::{Frame, Reply, TransactionStatus, cstr};

/// Named prepared statements one client may hold, and the bytes of their texts.
pub(super) const MAX_STATEMENTS: usize = 10_000;
const MAX_STATEMENT_BYTES: usize = 16 << 20;

impl Session {
    /// Whether a message names a statement of which an earlier batch, not answered yet, decides what it is.
    pub(super) fn depends_on_answers(&self, kind: u8, body: &[u8]) -> bool {
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
        self.is_undecided(name)
    }

    /// Whether an earlier batch, not answered yet, decides what a client's statement is.
    pub(super) fn is_undecided(&self, name: &[u8]) -> bool {
        self.pipeline.decides_on_name(name)
            || self.statements.get(name).is_some_and(|s| self.pipeline.decides_on_statement(s.id))
    }

    pub(super) fn parse(
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
        // Refused here it costs the client nothing but this; what is executed is looked at again.
        let text = cstr(rest).map_or(rest, |(text, _)| text);
        let suspicious = sql::may_be_about_databases(text) && sql::effect(text).databases;
        if suspicious && self.pipeline.is_settled() && !std::mem::take(&mut self.judged) {
            return Ok(ClientStep::Judge);
        }
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
            // It is the same message that is offered again.
            self.judged = suspicious;
            return Ok(ClientStep::NeedServer);
        };
        let mut effect = sql::effect(text);
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

    pub(super) fn bind(
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
        let (effect, readable) = if name.is_empty() {
            (Some(self.unnamed_effect), self.unnamed.is_some())
        } else {
            (self.statements.get(name).map(|statement| statement.effect), true)
        };
        let suspicious = effect.is_some_and(|e| e.databases) || self.is_maintenance && !readable && self.unnamed_here;
        if suspicious && !std::mem::take(&mut self.judged) {
            return Ok(self.judge());
        }
        let Some(backend) = backend else {
            // It is the same message that is offered again.
            self.judged = suspicious;
            return Ok(ClientStep::NeedServer);
        };
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

    pub(super) fn describe(
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

    pub(super) fn close(
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
    pub(super) fn renamed(
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

    pub(super) fn ensure_prepared(
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

    /// Whether a simple query can name a prepared statement of the client's.
    pub(super) fn may_name_statement(&self) -> bool {
        !(self.statements.is_empty() && self.pipeline.is_empty())
    }

    /// The client's own prepared statement that a simple query names, unless the query has to go to the server as it is.
    pub(super) fn named_statement(&self, named: Named) -> Option<(Named, Arc<Statement>)> {
        if self.status == TransactionStatus::Failed {
            return None;
        }
        if named.what == Use::Deallocate && self.pipeline.is_in_batch() {
            return None; // what is owed before it has to be answered first
        }
        let statement = Arc::clone(self.statements.get(named.name.as_slice())?);
        // These are more than their text, and are executed by the protocol alone.
        let is_plain = !statement.effect.databases && !self.listen_statements.contains_key(named.name.as_slice());
        (is_plain || named.what == Use::Deallocate).then_some((named, statement))
    }

    /// Has a statement exist on the leased connection before a simple query that names it.
    pub(super) fn prepare_for_query(
        &mut self,
        statement: &Statement,
        backend: &mut Backend,
        to_server: &mut BytesMut,
        to_client: &mut BytesMut,
    ) {
        self.apply(statement.effect);
        if self.pipeline.is_in_batch() {
            // If it fails, so does the batch, and the query with it.
            return self.ensure_prepared(statement, backend, to_server, to_client);
        }
        if backend.touch(statement.id) {
            return;
        }
        backend.add(statement.id, to_server, &mut self.pipeline, to_client);
        self.parses += 1;
        write_parse(to_server, &server_name(statement.id), &statement.body);
        // Or a Parse that fails would have the server ignore the query.
        to_server.message(b'S', |_| {});
        self.pipeline.owe(Owed::InjectedPrepare(statement.id), to_client);
    }

    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.statements.len() < MAX_STATEMENTS && self.statement_bytes + bytes <= MAX_STATEMENT_BYTES
    }

    pub(super) fn hold(&mut self, name: Bytes, statement: Arc<Statement>, listen: Option<Listen>) {
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

    pub(super) fn forget_statements(&mut self) {
        self.statements.clear();
        self.listen_statements.clear();
        self.unnamed_listen = None;
        self.unnamed = None;
    }

    /// The server has deallocated everything.
    pub(super) fn deallocated(&mut self, backend: &mut Backend) {
        self.forget_statements();
        backend.forget_statements();
    }

    /// Learns from an error about a prepared statement: the next use prepares it again (rule 14).
    pub(super) fn heal(&mut self, error: &[u8], backend: &mut Backend) {
        let id = match self.pipeline.front() {
            Some(Owed::Bind(Some(id)) | Owed::Describe(Some(id)) | Owed::InjectedParse(id)) => *id,
            Some(Owed::Parse(Some((_, statement)))) => statement.id,
            _ => return,
        };
        // 0A000: its plan must not change its result type. 26000: it is not there. 42P05: it is there already.
        let code = sqlstate(error);
        if matches!(code, Some(b"0A000" | b"26000" | b"42P05")) {
            backend.distrust(id);
        }
        // What has changed under it here has changed under it everywhere: who prepares its text again gets a plan of now,
        // on whichever connection.
        if code == Some(b"0A000") {
            self.registry.schema_changed();
        }
    }
}

/// The code in an ErrorResponse, if it has one (rule 1).
pub(super) fn sqlstate(error: &[u8]) -> Option<&[u8]> {
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
