//! Q6_K: 16 groups of 16 with a signed 8-bit scale each, under one f16 of the block. A block fills the sixteen lanes.
//!
//! Invariant: of everything tried, a block keeps what decodes with the least squared error.

use super::fit::{Residual, fit_scale};
use super::importance::{Importance, Weights};
use super::{one_by_one, side_by_side};
use crate::lanes::{Lanes, N_LANES, covering_f16, finite_f16, inverse_or_zero};

/// Values in a block.
const LEN: usize = 256;
/// Values in a group.
const GROUP: usize = 16;
const Q_MIN: f32 = -32.0;
const Q_MAX: f32 = 31.0;

/// Tries of `fit_scale`, found by measuring.
const STEPS: [f32; 12] = [
    -32.0, -31.5, -31.1, -30.6, -30.0, -32.4, -32.8, 31.0, 30.5, 30.0, 31.4, 31.8,
];

/// The magnitudes that the largest scale of a block may get among its 8-bit integers. Each leads to another f16 and
/// other roundings of all groups, of which the block keeps the best.
const TOPS: [f32; 2] = [128.0, 125.0];
/// The 8-bit scales tried around the nearest.
const AROUND: [f32; 7] = [0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 4.0];

#[inline(always)]
pub(super) fn encode_q6_k<L: Lanes>(
    values: &[f32],
    importance: impl Importance,
    blocks: &mut [u8],
) {
    let blocks = blocks.as_chunks_mut::<210>().0;
    for (i, (values, block)) in values.as_chunks::<LEN>().0.iter().zip(blocks).enumerate() {
        let weights = importance.weights::<L, GROUP>(i * LEN..(i + 1) * LEN, LEN);
        encode_block(&side_by_side(values), &weights, block);
    }
}

#[inline(always)]
fn encode_block<L: Lanes>(x: &[L; GROUP], weights: &impl Weights<L, GROUP>, block: &mut [u8; 210]) {
    let zero = L::splat(0.0);
    let fitted = fit_scale(x, weights, -Q_MIN, &STEPS);
    let mut best = Choice {
        d: zero,
        s: zero,
        residual: Residual {
            ee: zero,
            eq: zero,
            qq: zero,
        },
    };
    let mut error_best = f32::MAX;
    for top in TOPS {
        let mut d = block_scale(fitted, top);
        let mut scale = fitted;
        for _ in 0..2 {
            let mut choice = round_to(scale, AROUND[0], d, (x, weights));
            for more in &AROUND[1..] {
                choice = choice.or(round_to(scale, *more, d, (x, weights)));
            }
            let error = sum(choice.residual.ee);
            if error < error_best {
                (best, error_best) = (choice, error);
            }
            scale = d * choice.s + choice.residual.correction();
            d = refit(&choice);
        }
    }

    let inverse = inverse_or_zero(best.d * best.s);
    let mut q = *x;
    for q in &mut q {
        *q = (*q * inverse)
            .max(L::splat(Q_MIN))
            .min(L::splat(Q_MAX))
            .round()
            - L::splat(Q_MIN);
    }
    pack(&one_by_one(&q), best.s.to_i8(), best.d.to_f16()[0], block);
}

/// A way to write a block, and what it leaves of each group.
#[derive(Clone, Copy)]
struct Choice<L> {
    /// The block's f16, equal in all lanes.
    d: L,
    /// The groups' integers in -128..=127.
    s: L,
    residual: Residual<L>,
}

impl<L: Lanes> Choice<L> {
    /// Each lane from the one with less error.
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        let (e, e_other) = (self.residual.ee, other.residual.ee);
        Choice {
            d: self.d,
            s: e_other.select_lt(e, other.s, self.s),
            residual: Residual {
                ee: e_other.select_lt(e, e_other, e),
                eq: e_other.select_lt(e, other.residual.eq, self.residual.eq),
                qq: e_other.select_lt(e, other.residual.qq, self.residual.qq),
            },
        }
    }
}

/// The 8-bit scales nearest to `scale` under the block's f16, with `more` added.
#[inline(always)]
fn round_to<L: Lanes>(
    scale: L,
    more: f32,
    d: L,
    (x, weights): (&[L; GROUP], &impl Weights<L, GROUP>),
) -> Choice<L> {
    let s = (scale * inverse_or_zero(d) + L::splat(more))
        .max(L::splat(-128.0))
        .min(L::splat(127.0))
        .round();
    Choice {
        d,
        s,
        residual: Residual::of(x, weights, d * s, Q_MIN, Q_MAX),
    }
}

/// The block's f16 that fits best, given all 8-bit integers and the integers of the values: least squares over the block.
#[inline(always)]
fn refit<L: Lanes>(choice: &Choice<L>) -> L {
    let Choice { d, s, residual } = *choice;
    let more_d =
        L::splat(sum(s * residual.eq)) * inverse_or_zero(L::splat(sum(s * s * residual.qq)));
    finite_f16(d + more_d)
}

/// The f16 under which the largest scale becomes `-top`. (Negative, for -128 fits in 8 bits and 128 does not.)
#[inline(always)]
fn block_scale<L: Lanes>(scale: L, top: f32) -> L {
    let mut extreme = 0.0f32;
    for x in scale.store() {
        if x.abs() > extreme.abs() {
            extreme = x;
        }
    }
    let magnitude = covering_f16(L::splat(extreme.abs() * (1.0 / top)), 0.5 / 128.0);
    magnitude * L::splat(if extreme > 0.0 { -1.0 } else { 1.0 })
}

/// The sum of all lanes, in their order.
#[inline(always)]
fn sum<L: Lanes>(x: L) -> f32 {
    let mut sum = 0.0;
    for x in x.store() {
        sum += x;
    }
    sum
}

#[inline(always)]
fn pack(q: &[[u8; GROUP]; N_LANES], s: [i8; N_LANES], d: u16, block: &mut [u8; 210]) {
    let q: &[u8; 256] = &q.as_flattened().as_chunks().0[0];
    for half in 0..2 {
        let q = &q[128 * half..][..128];
        for i in 0..32 {
            let (q0, q1, q2, q3) = (q[i], q[32 + i], q[64 + i], q[96 + i]);
            block[64 * half + i] = q0 & 15 | q2 << 4;
            block[64 * half + 32 + i] = q1 & 15 | q3 << 4;
            block[128 + 32 * half + i] = q0 >> 4 | (q1 >> 4) << 2 | (q2 >> 4) << 4 | (q3 >> 4) << 6;
        }
    }
    for i in 0..N_LANES {
        block[192 + i] = s[i] as u8;
    }
    block[208..].copy_from_slice(&d.to_le_bytes());
}
