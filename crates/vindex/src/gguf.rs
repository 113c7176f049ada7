//! GGUF version 3: the bytes before the tensor data, written and read.
//!
//! A file is a header (magic, version, counts, key-values, tensor descriptions), zeros up to a multiple of
//! [`ALIGNMENT_BYTES`], then each tensor's blocks, each padded with zeros in the same way. All numbers are
//! little-endian; a string is its length (u64) and its UTF-8 bytes. Source: `docs/gguf.md` of ggml.
//!
//! Invariant: the header is a function of its arguments, and so is every offset in the file; nothing needs to be
//! patched after the data is written. Reading checks each length against the bytes that are there before it
//! allocates. Files of others may have another alignment and more kinds of arrays; arrays of arrays are left out.

mod read;

use quant::BlockType;

pub use read::read_header;
pub(crate) use read::{Maker, NoHeader, header_of};

/// Every tensor starts at a multiple of this (GGUF's `general.alignment` when the key is absent).
pub(crate) const ALIGNMENT_BYTES: u64 = 32;

const MAGIC: [u8; 4] = *b"GGUF";
const VERSION: u32 = 3;
/// ggml's `GGML_MAX_DIMS`.
const MAX_DIMS: u32 = 4;
/// ggml's `GGML_MAX_NAME`, less the closing zero.
pub(crate) const MAX_NAME_BYTES: usize = 63;

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaValue {
    /// Unsigned, 8 bits.
    U8(u8),
    /// Signed, 8 bits.
    I8(i8),
    /// Unsigned, 16 bits.
    U16(u16),
    /// Signed, 16 bits.
    I16(i16),
    /// Unsigned, 32 bits.
    U32(u32),
    /// Signed, 32 bits.
    I32(i32),
    /// IEEE single.
    F32(f32),
    /// One byte, 0 or 1.
    Bool(bool),
    /// UTF-8, length first.
    String(String),
    /// Values of one type.
    Array(MetaArray),
    /// Unsigned, 64 bits.
    U64(u64),
    /// Signed, 64 bits.
    I64(i64),
    /// IEEE double.
    F64(f64),
}

/// An array of one element type; all but arrays.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaArray {
    /// Unsigned, 8 bits.
    U8s(Vec<u8>),
    /// Signed, 8 bits.
    I8s(Vec<i8>),
    /// Unsigned, 16 bits.
    U16s(Vec<u16>),
    /// Signed, 16 bits.
    I16s(Vec<i16>),
    /// Unsigned, 32 bits.
    U32s(Vec<u32>),
    /// Signed, 32 bits.
    I32s(Vec<i32>),
    /// IEEE single.
    F32s(Vec<f32>),
    /// One byte each.
    Bools(Vec<bool>),
    /// UTF-8.
    Strings(Vec<String>),
    /// Unsigned, 64 bits.
    U64s(Vec<u64>),
    /// Signed, 64 bits.
    I64s(Vec<i64>),
    /// IEEE double.
    F64s(Vec<f64>),
}

impl MetaArray {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            MetaArray::U8s(v) => v.len(),
            MetaArray::I8s(v) => v.len(),
            MetaArray::U16s(v) => v.len(),
            MetaArray::I16s(v) => v.len(),
            MetaArray::U32s(v) => v.len(),
            MetaArray::I32s(v) => v.len(),
            MetaArray::F32s(v) => v.len(),
            MetaArray::Bools(v) => v.len(),
            MetaArray::Strings(v) => v.len(),
            MetaArray::U64s(v) => v.len(),
            MetaArray::I64s(v) => v.len(),
            MetaArray::F64s(v) => v.len(),
        }
    }

    /// True without any element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A tensor as a header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// GGUF name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Shape, the row length first.
    pub ne: Vec<u64>,
    /// How rows are stored.
    pub block_type: BlockType,
    /// From the start of the file.
    pub offset_bytes: u64,
}

/// Length of a tensor's blocks; `None` when it overflows or a row is no whole number of blocks.
pub(crate) fn size_bytes(block_type: BlockType, ne: &[u64]) -> Option<u64> {
    let (&row, outer) = ne.split_first()?;
    let row_bytes = block_type.row_bytes(usize::try_from(row).ok()?)? as u64;
    outer
        .iter()
        .try_fold(row_bytes, |size, &n| size.checked_mul(n))
}

/// `n` rounded up to the alignment.
pub(crate) fn aligned(n: u64) -> Option<u64> {
    n.checked_next_multiple_of(ALIGNMENT_BYTES)
}

/// What comes before the tensor data.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Key-values, in file order.
    pub metadata: Vec<(String, MetaValue)>,
    /// Tensor descriptions, in file order.
    pub tensors: Vec<TensorInfo>,
    /// Where tensor data begins: the length of the header with its padding.
    pub data_offset_bytes: u64,
    /// Every tensor begins at a multiple of this, counted from there.
    pub alignment_bytes: u64,
}

