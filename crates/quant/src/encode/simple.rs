//! The blocks of 32 with one f16 scale: Q8_0, Q5_0, Q4_0, and Q4_1 with an f16 minimum beside it.
//!
//! Invariant: a scale is judged after it was rounded to f16, by the error that the decoder will make, and the plain
//! scale that spans the block is always among the candidates. Sixteen blocks are encoded at once.

use std::ops::Range;

use super::fit::{
    Line, Offset, Residual, ResidualWithOffset, bounds, extreme, fit_scale, fit_scale_and_offset,
};
use super::importance::{Alike, Importance, Weights};
use super::{one_by_one, side_by_side};
use crate::lanes::{Lanes, N_LANES, abs, covering_f16, finite_f16, inverse_or_zero};

/// Values in a block.
const LEN: usize = 32;

/// Tries of `fit_scale` and `fit_scale_and_offset`, found by measuring; the span of the block comes first.
const Q4_0_STEPS: [f32; 12] = [
    -8.0, -7.7, -7.4, -7.1, -6.8, -8.4, -8.8, 7.2, 6.9, 6.6, 7.5, 7.9,
];
const Q5_0_STEPS: [f32; 10] = [
    -16.0, -15.6, -15.2, -14.8, -16.3, -16.6, 15.0, 14.6, 15.4, 15.8,
];
const Q4_1_TRIES: [(f32, f32); 9] = [
    (15.0, 0.0),
    (14.6, 0.0),
    (14.3, 0.0),
    (14.0, 0.0),
    (13.5, 0.0),
    (13.0, 0.0),
    (15.4, 0.0),
    (15.8, 0.0),
    (16.2, 0.0),
];

#[inline(always)]
pub(super) fn encode_q8_0<L: Lanes>(values: &[f32], blocks: &mut [u8]) {
    for (range, blocks) in sixteens::<34>(values.len(), blocks) {
        let x = &side_by_side::<L, LEN>(&values[range]);
        let span = abs(extreme(x)) * L::splat(1.0 / 127.0);
        let (mut d, above) = (finite_f16(span), covering_f16(span, 0.5 / 127.0));
        // They differ for f16 subnormals only: weights are spared the second look.
        if d.store() != above.store() {
            let (error, error_above) = (
                Residual::of(x, &Alike, d, -127.0, 127.0).ee,
                Residual::of(x, &Alike, above, -127.0, 127.0).ee,
            );
            d = error_above.select_lt(error, above, d);
        }
        let q = quantise(x, d, -127.0, 127.0);
        for ((block, q), d) in blocks.iter_mut().zip(one_by_one(&q)).zip(d.to_f16()) {
            block[..2].copy_from_slice(&d.to_le_bytes());
            block[2..].copy_from_slice(&q);
        }
    }
}

#[inline(always)]
pub(super) fn encode_q5_0<L: Lanes>(
    values: &[f32],
    importance: impl Importance,
    blocks: &mut [u8],
) {
    for (range, blocks) in sixteens::<22>(values.len(), blocks) {
        let weights = importance.weights::<L, LEN>(range.clone(), LEN);
        let x = &side_by_side::<L, LEN>(&values[range]);
        let d = signed_scale(x, &weights, 16.0, &Q5_0_STEPS);
        let mut q = quantise(x, d, -16.0, 15.0);
        shift(&mut q, L::splat(16.0));
        for ((block, q), d) in blocks.iter_mut().zip(one_by_one(&q)).zip(d.to_f16()) {
            block[..2].copy_from_slice(&d.to_le_bytes());
            let mut h = 0;
            for (i, &q) in q.iter().enumerate() {
                h |= u32::from(q >> 4) << i;
            }
            block[2..6].copy_from_slice(&h.to_le_bytes());
            for i in 0..16 {
                block[6 + i] = q[i] & 15 | q[16 + i] << 4;
            }
        }
    }
}

#[inline(always)]
pub(super) fn encode_q4_0<L: Lanes>(
    values: &[f32],
    importance: impl Importance,
    blocks: &mut [u8],
) {
    for (range, blocks) in sixteens::<18>(values.len(), blocks) {
        let weights = importance.weights::<L, LEN>(range.clone(), LEN);
        let x = &side_by_side::<L, LEN>(&values[range]);
        let d = signed_scale(x, &weights, 8.0, &Q4_0_STEPS);
        let mut q = quantise(x, d, -8.0, 7.0);
        shift(&mut q, L::splat(8.0));
        for ((block, q), d) in blocks.iter_mut().zip(one_by_one(&q)).zip(d.to_f16()) {
            block[..2].copy_from_slice(&d.to_le_bytes());
            for i in 0..16 {
                block[2 + i] = q[i] | q[16 + i] << 4;
            }
        }
    }
}

