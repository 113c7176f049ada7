//! Files that lie or do not fit together: a clear error that names file and tensor, never a panic.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};
use vindex::Checkpoint;

use super::changed::{Changed, ONE, told};

const O: &str = "model.layers.0.self_attn.o_proj.weight";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn headers_that_lie_are_refused_with_file_and_tensor() {
    let llama = || Changed::family("llama");
    let bytes = llama().files[ONE].clone();
    let truncated = llama().with(ONE, &bytes[..100]);
    let short_data = llama().with(ONE, &bytes[..bytes.len() - 2]);
    let trailing = llama().with(ONE, [&bytes[..], b"xx"].concat());
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let duplicate = {
        let text = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        llama().with(
            ONE,
            [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &[0; 8]].concat(),
        )
    };
    let errors = [
        ("truncated header", truncated.error()),
        ("truncated data", short_data.error()),
        ("bytes after the data", trailing.error()),
        ("header of 2^64 - 1 bytes", llama().with(ONE, huge).error()),
        ("empty file", llama().with(ONE, Vec::new()).error()),
        ("a name twice", duplicate.error()),
        (
            "not JSON",
            llama()
                .with(ONE, [&4_u64.to_le_bytes()[..], b"{{{{"].concat())
                .error(),
        ),
        (
            "overlap",
            llama()
                .header(ONE, |h| h[Q]["data_offsets"] = h[O]["data_offsets"].clone())
                .error(),
        ),
        (
            "shape and offsets disagree",
            llama()
                .header(ONE, |h| h[Q]["shape"] = json!([256, 257]))
                .error(),
        ),
        (
            "shape overflows",
            llama()
                .header(ONE, |h| h[Q]["shape"] = json!([u64::MAX, u64::MAX]))
                .error(),
        ),
        (
            "offsets run backwards",
            llama()
                .header(ONE, |h| h[Q]["data_offsets"] = json!([9, 8]))
                .error(),
        ),
        (
            "gap",
            llama().header(ONE, |h| drop(h.shift_remove(Q))).error(),
        ),
        (
            "unknown type",
            llama()
                .header(ONE, |h| h[Q]["dtype"] = json!("F17"))
                .error(),
        ),
        (
            "negative offset",
            llama()
                .header(ONE, |h| h[Q]["data_offsets"] = json!([-2, 8]))
                .error(),
        ),
    ];
    insta::assert_snapshot!(told(&errors));
}

