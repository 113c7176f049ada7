//! One row of a gated delta rule (Yang et al. 2024, <https://arxiv.org/abs/2412.06464>, equation 10), for sixteen columns
//! of the state at once.
//!
//! Columns of the state do not know of each other, so that a state is kept as *slabs* of sixteen columns, (key length,
//! 16) row-major each: a slab stays in the nearest cache while row after row goes through it.
//!
//! Invariant: the same bits on every instruction set. What a column becomes depends on that column and the row; the sum
//! over keys is four partial sums, sum i over the elements i, 4 + i, …, and `(sum 0 + sum 1) + (sum 2 + sum 3)`.

use crate::isa::{self, Isa};
use crate::lanes::{Lanes, N_LANES};
use crate::words::{Words, Work};

/// Columns of a slab.
pub const SLAB: usize = N_LANES;

/// What a row does to a state and asks of it.
#[derive(Clone, Copy, Debug)]
pub struct DeltaRow<'a> {
    /// (key length).
    pub key: &'a [f32],
    /// (key length).
    pub query: &'a [f32],
    /// What the state is multiplied by before anything else.
    pub decay: f32,
    /// How much of what the key brings is replaced.
    pub beta: f32,
}

/// `S = decay S; S += key (beta (value - S^T key))^T; out = S^T query`, with S the sixteen columns of `slab`.
///
/// # Panics
/// When `slab`, the key and the query are not equally long.
pub fn delta_rule(
    slab: &mut [[f32; SLAB]],
    row: DeltaRow<'_>,
    value: &[f32; SLAB],
    out: &mut [f32; SLAB],
) {
    delta_rule_with(isa::fastest(), slab, row, value, out);
}

/// [`delta_rule`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`delta_rule`], and when this CPU lacks `isa`.
pub fn delta_rule_with(
    isa: Isa,
    slab: &mut [[f32; SLAB]],
    row: DeltaRow<'_>,
    value: &[f32; SLAB],
    out: &mut [f32; SLAB],
) {
    assert_eq!(slab.len(), row.key.len(), "rows of a slab and of its key");
    assert_eq!(slab.len(), row.query.len(), "rows of a slab and its query");
    isa::run_lanes(isa, Step(slab, row, value, out));
}

struct Step<'a>(
    &'a mut [[f32; SLAB]],
    DeltaRow<'a>,
    &'a [f32; SLAB],
    &'a mut [f32; SLAB],
);

/// Partial sums.
const N_SUMS: usize = 4;

impl Work for Step<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        let Step(slab, row, value, out) = self;
        let splat = <W::Lanes as Lanes>::splat;
        let total = |sums: [W::Lanes; N_SUMS]| (sums[0] + sums[1]) + (sums[2] + sums[3]);
        let decay = splat(row.decay);
        let mut sums = [splat(0.0); N_SUMS];
        let (quads, rest) = slab.as_chunks::<N_SUMS>();
        let (keys, rest_keys) = row.key.as_chunks::<N_SUMS>();
        for (quad, keys) in quads.iter().zip(keys) {
            for i in 0..N_SUMS {
                sums[i] = W::Lanes::load(&quad[i]).mul_add(splat(keys[i]), sums[i]);
            }
        }
        for (i, (state, &key)) in rest.iter().zip(rest_keys).enumerate() {
            sums[i] = W::Lanes::load(state).mul_add(splat(key), sums[i]);
        }
        let recalled = total(sums) * decay;
        let change = splat(row.beta) * (W::Lanes::load(value) - recalled);
        let mut sums = [splat(0.0); N_SUMS];
        let (quads, rest) = slab.as_chunks_mut::<N_SUMS>();
        let (queries, rest_queries) = row.query.as_chunks::<N_SUMS>();
        for ((quad, keys), queries) in quads.iter_mut().zip(keys).zip(queries) {
            for i in 0..N_SUMS {
                let state = change.mul_add(splat(keys[i]), decay * W::Lanes::load(&quad[i]));
                sums[i] = state.mul_add(splat(queries[i]), sums[i]);
                quad[i] = state.store();
            }
        }
        let rest = rest.iter_mut().zip(rest_keys).zip(rest_queries);
        for (i, ((state, &key), &query)) in rest.enumerate() {
            let new = change.mul_add(splat(key), decay * W::Lanes::load(state));
            sums[i] = new.mul_add(splat(query), sums[i]);
            *state = new.store();
        }
        *out = total(sums).store();
    }
}
