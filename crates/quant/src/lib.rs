//! Rows of weights as GGUF blocks: [`encode()`] finds the blocks, [`decode()`] gives the weights back.
//!
//! Invariant: a result depends on the values alone. Every instruction set gives identical bytes, a block never
//! depends on its neighbours, and decoding is bit for bit what GGUF's reference decoder does. Encoding aims at the
//! least squared error of the decoded values; its bytes are not the reference encoder's.
//!
//! Read in this order: [`BlockType`] (names and sizes), `decode.rs` (what the bytes mean), `encode/fit.rs` (how a
//! group of weights finds its scale), `lanes.rs` and `arch/` (sixteen groups at once on each CPU).
//!
//! Left out: threads (the caller splits rows), importance matrices, and checks for NaN and infinity, which belong to
//! whoever reads a checkpoint. Such values never cause a panic here: in integer blocks a NaN counts as 0 and values
//! beyond ±1e9 count as ±1e9.

mod arch;
mod block_type;
mod decode;
mod encode;
mod isa;
mod lanes;

pub use block_type::{BlockType, UnknownBlockType};
pub use isa::{Isa, isas};

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

/// [`encode()`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`encode()`], and when this CPU lacks `isa`.
pub fn encode_with(isa: Isa, block_type: BlockType, values: &[f32], blocks: &mut [u8]) {
    assert_sizes(block_type, values.len(), blocks.len());
    isa::encode(isa, block_type, values, blocks);
}

/// [`decode()`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`decode()`], and when this CPU lacks `isa`.
pub fn decode_with(isa: Isa, block_type: BlockType, blocks: &[u8], values: &mut [f32]) {
    assert_sizes(block_type, values.len(), blocks.len());
    isa::decode(isa, block_type, blocks, values);
}

fn assert_sizes(block_type: BlockType, n_values: usize, n_bytes: usize) {
    assert_eq!(
        block_type.row_bytes(n_values),
        Some(n_bytes),
        "{n_values} values in {block_type} blocks do not take {n_bytes} bytes"
    );
}
