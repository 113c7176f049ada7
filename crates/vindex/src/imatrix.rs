//! Which columns of a model's matrices matter: the mean square of what enters each while a text passes, by which an
//! extraction weighs the errors of its 4-bit and 6-bit blocks.
//!
//! Why the mean square: for a row of weights `w`, stored as `w'`, and an activation `a`, the error of their product is
//! `Σ (w[j] - w'[j]) a[j]`. Over many activations, and where those of different columns are taken as uncorrelated, its mean
//! square is `Σ (w[j] - w'[j])² E[a[j]²]`. (This is the idea of llama.cpp's "importance matrix".)
//!
//! Invariant: an [`Imatrix`] has finite numbers that are not negative, and counts that divide its sums; its digest depends
//! on those numbers and the names alone, not on the file that they were read from. Leaves out where the numbers come from:
//! a forward pass collects them.

mod file;
mod weigh;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::Error;
pub(crate) use weigh::Importance;

/// Statistics of the columns of a model's matrices.
#[derive(Clone, Debug, PartialEq)]
pub struct Imatrix {
    entries: BTreeMap<String, ColumnStatistics>,
    n_chunks: u32,
    chunk_tokens: u32,
    datasets: Vec<String>,
    sha256: String,
}

/// What entered one matrix, or each of several stacked ones.
#[derive(Clone, Debug, PartialEq)]
pub struct ColumnStatistics {
    /// `(n_matrices, n_cols)`: the sum of the squares of what entered each column.
    pub sums: Vec<f32>,
    /// `(n_matrices)`: how many rows were summed; or one number for all of them.
    pub counts: Vec<f32>,
}

/// What an index says of the statistics that its blocks were weighed by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// [`Imatrix::sha256`]: whoever has the same statistics, model and recipe gets the same vindex.
    pub imatrix: String,
}

impl Imatrix {
    /// Statistics by the tensors' GGUF names, collected over `n_chunks` pieces of text of `chunk_tokens` each.
    ///
    /// # Errors
    /// A sentence about the first that cannot be: a number that is negative or not finite, no sums, counts that do not
    /// divide them.
    pub fn new(
        entries: BTreeMap<String, ColumnStatistics>,
        n_chunks: u32,
        chunk_tokens: u32,
    ) -> Result<Imatrix, String> {
        if entries.is_empty() {
            return Err("it has no statistics".to_owned());
        }
        for (name, entry) in &entries {
            let (n, n_counts) = (entry.sums.len(), entry.counts.len());
            if n == 0 || n_counts == 0 || !n.is_multiple_of(n_counts) {
                return Err(format!("{name}: {n_counts} counts for {n} sums"));
            }
            let mut numbers = entry.sums.iter().chain(&entry.counts);
            if let Some(wrong) = numbers.find(|x| !x.is_finite() || **x < 0.0) {
                return Err(format!("{name}: {wrong} is no sum of squares and no count"));
            }
        }
        Ok(Imatrix {
            sha256: digest(&entries),
            entries,
            n_chunks,
            chunk_tokens,
            datasets: Vec::new(),
        })
    }

    /// Reads a file of llama.cpp's `llama-imatrix`, in either of its formats, or one of ours.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Imatrix`] when it is no such file or a damaged one.
    pub fn read(path: &Path) -> Result<Imatrix, Error> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        Imatrix::from_bytes(&bytes).map_err(|reason| Error::Imatrix {
            path: path.to_owned(),
            reason,
        })
    }

    /// Hex sha256 of the names, counts and sums, in the order of the names: for each the length of its name as a
    /// little-endian u64 and its bytes, then for its counts and then its sums how many there are, a u64, and their f32.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// By the tensors' GGUF names.
    pub fn entries(&self) -> &BTreeMap<String, ColumnStatistics> {
        &self.entries
    }

    /// Pieces of text that were seen.
    pub fn n_chunks(&self) -> u32 {
        self.n_chunks
    }

    /// Tokens of each.
    pub fn chunk_tokens(&self) -> u32 {
        self.chunk_tokens
    }

    /// Matrices of which no row was seen, such as experts that the text never visited.
    pub fn n_unseen(&self) -> usize {
        let counts = self.entries.values().flat_map(|entry| &entry.counts);
        counts.filter(|&&count| count == 0.0).count()
    }

    /// What an index says of it.
    pub(crate) fn calibration(&self) -> Calibration {
        Calibration {
            imatrix: self.sha256.clone(),
        }
    }
}

fn digest(entries: &BTreeMap<String, ColumnStatistics>) -> String {
    let mut sha256 = Sha256::new();
    let mut numbers = Vec::new();
    for (name, entry) in entries {
        sha256.update((name.len() as u64).to_le_bytes());
        sha256.update(name);
        for list in [&entry.counts, &entry.sums] {
            numbers.clear();
            numbers.extend(list.iter().flat_map(|x| x.to_le_bytes()));
            sha256.update((list.len() as u64).to_le_bytes());
            sha256.update(&numbers);
        }
    }
    hex::encode(sha256.finalize())
}
