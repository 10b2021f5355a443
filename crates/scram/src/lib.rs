//! Both sides of SCRAM-SHA-256 and SCRAM-SHA-256-PLUS (RFC 5802, RFC 7677), as PostgreSQL speaks them.
//!
//! The client's side is our own because it has to work with keys instead of a password: what a client of ours proves is
//! enough to log in to the server in its name (rule 17). And what a password is turned into can be kept: that takes
//! milliseconds of a processor, each time that somebody connects. Without I/O.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroize;

/// The mechanism without channel binding.
pub const SCRAM: &str = "SCRAM-SHA-256";
/// The mechanism with channel binding.
pub const SCRAM_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// What the channel is bound to: the hash of the server's certificate.
const BINDING: &str = "p=tls-server-end-point";
const ITERATIONS: u32 = 4096;
/// A server that asks for more work than this wants to waste our time.
const MAX_ITERATIONS: u32 = 1_000_000;
/// A client nonce longer than this is not one (rule 1).
const MAX_NONCE: usize = 256;

/// What is kept of a password: enough to check a proof, not enough to make one.
#[derive(Clone)]
pub struct ScramKeys {
    salt: Vec<u8>,
    iterations: u32,
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
    pub fn derive(password: &str, salt: &[u8]) -> Self {
        let keys = ClientKeys::derive(password, salt, ITERATIONS);
        Self {
            salt: salt.to_vec(),
            iterations: ITERATIONS,
            stored: Sha256::digest(keys.client).into(),
            server: keys.server,
            possible: true,
        }
    }

    /// Reads what PostgreSQL stores: `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
    pub fn parse(stored: &str) -> Option<Self> {
        let (first, keys) = stored.strip_prefix(SCRAM)?.strip_prefix('$')?.split_once('$')?;
        let (iterations, salt) = first.split_once(':')?;
        let (stored, server) = keys.split_once(':')?;
        let key = |text: &str| -> Option<[u8; 32]> { BASE64.decode(text).ok()?.try_into().ok() };
        Some(Self {
            salt: BASE64.decode(salt).ok()?,
            iterations: iterations.parse().ok().filter(|n| (1..=MAX_ITERATIONS).contains(n))?,
            stored: key(stored)?,
            server: key(server)?,
            possible: true,
        })
    }

    /// Keys that no password opens.
    pub fn impossible(salt: &[u8]) -> Self {
        Self { salt: salt.to_vec(), iterations: ITERATIONS, stored: [0; 32], server: [0; 32], possible: false }
    }
}

/// What it takes to prove knowledge of a password without the password. Wiped when dropped, never shown.
#[derive(Clone)]
pub struct ClientKeys {
    client: [u8; 32],
    server: [u8; 32],
    /// What they were made for: another salt has other keys.
    salt: Vec<u8>,
    iterations: u32,
}

impl Drop for ClientKeys {
    fn drop(&mut self) {
        self.client.zeroize();
        self.server.zeroize();
    }
}

impl std::fmt::Debug for ClientKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientKeys(…)")
    }
}

impl ClientKeys {
    fn derive(password: &str, salt: &[u8], iterations: u32) -> Self {
        let prepared = stringprep::saslprep(password).unwrap_or(password.into());
        let mut salted = [0; 32];
        pbkdf2::pbkdf2_hmac::<Sha256>(prepared.as_bytes(), salt, iterations, &mut salted);
        Self {
            client: hmac(&salted, b"Client Key"),
            server: hmac(&salted, b"Server Key"),
            salt: salt.to_vec(),
            iterations,
        }
    }
}

/// Turns passwords into keys, and keeps what it has made: a password, its salt and its rounds always make the same.
///
/// Kept are keys, and of passwords a hash together with the salt; a server's salt changes when the password does.
#[derive(Default)]
pub struct Derived(Mutex<HashMap<[u8; 32], Arc<ClientKeys>>>);

/// Keys that are not asked for any more are forgotten by starting over when there are this many.
const MAX_DERIVED: usize = 20_000;

impl std::fmt::Debug for Derived {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Derived(…)")
    }
}

impl Derived {
    fn keys(&self, password: &str, salt: &[u8], iterations: u32) -> Arc<ClientKeys> {
        let mut name = Sha256::new();
        name.update((salt.len() as u64).to_be_bytes());
        name.update(salt);
        name.update(iterations.to_be_bytes());
        name.update(password);
        let name = name.finalize().into();
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(keys) = kept().get(&name) {
            return Arc::clone(keys);
        }
        let keys = Arc::new(ClientKeys::derive(password, salt, iterations));
        let mut kept = kept();
        if kept.len() >= MAX_DERIVED {
            kept.clear();
        }
        Arc::clone(kept.entry(name).or_insert(keys))
    }
}

