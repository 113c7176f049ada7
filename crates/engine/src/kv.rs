//! The memory of attention: keys and values of the tokens that a sequence has seen, in pages.
//!
//! A page holds [`PAGE`] positions of all layers; a sequence is a list of pages and a length. Pages are counted
//! references: a fork shares them, and whoever writes to a shared one gets a copy of its own first. So a prefix is
//! reused by [`Sequence::fork`], and a step or a draft is undone by [`Sequence::truncate`]. A page's bytes are, with
//! W the width of a key head and V that of a value head,
//!
//! ```text
//! for each layer:  for each key/value head:  keys   (PAGE, W)   row-major, f16 or f32, little-endian
//!                  for each key/value head:  values (PAGE, V)   unless values are keys
//! ```
//!
//! so that a head's keys of a page are one matrix for `quant`. Layers have heads of their own numbers and widths, and
//! those that use another layer's keys, or have no attention, have no part of a page.
//!
//! Layers with a recurrent state remember in `state.rs`; what that takes is counted in pages too.
//!
//! Invariant: the pages of all sequences together never take more than the cache's ceiling; a sequence that would go
//! beyond gets [`OutOfPages`] and stays as it was. Left out: whose turn it is then, which is the scheduler's.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use quant::{BlockType, Matrix};
use vindex::{Config, Heads};

use crate::state::{Memory, StateShape, States};

/// Positions in a page.
pub const PAGE: usize = 64;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Half precision.
    #[default]
    F16,
    /// Single precision, twice as large.
    F32,
}

/// Neither `f16` nor `f32`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no type of keys and values; use f16 or f32")]
pub struct UnknownKvType(pub String);

impl std::str::FromStr for KvType {
    type Err = UnknownKvType;

    fn from_str(text: &str) -> Result<KvType, UnknownKvType> {
        match text {
            "f16" => Ok(KvType::F16),
            "f32" => Ok(KvType::F32),
            _ => Err(UnknownKvType(text.to_owned())),
        }
    }
}

impl KvType {
    pub(crate) fn block_type(self) -> BlockType {
        match self {
            KvType::F16 => BlockType::F16,
            KvType::F32 => BlockType::F32,
        }
    }

    /// Bytes of a value.
    pub fn value_bytes(self) -> usize {
        self.block_type().block_bytes()
    }
}

/// No page is left under the ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the KV cache has {n_free} of {n_pages} pages left and {n_needed} are needed")]
pub struct OutOfPages {
    /// Pages asked for.
    pub n_needed: usize,
    /// Pages that nobody uses.
    pub n_free: usize,
    /// Pages under the ceiling.
    pub n_pages: usize,
}

/// Where sequences take their pages from. A clone is another handle of the same cache.
#[derive(Clone, Debug)]
pub struct KvCache {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    shape: Shape,
    n_pages: usize,
    n_used: AtomicUsize,
}

/// What a page looks like.
#[derive(Debug)]
struct Shape {
    kv_type: KvType,
    /// One a layer: what it remembers, and where that begins in a page.
    layers: Vec<Option<(Kept, usize)>>,
    page_bytes: usize,
    /// Of layers that remember by a state.
    states: Option<StateShape>,
}

/// What a layer remembers of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) heads: Heads,
    /// Values are the keys, and lie there once.
    pub(crate) values_are_keys: bool,
}

impl Kept {
    /// Of layer `l`; `None` where it remembers nothing of its own.
    fn of(config: &Config, l: u32) -> Option<Kept> {
        (config.kv_layer(l) == Some(l)).then(|| Kept {
            heads: config.heads(l),
            values_are_keys: config.attention.latent.is_some(),
        })
    }

    /// A head's keys of a page.
    fn keys_bytes(self, kv_type: KvType) -> usize {
        PAGE * self.heads.key_length as usize * kv_type.value_bytes()
    }

    /// A head's values of a page.
    fn values_bytes(self, kv_type: KvType) -> usize {
        if self.values_are_keys {
            return 0;
        }
        PAGE * self.heads.value_length as usize * kv_type.value_bytes()
    }

    fn all_keys_bytes(self, kv_type: KvType) -> usize {
        self.heads.n_kv_heads as usize * self.keys_bytes(kv_type)
    }

