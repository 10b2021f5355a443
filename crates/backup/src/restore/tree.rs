//! Directories that a tenant writes into while we do.
//!
//! Paths cannot be trusted there: between looking at one and using it, any part of it may have become a link to another
//! tenant's files. So a directory is opened once, and everything below is reached from the open directory, one name at a
//! time, and never through a link. What is made belongs to whom the filestores belong; what is there keeps its owner.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::files::hash_of;
use crate::Error;
use crate::logical::{DEEPEST, stays_below};

/// An open directory. Nothing is reached through a link, the directory itself neither.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
    path: PathBuf,
    owner: (u32, u32),
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Tree {
    /// Opens a directory, if it is there.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>, Error> {
        match rustix::fs::openat(CWD, path, DIRECTORY, Mode::empty()) {
            Ok(root) => Ok(Some(Self::of(root, path).map_err(|e| Error::files(path, &e))?)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(refused(path, error)),
        }
    }

    /// Opens a directory, which is made if it is not there; those above it too.
    pub(crate) fn open_or_make(path: &Path) -> Result<Self, Error> {
        let failed = |e: io::Error| Error::files(path, &e);
        let above = path.parent().unwrap_or(path);
        std::fs::create_dir_all(above).map_err(failed)?;
        let like = owner_of(File::open(above).map_err(failed)?.as_fd()).map_err(failed)?;
        let made = match rustix::fs::mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(failed(error.into())),
        };
        let root = rustix::fs::openat(CWD, path, DIRECTORY, Mode::empty()).map_err(|e| refused(path, e))?;
        if made {
            give(root.as_fd(), like).map_err(failed)?;
        }
        Self::of(root, path).map_err(failed)
    }

    /// Makes a directory that must not be there yet, ours until it is handed over.
    pub(crate) fn make(path: &Path) -> Result<Self, Error> {
        let failed = |e: io::Error| Error::files(path, &e);
        std::fs::create_dir_all(path.parent().unwrap_or(path)).map_err(failed)?;
        rustix::fs::mkdirat(CWD, path, Mode::from_raw_mode(0o755)).map_err(|e| failed(e.into()))?;
        let root = rustix::fs::openat(CWD, path, DIRECTORY, Mode::empty()).map_err(|e| refused(path, e))?;
        if owner_of(root.as_fd()).map_err(failed)?.0 != rustix::process::geteuid().as_raw() {
            return Err(failed(io::Error::other("somebody has put another directory in its place")));
        }
        Self::of(root, path).map_err(failed)
    }

    /// Everything below this directory, which was made by us, and at last the directory itself, belongs to whom the directory
    /// above belongs to, where we may say so. Whoever gets a directory finds nothing in it that is still to be given.
    pub(crate) fn hand_over(&self) -> Result<(), Error> {
        let failed = |e: io::Error| Error::files(&self.path, &e);
        let above = File::open(self.path.parent().unwrap_or(&self.path)).map_err(failed)?;
        let owner = owner_of(above.as_fd()).map_err(failed)?;
        give_all(self.root.as_fd(), owner).map_err(failed)?;
        // What was filled is what bears the name.
        let (ours, named) = (
            rustix::fs::fstat(&self.root).map_err(|e| failed(e.into()))?,
            rustix::fs::statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| failed(e.into()))?,
        );
        if (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino) {
            return Ok(());
        }
        Err(failed(io::Error::other("somebody has put another directory in its place")))
    }

    /// A path that leads to this directory, whatever becomes of its name, for as long as this is open.
    pub(crate) fn lasting_path(&self) -> PathBuf {
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd()));
        if path.exists() { path } else { self.path.clone() }
    }

    fn of(root: OwnedFd, path: &Path) -> io::Result<Self> {
        let owner = owner_of(root.as_fd())?;
        Ok(Self { root, path: path.to_owned(), owner })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file to read it. Never waits, whatever it is.
    pub(crate) fn file(&self, name: &str) -> io::Result<File> {
        let (directory, last) = self.directory_of(name, false)?;
        open_file(directory.as_fd(), last)
    }

    /// Whether a file is there, and what its hash says.
    pub(crate) fn is_whole(&self, name: &str, sha1: Option<&str>) -> bool {
        let Ok(mut file) = self.file(name) else { return false };
        sha1.is_none_or(|sha1| hash_of(&mut file).is_ok_and(|found| found == sha1))
    }

    /// Writes a file under its name, if `write` says that it is good; it appears when it is whole.
    pub(crate) fn put<E>(&self, name: &str, write: impl FnOnce(&mut File) -> Result<bool, E>) -> Result<bool, E>
    where
        E: From<Error>,
    {
        let failed = |e: io::Error| E::from(Error::files(&self.path.join(name), &e));
        let (directory, last) = self.directory_of(name, true).map_err(failed)?;
        let (hidden, mut file) = unfinished(directory.as_fd()).map_err(failed)?;
        let written = write(&mut file).and_then(|good| {
            if good {
                give(file.as_fd(), self.owner).map_err(failed)?;
                rustix::fs::renameat(&directory, &hidden, &directory, last).map_err(|e| failed(e.into()))?;
            }
            Ok(good)
        });
        if !matches!(written, Ok(true)) {
            let _ = rustix::fs::unlinkat(&directory, &hidden, AtFlags::empty());
        }
        written
    }

    /// Moves a file from a directory of ours to the same name here.
    pub(crate) fn take(&self, name: &str, from: &Self) -> Result<(), Error> {
        let failed = |e: io::Error| Error::files(&self.path.join(name), &e);
        let (there, last) = from.directory_of(name, false).map_err(failed)?;
        let (here, _) = self.directory_of(name, true).map_err(failed)?;
        give(open_file(there.as_fd(), last).map_err(failed)?.as_fd(), self.owner).map_err(failed)?;
        rustix::fs::renameat(&there, last, &here, last).map_err(|e| failed(e.into()))
    }

    /// Gives the regular files of another directory a second name here, where their names are not taken: a copy that takes
    /// no room and that a collector of the first does not reach.
    pub(crate) fn link_all(&self, from: &Self) -> Result<(), Error> {
        let failed = |e: io::Error| Error::files(&self.path, &e);
        self.link_below(from.root.as_fd(), self.root.as_fd(), DEEPEST).map_err(failed)
    }

    fn link_below(&self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
        for entry in Dir::read_from(from)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => match rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                    Err(_) => continue,
                },
                known => known,
            };
            match kind {
                FileType::Directory if depth > 0 => {
                    let source = match rustix::fs::openat(from, name, DIRECTORY, Mode::empty()) {
                        // Gone, or a link since.
                        Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => continue,
                        other => other?,
                    };
                    let target = self.enter(to, name, true)?;
                    self.link_below(source.as_fd(), target.as_fd(), depth - 1)?;
                }
                FileType::RegularFile => match rustix::fs::linkat(from, name, to, name, AtFlags::empty()) {
                    // Deleted while we looked, or there already.
                    Err(Errno::NOENT | Errno::EXIST) => {}
                    other => other?,
                },
                _ => {}
            }
        }
        Ok(())
    }

    /// The directory that a name is in, and its last part.
    fn directory_of<'n>(&self, name: &'n str, make: bool) -> io::Result<(OwnedFd, &'n str)> {
        if !stays_below(name) {
            return Err(io::Error::other("its name leads out of the filestore"));
        }
        let mut directory = self.root.try_clone()?;
        let mut parts = name.split('/').peekable();
        let mut last = name;
        while let Some(part) = parts.next() {
            if parts.peek().is_some() {
                directory = self.enter(directory.as_fd(), part, make)?;
            } else {
                last = part;
            }
        }
        Ok((directory, last))
    }

    fn enter<P: rustix::path::Arg + Copy>(
        &self,
        directory: BorrowedFd<'_>,
        name: P,
        make: bool,
    ) -> io::Result<OwnedFd> {
        let made = make && rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o755)).is_ok();
        let inside = rustix::fs::openat(directory, name, DIRECTORY, Mode::empty()).map_err(link_or)?;
        if made {
            give(inside.as_fd(), self.owner)?;
        }
        Ok(inside)
    }
}

