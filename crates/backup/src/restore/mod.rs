//! Restoring: load beside, verify, and only then put in place. Nothing is ever dropped to make room.
//!
//! A set is loaded into a database under a name that nothing routes to, checked against what was saved, given a new
//! identity where it is a copy, and renamed. Whatever fails before that leaves the world as it was; the half-loaded
//! database is removed.

mod dumped;
mod files;
mod gateway;
mod identity;
mod load;
mod loader;
mod point;
mod settings;
mod swap;
mod tree;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use cofferdam_tenant::Slug;

pub(crate) use dumped::Dumped;
pub(crate) use files::{Hashing, manifest};
pub use gateway::GatewayConsole;
pub(crate) use loader::Loader;
pub use swap::Previous;
pub(crate) use tree::Tree;

use crate::logical::blocking;
use crate::model::{
    BackupSet, DatabaseLocale, Extension, FilestoreSummary, Parallel, RestoreMode, RestorePlan, RestorePoint, Restored,
};
use crate::repository::{Repository, RepositoryKey, Store};
use crate::server::{Server, quoted};
use crate::{Control, Error};
use settings::Access;

/// Where a tenant is restored from and to.
#[derive(Debug, Clone)]
pub struct Restore {
    /// Whose backups.
    pub tenant: Slug,
    /// The server that gets the database, with a role that may create databases there.
    pub server: Server,
    /// The tenant's database, which a swap replaces.
    pub database: String,
    /// The role that shall own what is restored; the owner of the tenant's database if there is none.
    pub owner: Option<String>,
    /// The directory of filestores, `<data_dir>/filestore`: each database has one below it.
    pub filestores: PathBuf,
    /// Where the objects are.
    pub store: Arc<dyn Store>,
    /// The key of the tenant's repository.
    pub key: RepositoryKey,
    /// The gateway in front, which lets transactions wait while databases are renamed.
    pub gateway: Option<GatewayConsole>,
    /// How large databases are loaded.
    pub parallel: Parallel,
}

impl Restore {
    /// What a restore would do, for somebody to agree to. Changes nothing.
    pub async fn plan(&self, point: &RestorePoint, mode: &RestoreMode) -> Result<RestorePlan, Error> {
        let repository = self.repository().await?;
        let set = self.find(&repository, point).await?;
        self.plan_for(&set, mode).await
    }

    /// Restores. On an error nothing that was there has changed, and nothing half-loaded stays.
    ///
    /// Not safe to drop in the middle: what is half-loaded then stays under its own name, `…__restore_…`, until somebody
    /// drops it. Use [`Control::cancel`].
    pub async fn run(&self, point: &RestorePoint, mode: &RestoreMode, control: &Control) -> Result<Restored, Error> {
        let started = Instant::now();
        let repository = self.repository().await?;
        let set = self.find(&repository, point).await?;
        let plan = self.plan_for(&set, mode).await?;
        if !set.consistency.is_complete() {
            let FilestoreSummary { missing, damaged, .. } = set.filestore;
            control.warn(format!("of this backup's files {missing} are missing and {damaged} differ"));
        }
        let made = AtomicBool::new(false);
        let outcome = self.carry_out(&repository, &set, &plan, mode, &made, control).await;
        let (previous, paused_ms) = match outcome {
            Ok(done) => done,
            Err(error) => {
                self.clear(&plan.staging, &made, control).await;
                return Err(error);
            }
        };
        Ok(Restored {
            set: set.id,
            taken_at: set.taken_at,
            database: plan.database,
            filestore: plan.filestore,
            previous,
            files: set.filestore.files,
            took_ms: started.elapsed().as_millis() as u64,
            paused_ms,
        })
    }

