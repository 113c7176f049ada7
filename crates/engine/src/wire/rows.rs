//! Rows as bytes: f32 by default, f16 or bf16 where half the bytes are worth less precision.
//!
//! Invariant: f32 rows arrive bit for bit, and no row that is not finite is ever written or accepted.

use std::fmt;
use std::str::FromStr;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// How rows are written on the wire, in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum RowType {
    /// 4 bytes a number; split and unsplit results are bit for bit equal.
    #[default]
    F32 = 1,
    /// 2 bytes a number, 11 bits of precision, up to 65504.
    F16 = 2,
    /// 2 bytes a number, 8 bits of precision, the range of f32.
    Bf16 = 3,
}

impl RowType {
    /// Bytes of one number.
    pub fn n_bytes(self) -> usize {
        match self {
            RowType::F32 => 4,
            RowType::F16 | RowType::Bf16 => 2,
        }
    }

    pub(super) fn of(byte: u8) -> Option<RowType> {
        match byte {
            1 => Some(RowType::F32),
            2 => Some(RowType::F16),
            3 => Some(RowType::Bf16),
            _ => None,
        }
    }
}

impl fmt::Display for RowType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            RowType::F32 => "f32",
            RowType::F16 => "f16",
            RowType::Bf16 => "bf16",
        })
    }
}

/// A text that names no type of rows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no type of rows; expected f32, f16 or bf16")]
pub struct NoRowType(pub String);

impl FromStr for RowType {
    type Err = NoRowType;

    fn from_str(text: &str) -> Result<RowType, NoRowType> {
        match text {
            "f32" => Ok(RowType::F32),
            "f16" => Ok(RowType::F16),
            "bf16" => Ok(RowType::Bf16),
            _ => Err(NoRowType(text.to_owned())),
        }
    }
}

/// A number is infinite or none, or does not fit the type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotFinite;

/// Numbers converted at a time: half a page on the stack.
const CHUNK: usize = 512;

/// Writes `rows` into `bytes`, which has exactly their size.
pub(super) fn encode(rows: &[f32], row_type: RowType, bytes: &mut [u8]) -> Result<(), NotFinite> {
    assert_eq!(bytes.len(), rows.len() * row_type.n_bytes());
    match row_type {
        RowType::F32 => {
            let (words, _) = bytes.as_chunks_mut::<4>();
            for (word, value) in words.iter_mut().zip(rows) {
                *word = value.to_le_bytes();
            }
            finite(rows)
        }
        RowType::F16 => encode_halves(rows, bytes, f16::ZERO, f16::to_bits, F16_EXPONENT),
        RowType::Bf16 => encode_halves(rows, bytes, bf16::ZERO, bf16::to_bits, BF16_EXPONENT),
    }
}

/// Writes rows as numbers of 2 bytes, in chunks, which begin as `zero`.
fn encode_halves<Half: Copy>(
    rows: &[f32],
    bytes: &mut [u8],
    zero: Half,
    to_bits: impl Fn(Half) -> u16,
    exponent: u16,
) -> Result<(), NotFinite>
where
    [Half]: HalfFloatSliceExt,
{
    let mut chunk = [zero; CHUNK];
    let mut found = false;
    for (rows, bytes) in rows.chunks(CHUNK).zip(bytes.chunks_mut(2 * CHUNK)) {
        let chunk = &mut chunk[..rows.len()];
        chunk.convert_from_f32_slice(rows);
        for (word, half) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(chunk) {
            let bits = to_bits(*half);
            found |= bits & exponent == exponent;
            *word = bits.to_le_bytes();
        }
    }
    if found { Err(NotFinite) } else { Ok(()) }
}

