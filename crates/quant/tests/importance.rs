//! Encoders that are told which values matter: the same bytes on each instruction set, and never a worse block than
//! without.

mod distributions;

use proptest::prelude::*;
use quant::{BlockType, decode, encode, encode_weighted, encode_weighted_with, isas};

use distributions::{Shape, shape, values};

const WEIGHED: [BlockType; 6] = [
    BlockType::Q5_0,
    BlockType::Q5_K,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q4_K,
    BlockType::Q6_K,
];

fn plain(block_type: BlockType, x: &[f32]) -> Vec<u8> {
    let mut blocks = vec![0; block_type.row_bytes(x.len()).unwrap()];
    encode(block_type, x, &mut blocks);
    blocks
}

fn weighted(block_type: BlockType, x: &[f32], importance: &[f32]) -> Vec<u8> {
    let mut blocks = vec![0; block_type.row_bytes(x.len()).unwrap()];
    encode_weighted(block_type, x, importance, &mut blocks);
    blocks
}

/// What the blocks cost, each.
fn costs(block_type: BlockType, x: &[f32], importance: &[f32], blocks: &[u8]) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    decode(block_type, blocks, &mut y);
    let errors = x.iter().zip(&y).map(|(x, y)| f64::from(*x) - f64::from(*y));
    let costs: Vec<f64> = errors
        .zip(importance)
        .map(|(e, w)| e * e * f64::from(*w))
        .collect();
    costs
        .chunks(block_type.block_len())
        .map(|block| block.iter().sum())
        .collect()
}

/// Importances from all alike (0) to one column in thirty that is a thousand times the others (1).
fn importances(skew: f32, seed: u64, n: usize) -> Vec<f32> {
    let normals = values(Shape::Normal, 1.0, seed, n);
    let outliers = values(Shape::Sparse, 1.0, seed ^ 0x55, n);
    let one =
        |(x, o): (&f32, &f32)| (skew * (2.0 * x + if o.abs() > 1.0 { 7.0 } else { 0.0 })).exp();
    normals.iter().zip(&outliers).map(one).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn all_instruction_sets_give_the_same_bytes(
        shape in shape(), exponent in -40.0f32..12.0, skew in 0.0f32..1.5, seed: u64, n_blocks in 1usize..40,
    ) {
        for block_type in BlockType::ALL {
            let n = if block_type.block_len() == 256 { n_blocks.div_ceil(8) } else { n_blocks } * block_type.block_len();
            let (x, importance) = (values(shape, exponent.exp2(), seed, n), importances(skew, seed ^ 1, n));
            let expected = weighted(block_type, &x, &importance);
            for isa in isas() {
                let mut blocks = vec![0xaa; expected.len()];
                encode_weighted_with(isa, block_type, &x, &importance, &mut blocks);
                prop_assert!(blocks == expected, "{} on {:?} differs", block_type, isa);
            }
        }
    }

    #[test]
    fn any_importance_is_taken(bits in prop::collection::vec(any::<u32>(), 1024)) {
        let floats: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let (x, importance) = floats.split_at(512);
        for block_type in WEIGHED {
            for x in [x, &values(Shape::Normal, 0.1, 5, 512)] {
                let expected = weighted(block_type, x, importance);
                for isa in isas() {
                    let mut blocks = vec![0xaa; expected.len()];
                    encode_weighted_with(isa, block_type, x, importance, &mut blocks);
                    prop_assert!(blocks == expected, "{} on {:?} differs", block_type, isa);
                }
                let mut y = vec![0.0; x.len()];
                decode(block_type, &expected, &mut y);
                prop_assert!(y.iter().all(|y| y.is_finite()), "{}", block_type);
            }
        }
    }

    #[test]
    fn no_block_costs_more_than_without(
        shape in shape(), exponent in -24.0f32..8.0, skew in 0.0f32..1.5, scale in -20.0f32..20.0, seed: u64,
    ) {
        let n = 3 * 256;
        let x = values(shape, exponent.exp2(), seed, n);
        let importance: Vec<f32> =
            importances(skew, seed ^ 1, n).iter().map(|w| w * scale.exp2()).collect();
        for block_type in WEIGHED {
            let with = costs(block_type, &x, &importance, &weighted(block_type, &x, &importance));
            let without = costs(block_type, &x, &importance, &plain(block_type, &x));
            for (with, without) in with.iter().zip(&without) {
                prop_assert!(with <= without, "{}: {} > {}", block_type, with, without);
            }
        }
    }
}

#[test]
fn skewed_importances_save_much() {
    let n = 64 * 256;
    let (x, importance) = (values(Shape::Normal, 0.02, 3, n), importances(1.0, 4, n));
    for block_type in WEIGHED {
        let sum = |blocks: &[u8]| {
            costs(block_type, &x, &importance, blocks)
                .iter()
                .sum::<f64>()
        };
        let ratio = sum(&weighted(block_type, &x, &importance)) / sum(&plain(block_type, &x));
        println!("{block_type}: {ratio:.3}");
        assert!(ratio < 0.8, "{block_type}: {ratio}");
    }
}

#[test]
fn equal_importances_change_nothing() {
    let x = values(Shape::HeavyTail, 0.02, 7, 5 * 512);
    for block_type in BlockType::ALL {
        for importance in [1.0, 0.25, 1e-30, 1e30, 0.0] {
            let blocks = weighted(block_type, &x, &vec![importance; x.len()]);
            let (with, without) = (
                costs(block_type, &x, &vec![1.0; x.len()], &blocks),
                costs(block_type, &x, &vec![1.0; x.len()], &plain(block_type, &x)),
            );
            let (with, without): (f64, f64) = (with.iter().sum(), without.iter().sum());
            assert!(
                with <= without * 1.0001,
                "{block_type} {importance}: {with} > {without}"
            );
        }
    }
}

#[test]
fn a_block_does_not_depend_on_its_neighbours() {
    let n = 5 * 512;
    let (x, importance) = (values(Shape::Normal, 0.02, 7, n), importances(1.0, 8, n));
    for block_type in BlockType::ALL {
        let len = block_type.block_len();
        let alone: Vec<u8> = x
            .chunks(len)
            .zip(importance.chunks(len))
            .flat_map(|(x, importance)| weighted(block_type, x, importance))
            .collect();
        assert!(
            weighted(block_type, &x, &importance) == alone,
            "{block_type}"
        );
    }
}
