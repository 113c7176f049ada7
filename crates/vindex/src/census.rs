//! How many tensors of each block type there are and what they take, planned or written: what a plan, a card and a
//! progress line tell. Invariant: sizes are those of the blocks, without the padding between tensors.

use std::collections::BTreeMap;

use quant::BlockType;
use serde::Serialize;

use crate::gguf;
use crate::index::Index;
use crate::plan::{Plan, PlannedTensor};
use crate::slice::Slice;

/// The tensors of one block type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TypeCount {
    /// How many.
    pub n_tensors: usize,
    /// Bytes of their blocks.
    pub size_bytes: u64,
}

/// Counts by the name of the type.
pub type Census = BTreeMap<&'static str, TypeCount>;

impl Plan {
    /// What will be written.
    pub fn census(&self) -> Census {
        let tensors = self.parts.iter().flat_map(|part| &part.tensors);
        count(tensors.map(|tensor| (tensor.block_type, tensor.size_bytes())))
    }
}

impl PlannedTensor {
    /// Bytes of its blocks; the largest number there is for a shape that no file can hold.
    pub fn size_bytes(&self) -> u64 {
        gguf::size_bytes(self.block_type, &self.ne).unwrap_or(u64::MAX)
    }
}

impl Index {
    /// What a slice holds.
    pub fn census(&self, slice: Slice) -> Census {
        let is_held = |part: u32| {
            let part = self.parts.get(part as usize);
            part.is_some_and(|part| slice.holds(part.component))
        };
        let tensors = self.tensors.iter().filter(|tensor| is_held(tensor.part));
        count(tensors.map(|tensor| (tensor.block_type, tensor.size_bytes)))
    }
}

fn count(tensors: impl Iterator<Item = (BlockType, u64)>) -> Census {
    let mut census = Census::new();
    for (block_type, size_bytes) in tensors {
        let count = census.entry(block_type.name()).or_default();
        count.n_tensors += 1;
        count.size_bytes = count.size_bytes.saturating_add(size_bytes);
    }
    census
}
