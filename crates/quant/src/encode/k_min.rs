//! Q4_K and Q5_K: 8 groups of 32 with a 6-bit scale and a 6-bit minimum each, under two f16 of the block.
//!
//! Two blocks fill the sixteen lanes, 8 groups each. The groups are fitted by themselves; then the block's two f16
//! and the groups' 6-bit integers are improved in turn, each given the others.
//!
//! Invariant: of everything tried, a block keeps what decodes with the least squared error.

use std::ops::Range;

use super::fit::{Line, Offset, ResidualWithOffset, fit_scale_and_offset};
use super::importance::{Importance, Weights};
use super::{one_by_one, side_by_side};
use crate::lanes::{Lanes, N_LANES, covering_f16, finite_f16, inverse_or_zero};

/// Values in a block.
const LEN: usize = 256;
/// Values in a group.
const GROUP: usize = 32;
/// Groups in a block.
const N_GROUPS: usize = 8;
/// The largest 6-bit scale or minimum.
const S_MAX: f32 = 63.0;

/// Tries of `fit_scale_and_offset`, found by measuring: beyond the span of the group, cutting its extremes pays; a shift
/// helps where a single outlier stretches the span.
const Q4_K_TRIES: [(f32, f32); 14] = [
    (15.0, 0.0),
    (14.6, 0.0),
    (14.3, 0.0),
    (13.9, 0.0),
    (13.4, 0.0),
    (12.8, 0.0),
    (15.3, 0.0),
    (15.6, 0.0),
    (15.9, 0.0),
    (16.4, 0.0),
    (13.5, 0.3),
    (14.2, -0.3),
    (14.8, 0.3),
    (15.2, -0.3),
];
const Q5_K_TRIES: [(f32, f32); 11] = [
    (31.0, 0.0),
    (30.6, 0.0),
    (30.2, 0.0),
    (29.6, 0.0),
    (28.8, 0.0),
    (31.4, 0.0),
    (31.8, 0.0),
    (32.2, 0.0),
    (32.7, 0.0),
    (29.8, 0.3),
    (31.3, -0.3),
];

#[inline(always)]
pub(super) fn encode_q4_k<L: Lanes>(
    values: &[f32],
    importance: impl Importance,
    blocks: &mut [u8],
) {
    let blocks = blocks.as_chunks_mut::<144>().0;
    for (range, blocks) in pairs(values.len()).zip(blocks.chunks_mut(2)) {
        let weights = importance.weights::<L, GROUP>(range.clone(), LEN);
        let found = find(&side_by_side(&values[range]), &weights, 15.0, &Q4_K_TRIES);
        for (half, block) in blocks.iter_mut().enumerate() {
            block[..16].copy_from_slice(&found.header(half));
            pack_low_4_bits(found.groups(half), &mut block[16..]);
        }
    }
}

#[inline(always)]
pub(super) fn encode_q5_k<L: Lanes>(
    values: &[f32],
    importance: impl Importance,
    blocks: &mut [u8],
) {
    let blocks = blocks.as_chunks_mut::<176>().0;
    for (range, blocks) in pairs(values.len()).zip(blocks.chunks_mut(2)) {
        let weights = importance.weights::<L, GROUP>(range.clone(), LEN);
        let found = find(&side_by_side(&values[range]), &weights, 31.0, &Q5_K_TRIES);
        for (half, block) in blocks.iter_mut().enumerate() {
            block[..16].copy_from_slice(&found.header(half));
            let groups = found.groups(half);
            for i in 0..GROUP {
                let mut h = 0;
                for (g, q) in groups.iter().enumerate() {
                    h |= (q[i] >> 4) << g;
                }
                block[16 + i] = h;
            }
            pack_low_4_bits(groups, &mut block[48..]);
        }
    }
}

/// The values of two blocks at a time, at the end of the one that is left.
#[inline(always)]
fn pairs(n_values: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n_values)
        .step_by(2 * LEN)
        .map(move |start| start..(start + 2 * LEN).min(n_values))
}

/// What two blocks hold, before packing. Lanes 0..8 are the first block's groups.
struct Found {
    /// Integers of each group.
    q: [[u8; GROUP]; N_LANES],
    /// 6-bit scale and minimum of each group.
    s: [i8; N_LANES],
    m: [i8; N_LANES],
    /// f16 bits, equal in all lanes of a block.
    d: [u16; N_LANES],
    dm: [u16; N_LANES],
}

