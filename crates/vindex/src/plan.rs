//! What an extraction will write, as a value: every tensor with its type, shape and sources, grouped
//! into parts, before a byte of weights is read.
//!
//! Invariant: the plan alone decides the bytes of the vindex; `extract` executes it and adds nothing.

use std::sync::Arc;

use quant::BlockType;
use serde::{Serialize, Serializer};

use crate::checkpoint::{self, Checkpoint};
use crate::config::Config;
use crate::config_json::ConfigJson;
use crate::error::Error;
use crate::families::Family;
use crate::gguf::MetaValue;
use crate::imatrix::Imatrix;
use crate::index::n_experts;
use crate::metadata;
use crate::placement;
use crate::recipe::Recipe;
use crate::source::{Files, Origin, Source};
use crate::tokenizer;
pub use crate::transform::{Change, Order, Transform};

/// Plans the extraction of a checkpoint: reads its configuration, its tokenizer and the headers of its weights,
/// and proves that they belong together.
///
/// # Errors
/// The variants of [`Error`] that name a file or a tensor of the checkpoint: something is missing, damaged, of
/// another shape than the configuration says, or of a kind that we do not extract.
pub fn plan(source: &dyn Source, recipe: Recipe) -> Result<Plan, Error> {
    let files = Files::list(source)?;
    let checkpoint = Checkpoint::of(&files)?;
    of_checkpoint(source, &files, checkpoint, recipe)
}

/// What [`plan`] would give, from the configuration, the tokenizer and the names in `model.safetensors.index.json` alone,
/// where the weights cannot be read: every tensor with the shape that the configuration says. It cannot be extracted.
///
/// # Errors
/// As [`plan`], of what the small files can tell.
pub fn forecast(source: &dyn Source, recipe: Recipe) -> Result<Forecast, Error> {
    let files = Files::list(source)?;
    let (checkpoint, source_bytes) = checkpoint::named(&files)?;
    Ok(Forecast {
        plan: of_checkpoint(source, &files, checkpoint, recipe)?,
        source_bytes,
    })
}

/// A plan that nobody can execute.
#[derive(Clone, Debug)]
pub struct Forecast {
    /// What would be planned.
    pub plan: Plan,
    /// Bytes of all tensors of the source, where its index tells them.
    pub source_bytes: Option<u64>,
}

fn of_checkpoint(
    source: &dyn Source,
    files: &Files<'_>,
    mut checkpoint: Checkpoint,
    recipe: Recipe,
) -> Result<Plan, Error> {
    let json = ConfigJson::read(files)?;
    let family = json.family()?;
    let is_shifted = checkpoint.turn_convolutions();
    let family = &Family {
        norms_around_zero: family.norms_around_zero && !is_shifted,
        ..*family
    };
    let mut config = json.numbers(family, files)?;
    config.n_nextn = placement::n_nextn(&checkpoint, family);
    let checkpoint = checkpoint.whole(&json.quantization()?)?;
    let placed = placement::place(&checkpoint, &json, family, &config, recipe)?;
    let tokenizer = tokenizer::read(files, &json, family, config.vocab)?;
    config.bos = tokenizer.bos.or(config.bos);
    config
        .eos
        .extend(tokenizer.eos.filter(|eos| !config.eos.contains(eos)));

    let origin = source.origin();
    let mut metadata = metadata::of_model(
        &origin.model_name,
        &json,
        family,
        &config,
        recipe,
        &placed.parts,
    );
    metadata.extend(tokenizer.metadata);
    let mut warnings = tokenizer.warnings;
    warnings.extend(metadata::not_followed_by_llama_cpp(&config));
    Ok(Plan {
        stem: stem(&origin.model_name, recipe),
        name: origin.model_name.clone(),
        recipe,
        config,
        metadata,
        parts: placed.parts,
        left_out: placed.left_out,
        warnings,
        imatrix: None,
        origin,
        checkpoint,
    })
}

/// `<model name>-<recipe>` as the beginning of a file name.
fn stem(model_name: &str, recipe: Recipe) -> String {
    match safe_name(model_name).as_str() {
        "" => format!("model-{recipe}"),
        name => format!("{name}-{recipe}"),
    }
}

/// The text as the beginning of a file name: letters, digits, `.`, `_` and `-`, never a dot or a dash first.
pub(crate) fn safe_name(text: &str) -> String {
    let is_safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let safe: String = text
        .chars()
        .take(100)
        .map(|c| if is_safe(c) { c } else { '-' })
        .collect();
    safe.trim_start_matches(['.', '-']).to_owned()
}

