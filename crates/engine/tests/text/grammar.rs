//! Texts under a grammar, chosen at random from what the grammar lets pass.

use engine::{Grammar, GrammarFactory, Sampler, Sampling, Tokenizer};
use serde_json::{Value, json};

use super::extracted;

/// A text of at most `n` tokens, each drawn from logits that know nothing; the second value says whether it ended.
fn wander(tokenizer: &Tokenizer, mut grammar: Grammar, seed: u64, n: usize) -> (String, bool) {
    let sampling = Sampling {
        temperature: 1.0,
        ..Sampling::default()
    };
    let mut sampler = Sampler::new(&sampling, &[], seed);
    let mut ids = Vec::new();
    for _ in 0..n {
        let mut logits = vec![0.0; tokenizer.n_vocab()];
        grammar.mask(&mut logits).unwrap();
        let id = sampler.choose(&logits).unwrap();
        grammar.accept(id).unwrap();
        if tokenizer.eos().contains(&id) {
            return (tokenizer.decode(&ids, true), true);
        }
        ids.push(id);
        if grammar.is_complete() {
            return (tokenizer.decode(&ids, true), true);
        }
    }
    (tokenizer.decode(&ids, true), false)
}

#[test]
fn texts_under_a_schema_are_of_the_schema() {
    let schema = json!({
        "type": "object",
        "properties": {
            "city": {"enum": ["Zürich", "Bern"]},
            "n": {"type": "integer", "minimum": 3, "maximum": 12},
            "wet": {"type": "boolean"},
        },
        "required": ["city", "n", "wet"],
        "additionalProperties": false,
    });
    for family in ["llama", "gemma2", "qwen3"] {
        let (_dir, vindex) = extracted(&format!("fixtures/models/{family}"));
        let tokenizer = Tokenizer::of(&vindex).unwrap();
        let factory = GrammarFactory::new(&tokenizer).unwrap();
        let grammar = factory.json_schema(&schema).unwrap();
        let mut n_ended = 0;
        for seed in 0..20 {
            let (text, ended) = wander(&tokenizer, grammar.clone(), seed, 400);
            if !ended {
                continue;
            }
            n_ended += 1;
            let value: Value = serde_json::from_str(text.trim_start())
                .unwrap_or_else(|e| panic!("{family}: {text:?}: {e}"));
            assert!(
                matches!(value["city"].as_str(), Some("Zürich" | "Bern")),
                "{text}"
            );
            assert!((3..=12).contains(&value["n"].as_i64().unwrap()), "{text}");
            assert!(
                value["wet"].is_boolean() && value.as_object().unwrap().len() == 3,
                "{text}"
            );
        }
        assert!(n_ended >= 10, "{family}: {n_ended} of 20 ended");
    }
}

/// What Python's `pydantic` writes for a class with the usual kinds of fields.
#[test]
fn schemas_as_programs_write_them_are_compiled() {
    let (_dir, vindex) = extracted("fixtures/models/qwen3");
    let tokenizer = Tokenizer::of(&vindex).unwrap();
    let factory = GrammarFactory::new(&tokenizer).unwrap();
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {
            "Step": {
                "type": "object",
                "title": "Step",
                "description": "One step",
                "properties": {
                    "text": {"type": "string", "title": "Text", "minLength": 1, "maxLength": 9},
                    "next": {"anyOf": [{"$ref": "#/$defs/Step"}, {"type": "null"}], "default": null},
                },
                "required": ["text"],
                "additionalProperties": false,
            },
        },
        "type": "object",
        "title": "Answer",
        "properties": {
            "steps": {"type": "array", "items": {"$ref": "#/$defs/Step"}, "minItems": 1, "maxItems": 2},
            "when": {"type": "string", "format": "date-time"},
            "kind": {"type": "string", "enum": ["a", "b"]},
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"},
            "tags": {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "required": ["steps", "when", "kind", "share", "code", "tags"],
        "additionalProperties": false,
    });
    let grammar = factory.json_schema(&schema).unwrap();
    let (text, _) = wander(&tokenizer, grammar, 1, 300);
    assert!(
        text.trim_start().starts_with('{') && text.contains("\"steps\""),
        "{text}"
    );
}

