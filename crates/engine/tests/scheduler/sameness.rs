//! The tokens of a request are the same whoever runs beside it and however it is computed.

use engine::{
    Engine, EngineOptions, Forward, KvCache, KvType, Request, Sampling, Wanted, Work, most_likely,
};

use super::{Loaded, answer, ask, options, request, submit};

const FAMILIES: [&str; 9] = [
    "gemma2",
    "gemma3",
    "llama",
    "llama3",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_5",
    "qwen3_moe",
];

pub(super) fn family(name: &str) -> Loaded {
    Loaded::new(&format!("fixtures/models/{name}"))
}

#[test]
fn greedy_tokens_are_those_of_the_forward_pass() {
    for name in FAMILIES {
        let loaded = family(name);
        let engine = loaded.engine(options());
        let parts = &loaded.parts;
        let mut forward = Forward::new(parts.model.clone(), parts.pool.clone(), parts.ffn.clone());
        let cache = KvCache::new(parts.model.config(), KvType::default(), 64 << 20);
        for (seed, n) in [(1, 1), (2, 9), (3, 70)] {
            let mut tokens = loaded.prompt(seed, n);
            let got = ask(&engine, request(tokens.clone(), 8)).ids;
            let mut sequence = cache.sequence();
            for _ in 0..8 {
                let start = sequence.len();
                let work = Work {
                    sequence: &mut sequence,
                    tokens: &tokens[start..],
                    logits: Wanted::Last,
                };
                let id = most_likely(forward.step(&mut [work]).unwrap()).unwrap();
                tokens.push(id);
            }
            assert_eq!(got, tokens[n as usize..], "{name}");
        }
    }
}

/// Requests of every kind: short and long, greedy and not, some with a beginning in common.
pub(super) fn many(loaded: &Loaded) -> Vec<Request> {
    let common = loaded.prompt(99, 130);
    (0..33)
        .map(|i| {
            let own = loaded.prompt(i, 1 + (i * 37) % 90);
            let prompt = match i % 3 {
                0 => common[..(i as usize * 8) % 131]
                    .iter()
                    .copied()
                    .chain(own)
                    .collect(),
                _ => own,
            };
            let sampling = Sampling {
                temperature: [0.0, 0.8, 1.5][i as usize % 3],
                top_k: [0, 40][i as usize % 2],
                top_p: 0.95,
                repetition_penalty: if i % 5 == 0 { 1.3 } else { 1.0 },
                seed: Some(u64::from(i)),
                ..Sampling::default()
            };
            Request {
                sampling,
                ..request(prompt, 3 + i as usize % 9)
            }
        })
        .collect()
}

pub(super) fn all_at_once(engine: &Engine, requests: Vec<Request>) -> Vec<Vec<u32>> {
    let streams: Vec<_> = requests.into_iter().map(|r| submit(engine, r)).collect();
    let answers = streams.iter().map(|(_, events)| answer(events));
    answers
        .map(|answer| {
            answer.end.as_ref().unwrap();
            answer.ids
        })
        .collect()
}

#[test]
fn tokens_do_not_depend_on_neighbours_prefixes_pieces_or_pages() {
    // All ways for one family; for those with windows and with experts, the two that have most in
    // them; states can go wrong in all.
    for (name, ways) in [
        ("qwen3", 0..6),
        ("gemma3", 3..5),
        ("mixtral", 3..5),
        ("qwen3_5", 0..6),
    ] {
        let loaded = family(name);
        let alone = loaded.engine(EngineOptions {
            n_running_max: 1,
            reuse_prefixes: false,
            prefill_chunk: 1000,
            ..options()
        });
        let expected: Vec<Vec<u32>> = many(&loaded)
            .into_iter()
            .map(|r| ask(&alone, r).ids)
            .collect();
        let all_ways = [
            (256, true, 64 << 20, 32),
            (256, false, 64 << 20, 32),
            (64, false, loaded.pages(9), 32),
            (64, true, loaded.pages(9), 32),
            (5, false, 64 << 20, 7),
            (1, true, 64 << 20, 32),
        ];
        for (prefill_chunk, reuse_prefixes, kv_bytes_max, n_running_max) in
            all_ways[ways].iter().copied()
        {
            let options = EngineOptions {
                prefill_chunk,
                reuse_prefixes,
                kv_bytes_max,
                n_running_max,
                ..options()
            };
            let engine = loaded.engine(options.clone());
            assert_eq!(
                all_at_once(&engine, many(&loaded)),
                expected,
                "{name}: {options:?}"
            );
            // Once more, with what the cache knows by then.
            assert_eq!(
                all_at_once(&engine, many(&loaded)),
                expected,
                "{name}: {options:?}"
            );
            engine.stop(true);
            let stats = engine.stats();
            assert_eq!(stats.n_finished, 66);
            assert_eq!(
                stats.n_generated,
                2 * expected.iter().map(|t| t.len() as u64).sum::<u64>()
            );
            assert_eq!(stats.n_cached > 0, reuse_prefixes);
            assert!(stats.n_pages_used <= stats.n_pages);
        }
    }
}

