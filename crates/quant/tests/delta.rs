//! The delta rule: against its formula in f64, and the same bits on every instruction set.

use quant::{DeltaRow, SLAB, delta_rule_with, isas};

/// Numbers within ±1 that look random.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

#[test]
fn rows_go_through_a_state_as_the_formula_says_on_every_instruction_set() {
    for key_length in [1, 3, 4, 7, 32, 128, 130] {
        let mut exact = vec![[0.0_f64; SLAB]; key_length];
        let mut slabs: Vec<_> = isas()
            .into_iter()
            .map(|isa| (isa, vec![[0.0_f32; SLAB]; key_length]))
            .collect();
        for t in 0..20 {
            let scale = 1.0 / (key_length as f32).sqrt();
            let key: Vec<f32> = numbers(key_length, 3 * t + 1);
            let key: Vec<f32> = key.iter().map(|x| x * scale).collect();
            let query = numbers(key_length, 3 * t + 2);
            let value = *numbers(SLAB, 3 * t + 3).first_chunk::<SLAB>().unwrap();
            let (decay, beta) = (0.9 + 0.005 * t as f32, 0.05 * t as f32);
            let row = DeltaRow {
                key: &key,
                query: &query,
                decay,
                beta,
            };
            let mut expected = [0.0_f64; SLAB];
            for j in 0..SLAB {
                exact.iter_mut().for_each(|s| s[j] *= f64::from(decay));
                let pairs = exact.iter().zip(&key);
                let recalled: f64 = pairs.map(|(s, &k)| s[j] * f64::from(k)).sum();
                let change = f64::from(beta) * (f64::from(value[j]) - recalled);
                for (s, &k) in exact.iter_mut().zip(&key) {
                    s[j] += f64::from(k) * change;
                }
                let pairs = exact.iter().zip(&query);
                expected[j] = pairs.map(|(s, &q)| s[j] * f64::from(q)).sum();
            }
            let mut first: Option<[f32; SLAB]> = None;
            for (isa, slab) in &mut slabs {
                let mut out = [f32::NAN; SLAB];
                delta_rule_with(*isa, slab, row, &value, &mut out);
                for (out, expected) in out.iter().zip(expected) {
                    let differs = (f64::from(*out) - expected).abs();
                    assert!(differs < 2e-5, "{isa:?}, {key_length}: {out} {expected}");
                }
                let first = first.get_or_insert(out);
                assert_eq!(first.map(f32::to_bits), out.map(f32::to_bits), "{isa:?}");
            }
            for (isa, slab) in &slabs[1..] {
                assert!(*slab == slabs[0].1, "{isa:?}, the state");
            }
        }
    }
}
