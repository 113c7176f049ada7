//! A gated delta net: a layer that mixes by a state of fixed size instead of keys and values.
//!
//! The formula is that of [`vindex::DeltaNet`]. Per value head a state of (key length, value length) takes in row after
//! row, `quant::delta_rule`; before that queries, keys and values go through a short convolution over their own rows.
//!
//! Invariant: a row goes through a state in one way only, after the rows before it and by itself, so that neither the cut
//! of a prompt into steps nor threads change a bit: heads are what threads divide. What is remembered when is told in
//! `state.rs`.

use quant::{Activations, BlockType, Columns, DeltaRow, SLAB};
use vindex::{Config, Vindex};

use super::{Room, Span};
use crate::rows::{fill, parts, rms_norm_in_place, rows_per_task, sized};
use crate::state::{Base, LOG_ROWS, LayerState, LogRows, Memory, StateShape};
use crate::weights::{ModelError, Weight, numbers, vector};

/// Added to the sum of squares by which queries and keys are divided (`l2norm` of `transformers`' Qwen3-Next).
const L2_EPS: f32 = 1e-6;

/// The delta net of a layer.
#[derive(Debug)]
pub(crate) struct DeltaNet {
    l: usize,
    shape: StateShape,
    /// `(n_channels, hidden)`.
    qkv: Weight,
    /// `(n_value_heads * value_length, hidden)`.
    gate: Weight,
    /// `(2 * n_value_heads, hidden)`, or two of `(n_value_heads, hidden)`: a and b.
    ba: Vec<Weight>,
    /// `(conv_kernel, n_channels)`.
    conv: Vec<f32>,
    /// `(n_value_heads)` each.
    dt_bias: Vec<f32>,
    a: Vec<f32>,
    /// `(value_length)`.
    norm: Vec<f32>,
    norm_eps: f32,
}

/// With `n` new rows, and `all` the rows that states have not taken in and the new ones.
#[derive(Default)]
pub(super) struct Buffers {
    /// `(n, n_channels)`, before the convolution.
    qkv: Vec<f32>,
    /// `(n, n_value_heads * value_length)`.
    z: Vec<f32>,
    /// `(n, n_value_heads)` each, or both side by side.
    ba: [Vec<f32>; 2],
    /// `(all, n_channels)`, after it, queries and keys normed.
    convolved: Vec<f32>,
    /// `(all, n_value_heads)`: decay and beta.
    gates: Vec<[f32; 2]>,
}

/// Sizes in values.
#[derive(Clone, Copy)]
struct Sizes {
    n_key_heads: usize,
    n_value_heads: usize,
    key_length: usize,
    value_length: usize,
    n_channels: usize,
    conv_kernel: usize,
    log_row: usize,
}

/// Where the rows of a span are.
#[derive(Clone, Copy)]
struct Place {
    /// In the batch.
    first: usize,
    /// Among `all`.
    first_of_all: usize,
    /// Rows that the state has not taken in.
    n_pending: usize,
    /// New rows.
    n_new: usize,
}

impl Place {
    fn n_all(&self) -> usize {
        self.n_pending + self.n_new
    }
}

impl DeltaNet {
    pub(super) fn open(v: &Vindex, config: &Config, l: u32) -> Result<DeltaNet, ModelError> {
        let shape = StateShape::of(config).ok_or_else(|| ModelError::Config {
            what: "layers with a state have no numbers".to_owned(),
        })?;
        let net = &shape.net;
        let name = |part: &str| format!("blk.{l}.{part}");
        let weight = |part: &str, n_rows| Weight::find(v, name(part), n_rows, config.hidden);
        let vector = |part: &str, n| vector(v, &name(part), n);
        let n_channels = shape.n_channels();
        let n_heads = net.n_value_heads;
        let kernel = net.conv_kernel as usize;
        let conv = name("ssm_conv1d.weight");
        let rows = numbers(v, &conv, &[net.conv_kernel.into(), n_channels as u64])?;
        // One row for each place in the kernel, so that channels lie side by side.
        let mut conv = vec![0.0; rows.len()];
        for (channel, row) in rows.chunks_exact(kernel).enumerate() {
            for (i, &x) in row.iter().enumerate() {
                conv[i * n_channels + channel] = x;
            }
        }
        Ok(DeltaNet {
            l: l as usize,
            qkv: weight("attn_qkv.weight", n_channels as u32)?,
            gate: weight("attn_gate.weight", n_heads * net.value_length)?,
            ba: match net.fused_ba {
                true => vec![weight("ssm_ba.weight", 2 * n_heads)?],
                false => vec![
                    weight("ssm_alpha.weight", n_heads)?,
                    weight("ssm_beta.weight", n_heads)?,
                ],
            },
            conv,
            dt_bias: vector("ssm_dt.bias", n_heads)?,
            a: vector("ssm_a", n_heads)?,
            norm: vector("ssm_norm.weight", net.value_length)?,
            norm_eps: config.norm_eps,
            shape,
        })
    }

