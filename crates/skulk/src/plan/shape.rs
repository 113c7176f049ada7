//! What a model weighs, layer by layer, read from the index of its vindex alone.
//!
//! Invariant: sizes are those of the tensors as they are stored, so that the same model in another recipe is another shape.

use engine::{KvCache, KvType, PAGE};
use vindex::{Component, Config, Index};

/// What a step has to read and send.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// The model's own name and recipe, for people.
    pub name: String,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Bytes of the output head, and of what projects the embeddings of layers, read once a step.
    pub head_bytes: u64,
    /// Bytes of embeddings, head and final norm together, as they are held.
    pub embeddings_bytes: u64,
    /// Bytes that a token looks up: its rows of the embedding matrix and of the embeddings of layers.
    pub embedding_row_bytes: u64,
    /// Experts of a routed layer that a router chooses from, and how many it chooses; `(1, 1)` in a dense model.
    pub experts: (u64, u64),
    /// Longest sequence, in tokens.
    pub context: u64,
    /// One a layer.
    pub layers: Vec<LayerShape>,
    /// What a sequence takes in the cache, in half and in single precision.
    pub cache: [CacheShape; 2],
}

/// What a sequence takes in the cache: pages by its length, and states however long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Bytes of [`engine::PAGE`] tokens.
    pub page_bytes: u64,
    /// Bytes in any case.
    pub fixed_bytes: u64,
}

/// A layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Bytes of attention, norms and router.
    pub attention_bytes: u64,
    /// Bytes of all feed-forward weights, all experts together.
    pub ffn_bytes: u64,
    /// Those of them that every token reads, whatever is chosen for it: of a dense layer all. They lie with expert 0.
    pub every_bytes: u64,
    /// Rows of a token that enter.
    pub n_rows: u64,
    /// Results of a token that come from `every_bytes`.
    pub n_every: u64,
    /// Results of a token that come from chosen experts.
    pub n_chosen: u64,
    /// Values of keys and values that are read for each token that the layer sees.
    pub kv_values: u64,
    /// Bytes of the state that a token changes, where the layer has one.
    pub state_bytes: u64,
    /// Tokens that are seen at most, where the layer has a window.
    pub window: Option<u64>,
}

impl Shape {
    /// The shape of the model that `index` describes.
    pub fn of(index: &Index) -> Shape {
        let config = &index.config;
        let n_layers = config.n_layers as usize;
        let mut layers: Vec<LayerShape> = (0..n_layers).map(|l| layer(config, l)).collect();
        let (mut embeddings_bytes, mut head_bytes, mut embedding_bytes) = (0, 0, 0);
        let (mut own_embedding_bytes, mut projection_bytes) = (0, 0);
        for tensor in &index.tensors {
            let Some(part) = index.parts.get(tensor.part as usize) else {
                continue;
            };
            match part.component {
                // Blocks that predict further tokens are no part of a step.
                Component::Metadata | Component::NextN { .. } => {}
                Component::Embeddings => {
                    embeddings_bytes += tensor.size_bytes;
                    match tensor.name.as_str() {
                        "token_embd.weight" => embedding_bytes = tensor.size_bytes,
                        "per_layer_token_embd.weight" => own_embedding_bytes = tensor.size_bytes,
                        "per_layer_model_proj.weight" => projection_bytes = tensor.size_bytes,
                        "output.weight" => head_bytes = tensor.size_bytes,
                        _ => {}
                    }
                }
                Component::Attention { layer } => {
                    if let Some(layer) = layers.get_mut(layer as usize) {
                        layer.attention_bytes += tensor.size_bytes;
                    }
                }
                Component::FeedForward { layer } => {
                    if let Some(layer) = layers.get_mut(layer as usize) {
                        layer.ffn_bytes += tensor.size_bytes;
                        if tensor.experts.is_none() {
                            layer.every_bytes += tensor.size_bytes;
                        }
                    }
                }
            }
        }
        if head_bytes == 0 {
            head_bytes = embedding_bytes;
        }
        let experts = config.experts;
        Shape {
            name: format!("{} ({})", index.name, index.recipe),
            hidden: u64::from(config.hidden),
            head_bytes: head_bytes + projection_bytes,
            embeddings_bytes,
            embedding_row_bytes: (embedding_bytes + own_embedding_bytes)
                / u64::from(config.vocab.max(1)),
            experts: experts.map_or((1, 1), |e| (u64::from(e.n.max(1)), u64::from(e.n_used))),
            context: u64::from(config.context),
            layers,
            cache: [KvType::F16, KvType::F32].map(|kv| CacheShape {
                page_bytes: KvCache::page_bytes_for(config, kv) as u64,
                fixed_bytes: KvCache::bytes_for(config, kv, 0),
            }),
        }
    }

    /// Bytes that the attention node holds, without its cache.
    pub fn attention_bytes(&self) -> u64 {
        let layers = self.layers.iter().map(|layer| layer.attention_bytes);
        self.embeddings_bytes + layers.sum::<u64>()
    }

    /// Bytes of all feed-forward weights.
    pub fn ffn_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.ffn_bytes).sum()
    }

    /// Bytes of feed-forward weights that lie with expert 0 beside it.
    pub fn every_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.every_bytes).sum()
    }

    /// Bytes of the cache that one sequence of `n_tokens` takes: [`KvCache::bytes_for`].
    pub fn kv_bytes(&self, n_tokens: u64, kv: KvType) -> u64 {
        let CacheShape {
            page_bytes,
            fixed_bytes,
        } = match kv {
            KvType::F16 => self.cache[0],
            KvType::F32 => self.cache[1],
        };
        n_tokens.div_ceil(PAGE as u64) * page_bytes + fixed_bytes
    }
}

impl LayerShape {
    /// How many of `n_tokens` the layer sees.
    pub fn seen(&self, n_tokens: u64) -> u64 {
        self.window.map_or(n_tokens, |window| window.min(n_tokens))
    }
}

fn layer(config: &Config, layer: usize) -> LayerShape {
    let l = layer as u32;
    let window = config.attention.sliding_window.as_ref();
    let window = window.filter(|_| config.slides(l));
    let heads = config.heads(l);
    let width = match config.attention.latent {
        // A value is part of its key.
        Some(_) => heads.key_length,
        None => heads.key_length + heads.value_length,
    };
    let kv_values = match config.kv_layer(l) {
        Some(_) => u64::from(heads.n_kv_heads) * u64::from(width),
        None => 0,
    };
    let net = config.delta_net.as_ref().filter(|_| config.is_recurrent(l));
    let experts = config.experts.filter(|_| config.is_routed(layer as u32));
    let has_branch = experts.is_some_and(|e| e.dense_branch);
    let has_shared = experts.is_some_and(|e| e.shared.is_some());
    LayerShape {
        attention_bytes: 0,
        ffn_bytes: 0,
        every_bytes: 0,
        n_rows: 1 + u64::from(has_branch),
        n_every: u64::from(experts.is_none() || has_branch || has_shared),
        n_chosen: experts.map_or(0, |e| u64::from(e.n_used)),
        kv_values,
        state_bytes: net.map_or(0, |net| {
            let heads = u64::from(net.n_value_heads);
            4 * heads * u64::from(net.key_length) * u64::from(net.value_length)
        }),
        window: window.map(|window| u64::from(window.n_tokens)),
    }
}
