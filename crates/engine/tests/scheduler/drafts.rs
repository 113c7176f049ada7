//! Guessed tokens change when an answer is told, and never a token, a text or a logprob of it.

use engine::{
    Drafts, Engine, EngineError, EngineOptions, Event, FinishReason, Forward, GrammarFactory,
    KvCache, KvType, PAGE, Request, Sampling, Wanted, Work,
};
use serde_json::json;

use super::sameness::{all_at_once, family, many};
use super::{Loaded, ask, options, request, submit};

fn ngram(depth: usize) -> EngineOptions {
    EngineOptions {
        drafts: Drafts::NGram,
        draft_depth: Some(depth),
        ..options()
    }
}

#[test]
fn tokens_are_those_of_an_engine_that_does_not_guess() {
    for name in ["qwen3", "gemma3", "mixtral", "qwen3_5"] {
        let loaded = family(name);
        let plain = loaded.engine(options());
        let expected = all_at_once(&plain, many(&loaded));
        for (drafts, kv_bytes_max) in [
            (ngram(1), 64 << 20),
            (ngram(8), 64 << 20),
            (ngram(5), loaded.pages(9)),
        ] {
            let engine = loaded.engine(EngineOptions {
                kv_bytes_max,
                ..drafts
            });
            assert_eq!(all_at_once(&engine, many(&loaded)), expected, "{name}");
            assert_eq!(all_at_once(&engine, many(&loaded)), expected, "{name}");
            engine.stop(true);
            let stats = engine.stats();
            let n_tokens: usize = expected.iter().map(Vec::len).sum();
            assert_eq!(stats.n_generated, 2 * n_tokens as u64);
            assert!(stats.n_accepted <= stats.n_drafted && stats.n_drafts <= stats.n_drafted);
            assert_eq!(stats.n_accepted, stats.n_accepted_at.iter().sum::<u64>());
        }
    }
}

#[test]
fn generations_that_outgrow_the_pages_go_on_unchanged() {
    for (name, n_tokens) in [("qwen3", 6 * PAGE), ("qwen3_5", 12 * PAGE)] {
        let loaded = family(name);
        let requests = || (0..4).map(|i| request(loaded.prompt(i, 60), 150));
        let expected = all_at_once(&loaded.engine(options()), requests().collect());
        let config = loaded.parts.model.config();
        let engine = loaded.engine(EngineOptions {
            kv_bytes_max: KvCache::bytes_for(config, KvType::default(), n_tokens),
            ..ngram(8)
        });
        assert_eq!(all_at_once(&engine, requests().collect()), expected);
        engine.stop(true);
        let stats = engine.stats();
        assert!(stats.n_preempted > 0 && stats.n_drafted > 0, "{stats:?}");
        // Texts of random weights with states do not repeat themselves.
        assert!(stats.n_accepted > 0 || name == "qwen3_5", "{stats:?}");
    }
}

/// Everything that is told of a request.
fn told(engine: &Engine, request: Request) -> Vec<String> {
    let (_, events) = submit(engine, request);
    let mut told = Vec::new();
    loop {
        match events.recv_timeout(super::PATIENCE) {
            Ok(Event::Finished {
                reason,
                text,
                usage,
            }) => {
                told.push(format!("{reason:?} {text:?} {}", usage.completion_tokens));
            }
            Ok(event) => told.push(format!("{event:?}")),
            Err(_) => return told,
        }
    }
}

