//! The server's side of SCRAM-SHA-256 (RFC 5802, RFC 7677), as PostgreSQL speaks it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::hmac;

const ITERATIONS: u32 = 4096;
/// A client nonce longer than this is not one (rule 1).
const MAX_NONCE: usize = 256;

/// What is kept of a password: enough to check a proof, not enough to make one.
#[derive(Clone)]
pub struct ScramKeys {
    salt: [u8; 16],
    stored: [u8; 32],
    server: [u8; 32],
    /// False for a user that does not exist: the exchange runs to its end and fails.
    possible: bool,
}

impl std::fmt::Debug for ScramKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ScramKeys(…)")
    }
}

impl ScramKeys {
    /// Derives the keys from a password. Takes about a millisecond, on purpose.
    pub fn derive(password: &str, salt: &[u8; 16]) -> Self {
        let prepared = stringprep::saslprep(password).unwrap_or(password.into());
        let mut salted = [0; 32];
        pbkdf2::pbkdf2_hmac::<Sha256>(prepared.as_bytes(), salt, ITERATIONS, &mut salted);
        let client = hmac(&salted, b"Client Key");
        Self {
            salt: *salt,
            stored: Sha256::digest(client).into(),
            server: hmac(&salted, b"Server Key"),
            possible: true,
        }
    }

    pub(crate) fn impossible(salt: [u8; 16]) -> Self {
        Self { salt, stored: [0; 32], server: [0; 32], possible: false }
    }
}

/// Why an exchange ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// A message that is not SCRAM.
    #[error("malformed SCRAM message")]
    Malformed,
    /// The client demands channel binding, or says that we did not offer what we offered.
    #[error("SCRAM channel binding negotiation error")]
    ChannelBinding,
    /// The proof is wrong, or there is no such user.
    #[error("password authentication failed")]
    WrongProof,
}

/// One exchange: the first message in, the challenge out, the proof in, the server's signature out.
#[derive(Debug)]
pub struct ScramServer<'a> {
    keys: &'a ScramKeys,
    gs2_header: String,
    nonce: String,
    /// client-first-bare , server-first , — to which the client's final message without its proof is added.
    transcript: String,
    challenge: String,
}

impl<'a> ScramServer<'a> {
    /// Takes the client's first message. `nonce` is fresh randomness of ours, printable.
    pub fn begin(keys: &'a ScramKeys, first: &[u8], nonce: &str) -> Result<Self, ScramError> {
        let first = std::str::from_utf8(first).map_err(|_| ScramError::Malformed)?;
        // gs2-cbind-flag "," [authzid] "," then the bare message. Without TLS binding offered, `y` is honest.
        let mut parts = first.splitn(3, ',');
        let (Some(flag), Some(authzid), Some(bare)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(ScramError::Malformed);
        };
        match flag {
            "n" | "y" => {}
            _ if flag.starts_with("p=") => return Err(ScramError::ChannelBinding),
            _ => return Err(ScramError::Malformed),
        }
        if !authzid.is_empty() {
            return Err(ScramError::Malformed);
        }
        let mut attributes = bare.split(',');
        // PostgreSQL takes the name from the startup packet and ignores this one.
        if !attributes.next().is_some_and(|n| n.starts_with("n=")) {
            return Err(ScramError::Malformed);
        }
        let client_nonce = attributes.next().and_then(|r| r.strip_prefix("r=")).ok_or(ScramError::Malformed)?;
        let printable = |b: u8| (0x21..=0x7e).contains(&b) && b != b',';
        if client_nonce.is_empty() || client_nonce.len() > MAX_NONCE || !client_nonce.bytes().all(printable) {
            return Err(ScramError::Malformed);
        }
        let nonce = format!("{client_nonce}{nonce}");
        let challenge = format!("r={nonce},s={},i={ITERATIONS}", BASE64.encode(keys.salt));
        let transcript = format!("{bare},{challenge},");
        Ok(Self { keys, gs2_header: format!("{flag},{authzid},"), nonce, transcript, challenge })
    }

    /// The server's first message.
    pub fn challenge(&self) -> &str {
        &self.challenge
    }

