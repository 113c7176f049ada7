//! The engine's thread: who runs, what each step takes in, and what becomes of failures.
//!
//! Invariant: the oldest generation that runs takes part in every step, so that something always goes on; whoever waits,
//! waits for one that is older. The thread sleeps only when no request is open.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::generation::Generation;
use super::prefix::{Prefixes, in_common};
use super::speculation::Speculation;
use super::{Closing, EngineOptions, EngineStats, Shared};
use crate::draft::Drafts;
use crate::draft::memory::Memory;
use crate::forward::{Forward, StepError, Work};
use crate::kv::Sequence;
use crate::request::EngineError;
use crate::threads::Pool;

/// How much longer a step may take for prompts, while answers are being generated beside them.
const PREFILL_BESIDE_DECODE: Duration = Duration::from_millis(100);
/// Tokens of prompts in such a step at least.
const PREFILL_MIN: usize = 16;
/// How much a new measurement counts.
const SMOOTHING: f64 = 0.3;

pub(super) struct Worker {
    shared: Arc<Shared>,
    forward: Forward,
    pool: Arc<Pool>,
    options: EngineOptions,
    /// By age, the oldest first.
    running: Vec<Generation>,
    /// By age too.
    waiting: Vec<Generation>,
    prefixes: Prefixes,
    stats: EngineStats,
    pace: Pace,
    speculation: Option<Speculation>,
}

