//! The messages that the gateway says itself, to clients and to servers.

use bytes::{BufMut, BytesMut};

/// How bad an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The statement failed.
    Error,
    /// The connection ends.
    Fatal,
}

/// The transaction status of ReadyForQuery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransactionStatus {
    /// No transaction.
    Idle,
    /// Inside a transaction.
    Open,
    /// Inside a transaction that has failed.
    Failed,
}

impl TransactionStatus {
    /// From the byte in ReadyForQuery.
    pub fn from_byte(b: u8) -> Option<Self> {
        match b {
            b'I' => Some(Self::Idle),
            b'T' => Some(Self::Open),
            b'E' => Some(Self::Failed),
            _ => None,
        }
    }

    fn byte(self) -> u8 {
        match self {
            Self::Idle => b'I',
            Self::Open => b'T',
            Self::Failed => b'E',
        }
    }
}

/// Writes messages into a buffer.
pub trait Reply {
    /// A message with a body that `body` writes.
    fn message(&mut self, kind: u8, body: impl FnOnce(&mut BytesMut));
    /// A packet without a type byte, as used before authentication.
    fn packet(&mut self, code: u32, body: impl FnOnce(&mut BytesMut));

    /// ErrorResponse.
    fn error(&mut self, severity: Severity, code: &str, message: &str, detail: Option<&str>);
    /// NoticeResponse.
    fn notice(&mut self, message: &str);
    /// ReadyForQuery.
    fn ready(&mut self, status: TransactionStatus);
    /// CommandComplete.
    fn complete(&mut self, tag: &str);
    /// ParameterStatus.
    fn parameter(&mut self, name: &str, value: &str);
    /// Query.
    fn query(&mut self, sql: &str);
    /// An authentication request with a code and its data.
    fn authentication(&mut self, code: u32, data: &[u8]);
}

impl Reply for BytesMut {
    fn message(&mut self, kind: u8, body: impl FnOnce(&mut BytesMut)) {
        self.put_u8(kind);
        let at = self.len();
        self.put_u32(0);
        body(self);
        let length = (self.len() - at) as u32;
        self[at..at + 4].copy_from_slice(&length.to_be_bytes());
    }

    fn packet(&mut self, code: u32, body: impl FnOnce(&mut BytesMut)) {
        let at = self.len();
        self.put_u32(0);
        self.put_u32(code);
        body(self);
        let length = (self.len() - at) as u32;
        self[at..at + 4].copy_from_slice(&length.to_be_bytes());
    }

    fn error(&mut self, severity: Severity, code: &str, message: &str, detail: Option<&str>) {
        let severity = match severity {
            Severity::Error => "ERROR",
            Severity::Fatal => "FATAL",
        };
        let mut fields: Vec<(u8, &str)> = vec![(b'S', severity), (b'V', severity), (b'C', code), (b'M', message)];
        fields.extend(detail.map(|d| (b'D', d)));
        self.message(b'E', |b| {
            for (field, text) in fields {
                b.put_u8(field);
                put_cstr(b, text);
            }
            b.put_u8(0);
        });
    }

    fn notice(&mut self, message: &str) {
        self.message(b'N', |b| {
            for (field, text) in [(b'S', "NOTICE"), (b'V', "NOTICE"), (b'C', "00000"), (b'M', message)] {
                b.put_u8(field);
                put_cstr(b, text);
            }
            b.put_u8(0);
        });
    }

    fn ready(&mut self, status: TransactionStatus) {
        self.message(b'Z', |b| b.put_u8(status.byte()));
    }

    fn complete(&mut self, tag: &str) {
        self.message(b'C', |b| put_cstr(b, tag));
    }

    fn parameter(&mut self, name: &str, value: &str) {
        self.message(b'S', |b| {
            put_cstr(b, name);
            put_cstr(b, value);
        });
    }

    fn query(&mut self, sql: &str) {
        self.message(b'Q', |b| put_cstr(b, sql));
    }

    fn authentication(&mut self, code: u32, data: &[u8]) {
        self.message(b'R', |b| {
            b.put_u32(code);
            b.put_slice(data);
        });
    }
}

/// A string and its NUL; a NUL inside the string ends it early instead of breaking the frame.
pub(crate) fn put_cstr(b: &mut BytesMut, text: &str) {
    let bytes = text.as_bytes();
    let end = bytes.iter().position(|c| *c == 0).unwrap_or(bytes.len());
    b.put_slice(&bytes[..end]);
    b.put_u8(0);
}
