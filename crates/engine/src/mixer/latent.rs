//! Multi-head latent attention: all query heads see one compressed key a token, and values are made of what is seen.
//!
//! The formula is that of [`vindex::Latent`], in its absorbed form: what would make a head's keys of the compressed one is
//! multiplied with the queries instead, and what would make its values with the mixed compressed keys. So a token is
//! remembered by one row, `[compressed, rotated]`, which is key and value at once: whole rows are mixed, and the rotated
//! elements of what comes out are left.
//!
//! Invariant: as that of `attention.rs`, which sees for it.

use quant::{Activations, Columns};
use vindex::{Config, Heads, Vindex};

use super::attention::{Sight, see};
use super::{Room, Span};
use crate::kv::Window;
use crate::rows::{fill, multiply, parts, rms_norm_in_place, rows_per_task, sized};
use crate::weights::{ModelError, Stack, Weight, vector};

/// The latent attention of a layer. A query head has `n_plain` elements, then those that are rotated; a key `rank`, which
/// are the compressed ones, then the rotated ones.
#[derive(Debug)]
pub(crate) struct Latent {
    /// `(q_rank, hidden)`, and the norm of its products.
    q_a: Option<(Weight, Vec<f32>)>,
    /// `(n_heads * (n_plain + rotated), q_rank)`, or hidden columns where queries are not compressed.
    q: Weight,
    /// `(rank + rotated, hidden)`.
    kv_a: Weight,
    /// `(rank)`.
    kv_norm: Vec<f32>,
    /// `(n_heads, rank, n_plain)`.
    k_b: Stack,
    /// `(n_heads, value_length, rank)`.
    v_b: Stack,
    sight: Sight,
    n_plain: usize,
    rank: usize,
    value_length: usize,
    norm_eps: f32,
}

/// With `n` rows.
#[derive(Default)]
pub(super) struct Buffers {
    /// `(n, q_rank)`.
    low: Vec<f32>,
    /// `(n, n_heads * (n_plain + rotated))`.
    q: Vec<f32>,
    /// `(n * n_heads, n_plain)`.
    plain: Vec<f32>,
    /// `(n * n_heads, key_length)`.
    queries: Vec<f32>,
    /// `(n, key_length)`.
    keys: Vec<f32>,
    /// `(n * n_heads, key_length)`: keys that were mixed.
    seen: Vec<f32>,
    /// `(n * n_heads, rank)`: their compressed part.
    compressed: Vec<f32>,
    /// Heads as the products take them.
    heads: Activations,
}

impl Latent {
    pub(super) fn open(
        v: &Vindex,
        config: &Config,
        numbers: vindex::Latent,
        l: u32,
    ) -> Result<Latent, ModelError> {
        let a = &config.attention;
        let (hidden, n_heads) = (config.hidden, a.n_heads);
        let Heads {
            n_kv_heads,
            key_length,
            value_length: rank,
        } = config.heads(l);
        let n_rotated = config.rope.n_dims;
        let (n_plain, value_length) = (numbers.n_plain, numbers.value_length);
        let is_sane = |n: u32| (1..=1 << 14).contains(&n);
        let fits = n_kv_heads == 1
            && key_length.checked_sub(rank) == Some(n_rotated)
            && is_sane(n_plain)
            && is_sane(value_length)
            && numbers.q_rank.is_none_or(|rank| rank > 0)
            && !config.slides(l)
            && config.kv_layer(l) == Some(l);
        if !fits {
            let what = format!(
                "latent attention has {n_kv_heads} keys of {key_length} elements, {rank} of them compressed and {n_rotated} \
                 rotated, and heads of {n_plain} and {value_length}"
            );
            return Err(ModelError::Config { what });
        }
        let name = |part: &str| format!("blk.{l}.{part}");
        let weight = |part: &str, n_rows, n_cols| Weight::find(v, name(part), n_rows, n_cols);
        let stack =
            |part: &str, n_rows, n_cols| Stack::find(v, name(part), n_heads, n_rows, n_cols);
        let queries = n_heads * (n_plain + n_rotated);
        let (q_a, q) = match numbers.q_rank {
            None => (None, weight("attn_q.weight", queries, hidden)?),
            Some(q_rank) => {
                let norm = vector(v, &name("attn_q_a_norm.weight"), q_rank)?;
                let q_a = weight("attn_q_a.weight", q_rank, hidden)?;
                (
                    Some((q_a, norm)),
                    weight("attn_q_b.weight", queries, q_rank)?,
                )
            }
        };
        Ok(Latent {
            q_a,
            q,
            kv_a: weight("attn_kv_a_mqa.weight", key_length, hidden)?,
            kv_norm: vector(v, &name("attn_kv_a_norm.weight"), rank)?,
            k_b: stack("attn_k_b.weight", rank, n_plain)?,
            v_b: stack("attn_v_b.weight", value_length, rank)?,
            sight: Sight {
                kv_layer: l as usize,
                n_heads: n_heads as usize,
                heads: Heads {
                    n_kv_heads: 1,
                    key_length,
                    value_length: key_length,
                },
                window: usize::MAX,
                scale: a.scale,
                softcap: a.softcap,
                sinks: None,
            },
            n_plain: n_plain as usize,
            rank: rank as usize,
            value_length: value_length as usize,
            norm_eps: config.norm_eps,
        })
    }

