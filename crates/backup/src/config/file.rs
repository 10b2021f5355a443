//! The file as it is written.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cofferdam_tenant::{ByteSize, HumanDuration, ServerTls};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::{BackupPolicy, FenceLimits, Immutability, Parallel, RecoveryObjective, Retention, Schedule};

/// The file.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupConfig {
    /// Where backups go. `{tenant}` stands for the tenant, and must be there: each has a repository of its own.
    pub repository: RepositoryConfig,
    /// The servers of the databases, by name.
    pub servers: BTreeMap<String, ServerConfig>,
    /// The directory with a filestore for each database: `<data_dir>/filestore` of Odoo.
    pub filestores: PathBuf,
    /// What holds for every tenant that says nothing else.
    #[serde(default)]
    pub policy: BackupPolicy,
    /// The gateway's `cofferdam.yaml`: its tenants are saved too, with their databases, from the server that is named like their cluster.
    pub catalog: Option<PathBuf>,
    /// Tenants, by name.
    #[serde(default)]
    pub tenants: BTreeMap<String, TenantConfig>,
    /// How many backups run at a time.
    #[serde(default = "two")]
    pub concurrency: u32,
    /// Bytes that all backups together read per second, at most.
    pub bandwidth: Option<ByteSize>,
    /// How long the database and the files that a swap has replaced are kept for a way back.
    #[serde(default = "a_week")]
    pub keep_previous: HumanDuration,
    /// Where reports of drills go, and the key that signs them.
    pub drills: Option<DrillConfig>,
}

/// Where backups go.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RepositoryConfig {
    /// A directory, such as `/var/backups/cofferdam/{tenant}`.
    pub directory: Option<String>,
    /// A bucket instead.
    pub s3: Option<S3Config>,
    /// A container of Azure's instead.
    pub azure: Option<AzureConfig>,
    /// A bucket of Google's instead.
    pub google: Option<GoogleConfig>,
    /// The key that encrypts: exactly one of its fields.
    pub key: KeyConfig,
}

/// A bucket.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct S3Config {
    /// Its name.
    pub bucket: String,
    /// What objects' names begin with, such as `backups/{tenant}/`.
    #[serde(default = "tenant_prefix")]
    pub prefix: String,
    /// The region.
    #[serde(default = "a_region")]
    pub region: String,
    /// Where the store is; AWS if left out.
    pub endpoint: Option<String>,
    /// The bucket in the path and not in the host name. By default wherever there is an endpoint.
    pub path_style: Option<bool>,
    /// The environment variable with the access key.
    #[serde(default = "access_key")]
    pub access_key_env: String,
    /// The environment variable with the secret key.
    #[serde(default = "secret_key")]
    pub secret_key_env: String,
    /// A file with a certificate authority of one's own.
    pub ca_file: Option<PathBuf>,
}

/// A container of Azure's Blob Storage.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AzureConfig {
    /// The storage account.
    pub account: String,
    /// The container's name.
    pub container: String,
    /// What objects' names begin with, such as `backups/{tenant}/`.
    #[serde(default = "tenant_prefix")]
    pub prefix: String,
    /// Where the account's blobs are; `https://<account>.blob.core.windows.net` if left out.
    pub endpoint: Option<String>,
    /// The environment variable with the account's key. Without one, the identity that Azure gives to the machine.
    pub access_key_env: Option<String>,
    /// A file with a certificate authority of one's own.
    pub ca_file: Option<PathBuf>,
}

/// A bucket of Google's Cloud Storage.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GoogleConfig {
    /// Its name.
    pub bucket: String,
    /// What objects' names begin with, such as `backups/{tenant}/`.
    #[serde(default = "tenant_prefix")]
    pub prefix: String,
    /// Where the store is; Google's own if left out.
    pub endpoint: Option<String>,
    /// The file with a service account's key, as Google gives it out. Without one, the application default credentials of whoever runs
    /// this, or the account of the machine.
    pub service_account_file: Option<PathBuf>,
    /// A file with a certificate authority of one's own.
    pub ca_file: Option<PathBuf>,
}

/// Where the key comes from. Exactly one.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// A file; `{tenant}` stands for the tenant.
    pub file: Option<PathBuf>,
    /// An environment variable; `{tenant}` stands for the tenant in capitals.
    pub env: Option<String>,
    /// A program and its arguments, which prints the key; `{tenant}` stands for the tenant.
    pub command: Option<Vec<String>>,
}

