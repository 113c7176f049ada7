//! Encodes rows of weights into GGUF blocks and back, as fast as this CPU can.

mod block_type;

pub use block_type::{BlockType, UnknownBlockType};

/// Encodes `values` into `blocks`.
pub fn encode(block_type: BlockType, values: &[f32], blocks: &mut [u8]) {
    assert_eq!(block_type.row_bytes(values.len()), Some(blocks.len()));
    unreachable!("{block_type}")
}

/// Decodes `blocks` into `values`.
pub fn decode(block_type: BlockType, blocks: &[u8], values: &mut [f32]) {
    assert_eq!(block_type.row_bytes(values.len()), Some(blocks.len()));
    unreachable!("{block_type}")
}