#[inline(always)]
pub(super) fn encode_q4_1<L: Lanes>(
    values: &[f32],
    importance: impl Importance,
    blocks: &mut [u8],
) {
    for (range, blocks) in sixteens::<20>(values.len(), blocks) {
        let weights = importance.weights::<L, LEN>(range.clone(), LEN);
        let x = &side_by_side::<L, LEN>(&values[range]);
        let (d, m) = scale_and_minimum(x, &weights);
        let mut above = *x;
        shift(&mut above, L::splat(0.0) - m);
        let q = quantise(&above, d, 0.0, 15.0);
        let (d, m) = (d.to_f16(), m.to_f16());
        for (g, (block, q)) in blocks.iter_mut().zip(one_by_one(&q)).enumerate() {
            block[..2].copy_from_slice(&d[g].to_le_bytes());
            block[2..4].copy_from_slice(&m[g].to_le_bytes());
            for i in 0..16 {
                block[4 + i] = q[i] | q[16 + i] << 4;
            }
        }
    }
}

/// Sixteen blocks at a time with the range of their values, at the end those that are left.
#[inline(always)]
fn sixteens<const BYTES: usize>(
    n_values: usize,
    blocks: &mut [u8],
) -> impl Iterator<Item = (Range<usize>, &mut [[u8; BYTES]])> {
    (0..n_values)
        .step_by(N_LANES * LEN)
        .map(move |start| start..(start + N_LANES * LEN).min(n_values))
        .zip(blocks.as_chunks_mut::<BYTES>().0.chunks_mut(N_LANES))
}

/// The f16 scale for `x ≈ d * q`, q in `-half..half`.
#[inline(always)]
fn signed_scale<L: Lanes>(
    x: &[L; LEN],
    weights: &impl Weights<L, LEN>,
    half: f32,
    steps: &[f32],
) -> L {
    let q_max = half - 1.0;
    // Spanning the block with the largest magnitude on the side of -half, and, as both signs may reach it, on the other.
    let span = finite_f16(extreme(x) * L::splat(-1.0 / half));
    let mirrored = L::splat(0.0) - span;
    let (error, error_mirrored) = (
        Residual::of(x, weights, span, -half, q_max).ee,
        Residual::of(x, weights, mirrored, -half, q_max).ee,
    );
    let mut d_best = error_mirrored.select_lt(error, mirrored, span);
    let mut error_best = error_mirrored.min(error);
    let mut d = finite_f16(fit_scale(x, weights, half, steps));
    for _ in 0..2 {
        let residual = Residual::of(x, weights, d, -half, q_max);
        d_best = residual.ee.select_lt(error_best, d, d_best);
        error_best = residual.ee.min(error_best);
        d = finite_f16(d + residual.correction());
    }
    d_best
}

/// The f16 scale and minimum for `x ≈ d * q + m`, q in `0..=15`.
#[inline(always)]
fn scale_and_minimum<L: Lanes>(x: &[L; LEN], weights: &impl Weights<L, LEN>) -> (L, L) {
    let zero = L::splat(0.0);
    let (low, high) = bounds(x);
    let (mut d_best, mut m_best) = (
        finite_f16((high - low) * L::splat(1.0 / 15.0)),
        finite_f16(low),
    );
    let mut error_best = ResidualWithOffset::of(x, weights, d_best, zero - m_best, 15.0).ee;
    let Line { scale, offset, .. } =
        fit_scale_and_offset(x, weights, 15.0, Offset::Free, &Q4_1_TRIES);
    let (mut d, mut m) = (finite_f16(scale), finite_f16(zero - offset));
    for _ in 0..2 {
        let residual = ResidualWithOffset::of(x, weights, d, zero - m, 15.0);
        d_best = residual.ee.select_lt(error_best, d, d_best);
        m_best = residual.ee.select_lt(error_best, m, m_best);
        error_best = residual.ee.min(error_best);
        let (more_scale, less_offset) = residual.correction(weights);
        (d, m) = (finite_f16(d + more_scale), finite_f16(m + less_offset));
    }
    (d_best, m_best)
}

/// The nearest integers to `x / scale` in `q_min..=q_max`; 0 (or the nearer bound) where the scale is 0.
#[inline(always)]
fn quantise<L: Lanes>(x: &[L; LEN], scale: L, q_min: f32, q_max: f32) -> [L; LEN] {
    let inverse = inverse_or_zero(scale);
    let (q_min, q_max) = (L::splat(q_min), L::splat(q_max));
    let mut q = *x;
    for q in &mut q {
        *q = (*q * inverse).max(q_min).min(q_max).round();
    }
    q
}

#[inline(always)]
fn shift<L: Lanes>(q: &mut [L; LEN], by: L) {
    for q in q {
        *q = *q + by;
    }
}
