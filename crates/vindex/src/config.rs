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
    /// Blocks after them that predict further tokens (`nextn.*`); they are no part of the pass.
    #[serde(default, skip_serializing_if = "is_default")]
    pub n_nextn: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of a dense feed-forward layer; the experts' own is in `experts`.
    pub ffn: u32,
    /// One a layer, where dense feed-forward layers are not all `ffn` wide.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ffn_layers: Vec<u32>,
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
    /// Present when some layers remember by a state of fixed size instead of keys and values.
    #[serde(default, skip_serializing_if = "is_default")]
    pub delta_net: Option<DeltaNet>,
    /// Present when each layer adds something that it looked up for the token itself.
    #[serde(default, skip_serializing_if = "is_default")]
    pub layer_embeddings: Option<LayerEmbeddings>,
    /// The residual stream is multiplied by `layer_output_scale.weight` at the end of each layer.
    #[serde(default, skip_serializing_if = "is_default")]
    pub layer_scale: bool,
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
    /// gpt-oss's: with gate `g` at most 7 and up `u` within -7..=7, `(u + 1) * g * sigmoid(1.702 g)`.
    SwigluClamped,
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
    /// RMS norm without a weight over each value head.
    #[serde(default, skip_serializing_if = "is_default")]
    pub value_norm: bool,
    /// Layers without a sliding window have no matrix for values: a value is the key before its norm and rope.
    #[serde(default, skip_serializing_if = "is_default")]
    pub keys_are_values: bool,
    /// The matrix of queries has twice the rows, for each head the query and then a gate; what attention gives is
    /// multiplied by the gate's sigmoid before the output projection.
    #[serde(default, skip_serializing_if = "is_default")]
    pub output_gate: bool,
    /// `attn_sinks.weight`, one a query head, takes part in the softmax as the score of nothing.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sinks: bool,
    /// That many last layers have no keys and values of their own: each uses those of the last layer before them that
    /// has the same kind (sliding or not).
    #[serde(default, skip_serializing_if = "is_default")]
    pub n_shared_kv_layers: u32,
    /// Multi-head latent attention, see there.
    #[serde(default, skip_serializing_if = "is_default")]
    pub latent: Option<Latent>,
}

/// Multi-head latent attention (DeepSeek-V2, section 2.1), in the form that GGUF has: one key head for all queries, which
/// is `[compressed (value_length), rotated (rope.n_dims)]` of [`Attention`], while values are its compressed part.
///
/// ```text
/// q      = attn_q_b · norm(attn_q_a · x)    for each head n_plain elements, then rope.n_dims that are rotated
/// kv     = attn_kv_a_mqa · x                value_length elements that are normed (attn_kv_a_norm), then the rotated ones
/// query  = [attn_k_b of the head · q's plain elements, q's rotated elements]
/// out    = attn_v_b of the head · (softmax(scale * query · keys) · values)         value_length elements of `Latent`
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latent {
    /// Width of the compressed query; without it queries are `attn_q` times the row.
    pub q_rank: Option<u32>,
    /// Elements of a query head that are not rotated.
    pub n_plain: u32,
    /// Width of a head's result, after `attn_v_b`.
    pub value_length: u32,
}

/// Layers that mix by a gated delta rule (Yang et al. 2024, <https://arxiv.org/abs/2412.06464>) instead of attention.
///
/// ```text
/// qkv    = silu(causal convolution over conv_kernel rows of attn_qkv · x)     keys' heads, keys' heads, values' heads
/// z      = attn_gate · x;  beta = sigmoid(b);  g = ssm_a * softplus(a + ssm_dt.bias)     one b and a for each value head
/// q, k   = l2 norm of each head, q also over the root of key_length
/// S      = exp(g) S;  S += k (beta (v - S^T k))^T;  out = S^T q         S (key_length, value_length), one a value head
/// delta  = ssm_out · (ssm_norm(out) * silu(z))
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaNet {
    /// One a layer: true where it mixes so.
    pub layers: Vec<bool>,
    /// Heads of queries and keys; divides `n_value_heads`.
    pub n_key_heads: u32,
    /// Heads of values, states and gates.
    pub n_value_heads: u32,
    /// Width of a key head.
    pub key_length: u32,
    /// Width of a value head.
    pub value_length: u32,
    /// Rows that the convolution sees, the row itself included.
    pub conv_kernel: u32,
    /// Which key head a value head `v` uses, in the vindex's order of heads: `v % n_key_heads` when true, else
    /// `v / (n_value_heads / n_key_heads)`.
    pub tiled: bool,
    /// `a` and `b` are the products of one matrix, `ssm_ba`: for each key head the `b` of its value heads, then their `a`.
    /// Else they are those of `ssm_alpha` and `ssm_beta`.
    pub fused_ba: bool,
}

/// What a layer looks up for the token itself (Gemma 3n's per-layer embeddings).
///
/// ```text
/// input  = (norm(per_layer_model_proj · x / sqrt(hidden)) + sqrt(width) * per_layer_token_embd[token]) / sqrt(2)
///          (n_layers, width) for each token, x being its scaled embedding, the norm `per_layer_proj_norm` over width
/// x     += norm(proj · (gelu(inp_gate · x) * input[layer]))     at the end of the layer, the norm `post_norm`
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerEmbeddings {
    /// Width for one layer.
    pub width: u32,
}

/// Layers that see only the last tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlidingWindow {
    /// A token sees itself and `n_tokens - 1` before it.
    pub n_tokens: u32,
    /// One a layer: true where the window applies.
    pub layers: Vec<bool>,
    /// Heads of these layers, where they are not those of [`Attention`].
    #[serde(default, skip_serializing_if = "is_default")]
    pub heads: Option<Heads>,
}

