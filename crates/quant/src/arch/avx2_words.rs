//! The words as two 256-bit registers (AVX2 and F16C).

use std::arch::x86_64::*;

use super::Rows;
use super::avx2::Ymm2;
use crate::words::Words;

/// Sixteen words in two registers. Made only below `avx2::run`, which holds the CPU to the features.
#[derive(Clone, Copy)]
pub(super) struct WordYmm2(__m256i, __m256i);

/// Evaluates an intrinsic.
macro_rules! simd {
    ($e:expr) => {
        // SAFETY: `WordYmm2` is reached only through `avx2::run`, which holds the CPU to the features; loads are from
        // places that `Rows` has checked.
        unsafe { $e }
    };
}

// Halves are written out and helpers are functions, because a closure cannot be told to be inlined.

/// 16 bytes of the rows `row` and 4 + `row`.
#[inline(always)]
fn two_rows<const BYTES: usize>(
    rows: &Rows<'_, BYTES>,
    row: usize,
    offset_bytes: usize,
) -> __m256i {
    let (low, high) = (
        rows.at::<16>(row, offset_bytes).cast(),
        rows.at::<16>(4 + row, offset_bytes).cast(),
    );
    simd!(_mm256_inserti128_si256::<1>(
        _mm256_castsi128_si256(_mm_loadu_si128(low)),
        _mm_loadu_si128(high)
    ))
}

/// The words at `offset_bytes` of eight rows from `row` on.
#[inline(always)]
fn eight_words<const BYTES: usize>(
    rows: &Rows<'_, BYTES>,
    row: usize,
    offset_bytes: usize,
) -> __m256i {
    simd!(_mm256_setr_epi32(
        i32::from_le_bytes(rows.bytes(row, offset_bytes)),
        i32::from_le_bytes(rows.bytes(row + 1, offset_bytes)),
        i32::from_le_bytes(rows.bytes(row + 2, offset_bytes)),
        i32::from_le_bytes(rows.bytes(row + 3, offset_bytes)),
        i32::from_le_bytes(rows.bytes(row + 4, offset_bytes)),
        i32::from_le_bytes(rows.bytes(row + 5, offset_bytes)),
        i32::from_le_bytes(rows.bytes(row + 6, offset_bytes)),
        i32::from_le_bytes(rows.bytes(row + 7, offset_bytes))
    ))
}

/// The halves of words at `offset_bytes` of eight rows from `row` on.
#[inline(always)]
pub(super) fn eight_halves<const BYTES: usize>(
    rows: &Rows<'_, BYTES>,
    row: usize,
    offset_bytes: usize,
) -> __m128i {
    simd!(_mm_setr_epi16(
        i16::from_le_bytes(rows.bytes(row, offset_bytes)),
        i16::from_le_bytes(rows.bytes(row + 1, offset_bytes)),
        i16::from_le_bytes(rows.bytes(row + 2, offset_bytes)),
        i16::from_le_bytes(rows.bytes(row + 3, offset_bytes)),
        i16::from_le_bytes(rows.bytes(row + 4, offset_bytes)),
        i16::from_le_bytes(rows.bytes(row + 5, offset_bytes)),
        i16::from_le_bytes(rows.bytes(row + 6, offset_bytes)),
        i16::from_le_bytes(rows.bytes(row + 7, offset_bytes))
    ))
}

/// Four columns of eight rows, from row `first` on.
#[inline(always)]
fn columns8<const BYTES: usize>(
    rows: &Rows<'_, BYTES>,
    first: usize,
    offset_bytes: usize,
) -> [__m256i; 4] {
    // Register i holds row i in its lower half and row 4 + i in its upper; a 4 x 4 transposition within the halves then
    // puts the rows in order.
    let (a, b, c, d) = (
        two_rows(rows, first, offset_bytes),
        two_rows(rows, first + 1, offset_bytes),
        two_rows(rows, first + 2, offset_bytes),
        two_rows(rows, first + 3, offset_bytes),
    );
    simd!({
        let (ab, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (cd, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab, cd),
            _mm256_unpackhi_epi64(ab, cd),
            _mm256_unpacklo_epi64(ab_high, cd_high),
            _mm256_unpackhi_epi64(ab_high, cd_high),
        ]
    })
}

impl Words for WordYmm2 {
    type Lanes = Ymm2;