fn give_all(directory: BorrowedFd<'_>, owner: (u32, u32)) -> io::Result<()> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        match rustix::fs::openat(directory, name, DIRECTORY, Mode::empty()) {
            Ok(inside) => give_all(inside.as_fd(), owner)?,
            Err(Errno::NOTDIR | Errno::LOOP) => {
                let file = rustix::fs::openat(directory, name, OFlags::RDONLY | NEVER_WAIT, Mode::empty())?;
                give(file.as_fd(), owner)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    give(directory, owner)
}

const NEVER_WAIT: OFlags = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).union(OFlags::NOCTTY).union(OFlags::CLOEXEC);

fn open_file(directory: BorrowedFd<'_>, name: &str) -> io::Result<File> {
    let file = rustix::fs::openat(directory, name, OFlags::RDONLY | NEVER_WAIT, Mode::empty()).map_err(link_or)?;
    let file = File::from(file);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a file")) }
}

/// A new file with a name that nobody looks for.
fn unfinished(directory: BorrowedFd<'_>) -> io::Result<(String, File)> {
    let how = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | NEVER_WAIT;
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let name = format!(".restore-{}", hex::encode(random));
    let file = rustix::fs::openat(directory, &name, how, Mode::from_raw_mode(0o640))?;
    Ok((name, File::from(file)))
}

fn owner_of(file: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let stat = rustix::fs::fstat(file)?;
    Ok((stat.st_uid, stat.st_gid))
}