/// Reads `rows` from `bytes`, which has exactly their size.
pub(super) fn decode(bytes: &[u8], row_type: RowType, rows: &mut [f32]) -> Result<(), NotFinite> {
    assert_eq!(bytes.len(), rows.len() * row_type.n_bytes());
    match row_type {
        RowType::F32 => {
            let (words, _) = bytes.as_chunks::<4>();
            for (value, word) in rows.iter_mut().zip(words) {
                *value = f32::from_le_bytes(*word);
            }
        }
        RowType::F16 => {
            let mut chunk = [f16::ZERO; CHUNK];
            for (rows, bytes) in rows.chunks_mut(CHUNK).zip(bytes.chunks(2 * CHUNK)) {
                let chunk = &mut chunk[..rows.len()];
                for (value, word) in chunk.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f16::from_bits(u16::from_le_bytes(*word));
                }
                chunk.convert_to_f32_slice(rows);
            }
        }
        RowType::Bf16 => {
            for (value, word) in rows.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*word)) << 16);
            }
        }
    }
    finite(rows)
}

const F32_EXPONENT: u32 = 0x7f80_0000;
const F16_EXPONENT: u16 = 0x7c00;
const BF16_EXPONENT: u16 = 0x7f80;

/// All bits of the exponent are set in infinities and in what is no number, and in nothing else.
fn finite(rows: &[f32]) -> Result<(), NotFinite> {
    // A fold without an early end is what the compiler turns into vector code.
    let found = rows.iter().fold(false, |found, value| {
        found | (value.to_bits() & F32_EXPONENT == F32_EXPONENT)
    });
    if found { Err(NotFinite) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(rows: &[f32], row_type: RowType) -> Result<Vec<f32>, NotFinite> {
        let mut bytes = vec![0xAA; rows.len() * row_type.n_bytes()];
        encode(rows, row_type, &mut bytes)?;
        let mut back = vec![f32::NAN; rows.len()];
        decode(&bytes, row_type, &mut back)?;
        Ok(back)
    }

    #[test]
    fn f32_arrives_bit_for_bit_and_halves_are_rounded_to_nearest() {
        let rows: Vec<f32> = (0..1500u32)
            .map(|i| (i as f32 - 700.0) * 1.000_123 / 3.0)
            .chain([0.0, -0.0, f32::MIN_POSITIVE, 1e-40])
            .collect();
        let bits = |rows: &[f32]| rows.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(
            bits(&there_and_back(&rows, RowType::F32).unwrap()),
            bits(&rows)
        );
        let halves: Vec<f32> = rows.iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        assert_eq!(
            bits(&there_and_back(&rows, RowType::F16).unwrap()),
            bits(&halves)
        );
        let brains: Vec<f32> = rows.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
        assert_eq!(
            bits(&there_and_back(&rows, RowType::Bf16).unwrap()),
            bits(&brains)
        );
    }

    #[test]
    fn what_is_not_finite_is_neither_written_nor_read() {
        for row_type in [RowType::F32, RowType::F16, RowType::Bf16] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut rows = vec![1.0; 700];
                rows[650] = bad;
                assert_eq!(
                    there_and_back(&rows, row_type),
                    Err(NotFinite),
                    "{row_type} {bad}"
                );
            }
        }
        assert_eq!(there_and_back(&[65_520.0], RowType::F16), Err(NotFinite));
        assert!(there_and_back(&[65_519.0, f32::MAX * 0.99], RowType::Bf16).is_ok());
        let mut out = [0.0];
        assert_eq!(decode(&[0, 0x7c], RowType::F16, &mut out), Err(NotFinite));
        assert_eq!(
            decode(&[0, 0, 0xc0, 0xff], RowType::F32, &mut out),
            Err(NotFinite)
        );
    }

    #[test]
    fn types_have_names() {
        for row_type in [RowType::F32, RowType::F16, RowType::Bf16] {
            assert_eq!(row_type.to_string().parse(), Ok(row_type));
            assert_eq!(RowType::of(row_type as u8), Some(row_type));
        }
        assert!(
            "f64".parse::<RowType>().is_err()
                && RowType::of(0).is_none()
                && RowType::of(4).is_none()
        );
    }
}
