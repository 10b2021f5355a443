//! An estate from elsewhere becomes a tenant.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use futures_util::SinkExt;
use jiff::Timestamp;
use sha1::{Digest, Sha1};
use tokio::sync::mpsc;
use tokio_postgres::Client;
use zip::ZipArchive;

use super::broken;
use super::sql::{Piece, Pieces, is_one};
use crate::logical::{blocking, is_sha1, manifest_of, paths, stays_below};
use crate::model::{DatabaseLocale, Extension, RestoreMode, Restored, SetId};
use crate::restore::{Hashing, Loader, Restore, Tree, stopped};
use crate::server::{extensions_of, quoted};
use crate::{Control, Error};

/// Who an imported estate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// It has moved here: the same `database.uuid`, and everything goes on.
    Moved,
    /// It is a copy: a new identity, and neutralized unless told otherwise.
    Copied {
        /// `web.base.url` of the copy.
        base_url: Option<String>,
        /// Leave mail servers, jobs and integrations on.
        keep_integrations: bool,
    },
}

/// An import that somebody asks for. `restore` says where to: its `database` must not be there yet, and its `owner` must.
#[derive(Debug, Clone)]
pub struct Import {
    /// Where to.
    pub restore: Restore,
    /// The file.
    pub file: PathBuf,
    /// Who it is.
    pub identity: Identity,
}

/// What only an administrator may create, and what harms nobody: others are created by whoever imports, or not at all.
const EXTENSIONS: [&str; 9] =
    ["unaccent", "pg_trgm", "fuzzystrmatch", "btree_gin", "btree_gist", "uuid-ossp", "pgcrypto", "postgis", "vector"];

impl Import {
    /// Imports. On an error nothing that was there has changed, and nothing half-loaded stays.
    ///
    /// Files that the database refers to and that the zip lacks, as Odoo's own backups do now and then, are warnings.
    pub async fn run(&self, control: &Control) -> Result<Restored, Error> {
        let started = Instant::now();
        let restore = &self.restore;
        let mode =
            RestoreMode::NewTenant { database: restore.database.clone(), base_url: None, keep_integrations: true };
        let stamp = Timestamp::now().strftime("%Y%m%dt%H%M%S").to_string();
        let plan = restore.plan_names(&stamp, &mode).await?;
        let contents = self.look().await?;
        let needed = contents.file_bytes.saturating_add(contents.dump_bytes);
        if let Some(free) = plan.free_bytes.filter(|free| *free < needed) {
            let wanted = format!("{needed} bytes are needed and {free} are free");
            return Err(Error::Refused(format!("{}: {wanted}; nothing was changed", restore.filestores.display())));
        }
        let made = AtomicBool::new(false);
        match self.carry_out(&plan, &made, control).await {
            Ok(files) => Ok(Restored {
                set: SetId::default(),
                taken_at: contents.taken_at,
                database: plan.database,
                filestore: plan.filestore,
                previous: None,
                files,
                took_ms: started.elapsed().as_millis() as u64,
                paused_ms: None,
            }),
            Err(error) => {
                restore.clear(&plan.staging, &made, control).await;
                Err(error)
            }
        }
    }