    pub(super) fn weights(&self) -> Vec<&Weight> {
        [&self.qkv, &self.gate]
            .into_iter()
            .chain(&self.ba)
            .collect()
    }

    /// Columns of the output projection.
    pub(super) fn width(&self) -> u32 {
        self.shape.net.n_value_heads * self.shape.net.value_length
    }

    fn sizes(&self) -> Sizes {
        let net = &self.shape.net;
        Sizes {
            n_key_heads: net.n_key_heads as usize,
            n_value_heads: net.n_value_heads as usize,
            key_length: net.key_length as usize,
            value_length: net.value_length as usize,
            n_channels: self.shape.n_channels(),
            conv_kernel: net.conv_kernel as usize,
            log_row: self.shape.log_row_len(),
        }
    }

    /// The key head of value head `v`, and which of its value heads that is.
    fn key_head(&self, v: usize) -> (usize, usize) {
        let net = &self.shape.net;
        let (n_key_heads, n_value_heads) = (net.n_key_heads as usize, net.n_value_heads as usize);
        match net.tiled {
            true => (v % n_key_heads, v / n_key_heads),
            false => {
                let group = n_value_heads / n_key_heads;
                (v / group, v % group)
            }
        }
    }

    pub(super) fn mix(
        &self,
        room: &Room<'_>,
        normed: &[f32],
        spans: &mut [Span<'_>],
        (buffers, activations): (&mut Buffers, &mut Activations),
        mixed: &mut [f32],
    ) {
        let n: usize = spans.iter().map(|span| span.n_rows).sum();
        self.multiply(room, normed, n, (buffers, activations));
        let mut places = Vec::new();
        let mut memories = Vec::new();
        let (mut first, mut first_of_all) = (0, 0);
        for span in spans {
            let len = span.sequence.len();
            let memory = span.sequence.memory(self.l);
            let place = Place {
                first,
                first_of_all,
                n_pending: len - memory.base.position(),
                n_new: span.n_rows,
            };
            first += place.n_new;
            first_of_all += place.n_all();
            places.push(place);
            memories.push(memory);
        }
        self.convolve(room, &places, &memories, first_of_all, buffers);
        self.take_in(room, &places, &mut memories, buffers, mixed);
        let s = self.sizes();
        let spans = places.iter().zip(&mut memories);
        room.pool.for_each(spans, |(place, memory)| {
            let rows = &buffers.qkv[place.first * s.n_channels..][..place.n_new * s.n_channels];
            self.keep(place, memory, rows, &buffers.ba);
        });
    }

    /// Fills `qkv`, `z` and `ba`.
    fn multiply(
        &self,
        room: &Room<'_>,
        normed: &[f32],
        n: usize,
        (buffers, activations): (&mut Buffers, &mut Activations),
    ) {
        let (vindex, pool) = (room.model.vindex(), room.pool);
        let n_threads = pool.n_threads();
        let weights = self.weights();
        room.watch.see(&weights, normed);
        let types: Vec<BlockType> = weights.iter().map(|w| w.block_type).collect();
        fill(activations, normed, self.qkv.n_cols, &types, pool);
        let x = activations.all();
        let qkv = sized(&mut buffers.qkv, n * self.qkv.n_rows);
        let z = sized(&mut buffers.z, n * self.gate.n_rows);
        let large = parts(self.qkv.matrix(vindex), qkv, 2, n_threads).chain(parts(
            self.gate.matrix(vindex),
            z,
            2,
            n_threads,
        ));
        let small = self.ba.iter().zip(&mut buffers.ba);
        let small = small.flat_map(|(w, out)| {
            let out = sized(out, n * w.n_rows);
            parts(w.matrix(vindex), out, 8, n_threads)
        });
        pool.for_each(large.chain(small), |p| {
            quant::multiply(&p.w, p.rows, x, p.out);
        });
    }

    /// `a` and `b` of value head `v` in new row `row` of the batch.
    fn a_and_b(&self, ba: &[Vec<f32>; 2], row: usize, v: usize) -> [f32; 2] {
        let n_heads = self.shape.net.n_value_heads as usize;
        if self.ba.len() == 2 {
            return [ba[0][row * n_heads + v], ba[1][row * n_heads + v]];
        }
        // For each key head the b of its value heads, then their a.
        let group = n_heads / self.shape.net.n_key_heads as usize;
        let (key_head, i) = self.key_head(v);
        let of_head = &ba[0][2 * (row * n_heads + key_head * group)..][..2 * group];
        [of_head[group + i], of_head[i]]
    }

    /// Fills `convolved` and `gates`, and `z` becomes its own SiLU.
    fn convolve(
        &self,
        room: &Room<'_>,
        places: &[Place],
        memories: &[Memory<'_>],
        n_all: usize,
        buffers: &mut Buffers,
    ) {
        let s = self.sizes();
        let n_threads = room.pool.n_threads();
        let mut convolved = sized(&mut buffers.convolved, n_all * s.n_channels);
        let mut gates = sized(&mut buffers.gates, n_all * s.n_value_heads);
        let (qkv, ba) = (&buffers.qkv, &buffers.ba);
        let mut tasks = Vec::new();
        for (place, memory) in places.iter().zip(memories) {
            let n_at_once = rows_per_task(place.n_all(), n_threads);
            for first in (0..place.n_all()).step_by(n_at_once) {
                let n = n_at_once.min(place.n_all() - first);
                let convolved = convolved.split_off_mut(..n * s.n_channels);
                let gates = gates.split_off_mut(..n * s.n_value_heads);
                let rows = (convolved.unwrap_or_default(), gates.unwrap_or_default());
                tasks.push((place, memory, first, rows));
            }
        }
        room.pool.for_each(tasks, |(place, memory, first, rows)| {
            let new = &qkv[place.first * s.n_channels..][..place.n_new * s.n_channels];
            let rows = rows
                .0
                .chunks_exact_mut(s.n_channels)
                .zip(rows.1.chunks_exact_mut(s.n_value_heads));
            for (i, (out, gates)) in rows.enumerate() {
                let row = first + i;
                out.fill(0.0);
                for (k, weights) in self.conv.chunks_exact(s.n_channels).enumerate() {
                    let Some(x) = raw(s, place, memory, new, row + k) else {
                        continue;
                    };
                    for ((out, weight), x) in out.iter_mut().zip(weights).zip(x) {
                        *out += weight * x;
                    }
                }
                quant::silu_in_place(out);
                let keys_len = s.n_key_heads * s.key_length;
                let query_scale = 1.0 / (s.key_length as f32).sqrt();
                for (part, scale) in [(0, query_scale), (1, 1.0)] {
                    let heads = &mut out[part * keys_len..][..keys_len];
                    for head in heads.chunks_exact_mut(s.key_length) {
                        let norm = (quant::sum_of_squares(head) + L2_EPS).sqrt();
                        let factor = scale / norm;
                        head.iter_mut().for_each(|x| *x *= factor);
                    }
                }
                for (v, gate) in gates.iter_mut().enumerate() {
                    let [a, b] = match row.checked_sub(place.n_pending) {
                        Some(row) => self.a_and_b(ba, place.first + row, v),
                        None => {
                            let row = &memory.log.rows()[row * s.log_row..][..s.log_row];
                            let row = &row[s.n_channels..];
                            [row[v], row[s.n_value_heads + v]]
                        }
                    };
                    *gate = self.gate(v, a, b);
                }
            }
        });
        let n_new: usize = places.iter().map(|place| place.n_new).sum();
        let width = s.n_value_heads * s.value_length;
        let z = &mut buffers.z[..n_new * width];
        let per_task = rows_per_task(n_new, n_threads) * width;
        room.pool
            .for_each(z.chunks_mut(per_task), quant::silu_in_place);
    }

    /// Decay and beta of value head `v`. In double precision, rounded, so that every machine gets the same bits.
    fn gate(&self, v: usize, a: f32, b: f32) -> [f32; 2] {
        let x = f64::from(a + self.dt_bias[v]);
        let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
        let decay = (f64::from(self.a[v]) * softplus).exp();
        let beta = 1.0 / (1.0 + f64::from(-b).exp());
        [decay as f32, beta as f32]
    }

    /// Takes all rows into the states; `mixed` gets what the new ones ask of them, normed and gated.
    fn take_in(
        &self,
        room: &Room<'_>,
        places: &[Place],
        memories: &mut [Memory<'_>],
        buffers: &Buffers,
        mut mixed: &mut [f32],
    ) {
        let s = self.sizes();
        let (head_len, width) = (self.shape.head_len(), s.n_value_heads * s.value_length);
        let mut tasks = Vec::new();
        for (place, memory) in places.iter().zip(memories) {
            let rows = mixed
                .split_off_mut(..place.n_new * width)
                .unwrap_or_default();
            let mut columns = Some(Columns::new(rows, width));
            let base_position = memory.base.position();
            let saved_at = memory.saved.as_ref().map(|(at, _)| at - base_position);
            let mut base = Begin::of(&mut memory.base);
            let mut next = memory.next.as_mut().map(|next| &mut next.heads[..]);
            let mut saved = memory.saved.as_mut().map(|(_, saved)| &mut saved.heads[..]);
            for v in 0..s.n_value_heads {
                let all = columns.take().expect("it is put back below");
                let (out, rest) = all.split_at(s.value_length);
                columns = Some(rest);
                tasks.push(Task {
                    v,
                    place: *place,
                    begin: base.split_off(head_len),
                    next: next
                        .as_mut()
                        .and_then(|heads| heads.split_off_mut(..head_len)),
                    saved: saved
                        .as_mut()
                        .and_then(|heads| heads.split_off_mut(..head_len))
                        .zip(saved_at),
                    out,
                });
            }
        }
        room.pool.for_each(tasks, |task| task.run(self, s, buffers));
    }

    /// Writes what the layer remembers beside the states: the rows behind which they are, and the log.
    fn keep(&self, place: &Place, memory: &mut Memory<'_>, new: &[f32], ba: &[Vec<f32>; 2]) {
        let s = self.sizes();
        let base_position = memory.base.position();
        let tail = |memory: &Memory<'_>, n_rows: usize| -> Vec<f32> {
            let mut tail = vec![0.0; (s.conv_kernel - 1) * s.n_channels];
            for (i, out) in tail.chunks_exact_mut(s.n_channels).enumerate() {
                if let Some(row) = raw(s, place, memory, new, n_rows + i) {
                    out.copy_from_slice(row);
                }
            }
            tail
        };
        let keep = |state: &mut LayerState, tail: &[f32], n_rows: usize| {
            state.tail.copy_from_slice(tail);
            state.position = base_position + n_rows;
        };
        if let Some((at, _)) = memory.saved {
            let n_rows = at - base_position;
            let tail = tail(memory, n_rows);
            if let Some((_, saved)) = &mut memory.saved {
                keep(saved, &tail, n_rows);
            }
        }
        if memory.next.is_some() {
            let tail = tail(memory, place.n_all());
            if let Some(next) = &mut memory.next {
                keep(next, &tail, place.n_all());
            }
            return;
        }
        if place.n_pending > 0 {
            let tail = tail(memory, place.n_pending);
            if let Base::Own(state) = &mut memory.base {
                keep(state, &tail, place.n_pending);
            }
        }
        let LogRows::Own(log) = &mut memory.log else {
            return;
        };
        debug_assert!(place.n_new <= LOG_ROWS);
        let rows = log
            .chunks_exact_mut(s.log_row)
            .zip(new.chunks_exact(s.n_channels));
        for (i, (log, new)) in rows.enumerate() {
            let (channels, gates) = log.split_at_mut(s.n_channels);
            channels.copy_from_slice(new);
            let (a, b) = gates.split_at_mut(s.n_value_heads);
            for (v, (a, b)) in a.iter_mut().zip(b).enumerate() {
                [*a, *b] = self.a_and_b(ba, place.first + i, v);
            }
        }
    }
}

/// What enters the convolution `conv_kernel - 1` rows before row `at` of a span's rows, the pending ones counted; `None`:
/// zeros.
fn raw<'a>(
    s: Sizes,
    place: &Place,
    memory: &'a Memory<'_>,
    new: &'a [f32],
    at: usize,
) -> Option<&'a [f32]> {
    let n_before = s.conv_kernel - 1;
    let (rows, at, row_len) = if at < n_before {
        (&memory.base.state()?.tail[..], at, s.n_channels)
    } else if at < n_before + place.n_pending {
        (memory.log.rows(), at - n_before, s.log_row)
    } else {
        (new, at - n_before - place.n_pending, s.n_channels)
    };
    Some(&rows[at * row_len..][..s.n_channels])
}

