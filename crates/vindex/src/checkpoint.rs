//! The tensors of a safetensors checkpoint, known from the headers alone: name, type, shape and place.
//!
//! Invariant: a header that is accepted is proven. Its entries tile the file's data section without gap or
//! overlap, and each entry's length is what its shape and type say, so that later reads by offset cannot go wrong.
//! Reading the values is the storing half's work.
//!
//! ```text
//! 0        8          8 + n                                  end of file
//! | n: u64 | JSON (n) | tensor data, offsets count from here |
//! ```

mod whole;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use quant::BlockType;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::error::Error;
use crate::source::{Files, Source};
pub(crate) use whole::{Coded, Quantization};

/// Largest header we read; safetensors' own limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Longest name of a tensor.
const NAME_BYTES_MAX: usize = 512;
/// Most dimensions of a tensor.
const RANK_MAX: usize = 8;
const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// All tensors of a checkpoint by name.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    tensors: BTreeMap<String, SourceTensor>,
    /// Lengths of the files that the tensors are in.
    files: BTreeMap<String, u64>,
    /// What the codes of some tensors need.
    coded: BTreeMap<String, Coded>,
}

/// Where one tensor's values are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTensor {
    /// File of the source.
    pub file: String,
    /// Element type.
    pub dtype: Dtype,
    /// Slowest dimension first, as the checkpoint writes it.
    pub shape: Vec<u64>,
    /// First byte, counted from the start of the file.
    pub offset_bytes: u64,
    /// Product of the shape times the element's size.
    pub size_bytes: u64,
}

/// Element type of a checkpoint's tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE binary32, little-endian.
    F32,
    /// IEEE binary16, little-endian.
    F16,
    /// The upper half of a binary32, little-endian.
    BF16,
    /// A type of safetensors that we do not read values of.
    Other(OtherDtype),
    /// Nothing is known of the tensor but its name and its file.
    Unread,
    /// Blocks of a GGUF file.
    Blocks(BlockType),
    /// Codes that become values by tensors beside them.
    Coded,
}

/// A type of safetensors that we do not read values of: its name there and its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OtherDtype {
    name: &'static str,
    bits: u64,
}

impl Dtype {
    /// Size of one element, in bits; of one in a block the whole bits of the average, and 0 where it is not known.
    pub const fn bits(self) -> u64 {
        match self {
            Dtype::F32 => 32,
            Dtype::F16 | Dtype::BF16 => 16,
            Dtype::Other(other) => other.bits,
            Dtype::Unread | Dtype::Coded => 0,
            Dtype::Blocks(t) => (8 * t.block_bytes() / t.block_len()) as u64,
        }
    }

    fn from_name(name: &str) -> Option<Dtype> {
        const OTHERS: [(&str, u64); 17] = [
            ("BOOL", 8),
            ("F4", 4),
            ("F6_E2M3", 6),
            ("F6_E3M2", 6),
            ("U8", 8),
            ("I8", 8),
            ("F8_E5M2", 8),
            ("F8_E4M3", 8),
            ("F8_E8M0", 8),
            ("I16", 16),
            ("U16", 16),
            ("I32", 32),
            ("U32", 32),
            ("F64", 64),
            ("C64", 64),
            ("I64", 64),
            ("U64", 64),
        ];
        match name {
            "F32" => Some(Dtype::F32),
            "F16" => Some(Dtype::F16),
            "BF16" => Some(Dtype::BF16),
            _ => OTHERS
                .iter()
                .find(|(other, _)| *other == name)
                .map(|&(name, bits)| Dtype::Other(OtherDtype { name, bits })),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::Other(other) => other.name,
            Dtype::Unread => "unread",
            Dtype::Coded => "codes with scales",
            Dtype::Blocks(block_type) => block_type.name(),
        })
    }
}

impl Checkpoint {
    /// Reads the headers of `model.safetensors`, or of the shards which `model.safetensors.index.json` names:
    /// two reads a file.
    ///
    /// # Errors
    /// [`Error::MissingFile`] when a file is absent, [`Error::Checkpoint`] when a header or the index says
    /// something that cannot be, [`Error::Source`] when a read fails.
    pub fn open(source: &dyn Source) -> Result<Checkpoint, Error> {
        Checkpoint::of(&Files::list(source)?)
    }

    pub(crate) fn of(files: &Files<'_>) -> Result<Checkpoint, Error> {
        // Where both are there, `transformers` too takes the single file.
        if files.size_bytes(SINGLE_FILE).is_some() {
            return Ok(Checkpoint::new(
                files,
                header(files, SINGLE_FILE)?.into_iter().collect(),
            ));
        }
        if files.size_bytes(INDEX_FILE).is_some() {
            return sharded(files);
        }
        if let Some(other) = files.paths().find(|p| {
            [".bin", ".pth", ".pt", ".gguf"]
                .iter()
                .any(|e| p.ends_with(e))
        }) {
            let what = if other.ends_with(".gguf") {
                format!("its weights are in GGUF ({other}), which has its types already")
            } else {
                format!(
                    "it has no {SINGLE_FILE}, only a pickle of PyTorch's ({other}), which can run what it likes where it \
                     is read; take a safetensors checkpoint, or convert this one as docs/sources.md says"
                )
            };
            return Err(Error::Unsupported { what });
        }
        Err(Error::MissingFile {
            file: SINGLE_FILE.to_owned(),
            wanted_by: format!(
                "a safetensors checkpoint ({SINGLE_FILE}, or {INDEX_FILE} with its shards)"
            ),
        })
    }

