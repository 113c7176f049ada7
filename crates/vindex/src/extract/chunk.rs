//! A plan's tensors cut into chunks of bounded size, and what turns the bytes of one into blocks.
//!
//! Invariant: a chunk is a whole number of blocks and, where rows of a head change places, of heads; so chunks are
//! independent of each other and the bytes of a tensor do not depend on how it was cut.

use quant::BlockType;

use crate::checkpoint::{Checkpoint, Dtype, SourceTensor};
use crate::error::Error;
use crate::gguf;
use crate::plan::{Plan, PlannedTensor, Transform, Values};

/// A head that is larger than this is refused rather than held in memory.
const MAX_HEAD_VALUES: u64 = 16 << 20;
/// Values that are converted at a time: as f32 they fit the second-level cache of a core.
const TILE_VALUES: usize = 32 << 10;

/// A tensor of the plan with the tensors of the checkpoint that it is made of.
pub(crate) struct Job<'a> {
    /// Which part of the plan.
    pub(crate) part: usize,
    pub(crate) tensor: &'a PlannedTensor,
    /// In order along the slowest dimension; empty when the values are computed.
    pub(crate) sources: Vec<JobSource<'a>>,
    /// Length of the blocks.
    pub(crate) size_bytes: u64,
    permutation: Option<Permutation>,
}

/// A tensor of the checkpoint, of a type that we read.
pub(crate) struct JobSource<'a> {
    /// Name in the checkpoint.
    pub(crate) name: &'a str,
    pub(crate) tensor: &'a SourceTensor,
    dtype: BlockType,
    n_values: u64,
}

/// Rows of each head of `head_rows` rows change places.
#[derive(Clone, Copy)]
struct Permutation {
    head_rows: usize,
    row_len: usize,
}

/// Some consecutive values of one source of one job.
#[derive(Clone, Copy)]
pub(crate) struct Chunk {
    /// Index of the job.
    pub(crate) job: usize,
    /// Index in [`Job::sources`].
    pub(crate) source: usize,
    /// First value, counted in the source.
    pub(crate) start: u64,
    pub(crate) n_values: usize,
    /// The last one of its source, so that what was counted in it can be told.
    pub(crate) ends_source: bool,
    /// The last one of its tensor: padding follows.
    pub(crate) ends_tensor: bool,
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
            jobs.push(job.map_err(|reason| Error::Plan {
                tensor: tensor.name.clone(),
                reason,
            })?);
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
                    permutation: None,
                });
            }
            Values::Checkpoint { tensors, transform } => (tensors, *transform),
        };
        let mut sources = Vec::new();
        for name in names {
            let source = JobSource::new(name, checkpoint)?;
            if (names.len() as u64).checked_mul(source.n_values) != Some(n_values) {
                let shape = &source.tensor.shape;
                return Err(format!(
                    "{} of shape {shape:?} like {name} do not make {:?}",
                    names.len(),
                    tensor.ne
                ));
            }
            sources.push(source);
        }
        let block_len = tensor.block_type.block_len() as u64;
        if sources.is_empty() || !(n_values / sources.len() as u64).is_multiple_of(block_len) {
            return Err("it is made of no whole number of blocks".to_owned());
        }
        let permutation = match transform {
            Transform::None | Transform::AddOne => None,
            Transform::InterleaveRope { n_heads } => {
                Some(Permutation::new(tensor, sources[0].n_values, n_heads)?)
            }
        };
        Ok(Job {
            part,
            tensor,
            sources,
            size_bytes,
            permutation,
        })
    }

    /// Cuts the job into chunks of about `max_values`, given its own index.
    pub(crate) fn chunks(&self, job: usize, max_values: usize) -> Vec<Chunk> {
        let unit = match self.permutation {
            Some(p) => p.head_rows * p.row_len,
            None => self.tensor.block_type.block_len(),
        };
        let chunk_values = (max_values / unit).max(1) * unit;
        let lengths: Vec<u64> = match &self.tensor.values {
            Values::Computed { values } => vec![values.len() as u64],
            Values::Checkpoint { .. } => {
                self.sources.iter().map(|source| source.n_values).collect()
            }
        };
        let mut chunks = Vec::new();
        for (source, &len) in lengths.iter().enumerate() {
            let mut start = 0;
            while start < len {
                let n_values = (len - start).min(chunk_values as u64) as usize;
                let ends_source = start + n_values as u64 == len;
                let ends_tensor = ends_source && source + 1 == lengths.len();
                chunks.push(Chunk {
                    job,
                    source,
                    start,
                    n_values,
                    ends_source,
                    ends_tensor,
                });
                start += n_values as u64;
            }
        }
        chunks
    }

    /// The blocks of `chunk`, whose bytes in the checkpoint are `raw`, are put into `blocks`, followed by the
    /// padding after the tensor's last chunk. `tile` is scratch. Returns how many values are NaN,
    /// infinite, or too large for the type that they are stored in.
    pub(crate) fn encode(
        &self,
        chunk: &Chunk,
        raw: &[u8],
        tile: &mut Vec<f32>,
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
        let (dtype, transform) = match &self.tensor.values {
            Values::Computed { values } => {
                quant::encode(block_type, values, blocks);
                return n_nonfinite(block_type, values);
            }
            Values::Checkpoint { transform, .. } => (self.sources[chunk.source].dtype, *transform),
        };
        let tile_values = match self.permutation {
            Some(p) => p.head_rows * p.row_len,
            None => TILE_VALUES.next_multiple_of(block_type.block_len()),
        };
        tile.resize(tile_values, 0.0);
        let raw_tiles = raw.chunks(block_bytes(dtype, tile_values));
        let block_tiles = blocks.chunks_mut(block_bytes(block_type, tile_values));
        let mut n_bad = 0;
        for (raw, blocks) in raw_tiles.zip(block_tiles) {
            let values = &mut tile[..raw.len() / dtype.block_bytes()];
            match self.permutation {
                Some(p) => p.decode(dtype, raw, values),
                None => quant::decode(dtype, raw, values),
            }
            if transform == Transform::AddOne {
                values.iter_mut().for_each(|v| *v += 1.0);
            }
            n_bad += n_nonfinite(block_type, values);
            quant::encode(block_type, values, blocks);
        }
        n_bad
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
            other => {
                return Err(format!(
                    "{name} has type {other}, expected F32, F16 or BF16"
                ));
            }
        };
        let n_values = tensor.size_bytes / dtype.block_bytes() as u64;
        Ok(JobSource {
            name,
            tensor,
            dtype,
            n_values,
        })
    }

    /// Which bytes of the source's file `chunk` is.
    pub(crate) fn range(&self, chunk: &Chunk) -> (u64, usize) {
        let value_bytes = self.dtype.block_bytes();
        (
            self.tensor.offset_bytes + chunk.start * value_bytes as u64,
            chunk.n_values * value_bytes,
        )
    }
}

