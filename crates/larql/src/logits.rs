//! `logits`: the logits after each of some tokens, as a NumPy file, for whoever compares implementations.
//!
//! Invariant: the file is there whole or not at all.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use engine::Wanted;
use terminal::Failure;

use crate::cli::Logits;
use crate::context::Context;
use crate::pass::Pass;

/// Tokens of which the logits are in memory at once.
const CHUNK: usize = 64;

/// Writes `(n_tokens, vocab)`.
pub(crate) fn logits(args: &Logits, context: &Context) -> Result<(), Failure> {
    if args.ids.is_empty() {
        return Err(Failure::new("there are no tokens").hint("give them as --ids 1,45,100"));
    }
    let mut pass = Pass::open(&args.dir, &args.computing, context)?;
    let vocab = pass.model().config().vocab as usize;
    let partial = args.output.with_added_extension("partial");
    let cannot = |error| Failure::io("cannot write", &args.output, error);
    let mut file = BufWriter::new(File::create(&partial).map_err(cannot)?);
    file.write_all(&npy_header(args.ids.len(), vocab))
        .map_err(cannot)?;
    let mut sequence = pass.sequence(args.ids.len());
    for tokens in args.ids.chunks(CHUNK) {
        for logit in pass.step(&mut sequence, tokens, Wanted::All)? {
            file.write_all(&logit.to_le_bytes()).map_err(cannot)?;
        }
    }
    finish(file, &partial, &args.output).map_err(cannot)?;
    let n_tokens = args.ids.len();
    context.output.text(format_args!(
        "{}: logits after {n_tokens} tokens, ({n_tokens}, {vocab})",
        args.output.display()
    ))?;
    context.output.value(&serde_json::json!({
        "file": args.output, "n_tokens": n_tokens, "vocab": vocab,
    }))
}

fn finish(file: BufWriter<File>, partial: &Path, target: &Path) -> std::io::Result<()> {
    file.into_inner()
        .map_err(|error| error.into_error())?
        .sync_all()?;
    std::fs::rename(partial, target)
}

/// The header of a `.npy` file, version 1.0, of little-endian f32 in rows:
/// <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.
fn npy_header(n_rows: usize, n_cols: usize) -> Vec<u8> {
    let mut text =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({n_rows}, {n_cols}), }}");
    // Magic, version, length and text end together at a multiple of 64, the text with a line feed.
    while !(10 + text.len() + 1).is_multiple_of(64) {
        text.push(' ');
    }
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((text.len() as u16).to_le_bytes());
    header.extend(text.as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::npy_header;

    #[test]
    fn a_header_fills_whole_lines() {
        let header = npy_header(3, 512);
        assert!(header.len().is_multiple_of(64) && header.ends_with(b"\n"));
        assert_eq!(
            usize::from(u16::from_le_bytes([header[8], header[9]])),
            header.len() - 10
        );
        assert!(String::from_utf8_lossy(&header).contains("'shape': (3, 512), }"));
    }
}
