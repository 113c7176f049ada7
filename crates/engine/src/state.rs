//! What layers with a recurrent state remember of a sequence: the state behind some token, and the rows since.
//!
//! Keys and values of a token can be forgotten; what a state has taken in cannot be taken out again. So a step of few rows
//! leaves the state where it was, behind the tokens that were certain before the step, and writes what it would have taken
//! in to a *log*; the next step first brings the state up to what is certain by then. Guesses that were wrong, and a step
//! that failed, are undone by forgetting rows of the log. A step of many rows, which a prompt is read in, writes a new state
//! beside the old one. At the ends of some pages a copy is *saved*, from which other sequences, or this one when it is
//! truncated so far, go on.
//!
//! ```text
//! positions   0 ........ 64 ....... 128 ..................... base ....... len
//!                        saved      saved                     state        log: one row each
//! ```
//!
//! Bringing a state up to date is the same computation as before, row by row, so that nothing changes a bit. After a
//! failed step layers may be at different positions; each keeps its own.
//!
//! Invariant: states and logs are counted in pages under the cache's ceiling. Copies are saved only in memory that nobody
//! needs, and are the first to be given up. Left out: what a row does to a state (`mixer/delta_net.rs`).

use std::sync::Arc;

use quant::SLAB;
use vindex::{Config, DeltaNet};

use crate::draft::DRAFT_DEPTH_MAX;
use crate::kv::{PAGE, Taken};

/// Rows of a log: as many as a step with guesses has.
pub(crate) const LOG_ROWS: usize = 1 + DRAFT_DEPTH_MAX;

/// Copies that a sequence saves at once.
const SAVED_MAX: usize = 4;

/// The states of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateShape {
    pub(crate) net: DeltaNet,
    /// By layer: which of the layers with a state it is.
    order: Vec<Option<usize>>,
}

impl StateShape {
    /// `None` when no layer has a state.
    pub(crate) fn of(config: &Config) -> Option<StateShape> {
        let net = config.delta_net.clone()?;
        let mut n = 0;
        let order = (0..config.n_layers).map(|l| {
            config.is_recurrent(l).then(|| {
                n += 1;
                n - 1
            })
        });
        let order: Vec<_> = order.collect();
        (n > 0).then_some(StateShape { net, order })
    }

    fn n_layers(&self) -> usize {
        self.order.iter().flatten().count()
    }

    /// Values of one head's state: slabs of [`SLAB`] columns, `(key_length, SLAB)` each.
    pub(crate) fn head_len(&self) -> usize {
        let n_slabs = (self.net.value_length as usize).div_ceil(SLAB);
        n_slabs * self.net.key_length as usize * SLAB
    }

    /// Values of a row that enter the convolution: queries and keys of the key heads, values of the value heads.
    pub(crate) fn n_channels(&self) -> usize {
        let net = &self.net;
        let keys = 2 * net.n_key_heads as usize * net.key_length as usize;
        keys + net.n_value_heads as usize * net.value_length as usize
    }

    /// Values of a row in the log: its channels, then `a` and `b` of each value head.
    pub(crate) fn log_row_len(&self) -> usize {
        self.n_channels() + 2 * self.net.n_value_heads as usize
    }

    fn heads_len(&self) -> usize {
        self.net.n_value_heads as usize * self.head_len()
    }

    fn tail_len(&self) -> usize {
        (self.net.conv_kernel as usize).saturating_sub(1) * self.n_channels()
    }

    /// Bytes of the states of all layers.
    pub(crate) fn state_bytes(&self) -> usize {
        self.n_layers() * (self.heads_len() + self.tail_len()) * size_of::<f32>()
    }

    /// Bytes of the logs of all layers.
    pub(crate) fn log_bytes(&self) -> usize {
        self.n_layers() * LOG_ROWS * self.log_row_len() * size_of::<f32>()
    }
}

/// The state of a layer behind a token.
#[derive(Clone, Debug)]
pub(crate) struct LayerState {
    /// Tokens taken in.
    pub(crate) position: usize,
    /// `(n_value_heads, head_len)`.
    pub(crate) heads: Vec<f32>,
    /// `(conv_kernel - 1, n_channels)`: the last rows that entered the convolution.
    pub(crate) tail: Vec<f32>,
}

/// The states of all layers.
#[derive(Debug)]
struct State {
    layers: Vec<LayerState>,
    _taken: Taken,
}

impl State {
    fn zero(shape: &StateShape, taken: Taken) -> State {
        let layer = || LayerState {
            position: 0,
            heads: vec![0.0; shape.heads_len()],
            tail: vec![0.0; shape.tail_len()],
        };
        State {
            layers: std::iter::repeat_with(layer)
                .take(shape.n_layers())
                .collect(),
            _taken: taken,
        }
    }

