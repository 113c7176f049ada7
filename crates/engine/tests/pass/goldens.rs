//! Every family, extracted in single precision, against logits and greedy tokens that `transformers` computed.

#[path = "../../../vindex/tests/support/goldens.rs"]
mod folder;

use std::panic::catch_unwind;

use engine::KvType;
use vindex::Recipe;

use crate::npz::Npz;
use crate::support::{Engine, difference, extracted_from};
use folder::{Golden, goldens};

/// Of the standard deviation of the logits.
const TOLERANCE: f64 = 2e-3;

fn compare(of: &Golden) {
    let (family, golden) = (&of.family, Npz::open(&of.npz));
    let model = extracted_from(&of.model, Recipe::F32);
    let mut engine = Engine::new(&model.vindex, KvType::F32, 2);
    let mut half = Engine::new(&model.vindex, KvType::F16, 2);
    for prompt in 0..3 {
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
        .filter(|golden| catch_unwind(|| compare(golden)).is_err())
        .map(|golden| golden.family.as_str())
        .collect();
    assert!(
        differ.is_empty(),
        "of {} families {differ:?} differ",
        all.len()
    );
}
