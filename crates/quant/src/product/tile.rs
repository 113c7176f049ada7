//! Sixteen rows of quantised weights times up to [`N_ROWS`] rows of activations.
//!
//! Invariant: a lane of the result is the product of its own two rows, whatever else is in the tile. A tile walks along its
//! rows panel by panel; each panel is unpacked once and used for all rows of activations.

use std::ops::Range;

use super::Matrix;
use super::activations::ActivationRows;
use super::by_row::multiply_q6_k_by_row;
use super::direct::{Direct32, DirectK};
use super::kernel::{Kind, multiply_32, multiply_k_min, multiply_k_signed};
use super::panel::{N_BLOCKS32, Panel};
use super::unpack::{
    Sink, unpack_mxfp4, unpack_q4_0, unpack_q4_1, unpack_q4_k, unpack_q5_0, unpack_q5_k,
    unpack_q6_k, unpack_q8_0,
};
use crate::BlockType;
use crate::arch::Rows;
use crate::lanes::{Lanes, N_LANES};
use crate::words::Words;

/// Rows of activations that are multiplied with a tile before the next tile is looked at: their blocks of a panel stay in
/// the first cache, and all their blocks in the second.
pub(super) const N_ROWS: usize = 64;

/// The products of a tile: lane r of `[i]` is that of the tile's row r and the ith chosen row.
pub(super) type Sums<W> = [<W as Words>::Lanes; N_ROWS];

/// A block type in which sums are integers.
pub(super) trait Format {
    const BLOCK_TYPE: BlockType;
    /// Blocks in a panel.
    const N_BLOCKS: usize;

    /// Unpacks `n_blocks` blocks of each row.
    fn unpack<W: Words>(sink: &mut impl Sink<W>, n_blocks: usize, blocks: Blocks<'_>);

    /// As [`Format::multiply`], while the blocks are unpacked.
    fn multiply_direct<W: Words, const N: usize>(
        blocks: Blocks<'_>,
        block: usize,
        n_blocks: usize,
        x: &ActivationRows<'_>,
        rows: [usize; N],
        acc: &mut [W::Lanes; N],
    );

    /// Adds the products of a panel, whose first block is `block`, and the rows `rows` of the activations.
    fn multiply<W: Words, const N: usize>(
        panel: &Panel<W>,
        block: usize,
        n_blocks: usize,
        x: &ActivationRows<'_>,
        rows: [usize; N],
        acc: &mut [W::Lanes; N],
    );
}

/// Where blocks of sixteen rows lie: those of row r from `offset_bytes + r * stride_bytes` on.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    bytes: &'a [u8],
    offset_bytes: usize,
    stride_bytes: usize,
    /// As many bytes of the next tile.
    ahead: Ahead<'a>,
}

/// Bytes that will be needed soon. A sink asks for a few of them with each group, because the CPU can wait for some lines
/// of its cache at once and forgets what it is asked for beyond. So each line is asked for twice, at different times.
#[derive(Clone, Copy)]
pub(super) struct Ahead<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// How far ahead of the second time a line is asked for the first time.
const EARLIER_BYTES: usize = 8 << 10;

impl Ahead<'_> {
    /// Asks for the next `n_bytes`.
    #[inline(always)]
    pub(super) fn ask<W: Words>(&mut self, n_bytes: usize) {
        W::prefetch(self.bytes, self.at + EARLIER_BYTES, n_bytes);
        W::prefetch(self.bytes, self.at, n_bytes);
        self.at += n_bytes;
    }
}

impl<'a> Blocks<'a> {
    /// The bytes of one of the sixteen rows.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, range: Range<usize>) -> &'a [u8] {
        let first = self.offset_bytes + row * self.stride_bytes;
        &self.bytes[first..][range]
    }

    /// A block of each row.
    #[inline(always)]
    pub(super) fn rows<const BYTES: usize>(&self, offset_bytes: usize) -> Rows<'a, BYTES> {
        Rows::new(
            self.bytes,
            self.offset_bytes + offset_bytes,
            self.stride_bytes,
        )
    }
}

