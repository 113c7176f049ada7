//! The lanes as two 256-bit registers (AVX2, FMA and F16C).

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Sub};

use super::avx2_words::WordYmm2;
use crate::lanes::{Lanes, N_LANES};
use crate::words::Work;

/// Whether this CPU has what this file uses.
pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Does `work` with AVX2. Panics where [`is_available`] is false.
pub(crate) fn run(work: impl Work) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner(work: impl Work) {
        work.run::<WordYmm2>();
    }
    assert!(is_available(), "this CPU has no AVX2, FMA and F16C");
    // SAFETY: the CPU has the features, as just asserted.
    unsafe { inner(work) }
}

/// Sixteen f32 in two registers. Private to `arch`: its operations run only below `inner`.
#[derive(Clone, Copy)]
pub(super) struct Ymm2(pub(super) __m256, pub(super) __m256);

/// Evaluates an intrinsic.
macro_rules! simd {
    ($e:expr) => {
        // SAFETY: `Ymm2` is reached only through `run`, which holds the CPU to the features; loads and stores go to the two halves of arrays of exactly the registers' size.
        unsafe { $e }
    };
}

impl Add for Ymm2 {
    type Output = Self;
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        simd!(Ymm2(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)))
    }
}

impl Sub for Ymm2 {
    type Output = Self;
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        simd!(Ymm2(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)))
    }
}

impl Mul for Ymm2 {
    type Output = Self;
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        simd!(Ymm2(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)))
    }
}

impl Div for Ymm2 {
    type Output = Self;
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        simd!(Ymm2(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)))
    }
}

impl Lanes for Ymm2 {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        simd!(Ymm2(_mm256_set1_ps(x), _mm256_set1_ps(x)))
    }

    #[inline(always)]
    fn load(x: &[f32; N_LANES]) -> Self {
        simd!(Ymm2(
            _mm256_loadu_ps(x.as_ptr()),
            _mm256_loadu_ps(x[8..].as_ptr())
        ))
    }

    #[inline(always)]
    fn store(self) -> [f32; N_LANES] {
        let mut x = [0.0; N_LANES];
        simd!({
            _mm256_storeu_ps(x.as_mut_ptr(), self.0);
            _mm256_storeu_ps(x[8..].as_mut_ptr(), self.1);
        });
        x
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        simd!(Ymm2(
            _mm256_fmadd_ps(self.0, b.0, c.0),
            _mm256_fmadd_ps(self.1, b.1, c.1)
        ))
    }

    #[inline(always)]
    fn neg_mul_add(self, b: Self, c: Self) -> Self {
        simd!(Ymm2(
            _mm256_fnmadd_ps(self.0, b.0, c.0),
            _mm256_fnmadd_ps(self.1, b.1, c.1)
        ))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        simd!(Ymm2(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)))
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        simd!(Ymm2(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)))
    }

    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        simd!(Ymm2(
            _mm256_round_ps::<NEAREST>(self.0),
            _mm256_round_ps::<NEAREST>(self.1)
        ))
    }

    #[inline(always)]
    fn select_lt(self, b: Self, then: Self, otherwise: Self) -> Self {
        simd!(Ymm2(
            _mm256_blendv_ps(
                otherwise.0,
                then.0,
                _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, b.0)
            ),
            _mm256_blendv_ps(
                otherwise.1,
                then.1,
                _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, b.1)
            ),
        ))
    }

    #[inline(always)]
    fn to_f16(self) -> [u16; N_LANES] {
        let mut x = [0; N_LANES];
        simd!({
            _mm_storeu_si128(
                x.as_mut_ptr().cast(),
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0),
            );
            _mm_storeu_si128(
                x[8..].as_mut_ptr().cast(),
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1),
            );
        });
        x
    }

    #[inline(always)]
    fn from_f16(x: &[u16; N_LANES]) -> Self {
        simd!(Ymm2(
            _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(x[8..].as_ptr().cast())),
        ))
    }

    #[inline(always)]
    fn to_i8(self) -> [i8; N_LANES] {
        let mut x = [0; N_LANES];
        simd!({
            // The packs work within 128-bit halves: the permutation puts the four quarters back in order.
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(x.as_mut_ptr().cast(), bytes);
        });
        x
    }

    #[inline(always)]
    fn from_bf16(x: &[u16; N_LANES]) -> Self {
        simd!({
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(x[8..].as_ptr().cast()));
            Ymm2(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        })
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        simd!({
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), bias);
            let high = _mm256_add_epi32(_mm256_cvtps_epi32(self.1), bias);
            Ymm2(
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high)),
            )
        })
    }

    #[inline(always)]
    fn sum4([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        simd!({
            let (a, b) = (_mm256_add_ps(a.0, a.1), _mm256_add_ps(b.0, b.1));
            let (c, d) = (_mm256_add_ps(c.0, c.1), _mm256_add_ps(d.0, d.1));
            // Lower half: the four of the first; upper half: the four of the second.
            let ab = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(a, b),
                _mm256_permute2f128_ps::<0x31>(a, b),
            );
            let cd = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(c, d),
                _mm256_permute2f128_ps::<0x31>(c, d),
            );
            // In each half, two of ab and two of cd, then one of each.
            let two = _mm256_add_ps(
                _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),
                _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd),
            );
            let one = _mm256_add_ps(two, _mm256_permute_ps::<0b11_11_01_01>(two));
            let mut sums = [0.0; 8];
            _mm256_storeu_ps(sums.as_mut_ptr(), one);
            [sums[0], sums[4], sums[2], sums[6]]
        })
    }
}
