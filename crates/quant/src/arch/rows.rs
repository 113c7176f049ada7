//! Sixteen blocks of weights, one below the other, as the kernels read them.
//!
//! Invariant: every row has `BYTES` readable bytes, checked when the value is made. Left out: what the bytes mean.

use std::marker::PhantomData;

use crate::lanes::N_LANES;

/// One block of `BYTES` bytes in each of sixteen rows that lie `stride_bytes` apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, const BYTES: usize> {
    /// The rows 0, 4, 8 and 12.
    fourths: [*const u8; 4],
    stride_bytes: usize,
    bytes: PhantomData<&'a [u8]>,
}

impl<'a, const BYTES: usize> Rows<'a, BYTES> {
    /// The blocks at `offset_bytes`, `offset_bytes + stride_bytes`, … of `bytes`.
    ///
    /// # Panics
    /// When `bytes` ends before the last of them does.
    #[inline(always)]
    pub(crate) fn new(bytes: &'a [u8], offset_bytes: usize, stride_bytes: usize) -> Self {
        let fits = bytes
            .len()
            .checked_sub(offset_bytes)
            .and_then(|left| left.checked_sub(BYTES))
            .is_some_and(|left| left / (N_LANES - 1) >= stride_bytes);
        assert!(fits, "sixteen rows of blocks end beyond the weights");
        let first = bytes.as_ptr().wrapping_add(offset_bytes);
        Rows {
            fourths: [
                first,
                opaque(first.wrapping_add(4 * stride_bytes)),
                opaque(first.wrapping_add(8 * stride_bytes)),
                opaque(first.wrapping_add(12 * stride_bytes)),
            ],
            stride_bytes,
            bytes: PhantomData,
        }
    }

    /// Where the `N` bytes at `offset_bytes` of row `row` lie: readable for `N` bytes.
    #[inline(always)]
    pub(super) fn at<const N: usize>(&self, row: usize, offset_bytes: usize) -> *const u8 {
        assert!(row < N_LANES && offset_bytes + N <= BYTES);
        // `new` found BYTES bytes at each of the sixteen rows, and the place is within them.
        self.fourths[row / 4].wrapping_add(row % 4 * self.stride_bytes + offset_bytes)
    }

    /// The `N` bytes at `offset_bytes` of row `row`.
    #[inline(always)]
    pub(super) fn bytes<const N: usize>(&self, row: usize, offset_bytes: usize) -> [u8; N] {
        // SAFETY: `at` gives a place with N readable bytes, and bytes have no alignment.
        unsafe { self.at::<N>(row, offset_bytes).cast::<[u8; N]>().read() }
    }
}

/// `place`, of which the compiler does not know how it was found. With four places in registers and up to three strides
/// beside each, every row has an address that the CPU adds up by itself; seeing through, the compiler would keep sixteen
/// places in memory and load each before its use.
#[inline(always)]
#[cfg_attr(
    target_arch = "x86_64",
    expect(
        clippy::pointers_in_nomem_asm_block,
        reason = "nothing is read at the place"
    )
)]
fn opaque(place: *const u8) -> *const u8 {
    #[cfg(target_arch = "x86_64")]
    {
        let mut place = place;
        // SAFETY: no instruction is run, the register keeps its value.
        unsafe {
            std::arch::asm!("/* {0} */", inout(reg) place, options(pure, nomem, nostack, preserves_flags));
        }
        place
    }
    #[cfg(not(target_arch = "x86_64"))]
    place
}

/// Asks for `n_bytes` from `offset_bytes` on, into the second cache; beyond the end it does no harm.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn prefetch(bytes: &[u8], offset_bytes: usize, n_bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    let first = bytes.as_ptr().wrapping_add(offset_bytes);
    for line in 0..n_bytes.div_ceil(CACHE_LINE) {
        let place = first.wrapping_add(line * CACHE_LINE);
        // SAFETY: a prefetch reads nothing: any place is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(place.cast()) };
    }
}

/// Bytes that a CPU fetches at once.
pub(crate) const CACHE_LINE: usize = 64;
