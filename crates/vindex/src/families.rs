//! One table: for each family of models, how its checkpoint becomes GGUF.
//!
//! A row says the classes of `config.json` it is for, the GGUF architecture, the name map with shapes, and the
//! quirks that no configuration file tells. Names, folds and defaults are those of llama.cpp's converter and of
//! the `transformers` configuration classes. Invariant: after extraction nothing asks for the family again;
//! whatever a forward pass must know is a number in `Config`.

use crate::config::{Activation, Config, RopeKind};

/// One family of models.
pub(crate) struct Family {
    /// `architectures` of `config.json`.
    pub(crate) classes: &'static [&'static str],
    /// GGUF `general.architecture`.
    pub(crate) architecture: &'static str,
    /// The name map, in the order of the files.
    pub(crate) rows: &'static [&'static [Row]],
    /// Row order of queries and keys in the vindex; `Interleaved` means that they are permuted on the way.
    pub(crate) rope: RopeKind,
    /// Norms are stored around zero, and one is added on the way.
    pub(crate) norms_around_zero: bool,
    pub(crate) activation: Activation,
    /// Embeddings are multiplied by the root of the width.
    pub(crate) scales_embeddings: bool,
    pub(crate) post_norms: bool,
    pub(crate) qk_norm: bool,
    pub(crate) bias: Bias,
    pub(crate) window: Window,
    pub(crate) experts: Option<ExpertKeys>,
    pub(crate) defaults: Defaults,
    pub(crate) writes: Writes,
}

/// Which projections of attention have a bias.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bias {
    None,
    /// Queries, keys and values.
    Qkv,
    /// All four when `attention_bias`; the feed-forward matrices when `mlp_bias`.
    Configured,
}

/// Which layers see only a sliding window, where `layer_types` does not say.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    /// No layer, whatever the configuration has.
    None,
    All,
    /// From `max_window_layers` (28 where that is absent) on, when `use_sliding_window`.
    Upper,
    /// All, when `use_sliding_window`.
    AllIfUsed,
    /// All but each n-th, n being `sliding_window_pattern` or this.
    AllButEach(u32),
}

/// Where `config.json` has the numbers of the experts.
#[derive(Clone, Copy)]
pub(crate) struct ExpertKeys {
    /// The count has two names, and `transformers` writes either.
    pub(crate) n: [&'static str; 2],
    pub(crate) ffn: &'static str,
    /// None: the weights of the visited experts always add up to one.
    pub(crate) normalise: Option<&'static str>,
}

/// What the `transformers` configuration class fills in where `config.json` is silent.
#[derive(Clone, Copy)]
pub(crate) struct Defaults {
    /// None: `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<u32>,
    pub(crate) rope_base: f64,
    /// None: sliding layers have no base of their own.
    pub(crate) rope_base_sliding: Option<f64>,
    pub(crate) tied: bool,
    pub(crate) norm_eps: f64,
    pub(crate) n_heads: Option<u32>,
    pub(crate) n_kv_heads: Option<u32>,
    pub(crate) context: Option<u32>,
    pub(crate) vocab: Option<u32>,
    /// None: the scale of attention is that of the key length.
    pub(crate) query_pre_attn_scalar: Option<f64>,
    pub(crate) attention_softcap: Option<f64>,
    pub(crate) logit_softcap: Option<f64>,
    pub(crate) sliding_window: Option<u32>,
}

/// Which optional metadata keys the converter writes for the family.
#[derive(Clone, Copy)]
pub(crate) struct Writes {
    /// `attention.key_length` and `value_length`: always, or only when `config.json` has `head_dim`.
    pub(crate) head_dim_always: bool,
    /// `vocab_size` and `rope.dimension_count`.
    pub(crate) llama_keys: bool,
    /// `rope.freq_base` even where it is llama.cpp's own default of 10000.
    pub(crate) rope_base_always: bool,
    /// `add_space_prefix` false: SentencePiece texts are taken as they are.
    pub(crate) no_space_prefix: bool,
}

/// One line of a name map.
pub(crate) struct Row {
    /// Name in the checkpoint; `{l}` is the layer, `{e}` the expert.
    pub(crate) source: &'static str,
    /// Name in GGUF; the part before it (`blk.{l}.`) is implied by `{l}` in the source.
    pub(crate) target: &'static str,
    /// Which part of the vindex.
    pub(crate) place: Place,
    /// Shape in the checkpoint, slowest dimension first.
    pub(crate) shape: &'static [Dim],
    pub(crate) fold: Fold,
    pub(crate) when: When,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Embeddings,
    Attention,
    FeedForward,
}

/// A dimension that `config.json` tells.
#[derive(Clone, Copy)]
pub(crate) enum Dim {
    Vocab,
    Hidden,
    Ffn,
    /// Query heads times key length.
    Queries,
    /// Key heads times key length.
    Keys,
    /// Value heads times value length.
    Values,
    /// Query heads times value length.
    Mixed,
    KeyLength,
    Experts,
    ExpertFfn,
}

/// What may be done to the values, if the family does it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fold {
    None,
    /// A norm: one is added where norms are stored around zero.
    Norm,
    /// Query rows: permuted where rope is interleaved.
    RopeQueries,
    /// Key rows, likewise.
    RopeKeys,
}

