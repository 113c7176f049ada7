//! Slices: which parts a role needs, and what a directory or a repository of a slice holds. A directory may hold less,
//! by ranges of layers and experts: `share.rs`.
//!
//! Invariant: a slice is a list of parts and copies no byte; every slice of an extraction has the same `index.json`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::index::{INDEX_FILE, Index, Part};
use crate::open::Vindex;
use crate::plan::Component;
use crate::provenance::PROVENANCE_FILE;
use crate::share::Share;

/// Says which slice a directory is complete for.
pub const SLICE_FILE: &str = "slice.json";

/// What of a vindex a role needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Slice {
    /// Every part, those of blocks that predict further tokens included.
    Full,
    /// Metadata and feed-forward parts.
    ExpertServer,
    /// Metadata, embeddings and attention parts: what a node holds that asks others for its feed-forward layers.
    Attention,
}

impl Slice {
    /// Every slice.
    pub const ALL: [Slice; 3] = [Slice::Full, Slice::ExpertServer, Slice::Attention];

    /// As `--slices` takes it and `slice.json` records it.
    pub const fn name(self) -> &'static str {
        match self {
            Slice::Full => "full",
            Slice::ExpertServer => "expert-server",
            Slice::Attention => "attention",
        }
    }

    /// Whether a part with this component belongs to the slice.
    pub fn holds(self, component: Component) -> bool {
        match self {
            Slice::Full => true,
            Slice::ExpertServer => matches!(
                component,
                Component::Metadata | Component::FeedForward { .. }
            ),
            Slice::Attention => !matches!(
                component,
                Component::FeedForward { .. } | Component::NextN { .. }
            ),
        }
    }
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no slice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown slice {0:?}; use full, expert-server or attention")]
pub struct UnknownSlice(pub String);

impl FromStr for Slice {
    type Err = UnknownSlice;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Slice::ALL
            .into_iter()
            .find(|slice| slice.name() == text)
            .ok_or_else(|| UnknownSlice(text.to_owned()))
    }
}

/// One file of a published slice.
#[derive(Clone, Debug)]
pub struct SliceFile {
    /// Path in the directory or repository.
    pub name: String,
    /// Where its bytes are.
    pub content: SliceContent,
    /// How many bytes.
    pub size_bytes: u64,
    /// Hash of the bytes, hex.
    pub sha256: String,
}

/// Where the bytes of a file are.
#[derive(Clone, Debug)]
pub enum SliceContent {
    /// In a file of the vindex.
    Path(PathBuf),
    /// Here.
    Bytes(Vec<u8>),
}

/// The files that make a directory complete for `slice`, `index.json` last. Reads no weight.
///
/// # Errors
/// [`Error::ShareNotHere`] when `vindex` has not all parts of `slice`.
pub fn slice_files(vindex: &Vindex, slice: Slice) -> Result<Vec<SliceFile>, Error> {
    vindex.must_hold(&Share::from(slice))?;
    let bytes = |name: &str, bytes: Vec<u8>| SliceFile {
        name: name.to_owned(),
        size_bytes: bytes.len() as u64,
        sha256: hex::encode(Sha256::digest(&bytes)),
        content: SliceContent::Bytes(bytes),
    };
    let parts = slice_files_of_index(vindex.index(), slice);
    let mut files: Vec<SliceFile> = parts
        .into_iter()
        .map(|part| SliceFile {
            name: part.file.clone(),
            content: SliceContent::Path(vindex.dir().join(&part.file)),
            size_bytes: part.size_bytes,
            sha256: part.sha256.clone(),
        })
        .collect();
    if let Some(provenance) = vindex.provenance() {
        files.push(bytes(PROVENANCE_FILE, provenance.to_json().into_bytes()));
    }
    files.push(bytes(SLICE_FILE, Share::from(slice).to_json().into_bytes()));
    files.push(bytes(INDEX_FILE, vindex.index_json().to_vec()));
    Ok(files)
}

/// The parts of `slice`, in file order.
pub fn slice_files_of_index(index: &Index, slice: Slice) -> Vec<&Part> {
    index
        .parts
        .iter()
        .filter(|part| slice.holds(part.component))
        .collect()
}
