//! Which values of a checkpoint tensor become a tensor of the vindex, and in which order: strides over the source.
//!
//! Invariant: a view names only values of its source, each at most once, and its length is known without walking it. What an
//! order means in words is said by [`Order`]; here it is said in numbers.

use crate::plan::Order;

/// Values that are read though nobody wants them rather than asking for two pieces: 64 KiB of a 16-bit checkpoint.
const GAP_VALUES: u64 = 32 << 10;

/// An array over the values of a source: element `(i, j, …)` is value `offset + i * stride_i + j * stride_j + …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    offset: u64,
    /// Size and stride, the slowest first. Neighbours that are one range of values are one dimension, and no size is 1.
    dims: Vec<(u64, u64)>,
}

/// Consecutive values of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) n_values: u64,
}

/// What `order` takes of a source with `n_values` values in rows of `row_len`: one view after another.
///
/// # Errors
/// A sentence about rows that are not as many as the order needs.
pub(super) fn views(order: &Order, n_values: u64, row_len: u64) -> Result<Vec<View>, String> {
    let n_rows = n_values / row_len.max(1);
    let whole = |n: u64, parts: u64, what: &str| {
        if parts == 0 || !n.is_multiple_of(parts) || n == 0 {
            return Err(format!("{n} {what} are not {parts} equal parts"));
        }
        Ok(n / parts)
    };
    let heads = |n_groups: u32, n_each: u32| {
        let n = u64::from(n_groups).checked_mul(n_each.into());
        n.ok_or("there are too many heads".to_owned())
    };
    Ok(match *order {
        Order::AsIs => vec![View::new(0, &[(n_values, 1)])],
        Order::InterleaveRope { n_heads } => {
            // Row i of a head's first half goes to row 2i, row i of the second half to 2i + 1: what is a pair at distance
            // of half a head becomes a pair of neighbours.
            let half = whole(n_rows, 2 * u64::from(n_heads), "rows")?;
            vec![View::new(
                0,
                &[
                    (n_heads.into(), 2 * half * row_len),
                    (half, row_len),
                    (2, half * row_len),
                    (row_len, 1),
                ],
            )]
        }
        Order::TileHeads {
            n_before,
            n_groups,
            n_each,
        } => {
            let rows = n_rows.saturating_sub(n_before);
            let head = whole(rows, heads(n_groups, n_each)?, "rows")? * row_len;
            let before = n_before * row_len;
            let mut views = vec![tiled(before, head, n_groups, n_each)];
            if before > 0 {
                views.insert(0, View::new(0, &[(before, 1)]));
            }
            views
        }
        Order::TileColumns { n_groups, n_each } => {
            let head = whole(row_len, heads(n_groups, n_each)?, "columns")?;
            let mut view = tiled(0, head, n_groups, n_each);
            view.dims.insert(0, (n_rows, row_len));
            vec![View::new(0, &view.dims)]
        }
        Order::Rows {
            n_blocks,
            ref ranges,
        } => {
            let block = whole(n_rows, n_blocks.into(), "rows")?;
            let of_range = |&[start, end]: &[u64; 2]| {
                if start >= end || end > block {
                    return Err(format!(
                        "a block of {block} rows has no rows {start}..{end}"
                    ));
                }
                let dims = [
                    (n_blocks.into(), block * row_len),
                    ((end - start) * row_len, 1),
                ];
                Ok(View::new(start * row_len, &dims))
            };
            ranges.iter().map(of_range).collect::<Result<_, String>>()?
        }
        Order::Alternate { first, row_len } => {
            let row_len = row_len.max(1);
            let pairs = whole(n_values / row_len, 2, "rows")?;
            vec![View::new(
                u64::from(first & 1) * row_len,
                &[(pairs, 2 * row_len), (row_len, 1)],
            )]
        }
        Order::Transposed {
            n_blocks,
            n_rows: taken,
        } => {
            let block = whole(n_rows, n_blocks.into(), "rows")?;
            if taken == 0 || taken > block {
                return Err(format!("a block of {block} rows has no {taken} rows"));
            }
            let dims = [
                (n_blocks.into(), block * row_len),
                (row_len, 1),
                (taken, row_len),
            ];
            vec![View::new(0, &dims)]
        }
        Order::TransposedAlternate { n_blocks, first } => {
            let block = whole(n_rows, n_blocks.into(), "rows")?;
            let half = whole(row_len, 2, "columns")?;
            let dims = [
                (n_blocks.into(), block * row_len),
                (half, 2),
                (block, row_len),
            ];
            vec![View::new(u64::from(first & 1), &dims)]
        }
    })
}

