//! One commit: files added and deleted, large ones uploaded first.
//!
//! Route: read the head; hash what the caller did not hash; leave out what the head holds already; ask the
//! Hub which files are large (`preupload`); upload those (`lfs`, `xet`); send one commit whose parent is
//! the head that was read. Invariant: one call makes at most one commit. When the answer to it is lost, the
//! head is read again: it holds our files (then it was made), or still is the parent (then it is sent
//! again), or moved (then the call ends with a conflict).

use std::path::PathBuf;

use crate::{Commit, Error, Hub, RepoId};

/// Bytes to commit.
#[derive(Clone, Debug)]
pub enum Content {
    /// Held in memory.
    Bytes(Vec<u8>),
    /// A local file, streamed; nobody may write to it meanwhile.
    File(PathBuf),
}

/// A file to add or replace.
#[derive(Clone, Debug)]
pub struct Addition {
    /// Path in the repository.
    pub path: String,
    /// Its bytes.
    pub content: Content,
    /// sha256 of the bytes, hex, when known; computed otherwise.
    pub sha256: Option<String>,
    /// Length of the bytes.
    pub size_bytes: u64,
}

/// What one commit to `main` changes.
#[derive(Clone, Debug, Default)]
pub struct CommitRequest {
    /// First line of the message.
    pub summary: String,
    /// Files to add or replace.
    pub additions: Vec<Addition>,
    /// Files to delete; those that are not there are left out.
    pub deletions: Vec<String>,
}

/// What a commit did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitReport {
    /// The commit made; `None` when the head was like this already.
    pub commit: Option<Commit>,
    /// Files that the commit added or replaced.
    pub uploaded: Vec<String>,
    /// Files that the head held already.
    pub skipped: Vec<String>,
    /// Files deleted.
    pub deleted: Vec<String>,
    /// Bytes of file content that went over the wire.
    pub bytes_sent: u64,
}

/// How a commit goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upload {
    /// So many more bytes were hashed.
    Hashed(u64),
    /// The uploads start.
    Started {
        /// Files to upload, small ones included.
        n_files: usize,
        /// Their length together.
        bytes_total: u64,
    },
    /// So many more bytes were sent.
    Bytes(u64),
    /// Everything is there; the commit is being made.
    Committing,
}

impl Hub {
    /// Makes one commit on `main`, or none when nothing would change.
    ///
    /// # Errors
    /// [`Error::Changed`] when a file is not what `sha256` or `size_bytes` say; [`Error::Conflict`] when the
    /// head moved; [`Error::TooLarge`] for a file that the Hub wants inline but is over 10 MB; otherwise as
    /// every request. After any error, the repository has at most the old head or exactly this commit.
    pub async fn commit(
        &self,
        repo: &RepoId,
        _request: &CommitRequest,
        _progress: &(dyn Fn(Upload) + Send + Sync),
    ) -> Result<CommitReport, Error> {
        Err(Error::Protocol {
            what: format!("commit to {repo}"),
            detail: "not built yet".to_owned(),
        })
    }
}
