//! Attention of a layer: queries and keys are normed and turned, keys and values remembered, and each query mixes the
//! values that it may see.
//!
//! Softmax is computed page by page (Milakov and Gimelshein 2018): a query keeps its greatest score so far, the sum of the
//! exponentials and the weighted sum of values, and rescales both when a page has a greater one.
//!
//! Invariant: a query's result depends on itself and its own sequence. Pages are walked from the first visible position
//! on, so that neither the chunks of a prompt, nor the rows computed beside it, nor threads change a bit.

use quant::{ActivationRows, Activations, Columns};
use vindex::Attention;

use crate::kv::{PAGE, Sequence, Window};
use crate::model::Layer;
use crate::rope::Rope;
use crate::rows::{add, rms_norm_in_place, softcap};
use crate::threads::Pool;

/// Queries that a task takes through the pages together.
const QUERIES: usize = 32;

/// The rows of one sequence in a batch.
pub(crate) struct Span<'a> {
    pub(crate) sequence: &'a mut Sequence,
    /// Rows of this sequence; they follow those of the span before.
    pub(crate) n_rows: usize,
}

/// What attention needs beside the rows.
pub(crate) struct Head<'a> {
    pub(crate) config: &'a Attention,
    pub(crate) norm_eps: f32,
    pub(crate) rope: &'a Rope,
}

/// Adds biases, norms and turns queries and keys in their place, and writes keys and values to the pages. `q` is
/// `(n_rows, n_heads * key_length)`, `k` and `v` likewise with key heads, `angles` `(n_rows, n_pairs)`.
#[allow(
    clippy::too_many_arguments,
    reason = "three matrices, their angles and where they belong"
)]
pub(crate) fn remember(
    head: &Head<'_>,
    layer: &Layer,
    l: usize,
    spans: &mut [Span<'_>],
    (mut q, mut k, mut v): (&mut [f32], &mut [f32], &mut [f32]),
    mut angles: &[[f32; 2]],
    pool: &Pool,
) {
    let a = head.config;
    let n_pairs = head.rope.n_pairs();
    let (q_width, k_width) = (a.n_heads * a.key_length, a.n_kv_heads * a.key_length);
    let v_width = (a.n_kv_heads * a.value_length) as usize;
    let (q_width, k_width) = (q_width as usize, k_width as usize);
    let windows = spans
        .iter_mut()
        .flat_map(|span| span.sequence.windows(l, span.n_rows));
    let pieces = windows.map(|window| {
        let n = window.positions.len();
        let own_angles = angles.split_off(..n * n_pairs).unwrap_or_default();
        Piece {
            q: q.split_off_mut(..n * q_width).unwrap_or_default(),
            k: k.split_off_mut(..n * k_width).unwrap_or_default(),
            v: v.split_off_mut(..n * v_width).unwrap_or_default(),
            angles: own_angles,
            window,
        }
    });
    pool.for_each(pieces, |mut piece| {
        for (i, position) in piece.window.positions.clone().enumerate() {
            let q = &mut piece.q[i * q_width..][..q_width];
            let k = &mut piece.k[i * k_width..][..k_width];
            let v = &mut piece.v[i * v_width..][..v_width];
            if let Some([q_bias, k_bias, v_bias]) = &layer.qkv_bias {
                add(q, q_bias);
                add(k, k_bias);
                add(v, v_bias);
            }
            let angles = &piece.angles[i * n_pairs..][..n_pairs];
            let norms = layer.qk_norm.as_ref().map(|[q, k]| (&q[..], &k[..]));
            turn(head, norms.map(|n| n.0), angles, q);
            turn(head, norms.map(|n| n.1), angles, k);
            piece.window.write(position, k, v);
        }
    });
}

/// The rows of a batch that go to one page.
struct Piece<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    angles: &'a [[f32; 2]],
    window: Window<'a>,
}

