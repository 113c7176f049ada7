//! Products of rows of weights with rows of activations, on weights as they lie in a file.
//!
//! Invariant: a product depends on its row of weights and its row of activations alone, to the last bit: neither on the
//! rows beside them, nor on how the caller divides the work, nor on the instruction set (a NaN may differ in its sign and
//! payload). Integer blocks are multiplied as integers with activations rounded to 8 bits (`activations.rs`, `kernel.rs`
//! define both to the bit); floats as floats (`dense.rs`).
//!
//! Left out: threads. A caller gives each thread a range of rows and the [`Columns`] of the output that belong to it.

mod activations;
mod by_row;
mod columns;
mod dense;
mod direct;
mod kernel;
mod panel;
mod tile;
mod unpack;

use std::ops::Range;

pub use activations::{ActivationRows, Activations, ActivationsPart};
pub use columns::Columns;

use crate::BlockType;
use crate::elementwise::gated;
use crate::isa::{self, Isa};
use crate::lanes::{Lanes, N_LANES};
use crate::words::{Words, Work};
use dense::{BF16, F16, F32, Floats, N_SIDE};
use panel::Panel;
use tile::{Format, N_ROWS, NO_COPY, Sums, multiply_tile};

/// A matrix of weights: `n_rows` rows of `n_cols` values, row-major, each row whole blocks. Needs no alignment.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// How the rows are stored.
    pub block_type: BlockType,
    /// Rows, which are the values of a result (`ne[1]` in GGUF's terms).
    pub n_rows: usize,
    /// Values in a row (`ne[0]` in GGUF's terms).
    pub n_cols: usize,
    /// The rows one after the other: `n_rows` times [`BlockType::row_bytes`] of `n_cols`.
    pub bytes: &'a [u8],
}

/// What a gate `g` makes of its up value `u`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateActivation {
    /// `u` times [`silu`](crate::silu_in_place()) of `g`.
    Silu,
    /// `u` times [`gelu_tanh`](crate::gelu_tanh_in_place()) of `g`.
    GeluTanh,
    /// `(u + 1) g / (1 + e^(-1.702 g))`, `g` being at most 7 and `u` within -7..=7: gpt-oss's
    /// (<https://github.com/openai/gpt-oss>, `swiglu` in `gpt_oss/torch/model.py`).
    SwigluClamped,
}

/// Products of the weight rows `rows` with each activation row: `out[i][j]` is that of row `rows.start + j` of `w` and the
/// `i`th row of `x`. Allocates nothing.
///
/// # Panics
/// When `w` has not the bytes that it says, `rows` ends beyond it, the widths of `w` and `x` differ, `x` was not filled
/// for this block type, or `out` is not (rows of `x`, `rows`).
pub fn multiply(w: &Matrix<'_>, rows: Range<usize>, x: ActivationRows<'_>, out: Columns<'_>) {
    multiply_with(isa::fastest(), w, rows, x, out);
}

/// [`multiply`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`multiply`], and when this CPU lacks `isa`.
pub fn multiply_with(
    isa: Isa,
    w: &Matrix<'_>,
    rows: Range<usize>,
    x: ActivationRows<'_>,
    out: Columns<'_>,
) {
    assert_shapes(w, &rows, &x, &out);
    dispatch(
        isa,
        w.block_type,
        Product {
            w,
            gate: None,
            rows,
            x,
            out,
        },
    );
}

/// The gated pair of a feed-forward layer in one pass: `out[i][j]` is what `activation` makes of `gate row · x_i` and
/// `up row · x_i` for row `rows.start + j` of both matrices, with the bits of the two [`multiply`] and
/// [`gate_in_place`](crate::gate_in_place()). Allocates nothing.
///
/// # Panics
/// As [`multiply`], for both matrices, and when their shapes differ.
pub fn multiply_gated(
    gate: &Matrix<'_>,
    up: &Matrix<'_>,
    rows: Range<usize>,
    x: ActivationRows<'_>,
    activation: GateActivation,
    out: Columns<'_>,
) {
    multiply_gated_with(isa::fastest(), gate, up, rows, x, activation, out);
}

