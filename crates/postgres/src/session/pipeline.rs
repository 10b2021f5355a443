//! The queue of replies that the server still owes, in order (rules 4 and 5).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::statements::Statement;
use crate::sql::{Listen, Setting};
use crate::wire::Reply;

/// A reply that is owed, and what to do with it.
#[derive(Debug, Clone)]
pub enum Owed {
    /// A simple query: ends with ReadyForQuery.
    Query,
    /// The same, on whose outcome depends what the client's next messages mean: they have to wait.
    Barrier,
    /// A simple query that is, or stands for, the client's `LISTEN` or `UNLISTEN`.
    ListenQuery(Listen),
    /// A simple query that changes a setting; and whether it has.
    Set(Setting, bool),
    /// A simple query of the gateway's own.
    InjectedQuery,
    /// A function call: ends with ReadyForQuery.
    FunctionCall,
    /// ReadyForQuery after Sync.
    Sync,
    /// ParseComplete; for a named statement, what must be forgotten if it fails.
    Parse(Option<(Bytes, Arc<Statement>)>),
    /// ParseComplete of a named statement under a name that is closed again at once.
    ProbeParse(Bytes),
    /// ParseComplete of a statement that the gateway prepared again; swallowed.
    InjectedParse(u64),
    /// ParseComplete of a statement that the gateway prepared again for a simple query, and ReadyForQuery after its own Sync;
    /// swallowed.
    InjectedPrepare(u64),
    /// ParseComplete of an unnamed statement that the gateway parsed again; swallowed.
    Injected,
    /// ParseComplete that the gateway says itself when its turn comes.
    LocalParse(Bytes),
    /// BindComplete; of a named statement, its number.
    Bind(Option<u64>),
    /// RowDescription or NoData; of a named statement, its number.
    Describe(Option<u64>),
    /// CommandComplete, PortalSuspended or EmptyQueryResponse.
    Execute,
    /// CommandComplete of what is, or stands for, the client's `LISTEN` or `UNLISTEN`.
    ListenExecute(Listen),
    /// CloseComplete.
    Close,
    /// Nothing: here the client has ended its copy data, before it knew whether there is a copy.
    CopyEnd,
    /// CloseComplete of a statement that the gateway evicts; swallowed.
    InjectedClose(Option<u64>),
    /// CloseComplete that the gateway says itself; what must come back if the batch fails first.
    LocalClose(Option<(Bytes, Arc<Statement>)>),
}

impl Owed {
    /// Whether it ends with ReadyForQuery.
    fn ends(&self) -> bool {
        matches!(self, Self::Sync) || self.is_simple()
    }

    /// Whether it is no part of a batch: ReadyForQuery follows by itself, after an error too.
    fn is_simple(&self) -> bool {
        use Owed::{Barrier, FunctionCall, ListenQuery, Query, Set};
        matches!(self, Query | Barrier | ListenQuery(_) | Set(..) | FunctionCall) || self.is_injected()
    }

    /// Whether all of it is swallowed, ReadyForQuery included.
    fn is_injected(&self) -> bool {
        matches!(self, Self::InjectedQuery | Self::InjectedPrepare(_))
    }
}

/// A client's named statements.
pub type Statements = HashMap<Bytes, Arc<Statement>>;

/// The replies owed by the leased server connection.
#[derive(Debug, Default)]
pub struct Pipeline {
    owed: VecDeque<Owed>,
    /// How many of `owed` are barriers, how many are Syncs, and how many end with ReadyForQuery.
    barriers: usize,
    syncs: usize,
    readies: usize,
    copy_in: bool,
    /// Syncs that the server ignores as part of a copy, unless the copy has failed before it read them.
    perhaps: usize,
    /// Extended-protocol messages have been sent whose Sync has not: the server is in the middle of a batch even when it
    /// owes nothing.
    batch: bool,
    /// The last that was sent of it is a Flush: the server answers as far as it can.
    flushed: bool,
    /// The batch has failed and its Sync has not come yet: the server ignores everything until then, so do we.
    skipping: bool,
}

impl Pipeline {
    /// Adds a reply. One that the gateway gives itself is given at once when nothing is owed before it.
    pub fn owe(&mut self, owed: Owed, to_client: &mut BytesMut) {
        self.barriers += usize::from(matches!(owed, Owed::Barrier));
        self.syncs += usize::from(matches!(owed, Owed::Sync));
        self.readies += usize::from(owed.ends());
        self.flushed = false;
        if matches!(owed, Owed::Sync | Owed::InjectedPrepare(_)) {
            self.batch = false;
        } else if !owed.is_simple() && !matches!(owed, Owed::CopyEnd) {
            self.batch = true;
        }
        self.owed.push_back(owed);
        self.settle_local(to_client);
    }

