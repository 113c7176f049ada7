//! Sixteen rows of Q6_K times one row of activations, one row of weights after the other.
//!
//! Read side by side, sixteen rows are sixteen streams, and a CPU guesses what comes next for fewer: where weights come
//! from memory, walking along each row is faster although it takes more steps.
//!
//! Invariant: the bits are those of `kernel.rs`, which tells the steps: sums of integers are exact in any order, and the
//! f32 steps are done with the rows side by side. Left out: other block types, for which the saving is less than the cost.

#![expect(clippy::needless_range_loop, reason = "lanes are named by their row")]

use super::activations::ActivationRows;
use super::tile::Blocks;
use crate::BlockType;
use crate::lanes::{Lanes, N_LANES};
use crate::words::Words;

/// Blocks of a row that are summed up before the next row's.
const N_BLOCKS: usize = 16;
const BLOCK_BYTES: usize = BlockType::Q6_K.block_bytes();
/// Where a block has its f16 scale.
const SCALE_AT: usize = 208;

/// The products of the sixteen rows of `w`, each of `n_blocks` blocks, with row `row` of the activations.
#[inline(always)]
pub(super) fn multiply_q6_k_by_row<W: Words>(
    w: Blocks<'_>,
    n_blocks: usize,
    x: &ActivationRows<'_>,
    row: usize,
) -> W::Lanes {
    let mut acc = W::Lanes::splat(0.0);
    let mut first = 0;
    while first < n_blocks {
        let n = (n_blocks - first).min(N_BLOCKS);
        // (blocks, rows)
        let mut totals = [[0.0; N_LANES]; N_BLOCKS];
        for r in 0..N_LANES {
            let blocks = w.row(r, first * BLOCK_BYTES..(first + n) * BLOCK_BYTES);
            for (b, block) in blocks.as_chunks::<BLOCK_BYTES>().0.iter().enumerate() {
                let x = &x.blocks256(first + b)[row];
                totals[b][r] = W::dot_q6_k(block, &x.q, &x.minus_32_sums16) as f32;
            }
        }
        for (b, totals) in totals[..n].iter().enumerate() {
            let scale = W::Lanes::splat(x.blocks256(first + b)[row].scale);
            let rows = w.rows::<BLOCK_BYTES>((first + b) * BLOCK_BYTES);
            let d = W::f16_column(&rows, SCALE_AT);
            acc = W::Lanes::load(totals).mul_add(d * scale, acc);
        }
        first += n;
    }
    acc
}