    fn copy(&self, taken: Taken) -> State {
        State {
            layers: self.layers.clone(),
            _taken: taken,
        }
    }
}

/// The logs of all layers.
#[derive(Debug)]
struct Log {
    /// `(LOG_ROWS, log_row_len)` each; row 0 belongs to the position at which the layer's state is.
    layers: Vec<Vec<f32>>,
    _taken: Taken,
}

/// What a sequence remembers in states.
#[derive(Debug)]
pub(crate) struct States {
    /// `None`: behind no token.
    base: Option<Arc<State>>,
    log: Option<Arc<Log>>,
    /// At ends of pages, the first one first.
    saved: Vec<(usize, Arc<State>)>,
    /// What a step writes: the state behind all its rows, where they are too many for the log.
    next: Option<State>,
    /// And a copy at this position; without one, the new state is there itself.
    saving: Option<(usize, Option<State>)>,
}

/// A layer's part of [`States`], for a step.
pub(crate) struct Memory<'a> {
    pub(crate) base: Base<'a>,
    pub(crate) log: LogRows<'a>,
    /// Where the state behind all new rows goes. Without it, the new rows are for the log.
    pub(crate) next: Option<&'a mut LayerState>,
    /// Where the state behind so many tokens goes.
    pub(crate) saved: Option<(usize, &'a mut LayerState)>,
}

/// `(LOG_ROWS, log_row_len)`: rows that the state has not taken in.
pub(crate) enum LogRows<'a> {
    /// They stay as they are.
    Shared(&'a [f32]),
    /// The new rows are to be written there.
    Own(&'a mut [f32]),
}

impl LogRows<'_> {
    /// The rows.
    pub(crate) fn rows(&self) -> &[f32] {
        match self {
            LogRows::Shared(rows) => rows,
            LogRows::Own(rows) => rows,
        }
    }
}

/// The state that a step begins with.
pub(crate) enum Base<'a> {
    /// Zero, behind no token.
    Zero,
    /// It stays as it is.
    Shared(&'a LayerState),
    /// It is to take in the rows of the log.
    Own(&'a mut LayerState),
}

impl Base<'_> {
    /// Tokens taken in.
    pub(crate) fn position(&self) -> usize {
        self.state().map_or(0, |state| state.position)
    }

    /// The state, unless it is zero.
    pub(crate) fn state(&self) -> Option<&LayerState> {
        match self {
            Base::Zero => None,
            Base::Shared(state) => Some(state),
            Base::Own(state) => Some(state),
        }
    }
}

impl States {
    pub(crate) fn new() -> States {
        States {
            base: None,
            log: None,
            saved: Vec::new(),
            next: None,
            saving: None,
        }
    }

    /// The position that no layer's state is behind of.
    fn position(&self) -> usize {
        let layers = self.base.iter().flat_map(|base| &base.layers);
        layers.map(|layer| layer.position).max().unwrap_or(0)
    }

    /// Whether a layer's state is before `len`.
    fn is_behind(&self, len: usize) -> bool {
        match &self.base {
            None => len > 0,
            Some(base) => base.layers.iter().any(|layer| layer.position < len),
        }
    }

    /// The greatest number of tokens up to `len` that can be gone on from.
    pub(crate) fn reusable(&self, len: usize) -> usize {
        if self.position() <= len {
            return len;
        }
        let saved = self.saved.iter().map(|(position, _)| *position);
        saved.filter(|&position| position <= len).max().unwrap_or(0)
    }

    /// What is remembered of the first `len` tokens, which can be gone on from.
    pub(crate) fn fork(&self, len: usize) -> States {
        let saved = self.saved.iter().filter(|(position, _)| *position <= len);
        let mut fork = States {
            base: self.base.clone(),
            log: self.log.clone(),
            saved: saved.cloned().collect(),
            next: None,
            saving: None,
        };
        fork.truncate(len);
        fork
    }