#[test]
fn every_kind_of_request_is_told_the_same() {
    let loaded = Loaded::new("models/kjv");
    let tokenizer = loaded.parts.tokenizer.as_ref().unwrap();
    let factory = GrammarFactory::new(tokenizer).unwrap();
    let text = "And God said, Let there be light: and there was light. And God said, Let there be";
    let prompt = tokenizer.encode(text, true).unwrap();
    let eos = tokenizer.eos()[0];
    let sampled = Sampling {
        temperature: 0.8,
        top_p: 0.9,
        seed: Some(7),
        ..Sampling::default()
    };
    let kinds: Vec<(&str, Request)> = vec![
        ("greedy", request(prompt.clone(), 60)),
        (
            "until the end of the text",
            Request {
                sampling: Sampling {
                    logit_bias: vec![(eos, 6.0)],
                    ..Sampling::default()
                },
                ..Request::new(prompt.clone(), 400)
            },
        ),
        (
            "with a stop text",
            Request {
                stop: vec!["let there".to_owned(), "was so".to_owned(), "ight: and".to_owned()],
                ..request(prompt.clone(), 200)
            },
        ),
        (
            "sampled with logprobs",
            Request {
                sampling: sampled.clone(),
                top_logprobs: Some(2),
                ..request(prompt.clone(), 60)
            },
        ),
        (
            "with penalties and a bias",
            Request {
                sampling: Sampling {
                    presence_penalty: 0.4,
                    frequency_penalty: 0.3,
                    repetition_penalty: 1.1,
                    logit_bias: vec![(prompt[4], 2.0)],
                    ..sampled.clone()
                },
                ..request(prompt.clone(), 60)
            },
        ),
        (
            "with a grammar",
            Request {
                grammar: Some(factory.regex("( light| darkness| there be light)+[.]").unwrap()),
                ..request(prompt.clone(), 60)
            },
        ),
        (
            "JSON",
            Request {
                grammar: Some(
                    factory
                        .json_schema(&json!({"type": "array", "items": {"enum": ["light", "water"]}, "maxItems": 9}))
                        .unwrap(),
                ),
                ..request(prompt.clone(), 60)
            },
        ),
        ("one token", request(prompt.clone(), 1)),
        ("two tokens", request(prompt.clone(), 2)),
    ];
    let plain = loaded.engine(options());
    let guessing = loaded.engine(ngram(8));
    for (kind, request) in kinds {
        let copy = Request {
            prompt: request.prompt.clone(),
            sampling: request.sampling.clone(),
            stop: request.stop.clone(),
            grammar: request.grammar.clone(),
            ..request
        };
        let expected = told(&plain, request);
        assert_eq!(told(&guessing, copy), expected, "{kind}");
        assert!(
            expected.last().unwrap().contains(char::is_whitespace),
            "{kind}"
        );
    }
    guessing.stop(true);
    assert!(guessing.stats().n_accepted > 20, "{:?}", guessing.stats());
}

#[test]
fn usage_counts_guesses_and_the_context_bounds_them() {
    let loaded = Loaded::new("models/kjv");
    let prompt: Vec<u32> = [17, 45, 300, 9].repeat(8);
    let engine = loaded.engine(EngineOptions {
        context_max: Some(60),
        ..ngram(8)
    });
    let answer = ask(&engine, request(prompt.clone(), 1000));
    let (reason, usage) = answer.end.unwrap();
    assert_eq!((reason, answer.ids.len()), (FinishReason::Length, 28));
    engine.stop(true);
    let stats = engine.stats();
    assert!(usage.accepted_tokens < usage.completion_tokens);
    assert_eq!(
        (usage.accepted_tokens + usage.rejected_tokens) as u64,
        stats.n_drafted
    );
    assert_eq!(usage.accepted_tokens as u64, stats.n_accepted);
    assert!(stats.n_accepted > 0);
    // Each step but the first tells a token that was not guessed.
    assert_eq!(stats.n_steps, 28 - stats.n_accepted);
    let plain = ask(&loaded.engine(options()), request(prompt, 2));
    assert_eq!(plain.end.unwrap().1.rejected_tokens, 0);
}

