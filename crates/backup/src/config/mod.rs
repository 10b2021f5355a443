//! `backup.yaml`: whose databases are saved, where to, and how.

mod file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use cofferdam_tenant::yaml::{Node, Reader};
use cofferdam_tenant::{Catalog, Diagnostics, HumanDuration, Secret, Secrets, Slug, Source};
use serde_json::Value;

pub use file::{
    AzureConfig, BackupConfig, DrillConfig, GatewayEndpoint, GoogleConfig, KeyConfig, PgBackRestConfig,
    RepositoryConfig, S3Config, ServerConfig, TenantConfig,
};

use crate::Error;
use crate::drill::{Drill, ReportKey};
use crate::logical::Backup;
use crate::model::{BackupPolicy, Immutability, Parallel, RestoreDrill, RestorePoint, Schedule};
use crate::physical::{PgBackRest, Recovery};
use crate::repository::{
    AzureOptions, Cloud, Directory, GoogleOptions, KeySource, S3, S3Options, Store, StoreError, is_address,
};
use crate::restore::{GatewayConsole, Restore};
use crate::server::Server;

/// A tenant with everything that its backups and restores need.
#[derive(Debug, Clone)]
pub struct TenantSetup {
    /// Its name.
    pub tenant: Slug,
    /// Its database.
    pub database: String,
    /// Its policy.
    pub policy: BackupPolicy,
    /// Its files.
    pub filestore: PathBuf,
    server: Server,
    dump_through: Option<Server>,
    console: Option<GatewayConsole>,
    physical: Option<PgBackRestConfig>,
    owner: Option<String>,
    filestores: PathBuf,
    store: StoreSetup,
    key: KeySource,
}

#[derive(Debug, Clone)]
enum StoreSetup {
    Directory(PathBuf),
    S3(Box<S3Options>),
    Azure(Box<AzureOptions>),
    Google(Box<GoogleOptions>),
}

impl StoreSetup {
    /// The place of one tenant.
    fn of(&self, tenant: &str) -> Self {
        let replace = |text: &str| text.replace("{tenant}", tenant);
        let mut own = self.clone();
        match &mut own {
            Self::Directory(path) => *path = replace(&path.to_string_lossy()).into(),
            Self::S3(options) => options.prefix = replace(&options.prefix),
            Self::Azure(options) => options.prefix = replace(&options.prefix),
            Self::Google(options) => options.prefix = replace(&options.prefix),
        }
        own
    }

    fn open(&self, immutability: Option<Immutability>) -> Result<Arc<dyn Store>, StoreError> {
        Ok(match self {
            Self::Directory(path) => Arc::new(Directory::new(path)),
            Self::S3(options) => {
                let options = S3Options { immutability, ..(**options).clone() };
                Arc::new(S3::new(options, tokio::runtime::Handle::current())?)
            }
            Self::Azure(options) => Arc::new(Cloud::azure(options, tokio::runtime::Handle::current())?),
            Self::Google(options) => Arc::new(Cloud::google(options, tokio::runtime::Handle::current())?),
        })
    }
}

/// A place among those of tenants that no tenant can have.
const NOBODYS: &str = "_health_";

/// A configuration, understood and checked.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The file as it is written.
    pub config: BackupConfig,
    /// Every tenant, by name.
    pub tenants: Vec<TenantSetup>,
    /// Drills, where they are configured.
    pub drills: Option<DrillSetup>,
    /// Where repositories are; there is a fault where there is none.
    store: Option<StoreSetup>,
}

/// How drills are run, and where their reports go.
#[derive(Debug, Clone)]
pub struct DrillSetup {
    /// The directory of reports.
    pub reports: PathBuf,
    /// The key that signs them.
    pub key: Option<Arc<ReportKey>>,
    /// A program that has to end well before a drill passes.
    pub check_command: Vec<String>,
    /// When drills are due.
    pub schedule: Option<Schedule>,
}

/// The JSON Schema of `backup.yaml`.
pub fn backup_schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| schemars::schema_for!(BackupConfig).to_value())
}

impl Setup {
    /// The path of the gateway's configuration that a file refers to, if it does. For whoever loads both.
    pub fn catalog_of(source: &Source) -> Option<PathBuf> {
        let node = Node::parse(&source.path, &source.text).ok()?;
        node.decode::<BackupConfig>(&source.path, backup_schema(), &mut Vec::new())?.catalog
    }

