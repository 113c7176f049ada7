//! Attention of a layer: queries and keys are normed and turned, keys and values remembered, and each query mixes the
//! values that it may see.
//!
//! Softmax is computed page by page (Milakov and Gimelshein 2018): a query keeps its greatest score so far, the sum of the
//! exponentials and the weighted sum of values, and rescales both when a page has a greater one.
//!
//! Invariant: a query's result depends on itself and its own sequence. Pages are walked from the first visible position
//! on, so that neither the chunks of a prompt, nor the rows computed beside it, nor threads change a bit.

use std::ops::Range;

use quant::{ActivationRows, Activations, BlockType, Columns};
use vindex::{Config, Heads, Vindex};

use super::{Room, Span};
use crate::kv::{PAGE, Sequence, Window};
use crate::rope::Rope;
use crate::rows::{
    add, fill, parts, rms_norm_in_place, rms_norm_unweighted_in_place, rows_per_task, sigmoid_gate,
    sized, softcap,
};
use crate::threads::Pool;
use crate::weights::{ModelError, Weight, vector};

/// Queries that a task takes through the pages together.
const QUERIES: usize = 32;

/// The attention of a layer.
#[derive(Debug)]
pub(crate) struct Attention {
    /// `(n_heads * key_length, hidden)`; with gates twice as many rows, of each head the query, then its gate.
    q: Weight,
    /// `(rows of q)`.
    q_bias: Option<Vec<f32>>,
    /// `(key_length)`.
    q_norm: Option<Vec<f32>>,
    /// `None` where those of another layer are used.
    own: Option<Own>,
    is_gated: bool,
    sight: Sight,
    /// Turns by the angles of layers that slide.
    is_sliding: bool,
    norm_eps: f32,
}

/// What keys and values are made of.
#[derive(Debug)]
struct Own {
    /// `(n_kv_heads * key_length, hidden)`.
    k: Weight,
    /// `(n_kv_heads * value_length, hidden)`; `None` where a value is the key before its norm and turn.
    v: Option<Weight>,
    /// Of k and v.
    bias: Option<[Vec<f32>; 2]>,
    /// `(key_length)`.
    k_norm: Option<Vec<f32>>,
    /// Each value head is normed, without a weight.
    norms_values: bool,
}

/// What a query sees, and how its scores become weights.
#[derive(Debug)]
pub(crate) struct Sight {
    /// The layer that keys and values are remembered for.
    pub(crate) kv_layer: usize,
    pub(crate) n_heads: usize,
    pub(crate) heads: Heads,
    /// Tokens that a token sees, itself included; `usize::MAX` without a window.
    pub(crate) window: usize,
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
    /// `(n_heads)`: the score of nothing, which takes part in the softmax.
    pub(crate) sinks: Option<Vec<f32>>,
}

/// With `n` rows.
#[derive(Default)]
pub(super) struct Buffers {
    /// `(n, n_heads * key_length)`.
    q: Vec<f32>,
    /// Queries and gates, head by head.
    both: Vec<f32>,
    gates: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// `(n * n_heads, key_length)`: queries as the products with keys take them.
    queries: Activations,
}

