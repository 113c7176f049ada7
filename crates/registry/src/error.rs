//! What can go wrong in a registry, a variant per thing a caller can do about it.
//!
//! Invariant: no variant carries a secret; texts may be shown to the client as they are, except `Io` and `Corrupt`,
//! whose paths stay in the log of the server.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Why the registry could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The disk refused. Look at the cause: full, read-only, or not permitted.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was being done, as a verb ("write", "open").
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system answered.
        #[source]
        source: io::Error,
    },
    /// A file of the registry's own does not hold what the registry writes. Restore it from a copy.
    #[error("{} is damaged: {detail}; restore it from a copy", path.display())]
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// A listener beyond loopback needs a token.
    #[error(
        "refusing to listen on {address} without a token: anyone who reaches it could write; give a token, or listen on 127.0.0.1"
    )]
    TokenRequired {
        /// The address of the listener.
        address: SocketAddr,
    },
    /// There is no such repository.
    #[error("Repository not found: {id}")]
    NoRepo {
        /// Kind and name, as in `models/owner/name`.
        id: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("Invalid rev id: {revision} is no branch, tag or commit of {repo}")]
    NoRevision {
        /// The repository.
        repo: String,
        /// The revision that was asked for.
        revision: String,
    },
    /// The commit holds no such file or folder.
    #[error("Entry not found: {path} does not exist in commit {commit}")]
    NoEntry {
        /// The path inside the repository.
        path: String,
        /// The commit that was looked into.
        commit: String,
    },
    /// There is no such collection or collection item.
    #[error("Collection not found: {slug}")]
    NoCollection {
        /// What was asked for.
        slug: String,
    },
    /// Something of that name is already there.
    #[error("{what} already exists")]
    Exists {
        /// What exists, with its name.
        what: String,
        /// The slug of the existing collection, where it is one.
        slug: Option<String>,
    },
    /// The branch has moved on since the caller looked: look again, then repeat.
    #[error(
        "{branch} is at {got}, not at the expected parent {expected}; read the branch again and repeat the commit"
    )]
    ParentMoved {
        /// The branch.
        branch: String,
        /// The parent that the caller named.
        expected: String,
        /// Where the branch is.
        got: String,
    },
    /// A commit names an LFS object that was never uploaded.
    #[error("LFS object {oid} of {path} was not uploaded; upload it before committing")]
    MissingObject {
        /// The path inside the repository.
        path: String,
        /// The sha256 of the missing object.
        oid: String,
    },
    /// Uploaded bytes are not what was announced; nothing was stored.
    #[error("uploaded {what} is {got}, expected {expected}; nothing was stored")]
    Mismatch {
        /// "sha256" or "size".
        what: &'static str,
        /// What was announced.
        expected: String,
        /// What arrived.
        got: String,
    },
    /// A name, a number or a shape from outside that is not acceptable.
    #[error("{what}: {why}")]
    Invalid {
        /// What was refused, with its value where it is short.
        what: String,
        /// Why, and what is acceptable.
        why: String,
    },
    /// Well formed, and never allowed.
    #[error("{why}")]
    Forbidden {
        /// Why.
        why: String,
    },
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io {
            doing,
            path,
            source,
        }
    }

    pub(crate) fn invalid(what: impl Into<String>, why: impl Into<String>) -> Error {
        Error::Invalid {
            what: what.into(),
            why: why.into(),
        }
    }

    pub(crate) fn corrupt(path: &Path, detail: impl ToString) -> Error {
        Error::Corrupt {
            path: path.to_owned(),
            detail: detail.to_string(),
        }
    }
}
