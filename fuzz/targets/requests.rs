//! The parser of the OpenAI API's requests: any bytes as a body. What must hold is said where it is asserted, in
//! `crates/skulk/src/request/mod.rs`. The parser alone is compiled here; the node below it would take the build an hour.

#![no_main]
#![allow(dead_code)]

#[path = "../../crates/skulk/src/error.rs"]
mod error;
#[path = "../../crates/skulk/src/request/mod.rs"]
mod request;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| request::fuzz(bytes));
