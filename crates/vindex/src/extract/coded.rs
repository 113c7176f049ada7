//! From codes and their scales to values: which bytes a span of values needs, and what they become.
//!
//! Invariant: whole rows are read, so that a value is decoded in the same way whatever span it is asked for in. Products and
//! sums are of f32, each rounded once.

use quant::BlockType;

use super::view::Span;
use crate::checkpoint::{Coded, SourceTensor};

/// Rows of a tensor of codes.
struct Rows {
    first: u64,
    n: u64,
}

/// A piece that is read: its tensor, its place in the file, its length.
pub(super) type Piece<'a> = (&'a SourceTensor, u64, usize);

/// What is read for `span` of a tensor with rows of `row_len` values: first the codes, then what belongs to them.
pub(super) fn pieces<'a>(
    tensor: &'a SourceTensor,
    coded: &'a Coded,
    row_len: u64,
    span: Span,
) -> Vec<Piece<'a>> {
    let rows = rows(row_len, span);
    match coded {
        Coded::Scaled {
            grid,
            scales,
            scale_type,
            ..
        } => {
            let first = grid.first_scale(rows.first);
            let end = grid.first_scale(rows.first + rows.n - 1) + grid.scale_cols;
            vec![
                piece(tensor, rows.first * row_len, rows.n * row_len),
                floats(scales, *scale_type, first, end - first),
            ]
        }
        Coded::Affine {
            bits,
            group,
            scales,
            biases,
            scale_type,
        } => {
            let row_bytes = row_len * u64::from(*bits) / 8;
            let n_groups = row_len / group;
            let of_groups = |tensor| {
                floats(
                    tensor,
                    *scale_type,
                    rows.first * n_groups,
                    rows.n * n_groups,
                )
            };
            vec![
                piece(tensor, rows.first * row_bytes, rows.n * row_bytes),
                of_groups(scales),
                of_groups(biases),
            ]
        }
    }
}

/// The values of `span` from what was read for it; `raw` is shortened by that. `whole` and `factors` are scratch.
pub(super) fn decode(
    coded: &Coded,
    row_len: u64,
    span: Span,
    raw: &mut &[u8],
    values: &mut [f32],
    whole: &mut Vec<f32>,
    factors: &mut Vec<f32>,
) {
    let rows = rows(row_len, span);
    let (row_len, n_rows) = (row_len as usize, rows.n as usize);
    whole.resize(row_len * n_rows, 0.0);
    let mut take = |n: usize| {
        let (taken, rest) = raw.split_at(n);
        *raw = rest;
        taken
    };
    match coded {
        Coded::Scaled {
            narrow,
            grid,
            scale_type,
            ..
        } => {
            let codes = take(row_len * n_rows);
            let first = grid.first_scale(rows.first);
            let end = grid.first_scale(rows.first + rows.n - 1) + grid.scale_cols;
            let n_scales = (end - first) as usize;
            factors.resize(n_scales, 0.0);
            quant::decode(
                *scale_type,
                take(n_scales * scale_type.block_bytes()),
                factors,
            );
            let each = codes
                .chunks_exact(row_len)
                .zip(whole.chunks_exact_mut(row_len));
            for (row, (codes, values)) in (rows.first..).zip(each) {
                let at = (grid.first_scale(row) - first) as usize;
                let scales = &factors[at..][..grid.scale_cols as usize];
                quant::dequantize(*narrow, codes, grid.block_cols as usize, scales, values);
            }
        }
        Coded::Affine {
            bits,
            group,
            scale_type,
            ..
        } => {
            let group = *group as usize;
            let n_groups = n_rows * (row_len / group);
            let codes = take(n_rows * row_len * *bits as usize / 8);
            factors.resize(2 * n_groups, 0.0);
            let n_bytes = n_groups * scale_type.block_bytes();
            let (scales, biases) = factors.split_at_mut(n_groups);
            quant::decode(*scale_type, take(n_bytes), scales);
            quant::decode(*scale_type, take(n_bytes), biases);
            let of_group = codes.chunks_exact(group * *bits as usize / 8);
            let groups = whole.chunks_exact_mut(group).zip(of_group);
            for ((values, codes), (scale, bias)) in groups.zip(scales.iter().zip(&*biases)) {
                unpack(*bits, codes, values);
                for value in values {
                    *value = *scale * *value + *bias;
                }
            }
        }
    }
    let skipped = (span.start - rows.first * row_len as u64) as usize;
    values.copy_from_slice(&whole[skipped..][..values.len()]);
}

