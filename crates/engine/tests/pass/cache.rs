//! Sequences: shared beginnings, undoing, and what is left when a step fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::{
    Batch, FeedForward, FfnError, Forward, KvCache, KvType, Local, Model, PAGE, Pool, StepError,
    Visit, Wanted, Work,
};
use vindex::Recipe;

use crate::support::{Engine, bits, extracted};

pub(crate) fn tokens(n: usize, seed: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 31 + seed * 7) % 499) as u32).collect()
}

#[test]
fn a_fork_shares_pages_and_neither_sees_the_other() {
    let model = extracted("qwen3", Recipe::Q4k);
    let mut engine = Engine::new(&model.vindex, KvType::F16, 2);
    let (begin, one, other) = (tokens(100, 1), tokens(40, 2), tokens(40, 3));
    let whole = |engine: &mut Engine, end: &[u32]| engine.logits(&[&begin[..], end].concat());
    let expected = [whole(&mut engine, &one), whole(&mut engine, &other)];
    let vocab = expected[0].len() / 140;

    let mut first = engine.cache.sequence();
    engine.append(&mut first, &begin, 100);
    let mut second = first.fork(100);
    assert_eq!(
        engine.cache.n_pages() - engine.cache.n_free(),
        2,
        "both pages are shared"
    );
    // One of the two copies the half full page when it is written to.
    let got = [
        engine.append(&mut first, &one, 7),
        engine.append(&mut second, &other, 40),
    ];
    for (got, expected) in got.iter().zip(&expected) {
        assert!(bits(got) == bits(&expected[100 * vocab..]));
    }
    assert_eq!(engine.cache.n_pages() - engine.cache.n_free(), 1 + 2 * 2);
    drop(first);
    drop(second);
    assert_eq!(engine.cache.n_free(), engine.cache.n_pages());
}

#[test]
fn a_shorter_fork_and_truncation_give_what_was_before() {
    let model = extracted("gemma3", Recipe::Q4k);
    let mut engine = Engine::new(&model.vindex, KvType::F16, 2);
    let all = tokens(150, 5);
    let expected = engine.logits(&all);
    let vocab = expected.len() / all.len();
    let mut sequence = engine.cache.sequence();
    engine.append(&mut sequence, &all, 150);
    for len in [149, 128, 90, 64, 63, 1, 0] {
        let mut fork = sequence.fork(len);
        let got = engine.append(&mut fork, &all[len..], 150);
        assert!(
            bits(&got) == bits(&expected[len * vocab..]),
            "a fork of {len}"
        );
    }
    for len in [149, 128, 65, 64, 1, 0] {
        sequence.truncate(len);
        assert_eq!(
            (sequence.len(), sequence.n_pages()),
            (len, len.div_ceil(PAGE))
        );
        let draft = tokens(9, 8);
        engine.append(&mut sequence, &draft, 9);
        sequence.truncate(len);
        let got = engine.append(&mut sequence, &all[len..], 150);
        assert!(bits(&got) == bits(&expected[len * vocab..]), "after {len}");
    }
}

#[test]
fn without_pages_a_step_is_refused_and_nothing_changes() {
    let model = extracted("llama", Recipe::Q4k);
    let mut engine = Engine::new(&model.vindex, KvType::F16, 1);
    let config = &model.vindex.index().config;
    engine.cache = KvCache::new(
        config,
        KvType::F16,
        KvCache::bytes_for(config, KvType::F16, 3 * PAGE),
    );
    assert_eq!(engine.cache.n_pages(), 3);
    let (mut first, mut second) = (engine.cache.sequence(), engine.cache.sequence());
    engine.append(&mut first, &tokens(64, 1), 64);
    engine.append(&mut second, &tokens(60, 2), 60);
    let (more, few) = (tokens(80, 3), tokens(1, 4));
    let mut works = [
        Work {
            sequence: &mut first,
            tokens: &few,
            logits: Wanted::Last,
        },
        Work {
            sequence: &mut second,
            tokens: &more,
            logits: Wanted::Last,
        },
    ];
    let error = engine.forward.step(&mut works).unwrap_err();
    assert!(
        matches!(error, StepError::OutOfPages(out) if out.n_needed == 2 && out.n_pages == 3),
        "{error}"
    );
    assert_eq!(
        (first.len(), second.len(), engine.cache.n_free()),
        (64, 60, 1)
    );
    let fork = first.fork(64);
    assert_eq!(engine.cache.n_free(), 1, "a fork takes nothing");
    drop(fork);
    engine.append(&mut first, &few, 1);
    assert_eq!(engine.cache.n_free(), 0);
    drop(second);
    assert_eq!(engine.cache.n_free(), 1);
}

