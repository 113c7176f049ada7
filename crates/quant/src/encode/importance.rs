//! How much the error of each value counts: all alike, or by an importance.
//!
//! An importance is what the square of an error costs, such as the mean square of the activation that a weight meets. Only
//! ratios within a block matter, so each block is scaled to a largest importance of 1; importances below
//! [`IMPORTANCE_MIN`] of it, zero, NaN and negative ones count as that little, so that every group has a best scale.
//!
//! Invariant: for values that count alike the searches compute exactly what they would without weights, to the bit.

use std::ops::Range;

use super::side_by_side;
use crate::lanes::{Lanes, N_LANES};

/// Least importance beside the largest of the block. Squares of it stay far from the smallest f32.
const IMPORTANCE_MIN: f32 = 1e-7;

/// The weights of N elements of sixteen groups.
pub(super) trait Weights<L: Lanes, const N: usize> {
    /// Times the weight of element `i`.
    fn weigh(&self, i: usize, x: L) -> L;
    /// The sum of the weights.
    fn total(&self) -> L;
    /// Its inverse.
    fn per_total(&self) -> L;
    /// What a determinant `total * qq - q1²` is at least taken as: below it the integers of a group are as good as equal.
    fn determinant_min(&self, qq: L) -> L;
}

/// Where weights come from.
pub(super) trait Importance: Copy {
    /// For lanes L and groups of N.
    type Weights<L: Lanes, const N: usize>: Weights<L, N>;
    /// The weights of the values in `range`, in blocks of `block_len`, laid out as [`side_by_side`] does.
    fn weights<L: Lanes, const N: usize>(
        self,
        range: Range<usize>,
        block_len: usize,
    ) -> Self::Weights<L, N>;
}

/// Every value counts 1.
#[derive(Clone, Copy)]
pub(super) struct Alike;

impl Importance for Alike {
    type Weights<L: Lanes, const N: usize> = Alike;

    #[inline(always)]
    fn weights<L: Lanes, const N: usize>(self, _: Range<usize>, _: usize) -> Alike {
        Alike
    }
}

impl<L: Lanes, const N: usize> Weights<L, N> for Alike {
    #[inline(always)]
    fn weigh(&self, _: usize, x: L) -> L {
        x
    }

    #[inline(always)]
    fn total(&self) -> L {
        L::splat(N as f32)
    }

    #[inline(always)]
    fn per_total(&self) -> L {
        L::splat(1.0 / N as f32)
    }

    #[inline(always)]
    fn determinant_min(&self, _: L) -> L {
        L::splat(1.0)
    }
}

/// One importance for each value.
#[derive(Clone, Copy)]
pub(super) struct ByValue<'a>(pub(super) &'a [f32]);

/// Weights of at most 1, side by side.
pub(super) struct Weighted<L, const N: usize> {
    weights: [L; N],
    total: L,
}

impl Importance for ByValue<'_> {
    type Weights<L: Lanes, const N: usize> = Weighted<L, N>;

    #[inline(always)]
    fn weights<L: Lanes, const N: usize>(
        self,
        range: Range<usize>,
        block_len: usize,
    ) -> Weighted<L, N> {
        let importance = &self.0[range];
        let mut weights = side_by_side::<L, N>(importance);
        // The largest of each block, in every lane of the block; the lanes are whole blocks' groups in order.
        let mut largest = weights[0];
        for &w in &weights[1..] {
            largest = largest.max(w);
        }
        let mut largest = largest.store();
        for block in largest.chunks_mut((block_len / N).min(N_LANES)) {
            let max = block.iter().copied().fold(0.0, f32::max);
            block.fill(max);
        }
        let largest = L::load(&largest);
        let (zero, one) = (L::splat(0.0), L::splat(1.0));
        let is_there = L::splat(f32::MIN_POSITIVE);
        let per_largest = one / largest.max(is_there);
        let mut total = zero;
        for w in &mut weights {
            let scaled = (*w * per_largest).max(L::splat(IMPORTANCE_MIN)).min(one);
            *w = is_there.select_lt(largest, scaled, one);
            total = total + *w;
        }
        Weighted { weights, total }
    }
}

impl<L: Lanes, const N: usize> Weights<L, N> for Weighted<L, N> {
    #[inline(always)]
    fn weigh(&self, i: usize, x: L) -> L {
        self.weights[i] * x
    }

    #[inline(always)]
    fn total(&self) -> L {
        self.total
    }

    #[inline(always)]
    fn per_total(&self) -> L {
        L::splat(1.0) / self.total
    }

    /// A part of the product that rounding cannot reach.
    #[inline(always)]
    fn determinant_min(&self, qq: L) -> L {
        (self.total * qq * L::splat(1e-5)).max(L::splat(f32::MIN_POSITIVE))
    }
}