    fn bytes(self, kv_type: KvType) -> usize {
        let values = self.heads.n_kv_heads as usize * self.values_bytes(kv_type);
        self.all_keys_bytes(kv_type) + values
    }
}

impl Shape {
    fn of(config: &Config, kv_type: KvType) -> Shape {
        let layers = (0..config.n_layers).map(|l| Kept::of(config, l));
        Shape::new(kv_type, layers, StateShape::of(config))
    }

    fn new(
        kv_type: KvType,
        layers: impl Iterator<Item = Option<Kept>>,
        states: Option<StateShape>,
    ) -> Shape {
        let mut page_bytes = 0;
        let layers = layers.map(|kept| {
            let kept = kept?;
            let start = page_bytes;
            page_bytes += kept.bytes(kv_type);
            Some((kept, start))
        });
        let layers = layers.collect();
        Shape {
            kv_type,
            layers,
            // Where nothing is remembered by position, pages are what states are counted in.
            page_bytes: if page_bytes == 0 { 1 << 12 } else { page_bytes },
            states,
        }
    }

    /// Pages that a state takes, and a log.
    fn state_pages(&self) -> (usize, usize) {
        let pages = |bytes: usize| bytes.div_ceil(self.page_bytes);
        self.states.as_ref().map_or((0, 0), |states| {
            (pages(states.state_bytes()), pages(states.log_bytes()))
        })
    }

    /// Pages that a sequence takes however many tokens it has: its state, the one that a step writes, and the log.
    fn fixed_pages(&self) -> usize {
        let (state, log) = self.state_pages();
        2 * state + log
    }

    /// Whether it is that of a model with these numbers.
    fn is_of(&self, config: &Config) -> bool {
        let own = self.layers.iter().map(|layer| layer.map(|(kept, _)| kept));
        let net = config.delta_net.as_ref();
        let net = net.filter(|_| (0..config.n_layers).any(|l| config.is_recurrent(l)));
        own.eq((0..config.n_layers).map(|l| Kept::of(config, l)))
            && self.states.as_ref().map(|states| &states.net) == net
    }

    fn layer(&self, layer: usize) -> (Kept, usize) {
        self.layers[layer].expect("a layer that remembers")
    }
}

impl KvCache {
    /// A cache for the model with these numbers that takes at most `ceiling_bytes`, but at least one page. Memory is
    /// taken as it is needed.
    pub fn new(config: &Config, kv_type: KvType, ceiling_bytes: u64) -> KvCache {
        KvCache::of_shape(Shape::of(config, kv_type), ceiling_bytes)
    }

    /// The same for layers that all have these heads.
    pub(crate) fn of_heads(
        kv_type: KvType,
        n_layers: usize,
        heads: Heads,
        ceiling_bytes: u64,
    ) -> KvCache {
        let kept = Kept {
            heads,
            values_are_keys: false,
        };
        let shape = Shape::new(kv_type, (0..n_layers).map(|_| Some(kept)), None);
        KvCache::of_shape(shape, ceiling_bytes)
    }

    fn of_shape(shape: Shape, ceiling_bytes: u64) -> KvCache {
        let n_pages = ceiling_bytes / shape.page_bytes as u64;
        let n_pages_min = 1 + shape.fixed_pages();
        KvCache {
            shared: Arc::new(Shared {
                shape,
                n_pages: usize::try_from(n_pages)
                    .unwrap_or(usize::MAX)
                    .max(n_pages_min),
                n_used: AtomicUsize::new(0),
            }),
        }
    }

    /// Bytes that `n_tokens` of one sequence take: their pages, and what layers with a state take for it in any case.
    pub fn bytes_for(config: &Config, kv_type: KvType, n_tokens: usize) -> u64 {
        let shape = Shape::of(config, kv_type);
        let n_pages = n_tokens.div_ceil(PAGE) + shape.fixed_pages();
        (n_pages as u64).saturating_mul(shape.page_bytes as u64)
    }

    /// Bytes of a page of a cache for the model with these numbers.
    pub fn page_bytes_for(config: &Config, kv_type: KvType) -> usize {
        Shape::of(config, kv_type).page_bytes
    }