/// Fresh randomness, printable: a nonce.
pub fn nonce() -> Result<String, getrandom::Error> {
    let mut random = [0; 18];
    getrandom::fill(&mut random)?;
    Ok(BASE64.encode(random))
}

/// A salt that is the same for a name each time, and that tells whoever does not know the secret nothing of it (rule 19).
pub fn salt_of(name: &str, secret: &[u8; 32]) -> [u8; 16] {
    let digest = hmac(secret, name.as_bytes());
    let mut salt = [0; 16];
    salt.copy_from_slice(&digest[..16]);
    salt
}

fn hmac(key: &[u8], data: &[u8]) -> [u8; 32] {
    // HMAC takes keys of any length; the error type exists for MACs that do not.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return [0; 32] };
    mac.update(data);
    mac.finalize().into_bytes().into()
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
    /// The server does not know the password either, or wants something unreasonable.
    #[error("the server's side of the SCRAM exchange is wrong")]
    WrongServer,
}

/// One exchange: the first message in, the challenge out, the proof in, the server's signature out.
#[derive(Debug)]
pub struct ScramServer<'a> {
    keys: &'a ScramKeys,
    /// What the client's final message has to repeat: its header, and the hash of our certificate with binding.
    bound: Vec<u8>,
    nonce: String,
    /// client-first-bare , server-first , — to which the client's final message without its proof is added.
    transcript: String,
    challenge: String,
}

impl<'a> ScramServer<'a> {
    /// Takes the client's first message. `nonce` is fresh randomness of ours, printable; `offered` the hash of our
    /// certificate when binding was offered, and `plus` whether the client chose it.
    pub fn begin(
        keys: &'a ScramKeys,
        first: &[u8],
        nonce: &str,
        offered: Option<&[u8]>,
        plus: bool,
    ) -> Result<Self, ScramError> {
        let first = std::str::from_utf8(first).map_err(|_| ScramError::Malformed)?;
        // gs2-cbind-flag "," [authzid] "," then the bare message.
        let mut parts = first.splitn(3, ',');
        let (Some(flag), Some(authzid), Some(bare)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(ScramError::Malformed);
        };
        let mut bound = format!("{flag},{authzid},").into_bytes();
        match (flag, plus, offered) {
            (BINDING, true, Some(hash)) => bound.extend_from_slice(hash),
            // `y`: the client could bind and believes that we cannot. Honest only when we have not offered (rule 18).
            ("n", false, _) | ("y", false, None) => {}
            ("n" | "y", ..) => return Err(ScramError::ChannelBinding),
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
        let challenge = format!("r={nonce},s={},i={}", BASE64.encode(&keys.salt), keys.iterations);
        let transcript = format!("{bare},{challenge},");
        Ok(Self { keys, bound, nonce, transcript, challenge })
    }

    /// The server's first message.
    pub fn challenge(&self) -> &str {
        &self.challenge
    }

    /// Takes the client's final message and gives the server's, with the keys that the client has shown to have.
    pub fn finish(self, last: &[u8]) -> Result<(String, ClientKeys), ScramError> {
        let last = std::str::from_utf8(last).map_err(|_| ScramError::Malformed)?;
        let (without_proof, proof) = last.rsplit_once(",p=").ok_or(ScramError::Malformed)?;
        let mut attributes = without_proof.split(',');
        let binding = attributes.next().and_then(|c| c.strip_prefix("c=")).ok_or(ScramError::Malformed)?;
        let nonce = attributes.next().and_then(|r| r.strip_prefix("r=")).ok_or(ScramError::Malformed)?;
        if binding != BASE64.encode(&self.bound) {
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
        let signature = format!("v={}", BASE64.encode(hmac(&self.keys.server, transcript.as_bytes())));
        let (salt, iterations) = (self.keys.salt.clone(), self.keys.iterations);
        Ok((signature, ClientKeys { client: client_key, server: self.keys.server, salt, iterations }))
    }
}

/// What a client of SCRAM knows. Never shown.
#[derive(Clone, Copy)]
pub enum Knows<'a> {
    /// The password, and what remembers its keys.
    Password(&'a str, &'a Derived),
    /// The keys that somebody has proved to have.
    Keys(&'a ClientKeys),
}

impl std::fmt::Debug for Knows<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Knows(…)")
    }
}

/// The client's side: the first message out, the challenge in, the proof out, the server's signature in.
#[derive(Debug)]
pub struct ScramClient {
    header: &'static str,
    bound: Vec<u8>,
    bare: String,
    nonce: String,
    /// What the server has to answer, once it has been asked.
    expected: Option<[u8; 32]>,
}

