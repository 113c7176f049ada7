//! What a drafter remembers of one text, beside the text itself.
//!
//! A head's keys and values are of pairs: the model's hidden state at a position and the token after it. The last hidden
//! state that is known waits until that token is chosen; more of them wait while nothing is guessed. What a text has in
//! common with another is taken over with the pages of the model, so that a head has seen all of a prompt, however much
//! of it was found in the cache.
//!
//! Invariant: what is remembered belongs to tokens that are certain. Where hidden states are forgotten, to bound memory,
//! the pairs begin anew behind the gap: positions are relative, so that guesses become worse and not wrong.

use crate::kv::{KvCache, PAGE, Sequence};

/// Hidden states of one text that wait, at most.
const BEHIND_BYTES_MAX: usize = 16 << 20;

/// What a drafter remembers of one text.
#[derive(Debug, Default)]
pub(crate) enum Memory {
    /// Nothing.
    #[default]
    None,
    /// Of a head.
    Head(Pairs),
    /// Of another model: what it has taken in.
    Model(Taken),
}

/// The tokens that another model has taken in, guesses included.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) sequence: Sequence,
    /// As many as the sequence has.
    pub(crate) tokens: Vec<u32>,
}

/// Pairs of hidden state and next token.
#[derive(Debug)]
pub(crate) struct Pairs {
    /// Those that the head has taken in.
    pub(crate) sequence: Sequence,
    /// The position in the text of the first of them.
    first: usize,
    /// `(n, hidden)`: hidden states of the positions after them.
    pub(crate) behind: Vec<f32>,
    /// `(whole pages of the text, hidden)`: the hidden state of each page's last position, for texts that go on there.
    page_ends: Vec<f32>,
    hidden: usize,
}

impl Memory {
    /// Of a text that has the first `n` tokens in common, whole pages.
    pub(crate) fn fork(&self, n: usize) -> Memory {
        match self {
            Memory::None => Memory::None,
            Memory::Head(pairs) => Memory::Head(pairs.fork(n)),
            Memory::Model(taken) => {
                let n = n.min(taken.tokens.len());
                let sequence = taken.sequence.fork(n);
                Memory::Model(Taken {
                    tokens: taken.tokens[..sequence.len()].to_vec(),
                    sequence,
                })
            }
        }
    }
}

impl Pairs {
    /// Of a text of which nothing is known.
    pub(crate) fn new(cache: &KvCache, hidden: usize) -> Pairs {
        Pairs {
            sequence: cache.sequence(),
            first: 0,
            behind: Vec::new(),
            page_ends: Vec::new(),
            hidden,
        }
    }

    /// Hidden states that wait.
    pub(crate) fn n_behind(&self) -> usize {
        self.behind.len() / self.hidden
    }

    /// The position after the last one whose hidden state is known.
    pub(crate) fn end(&self) -> usize {
        self.first + self.sequence.len() + self.n_behind()
    }

    /// Takes in the hidden states, `(n, hidden)`, of the positions from `start` on.
    pub(crate) fn record(&mut self, start: usize, states: &[f32]) {
        if start != self.end() {
            // The text was gone on with somewhere else.
            self.sequence.truncate(0);
            self.behind.clear();
            self.first = start;
            self.page_ends.resize(start / PAGE * self.hidden, 0.0);
        }
        for (position, state) in (start..).zip(states.chunks_exact(self.hidden)) {
            if (position + 1).is_multiple_of(PAGE) {
                self.page_ends.extend_from_slice(state);
            }
        }
        self.behind.extend_from_slice(states);
    }

    /// Whether so many wait that they have to be taken in or forgotten.
    pub(crate) fn is_full(&self) -> bool {
        self.behind.len() * size_of::<f32>() > BEHIND_BYTES_MAX
    }

    /// Forgets all pairs, and of the hidden states that wait all but the last `n`.
    pub(crate) fn forget(&mut self, n: usize) {
        let end = self.end();
        let n = n.min(self.n_behind());
        self.sequence.truncate(0);
        self.behind.drain(..self.behind.len() - n * self.hidden);
        self.first = end - n;
    }

    fn fork(&self, n: usize) -> Pairs {
        // The pair of the last position has a token that is not in common.
        let n_pairs = n.saturating_sub(1);
        let state = |page: usize| &self.page_ends[page * self.hidden..][..self.hidden];
        let n_pages = n / PAGE;
        let page_ends = self.page_ends[..n_pages * self.hidden].to_vec();
        let taken_until = self.first + self.sequence.len();
        let (sequence, first, behind) = if n == 0 || n_pairs < self.first {
            let behind = if n == 0 { &[][..] } else { state(n_pages - 1) };
            (self.sequence.fork(0), n_pairs, behind.to_vec())
        } else if taken_until >= n_pairs {
            let sequence = self.sequence.fork(n_pairs - self.first);
            (sequence, self.first, state(n_pages - 1).to_vec())
        } else {
            let behind = &self.behind[..(n - taken_until) * self.hidden];
            let sequence = self.sequence.fork(self.sequence.len());
            (sequence, self.first, behind.to_vec())
        };
        Pairs {
            sequence,
            first,
            behind,
            page_ends,
            hidden: self.hidden,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvType;

    /// Two values a hidden state: its position and one more.
    fn states(positions: std::ops::Range<usize>) -> Vec<f32> {
        positions.flat_map(|p| [p as f32, 1.0]).collect()
    }

    fn take_in(pairs: &mut Pairs, n: usize) {
        pairs.sequence.reserve(n).expect("there is room");
        pairs.sequence.advance(n);
        pairs.behind.drain(..2 * n);
    }

    #[test]
    fn a_fork_knows_all_pairs_in_common_and_waits_for_the_next_token() {
        let heads = vindex::Heads {
            n_kv_heads: 1,
            key_length: 2,
            value_length: 2,
        };
        let cache = KvCache::of_heads(KvType::F16, 1, heads, 1 << 20);
        let mut pairs = Pairs::new(&cache, 2);
        pairs.record(0, &states(0..100));
        pairs.record(100, &states(100..150));
        // Nothing was taken in: all of it waits in the fork too.
        let fork = pairs.fork(128);
        assert_eq!((fork.end(), fork.n_behind()), (128, 128));
        take_in(&mut pairs, 149);
        let fork = pairs.fork(128);
        assert_eq!((fork.end(), fork.sequence.len()), (128, 127));
        assert_eq!(fork.behind, states(127..128));
        assert_eq!(fork.fork(64).behind, states(63..64));
        assert_eq!(pairs.fork(0).end(), 0);
        // Half of it was taken in.
        let mut half = Pairs::new(&cache, 2);
        half.record(0, &states(0..150));
        take_in(&mut half, 70);
        let fork = half.fork(128);
        assert_eq!((fork.end(), fork.sequence.len()), (128, 70));
        assert_eq!(fork.behind, states(70..128));
        // What is forgotten leaves a gap before the pairs.
        pairs.record(150, &states(150..160));
        pairs.forget(3);
        assert_eq!((pairs.end(), pairs.n_behind()), (160, 3));
        let fork = pairs.fork(128);
        assert_eq!((fork.end(), fork.sequence.len()), (128, 0));
        assert_eq!(fork.behind, states(127..128));
        // Hidden states that do not follow begin anew.
        pairs.record(200, &states(200..210));
        assert_eq!((pairs.end(), pairs.n_behind()), (210, 10));
    }
}