    async fn carry_out(
        &self,
        repository: &Arc<Repository>,
        set: &BackupSet,
        plan: &RestorePlan,
        mode: &RestoreMode,
        made: &AtomicBool,
        control: &Control,
    ) -> Result<(Option<String>, Option<u64>), Error> {
        control.phase("loading the database", Some(set.artifact.bytes));
        let in_place = matches!(mode, RestoreMode::InPlaceSwap);
        let owner = self.owner().await?;
        let artifact = &set.artifact;
        load::create_for(&self.server, &plan.staging, &artifact.locale, &artifact.extensions, &owner, made).await?;
        let loader = Loader::create(&self.server, &plan.staging, &owner).await?;
        let loaded = async {
            load::database(&loader, &plan.staging, in_place, (repository, set), &self.parallel, control).await?;
            control.phase("comparing rows", None);
            load::compare_rows(&self.server, &plan.staging, repository, set).await?;
            self.identify(&loader, &plan.staging, mode, set.artifact.uuid.as_deref()).await
        };
        let loaded = control.unless_cancelled(loaded).await;
        loader.remove_after(loaded, &self.server, &plan.staging, control).await?;
        let target = self.filestores.join(&plan.database);
        control.phase("writing files", Some(set.filestore.bytes));
        if in_place {
            return self.swap(repository, set, plan, &target, control).await;
        }
        files::fresh(repository, set, &target, control).await?;
        let renamed = self.put_in_place(plan, &owner).await;
        self.or_without_target(renamed, plan, &target, control).await.map(|()| (None, None))
    }

    /// A copy becomes somebody else; what goes in place stays who it is.
    async fn identify(
        &self,
        loader: &Loader,
        staging: &str,
        mode: &RestoreMode,
        uuid: Option<&str>,
    ) -> Result<(), Error> {
        let (base_url, keep) = match mode {
            RestoreMode::Scratch => (None, false),
            RestoreMode::NewTenant { base_url, keep_integrations, .. } => (base_url.as_deref(), *keep_integrations),
            RestoreMode::InPlaceSwap => return self.outdate_caches(loader, &self.database, staging).await,
        };
        identity::make_new(loader, staging, base_url, keep).await?;
        identity::verify(&self.server, staging, uuid, keep).await
    }

    pub(crate) async fn make_copy(
        &self,
        loader: &Loader,
        staging: &str,
        base_url: Option<&str>,
        keep_integrations: bool,
    ) -> Result<(), Error> {
        identity::make_new(loader, staging, base_url, keep_integrations).await?;
        identity::verify(&self.server, staging, None, keep_integrations).await
    }

    pub(crate) async fn create_for(
        &self,
        staging: &str,
        locale: &DatabaseLocale,
        extensions: &[Extension],
        owner: &str,
        made: &AtomicBool,
    ) -> Result<(), Error> {
        load::create_for(&self.server, staging, locale, extensions, owner, made).await
    }

    /// Removes a half-loaded database, if it was this restore that has made it: another may be loading under the name.
    pub(crate) async fn clear(&self, staging: &str, made: &AtomicBool, control: &Control) {
        if made.load(Ordering::SeqCst)
            && let Err(left) = self.drop_database(staging).await
        {
            control.warn(format!("the half-loaded database {staging} stays: {left}"));
        }
    }

    /// From its hidden name to the one that is asked for. Until here nothing could have connected by it.
    pub(crate) async fn put_in_place(&self, plan: &RestorePlan, owner: &str) -> Result<(), Error> {
        let client = self.server.connect(&self.server.maintenance).await?;
        let failed = |e: &tokio_postgres::Error| self.server.failed(&plan.staging, e);
        let access = Access::of(&client, &self.database).await.map_err(|e| failed(&e))?;
        let (staging, database) = (quoted(&plan.staging), quoted(&plan.database));
        // Who may connect to the original is not who may connect to a copy.
        let give = access.for_everybody().grant(&plan.staging);
        let owner = quoted(owner);
        let statements =
            format!("ALTER DATABASE {staging} OWNER TO {owner}; {give}ALTER DATABASE {staging} RENAME TO {database}");
        self.insist(&client, &[&plan.staging], &statements).await.map_err(|e| failed(&e))
    }

