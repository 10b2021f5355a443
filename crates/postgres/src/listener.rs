//! `LISTEN` without keeping a server connection per client: one connection per database listens for everybody.
//!
//! A client's `LISTEN` is registered here before the client is told that it has succeeded, and its transactions go
//! through the pool as before. Notifications are handed to clients between transactions, as PostgreSQL does. When the
//! shared connection is lost, its clients are disconnected: they cannot know what they missed, and every program that
//! listens knows how to begin anew.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::cache::{LeaseError, Leased, Pool};
use crate::signal::{Listener, Signal};
use crate::wire::{Frame, Reply, Side, cstr, frame};

/// Notifications that wait for one client; who has more waiting is disconnected.
const INBOX: usize = 4_096;
/// What clients ask of a hub and it has not done yet.
const ASKED: usize = 1_024;
/// A NotificationResponse longer than this is none: PostgreSQL's payloads have at most 8,000 bytes.
const MAX_MESSAGE: usize = 64 << 10;
/// Channels that one client may listen to.
const MAX_CHANNELS: usize = 1_000;
/// A listening connection that nobody needs is kept for so long.
const NOBODY: Duration = Duration::from_secs(30);
const APPLICATION_NAME: &str = "cofferdam listener";

/// The listening connections of one cluster, by database and role.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    hubs: Mutex<HashMap<(String, String), Known>>,
    closed: AtomicBool,
}

#[derive(Debug, Clone)]
struct Known {
    hub: mpsc::Sender<Ask>,
    end: Arc<Signal>,
}

static NEXT: AtomicU64 = AtomicU64::new(0);

/// One client's part in a listening connection.
#[derive(Debug)]
pub(crate) struct Subscription {
    id: u64,
    hub: mpsc::Sender<Ask>,
    /// Held in earnest by the hub alone: when it lets go, the inbox ends.
    deliver: mpsc::WeakSender<Bytes>,
    inbox: mpsc::Receiver<Bytes>,
    channels: Vec<String>,
}

/// Why a client cannot listen.
#[derive(Debug)]
pub(crate) enum ListenError {
    Lease(LeaseError),
    /// SQLSTATE and message of the server.
    Refused(String, String),
    Lost,
}

#[derive(Debug)]
enum Ask {
    Listen { id: u64, channel: String, deliver: mpsc::Sender<Bytes>, done: oneshot::Sender<Result<(), ListenError>> },
    Unlisten { id: u64, channel: Option<String> },
}

impl From<LeaseError> for ListenError {
    fn from(error: LeaseError) -> Self {
        Self::Lease(error)
    }
}

