//! Products against their definition in plain loops, on every instruction set, and against exact sums of real numbers.

use half::{bf16, f16};
use proptest::prelude::*;
use quant::{
    Activations, BlockType, Columns, GateActivation, Isa, Matrix, accumulate_rows_with, decode,
    encode, gate_in_place_with, isas, multiply_gated_with, multiply_with,
};

/// Weights as a test holds them.
#[derive(Clone, Debug)]
struct Weights {
    block_type: BlockType,
    n_rows: usize,
    n_cols: usize,
    bytes: Vec<u8>,
}

impl Weights {
    fn matrix(&self) -> Matrix<'_> {
        Matrix {
            block_type: self.block_type,
            n_rows: self.n_rows,
            n_cols: self.n_cols,
            bytes: &self.bytes,
        }
    }

    fn row(&self, row: usize) -> &[u8] {
        self.bytes
            .chunks(self.block_type.row_bytes(self.n_cols).unwrap())
            .nth(row)
            .unwrap()
    }
}

/// Bits `at..at + n` of a little-endian string of bits.
fn bits(b: &[u8], at: usize, n: usize) -> i32 {
    (0..n)
        .map(|i| i32::from(b[(at + i) / 8] >> ((at + i) % 8) & 1) << i)
        .sum()
}

fn f16_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// Integer scale, integer minimum and the integers of a group of weights.
type Group = (i32, i32, Vec<i32>);

/// A block's scale, its second scale, and its groups.
fn parts(block_type: BlockType, b: &[u8]) -> (f32, f32, Vec<Group>) {
    let nibble32 = |at: usize, i: usize| bits(b, 8 * (at + i % 16) + i / 16 * 4, 4);
    let nibble64 =
        |at: usize, i: usize| bits(b, 8 * (at + i / 64 * 32 + i % 32) + i % 64 / 32 * 4, 4);
    let scale_and_min = |g: usize| {
        if g < 4 {
            (bits(b, 8 * (4 + g), 6), bits(b, 8 * (8 + g), 6))
        } else {
            let upper = |from: usize| bits(b, 8 * (from + g - 4) + 6, 2) << 4;
            (
                bits(b, 8 * (8 + g), 4) | upper(4),
                bits(b, 8 * (8 + g) + 4, 4) | upper(8),
            )
        }
    };
    let one = |q: Vec<i32>| vec![(1, 0, q)];
    let d = f16_at(b, 0);
    match block_type {
        BlockType::Q8_0 => (
            d,
            0.0,
            one((0..32).map(|i| i32::from(b[2 + i] as i8)).collect()),
        ),
        BlockType::Q4_0 => (d, 0.0, one((0..32).map(|i| nibble32(2, i) - 8).collect())),
        BlockType::MXFP4 => {
            const TWICE: [i32; 8] = [0, 1, 2, 3, 4, 6, 8, 12];
            let q = |i| {
                let code = nibble32(1, i);
                TWICE[(code % 8) as usize] * (1 - code / 8 * 2)
            };
            let d = (f64::from(b[0]) - 128.0).exp2() as f32;
            (d, 0.0, one((0..32).map(q).collect()))
        }
        BlockType::Q4_1 => (
            d,
            f16_at(b, 2),
            one((0..32).map(|i| nibble32(4, i)).collect()),
        ),
        BlockType::Q5_0 => {
            let q = |i| nibble32(6, i) + (bits(b, 16 + i, 1) << 4) - 16;
            (d, 0.0, one((0..32).map(q).collect()))
        }
        BlockType::Q4_K | BlockType::Q5_K => {
            let q = |g: usize, i: usize| match block_type {
                BlockType::Q4_K => nibble64(16, 32 * g + i),
                _ => nibble64(48, 32 * g + i) + (bits(b, 8 * (16 + i) + g, 1) << 4),
            };
            let group = |g| {
                let (s, m) = scale_and_min(g);
                (s, m, (0..32).map(|i| q(g, i)).collect())
            };
            (d, f16_at(b, 2), (0..8).map(group).collect())
        }
        BlockType::Q6_K => {
            let q = |i: usize| {
                let (half, quarter, l) = (i / 128, i % 128 / 32, i % 32);
                let low = bits(
                    b,
                    8 * (64 * half + 32 * (quarter % 2) + l) + quarter / 2 * 4,
                    4,
                );
                let high = bits(b, 8 * (128 + 32 * half + l) + 2 * quarter, 2);
                low + 16 * high - 32
            };
            let scale = |g: usize| i32::from(b[192 + g] as i8);
            let group = |g| (scale(g), 0, (0..16).map(|i| q(16 * g + i)).collect());
            (f16_at(b, 208), 0.0, (0..16).map(group).collect())
        }
        _ => unreachable!("floats have no parts"),
    }
}

