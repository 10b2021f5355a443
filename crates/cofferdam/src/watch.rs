//! Reload when a configuration file changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{Event, RecursiveMode, Watcher};
use tokio::sync::mpsc;

use crate::gateway::{Inner, Origin};

/// Quiet time after a change before the files are read: editors and Git write in several steps.
const DEBOUNCE: Duration = Duration::from_millis(250);
/// A stream of changes without a quiet moment is read at least this often.
const AT_LEAST: Duration = Duration::from_secs(2);

/// Watches the directories of the main file, of the tenants and of every file that they point at, until the gateway
/// drains.
pub(crate) fn start(inner: &Arc<Inner>) {
    let main = match &*inner.origin.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Origin::File(path) => path.clone(),
        Origin::Given(_) => return,
    };
    let (changed, mut changes) = mpsc::channel::<()>(1);
    let secrets = Arc::clone(&inner.secrets);
    let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        // Reading a file is an event too, and the directory may hold other things than configuration.
        let matters = |path: &PathBuf| is_configuration(path) || secrets.has_read(path);
        if event.is_ok_and(|e| !e.kind.is_access() && e.paths.iter().any(matters)) {
            let _ = changed.try_send(());
        }
    });
    let mut watcher = match watcher {
        Ok(watcher) => watcher,
        Err(error) => {
            tracing::warn!(%error, "configuration files cannot be watched; reload by SIGHUP or the admin API");
            return;
        }
    };
    let mut watched = Vec::new();
    follow(&mut watcher, &mut watched, directories(inner, &main));
    let inner = Arc::clone(inner);
    let tasks = inner.tasks.clone();
    tasks.spawn(async move {
        loop {
            tokio::select! {
                change = changes.recv() => if change.is_none() { return },
                () = inner.draining.cancelled() => return,
            }
            let latest = tokio::time::Instant::now() + AT_LEAST;
            while tokio::time::Instant::now() < latest
                && matches!(tokio::time::timeout(DEBOUNCE, changes.recv()).await, Ok(Some(())))
            {}
            // An error is in the log, the metrics and the admin API; the next change is the next chance.
            let _ = inner.reload(None).await;
            follow(&mut watcher, &mut watched, directories(&inner, &main));
        }
    });
}

/// YAML files, directories, and the `..data` link that Kubernetes swaps when a mounted ConfigMap changes.
fn is_configuration(path: &Path) -> bool {
    let swapped = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(".."));
    // Without an extension it is a directory, there or gone; a log beside the configuration is none.
    swapped || path.extension().map_or(!path.is_file(), |e| e == "yaml" || e == "yml")
}

fn directories(inner: &Inner, main: &Path) -> Vec<PathBuf> {
    let base = main.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
    let tenants = base.join(&inner.catalog.load().tenants_directory);
    // Certificates, keys and passwords are as much a part of the configuration, wherever they are.
    let mut all = vec![base, tenants];
    all.extend(inner.secrets.directories());
    all.sort();
    all.dedup();
    all
}

fn follow(watcher: &mut impl Watcher, watched: &mut Vec<PathBuf>, wanted: Vec<PathBuf>) {
    // All of them anew: a directory that was replaced has its old name and is another one.
    for old in watched.iter() {
        let _ = watcher.unwatch(old);
    }
    for new in &wanted {
        if let Err(error) = watcher.watch(new, RecursiveMode::NonRecursive) {
            tracing::warn!(directory = %new.display(), %error, "a directory cannot be watched");
        }
    }
    *watched = wanted;
}
