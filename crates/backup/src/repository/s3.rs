//! Objects in an S3-compatible store, locked where that is asked for.
//!
//! What a store says about its locks is not believed: it is read back, object by object. There are stores that take the
//! request, answer 200, and forget the lock, in particular of objects written in parts.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{
    ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart, ObjectLockMode, ObjectLockRetention,
    ObjectLockRetentionMode,
};
use aws_smithy_http_client::tls;
use bytes::Bytes;
use cofferdam_tenant::Secret;
use jiff::{SignedDuration, Timestamp};
use tokio::runtime::Handle;

use super::store::{Locks, Object, ObjectLock, Store, StoreError};
use crate::model::{Immutability, LockMode};

/// How to reach a bucket.
#[derive(Debug, Clone)]
pub struct S3Options {
    /// The bucket.
    pub bucket: String,
    /// The beginning of every object's name, such as `backups/acme/`.
    pub prefix: String,
    /// The region; stores that have none take any.
    pub region: String,
    /// Where the store is, such as `https://s3.internal:9000`; AWS if none.
    pub endpoint: Option<String>,
    /// The bucket in the path and not in the host name: what most stores other than AWS want.
    pub path_style: bool,
    /// Who we are there.
    pub access_key: String,
    /// The key's secret.
    pub secret_key: Secret,
    /// A certificate authority of one's own, in PEM.
    pub ca: Option<Vec<u8>>,
    /// Locks for everything that is written. The bucket must have been created with object lock.
    pub immutability: Option<Immutability>,
}

/// A bucket, or what is below a prefix in it.
///
/// Calls block on the runtime whose handle it was given: they must come from threads that are not that runtime's workers.
pub struct S3 {
    client: Client,
    runtime: Handle,
    options: S3Options,
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3").field("location", &self.location()).finish_non_exhaustive()
    }
}

/// Larger objects are written in parts.
const WHOLE: usize = 16 << 20;
const PART: usize = 8 << 20;
/// Locks last this much longer than asked for, as a part of the period, so that they need not be extended each time.
const SLACK: i32 = 8;
/// Objects below it are not locked: they say what must not be deleted, and are lifted by deleting them.
const UNLOCKED: &str = "holds/";

