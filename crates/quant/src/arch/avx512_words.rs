//! The words as one 512-bit register (AVX-512 F, BW, DQ and VL), with and without VNNI.

use std::arch::x86_64::*;

use super::Rows;
use super::avx2_words::eight_halves;
use super::avx512::Zmm;
use crate::words::Words;

/// Sixteen words in a register. Made only below `avx512::run` (or, with VNNI, `avx512::run_vnni`), which hold the CPU
/// to the features.
#[derive(Clone, Copy)]
pub(super) struct WordZmm<const VNNI: bool>(__m512i);

/// Evaluates an intrinsic.
macro_rules! simd {
    ($e:expr) => {
        // SAFETY: `WordZmm` is reached only through `avx512::run` and `avx512::run_vnni`, which hold the CPU to the
        // features; loads are from places that `Rows` has checked.
        unsafe { $e }
    };
}

// These are functions and no closures, because a closure cannot be told to be inlined.

/// 16 bytes of each of the rows `row`, 4 + `row`, 8 + `row` and 12 + `row`. By halves: an insertion from memory into half a
/// register costs half a load.
#[inline(always)]
fn four_rows<const BYTES: usize>(
    rows: &Rows<'_, BYTES>,
    row: usize,
    offset_bytes: usize,
) -> __m512i {
    simd!(_mm512_inserti64x4::<1>(
        _mm512_castsi256_si512(two_rows(rows, row, offset_bytes)),
        two_rows(rows, 8 + row, offset_bytes)
    ))
}

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

/// The four one after the other.
#[inline(always)]
fn quarters([a, b, c, d]: [__m128i; 4]) -> __m512i {
    simd!({
        let ab = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b);
        let cd = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(c), d);
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(ab), cd)
    })
}

/// The words at `offset_bytes` of four rows from `row` on.
#[inline(always)]
fn four_words<const BYTES: usize>(
    rows: &Rows<'_, BYTES>,
    row: usize,
    offset_bytes: usize,
) -> __m128i {
    simd!(_mm_setr_epi32(
        i32::from_le_bytes(rows.bytes(row, offset_bytes)),
        i32::from_le_bytes(rows.bytes(row + 1, offset_bytes)),
        i32::from_le_bytes(rows.bytes(row + 2, offset_bytes)),
        i32::from_le_bytes(rows.bytes(row + 3, offset_bytes))
    ))
}

impl<const VNNI: bool> Words for WordZmm<VNNI> {
    type Lanes = Zmm;

    const N_AT_ONCE: usize = 8;
    const I8_OFFSET: i32 = if VNNI { 128 } else { 0 };

    #[inline(always)]
    fn splat(x: i32) -> Self {
        WordZmm(simd!(_mm512_set1_epi32(x)))
    }

