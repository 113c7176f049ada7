//! Q6_K: 16 groups of 16 with a signed 8-bit scale each, under one f16 of the block. A block fills the sixteen lanes.
//!
//! Invariant: of everything tried, a block keeps what decodes with the least squared error.

use super::fit::{Residual, fit_scale};
use super::{one_by_one, side_by_side};
use crate::lanes::{Lanes, N_LANES, covering_f16, inverse_or_zero, through_f16};

/// Values in a group.
const GROUP: usize = 16;
const Q_MIN: f32 = -32.0;
const Q_MAX: f32 = 31.0;

const STEPS: [f32; 12] = [
    -32.8, -32.3, -31.9, -31.5, -31.1, -30.6, -30.0, 30.0, 30.5, 31.0, 31.4, 31.8,
];

#[inline(always)]
pub(super) fn encode_q6_k<L: Lanes>(values: &[f32], blocks: &mut [u8]) {
    let blocks = blocks.as_chunks_mut::<210>().0;
    for (values, block) in values.as_chunks::<256>().0.iter().zip(blocks) {
        encode_block::<L>(&side_by_side(values), block);
    }
}

#[inline(always)]
fn encode_block<L: Lanes>(x: &[L; GROUP], block: &mut [u8; 210]) {
    let mut scale = fit_scale(x, -Q_MIN, &STEPS);
    let mut d = block_scale(scale);
    let (mut d_best, mut s_best, mut error_best) = (d, L::splat(0.0), f32::INFINITY);
    for _ in 0..2 {
        let s = (scale * inverse_or_zero(d))
            .max(L::splat(-128.0))
            .min(L::splat(127.0))
            .round();
        let residual = Residual::of(x, d * s, Q_MIN, Q_MAX);
        let error = sum(residual.ee);
        if error < error_best {
            (d_best, s_best, error_best) = (d, s, error);
        }
        scale = d * s + residual.correction();
        let qq = sum(s * s * residual.qq);
        let more_d = if qq > 0.0 {
            sum(s * residual.eq) / qq
        } else {
            0.0
        };
        d = through_f16(
            (d + L::splat(more_d))
                .min(L::splat(65504.0))
                .max(L::splat(-65504.0)),
        );
    }

    let inverse = inverse_or_zero(d_best * s_best);
    let mut q = *x;
    for q in &mut q {
        *q = (*q * inverse)
            .max(L::splat(Q_MIN))
            .min(L::splat(Q_MAX))
            .round()
            - L::splat(Q_MIN);
    }
    pack(&one_by_one(&q), s_best.to_i8(), d_best.to_f16()[0], block);
}

/// The f16 under which the largest scale becomes -128 (one more than +127 can hold).
#[inline(always)]
fn block_scale<L: Lanes>(scale: L) -> L {
    let mut extreme = 0.0f32;
    for x in scale.store() {
        if x.abs() > extreme.abs() {
            extreme = x;
        }
    }
    let magnitude = covering_f16(L::splat(extreme.abs() * (1.0 / 128.0)), 0.5 / 128.0);
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
    let q: &[u8; 256] = q.as_flattened().as_chunks().0.first().unwrap();
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
