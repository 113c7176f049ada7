//! Numbers of eight bits or fewer, as checkpoints store them, to f32: code times scale.
//!
//! Invariant: a result is the exact value of the code, multiplied once with the f32 scale of its group; every NaN code
//! is a NaN. The loops are plain and compiled once for each instruction set. How scales spread over a matrix is the
//! caller's matter: here a scale is for a run of values.
//!
//! ```text
//! E4M3  s eeee mmm     bias 7    no infinity; NaN is s 1111 111        OCP OFP8, "fn" variant
//! E5M2  s eeeee mm     bias 15   infinities and NaN as in IEEE 754     OCP OFP8
//! E8M0  eeeeeeee       2^(e - 127); 255 is NaN                         OCP MX
//! E2M1  s ee m         bias 1    0 0.5 1 1.5 2 3 4 6; two in a byte, the first in the low half    OCP MX
//! I8    two's complement
//! ```

use crate::isa;
use crate::words::{Words, Work};
use crate::{BlockType, Isa};

/// What a code means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Narrow {
    /// A signed byte.
    I8,
    /// Eight bits: 4 of exponent, 3 of mantissa, without infinities.
    E4M3,
    /// Eight bits: 5 of exponent, 2 of mantissa.
    E5M2,
    /// Eight bits of exponent: powers of two.
    E8M0,
    /// Four bits: 2 of exponent, 1 of mantissa; two codes in a byte, the first in its low half.
    E2M1,
}

impl Narrow {
    /// Every format.
    pub const ALL: [Narrow; 5] = [
        Narrow::I8,
        Narrow::E4M3,
        Narrow::E5M2,
        Narrow::E8M0,
        Narrow::E2M1,
    ];

    /// How many values a byte holds.
    #[must_use]
    pub const fn values_per_byte(self) -> usize {
        match self {
            Narrow::E2M1 => 2,
            _ => 1,
        }
    }
}

/// Decodes `codes` into `values`: each run of `group` values is multiplied with its own scale; the last run may be
/// shorter. Allocates nothing.
///
/// # Panics
/// When the lengths do not agree, `group` is 0, or an E2M1 group is odd (unless it is the only one).
pub fn dequantize(narrow: Narrow, codes: &[u8], group: usize, scales: &[f32], values: &mut [f32]) {
    dequantize_with(isa::fastest(), narrow, codes, group, scales, values);
}

/// [`dequantize`] on a chosen instruction set, for tests and benches.
///
/// # Panics
/// As [`dequantize`], and when this CPU lacks `isa`.
pub fn dequantize_with(
    isa: Isa,
    narrow: Narrow,
    codes: &[u8],
    group: usize,
    scales: &[f32],
    values: &mut [f32],
) {
    let per_byte = narrow.values_per_byte();
    assert_eq!(codes.len() * per_byte, values.len(), "{narrow:?} codes");
    assert!(group > 0 && values.len().div_ceil(group) == scales.len());
    assert!(group.is_multiple_of(per_byte) || scales.len() <= 1);
    let group = group.next_multiple_of(per_byte);
    isa::run_lanes(
        isa,
        Dequantize {
            narrow,
            codes,
            group,
            scales,
            values,
        },
    );
}

/// Rounds `values` to BF16, ties to even: [`crate::encode()`] with [`BlockType::BF16`].
///
/// # Panics
/// When `bytes` is not twice as long as `values`.
pub fn round_to_bf16(values: &[f32], bytes: &mut [u8]) {
    crate::encode(BlockType::BF16, values, bytes);
}

struct Dequantize<'a> {
    narrow: Narrow,
    codes: &'a [u8],
    group: usize,
    scales: &'a [f32],
    values: &'a mut [f32],
}

impl Work for Dequantize<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        match self.narrow {
            Narrow::I8 => self.each(|code| f32::from(code as i8)),
            Narrow::E4M3 => self.each(e4m3),
            Narrow::E5M2 => self.each(e5m2),
            Narrow::E8M0 => self.each(e8m0),
            Narrow::E2M1 => self.each_pair(),
        }
    }
}

impl Dequantize<'_> {
    #[inline(always)]
    fn each(self, decode: impl Fn(u8) -> f32) {
        let groups = self.values.chunks_mut(self.group);
        for ((values, codes), &scale) in groups.zip(self.codes.chunks(self.group)).zip(self.scales)
        {
            for (x, &code) in values.iter_mut().zip(codes) {
                *x = decode(code) * scale;
            }
        }
    }

    #[inline(always)]
    fn each_pair(self) {
        let groups = self.values.chunks_mut(self.group);
        let codes = self.codes.chunks(self.group / 2);
        for ((values, codes), &scale) in groups.zip(codes).zip(self.scales) {
            for (pair, &code) in values.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                *pair = [e2m1(code & 15) * scale, e2m1(code >> 4) * scale];
            }
        }
    }
}

/// 1.0 in the exponent field of an f32.
const EXPONENT_ONE: u32 = 1 << 23;

#[inline(always)]
fn e4m3(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    let normal = (magnitude << 20) + (127 - 7) * EXPONENT_ONE;
    // Below the smallest normal the code counts steps of 2^-9.
    let small = (magnitude as i32 as f32 * (1.0 / 512.0)).to_bits();
    let bits = if magnitude < 8 { small } else { normal };
    let bits = if magnitude == 0x7f { 0x7fc0_0000 } else { bits };
    f32::from_bits(bits | u32::from(code & 0x80) << 24)
}

#[inline(always)]
fn e5m2(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    let normal = (magnitude << 21) + (127 - 15) * EXPONENT_ONE;
    let small = (magnitude as i32 as f32 * (1.0 / 65_536.0)).to_bits();
    let beyond = if magnitude == 0x7c {
        0x7f80_0000
    } else {
        0x7fc0_0000
    };
    let bits = if magnitude < 4 { small } else { normal };
    let bits = if magnitude >= 0x7c { beyond } else { bits };
    f32::from_bits(bits | u32::from(code & 0x80) << 24)
}

#[inline(always)]
fn e8m0(code: u8) -> f32 {
    let normal = u32::from(code) << 23;
    let bits = if code == 0 { 1 << 22 } else { normal };
    f32::from_bits(if code == 255 { 0x7fc0_0000 } else { bits })
}

/// `code` has four bits.
#[inline(always)]
fn e2m1(code: u8) -> f32 {
    let magnitude = u32::from(code & 7);
    let normal = (magnitude << 22) + 126 * EXPONENT_ONE;
    let small = (magnitude as i32 as f32 * 0.5).to_bits();
    let bits = if magnitude < 2 { small } else { normal };
    f32::from_bits(bits | u32::from(code & 8) << 28)
}