/// The whole extraction. Printed by a dry run, executed by `extract`.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Stem of the part files: `<model name>-<recipe>`, or that of the GGUF file whose blocks are kept.
    pub stem: String,
    /// The model's own name.
    #[serde(skip)]
    pub name: String,
    /// Which block type each kind of tensor gets.
    pub recipe: Recipe,
    /// The model's numbers, as the forward pass reads them.
    pub config: Config,
    /// GGUF key-values of part 1, in writing order (without the `split.*` keys, which the writer adds).
    #[serde(skip)]
    pub metadata: Vec<(String, MetaValue)>,
    /// Parts in file order; the first has no tensor.
    pub parts: Vec<PlannedPart>,
    /// Source tensors that do not belong to the vindex (MTP heads, vision towers), with the reason.
    pub left_out: Vec<LeftOut>,
    /// What the operator should know before a long run.
    pub warnings: Vec<String>,
    /// What the errors of blocks are weighed by; [`Plan::calibrated`] sets it.
    #[serde(
        rename = "calibration",
        serialize_with = "calibration",
        skip_serializing_if = "Option::is_none"
    )]
    pub imatrix: Option<Arc<Imatrix>>,
    /// Where the source is; goes to `provenance.json`.
    #[serde(skip)]
    pub origin: Origin,
    /// Where the weights are in the source, so that no header is read twice.
    #[serde(skip)]
    pub checkpoint: Checkpoint,
}

/// As the index says it.
fn calibration<S: Serializer>(
    imatrix: &Option<Arc<Imatrix>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let calibration = imatrix.as_ref().map(|imatrix| imatrix.calibration());
    calibration.serialize(serializer)
}

/// One GGUF file.
#[derive(Clone, Debug, Serialize)]
pub struct PlannedPart {
    /// What the file holds.
    pub component: Component,
    /// In the order of the file.
    pub tensors: Vec<PlannedTensor>,
}

impl PlannedPart {
    /// How many pieces of `tensor` have a hash in the index: its experts, or the whole of what lies beside experts.
    pub(crate) fn n_hashes(&self, tensor: &PlannedTensor) -> Option<u64> {
        let stacked = |tensor: &PlannedTensor| n_experts(&tensor.name, &tensor.ne);
        let is_feed_forward = matches!(self.component, Component::FeedForward { .. });
        let beside = is_feed_forward && self.tensors.iter().any(|other| stacked(other).is_some());
        stacked(tensor).or(beside.then_some(1))
    }
}

/// What one part holds.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, serde::Deserialize,
)]
#[serde(tag = "component", rename_all = "kebab-case")]
pub enum Component {
    /// Metadata and tokenizer, no tensor; belongs to every slice.
    Metadata,
    /// Token embeddings, output head, final norm, rope factors.
    Embeddings,
    /// A layer's attention (or other mixer) with its norms and its router.
    Attention {
        /// Which layer.
        layer: u32,
    },
    /// A layer's feed-forward or expert weights.
    FeedForward {
        /// Which layer.
        layer: u32,
    },
    /// A block after the layers that predicts a further token.
    #[serde(rename = "nextn")]
    NextN {
        /// Which block: the first is the number of layers.
        layer: u32,
    },
}

/// One tensor of the vindex.
#[derive(Clone, Debug, Serialize)]
pub struct PlannedTensor {
    /// GGUF name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Shape in ggml order: the first is the row length, the last the slowest dimension.
    pub ne: Vec<u64>,
    /// How rows are stored.
    pub block_type: BlockType,
    /// Where the values come from.
    pub values: Values,
}

/// Where a tensor's values come from.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Values {
    /// Tensors of the checkpoint, one after another along the slowest dimension (experts: one each).
    Checkpoint {
        /// Names in the checkpoint, in order.
        tensors: Vec<String>,
        /// What is done to each on the way.
        transform: Transform,
    },
    /// Blocks of MXFP4, kept bit for bit in GGUF's order of nibbles: of each block its scale from one tensor of the checkpoint
    /// and its values from another.
    Packed {
        /// Name of the values, two a byte.
        blocks: String,
        /// Name of the scales, one a block.
        scales: String,
        /// Which rows, in which order.
        order: Order,
    },
    /// The blocks of a tensor of a GGUF source, byte for byte.
    Kept {
        /// Name in the source.
        tensor: String,
    },
    /// Computed from the configuration (rope factors); row-major.
    Computed {
        /// The values themselves.
        values: Vec<f32>,
    },
}

/// A source tensor that the vindex does not hold.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOut {
    /// Name in the checkpoint.
    pub tensor: String,
    /// Why.
    pub reason: String,
}
