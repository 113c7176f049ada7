//! Sixteen rows of blocks, unpacked: up to 256 columns of a tile as the kernels multiply them.
//!
//! Invariant: word r of every register belongs to row r of the tile, and the bytes of column k are in word register k / 4
//! in the order of the row, whatever the block type. Block layouts are drawn in `decode.rs`.

#![expect(
    clippy::needless_range_loop,
    reason = "registers are named by their place, often in several arrays"
)]

use crate::arch::Rows;
use crate::lanes::Lanes;
use crate::words::Words;

/// Blocks of 32 in a panel.
pub(super) const N_BLOCKS32: usize = 8;

/// 256 columns of sixteen rows of weights, for K blocks one block, for blocks of 32 up to eight.
pub(super) struct Panel<W: Words> {
    /// Four columns in each.
    pub(super) bytes: [W; 64],
    /// K blocks: the integer scale of each group of 32 or 16 columns.
    pub(super) scales: [W; 16],
    /// Q4_K and Q5_K: the integer minima of the 8 groups, as pairs of i16.
    pub(super) mins: [W; 4],
    /// The scale of each block.
    pub(super) d: [W::Lanes; N_BLOCKS32],
    /// The scale of the minima, or Q4_1's minimum.
    pub(super) m: [W::Lanes; N_BLOCKS32],
}

impl<W: Words> Panel<W> {
    #[inline(always)]
    pub(super) fn new() -> Self {
        let (zero, zeros) = (W::splat(0), W::Lanes::splat(0.0));
        Panel {
            bytes: [zero; 64],
            scales: [zero; 16],
            mins: [zero; 4],
            d: [zeros; N_BLOCKS32],
            m: [zeros; N_BLOCKS32],
        }
    }

    #[inline(always)]
    pub(super) fn unpack_q8_0(&mut self, block: usize, rows: &Rows<'_, 34>) {
        self.d[block] = W::f16_column(rows, 0);
        for half in 0..2 {
            let q = W::columns(rows, 2 + 16 * half);
            for j in 0..4 {
                self.bytes[8 * block + 4 * half + j] = q[j].bytes_i8();
            }
        }
    }

    #[inline(always)]
    pub(super) fn unpack_q4_0(&mut self, block: usize, rows: &Rows<'_, 18>) {
        self.d[block] = W::f16_column(rows, 0);
        self.unpack_halves(block, W::columns(rows, 2));
    }

    #[inline(always)]
    pub(super) fn unpack_q4_1(&mut self, block: usize, rows: &Rows<'_, 20>) {
        let [head, ..] = W::columns(rows, 0);
        (self.d[block], self.m[block]) = (head.f16_low(), head.f16_high());
        self.unpack_halves(block, W::columns(rows, 4));
    }

    #[inline(always)]
    pub(super) fn unpack_q5_0(&mut self, block: usize, rows: &Rows<'_, 22>) {
        let [head, next, ..] = W::columns(rows, 0);
        self.d[block] = head.f16_low();
        let h = head.shr::<16>().or(next.shl::<16>());
        self.unpack_halves(block, W::columns(rows, 6));
        let fifth = [
            fifth_bits(h),
            fifth_bits(h.shr::<4>()),
            fifth_bits(h.shr::<8>()),
            fifth_bits(h.shr::<12>()),
            fifth_bits(h.shr::<16>()),
            fifth_bits(h.shr::<20>()),
            fifth_bits(h.shr::<24>()),
            fifth_bits(h.shr::<28>()),
        ];
        for j in 0..8 {
            self.bytes[8 * block + j] = self.bytes[8 * block + j].or(fifth[j]);
        }
    }

    /// The low halves are columns 0..16, the high halves 16..32.
    #[inline(always)]
    fn unpack_halves(&mut self, block: usize, q: [W; 4]) {
        let low = W::splat(LOW_HALVES);
        for j in 0..4 {
            self.bytes[8 * block + j] = q[j].and(low);
            self.bytes[8 * block + 4 + j] = q[j].shr::<4>().and(low);
        }
    }

    #[inline(always)]
    pub(super) fn unpack_q4_k(&mut self, rows: &Rows<'_, 144>) {
        self.unpack_k_head(W::columns(rows, 0));
        let low = W::splat(LOW_HALVES);
        for pair in 0..4 {
            for half in 0..2 {
                let q = W::columns(rows, 16 + 32 * pair + 16 * half);
                for j in 0..4 {
                    let i = 16 * pair + 4 * half + j;
                    self.bytes[i] = q[j].and(low);
                    self.bytes[i + 8] = q[j].shr::<4>().and(low);
                }
            }
        }
    }

