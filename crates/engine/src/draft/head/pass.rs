//! One pass of a head: pairs of hidden state and next token of some texts go in, the head's own streams come out.
//!
//! The pass, with `n` rows (pairs of all texts in the batch):
//!
//! ```text
//! joined   (n, 2 * hidden)      norms of embedding and hidden state, side by side
//! x        (n, hidden)          projection of it
//! x += attention(norm(x));      keys and values go to the head's own pages
//! x += feed forward(norm(x))
//! normed   (n, hidden)          norm of x: what the output head takes
//! ```
//!
//! Invariant: a row's result depends on the pairs of its own text alone. A pass that fails leaves every sequence as it was.

use std::sync::Arc;

use quant::{Activations, BlockType, Columns};
use vindex::Heads;

use super::{Attention, FeedForward, Gated, Head, Own, Routing};
use crate::kv::{KvCache, KvType, OutOfPages, PAGE, Sequence};
use crate::rows::{add, add_weighted, fill, multiply, parts, rms_norm, rms_norm_in_place, sized};
use crate::threads::Pool;

/// New pairs of one text.
#[derive(Debug)]
pub struct HeadWork<'a> {
    /// The pairs before; after the pass it has the new ones too.
    pub sequence: &'a mut Sequence,
    /// `(n_pairs, hidden)`: the model's residual stream at the positions of the pairs, before the final norm.
    pub hidden: &'a [f32],
    /// `(n_pairs, hidden)`: the embeddings of the tokens after them, scaled as the model scales them.
    pub embedded: &'a [f32],
}

/// Computes passes of one head. Keeps its buffers.
pub struct HeadPass {
    head: Arc<Head>,
    pool: Arc<Pool>,
    n_rows: usize,
    buffers: Buffers,
}

#[derive(Default)]
struct Buffers {
    joined: Vec<f32>,
    x: Vec<f32>,
    normed: Vec<f32>,
    /// `(n, n_heads * key_length)`, with gates twice as wide.
    q: Vec<f32>,
    gates: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// What latent attention makes them of.
    low: Vec<f32>,
    mixed: Vec<f32>,
    delta: Vec<f32>,
    /// `(n, ffn)`, or of the rows that visit an expert.
    middle: Vec<f32>,
    expert: Vec<f32>,
    router_logits: Vec<f32>,
    angles: Vec<[f32; 2]>,
    activations: Activations,
    middle_activations: Activations,
    queries: Activations,
}

impl std::fmt::Debug for HeadPass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeadPass").finish_non_exhaustive()
    }
}

impl Head {
    /// A cache for the head's keys and values that takes at most `ceiling_bytes`, but at least one page.
    pub fn cache(&self, kv_type: KvType, ceiling_bytes: u64) -> KvCache {
        let heads = Heads {
            n_kv_heads: self.n_kv_heads as u32,
            key_length: self.key_length as u32,
            value_length: self.value_length as u32,
        };
        KvCache::of_heads(kv_type, 1, heads, ceiling_bytes)
    }
}

impl HeadPass {
    /// Passes of `head` on the threads of `pool`.
    pub fn new(head: Arc<Head>, pool: Arc<Pool>) -> HeadPass {
        HeadPass {
            head,
            pool,
            n_rows: 0,
            buffers: Buffers::default(),
        }
    }

    /// Takes in the pairs of each work.
    ///
    /// # Errors
    /// [`OutOfPages`]; every sequence is as it was.
    ///
    /// # Panics
    /// When a work has not as many hidden states as embeddings.
    pub fn step(&mut self, works: &mut [HeadWork<'_>]) -> Result<(), OutOfPages> {
        let hidden = self.head.hidden;
        let n_pairs = |work: &HeadWork<'_>| {
            assert_eq!(work.hidden.len(), work.embedded.len());
            work.hidden.len() / hidden
        };
        let reserved = works.iter_mut().try_for_each(|work| {
            let n = n_pairs(work);
            work.sequence.reserve(n)
        });
        if let Err(error) = reserved {
            works.iter_mut().for_each(|work| work.sequence.unreserve());
            return Err(error);
        }
        self.n_rows = works.iter().map(n_pairs).sum();
        if self.n_rows > 0 {
            self.buffers
                .pass(&self.head, &self.pool, works, self.n_rows);
        }
        for work in works.iter_mut() {
            let n = n_pairs(work);
            work.sequence.advance(n);
        }
        Ok(())
    }

