//! Guesses for the generations of a step: how many, by whom, and what became of them.
//!
//! Invariant: guesses take only pages that nobody needs, and are for generations whose next token the step computes in
//! any case; so whoever waits, waits no longer for pages because of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::generation::Generation;
use super::{EngineOptions, EngineStats};
use crate::draft::depth::{Candidate, Costs, ENGINE_MEMORY, Experience, Plain, Trials, depths};
use crate::draft::drafter::Drafter;
use crate::draft::memory::Memory;
use crate::draft::{DRAFT_DEPTH_MAX, Drafts, repeated};
use crate::model::Model;
use crate::threads::Pool;

/// Rows that a drafter takes in before its first guess where it guesses in every step: what it is charged for. A prompt
/// that it takes in at first is for all guesses that follow.
const BEHIND_AS_A_RULE: usize = 2;

/// What guessing remembers between steps.
pub(super) struct Speculation {
    /// Whoever guesses by computing; `None`: the texts are looked up.
    drafter: Option<Drafter>,
    /// As many as are always guessed.
    depth: Option<usize>,
    /// Steps without prompts, and passes of the drafter, by rows.
    steps: Costs,
    passes: Costs,
    experience: Experience,
    trials: Trials,
    /// Whether the guesses of this step are a trial.
    is_trial: bool,
    /// Whether guesses seemed to pay when that was last asked.
    pays: bool,
    /// What guessing for this step took.
    drafting: Duration,
}

impl Speculation {
    /// `None` where nobody guesses.
    pub(super) fn of(
        options: &EngineOptions,
        model: &Arc<Model>,
        pool: &Arc<Pool>,
        n_pages: usize,
    ) -> Option<Speculation> {
        if matches!(options.drafts, Drafts::None) {
            return None;
        }
        // Those who run may each be some tokens ahead of the model.
        let n_pages = n_pages.saturating_add(options.n_running_max);
        let room = (n_pages, options.fixed_bytes_beside());
        Some(Speculation {
            drafter: Drafter::of(&options.drafts, model, pool, options.kv_type, room),
            depth: options.draft_depth.map(|n| n.min(DRAFT_DEPTH_MAX)),
            steps: Costs::new(),
            passes: Costs::new(),
            experience: Experience::default(),
            trials: Trials::default(),
            is_trial: false,
            pays: true,
            drafting: Duration::ZERO,
        })
    }

    /// Guesses for those of `running` whose next token is computed. `prefill_s` is what a token of a prompt takes.
    pub(super) fn draft(
        &mut self,
        running: &mut [Generation],
        prefill_s: Option<f64>,
        mut n_pages_left: usize,
    ) {
        let started = Instant::now();
        let n_prompts: usize = running
            .iter()
            .filter(|g| g.n_missing() > 1)
            .map(|g| g.n_planned)
            .sum();
        let is_decoding = |g: &Generation| g.n_planned == 1 && g.n_missing() == 1;
        let plain = Plain {
            n_rows: running.iter().filter(|g| is_decoding(g)).count(),
            prompts_s: n_prompts as f64 * prefill_s.unwrap_or(0.0),
        };
        let mut guessing = Vec::new();
        let mut candidates = Vec::new();
        for generation in running.iter_mut().filter(|g| is_decoding(g)) {
            let n_room = generation.n_room().min(DRAFT_DEPTH_MAX);
            if n_room == 0 || (self.drafter.is_none() && !look_up(generation, n_room)) {
                continue;
            }
            let kinds = generation.draft_kind..generation.draft_kind + n_room;
            let chance = |kind| generation.experience.chance(kind, &self.experience);
            candidates.push(Candidate {
                chances: kinds.map(chance).collect(),
                n_behind: BEHIND_AS_A_RULE,
            });
            guessing.push(generation);
        }
        let passes = self.drafter.as_ref().map(|_| &self.passes);
        let mut wanted = match self.depth {
            Some(depth) => vec![depth; candidates.len()],
            None => depths(plain, &candidates, &self.steps, passes).0,
        };
        let none_pays = wanted.iter().all(|&n| n == 0);
        self.is_trial = none_pays && self.trials.is_due();
        // Before a step was measured nothing is known.
        if !candidates.is_empty() && self.steps.of(plain.n_rows).is_some() {
            self.pays = !none_pays;
        }
        if self.is_trial {
            wanted.fill(1);
        }
        for ((generation, n), candidate) in guessing.iter().zip(&mut wanted).zip(&candidates) {
            *n = (*n).min(candidate.chances.len());
            let without = generation.sequence.n_pages_needed(1);
            while *n > 0 && generation.sequence.n_pages_needed(1 + *n) - without > n_pages_left {
                *n -= 1;
            }
            n_pages_left -= generation.sequence.n_pages_needed(1 + *n) - without;
        }
        match &mut self.drafter {
            None => {
                for (generation, n) in guessing.into_iter().zip(wanted) {
                    generation.drafted.truncate(n);
                }
            }
            Some(drafter) => {
                let asked = guessing.into_iter().zip(wanted).filter(|&(_, n)| n > 0);
                let mut asked: Vec<_> = asked.map(|(generation, n)| generation.ask(n)).collect();
                if !asked.is_empty() {
                    drafter.draft(&mut asked, &mut self.passes);
                }
            }
        }
        self.drafting = started.elapsed();
    }

