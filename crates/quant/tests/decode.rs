//! Each block type's decoder against a few lines written from the format's definition, on any bytes.

use half::f16;
use proptest::prelude::*;
use quant::{BlockType, decode_with, isas};

fn f16_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// Bits `at..at + n` of a little-endian string of bits.
fn bits(b: &[u8], at: usize, n: usize) -> u32 {
    (0..n)
        .map(|i| u32::from(b[(at + i) / 8] >> ((at + i) % 8) & 1) << i)
        .sum()
}

/// Element `i` of a K block whose nibbles start at `b[at]`: 64 values share 32 bytes, low halves first.
fn nibble_of_64(b: &[u8], at: usize, i: usize) -> u32 {
    bits(b, 8 * (at + i / 64 * 32 + i % 32) + i % 64 / 32 * 4, 4)
}

/// The 6-bit scale and minimum of group `g`, packed from `b[4]`.
fn scale_and_min(b: &[u8], g: usize) -> (f32, f32) {
    let (s, m) = if g < 4 {
        (bits(b, 8 * (4 + g), 6), bits(b, 8 * (8 + g), 6))
    } else {
        let upper = |from: usize| bits(b, 8 * (from + g - 4) + 6, 2) << 4;
        (
            bits(b, 8 * (8 + g), 4) | upper(4),
            bits(b, 8 * (8 + g) + 4, 4) | upper(8),
        )
    };
    (f16_at(b, 0) * s as f32, f16_at(b, 2) * m as f32)
}

/// Element `i` of block `b`.
fn element(block_type: BlockType, b: &[u8], i: usize) -> f32 {
    let half = |at: usize| bits(b, 8 * (at + i % 16) + i / 16 * 4, 4);
    match block_type {
        BlockType::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        BlockType::F16 => f16_at(b, 0),
        BlockType::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        BlockType::Q8_0 => f32::from(b[2 + i] as i8) * f16_at(b, 0),
        BlockType::Q4_0 => (half(2) as f32 - 8.0) * f16_at(b, 0),
        BlockType::MXFP4 => {
            const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
            let code = half(1) as usize;
            // An f64 holds all of it, and is rounded (to infinity) once.
            let x = f64::from(MAGNITUDES[code % 8]) * (f64::from(b[0]) - 127.0).exp2();
            // GGUF has one zero.
            (if code <= 8 { x } else { -x }) as f32
        }
        BlockType::Q4_1 => half(4) as f32 * f16_at(b, 0) + f16_at(b, 2),
        BlockType::Q5_0 => ((half(6) + 16 * bits(b, 16 + i, 1)) as f32 - 16.0) * f16_at(b, 0),
        BlockType::Q4_K => {
            let (s, m) = scale_and_min(b, i / 32);
            s * nibble_of_64(b, 16, i) as f32 - m
        }
        BlockType::Q5_K => {
            let (s, m) = scale_and_min(b, i / 32);
            s * (nibble_of_64(b, 48, i) + 16 * bits(b, 8 * (16 + i % 32) + i / 32, 1)) as f32 - m
        }
        BlockType::Q6_K => {
            let (half, quarter, j) = (i / 128, i % 128 / 32, i % 32);
            let low = bits(
                b,
                8 * (64 * half + 32 * (quarter % 2) + j) + quarter / 2 * 4,
                4,
            );
            let high = bits(b, 8 * (128 + 32 * half + j) + 2 * quarter, 2);
            f16_at(b, 208) * f32::from(b[192 + i / 16] as i8) * ((low + 16 * high) as f32 - 32.0)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_decode_as_defined(
        which in 0..BlockType::ALL.len(),
        n_blocks in 1usize..40,
        bytes in prop::collection::vec(any::<u8>(), 40 * 210),
    ) {
        let block_type = BlockType::ALL[which];
        let (len, size) = (block_type.block_len(), block_type.block_bytes());
        let blocks = &bytes[..n_blocks * size];
        for isa in isas() {
            let mut values = vec![0.0f32; n_blocks * len];
            decode_with(isa, block_type, blocks, &mut values);
            for (k, x) in values.iter().enumerate() {
                let expected = element(block_type, &blocks[k / len * size..][..size], k % len);
                // A NaN has many spellings, and arithmetic may choose among them.
                prop_assert!(
                    x.to_bits() == expected.to_bits() || x.is_nan() && expected.is_nan(),
                    "{} {:?} element {}: {} is not {}", block_type, isa, k, x, expected
                );
            }
        }
    }
}

#[test]
fn names_and_ids_lead_back() {
    for t in BlockType::ALL {
        assert_eq!(t.name().parse(), Ok(t));
        assert_eq!(t.to_string(), t.name());
        assert_eq!(BlockType::from_gguf_id(t.gguf_id()), Some(t));
        assert_eq!(serde_json::to_string(&t).unwrap(), format!("\"{t}\""));
        assert_eq!(
            serde_json::from_str::<BlockType>(&format!("\"{t}\"")).unwrap(),
            t
        );
        assert_eq!(t.row_bytes(3 * t.block_len()), Some(3 * t.block_bytes()));
        assert_eq!(t.row_bytes(t.block_len() + 1).is_some(), t.block_len() == 1);
    }
    assert_eq!(BlockType::from_gguf_id(31), None);
    assert_eq!(
        "q4_k".parse::<BlockType>().unwrap_err().to_string(),
        "no block type is named \"q4_k\"; known are F32, F16, BF16, Q8_0, Q5_0, Q5_K, Q4_0, Q4_1, MXFP4, Q4_K and Q6_K"
    );
    assert_eq!(BlockType::F32.row_bytes(usize::MAX), None);
}

#[test]
#[should_panic(expected = "64 values in Q8_0 blocks do not take 67 bytes")]
fn sizes_that_disagree_are_a_bug_of_the_caller() {
    quant::decode(BlockType::Q8_0, &[0; 67], &mut [0.0; 64]);
}
