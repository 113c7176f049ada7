//! The integers of blocks, sixteen rows at once: each block type as the same few registers.
//!
//! Invariant: word r of every register belongs to row r of the tile, and the columns come as groups with one scale, each
//! group's columns in the order of the row. What a sink does with them is its affair: a panel keeps them for many rows of
//! activations, `direct.rs` multiplies them at once. Block layouts are drawn in `decode.rs`.

use crate::arch::Rows;
use crate::mxfp4::TWICE_E2M1_PLUS_12;
use crate::words::Words;

/// Takes unpacked blocks.
pub(super) trait Sink<W: Words> {
    /// The scales of block `block`: `d`, and `m` that of the minima or Q4_1's minimum itself (else 0). Comes first.
    fn scales(&mut self, block: usize, d: W::Lanes, m: W::Lanes);
    /// K blocks: the integer scale of each group (8 or 16). Comes before the groups.
    fn group_scales(&mut self, scales: [W; 16]);
    /// Q4_K and Q5_K: the integer minima of the 8 groups, as pairs of i16.
    fn group_mins(&mut self, mins: [W; 4]);
    /// Group `group`: `M` words of four columns each.
    fn group<const M: usize>(&mut self, group: usize, words: [W; M]);
}

const LOW_HALVES: i32 = 0x0f0f_0f0f;

#[inline(always)]
pub(super) fn unpack_q8_0<W: Words>(rows: &Rows<'_, 34>, block: usize, sink: &mut impl Sink<W>) {
    sink.scales(block, W::f16_column(rows, 0), W::splat(0).to_f32());
    let q = eight(W::columns(rows, 2), W::columns(rows, 18));
    sink.group(block, bytes_i8(q));
}

#[inline(always)]
pub(super) fn unpack_q4_0<W: Words>(rows: &Rows<'_, 18>, block: usize, sink: &mut impl Sink<W>) {
    sink.scales(block, W::f16_column(rows, 0), W::splat(0).to_f32());
    sink.group(block, halves(W::columns(rows, 2)));
}

#[inline(always)]
pub(super) fn unpack_mxfp4<W: Words>(rows: &Rows<'_, 17>, block: usize, sink: &mut impl Sink<W>) {
    // 2^(e - 128) may be subnormal; as a product of two powers it needs no cases.
    let e = W::column(rows, 0).and(W::splat(0xff));
    let (half, odd) = (e.shr::<1>(), e.and(W::splat(1)));
    let power = |n: W| n.add(W::splat(63)).shl::<23>().as_f32_bits();
    let d = power(half) * power(half.add(odd));
    sink.scales(block, d, W::splat(0).to_f32());
    let mut q = halves(W::columns(rows, 1));
    for q in &mut q {
        *q = q.look_up(&TWICE_E2M1_PLUS_12);
    }
    sink.group(block, q);
}

#[inline(always)]
pub(super) fn unpack_q4_1<W: Words>(rows: &Rows<'_, 20>, block: usize, sink: &mut impl Sink<W>) {
    let head = W::column(rows, 0);
    sink.scales(block, head.f16_low(), head.f16_high());
    sink.group(block, halves(W::columns(rows, 4)));
}

#[inline(always)]
pub(super) fn unpack_q5_0<W: Words>(rows: &Rows<'_, 22>, block: usize, sink: &mut impl Sink<W>) {
    let h = W::column(rows, 2);
    sink.scales(block, W::f16_column(rows, 0), W::splat(0).to_f32());
    let q = halves(W::columns(rows, 6));
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
    sink.group(block, or(q, fifth));
}

#[inline(always)]
pub(super) fn unpack_q4_k<W: Words>(rows: &Rows<'_, 144>, sink: &mut impl Sink<W>) {
    unpack_k_head(W::columns(rows, 0), sink);
    // Written out, so that all places are constants.
    unpack_q4_k_pair(rows, 0, sink);
    unpack_q4_k_pair(rows, 1, sink);
    unpack_q4_k_pair(rows, 2, sink);
    unpack_q4_k_pair(rows, 3, sink);
}

#[inline(always)]
fn unpack_q4_k_pair<W: Words>(rows: &Rows<'_, 144>, pair: usize, sink: &mut impl Sink<W>) {
    let at = 16 + 32 * pair;
    let q = eight(W::columns(rows, at), W::columns(rows, at + 16));
    sink.group(2 * pair, low_halves(q));
    sink.group(2 * pair + 1, high_halves(q));
}

#[inline(always)]
pub(super) fn unpack_q5_k<W: Words>(rows: &Rows<'_, 176>, sink: &mut impl Sink<W>) {
    unpack_k_head(W::columns(rows, 0), sink);
    let bit = W::splat(0x1010_1010);
    let mut h = eight(W::columns(rows, 16), W::columns(rows, 32));
    for pair in 0..4 {
        let at = 48 + 32 * pair;
        let q = eight(W::columns(rows, at), W::columns(rows, at + 16));
        // The bits of this pair are the lowest two of each byte of h.
        sink.group(2 * pair, or(low_halves(q), shl_and::<W, 8, 4>(h, bit)));
        sink.group(2 * pair + 1, or(high_halves(q), shl_and::<W, 8, 3>(h, bit)));
        h = shr_and::<W, 8, 2>(h, W::splat(-1));
    }
}

