//! Drills: whether a backup can really be restored, how long it takes, and how much would be lost.
//!
//! A drill restores into a PostgreSQL of its own, which it starts and removes, and compares: rows with those counted in
//! the snapshot, indexes with their tables, every file with its hash. Nothing of production is touched.

mod report;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

pub use report::{ReportKey, ReportSignature, SignedReport};

use crate::logical::blocking;
use crate::model::{BackupSet, CheckOutcome, CheckState, DrillReport, Parallel, RecoveryObjective, RestoreDrill};
use crate::repository::{Depth, Repository, RepositoryKey, Store};
use crate::restore::{fresh_files, load_checked, make_new};
use crate::scratch::ScratchCluster;
use crate::server::Server;
use crate::{Control, Error};

/// What a drill needs.
#[derive(Debug, Clone)]
pub struct Drill {
    /// What is tried.
    pub request: RestoreDrill,
    /// What it is measured by.
    pub objective: RecoveryObjective,
    /// Where the objects are.
    pub store: Arc<dyn Store>,
    /// The key of the tenant's repository.
    pub key: RepositoryKey,
    /// The directory of PostgreSQL's programs; the newest installed if none.
    pub programs: Option<PathBuf>,
    /// Where the restored database and files are for a while; the directory for temporary files if none.
    pub place: Option<PathBuf>,
    /// How large databases are loaded: as they would be in earnest.
    pub parallel: Parallel,
}

/// The database that a drill restores into.
const DATABASE: &str = "drill";
/// Whose it is there.
const OWNER: &str = "drill_owner";

impl Drill {
    /// Runs the drill. That a check fails is a result; an error means that there was nothing to try, such as no backup.
    pub async fn run(&self, control: &Control) -> Result<DrillReport, Error> {
        let started_at = Timestamp::now();
        let started = Instant::now();
        let (tenant, store, key) = (self.request.tenant.clone(), Arc::clone(&self.store), self.key.clone());
        let repository = Arc::new(blocking(move || Ok(Repository::open(tenant, store, &key)?)).await?);
        let set = {
            let (repository, point) = (Arc::clone(&repository), self.request.point.clone());
            blocking(move || Ok(repository.set_at(&point)?)).await?
        };
        control.phase("starting a private server", None);
        let cluster = {
            let (programs, place) = (self.programs.clone(), self.place.clone());
            blocking(move || ScratchCluster::fresh(programs.as_deref(), place.as_deref())).await?
        };
        let mut checks = Vec::new();
        let restored = self.restore(&cluster, &repository, &set, &mut checks, control);
        let restored = control.unless_cancelled(restored).await;
        if matches!(restored, Err(Error::Cancelled)) {
            return Err(Error::Cancelled);
        }
        let rto_ms = started.elapsed().as_millis() as u64;
        if restored.is_ok() {
            let examined = async {
                self.examine(&cluster, &mut checks, control).await;
                Ok(())
            };
            control.unless_cancelled(examined).await?;
        } else {
            self.name_objects(&repository, &mut checks).await;
        }
        // Stopping the server and removing its files blocks.
        blocking(move || {
            drop(cluster);
            Ok(())
        })
        .await?;
        let rpo_ms = u64::try_from(started_at.duration_since(set.taken_at).as_millis()).unwrap_or(0);
        for (name, reached, wanted) in
            [("recovery time", rto_ms, self.objective.rto), ("recovery point", rpo_ms, self.objective.rpo)]
        {
            let met = restored.is_ok() && u128::from(reached) <= wanted.0.as_millis();
            let detail = format!("{:.1} s, the objective is {wanted}", reached as f64 / 1_000.0);
            checks.push(outcome(name, met, detail));
        }
        let passed = checks.iter().all(|check| check.state != CheckState::Fail);
        Ok(DrillReport {
            tenant: self.request.tenant.clone(),
            set: set.id,
            started_at,
            passed,
            objective: self.objective,
            rto_ms,
            rpo_ms,
            checks,
        })
    }