impl Found {
    #[inline(always)]
    fn groups(&self, half: usize) -> &[[u8; GROUP]] {
        &self.q[N_GROUPS * half..][..N_GROUPS]
    }

    /// The first 16 bytes of a block: both f16 and the packed 6-bit integers.
    #[inline(always)]
    fn header(&self, half: usize) -> [u8; 16] {
        let mut header = [0; 16];
        header[..2].copy_from_slice(&self.d[N_GROUPS * half].to_le_bytes());
        header[2..4].copy_from_slice(&self.dm[N_GROUPS * half].to_le_bytes());
        let (s, m) = (&self.s[N_GROUPS * half..], &self.m[N_GROUPS * half..]);
        for i in 0..4 {
            let (s_low, m_low, s_high, m_high) =
                (s[i] as u8, m[i] as u8, s[4 + i] as u8, m[4 + i] as u8);
            header[4 + i] = s_low | (s_high >> 4) << 6;
            header[8 + i] = m_low | (m_high >> 4) << 6;
            header[12 + i] = s_high & 15 | (m_high & 15) << 4;
        }
        header
    }
}

/// 32 bytes for each pair of groups: the first in the low halves, the second in the high.
#[inline(always)]
fn pack_low_4_bits(groups: &[[u8; GROUP]], target: &mut [u8]) {
    for (pair, target) in groups
        .as_chunks::<2>()
        .0
        .iter()
        .zip(target.as_chunks_mut::<GROUP>().0)
    {
        for i in 0..GROUP {
            target[i] = pair[0][i] & 15 | pair[1][i] << 4;
        }
    }
}

/// A way to write two blocks, and what it leaves of each group.
#[derive(Clone, Copy)]
struct Choice<L> {
    /// The block's f16, equal in all lanes of a block.
    d: L,
    dm: L,
    /// The groups' integers in 0..=63.
    s: L,
    m: L,
    residual: ResidualWithOffset<L>,
}

impl<L: Lanes> Choice<L> {
    /// Each lane from `self` where `score < score_other`, else from `other`.
    #[inline(always)]
    fn or(self, other: Self, score: L, score_other: L) -> Self {
        Choice {
            d: score.select_lt(score_other, self.d, other.d),
            dm: score.select_lt(score_other, self.dm, other.dm),
            s: score.select_lt(score_other, self.s, other.s),
            m: score.select_lt(score_other, self.m, other.m),
            residual: ResidualWithOffset {
                ee: score.select_lt(score_other, self.residual.ee, other.residual.ee),
                eq: score.select_lt(score_other, self.residual.eq, other.residual.eq),
                e1: score.select_lt(score_other, self.residual.e1, other.residual.e1),
                qq: score.select_lt(score_other, self.residual.qq, other.residual.qq),
                q1: score.select_lt(score_other, self.residual.q1, other.residual.q1),
            },
        }
    }

    /// The line that fits best, given the integers of the values.
    #[inline(always)]
    fn line(&self, weights: &impl Weights<L, GROUP>) -> Line<L> {
        let (more_scale, less_offset) = self.residual.correction(weights);
        Line {
            scale: self.d * self.s + more_scale,
            offset: self.dm * self.m - less_offset,
            q_mean: self.residual.q1 * weights.per_total(),
        }
    }
}

/// The 6-bit integers that the largest scale and the largest offset of a block may get. Each pair leads to other f16
/// and other roundings of all groups, of which the block keeps the best.
const TOPS: [(f32, f32); 4] = [(63.0, 63.0), (62.0, 61.0), (60.0, 62.0), (58.0, 58.0)];
/// The 6-bit scales tried around the nearest.
const AROUND: [f32; 3] = [0.0, -1.0, 1.0];

