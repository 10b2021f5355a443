//! The session machine against a model of PostgreSQL: whatever a client sends, in whatever order things arrive, it is
//! answered as if it had spoken to the server directly, although its transactions run on changing connections.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::{Buf, BufMut, BytesMut};
use cofferdam_postgres::session::{Backend, ClientStep, ServerStep, Session, StatementRegistry};
use cofferdam_postgres::wire::{Frame, Reply, Side, cstr, frame};
use proptest::prelude::*;

/// A PostgreSQL server connection, as far as the message flow goes.
#[derive(Default)]
struct Server {
    statements: HashMap<Vec<u8>, Vec<u8>>,
    portal: Option<Vec<u8>>,
    transaction: u8,
    skipping: bool,
    copying: Option<bool>,
    implicit: bool,
}

impl Server {
    fn new() -> Self {
        Self { transaction: b'I', ..Self::default() }
    }

    fn receive(&mut self, kind: u8, body: &[u8], out: &mut BytesMut) {
        if let Some(simple) = self.copying {
            match kind {
                b'd' | b'H' | b'S' => return,
                b'c' => {
                    self.copying = None;
                    out.complete("COPY 1");
                    if simple {
                        self.ready(out);
                    }
                    return;
                }
                _ => {
                    self.copying = None;
                    self.fail(out, simple);
                    return;
                }
            }
        }
        if self.skipping && kind != b'S' {
            return;
        }
        match kind {
            b'S' => {
                self.skipping = false;
                self.ready(out);
            }
            b'H' | b'd' | b'c' | b'f' => {}
            b'Q' => {
                self.statements.remove(&b""[..]);
                self.portal = None;
                let sql = cstr(body).unwrap().0.to_vec();
                if self.execute(&sql, out, true) {
                    self.ready(out);
                }
            }
            b'P' => {
                let (name, rest) = cstr(body).unwrap();
                let sql = cstr(rest).unwrap().0;
                let refused = self.transaction == b'E' && sql != b"ROLLBACK";
                let twice = !name.is_empty() && self.statements.contains_key(name);
                if sql == b"PARSEFAIL" || refused || twice {
                    self.fail(out, false);
                } else {
                    self.statements.insert(name.to_vec(), sql.to_vec());
                    out.message(b'1', |_| {});
                }
            }
            b'B' => {
                let (_, rest) = cstr(body).unwrap();
                let name = cstr(rest).unwrap().0;
                match self.statements.get(name) {
                    Some(sql) if self.transaction != b'E' || sql == b"ROLLBACK" => {
                        self.portal = Some(sql.clone());
                        out.message(b'2', |_| {});
                    }
                    _ => self.fail(out, false),
                }
            }
            b'D' => match (body[0], cstr(&body[1..]).unwrap().0) {
                // PostgreSQL refuses it in a failed transaction for statements that return rows; we for a few more.
                (b'S', name)
                    if self.statements.get(name).is_some_and(|s| self.transaction != b'E' || s == b"ROLLBACK") =>
                {
                    out.message(b't', |b| b.put_u16(0));
                    out.message(b'n', |_| {});
                }
                (b'P', _) if self.portal.is_some() => out.message(b'n', |_| {}),
                _ => self.fail(out, false),
            },
            b'E' => match self.portal.clone() {
                Some(sql) => {
                    self.implicit = true;
                    self.execute(&sql, out, false);
                }
                None => self.fail(out, false),
            },
            b'C' => {
                if body[0] == b'S' {
                    self.statements.remove(cstr(&body[1..]).unwrap().0);
                } else {
                    self.portal = None;
                }
                out.message(b'3', |_| {});
            }
            b'F' => {
                out.message(b'V', |b| b.put_i32(-1));
                self.ready(out);
            }
            other => panic!("the server got {other}"),
        }
    }

    /// False when ReadyForQuery must not follow now.
    fn execute(&mut self, sql: &[u8], out: &mut BytesMut, simple: bool) -> bool {
        if self.transaction == b'E' && sql != b"ROLLBACK" {
            self.fail(out, simple);
            return false;
        }
        match sql {
            b"BEGIN" => self.transaction = b'T',
            b"COMMIT" | b"ROLLBACK" => self.transaction = b'I',
            b"FAIL" | b"PARSEFAIL" => {
                self.fail(out, simple);
                return false;
            }
            b"COPY t FROM STDIN" => {
                self.copying = Some(simple);
                out.message(b'G', |b| b.put_slice(&[0, 0, 0]));
                return false;
            }
            _ => out.message(b'D', |b| b.put_slice(sql)),
        }
        out.complete(std::str::from_utf8(sql).unwrap());
        true
    }

    fn fail(&mut self, out: &mut BytesMut, simple: bool) {
        out.error(cofferdam_postgres::wire::Severity::Error, "XX001", "model", None);
        if self.transaction == b'T' {
            self.transaction = b'E';
        }
        self.portal = None;
        if simple {
            self.ready(out);
        } else {
            // Nobody can rely on it after an error in a batch: see `Session`.
            self.statements.remove(&b""[..]);
            self.skipping = true;
        }
    }