impl Attention {
    pub(super) fn open(v: &Vindex, config: &Config, l: u32) -> Result<Attention, ModelError> {
        let a = &config.attention;
        let hidden = config.hidden;
        let heads = config.heads(l);
        let Heads {
            n_kv_heads,
            key_length,
            value_length,
        } = heads;
        let (keys, values) = (n_kv_heads * key_length, n_kv_heads * value_length);
        let queries = a.n_heads * key_length * if a.output_gate { 2 } else { 1 };
        let name = |part: &str| format!("blk.{l}.{part}");
        let weight = |part: &str, n_rows| Weight::find(v, name(part), n_rows, hidden);
        let vector = |has: bool, part: &str, n| {
            let found = has.then(|| vector(v, &name(part), n));
            found.transpose()
        };
        let wrong = |what: &str| ModelError::Config {
            what: what.to_owned(),
        };
        let kv_layer = config
            .kv_layer(l)
            .ok_or_else(|| wrong("layers share keys and values that no layer has"))?;
        if a.output_gate && (a.qkv_bias || key_length != value_length) {
            return Err(wrong("gates have biases or another width than values"));
        }
        let values_are_keys = a.keys_are_values && !config.slides(l);
        if values_are_keys && (keys != values || a.qkv_bias) {
            return Err(wrong("values that are keys have biases or another width"));
        }
        let own = match kv_layer == l {
            false => None,
            true => Some(Own {
                k: weight("attn_k.weight", keys)?,
                v: match values_are_keys {
                    true => None,
                    false => Some(weight("attn_v.weight", values)?),
                },
                bias: vector(a.qkv_bias, "attn_k.bias", keys)?
                    .zip(vector(a.qkv_bias, "attn_v.bias", values)?)
                    .map(|(k, v)| [k, v]),
                k_norm: vector(a.qk_norm, "attn_k_norm.weight", key_length)?,
                norms_values: a.value_norm,
            }),
        };
        let window = a.sliding_window.as_ref().filter(|_| config.slides(l));
        Ok(Attention {
            q: weight("attn_q.weight", queries)?,
            q_bias: vector(a.qkv_bias, "attn_q.bias", queries)?,
            q_norm: vector(a.qk_norm, "attn_q_norm.weight", key_length)?,
            own,
            is_gated: a.output_gate,
            sight: Sight {
                kv_layer: kv_layer as usize,
                n_heads: a.n_heads as usize,
                heads,
                window: window.map_or(usize::MAX, |w| w.n_tokens as usize),
                scale: a.scale,
                softcap: a.softcap,
                sinks: vector(a.sinks, "attn_sinks.weight", a.n_heads)?,
            },
            is_sliding: config.slides(l),
            norm_eps: config.norm_eps,
        })
    }

    pub(super) fn weights(&self) -> Vec<&Weight> {
        let own = self.own.iter();
        let own = own.flat_map(|own| [&own.k].into_iter().chain(&own.v));
        [&self.q].into_iter().chain(own).collect()
    }

    /// Columns of the output projection.
    pub(super) fn width(&self) -> u32 {
        self.sight.n_heads as u32 * self.sight.heads.value_length
    }