/// Codes of `bits` bits each, one after another from the lowest bit of the first byte on.
fn unpack(bits: u32, codes: &[u8], values: &mut [f32]) {
    let mask = (1_u32 << bits) - 1;
    let (mut held, mut n_held) = (0_u32, 0);
    let mut bytes = codes.iter();
    for value in values {
        while n_held < bits {
            held |= u32::from(bytes.next().copied().unwrap_or(0)) << n_held;
            n_held += 8;
        }
        *value = (held & mask) as f32;
        held >>= bits;
        n_held -= bits;
    }
}

/// The rows that have some value of `span`.
fn rows(row_len: u64, span: Span) -> Rows {
    let first = span.start / row_len;
    let end = (span.start + span.n_values).div_ceil(row_len);
    Rows {
        first,
        n: end - first,
    }
}

fn piece(tensor: &SourceTensor, first_byte: u64, n_bytes: u64) -> Piece<'_> {
    (tensor, tensor.offset_bytes + first_byte, n_bytes as usize)
}

fn floats(tensor: &SourceTensor, block_type: BlockType, first: u64, n: u64) -> Piece<'_> {
    let bytes = block_type.block_bytes() as u64;
    piece(tensor, first * bytes, n * bytes)
}

#[cfg(test)]
mod tests {
    use quant::Narrow;

    use super::*;
    use crate::checkpoint::Dtype;
    use crate::grid::Grid;

    fn tensor(shape: &[u64], offset_bytes: u64) -> SourceTensor {
        SourceTensor {
            file: "f".to_owned(),
            dtype: Dtype::Coded,
            shape: shape.to_vec(),
            offset_bytes,
            size_bytes: 0,
        }
    }

    /// The values of a span, read from `file`.
    fn values(file: &[u8], of: &SourceTensor, coded: &Coded, row_len: u64, span: Span) -> Vec<f32> {
        let mut raw = Vec::new();
        for (_, at, len) in pieces(of, coded, row_len, span) {
            raw.extend(&file[at as usize..][..len]);
        }
        let mut values = vec![0.0; span.n_values as usize];
        let (mut whole, mut factors) = (Vec::new(), Vec::new());
        let mut left = raw.as_slice();
        decode(
            coded,
            row_len,
            span,
            &mut left,
            &mut values,
            &mut whole,
            &mut factors,
        );
        assert!(left.is_empty());
        values
    }

    #[test]
    fn codes_of_any_width_follow_each_other_bit_by_bit() {
        let codes: Vec<u8> = (0..64_u32).map(|i| (i * 89 + 7) as u8).collect();
        for bits in [2, 3, 4, 5, 6, 8] {
            let mut values = vec![0.0; 64];
            unpack(bits, &codes[..8 * bits as usize], &mut values);
            let bit = |at: u32| u32::from(codes[at as usize / 8] >> (at % 8) & 1);
            for (k, value) in (0..).zip(values) {
                let expected: u32 = (0..bits).map(|i| bit(k * bits + i) << i).sum();
                assert_eq!(value, expected as f32, "{bits} bits: {k}");
            }
        }
    }

    #[test]
    fn a_span_has_the_values_that_it_has_in_the_whole() {
        let file: Vec<u8> = (0..8192_u32).map(|i| (i * 31 % 97) as u8).collect();
        // Two matrices of 6 rows of 64 values.
        let shape = [2, 6, 64];
        let affine = Coded::Affine {
            bits: 3,
            group: 32,
            scales: tensor(&[2, 6, 2], 1000),
            biases: tensor(&[2, 6, 2], 1100),
            scale_type: BlockType::F16,
        };
        let scaled = Coded::Scaled {
            narrow: Narrow::E4M3,
            grid: Grid::of(&shape, &[2, 2, 2], Some([4, 40])).unwrap(),
            scales: tensor(&[2, 2, 2], 2000),
            scale_type: BlockType::F32,
        };
        for coded in [affine, scaled] {
            let of = tensor(&shape, 10);
            let span = |start, n_values| Span { start, n_values };
            let whole = values(&file, &of, &coded, 64, span(0, 768));
            for (start, n) in [
                (0, 64),
                (64, 128),
                (10, 20),
                (60, 10),
                (300, 200),
                (700, 68),
            ] {
                let part = values(&file, &of, &coded, 64, span(start, n));
                let (from, to) = (start as usize, (start + n) as usize);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&part), bits(&whole[from..to]), "{start} {n}");
            }
        }
    }
}
