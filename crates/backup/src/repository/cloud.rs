//! Objects in Azure's Blob Storage and in Google's Cloud Storage, each by its own protocol.

use std::error::Error as _;
use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use cofferdam_tenant::Secret;
use futures_util::TryStreamExt;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{HttpClient, HttpConnector};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload, RetryConfig,
};
use tokio::runtime::Handle;

use super::store::{Object, Store, StoreError};

/// How to reach a container of Azure's.
#[derive(Debug, Clone)]
pub struct AzureOptions {
    /// The storage account.
    pub account: String,
    /// The container.
    pub container: String,
    /// The beginning of every object's name, such as `backups/acme/`.
    pub prefix: String,
    /// Where the account's blobs are; `https://<account>.blob.core.windows.net` if none.
    pub endpoint: Option<String>,
    /// The account's key, in base64. Without one, the identity that Azure gives to the machine.
    pub access_key: Option<Secret>,
    /// Certificate authorities of one's own, in PEM.
    pub ca: Option<String>,
}

/// How to reach a bucket of Google's.
#[derive(Debug, Clone)]
pub struct GoogleOptions {
    /// The bucket.
    pub bucket: String,
    /// The beginning of every object's name, such as `backups/acme/`.
    pub prefix: String,
    /// Where the store is; Google's own if none.
    pub endpoint: Option<String>,
    /// The key of a service account, as the JSON text that Google gives out. Without one, the application default credentials of whoever
    /// runs this, or the account of the machine.
    pub service_account: Option<Secret>,
    /// Certificate authorities of one's own, in PEM, instead of those that the machine trusts: also for where tokens come from.
    pub ca: Option<String>,
}

/// A container or bucket, or what is below a prefix in it.
///
/// Calls block on the runtime whose handle it was given: they must come from threads that are not that runtime's workers.
/// Objects are not locked here: neither store locks one with the request that writes it.
pub struct Cloud {
    store: Box<dyn ObjectStore>,
    runtime: Handle,
    place: String,
    prefix: String,
}

impl fmt::Debug for Cloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cloud").field("location", &self.location()).finish_non_exhaustive()
    }
}

const CONNECT: Duration = Duration::from_secs(10);
/// One request with everything that it sends and gets.
const REQUEST: Duration = Duration::from_secs(200);
/// Tries of one request, and for how long: a signature is made once for all of them, and stores take it for some minutes only.
const RETRIES: usize = 5;
const RETRYING: Duration = Duration::from_secs(280);

impl Cloud {
    /// A container of Azure's. Connects with the first call. Fails when an option cannot be used.
    pub fn azure(options: &AzureOptions, runtime: Handle) -> Result<Self, StoreError> {
        let place = format!("azure://{}/{}", options.account, options.container);
        let mut builder = MicrosoftAzureBuilder::new()
            .with_account(&options.account)
            .with_container_name(&options.container)
            .with_retry(retries())
            .with_client_options(plain(options.endpoint.as_deref()))
            .with_http_connector(Connector::new(options.ca.as_deref(), &place)?);
        if let Some(endpoint) = &options.endpoint {
            builder = builder.with_endpoint(address(endpoint, &place)?);
        }
        if let Some(key) = &options.access_key {
            builder = builder.with_access_key(key.expose());
        }
        let store = builder.build().map_err(|e| unusable(&place, &e))?;
        Ok(Self { store: Box::new(store), runtime, place, prefix: directory(&options.prefix) })
    }

    /// A bucket of Google's. Connects with the first call. Fails when an option cannot be used.
    pub fn google(options: &GoogleOptions, runtime: Handle) -> Result<Self, StoreError> {
        let place = format!("gs://{}", options.bucket);
        let mut builder = GoogleCloudStorageBuilder::new()
            .with_bucket_name(&options.bucket)
            .with_retry(retries())
            .with_client_options(plain(options.endpoint.as_deref()))
            .with_http_connector(Connector::new(options.ca.as_deref(), &place)?);
        if let Some(endpoint) = &options.endpoint {
            builder = builder.with_base_url(&address(endpoint, &place)?);
        }
        if let Some(account) = &options.service_account {
            // What is wrong with it is said by whoever reads it, with what it is.
            if serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(account.expose()).is_err() {
                let (action, name) = ("read the service account of", "the store".to_owned());
                let reason = "it is no JSON object, as Google gives it".to_owned();
                return Err(StoreError::Failed { store: place, action, name, reason });
            }
            builder = builder.with_service_account_key(account.expose());
        }
        let store = builder.build().map_err(|e| unusable(&place, &e))?;
        Ok(Self { store: Box::new(store), runtime, place, prefix: directory(&options.prefix) })
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    fn path(&self, action: &'static str, name: &str) -> Result<Path, StoreError> {
        let path = format!("{}{name}", self.prefix);
        Path::parse(path.trim_end_matches('/')).map_err(|e| self.broken(action, name, e.to_string()))
    }

    fn broken(&self, action: &'static str, name: &str, reason: String) -> StoreError {
        StoreError::Failed { store: self.location(), action, name: name.to_owned(), reason }
    }

    fn failed(&self, action: &'static str, name: &str, error: &object_store::Error) -> StoreError {
        match error {
            object_store::Error::NotFound { .. } => {
                StoreError::Missing { store: self.location(), name: name.to_owned() }
            }
            error => self.broken(action, name, chain(error)),
        }
    }

    fn object(&self, meta: &ObjectMeta) -> Option<Object> {
        let name = meta.location.as_ref().strip_prefix(&self.prefix)?.to_owned();
        Some(Object { name, size: meta.size })
    }

    async fn below(&self, directory: &Path) -> Result<Vec<ObjectMeta>, object_store::Error> {
        self.store.list(Some(directory)).try_collect().await
    }
}

/// A prefix as both stores list it: a directory, from the top.
fn directory(prefix: &str) -> String {
    let path = prefix.trim_matches('/');
    if path.is_empty() { String::new() } else { format!("{path}/") }
}

/// Whether an endpoint is an address of a web server.
pub(crate) fn is_address(endpoint: &str) -> bool {
    reqwest::Url::parse(endpoint).is_ok_and(|url| {
        // Neither a password nor a signature: those are told by messages.
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none()
    })
}

/// An endpoint as the client wants it, which only finds out what it cannot use when it uses it.
fn address(endpoint: &str, place: &str) -> Result<String, StoreError> {
    if is_address(endpoint) {
        return Ok(endpoint.trim_end_matches('/').to_owned());
    }
    let (store, name) = (place.to_owned(), "the store".to_owned());
    let reason =
        "its endpoint is no address such as https://store.internal:10000, without a password or a query".to_owned();
    Err(StoreError::Failed { store, action: "use the endpoint of", name, reason })
}

/// An error with what it comes from: only the innermost says what the store has answered.
fn chain(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = source.source();
    }
    text
}