    /// Reads a configuration. Every error is found, not only the first. `catalog` is what [`Self::catalog_of`] has led to.
    pub fn read(source: &Source, catalog: Option<&Catalog>, secrets: &dyn Secrets) -> Result<Self, Diagnostics> {
        let node = Node::parse(&source.path, &source.text).map_err(|d| Diagnostics(vec![d]))?;
        let mut faults = Vec::new();
        let Some(config) = node.decode::<BackupConfig>(&source.path, backup_schema(), &mut faults) else {
            return Err(Diagnostics(faults));
        };
        let mut understanding = Understanding(Reader::new(source, &node, secrets, faults));
        let (tenants, store) = understanding.tenants(&config, catalog);
        let drills = config.drills.as_ref().and_then(|drills| understanding.drills(drills));
        understanding.0.finish(Self { config, tenants, drills, store })
    }

    /// Something that writes where the repositories are, beside them, reads it again, and removes it: whether backups could
    /// be made and read now. It blocks. For S3 it works on the runtime that is current here.
    pub fn write_and_read(&self) -> Result<impl Fn() -> Result<(), StoreError> + Send + Sync + use<>, StoreError> {
        let place = self.store.as_ref().map(|store| store.of(NOBODYS).open(None)).transpose()?;
        Ok(move || {
            let Some(store) = &place else { return Ok(()) };
            // Never the same, so that nothing old is taken for it.
            let (name, text) = ("probe", jiff::Timestamp::now().to_string());
            store.write(name, vec![text.clone().into()])?;
            let read = store.read(name)?;
            store.remove(name)?;
            if read == text.as_bytes() {
                return Ok(());
            }
            let reason = "it holds something else than what was written".to_owned();
            Err(StoreError::Failed { store: store.location(), action: "read", name: name.to_owned(), reason })
        })
    }

    /// A tenant by name.
    pub fn tenant(&self, name: &str) -> Option<&TenantSetup> {
        self.tenants.iter().find(|setup| setup.tenant.as_str() == name)
    }
}

impl TenantSetup {
    /// The tenant's store. For S3 it works on the runtime that is current here.
    pub fn store(&self) -> Result<Arc<dyn Store>, StoreError> {
        self.store.open(self.policy.immutability)
    }

    /// Where the tenant's key comes from.
    pub fn key(&self) -> &KeySource {
        &self.key
    }

    /// What its backups need. Fetches the key.
    pub async fn backup(&self) -> Result<Backup, Error> {
        Ok(Backup {
            tenant: self.tenant.clone(),
            server: self.server.clone(),
            dump_through: self.dump_through.clone(),
            database: self.database.clone(),
            filestore: self.filestore.clone(),
            store: self.store().map_err(crate::repository::RepositoryError::from)?,
            key: self.fetch_key().await?,
            policy: self.policy.clone(),
        })
    }

    /// What its restores need. Fetches the key.
    pub async fn restore(&self) -> Result<Restore, Error> {
        if self.filestore != self.filestores.join(&self.database) {
            let found = format!("{}: its `filestore` is {}", self.tenant, self.filestore.display());
            let expected = format!("expected {}", self.filestores.join(&self.database).display());
            return Err(Error::Refused(format!("{found}, {expected}: a restore would not be where Odoo looks")));
        }
        Ok(Restore {
            tenant: self.tenant.clone(),
            server: self.server.clone(),
            database: self.database.clone(),
            owner: self.owner.clone(),
            filestores: self.filestores.clone(),
            store: self.store().map_err(crate::repository::RepositoryError::from)?,
            key: self.fetch_key().await?,
            gateway: self.console.clone(),
            parallel: self.policy.parallel,
        })
    }

    /// A drill of its newest backup. Fetches the key.
    pub async fn drill(&self, check_command: &[String]) -> Result<Drill, Error> {
        Ok(Drill {
            request: RestoreDrill {
                tenant: self.tenant.clone(),
                point: RestorePoint::Latest,
                check_command: check_command.to_vec(),
                check_limit: HumanDuration(CHECK),
            },
            objective: self.policy.objective,
            store: self.store().map_err(crate::repository::RepositoryError::from)?,
            key: self.fetch_key().await?,
            programs: self.server.programs.clone(),
            place: None,
            parallel: self.policy.parallel,
        })
    }