    #[inline(always)]
    pub(super) fn unpack_q5_k(&mut self, rows: &Rows<'_, 176>) {
        self.unpack_k_head(W::columns(rows, 0));
        let (low, bit) = (W::splat(LOW_HALVES), W::splat(0x1010_1010));
        for half in 0..2 {
            let h = W::columns(rows, 16 + 16 * half);
            // Bit g of h moved to bit 4, for each group g.
            let fifth = |h: W, g: usize| {
                let moved = match g {
                    0 => h.shl::<4>(),
                    1 => h.shl::<3>(),
                    2 => h.shl::<2>(),
                    3 => h.shl::<1>(),
                    4 => h,
                    5 => h.shr::<1>(),
                    6 => h.shr::<2>(),
                    _ => h.shr::<3>(),
                };
                moved.and(bit)
            };
            for pair in 0..4 {
                let q = W::columns(rows, 48 + 32 * pair + 16 * half);
                for j in 0..4 {
                    let i = 16 * pair + 4 * half + j;
                    self.bytes[i] = q[j].and(low).or(fifth(h[j], 2 * pair));
                    self.bytes[i + 8] = q[j].shr::<4>().and(low).or(fifth(h[j], 2 * pair + 1));
                }
            }
        }
    }

    /// The first 16 bytes of a Q4_K or Q5_K block: two f16, then 8 scales and 8 minima of 6 bits.
    #[inline(always)]
    fn unpack_k_head(&mut self, [head, s, m, high]: [W; 4]) {
        (self.d[0], self.m[0]) = (head.f16_low(), head.f16_high());
        let (six, four, two) = (
            W::splat(0x3f3f_3f3f),
            W::splat(LOW_HALVES),
            W::splat(0x3030_3030),
        );
        let scales = [s.and(six), high.and(four).or(s.shr::<2>().and(two))];
        let mins = [
            m.and(six),
            high.shr::<4>().and(four).or(m.shr::<2>().and(two)),
        ];
        let byte = W::splat(0xff);
        for i in 0..2 {
            self.scales[4 * i] = scales[i].and(byte);
            self.scales[4 * i + 1] = scales[i].shr::<8>().and(byte);
            self.scales[4 * i + 2] = scales[i].shr::<16>().and(byte);
            self.scales[4 * i + 3] = scales[i].shr::<24>();
            let (even, odd) = (W::splat(0xff), W::splat(0xff_0000));
            self.mins[2 * i] = mins[i].and(even).or(mins[i].shl::<8>().and(odd));
            self.mins[2 * i + 1] = mins[i]
                .shr::<16>()
                .and(even)
                .or(mins[i].shr::<8>().and(odd));
        }
    }

    #[inline(always)]
    pub(super) fn unpack_q6_k(&mut self, rows: &Rows<'_, 210>) {
        // The last dword of the block ends with d.
        let [_, _, _, tail] = W::columns(rows, 194);
        self.d[0] = tail.f16_high();
        let scales = W::columns(rows, 192);
        for i in 0..4 {
            self.scales[4 * i] = scales[i].shl::<24>().sar::<24>();
            self.scales[4 * i + 1] = scales[i].shl::<16>().sar::<24>();
            self.scales[4 * i + 2] = scales[i].shl::<8>().sar::<24>();
            self.scales[4 * i + 3] = scales[i].sar::<24>();
        }
        let (low, bits) = (W::splat(LOW_HALVES), W::splat(0x3030_3030));
        for half in 0..2 {
            for part in 0..2 {
                let q0 = W::columns(rows, 64 * half + 16 * part);
                let q1 = W::columns(rows, 64 * half + 32 + 16 * part);
                let h = W::columns(rows, 128 + 32 * half + 16 * part);
                for j in 0..4 {
                    let i = 32 * half + 4 * part + j;
                    self.bytes[i] = q0[j].and(low).or(h[j].shl::<4>().and(bits));
                    self.bytes[i + 8] = q1[j].and(low).or(h[j].shl::<2>().and(bits));
                    self.bytes[i + 16] = q0[j].shr::<4>().and(low).or(h[j].and(bits));
                    self.bytes[i + 24] = q1[j].shr::<4>().and(low).or(h[j].shr::<2>().and(bits));
                }
            }
        }
    }
}

const LOW_HALVES: i32 = 0x0f0f_0f0f;

/// The four lowest bits of each word, each in bit 4 of a byte of its own.
#[inline(always)]
fn fifth_bits<W: Words>(h: W) -> W {
    // The product has copies of the bits that begin at bits 4, 11, 18 and 25, so that bit i meets bit 8 i + 4.
    h.and(W::splat(15))
        .mul(W::splat(1 << 4 | 1 << 11 | 1 << 18 | 1 << 25))
        .and(W::splat(0x1010_1010))
}
