//! Files out of a set, each compared with the hash it must have.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sha1::{Digest, Sha1};

use super::tree::Tree;
use crate::logical::{Manifest, ManifestFile, blocking, paths, stays_below};
use crate::model::BackupSet;
use crate::repository::{Reader, Repository};
use crate::{Control, Error};

/// Writes a set's files into a directory that is not there yet.
pub(super) async fn fresh(
    repository: &Arc<Repository>,
    set: &BackupSet,
    target: &Path,
    control: &Control,
) -> Result<(), Error> {
    let (repository, set, target, control) = (Arc::clone(repository), set.clone(), target.to_owned(), control.clone());
    blocking(move || {
        // Made here or not at all: what is there already is somebody else's, and is never removed.
        let tree = Tree::make(&target)?;
        let fill = || {
            let reader = repository.reader(&set.id)?;
            if reader.has(paths::FILESTORE) {
                reader.extract(paths::FILESTORE, &tree.lasting_path())?;
            }
            let manifest = manifest(&reader)?;
            compare(&reader, &manifest, &set, &tree, &control)?;
            tree.hand_over()
        };
        let filled = fill();
        if filled.is_err() {
            let _ = fs::remove_dir_all(&target);
        }
        filled
    })
    .await
}

/// Adds a set's files to those that are there: names are hashes, so that nothing is ever overwritten with something else.
pub(super) async fn add(
    repository: &Arc<Repository>,
    set: &BackupSet,
    target: &Path,
    control: &Control,
) -> Result<(), Error> {
    let (repository, set, target, control) = (Arc::clone(repository), set.clone(), target.to_owned(), control.clone());
    blocking(move || {
        let tree = Tree::open_or_make(&target)?;
        let reader = repository.reader(&set.id)?;
        let manifest = manifest(&reader)?;
        let wanted: Vec<&ManifestFile> = manifest
            .files
            .iter()
            .filter(|file| stays_below(&file.name) && !tree.is_whole(&file.name, file.sha1.as_deref()))
            .collect();
        if !wanted.is_empty() && reader.has(paths::FILESTORE) {
            // Into a directory of its own first: a file appears under its name only when it is whole.
            let above = target.parent().unwrap_or(&target);
            sweep(above);
            let beside =
                tempfile::Builder::new().prefix(BESIDE).tempdir_in(above).map_err(|e| Error::files(&target, &e))?;
            let Some(new) = Tree::open(beside.path())? else { return Err(gone(beside.path())) };
            reader.extract(paths::FILESTORE, &new.lasting_path())?;
            for file in wanted {
                super::stopped(&control)?;
                // What the set lacks is not there.
                if new.file(&file.name).is_ok() {
                    tree.take(&file.name, &new)?;
                }
            }
        }
        compare(&reader, &manifest, &set, &tree, &control)
    })
    .await
}

const BESIDE: &str = ".restore-";
/// What is older was left by a restore that has died.
const OLD: Duration = Duration::from_secs(2 * 24 * 3_600);

