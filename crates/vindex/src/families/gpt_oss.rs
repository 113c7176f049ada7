//! gpt-oss: attention with sinks, biases everywhere, experts in blocks of MXFP4 that are kept as they are. Invariant: a
//! checkpoint without such blocks has each expert's matrix on its side, rows of gates and ups in turn as in the blocks.

use super::Place::{Attention as Att, FeedForward as Ff};
use super::classic::{LLAMA, WRITES};
use super::dims::Dim::{
    ExpertBlocks, ExpertFfn, Experts, Hidden, HiddenBlocks, Nibbles, QueryHeads, TwoExpertFfn,
};
use super::dims::{Fold, When};
use super::maps::row;
use super::{Bias, Defaults, ExpertKeys, Family, Row, Window, Writes, maps};
use crate::config::{Activation, RopeKind};
use crate::config_json::gpt_oss;

#[rustfmt::skip]
const EXPERTS: &[Row] = &[
    row("model.layers.{l}.self_attn.sinks", "attn_sinks.weight", Att, &[QueryHeads], Fold::None, When::Sinks),
    row("model.layers.{l}.mlp.router.weight", "ffn_gate_inp.weight", Att, &[Experts, Hidden], Fold::None, When::Routed),
    row("model.layers.{l}.mlp.router.bias", "ffn_gate_inp.bias", Att, &[Experts], Fold::None, When::RouterBias),
    row("model.layers.{l}.mlp.experts.gate_up_proj_blocks", "ffn_gate_exps.weight", Ff, &[Experts, TwoExpertFfn, HiddenBlocks, Nibbles], Fold::PackedFirst, When::Routed),
    row("model.layers.{l}.mlp.experts.gate_up_proj_blocks", "ffn_up_exps.weight", Ff, &[Experts, TwoExpertFfn, HiddenBlocks, Nibbles], Fold::PackedSecond, When::Routed),
    row("model.layers.{l}.mlp.experts.down_proj_blocks", "ffn_down_exps.weight", Ff, &[Experts, Hidden, ExpertBlocks, Nibbles], Fold::Packed, When::Routed),
    row("model.layers.{l}.mlp.experts.gate_up_proj", "ffn_gate_exps.weight", Ff, &[Experts, Hidden, TwoExpertFfn], Fold::TransposedFirst, When::Routed),
    row("model.layers.{l}.mlp.experts.gate_up_proj", "ffn_up_exps.weight", Ff, &[Experts, Hidden, TwoExpertFfn], Fold::TransposedSecond, When::Routed),
    row("model.layers.{l}.mlp.experts.down_proj", "ffn_down_exps.weight", Ff, &[Experts, ExpertFfn, Hidden], Fold::Transposed, When::Routed),
    row("model.layers.{l}.mlp.experts.gate_up_proj_bias", "ffn_gate_exps.bias", Ff, &[Experts, TwoExpertFfn], Fold::First, When::ExpertBias),
    row("model.layers.{l}.mlp.experts.gate_up_proj_bias", "ffn_up_exps.bias", Ff, &[Experts, TwoExpertFfn], Fold::Second, When::ExpertBias),
    row("model.layers.{l}.mlp.experts.down_proj_bias", "ffn_down_exps.bias", Ff, &[Experts, Hidden], Fold::None, When::ExpertBias),
];

pub(super) const GPT_OSS: Family = Family {
    classes: &["GptOssForCausalLM"],
    architecture: "gpt-oss",
    rows: &[
        maps::EMBEDDINGS,
        maps::ATTENTION,
        maps::POST_ATTENTION_NORM,
        EXPERTS,
    ],
    rope: RopeKind::Neox,
    activation: Activation::SwigluClamped,
    bias: Bias::Configured,
    window: Window::AllButEach(2),
    experts: Some(ExpertKeys {
        n: ["num_local_experts", "num_experts"],
        ffn: "intermediate_size",
        normalise: None,
    }),
    defaults: Defaults {
        head_dim: Some(64),
        rope_base: 150_000.0,
        norm_eps: 1e-5,
        n_heads: Some(64),
        n_kv_heads: Some(8),
        context: Some(131_072),
        vocab: Some(201_088),
        sliding_window: Some(128),
        ..LLAMA.defaults
    },
    writes: Writes {
        head_dim_always: true,
        ..WRITES
    },
    keeps_mxfp4: true,
    numbers: gpt_oss::numbers,
    ..LLAMA
};
