//! Odoo's own backup format, in and out: a zip file with `dump.sql`, `manifest.json` and `filestore/ab/<sha1>`.
//!
//! Out, for whoever leaves: Odoo's database manager and `odoo-bin db load` take the file. In, for estates from elsewhere:
//! what is in such a file was written by somebody unknown, and is loaded as such.
//! (`reference`: Health and upgrades, "Backup zip".)

mod import;
mod sql;

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use serde_json::json;
use zip::write::SimpleFileOptions;

pub use import::{Identity, Import};

use crate::logical::{blocking, last_words, paths};
use crate::model::{BackupSet, RestorePoint};
use crate::program::Running;
use crate::repository::Repository;
use crate::restore::{Dumped, manifest, stopped};
use crate::server::Server;
use crate::{Control, Error};

/// The statements of a script without rows.
pub(crate) fn statements(script: &[u8]) -> Result<Vec<String>, String> {
    let mut pieces = sql::Pieces::new(script);
    let mut found = Vec::new();
    while let Some(piece) = pieces.next().map_err(|e| e.to_string())? {
        match piece {
            sql::Piece::Statement(text) => found.push(text),
            other => return Err(format!("expected a statement, found {other:?}")),
        }
    }
    Ok(found)
}

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Exported {
    /// Where it is.
    pub path: PathBuf,
    /// Bytes of it.
    pub bytes: u64,
    /// Files of the filestore in it.
    pub files: u64,
    /// The set that it was made from.
    pub set: BackupSet,
}

/// Writes a set as a file of Odoo's format. `server` says where `pg_restore` is; it is not connected to.
///
/// The file appears under its name when it is whole; one that is there already is refused.
pub async fn export(
    repository: &Arc<Repository>,
    point: &RestorePoint,
    server: &Server,
    path: &Path,
    control: &Control,
) -> Result<Exported, Error> {
    if path.exists() {
        return Err(Error::Refused(format!("{} is there already; nothing was changed", path.display())));
    }
    let (repository, point, path) = (Arc::clone(repository), point.clone(), path.to_owned());
    let (server, control) = (server.clone(), control.clone());
    blocking(move || {
        let set = repository.set_at(&point)?;
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let failed = |e: io::Error| Error::files(&path, &e);
        let beside = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(directory).map_err(failed)?;
        let mut zip = zip::ZipWriter::new(io::BufWriter::new(beside.as_file().try_clone().map_err(failed)?));
        let reader = repository.reader(&set.id)?;
        control.phase("writing the dump", Some(set.artifact.bytes + set.filestore.bytes));
        begin(&mut zip, "dump.sql", &path)?;
        let dumped = Dumped::of(&reader, &set)?;
        if dumped.tables().next().is_none() {
            write_sql((&dumped, 0), &[], &server, &mut zip, &control)?;
        } else {
            write_sql((&dumped, 0), &["--section=pre-data", "--section=data"], &server, &mut zip, &control)?;
            for (stream, _) in dumped.tables() {
                write_sql((&dumped, stream), &["--data-only"], &server, &mut zip, &control)?;
            }
            write_sql((&dumped, 0), DEFINITIONS, &server, &mut zip, &control)?;
        }
        if reader.has(paths::SEQUENCES) {
            reader.file(paths::SEQUENCES, &mut zip)?;
        }
        control.phase("writing files", Some(set.filestore.bytes));
        let contents = manifest(&reader)?;
        let mut files = 0;
        for file in &contents.files {
            stopped(&control)?;
            let inside = format!("{}/{}", paths::FILESTORE, file.name);
            // What was missing when it was saved is missing here.
            if reader.has(&inside) {
                begin(&mut zip, &inside, &path)?;
                reader.file(&inside, &mut Counting(&mut zip, &control))?;
                files += 1;
            }
        }
        begin(&mut zip, "manifest.json", &path)?;
        let text = serde_json::to_vec_pretty(&about(&set, &contents.modules)).map_err(|e| failed(e.into()))?;
        zip.write_all(&text).map_err(failed)?;
        let mut file = zip.finish().map_err(|e| broken(&path, &e))?;
        file.flush().map_err(failed)?;
        beside.as_file().sync_all().map_err(failed)?;
        let bytes = beside.as_file().metadata().map_err(failed)?.len();
        beside.persist_noclobber(&path).map_err(|e| failed(e.error))?;
        Ok(Exported { path, bytes, files, set })
    })
    .await
}

