//! Reading GGUF's headers, our own and those of other makers.
//!
//! Invariant: each length is checked against the bytes that can be there before anything is allocated for it, so that
//! the memory taken is a small multiple of what was read. What the tensors' places mean for the file is checked by
//! whoever knows the file.

use quant::BlockType;

use super::{
    ALIGNMENT_BYTES, ARRAY, BOOL, F32, F64, Header, I8, I16, I32, I64, MAGIC, MAX_DIMS,
    MAX_NAME_BYTES, MetaArray, MetaValue, STRING, TensorInfo, U8, U16, U32, U64, VERSION,
};

const ALIGNMENT_KEY: &str = "general.alignment";
/// Largest alignment of a file of others; today's have 32.
const MAX_ALIGNMENT_BYTES: u64 = 1 << 16;

/// Whose file it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Maker {
    /// A vindex's part: version 3, the default alignment without a key.
    Ours,
    /// Anybody: version 2 too, and any alignment.
    Anybody,
}

/// Why there is no header.
pub(crate) enum NoHeader {
    /// It goes on beyond the bytes that were given.
    More,
    /// A sentence about what is wrong.
    Wrong(String),
    /// A sentence about a tensor of a type that is not read.
    OtherType(String),
}

impl From<String> for NoHeader {
    fn from(reason: String) -> NoHeader {
        NoHeader::Wrong(reason)
    }
}

/// Reads the header of the file that begins with `bytes` (usually the whole file, mapped). Allocates no more than a
/// small multiple of the header's own length.
///
/// # Errors
/// A sentence about the first thing that is not GGUF version 3, not supported, or beyond the end of `bytes`.
pub fn read_header(bytes: &[u8]) -> Result<Header, String> {
    match header_of(bytes, bytes.len() as u64, Maker::Ours) {
        Ok(header) => Ok(header),
        Err(NoHeader::Wrong(reason) | NoHeader::OtherType(reason)) => Err(reason),
        Err(NoHeader::More) => Err("its header is longer than the file".to_owned()),
    }
}

/// Reads the header of a file of `file_bytes` that begins with `bytes`.
///
/// # Errors
/// [`NoHeader::More`] when the header is longer than `bytes`.
pub(crate) fn header_of(bytes: &[u8], file_bytes: u64, maker: Maker) -> Result<Header, NoHeader> {
    let mut at = Cursor {
        bytes,
        at: 0,
        file_bytes,
    };
    let magic: [u8; 4] = at.array("the magic")?;
    if magic != MAGIC {
        return wrong(format!("it begins with {magic:02x?}, expected \"GGUF\""));
    }
    let version = at.u32("the version")?;
    if version.swap_bytes() == VERSION {
        return wrong("it is big-endian, expected little-endian".to_owned());
    }
    // Version 2 differs in nothing that is written here.
    if version != VERSION && (maker == Maker::Ours || version != 2) {
        return wrong(format!("GGUF version {version}, expected {VERSION}"));
    }
    let n_tensors = at.u64("the number of tensors")?;
    let n_metadata = at.u64("the number of metadata values")?;
    // The shortest key-value is an empty key and one byte; the shortest tensor an empty name and no dimension.
    let n_metadata = at.count(n_metadata, 8 + 4 + 1, "metadata values")?;
    let mut alignment_bytes = ALIGNMENT_BYTES;
    let mut metadata = Vec::new();
    for _ in 0..n_metadata {
        let key = at.string("a metadata key")?;
        if key == ALIGNMENT_KEY && maker == Maker::Ours {
            return wrong("it sets general.alignment, expected the default of 32".to_owned());
        }
        let value = at.value(&key)?;
        if key == ALIGNMENT_KEY {
            alignment_bytes = alignment(&value)?;
        }
        metadata.push((key, value));
    }
    let n_tensors = at.count(n_tensors, 8 + 4 + 4 + 8, "tensors")?;
    let mut tensors = Vec::new();
    for _ in 0..n_tensors {
        tensors.push(at.tensor()?);
    }
    let data_offset_bytes = (at.at as u64)
        .checked_next_multiple_of(alignment_bytes)
        .ok_or_else(|| "its header is too long".to_owned())?;
    for tensor in &mut tensors {
        let offset = tensor.offset_bytes.checked_add(data_offset_bytes);
        tensor.offset_bytes =
            offset.ok_or_else(|| format!("tensor {}: its offset overflows", tensor.name))?;
    }
    Ok(Header {
        metadata,
        tensors,
        data_offset_bytes,
        alignment_bytes,
    })
}

fn alignment(value: &MetaValue) -> Result<u64, NoHeader> {
    match value {
        &MetaValue::U32(n) if n.is_power_of_two() && u64::from(n) <= MAX_ALIGNMENT_BYTES => {
            Ok(n.into())
        }
        other => wrong(format!(
            "{ALIGNMENT_KEY} is {other:?}, expected a power of two up to {MAX_ALIGNMENT_BYTES}"
        )),
    }
}

fn wrong<T>(reason: String) -> Result<T, NoHeader> {
    Err(NoHeader::Wrong(reason))
}

