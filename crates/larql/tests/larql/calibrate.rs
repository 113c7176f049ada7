//! `imatrix`, and `extract` with statistics, on a model that was really trained.

use std::fs;
use std::path::{Path, PathBuf};

use vindex::{Imatrix, Vindex};

use crate::bench::{Bench, kjv};
use crate::compute::json;

fn fixture(family: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models");
    path.join(family).to_str().unwrap().to_owned()
}

/// Two texts of the same kind that the model was not trained on: one to calibrate with, one to measure with.
fn texts(bench: &Bench) {
    let text = fs::read_to_string(PathBuf::from(kjv()).join("heldout.txt")).unwrap();
    let middle = text[..text.len() / 2].rfind('\n').unwrap();
    fs::write(bench.path("seen.txt"), &text[..middle]).unwrap();
    fs::write(bench.path("unseen.txt"), &text[middle + 1..]).unwrap();
}

fn listing(bench: &Bench) -> Vec<String> {
    let entries = fs::read_dir(bench.dir.path()).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn id(bench: &Bench, dir: &str) -> String {
    Vindex::open(&bench.path(dir)).unwrap().id().to_string()
}

#[test]
fn a_text_and_its_statistics_give_the_same_vindex() {
    let bench = Bench::new();
    texts(&bench);
    let kjv = kjv();
    let before = listing(&bench);
    let extract = |out: &str, more: &[&str]| {
        let args = ["extract", &kjv, "-o", out, "--quant", "q4k"];
        bench.ok(&[&args, more].concat());
    };
    extract("one", &["--calibrate", "seen.txt", "--threads", "1"]);
    bench.ok(&["verify", "one"]);
    // The copy that is not quantised is gone.
    let mut after = before;
    after.push("one".to_owned());
    after.sort();
    assert_eq!(listing(&bench), after);
    extract("three", &["--calibrate", "seen.txt", "--threads", "3"]);
    assert_eq!(id(&bench, "one"), id(&bench, "three"));

    // By way of a vindex that keeps the checkpoint's numbers, and a file.
    bench.ok(&["extract", &kjv, "-o", "exact", "--quant", "bf16"]);
    let told = json(
        &bench,
        &["imatrix", "exact", "seen.txt", "-o", "seen.gguf", "--json"],
    );
    assert_eq!(told["chunk_tokens"], 512);
    let imatrix = Imatrix::read(&bench.path("seen.gguf")).unwrap();
    assert_eq!(told["statistics"], imatrix.sha256());
    // Four layers of seven matrices, and the output head.
    assert_eq!((imatrix.entries().len(), imatrix.n_unseen()), (29, 0));
    extract("file", &["--imatrix", "seen.gguf"]);
    assert_eq!(id(&bench, "one"), id(&bench, "file"));
    let calibration = Vindex::open(&bench.path("file"))
        .unwrap()
        .index()
        .calibration
        .clone();
    assert_eq!(calibration.unwrap().imatrix, imatrix.sha256());

    // Another text is another vindex, and none another again.
    extract("other", &["--calibrate", "unseen.txt"]);
    extract("none", &[]);
    assert_ne!(id(&bench, "one"), id(&bench, "other"));
    assert_ne!(id(&bench, "one"), id(&bench, "none"));
}

#[test]
fn a_calibrated_model_foresees_better_and_is_smaller() {
    let bench = Bench::new();
    texts(&bench);
    let kjv = kjv();
    let perplexity = |out: &str, recipe: &str, more: &[&str]| {
        let args = ["extract", &kjv, "-o", out, "--quant", recipe];
        bench.ok(&[&args, more].concat());
        let args = [
            "perplexity",
            out,
            "--text",
            "unseen.txt",
            "--window",
            "256",
            "--json",
        ];
        json(&bench, &args)["perplexity"].as_f64().unwrap()
    };
    let bytes = |out: &str| {
        let vindex = Vindex::open(&bench.path(out)).unwrap();
        vindex
            .index()
            .parts
            .iter()
            .map(|part| part.size_bytes)
            .sum::<u64>()
    };
    let exact = perplexity("exact", "f32", &[]);
    let plain = perplexity("plain", "q4k", &[]);
    let calibrated = perplexity("calibrated", "q4k", &["--calibrate", "seen.txt"]);
    assert!(
        calibrated < plain,
        "{calibrated} with statistics, {plain} without, {exact} exact"
    );
    assert!(
        calibrated < 1.005 * exact,
        "{calibrated} with statistics, {exact} exact"
    );
    assert!(bytes("calibrated") < bytes("plain"));
}

#[test]
fn experts_are_counted_by_their_visits() {
    let bench = Bench::new();
    texts(&bench);
    bench.ok(&[
        "extract",
        &fixture("mixtral"),
        "-o",
        "exact",
        "--quant",
        "f32",
    ]);
    bench.ok(&["imatrix", "exact", "seen.txt", "-o", "seen.gguf"]);
    let imatrix = Imatrix::read(&bench.path("seen.gguf")).unwrap();
    let n_rows = imatrix.n_chunks() * imatrix.chunk_tokens();
    let of = |name: &str| imatrix.entries()[name].counts.clone();
    assert_eq!(of("blk.0.attn_q.weight"), [n_rows as f32]);
    let visits = of("blk.0.ffn_down_exps.weight");
    // Two of four for each row.
    assert_eq!(visits.len(), 4);
    assert_eq!(visits.iter().sum::<f32>(), 2.0 * n_rows as f32);
    let args = [
        "extract",
        &fixture("mixtral"),
        "-o",
        "out",
        "--quant",
        "q4k",
    ];
    bench.ok(&[&args[..], &["--imatrix", "seen.gguf"]].concat());
}

#[test]
fn what_cannot_be_weighed_is_refused_and_leaves_nothing() {
    let bench = Bench::new();
    texts(&bench);
    fs::write(bench.path("short.txt"), "In the beginning").unwrap();
    fs::write(bench.path("no.gguf"), "no statistics").unwrap();
    let kjv = kjv();
    bench.ok(&["extract", &kjv, "-o", "exact", "--quant", "f32"]);
    bench.ok(&["imatrix", "exact", "seen.txt", "-o", "kjv.gguf"]);
    let before = listing(&bench);
    let llama3 = fixture("llama3");
    for (model, quant, more, expected) in [
        (
            &kjv,
            "f32",
            ["--calibrate", "seen.txt"],
            "no blocks to weigh",
        ),
        (
            &kjv,
            "q8_0",
            ["--imatrix", "kjv.gguf"],
            "no blocks to weigh",
        ),
        (
            &kjv,
            "q4k",
            ["--calibrate", "short.txt"],
            "less than a chunk of 512",
        ),
        (&kjv, "q4k", ["--calibrate", "none.txt"], "none.txt"),
        (&kjv, "q4k", ["--imatrix", "none.gguf"], "none.gguf"),
        (
            &kjv,
            "q4k",
            ["--imatrix", "no.gguf"],
            "is no importance matrix",
        ),
        (&llama3, "q4k", ["--imatrix", "kjv.gguf"], "of no use here"),
    ] {
        let args = ["extract", model, "-o", "out", "--quant", quant];
        let run = bench.run(&[&args[..], &more].concat());
        assert_eq!(run.code, Some(1), "{more:?}: {}", run.stderr);
        assert!(run.stderr.contains(expected), "{more:?}: {}", run.stderr);
        assert_eq!(listing(&bench), before, "{more:?}");
    }
    // A finished output is refused before anything is computed.
    bench.ok(&["extract", &kjv, "-o", "out", "--quant", "q4k"]);
    let id_before = id(&bench, "out");
    let args = [
        "extract",
        &kjv,
        "-o",
        "out",
        "--quant",
        "q4k",
        "--calibrate",
        "seen.txt",
    ];
    let run = bench.run(&args);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(!run.stdout.contains("calibrating"), "{}", run.stdout);
    assert_eq!(id(&bench, "out"), id_before);
    bench.ok(&[&args[..], &["--force"]].concat());
    assert_ne!(id(&bench, "out"), id_before);
}

/// Told to terminate in the middle of it, a calibration leaves no copy of the model.
#[cfg(unix)]
#[test]
fn told_to_end_it_leaves_no_copy() {
    let bench = Bench::new();
    let text = fs::read_to_string(PathBuf::from(kjv()).join("heldout.txt")).unwrap();
    fs::write(bench.path("long.txt"), text.repeat(40)).unwrap();
    let before = listing(&bench);
    let kjv = kjv();
    let args = [
        "extract",
        &kjv,
        "-o",
        "out",
        "--quant",
        "q4k",
        "--calibrate",
        "long.txt",
    ];
    let mut child = bench.command(&args).spawn().unwrap();
    let copy = bench.path("out.calibration");
    while !copy.join("index.json").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let killed = std::process::Command::new("kill")
        .arg(child.id().to_string())
        .status();
    assert!(killed.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    assert_eq!(listing(&bench), before);
}
