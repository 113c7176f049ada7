//! MXFP4: 4-bit floats in blocks of 32 with a power of two as scale (OCP Microscaling), as GGUF stores them.
//!
//! Invariant: values that some block can hold exactly come back exactly. Decoding is in `decode.rs`, where the block is
//! drawn; this file has its numbers, the encoder, and the way from a checkpoint's order of codes to GGUF's.

/// Values in a block.
const LEN: usize = 32;

/// Twice what a code of E2M1 means: all are whole numbers then, and the scale is half as large.
pub(crate) const TWICE_E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The same with 12 added, so that none is negative.
pub(crate) const TWICE_E2M1_PLUS_12: [u8; 16] = {
    let mut table = [0; 16];
    let mut code = 0;
    while code < 16 {
        table[code] = (TWICE_E2M1[code] + 12) as u8;
        code += 1;
    }
    table
};

/// `2^(e - 128)`, half of what E8M0 means.
#[inline(always)]
pub(crate) fn half_e8m0(e: u8) -> f32 {
    let subnormal = 1 << (21 + u32::from(e & 1));
    let normal = u32::from(e).wrapping_sub(1) << 23;
    f32::from_bits(if e < 2 { subnormal } else { normal })
}

/// The codes and scales of a checkpoint as GGUF's blocks: nothing is rounded, the codes only change their places.
///
/// Of block b, `codes` has 16 bytes with values 2j and 2j + 1 in the halves of byte j, and `scales` one E8M0; a block of
/// GGUF has values j and 16 + j in the halves of byte j.
///
/// # Panics
/// When the three do not hold the same number of blocks.
pub fn repack_mxfp4(codes: &[u8], scales: &[u8], blocks: &mut [u8]) {
    assert_eq!(codes.len(), 16 * scales.len(), "codes and scales");
    assert_eq!(blocks.len(), 17 * scales.len(), "blocks and scales");
    let codes = codes.as_chunks::<16>().0;
    let blocks = blocks.as_chunks_mut::<17>().0;
    for ((block, codes), &scale) in blocks.iter_mut().zip(codes).zip(scales) {
        block[0] = scale;
        for j in 0..8 {
            // Values 2j and 2j + 1 are in the low halves of the block, 16 + 2j and 17 + 2j in the high ones.
            let (low, high) = (codes[j], codes[8 + j]);
            block[1 + 2 * j] = low & 15 | high << 4;
            block[2 + 2 * j] = low >> 4 | high & 0xf0;
        }
    }
}

/// Encodes whole blocks. Of the scale that spans the block with its largest number, and the one above it, the better is
/// taken.
#[inline(always)]
pub(crate) fn encode(values: &[f32], blocks: &mut [u8]) {
    let blocks = blocks.as_chunks_mut::<17>().0;
    for (x, block) in values.as_chunks::<LEN>().0.iter().zip(blocks) {
        let mut x = *x;
        for x in &mut x {
            // As in the other integer blocks: a NaN is 0, and magnitudes end at 1e9.
            *x = if x.is_nan() { 0.0 } else { x.clamp(-1e9, 1e9) };
        }
        let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        // The exponent field of the largest: its codes 4 to 6 times the scale, 2^(e - 127), are two above.
        let e = ((largest.to_bits() >> 23) as u8).saturating_sub(2);
        let (codes, error) = round(&x, e);
        let (codes_above, error_above) = round(&x, e + 1);
        // Its unit is twice as large.
        let (e, codes) = if 4.0 * error_above < error {
            (e + 1, codes_above)
        } else {
            (e, codes)
        };
        block[0] = e;
        for j in 0..16 {
            block[1 + j] = codes[j] | codes[16 + j] << 4;
        }
    }
}

/// The nearest codes for a scale, the smaller where two are as near, and the squared error in units of half the scale.
#[inline(always)]
fn round(x: &[f32; LEN], e: u8) -> ([u8; LEN], f32) {
    // 2^(128 - e) for e up to 30 + 127, as two factors, because one may be beyond f32.
    let (half, rest) = (i32::from(e) / 2, i32::from(e) - i32::from(e) / 2);
    let power = |n: i32| f32::from_bits(((127 + 64 - n) as u32) << 23);
    let (a, b) = (power(half), power(rest));
    let mut codes = [0; LEN];
    let mut error = 0.0;
    for (code, x) in codes.iter_mut().zip(x) {
        let scaled = x.abs() * a * b;
        let mut magnitude = 0;
        // Half way between two neighbours of 0, 1, 2, 3, 4, 6, 8, 12.
        for border in [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0] {
            magnitude += u8::from(scaled > border);
        }
        let missed = scaled - f32::from(TWICE_E2M1[usize::from(magnitude)]);
        error += missed * missed;
        let is_negative = *x < 0.0 && magnitude > 0;
        *code = magnitude | u8::from(is_negative) << 3;
    }
    (codes, error)
}
