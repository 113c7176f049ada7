//! Sixteen blocks of weights, one below the other, as the kernels read them.
//!
//! Invariant: every row has `BYTES` readable bytes, checked when the value is made. Left out: what the bytes mean.

use std::marker::PhantomData;

use crate::lanes::N_LANES;

/// One block of `BYTES` bytes in each of sixteen rows that lie `stride_bytes` apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, const BYTES: usize> {
    first: *const u8,
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
        Rows {
            first: bytes[offset_bytes..].as_ptr(),
            stride_bytes,
            bytes: PhantomData,
        }
    }

    /// Where the `N` bytes at `offset_bytes` of row `row` lie: readable for `N` bytes.
    #[inline(always)]
    pub(super) fn at<const N: usize>(&self, row: usize, offset_bytes: usize) -> *const u8 {
        assert!(row < N_LANES && offset_bytes + N <= BYTES);
        // SAFETY: `new` found BYTES bytes at each of the sixteen rows, and the place is within them.
        unsafe { self.first.add(row * self.stride_bytes + offset_bytes) }
    }

    /// The `N` bytes at `offset_bytes` of row `row`.
    #[inline(always)]
    pub(super) fn bytes<const N: usize>(&self, row: usize, offset_bytes: usize) -> [u8; N] {
        // SAFETY: `at` gives a place with N readable bytes, and bytes have no alignment.
        unsafe { self.at::<N>(row, offset_bytes).cast::<[u8; N]>().read() }
    }
}
