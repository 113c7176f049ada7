//! The frame decoder of the wire: any bytes, in any pieces. What must hold is said where it is asserted, in
//! `crates/engine/src/wire/fuzz.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| engine::wire::fuzz_frames(bytes));