    #[inline(always)]
    fn columns<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> [Self; 4] {
        // Register i holds the rows i, 4 + i, 8 + i and 12 + i in its quarters; a 4 x 4 transposition within the
        // quarters then puts the rows in order.
        let (a, b, c, d) = (
            four_rows(rows, 0, offset_bytes),
            four_rows(rows, 1, offset_bytes),
            four_rows(rows, 2, offset_bytes),
            four_rows(rows, 3, offset_bytes),
        );
        simd!({
            let (ab, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            [
                WordZmm(_mm512_unpacklo_epi64(ab, cd)),
                WordZmm(_mm512_unpackhi_epi64(ab, cd)),
                WordZmm(_mm512_unpacklo_epi64(ab_high, cd_high)),
                WordZmm(_mm512_unpackhi_epi64(ab_high, cd_high)),
            ]
        })
    }

    #[inline(always)]
    fn column<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> Self {
        WordZmm(simd!({
            let x = _mm512_castsi128_si512(four_words(rows, 0, offset_bytes));
            let x = _mm512_inserti32x4::<1>(x, four_words(rows, 4, offset_bytes));
            let x = _mm512_inserti32x4::<2>(x, four_words(rows, 8, offset_bytes));
            _mm512_inserti32x4::<3>(x, four_words(rows, 12, offset_bytes))
        }))
    }

    #[inline(always)]
    fn prefetch(bytes: &[u8], offset_bytes: usize, n_bytes: usize) {
        super::rows::prefetch(bytes, offset_bytes, n_bytes);
    }

    #[inline(always)]
    fn f16_column<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> Zmm {
        Zmm(simd!(_mm512_cvtph_ps(_mm256_set_m128i(
            eight_halves(rows, 8, offset_bytes),
            eight_halves(rows, 0, offset_bytes)
        ))))
    }

    #[inline(always)]
    fn and(self, b: Self) -> Self {
        WordZmm(simd!(_mm512_and_si512(self.0, b.0)))
    }

    #[inline(always)]
    fn or(self, b: Self) -> Self {
        WordZmm(simd!(_mm512_or_si512(self.0, b.0)))
    }

    #[inline(always)]
    fn shl<const N: u32>(self) -> Self {
        WordZmm(simd!(_mm512_slli_epi32::<N>(self.0)))
    }

    #[inline(always)]
    fn shr<const N: u32>(self) -> Self {
        WordZmm(simd!(_mm512_srli_epi32::<N>(self.0)))
    }

    #[inline(always)]
    fn sar<const N: u32>(self) -> Self {
        WordZmm(simd!(_mm512_srai_epi32::<N>(self.0)))
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        WordZmm(simd!(_mm512_add_epi32(self.0, b.0)))
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        WordZmm(simd!(_mm512_mullo_epi32(self.0, b.0)))
    }

    #[inline(always)]
    fn dot_u7(self, w: Self, x: i32) -> Self {
        let x = simd!(_mm512_set1_epi32(x));
        if VNNI {
            return WordZmm(simd!(_mm512_dpbusd_epi32(self.0, w.0, x)));
        }
        // Pairs reach 2 * 127 * 127 = 32258 and cannot saturate.
        self.add(WordZmm(simd!(_mm512_madd_epi16(
            _mm512_maddubs_epi16(w.0, x),
            _mm512_set1_epi16(1)
        ))))
    }

    #[inline(always)]
    fn bytes_i8(self) -> Self {
        if VNNI {
            return WordZmm(simd!(_mm512_xor_si512(self.0, _mm512_set1_epi8(-128))));
        }
        self
    }

    #[inline(always)]
    fn dot_i8(self, w: Self, x: i32) -> Self {
        let x = simd!(_mm512_set1_epi32(x));
        if VNNI {
            return WordZmm(simd!(_mm512_dpbusd_epi32(self.0, w.0, x)));
        }
        // The sign moves to x. Pairs reach 2 * 128 * 127 = 32512 and cannot saturate.
        self.add(WordZmm(simd!({
            let negative = _mm512_movepi8_mask(w.0);
            let x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
            _mm512_madd_epi16(
                _mm512_maddubs_epi16(_mm512_abs_epi8(w.0), x),
                _mm512_set1_epi16(1),
            )
        })))
    }

    #[inline(always)]
    fn dot_pairs(self, w: Self, x: i32) -> Self {
        let x = simd!(_mm512_set1_epi32(x));
        if VNNI {
            return WordZmm(simd!(_mm512_dpwssd_epi32(self.0, w.0, x)));
        }
        self.add(WordZmm(simd!(_mm512_madd_epi16(w.0, x))))
    }

    #[inline(always)]
    fn dot_q6_k(block: &[u8; 210], x: &[i32; 64], minus_32_sums: &[i32; 16]) -> i32 {
        simd!({
            let scales = _mm_loadu_si128(block[192..].as_ptr().cast());
            let minus = _mm512_loadu_si512(minus_32_sums.as_ptr().cast());
            let mut total = _mm512_mullo_epi32(_mm512_cvtepi8_epi32(scales), minus);
            let scales = _mm512_castsi256_si512(_mm256_cvtepi8_epi16(scales));
            let (low_halves, high_bits) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
            for half in 0..2 {
                // Columns 0..64 of this half have the lower halves of `low`, 64..128 the higher ones. Each byte of `high`
                // has two bits of four columns, 32 apart.
                let low = _mm512_loadu_si512(block[64 * half..].as_ptr().cast());
                let high = _mm256_loadu_si256(block[128 + 32 * half..].as_ptr().cast());
                let high = _mm512_broadcast_i64x4(high);
                let left = _mm512_set_epi64(2, 2, 2, 2, 4, 4, 4, 4);
                let right = _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0);
                let q = [
                    (low, _mm512_sllv_epi64(high, left)),
                    (_mm512_srli_epi64::<4>(low), _mm512_srlv_epi64(high, right)),
                ];
                for (i, (low, high)) in q.into_iter().enumerate() {
                    let high = _mm512_and_si512(high, high_bits);
                    // high | low & low_halves
                    let q = _mm512_ternarylogic_epi64::<0b1111_1000>(high, low, low_halves);
                    let quarter = 2 * half + i;
                    let x = _mm512_loadu_si512(x[16 * quarter..].as_ptr().cast());
                    let first = 4 * quarter as i16;
                    let groups = quarters([
                        _mm_set1_epi16(first),
                        _mm_set1_epi16(first + 1),
                        _mm_set1_epi16(first + 2),
                        _mm_set1_epi16(first + 3),
                    ]);
                    let scales = _mm512_permutexvar_epi16(groups, scales);
                    // Pairs reach 2 * 63 * 127 = 16002, and with their scales four pairs are far from 2^31.
                    let products = _mm512_madd_epi16(_mm512_maddubs_epi16(q, x), scales);
                    total = _mm512_add_epi32(total, products);
                }
            }
            _mm512_reduce_add_epi32(total)
        })
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16]) -> Self {
        WordZmm(simd!({
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, self.0)
        }))
    }

    #[inline(always)]
    fn as_f32_bits(self) -> Zmm {
        Zmm(simd!(_mm512_castsi512_ps(self.0)))
    }

    #[inline(always)]
    fn to_f32(self) -> Zmm {
        Zmm(simd!(_mm512_cvtepi32_ps(self.0)))
    }

    #[inline(always)]
    fn f16_low(self) -> Zmm {
        Zmm(simd!(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(self.0))))
    }

    #[inline(always)]
    fn f16_high(self) -> Zmm {
        self.shr::<16>().f16_low()
    }
}
