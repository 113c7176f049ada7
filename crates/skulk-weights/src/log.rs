//! A file of lines that is only ever added to, locked by one run: how far work has come.
//!
//! Invariant: a line that a crash cut counts for nothing and is removed; while a run holds the file, no other run gets
//! it. Left out: what the lines mean.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Seek, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use terminal::Failure;

const LOG_BYTES_MAX: u64 = 256 << 20;

/// A locked log.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens the log at `path`, made with its directory where it is not there, and reads its lines up to the first that
    /// is not whole. `what` says what another run that holds it is doing.
    pub(crate) fn open<L: DeserializeOwned>(
        path: &Path,
        what: &str,
    ) -> Result<(Log, Vec<L>), Failure> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|error| {
                Failure::io("cannot make the scratch directory", dir, error)
                    .hint("name another with --scratch")
            })?;
        }
        let unusable = |error| Failure::io("cannot use the journal", path, error);
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(unusable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::new(format!("another run is {what}"))
                    .hint("wait for it, or name another directory with --scratch"));
            }
            Err(TryLockError::Error(error)) => return Err(unusable(error)),
        }
        if file.metadata().map_err(unusable)?.len() > LOG_BYTES_MAX {
            return Err(
                Failure::new(format!("the journal {} is too long", path.display()))
                    .hint("remove it"),
            );
        }
        let (mut lines, mut whole_bytes) = (Vec::new(), 0);
        let mut reader = BufReader::new(&file);
        let mut text = Vec::new();
        while reader.read_until(b'\n', &mut text).map_err(unusable)? > 0 {
            match serde_json::from_slice(&text) {
                Ok(line) if text.ends_with(b"\n") => lines.push(line),
                _ => break,
            }
            whole_bytes += text.len() as u64;
            text.clear();
        }
        file.set_len(whole_bytes).map_err(unusable)?;
        Ok((
            Log {
                path: path.to_owned(),
                file,
            },
            lines,
        ))
    }

    /// Adds a line.
    pub(crate) fn append(&mut self, line: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string(line).map_err(std::io::Error::from);
        text.and_then(|text| self.file.write_all((text + "\n").as_bytes()))
            .map_err(|error| Failure::io("cannot write", &self.path, error))
    }

    /// Waits until all lines are on the disk.
    pub(crate) fn sync(&mut self) -> Result<(), Failure> {
        self.file
            .sync_data()
            .map_err(|error| Failure::io("cannot write", &self.path, error))
    }

    /// Removes all lines.
    pub(crate) fn clear(&mut self) -> Result<(), Failure> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .map_err(|error| Failure::io("cannot write", &self.path, error))
    }

    /// Removes the file.
    pub(crate) fn remove(self) -> Result<(), Failure> {
        fs::remove_file(&self.path).map_err(|error| Failure::io("cannot remove", &self.path, error))
    }
}