    /// The server of its database.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// A recovery of its database to an instant; none where the server has no physical backups.
    pub fn recovery(&self, at: jiff::Timestamp) -> Option<Recovery> {
        let physical = self.physical.as_ref()?;
        Some(Recovery {
            engine: Arc::new(PgBackRest {
                program: physical.program.clone(),
                stanza: physical.stanza.clone(),
                repository: physical.repository.clone(),
                cluster: Vec::new(),
                backup_options: Vec::new(),
                locks: std::env::temp_dir(),
            }),
            database: self.database.clone(),
            at,
            programs: self.server.programs.clone(),
            place: physical.scratch.clone(),
        })
    }

    async fn fetch_key(&self) -> Result<crate::repository::RepositoryKey, Error> {
        let (source, tenant) = (self.key.clone(), self.tenant.to_string());
        crate::logical::blocking(move || Ok(source.key(&tenant)?)).await
    }
}

/// How long an application's own check may take.
const CHECK: std::time::Duration = std::time::Duration::from_secs(600);

/// Programs that work on one database at a time, at most.
const MOST_JOBS: u32 = 64;

/// Understands the file.
struct Understanding<'a>(Reader<'a>);

impl<'a> std::ops::Deref for Understanding<'a> {
    type Target = Reader<'a>;

    fn deref(&self) -> &Reader<'a> {
        &self.0
    }
}

