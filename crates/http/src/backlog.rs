//! What a server has answered and the client has not taken yet: in memory while it is little, in a temporary file
//! beyond. So a client that reads slowly keeps nobody's worker. Where the file cannot grow, because the disk is full, a backlog
//! takes no more than it has been given: then the client's pace is the server's again, and the answer comes whole all the same.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

/// Bytes read back from the file at a time.
const CHUNK: usize = 64 << 10;

/// First in, first out.
#[derive(Debug)]
pub(crate) struct Backlog {
    memory: VecDeque<Bytes>,
    in_memory: usize,
    file: Option<Arc<File>>,
    /// The part of the file that is written and not read.
    read_from: u64,
    write_to: u64,
    threshold: usize,
    /// Bytes of the file, which is written round and round.
    size: u64,
    directory: Option<PathBuf>,
    /// What could not be written; behind everything else.
    unwritten: Option<Bytes>,
    /// It was said that something could not be written.
    is_said: bool,
}

/// Room beside the greatest backlog for the part that comes when it is nearly full.
const SLACK: u64 = 1 << 20;

impl Backlog {
    /// `most`: nothing is pushed while there are so many bytes in it.
    pub(crate) fn new(threshold: u64, most: u64, directory: Option<PathBuf>) -> Self {
        Self {
            memory: VecDeque::new(),
            in_memory: 0,
            file: None,
            read_from: 0,
            write_to: 0,
            threshold: usize::try_from(threshold).unwrap_or(usize::MAX),
            size: most.saturating_add(SLACK),
            directory,
            unwritten: None,
            is_said: false,
        }
    }

    /// Bytes in it.
    pub(crate) fn len(&self) -> u64 {
        let unwritten = self.unwritten.as_ref().map_or(0, Bytes::len);
        (self.in_memory + unwritten) as u64 + (self.write_to - self.read_from)
    }

    /// Whether nothing may be pushed before something is taken.
    pub(crate) fn is_stuck(&self) -> bool {
        self.unwritten.is_some()
    }

    /// Adds bytes at the end. What cannot be written is kept, and the backlog is stuck.
    pub(crate) async fn push(&mut self, bytes: Bytes) -> io::Result<()> {
        if self.is_stuck() {
            return Err(io::Error::other("pushed into a backlog that takes no more"));
        }
        let file_in_use = self.write_to > self.read_from;
        if !file_in_use && self.in_memory + bytes.len() <= self.threshold {
            self.in_memory += bytes.len();
            self.memory.push_back(bytes);
            return Ok(());
        }
        if self.write_to - self.read_from + bytes.len() as u64 > self.size {
            return Err(io::Error::other("more than the backlog holds"));
        }
        let (file, directory, at, size) = (self.file.clone(), self.directory.clone(), self.write_to, self.size);
        let whole = bytes.clone();
        let written = tokio::task::spawn_blocking(move || {
            let file = match (file, directory) {
                (Some(file), _) => file,
                // A file without a name: it disappears with its handle, whatever happens.
                (None, Some(directory)) => Arc::new(tempfile::tempfile_in(directory)?),
                (None, None) => Arc::new(tempfile::tempfile()?),
            };
            // Round and round: what is read is written over.
            let at = at % size;
            let first = usize::try_from(size - at).unwrap_or(usize::MAX).min(bytes.len());
            file.write_all_at(&bytes[..first], at)?;
            file.write_all_at(&bytes[first..], 0)?;
            Ok::<_, io::Error>((file, bytes.len()))
        });
        match written.await.map_err(io::Error::other)? {
            Ok((file, length)) => {
                self.file = Some(file);
                self.write_to += length as u64;
            }
            Err(error) => {
                if !std::mem::replace(&mut self.is_said, true) {
                    tracing::warn!(%error, "an answer is not read ahead of its client: it cannot be stored");
                }
                self.unwritten = Some(whole);
            }
        }
        Ok(())
    }

