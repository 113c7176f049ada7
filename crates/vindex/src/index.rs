//! `index.json`: what a vindex is, as content alone, and the identity made from it.
//!
//! Invariant: an [`Index`] that was read is proven to be well-formed: file names are plain names, every tensor lies
//! inside its part, no two overlap, names are unique. The text depends on nothing but the content, so that the same
//! weights and recipe have the same [`VindexId`] everywhere. Drawn in `docs/vindex.md`.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::str::FromStr;

use quant::BlockType;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::Config;
use crate::error::Error;
use crate::gguf;
use crate::imatrix::Calibration;
use crate::plan::Component;
use crate::recipe::Recipe;

/// The file whose bytes are the identity; a directory without it is no vindex.
pub const INDEX_FILE: &str = "index.json";

/// What `format` says.
pub const FORMAT: &str = "vindex/1";

const MAX_PARTS: usize = 65_535;

/// sha256 of the bytes of `index.json`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VindexId([u8; 32]);

impl VindexId {
    /// The identity of an index with this text.
    pub fn of(index_json: &[u8]) -> VindexId {
        VindexId(Sha256::digest(index_json).into())
    }

    /// The hash itself.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for VindexId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

impl fmt::Debug for VindexId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VindexId({self})")
    }
}

/// A text that is no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no vindex identity; expected 64 lower-case hex digits")]
pub struct NoVindexId(pub String);

impl FromStr for VindexId {
    type Err = NoVindexId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !is_sha256(text) {
            return Err(NoVindexId(text.to_owned()));
        }
        let mut id = [0; 32];
        for (byte, digits) in id.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits)
                .ok()
                .and_then(|d| u8::from_str_radix(d, 16).ok());
            *byte = digits.ok_or_else(|| NoVindexId(text.to_owned()))?;
        }
        Ok(VindexId(id))
    }
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The content of a vindex.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// [`FORMAT`].
    pub format: String,
    /// The model's own name.
    pub name: String,
    /// Stem of the part files.
    pub stem: String,
    /// How the weights are stored.
    pub recipe: Recipe,
    /// What the errors of its blocks were weighed by, where they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// The model's numbers.
    pub config: Config,
    /// Parts, in file order.
    pub parts: Vec<Part>,
    /// Tensors, in the order of parts and of places in each part.
    pub tensors: Vec<Tensor>,
}