    fn ready(&mut self, out: &mut BytesMut) {
        if self.transaction == b'I' {
            self.portal = None;
        }
        let status = self.transaction;
        out.message(b'Z', |b| b.put_u8(status));
    }
}

/// What a client receives, comparable: types, rows, tags and transaction status; of errors only that there was one.
fn seen(mut bytes: BytesMut) -> Vec<(u8, Vec<u8>)> {
    let mut out = Vec::new();
    while let Some(f) = frame(Side::Server, &bytes).unwrap() {
        let message = bytes.split_to(f.total);
        let body = if f.kind == b'E' { Vec::new() } else { message[Frame::HEADER..].to_vec() };
        out.push((f.kind, body));
    }
    assert!(bytes.is_empty());
    out
}

/// A client, the session machine, and a handful of server connections.
struct Pooled {
    session: Session,
    idle: Vec<(Server, Backend)>,
    lease: Option<(Server, Backend)>,
    to_server: BytesMut,
    from_server: BytesMut,
    to_client: BytesMut,
    inbound: BytesMut,
    passing: usize,
    forward: bool,
    pick: VecDeque<usize>,
    leases: usize,
}

impl Pooled {
    fn new(connections: usize, pick: Vec<usize>) -> Self {
        Self {
            session: Session::new(Arc::new(StatementRegistry::default())),
            idle: (0..connections).map(|_| (Server::new(), Backend::default())).collect(),
            lease: None,
            to_server: BytesMut::new(),
            from_server: BytesMut::new(),
            to_client: BytesMut::new(),
            inbound: BytesMut::new(),
            passing: 0,
            forward: true,
            pick: pick.into(),
            leases: 0,
        }
    }

    /// Everything the client has sent so far is judged.
    fn pump_client(&mut self) {
        loop {
            if self.passing > 0 {
                let n = self.passing.min(self.inbound.len());
                let bytes = self.inbound.split_to(n);
                if self.forward {
                    self.to_server.put_slice(&bytes);
                }
                self.passing -= n;
                if self.passing > 0 {
                    return;
                }
            }
            let Some(f) = frame(Side::Client, &self.inbound).unwrap() else { return };
            if self.inbound.len() < Session::client_needs(f) {
                return;
            }
            let length = self.inbound.len().min(f.total);
            let bytes = self.inbound[..length].to_vec();
            let backend = self.lease.as_mut().map(|(_, b)| b);
            match self.session.on_client(f, &bytes, backend, &mut self.to_server, &mut self.to_client).unwrap() {
                ClientStep::Forward { consumed } => {
                    self.to_server.put_slice(&bytes[consumed..]);
                    (self.passing, self.forward) = (f.total - length, true);
                }
                ClientStep::Drop => (self.passing, self.forward) = (f.total - length, false),
                ClientStep::NeedServer => {
                    let n = self.pick.pop_front().unwrap_or(0) % self.idle.len();
                    self.lease = Some(self.idle.swap_remove(n));
                    self.leases += 1;
                    self.session.leased(false);
                    continue;
                }
                ClientStep::Judge => {
                    self.session.judged();
                    continue;
                }
                ClientStep::Later => return, // offered again after the next reply
                ClientStep::Terminate => panic!("nobody said goodbye"),
            }
            self.inbound.advance(length);
        }
    }

    /// The server takes one message; false when there is none.
    fn serve_one(&mut self) -> bool {
        let Some(f) = frame(Side::Client, &self.to_server).unwrap() else { return false };
        if self.to_server.len() < f.total {
            return false;
        }
        let message = self.to_server.split_to(f.total);
        let (server, _) = self.lease.as_mut().unwrap();
        server.receive(f.kind, &message[Frame::HEADER..], &mut self.from_server);
        true
    }

    /// One reply of the server is judged; false when there is none.
    fn deliver_one(&mut self) -> bool {
        let Some(f) = frame(Side::Server, &self.from_server).unwrap() else { return false };
        let message = self.from_server.split_to(f.total);
        let (_, backend) = self.lease.as_mut().unwrap();
        let mut after = BytesMut::new();
        if self.session.on_server(f, &message, backend, &mut after).unwrap() == ServerStep::Forward {
            self.to_client.put_slice(&message);
        }
        self.to_client.put_slice(&after);
        if self.session.is_at_rest() && self.passing == 0 && self.from_server.is_empty() && self.to_server.is_empty() {
            let (server, backend) = self.lease.take().unwrap();
            assert_eq!(server.transaction, b'I', "given back inside a transaction");
            assert!(!server.skipping && server.copying.is_none(), "given back in the middle of something");
            self.idle.push((server, backend));
            self.session.released();
        }
        self.pump_client();
        true
    }
}

