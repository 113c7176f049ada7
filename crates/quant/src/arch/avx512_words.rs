//! The words as one 512-bit register (AVX-512 F, BW, DQ and VL), with and without VNNI.

use std::arch::x86_64::*;

use super::Rows;
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
        let four = |i: usize| {
            let row = |r| simd!(_mm_loadu_si128(rows.at::<16>(r, offset_bytes).cast()));
            simd!({
                let x = _mm512_castsi128_si512(row(i));
                let x = _mm512_inserti32x4::<1>(x, row(4 + i));
                let x = _mm512_inserti32x4::<2>(x, row(8 + i));
                _mm512_inserti32x4::<3>(x, row(12 + i))
            })
        };
        let (a, b, c, d) = (four(0), four(1), four(2), four(3));
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
    fn f16_column<const BYTES: usize>(rows: &Rows<'_, BYTES>, offset_bytes: usize) -> Zmm {
        let half = |r| i16::from_le_bytes(rows.bytes(r, offset_bytes));
        let eight = |r| {
            simd!(_mm_setr_epi16(
                half(r),
                half(r + 1),
                half(r + 2),
                half(r + 3),
                half(r + 4),
                half(r + 5),
                half(r + 6),
                half(r + 7)
            ))
        };
        Zmm(simd!(_mm512_cvtph_ps(_mm256_set_m128i(eight(8), eight(0)))))
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
