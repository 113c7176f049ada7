//! What the bytes of a block mean: GGUF's block formats, drawn and decoded.
//!
//! Invariant: each decoded value is the f32 that GGUF's reference decoder gives, bit for bit. (All products of a
//! scale and an integer here are exact in f32, so that only a final addition rounds.) The loops are plain: compiled
//! once for each instruction set, they are vectorised by the compiler. Nothing is checked: any byte is a value.

use half::f16;

use crate::BlockType;
use crate::lanes::{Lanes, N_LANES};
use crate::mxfp4::{TWICE_E2M1, half_e8m0};

/// Decodes `blocks` into `values`, whose sizes agree.
#[inline(always)]
pub(crate) fn decode<L: Lanes>(block_type: BlockType, blocks: &[u8], values: &mut [f32]) {
    match block_type {
        BlockType::F32 => {
            for (x, &b) in values.iter_mut().zip(blocks.as_chunks().0) {
                *x = f32::from_le_bytes(b);
            }
        }
        BlockType::F16 => decode_f16::<L>(blocks, values),
        BlockType::BF16 => {
            for (x, &b) in values.iter_mut().zip(blocks.as_chunks().0) {
                *x = f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16);
            }
        }
        BlockType::Q8_0 => each_block(blocks, values, decode_q8_0),
        BlockType::Q5_0 => each_block(blocks, values, decode_q5_0),
        BlockType::Q5_K => each_block(blocks, values, decode_q5_k),
        BlockType::Q4_0 => each_block(blocks, values, decode_q4_0),
        BlockType::Q4_1 => each_block(blocks, values, decode_q4_1),
        BlockType::MXFP4 => each_block(blocks, values, decode_mxfp4),
        BlockType::Q4_K => each_block(blocks, values, decode_q4_k),
        BlockType::Q6_K => each_block(blocks, values, decode_q6_k),
    }
}

#[inline(always)]
fn each_block<const BYTES: usize, const LEN: usize>(
    blocks: &[u8],
    values: &mut [f32],
    decode_block: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, x) in blocks.as_chunks().0.iter().zip(values.as_chunks_mut().0) {
        decode_block(block, x);
    }
}

#[inline(always)]
fn decode_f16<L: Lanes>(blocks: &[u8], values: &mut [f32]) {
    let (chunks, tail) = values.as_chunks_mut::<N_LANES>();
    let (chunks_bytes, tail_bytes) = blocks.as_chunks::<{ 2 * N_LANES }>();
    for (x, bytes) in chunks.iter_mut().zip(chunks_bytes) {
        *x = L::from_f16(&f16_bits(bytes)).store();
    }
    let mut bytes = [0; 2 * N_LANES];
    bytes[..tail_bytes.len()].copy_from_slice(tail_bytes);
    tail.copy_from_slice(&L::from_f16(&f16_bits(&bytes)).store()[..tail.len()]);
}

#[inline(always)]
fn f16_bits(bytes: &[u8; 2 * N_LANES]) -> [u16; N_LANES] {
    std::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))
}

/// The f16 at `offset_bytes` of a block.
#[inline(always)]
fn f16_at(block: &[u8], offset_bytes: usize) -> f32 {
    f16::from_le_bytes([block[offset_bytes], block[offset_bytes + 1]]).to_f32()
}

/// ```text
/// 0  d: f16      2  q: [i8; 32]           x[i] = q[i] * d
/// ```
#[inline(always)]
fn decode_q8_0(block: &[u8; 34], x: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for i in 0..32 {
        x[i] = f32::from(block[2 + i] as i8) * d;
    }
}

/// ```text
/// 0  d: f16      2  q: [u4 | u4; 16]      x[i] = (q[i] - 8) * d; low halves hold 0..16, high halves 16..32
/// ```
#[inline(always)]
fn decode_q4_0(block: &[u8; 18], x: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    for i in 0..16 {
        let q = block[2 + i];
        x[i] = (f32::from(q & 15) - 8.0) * d;
        x[16 + i] = (f32::from(q >> 4) - 8.0) * d;
    }
}

/// ```text
/// 0  d: f16      2  m: f16      4  q: [u4 | u4; 16]      x[i] = q[i] * d + m; halves as in Q4_0
/// ```
#[inline(always)]
fn decode_q4_1(block: &[u8; 20], x: &mut [f32; 32]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for i in 0..16 {
        let q = block[4 + i];
        x[i] = f32::from(q & 15) * d + m;
        x[16 + i] = f32::from(q >> 4) * d + m;
    }
}

/// ```text
/// 0  e: u8      1  q: [u4 | u4; 16]      x[i] = TWICE_E2M1[q[i]] * 2^(e - 128); halves as in Q4_0
/// ```
///
/// Unlike in OCP MX, 255 is a power of two like the others.
#[inline(always)]
fn decode_mxfp4(block: &[u8; 17], x: &mut [f32; 32]) {
    let d = half_e8m0(block[0]);
    for i in 0..16 {
        let q = block[1 + i];
        x[i] = f32::from(TWICE_E2M1[usize::from(q & 15)]) * d;
        x[16 + i] = f32::from(TWICE_E2M1[usize::from(q >> 4)]) * d;
    }
}