/// Only root may give files away; whoever else restores keeps them.
fn give(file: BorrowedFd<'_>, (user, group): (u32, u32)) -> io::Result<()> {
    if owner_of(file)? == (user, group) {
        return Ok(());
    }
    let (user, group) = (rustix::fs::Uid::from_raw(user), rustix::fs::Gid::from_raw(group));
    match rustix::fs::fchown(file, Some(user), Some(group)) {
        Err(Errno::PERM) => Ok(()),
        other => Ok(other?),
    }
}

/// A name that turns out to be a link where a directory or a file was wanted.
fn link_or(error: Errno) -> io::Error {
    match error {
        Errno::LOOP => io::Error::other("expected a file and found a link: nothing is reached through one"),
        Errno::NOTDIR => {
            io::Error::other("expected a directory and found a file or a link: nothing is reached through one")
        }
        other => other.into(),
    }
}

fn refused(path: &Path, error: Errno) -> Error {
    match error {
        // Where a directory is wanted and a link found, Linux says either.
        Errno::LOOP | Errno::NOTDIR => {
            let reason = "expected a directory that is no link: nothing is restored through one";
            Error::Files { path: path.display().to_string(), reason: reason.to_owned() }
        }
        other => Error::files(path, &other.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct House {
        _directory: tempfile::TempDir,
        mine: PathBuf,
        theirs: PathBuf,
        kept: PathBuf,
    }

    fn house() -> House {
        let directory = tempfile::tempdir().unwrap();
        let [mine, theirs, kept] = ["mine", "theirs", "kept"].map(|name| {
            let path = directory.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        });
        House { _directory: directory, mine, theirs, kept }
    }

    fn write(tree: &Tree, name: &str) -> Result<bool, Error> {
        tree.put(name, |file| {
            io::Write::write_all(file, b"new").map_err(|e| Error::files(tree.path(), &e))?;
            Ok(true)
        })
    }

    #[test]
    fn nothing_is_written_or_read_through_a_link() {
        let house = house();
        std::fs::write(house.theirs.join("secret"), "theirs").unwrap();
        symlink(&house.theirs, house.mine.join("ab")).unwrap();
        symlink(house.theirs.join("secret"), house.mine.join("file")).unwrap();
        let tree = Tree::open(&house.mine).unwrap().unwrap();
        assert!(write(&tree, "ab/new").unwrap_err().to_string().contains("link"));
        assert!(tree.file("ab/secret").is_err() && tree.file("file").unwrap_err().to_string().contains("link"));
        for name in ["../theirs/new", "/etc/new", "", "cd/../../new"] {
            assert!(write(&tree, name).is_err(), "{name}");
        }
        // A link in place of a file is replaced, not followed.
        assert!(write(&tree, "file").unwrap());
        assert_eq!(std::fs::read_to_string(house.theirs.join("secret")).unwrap(), "theirs");
        assert_eq!(std::fs::read_dir(&house.theirs).unwrap().count(), 1);
        let linked = house.mine.with_file_name("linked");
        symlink(&house.theirs, &linked).unwrap();
        assert!(Tree::open(&linked).unwrap_err().to_string().contains("no link"));
        assert!(Tree::open_or_make(&linked).unwrap_err().to_string().contains("no link"));
    }

    #[test]
    fn second_names_are_given_to_files_and_to_nothing_else() {
        let house = house();
        std::fs::create_dir_all(house.kept.join("ab/deep")).unwrap();
        std::fs::write(house.kept.join("ab/file"), "file").unwrap();
        std::fs::write(house.kept.join("ab/deep/er"), "deeper").unwrap();
        std::fs::write(house.theirs.join("secret"), "theirs").unwrap();
        symlink(&house.theirs, house.kept.join("dir")).unwrap();
        symlink(house.theirs.join("secret"), house.kept.join("link")).unwrap();
        let (kept, mine) = (Tree::open(&house.kept).unwrap().unwrap(), Tree::open(&house.mine).unwrap().unwrap());
        mine.link_all(&kept).unwrap();
        mine.link_all(&kept).unwrap();
        assert_eq!(std::fs::read_to_string(house.mine.join("ab/deep/er")).unwrap(), "deeper");
        let mut names: Vec<_> = std::fs::read_dir(&house.mine).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["ab"]);
        // A link where a directory would be filled is no way in.
        std::fs::remove_dir_all(house.mine.join("ab")).unwrap();
        symlink(&house.theirs, house.mine.join("ab")).unwrap();
        assert!(mine.link_all(&kept).is_err());
        assert_eq!(std::fs::read_dir(&house.theirs).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_good_does_not_appear() {
        let house = house();
        let tree = Tree::open(&house.mine).unwrap().unwrap();
        assert!(!tree.put("ab/file", |_| Ok::<_, Error>(false)).unwrap());
        assert!(tree.put("ab/file", |_| Err::<bool, _>(Error::Cancelled)).is_err());
        assert_eq!(std::fs::read_dir(house.mine.join("ab")).unwrap().count(), 0);
        assert!(write(&tree, "ab/file").unwrap() && tree.is_whole("ab/file", None));
        assert!(!tree.is_whole("ab/file", Some("0")));
    }
}
