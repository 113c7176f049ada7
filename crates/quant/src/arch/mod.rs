//! One file for each instruction set with its [`Lanes`](crate::lanes::Lanes), one with its
//! [`Words`](crate::words::Words), and the way into the code that is written once.
//!
//! Invariant: a function of an instruction set is entered only where this CPU was seen to have it. All `unsafe` of
//! this crate is in this folder and in `product/columns.rs`. No algorithm is here.

mod rows;
pub(crate) mod scalar;
mod scalar_words;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_words;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_words;

pub(crate) use rows::{CACHE_LINE, Rows};
