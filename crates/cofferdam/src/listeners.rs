//! Listening sockets: the caller's, or our own, shared between runtimes by SO_REUSEPORT.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;

/// One listening address with at least one socket per runtime.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) address: SocketAddr,
    sockets: Vec<TcpListener>,
}

impl Listening {
    /// Binds an address once per runtime. Port 0 takes one free port for all of them.
    pub(crate) fn bind(address: SocketAddr, runtimes: usize) -> io::Result<Self> {
        if address.port() != 0 {
            // With SO_REUSEPORT a second process would silently share the port: somebody else's is an error.
            drop(bind(address, false)?);
        }
        let shared = runtimes > 1;
        let first = bind(address, shared)?;
        let address = first.local_addr()?;
        let mut sockets = vec![first];
        for _ in 1..runtimes {
            sockets.push(bind(address, shared)?);
        }
        Ok(Self { address, sockets })
    }

    /// A socket that the caller has bound; runtimes share it.
    pub(crate) fn given(listener: TcpListener, runtimes: usize) -> io::Result<Self> {
        let address = listener.local_addr()?;
        Self::all_of(address, vec![listener], runtimes)
    }

    /// Sockets of one address. All of them are served: connections wait at each.
    fn all_of(address: SocketAddr, mut sockets: Vec<TcpListener>, runtimes: usize) -> io::Result<Self> {
        for socket in &sockets {
            socket.set_nonblocking(true)?;
        }
        let count = sockets.len();
        for n in count..runtimes {
            sockets.push(sockets[n % count].try_clone()?);
        }
        Ok(Self { address, sockets })
    }

    /// Those of the inherited sockets that listen at an address, or on a port of its host when it has none; bound anew
    /// when there is none.
    pub(crate) fn inherit(inherited: &mut Vec<TcpListener>, address: SocketAddr, runtimes: usize) -> io::Result<Self> {
        let fits = |found: SocketAddr| match address.port() {
            0 => found.ip() == address.ip(),
            _ => found == address,
        };
        let first = inherited.iter().find_map(|socket| socket.local_addr().ok().filter(|found| fits(*found)));
        let Some(address) = first else { return Self::bind(address, runtimes) };
        let is_here = |socket: &mut TcpListener| socket.local_addr().is_ok_and(|found| found == address);
        let sockets: Vec<_> = inherited.extract_if(.., is_here).collect();
        Self::all_of(address, sockets, runtimes)
    }

    /// The sockets that the runtime with this number serves.
    pub(crate) fn of_runtime(&self, number: usize, runtimes: usize) -> io::Result<Vec<TcpListener>> {
        let mine = self.sockets.iter().enumerate().filter(|(n, _)| n % runtimes == number);
        mine.map(|(_, socket)| socket.try_clone()).collect()
    }

    pub(crate) fn into_sockets(self) -> Vec<TcpListener> {
        self.sockets
    }
}

fn bind(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