    /// Takes bytes from the front; `None` when there are none.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        if let Some(bytes) = self.memory.pop_front() {
            self.in_memory -= bytes.len();
            return Ok(Some(bytes));
        }
        let left = self.write_to - self.read_from;
        let Some(file) = self.file.clone().filter(|_| left > 0) else { return Ok(self.unwritten.take()) };
        let at = self.read_from % self.size;
        let length = usize::try_from(left.min(self.size - at)).unwrap_or(CHUNK).min(CHUNK);
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, at)?;
            Ok::<_, io::Error>(bytes)
        });
        let bytes = read.await.map_err(io::Error::other)??;
        self.read_from += bytes.len() as u64;
        if self.read_from == self.write_to {
            // All of it is read: what comes next may lie in memory again.
            (self.read_from, self.write_to) = (0, 0);
        }
        Ok(Some(bytes.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_come_out_in_the_order_in_which_they_went_in_however_reads_and_writes_alternate() {
        for threshold in [0, 1_000, 1 << 20] {
            let mut backlog = Backlog::new(threshold, 1 << 20, None);
            let mut rng = fastrand::Rng::with_seed(threshold);
            let (mut put, mut taken, mut expected) = (0u64, 0u64, 0u64);
            let byte = |i: u64| (i.wrapping_mul(31) >> 3) as u8;
            for _ in 0..400 {
                if rng.bool() {
                    let n = rng.u64(1..3_000);
                    backlog.push((put..put + n).map(byte).collect::<Vec<_>>().into()).await.unwrap();
                    put += n;
                    expected += n;
                } else if let Some(bytes) = backlog.next().await.unwrap() {
                    for b in &bytes {
                        assert_eq!(*b, byte(taken));
                        taken += 1;
                    }
                    expected -= bytes.len() as u64;
                }
                assert_eq!(backlog.len(), expected);
            }
            while let Some(bytes) = backlog.next().await.unwrap() {
                taken += bytes.len() as u64;
            }
            assert_eq!(taken, put);
        }
    }

    #[tokio::test]
    async fn what_does_not_fit_on_a_full_disk_comes_out_last_and_nothing_is_taken_until_then() {
        let mut backlog = Backlog::new(10, 1 << 20, None);
        let whole = async |backlog: &mut Backlog| backlog.next().await.unwrap().unwrap();
        backlog.push(Bytes::from_static(b"in memory")).await.unwrap();
        // A disk on which there is never room.
        backlog.file = Some(Arc::new(File::options().write(true).open("/dev/full").unwrap()));
        backlog.push(Bytes::from_static(b"too much")).await.unwrap();
        assert!(backlog.is_stuck() && backlog.len() == 17);
        assert!(backlog.push(Bytes::from_static(b"more")).await.is_err(), "it would be lost or out of order");
        assert_eq!(whole(&mut backlog).await, "in memory");
        assert!(backlog.is_stuck());
        assert_eq!(whole(&mut backlog).await, "too much");
        assert!(!backlog.is_stuck() && backlog.len() == 0 && backlog.next().await.unwrap().is_none());
        backlog.push(Bytes::from_static(b"little")).await.unwrap();
        assert_eq!(whole(&mut backlog).await, "little");
    }

    #[tokio::test]
    async fn a_client_that_always_lags_costs_no_more_disk_than_the_backlog() {
        let (most, mut sent) = (256u64 << 10, 0u64);
        let mut backlog = Backlog::new(64 << 10, most, None);
        while sent < 16 << 20 {
            while backlog.len() < most {
                backlog.push(vec![0u8; 64 << 10].into()).await.unwrap();
                sent += 64 << 10;
            }
            backlog.next().await.unwrap();
        }
        let on_disk = backlog.file.as_ref().unwrap().metadata().unwrap().len();
        assert!(on_disk <= most + SLACK, "{on_disk} bytes on disk");
    }
}
