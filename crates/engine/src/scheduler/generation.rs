//! One request on its way: its tokens, what chooses the next one, and whom they are told.
//!
//! Invariant: the sink hears exactly one last event and nothing after it; a generation that is dropped tells that the
//! engine is stopping. Left out: when it is computed.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::{Place, Shared};
use crate::grammar::Grammar;
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
    chosen: Option<Result<Chosen, EngineError>>,
    /// Logits after penalties and grammar, (vocabulary).
    adjusted: Vec<f32>,
    _place: Place,
}

/// The next token, before it is told.
struct Chosen {
    id: u32,
    logprob: Option<f32>,
    top: Vec<TokenLogprob>,
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
            chosen: None,
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

    /// The tokens of the step that is being made.
    pub(super) fn planned(&mut self) -> (&mut Sequence, &[u32], bool) {
        let start = self.sequence.len();
        let end = start + self.n_planned;
        (
            &mut self.sequence,
            &self.tokens[start..end],
            end == self.tokens.len(),
        )
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

    /// Gives away what the cache has of it.
    pub(super) fn take_sequence(&mut self, cache: &KvCache) -> Sequence {
        std::mem::replace(&mut self.sequence, cache.sequence())
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

    /// Chooses the next token from `logits`, (vocabulary). May be called on any thread.
    pub(super) fn choose(&mut self, logits: &[f32]) {
        self.chosen = Some(self.choice(logits));
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
        Ok(Chosen { id, logprob, top })
    }

    /// Tells the token that was chosen, if one was, and ends when it was the last. True when there was a token.
    pub(super) fn tell(&mut self) -> bool {
        let Chosen { id, logprob, top } = match self.chosen.take() {
            None => return false,
            Some(Ok(chosen)) => chosen,
            Some(Err(error)) => {
                self.fail(error);
                return false;
            }
        };
        self.tokens.push(id);
        self.sampler.accept(id);
        if self.eos.contains(&id) && !self.ignore_eos {
            self.finish(FinishReason::Stop);
            return true;
        }
        if let Some(grammar) = &mut self.grammar
            && let Err(e) = grammar.accept(id)
        {
            self.fail(EngineError::Invalid(format!("the grammar: {e}")));
            return true;
        }
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
        } else if self.grammar.as_ref().is_some_and(Grammar::is_complete) {
            self.finish(FinishReason::Stop);
        } else if self.tokens.len() >= self.n_tokens_max {
            self.finish(FinishReason::Length);
        }
        true
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