/// The state that a head begins with.
enum Begin<'a> {
    Zero,
    Shared(&'a [f32]),
    /// The pending rows are taken in there.
    Own(&'a mut [f32]),
}

impl<'a> Begin<'a> {
    fn of(base: &'a mut Base<'_>) -> Begin<'a> {
        match base {
            Base::Zero => Begin::Zero,
            Base::Shared(state) => Begin::Shared(&state.heads),
            Base::Own(state) => Begin::Own(&mut state.heads),
        }
    }

    /// The first `n` values.
    fn split_off(&mut self, n: usize) -> Begin<'a> {
        match self {
            Begin::Zero => Begin::Zero,
            Begin::Shared(heads) => Begin::Shared(heads.split_off(..n).unwrap_or_default()),
            Begin::Own(heads) => Begin::Own(heads.split_off_mut(..n).unwrap_or_default()),
        }
    }
}

/// A value head of a span.
struct Task<'a> {
    v: usize,
    place: Place,
    begin: Begin<'a>,
    /// Where the state behind all rows goes.
    next: Option<&'a mut [f32]>,
    /// Where the state behind so many rows goes.
    saved: Option<(&'a mut [f32], usize)>,
    /// `(n_new, value_length)`.
    out: Columns<'a>,
}

impl Task<'_> {
    fn run(mut self, net: &DeltaNet, s: Sizes, buffers: &Buffers) {
        let slab_len = s.key_length * SLAB;
        let keys_len = s.n_key_heads * s.key_length;
        let (key_head, _) = net.key_head(self.v);
        let Place {
            first,
            first_of_all,
            n_pending,
            n_new,
        } = self.place;
        let mut slab = vec![[0.0; SLAB]; s.key_length];
        for (i, first_column) in (0..s.value_length).step_by(SLAB).enumerate() {
            let within = i * slab_len..(i + 1) * slab_len;
            let width = SLAB.min(s.value_length - first_column);
            let values = slab.as_flattened_mut();
            match &self.begin {
                Begin::Zero => values.fill(0.0),
                Begin::Shared(heads) => values.copy_from_slice(&heads[within.clone()]),
                Begin::Own(heads) => values.copy_from_slice(&heads[within.clone()]),
            }
            for row in 0..n_pending + n_new {
                let channels = &buffers.convolved[(first_of_all + row) * s.n_channels..];
                let [decay, beta] = buffers.gates[(first_of_all + row) * s.n_value_heads + self.v];
                let key = key_head * s.key_length;
                let delta_row = DeltaRow {
                    query: &channels[key..][..s.key_length],
                    key: &channels[keys_len + key..][..s.key_length],
                    decay,
                    beta,
                };
                let value = 2 * keys_len + self.v * s.value_length + first_column;
                let (mut values, mut result) = ([0.0; SLAB], [0.0; SLAB]);
                match channels[value..].first_chunk() {
                    Some(whole) if width == SLAB => values = *whole,
                    _ => values[..width].copy_from_slice(&channels[value..][..width]),
                }
                quant::delta_rule(&mut slab, delta_row, &values, &mut result);
                if let Some(row) = row.checked_sub(n_pending) {
                    let out = &mut self.out.row_mut(row)[first_column..];
                    match out.first_chunk_mut() {
                        Some(whole) if width == SLAB => *whole = result,
                        _ => out[..width].copy_from_slice(&result[..width]),
                    }
                }
                let n_taken = row + 1;
                if let Begin::Own(heads) = &mut self.begin
                    && n_taken == n_pending
                {
                    heads[within.clone()].copy_from_slice(slab.as_flattened());
                }
                if let Some((heads, n_rows)) = &mut self.saved
                    && n_taken == *n_rows
                {
                    heads[within.clone()].copy_from_slice(slab.as_flattened());
                }
            }
            if let Some(heads) = &mut self.next {
                heads[within].copy_from_slice(slab.as_flattened());
            }
        }
        let width = s.n_value_heads * s.value_length;
        for row in 0..n_new {
            let out = self.out.row_mut(row);
            rms_norm_in_place(out, &net.norm, net.norm_eps);
            let z = &buffers.z[(first + row) * width + self.v * s.value_length..];
            for (out, z) in out.iter_mut().zip(z) {
                *out *= z;
            }
        }
    }
}
