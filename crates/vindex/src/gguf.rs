//! GGUF version 3: the bytes before the tensor data, written and read.
//!
//! A file is a header (magic, version, counts, key-values, tensor descriptions), zeros up to a multiple of
//! [`ALIGNMENT_BYTES`], then each tensor's blocks, each padded with zeros in the same way. All numbers are
//! little-endian; a string is its length (u64) and its UTF-8 bytes. Source: `docs/gguf.md` of ggml.
//!
//! Invariant: the header is a function of its arguments, and so is every offset in the file; nothing needs to be
//! patched after the data is written. Reading checks each length against the bytes that are there before it
//! allocates. Left out: alignments other than the default, and arrays of arrays.

use quant::BlockType;

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

/// An array of one element type; the element types that tokenizers and configurations need.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaArray {
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
    let (id, len) = match array {
        MetaArray::U32s(v) => (U32, v.len()),
        MetaArray::I32s(v) => (I32, v.len()),
        MetaArray::F32s(v) => (F32, v.len()),
        MetaArray::Bools(v) => (BOOL, v.len()),
        MetaArray::Strings(v) => (STRING, v.len()),
    };
    bytes.extend(id.to_le_bytes());
    bytes.extend((len as u64).to_le_bytes());
    match array {
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

/// Reads the header of the file that begins with `bytes` (usually the whole file, mapped). Allocates no more than a
/// small multiple of the header's own length.
///
/// # Errors
/// A sentence about the first thing that is not GGUF version 3, not supported, or beyond the end of `bytes`.
pub fn read_header(bytes: &[u8]) -> Result<Header, String> {
    let mut at = Cursor { bytes, at: 0 };
    let magic: [u8; 4] = at.array("the magic")?;
    if magic != MAGIC {
        return Err(format!("it begins with {magic:02x?}, expected \"GGUF\""));
    }
    let version = at.u32("the version")?;
    if version != VERSION {
        return Err(format!("GGUF version {version}, expected {VERSION}"));
    }
    let n_tensors = at.u64("the number of tensors")?;
    let n_metadata = at.u64("the number of metadata values")?;
    // The shortest key-value is an empty key and one byte; the shortest tensor an empty name and no dimension.
    let n_metadata = at.count(n_metadata, 8 + 4 + 1, "metadata values")?;
    let mut metadata = Vec::new();
    for _ in 0..n_metadata {
        let key = at.string("a metadata key")?;
        if key == "general.alignment" {
            return Err("it sets general.alignment, expected the default of 32".to_owned());
        }
        let value = at.value(&key)?;
        metadata.push((key, value));
    }
    let n_tensors = at.count(n_tensors, 8 + 4 + 4 + 8, "tensors")?;
    let mut tensors = Vec::new();
    for _ in 0..n_tensors {
        tensors.push(at.tensor()?);
    }
    let data_offset_bytes = aligned(at.at as u64).ok_or("its header is too long")?;
    for tensor in &mut tensors {
        let offset = tensor.offset_bytes.checked_add(data_offset_bytes);
        tensor.offset_bytes =
            offset.ok_or_else(|| format!("tensor {}: its offset overflows", tensor.name))?;
    }
    Ok(Header {
        metadata,
        tensors,
        data_offset_bytes,
    })
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..n).ok_or_else(|| {
            format!(
                "it ends within {what}: {n} bytes expected at {}, {} left",
                self.at,
                rest.len()
            )
        })?;
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let taken = self.take(N, what)?;
        let mut array = [0; N];
        array.copy_from_slice(taken);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// `n` things of at least `min_bytes` each, if the rest of the file can hold so many.
    fn count(&self, n: u64, min_bytes: usize, what: &str) -> Result<usize, String> {
        let left = self.bytes.len() - self.at;
        match usize::try_from(n) {
            Ok(n) if n <= left / min_bytes => Ok(n),
            _ => Err(format!(
                "{n} {what} do not fit the {left} bytes that are left"
            )),
        }
    }

    fn string(&mut self, what: &str) -> Result<String, String> {
        let len = self.u64(what)?;
        let len = self.count(len, 1, &format!("bytes of {what}"))?;
        let text = std::str::from_utf8(self.take(len, what)?);
        text.map(str::to_owned)
            .map_err(|_| format!("{what} is not UTF-8"))
    }

    fn bool(&mut self, key: &str) -> Result<bool, String> {
        match self.array(key)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(format!("{key}: {other} is no bool")),
        }
    }

    fn value(&mut self, key: &str) -> Result<MetaValue, String> {
        Ok(match self.u32(key)? {
            U8 => MetaValue::U8(u8::from_le_bytes(self.array(key)?)),
            I8 => MetaValue::I8(i8::from_le_bytes(self.array(key)?)),
            U16 => MetaValue::U16(u16::from_le_bytes(self.array(key)?)),
            I16 => MetaValue::I16(i16::from_le_bytes(self.array(key)?)),
            U32 => MetaValue::U32(self.u32(key)?),
            I32 => MetaValue::I32(i32::from_le_bytes(self.array(key)?)),
            F32 => MetaValue::F32(f32::from_le_bytes(self.array(key)?)),
            BOOL => MetaValue::Bool(self.bool(key)?),
            STRING => MetaValue::String(self.string(key)?),
            ARRAY => MetaValue::Array(self.meta_array(key)?),
            U64 => MetaValue::U64(self.u64(key)?),
            I64 => MetaValue::I64(i64::from_le_bytes(self.array(key)?)),
            F64 => MetaValue::F64(f64::from_le_bytes(self.array(key)?)),
            other => return Err(format!("{key}: {other} is no value type")),
        })
    }

    fn meta_array(&mut self, key: &str) -> Result<MetaArray, String> {
        let id = self.u32(key)?;
        let n = self.u64(key)?;
        Ok(match id {
            U32 => MetaArray::U32s(self.elements(n, 4, key, |at| at.u32(key))?),
            I32 => MetaArray::I32s(
                self.elements(n, 4, key, |at| at.array(key).map(i32::from_le_bytes))?,
            ),
            F32 => MetaArray::F32s(
                self.elements(n, 4, key, |at| at.array(key).map(f32::from_le_bytes))?,
            ),
            BOOL => MetaArray::Bools(self.elements(n, 1, key, |at| at.bool(key))?),
            STRING => MetaArray::Strings(self.elements(n, 8, key, |at| at.string(key))?),
            other => {
                return Err(format!(
                    "{key}: arrays of value type {other} are not supported"
                ));
            }
        })
    }

    fn elements<T>(
        &mut self,
        n: u64,
        min_bytes: usize,
        key: &str,
        mut read: impl FnMut(&mut Self) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        let n = self.count(n, min_bytes, &format!("elements of {key}"))?;
        (0..n).map(|_| read(self)).collect()
    }

    /// A description; `offset_bytes` is still from the start of the tensor data.
    fn tensor(&mut self) -> Result<TensorInfo, String> {
        let name = self.string("a tensor name")?;
        if name.len() > MAX_NAME_BYTES {
            return Err(format!(
                "tensor {name}: its name is longer than {MAX_NAME_BYTES} bytes"
            ));
        }
        let n_dims = self.u32(&name)?;
        if n_dims == 0 || n_dims > MAX_DIMS {
            return Err(format!(
                "tensor {name}: {n_dims} dimensions, expected 1 to {MAX_DIMS}"
            ));
        }
        let ne = (0..n_dims)
            .map(|_| self.u64(&name))
            .collect::<Result<Vec<u64>, String>>()?;
        let id = self.u32(&name)?;
        let block_type = BlockType::from_gguf_id(id)
            .ok_or_else(|| format!("tensor {name}: unknown type {id}"))?;
        let offset_bytes = self.u64(&name)?;
        Ok(TensorInfo {
            name,
            ne,
            block_type,
            offset_bytes,
        })
    }
}