    /// Tensors that were found in `files`.
    pub(crate) fn new(files: &Files<'_>, tensors: BTreeMap<String, SourceTensor>) -> Checkpoint {
        let lengths = tensors.values().filter_map(|tensor| {
            let size_bytes = files.size_bytes(&tensor.file)?;
            Some((tensor.file.clone(), size_bytes))
        });
        Checkpoint {
            files: lengths.collect(),
            tensors,
            coded: BTreeMap::new(),
        }
    }

    /// The files that the tensors are in, with their lengths.
    pub(crate) fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.files.iter().map(|(file, size)| (file.as_str(), *size))
    }

    /// Gives convolutions over channels of their own the shape that `transformers` writes, `(channels, 1, kernel)`, and tells
    /// whether one had another: MLX's converters write `(channels, kernel, 1)`, which is the same bytes, and where they do
    /// so they have added the one to norms that are stored around zero.
    pub(crate) fn turn_convolutions(&mut self) -> bool {
        let mut any = false;
        for (name, tensor) in &mut self.tensors {
            let is_turned = matches!(tensor.shape[..], [_, kernel, 1] if kernel > 1);
            if name.ends_with(".conv1d.weight") && is_turned {
                tensor.shape.swap(1, 2);
                any = true;
            }
        }
        any
    }

    /// One tensor by its name in the checkpoint.
    pub fn tensor(&self, name: &str) -> Option<&SourceTensor> {
        self.tensors.get(name)
    }

    /// All tensors in order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &SourceTensor)> {
        self.tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
    }
}

/// True when the source has a checkpoint in safetensors.
pub(crate) fn has_safetensors(files: &Files<'_>) -> bool {
    files.size_bytes(SINGLE_FILE).is_some() || files.size_bytes(INDEX_FILE).is_some()
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
    #[serde(default)]
    metadata: IndexMetadata,
}

#[derive(Default, Deserialize)]
struct IndexMetadata {
    /// Some writers have it as a float.
    total_size: Option<f64>,
}

/// What `model.safetensors.index.json` tells where none of its shards is: the tensors by name, of no shape and
/// [`Dtype::Unread`], and the bytes of them all.
pub(crate) fn named(files: &Files<'_>) -> Result<(Checkpoint, Option<u64>), Error> {
    let index: Index = files.json(INDEX_FILE, HEADER_BYTES_MAX)?;
    let tensor = |file: String| SourceTensor {
        file,
        dtype: Dtype::Unread,
        shape: Vec::new(),
        offset_bytes: 0,
        size_bytes: 0,
    };
    let tensors = index.weight_map.into_iter();
    let tensors = tensors.map(|(name, file)| (name, tensor(file))).collect();
    let checkpoint = Checkpoint::new(files, tensors);
    let size_bytes = index.metadata.total_size.filter(|n| *n >= 1.0);
    Ok((checkpoint, size_bytes.map(|n| n as u64)))
}

fn sharded(files: &Files<'_>) -> Result<Checkpoint, Error> {
    let index: Index = files.json(INDEX_FILE, HEADER_BYTES_MAX)?;
    let shards: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    let mut tensors: BTreeMap<String, SourceTensor> = BTreeMap::new();
    for shard in shards {
        if files.size_bytes(shard).is_none() {
            return Err(Error::MissingFile {
                file: shard.to_owned(),
                wanted_by: INDEX_FILE.to_owned(),
            });
        }
        for (name, tensor) in header(files, shard)? {
            if let Some(other) = tensors.get(&name) {
                return Err(bad(
                    shard,
                    format!("tensor {name} is also in {}", other.file),
                ));
            }
            tensors.insert(name, tensor);
        }
    }
    for (name, shard) in &index.weight_map {
        match tensors.get(name) {
            Some(tensor) if tensor.file == *shard => {}
            Some(tensor) => {
                return Err(bad(
                    shard,
                    format!(
                        "tensor {name} should be here by {INDEX_FILE}, but is in {}",
                        tensor.file
                    ),
                ));
            }
            None => {
                return Err(bad(
                    shard,
                    format!("tensor {name} should be here by {INDEX_FILE}, but is not"),
                ));
            }
        }
    }
    Ok(Checkpoint::new(files, tensors))
}

/// Reads and proves one file's header.
fn header(files: &Files<'_>, file: &str) -> Result<Vec<(String, SourceTensor)>, Error> {
    let Some(file_bytes) = files.size_bytes(file) else {
        return Err(Error::MissingFile {
            file: file.to_owned(),
            wanted_by: "the checkpoint".to_owned(),
        });
    };
    header_of(file, file_bytes, |offset_bytes, buf| {
        files.read_at(file, offset_bytes, buf)
    })
}