    /// What has to be done before anybody could work again.
    async fn restore(
        &self,
        cluster: &ScratchCluster,
        repository: &Arc<Repository>,
        set: &BackupSet,
        checks: &mut Vec<CheckOutcome>,
        control: &Control,
    ) -> Result<(), Error> {
        control.phase("restoring", Some(set.artifact.bytes + set.filestore.bytes));
        let complete = set.consistency.is_complete();
        let detail = if complete {
            format!("{}: {} files", set.consistency, set.filestore.files)
        } else {
            format!("{} files are missing, {} differ", set.filestore.missing, set.filestore.damaged)
        };
        checks.push(outcome("the set is complete", complete, detail));
        let mut step = |name: &str, detail: String, result: Result<(), Error>| {
            checks.push(match &result {
                Ok(()) => outcome(name, true, detail),
                Err(error) => outcome(name, false, error.to_string()),
            });
            result
        };
        // What a tenant has written must not run as the superuser of a server, not even of one that is private: programs
        // could be started by it, as the account that other servers' files belong to.
        let client = cluster.server.connect("postgres").await?;
        let owner = format!("CREATE ROLE {OWNER} LOGIN");
        client.batch_execute(&owner).await.map_err(|e| cluster.server.failed(DATABASE, &e))?;
        let loaded = load_checked(&cluster.server, DATABASE, OWNER, (repository, set), &self.parallel, control).await;
        let (loader, loaded) = match loaded {
            Ok(loader) => (Some(loader), Ok(())),
            Err(error) => (None, Err(error)),
        };
        let rows = format!("{} rows in {} tables, as counted when saved", set.artifact.rows, set.artifact.tables);
        step("the database loads and has every row", rows, loaded)?;
        let files = fresh_files(repository, set, &cluster.path().join("filestore").join(DATABASE), control).await;
        let hashes = format!("{} files, each with the SHA-1 that it is named after", set.filestore.files);
        step("every file is there", hashes, files)?;
        let neutral = match &loader {
            Some(loader) => make_new(loader, &cluster.server, DATABASE, set.artifact.uuid.as_deref()).await,
            None => Ok(()),
        };
        let neutral = match loader {
            Some(loader) => loader.remove_after(neutral, &cluster.server, DATABASE, control).await,
            None => neutral,
        };
        step("it is neutralized", "new identity; mail, jobs and integrations are off".to_owned(), neutral)?;
        // For the application's own check.
        let client = cluster.server.connect("postgres").await?;
        let enter = format!("GRANT CONNECT, TEMPORARY ON DATABASE {DATABASE} TO {OWNER}");
        client.batch_execute(&enter).await.map_err(|e| cluster.server.failed(DATABASE, &e))
    }

    /// What shows that the restored state is sound.
    async fn examine(&self, cluster: &ScratchCluster, checks: &mut Vec<CheckOutcome>, control: &Control) {
        control.phase("examining", None);
        checks.push(match amcheck(&cluster.server, DATABASE).await {
            Ok(Some(indexes)) => outcome("indexes and tables agree", true, format!("amcheck of {indexes} indexes")),
            Ok(None) => skipped("indexes and tables agree", "the extension amcheck is not installed here"),
            Err(error) => outcome("indexes and tables agree", false, error.to_string()),
        });
        let Some((program, arguments)) = self.request.check_command.split_first() else {
            checks.push(skipped("the application's own check", "no command is configured"));
            return;
        };
        let mut command = tokio::process::Command::new(program);
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        command.env("COFFERDAM_DATABASE", DATABASE).env("COFFERDAM_FILESTORE", cluster.path().join("filestore"));
        command.env("PGHOST", &cluster.server.host).env("PGPORT", cluster.server.port.to_string());
        command.env("PGUSER", OWNER).env("PGDATABASE", DATABASE);
        let limit: Duration = self.request.check_limit.0;
        checks.push(match tokio::time::timeout(limit, command.output()).await {
            Ok(Ok(output)) => {
                let text =
                    String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr });
                let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().trim();
                let detail = format!("{program}: {}: {last}", output.status);
                outcome("the application's own check", output.status.success(), detail)
            }
            Ok(Err(error)) => outcome("the application's own check", false, format!("{program}: {error}")),
            Err(_) => {
                let limit = self.request.check_limit;
                outcome("the application's own check", false, format!("{program} had not ended after {limit}"))
            }
        });
    }

    /// After a failure: which object of the repository is to blame.
    async fn name_objects(&self, repository: &Arc<Repository>, checks: &mut Vec<CheckOutcome>) {
        let repository = Arc::clone(repository);
        let verified = blocking(move || Ok(repository.verify(Depth::Everything)?)).await;
        checks.push(match verified {
            Ok(found) if found.faults.is_empty() => {
                outcome("every object is what it was", true, format!("{} objects read", found.objects))
            }
            Ok(found) => {
                let faults: Vec<_> = found.faults.into_iter().take(5).map(|fault| fault.problem).collect();
                outcome("every object is what it was", false, faults.join("; "))
            }
            Err(error) => outcome("every object is what it was", false, error.to_string()),
        });
    }
}

