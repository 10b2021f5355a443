//! To a point in time: a database that was recovered from the cluster's log takes the place of a dump.
//!
//! The files of that instant are found wherever they still are: names are hashes, so that a file of the live filestore or
//! of any backup set is the file, whenever it was saved.

use std::io::Read;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::loader::Loader;
use super::{Restore, files, load, stopped};
use crate::logical::{Manifest, blocking, count_rows, filtered_in, last_words, manifest_of};
use crate::model::{RestoreMode, RestorePlan, Restored, SetId};
use crate::physical::{Recovered, Recovery};
use crate::program::Running;
use crate::server::{Server, extensions_of, locale_of};
use crate::{Control, Error};

impl Restore {
    /// Brings the tenant's database back as it was at an instant, out of a physical backup of the shared cluster.
    /// Neighbours are not touched: what is recovered runs in a server of its own until it is whole.
    ///
    /// On an error nothing that was there has changed.
    pub async fn to_time(&self, recovery: &Recovery, mode: &RestoreMode, control: &Control) -> Result<Restored, Error> {
        let started = Instant::now();
        let stamp = recovery.at.strftime("%Y%m%dt%H%M%S").to_string();
        let plan = self.plan_names(&stamp, mode).await?;
        let recovered = control.unless_cancelled(recovery.run(control)).await?;
        let made = AtomicBool::new(false);
        let outcome = self.load_recovered(&recovered, recovery, &plan, mode, &made, control).await;
        let server_gone = blocking(move || {
            drop(recovered);
            Ok(())
        });
        server_gone.await?;
        match outcome {
            Ok((files, previous, paused_ms)) => Ok(Restored {
                set: SetId::default(),
                taken_at: recovery.at,
                database: plan.database,
                filestore: plan.filestore,
                previous,
                files,
                took_ms: started.elapsed().as_millis() as u64,
                paused_ms,
            }),
            Err(error) => {
                self.clear(&plan.staging, &made, control).await;
                Err(error)
            }
        }
    }

    async fn load_recovered(
        &self,
        recovered: &Recovered,
        recovery: &Recovery,
        plan: &RestorePlan,
        mode: &RestoreMode,
        made: &AtomicBool,
        control: &Control,
    ) -> Result<(u64, Option<String>, Option<u64>), Error> {
        control.phase("loading the database", None);
        let in_place = matches!(mode, RestoreMode::InPlaceSwap);
        let owner = self.owner().await?;
        let (from, database) = (recovered.server().clone(), recovery.database.clone());
        let (locale, extensions, jobs) = {
            let client = from.connect_to_tenant(&database).await?;
            let failed = |e: &tokio_postgres::Error| from.failed(&database, e);
            let locale = locale_of(&client).await.map_err(|e| failed(&e))?;
            let size = client.query_one("SELECT pg_database_size(current_database())", &[]).await;
            let bytes = u64::try_from(size.map_err(|e| failed(&e))?.get::<_, i64>(0)).unwrap_or(0);
            (locale, extensions_of(&client).await.map_err(|e| failed(&e))?, self.parallel.jobs_for(bytes))
        };
        load::create_for(&self.server, &plan.staging, &locale, &extensions, &owner, made).await?;
        let loader = Loader::create(&self.server, &plan.staging, &owner).await?;
        let loaded = async {
            let members = load::members(&self.server, &plan.staging).await?;
            let load = load::stream(&loader, &plan.staging, in_place, (extensions, members), jobs, control);
            let grants = pipe(&from, &database, load, control).await?;
            load::grant(&loader, &plan.staging, grants, control).await?;
            let counted = count_rows(&from, &database, None, &CancellationToken::new()).await?;
            load::compare(&self.server, &plan.staging, &counted).await?;
            self.identify(&loader, &plan.staging, mode, None).await
        };
        let loaded = control.unless_cancelled(loaded).await;
        loader.remove_after(loaded, &self.server, &plan.staging, control).await?;
        control.phase("finding files", None);
        let manifest: Arc<Manifest> = Arc::new(manifest_of(&from, &database).await?);
        let number = manifest.files.len() as u64;
        let target = self.filestores.join(&plan.database);
        let live = self.filestores.join(&self.database);
        if !in_place {
            let placed = async {
                self.find_files(&manifest, &live, &target, control).await?;
                self.put_in_place(plan, &owner).await
            };
            // It was not there when the plan was made.
            let placed = self.or_without_target(placed.await, plan, &target, control).await;
            return placed.map(|()| (number, None, None));
        }
        self.find_files(&manifest, &live, &target, control).await?;
        let previous = self.free_name().await?;
        let kept = self.keep_files(&target, &previous).await.and_then(|()| stopped(control));
        self.or_without_files(kept, &previous, control).await?;
        control.phase("changing places", None);
        let changed = self.change_places(&plan.database, &previous, &plan.staging, &owner, true, control).await;
        let paused = self.or_without_files(changed, &previous, control).await?;
        self.keep_late_files(&target, &previous, control).await;
        if let Err(error) = self.find_files(&manifest, &live, &target, control).await {
            control.warn(format!("the database is in place, but not every file could be looked for again: {error}"));
        }
        Ok((number, Some(previous), paused.map(|p| p.as_millis() as u64)))
    }

    async fn find_files(
        &self,
        manifest: &Arc<Manifest>,
        live: &std::path::Path,
        target: &std::path::Path,
        control: &Control,
    ) -> Result<(), Error> {
        let repository = match self.repository().await {
            Ok(repository) => Some(repository),
            // A tenant without sets of its own has its live files.
            Err(Error::Repository(crate::repository::RepositoryError::Absent { .. })) => None,
            Err(error) => return Err(error),
        };
        let missing = files::find(repository, manifest, live, target, control).await?;
        if !missing.is_empty() {
            let names = missing.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
            control.warn(format!(
                "{} files of that time are neither in the filestore nor in any backup, such as {names}",
                missing.len()
            ));
        }
        Ok(())
    }
}

/// `pg_dump` of one server into what loads it.
async fn pipe<T: Send + 'static>(
    from: &Server,
    database: &str,
    load: impl FnOnce(&mut dyn Read) -> Result<T, Error> + Send + 'static,
    control: &Control,
) -> Result<T, Error> {
    let filtered = filtered_in(from, database).await?;
    if !filtered.is_empty() {
        control.warn(format!(
            "the rows of {} are not brought back: an extension wants some of them only",
            filtered.join(", ")
        ));
    }
    let mut dump = from.program("pg_dump", database);
    dump.args(["--format=custom", "--compress=0", "--no-password"]);
    dump.args(filtered.iter().map(|table| format!("--exclude-table-data={table}")));
    let control = control.clone();
    blocking(move || {
        let broken = |e: std::io::Error| Error::Program { program: "pg_dump".to_owned(), reason: e.to_string() };
        let mut said = tempfile::tempfile().map_err(broken)?;
        dump.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(said.try_clone().map_err(broken)?);
        let mut child = dump.spawn().map_err(broken)?;
        let stdout = child.stdout.take();
        let running = Running::new(child, &control);
        let loaded = match stdout {
            Some(mut stdout) => load(&mut stdout),
            None => Err(broken(std::io::Error::other("it has no output"))),
        };
        stopped(&control)?;
        let loaded = loaded?;
        let status = running.wait().map_err(broken)?;
        if status.success() {
            return Ok(loaded);
        }
        Err(Error::Program { program: "pg_dump".to_owned(), reason: last_words(&mut said, status) })
    })
    .await
}