#[inline(always)]
fn find<L: Lanes>(
    x: &[L; GROUP],
    weights: &impl Weights<L, GROUP>,
    q_max: f32,
    tries: &[(f32, f32)],
) -> Found {
    let zero = L::splat(0.0);
    let fitted = fit_scale_and_offset(x, weights, q_max, Offset::NotNegative, tries);
    let (scale_max, offset_max) = (
        over_block(fitted.scale, f32::max),
        over_block(fitted.offset, f32::max),
    );
    let nothing = ResidualWithOffset {
        ee: zero,
        eq: zero,
        e1: zero,
        qq: zero,
        q1: zero,
    };
    let mut best = Choice {
        d: zero,
        dm: zero,
        s: zero,
        m: zero,
        residual: nothing,
    };
    let mut error_best = L::splat(f32::MAX);
    for (top, top_m) in TOPS {
        let mut d = covering_f16(scale_max * L::splat(1.0 / top), 0.5 / S_MAX);
        let mut dm = covering_f16(offset_max * L::splat(1.0 / top_m), 0.5 / S_MAX);
        let mut line = fitted;
        for _ in 0..2 {
            let mut choice = round_to(line, AROUND[0], d, dm, (x, weights), q_max);
            for more in &AROUND[1..] {
                let other = round_to(line, *more, d, dm, (x, weights), q_max);
                choice = other.or(choice, other.residual.ee, choice.residual.ee);
            }
            let error = over_block(choice.residual.ee, |a, b| a + b);
            best = choice.or(best, error, error_best);
            error_best = error.min(error_best);
            line = choice.line(weights);
            (d, dm) = refit(&choice, weights);
        }
    }
    let scale = best.d * best.s;
    let offset = best.dm * best.m;
    let inverse = inverse_or_zero(scale);
    let mut q = *x;
    for q in &mut q {
        *q = ((*q + offset) * inverse)
            .max(zero)
            .min(L::splat(q_max))
            .round();
    }
    Found {
        q: one_by_one(&q),
        s: best.s.to_i8(),
        m: best.m.to_i8(),
        d: best.d.to_f16(),
        dm: best.dm.to_f16(),
    }
}

/// The 6-bit integers for a line under the block's f16, with `more` added to those of the scales.
#[inline(always)]
fn round_to<L: Lanes>(
    line: Line<L>,
    more: f32,
    d: L,
    dm: L,
    (x, weights): (&[L; GROUP], &impl Weights<L, GROUP>),
    q_max: f32,
) -> Choice<L> {
    let (zero, s_max) = (L::splat(0.0), L::splat(S_MAX));
    let s = (line.scale * inverse_or_zero(d) + L::splat(more))
        .max(zero)
        .min(s_max)
        .round();
    let scale = d * s;
    // What the rounded scale takes from the group's mean, the minimum gives back.
    let offset = (scale - line.scale).mul_add(line.q_mean, line.offset);
    let m = (offset * inverse_or_zero(dm)).max(zero).min(s_max).round();
    Choice {
        d,
        dm,
        s,
        m,
        residual: ResidualWithOffset::of(x, weights, scale, dm * m, q_max),
    }
}

/// The block's f16 that fit best, given all 6-bit integers and the integers of the values: least squares over the block.
#[inline(always)]
fn refit<L: Lanes>(choice: &Choice<L>, weights: &impl Weights<L, GROUP>) -> (L, L) {
    let zero = L::splat(0.0);
    let Choice { s, m, residual, .. } = *choice;
    // e ≈ more_d * (s q) - more_dm * m
    let a11 = over_block(s * s * residual.qq, |a, b| a + b);
    let a12 = zero - over_block(s * m * residual.q1, |a, b| a + b);
    let a22 = over_block(m * m * weights.total(), |a, b| a + b);
    let b1 = over_block(s * residual.eq, |a, b| a + b);
    let b2 = zero - over_block(m * residual.e1, |a, b| a + b);
    let product = a11 * a22;
    let determinant = product - a12 * a12;
    let per_determinant = inverse_or_zero(determinant);
    // Nearly parallel: the minima stay, and the scale alone is fitted.
    let regular = product * L::splat(1e-4);
    let more_dm = regular.select_lt(determinant, (a11 * b2 - a12 * b1) * per_determinant, zero);
    let dm = finite_f16((choice.dm + more_dm).max(zero));
    // The scale answers to the minimum as rounded.
    let more_d = (b1 - a12 * (dm - choice.dm)) * inverse_or_zero(a11);
    (finite_f16((choice.d + more_d).max(zero)), dm)
}

/// Combines the lanes of each block, in their order, and gives the result to each of them.
#[inline(always)]
fn over_block<L: Lanes>(x: L, combine: impl Fn(f32, f32) -> f32) -> L {
    let mut lanes = x.store();
    for block in lanes.as_chunks_mut::<N_GROUPS>().0 {
        let mut all = block[0];
        for &x in &block[1..] {
            all = combine(all, x);
        }
        *block = [all; N_GROUPS];
    }
    L::load(&lanes)
}