/// Sixteen rows of a matrix, or those that are left at its end.
struct Tile<'a> {
    bytes: &'a [u8],
    n_rows: usize,
    row_bytes: usize,
    /// What follows the tile.
    after: &'a [u8],
    /// Room for the blocks of a tile that is not whole.
    copy: &'a mut Copy,
}

/// Blocks of sixteen rows for one panel.
pub(super) type Copy = [u8; N_LANES * PANEL_BYTES_MAX];
pub(super) const NO_COPY: Copy = [0; N_LANES * PANEL_BYTES_MAX];
const PANEL_BYTES_MAX: usize = N_BLOCKS32 * BlockType::Q8_0.block_bytes();
const _: () = assert!(PANEL_BYTES_MAX >= BlockType::Q6_K.block_bytes());

impl Tile<'_> {
    /// The blocks in `range` of bytes of each row. The next tile begins where this one ends; it is asked for in the order
    /// of memory.
    #[inline(always)]
    fn blocks(&mut self, range: Range<usize>) -> Blocks<'_> {
        let ahead = Ahead {
            bytes: self.after,
            at: N_LANES * range.start,
        };
        if self.n_rows == N_LANES {
            return Blocks {
                bytes: self.bytes,
                offset_bytes: range.start,
                stride_bytes: self.row_bytes,
                ahead,
            };
        }
        let stride_bytes = range.len();
        let rows = self.bytes.chunks_exact(self.row_bytes);
        for (row, copy) in rows.zip(self.copy.chunks_exact_mut(stride_bytes)) {
            copy.copy_from_slice(&row[range.clone()]);
        }
        Blocks {
            bytes: self.copy,
            offset_bytes: 0,
            stride_bytes,
            ahead,
        }
    }
}

/// The products of the tile whose rows begin at `first_row` with the activation rows `chosen`, which are at most
/// [`N_ROWS`]. Rows beyond the matrix give lanes without meaning.
#[inline(always)]
pub(super) fn multiply_tile<F: Format, W: Words>(
    w: &Matrix<'_>,
    first_row: usize,
    x: &ActivationRows<'_>,
    chosen: Range<usize>,
    panel: &mut Panel<W>,
    copy: &mut Copy,
    sums: &mut Sums<W>,
) {
    let row_bytes = w.n_cols / F::BLOCK_TYPE.block_len() * F::BLOCK_TYPE.block_bytes();
    let n_rows = (w.n_rows - first_row).min(N_LANES);
    let (bytes, after) = w.bytes[first_row * row_bytes..].split_at(n_rows * row_bytes);
    let tile = Tile {
        bytes,
        n_rows,
        row_bytes,
        after,
        copy,
    };
    match chosen.len() {
        1 if F::BLOCK_TYPE == BlockType::Q6_K && n_rows == N_LANES => {
            multiply_by_row::<W>(tile, x, chosen.start, sums);
        }
        1 => multiply_direct::<F, W, 1>(tile, x, chosen, sums),
        2 if W::N_AT_ONCE >= 2 => multiply_direct::<F, W, 2>(tile, x, chosen, sums),
        3..=4 if W::N_AT_ONCE >= 4 => multiply_direct::<F, W, 4>(tile, x, chosen, sums),
        5..=8 if W::N_AT_ONCE >= 8 => multiply_direct::<F, W, 8>(tile, x, chosen, sums),
        _ => multiply_panels::<F, W>(tile, x, chosen, panel, sums),
    }
}

/// One row of activations, row after row of a whole tile of Q6_K.
#[inline(always)]
fn multiply_by_row<W: Words>(
    mut tile: Tile<'_>,
    x: &ActivationRows<'_>,
    chosen: usize,
    sums: &mut Sums<W>,
) {
    let n_blocks = tile.row_bytes / BlockType::Q6_K.block_bytes();
    let blocks = tile.blocks(0..tile.row_bytes);
    sums[0] = multiply_q6_k_by_row::<W>(blocks, n_blocks, x, x.row(chosen));
}