/// A server.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// Its name, address, or the directory of its socket.
    pub host: String,
    /// Its port.
    #[serde(default = "postgres_port")]
    pub port: u16,
    /// The role. For backups it needs the rights of the databases' owner, for restores `CREATEDB` besides.
    pub user: String,
    /// The file with the role's password.
    pub password_file: Option<PathBuf>,
    /// The environment variable with the role's password.
    pub password_env: Option<String>,
    /// A database that is always there.
    #[serde(default = "maintenance")]
    pub maintenance: String,
    /// How connections to it are encrypted.
    #[serde(default)]
    pub tls: ServerTls,
    /// The directory of `pg_dump` and `pg_restore`.
    pub programs: Option<PathBuf>,
    /// The gateway in front of it.
    pub gateway: Option<GatewayEndpoint>,
    /// Physical backups of the whole server, for points in time.
    pub pgbackrest: Option<PgBackRestConfig>,
}

/// pgBackRest's backups of a server.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PgBackRestConfig {
    /// The stanza.
    pub stanza: String,
    /// Options that lead to the repository, such as `--repo1-path=/var/lib/pgbackrest`. Its configuration files are not read.
    pub repository: Vec<String>,
    /// The program.
    #[serde(default = "pgbackrest")]
    pub program: PathBuf,
    /// A directory with room for the recovered server; that of temporary files if left out.
    pub scratch: Option<PathBuf>,
}

/// The gateway in front of a server.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GatewayEndpoint {
    /// Its host.
    pub host: String,
    /// Its PostgreSQL port.
    pub port: u16,
    /// How connections to it are encrypted.
    #[serde(default)]
    pub tls: ServerTls,
    /// An administrator of its console, who lets transactions wait during a swap.
    pub console_user: Option<String>,
    /// The file with the administrator's password.
    pub console_password_file: Option<PathBuf>,
    /// Whether `pg_dump` goes through it and waits its turn. The server's role must be known to it.
    #[serde(default)]
    pub dump_through: bool,
}

/// A tenant.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TenantConfig {
    /// Its database; by default it is named like the tenant.
    pub database: Option<String>,
    /// The server of its database; may be left out when there is only one.
    pub server: Option<String>,
    /// The role that owns what is restored as a new database.
    pub owner: Option<String>,
    /// Its filestore, if it is not `<filestores>/<database>`.
    pub filestore: Option<PathBuf>,
    /// Its own schedule.
    pub schedule: Option<Schedule>,
    /// Its own objectives.
    pub objective: Option<RecoveryObjective>,
    /// Its own retention.
    pub retention: Option<Retention>,
    /// Its own immutability.
    pub immutability: Option<Immutability>,
    /// Its own limits for the fence.
    pub fence: Option<FenceLimits>,
    /// What is a large database of its, and how many programs dump and load it.
    pub parallel: Option<Parallel>,
}

/// Drills.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DrillConfig {
    /// The directory of reports.
    pub reports: PathBuf,
    /// The file with the key that signs them: 32 bytes in hexadecimal. Without one they are not signed.
    pub signing_key_file: Option<PathBuf>,
    /// A program that is started when the restored database is up; a drill passes only when it ends with 0.
    #[serde(default)]
    pub check_command: Vec<String>,
    /// When `cofferdam backup run` runs a drill of each tenant; never if left out.
    pub schedule: Option<Schedule>,
}

fn two() -> u32 {
    2
}

fn a_week() -> HumanDuration {
    HumanDuration(std::time::Duration::from_secs(7 * 86_400))
}

fn postgres_port() -> u16 {
    5432
}

fn maintenance() -> String {
    "postgres".to_owned()
}

fn pgbackrest() -> PathBuf {
    "pgbackrest".into()
}

fn tenant_prefix() -> String {
    "{tenant}/".to_owned()
}

fn a_region() -> String {
    "us-east-1".to_owned()
}

fn access_key() -> String {
    "AWS_ACCESS_KEY_ID".to_owned()
}

fn secret_key() -> String {
    "AWS_SECRET_ACCESS_KEY".to_owned()
}
