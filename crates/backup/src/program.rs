//! Programs that run for us: they end when their work does, when somebody asks to stop, or when nobody waits any more.

use std::io;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::Control;

/// A program that is killed when the work that it is a part of is stopped, whatever it hangs on, or when this is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    child: Arc<Mutex<Child>>,
    watcher: Option<tokio::task::JoinHandle<()>>,
}

/// How often is looked whether a program has ended.
const LOOK: Duration = Duration::from_millis(10);

impl Running {
    /// Watches over a program. What it still waits for breaks when it is killed: its pipes are closed.
    pub(crate) fn new(child: Child, control: &Control) -> Self {
        let child = Arc::new(Mutex::new(child));
        let watcher = tokio::runtime::Handle::try_current().ok().map(|runtime| {
            let (child, control) = (Arc::clone(&child), control.clone());
            runtime.spawn(async move {
                control.cancelled().await;
                kill(&child);
            })
        });
        Self { child, watcher }
    }

    /// Waits for the end. Blocks.
    #[allow(clippy::disallowed_methods)] // called from threads that may wait; the program signals nothing
    pub(crate) fn wait(&self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.take() {
            watcher.abort();
        }
        kill(&self.child);
    }
}

/// Does nothing to a program that has ended.
fn kill(child: &Mutex<Child>) {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    if !matches!(child.try_wait(), Ok(Some(_))) {
        let _ = child.kill();
        let _ = child.wait();
    }
}
