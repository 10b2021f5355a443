//! An HTTP origin that takes nothing but the strict form and writes down what it saw.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What the origin saw: request lines with the length of each body, and everything that was not strict.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    /// Method, target and body of each.
    pub requests: Vec<String>,
    /// What was not strict.
    pub violations: Vec<String>,
}

/// What an origin writes down.
pub type Log = Arc<Mutex<Seen>>;

/// An origin on a free port.
pub async fn origin() -> (SocketAddr, Log) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, log) = (listener.local_addr().unwrap(), Log::default());
    let seen = Arc::clone(&log);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                if let Err(violation) = strict(stream, &seen).await {
                    seen.lock().unwrap().violations.push(violation);
                }
            });
        }
    });
    (address, log)
}

/// One request in the strictest form, an answer, and then nothing more may come.
async fn strict(mut stream: TcpStream, log: &Log) -> Result<(), String> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at;
        }
        match stream.read_buf(&mut bytes).await {
            Ok(n) if n > 0 => {}
            _ => return if bytes.is_empty() { Ok(()) } else { Err(format!("half a head: {bytes:?}")) },
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).map_err(|e| format!("no text: {e}"))?;
    let mut lines = head.split("\r\n");
    let line = lines.next().unwrap_or_default().to_owned();
    let [method, target, version] = line.split(' ').collect::<Vec<_>>()[..] else {
        return Err(format!("a request line of other than three words: {line:?}"));
    };
    let token =
        |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b));
    if !token(method)
        || !target.starts_with('/')
        || !target.bytes().all(|b| b.is_ascii_graphic())
        || version != "HTTP/1.1"
    {
        return Err(format!("a request line that is not strict: {line:?}"));
    }
    let (mut length, mut hosts) = (None, 0);
    for line in lines {
        let (name, value) = line.split_once(": ").or(line.split_once(':')).ok_or(format!("no colon: {line:?}"))?;
        if !token(name) || value.trim() != value || value.bytes().any(|b| b < 0x20 && b != b'\t' || b == 0x7f) {
            return Err(format!("a field that is not strict: {line:?}"));
        }
        match name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
                if length.replace(value.parse::<usize>().ok().filter(|_| digits)).is_some() {
                    return Err("two lengths".into());
                }
            }
            "transfer-encoding" | "te" | "trailer" | "upgrade" | "expect" => return Err(format!("not ours: {line:?}")),
            "host" => hosts += 1,
            _ => {}
        }
    }
    if hosts != 1 {
        return Err(format!("{hosts} hosts in {head:?}"));
    }
    let length = match length {
        None => 0,
        Some(length) => length.ok_or("a length that is no number")?,
    };
    bytes.drain(..end + 4);
    while bytes.len() < length {
        if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            return Err(format!("a body of {} bytes instead of {length}", bytes.len()));
        }
    }
    if bytes.len() > length {
        return Err(format!("more than the body: {:?}", &bytes[length..]));
    }
    let body = String::from_utf8_lossy(&bytes).into_owned();
    log.lock().unwrap().requests.push(format!("{method} {target} {body}").trim_end().to_owned());
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{target}", target.len());
    let _ = stream.write_all(answer.as_bytes()).await;
    match tokio::time::timeout(Duration::from_secs(5), stream.read_buf(&mut Vec::new())).await {
        Ok(Ok(n)) if n > 0 => Err(format!("{n} bytes after the request")),
        _ => Ok(()),
    }
}
