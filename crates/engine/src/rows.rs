//! Rows of f32 on their way through a layer: norms, sums, and products split over the pool.
//!
//! Invariant: a row's result depends on that row and the weights alone, however rows and columns are divided. Leaves out
//! which products a layer has.

use std::ops::Range;

use quant::{ActivationRows, Activations, BlockType, Columns, Matrix};

use crate::threads::Pool;

/// Tasks for each thread: one large, because each begins with weights that nobody has asked for yet, and some small,
/// so that a thread which began late does not keep the others waiting for long.
const TASKS_PER_THREAD: usize = 4;

/// What the large tasks have of all rows, in eighths.
const LARGE_EIGHTHS: usize = 6;

/// Rows of weights that the kernels take at once; a task has whole tiles.
const TILE: usize = 16;

/// Rows of activations in a task at least; fewer are not worth the way to another thread.
const ROWS_MIN: usize = 4;

/// Some rows of a matrix, and where their products go.
pub(crate) struct Part<'a> {
    pub(crate) w: Matrix<'a>,
    pub(crate) rows: Range<usize>,
    /// `(rows of activations, rows)`.
    pub(crate) out: Columns<'a>,
}

/// Cuts the product of `w` into tasks; `n_products` such products are computed together. `out` is `(rows of
/// activations, w.n_rows)`.
pub(crate) fn parts<'a>(
    w: Matrix<'a>,
    out: &'a mut [f32],
    n_products: usize,
    n_threads: usize,
) -> impl Iterator<Item = Part<'a>> {
    let n_tasks = (TASKS_PER_THREAD * n_threads).div_ceil(n_products.max(1));
    let mut rest = Some(Columns::new(out, w.n_rows));
    cuts(w.n_rows, n_tasks, n_threads).map(move |rows| {
        let columns = rest.take().expect("it is put back below");
        let (out, right) = columns.split_at(rows.len());
        rest = Some(right);
        Part { w, rows, out }
    })
}

/// `n_rows` rows in about `n_tasks` ranges of whole tiles, the large ones first.
fn cuts(n_rows: usize, n_tasks: usize, n_threads: usize) -> impl Iterator<Item = Range<usize>> {
    let tiles = |rows: usize| rows.next_multiple_of(TILE).max(TILE);
    let (n_large, large) = if n_threads == 1 {
        (1, n_rows)
    } else if n_tasks > n_threads {
        let large = n_rows * LARGE_EIGHTHS / 8 / n_threads / TILE * TILE;
        (n_threads, large)
    } else {
        (0, 0)
    };
    let n_small = n_tasks.saturating_sub(n_large).max(1);
    let small = tiles(n_rows.saturating_sub(n_large * large).div_ceil(n_small));
    let mut start = 0;
    let mut n_cut = 0;
    std::iter::from_fn(move || {
        if start == n_rows {
            return None;
        }
        let step = if n_cut < n_large && large > 0 {
            large
        } else {
            small
        };
        let rows = start..n_rows.min(start + step);
        (start, n_cut) = (rows.end, n_cut + 1);
        Some(rows)
    })
}

/// `out`, `(rows of x, w.n_rows)`: the products of every row of `w` with every row of `x`.
pub(crate) fn multiply(w: Matrix<'_>, x: ActivationRows<'_>, out: &mut [f32], pool: &Pool) {
    pool.for_each(parts(w, out, 1, pool.n_threads()), |part| {
        quant::multiply(&part.w, part.rows, x, part.out);
    });
}

/// Fewer activations are taken in by one thread: it is done with them before another has come.
const ACTIVATIONS_MIN: usize = 1 << 14;

/// [`Activations::fill`] on the threads of `pool`.
pub(crate) fn fill(
    activations: &mut Activations,
    x: &[f32],
    n_cols: usize,
    block_types: &[BlockType],
    pool: &Pool,
) {
    let n_parts = (x.len() / ACTIVATIONS_MIN).clamp(1, TASKS_PER_THREAD * pool.n_threads());
    let parts = activations.parts(x, n_cols, block_types, n_parts);
    pool.for_each(parts, |part| part.fill());
}

/// How many of `n_rows` rows make a task.
pub(crate) fn rows_per_task(n_rows: usize, n_threads: usize) -> usize {
    n_rows.div_ceil(TASKS_PER_THREAD * n_threads).max(ROWS_MIN)
}

/// `out = x / rms(x) * weight`, with `eps` added to the mean square (Zhang and Sennrich 2019). All are one row.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = rms_scale(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// [`rms_norm`] of a row in its place.
pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = rms_scale(x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

/// [`rms_norm_in_place`] with all weights 1.
pub(crate) fn rms_norm_unweighted_in_place(x: &mut [f32], eps: f32) {
    let scale = rms_scale(x, eps);
    x.iter_mut().for_each(|x| *x *= scale);
}

fn rms_scale(x: &[f32], eps: f32) -> f32 {
    1.0 / (quant::sum_of_squares(x) / x.len() as f32 + eps).sqrt()
}

/// Adds `term` to `sum`, element by element.
pub(crate) fn add(sum: &mut [f32], term: &[f32]) {
    for (sum, term) in sum.iter_mut().zip(term) {
        *sum += term;
    }
}

/// Adds `weight * term` to `sum`, element by element, in two roundings.
pub(crate) fn add_weighted(sum: &mut [f32], weight: f32, term: &[f32]) {
    for (sum, term) in sum.iter_mut().zip(term) {
        *sum += weight * term;
    }
}

/// `values` become `cap * tanh(values / cap)`; tanh x is computed as `1 - 2 / (e^2x + 1)`.
pub(crate) fn softcap(values: &mut [f32], cap: f32) {
    values.iter_mut().for_each(|x| *x *= 2.0 / cap);
    quant::exp_in_place(values);
    values
        .iter_mut()
        .for_each(|x| *x = cap * (1.0 - 2.0 / (*x + 1.0)));
}

/// `values` are multiplied by the sigmoid of `gates`, element by element; the gates are destroyed.
pub(crate) fn sigmoid_gate(values: &mut [f32], gates: &mut [f32]) {
    gates.iter_mut().for_each(|gate| *gate = -*gate);
    quant::exp_in_place(gates);
    for (value, gate) in values.iter_mut().zip(gates) {
        *value /= 1.0 + *gate;
    }
}

/// A buffer of `len` values, whatever was in it. It allocates only to hold more than ever before.
pub(crate) fn sized<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_into_whole_tiles_once_each() {
        for n_rows in [1, 15, 16, 17, 48, 100, 256, 1024, 3072, 151_936] {
            for n_threads in [1, 2, 3, 8, 64] {
                for n_tasks in [1, 2, 4 * n_threads] {
                    let cuts: Vec<Range<usize>> = cuts(n_rows, n_tasks, n_threads).collect();
                    let mut next = 0;
                    for cut in &cuts {
                        assert_eq!(cut.start, next, "{cuts:?}");
                        assert!(
                            !cut.is_empty() && cut.start.is_multiple_of(TILE),
                            "{cuts:?}"
                        );
                        next = cut.end;
                    }
                    assert_eq!(next, n_rows);
                    assert!(cuts.len() <= n_tasks.max(1) + n_threads, "{cuts:?}");
                }
            }
        }
    }
}
