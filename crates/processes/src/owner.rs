//! Which process serves a connection: the kernel is asked for the socket at its other end, and processes for what they hold.
//!
//! Of processes of other users that needs `CAP_SYS_PTRACE`. A socket has no process until the connection was accepted, and none
//! at all when its other end is on another machine or in another network namespace.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

/// A socket of some process on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Inode(u32);

/// The end of a connection on the server's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// It was not accepted yet.
    NotYet,
    /// Some process holds this socket.
    By(Inode),
}

/// Asks the kernel for sockets.
#[derive(Debug)]
pub struct Sockets {
    netlink: OwnedFd,
    /// The number of the last question: an answer has that of its own.
    asked: AtomicU32,
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const TCP: u8 = 6;
const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;
/// `struct nlmsghdr`, and with `struct inet_diag_req_v2` behind it.
const HEADER: usize = 16;
const REQUEST: usize = HEADER + 56;
/// Where an answer has the socket's state, the port at its other end, and its inode.
const STATE: usize = HEADER + 1;
const REMOTE_PORT: usize = HEADER + 6;
const INODE: usize = HEADER + 68;

impl Sockets {
    /// Fails where the system has no such interface.
    pub fn open() -> io::Result<Self> {
        let kind = (AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        Ok(Self { netlink: socket_with(kind.0, kind.1, kind.2, Some(netlink::SOCK_DIAG))?, asked: AtomicU32::new(0) })
    }

    /// The server's end of a connection between a server's address and a client's. `None`: it is not on this machine.
    pub fn accepted(&self, server: SocketAddr, client: SocketAddr) -> io::Result<Option<Accepted>> {
        let Some(answer) = self.ask(server, client)? else { return Ok(None) };
        // Without the connection the kernel finds whoever listens. One that the client has half closed is as good as open.
        if answer.state == LISTEN || answer.remote_port != client.port() {
            return Ok(None);
        }
        Ok(Some(if answer.inode == 0 { Accepted::NotYet } else { Accepted::By(Inode(answer.inode)) }))
    }

    /// Whether the client's end of a connection is on this machine and neither side has closed it.
    pub fn is_open(&self, server: SocketAddr, client: SocketAddr) -> io::Result<bool> {
        let answer = self.ask(client, server)?;
        Ok(answer.is_some_and(|answer| answer.state == ESTABLISHED && answer.remote_port == server.port()))
    }

    /// The socket that listens at an address.
    pub fn listening(&self, server: SocketAddr) -> io::Result<Option<Inode>> {
        let nobody = SocketAddr::new(server.ip(), 0);
        let answer = self.ask(server, nobody)?.filter(|answer| answer.state == LISTEN && answer.inode != 0);
        Ok(answer.map(|answer| Inode(answer.inode)))
    }

    fn ask(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<Answer>> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        send(&self.netlink, &request(number, local, remote), SendFlags::empty())?;
        loop {
            let mut answer = [0u8; 512];
            // The kernel answers before it returns; what is left of an earlier question is no answer.
            let (_, received) = recv(&self.netlink, &mut answer[..], RecvFlags::empty())?;
            let answer = &answer[..received.min(answer.len())];
            if answer.get(8..12) == Some(&number.to_ne_bytes()) {
                return Ok(Answer::read(answer));
            }
        }
    }
}

/// `struct inet_diag_msg`, as far as it matters.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    state: u8,
    remote_port: u16,
    inode: u32,
}

impl Answer {
    /// `None` when there is no such socket, or it cannot be said.
    fn read(message: &[u8]) -> Option<Self> {
        let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
        if kind != SOCK_DIAG_BY_FAMILY {
            return None;
        }
        Some(Self {
            state: *message.get(STATE)?,
            remote_port: u16::from_be_bytes(message.get(REMOTE_PORT..REMOTE_PORT + 2)?.try_into().ok()?),
            inode: u32::from_ne_bytes(message.get(INODE..INODE + 4)?.try_into().ok()?),
        })
    }
}

fn request(number: u32, local: SocketAddr, remote: SocketAddr) -> [u8; REQUEST] {
    let family = match local {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let mut out = [0u8; REQUEST];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        out[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&(REQUEST as u32).to_ne_bytes());
    put(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(&NLM_F_REQUEST.to_ne_bytes());
    put(&number.to_ne_bytes());
    put(&[0; 4]);
    put(&[family.as_raw() as u8, TCP, 0, 0]);
    put(&(1u32 << ESTABLISHED | 1 << LISTEN).to_ne_bytes());
    put(&local.port().to_be_bytes());
    put(&remote.port().to_be_bytes());
    put(&octets(local.ip()));
    put(&octets(remote.ip()));
    put(&[0; 4]);
    // Whichever socket it is: no cookie of an earlier answer.
    put(&[0xff; 8]);
    out
}

/// An address as the kernel has it, in sixteen bytes.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => {
            let mut out = [0; 16];
            out[..4].copy_from_slice(&v4.octets());
            out
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// A connection as a process holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// Its socket.
    pub inode: Inode,
    /// The number of the descriptor.
    pub descriptor: u32,
}

impl Connection {
    /// Whether a process holds it so.
    pub fn is_held_by(self, pid: u32) -> bool {
        socket_at(Path::new(&format!("/proc/{pid}/fd/{}", self.descriptor))) == Some(self.inode)
    }

    /// How a process holds a socket, if it does.
    pub fn of(pid: u32, inode: Inode) -> Option<Self> {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let mut entries = entries.filter_map(Result::ok);
        let held = entries.find(|entry| socket_at(&entry.path()) == Some(inode))?;
        Some(Self { inode, descriptor: held.file_name().to_str()?.parse().ok()? })
    }
}

/// All processes that hold a socket. Looks at every process, so it takes long and blocks.
pub fn holders(inode: Inode) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| Connection::of(*pid, inode).is_some()).collect()
}