/// At most `N` rows of activations: the blocks are multiplied while they are unpacked.
#[inline(always)]
fn multiply_direct<F: Format, W: Words, const N: usize>(
    mut tile: Tile<'_>,
    x: &ActivationRows<'_>,
    chosen: Range<usize>,
    sums: &mut Sums<W>,
) {
    // The last row stands for those that are not there.
    let mut rows = [0; N];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = x.row((chosen.start + r).min(chosen.end - 1));
    }
    let mut acc = [W::Lanes::splat(0.0); N];
    let block_bytes = F::BLOCK_TYPE.block_bytes();
    let n_blocks = tile.row_bytes / block_bytes;
    let mut block = 0;
    while block < n_blocks {
        let n_here = (n_blocks - block).min(F::N_BLOCKS);
        let blocks = tile.blocks(block * block_bytes..(block + n_here) * block_bytes);
        F::multiply_direct::<W, N>(blocks, block, n_here, x, rows, &mut acc);
        block += n_here;
    }
    let n = chosen.len();
    sums[..n].copy_from_slice(&acc[..n]);
}

/// Any number of rows of activations: each panel is unpacked and then multiplied with all of them.
#[inline(always)]
fn multiply_panels<F: Format, W: Words>(
    mut tile: Tile<'_>,
    x: &ActivationRows<'_>,
    chosen: Range<usize>,
    panel: &mut Panel<W>,
    sums: &mut Sums<W>,
) {
    let n = chosen.len();
    sums[..n].fill(W::Lanes::splat(0.0));
    let block_bytes = F::BLOCK_TYPE.block_bytes();
    let n_blocks = tile.row_bytes / block_bytes;
    let mut block = 0;
    while block < n_blocks {
        let n_here = (n_blocks - block).min(F::N_BLOCKS);
        let blocks = tile.blocks(block * block_bytes..(block + n_here) * block_bytes);
        F::unpack(panel, n_here, blocks);
        let mut i = 0;
        while i < n {
            let (at, sums) = (chosen.start + i, &mut sums[i..n]);
            i += if W::N_AT_ONCE >= 8 && sums.len() >= 8 {
                rows_at_once::<F, W, 8>(panel, block, n_here, x, at, sums)
            } else if W::N_AT_ONCE >= 4 && sums.len() >= 4 {
                rows_at_once::<F, W, 4>(panel, block, n_here, x, at, sums)
            } else if W::N_AT_ONCE >= 2 && sums.len() >= 2 {
                rows_at_once::<F, W, 2>(panel, block, n_here, x, at, sums)
            } else {
                rows_at_once::<F, W, 1>(panel, block, n_here, x, at, sums)
            };
        }
        block += n_here;
    }
}

#[inline(always)]
fn rows_at_once<F: Format, W: Words, const N: usize>(
    panel: &Panel<W>,
    block: usize,
    n_blocks: usize,
    x: &ActivationRows<'_>,
    first: usize,
    sums: &mut [W::Lanes],
) -> usize {
    let mut rows = [0; N];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = x.row(first + r);
    }
    let sums = sums.first_chunk_mut::<N>();
    let sums = sums.expect("the caller has N rows left");
    let mut acc = *sums;
    F::multiply(panel, block, n_blocks, x, rows, &mut acc);
    *sums = acc;
    N
}

/// The blocks of these rows.
#[inline(always)]
pub(super) fn pick<B, const N: usize>(blocks: &[B], rows: [usize; N]) -> [&B; N] {
    let mut picked = [&blocks[rows[0]]; N];
    for r in 1..N {
        picked[r] = &blocks[rows[r]];
    }
    picked
}

