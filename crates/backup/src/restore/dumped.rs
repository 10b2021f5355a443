//! A dump as it lies in a set: one stream in parts, or several.

use std::io::{self, Write};

use super::load::broken;
use crate::logical::{Stream, part_path, paths};
use crate::model::{BackupSet, DumpFormat};
use crate::repository::Reader;
use crate::{Control, Error};

/// The streams of a set's dump. The first has everything but the rows that are in the others.
pub(crate) struct Dumped<'a> {
    reader: &'a Reader<'a>,
    format: DumpFormat,
    streams: Vec<Stream>,
}

impl<'a> Dumped<'a> {
    pub(crate) fn of(reader: &'a Reader<'a>, set: &BackupSet) -> Result<Self, Error> {
        let format = set.artifact.format;
        let mismatch = |reason: String| Error::Mismatch { what: paths::STREAMS.to_owned(), reason };
        let streams = match format {
            DumpFormat::Custom => vec![Stream { bytes: set.artifact.bytes, ..Stream::default() }],
            DumpFormat::Streams => {
                let mut text = Vec::new();
                reader.file(paths::STREAMS, &mut text)?;
                serde_json::from_slice(&text).map_err(|e| mismatch(e.to_string()))?
            }
        };
        let bytes: u64 = streams.iter().map(|stream| stream.bytes).sum();
        if bytes != set.artifact.bytes {
            return Err(mismatch(format!("it tells of {bytes} bytes and {} were saved", set.artifact.bytes)));
        }
        Ok(Self { reader, format, streams })
    }

    /// The streams with the rows of some tables each, and the tables' names.
    pub(crate) fn tables(&self) -> impl Iterator<Item = (usize, &[String])> {
        self.streams.iter().enumerate().skip(1).map(|(number, stream)| (number, stream.tables.as_slice()))
    }

    /// One stream, its parts one after the other.
    pub(crate) fn feed(&self, stream: usize, stdin: &mut dyn Write, control: &Control) -> Result<(), Error> {
        let Some(known) = self.streams.get(stream) else { return Ok(()) };
        let mut sink = Counted::new(stdin, control);
        let mut numbers = known.parts.iter().copied();
        let mut next = 0;
        while sink.written < known.bytes {
            let path = match self.format {
                DumpFormat::Custom => part_path(next, None),
                DumpFormat::Streams => match numbers.next() {
                    Some(number) => part_path(number, Some(stream)),
                    None => break,
                },
            };
            next += 1;
            let read = self.reader.file(&path, &mut sink);
            if control.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if let Some(error) = sink.broken.take() {
                return Err(broken("pg_restore", &error));
            }
            read?;
        }
        if sink.written != known.bytes {
            let reason = format!("{} bytes were read and {} were saved", sink.written, known.bytes);
            return Err(Error::Mismatch { what: paths::DUMP.to_owned(), reason });
        }
        Ok(())
    }
}

/// A program's input that counts, stops when it shall, and remembers why it broke.
pub(super) struct Counted<W> {
    inner: W,
    control: Control,
    written: u64,
    broken: Option<io::Error>,
}

impl<W> Counted<W> {
    pub(super) fn new(inner: W, control: &Control) -> Self {
        Self { inner, control: control.clone(), written: 0, broken: None }
    }
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.control.is_cancelled() {
            return Err(io::Error::other("stopped"));
        }
        match self.inner.write(buffer) {
            Ok(written) => {
                self.control.add(written as u64);
                self.written += written as u64;
                Ok(written)
            }
            Err(error) => {
                self.broken.get_or_insert_with(|| io::Error::new(error.kind(), error.to_string()));
                Err(error)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