/// The first 16 bytes of a Q4_K or Q5_K block: two f16, then 8 scales and 8 minima of 6 bits.
#[inline(always)]
fn unpack_k_head<W: Words>([head, s, m, high]: [W; 4], sink: &mut impl Sink<W>) {
    sink.scales(0, head.f16_low(), head.f16_high());
    let (six, four, two) = (
        W::splat(0x3f3f_3f3f),
        W::splat(LOW_HALVES),
        W::splat(0x3030_3030),
    );
    let packed = [s.and(six), high.and(four).or(s.shr::<2>().and(two))];
    let byte = W::splat(0xff);
    let mut scales = [W::splat(0); 16];
    for i in 0..2 {
        scales[4 * i] = packed[i].and(byte);
        scales[4 * i + 1] = packed[i].shr::<8>().and(byte);
        scales[4 * i + 2] = packed[i].shr::<16>().and(byte);
        scales[4 * i + 3] = packed[i].shr::<24>();
    }
    sink.group_scales(scales);
    let packed = [
        m.and(six),
        high.shr::<4>().and(four).or(m.shr::<2>().and(two)),
    ];
    let (even, odd) = (W::splat(0xff), W::splat(0xff_0000));
    let mut mins = [W::splat(0); 4];
    for i in 0..2 {
        mins[2 * i] = packed[i].and(even).or(packed[i].shl::<8>().and(odd));
        mins[2 * i + 1] = packed[i]
            .shr::<16>()
            .and(even)
            .or(packed[i].shr::<8>().and(odd));
    }
    sink.group_mins(mins);
}

#[inline(always)]
pub(super) fn unpack_q6_k<W: Words>(rows: &Rows<'_, 210>, sink: &mut impl Sink<W>) {
    sink.scales(0, W::f16_column(rows, 208), W::splat(0).to_f32());
    let packed = W::columns(rows, 192);
    let mut scales = [W::splat(0); 16];
    for i in 0..4 {
        scales[4 * i] = packed[i].shl::<24>().sar::<24>();
        scales[4 * i + 1] = packed[i].shl::<16>().sar::<24>();
        scales[4 * i + 2] = packed[i].shl::<8>().sar::<24>();
        scales[4 * i + 3] = packed[i].sar::<24>();
    }
    sink.group_scales(scales);
    // Written out, so that all places are constants.
    unpack_q6_k_quarter(rows, 0, 0, sink);
    unpack_q6_k_quarter(rows, 0, 1, sink);
    unpack_q6_k_quarter(rows, 1, 0, sink);
    unpack_q6_k_quarter(rows, 1, 1, sink);
}

#[inline(always)]
fn unpack_q6_k_quarter<W: Words>(
    rows: &Rows<'_, 210>,
    half: usize,
    part: usize,
    sink: &mut impl Sink<W>,
) {
    let bits = W::splat(0x3030_3030);
    let q0 = W::columns(rows, 64 * half + 16 * part);
    let q1 = W::columns(rows, 64 * half + 32 + 16 * part);
    let h = W::columns(rows, 128 + 32 * half + 16 * part);
    let group = 8 * half + part;
    sink.group(group, or(low_halves(q0), shl_and::<W, 4, 4>(h, bits)));
    sink.group(group + 2, or(low_halves(q1), shl_and::<W, 4, 2>(h, bits)));
    sink.group(group + 4, or(high_halves(q0), shr_and::<W, 4, 0>(h, bits)));
    sink.group(group + 6, or(high_halves(q1), shr_and::<W, 4, 2>(h, bits)));
}

/// Blocks of 32 with halves of bytes: the low halves are columns 0..16, the high halves 16..32.
#[inline(always)]
fn halves<W: Words>(q: [W; 4]) -> [W; 8] {
    eight(low_halves(q), high_halves(q))
}

// These are functions and no closures, because a closure cannot be told to be inlined.

#[inline(always)]
fn low_halves<W: Words, const M: usize>(mut q: [W; M]) -> [W; M] {
    for q in &mut q {
        *q = q.and(W::splat(LOW_HALVES));
    }
    q
}

#[inline(always)]
fn high_halves<W: Words, const M: usize>(mut q: [W; M]) -> [W; M] {
    for q in &mut q {
        *q = q.shr::<4>().and(W::splat(LOW_HALVES));
    }
    q
}

#[inline(always)]
fn bytes_i8<W: Words, const M: usize>(mut q: [W; M]) -> [W; M] {
    for q in &mut q {
        *q = q.bytes_i8();
    }
    q
}

#[inline(always)]
fn or<W: Words, const M: usize>(mut a: [W; M], b: [W; M]) -> [W; M] {
    for j in 0..M {
        a[j] = a[j].or(b[j]);
    }
    a
}

#[inline(always)]
fn shl_and<W: Words, const M: usize, const N: u32>(mut h: [W; M], bits: W) -> [W; M] {
    for h in &mut h {
        *h = h.shl::<N>().and(bits);
    }
    h
}

#[inline(always)]
fn shr_and<W: Words, const M: usize, const N: u32>(mut h: [W; M], bits: W) -> [W; M] {
    for h in &mut h {
        *h = h.shr::<N>().and(bits);
    }
    h
}

#[inline(always)]
fn eight<W: Words>(a: [W; 4], b: [W; 4]) -> [W; 8] {
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
}

/// The four lowest bits of each word, each in bit 4 of a byte of its own.
#[inline(always)]
fn fifth_bits<W: Words>(h: W) -> W {
    // The product has copies of the bits that begin at bits 4, 11, 18 and 25, so that bit i meets bit 8 i + 4.
    h.and(W::splat(15))
        .mul(W::splat(1 << 4 | 1 << 11 | 1 << 18 | 1 << 25))
        .and(W::splat(0x1010_1010))
}