impl ScramClient {
    /// `nonce` is fresh randomness, printable; `binding` the hash of the server's certificate, to be bound to it;
    /// `can_bind` says that it would be bound if the server had offered it.
    pub fn new(nonce: &str, binding: Option<&[u8]>, can_bind: bool) -> Self {
        let header = match (binding, can_bind) {
            (Some(_), _) => BINDING,
            // A server that has offered it notices that somebody in between has kept the offer back.
            (None, true) => "y",
            (None, false) => "n",
        };
        let mut bound = format!("{header},,").into_bytes();
        bound.extend_from_slice(binding.unwrap_or_default());
        Self { header, bound, bare: format!("n=,r={nonce}"), nonce: nonce.to_owned(), expected: None }
    }

    /// The first message.
    pub fn first(&self) -> String {
        format!("{},,{}", self.header, self.bare)
    }

    /// Takes the server's challenge and gives the proof.
    pub fn prove(&mut self, knows: Knows<'_>, challenge: &[u8]) -> Result<String, ScramError> {
        let challenge = std::str::from_utf8(challenge).map_err(|_| ScramError::Malformed)?;
        let mut attributes = challenge.split(',');
        let mut attribute = |name: &str| attributes.next()?.strip_prefix(name);
        let nonce = attribute("r=").filter(|n| n.starts_with(&self.nonce)).ok_or(ScramError::Malformed)?;
        let salt = attribute("s=").and_then(|s| BASE64.decode(s).ok()).ok_or(ScramError::Malformed)?;
        let iterations: u32 = attribute("i=").and_then(|i| i.parse().ok()).ok_or(ScramError::Malformed)?;
        if !(1..=MAX_ITERATIONS).contains(&iterations) {
            return Err(ScramError::WrongServer);
        }
        let derived;
        let keys = match knows {
            Knows::Password(password, keys) => {
                derived = keys.keys(password, &salt, iterations);
                &derived
            }
            // Keys for another salt would be a wrong proof that the server would count as a wrong password.
            Knows::Keys(keys) if keys.salt != salt || keys.iterations != iterations => {
                return Err(ScramError::WrongProof);
            }
            Knows::Keys(keys) => keys,
        };
        let without_proof = format!("c={},r={nonce}", BASE64.encode(&self.bound));
        let transcript = format!("{},{challenge},{without_proof}", self.bare);
        let stored: [u8; 32] = Sha256::digest(keys.client).into();
        let mut proof = hmac(&stored, transcript.as_bytes());
        for (p, k) in proof.iter_mut().zip(keys.client) {
            *p ^= k;
        }
        self.expected = Some(hmac(&keys.server, transcript.as_bytes()));
        Ok(format!("{without_proof},p={}", BASE64.encode(proof)))
    }

    /// Checks that the server knows the password too.
    pub fn finish(self, last: &[u8]) -> Result<(), ScramError> {
        let signature = last.strip_prefix(b"v=").and_then(|v| BASE64.decode(v).ok()).ok_or(ScramError::Malformed)?;
        let expected = self.expected.ok_or(ScramError::Malformed)?;
        if bool::from(signature.ct_eq(&expected)) { Ok(()) } else { Err(ScramError::WrongServer) }
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
        let server = ScramServer::begin(&keys, client.message(), "servernonce", None, false)?;
        client.update(server.challenge().as_bytes()).unwrap();
        let (last, _) = server.finish(client.message())?;
        client.finish(last.as_bytes()).unwrap();
        Ok(())
    }

    /// Our own client, with whatever it knows, against our own server.
    fn prove(
        knows: Knows<'_>,
        keys: &ScramKeys,
        binding: Option<&[u8]>,
        ours: Option<&[u8]>,
    ) -> Result<ClientKeys, ScramError> {
        let mut client = ScramClient::new("clientnonce", binding, binding.is_some());
        let server = ScramServer::begin(keys, client.first().as_bytes(), "servernonce", ours, binding.is_some())?;
        let proof = client.prove(knows, server.challenge().as_bytes())?;
        let (last, keys) = server.finish(proof.as_bytes())?;
        client.finish(last.as_bytes())?;
        Ok(keys)
    }

    #[test]
    fn keys_are_derived_once_and_those_of_another_password_or_salt_are_others() {
        let derived = Derived::default();
        let keys = derived.keys("geheim", b"salt", 4096);
        assert!(Arc::ptr_eq(&keys, &derived.keys("geheim", b"salt", 4096)));
        for (password, salt, iterations) in
            [("geheim", b"tals", 4096), ("Geheim", b"salt", 4096), ("geheim", b"salt", 4097)]
        {
            let other = derived.keys(password, salt, iterations);
            assert_ne!(other.client, keys.client);
            assert_eq!(other.client, ClientKeys::derive(password, salt, iterations).client);
        }
        assert_eq!(format!("{derived:?}"), "Derived(…)");
    }

