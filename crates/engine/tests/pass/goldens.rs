//! Every family, extracted in single precision, against logits and greedy tokens that `transformers` computed.

#[path = "../../../vindex/tests/support/goldens.rs"]
pub(crate) mod folder;

use std::panic::catch_unwind;

use engine::KvType;
use quant::BlockType;
use vindex::{Plan, Recipe, Tensor, Values};

use crate::npz::Npz;
use crate::support::{Engine, Extracted, difference, extracted_from, extracted_with};
use folder::{Golden, coded, goldens};

/// Of the standard deviation of the logits.
const TOLERANCE: f64 = 2e-3;

/// The same for the median token, where weights are integers and what they are multiplied with is rounded to 8 bits: the
/// router of a token or another may then choose another expert.
const TOLERANCE_OF_BLOCKS: f64 = 0.1;

/// The same model with all its weights in single precision; `None` where they are.
fn without_blocks(of: &Golden, model: &Extracted) -> Option<Extracted> {
    let index = model.vindex.index();
    let is_blocks = |t: &&Tensor| t.block_type.block_len() > 1;
    let decoded: Vec<(&str, Vec<f32>)> = index
        .tensors
        .iter()
        .filter(is_blocks)
        .map(|t| {
            let view = model.vindex.tensor(&t.name).unwrap();
            let mut values = vec![0.0; t.ne.iter().product::<u64>() as usize];
            quant::decode(view.block_type, view.bytes, &mut values);
            (t.name.as_str(), values)
        })
        .collect();
    let change = |plan: &mut Plan| {
        for tensor in plan.parts.iter_mut().flat_map(|part| &mut part.tensors) {
            if let Some((_, values)) = decoded.iter().find(|(name, _)| *name == tensor.name) {
                tensor.block_type = BlockType::F32;
                tensor.values = Values::Computed {
                    values: values.clone(),
                };
            }
        }
    };
    (!decoded.is_empty()).then(|| extracted_with(&of.model, Recipe::F32, change))
}

fn compare(of: &Golden, n_prompts: usize) {
    let (family, golden) = (&of.family, Npz::open(&of.npz));
    let mut model = extracted_from(&of.model, Recipe::F32);
    if let Some(exact) = without_blocks(of, &model) {
        let mut engine = Engine::new(&model.vindex, KvType::F32, 2);
        for prompt in 0..n_prompts {
            let ids = golden.tokens(&format!("ids_{prompt}"));
            let expected = golden.f32s(&format!("logits_{prompt}"));
            let (got, vocab) = (engine.logits(&ids), expected.len() / ids.len());
            let tokens = got.chunks(vocab).zip(expected.chunks(vocab));
            let mut all: Vec<f64> = tokens.map(|(a, b)| difference(a, b)).collect();
            all.sort_by(f64::total_cmp);
            let differs = all[all.len() / 2];
            assert!(
                differs < TOLERANCE_OF_BLOCKS,
                "{family}, prompt {prompt}, as it is stored: {differs:e}"
            );
        }
        model = exact;
    }
    let mut engine = Engine::new(&model.vindex, KvType::F32, 2);
    let mut half = Engine::new(&model.vindex, KvType::F16, 2);
    for prompt in 0..n_prompts {
        let ids = golden.tokens(&format!("ids_{prompt}"));
        let expected = golden.f32s(&format!("logits_{prompt}"));
        let differs = difference(&engine.logits(&ids), &expected);
        assert!(
            differs < TOLERANCE,
            "{family}, prompt {prompt}: {differs:e}"
        );
        let greedy = golden.tokens(&format!("greedy_{prompt}"));
        assert_eq!(
            engine.greedy(&ids, greedy.len() - ids.len()),
            greedy,
            "{family}, prompt {prompt}"
        );
        // Half precision has 11 bits; keys and values are rounded to it once in each layer. Scores that are not scaled
        // down have more of it.
        let a = &model.vindex.index().config.attention;
        let usual = (a.scale * (a.key_length as f32).sqrt()) < 1.5;
        let differs = difference(&half.logits(&ids), &expected);
        assert!(
            differs < if usual { 2e-2 } else { 4e-2 },
            "{family}, prompt {prompt}, f16: {differs:e}"
        );
    }
}

#[test]
fn every_family_is_what_transformers_computes() {
    let all = goldens();
    let differ: Vec<&str> = all
        .iter()
        .filter(|golden| catch_unwind(|| compare(golden, 3)).is_err())
        .map(|golden| golden.family.as_str())
        .collect();
    assert!(
        differ.is_empty(),
        "of {} families {differ:?} differ",
        all.len()
    );
}

#[test]
fn codes_with_scales_are_the_weights_that_they_stand_for() {
    for golden in coded() {
        compare(&golden, 2);
    }
}
