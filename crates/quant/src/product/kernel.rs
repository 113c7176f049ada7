//! A panel of sixteen rows of weights times N rows of activations: the arithmetic of the integer products.
//!
//! Invariant: this is the definition of what a product of blocks is, and each lane of it depends on one row of
//! weights and one row of activations. Integer sums are exact, so their order is free; the f32 steps for a block are, with
//! `d`, `m` the weights' scales and `scale` that of the activations, in this order, each rounded once:
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
use super::tile::pick;
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
            total[r] = total[r].add(sum[r].mul(panel.group_scales[g]));
        }
    }
    let mut below = [W::splat(0); N];
    for i in 0..4 {
        for r in 0..N {
            below[r] = below[r].dot_pairs(panel.group_mins[i], x[r].sums32[i]);
        }
    }
    for r in 0..N {
        let m = Some((panel.m[0], below[r]));
        acc[r] = end_k(panel.d[0], total[r], m, x[r].scale, acc[r]);
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
            total[r] = total[r].add(sum[r].mul(panel.group_scales[g]));
        }
    }
    for r in 0..N {
        acc[r] = end_k(panel.d[0], total[r], None, x[r].scale, acc[r]);
    }
}

/// What a block of 32 has beside its scale and its integers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Q4_0: integers with 8 added.
    Plus8,
    /// MXFP4: twice the 4-bit floats, with 12 added.
    Plus12,
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
        let x = pick(&x[i * x_stride..], rows);
        let mut sum = [W::splat(0); N];
        for r in 0..N {
            sum[r] = begin_32(kind, x[r]);
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
            acc[r] = end_32(kind, d, m, sum[r], x[r], acc[r]);
        }
    }
}

/// The sum with which a block of 32 begins, so that the offset of its integers is gone in the end.
#[inline(always)]
pub(super) fn begin_32<W: Words>(kind: Kind, x: &Block32) -> W {
    W::splat(match kind {
        Kind::Plus8 => x.minus_sums[0],
        Kind::Plus12 => -12 * x.sum,
        Kind::Plus16 => x.minus_sums[1],
        Kind::Signed if W::I8_OFFSET == 128 => x.minus_sums[2],
        Kind::Signed | Kind::Minimum => 0,
    })
}

/// The f32 steps of a block of 32.
#[inline(always)]
pub(super) fn end_32<W: Words>(
    kind: Kind,
    d: W::Lanes,
    m: W::Lanes,
    sum: W,
    x: &Block32,
    acc: W::Lanes,
) -> W::Lanes {
    let scale = W::Lanes::splat(x.scale);
    let acc = sum.to_f32().mul_add(d * scale, acc);
    match kind {
        Kind::Minimum => W::Lanes::splat(x.sum as f32).mul_add(m * scale, acc),
        _ => acc,
    }
}

/// The f32 steps of a K block; `m` is the scale of the minima and their sum.
#[inline(always)]
pub(super) fn end_k<W: Words>(
    d: W::Lanes,
    total: W,
    m: Option<(W::Lanes, W)>,
    scale: f32,
    acc: W::Lanes,
) -> W::Lanes {
    let scale = W::Lanes::splat(scale);
    let acc = total.to_f32().mul_add(d * scale, acc);
    match m {
        None => acc,
        Some((m, below)) => below.to_f32().neg_mul_add(m * scale, acc),
    }
}
