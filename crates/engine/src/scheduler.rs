//! Many generations at once: an engine is a thread that takes steps, and handles that hand it requests.
//!
//! A step computes the next token of every generation that runs, and a piece of the prompts that are not computed yet;
//! so a request joins and leaves between two steps, and nobody waits for the longest. The walk of a request:
//!
//! 1. [`Engine::submit`] checks it and makes it a `Generation`, which waits.
//! 2. The thread (`worker.rs`) lets it run when there is a place and the cache has pages for its prompt. What other
//!    prompts and answers have in common with it, in whole pages, is taken from them (`prefix.rs`).
//! 3. Steps compute its prompt in pieces, then its answer token by token; after each the token is chosen and told
//!    (`generation.rs`). Where somebody guesses, a step checks several tokens of an answer (`speculation.rs`).
//! 4. When pages run out, prefixes that nobody runs are forgotten, the longest unused first; then the youngest
//!    generation goes back to waiting, and is computed again later.
//! 5. It ends, and what the cache knows of it stays for others.
//!
//! Invariants: every request that was taken gets exactly one last event, also when a step fails or the thread panics. Its
//! tokens depend on the request alone: not on who runs beside it, on prefixes, pieces or pages, because a row's logits do
//! not. Left out: priorities; whoever came first goes first.

mod generation;
mod prefix;
mod speculation;
mod worker;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use vindex::Config;

use crate::draft::drafter::{fixed_bytes as fixed_bytes_beside, page_bytes as page_bytes_beside};
use crate::draft::{DRAFT_DEPTH_MAX, Drafts};
use crate::ffn::FeedForward;
use crate::forward::Forward;
use crate::kv::{KvCache, KvType};
use crate::model::Model;
use crate::request::{EngineError, Request, Sink};
use crate::threads::Pool;
use crate::tokenizer::Tokenizer;
use generation::Generation;
use worker::Worker;

/// Most bytes of stop texts of one request.
const MAX_STOP_BYTES: usize = 16 << 10;

/// What an engine runs.
#[derive(Clone)]
pub struct EngineParts {
    /// Attention, embeddings and output head.
    pub model: Arc<Model>,
    /// Whoever computes feed-forward rows.
    pub ffn: Arc<dyn FeedForward>,
    /// Threads of the steps.
    pub pool: Arc<Pool>,
    /// Tokens to text. Without one, tokens have no text and stop texts are refused.
    pub tokenizer: Option<Arc<Tokenizer>>,
}

/// How much an engine does at once.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// How keys and values are stored.
    pub kv_type: KvType,
    /// Memory of the cache, at most.
    pub kv_bytes_max: u64,
    /// Generations that run at once.
    pub n_running_max: usize,
    /// Requests that wait at once, beside those that run.
    pub n_waiting_max: usize,
    /// Tokens of prompts in a step.
    pub prefill_chunk: usize,
    /// Tokens of prompt and answer together; the model's context and the cache are limits too.
    pub context_max: Option<usize>,
    /// Takes what prompts have in common from the cache.
    pub reuse_prefixes: bool,
    /// Who guesses tokens that the next step checks.
    pub drafts: Drafts,
    /// Tokens that are guessed for each generation; what was measured decides where this is `None`.
    pub draft_depth: Option<usize>,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            kv_type: KvType::default(),
            kv_bytes_max: 1 << 30,
            n_running_max: 32,
            n_waiting_max: 256,
            prefill_chunk: 256,
            context_max: None,
            reuse_prefixes: true,
            drafts: Drafts::None,
            draft_depth: None,
        }
    }
}

impl EngineOptions {
    /// A ceiling for the cache where the machine has `available_bytes` of memory: half of it, and no more than the
    /// contexts of all running generations take.
    pub fn kv_bytes_for(&self, config: &Config, available_bytes: u64) -> u64 {
        let context = self
            .context_max
            .unwrap_or(usize::MAX)
            .min(config.context as usize);
        let all = KvCache::bytes_for(config, self.kv_type, context)
            .saturating_mul(self.n_running_max as u64);
        (available_bytes / 2).min(all)
    }

    /// Bytes under the ceiling for what whoever guesses remembers of texts however long they are: of all that run, but
    /// half of the ceiling at most.
    fn fixed_bytes_beside(&self) -> u64 {
        let all = fixed_bytes_beside(&self.drafts, self.kv_type)
            .saturating_mul(self.n_running_max as u64);
        all.min(self.kv_bytes_max / 2)
    }
}