    /// Takes the client's final message and gives the server's.
    pub fn finish(self, last: &[u8]) -> Result<String, ScramError> {
        let last = std::str::from_utf8(last).map_err(|_| ScramError::Malformed)?;
        let (without_proof, proof) = last.rsplit_once(",p=").ok_or(ScramError::Malformed)?;
        let mut attributes = without_proof.split(',');
        let binding = attributes.next().and_then(|c| c.strip_prefix("c=")).ok_or(ScramError::Malformed)?;
        let nonce = attributes.next().and_then(|r| r.strip_prefix("r=")).ok_or(ScramError::Malformed)?;
        if binding != BASE64.encode(&self.gs2_header) {
            return Err(ScramError::ChannelBinding);
        }
        if nonce != self.nonce {
            return Err(ScramError::Malformed);
        }
        let proof: [u8; 32] = BASE64.decode(proof).ok().and_then(|p| p.try_into().ok()).ok_or(ScramError::Malformed)?;
        let transcript = format!("{}{without_proof}", self.transcript);
        let mut client_key = hmac(&self.keys.stored, transcript.as_bytes());
        for (k, p) in client_key.iter_mut().zip(proof) {
            *k ^= p;
        }
        let stored: [u8; 32] = Sha256::digest(client_key).into();
        let right = bool::from(stored.ct_eq(&self.keys.stored)) & self.keys.possible;
        if !right {
            return Err(ScramError::WrongProof);
        }
        Ok(format!("v={}", BASE64.encode(hmac(&self.keys.server, transcript.as_bytes()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
    use proptest::prelude::*;

    fn login(real: &str, tried: &str) -> Result<(), ScramError> {
        let keys = ScramKeys::derive(real, &[7; 16]);
        let mut client = ScramSha256::new(tried.as_bytes(), ChannelBinding::unsupported());
        let server = ScramServer::begin(&keys, client.message(), "servernonce")?;
        client.update(server.challenge().as_bytes()).unwrap();
        let last = server.finish(client.message())?;
        client.finish(last.as_bytes()).unwrap();
        Ok(())
    }

    #[test]
    fn an_independent_client_gets_in_with_the_right_password_and_only_with_it() {
        assert_eq!(login("geheim", "geheim"), Ok(()));
        assert_eq!(login("Iñtërnâtiônàl", "Iñtërnâtiônàl"), Ok(()));
        assert_eq!(login("geheim", "Geheim"), Err(ScramError::WrongProof));
        assert_eq!(login("geheim", ""), Err(ScramError::WrongProof));
    }

    /// Rule 19: for an unknown user the exchange runs to the same end as for a wrong password.
    #[test]
    fn the_mock_exchange_looks_like_a_wrong_password_with_a_stable_salt() {
        let verifiers = super::super::Verifiers::new().unwrap();
        let (first, again) = (verifiers.mock("nobody"), verifiers.mock("nobody"));
        assert_eq!(first.salt, again.salt);
        assert_ne!(first.salt, verifiers.mock("somebody").salt);
        let mut client = ScramSha256::new(b"x", ChannelBinding::unsupported());
        let server = ScramServer::begin(&first, client.message(), "n").unwrap();
        client.update(server.challenge().as_bytes()).unwrap();
        assert_eq!(server.finish(client.message()), Err(ScramError::WrongProof));
    }

    #[test]
    fn binding_that_was_not_offered_and_endless_nonces_are_refused() {
        let keys = ScramKeys::derive("x", &[0; 16]);
        let begin = |m: &str| ScramServer::begin(&keys, m.as_bytes(), "n").err();
        assert_eq!(begin("p=tls-server-end-point,,n=,r=abc"), Some(ScramError::ChannelBinding));
        assert_eq!(begin(&format!("n,,n=,r={}", "a".repeat(300))), Some(ScramError::Malformed));
        assert_eq!(begin("n,a=x,n=,r=abc"), Some(ScramError::Malformed));
        assert_eq!(begin("n,,r=abc"), Some(ScramError::Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_exchange_panic(first in ".{0,60}", last in ".{0,80}") {
            let keys = ScramKeys::impossible([0; 16]);
            if let Ok(server) = ScramServer::begin(&keys, first.as_bytes(), "n") {
                let _ = server.finish(last.as_bytes());
            }
            if let Ok(server) = ScramServer::begin(&keys, b"n,,n=,r=abc", "n") {
                prop_assert!(server.finish(last.as_bytes()).is_err());
            }
        }
    }
}
