//! What the cache still knows of generations that have ended, for requests that begin with the same tokens.
//!
//! Invariant: only whole pages are kept, so that who goes on from one never has to copy it. What is forgotten first is
//! what was not used for longest, from its end on, because beginnings are what requests have in common.

use crate::draft::memory::Memory;
use crate::kv::{PAGE, Sequence};

/// Most texts that are kept; looking for a prefix looks at each of them.
const MAX_TEXTS: usize = 1024;

/// Texts in the cache that nobody runs, longest unused first.
#[derive(Default)]
pub(super) struct Prefixes {
    texts: Vec<Text>,
}

struct Text {
    /// As many as the sequence has; a multiple of [`PAGE`].
    tokens: Vec<u32>,
    sequence: Sequence,
    /// What whoever guesses remembers of it.
    memory: Memory,
}

/// How many of the first tokens are the same, in whole pages.
pub(super) fn in_common(a: &[u32], b: &[u32]) -> usize {
    let n = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    n / PAGE * PAGE
}

impl Prefixes {
    /// The sequence that has most of `tokens`, in whole pages and more than `n_known`.
    pub(super) fn find(&mut self, tokens: &[u32], n_known: usize) -> Option<(Sequence, Memory)> {
        let lengths = self
            .texts
            .iter()
            .map(|text| text.sequence.reusable(in_common(&text.tokens, tokens)));
        let (i, n) = lengths.enumerate().max_by_key(|&(_, n)| n)?;
        if n <= n_known {
            return None;
        }
        let text = self.texts.remove(i);
        let found = (text.sequence.fork(n), text.memory.fork(n));
        self.texts.push(text);
        Some(found)
    }

    /// Keeps what `sequence` and `memory` have of `tokens`.
    pub(super) fn insert(&mut self, tokens: &[u32], mut sequence: Sequence, memory: &Memory) {
        let n = sequence.reusable(sequence.len() / PAGE * PAGE);
        let tokens = &tokens[..n];
        // A longer text has this one too if it can be gone on from here, which one with states cannot everywhere.
        let has = |text: &Text| text.tokens.starts_with(tokens) && text.sequence.reusable(n) == n;
        if n == 0 || self.texts.iter().any(has) {
            return;
        }
        sequence.truncate(n);
        self.texts.retain(|text| {
            let n_own = text.tokens.len();
            !(tokens.starts_with(&text.tokens) && sequence.reusable(n_own) == n_own)
        });
        if self.texts.len() >= MAX_TEXTS {
            self.texts.remove(0);
        }
        self.texts.push(Text {
            tokens: tokens.to_vec(),
            sequence,
            memory: memory.fork(n),
        });
    }

    /// Forgets a page, or more where a text with states cannot be gone on from the one before; false when there is none.
    /// The page is free then unless a generation uses it.
    pub(super) fn forget_page(&mut self) -> bool {
        let Some(text) = self.texts.first_mut() else {
            return false;
        };
        let n = text.sequence.reusable(text.sequence.len() - PAGE);
        if n == 0 {
            self.texts.remove(0);
        } else {
            text.sequence.truncate(n);
            text.tokens.truncate(n);
            text.memory = text.memory.fork(n);
        }
        true
    }

    pub(super) fn clear(&mut self) {
        self.texts.clear();
    }
}
