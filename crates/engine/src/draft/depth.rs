//! How many tokens are guessed for each generation of a step: as many as make the tokens told in a second most.
//!
//! Three things are measured, always: what a step of so many rows takes, what a pass of the drafter takes, and how often
//! a guess was right that was the first, the second, … of its step, for the engine as a whole and for each generation.
//! With them [`depths`] is arithmetic. Where guesses do not pay, they are tried again now and then, for a hundredth of
//! the time at most, because contexts grow and texts change.
//!
//! Invariant: a guess is paid for only where the measurements say that it pays, or as one of those trials. Left out:
//! which tokens are guessed.

use super::DRAFT_DEPTH_MAX;

/// Kinds of guesses whose chances are counted apart.
pub(crate) const N_KINDS: usize = DRAFT_DEPTH_MAX + super::ngram::MATCH_MAX;
/// Steps with more rows are taken to be as long as their rows say.
const ROWS_MAX: usize = 96;
/// What a row beside others is taken to cost where nothing was measured, in steps: little, so that it is tried.
const UNKNOWN_ROW: f64 = 0.03;
/// How much of a shorter, and of a longer time than known is believed. Other work on a machine makes steps longer and
/// never shorter.
const BELIEF_SHORTER: f64 = 0.5;
const BELIEF_LONGER: f64 = 0.08;
/// Guesses have to promise so much more than none.
const WORTH: f64 = 1.02;
/// Part of the time that goes into trials.
const TRIALS: f64 = 0.01;
/// Chance of a guess of which nothing is known, and how many measurements that counts for.
const CHANCE: f64 = 0.6;
const CHANCE_WEIGHT: f64 = 4.0;
/// How many measurements the engine's experience counts for in a generation's.
const EXPERIENCE_WEIGHT: f64 = 6.0;
/// Guesses that a generation's, and an engine's experience reaches back.
pub(crate) const GENERATION_MEMORY: f64 = 32.0;
pub(crate) const ENGINE_MEMORY: f64 = 512.0;

/// What steps, or passes of a drafter, of so many rows take.
#[derive(Clone, Debug)]
pub(crate) struct Costs {
    /// Seconds, by rows; not a number where nothing was measured.
    seconds: [f64; ROWS_MAX + 1],
}

impl Costs {
    pub(crate) fn new() -> Costs {
        Costs {
            seconds: [f64::NAN; ROWS_MAX + 1],
        }
    }

    /// Takes in a measurement.
    pub(crate) fn measure(&mut self, n_rows: usize, seconds: f64) {
        let Some(known) = self.seconds.get_mut(n_rows) else {
            return;
        };
        let belief = match seconds < *known {
            true => BELIEF_SHORTER,
            false => BELIEF_LONGER,
        };
        *known = match known.is_nan() {
            true => seconds,
            false => *known + belief * (seconds - *known),
        };
    }

    /// Seconds for `n_rows`: measured, or between what was measured for fewer and for more. `None` before the first
    /// measurement.
    pub(crate) fn of(&self, n_rows: usize) -> Option<f64> {
        let known = |rows: usize| self.seconds.get(rows).copied().filter(|s| !s.is_nan());
        if let Some(seconds) = known(n_rows) {
            return Some(seconds);
        }
        let fewer = (0..n_rows.min(ROWS_MAX + 1)).rev();
        let fewer = fewer.filter_map(|rows| Some((rows, known(rows)?))).next();
        let more = (n_rows + 1..=ROWS_MAX).filter_map(|rows| Some((rows, known(rows)?)));
        match (fewer, more.into_iter().next()) {
            (Some((a, x)), Some((b, y))) => {
                Some(x + (y - x) * (n_rows - a) as f64 / (b - a) as f64)
            }
            (Some((a, x)), None) => Some(x * (1.0 + UNKNOWN_ROW * (n_rows - a) as f64)),
            (None, Some((_, y))) => Some(y),
            (None, None) => None,
        }
    }
}

/// How often guesses were right, by kind.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Experience {
    right: [f64; N_KINDS],
    all: [f64; N_KINDS],
}

impl Experience {
    /// Counts a guess whose predecessors were right; of the last `memory` ones most is remembered.
    pub(crate) fn count(&mut self, kind: usize, is_right: bool, memory: f64) {
        let kind = kind.min(N_KINDS - 1);
        let keep = 1.0 - 1.0 / memory;
        self.right[kind] = self.right[kind] * keep + f64::from(u8::from(is_right));
        self.all[kind] = self.all[kind] * keep + 1.0;
    }

