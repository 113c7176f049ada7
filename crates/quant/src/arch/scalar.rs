//! The lanes as an array, for every CPU; also the plainest statement of what each operation means.

use std::ops::{Add, Div, Mul, Sub};

use half::f16;

use super::scalar_words::WordArray;
use crate::lanes::{Lanes, N_LANES};
use crate::words::Work;

/// Sixteen f32 in an array.
#[derive(Clone, Copy)]
pub(crate) struct Array(pub(super) [f32; N_LANES]);

/// Does `work` in plain Rust.
pub(crate) fn run(work: impl Work) {
    work.run::<WordArray>();
}

impl Array {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Array(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl Add for Array {
    type Output = Self;
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
}

impl Sub for Array {
    type Output = Self;
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
}

impl Mul for Array {
    type Output = Self;
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
}

impl Div for Array {
    type Output = Self;
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }
}

impl Lanes for Array {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Array([x; N_LANES])
    }

    #[inline(always)]
    fn load(x: &[f32; N_LANES]) -> Self {
        Array(*x)
    }

    #[inline(always)]
    fn store(self) -> [f32; N_LANES] {
        self.0
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Array(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }

    #[inline(always)]
    fn neg_mul_add(self, b: Self, c: Self) -> Self {
        Array(std::array::from_fn(|i| {
            (-self.0[i]).mul_add(b.0[i], c.0[i])
        }))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        self.zip(b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn round(self) -> Self {
        // At 1.5 * 2^23 the spacing of f32 is 1, so that the addition itself rounds; `round_ties_even` would be a
        // call into libm for each lane.
        const ONE_APART: f32 = 12_582_912.0;
        Array(self.0.map(|a| (a + ONE_APART) - ONE_APART))
    }

    #[inline(always)]
    fn select_lt(self, b: Self, then: Self, otherwise: Self) -> Self {
        Array(std::array::from_fn(|i| {
            if self.0[i] < b.0[i] {
                then.0[i]
            } else {
                otherwise.0[i]
            }
        }))
    }

    #[inline(always)]
    fn to_f16(self) -> [u16; N_LANES] {
        self.0.map(|a| f16::from_f32(a).to_bits())
    }

    #[inline(always)]
    fn from_f16(x: &[u16; N_LANES]) -> Self {
        Array(x.map(|a| f16::from_bits(a).to_f32()))
    }

    #[inline(always)]
    fn to_i8(self) -> [i8; N_LANES] {
        self.0.map(|a| a as i8)
    }

    #[inline(always)]
    fn from_bf16(x: &[u16; N_LANES]) -> Self {
        Array(x.map(|a| f32::from_bits(u32::from(a) << 16)))
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        Array(
            self.0
                .map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32)),
        )
    }

    #[inline(always)]
    fn sum4(x: [Self; 4]) -> [f32; 4] {
        x.map(|x| {
            let mut x = x.0;
            for n in [8, 4, 2, 1] {
                for i in 0..n {
                    x[i] += x[n + i];
                }
            }
            x[0]
        })
    }
}