    /// `(n_rows, hidden)`: the head's stream of each row of the last pass, which a deeper guess takes as hidden state.
    pub fn hidden(&self) -> &[f32] {
        &self.buffers.x[..self.n_rows * self.head.hidden]
    }

    /// `(n_rows, hidden)`: the same, normed for the output head.
    pub fn normed(&self) -> &[f32] {
        &self.buffers.normed[..self.n_rows * self.head.hidden]
    }
}

impl Buffers {
    fn pass(&mut self, head: &Head, pool: &Pool, works: &mut [HeadWork<'_>], n: usize) {
        let (hidden, eps) = (head.hidden, head.norm_eps);
        let joined = sized(&mut self.joined, n * 2 * hidden);
        let pairs = works.iter().flat_map(|work| {
            let embedded = work.embedded.chunks_exact(hidden);
            embedded.zip(work.hidden.chunks_exact(hidden))
        });
        for (row, (embedded, stream)) in joined.chunks_exact_mut(2 * hidden).zip(pairs) {
            let (first, second) = row.split_at_mut(hidden);
            let (for_embedded, for_stream) = match head.embed_first {
                true => (first, second),
                false => (second, first),
            };
            rms_norm(embedded, &head.norm_embedding, eps, for_embedded);
            rms_norm(stream, &head.norm_hidden, eps, for_stream);
        }
        let x = sized(&mut self.x, n * hidden);
        project(&mut self.activations, joined, &head.projection, x, pool);

        let normed = sized(&mut self.normed, n * hidden);
        norm(x, &head.attn_norm, eps, normed);
        self.attend(head, pool, works, n);
        let (x, delta) = (&mut self.x[..n * hidden], &self.delta[..n * hidden]);
        add(x, delta);

        norm(x, &head.ffn_norm, eps, &mut self.normed[..n * hidden]);
        self.feed_forward(head, pool, n);
        let (x, delta) = (&mut self.x[..n * hidden], &self.delta[..n * hidden]);
        add(x, delta);
        norm(x, &head.final_norm, eps, &mut self.normed[..n * hidden]);
    }

    /// Fills `delta` from `normed`, and writes keys and values to the pages.
    fn attend(&mut self, head: &Head, pool: &Pool, works: &mut [HeadWork<'_>], n: usize) {
        let (hidden, n_heads, n_kv_heads) = (head.hidden, head.n_heads, head.n_kv_heads);
        let (key_length, value_length) = (head.key_length, head.value_length);
        let n_pairs = head.rope.n_pairs(false);
        let positions = works.iter().flat_map(|work| {
            let first = work.sequence.len();
            first..first + work.hidden.len() / hidden
        });
        let angles = sized(&mut self.angles, n * n_pairs);
        for (row, position) in angles.chunks_exact_mut(n_pairs.max(1)).zip(positions) {
            head.rope.angles(position, false, row);
        }
        self.queries_keys_values(head, pool, n);
        let is_gated = matches!(head.attention, Attention::Full { is_gated: true, .. });

        let mut row = 0;
        let (k_width, v_width) = (n_kv_heads * key_length, n_kv_heads * value_length);
        for work in works.iter_mut() {
            let n = work.hidden.len() / hidden;
            for mut window in work.sequence.windows(0, n) {
                for position in window.positions.clone() {
                    let keys = &self.k[row * k_width..][..k_width];
                    window.write(position, keys, &self.v[row * v_width..][..v_width]);
                    row += 1;
                }
            }
        }
        let kv_type = works
            .first()
            .map_or(BlockType::F32, |work| work.sequence.block_type());
        let q = &self.q[..n * n_heads * key_length];
        fill(&mut self.queries, q, key_length, &[kv_type], pool);

        let mixed = sized(&mut self.mixed, n * n_heads * value_length);
        let group = n_heads / n_kv_heads;
        let rows = works.iter().flat_map(|work| {
            let first = work.sequence.len();
            (first..first + work.hidden.len() / hidden).map(|position| (&*work.sequence, position))
        });
        let rows: Vec<(&Sequence, usize)> = rows.collect();
        let tasks = mixed.chunks_exact_mut(group * value_length).enumerate();
        let queries = &self.queries;
        pool.for_each(tasks, |(i, out)| {
            let (sequence, position) = rows[i / n_kv_heads];
            let first_query = i * group;
            mix(
                sequence,
                i % n_kv_heads,
                position + 1,
                queries,
                first_query..first_query + group,
                head.scale,
                out,
            );
        });
        if is_gated {
            let gates = &mut self.gates[..n * n_heads * value_length];
            for (x, gate) in mixed.iter_mut().zip(gates) {
                *x *= sigmoid(*gate);
            }
        }
        let delta = sized(&mut self.delta, n * hidden);
        project(&mut self.activations, mixed, &head.mixed, delta, pool);
    }

    /// Fills `q`, `k` and `v`, normed and turned, and `gates` where there are some.
    fn queries_keys_values(&mut self, head: &Head, pool: &Pool, n: usize) {
        let (n_heads, n_kv_heads, length) = (head.n_heads, head.n_kv_heads, head.key_length);
        let normed = &self.normed[..n * head.hidden];
        let n_pairs = head.rope.n_pairs(false);
        match &head.attention {
            Attention::Full {
                q: w_q,
                is_gated,
                k: w_k,
                v: w_v,
                qk_norm,
                qkv_bias,
            } => {
                let types = [w_q.block_type, w_k.block_type, w_v.block_type];
                fill(&mut self.activations, normed, head.hidden, &types, pool);
                let rows = self.activations.all();
                let q = sized(&mut self.q, n * w_q.n_rows);
                let k = sized(&mut self.k, n * w_k.n_rows);
                let v = sized(&mut self.v, n * w_v.n_rows);
                multiply(w_q.matrix(), rows, q, pool);
                multiply(w_k.matrix(), rows, k, pool);
                multiply(w_v.matrix(), rows, v, pool);
                if let Some(biases) = qkv_bias {
                    for (rows, bias) in [&mut *q, &mut *k, &mut *v].into_iter().zip(biases) {
                        rows.chunks_exact_mut(bias.len())
                            .for_each(|row| add(row, bias));
                    }
                }
                if *is_gated {
                    let gates = sized(&mut self.gates, n * n_heads * length);
                    for i in 0..n * n_heads {
                        gates[i * length..][..length]
                            .copy_from_slice(&q[(2 * i + 1) * length..][..length]);
                        q.copy_within(2 * i * length..(2 * i + 1) * length, i * length);
                    }
                }
                let norms = qk_norm.as_ref().map(|[q, k]| [&q[..], &k[..]]);
                for (rows, n_heads, which) in [(q, n_heads, 0), (k, n_kv_heads, 1)] {
                    let heads = rows.chunks_exact_mut(length).take(n * n_heads);
                    for (i, one) in heads.enumerate() {
                        if let Some(norms) = norms {
                            rms_norm_in_place(one, norms[which], head.norm_eps);
                        }
                        let angles = &self.angles[i / n_heads * n_pairs..][..n_pairs];
                        head.rope.turn(angles, one);
                    }
                }
            }
            Attention::Latent {
                q_a,
                q: w_q,
                kv_a,
                kv_norm,
                kv_b,
                n_plain,
            } => {
                let q = sized(&mut self.q, n * w_q.n_rows);
                match q_a {
                    None => project(&mut self.activations, normed, w_q, q, pool),
                    Some((w, weight)) => {
                        let low = sized(&mut self.low, n * w.n_rows);
                        project(&mut self.activations, normed, w, low, pool);
                        low.chunks_exact_mut(w.n_rows)
                            .for_each(|row| rms_norm_in_place(row, weight, head.norm_eps));
                        project(&mut self.activations, low, w_q, q, pool);
                    }
                }
                for (i, one) in q.chunks_exact_mut(length).enumerate() {
                    let angles = &self.angles[i / n_heads * n_pairs..][..n_pairs];
                    head.rope.turn(angles, &mut one[*n_plain..]);
                }
                // What keys and values are made of, then the turned part that all keys of a row have.
                let rank = kv_norm.len();
                let (a_width, value_length) = (kv_a.n_rows, head.value_length);
                let low = sized(&mut self.low, n * (a_width + rank));
                let (both, low) = low.split_at_mut(n * a_width);
                project(&mut self.activations, normed, kv_a, both, pool);
                for (i, (row, low)) in both
                    .chunks_exact_mut(a_width)
                    .zip(low.chunks_exact_mut(rank))
                    .enumerate()
                {
                    rms_norm(&row[..rank], kv_norm, head.norm_eps, low);
                    let angles = &self.angles[i * n_pairs..][..n_pairs];
                    head.rope.turn(angles, &mut row[rank..]);
                }
                let middle = sized(&mut self.middle, n * kv_b.n_rows);
                project(&mut self.activations, low, kv_b, middle, pool);
                let k = sized(&mut self.k, n * n_heads * length);
                let v = sized(&mut self.v, n * n_heads * value_length);
                let heads = k
                    .chunks_exact_mut(length)
                    .zip(v.chunks_exact_mut(value_length))
                    .zip(middle.chunks_exact(n_plain + value_length));
                for (i, ((k, v), made)) in heads.enumerate() {
                    let turned = &both[i / n_heads * a_width + rank..][..length - n_plain];
                    k[..*n_plain].copy_from_slice(&made[..*n_plain]);
                    k[*n_plain..].copy_from_slice(turned);
                    v.copy_from_slice(&made[*n_plain..]);
                }
            }
        }
    }

    /// Fills `delta` from `normed`.
    fn feed_forward(&mut self, head: &Head, pool: &Pool, n: usize) {
        let hidden = head.hidden;
        let all: Vec<u32> = (0..n as u32).collect();
        let (router, bias, experts, shared, routing) = match &head.feed_forward {
            FeedForward::Dense(gated) => {
                self.visit(head, gated, &all, pool);
                let delta = sized(&mut self.delta, n * hidden);
                delta.copy_from_slice(&self.expert[..n * hidden]);
                return;
            }
            FeedForward::Routed {
                router,
                bias,
                experts,
                shared,
                routing,
            } => (router, bias, experts, shared, routing),
        };
        let logits = sized(&mut self.router_logits, n * router.n_rows);
        let normed = &self.normed[..n * hidden];
        project(&mut self.activations, normed, router, logits, pool);
        let mut visits = vec![Vec::new(); experts.len()];
        for (row, logits) in logits.chunks_exact_mut(router.n_rows).enumerate() {
            for (expert, weight) in routed(routing, logits, bias.as_deref()) {
                visits[expert].push((row as u32, weight));
            }
        }
        sized(&mut self.delta, n * hidden).fill(0.0);
        for (gated, visits) in experts.iter().zip(visits) {
            if visits.is_empty() {
                continue;
            }
            let rows: Vec<u32> = visits.iter().map(|&(row, _)| row).collect();
            self.visit(head, gated, &rows, pool);
            for (&(row, weight), result) in visits.iter().zip(self.expert.chunks_exact(hidden)) {
                add_weighted(
                    &mut self.delta[row as usize * hidden..][..hidden],
                    weight,
                    result,
                );
            }
        }
        if let Some((gated, gate)) = shared {
            self.visit(head, gated, &all, pool);
            let mut parts = vec![1.0; n];
            if let Some(gate) = gate {
                let normed = &self.normed[..n * hidden];
                project(&mut self.activations, normed, gate, &mut parts, pool);
                parts.iter_mut().for_each(|x| *x = sigmoid(*x));
            }
            let rows = self
                .delta
                .chunks_exact_mut(hidden)
                .zip(self.expert.chunks_exact(hidden));
            for (part, (delta, result)) in parts.into_iter().zip(rows) {
                add_weighted(delta, part, result);
            }
        }
    }

    /// Fills `expert`, `(rows, hidden)`, with what the chosen rows of `normed` become.
    fn visit(&mut self, head: &Head, gated: &Gated, rows: &[u32], pool: &Pool) {
        let hidden = head.hidden;
        let types = [gated.gate.block_type, gated.up.block_type];
        let n_all = rows.iter().max().map_or(0, |&row| row as usize + 1);
        let normed = &self.normed[..n_all * hidden];
        fill(&mut self.activations, normed, hidden, &types, pool);
        let x = self.activations.pick(rows);
        let ffn = gated.gate.n_rows;
        let middle = sized(&mut self.middle, rows.len() * ffn);
        let activation = head.activation;
        let gate = gated.gate.matrix();
        pool.for_each(
            parts(gated.up.matrix(), middle, 2, pool.n_threads()),
            |part| {
                quant::multiply_gated(&gate, &part.w, part.rows, x, activation, part.out);
            },
        );
        let out = sized(&mut self.expert, rows.len() * hidden);
        project(&mut self.middle_activations, middle, &gated.down, out, pool);
    }
}

/// `out`: the products of the rows of `x` with those of `w`.
fn project(activations: &mut Activations, x: &[f32], w: &Own, out: &mut [f32], pool: &Pool) {
    fill(activations, x, w.n_cols, &[w.block_type], pool);
    multiply(w.matrix(), activations.all(), out, pool);
}

fn norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let rows = x
        .chunks_exact(weight.len())
        .zip(out.chunks_exact_mut(weight.len()));
    rows.for_each(|(x, out)| rms_norm(x, weight, eps, out));
}

/// `out`, (queries, value length): the values of the first `n_seen` positions, mixed for each of some queries that share
/// a head of keys.
fn mix(
    sequence: &Sequence,
    kv_head: usize,
    n_seen: usize,
    queries: &Activations,
    which: std::ops::Range<usize>,
    scale: f32,
    out: &mut [f32],
) {
    let picked: Vec<u32> = which.map(|i| i as u32).collect();
    let (queries, n_queries) = (queries.pick(&picked), picked.len());
    // (n_queries, n_seen), and those of a page
    let mut scores = vec![0.0; n_queries * n_seen];
    let mut of_page = vec![0.0; n_queries * PAGE];
    for page in 0..n_seen.div_ceil(PAGE) {
        let width = PAGE.min(n_seen - page * PAGE);
        let keys = sequence.keys(0, page, kv_head, width);
        let of_page = &mut of_page[..n_queries * width];
        quant::multiply(&keys, 0..width, queries, Columns::new(of_page, width));
        for (scores, of_page) in scores
            .chunks_exact_mut(n_seen)
            .zip(of_page.chunks_exact(width))
        {
            scores[page * PAGE..][..width].copy_from_slice(of_page);
        }
    }
    let value_length = out.len() / n_queries;
    for (scores, out) in scores
        .chunks_exact_mut(n_seen)
        .zip(out.chunks_exact_mut(value_length))
    {
        scores.iter_mut().for_each(|score| *score *= scale);
        quant::softmax_in_place(scores);
        out.fill(0.0);
        for (page, weights) in scores.chunks(PAGE).enumerate() {
            let values = sequence.values(0, page, kv_head, 0..weights.len());
            quant::accumulate_rows(&values, weights, out);
        }
    }
}

/// The experts of a row and their weights.
fn routed(routing: &Routing, logits: &mut [f32], bias: Option<&[f32]>) -> Vec<(usize, f32)> {
    match routing.sigmoid {
        true => logits.iter_mut().for_each(|x| *x = sigmoid(*x)),
        false => quant::softmax_in_place(logits),
    }
    // What is chosen by, which the bias is part of; what is weighted with has none.
    let mut chances = logits.to_vec();
    bias.into_iter().for_each(|bias| add(&mut chances, bias));
    let (n_groups, n_groups_used) = routing.groups;
    if n_groups_used < n_groups {
        let of_group = chances.len() / n_groups;
        let mut groups: Vec<(usize, f32)> = chances
            .chunks_exact(of_group)
            .map(|group| {
                let mut best = group.to_vec();
                best.sort_by(|a, b| b.total_cmp(a));
                best.iter().take(2).sum()
            })
            .enumerate()
            .collect();
        groups.sort_by(|a, b| b.1.total_cmp(&a.1));
        for &(group, _) in &groups[n_groups_used..] {
            chances[group * of_group..][..of_group].fill(f32::NEG_INFINITY);
        }
    }
    let mut order: Vec<usize> = (0..chances.len()).collect();
    order.sort_by(|&a, &b| chances[b].total_cmp(&chances[a]));
    order.truncate(routing.n_used);
    let sum: f32 = order.iter().map(|&expert| logits[expert]).sum();
    let factor = match routing.normalise {
        true => routing.scale / sum,
        false => routing.scale,
    };
    order.into_iter().map(|e| (e, logits[e] * factor)).collect()
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