    /// Pages that a sequence takes however many tokens it has: for states, where layers have some.
    pub fn n_pages_fixed(&self) -> usize {
        self.shared.shape.fixed_pages()
    }

    /// Tokens of one sequence that fit when there is no other.
    pub fn n_tokens_max(&self) -> usize {
        (self.n_pages() - self.n_pages_fixed()).saturating_mul(PAGE)
    }

    /// How the cache stores.
    pub fn kv_type(&self) -> KvType {
        self.shared.shape.kv_type
    }

    /// Pages under the ceiling.
    pub fn n_pages(&self) -> usize {
        self.shared.n_pages
    }

    /// Pages that nobody uses.
    pub fn n_free(&self) -> usize {
        let n_used = self.shared.n_used.load(Ordering::Relaxed);
        self.shared.n_pages.saturating_sub(n_used)
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.shared.shape.page_bytes
    }

    /// A sequence without tokens; it holds no page yet.
    pub fn sequence(&self) -> Sequence {
        Sequence {
            cache: self.clone(),
            pages: Vec::new(),
            states: States::new(),
            len: 0,
        }
    }

    /// Takes `n_needed` pages or none.
    fn take(&self, n_needed: usize) -> Result<(), OutOfPages> {
        let n_pages = self.shared.n_pages;
        let taken =
            self.shared
                .n_used
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n_used| {
                    n_used.checked_add(n_needed).filter(|&n| n <= n_pages)
                });
        taken.map(drop).map_err(|n_used| OutOfPages {
            n_needed,
            n_free: n_pages.saturating_sub(n_used),
            n_pages,
        })
    }

    /// A page of zeros; it was taken before.
    fn page(&self) -> Page {
        Page {
            // The system gives such memory without touching it.
            bytes: vec![0; self.shared.shape.page_bytes],
            _taken: self.taken(1),
        }
    }

    /// That `n_pages` are in use, which were taken before.
    fn taken(&self, n_pages: usize) -> Taken {
        Taken {
            shared: Arc::clone(&self.shared),
            n_pages,
        }
    }
}

#[derive(Debug)]
struct Page {
    bytes: Vec<u8>,
    _taken: Taken,
}

/// That so many pages are in use.
#[derive(Debug)]
pub(crate) struct Taken {
    shared: Arc<Shared>,
    n_pages: usize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.shared
            .n_used
            .fetch_sub(self.n_pages, Ordering::Relaxed);
    }
}

/// The tokens that attention remembers of one text.
#[derive(Debug)]
pub struct Sequence {
    cache: KvCache,
    /// `len` positions lie in the first pages; there may be reserved ones after them.
    pages: Vec<Arc<Page>>,
    states: States,
    len: usize,
}

impl Sequence {
    /// Tokens remembered.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is remembered.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the cache was made for a model with these numbers.
    pub(crate) fn is_of(&self, config: &Config) -> bool {
        self.cache.shared.shape.is_of(config)
    }

    /// How keys and values are stored.
    pub(crate) fn block_type(&self) -> BlockType {
        self.cache.kv_type().block_type()
    }

    /// Pages held, shared ones included.
    pub fn n_pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages that must be free before `n_tokens` more can be taken in.
    pub fn n_pages_needed(&self, n_tokens: usize) -> usize {
        self.pages_needed(n_tokens) + self.state_pages_needed(n_tokens)
    }

    fn pages_needed(&self, n_tokens: usize) -> usize {
        if n_tokens == 0 {
            return 0;
        }
        let n_copies = self.shared_tail(n_tokens).count();
        n_copies
            + (self.len + n_tokens)
                .div_ceil(PAGE)
                .saturating_sub(self.pages.len())
    }

    fn state_pages_needed(&self, n_tokens: usize) -> usize {
        let shape = &self.cache.shared.shape;
        if n_tokens == 0 || shape.states.is_none() {
            return 0;
        }
        let (n_states, n_logs) = self.states.needed(self.len, n_tokens);
        let (state_pages, log_pages) = shape.state_pages();
        n_states * state_pages + n_logs * log_pages
    }

