//! One step: new tokens of some sequences go in, logits come out.
//!
//! The pass, in the order of the code below, with `n` rows (tokens of all sequences in the batch):
//!
//! ```text
//! x        (n, hidden)                    embedding of each token, times embedding_scale
//! for each layer
//!   normed   (n, hidden)                  RMS norm of x
//!   mixed    (n, …)                       the layer's mixer: what each row learns of the rows that it may see
//!   delta    (n, hidden)                  output projection, + bias, post norm;  x += delta
//!   normed   (n, hidden)                  RMS norm of x; the router says which experts each row visits
//!   visited  (n_visits, hidden)           from whoever holds the feed-forward weights
//!   delta    (n, hidden)                  weighted sum in the router's order, post norm;  x += delta
//!   x        (n, hidden)                  + what the layer makes of its own embedding of the token, times the layer's scale
//! logits   (rows asked for, vocab)        RMS norm, output head, soft cap
//! ```
//!
//! Invariant: a row's logits depend on the tokens of its own sequence alone: not on how a prompt is cut into steps, on the
//! sequences beside it, on threads, or on who computes the feed-forward rows. A step that fails leaves every sequence as
//! it was. Left out: which tokens come next and whose turn it is.

pub(crate) mod own_embeddings;
mod routes;

use std::sync::Arc;

use quant::{Activations, Matrix};

use crate::collector::{Collector, Watch};
use crate::ffn::{FeedForward, FfnError};
use crate::kv::{OutOfPages, Sequence};
use crate::mixer::{self, Room, Span};
use crate::model::{Layer, Model};
use crate::rows::{
    add, fill, multiply, rms_norm, rms_norm_in_place, rows_per_task, sized, softcap,
};
use crate::threads::Pool;
use own_embeddings::OwnEmbeddings;
use routes::Routes;

/// New tokens of one sequence.
#[derive(Debug)]
pub struct Work<'a> {
    /// What came before; after the step it has the new tokens too.
    pub sequence: &'a mut Sequence,
    /// The new tokens, at least one.
    pub tokens: &'a [u32],
    /// After which of them the next token is asked for.
    pub logits: Wanted,
}

/// After which of the new tokens logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: more of the prompt follows.
    Nothing,
    /// The last.
    Last,
    /// Each.
    All,
}

impl Wanted {
    /// Rows of logits for `n_tokens`.
    pub fn n_rows(self, n_tokens: usize) -> usize {
        match self {
            Wanted::Nothing => 0,
            Wanted::Last => n_tokens.min(1),
            Wanted::All => n_tokens,
        }
    }
}

