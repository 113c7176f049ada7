//! Sixteen rows of blocks times a few rows of activations, multiplied while they are unpacked.
//!
//! Invariant: the bits are those of `kernel.rs`, which tells the steps; what is saved is the way through memory.

#![expect(
    clippy::needless_range_loop,
    reason = "registers are named by their place, often in several arrays"
)]

use super::activations::{Block32, Block256};
use super::kernel::{Kind, begin_32, end_32, end_k};
use super::tile::Ahead;
use super::unpack::Sink;
use crate::arch::CACHE_LINE;
use crate::lanes::Lanes;
use crate::words::Words;

/// A K block. With `MINIMA` Q4_K or Q5_K, else Q6_K.
pub(super) struct DirectK<'a, W: Words, const N: usize, const MINIMA: bool> {
    x: [&'a Block256; N],
    ahead: Ahead<'a>,
    ahead_bytes: usize,
    d: W::Lanes,
    m: W::Lanes,
    group_scales: [W; 16],
    total: [W; N],
    below: [W; N],
}

impl<'a, W: Words, const N: usize, const MINIMA: bool> DirectK<'a, W, N, MINIMA> {
    /// `ahead_bytes` will be needed while the next such block is multiplied.
    #[inline(always)]
    pub(super) fn new(x: [&'a Block256; N], ahead: Ahead<'a>, ahead_bytes: usize) -> Self {
        let (zero, zeros) = (W::splat(0), W::Lanes::splat(0.0));
        DirectK {
            x,
            ahead,
            ahead_bytes,
            d: zeros,
            m: zeros,
            group_scales: [zero; 16],
            total: [zero; N],
            below: [zero; N],
        }
    }

    /// Adds the block to the sums.
    #[inline(always)]
    pub(super) fn end(self, acc: &mut [W::Lanes; N]) {
        for r in 0..N {
            let m = MINIMA.then_some((self.m, self.below[r]));
            acc[r] = end_k(self.d, self.total[r], m, self.x[r].scale, acc[r]);
        }
    }
}

impl<W: Words, const N: usize, const MINIMA: bool> Sink<W> for DirectK<'_, W, N, MINIMA> {
    #[inline(always)]
    fn scales(&mut self, _block: usize, d: W::Lanes, m: W::Lanes) {
        (self.d, self.m) = (d, m);
    }

    #[inline(always)]
    fn group_scales(&mut self, scales: [W; 16]) {
        self.group_scales = scales;
    }

    #[inline(always)]
    fn group_mins(&mut self, mins: [W; 4]) {
        for i in 0..4 {
            for r in 0..N {
                self.below[r] = self.below[r].dot_pairs(mins[i], self.x[r].sums32[i]);
            }
        }
    }

    #[inline(always)]
    fn group<const M: usize>(&mut self, group: usize, words: [W; M]) {
        // The groups share the lines, so that none is asked for twice.
        let n_groups = 64 / M;
        let n_lines = self.ahead_bytes.div_ceil(CACHE_LINE);
        let n_here = n_lines * (group + 1) / n_groups - n_lines * group / n_groups;
        self.ahead.ask::<W>(n_here * CACHE_LINE);
        for r in 0..N {
            let x = self.x[r];
            let mut sum = match MINIMA {
                true => W::splat(0),
                false => W::splat(x.minus_32_sums16[group]),
            };
            if N == 1 {
                // Two chains, because the CPU would wait for the last sum of one.
                let mut more = W::splat(0);
                for i in 0..M / 2 {
                    sum = sum.dot_u7(words[i], x.q[group * M + i]);
                    more = more.dot_u7(words[M / 2 + i], x.q[group * M + M / 2 + i]);
                }
                sum = sum.add(more);
            } else {
                for i in 0..M {
                    sum = sum.dot_u7(words[i], x.q[group * M + i]);
                }
            }
            self.total[r] = self.total[r].add(sum.mul(self.group_scales[group]));
        }
    }
}

/// Blocks of 32, one after the other; `x[i * x_stride + rows[r]]` is block i of row r.
pub(super) struct Direct32<'a, W: Words, const N: usize> {
    pub(super) kind: Kind,
    pub(super) x: &'a [Block32],
    pub(super) x_stride: usize,
    pub(super) rows: [usize; N],
    pub(super) ahead: Ahead<'a>,
    /// What will be needed while the next such block is multiplied.
    pub(super) ahead_bytes: usize,
    pub(super) d: W::Lanes,
    pub(super) m: W::Lanes,
    pub(super) acc: [W::Lanes; N],
}

impl<W: Words, const N: usize> Sink<W> for Direct32<'_, W, N> {
    #[inline(always)]
    fn scales(&mut self, _block: usize, d: W::Lanes, m: W::Lanes) {
        (self.d, self.m) = (d, m);
    }

    #[inline(always)]
    fn group_scales(&mut self, _scales: [W; 16]) {}

    #[inline(always)]
    fn group_mins(&mut self, _mins: [W; 4]) {}

    #[inline(always)]
    fn group<const M: usize>(&mut self, group: usize, words: [W; M]) {
        self.ahead.ask::<W>(self.ahead_bytes);
        for r in 0..N {
            let x = &self.x[group * self.x_stride + self.rows[r]];
            let mut sum = begin_32::<W>(self.kind, x);
            for i in 0..M {
                sum = match self.kind {
                    Kind::Signed => sum.dot_i8(words[i], x.q[i]),
                    _ => sum.dot_u7(words[i], x.q[i]),
                };
            }
            self.acc[r] = end_32(self.kind, self.d, self.m, sum, x, self.acc[r]);
        }
    }
}
