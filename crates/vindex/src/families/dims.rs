//! What the lines of a name map say of a tensor beside its names: its shape, when it is there, and what happens to its values,
//! all of it in a model's own numbers.
//!
//! Invariant: everything here is a function of the [`Config`] and the layer, so that a map has no case for a model.

use super::Family;
use crate::config::{Config, DeltaNet, Experts, Latent, RopeKind};
use crate::plan::{Change, Order, Transform};

/// A dimension that `config.json` tells.
#[derive(Clone, Copy)]
pub(crate) enum Dim {
    Vocab,
    Hidden,
    /// Width of the layer's dense feed-forward.
    Ffn,
    /// Query heads times key length; twice that where each query has its gate.
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
    TwoExpertFfn,
    SharedFfn,
    One,
    /// Two rows of the residual stream side by side.
    TwoHidden,
    /// Heads of values of a delta net.
    NetHeads,
    /// Two for each of them.
    TwoNetHeads,
    /// Width of such a head.
    NetValueLength,
    /// All of them.
    NetValues,
    /// Queries, keys and values of a delta net.
    NetMixed,
    /// The same and the gates of values.
    NetMixedAndGates,
    ConvKernel,
    /// Width of what a layer looks up for a token.
    LayerInput,
    /// That of all layers.
    LayerInputs,
    QueryHeads,
    /// Blocks of 32 that make a row of the residual stream, or of an expert's width; and the bytes of their 4-bit values.
    HiddenBlocks,
    ExpertBlocks,
    Nibbles,
    /// Width of compressed queries.
    QueryRank,
    /// Width of compressed keys and values.
    KvRank,
    /// The same and what is rotated.
    KvRankAndRope,
    /// All heads of queries before anything is absorbed.
    LatentQueries,
    /// All heads of keys and values.
    LatentKv,
    /// All heads of what attention gives.
    LatentMixed,
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
    /// The first half of each expert's rows.
    FirstHalf,
    /// The second half.
    SecondHalf,
    /// Heads of values, one row each.
    NetHeads,
    /// The decay of each head of values, stored as a logarithm.
    NetDecay,
    /// Queries and keys, then heads of values.
    NetMixed,
    /// Heads of values, within each row.
    NetColumns,
    /// For each head of keys its query, its key, its values and their gates: all but the gates, by kind.
    NetInterleaved,
    /// The gates alone.
    NetInterleavedGates,
    /// Blocks of MXFP4 with their scales beside them.
    Packed,
    /// Of each two rows of such blocks the first.
    PackedFirst,
    PackedSecond,
    /// Of each two elements the first.
    First,
    Second,
    /// The matrix of each expert lies on its side.
    Transposed,
    /// And of each two columns the first is taken.
    TransposedFirst,
    TransposedSecond,
    /// Of each head of keys and values the keys, on their side, so that they can be multiplied with a query.
    LatentKeys,
    /// The values.
    LatentValues,
}

/// When a tensor has to be there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Always,
    Untied,
    /// In layers of attention.
    Attends,
    /// In layers of attention with a matrix for values.
    OwnValues,
    /// The same in families whose last layers use keys and values of others: there it may be there, unused.
    OwnOrSpareKeys,
    OwnOrSpareValues,
    QkvBias,
    OutputBias,
    FfnBias,
    /// In layers with a state instead.
    Recurrent,
    /// In layers with a dense feed-forward, alone or beside experts.
    Dense,
    Routed,
    SharedExpert,
    SharedGate,
    LayerScale,
    LayerInputs,
    DenseBranch,
    ChoiceBias,
    RouterBias,
    ExpertBias,
    Sinks,
    /// With compressed queries.
    QueryRank,
    /// With plain ones.
    NoQueryRank,
    /// In models with blocks that predict further tokens.
    NextN,
}

/// Whether a tensor has to be there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    No,
    IfThere,
    Yes,
}

