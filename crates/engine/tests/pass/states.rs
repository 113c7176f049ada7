//! Layers with a recurrent state: going back, sharing and failing give the bits of a text that was computed in one step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::{FeedForward, Forward, KvCache, KvType, Local, Model, PAGE, Pool, Wanted, Work};
use vindex::Recipe;

use crate::cache::{Unreliable, tokens};
use crate::support::{Engine, bits, extracted};

/// A token and as many guesses as are made.
const STEP_MAX: usize = 1 + engine::DRAFT_DEPTH_MAX;

const FAMILY: &str = "qwen3_5";

#[test]
fn guesses_that_were_wrong_leave_no_trace() {
    let model = extracted(FAMILY, Recipe::Q4k);
    let mut engine = Engine::new(&model.vindex, KvType::F16, 2);
    let all = tokens(150, 5);
    let expected = engine.logits(&all);
    let vocab = expected.len() / all.len();
    for begin in [0, 1, 50, 64] {
        let mut sequence = engine.cache.sequence();
        engine.append(&mut sequence, &all[..begin], begin.max(1));
        let mut step = 0;
        while sequence.len() + STEP_MAX <= all.len() {
            let len = sequence.len();
            // So many tokens, of which so many are right.
            let n = 1 + step % STEP_MAX;
            let n_right = 1 + step * 7 % n;
            let mut guessed = all[len..len + n].to_vec();
            guessed[n_right..].iter_mut().for_each(|id| *id = 499 - *id);
            let got = engine.append(&mut sequence, &guessed, n);
            assert!(
                bits(&got[..n_right * vocab])
                    == bits(&expected[len * vocab..(len + n_right) * vocab]),
                "{n_right} of {n} at {len}"
            );
            assert_eq!(sequence.reusable(len + n_right), len + n_right);
            sequence.truncate(len + n_right);
            step += 1;
        }
        assert!(step > 20);
    }
}

#[test]
fn a_fork_goes_on_from_where_a_state_is_known() {
    let model = extracted(FAMILY, Recipe::Q4k);
    let mut engine = Engine::new(&model.vindex, KvType::F16, 2);
    let all = tokens(210, 9);
    let expected = engine.logits(&all);
    let vocab = expected.len() / all.len();
    let mut sequence = engine.cache.sequence();
    engine.append(&mut sequence, &all[..200], 50);
    engine.append(&mut sequence, &all[200..205], 5);
    for len in [0, 1, 63, 64, 100, 128, 150, 199, 200, 202, 205] {
        let mut fork = sequence.fork(len);
        // The ends of pages that steps of 50 passed, and what the log has.
        let known = [0, 64, 128, 192];
        let best = known.into_iter().filter(|&n| n <= len).max().unwrap();
        assert_eq!(fork.len(), if len >= 200 { len } else { best }, "{len}");
        let begin = fork.len();
        for chunk in [3, 210] {
            let mut fork = fork.fork(begin);
            let got = engine.append(&mut fork, &all[begin..], chunk);
            assert!(bits(&got) == bits(&expected[begin * vocab..]), "{len}");
        }
        let got = engine.append(&mut fork, &all[begin..], 1);
        assert!(bits(&got) == bits(&expected[begin * vocab..]), "{len}");
    }
    // Whoever was forked from goes on too, and can be shortened.
    let got = engine.append(&mut sequence, &all[205..], 2);
    assert!(bits(&got) == bits(&expected[205 * vocab..]));
    for (len, left) in [(195, 192), (150, 128), (128, 128), (70, 64), (20, 0)] {
        sequence.truncate(len);
        assert_eq!((sequence.len(), sequence.n_pages()), (left, left / PAGE));
        let mut again = sequence.fork(left);
        let got = engine.append(&mut again, &all[left..], 4);
        assert!(bits(&got) == bits(&expected[left * vocab..]), "after {len}");
    }
    drop(sequence);
    assert_eq!(engine.cache.n_free(), engine.cache.n_pages());
}

