//! The files that statistics travel in: those of llama.cpp's `llama-imatrix`.
//!
//! Written, and read, is its GGUF form: `general.type` is `imatrix`, the keys `imatrix.datasets`, `imatrix.chunk_count`
//! and `imatrix.chunk_size` say what was seen, and for each tensor NAME there are
//!
//! ```text
//! NAME.in_sum2   F32 [n_cols, n_matrices]    sums of squares
//! NAME.counts    F32 [1, n_matrices]         rows that were summed
//! ```
//!
//! Its older form is read only. All numbers are little-endian, lengths and counts i32:
//!
//! ```text
//! n_entries, then for each:  name length, name, n_calls, n_values, n_values f32 (mean squares times n_calls)
//! n_chunks, dataset length, dataset          perhaps
//! ```
//!
//! Invariant: each length is checked against the bytes that are there before anything of that size is allocated, and what
//! is written reads back as the same statistics.

use std::collections::BTreeMap;

use quant::BlockType;

use super::{ColumnStatistics, Imatrix};
use crate::gguf::{self, MetaArray, MetaValue, TensorInfo};

const DATASETS: &str = "imatrix.datasets";
const CHUNK_COUNT: &str = "imatrix.chunk_count";
const CHUNK_SIZE: &str = "imatrix.chunk_size";
const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

impl Imatrix {
    /// Reads either form.
    ///
    /// # Errors
    /// A sentence about what is wrong.
    pub fn from_bytes(bytes: &[u8]) -> Result<Imatrix, String> {
        if bytes.starts_with(b"GGUF") {
            from_gguf(bytes)
        } else {
            from_older(bytes)
        }
    }

    /// The same, which names the texts that it was collected over.
    #[must_use]
    pub fn of_datasets(self, datasets: Vec<String>) -> Imatrix {
        Imatrix { datasets, ..self }
    }

    /// The bytes of a file, in the GGUF form.
    ///
    /// # Errors
    /// A sentence when a name is too long for GGUF.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let text = |t: &str| MetaValue::String(t.to_owned());
        let datasets = MetaArray::Strings(self.datasets.clone());
        let metadata = [
            ("general.type", text("imatrix")),
            (DATASETS, MetaValue::Array(datasets)),
            (CHUNK_COUNT, MetaValue::U32(self.n_chunks)),
            (CHUNK_SIZE, MetaValue::U32(self.chunk_tokens)),
        ];
        let mut tensors: Vec<(String, [u64; 2], &[f32])> = Vec::new();
        for (name, entry) in &self.entries {
            let n = entry.counts.len();
            let n_cols = (entry.sums.len() / n) as u64;
            tensors.push((format!("{name}{SUMS}"), [n_cols, n as u64], &entry.sums));
            tensors.push((format!("{name}{COUNTS}"), [1, n as u64], &entry.counts));
        }
        if let Some((name, ..)) = tensors.iter().find(|t| t.0.len() > gguf::MAX_NAME_BYTES) {
            return Err(format!("{name} is too long a name for GGUF"));
        }
        let described: Vec<(&str, &[u64], BlockType)> = tensors
            .iter()
            .map(|(name, ne, _)| (name.as_str(), ne.as_slice(), BlockType::F32))
            .collect();
        let keys = metadata.iter().map(|(key, value)| (*key, value));
        let (mut bytes, places) = gguf::write_header(keys, &described);
        for ((_, _, values), end) in tensors.iter().zip(&places[1..]) {
            bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            bytes.resize(*end as usize, 0);
        }
        Ok(bytes)
    }
}

