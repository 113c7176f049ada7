//! Heads that guess: what they compute, what they guess for a trained model, and which are refused.

use std::path::Path;
use std::sync::Arc;

use engine::{
    Assistant, DraftChoice, Drafts, EngineOptions, Forward, Head, HeadError, HeadNumbers, HeadPass,
    HeadWork, KvCache, KvType, Pool, Request, Routing, Sampling, Wanted, Work, most_likely,
};
use quant::BlockType::{F32, Q8_0};
use serde_json::Value;
use vindex::{Activation, Rope, RopeKind, RopeScaling};

use super::golden_files::golden;
use super::reference::{self, DeepSeek, Numbers, dot};
use super::sameness::{all_at_once, many};
use super::sidecar::{Sidecar, root};
use super::{Loaded, ask, options, request};

/// Numbers without a pattern, of about the size of hidden states.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..n).map(|_| next() + next() + next() - 1.5).collect()
}

fn numbers(routing: Option<Routing>, rope: Rope, attention_scale: Option<f32>) -> HeadNumbers {
    HeadNumbers {
        hidden: 256,
        vocab: 512,
        norm_eps: 1e-6,
        activation: Activation::Silu,
        key_length: 64,
        attention_scale,
        rope,
        routing,
        source_repo: None,
    }
}

fn rope(n_dims: u32, base: f32, scaling: Option<RopeScaling>) -> Rope {
    Rope {
        kind: RopeKind::Neox,
        n_dims,
        base,
        base_sliding: None,
        n_dims_sliding: None,
        scaling,
    }
}

/// Compares a head with the reference: streams, normed streams, and the guesses that an output head makes of them; all
/// at once, and pair by pair with a deeper guess after each that is forgotten.
fn compare(family: &str, numbers: &HeadNumbers, of_reference: &Numbers) {
    const N: usize = 70;
    let hidden = numbers.hidden;
    let path = root().join(format!("fixtures/heads/{family}.safetensors"));
    let mut file = Sidecar::read(&path);
    let (states, embedded) = (noise(1, N * hidden), noise(2, N * hidden));
    let rows = |values: &[f32]| -> Vec<Vec<f64>> {
        let rows = values.chunks_exact(hidden);
        rows.map(|row| row.iter().map(|&x| f64::from(x)).collect())
            .collect()
    };
    let output = rows(&noise(3, 512 * hidden));
    let guess = |row: &[f64]| {
        let logits = output.iter().map(|w| dot(w, row));
        let best = (0..)
            .zip(logits)
            .max_by(|a: &(u32, f64), b| a.1.total_cmp(&b.1));
        best.unwrap().0
    };
    let dir = tempfile::tempdir().unwrap();
    for order in ["embed_first", "hidden_first"] {
        file.metadata
            .insert("skulk.concat_order".to_owned(), order.to_owned());
        let path = file.write(dir.path());
        let head = Arc::new(Head::open(&path, numbers, F32).unwrap());
        let cache = head.cache(KvType::F32, 1 << 20);
        let mut pass = HeadPass::new(Arc::clone(&head), Arc::new(Pool::new(2)));
        let (expected, expected_normed) =
            reference::run(&file, of_reference, &rows(&states), &rows(&embedded));
        let near = |got: &[f32], expected: &[Vec<f64>]| {
            let got = rows(got);
            let greatest = got.iter().flatten().zip(expected.iter().flatten());
            let greatest = greatest.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(greatest < 2e-4, "{family}, {order}: {greatest:e}");
            let (got, expected): (Vec<u32>, Vec<u32>) = (
                got.iter().map(|row| guess(row)).collect(),
                expected.iter().map(|row| guess(row)).collect(),
            );
            assert_eq!(got, expected, "{family}, {order}");
        };
        let mut sequence = cache.sequence();
        let all = HeadWork {
            sequence: &mut sequence,
            hidden: &states,
            embedded: &embedded,
        };
        pass.step(&mut [all]).unwrap();
        near(pass.hidden(), &expected);
        near(pass.normed(), &expected_normed);
        // Two texts at once, in pieces, with guesses that are forgotten.
        let mut sequences = [cache.sequence(), cache.sequence()];
        let (mut got, mut at) = (Vec::new(), 0);
        for n in [1, 3, 60, 2, 4] {
            let part = at * hidden..(at + n) * hidden;
            let mut works: Vec<HeadWork<'_>> = sequences
                .iter_mut()
                .map(|sequence| HeadWork {
                    sequence,
                    hidden: &states[part.clone()],
                    embedded: &embedded[part.clone()],
                })
                .collect();
            pass.step(&mut works).unwrap();
            at += n;
            let (one, other) = pass.hidden().split_at(n * hidden);
            assert!(one == other, "the texts are the same");
            got.extend_from_slice(one);
            let deeper = HeadWork {
                sequence: &mut sequences[0],
                hidden: &got[got.len() - hidden..],
                embedded: &embedded[..hidden],
            };
            pass.step(&mut [deeper]).unwrap();
            sequences[0].truncate(at);
        }
        near(&got, &expected);
    }
}

