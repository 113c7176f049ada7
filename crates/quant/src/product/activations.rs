//! Activations as the products take them: rows of f32, and the same rows as blocks of 8-bit integers.
//!
//! Invariant: the blocks of a row depend on this row alone, and are the same on every instruction set. A block of LEN
//! values (32 beside weights in blocks of 32, 256 beside K blocks) is
//!
//! ```text
//! scale = max |x| / 127                     rounded to f32
//! q     = x * (127 / max |x|)               rounded to f32 twice, then to the nearest integer, ties to even
//! ```
//!
//! Where max |x| is under 1e-30 the block is zeros. Where a value is NaN or infinite the scale is NaN and every q is 0, so
//! that each product of the row is NaN. Left out: which thread does it.

use crate::BlockType;
use crate::isa::{self, Isa};
use crate::lanes::{Lanes, N_LANES};
use crate::words::{Words, Work};

/// Rows of activations, prepared once and multiplied with many matrices. Its buffers are kept between calls of
/// [`Activations::fill`], so that a warm one allocates nothing.
#[derive(Debug, Default)]
pub struct Activations {
    n_rows: usize,
    n_cols: usize,
    forms: Forms,
    /// (n_rows, n_cols rounded up to whole lanes), row-major; zeros beyond n_cols.
    values: Vec<f32>,
    /// (n_cols / 32, n_rows): the rows' blocks of the same columns lie side by side.
    blocks32: Vec<Block32>,
    /// (n_cols / 256, n_rows), likewise.
    blocks256: Vec<Block256>,
}

/// Which forms of the rows are filled.
#[derive(Clone, Copy, Debug, Default)]
struct Forms {
    values: bool,
    blocks32: bool,
    blocks256: bool,
}

/// 32 activations.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block32 {
    /// Four q in each word, the first one lowest.
    pub(crate) q: [i32; 8],
    pub(crate) scale: f32,
    /// The sum of q.
    pub(crate) sum: i32,
    /// -8, -16 and -128 times the sum: where a product begins whose weights have this offset.
    pub(crate) minus_sums: [i32; 3],
}

/// 256 activations.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block256 {
    /// Four q in each word, the first one lowest.
    pub(crate) q: [i32; 64],
    /// -32 times the sum of each 16 q.
    pub(crate) minus_32_sums16: [i32; 16],
    /// The sums of each 32 q, as pairs of i16, the first one lowest.
    pub(crate) sums32: [i32; 4],
    pub(crate) scale: f32,
}

/// Some rows of [`Activations`], in an order.
#[derive(Clone, Copy, Debug)]
pub struct ActivationRows<'a> {
    pub(crate) activations: &'a Activations,
    picked: Option<&'a [u32]>,
}

impl Activations {
    /// No rows.
    pub fn new() -> Self {
        Activations::default()
    }

    /// Takes the rows `x`, (n, `n_cols`) row-major, in the forms that products with these block types need. What was
    /// there before is gone. Allocates only to hold more than ever before.
    ///
    /// # Panics
    /// When `x` is no whole number of rows, or a row no whole number of a type's blocks.
    pub fn fill(&mut self, x: &[f32], n_cols: usize, block_types: &[BlockType]) {
        self.fill_with(isa::fastest(), x, n_cols, block_types);
    }

    /// [`Activations::fill`] on a chosen instruction set, for tests and benches.
    ///
    /// # Panics
    /// As [`Activations::fill`], and when this CPU lacks `isa`.
    pub fn fill_with(&mut self, isa: Isa, x: &[f32], n_cols: usize, block_types: &[BlockType]) {
        for part in self.parts(x, n_cols, block_types, 1) {
            part.fill_with(isa);
        }
    }