/// Heads of `head` values, in groups: the first of each group, then the second of each.
fn tiled(offset: u64, head: u64, n_groups: u32, n_each: u32) -> View {
    let (groups, each) = (u64::from(n_groups), u64::from(n_each));
    View::new(offset, &[(each, head), (groups, each * head), (head, 1)])
}

impl View {
    /// The first values of a source.
    pub(super) fn range(n_values: u64) -> View {
        View::new(0, &[(n_values, 1)])
    }

    fn new(offset: u64, dims: &[(u64, u64)]) -> View {
        let mut merged: Vec<(u64, u64)> = Vec::with_capacity(dims.len());
        for &(size, stride) in dims.iter().filter(|(size, _)| *size != 1) {
            match merged.last_mut() {
                Some((outer, outer_stride)) if *outer_stride == size * stride => {
                    *outer *= size;
                    *outer_stride = stride;
                }
                _ => merged.push((size, stride)),
            }
        }
        View {
            offset,
            dims: merged,
        }
    }

    /// Values of the view.
    pub(super) fn n_values(&self) -> u64 {
        self.dims.iter().map(|(size, _)| size).product()
    }

    /// The first value of the source that is used, and all to the last one.
    fn cover(&self) -> Span {
        let reach: u64 = self
            .dims
            .iter()
            .map(|(size, stride)| (size - 1) * stride)
            .sum();
        Span {
            start: self.offset,
            n_values: reach + 1,
        }
    }

    /// Pieces of about `max_values` values and whole multiples of `block_len`, in order. What lies between each other in
    /// short runs is not cut, since each part would read nearly all that the whole reads.
    pub(super) fn cut(&self, max_values: u64, block_len: u64, pieces: &mut Vec<View>) {
        let Some((&(size, stride), inner)) = self.dims.split_first() else {
            return pieces.push(self.clone());
        };
        let at = |i: u64| View {
            offset: self.offset + i * stride,
            dims: inner.to_vec(),
        };
        let (atom, reach) = (at(0).n_values(), at(0).cover().n_values);
        if self.n_values() <= max_values || (stride < reach && !self.has_long_runs()) {
            return pieces.push(self.clone());
        }
        if atom > max_values && atom.is_multiple_of(block_len) {
            return (0..size).for_each(|i| at(i).cut(max_values, block_len, pieces));
        }
        let whole_blocks = block_len / gcd(atom, block_len);
        let per_piece = (max_values / atom / whole_blocks).max(1) * whole_blocks;
        for i in (0..size).step_by(per_piece as usize) {
            let mut dims = vec![(per_piece.min(size - i), stride)];
            dims.extend(inner);
            pieces.push(View::new(self.offset + i * stride, &dims));
        }
    }

    /// Whether the values lie in runs that are worth reading on their own.
    fn has_long_runs(&self) -> bool {
        let run = self.dims.last();
        run.is_some_and(|&(size, stride)| stride == 1 && size > GAP_VALUES)
    }

    /// What has to be read of the source, in the order of the source: few pieces, and little that is not used.
    pub(super) fn spans(&self) -> Vec<Span> {
        let mut spans = Vec::new();
        self.add_spans(&mut spans);
        spans.sort_by_key(|span| span.start);
        let mut merged: Vec<Span> = Vec::with_capacity(spans.len());
        for span in spans {
            match merged.last_mut() {
                Some(last) if span.start <= last.start + last.n_values + GAP_VALUES => {
                    let end = (span.start + span.n_values).max(last.start + last.n_values);
                    last.n_values = end - last.start;
                }
                _ => merged.push(span),
            }
        }
        merged
    }

