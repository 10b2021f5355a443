//! Logging in without deriving the same keys each time.
//!
//! Whoever looks into a thousand databases logs in a thousand times, and what SCRAM makes of a password takes milliseconds of
//! a processor each time: more than everything else that a look does. `tokio_postgres` does not keep it.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, BytesMut};
use cofferdam_scram::{Derived, Knows, SCRAM, SCRAM_PLUS, ScramClient, ScramError, nonce};
use cofferdam_tenant::Secret;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_rustls::TlsConnector;

use crate::Bounded;

/// What passwords have been turned into.
static DERIVED: LazyLock<Derived> = LazyLock::new(Derived::default);

/// The question for SASL, its continuation, and its end, as codes of an authentication message.
const SASL: u32 = 10;
const SASL_CONTINUE: u32 = 11;
const SASL_FINAL: u32 = 12;

/// Bytes of a message of such an exchange.
const LONGEST: usize = 64 << 10;

/// A stream to a server on which SCRAM is answered here: whoever reads from it finds that no password was asked for. Every
/// other way to log in passes as it is.
pub struct LogsIn<S> {
    inner: S,
    password: Option<Secret>,
    /// What the exchange is bound to: the hash of the server's certificate.
    binding: Option<Vec<u8>>,
    stage: Stage,
    /// What the server has said and nobody has read.
    heard: BytesMut,
    /// What is to be said to the server.
    said: BytesMut,
}

enum Stage {
    /// Nobody has asked for anything yet.
    Open,
    /// The exchange goes on.
    Exchange(ScramClient),
    /// What comes is not ours.
    Over,
}

impl<S: fmt::Debug> fmt::Debug for LogsIn<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogsIn").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<S> LogsIn<S> {
    /// A stream on which nothing has been said. Without a password everything passes as it is.
    pub fn new(inner: S, password: Option<Secret>) -> Self {
        let (heard, said) = (BytesMut::new(), BytesMut::new());
        let stage = if password.is_some() { Stage::Open } else { Stage::Over };
        Self { inner, password, binding: None, stage, heard, said }
    }

    /// Takes the server's next message, if it is whole and ours. False where more has to be read first.
    fn answer(&mut self) -> io::Result<bool> {
        let Some((header, rest)) = self.heard.split_first_chunk::<5>() else { return Ok(false) };
        let (kind, length) = (header[0], u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize);
        if kind != b'R' {
            // It refuses, or has something to remark. Not in the midst of an exchange, where only refusing is left.
            if matches!(self.stage, Stage::Exchange(_)) && kind != b'E' {
                return Err(wrong(ScramError::Malformed));
            }
            self.stage = Stage::Over;
            return Ok(true);
        }
        // Whoever asks for a password says how, and not at great length.
        if !(8..=LONGEST).contains(&length) {
            return Err(wrong(ScramError::Malformed));
        }
        let Some(body) = rest.get(..length - 4) else { return Ok(false) };
        let (code, data) = body.split_first_chunk::<4>().ok_or_else(|| wrong(ScramError::Malformed))?;
        let mut client = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Open | Stage::Over => None,
            Stage::Exchange(client) => Some(client),
        };
        match (u32::from_be_bytes(*code), &mut client) {
            (SASL, None) => {
                let offered = |name: &str| data.split(|byte| *byte == 0).any(|one| one == name.as_bytes());
                let binding = self.binding.as_deref().filter(|_| offered(SCRAM_PLUS));
                if binding.is_none() && !offered(SCRAM) {
                    return Ok(true);
                }
                let mechanism = if binding.is_some() { SCRAM_PLUS } else { SCRAM };
                let nonce = nonce().map_err(io::Error::other)?;
                let begun = ScramClient::new(&nonce, binding, self.binding.is_some());
                let first = begun.first();
                message(&mut self.said, &[mechanism.as_bytes(), &[0], &length_of(&first), first.as_bytes()]);
                client = Some(begun);
            }
            (SASL_CONTINUE, Some(client)) => {
                let password = self.password.as_ref().map_or("", Secret::expose);
                let proof = client.prove(Knows::Password(password, &DERIVED), data).map_err(wrong)?;
                message(&mut self.said, &[proof.as_bytes()]);
            }
            (SASL_FINAL, Some(_)) => {
                if let Some(client) = client.take() {
                    client.finish(data).map_err(wrong)?;
                }
            }
            // A server that does not prove that it knows the password is not the one that was to be proved to.
            (_, Some(_)) => return Err(wrong(ScramError::WrongServer)),
            // It asks for nothing, or for something else.
            (_, None) => return Ok(true),
        }
        self.stage = client.map_or(Stage::Over, Stage::Exchange);
        self.heard.advance(1 + length);
        Ok(true)
    }
}