    /// Takes in what a step took, and which guesses were right.
    pub(super) fn learn(
        &mut self,
        running: &[Generation],
        took: Duration,
        n_prefill: usize,
        stats: &mut EngineStats,
    ) {
        let took = took.as_secs_f64();
        let asked = || running.iter().filter(|g| g.n_rows_asked() > 0);
        let n_rows: usize = asked().map(Generation::n_rows_asked).sum();
        if n_prefill == 0 {
            self.steps.measure(n_rows, took);
        }
        let n_drafted: usize = asked().map(|g| g.drafted.len()).sum();
        let with_drafts = took + self.drafting.as_secs_f64();
        let tried_s = match (self.is_trial, self.steps.of(n_rows - n_drafted)) {
            (true, Some(plain_s)) => with_drafts - plain_s,
            _ => 0.0,
        };
        self.trials.count(with_drafts, tried_s);
        for generation in asked().filter(|g| !g.drafted.is_empty()) {
            let (n, n_right) = (generation.drafted.len(), generation.n_right);
            stats.n_drafts += 1;
            stats.n_drafted += n as u64;
            stats.n_accepted += n_right as u64;
            let right = &mut stats.n_accepted_at[..n_right];
            right.iter_mut().for_each(|n| *n += 1);
            for i in 0..n.min(n_right + 1) {
                let kind = generation.draft_kind + i;
                self.experience.count(kind, i < n_right, ENGINE_MEMORY);
            }
        }
    }

    /// Takes in the hidden states of a step, `(n_rows, hidden)`, of the tokens that turned out to be right.
    pub(super) fn record(&mut self, running: &mut [Generation], mut states: &[f32]) {
        let Some(Drafter::Head(drafter)) = &mut self.drafter else {
            return;
        };
        let hidden = drafter.hidden();
        for generation in running.iter_mut().filter(|g| g.n_planned > 0) {
            let n_rows = generation.n_planned + generation.drafted.len();
            let rows = states.split_off(..n_rows * hidden).unwrap_or_default();
            let n_certain = generation
                .sequence
                .len()
                .saturating_sub(generation.n_before);
            let rows = &rows[..n_certain.min(n_rows) * hidden];
            let Generation { memory, tokens, .. } = generation;
            if !matches!(memory, Memory::Head(_)) {
                *memory = Memory::Head(drafter.pairs());
            }
            let Memory::Head(pairs) = memory else {
                continue;
            };
            pairs.record(generation.n_before, rows);
            if pairs.is_full() {
                match self.pays {
                    true => drafter.catch_up(tokens, pairs, 1),
                    false => pairs.forget(pairs.n_behind() / 2),
                }
            }
        }
    }
}

/// Guesses up to `n_room` tokens from the text itself. False when nothing in it repeats.
fn look_up(generation: &mut Generation, n_room: usize) -> bool {
    let Some((next, n_same)) = repeated(&generation.tokens) else {
        return false;
    };
    // What repeats itself goes on so.
    let guesses = next.iter().cycle().take(n_room);
    generation.drafted.extend(guesses);
    // A guess behind right ones has as much more in common with the place where it is from.
    generation.draft_kind = n_same;
    true
}