fn from_gguf(bytes: &[u8]) -> Result<Imatrix, String> {
    let header = gguf::read_header(bytes)?;
    let value = |key: &str| {
        let mut found = header.metadata.iter().filter(|(k, _)| k == key);
        found.next().map(|(_, value)| value)
    };
    if value("general.type") != Some(&MetaValue::String("imatrix".to_owned())) {
        return Err(
            "it is a GGUF file with something else, general.type is not imatrix".to_owned(),
        );
    }
    let number = |key: &str| match value(key) {
        Some(MetaValue::U32(n)) => Ok(*n),
        Some(other) => Err(format!("{key} is {other:?}, expected a u32")),
        None => Err(format!("the key {key} is missing")),
    };
    let (n_chunks, chunk_tokens) = (number(CHUNK_COUNT)?, number(CHUNK_SIZE)?);
    let datasets = match value(DATASETS) {
        Some(MetaValue::Array(MetaArray::Strings(names))) => names.clone(),
        _ => Vec::new(),
    };
    let mut counts: BTreeMap<&str, &TensorInfo> = BTreeMap::new();
    for tensor in &header.tensors {
        if let Some(name) = tensor.name.strip_suffix(COUNTS) {
            counts.insert(name, tensor);
        }
    }
    let mut entries = BTreeMap::new();
    for tensor in &header.tensors {
        let Some(name) = tensor.name.strip_suffix(SUMS) else {
            continue;
        };
        let counts = counts
            .get(name)
            .ok_or_else(|| format!("{name} has sums and no counts"))?;
        let entry = ColumnStatistics {
            sums: floats(bytes, tensor)?,
            counts: floats(bytes, counts)?,
        };
        if entries.insert(name.to_owned(), entry).is_some() {
            return Err(format!("{name} is there twice"));
        }
    }
    Ok(Imatrix::new(entries, n_chunks, chunk_tokens)?.of_datasets(datasets))
}

/// The values of a tensor of the file.
fn floats(bytes: &[u8], tensor: &TensorInfo) -> Result<Vec<f32>, String> {
    let name = &tensor.name;
    if tensor.block_type != BlockType::F32 {
        return Err(format!("{name} is {}, expected F32", tensor.block_type));
    }
    let range = gguf::size_bytes(BlockType::F32, &tensor.ne).and_then(|size| {
        let start = usize::try_from(tensor.offset_bytes).ok()?;
        Some(start..start.checked_add(usize::try_from(size).ok()?)?)
    });
    let range = range.ok_or_else(|| format!("{name}: its place overflows"))?;
    let values = bytes
        .get(range)
        .ok_or_else(|| format!("{name} ends beyond the file, which was cut"))?;
    Ok(to_floats(values))
}

fn to_floats(bytes: &[u8]) -> Vec<f32> {
    let floats = bytes.as_chunks().0.iter();
    floats.map(|x| f32::from_le_bytes(*x)).collect()
}

fn from_older(bytes: &[u8]) -> Result<Imatrix, String> {
    let mut at = Older { rest: bytes };
    // An entry has at least three numbers.
    let n_entries = at.count("the number of entries", 12)?;
    let mut entries = BTreeMap::new();
    for _ in 0..n_entries {
        let len = at.count("the length of a name", 1)?;
        let name = std::str::from_utf8(at.take(len, "a name")?)
            .map_err(|_| "a name is not UTF-8; it is no file of an importance matrix".to_owned())?;
        let n_calls = at.number(name)?;
        let n_values = at.count(name, 4)?;
        let entry = ColumnStatistics {
            sums: to_floats(at.take(4 * n_values, name)?),
            // Without calls the values are means already.
            counts: vec![n_calls.max(1) as f32],
        };
        if entries.insert(name.to_owned(), entry).is_some() {
            return Err(format!("{name} is there twice"));
        }
    }
    // The oldest files end here.
    let n_chunks = match at.rest.is_empty() {
        true => 0,
        false => at.number("the number of chunks")?.max(0) as u32,
    };
    Imatrix::new(entries, n_chunks, 0)
}

/// What is left of a file of the older form.
struct Older<'a> {
    rest: &'a [u8],
}

impl<'a> Older<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or_else(|| {
            let left = self.rest.len();
            format!("it ends within {what}: {n} bytes expected, {left} left")
        })?;
        self.rest = rest;
        Ok(taken)
    }

    fn number(&mut self, what: &str) -> Result<i32, String> {
        let bytes = self.take(4, what)?;
        Ok(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// A number of things of at least `min_bytes` each, if the rest of the file can hold so many.
    fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize, String> {
        let n = self.number(what)?;
        match usize::try_from(n) {
            Ok(n) if n <= self.rest.len() / min_bytes => Ok(n),
            _ => Err(format!(
                "{what}: {n} do not fit the {} bytes that are left; it is no file of an importance matrix",
                self.rest.len()
            )),
        }
    }
}
