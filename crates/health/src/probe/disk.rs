//! Room on a file system of this machine: filestores, backups, the server's data.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{Alone, Probe, bytes, graded};
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Looks at how full the file system is that a directory is on.
#[derive(Debug, Clone)]
pub struct DiskProbe {
    /// What it is called.
    pub name: String,
    /// The directory.
    pub path: PathBuf,
    /// Per cent used, of bytes or of files: a warning, a failure.
    pub limits: (f64, f64),
    /// How often to look.
    pub interval: Duration,
    alone: Alone,
}

impl DiskProbe {
    /// A probe of the file system that a directory is on.
    pub fn new(name: &str, path: PathBuf, limits: (f64, f64), interval: Duration) -> Self {
        Self { name: name.to_owned(), path, limits, interval, alone: Alone::default() }
    }
}

#[async_trait]
impl Probe for DiskProbe {
    fn name(&self) -> String {
        format!("disk {}", self.name)
    }

    fn kind(&self) -> &'static str {
        "disk"
    }

    fn checks(&self) -> Vec<CheckId> {
        vec![self.reachability()]
    }

    fn reachability(&self) -> CheckId {
        CheckId::shared(&format!("disk {}", self.name), "room")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let room =
            |status, text: String| Observation::pass(self.reachability(), Topic::Capacity, now, text).with(status);
        let path = self.path.clone();
        // A file system of a server that is gone can keep whoever asks waiting.
        let asked = self.alone.run(move || rustix::fs::statvfs(&path)).await;
        let stat = match asked {
            Ok(Ok(stat)) => stat,
            Ok(Err(error)) => {
                let error = std::io::Error::from(error);
                return vec![room(Status::Fail, format!("{} cannot be looked at: {error}", self.path.display()))];
            }
            Err(error) => return vec![room(Status::Fail, format!("{}: {error}", self.path.display()))],
        };
        // As `df` has it: what is kept for root is neither used nor free.
        let share = |all: u64, free: u64, available: u64| {
            let used = all.saturating_sub(free) as f64;
            100.0 * used / (used + available as f64).max(1.0)
        };
        let full = share(stat.f_blocks, stat.f_bfree, stat.f_bavail);
        // Some file systems have no number of files to run out of.
        let files = if stat.f_files == 0 { 0.0 } else { share(stat.f_files, stat.f_ffree, stat.f_favail) };
        let free = bytes(stat.f_bavail.saturating_mul(stat.f_frsize) as f64);
        let text = if files > full {
            format!("{files:.0} % of the files that {} can have are there", self.path.display())
        } else {
            format!("{} is {full:.0} % full, {free} are free", self.path.display())
        };
        let (warn, fail) = self.limits;
        vec![
            room(graded(full.max(files), warn, fail), text)
                .figure(Evidence::new("disk_used", full, "%").limited(fail))
                .figure(Evidence::new("files_used", files, "%").limited(fail)),
        ]
    }
}
