//! `run --draft`: the tokens of `run`, guessed by a head, by the text itself, or by a model.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::bench::{Bench, kjv};
use crate::compute::{json as run_json, prompt_ids, recorded};

/// Writes the head of the model in `models/kjv` as `mtp.safetensors`: its last shard, whose other tensors nobody reads,
/// with the metadata of docs/sidecars.md.
fn write_head(target: &PathBuf) {
    let shard = PathBuf::from(kjv()).join("model-00002-of-00002.safetensors");
    let bytes = fs::read(shard).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    header["__metadata__"] = json!({
        "skulk.format": "mtp/1", "skulk.layout": "block", "skulk.norm_convention": "actual_scale",
        "skulk.concat_order": "embed_first", "skulk.hidden_state": "before_final_norm",
    });
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(&bytes[8 + n..]);
    fs::write(target, file).unwrap();
}

#[test]
fn guesses_change_no_token() {
    let bench = Bench::new();
    bench.ok(&["extract", &kjv(), "-o", "q4k", "--quant", "q4k"]);
    let head = bench.path("mtp.safetensors");
    write_head(&head);
    let by_head = format!("mtp={}", head.display());
    for prompt in &recorded()[..2] {
        let ids = prompt_ids(prompt);
        for sampling in [&["--greedy"][..], &["--temperature", "0.8", "--seed", "5"]] {
            let ask = |more: &[&str]| {
                let first = ["run", "q4k", "--ids", &ids, "--max-tokens", "40", "--json"];
                run_json(&bench, &[&first, sampling, more].concat())
            };
            let plain = ask(&[]);
            assert_eq!(plain["guesses"], Value::Null);
            for draft in [by_head.as_str(), "ngram", "model=q4k"] {
                let got = ask(&["--draft", draft, "--draft-depth", "2"]);
                assert_eq!(got["ids"], plain["ids"], "{draft}");
                assert_eq!(got["finish_reason"], plain["finish_reason"], "{draft}");
                let n_right = got["guesses"]["accepted"].as_u64().unwrap();
                assert!(draft == "ngram" || n_right > 10, "{draft}: {got}");
            }
        }
    }
    let error = bench.command(&["run", "q4k", "--ids", "1,2", "--draft", "mtp=absent"]);
    let error = { error }.output().unwrap();
    assert!(!error.status.success());
    let said = String::from_utf8_lossy(&error.stderr);
    assert!(
        said.contains("--draft") && said.contains("absent"),
        "{said}"
    );
}
