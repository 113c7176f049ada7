//! Where a checkpoint's bytes come from: a directory here, or a commit of a repository on the Hub.
//!
//! Invariant: between two calls the bytes behind a path do not change (a Hub source is pinned to one
//! commit), so a header read once stays true. Knows nothing of formats; `checkpoint.rs` reads those.

use std::error::Error;

/// What went wrong while reading a source; the implementation says which file and what to do.
pub type SourceError = Box<dyn Error + Send + Sync>;

/// One file of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Path inside the source, with `/` between its parts.
    pub path: String,
    /// Length of the file.
    pub size_bytes: u64,
}

/// Where a source is, for `provenance.json` and the model card; never part of the identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The model's own name (`Qwen3-0.6B`), from which stem and `general.name` are made.
    pub model_name: String,
    /// `owner/name` when the source is a repository of the Hub.
    pub repo: Option<String>,
    /// The commit that every read is pinned to, 40 lower-case hex digits.
    pub commit: Option<String>,
}

/// A checkpoint's files, readable by range from several threads at once.
pub trait Source: Send + Sync {
    /// All files, in order of their paths.
    ///
    /// # Errors
    /// When the listing cannot be read.
    fn files(&self) -> Result<Vec<SourceFile>, SourceError>;

    /// Fills `buf` with the bytes of `path` that start at `offset_bytes`.
    ///
    /// # Errors
    /// When the file is absent, shorter than asked for, or cannot be read.
    fn read_at(&self, path: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<(), SourceError>;

    /// Where this is.
    fn origin(&self) -> Origin;
}
