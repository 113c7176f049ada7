//! Shares: what one directory holds of a vindex. A slice, or of an expert server's slice the layers and experts of a
//! range.
//!
//! Invariant: of a part, a share holds nothing, everything, or whole experts that the index has a hash for; so whatever
//! is held can be checked, and what is not held is never read. Under a range of experts a part keeps its full length and
//! its header; the other experts are holes in the file. Weights that are no stacked experts (a dense layer, shared
//! experts) live with expert 0.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::gguf::{self, MetaValue};
use crate::index::{Index, Tensor};
use crate::plan::Component;
use crate::slice::Slice;

/// A half-open range of layers or experts, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u32, u32)", into = "(u32, u32)")]
pub struct Span {
    start: u32,
    end: u32,
}

impl Span {
    /// From `start` to before `end`; `None` when that is nothing.
    pub const fn new(start: u32, end: u32) -> Option<Span> {
        if start < end {
            Some(Span { start, end })
        } else {
            None
        }
    }

    /// The first.
    pub const fn start(self) -> u32 {
        self.start
    }

    /// One past the last.
    pub const fn end(self) -> u32 {
        self.end
    }

    /// How many.
    pub const fn n(self) -> u32 {
        self.end - self.start
    }

    /// Whether `k` is one of them.
    pub const fn has(self, k: u32) -> bool {
        self.start <= k && k < self.end
    }

    /// Whether all of `other` are among them.
    pub const fn covers(self, other: Span) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}..{}", self.start, self.end))
    }
}

impl From<Span> for Range<u32> {
    fn from(span: Span) -> Range<u32> {
        span.start..span.end
    }
}

impl From<Span> for (u32, u32) {
    fn from(span: Span) -> (u32, u32) {
        (span.start, span.end)
    }
}

impl TryFrom<(u32, u32)> for Span {
    type Error = NoSpan;

    fn try_from((start, end): (u32, u32)) -> Result<Span, NoSpan> {
        Span::new(start, end).ok_or_else(|| NoSpan(format!("{start}..{end}")))
    }
}

/// A text that is no range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no range; write 0..4 for 0, 1, 2 and 3")]
pub struct NoSpan(pub String);

impl FromStr for Span {
    type Err = NoSpan;

    fn from_str(text: &str) -> Result<Span, NoSpan> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse::<u32>().ok()).flatten()
        };
        text.split_once("..")
            .and_then(|(start, end)| Span::new(number(start)?, number(end)?))
            .ok_or_else(|| NoSpan(text.to_owned()))
    }
}

/// What a directory holds of a vindex.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// The role.
    pub slice: Slice,
    /// Of these layers only; [`Slice::ExpertServer`] alone has this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Span>,
    /// Of each layer these experts only; [`Slice::ExpertServer`] alone has this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<Span>,
}

impl From<Slice> for Share {
    /// The whole slice.
    fn from(slice: Slice) -> Share {
        Share {
            slice,
            layers: None,
            experts: None,
        }
    }
}

/// What a share holds of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Nothing; there need be no such file.
    Nothing,
    /// Every byte.
    Whole,
    /// The header and these experts of each tensor; with expert 0 what lies beside the experts.
    Experts(Span),
}

/// Where the bytes of one expert of one tensor are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertBytes<'a> {
    /// Name of the stacked tensor, or of one that lies beside.
    pub tensor: &'a str,
    /// Which expert; 0 of a tensor that is not stacked.
    pub expert: u32,
    /// In the part's file.
    pub range: Range<u64>,
    /// Hash of the bytes, hex.
    pub sha256: &'a str,
}

impl Share {
    /// Of an expert server's slice, some layers and experts; a range that is all of the model is no restriction.
    ///
    /// # Errors
    /// A sentence about a range outside the model.
    pub fn of_experts(
        index: &Index,
        layers: Option<Span>,
        experts: Option<Span>,
    ) -> Result<Share, String> {
        let share = Share {
            slice: Slice::ExpertServer,
            layers,
            experts,
        };
        share.check(index)?;
        Ok(Share {
            layers: layers.filter(|span| span.n() < index.config.n_layers),
            experts: experts.filter(|span| span.n() < n_experts(index)),
            ..share
        })
    }

    /// What a node needs of this that asks others for its feed-forward layers: of all weights, those of attention.
    pub fn attention_half(self) -> Share {
        match self.slice {
            Slice::Full => Slice::Attention.into(),
            Slice::Attention | Slice::ExpertServer => self,
        }
    }

    /// Whether this is its slice, whole.
    pub fn is_whole(&self) -> bool {
        self.layers.is_none() && self.experts.is_none()
    }

