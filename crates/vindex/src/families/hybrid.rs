//! The families whose layers are mostly delta nets and now and then attention with gates: Qwen3-Next and Qwen3.5. Invariant:
//! their norms are stored around zero, all but the one inside the delta net.

use super::classic::{LLAMA, WRITES};
use super::{Bias, Defaults, ExpertKeys, Family, Window, Writes, maps};
use crate::config::RopeKind;
use crate::config_json::hybrid;

pub(super) const QWEN3_5: Family = Family {
    classes: &["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"],
    architecture: "qwen35",
    rows: &[
        maps::EMBEDDINGS,
        maps::ATTENTION,
        maps::QK_NORM,
        maps::DELTA_NET,
        maps::DELTA_NET_APART,
        maps::POST_ATTENTION_NORM,
        maps::DENSE,
        maps::NEXTN,
    ],
    rope: RopeKind::Neox,
    norms_around_zero: true,
    qk_norm: true,
    bias: Bias::Configured,
    window: Window::None,
    defaults: Defaults {
        head_dim: Some(256),
        rotated: Some(0.25),
        n_heads: Some(16),
        n_kv_heads: Some(4),
        context: Some(32_768),
        vocab: Some(248_320),
        ..LLAMA.defaults
    },
    writes: Writes {
        head_dim_always: true,
        rope_sections: true,
        ..WRITES
    },
    numbers: hybrid::numbers,
    ..LLAMA
};

pub(super) const QWEN3_5_MOE: Family = Family {
    classes: &[
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
    ],
    architecture: "qwen35moe",
    rows: &[
        maps::EMBEDDINGS,
        maps::ATTENTION,
        maps::QK_NORM,
        maps::DELTA_NET,
        maps::DELTA_NET_APART,
        maps::POST_ATTENTION_NORM,
        maps::QWEN_EXPERTS,
        maps::QWEN_SWITCH,
        maps::STACKED_EXPERTS,
        maps::QWEN_SHARED_EXPERT,
        maps::NEXTN,
    ],
    experts: Some(ExpertKeys {
        n: ["num_experts", "num_local_experts"],
        ffn: "moe_intermediate_size",
        normalise: None,
    }),
    defaults: Defaults {
        n_kv_heads: Some(2),
        ..QWEN3_5.defaults
    },
    ..QWEN3_5
};

pub(super) const QWEN3_NEXT: Family = Family {
    classes: &["Qwen3NextForCausalLM"],
    architecture: "qwen3next",
    rows: &[
        maps::EMBEDDINGS,
        maps::ATTENTION,
        maps::QK_NORM,
        maps::DELTA_NET,
        maps::DELTA_NET_FUSED,
        maps::POST_ATTENTION_NORM,
        maps::QWEN_EXPERTS,
        maps::QWEN_SWITCH,
        maps::STACKED_EXPERTS,
        maps::QWEN_SHARED_EXPERT,
        maps::NEXTN,
    ],
    experts: Some(ExpertKeys {
        n: ["num_experts", "num_local_experts"],
        ffn: "moe_intermediate_size",
        normalise: Some(("norm_topk_prob", true)),
    }),
    defaults: Defaults {
        vocab: Some(151_936),
        ..QWEN3_5_MOE.defaults
    },
    writes: Writes {
        rope_sections: false,
        // The converter reads the configuration by way of a class that drops the number.
        attention_interval: Some(4),
        ..QWEN3_5.writes
    },
    numbers: hybrid::numbers_of_next,
    ..QWEN3_5_MOE
};