/// The types of tensors that GGUF has and that are not read here.
const OTHER_TYPES: [(u32, &str); 26] = [
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (40, "NVFP4"),
];

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file_bytes: u64,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], NoHeader> {
        let rest = &self.bytes[self.at..];
        let Some(taken) = rest.get(..n) else {
            let left = self.left();
            if n as u64 <= left {
                return Err(NoHeader::More);
            }
            return wrong(format!(
                "it ends within {what}: {n} bytes expected at {}, {left} left",
                self.at
            ));
        };
        self.at += n;
        Ok(taken)
    }

    /// Bytes of the file that were not looked at.
    fn left(&self) -> u64 {
        self.file_bytes.saturating_sub(self.at as u64)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], NoHeader> {
        let taken = self.take(N, what)?;
        let mut array = [0; N];
        array.copy_from_slice(taken);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32, NoHeader> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, NoHeader> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// `n` things of at least `min_bytes` each, if the rest of the file can hold so many.
    fn count(&self, n: u64, min_bytes: u64, what: &str) -> Result<usize, NoHeader> {
        let left = self.left();
        match usize::try_from(n) {
            Ok(n) if n as u64 <= left / min_bytes => Ok(n),
            _ => wrong(format!(
                "{n} {what} do not fit the {left} bytes that are left"
            )),
        }
    }

    fn string(&mut self, what: &str) -> Result<String, NoHeader> {
        let len = self.u64(what)?;
        let len = self.count(len, 1, &format!("bytes of {what}"))?;
        let text = std::str::from_utf8(self.take(len, what)?);
        text.map(str::to_owned)
            .map_err(|_| NoHeader::Wrong(format!("{what} is not UTF-8")))
    }

    fn bool(&mut self, key: &str) -> Result<bool, NoHeader> {
        match self.array(key)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => wrong(format!("{key}: {other} is no bool")),
        }
    }

    fn value(&mut self, key: &str) -> Result<MetaValue, NoHeader> {
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
            other => return wrong(format!("{key}: {other} is no value type")),
        })
    }

    fn meta_array(&mut self, key: &str) -> Result<MetaArray, NoHeader> {
        let id = self.u32(key)?;
        let n = self.u64(key)?;
        Ok(match id {
            U8 => {
                MetaArray::U8s(self.elements(n, 1, key, |at| at.array(key).map(u8::from_le_bytes))?)
            }
            I8 => {
                MetaArray::I8s(self.elements(n, 1, key, |at| at.array(key).map(i8::from_le_bytes))?)
            }
            U16 => MetaArray::U16s(
                self.elements(n, 2, key, |at| at.array(key).map(u16::from_le_bytes))?,
            ),
            I16 => MetaArray::I16s(
                self.elements(n, 2, key, |at| at.array(key).map(i16::from_le_bytes))?,
            ),
            U64 => MetaArray::U64s(self.elements(n, 8, key, |at| at.u64(key))?),
            I64 => MetaArray::I64s(
                self.elements(n, 8, key, |at| at.array(key).map(i64::from_le_bytes))?,
            ),
            F64 => MetaArray::F64s(
                self.elements(n, 8, key, |at| at.array(key).map(f64::from_le_bytes))?,
            ),
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
                return wrong(format!(
                    "{key}: arrays of value type {other} are not supported"
                ));
            }
        })
    }

    fn elements<T>(
        &mut self,
        n: u64,
        min_bytes: u64,
        key: &str,
        mut read: impl FnMut(&mut Self) -> Result<T, NoHeader>,
    ) -> Result<Vec<T>, NoHeader> {
        let n = self.count(n, min_bytes, &format!("elements of {key}"))?;
        (0..n).map(|_| read(self)).collect()
    }

    /// A description; `offset_bytes` is still from the start of the tensor data.
    fn tensor(&mut self) -> Result<TensorInfo, NoHeader> {
        let name = self.string("a tensor name")?;
        if name.len() > MAX_NAME_BYTES {
            return wrong(format!(
                "tensor {name}: its name is longer than {MAX_NAME_BYTES} bytes"
            ));
        }
        let n_dims = self.u32(&name)?;
        if n_dims == 0 || n_dims > MAX_DIMS {
            return wrong(format!(
                "tensor {name}: {n_dims} dimensions, expected 1 to {MAX_DIMS}"
            ));
        }
        let ne = (0..n_dims)
            .map(|_| self.u64(&name))
            .collect::<Result<Vec<u64>, NoHeader>>()?;
        let id = self.u32(&name)?;
        let Some(block_type) = BlockType::from_gguf_id(id) else {
            let other = OTHER_TYPES.iter().find(|(other, _)| *other == id);
            return Err(match other {
                Some((_, other)) => {
                    let known = BlockType::ALL.map(BlockType::name).join(", ");
                    NoHeader::OtherType(format!(
                        "tensor {name} is stored as {other}, which is not read ({known} are)"
                    ))
                }
                None => NoHeader::Wrong(format!("tensor {name}: unknown type {id}")),
            });
        };
        let offset_bytes = self.u64(&name)?;
        Ok(TensorInfo {
            name,
            ne,
            block_type,
            offset_bytes,
        })
    }
}