#[test]
fn generations_that_outgrow_the_pages_are_put_back_and_go_on_unchanged() {
    let loaded = family("qwen3");
    let requests = || (0..4).map(|i| request(loaded.prompt(i, 60), 150));
    let roomy = loaded.engine(options());
    let expected: Vec<Vec<u32>> = requests().map(|r| ask(&roomy, r).ids).collect();
    for reuse_prefixes in [true, false] {
        // Each takes four pages at its end.
        let engine = loaded.engine(EngineOptions {
            kv_bytes_max: loaded.pages(6),
            reuse_prefixes,
            ..options()
        });
        assert_eq!(all_at_once(&engine, requests().collect()), expected);
        engine.stop(true);
        assert!(engine.stats().n_preempted > 0);
    }
}

#[test]
fn prompts_with_the_same_beginning_are_computed_once() {
    let loaded = family("llama");
    let engine = loaded.engine(options());
    let prompt = loaded.prompt(5, 200);
    // At once: the first computes three pages, the others wait for it and take them.
    let streams: Vec<_> = (0..4)
        .map(|_| submit(&engine, request(prompt.clone(), 3)))
        .collect();
    let cached: Vec<usize> = streams
        .iter()
        .map(|(_, events)| answer(events).end.unwrap().1.cached_tokens)
        .collect();
    assert_eq!(cached, [0, 192, 192, 192]);
    // Later, with another end; the last token is computed in any case.
    let later = |n: usize| {
        ask(&engine, request(prompt[..n].to_vec(), 3))
            .end
            .unwrap()
            .1
            .cached_tokens
    };
    assert_eq!(later(150), 128);
    assert_eq!(later(128), 64);
    assert_eq!(later(63), 0);
    engine.stop(true);
    let stats = engine.stats();
    assert_eq!(
        stats.n_prefilled,
        200 + 3 * 8 + (150 - 128) + (128 - 64) + 63
    );
    assert_eq!(stats.n_cached, 3 * 192 + 128 + 64);
}

#[test]
fn answers_go_on_while_a_long_prompt_is_computed() {
    let loaded = Loaded::new("models/kjv");
    let engine = loaded.engine(EngineOptions {
        prefill_chunk: 16,
        ..options()
    });
    let (_, talking) = submit(&engine, request(loaded.prompt(1, 4), 400));
    talking.recv_timeout(super::PATIENCE).unwrap();
    let (_, long) = submit(&engine, request(loaded.prompt(2, 640), 1));
    long.recv_timeout(super::PATIENCE).unwrap();
    // The long prompt takes 40 steps, each with a token of the other.
    let n = talking.try_iter().count();
    assert!(n >= 35, "{n} tokens beside 40 pieces");
    engine.stop(false);
}

#[test]
fn prompts_that_begin_alike_go_on_from_a_state() {
    let loaded = family("qwen3_5");
    let alone = loaded.engine(EngineOptions {
        reuse_prefixes: false,
        ..options()
    });
    for prefill_chunk in [256, 50] {
        let engine = loaded.engine(EngineOptions {
            prefill_chunk,
            ..options()
        });
        let begin = loaded.prompt(5, 200);
        let first = ask(&engine, request(begin.clone(), 30));
        let mut conversation = begin.clone();
        conversation.extend(first.ids);
        conversation.extend(loaded.prompt(6, 40));
        let other: Vec<u32> = begin.iter().copied().chain(loaded.prompt(7, 20)).collect();
        for (prompt, n_cached) in [(begin, 192), (conversation, 192), (other, 192)] {
            let expected = ask(&alone, request(prompt.clone(), 10)).ids;
            let answer = ask(&engine, request(prompt, 10));
            assert_eq!(answer.ids, expected);
            assert_eq!(answer.end.unwrap().1.cached_tokens, n_cached);
        }
    }
}
