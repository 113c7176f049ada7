//! GGUF version 3: the values of its metadata.

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
