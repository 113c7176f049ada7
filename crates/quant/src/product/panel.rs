//! Sixteen rows of blocks, unpacked and kept: up to 256 columns of a tile, to be multiplied with many rows of activations.
//!
//! Invariant: word r of every register belongs to row r of the tile, and the bytes of column k are in word register k / 4
//! in the order of the row, whatever the block type.

use super::unpack::Sink;
use crate::lanes::Lanes;
use crate::words::Words;

/// Blocks of 32 in a panel.
pub(super) const N_BLOCKS32: usize = 8;

/// 256 columns of sixteen rows of weights, for K blocks one block, for blocks of 32 up to eight. The fields are told at
/// [`Sink`].
pub(super) struct Panel<W: Words> {
    /// Four columns in each.
    pub(super) bytes: [W; 64],
    pub(super) group_scales: [W; 16],
    pub(super) group_mins: [W; 4],
    pub(super) d: [W::Lanes; N_BLOCKS32],
    pub(super) m: [W::Lanes; N_BLOCKS32],
}

impl<W: Words> Panel<W> {
    #[inline(always)]
    pub(super) fn new() -> Self {
        let (zero, zeros) = (W::splat(0), W::Lanes::splat(0.0));
        Panel {
            bytes: [zero; 64],
            group_scales: [zero; 16],
            group_mins: [zero; 4],
            d: [zeros; N_BLOCKS32],
            m: [zeros; N_BLOCKS32],
        }
    }
}

impl<W: Words> Sink<W> for Panel<W> {
    #[inline(always)]
    fn scales(&mut self, block: usize, d: W::Lanes, m: W::Lanes) {
        (self.d[block], self.m[block]) = (d, m);
    }

    #[inline(always)]
    fn group_scales(&mut self, scales: [W; 16]) {
        self.group_scales = scales;
    }

    #[inline(always)]
    fn group_mins(&mut self, mins: [W; 4]) {
        self.group_mins = mins;
    }

    #[inline(always)]
    fn group<const M: usize>(&mut self, group: usize, words: [W; M]) {
        self.bytes[group * M..][..M].copy_from_slice(&words);
    }
}