impl Permutation {
    fn new(tensor: &PlannedTensor, n_values: u64, n_heads: u32) -> Result<Permutation, String> {
        // The rows of a vector (a bias) are its elements.
        let row_len = if tensor.ne.len() > 1 { tensor.ne[0] } else { 1 };
        let n_rows = n_values / row_len.max(1);
        let n_heads = u64::from(n_heads);
        if n_heads == 0 || !n_rows.is_multiple_of(2 * n_heads) {
            return Err(format!(
                "{n_rows} rows are not {n_heads} heads of an even number of rows"
            ));
        }
        let head_rows = n_rows / n_heads;
        let n_values = head_rows
            .checked_mul(row_len)
            .filter(|&n| n <= MAX_HEAD_VALUES);
        match n_values {
            Some(n) if n.is_multiple_of(tensor.block_type.block_len() as u64) => Ok(Permutation {
                head_rows: head_rows as usize,
                row_len: row_len as usize,
            }),
            _ => Err(format!(
                "a head of {head_rows} rows of {row_len} cannot be reordered"
            )),
        }
    }

    /// One head. Row `i` of the first half goes to row `2i`, row `i` of the second half to `2i + 1`: what is a pair
    /// at distance `head_rows / 2` in the checkpoint is a pair of neighbours in ggml's rope of the llama architecture.
    fn decode(self, dtype: BlockType, raw: &[u8], values: &mut [f32]) {
        let row_bytes = block_bytes(dtype, self.row_len);
        let (first, second) = raw.split_at(raw.len() / 2);
        let pairs = first
            .chunks_exact(row_bytes)
            .zip(second.chunks_exact(row_bytes));
        for ((first, second), out) in pairs.zip(values.chunks_exact_mut(2 * self.row_len)) {
            let (even, odd) = out.split_at_mut(self.row_len);
            quant::decode(dtype, first, even);
            quant::decode(dtype, second, odd);
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
