//! What the files may say about the HTTP plane.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{default_backlog, default_connections, default_spool, seconds, socket_addresses, yes};
use crate::ids::PoolName;
use crate::units::{ByteSize, Endpoint, HumanDuration, Network, Secret};

/// The HTTP plane.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// Addresses to listen on.
    #[schemars(with = "Vec<String>")]
    #[serde(deserialize_with = "socket_addresses")]
    pub listen: Vec<SocketAddr>,
    /// TLS for clients, on addresses of its own.
    pub tls: Option<HttpTlsConfig>,
    /// Whether connections from `trusted_proxies` begin with a header of the PROXY protocol, version 1 or 2, before anything else.
    #[serde(default)]
    pub proxy_protocol: bool,
    /// The scheme that clients use to reach this listener, told to Odoo as X-Forwarded-Proto: `https` when TLS ends in front of the gateway.
    #[serde(default = "default_scheme")]
    pub public_scheme: Scheme,
    /// Proxies in front of the gateway: from them X-Forwarded-For and X-Forwarded-Proto are believed, from nobody else.
    #[serde(default)]
    pub trusted_proxies: Vec<Network>,
    /// Key that binds session cookies to their tenant, in plain text; the same in every gateway of a site. Absent: sessions are not bound.
    pub session_key: Option<Secret>,
    /// File with the session key.
    pub session_key_file: Option<PathBuf>,
    /// Environment variable with the session key.
    pub session_key_env: Option<String>,
    /// Whether a tenant may have `*.example.com` among its hosts: every name with one label in place of the asterisk that no other tenant has.
    #[serde(default)]
    pub wildcard_hosts: bool,
    /// File to which a line of JSON is written for each request; `-` for standard output. Opened anew by each reload.
    pub access_log: Option<PathBuf>,
    /// Traces of requests, sent to a collector by OTLP.
    pub traces: Option<TracesConfig>,
    /// Requests that take longer are warnings in the log too.
    pub slow_request: Option<HumanDuration>,
    /// Static files and compiled assets that are kept.
    #[serde(default)]
    pub cache: CacheConfig,
    /// How hard answers are compressed for clients that take it, from 1 to 9; 0: not at all. Kept static files up to 8 MiB always are.
    #[serde(default)]
    #[schemars(range(max = 9))]
    pub compression: u32,
    /// What is changed of the headers of all tenants; what a tenant says comes after it.
    #[serde(default)]
    pub headers: HeaderPolicyConfig,
    /// Guards logins against guessing.
    #[serde(default)]
    pub login_protection: LoginProtectionConfig,
    /// Time a client may take for a whole request header.
    #[serde(default = "seconds::<15>")]
    pub header_timeout: HumanDuration,
    /// Time without a byte while a request body is read.
    #[serde(default = "seconds::<30>")]
    pub body_timeout: HumanDuration,
    /// Time an idle keep-alive connection stays open.
    #[serde(default = "seconds::<75>")]
    pub keepalive_timeout: HumanDuration,
    /// Time a client may go without taking a byte of its answer.
    #[serde(default = "seconds::<60>")]
    pub write_timeout: HumanDuration,
    /// Request bodies up to this size are held in memory, larger ones in a temporary file.
    #[serde(default = "default_spool")]
    pub spool_threshold: ByteSize,
    /// Most client connections at once.
    #[serde(default = "default_connections")]
    pub max_connections: u32,
    /// Most client connections of one address, or of one IPv6 network of 64 bits, at once; half of all if left out. Trusted proxies have no
    /// bound, and with the PROXY protocol those behind them are counted.
    pub max_connections_per_address: Option<u32>,
    /// Bytes of one answer that are read ahead of a client that takes them slowly, so that the worker is free sooner.
    #[serde(default = "default_backlog")]
    pub max_backlog: ByteSize,
    /// Where large request bodies wait for a worker, and large answers for their client; absent: the system's temporary directory.
    pub spool_directory: Option<PathBuf>,
}

