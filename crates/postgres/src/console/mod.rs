//! The console: the database `cofferdam`, or `pgbouncer`, that answers PgBouncer's commands, so that what operators know
//! and what their tools expect works here. Every command is authorised (rule 21): viewers look, admins act.

mod command;
mod show;
mod table;

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};

use crate::plane::PostgresPlane;
use crate::relay::acquire::unless_client_leaves;
use crate::signal::Ear;
use crate::stream::Stream;
use crate::wire::{Frame, Reply, Severity, Side, TransactionStatus, cstr, frame};
use command::{Command, parse};
use table::Rows;

/// Names under which the console is reached.
pub(crate) const DATABASES: [&str; 2] = ["cofferdam", "pgbouncer"];
/// A message longer than this is no command.
const MAX_MESSAGE: usize = 64 << 10;
/// Statements and portals one client may hold.
const MAX_PREPARED: usize = 100;
/// How often a command that waits looks whether it is done.
const LOOK: Duration = Duration::from_millis(50);

pub(crate) fn is_console(database: &str) -> bool {
    DATABASES.contains(&database)
}

/// What the console can have done that the plane cannot do by itself.
pub trait ConsoleHost: Send + Sync {
    /// Reads the configuration again; an error is for the operator.
    fn reload(&self) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>>;
    /// Ends the gateway when what is in flight has finished.
    fn shutdown(&self);
}

/// One client of the console.
pub(crate) struct Console {
    plane: Arc<PostgresPlane>,
    stream: Stream,
    inbound: BytesMut,
    outbound: BytesMut,
    is_admin: bool,
    registration: crate::cancel::Registration,
    statements: HashMap<Bytes, String>,
    portals: HashMap<Bytes, String>,
    /// An error has been told inside a batch: everything up to Sync is skipped.
    skipping: bool,
}

/// An answer to one command.
enum Answer {
    Rows(Rows),
    /// Command tag, and a notice before it.
    Done(&'static str, Option<&'static str>),
}

