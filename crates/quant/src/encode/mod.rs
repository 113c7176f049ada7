//! From values to blocks: sixteen groups of weights side by side, one in each lane.
//!
//! Invariant: what is written decodes to finite values, whatever the input. `fit.rs` finds real-valued scales,
//! the files beside it round them to what their block can hold and pack the result. Layouts are drawn in `decode.rs`.

mod fit;
mod importance;
mod k_min;
mod k_signed;
mod simple;

use crate::BlockType;
use crate::decode::decode;
use crate::lanes::{Lanes, N_LANES};
use crate::mxfp4;
use importance::{Alike, ByValue};

/// Encodes `values` into `blocks`, whose sizes agree.
#[inline(always)]
pub(crate) fn encode<L: Lanes>(block_type: BlockType, values: &[f32], blocks: &mut [u8]) {
    match block_type {
        BlockType::F32 => {
            for (b, x) in blocks.as_chunks_mut().0.iter_mut().zip(values) {
                *b = x.to_le_bytes();
            }
        }
        BlockType::F16 => encode_f16::<L>(values, blocks),
        BlockType::BF16 => {
            for (b, x) in blocks.as_chunks_mut().0.iter_mut().zip(values) {
                *b = bf16_bits(*x).to_le_bytes();
            }
        }
        BlockType::Q8_0 => simple::encode_q8_0::<L>(values, blocks),
        BlockType::Q5_0 => simple::encode_q5_0::<L>(values, Alike, blocks),
        BlockType::Q4_0 => simple::encode_q4_0::<L>(values, Alike, blocks),
        BlockType::Q4_1 => simple::encode_q4_1::<L>(values, Alike, blocks),
        BlockType::MXFP4 => mxfp4::encode(values, blocks),
        BlockType::Q5_K => k_min::encode_q5_k::<L>(values, Alike, blocks),
        BlockType::Q4_K => k_min::encode_q4_k::<L>(values, Alike, blocks),
        BlockType::Q6_K => k_signed::encode_q6_k::<L>(values, Alike, blocks),
    }
}

/// Values that are encoded with weights at a time: whole blocks of every type.
const PIECE: usize = 512;
/// Bytes of the largest piece.
const PIECE_BYTES_MAX: usize = 512;

/// As [`encode`], where the squared error of each value costs its `importance`. No block costs more than that of
/// [`encode`], which is what is written where the search with weights finds nothing better.
#[inline(always)]
pub(crate) fn encode_weighted<L: Lanes>(
    block_type: BlockType,
    values: &[f32],
    importance: &[f32],
    blocks: &mut [u8],
) {
    let (len, n_bytes) = (block_type.block_len(), block_type.block_bytes());
    let pieces = values.chunks(PIECE).zip(importance.chunks(PIECE));
    for ((x, importance), blocks) in pieces.zip(blocks.chunks_mut(PIECE / len * n_bytes)) {
        let by_value = ByValue(importance);
        match block_type {
            BlockType::Q5_0 => simple::encode_q5_0::<L>(x, by_value, blocks),
            BlockType::Q4_0 => simple::encode_q4_0::<L>(x, by_value, blocks),
            BlockType::Q4_1 => simple::encode_q4_1::<L>(x, by_value, blocks),
            BlockType::Q5_K => k_min::encode_q5_k::<L>(x, by_value, blocks),
            BlockType::Q4_K => k_min::encode_q4_k::<L>(x, by_value, blocks),
            BlockType::Q6_K => k_signed::encode_q6_k::<L>(x, by_value, blocks),
            // Steps that a search could choose are fine enough, or there is nothing to choose.
            BlockType::F32
            | BlockType::F16
            | BlockType::BF16
            | BlockType::Q8_0
            | BlockType::MXFP4 => {
                encode::<L>(block_type, x, blocks);
                continue;
            }
        }
        let mut plain = [0; PIECE_BYTES_MAX];
        let plain = &mut plain[..blocks.len()];
        encode::<L>(block_type, x, plain);
        let (mut found, mut of_plain) = ([0.0; PIECE], [0.0; PIECE]);
        decode::<L>(block_type, blocks, &mut found[..x.len()]);
        decode::<L>(block_type, plain, &mut of_plain[..x.len()]);
        let plain = plain.chunks_exact(n_bytes);
        for (i, (block, plain)) in blocks.chunks_exact_mut(n_bytes).zip(plain).enumerate() {
            let range = i * len..(i + 1) * len;
            let cost = |y: &[f32]| {
                let errors = x[range.clone()].iter().zip(&y[range.clone()]);
                let costs = errors.zip(&importance[range.clone()]).map(|((x, y), w)| {
                    let error = f64::from(*x) - f64::from(*y);
                    error * error * f64::from(*w)
                });
                costs.sum::<f64>()
            };
            if cost(&of_plain) < cost(&found) {
                block.copy_from_slice(plain);
            }
        }
    }
}

#[inline(always)]
fn encode_f16<L: Lanes>(values: &[f32], blocks: &mut [u8]) {
    let (chunks, tail) = values.as_chunks::<N_LANES>();
    let (chunks_bytes, tail_bytes) = blocks.as_chunks_mut::<{ 2 * N_LANES }>();
    for (bytes, x) in chunks_bytes.iter_mut().zip(chunks) {
        *bytes = le_bytes(L::load(x).to_f16());
    }
    let mut x = [0.0; N_LANES];
    x[..tail.len()].copy_from_slice(tail);
    tail_bytes.copy_from_slice(&le_bytes(L::load(&x).to_f16())[..tail_bytes.len()]);
}

#[inline(always)]
fn le_bytes(bits: [u16; N_LANES]) -> [u8; 2 * N_LANES] {
    std::array::from_fn(|i| bits[i / 2].to_le_bytes()[i % 2])
}

/// Ties to even; a NaN keeps its sign and upper payload and becomes quiet.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 {
        quiet
    } else {
        rounded
    }) as u16
}

/// Element i of sixteen groups, for each i: lane g of `result[i]` is `values[N * g + i]`.
/// Missing groups are zeros, NaN is 0, and magnitudes end at 1e9, beyond what any integer block holds.
#[inline(always)]
fn side_by_side<L: Lanes, const N: usize>(values: &[f32]) -> [L; N] {
    let mut columns = [[0.0; N_LANES]; N];
    for (g, group) in values.as_chunks::<N>().0.iter().enumerate() {
        for i in 0..N {
            columns[i][g] = group[i];
        }
    }
    let (zero, limit) = (L::splat(0.0), L::splat(1e9));
    let mut x = [zero; N];
    for i in 0..N {
        let column = L::load(&columns[i]);
        // With a NaN both sides choose the zero, their second operand.
        x[i] = column.max(zero).min(limit) + column.min(zero).max(zero - limit);
    }
    x
}

/// The groups one after the other: `result[g][i]` is lane g of `q[i]`, as a byte.
#[inline(always)]
fn one_by_one<L: Lanes, const N: usize>(q: &[L; N]) -> [[u8; N]; N_LANES] {
    let mut columns = [[0; N_LANES]; N];
    for i in 0..N {
        columns[i] = q[i].to_i8();
    }
    let mut groups = [[0; N]; N_LANES];
    for g in 0..N_LANES {
        for i in 0..N {
            groups[g][i] = columns[i][g] as u8;
        }
    }
    groups
}