/// When a tensor has to be there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Always,
    Untied,
    QkvBias,
    OutputBias,
    FfnBias,
}

impl Family {
    /// The row for a class of `config.json`.
    pub(crate) fn of_class(class: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|f| f.classes.contains(&class))
    }

    /// Every class the table has a row for.
    pub(crate) fn classes() -> Vec<&'static str> {
        FAMILIES.iter().flat_map(|f| f.classes).copied().collect()
    }

    /// The lines of the name map that apply to a model, in the order of the files.
    pub(crate) fn rows_for(&self, config: &Config) -> Vec<&'static Row> {
        let applies = |when| match when {
            When::Always => true,
            When::Untied => !config.tied_embeddings,
            When::QkvBias => config.attention.qkv_bias,
            When::OutputBias => config.attention.output_bias,
            When::FfnBias => config.ffn_bias,
        };
        self.rows
            .iter()
            .flat_map(|rows| rows.iter())
            .filter(|row| applies(row.when))
            .collect()
    }
}

impl Dim {
    pub(crate) fn of(self, config: &Config) -> u64 {
        let a = &config.attention;
        let experts = |f: fn(&crate::config::Experts) -> u32| config.experts.as_ref().map_or(0, f);
        let times = |n: u32, width: u32| u64::from(n) * u64::from(width);
        match self {
            Dim::Vocab => config.vocab.into(),
            Dim::Hidden => config.hidden.into(),
            Dim::Ffn => config.ffn.into(),
            Dim::Queries => times(a.n_heads, a.key_length),
            Dim::Keys => times(a.n_kv_heads, a.key_length),
            Dim::Values => times(a.n_kv_heads, a.value_length),
            Dim::Mixed => times(a.n_heads, a.value_length),
            Dim::KeyLength => a.key_length.into(),
            Dim::Experts => experts(|e| e.n).into(),
            Dim::ExpertFfn => experts(|e| e.ffn).into(),
        }
    }
}

const fn row(
    source: &'static str,
    target: &'static str,
    place: Place,
    shape: &'static [Dim],
    fold: Fold,
    when: When,
) -> Row {
    Row {
        source,
        target,
        place,
        shape,
        fold,
        when,
    }
}

use Dim::{ExpertFfn, Experts, Ffn, Hidden, KeyLength, Keys, Mixed, Queries, Values, Vocab};
use Place::{Attention as Att, Embeddings as Emb, FeedForward as Ff};
use When::{Always, FfnBias, OutputBias, QkvBias, Untied};

#[rustfmt::skip]
mod maps {
    use super::*;