/// What Odoo writes into `manifest.json`.
fn about(set: &BackupSet, modules: &std::collections::BTreeMap<String, String>) -> serde_json::Value {
    // The version of `base`, `17.0.1.3`, begins with the release.
    let major = modules.get("base").map_or_else(String::new, |v| v.split('.').take(2).collect::<Vec<_>>().join("."));
    let pg: String = set.artifact.server_version.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    json!({
        "odoo_dump": "1",
        "db_name": set.database,
        "version": major,
        "version_info": major.split('.').filter_map(|part| part.parse::<u32>().ok()).collect::<Vec<_>>(),
        "major_version": major,
        "pg_version": pg,
        "modules": modules,
    })
}

type Zip = zip::ZipWriter<io::BufWriter<File>>;

fn begin(zip: &mut Zip, name: &str, path: &Path) -> Result<(), Error> {
    let options = SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Deflated)
        .unix_permissions(0o640)
        .large_file(true);
    zip.start_file(name, options).map_err(|e| broken(path, &e))
}

fn broken(path: &Path, error: &zip::result::ZipError) -> Error {
    Error::Files { path: path.display().to_string(), reason: error.to_string() }
}

/// A stream of the dump as SQL: `pg_restore` rewrites it, with no server.
fn write_sql(
    (dumped, stream): (&Dumped<'_>, usize),
    options: &[&str],
    server: &Server,
    zip: &mut Zip,
    control: &Control,
) -> Result<(), Error> {
    let failed = |reason: String| Error::Program { program: "pg_restore".to_owned(), reason };
    let mut stderr = tempfile::tempfile().map_err(|e| failed(e.to_string()))?;
    let mut command = server.program("pg_restore", &server.maintenance);
    command.args(["--no-owner", "--no-privileges", "--no-tablespaces", "--file=-"]).args(options);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command.stderr(stderr.try_clone().map_err(|e| failed(e.to_string()))?);
    let mut child = command.spawn().map_err(|e| failed(e.to_string()))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (Some(mut stdin), Some(mut stdout)) = (stdin, stdout) else {
        return Err(failed("it has no input or output".to_owned()));
    };
    let running = Running::new(child, control);
    let (fed, copied) = std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            let copied = io::copy(&mut stdout, zip);
            // Whoever cannot write any more makes the program end.
            drop(stdout);
            copied
        });
        let fed = dumped.feed(stream, &mut stdin, control);
        drop(stdin);
        (fed, writer.join())
    });
    let status = running.wait().map_err(|e| failed(e.to_string()))?;
    stopped(control)?;
    match copied {
        Ok(copied) => copied.map(drop).map_err(|e| failed(e.to_string()))?,
        Err(_) => return Err(failed("its output could not be written".to_owned())),
    }
    if !status.success() {
        return Err(failed(last_words(&mut stderr, status)));
    }
    // For what stands in the table of contents the program does not read on.
    if options == DEFINITIONS { Ok(()) } else { fed }
}

/// What is made when the rows are there.
const DEFINITIONS: &[&str] = &["--section=post-data"];

/// Counts what passes.
struct Counting<'a, W>(&'a mut W, &'a Control);

impl<W: Write> Write for Counting<'_, W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.1.is_cancelled() {
            return Err(io::Error::other("stopped"));
        }
        let written = self.0.write(buffer)?;
        self.1.add(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
