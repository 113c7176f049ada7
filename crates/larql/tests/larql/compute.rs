//! `run`, `logits`, `perplexity` and `bench`, on a model that was really trained.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use vindex::{Component, Vindex};

use crate::bench::{Bench, kjv};
use crate::served::Served;

pub(crate) fn recorded() -> Vec<Value> {
    let path = PathBuf::from(kjv()).join("prompts.json");
    let value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    value["prompts"].as_array().unwrap().clone()
}

/// What a command tells with `--json`, as it was printed: the harness takes some fractions for identities.
pub(crate) fn json(bench: &Bench, args: &[&str]) -> Value {
    let run = bench.command(args).output().unwrap();
    assert!(
        run.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&run.stderr)
    );
    serde_json::from_slice(&run.stdout).unwrap()
}

/// The tokens of a prompt. The recorded continuations are those of the bare text, without the token that opens a
/// document.
pub(crate) fn prompt_ids(prompt: &Value) -> String {
    ids(&prompt["prompt_ids"].as_array().unwrap()[1..])
}

fn ids(ids: &[Value]) -> String {
    let ids = ids.iter().map(Value::to_string);
    ids.collect::<Vec<_>>().join(",")
}

#[test]
fn the_recorded_continuations_and_what_is_told_of_them() {
    let bench = Bench::new();
    bench.ok(&["extract", &kjv(), "-o", "f32", "--quant", "f32"]);
    for prompt in &recorded()[..4] {
        let told = json(
            &bench,
            &[
                "run",
                "f32",
                "--ids",
                &prompt_ids(prompt),
                "--max-tokens",
                "64",
                "--greedy",
                "--ignore-eos",
                "--kv",
                "f32",
                "--json",
            ],
        );
        assert_eq!(told["ids"], prompt["greedy_ids"]);
        assert_eq!(told["finish_reason"], "length");
        assert!(told["timings"]["decode_tok_s"].as_f64().unwrap() > 0.0);
        assert!(
            told["bytes_per_token"]["feed_forward_weights"].as_u64() == Some(4 * 3 * 256 * 768 * 4)
        );
    }

    // The same as text: what is written is the text of the same tokens.
    let text = recorded()[0]["prompt"].as_str().unwrap().to_owned();
    let told = json(
        &bench,
        &["run", "f32", "--max-tokens", "12", "--json", &text],
    );
    let as_text = bench.ok(&["run", "f32", "--max-tokens", "12", &text]);
    assert_eq!(
        as_text.stdout.trim_end_matches('\n'),
        told["text"].as_str().unwrap().trim_end_matches('\n')
    );

    // The file is what NumPy calls an array, and its rows are the logits from which the run above chose.
    let prompt = &recorded()[0];
    bench.ok(&[
        "logits",
        "f32",
        "--ids",
        &prompt_ids(prompt),
        "--kv",
        "f32",
        "-o",
        "logits.npy",
    ]);
    let file = fs::read(bench.path("logits.npy")).unwrap();
    let n_tokens = prompt["prompt_ids"].as_array().unwrap().len() - 1;
    assert!(
        String::from_utf8_lossy(&file[..128]).contains(&format!("'shape': ({n_tokens}, 2048), }}"))
    );
    let logits: Vec<f32> = file[128..]
        .as_chunks()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect();
    assert_eq!(logits.len(), n_tokens * 2048);
    let last = &logits[(n_tokens - 1) * 2048..];
    let best = (0..2048).fold(0, |best, i| if last[i] > last[best] { i } else { best });
    assert_eq!(prompt["greedy_ids"][0], best);
}

#[test]
fn a_trained_model_foresees_its_text() {
    let bench = Bench::new();
    bench.ok(&["extract", &kjv(), "-o", "q4k", "--quant", "q4k"]);
    let text = fs::read_to_string(PathBuf::from(kjv()).join("heldout.txt")).unwrap();
    let some: String = text.chars().take(8_000).collect();
    fs::write(bench.path("text.txt"), &some).unwrap();
    let told = json(
        &bench,
        &[
            "perplexity",
            "q4k",
            "--text",
            "text.txt",
            "--window",
            "256",
            "--json",
        ],
    );
    // The whole of the text has about 17.6, a model that knows nothing 2048.
    let perplexity = told["perplexity"].as_f64().unwrap();
    assert!((10.0..30.0).contains(&perplexity), "{told}");
    let n_windows = told["n_windows"].as_u64().unwrap();
    assert_eq!(told["n_scored"].as_u64().unwrap(), n_windows * 127);

    let run = bench.run(&["perplexity", "q4k", "--text", "text.txt", "--window", "3"]);
    assert!(
        run.code == Some(1) && run.stderr.contains("a window of 3 tokens is outside 4 to"),
        "{}",
        run.stderr
    );
    let run = bench.run(&["run", "q4k", "--ids", "2048"]);
    assert!(
        run.code == Some(1)
            && run
                .stderr
                .contains("token 2048 is not among the model's 2048"),
        "{}",
        run.stderr
    );

    let told = json(
        &bench,
        &[
            "bench",
            "q4k",
            "--prompt",
            "20",
            "--tokens",
            "4",
            "--streams",
            "2",
            "--threads",
            "1",
            "--json",
        ],
    );
    assert_eq!(told["streams"], 2);
    for figure in [
        "decode_tok_s",
        "prefill_tok_s",
        "weights_gb_s",
        "bandwidth_gb_s",
    ] {
        assert!(told[figure].as_f64().unwrap() > 0.0, "{told}");
    }
}

#[test]
fn a_split_run_gives_the_tokens_of_an_unsplit_one_without_the_weights_it_asks_for() {
    let bench = Bench::with_vindex(&kjv(), "q4k");
    let served = Served::start(&bench, &["out", "--listen", "127.0.0.1:0"], &[]);
    let run = |more: &[&str]| {
        let ids = "20,27,34,41,48";
        let run = ["run", "out", "--ids", ids, "--max-tokens", "24", "--greedy"];
        json(
            &bench,
            &[&run[..], &["--ignore-eos", "--json"], more].concat(),
        )
    };
    let unsplit = run(&[]);
    // What the server has mapped stays with it; whoever asks it never opens these files.
    let index = Vindex::open(&bench.path("out")).unwrap().index().clone();
    for part in &index.parts {
        if matches!(part.component, Component::FeedForward { .. }) {
            fs::remove_file(bench.path("out").join(&part.file)).unwrap();
        }
    }
    let peer = served.text("listen");
    let patience = ["--ffn-deadline", "20s", "--ffn-stall", "1s"];
    let split = run(&[&["--ffn", peer], &patience[..]].concat());
    assert_eq!(split["ids"], unsplit["ids"]);
    assert!(served.metric("skulk_weights_rows_total") > 0);

    let bench_args = ["bench", "out", "--prompt", "8", "--tokens", "2", "--json"];
    let told = json(&bench, &[&bench_args[..], &["--ffn", peer]].concat());
    assert!(told["round_trip_us"].as_f64().unwrap() > 0.0, "{told}");

    let run = bench.run(&["run", "out", "--ids", "20", "--ffn-deadline", "1s"]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    let run = bench.run(&["run", "out", "--ids", "20", "--ffn", "127.0.0.1:1"]);
    assert!(
        run.code == Some(1) && run.stderr.contains("start the missing weight servers"),
        "{}",
        run.stderr
    );
}