    /// The outcome of putting something in place; where that has not happened, its files are removed. An error may have come
    /// after it: then they belong to the database that is there.
    pub(crate) async fn or_without_target<T>(
        &self,
        placed: Result<T, Error>,
        plan: &RestorePlan,
        target: &std::path::Path,
        control: &Control,
    ) -> Result<T, Error> {
        if placed.is_err() {
            match self.databases(&[&plan.database]).await {
                Ok(there) if there.is_empty() => drop(tokio::fs::remove_dir_all(target).await),
                _ => control.warn(format!("the files in {} stay: {} may be in place", target.display(), plan.database)),
            }
        }
        placed
    }

    /// Which database it will be in the end, and through which; refused where something is in the way.
    pub(crate) async fn plan_names(&self, short: &str, mode: &RestoreMode) -> Result<RestorePlan, Error> {
        let database = match mode {
            RestoreMode::Scratch => format!("{}__scratch_{short}", self.database),
            RestoreMode::NewTenant { database, .. } => database.clone(),
            RestoreMode::InPlaceSwap => self.database.clone(),
        };
        let in_place = matches!(mode, RestoreMode::InPlaceSwap);
        let staging = format!("{}__restore_{short}", self.database);
        for name in [&database, &staging] {
            if name.len() > LONGEST_NAME || name.is_empty() || name.contains('\0') || name.contains('/') {
                let problem = format!("`{name}` cannot be the name of a database and its files");
                return Err(Error::Refused(format!("{problem}: expected 1 to {LONGEST_NAME} bytes without `/`")));
            }
        }
        self.owner().await?;
        let target = self.filestores.join(&database);
        if in_place && let Some(apart) = files::apart(&self.filestores, &target) {
            return Err(Error::Refused(format!("{apart}; nothing was changed")));
        }
        let existing = self.databases(&[&database, &staging]).await?;
        if existing.contains(&staging) {
            let advice = "if no restore is running it was left by one that died: drop it and try again";
            return Err(Error::Refused(format!("database {staging} is there already; {advice}")));
        }
        if in_place != existing.contains(&database) {
            let problem = if in_place { "is not there" } else { "is there already" };
            return Err(Error::Refused(format!("database {database} {problem}; nothing was changed")));
        }
        if !in_place && target.exists() {
            return Err(Error::Refused(format!("{} is there already; nothing was changed", target.display())));
        }
        Ok(RestorePlan {
            set: crate::model::SetId::default(),
            taken_at: jiff::Timestamp::now(),
            database,
            staging,
            filestore: Some(target.display().to_string()),
            needed_bytes: 0,
            free_bytes: files::free_bytes(&self.filestores),
            steps: Vec::new(),
        })
    }

    async fn plan_for(&self, set: &BackupSet, mode: &RestoreMode) -> Result<RestorePlan, Error> {
        let short = set.id.short();
        let plan = self.plan_names(short, mode).await?;
        let (database, staging, free_bytes) = (&plan.database, &plan.staging, plan.free_bytes);
        let in_place = matches!(mode, RestoreMode::InPlaceSwap);
        let target = self.filestores.join(database);
        let database_free = self.free_on_server().await;
        for (place, free, needed) in [
            (self.filestores.display().to_string(), free_bytes, set.filestore.bytes),
            (self.server.name(), database_free, set.artifact.database_bytes),
        ] {
            // A tenth more, for indexes that are built anew and for whatever else is written meanwhile.
            let needed = needed + needed / 10;
            if let Some(free) = free.filter(|free| *free < needed) {
                let wanted = format!("{needed} bytes are needed and {free} are free");
                return Err(Error::Refused(format!("{place}: {wanted}; nothing was changed")));
            }
        }
        let mut steps = vec![
            format!("load backup {short} of {} into {staging}, which nothing routes to", set.taken_at),
            format!("compare the rows of {} tables", set.artifact.tables),
        ];
        if in_place {
            let pause =
                if self.gateway.is_some() { "let transactions wait at the gateway" } else { "disconnect everybody" };
            steps.push(format!("add the backup's {} files to {}", set.filestore.files, target.display()));
            steps.push(format!("{pause}, rename {database} away and {staging} to {database}, in one transaction"));
            steps.push("keep what was there, database and files, for a way back".to_owned());
        } else {
            steps.push("give it a new database.uuid and secret, and neutralize it".to_owned());
            steps.push(format!("write {} files to {} and compare their hashes", set.filestore.files, target.display()));
            steps.push(format!("rename {staging} to {database}"));
        }
        Ok(RestorePlan {
            set: set.id.clone(),
            taken_at: set.taken_at,
            needed_bytes: set.artifact.database_bytes + set.filestore.bytes,
            steps,
            ..plan
        })
    }