    pub(super) const EMBEDDINGS: &[Row] = &[
        row("model.embed_tokens.weight", "token_embd.weight", Emb, &[Vocab, Hidden], Fold::None, Always),
        row("lm_head.weight", "output.weight", Emb, &[Vocab, Hidden], Fold::None, Untied),
        row("model.norm.weight", "output_norm.weight", Emb, &[Hidden], Fold::Norm, Always),
    ];
    pub(super) const ATTENTION: &[Row] = &[
        row("model.layers.{l}.input_layernorm.weight", "attn_norm.weight", Att, &[Hidden], Fold::Norm, Always),
        row("model.layers.{l}.self_attn.q_proj.weight", "attn_q.weight", Att, &[Queries, Hidden], Fold::RopeQueries, Always),
        row("model.layers.{l}.self_attn.k_proj.weight", "attn_k.weight", Att, &[Keys, Hidden], Fold::RopeKeys, Always),
        row("model.layers.{l}.self_attn.v_proj.weight", "attn_v.weight", Att, &[Values, Hidden], Fold::None, Always),
        row("model.layers.{l}.self_attn.q_proj.bias", "attn_q.bias", Att, &[Queries], Fold::RopeQueries, QkvBias),
        row("model.layers.{l}.self_attn.k_proj.bias", "attn_k.bias", Att, &[Keys], Fold::RopeKeys, QkvBias),
        row("model.layers.{l}.self_attn.v_proj.bias", "attn_v.bias", Att, &[Values], Fold::None, QkvBias),
        row("model.layers.{l}.self_attn.o_proj.weight", "attn_output.weight", Att, &[Hidden, Mixed], Fold::None, Always),
        row("model.layers.{l}.self_attn.o_proj.bias", "attn_output.bias", Att, &[Hidden], Fold::None, OutputBias),
    ];
    pub(super) const QK_NORM: &[Row] = &[
        row("model.layers.{l}.self_attn.q_norm.weight", "attn_q_norm.weight", Att, &[KeyLength], Fold::Norm, Always),
        row("model.layers.{l}.self_attn.k_norm.weight", "attn_k_norm.weight", Att, &[KeyLength], Fold::Norm, Always),
    ];
    pub(super) const FFN_NORM: &[Row] = &[
        row("model.layers.{l}.post_attention_layernorm.weight", "ffn_norm.weight", Att, &[Hidden], Fold::Norm, Always),
    ];
    pub(super) const FOUR_NORMS: &[Row] = &[
        row("model.layers.{l}.post_attention_layernorm.weight", "post_attention_norm.weight", Att, &[Hidden], Fold::Norm, Always),
        row("model.layers.{l}.pre_feedforward_layernorm.weight", "ffn_norm.weight", Att, &[Hidden], Fold::Norm, Always),
        row("model.layers.{l}.post_feedforward_layernorm.weight", "post_ffw_norm.weight", Att, &[Hidden], Fold::Norm, Always),
    ];
    pub(super) const DENSE: &[Row] = &[
        row("model.layers.{l}.mlp.gate_proj.weight", "ffn_gate.weight", Ff, &[Ffn, Hidden], Fold::None, Always),
        row("model.layers.{l}.mlp.up_proj.weight", "ffn_up.weight", Ff, &[Ffn, Hidden], Fold::None, Always),
        row("model.layers.{l}.mlp.down_proj.weight", "ffn_down.weight", Ff, &[Hidden, Ffn], Fold::None, Always),
        row("model.layers.{l}.mlp.gate_proj.bias", "ffn_gate.bias", Ff, &[Ffn], Fold::None, FfnBias),
        row("model.layers.{l}.mlp.up_proj.bias", "ffn_up.bias", Ff, &[Ffn], Fold::None, FfnBias),
        row("model.layers.{l}.mlp.down_proj.bias", "ffn_down.bias", Ff, &[Hidden], Fold::None, FfnBias),
    ];
    pub(super) const MIXTRAL_EXPERTS: &[Row] = &[
        row("model.layers.{l}.block_sparse_moe.gate.weight", "ffn_gate_inp.weight", Att, &[Experts, Hidden], Fold::None, Always),
        row("model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", "ffn_gate_exps.weight", Ff, &[ExpertFfn, Hidden], Fold::None, Always),
        row("model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", "ffn_up_exps.weight", Ff, &[ExpertFfn, Hidden], Fold::None, Always),
        row("model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", "ffn_down_exps.weight", Ff, &[Hidden, ExpertFfn], Fold::None, Always),
    ];
    pub(super) const QWEN_EXPERTS: &[Row] = &[
        row("model.layers.{l}.mlp.gate.weight", "ffn_gate_inp.weight", Att, &[Experts, Hidden], Fold::None, Always),
        row("model.layers.{l}.mlp.experts.{e}.gate_proj.weight", "ffn_gate_exps.weight", Ff, &[ExpertFfn, Hidden], Fold::None, Always),
        row("model.layers.{l}.mlp.experts.{e}.up_proj.weight", "ffn_up_exps.weight", Ff, &[ExpertFfn, Hidden], Fold::None, Always),
        row("model.layers.{l}.mlp.experts.{e}.down_proj.weight", "ffn_down_exps.weight", Ff, &[Hidden, ExpertFfn], Fold::None, Always),
    ];
}

const DEFAULTS: Defaults = Defaults {
    head_dim: None,
    rope_base: 10_000.0,
    rope_base_sliding: None,
    tied: false,
    norm_eps: 1e-6,
    n_heads: None,
    n_kv_heads: None,
    context: None,
    vocab: None,
    query_pre_attn_scalar: None,
    attention_softcap: None,
    logit_softcap: None,
    sliding_window: None,
};

const WRITES: Writes = Writes {
    head_dim_always: false,
    llama_keys: false,
    rope_base_always: true,
    no_space_prefix: false,
};

const LLAMA: Family = Family {
    classes: &["LlamaForCausalLM"],
    architecture: "llama",
    rows: &[
        maps::EMBEDDINGS,
        maps::ATTENTION,
        maps::FFN_NORM,
        maps::DENSE,
    ],
    rope: RopeKind::Interleaved,
    norms_around_zero: false,
    activation: Activation::Silu,
    scales_embeddings: false,
    post_norms: false,
    qk_norm: false,
    bias: Bias::Configured,
    window: Window::None,
    experts: None,
    defaults: Defaults {
        context: Some(2048),
        ..DEFAULTS
    },
    writes: Writes {
        head_dim_always: true,
        llama_keys: true,
        ..WRITES
    },
};

