//! Blocks of MXFP4 as checkpoints have them, values and scales in two tensors, put together as GGUF has them
//! (`quant::repack_mxfp4` draws both).
//!
//! Invariant: no bit of a value or a scale changes.

use super::view::{Span, View};
use crate::checkpoint::{Checkpoint, SourceTensor};

/// Values of a block.
pub(super) const BLOCK_LEN: u64 = 32;
/// Bytes of its values.
const NIBBLE_BYTES: usize = 16;
/// Bytes of a block in GGUF.
const BLOCK_BYTES: usize = 1 + NIBBLE_BYTES;

/// The two tensors.
pub(crate) struct Packed<'a> {
    blocks: (&'a str, &'a SourceTensor),
    scales: (&'a str, &'a SourceTensor),
}

impl<'a> Packed<'a> {
    pub(super) fn new(
        blocks: &'a str,
        scales: &'a str,
        checkpoint: &'a Checkpoint,
    ) -> Result<Packed<'a>, String> {
        let named = |name: &'a str| {
            let tensor = checkpoint.tensor(name);
            let tensor = tensor.ok_or_else(|| format!("the checkpoint has no tensor {name}"))?;
            Ok::<_, String>((name, tensor))
        };
        let packed = Packed {
            blocks: named(blocks)?,
            scales: named(scales)?,
        };
        let n_blocks = packed.scales.1.size_bytes;
        if n_blocks.checked_mul(NIBBLE_BYTES as u64) != Some(packed.blocks.1.size_bytes) {
            return Err(format!(
                "{blocks} has {} bytes for the {n_blocks} scales of {scales}",
                packed.blocks.1.size_bytes
            ));
        }
        Ok(packed)
    }

    /// Values of both together.
    pub(super) fn n_values(&self) -> u64 {
        self.scales.1.size_bytes.saturating_mul(BLOCK_LEN)
    }

    /// What is read for `span`, which is whole blocks: name, tensor, place in its file and length, first of the values, then
    /// of the scales.
    pub(super) fn reads(&self, span: Span) -> [(&'a str, &'a SourceTensor, u64, usize); 2] {
        let (first, n) = (span.start / BLOCK_LEN, span.n_values / BLOCK_LEN);
        let read = |(name, tensor): (&'a str, &'a SourceTensor), block_bytes: u64| {
            let at = tensor.offset_bytes + first * block_bytes;
            (name, tensor, at, (n * block_bytes) as usize)
        };
        [read(self.blocks, NIBBLE_BYTES as u64), read(self.scales, 1)]
    }

    /// The blocks of `view`, of which `raw` has what was read for `spans` one after another.
    pub(super) fn encode(&self, view: &View, spans: &[Span], raw: &[u8], out: &mut [u8]) {
        let mut read: Vec<[u8; BLOCK_BYTES]> = Vec::new();
        let mut rest = raw;
        for span in spans {
            let n = (span.n_values / BLOCK_LEN) as usize;
            let (nibbles, after) = rest.split_at(n * NIBBLE_BYTES);
            let (scales, after) = after.split_at(n);
            let before = read.len();
            read.resize(before + n, [0; BLOCK_BYTES]);
            quant::repack_mxfp4(nibbles, scales, read[before..].as_flattened_mut());
            rest = after;
        }
        let in_blocks = spans.iter().map(|span| Span {
            start: span.start / BLOCK_LEN,
            n_values: span.n_values / BLOCK_LEN,
        });
        let in_blocks: Vec<Span> = in_blocks.collect();
        let (out, _) = out.as_chunks_mut::<BLOCK_BYTES>();
        // A job of packed blocks was made from views of whole blocks.
        if let Some(view) = view.in_blocks(BLOCK_LEN) {
            view.gather(&in_blocks, &read, out);
        }
    }
}
