//! From values to blocks: sixteen groups of weights side by side, one in each lane.
//!
//! Invariant: what is written decodes to finite values, whatever the input. `fit.rs` finds real-valued scales,
//! the files beside it round them to what their block can hold and pack the result. Layouts are drawn in `decode.rs`.

mod fit;
mod k_min;
mod k_signed;
mod simple;

use crate::BlockType;
use crate::lanes::{Lanes, N_LANES};
use crate::mxfp4;

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
        BlockType::Q5_0 => simple::encode_q5_0::<L>(values, blocks),
        BlockType::Q4_0 => simple::encode_q4_0::<L>(values, blocks),
        BlockType::Q4_1 => simple::encode_q4_1::<L>(values, blocks),
        BlockType::MXFP4 => mxfp4::encode(values, blocks),
        BlockType::Q5_K => k_min::encode_q5_k::<L>(values, blocks),
        BlockType::Q4_K => k_min::encode_q4_k::<L>(values, blocks),
        BlockType::Q6_K => k_signed::encode_q6_k::<L>(values, blocks),
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
