//! Rows of floats (F32, F16, BF16) times rows of activations, and weighted sums of rows.
//!
//! Invariant: a product has sixteen partial sums, sum i over the columns i, 16 + i, 32 + i, … in this order by fused
//! multiply-adds that begin at 0 (the last columns are filled up with zeros), and the sixteen are added in
//! [`Lanes::sum4`]'s order. An element of a weighted sum is one chain of fused multiply-adds over the rows.

use super::Matrix;
use super::activations::ActivationRows;
use crate::lanes::{Lanes, N_LANES};
use crate::words::Words;

/// Floats as they are stored.
pub(super) trait Floats {
    const BYTES: usize;
    /// Sixteen floats from `16 * BYTES` bytes.
    fn load<L: Lanes>(bytes: &[u8]) -> L;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct BF16;

impl Floats for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    fn load<L: Lanes>(bytes: &[u8]) -> L {
        let mut values = [0.0; N_LANES];
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
            *value = f32::from_le_bytes(*bytes);
        }
        L::load(&values)
    }
}

impl Floats for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    fn load<L: Lanes>(bytes: &[u8]) -> L {
        L::from_f16(&halves(bytes))
    }
}

impl Floats for BF16 {
    const BYTES: usize = 2;

    #[inline(always)]
    fn load<L: Lanes>(bytes: &[u8]) -> L {
        L::from_bf16(&halves(bytes))
    }
}

#[inline(always)]
fn halves(bytes: &[u8]) -> [u16; N_LANES] {
    let mut halves = [0; N_LANES];
    for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
        *half = u16::from_le_bytes(*bytes);
    }
    halves
}

/// Rows of weights, and rows of activations, that are multiplied at once.
pub(super) const N_SIDE: usize = 4;

/// A fourth of the activations that are multiplied with all weights before the next ones are looked at.
pub(super) const CACHED_VALUES: usize = 1 << 15;

/// The products of the rows `first_row..` of `w` and the activation rows `first..`, four of each; `[i][j]` is that of
/// activation row `first + i` and weight row `first_row + j`. Where there are fewer, the last one stands for the rest.
#[inline(always)]
pub(super) fn multiply_4x4<F: Floats, W: Words>(
    w: &Matrix<'_>,
    first_row: usize,
    x: &ActivationRows<'_>,
    first: usize,
) -> [[f32; N_SIDE]; N_SIDE] {
    let n = (x.n_rows() - first).min(N_SIDE);
    if W::N_AT_ONCE < N_SIDE {
        // Four by four sums would not stay in registers.
        let mut sums = [[0.0; N_SIDE]; N_SIDE];
        for (i, sums) in sums[..n].iter_mut().enumerate() {
            [*sums] = multiply_rows::<F, W, 1>(w, first_row, x, first + i);
        }
        return sums;
    }
    match n {
        1 => widen(multiply_rows::<F, W, 1>(w, first_row, x, first)),
        2 => widen(multiply_rows::<F, W, 2>(w, first_row, x, first)),
        _ => multiply_rows::<F, W, N_SIDE>(w, first_row, x, first),
    }
}

#[inline(always)]
fn widen<const N: usize>(sums: [[f32; N_SIDE]; N]) -> [[f32; N_SIDE]; N_SIDE] {
    let mut wide = [[0.0; N_SIDE]; N_SIDE];
    wide[..N].copy_from_slice(&sums);
    wide
}

