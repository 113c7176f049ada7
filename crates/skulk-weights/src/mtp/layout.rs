//! The bytes of `mtp.safetensors` before they are there: which tensor where, in which pieces it is made, what the
//! header says. The format is drawn in `docs/sidecars.md`.
//!
//! Invariant: the heads and the facts of their source decide the layout, and nothing else does, so that an interrupted
//! run and the next one mean the same pieces, and two runs make the same file.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use terminal::Failure;

use crate::mtp::heads::{Codec, HeadTensor, Heads};
use crate::mtp::norms::NormConvention;
use crate::mtp::spelling::{Spelling, language_field};

/// Bytes of the source that are read, converted and written at a time, unless one row has more.
const PIECE_BYTES: u64 = 8 << 20;
/// Longest row of a quantised tensor, in bytes: a piece is held in memory.
pub(crate) const ROW_BYTES_MAX: u64 = 64 << 20;
const FORMAT: &str = "mtp/1";
/// Hex digits of a sha256.
const SUM_CHARS: usize = 64;

/// Where the heads are from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SourceFacts {
    pub(crate) repo: String,
    /// `None` for a directory.
    pub(crate) commit: Option<String>,
    pub(crate) model_type: Option<String>,
    pub(crate) hidden_size: Option<u64>,
    pub(crate) vocab_size: Option<u64>,
}

/// How the heads are put together, told by their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// `mtp.fc.weight` and `mtp.layers.{i}.*`.
    Block,
    /// `mtp.{i}.*`.
    Layers,
    Other,
}

/// A sidecar to be written.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) heads: Heads,
    pub(crate) source: SourceFacts,
    pub(crate) kind: Kind,
    /// Heads; `None` where the names do not tell.
    pub(crate) n_heads: Option<u64>,
    /// In the order of the file.
    pub(crate) tensors: Vec<Placed>,
    /// In the order of the file.
    pub(crate) pieces: Vec<Piece>,
    /// Length of the header, with the 8 bytes of its own length.
    pub(crate) data_start: u64,
    pub(crate) file_bytes: u64,
}

/// A tensor and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Its number in [`Heads::tensors`].
    pub(crate) head: usize,
    /// Counted from the start of the data.
    pub(crate) bytes: Range<u64>,
}

/// A part of a tensor that is made at once: rows of a quantised tensor, values of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Its number in [`Layout::tensors`].
    pub(crate) tensor: usize,
    pub(crate) part: Range<u64>,
    /// Where it is written, from the start of the data.
    pub(crate) bytes: Range<u64>,
}

impl SourceFacts {
    /// `config` is the source's `config.json`.
    pub(crate) fn new(repo: &str, commit: Option<&str>, config: &Value) -> SourceFacts {
        let number = |name| language_field(config, name).and_then(Value::as_u64);
        SourceFacts {
            repo: repo.to_owned(),
            commit: commit.map(str::to_owned),
            model_type: language_field(config, "model_type")
                .and_then(Value::as_str)
                .map(str::to_owned),
            hidden_size: number("hidden_size"),
            vocab_size: number("vocab_size"),
        }
    }
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Block => "block",
            Kind::Layers => "layers",
            Kind::Other => "other",
        }
    }

    fn of(heads: &Heads) -> (Kind, Option<u64>) {
        let names = || heads.tensors.iter().map(|tensor| tensor.name.as_str());
        let n_numbered = |prefix: &str| {
            let number = |name: &str| {
                name.strip_prefix(prefix)?
                    .split('.')
                    .next()?
                    .parse::<u64>()
                    .ok()
            };
            names().filter_map(number).max().map(|last| last + 1)
        };
        if names().any(|name| name == "mtp.fc.weight") {
            return (Kind::Block, n_numbered("mtp.layers."));
        }
        match n_numbered("mtp.") {
            Some(n) => (Kind::Layers, Some(n)),
            None => (Kind::Other, None),
        }
    }
}