    const N_AT_ONCE: usize = 2;
    const I8_OFFSET: i32 = 0;

    #[inline(always)]
    fn splat(x: i32) -> Self {
        simd!(WordYmm2(_mm256_set1_epi32(x), _mm256_set1_epi32(x)))
    }

    #[inline(always)]
    fn columns<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> [Self; 4] {
        let (upper, lower) = (
            columns8(rows, 0, offset_bytes),
            columns8(rows, 8, offset_bytes),
        );
        [
            WordYmm2(upper[0], lower[0]),
            WordYmm2(upper[1], lower[1]),
            WordYmm2(upper[2], lower[2]),
            WordYmm2(upper[3], lower[3]),
        ]
    }

    #[inline(always)]
    fn column<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> Self {
        WordYmm2(
            eight_words(rows, 0, offset_bytes),
            eight_words(rows, 8, offset_bytes),
        )
    }

    #[inline(always)]
    fn prefetch(bytes: &[u8], offset_bytes: usize, n_bytes: usize) {
        super::rows::prefetch(bytes, offset_bytes, n_bytes);
    }

    #[inline(always)]
    fn f16_column<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> Ymm2 {
        simd!(Ymm2(
            _mm256_cvtph_ps(eight_halves(rows, 0, offset_bytes)),
            _mm256_cvtph_ps(eight_halves(rows, 8, offset_bytes))
        ))
    }

    #[inline(always)]
    fn and(self, b: Self) -> Self {
        simd!(WordYmm2(
            _mm256_and_si256(self.0, b.0),
            _mm256_and_si256(self.1, b.1)
        ))
    }

    #[inline(always)]
    fn or(self, b: Self) -> Self {
        simd!(WordYmm2(
            _mm256_or_si256(self.0, b.0),
            _mm256_or_si256(self.1, b.1)
        ))
    }

    #[inline(always)]
    fn shl<const N: u32>(self) -> Self {
        simd!({
            let n = _mm_cvtsi32_si128(N as i32);
            WordYmm2(_mm256_sll_epi32(self.0, n), _mm256_sll_epi32(self.1, n))
        })
    }

    #[inline(always)]
    fn shr<const N: u32>(self) -> Self {
        simd!({
            let n = _mm_cvtsi32_si128(N as i32);
            WordYmm2(_mm256_srl_epi32(self.0, n), _mm256_srl_epi32(self.1, n))
        })
    }

    #[inline(always)]
    fn sar<const N: u32>(self) -> Self {
        simd!({
            let n = _mm_cvtsi32_si128(N as i32);
            WordYmm2(_mm256_sra_epi32(self.0, n), _mm256_sra_epi32(self.1, n))
        })
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        simd!(WordYmm2(
            _mm256_add_epi32(self.0, b.0),
            _mm256_add_epi32(self.1, b.1)
        ))
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        simd!(WordYmm2(
            _mm256_mullo_epi32(self.0, b.0),
            _mm256_mullo_epi32(self.1, b.1)
        ))
    }

    #[inline(always)]
    fn dot_u7(self, w: Self, x: i32) -> Self {
        // Pairs reach 2 * 127 * 127 = 32258 and cannot saturate.
        simd!({
            let (x, one) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
            self.add(WordYmm2(
                _mm256_madd_epi16(_mm256_maddubs_epi16(w.0, x), one),
                _mm256_madd_epi16(_mm256_maddubs_epi16(w.1, x), one),
            ))
        })
    }

    #[inline(always)]
    fn bytes_i8(self) -> Self {
        self
    }

    #[inline(always)]
    fn dot_i8(self, w: Self, x: i32) -> Self {
        // The sign moves to x. Pairs reach 2 * 128 * 127 = 32512 and cannot saturate.
        simd!({
            let (x, one) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
            let low = _mm256_maddubs_epi16(_mm256_abs_epi8(w.0), _mm256_sign_epi8(x, w.0));
            let high = _mm256_maddubs_epi16(_mm256_abs_epi8(w.1), _mm256_sign_epi8(x, w.1));
            self.add(WordYmm2(
                _mm256_madd_epi16(low, one),
                _mm256_madd_epi16(high, one),
            ))
        })
    }

    #[inline(always)]
    fn dot_pairs(self, w: Self, x: i32) -> Self {
        simd!({
            let x = _mm256_set1_epi32(x);
            self.add(WordYmm2(
                _mm256_madd_epi16(w.0, x),
                _mm256_madd_epi16(w.1, x),
            ))
        })
    }

