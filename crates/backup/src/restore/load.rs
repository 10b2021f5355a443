//! A dump into a database that nobody else can reach, and whether everything arrived.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use super::dumped::{Counted, Dumped};
use super::loader::Loader;
use crate::interchange::statements;
use crate::logical::{RowCounts, blocking, count_rows, last_words, paths};
use crate::model::{BackupSet, DatabaseLocale, Extension, LocaleProvider, Parallel};
use crate::program::Running;
use crate::repository::Repository;
use crate::server::{Server, literal, quoted};
use crate::{Control, Error};

/// Loads a set's dump into an empty database, as its future owner. With `keep_grants` those who might read the original may
/// read this too; who may read a copy is another matter.
pub(super) async fn database(
    loader: &Loader,
    name: &str,
    keep_grants: bool,
    (repository, set): (&Arc<Repository>, &BackupSet),
    parallel: &Parallel,
    control: &Control,
) -> Result<(), Error> {
    let jobs = parallel.jobs_for(set.artifact.database_bytes);
    let (again, control_again) = (loader.clone(), control.clone());
    let (loader, database) = (loader.clone(), name.to_owned());
    let (repository, set, control) = (Arc::clone(repository), set.clone(), control.clone());
    let members = members(&loader.server, name).await?;
    let loaded = blocking(move || {
        let reader = repository.reader(&set.id)?;
        let dumped = Dumped::of(&reader, &set)?;
        // The table of contents is at the beginning, and is needed more than once.
        let beginning = |sink: &mut dyn Write| dumped.feed(0, sink, &Control::default());
        let head = tempfile::NamedTempFile::new().map_err(|e| broken("pg_restore", &e))?;
        let contents =
            contents(pg_restore(&loader.server), &control, |sink| beginning(&mut Tee(sink, head.as_file())))?;
        let chosen = Chosen::of(&contents, &set.artifact.extensions, &members);
        chosen.tell(&control);
        let load = || load_command(&loader, &database);
        if jobs == 1 && dumped.tables().next().is_none() {
            run(load(), &chosen.load, &control, |stdin| dumped.feed(0, stdin, &control))?;
        } else {
            let mut rows = load();
            rows.args(["--section=pre-data", "--section=data"]);
            run(rows, &chosen.load, &control, |stdin| dumped.feed(0, stdin, &control))?;
            tables(&dumped, jobs, &load, &control)?;
            indexes(load(), &chosen.load, head.path(), jobs, &control)?;
        }
        let mut sequences = Vec::new();
        // Sets of before there was such a file have them in the dump.
        if reader.has(paths::SEQUENCES) {
            reader.file(paths::SEQUENCES, &mut sequences)?;
        }
        let sequences =
            statements(&sequences).map_err(|reason| Error::Mismatch { what: paths::SEQUENCES.to_owned(), reason })?;
        let server = pg_restore(&loader.server);
        let grants = if keep_grants { grants(server, &chosen.grants, &control, beginning)? } else { None };
        Ok((sequences, grants))
    });
    let (sequences, grants) = loaded.await?;
    if !sequences.is_empty() {
        let client = again.connect(name).await?;
        for some in sequences.chunks(100) {
            client.batch_execute(&some.join("\n")).await.map_err(|e| again.server.failed(name, &e))?;
        }
    }
    grant(&again, name, grants, &control_again).await
}

/// What `pg_restore` reads, kept.
struct Tee<'a>(&'a mut dyn Write, &'a std::fs::File);

impl Write for Tee<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        // First what is kept: at the end the other side closes before it has taken everything.
        self.1.write_all(buffer)?;
        self.0.write_all(buffer)?;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Loads the streams with rows of some tables each, several at a time.
