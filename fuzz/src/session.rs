//! The session machine fed with whatever a client and a server may send, in any order.

use std::sync::Arc;

use bytes::BytesMut;
use cofferdam_postgres::session::{Backend, ClientStep, Session, StatementRegistry};
use cofferdam_postgres::wire::{Frame, Side, frame};

/// Panics when something is wrong.
pub fn run(data: &[u8]) {
    let mut session = Session::new(Arc::new(StatementRegistry::default()));
    let mut backend = Backend::default();
    let mut leased = false;
    let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
    let mut rest = data;
    session.share_listener(data.len().is_multiple_of(2));
    // One byte says whose message comes next.
    while let Some((who, after)) = rest.split_first() {
        let side = if who & 1 == 0 { Side::Client } else { Side::Server };
        let Ok(Some(f)) = frame(side, after) else { return };
        if after.len() < f.total {
            return;
        }
        let message = &after[..f.total];
        if side == Side::Client {
            let lease = leased.then_some(&mut backend);
            match session.on_client(f, message, lease, &mut to_server, &mut to_client) {
                Ok(ClientStep::NeedServer) => {
                    assert!(!leased, "asked for a second server connection");
                    leased = true;
                    session.leased(data.len().is_multiple_of(3));
                    continue;
                }
                Ok(ClientStep::Forward { consumed }) => {
                    assert!(leased && consumed <= f.total);
                    to_server.extend_from_slice(&message[consumed..]);
                }
                Ok(ClientStep::Judge) => {
                    let _ = session.databases_text(f, message);
                    session.judged();
                    continue;
                }
                // Later: as if it had not been sent.
                Ok(ClientStep::Drop | ClientStep::Later) => {}
                Ok(ClientStep::Terminate) | Err(_) => return,
            }
            // Whatever goes to the server is well framed.
            check(Side::Client, &to_server);
        } else if leased {
            if session.on_server(f, message, &mut backend, &mut to_client).is_err() {
                return;
            }
            if session.is_at_rest() {
                leased = false;
                session.released();
            }
        }
        check(Side::Server, &to_client);
        to_server.clear();
        to_client.clear();
        rest = &after[f.total..];
    }
}

fn check(side: Side, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let f: Frame = frame(side, bytes).expect("a valid frame").expect("a whole header");
        assert!(bytes.len() >= f.total, "a frame that is cut off");
        bytes = &bytes[f.total..];
    }
}