    async fn carry_out(
        &self,
        plan: &crate::model::RestorePlan,
        made: &AtomicBool,
        control: &Control,
    ) -> Result<u64, Error> {
        let restore = &self.restore;
        let owner = restore.owner().await?;
        let locale = DatabaseLocale {
            encoding: "UTF8".into(),
            // As Odoo creates its databases.
            collate: "C".into(),
            ctype: self.ctype().await?,
            provider: crate::model::LocaleProvider::Libc,
            locale: None,
            icu_rules: None,
        };
        let wanted = self.extensions().await?;
        // Whoever has written this is nobody here: it is loaded by a role that can become nobody, not the owner either, who may
        // own other databases.
        restore.create_for(&plan.staging, &locale, &wanted, &restore.server.user, made).await?;
        let loader = Loader::stranger(&restore.server, &plan.staging, &owner).await?;
        let loaded = async {
            control.phase("loading the database", None);
            self.load(&loader, &plan.staging, control).await?;
            if let Identity::Copied { base_url, keep_integrations } = &self.identity {
                restore.make_copy(&loader, &plan.staging, base_url.as_deref(), *keep_integrations).await?;
            }
            Ok(())
        };
        let loaded = control.unless_cancelled(loaded).await;
        let handed_over = loader.hand_over(&restore.server, &plan.staging).await;
        if let (Err(error), Err(_)) = (&handed_over, &loaded) {
            control.warn(format!("the role that has loaded stays, and nobody knows its password: {error}"));
        }
        loaded?;
        handed_over?;
        control.phase("writing files", None);
        let target = restore.filestores.join(&plan.database);
        let files = self.files(&target, control).await?;
        let placed = async {
            let manifest = manifest_of(&restore.server, &plan.staging).await?;
            let root = target.clone();
            let missing = blocking(move || {
                let lost =
                    manifest.files.iter().filter(|file| !stays_below(&file.name) || !root.join(&file.name).exists());
                Ok(lost.map(|file| file.name.clone()).collect::<Vec<_>>())
            })
            .await?;
            if !missing.is_empty() {
                let names = missing.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
                control.warn(format!(
                    "the file lacks {} files that its database refers to, such as {names}",
                    missing.len()
                ));
            }
            restore.put_in_place(plan, &owner).await
        };
        restore.or_without_target(placed.await, plan, &target, control).await.map(|()| files)
    }

    /// What the file has, before anything is made of it.
    async fn look(&self) -> Result<Contents, Error> {
        let path = self.file.clone();
        blocking(move || {
            let mut zip = open(&path)?;
            let mut contents = Contents { dump_bytes: 0, file_bytes: 0, taken_at: Timestamp::UNIX_EPOCH };
            let mut has_dump = false;
            for index in 0..zip.len() {
                let entry = zip.by_index_raw(index).map_err(|e| broken(&path, &e))?;
                if entry.name().is_ok_and(|name| name == "dump.sql") {
                    (has_dump, contents.dump_bytes) = (true, entry.size());
                } else {
                    contents.file_bytes = contents.file_bytes.saturating_add(entry.size());
                }
            }
            if !has_dump {
                let found = "there is no dump.sql in it";
                return Err(Error::Refused(format!(
                    "{}: {found}, expected a backup in Odoo's zip format",
                    path.display()
                )));
            }
            let modified = fs::metadata(&path).and_then(|data| data.modified()).ok();
            contents.taken_at = modified.and_then(|at| Timestamp::try_from(at).ok()).unwrap_or_else(Timestamp::now);
            Ok(contents)
        })
        .await
    }

    /// The extensions that the dump creates, and that may be created for whoever.
    async fn extensions(&self) -> Result<Vec<Extension>, Error> {
        let path = self.file.clone();
        let (send, mut receive) = mpsc::channel(16);
        let reading = tokio::task::spawn_blocking(move || read(&path, &send, &Control::default()));
        let mut found = Vec::new();
        while let Some(piece) = receive.recv().await {
            match piece {
                Piece::Statement(text) => {
                    found.extend(extension(&text).filter(|e| EXTENSIONS.contains(&e.name.as_str())));
                }
                // They come before the first row.
                Piece::Copy(_) => break,
                _ => {}
            }
        }
        drop(receive);
        // That nobody listens any more is no error; that the file cannot be read is told when it is loaded.
        let _ = reading.await;
        let client = self.restore.server.connect(&self.restore.server.maintenance).await?;
        let names: Vec<&str> = found.iter().map(|e: &Extension| e.name.as_str()).collect();
        let query = "SELECT name::text FROM pg_catalog.pg_available_extensions WHERE name = ANY($1)";
        let rows = client.query(query, &[&names]).await;
        let rows = rows.map_err(|e| self.restore.server.failed(&self.restore.database, &e))?;
        let there: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        found.retain(|extension| there.contains(&extension.name));
        Ok(found)
    }