    /// The greatest number of tokens up to `len` with which a fork or a truncation of this sequence can go on: `len`
    /// itself where all layers have attention. A state can go back no further than to what was certain before the last
    /// step, or to a copy that was saved at the end of a page.
    ///
    /// # Panics
    /// When there are fewer tokens.
    pub fn reusable(&self, len: usize) -> usize {
        assert!(len <= self.len, "{len} of {} tokens", self.len);
        match self.cache.shared.shape.states {
            None => len,
            Some(_) => self.states.reusable(len),
        }
    }

    /// A sequence with the same first [`Sequence::reusable`] tokens of `len`, which shares the pages.
    ///
    /// # Panics
    /// When there are fewer tokens.
    pub fn fork(&self, len: usize) -> Sequence {
        let len = self.reusable(len);
        Sequence {
            cache: self.cache.clone(),
            pages: self.pages[..len.div_ceil(PAGE)].to_vec(),
            states: self.states.fork(len),
            len,
        }
    }

    /// Forgets all but the first [`Sequence::reusable`] tokens of `len`, and gives back the pages that are not needed
    /// then.
    ///
    /// # Panics
    /// When there are fewer tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.reusable(len);
        self.states.truncate(self.len);
        self.pages.truncate(self.len.div_ceil(PAGE));
    }

    /// Gives up what only helps others, or this sequence when it is truncated: the copies of states. False when there is
    /// none.
    pub(crate) fn forget_saved(&mut self) -> bool {
        self.states.forget_saved()
    }

    /// Makes room for `n_tokens` more; they are not remembered before [`Sequence::advance`]. Gives up copies of its own
    /// states where there is no room beside them.
    ///
    /// # Errors
    /// [`OutOfPages`]; the sequence is as it was.
    pub(crate) fn reserve(&mut self, n_tokens: usize) -> Result<(), OutOfPages> {
        let taken = self.cache.take(self.n_pages_needed(n_tokens));
        if taken.is_err() && self.forget_saved() {
            self.cache.take(self.n_pages_needed(n_tokens))?;
        } else {
            taken?;
        }
        let n_pages = self.pages_needed(n_tokens);
        let shared: Vec<usize> = match n_pages {
            0 => Vec::new(),
            _ => self.shared_tail(n_tokens).collect(),
        };
        for &i in &shared {
            let mut copy = self.cache.page();
            copy.bytes.copy_from_slice(&self.pages[i].bytes);
            self.pages[i] = Arc::new(copy);
        }
        for _ in shared.len()..n_pages {
            self.pages.push(Arc::new(self.cache.page()));
        }
        let cache = &self.cache;
        if let Some(shape) = &cache.shared.shape.states {
            let (state, log) = cache.shared.shape.state_pages();
            let step = (self.len, n_tokens);
            let (state, log) = (|| cache.taken(state), || cache.taken(log));
            self.states.reserve(shape, step, state, log);
        }
        Ok(())
    }

    /// Makes room for a copy of the state that a step of `n_tokens`, which were reserved, passes at the end of a page,
    /// if there is any.
    pub(crate) fn reserve_saved(&mut self, n_tokens: usize) {
        let cache = &self.cache;
        if let Some(shape) = &cache.shared.shape.states {
            let (state, _) = cache.shared.shape.state_pages();
            let take = || cache.take(state).is_ok().then(|| cache.taken(state));
            self.states.reserve_saved(shape, (self.len, n_tokens), take);
        }
    }

    /// The reserved tokens are written in all layers.
    pub(crate) fn advance(&mut self, n_tokens: usize) {
        self.len += n_tokens;
        self.states.advance();
        debug_assert!(self.len <= self.pages.len() * PAGE);
    }

    /// Gives back what was reserved.
    pub(crate) fn unreserve(&mut self) {
        self.states.unreserve();
        self.pages.truncate(self.len.div_ceil(PAGE));
    }

    /// What a layer with a state remembers, for the step that was reserved.
    pub(crate) fn memory(&mut self, layer: usize) -> Memory<'_> {
        let shape = self.cache.shared.shape.states.as_ref();
        let shape = shape.expect("the model has states");
        self.states.layer(shape, layer)
    }

    /// The pages that `n_tokens` more are written to and that others have too.
    fn shared_tail(&self, n_tokens: usize) -> impl Iterator<Item = usize> {
        let end = (self.len + n_tokens).div_ceil(PAGE).min(self.pages.len());
        (self.len / PAGE..end).filter(|&i| Arc::strong_count(&self.pages[i]) > 1)
    }

    /// The keys of a head in page `page` of a layer, `(n_positions, key_length)`.
    pub(crate) fn keys(
        &self,
        layer: usize,
        page: usize,
        head: usize,
        n_positions: usize,
    ) -> Matrix<'_> {
        let (kept, start) = self.cache.shared.shape.layer(layer);
        let start = start + head * kept.keys_bytes(self.cache.kv_type());
        self.matrix(page, start, n_positions, kept.heads.key_length as usize)
    }

    /// The values of a head at some positions of page `page` of a layer, `(positions, value_length)`; where values are
    /// keys, `(positions, key_length)`.
    pub(crate) fn values(
        &self,
        layer: usize,
        page: usize,
        head: usize,
        positions: Range<usize>,
    ) -> Matrix<'_> {
        let kv_type = self.cache.kv_type();
        let (kept, start) = self.cache.shared.shape.layer(layer);
        let (start, width) = match kept.values_are_keys {
            true => (
                start + head * kept.keys_bytes(kv_type),
                kept.heads.key_length,
            ),
            false => (
                start + kept.all_keys_bytes(kv_type) + head * kept.values_bytes(kv_type),
                kept.heads.value_length,
            ),
        };
        let width = width as usize;
        let start = start + positions.start * width * kv_type.value_bytes();
        self.matrix(page, start, positions.len(), width)
    }

    fn matrix(&self, page: usize, start: usize, n_rows: usize, n_cols: usize) -> Matrix<'_> {
        let kv_type = self.cache.kv_type();
        Matrix {
            block_type: kv_type.block_type(),
            n_rows,
            n_cols,
            bytes: &self.pages[page].bytes[start..][..n_rows * n_cols * kv_type.value_bytes()],
        }
    }

    /// Where `n_tokens` more, which were reserved, are written in a layer: a window for each page that they touch.
    pub(crate) fn windows(
        &mut self,
        layer: usize,
        n_tokens: usize,
    ) -> impl Iterator<Item = Window<'_>> {
        let kv_type = self.cache.kv_type();
        let (kept, start) = self.cache.shared.shape.layer(layer);
        let (begin, end) = (self.len, self.len + n_tokens);
        let first_page = begin / PAGE;
        let pages = self.pages[first_page..end.div_ceil(PAGE)].iter_mut();
        pages.enumerate().map(move |(i, page)| {
            let page_start = (first_page + i) * PAGE;
            let page = Arc::get_mut(page).expect("reserved pages are not shared");
            let bytes = &mut page.bytes[start..][..kept.bytes(kv_type)];
            let (keys, values) = bytes.split_at_mut(kept.all_keys_bytes(kv_type));
            Window {
                keys,
                values,
                kv_type,
                kept,
                positions: begin.max(page_start) - page_start
                    ..end.min(page_start + PAGE) - page_start,
            }
        })
    }
}