    fn add_spans(&self, spans: &mut Vec<Span>) {
        let (cover, n_values) = (self.cover(), self.n_values());
        let is_small = cover.n_values <= n_values + GAP_VALUES;
        if is_small || (cover.n_values <= 2 * n_values && !self.has_long_runs()) {
            return spans.push(cover);
        }
        let (size, stride) = self.dims[0];
        for i in 0..size {
            let inner = View {
                offset: self.offset + i * stride,
                dims: self.dims[1..].to_vec(),
            };
            inner.add_spans(spans);
        }
    }

    /// The same counted in blocks of `block_len` values; `None` when its runs are not whole blocks.
    pub(super) fn in_blocks(&self, block_len: u64) -> Option<View> {
        let (&(run, stride), outer) = self.dims.split_last()?;
        let mut dims: Vec<(u64, u64)> = Vec::new();
        for &(size, stride) in outer {
            dims.push((size, exact(stride, block_len)?));
        }
        dims.push((exact(run, block_len)?, stride));
        let offset = exact(self.offset, block_len)?;
        (stride == 1).then(|| View::new(offset, &dims))
    }

    /// True when the view is consecutive values of the source.
    pub(super) fn is_range(&self) -> bool {
        matches!(self.dims.as_slice(), [] | [(_, 1)])
    }

    /// Puts the values of the view into `out`, from `read`, which has those of `spans` one after another.
    pub(super) fn gather<T: Copy>(&self, spans: &[Span], read: &[T], out: &mut [T]) {
        // Where each span begins in `read`.
        let mut begins = Vec::with_capacity(spans.len());
        let mut at = 0;
        for span in spans {
            begins.push(at);
            at += span.n_values;
        }
        let place = |value: u64| {
            let k = spans.partition_point(|span| span.start <= value) - 1;
            (begins[k] + value - spans[k].start) as usize
        };
        let (outer, (n_run, run_stride)) = match self.dims.split_last() {
            Some((&run, outer)) => (outer, run),
            None => (&[][..], (1, 1)),
        };
        let mut index = vec![0u64; outer.len()];
        let mut start = self.offset;
        for out in out.chunks_exact_mut(n_run as usize) {
            if run_stride == 1 {
                let from = place(start);
                out.copy_from_slice(&read[from..from + out.len()]);
            } else if spans.len() == 1 {
                let from = place(start);
                let values = read[from..].iter().step_by(run_stride as usize);
                out.iter_mut().zip(values).for_each(|(out, v)| *out = *v);
            } else {
                for (i, out) in (0..).zip(out) {
                    *out = read[place(start + i * run_stride)];
                }
            }
            // The next element of the outer dimensions, the last of them fastest.
            for (i, &(size, stride)) in index.iter_mut().zip(outer).rev() {
                *i += 1;
                start += stride;
                if *i < size {
                    break;
                }
                start -= size * stride;
                *i = 0;
            }
        }
    }
}

