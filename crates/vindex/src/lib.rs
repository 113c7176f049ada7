//! The directory of a model's weights, a vindex: made from a checkpoint's files, part by part.
//!
//! The route: a [`Source`] gives bytes by range, the planning half reads its configuration, tokenizer and headers and
//! says every tensor of the vindex, and the storing half executes that [`Plan`].
//!
//! Invariant: the plan and the checkpoint's bytes alone decide the bytes of the vindex. No network and no async here.

mod checkpoint;
mod config;
mod error;
mod gguf;
mod local;
mod plan;
mod recipe;
mod source;

pub use checkpoint::{Checkpoint, Dtype, OtherDtype, SourceTensor};
pub use config::{Activation, Attention, Config, Experts, Gating, Rope, RopeKind, RopeScaling, SlidingWindow};
pub use error::{Error, Wrong, WrongPart};
pub use gguf::{MetaArray, MetaValue};
pub use local::LocalDir;
pub use plan::{Component, LeftOut, Plan, PlannedPart, PlannedTensor, Transform, Values};
pub use recipe::{Recipe, UnknownRecipe};
pub use source::{Origin, Source, SourceError, SourceFile};