/// Traces of requests, sent to a collector by OTLP over HTTP.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TracesConfig {
    /// The collector, such as `http://127.0.0.1:4318`: spans are sent to `/v1/traces` below it.
    pub endpoint: String,
    /// The part of traces that is recorded, from 0 to 1.
    #[serde(default = "hundredth")]
    #[schemars(range(min = 0, max = 1))]
    pub share: f64,
    /// Those who are believed when they say that a trace is recorded: proxies that make traces themselves, and do not just pass on
    /// what a browser says.
    #[serde(default)]
    pub believe: Vec<Network>,
    /// The value of the header Authorization, in plain text.
    pub authorization: Option<Secret>,
    /// File with the value of the header Authorization.
    pub authorization_file: Option<PathBuf>,
    /// Environment variable with the value of the header Authorization.
    pub authorization_env: Option<String>,
}

impl TracesConfig {
    /// To a collector, with nothing else said.
    pub fn to(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            share: hundredth(),
            believe: Vec::new(),
            authorization: None,
            authorization_file: None,
            authorization_env: None,
        }
    }
}

fn hundredth() -> f64 {
    0.01
}

/// TLS for clients of the HTTP plane.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpTlsConfig {
    /// Addresses to listen on for TLS, with HTTP/2 and HTTP/1.1.
    #[schemars(with = "Vec<String>")]
    #[serde(deserialize_with = "socket_addresses")]
    pub listen: Vec<SocketAddr>,
    /// Certificates for hosts of any tenant, chosen by the names in them. The first is shown to whoever names no host.
    #[serde(default)]
    pub certificates: Vec<CertificateConfig>,
    /// Certificates from an authority, for the hosts that none of the files is for.
    pub acme: Option<AcmeConfig>,
    /// Whether plain requests are sent to the same address with https.
    #[serde(default = "yes")]
    pub redirect: bool,
    /// How long browsers shall insist on TLS (Strict-Transport-Security); absent: they are not told to.
    pub hsts: Option<HumanDuration>,
}

/// Certificates that an authority signs when it is asked by ACME (RFC 8555).
///
/// Each host of a tenant for which there is no file gets one of its own: one whose name does not lead here fails alone.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AcmeConfig {
    /// The address of the authority's directory.
    #[serde(default = "lets_encrypt")]
    pub directory: String,
    /// PEM file with the authorities that have signed the directory's own certificate. Absent: those that this machine trusts.
    pub directory_ca: Option<PathBuf>,
    /// Whether the operator agrees to the authority's terms of service: nothing is asked for without.
    pub agree_to_terms: bool,
    /// Mail addresses that the authority may write to.
    #[serde(default)]
    pub contacts: Vec<String>,
    /// How it is proven that a host is served here.
    #[serde(default)]
    pub challenge: AcmeChallenge,
    /// Where the account, keys and certificates are kept. Gateways that serve the same hosts must share it.
    pub state_directory: PathBuf,
    /// An account that the operator has with the authority already, where it wants one.
    pub external_account: Option<ExternalAccountConfig>,
}

/// How it is proven to an authority that a host is served here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AcmeChallenge {
    /// By a file that the authority gets from port 80 of the host.
    #[default]
    #[serde(rename = "http-01")]
    Http01,
    /// By a certificate that it is shown at port 443 of the host (RFC 8737).
    #[serde(rename = "tls-alpn-01")]
    TlsAlpn01,
}

/// What binds an account to one that its operator has already.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExternalAccountConfig {
    /// The name of the key, as the authority has given it.
    pub key_id: String,
    /// The key, in base64url as the authority has given it.
    #[serde(skip_serializing)]
    pub hmac_key: Option<Secret>,
    /// A file with the key.
    pub hmac_key_file: Option<PathBuf>,
    /// An environment variable with the key.
    pub hmac_key_env: Option<String>,
}

