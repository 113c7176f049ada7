//! Guesses for the generations of a step: how many, by whom, and what became of them.
//!
//! Invariant: guesses take only pages that nobody needs, and are for generations whose next token the step computes in
//! any case; so whoever waits, waits no longer for pages because of them.

use std::time::Duration;

use super::generation::Generation;
use super::{EngineOptions, EngineStats};
use crate::draft::depth::{Candidate, Costs, ENGINE_MEMORY, Experience, Plain, Trials, depths};
use crate::draft::{DRAFT_DEPTH_MAX, Drafts, repeated};

/// What guessing remembers between steps.
pub(super) struct Speculation {
    /// As many as are always guessed.
    depth: Option<usize>,
    /// Steps without prompts, by rows.
    steps: Costs,
    experience: Experience,
    trials: Trials,
    /// Whether the guesses of this step are a trial.
    is_trial: bool,
}

impl Speculation {
    /// `None` where nobody guesses.
    pub(super) fn of(options: &EngineOptions) -> Option<Speculation> {
        match options.drafts {
            Drafts::None => None,
            Drafts::NGram => Some(Speculation {
                depth: options.draft_depth.map(|n| n.min(DRAFT_DEPTH_MAX)),
                steps: Costs::new(),
                experience: Experience::default(),
                trials: Trials::default(),
                is_trial: false,
            }),
        }
    }

    /// Guesses for those of `running` whose next token is computed. `prefill_s` is what a token of a prompt takes.
    pub(super) fn draft(
        &mut self,
        running: &mut [Generation],
        prefill_s: Option<f64>,
        mut n_pages_left: usize,
    ) {
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
            let Some((next, n_same)) = repeated(&generation.tokens).filter(|_| n_room > 0) else {
                continue;
            };
            // What repeats itself goes on so.
            let guesses = next.iter().cycle().take(n_room).copied();
            generation.drafted.extend(guesses);
            // A guess behind right ones has as much more in common with the place where it is from.
            generation.draft_kind = n_same;
            let kinds = n_same..n_same + n_room;
            let chance = |kind| generation.experience.chance(kind, &self.experience);
            candidates.push(Candidate {
                chances: kinds.map(chance).collect(),
                n_behind: 0,
            });
            guessing.push(generation);
        }
        let mut wanted = match self.depth {
            Some(depth) => vec![depth; candidates.len()],
            None => depths(plain, &candidates, &self.steps, None).0,
        };
        self.is_trial = wanted.iter().all(|&n| n == 0) && self.trials.is_due();
        if self.is_trial {
            wanted.fill(1);
        }
        for (generation, n_wanted) in guessing.into_iter().zip(wanted) {
            let without = generation.sequence.n_pages_needed(1);
            let mut n = n_wanted.min(generation.drafted.len());
            while n > 0 && generation.sequence.n_pages_needed(1 + n) - without > n_pages_left {
                n -= 1;
            }
            n_pages_left -= generation.sequence.n_pages_needed(1 + n) - without;
            generation.drafted.truncate(n);
        }
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
        let plain_s = self.steps.of(n_rows - n_drafted);
        let tried_s = match (self.is_trial, plain_s) {
            (true, Some(plain_s)) => took - plain_s,
            _ => 0.0,
        };
        self.trials.count(took, tried_s);
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
}
