//! A plan's tensors cut into chunks of bounded size, and what turns the bytes of one into blocks.
//!
//! Invariant: a chunk is a whole number of blocks, and knows which values of its source it is made of (`view.rs`); so
//! chunks are independent of each other and the bytes of a tensor do not depend on how it was cut.

use quant::BlockType;

use super::coded;
use super::packed::{self, Packed};
use super::view::{self, Span, View};
use crate::checkpoint::{Checkpoint, Coded, Dtype, SourceTensor};
use crate::error::Error;
use crate::gguf;
use crate::imatrix::Importance;
use crate::plan::{Change, Plan, PlannedTensor, Values};

/// What cannot be cut and is larger than this is refused rather than held in memory.
const MAX_CHUNK_VALUES: u64 = 32 << 20;
/// Values that are converted at a time: as f32 they fit the second-level cache of a core.
const TILE_VALUES: usize = 32 << 10;

/// A tensor of the plan with the tensors of the checkpoint that it is made of.
pub(crate) struct Job<'a> {
    /// Which part of the plan.
    pub(crate) part: usize,
    pub(crate) tensor: &'a PlannedTensor,
    /// In order along the slowest dimension; empty when the values are computed, one when its blocks are kept.
    pub(crate) sources: Vec<JobSource<'a>>,
    /// Length of the blocks.
    pub(crate) size_bytes: u64,
    /// Equal pieces that have a hash each: experts, or 1 for a tensor that lies beside experts.
    pub(crate) n_hashes: Option<u64>,
    /// What each source gives, in the order of the tensor: index of the source, and which of its values.
    views: Vec<(usize, View)>,
    change: Change,
    /// In place of sources: blocks that are kept.
    packed: Option<Packed<'a>>,
    /// Where errors are weighed.
    importance: Option<Importance<'a>>,
}

/// A tensor of the checkpoint, of a type that we read.
pub(crate) struct JobSource<'a> {
    /// Name in the checkpoint.
    pub(crate) name: &'a str,
    pub(crate) tensor: &'a SourceTensor,
    form: Form<'a>,
    n_values: u64,
}

/// How the values of a source are stored.
#[derive(Clone, Copy)]
enum Form<'a> {
    Blocks(BlockType),
    /// Codes, in rows of so many.
    Coded(&'a Coded, u64),
}

/// Some consecutive values of one job.
#[derive(Clone)]
pub(crate) struct Chunk {
    /// Index of the job.
    pub(crate) job: usize,
    /// Index in [`Job::sources`].
    pub(crate) source: usize,
    /// Which values of the source.
    view: View,
    /// What is read of it, one piece after another.
    pub(crate) spans: Vec<Span>,
    /// First value, counted in the tensor.
    start: u64,
    pub(crate) n_values: usize,
    /// The last one of its source, so that what was counted in it can be told.
    pub(crate) ends_source: bool,
    /// The last one of its tensor: padding follows.
    pub(crate) ends_tensor: bool,
}

/// Values on their way, kept from chunk to chunk.
#[derive(Default)]
pub(crate) struct Scratch {
    /// As they are read.
    read: Vec<f32>,
    /// As they are stored.
    tile: Vec<f32>,
    /// How much their errors count.
    weights: Vec<f32>,
    /// Whole rows of codes, as values.
    whole: Vec<f32>,
    /// Their scales.
    factors: Vec<f32>,
}

/// The jobs of the parts that `wanted` picks, in file order.
///
/// # Errors
/// [`Error::Plan`] when the checkpoint has not the tensors that the plan names, or they have another size.
pub(crate) fn jobs<'a>(
    plan: &'a Plan,
    wanted: impl Fn(usize) -> bool,
) -> Result<Vec<Job<'a>>, Error> {
    let mut jobs = Vec::new();
    for (part, planned) in plan
        .parts
        .iter()
        .enumerate()
        .filter(|&(part, _)| wanted(part))
    {
        for tensor in &planned.tensors {
            let job = Job::new(part, tensor, &plan.checkpoint);
            let mut job = job.map_err(|reason| Error::Plan {
                tensor: tensor.name.clone(),
                reason,
            })?;
            job.importance = Importance::of(plan, tensor);
            job.n_hashes = planned.n_hashes(tensor);
            jobs.push(job);
        }
    }
    Ok(jobs)
}

