//! The scale (and offset) with which a group of weights loses least: least squares over a few roundings.
//!
//! A scale decides how values round to integers, and given the integers the best scale is a formula. So: try some
//! scales near the one that just spans the group, solve each for its integers, keep the best. Sums are taken over
//! the residuals `r = u - q` of values in units of the step, which are small, so that nothing cancels in f32.
//!
//! Invariant: lanes are independent, and a group without spread gets scale 0, never a division by it.

use super::importance::Weights;
use crate::lanes::{Lanes, abs, inverse_or_zero};

/// Spreads below this are rounding noise of the smallest f16 scale (2^-24) and count as none.
const SPREAD_MIN: f32 = 1e-10;

/// What a sum of squared integers is at least taken as. Where it is less all integers are 0, and what is divided by it too.
const QQ_MIN: f32 = 1e-30;

/// A later try must be better by this much, in squares of the whole spread. Where several tries fit exactly, as on
/// values of two kinds, all groups of a block so choose alike, and their scales agree in the few bits that are left.
const TIE: f32 = 1e-8;

/// The scale s that makes the squared error of `x ≈ s * q`, q in `-half..half`, small.
/// `steps`: into how many steps the largest magnitude is cut, one entry for each try; negative where the largest
/// value lands on the negative side.
#[inline(always)]
pub(super) fn fit_scale<L: Lanes, const N: usize>(
    x: &[L; N],
    weights: &impl Weights<L, N>,
    half: f32,
    steps: &[f32],
) -> L {
    let zero = L::splat(0.0);
    let (q_min, q_max) = (L::splat(-half), L::splat(half - 1.0));
    let extreme = extreme(x);
    let inverse = L::splat(SPREAD_MIN).select_lt(abs(extreme), L::splat(1.0) / extreme, zero);
    let mut y = *x;
    for y in &mut y {
        *y = *y * inverse;
    }
    let mut error_best = L::splat(f32::MAX);
    let mut scale_best = zero;
    for &step in steps {
        let step_lanes = L::splat(step);
        let (mut rr, mut rq, mut qq) = (zero, zero, zero);
        for (i, &y) in y.iter().enumerate() {
            let u = y * step_lanes;
            let q = u.max(q_min).min(q_max).round();
            let r = u - q;
            let (wr, wq) = (weights.weigh(i, r), weights.weigh(i, q));
            rr = r.mul_add(wr, rr);
            rq = r.mul_add(wq, rq);
            qq = q.mul_add(wq, qq);
        }
        let correction = rq / qq.max(L::splat(QQ_MIN));
        let per_step = L::splat(1.0 / step);
        let error = correction.neg_mul_add(rq, rr) * per_step * per_step;
        let scale = (L::splat(1.0) + correction) * per_step;
        let bar = error_best - L::splat(TIE);
        scale_best = error.select_lt(bar, scale, scale_best);
        error_best = error.select_lt(bar, error, error_best);
    }
    // A lane without spread has y = 0 everywhere and an extreme that is next to nothing.
    scale_best * L::splat(SPREAD_MIN).select_lt(abs(extreme), extreme, zero)
}

/// The value of largest magnitude, with its sign.
#[inline(always)]
pub(super) fn extreme<L: Lanes, const N: usize>(x: &[L; N]) -> L {
    let (low, high) = bounds(x);
    (L::splat(0.0) - low).select_lt(high, high, low)
}

/// Where the offset of a fit may lie.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Offset {
    /// Anywhere.
    Free,
    /// At or above 0: `x ≈ scale * q - offset` reaches down from 0, never starts above it.
    NotNegative,
}

/// `x ≈ scale * q - offset`, real-valued, with the weighted mean of the integers q that it was fitted to.
#[derive(Clone, Copy)]
pub(super) struct Line<L> {
    pub(super) scale: L,
    pub(super) offset: L,
    pub(super) q_mean: L,
}

/// The scale and offset that make the squared error of `x ≈ scale * q - offset`, q in `0..=q_max`, small.
/// `tries`: into how many steps the spread of the group is cut, and how many steps above 0 its lowest value is put.
#[inline(always)]
pub(super) fn fit_scale_and_offset<L: Lanes, const N: usize>(
    x: &[L; N],
    weights: &impl Weights<L, N>,
    q_max: f32,
    offset: Offset,
    tries: &[(f32, f32)],
) -> Line<L> {
    let (zero, one) = (L::splat(0.0), L::splat(1.0));
    let (n, per_n) = (weights.total(), weights.per_total());
    let q_max = L::splat(q_max);
    let (mut low, high) = bounds(x);
    if offset == Offset::NotNegative {
        low = low.min(zero);
    }
    let spread = high - low;
    let spread_min = L::splat(SPREAD_MIN);
    let inverse = spread_min.select_lt(spread, one / spread, zero);
    let mut y = *x;
    for y in &mut y {
        *y = (*y - low) * inverse;
    }
    let low_y = low * inverse;

    let mut error_best = L::splat(f32::MAX);
    let (mut scale_best, mut low_best, mut q1_best) = (zero, zero, zero);
    for &(step, shift) in tries {
        let (step_lanes, shift, per_step) = (L::splat(step), L::splat(shift), L::splat(1.0 / step));
        let (mut rr, mut rq, mut r1) = (zero, zero, zero);
        let (mut qq, mut q1) = (zero, zero);
        for (i, &y) in y.iter().enumerate() {
            let u = y.mul_add(step_lanes, shift);
            let q = u.max(zero).min(q_max).round();
            let r = u - q;
            let (wr, wq) = (weights.weigh(i, r), weights.weigh(i, q));
            rr = r.mul_add(wr, rr);
            rq = r.mul_add(wq, rq);
            qq = q.mul_add(wq, qq);
            r1 = r1 + wr;
            q1 = q1 + wq;
        }
        // Least squares of r ≈ a q + b.
        let determinant = n * qq - q1 * q1;
        let mut a = (n * rq - r1 * q1) / determinant.max(weights.determinant_min(qq));
        let mut b = (r1 - a * q1) * per_n;
        let mut error = rr - a * rq - b * r1;
        if offset == Offset::NotNegative {
            // Where the line would start above 0 it starts at 0: r + start ≈ a q.
            let start = low_y.mul_add(step_lanes, zero - shift);
            let a_at_0 = (rq + start * q1) / qq.max(L::splat(QQ_MIN));
            let error_at_0 = rr + start * (r1 + r1 + n * start) - a_at_0 * a_at_0 * qq;
            let above = start + b;
            a = zero.select_lt(above, a_at_0, a);
            error = zero.select_lt(above, error_at_0, error);
            b = zero.select_lt(above, zero - start, b);
        }
        error = error * per_step * per_step;
        let bar = error_best - L::splat(TIE);
        scale_best = error.select_lt(bar, (one + a) * per_step, scale_best);
        low_best = error.select_lt(bar, (b - shift) * per_step, low_best);
        q1_best = error.select_lt(bar, q1, q1_best);
        error_best = error.select_lt(bar, error, error_best);
    }
    // A lane without spread has y = 0 everywhere: no scale, and its one value as the offset.
    let offset = zero - low;
    Line {
        scale: spread_min.select_lt(spread, scale_best * spread, zero),
        offset: spread_min.select_lt(spread, low_best.neg_mul_add(spread, offset), offset),
        q_mean: q1_best * per_n,
    }
}

