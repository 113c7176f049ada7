//! What slices, parts and ranges take, planned or written.
//!
//! Invariant: sizes of parts and slices are those of whole files; what an expert takes is its blocks alone, as a range of
//! experts holds them (beside the header of the part).

use serde::Serialize;

use crate::error::Error;
use crate::extract::part_sizes;
use crate::index::{Index, n_experts};
use crate::plan::{Component, Plan};
use crate::slice::Slice;

/// All sizes of a vindex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// In the order of [`Slice::ALL`].
    pub slices: Vec<SliceSize>,
    /// In the order of the files.
    pub parts: Vec<PartSize>,
}

/// What a slice takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SliceSize {
    /// Which.
    pub slice: Slice,
    /// Parts of it.
    pub n_parts: usize,
    /// Bytes of them.
    pub size_bytes: u64,
}

/// What a part takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PartSize {
    /// What it holds.
    #[serde(flatten)]
    pub component: Component,
    /// Length of the file.
    pub size_bytes: u64,
    /// Bytes of one expert, in a part that stacks experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_bytes: Option<u64>,
    /// Bytes of what lies beside the experts and is held with expert 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside_bytes: Option<u64>,
}

impl Plan {
    /// What will be written takes.
    ///
    /// # Errors
    /// [`Error::Plan`] when the plan makes no sense.
    pub fn sizes(&self) -> Result<Sizes, Error> {
        let sizes = part_sizes(self)?;
        let parts = self.parts.iter().zip(sizes).map(|(part, size_bytes)| {
            let tensors = part.tensors.iter();
            let tensors = tensors.map(|t| (n_experts(&t.name, &t.ne), t.size_bytes()));
            part_size(part.component, size_bytes, tensors)
        });
        Ok(Sizes::of(parts.collect()))
    }
}

impl Index {
    /// What the whole vindex takes.
    pub fn sizes(&self) -> Sizes {
        let parts = (0u32..).zip(&self.parts).map(|(i, part)| {
            let tensors = self.tensors.iter().filter(|t| t.part == i);
            let tensors = tensors.map(|t| (n_experts(&t.name, &t.ne), t.size_bytes));
            part_size(part.component, part.size_bytes, tensors)
        });
        Sizes::of(parts.collect())
    }
}

fn part_size(
    component: Component,
    size_bytes: u64,
    tensors: impl Iterator<Item = (Option<u64>, u64)>,
) -> PartSize {
    let (mut expert_bytes, mut beside_bytes) = (0, 0);
    for (n_experts, size_bytes) in tensors {
        match n_experts {
            Some(n) => expert_bytes += size_bytes / n.max(1),
            None => beside_bytes += size_bytes,
        }
    }
    let is_routed = matches!(component, Component::FeedForward { .. }) && expert_bytes > 0;
    PartSize {
        component,
        size_bytes,
        expert_bytes: is_routed.then_some(expert_bytes),
        beside_bytes: (is_routed && beside_bytes > 0).then_some(beside_bytes),
    }
}

impl Sizes {
    fn of(parts: Vec<PartSize>) -> Sizes {
        let of_slice = |slice: Slice| {
            let held = parts.iter().filter(|part| slice.holds(part.component));
            SliceSize {
                slice,
                n_parts: held.clone().count(),
                size_bytes: held.map(|part| part.size_bytes).sum(),
            }
        };
        Sizes {
            slices: Slice::ALL.map(of_slice).to_vec(),
            parts,
        }
    }

    /// What an expert server's ranges are made of, in words: a layer, an expert of a layer, and what is beside expert 0.
    /// `told` writes a number of bytes.
    pub fn ranges(&self, told: impl Fn(u64) -> String) -> Vec<String> {
        let of = |f: fn(&PartSize) -> Option<u64>| {
            let sizes: Vec<u64> = self.parts.iter().filter_map(f).collect();
            let (least, most) = (sizes.iter().min()?, sizes.iter().max()?);
            Some(match least == most {
                true => told(*least),
                false => format!("{} to {}", told(*least), told(*most)),
            })
        };
        let layer = of(|part| {
            let is_layer = matches!(part.component, Component::FeedForward { .. });
            is_layer.then_some(part.size_bytes)
        });
        [
            ("a layer", layer),
            ("an expert of a layer", of(|part| part.expert_bytes)),
            ("beside expert 0", of(|part| part.beside_bytes)),
        ]
        .into_iter()
        .filter_map(|(what, size)| Some(format!("{what:<20} {}", size?)))
        .collect()
    }
}