impl<'a> Job<'a> {
    fn new(
        part: usize,
        tensor: &'a PlannedTensor,
        checkpoint: &'a Checkpoint,
    ) -> Result<Job<'a>, String> {
        let n_values = tensor
            .ne
            .iter()
            .try_fold(1u64, |n, &d| n.checked_mul(d))
            .ok_or("its shape overflows")?;
        let size_bytes =
            gguf::size_bytes(tensor.block_type, &tensor.ne).ok_or("its shape overflows")?;
        if n_values == 0 {
            return Err(format!("shape {:?} holds nothing", tensor.ne));
        }
        let (names, transform) = match &tensor.values {
            Values::Computed { values } => {
                if values.len() as u64 != n_values {
                    return Err(format!(
                        "{} values are planned for shape {:?}",
                        values.len(),
                        tensor.ne
                    ));
                }
                return Ok(Job {
                    part,
                    tensor,
                    sources: Vec::new(),
                    size_bytes,
                    n_hashes: None,
                    views: Vec::new(),
                    change: Change::None,
                    packed: None,
                    importance: None,
                });
            }
            Values::Packed {
                blocks,
                scales,
                order,
            } => {
                let packed = Packed::new(blocks, scales, checkpoint)?;
                let views = view::views(order, packed.n_values(), tensor.ne[0])?;
                let is_whole = |view: &View| view.in_blocks(packed::BLOCK_LEN).is_some();
                let planned: u64 = views.iter().map(View::n_values).sum();
                if planned != n_values
                    || tensor.block_type != BlockType::MXFP4
                    || !views.iter().all(is_whole)
                {
                    return Err(format!("{blocks} does not make {:?}", tensor.ne));
                }
                return Ok(Job {
                    part,
                    tensor,
                    sources: Vec::new(),
                    size_bytes,
                    n_hashes: None,
                    views: views.into_iter().map(|view| (0, view)).collect(),
                    change: Change::None,
                    packed: Some(packed),
                    importance: None,
                });
            }
            Values::Kept { tensor: name } => {
                let source = JobSource::new(name, checkpoint)?;
                let is_same = matches!(source.form, Form::Blocks(t) if t == tensor.block_type);
                if !is_same || source.n_values != n_values {
                    return Err(format!(
                        "{n_values} values in {} blocks are to be kept, {name} has {} in {}",
                        tensor.block_type, source.n_values, source.tensor.dtype
                    ));
                }
                return Ok(Job {
                    part,
                    tensor,
                    sources: vec![source],
                    size_bytes,
                    n_hashes: None,
                    views: vec![(0, View::range(n_values))],
                    change: Change::None,
                    packed: None,
                    importance: None,
                });
            }
            Values::Checkpoint { tensors, transform } => (tensors, transform),
        };
        let block_len = tensor.block_type.block_len() as u64;
        let mut sources = Vec::new();
        let mut views = Vec::new();
        for name in names {
            let source = JobSource::new(name, checkpoint)?;
            // The rows of a vector (a bias) are its elements.
            let shape = &source.tensor.shape;
            let row_len = if shape.len() > 1 {
                *shape.last().unwrap_or(&1)
            } else {
                1
            };
            for view in view::views(&transform.order, source.n_values, row_len)? {
                if !view.n_values().is_multiple_of(block_len) {
                    return Err("it is made of no whole number of blocks".to_owned());
                }
                views.push((sources.len(), view));
            }
            sources.push(source);
        }
        let planned: u64 = views.iter().map(|(_, view)| view.n_values()).sum();
        if planned != n_values {
            let shape = sources.first().map(|source| &source.tensor.shape);
            return Err(format!(
                "{} of shape {:?} like {} do not make {:?}",
                names.len(),
                shape.map_or(&[][..], Vec::as_slice),
                names.first().map_or("nothing", String::as_str),
                tensor.ne
            ));
        }
        Ok(Job {
            part,
            tensor,
            sources,
            size_bytes,
            n_hashes: None,
            views,
            change: transform.change,
            packed: None,
            importance: None,
        })
    }

    /// What is read for `chunk`: name, tensor, place in its file and length of each piece, one after another.
    pub(crate) fn reads(&self, chunk: &Chunk) -> Vec<(&'a str, &'a SourceTensor, u64, usize)> {
        let spans = chunk.spans.iter();
        if let Some(packed) = &self.packed {
            return spans.flat_map(|&span| packed.reads(span)).collect();
        }
        // Computed values have no source.
        let Some(source) = self.sources.get(chunk.source) else {
            return Vec::new();
        };
        let read = |&span: &Span| {
            let pieces = source.pieces(span).into_iter();
            pieces.map(|(tensor, at, len)| (source.name, tensor, at, len))
        };
        spans.flat_map(read).collect()
    }

    /// Cuts the job into chunks of about `max_values`, given its own index.
    ///
    /// # Errors
    /// [`Error::Plan`] when rows change places so far that a piece would not fit the memory.
    pub(crate) fn chunks(&self, job: usize, max_values: usize) -> Result<Vec<Chunk>, Error> {
        let block_len = self.tensor.block_type.block_len() as u64;
        let computed = match &self.tensor.values {
            Values::Computed { values } => Some((0, View::range(values.len() as u64))),
            Values::Checkpoint { .. } | Values::Packed { .. } | Values::Kept { .. } => None,
        };
        let mut chunks = Vec::new();
        for (source, view) in computed.iter().chain(&self.views) {
            let mut pieces = Vec::new();
            if computed.is_some() {
                pieces.push(view.clone());
            } else if view.is_range() {
                view.cut(max_values as u64, block_len, &mut pieces);
            } else {
                // Beside what is stored, what was read is held as it is decoded, which may be twice as much.
                view.cut((max_values / 3).max(1) as u64, block_len, &mut pieces);
            }
            chunks.extend(pieces.into_iter().map(|view| Chunk {
                job,
                source: *source,
                spans: view.spans(),
                start: 0,
                n_values: view.n_values() as usize,
                view,
                ends_source: false,
                ends_tensor: false,
            }));
        }
        let last = chunks.len() - 1;
        let mut start = 0;
        for i in 0..chunks.len() {
            chunks[i].start = start;
            start += chunks[i].n_values as u64;
            chunks[i].ends_tensor = i == last;
            chunks[i].ends_source = i == last || chunks[i + 1].source != chunks[i].source;
        }
        match chunks.iter().map(Chunk::read_values).max() {
            Some(n) if n > MAX_CHUNK_VALUES => Err(Error::Plan {
                tensor: self.tensor.name.clone(),
                reason: format!("its rows change places within {n} values, which cannot be held"),
            }),
            _ => Ok(chunks),
        }
    }

    /// The blocks of `chunk`, whose bytes in the checkpoint are `raw`, are put into `blocks`, followed by the
    /// padding after the tensor's last chunk. Returns how many values are NaN, infinite, or too large for the type
    /// that they are stored in.
    pub(crate) fn encode(
        &self,
        chunk: &Chunk,
        raw: &[u8],
        scratch: &mut Scratch,
        blocks: &mut Vec<u8>,
    ) -> u64 {
        let block_type = self.tensor.block_type;
        let n_bytes = block_bytes(block_type, chunk.n_values);
        let padding = if chunk.ends_tensor {
            self.size_bytes.next_multiple_of(gguf::ALIGNMENT_BYTES) - self.size_bytes
        } else {
            0
        };
        fit(blocks, n_bytes + padding as usize);
        blocks[n_bytes..].fill(0);
        let blocks = &mut blocks[..n_bytes];
        if let Values::Computed { values } = &self.tensor.values {
            quant::encode(block_type, values, blocks);
            return n_nonfinite(block_type, values);
        }
        if let Some(packed) = &self.packed {
            // Every bit pattern is a number.
            packed.encode(&chunk.view, &chunk.spans, raw, blocks);
            return 0;
        }
        if let Values::Kept { .. } = &self.tensor.values {
            blocks.copy_from_slice(raw);
            return n_nonfinite_in(block_type, raw, &mut scratch.tile);
        }
        let form = self.sources[chunk.source].form;
        let Scratch {
            read,
            tile,
            weights,
            whole,
            factors,
        } = scratch;
        let mut start = chunk.start;
        let mut change_and_encode = |values: &mut [f32], blocks: &mut [u8]| {
            change(self.change, values);
            match &self.importance {
                None => quant::encode(block_type, values, blocks),
                Some(importance) => {
                    weights.resize(values.len(), 0.0);
                    importance.fill(start, weights);
                    quant::encode_weighted(block_type, values, weights, blocks);
                }
            }
            start += values.len() as u64;
            n_nonfinite(block_type, values)
        };
        if !chunk.view.is_range() {
            read.resize(chunk.read_values() as usize, 0.0);
            tile.resize(chunk.n_values, 0.0);
            match form {
                Form::Blocks(dtype) => quant::decode(dtype, raw, read),
                Form::Coded(coded, row_len) => {
                    let (mut raw, mut left) = (raw, read.as_mut_slice());
                    for &span in &chunk.spans {
                        let (values, rest) = left.split_at_mut(span.n_values as usize);
                        coded::decode(coded, row_len, span, &mut raw, values, whole, factors);
                        left = rest;
                    }
                }
            }
            chunk.view.gather(&chunk.spans, read, tile);
            return change_and_encode(tile, blocks);
        }
        let dtype = match form {
            Form::Blocks(dtype) => dtype,
            Form::Coded(coded, row_len) => {
                // A range is one span.
                let mut raw = raw;
                let mut n_bad = 0;
                let mut blocks = blocks;
                for &span in &chunk.spans {
                    let n_values = span.n_values as usize;
                    read.resize(n_values, 0.0);
                    coded::decode(coded, row_len, span, &mut raw, read, whole, factors);
                    let (these, rest) = blocks.split_at_mut(block_bytes(block_type, n_values));
                    n_bad += change_and_encode(read, these);
                    blocks = rest;
                }
                return n_bad;
            }
        };
        let tile_values = TILE_VALUES.next_multiple_of(block_type.block_len());
        tile.resize(tile_values, 0.0);
        let raw_tiles = raw.chunks(block_bytes(dtype, tile_values));
        let block_tiles = blocks.chunks_mut(block_bytes(block_type, tile_values));
        let mut n_bad = 0;
        for (raw, blocks) in raw_tiles.zip(block_tiles) {
            let n_values = raw.len() / dtype.block_bytes() * dtype.block_len();
            let values = &mut tile[..n_values];
            quant::decode(dtype, raw, values);
            n_bad += change_and_encode(values, blocks);
        }
        n_bad
    }
}