    async fn databases(&self, names: &[&str]) -> Result<Vec<String>, Error> {
        let client = self.server.connect(&self.server.maintenance).await?;
        let query = "SELECT datname::text FROM pg_database WHERE datname = ANY($1)";
        let rows = client.query(query, &[&names]).await;
        Ok(rows.map_err(|e| self.server.failed(&self.server.maintenance, &e))?.iter().map(|row| row.get(0)).collect())
    }

    /// Bytes that are free where the server keeps its data, if that is on this machine and we may know it.
    async fn free_on_server(&self) -> Option<u64> {
        let client = self.server.connect(&self.server.maintenance).await.ok()?;
        let row = client.query_one("SELECT current_setting('data_directory')", &[]).await.ok()?;
        let directory = PathBuf::from(row.get::<_, String>(0));
        directory.join("PG_VERSION").exists().then(|| files::free_bytes(&directory)).flatten()
    }

    async fn drop_database(&self, name: &str) -> Result<(), Error> {
        let client = self.server.connect(&self.server.maintenance).await?;
        // A template cannot be dropped, and whoever owns one can make it one.
        let plain = format!("ALTER DATABASE {} WITH IS_TEMPLATE false", quoted(name));
        let _ = client.batch_execute(&plain).await;
        let drop = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quoted(name));
        client.batch_execute(&drop).await.map_err(|e| self.server.failed(name, &e))
    }

    async fn repository(&self) -> Result<Arc<Repository>, Error> {
        let (tenant, store, key) = (self.tenant.clone(), Arc::clone(&self.store), self.key.clone());
        blocking(move || Ok(Arc::new(Repository::open(tenant, store, &key)?))).await
    }

    async fn find(&self, repository: &Arc<Repository>, point: &RestorePoint) -> Result<BackupSet, Error> {
        let (repository, point) = (Arc::clone(repository), point.clone());
        blocking(move || Ok(repository.set_at(&point)?)).await
    }
}

/// Loads a set into a new database and compares its rows; for a drill, in a server of its own, which has a role `owner`.
pub(crate) async fn load_checked(
    server: &Server,
    database: &str,
    owner: &str,
    (repository, set): (&Arc<Repository>, &BackupSet),
    parallel: &Parallel,
    control: &Control,
) -> Result<Loader, Error> {
    let made = AtomicBool::new(false);
    let artifact = &set.artifact;
    load::create_for(server, database, &artifact.locale, &artifact.extensions, owner, &made).await?;
    let loader = Loader::create(server, database, owner).await?;
    load::database(&loader, database, false, (repository, set), parallel, control).await?;
    load::compare_rows(server, database, repository, set).await?;
    Ok(loader)
}

pub(crate) async fn fresh_files(
    repository: &Arc<Repository>,
    set: &BackupSet,
    target: &std::path::Path,
    control: &Control,
) -> Result<(), Error> {
    files::fresh(repository, set, target, control).await
}

pub(crate) async fn make_new(
    loader: &Loader,
    server: &Server,
    database: &str,
    uuid: Option<&str>,
) -> Result<(), Error> {
    identity::make_new(loader, database, None, false).await?;
    identity::verify(server, database, uuid, false).await
}

/// Nobody waits for a catalog's lock for longer than this while others wait for us.
pub(crate) const LOCKS: &str = "SET LOCAL lock_timeout = '5s'";

/// PostgreSQL cuts longer names.
const LONGEST_NAME: usize = 63;

pub(crate) fn stopped(control: &Control) -> Result<(), Error> {
    if control.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}