/// A block of activations as integers and their scale.
fn quantise(x: &[f32]) -> (Vec<i32>, f32) {
    let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    if !x.iter().all(|x| x.is_finite()) {
        (vec![0; x.len()], f32::NAN)
    } else if max < 1e-30 {
        (vec![0; x.len()], 0.0)
    } else {
        let q = |x: &f32| (x * (127.0 / max)).round_ties_even() as i32;
        (x.iter().map(q).collect(), max / 127.0)
    }
}

/// The definition of a product.
fn product(block_type: BlockType, row: &[u8], x: &[f32]) -> f32 {
    if block_type.block_len() == 1 {
        let mut w = vec![0.0; x.len()];
        decode(block_type, row, &mut w);
        let mut sums = [0.0f32; 16];
        let padded = x.len().next_multiple_of(16);
        for k in 0..padded {
            let (w, x) = (w.get(k).unwrap_or(&0.0), x.get(k).unwrap_or(&0.0));
            sums[k % 16] = w.mul_add(*x, sums[k % 16]);
        }
        for n in [8, 4, 2, 1] {
            for i in 0..n {
                sums[i] += sums[n + i];
            }
        }
        return sums[0];
    }
    let mut acc = 0.0f32;
    for (b, x) in row
        .chunks(block_type.block_bytes())
        .zip(x.chunks(block_type.block_len()))
    {
        let (d, m, groups) = parts(block_type, b);
        let (q, scale) = quantise(x);
        let (mut total, mut below) = (0, 0);
        for (g, (s, min, w)) in groups.iter().enumerate() {
            let q = &q[g * w.len()..][..w.len()];
            total += s * w.iter().zip(q).map(|(w, q)| w * q).sum::<i32>();
            below += min * q.iter().sum::<i32>();
        }
        acc = (d * scale).mul_add(total as f32, acc);
        match block_type {
            BlockType::Q4_1 => acc = (m * scale).mul_add(q.iter().sum::<i32>() as f32, acc),
            BlockType::Q4_K | BlockType::Q5_K => acc = (-(m * scale)).mul_add(below as f32, acc),
            _ => (),
        }
    }
    acc
}

/// Equal bits, where every NaN counts as the same.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

fn products(isa: Isa, w: &Weights, rows: std::ops::Range<usize>, x: &[f32]) -> Vec<f32> {
    let mut activations = Activations::new();
    activations.fill_with(isa, x, w.n_cols, &[w.block_type]);
    let mut out = vec![f32::MAX; rows.len() * activations.n_rows()];
    let n = rows.len();
    multiply_with(
        isa,
        &w.matrix(),
        rows,
        activations.all(),
        Columns::new(&mut out, n),
    );
    out
}

/// Any bytes as weights: all scales that a file can have, NaN and infinity too.
fn any_weights(n_rows_max: usize) -> impl Strategy<Value = Weights> {
    let shape = (
        prop::sample::select(&BlockType::ALL[..]),
        1..=n_rows_max,
        1usize..70,
    );
    shape.prop_flat_map(|(block_type, n_rows, n)| {
        let n_cols = match block_type.block_len() {
            1 => n,
            32 => 32 * (1 + n % 19),
            _ => 256 * (1 + n % 3),
        };
        let n_bytes = n_rows * block_type.row_bytes(n_cols).unwrap();
        prop::collection::vec(any::<u8>(), n_bytes).prop_map(move |bytes| Weights {
            block_type,
            n_rows,
            n_cols,
            bytes,
        })
    })
}

