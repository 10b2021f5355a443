//! The frame of HTTP/1 requests, byte by byte: where a head ends, whether its lines are what RFC 9112 calls lines, and whether
//! chunks are chunks.
//!
//! pingora parses, but it forgives: a space in a target, a chunk size of no digits, a line feed without its carriage return.
//! What one parser forgives and another does not is how requests are smuggled past the first. So what comes is checked here
//! first, before pingora sees it. Pure: bytes in, a verdict out.

/// Why a request is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// How the body of a request is framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// By its length, or there is none.
    Length,
    /// In chunks.
    Chunks,
}

const BARE: Malformed = Malformed("a line ends with a bare line feed");

/// The end of a head in `bytes`: behind its empty line. `from`: where to begin, which is where the last look ended.
///
/// What can be no head is an error as soon as it can be told, not when time is up.
pub fn head_end(bytes: &[u8], from: usize) -> Result<Option<usize>, Malformed> {
    if !bytes.first().is_none_or(|b| is_token(*b)) {
        return Err(Malformed("the request does not begin with a method"));
    }
    // A line feed and what is before it may have come apart.
    let from = from.saturating_sub(3);
    for (at, _) in bytes.iter().enumerate().skip(from).filter(|(_, b)| **b == b'\n') {
        if at == 0 || bytes[at - 1] != b'\r' {
            return Err(BARE);
        }
        if bytes[..=at].ends_with(b"\r\n\r\n") {
            return Ok(Some(at + 1));
        }
    }
    Ok(None)
}

