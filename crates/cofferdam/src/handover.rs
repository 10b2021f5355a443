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
use std::os::unix::net::UnixStream;
use std::path::Path;
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
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut list = vec![0; LIST];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(&stream, &mut [IoSliceMut::new(&mut list)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(given) = message {
                fds.extend(given);
            }
        }
        let list = String::from_utf8_lossy(&list[..received.bytes]).into_owned();
        let names: Vec<&str> = list.split_whitespace().collect();
        if names.len() != fds.len() || !list.ends_with('\n') {
            let message = format!("{} sockets for {} names", fds.len(), names.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let mut sockets = Sockets::default();
        for (name, fd) in names.into_iter().zip(fds) {
            // What a newer version serves and this one does not stays with the predecessor.
            let _ = sockets.add(name, TcpListener::from(fd));
        }
        Ok(Some((Self(stream), sockets)))
    }

    /// Has the predecessor drain. To be called when everything is served. Blocks until it has heard.
    pub fn dismiss(mut self) -> io::Result<()> {
        self.0.write_all(DISMISSED)?;
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest)?;
        Ok(())
    }
}

/// Offers the sockets of a gateway at a path until a successor has taken them and serves; then the gateway drains and
/// this returns. Only processes of the same user are answered.
///
/// Cancel-safe: dropping the future stops offering.
pub async fn offer(path: &Path, gateway: &Gateway) -> io::Result<()> {
    // Bound beside the path and moved there: at no moment is there none, and whoever offered here before is replaced.
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&beside);
    let listener = tokio::net::UnixListener::bind(&beside)?;
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&beside, path)?;
    let me = rustix::process::geteuid().as_raw();
    loop {
        let (stream, _) = listener.accept().await?;
        if stream.peer_cred()?.uid() != me && me != 0 {
            tracing::warn!("another user has asked for the listening sockets");
            continue;
        }
        let Some(sockets) = gateway.sockets()? else { return Ok(()) };
        let stream = stream.into_std()?;
        let successor = tokio::task::spawn_blocking(move || hand_over(stream, &sockets)).await;
        match successor.map_err(io::Error::other)? {
            Ok(Some(stream)) => {
                tracing::info!("a successor serves: draining");
                gateway.hand_over();
                drop(stream);
                return Ok(());
            }
            Ok(None) => tracing::warn!("a successor took the listening sockets and ended before it served"),
            Err(error) => tracing::warn!(%error, "the listening sockets could not be handed over"),
        }
    }
}

/// Sends the sockets and waits for the successor's word: the stream when it serves, nothing when it has ended before.
fn hand_over(mut stream: UnixStream, sockets: &Sockets) -> io::Result<Option<UnixStream>> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut list = String::new();
    let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
    for (name, socket) in sockets.named().take(MOST) {
        list.push_str(name);
        list.push(' ');
        fds.push(socket.as_fd());
    }
    list.push('\n');
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("too many listening sockets"));
    }
    sendmsg(&stream, &[IoSlice::new(list.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)?;
    let mut word = Vec::new();
    let mut byte = [0];
    while word.len() < DISMISSED.len() && stream.read(&mut byte)? == 1 {
        word.push(byte[0]);
    }
    Ok((word == DISMISSED).then_some(stream))
}