/// Activations from a seed: near normal, or with values that stand out.
fn activations(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n)
        .map(|_| {
            let x = (0..6).map(|_| uniform()).sum::<f32>();
            if uniform() > 0.49 { 30.0 * x } else { x }
        })
        .collect()
}

/// Weights of a model's kind in blocks.
fn encoded(block_type: BlockType, n_rows: usize, n_cols: usize, seed: u64) -> Weights {
    let values: Vec<f32> = activations(seed, n_rows * n_cols)
        .iter()
        .map(|x| 0.03 * x)
        .collect();
    let mut bytes = vec![0; n_rows * block_type.row_bytes(n_cols).unwrap()];
    encode(block_type, &values, &mut bytes);
    Weights {
        block_type,
        n_rows,
        n_cols,
        bytes,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_definition(
        w in any_weights(40),
        n in 1usize..20,
        seed in any::<u64>(),
        cut in any::<(prop::sample::Index, prop::sample::Index)>(),
    ) {
        let x = activations(seed, n * w.n_cols);
        let (a, b) = (cut.0.index(w.n_rows + 1), cut.1.index(w.n_rows + 1));
        let rows = a.min(b)..a.max(b).max(a.min(b) + 1).min(w.n_rows);
        let rows = if rows.is_empty() { 0..w.n_rows } else { rows };
        let expected: Vec<f32> = x
            .chunks(w.n_cols)
            .flat_map(|x| rows.clone().map(|r| product(w.block_type, w.row(r), x)).collect::<Vec<_>>())
            .collect();
        for isa in isas() {
            let got = products(isa, &w, rows.clone(), &x);
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                prop_assert!(
                    same(*got, *expected),
                    "{isa:?}, {}: product {i} is {got:e}, by definition {expected:e}",
                    w.block_type
                );
            }
        }
    }

    #[test]
    fn a_product_depends_on_its_two_rows_alone(
        w in any_weights(37),
        n in 1usize..=33,
        seed in any::<u64>(),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 1..40),
        cut in any::<prop::sample::Index>(),
    ) {
        let x = activations(seed, n * w.n_cols);
        let picks: Vec<u32> = picks.iter().map(|p| p.index(n) as u32).collect();
        let cut = cut.index(w.n_rows);
        for isa in isas() {
            let all = products(isa, &w, 0..w.n_rows, &x);
            for (i, x) in x.chunks(w.n_cols).enumerate() {
                let one = products(isa, &w, cut..w.n_rows, x);
                let of_all = &all[i * w.n_rows..][cut..w.n_rows];
                prop_assert!(one.iter().zip(of_all).all(|(a, b)| same(*a, *b)), "{isa:?} row {i}");
            }
            let mut prepared = Activations::new();
            prepared.fill_with(isa, &x, w.n_cols, &[w.block_type]);
            let mut picked = vec![0.0; picks.len() * w.n_rows];
            let (left, right) = Columns::new(&mut picked, w.n_rows).split_at(cut);
            multiply_with(isa, &w.matrix(), cut..w.n_rows, prepared.pick(&picks), right);
            if cut > 0 {
                multiply_with(isa, &w.matrix(), 0..cut, prepared.pick(&picks), left);
            }
            for (pick, got) in picks.iter().zip(picked.chunks(w.n_rows)) {
                let of_all = &all[*pick as usize * w.n_rows..][..w.n_rows];
                prop_assert!(got.iter().zip(of_all).all(|(a, b)| same(*a, *b)), "{isa:?} {pick}");
            }
        }
    }

    #[test]
    fn a_gated_product_is_its_composition(
        types in (prop::sample::select(&BlockType::ALL[..]), prop::sample::select(&BlockType::ALL[..])),
        n_rows in 1usize..40,
        n in 1usize..12,
        seed in any::<u64>(),
    ) {
        let gate = encoded(types.0, n_rows, 256, seed);
        let up = encoded(types.1, n_rows, 256, seed ^ 7);
        let x = activations(seed ^ 99, n * 256);
        for isa in isas() {
            let mut prepared = Activations::new();
            prepared.fill_with(isa, &x, 256, &[types.0, types.1]);
            for activation in [
                GateActivation::Silu,
                GateActivation::GeluTanh,
                GateActivation::SwigluClamped,
            ] {
                let mut expected = products(isa, &gate, 0..n_rows, &x);
                let ups = products(isa, &up, 0..n_rows, &x);
                gate_in_place_with(isa, activation, &mut expected, &ups);
                let mut out = vec![0.0; n * n_rows];
                let columns = Columns::new(&mut out, n_rows);
                multiply_gated_with(
                    isa, &gate.matrix(), &up.matrix(), 0..n_rows, prepared.all(), activation, columns,
                );
                prop_assert!(out.iter().zip(&expected).all(|(a, b)| same(*a, *b)), "{isa:?}");
            }
        }
    }

    #[test]
    fn rows_are_accumulated_in_their_order(
        kind in prop::sample::select(vec![BlockType::F32, BlockType::F16, BlockType::BF16]),
        n_rows in 0usize..20,
        n_cols in 1usize..200,
        seed in any::<u64>(),
    ) {
        let rows = encoded(kind, n_rows, n_cols, seed);
        let weights = activations(seed ^ 5, n_rows);
        let start = activations(seed ^ 6, n_cols);
        let mut expected = start.clone();
        for (weight, row) in weights.iter().zip(rows.bytes.chunks(kind.row_bytes(n_cols).unwrap())) {
            let mut values = vec![0.0; n_cols];
            decode(kind, row, &mut values);
            for (out, x) in expected.iter_mut().zip(&values) {
                *out = x.mul_add(*weight, *out);
            }
        }
        for isa in isas() {
            let mut out = start.clone();
            accumulate_rows_with(isa, &rows.matrix(), &weights, &mut out);
            prop_assert_eq!(&out, &expected, "{:?}", isa);
        }
    }
}