impl When {
    /// For layer `l` of a model, blocks after its layers included.
    pub(crate) fn need(self, config: &Config, l: u32) -> Need {
        let attends = !config.is_recurrent(l);
        let routed = config.experts.filter(|_| config.is_routed(l));
        let keys_are_values = config.attention.keys_are_values && !config.slides(l);
        let latent = config.attention.latent;
        let n_own = config.n_layers - config.attention.n_shared_kv_layers.min(config.n_layers);
        let needed = match self {
            When::Always => true,
            When::Untied => !config.tied_embeddings,
            When::Attends => attends,
            When::OwnValues => attends && !keys_are_values,
            When::OwnOrSpareKeys if l >= n_own => return Need::IfThere,
            When::OwnOrSpareKeys => true,
            When::OwnOrSpareValues if l >= n_own && !keys_are_values => return Need::IfThere,
            When::OwnOrSpareValues => !keys_are_values,
            When::QkvBias => attends && config.attention.qkv_bias,
            When::OutputBias => attends && config.attention.output_bias,
            When::FfnBias => config.ffn_bias,
            When::Recurrent => !attends,
            When::Dense => routed.is_none_or(|e| e.dense_branch),
            When::Routed => routed.is_some(),
            When::SharedExpert => routed.is_some_and(|e| e.shared.is_some()),
            When::SharedGate => routed.and_then(|e| e.shared).is_some_and(|s| s.gated),
            When::LayerScale => config.layer_scale,
            When::LayerInputs => config.layer_embeddings.is_some(),
            When::DenseBranch => routed.is_some_and(|e| e.dense_branch),
            When::ChoiceBias => routed.is_some_and(|e| e.choice_bias),
            When::RouterBias => routed.is_some_and(|e| e.router_bias),
            When::ExpertBias => routed.is_some_and(|e| e.bias),
            When::Sinks => attends && config.attention.sinks,
            When::QueryRank => latent.is_some_and(|l| l.q_rank.is_some()),
            When::NoQueryRank => latent.is_some_and(|l| l.q_rank.is_none()),
            When::NextN => config.n_nextn > 0,
        };
        if needed { Need::Yes } else { Need::No }
    }
}

impl Dim {
    /// In layer `l`.
    pub(crate) fn of(self, config: &Config, l: u32) -> u64 {
        let a = &config.attention;
        let heads = config.heads(l);
        let net = config.delta_net.as_ref();
        let experts = |f: fn(&Experts) -> u32| config.experts.as_ref().map_or(0, f);
        let times = |n: u32, width: u32| u64::from(n) * u64::from(width);
        let latent = |f: fn(&Latent) -> u32| a.latent.as_ref().map_or(0, f);
        let one_or_two = 1 + u64::from(a.output_gate);
        let layer_input = config.layer_embeddings.map_or(0, |e| e.width);
        match self {
            Dim::Vocab => config.vocab.into(),
            Dim::Hidden => config.hidden.into(),
            Dim::TwoHidden => times(2, config.hidden),
            Dim::One => 1,
            Dim::Ffn => config.ffn_of(l).into(),
            Dim::Queries => times(a.n_heads, heads.key_length) * one_or_two,
            Dim::Keys => times(heads.n_kv_heads, heads.key_length),
            Dim::Values => times(heads.n_kv_heads, heads.value_length),
            Dim::Mixed => times(a.n_heads, heads.value_length),
            Dim::KeyLength => heads.key_length.into(),
            Dim::Experts => experts(|e| e.n).into(),
            Dim::ExpertFfn => experts(|e| e.ffn).into(),
            Dim::TwoExpertFfn => times(2, experts(|e| e.ffn)),
            Dim::SharedFfn => experts(|e| e.shared.map_or(0, |s| s.ffn)).into(),
            Dim::NetHeads => net.map_or(0, |n| n.n_value_heads.into()),
            Dim::TwoNetHeads => net.map_or(0, |n| times(2, n.n_value_heads)),
            Dim::NetValueLength => net.map_or(0, |n| n.value_length.into()),
            Dim::NetValues => net.map_or(0, |n| times(n.n_value_heads, n.value_length)),
            Dim::NetMixed => net.map_or(0, n_mixed),
            Dim::NetMixedAndGates => {
                net.map_or(0, |n| n_mixed(n) + times(n.n_value_heads, n.value_length))
            }
            Dim::ConvKernel => net.map_or(0, |n| n.conv_kernel.into()),
            Dim::LayerInput => layer_input.into(),
            Dim::LayerInputs => times(config.n_layers, layer_input),
            Dim::QueryHeads => a.n_heads.into(),
            Dim::HiddenBlocks => (config.hidden / 32).into(),
            Dim::ExpertBlocks => (experts(|e| e.ffn) / 32).into(),
            Dim::Nibbles => 16,
            Dim::QueryRank => latent(|l| l.q_rank.unwrap_or(0)).into(),
            Dim::KvRank => a.value_length.into(),
            Dim::KvRankAndRope => a.key_length.into(),
            Dim::LatentQueries => {
                u64::from(a.n_heads)
                    * (u64::from(latent(|l| l.n_plain)) + u64::from(config.rope.n_dims))
            }
            Dim::LatentKv => {
                let (plain, value) = (latent(|l| l.n_plain), latent(|l| l.value_length));
                u64::from(a.n_heads) * (u64::from(plain) + u64::from(value))
            }
            Dim::LatentMixed => times(a.n_heads, latent(|l| l.value_length)),
        }
    }
}