type Failure = (&'static str, String);

impl Console {
    pub(crate) fn new(
        plane: Arc<PostgresPlane>,
        stream: Stream,
        inbound: BytesMut,
        is_admin: bool,
        registration: crate::cancel::Registration,
    ) -> Self {
        Self {
            plane,
            stream,
            inbound,
            outbound: BytesMut::new(),
            is_admin,
            registration,
            statements: HashMap::new(),
            portals: HashMap::new(),
            skipping: false,
        }
    }

    /// Answers commands until the client leaves, is killed, or the plane drains.
    pub(crate) async fn run(mut self) {
        let (mut draining, mut ear) = (self.plane.draining.listen(), Ear::default());
        let handle = Arc::clone(&self.registration.handle);
        let ended = {
            let mut serving = std::pin::pin!(self.serve());
            std::future::poll_fn(|cx| match serving.as_mut().poll(cx) {
                Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
                Poll::Pending if draining.poll(cx).is_ready() || ear.poll(&handle.killed, cx).is_ready() => {
                    Poll::Ready(None)
                }
                Poll::Pending => Poll::Pending,
            })
            .await
        };
        let farewell = match ended {
            Some(Ok(()) | Err(None)) => return,
            Some(Err(Some((code, message)))) => (code, message),
            None => {
                ("57P01", "terminating connection: the gateway is shutting down, or an operator wants it".to_owned())
            }
        };
        self.outbound.error(Severity::Fatal, farewell.0, &farewell.1, None);
        let _ = tokio::time::timeout(Duration::from_secs(1), self.stream.drain(&mut self.outbound)).await;
    }

    /// Ends well with Terminate, with nothing when the client is gone, with an error when it breaks the protocol.
    async fn serve(&mut self) -> Result<(), Option<Failure>> {
        loop {
            self.stream.drain(&mut self.outbound).await.map_err(|_| None)?;
            let message = loop {
                match frame(Side::Client, &self.inbound) {
                    Ok(Some(f)) if f.total > MAX_MESSAGE => {
                        return Err(Some(("54000", "the message is too long for a command".into())));
                    }
                    Ok(Some(f)) if self.inbound.len() >= f.total => {
                        let mut whole = self.inbound.split_to(f.total).freeze();
                        whole.advance(Frame::HEADER);
                        break (f.kind, whole);
                    }
                    Ok(_) => {}
                    Err(error) => return Err(Some(("08P01", error.to_string()))),
                }
                match self.stream.fill(&mut self.inbound).await {
                    Ok(n) if n > 0 => {}
                    _ => return Err(None),
                }
            };
            match message {
                (b'X', _) => return Ok(()),
                (b'S', _) => {
                    self.skipping = false;
                    self.outbound.ready(TransactionStatus::Idle);
                }
                _ if self.skipping => {}
                (b'Q', body) => {
                    let text = text_of(&body);
                    match self.execute(&text).await? {
                        Ok(Answer::Rows(rows)) => {
                            rows.describe(&mut self.outbound);
                            rows.write(&mut self.outbound);
                            self.outbound.complete("SHOW");
                        }
                        Ok(answer) => self.done(&answer),
                        Err((code, message)) => self.outbound.error(Severity::Error, code, &message, None),
                    }
                    self.outbound.ready(TransactionStatus::Idle);
                }
                (b'H', _) => {}
                (kind @ (b'P' | b'B' | b'D' | b'E' | b'C'), body) => {
                    if let Err((code, message)) = self.extended(kind, &body).await? {
                        self.outbound.error(Severity::Error, code, &message, None);
                        self.skipping = true;
                    }
                }
                (other, _) => {
                    return Err(Some(("08P01", format!("unexpected message type {other} on the console"))));
                }
            }
        }
    }

    /// One message of the extended protocol.
    async fn extended(&mut self, kind: u8, body: &Bytes) -> Result<Result<(), Failure>, Option<Failure>> {
        let malformed = || Some(("08P01", "malformed message".to_owned()));
        let piece =
            |rest: &[u8]| cstr(rest).map(|(s, rest)| (Bytes::copy_from_slice(s), rest.len())).ok_or_else(malformed);
        match kind {
            b'P' => {
                let (name, left) = piece(body)?;
                let text = text_of(&body[body.len() - left..]);
                if self.statements.len() >= MAX_PREPARED && !self.statements.contains_key(&name) {
                    return Ok(Err((
                        "54000",
                        format!("a client of the console may prepare {MAX_PREPARED} statements"),
                    )));
                }
                self.statements.insert(name, text);
                self.outbound.message(b'1', |_| {});
            }
            b'B' => {
                let (portal, left) = piece(body)?;
                let (name, left) = piece(&body[body.len() - left..])?;
                let Some(text) = self.statements.get(&name).cloned() else {
                    return Ok(Err(("26000", "prepared statement does not exist".into())));
                };
                let binary = wants_binary(&body[body.len() - left..]).ok_or_else(malformed)?;
                if binary && !self.rows_of(&text).is_none_or(|rows| rows.are_all_text()) {
                    return Ok(Err(("0A000", "the console answers in text format".into())));
                }
                if self.portals.len() >= MAX_PREPARED {
                    self.portals.clear();
                }
                self.portals.insert(portal, text);
                self.outbound.message(b'2', |_| {});
            }
            b'D' => {
                let (what, rest) = body.split_first().ok_or_else(malformed)?;
                let (name, _) = piece(rest)?;
                let known = if *what == b'S' { &self.statements } else { &self.portals };
                let Some(text) = known.get(&name).cloned() else {
                    return Ok(Err(("26000", "prepared statement or portal does not exist".into())));
                };
                if *what == b'S' {
                    self.outbound.message(b't', |b| bytes::BufMut::put_u16(b, 0));
                }
                match self.rows_of(&text) {
                    Some(rows) => rows.describe(&mut self.outbound),
                    None => self.outbound.message(b'n', |_| {}),
                }
            }
            b'E' => {
                let (portal, _) = piece(body)?;
                let Some(text) = self.portals.get(&portal).cloned() else {
                    return Ok(Err(("34000", "portal does not exist".into())));
                };
                match self.execute(&text).await? {
                    Ok(Answer::Rows(rows)) => {
                        rows.write(&mut self.outbound);
                        self.outbound.complete("SHOW");
                    }
                    Ok(answer) => self.done(&answer),
                    Err(failure) => return Ok(Err(failure)),
                }
            }
            _ => {
                let (what, rest) = body.split_first().ok_or_else(malformed)?;
                let (name, _) = piece(rest)?;
                if *what == b'S' {
                    self.statements.remove(&name)
                } else {
                    self.portals.remove(&name)
                };
                self.outbound.message(b'3', |_| {});
            }
        }
        Ok(Ok(()))
    }

    fn done(&mut self, answer: &Answer) {
        let Answer::Done(tag, notice) = answer else { return };
        if let Some(text) = notice {
            self.outbound.notice(text);
        }
        if tag.is_empty() {
            self.outbound.message(b'I', |_| {});
        } else {
            self.outbound.complete(tag);
        }
    }

    /// What a command would show, without doing anything; `None` when it shows nothing or may not be given.
    fn rows_of(&self, text: &str) -> Option<Rows> {
        match parse(text) {
            Ok(Command::Show(table)) if self.is_admin || Command::Show(table).only_shows() => {
                Some(show::show(&self.plane, table))
            }
            _ => None,
        }
    }

    /// Carries out a command, unless the client leaves or cancels meanwhile.
    async fn execute(&mut self, text: &str) -> Result<Result<Answer, Failure>, Option<Failure>> {
        let command = match parse(text) {
            Ok(command) => command,
            Err(message) => return Ok(Err(("42601", message))),
        };
        if !self.is_admin && !command.only_shows() {
            return Ok(Err(("42501", "permission denied: only admins of the console may do that".into())));
        }
        if command.only_shows() {
            tracing::debug!(user = %self.registration.handle.info.user, ?command, "console");
        } else {
            tracing::info!(user = %self.registration.handle.info.user, ?command, "console");
        }
        let plane = Arc::clone(&self.plane);
        let own = self.registration.handle.pid;
        let handle = Arc::clone(&self.registration.handle);
        handle.forget_stale();
        handle.waits(!command.only_shows());
        let work = Box::pin(async move { carry_out(&plane, command, own).await });
        let outcome = unless_client_leaves(work, &mut self.stream, &mut self.inbound, &mut 0, &handle).await;
        handle.waits(false);
        match outcome {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Ok(Err(("57014", "canceling statement due to user request".into()))),
            Err(_) => Err(None),
        }
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("is_admin", &self.is_admin).finish_non_exhaustive()
    }
}

async fn carry_out(plane: &Arc<PostgresPlane>, command: Command, own: u32) -> Result<Answer, Failure> {
    if let Command::Pause(Some(name))
    | Command::Reconnect(Some(name))
    | Command::WaitClose(Some(name))
    | Command::Kill(Some(name))
    | Command::Disable(name) = &command
        && !plane.serves(name)
    {
        return Err(("3D000", format!("no such database: {name}")));
    }
    match command {
        Command::Show(table) => Ok(Answer::Rows(show::show(plane, table))),
        Command::Help => Ok(Answer::Done("SHOW", Some(command::HELP))),
        Command::Nothing(tag) => Ok(Answer::Done(tag, None)),
        Command::Pause(database) => {
            plane.pauses.pause(database.as_deref());
            until(|| !plane.has_work(database.as_deref())).await;
            plane.reconnect(database.as_deref());
            Ok(Answer::Done("PAUSE", None))
        }
        Command::Suspend => {
            plane.pauses.suspend();
            until(|| !plane.has_work(None)).await;
            Ok(Answer::Done("SUSPEND", None))
        }
        Command::Resume(database) => {
            if !plane.pauses.resume(database.as_deref()) {
                return Err(("55000", "nothing is paused".into()));
            }
            Ok(Answer::Done("RESUME", None))
        }
        Command::Reconnect(database) => {
            plane.reconnect(database.as_deref());
            Ok(Answer::Done("RECONNECT", None))
        }
        Command::WaitClose(database) => {
            let pools = plane.pools_of(database.as_deref());
            until(|| !pools.iter().any(|pool| pool.has_outdated())).await;
            Ok(Answer::Done("WAIT_CLOSE", None))
        }
        Command::Kill(database) => {
            plane.pauses.pause(database.as_deref());
            for client in plane.cancels.all() {
                let hit = match &database {
                    Some(name) => *client.info.database == **name,
                    None => !is_console(&client.info.database),
                };
                if hit && client.pid != own {
                    client.killed.give();
                }
            }
            plane.reconnect(database.as_deref());
            Ok(Answer::Done("KILL", None))
        }
        Command::KillClient(pid) => {
            let client = plane.cancels.all().into_iter().find(|client| client.pid == pid);
            let Some(client) = client else { return Err(("22023", format!("no client has the id {pid}"))) };
            client.killed.give();
            Ok(Answer::Done("KILL_CLIENT", None))
        }
        Command::Disable(database) => {
            plane.pauses.disable(&database, true);
            Ok(Answer::Done("DISABLE", None))
        }
        Command::Enable(database) => {
            plane.pauses.disable(&database, false);
            Ok(Answer::Done("ENABLE", None))
        }
        Command::Reload => {
            let Some(host) = plane.host() else { return Err(("0A000", "there is nothing to reload from".into())) };
            host.reload().await.map_err(|message| ("F0000", message))?;
            Ok(Answer::Done("RELOAD", None))
        }
        Command::Shutdown => {
            let Some(host) = plane.host() else { return Err(("0A000", "this plane cannot end its program".into())) };
            host.shutdown();
            Ok(Answer::Done("SHUTDOWN", None))
        }
    }
}

pub(crate) async fn until(done: impl Fn() -> bool) {
    while !done() {
        tokio::time::sleep(LOOK).await;
    }
}

/// The text of a command, up to its NUL.
fn text_of(body: &[u8]) -> String {
    String::from_utf8_lossy(cstr(body).map_or(body, |(text, _)| text)).into_owned()
}

/// Whether a Bind message, after its two names, asks for a binary result. `None` when it is malformed.
fn wants_binary(mut rest: &[u8]) -> Option<bool> {
    let formats = rest.try_get_u16().ok()?;
    rest = rest.get(2 * usize::from(formats)..)?;
    for _ in 0..rest.try_get_u16().ok()? {
        let length = rest.try_get_i32().ok()?;
        rest = rest.get(usize::try_from(length).unwrap_or(0)..)?;
    }
    let results = rest.try_get_u16().ok()?;
    let codes = rest.get(..2 * usize::from(results))?;
    Some(codes.chunks(2).any(|code| code != [0, 0]))
}
