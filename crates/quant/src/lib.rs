//! Rows of weights as GGUF blocks: [`encode()`] finds the blocks, [`decode()`] gives the weights back, [`multiply`] takes
//! them as they lie and multiplies them with rows of activations.
//!
//! Invariant: a result depends on the values alone. Every instruction set gives identical bytes, a block never
//! depends on its neighbours, and decoding is bit for bit what GGUF's reference decoder does. Encoding aims at the
//! least squared error of the decoded values, each as important as the caller says; its bytes are not the reference encoder's.
//!
//! Read in this order: [`BlockType`] (names and sizes), `decode.rs` (what the bytes mean), `encode/fit.rs` (how a
//! group of weights finds its scale), `lanes.rs` and `arch/` (sixteen groups at once on each CPU), `product/` (what a
//! product is, to the bit), `words.rs` (sixteen rows at once), `elementwise.rs`, `delta.rs` (a recurrent state), `narrow.rs` (the 8-bit and 4-bit
//! numbers of checkpoints), `mxfp4.rs` (4-bit floats in GGUF).
//!
//! Left out: threads (the caller splits rows), where importances come from, and checks for NaN and infinity, which belong to
//! whoever reads a checkpoint. Such values never cause a panic here: in integer blocks a NaN counts as 0 and values
//! beyond ±1e9 count as ±1e9.

mod arch;
mod block_type;
mod decode;
mod delta;
mod elementwise;
mod encode;
mod isa;
mod lanes;
mod mxfp4;
mod narrow;
mod product;
mod words;

pub use block_type::{BlockType, UnknownBlockType};
pub use delta::{DeltaRow, SLAB, delta_rule, delta_rule_with};
pub use elementwise::{
    exp_in_place, exp_in_place_with, gate_in_place, gate_in_place_with, gelu_tanh_in_place,
    gelu_tanh_in_place_with, silu_in_place, silu_in_place_with, softmax_in_place,
    softmax_in_place_with, sum_of_squares, sum_of_squares_with,
};
pub use isa::{Isa, isas};
pub use mxfp4::repack_mxfp4;
pub use narrow::{Narrow, dequantize, dequantize_with, round_to_bf16};
pub use product::{
    ActivationRows, Activations, ActivationsPart, Columns, GateActivation, Matrix, accumulate_rows,
    accumulate_rows_with, multiply, multiply_gated, multiply_gated_with, multiply_with,
};

use words::{Words, Work};

/// Encodes `values` (whole blocks, usually a row or some rows) into `blocks`, little-endian, on the fastest
/// instruction set of this CPU. Allocates nothing.
///
/// # Panics
/// When `values` is no whole number of blocks or `blocks` is not exactly [`BlockType::row_bytes`] long.
pub fn encode(block_type: BlockType, values: &[f32], blocks: &mut [u8]) {
    encode_with(isa::fastest(), block_type, values, blocks);
}

/// Decodes `blocks` into `values`: the inverse of [`encode()`] in shape, exact to GGUF's definition. Allocates nothing.
///
/// # Panics
/// When `values` is no whole number of blocks or `blocks` is not exactly [`BlockType::row_bytes`] long.
pub fn decode(block_type: BlockType, blocks: &[u8], values: &mut [f32]) {
    decode_with(isa::fastest(), block_type, blocks, values);
}

/// As [`encode()`], where the squared error of each value costs its `importance`, such as the mean square of the
/// activations that a column of weights meets: what is small is the sum of `importance * (value - decoded)²` over each
/// block, and it is never more than that of [`encode()`]. Only ratios within a block matter; an importance that is zero,
/// negative or NaN counts as next to nothing. Allocates nothing.
///
/// Types in which there is nothing to weigh (floats, [`BlockType::Q8_0`], [`BlockType::MXFP4`]) are encoded as by [`encode()`].
///
/// # Panics
/// As [`encode()`], and when `importance` has not one number for each value.
pub fn encode_weighted(
    block_type: BlockType,
    values: &[f32],
    importance: &[f32],
    blocks: &mut [u8],
) {
    encode_weighted_with(isa::fastest(), block_type, values, importance, blocks);
}

/// [`encode()`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`encode()`], and when this CPU lacks `isa`.
pub fn encode_with(isa: Isa, block_type: BlockType, values: &[f32], blocks: &mut [u8]) {
    assert_sizes(block_type, values.len(), blocks.len());
    isa::run_lanes(isa, Encode(block_type, values, blocks));
}

/// [`encode_weighted`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`encode_weighted`], and when this CPU lacks `isa`.
pub fn encode_weighted_with(
    isa: Isa,
    block_type: BlockType,
    values: &[f32],
    importance: &[f32],
    blocks: &mut [u8],
) {
    assert_sizes(block_type, values.len(), blocks.len());
    assert_eq!(
        values.len(),
        importance.len(),
        "one importance for each value"
    );
    isa::run_lanes(isa, EncodeWeighted(block_type, values, importance, blocks));
}

/// [`decode()`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`decode()`], and when this CPU lacks `isa`.
pub fn decode_with(isa: Isa, block_type: BlockType, blocks: &[u8], values: &mut [f32]) {
    assert_sizes(block_type, values.len(), blocks.len());
    isa::run_lanes(isa, Decode(block_type, blocks, values));
}

struct Encode<'a>(BlockType, &'a [f32], &'a mut [u8]);

impl Work for Encode<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        encode::encode::<W::Lanes>(self.0, self.1, self.2);
    }
}

struct EncodeWeighted<'a>(BlockType, &'a [f32], &'a [f32], &'a mut [u8]);

impl Work for EncodeWeighted<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        encode::encode_weighted::<W::Lanes>(self.0, self.1, self.2, self.3);
    }
}

struct Decode<'a>(BlockType, &'a [u8], &'a mut [f32]);

impl Work for Decode<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        decode::decode::<W::Lanes>(self.0, self.1, self.2);
    }
}

fn assert_sizes(block_type: BlockType, n_values: usize, n_bytes: usize) {
    assert_eq!(
        block_type.row_bytes(n_values),
        Some(n_bytes),
        "{n_values} values in {block_type} blocks do not take {n_bytes} bytes"
    );
}