/// The part of a page that a step writes in a layer.
pub(crate) struct Window<'a> {
    keys: &'a mut [u8],
    values: &'a mut [u8],
    kv_type: KvType,
    kept: Kept,
    /// Within the page.
    pub(crate) positions: Range<usize>,
}

impl Window<'_> {
    /// Writes a position of the page: `keys` are (n_kv_heads, key_length), `values` (n_kv_heads, value_length). Where
    /// values are keys, none are looked at.
    pub(crate) fn write(&mut self, position: usize, keys: &[f32], values: &[f32]) {
        let (kv_type, kept) = (self.kv_type, self.kept);
        let store = |page: &mut [u8], rows: &[f32], length: u32, head_bytes: usize| {
            let row_bytes = head_bytes / PAGE;
            for (head, row) in rows.chunks_exact(length as usize).enumerate() {
                let target = &mut page[head * head_bytes + position * row_bytes..][..row_bytes];
                quant::encode(kv_type.block_type(), row, target);
            }
        };
        let Heads {
            key_length,
            value_length,
            ..
        } = kept.heads;
        store(self.keys, keys, key_length, kept.keys_bytes(kv_type));
        if !kept.values_are_keys {
            store(
                self.values,
                values,
                value_length,
                kept.values_bytes(kv_type),
            );
        }
    }
}
