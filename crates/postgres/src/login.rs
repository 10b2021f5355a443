//! How a client proves who it is.

use std::sync::Arc;
use std::time::Instant;

use cofferdam_tenant::{AuthMethod, Catalog, Login, Password};

use crate::auth::{SCRAM, SCRAM_PLUS, ScramError, ScramServer, md5_matches, md5_response, md5_stored, nonce};
use crate::client::{LoginTask, Refusal, fatal};
use crate::console::is_console;
use crate::plane::{ClusterAccess, Snapshot};
use crate::stream::Stream;
use crate::wire::{Reply, StartupParameters, cstr};

impl LoginTask<'_> {
    /// Proves who the client is. Nothing has been told about databases before this has succeeded.
    pub(crate) async fn authenticate(&mut self, parameters: &StartupParameters) -> Result<(), Refusal> {
        let user = &parameters.user;
        let (login, access) = claimed(self.snapshot, parameters);
        let login = match (login, &access) {
            (Some(login), Some(access)) => match access.cache.ask(login).await {
                Ok(login) => Some(login),
                // Nobody's fault: it counts as no wrong password, and is not answered like one.
                Err(error) => {
                    // Why is for the log: nobody has proved yet who it is that asks.
                    tracing::warn!(%error, %user, "a password cannot be asked for");
                    let message = "cofferdam: the server that knows the passwords cannot be asked; try again";
                    return Err(fatal("08006", message));
                }
            },
            (login, _) => login.cloned(),
        };
        let outcome = match self.method(login.as_ref()) {
            AuthMethod::Cert => self.by_certificate(user),
            AuthMethod::Md5 => self.by_md5(user, login.as_ref()).await,
            AuthMethod::ScramSha256 => self.by_scram(user, login.as_ref()).await,
        };
        let address = self.peer.ip();
        match outcome {
            Ok(()) => {
                self.plane.door.succeeded(address, user);
                Ok(())
            }
            Err(Proof::Wrong) => {
                if let Some(access) = &access {
                    access.cache.ask_again(user);
                }
                let late = self.plane.door.failed(address, user, Instant::now());
                // Others may log in meanwhile; only this address has one place less.
                self.unauthenticated = None;
                tokio::time::sleep(late).await;
                Err(fatal("28P01", format!("password authentication failed for user \"{user}\"")))
            }
            Err(Proof::Refused(refusal)) => Err(refusal),
        }
    }

    /// What is stored of a password decides how it can be proved.
    fn method(&self, login: Option<&Login>) -> AuthMethod {
        match login.map(|login| &login.password) {
            _ if self.snapshot.auth == AuthMethod::Cert => AuthMethod::Cert,
            Some(Password::Stored(stored)) if stored.expose().starts_with("md5") => AuthMethod::Md5,
            Some(Password::Stored(_)) => AuthMethod::ScramSha256,
            _ => self.snapshot.auth,
        }
    }

    /// The certificate was checked by TLS; what is left is whose it is.
    fn by_certificate(&self, user: &str) -> Result<(), Proof> {
        if self.certificate_name().as_deref() == Some(user) {
            return Ok(());
        }
        let message = format!("certificate authentication failed for user \"{user}\"");
        Err(Proof::Refused(fatal("28000", message)))
    }

    /// The common name of the certificate that the client has shown.
    pub(crate) fn certificate_name(&self) -> Option<String> {
        let Some(Stream::Tls(tls, _)) = &self.stream else { return None };
        crate::tls::common_name(tls.get_ref().1.peer_certificates()?.first()?)
    }

    pub(crate) fn has_certificate(&self) -> bool {
        let Some(Stream::Tls(tls, _)) = &self.stream else { return false };
        tls.get_ref().1.peer_certificates().is_some_and(|chain| !chain.is_empty())
    }

    async fn by_md5(&mut self, user: &str, login: Option<&Login>) -> Result<(), Proof> {
        let mut salt = [0; 4];
        getrandom::fill(&mut salt).map_err(|_| fatal("58000", "no randomness for a salt"))?;
        self.send(|b| b.authentication(5, &salt)).await?;
        let answer = self.password().await?;
        let answer = cstr(&answer).map_or(&b""[..], |(text, _)| text);
        let stored = match login.map(|login| &login.password) {
            Some(Password::Plain(password)) => md5_stored(user, password.expose()),
            Some(Password::Stored(stored)) if stored.expose().starts_with("md5") => stored.expose().to_owned(),
            _ => return Err(Proof::Wrong),
        };
        if md5_matches(answer, &md5_response(&stored, salt)) { Ok(()) } else { Err(Proof::Wrong) }
    }

    async fn by_scram(&mut self, user: &str, login: Option<&Login>) -> Result<(), Proof> {
        let verifiers = Arc::clone(&self.plane.verifiers);
        let keys = match login {
            Some(login) => verifiers.keys(login),
            None => Arc::new(verifiers.mock(user)),
        };
        // Rule 18: the channel ends here, so it is our certificate that a client may bind to.
        let is_encrypted = matches!(self.stream, Some(Stream::Tls(..)));
        let end_point = self.snapshot.tls.as_ref().filter(|_| is_encrypted).and_then(|tls| tls.end_point.clone());
        let offered = end_point.is_some();
        self.send(|b| {
            let mechanisms = if offered { "SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0" } else { "SCRAM-SHA-256\0\0" };
            b.authentication(10, mechanisms.as_bytes());
        })
        .await?;
        let first = self.password().await?;
        let malformed = || fatal("08P01", "malformed SCRAM message");
        let (mechanism, data) = cstr(&first).ok_or_else(malformed)?;
        let plus = offered && mechanism == SCRAM_PLUS.as_bytes();
        if !plus && mechanism != SCRAM.as_bytes() {
            let message = "the client selected an authentication method that was not offered";
            return Err(fatal("28000", message).into());
        }
        let data = match data.split_first_chunk::<4>() {
            Some((length, data)) if u32::from_be_bytes(*length) as usize == data.len() => data,
            _ => return Err(malformed().into()),
        };
        let nonce = nonce().map_err(|_| fatal("58000", "no randomness for a nonce"))?;
        let exchange = ScramServer::begin(&keys, data, &nonce, end_point.as_deref(), plus)
            .map_err(|e| fatal("08P01", e.to_string()))?;
        let challenge = exchange.challenge().to_owned();
        self.send(|b| b.authentication(11, challenge.as_bytes())).await?;
        let last = self.password().await?;
        let (signature, shown) = exchange.finish(&last).map_err(|e| match e {
            ScramError::WrongProof => Proof::Wrong,
            other => Proof::Refused(fatal("08P01", other.to_string())),
        })?;
        if let Some(login) = login.filter(|login| matches!(login.password, Password::Stored(_))) {
            verifiers.keep(login, shown);
        }
        self.send(|b| b.authentication(12, signature.as_bytes())).await?;
        Ok(())
    }
}