#[inline(always)]
fn multiply_rows<F: Floats, W: Words, const N: usize>(
    w: &Matrix<'_>,
    first_row: usize,
    x: &ActivationRows<'_>,
    first: usize,
) -> [[f32; N_SIDE]; N] {
    let row_bytes = w.n_cols * F::BYTES;
    let mut weights: [&[u8]; N_SIDE] = [&[]; N_SIDE];
    for (j, weights) in weights.iter_mut().enumerate() {
        let row = (first_row + j).min(w.n_rows - 1);
        *weights = &w.bytes[row * row_bytes..][..row_bytes];
    }
    let mut values: [&[[f32; N_LANES]]; N] = [&[]; N];
    for (i, values) in values.iter_mut().enumerate() {
        *values = x.values((first + i).min(x.n_rows() - 1));
    }
    let zero = W::Lanes::splat(0.0);
    let mut sums = [[zero; N_SIDE]; N];
    let n_whole = w.n_cols / N_LANES;
    let (ahead, step_bytes) = (
        (first_row + N_SIDE) * row_bytes,
        N_SIDE * N_LANES * F::BYTES,
    );
    for k in 0..n_whole {
        // The rows that come next, in the order of memory.
        W::prefetch(w.bytes, ahead + k * step_bytes, step_bytes);
        let mut loaded = [zero; N_SIDE];
        for j in 0..N_SIDE {
            loaded[j] = F::load(&weights[j][k * N_LANES * F::BYTES..][..N_LANES * F::BYTES]);
        }
        for i in 0..N {
            let x = W::Lanes::load(&values[i][k]);
            for j in 0..N_SIDE {
                sums[i][j] = loaded[j].mul_add(x, sums[i][j]);
            }
        }
    }
    if !w.n_cols.is_multiple_of(N_LANES) {
        for j in 0..N_SIDE {
            let tail: W::Lanes =
                load_tail::<F, W::Lanes>(&weights[j][n_whole * N_LANES * F::BYTES..]);
            for i in 0..N {
                sums[i][j] = tail.mul_add(W::Lanes::load(&values[i][n_whole]), sums[i][j]);
            }
        }
    }
    let mut totals = [[0.0; N_SIDE]; N];
    for i in 0..N {
        totals[i] = W::Lanes::sum4(sums[i]);
    }
    totals
}

/// Fewer than sixteen floats, and zeros.
#[inline(always)]
fn load_tail<F: Floats, L: Lanes>(bytes: &[u8]) -> L {
    let mut whole = [0; N_LANES * 4];
    whole[..bytes.len()].copy_from_slice(bytes);
    F::load(&whole[..N_LANES * F::BYTES])
}

/// Adds `weights[p]` times row p of `rows` to `out`.
#[inline(always)]
pub(super) fn accumulate<F: Floats, L: Lanes>(rows: &Matrix<'_>, weights: &[f32], out: &mut [f32]) {
    let row_bytes = rows.n_cols * F::BYTES;
    let n_at_once = 4 * N_LANES;
    let mut at = 0;
    while at + n_at_once <= out.len() {
        let (target, _) = out[at..].as_chunks_mut::<N_LANES>();
        let mut sums = [L::splat(0.0); 4];
        for i in 0..4 {
            sums[i] = L::load(&target[i]);
        }
        for (&weight, row) in weights.iter().zip(rows.bytes.chunks_exact(row_bytes)) {
            let row = &row[at * F::BYTES..][..n_at_once * F::BYTES];
            let weight = L::splat(weight);
            for i in 0..4 {
                let values: L = F::load(&row[i * N_LANES * F::BYTES..][..N_LANES * F::BYTES]);
                sums[i] = values.mul_add(weight, sums[i]);
            }
        }
        for i in 0..4 {
            target[i] = sums[i].store();
        }
        at += n_at_once;
    }
    while at < out.len() {
        let n = (out.len() - at).min(N_LANES);
        let mut target = [0.0; N_LANES];
        target[..n].copy_from_slice(&out[at..at + n]);
        let mut sum = L::load(&target);
        for (&weight, row) in weights.iter().zip(rows.bytes.chunks_exact(row_bytes)) {
            let values: L = load_tail::<F, L>(&row[at * F::BYTES..][..n * F::BYTES]);
            sum = values.mul_add(L::splat(weight), sum);
        }
        out[at..at + n].copy_from_slice(&sum.store()[..n]);
        at += n;
    }
}
