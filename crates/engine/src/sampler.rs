//! From logits to a token.
//!
//! The order, which is that of `transformers` and vLLM: logit bias, repetition penalty, presence and frequency
//! penalties, (the grammar's mask, by the caller), temperature, top-k, top-p over what top-k left, min-p over what
//! top-p left; then one random number chooses.
//!
//! Invariant: the token is a function of the logits, the settings, the tokens so far and the seed. A random number is
//! drawn for every token that is not greedy, needed or not, so that the n-th token has the n-th number. A logit that is
//! not a number counts as minus infinity; of equal ones the lower id comes first.
//!
//! Left out: mirostat, typical, DRY and other filters that the API of OpenAI has no field for.

use std::cmp::Ordering;
use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::request::{Sampling, TokenLogprob};

/// How many tokens the first look for a top-p set sorts; each further look takes four times as many.
const FIRST_LOOK: usize = 64;

impl Sampling {
    /// Whether these settings make sense for a vocabulary of `n_vocab` tokens.
    ///
    /// # Errors
    /// A sentence about the first that does not.
    pub fn check(&self, n_vocab: usize) -> Result<(), String> {
        let refuse = |name: &str, got: f32, range: &str| {
            Err(format!("{name} is {got}; it has to be {range}"))
        };
        if !(0.0..=100.0).contains(&self.temperature) {
            return refuse("temperature", self.temperature, "between 0 and 100");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p, "above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", self.min_p, "between 0 and 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return refuse("repetition_penalty", self.repetition_penalty, "above 0");
        }
        for (name, got) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if !got.is_finite() {
                return refuse(name, got, "a number");
            }
        }
        for &(id, bias) in &self.logit_bias {
            if id as usize >= n_vocab {
                return Err(format!("logit_bias names token {id}; there are {n_vocab}"));
            }
            if !bias.is_finite() {
                return refuse("logit_bias", bias, "a number");
            }
        }
        Ok(())
    }
}

/// What choosing the tokens of one request remembers.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Every token that occurred, and how often it was generated.
    seen: HashMap<u32, u32>,
    /// Ids that may still be chosen, best first where they are sorted; kept for its memory.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// For a request with this prompt. `seed` is used where the settings have none.
    pub fn new(sampling: &Sampling, prompt: &[u32], seed: u64) -> Sampler {
        let counts_prompt = sampling.repetition_penalty != 1.0;
        let seen = prompt.iter().filter(|_| counts_prompt).map(|&id| (id, 0));
        Sampler {
            random: ChaCha8Rng::seed_from_u64(sampling.seed.unwrap_or(seed)),
            seen: seen.collect(),
            sampling: sampling.clone(),
            candidates: Vec::new(),
        }
    }

    /// Whether [`Sampler::adjust`] changes anything.
    pub fn adjusts(&self) -> bool {
        let s = &self.sampling;
        !s.logit_bias.is_empty()
            || s.repetition_penalty != 1.0
            || s.presence_penalty != 0.0
            || s.frequency_penalty != 0.0
    }

    /// Applies bias and penalties to `logits`, (vocabulary).
    pub fn adjust(&self, logits: &mut [f32]) {
        let Sampling {
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            ..
        } = self.sampling;
        for &(id, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        if repetition_penalty == 1.0 && presence_penalty == 0.0 && frequency_penalty == 0.0 {
            return;
        }
        for (&id, &n_generated) in &self.seen {
            let Some(logit) = logits.get_mut(id as usize) else {
                continue;
            };
            *logit = if *logit > 0.0 {
                *logit / repetition_penalty
            } else {
                *logit * repetition_penalty
            };
            if n_generated > 0 {
                *logit -= presence_penalty + frequency_penalty * n_generated as f32;
            }
        }
    }

    /// Chooses from `logits`, (vocabulary), which [`Sampler::adjust`] and a grammar went over. `None` when no token is
    /// possible. Looks at each logit a fixed number of times, and sorts only what the filters leave.
    pub fn choose(&mut self, logits: &[f32]) -> Option<u32> {
        if self.sampling.temperature == 0.0 {
            return most_likely(logits);
        }
        let drawn = unit(&mut self.random);
        let (_, best) = best_of(logits)?;
        let candidates = &mut self.candidates;
        candidates.clear();
        // Relative to the best, so that nothing overflows however small the temperature is.
        let temperature = self.sampling.temperature;
        candidates.extend(logits.iter().zip(0..).filter_map(|(&logit, id)| {
            let scaled = (finite(logit)? - best) / temperature;
            Some((id, scaled))
        }));
        let filters = self.sampling.top_k > 0 || self.sampling.top_p < 1.0;
        if filters {
            keep_top_k(candidates, self.sampling.top_k);
        }
        for (_, weight) in candidates.iter_mut() {
            *weight = weight.exp();
        }
        if filters {
            keep_top_p(candidates, self.sampling.top_p);
        }
        // The best has weight 1 and is never filtered.
        candidates.retain(|&(_, weight)| weight > 0.0 && weight >= self.sampling.min_p);
        let total: f64 = candidates.iter().map(|&(_, w)| f64::from(w)).sum();
        let mut left = drawn * total;
        for &(id, weight) in candidates.iter() {
            left -= f64::from(weight);
            if left < 0.0 {
                return Some(id);
            }
        }
        // Rounding may leave nothing of the last one.
        candidates.last().map(|&(id, _)| id)
    }

    /// A copy that chooses guesses as this one will choose the tokens; `None` where those are the most likely ones.
    pub(crate) fn for_guesses(&self) -> Option<Sampler> {
        let draws = self.sampling.temperature != 0.0;
        (draws || self.adjusts()).then(|| self.clone())
    }

    /// Remembers that `id` was generated.
    pub fn accept(&mut self, id: u32) {
        *self.seen.entry(id).or_insert(0) += 1;
    }
}