/// The tensors of one safetensors file of `source`, `file_bytes` long, in the order of its header: two reads, of the
/// header's length and of the header.
///
/// # Errors
/// [`Error::Checkpoint`] when the header says something that cannot be, [`Error::Source`] when a read fails.
pub fn safetensors_header(
    source: &dyn Source,
    file: &str,
    file_bytes: u64,
) -> Result<Vec<(String, SourceTensor)>, Error> {
    header_of(file, file_bytes, |offset_bytes, buf| {
        source
            .read_at(file, offset_bytes, buf)
            .map_err(|source| Error::Source {
                file: file.to_owned(),
                source,
            })
    })
}

fn header_of(
    file: &str,
    file_bytes: u64,
    read_at: impl Fn(u64, &mut [u8]) -> Result<(), Error>,
) -> Result<Vec<(String, SourceTensor)>, Error> {
    if file_bytes < 8 {
        return Err(bad(
            file,
            format!("{file_bytes} bytes are too few for a safetensors file"),
        ));
    }
    let mut length = [0; 8];
    read_at(0, &mut length)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX || header_bytes > file_bytes - 8 {
        return Err(bad(
            file,
            format!(
                "its header claims {header_bytes} bytes; the file has {file_bytes}, the limit is {HEADER_BYTES_MAX}"
            ),
        ));
    }
    let mut json = vec![0; header_bytes as usize];
    read_at(8, &mut json)?;
    parse(file, &json, 8 + header_bytes, file_bytes)
}

/// Proves that the entries of a header tile the bytes from `data_start` to `data_end` of `file`.
fn parse(
    file: &str,
    json: &[u8],
    data_start: u64,
    data_end: u64,
) -> Result<Vec<(String, SourceTensor)>, Error> {
    let Entries(entries) = serde_json::from_slice(json).map_err(|e| {
        bad(
            file,
            format!("its header is not what safetensors writes: {e}"),
        )
    })?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(bad(
                file,
                format!(
                    "a tensor's name of {} bytes is empty, too long or not text",
                    name.len()
                ),
            ));
        }
        let reject = |reason: String| Err(bad(file, format!("tensor {name}: {reason}")));
        let Some(dtype) = Dtype::from_name(&entry.dtype) else {
            return reject(format!(
                "unknown type {:?}",
                entry.dtype.chars().take(32).collect::<String>()
            ));
        };
        if entry.shape.len() > RANK_MAX {
            return reject(format!(
                "{} dimensions; {RANK_MAX} is the limit",
                entry.shape.len()
            ));
        }
        let bits = entry
            .shape
            .iter()
            .try_fold(dtype.bits(), |n, &d| n.checked_mul(d));
        let Some(size_bytes) = bits.filter(|b| b.is_multiple_of(8)).map(|b| b / 8) else {
            return reject(format!(
                "shape {:?} of {dtype} is no whole number of bytes or too large",
                entry.shape
            ));
        };
        let (start, end) = entry.data_offsets;
        if end.checked_sub(start) != Some(size_bytes) {
            return reject(format!(
                "shape {:?} of {dtype} takes {size_bytes} bytes, its offsets {start}..{end} do not",
                entry.shape
            ));
        }
        if end > data_end - data_start {
            return reject(format!(
                "its offsets {start}..{end} end beyond the file's {} bytes of data (is the file truncated?)",
                data_end - data_start
            ));
        }
        let offset_bytes = data_start + start;
        tensors.push((
            name,
            SourceTensor {
                file: file.to_owned(),
                dtype,
                shape: entry.shape,
                offset_bytes,
                size_bytes,
            },
        ));
    }
    let mut in_order: Vec<&(String, SourceTensor)> = tensors.iter().collect();
    in_order.sort_by_key(|(_, t)| (t.offset_bytes, t.size_bytes));
    let mut at = data_start;
    for (name, tensor) in in_order {
        if tensor.offset_bytes != at {
            let what = if tensor.offset_bytes < at {
                "overlaps the tensor before it"
            } else {
                "leaves a gap before it"
            };
            return Err(bad(
                file,
                format!(
                    "tensor {name} {what}: it starts at byte {}, expected {at}",
                    tensor.offset_bytes
                ),
            ));
        }
        at += tensor.size_bytes;
    }
    if at != data_end {
        return Err(bad(
            file,
            format!("its tensors end at byte {at}, the file at byte {data_end}"),
        ));
    }
    Ok(tensors)
}

/// A header's entries without `__metadata__`; a name that comes twice is an error.
struct Entries(Vec<(String, Entry)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByName;
        impl<'de> Visitor<'de> for ByName {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one entry for each tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut seen = BTreeSet::new();
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!("{name:?} comes twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(ByName)
    }
}

fn bad(file: &str, reason: String) -> Error {
    Error::Checkpoint {
        file: file.to_owned(),
        reason,
    }
}