    /// The classes of characters of the server's own databases.
    async fn ctype(&self) -> Result<String, Error> {
        let client = self.restore.server.connect(&self.restore.server.maintenance).await?;
        let query = "SELECT datctype::text FROM pg_catalog.pg_database WHERE datname = 'template1'";
        let row = client.query_one(query, &[]).await;
        Ok(row.map_err(|e| self.restore.server.failed("template1", &e))?.get(0))
    }

    async fn load(&self, loader: &Loader, database: &str, control: &Control) -> Result<(), Error> {
        let client = loader.connect(database).await?;
        let failed = |e: &tokio_postgres::Error| loader.server.failed(database, e);
        // An index of a large table takes as long as it takes; whoever asks to stop is heard.
        client
            .batch_execute("SET synchronous_commit = off; SET statement_timeout = 0")
            .await
            .map_err(|e| failed(&e))?;
        let made = extensions_of(&client).await.map_err(|e| failed(&e))?;
        let (send, mut receive) = mpsc::channel(16);
        let (path, reader) = (self.file.clone(), control.clone());
        let reading = tokio::task::spawn_blocking(move || read(&path, &send, &reader));
        let loaded = async {
            let mut copy = None;
            while let Some(piece) = receive.recv().await {
                stopped(control)?;
                match piece {
                    Piece::Statement(text) => {
                        if !is_left_out(&text, &made) {
                            run(&client, &text, control).await.map_err(|e| failed(&e))?;
                        } else if !is_one(&text) {
                            let start: String = text.chars().take(80).collect();
                            let reason = format!("dump.sql: `{start}` is followed by others on its line");
                            return Err(Error::Refused(format!("{}: {reason}; expected one", self.file.display())));
                        }
                    }
                    Piece::Copy(text) => {
                        let sink = client.copy_in(&text).await.map_err(|e| failed(&e))?;
                        copy = Some(Box::pin(sink));
                    }
                    Piece::Rows(rows) => {
                        if let Some(copy) = &mut copy {
                            copy.send(rows).await.map_err(|e| failed(&e))?;
                        }
                    }
                    Piece::CopyEnd => {
                        if let Some(mut copy) = copy.take() {
                            copy.as_mut().finish().await.map_err(|e| failed(&e))?;
                        }
                    }
                }
            }
            Ok::<(), Error>(())
        };
        let loaded: Result<(), Error> = async {
            loaded.await?;
            // Fails where something has failed before in the same transaction, whose end would be called one.
            client.batch_execute("SELECT 1").await.map_err(|e| failed(&e))?;
            // A dump in one transaction may leave its end to whoever loads it.
            client.batch_execute("COMMIT").await.map_err(|e| failed(&e))
        }
        .await;
        drop(receive);
        let read = reading.await.map_err(|e| Error::panicked(&e))?;
        loaded?;
        read
    }