/// Queries and keys of a delta net.
fn n_queries_and_keys(net: &DeltaNet) -> u64 {
    2 * u64::from(net.n_key_heads) * u64::from(net.key_length)
}

fn n_mixed(net: &DeltaNet) -> u64 {
    n_queries_and_keys(net) + u64::from(net.n_value_heads) * u64::from(net.value_length)
}

impl Fold {
    /// Shape in the vindex, slowest dimension first, of a tensor that has the shape `source` in the checkpoint.
    pub(crate) fn shape(self, source: &[u64], config: &Config) -> Vec<u64> {
        let mut shape = source.to_vec();
        let last_but_one = shape.len().saturating_sub(2);
        match self {
            Fold::FirstHalf | Fold::SecondHalf => shape[last_but_one] /= 2,
            Fold::First | Fold::Second => shape[last_but_one + 1] /= 2,
            Fold::Transposed => shape.swap(last_but_one, last_but_one + 1),
            Fold::TransposedFirst | Fold::TransposedSecond => {
                shape[last_but_one + 1] /= 2;
                shape.swap(last_but_one, last_but_one + 1);
            }
            Fold::Packed | Fold::PackedFirst | Fold::PackedSecond => {
                shape.pop();
                shape[last_but_one] *= 32;
                if self != Fold::Packed {
                    shape[last_but_one - 1] /= 2;
                }
            }
            Fold::LatentKeys => shape = latent_shape(config, |l| [shape[1], l.n_plain.into()]),
            Fold::LatentValues => {
                shape = latent_shape(config, |l| [l.value_length.into(), shape[1]]);
            }
            // A convolution over channels of their own has a dimension of one in the middle.
            Fold::NetMixed if shape.len() == 3 => {
                shape.remove(1);
            }
            Fold::NetInterleaved => shape[0] = Dim::NetMixed.of(config, 0),
            Fold::NetInterleavedGates => shape[0] = Dim::NetValues.of(config, 0),
            _ => {}
        }
        shape
    }