fn lets_encrypt() -> String {
    "https://acme-v02.api.letsencrypt.org/directory".to_owned()
}

/// A certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CertificateConfig {
    /// PEM file with the certificate chain, leaf first.
    pub certificate: PathBuf,
    /// PEM file with the private key.
    pub key: PathBuf,
}

/// TLS for the hosts of one tenant.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TenantTlsConfig {
    /// PEM file with the certificate chain, leaf first. Absent: one of the gateway's certificates.
    pub certificate: Option<PathBuf>,
    /// PEM file with the private key.
    pub key: Option<PathBuf>,
    /// PEM file with the authorities that sign the clients' certificates. Given: nobody gets in without one.
    pub client_ca: Option<PathBuf>,
    /// Whether its hosts get certificates by `http.tls.acme`, where there is no file for them.
    #[serde(default = "yes")]
    pub acme: bool,
}

/// A bucket with filestores: objects are named `<prefix><database>/<two digits>/<hash>`, as files in a directory are.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FilestoreBucketConfig {
    /// Its name.
    pub bucket: String,
    /// What all objects' names begin with, such as `filestore/`.
    #[serde(default)]
    pub prefix: String,
    /// The region.
    #[serde(default = "us_east_1")]
    pub region: String,
    /// Where the store is; AWS if left out.
    pub endpoint: Option<String>,
    /// The bucket in the path and not in the host name. By default wherever there is an endpoint.
    pub path_style: Option<bool>,
    /// PEM file with the authorities that have signed the store's certificate. Absent: those that this machine trusts.
    pub ca_file: Option<PathBuf>,
    /// The access key.
    #[serde(skip_serializing)]
    pub access_key: Option<Secret>,
    /// A file with the access key.
    pub access_key_file: Option<PathBuf>,
    /// An environment variable with the access key.
    pub access_key_env: Option<String>,
    /// The secret key.
    #[serde(skip_serializing)]
    pub secret_key: Option<Secret>,
    /// A file with the secret key.
    pub secret_key_file: Option<PathBuf>,
    /// An environment variable with the secret key.
    pub secret_key_env: Option<String>,
}

fn us_east_1() -> String {
    "us-east-1".to_owned()
}

/// How much is kept.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CacheConfig {
    /// Bytes in memory, for objects up to 8 MiB. No tenant may have more than a quarter.
    #[serde(default = "default_memory")]
    pub memory: ByteSize,
    /// Bytes on disk, in `spool_directory`, for greater ones.
    #[serde(default = "default_disk")]
    pub disk: ByteSize,
    /// The largest object that is kept.
    #[serde(default = "default_object")]
    pub max_object: ByteSize,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { memory: default_memory(), disk: default_disk(), max_object: default_object() }
    }
}

fn default_memory() -> ByteSize {
    ByteSize(128 << 20)
}

fn default_disk() -> ByteSize {
    ByteSize(1 << 30)
}

fn default_object() -> ByteSize {
    ByteSize(64 << 20)
}

/// A second pool for a part of a tenant's requests.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CanaryConfig {
    /// The pool.
    pub pool: PoolName,
    /// Of a hundred browsers, how many go there; each stays where it went first. Default: 0.
    #[serde(default)]
    #[schemars(range(max = 100))]
    pub weight: u32,
    /// A request with this header goes there, whatever its value is.
    pub header: Option<String>,
}

/// What is changed of headers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderPolicyConfig {
    /// Of requests, before a server gets them.
    #[serde(default)]
    pub request: HeaderChanges,
    /// Of answers, before a client gets them.
    #[serde(default)]
    pub response: HeaderChanges,
}

/// Headers that are taken away, and headers that are set; in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderChanges {
    /// Taken away.
    #[serde(default)]
    pub remove: Vec<String>,
    /// Set, in the place of what was there.
    #[serde(default)]
    pub set: BTreeMap<String, String>,
}

