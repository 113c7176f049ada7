//! What a layer adds that it looked up for the token itself (`LayerEmbeddings` of the configuration), and the scale that
//! ends a layer.
//!
//! ```text
//! inputs   (n, n_layers, width)        for each layer: (norm(per_layer_model_proj · x / sqrt(hidden))
//!                                      + sqrt(width) * per_layer_token_embd[token]) / sqrt(2), x being its embedding
//! narrow   (n, width)                  gelu(inp_gate · x) * the layer's inputs
//! delta    (n, hidden)                 norm(proj · narrow);  x += delta;  x *= the layer's scale
//! ```
//!
//! Invariant: a row's inputs depend on its token alone.

use quant::{Activations, GateActivation};
use vindex::{Config, Vindex};

use super::{Buffers, Work, look_up};
use crate::model::{Layer, Model};
use crate::rows::{add, fill, multiply, rms_norm_in_place, rows_per_task, sized};
use crate::threads::Pool;
use crate::weights::{ModelError, Weight, vector};

/// Where a model's layers look up what they add.
#[derive(Debug)]
pub(crate) struct LayerEmbeddings {
    /// `(vocab, n_layers * width)`.
    embeddings: Weight,
    /// `(n_layers * width, hidden)`.
    pub(crate) projection: Weight,
    /// `(width)`.
    norm: Vec<f32>,
}

/// What a layer makes of it.
#[derive(Debug)]
pub(crate) struct OwnEmbedding {
    /// `(width, hidden)`.
    pub(crate) gate: Weight,
    /// `(hidden, width)`.
    pub(crate) projection: Weight,
    /// `(hidden)`.
    norm: Vec<f32>,
}

impl LayerEmbeddings {
    /// Finds the tensors of the model; `None` where it has no such embeddings.
    pub(crate) fn open(v: &Vindex, config: &Config) -> Result<Option<LayerEmbeddings>, ModelError> {
        let Some(own) = config.layer_embeddings else {
            return Ok(None);
        };
        let n = config.n_layers.saturating_mul(own.width);
        let weight = |name: &str, n_rows, n_cols| Weight::find(v, name.to_owned(), n_rows, n_cols);
        Ok(Some(LayerEmbeddings {
            embeddings: weight("per_layer_token_embd.weight", config.vocab, n)?,
            projection: weight("per_layer_model_proj.weight", n, config.hidden)?,
            norm: vector(v, "per_layer_proj_norm.weight", own.width)?,
        }))
    }
}

impl OwnEmbedding {
    /// Finds the tensors of layer `l`; `None` where the model has no such embeddings.
    pub(crate) fn open(
        v: &Vindex,
        config: &Config,
        l: u32,
    ) -> Result<Option<OwnEmbedding>, ModelError> {
        let Some(own) = config.layer_embeddings else {
            return Ok(None);
        };
        let name = |part: &str| format!("blk.{l}.{part}.weight");
        Ok(Some(OwnEmbedding {
            gate: Weight::find(v, name("inp_gate"), own.width, config.hidden)?,
            projection: Weight::find(v, name("proj"), config.hidden, own.width)?,
            norm: vector(v, &name("post_norm"), config.hidden)?,
        }))
    }
}

/// Buffers that are kept between steps.
#[derive(Default)]
pub(super) struct OwnEmbeddings {
    /// `(n, n_layers, width)`.
    inputs: Vec<f32>,
    /// `(n, n_layers, width)`: what is projected from the embeddings.
    projected: Vec<f32>,
    /// `(n, width)`.
    narrow: Vec<f32>,
    activations: Activations,
}

impl Buffers {
    /// Fills the inputs of all layers, from the embeddings in `x`.
    pub(super) fn embed_for_layers(
        &mut self,
        model: &Model,
        works: &[Work<'_>],
        n: usize,
        pool: &Pool,
    ) {
        let Some(own) = &model.layer_embeddings else {
            return;
        };
        let (config, v) = (model.config(), model.vindex());
        let hidden = config.hidden as usize;
        let (width, n_wide) = (own.norm.len(), own.projection.n_rows);
        let OwnEmbeddings {
            inputs,
            projected,
            activations,
            ..
        } = &mut self.own_embeddings;
        let inputs = sized(inputs, n * n_wide);
        let scale = (width as f32).sqrt();
        look_up(own.embeddings.matrix(v), works, scale, inputs, pool);

        let x = &self.x[..n * hidden];
        self.watch.see(&[&own.projection], x);
        let w = own.projection.matrix(v);
        fill(activations, x, hidden, &[w.block_type], pool);
        let projected = sized(projected, n * n_wide);
        multiply(w, activations.all(), projected, pool);
        let (root, half) = ((hidden as f32).sqrt(), std::f32::consts::FRAC_1_SQRT_2);
        let rows = inputs
            .chunks_exact_mut(width)
            .zip(projected.chunks_exact_mut(width));
        pool.for_each(rows, |(input, projected)| {
            projected.iter_mut().for_each(|x| *x /= root);
            rms_norm_in_place(projected, &own.norm, config.norm_eps);
            for (input, projected) in input.iter_mut().zip(projected) {
                *input = (*input + *projected) * half;
            }
        });
    }

    /// Adds to `x` what layer `l` makes of its inputs, and scales it.
    pub(super) fn end_layer(
        &mut self,
        model: &Model,
        l: usize,
        layer: &Layer,
        n: usize,
        pool: &Pool,
    ) {
        let hidden = layer.ffn_norm.len();
        if let Some(own) = &layer.own_embedding {
            self.add_own(model, l, own, n, pool);
        }
        if let Some(scale) = layer.scale {
            let per_task = rows_per_task(n, pool.n_threads()) * hidden;
            let rows = self.x[..n * hidden].chunks_mut(per_task);
            pool.for_each(rows, |rows| rows.iter_mut().for_each(|x| *x *= scale));
        }
    }

    fn add_own(&mut self, model: &Model, l: usize, own: &OwnEmbedding, n: usize, pool: &Pool) {
        let (config, v) = (model.config(), model.vindex());
        let (hidden, eps) = (config.hidden as usize, config.norm_eps);
        let (gate, projection) = (own.gate.matrix(v), own.projection.matrix(v));
        let width = gate.n_rows;
        let OwnEmbeddings {
            inputs,
            narrow,
            activations,
            ..
        } = &mut self.own_embeddings;
        let x = &mut self.x[..n * hidden];
        self.watch.see(&[&own.gate], x);
        fill(activations, x, hidden, &[gate.block_type], pool);
        let narrow = sized(narrow, n * width);
        multiply(gate, activations.all(), narrow, pool);
        let n_wide = width * model.layers.len();
        let rows = narrow
            .chunks_exact_mut(width)
            .zip(inputs.chunks_exact(n_wide));
        pool.for_each(rows, |(narrow, inputs)| {
            let own = &inputs[l * width..][..width];
            quant::gate_in_place(GateActivation::GeluTanh, narrow, own);
        });
        self.watch.see(&[&own.projection], narrow);
        fill(activations, narrow, width, &[projection.block_type], pool);
        let delta = sized(&mut self.delta, n * hidden);
        multiply(projection, activations.all(), delta, pool);
        let rows = x
            .chunks_exact_mut(hidden)
            .zip(delta.chunks_exact_mut(hidden));
        pool.for_each(rows, |(x, delta)| {
            rms_norm_in_place(delta, &own.norm, eps);
            add(x, delta);
        });
    }
}
