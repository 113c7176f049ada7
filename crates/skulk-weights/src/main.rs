//! skulk-weights
fn main() {}
