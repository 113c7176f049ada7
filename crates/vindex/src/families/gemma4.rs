//! Gemma 4: heads of another size in layers that slide, values that are keys, layers that use the keys and values of
//! others, per-layer embeddings, experts beside a dense layer. Invariant: unlike its predecessors', its norms are stored as
//! they are.

use super::Place::{Attention as Att, Embeddings as Emb, FeedForward as Ff};
use super::classic::{GEMMA3, WRITES};
use super::dims::Dim::{
    ExpertFfn, Experts, Hidden, KeyLength, Keys, LayerInput, LayerInputs, Mixed, One, Queries,
    TwoExpertFfn, Values, Vocab,
};
use super::dims::{Fold, When};
use super::maps::row;
use super::{Defaults, Family, Row, Window, Writes, maps};
use crate::config_json::gemma4;

#[rustfmt::skip]
const ATTENTION: &[Row] = &[
    row("model.layers.{l}.input_layernorm.weight", "attn_norm.weight", Att, &[Hidden], Fold::Norm, When::Always),
    row("model.layers.{l}.self_attn.q_proj.weight", "attn_q.weight", Att, &[Queries, Hidden], Fold::None, When::Always),
    row("model.layers.{l}.self_attn.k_proj.weight", "attn_k.weight", Att, &[Keys, Hidden], Fold::None, When::OwnOrSpareKeys),
    row("model.layers.{l}.self_attn.v_proj.weight", "attn_v.weight", Att, &[Values, Hidden], Fold::None, When::OwnOrSpareValues),
    row("model.layers.{l}.self_attn.o_proj.weight", "attn_output.weight", Att, &[Hidden, Mixed], Fold::None, When::Always),
    row("model.layers.{l}.self_attn.q_norm.weight", "attn_q_norm.weight", Att, &[KeyLength], Fold::Norm, When::Always),
    row("model.layers.{l}.self_attn.k_norm.weight", "attn_k_norm.weight", Att, &[KeyLength], Fold::Norm, When::OwnOrSpareKeys),
    row("model.layers.{l}.layer_scalar", "layer_output_scale.weight", Att, &[One], Fold::None, When::LayerScale),
];
#[rustfmt::skip]
const LAYER_INPUTS: &[Row] = &[
    row("model.embed_tokens_per_layer.weight", "per_layer_token_embd.weight", Emb, &[Vocab, LayerInputs], Fold::None, When::LayerInputs),
    row("model.per_layer_model_projection.weight", "per_layer_model_proj.weight", Emb, &[LayerInputs, Hidden], Fold::None, When::LayerInputs),
    row("model.per_layer_projection_norm.weight", "per_layer_proj_norm.weight", Emb, &[LayerInput], Fold::Norm, When::LayerInputs),
    row("model.layers.{l}.per_layer_input_gate.weight", "inp_gate.weight", Att, &[LayerInput, Hidden], Fold::None, When::LayerInputs),
    row("model.layers.{l}.per_layer_projection.weight", "proj.weight", Att, &[Hidden, LayerInput], Fold::None, When::LayerInputs),
    row("model.layers.{l}.post_per_layer_input_norm.weight", "post_norm.weight", Att, &[Hidden], Fold::Norm, When::LayerInputs),
];

/// Experts beside a dense layer, gates above ups in one tensor as in the checkpoint.
#[rustfmt::skip]
const EXPERTS: &[Row] = &[
    row("model.layers.{l}.post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight", Att, &[Hidden], Fold::Norm, When::DenseBranch),
    row("model.layers.{l}.pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight", Att, &[Hidden], Fold::Norm, When::DenseBranch),
    row("model.layers.{l}.post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight", Att, &[Hidden], Fold::Norm, When::DenseBranch),
    row("model.layers.{l}.router.proj.weight", "ffn_gate_inp.weight", Att, &[Experts, Hidden], Fold::None, When::Routed),
    row("model.layers.{l}.router.scale", "ffn_gate_inp.scale", Att, &[Hidden], Fold::None, When::Routed),
    row("model.layers.{l}.router.per_expert_scale", "ffn_down_exps.scale", Att, &[Experts], Fold::None, When::Routed),
    row("model.layers.{l}.experts.gate_up_proj", "ffn_gate_up_exps.weight", Ff, &[Experts, TwoExpertFfn, Hidden], Fold::None, When::Routed),
    row("model.layers.{l}.experts.down_proj", "ffn_down_exps.weight", Ff, &[Experts, Hidden, ExpertFfn], Fold::None, When::Routed),
];

pub(super) const GEMMA4: Family = Family {
    classes: &["Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"],
    architecture: "gemma4",
    rows: &[
        maps::EMBEDDINGS,
        LAYER_INPUTS,
        ATTENTION,
        maps::FOUR_NORMS,
        maps::DENSE,
        EXPERTS,
    ],
    norms_around_zero: false,
    window: Window::AllButEach(6),
    defaults: Defaults {
        head_dim: Some(256),
        n_heads: Some(8),
        n_kv_heads: Some(4),
        vocab: Some(262_144),
        query_pre_attn_scalar: None,
        sliding_window: Some(512),
        rotated: Some(0.25),
        ..GEMMA3.defaults
    },
    writes: Writes {
        rope_base_always: true,
        gemma4_tokenizer: true,
        no_space_prefix: false,
        ..WRITES
    },
    numbers: gemma4::numbers,
    ..GEMMA3
};