    /// [`Activations::fill`] in about `n_parts` parts, for as many threads: when each is filled, the rows are there.
    ///
    /// # Panics
    /// As [`Activations::fill`], and when `n_parts` is 0.
    pub fn parts<'a>(
        &'a mut self,
        x: &'a [f32],
        n_cols: usize,
        block_types: &[BlockType],
        n_parts: usize,
    ) -> impl Iterator<Item = ActivationsPart<'a>> {
        self.begin(x, n_cols, block_types);
        let (n_rows, n_padded, forms) = (self.n_rows, self.padded_cols(), self.forms);
        let wanted = |is_wanted: bool, n: usize| if is_wanted { n } else { 0 };
        // Rows of values lie one after the other, and so do the blocks of the same columns.
        let n_values = wanted(forms.values, n_rows);
        let n_blocks32 = wanted(forms.blocks32, n_cols / 32);
        let n_blocks256 = wanted(forms.blocks256, n_cols / 256);
        let mut values = &mut self.values[..n_values * n_padded];
        let mut blocks32 = &mut self.blocks32[..n_blocks32 * n_rows];
        let mut blocks256 = &mut self.blocks256[..n_blocks256 * n_rows];
        let share = move |n: usize, i: usize| n * i / n_parts..n * (i + 1) / n_parts;
        (0..n_parts).map(move |i| {
            let (rows, of_32, of_256) = (
                share(n_values, i),
                share(n_blocks32, i),
                share(n_blocks256, i),
            );
            ActivationsPart {
                x,
                n_rows,
                n_cols,
                first_row: rows.start,
                values: take(&mut values, rows.len() * n_padded),
                first_block32: of_32.start,
                blocks32: take(&mut blocks32, of_32.len() * n_rows),
                first_block256: of_256.start,
                blocks256: take(&mut blocks256, of_256.len() * n_rows),
            }
        })
    }

    /// Makes room for the rows `x`.
    fn begin(&mut self, x: &[f32], n_cols: usize, block_types: &[BlockType]) {
        assert!(
            n_cols > 0 && x.len().is_multiple_of(n_cols),
            "{} activations are no whole number of rows of {n_cols}",
            x.len()
        );
        let mut forms = Forms::default();
        for block_type in block_types {
            let len = block_type.block_len();
            assert!(
                n_cols.is_multiple_of(len),
                "{n_cols} activations are no whole number of {block_type} blocks"
            );
            match len {
                1 => forms.values = true,
                32 => forms.blocks32 = true,
                _ => forms.blocks256 = true,
            }
        }
        (self.n_rows, self.n_cols, self.forms) = (x.len() / n_cols, n_cols, forms);
        let sizes = [
            (forms.values, self.n_rows * self.padded_cols()),
            (forms.blocks32, self.n_rows * (n_cols / 32)),
            (forms.blocks256, self.n_rows * (n_cols / 256)),
        ];
        grow(&mut self.values, sizes[0], 0.0);
        grow(&mut self.blocks32, sizes[1], Block32::ZERO);
        grow(&mut self.blocks256, sizes[2], Block256::ZERO);
    }

    /// Rows that are there.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Values in a row.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Every row.
    pub fn all(&self) -> ActivationRows<'_> {
        ActivationRows {
            activations: self,
            picked: None,
        }
    }

    /// The rows with these numbers, in this order; a number may come twice.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn pick<'a>(&'a self, rows: &'a [u32]) -> ActivationRows<'a> {
        for &row in rows {
            assert!(
                (row as usize) < self.n_rows,
                "row {row} is beyond {} rows of activations",
                self.n_rows
            );
        }
        ActivationRows {
            activations: self,
            picked: Some(rows),
        }
    }

    /// Values from one row of `values` to the next.
    #[inline(always)]
    fn padded_cols(&self) -> usize {
        self.n_cols.next_multiple_of(N_LANES)
    }
}

impl ActivationRows<'_> {
    /// Rows in this choice.
    #[inline]
    pub fn n_rows(&self) -> usize {
        self.picked.map_or(self.activations.n_rows, <[u32]>::len)
    }

    /// Values in a row.
    #[inline]
    pub fn n_cols(&self) -> usize {
        self.activations.n_cols
    }

    /// Which row of the activations the `i`th row of this choice is.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> usize {
        self.picked.map_or(i, |rows| rows[i] as usize)
    }

    /// The f32 of the `i`th row in whole lanes.
    #[inline(always)]
    pub(crate) fn values(&self, i: usize) -> &[[f32; N_LANES]] {
        let n = self.activations.padded_cols();
        self.activations.values[self.row(i) * n..][..n]
            .as_chunks()
            .0
    }

    /// The blocks of 32 of all rows of the activations from block `block` on: `[i * n_rows + row]`.
    #[inline(always)]
    pub(crate) fn blocks32(&self, block: usize) -> &[Block32] {
        &self.activations.blocks32[block * self.activations.n_rows..]
    }

    /// Block `block` of 256 of all rows of the activations.
    #[inline(always)]
    pub(crate) fn blocks256(&self, block: usize) -> &[Block256] {
        let n = self.activations.n_rows;
        &self.activations.blocks256[block * n..][..n]
    }

    /// Panics when the form that `block_type` needs was not asked for.
    pub(crate) fn assert_filled_for(&self, block_type: BlockType) {
        let forms = self.activations.forms;
        let is_filled = match block_type.block_len() {
            1 => forms.values,
            32 => forms.blocks32,
            _ => forms.blocks256,
        };
        assert!(
            is_filled,
            "the activations were not prepared for {block_type} weights"
        );
    }
}

/// Makes room for `n` values if they are `wanted`. It never shrinks, so that what is beyond is of no meaning.
fn grow<T: Clone>(values: &mut Vec<T>, (wanted, n): (bool, usize), zero: T) {
    if wanted && values.len() < n {
        values.resize(n, zero);
    }
}

