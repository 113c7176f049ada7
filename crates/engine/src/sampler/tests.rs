//! The sampler against exact probabilities and against filters written as their definition.

use super::*;

use proptest::prelude::*;

fn sampler(sampling: Sampling) -> Sampler {
    Sampler::new(&sampling, &[], 7)
}

fn warm() -> Sampling {
    Sampling {
        temperature: 1.0,
        ..Sampling::default()
    }
}

/// The distribution by the definition of every filter: a full sort, no shortcut.
fn exact(logits: &[f32], s: &Sampling) -> Vec<f64> {
    let best = logits
        .iter()
        .copied()
        .filter(|l| !l.is_nan())
        .fold(f32::MIN, f32::max);
    let mut order: Vec<(usize, f64)> = logits
        .iter()
        .enumerate()
        .filter(|(_, l)| **l > f32::NEG_INFINITY)
        .map(|(id, &l)| (id, f64::from((l - best) / s.temperature).exp()))
        .collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if s.top_k > 0 {
        order.truncate(s.top_k);
    }
    if s.top_p < 1.0 {
        let total: f64 = order.iter().map(|o| o.1).sum();
        let mut reached = 0.0;
        let n = order.iter().position(|o| {
            reached += o.1;
            reached >= total * f64::from(s.top_p)
        });
        order.truncate(n.map_or(order.len(), |n| n + 1));
    }
    order.retain(|o| o.1 >= f64::from(s.min_p));
    let total: f64 = order.iter().map(|o| o.1).sum();
    let mut probabilities = vec![0.0; logits.len()];
    for (id, weight) in order {
        probabilities[id] = weight / total;
    }
    probabilities
}

/// Pearson's statistic over many draws stays under a bound that chance passes less than once in a million times.
fn follows(sampling: Sampling, logits: &[f32]) {
    let expected = exact(logits, &sampling);
    let mut sampler = sampler(sampling.clone());
    let n_draws = 20_000;
    let mut counts = vec![0u32; logits.len()];
    for _ in 0..n_draws {
        counts[sampler.choose(logits).unwrap() as usize] += 1;
    }
    let (mut statistic, mut n_classes) = (0.0, 0.0);
    for (&count, &p) in counts.iter().zip(&expected) {
        if p == 0.0 {
            assert_eq!(count, 0, "{sampling:?} drew what it filters");
            continue;
        }
        let want = p * f64::from(n_draws);
        statistic += (f64::from(count) - want).powi(2) / want.max(1.0);
        n_classes += 1.0;
    }
    // Wilson and Hilferty's approximation of the chi-square quantile, at five standard deviations.
    let freedom = f64::max(n_classes - 1.0, 1.0);
    let bound =
        freedom * (1.0 - 2.0 / (9.0 * freedom) + 5.0 * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
    assert!(statistic < bound, "{sampling:?}: {statistic} over {bound}");
}

/// Logits of many sizes, some equal, from a fixed rule.
fn some_logits(n: u32) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 7919) % 97) as f32 / 16.0 - 3.0)
        .collect()
}

#[test]
fn draws_follow_the_exact_distribution_under_every_filter() {
    let small = [1.0, 2.0, 0.5, -1.0, 2.0, f32::NEG_INFINITY, f32::NAN, 0.0];
    let large = some_logits(300);
    for logits in [&small[..], &large[..]] {
        for temperature in [0.3, 1.0, 2.5] {
            for (top_k, top_p, min_p) in [
                (0, 1.0, 0.0),
                (3, 1.0, 0.0),
                (0, 0.6, 0.0),
                (0, 0.97, 0.0),
                (0, 1.0, 0.2),
                (150, 0.8, 0.05),
            ] {
                follows(
                    Sampling {
                        temperature,
                        top_k,
                        top_p,
                        min_p,
                        ..Sampling::default()
                    },
                    logits,
                );
            }
        }
    }
}

