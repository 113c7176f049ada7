//! The MTP sidecar: the heads of a checkpoint in a file of their own.
//!
//! Route: `spelling` knows the names of heads; `heads` finds them and says what their bytes mean; `layout` places them
//! in `mtp.safetensors`; `convert` makes one piece of it; `write` makes all, goes on from an interrupted run, and checks.
//! `inspection` is what the network knows of such a publication.
//!
//! Invariant: of the checkpoint, nothing is read but headers, heads and their scales. Left out: the commit (`run`).

pub(crate) mod convert;
pub(crate) mod heads;
pub(crate) mod inspection;
pub(crate) mod layout;
pub(crate) mod norms;
pub(crate) mod source;
pub(crate) mod spelling;
pub(crate) mod write;
