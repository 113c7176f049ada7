//! Sixteen 32-bit words side by side, and work that runs on any instruction set: the vocabulary of the products.
//!
//! Invariant: every operation is exact integer arithmetic on each word by itself (wrapping where it says so), so that
//! all instruction sets agree whatever the order in which they add. Word r belongs to row r of a tile of sixteen rows of
//! weights. What a product does with the words is told in `product/`.

use crate::arch::Rows;
use crate::lanes::Lanes;

/// Sixteen words, each an i32 or four bytes (the first byte lowest).
pub(crate) trait Words: Copy {
    /// The floats beside these words.
    type Lanes: Lanes;

    /// Rows of activations that a kernel holds in registers at once: 1, 2, 4 or 8.
    const N_AT_ONCE: usize;

    /// What [`Words::bytes_i8`] adds to each byte: [`Words::dot_i8`] gives the product of the bytes with this
    /// offset, and the caller starts its sum at minus the offset times the sum of `x`.
    const I8_OFFSET: i32;

    /// All words `x`.
    fn splat(x: i32) -> Self;
    /// Four columns of words: word r of column j is the word at `offset_bytes + 4 j` of row r.
    fn columns<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> [Self; 4];
    /// One column of words.
    fn column<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> Self;
    /// Asks for `n_bytes` from `offset_bytes` on for work that comes soon; beyond the end it does no harm.
    fn prefetch(bytes: &[u8], offset_bytes: usize, n_bytes: usize);
    /// The f16 at `offset_bytes` of each row.
    fn f16_column<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> Self::Lanes;
    fn and(self, b: Self) -> Self;
    fn or(self, b: Self) -> Self;
    /// Shifts each word left.
    fn shl<const N: u32>(self) -> Self;
    /// Shifts each word right; zeros come in.
    fn shr<const N: u32>(self) -> Self;
    /// Shifts each word right; the sign comes in.
    fn sar<const N: u32>(self) -> Self;
    /// Wrapping sum.
    fn add(self, b: Self) -> Self;
    /// Wrapping product.
    fn mul(self, b: Self) -> Self;
    /// `self` plus the four products of the bytes of `w` (0..=127) and the signed bytes of `x` (-127..=127).
    fn dot_u7(self, w: Self, x: i32) -> Self;
    /// Signed bytes as [`Words::dot_i8`] takes them.
    fn bytes_i8(self) -> Self;
    /// As [`Words::dot_u7`] for any signed bytes that went through [`Words::bytes_i8`].
    fn dot_i8(self, w: Self, x: i32) -> Self;
    /// `self` plus the two products of the i16 halves of `w` and of `x`.
    fn dot_pairs(self, w: Self, x: i32) -> Self;
    /// The integer part of the product of a Q6_K block: the sum over its 16 groups of a group's scale times the sum of
    /// `(q - 32) x`. `x` has four columns in each word, the first one lowest, and `minus_32_sums` -32 times the sum of each
    /// group of `x`.
    fn dot_q6_k(block: &[u8; 210], x: &[i32; 64], minus_32_sums: &[i32; 16]) -> i32;
    /// Each byte, which is 0..=15, replaced by that byte of `table`.
    fn look_up(self, table: &[u8; 16]) -> Self;
    /// Each word as the bits of an f32.
    fn as_f32_bits(self) -> Self::Lanes;
    /// Each word, an i32, rounded to the nearest f32, ties to even.
    fn to_f32(self) -> Self::Lanes;
    /// The f16 in the lower half of each word.
    fn f16_low(self) -> Self::Lanes;
    /// The upper half of each word as f16.
    fn f16_high(self) -> Self::Lanes;
}

/// Something to do that is written once and compiled for each instruction set. All that `run` calls must be inlined
/// into it: a function that is not loses the instruction set.
pub(crate) trait Work {
    fn run<W: Words>(self);
}
