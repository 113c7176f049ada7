//! Every family, extracted in single precision, against logits and greedy tokens that `transformers` computed.

use engine::KvType;
use vindex::Recipe;

use crate::npz::Npz;
use crate::support::{Engine, difference, extracted, fixtures};

/// Of the standard deviation of the logits.
const TOLERANCE: f64 = 2e-3;

fn compare(family: &str) {
    let golden = Npz::open(&fixtures().join("goldens").join(format!("{family}.npz")));
    let model = extracted(family, Recipe::F32);
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
        // Half precision has 11 bits; keys and values are rounded to it once in each layer.
        let differs = difference(&half.logits(&ids), &expected);
        assert!(
            differs < 2e-2,
            "{family}, prompt {prompt}, f16: {differs:e}"
        );
    }
}

macro_rules! families {
    ($($family:ident)*) => {
        $(
            #[test]
            fn $family() {
                compare(stringify!($family));
            }
        )*

        #[test]
        fn every_family_of_the_repository_is_compared() {
            let listing = std::fs::read_dir(fixtures().join("models")).unwrap();
            let mut found: Vec<_> = listing.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            found.sort();
            assert_eq!(found, [$(stringify!($family)),*]);
        }
    };
}

families!(gemma2 gemma3 llama llama3 mistral mixtral qwen2 qwen3 qwen3_5 qwen3_moe);