#[test]
fn checkpoints_that_do_not_fit_together_are_refused() {
    let index = "model.safetensors.index.json";
    let (first, second) = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    );
    let config = |change: fn(&mut Value)| Changed::family("llama").json("config.json", change);
    let elsewhere = |h: &mut serde_json::Map<String, Value>| {
        let tensor = h.shift_remove(Q).unwrap();
        h.insert("model.layers.0.self_attn.qq_proj.weight".to_owned(), tensor);
    };
    let errors = [
        (
            "no checkpoint",
            Changed::family("llama").without(ONE).error(),
        ),
        (
            "weights in another format",
            Changed::family("llama")
                .without(ONE)
                .with("pytorch_model.bin", *b"PK")
                .error(),
        ),
        (
            "missing shard",
            Changed::family("llama3").without(second).error(),
        ),
        (
            "in the index, not in its shard",
            Changed::family("llama3")
                .json(index, |i| i["weight_map"]["x"] = json!(first))
                .error(),
        ),
        (
            "in another shard than the index says",
            Changed::family("llama3")
                .json(index, |i| i["weight_map"][Q] = json!(first))
                .error(),
        ),
        ("in two shards", {
            let twice = Changed::family("llama3");
            let bytes = twice.files[first].clone();
            twice.with(second, bytes).error()
        }),
        (
            "unknown and missing tensor",
            Changed::family("llama").header(ONE, elsewhere).error(),
        ),
        (
            "unknown tensor",
            config(|c| c["num_hidden_layers"] = json!(1)).error(),
        ),
        (
            "missing tensors",
            config(|c| c["num_hidden_layers"] = json!(4)).error(),
        ),
        (
            "layers without end",
            config(|c| c["num_hidden_layers"] = json!(10_000))
                .error()
                .chars()
                .take(120)
                .collect(),
        ),
        (
            "wrong shape",
            config(|c| c["intermediate_size"] = json!(512)).error(),
        ),
        (
            "type",
            Changed::family("llama")
                .header(ONE, |h| h[Q]["dtype"] = json!("I16"))
                .error(),
        ),
        (
            "no config",
            Changed::family("llama").without("config.json").error(),
        ),
        (
            "unknown architecture",
            config(|c| c["architectures"] = json!(["MambaForCausalLM"])).error(),
        ),
        (
            "no architecture",
            config(|c| c["architectures"] = json!([])).error(),
        ),
        (
            "heads",
            config(|c| c["num_key_value_heads"] = json!(3)).error(),
        ),
        ("zero", config(|c| c["hidden_size"] = json!(0)).error()),
        (
            "text for a number",
            config(|c| c["rms_norm_eps"] = json!("small")).error(),
        ),
        (
            "activation",
            config(|c| c["hidden_act"] = json!("relu")).error(),
        ),
        (
            "rope scaling",
            config(|c| c["rope_scaling"] = json!({"type": "dynamic", "factor": 2.0})).error(),
        ),
        (
            "quantised",
            config(|c| c["quantization_config"] = json!({"quant_method": "gptq"})).error(),
        ),
        (
            "no tokenizer",
            Changed::family("llama")
                .without("tokenizer.model")
                .without("tokenizer.json")
                .error(),
        ),
        (
            "tokenizer.model is something else",
            Changed::family("llama")
                .with("tokenizer.model", *b"{\"a\": 1}")
                .error(),
        ),
        (
            "unigram",
            Changed::family("qwen3")
                .json("tokenizer.json", |t| t["model"]["type"] = json!("Unigram"))
                .error(),
        ),
        (
            "token beyond the embedding matrix",
            Changed::family("qwen3")
                .json("tokenizer.json", |t| {
                    t["added_tokens"][0]["id"] = json!(512)
                })
                .error(),
        ),
    ];
    insta::assert_snapshot!(told(&errors));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the bytes, opening ends with a checkpoint or an error.
    #[test]
    fn random_bytes_as_a_header_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let files = BTreeMap::from([(ONE.to_owned(), bytes)]);
        let _ = Checkpoint::open(&Changed { name: String::new(), files });
    }

    /// Whatever the length that it claims, no buffer is larger than the file (the source asserts that).
    #[test]
    fn claimed_lengths_size_no_buffer(length in any::<u64>(), shift in 0..64_u32, rest in prop::collection::vec(any::<u8>(), 0..40)) {
        let bytes = [&(length >> shift).to_le_bytes()[..], &rest].concat();
        let files = BTreeMap::from([(ONE.to_owned(), bytes)]);
        let _ = Checkpoint::open(&Changed { name: String::new(), files });
    }

    /// Likewise for text that is nearly a header; one that is accepted tiles the file.
    #[test]
    fn random_entries_never_panic(
        entries in prop::collection::btree_map("[a-c]{0,2}", ("(F32|BF16|F4|I64|X)", prop::collection::vec(0_u64..5, 0..10), 0_u64..40, 0_u64..40), 0..4),
        data in 0_usize..60,
    ) {
        let header: serde_json::Map<String, Value> = entries
            .into_iter()
            .map(|(name, (dtype, shape, start, end))| {
                (name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}))
            })
            .collect();
        let text = Value::Object(header).to_string();
        let bytes = [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &vec![0; data]].concat();
        let files = BTreeMap::from([(ONE.to_owned(), bytes)]);
        if let Ok(checkpoint) = Checkpoint::open(&Changed { name: String::new(), files }) {
            let total: u64 = checkpoint.tensors().map(|(_, t)| t.size_bytes).sum();
            prop_assert_eq!(total, data as u64);
        }
    }
}