impl Block32 {
    const ZERO: Block32 = Block32 {
        q: [0; 8],
        scale: 0.0,
        sum: 0,
        minus_sums: [0; 3],
    };
}

impl Block256 {
    const ZERO: Block256 = Block256 {
        q: [0; 64],
        minus_32_sums16: [0; 16],
        sums32: [0; 4],
        scale: 0.0,
    };
}

/// Some of the values or blocks of [`Activations`] that are being filled.
#[derive(Debug)]
pub struct ActivationsPart<'a> {
    x: &'a [f32],
    n_rows: usize,
    n_cols: usize,
    first_row: usize,
    /// Whole rows, padded.
    values: &'a mut [f32],
    first_block32: usize,
    /// Of all rows, block by block.
    blocks32: &'a mut [Block32],
    first_block256: usize,
    blocks256: &'a mut [Block256],
}

impl ActivationsPart<'_> {
    /// Fills them. Allocates nothing.
    pub fn fill(self) {
        self.fill_with(isa::fastest());
    }

    fn fill_with(self, isa: Isa) {
        isa::run_lanes(isa, self);
    }
}

impl Work for ActivationsPart<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        let n_cols = self.n_cols;
        let rows = self.x[self.first_row * n_cols..].chunks_exact(n_cols);
        let padded = self
            .values
            .chunks_exact_mut(n_cols.next_multiple_of(N_LANES));
        for (values, x) in padded.zip(rows) {
            values[..n_cols].copy_from_slice(x);
            values[n_cols..].fill(0.0);
        }
        let blocks = self.blocks32.chunks_exact_mut(self.n_rows.max(1));
        for (i, blocks) in blocks.enumerate() {
            for (block, x) in blocks.iter_mut().zip(self.x.chunks_exact(n_cols)) {
                fill_block32::<W::Lanes>(&x.as_chunks().0[self.first_block32 + i], block);
            }
        }
        let blocks = self.blocks256.chunks_exact_mut(self.n_rows.max(1));
        for (i, blocks) in blocks.enumerate() {
            for (block, x) in blocks.iter_mut().zip(self.x.chunks_exact(n_cols)) {
                fill_block256::<W::Lanes>(&x.as_chunks().0[self.first_block256 + i], block);
            }
        }
    }
}

/// The first `n` of `rest`, which gets shorter.
fn take<'a, T>(rest: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    rest.split_off_mut(..n).expect("the shares add up")
}

#[inline(always)]
fn fill_block32<L: Lanes>(x: &[f32; 32], block: &mut Block32) {
    let (inverse, scale) = scale_of(x);
    let sums = quantise::<L>(x, inverse, &mut block.q);
    let sum: i32 = sums[..2].iter().sum();
    block.scale = scale;
    block.sum = sum;
    block.minus_sums = [-8 * sum, -16 * sum, -128 * sum];
}

#[inline(always)]
fn fill_block256<L: Lanes>(x: &[f32; 256], block: &mut Block256) {
    let (inverse, scale) = scale_of(x);
    let sums = quantise::<L>(x, inverse, &mut block.q);
    block.scale = scale;
    block.minus_32_sums16 = sums.map(|sum| -32 * sum);
    for (i, pair) in block.sums32.iter_mut().enumerate() {
        let (low, high) = (
            sums[4 * i] + sums[4 * i + 1],
            sums[4 * i + 2] + sums[4 * i + 3],
        );
        *pair = low & 0xffff | high << 16;
    }
}

/// What turns a value into its integer, and what turns it back.
#[inline(always)]
fn scale_of(x: &[f32]) -> (f32, f32) {
    // Magnitudes are in the order of their bits, NaN and infinity above all numbers.
    let bits = x
        .iter()
        .fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff));
    let max = f32::from_bits(bits);
    if !max.is_finite() {
        (0.0, f32::NAN)
    } else if max < 1e-30 {
        (0.0, 0.0)
    } else {
        (127.0 / max, max / 127.0)
    }
}

/// The integers of `x`, packed, and the sum of each 16 of them.
#[inline(always)]
fn quantise<L: Lanes>(x: &[f32], inverse: f32, q: &mut [i32]) -> [i32; 16] {
    let mut sums = [0; 16];
    if inverse == 0.0 {
        q.fill(0);
        return sums;
    }
    let inverse = L::splat(inverse);
    for ((x, q), sum) in x
        .as_chunks::<N_LANES>()
        .0
        .iter()
        .zip(q.as_chunks_mut::<4>().0)
        .zip(&mut sums)
    {
        let bytes = (L::load(x) * inverse).round().to_i8();
        *q = std::array::from_fn(|i| {
            i32::from_le_bytes(std::array::from_fn(|k| bytes[4 * i + k] as u8))
        });
        *sum = bytes.iter().map(|&q| i32::from(q)).sum();
    }
    sums
}