/// So many rows that they are taken in several goes.
#[test]
fn many_rows_are_divided_without_a_trace() {
    for block_type in BlockType::ALL {
        let (n_cols, n) = match block_type.block_len() {
            1 => (8200, 45),
            _ => (512, 150),
        };
        let w = encoded(block_type, 21, n_cols, 8);
        let x = activations(9, n * n_cols);
        for isa in isas() {
            let all = products(isa, &w, 0..21, &x);
            for i in [0, 7, 15, 16, 31, 44, n / 2, n - 1] {
                let one = products(isa, &w, 0..21, &x[i * n_cols..][..n_cols]);
                assert_eq!(all[i * 21..][..21], one, "{isa:?} {block_type} row {i}");
            }
        }
    }
}

/// The error of a product is at most that of rounding each activation to its 8 bits.
#[test]
fn products_are_as_exact_as_their_activations() {
    for block_type in BlockType::ALL {
        let (n_rows, n_cols, n) = (35, 2048, 9);
        let w = encoded(block_type, n_rows, n_cols, 11);
        let x = activations(12, n * n_cols);
        let mut decoded = vec![0.0; n_rows * n_cols];
        decode(block_type, &w.bytes, &mut decoded);
        let out = products(*isas().last().unwrap(), &w, 0..n_rows, &x);
        for (i, x) in x.chunks(n_cols).enumerate() {
            for (j, w) in decoded.chunks(n_cols).enumerate() {
                let exact: f64 = w
                    .iter()
                    .zip(x)
                    .map(|(w, x)| f64::from(*w) * f64::from(*x))
                    .sum();
                let bound: f64 = match block_type.block_len() {
                    1 => 0.0,
                    len => w
                        .chunks(len)
                        .zip(x.chunks(len))
                        .map(|(w, x)| {
                            let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                            let weights: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
                            0.5 * f64::from(max) / 127.0 * weights
                        })
                        .sum(),
                };
                let size: f64 = w.iter().zip(x).map(|(w, x)| f64::from((w * x).abs())).sum();
                let error = (f64::from(out[i * n_rows + j]) - exact).abs();
                // With minima the parts that cancel are larger than the products: hence 1e-5.
                assert!(
                    error <= bound + 1e-5 * size,
                    "{block_type}: error {error:e}, bound {bound:e}"
                );
            }
        }
    }
}

