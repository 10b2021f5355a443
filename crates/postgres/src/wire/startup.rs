//! What a client says first: startup, TLS request, GSS encryption request, cancel.

use std::collections::BTreeMap;

use super::cstr;

/// PostgreSQL's own bound (`MAX_STARTUP_PACKET_LENGTH`).
const MAX_STARTUP: usize = 10_000;
const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;

/// A packet without a type byte, sent before anything else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Startup {
    /// The client wants TLS.
    Ssl,
    /// The client wants GSSAPI encryption.
    GssEnc,
    /// Cancel what another connection is doing.
    Cancel(CancelKey),
    /// The session begins.
    Session(StartupParameters),
}

/// The key of a connection whose query is to be cancelled.
#[derive(Clone, PartialEq, Eq)]
pub struct CancelKey {
    /// The process id that BackendKeyData gave.
    pub pid: u32,
    /// The secret that BackendKeyData gave: 4 to 256 bytes.
    pub secret: Vec<u8>,
}

impl std::fmt::Debug for CancelKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelKey").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// The parameters of a session.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StartupParameters {
    /// The minor version asked for: 3.`minor`.
    pub minor: u16,
    /// The role.
    pub user: String,
    /// The database; the role's name when the client gave none.
    pub database: String,
    /// `replication`, when given.
    pub replication: Option<String>,
    /// Everything else: settings for the session, and `options`.
    pub settings: BTreeMap<String, String>,
    /// Protocol options (`_pq_.…`) that the gateway does not know and negotiates away.
    pub protocol_options: Vec<String>,
}

/// A first packet that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartupError {
    /// The length is outside 8 to 10,000 bytes.
    #[error("invalid length of startup packet")]
    Length,
    /// The major version is not 3.
    #[error("unsupported frontend protocol {major}.{minor}: server supports 3.0")]
    Version {
        /// Major version.
        major: u16,
        /// Minor version.
        minor: u16,
    },
    /// Names and values do not alternate, or the final NUL is missing.
    #[error("invalid startup packet layout: expected terminator as last byte")]
    Layout,
    /// A name or value is not UTF-8.
    #[error("startup parameters must be UTF-8")]
    Encoding,
    /// No `user`.
    #[error("no PostgreSQL user name specified in startup packet")]
    NoUser,
    /// A cancel key outside 4 to 256 bytes.
    #[error("invalid cancel key")]
    CancelKey,
}

/// The first packet at the front of `bytes` and how long it is; `None` when it is not complete yet.
pub fn startup(bytes: &[u8]) -> Result<Option<(Startup, usize)>, StartupError> {
    let Some(length) = bytes.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if !(8..=MAX_STARTUP).contains(&length) {
        return Err(StartupError::Length);
    }
    let Some(packet) = bytes.get(4..length) else { return Ok(None) };
    let Some((code, body)) = packet.split_first_chunk::<4>() else { return Err(StartupError::Length) };
    let parsed = match u32::from_be_bytes(*code) {
        SSL_REQUEST if body.is_empty() => Startup::Ssl,
        GSSENC_REQUEST if body.is_empty() => Startup::GssEnc,
        SSL_REQUEST | GSSENC_REQUEST => return Err(StartupError::Length),
        CANCEL_REQUEST => {
            let Some((pid, secret)) = body.split_first_chunk::<4>() else { return Err(StartupError::CancelKey) };
            if !(4..=256).contains(&secret.len()) {
                return Err(StartupError::CancelKey);
            }
            Startup::Cancel(CancelKey { pid: u32::from_be_bytes(*pid), secret: secret.to_vec() })
        }
        version => {
            let (major, minor) = ((version >> 16) as u16, (version & 0xffff) as u16);
            if major != 3 {
                return Err(StartupError::Version { major, minor });
            }
            Startup::Session(parameters(minor, body)?)
        }
    };
    Ok(Some((parsed, length)))
}

fn parameters(minor: u16, mut rest: &[u8]) -> Result<StartupParameters, StartupError> {
    let mut out = StartupParameters { minor, ..StartupParameters::default() };
    let mut database = None;
    loop {
        let (name, after) = cstr(rest).ok_or(StartupError::Layout)?;
        if name.is_empty() {
            if !after.is_empty() {
                return Err(StartupError::Layout);
            }
            break;
        }
        let (value, after) = cstr(after).ok_or(StartupError::Layout)?;
        rest = after;
        let text = |b: &[u8]| std::str::from_utf8(b).map(str::to_owned).map_err(|_| StartupError::Encoding);
        let (name, value) = (text(name)?, text(value)?);
        match name.as_str() {
            "user" => out.user = value,
            "database" => database = Some(value),
            "replication" => out.replication = Some(value),
            _ if name.starts_with("_pq_.") => out.protocol_options.push(name),
            _ => {
                out.settings.insert(name, value);
            }
        }
    }
    if out.user.is_empty() {
        return Err(StartupError::NoUser);
    }
    out.database = database.filter(|d| !d.is_empty()).unwrap_or_else(|| out.user.clone());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(code: u32, body: &[u8]) -> Vec<u8> {
        let mut out = ((8 + body.len()) as u32).to_be_bytes().to_vec();
        out.extend(code.to_be_bytes());
        out.extend(body);
        out
    }

    #[test]
    fn a_session_names_its_user_and_the_database_defaults_to_it() {
        let bytes = packet(196_608, b"user\0odoo\0application_name\0odoo-1\0\0");
        let Ok(Some((Startup::Session(p), n))) = startup(&bytes) else { panic!() };
        assert_eq!((n, p.user.as_str(), p.database.as_str()), (bytes.len(), "odoo", "odoo"));
        assert_eq!(p.settings["application_name"], "odoo-1");
    }

    /// Rule 3: newer minor versions and `_pq_.` options are negotiated down, never refused.
    #[test]
    fn a_newer_minor_version_and_unknown_protocol_options_are_accepted() {
        let bytes = packet(196_610, b"user\0a\0_pq_.cmp\x001\0\0");
        let Ok(Some((Startup::Session(p), _))) = startup(&bytes) else { panic!() };
        assert_eq!((p.minor, p.protocol_options), (2, vec!["_pq_.cmp".to_owned()]));
    }

    /// Rules 1 and 3: lengths are bounded, cancel keys have 4 to 256 bytes.
    #[test]
    fn lengths_are_bounded_before_anything_is_read() {
        assert_eq!(startup(&[0, 0, 0, 7]), Err(StartupError::Length));
        assert_eq!(startup(&[0x7f, 0xff, 0xff, 0xff]), Err(StartupError::Length));
        assert_eq!(startup(&packet(CANCEL_REQUEST, &[0; 7])), Err(StartupError::CancelKey));
        assert_eq!(startup(&packet(CANCEL_REQUEST, &[0; 261])), Err(StartupError::CancelKey));
        assert!(matches!(startup(&packet(CANCEL_REQUEST, &[0; 260])), Ok(Some((Startup::Cancel(_), _)))));
        assert_eq!(startup(&packet(131_072, b"")), Err(StartupError::Version { major: 2, minor: 0 }));
        assert_eq!(startup(&packet(196_608, b"user\0a\0")), Err(StartupError::Layout));
        assert_eq!(startup(&packet(196_608, b"\0")), Err(StartupError::NoUser));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), fix in any::<bool>()) {
            if fix && bytes.len() >= 8 {
                let n = bytes.len() as u32;
                bytes[..4].copy_from_slice(&n.to_be_bytes());
                bytes[4..8].copy_from_slice(&196_608u32.to_be_bytes());
            }
            let _ = startup(&bytes);
        }
    }
}
