//! What outlives a watch: files in a directory, each written as a whole.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::probe::Alone;

/// A directory of what is remembered.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    directory: PathBuf,
    alone: Alone,
    /// Whoever has it open and locked remembers here, and nobody else.
    ours: Arc<Mutex<Option<File>>>,
}

/// Nobody waits for a file system for longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What was told and is not over.
pub(crate) const TOLD: &str = "told.json";
/// Looks, by objective.
pub(crate) const LOOKS: &str = "looks.json";

impl Memory {
    /// A directory, which is made when something is written first.
    pub(crate) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), alone: Alone::default(), ours: Arc::default() }
    }

    /// What was remembered under a name; nothing if nothing was. What cannot be read is put aside, and the error says so.
    pub(crate) fn recall<T: DeserializeOwned + Default>(&self, name: &str) -> Result<T, String> {
        let path = self.directory.join(name);
        let (said, heard) = std::sync::mpsc::channel();
        let whole = path.clone();
        // Nobody who starts waits for a file system either.
        let _ = std::thread::Builder::new().spawn(move || said.send(std::fs::read(whole)));
        let late = || Err(std::io::Error::other(format!("it takes more than {} s", PATIENCE.as_secs())));
        let text = match heard.recv_timeout(PATIENCE).unwrap_or_else(|_| late()) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(T::default()),
            Err(error) => return Err(format!("what was remembered is not known: {}: {error}", path.display())),
        };
        serde_json::from_slice(&text).map_err(|error| {
            let aside = path.with_extension("broken");
            let kept = std::fs::rename(&path, &aside).map_or_else(
                |error| format!("it cannot be put aside: {error}"),
                |()| format!("it is {} now", aside.display()),
            );
            format!("what was remembered is not known: {}: {error}; {kept}", path.display())
        })
    }

    /// Remembers a text under a name.
    pub(crate) async fn keep(&self, name: &str, text: serde_json::Result<Vec<u8>>) -> Result<(), String> {
        let path = self.directory.join(name);
        let (directory, whole) = (self.directory.clone(), path.clone());
        let ours = Arc::clone(&self.ours);
        let write = move || {
            std::fs::create_dir_all(&directory)?;
            let mut ours = ours.lock().unwrap_or_else(PoisonError::into_inner);
            if ours.is_none() {
                let lock = File::options().create(true).append(true).open(directory.join("lock"))?;
                lock.try_lock().map_err(|_| std::io::Error::other("somebody else remembers there"))?;
                *ours = Some(lock);
            }
            let beside = whole.with_extension("unfinished");
            std::fs::write(&beside, text?)?;
            std::fs::rename(&beside, &whole)
        };
        // A file system of a server that is gone keeps whoever writes waiting, and nobody else.
        let written = tokio::time::timeout(PATIENCE, self.alone.run(write)).await;
        let written = written.unwrap_or_else(|_| Err(format!("it takes more than {} s", PATIENCE.as_secs())));
        let failed = |error: String| format!("{} is not remembered: {error}", path.display());
        written.map_err(failed)?.map_err(|error| failed(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_kept_is_recalled_and_what_is_broken_is_put_aside_and_told() {
        let directory = tempfile::tempdir().unwrap();
        let memory = Memory::new(&directory.path().join("state"));
        assert_eq!(memory.recall::<Vec<u32>>(TOLD), Ok(Vec::new()));
        memory.keep(TOLD, serde_json::to_vec(&[1, 2, 3])).await.unwrap();
        assert_eq!(memory.recall(TOLD), Ok(vec![1, 2, 3]));
        let path = directory.path().join("state").join(TOLD);
        std::fs::write(&path, "[1, 2").unwrap();
        let error = memory.recall::<Vec<u32>>(TOLD).unwrap_err();
        assert!(error.contains("told.json: EOF") && error.contains("told.broken now"), "{error}");
        assert!(path.with_extension("broken").exists() && !path.exists());
        // A file system that hangs holds up nobody for long, and no second time.
        let pipe = path.with_extension("unfinished");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let error = memory.keep(TOLD, serde_json::to_vec(&1)).await.unwrap_err();
        assert!(error.contains("it takes more than 2 s"), "{error}");
        let error = memory.keep(TOLD, serde_json::to_vec(&1)).await.unwrap_err();
        assert!(error.contains("still hangs"), "{error}");
        std::fs::read(&pipe).unwrap();
        while pipe.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        std::fs::remove_file(&path).unwrap();
        // Where somebody else remembers nobody does.
        let other = Memory::new(&directory.path().join("state"));
        let error = other.keep(TOLD, serde_json::to_vec(&1)).await.unwrap_err();
        assert!(error.contains("somebody else remembers there"), "{error}");
        drop(memory);
        other.keep(TOLD, serde_json::to_vec(&1)).await.unwrap();
        // Somewhere where nothing can be kept.
        let error = Memory::new(&path.with_extension("broken")).keep(TOLD, serde_json::to_vec(&1)).await.unwrap_err();
        assert!(error.contains("is not remembered"), "{error}");
    }
}