/// What steps took, to choose how much of the prompts the next one takes in.
#[derive(Default)]
struct Pace {
    /// A step without prompts.
    decode_s: Option<f64>,
    /// A token of a prompt, beside that.
    prefill_s: Option<f64>,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        forward: Forward,
        pool: Arc<Pool>,
        options: EngineOptions,
    ) -> Worker {
        let stats = shared.lock().stats;
        let speculation = Speculation::of(&options, forward.model(), &pool, shared.cache.n_pages());
        let forward = match options.drafts {
            Drafts::Head(_) => forward.keeping_hidden(),
            _ => forward,
        };
        Worker {
            speculation,
            shared,
            forward,
            pool,
            options,
            running: Vec::new(),
            waiting: Vec::new(),
            prefixes: Prefixes::default(),
            stats,
            pace: Pace::default(),
        }
    }

    /// The life of the thread.
    pub(super) fn run(self) {
        // Declared first, so that it is dropped last.
        let _ending = Ending(Arc::clone(&self.shared));
        let mut worker = self;
        loop {
            match catch_unwind(AssertUnwindSafe(|| worker.turn())) {
                Ok(true) => {}
                Ok(false) => break,
                Err(panic) => worker.recover(&*panic),
            }
        }
    }

    /// One step with what comes before and after it. False when the thread is to end.
    fn turn(&mut self) -> bool {
        let closing = self.receive();
        if closing == Some(Closing::Now) {
            self.fail_all(&EngineError::Stopping);
        }
        self.sweep();
        if self.running.is_empty() && self.waiting.is_empty() {
            self.publish();
            return closing.is_none();
        }
        self.admit();
        let n_pages_left = self.plan();
        self.speculate(n_pages_left);
        self.step();
        self.sweep();
        self.publish();
        true
    }

    /// Takes what was submitted; sleeps while there is nothing at all to do.
    fn receive(&mut self) -> Option<Closing> {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        let is_idle = self.running.is_empty() && self.waiting.is_empty();
        if is_idle && state.inbox.is_empty() && state.closing.is_none() {
            self.pool.rest();
        }
        while is_idle && state.inbox.is_empty() && state.closing.is_none() {
            state = shared
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.waiting.append(&mut state.inbox);
        // Two that were submitted at once may have come in either order.
        self.waiting.sort_by_key(|generation| generation.number);
        state.closing
    }

    /// Lets go of what is over, and keeps what the cache knows of it.
    fn sweep(&mut self) {
        for i in (0..self.waiting.len()).rev() {
            self.waiting[i].check_end();
            if self.waiting[i].is_over() {
                self.waiting.remove(i);
                self.stats.n_failed += 1;
            }
        }
        for i in (0..self.running.len()).rev() {
            self.running[i].check_end();
            if self.running[i].is_over() {
                let mut generation = self.running.remove(i);
                match generation.has_finished() {
                    true => self.stats.n_finished += 1,
                    false => self.stats.n_failed += 1,
                }
                self.keep(&mut generation);
            }
        }
    }

    /// Takes away what the cache has of a generation, and keeps it for others.
    fn keep(&mut self, generation: &mut Generation) {
        let (sequence, memory) = generation.take_sequence(&self.shared.cache);
        if self.options.reuse_prefixes {
            self.prefixes.insert(&generation.tokens, sequence, &memory);
        }
    }

    /// Lets those that wait run while there are places, and pages for all that they and those who run know already.
    fn admit(&mut self) {
        let room = |g: &Generation| g.sequence.n_pages_needed(g.n_missing() + 1);
        let mut n_promised: usize = self.running.iter().map(room).sum();
        while self.running.len() < self.options.n_running_max.max(1) && !self.waiting.is_empty() {
            let mut next = self.waiting.remove(0);
            let reused = match self.options.reuse_prefixes {
                true => Worker::reusable(&next, &mut self.prefixes, &self.running),
                false => None,
            };
            let n_reused = reused.as_ref().map_or(0, |(sequence, _)| sequence.len());
            if let Some(reused) = reused {
                (next.sequence, next.memory) = reused;
            }
            let n_needed = n_promised + room(&next);
            while self.shared.cache.n_free() < n_needed && self.forget() {}
            if self.shared.cache.n_free() < n_needed && !self.running.is_empty() {
                drop(next.take_sequence(&self.shared.cache));
                self.waiting.insert(0, next);
                return;
            }
            next.count_reused(n_reused);
            self.stats.n_cached += n_reused as u64;
            n_promised = n_needed;
            let at = self.running.partition_point(|g| g.number < next.number);
            self.running.insert(at, next);
        }
    }

    /// What the cache has of a generation's tokens, where that is more than it has itself.
    fn reusable(
        generation: &Generation,
        prefixes: &mut Prefixes,
        running: &[Generation],
    ) -> Option<(Sequence, Memory)> {
        // After the last token logits are wanted, so that it is computed in any case.
        let wanted = &generation.tokens[..generation.tokens.len() - 1];
        let n_known = generation.sequence.len();
        let mut best = prefixes.find(wanted, n_known);
        for other in running {
            let n = in_common(&other.tokens[..other.sequence.len()], wanted);
            let n = other.sequence.reusable(n);
            if n > best
                .as_ref()
                .map_or(n_known, |(sequence, _)| sequence.len())
            {
                best = Some((other.sequence.fork(n), other.memory.fork(n)));
            }
        }
        best
    }

    /// Says how many tokens of each generation the next step takes in. Gives the number of pages that are left then.
    fn plan(&mut self) -> usize {
        let is_decoding = self.running.iter().any(|g| g.n_missing() == 1);
        let mut n_left = self.prefill_budget(is_decoding);
        let mut n_pages_planned = 0;
        let mut i = 0;
        while i < self.running.len() {
            self.running[i].n_planned = 0;
            self.running[i].drafted.clear();
            if self.running[i].n_missing() > 1 {
                self.reuse(i);
            }
            let n_missing = self.running[i].n_missing();
            let mut n = match n_missing {
                1 => 1,
                _ if self.waits_for_older(i) => 0,
                _ => n_missing.min(n_left),
            };
            while n > 0 {
                let n_needed = self.running[i].sequence.n_pages_needed(n);
                if n_pages_planned + n_needed <= self.shared.cache.n_free() {
                    n_pages_planned += n_needed;
                    break;
                }
                if self.forget() {
                    continue;
                }
                if i + 1 < self.running.len() {
                    self.put_back_youngest();
                    continue;
                }
                // It is the youngest. Alone, it goes on in smaller pieces; else it waits for older ones to end.
                n = if i == 0 { n / 2 } else { 0 };
            }
            if n_missing > 1 {
                n_left -= n;
            }
            self.running[i].n_planned = n;
            i += 1;
        }
        self.shared.cache.n_free().saturating_sub(n_pages_planned)
    }

    /// Guesses tokens for those whose next one the step computes.
    fn speculate(&mut self, n_pages_left: usize) {
        if let Some(speculation) = &mut self.speculation {
            let started = Instant::now();
            let prefill_s = self.pace.prefill_s;
            speculation.draft(&mut self.running, prefill_s, n_pages_left);
            self.stats.in_drafts += started.elapsed();
        }
    }

    /// Takes over what others have computed since, if that is more than a generation has.
    fn reuse(&mut self, i: usize) {
        if !self.options.reuse_prefixes {
            return;
        }
        let reused = Worker::reusable(&self.running[i], &mut self.prefixes, &self.running);
        if let Some((sequence, memory)) = reused {
            let generation = &mut self.running[i];
            let n_more = sequence.len() - generation.sequence.len();
            generation.count_reused(n_more);
            (generation.sequence, generation.memory) = (sequence, memory);
            self.stats.n_cached += n_more as u64;
        }
    }

    /// Whether an older generation is about to compute what this one needs too.
    fn waits_for_older(&self, i: usize) -> bool {
        let generation = &self.running[i];
        let wanted = &generation.tokens[..generation.tokens.len() - 1];
        self.options.reuse_prefixes
            && self.running[..i].iter().any(|older| {
                let n_common = in_common(&older.tokens, wanted);
                older.n_missing() > 1
                    && n_common > generation.sequence.len().max(older.sequence.len())
            })
    }

    /// Forgets what nobody needs: of texts that nobody runs first, then copies of states. False when there is nothing.
    fn forget(&mut self) -> bool {
        let saved = |g: &mut Generation| g.sequence.forget_saved();
        self.prefixes.forget_page() || self.running.iter_mut().any(saved)
    }

    fn put_back_youngest(&mut self) {
        let Some(mut generation) = self.running.pop() else {
            return;
        };
        self.stats.n_preempted += 1;
        self.keep(&mut generation);
        generation.n_planned = 0;
        generation.drafted.clear();
        let at = self
            .waiting
            .partition_point(|g| g.number < generation.number);
        self.waiting.insert(at, generation);
    }

    fn prefill_budget(&self, is_decoding: bool) -> usize {
        let max = self.options.prefill_chunk.max(1);
        match self.pace.prefill_s {
            Some(seconds) if is_decoding => {
                let n = PREFILL_BESIDE_DECODE.as_secs_f64() / seconds;
                (n as usize).clamp(PREFILL_MIN.min(max), max)
            }
            _ => max,
        }
    }

    /// Computes what was planned, and chooses and tells the next tokens.
    fn step(&mut self) {
        let Worker {
            forward,
            running,
            stats,
            pool,
            speculation,
            ..
        } = self;
        let mut n_prefill = 0;
        let mut works: Vec<Work<'_>> = Vec::new();
        for generation in running.iter_mut().filter(|g| g.n_planned > 0) {
            if generation.n_missing() > 1 {
                n_prefill += generation.n_planned;
            }
            works.push(generation.planned());
        }
        // The oldest takes part in every step; were it not so, nobody would ever end.
        assert!(!works.is_empty(), "a step takes in some tokens");
        let n_rows: usize = works.iter().map(|w| w.tokens.len()).sum();
        let started = Instant::now();
        let stepped = forward.step(&mut works);
        let took = started.elapsed();
        drop(works);
        stats.n_steps += 1;
        stats.in_steps += took;
        stats.last_step = took;
        stats.last_step_rows = n_rows;
        let n_vocab = self.shared.n_vocab;
        match stepped {
            Ok(logits) => {
                stats.n_prefilled += n_prefill as u64;
                let mut rest = logits;
                let asked = running.iter_mut().filter(|g| g.n_rows_asked() > 0);
                let asked = asked.map(|generation| {
                    let n = generation.n_rows_asked() * n_vocab;
                    (generation, rest.split_off(..n).unwrap_or_default())
                });
                pool.for_each(asked, |(generation, logits)| {
                    generation.choose(logits, n_vocab);
                });
                if let Some(speculation) = speculation {
                    speculation.learn(running, took, n_prefill, stats);
                }
                for generation in running.iter_mut() {
                    stats.n_generated += generation.tell() as u64;
                }
                if let Some(speculation) = speculation {
                    let started = Instant::now();
                    speculation.record(running, forward.hidden());
                    stats.in_drafts += started.elapsed();
                }
                self.pace.measure(took, n_prefill, n_rows - n_prefill);
            }
            Err(error) => {
                let error = match error {
                    StepError::Ffn(error) => EngineError::Ffn(error),
                    other => EngineError::Internal(other.to_string()),
                };
                tracing::warn!(%error, n_rows, "a step failed");
                for generation in running.iter_mut().filter(|g| g.n_planned > 0) {
                    generation.fail(error.clone());
                }
            }
        }
    }

    fn fail_all(&mut self, error: &EngineError) {
        for generation in self.running.iter_mut().chain(&mut self.waiting) {
            generation.fail(error.clone());
        }
    }

    /// Goes on after a panic: whatever was open fails, and nothing of the cache is trusted.
    fn recover(&mut self, panic: &(dyn std::any::Any + Send)) {
        let said = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
            (Some(said), _) => said,
            (_, Some(said)) => said.as_str(),
            _ => "no reason is known",
        };
        tracing::error!(
            said,
            "the engine's thread panicked; open requests fail, new ones are taken"
        );
        let error = EngineError::Internal(said.to_owned());
        self.stats.n_panics += 1;
        self.stats.n_failed += (self.running.len() + self.waiting.len()) as u64;
        self.fail_all(&error);
        self.running.clear();
        self.waiting.clear();
        self.prefixes.clear();
        self.publish();
    }

    fn publish(&mut self) {
        let cache = &self.shared.cache;
        self.stats.n_running = self.running.len();
        self.stats.n_waiting = self.waiting.len();
        self.stats.n_pages_used = cache.n_pages() - cache.n_free();
        self.shared.lock().stats = self.stats;
    }
}

/// Tells that the thread has ended, however it ends.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.has_ended = true;
        let late = std::mem::take(&mut state.inbox);
        drop(state);
        // Their sinks are called without the lock.
        drop(late);
        self.0.ended.notify_all();
    }
}

impl Pace {
    fn measure(&mut self, took: Duration, n_prefill: usize, n_decode: usize) {
        let took = took.as_secs_f64();
        let smooth = |old: Option<f64>, new: f64| match old {
            Some(old) => Some(old + SMOOTHING * (new - old)),
            None => Some(new),
        };
        if n_prefill == 0 {
            self.decode_s = smooth(self.decode_s, took);
            return;
        }
        // Without prompts the step would have taken what such steps take; a tenth is theirs in any case.
        let decode_s = self.decode_s.filter(|_| n_decode > 0).unwrap_or(0.0);
        let prefill_s = (took - decode_s).max(took / 10.0) / n_prefill as f64;
        self.prefill_s = smooth(self.prefill_s, prefill_s.max(1e-9));
    }
}
