//! Guesses for some texts at once: by a head, or by another model of the same tokens.
//!
//! Guesses are made depth by depth, the first of all texts in one pass, then the second of those that want one, and so
//! on. A text that is drawn from has its guesses drawn with the random numbers and the settings of the tokens they stand for.
//!
//! Invariant: whatever goes wrong, the worst is that nothing is guessed; what is remembered stays right.

use std::sync::Arc;
use std::time::Instant;

use quant::Activations;

use super::depth::Costs;
use super::head::{Head, HeadPass, HeadWork};
use super::memory::{Memory, Pairs, Taken};
use super::{Assistant, Drafts};
use crate::forward::{Forward, Wanted, Work};
use crate::kv::{KvCache, KvType};
use crate::model::Model;
use crate::rows::{fill, multiply, sized, softcap};
use crate::sampler::{Sampler, most_likely};
use crate::threads::Pool;

/// Rows that are taken in together.
const CHUNK: usize = 256;

/// A text for which tokens are guessed.
pub(crate) struct Asked<'a> {
    /// All that is certain.
    pub(crate) tokens: &'a [u32],
    pub(crate) memory: &'a mut Memory,
    /// How many are wanted.
    pub(crate) depth: usize,
    /// What will choose the tokens; `None`: the most likely are taken.
    pub(crate) sampler: Option<Sampler>,
    /// Where they go.
    pub(crate) drafted: &'a mut Vec<u32>,
}

impl Asked<'_> {
    /// Guesses a token from its logits.
    fn guess(&mut self, logits: &mut [f32]) {
        let id = match &mut self.sampler {
            None => most_likely(logits),
            Some(sampler) => {
                sampler.adjust(logits);
                sampler.choose(logits)
            }
        };
        match id {
            Some(id) => {
                if let Some(sampler) = &mut self.sampler {
                    sampler.accept(id);
                }
                self.drafted.push(id);
            }
            None => self.depth = 0,
        }
    }

    /// Whether it wants a guess behind `n` others.
    fn wants(&self, n: usize) -> bool {
        self.depth > n && self.drafted.len() == n
    }
}

/// Whoever guesses by computing.
pub(crate) enum Drafter {
    Head(Box<HeadDrafter>),
    Model(Box<ModelDrafter>),
}

impl Drafter {
    /// For `drafts` that compute. There are pages for as many tokens as the model's cache has with `n_pages`, and
    /// `fixed` bytes for what texts take in any case.
    pub(crate) fn of(
        drafts: &Drafts,
        model: &Arc<Model>,
        pool: &Arc<Pool>,
        kv_type: KvType,
        (n_pages, fixed): (usize, u64),
    ) -> Option<Drafter> {
        let ceiling = |one: &KvCache| one.page_bytes() as u64 * n_pages as u64;
        match drafts {
            Drafts::None | Drafts::NGram => None,
            Drafts::Head(head) => {
                let ceiling = ceiling(&head.cache(kv_type, 0));
                Some(Drafter::Head(Box::new(HeadDrafter {
                    cache: head.cache(kv_type, ceiling),
                    pass: HeadPass::new(Arc::clone(head), Arc::clone(pool)),
                    head: Arc::clone(head),
                    model: Arc::clone(model),
                    pool: Arc::clone(pool),
                    buffers: Buffers::default(),
                })))
            }
            Drafts::Model(Assistant { model, ffn }) => {
                let config = model.config();
                let ceiling = ceiling(&KvCache::new(config, kv_type, 0)).saturating_add(fixed);
                Some(Drafter::Model(Box::new(ModelDrafter {
                    cache: KvCache::new(config, kv_type, ceiling),
                    forward: Forward::new(Arc::clone(model), Arc::clone(pool), Arc::clone(ffn)),
                })))
            }
        }
    }

