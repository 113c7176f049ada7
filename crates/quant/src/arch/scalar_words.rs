//! The words as an array, for every CPU; also the plainest statement of what each operation means.

use half::f16;

use super::Rows;
use super::scalar::Array;
use crate::lanes::N_LANES;
use crate::words::Words;

/// Sixteen words in an array.
#[derive(Clone, Copy)]
pub(crate) struct WordArray([i32; N_LANES]);

impl WordArray {
    #[inline(always)]
    fn map(self, f: impl Fn(i32) -> i32) -> Self {
        WordArray(self.0.map(f))
    }

    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(i32, i32) -> i32) -> Self {
        WordArray(std::array::from_fn(|r| f(self.0[r], b.0[r])))
    }
}

impl Words for WordArray {
    type Lanes = Array;

    const N_AT_ONCE: usize = 1;
    const I8_OFFSET: i32 = 0;

    #[inline(always)]
    fn splat(x: i32) -> Self {
        WordArray([x; N_LANES])
    }

    #[inline(always)]
    fn columns<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> [Self; 4] {
        let words = |j, r| i32::from_le_bytes(rows.bytes::<16>(r, offset_bytes).as_chunks().0[j]);
        std::array::from_fn(|j| WordArray(std::array::from_fn(|r| words(j, r))))
    }

    #[inline(always)]
    fn column<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> Self {
        let word = |r| i32::from_le_bytes(rows.bytes(r, offset_bytes));
        WordArray(std::array::from_fn(word))
    }

    #[inline(always)]
    fn prefetch(_bytes: &[u8], _offset_bytes: usize, _n_bytes: usize) {}

    #[inline(always)]
    fn f16_column<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> Array {
        let half = |r| f16::from_le_bytes(rows.bytes(r, offset_bytes)).to_f32();
        Array(std::array::from_fn(half))
    }

    #[inline(always)]
    fn and(self, b: Self) -> Self {
        self.zip(b, |a, b| a & b)
    }

    #[inline(always)]
    fn or(self, b: Self) -> Self {
        self.zip(b, |a, b| a | b)
    }

    #[inline(always)]
    fn shl<const N: u32>(self) -> Self {
        self.map(|a| a << N)
    }

    #[inline(always)]
    fn shr<const N: u32>(self) -> Self {
        self.map(|a| (a as u32 >> N) as i32)
    }

    #[inline(always)]
    fn sar<const N: u32>(self) -> Self {
        self.map(|a| a >> N)
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, i32::wrapping_add)
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, i32::wrapping_mul)
    }

    #[inline(always)]
    fn dot_u7(self, w: Self, x: i32) -> Self {
        self.dot_i8(w, x)
    }

    #[inline(always)]
    fn bytes_i8(self) -> Self {
        self
    }

    #[inline(always)]
    fn dot_i8(self, w: Self, x: i32) -> Self {
        let byte = |word: i32, i: u32| i32::from((word >> (8 * i)) as i8);
        self.zip(w, |sum, w| {
            sum + byte(w, 0) * byte(x, 0)
                + byte(w, 1) * byte(x, 1)
                + byte(w, 2) * byte(x, 2)
                + byte(w, 3) * byte(x, 3)
        })
    }

    #[inline(always)]
    fn dot_pairs(self, w: Self, x: i32) -> Self {
        let half = |word: i32, i: u32| i32::from((word >> (16 * i)) as i16);
        self.zip(w, |sum, w| {
            sum + half(w, 0) * half(x, 0) + half(w, 1) * half(x, 1)
        })
    }

    #[inline(always)]
    fn dot_q6_k(block: &[u8; 210], x: &[i32; 64], minus_32_sums: &[i32; 16]) -> i32 {
        let mut total = 0;
        for (group, minus_32_sum) in minus_32_sums.iter().enumerate() {
            // Each byte of `high` has two bits of four columns, 32 apart; each byte of `low` halves of two, 64 apart.
            let (half, part, first) = (group / 8, group % 8 / 2, 16 * (group % 2));
            let low: &[u8; 16] = block[64 * half + 32 * (part % 2) + first..]
                .first_chunk()
                .expect("a group has 16 columns");
            let high: &[u8; 16] = block[128 + 32 * half + first..]
                .first_chunk()
                .expect("a group has 16 columns");
            let (shift_low, shift_high) = (4 * (part / 2), 2 * part);
            let mut sum = *minus_32_sum;
            for (i, x) in x[4 * group..][..4].iter().enumerate() {
                for (k, x) in x.to_le_bytes().into_iter().enumerate() {
                    let column = 4 * i + k;
                    let q = low[column] >> shift_low & 15 | (high[column] >> shift_high & 3) << 4;
                    sum += i32::from(q) * i32::from(x as i8);
                }
            }
            total += i32::from(block[192 + group] as i8) * sum;
        }
        total
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16]) -> Self {
        self.map(|a| i32::from_le_bytes(a.to_le_bytes().map(|i| table[usize::from(i & 15)])))
    }

    #[inline(always)]
    fn as_f32_bits(self) -> Array {
        Array(self.0.map(|a| f32::from_bits(a as u32)))
    }

    #[inline(always)]
    fn to_f32(self) -> Array {
        Array(self.0.map(|a| a as f32))
    }

    #[inline(always)]
    fn f16_low(self) -> Array {
        Array(self.0.map(|a| f16::from_bits(a as u16).to_f32()))
    }

    #[inline(always)]
    fn f16_high(self) -> Array {
        self.shr::<16>().f16_low()
    }
}