fn turn(head: &Head<'_>, norm: Option<&[f32]>, angles: &[[f32; 2]], row: &mut [f32]) {
    for one in row.chunks_exact_mut(head.config.key_length as usize) {
        if let Some(norm) = norm {
            rms_norm_in_place(one, norm, head.norm_eps);
        }
        head.rope.turn(angles, one);
    }
}

/// Mixes: `out`, `(n_rows, n_heads * value_length)`, from `q`, `(n_rows * n_heads, key_length)`.
pub(crate) fn mix(
    head: &Head<'_>,
    layer: &Layer,
    l: usize,
    spans: &[Span<'_>],
    q: &Activations,
    mut out: &mut [f32],
    pool: &Pool,
) {
    let a = head.config;
    let n_heads = a.n_heads as usize;
    let group = n_heads / a.n_kv_heads as usize;
    let value_length = a.value_length as usize;
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
                    l,
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
    pool.for_each(tasks, |task| task.run(a, layer.window, q));
}

/// Some rows of a sequence, and some heads that share their keys and values.
struct Task<'a> {
    sequence: &'a Sequence,
    l: usize,
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
    fn run(mut self, a: &Attention, window: usize, q: &Activations) {
        let n_rows = self.out.n_rows();
        let n_queries = n_rows * self.n_heads;
        // Query i is head i % n_heads of row i / n_heads.
        let mut picked = [0; QUERIES];
        for (i, picked) in picked[..n_queries].iter_mut().enumerate() {
            let row = self.batch_row + i / self.n_heads;
            *picked = (row * a.n_heads as usize + self.first_head + i % self.n_heads) as u32;
        }
        let queries = q.pick(&picked[..n_queries]);
        let mut states = [State::BEGIN; QUERIES];
        for row in 0..n_rows {
            self.out.row_mut(row).fill(0.0);
        }
        let first = (self.position + 1).saturating_sub(window);
        let end = self.position + n_rows;
        for page in first / PAGE..end.div_ceil(PAGE) {
            self.walk(page, first, end, a, window, queries, &mut states);
        }
        let value_length = a.value_length as usize;
        for row in 0..n_rows {
            let heads = self.out.row_mut(row).chunks_exact_mut(value_length);
            for (head, state) in heads.zip(&states[row * self.n_heads..]) {
                let inverse = 1.0 / state.sum;
                head.iter_mut().for_each(|x| *x *= inverse);
            }
        }
    }

    /// Takes in the positions of one page that are in `first..end`.
    #[allow(
        clippy::too_many_arguments,
        reason = "the inner loop of a task, split off to be read"
    )]
    fn walk(
        &mut self,
        page: usize,
        first: usize,
        end: usize,
        a: &Attention,
        window: usize,
        queries: ActivationRows<'_>,
        states: &mut [State; QUERIES],
    ) {
        let page_start = page * PAGE;
        let (low, high) = (
            first.max(page_start) - page_start,
            (end - page_start).min(PAGE),
        );
        let width = high - low;
        let n_queries = queries.n_rows();
        // (n_queries, width)
        let mut scores = [0.0; QUERIES * PAGE];
        let scores = &mut scores[..n_queries * width];
        let keys = self.sequence.keys(self.l, page, self.kv_head, high);
        quant::multiply(&keys, low..high, queries, Columns::new(scores, width));
        let value_length = a.value_length as usize;
        for (i, (scores, state)) in scores.chunks_exact_mut(width).zip(states).enumerate() {
            let (row, head) = (i / self.n_heads, i % self.n_heads);
            let position = self.position + row;
            // What this query sees of the page.
            let from = (position + 1).saturating_sub(window).max(page_start + low) - page_start;
            let to = (position + 1)
                .min(page_start + high)
                .saturating_sub(page_start);
            if from >= to {
                continue;
            }
            let scores = &mut scores[from - low..to - low];
            scores.iter_mut().for_each(|score| *score *= a.scale);
            if let Some(cap) = a.softcap {
                softcap(scores, cap);
            }
            let out = &mut self.out.row_mut(row)[head * value_length..][..value_length];
            state.weigh(scores, out);
            let values = self.sequence.values(self.l, page, self.kv_head, from..to);
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
