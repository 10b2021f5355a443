//! Proving who a client is, and proving to a server who we are. Without I/O.

mod md5;

pub(crate) use cofferdam_scram::nonce;
pub use cofferdam_scram::{
    ClientKeys, Derived, Knows, SCRAM, SCRAM_PLUS, ScramClient, ScramError, ScramKeys, ScramServer,
};
pub use md5::{md5_matches, md5_response, md5_stored};

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cofferdam_tenant::{Login, Password};

/// SCRAM keys of the logins that have been used, so that the slow derivation happens once per password.
#[derive(Debug)]
pub struct Verifiers {
    known: Mutex<HashMap<Login, Arc<ScramKeys>>>,
    /// What clients have proved to have, for logins of which the password is not known (rule 17).
    shown: Mutex<HashMap<Login, Arc<ClientKeys>>>,
    /// What passwords are turned into to log in to servers.
    pub(crate) derived: Derived,
    /// Makes the salt of a user that does not exist the same each time (rule 19).
    mock: [u8; 32],
}

/// Old passwords are forgotten by starting over when this many have been seen.
const MAX_KNOWN: usize = 20_000;

impl Verifiers {
    /// No keys yet; a fresh secret for mock salts.
    pub fn new() -> Result<Self, getrandom::Error> {
        let mut mock = [0; 32];
        getrandom::fill(&mut mock)?;
        Ok(Self { known: Mutex::default(), shown: Mutex::default(), derived: Derived::default(), mock })
    }

    /// The keys of a login; those that nothing opens when what is stored of its password are none.
    pub fn keys(&self, login: &Login) -> Arc<ScramKeys> {
        if let Some(keys) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(login) {
            return Arc::clone(keys);
        }
        let keys = match &login.password {
            // The same salt as for somebody who does not exist: the challenge tells nobody who does (rule 19).
            Password::Plain(password) => ScramKeys::derive(password.expose(), &self.salt(&login.role)),
            Password::Stored(stored) => ScramKeys::parse(stored.expose()).unwrap_or_else(|| self.mock(&login.role)),
            _ => self.mock(&login.role),
        };
        let keys = Arc::new(keys);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        Arc::clone(known.entry(login.clone()).or_insert(keys))
    }

    /// Keys that no password opens, with a salt that is stable per user name.
    pub fn mock(&self, user: &str) -> ScramKeys {
        ScramKeys::impossible(&self.salt(user))
    }

    /// A salt that is stable per user name, as long as the process runs.
    fn salt(&self, user: &str) -> [u8; 16] {
        cofferdam_scram::salt_of(user, &self.mock)
    }

    /// Keeps what a client has proved to have, to log in to the server in its name.
    pub(crate) fn keep(&self, login: &Login, keys: ClientKeys) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.len() >= MAX_KNOWN {
            shown.clear();
        }
        shown.insert(login.clone(), Arc::new(keys));
    }

    /// What a client with this login has proved to have.
    pub(crate) fn shown(&self, login: &Login) -> Option<Arc<ClientKeys>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).get(login).cloned()
    }

    /// The server did not take it.
    pub(crate) fn forget(&self, login: &Login) {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).remove(login);
    }
}
