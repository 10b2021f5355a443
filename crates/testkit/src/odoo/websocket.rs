//! The gevent port: WebSockets that give back what they get.

use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpListener;
use tokio_tungstenite::accept_hdr_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};

pub(super) async fn serve(listener: TcpListener) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        tokio::spawn(async move {
            let mut host = String::new();
            #[allow(clippy::result_large_err)] // the callback's type is the library's
            let note = |request: &Request, response: Response| {
                let header = request.headers().get("x-forwarded-host").and_then(|h| h.to_str().ok());
                header.unwrap_or_default().clone_into(&mut host);
                Ok(response)
            };
            let Ok(mut socket) = accept_hdr_async(stream, note).await else { return };
            if socket.send(Message::text(format!("hello {host}"))).await.is_err() {
                return;
            }
            while let Some(Ok(message)) = socket.next().await {
                if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
                    return;
                }
            }
        });
    }
}