#[test]
fn qwens_dense_head_is_the_published_one() {
    let scale = Some(0.125);
    compare(
        "qwen3_5",
        &numbers(None, rope(16, 1e7, None), scale),
        &Numbers {
            eps: 1e-6,
            rope_base: 1e7,
            n_turned: 16,
            n_used: 0,
            deepseek: None,
        },
    );
}

#[test]
fn qwens_routed_head_is_the_published_one() {
    let routing = Routing {
        n_used: 2,
        sigmoid: false,
        normalise: true,
        scale: 1.0,
        groups: (1, 1),
    };
    compare(
        "qwen3_5_moe",
        &numbers(Some(routing), rope(8, 1e7, None), None),
        &Numbers {
            eps: 1e-6,
            rope_base: 1e7,
            n_turned: 8,
            n_used: 2,
            deepseek: None,
        },
    );
}

#[test]
fn deepseeks_head_is_the_published_one() {
    let routing = Routing {
        n_used: 3,
        sigmoid: true,
        normalise: true,
        scale: 2.5,
        groups: (4, 2),
    };
    let yarn = RopeScaling::Yarn {
        factor: 40.0,
        original_context: 64,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: Some(1.0),
        fractional: false,
    };
    let stretch = 0.1 * 40_f32.ln() + 1.0;
    let scale = stretch * stretch / 48_f32.sqrt();
    compare(
        "deepseek_v3",
        &numbers(Some(routing), rope(16, 1e4, Some(yarn)), Some(scale)),
        &Numbers {
            eps: 1e-6,
            rope_base: 1e4,
            n_turned: 16,
            n_used: 3,
            deepseek: Some(DeepSeek {
                n_heads: 4,
                yarn_factor: 40.0,
                original_context: 64.0,
                n_groups: 4,
                n_groups_used: 2,
                routed_scale: 2.5,
            }),
        },
    );
}

/// The trained model and its head.
struct Kjv {
    loaded: Loaded,
    drafts: Drafts,
    dir: tempfile::TempDir,
}

impl Kjv {
    fn new() -> Kjv {
        let loaded = Loaded::new("models/kjv");
        let dir = tempfile::tempdir().unwrap();
        let path = Sidecar::kjv().write(dir.path());
        let parts = &loaded.parts;
        let drafts = Drafts::open(&DraftChoice::Mtp(path), &parts.model, &parts.pool).unwrap();
        Kjv {
            loaded,
            drafts,
            dir,
        }
    }

    fn options(&self, depth: Option<usize>) -> EngineOptions {
        EngineOptions {
            drafts: self.drafts.clone(),
            draft_depth: depth,
            ..options()
        }
    }

