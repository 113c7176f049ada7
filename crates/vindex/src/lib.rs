//! vindex
