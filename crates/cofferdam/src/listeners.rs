//! Listening sockets: the caller's, or our own, shared between runtimes by SO_REUSEPORT.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;

/// One listening address with one socket per runtime.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) address: SocketAddr,
    pub(crate) sockets: Vec<TcpListener>,
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
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let mut sockets = Vec::new();
        for _ in 1..runtimes {
            sockets.push(listener.try_clone()?);
        }
        sockets.push(listener);
        Ok(Self { address, sockets })
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