impl std::ops::DerefMut for Understanding<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Understanding<'_> {
    fn tenants(&mut self, config: &BackupConfig, catalog: Option<&Catalog>) -> (Vec<TenantSetup>, Option<StoreSetup>) {
        if config.concurrency == 0 {
            self.fault(&["concurrency"], "0", "at least 1");
        }
        self.schedule(&["policy", "schedule"], &config.policy.schedule);
        self.parallel(&["policy", "parallel", "jobs"], &config.policy.parallel);
        let store = self.repository(&config.repository);
        let key = self.key(&config.repository.key);
        let place = match &store {
            None | Some(StoreSetup::S3(_)) => None,
            Some(StoreSetup::Directory(_)) => Some("a directory"),
            Some(StoreSetup::Azure(_)) => Some("a container of Azure's"),
            Some(StoreSetup::Google(_)) => Some("a bucket of Google's"),
        };
        if let Some(place) = place {
            let own = config.tenants.iter().filter(|(_, tenant)| tenant.immutability.is_some());
            let own = own.map(|(name, _)| vec!["tenants", name.as_str(), "immutability"]);
            let all = config.policy.immutability.map(|_| vec!["policy", "immutability"]);
            for path in own.chain(all).collect::<Vec<_>>() {
                let found = format!("locks, in {place}");
                self.fault(&path, found, "an `s3` repository: elsewhere objects are not locked one by one");
            }
        }
        let servers: BTreeMap<String, Servers> = config
            .servers
            .iter()
            .filter_map(|(name, server)| Some((name.clone(), self.server(name, server)?)))
            .collect();
        let mut wanted: BTreeMap<String, TenantConfig> = config.tenants.clone();
        for tenant in catalog.into_iter().flat_map(Catalog::tenants) {
            let (Some(database), Some(cluster)) = (&tenant.database, &tenant.cluster) else { continue };
            let entry = wanted.entry(tenant.slug.to_string()).or_default();
            entry.database.get_or_insert_with(|| database.to_string());
            entry.server.get_or_insert_with(|| cluster.name.to_string());
        }
        if wanted.is_empty() {
            self.fault(&["tenants"], "no tenant", "a tenant, here or in `catalog`");
        }
        let (Some(store), Some(key)) = (store, key) else { return (Vec::new(), None) };
        if wanted.len() > 1 && !key.is_of_a_tenant() {
            let expected =
                "`{tenant}` in it: with a key of its own, a tenant's backups can be destroyed and nobody else's";
            self.fault(&["repository", "key"], "one key for all tenants", expected);
        }
        let mut setups: Vec<TenantSetup> = Vec::new();
        for (name, tenant) in wanted {
            let Some(setup) = self.tenant(config, &name, tenant, &servers, &store, &key) else { continue };
            let same = |other: &&TenantSetup| {
                other.database == setup.database
                    && (&other.server.host, other.server.port) == (&setup.server.host, setup.server.port)
            };
            if let Some(other) = setups.iter().find(same) {
                let found = format!("database {}, which is {}'s too", setup.database, other.tenant);
                self.fault(&["tenants", &name], found, "a database of its own");
            } else if let Some(other) = setups.iter().find(|other| other.filestore == setup.filestore) {
                let found = format!("files in {}, where {}'s are too", setup.filestore.display(), other.tenant);
                self.fault(&["tenants", &name], found, "a directory of its own, in `filestore`");
            }
            setups.push(setup);
        }
        (setups, Some(store))
    }

    fn tenant(
        &mut self,
        config: &BackupConfig,
        name: &str,
        tenant: TenantConfig,
        servers: &BTreeMap<String, Servers>,
        store: &StoreSetup,
        key: &KeySource,
    ) -> Option<TenantSetup> {
        let slug = match Slug::parse(name) {
            Ok(slug) => slug,
            Err(expected) => {
                self.fault(&["tenants", name], format!("`{name}`"), expected);
                return None;
            }
        };
        if let Some(schedule) = &tenant.schedule {
            self.schedule(&["tenants", name, "schedule"], schedule);
        }
        if let Some(parallel) = &tenant.parallel {
            self.parallel(&["tenants", name, "parallel", "jobs"], parallel);
        }
        let server = match &tenant.server {
            Some(server) => server.clone(),
            None if config.servers.len() == 1 => config.servers.keys().next()?.clone(),
            None => {
                let known = names(config.servers.keys());
                self.fault(&["tenants", name], "no `server`", format!("one of {known}"));
                return None;
            }
        };
        if !config.servers.contains_key(&server) {
            let known = names(config.servers.keys());
            self.fault(&["tenants", name, "server"], format!("`{server}`"), format!("one of {known}"));
        }
        let found = servers.get(&server)?.clone();
        let database = tenant.database.unwrap_or_else(|| name.to_owned());
        let policy = &config.policy;
        let filestores = self.path(&config.filestores);
        Some(TenantSetup {
            tenant: slug,
            policy: BackupPolicy {
                schedule: tenant.schedule.unwrap_or_else(|| policy.schedule.clone()),
                objective: tenant.objective.unwrap_or(policy.objective),
                retention: tenant.retention.unwrap_or(policy.retention),
                immutability: tenant.immutability.or(policy.immutability),
                fence: tenant.fence.unwrap_or(policy.fence),
                parallel: tenant.parallel.unwrap_or(policy.parallel),
            },
            filestore: tenant.filestore.map_or_else(|| filestores.join(&database), |path| self.path(&path)),
            database,
            server: found.direct,
            dump_through: found.dump_through,
            console: found.console,
            physical: found.physical,
            owner: tenant.owner,
            filestores,
            store: store.of(name),
            key: key.clone(),
        })
    }

    fn drills(&mut self, config: &DrillConfig) -> Option<DrillSetup> {
        if let Some(schedule) = &config.schedule {
            self.schedule(&["drills", "schedule"], schedule);
        }
        let key = match &config.signing_key_file {
            None => None,
            Some(file) => {
                let field = ["drills", "signing_key_file"];
                let text = self.file(&field, file)?;
                let Ok(key) = ReportKey::from_hex(&text) else {
                    let found = format!("`{}`, which is something else", file.display());
                    self.fault(&field, found, "a file with 64 hexadecimal digits");
                    return None;
                };
                Some(Arc::new(key))
            }
        };
        Some(DrillSetup {
            reports: self.path(&config.reports),
            key,
            check_command: config.check_command.clone(),
            schedule: config.schedule.clone(),
        })
    }

    fn parallel(&mut self, path: &[&str], parallel: &Parallel) {
        if !(1..=MOST_JOBS).contains(&parallel.jobs) {
            let expected = format!("1 to {MOST_JOBS} programs at a time");
            self.fault(path, parallel.jobs.to_string(), expected);
        }
    }

    fn schedule(&mut self, path: &[&str], schedule: &Schedule) {
        if let Err(error) = schedule.check() {
            let field = if matches!(error, crate::model::ScheduleError::Zone(_)) { "time_zone" } else { "cron" };
            let expected = if field == "cron" {
                "five fields such as `30 2 * * *`: minute, hour, day of month, month, day of week"
            } else {
                "a time zone such as `Europe/Berlin`"
            };
            self.fault(&[path, &[field]].concat(), error.to_string(), expected);
        }
    }

    fn repository(&mut self, config: &RepositoryConfig) -> Option<StoreSetup> {
        let RepositoryConfig { directory, s3, azure, google, key: _ } = config;
        match (directory, s3, azure, google) {
            (Some(directory), None, None, None) => {
                self.own_place(&["repository", "directory"], directory)?;
                Some(StoreSetup::Directory(self.path(Path::new(directory))))
            }
            (None, Some(s3), None, None) => {
                self.own_place(&["repository", "s3", "prefix"], &s3.prefix)?;
                let access_key = self.variable("s3", "access_key_env", &s3.access_key_env);
                let secret_key = self.variable("s3", "secret_key_env", &s3.secret_key_env);
                let ca = self.authorities("s3", s3.ca_file.as_deref()).ok()?.map(String::into_bytes);
                Some(StoreSetup::S3(Box::new(S3Options {
                    bucket: s3.bucket.clone(),
                    prefix: s3.prefix.clone(),
                    region: s3.region.clone(),
                    endpoint: s3.endpoint.clone(),
                    path_style: s3.path_style.unwrap_or(s3.endpoint.is_some()),
                    access_key: access_key?,
                    secret_key: Secret::new(secret_key?),
                    ca,
                    immutability: None,
                })))
            }
            (None, None, Some(azure), None) => {
                self.own_place(&["repository", "azure", "prefix"], &azure.prefix)?;
                self.endpoint("azure", azure.endpoint.as_deref())?;
                let access_key = match &azure.access_key_env {
                    Some(name) => Some(Secret::new(self.variable("azure", "access_key_env", name)?)),
                    None => None,
                };
                let ca = self.authorities("azure", azure.ca_file.as_deref()).ok()?;
                Some(StoreSetup::Azure(Box::new(AzureOptions {
                    account: azure.account.clone(),
                    container: azure.container.clone(),
                    prefix: azure.prefix.clone(),
                    endpoint: azure.endpoint.clone(),
                    access_key,
                    ca,
                })))
            }
            (None, None, None, Some(google)) => {
                self.own_place(&["repository", "google", "prefix"], &google.prefix)?;
                self.endpoint("google", google.endpoint.as_deref())?;
                let service_account = match &google.service_account_file {
                    Some(file) => {
                        Some(Secret::new(self.file(&["repository", "google", "service_account_file"], file)?))
                    }
                    None => None,
                };
                let ca = self.authorities("google", google.ca_file.as_deref()).ok()?;
                Some(StoreSetup::Google(Box::new(GoogleOptions {
                    bucket: google.bucket.clone(),
                    prefix: google.prefix.clone(),
                    endpoint: google.endpoint.clone(),
                    service_account,
                    ca,
                })))
            }
            (directory, s3, azure, google) => {
                let given = [directory.is_some(), s3.is_some(), azure.is_some(), google.is_some()];
                let found = match given.into_iter().filter(|given| *given).count() {
                    0 => "none of them".to_owned(),
                    several => format!("{several} of them"),
                };
                self.fault(&["repository"], found, "exactly one of `directory`, `s3`, `azure` and `google`");
                None
            }
        }
    }

    fn endpoint(&mut self, store: &str, endpoint: Option<&str>) -> Option<()> {
        let Some(wrong) = endpoint.filter(|endpoint| !is_address(endpoint)) else { return Some(()) };
        self.fault(
            &["repository", store, "endpoint"],
            format!("`{wrong}`"),
            "an address such as `https://store.internal`",
        );
        None
    }

    fn variable(&mut self, store: &str, field: &str, name: &str) -> Option<String> {
        let value = self.secrets.env(name).filter(|value| !value.is_empty());
        if value.is_none() {
            let found = format!("`{name}`, which is not set");
            self.fault(&["repository", store, field], found, "an environment variable with a key");
        }
        value
    }

    /// The text of the authorities, if there are any. An error is told already.
    fn authorities(&mut self, store: &str, file: Option<&Path>) -> Result<Option<String>, ()> {
        file.map(|file| self.file(&["repository", store, "ca_file"], file).ok_or(())).transpose()
    }

    /// Tenants in one repository would have one key.
    fn own_place(&mut self, path: &[&str], text: &str) -> Option<()> {
        if text.contains("{tenant}") {
            return Some(());
        }
        self.fault(path, format!("`{text}`"), "`{tenant}` in it, so that each tenant has a repository of its own");
        None
    }

    fn key(&mut self, key: &KeyConfig) -> Option<KeySource> {
        match (&key.file, &key.env, &key.command) {
            (Some(file), None, None) => Some(KeySource::File(self.path(file))),
            (None, Some(env), None) => Some(KeySource::Env(env.clone())),
            (None, None, Some(words)) if !words.is_empty() => Some(KeySource::Command(words.clone())),
            _ => {
                let count = [key.file.is_some(), key.env.is_some(), key.command.is_some()];
                let found = format!("{} of them", count.iter().filter(|given| **given).count());
                self.fault(&["repository", "key"], found, "exactly one of `file`, `env` and `command`");
                None
            }
        }
    }

    fn server(&mut self, name: &str, config: &ServerConfig) -> Option<Servers> {
        let at = ["servers", name];
        let (file, variable) = (config.password_file.as_deref(), config.password_env.as_deref());
        let password = self.password(&at, file, variable)?;
        let direct = Server {
            host: config.host.clone(),
            port: config.port,
            user: config.user.clone(),
            password,
            tls: self.tls(&[at[0], at[1], "tls"], &config.tls)?,
            maintenance: config.maintenance.clone(),
            programs: config.programs.as_deref().map(|path| self.path(path)),
        };
        let Some(gateway) = &config.gateway else {
            return Some(Servers { direct, dump_through: None, console: None, physical: config.pgbackrest.clone() });
        };
        let tls = self.tls(&[at[0], at[1], "gateway", "tls"], &gateway.tls)?;
        let through = Server { host: gateway.host.clone(), port: gateway.port, tls, ..direct.clone() };
        let console = match &gateway.console_user {
            Some(user) => {
                let field = [at[0], at[1], "gateway", "console_password_file"];
                let password = self.secret_file(&field, gateway.console_password_file.as_deref())?;
                let server = Server { user: user.clone(), password, ..through.clone() };
                Some(GatewayConsole::new(server, "cofferdam"))
            }
            None => None,
        };
        let physical = config.pgbackrest.clone();
        Some(Servers { direct, dump_through: gateway.dump_through.then_some(through), console, physical })
    }
}

