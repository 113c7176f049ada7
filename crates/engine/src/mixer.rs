//! How the tokens of a sequence learn of each other in a layer: each kind of mixer has a file of its own.
//!
//! All take rows of the normed residual stream, and give what the layer's output projection takes. The rows of a sequence
//! follow each other in a batch; what a mixer remembers of those before lies in the [`Sequence`].
//!
//! Invariant: a row's result depends on that row and the rows of its own sequence before it. Left out: norms, the output
//! projection and the residual stream, which are the pass's.

pub(crate) mod attention;
mod delta_net;
mod latent;

use quant::Activations;
use vindex::{Config, Vindex};

use crate::collector::Watch;
use crate::kv::Sequence;
use crate::model::Model;
use crate::threads::Pool;
use crate::weights::{ModelError, Weight};
use attention::Attention;
use delta_net::DeltaNet;
use latent::Latent;

/// The mixer of a layer.
#[derive(Debug)]
pub(crate) enum Mixer {
    /// Softmax over what a row may see.
    Attention(Attention),
    /// A state that each row changes and asks.
    DeltaNet(DeltaNet),
    /// Softmax over compressed keys.
    Latent(Latent),
}

/// The rows of one sequence in a batch.
pub(crate) struct Span<'a> {
    pub(crate) sequence: &'a mut Sequence,
    /// Rows of this sequence; they follow those of the span before.
    pub(crate) n_rows: usize,
}

/// What a mixer needs beside rows.
pub(crate) struct Room<'a> {
    pub(crate) model: &'a Model,
    pub(crate) pool: &'a Pool,
    pub(crate) watch: &'a Watch,
    /// `(n, n_pairs)`: cosine and sine, of all layers and of those that slide.
    pub(crate) angles: &'a [Vec<[f32; 2]>; 2],
}

/// What mixers keep between steps.
#[derive(Default)]
pub(crate) struct Buffers {
    attention: attention::Buffers,
    delta_net: delta_net::Buffers,
    latent: latent::Buffers,
}

impl Mixer {
    /// Finds the tensors of layer `l`.
    pub(crate) fn open(v: &Vindex, config: &Config, l: u32) -> Result<Mixer, ModelError> {
        match config.attention.latent {
            _ if config.is_recurrent(l) => DeltaNet::open(v, config, l).map(Mixer::DeltaNet),
            Some(latent) => Latent::open(v, config, latent, l).map(Mixer::Latent),
            None => Attention::open(v, config, l).map(Mixer::Attention),
        }
    }

    /// Name and columns of the output projection.
    pub(crate) fn output(&self) -> (&'static str, u32) {
        match self {
            Mixer::Attention(attention) => ("attn_output", attention.width()),
            Mixer::DeltaNet(net) => ("ssm_out", net.width()),
            Mixer::Latent(latent) => ("attn_output", latent.width()),
        }
    }

    /// Bytes of the matrices.
    pub(crate) fn bytes(&self) -> usize {
        let sum = |weights: Vec<&Weight>| weights.into_iter().map(Weight::bytes).sum();
        match self {
            Mixer::Attention(attention) => sum(attention.weights()),
            Mixer::DeltaNet(net) => sum(net.weights()),
            Mixer::Latent(latent) => latent.bytes(),
        }
    }

    /// Fills `mixed`, `(n, columns of the output projection)`, from `normed`, `(n, hidden)`, and remembers the rows.
    pub(crate) fn mix(
        &self,
        room: &Room<'_>,
        normed: &[f32],
        spans: &mut [Span<'_>],
        (buffers, activations): (&mut Buffers, &mut Activations),
        mixed: &mut [f32],
    ) {
        match self {
            Mixer::Attention(attention) => {
                let buffers = (&mut buffers.attention, activations);
                attention.mix(room, normed, spans, buffers, mixed);
            }
            Mixer::DeltaNet(net) => {
                let buffers = (&mut buffers.delta_net, activations);
                net.mix(room, normed, spans, buffers, mixed);
            }
            Mixer::Latent(latent) => {
                let buffers = (&mut buffers.latent, activations);
                latent.mix(room, normed, spans, buffers, mixed);
            }
        }
    }
}