fn socket_at(path: &Path) -> Option<Inode> {
    let target = fs::read_link(path).ok()?;
    let number = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
    number.parse().ok().map(Inode)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// This very process is client and server.
    fn connection(listen: &str) -> (TcpListener, SocketAddr, TcpStream) {
        let listener = TcpListener::bind(listen).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = SocketAddr::new([127, 0, 0, 1].into(), port);
        let client = TcpStream::connect(server).unwrap();
        (listener, server, client)
    }

    #[test]
    fn a_connection_belongs_to_whoever_has_accepted_it_and_before_that_to_nobody() {
        let Ok(sockets) = Sockets::open() else { return };
        let me = std::process::id();
        for listen in ["127.0.0.1:0", "[::]:0"] {
            let (listener, server, client) = connection(listen);
            let address = client.local_addr().unwrap();
            assert_eq!(sockets.accepted(server, address).unwrap(), Some(Accepted::NotYet), "{listen}");
            let (accepted, _) = listener.accept().unwrap();
            let Some(Accepted::By(inode)) = sockets.accepted(server, address).unwrap() else { panic!("{listen}") };
            assert!(sockets.is_open(server, address).unwrap());
            let held = Connection::of(me, inode).unwrap();
            assert!(held.is_held_by(me) && !held.is_held_by(1));
            assert_eq!(holders(inode), [me]);
            drop((client, accepted));
            assert!(!held.is_held_by(me) && !sockets.is_open(server, address).unwrap());
        }
    }

    #[test]
    fn whoever_listens_is_found_and_is_not_taken_for_a_connection() {
        let Ok(sockets) = Sockets::open() else { return };
        let (listener, server, client) = connection("127.0.0.1:0");
        let inode = sockets.listening(server).unwrap().unwrap();
        assert!(holders(inode).contains(&std::process::id()));
        let nobody = SocketAddr::new([127, 0, 0, 1].into(), 1);
        assert_eq!(sockets.accepted(server, nobody).unwrap(), None);
        drop((listener, client));
        assert_eq!(sockets.listening(server).unwrap(), None);
        assert_eq!(sockets.accepted("192.0.2.1:80".parse().unwrap(), nobody).unwrap(), None, "elsewhere");
    }

    #[test]
    fn an_answer_that_is_cut_off_or_none_says_nothing() {
        let mut message = request(1, "127.0.0.1:80".parse().unwrap(), "[::1]:81".parse().unwrap()).to_vec();
        assert_eq!(Answer::read(&message), None);
        message.resize(INODE + 4, 0);
        assert!(Answer::read(&message).is_some());
        for length in 0..message.len() {
            assert_eq!(Answer::read(&message[..length]), None);
        }
        message[4] = 2;
        assert_eq!(Answer::read(&message), None, "an error");
    }
}