    /// Writes the files, each below its two letters; those that are not what their names say are told.
    async fn files(&self, target: &Path, control: &Control) -> Result<u64, Error> {
        let (path, target, control) = (self.file.clone(), target.to_owned(), control.clone());
        blocking(move || {
            let tree = Tree::make(&target)?;
            let fill = || {
                let mut zip = open(&path)?;
                let (mut written, mut damaged) = (0, 0);
                for index in 0..zip.len() {
                    stopped(&control)?;
                    let mut entry = zip.by_index(index).map_err(|e| broken(&path, &e))?;
                    let prefix = format!("{}/", paths::FILESTORE);
                    let name = entry.name().map_err(|e| broken(&path, &e))?.into_owned();
                    let Some(name) = name.strip_prefix(&prefix).map(str::to_owned) else { continue };
                    if entry.is_dir() || !entry.is_file() {
                        continue;
                    }
                    if !stays_below(&name) || name.starts_with("checklist/") {
                        control.warn(format!(
                            "{}: an entry has a name that is no file's, and was left out",
                            path.display()
                        ));
                        continue;
                    }
                    let failed = |reason| Error::files(&target.join(&name), &io::Error::other(reason));
                    if tree.file(&name).is_ok() {
                        return Err(failed("there are two entries of this name"));
                    }
                    let size = entry.size();
                    tree.put(&name, |file| {
                        let mut file = Hashing { inner: file, hash: Sha1::new() };
                        // No more than it has said: what is said has been compared with the room that there is.
                        let copied = io::copy(&mut (&mut entry).take(size.saturating_add(1)), &mut file)
                            .map_err(|e| Error::files(&path, &e))?;
                        control.add(copied);
                        if copied > size {
                            return Err(failed("it has more bytes than it says"));
                        }
                        let last = name.rsplit('/').next().unwrap_or_default();
                        if is_sha1(last) && last != hex::encode(file.hash.finalize()) {
                            damaged += 1;
                        }
                        Ok(true)
                    })?;
                    written += 1;
                }
                if damaged > 0 {
                    control.warn(format!(
                        "{}: {damaged} files are not what their names say, and were damaged when it was written",
                        path.display()
                    ));
                }
                tree.hand_over()?;
                Ok(written)
            };
            let filled = fill();
            if filled.is_err() {
                let _ = fs::remove_dir_all(&target);
            }
            filled
        })
        .await
    }
}

struct Contents {
    dump_bytes: u64,
    file_bytes: u64,
    taken_at: Timestamp,
}

fn open(path: &Path) -> Result<ZipArchive<BufReader<File>>, Error> {
    let file = File::open(path).map_err(|e| Error::files(path, &e))?;
    ZipArchive::new(BufReader::new(file)).map_err(|e| broken(path, &e))
}

/// Reads the dump into a channel until its end, or until nobody listens.
fn read(path: &Path, send: &mpsc::Sender<Piece>, control: &Control) -> Result<(), Error> {
    let mut zip = open(path)?;
    let entry = zip.by_name("dump.sql").map_err(|e| broken(path, &e))?;
    // No more than it has said, which was compared with the room that there is.
    let size = entry.size();
    // One byte further than that, so that the end is reached, where the sum over all bytes is compared.
    let mut pieces = Pieces::new(BufReader::with_capacity(256 << 10, entry.take(size.saturating_add(1))));
    loop {
        stopped(control)?;
        match pieces.next() {
            Ok(Some(piece)) => {
                if let Piece::Rows(rows) = &piece {
                    control.add(rows.len() as u64);
                }
                if send.blocking_send(piece).is_err() {
                    return Ok(());
                }
            }
            Ok(None) => return Ok(()),
            Err(error) => {
                return Err(Error::Refused(format!("{}: dump.sql: {error}", path.display())));
            }
        }
    }
}

/// What a statement begins with.
fn start(text: &str) -> String {
    text.chars().take(80).collect::<String>().to_ascii_uppercase()
}

/// A statement about who somewhere else was, or about what is there already.
fn is_left_out(text: &str, made: &[Extension]) -> bool {
    let start = start(text);
    let is = |word: &str| start.starts_with(word);
    if is("GRANT ") || is("REVOKE ") || is("COMMENT ON EXTENSION ") || is("ALTER DEFAULT PRIVILEGES ") {
        return true;
    }
    if is("ALTER ") && gives_away(text) {
        return true;
    }
    if let Some(extension) = extension(text)
        && made.iter().any(|made| made.name == extension.name)
    {
        return true;
    }
    // The schemas that they are in are there too.
    is("CREATE SCHEMA ") && {
        let schema = text["CREATE SCHEMA ".len()..].trim().trim_end_matches(';').trim();
        let schema = schema.split_once(" AUTHORIZATION ").map_or(schema, |(schema, _)| schema.trim());
        made.iter().any(|made| made.schema == schema || quoted(&made.schema) == schema)
    }
}