/// ```text
/// 0  d: f16      2  h: u32      6  q: [u4 | u4; 16]      x[i] = (q[i] + 16 * bit i of h - 16) * d; halves as in Q4_0
/// ```
#[inline(always)]
fn decode_q5_0(block: &[u8; 22], x: &mut [f32; 32]) {
    let d = f16_at(block, 0);
    let h = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for i in 0..16 {
        let q = block[6 + i];
        let low = u32::from(q & 15) | (h >> i & 1) << 4;
        let high = u32::from(q >> 4) | (h >> (16 + i) & 1) << 4;
        x[i] = (low as i32 - 16) as f32 * d;
        x[16 + i] = (high as i32 - 16) as f32 * d;
    }
}

/// The 6-bit scales and minima of the 8 groups of a Q4_K or Q5_K block.
///
/// ```text
///  byte        bits 0-5        bits 6-7
///  0..4        s[i]            upper 2 bits of s[4 + i]
///  4..8        m[i]            upper 2 bits of m[4 + i]
///              bits 0-3        bits 4-7
///  8..12       s[4 + i]        m[4 + i]                      (their lower 4 bits)
/// ```
#[inline(always)]
fn unpack_6_bits(packed: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (mut s, mut m) = ([0; 8], [0; 8]);
    for i in 0..4 {
        s[i] = packed[i] & 63;
        m[i] = packed[4 + i] & 63;
        s[4 + i] = packed[8 + i] & 15 | (packed[i] >> 6) << 4;
        m[4 + i] = packed[8 + i] >> 4 | (packed[4 + i] >> 6) << 4;
    }
    (s, m)
}

/// ```text
/// 0  d: f16      2  dm: f16      4  s, m: 8 times 6 bits each      16  q: [u4 | u4; 128]
///
/// Groups of 32: x[32 g + i] = (d * s[g]) * q - dm * m[g]; 32 bytes hold group 2k in their low halves, 2k + 1 in the high.
/// ```
#[inline(always)]
fn decode_q4_k(block: &[u8; 144], x: &mut [f32; 256]) {
    let (d, dm) = (f16_at(block, 0), f16_at(block, 2));
    let (s, m) = unpack_6_bits(&block[4..16]);
    for (g, x) in x.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let q: &[u8; 32] = &block[16..].as_chunks().0[g / 2];
        let (scale, min) = (d * f32::from(s[g]), dm * f32::from(m[g]));
        for i in 0..32 {
            x[i] = scale * f32::from(q[i] >> (4 * (g % 2)) & 15) - min;
        }
    }
}

/// ```text
/// 0  d: f16      2  dm: f16      4  s, m: 8 times 6 bits each      16  h: [u8; 32]      48  q: [u4 | u4; 128]
///
/// As Q4_K, with bit g of h[i] as the fifth bit of element i of group g.
/// ```
#[inline(always)]
fn decode_q5_k(block: &[u8; 176], x: &mut [f32; 256]) {
    let (d, dm) = (f16_at(block, 0), f16_at(block, 2));
    let (s, m) = unpack_6_bits(&block[4..16]);
    let h: &[u8; 32] = &block[16..].as_chunks().0[0];
    for (g, x) in x.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let q: &[u8; 32] = &block[48..].as_chunks().0[g / 2];
        let (scale, min) = (d * f32::from(s[g]), dm * f32::from(m[g]));
        for i in 0..32 {
            let low = q[i] >> (4 * (g % 2)) & 15;
            x[i] = scale * f32::from(low | (h[i] >> g & 1) << 4) - min;
        }
    }
}

/// ```text
/// 0  q: [u4 | u4; 128]      128  h: [4 times u2; 64]      192  s: [i8; 16]      208  d: f16
///
/// Groups of 16: x[16 g + i] = (d * s[g]) * (q + 16 * h - 32). Each half of 128 values has 64 bytes of q and 32 of h:
///   x[i]      low  of q[i]        bits 0-1 of h[i]           i in 0..32
///   x[32 + i] low  of q[32 + i]   bits 2-3
///   x[64 + i] high of q[i]        bits 4-5
///   x[96 + i] high of q[32 + i]   bits 6-7
/// ```
#[inline(always)]
fn decode_q6_k(block: &[u8; 210], x: &mut [f32; 256]) {
    let d = f16_at(block, 208);
    for half in 0..2 {
        let q: &[u8; 64] = &block[..128].as_chunks().0[half];
        let h: &[u8; 32] = &block[128..192].as_chunks().0[half];
        let scales: &[u8; 8] = &block[192..208].as_chunks().0[half];
        for quarter in 0..4 {
            for group in 0..2 {
                let scale = d * f32::from(scales[2 * quarter + group] as i8);
                let target = &mut x[128 * half + 32 * quarter + 16 * group..][..16];
                let q = &q[32 * (quarter & 1) + 16 * group..][..16];
                let h = &h[16 * group..][..16];
                for i in 0..16 {
                    let low = q[i] >> (4 * (quarter >> 1)) & 15;
                    let high = h[i] >> (2 * quarter) & 3;
                    target[i] = scale * (f32::from(low | high << 4) - 32.0);
                }
            }
        }
    }
}
