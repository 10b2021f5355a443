//! To a point in time: a database that was recovered from the cluster's log takes the place of a dump.
//!
//! The files of that instant are found wherever they still are: names are hashes, so that a file of the live filestore or
//! of any backup set is the file, whenever it was saved.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::{Restore, files, load, stopped};
use crate::logical::{Manifest, blocking, count_rows, last_words, manifest_of};
use crate::model::{DatabaseLocale, RestoreMode, RestorePlan, Restored, SetId};
use crate::physical::{Recovered, Recovery};
use crate::server::Server;
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
        let recovered = recovery.run(control).await?;
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
        let owner = self.owner_of(in_place).await?;
        let (from, database) = (recovered.server().clone(), recovery.database.clone());
        let locale = locale_of(&from, &database).await?;
        load::create_for(&self.server, &plan.staging, &locale, owner.as_deref(), made).await?;
        let restore = load::pg_restore(&self.server, &plan.staging, owner.as_deref(), in_place);
        pipe(&from, &database, restore, control).await?;
        let counted = count_rows(&from, &database, None, &CancellationToken::new()).await?;
        load::compare(&self.server, &plan.staging, &counted).await?;
        stopped(control)?;
        self.identify(&plan.staging, mode).await?;
        control.phase("finding files", None);
        let manifest: Arc<Manifest> = Arc::new(manifest_of(&from, &database).await?);
        let number = manifest.files.len() as u64;
        let target = self.filestores.join(&plan.database);
        let live = self.filestores.join(&self.database);
        self.find_files(&manifest, &live, &target, control).await?;
        if !in_place {
            self.put_in_place(plan, owner.as_deref()).await?;
            return Ok((number, None, None));
        }
        let previous = self.free_name().await?;
        self.keep_files(&target, &previous).await?;
        control.phase("changing places", None);
        let paused = self.change_places(&plan.database, &previous, &plan.staging).await?;
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

async fn locale_of(server: &Server, database: &str) -> Result<DatabaseLocale, Error> {
    let client = server.connect(database).await?;
    let query = "SELECT pg_encoding_to_char(encoding)::text, datcollate::text, datctype::text FROM pg_database \
                 WHERE datname = current_database()";
    let row = client.query_one(query, &[]).await.map_err(|e| server.failed(database, &e))?;
    Ok(DatabaseLocale { encoding: row.get(0), collate: row.get(1), ctype: row.get(2) })
}

/// `pg_dump` of one server into `pg_restore` of another.
async fn pipe(
    from: &Server,
    database: &str,
    mut restore: std::process::Command,
    control: &Control,
) -> Result<(), Error> {
    let mut dump = from.program("pg_dump", database);
    dump.args(["--format=custom", "--compress=0", "--no-password"]);
    let control = control.clone();
    blocking(move || {
        let failed = |program: &str, reason: String| Error::Program { program: program.to_owned(), reason };
        let broken = |e: std::io::Error| failed("pg_dump", e.to_string());
        let (mut said_dump, mut said_restore) =
            (tempfile::tempfile().map_err(broken)?, tempfile::tempfile().map_err(broken)?);
        dump.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(said_dump.try_clone().map_err(broken)?);
        let mut dumping = dump.spawn().map_err(broken)?;
        let Some(stream) = dumping.stdout.take() else { return Err(failed("pg_dump", "it has no output".to_owned())) };
        restore.stdin(stream).stdout(Stdio::null()).stderr(said_restore.try_clone().map_err(broken)?);
        let mut restoring = restore.spawn().map_err(|e| failed("pg_restore", e.to_string()))?;
        drop(restore);
        let status = loop {
            if control.is_cancelled() {
                let _ = (dumping.kill(), restoring.kill());
                let _ = (dumping.wait(), restoring.wait());
                return Err(Error::Cancelled);
            }
            if let Some(status) = restoring.try_wait().map_err(broken)? {
                break status;
            }
            load::pause();
        };
        let dumped = dumping.wait().map_err(broken)?;
        if !status.success() {
            return Err(failed("pg_restore", last_words(&mut said_restore, status)));
        }
        if !dumped.success() {
            return Err(failed("pg_dump", last_words(&mut said_dump, dumped)));
        }
        Ok(())
    })
    .await
}