impl S3 {
    /// A bucket. Connects with the first call. Fails when the certificate authority cannot be read.
    pub fn new(options: S3Options, runtime: Handle) -> Result<Self, StoreError> {
        let mut trust = tls::TrustStore::default();
        if let Some(pem) = &options.ca {
            trust = trust.with_pem_certificate(pem.clone());
        }
        let context = tls::TlsContext::builder().with_trust_store(trust).build().map_err(|e| StoreError::Failed {
            store: format!("s3://{}", options.bucket),
            action: "read the certificate authority of",
            name: "the store".to_owned(),
            reason: e.to_string(),
        })?;
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring))
            .tls_context(context)
            .build_https();
        let secret = options.secret_key.expose();
        let mut config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(options.region.clone()))
            .credentials_provider(Credentials::new(&options.access_key, secret, None, None, "cofferdam"))
            .http_client(http)
            .force_path_style(options.path_style)
            .retry_config(RetryConfig::standard().with_max_attempts(5).with_max_backoff(Duration::from_secs(10)))
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(Duration::from_secs(10))
                    // Until the answer begins, which is after everything was sent.
                    .read_timeout(Duration::from_secs(300))
                    .operation_attempt_timeout(Duration::from_secs(300))
                    .build(),
            );
        config.set_endpoint_url(options.endpoint.clone());
        Ok(Self { client: Client::from_conf(config.build()), runtime, options })
    }

    /// Creates the bucket, with object lock if asked for: that cannot be switched on later. For tests and first steps.
    pub fn create_bucket(&self, object_lock: bool) -> Result<(), StoreError> {
        let request = self.client.create_bucket().bucket(&self.options.bucket);
        self.wait(request.object_lock_enabled_for_bucket(object_lock).send())
            .map_err(|e| self.failed("create", "the bucket", &e))?;
        Ok(())
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.options.prefix)
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    fn failed<E>(&self, action: &'static str, name: &str, error: &SdkError<E>) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let store = self.location();
        let missing = matches!(error.code(), Some("NoSuchKey" | "NotFound"))
            || error.code().is_none() && error.raw_response().is_some_and(|r| r.status().as_u16() == 404);
        if missing {
            return StoreError::Missing { store, name: name.to_owned() };
        }
        let reason = match (error.code(), error.message()) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(code), None) => code.to_owned(),
            _ => DisplayErrorContext(error).to_string(),
        };
        StoreError::Failed { store, action, name: name.to_owned(), reason }
    }

    /// The lock that an object written now gets.
    fn new_lock(&self, name: &str) -> Option<ObjectLock> {
        let Immutability { mode, period } = self.options.immutability.filter(|_| !name.starts_with(UNLOCKED))?;
        let period = SignedDuration::try_from(period.0).ok()?;
        Some(ObjectLock { mode, until: Timestamp::now() + period + period / SLACK })
    }

    /// Whether it was written: with `new`, what is there already stays.
    async fn put(&self, name: &str, body: Bytes, new: bool) -> Result<bool, StoreError> {
        let lock = self.new_lock(name);
        // The default checksum goes along: AWS refuses a lock without one.
        self.client
            .put_object()
            .bucket(&self.options.bucket)
            .key(self.key(name))
            .set_object_lock_mode(lock.map(|lock| put_mode(lock.mode)))
            .set_object_lock_retain_until_date(lock.map(|lock| date(lock.until)))
            .set_if_none_match(new.then(|| "*".to_owned()))
            .body(ByteStream::from(body))
            .send()
            .await
            .map(|_| true)
            .or_else(|e| {
                let there = matches!(e.code(), Some("PreconditionFailed" | "ConditionalRequestConflict"))
                    || e.raw_response().is_some_and(|r| r.status().as_u16() == 412);
                if new && there { Ok(false) } else { Err(self.failed("write", name, &e)) }
            })
    }

    async fn put_in_parts(&self, name: &str, body: Bytes) -> Result<(), StoreError> {
        let (bucket, key, lock) = (&self.options.bucket, self.key(name), self.new_lock(name));
        let upload = self
            .client
            .create_multipart_upload()
            .bucket(bucket)
            .key(&key)
            .checksum_algorithm(ChecksumAlgorithm::Crc32)
            .set_object_lock_mode(lock.map(|lock| put_mode(lock.mode)))
            .set_object_lock_retain_until_date(lock.map(|lock| date(lock.until)))
            .send()
            .await
            .map_err(|e| self.failed("begin to write", name, &e))?;
        let Some(id) = upload.upload_id() else {
            let reason = "the store gave no id for the upload".to_owned();
            return Err(StoreError::Failed { store: self.location(), action: "write", name: name.to_owned(), reason });
        };
        let written = self.parts(name, &key, id, body).await;
        if written.is_err() {
            // Parts that belong to nothing cost money until somebody removes them.
            let _ = self.client.abort_multipart_upload().bucket(bucket).key(&key).upload_id(id).send().await;
        }
        written
    }

    async fn parts(&self, name: &str, key: &str, id: &str, mut body: Bytes) -> Result<(), StoreError> {
        let bucket = &self.options.bucket;
        let mut done = Vec::new();
        let mut number = 0;
        while !body.is_empty() {
            number += 1;
            let part = body.split_to(PART.min(body.len()));
            let sent = self
                .client
                .upload_part()
                .bucket(bucket)
                .key(key)
                .upload_id(id)
                .part_number(number)
                .checksum_algorithm(ChecksumAlgorithm::Crc32)
                .body(ByteStream::from(part))
                .send()
                .await
                .map_err(|e| self.failed("write a part of", name, &e))?;
            done.push(
                CompletedPart::builder()
                    .part_number(number)
                    .set_e_tag(sent.e_tag().map(str::to_owned))
                    .set_checksum_crc32(sent.checksum_crc32().map(str::to_owned))
                    .build(),
            );
        }
        let upload = CompletedMultipartUpload::builder().set_parts(Some(done)).build();
        self.client
            .complete_multipart_upload()
            .bucket(bucket)
            .key(key)
            .upload_id(id)
            .multipart_upload(upload)
            .send()
            .await
            .map_err(|e| self.failed("finish writing", name, &e))?;
        Ok(())
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let wanted = range.as_ref().map(|r| r.end.saturating_sub(r.start));
        let got = self
            .client
            .get_object()
            .bucket(&self.options.bucket)
            .key(self.key(name))
            .set_range(range.map(|r| format!("bytes={}-{}", r.start, r.end.saturating_sub(1))))
            .send()
            .await
            .map_err(|e| self.failed("read", name, &e))?;
        let broken = |reason: String| StoreError::Failed {
            store: self.location(),
            action: "read",
            name: name.to_owned(),
            reason,
        };
        let bytes = got.body.collect().await.map_err(|e| broken(e.to_string()))?.into_bytes();
        match wanted {
            Some(wanted) if wanted != bytes.len() as u64 => {
                Err(broken(format!("{} bytes came instead of {wanted}", bytes.len())))
            }
            _ => Ok(bytes),
        }
    }
}