fn unusable(place: &str, error: &object_store::Error) -> StoreError {
    let (action, name) = ("use the options of", "the store".to_owned());
    StoreError::Failed { store: place.to_owned(), action, name, reason: chain(error) }
}

fn retries() -> RetryConfig {
    let backoff = BackoffConfig { max_backoff: Duration::from_secs(10), ..BackoffConfig::default() };
    RetryConfig { max_retries: RETRIES, retry_timeout: RETRYING, backoff }
}

/// Without TLS only where an address says so.
fn plain(endpoint: Option<&str>) -> ClientOptions {
    ClientOptions::new().with_allow_http(endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")))
}

/// The HTTP client, with this workspace's way to speak TLS.
struct Connector(reqwest::Client);

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

impl Connector {
    fn new(ca: Option<&str>, place: &str) -> Result<Self, StoreError> {
        let failed = |what: &'static str, reason: String| StoreError::Failed {
            store: place.to_owned(),
            action: what,
            name: "the store".to_owned(),
            reason,
        };
        let tls =
            cofferdam_tls::towards_those(ca).map_err(|e| failed("read the certificate authority of", e.to_string()))?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .connect_timeout(CONNECT)
            .timeout(REQUEST)
            .build()
            .map_err(|e| failed("make a client of", e.to_string()))?;
        Ok(Self(client))
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.0.clone()))
    }
}

impl Store for Cloud {
    fn location(&self) -> String {
        format!("{}/{}", self.place, self.prefix)
    }

    /// Both stores list what is below a directory; a name that only begins like others is looked for among its neighbours.
    fn list(&self, prefix: &str) -> Result<Vec<Object>, StoreError> {
        let directory = prefix.rfind('/').map_or("", |at| &prefix[..=at]);
        let path = self.path("list", directory)?;
        let found = self.wait(async {
            if directory == prefix {
                return self.below(&path).await;
            }
            let neighbours = self.store.list_with_delimiter(Some(&path)).await?;
            let mut found = neighbours.objects;
            let wanted = format!("{}{prefix}", self.prefix);
            for directory in neighbours.common_prefixes.iter().filter(|path| path.as_ref().starts_with(&wanted)) {
                found.extend(self.below(directory).await?);
            }
            Ok(found)
        });
        let found = found.map_err(|e| self.failed("list", prefix, &e))?;
        let objects = found.iter().filter_map(|meta| self.object(meta));
        Ok(objects.filter(|object| object.name.starts_with(prefix)).collect())
    }

    fn read(&self, name: &str) -> Result<Bytes, StoreError> {
        let path = self.path("read", name)?;
        self.wait(async { self.store.get(&path).await?.bytes().await }).map_err(|e| self.failed("read", name, &e))
    }

    fn read_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let path = self.path("read", name)?;
        let bytes = self.wait(self.store.get_range(&path, range.clone())).map_err(|e| self.failed("read", name, &e))?;
        if bytes.len() as u64 != range.end - range.start {
            let reason = format!("{} bytes came instead of {}", bytes.len(), range.end - range.start);
            return Err(self.broken("read", name, reason));
        }
        Ok(bytes)
    }

    /// In one request, which is all or nothing whatever its size.
    fn write(&self, name: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let path = self.path("write", name)?;
        let content: PutPayload = parts.into_iter().collect();
        let size = content.content_length() as u64;
        let Err(error) = self.wait(self.store.put(&path, content)) else { return Ok(()) };
        // Where nothing may be replaced, a second try is refused after a first one whose answer was lost. What has been written is
        // there then, and only what bears its hash as its name is written twice.
        let is_refused =
            matches!(error, object_store::Error::AlreadyExists { .. } | object_store::Error::PermissionDenied { .. });
        let is_named_by_content =
            name.rsplit('/').next().is_some_and(|name| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()));
        if is_refused && is_named_by_content && self.wait(self.store.head(&path)).is_ok_and(|there| there.size == size)
        {
            return Ok(());
        }
        Err(self.failed("write", name, &error))
    }

    fn write_new(&self, name: &str, content: Bytes) -> Result<bool, StoreError> {
        let path = self.path("write", name)?;
        match self.wait(self.store.put_opts(&path, content.into(), PutMode::Create.into())) {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(self.failed("write", name, &error)),
        }
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        let path = self.path("remove", name)?;
        match self.wait(self.store.delete(&path)).map_err(|e| self.failed("remove", name, &e)) {
            Err(StoreError::Missing { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