/// Log-probabilities under `logits`, (vocabulary), as the model gave them: of `chosen`, and of the `n_top` most likely
/// tokens, most likely first.
pub fn logprobs(logits: &[f32], chosen: u32, n_top: usize) -> (f32, Vec<TokenLogprob>) {
    let Some((_, best)) = best_of(logits) else {
        return (f32::NEG_INFINITY, Vec::new());
    };
    let mass: f64 = logits
        .iter()
        .filter_map(|&logit| finite(logit))
        .map(|logit| f64::from((logit - best).exp()))
        .sum();
    let log_mass = mass.ln() as f32;
    let logprob = |logit: f32| finite(logit).map_or(f32::NEG_INFINITY, |l| l - best - log_mass);
    let mut top: Vec<(u32, f32)> = Vec::new();
    if n_top > 0 {
        let all = (0..)
            .zip(logits)
            .filter_map(|(id, &logit)| Some((id, finite(logit)?)));
        top.extend(all);
        keep_top_k(&mut top, n_top);
        top.sort_unstable_by(better);
    }
    let chosen = logits.get(chosen as usize).copied();
    (
        chosen.map_or(f32::NEG_INFINITY, logprob),
        top.into_iter()
            .map(|(id, logit)| TokenLogprob {
                id,
                logprob: logprob(logit),
            })
            .collect(),
    )
}

/// The id with the largest logit; the lowest of equal ones. `None` when no logit is above minus infinity.
pub fn most_likely(logits: &[f32]) -> Option<u32> {
    best_of(logits).map(|(id, _)| id)
}

fn best_of(logits: &[f32]) -> Option<(u32, f32)> {
    // Lanes, so that the compiler may compare several at once; a comparison with what is no number is false.
    const LANES: usize = 16;
    let mut best = [f32::NEG_INFINITY; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (best, &logit) in best.iter_mut().zip(chunk) {
            *best = if logit > *best { logit } else { *best };
        }
    }
    let best = best.iter().chain(rest).copied().filter(|l| !l.is_nan());
    let best = best.fold(f32::NEG_INFINITY, f32::max);
    if best == f32::NEG_INFINITY {
        return None;
    }
    let id = logits.iter().position(|&logit| logit == best)?;
    Some((id as u32, best.min(f32::MAX)))
}

/// A logit that may be chosen; plus infinity as the largest number.
fn finite(logit: f32) -> Option<f32> {
    (logit > f32::NEG_INFINITY).then_some(logit.min(f32::MAX))
}

/// Most likely first, lower ids first among equals.
fn better(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Keeps the `k` best, in any order; all when `k` is 0.
fn keep_top_k(candidates: &mut Vec<(u32, f32)>, k: usize) {
    if k > 0 && k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, better);
        candidates.truncate(k);
    }
}

/// Sorts the best ones until their weights reach the fraction `p` of all weights, and keeps these.
fn keep_top_p(candidates: &mut Vec<(u32, f32)>, p: f32) {
    if p >= 1.0 {
        candidates.sort_unstable_by(better);
        return;
    }
    let total: f64 = candidates.iter().map(|&(_, w)| f64::from(w)).sum();
    let enough = total * f64::from(p);
    let (mut n_sorted, mut reached) = (0, 0.0);
    let mut look = FIRST_LOOK;
    while n_sorted < candidates.len() {
        let rest = &mut candidates[n_sorted..];
        let n = look.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, better);
        }
        rest[..n].sort_unstable_by(better);
        for (i, &(_, weight)) in rest[..n].iter().enumerate() {
            reached += f64::from(weight);
            if reached >= enough {
                candidates.truncate(n_sorted + i + 1);
                return;
            }
        }
        n_sorted += n;
        look *= 4;
    }
}

/// A number in [0, 1) with 53 random bits.
fn unit(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests;
