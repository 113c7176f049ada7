//! What a forward pass does to single values and rows of them: exponentials, activations, softmax, sums of squares.
//!
//! Invariant: the same bits on every instruction set, and an element's result depends on no other element except through
//! a sum whose order is fixed: sixteen partial sums, sum i over the elements i, 16 + i, …, then [`Lanes::sum4`]'s order.

use crate::isa::{self, Isa};
use crate::lanes::{Lanes, N_LANES, abs};
use crate::product::GateActivation;
use crate::words::{Words, Work};

/// An elementwise function or a reduction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Function {
    Exp,
    Silu,
    GeluTanh,
}

/// Each element becomes `e^x`: within 2 units in the last place while the result is a normal f32, infinity above its
/// range, towards 0 below.
pub fn exp_in_place(values: &mut [f32]) {
    exp_in_place_with(isa::fastest(), values);
}

/// [`exp_in_place`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// When this CPU lacks `isa`.
pub fn exp_in_place_with(isa: Isa, values: &mut [f32]) {
    isa::run_lanes(isa, Map(Function::Exp, values));
}

/// Each element becomes `x / (1 + e^-x)`, which is x times its logistic sigmoid.
pub fn silu_in_place(values: &mut [f32]) {
    silu_in_place_with(isa::fastest(), values);
}

/// [`silu_in_place`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// When this CPU lacks `isa`.
pub fn silu_in_place_with(isa: Isa, values: &mut [f32]) {
    isa::run_lanes(isa, Map(Function::Silu, values));
}

/// Each element becomes `x / 2 * (1 + tanh(√(2/π) (x + 0.044715 x³)))`, the tanh form of GELU (Hendrycks and Gimpel,
/// <https://arxiv.org/abs/1606.08415>), computed as x times the sigmoid of twice the argument of tanh.
pub fn gelu_tanh_in_place(values: &mut [f32]) {
    gelu_tanh_in_place_with(isa::fastest(), values);
}

/// [`gelu_tanh_in_place`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// When this CPU lacks `isa`.
pub fn gelu_tanh_in_place_with(isa: Isa, values: &mut [f32]) {
    isa::run_lanes(isa, Map(Function::GeluTanh, values));
}

/// Each element of `gate` becomes what `activation` makes of it and the same element of `up`, with the bits of
/// [`multiply_gated`](crate::multiply_gated()).
///
/// # Panics
/// When there are not as many of one as of the other.
pub fn gate_in_place(activation: GateActivation, gate: &mut [f32], up: &[f32]) {
    gate_in_place_with(isa::fastest(), activation, gate, up);
}

/// [`gate_in_place`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`gate_in_place`], and when this CPU lacks `isa`.
pub fn gate_in_place_with(isa: Isa, activation: GateActivation, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "gates and what they let through");
    isa::run_lanes(isa, Gate(activation, gate, up));
}

/// The values become `e^(x - max)` over the sum of all of these. Elements at minus infinity become 0; where all are, or
/// where one is NaN or plus infinity, all become NaN.
pub fn softmax_in_place(values: &mut [f32]) {
    softmax_in_place_with(isa::fastest(), values);
}

/// [`softmax_in_place`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// When this CPU lacks `isa`.
pub fn softmax_in_place_with(isa: Isa, values: &mut [f32]) {
    isa::run_lanes(isa, Softmax(values));
}

/// The sum of the squares of `values`.
pub fn sum_of_squares(values: &[f32]) -> f32 {
    sum_of_squares_with(isa::fastest(), values)
}

/// [`sum_of_squares`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// When this CPU lacks `isa`.
pub fn sum_of_squares_with(isa: Isa, values: &[f32]) -> f32 {
    let mut sum = 0.0;
    isa::run_lanes(isa, SumOfSquares(values, &mut sum));
    sum
}

/// `e^x` in each lane.
///
/// With n the integer nearest to x / ln 2 and r = x - n ln 2 (ln 2 in two parts, so that r has few rounding errors), e^x
/// is 2^n times Taylor's polynomial of degree 7 in r, whose remainder is below 6e-9 for |r| up to ln 2 / 2.
#[inline(always)]
pub(crate) fn exp<L: Lanes>(x: L) -> L {
    // Beyond these the result is infinity or 0 in any case. A NaN is the second operand and stays.
    let x = L::splat(89.0).min(L::splat(-104.0).max(x));
    let n = (x * L::splat(std::f32::consts::LOG2_E)).round();
    // The upper part has 9 bits, so that its product with n is exact.
    let r = n.neg_mul_add(L::splat(355.0 / 512.0), x);
    let r = n.neg_mul_add(L::splat(-0.000_212_194_44), r);
    let mut p = L::splat(1.0 / 5040.0);
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p.mul_add(r, L::splat(coefficient));
    }
    // In two steps, because n reaches -150 and 128.
    let half = (n * L::splat(0.5)).round();
    p * half.power_of_two() * (n - half).power_of_two()
}

/// What `activation` makes of a gate and what it is to let through.
#[inline(always)]
pub(crate) fn gated<L: Lanes>(activation: GateActivation, gate: L, up: L) -> L {
    match activation {
        GateActivation::Silu => up * silu(gate),
        GateActivation::GeluTanh => up * gelu_tanh(gate),
        GateActivation::SwigluClamped => swiglu_clamped(gate, up),
    }
}