    /// The chance of a guess whose predecessors are right, for a generation with this experience in an engine with that
    /// of `all`.
    pub(crate) fn chance(&self, kind: usize, all: &Experience) -> f64 {
        let kind = kind.min(N_KINDS - 1);
        let known = (all.right[kind] + CHANCE * CHANCE_WEIGHT) / (all.all[kind] + CHANCE_WEIGHT);
        (self.right[kind] + known * EXPERIENCE_WEIGHT) / (self.all[kind] + EXPERIENCE_WEIGHT)
    }
}

/// A generation for which tokens may be guessed.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    /// Of each guess that is possible, the chance that it is right if those before it are.
    pub(crate) chances: Vec<f64>,
    /// Rows that the drafter has to take in before its first guess.
    pub(crate) n_behind: usize,
}

/// What a step would be without guesses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plain {
    /// Rows, one for each token that is told.
    pub(crate) n_rows: usize,
    /// Seconds that prompts beside them take.
    pub(crate) prompts_s: f64,
}

/// How many tokens are to be guessed for each candidate, and how many times as many tokens a second that promises.
///
/// Depth by depth, those candidates are taken whose guesses are the likeliest, as many as make the rate greatest; of all
/// depths the one with the greatest rate counts. That costs a sort of the candidates for each depth.
pub(crate) fn depths(
    plain: Plain,
    candidates: &[Candidate],
    steps: &Costs,
    passes: Option<&Costs>,
) -> (Vec<usize>, f64) {
    let mut best = vec![0; candidates.len()];
    let step = |n_more: usize| steps.of(plain.n_rows + n_more).map(|s| s + plain.prompts_s);
    let Some(plain_s) = step(0).filter(|_| plain.n_rows > 0) else {
        return (best, 1.0);
    };
    let plain_rate = plain.n_rows as f64 / plain_s;
    let mut best_rate = plain_rate;
    let mut now = best.clone();
    // Tokens to expect, rows to check, seconds of the drafter.
    let (mut n_tokens, mut n_rows, mut drafting_s) = (plain.n_rows as f64, 0, 0.0);
    // Those whose guesses so far are all taken, with the chance that all are right.
    let mut open: Vec<(usize, f64)> = (0..candidates.len()).map(|i| (i, 1.0)).collect();
    for depth in 1..=DRAFT_DEPTH_MAX {
        let mut next: Vec<(usize, f64)> = open
            .iter()
            .filter_map(|&(i, so_far)| Some((i, so_far * candidates[i].chances.get(depth - 1)?)))
            .collect();
        next.sort_by(|a, b| b.1.total_cmp(&a.1));
        // Rates when the first of them guess, then the first two, …
        let (mut expected, mut n_taken_in) = (n_tokens, 0);
        let mut here: Option<(usize, f64)> = None;
        for (n, &(i, chance)) in next.iter().enumerate() {
            expected += chance;
            n_taken_in += match depth {
                1 => candidates[i].n_behind,
                _ => 1,
            };
            let Some(seconds) = step(n_rows + n + 1) else {
                continue;
            };
            let pass_s = passes.map_or(0.0, |passes| passes.of(n_taken_in).unwrap_or(0.0));
            let rate = expected / (seconds + drafting_s + pass_s);
            if here.is_none_or(|(_, best)| rate > best) {
                here = Some((n + 1, rate));
            }
        }
        let Some((n, rate)) = here else {
            break;
        };
        next.truncate(n);
        let taken_in = next.iter().map(|&(i, _)| match depth {
            1 => candidates[i].n_behind,
            _ => 1,
        });
        let taken_in = taken_in.sum();
        drafting_s += passes.map_or(0.0, |passes| passes.of(taken_in).unwrap_or(0.0));
        n_tokens += next.iter().map(|&(_, chance)| chance).sum::<f64>();
        n_rows += n;
        next.iter().for_each(|&(i, _)| now[i] = depth);
        if rate > best_rate && rate >= WORTH * plain_rate {
            best_rate = rate;
            best.clone_from(&now);
        }
        open = next;
    }
    (best, best_rate / plain_rate)
}

/// Says when guesses that do not seem to pay are tried all the same.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Trials {
    all_s: f64,
    tried_s: f64,
}

impl Trials {
    /// Whether one may be made.
    pub(crate) fn is_due(&self) -> bool {
        self.tried_s < TRIALS * self.all_s
    }