/// Checks a whole head, with its empty line, and says how its body is framed.
pub fn check_head(head: &[u8]) -> Result<Body, Malformed> {
    let lines = head.strip_suffix(b"\r\n").filter(|lines| lines.ends_with(b"\r\n")).ok_or(BARE)?;
    let mut lines = lines.split_inclusive(|b| *b == b'\n');
    let mut line = || {
        let line = lines.next()?.strip_suffix(b"\r\n").ok_or(BARE);
        Some(line.and_then(|line| {
            if line.iter().any(|b| matches!(b, b'\r' | 0)) {
                Err(Malformed("a carriage return or NUL inside a line"))
            } else {
                Ok(line)
            }
        }))
    };
    check_request_line(line().unwrap_or(Ok(b""))?)?;
    let (mut lengths, mut codings, mut chunked) = (0, 0, true);
    while let Some(line) = line() {
        let line = line?;
        let Some(colon) = line.iter().position(|b| *b == b':') else {
            return Err(Malformed("a field without a colon"));
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.is_empty() || !name.iter().all(|b| is_token(*b)) {
            return Err(Malformed("the name of a field is not a token"));
        }
        if value.iter().any(|b| (*b < b' ' && *b != b'\t') || *b == 0x7f) {
            return Err(Malformed("a control character in the value of a field"));
        }
        if name.eq_ignore_ascii_case(b"content-length") {
            lengths += 1;
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            codings += 1;
            chunked &= value.eq_ignore_ascii_case(b"chunked");
        }
    }
    if lengths > 0 && codings > 0 {
        return Err(Malformed("both Content-Length and Transfer-Encoding"));
    }
    if lengths > 1 || codings > 1 {
        return Err(Malformed("Content-Length or Transfer-Encoding twice"));
    }
    // Any other coding is refused further on, by a word of its own.
    Ok(if codings == 1 && chunked { Body::Chunks } else { Body::Length })
}

fn check_request_line(line: &[u8]) -> Result<(), Malformed> {
    let mut words = line.split(|b| *b == b' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Malformed("the request line has other than three words with one space between"));
    };
    if method.is_empty() || !method.iter().all(|b| is_token(*b)) {
        return Err(Malformed("the method is not a token"));
    }
    if target.is_empty() || target.iter().any(|b| *b <= b' ' || *b == 0x7f) {
        return Err(Malformed("a control character in the request target"));
    }
    if target.contains(&b'#') {
        return Err(Malformed("the request target has a fragment"));
    }
    if !matches!(version, b"HTTP/1.1" | b"HTTP/1.0") {
        return Err(Malformed("this version of HTTP is not spoken here"));
    }
    Ok(())
}

pub(crate) fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

/// Bytes of extensions and trailers that a body may have: nobody sends any.
const MOST_BESIDE: usize = 8 << 10;

/// Follows a body in chunks (RFC 9112, 7.1) to its end.
#[derive(Debug, Clone, Default)]
pub struct Chunks {
    state: State,
    /// Bytes of extensions and trailers so far.
    beside: usize,
}

#[derive(Debug, Clone, Copy, Default)]
enum State {
    /// Before the first digit of a size.
    #[default]
    Begin,
    /// Inside a size.
    Size(u64),
    /// Inside an extension of a chunk of this size.
    Extension(u64),
    /// Behind the carriage return of a chunk of this size.
    SizeEnd(u64),
    /// Inside a chunk that goes on for so many bytes.
    Data(u64),
    /// Behind a chunk's last byte.
    DataReturn,
    DataFeed,
    /// At the beginning of a trailer, or of the empty line.
    Trailer,
    InTrailer,
    TrailerFeed,
    LastFeed,
    Done,
}

impl Chunks {
    /// Takes bytes of the body, and gives how many of them belong to it: fewer than came when it has ended.
    pub fn push(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        let mut at = 0;
        while at < bytes.len() && !self.is_done() {
            if let State::Data(left) = self.state {
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - at);
                at += n;
                let left = left - n as u64;
                self.state = if left == 0 { State::DataReturn } else { State::Data(left) };
                continue;
            }
            self.state = self.step(bytes[at])?;
            at += 1;
        }
        Ok(at)
    }

    /// Whether the body has ended.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    fn step(&mut self, byte: u8) -> Result<State, Malformed> {
        let digit = (byte as char).to_digit(16).map(u64::from);
        Ok(match (self.state, byte) {
            (State::Begin, _) => State::Size(digit.ok_or(Malformed("a chunk size that is no hexadecimal number"))?),
            (State::Size(size) | State::Extension(size), b'\r') => State::SizeEnd(size),
            (State::Size(size), b';') => State::Extension(size),
            (State::Size(size), _) => {
                let digit = digit.ok_or(Malformed("a chunk size that is no hexadecimal number"))?;
                let size = size.checked_mul(16).and_then(|s| s.checked_add(digit));
                State::Size(size.ok_or(Malformed("a chunk size beyond all measure"))?)
            }
            (State::Extension(size), _) => {
                self.beside(byte)?;
                State::Extension(size)
            }
            (State::SizeEnd(0), b'\n') => State::Trailer,
            (State::SizeEnd(size), b'\n') => State::Data(size),
            (State::DataReturn, b'\r') => State::DataFeed,
            (State::DataFeed, b'\n') => State::Begin,
            (State::Trailer, b'\r') => State::LastFeed,
            (State::LastFeed, b'\n') => State::Done,
            (State::InTrailer, b'\r') => State::TrailerFeed,
            (State::TrailerFeed, b'\n') => State::Trailer,
            (State::Trailer | State::InTrailer, _) => {
                self.beside(byte)?;
                State::InTrailer
            }
            _ => return Err(Malformed("a chunk does not end as it should")),
        })
    }

    fn beside(&mut self, byte: u8) -> Result<(), Malformed> {
        self.beside += 1;
        if (byte < b' ' && byte != b'\t') || byte == 0x7f {
            return Err(Malformed("a control character beside the chunks"));
        }
        if self.beside > MOST_BESIDE { Err(Malformed("too much beside the chunks")) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_head_ends_with_its_empty_line_however_it_comes() {
        let text = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nbody\n";
        for cut in 0..text.len() {
            let (first, from) = (&text[..cut], cut);
            let found = head_end(first, 0).unwrap();
            assert_eq!(found, (cut >= 27).then_some(27), "{cut}");
            if found.is_none() {
                assert_eq!(head_end(text, from), Ok(Some(27)), "{cut}");
            }
        }
        assert_eq!(head_end(b"GET / HTTP/1.1\nHost", 0), Err(BARE));
        assert!(head_end(b"\x16\x03\x01", 0).is_err() && head_end(b" GET", 0).is_err());
    }

    #[test]
    fn framing_that_two_parsers_could_read_differently_is_refused() {
        for bad in [
            "GET / HTTP/1.1\nHost: a\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\ncontent-length: 1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n",
            "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\n Host: a\r\n\r\n",
            "\r\n\r\n",
        ] {
            assert!(check_head(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert_eq!(check_head(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"), Ok(Body::Length));
        assert_eq!(check_head(b"GET / HTTP/1.1\r\ntransfer-encoding: Chunked\r\n\r\n"), Ok(Body::Chunks));
    }

    #[test]
    fn chunks_end_where_they_end() {
        let text = b"3;a=b\r\nabc\r\n00A\r\n0123456789\r\n0\r\nA: b\r\n\r\nGET";
        let mut chunks = Chunks::default();
        assert_eq!(chunks.push(text), Ok(text.len() - 3));
        assert!(chunks.is_done());
        for bad in
            ["\r\n", " 3\r\n", "3 \r\n", "3\n", "3\r\nabcd", "3\r\nabc\n", "0\r\n\n", "3;a\nb", "10000000000000000\r\n"]
        {
            assert!(Chunks::default().push(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    proptest! {
        /// However a body is cut into reads, it ends at the same byte, and what was put in is what is in its chunks.
        #[test]
        fn a_body_ends_at_the_same_byte_however_it_is_cut(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..6),
            cuts in prop::collection::vec(1usize..20, 1..60),
        ) {
            let mut text = Vec::new();
            for part in &parts {
                text.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
                text.extend_from_slice(part);
                text.extend_from_slice(b"\r\n");
            }
            text.extend_from_slice(b"0\r\n\r\n");
            let end = text.len();
            text.extend_from_slice(b"GET / HTTP/1.1\r\n");
            let (mut chunks, mut at, mut cuts) = (Chunks::default(), 0, cuts.into_iter().cycle());
            while !chunks.is_done() {
                let next = (at + cuts.next().unwrap_or(1)).min(text.len());
                at += chunks.push(&text[at..next]).unwrap();
            }
            prop_assert_eq!(at, end);
        }

        #[test]
        fn nothing_makes_the_checks_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), from in 0usize..300) {
            let _ = (head_end(&bytes, from), check_head(&bytes), Chunks::default().push(&bytes));
        }
    }
}