impl Layout {
    /// Places the tensors of `heads` and cuts them into pieces.
    pub(crate) fn new(heads: Heads, source: SourceFacts) -> Layout {
        let mut order: Vec<usize> = (0..heads.tensors.len()).collect();
        // F32 first, so that it lies on multiples of 4; the names are in order already.
        order.sort_by_key(|&i| !heads.tensors[i].is_f32());
        let (mut tensors, mut pieces, mut at) = (Vec::new(), Vec::new(), 0);
        for head in order {
            let tensor = &heads.tensors[head];
            let value_bytes = if tensor.is_f32() { 4 } else { 2 };
            let end = at + tensor.n_values() * value_bytes;
            for (part, n_bytes) in cut(tensor, value_bytes) {
                let start = pieces.last().map_or(0, |piece: &Piece| piece.bytes.end);
                pieces.push(Piece {
                    tensor: tensors.len(),
                    part,
                    bytes: start..start + n_bytes,
                });
            }
            tensors.push(Placed {
                head,
                bytes: at..end,
            });
            at = end;
        }
        let (kind, n_heads) = Kind::of(&heads);
        let mut layout = Layout {
            heads,
            source,
            kind,
            n_heads,
            tensors,
            pieces,
            data_start: 0,
            file_bytes: 0,
        };
        // Sums and conventions have not been found yet, but their lengths do not depend on what they are.
        let sums = vec!["0".repeat(SUM_CHARS); layout.tensors.len()];
        let json = layout.json(&sums, NormConvention::LONGEST);
        layout.data_start = (8 + json.len() as u64).next_multiple_of(8);
        layout.file_bytes = layout.data_start + at;
        layout
    }

    /// Refuses rows that are too long to be held.
    pub(crate) fn bound_rows(&self, bytes_max: u64) -> Result<(), Failure> {
        for tensor in &self.heads.tensors {
            if let Codec::Scaled { narrow, grid, .. } = &tensor.codec
                && grid.cols / narrow.values_per_byte() as u64 > bytes_max
            {
                return Err(Failure::new(format!(
                    "the head tensor {} has rows of {} values, which are too long",
                    tensor.original, grid.cols
                )));
            }
        }
        Ok(())
    }

    /// The tensor of a place.
    pub(crate) fn tensor(&self, index: usize) -> &HeadTensor {
        &self.heads.tensors[self.tensors[index].head]
    }