impl Store for S3 {
    fn location(&self) -> String {
        format!("s3://{}/{}", self.options.bucket, self.options.prefix)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Object>, StoreError> {
        let mut pages =
            self.client.list_objects_v2().bucket(&self.options.bucket).prefix(self.key(prefix)).into_paginator().send();
        self.wait(async {
            let mut found = Vec::new();
            while let Some(page) = pages.next().await {
                let page = page.map_err(|e| self.failed("list", prefix, &e))?;
                found.extend(page.contents().iter().filter_map(|object| {
                    let name = object.key()?.strip_prefix(&self.options.prefix)?.to_owned();
                    Some(Object { name, size: u64::try_from(object.size()?).ok()? })
                }));
            }
            Ok(found)
        })
    }

    fn read(&self, name: &str) -> Result<Bytes, StoreError> {
        self.wait(self.get(name, None))
    }

    fn read_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        self.wait(self.get(name, Some(range)))
    }

    fn write(&self, name: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let body = match <[Bytes; 1]>::try_from(parts) {
            Ok([one]) => one,
            Err(parts) => Bytes::from(parts.concat()),
        };
        self.wait(async {
            if body.len() > WHOLE {
                self.put_in_parts(name, body).await
            } else {
                self.put(name, body, false).await.map(drop)
            }
        })
    }

    /// With `If-None-Match`. A store that does not know it writes in any case.
    fn write_new(&self, name: &str, content: Bytes) -> Result<bool, StoreError> {
        self.wait(self.put(name, content, true))
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        let removal = self.client.delete_object().bucket(&self.options.bucket).key(self.key(name)).send();
        match self.wait(removal).map_err(|e| self.failed("remove", name, &e)) {
            Err(StoreError::Missing { .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn locks(&self) -> Option<&dyn Locks> {
        self.options.immutability.is_some().then_some(self)
    }
}

impl Locks for S3 {
    fn wanted(&self) -> Option<Immutability> {
        self.options.immutability
    }

    fn lock_of(&self, name: &str) -> Result<Option<ObjectLock>, StoreError> {
        let head = self.client.head_object().bucket(&self.options.bucket).key(self.key(name)).send();
        let head = self.wait(head).map_err(|e| self.failed("read the lock of", name, &e))?;
        let mode = match head.object_lock_mode() {
            Some(ObjectLockMode::Compliance) => LockMode::Compliance,
            Some(ObjectLockMode::Governance) => LockMode::Governance,
            _ => return Ok(None),
        };
        let until = head.object_lock_retain_until_date();
        Ok(until.and_then(|d| Timestamp::from_second(d.secs()).ok()).map(|until| ObjectLock { mode, until }))
    }

    fn extend(&self, name: &str, lock: ObjectLock) -> Result<(), StoreError> {
        let mode = match lock.mode {
            LockMode::Compliance => ObjectLockRetentionMode::Compliance,
            LockMode::Governance => ObjectLockRetentionMode::Governance,
        };
        let retention = ObjectLockRetention::builder().mode(mode).retain_until_date(date(lock.until)).build();
        let request = self.client.put_object_retention().bucket(&self.options.bucket).key(self.key(name));
        self.wait(request.retention(retention).send()).map_err(|e| self.failed("lock", name, &e))?;
        Ok(())
    }
}

fn put_mode(mode: LockMode) -> ObjectLockMode {
    match mode {
        LockMode::Compliance => ObjectLockMode::Compliance,
        LockMode::Governance => ObjectLockMode::Governance,
    }
}

/// Stores keep whole seconds: a lock ends a moment later rather than earlier.
fn date(at: Timestamp) -> DateTime {
    DateTime::from_secs(at.as_second() + 1)
}