/// Why a proof was not accepted.
enum Proof {
    /// It is wrong, or there is no such user: nobody is told which.
    Wrong,
    Refused(Refusal),
}

impl From<Refusal> for Proof {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// The login that the client claims, and the cluster where it would be used. Whether it may open the database is found out
/// afterwards: only who has a password learns anything about databases, and not more of those that are somebody else's
/// than of those that do not exist.
fn claimed<'a>(
    snapshot: &'a Snapshot,
    parameters: &StartupParameters,
) -> (Option<&'a Login>, Option<&'a ClusterAccess>) {
    let (catalog, role) = (&snapshot.catalog, parameters.user.as_str());
    if is_console(&parameters.database) {
        let users = catalog.postgres.iter().flat_map(|front| &front.console);
        return (users.map(|user| &user.login).find(|login| login.role == role), None);
    }
    if parameters.database == Catalog::MAINTENANCE_DATABASE
        && let Some((_, login, cluster)) = catalog.maintenance(role)
    {
        return (Some(login), snapshot.clusters.get(&cluster.name));
    }
    let here = catalog.by_database(&parameters.database).and_then(|t| Some((t.login(role)?, t.cluster.as_ref()?)));
    match here {
        Some((login, cluster)) => (Some(login), snapshot.clusters.get(&cluster.name)),
        None => (catalog.any_login(role), None),
    }
}
