//! The block types a tensor can be stored in: their names, GGUF ids and sizes.
//!
//! Invariant: name, id, block length and block bytes are those of the GGUF specification, so that a tensor of
//! ours is a tensor to every GGUF reader. What the bytes of a block mean is told in `decode.rs`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a row of weights is stored. Serialised as its GGUF name, such as `"Q4_K"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(non_camel_case_types, reason = "the names are GGUF's")]
pub enum BlockType {
    /// IEEE binary32, little-endian.
    F32,
    /// IEEE binary16, little-endian.
    F16,
    /// The upper half of a binary32, little-endian.
    BF16,
    /// 32 values: one f16 scale, 8-bit signed integers.
    Q8_0,
    /// 32 values: one f16 scale, integers in -16..=15.
    Q5_0,
    /// 256 values: 8 groups with a 6-bit scale and a 6-bit minimum each, integers in 0..=31.
    Q5_K,
    /// 32 values: one f16 scale, integers in -8..=7.
    Q4_0,
    /// 32 values: one f16 scale and one f16 minimum, integers in 0..=15.
    Q4_1,
    /// 32 values: an 8-bit exponent as scale, 4-bit floats (E2M1). OCP MX.
    MXFP4,
    /// 256 values: 8 groups with a 6-bit scale and a 6-bit minimum each, integers in 0..=15.
    Q4_K,
    /// 256 values: 16 groups with an 8-bit signed scale each, integers in -32..=31.
    Q6_K,
}

/// A text that names no block type of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no block type is named {got:?}; known are F32, F16, BF16, Q8_0, Q5_0, Q5_K, Q4_0, Q4_1, MXFP4, Q4_K and Q6_K"
)]
pub struct UnknownBlockType {
    /// The text as it was given.
    pub got: String,
}

impl BlockType {
    /// Every block type, in the order of their declaration.
    pub const ALL: [BlockType; 11] = [
        BlockType::F32,
        BlockType::F16,
        BlockType::BF16,
        BlockType::Q8_0,
        BlockType::Q5_0,
        BlockType::Q5_K,
        BlockType::Q4_0,
        BlockType::Q4_1,
        BlockType::MXFP4,
        BlockType::Q4_K,
        BlockType::Q6_K,
    ];

    /// Values in one block. A row is a whole number of blocks.
    pub const fn block_len(self) -> usize {
        match self {
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => 1,
            BlockType::Q8_0
            | BlockType::Q5_0
            | BlockType::Q4_0
            | BlockType::Q4_1
            | BlockType::MXFP4 => 32,
            BlockType::Q5_K | BlockType::Q4_K | BlockType::Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            BlockType::F32 => 4,
            BlockType::F16 | BlockType::BF16 => 2,
            BlockType::Q8_0 => 2 + 32,
            BlockType::Q5_0 => 2 + 4 + 16,
            BlockType::Q5_K => 2 + 2 + 12 + 32 + 128,
            BlockType::Q4_0 => 2 + 16,
            BlockType::Q4_1 => 2 + 2 + 16,
            BlockType::MXFP4 => 1 + 16,
            BlockType::Q4_K => 2 + 2 + 12 + 128,
            BlockType::Q6_K => 128 + 64 + 16 + 2,
        }
    }

    /// Bytes of `n` values, or `None` when `n` is no whole number of blocks or the size does not fit a `usize`.
    pub fn row_bytes(self, n: usize) -> Option<usize> {
        if !n.is_multiple_of(self.block_len()) {
            return None;
        }
        (n / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The number that GGUF writes for this type in a tensor's description (`ggml_type`).
    pub const fn gguf_id(self) -> u32 {
        match self {
            BlockType::F32 => 0,
            BlockType::F16 => 1,
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q5_0 => 6,
            BlockType::Q8_0 => 8,
            BlockType::Q4_K => 12,
            BlockType::Q5_K => 13,
            BlockType::Q6_K => 14,
            BlockType::BF16 => 30,
            BlockType::MXFP4 => 39,
        }
    }

    /// The type with this GGUF number, if it is one of ours.
    pub fn from_gguf_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.gguf_id() == id)
    }

    /// GGUF's name of the type.
    pub fn name(self) -> &'static str {
        match self {
            BlockType::F32 => "F32",
            BlockType::F16 => "F16",
            BlockType::BF16 => "BF16",
            BlockType::Q8_0 => "Q8_0",
            BlockType::Q5_0 => "Q5_0",
            BlockType::Q5_K => "Q5_K",
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q4_1 => "Q4_1",
            BlockType::MXFP4 => "MXFP4",
            BlockType::Q4_K => "Q4_K",
            BlockType::Q6_K => "Q6_K",
        }
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for BlockType {
    type Err = UnknownBlockType;

    /// Reads a GGUF name exactly as [`BlockType::name`] gives it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|t| t.name() == text)
            .ok_or_else(|| UnknownBlockType {
                got: text.to_owned(),
            })
    }
}

const _: () = {
    assert!(BlockType::Q8_0.block_bytes() == 34);
    assert!(BlockType::Q5_0.block_bytes() == 22);
    assert!(BlockType::Q5_K.block_bytes() == 176);
    assert!(BlockType::Q4_0.block_bytes() == 18);
    assert!(BlockType::Q4_1.block_bytes() == 20);
    assert!(BlockType::MXFP4.block_bytes() == 17);
    assert!(BlockType::Q4_K.block_bytes() == 144);
    assert!(BlockType::Q6_K.block_bytes() == 210);
};
