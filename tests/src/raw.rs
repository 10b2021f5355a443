//! A client that says exactly what it is told to, and its messages as text: for comparing two servers.
#![allow(missing_docs)]

use std::fmt::Write as _;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{POOL_LOGIN, Site, SiteOptions};

/// A client that says exactly what it is told to.
pub struct Raw {
    tcp: TcpStream,
    buffer: BytesMut,
}

pub fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    out.put_u32(body.len() as u32 + 4);
    out.put_slice(body);
    out
}

impl Raw {
    pub async fn connect(port: u16, database: &str) -> Self {
        Self::connect_as(port, database, "differential").await
    }

    /// A client with this name.
    pub async fn connect_as(port: u16, database: &str, application_name: &str) -> Self {
        let mut tcp = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let mut body = vec![0, 3, 0, 0];
        for text in ["user", POOL_LOGIN.0, "database", database, "application_name", application_name, ""] {
            body.put_slice(text.as_bytes());
            body.put_u8(0);
        }
        let mut packet = Vec::new();
        packet.put_u32(body.len() as u32 + 4);
        packet.put_slice(&body);
        tcp.write_all(&packet).await.unwrap();
        let mut raw = Self { tcp, buffer: BytesMut::new() };
        let mut scram = ScramSha256::new(POOL_LOGIN.1.as_bytes(), ChannelBinding::unsupported());
        loop {
            let (kind, body) = raw.next().await.unwrap();
            match (kind, body.get(..4)) {
                (b'R', Some([0, 0, 0, 10])) => {
                    let mut first = b"SCRAM-SHA-256\0".to_vec();
                    first.put_u32(scram.message().len() as u32);
                    first.put_slice(scram.message());
                    raw.send(&message(b'p', &first)).await;
                }
                (b'R', Some([0, 0, 0, 11])) => {
                    scram.update(&body[4..]).unwrap();
                    raw.send(&message(b'p', scram.message())).await;
                }
                (b'Z', _) => return raw,
                (b'E', _) => panic!("login: {}", String::from_utf8_lossy(&body)),
                _ => {}
            }
        }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        // Whoever has been told goodbye may find the door closed.
        let _ = self.tcp.write_all(bytes).await;
    }

    /// Sends nothing any more, and waits until the other side has ended too.
    pub async fn leave(mut self) {
        let _ = self.tcp.shutdown().await;
        while self.next().await.is_some() {}
    }

    /// The next message; `None` at the end of the stream, and when nothing comes for long.
    pub async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            if self.buffer.len() >= 5 {
                let total = u32::from_be_bytes(self.buffer[1..5].try_into().unwrap()) as usize + 1;
                if self.buffer.len() >= total {
                    let whole = self.buffer.split_to(total);
                    return Some((whole[0], whole[5..].to_vec()));
                }
            }
            match tokio::time::timeout(Duration::from_secs(20), self.tcp.read_buf(&mut self.buffer)).await {
                Ok(Ok(n)) if n > 0 => {}
                Ok(_) => return None,
                Err(late) => panic!("nothing came for 20 s: {late}"),
            }
        }
    }
}

/// A message as text: errors by severity and SQLSTATE, everything else byte for byte.
pub fn shown(kind: u8, body: &[u8]) -> String {
    let mut text = format!("{} ", kind as char);
    if matches!(kind, b'E' | b'N') {
        let field = |name: u8| {
            let fields = body.split(|b| *b == 0);
            let value = fields
                .filter(|f| f.first() == Some(&name))
                .map(|f| String::from_utf8_lossy(&f[1..]).into_owned())
                .next();
            value.unwrap_or_default()
        };
        let _ = write!(text, "{} {}", field(b'S'), field(b'C'));
    } else {
        let _ = write!(text, "{}", body.escape_ascii());
    }
    text
}

/// RowDescription without the numbers of tables, which are other ones for each table that is made.
pub fn without_tables(mut body: Vec<u8>) -> Vec<u8> {
    let mut at = 2;
    while let Some(name) = body.get(at..).and_then(|rest| rest.iter().position(|b| *b == 0)) {
        let table = at + name + 1;
        if let Some(number) = body.get_mut(table..table + 4) {
            number.fill(0);
        }
        at = table + 18;
    }
    body
}

/// What is sent at once before all answers are read.
pub type Batch = Vec<Vec<u8>>;

/// Runs batches and notes what arrives. An empty query ends each: it is answered whatever was skipped before it, also
/// in a failed transaction.
pub async fn run(client: &mut Raw, batches: &[Batch]) -> Vec<String> {
    let mut heard = Vec::new();
    for batch in batches {
        client.send(&[batch.concat(), query("")].concat()).await;
        let mut ended = false;
        loop {
            let Some((kind, body)) = client.next().await else {
                heard.push("closed".into());
                return heard;
            };
            // Settings are reported when they change: a pooled connection has them already, or not yet.
            if kind != b'S' {
                let body = if kind == b'T' { without_tables(body) } else { body };
                heard.push(shown(kind, &body));
            }
            if ended && kind == b'Z' {
                break;
            }
            ended |= kind == b'I';
        }
    }
    heard
}

pub fn query(sql: &str) -> Vec<u8> {
    message(b'Q', format!("{sql}\0").as_bytes())
}

pub fn parse(name: &str, sql: &str) -> Vec<u8> {
    let mut body = format!("{name}\0{sql}\0").into_bytes();
    body.put_u16(0);
    message(b'P', &body)
}

pub fn bind(portal: &str, statement: &str, parameters: &[&str]) -> Vec<u8> {
    let mut body = format!("{portal}\0{statement}\0").into_bytes();
    body.put_u16(0);
    body.put_u16(parameters.len() as u16);
    for parameter in parameters {
        body.put_u32(parameter.len() as u32);
        body.put_slice(parameter.as_bytes());
    }
    body.put_u16(0);
    message(b'B', &body)
}

pub fn named(kind: u8, what: u8, name: &str) -> Vec<u8> {
    message(kind, &[&[what], name.as_bytes(), &[0]].concat())
}

pub fn execute(portal: &str, rows: u32) -> Vec<u8> {
    let mut body = format!("{portal}\0").into_bytes();
    body.put_u32(rows);
    message(b'E', &body)
}

pub fn sync() -> Vec<u8> {
    message(b'S', &[])
}

pub fn readable(batches: &[Batch]) -> String {
    let one = |m: &Vec<u8>| shown(m[0], &m[5..]);
    batches.iter().map(|b| b.iter().map(one).collect::<Vec<_>>().join("\n  ")).collect::<Vec<_>>().join("\n--\n  ")
}

/// A site whose clients share few connections, with a table that everybody may fill.
pub async fn site() -> Site {
    let site = Site::start_with(SiteOptions { cluster: "    connections: 8".into(), ..SiteOptions::default() }).await;
    let admin = site.cluster.admin("acme_db").await.unwrap();
    admin.batch_execute("CREATE TABLE t (a int); ALTER TABLE t OWNER TO odoo").await.unwrap();
    site
}
