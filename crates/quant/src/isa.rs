//! Which instruction sets this CPU offers, and the choice among them.
//!
//! Invariant: the choice changes the speed and never a byte of the result.

use std::sync::OnceLock;

use crate::BlockType;
use crate::arch::scalar;
#[cfg(target_arch = "x86_64")]
use crate::arch::{avx2, avx512};

/// An instruction set that this crate is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, on every CPU. Where the compiler may not assume a fused multiply-add (x86-64), each one is a library
    /// call, and encoding runs at a few million weights a second.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

/// The instruction sets that this CPU has, slowest first; never empty.
pub fn isas() -> Vec<Isa> {
    #[cfg(target_arch = "x86_64")]
    let mut isas = vec![Isa::Scalar];
    #[cfg(not(target_arch = "x86_64"))]
    let isas = vec![Isa::Scalar];
    #[cfg(target_arch = "x86_64")]
    {
        if avx2::is_available() {
            isas.push(Isa::Avx2);
        }
        if avx512::is_available() {
            isas.push(Isa::Avx512);
        }
    }
    isas
}

/// The fastest of [`isas`], found once.
pub(crate) fn fastest() -> Isa {
    static FASTEST: OnceLock<Isa> = OnceLock::new();
    *FASTEST.get_or_init(|| *isas().last().unwrap_or(&Isa::Scalar))
}

pub(crate) fn encode(isa: Isa, block_type: BlockType, values: &[f32], blocks: &mut [u8]) {
    match isa {
        Isa::Scalar => scalar::encode(block_type, values, blocks),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::encode(block_type, values, blocks),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::encode(block_type, values, blocks),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => panic!("this CPU has no {isa:?}"),
    }
}

pub(crate) fn decode(isa: Isa, block_type: BlockType, blocks: &[u8], values: &mut [f32]) {
    match isa {
        Isa::Scalar => scalar::decode(block_type, blocks, values),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::decode(block_type, blocks, values),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::decode(block_type, blocks, values),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => panic!("this CPU has no {isa:?}"),
    }
}
