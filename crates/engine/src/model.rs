//! A model's attention half: embeddings, norms, attention, routers and output head, found in a vindex.
//!
//! Invariant: a [`Model`] that was opened has every tensor that its configuration asks for, in the right shape. Names
//! are GGUF's; what differs between families is a number of the configuration. The feed-forward weights are not looked
//! at, so that the attention slice of a vindex opens too.

use std::sync::Arc;

use vindex::{Component, Config, Heads, RopeScaling, Vindex};

use crate::forward::own_embeddings::{LayerEmbeddings, OwnEmbedding};
use crate::mixer::Mixer;
use crate::rope::Rope;
use crate::router::{self, Router};
use crate::weights::{ModelError, Weight, vector};

/// Widest head that is computed: the pass keeps some heads on the stack.
pub(crate) const HEAD_MAX: usize = 1024;

/// A model that can be computed with.
#[derive(Debug)]
pub struct Model {
    vindex: Arc<Vindex>,
    /// `(vocab, hidden)`.
    pub(crate) embeddings: Weight,
    /// `(vocab, hidden)`; the embeddings where they are tied.
    pub(crate) head: Weight,
    /// `(hidden)`.
    pub(crate) output_norm: Vec<f32>,
    pub(crate) rope: Rope,
    pub(crate) layer_embeddings: Option<LayerEmbeddings>,
    pub(crate) layers: Vec<Layer>,
}

/// The attention half of a layer.
#[derive(Debug)]
pub(crate) struct Layer {
    /// `(hidden)`.
    pub(crate) attn_norm: Vec<f32>,
    pub(crate) mixer: Mixer,
    /// `(hidden, width of what the mixer gives)`.
    pub(crate) output: Weight,
    /// `(hidden)`.
    pub(crate) output_bias: Option<Vec<f32>>,
    /// `(hidden)` each: after attention and after feed-forward.
    pub(crate) post_norms: Option<[Vec<f32>; 2]>,
    /// `(hidden)`.
    pub(crate) ffn_norm: Vec<f32>,
    /// `None` where the layer is dense.
    pub(crate) router: Option<Router>,
    pub(crate) own_embedding: Option<OwnEmbedding>,
    /// What the residual stream is multiplied by at the end of the layer.
    pub(crate) scale: Option<f32>,
}

impl Model {
    /// Finds the tensors of the attention half.
    ///
    /// # Errors
    /// [`ModelError`] when a tensor is missing or has another shape, or a number makes no sense.
    pub fn open(vindex: Arc<Vindex>) -> Result<Model, ModelError> {
        let config = &vindex.index().config;
        check(config)?;
        let v = &*vindex;
        let (hidden, vocab) = (config.hidden, config.vocab);
        let embeddings = Weight::find(v, "token_embd.weight".to_owned(), vocab, hidden)?;
        let head = if config.tied_embeddings {
            embeddings.clone()
        } else {
            Weight::find(v, "output.weight".to_owned(), vocab, hidden)?
        };
        let factors = match config.rope.scaling {
            Some(RopeScaling::FrequencyFactors) => {
                Some(vector(v, "rope_freqs.weight", config.rope.n_dims / 2)?)
            }
            _ => None,
        };
        let layers = (0..config.n_layers).map(|l| Layer::open(v, config, l));
        Ok(Model {
            embeddings,
            head,
            output_norm: vector(v, "output_norm.weight", hidden)?,
            rope: Rope::new(&config.rope, factors.as_deref()),
            layer_embeddings: LayerEmbeddings::open(v, config)?,
            layers: layers.collect::<Result<_, _>>()?,
            vindex,
        })
    }

    /// The model's numbers.
    pub fn config(&self) -> &Config {
        &self.vindex.index().config
    }

    /// Where the weights are.
    pub fn vindex(&self) -> &Arc<Vindex> {
        &self.vindex
    }

    /// Bytes of weights that the attention half of a step reads once: all layers and the output head.
    pub fn attention_bytes(&self) -> u64 {
        let layers = self.layers.iter().map(|layer| {
            let router = layer.router.iter().flat_map(Router::weights);
            let own = layer.own_embedding.iter();
            let own = own.flat_map(|own| [&own.gate, &own.projection]);
            let others = [&layer.output].into_iter().chain(router).chain(own);
            layer.mixer.bytes() + others.map(Weight::bytes).sum::<usize>()
        });
        let own = self.layer_embeddings.iter().map(|own| &own.projection);
        let others = [&self.head].into_iter().chain(own).map(Weight::bytes);
        (layers.sum::<usize>() + others.sum::<usize>()) as u64
    }