impl Chunk {
    /// Values that are read for it.
    pub(crate) fn read_values(&self) -> u64 {
        self.spans.iter().map(|span| span.n_values).sum()
    }
}

fn change(change: Change, values: &mut [f32]) {
    match change {
        Change::None => {}
        Change::AddOne => values.iter_mut().for_each(|v| *v += 1.0),
        // In double precision, so that every machine rounds to the same single.
        Change::NegativeExp => values
            .iter_mut()
            .for_each(|v| *v = -f64::from(*v).exp() as f32),
    }
}

impl<'a> JobSource<'a> {
    fn new(name: &'a str, checkpoint: &'a Checkpoint) -> Result<JobSource<'a>, String> {
        let tensor = checkpoint
            .tensor(name)
            .ok_or_else(|| format!("the checkpoint has no tensor {name}"))?;
        let dtype = match tensor.dtype {
            Dtype::F32 => BlockType::F32,
            Dtype::F16 => BlockType::F16,
            Dtype::BF16 => BlockType::BF16,
            Dtype::Blocks(block_type) => block_type,
            Dtype::Coded => {
                let coded = checkpoint.coded(name);
                let coded = coded.ok_or_else(|| format!("nothing tells the codes of {name}"))?;
                let shape = &tensor.shape;
                let n_values = shape.iter().try_fold(1_u64, |n, &d| n.checked_mul(d));
                let row_len = shape.last().copied().filter(|n| *n > 0);
                return match (n_values, row_len) {
                    (Some(n_values), Some(row_len)) => Ok(JobSource {
                        name,
                        tensor,
                        form: Form::Coded(coded, row_len),
                        n_values,
                    }),
                    _ => Err(format!("{name} has the shape {shape:?}")),
                };
            }
            other => {
                return Err(format!(
                    "{name} has type {other}, expected F32, F16 or BF16"
                ));
            }
        };
        let n_blocks = tensor.size_bytes / dtype.block_bytes() as u64;
        let n_values = n_blocks
            .checked_mul(dtype.block_len() as u64)
            .ok_or_else(|| format!("{name} is too large"))?;
        Ok(JobSource {
            name,
            tensor,
            form: Form::Blocks(dtype),
            n_values,
        })
    }

    /// What is read for `span`.
    fn pieces(&self, span: Span) -> Vec<coded::Piece<'a>> {
        match self.form {
            Form::Coded(coded, row_len) => coded::pieces(self.tensor, coded, row_len, span),
            Form::Blocks(dtype) => {
                let (block_len, block_bytes) = (dtype.block_len() as u64, dtype.block_bytes());
                let (first, n) = (span.start / block_len, span.n_values / block_len);
                let at = self.tensor.offset_bytes + first * block_bytes as u64;
                vec![(self.tensor, at, n as usize * block_bytes)]
            }
        }
    }
}