/// Removes what restores that have died have left beside filestores.
fn sweep(above: &Path) {
    for entry in fs::read_dir(above).into_iter().flatten().flatten() {
        let left = entry.file_name().to_str().is_some_and(|name| name.starts_with(BESIDE))
            && entry.metadata().is_ok_and(|data| {
                data.is_dir() && data.modified().is_ok_and(|at| at.elapsed().is_ok_and(|age| age > OLD))
            });
        if left {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn gone(path: &Path) -> Error {
    Error::files(path, &io::ErrorKind::NotFound.into())
}

/// Brings together the files of a manifest in a directory: those that are there, those of the live filestore, and those
/// of any backup set, the newest first. What is nowhere is returned.
pub(super) async fn find(
    repository: Option<Arc<Repository>>,
    manifest: &Arc<Manifest>,
    live: &Path,
    target: &Path,
    control: &Control,
) -> Result<Vec<String>, Error> {
    let (manifest, live, target, control) = (Arc::clone(manifest), live.to_owned(), target.to_owned(), control.clone());
    blocking(move || {
        let tree = Tree::open_or_make(&target)?;
        let live = if live == target { None } else { Tree::open(&live)? };
        let mut missing = Vec::new();
        for file in &manifest.files {
            super::stopped(&control)?;
            let (name, sha1) = (&file.name, file.sha1.as_deref());
            if !stays_below(name) {
                missing.push(file);
            } else if tree.is_whole(name, sha1) {
            } else if let Some(mut from) = live.as_ref().and_then(|live| live.file(name).ok()) {
                let copied = tree.put(name, |to| {
                    let hash = copy_hashed(&mut from, to).map_err(|e| Error::files(&target.join(name), &e))?;
                    Ok::<_, Error>(sha1.is_none_or(|sha1| sha1 == hash))
                })?;
                if !copied {
                    missing.push(file);
                }
            } else {
                missing.push(file);
            }
        }
        let sets = match (&repository, missing.is_empty()) {
            (Some(repository), false) => repository.sets()?,
            _ => Vec::new(),
        };
        for set in sets.iter().rev() {
            let Some(repository) = repository.as_ref().filter(|_| !missing.is_empty()) else { break };
            let reader = repository.reader(&set.id)?;
            let mut still = Vec::new();
            for file in missing {
                super::stopped(&control)?;
                if !fetch(&reader, file, &tree)? {
                    still.push(file);
                }
            }
            missing = still;
        }
        Ok(missing.into_iter().map(|file| file.name.clone()).collect())
    })
    .await
}

/// One file out of a set, under its name when it is what its hash says.
fn fetch(reader: &Reader<'_>, file: &ManifestFile, tree: &Tree) -> Result<bool, Error> {
    let path = format!("{}/{}", paths::FILESTORE, file.name);
    let Some(sha1) = file.sha1.as_deref().filter(|_| stays_below(&file.name) && reader.has(&path)) else {
        return Ok(false);
    };
    tree.put(&file.name, |to| {
        let mut to = Hashing { inner: to, hash: Sha1::new() };
        reader.file(&path, &mut to)?;
        Ok(hex::encode(to.hash.finalize()) == sha1)
    })
}

/// A second name in `to` for every file below `from`, if that is there.
pub(super) fn link_tree(from: &Path, to: &Path) -> Result<(), Error> {
    let Some(from) = Tree::open(from)? else { return Ok(()) };
    Tree::open_or_make(to)?.link_all(&from)
}

/// Why the files of a tenant cannot be kept for a way back beside it: links do not go from one mount to another, of the same
/// file system either.
pub(super) fn apart(filestores: &Path, target: &Path) -> Option<String> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    let mount = |path: &Path| {
        let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok()?;
        Some((stat.stx_dev_major, stat.stx_dev_minor, stat.stx_mnt_id))
    };
    let (all, own) = (mount(filestores)?, mount(target)?);
    (all != own).then(|| {
        format!(
            "{} is a mount of its own: what is there could not be kept beside it; expected it on that of {}",
            target.display(),
            filestores.display()
        )
    })
}

pub(super) fn free_bytes(directory: &Path) -> Option<u64> {
    let mut directory: PathBuf = directory.to_owned();
    // It may not be there yet; its file system is that of the next one above.
    while !directory.exists() {
        if !directory.pop() {
            return None;
        }
    }
    let stat = rustix::fs::statvfs(&directory).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

pub(crate) fn manifest(reader: &Reader<'_>) -> Result<Manifest, Error> {
    let mut text = Vec::new();
    reader.file(paths::MANIFEST, &mut text)?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::Mismatch { what: paths::MANIFEST.to_owned(), reason: e.to_string() })
}

/// Every file that the database refers to is there and is what its hash says, but for those that the set admits to lack or
/// to have otherwise.
fn compare(
    reader: &Reader<'_>,
    manifest: &Manifest,
    set: &BackupSet,
    tree: &Tree,
    control: &Control,
) -> Result<(), Error> {
    let mut wrong = Vec::new();
    let mut damaged = 0;
    for file in &manifest.files {
        super::stopped(control)?;
        if tree.is_whole(&file.name, file.sha1.as_deref()) {
            continue;
        }
        let saved = stays_below(&file.name) && reader.has(&format!("{}/{}", paths::FILESTORE, file.name));
        if saved {
            damaged += 1;
        }
        // Not saved: it was missing then, and the set says so.
        if saved && damaged > set.filestore.damaged || !saved && set.filestore.missing == 0 {
            wrong.push(file.name.as_str());
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let names = wrong.iter().take(5).copied().collect::<Vec<_>>().join(", ");
    let reason = format!("{} files are missing or differ, such as {names}", wrong.len());
    Err(Error::Mismatch { what: tree.path().display().to_string(), reason })
}

pub(super) fn hash_of(file: &mut File) -> io::Result<String> {
    let mut hash = Sha1::new();
    let mut buffer = vec![0; 128 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn copy_hashed(from: &mut File, to: &mut File) -> io::Result<String> {
    let mut to = Hashing { inner: to, hash: Sha1::new() };
    io::copy(from, &mut to)?;
    Ok(hex::encode(to.hash.finalize()))
}

/// What is written, hashed as it passes.
pub(crate) struct Hashing<W> {
    pub(crate) inner: W,
    pub(crate) hash: Sha1,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.hash.update(&buffer[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_on_a_file_system_of_their_own_are_told_of_before_anything_is_done() {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path().join("acme");
        assert_eq!(apart(directory.path(), &own), None, "there are none yet");
        fs::create_dir(&own).unwrap();
        assert_eq!(apart(directory.path(), &own), None);
        let told = apart(directory.path(), Path::new("/proc")).unwrap();
        assert!(told.contains("/proc is a mount of its own"), "{told}");
    }
}
