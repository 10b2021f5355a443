//! A request body that waits for a worker: in memory while it is small, in a temporary file beyond.

use std::io::{self, BufReader, Read};
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

/// Bytes read back from the file at a time.
const CHUNK: usize = 64 << 10;

/// The body, first written, then read.
#[derive(Debug)]
pub(crate) struct Spool {
    memory: BytesMut,
    file: Option<File>,
    length: u64,
    threshold: usize,
    directory: Option<PathBuf>,
}

impl Spool {
    pub(crate) fn new(threshold: u64, directory: Option<PathBuf>) -> Self {
        let threshold = usize::try_from(threshold).unwrap_or(usize::MAX);
        Self { memory: BytesMut::new(), file: None, length: 0, threshold, directory }
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> u64 {
        self.length
    }

    /// Adds bytes.
    pub(crate) async fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.length += bytes.len() as u64;
        if self.file.is_none() && self.memory.len() + bytes.len() <= self.threshold {
            self.memory.extend_from_slice(bytes);
            return Ok(());
        }
        let file = if let Some(file) = &mut self.file {
            file
        } else {
            let file = temporary(self.directory.clone()).await?;
            let file = self.file.insert(file);
            file.write_all(&std::mem::take(&mut self.memory)).await?;
            file
        };
        file.write_all(bytes).await
    }

    /// Ends writing; reading begins at the front.
    pub(crate) async fn rewind(&mut self) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.flush().await?;
            file.rewind().await?;
        }
        Ok(())
    }

    /// Looks into the whole body, which is read from the front again afterwards.
    ///
    /// What is in a file is read on a thread that may block.
    pub(crate) async fn inspect<T: Send + 'static>(
        &mut self,
        look: impl FnOnce(&mut dyn Read) -> T + Send + 'static,
    ) -> io::Result<T> {
        let Some(file) = &mut self.file else { return Ok(look(&mut &self.memory[..])) };
        let copy = file.try_clone().await?.into_std().await;
        let seen = tokio::task::spawn_blocking(move || look(&mut BufReader::new(copy))).await;
        // Both handles have one position.
        file.rewind().await?;
        seen.map_err(io::Error::other)
    }

    /// Whether it is in a file.
    pub(crate) fn is_large(&self) -> bool {
        self.file.is_some()
    }

    /// The next bytes; empty at the end.
    pub(crate) async fn next(&mut self) -> io::Result<Bytes> {
        let Some(file) = &mut self.file else { return Ok(std::mem::take(&mut self.memory).freeze()) };
        let mut chunk = BytesMut::with_capacity(CHUNK);
        file.read_buf(&mut chunk).await?;
        Ok(chunk.freeze())
    }
}

/// A file without a name: it disappears with its handle, whatever happens.
async fn temporary(directory: Option<PathBuf>) -> io::Result<File> {
    let open = move || match directory {
        Some(directory) => tempfile::tempfile_in(directory),
        None => tempfile::tempfile(),
    };
    let file = tokio::task::spawn_blocking(open).await.map_err(io::Error::other)??;
    Ok(File::from_std(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_comes_back_whole_from_memory_and_from_a_file() {
        for threshold in [1 << 20, 10, 0] {
            let mut spool = Spool::new(threshold, None);
            let parts: Vec<Vec<u8>> = (0u8..50).map(|i| vec![i; 5_000]).collect();
            for part in &parts {
                spool.push(part).await.unwrap();
            }
            assert_eq!(spool.len(), 250_000);
            assert_eq!(spool.file.is_some(), threshold < 250_000);
            spool.rewind().await.unwrap();
            let seen = spool.inspect(|body| body.read_to_end(&mut Vec::new())).await.unwrap();
            assert_eq!(seen.unwrap(), 250_000);
            let mut back = Vec::new();
            loop {
                let chunk = spool.next().await.unwrap();
                if chunk.is_empty() {
                    break;
                }
                back.extend_from_slice(&chunk);
            }
            assert_eq!(back, parts.concat());
        }
    }
}
