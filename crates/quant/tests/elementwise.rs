//! Elementwise functions and reductions: against f64, and the same bits on every instruction set.

use proptest::prelude::*;
use quant::{
    GateActivation, exp_in_place_with, gate_in_place_with, gelu_tanh_in_place_with, isas,
    silu_in_place_with, softmax_in_place_with, sum_of_squares_with,
};

type InPlace = fn(quant::Isa, &mut [f32]);

/// Values over the whole range in which a function is neither constant nor the identity.
fn grid() -> Vec<f32> {
    (-20_000..=20_000).map(|i| i as f32 * 0.0053).collect()
}

fn relative_error_max(f: InPlace, exact: impl Fn(f64) -> f64, smallest: f64) -> f64 {
    let x = grid();
    let mut y = x.clone();
    f(*isas().last().unwrap(), &mut y);
    x.iter()
        .zip(&y)
        .filter_map(|(x, y)| {
            let exact = exact(f64::from(*x));
            let is_normal = exact.abs() >= smallest && exact.abs() < f64::from(f32::MAX);
            is_normal.then(|| ((f64::from(*y) - exact) / exact).abs())
        })
        .fold(0.0, f64::max)
}

#[test]
fn exponentials_and_activations_are_exact_to_rounding() {
    let smallest = f64::from(f32::MIN_POSITIVE);
    let error = relative_error_max(exp_in_place_with, f64::exp, smallest);
    assert!(error < 1.2e-7, "exp: {error:e}");
    let error = relative_error_max(silu_in_place_with, |x| x / (1.0 + (-x).exp()), 1e-35);
    assert!(error < 3e-7, "silu: {error:e}");
    let gelu = |x: f64| {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
        x / (1.0 + (-2.0 * u).exp())
    };
    // The argument's rounding counts as often as it is large: 1e-6 holds where the value is not negligible.
    let error = relative_error_max(gelu_tanh_in_place_with, gelu, 1e-4);
    assert!(error < 1e-6, "gelu: {error:e}");
    let error = relative_error_max(gelu_tanh_in_place_with, gelu, 1e-30);
    assert!(error < 1e-5, "gelu far below: {error:e}");
}

#[test]
fn a_gate_is_its_definition_on_every_instruction_set() {
    // More than whole lanes, and values on both sides of the clamps.
    let gate: Vec<f32> = (-600..=600).map(|i| i as f32 * 0.021).collect();
    let up: Vec<f32> = (0..gate.len())
        .map(|i| ((i * 37) % 1201) as f32 * 0.017 - 10.0)
        .collect();
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let gelu = |x: f64| {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
        x * sigmoid(2.0 * u)
    };
    let exact = |activation, g: f64, u: f64| match activation {
        GateActivation::Silu => u * g * sigmoid(g),
        GateActivation::GeluTanh => u * gelu(g),
        GateActivation::SwigluClamped => {
            let g = g.min(7.0);
            (u.clamp(-7.0, 7.0) + 1.0) * g * sigmoid(1.702 * g)
        }
    };
    for isa in isas() {
        for activation in [
            GateActivation::Silu,
            GateActivation::GeluTanh,
            GateActivation::SwigluClamped,
        ] {
            let mut got = gate.clone();
            gate_in_place_with(isa, activation, &mut got, &up);
            for ((got, &g), &u) in got.iter().zip(&gate).zip(&up) {
                let expected = exact(activation, g.into(), u.into());
                let differs = (f64::from(*got) - expected).abs();
                assert!(
                    differs <= 2e-6 * expected.abs() + 1e-9,
                    "{activation:?} {isa:?} of {g} and {u}: {got}, expected {expected}"
                );
            }
            let mut nan = [f32::NAN, 1.0];
            gate_in_place_with(isa, activation, &mut nan, &[1.0, f32::NAN]);
            assert!(nan.iter().all(|x| x.is_nan()), "{activation:?} {isa:?}");
        }
    }
}

#[test]
fn the_ends_are_kept() {
    for isa in isas() {
        let mut x = [
            f32::NEG_INFINITY,
            -200.0,
            0.0,
            100.0,
            f32::INFINITY,
            f32::NAN,
        ];
        exp_in_place_with(isa, &mut x);
        assert_eq!(x[..5], [0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY]);
        assert!(x[5].is_nan());
        for f in [silu_in_place_with as InPlace, gelu_tanh_in_place_with] {
            let mut x = [0.0, 1000.0, -1000.0, f32::NAN, f32::INFINITY];
            f(isa, &mut x);
            assert_eq!(x[..3], [0.0, 1000.0, 0.0]);
            assert!(x[3].is_nan());
            assert_eq!(x[4], f32::INFINITY);
        }
        let mut x = [f32::NEG_INFINITY, 3.0, 3.0, f32::NEG_INFINITY];
        softmax_in_place_with(isa, &mut x);
        assert_eq!(x, [0.0, 0.5, 0.5, 0.0]);
        let mut x = [1.0, f32::NAN];
        softmax_in_place_with(isa, &mut x);
        assert!(x.iter().all(|x| x.is_nan()));
        softmax_in_place_with(isa, &mut []);
        assert_eq!(sum_of_squares_with(isa, &[]), 0.0);
    }
}

proptest! {
    #[test]
    fn all_instruction_sets_agree(x in prop::collection::vec(-120.0f32..120.0, 0..100)) {
        let functions: [InPlace; 4] =
            [exp_in_place_with, silu_in_place_with, gelu_tanh_in_place_with, softmax_in_place_with];
        for f in functions {
            let of = |isa| {
                let mut y = x.clone();
                f(isa, &mut y);
                y.iter().map(|y| y.to_bits()).collect::<Vec<_>>()
            };
            for isa in isas() {
                prop_assert_eq!(of(isa), of(isas()[0]), "{:?}", isa);
            }
        }
        let exact: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        for isa in isas() {
            let sum = sum_of_squares_with(isa, &x);
            prop_assert_eq!(sum.to_bits(), sum_of_squares_with(isas()[0], &x).to_bits());
            prop_assert!((f64::from(sum) - exact).abs() <= 1e-6 * exact);
        }
    }

    #[test]
    fn softmax_is_a_distribution(x in prop::collection::vec(-30.0f32..30.0, 1..300)) {
        let mut y = x.clone();
        softmax_in_place_with(*isas().last().unwrap(), &mut y);
        let max = x.iter().copied().fold(f32::MIN, f32::max);
        let total: f64 = x.iter().map(|x| f64::from(x - max).exp()).sum();
        for (x, y) in x.iter().zip(&y) {
            let exact = f64::from(x - max).exp() / total;
            prop_assert!((f64::from(*y) - exact).abs() <= 1e-6 * exact + 1e-40);
        }
    }
}
