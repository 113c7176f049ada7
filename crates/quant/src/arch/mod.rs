//! One file for each instruction set: its [`Lanes`](crate::lanes::Lanes) and its way into the code that is written once.
//!
//! Invariant: a function of an instruction set is entered only where this CPU was seen to have it. All `unsafe` of
//! this crate is in this folder. No algorithm is here.

pub(crate) mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
