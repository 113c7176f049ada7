//! One request on its way: its tokens, what chooses the next one, and whom they are told.
//!
//! Invariant: the sink hears exactly one last event and nothing after it; a generation that is dropped tells that the
//! engine is stopping. Each token is chosen from a row of logits of its own, guessed or not, in order. Left out: when it
//! is computed, and who guesses.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::{Place, Shared};
use crate::draft::depth::{Experience, GENERATION_MEMORY};
use crate::draft::drafter::Asked;
use crate::draft::memory::Memory;
use crate::forward::{Wanted, Work};
use crate::grammar::{Grammar, GrammarError};
use crate::kv::{KvCache, Sequence};
use crate::request::{EngineError, Event, FinishReason, Request, Sink, Token, TokenLogprob, Usage};
use crate::sampler::{Sampler, logprobs};
use crate::stop::Stops;
use crate::tokenizer::{Decoder, Tokenizer};

pub(super) struct Generation {
    /// Counts the requests; the lower one is older.
    pub(super) number: u64,
    /// Prompt and answer.
    pub(super) tokens: Vec<u32>,
    /// What the cache has of `tokens`; always less than all.
    pub(super) sequence: Sequence,
    /// How many tokens the step that is being made takes in.
    pub(super) n_planned: usize,
    /// Guesses of what comes after `tokens`, which that step checks; only where it takes in their last one alone.
    pub(super) drafted: Vec<u32>,
    /// The kind of the first of them.
    pub(super) draft_kind: usize,
    /// What whoever guesses remembers of the text.
    pub(super) memory: Memory,
    /// What the cache had before the step that is being made.
    pub(super) n_before: usize,
    /// How many of them were right, when that is known.
    pub(super) n_right: usize,
    /// How often guesses for this text were right.
    pub(super) experience: Experience,
    /// The last token and `drafted`.
    rows: Vec<u32>,
    n_accepted: usize,
    n_rejected: usize,
    n_prompt: usize,
    /// `tokens` at most.
    n_tokens_max: usize,
    n_cached: usize,
    sampler: Sampler,
    grammar: Option<Grammar>,
    eos: Arc<[u32]>,
    ignore_eos: bool,
    top_logprobs: Option<usize>,
    text: Option<(Arc<Tokenizer>, Decoder)>,
    stops: Stops,
    deadline: Option<Instant>,
    cancelled: Arc<AtomicBool>,
    /// `None` when the last event was told, or nobody listens.
    sink: Option<Sink>,
    has_finished: bool,
    /// In the order in which they will be told.
    chosen: Vec<Chosen>,
    /// Why none could be chosen after them.
    failed: Option<EngineError>,
    /// Logits after penalties and grammar, (vocabulary).
    adjusted: Vec<f32>,
    _place: Place,
}

/// The next token, before it is told.
struct Chosen {
    id: u32,
    logprob: Option<f32>,
    top: Vec<TokenLogprob>,
    end: Option<End>,
}

/// That a token is the last one, whatever the text says.
enum End {
    /// It is one that ends a text.
    Eos,
    /// Nothing may follow it.
    Complete,
    /// It is not one that may come here.
    Refused(GrammarError),
}

impl Generation {
    pub(super) fn new(
        number: u64,
        request: Request,
        sink: Sink,
        seed: u64,
        shared: &Shared,
        place: Place,
    ) -> Generation {
        let n_prompt = request.prompt.len();
        let decoder = Decoder::continuing(!request.show_special);
        let ignores_eos = request.ignore_eos;
        Generation {
            number,
            sequence: shared.cache.sequence(),
            n_planned: 0,
            drafted: Vec::new(),
            draft_kind: 0,
            memory: Memory::None,
            n_before: 0,
            n_right: 0,
            experience: Experience::default(),
            rows: Vec::new(),
            n_accepted: 0,
            n_rejected: 0,
            n_prompt,
            n_tokens_max: n_prompt
                .saturating_add(request.max_tokens)
                .min(shared.context),
            n_cached: 0,
            sampler: Sampler::new(&request.sampling, &request.prompt, seed),
            grammar: request.grammar,
            eos: Arc::clone(&shared.eos),
            ignore_eos: ignores_eos,
            top_logprobs: request.top_logprobs,
            text: shared
                .tokenizer
                .clone()
                .map(|tokenizer| (tokenizer, decoder)),
            stops: Stops::new(&request.stop),
            deadline: request.deadline,
            cancelled: Arc::default(),
            sink: Some(sink),
            has_finished: false,
            chosen: Vec::new(),
            failed: None,
            adjusted: Vec::new(),
            tokens: request.prompt,
            _place: place,
        }
    }