/// What an engine did and does, at the end of its last step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Generations that run.
    pub n_running: usize,
    /// Requests that wait, the ones that were put back included.
    pub n_waiting: usize,
    /// Pages of the cache that are in use, for running generations or as prefixes.
    pub n_pages_used: usize,
    /// Pages of the cache.
    pub n_pages: usize,
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Tokens of prompts that were computed, those that were computed again included.
    pub n_prefilled: u64,
    /// Tokens of prompts that were found in the cache.
    pub n_cached: u64,
    /// Tokens generated.
    pub n_generated: u64,
    /// Steps of generations for which tokens were guessed.
    pub n_drafts: u64,
    /// Tokens that were guessed.
    pub n_drafted: u64,
    /// Of these, those that were right.
    pub n_accepted: u64,
    /// Of these, those that were the first, the second, … guess of their step.
    pub n_accepted_at: [u64; DRAFT_DEPTH_MAX],
    /// Requests that ended with an answer.
    pub n_finished: u64,
    /// Requests that ended with an error, the cancelled ones included.
    pub n_failed: u64,
    /// Times that a running generation was put back because pages ran out.
    pub n_preempted: u64,
    /// Times that the thread panicked.
    pub n_panics: u64,
    /// Steps taken.
    pub n_steps: u64,
    /// Time in steps: the forward pass, without choosing and telling tokens.
    pub in_steps: Duration,
    /// Time that guessing took.
    pub in_drafts: Duration,
    /// Rows of the last step.
    pub last_step_rows: usize,
    /// Time of the last step.
    pub last_step: Duration,
}