async fn run(client: &Client, text: &str, control: &Control) -> Result<(), tokio_postgres::Error> {
    match client.batch_execute(text).await {
        // Newer servers' dumps set what older ones do not know.
        Err(error) if start(text).starts_with("SET ") => {
            let reason = error.as_db_error().map_or_else(|| error.to_string(), |e| e.message().to_owned());
            control.warn(format!("a setting of the dump was left out: {reason}"));
            if client.is_closed() { Err(error) } else { Ok(()) }
        }
        other => other,
    }
}

/// `ALTER … OWNER TO somebody;`, and nothing else: the words may stand in a text too.
fn gives_away(text: &str) -> bool {
    let text = text.trim_end().trim_end_matches(';').trim_end();
    let Some(at) = text.to_ascii_uppercase().rfind(" OWNER TO ") else { return false };
    let owner = &text[at + " OWNER TO ".len()..];
    let quoted = owner.len() > 2 && owner.starts_with('"') && owner.ends_with('"');
    let inside = if quoted { owner[1..owner.len() - 1].replace("\"\"", "") } else { owner.to_owned() };
    if quoted {
        return !inside.contains('"');
    }
    !inside.is_empty() && inside.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '$'))
}

/// `CREATE EXTENSION IF NOT EXISTS name WITH SCHEMA schema;`
fn extension(text: &str) -> Option<Extension> {
    let words: Vec<&str> = text.trim_end_matches(';').split_whitespace().collect();
    let is = |at: usize, word: &str| words.get(at).is_some_and(|w| w.eq_ignore_ascii_case(word));
    if !is(0, "create") || !is(1, "extension") {
        return None;
    }
    let at = if is(2, "if") { 5 } else { 2 };
    let plain = |word: &&str| word.trim_matches('"').to_owned();
    let schema = words.iter().position(|word| word.eq_ignore_ascii_case("schema")).and_then(|i| words.get(i + 1));
    let name: String = words.get(at).map(plain)?;
    // As Odoo makes its databases: indexes of its modules need it.
    let immutable_unaccent = name == "unaccent";
    Some(Extension { name, schema: schema.map_or_else(|| "public".to_owned(), plain), immutable_unaccent })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_gives_something_away_is_left_out_for_it() {
        for given in ["ALTER TABLE public.t OWNER TO odoo;", "ALTER TABLE t OWNER TO \"the \"\"one\"\"\";\n"] {
            assert!(gives_away(given), "{given}");
        }
        for other in [
            "ALTER TABLE t ADD CONSTRAINT c CHECK (a <> $$change owner to me$$);",
            "ALTER TABLE t ADD CONSTRAINT c CHECK (a <> ' OWNER TO ');",
            "ALTER TABLE t ALTER c SET DEFAULT ' OWNER TO x';",
            "ALTER TABLE t ALTER c SET DEFAULT \"f\"(' OWNER TO \"x', \"y\");",
        ] {
            assert!(!gives_away(other), "{other}");
        }
    }

    #[test]
    fn extensions_are_known_by_what_creates_them() {
        let found = extension("CREATE EXTENSION IF NOT EXISTS \"uuid-ossp\" WITH SCHEMA extensions;").unwrap();
        assert_eq!((found.name.as_str(), found.schema.as_str()), ("uuid-ossp", "extensions"));
        assert_eq!(extension("CREATE EXTENSION unaccent;").unwrap().schema, "public");
        assert_eq!(extension("CREATE TABLE extension (id int);"), None);
        assert_eq!(extension("COMMENT ON EXTENSION unaccent IS 'x';"), None);
    }
}