    /// The flag that a ticket sets.
    pub(super) fn cancelled(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancelled)
    }

    /// Forgets the request without an event.
    pub(super) fn withdraw(mut self) {
        self.sink = None;
    }

    /// Tokens that the cache lacks; after the last of them the next one is chosen.
    pub(super) fn n_missing(&self) -> usize {
        self.tokens.len() - self.sequence.len()
    }

    /// Tokens that may still come before the last one.
    pub(super) fn n_room(&self) -> usize {
        self.n_tokens_max.saturating_sub(self.tokens.len() + 1)
    }

    /// The tokens of the step that is being made, guesses included.
    pub(super) fn planned(&mut self) -> Work<'_> {
        let start = self.sequence.len();
        self.n_before = start;
        let end = start + self.n_planned;
        let (tokens, logits) = match (end == self.tokens.len(), self.drafted.is_empty()) {
            (false, _) => (&self.tokens[start..end], Wanted::Nothing),
            (true, true) => (&self.tokens[start..end], Wanted::Last),
            (true, false) => {
                self.rows.clear();
                self.rows.extend_from_slice(&self.tokens[start..end]);
                self.rows.extend_from_slice(&self.drafted);
                (&self.rows[..], Wanted::All)
            }
        };
        Work {
            sequence: &mut self.sequence,
            tokens,
            logits,
        }
    }

    /// Rows of logits that the step gave for it.
    pub(super) fn n_rows_asked(&self) -> usize {
        match self.n_planned > 0 && self.sequence.len() >= self.tokens.len() {
            true => 1 + self.drafted.len(),
            false => 0,
        }
    }

    /// Counts tokens that were found in the cache.
    pub(super) fn count_reused(&mut self, n: usize) {
        // When it is computed for the second time, what it finds there may be its own.
        if self.tokens.len() == self.n_prompt {
            self.n_cached += n;
        }
    }

    /// True when the last event was told, or nobody listens any more.
    pub(super) fn is_over(&self) -> bool {
        self.sink.is_none()
    }

    /// True when it ended with an answer.
    pub(super) fn has_finished(&self) -> bool {
        self.has_finished
    }

    /// Gives away what the cache has of it, and what whoever guesses remembers.
    pub(super) fn take_sequence(&mut self, cache: &KvCache) -> (Sequence, Memory) {
        let sequence = std::mem::replace(&mut self.sequence, cache.sequence());
        (sequence, std::mem::take(&mut self.memory))
    }

    /// Asks for `depth` guesses.
    pub(super) fn ask(&mut self, depth: usize) -> Asked<'_> {
        Asked {
            tokens: &self.tokens,
            memory: &mut self.memory,
            depth,
            sampler: self.sampler.for_guesses(),
            drafted: &mut self.drafted,
        }
    }

    pub(super) fn n_generated(&self) -> usize {
        self.tokens.len() - self.n_prompt
    }

    /// Ends it if it was cancelled or its time is up.
    pub(super) fn check_end(&mut self) {
        if self.cancelled.load(Ordering::Relaxed) {
            self.fail(EngineError::Cancelled);
        } else if self
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
        {
            let n_generated = self.n_generated();
            self.fail(EngineError::Deadline { n_generated });
        }
    }

    /// Chooses the next token from each row of `logits`, `(rows asked, vocabulary)`, until one is not what was guessed,
    /// or the last. May be called on any thread.
    pub(super) fn choose(&mut self, logits: &[f32], n_vocab: usize) {
        self.choose_all(logits, n_vocab);
        let ids = self.chosen.iter().map(|chosen| chosen.id);
        let n_right = ids
            .zip(&self.drafted)
            .take_while(|(id, guess)| id == *guess);
        let n_right = n_right.count();
        self.n_accepted += n_right;
        self.n_rejected += self.drafted.len() - n_right;
        for i in 0..self.drafted.len().min(n_right + 1) {
            let kind = self.draft_kind + i;
            self.experience.count(kind, i < n_right, GENERATION_MEMORY);
        }
        self.n_right = n_right;
    }

    fn choose_all(&mut self, logits: &[f32], n_vocab: usize) {
        for (row, logits) in logits.chunks_exact(n_vocab).enumerate() {
            match self.choice(logits) {
                Ok(mut chosen) => {
                    let id = chosen.id;
                    chosen.end = self.take(id);
                    let is_last = chosen.end.is_some();
                    self.chosen.push(chosen);
                    if is_last || self.drafted.get(row) != Some(&id) {
                        return;
                    }
                }
                Err(error) => {
                    self.failed = Some(error);
                    return;
                }
            }
        }
    }

    /// Goes on behind a token that was chosen.
    fn take(&mut self, id: u32) -> Option<End> {
        self.sampler.accept(id);
        if self.eos.contains(&id) && !self.ignore_eos {
            return Some(End::Eos);
        }
        let grammar = self.grammar.as_mut()?;
        match grammar.accept(id) {
            Err(error) => Some(End::Refused(error)),
            Ok(()) => grammar.is_complete().then_some(End::Complete),
        }
    }

    fn choice(&mut self, logits: &[f32]) -> Result<Chosen, EngineError> {
        let adjusted = if self.sampler.adjusts() || self.grammar.is_some() {
            self.adjusted.clear();
            self.adjusted.extend_from_slice(logits);
            self.sampler.adjust(&mut self.adjusted);
            if let Some(grammar) = &mut self.grammar {
                let masked = grammar.mask(&mut self.adjusted);
                masked.map_err(|e| EngineError::Invalid(format!("the grammar: {e}")))?;
            }
            &self.adjusted
        } else {
            logits
        };
        let Some(id) = self.sampler.choose(adjusted) else {
            let reason =
                "no token is possible: the logits are not numbers, or the grammar lets none pass";
            return Err(EngineError::Internal(reason.to_owned()));
        };
        let (logprob, top) = match self.top_logprobs {
            Some(n_top) => {
                let (logprob, top) = logprobs(logits, id, n_top);
                (Some(logprob), top)
            }
            None => (None, Vec::new()),
        };
        Ok(Chosen {
            id,
            logprob,
            top,
            end: None,
        })
    }

    /// Tells the tokens that were chosen, ends when the last was among them, and forgets guesses that were wrong. Gives
    /// the number of tokens.
    pub(super) fn tell(&mut self) -> usize {
        let mut n = 0;
        for chosen in std::mem::take(&mut self.chosen) {
            if self.is_over() {
                break;
            }
            self.tell_one(chosen);
            n += 1;
        }
        if let Some(error) = self.failed.take() {
            self.fail(error);
        }
        self.sequence
            .truncate(self.sequence.len().min(self.tokens.len() - 1));
        n
    }

    fn tell_one(&mut self, chosen: Chosen) {
        let Chosen {
            id,
            logprob,
            top,
            end,
        } = chosen;
        self.tokens.push(id);
        let is_complete = match end {
            Some(End::Eos) => {
                self.finish(FinishReason::Stop);
                return;
            }
            Some(End::Refused(error)) => {
                self.fail(EngineError::Invalid(format!("the grammar: {error}")));
                return;
            }
            Some(End::Complete) => true,
            None => false,
        };
        let text = match &mut self.text {
            Some((tokenizer, decoder)) => decoder.push(tokenizer, id),
            None => String::new(),
        };
        let passed = self.stops.push(&text);
        self.emit(Event::Token(Token {
            id,
            text: passed.text,
            logprob,
            top,
        }));
        if passed.stopped {
            self.end(FinishReason::Stop, String::new());
        } else if is_complete {
            self.finish(FinishReason::Stop);
        } else if self.tokens.len() >= self.n_tokens_max {
            self.finish(FinishReason::Length);
        }
    }

    /// Ends with the text that was held back.
    fn finish(&mut self, reason: FinishReason) {
        let rest = self
            .text
            .take()
            .map_or_else(String::new, |(_, decoder)| decoder.finish());
        let passed = self.stops.push(&rest);
        let held = std::mem::replace(&mut self.stops, Stops::new(&[]));
        let text = passed.text + &held.finish();
        self.end(reason, text);
    }

    fn end(&mut self, reason: FinishReason, text: String) {
        self.has_finished = true;
        let usage = Usage {
            prompt_tokens: self.n_prompt,
            cached_tokens: self.n_cached,
            completion_tokens: self.n_generated(),
            accepted_tokens: self.n_accepted,
            rejected_tokens: self.n_rejected,
        };
        self.emit_last(Event::Finished {
            reason,
            text,
            usage,
        });
    }

    /// Ends with an error.
    pub(super) fn fail(&mut self, error: EngineError) {
        self.emit_last(Event::Failed(error));
    }

    fn emit(&mut self, event: Event) {
        let Some(sink) = &mut self.sink else {
            return;
        };
        // A sink that panics is one that does not listen; nobody else is to suffer from it.
        let heard = catch_unwind(AssertUnwindSafe(|| sink(event)));
        if !matches!(heard, Ok(ControlFlow::Continue(()))) {
            self.sink = None;
        }
    }

    fn emit_last(&mut self, event: Event) {
        self.emit(event);
        self.sink = None;
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.fail(EngineError::Stopping);
    }
}