/// A row that is not finite gives NaN and leaves the others alone; huge, tiny and zero activations stay what they are.
#[test]
fn extreme_activations_are_told_and_contained() {
    for block_type in BlockType::ALL {
        let (n_rows, n_cols) = (17, 512);
        let w = encoded(block_type, n_rows, n_cols, 3);
        let plain = activations(4, n_cols);
        let with = |value: f32| {
            let mut x = plain.clone();
            x[300] = value;
            x
        };
        let rows = [
            plain.clone(),
            with(f32::NAN),
            with(f32::INFINITY),
            with(f32::NEG_INFINITY),
            with(f32::MAX),
            vec![f32::MIN_POSITIVE / 8.0; n_cols],
            vec![0.0; n_cols],
            plain.clone(),
        ];
        for isa in isas() {
            let out = products(isa, &w, 0..n_rows, &rows.concat());
            let out: Vec<&[f32]> = out.chunks(n_rows).collect();
            assert!(out[0].iter().all(|x| x.is_finite()));
            for (i, out) in out[1..4].iter().enumerate() {
                let is_told = |x: &f32| x.is_nan() || block_type.block_len() == 1 && !x.is_finite();
                assert!(
                    out.iter().all(is_told),
                    "{isa:?} {block_type} row {i}: {out:?}"
                );
            }
            assert!(out[4].iter().all(|x| !x.is_nan()));
            assert!(out[5].iter().all(|x| x.abs() < 1e-30));
            assert!(out[6].iter().all(|x| *x == 0.0));
            assert_eq!(out[7], out[0]);
        }
    }
}

/// The largest sums that bytes can make do not overflow: all integers and scales at their ends, activations all at ±127.
#[test]
fn the_largest_sums_fit() {
    for block_type in BlockType::ALL {
        if block_type.block_len() == 1 {
            continue;
        }
        let n_cols = 512;
        for (fill, sign) in [
            (0xff, 1.0),
            (0xff, -1.0),
            (0x80, 1.0),
            (0x80, -1.0),
            (0x7f, 1.0),
            (0, -1.0),
        ] {
            let mut w = Weights {
                block_type,
                n_rows: 16,
                n_cols,
                bytes: vec![fill; 16 * block_type.row_bytes(n_cols).unwrap()],
            };
            for block in w.bytes.chunks_mut(block_type.block_bytes()) {
                let at = if block_type == BlockType::Q6_K {
                    208
                } else {
                    0
                };
                block[at..at + 2].copy_from_slice(&f16::ONE.to_le_bytes());
            }
            let x = vec![sign; n_cols];
            let expected = product(block_type, w.row(0), &x);
            for isa in isas() {
                let out = products(isa, &w, 0..16, &x);
                assert!(
                    out.iter().all(|y| same(*y, expected)),
                    "{isa:?} {block_type} {fill}: {out:?}, {expected}"
                );
            }
        }
    }
}

#[test]
fn windows_of_columns_go_to_threads() {
    let mut values = vec![0.0f32; 3 * 10];
    let (left, right) = Columns::new(&mut values, 10).split_at(4);
    let (middle, right) = right.split_at(0);
    assert_eq!(
        (
            left.n_rows(),
            left.n_cols(),
            middle.n_cols(),
            right.n_cols()
        ),
        (3, 4, 0, 6)
    );
    std::thread::scope(|threads| {
        for (mut window, value) in [(left, 1.0), (middle, 2.0), (right, 3.0)] {
            threads.spawn(move || {
                for row in 0..window.n_rows() {
                    window.row_mut(row).fill(value + row as f32 * 10.0);
                }
            });
        }
    });
    for (row, values) in values.chunks(10).enumerate() {
        let base = row as f32 * 10.0;
        assert!(values[..4].iter().all(|x| *x == base + 1.0));
        assert!(values[4..].iter().all(|x| *x == base + 3.0));
    }
}

#[test]
fn floats_are_multiplied_as_floats() {
    let x = [1.0, -2.0, 0.5];
    let bytes: Vec<u8> = [3.0, 4.0, 6.0]
        .iter()
        .flat_map(|w| bf16::from_f32(*w).to_le_bytes())
        .collect();
    let w = Weights {
        block_type: BlockType::BF16,
        n_rows: 1,
        n_cols: 3,
        bytes,
    };
    for isa in isas() {
        assert_eq!(products(isa, &w, 0..1, &x), [-2.0]);
    }
}
