//! Why the Hub, the network or this disk said no.
//!
//! Invariant: one variant for each thing that a caller can do about it; no variant holds a token or a
//! signed address (addresses are cut before their query).

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::{Commit, RepoId};

/// What the Hub said when it refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Address asked, without its query.
    pub url: String,
    /// `X-Error-Message`, else the `error` of the JSON body.
    pub message: Option<String>,
    /// `X-Request-Id`, to quote to whoever runs the Hub.
    pub request_id: Option<String>,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HTTP {} from {}", self.status, self.url)?;
        if let Some(message) = &self.message {
            write!(f, ": {message}")?;
        }
        if let Some(id) = &self.request_id {
            write!(f, " [request {id}]")?;
        }
        Ok(())
    }
}

/// Why a call failed: what, on what, and what to do now.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The Hub wants a token, or does not know this one.
    #[error(
        "{what}: not authorised ({answer}); set HF_TOKEN to a valid token or run `hf auth login`"
    )]
    Unauthorized {
        /// What was asked.
        what: String,
        /// The refusal.
        answer: Box<Answer>,
    },
    /// The token is known but may not do this.
    #[error("{what}: forbidden ({answer}); use a token with the right to do this")]
    Forbidden {
        /// What was asked.
        what: String,
        /// The refusal.
        answer: Box<Answer>,
    },
    /// The repository's terms were not accepted, or access is not granted yet.
    #[error(
        "{repo} is gated ({answer}); accept its terms at {page} and use a token of that account"
    )]
    Gated {
        /// The repository.
        repo: RepoId,
        /// Where to accept the terms.
        page: String,
        /// The refusal.
        answer: Box<Answer>,
    },
    /// No such repository, or a private one that this token may not see.
    #[error("no repository {repo} ({answer}); check the name, and set HF_TOKEN if it is private")]
    RepoNotFound {
        /// The repository.
        repo: RepoId,
        /// The refusal.
        answer: Box<Answer>,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repo} has no revision {revision} ({answer})")]
    RevisionNotFound {
        /// The repository.
        repo: RepoId,
        /// The branch, tag or commit asked for.
        revision: String,
        /// The refusal.
        answer: Box<Answer>,
    },
    /// The commit has no such file.
    #[error("{repo} has no file {path} at {commit}")]
    EntryNotFound {
        /// The repository.
        repo: RepoId,
        /// The commit read.
        commit: Commit,
        /// The file asked for.
        path: String,
        /// The refusal; `None` when the snapshot's own list lacks it.
        answer: Option<Box<Answer>>,
    },
    /// Too many requests, and the wait asked for is longer than we wait.
    #[error("{what}: rate limited ({answer}); try again {}", after(*retry_after))]
    RateLimited {
        /// What was asked.
        what: String,
        /// How long the Hub asks us to wait, when it says.
        retry_after: Option<Duration>,
        /// The refusal.
        answer: Box<Answer>,
    },
    /// Someone else changed the same thing in between.
    #[error(
        "{what}: the Hub's state moved in between ({answer}); run it again to work from the new state"
    )]
    Conflict {
        /// What was asked.
        what: String,
        /// The refusal.
        answer: Box<Answer>,
    },
    /// The answer to a commit was lost, and the head has moved to something else since.
    #[error(
        "{repo}: the answer to the commit was lost and the head moved from {} to {}, which does not hold these \
         files; run it again to commit on top",
        or_none(parent.as_ref()), or_none(head.as_ref())
    )]
    Moved {
        /// The repository.
        repo: RepoId,
        /// The head that the commit was made for.
        parent: Option<Commit>,
        /// The head now.
        head: Option<Commit>,
    },
    /// Any other refusal, after the retries that make sense.
    #[error("{what}: refused ({answer})")]
    Refused {
        /// What was asked.
        what: String,
        /// The refusal.
        answer: Box<Answer>,
    },
    /// The offline switch is on.
    #[error(
        "{what}: offline mode is on; unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) to ask the Hub"
    )]
    Offline {
        /// What would have been asked.
        what: String,
    },
    /// No usable answer: no connection, cut, or too slow, after the retries that make sense.
    #[error(
        "{what}: no answer from {url} after {n_attempts} attempt(s); check the network and HF_ENDPOINT"
    )]
    Http {
        /// What was asked.
        what: String,
        /// Address asked, without its query.
        url: String,
        /// How often it was tried.
        n_attempts: u32,
        /// The last failure.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer breaks the protocol; retrying would not help.
    #[error("{what}: the Hub's answer makes no sense: {detail}")]
    Protocol {
        /// What was asked.
        what: String,
        /// What is wrong with the answer.
        detail: String,
    },
    /// The bytes received are not the bytes that the Hub announced; they were discarded.
    #[error(
        "{repo}: {path} has the hash {got}, the Hub announced {expected}; the download was discarded, run it again"
    )]
    Hash {
        /// The repository.
        repo: RepoId,
        /// The file.
        path: String,
        /// The announced hash, hex.
        expected: String,
        /// The hash of what arrived, hex.
        got: String,
    },
    /// A local file is not, or no longer, what was to be uploaded; nothing was committed.
    #[error(
        "{path} changed: {detail}; nothing was committed, run it again when nobody writes to it"
    )]
    Changed {
        /// The local file, or the path in the repository for content given as bytes.
        path: PathBuf,
        /// Expected and found.
        detail: String,
    },
    /// Larger than the caller or the protocol allows.
    #[error("{path} has {size_bytes} bytes, at most {size_bytes_max} are allowed here")]
    TooLarge {
        /// The file.
        path: String,
        /// Its size.
        size_bytes: u64,
        /// The bound.
        size_bytes_max: u64,
    },
    /// The repository's `.gitignore` excludes a file that was to be committed.
    #[error(
        "{repo}: the repository's .gitignore excludes {path}; rename the file or change .gitignore"
    )]
    Ignored {
        /// The repository.
        repo: RepoId,
        /// The file.
        path: String,
    },
    /// Another process downloads to the same place.
    #[error(
        "{path} is being downloaded by another process; wait for it or choose another directory"
    )]
    Busy {
        /// The partial file.
        path: PathBuf,
    },
    /// The Hub does not accept the model card.
    #[error("the Hub does not accept the model card: {}", problems.join("; "))]
    Card {
        /// Its complaints.
        problems: Vec<String>,
    },
    /// The Xet store failed.
    #[error(
        "{what}: the Xet upload failed; try again, or set HF_HUB_DISABLE_XET=1 to upload by LFS"
    )]
    Xet {
        /// What was asked.
        what: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// This disk.
    #[error("cannot {doing} {path}")]
    Io {
        /// The verb.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Not a name that the Hub allows.
    #[error("{text:?} is no valid name: {reason}")]
    Id {
        /// What was given.
        text: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// A setting that cannot be used.
    #[error("{name} is {text:?}: {reason}")]
    Setting {
        /// The variable.
        name: &'static str,
        /// Its value.
        text: String,
        /// What it should be.
        reason: &'static str,
    },
}

impl Error {
    /// The Hub's refusal, when this is one.
    #[must_use]
    pub fn answer(&self) -> Option<&Answer> {
        match self {
            Error::Unauthorized { answer, .. }
            | Error::Forbidden { answer, .. }
            | Error::Gated { answer, .. }
            | Error::RepoNotFound { answer, .. }
            | Error::RevisionNotFound { answer, .. }
            | Error::RateLimited { answer, .. }
            | Error::Conflict { answer, .. }
            | Error::Refused { answer, .. } => Some(answer),
            Error::EntryNotFound { answer, .. } => answer.as_deref(),
            _ => None,
        }
    }

    pub(crate) fn io(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io {
            doing,
            path,
            source,
        }
    }
}

fn or_none(commit: Option<&Commit>) -> &str {
    commit.map_or("nothing", Commit::as_str)
}

fn after(wait: Option<Duration>) -> String {
    match wait {
        Some(wait) => format!("in {} s", wait.as_secs().max(1)),
        None => "later".to_owned(),
    }
}
