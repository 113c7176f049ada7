//! `verify` and `dump`: whether a vindex is what its index says, and what that is.
//!
//! Invariant: nothing is written to the vindex.

use std::path::Path;

use terminal::{Failure, Meter, size, write};
use vindex::Vindex;

use crate::context::Context;
use crate::extract::show;

/// Hashes every part of the recorded slice.
pub(crate) fn verify(dir: &Path, context: &Context) -> Result<(), Failure> {
    let meter = Meter::new("verify");
    let verified = vindex::verify(dir, &|progress| show(&meter, progress));
    drop(meter);
    let verified = verified.map_err(|error| {
        let what = match error {
            vindex::Error::Damaged { .. } => format!("{} is not intact", dir.display()),
            _ => format!("cannot verify {}", dir.display()),
        };
        Failure::new(what).cause(error)
    })?;
    context
        .output
        .text(format_args!("vindex: {}", verified.id))?;
    context.output.text(format_args!(
        "{}: slice {}, {} parts, {}: every byte is what the index says",
        dir.display(),
        verified.share,
        verified.n_parts,
        size(verified.bytes)
    ))?;
    context.output.value(&serde_json::json!({
        "vindex": verified.id.to_string(), "slice": verified.share.slice, "layers": verified.share.layers, "experts": verified.share.experts,
        "n_parts": verified.n_parts, "size_bytes": verified.bytes,
    }))
}

/// Prints the index and the metadata; with `--json` the index as it is.
pub(crate) fn dump(dir: &Path, context: &Context) -> Result<(), Failure> {
    let vindex =
        Vindex::open(dir).map_err(Failure::of(format!("cannot open {}", dir.display())))?;
    if context.output.json {
        return context.output.value(&serde_json::json!({
            "vindex": vindex.id().to_string(), "slice": vindex.slice(), "layers": vindex.share().layers, "experts": vindex.share().experts,
            "provenance": vindex.provenance(), "sizes": vindex.index().sizes(), "index": vindex.index(),
        }));
    }
    let mut text = Vec::new();
    vindex::dump(&vindex, &mut text).map_err(|error| Failure::io("cannot read", dir, error))?;
    write(&String::from_utf8_lossy(&text))
}