    pub(super) fn mix(
        &self,
        room: &Room<'_>,
        normed: &[f32],
        spans: &mut [Span<'_>],
        (buffers, activations): (&mut Buffers, &mut Activations),
        mixed: &mut [f32],
    ) {
        let (vindex, pool) = (room.model.vindex(), room.pool);
        let n_threads = pool.n_threads();
        let n: usize = spans.iter().map(|span| span.n_rows).sum();
        let key_length = self.sight.heads.key_length as usize;
        let q_width = self.sight.n_heads * key_length;
        let weights = self.weights();
        room.watch.see(&weights, normed);
        let types: Vec<BlockType> = weights.iter().map(|w| w.block_type).collect();
        fill(activations, normed, self.q.n_cols, &types, pool);
        let x = activations.all();
        let q = sized(&mut buffers.q, n * q_width);
        let q_product = match self.is_gated {
            true => sized(&mut buffers.both, 2 * n * q_width),
            false => &mut *q,
        };
        let products = parts(self.q.matrix(vindex), q_product, 2, n_threads);
        let (mut k, mut v) = (&mut [][..], &mut [][..]);
        match &self.own {
            None => pool.for_each(products, |p| quant::multiply(&p.w, p.rows, x, p.out)),
            Some(own) => {
                let (w_k, w_v) = (own.k.matrix(vindex), own.v.as_ref());
                let n_values = self.sight.heads.n_kv_heads * self.sight.heads.value_length;
                k = sized(&mut buffers.k, n * w_k.n_rows);
                v = sized(&mut buffers.v, n * n_values as usize);
                let values = w_v.map(|w| parts(w.matrix(vindex), v, 4, n_threads));
                let products = products
                    .chain(parts(w_k, k, 4, n_threads))
                    .chain(values.into_iter().flatten());
                pool.for_each(products, |p| quant::multiply(&p.w, p.rows, x, p.out));
            }
        }
        let gates = sized(&mut buffers.gates, usize::from(self.is_gated) * n * q_width);
        if self.is_gated {
            let both = &buffers.both[..2 * n * q_width];
            let per_task = rows_per_task(n, n_threads) * q_width;
            let tasks = both
                .chunks(2 * per_task)
                .zip(q.chunks_mut(per_task).zip(gates.chunks_mut(per_task)));
            pool.for_each(tasks, |(both, (q, gates))| {
                let heads = q
                    .chunks_exact_mut(key_length)
                    .zip(gates.chunks_exact_mut(key_length));
                for (both, (q, gate)) in both.chunks_exact(2 * key_length).zip(heads) {
                    q.copy_from_slice(&both[..key_length]);
                    gate.copy_from_slice(&both[key_length..]);
                }
            });
        }
        self.remember(room, spans, (&mut *q, k, v));
        let kv_type = spans
            .first()
            .map_or(BlockType::F32, |span| span.sequence.block_type());
        fill(&mut buffers.queries, q, key_length, &[kv_type], pool);
        see(&self.sight, spans, &buffers.queries, mixed, pool);
        if self.is_gated {
            let per_task = rows_per_task(n, n_threads) * q_width;
            let tasks = mixed.chunks_mut(per_task).zip(gates.chunks_mut(per_task));
            pool.for_each(tasks, |(mixed, gates)| sigmoid_gate(mixed, gates));
        }
    }

    /// Adds biases, norms and turns queries and keys in their place, and writes keys and values to the pages. `q` is
    /// `(n_rows, n_heads * key_length)`, `k` and `v` likewise with key heads.
    fn remember(
        &self,
        room: &Room<'_>,
        spans: &mut [Span<'_>],
        (mut q, mut k, mut v): (&mut [f32], &mut [f32], &mut [f32]),
    ) {
        let Heads {
            n_kv_heads,
            key_length,
            value_length,
        } = self.sight.heads;
        let (key_length, n_kv_heads) = (key_length as usize, n_kv_heads as usize);
        let q_width = self.sight.n_heads * key_length;
        let (k_width, v_width) = (n_kv_heads * key_length, n_kv_heads * value_length as usize);
        let rope = &room.model.rope;
        let is_sliding = self.is_sliding && rope.has_sliding();
        let n_pairs = rope.n_pairs(is_sliding);
        let mut angles = &room.angles[usize::from(is_sliding)][..];
        // The rows that go to one page, and where.
        let mut places: Vec<(usize, Option<Window<'_>>)> = Vec::new();
        for span in spans {
            match &self.own {
                Some(_) => {
                    let windows = span.sequence.windows(self.sight.kv_layer, span.n_rows);
                    places.extend(windows.map(|w| (w.positions.len(), Some(w))));
                }
                None => {
                    let n_left = |done| PAGE.min(span.n_rows - done);
                    let done = (0..span.n_rows).step_by(PAGE);
                    places.extend(done.map(|done| (n_left(done), None)));
                }
            }
        }
        let pieces = places.into_iter().map(|(n, window)| {
            let n_kept = if window.is_some() { n } else { 0 };
            Piece {
                q: q.split_off_mut(..n * q_width).unwrap_or_default(),
                k: k.split_off_mut(..n_kept * k_width).unwrap_or_default(),
                v: v.split_off_mut(..n_kept * v_width).unwrap_or_default(),
                angles: angles.split_off(..n * n_pairs).unwrap_or_default(),
                window,
            }
        });
        room.pool.for_each(pieces, |mut piece| {
            for (i, q) in piece.q.chunks_exact_mut(q_width).enumerate() {
                let angles = &piece.angles[i * n_pairs..][..n_pairs];
                if let Some(bias) = &self.q_bias {
                    add(q, bias);
                }
                self.turn(rope, self.q_norm.as_deref(), angles, q);
                let (Some(own), Some(window)) = (&self.own, &mut piece.window) else {
                    continue;
                };
                let k = &mut piece.k[i * k_width..][..k_width];
                let v = &mut piece.v[i * v_width..][..v_width];
                if let Some([k_bias, v_bias]) = &own.bias {
                    add(k, k_bias);
                    add(v, v_bias);
                }
                if own.v.is_none() {
                    v.copy_from_slice(k);
                }
                if own.norms_values {
                    for value in v.chunks_exact_mut(value_length as usize) {
                        rms_norm_unweighted_in_place(value, self.norm_eps);
                    }
                }
                self.turn(rope, own.k_norm.as_deref(), angles, k);
                window.write(window.positions.start + i, k, v);
            }
        });
    }

    /// Norms and turns each head of a row.
    fn turn(&self, rope: &Rope, norm: Option<&[f32]>, angles: &[[f32; 2]], row: &mut [f32]) {
        for one in row.chunks_exact_mut(self.sight.heads.key_length as usize) {
            if let Some(norm) = norm {
                rms_norm_in_place(one, norm, self.norm_eps);
            }
            rope.turn(angles, one);
        }
    }
}

/// The rows of a batch that go to one page.
struct Piece<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    angles: &'a [[f32; 2]],
    window: Option<Window<'a>>,
}

/// Mixes the values that queries see: `out`, `(n_rows, n_heads * value_length)`, from `q`, `(n_rows * n_heads, key_length)`.
pub(crate) fn see(
    sight: &Sight,
    spans: &[Span<'_>],
    q: &Activations,
    mut out: &mut [f32],
    pool: &Pool,
) {
    let n_heads = sight.n_heads;
    let group = n_heads / sight.heads.n_kv_heads as usize;
    let value_length = sight.heads.value_length as usize;
    let heads_at_once = group.min(QUERIES);
    let rows_at_once = QUERIES / heads_at_once;
    let mut tasks = Vec::new();
    let mut batch_row = 0;
    for span in spans {
        let sequence = &*span.sequence;
        let rows = out
            .split_off_mut(..span.n_rows * n_heads * value_length)
            .unwrap_or_default();
        for (i, rows) in rows
            .chunks_mut(rows_at_once * n_heads * value_length)
            .enumerate()
        {
            let row = i * rows_at_once;
            let mut columns = Columns::new(rows, n_heads * value_length);
            let mut first_head = 0;
            while first_head < n_heads {
                let in_group = group - first_head % group;
                let n = in_group.min(heads_at_once);
                let (own, rest) = columns.split_at(n * value_length);
                columns = rest;
                tasks.push(Task {
                    sequence,
                    batch_row: batch_row + row,
                    position: sequence.len() + row,
                    first_head,
                    n_heads: n,
                    kv_head: first_head / group,
                    out: own,
                });
                first_head += n;
            }
        }
        batch_row += span.n_rows;
    }
    pool.for_each(tasks, |task| task.run(sight, q));
}

/// Some rows of a sequence, and some heads that share their keys and values.
struct Task<'a> {
    sequence: &'a Sequence,
    /// The first row in the batch.
    batch_row: usize,
    /// Its position in the sequence.
    position: usize,
    first_head: usize,
    n_heads: usize,
    kv_head: usize,
    /// `(rows, n_heads * value_length)`.
    out: Columns<'a>,
}

impl Task<'_> {
    fn run(mut self, sight: &Sight, q: &Activations) {
        let n_rows = self.out.n_rows();
        let n_queries = n_rows * self.n_heads;
        // Query i is head i % n_heads of row i / n_heads.
        let mut picked = [0; QUERIES];
        for (i, picked) in picked[..n_queries].iter_mut().enumerate() {
            let row = self.batch_row + i / self.n_heads;
            *picked = (row * sight.n_heads + self.first_head + i % self.n_heads) as u32;
        }
        let queries = q.pick(&picked[..n_queries]);
        let mut states = [State::BEGIN; QUERIES];
        for row in 0..n_rows {
            self.out.row_mut(row).fill(0.0);
        }
        let first = (self.position + 1).saturating_sub(sight.window);
        let end = self.position + n_rows;
        for page in first / PAGE..end.div_ceil(PAGE) {
            self.walk(page, first..end, sight, queries, &mut states);
        }
        let value_length = sight.heads.value_length as usize;
        for row in 0..n_rows {
            let heads = self.out.row_mut(row).chunks_exact_mut(value_length);
            let states = &states[row * self.n_heads..];
            for (i, (head, state)) in heads.zip(states).enumerate() {
                let sinks = sight.sinks.as_ref();
                let inverse = state.inverse(sinks.map(|sinks| sinks[self.first_head + i]));
                head.iter_mut().for_each(|x| *x *= inverse);
            }
        }
    }

    /// Takes in the positions of one page that are among `visible`.
    fn walk(
        &mut self,
        page: usize,
        visible: Range<usize>,
        sight: &Sight,
        queries: ActivationRows<'_>,
        states: &mut [State; QUERIES],
    ) {
        let page_start = page * PAGE;
        let (low, high) = (
            visible.start.max(page_start) - page_start,
            (visible.end - page_start).min(PAGE),
        );
        let width = high - low;
        let n_queries = queries.n_rows();
        // (n_queries, width)
        let mut scores = [0.0; QUERIES * PAGE];
        let scores = &mut scores[..n_queries * width];
        let keys = self.sequence.keys(sight.kv_layer, page, self.kv_head, high);
        quant::multiply(&keys, low..high, queries, Columns::new(scores, width));
        let value_length = sight.heads.value_length as usize;
        for (i, (scores, state)) in scores.chunks_exact_mut(width).zip(states).enumerate() {
            let (row, head) = (i / self.n_heads, i % self.n_heads);
            let position = self.position + row;
            // What this query sees of the page.
            let from = (position + 1)
                .saturating_sub(sight.window)
                .max(page_start + low)
                - page_start;
            let to = (position + 1)
                .min(page_start + high)
                .saturating_sub(page_start);
            if from >= to {
                continue;
            }
            let scores = &mut scores[from - low..to - low];
            scores.iter_mut().for_each(|score| *score *= sight.scale);
            if let Some(cap) = sight.softcap {
                softcap(scores, cap);
            }
            let out = &mut self.out.row_mut(row)[head * value_length..][..value_length];
            state.weigh(scores, out);
            let values = self
                .sequence
                .values(sight.kv_layer, page, self.kv_head, from..to);
            quant::accumulate_rows(&values, scores, out);
        }
    }
}

/// What a query knows of the positions so far.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
}