fn wrong(error: ScramError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn length_of(text: &str) -> [u8; 4] {
    u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// Writes an answer to a question for a password.
fn message(out: &mut BytesMut, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.put_u8(b'p');
    out.put_u32(u32::try_from(length + 4).unwrap_or(u32::MAX));
    for part in parts {
        out.put_slice(part);
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for LogsIn<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.said.is_empty() {
                let written = ready!(Pin::new(&mut this.inner).poll_write(cx, &this.said))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                this.said.advance(written);
                continue;
            }
            if matches!(this.stage, Stage::Over) {
                if this.heard.is_empty() {
                    return Pin::new(&mut this.inner).poll_read(cx, buffer);
                }
                let passed = this.heard.len().min(buffer.remaining());
                buffer.put_slice(&this.heard.split_to(passed));
                return Poll::Ready(Ok(()));
            }
            if matches!(this.stage, Stage::Exchange(_)) {
                ready!(Pin::new(&mut this.inner).poll_flush(cx))?;
            }
            if this.answer()? {
                continue;
            }
            let mut room = [0; 1024];
            let mut room = ReadBuf::new(&mut room);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut room))?;
            if room.filled().is_empty() {
                this.stage = Stage::Over;
            }
            this.heard.extend_from_slice(room.filled());
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LogsIn<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for LogsIn<S> {
    fn channel_binding(&self) -> ChannelBinding {
        self.binding.clone().map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

/// TLS to a server, with messages that are bounded and a login that is answered here if there is a password.
pub struct SecureLogin {
    config: Arc<ClientConfig>,
    host: String,
    password: Option<Secret>,
    largest: u32,
}

impl fmt::Debug for SecureLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecureLogin").field("host", &self.host).finish_non_exhaustive()
    }
}

impl SecureLogin {
    /// How the server is checked and under which name, the password, and the largest message in bytes.
    pub fn new(config: Arc<ClientConfig>, host: &str, password: Option<Secret>, largest: u32) -> Self {
        Self { config, host: host.to_owned(), password, largest }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> TlsConnect<S> for SecureLogin {
    type Stream = LogsIn<Bounded<tokio_rustls::client::TlsStream<S>>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Stream>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move {
            let name = ServerName::try_from(self.host).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
            let stream = TlsConnector::from(self.config).connect(name, stream).await?;
            let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            let binding = leaf.and_then(|leaf| cofferdam_tls::end_point(leaf));
            Ok(LogsIn { binding, ..LogsIn::new(Bounded::new(stream, self.largest), self.password) })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_scram::{ScramKeys, ScramServer};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    fn authentication(code: u32, data: &[u8]) -> Vec<u8> {
        let mut message = vec![b'R'];
        message.extend(u32::try_from(8 + data.len()).unwrap().to_be_bytes());
        message.extend(code.to_be_bytes());
        message.extend(data);
        message
    }

    async fn answer(server: &mut DuplexStream) -> Vec<u8> {
        assert_eq!(server.read_u8().await.unwrap(), b'p');
        let mut body = vec![0; server.read_u32().await.unwrap() as usize - 4];
        server.read_exact(&mut body).await.unwrap();
        body
    }

    /// What a server says after the exchange.
    const WELCOME: &[u8] = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I";

    /// A server that offers both mechanisms, says what it says in pieces of some bytes, and ends as it is told.
    async fn serve(mut server: DuplexStream, step: usize, proves: bool) -> Vec<u8> {
        let say = async |server: &mut DuplexStream, bytes: Vec<u8>| {
            for piece in bytes.chunks(step) {
                // Whoever has heard enough goes.
                let _ = server.write_all(piece).await;
                tokio::task::yield_now().await;
            }
        };
        say(&mut server, authentication(SASL, b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")).await;
        let first = answer(&mut server).await;
        let mechanism = first.split(|byte| *byte == 0).next().unwrap().to_vec();
        let keys = ScramKeys::derive("geheim", &[7; 16]);
        let plus = mechanism == SCRAM_PLUS.as_bytes();
        let said = &first[mechanism.len() + 5..];
        let exchange = ScramServer::begin(&keys, said, "ours", plus.then_some(b"hash"), plus).unwrap();
        say(&mut server, authentication(SASL_CONTINUE, exchange.challenge().as_bytes())).await;
        let last = exchange.finish(&answer(&mut server).await);
        let Ok((signature, _)) = last else {
            say(&mut server, b"E\0\0\0\x05\0".to_vec()).await;
            return mechanism;
        };
        let proof = if proves { authentication(SASL_FINAL, signature.as_bytes()) } else { Vec::new() };
        say(&mut server, [proof, WELCOME.to_vec()].concat()).await;
        mechanism
    }

    async fn log_in(
        password: &str,
        binding: Option<&[u8]>,
        step: usize,
        proves: bool,
    ) -> (Vec<u8>, io::Result<Vec<u8>>) {
        let (client, server) = tokio::io::duplex(4096);
        let server = tokio::spawn(serve(server, step, proves));
        let password = Some(Secret::new(password));
        let mut client = LogsIn { binding: binding.map(<[u8]>::to_vec), ..LogsIn::new(client, password) };
        let mut read = Vec::new();
        let outcome = client.read_to_end(&mut read).await;
        drop(client);
        (server.await.unwrap(), outcome.map(|_| read))
    }

    #[tokio::test]
    async fn whoever_reads_finds_itself_logged_in_however_the_messages_are_cut() {
        for step in [1, 2, 3, 5, 8, 64, 1000] {
            let (mechanism, read) = log_in("geheim", Some(b"hash"), step, true).await;
            assert_eq!((mechanism.as_slice(), read.unwrap().as_slice()), (SCRAM_PLUS.as_bytes(), WELCOME), "{step}");
        }
        let (mechanism, read) = log_in("geheim", None, 1000, true).await;
        assert_eq!((mechanism.as_slice(), read.unwrap().as_slice()), (SCRAM.as_bytes(), WELCOME));
    }

    #[tokio::test]
    async fn a_refusal_is_passed_on_and_a_server_that_proves_nothing_is_none() {
        let (_, read) = log_in("Geheim", None, 3, true).await;
        assert_eq!(read.unwrap(), b"E\0\0\0\x05\0");
        let (_, read) = log_in("geheim", None, 3, false).await;
        assert!(read.unwrap_err().to_string().contains("the server's side"));
    }

    #[tokio::test]
    async fn what_is_no_scram_passes_as_it_is() {
        let others = [
            WELCOME.to_vec(),
            authentication(5, b"salt"),
            authentication(SASL, b"OAUTHBEARER\0\0"),
            b"E\0\0\0\x05\0".to_vec(),
            b"R\0".to_vec(),
            Vec::new(),
        ];
        for length in [0_u32, 4, 7, 1 << 20] {
            let (client, mut server) = tokio::io::duplex(4096);
            server.write_all(&[b"R".as_slice(), &length.to_be_bytes(), &[0; 100]].concat()).await.unwrap();
            let error = LogsIn::new(client, Some(Secret::new("x"))).read_to_end(&mut Vec::new()).await.unwrap_err();
            assert!(error.to_string().contains("malformed"), "{length}: {error}");
        }
        for bytes in others {
            let (client, mut server) = tokio::io::duplex(4096);
            server.write_all(&bytes).await.unwrap();
            drop(server);
            let mut read = Vec::new();
            LogsIn::new(client, Some(Secret::new("x"))).read_to_end(&mut read).await.unwrap();
            assert_eq!(read, bytes);
        }
    }
}