    /// Prompt, greedy tokens, and how many of the guesses for them were right.
    fn prompts() -> Vec<(Vec<u32>, Vec<u32>, usize)> {
        let text = std::fs::read_to_string(root().join("models/kjv/prompts.json")).unwrap();
        let all: Value = serde_json::from_str(&text).unwrap();
        let ids = |value: &Value| serde_json::from_value::<Vec<u32>>(value.clone()).unwrap();
        let one = |prompt: &Value| {
            // What was recorded began without the token that begins a document.
            let prompt_ids = ids(&prompt["prompt_ids"])[1..].to_vec();
            let n_right = prompt["draft_accepted"].as_u64().unwrap() as usize;
            (prompt_ids, ids(&prompt["greedy_ids"]), n_right)
        };
        all["prompts"].as_array().unwrap().iter().map(one).collect()
    }
}

#[test]
fn a_trained_head_guesses_what_it_was_recorded_to_guess() {
    let kjv = Kjv::new();
    let parts = &kjv.loaded.parts;
    let config = parts.model.config();
    let hidden = config.hidden as usize;
    let table = parts.model.vindex().tensor("token_embd.weight").unwrap();
    let mut embeddings = vec![0.0; hidden * config.vocab as usize];
    quant::decode(table.block_type, table.bytes, &mut embeddings);
    let row = |id: u32| &embeddings[id as usize * hidden..][..hidden];
    let numbers = HeadNumbers::of(config, None);
    let head = Head::open(&kjv.dir.path().join("mtp.safetensors"), &numbers, F32).unwrap();
    let head = Arc::new(head);
    let mut pass = HeadPass::new(Arc::clone(&head), parts.pool.clone());
    let forward = Forward::new(parts.model.clone(), parts.pool.clone(), parts.ffn.clone());
    let mut forward = forward.keeping_hidden();
    let cache = KvCache::new(config, KvType::F32, 64 << 20);
    let (mut n_right_all, mut n_recorded) = (0, 0);
    for (prompt, greedy, n_recorded_right) in Kjv::prompts() {
        let tokens = [&prompt[..], &greedy].concat();
        let work = Work {
            sequence: &mut cache.sequence(),
            tokens: &tokens,
            logits: Wanted::Nothing,
        };
        forward.step(&mut [work]).unwrap();
        let n = tokens.len() - 1;
        let embedded: Vec<f32> = tokens[1..]
            .iter()
            .flat_map(|&id| row(id))
            .copied()
            .collect();
        let work = HeadWork {
            sequence: &mut head.cache(KvType::F32, 1 << 20).sequence(),
            hidden: &forward.hidden()[..n * hidden],
            embedded: &embedded,
        };
        pass.step(&mut [work]).unwrap();
        let guesses = pass.normed().chunks_exact(hidden).map(|normed| {
            let logits = embeddings.chunks_exact(hidden).map(|row| {
                let products = row.iter().zip(normed).map(|(a, b)| a * b);
                products.sum::<f32>()
            });
            most_likely(&logits.collect::<Vec<f32>>()).unwrap()
        });
        // Pair t guesses token t + 2; the first guess that counts is of the second greedy token.
        let right = guesses.zip(&tokens[2..]).skip(prompt.len() - 1);
        n_right_all += right.filter(|(guess, token)| guess == *token).count();
        n_recorded += n_recorded_right;
    }
    assert!(
        n_right_all.abs_diff(n_recorded) <= 3,
        "{n_right_all} of 1260 are right, {n_recorded} were"
    );
}