    /// Forgets all but the first `len` tokens, which can be gone on from.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.saved.retain(|(position, _)| *position <= len);
        if self.position() > len {
            self.base = self
                .saved
                .last()
                .filter(|(position, _)| *position == len)
                .map(|(_, state)| Arc::clone(state));
            self.log = None;
        }
    }

    /// Gives up the copies; false when there is none.
    pub(crate) fn forget_saved(&mut self) -> bool {
        let had_some = !self.saved.is_empty();
        self.saved.clear();
        had_some
    }

    /// How many states and how many logs must be taken before `n_tokens` more than `len` can be taken in.
    pub(crate) fn needed(&self, len: usize, n_tokens: usize) -> (usize, usize) {
        if n_tokens > LOG_ROWS {
            return (1, 0);
        }
        let is_shared = |base: &Arc<_>| Arc::strong_count(base) > 1;
        let has_base = self.base.as_ref().is_some_and(|base| !is_shared(base));
        let has_log = self
            .log
            .as_ref()
            .is_some_and(|log| Arc::strong_count(log) == 1);
        let needs_base = self.is_behind(len) && !has_base;
        (usize::from(needs_base), usize::from(!has_log))
    }

    /// Makes room for `n_tokens` more than `len`; `take_state` and `take_log` are called as often as
    /// [`States::needed`] says.
    pub(crate) fn reserve(
        &mut self,
        shape: &StateShape,
        (len, n_tokens): (usize, usize),
        take_state: impl FnOnce() -> Taken,
        take_log: impl FnOnce() -> Taken,
    ) {
        let (n_states, n_logs) = self.needed(len, n_tokens);
        if n_tokens > LOG_ROWS {
            self.next = Some(State::zero(shape, take_state()));
            return;
        }
        if n_states > 0 {
            let state = match &self.base {
                None => State::zero(shape, take_state()),
                Some(base) => base.copy(take_state()),
            };
            self.base = Some(Arc::new(state));
        }
        if n_logs > 0 {
            let row_len = shape.log_row_len();
            let layers = match &self.log {
                None => vec![vec![0.0; LOG_ROWS * row_len]; shape.n_layers()],
                Some(log) => log.layers.clone(),
            };
            self.log = Some(Arc::new(Log {
                layers,
                _taken: take_log(),
            }));
        }
    }

    /// Whether the step that was reserved passes the end of a page where a copy may be saved; `take` is asked for its
    /// memory where it needs any.
    pub(crate) fn reserve_saved(
        &mut self,
        shape: &StateShape,
        (len, n_tokens): (usize, usize),
        take: impl FnOnce() -> Option<Taken>,
    ) {
        let end = match &self.next {
            Some(_) => len + n_tokens,
            None => len,
        };
        let position = end / PAGE * PAGE;
        if position <= self.position() {
            return;
        }
        self.saving = match self.next.is_some() && position == end {
            true => Some((position, None)),
            false => take().map(|taken| (position, Some(State::zero(shape, taken)))),
        };
    }

    /// What was reserved is written in all layers.
    pub(crate) fn advance(&mut self) {
        let saving = self.saving.take();
        if let Some(next) = self.next.take() {
            self.base = Some(Arc::new(next));
        }
        let saved = match saving {
            Some((position, Some(state))) => Some((position, Arc::new(state))),
            Some((position, None)) => self.base.clone().map(|base| (position, base)),
            None => None,
        };
        self.saved.extend(saved);
        if self.saved.len() > SAVED_MAX {
            // The one without which the gap is least.
            let gap = |&i: &usize| {
                let before = i.checked_sub(1).map_or(0, |i| self.saved[i].0);
                self.saved[i + 1].0 - before
            };
            if let Some(i) = (0..self.saved.len() - 1).min_by_key(gap) {
                self.saved.remove(i);
            }
        }
    }

    /// Gives back what was reserved for a step that failed.
    pub(crate) fn unreserve(&mut self) {
        self.next = None;
        self.saving = None;
    }

    /// Layer `l`'s part, for a step that was reserved.
    pub(crate) fn layer(&mut self, shape: &StateShape, l: usize) -> Memory<'_> {
        let i = shape.order[l].expect("a layer with a state");
        let is_small = self.next.is_none();
        let base = match &mut self.base {
            None => Base::Zero,
            Some(base) => match is_small && Arc::strong_count(base) == 1 {
                true => Base::Own(&mut own(base).layers[i]),
                false => Base::Shared(&base.layers[i]),
            },
        };
        let log = match &mut self.log {
            None => LogRows::Shared(&[]),
            Some(log) => match is_small && Arc::strong_count(log) == 1 {
                true => LogRows::Own(&mut own(log).layers[i]),
                false => LogRows::Shared(&log.layers[i]),
            },
        };
        Memory {
            base,
            log,
            next: self.next.as_mut().map(|next| &mut next.layers[i]),
            saved: match &mut self.saving {
                Some((position, Some(state))) => Some((*position, &mut state.layers[i])),
                _ => None,
            },
        }
    }
}

fn own<T>(shared: &mut Arc<T>) -> &mut T {
    Arc::get_mut(shared).expect("nobody else has it")
}
