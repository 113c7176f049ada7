//! Sixteen f32 side by side: the vocabulary in which the searches of `encode` are written, once for all CPUs.
//!
//! Invariant: every operation is a correctly rounded IEEE operation on each lane by itself, and no lane ever sees
//! another, but for one sum whose order is fixed. So the order of additions is fixed by the algorithm's text and all
//! instruction sets give the same bits; approximate reciprocals are left out on purpose.

use std::ops::{Add, Div, Mul, Sub};

/// Lanes in a value.
pub(crate) const N_LANES: usize = 16;

/// Sixteen f32. The lanes hold the same element of sixteen different groups of weights.
pub(crate) trait Lanes:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// All lanes `x`.
    fn splat(x: f32) -> Self;
    /// Lane i is `x[i]`.
    fn load(x: &[f32; N_LANES]) -> Self;
    /// Element i is lane i.
    fn store(self) -> [f32; N_LANES];
    /// `self * b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// `c - self * b`, rounded once.
    fn neg_mul_add(self, b: Self, c: Self) -> Self;
    /// `if self < b { self } else { b }`: a NaN on either side gives `b`.
    fn min(self, b: Self) -> Self;
    /// `if self > b { self } else { b }`: a NaN on either side gives `b`.
    fn max(self, b: Self) -> Self;
    /// The nearest integer, ties to even. Lanes must be within ±2^22.
    fn round(self) -> Self;
    /// `if self < b { then } else { otherwise }`.
    fn select_lt(self, b: Self, then: Self, otherwise: Self) -> Self;
    /// IEEE binary16 bits, ties to even, NaN stays NaN.
    fn to_f16(self) -> [u16; N_LANES];
    /// From IEEE binary16 bits, exact.
    fn from_f16(x: &[u16; N_LANES]) -> Self;
    /// Integral lanes in -128..=127 as bytes.
    fn to_i8(self) -> [i8; N_LANES];
    /// From the upper halves of sixteen binary32, exact.
    fn from_bf16(x: &[u16; N_LANES]) -> Self;
    /// `2^self`, exact, for integral lanes in -126..=127.
    fn power_of_two(self) -> Self;
    /// The sums of all lanes of four values, each in one fixed order: lane i + lane 8 + i for i < 8, of these eight i +
    /// 4 + i, then i + 2 + i, then the last two.
    fn sum4(x: [Self; 4]) -> [f32; 4];
}

/// The lanes as an f16 can hold them. Lanes must be within ±65504.
#[inline(always)]
fn through_f16<L: Lanes>(x: L) -> L {
    L::from_f16(&x.to_f16())
}

#[inline(always)]
pub(crate) fn abs<L: Lanes>(x: L) -> L {
    x.max(L::splat(0.0) - x)
}

/// `1 / x`, or 0 where x is 0.
#[inline(always)]
pub(crate) fn inverse_or_zero<L: Lanes>(x: L) -> L {
    let zero = L::splat(0.0);
    zero.select_lt(abs(x), L::splat(1.0) / x, zero)
}

/// The f16 nearest to `x`, or the next above where the nearest is so much smaller that `x / result` would exceed 1 by
/// more than `slack`. That happens to f16 subnormals only. Lanes must not be negative; they end at 65504.
#[inline(always)]
pub(crate) fn covering_f16<L: Lanes>(x: L, slack: f32) -> L {
    let x = x.min(L::splat(65504.0));
    let nearest = through_f16(x);
    (nearest * L::splat(1.0 + slack)).select_lt(x, nearest + L::splat(F16_SMALLEST), nearest)
}

/// The smallest f16 above 0, and the spacing of all f16 below 2^-13.
const F16_SMALLEST: f32 = 1.0 / 16_777_216.0;

/// The nearest finite f16.
#[inline(always)]
pub(crate) fn finite_f16<L: Lanes>(x: L) -> L {
    through_f16(x.min(L::splat(65504.0)).max(L::splat(-65504.0)))
}