    /// Guesses for all of `asked`, and measures what passes take.
    pub(crate) fn draft(&mut self, asked: &mut [Asked<'_>], costs: &mut Costs) {
        match self {
            Drafter::Head(head) => head.draft(asked, costs),
            Drafter::Model(model) => model.draft(asked, costs),
        }
    }
}

/// Guesses by a head.
pub(crate) struct HeadDrafter {
    head: Arc<Head>,
    pass: HeadPass,
    model: Arc<Model>,
    pool: Arc<Pool>,
    cache: KvCache,
    buffers: Buffers,
}

#[derive(Default)]
struct Buffers {
    /// `(rows of a pass, hidden)`.
    embedded: Vec<f32>,
    /// `(texts, hidden)`: the head's stream behind the last guess of each.
    streams: Vec<f32>,
    /// `(texts of a pass, hidden)`: what enters the output head.
    last: Vec<f32>,
    /// `(texts of a pass, vocab)`.
    logits: Vec<f32>,
    activations: Activations,
}

impl HeadDrafter {
    /// Width of hidden states.
    pub(crate) fn hidden(&self) -> usize {
        self.head.hidden()
    }

    /// What is remembered of a new text.
    pub(crate) fn pairs(&self) -> Pairs {
        Pairs::new(&self.cache, self.head.hidden())
    }