#[derive(Debug, Clone)]
struct Servers {
    direct: Server,
    dump_through: Option<Server>,
    console: Option<GatewayConsole>,
    physical: Option<PgBackRestConfig>,
}

fn names<'a>(known: impl Iterator<Item = &'a String>) -> String {
    known.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_tenant::NoSecrets;

    fn read(text: &str) -> Result<Setup, Diagnostics> {
        Setup::read(&Source::new("/etc/cofferdam/backup.yaml", text), None, &NoSecrets)
    }

    const GOOD: &str = "
repository: { directory: 'repositories/{tenant}', key: { file: 'keys/{tenant}.key' } }
servers: { main: { host: 127.0.0.1, user: odoo } }
filestores: /var/lib/odoo/filestore
policy: { schedule: { cron: '30 1 * * *', time_zone: Europe/Berlin } }
tenants:
  acme: {}
  beta: { database: beta_prod, retention: { daily: 30 }, schedule: { cron: '0 * * * *' } }
";

    #[test]
    fn a_tenant_inherits_what_it_does_not_say() {
        let setup = read(GOOD).unwrap();
        let (acme, beta) = (setup.tenant("acme").unwrap(), setup.tenant("beta").unwrap());
        assert_eq!((acme.database.as_str(), beta.database.as_str()), ("acme", "beta_prod"));
        assert_eq!(acme.policy.schedule.time_zone, "Europe/Berlin");
        assert_eq!(beta.policy.retention.daily, 30);
        assert_eq!(beta.filestore, Path::new("/var/lib/odoo/filestore/beta_prod"));
        assert!(matches!(&beta.store, StoreSetup::Directory(p) if p == Path::new("/etc/cofferdam/repositories/beta")));
        assert_eq!(beta.key, KeySource::File("/etc/cofferdam/keys/{tenant}.key".into()));
    }

    #[test]
    fn what_would_have_no_effect_or_a_bad_one_is_refused() {
        let wrong =
            GOOD.replace("keys/{tenant}.key", "keys/all.key").replace("acme: {}", "acme: { database: beta_prod }");
        let wrong = wrong.replace("policy: {", "policy: { immutability: { period: 30d },");
        let wrong = format!("{wrong}drills: {{ reports: r, signing_key_file: k, schedule: {{ cron: 'no' }} }}\n");
        let text = read(&wrong).unwrap_err().to_string();
        for expected in [
            "repository.key: found one key for all tenants, expected `{tenant}` in it",
            "tenants.beta: found database beta_prod, which is acme's too, expected a database of its own",
            "policy.immutability: found locks, in a directory, expected an `s3` repository",
            "drills.signing_key_file: found `k`",
            "drills.schedule.cron: found `no`",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }

    #[test]
    fn each_store_is_one_and_has_what_it_needs() {
        let with = |store: &str| {
            let text = GOOD.replace("directory: 'repositories/{tenant}'", store);
            assert!(text != GOOD);
            read(&text).map_err(|faults| faults.to_string())
        };
        let azure = with("azure: { account: acme, container: backups }").unwrap();
        assert!(matches!(&azure.tenant("beta").unwrap().store, StoreSetup::Azure(o) if o.prefix == "beta/"));
        let google = with("google: { bucket: backups, prefix: 'odoo/{tenant}/' }").unwrap();
        assert!(matches!(&google.tenant("beta").unwrap().store, StoreSetup::Google(o) if o.prefix == "odoo/beta/"));
        for (store, expected) in [
            (
                "azure: { account: a, container: c }, google: { bucket: b }",
                "repository: found 2 of them, expected exactly one of",
            ),
            (
                "azure: { account: a, container: c, prefix: all/ }",
                "repository.azure.prefix: found `all/`, expected `{tenant}` in it",
            ),
            (
                "azure: { account: a, container: c, endpoint: 'localhost:10000/a' }",
                "repository.azure.endpoint: found `localhost:10000/a`, expected an address such as",
            ),
            (
                "azure: { account: a, container: c, access_key_env: NO_KEY }",
                "repository.azure.access_key_env: found `NO_KEY`, which is not set",
            ),
            (
                "google: { bucket: b, service_account_file: none.json }",
                "repository.google.service_account_file: found `none.json`",
            ),
        ] {
            let text = with(store).map(drop).unwrap_err();
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }

    #[test]
    fn every_error_is_told_with_its_place() {
        let wrong = "
repository: { directory: /backups, key: { file: a, env: B } }
servers: { main: { host: a, user: odoo }, other: { host: b, user: odoo, password_env: NOPE } }
filestores: /f
concurrency: 0
policy: { schedule: { cron: 'every day' } }
tenants:
  acme: {}
  UPPER: { server: main }
  beta: { server: mian, schedule: { time_zone: Mars/Olympus } }
";
        let faults = read(wrong).unwrap_err().0;
        let text: Vec<String> = faults.iter().map(ToString::to_string).collect();
        for expected in [
            "backup.yaml:2:26: repository.directory: found `/backups`, expected `{tenant}` in it",
            "repository.key: found 2 of them, expected exactly one of `file`, `env` and `command`",
            "servers.other.password_env: found `NOPE`, which is not set",
            "backup.yaml:5:14: concurrency: found 0, expected at least 1",
            "policy.schedule.cron: found `every day`",
        ] {
            assert!(text.iter().any(|t| t.contains(expected)), "{expected}\n{}", text.join("\n"));
        }
        let wrong = wrong.replace("/backups,", "'/backups/{tenant}',").replace("file: a, env: B", "env: B");
        let text = read(&wrong).unwrap_err().to_string();
        for expected in [
            "tenants.acme: found no `server`, expected one of `main`, `other`",
            "tenants.UPPER: found `UPPER`",
            "tenants.beta.server: found `mian`, expected one of `main`, `other`",
            "tenants.beta.schedule.time_zone: found `Mars/Olympus`",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }
}