macro_rules! format_256 {
    ($name:ident, $unpack:ident, $multiply:ident, $minima:literal) => {
        #[allow(
            non_camel_case_types,
            reason = "some of GGUF's names are not camel case"
        )]
        pub(super) struct $name;

        impl Format for $name {
            const BLOCK_TYPE: BlockType = BlockType::$name;
            const N_BLOCKS: usize = 1;

            #[inline(always)]
            fn unpack<W: Words>(sink: &mut impl Sink<W>, _n_blocks: usize, blocks: Blocks<'_>) {
                $unpack(&blocks.rows(0), sink);
            }

            #[inline(always)]
            fn multiply<W: Words, const N: usize>(
                panel: &Panel<W>,
                block: usize,
                _n_blocks: usize,
                x: &ActivationRows<'_>,
                rows: [usize; N],
                acc: &mut [W::Lanes; N],
            ) {
                $multiply(panel, pick(x.blocks256(block), rows), acc);
            }

            #[inline(always)]
            fn multiply_direct<W: Words, const N: usize>(
                blocks: Blocks<'_>,
                block: usize,
                n_blocks: usize,
                x: &ActivationRows<'_>,
                rows: [usize; N],
                acc: &mut [W::Lanes; N],
            ) {
                let x = pick(x.blocks256(block), rows);
                let mut direct = DirectK::<W, N, $minima>::new(
                    x,
                    blocks.ahead,
                    N_LANES * Self::BLOCK_TYPE.block_bytes(),
                );
                Self::unpack(&mut direct, n_blocks, blocks);
                direct.end(acc);
            }
        }
    };
}

macro_rules! format_32 {
    ($name:ident, $unpack:ident, $kind:expr) => {
        #[allow(
            non_camel_case_types,
            reason = "some of GGUF's names are not camel case"
        )]
        pub(super) struct $name;

        impl Format for $name {
            const BLOCK_TYPE: BlockType = BlockType::$name;
            const N_BLOCKS: usize = N_BLOCKS32;

            #[inline(always)]
            fn unpack<W: Words>(sink: &mut impl Sink<W>, n_blocks: usize, blocks: Blocks<'_>) {
                for block in 0..n_blocks {
                    let offset_bytes = block * Self::BLOCK_TYPE.block_bytes();
                    $unpack(&blocks.rows(offset_bytes), block, sink);
                }
            }

            #[inline(always)]
            fn multiply<W: Words, const N: usize>(
                panel: &Panel<W>,
                block: usize,
                n_blocks: usize,
                x: &ActivationRows<'_>,
                rows: [usize; N],
                acc: &mut [W::Lanes; N],
            ) {
                multiply_32(
                    $kind,
                    panel,
                    n_blocks,
                    x.blocks32(block),
                    x.activations.n_rows(),
                    rows,
                    acc,
                );
            }

            #[inline(always)]
            fn multiply_direct<W: Words, const N: usize>(
                blocks: Blocks<'_>,
                block: usize,
                n_blocks: usize,
                x: &ActivationRows<'_>,
                rows: [usize; N],
                acc: &mut [W::Lanes; N],
            ) {
                let mut direct = Direct32 {
                    ahead: blocks.ahead,
                    ahead_bytes: N_LANES * Self::BLOCK_TYPE.block_bytes(),
                    kind: $kind,
                    x: x.blocks32(block),
                    x_stride: x.activations.n_rows(),
                    rows,
                    d: W::Lanes::splat(0.0),
                    m: W::Lanes::splat(0.0),
                    acc: *acc,
                };
                Self::unpack::<W>(&mut direct, n_blocks, blocks);
                *acc = direct.acc;
            }
        }
    };
}

format_256!(Q4_K, unpack_q4_k, multiply_k_min, true);
format_256!(Q5_K, unpack_q5_k, multiply_k_min, true);
format_256!(Q6_K, unpack_q6_k, multiply_k_signed, false);
format_32!(Q4_0, unpack_q4_0, Kind::Plus8);
format_32!(Q4_1, unpack_q4_1, Kind::Minimum);
format_32!(Q5_0, unpack_q5_0, Kind::Plus16);
format_32!(MXFP4, unpack_mxfp4, Kind::Plus12);
format_32!(Q8_0, unpack_q8_0, Kind::Signed);