/// [`multiply_gated`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`multiply_gated`], and when this CPU lacks `isa`.
pub fn multiply_gated_with(
    isa: Isa,
    gate: &Matrix<'_>,
    up: &Matrix<'_>,
    rows: Range<usize>,
    x: ActivationRows<'_>,
    activation: GateActivation,
    mut out: Columns<'_>,
) {
    assert_shapes(gate, &rows, &x, &out);
    assert_shapes(up, &rows, &x, &out);
    // The gate's products first, then each is replaced while the products of up are written.
    dispatch(
        isa,
        gate.block_type,
        Product {
            w: gate,
            gate: None,
            rows: rows.clone(),
            x,
            out: out.reborrow(),
        },
    );
    dispatch(
        isa,
        up.block_type,
        Product {
            w: up,
            gate: Some(activation),
            rows,
            x,
            out,
        },
    );
}

/// Adds to `out` (n_cols) the sum of `weights[p]` times row p of `rows`, which are F32, F16 or BF16: attention's values.
/// Each element is one chain of fused multiply-adds over the rows, beginning at what is there. Allocates nothing.
///
/// # Panics
/// When the sizes disagree or the rows are integer blocks.
pub fn accumulate_rows(rows: &Matrix<'_>, weights: &[f32], out: &mut [f32]) {
    accumulate_rows_with(isa::fastest(), rows, weights, out);
}

/// [`accumulate_rows`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`accumulate_rows`], and when this CPU lacks `isa`.
pub fn accumulate_rows_with(isa: Isa, rows: &Matrix<'_>, weights: &[f32], out: &mut [f32]) {
    assert_bytes(rows);
    assert_eq!(rows.n_rows, weights.len(), "rows and weights");
    assert_eq!(rows.n_cols, out.len(), "columns and values of the output");
    assert_eq!(
        rows.block_type.block_len(),
        1,
        "{} rows cannot be accumulated",
        rows.block_type
    );
    isa::run_lanes(isa, Accumulate { rows, weights, out });
}

fn assert_bytes(w: &Matrix<'_>) {
    let n_bytes = w
        .block_type
        .row_bytes(w.n_cols)
        .and_then(|n| n.checked_mul(w.n_rows));
    assert_eq!(
        n_bytes,
        Some(w.bytes.len()),
        "{} rows of {} values in {} blocks do not take {} bytes",
        w.n_rows,
        w.n_cols,
        w.block_type,
        w.bytes.len()
    );
}

fn assert_shapes(w: &Matrix<'_>, rows: &Range<usize>, x: &ActivationRows<'_>, out: &Columns<'_>) {
    assert_bytes(w);
    x.assert_filled_for(w.block_type);
    assert_eq!(
        w.n_cols,
        x.n_cols(),
        "values in rows of weights and of activations"
    );
    assert!(
        rows.start <= rows.end && rows.end <= w.n_rows,
        "rows {rows:?} are beyond {} rows of weights",
        w.n_rows
    );
    assert_eq!(
        rows.len(),
        out.n_cols(),
        "rows of weights and columns of the output"
    );
    assert_eq!(
        x.n_rows(),
        out.n_rows(),
        "rows of activations and of the output"
    );
}

/// Products that are written to `out`, or, with a gate, `out` holds the gate's products and gets the result.
struct Product<'a, 'b> {
    w: &'a Matrix<'b>,
    gate: Option<GateActivation>,
    rows: Range<usize>,
    x: ActivationRows<'a>,
    out: Columns<'a>,
}

fn dispatch(isa: Isa, block_type: BlockType, product: Product<'_, '_>) {
    match block_type {
        BlockType::F32 => isa::run_lanes(isa, DenseProduct(product, F32)),
        BlockType::F16 => isa::run_lanes(isa, DenseProduct(product, F16)),
        BlockType::BF16 => isa::run_lanes(isa, DenseProduct(product, BF16)),
        BlockType::Q8_0 => isa::run(isa, TiledProduct(product, tile::Q8_0)),
        BlockType::Q5_0 => isa::run(isa, TiledProduct(product, tile::Q5_0)),
        BlockType::Q5_K => isa::run(isa, TiledProduct(product, tile::Q5_K)),
        BlockType::Q4_0 => isa::run(isa, TiledProduct(product, tile::Q4_0)),
        BlockType::Q4_1 => isa::run(isa, TiledProduct(product, tile::Q4_1)),
        BlockType::MXFP4 => isa::run(isa, TiledProduct(product, tile::MXFP4)),
        BlockType::Q4_K => isa::run(isa, TiledProduct(product, tile::Q4_K)),
        BlockType::Q6_K => isa::run(isa, TiledProduct(product, tile::Q6_K)),
    }
}