/// Why a step was not done. The sequences are as they were.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StepError {
    /// The feed-forward rows could not be had.
    #[error(transparent)]
    Ffn(#[from] FfnError),
    /// The new tokens do not fit the cache.
    #[error(transparent)]
    OutOfPages(#[from] OutOfPages),
    /// A token that the model does not know.
    #[error("token {id} is not among the model's {vocab}")]
    Token {
        /// The token.
        id: u32,
        /// How many there are.
        vocab: u32,
    },
    /// The sequences have not the model's layers or heads, or there is no token.
    #[error("{0}")]
    Invalid(String),
}

/// Computes steps of one model. Keeps its buffers, so that a step of a size that was seen before allocates only lists
/// of tasks.
pub struct Forward {
    model: Arc<Model>,
    pool: Arc<Pool>,
    ffn: Arc<dyn FeedForward>,
    /// Whether the threads are of no use while feed-forward rows are computed.
    rests: bool,
    /// Whether [`Forward::hidden`] is asked for.
    keeps_hidden: bool,
    /// Rows of the last step.
    n_rows: usize,
    buffers: Buffers,
}

/// See the module's drawing for the shapes.
#[derive(Default)]
struct Buffers {
    x: Vec<f32>,
    normed: Vec<f32>,
    mixed: Vec<f32>,
    delta: Vec<f32>,
    visited: Vec<f32>,
    logits: Vec<f32>,
    /// `(n, n_pairs)`: cosine and sine, of all layers and of those that slide.
    angles: [Vec<[f32; 2]>; 2],
    /// Which experts the rows visit.
    routes: Routes,
    /// What layers make of embeddings of their own.
    own_embeddings: OwnEmbeddings,
    /// Rows as the products take them.
    activations: Activations,
    /// What mixers keep.
    mixers: mixer::Buffers,
    /// Who learns what enters the matrices.
    watch: Watch,
}

impl std::fmt::Debug for Forward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forward")
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

impl Forward {
    /// A pass over `model` on the threads of `pool`, with feed-forward rows from `ffn`.
    pub fn new(model: Arc<Model>, pool: Arc<Pool>, ffn: Arc<dyn FeedForward>) -> Forward {
        Forward {
            model,
            pool,
            ffn,
            rests: false,
            keeps_hidden: false,
            n_rows: 0,
            buffers: Buffers::default(),
        }
    }

    /// The same pass, for feed-forward rows that are computed elsewhere: its threads leave the processors alone while it
    /// waits for them.
    #[must_use]
    pub fn resting(self) -> Forward {
        Forward {
            rests: true,
            ..self
        }
    }

    /// The same pass, which keeps the residual stream of every row for whoever drafts from it.
    #[must_use]
    pub fn keeping_hidden(self) -> Forward {
        Forward {
            keeps_hidden: true,
            ..self
        }
    }

    /// The same pass, which tells `collector` what enters the matrices of attention and the output head; those of the
    /// feed-forward layers are told by [`crate::Local::collecting`].
    #[must_use]
    pub fn collecting(mut self, collector: Arc<Collector>) -> Forward {
        self.buffers.watch = Watch::by(collector);
        self
    }

    /// `(n_rows, hidden)`: the residual stream of every row of the last step that was done, in the order of the works
    /// and their tokens, after the last layer and before the final norm. Nothing unless the pass is
    /// [`Forward::keeping_hidden`].
    pub fn hidden(&self) -> &[f32] {
        let n_rows = if self.keeps_hidden { self.n_rows } else { 0 };
        &self.buffers.x[..n_rows * self.model.config().hidden as usize]
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Takes in the tokens of each work and gives the logits that are wanted, `(rows, vocab)` row-major in the order of
    /// the works and their tokens. The logits stay until the next step.
    ///
    /// # Errors
    /// [`StepError`]; every sequence is as it was.
    pub fn step(&mut self, works: &mut [Work<'_>]) -> Result<&[f32], StepError> {
        self.check(works)?;
        let reserved = works
            .iter_mut()
            .try_for_each(|w| w.sequence.reserve(w.tokens.len()));
        if reserved.is_ok() {
            for work in works.iter_mut() {
                work.sequence.reserve_saved(work.tokens.len());
            }
        }
        let done = reserved
            .map_err(StepError::from)
            .and_then(|()| Ok(self.pass(works)?));
        for work in works.iter_mut() {
            match done {
                Ok(_) => work.sequence.advance(work.tokens.len()),
                Err(_) => work.sequence.unreserve(),
            }
        }
        self.n_rows = match done {
            Ok(_) => works.iter().map(|work| work.tokens.len()).sum(),
            Err(_) => 0,
        };
        let n_logits = done?;
        Ok(&self.buffers.logits[..n_logits])
    }

    fn check(&self, works: &[Work<'_>]) -> Result<(), StepError> {
        let config = self.model.config();
        for work in works {
            if work.tokens.is_empty() {
                return Err(StepError::Invalid("a work has no tokens".to_owned()));
            }
            if !work.sequence.is_of(config) {
                let reason = "a sequence belongs to another model's cache";
                return Err(StepError::Invalid(reason.to_owned()));
            }
            if let Some(&id) = work.tokens.iter().find(|&&id| id >= config.vocab) {
                let vocab = config.vocab;
                return Err(StepError::Token { id, vocab });
            }
        }
        Ok(())
    }

    /// The pass on this page. Gives the number of logits.
    fn pass(&mut self, works: &mut [Work<'_>]) -> Result<usize, FfnError> {
        let Forward {
            model,
            pool,
            ffn,
            rests,
            buffers,
            ..
        } = self;
        let config = model.config();
        let n: usize = works.iter().map(|work| work.tokens.len()).sum();
        buffers.embed(model, works, n, pool);
        buffers.embed_for_layers(model, works, n, pool);
        buffers.angles(model, works, n);
        for (l, layer) in model.layers.iter().enumerate() {
            buffers.mix(model, layer, works, n, pool);
            buffers.route(model, layer, n, pool);
            let (batch, visited) = buffers.batch(layer, n);
            if *rests {
                pool.rest();
            }
            ffn.forward(l as u32, batch, visited)?;
            buffers.add_visited(config, layer, n, pool);
            buffers.end_layer(model, l, layer, n, pool);
        }
        Ok(buffers.logits(model, works, pool))
    }
}

impl Buffers {
    /// Fills `x` with the embeddings of the tokens.
    fn embed(&mut self, model: &Model, works: &[Work<'_>], n: usize, pool: &Pool) {
        let config = model.config();
        let hidden = config.hidden as usize;
        let w = model.embeddings.matrix(model.vindex());
        let x = sized(&mut self.x, n * hidden);
        look_up(w, works, config.embedding_scale, x, pool);
    }

    /// Fills the angles of each row's position.
    fn angles(&mut self, model: &Model, works: &[Work<'_>], n: usize) {
        let rope = &model.rope;
        let [all, sliding] = &mut self.angles;
        for (angles, is_sliding) in [(all, false), (sliding, true)] {
            if is_sliding && !rope.has_sliding() {
                continue;
            }
            let n_pairs = rope.n_pairs(is_sliding);
            let positions = works
                .iter()
                .flat_map(|w| w.sequence.len()..w.sequence.len() + w.tokens.len());
            let rows = sized(angles, n * n_pairs).chunks_exact_mut(n_pairs.max(1));
            for (row, position) in rows.zip(positions) {
                rope.angles(position, is_sliding, row);
            }
        }
    }

    /// What the layer's mixer gives is added to `x`, and `normed` becomes what enters the feed-forward layer.
    fn mix(&mut self, model: &Model, layer: &Layer, works: &mut [Work<'_>], n: usize, pool: &Pool) {
        let config = model.config();
        let (eps, hidden) = (config.norm_eps, config.hidden as usize);
        let n_threads = pool.n_threads();
        let normed = sized(&mut self.normed, n * hidden);
        norm_rows(&self.x[..n * hidden], &layer.attn_norm, eps, normed, pool);

        let room = Room {
            model,
            pool,
            watch: &self.watch,
            angles: &self.angles,
        };
        let mut spans: Vec<Span<'_>> = works
            .iter_mut()
            .map(|work| Span {
                n_rows: work.tokens.len(),
                sequence: work.sequence,
            })
            .collect();
        let mixed = sized(&mut self.mixed, n * layer.output.n_cols);
        let buffers = (&mut self.mixers, &mut self.activations);
        layer.mixer.mix(&room, normed, &mut spans, buffers, mixed);

        self.watch.see(&[&layer.output], mixed);
        let w = layer.output.matrix(model.vindex());
        fill(
            &mut self.activations,
            mixed,
            w.n_cols,
            &[w.block_type],
            pool,
        );
        let delta = sized(&mut self.delta, n * hidden);
        multiply(w, self.activations.all(), delta, pool);

        let per_task = rows_per_task(n, n_threads) * hidden;
        let tasks = self.x[..n * hidden]
            .chunks_mut(per_task)
            .zip(delta.chunks_mut(per_task))
            .zip(normed.chunks_mut(per_task));
        pool.for_each(tasks, |((x, delta), normed)| {
            let rows = x
                .chunks_exact_mut(hidden)
                .zip(delta.chunks_exact_mut(hidden));
            for ((x, delta), normed) in rows.zip(normed.chunks_exact_mut(hidden)) {
                if let Some(bias) = &layer.output_bias {
                    add(delta, bias);
                }
                if let Some([after_attention, _]) = &layer.post_norms {
                    rms_norm_in_place(delta, after_attention, eps);
                }
                add(x, delta);
                rms_norm(x, &layer.ffn_norm, eps, normed);
            }
        });
    }

    /// Fills `logits` and gives their number.
    fn logits(&mut self, model: &Model, works: &[Work<'_>], pool: &Pool) -> usize {
        let config = model.config();
        let hidden = config.hidden as usize;
        let n_wanted: usize = works.iter().map(|w| w.logits.n_rows(w.tokens.len())).sum();
        if n_wanted == 0 {
            return 0;
        }
        // The wanted rows, gathered at the front of `normed`.
        let mut end = 0;
        let mut wanted = self.normed.chunks_exact_mut(hidden);
        for work in works {
            end += work.tokens.len();
            for row in end - work.logits.n_rows(work.tokens.len())..end {
                let Some(target) = wanted.next() else { break };
                rms_norm(
                    &self.x[row * hidden..][..hidden],
                    &model.output_norm,
                    config.norm_eps,
                    target,
                );
            }
        }
        self.watch
            .see(&[&model.head], &self.normed[..n_wanted * hidden]);
        let w = model.head.matrix(model.vindex());
        fill(
            &mut self.activations,
            &self.normed[..n_wanted * hidden],
            hidden,
            &[w.block_type],
            pool,
        );
        let logits = sized(&mut self.logits, n_wanted * w.n_rows);
        multiply(w, self.activations.all(), logits, pool);
        if let Some(cap) = config.logit_softcap {
            pool.for_each(logits.chunks_mut(1 << 14), |logits| softcap(logits, cap));
        }
        n_wanted * w.n_rows
    }
}

/// Fills `out`, `(n, w.n_cols)`, with the rows of `w` that the tokens have, times `scale`.
fn look_up(w: Matrix<'_>, works: &[Work<'_>], scale: f32, out: &mut [f32], pool: &Pool) {
    let row_bytes = w.bytes.len() / w.n_rows;
    let tokens = works.iter().flat_map(|work| work.tokens);
    let rows = out.chunks_exact_mut(w.n_cols).zip(tokens);
    pool.for_each(rows, |(row, &token)| {
        let bytes = &w.bytes[token as usize * row_bytes..][..row_bytes];
        quant::decode(w.block_type, bytes, row);
        row.iter_mut().for_each(|x| *x *= scale);
    });
}

/// RMS norm of rows.
fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32], pool: &Pool) {
    let width = weight.len();
    let per_task = rows_per_task(x.len() / width, pool.n_threads()) * width;
    pool.for_each(
        x.chunks(per_task).zip(out.chunks_mut(per_task)),
        |(x, out)| {
            for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                rms_norm(x, weight, eps, out);
            }
        },
    );
}
