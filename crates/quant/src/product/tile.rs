//! Sixteen rows of quantised weights times up to [`N_ROWS`] rows of activations.
//!
//! Invariant: a lane of the result is the product of its own two rows, whatever else is in the tile. A tile walks along its
//! rows panel by panel; each panel is unpacked once and used for all rows of activations.

use super::Matrix;
use super::activations::ActivationRows;
use super::kernel::{Kind, multiply_32, multiply_k_min, multiply_k_signed};
use super::panel::{N_BLOCKS32, Panel};
use crate::BlockType;
use crate::arch::Rows;
use crate::lanes::{Lanes, N_LANES};
use crate::words::Words;

/// Rows of activations that are multiplied with a tile before the next tile is looked at: their blocks of a panel stay in
/// the first cache, and all their blocks in the second.
pub(super) const N_ROWS: usize = 64;

/// The products of a tile: lane r of `[i]` is that of the tile's row r and activation row i.
pub(super) type Sums<W> = [<W as Words>::Lanes; N_ROWS];

/// A block type in which sums are integers.
pub(super) trait Format {
    const BLOCK_TYPE: BlockType;
    /// Blocks in a panel.
    const N_BLOCKS: usize;

    /// Unpacks `n_blocks` blocks of each row, the first of them at `offset_bytes` of `weights`.
    fn unpack<W: Words>(
        panel: &mut Panel<W>,
        n_blocks: usize,
        weights: &[u8],
        offset_bytes: usize,
        stride_bytes: usize,
    );

    /// Adds the products of a panel, whose first block is `block`, and the rows from `first` on.
    fn multiply<W: Words, const N: usize>(
        panel: &Panel<W>,
        block: usize,
        n_blocks: usize,
        x: &ActivationRows<'_>,
        first: usize,
        acc: &mut [W::Lanes; N],
    );
}

/// The products of the tile whose rows begin at `first_row` with the activation rows `first..first + n`, which are at
/// most [`N_ROWS`]. Rows beyond the matrix give lanes without meaning.
#[inline(always)]
pub(super) fn multiply_tile<F: Format, W: Words>(
    w: &Matrix<'_>,
    first_row: usize,
    x: &ActivationRows<'_>,
    first: usize,
    n: usize,
    panel: &mut Panel<W>,
    sums: &mut Sums<W>,
) {
    let block_bytes = F::BLOCK_TYPE.block_bytes();
    let n_blocks = w.n_cols / F::BLOCK_TYPE.block_len();
    let row_bytes = n_blocks * block_bytes;
    let n_rows = (w.n_rows - first_row).min(N_LANES);
    let tile = &w.bytes[first_row * row_bytes..][..n_rows * row_bytes];
    sums[..n].fill(W::Lanes::splat(0.0));
    // Where the matrix ends within the tile, the blocks are copied to a whole one.
    let mut copy = [0; N_LANES * N_BLOCKS32 * BLOCK_BYTES_MAX_32];
    const { assert!(N_BLOCKS32 * BLOCK_BYTES_MAX_32 >= BLOCK_BYTES_MAX_256) };
    let mut block = 0;
    while block < n_blocks {
        let n_here = (n_blocks - block).min(F::N_BLOCKS);
        if n_rows == N_LANES {
            F::unpack(panel, n_here, tile, block * block_bytes, row_bytes);
        } else {
            let n_bytes = n_here * block_bytes;
            for (row, copy) in tile
                .chunks_exact(row_bytes)
                .zip(copy.chunks_exact_mut(n_bytes))
            {
                copy.copy_from_slice(&row[block * block_bytes..][..n_bytes]);
            }
            F::unpack(panel, n_here, &copy, 0, n_bytes);
        }
        let mut i = 0;
        while i < n {
            let (at, sums) = (first + i, &mut sums[i..n]);
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

/// Bytes of the largest block of 32, and of 256.
const BLOCK_BYTES_MAX_32: usize = BlockType::Q8_0.block_bytes();
const BLOCK_BYTES_MAX_256: usize = BlockType::Q6_K.block_bytes();

#[inline(always)]
fn rows_at_once<F: Format, W: Words, const N: usize>(
    panel: &Panel<W>,
    block: usize,
    n_blocks: usize,
    x: &ActivationRows<'_>,
    first: usize,
    sums: &mut [W::Lanes],
) -> usize {
    let (acc, _) = sums
        .split_first_chunk_mut::<N>()
        .expect("the caller has N rows left");
    let mut own = *acc;
    F::multiply(panel, block, n_blocks, x, first, &mut own);
    *acc = own;
    N
}

macro_rules! format_256 {
    ($name:ident, $unpack:ident, $multiply:ident) => {
        #[allow(
            non_camel_case_types,
            reason = "some of GGUF's names are not camel case"
        )]
        pub(super) struct $name;

        impl Format for $name {
            const BLOCK_TYPE: BlockType = BlockType::$name;
            const N_BLOCKS: usize = 1;

            #[inline(always)]
            fn unpack<W: Words>(
                panel: &mut Panel<W>,
                _n_blocks: usize,
                weights: &[u8],
                offset_bytes: usize,
                stride_bytes: usize,
            ) {
                panel.$unpack(&Rows::new(weights, offset_bytes, stride_bytes));
            }

            #[inline(always)]
            fn multiply<W: Words, const N: usize>(
                panel: &Panel<W>,
                block: usize,
                _n_blocks: usize,
                x: &ActivationRows<'_>,
                first: usize,
                acc: &mut [W::Lanes; N],
            ) {
                let blocks = x.blocks256(block);
                $multiply(
                    panel,
                    std::array::from_fn(|r| &blocks[x.row(first + r)]),
                    acc,
                );
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
            fn unpack<W: Words>(
                panel: &mut Panel<W>,
                n_blocks: usize,
                weights: &[u8],
                offset_bytes: usize,
                stride_bytes: usize,
            ) {
                for block in 0..n_blocks {
                    let offset_bytes = offset_bytes + block * Self::BLOCK_TYPE.block_bytes();
                    panel.$unpack(block, &Rows::new(weights, offset_bytes, stride_bytes));
                }
            }

            #[inline(always)]
            fn multiply<W: Words, const N: usize>(
                panel: &Panel<W>,
                block: usize,
                n_blocks: usize,
                x: &ActivationRows<'_>,
                first: usize,
                acc: &mut [W::Lanes; N],
            ) {
                multiply_32(
                    $kind,
                    panel,
                    n_blocks,
                    x.blocks32(block),
                    x.activations.n_rows(),
                    std::array::from_fn(|r| x.row(first + r)),
                    acc,
                );
            }
        }
    };
}

format_256!(Q4_K, unpack_q4_k, multiply_k_min);
format_256!(Q5_K, unpack_q5_k, multiply_k_min);
format_256!(Q6_K, unpack_q6_k, multiply_k_signed);
format_32!(Q4_0, unpack_q4_0, Kind::Plus8);
format_32!(Q4_1, unpack_q4_1, Kind::Minimum);
format_32!(Q5_0, unpack_q5_0, Kind::Plus16);
format_32!(Q8_0, unpack_q8_0, Kind::Signed);