struct TiledProduct<'a, 'b, F>(Product<'a, 'b>, F);

impl<F: Format> Work for TiledProduct<'_, '_, F> {
    #[inline(always)]
    fn run<W: Words>(self) {
        let Product {
            w,
            gate,
            rows,
            x,
            mut out,
        } = self.0;
        let mut panel = Panel::<W>::new();
        let mut copy = NO_COPY;
        let mut sums: Sums<W> = [W::Lanes::splat(0.0); N_ROWS];
        for first in (0..x.n_rows()).step_by(N_ROWS) {
            let n = (x.n_rows() - first).min(N_ROWS);
            for tile in rows.clone().step_by(N_LANES) {
                multiply_tile::<F, W>(
                    w,
                    tile,
                    &x,
                    first..first + n,
                    &mut panel,
                    &mut copy,
                    &mut sums,
                );
                let (column, n_here) = (tile - rows.start, (rows.end - tile).min(N_LANES));
                for (i, sums) in sums[..n].iter().enumerate() {
                    let target = &mut out.row_mut(first + i)[column..][..n_here];
                    write(gate, *sums, target);
                }
            }
        }
    }
}

struct DenseProduct<'a, 'b, F>(Product<'a, 'b>, F);

impl<F: Floats> Work for DenseProduct<'_, '_, F> {
    #[inline(always)]
    fn run<W: Words>(self) {
        let Product {
            w,
            gate,
            rows,
            x,
            mut out,
        } = self.0;
        // Few enough rows of activations that they stay in the second cache while the weights go by.
        let n_at_once = (dense::CACHED_VALUES / w.n_cols.max(1)).max(1) * N_SIDE;
        for chunk in (0..x.n_rows()).step_by(n_at_once) {
            let chunk = chunk..(chunk + n_at_once).min(x.n_rows());
            for row in rows.clone().step_by(N_SIDE) {
                let (column, n_here) = (row - rows.start, (rows.end - row).min(N_SIDE));
                for first in chunk.clone().step_by(N_SIDE) {
                    let sums = dense::multiply_4x4::<F, W>(w, row, &x, first);
                    let n = (chunk.end - first).min(N_SIDE);
                    for (i, sums) in sums[..n].iter().enumerate() {
                        let target = &mut out.row_mut(first + i)[column..][..n_here];
                        match gate {
                            None => target.copy_from_slice(&sums[..n_here]),
                            Some(_) => {
                                let mut whole = [0.0; N_LANES];
                                whole[..N_SIDE].copy_from_slice(sums);
                                write(gate, W::Lanes::load(&whole), target);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The first of `products` become `target`, or, with a gate, are multiplied with what the gate makes of `target`.
#[inline(always)]
fn write<L: Lanes>(gate: Option<GateActivation>, products: L, target: &mut [f32]) {
    let products = match gate {
        None => products,
        Some(activation) => {
            let mut gates = [0.0; N_LANES];
            gates[..target.len()].copy_from_slice(target);
            let gates = L::load(&gates);
            gated(activation, gates, products)
        }
    };
    match target.as_mut_array::<N_LANES>() {
        Some(target) => *target = products.store(),
        None => target.copy_from_slice(&products.store()[..target.len()]),
    }
}

struct Accumulate<'a, 'b> {
    rows: &'a Matrix<'b>,
    weights: &'a [f32],
    out: &'a mut [f32],
}

impl Work for Accumulate<'_, '_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        let Accumulate { rows, weights, out } = self;
        match rows.block_type {
            BlockType::F16 => dense::accumulate::<F16, W::Lanes>(rows, weights, out),
            BlockType::BF16 => dense::accumulate::<BF16, W::Lanes>(rows, weights, out),
            _ => dense::accumulate::<F32, W::Lanes>(rows, weights, out),
        }
    }
}
