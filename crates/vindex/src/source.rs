//! Where a checkpoint's bytes come from: a directory here, or a commit of a repository on the Hub.
//!
//! Invariant: between two calls the bytes behind a path do not change (a Hub source is pinned to one
//! commit), so a header read once stays true. Knows nothing of formats; `checkpoint.rs` reads those.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

use crate::error::Error;

/// What went wrong while reading a source; the implementation says which file and what to do.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

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

    /// A text that changes when bytes behind any path may have changed. An interrupted extraction is only continued
    /// from a source with the same text; it goes nowhere else.
    ///
    /// # Errors
    /// When the listing cannot be read.
    fn fingerprint(&self) -> Result<String, SourceError> {
        let Origin { repo, commit, .. } = self.origin();
        Ok(format!("{repo:?} {commit:?} {:?}", self.files()?))
    }
}

/// A source's files, listed once; reads name the file in their errors.
pub(crate) struct Files<'a> {
    source: &'a dyn Source,
    sizes: BTreeMap<String, u64>,
}

impl<'a> Files<'a> {
    pub(crate) fn list(source: &'a dyn Source) -> Result<Files<'a>, Error> {
        let listed = source.files().map_err(|source| Error::Source {
            file: "the list of files".to_owned(),
            source,
        })?;
        Ok(Files {
            source,
            sizes: listed.into_iter().map(|f| (f.path, f.size_bytes)).collect(),
        })
    }

    /// None when there is no such file.
    pub(crate) fn size_bytes(&self, path: &str) -> Option<u64> {
        self.sizes.get(path).copied()
    }

    /// All paths in order.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &str> {
        self.sizes.keys().map(String::as_str)
    }

    pub(crate) fn read_at(
        &self,
        path: &str,
        offset_bytes: u64,
        buf: &mut [u8],
    ) -> Result<(), Error> {
        self.source
            .read_at(path, offset_bytes, buf)
            .map_err(|source| Error::Source {
                file: path.to_owned(),
                source,
            })
    }

    /// The whole file, refused above `max_bytes`; `None` when there is no such file.
    pub(crate) fn read(&self, path: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, Error> {
        let Some(size_bytes) = self.size_bytes(path) else {
            return Ok(None);
        };
        if size_bytes > max_bytes {
            return Err(Error::Checkpoint {
                file: path.to_owned(),
                reason: format!(
                    "its {size_bytes} bytes are more than such a file has ({max_bytes} at most)"
                ),
            });
        }
        let mut bytes = vec![0; size_bytes as usize];
        self.read_at(path, 0, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// A text file, refused above `max_bytes`; `None` when there is no such file.
    pub(crate) fn text(&self, path: &str, max_bytes: u64) -> Result<Option<String>, Error> {
        let Some(bytes) = self.read(path, max_bytes)? else {
            return Ok(None);
        };
        String::from_utf8(bytes)
            .map(Some)
            .map_err(|e| Error::Checkpoint {
                file: path.to_owned(),
                reason: format!("it is not UTF-8 text ({e})"),
            })
    }

    /// A JSON file that may be absent.
    pub(crate) fn json_if_any<T: DeserializeOwned>(
        &self,
        path: &str,
        max_bytes: u64,
    ) -> Result<Option<T>, Error> {
        let Some(bytes) = self.read(path, max_bytes)? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::Checkpoint {
                file: path.to_owned(),
                reason: format!("it is not the JSON that was expected: {e}"),
            })
    }

    /// A JSON file that must be there.
    pub(crate) fn json<T: DeserializeOwned>(&self, path: &str, max_bytes: u64) -> Result<T, Error> {
        self.json_if_any(path, max_bytes)?
            .ok_or_else(|| Error::MissingFile {
                file: path.to_owned(),
                wanted_by: "a checkpoint in the layout of the Hub".to_owned(),
            })
    }
}