/// Bytes of a header, padding included, for tensors `(name, ne, block type)` whose data follows in this order, and
/// the place of each tensor from the start of the file. The last element of the places is the file's length.
///
/// # Panics
/// When a tensor's size overflows; [`size_bytes`] tells beforehand.
pub(crate) fn write_header<'a>(
    metadata: impl ExactSizeIterator<Item = (&'a str, &'a MetaValue)>,
    tensors: &[(&str, &[u64], BlockType)],
) -> (Vec<u8>, Vec<u64>) {
    let mut bytes = Vec::new();
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_string(&mut bytes, key);
        put_value(&mut bytes, value);
    }
    let mut places = vec![0u64];
    for &(name, ne, block_type) in tensors {
        let offset = places[places.len() - 1];
        put_string(&mut bytes, name);
        bytes.extend((ne.len() as u32).to_le_bytes());
        for n in ne {
            bytes.extend(n.to_le_bytes());
        }
        bytes.extend(block_type.gguf_id().to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        let end = size_bytes(block_type, ne).and_then(|size| aligned(offset.checked_add(size)?));
        places.push(end.expect("a tensor's size fits 64 bits"));
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT_BYTES as usize), 0);
    for place in &mut places {
        *place += bytes.len() as u64;
    }
    (bytes, places)
}

fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn put_value(bytes: &mut Vec<u8>, value: &MetaValue) {
    bytes.extend(value_id(value).to_le_bytes());
    match value {
        MetaValue::U8(v) => bytes.push(*v),
        MetaValue::I8(v) => bytes.extend(v.to_le_bytes()),
        MetaValue::U16(v) => bytes.extend(v.to_le_bytes()),
        MetaValue::I16(v) => bytes.extend(v.to_le_bytes()),
        MetaValue::U32(v) => bytes.extend(v.to_le_bytes()),
        MetaValue::I32(v) => bytes.extend(v.to_le_bytes()),
        MetaValue::F32(v) => bytes.extend(v.to_le_bytes()),
        MetaValue::Bool(v) => bytes.push(u8::from(*v)),
        MetaValue::String(v) => put_string(bytes, v),
        MetaValue::U64(v) => bytes.extend(v.to_le_bytes()),
        MetaValue::I64(v) => bytes.extend(v.to_le_bytes()),
        MetaValue::F64(v) => bytes.extend(v.to_le_bytes()),
        MetaValue::Array(array) => put_array(bytes, array),
    }
}

fn put_array(bytes: &mut Vec<u8>, array: &MetaArray) {
    let id = match array {
        MetaArray::U8s(_) => U8,
        MetaArray::I8s(_) => I8,
        MetaArray::U16s(_) => U16,
        MetaArray::I16s(_) => I16,
        MetaArray::U32s(_) => U32,
        MetaArray::I32s(_) => I32,
        MetaArray::F32s(_) => F32,
        MetaArray::Bools(_) => BOOL,
        MetaArray::Strings(_) => STRING,
        MetaArray::U64s(_) => U64,
        MetaArray::I64s(_) => I64,
        MetaArray::F64s(_) => F64,
    };
    bytes.extend(id.to_le_bytes());
    bytes.extend((array.len() as u64).to_le_bytes());
    match array {
        MetaArray::U8s(v) => bytes.extend(v),
        MetaArray::I8s(v) => v.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
        MetaArray::U16s(v) => v.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
        MetaArray::I16s(v) => v.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
        MetaArray::U64s(v) => v.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
        MetaArray::I64s(v) => v.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
        MetaArray::F64s(v) => v.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
        MetaArray::U32s(v) => v.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
        MetaArray::I32s(v) => v.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
        MetaArray::F32s(v) => v.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
        MetaArray::Bools(v) => bytes.extend(v.iter().map(|&v| u8::from(v))),
        MetaArray::Strings(v) => v.iter().for_each(|v| put_string(bytes, v)),
    }
}

/// GGUF's numbers of the value types.
const U8: u32 = 0;
const I8: u32 = 1;
const U16: u32 = 2;
const I16: u32 = 3;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;
const I64: u32 = 11;
const F64: u32 = 12;

const fn value_id(value: &MetaValue) -> u32 {
    match value {
        MetaValue::U8(_) => U8,
        MetaValue::I8(_) => I8,
        MetaValue::U16(_) => U16,
        MetaValue::I16(_) => I16,
        MetaValue::U32(_) => U32,
        MetaValue::I32(_) => I32,
        MetaValue::F32(_) => F32,
        MetaValue::Bool(_) => BOOL,
        MetaValue::String(_) => STRING,
        MetaValue::Array(_) => ARRAY,
        MetaValue::U64(_) => U64,
        MetaValue::I64(_) => I64,
        MetaValue::F64(_) => F64,
    }
}