    /// Bytes of the matrices.
    pub(super) fn bytes(&self) -> usize {
        let q_a = self.q_a.iter().map(|(w, _)| w);
        let weights = q_a.chain([&self.q, &self.kv_a]);
        weights.map(Weight::bytes).sum::<usize>() + self.k_b.bytes() + self.v_b.bytes()
    }

    /// Columns of the output projection.
    pub(super) fn width(&self) -> u32 {
        (self.sight.n_heads * self.value_length) as u32
    }

    pub(super) fn mix(
        &self,
        room: &Room<'_>,
        normed: &[f32],
        spans: &mut [Span<'_>],
        (buffers, activations): (&mut Buffers, &mut Activations),
        mixed: &mut [f32],
    ) {
        let pool = room.pool;
        let n: usize = spans.iter().map(|span| span.n_rows).sum();
        let n_heads = self.sight.n_heads;
        let key_length = self.sight.heads.key_length as usize;
        self.project(room, normed, n, (buffers, activations));
        let plain = &buffers.plain[..n * n_heads * self.n_plain];
        let queries = sized(&mut buffers.queries, n * n_heads * key_length);
        let (heads, k_b) = (&mut buffers.heads, &self.k_b);
        multiply_heads(room, k_b, plain, heads, (&mut *queries, key_length));
        self.turn(room, queries, (&buffers.q, &mut buffers.keys), n);
        self.remember(spans, &buffers.keys);
        let kv_type = spans
            .first()
            .map_or(quant::BlockType::F32, |span| span.sequence.block_type());
        fill(heads, queries, key_length, &[kv_type], pool);
        let seen = sized(&mut buffers.seen, n * n_heads * key_length);
        see(&self.sight, spans, heads, seen, pool);
        let compressed = sized(&mut buffers.compressed, n * n_heads * self.rank);
        let rows = compressed.chunks_exact_mut(self.rank);
        for (compressed, seen) in rows.zip(seen.chunks_exact(key_length)) {
            compressed.copy_from_slice(&seen[..self.rank]);
        }
        let out = (mixed, self.value_length);
        multiply_heads(room, &self.v_b, compressed, heads, out);
    }

    /// Fills `q`, `plain` and `keys`, not yet normed and turned.
    fn project(
        &self,
        room: &Room<'_>,
        normed: &[f32],
        n: usize,
        (buffers, activations): (&mut Buffers, &mut Activations),
    ) {
        let (vindex, pool) = (room.model.vindex(), room.pool);
        let n_threads = pool.n_threads();
        let first = self.q_a.as_ref().map_or(&self.q, |(q_a, _)| q_a);
        room.watch.see(&[first, &self.kv_a], normed);
        let types = [first.block_type, self.kv_a.block_type];
        fill(activations, normed, first.n_cols, &types, pool);
        let x = activations.all();
        let q = sized(&mut buffers.q, n * self.q.n_rows);
        let low = sized(&mut buffers.low, n * first.n_rows);
        let keys = sized(&mut buffers.keys, n * self.kv_a.n_rows);
        let first_product = match self.q_a {
            None => &mut *q,
            Some(_) => &mut *low,
        };
        let products = parts(first.matrix(vindex), first_product, 2, n_threads).chain(parts(
            self.kv_a.matrix(vindex),
            keys,
            4,
            n_threads,
        ));
        pool.for_each(products, |p| quant::multiply(&p.w, p.rows, x, p.out));
        if let Some((_, norm)) = &self.q_a {
            for row in low.chunks_exact_mut(norm.len()) {
                rms_norm_in_place(row, norm, self.norm_eps);
            }
            room.watch.see(&[&self.q], low);
            fill(activations, low, norm.len(), &[self.q.block_type], pool);
            multiply(self.q.matrix(vindex), activations.all(), q, pool);
        }
        let n_heads = n * self.sight.n_heads;
        let plain = sized(&mut buffers.plain, n_heads * self.n_plain);
        let q_width = self.q.n_rows / self.sight.n_heads;
        let heads = plain.chunks_exact_mut(self.n_plain);
        for (plain, q) in heads.zip(q.chunks_exact(q_width)) {
            plain.copy_from_slice(&q[..self.n_plain]);
        }
    }

    /// Gives `queries` their rotated elements from `q`, turned, and norms and turns `keys`.
    fn turn(
        &self,
        room: &Room<'_>,
        queries: &mut [f32],
        (q, keys): (&[f32], &mut [f32]),
        n: usize,
    ) {
        let rope = &room.model.rope;
        let n_pairs = rope.n_pairs(false);
        let key_length = self.sight.heads.key_length as usize;
        let (n_heads, q_width) = (self.sight.n_heads, self.q.n_rows / self.sight.n_heads);
        let per_task = rows_per_task(n, room.pool.n_threads());
        let tasks = queries
            .chunks_mut(per_task * n_heads * key_length)
            .zip(q[..n * self.q.n_rows].chunks(per_task * self.q.n_rows))
            .zip(keys[..n * key_length].chunks_mut(per_task * key_length))
            .zip(room.angles[0][..n * n_pairs].chunks((per_task * n_pairs).max(1)));
        room.pool.for_each(tasks, |(((queries, q), keys), angles)| {
            for (i, key) in keys.chunks_exact_mut(key_length).enumerate() {
                let angles = &angles[i * n_pairs..][..n_pairs];
                rms_norm_in_place(&mut key[..self.rank], &self.kv_norm, self.norm_eps);
                rope.turn(angles, &mut key[self.rank..]);
                let heads = queries[i * n_heads * key_length..].chunks_exact_mut(key_length);
                let q = q[i * n_heads * q_width..].chunks_exact(q_width);
                for (query, q) in heads.zip(q).take(n_heads) {
                    query[self.rank..].copy_from_slice(&q[self.n_plain..]);
                    rope.turn(angles, &mut query[self.rank..]);
                }
            }
        });
    }

    /// Writes keys to the pages.
    fn remember(&self, spans: &mut [Span<'_>], keys: &[f32]) {
        let mut keys = keys.chunks_exact(self.sight.heads.key_length as usize);
        for span in spans {
            let windows = span.sequence.windows(self.sight.kv_layer, span.n_rows);
            for mut window in windows {
                write(&mut window, &mut keys);
            }
        }
    }
}

fn write<'a>(window: &mut Window<'_>, keys: &mut impl Iterator<Item = &'a [f32]>) {
    for (position, key) in window.positions.clone().zip(keys) {
        window.write(position, key, &[]);
    }
}

/// Multiplies each head's elements of each row with that head's matrix: `x` is `(n, n_heads, n_cols)`, and the products
/// are the first `n_rows` of the `width` elements that `out` has for each head of each row.
fn multiply_heads(
    room: &Room<'_>,
    stack: &Stack,
    x: &[f32],
    activations: &mut Activations,
    (out, width): (&mut [f32], usize),
) {
    let (n_heads, pool) = (stack.n, room.pool);
    let n = x.len() / n_heads / stack.n_cols;
    room.watch.see_stack(stack, x);
    fill(activations, x, stack.n_cols, &[stack.block_type], pool);
    let activations = &*activations;
    let mut columns = Some(Columns::new(out, n_heads * width));
    let tasks = (0..n_heads).map(|head| {
        let all = columns.take().expect("it is put back below");
        let (own, rest) = all.split_at(width);
        columns = Some(rest);
        (head, own.split_at(stack.n_rows).0)
    });
    pool.for_each(tasks, |(head, out)| {
        let rows: Vec<u32> = (0..n).map(|row| (row * n_heads + head) as u32).collect();
        let w = stack.matrix(room.model.vindex(), head);
        quant::multiply(&w, 0..stack.n_rows, activations.pick(&rows), out);
    });
}