#[test]
fn with_a_head_tokens_are_the_same_and_guesses_as_good_as_recorded() {
    let kjv = Kjv::new();
    for depth in [Some(1), Some(4), None] {
        let engine = kjv.loaded.engine(kjv.options(depth));
        let requests = Kjv::prompts()
            .into_iter()
            .map(|(prompt, ..)| request(prompt, 64));
        let got = all_at_once(&engine, requests.collect());
        for (got, (_, expected, _)) in got.iter().zip(Kjv::prompts()) {
            assert_eq!(got, &expected);
        }
        engine.stop(true);
        let stats = engine.stats();
        if depth == Some(1) {
            let rate = stats.n_accepted as f64 / stats.n_drafted as f64;
            assert!((rate - 0.817).abs() < 0.03, "{rate}: {stats:?}");
            // Nearly every step guesses.
            assert!(stats.n_drafts > 20 * 30, "{stats:?}");
        }
    }
    // Of every kind, with others beside them, and where pages run out.
    let expected = all_at_once(&kjv.loaded.engine(options()), many(&kjv.loaded));
    for kv_bytes_max in [64 << 20, kjv.loaded.pages(12)] {
        let engine = kjv.loaded.engine(EngineOptions {
            kv_bytes_max,
            ..kjv.options(Some(3))
        });
        for _ in 0..2 {
            assert_eq!(all_at_once(&engine, many(&kjv.loaded)), expected);
        }
        engine.stop(true);
        assert!(engine.stats().n_accepted > 0);
    }
}

#[test]
fn what_was_found_in_the_cache_is_known_to_the_head_too() {
    let kjv = Kjv::new();
    let tokenizer = kjv.loaded.parts.tokenizer.as_ref().unwrap();
    let text = std::fs::read_to_string(root().join("models/kjv/heldout.txt")).unwrap();
    let tokens = tokenizer.encode(&text[..4000], true).unwrap();
    // None whose last token alone is missing: it would be guessed behind, which is a guess more.
    let prompts = [150, 192, 200, 300].map(|n| &tokens[..n]);
    let run = |engine: &engine::Engine, prompt: &[u32]| {
        let answer = ask(engine, request(prompt.to_vec(), 80));
        let (_, usage) = answer.end.unwrap();
        (
            answer.ids,
            usage.accepted_tokens,
            usage.rejected_tokens,
            usage.cached_tokens,
        )
    };
    let with = |reuse_prefixes, prefill_chunk| {
        kjv.loaded.engine(EngineOptions {
            reuse_prefixes,
            prefill_chunk,
            ..kjv.options(Some(2))
        })
    };
    let (alone, reusing) = (with(false, 256), with(true, 50));
    for prompt in prompts.into_iter().chain(prompts) {
        let (ids, accepted, rejected, _) = run(&alone, prompt);
        let (got, got_accepted, got_rejected, cached) = run(&reusing, prompt);
        assert_eq!(got, ids);
        assert_eq!((got_accepted, got_rejected), (accepted, rejected));
        assert!(cached > 0 || prompt.len() == 150);
        assert!(accepted > 20, "{accepted} of {rejected} were wrong");
    }
}

#[test]
fn drawn_tokens_are_the_same_and_guessed_with_their_own_numbers() {
    let kjv = Kjv::new();
    let requests = || -> Vec<Request> {
        let prompts = Kjv::prompts().into_iter().zip(0..);
        prompts
            .map(|((prompt, ..), seed)| Request {
                sampling: Sampling {
                    temperature: 0.7,
                    top_p: 0.95,
                    seed: Some(seed),
                    ..Sampling::default()
                },
                ..request(prompt, 64)
            })
            .collect()
    };
    let expected = all_at_once(&kjv.loaded.engine(options()), requests());
    let engine = kjv.loaded.engine(kjv.options(Some(1)));
    assert_eq!(all_at_once(&engine, requests()), expected);
    engine.stop(true);
    let stats = engine.stats();
    let rate = stats.n_accepted as f64 / stats.n_drafted as f64;
    assert!(rate > 0.5, "{rate}: {stats:?}");
}