    /// Bytes of the source's tensors and scales.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.heads.tensors.iter().map(HeadTensor::read_bytes).sum()
    }

    /// How many tensors there are of each type of the source.
    pub(crate) fn source_types(&self) -> BTreeMap<String, usize> {
        let mut types = BTreeMap::new();
        for tensor in &self.heads.tensors {
            *types.entry(tensor.source.dtype.to_string()).or_default() += 1;
        }
        types
    }

    /// The order in which the projection takes its two halves: the published modelling code of DeepSeek-V3's, GLM's,
    /// ERNIE's and Qwen's heads concatenates the embedding first, MiMo's the hidden state first.
    pub(crate) fn concat_order(&self) -> &'static str {
        match self.heads.spelling {
            Spelling::MtpLayers => "hidden_first",
            _ => "embed_first",
        }
    }

    /// The header's bytes, its length in front: exactly [`Layout::data_start`] of them. `sums` are the sha256 of the
    /// tensors in the order of the file, hex.
    pub(crate) fn header(&self, sums: &[String], norms: NormConvention) -> Vec<u8> {
        let json = self.json(sums, norms);
        let mut header = (self.data_start - 8).to_le_bytes().to_vec();
        header.extend_from_slice(json.as_bytes());
        header.resize(self.data_start as usize, b' ');
        header
    }

    /// A text that is the same for the same pieces of the same bytes.
    pub(crate) fn fingerprint(&self) -> String {
        let sums = vec![String::new(); self.tensors.len()];
        let mut sha256 = Sha256::new();
        sha256.update(self.json(&sums, NormConvention::LONGEST));
        for piece in &self.pieces {
            let tensor = self.tensor(piece.tensor);
            sha256.update(format!(
                "{:?} {:?} {:?}\n",
                piece, tensor.source, tensor.codec
            ));
        }
        hex::encode(sha256.finalize())
    }

    fn json(&self, sums: &[String], norms: NormConvention) -> String {
        let (mut header, mut names, mut types, mut by_name) =
            (Map::new(), Map::new(), Map::new(), Map::new());
        header.insert("__metadata__".to_owned(), Value::Null);
        for (placed, sum) in self.tensors.iter().zip(sums) {
            let tensor = &self.heads.tensors[placed.head];
            let dtype = if tensor.is_f32() { "F32" } else { "BF16" };
            let offsets = [placed.bytes.start, placed.bytes.end];
            header.insert(
                tensor.name.clone(),
                json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": offsets}),
            );
            by_name.insert(tensor.name.clone(), sum.as_str().into());
            if tensor.original != tensor.name {
                names.insert(tensor.name.clone(), tensor.original.as_str().into());
            }
            if let Some(text) = source_type(tensor) {
                types.insert(tensor.name.clone(), text.into());
            }
        }
        let mut metadata = Map::new();
        let mut put = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                metadata.insert(key.to_owned(), value.into());
            }
        };
        let text = |text: &str| Some(text.to_owned());
        let source = &self.source;
        put("format", text("pt"));
        put("skulk.format", text(FORMAT));
        put("skulk.layout", text(self.kind.name()));
        put("skulk.n_heads", self.n_heads.map(|n| n.to_string()));
        put("skulk.norm_convention", text(norms.name()));
        put("skulk.norm_convention_from", text(norms.from.name()));
        put("skulk.concat_order", text(self.concat_order()));
        put(
            "skulk.hidden_state",
            (self.kind == Kind::Block).then(|| "before_final_norm".to_owned()),
        );
        put("skulk.model_type", source.model_type.clone());
        put(
            "skulk.hidden_size",
            source.hidden_size.map(|n| n.to_string()),
        );
        put("skulk.vocab_size", source.vocab_size.map(|n| n.to_string()));
        put("skulk.source_repo", Some(source.repo.clone()));
        put("skulk.source_commit", source.commit.clone());
        put(
            "skulk.original_names",
            Some(Value::Object(names).to_string()),
        );
        put("skulk.source_types", Some(Value::Object(types).to_string()));
        put("skulk.sha256", Some(Value::Object(by_name).to_string()));
        header["__metadata__"] = Value::Object(metadata);
        Value::Object(header).to_string()
    }
}

/// What the checkpoint stores, when it is not what the sidecar has.
fn source_type(tensor: &HeadTensor) -> Option<String> {
    let dtype = tensor.source.dtype;
    match &tensor.codec {
        Codec::Copy => None,
        Codec::Float(_) => Some(dtype.to_string()),
        Codec::Scaled { narrow, scale, .. } => {
            let name = scale.original.rsplit('.').next().unwrap_or(&scale.original);
            let codes = match narrow {
                quant::Narrow::E2M1 => format!("{dtype} of packed E2M1"),
                _ => dtype.to_string(),
            };
            Some(format!(
                "{codes} with {} {name} {:?}",
                scale.source.dtype, scale.source.shape
            ))
        }
    }
}

/// The parts of a tensor, each with its length in the sidecar.
fn cut(tensor: &HeadTensor, value_bytes: u64) -> Vec<(Range<u64>, u64)> {
    // Units that are not cut, how many there are, their length in the source and their values.
    let (n_units, unit_bytes, unit_values) = match &tensor.codec {
        Codec::Scaled { narrow, grid, .. } => (
            tensor.n_values() / grid.cols,
            grid.cols / narrow.values_per_byte() as u64,
            grid.cols,
        ),
        _ => (tensor.n_values(), tensor.source.dtype.bits() / 8, 1),
    };
    let step = (PIECE_BYTES / unit_bytes.max(1)).max(1);
    let mut parts = Vec::new();
    let mut at = 0;
    while at < n_units {
        let end = (at + step).min(n_units);
        parts.push((at..end, (end - at) * unit_values * value_bytes));
        at = end;
    }
    parts
}
