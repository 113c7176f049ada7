//! `extract.journal`: which parts of an interrupted extraction are finished.
//!
//! Text, one JSON object a line, appended and synced: first the digest of the plan and its source, then a line for
//! each part that has its final name. A line that was cut by a crash counts for nothing. The file is locked while an
//! extraction runs. Invariant: a part that is listed was complete on disk before its line was written.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Name in the output directory. A directory with it and without `index.json` holds an interrupted extraction.
pub const JOURNAL_FILE: &str = "extract.journal";

/// What the journal of the largest models can take is about 4 MB.
const MAX_JOURNAL_BYTES: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FirstLine {
    plan: String,
}

/// A finished part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FinishedPart {
    pub(crate) file: String,
    pub(crate) size_bytes: u64,
    /// Hex.
    pub(crate) sha256: String,
    /// For each stacked tensor, hex hashes of its experts; for one that lies beside experts, its own.
    pub(crate) experts: BTreeMap<String, Vec<String>>,
}

/// The locked journal of a running extraction.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    /// Digest of the plan it belongs to; `None` in a new journal.
    pub(crate) digest: Option<String>,
    /// By file name; the last line about a file counts.
    pub(crate) parts: BTreeMap<String, FinishedPart>,
}

impl Journal {
    /// Opens or creates the journal of `dir` and locks it. A new one is empty until [`Journal::begin`].
    ///
    /// # Errors
    /// [`Error::Locked`] when another extraction holds it; [`Error::Io`].
    pub(crate) fn open(dir: &Path) -> Result<Journal, Error> {
        let path = dir.join(JOURNAL_FILE);
        // Whoever held the lock may have removed the file between its opening here and its locking: then the lock is
        // on a file that nobody else can open, and the one that has the name now is the one to lock.
        let mut file = loop {
            let file = locked(dir, &path)?;
            if is_at(&file, &path) {
                break file;
            }
        };
        let mut text = Vec::new();
        (&mut file)
            .take(MAX_JOURNAL_BYTES)
            .read_to_end(&mut text)
            .map_err(Error::io("read", &path))?;
        let mut lines = text
            .split_inclusive(|&b| b == b'\n')
            .filter(|line| line.ends_with(b"\n"));
        let mut whole_bytes = 0;
        let mut digest = None;
        if let Some(line) = lines.next() {
            let first = serde_json::from_slice::<FirstLine>(line);
            let foreign = |_| Error::ForeignFile {
                path: dir.to_owned(),
                file: JOURNAL_FILE.to_owned(),
            };
            digest = Some(first.map_err(foreign)?.plan);
            whole_bytes += line.len() as u64;
        }
        let mut parts = BTreeMap::new();
        for line in lines {
            let Ok(part) = serde_json::from_slice::<FinishedPart>(line) else {
                break;
            };
            parts.insert(part.file.clone(), part);
            whole_bytes += line.len() as u64;
        }
        file.set_len(whole_bytes)
            .map_err(Error::io("write", &path))?;
        file.seek(SeekFrom::End(0))
            .map_err(Error::io("write", &path))?;
        Ok(Journal {
            path,
            file,
            digest,
            parts,
        })
    }

    /// Writes the first line of a new journal.
    pub(crate) fn begin(&mut self, digest: &str) -> Result<(), Error> {
        self.append(&FirstLine {
            plan: digest.to_owned(),
        })?;
        self.digest = Some(digest.to_owned());
        Ok(())
    }

    /// Adds a finished part; on return it is on disk.
    pub(crate) fn finished(&mut self, part: FinishedPart) -> Result<(), Error> {
        self.append(&part)?;
        self.parts.insert(part.file.clone(), part);
        Ok(())
    }

    /// New, or of the plan with this digest.
    pub(crate) fn is_ours(&self, digest: &str) -> bool {
        self.digest
            .as_deref()
            .is_none_or(|of_journal| of_journal == digest)
    }

    /// Removes the file; the extraction is complete, or never began.
    pub(crate) fn remove(self) -> Result<(), Error> {
        std::fs::remove_file(&self.path).map_err(Error::io("remove", &self.path))
    }

    fn append(&mut self, line: &impl Serialize) -> Result<(), Error> {
        let mut text = serde_json::to_string(line).expect("plain data serialises");
        text.push('\n');
        self.file
            .write_all(text.as_bytes())
            .map_err(Error::io("write", &self.path))?;
        self.file.sync_data().map_err(Error::io("sync", &self.path))
    }
}

fn locked(dir: &Path, path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    let file = file.map_err(Error::io("create", path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked {
            path: dir.to_owned(),
        }),
        Err(TryLockError::Error(e)) => Err(Error::io("lock", path)(e)),
    }
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id =
        |metadata: std::io::Result<std::fs::Metadata>| metadata.map(|m| (m.dev(), m.ino())).ok();
    id(file.metadata()) == id(std::fs::metadata(path))
}

/// Elsewhere a file has no number to compare; two runs would have to meet within that moment.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}