#[test]
fn who_cancels_in_the_middle_of_guesses_ends() {
    let loaded = Loaded::new("models/kjv");
    let engine = loaded.engine(ngram(8));
    let prompt: Vec<u32> = [17, 45, 300, 9].repeat(8);
    let (ticket, events) = submit(&engine, request(prompt.clone(), 100_000));
    events.recv_timeout(super::PATIENCE).unwrap();
    ticket.cancel();
    assert!(matches!(
        super::answer(&events).end,
        Err(EngineError::Cancelled)
    ));
    ask(&engine, request(prompt, 20)).end.unwrap();
}

/// Pairs of tokens drawn with many seeds come as often as their probabilities say, whether the second was guessed or not.
#[test]
fn drawn_tokens_have_the_distribution_of_the_model() {
    const N: u64 = 1200;
    let loaded = Loaded::new("models/kjv");
    let tokenizer = loaded.parts.tokenizer.as_ref().unwrap();
    let text = "And God said, Let there be light: and there was light. And God said, Let there be";
    // What the model says then, and the text once more: it is likely to say it again, and that is what is guessed.
    let mut prompt = tokenizer.encode(text, true).unwrap();
    let again = prompt.clone();
    prompt.extend(ask(&loaded.engine(options()), request(prompt.clone(), 6)).ids);
    prompt.extend(again);
    let sampling = Sampling {
        temperature: 1.3,
        top_k: 3,
        ..Sampling::default()
    };
    // The probabilities, by hand.
    let parts = &loaded.parts;
    let mut forward = Forward::new(parts.model.clone(), parts.pool.clone(), parts.ffn.clone());
    let cache = KvCache::new(parts.model.config(), KvType::default(), 64 << 20);
    let mut three = |tokens: &[u32]| -> Vec<(u32, f64)> {
        let work = Work {
            sequence: &mut cache.sequence(),
            tokens,
            logits: Wanted::Last,
        };
        let logits = forward.step(&mut [work]).unwrap().to_vec();
        let mut best: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&l| f64::from(l))).collect();
        best.sort_by(|a, b| b.1.total_cmp(&a.1));
        best.truncate(3);
        let weights = best.iter().map(|(_, l)| ((l - best[0].1) / 1.3).exp());
        let all: f64 = weights.clone().sum();
        let weights: Vec<f64> = weights.map(|w| w / all).collect();
        best.iter().map(|&(id, _)| id).zip(weights).collect()
    };
    let mut expected = Vec::new();
    for (first, p) in three(&prompt) {
        let with: Vec<u32> = prompt.iter().copied().chain([first]).collect();
        for (second, q) in three(&with) {
            expected.push(((first, second), p * q));
        }
    }
    let engine = loaded.engine(ngram(8));
    let requests: Vec<Request> = (0..N)
        .map(|seed| Request {
            sampling: Sampling {
                seed: Some(seed),
                ..sampling.clone()
            },
            // The second is guessed only if a third may come.
            ..request(prompt.clone(), 3)
        })
        .collect();
    let mut counts = std::collections::HashMap::new();
    let mut requests = requests.into_iter();
    loop {
        let some: Vec<Request> = requests.by_ref().take(64).collect();
        if some.is_empty() {
            break;
        }
        for ids in all_at_once(&engine, some) {
            *counts.entry((ids[0], ids[1])).or_insert(0_u64) += 1;
        }
    }
    engine.stop(true);
    let stats = engine.stats();
    assert!(
        stats.n_accepted > N / 10 && stats.n_accepted < stats.n_drafted,
        "{stats:?}"
    );
    // Pearson's test: with 8 degrees of freedom, 26.1 is exceeded once in a thousand times; the seeds are fixed.
    let all: u64 = counts.values().sum();
    assert_eq!(all, N);
    let chi_squared: f64 = expected
        .iter()
        .map(|(pair, p)| {
            let (got, wanted) = (counts.remove(pair).unwrap_or(0) as f64, p * N as f64);
            (got - wanted).powi(2) / wanted
        })
        .sum();
    assert!(
        counts.is_empty(),
        "pairs that top-k does not let pass: {counts:?}"
    );
    assert!(chi_squared < 26.1, "{chi_squared}");
}
