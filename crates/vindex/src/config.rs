//! The numbers of a model, as a forward pass needs them: with this and the tensors it computes the right
//! logits without knowing which family the model belongs to.
//!
//! Invariant: everything here comes from the checkpoint's configuration, nothing from a file's path or the
//! time, and serialises to the same text on every machine. Reading `config.json` is in `config_json.rs`.

use serde::{Deserialize, Serialize};

/// A decoder of `n_layers` blocks of attention and feed-forward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// GGUF `general.architecture`; prefix of the metadata keys, not for the forward pass.
    pub architecture: String,
    /// Blocks.
    pub n_layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of a dense feed-forward layer; the experts' own is in `experts`.
    pub ffn: u32,
    /// Rows of the embedding matrix.
    pub vocab: u32,
    /// Longest sequence the model was made for, in tokens.
    pub context: u32,
    /// Added to the mean square in every RMS norm.
    pub norm_eps: f32,
    /// Norms after attention and after feed-forward too, before the residual is added.
    pub post_norms: bool,
    /// The gate's nonlinearity.
    pub activation: Activation,
    /// The three feed-forward matrices have a bias.
    pub ffn_bias: bool,
    /// Embeddings are multiplied by this before the first layer.
    pub embedding_scale: f32,
    /// The output head is the embedding matrix.
    pub tied_embeddings: bool,
    /// Logits become `c * tanh(logits / c)`.
    pub logit_softcap: Option<f32>,
    /// What every attention layer has.
    pub attention: Attention,
    /// Rotary positions.
    pub rope: Rope,
    /// Present when the feed-forward layers are routed.
    pub experts: Option<Experts>,
    /// The token that begins a text; the tokenizer's metadata says whether it is put there.
    pub bos: Option<u32>,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
}

/// The gate's nonlinearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU in its tanh approximation.
    GeluTanh,
}

/// Grouped-query attention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Query heads.
    pub n_heads: u32,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: u32,
    /// Width of a query or key head.
    pub key_length: u32,
    /// Width of a value head.
    pub value_length: u32,
    /// Scores are multiplied by this.
    pub scale: f32,
    /// Scores become `c * tanh(score / c)`.
    pub softcap: Option<f32>,
    /// RMS norm over each query and key head, before rope.
    pub qk_norm: bool,
    /// Queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub output_bias: bool,
    /// Layers that see only the last tokens.
    pub sliding_window: Option<SlidingWindow>,
}

/// Layers that see only the last tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlidingWindow {
    /// A token sees itself and `n_tokens - 1` before it.
    pub n_tokens: u32,
    /// One a layer: true where the window applies.
    pub layers: Vec<bool>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Which elements of a head make a pair, in the vindex's row order.
    pub kind: RopeKind,
    /// How many leading elements of a head are rotated.
    pub n_dims: u32,
    /// Pair `i` turns by `position * base^(-2i / n_dims)`.
    pub base: f32,
    /// The base of sliding-window layers where it is another; these are never scaled.
    pub base_sliding: Option<f32>,
    /// Stretching to longer contexts.
    pub scaling: Option<RopeScaling>,
}

/// Which elements of a head make a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RopeKind {
    /// `(2i, 2i + 1)`.
    Interleaved,
    /// `(i, i + n_dims / 2)`.
    Neox,
}

/// Stretching rope to contexts longer than those of pre-training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Positions are divided by `factor`.
    Linear {
        /// How much longer.
        factor: f32,
    },
    /// The frequency of pair `i` is divided by element `i` of tensor `rope_freqs.weight`.
    FrequencyFactors,
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// How much longer.
        factor: f32,
        /// Context of pre-training, in tokens.
        original_context: u32,
        /// Rotations over that context above which a pair is not stretched.
        beta_fast: f32,
        /// Rotations below which a pair is stretched in full.
        beta_slow: f32,
        /// Queries and keys are multiplied by this; `0.1 ln(factor) + 1` where none is given.
        attention_factor: Option<f32>,
    },
}

/// Routed feed-forward.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// Experts of a layer.
    pub n: u32,
    /// Experts that a token visits.
    pub n_used: u32,
    /// Width of one expert.
    pub ffn: u32,
    /// What turns router logits into weights.
    pub gating: Gating,
    /// The weights of the visited experts are divided by their sum.
    pub normalise: bool,
}

/// What turns router logits into weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gating {
    /// Softmax over all experts, then the largest are taken.
    Softmax,
}