/// Fails in one layer when it is told to.
#[derive(Debug)]
pub(crate) struct Unreliable(pub(crate) Local, pub(crate) AtomicBool, pub(crate) u32);

impl FeedForward for Unreliable {
    fn forward(&self, layer: u32, batch: Batch<'_>, out: &mut [f32]) -> Result<(), FfnError> {
        if layer == self.2 && self.1.load(Ordering::Relaxed) {
            return Err(FfnError::Invalid("told to fail".to_owned()));
        }
        self.0.forward(layer, batch, out)
    }
}

#[test]
fn a_step_whose_feed_forward_fails_can_be_repeated() {
    let model = extracted("gemma2", Recipe::Q4k);
    let all = tokens(70, 1);
    let expected = Engine::new(&model.vindex, KvType::F16, 1).logits(&all);
    let pool = Arc::new(Pool::new(2));
    let local = Local::new(Arc::clone(&model.vindex), Arc::clone(&pool)).unwrap();
    let ffn = Arc::new(Unreliable(local, AtomicBool::new(false), 1));
    let opened = Arc::new(Model::open(Arc::clone(&model.vindex)).unwrap());
    let cache = KvCache::new(opened.config(), KvType::F16, 1 << 20);
    let mut forward = Forward::new(opened, pool, Arc::clone(&ffn) as Arc<dyn FeedForward>);
    let mut sequence = cache.sequence();
    let mut got = Vec::new();
    for tokens in all.chunks(20) {
        let len = sequence.len();
        ffn.1.store(true, Ordering::Relaxed);
        let mut work = [Work {
            sequence: &mut sequence,
            tokens,
            logits: Wanted::All,
        }];
        let error = forward.step(&mut work).unwrap_err();
        assert!(matches!(error, StepError::Ffn(_)), "{error}");
        assert_eq!(sequence.len(), len);
        ffn.1.store(false, Ordering::Relaxed);
        let mut work = [Work {
            sequence: &mut sequence,
            tokens,
            logits: Wanted::All,
        }];
        got.extend_from_slice(forward.step(&mut work).unwrap());
    }
    assert!(bits(&got) == bits(&expected));
}

#[test]
fn what_cannot_be_is_refused() {
    let model = extracted("qwen3_moe", Recipe::Q4k);
    let mut engine = Engine::new(&model.vindex, KvType::F16, 1);
    let mut sequence = engine.cache.sequence();
    for tokens in [&[512][..], &[]] {
        let mut works = [Work {
            sequence: &mut sequence,
            tokens,
            logits: Wanted::All,
        }];
        let error = engine.forward.step(&mut works).unwrap_err();
        assert!(
            matches!(
                error,
                StepError::Token {
                    id: 512,
                    vocab: 512
                } | StepError::Invalid(_)
            ),
            "{error}"
        );
    }
    let pool = Arc::new(Pool::new(1));
    let vindex = Arc::clone(&model.vindex);
    assert!(Local::with_ranges(Arc::clone(&vindex), Arc::clone(&pool), 0..2, 0..4).is_err());
    let local = Local::with_ranges(vindex, pool, 0..1, 1..3).unwrap();
    let rows = vec![0.5; 256];
    let mut out = vec![0.0; 256];
    let mut ask = |layer, row, expert| {
        let visits = [Visit { row, expert }];
        let batch = Batch {
            rows: &rows,
            visits: &visits,
        };
        local
            .forward(layer, batch, &mut out)
            .map_err(|e| e.to_string())
    };
    assert_eq!(ask(0, 0, 1), Ok(()));
    assert!(ask(1, 0, 1).is_err_and(|text| text.contains("layer 1 is not held")));
    assert!(ask(0, 1, 1).is_err_and(|text| text.contains("row 1")));
    assert!(ask(0, 0, 3).is_err_and(|text| text.contains("expert 3 is not held")));
}