#[test]
fn expressions_and_grammars_are_followed_to_the_end() {
    let (_dir, vindex) = extracted("fixtures/models/qwen3");
    let tokenizer = Tokenizer::of(&vindex).unwrap();
    let factory = GrammarFactory::new(&tokenizer).unwrap();
    for seed in 0..10 {
        let regex = factory.regex("(yes|no), [0-9]{3}").unwrap();
        let (text, ended) = wander(&tokenizer, regex, seed, 50);
        assert!(
            ended && (text.starts_with("yes, ") || text.starts_with("no, ")),
            "{text:?}"
        );
        let lark = factory
            .lark("start: \"<a>\" body \"</a>\"\nbody: %json {\"enum\": [1, 2]}")
            .unwrap();
        let (text, ended) = wander(&tokenizer, lark, seed, 50);
        assert!(
            ended && text.starts_with("<a>") && text.ends_with("</a>"),
            "{text:?}"
        );
    }
    let object = factory.json_object().unwrap();
    let (text, _) = wander(&tokenizer, object, 3, 5);
    assert!(text.trim_start().starts_with('{'), "{text:?}");
}

#[test]
fn what_cannot_be_compiled_or_followed_is_an_error() {
    let (_dir, vindex) = extracted("fixtures/models/qwen3");
    let tokenizer = Tokenizer::of(&vindex).unwrap();
    let factory = GrammarFactory::new(&tokenizer).unwrap();
    let refused = |schema: Value| factory.json_schema(&schema).unwrap_err().to_string();
    assert!(refused(json!({"type": "nonsense"})).contains("nonsense"));
    assert!(!refused(json!({"not": {"type": "string"}})).is_empty());
    assert!(!refused(json!({"$ref": "https://elsewhere.example/schema"})).is_empty());
    assert!(!refused(json!("text")).is_empty());
    assert!(refused(json!({"x-guidance": {"lenient": true}})).contains("x-guidance"));
    assert!(refused(json!({"description": "x".repeat(2 << 20)})).contains("bytes"));
    assert!(factory.regex("(").is_err());
    assert!(factory.lark("start: nothing").is_err());
    let mut grammar = factory.regex("ab").unwrap();
    let z = tokenizer.encode("z", false).unwrap()[0];
    assert!(grammar.accept(z).is_err());
    assert!(grammar.mask(&mut vec![0.0; 512]).is_err());
}

/// What would take long or much where nothing bounds it: each is compiled and followed for a while, or refused.
#[test]
fn hostile_schemas_end() {
    let (_dir, vindex) = extracted("fixtures/models/qwen3");
    let tokenizer = Tokenizer::of(&vindex).unwrap();
    let factory = GrammarFactory::new(&tokenizer).unwrap();
    let names: Vec<String> = (0..20_000).map(|i| format!("value {i}")).collect();
    let many: Vec<Value> = (0..300)
        .map(|i| json!({"pattern": format!("^(a|b)*a(a|b){{{i}}}$")}))
        .collect();
    let by_name: serde_json::Map<String, Value> = (0..2000)
        .map(|i| (format!("^(a|b)*c{{{i}}}$"), json!({})))
        .collect();
    let mut chain = json!({});
    for i in 0..300 {
        let pattern = format!("^(a|b)*a(a|b){{{i}}}$");
        chain[format!("d{i}")] = json!({"$ref": format!("#/$defs/d{}", i + 1), "pattern": pattern});
    }
    chain["d300"] = json!({"type": "string"});
    let mut deep = json!({"type": "string"});
    for _ in 0..100 {
        deep = json!({"anyOf": [{"type": "array", "items": deep}, {"type": "null"}]});
    }
    let schemas = [
        json!({"enum": names}),
        json!({"type": "string", "maxLength": 1_000_000_000}),
        json!({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}),
        json!({"type": "string", "pattern": "^(a|b)*a(a|b){300}$"}),
        json!({"type": "array", "items": {}, "minItems": 1_000_000_000}),
        json!({"type": "integer", "minimum": -1e300, "maximum": 1e300}),
        json!({"allOf": many}),
        json!({"allOf": many[..8]}),
        json!({"patternProperties": by_name}),
        json!({"$ref": "#"}),
        json!({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        json!({"$defs": chain, "$ref": "#/$defs/d0"}),
        deep,
    ];
    let mut n_refused = 0;
    for schema in schemas {
        let Ok(mut grammar) = factory.json_schema(&schema) else {
            n_refused += 1;
            continue;
        };
        let mut sampler = Sampler::new(
            &Sampling {
                temperature: 1.0,
                ..Sampling::default()
            },
            &[],
            1,
        );
        for _ in 0..30 {
            let mut logits = vec![0.0; tokenizer.n_vocab()];
            if grammar.is_complete() || grammar.mask(&mut logits).is_err() {
                break;
            }
            let Some(id) = sampler.choose(&logits) else {
                break;
            };
            grammar.accept(id).unwrap();
        }
    }
    assert!(n_refused >= 3, "{n_refused} refused");
}
