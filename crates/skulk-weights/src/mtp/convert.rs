//! One piece of a sidecar: read its bytes and scales, convert, return what is written.
//!
//! Invariant: a value becomes BF16 by one rounding of `code * scale` in f32 (of the value itself where there is no
//! scale), to nearest, ties to even; a NaN stays a NaN. Memory is bounded by the piece.

use std::ops::Range;

use quant::{BlockType, Narrow};
use terminal::Failure;
use vindex::{Source, SourceTensor};

use crate::mtp::heads::{Codec, HeadTensor, Scale, ScaleKind};

/// Values that are converted at a time, so that they stay in cache.
const N_AT_ONCE: usize = 4096;

/// The bytes of `part` of `tensor` (rows of a quantised one, values of another), and how many were read for them.
pub(crate) fn convert(
    source: &dyn Source,
    tensor: &HeadTensor,
    part: &Range<u64>,
) -> Result<(Vec<u8>, u64), Failure> {
    match &tensor.codec {
        Codec::Copy => {
            let bytes = read_values(source, tensor, part)?;
            let n_read = bytes.len() as u64;
            Ok((bytes, n_read))
        }
        Codec::Float(block_type) => {
            let bytes = read_values(source, tensor, part)?;
            let value_bytes = (tensor.source.dtype.bits() / 8) as usize;
            let mut out = vec![0; bytes.len() / value_bytes * 2];
            let mut values = vec![0.0; N_AT_ONCE];
            for (bytes, out) in bytes
                .chunks(N_AT_ONCE * value_bytes)
                .zip(out.chunks_mut(2 * N_AT_ONCE))
            {
                let values = &mut values[..bytes.len() / value_bytes];
                quant::decode(*block_type, bytes, values);
                quant::round_to_bf16(values, out);
            }
            Ok((out, bytes.len() as u64))
        }
        Codec::Scaled {
            narrow,
            grid,
            scale,
        } => {
            let row_bytes = (grid.cols / narrow.values_per_byte() as u64) as usize;
            let start = tensor.source.offset_bytes + part.start * row_bytes as u64;
            let n_rows = (part.end - part.start) as usize;
            let codes = read(source, &tensor.source, start, n_rows * row_bytes)?;
            let first = grid.first_scale(part.start);
            let last = grid.first_scale(part.end - 1) + grid.scale_cols;
            let (scales, scale_bytes) = read_scales(source, scale, first..last)?;
            let mut out = vec![0; codes.len() * narrow.values_per_byte() * 2];
            rows(
                *narrow,
                &codes,
                row_bytes,
                grid.block_cols as usize,
                &mut out,
                |row| {
                    let at = (grid.first_scale(part.start + row as u64) - first) as usize;
                    &scales[at..at + grid.scale_cols as usize]
                },
            );
            Ok((out, codes.len() as u64 + scale_bytes))
        }
    }
}

/// Converts rows of codes; `scales_of` gives a row's scales, each for `group` values.
fn rows<'a>(
    narrow: Narrow,
    codes: &[u8],
    row_bytes: usize,
    group: usize,
    out: &mut [u8],
    scales_of: impl Fn(usize) -> &'a [f32],
) {
    let per_byte = narrow.values_per_byte();
    // Whole groups, as many as stay in cache; a group longer than that shares its one scale among its pieces.
    let step = match group {
        group if group <= N_AT_ONCE => N_AT_ONCE / group * group,
        _ => N_AT_ONCE,
    };
    let mut values = vec![0.0; step.min(row_bytes * per_byte)];
    let out_rows = out.chunks_mut(2 * row_bytes * per_byte);
    for (row, (codes, out)) in codes.chunks(row_bytes).zip(out_rows).enumerate() {
        let scales = scales_of(row);
        let mut at = 0;
        while at < codes.len() * per_byte {
            // A piece of a long group ends with the group.
            let end = match group {
                group if group <= N_AT_ONCE => at + step,
                _ => (at + step).min((at / group + 1) * group),
            };
            let end = end.min(codes.len() * per_byte);
            let values = &mut values[..end - at];
            let scales = &scales[at / group..end.div_ceil(group)];
            let group = group.min(values.len());
            quant::dequantize(
                narrow,
                &codes[at / per_byte..end / per_byte],
                group,
                scales,
                values,
            );
            quant::round_to_bf16(values, &mut out[2 * at..2 * end]);
            at = end;
        }
    }
}

