//! Rows of floats (F32, F16, BF16) times rows of activations, and weighted sums of rows.
//!
//! Invariant: a product has sixteen partial sums, sum i over the columns i, 16 + i, 32 + i, … in this order by fused
//! multiply-adds that begin at 0 (the last columns are filled up with zeros), and the sixteen are added in
//! [`Lanes::sum4`]'s order. An element of a weighted sum is one chain of fused multiply-adds over the rows.

use super::Matrix;
use super::activations::ActivationRows;
use crate::lanes::{Lanes, N_LANES};

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
        let words = bytes.as_chunks().0;
        L::load(&std::array::from_fn(|i| f32::from_le_bytes(words[i])))
    }
}

impl Floats for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    fn load<L: Lanes>(bytes: &[u8]) -> L {
        let halves = bytes.as_chunks().0;
        L::from_f16(&std::array::from_fn(|i| u16::from_le_bytes(halves[i])))
    }
}

impl Floats for BF16 {
    const BYTES: usize = 2;

    #[inline(always)]
    fn load<L: Lanes>(bytes: &[u8]) -> L {
        let halves = bytes.as_chunks().0;
        L::from_bf16(&std::array::from_fn(|i| u16::from_le_bytes(halves[i])))
    }
}

/// Rows of weights, and rows of activations, that are multiplied at once.
pub(super) const N_SIDE: usize = 4;

/// The products of the rows `first_row..` of `w` and the activation rows `first..`, four of each; `[i][j]` is that of
/// activation row `first + i` and weight row `first_row + j`. Where there are fewer, the last one stands for the rest.
#[inline(always)]
pub(super) fn multiply_4x4<F: Floats, L: Lanes>(
    w: &Matrix<'_>,
    first_row: usize,
    x: &ActivationRows<'_>,
    first: usize,
) -> [[f32; N_SIDE]; N_SIDE] {
    let n = (x.n_rows() - first).min(N_SIDE);
    match n {
        1 => widen(multiply_rows::<F, L, 1>(w, first_row, x, first)),
        2 => widen(multiply_rows::<F, L, 2>(w, first_row, x, first)),
        _ => multiply_rows::<F, L, N_SIDE>(w, first_row, x, first),
    }
}

#[inline(always)]
fn widen<const N: usize>(sums: [[f32; N_SIDE]; N]) -> [[f32; N_SIDE]; N_SIDE] {
    std::array::from_fn(|i| sums[i.min(N - 1)])
}

#[inline(always)]
fn multiply_rows<F: Floats, L: Lanes, const N: usize>(
    w: &Matrix<'_>,
    first_row: usize,
    x: &ActivationRows<'_>,
    first: usize,
) -> [[f32; N_SIDE]; N] {
    let row_bytes = w.n_cols * F::BYTES;
    let weights: [&[u8]; N_SIDE] = std::array::from_fn(|j| {
        &w.bytes[(first_row + j).min(w.n_rows - 1) * row_bytes..][..row_bytes]
    });
    let x: [&[[f32; N_LANES]]; N] =
        std::array::from_fn(|i| x.values((first + i).min(x.n_rows() - 1)));
    let zero = L::splat(0.0);
    let mut sums = [[zero; N_SIDE]; N];
    let n_whole = w.n_cols / N_LANES;
    for k in 0..n_whole {
        let bytes = k * N_LANES * F::BYTES..(k + 1) * N_LANES * F::BYTES;
        let loaded: [L; N_SIDE] = std::array::from_fn(|j| F::load(&weights[j][bytes.clone()]));
        for i in 0..N {
            let x = L::load(&x[i][k]);
            for j in 0..N_SIDE {
                sums[i][j] = loaded[j].mul_add(x, sums[i][j]);
            }
        }
    }
    if !w.n_cols.is_multiple_of(N_LANES) {
        for j in 0..N_SIDE {
            let tail: L = load_tail::<F, L>(&weights[j][n_whole * N_LANES * F::BYTES..]);
            for i in 0..N {
                sums[i][j] = tail.mul_add(L::load(&x[i][n_whole]), sums[i][j]);
            }
        }
    }
    std::array::from_fn(|i| L::sum4(sums[i]))
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
        let mut sums: [L; 4] = std::array::from_fn(|i| L::load(&target[i]));
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