    /// Whether all of `other` is in this.
    pub fn covers(&self, other: &Share) -> bool {
        fn within(wide: Option<Span>, narrow: Option<Span>) -> bool {
            match (wide, narrow) {
                (None, _) => true,
                (Some(wide), Some(narrow)) => wide.covers(narrow),
                (Some(_), None) => false,
            }
        }
        (self.slice == Slice::Full || self.slice == other.slice)
            && within(self.layers, other.layers)
            && within(self.experts, other.experts)
    }

    /// What the share holds of part `part` of `index`, which it was checked against.
    pub fn of_part(&self, index: &Index, part: usize) -> Hold {
        let component = index.parts[part].component;
        if !self.slice.holds(component) {
            return Hold::Nothing;
        }
        let Component::FeedForward { layer } = component else {
            return Hold::Whole;
        };
        if self.layers.is_some_and(|layers| !layers.has(layer)) {
            return Hold::Nothing;
        }
        let Some(experts) = self.experts else {
            return Hold::Whole;
        };
        let of_part = || {
            let tensors = index.tensors.iter();
            tensors.filter(|tensor| tensor.part as usize == part)
        };
        let has_hash = |tensor: &Tensor| tensor.experts.is_some() || tensor.sha256.is_some();
        if experts.has(0) && !of_part().all(has_hash) {
            // Some tensor has no hash of its own, the part has.
            return Hold::Whole;
        }
        if of_part().any(|tensor| tensor.experts.is_some()) {
            Hold::Experts(experts)
        } else {
            Hold::Nothing
        }
    }

    /// Bytes that the share holds of weights and metadata: what is pulled and what may be resident.
    pub fn size_bytes(&self, index: &Index) -> u64 {
        let of_part = |part| match self.of_part(index, part) {
            Hold::Nothing => 0,
            Hold::Whole => index.parts[part].size_bytes,
            Hold::Experts(span) => expert_bytes(index, part, span)
                .iter()
                .map(|expert| expert.range.end - expert.range.start)
                .sum(),
        };
        (0..index.parts.len()).map(of_part).sum()
    }

    /// The text of `slice.json`.
    pub fn to_json(&self) -> String {
        let range = |name: &str, span: Option<Span>| match span {
            Some(span) => format!(",\"{name}\":[{},{}]", span.start, span.end),
            None => String::new(),
        };
        format!(
            "{{\"slice\":\"{}\"{}{}}}\n",
            self.slice.name(),
            range("layers", self.layers),
            range("experts", self.experts)
        )
    }

