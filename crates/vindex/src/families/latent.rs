//! DeepSeek-V3: latent attention in the form that has one key for all queries, experts chosen by group, the first layers
//! dense. Invariant: the matrix that gives keys and values of all heads is split, the keys on their side, so that they can be
//! absorbed by the query.

use super::Place::{Attention as Att, FeedForward as Ff};
use super::classic::{LLAMA, WRITES};
use super::dims::Dim::{
    Experts, Hidden, KvRank, KvRankAndRope, LatentKv, LatentMixed, LatentQueries, QueryRank,
    SharedFfn,
};
use super::dims::{Fold, When};
use super::maps::row;
use super::{Bias, Defaults, ExpertKeys, Family, Row, Writes, maps};
use crate::config_json::latent;

#[rustfmt::skip]
const ATTENTION: &[Row] = &[
    row("model.layers.{l}.input_layernorm.weight", "attn_norm.weight", Att, &[Hidden], Fold::Norm, When::Always),
    row("model.layers.{l}.self_attn.q_proj.weight", "attn_q.weight", Att, &[LatentQueries, Hidden], Fold::None, When::NoQueryRank),
    row("model.layers.{l}.self_attn.q_a_proj.weight", "attn_q_a.weight", Att, &[QueryRank, Hidden], Fold::None, When::QueryRank),
    row("model.layers.{l}.self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight", Att, &[QueryRank], Fold::Norm, When::QueryRank),
    row("model.layers.{l}.self_attn.q_b_proj.weight", "attn_q_b.weight", Att, &[LatentQueries, QueryRank], Fold::None, When::QueryRank),
    row("model.layers.{l}.self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight", Att, &[KvRankAndRope, Hidden], Fold::None, When::Always),
    row("model.layers.{l}.self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight", Att, &[KvRank], Fold::Norm, When::Always),
    row("model.layers.{l}.self_attn.kv_b_proj.weight", "attn_k_b.weight", Att, &[LatentKv, KvRank], Fold::LatentKeys, When::Always),
    row("model.layers.{l}.self_attn.kv_b_proj.weight", "attn_v_b.weight", Att, &[LatentKv, KvRank], Fold::LatentValues, When::Always),
    row("model.layers.{l}.self_attn.o_proj.weight", "attn_output.weight", Att, &[Hidden, LatentMixed], Fold::None, When::Always),
];
#[rustfmt::skip]
const SHARED_EXPERTS: &[Row] = &[
    row("model.layers.{l}.mlp.gate.e_score_correction_bias", "exp_probs_b.bias", Att, &[Experts], Fold::None, When::ChoiceBias),
    row("model.layers.{l}.mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight", Ff, &[SharedFfn, Hidden], Fold::None, When::SharedExpert),
    row("model.layers.{l}.mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight", Ff, &[SharedFfn, Hidden], Fold::None, When::SharedExpert),
    row("model.layers.{l}.mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight", Ff, &[Hidden, SharedFfn], Fold::None, When::SharedExpert),
];

pub(super) const DEEPSEEK_V3: Family = Family {
    classes: &["DeepseekV3ForCausalLM"],
    architecture: "deepseek2",
    rows: &[
        maps::EMBEDDINGS,
        ATTENTION,
        maps::FFN_NORM,
        maps::DENSE,
        maps::QWEN_EXPERTS,
        maps::STACKED_EXPERTS,
        SHARED_EXPERTS,
    ],
    bias: Bias::None,
    experts: Some(ExpertKeys {
        n: ["n_routed_experts", "num_experts"],
        ffn: "moe_intermediate_size",
        normalise: Some(("norm_topk_prob", true)),
    }),
    defaults: Defaults {
        // The width of a head is told by other keys.
        head_dim: Some(64),
        context: Some(4096),
        vocab: Some(129_280),
        ..LLAMA.defaults
    },
    writes: Writes {
        head_dim_always: true,
        ..WRITES
    },
    numbers: latent::numbers,
    ..LLAMA
};