fn read_scales(
    source: &dyn Source,
    scale: &Scale,
    range: Range<u64>,
) -> Result<(Vec<f32>, u64), Failure> {
    let value_bytes = match scale.kind {
        ScaleKind::Float(BlockType::F32) => 4,
        ScaleKind::Float(_) => 2,
        ScaleKind::Narrow(_) => 1,
    };
    let start = scale.source.offset_bytes + range.start * value_bytes;
    let n = (range.end - range.start) as usize;
    let bytes = read(source, &scale.source, start, n * value_bytes as usize)?;
    let mut n_read = bytes.len() as u64;
    let mut scales = vec![0.0; n];
    match scale.kind {
        ScaleKind::Float(block_type) => quant::decode(block_type, &bytes, &mut scales),
        ScaleKind::Narrow(narrow) => {
            quant::dequantize(narrow, &bytes, n.max(1), &[1.0][..n.min(1)], &mut scales)
        }
    }
    if let Some((global, divides)) = &scale.global {
        let bytes = read(source, global, global.offset_bytes, 4)?;
        n_read += 4;
        let global = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        for scale in &mut scales {
            *scale = if *divides {
                *scale / global
            } else {
                *scale * global
            };
        }
    }
    Ok((scales, n_read))
}

fn read_values(
    source: &dyn Source,
    tensor: &HeadTensor,
    part: &Range<u64>,
) -> Result<Vec<u8>, Failure> {
    let value_bytes = tensor.source.dtype.bits() / 8;
    let start = tensor.source.offset_bytes + part.start * value_bytes;
    read(
        source,
        &tensor.source,
        start,
        ((part.end - part.start) * value_bytes) as usize,
    )
}

fn read(
    source: &dyn Source,
    tensor: &SourceTensor,
    offset_bytes: u64,
    n_bytes: usize,
) -> Result<Vec<u8>, Failure> {
    let mut bytes = vec![0; n_bytes];
    source
        .read_at(&tensor.file, offset_bytes, &mut bytes)
        .map_err(|error| {
            Failure::new(format!("cannot read {}: {error}", tensor.file))
                .hint("what was fetched is kept; the same command goes on after it")
        })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of any length and groups of any length give what a loop over the values gives.
    #[test]
    fn pieces_of_a_row_make_no_difference() {
        for (row_bytes, group) in [
            (7usize, 3usize),
            (4096, 128),
            (10_000, 5000),
            (9000, 9000),
            (5000, 4096),
            (320, 128),
            (1, 1),
        ] {
            let codes: Vec<u8> = (0..2 * row_bytes).map(|i| (i * 37 % 251) as u8).collect();
            let n_scales = row_bytes.div_ceil(group);
            let scales: Vec<f32> = (0..2 * n_scales).map(|i| 0.5 + i as f32).collect();
            let mut out = vec![0; 4 * row_bytes];
            rows(Narrow::I8, &codes, row_bytes, group, &mut out, |row| {
                &scales[row * n_scales..][..n_scales]
            });
            for (i, &code) in codes.iter().enumerate() {
                let (row, col) = (i / row_bytes, i % row_bytes);
                let value = f32::from(code as i8) * scales[row * n_scales + col / group];
                let mut expected = [0; 2];
                quant::round_to_bf16(&[value], &mut expected);
                assert_eq!(
                    out[2 * i..2 * i + 2],
                    expected,
                    "rows of {row_bytes} in groups of {group}, value {i}"
                );
            }
        }
    }

    #[test]
    fn a_byte_of_two_codes_gives_the_low_one_first() {
        let mut out = vec![0; 8];
        rows(Narrow::E2M1, &[0x21, 0xf7], 2, 4, &mut out, |_| &[2.0]);
        let values: Vec<f32> = out
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
            .collect();
        assert_eq!(values, [1.0, 2.0, 12.0, -12.0]);
    }
}