/// How sleeping servers are woken.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WakeConfig {
    /// Who wakes them: asked with POST and a JSON object of `pool` and `tenant`.
    pub address: Endpoint,
    /// The path there.
    #[serde(default = "default_wake")]
    pub path: String,
    /// How long requests wait for the first server.
    #[serde(default = "seconds::<60>")]
    pub timeout: HumanDuration,
}

fn default_wake() -> String {
    "/".to_owned()
}

/// How often somebody may be wrong.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoginProtectionConfig {
    /// Failed logins in a row, of one login from one address, before the next has to wait. 0: nobody ever waits.
    #[serde(default = "default_attempts")]
    pub attempts: u32,
    /// The first wait; twice as long after each further failure.
    #[serde(default = "seconds::<2>")]
    pub first_delay: HumanDuration,
    /// The longest wait.
    #[serde(default = "seconds::<900>")]
    pub longest_delay: HumanDuration,
    /// Failed logins per minute of one tenant from all addresses that have never logged in there; beyond, such addresses wait.
    #[serde(default = "default_per_minute")]
    pub per_minute: u32,
    /// Addresses that are not guarded against.
    #[serde(default)]
    pub trusted: Vec<Network>,
}

impl Default for LoginProtectionConfig {
    fn default() -> Self {
        Self {
            attempts: default_attempts(),
            first_delay: seconds::<2>(),
            longest_delay: seconds::<900>(),
            per_minute: default_per_minute(),
            trusted: Vec::new(),
        }
    }
}

fn default_attempts() -> u32 {
    5
}

fn default_per_minute() -> u32 {
    60
}

/// A page instead of a site.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MaintenanceConfig {
    /// What is said to clients.
    pub message: Option<String>,
    /// File with a page of HTML for browsers.
    pub page: Option<PathBuf>,
    /// When to come again. Default: five minutes.
    pub retry_after: Option<HumanDuration>,
    /// Addresses that are served all the same.
    #[serde(default)]
    pub allow: Vec<Network>,
}

/// How the servers of a pool are looked after.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthConfig {
    /// What is asked for; an answer below 500 is health. A server whose workers are all busy is not asked: it is alive if it can be connected to.
    #[serde(default = "default_health")]
    pub path: String,
    /// How often each server is looked at.
    #[serde(default = "seconds::<5>")]
    pub interval: HumanDuration,
    /// How long an answer may take.
    #[serde(default = "seconds::<3>")]
    pub timeout: HumanDuration,
    /// Failures in a row that make a server ill.
    #[serde(default = "default_streak::<3>")]
    pub unhealthy_after: u32,
    /// Successes in a row that make it well again.
    #[serde(default = "default_streak::<2>")]
    pub healthy_after: u32,
}

fn default_health() -> String {
    "/web/health".to_owned()
}

fn default_streak<const N: u32>() -> u32 {
    N
}

/// A URL scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// Plain HTTP.
    Http,
    /// HTTP over TLS.
    Https,
}

impl Scheme {
    /// The name used in URLs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

fn default_scheme() -> Scheme {
    Scheme::Http
}

/// Client addresses that are let in, and that are not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworksConfig {
    /// Only these; empty: everybody.
    #[serde(default)]
    pub allow: Vec<Network>,
    /// Not these, whatever `allow` says.
    #[serde(default)]
    pub deny: Vec<Network>,
}

impl NetworksConfig {
    /// Whether a client with this address is let in.
    pub fn admits(&self, address: IpAddr) -> bool {
        !Network::any(&self.deny, address) && (self.allow.is_empty() || Network::any(&self.allow, address))
    }
}

/// One internal route that some addresses may use.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InternalRouteConfig {
    /// The path, with everything below it: `/web/database`.
    pub path: String,
    /// The addresses that may use it.
    pub from: Vec<Network>,
}
