//! The name maps: from a checkpoint's names and shapes to GGUF's names, one list for each thing that several families
//! have. Invariant: the order of the lines is the order in the files, so a line that moves changes every identity.

use super::Place::{self, Attention as Att, Embeddings as Emb, FeedForward as Ff};
use super::Row;
use super::dims::Dim::*;
use super::dims::When::{
    Always, Attends, Dense, FfnBias, OutputBias, OwnValues, QkvBias, Recurrent, Routed,
    SharedExpert, SharedGate, Untied,
};
use super::dims::{Dim, Fold, When};

pub(super) const fn row(
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

#[rustfmt::skip]
pub(super) const EMBEDDINGS: &[Row] = &[
    row("model.embed_tokens.weight", "token_embd.weight", Emb, &[Vocab, Hidden], Fold::None, Always),
    row("lm_head.weight", "output.weight", Emb, &[Vocab, Hidden], Fold::None, Untied),
    row("model.norm.weight", "output_norm.weight", Emb, &[Hidden], Fold::Norm, Always),
];
#[rustfmt::skip]
pub(super) const ATTENTION: &[Row] = &[
    row("model.layers.{l}.input_layernorm.weight", "attn_norm.weight", Att, &[Hidden], Fold::Norm, Always),
    row("model.layers.{l}.self_attn.q_proj.weight", "attn_q.weight", Att, &[Queries, Hidden], Fold::RopeQueries, Attends),
    row("model.layers.{l}.self_attn.k_proj.weight", "attn_k.weight", Att, &[Keys, Hidden], Fold::RopeKeys, Attends),
    row("model.layers.{l}.self_attn.v_proj.weight", "attn_v.weight", Att, &[Values, Hidden], Fold::None, OwnValues),
    row("model.layers.{l}.self_attn.q_proj.bias", "attn_q.bias", Att, &[Queries], Fold::RopeQueries, QkvBias),
    row("model.layers.{l}.self_attn.k_proj.bias", "attn_k.bias", Att, &[Keys], Fold::RopeKeys, QkvBias),
    row("model.layers.{l}.self_attn.v_proj.bias", "attn_v.bias", Att, &[Values], Fold::None, QkvBias),
    row("model.layers.{l}.self_attn.o_proj.weight", "attn_output.weight", Att, &[Hidden, Mixed], Fold::None, Attends),
    row("model.layers.{l}.self_attn.o_proj.bias", "attn_output.bias", Att, &[Hidden], Fold::None, OutputBias),
];
#[rustfmt::skip]
pub(super) const QK_NORM: &[Row] = &[
    row("model.layers.{l}.self_attn.q_norm.weight", "attn_q_norm.weight", Att, &[KeyLength], Fold::Norm, Attends),
    row("model.layers.{l}.self_attn.k_norm.weight", "attn_k_norm.weight", Att, &[KeyLength], Fold::Norm, Attends),
];
#[rustfmt::skip]
pub(super) const FFN_NORM: &[Row] = &[
    row("model.layers.{l}.post_attention_layernorm.weight", "ffn_norm.weight", Att, &[Hidden], Fold::Norm, Always),
];
#[rustfmt::skip]
pub(super) const FOUR_NORMS: &[Row] = &[
    row("model.layers.{l}.post_attention_layernorm.weight", "post_attention_norm.weight", Att, &[Hidden], Fold::Norm, Always),
    row("model.layers.{l}.pre_feedforward_layernorm.weight", "ffn_norm.weight", Att, &[Hidden], Fold::Norm, Always),
    row("model.layers.{l}.post_feedforward_layernorm.weight", "post_ffw_norm.weight", Att, &[Hidden], Fold::Norm, Always),
];
#[rustfmt::skip]
pub(super) const DENSE: &[Row] = &[
    row("model.layers.{l}.mlp.gate_proj.weight", "ffn_gate.weight", Ff, &[Ffn, Hidden], Fold::None, Dense),
    row("model.layers.{l}.mlp.up_proj.weight", "ffn_up.weight", Ff, &[Ffn, Hidden], Fold::None, Dense),
    row("model.layers.{l}.mlp.down_proj.weight", "ffn_down.weight", Ff, &[Hidden, Ffn], Fold::None, Dense),
    row("model.layers.{l}.mlp.gate_proj.bias", "ffn_gate.bias", Ff, &[Ffn], Fold::None, FfnBias),
    row("model.layers.{l}.mlp.up_proj.bias", "ffn_up.bias", Ff, &[Ffn], Fold::None, FfnBias),
    row("model.layers.{l}.mlp.down_proj.bias", "ffn_down.bias", Ff, &[Hidden], Fold::None, FfnBias),
];
#[rustfmt::skip]
pub(super) const MIXTRAL_EXPERTS: &[Row] = &[
    row("model.layers.{l}.block_sparse_moe.gate.weight", "ffn_gate_inp.weight", Att, &[Experts, Hidden], Fold::None, Routed),
    row("model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", "ffn_gate_exps.weight", Ff, &[ExpertFfn, Hidden], Fold::None, Routed),
    row("model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", "ffn_up_exps.weight", Ff, &[ExpertFfn, Hidden], Fold::None, Routed),
    row("model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", "ffn_down_exps.weight", Ff, &[Hidden, ExpertFfn], Fold::None, Routed),
];
/// The same as MLX's converters stack them.
#[rustfmt::skip]
pub(super) const MIXTRAL_SWITCH: &[Row] = &[
    row("model.layers.{l}.block_sparse_moe.switch_mlp.gate_proj.weight", "ffn_gate_exps.weight", Ff, &[Experts, ExpertFfn, Hidden], Fold::None, Routed),
    row("model.layers.{l}.block_sparse_moe.switch_mlp.up_proj.weight", "ffn_up_exps.weight", Ff, &[Experts, ExpertFfn, Hidden], Fold::None, Routed),
    row("model.layers.{l}.block_sparse_moe.switch_mlp.down_proj.weight", "ffn_down_exps.weight", Ff, &[Experts, Hidden, ExpertFfn], Fold::None, Routed),
];
#[rustfmt::skip]
pub(super) const QWEN_EXPERTS: &[Row] = &[
    row("model.layers.{l}.mlp.gate.weight", "ffn_gate_inp.weight", Att, &[Experts, Hidden], Fold::None, Routed),
    row("model.layers.{l}.mlp.experts.{e}.gate_proj.weight", "ffn_gate_exps.weight", Ff, &[ExpertFfn, Hidden], Fold::None, Routed),
    row("model.layers.{l}.mlp.experts.{e}.up_proj.weight", "ffn_up_exps.weight", Ff, &[ExpertFfn, Hidden], Fold::None, Routed),
    row("model.layers.{l}.mlp.experts.{e}.down_proj.weight", "ffn_down_exps.weight", Ff, &[Hidden, ExpertFfn], Fold::None, Routed),
];
/// The same as MLX's converters stack them.
#[rustfmt::skip]
pub(super) const QWEN_SWITCH: &[Row] = &[
    row("model.layers.{l}.mlp.switch_mlp.gate_proj.weight", "ffn_gate_exps.weight", Ff, &[Experts, ExpertFfn, Hidden], Fold::None, Routed),
    row("model.layers.{l}.mlp.switch_mlp.up_proj.weight", "ffn_up_exps.weight", Ff, &[Experts, ExpertFfn, Hidden], Fold::None, Routed),
    row("model.layers.{l}.mlp.switch_mlp.down_proj.weight", "ffn_down_exps.weight", Ff, &[Experts, Hidden, ExpertFfn], Fold::None, Routed),
];
/// Experts that are stacked in the checkpoint already, gates above ups.
#[rustfmt::skip]
pub(super) const STACKED_EXPERTS: &[Row] = &[
    row("model.layers.{l}.mlp.experts.gate_up_proj", "ffn_gate_exps.weight", Ff, &[Experts, TwoExpertFfn, Hidden], Fold::FirstHalf, Routed),
    row("model.layers.{l}.mlp.experts.gate_up_proj", "ffn_up_exps.weight", Ff, &[Experts, TwoExpertFfn, Hidden], Fold::SecondHalf, Routed),
    row("model.layers.{l}.mlp.experts.down_proj", "ffn_down_exps.weight", Ff, &[Experts, Hidden, ExpertFfn], Fold::None, Routed),
];
#[rustfmt::skip]
pub(super) const QWEN_SHARED_EXPERT: &[Row] = &[
    row("model.layers.{l}.mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", Att, &[One, Hidden], Fold::None, SharedGate),
    row("model.layers.{l}.mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight", Ff, &[SharedFfn, Hidden], Fold::None, SharedExpert),
    row("model.layers.{l}.mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight", Ff, &[SharedFfn, Hidden], Fold::None, SharedExpert),
    row("model.layers.{l}.mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight", Ff, &[Hidden, SharedFfn], Fold::None, SharedExpert),
];
/// What all delta nets have.
#[rustfmt::skip]
pub(super) const DELTA_NET: &[Row] = &[
    row("model.layers.{l}.linear_attn.conv1d.weight", "ssm_conv1d.weight", Att, &[NetMixed, One, ConvKernel], Fold::NetMixed, Recurrent),
    row("model.layers.{l}.linear_attn.A_log", "ssm_a", Att, &[NetHeads], Fold::NetDecay, Recurrent),
    row("model.layers.{l}.linear_attn.dt_bias", "ssm_dt.bias", Att, &[NetHeads], Fold::NetHeads, Recurrent),
    row("model.layers.{l}.linear_attn.norm.weight", "ssm_norm.weight", Att, &[NetValueLength], Fold::None, Recurrent),
    row("model.layers.{l}.linear_attn.out_proj.weight", "ssm_out.weight", Att, &[Hidden, NetValues], Fold::NetColumns, Recurrent),
];
/// Qwen3.5's, with a matrix for each thing that enters.
#[rustfmt::skip]
pub(super) const DELTA_NET_APART: &[Row] = &[
    row("model.layers.{l}.linear_attn.in_proj_qkv.weight", "attn_qkv.weight", Att, &[NetMixed, Hidden], Fold::NetMixed, Recurrent),
    row("model.layers.{l}.linear_attn.in_proj_z.weight", "attn_gate.weight", Att, &[NetValues, Hidden], Fold::NetHeads, Recurrent),
    row("model.layers.{l}.linear_attn.in_proj_a.weight", "ssm_alpha.weight", Att, &[NetHeads, Hidden], Fold::NetHeads, Recurrent),
    row("model.layers.{l}.linear_attn.in_proj_b.weight", "ssm_beta.weight", Att, &[NetHeads, Hidden], Fold::NetHeads, Recurrent),
];
/// The first block that predicts a further token, beside what it has of a layer.
#[rustfmt::skip]
pub(super) const NEXTN: &[Row] = &[
    row("mtp.fc.weight", "nextn.eh_proj.weight", Place::NextN, &[Hidden, TwoHidden], Fold::None, When::NextN),
    row("mtp.pre_fc_norm_embedding.weight", "nextn.enorm.weight", Place::NextN, &[Hidden], Fold::Norm, When::NextN),
    row("mtp.pre_fc_norm_hidden.weight", "nextn.hnorm.weight", Place::NextN, &[Hidden], Fold::Norm, When::NextN),
    row("mtp.norm.weight", "nextn.shared_head_norm.weight", Place::NextN, &[Hidden], Fold::Norm, When::NextN),
];
/// The norm before the feed-forward layer under its other name.
#[rustfmt::skip]
pub(super) const POST_ATTENTION_NORM: &[Row] = &[
    row("model.layers.{l}.post_attention_layernorm.weight", "post_attention_norm.weight", Att, &[Hidden], Fold::Norm, Always),
];
/// Qwen3-Next's: one matrix for what enters, head of keys by head of keys, and one for betas and alphas.
#[rustfmt::skip]
pub(super) const DELTA_NET_FUSED: &[Row] = &[
    row("model.layers.{l}.linear_attn.in_proj_qkvz.weight", "attn_qkv.weight", Att, &[NetMixedAndGates, Hidden], Fold::NetInterleaved, Recurrent),
    row("model.layers.{l}.linear_attn.in_proj_qkvz.weight", "attn_gate.weight", Att, &[NetMixedAndGates, Hidden], Fold::NetInterleavedGates, Recurrent),
    row("model.layers.{l}.linear_attn.in_proj_ba.weight", "ssm_ba.weight", Att, &[TwoNetHeads, Hidden], Fold::None, Recurrent),
];