/// The limits are the first operand, so that a NaN stays.
#[inline(always)]
fn swiglu_clamped<L: Lanes>(gate: L, up: L) -> L {
    let limit = L::splat(7.0);
    let (gate, up) = (limit.min(gate), L::splat(-7.0).max(limit.min(up)));
    let one = L::splat(1.0);
    (up + one) * (gate / (one + exp(gate * L::splat(-1.702))))
}

#[inline(always)]
pub(crate) fn silu<L: Lanes>(x: L) -> L {
    x / (L::splat(1.0) + exp(L::splat(0.0) - x))
}

#[inline(always)]
pub(crate) fn gelu_tanh<L: Lanes>(x: L) -> L {
    // An error of the argument counts as often in the result as the argument is large, so it is rounded as seldom as can
    // be: x (a + b x²) with a = -2 √(2/π) and b = 0.044715 a, and what
    // a and the last product lose to rounding is made good.
    const A: f32 = -1.595_769_2;
    const A_REST: f32 = 4.534_068e-8;
    const B: f32 = -0.071_354_814;
    let zero = L::splat(0.0);
    let factor = (x * x).mul_add(L::splat(B), L::splat(A));
    let argument = factor * x;
    let rest = factor.mul_add(x, zero - argument);
    let rest = x.mul_add(L::splat(A_REST), rest);
    let rest = abs(argument).select_lt(L::splat(80.0), rest, zero);
    let one = L::splat(1.0);
    x / (one + exp(argument) * (one + rest))
}

/// Replaces values sixteen at a time; the last ones are filled up with zeros. A macro, because a function that is given
/// a function calls it, and each of its steps, where the compiler does not see the instruction set around them.
macro_rules! map {
    ($lanes:ty, $values:expr, $x:ident => $result:expr) => {{
        let (chunks, tail) = $values.as_chunks_mut::<N_LANES>();
        for chunk in chunks {
            let $x = <$lanes>::load(chunk);
            *chunk = $result.store();
        }
        if !tail.is_empty() {
            let mut whole = [0.0; N_LANES];
            whole[..tail.len()].copy_from_slice(tail);
            let $x = <$lanes>::load(&whole);
            tail.copy_from_slice(&$result.store()[..tail.len()]);
        }
    }};
}

/// Takes in values sixteen at a time; the last ones are filled up with `filler`.
#[inline(always)]
fn fold<L: Lanes>(values: &[f32], filler: f32, start: L, f: impl Fn(L, L) -> L) -> L {
    let (chunks, tail) = values.as_chunks::<N_LANES>();
    let mut folded = start;
    for chunk in chunks {
        folded = f(folded, L::load(chunk));
    }
    if !tail.is_empty() {
        let mut whole = [filler; N_LANES];
        whole[..tail.len()].copy_from_slice(tail);
        folded = f(folded, L::load(&whole));
    }
    folded
}

/// The sum of the lanes.
#[inline(always)]
fn sum<L: Lanes>(x: L) -> f32 {
    L::sum4([x; 4])[0]
}

struct Map<'a>(Function, &'a mut [f32]);

impl Work for Map<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        match self.0 {
            Function::Exp => map!(W::Lanes, self.1, x => exp(x)),
            Function::Silu => map!(W::Lanes, self.1, x => silu(x)),
            Function::GeluTanh => map!(W::Lanes, self.1, x => gelu_tanh(x)),
        }
    }
}

struct Gate<'a>(GateActivation, &'a mut [f32], &'a [f32]);

impl Work for Gate<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        let Gate(activation, gate, up) = self;
        let (ups, up_tail) = up.as_chunks::<N_LANES>();
        let (gates, gate_tail) = gate.as_chunks_mut::<N_LANES>();
        for (gate, up) in gates.iter_mut().zip(ups) {
            let (loaded, up) = (W::Lanes::load(gate), W::Lanes::load(up));
            *gate = gated(activation, loaded, up).store();
        }
        let (mut last_gate, mut last_up) = ([0.0; N_LANES], [0.0; N_LANES]);
        last_gate[..gate_tail.len()].copy_from_slice(gate_tail);
        last_up[..up_tail.len()].copy_from_slice(up_tail);
        let (last_gate, last_up) = (W::Lanes::load(&last_gate), W::Lanes::load(&last_up));
        let last = gated(activation, last_gate, last_up).store();
        gate_tail.copy_from_slice(&last[..gate_tail.len()]);
    }
}

struct Softmax<'a>(&'a mut [f32]);

impl Work for Softmax<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        let lowest = W::Lanes::splat(f32::NEG_INFINITY);
        let lanes = fold(self.0, f32::NEG_INFINITY, lowest, |a, x| x.max(a));
        let max = lanes.store().into_iter().fold(f32::NEG_INFINITY, f32::max);
        let max = W::Lanes::splat(max);
        map!(W::Lanes, self.0, x => exp(x - max));
        let zero = W::Lanes::splat(0.0);
        let total = W::Lanes::splat(sum(fold(self.0, 0.0, zero, |a, x| a + x)));
        map!(W::Lanes, self.0, x => (x / total));
    }
}

struct SumOfSquares<'a>(&'a [f32], &'a mut f32);

impl Work for SumOfSquares<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        let zero = W::Lanes::splat(0.0);
        *self.1 = sum(fold(self.0, 0.0, zero, |a, x: W::Lanes| x.mul_add(x, a)));
    }
}
