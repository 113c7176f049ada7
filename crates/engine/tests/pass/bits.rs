//! What must not change a bit of the logits: how a prompt is cut, what else is in the batch, how many threads there are.

use engine::{KvType, Sequence, Wanted, Work};
use vindex::Recipe;

use crate::goldens::folder::{Golden, goldens};
use crate::support::{Engine, bits, extracted_from};

/// Longer than a page, so that chunks end within pages and pages within chunks; repeats nothing soon.
fn prompt(n: u32, seed: u32) -> Vec<u32> {
    (0..n)
        .map(|i| (i * 37 + i * i * seed + 11 * seed) % 500)
        .collect()
}

#[test]
fn chunks_of_a_prompt() {
    let kv_types = [KvType::F16, KvType::F32].into_iter().cycle();
    for (Golden { family, model, .. }, kv_type) in goldens().into_iter().zip(kv_types) {
        let model = extracted_from(&model, Recipe::Q4k);
        let mut engine = Engine::new(&model.vindex, kv_type, 2);
        let tokens = prompt(150, 3);
        let expected = engine.logits(&tokens);
        for chunk in [1, 3, 64, 149] {
            let mut sequence = engine.cache.sequence();
            let got = engine.append(&mut sequence, &tokens, chunk);
            assert_eq!(sequence.len(), tokens.len());
            assert!(
                bits(&got) == bits(&expected),
                "{family} in chunks of {chunk}"
            );
        }
    }
}

#[test]
fn sequences_in_one_batch() {
    for Golden { family, model, .. } in goldens() {
        let model = extracted_from(&model, Recipe::Q4k);
        let mut engine = Engine::new(&model.vindex, KvType::F16, 2);
        let prompts = [
            prompt(5, 1),
            prompt(80, 2),
            prompt(1, 3),
            prompt(17, 5),
            prompt(66, 7),
        ];
        let alone: Vec<Vec<f32>> = prompts.iter().map(|tokens| engine.logits(tokens)).collect();
        let vocab = alone[2].len();
        let mut sequences: Vec<Sequence> =
            prompts.iter().map(|_| engine.cache.sequence()).collect();
        // All but the last token of each that has several, then the last ones: prompts of several lengths, then a
        // decoding step.
        let wanted = [
            Wanted::Nothing,
            Wanted::All,
            Wanted::Nothing,
            Wanted::Last,
            Wanted::All,
        ];
        let mut works = Vec::new();
        let mut expected = Vec::new();
        for (i, sequence) in sequences.iter_mut().enumerate() {
            let n = prompts[i].len() - 1;
            if n > 0 {
                expected.extend_from_slice(&alone[i][(n - wanted[i].n_rows(n)) * vocab..n * vocab]);
                works.push(Work {
                    sequence,
                    tokens: &prompts[i][..n],
                    logits: wanted[i],
                });
            }
        }
        let got = engine.forward.step(&mut works).unwrap();
        assert_eq!(got.len(), (79 + 1 + 65) * vocab, "{family}");
        assert!(bits(got) == bits(&expected), "{family}");
        let mut works: Vec<Work<'_>> = sequences
            .iter_mut()
            .zip(&prompts)
            .map(|(sequence, tokens)| Work {
                sequence,
                tokens: &tokens[tokens.len() - 1..],
                logits: Wanted::Last,
            })
            .collect();
        let got = engine.forward.step(&mut works).unwrap();
        let expected: Vec<f32> = alone
            .iter()
            .flat_map(|l| l[l.len() - vocab..].to_vec())
            .collect();
        assert!(bits(got) == bits(&expected), "{family}");
    }
}

#[test]
fn threads() {
    let recipes = [Recipe::Q4k, Recipe::F32, Recipe::Bf16, Recipe::Q8_0];
    for (Golden { family, model, .. }, recipe) in
        goldens().into_iter().zip(recipes.into_iter().cycle())
    {
        let model = extracted_from(&model, recipe);
        let tokens = prompt(70, 4);
        let expected = Engine::new(&model.vindex, KvType::F16, 1).logits(&tokens);
        for n_threads in [2, 3] {
            let got = Engine::new(&model.vindex, KvType::F16, n_threads).logits(&tokens);
            assert!(
                bits(&got) == bits(&expected),
                "{family} on {n_threads} threads"
            );
        }
    }
}

#[test]
fn hidden_states_of_every_row_wanted_or_not() {
    for Golden { family, model, .. } in goldens() {
        let model = extracted_from(&model, Recipe::Q4k);
        let mut engine = Engine::new(&model.vindex, KvType::F16, 2);
        assert!(engine.forward.hidden().is_empty());
        engine.logits(&prompt(3, 3));
        assert!(engine.forward.hidden().is_empty(), "nobody asked for them");
        engine.forward = engine.forward.keeping_hidden();
        let tokens = prompt(70, 3);
        engine.logits(&tokens);
        let expected = bits(engine.forward.hidden());
        let hidden = engine.forward.model().config().hidden as usize;
        assert_eq!(expected.len(), tokens.len() * hidden);
        let (mut sequence, mut got) = (engine.cache.sequence(), Vec::new());
        for tokens in tokens.chunks(33) {
            let mut works = [Work {
                sequence: &mut sequence,
                tokens,
                logits: Wanted::Last,
            }];
            engine.forward.step(&mut works).unwrap();
            got.extend(bits(engine.forward.hidden()));
        }
        assert!(got == expected, "{family}");
    }
}
