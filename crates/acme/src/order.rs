//! One account, and one order of it.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use cofferdam_tenant::{AcmeChallenge, AcmeFront, Secret, TlsFiles};
use instant_acme::{
    Account, AuthorizationStatus, ChallengeType, Error, ExternalAccountKey, Identifier, NewAccount, NewOrder, Order,
    OrderStatus, RetryPolicy,
};
use tokio::task::spawn_blocking;

use crate::Acme;
use crate::client::Client;
use crate::store::{Challenge, Store};

/// How long an authority may take to look at a host, or to sign.
const PATIENCE: RetryPolicy =
    RetryPolicy::new().initial_delay(Duration::from_millis(500)).backoff(1.5).timeout(Duration::from_secs(300));

/// The account that is kept, or a new one, which is kept from now on.
pub(crate) async fn account(front: &AcmeFront, store: &Store) -> Result<Account, Error> {
    let client = Client::new(front.directory_ca.as_deref()).map_err(|error| Error::Other(Box::new(error)))?;
    let builder = Account::builder_with_http(Box::new(client));
    let kept = store.clone();
    let other = |error: std::io::Error| Error::Other(Box::new(error));
    if let Some(credentials) = blocking(move || kept.account()).await.map_err(other)? {
        // Not made anew if it cannot be read: an operator may have bound it to something.
        return builder.from_credentials(serde_json::from_str(&credentials)?).await;
    }
    let contacts: Vec<_> = front.config.contacts.iter().map(|contact| format!("mailto:{contact}")).collect();
    let contacts: Vec<_> = contacts.iter().map(String::as_str).collect();
    let wanted = NewAccount {
        contact: &contacts,
        terms_of_service_agreed: front.config.agree_to_terms,
        only_return_existing: false,
    };
    let external = front.config.external_account.as_ref().zip(front.external_key.as_ref());
    let external = external.map(|(account, key)| {
        let key = URL_SAFE_NO_PAD.decode(key.expose()).map_err(|error| Error::Other(Box::new(error)))?;
        Ok::<_, Error>(ExternalAccountKey::new(account.key_id.clone(), &key))
    });
    let external = external.transpose()?;
    let (account, credentials) = builder.create(&wanted, front.config.directory.clone(), external.as_ref()).await?;
    let (kept, credentials) = (store.clone(), serde_json::to_string(&credentials)?);
    blocking(move || kept.set_account(&credentials)).await.map_err(other)?;
    Ok(account)
}

/// Runs what may wait for a disk beside the runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    what: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    spawn_blocking(what).await.map_err(std::io::Error::other)?
}

/// A certificate for one host.
pub(crate) async fn certificate(account: &Account, host: &str, acme: &Acme) -> Result<TlsFiles, Error> {
    let identifiers = [Identifier::Dns(host.to_owned())];
    let mut order = account.new_order(&NewOrder::new(&identifiers)).await?;
    prove(&mut order, host, acme).await?;
    if order.state().status != OrderStatus::Ready && order.poll_ready(&PATIENCE).await? != OrderStatus::Ready {
        return Err(why_refused(&mut order).await);
    }
    let key = order.finalize().await?;
    let certificate = order.poll_certificate(&PATIENCE).await?;
    Ok(TlsFiles { certificate, key: Secret::new(key) })
}

/// Says that the host is served here, if the authority has not seen it lately.
async fn prove(order: &mut Order, host: &str, acme: &Acme) -> Result<(), Error> {
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        match authorization.status {
            AuthorizationStatus::Valid => continue,
            AuthorizationStatus::Pending => {}
            _ => return Err(Error::Str("the authority's authorization is neither pending nor valid")),
        }
        let wanted = match acme.front.config.challenge {
            AcmeChallenge::Http01 => ChallengeType::Http01,
            AcmeChallenge::TlsAlpn01 => ChallengeType::TlsAlpn01,
        };
        let mut challenge =
            authorization.challenge(wanted).ok_or(Error::Str("the authority offers no such challenge"))?;
        let authorization = challenge.key_authorization().as_str().to_owned();
        let published = acme.publish(host, Challenge { token: challenge.token.clone(), authorization }).await;
        published.map_err(|error| Error::Other(Box::new(error)))?;
        challenge.set_ready().await?;
    }
    Ok(())
}

/// What an authority says about an order that it has refused.
async fn why_refused(order: &mut Order) -> Error {
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        if let Ok(state) = authorization.refresh().await
            && let Some(problem) = state.challenges.iter().find_map(|challenge| challenge.error.clone())
        {
            return Error::Api(problem);
        }
    }
    Error::Str("the authority refuses and does not say why")
}

/// What an authority will be shown for `tls-alpn-01` (RFC 8737): a certificate of the host with a digest in it.
pub(crate) fn shown(host: &str, challenge: &Challenge) -> Result<TlsFiles, rcgen::Error> {
    use sha2::{Digest, Sha256};

    let digest: [u8; 32] = Sha256::digest(challenge.authorization.as_bytes()).into();
    let key = rcgen::KeyPair::generate()?;
    let mut parameters = rcgen::CertificateParams::new([host.to_owned()])?;
    parameters.custom_extensions = vec![rcgen::CustomExtension::new_acme_identifier(&digest)];
    let certificate = parameters.self_signed(&key)?.pem();
    Ok(TlsFiles { certificate, key: Secret::new(key.serialize_pem()) })
}

/// Whether an order has failed because the authority does not know the account any more.
pub(crate) fn is_unknown_account(error: &Error) -> bool {
    is_problem(error, "accountDoesNotExist")
}

/// Whether the authority wants to be asked less often.
pub(crate) fn is_rate_limited(error: &Error) -> bool {
    is_problem(error, "rateLimited")
}

fn is_problem(error: &Error, name: &str) -> bool {
    let Error::Api(problem) = error else { return false };
    problem.r#type.as_deref().and_then(|kind| kind.strip_prefix("urn:ietf:params:acme:error:")) == Some(name)
}
