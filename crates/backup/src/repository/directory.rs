//! Objects as files below a directory.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::store::{Object, Store, StoreError};

/// A directory, local or mounted. `restic -r <directory>` opens the repository in it.
#[derive(Debug, Clone)]
pub struct Directory {
    root: PathBuf,
}

/// Files that are being written; nothing else begins so.
const UNFINISHED: &str = ".unfinished-";

impl Directory {
    /// A directory, which is made with the first object.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, name: &str) -> Result<PathBuf, StoreError> {
        let plain = name.split('/').all(|part| !part.is_empty() && part != "." && part != "..") && !name.contains('\0');
        if plain {
            Ok(self.root.join(name))
        } else {
            Err(self.failed("use", name, io::Error::other("not a name of an object")))
        }
    }

    fn failed(&self, action: &'static str, name: &str, error: io::Error) -> StoreError {
        let store = self.location();
        if error.kind() == io::ErrorKind::NotFound {
            return StoreError::Missing { store, name: name.to_owned() };
        }
        StoreError::Failed { store, action, name: name.to_owned(), reason: error.to_string() }
    }

    /// Written beside, forced to disk, renamed: what a name leads to is always whole. Whether it was written: with `new`,
    /// what is there already stays.
    fn put(&self, path: &Path, parts: &[Bytes], new: bool) -> io::Result<bool> {
        let parent = path.parent().unwrap_or(&self.root);
        make_directories(parent)?;
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(parent)?;
        for part in parts {
            file.write_all(part)?;
        }
        file.as_file().sync_all()?;
        if new {
            match file.persist_noclobber(path) {
                Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
                other => other.map(drop).map_err(|e| e.error)?,
            }
        } else {
            file.persist(path).map_err(|e| e.error)?;
        }
        File::open(parent)?.sync_all()?;
        Ok(true)
    }

    /// Finds what is below a directory and begins with a prefix, and looks nowhere else.
    fn walk(&self, directory: &Path, prefix: &str, found: &mut Vec<Object>) -> io::Result<()> {
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let (kind, path) = (entry.file_type()?, entry.path());
            let Ok(name) = path.strip_prefix(&self.root) else { continue };
            let name = name.to_string_lossy().into_owned();
            if kind.is_dir() {
                let inside = format!("{name}/");
                if inside.starts_with(prefix) || prefix.starts_with(&inside) {
                    self.walk(&path, prefix, found)?;
                }
            } else if kind.is_file()
                && name.starts_with(prefix)
                && !entry.file_name().to_string_lossy().starts_with(UNFINISHED)
            {
                // A file may go while we look: it is then not there.
                match entry.metadata() {
                    Ok(data) => found.push(Object { name, size: data.len() }),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

impl Store for Directory {
    fn location(&self) -> String {
        self.root.display().to_string()
    }

    fn list(&self, prefix: &str) -> Result<Vec<Object>, StoreError> {
        let mut found = Vec::new();
        let start = prefix.rsplit_once('/').map_or_else(|| self.root.clone(), |(dir, _)| self.root.join(dir));
        self.walk(&start, prefix, &mut found).map_err(|e| self.failed("list", prefix, e))?;
        Ok(found)
    }

    fn read(&self, name: &str) -> Result<Bytes, StoreError> {
        fs::read(self.path(name)?).map(Bytes::from).map_err(|e| self.failed("read", name, e))
    }

    fn read_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let path = self.path(name)?;
        let read = || -> io::Result<Bytes> {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(range.start))?;
            let length = usize::try_from(range.end.saturating_sub(range.start)).map_err(io::Error::other)?;
            let mut bytes = vec![0; length];
            file.read_exact(&mut bytes)?;
            Ok(bytes.into())
        };
        read().map_err(|e| self.failed("read a part of", name, e))
    }

    fn write(&self, name: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let path = self.path(name)?;
        self.put(&path, &parts, false).map(drop).map_err(|e| self.failed("write", name, e))
    }

    fn write_new(&self, name: &str, content: Bytes) -> Result<bool, StoreError> {
        let path = self.path(name)?;
        self.put(&path, &[content], true).map_err(|e| self.failed("write", name, e))
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        match fs::remove_file(self.path(name)?) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed("remove", name, error)),
            _ => Ok(()),
        }
    }
}

/// Makes a directory and those above it; each is there after the machine has stopped, too.
fn make_directories(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let above = path.parent().filter(|above| !above.as_os_str().is_empty());
    if let Some(above) = above {
        make_directories(above)?;
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    above.map_or(Ok(()), |above| File::open(above)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_a_store() {
        let directory = tempfile::tempdir().unwrap();
        super::super::conformance::check(&Directory::new(directory.path().join("new"))).unwrap();
    }

    #[test]
    fn no_name_leads_out_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let store = Directory::new(directory.path().join("inside"));
        for name in ["../outside", "a/../../outside", "/etc/passwd", "a//b", "", "."] {
            assert!(store.write(name, vec![Bytes::from_static(b"x")]).is_err(), "{name}");
            assert!(store.read(name).is_err(), "{name}");
        }
    }

    #[test]
    fn what_was_left_half_written_is_not_listed() {
        let directory = tempfile::tempdir().unwrap();
        let store = Directory::new(directory.path());
        store.write("data/whole", vec![Bytes::from_static(b"x")]).unwrap();
        fs::write(directory.path().join("data").join(format!("{UNFINISHED}abc")), b"half").unwrap();
        assert_eq!(store.list("").unwrap(), [Object { name: "data/whole".into(), size: 1 }]);
    }
}
