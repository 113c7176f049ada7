//! The lanes as one 512-bit register (AVX-512 F, BW, DQ and VL).

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Sub};

use super::avx512_words::WordZmm;
use crate::lanes::{Lanes, N_LANES};
use crate::words::Work;

/// Whether this CPU has what this file uses.
pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && super::avx2::is_available()
}

/// Whether this CPU also multiplies bytes with VNNI.
pub(crate) fn has_vnni() -> bool {
    is_available() && is_x86_feature_detected!("avx512vnni")
}

/// Does `work` with AVX-512. Panics where [`is_available`] is false.
pub(crate) fn run(work: impl Work) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn inner(work: impl Work) {
        work.run::<WordZmm<false>>();
    }
    assert!(is_available(), "this CPU has no AVX-512");
    // SAFETY: the CPU has the features, as just asserted.
    unsafe { inner(work) }
}

/// Does `work` with AVX-512 and VNNI. Panics where [`has_vnni`] is false.
pub(crate) fn run_vnni(work: impl Work) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn inner(work: impl Work) {
        work.run::<WordZmm<true>>();
    }
    assert!(has_vnni(), "this CPU has no AVX-512 VNNI");
    // SAFETY: the CPU has the features, as just asserted.
    unsafe { inner(work) }
}

/// Sixteen f32 in a register. Private to `arch`: its operations run only below `inner`.
#[derive(Clone, Copy)]
pub(super) struct Zmm(pub(super) __m512);

/// Evaluates an intrinsic.
macro_rules! simd {
    ($e:expr) => {
        // SAFETY: `Zmm` is reached only through `run` and `run_vnni`, which hold the CPU to the features; loads and stores go to arrays of exactly the register's size.
        unsafe { $e }
    };
}

impl Add for Zmm {
    type Output = Self;
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        simd!(Zmm(_mm512_add_ps(self.0, b.0)))
    }
}

impl Sub for Zmm {
    type Output = Self;
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        simd!(Zmm(_mm512_sub_ps(self.0, b.0)))
    }
}

impl Mul for Zmm {
    type Output = Self;
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        simd!(Zmm(_mm512_mul_ps(self.0, b.0)))
    }
}

impl Div for Zmm {
    type Output = Self;
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        simd!(Zmm(_mm512_div_ps(self.0, b.0)))
    }
}

impl Lanes for Zmm {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        simd!(Zmm(_mm512_set1_ps(x)))
    }

    #[inline(always)]
    fn load(x: &[f32; N_LANES]) -> Self {
        simd!(Zmm(_mm512_loadu_ps(x.as_ptr())))
    }

    #[inline(always)]
    fn store(self) -> [f32; N_LANES] {
        let mut x = [0.0; N_LANES];
        simd!(_mm512_storeu_ps(x.as_mut_ptr(), self.0));
        x
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        simd!(Zmm(_mm512_fmadd_ps(self.0, b.0, c.0)))
    }

    #[inline(always)]
    fn neg_mul_add(self, b: Self, c: Self) -> Self {
        simd!(Zmm(_mm512_fnmadd_ps(self.0, b.0, c.0)))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        simd!(Zmm(_mm512_min_ps(self.0, b.0)))
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        simd!(Zmm(_mm512_max_ps(self.0, b.0)))
    }

    #[inline(always)]
    fn round(self) -> Self {
        simd!(Zmm(_mm512_roundscale_ps::<
            { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
        >(self.0)))
    }

    #[inline(always)]
    fn select_lt(self, b: Self, then: Self, otherwise: Self) -> Self {
        simd!({
            let lt = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, b.0);
            Zmm(_mm512_mask_blend_ps(lt, otherwise.0, then.0))
        })
    }

    #[inline(always)]
    fn to_f16(self) -> [u16; N_LANES] {
        let mut x = [0; N_LANES];
        simd!(_mm256_storeu_si256(
            x.as_mut_ptr().cast(),
            _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0),
        ));
        x
    }

    #[inline(always)]
    fn from_f16(x: &[u16; N_LANES]) -> Self {
        simd!(Zmm(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn to_i8(self) -> [i8; N_LANES] {
        let mut x = [0; N_LANES];
        simd!(_mm_storeu_si128(
            x.as_mut_ptr().cast(),
            _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0))
        ));
        x
    }

    #[inline(always)]
    fn from_bf16(x: &[u16; N_LANES]) -> Self {
        Zmm(simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()))
        ))))
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        Zmm(simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(
            _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127))
        ))))
    }

    #[inline(always)]
    fn sum4([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        simd!({
            // Lower half: the eight of the first; upper half: the eight of the second.
            let ab = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b01_00_01_00>(a.0, b.0),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(a.0, b.0),
            );
            let cd = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b01_00_01_00>(c.0, d.0),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(c.0, d.0),
            );
            // Each quarter: the four of one of them.
            let four = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd),
            );
            let two = _mm512_add_ps(four, _mm512_permute_ps::<0b11_10_11_10>(four));
            let one = _mm512_add_ps(two, _mm512_permute_ps::<0b01_01_01_01>(two));
            let sums = Zmm(one).store();
            [sums[0], sums[4], sums[8], sums[12]]
        })
    }
}