impl Listeners {
    /// A subscription to nothing yet. Opens the database's listening connection if there is none.
    pub(crate) async fn join(
        self: &Arc<Self>,
        pool: &Arc<Pool>,
        patience: Duration,
    ) -> Result<Subscription, ListenError> {
        let key = (pool.key().database.clone(), pool.key().login.role.clone());
        let known = self.lock().get(&key).filter(|known| !known.hub.is_closed()).map(|known| known.hub.clone());
        let hub = if let Some(hub) = known { hub } else { self.open(pool, key, patience).await? };
        let (deliver, inbox) = mpsc::channel(INBOX);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Subscription { id, hub, deliver: deliver.downgrade(), inbox, channels: Vec::new() })
    }

    async fn open(
        self: &Arc<Self>,
        pool: &Arc<Pool>,
        key: (String, String),
        patience: Duration,
    ) -> Result<mpsc::Sender<Ask>, ListenError> {
        // Of its own, with settings that suit everybody: not those of the client that happens to be the first.
        let settings = BTreeMap::from([("client_encoding".to_owned(), "UTF8".to_owned())]);
        let pool = pool.with_settings(settings);
        let leased = pool.lease_patiently(APPLICATION_NAME, patience).await?;
        let mut hubs = self.lock();
        if let Some(known) = hubs.get(&key).filter(|known| !known.hub.is_closed()).cloned() {
            // Somebody else was faster.
            drop(hubs);
            pool.give_back(leased);
            return Ok(known.hub);
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(ListenError::Lost);
        }
        let (hub, asks) = mpsc::channel(ASKED);
        let end = Arc::<Signal>::default();
        tokio::spawn(Hub::new(leased).run(asks, end.listen()));
        hubs.insert(key, Known { hub: hub.clone(), end });
        Ok(hub)
    }

    /// Ends all listening connections.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.end(None);
    }

    /// Ends those of one database, or all. Their clients are told that their connection is lost.
    pub(crate) fn end(&self, database: Option<&str>) {
        self.lock().retain(|(of, _), known| {
            let ends = database.is_none_or(|database| database == of);
            if ends {
                known.end.give();
            }
            !ends
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), Known>> {
        self.hubs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscription {
    /// Listens to one more channel; done when the server has confirmed it.
    pub(crate) async fn listen(&mut self, channel: &str) -> Result<(), ListenError> {
        if self.channels.iter().any(|known| known == channel) {
            return Ok(());
        }
        if self.channels.len() >= MAX_CHANNELS {
            return Err(ListenError::Refused(
                "54000".into(),
                format!("a client may listen to {MAX_CHANNELS} channels"),
            ));
        }
        let (done, outcome) = oneshot::channel();
        let deliver = match self.deliver.upgrade() {
            Some(deliver) => deliver,
            None if self.channels.is_empty() => {
                let (deliver, inbox) = mpsc::channel(INBOX);
                (self.deliver, self.inbox) = (deliver.downgrade(), inbox);
                deliver
            }
            // The hub has let go of a client that was too slow: that has to be told, not covered up.
            None => return Err(ListenError::Lost),
        };
        let ask = Ask::Listen { id: self.id, channel: channel.to_owned(), deliver, done };
        self.hub.send(ask).await.map_err(|_| ListenError::Lost)?;
        outcome.await.unwrap_or(Err(ListenError::Lost))?;
        self.channels.push(channel.to_owned());
        Ok(())
    }

    /// Whether these are the channels that it listens to.
    pub(crate) fn is(&self, wanted: &BTreeSet<String>) -> bool {
        self.channels.len() == wanted.len() && self.channels.iter().all(|channel| wanted.contains(channel))
    }

    pub(crate) fn listens_to_any(&self) -> bool {
        !self.channels.is_empty()
    }

    /// Listens to nothing but these from now on.
    pub(crate) async fn keep(&mut self, wanted: &BTreeSet<String>) {
        let gone: Vec<String> = self.channels.iter().filter(|known| !wanted.contains(*known)).cloned().collect();
        self.channels.retain(|known| wanted.contains(known));
        for channel in gone {
            let _ = self.hub.send(Ask::Unlisten { id: self.id, channel: Some(channel) }).await;
        }
    }

    /// The next NotificationResponse; `None` when the listening connection is lost or the client is too slow.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.channels.is_empty() {
            return Poll::Pending;
        }
        self.inbox.poll_recv(cx)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let (hub, ask) = (self.hub.clone(), Ask::Unlisten { id: self.id, channel: None });
        if let Err(mpsc::error::TrySendError::Full(ask)) = hub.try_send(ask) {
            tokio::spawn(async move { hub.send(ask).await });
        }
    }
}

/// One listening connection and who listens through it.
struct Hub {
    leased: Box<Leased>,
    channels: HashMap<String, Vec<Listening>>,
    /// What the server has been sent and not answered.
    asked: VecDeque<Asked>,
}

struct Listening {
    id: u64,
    deliver: mpsc::Sender<Bytes>,
    /// The server has answered its `LISTEN`: what came before was sent before it.
    active: bool,
}

#[derive(Default)]
struct Asked {
    channel: String,
    /// Whose `LISTEN` it is.
    waiting: Option<(u64, oneshot::Sender<Result<(), ListenError>>)>,
    refused: Option<(String, String)>,
}

impl Hub {
    fn new(leased: Box<Leased>) -> Self {
        let mut hub = Self { leased, channels: HashMap::new(), asked: VecDeque::new() };
        // It may have been opened for a client.
        if !hub.leased.upstream.backend.settings().is_empty() {
            hub.say("RESET ALL");
        }
        let backend = &mut hub.leased.upstream.backend;
        if backend.application_name != APPLICATION_NAME {
            APPLICATION_NAME.clone_into(&mut backend.application_name);
            hub.say(&format!("SET application_name TO '{APPLICATION_NAME}'"));
        }
        // Before PostgreSQL 14 there is no such limit, and the error means nothing.
        hub.say("SET idle_session_timeout TO 0");
        hub
    }

    /// Sends a statement whose outcome nobody waits for.
    fn say(&mut self, sql: &str) {
        self.leased.upstream.outbound.query(sql);
        self.asked.push_back(Asked::default());
    }

    /// Serves until the connection is lost or nobody is left.
    async fn run(mut self, mut asks: mpsc::Receiver<Ask>, mut closed: Listener) {
        loop {
            let nobody = self.channels.is_empty() && self.asked.is_empty();
            let upstream = &mut self.leased.upstream;
            let (stream, inbound, outbound) = (&mut upstream.stream, &mut upstream.inbound, &mut upstream.outbound);
            tokio::select! {
                ask = asks.recv() => match ask {
                    Some(ask) => self.ask(ask),
                    None => return,
                },
                moved = std::future::poll_fn(|cx| {
                    if !outbound.is_empty() && let Poll::Ready(Err(error)) = stream.poll_drain(cx, outbound) {
                        return Poll::Ready(Err(error));
                    }
                    stream.poll_fill(cx, inbound)
                }) => match moved {
                    Ok(n) if n > 0 => if self.read().is_err() { return },
                    _ => return,
                },
                () = std::future::poll_fn(|cx| closed.poll(cx)) => return,
                // Who asks at this moment is told that it was lost, and opens another.
                () = tokio::time::sleep(NOBODY), if nobody => return,
            }
        }
    }

    fn ask(&mut self, ask: Ask) {
        match ask {
            Ask::Listen { id, channel, deliver, done } => {
                let listening = self.channels.entry(channel.clone()).or_default();
                if !listening.iter().any(|l| l.id == id) {
                    listening.push(Listening { id, deliver, active: false });
                }
                // Also where others listen already: the server sends what it has for this connection before it answers, and
                // whatever was sent before is not for whoever asks now.
                self.leased.upstream.outbound.query(&format!("LISTEN {}", quoted(&channel)));
                self.asked.push_back(Asked { channel, waiting: Some((id, done)), refused: None });
            }
            Ask::Unlisten { id, channel } => {
                let upstream = &mut self.leased.upstream;
                let asked = &mut self.asked;
                self.channels.retain(|name, listening| {
                    if channel.as_ref().is_none_or(|channel| channel == name) {
                        listening.retain(|l| l.id != id);
                        if listening.is_empty() {
                            upstream.outbound.query(&format!("UNLISTEN {}", quoted(name)));
                            asked.push_back(Asked::default());
                        }
                    }
                    !listening.is_empty()
                });
            }
        }
    }

    /// Deals with what the server has sent.
    fn read(&mut self) -> Result<(), ()> {
        loop {
            let inbound = &mut self.leased.upstream.inbound;
            let whole = match frame(Side::Server, inbound) {
                Ok(Some(f)) if f.total > MAX_MESSAGE => return Err(()),
                Ok(Some(f)) if inbound.len() >= f.total => (f.kind, inbound.split_to(f.total).freeze()),
                Ok(_) => return Ok(()),
                Err(_) => return Err(()),
            };
            match whole {
                (b'A', message) => self.deliver(&message),
                (b'E', message) => {
                    if let Some(asked) = self.asked.front_mut() {
                        asked.refused = Some(crate::upstream::error_fields(&message[Frame::HEADER..]));
                    }
                }
                (b'Z', _) => {
                    let Some(asked) = self.asked.pop_front() else { return Err(()) };
                    let Some((id, done)) = asked.waiting else { continue };
                    if let Some(listening) = self.channels.get_mut(&asked.channel) {
                        if asked.refused.is_none() {
                            listening.iter_mut().filter(|l| l.id == id).for_each(|l| l.active = true);
                        } else {
                            listening.retain(|l| l.id != id);
                        }
                        if listening.is_empty() {
                            self.channels.remove(&asked.channel);
                        }
                    }
                    let _ = done.send(match asked.refused {
                        None => Ok(()),
                        Some((code, text)) => Err(ListenError::Refused(code, text)),
                    });
                }
                _ => {}
            }
        }
    }

    fn deliver(&mut self, message: &Bytes) {
        let Some((channel, _)) = notification(message) else { return };
        if let Some(listening) = self.channels.get_mut(channel) {
            let slow: Vec<u64> = listening
                .iter()
                .filter(|l| l.active && l.deliver.try_send(message.clone()).is_err())
                .map(|l| l.id)
                .collect();
            // Who does not take them is let go of altogether: it must not miss some and have others.
            for id in slow {
                self.ask(Ask::Unlisten { id, channel: None });
            }
        }
    }
}

/// Channel and payload of a NotificationResponse.
pub(crate) fn notification(message: &[u8]) -> Option<(&str, &str)> {
    let body = message.get(Frame::HEADER + 4..)?;
    let (channel, rest) = cstr(body)?;
    let (payload, _) = cstr(rest)?;
    Some((std::str::from_utf8(channel).ok()?, std::str::from_utf8(payload).ok()?))
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