    /// Whether there can be such a share of this vindex.
    ///
    /// # Errors
    /// A sentence about what cannot be.
    pub fn check(&self, index: &Index) -> Result<(), String> {
        if self.is_whole() {
            return Ok(());
        }
        if self.slice != Slice::ExpertServer {
            return Err(format!("the slice {} has no ranges", self.slice));
        }
        let n_layers = index.config.n_layers;
        if let Some(layers) = self.layers.filter(|layers| layers.end > n_layers) {
            return Err(format!(
                "layers {layers} are not all in the model, which has layers 0..{n_layers}"
            ));
        }
        let Some(experts) = self.experts else {
            return Ok(());
        };
        let n = n_experts(index);
        if experts.end > n {
            return Err(match n {
                1 => format!("experts {experts}: the model is dense, it has no experts"),
                _ => {
                    format!("experts {experts} are not all in the model, which has experts 0..{n}")
                }
            });
        }
        for tensor in &index.tensors {
            if let Some(hashes) = &tensor.experts
                && hashes.len() != n as usize
            {
                let (name, stacked) = (&tensor.name, hashes.len());
                return Err(format!(
                    "tensor {name} stacks {stacked} experts, the model has {n}"
                ));
            }
        }
        for (i, part) in index.parts.iter().enumerate() {
            if matches!(self.of_part(index, i), Hold::Experts(_)) && part_header(index, i).is_none()
            {
                return Err(format!(
                    "{} does not begin with the header that its tensors have, so no range of it can be held",
                    part.file
                ));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Share {
    /// `expert-server`, or `expert-server of layers 0..4, experts 0..8`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.slice.fmt(f)?;
        match (self.layers, self.experts) {
            (None, None) => Ok(()),
            (Some(layers), None) => write!(f, " of layers {layers}"),
            (None, Some(experts)) => write!(f, " of experts {experts}"),
            (Some(layers), Some(experts)) => write!(f, " of layers {layers}, experts {experts}"),
        }
    }
}

/// Experts of a layer; 1 in a dense model.
fn n_experts(index: &Index) -> u32 {
    index.config.experts.map_or(1, |experts| experts.n)
}

/// Where the experts of `span` are in part `part`, and with expert 0 what lies beside them, in file order.
pub fn expert_bytes(index: &Index, part: usize, span: Span) -> Vec<ExpertBytes<'_>> {
    let mut places = Vec::new();
    let of_part = |tensor: &&Tensor| tensor.part as usize == part;
    for tensor in index.tensors.iter().filter(of_part) {
        if let Some(sha256) = tensor.sha256.as_ref().filter(|_| span.has(0)) {
            places.push(ExpertBytes {
                tensor: &tensor.name,
                expert: 0,
                range: tensor.offset_bytes..tensor.offset_bytes + tensor.size_bytes,
                sha256,
            });
        }
        let Some(hashes) = &tensor.experts else {
            continue;
        };
        // A hash each, as the index was checked to have; their count is the slowest dimension of the shape.
        let expert_bytes = tensor.size_bytes / hashes.len() as u64;
        for (expert, sha256) in (0u32..).zip(hashes).filter(|(expert, _)| span.has(*expert)) {
            let start = tensor.offset_bytes + u64::from(expert) * expert_bytes;
            places.push(ExpertBytes {
                tensor: &tensor.name,
                expert,
                range: start..start + expert_bytes,
                sha256,
            });
        }
    }
    places
}

/// The header of a part other than the first, which the index determines: the three keys of a split GGUF and the
/// part's tensors. `None` for the first part, which has metadata of its own, and where the index gives the tensors
/// other places than a header would.
pub fn part_header(index: &Index, part: usize) -> Option<Vec<u8>> {
    if part == 0 {
        return None;
    }
    let split = [
        ("split.no", MetaValue::U16(u16::try_from(part).ok()?)),
        (
            "split.count",
            MetaValue::U16(u16::try_from(index.parts.len()).ok()?),
        ),
        (
            "split.tensors.count",
            MetaValue::I32(i32::try_from(index.tensors.len()).ok()?),
        ),
    ];
    let own: Vec<_> = index
        .tensors
        .iter()
        .filter(|tensor| tensor.part as usize == part)
        .collect();
    let tensors: Vec<_> = own
        .iter()
        .map(|tensor| {
            (
                tensor.name.as_str(),
                tensor.ne.as_slice(),
                tensor.block_type,
            )
        })
        .collect();
    let (bytes, places) =
        gguf::write_header(split.iter().map(|(key, value)| (*key, value)), &tensors);
    let as_indexed = own.iter().map(|tensor| tensor.offset_bytes);
    let end = index.parts[part].size_bytes;
    places
        .into_iter()
        .eq(as_indexed.chain([end]))
        .then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_written_half_open() {
        assert_eq!("0..4".parse(), Ok(Span { start: 0, end: 4 }));
        for bad in [
            "",
            "4",
            "4..4",
            "4..0",
            "0..=3",
            "..4",
            "0..",
            "-1..4",
            "+1..4",
            " 0..4",
            "0..4294967296",
        ] {
            assert_eq!(bad.parse::<Span>(), Err(NoSpan(bad.to_owned())));
        }
    }

    #[test]
    fn the_record_of_a_share_reads_back() {
        let span = |start, end| Span::new(start, end);
        for (layers, experts) in [
            (None, None),
            (span(1, 3), None),
            (None, span(0, 2)),
            (span(0, 1), span(7, 8)),
        ] {
            let share = Share {
                slice: Slice::ExpertServer,
                layers,
                experts,
            };
            assert_eq!(
                serde_json::from_str::<Share>(&share.to_json()).unwrap(),
                share
            );
        }
        for bad in [
            r#"{"slice":"expert-server","layers":[3,3]}"#,
            r#"{"slice":"expert-server","layers":[3]}"#,
            r#"{"slice":"expert-server","experts":[-1,3]}"#,
            r#"{"slice":"expert-server","rows":[1,3]}"#,
            r#"{"layers":[1,3]}"#,
        ] {
            assert!(serde_json::from_str::<Share>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_share_covers_another() {
        let of = |slice, layers: Option<(u32, u32)>, experts: Option<(u32, u32)>| Share {
            slice,
            layers: layers.and_then(|(a, b)| Span::new(a, b)),
            experts: experts.and_then(|(a, b)| Span::new(a, b)),
        };
        let (full, served) = (Slice::Full, Slice::ExpertServer);
        let some = of(served, Some((1, 4)), Some((0, 2)));
        assert!(of(full, None, None).covers(&some));
        assert!(of(served, None, None).covers(&some));
        assert!(of(served, Some((0, 4)), None).covers(&some));
        assert!(some.covers(&some));
        assert!(!some.covers(&of(served, None, Some((0, 2)))));
        assert!(!some.covers(&of(served, Some((1, 5)), Some((0, 2)))));
        assert!(!of(Slice::Attention, None, None).covers(&some));
        assert!(!of(served, None, None).covers(&of(full, None, None)));
    }
}
