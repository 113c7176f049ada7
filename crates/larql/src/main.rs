//! larql
fn main() {}