    /// What happens to the values.
    pub(crate) fn transform(self, family: &Family, config: &Config) -> Transform {
        let interleaved = |n_heads: u32| match family.rope {
            RopeKind::Interleaved => Transform::order(Order::InterleaveRope { n_heads }),
            RopeKind::Neox => Transform::NONE,
        };
        let experts = config.experts.map_or((0, 0), |e| (e.n, u64::from(e.ffn)));
        let half = |start: u64| {
            Transform::order(Order::Rows {
                n_blocks: experts.0,
                ranges: vec![[start, start + experts.1]],
            })
        };
        // Nothing is to be put apart where each key head has one head of values.
        let net = config.delta_net.as_ref();
        let tiled = net.filter(|n| n.tiled && n.n_value_heads != n.n_key_heads);
        let groups = |n: &DeltaNet| (n.n_key_heads, n.n_value_heads / n.n_key_heads.max(1));
        let heads = |n_before: u64| {
            tiled.map_or(Order::AsIs, |net| {
                let (n_groups, n_each) = groups(net);
                Order::TileHeads {
                    n_before,
                    n_groups,
                    n_each,
                }
            })
        };
        let interleaved_net = |ranges: fn(u64, u64) -> Vec<[u64; 2]>| {
            net.map_or(Transform::NONE, |net| {
                let values = u64::from(groups(net).1) * u64::from(net.value_length);
                Transform::order(Order::Rows {
                    n_blocks: net.n_key_heads,
                    ranges: ranges(net.key_length.into(), values),
                })
            })
        };
        let alternate = |first: u32, row_len: u32| {
            let row_len = row_len.into();
            Transform::order(Order::Alternate { first, row_len })
        };
        let transposed_alternate = |first: u32| {
            let n_blocks = experts.0;
            Transform::order(Order::TransposedAlternate { n_blocks, first })
        };
        let latent = |order: fn(&Latent, u32) -> Order| {
            let latent = config.attention.latent.as_ref();
            latent.map_or(Transform::NONE, |l| {
                Transform::order(order(l, config.attention.n_heads))
            })
        };
        match self {
            Fold::Norm if family.norms_around_zero => Transform::change(Change::AddOne),
            Fold::None | Fold::Norm => Transform::NONE,
            Fold::RopeQueries => interleaved(config.attention.n_heads),
            Fold::RopeKeys => interleaved(config.attention.n_kv_heads),
            Fold::FirstHalf => half(0),
            Fold::SecondHalf => half(experts.1),
            Fold::NetHeads => Transform::order(heads(0)),
            Fold::NetDecay => Transform {
                order: heads(0),
                change: Change::NegativeExp,
            },
            Fold::NetMixed => Transform::order(heads(net.map_or(0, n_queries_and_keys))),
            Fold::NetColumns => Transform::order(tiled.map_or(Order::AsIs, |net| {
                let (n_groups, n_each) = groups(net);
                Order::TileColumns { n_groups, n_each }
            })),
            Fold::NetInterleaved => {
                interleaved_net(|k, v| vec![[0, k], [k, 2 * k], [2 * k, 2 * k + v]])
            }
            Fold::NetInterleavedGates => interleaved_net(|k, v| vec![[2 * k + v, 2 * (k + v)]]),
            Fold::Packed => Transform::NONE,
            Fold::PackedFirst => alternate(0, config.hidden),
            Fold::PackedSecond => alternate(1, config.hidden),
            Fold::First => alternate(0, 1),
            Fold::Second => alternate(1, 1),
            Fold::Transposed => Transform::order(Order::Transposed {
                n_blocks: experts.0,
                n_rows: experts.1,
            }),
            Fold::TransposedFirst => transposed_alternate(0),
            Fold::TransposedSecond => transposed_alternate(1),
            Fold::LatentKeys => latent(|l, n_blocks| Order::Transposed {
                n_blocks,
                n_rows: l.n_plain.into(),
            }),
            Fold::LatentValues => latent(|l, n_blocks| {
                let start = u64::from(l.n_plain);
                Order::Rows {
                    n_blocks,
                    ranges: vec![[start, start + u64::from(l.value_length)]],
                }
            }),
        }
    }

    /// Whether the tensor is blocks of MXFP4 that are kept, with their scales in another tensor.
    pub(crate) fn is_packed(self) -> bool {
        matches!(self, Fold::Packed | Fold::PackedFirst | Fold::PackedSecond)
    }
}

/// One matrix a head of latent attention.
fn latent_shape(config: &Config, matrix: impl Fn(&Latent) -> [u64; 2]) -> Vec<u64> {
    let [rows, columns] = config.attention.latent.as_ref().map_or([0, 0], matrix);
    vec![config.attention.n_heads.into(), rows, columns]
}
