//! Files of a filestore that is in an S3-compatible bucket: found by a HEAD, read by a GET of the part that is wanted, and passed on as they
//! come. Requests are signed in their query and short-lived; nobody but the store sees them.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use cofferdam_tenant::{FilestoreBucket, TenantId};
use http::{Method, StatusCode, header};
use rusty_s3::{Credentials, S3Action, UrlStyle};

use crate::local::Content;

/// How long a signature is good: long enough for clocks that differ by what stores bear.
const SIGNED_FOR: Duration = Duration::from_secs(900);

/// How long the store may take to be reached, and to begin its answer.
const CONNECT: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(30);

/// How long the store may say nothing inside an answer.
const SILENCE: Duration = Duration::from_secs(30);

/// A bucket, and connections to it.
pub(crate) struct Bucket {
    config: FilestoreBucket,
    signer: rusty_s3::Bucket,
    credentials: Credentials,
    client: reqwest::Client,
    /// Files that are being sent, by tenant.
    sending: Mutex<HashMap<TenantId, usize>>,
}

/// Files that are sent from a bucket at once, and how many of them are one tenant's.
const MOST: usize = 512;
const MOST_OF_ONE: usize = MOST / 4;

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bucket").field("name", &self.config.bucket).finish_non_exhaustive()
    }
}

impl Bucket {
    pub(crate) fn new(config: &FilestoreBucket) -> Result<Self, String> {
        let endpoint = url::Url::parse(&config.endpoint).map_err(|error| error.to_string())?;
        let style = if config.path_style { UrlStyle::Path } else { UrlStyle::VirtualHost };
        let signer = rusty_s3::Bucket::new(endpoint, style, config.bucket.clone(), config.region.clone());
        let tls = cofferdam_tls::towards_those(config.ca.as_deref()).map_err(|error| error.to_string())?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT)
            .build();
        Ok(Self {
            signer: signer.map_err(|error| error.to_string())?,
            credentials: Credentials::new(config.access_key.expose(), config.secret_key.expose()),
            client: client.map_err(|error| error.to_string())?,
            config: config.clone(),
            sending: Mutex::default(),
        })
    }

    /// Whether this is what the settings say.
    pub(crate) fn is_of(&self, config: &FilestoreBucket) -> bool {
        self.config == *config
    }

    /// Looks for a file of a filestore.
    pub(crate) async fn find(self: &Arc<Self>, file: &str, tenant: TenantId) -> io::Result<Content> {
        let place = Place::take(self, tenant).ok_or(io::ErrorKind::ResourceBusy)?;
        let name = format!("{}{file}", self.config.prefix).into();
        let object = Object { bucket: Arc::clone(self), name, _place: Arc::new(place) };
        let answer = object.ask(Method::HEAD, None).await?;
        // A HEAD's body has no length; the header says what a GET's would have.
        let length =
            answer.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
        let length = length.ok_or_else(|| io::Error::other("the store does not say how long the object is"))?;
        Ok(Content::Object(object, length))
    }
}

/// A place among those to whom files are sent, until it is dropped: whoever takes nothing holds a connection to the store.
#[derive(Debug)]
struct Place(Arc<Bucket>, TenantId);

impl Place {
    fn take(bucket: &Arc<Bucket>, tenant: TenantId) -> Option<Self> {
        let mut sending = bucket.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, own) = (sending.values().sum::<usize>(), sending.entry(tenant).or_default());
        if all >= MOST || *own >= MOST_OF_ONE {
            return None;
        }
        *own += 1;
        Some(Self(Arc::clone(bucket), tenant))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut sending = self.0.sending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = sending.get_mut(&self.1) {
            *own -= 1;
            if *own == 0 {
                sending.remove(&self.1);
            }
        }
    }
}

/// An object of a bucket.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    bucket: Arc<Bucket>,
    name: Arc<str>,
    _place: Arc<Place>,
}

impl Object {
    /// Begins to read a part of it.
    pub(crate) async fn get(&self, from: u64, length: u64, whole: u64) -> io::Result<Download> {
        let range = (length < whole).then(|| format!("bytes={from}-{}", from + length - 1));
        let expected = if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
        let answer = self.ask(Method::GET, range).await?;
        if answer.status() != expected {
            return Err(io::Error::other(format!("the store answers {} and not {expected}", answer.status())));
        }
        if answer.content_length().is_some_and(|n| n != length) {
            return Err(io::Error::other("the object has another length than a moment ago"));
        }
        Ok(Download(answer))
    }

    async fn ask(&self, method: Method, range: Option<String>) -> io::Result<reqwest::Response> {
        let Bucket { signer, credentials, client, .. } = &*self.bucket;
        let url = if method == Method::HEAD {
            signer.head_object(Some(credentials), &self.name).sign(SIGNED_FOR)
        } else {
            signer.get_object(Some(credentials), &self.name).sign(SIGNED_FOR)
        };
        let mut request = client.request(method, url);
        if let Some(range) = range {
            request = request.header(header::RANGE, range);
        }
        let answer = tokio::time::timeout(ANSWER, request.send()).await;
        let answer = answer.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the store does not answer"))?;
        // Signatures are in addresses, and errors are written down.
        let answer = answer.map_err(|error| io::Error::other(error.without_url()))?;
        match answer.status() {
            StatusCode::NOT_FOUND => Err(io::ErrorKind::NotFound.into()),
            status if status.is_success() => Ok(answer),
            status => Err(io::Error::other(format!("the store answers {status}"))),
        }
    }
}

/// A part of an object that is on its way.
pub(crate) struct Download(reqwest::Response);

impl Download {
    /// The next bytes; `None` at the end.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            // Only what the store takes: while its client takes nothing, nobody asks.
            let next = tokio::time::timeout(SILENCE, self.0.chunk()).await;
            let next = next.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the store says nothing any more"))?;
            match next.map_err(|error| io::Error::other(error.without_url()))? {
                Some(bytes) if bytes.is_empty() => {}
                other => return Ok(other),
            }
        }
    }
}