    /// A reply of this type has arrived; true when the client shall see it.
    pub fn paid(&mut self, kind: u8, to_client: &mut BytesMut) -> bool {
        let (pays, forward) = match (self.owed.front(), kind) {
            (Some(Owed::Parse(_) | Owed::ProbeParse(_)), b'1') => (true, true),
            (Some(Owed::InjectedParse(_) | Owed::Injected), b'1') => (true, false),
            (Some(Owed::Bind(_)), b'2') => (true, true),
            (Some(Owed::Close), b'3') => (true, true),
            (Some(Owed::InjectedClose(_)), b'3') => (true, false),
            (Some(Owed::Describe(_)), b'T' | b'n') => (true, true),
            (Some(Owed::Execute | Owed::ListenExecute(_)), b'C' | b'I' | b's') => (true, true),
            (Some(front), _) if front.is_injected() => (false, false),
            _ => (false, true),
        };
        if pays {
            self.copy_in = false;
            self.perhaps = 0;
            if let Some(Owed::Parse(Some((_, statement)))) = self.owed.pop_front() {
                statement.accept();
            }
            self.settle_local(to_client);
        }
        forward
    }

    /// ReadyForQuery has arrived; false when none was owed.
    pub fn ready(&mut self, to_client: &mut BytesMut) -> bool {
        self.copy_in = false;
        match self.owed.front() {
            Some(front) if front.ends() => {
                self.perhaps = 0;
                let done = self.owed.pop_front();
                self.barriers -= usize::from(matches!(done, Some(Owed::Barrier)));
                self.syncs -= usize::from(matches!(done, Some(Owed::Sync)));
                self.readies -= 1;
                // A simple query ends whatever batch was open before it.
                self.batch &= !(self.owed.is_empty() && done.as_ref().is_some_and(Owed::is_simple));
                self.settle_local(to_client);
                true
            }
            _ if self.perhaps > 0 => {
                self.perhaps -= 1;
                self.skipping = false;
                self.batch = false;
                true
            }
            _ => false,
        }
    }

    /// ErrorResponse has arrived. In the extended protocol everything up to Sync is lost; `lost` is told what. True when
    /// it was in the extended protocol.
    pub fn failed(&mut self, mut lost: impl FnMut(&Owed)) -> bool {
        self.copy_in = false;
        if self.owed.front().is_some_and(Owed::is_simple) {
            return false; // ReadyForQuery follows by itself
        }
        let sync = self.owed.iter().position(|o| matches!(o, Owed::Sync));
        let end = sync.unwrap_or(self.owed.len());
        // What was noted last is taken back first.
        for owed in self.owed.drain(..end).rev() {
            self.barriers -= usize::from(matches!(owed, Owed::Barrier));
            self.readies -= usize::from(owed.ends());
            lost(&owed);
        }
        self.skipping = sync.is_none();
        true
    }

    /// Whether a batch that is not answered yet decides what the client's statement of this name is.
    pub fn decides_on_name(&self, name: &[u8]) -> bool {
        self.earlier_batches().any(|owed| match owed {
            Owed::Parse(Some((known, _))) | Owed::LocalParse(known) | Owed::ProbeParse(known) => known == name,
            Owed::LocalClose(Some((known, _))) => known == name,
            _ => false,
        })
    }

    /// Whether a batch that is not answered yet decides if the server connection has this statement.
    pub fn decides_on_statement(&self, id: u64) -> bool {
        self.earlier_batches().any(|owed| match owed {
            Owed::Parse(Some((_, statement))) => statement.id == id,
            Owed::InjectedParse(known) | Owed::InjectedClose(Some(known)) => *known == id,
            _ => false,
        })
    }

    /// What is owed to batches that have their Sync. What fails in one of them, what comes later does not share.
    fn earlier_batches(&self) -> impl Iterator<Item = &Owed> {
        let end = if self.syncs == 0 { None } else { self.owed.iter().rposition(|o| matches!(o, Owed::Sync)) };
        self.owed.iter().take(end.unwrap_or(0))
    }