    /// Bytes of feed-forward weights that one token reads: those of all layers, and of stacked experts those of the ones
    /// that it visits.
    pub fn feed_forward_bytes(&self) -> u64 {
        let n_layers = self.config().n_layers as usize;
        let index = self.vindex.index();
        let parts = index.tensors.iter().map(|t| &index.parts[t.part as usize]);
        index
            .tensors
            .iter()
            .zip(parts)
            .filter(|(_, part)| match part.component {
                Component::FeedForward { layer } => (layer as usize) < n_layers,
                _ => false,
            })
            .map(
                |(tensor, _)| match (&tensor.experts, self.config().experts) {
                    (Some(hashes), Some(experts)) => {
                        tensor.size_bytes / hashes.len().max(1) as u64 * u64::from(experts.n_used)
                    }
                    _ => tensor.size_bytes,
                },
            )
            .sum()
    }
}

impl Layer {
    fn open(v: &Vindex, config: &Config, l: u32) -> Result<Layer, ModelError> {
        let a = &config.attention;
        let hidden = config.hidden;
        let name = |part: &str| format!("blk.{l}.{part}");
        let vector = |part: &str, n| vector(v, &name(part), n);
        let weight = |part: &str, n_rows, n_cols| Weight::find(v, name(part), n_rows, n_cols);
        let mixer = Mixer::open(v, config, l)?;
        let (output, width) = mixer.output();
        // GGUF has two names for the norm before feed-forward; where there are norms after attention too, the second is
        // theirs.
        let ffn_norm = ["ffn_norm.weight", "post_attention_norm.weight"];
        let is_second = !config.post_norms && v.tensor(&name(ffn_norm[0])).is_none();
        Ok(Layer {
            attn_norm: vector("attn_norm.weight", hidden)?,
            output: weight(&format!("{output}.weight"), hidden, width)?,
            output_bias: match a.output_bias && !config.is_recurrent(l) {
                true => Some(vector(&format!("{output}.bias"), hidden)?),
                false => None,
            },
            mixer,
            post_norms: match config.post_norms {
                true => Some([
                    vector("post_attention_norm.weight", hidden)?,
                    vector("post_ffw_norm.weight", hidden)?,
                ]),
                false => None,
            },
            ffn_norm: vector(ffn_norm[usize::from(is_second)], hidden)?,
            router: Router::open(v, config, l)?,
            own_embedding: OwnEmbedding::open(v, config, l)?,
            scale: match config.layer_scale {
                true => vector("layer_output_scale.weight", 1)?.first().copied(),
                false => None,
            },
        })
    }
}

/// What the pass divides by, indexes with or keeps on the stack. An index may come from anywhere.
fn check(config: &Config) -> Result<(), ModelError> {
    let a = &config.attention;
    let wrong = |what: String| Err(ModelError::Config { what });
    if [config.hidden, config.vocab, a.n_heads, config.n_layers].contains(&0) {
        return wrong("sizes are not all above 0".to_owned());
    }
    for l in 0..config.n_layers {
        let Heads {
            n_kv_heads,
            key_length,
            value_length,
        } = config.heads(l);
        if [n_kv_heads, key_length, value_length].contains(&0) {
            return wrong("sizes are not all above 0".to_owned());
        }
        if !a.n_heads.is_multiple_of(n_kv_heads) {
            return wrong(format!(
                "{} heads are no multiple of {n_kv_heads} key heads",
                a.n_heads
            ));
        }
        if key_length.max(value_length) as usize > HEAD_MAX {
            return wrong(format!("heads are wider than {HEAD_MAX}"));
        }
        let longest = 2 * u64::from(a.n_heads) * u64::from(key_length.max(value_length));
        if longest > u64::from(u32::MAX) {
            return wrong(format!("{} heads of {key_length} are too many", a.n_heads));
        }
        let n_dims = match config.slides(l) {
            true => config.rope.n_dims_sliding.unwrap_or(config.rope.n_dims),
            false => config.rope.n_dims,
        };
        if n_dims > key_length || !n_dims.is_multiple_of(2) {
            return wrong(format!("rope turns {n_dims} of {key_length} elements"));
        }
    }
    if a.sliding_window.as_ref().is_some_and(|w| w.n_tokens == 0) {
        return wrong("sliding window is empty".to_owned());
    }
    if let Some(net) = &config.delta_net {
        let counts = [net.n_key_heads, net.n_value_heads, net.conv_kernel];
        let widths = [net.key_length, net.value_length];
        let many = 1 << 16;
        if counts.iter().chain(&widths).any(|&n| n == 0 || n > many)
            || !net.n_value_heads.is_multiple_of(net.n_key_heads)
            || widths.iter().any(|&n| n as usize > HEAD_MAX)
        {
            return wrong(format!(
                "delta net has {} key heads and {} value heads of {widths:?} behind {} rows",
                net.n_key_heads, net.n_value_heads, net.conv_kernel
            ));
        }
    }
    if let Some(what) = config.experts.as_ref().and_then(router::wrong) {
        return wrong(what);
    }
    Ok(())
}