/// Bytes of `n_values` in whole blocks, which a chunk and a tile always are.
pub(crate) fn block_bytes(block_type: BlockType, n_values: usize) -> usize {
    n_values / block_type.block_len() * block_type.block_bytes()
}

/// Gives a reused buffer its length without clearing what will be overwritten.
pub(crate) fn fit(buffer: &mut Vec<u8>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    buffer.truncate(len);
}

/// How many values of some blocks are NaN or infinite. `tile` is scratch.
fn n_nonfinite_in(block_type: BlockType, blocks: &[u8], tile: &mut Vec<f32>) -> u64 {
    let tile_values = TILE_VALUES.next_multiple_of(block_type.block_len());
    tile.resize(tile_values, 0.0);
    let tiles = blocks.chunks(block_bytes(block_type, tile_values));
    tiles
        .map(|blocks| {
            let n_values = blocks.len() / block_type.block_bytes() * block_type.block_len();
            let values = &mut tile[..n_values];
            quant::decode(block_type, blocks, values);
            n_nonfinite(BlockType::F32, values)
        })
        .sum()
}

/// How many values have no finite value of `block_type` that is near them. The K-quants and their like clamp.
fn n_nonfinite(block_type: BlockType, values: &[f32]) -> u64 {
    // From here on, rounding to nearest goes to infinity.
    let limit = match block_type {
        BlockType::F16 => 65_520.0_f32,
        BlockType::BF16 => f32::from_bits(0x7f7f_8000),
        _ => f32::INFINITY,
    };
    // Of numbers without sign, the bits are in order, NaN last. Counted in 32 bits a piece, which the compiler turns
    // into vector instructions.
    let limit = limit.to_bits();
    let n_bad = |piece: &[f32]| {
        piece
            .iter()
            .map(|v| u32::from(v.abs().to_bits() >= limit))
            .sum::<u32>()
    };
    values
        .chunks(1 << 20)
        .map(|piece| u64::from(n_bad(piece)))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rounds_to_infinity_is_counted_as_infinite() {
        let values = [
            65_504.0,
            -65_519.9,
            65_520.0,
            f32::MAX,
            f32::NAN,
            f32::NEG_INFINITY,
        ];
        for (block_type, expected) in [
            (BlockType::F16, 4),
            (BlockType::BF16, 3),
            (BlockType::F32, 2),
            (BlockType::Q4_K, 2),
        ] {
            assert_eq!(n_nonfinite(block_type, &values), expected, "{block_type}");
            if block_type.block_len() == 1 {
                let mut blocks = vec![0; values.len() * block_type.block_bytes()];
                quant::encode(block_type, &values, &mut blocks);
                let mut stored = [0.0; 6];
                quant::decode(block_type, &blocks, &mut stored);
                let n_stored = stored.iter().filter(|v| !v.is_finite()).count();
                assert_eq!(n_stored as u64, expected, "{block_type}");
            }
        }
    }
}
