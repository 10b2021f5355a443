//! The HTTP engine without our logic: accepts, parses, connects for each request, copies. What the plane costs beside it is
//! what `cofferdam bench http` shows.
//!
//! ```text
//! bare_pingora <listen> <origin>
//! ```
#![allow(missing_docs, clippy::unwrap_used)]

use std::net::SocketAddr;

use bytes::BytesMut;
use pingora_core::protocols::Stream;
use pingora_core::protocols::http::v1::client::HttpSession as ServerSession;
use pingora_core::protocols::http::v1::server::HttpSession as ClientSession;
use tokio::net::{TcpListener, TcpStream};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (listen, origin): (SocketAddr, SocketAddr) =
        (arguments.next().unwrap().parse().unwrap(), arguments.next().unwrap().parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let listener = TcpListener::bind(listen).await.unwrap();
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            tcp.set_nodelay(true).unwrap();
            tokio::task::spawn_local(connection(tcp, origin));
        }
    });
}

async fn connection(tcp: TcpStream, origin: SocketAddr) {
    let mut stream: Stream = Box::new(pingora_core::protocols::l4::stream::Stream::from(tcp));
    let mut prefix: Option<BytesMut> = None;
    loop {
        let mut client = ClientSession::new(stream);
        client.set_pipelining_enabled(true);
        if let Some(prefix) = prefix.take() {
            client.set_pipelined_prefix(prefix);
        }
        client.set_server_keepalive(Some(60));
        if !matches!(client.read_request().await, Ok(Some(_))) {
            return;
        }
        if exchange(&mut client, origin).await.is_none() {
            return;
        }
        match client.reuse().await {
            Ok(Some(reusable)) => (stream, prefix) = reusable.into_parts(),
            _ => return,
        }
    }
}

async fn exchange(client: &mut ClientSession, origin: SocketAddr) -> Option<()> {
    let tcp = TcpStream::connect(origin).await.ok()?;
    tcp.set_nodelay(true).ok()?;
    let mut server = ServerSession::new(Box::new(pingora_core::protocols::l4::stream::Stream::from(tcp)));
    server.write_request_header(Box::new(client.req_header().clone())).await.ok()?;
    server.finish_body().await.ok()?;
    server.read_response().await.ok()?;
    let head = server.resp_header()?.clone();
    client.write_response_header(Box::new(head)).await.ok()?;
    while let Some(part) = server.read_body_bytes().await.ok()? {
        client.write_body(&part).await.ok()?;
    }
    client.finish_body().await.ok()?;
    Some(())
}