#[test]
fn another_model_of_the_same_tokens_guesses() {
    let loaded = Loaded::new("models/kjv");
    let parts = &loaded.parts;
    // The model itself: it guesses all that is not drawn, and much of what is.
    let itself = Drafts::Model(Assistant {
        model: parts.model.clone(),
        ffn: parts.ffn.clone(),
    });
    let dir = parts.model.vindex().dir().to_owned();
    let opened = Drafts::open(&DraftChoice::Model(dir), &parts.model, &parts.pool).unwrap();
    for (drafts, kv_bytes_max) in [(itself, 64 << 20), (opened, loaded.pages(24))] {
        let engine = loaded.engine(EngineOptions {
            drafts,
            draft_depth: Some(4),
            kv_bytes_max,
            ..options()
        });
        let expected = all_at_once(&loaded.engine(options()), many(&loaded));
        assert_eq!(all_at_once(&engine, many(&loaded)), expected);
        let (prompt, greedy, _) = Kjv::prompts().remove(0);
        let answer = ask(&engine, request(prompt, 64));
        assert_eq!(answer.ids, greedy);
        let (_, usage) = answer.end.unwrap();
        assert_eq!(usage.rejected_tokens, 0);
        assert_eq!(usage.accepted_tokens, 63 - 63_usize.div_ceil(5));
    }
}

#[test]
fn models_of_each_kind_are_guessed_for_by_their_heads_and_by_themselves() {
    let mut n_models = 0;
    for name in ["qwen3_5", "qwen3_5_moe", "deepseek_v3"] {
        if let Some(files) = golden(name) {
            let head = root().join(format!("fixtures/heads/{name}.safetensors"));
            guessed_for(&Loaded::new(files.model.to_str().unwrap()), &head);
            n_models += 1;
        }
    }
    assert!(n_models > 0);
}

fn guessed_for(loaded: &Loaded, head: &Path) {
    let parts = &loaded.parts;
    let config = parts.model.config();
    let head = DraftChoice::Mtp(head.to_owned());
    let head = Drafts::open(&head, &parts.model, &parts.pool).unwrap();
    let itself = Drafts::Model(Assistant {
        model: parts.model.clone(),
        ffn: parts.ffn.clone(),
    });
    let expected = all_at_once(&loaded.engine(options()), many(loaded));
    // What both take together of four texts.
    let few = 8 * KvCache::bytes_for(config, KvType::default(), 200);
    for (drafts, accepts_all) in [(head, false), (itself, true)] {
        for (depth, kv_bytes_max) in [(1, 64 << 20), (8, 64 << 20), (5, few)] {
            let engine = loaded.engine(EngineOptions {
                drafts: drafts.clone(),
                draft_depth: Some(depth),
                kv_bytes_max,
                ..options()
            });
            for _ in 0..2 {
                assert_eq!(all_at_once(&engine, many(loaded)), expected);
            }
            let answer = ask(&engine, request(loaded.prompt(7, 70), 64));
            let (_, usage) = answer.end.unwrap();
            if accepts_all {
                let n_steps = 63_usize.div_ceil(1 + depth);
                assert_eq!(usage.rejected_tokens, 0);
                assert_eq!(usage.accepted_tokens, 63 - n_steps);
            }
            engine.stop(true);
            assert!(engine.stats().n_drafted > 0);
        }
    }
}

