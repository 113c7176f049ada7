//! The directory of a model's weights, a vindex: made from a checkpoint's files, part by part.
//!
//! The route: a [`Source`] gives bytes by range, [`plan()`] reads its configuration, tokenizer and headers and
//! says every tensor of the vindex, and the storing half executes that [`Plan`].
//!
//! Invariant: the plan and the checkpoint's bytes alone decide the bytes of the vindex. No network and no async here.

mod census;
mod checkpoint;
mod config;
mod config_json;
mod directory;
mod dump;
mod error;
mod extract;
mod families;
mod gguf;
mod gguf_source;
mod grid;
mod imatrix;
mod index;
mod local;
mod metadata;
mod open;
mod placement;
mod plan;
mod provenance;
mod recipe;
mod share;
mod sizes;
mod slice;
mod source;
mod tokenizer;
mod transform;
mod verify;

pub use census::{Census, TypeCount};
pub use checkpoint::{Checkpoint, Dtype, OtherDtype, SourceTensor, safetensors_header};
pub use config::{
    Activation, Attention, Config, DeltaNet, Experts, Gating, Groups, Heads, Latent,
    LayerEmbeddings, Rope, RopeKind, RopeScaling, Shared, SlidingWindow,
};
pub use directory::{clear, write_whole};
pub use dump::dump;
pub use error::{Error, Wrong, WrongPart};
pub use extract::{EXTRACTION_MEMORY_BYTES_MAX, ExtractOptions, JOURNAL_FILE, Progress, extract};
pub use gguf::{Header, MetaArray, MetaValue, TensorInfo, read_header};
pub use gguf_source::{is_gguf, plan_gguf};
pub use grid::Grid;
pub use imatrix::{Calibration, ColumnStatistics, Imatrix};
pub use index::{FORMAT, INDEX_FILE, Index, NoVindexId, Part, Tensor, VindexId};
pub use local::LocalDir;
pub use open::{TensorView, Vindex};
pub use plan::{
    Change, Component, Forecast, LeftOut, Order, Plan, PlannedPart, PlannedTensor, Transform,
    Values, forecast, plan,
};
pub use provenance::{PROVENANCE_FILE, Provenance};
pub use recipe::{Recipe, UnknownRecipe};
pub use share::{ExpertBytes, Hold, NoSpan, Share, Span, expert_bytes, part_header};
pub use sizes::{PartSize, Sizes, SliceSize};
pub use slice::{
    SLICE_FILE, Slice, SliceContent, SliceFile, UnknownSlice, slice_files, slice_files_of_index,
};
pub use source::{Origin, Source, SourceError, SourceFile};
pub use tokenizer::{PreStep, PreTokenizer, pre_tokenizer};
pub use verify::{Verified, verify};
