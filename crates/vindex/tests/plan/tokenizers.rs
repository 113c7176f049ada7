//! Tokenizers beyond those of the goldens: other files, other pre-tokenizers, several chat templates.

use serde_json::{Value, json};
use vindex::{MetaArray, MetaValue, Plan};

use super::changed::Changed;

#[test]
fn a_byte_fallback_tokenizer_without_its_model_file_gets_scores_in_the_order_of_its_merges() {
    for (family, prefix) in [("llama", true), ("gemma2", false)] {
        let with = Changed::family(family).plan().unwrap();
        let without = Changed::family(family)
            .without("tokenizer.model")
            .plan()
            .unwrap();
        let get = |plan: &Plan, key: &str| {
            plan.metadata
                .iter()
                .find(|(k, _)| k == key)
                .map(|(_, v)| v.clone())
                .unwrap_or(MetaValue::U8(0))
        };
        for key in [
            "tokenizer.ggml.model",
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.bos_token_id",
        ] {
            assert_eq!(get(&with, key), get(&without, key), "{family}: {key}");
        }
        assert_eq!(
            get(&without, "tokenizer.ggml.add_space_prefix"),
            MetaValue::Bool(prefix)
        );
        let (MetaValue::Array(MetaArray::F32s(a)), MetaValue::Array(MetaArray::F32s(b))) = (
            get(&with, "tokenizer.ggml.scores"),
            get(&without, "tokenizer.ggml.scores"),
        ) else {
            panic!("{family}: no scores");
        };
        // Tokens made by merges stand in the same order by either score.
        let made: Vec<usize> = (0..b.len())
            .filter(|&i| b[i] > -100_000.0 && a[i] > -1_000.0)
            .collect();
        let order = |scores: &[f32]| {
            let mut ids = made.clone();
            ids.sort_by(|&x, &y| scores[y].total_cmp(&scores[x]).then(x.cmp(&y)));
            ids
        };
        assert!(made.len() > 100, "{family}");
        assert_eq!(order(&a), order(&b), "{family}");
    }
    let shuffled =
        Changed::family("llama")
            .without("tokenizer.model")
            .json("tokenizer.json", |t| {
                let merges = t["model"]["merges"].as_array_mut().unwrap();
                merges.truncate(merges.len() - 1);
            });
    assert!(
        shuffled.error().contains("needs its tokenizer.model"),
        "{}",
        shuffled.error()
    );
}

#[test]
fn an_unknown_pre_tokenizer_is_default_with_a_warning() {
    let plan = Changed::family("qwen3")
        .json("tokenizer.json", |t| {
            t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("x+")
        })
        .plan()
        .unwrap();
    assert!(plan.metadata.contains(&(
        "tokenizer.ggml.pre".to_owned(),
        MetaValue::String("default".to_owned())
    )));
    assert!(
        plan.warnings.iter().any(|w| w.contains("pre-tokenizer")),
        "{:?}",
        plan.warnings
    );
}

#[test]
fn named_chat_templates_get_a_key_each() {
    let plan = Changed::family("qwen2")
        .json("tokenizer_config.json", |t| {
            t["chat_template"] = json!([
                {"name": "default", "template": "A"},
                {"name": "tool use", "template": "B"},
            ]);
        })
        .plan()
        .unwrap();
    let templates: Vec<_> = plan
        .metadata
        .iter()
        .filter(|(key, _)| key.contains("chat_template"))
        .collect();
    let text = |t: &str| MetaValue::String(t.to_owned());
    let expected = [
        (
            "tokenizer.chat_templates".to_owned(),
            MetaValue::Array(MetaArray::Strings(vec!["tool_use".to_owned()])),
        ),
        ("tokenizer.chat_template.tool_use".to_owned(), text("B")),
        ("tokenizer.chat_template".to_owned(), text("A")),
    ];
    assert!(templates.into_iter().eq(&expected));
}

/// The pre-tokenizers of published models, as their `tokenizer.json` has them, under llama.cpp's names.
#[test]
fn known_pre_tokenizers_are_told_by_their_patterns() {
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": use_regex});
    let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let deepseek_v3 = [
        r"\p{N}{1,3}",
        "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
    ];
    let digits = json!({"type": "Digits", "individual_digits": true});
    let cases = [
        ("gpt-2", false, bytes(true)),
        ("smollm", false, sequence(vec![digits, bytes(true)])),
        (
            "llama-bpe",
            true,
            sequence(vec![split(llama3), bytes(false)]),
        ),
        (
            "smaug-bpe",
            false,
            sequence(vec![split(llama3), bytes(false)]),
        ),
        (
            "deepseek-v3",
            false,
            sequence(
                deepseek_v3
                    .into_iter()
                    .map(split)
                    .chain([bytes(false)])
                    .collect(),
            ),
        ),
        (
            "default",
            false,
            sequence(vec![
                split(llama3),
                json!({"type": "Whitespace"}),
                bytes(false),
            ]),
        ),
        ("default", false, Value::Null),
    ];
    for (name, ignore_merges, pre_tokenizer) in cases {
        let plan = Changed::family("qwen3")
            .json("tokenizer.json", |t| {
                t["pre_tokenizer"] = pre_tokenizer.clone();
                t["model"]["ignore_merges"] = json!(ignore_merges);
            })
            .plan()
            .unwrap();
        let key = (
            "tokenizer.ggml.pre".to_owned(),
            MetaValue::String(name.to_owned()),
        );
        assert!(plan.metadata.contains(&key), "{name}: {pre_tokenizer}");
    }
}
