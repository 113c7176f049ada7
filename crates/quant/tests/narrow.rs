//! Narrow numbers on every instruction set against their definition, under all codes and many shapes.

use proptest::prelude::*;
use quant::{Narrow, dequantize_with, isas, round_to_bf16};

/// The value of a code by the words of the standards: sign, exponent, mantissa.
fn value(narrow: Narrow, code: u8) -> f64 {
    let float = |sign: u8, exponent: u8, mantissa: u8, n_mantissa: i32, bias: i32| {
        let fraction = f64::from(mantissa) / 2f64.powi(n_mantissa);
        let magnitude = match exponent {
            0 => fraction * 2f64.powi(1 - bias),
            e => (1.0 + fraction) * 2f64.powi(i32::from(e) - bias),
        };
        if sign == 0 { magnitude } else { -magnitude }
    };
    match narrow {
        Narrow::I8 => f64::from(code as i8),
        Narrow::E4M3 if code & 0x7f == 0x7f => f64::NAN,
        Narrow::E4M3 => float(code >> 7, code >> 3 & 15, code & 7, 3, 7),
        Narrow::E5M2 if code & 0x7f > 0x7c => f64::NAN,
        Narrow::E5M2 if code & 0x7f == 0x7c => float(code >> 7, 0, 1, 0, 0) * f64::INFINITY,
        Narrow::E5M2 => float(code >> 7, code >> 2 & 31, code & 3, 2, 15),
        Narrow::E8M0 if code == 255 => f64::NAN,
        Narrow::E8M0 => 2f64.powi(i32::from(code) - 127),
        Narrow::E2M1 => float(code >> 3, code >> 1 & 3, code & 1, 1, 1),
    }
}

fn same(got: f32, expected: f32) -> bool {
    got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan()
}

/// Value `i` of `codes` times its scale, in f32.
fn expected(narrow: Narrow, codes: &[u8], group: usize, scales: &[f32], i: usize) -> f32 {
    let code = match narrow {
        Narrow::E2M1 => codes[i / 2] >> (4 * (i % 2)) & 15,
        _ => codes[i],
    };
    value(narrow, code) as f32 * scales[i / group]
}

#[test]
fn every_code_has_the_value_of_its_definition() {
    let codes: Vec<u8> = (0..=255).collect();
    for narrow in Narrow::ALL {
        let n = 256 * narrow.values_per_byte();
        for isa in isas() {
            let mut values = vec![0.0; n];
            dequantize_with(isa, narrow, &codes, n, &[1.0], &mut values);
            for (i, &got) in values.iter().enumerate() {
                let expected = expected(narrow, &codes, n, &[1.0], i);
                assert!(
                    same(got, expected),
                    "{narrow:?} {isa:?} value {i}: {got}, not {expected}"
                );
            }
        }
    }
}

proptest! {
    #[test]
    fn each_group_has_its_own_scale(
        narrow in prop::sample::select(Narrow::ALL.to_vec()),
        codes in prop::collection::vec(any::<u8>(), 1..400),
        half_group in 1usize..150,
        seeds in prop::collection::vec(any::<u8>(), 400),
    ) {
        let group = 2 * half_group;
        let n = codes.len() * narrow.values_per_byte();
        let scales: Vec<f32> = seeds[..n.div_ceil(group)].iter().map(|&s| (f32::from(s) - 100.0) / 7.0).collect();
        for isa in isas() {
            let mut values = vec![0.0; n];
            dequantize_with(isa, narrow, &codes, group, &scales, &mut values);
            for (i, &got) in values.iter().enumerate() {
                prop_assert!(same(got, expected(narrow, &codes, group, &scales, i)), "{narrow:?} {isa:?} value {i}");
            }
        }
    }
}

#[test]
fn bf16_rounds_to_nearest_ties_to_even_and_keeps_nan() {
    let cases: [(u32, u16); 7] = [
        (0x3f80_8000, 0x3f80),
        (0x3f81_8000, 0x3f82),
        (0x3f80_8001, 0x3f81),
        (0x7f7f_ffff, 0x7f80),
        (0x0000_8001, 0x0001),
        (0x8000_0000, 0x8000),
        (0x0040_0000, 0x0040),
    ];
    for (bits, rounded) in cases {
        let mut bytes = [0; 2];
        round_to_bf16(&[f32::from_bits(bits)], &mut bytes);
        assert_eq!(u16::from_le_bytes(bytes), rounded, "{bits:08x}");
    }
    for nan in [0x7fff_ffffu32, 0x7f80_0001, 0xff80_0001] {
        let mut bytes = [0; 2];
        round_to_bf16(&[f32::from_bits(nan)], &mut bytes);
        let bits = u16::from_le_bytes(bytes);
        assert!(
            bits & 0x7f80 == 0x7f80 && bits & 0x7f != 0,
            "{nan:08x} became {bits:04x}"
        );
    }
}
