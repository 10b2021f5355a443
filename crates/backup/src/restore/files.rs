//! Files out of a set, each compared with the hash it must have.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha1::{Digest, Sha1};

use crate::logical::{Manifest, blocking, open_beneath, paths, stays_below};
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
        fs::create_dir_all(target.parent().unwrap_or(&target)).map_err(|e| Error::files(&target, &e))?;
        // Made here or not at all: what is there already is somebody else's, and is never removed.
        fs::create_dir(&target).map_err(|e| Error::files(&target, &e))?;
        let fill = || {
            let reader = repository.reader(&set.id)?;
            if reader.has(paths::FILESTORE) {
                reader.extract(paths::FILESTORE, &target)?;
            }
            let manifest = manifest(&reader)?;
            compare(&reader, &manifest, &set, &target, &control)?;
            hand_over(&target)
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
        fs::create_dir_all(&target).map_err(|e| Error::files(&target, &e))?;
        let reader = repository.reader(&set.id)?;
        let manifest = manifest(&reader)?;
        // Into a directory of its own first: a file appears under its name only when it is whole.
        let beside = tempfile::Builder::new()
            .prefix(".restore-")
            .tempdir_in(target.parent().unwrap_or(&target))
            .map_err(|e| Error::files(&target, &e))?;
        let there: HashSet<&str> = manifest
            .files
            .iter()
            .filter(|file| is_whole(&target, &file.name, file.sha1.as_deref()))
            .map(|file| file.name.as_str())
            .collect();
        if there.len() < manifest.files.len() && reader.has(paths::FILESTORE) {
            reader.extract(paths::FILESTORE, beside.path())?;
            hand_over(beside.path())?;
            for file in manifest.files.iter().filter(|file| !there.contains(file.name.as_str())) {
                super::stopped(&control)?;
                let (from, to) = (beside.path().join(&file.name), target.join(&file.name));
                if !stays_below(&file.name) || !from.exists() {
                    continue;
                }
                without_links(&target, &file.name)?;
                let place = || -> io::Result<()> {
                    if let Some(parent) = to.parent() {
                        fs::create_dir_all(parent)?;
                        copy_owner(&target, parent)?;
                    }
                    fs::rename(&from, &to)
                };
                place().map_err(|e| Error::files(&to, &e))?;
            }
        }
        compare(&reader, &manifest, &set, &target, &control)
    })
    .await
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
        fs::create_dir_all(&target).map_err(|e| Error::files(&target, &e))?;
        let mut missing = Vec::new();
        for file in &manifest.files {
            super::stopped(&control)?;
            let wanted = target.join(&file.name);
            if !stays_below(&file.name) {
                missing.push(file);
            } else if is_whole(&target, &file.name, file.sha1.as_deref()) {
            } else if live != target && is_whole(&live, &file.name, file.sha1.as_deref()) {
                without_links(&target, &file.name)?;
                let copy = || {
                    fs::create_dir_all(wanted.parent().unwrap_or(&target))?;
                    let mut from = open_beneath(&live, &file.name)?;
                    io::copy(&mut from, &mut File::create(&wanted)?).map(drop)
                };
                copy().map_err(|e| Error::files(&wanted, &e))?;
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
                let path = format!("{}/{}", paths::FILESTORE, file.name);
                if stays_below(&file.name) {
                    without_links(&target, &file.name)?;
                }
                if stays_below(&file.name) && reader.has(&path) && fetch(&reader, &path, &target.join(&file.name))? {
                    continue;
                }
                still.push(file);
            }
            missing = still;
        }
        hand_over(&target)?;
        Ok(missing.into_iter().map(|file| file.name.clone()).collect())
    })
    .await
}

/// One file out of a set, under its name when it is whole and what its name says.
fn fetch(reader: &Reader<'_>, path: &str, to: &Path) -> Result<bool, Error> {
    let failed = |e: io::Error| Error::files(to, &e);
    let parent = to.parent().unwrap_or(to);
    fs::create_dir_all(parent).map_err(failed)?;
    let mut file = tempfile::Builder::new().prefix(".restore-").tempfile_in(parent).map_err(failed)?;
    reader.file(path, &mut file)?;
    let name = to.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if !hash_of(&mut File::open(file.path()).map_err(failed)?).is_ok_and(|found| found == name) {
        return Ok(false);
    }
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o640);
    fs::set_permissions(file.path(), permissions).map_err(failed)?;
    file.persist(to).map_err(|e| failed(e.error))?;
    Ok(true)
}

/// A second name for every file below a directory: a copy that takes no room and that a collector of the first does not
/// reach.
pub(super) fn link_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    copy_owner(from, to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if kind.is_dir() {
            link_tree(&source, &target)?;
        } else if kind.is_file() {
            match fs::hard_link(&source, &target) {
                // Deleted while we looked, or there already.
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {}
                other => other?,
            }
        }
    }
    Ok(())
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
    target: &Path,
    control: &Control,
) -> Result<(), Error> {
    let mut wrong = Vec::new();
    let mut damaged = 0;
    for file in &manifest.files {
        super::stopped(control)?;
        if is_whole(target, &file.name, file.sha1.as_deref()) {
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
    Err(Error::Mismatch { what: target.display().to_string(), reason })
}

fn is_whole(root: &Path, name: &str, sha1: Option<&str>) -> bool {
    if !stays_below(name) {
        return false;
    }
    let Ok(mut file) = open_beneath(root, name) else { return false };
    sha1.is_none_or(|sha1| hash_of(&mut file).is_ok_and(|found| found == sha1))
}

fn hash_of(file: &mut File) -> io::Result<String> {
    let mut hash = Sha1::new();
    let mut buffer = vec![0; 128 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// The tenant may have put links into its filestore: nothing is written through one.
fn without_links(target: &Path, name: &str) -> Result<(), Error> {
    let mut path = target.to_owned();
    for part in name.split('/') {
        path.push(part);
        if fs::symlink_metadata(&path).is_ok_and(|data| data.file_type().is_symlink()) {
            let reason = "a link is in the way, where a restored file would be written through it";
            return Err(Error::Files { path: path.display().to_string(), reason: reason.to_owned() });
        }
    }
    Ok(())
}

/// Restored files belong to whom the directory of filestores belongs, where we may say so.
pub(crate) fn hand_over(tree: &Path) -> Result<(), Error> {
    fn walk(path: &Path, like: &Path) -> io::Result<()> {
        copy_owner(like, path)?;
        if fs::symlink_metadata(path)?.is_dir() {
            for entry in fs::read_dir(path)? {
                walk(&entry?.path(), like)?;
            }
        }
        Ok(())
    }
    walk(tree, tree.parent().unwrap_or(tree)).map_err(|e| Error::files(tree, &e))
}

fn copy_owner(from: &Path, to: &Path) -> io::Result<()> {
    let (wanted, is) = (fs::metadata(from)?, fs::symlink_metadata(to)?);
    if (wanted.uid(), wanted.gid()) == (is.uid(), is.gid()) {
        return Ok(());
    }
    match std::os::unix::fs::lchown(to, Some(wanted.uid()), Some(wanted.gid())) {
        // Only root may give files away; whoever else restores keeps them.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    }
}
