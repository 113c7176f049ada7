//! A vindex as text, for people and for diffs.

use std::collections::BTreeMap;
use std::io::{self, Write};

use crate::gguf::{self, MetaArray, MetaValue};
use crate::open::Vindex;
use crate::plan::Component;
use crate::sizes::SliceSize;

/// Longest text of a metadata value that is shown whole.
const MAX_SHOWN_CHARS: usize = 100;

/// Writes what `vindex` holds: identity, slices, configuration, metadata, parts, tensors. Reads no weight.
///
/// # Errors
/// Those of `w`; [`io::ErrorKind::InvalidData`] when the first part's header cannot be read.
pub fn dump(vindex: &Vindex, w: &mut dyn Write) -> io::Result<()> {
    let index = vindex.index();
    writeln!(w, "{} {}", index.format, vindex.id())?;
    writeln!(w, "name    {}", index.name)?;
    writeln!(w, "stem    {}", index.stem)?;
    writeln!(w, "recipe  {}", index.recipe)?;
    if let Some(calibration) = &index.calibration {
        writeln!(w, "weighed by the statistics {}", calibration.imatrix)?;
    }
    writeln!(w, "slice   {}", vindex.share())?;
    if let Some(from) = vindex.provenance() {
        let unknown = || "unknown".to_owned();
        let (repo, commit) = (
            from.repo.clone().unwrap_or_else(unknown),
            from.commit.clone().unwrap_or_else(unknown),
        );
        writeln!(
            w,
            "source  repository {repo}, commit {commit}; written by {} at {}",
            from.tool, from.extracted_at
        )?;
    }

    writeln!(w, "\nconfig")?;
    // By way of the text, which has the shortest decimals of each f32.
    let config: serde_json::Value = serde_json::from_str(&serde_json::to_string(&index.config)?)?;
    for (key, value) in config.as_object().into_iter().flatten() {
        writeln!(w, "  {key:<16} {value}")?;
    }

    writeln!(w, "\nmetadata")?;
    if let Some(bytes) = vindex.part_bytes(0) {
        let header = gguf::read_header(bytes)
            .map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))?;
        for (key, value) in &header.metadata {
            writeln!(w, "  {key} = {}", shown(value))?;
        }
    }

    writeln!(w, "\nslices")?;
    let sizes = index.sizes();
    for SliceSize {
        slice,
        n_parts,
        size_bytes,
    } in &sizes.slices
    {
        writeln!(w, "  {slice:<14} {n_parts:>5} parts {size_bytes:>15} bytes")?;
    }

    writeln!(w, "\nranges of expert-server")?;
    for range in sizes.ranges(|bytes| format!("{bytes} bytes")) {
        writeln!(w, "  {range}")?;
    }

    writeln!(w, "\nparts")?;
    for part in &index.parts {
        let (component, size, sha256) = (named(part.component), part.size_bytes, &part.sha256);
        writeln!(w, "  {}  {component:<16} {size:>13}  {sha256}", part.file)?;
    }

    writeln!(w, "\ntensors")?;
    let mut by_type: BTreeMap<_, (usize, u64)> = BTreeMap::new();
    for tensor in &index.tensors {
        let ne = tensor
            .ne
            .iter()
            .map(u64::to_string)
            .collect::<Vec<_>>()
            .join(" x ");
        let experts = tensor
            .experts
            .as_ref()
            .map(|e| format!("  {} experts", e.len()))
            .unwrap_or_default();
        let (name, kind, part) = (&tensor.name, tensor.block_type, tensor.part + 1);
        writeln!(
            w,
            "  {name:<36} {kind:<5} {ne:<22} part {part:>5} at {:>10}{experts}",
            tensor.offset_bytes
        )?;
        let (n, bytes) = by_type.entry(kind).or_default();
        *n += 1;
        *bytes += tensor.size_bytes;
    }
    writeln!(w, "\ntypes")?;
    for (kind, (n, bytes)) in by_type {
        writeln!(w, "  {kind:<5} {n:>6} tensors {bytes:>15} bytes")?;
    }
    Ok(())
}

fn named(component: Component) -> String {
    match component {
        Component::Metadata => "metadata".to_owned(),
        Component::Embeddings => "embeddings".to_owned(),
        Component::Attention { layer } => format!("attention {layer}"),
        Component::FeedForward { layer } => format!("feed-forward {layer}"),
        Component::NextN { layer } => format!("nextn {layer}"),
    }
}

/// A value in one line; long ones by their length.
fn shown(value: &MetaValue) -> String {
    match value {
        MetaValue::U8(v) => v.to_string(),
        MetaValue::I8(v) => v.to_string(),
        MetaValue::U16(v) => v.to_string(),
        MetaValue::I16(v) => v.to_string(),
        MetaValue::U32(v) => v.to_string(),
        MetaValue::I32(v) => v.to_string(),
        MetaValue::F32(v) => v.to_string(),
        MetaValue::Bool(v) => v.to_string(),
        MetaValue::U64(v) => v.to_string(),
        MetaValue::I64(v) => v.to_string(),
        MetaValue::F64(v) => v.to_string(),
        MetaValue::String(v) if v.chars().count() > MAX_SHOWN_CHARS => {
            format!("text of {} bytes", v.len())
        }
        MetaValue::String(v) => format!("{v:?}"),
        MetaValue::Array(array) => {
            let text = match array {
                MetaArray::U8s(v) => format!("{v:?}"),
                MetaArray::I8s(v) => format!("{v:?}"),
                MetaArray::U16s(v) => format!("{v:?}"),
                MetaArray::I16s(v) => format!("{v:?}"),
                MetaArray::U32s(v) => format!("{v:?}"),
                MetaArray::I32s(v) => format!("{v:?}"),
                MetaArray::F32s(v) => format!("{v:?}"),
                MetaArray::Bools(v) => format!("{v:?}"),
                MetaArray::Strings(v) => format!("{v:?}"),
                MetaArray::U64s(v) => format!("{v:?}"),
                MetaArray::I64s(v) => format!("{v:?}"),
                MetaArray::F64s(v) => format!("{v:?}"),
            };
            if text.chars().count() > MAX_SHOWN_CHARS {
                format!("array of {}", array.len())
            } else {
                text
            }
        }
    }
}