    /// Counts a step; of a trial, what it took beyond a step without guesses.
    pub(crate) fn count(&mut self, seconds: f64, tried_s: f64) {
        self.all_s += seconds;
        self.tried_s += tried_s.max(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(of: impl Fn(usize) -> f64) -> Costs {
        let mut costs = Costs::new();
        (1..=ROWS_MAX).for_each(|rows| costs.measure(rows, of(rows)));
        costs
    }

    fn candidate(chance: f64, n: usize) -> Candidate {
        Candidate {
            chances: vec![chance; n],
            n_behind: 1,
        }
    }

    fn one(chance: f64, steps: &Costs, passes: Option<&Costs>) -> usize {
        let plain = Plain {
            n_rows: 1,
            prompts_s: 0.0,
        };
        depths(plain, &[candidate(chance, 8)], steps, passes).0[0]
    }

    #[test]
    fn guesses_are_made_where_rows_are_cheap() {
        // A link of 8 ms: rows cost next to nothing.
        let link = costs(|rows| 8e-3 + 1e-4 * rows as f64);
        assert!(one(0.8, &link, None) >= 6);
        assert!((1..=2).contains(&one(0.1, &link, None)));
        // Rows that cost as much as steps.
        let rows = costs(|rows| 1e-3 * rows as f64);
        assert_eq!(one(0.95, &rows, None), 0);
        // A drafter as slow as the model.
        assert_eq!(one(0.8, &link, Some(&costs(|_| 8e-3))), 0);
        let passes = costs(|_| 1e-3);
        assert!((2..=5).contains(&one(0.8, &link, Some(&passes))));
    }

    #[test]
    fn a_step_that_grows_in_stairs_is_seen_through() {
        // Two rows cost much, eight no more.
        let stairs = costs(|rows| if rows == 1 { 1e-3 } else { 2e-3 });
        assert!(one(0.9, &stairs, None) >= 6);
    }

    #[test]
    fn of_many_the_likeliest_guess() {
        let steps = costs(|rows| 4e-3 + 1e-3 * rows as f64);
        let plain = Plain {
            n_rows: 4,
            prompts_s: 0.0,
        };
        let candidates = [0.95, 0.05, 0.9, 0.0].map(|chance| candidate(chance, 1));
        assert_eq!(depths(plain, &candidates, &steps, None).0, [1, 0, 1, 0]);
    }

    #[test]
    fn nothing_is_guessed_before_a_step_was_measured_and_then_it_is_tried() {
        let mut steps = Costs::new();
        assert_eq!(one(0.9, &steps, None), 0);
        steps.measure(1, 1e-3);
        assert!(one(0.6, &steps, None) > 0);
        // It did not pay.
        (2..=9).for_each(|rows| steps.measure(rows, 1e-3 * rows as f64));
        assert_eq!(one(0.6, &steps, None), 0);
    }

    #[test]
    fn costs_are_what_was_measured_and_between() {
        let mut costs = Costs::new();
        assert_eq!(costs.of(3), None);
        costs.measure(2, 1.0);
        costs.measure(6, 3.0);
        assert_eq!(costs.of(2), Some(1.0));
        assert_eq!(costs.of(3), Some(1.5));
        assert_eq!(costs.of(1), Some(1.0));
        assert!(costs.of(7).unwrap() > 3.0);
        // A step that was held up once is not believed for long.
        costs.measure(2, 11.0);
        assert!(costs.of(2).unwrap() < 2.0);
        costs.measure(2, 1.0);
        costs.measure(2, 1.0);
        assert!(costs.of(2).unwrap() < 1.3);
        costs.measure(ROWS_MAX + 1, 1.0);
    }

    #[test]
    fn experience_turns_from_the_engines_to_the_generations_own() {
        let (mut all, mut own) = (Experience::default(), Experience::default());
        assert_eq!(own.chance(0, &all), CHANCE);
        (0..1000).for_each(|i| all.count(0, i % 10 < 8, ENGINE_MEMORY));
        assert!((own.chance(0, &all) - 0.8).abs() < 0.02);
        (0..100).for_each(|_| own.count(0, false, GENERATION_MEMORY));
        assert!(own.chance(0, &all) < 0.2);
        assert_eq!(own.chance(1, &all), CHANCE, "another kind");
    }

    #[test]
    fn trials_take_a_hundredth() {
        let mut trials = Trials::default();
        assert!(!trials.is_due());
        let mut n = 0;
        for _ in 0..10_000 {
            let tries = trials.is_due();
            n += usize::from(tries);
            trials.count(if tries { 2.0 } else { 1.0 }, if tries { 1.0 } else { 0.0 });
        }
        assert!((95..=105).contains(&n), "{n}");
    }
}
