//! The families of one kind of layer: attention with heads of one size, and feed-forward that is dense or routed, from
//! LLaMA to Gemma 3. Invariant: a row says what its configuration class fills in, so that a silent `config.json` is the same
//! model here as there.

use super::{Bias, Defaults, ExpertKeys, Family, Window, Writes, maps};
use crate::config::{Activation, RopeKind};

pub(super) const DEFAULTS: Defaults = Defaults {
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
    rotated: None,
};

pub(super) const WRITES: Writes = Writes {
    head_dim_always: false,
    llama_keys: false,
    rope_base_always: true,
    no_space_prefix: false,
    expert_ffn: true,
    rope_sections: false,
    attention_interval: None,
    gemma4_tokenizer: false,
};

pub(super) const LLAMA: Family = Family {
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
    keeps_mxfp4: false,
    numbers: |_, config| Ok(config),
};

pub(super) const QWEN2: Family = Family {
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

pub(super) const QWEN3: Family = Family {
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

pub(super) const GEMMA2: Family = Family {
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

pub(super) const MISTRAL: Family = Family {
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
};

pub(super) const MIXTRAL: Family = Family {
    classes: &["MixtralForCausalLM"],
    rows: &[
        maps::EMBEDDINGS,
        maps::ATTENTION,
        maps::FFN_NORM,
        maps::MIXTRAL_EXPERTS,
        maps::MIXTRAL_SWITCH,
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
        expert_ffn: false,
        ..WRITES
    },
    ..LLAMA
};

pub(super) const QWEN3_MOE: Family = Family {
    classes: &["Qwen3MoeForCausalLM"],
    architecture: "qwen3moe",
    rows: &[
        maps::EMBEDDINGS,
        maps::ATTENTION,
        maps::QK_NORM,
        maps::FFN_NORM,
        maps::QWEN_EXPERTS,
        maps::QWEN_SWITCH,
        maps::STACKED_EXPERTS,
    ],
    experts: Some(ExpertKeys {
        n: ["num_experts", "num_local_experts"],
        ffn: "moe_intermediate_size",
        normalise: Some(("norm_topk_prob", false)),
    }),
    window: Window::AllIfUsed,
    defaults: Defaults {
        n_kv_heads: Some(4),
        ..QWEN2.defaults
    },
    writes: WRITES,
    ..QWEN3
};

pub(super) const GEMMA3: Family = Family {
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
};