/// One GGUF file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Name in the directory: `<stem>-NNNNN-of-NNNNN.gguf`.
    pub file: String,
    /// What it holds.
    #[serde(flatten)]
    pub component: Component,
    /// Length of the file.
    pub size_bytes: u64,
    /// Hash of the file, hex.
    pub sha256: String,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tensor {
    /// GGUF name.
    pub name: String,
    /// How rows are stored.
    #[serde(rename = "type")]
    pub block_type: BlockType,
    /// Shape, the row length first.
    pub ne: Vec<u64>,
    /// Which of [`Index::parts`], from 0.
    pub part: u32,
    /// From the start of the file.
    pub offset_bytes: u64,
    /// Length of the blocks, without padding.
    pub size_bytes: u64,
    /// sha256 of each expert's bytes, hex, when the slowest dimension counts experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<Vec<String>>,
    /// sha256 of the blocks, hex, of a tensor that lies beside experts and is none (a shared expert, a dense branch): where
    /// some experts are held, it is held with expert 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// Name of part number `part` (from 0) of `n_parts`, as llama.cpp expects it of a split file.
pub(crate) fn part_file(stem: &str, part: usize, n_parts: usize) -> String {
    format!("{stem}-{:05}-of-{n_parts:05}.gguf", part + 1)
}

/// How many experts are stacked in a tensor; `None` when it is no such tensor.
pub(crate) fn n_experts(name: &str, ne: &[u64]) -> Option<u64> {
    let stacked = name.contains("_exps.") && ne.len() > 1;
    if stacked { ne.last().copied() } else { None }
}

impl Index {
    /// The bytes of `index.json`: an object with one line for each part and each tensor.
    pub fn to_json(&self) -> String {
        // These types serialise: no map with other keys than text, no float that JSON cannot say (a config's
        // numbers come from JSON).
        fn json<T: Serialize>(value: &T) -> String {
            serde_json::to_string(value).expect("plain data serialises")
        }
        fn lines<T: Serialize>(items: &[T]) -> String {
            items.iter().map(json).collect::<Vec<_>>().join(",\n")
        }
        let calibration = self
            .calibration
            .as_ref()
            .map_or(String::new(), |calibration| {
                format!("\"calibration\":{},\n", json(calibration))
            });
        format!(
            "{{\n\"format\":{},\n\"name\":{},\n\"stem\":{},\n\"recipe\":{},\n{calibration}\"config\":{},\n\
             \"parts\":[\n{}\n],\n\"tensors\":[\n{}\n]\n}}\n",
            json(&self.format),
            json(&self.name),
            json(&self.stem),
            json(&self.recipe),
            json(&self.config),
            lines(&self.parts),
            lines(&self.tensors)
        )
    }

    /// Reads and checks the text of an `index.json`, wherever it comes from.
    ///
    /// # Errors
    /// A sentence about what cannot be: not JSON of this shape, another format version, a name with a path in it, a
    /// tensor outside its part or over another one.
    pub fn from_json(text: &[u8]) -> Result<Index, String> {
        let index: Index =
            serde_json::from_slice(text).map_err(|e| format!("it is no index of a vindex: {e}"))?;
        index.check()?;
        Ok(index)
    }

    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format {:?}, expected {FORMAT:?}", self.format));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if self.stem.is_empty()
            || self.stem.len() > 200
            || self.stem.starts_with('.')
            || !self.stem.chars().all(plain)
        {
            return Err(format!("stem {:?} is no plain file name", self.stem));
        }
        if self.parts.is_empty() || self.parts.len() > MAX_PARTS {
            return Err(format!(
                "{} parts, expected 1 to {MAX_PARTS}",
                self.parts.len()
            ));
        }
        // Lists of layers are made from the number; each layer has parts of its own.
        if self.config.n_layers as usize > self.parts.len() {
            return Err(format!(
                "{} layers in {} parts",
                self.config.n_layers,
                self.parts.len()
            ));
        }
        for (i, part) in self.parts.iter().enumerate() {
            let expected = part_file(&self.stem, i, self.parts.len());
            if part.file != expected {
                return Err(format!(
                    "part {} is called {:?}, expected {expected:?}",
                    i + 1,
                    part.file
                ));
            }
            if !is_sha256(&part.sha256) {
                return Err(format!("part {expected}: its sha256 is not 64 hex digits"));
            }
        }
        if self
            .calibration
            .as_ref()
            .is_some_and(|calibration| !is_sha256(&calibration.imatrix))
        {
            return Err(
                "calibration: the sha256 of its statistics is not 64 hex digits".to_owned(),
            );
        }
        let mut names = HashSet::new();
        let mut last = (0, 0);
        for tensor in &self.tensors {
            self.check_tensor(tensor)
                .map_err(|why| format!("tensor {:?}: {why}", tensor.name))?;
            if !names.insert(tensor.name.as_str()) {
                return Err(format!("tensor {:?} is there twice", tensor.name));
            }
            let place = (tensor.part, tensor.offset_bytes);
            if place < last {
                return Err(format!(
                    "tensor {:?} begins within the one before it",
                    tensor.name
                ));
            }
            last = (tensor.part, tensor.offset_bytes + tensor.size_bytes);
        }
        Ok(())
    }

    fn check_tensor(&self, tensor: &Tensor) -> Result<(), String> {
        let part = self
            .parts
            .get(tensor.part as usize)
            .ok_or_else(|| format!("there is no part {}", tensor.part))?;
        if tensor.ne.is_empty() || tensor.ne.len() > 4 || tensor.ne.contains(&0) {
            return Err(format!("shape {:?}, expected 1 to 4 dimensions", tensor.ne));
        }
        if gguf::size_bytes(tensor.block_type, &tensor.ne) != Some(tensor.size_bytes) {
            return Err(format!(
                "{} {:?} do not take {} bytes",
                tensor.block_type, tensor.ne, tensor.size_bytes
            ));
        }
        if !tensor.offset_bytes.is_multiple_of(gguf::ALIGNMENT_BYTES) {
            return Err(format!(
                "its offset {} is not a multiple of {}",
                tensor.offset_bytes,
                gguf::ALIGNMENT_BYTES
            ));
        }
        match tensor.offset_bytes.checked_add(tensor.size_bytes) {
            Some(end) if end <= part.size_bytes => {}
            _ => {
                return Err(format!(
                    "it does not fit {} ({} bytes)",
                    part.file, part.size_bytes
                ));
            }
        }
        let n = n_experts(&tensor.name, &tensor.ne);
        let hashes = tensor.experts.as_ref();
        if hashes.map(|e| e.len() as u64) != n
            || hashes.is_some_and(|e| !e.iter().all(|h| is_sha256(h)))
        {
            return Err(format!("expected {} hashes of experts", n.unwrap_or(0)));
        }
        if let Some(sha256) = &tensor.sha256
            && (n.is_some() || !is_sha256(sha256))
        {
            return Err("its sha256 is not 64 hex digits, or it has those of experts".to_owned());
        }
        Ok(())
    }
}

/// The bytes of a small file; `None` when there is none.
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("open", path)(e)),
    };
    let mut bytes = Vec::new();
    file.take(max_bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    if bytes.len() as u64 > max_bytes {
        return Err(Error::Index {
            path: path.to_owned(),
            reason: format!("it is longer than {max_bytes} bytes"),
        });
    }
    Ok(Some(bytes))
}

/// Hex sha256 of `len_bytes` bytes of `file`; tells `progress` how many bytes it has read.
pub(crate) fn hash_range(
    file: &File,
    offset_bytes: u64,
    len_bytes: u64,
    progress: &dyn Fn(u64),
) -> std::io::Result<String> {
    let mut file = file;
    file.seek(SeekFrom::Start(offset_bytes))?;
    let mut sha256 = Sha256::new();
    let mut buffer = vec![0; len_bytes.clamp(1, 1 << 20) as usize];
    let mut left = len_bytes;
    while left > 0 {
        let piece = &mut buffer[..left.min(1 << 20) as usize];
        file.read_exact(piece)?;
        sha256.update(&*piece);
        left -= piece.len() as u64;
        progress(piece.len() as u64);
    }
    Ok(hex::encode(sha256.finalize()))
}
