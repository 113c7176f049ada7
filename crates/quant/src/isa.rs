//! Which instruction sets this CPU offers, and the choice among them.
//!
//! Invariant: the choice changes the speed and never a byte of the result.

use std::sync::OnceLock;

use crate::arch::scalar;
#[cfg(target_arch = "x86_64")]
use crate::arch::{avx2, avx512};
use crate::words::Work;

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
    /// AVX-512 as above with VNNI, which multiplies bytes. Encoding and decoding are those of [`Isa::Avx512`].
    Avx512Vnni,
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
        if avx512::has_vnni() {
            isas.push(Isa::Avx512Vnni);
        }
    }
    isas
}

/// The fastest of [`isas`], found once.
pub(crate) fn fastest() -> Isa {
    static FASTEST: OnceLock<Isa> = OnceLock::new();
    *FASTEST.get_or_init(|| *isas().last().unwrap_or(&Isa::Scalar))
}

/// Does `work` on `isa`. Panics where this CPU lacks it.
pub(crate) fn run(isa: Isa, work: impl Work) {
    match isa {
        Isa::Scalar => scalar::run(work),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::run(work),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::run(work),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => avx512::run_vnni(work),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Vnni => panic!("this CPU has no {isa:?}"),
    }
}

/// As [`run`], for work in which AVX-512 with VNNI has nothing over AVX-512: it is compiled once for both.
pub(crate) fn run_lanes(isa: Isa, work: impl Work) {
    let isa = match isa {
        Isa::Avx512Vnni => Isa::Avx512,
        isa => isa,
    };
    run(isa, work);
}
