//! Every encoder on random weights: the same bytes on each instruction set, and little lost.

mod distributions;

use half::{bf16, f16};
use proptest::prelude::*;
use quant::{BlockType, decode, encode, encode_with, isas};

use distributions::{shape, values};

fn encoded(block_type: BlockType, x: &[f32]) -> Vec<u8> {
    let mut blocks = vec![0; block_type.row_bytes(x.len()).unwrap()];
    encode(block_type, x, &mut blocks);
    blocks
}

fn decoded(block_type: BlockType, blocks: &[u8], n: usize) -> Vec<f32> {
    let mut x = vec![0.0; n];
    decode(block_type, blocks, &mut x);
    x
}

fn squared_error(x: &[f32], y: &[f32]) -> f64 {
    x.iter()
        .zip(y)
        .map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2))
        .sum()
}

fn through_f16(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// What a plain encoder makes of a block: scales that just span the values, rounded as the block stores them.
fn plain(block_type: BlockType, x: &[f32]) -> Vec<f32> {
    let nearest = |x: f32, scale: f32, low: f32, high: f32| {
        if scale == 0.0 {
            0.0
        } else {
            scale * (x / scale).round_ties_even().clamp(low, high)
        }
    };
    let largest = |x: &[f32]| {
        x.iter()
            .fold(0.0f32, |m, x| if x.abs() > m.abs() { *x } else { m })
    };
    let signed = |low: f32, high: f32| {
        let d = through_f16(largest(x) / low);
        x.iter().map(|x| nearest(*x, d, low, high)).collect()
    };
    let bounds = |x: &[f32]| {
        (
            x.iter().copied().fold(f32::MAX, f32::min),
            x.iter().copied().fold(f32::MIN, f32::max),
        )
    };
    match block_type {
        BlockType::Q8_0 => signed(-127.0, 127.0),
        BlockType::Q5_0 => signed(-16.0, 15.0),
        BlockType::Q4_0 => signed(-8.0, 7.0),
        BlockType::Q4_1 => {
            let (low, high) = bounds(x);
            let (d, m) = (through_f16((high - low) / 15.0), through_f16(low));
            x.iter().map(|x| nearest(x - m, d, 0.0, 15.0) + m).collect()
        }
        BlockType::MXFP4 => {
            // The scale of OCP MX: the largest number is four to eight times as large.
            let scale = (largest(x).abs().log2().floor() - 2.0).exp2();
            let numbers = [0.0f32, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
            x.iter()
                .map(|x| {
                    let near = |n: &f32| (x.abs() - n * scale).abs();
                    let n = numbers.iter().min_by(|a, b| near(a).total_cmp(&near(b)));
                    (n.unwrap() * scale).copysign(*x)
                })
                .collect()
        }
        BlockType::Q4_K | BlockType::Q5_K => {
            let q_max = if block_type == BlockType::Q4_K {
                15.0
            } else {
                31.0
            };
            let lines: Vec<(f32, f32)> = x
                .chunks(32)
                .map(|group| {
                    let (low, high) = bounds(group);
                    let low = low.min(0.0);
                    ((high - low) / q_max, -low)
                })
                .collect();
            let d = through_f16(lines.iter().map(|l| l.0).fold(0.0, f32::max) / 63.0);
            let dm = through_f16(lines.iter().map(|l| l.1).fold(0.0, f32::max) / 63.0);
            x.chunks(32)
                .zip(lines)
                .flat_map(|(group, (scale, offset))| {
                    let (scale, offset) =
                        (nearest(scale, d, 0.0, 63.0), nearest(offset, dm, 0.0, 63.0));
                    group
                        .iter()
                        .map(move |x| nearest(x + offset, scale, 0.0, q_max) - offset)
                })
                .collect()
        }
        BlockType::Q6_K => {
            let scales: Vec<f32> = x.chunks(16).map(|group| largest(group) / -32.0).collect();
            let d = through_f16(largest(&scales) / -128.0);
            x.chunks(16)
                .zip(scales)
                .flat_map(|(group, scale)| {
                    let scale = nearest(scale, d, -128.0, 127.0);
                    group.iter().map(move |x| nearest(*x, scale, -32.0, 31.0))
                })
                .collect()
        }
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => unreachable!("not an integer block"),
    }
}

const INTEGER_BLOCKS: [BlockType; 8] = [
    BlockType::Q8_0,
    BlockType::Q5_0,
    BlockType::Q5_K,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::MXFP4,
    BlockType::Q4_K,
    BlockType::Q6_K,
];

fn assert_same_bytes_on_all(block_type: BlockType, x: &[f32]) {
    let expected = encoded(block_type, x);
    for isa in isas() {
        let mut blocks = vec![0xaa; expected.len()];
        encode_with(isa, block_type, x, &mut blocks);
        assert!(blocks == expected, "{block_type} on {isa:?} differs");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn all_instruction_sets_give_the_same_bytes(
        shape in shape(), exponent in -40.0f32..12.0, seed: u64, n_blocks in 1usize..40,
    ) {
        for block_type in BlockType::ALL {
            let n = if block_type.block_len() == 256 { n_blocks.div_ceil(8) } else { n_blocks } * block_type.block_len();
            assert_same_bytes_on_all(block_type, &values(shape, exponent.exp2(), seed, n));
        }
    }

    #[test]
    fn any_f32_is_encoded_alike_and_to_finite_values(bits in prop::collection::vec(any::<u32>(), 512)) {
        let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        for block_type in BlockType::ALL {
            assert_same_bytes_on_all(block_type, &x);
        }
        for block_type in INTEGER_BLOCKS {
            let y = decoded(block_type, &encoded(block_type, &x), x.len());
            prop_assert!(y.iter().all(|y| y.is_finite()), "{}", block_type);
        }
    }

    #[test]
    fn less_is_lost_than_by_a_plain_encoder(shape in shape(), exponent in -24.0f32..8.0, seed: u64) {
        let x = values(shape, exponent.exp2(), seed, 8 * 256);
        for block_type in INTEGER_BLOCKS {
            let y = decoded(block_type, &encoded(block_type, &x), x.len());
            let z: Vec<f32> = x.chunks(block_type.block_len()).flat_map(|x| plain(block_type, x)).collect();
            let (ours, theirs) = (squared_error(&x, &y), squared_error(&x, &z));
            prop_assert!(ours <= theirs * 1.0001, "{}: {} > {}", block_type, ours, theirs);
        }
    }

    #[test]
    fn floats_are_rounded_to_nearest_even(bits in prop::collection::vec(any::<u32>(), 1..100)) {
        let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let f16s: Vec<u8> = x.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        let bf16s: Vec<u8> = x.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        let f32s: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        prop_assert_eq!(encoded(BlockType::F16, &x), f16s);
        prop_assert_eq!(encoded(BlockType::BF16, &x), bf16s);
        prop_assert_eq!(encoded(BlockType::F32, &x), f32s);
    }

    #[test]
    fn what_was_decoded_encodes_to_itself(shape in shape(), exponent in -8.0f32..8.0, seed: u64) {
        let x = values(shape, exponent.exp2(), seed, 512);
        for block_type in [BlockType::F32, BlockType::F16, BlockType::BF16, BlockType::Q8_0] {
            let blocks = encoded(block_type, &x);
            let again = encoded(block_type, &decoded(block_type, &blocks, x.len()));
            for (block, again) in blocks.chunks(block_type.block_bytes()).zip(again.chunks(block_type.block_bytes())) {
                // A subnormal f16 scale may be too coarse for the block's largest value to reach 127.
                let is_coarse = block_type == BlockType::Q8_0 && block[1] & 0x7c == 0;
                prop_assert!(again == block || is_coarse, "{}", block_type);
            }
        }
    }
}

#[test]
fn zeros_stay_zeros_and_not_a_number_counts_as_zero() {
    for block_type in INTEGER_BLOCKS {
        for zero in [0.0, -0.0, f32::NAN, f32::MIN_POSITIVE / 2.0] {
            if block_type == BlockType::MXFP4 && zero > 0.0 {
                // Powers of two go further down than f16.
                continue;
            }
            let y = decoded(block_type, &encoded(block_type, &[zero; 256]), 256);
            assert!(y.iter().all(|y| *y == 0.0), "{block_type} of {zero}");
        }
    }
}

#[test]
fn a_block_does_not_depend_on_its_neighbours() {
    let x = values(distributions::Shape::Normal, 0.02, 7, 5 * 512);
    for block_type in BlockType::ALL {
        let together = encoded(block_type, &x);
        let alone: Vec<u8> = x
            .chunks(block_type.block_len())
            .flat_map(|x| encoded(block_type, x))
            .collect();
        assert!(together == alone, "{block_type}");
    }
}

#[test]
fn what_a_block_of_mxfp4_holds_comes_back_exactly() {
    // Every scale that gives finite values up to 1e9, with every set of codes up to a largest one.
    for e in 0..=154_u8 {
        for largest in 1..8_u8 {
            let mut blocks = vec![e];
            blocks.extend((0..16).map(|j| {
                let code = |i: u8| (i % (largest + 1)) | ((i / 3 % 2) << 3);
                code(j) | code(j + 5) << 4
            }));
            let x = decoded(BlockType::MXFP4, &blocks, 32);
            let y = decoded(BlockType::MXFP4, &encoded(BlockType::MXFP4, &x), 32);
            assert_eq!(x, y, "scale {e}, codes up to {largest}");
        }
    }
}

#[test]
fn codes_of_a_checkpoint_change_their_places_only() {
    let codes: Vec<u8> = (0..48_u8).map(|i| i.wrapping_mul(89)).collect();
    let scales = [120, 0, 131];
    let mut blocks = [0; 51];
    quant::repack_mxfp4(&codes, &scales, &mut blocks);
    let values = decoded(BlockType::MXFP4, &blocks, 96);
    let scales = scales.map(|e| (f32::from(e) - 127.0).exp2());
    let mut expected = [0.0; 96];
    quant::dequantize(quant::Narrow::E2M1, &codes, 32, &scales, &mut expected);
    assert_eq!(values, expected);
}