const QWEN2: Family = Family {
    classes: &["Qwen2ForCausalLM"],
    architecture: "qwen2",
    rope: RopeKind::Neox,
    bias: Bias::Qkv,
    window: Window::Upper,
    defaults: Defaults {
        n_kv_heads: Some(32),
        context: Some(32_768),
        sliding_window: Some(4096),
        ..DEFAULTS
    },
    writes: WRITES,
    ..LLAMA
};

const QWEN3: Family = Family {
    classes: &["Qwen3ForCausalLM"],
    architecture: "qwen3",
    rows: &[
        maps::EMBEDDINGS,
        maps::ATTENTION,
        maps::QK_NORM,
        maps::FFN_NORM,
        maps::DENSE,
    ],
    qk_norm: true,
    bias: Bias::Configured,
    defaults: Defaults {
        head_dim: Some(128),
        ..QWEN2.defaults
    },
    writes: Writes {
        head_dim_always: true,
        ..WRITES
    },
    ..QWEN2
};

const GEMMA2: Family = Family {
    classes: &["Gemma2ForCausalLM"],
    architecture: "gemma2",
    rows: &[
        maps::EMBEDDINGS,
        maps::ATTENTION,
        maps::FOUR_NORMS,
        maps::DENSE,
    ],
    rope: RopeKind::Neox,
    norms_around_zero: true,
    activation: Activation::GeluTanh,
    scales_embeddings: true,
    post_norms: true,
    window: Window::AllButEach(2),
    defaults: Defaults {
        head_dim: Some(256),
        tied: true,
        n_kv_heads: Some(4),
        context: Some(8192),
        query_pre_attn_scalar: Some(256.0),
        attention_softcap: Some(50.0),
        logit_softcap: Some(30.0),
        sliding_window: Some(4096),
        ..DEFAULTS
    },
    writes: Writes {
        head_dim_always: true,
        rope_base_always: false,
        no_space_prefix: true,
        ..WRITES
    },
    ..LLAMA
};

/// Every family there is.
const FAMILIES: &[Family] = &[
    LLAMA,
    Family {
        classes: &["MistralForCausalLM"],
        bias: Bias::None,
        window: Window::All,
        defaults: Defaults {
            n_kv_heads: Some(8),
            context: Some(131_072),
            sliding_window: Some(4096),
            ..DEFAULTS
        },
        ..LLAMA
    },
    Family {
        classes: &["MixtralForCausalLM"],
        rows: &[
            maps::EMBEDDINGS,
            maps::ATTENTION,
            maps::FFN_NORM,
            maps::MIXTRAL_EXPERTS,
        ],
        bias: Bias::None,
        window: Window::All,
        experts: Some(ExpertKeys {
            n: ["num_local_experts", "num_experts"],
            ffn: "intermediate_size",
            normalise: None,
        }),
        defaults: Defaults {
            rope_base: 1_000_000.0,
            norm_eps: 1e-5,
            n_kv_heads: Some(8),
            context: Some(131_072),
            ..DEFAULTS
        },
        writes: Writes {
            llama_keys: true,
            ..WRITES
        },
        ..LLAMA
    },
    QWEN2,
    QWEN3,
    Family {
        classes: &["Qwen3MoeForCausalLM"],
        architecture: "qwen3moe",
        rows: &[
            maps::EMBEDDINGS,
            maps::ATTENTION,
            maps::QK_NORM,
            maps::FFN_NORM,
            maps::QWEN_EXPERTS,
        ],
        experts: Some(ExpertKeys {
            n: ["num_experts", "num_local_experts"],
            ffn: "moe_intermediate_size",
            normalise: Some("norm_topk_prob"),
        }),
        window: Window::AllIfUsed,
        defaults: Defaults {
            n_kv_heads: Some(4),
            ..QWEN2.defaults
        },
        writes: WRITES,
        ..QWEN3
    },
    GEMMA2,
    Family {
        classes: &["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"],
        architecture: "gemma3",
        rows: &[
            maps::EMBEDDINGS,
            maps::ATTENTION,
            maps::QK_NORM,
            maps::FOUR_NORMS,
            maps::DENSE,
        ],
        qk_norm: true,
        window: Window::AllButEach(6),
        defaults: Defaults {
            rope_base: 1_000_000.0,
            rope_base_sliding: Some(10_000.0),
            n_heads: Some(8),
            context: Some(131_072),
            vocab: Some(262_208),
            attention_softcap: None,
            logit_softcap: None,
            ..GEMMA2.defaults
        },
        writes: Writes {
            rope_base_always: true,
            ..GEMMA2.writes
        },
        ..GEMMA2
    },
];