impl State {
    const BEGIN: State = State {
        max: f32::NEG_INFINITY,
        sum: 0.0,
    };

    /// What turns the sum of values into their mean. A sink is one more score, of nothing.
    fn inverse(&self, sink: Option<f32>) -> f32 {
        let Some(sink) = sink else {
            return 1.0 / self.sum;
        };
        let max = if sink > self.max { sink } else { self.max };
        let mut factors = [self.max - max, sink - max];
        quant::exp_in_place(&mut factors);
        factors[0] / (self.sum * factors[0] + factors[1])
    }

    /// Scores become weights relative to the greatest score so far; what was summed is brought to the same scale.
    fn weigh(&mut self, scores: &mut [f32], out: &mut [f32]) {
        let max = scores.iter().fold(
            self.max,
            |max, &score| if score > max { score } else { max },
        );
        if max > self.max {
            let mut factor = [self.max - max];
            quant::exp_in_place(&mut factor);
            self.sum *= factor[0];
            out.iter_mut().for_each(|x| *x *= factor[0]);
            self.max = max;
        }
        scores.iter_mut().for_each(|score| *score -= max);
        quant::exp_in_place(scores);
        self.sum += sum(scores);
    }
}

/// Sixteen partial sums, then their sum: an order that the compiler can use whole registers for.
fn sum(values: &[f32]) -> f32 {
    let mut sums = [0.0; 16];
    let (chunks, tail) = values.as_chunks::<16>();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value;
        }
    }
    sums.iter().chain(tail).sum()
}