    fn draft(&mut self, asked: &mut [Asked<'_>], costs: &mut Costs) {
        for one in asked.iter_mut() {
            let is_ready = match &*one.memory {
                Memory::Head(pairs) => pairs.n_behind() > 0 && pairs.end() + 1 == one.tokens.len(),
                _ => false,
            };
            if !is_ready {
                one.depth = 0;
            }
            if one.depth > 0
                && let Memory::Head(pairs) = &mut *one.memory
            {
                self.catch_up(one.tokens, pairs, CHUNK);
            }
        }
        let hidden = self.head.hidden();
        sized(&mut self.buffers.streams, asked.len() * hidden);
        let mut n_certain = vec![0; asked.len()];
        for depth in 0.. {
            let wanting = |one: &Asked<'_>| one.wants(depth);
            if !asked.iter().any(wanting) {
                break;
            }
            let started = Instant::now();
            let Some(n_rows) = self.guess(asked, depth, &mut n_certain) else {
                break;
            };
            costs.measure(n_rows, started.elapsed().as_secs_f64());
        }
        for (one, n_certain) in asked.iter_mut().zip(n_certain) {
            if let Memory::Head(pairs) = &mut *one.memory
                && pairs.sequence.len() > n_certain
                && n_certain > 0
            {
                pairs.sequence.truncate(n_certain);
            }
        }
    }

    /// Takes in pairs of a text until at most `n_left` wait.
    pub(crate) fn catch_up(&mut self, tokens: &[u32], pairs: &mut Pairs, n_left: usize) {
        let hidden = self.head.hidden();
        while pairs.n_behind() > n_left {
            let n = CHUNK.min(pairs.n_behind() - n_left);
            let next = pairs.end() - pairs.n_behind() + 1;
            if next + n > tokens.len() {
                return;
            }
            let embedded = sized(&mut self.buffers.embedded, n * hidden);
            embed(&self.head, &self.model, &tokens[next..next + n], embedded);
            let (states, _) = pairs.behind.split_at(n * hidden);
            let work = HeadWork {
                sequence: &mut pairs.sequence,
                hidden: states,
                embedded,
            };
            if self.pass.step(&mut [work]).is_err() {
                pairs.forget(n_left);
                return;
            }
            pairs.behind.drain(..n * hidden);
        }
    }

    /// One more guess for those that want one. Gives the rows of the pass, or nothing when it failed.
    fn guess(
        &mut self,
        asked: &mut [Asked<'_>],
        depth: usize,
        n_certain: &mut [usize],
    ) -> Option<usize> {
        let HeadDrafter {
            head,
            pass,
            model,
            pool,
            buffers,
            ..
        } = self;
        let hidden = head.hidden();
        let mut ids = Vec::new();
        for one in asked.iter().filter(|one| one.wants(depth)) {
            match (&*one.memory, one.drafted.last()) {
                (_, Some(&guess)) if depth > 0 => ids.push(guess),
                (Memory::Head(pairs), _) => {
                    ids.extend_from_slice(&one.tokens[one.tokens.len() - pairs.n_behind()..]);
                }
                _ => {}
            }
        }
        let embedded = sized(&mut buffers.embedded, ids.len() * hidden);
        embed(head, model, &ids, embedded);
        let mut rest = &*embedded;
        let streams = &buffers.streams;
        let mut works = Vec::new();
        // Of each that guesses: which of `asked` it is, and its last row.
        let mut guessing = Vec::new();
        let mut n_rows = 0;
        for (i, one) in asked.iter_mut().enumerate() {
            if !one.wants(depth) {
                continue;
            }
            let Memory::Head(pairs) = &mut *one.memory else {
                continue;
            };
            let states = match depth {
                0 => &pairs.behind[..],
                _ => &streams[i * hidden..][..hidden],
            };
            n_rows += states.len() / hidden;
            guessing.push((i, n_rows - 1));
            works.push(HeadWork {
                sequence: &mut pairs.sequence,
                hidden: states,
                embedded: rest.split_off(..states.len()).unwrap_or_default(),
            });
        }
        let failed = pass.step(&mut works).is_err();
        drop(works);
        if failed {
            for one in asked.iter_mut() {
                one.depth = 0;
                if let Memory::Head(pairs) = &mut *one.memory
                    && depth == 0
                {
                    pairs.forget(CHUNK);
                }
            }
            return None;
        }
        let last = sized(&mut buffers.last, guessing.len() * hidden);
        for (&(i, row), last) in guessing.iter().zip(last.chunks_exact_mut(hidden)) {
            last.copy_from_slice(&pass.normed()[row * hidden..][..hidden]);
            let stream = &pass.hidden()[row * hidden..][..hidden];
            buffers.streams[i * hidden..][..hidden].copy_from_slice(stream);
            if let (0, Memory::Head(pairs)) = (depth, &mut *asked[i].memory) {
                pairs.behind.clear();
                n_certain[i] = pairs.sequence.len();
            }
        }
        let own = head.output();
        let w = own.unwrap_or_else(|| model.head.matrix(model.vindex()));
        fill(
            &mut buffers.activations,
            last,
            hidden,
            &[w.block_type],
            pool,
        );
        let n_vocab = w.n_rows;
        let logits = sized(&mut buffers.logits, guessing.len() * n_vocab);
        multiply(w, buffers.activations.all(), logits, pool);
        if let Some(cap) = model.config().logit_softcap {
            softcap(logits, cap);
        }
        for (&(i, _), logits) in guessing.iter().zip(logits.chunks_exact_mut(n_vocab)) {
            asked[i].guess(logits);
        }
        Some(n_rows)
    }
}

/// Embeddings of tokens, as the model's first layer takes them.
fn embed(head: &Head, model: &Model, ids: &[u32], out: &mut [f32]) {
    let own = head.embeddings();
    let w = own.unwrap_or_else(|| model.embeddings.matrix(model.vindex()));
    let row_bytes = w.bytes.len() / w.n_rows;
    let scale = model.config().embedding_scale;
    for (row, &id) in out.chunks_exact_mut(w.n_cols).zip(ids) {
        quant::decode(
            w.block_type,
            &w.bytes[id as usize * row_bytes..][..row_bytes],
            row,
        );
        row.iter_mut().for_each(|x| *x *= scale);
    }
}

/// Guesses by another model.
pub(crate) struct ModelDrafter {
    forward: Forward,
    cache: KvCache,
}

impl ModelDrafter {
    fn draft(&mut self, asked: &mut [Asked<'_>], costs: &mut Costs) {
        for one in asked.iter_mut().filter(|one| one.depth > 0) {
            let taken = match std::mem::take(one.memory) {
                Memory::Model(mut taken) => {
                    let pairs = taken.tokens.iter().zip(one.tokens);
                    let n_same = pairs.take_while(|(a, b)| a == b).count();
                    // After the last token logits are wanted.
                    let n = n_same.min(one.tokens.len() - 1);
                    taken.sequence.truncate(n);
                    taken.tokens.truncate(taken.sequence.len());
                    taken
                }
                _ => Taken {
                    sequence: self.cache.sequence(),
                    tokens: Vec::new(),
                },
            };
            *one.memory = Memory::Model(taken);
        }
        for depth in 0.. {
            let started = Instant::now();
            match self.guess(asked, depth) {
                Some(n_rows @ 1..) => costs.measure(n_rows, started.elapsed().as_secs_f64()),
                _ => break,
            }
        }
    }

    /// One more guess for those that want one. Gives the rows of the pass, or nothing when it failed.
    fn guess(&mut self, asked: &mut [Asked<'_>], depth: usize) -> Option<usize> {
        let mut works = Vec::new();
        for one in asked.iter_mut().filter(|one| one.wants(depth)) {
            let Memory::Model(Taken { sequence, tokens }) = &mut *one.memory else {
                continue;
            };
            let n_before = tokens.len();
            match one.drafted.last() {
                Some(&guess) if depth > 0 => tokens.push(guess),
                _ => tokens.extend_from_slice(&one.tokens[n_before..]),
            }
            works.push(Work {
                sequence,
                tokens: &tokens[n_before..],
                logits: Wanted::Last,
            });
        }
        let n_rows: usize = works.iter().map(|work| work.tokens.len()).sum();
        if works.is_empty() {
            return None;
        }
        let stepped = match n_rows > CHUNK {
            true => in_chunks(&mut self.forward, &mut works),
            false => self.forward.step(&mut works).map(<[f32]>::to_vec),
        };
        drop(works);
        let Ok(mut logits) = stepped else {
            for one in asked.iter_mut() {
                one.depth = 0;
                *one.memory = Memory::None;
            }
            return None;
        };
        let n_vocab = self.forward.model().config().vocab as usize;
        let guessing = asked.iter_mut().filter(|one| one.wants(depth));
        for (one, logits) in guessing.zip(logits.chunks_exact_mut(n_vocab)) {
            one.guess(logits);
        }
        Some(n_rows)
    }
}

/// One work after the other, in pieces.
fn in_chunks(
    forward: &mut Forward,
    works: &mut [Work<'_>],
) -> Result<Vec<f32>, crate::forward::StepError> {
    let mut logits = Vec::new();
    for work in works {
        let n_chunks = work.tokens.len().div_ceil(CHUNK);
        for (i, tokens) in work.tokens.chunks(CHUNK).enumerate() {
            let is_last = i + 1 == n_chunks;
            let piece = Work {
                sequence: &mut *work.sequence,
                tokens,
                logits: if is_last {
                    Wanted::Last
                } else {
                    Wanted::Nothing
                },
            };
            logits.extend_from_slice(forward.step(&mut [piece])?);
        }
    }
    Ok(logits)
}

/// Pages that a drafter needs beside the model's, in bytes for each of those.
pub(crate) fn page_bytes(drafts: &Drafts, kv_type: KvType) -> usize {
    match drafts {
        Drafts::None | Drafts::NGram => 0,
        Drafts::Head(head) => head.cache(kv_type, 0).page_bytes(),
        Drafts::Model(Assistant { model, .. }) => KvCache::page_bytes_for(model.config(), kv_type),
    }
}

/// Bytes that a drafter needs for each text, however long it is.
pub(crate) fn fixed_bytes(drafts: &Drafts, kv_type: KvType) -> u64 {
    match drafts {
        Drafts::Model(Assistant { model, .. }) => KvCache::bytes_for(model.config(), kv_type, 0),
        _ => 0,
    }
}