fn message(kind: u8, body: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
    let mut out = BytesMut::new();
    out.message(kind, body);
    out.to_vec()
}

fn text(b: &mut BytesMut, s: &str) {
    b.put_slice(s.as_bytes());
    b.put_u8(0);
}

const SQL: [&str; 8] =
    ["SELECT one", "SELECT two", "BEGIN", "COMMIT", "ROLLBACK", "FAIL", "PARSEFAIL", "COPY t FROM STDIN"];
const NAMES: [&str; 4] = ["", "a", "b", "cofferdam_0"];

fn client_message() -> impl Strategy<Value = Vec<u8>> {
    let name = || proptest::sample::select(&NAMES[..]);
    let sql = || proptest::sample::select(&SQL[..]);
    prop_oneof![
        4 => sql().prop_map(|s| message(b'Q', |b| text(b, s))),
        4 => (name(), proptest::sample::select(&SQL[..7])).prop_map(|(n, s)| message(b'P', |b| {
            text(b, n);
            text(b, s);
            b.put_u16(0);
        })),
        4 => name().prop_map(|n| message(b'B', |b| {
            text(b, "");
            text(b, n);
            b.put_slice(&[0; 6]);
        })),
        2 => name().prop_map(|n| message(b'D', |b| {
            b.put_u8(b'S');
            text(b, n);
        })),
        1 => Just(message(b'D', |b| text(b, "P"))),
        4 => Just(message(b'E', |b| b.put_slice(&[0; 5]))),
        2 => name().prop_map(|n| message(b'C', |b| {
            b.put_u8(b'S');
            text(b, n);
        })),
        6 => Just(message(b'S', |_| {})),
        1 => Just(message(b'H', |_| {})),
        1 => Just(message(b'F', |b| b.put_slice(&[0; 12]))),
        3 => Just(message(b'd', |b| b.put_slice(b"1\n"))),
        2 => Just(message(b'c', |_| {})),
        1 => Just(message(b'f', |b| text(b, "no"))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_pooled_client_is_answered_as_if_it_were_alone(
        messages in proptest::collection::vec(client_message(), 1..40),
        cuts in proptest::collection::vec(1usize..60, 0..40),
        order in proptest::collection::vec(0u8..3, 0..200),
        pick in proptest::collection::vec(0usize..3, 0..40),
    ) {
        // Directly: each message is answered before the next is looked at.
        let mut direct = Server::new();
        let mut expected = BytesMut::new();
        // A copy has to be ended, or both wait for ever; and a Sync brings everything to an end.
        let mut open = false;
        let mut messages: Vec<_> = messages
            .into_iter()
            .flat_map(|m| {
                // Drivers end a batch before they send a simple query.
                let ends = open && matches!(m[0], b'Q' | b'F');
                open = (open && !ends || matches!(m[0], b'P' | b'B' | b'D' | b'E' | b'C')) && m[0] != b'S';
                ends.then(|| message(b'S', |_| {})).into_iter().chain([m])
            })
            .collect();
        messages.push(message(b'c', |_| {}));
        messages.push(message(b'S', |_| {}));
        messages.push(message(b'Q', |b| text(b, "ROLLBACK")));
        // What a client may send without having read the answers depends on COPY, where the server decides: so a
        // message that may begin one is waited for, as drivers do.
        let mut pooled = Pooled::new(3, pick);
        let mut order = order.into_iter();
        let mut cuts = cuts.into_iter();
        for (n, m) in messages.iter().enumerate() {
            let failed = direct.skipping;
            direct.receive(m[0], &m[Frame::HEADER..], &mut expected);
            let mut rest = &m[..];
            while !rest.is_empty() {
                let n = cuts.next().unwrap_or(usize::MAX).min(rest.len());
                pooled.inbound.put_slice(&rest[..n]);
                rest = &rest[n..];
                pooled.pump_client();
                match order.next() {
                    Some(0) => { pooled.serve_one(); }
                    Some(1) => { pooled.deliver_one(); }
                    _ => {}
                }
            }
            // Known difference: a batch that was sent before the client has read that its predecessor failed, and depends
            // on what was skipped there, is answered as if nothing had been skipped.
            // And inside COPY only what belongs there is sent without waiting.
            let next = messages.get(n + 1).map_or(0, |m| m[0]);
            let settle = (m[0] == b'S' && failed)
                || direct.transaction == b'E'
                || (direct.copying.is_some() && !matches!(next, b'd' | b'c' | b'f'));
            if settle {
                while pooled.serve_one() || pooled.deliver_one() {
                    pooled.pump_client();
                }
            }
        }
        while pooled.serve_one() || pooled.deliver_one() {
            pooled.pump_client();
        }
        prop_assert_eq!(seen(pooled.to_client.split()), seen(expected));
        prop_assert!(pooled.lease.is_none(), "the connection was not given back");
        prop_assert_eq!(pooled.idle.len(), 3);
    }
}