/// Looks through every B-tree index and every table; how many indexes. None: the extension is not there.
pub(crate) async fn amcheck(server: &Server, database: &str) -> Result<Option<i64>, Error> {
    let client = server.connect_to_tenant(database).await?;
    let failed = |e: &tokio_postgres::Error| server.failed(database, e);
    let available = "SELECT count(*) FROM pg_available_extensions WHERE name = 'amcheck'";
    if client.query_one(available, &[]).await.map_err(|e| failed(&e))?.get::<_, i64>(0) == 0 {
        return Ok(None);
    }
    // The tenant may have it already, in a schema of its own.
    let whose = "SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace \
                 WHERE e.extname = 'amcheck'";
    let theirs: Option<String> = client.query_opt(whose, &[]).await.map_err(|e| failed(&e))?.map(|row| row.get(0));
    if theirs.is_none() {
        let prepare = "CREATE SCHEMA cofferdam_amcheck; CREATE EXTENSION amcheck SCHEMA cofferdam_amcheck";
        client.batch_execute(prepare).await.map_err(|e| failed(&e))?;
    }
    // With every argument and its type, and only where that function is the extension's own: an old version lacks some.
    let own = "SELECT EXISTS (SELECT FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid \
               AND d.deptype = 'e' JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'amcheck' \
               WHERE p.proname = $1 AND p.proargtypes::text = $2)";
    let has = async |name: &str, arguments: &str| {
        client.query_one(own, &[&name, &arguments]).await.map_err(|e| failed(&e)).map(|row| row.get::<_, bool>(0))
    };
    if !has("bt_index_parent_check", "2205 16").await? {
        return Ok(None);
    }
    let schema = theirs.as_deref().unwrap_or("cofferdam_amcheck");
    let indexes = format!(
        "SELECT count({schema}.bt_index_parent_check(c.oid::regclass, true)::text) FROM pg_index i \
         JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam \
         WHERE a.amname = 'btree' AND c.relpersistence = 'p' AND i.indisready AND i.indisvalid AND c.relkind = 'i'"
    );
    let count = client.query_one(&indexes, &[]).await.map_err(|e| failed(&e))?.get(0);
    let heaps = format!(
        "SELECT c.oid::regclass::text, v.msg FROM pg_class c, LATERAL {schema}.verify_heapam(\
         c.oid::regclass, false, false, 'none'::text, NULL::bigint, NULL::bigint) v \
         WHERE c.relkind = 'r' AND c.relpersistence = 'p' LIMIT 3"
    );
    let wrong = if has("verify_heapam", "2205 16 16 25 20 20").await? {
        client.query(&heaps, &[]).await.map_err(|e| failed(&e))?
    } else {
        Vec::new()
    };
    if let Some(row) = wrong.first() {
        let (table, message): (String, String) = (row.get(0), row.get(1));
        return Err(Error::Mismatch { what: table, reason: message });
    }
    if theirs.is_none() {
        client.batch_execute("DROP SCHEMA cofferdam_amcheck CASCADE").await.map_err(|e| failed(&e))?;
    }
    Ok(Some(count))
}

fn outcome(name: &str, passed: bool, detail: String) -> CheckOutcome {
    let state = if passed { CheckState::Pass } else { CheckState::Fail };
    CheckOutcome { name: name.to_owned(), state, detail }
}

fn skipped(name: &str, why: &str) -> CheckOutcome {
    CheckOutcome { name: name.to_owned(), state: CheckState::Skipped, detail: why.to_owned() }
}

/// Writes a report as `<tenant>-<time>.json` and `.html` into a directory; the path of the former.
pub fn write_report(directory: &Path, signed: &SignedReport) -> Result<PathBuf, Error> {
    std::fs::create_dir_all(directory).map_err(|e| Error::files(directory, &e))?;
    let stamp = signed.report.started_at.strftime("%Y%m%dT%H%M%SZ");
    let path = directory.join(format!("{}-{stamp}.json", signed.report.tenant));
    let text = serde_json::to_vec_pretty(signed)
        .map_err(|e| Error::Mismatch { what: path.display().to_string(), reason: e.to_string() })?;
    std::fs::write(&path, text).map_err(|e| Error::files(&path, &e))?;
    let page = path.with_extension("html");
    std::fs::write(&page, signed.html()).map_err(|e| Error::files(&page, &e))?;
    Ok(path)
}

/// The newest report on a tenant in a directory, if there is one that can be read.
pub fn newest_report(directory: &Path, tenant: &str) -> Option<SignedReport> {
    let prefix = format!("{tenant}-");
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            let stamp = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(".json"));
            stamp.is_some_and(|stamp| jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", stamp).is_ok())
        })
        .collect();
    names.sort();
    names.iter().rev().find_map(|name| serde_json::from_slice(&std::fs::read(directory.join(name)).ok()?).ok())
}