#[test]
fn heads_that_do_not_fit_are_refused_with_the_reason() {
    let loaded = Loaded::new("models/kjv");
    let numbers = HeadNumbers::of(loaded.parts.model.config(), Some("acme/kjv".to_owned()));
    let dir = tempfile::tempdir().unwrap();
    let open = |change: &dyn Fn(&mut Sidecar)| {
        let mut file = Sidecar::kjv();
        change(&mut file);
        Head::open(&file.write(dir.path()), &numbers, Q8_0)
    };
    open(&|_| {}).unwrap();
    let said = |key: &'static str, value: &'static str| {
        move |file: &mut Sidecar| {
            file.metadata.insert(key.to_owned(), value.to_owned());
        }
    };
    let refused = |change: &dyn Fn(&mut Sidecar)| open(change).unwrap_err();
    assert_eq!(
        refused(&said("skulk.layout", "other")),
        HeadError::Layout {
            got: "other".to_owned()
        }
    );
    assert!(matches!(
        refused(&said("skulk.hidden_size", "512")),
        HeadError::OtherModel { what: "hidden size", expected, got } if expected == "256" && got == "512"
    ));
    assert!(matches!(
        refused(&|file| {
            said("skulk.source_repo", "acme/other")(file);
            said("skulk.source_commit", "0123")(file);
        }),
        HeadError::OtherModel { what: "source", .. }
    ));
    assert!(matches!(
        refused(&|file| {
            file.tensors.remove("mtp.layers.0.self_attn.k_proj.weight");
        }),
        HeadError::Missing { tensor } if tensor.ends_with("k_proj.weight")
    ));
    // A projection alone guesses next to nothing; a block belongs to it.
    assert!(matches!(
        refused(&|file| file
            .tensors
            .retain(|name, _| !name.starts_with("mtp.layers."))),
        HeadError::Missing { .. }
    ));
    assert!(matches!(
        refused(&|file| {
            let entry = file.tensors.get_mut("mtp.fc.weight").unwrap();
            entry.1 = vec![512, 256];
        }),
        HeadError::Shape { expected, got, .. } if expected == [256, 512] && got == [512, 256]
    ));
    assert!(matches!(
        refused(&|file| {
            let sums = "{\"mtp.norm.weight\": \"00\"}";
            said("skulk.sha256", sums)(file);
        }),
        HeadError::Damaged { tensor } if tensor == "mtp.norm.weight"
    ));
    for (key, value) in [
        ("skulk.concat_order", "sideways"),
        ("skulk.norm_convention", "none"),
        ("skulk.hidden_state", "after_final_norm"),
    ] {
        assert!(
            matches!(refused(&said(key, value)), HeadError::Unsupported(_)),
            "{key}"
        );
    }
    for key in ["skulk.format", "skulk.layout", "skulk.concat_order"] {
        let error = refused(&|file| {
            file.metadata.remove(key);
        });
        assert!(error.to_string().contains(key), "{error}");
    }
    assert!(matches!(
        refused(&said("skulk.format", "mtp/2")),
        HeadError::File { .. }
    ));
    // Experts, of which the model does not tell how many are visited.
    let routed = root().join("fixtures/heads/qwen3_5_moe.safetensors");
    let mut plain = numbers.clone();
    plain.vocab = 512;
    plain.rope.n_dims = 8;
    let error = Head::open(&routed, &plain, Q8_0).unwrap_err();
    assert!(
        matches!(&error, HeadError::Unsupported(what) if what.contains("experts")),
        "{error}"
    );
    // Files that are cut anywhere, or claim what they have not.
    let whole = Sidecar::kjv().bytes();
    let path = dir.path().join("cut.safetensors");
    for n in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..n]).unwrap();
        Head::open(&path, &numbers, Q8_0).unwrap_err();
    }
    for n in [0_u64, u64::MAX, whole.len() as u64] {
        let bytes = [&n.to_le_bytes()[..], &whole[8..]].concat();
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(
            Head::open(&path, &numbers, Q8_0).unwrap_err(),
            HeadError::File { .. }
        ));
    }
    assert!(matches!(
        Head::open(&dir.path().join("absent"), &numbers, Q8_0).unwrap_err(),
        HeadError::Io { .. }
    ));
}

#[test]
fn who_belongs_to_another_model_does_not_guess() {
    let kjv = Kjv::new();
    let other = super::sameness::family("gemma3");
    let error = engine::Engine::start(other.parts.clone(), kjv.options(None)).unwrap_err();
    assert!(error.to_string().contains("hidden states"), "{error}");
    let choice = DraftChoice::Model(other.parts.model.vindex().dir().to_owned());
    let parts = &kjv.loaded.parts;
    let error = Drafts::open(&choice, &parts.model, &parts.pool).unwrap_err();
    assert!(error.to_string().contains("tokens"), "{error}");
}