/// Keys and values of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heads {
    /// Key and value heads.
    pub n_kv_heads: u32,
    /// Width of a query or key head.
    pub key_length: u32,
    /// Width of a value head.
    pub value_length: u32,
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
    /// Leading elements of a head that sliding-window layers rotate, where they are not `n_dims`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub n_dims_sliding: Option<u32>,
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
        /// The pairs between which stretching begins and ends are no whole numbers.
        #[serde(default, skip_serializing_if = "is_default")]
        fractional: bool,
    },
}

/// Routed feed-forward. The router's logits are `ffn_gate_inp` times what enters the feed-forward layer.
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
    /// And then multiplied by this.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub scale: f32,
    /// Experts are chosen by group first.
    #[serde(default, skip_serializing_if = "is_default")]
    pub groups: Option<Groups>,
    /// `exp_probs_b.bias`, one an expert, is added to the weights for choosing, not for weighing.
    #[serde(default, skip_serializing_if = "is_default")]
    pub choice_bias: bool,
    /// The router has a bias, `ffn_gate_inp.bias`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub router_bias: bool,
    /// The experts' matrices have biases.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bias: bool,
    /// So many first layers are dense, `ffn` of [`Config`] wide.
    #[serde(default, skip_serializing_if = "is_default")]
    pub n_leading_dense: u32,
    /// An expert that each token visits beside the chosen ones.
    #[serde(default, skip_serializing_if = "is_default")]
    pub shared: Option<Shared>,
    /// Gemma 4's: beside the experts there is a whole dense layer (`ffn_gate`, `ffn_up`, `ffn_down`, `ffn` of [`Config`]
    /// wide) with norms of its own.
    ///
    /// ```text
    /// dense  = post_ffw_norm_1(feed forward(ffn_norm(x)))
    /// logits = ffn_gate_inp · (ffn_gate_inp.scale * x / sqrt(mean of x^2 + eps) / sqrt(hidden))
    /// routed = post_ffw_norm_2(sum of weight * ffn_down_exps.scale[expert] * expert(pre_ffw_norm_2(x)))
    /// x     += post_ffw_norm(dense + routed)
    /// ```
    #[serde(default, skip_serializing_if = "is_default")]
    pub dense_branch: bool,
}

/// An expert that each token visits. In lists of visits it has the number after the last routed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shared {
    /// Its width (of all shared experts together: they are stored as one).
    pub ffn: u32,
    /// Its result is multiplied by the sigmoid of `ffn_gate_inp_shexp` times the row.
    pub gated: bool,
}

/// Experts `0..n / groups.n` are the first group, and so on; a token chooses among the experts of the best groups, a group
/// being as good as its two best experts together (DeepSeek-V3, section 2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Groups {
    /// Groups; divides the number of experts.
    pub n: u32,
    /// Groups that a token may choose from.
    pub n_used: u32,
}

/// What turns router logits into weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gating {
    /// Softmax over all experts, then the largest are taken.
    Softmax,
    /// Sigmoid of each, then the largest are taken.
    Sigmoid,
}

impl Experts {
    /// `n` experts of which everything else is still to be said.
    pub fn new(n: u32, gating: Gating) -> Experts {
        Experts {
            n,
            n_used: 1,
            ffn: 0,
            gating,
            normalise: false,
            scale: 1.0,
            groups: None,
            choice_bias: false,
            router_bias: false,
            bias: false,
            n_leading_dense: 0,
            shared: None,
            dense_branch: false,
        }
    }
}

impl Config {
    /// Keys and values of layer `l`.
    pub fn heads(&self, l: u32) -> Heads {
        let a = &self.attention;
        let own = a.sliding_window.as_ref().and_then(|w| w.heads);
        own.filter(|_| self.slides(l)).unwrap_or(Heads {
            n_kv_heads: a.n_kv_heads,
            key_length: a.key_length,
            value_length: a.value_length,
        })
    }

    /// Whether layer `l` sees only the last tokens.
    pub fn slides(&self, l: u32) -> bool {
        let window = self.attention.sliding_window.as_ref();
        window.is_some_and(|w| w.layers.get(l as usize) == Some(&true))
    }

    /// Whether layer `l` mixes by a state of fixed size.
    pub fn is_recurrent(&self, l: u32) -> bool {
        let net = self.delta_net.as_ref();
        net.is_some_and(|net| net.layers.get(l as usize) == Some(&true))
    }

    /// The layer whose keys and values layer `l` uses: itself, or one before it; `None` when it has none to use.
    pub fn kv_layer(&self, l: u32) -> Option<u32> {
        if self.is_recurrent(l) {
            return None;
        }
        let n_own = self
            .n_layers
            .saturating_sub(self.attention.n_shared_kv_layers);
        if l < n_own {
            return Some(l);
        }
        (0..n_own)
            .rev()
            .find(|&own| self.slides(own) == self.slides(l))
    }

    /// Whether the feed-forward layer `l` has experts.
    pub fn is_routed(&self, l: u32) -> bool {
        self.experts.is_some_and(|e| l >= e.n_leading_dense)
    }

    /// Width of the dense feed-forward layer `l`.
    pub fn ffn_of(&self, l: u32) -> u32 {
        self.ffn_layers.get(l as usize).copied().unwrap_or(self.ffn)
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn one() -> f32 {
    1.0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives references")]
fn is_one(value: &f32) -> bool {
    *value == 1.0
}