proptest! {
    #[test]
    fn only_what_the_filters_leave_is_drawn(
        logits in prop::collection::vec(-8.0f32..8.0, 1..400),
        top_k in 0usize..50,
        top_p in 0.01f32..1.0,
        min_p in 0.0f32..0.5,
        seed in any::<u64>(),
    ) {
        let sampling = Sampling { temperature: 0.9, top_k, top_p, min_p, seed: Some(seed), ..Sampling::default() };
        let left = exact(&logits, &sampling);
        let mut sampler = sampler(sampling);
        for _ in 0..20 {
            prop_assert!(left[sampler.choose(&logits).unwrap() as usize] > 0.0);
        }
    }

    #[test]
    fn any_bits_are_logits(bits in prop::collection::vec(any::<u32>(), 0..50), temperature in 0.0f32..2.0) {
        let logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let mut sampler = sampler(Sampling { temperature, top_p: 0.9, top_k: 20, ..Sampling::default() });
        let possible = logits.iter().any(|&l| l > f32::NEG_INFINITY);
        let chosen = sampler.choose(&logits);
        prop_assert_eq!(chosen.is_some(), possible);
        if let Some(id) = chosen {
            prop_assert!(logits[id as usize] > f32::NEG_INFINITY);
            let (logprob, top) = logprobs(&logits, id, 5);
            prop_assert!(logprob <= 1e-5 && top.windows(2).all(|w| w[0].logprob >= w[1].logprob));
        }
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_the_best() {
    assert_eq!(most_likely(&[0.0, 3.0, f32::NAN, 3.0]), Some(1));
    assert_eq!(most_likely(&[f32::NEG_INFINITY, f32::NAN]), None);
    assert_eq!(sampler(Sampling::default()).choose(&[1.0, 5.0]), Some(1));
    let one = Sampling { top_k: 1, ..warm() };
    assert_eq!(sampler(one).choose(&[2.0, 5.0, 5.0]), Some(1));
}

#[test]
fn a_seed_gives_the_same_tokens_and_another_seed_others() {
    let logits = some_logits(300);
    let draw = |seed| {
        let seeded = Sampling {
            seed: Some(seed),
            ..warm()
        };
        let mut sampler = sampler(seeded);
        (0..50)
            .map(|_| sampler.choose(&logits).unwrap())
            .collect::<Vec<u32>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    // The numbers are part of the promise: another generator would be another answer to the same request.
    assert_eq!(draw(1)[..5], PINNED);
}

/// First five draws of seed 1 over `some_logits(300)`.
const PINNED: [u32; 5] = [122, 25, 176, 64, 86];

#[test]
fn penalties_change_what_occurred_and_nothing_else() {
    let sampling = Sampling {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        logit_bias: vec![(4, -1.0), (9, 1.0)],
        ..Sampling::default()
    };
    let mut sampler = Sampler::new(&sampling, &[0, 1], 0);
    for id in [1, 2, 2, 2] {
        sampler.accept(id);
    }
    let mut logits = [4.0, -4.0, 4.0, 4.0, 4.0];
    sampler.adjust(&mut logits);
    // 0: in the prompt only. 1: in the prompt, and generated once. 2: three times. 3: never. 4: biased.
    assert_eq!(logits, [2.0, -8.75, 0.75, 4.0, 3.0]);
}

#[test]
fn logprobs_are_those_of_the_raw_distribution() {
    let logits = [1.0, 2.0, 3.0, 3.0, f32::NEG_INFINITY];
    let mass = (1f64.exp() + 2f64.exp() + 2.0 * 3f64.exp()).ln() as f32;
    let (logprob, top) = logprobs(&logits, 1, 3);
    assert!((logprob - (2.0 - mass)).abs() < 1e-6);
    assert_eq!(top.iter().map(|t| t.id).collect::<Vec<_>>(), [2, 3, 1]);
    assert!((top[0].logprob - (3.0 - mass)).abs() < 1e-6);
    assert_eq!(logprobs(&logits, 4, 0), (f32::NEG_INFINITY, Vec::new()));
    assert_eq!(logprobs(&logits, 99, 9).1.len(), 4);
}

#[test]
fn settings_that_make_no_sense_are_told() {
    let check = |change: fn(&mut Sampling)| {
        let mut sampling = warm();
        change(&mut sampling);
        sampling.check(100).unwrap_err()
    };
    assert!(warm().check(100).is_ok());
    assert!(check(|s| s.temperature = -1.0).contains("temperature"));
    assert!(check(|s| s.temperature = f32::NAN).contains("temperature"));
    assert!(check(|s| s.top_p = 0.0).contains("top_p"));
    assert!(check(|s| s.min_p = 2.0).contains("min_p"));
    assert!(check(|s| s.repetition_penalty = 0.0).contains("repetition_penalty"));
    assert!(check(|s| s.presence_penalty = f32::INFINITY).contains("presence_penalty"));
    assert!(check(|s| s.logit_bias = vec![(100, 1.0)]).contains("token 100"));
}
