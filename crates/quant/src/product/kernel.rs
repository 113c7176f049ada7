//! A panel of sixteen rows of weights times N rows of activations: the arithmetic of the integer products.
//!
//! Invariant: this is the one definition of what a product of blocks is, and each lane of it depends on one row of
//! weights and one row of activations. Integer sums are exact, so their order is free; the f32 steps for a block are, with
//! `d`, `m` the weights' f16 scales and `scale` that of the activations, in this order, each rounded once:
//!
//! ```text
//! acc = fma(d * scale, f32(Σ s q x), acc)          s the group's integer scale, 1 in blocks of 32
//! acc = fma(m * scale, f32(Σ x), acc)              Q4_1 only
//! acc = fma(-(m * scale), f32(Σ min Σ x), acc)     Q4_K and Q5_K only
//! ```
//!
//! Blocks follow one another from the left; a row begins at 0.

#![expect(
    clippy::needless_range_loop,
    reason = "registers are named by their place, often in several arrays"
)]

use super::activations::{Block32, Block256};
use super::panel::Panel;
use crate::lanes::Lanes;
use crate::words::Words;

/// Q4_K and Q5_K: 8 groups of 32 columns with minima.
#[inline(always)]
pub(super) fn multiply_k_min<W: Words, const N: usize>(
    panel: &Panel<W>,
    x: [&Block256; N],
    acc: &mut [W::Lanes; N],
) {
    let mut total = [W::splat(0); N];
    for g in 0..8 {
        let mut sum = [W::splat(0); N];
        for i in 0..8 {
            let w = panel.bytes[8 * g + i];
            for r in 0..N {
                sum[r] = sum[r].dot_u7(w, x[r].q[8 * g + i]);
            }
        }
        for r in 0..N {
            total[r] = total[r].add(sum[r].mul(panel.scales[g]));
        }
    }
    let mut below = [W::splat(0); N];
    for i in 0..4 {
        for r in 0..N {
            below[r] = below[r].dot_pairs(panel.mins[i], x[r].sums32[i]);
        }
    }
    for r in 0..N {
        let scale = W::Lanes::splat(x[r].scale);
        let sum = total[r].to_f32().mul_add(panel.d[0] * scale, acc[r]);
        acc[r] = below[r].to_f32().neg_mul_add(panel.m[0] * scale, sum);
    }
}

/// Q6_K: 16 groups of 16 columns.
#[inline(always)]
pub(super) fn multiply_k_signed<W: Words, const N: usize>(
    panel: &Panel<W>,
    x: [&Block256; N],
    acc: &mut [W::Lanes; N],
) {
    let mut total = [W::splat(0); N];
    for g in 0..16 {
        let mut sum = [W::splat(0); N];
        for r in 0..N {
            sum[r] = W::splat(x[r].minus_32_sums16[g]);
        }
        for i in 0..4 {
            let w = panel.bytes[4 * g + i];
            for r in 0..N {
                sum[r] = sum[r].dot_u7(w, x[r].q[4 * g + i]);
            }
        }
        for r in 0..N {
            total[r] = total[r].add(sum[r].mul(panel.scales[g]));
        }
    }
    for r in 0..N {
        let scale = panel.d[0] * W::Lanes::splat(x[r].scale);
        acc[r] = total[r].to_f32().mul_add(scale, acc[r]);
    }
}

/// What a block of 32 has beside its scale and its integers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Q4_0: integers with 8 added.
    Plus8,
    /// Q5_0: integers with 16 added.
    Plus16,
    /// Q8_0: signed integers.
    Signed,
    /// Q4_1: a minimum.
    Minimum,
}

/// Blocks of 32: `n_blocks` of them, `x[i * x_stride + rows[r]]` being block i of row r.
#[inline(always)]
pub(super) fn multiply_32<W: Words, const N: usize>(
    kind: Kind,
    panel: &Panel<W>,
    n_blocks: usize,
    x: &[Block32],
    x_stride: usize,
    rows: [usize; N],
    acc: &mut [W::Lanes; N],
) {
    let blocks = panel
        .bytes
        .as_chunks::<8>()
        .0
        .iter()
        .zip(&panel.d)
        .zip(&panel.m);
    for (i, ((bytes, &d), &m)) in blocks.take(n_blocks).enumerate() {
        let x: [&Block32; N] = std::array::from_fn(|r| &x[i * x_stride + rows[r]]);
        let mut sum = [W::splat(0); N];
        for r in 0..N {
            sum[r] = W::splat(match kind {
                Kind::Plus8 => x[r].minus_sums[0],
                Kind::Plus16 => x[r].minus_sums[1],
                Kind::Signed if W::I8_OFFSET == 128 => x[r].minus_sums[2],
                Kind::Signed | Kind::Minimum => 0,
            });
        }
        for j in 0..8 {
            for r in 0..N {
                sum[r] = match kind {
                    Kind::Signed => sum[r].dot_i8(bytes[j], x[r].q[j]),
                    _ => sum[r].dot_u7(bytes[j], x[r].q[j]),
                };
            }
        }
        for r in 0..N {
            let scale = W::Lanes::splat(x[r].scale);
            acc[r] = sum[r].to_f32().mul_add(d * scale, acc[r]);
            if kind == Kind::Minimum {
                acc[r] = W::Lanes::splat(x[r].sum as f32).mul_add(m * scale, acc[r]);
            }
        }
    }
}