    /// Rule 17.
    #[test]
    fn what_a_client_has_proved_is_enough_to_log_in_for_it_and_only_where_it_could() {
        let here = ScramKeys::derive("geheim", &[7; 16]);
        let shown = prove(Knows::Password("geheim", &Derived::default()), &here, None, None).unwrap();
        assert!(prove(Knows::Keys(&shown), &here, None, None).is_ok());
        let elsewhere = ScramKeys::derive("geheim", &[8; 16]);
        assert_eq!(prove(Knows::Keys(&shown), &elsewhere, None, None).err(), Some(ScramError::WrongProof));
        assert_eq!(format!("{shown:?}"), "ClientKeys(…)");
    }

    #[test]
    fn what_postgresql_stores_is_read_back() {
        let keys = ScramKeys::derive("geheim", &[7; 16]);
        let text = |b: &[u8]| BASE64.encode(b);
        let stored = format!("SCRAM-SHA-256$4096:{}${}:{}", text(&keys.salt), text(&keys.stored), text(&keys.server));
        let read = ScramKeys::parse(&stored).unwrap();
        assert!(prove(Knows::Password("geheim", &Derived::default()), &read, None, None).is_ok());
        for bad in ["", "md5abc", "SCRAM-SHA-256$x:AA==$AA==:AA==", "SCRAM-SHA-256$4096:AA==$AA==:AA=="] {
            assert!(ScramKeys::parse(bad).is_none(), "{bad}");
        }
    }

    /// Rule 18.
    #[test]
    fn a_channel_is_bound_to_our_certificate_and_a_downgrade_is_noticed() {
        let keys = ScramKeys::derive("geheim", &[7; 16]);
        let derived = Derived::default();
        let knows = Knows::Password("geheim", &derived);
        assert!(prove(knows, &keys, Some(b"hash"), Some(b"hash")).is_ok());
        let between = prove(knows, &keys, Some(b"of whoever sits between"), Some(b"hash"));
        assert_eq!(between.err(), Some(ScramError::ChannelBinding));
        let begin = |m: &str, plus| ScramServer::begin(&keys, m.as_bytes(), "n", Some(b"hash"), plus).err();
        assert_eq!(begin("y,,n=,r=abc", false), Some(ScramError::ChannelBinding));
        assert_eq!(begin("n,,n=,r=abc", true), Some(ScramError::ChannelBinding));
        assert_eq!(begin("p=tls-unique,,n=,r=abc", true), Some(ScramError::ChannelBinding));
        assert_eq!(begin("n,,n=,r=abc", false), None);
        // Our own client says `y` to a server that seems not to offer it.
        assert_eq!(ScramClient::new("n", None, true).first(), "y,,n=,r=n");
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
        let mock = |name| ScramKeys::impossible(&salt_of(name, &[9; 32]));
        let (first, again) = (mock("nobody"), mock("nobody"));
        assert_eq!(first.salt, again.salt);
        assert_ne!(first.salt, mock("somebody").salt);
        let mut client = ScramSha256::new(b"x", ChannelBinding::unsupported());
        let server = ScramServer::begin(&first, client.message(), "n", None, false).unwrap();
        client.update(server.challenge().as_bytes()).unwrap();
        assert_eq!(server.finish(client.message()).err(), Some(ScramError::WrongProof));
    }

    #[test]
    fn binding_that_was_not_offered_and_endless_nonces_are_refused() {
        let keys = ScramKeys::derive("x", &[0; 16]);
        let begin = |m: &str| ScramServer::begin(&keys, m.as_bytes(), "n", None, false).err();
        assert_eq!(begin("p=tls-server-end-point,,n=,r=abc"), Some(ScramError::ChannelBinding));
        assert_eq!(begin(&format!("n,,n=,r={}", "a".repeat(300))), Some(ScramError::Malformed));
        assert_eq!(begin("n,a=x,n=,r=abc"), Some(ScramError::Malformed));
        assert_eq!(begin("n,,r=abc"), Some(ScramError::Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_exchange_panic(first in ".{0,60}", last in ".{0,80}") {
            let keys = ScramKeys::impossible(&[0; 16]);
            if let Ok(server) = ScramServer::begin(&keys, first.as_bytes(), "n", None, false) {
                let _ = server.finish(last.as_bytes());
            }
            if let Ok(server) = ScramServer::begin(&keys, b"n,,n=,r=abc", "n", None, false) {
                prop_assert!(server.finish(last.as_bytes()).is_err());
            }
            let derived = Derived::default();
            let mut client = ScramClient::new("n", None, false);
            let _ = client.prove(Knows::Password("x", &derived), first.as_bytes());
            prop_assert!(client.finish(last.as_bytes()).is_err());
            let _ = ScramKeys::parse(&first);
        }
    }
}