/// The least and the greatest value.
#[inline(always)]
pub(super) fn bounds<L: Lanes, const N: usize>(x: &[L; N]) -> (L, L) {
    let (mut low, mut high) = (x[0], x[0]);
    for &x in &x[1..] {
        low = low.min(x);
        high = high.max(x);
    }
    (low, high)
}

/// What is left of a group under a given scale, summed over its elements, each as it counts: e = x - scale * q.
#[derive(Clone, Copy)]
pub(super) struct Residual<L> {
    /// Sum of e².
    pub(super) ee: L,
    /// Sum of e * q.
    pub(super) eq: L,
    /// Sum of q².
    pub(super) qq: L,
}

impl<L: Lanes> Residual<L> {
    /// For `x ≈ scale * q`, each q in `q_min..=q_max` the nearest.
    #[inline(always)]
    pub(super) fn of<const N: usize>(
        x: &[L; N],
        weights: &impl Weights<L, N>,
        scale: L,
        q_min: f32,
        q_max: f32,
    ) -> Self {
        let zero = L::splat(0.0);
        let (q_min, q_max) = (L::splat(q_min), L::splat(q_max));
        let inverse = inverse_or_zero(scale);
        let (mut ee, mut eq, mut qq) = (zero, zero, zero);
        for (i, &x) in x.iter().enumerate() {
            let q = (x * inverse).max(q_min).min(q_max).round();
            let e = scale.neg_mul_add(q, x);
            let wq = weights.weigh(i, q);
            ee = e.mul_add(weights.weigh(i, e), ee);
            eq = e.mul_add(wq, eq);
            qq = q.mul_add(wq, qq);
        }
        Residual { ee, eq, qq }
    }

    /// What to add to the scale for the least squared error with the same integers.
    #[inline(always)]
    pub(super) fn correction(&self) -> L {
        self.eq / self.qq.max(L::splat(QQ_MIN))
    }
}

/// What is left of a group under a given scale and offset, summed over its elements, each as it counts: e = x + offset -
/// scale * q.
#[derive(Clone, Copy)]
pub(super) struct ResidualWithOffset<L> {
    /// Sum of e².
    pub(super) ee: L,
    /// Sum of e * q.
    pub(super) eq: L,
    /// Sum of e, as it counts.
    pub(super) e1: L,
    /// Sum of q².
    pub(super) qq: L,
    /// Sum of q.
    pub(super) q1: L,
}

impl<L: Lanes> ResidualWithOffset<L> {
    /// For `x ≈ scale * q - offset`, each q in `0..=q_max` the nearest.
    #[inline(always)]
    pub(super) fn of<const N: usize>(
        x: &[L; N],
        weights: &impl Weights<L, N>,
        scale: L,
        offset: L,
        q_max: f32,
    ) -> Self {
        let zero = L::splat(0.0);
        let q_max = L::splat(q_max);
        let inverse = inverse_or_zero(scale);
        let (mut ee, mut eq, mut e1, mut qq, mut q1) = (zero, zero, zero, zero, zero);
        for (i, &x) in x.iter().enumerate() {
            let x = x + offset;
            let q = (x * inverse).max(zero).min(q_max).round();
            let e = scale.neg_mul_add(q, x);
            let (we, wq) = (weights.weigh(i, e), weights.weigh(i, q));
            ee = e.mul_add(we, ee);
            eq = e.mul_add(wq, eq);
            e1 = e1 + we;
            qq = q.mul_add(wq, qq);
            q1 = q1 + wq;
        }
        ResidualWithOffset { ee, eq, e1, qq, q1 }
    }

    /// What to add to the scale and take from the offset for the least squared error with the same integers.
    #[inline(always)]
    pub(super) fn correction<const N: usize>(&self, weights: &impl Weights<L, N>) -> (L, L) {
        let n = weights.total();
        let determinant = n * self.qq - self.q1 * self.q1;
        let determinant = determinant.max(weights.determinant_min(self.qq));
        let scale = (n * self.eq - self.e1 * self.q1) / determinant;
        (scale, (self.e1 - scale * self.q1) * weights.per_total())
    }
}