/// A handle of a running engine. The engine stops when the last one is dropped.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    _handles: Arc<Handles>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts an engine's thread.
    ///
    /// # Errors
    /// [`EngineError::Internal`] when the system starts no thread, [`EngineError::Invalid`] when whoever is to guess belongs
    /// to another model.
    pub fn start(parts: EngineParts, options: EngineOptions) -> Result<Engine, EngineError> {
        options.drafts.check(&parts.model)?;
        let config = parts.model.config();
        // Whoever guesses has pages beside the model's, under the same ceiling.
        let page_bytes = KvCache::page_bytes_for(config, options.kv_type) as u64;
        let beside = page_bytes_beside(&options.drafts, options.kv_type) as u64;
        let shared = options.kv_bytes_max - options.fixed_bytes_beside();
        let of_model =
            u128::from(shared) * u128::from(page_bytes) / u128::from((page_bytes + beside).max(1));
        let cache = KvCache::new(config, options.kv_type, of_model as u64);
        let context = options.context_max.unwrap_or(usize::MAX);
        let context = context
            .min(config.context as usize)
            .min(cache.n_tokens_max());
        let stats = EngineStats {
            n_pages: cache.n_pages(),
            page_bytes: cache.page_bytes(),
            ..EngineStats::default()
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                inbox: Vec::new(),
                closing: None,
                has_ended: false,
                stats,
            }),
            wake: Condvar::new(),
            ended: Condvar::new(),
            n_open: Arc::default(),
            n_submitted: AtomicU64::new(0),
            n_vocab: config.vocab as usize,
            eos: match &parts.tokenizer {
                Some(tokenizer) => tokenizer.eos().into(),
                None => config.eos.as_slice().into(),
            },
            context,
            cache,
            tokenizer: parts.tokenizer,
            n_open_max: options
                .n_running_max
                .max(1)
                .saturating_add(options.n_waiting_max),
        });
        let forward = Forward::new(parts.model, Arc::clone(&parts.pool), parts.ffn);
        let worker = Worker::new(Arc::clone(&shared), forward, parts.pool, options);
        let started = thread::Builder::new()
            .name("engine".to_owned())
            .spawn(|| worker.run());
        started.map_err(|e| EngineError::Internal(format!("no thread can be started: {e}")))?;
        Ok(Engine {
            _handles: Arc::new(Handles(Arc::clone(&shared))),
            shared,
        })
    }

    /// Hands over a request. Its events go to `sink`, from the engine's thread.
    ///
    /// # Errors
    /// [`EngineError::Invalid`], [`EngineError::PromptTooLong`], [`EngineError::Busy`], [`EngineError::Stopping`];
    /// `sink` then hears nothing.
    pub fn submit(&self, request: Request, sink: Sink) -> Result<Ticket, EngineError> {
        let shared = &self.shared;
        shared.check(&request)?;
        let place = Place::take(&shared.n_open, shared.n_open_max).ok_or_else(|| {
            let stats = self.stats();
            EngineError::Busy {
                n_waiting: shared.n_open_max.saturating_sub(stats.n_running),
            }
        })?;
        let seed = match request.sampling.seed {
            Some(seed) => seed,
            None => getrandom::u64().map_err(|e| {
                EngineError::Internal(format!("the system gives no random number: {e}"))
            })?,
        };
        let number = shared.n_submitted.fetch_add(1, Ordering::Relaxed);
        let generation = Generation::new(number, request, sink, seed, shared, place);
        let cancelled = generation.cancelled();
        let mut state = shared.lock();
        if state.closing.is_some() || state.has_ended {
            drop(state);
            generation.withdraw();
            return Err(EngineError::Stopping);
        }
        state.inbox.push(generation);
        drop(state);
        shared.wake.notify_one();
        Ok(Ticket { cancelled })
    }

    /// What it did and does.
    pub fn stats(&self) -> EngineStats {
        self.shared.lock().stats
    }

    /// Tokens of prompt and answer together, at most.
    pub fn context(&self) -> usize {
        self.shared.context
    }

    /// Takes no more requests; with `drain` ends when those that were taken have ended, else after the step that it is
    /// in, and they fail with [`EngineError::Stopping`]. Waits until then. May be called again, to wait no longer.
    pub fn stop(&self, drain: bool) {
        self.shared.close(drain);
        let mut state = self.shared.lock();
        while !state.has_ended {
            state = self
                .shared
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A request that was taken.
#[derive(Clone, Debug)]
pub struct Ticket {
    cancelled: Arc<AtomicBool>,
}

impl Ticket {
    /// Ends the request with [`EngineError::Cancelled`] before the next step. Does nothing when it has ended.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// What handles and thread share.
struct Shared {
    state: Mutex<State>,
    /// There is something for the thread.
    wake: Condvar,
    /// The thread has ended.
    ended: Condvar,
    /// Requests that were taken and have not ended.
    n_open: Arc<AtomicUsize>,
    n_open_max: usize,
    n_submitted: AtomicU64,
    n_vocab: usize,
    eos: Arc<[u32]>,
    context: usize,
    cache: KvCache,
    tokenizer: Option<Arc<Tokenizer>>,
}

struct State {
    inbox: Vec<Generation>,
    closing: Option<Closing>,
    has_ended: bool,
    stats: EngineStats,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Closing {
    /// When what was taken has ended.
    Drained,
    /// At once.
    Now,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, drain: bool) {
        let mut state = self.lock();
        state.closing = match state.closing {
            Some(Closing::Now) => Some(Closing::Now),
            _ if drain => Some(Closing::Drained),
            _ => Some(Closing::Now),
        };
        drop(state);
        self.wake.notify_one();
    }

    /// Whether the request can be generated at all.
    fn check(&self, request: &Request) -> Result<(), EngineError> {
        let invalid = |what: String| Err(EngineError::Invalid(what));
        if request.prompt.is_empty() {
            return invalid("the prompt has no token".to_owned());
        }
        if request.max_tokens == 0 {
            return invalid("max_tokens is 0; at least 1 token is generated".to_owned());
        }
        if let Some(id) = request
            .prompt
            .iter()
            .find(|&&id| id as usize >= self.n_vocab)
        {
            return invalid(format!(
                "the prompt has token {id}; there are {}",
                self.n_vocab
            ));
        }
        if request.prompt.len() >= self.context {
            return Err(EngineError::PromptTooLong {
                got: request.prompt.len(),
                max: self.context,
            });
        }
        request
            .sampling
            .check(self.n_vocab)
            .map_err(EngineError::Invalid)?;
        let n_stop_bytes: usize = request.stop.iter().map(String::len).sum();
        if n_stop_bytes > MAX_STOP_BYTES {
            return invalid(format!(
                "stop texts have {n_stop_bytes} bytes; {MAX_STOP_BYTES} are taken"
            ));
        }
        if n_stop_bytes > 0 && self.tokenizer.is_none() {
            return invalid("stop texts need a tokenizer, which this model has not".to_owned());
        }
        Ok(())
    }
}

/// Closes the engine with its last handle.
struct Handles(Arc<Shared>);

impl Drop for Handles {
    fn drop(&mut self) {
        self.0.close(false);
    }
}

/// That a request counts among the open ones.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(n_open: &Arc<AtomicUsize>, max: usize) -> Option<Place> {
        let below_max = |n: usize| (n < max).then_some(n + 1);
        n_open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, below_max)
            .ok()?;
        Some(Place(Arc::clone(n_open)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
