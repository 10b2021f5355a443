//! A restart that nobody notices: the listening sockets outlive the process.
//!
//! A gateway *offers* its sockets at a Unix socket. Its successor takes them, serves, and dismisses its predecessor,
//! which drains: nobody is refused in between, and no connection that waits to be accepted is lost. A successor that
//! cannot start changes nothing. Sockets may also come from a service manager that keeps them (`LISTEN_FDS`).
//!
//! Sessions stay where they are until their transaction or request has ended. While both processes run, each has gates
//! of its own.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use crate::gateway::Gateway;

/// Sockets in one message; the kernel takes no more than 253.
const MOST: usize = 250;
/// Longest list of what the sockets are for.
const LIST: usize = 16 * MOST;
/// A predecessor that says nothing for so long is none.
const PATIENCE: Duration = Duration::from_secs(10);
const DISMISSED: &[u8] = b"dismissed\n";
/// Ends the list of sockets.
const END: &str = "end";
/// A successor that does not serve after this long will not.
const STARTING: Duration = Duration::from_secs(120);
/// Processes that may be about to take over at once.
const CANDIDATES: usize = 8;
/// How often it is looked whether the offer is still where it was made.
const LOOK: Duration = Duration::from_secs(1);

/// Listening sockets, by what is served on them.
#[derive(Debug, Default)]
pub struct Sockets {
    /// HTTP.
    pub http: Vec<TcpListener>,
    /// PostgreSQL.
    pub postgres: Vec<TcpListener>,
    /// The admin surface.
    pub admin: Vec<TcpListener>,
}

impl Sockets {
    /// Those that a service manager has opened for this process: `LISTEN_FDS`, named `http`, `postgres` and `admin` in
    /// `LISTEN_FDNAMES`. Empty when there is none. To be called once, before anything else opens files.
    pub fn from_service_manager() -> io::Result<Self> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let names: Vec<&str> = names.split(':').collect();
        let mut given = listenfd::ListenFd::from_env();
        let mut sockets = Self::default();
        for n in 0..given.len() {
            let name = names.get(n).copied().unwrap_or("unknown");
            let Some(socket) = given.take_tcp_listener(n)? else { continue };
            sockets.add(name, socket).map_err(|name| {
                let message =
                    format!("a socket named `{name}`, expected `http`, `postgres` or `admin` (FileDescriptorName)");
                io::Error::new(io::ErrorKind::InvalidInput, message)
            })?;
        }
        Ok(sockets)
    }

    fn add<'a>(&mut self, name: &'a str, socket: TcpListener) -> Result<(), &'a str> {
        match name {
            "http" => self.http.push(socket),
            "postgres" => self.postgres.push(socket),
            "admin" => self.admin.push(socket),
            _ => return Err(name),
        }
        Ok(())
    }

    pub(crate) fn count(&self) -> usize {
        self.http.len() + self.postgres.len() + self.admin.len()
    }

    fn named(&self) -> impl Iterator<Item = (&'static str, &TcpListener)> {
        let http = self.http.iter().map(|s| ("http", s));
        let postgres = self.postgres.iter().map(|s| ("postgres", s));
        http.chain(postgres).chain(self.admin.iter().map(|s| ("admin", s)))
    }

    /// More handles for the same sockets.
    pub fn try_clone(&self) -> io::Result<Self> {
        let mut clone = Self::default();
        for (name, socket) in self.named() {
            let _ = clone.add(name, socket.try_clone()?);
        }
        Ok(clone)
    }
}

/// A gateway that runs, and whose sockets were taken.
#[derive(Debug)]
pub struct Predecessor(UnixStream);

impl Predecessor {
    /// Takes the sockets of the gateway that offers them at a path; `None` when there is no such gateway. Blocks.
    pub fn take(path: &Path) -> io::Result<Option<(Self, Sockets)>> {
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        Self::receive(stream).map(Some)
    }

    fn receive(stream: UnixStream) -> io::Result<(Self, Sockets)> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let (mut names, mut fds): (Vec<String>, Vec<OwnedFd>) = (Vec::new(), Vec::new());
        loop {
            let mut list = vec![0; LIST];
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received =
                recvmsg(&stream, &mut [IoSliceMut::new(&mut list)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(given) = message {
                    fds.extend(given);
                }
            }
            let list = String::from_utf8_lossy(&list[..received.bytes]).into_owned();
            names.extend(list.split_whitespace().map(str::to_owned));
            let is_last = names.last().is_some_and(|word| word == END);
            names.truncate(names.len() - usize::from(is_last));
            if names.len() != fds.len() || received.bytes == 0 {
                let message = format!("{} sockets for {} names", fds.len(), names.len());
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            if is_last {
                break;
            }
        }
        let mut sockets = Sockets::default();
        for (name, fd) in names.into_iter().zip(fds) {
            // What a newer version serves and this one does not stays with the predecessor.
            let _ = sockets.add(&name, TcpListener::from(fd));
        }
        Ok((Self(stream), sockets))
    }

    /// Has the predecessor drain. To be called when everything is served. Blocks until it has heard.
    pub fn dismiss(mut self) -> io::Result<()> {
        self.0.write_all(DISMISSED)?;
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest)?;
        Ok(())
    }
}