fn tables(
    dumped: &Dumped<'_>,
    jobs: u32,
    load: &(impl Fn() -> Command + Sync),
    control: &Control,
) -> Result<(), Error> {
    let left = Mutex::new(dumped.tables().collect::<VecDeque<_>>());
    let failed = Mutex::new(None);
    // One that fails stops the others.
    let control = control.child();
    let runtime = tokio::runtime::Handle::try_current().ok();
    let work = || {
        let _runtime = runtime.as_ref().map(tokio::runtime::Handle::enter);
        loop {
            let next = left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some((stream, tables)) = next else { return };
            let mut rows = load();
            rows.arg("--data-only");
            let loaded = fed(rows, &control, |stdin| dumped.feed(stream, stdin, &control));
            if let Err(error) = loaded {
                let error = match error {
                    Error::Program { program, reason } => {
                        Error::Program { program, reason: format!("{}: {reason}", tables.join(", ")) }
                    }
                    other => other,
                };
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                control.cancel();
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(work);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Makes what stands on rows: indexes, constraints, triggers. For them nothing of a dump is read but its beginning.
fn indexes(
    mut command: Command,
    entries: &str,
    head: &std::path::Path,
    jobs: u32,
    control: &Control,
) -> Result<(), Error> {
    command.arg("--section=post-data").arg(format!("--jobs={jobs}"));
    let list = list(entries)?;
    command.arg("--use-list").arg(list.path()).arg(head);
    fed(command, control, |_| Ok(()))
}

/// Tables that belong to extensions of a database, as `schema name`: whoever loads may not write into them.
pub(super) async fn members(server: &Server, database: &str) -> Result<Vec<String>, Error> {
    let client = server.connect(database).await?;
    let query = "SELECT n.nspname || ' ' || c.relname FROM pg_depend d JOIN pg_class c ON c.oid = d.objid \
                 JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'";
    let rows = client.query(query, &[]).await.map_err(|e| server.failed(database, &e))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Loads what somebody else dumps, as it comes. Results in the grants that are to be made afterwards, with [`grant`].
pub(super) fn stream(
    loader: &Loader,
    name: &str,
    keep_grants: bool,
    (extensions, members): (Vec<Extension>, Vec<String>),
    jobs: u32,
    control: &Control,
) -> impl FnOnce(&mut dyn Read) -> Result<Option<Grants>, Error> + Send + 'static {
    let (server, mut load, again) = (loader.server.clone(), load_command(loader, name), load_command(loader, name));
    let control = control.clone();
    move |dump| {
        // Its beginning is read twice: the table of contents is there.
        let mut beginning = Vec::new();
        let contents = contents(pg_restore(&server), &control, |sink| {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let read = dump.read(&mut buffer).map_err(|e| broken("pg_dump", &e))?;
                beginning.extend_from_slice(&buffer[..read]);
                if read == 0 || sink.write_all(&buffer[..read]).is_err() {
                    return Ok(());
                }
            }
        })?;
        let chosen = Chosen::of(&contents, &extensions, &members);
        chosen.tell(&control);
        if jobs > 1 {
            load.args(["--section=pre-data", "--section=data"]);
        }
        run(load, &chosen.load, &control, |stdin| {
            let copied = io::copy(&mut beginning.as_slice().chain(dump), &mut Counted::new(stdin, &control));
            copied.map(drop).map_err(|e| broken("pg_restore", &e))
        })?;
        if jobs > 1 {
            let mut head = tempfile::NamedTempFile::new().map_err(|e| broken("pg_restore", &e))?;
            head.write_all(&beginning).map_err(|e| broken("pg_restore", &e))?;
            indexes(again, &chosen.load, head.path(), jobs, &control)?;
        }
        let again = |sink: &mut dyn Write| sink.write_all(&beginning).map_err(|e| broken("pg_restore", &e));
        if keep_grants { grants(pg_restore(&server), &chosen.grants, &control, again) } else { Ok(None) }
    }
}

pub(super) fn broken(program: &str, error: &io::Error) -> Error {
    Error::Program { program: program.to_owned(), reason: error.to_string() }
}

/// What a dump says is in it: its table of contents, which comes first.
fn contents(
    mut command: Command,
    control: &Control,
    fill: impl FnOnce(&mut dyn Write) -> Result<(), Error>,
) -> Result<String, Error> {
    command.arg("--list");
    output(command, control, fill)
}

/// What `pg_restore` prints about a dump of which it needs no more than the table of contents.
fn output(
    mut command: Command,
    control: &Control,
    fill: impl FnOnce(&mut dyn Write) -> Result<(), Error>,
) -> Result<String, Error> {
    let failed = |e: io::Error| broken("pg_restore", &e);
    let (mut stdout, mut stderr) = (tempfile::tempfile().map_err(failed)?, tempfile::tempfile().map_err(failed)?);
    command.stdin(Stdio::piped());
    command.stdout(stdout.try_clone().map_err(failed)?).stderr(stderr.try_clone().map_err(failed)?);
    let mut child = command.spawn().map_err(failed)?;
    let stdin = child.stdin.take();
    let running = Running::new(child, control);
    // It stops reading where the contents end, which breaks what feeds it; but that it could not be fed at all is told.
    let fed = stdin.map_or(Ok(()), |mut stdin| fill(&mut stdin));
    let status = running.wait().map_err(failed)?;
    super::stopped(control)?;
    if !status.success() {
        fed?;
        let reason = last_words(&mut stderr, status);
        return Err(Error::Program { program: "pg_restore".to_owned(), reason });
    }
    let mut text = String::new();
    io::Seek::rewind(&mut stdout).and_then(|()| stdout.read_to_string(&mut text)).map_err(failed)?;
    Ok(text)
}

/// The entries of a table of contents, by what becomes of them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Chosen {
    /// What is loaded.
    load: String,
    /// Who may do what: loaded last, because some of it may be in the name of somebody who is not here.
    grants: String,
    /// What only an administrator could create, and nobody has.
    left_out: Vec<String>,
}

impl Chosen {
    fn of(contents: &str, extensions: &[Extension], members: &[String]) -> Self {
        let mut chosen = Self::default();
        // The schemas of extensions. Owner and name are told apart by nothing but a space, which both may have: of several
        // that begin with a name, the shortest is meant.
        let schemas = extensions.iter().filter(|e| e.schema != "public").map(|e| format!(" SCHEMA - {} ", e.schema));
        let made: Vec<&str> = schemas
            .filter_map(|begin| contents.lines().filter(|line| line.contains(&begin)).min_by_key(|line| line.len()))
            .collect();
        // `4201; 0 0 COMMENT - EXTENSION pg_trgm `: two numbers, then what it is.
        let what =
            |line| str::split_once(line, "; ").and_then(|(_, rest)| rest.splitn(3, ' ').nth(2)).unwrap_or_default();
        let defined: HashSet<&str> = contents.lines().filter_map(|line| what(line).strip_prefix("TABLE ")).collect();
        // Schema and name, without the owner, who comes last.
        let foreign: Vec<(&str, &str)> = contents
            .lines()
            .filter_map(|line| what(line).strip_prefix("FOREIGN TABLE ")?.rsplit_once(' ')?.0.split_once(' '))
            .collect();
        for line in contents.lines().filter(|line| !line.starts_with(';')) {
            let entry = what(line);
            let is = |kind: &str| entry.strip_prefix(kind).is_some_and(|rest| rest.starts_with(' '));
            // A table whose name begins with a member's has a definition in the dump, and a member has none.
            let defined = entry.strip_prefix("TABLE DATA ").is_some_and(|rest| defined.contains(rest));
            let of_foreign = foreign.iter().any(|(schema, name)| {
                let on = |kind: &str| is(&format!("{kind} {schema} {name}"));
                let column = format!("COMMENT {schema} COLUMN {name}.");
                is(&format!("COMMENT {schema} FOREIGN TABLE {name}"))
                    || entry.starts_with(&column)
                    || ["DEFAULT", "TABLE ATTACH", "TRIGGER", "CONSTRAINT", "CHECK CONSTRAINT"].into_iter().any(on)
            });
            // [`create_for`] has made the extensions, and the schemas that they are in.
            let made_already = is("EXTENSION -") || is("COMMENT - EXTENSION") || made.contains(&line);
            let administrators = [
                "PUBLICATION",
                "SUBSCRIPTION",
                "EVENT TRIGGER",
                "FOREIGN DATA WRAPPER",
                // What stands on a wrapper that is not there.
                "SERVER",
                "USER MAPPING",
                "FOREIGN TABLE",
            ];
            if made_already {
            } else if is("ACL") || is("DEFAULT ACL") {
                chosen.grants.push_str(line);
                chosen.grants.push('\n');
            } else if administrators
                .iter()
                .any(|kind| is(kind) || is(&format!("{kind} TABLE")) || is(&format!("COMMENT - {kind}")))
                || of_foreign
                || !defined
                    && members
                        .iter()
                        .any(|table| is(&format!("TABLE DATA {table}")) || is(&format!("SEQUENCE SET {table}")))
            {
                // Its kind, its schema, its name.
                let words: Vec<&str> = entry.split(' ').filter(|word| *word != "-").collect();
                chosen.left_out.push(words[..words.len().saturating_sub(1).max(1)].join(" "));
            } else {
                chosen.load.push_str(line);
                chosen.load.push('\n');
            }
        }
        chosen
    }

    fn tell(&self, control: &Control) {
        for entry in &self.left_out {
            control.warn(format!("{entry} is not restored: only an administrator may create it"));
        }
    }
}

/// Statements about who may do what.
pub(super) struct Grants(Vec<String>);

/// The statements of some entries. Nothing but the table of contents is read for them.
fn grants(
    mut command: Command,
    entries: &str,
    control: &Control,
    beginning: impl FnOnce(&mut dyn Write) -> Result<(), Error>,
) -> Result<Option<Grants>, Error> {
    if entries.is_empty() {
        return Ok(None);
    }
    let list = list(entries)?;
    command.args(["--no-owner", "--file=-", "--use-list"]).arg(list.path());
    let text = output(command, control, beginning)?;
    let statements =
        statements(text.as_bytes()).map_err(|reason| Error::Program { program: "pg_restore".to_owned(), reason })?;
    Ok(Some(Grants(statements)))
}

/// Makes the grants, as the owner. One that cannot be made, because it is somebody else's or because whom it is for is not
/// here, is told and left out.
pub(super) async fn grant(
    loader: &Loader,
    database: &str,
    grants: Option<Grants>,
    control: &Control,
) -> Result<(), Error> {
    let Some(Grants(statements)) = grants else { return Ok(()) };
    let client = loader.connect(database).await?;
    let failed = |e: &tokio_postgres::Error| loader.server.failed(database, e);
    for statement in statements {
        // Nobody but an administrator may speak for others. That they may is granted by the owner instead.
        let word = |prefix: &str| statement.get(..prefix.len()).is_some_and(|s| s.eq_ignore_ascii_case(prefix));
        if word("SET SESSION AUTHORIZATION") || word("RESET SESSION AUTHORIZATION") {
            continue;
        }
        match client.batch_execute(&statement).await {
            Err(error) if client.is_closed() => return Err(failed(&error)),
            Err(error) => control.warn(format!("a grant is not restored: {}", failed(&error))),
            Ok(()) => {}
        }
    }
    Ok(())
}

fn list(entries: &str) -> Result<tempfile::NamedTempFile, Error> {
    let failed = |e: io::Error| broken("pg_restore", &e);
    let mut file = tempfile::NamedTempFile::new().map_err(failed)?;
    file.write_all(entries.as_bytes()).and_then(|()| file.flush()).map_err(failed)?;
    Ok(file)
}

/// Runs the loading program on what it is fed.
fn run(
    mut command: Command,
    entries: &str,
    control: &Control,
    feed: impl FnOnce(&mut ChildStdin) -> Result<(), Error>,
) -> Result<(), Error> {
    let list = list(entries)?;
    command.arg("--use-list").arg(list.path());
    fed(command, control, feed)
}

/// Runs the loading program, with everything that it is fed.
fn fed(
    mut command: Command,
    control: &Control,
    feed: impl FnOnce(&mut ChildStdin) -> Result<(), Error>,
) -> Result<(), Error> {
    let failed = |e: io::Error| broken("pg_restore", &e);
    let mut stderr = tempfile::tempfile().map_err(failed)?;
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(stderr.try_clone().map_err(failed)?);
    let mut child: Child = command.spawn().map_err(failed)?;
    let stdin = child.stdin.take();
    let running = Running::new(child, control);
    let fed = stdin.map_or(Ok(()), |mut stdin| feed(&mut stdin));
    let status = running.wait().map_err(failed)?;
    super::stopped(control)?;
    // Why the program stopped reading is in what it printed; that its input broke then follows from it.
    if !status.success() {
        return match fed {
            Err(error) if !matches!(error, Error::Program { .. }) => Err(error),
            _ => Err(Error::Program { program: "pg_restore".to_owned(), reason: last_words(&mut stderr, status) }),
        };
    }
    fed
}

/// Creates a database that only its creator can connect to, for things that will belong to somebody, with the extensions
/// that they need: many only an administrator may create. `made` says whether it was created, also when what follows
/// fails.
pub(super) async fn create_for(
    server: &Server,
    name: &str,
    locale: &DatabaseLocale,
    extensions: &[Extension],
    owner: &str,
    made: &AtomicBool,
) -> Result<(), Error> {
    let client = server.connect(&server.maintenance).await?;
    let mut create = format!(
        "CREATE DATABASE {} TEMPLATE template0 ALLOW_CONNECTIONS false ENCODING {} LC_COLLATE {} LC_CTYPE {}",
        quoted(name),
        literal(&locale.encoding),
        literal(&locale.collate),
        literal(&locale.ctype)
    );
    let word = match locale.provider {
        LocaleProvider::Libc => None,
        LocaleProvider::Icu => Some("ICU_LOCALE"),
        LocaleProvider::Builtin => Some("BUILTIN_LOCALE"),
    };
    if let (Some(word), Some(of_provider)) = (word, &locale.locale) {
        let provider = word.trim_end_matches("_LOCALE");
        create.push_str(&format!(" LOCALE_PROVIDER {provider} {word} {}", literal(of_provider)));
        if let Some(rules) = &locale.icu_rules {
            create.push_str(&format!(" ICU_RULES {}", literal(rules)));
        }
    }
    client.batch_execute(&create).await.map_err(|e| server.failed(name, &e))?;
    made.store(true, Ordering::SeqCst);
    // Closed until it is closed to everybody but us: whoever was in once would stay.
    let close = format!("REVOKE ALL ON DATABASE {} FROM PUBLIC", quoted(name));
    client.batch_execute(&close).await.map_err(|e| server.failed(name, &e))?;
    let open = format!("ALTER DATABASE {} WITH ALLOW_CONNECTIONS true", quoted(name));
    client.batch_execute(&open).await.map_err(|e| server.failed(name, &e))?;
    // So that what is restored belongs to whom it shall belong, while the database is not yet theirs to connect to.
    let client = server.connect(name).await?;
    let mut prepare = format!(
        "GRANT CREATE, TEMPORARY ON DATABASE {} TO {1}; ALTER SCHEMA public OWNER TO {1}",
        quoted(name),
        quoted(owner)
    );
    for extension in extensions {
        let schema = quoted(&extension.schema);
        if extension.schema != "public" && extension.schema != "pg_catalog" {
            prepare.push_str(&format!("; CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {}", quoted(owner)));
        }
        prepare.push_str(&format!("; CREATE EXTENSION IF NOT EXISTS {} SCHEMA {schema}", quoted(&extension.name)));
        if extension.immutable_unaccent {
            prepare.push_str(&format!("; ALTER FUNCTION {schema}.unaccent(text) IMMUTABLE"));
        }
    }
    client.batch_execute(&prepare).await.map_err(|e| server.failed(name, &e))
}

fn pg_restore(server: &Server) -> Command {
    server.program("pg_restore", &server.maintenance)
}

/// `pg_restore` into a database, for its future owner.
fn load_command(loader: &Loader, name: &str) -> Command {
    let mut command = loader.server.program("pg_restore", name);
    // Not in a word of its own: a name with `=` in it would be taken for more than a name.
    let database = name.replace('\\', "\\\\").replace('\'', "\\'");
    command
        .args(["--no-owner", "--no-tablespaces", "--exit-on-error", "--no-password"])
        .arg(format!("--dbname=dbname='{database}'"));
    command.arg(format!("--role={}", loader.owner));
    command
}

/// Compares the rows of every table with those that were counted in the snapshot.
pub(super) async fn compare_rows(
    server: &Server,
    name: &str,
    repository: &Arc<Repository>,
    set: &BackupSet,
) -> Result<(), Error> {
    compare(server, name, &saved_rows(repository, set).await?).await
}

/// Compares the rows of every table with what was counted.
pub(super) async fn compare(server: &Server, name: &str, saved: &RowCounts) -> Result<(), Error> {
    let mut found = count_rows(server, name, None, &CancellationToken::new()).await?;
    // A standby has no rows of unlogged tables to save, and older sets have not counted them.
    let unlogged = unlogged(server, name).await?;
    found.retain(|table, _| saved.contains_key(table) || !unlogged.contains(table));
    // Which part of a table a row is in may depend on numbers that are others in another database, such as those of an enum's
    // values: what counts are the rows of the whole.
    let whole = roots(server, name).await?;
    let (saved, found) = (&by_root(saved, &whole), by_root(&found, &whole));
    let wrong: Vec<String> = saved
        .iter()
        .filter_map(|(table, rows)| match found.get(table) {
            Some(found) if found == rows => None,
            Some(found) => Some(format!("{table} has {found} rows instead of {rows}")),
            None => Some(format!("{table} is missing")),
        })
        .chain(found.keys().filter(|t| !saved.contains_key(*t)).map(|t| format!("{t} was not in the backup")))
        .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    let reason = wrong.into_iter().take(10).collect::<Vec<_>>().join("; ");
    Err(Error::Mismatch { what: format!("database {name}"), reason })
}

/// The tables whose rows no log has.
async fn unlogged(server: &Server, database: &str) -> Result<HashSet<String>, Error> {
    let client = server.connect_to_tenant(database).await?;
    let query = "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind = 'r' AND c.relpersistence = 'u'";
    let rows = client.query(query, &[]).await.map_err(|e| server.failed(database, &e))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// The partitioned tables that tables are parts of, by the tables' names.
async fn roots(server: &Server, database: &str) -> Result<HashMap<String, String>, Error> {
    let client = server.connect_to_tenant(database).await?;
    let query = "SELECT n.nspname || '.' || c.relname, m.nspname || '.' || r.relname FROM pg_class c \
                 JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_class r ON r.oid = pg_partition_root(c.oid) \
                 JOIN pg_namespace m ON m.oid = r.relnamespace WHERE c.relispartition AND c.relkind = 'r'";
    let rows = client.query(query, &[]).await.map_err(|e| server.failed(database, &e))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn by_root(counts: &RowCounts, roots: &HashMap<String, String>) -> RowCounts {
    let mut sums = RowCounts::new();
    for (table, rows) in counts {
        *sums.entry(roots.get(table).unwrap_or(table).clone()).or_default() += rows;
    }
    sums
}

/// How many rows each table had when it was saved.
pub(crate) async fn saved_rows(repository: &Arc<Repository>, set: &BackupSet) -> Result<RowCounts, Error> {
    let (repository, id) = (Arc::clone(repository), set.id.clone());
    blocking(move || {
        let mut text = Vec::new();
        repository.reader(&id)?.file(paths::TABLES, &mut text)?;
        serde_json::from_slice(&text)
            .map_err(|e| Error::Mismatch { what: paths::TABLES.to_owned(), reason: e.to_string() })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_are_left_out_of_the_contents_because_they_are_there_already() {
        let contents = "\
;
; Archive created at 2026-11-27 08:15:30 UTC
2; 3079 16385 EXTENSION - pg_trgm 
4201; 0 0 COMMENT - EXTENSION pg_trgm 
7; 2615 16500 SCHEMA - extensions acme
8; 2615 16501 SCHEMA - extensions_of_ours acme
9; 2615 16502 SCHEMA - extensions of ours acme
215; 1259 16401 TABLE public res_partner acme
4210; 0 0 COMMENT public TABLE res_partner acme
4211; 6104 16402 PUBLICATION - everything postgres
4212; 6106 16403 PUBLICATION TABLE public everything t postgres
4213; 0 16404 TABLE DATA public spatial_ref_sys postgres
216; 1259 16405 TABLE public spatial_ref_sys x acme
4215; 0 16405 TABLE DATA public spatial_ref_sys x acme
217; 1259 16406 FOREIGN TABLE public far away acme
4216; 0 0 COMMENT public COLUMN far away.id acme
4217; 2604 16407 DEFAULT public far away id acme
4218; 0 0 COMMENT public COLUMN far.id acme
4214; 0 0 ACL public TABLE res_partner acme
";
        let extensions = [Extension { name: "pg_trgm".into(), schema: "extensions".into(), immutable_unaccent: false }];
        let chosen = Chosen::of(contents, &extensions, &["public spatial_ref_sys".to_owned()]);
        let left: Vec<&str> = chosen.load.lines().map(|line| line.split(';').next().unwrap()).collect();
        assert_eq!(left, ["8", "9", "215", "4210", "216", "4215", "4218"]);
        assert_eq!(chosen.grants, "4214; 0 0 ACL public TABLE res_partner acme\n");
        assert_eq!(
            chosen.left_out,
            [
                "PUBLICATION everything",
                "PUBLICATION TABLE public everything t",
                "TABLE DATA public spatial_ref_sys",
                "FOREIGN TABLE public far away",
                "COMMENT public COLUMN far away.id",
                "DEFAULT public far away id"
            ]
        );
    }
}