    #[inline(always)]
    fn dot_q6_k(block: &[u8; 210], x: &[i32; 64], minus_32_sums: &[i32; 16]) -> i32 {
        simd!({
            let scales = _mm_loadu_si128(block[192..].as_ptr().cast());
            let (low, high) = minus_32_sums.split_at(8);
            let mut total = _mm256_add_epi32(
                _mm256_mullo_epi32(
                    _mm256_cvtepi8_epi32(scales),
                    _mm256_loadu_si256(low.as_ptr().cast()),
                ),
                _mm256_mullo_epi32(
                    _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(scales)),
                    _mm256_loadu_si256(high.as_ptr().cast()),
                ),
            );
            let (low_halves, high_bits) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
            for half in 0..2 {
                // The scales of the eight groups of this half as i16, in both halves of the register.
                let scales = match half {
                    0 => scales,
                    _ => _mm_srli_si128::<8>(scales),
                };
                let scales = _mm256_broadcastsi128_si256(_mm_cvtepi8_epi16(scales));
                let low = [
                    _mm256_loadu_si256(block[64 * half..].as_ptr().cast()),
                    _mm256_loadu_si256(block[64 * half + 32..].as_ptr().cast()),
                ];
                let high = _mm256_loadu_si256(block[128 + 32 * half..].as_ptr().cast());
                let q = [
                    (low[0], _mm256_slli_epi64::<4>(high)),
                    (low[1], _mm256_slli_epi64::<2>(high)),
                    (_mm256_srli_epi64::<4>(low[0]), high),
                    (_mm256_srli_epi64::<4>(low[1]), _mm256_srli_epi64::<2>(high)),
                ];
                for (part, (low, high)) in q.into_iter().enumerate() {
                    let q = _mm256_or_si256(
                        _mm256_and_si256(low, low_halves),
                        _mm256_and_si256(high, high_bits),
                    );
                    let x = _mm256_loadu_si256(x[32 * half + 8 * part..].as_ptr().cast());
                    // Words 2 part and 2 part + 1.
                    let first = 0x0100 + 0x0404 * part as i16;
                    let words = _mm256_inserti128_si256::<1>(
                        _mm256_castsi128_si256(_mm_set1_epi16(first)),
                        _mm_set1_epi16(first + 0x0202),
                    );
                    let scales = _mm256_shuffle_epi8(scales, words);
                    // Pairs reach 2 * 63 * 127 = 16002.
                    let products = _mm256_madd_epi16(_mm256_maddubs_epi16(q, x), scales);
                    total = _mm256_add_epi32(total, products);
                }
            }
            let total = _mm_add_epi32(
                _mm256_castsi256_si128(total),
                _mm256_extracti128_si256::<1>(total),
            );
            let total = _mm_add_epi32(total, _mm_shuffle_epi32::<0b01_00_11_10>(total));
            let total = _mm_add_epi32(total, _mm_shuffle_epi32::<0b10_11_00_01>(total));
            _mm_cvtsi128_si32(total)
        })
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16]) -> Self {
        simd!({
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            WordYmm2(
                _mm256_shuffle_epi8(table, self.0),
                _mm256_shuffle_epi8(table, self.1),
            )
        })
    }

    #[inline(always)]
    fn as_f32_bits(self) -> Ymm2 {
        simd!(Ymm2(
            _mm256_castsi256_ps(self.0),
            _mm256_castsi256_ps(self.1)
        ))
    }

    #[inline(always)]
    fn to_f32(self) -> Ymm2 {
        simd!(Ymm2(_mm256_cvtepi32_ps(self.0), _mm256_cvtepi32_ps(self.1)))
    }

    #[inline(always)]
    fn f16_low(self) -> Ymm2 {
        let low = self.and(Self::splat(0xffff));
        simd!({
            // The pack works within 128-bit halves: the permutation puts the four quarters back in order.
            let packed = _mm256_packus_epi32(low.0, low.1);
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
            Ymm2(
                _mm256_cvtph_ps(_mm256_castsi256_si128(packed)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(packed)),
            )
        })
    }

    #[inline(always)]
    fn f16_high(self) -> Ymm2 {
        self.shr::<16>().f16_low()
    }
}