    /// CopyInResponse has arrived. A Sync that the client has sent before the end of its copy data is read by the server
    /// as part of the copy, and ignored.
    pub fn copy_in_begins(&mut self) {
        while matches!(self.owed.get(1), Some(Owed::Sync)) {
            self.owed.remove(1);
            self.syncs -= 1;
            self.readies -= 1;
            self.perhaps += 1;
        }
        if self.owed.get(1).is_some_and(|owed| owed.is_simple() && !owed.is_injected()) {
            // The server takes it for what breaks the copy, and answers both at once.
            let taken = self.owed.remove(1);
            self.barriers -= usize::from(matches!(taken, Some(Owed::Barrier)));
            self.readies -= 1;
            self.copy_in = false;
            return;
        }
        let ended = matches!(self.owed.get(1), Some(Owed::CopyEnd));
        if ended {
            self.owed.remove(1);
        }
        self.copy_in = !ended;
    }

    /// The client has ended its copy data, or says that it failed.
    pub fn copy_ends(&mut self, to_client: &mut BytesMut) {
        if self.copy_in {
            self.copy_in = false;
        } else {
            self.owe(Owed::CopyEnd, to_client);
        }
    }

    /// The client has sent something inside COPY that has no place there: the server ends the copy with an error.
    pub fn copy_breaks(&mut self) {
        self.copy_in = false;
    }

    /// Whether the server is reading copy data.
    pub fn copying_in(&self) -> bool {
        self.copy_in
    }

    /// Whether the client's messages are ignored until Sync.
    pub fn skipping(&self) -> bool {
        self.skipping
    }

    /// Sync has come.
    pub fn stop_skipping(&mut self) {
        self.skipping = false;
    }

    /// Whether what arrives now answers a query of the gateway's own.
    pub fn front_is_injected_query(&self) -> bool {
        self.owed.front().is_some_and(Owed::is_injected)
    }

    /// Whether the client is in the middle of a batch.
    pub fn is_in_batch(&self) -> bool {
        self.batch
    }

    /// Whether a query or a batch with its Sync is not answered.
    pub fn owes_ready(&self) -> bool {
        self.readies > self.injected()
    }

    /// How many answers are owed to the gateway alone.
    pub fn injected(&self) -> usize {
        self.owed.iter().filter(|owed| owed.is_injected()).count()
    }

    /// Whether nothing of the client's own is owed.
    pub fn owes_only_injected(&self) -> bool {
        !self.batch && !self.skipping && self.owed.iter().all(Owed::is_injected)
    }

    /// The statement that answers now has changed its setting.
    pub fn has_set(&mut self) {
        if let Some(Owed::Set(_, done)) = self.owed.front_mut() {
            *done = true;
        }
    }

    /// The setting that the statement which is done has changed.
    pub fn setting(&self) -> Option<&Setting> {
        match self.owed.front() {
            Some(Owed::Set(setting, true)) => Some(setting),
            _ => None,
        }
    }

    /// Whether the unnamed statement will be replaced by what has been sent already.
    pub fn owes_unnamed_parse(&self) -> bool {
        self.owed.iter().any(|o| matches!(o, Owed::Parse(None) | Owed::Injected))
    }

    /// Whether what the client sends next must wait until the server has answered.
    pub fn has_barrier(&self) -> bool {
        self.barriers > 0
    }

    /// Flush has been sent.
    pub fn flushes(&mut self) {
        self.flushed = true;
    }

    /// Whether nothing is owed after what answers next, or only its Sync.
    pub fn nothing_behind_front(&self) -> bool {
        self.owed.iter().skip(1).all(|owed| matches!(owed, Owed::Sync))
    }

    /// What answers next.
    pub fn front(&self) -> Option<&Owed> {
        self.owed.front()
    }

    /// How many replies are owed.
    pub fn len(&self) -> usize {
        self.owed.len()
    }

    /// Whether nothing is owed.
    pub fn is_empty(&self) -> bool {
        self.owed.is_empty()
    }

    /// Whether the server can do nothing more before the client sends something.
    pub fn waits_for_client(&self) -> bool {
        // Before the Sync of an open batch the server may keep its answers, unless it has another end in front of it.
        let open_batch = self.batch && !self.flushed && self.readies == 0;
        self.owed.is_empty() || self.copy_in || self.skipping || open_batch
    }

    /// Whether nothing is owed and the server is not in the middle of a batch.
    pub fn is_settled(&self) -> bool {
        self.owed.is_empty() && !self.batch && !self.skipping
    }

    fn settle_local(&mut self, to_client: &mut BytesMut) {
        while let Some(front) = self.owed.front() {
            match front {
                Owed::LocalParse(_) => to_client.message(b'1', |_| {}),
                Owed::LocalClose(_) => to_client.message(b'3', |_| {}),
                Owed::CopyEnd => {}
                _ => return,
            }
            self.owed.pop_front();
        }
    }
}
