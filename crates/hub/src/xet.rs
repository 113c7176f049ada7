//! xet