#[test]
fn what_a_sequence_takes_is_what_is_told() {
    let model = extracted(FAMILY, Recipe::Q4k);
    let config = &model.vindex.index().config;
    let mut engine = Engine::new(&model.vindex, KvType::F16, 1);
    let all = tokens(4 * PAGE, 2);
    let expected = engine.logits(&all);
    let vocab = expected.len() / all.len();
    // Enough for this text alone: nothing is left for copies.
    let ceiling = KvCache::bytes_for(config, KvType::F16, all.len());
    engine.cache = KvCache::new(config, KvType::F16, ceiling);
    assert_eq!(engine.cache.n_tokens_max(), all.len());
    for chunk in [100, 7, 1, 256] {
        let mut sequence = engine.cache.sequence();
        let got = engine.append(&mut sequence, &all, chunk);
        assert!(bits(&got) == bits(&expected), "in chunks of {chunk}");
        let n_used = engine.cache.n_pages() - engine.cache.n_free();
        assert!(n_used <= engine.cache.n_pages());
        // A second text of that length does not fit, and is as it was.
        let mut second = engine.cache.sequence();
        let mut work = [Work {
            sequence: &mut second,
            tokens: &all,
            logits: Wanted::Last,
        }];
        assert!(engine.forward.step(&mut work).is_err());
        assert_eq!((second.len(), second.n_pages()), (0, 0));
        assert_eq!(engine.cache.n_pages() - engine.cache.n_free(), n_used);
        drop(sequence);
        assert_eq!(engine.cache.n_free(), engine.cache.n_pages());
        assert_eq!(&got[..vocab], &expected[..vocab]);
    }
}

#[test]
fn a_step_that_failed_in_any_layer_can_be_repeated_or_given_up() {
    let model = extracted(FAMILY, Recipe::Q4k);
    let all = tokens(140, 1);
    let expected = Engine::new(&model.vindex, KvType::F16, 1).logits(&all);
    let vocab = expected.len() / all.len();
    let pool = Arc::new(Pool::new(2));
    let opened = Arc::new(Model::open(Arc::clone(&model.vindex)).unwrap());
    let cache = KvCache::new(opened.config(), KvType::F16, 8 << 20);
    for failing_layer in 0..opened.config().n_layers {
        let local = Local::new(Arc::clone(&model.vindex), Arc::clone(&pool)).unwrap();
        let ffn = Arc::new(Unreliable(local, AtomicBool::new(false), failing_layer));
        let shared = Arc::clone(&ffn) as Arc<dyn FeedForward>;
        let mut forward = Forward::new(Arc::clone(&opened), Arc::clone(&pool), shared);
        let mut sequence = cache.sequence();
        for n in [30, 1, 4, 1, 9, 40, 2, 1, 1, 12, 3, 1] {
            let len = sequence.len();
            let right = &all[len..len + n];
            let wrong: Vec<u32> = right.iter().map(|id| 499 - id).collect();
            let mut step = |fails: bool, tokens: &[u32], sequence: &mut engine::Sequence| {
                ffn.1.store(fails, Ordering::Relaxed);
                let mut work = [Work {
                    sequence,
                    tokens,
                    logits: Wanted::All,
                }];
                forward.step(&mut work).map(<[f32]>::to_vec)
            };
            assert!(step(true, &wrong, &mut sequence).is_err());
            assert!(step(true, right, &mut sequence).is_err());
            assert_eq!((sequence.len(), sequence.reusable(len)), (len, len));
            let mut fork = sequence.fork(len);
            for sequence in [&mut fork, &mut sequence] {
                let got = step(false, right, sequence).unwrap();
                assert!(bits(&got) == bits(&expected[len * vocab..(len + n) * vocab]));
            }
        }
    }
    assert_eq!(cache.n_free(), cache.n_pages());
}
