//! `mtp.safetensors` as docs/sidecars.md describes it: what its header says, and its tensors as numbers.
//!
//! Invariant: a tensor that is given has the shape that was asked for and the sum that the file records. Nothing of the
//! file sizes an allocation before it was held against the file's length. Left out: what the tensors mean.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Longest header that is read: DeepSeek's heads have 800 tensors, with names and sums about 300 KB.
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// The format that is read.
const FORMAT: &str = "mtp/1";

/// Why a head cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// The file cannot be read.
    #[error("cannot read the head {}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The file is not what docs/sidecars.md describes, or is not whole.
    #[error("{} is no usable mtp.safetensors: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The heads are of a kind that is not computed.
    #[error("heads of the layout {got:?} are not computed; block and layers are")]
    Layout {
        /// What the file says.
        got: String,
    },
    /// The head was trained for another model.
    #[error("the head belongs to another model: its {what} is {got}, the model's is {expected}")]
    OtherModel {
        /// What differs.
        what: &'static str,
        /// The model's.
        expected: String,
        /// The head's.
        got: String,
    },
    /// A tensor is not there.
    #[error("the head has no tensor {tensor}")]
    Missing {
        /// Its name.
        tensor: String,
    },
    /// A tensor has a shape with which the head cannot work.
    #[error(
        "tensor {tensor} of the head has the shape {got:?}, expected {expected:?} (rows first)"
    )]
    Shape {
        /// Its name.
        tensor: String,
        /// What the other tensors and the model ask for.
        expected: Vec<usize>,
        /// What the file says.
        got: Vec<usize>,
    },
    /// A tensor's bytes are not those that were published.
    #[error(
        "tensor {tensor} of the head is damaged: its sha256 is not the recorded one; fetch the file again"
    )]
    Damaged {
        /// Its name.
        tensor: String,
    },
    /// The head has something that is not computed, or needs a number that the model does not tell.
    #[error("the head cannot be computed: {0}")]
    Unsupported(String),
}

/// An open file. Tensors are read when they are asked for.
pub(super) struct Sidecar {
    path: PathBuf,
    file: File,
    data_start: u64,
    data_bytes: u64,
    tensors: HashMap<String, Entry>,
    metadata: HashMap<String, String>,
    sums: HashMap<String, String>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl Sidecar {
    pub(super) fn open(path: &Path) -> Result<Sidecar, HeadError> {
        let io_error = |error: io::Error| HeadError::Io {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let wrong = |reason: String| HeadError::File {
            path: path.to_owned(),
            reason,
        };
        let mut file = File::open(path).map_err(io_error)?;
        let length = file.metadata().map_err(io_error)?.len();
        let mut n = [0; 8];
        file.read_exact(&mut n).map_err(io_error)?;
        let n = u64::from_le_bytes(n);
        if n == 0 || n > HEADER_BYTES_MAX || n > length - 8 {
            return Err(wrong(format!(
                "a header of {n} bytes in a file of {length}"
            )));
        }
        let mut header = vec![0; n as usize];
        file.read_exact(&mut header).map_err(io_error)?;
        let mut header: HashMap<String, Value> =
            serde_json::from_slice(&header).map_err(|e| wrong(e.to_string()))?;
        let metadata = header.remove("__metadata__").unwrap_or_default();
        let metadata: HashMap<String, String> =
            serde_json::from_value(metadata).map_err(|e| wrong(format!("metadata: {e}")))?;
        match metadata.get("skulk.format").map(String::as_str) {
            Some(FORMAT) => {}
            Some(other) => return Err(wrong(format!("format {other:?}; {FORMAT:?} is read"))),
            None => return Err(wrong("it does not say skulk.format".to_owned())),
        }
        let sums = metadata.get("skulk.sha256").map_or("{}", String::as_str);
        let sums = serde_json::from_str(sums).map_err(|e| wrong(format!("sums: {e}")))?;
        let tensors: Result<HashMap<String, Entry>, _> = header
            .into_iter()
            .map(|(name, entry)| Ok((name, serde_json::from_value(entry)?)))
            .collect();
        Ok(Sidecar {
            tensors: tensors.map_err(|e: serde_json::Error| wrong(e.to_string()))?,
            path: path.to_owned(),
            file,
            data_start: 8 + n,
            data_bytes: length - 8 - n,
            metadata,
            sums,
        })
    }

    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The value of a key that every head has.
    pub(super) fn said(&self, key: &str) -> Result<&str, HeadError> {
        self.metadata(key).ok_or_else(|| HeadError::File {
            path: self.path.clone(),
            reason: format!("it does not say {key}"),
        })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Rows and columns of a matrix, or the length of a vector and 1.
    pub(super) fn shape(&self, name: &str) -> Result<[usize; 2], HeadError> {
        let entry = self.entry(name)?;
        match entry.shape[..] {
            [n] => Ok([n, 1]),
            [n_rows, n_cols] => Ok([n_rows, n_cols]),
            _ => Err(HeadError::Shape {
                tensor: name.to_owned(),
                expected: vec![0, 0],
                got: entry.shape.clone(),
            }),
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry, HeadError> {
        let entry = self.tensors.get(name);
        entry.ok_or_else(|| HeadError::Missing {
            tensor: name.to_owned(),
        })
    }

    /// The numbers of a tensor, row-major.
    pub(super) fn read(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, HeadError> {
        let entry = self.entry(name)?;
        if entry.shape != shape {
            return Err(HeadError::Shape {
                tensor: name.to_owned(),
                expected: shape.to_vec(),
                got: entry.shape.clone(),
            });
        }
        let wrong = |reason: String| HeadError::File {
            path: self.path.clone(),
            reason: format!("tensor {name}: {reason}"),
        };
        let width = match entry.dtype.as_str() {
            "BF16" | "F16" => 2,
            "F32" => 4,
            other => return Err(wrong(format!("type {other}"))),
        };
        let [start, end] = entry.data_offsets;
        let n_bytes = shape
            .iter()
            .try_fold(width, |n: u64, &m| n.checked_mul(m as u64));
        if end > self.data_bytes || end.checked_sub(start) != n_bytes {
            return Err(wrong(format!(
                "bytes {start}..{end} are not those of its shape"
            )));
        }
        let mut bytes = vec![0; (end - start) as usize];
        let dtype = entry.dtype.clone();
        let at = SeekFrom::Start(self.data_start + start);
        let read = self
            .file
            .seek(at)
            .and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(|error| HeadError::Io {
            path: self.path.clone(),
            reason: error.to_string(),
        })?;
        if let Some(sum) = self.sums.get(name)
            && *sum != hex::encode(Sha256::digest(&bytes))
        {
            return Err(HeadError::Damaged {
                tensor: name.to_owned(),
            });
        }
        let halves = || bytes.as_chunks::<2>().0.iter();
        Ok(match dtype.as_str() {
            "BF16" => halves()
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
                .collect(),
            "F16" => halves()
                .map(|b| half::f16::from_le_bytes(*b).to_f32())
                .collect(),
            _ => bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
        })
    }
}