/// A place where sockets are going to be offered.
#[derive(Debug)]
pub struct Offer {
    path: PathBuf,
    beside: Beside,
    listener: UnixListener,
}

/// A socket file that is removed unless it is moved to where it belongs.
#[derive(Debug)]
struct Beside(PathBuf);

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Offer {
    /// Prepares a place beside the path: whoever offers there goes on until [`Self::serve`]. Fails when nothing can be
    /// offered there.
    pub fn prepare(path: &Path) -> io::Result<Self> {
        let beside = path.with_extension(format!("{}.new", std::process::id()));
        let listener = bind(&beside)?;
        Ok(Self { path: path.to_owned(), beside: Beside(beside), listener })
    }

    /// Offers the sockets of a gateway until a successor has taken them and serves; then the gateway drains and this
    /// returns. Only processes of the same user are answered, each by itself: the first that serves is the successor.
    ///
    /// Cancel-safe: dropping the future stops offering.
    pub async fn serve(self, gateway: &Gateway) -> io::Result<()> {
        let Self { path, beside, listener } = self;
        // Moved to the path: at no moment is there none, and whoever offered here before is replaced.
        std::fs::rename(&beside.0, &path)?;
        let mut listener = tokio::net::UnixListener::from_std(listener)?;
        let me = rustix::process::geteuid().as_raw();
        let mut candidates = tokio::task::JoinSet::new();
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let stream = match accepted {
                        Ok((stream, _)) => stream,
                        Err(error) => {
                            tracing::warn!(%error, "a successor cannot be accepted");
                            tokio::time::sleep(Duration::from_millis(50)).await;
                            continue;
                        }
                    };
                    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == me || me == 0) {
                        tracing::warn!("another user has asked for the listening sockets");
                    } else if candidates.len() < CANDIDATES {
                        let Some(sockets) = gateway.sockets()? else { return Ok(()) };
                        let stream = stream.into_std()?;
                        candidates.spawn_blocking(move || hand_over(stream, &sockets));
                    }
                }
                Some(outcome) = candidates.join_next() => match outcome.map_err(io::Error::other)? {
                    Ok(Some(stream)) => {
                        tracing::info!("a successor serves: draining");
                        gateway.hand_over();
                        drop(stream);
                        return Ok(());
                    }
                    Ok(None) => tracing::warn!("a successor took the listening sockets and ended before it served"),
                    Err(error) => tracing::warn!(%error, "the listening sockets could not be handed over"),
                },
                _ = look.tick() => {
                    // Somebody has tidied up. What another gateway offers there is left alone.
                    if !path.exists() {
                        match bind(&path).and_then(tokio::net::UnixListener::from_std) {
                            Ok(anew) => listener = anew,
                            Err(error) => tracing::warn!(path = %path.display(), %error, "cannot offer a successor anything"),
                        }
                    }
                }
            }
        }
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Sends the sockets and waits for the successor's word: the stream when it serves, nothing when it has ended before.
fn hand_over(mut stream: UnixStream, sockets: &Sockets) -> io::Result<Option<UnixStream>> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    // A successor has so long to start.
    stream.set_read_timeout(Some(STARTING))?;
    let all: Vec<_> = sockets.named().collect();
    let mut chunks = all.chunks(MOST).peekable();
    while let Some(chunk) = chunks.next() {
        let names: Vec<&str> = chunk.iter().map(|(name, _)| *name).collect();
        let list = names.join(" ") + if chunks.peek().is_none() { " end\n" } else { "\n" };
        let fds: Vec<BorrowedFd<'_>> = chunk.iter().map(|(_, socket)| socket.as_fd()).collect();
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("too many listening sockets"));
        }
        sendmsg(&stream, &[IoSlice::new(list.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)?;
    }
    let mut word = Vec::new();
    let mut byte = [0];
    while word.len() < DISMISSED.len() && stream.read(&mut byte)? == 1 {
        word.push(byte[0]);
    }
    Ok((word == DISMISSED).then_some(stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_sockets_than_fit_into_one_message_are_handed_over_by_name() {
        let (old, new) = (UnixStream::pair().unwrap(), Sockets::default());
        let mut sockets = new;
        for n in 0..600 {
            let socket = TcpListener::bind("127.0.0.1:0").unwrap();
            let _ = sockets.add(["http", "postgres", "admin"][n % 3], socket);
        }
        let expected: Vec<_> = sockets.named().map(|(name, s)| (name, s.local_addr().unwrap())).collect();
        let (giver, taker) = old;
        let giving = std::thread::spawn(move || hand_over(giver, &sockets).unwrap().is_some());
        let (predecessor, taken) = Predecessor::receive(taker).unwrap();
        let found: Vec<_> = taken.named().map(|(name, s)| (name, s.local_addr().unwrap())).collect();
        assert_eq!(found, expected);
        // Whoever ends without a word has not taken over.
        drop(predecessor);
        assert!(!giving.join().unwrap());
    }
}