/// `n / by` where nothing is left.
fn exact(n: u64, by: u64) -> Option<u64> {
    n.is_multiple_of(by).then_some(n / by)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `order` makes of `source`, cut into pieces of about `max_values`.
    fn applied(order: &Order, source: &[f32], row_len: u64, max_values: u64) -> Vec<f32> {
        let mut pieces = Vec::new();
        for view in views(order, source.len() as u64, row_len).unwrap() {
            view.cut(max_values, 1, &mut pieces);
        }
        let mut all = Vec::new();
        for piece in pieces {
            let spans = piece.spans();
            let read: Vec<f32> = spans
                .iter()
                .flat_map(|s| &source[s.start as usize..(s.start + s.n_values) as usize])
                .copied()
                .collect();
            let mut out = vec![f32::NAN; piece.n_values() as usize];
            piece.gather(&spans, &read, &mut out);
            if piece.is_range() {
                assert_eq!(read, out);
            }
            all.extend(out);
        }
        all
    }

    #[test]
    fn orders_are_what_they_say() {
        let source: Vec<f32> = (0u8..96).map(f32::from).collect();
        // 24 rows of 4.
        let rows = |order: &[u8]| -> Vec<f32> {
            let row = |&r: &u8| (0..4).map(move |c| f32::from(4 * r + c));
            order.iter().flat_map(row).collect()
        };
        let cases: [(Order, Vec<f32>); 9] = [
            (Order::AsIs, source.clone()),
            (
                Order::InterleaveRope { n_heads: 4 },
                rows(&[
                    0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11, 12, 15, 13, 16, 14, 17, 18, 21, 19, 22,
                    20, 23,
                ]),
            ),
            (
                Order::TileHeads {
                    n_before: 12,
                    n_groups: 2,
                    n_each: 3,
                },
                rows(&[
                    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17,
                    22, 23,
                ]),
            ),
            (
                Order::Rows {
                    n_blocks: 3,
                    ranges: vec![[4, 6], [0, 1]],
                },
                rows(&[4, 5, 12, 13, 20, 21, 0, 8, 16]),
            ),
            (
                Order::Alternate {
                    first: 1,
                    row_len: 4,
                },
                rows(&[1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]),
            ),
            (
                Order::Alternate {
                    first: 0,
                    row_len: 1,
                },
                (0u8..48).map(|i| f32::from(2 * i)).collect(),
            ),
            (
                Order::TileColumns {
                    n_groups: 2,
                    n_each: 2,
                },
                (0u8..24)
                    .flat_map(|r| [0, 2, 1, 3].map(|c| f32::from(4 * r + c)))
                    .collect(),
            ),
            (
                Order::Transposed {
                    n_blocks: 4,
                    n_rows: 2,
                },
                (0u8..4)
                    .flat_map(|b| (0..4).flat_map(move |c| [0, 1].map(|r| (6 * b + r) * 4 + c)))
                    .map(f32::from)
                    .collect(),
            ),
            (
                Order::TransposedAlternate {
                    n_blocks: 2,
                    first: 1,
                },
                (0u8..2)
                    .flat_map(|b| {
                        [1, 3]
                            .into_iter()
                            .flat_map(move |c| (0..12).map(move |r| (12 * b + r) * 4 + c))
                    })
                    .map(f32::from)
                    .collect(),
            ),
        ];
        for (order, expected) in cases {
            for max_values in [1, 7, 16, 1000] {
                let got = applied(&order, &source, 4, max_values);
                assert_eq!(got, expected, "{order:?} in pieces of {max_values}");
            }
        }
    }

    #[test]
    fn long_runs_are_read_alone_and_short_ones_with_what_is_between() {
        let experts = Order::Rows {
            n_blocks: 4,
            ranges: vec![[0, 100]],
        };
        let view = &views(&experts, 4 * 200 * 1000, 1000).unwrap()[0];
        let spans = view.spans();
        assert_eq!(spans.len(), 4, "{spans:?}");
        assert!(spans.iter().all(|s| s.n_values == 100 * 1000), "{spans:?}");
        let every_other = Order::Alternate {
            first: 0,
            row_len: 1000,
        };
        let view = &views(&every_other, 4 * 200 * 1000, 1000).unwrap()[0];
        assert_eq!(view.spans().len(), 1);
        let mut pieces = Vec::new();
        view.cut(50_000, 32, &mut pieces);
        // 48 rows of 1000 are whole blocks of 32, 50 are not.
        assert_eq!(pieces.len(), 9);
        assert!(pieces.iter().all(|p| p.n_values().is_multiple_of(32)));
    }

    #[test]
    fn what_does_not_divide_is_refused() {
        let cases = [
            Order::InterleaveRope { n_heads: 5 },
            Order::TileHeads {
                n_before: 25,
                n_groups: 1,
                n_each: 1,
            },
            Order::TileColumns {
                n_groups: 3,
                n_each: 1,
            },
            Order::Rows {
                n_blocks: 2,
                ranges: vec![[3, 13]],
            },
            Order::Transposed {
                n_blocks: 2,
                n_rows: 13,
            },
        ];
        for order in cases {
            assert!(views(&order, 96, 4).is_err(), "{order:?}");
        }
    }
}
