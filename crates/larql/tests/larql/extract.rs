//! `extract`, `verify` and `dump`.

use std::fs;
use std::time::Duration;

use crate::bench::{Bench, copy, kjv, model, names};

#[test]
fn what_an_operator_sees() {
    let bench = Bench::new();
    let run = bench.ok(&[
        "extract",
        &model("llama"),
        "-o",
        "out",
        "--quant",
        "q4k",
        "--threads",
        "1",
    ]);
    insta::assert_snapshot!("extract", source_redacted(&run.stdout) + &run.stderr);
    let run = bench.ok(&["verify", "out"]);
    insta::assert_snapshot!("verify", run.stdout);
    let dump = bench.ok(&["dump", "out"]).stdout;
    assert!(dump.contains("blk.0.ffn_down.weight"), "{dump}");

    let again = bench.run(&["extract", &model("llama"), "-o", "out", "--quant", "q4k"]);
    assert_eq!(again.code, Some(1));
    insta::assert_snapshot!("extract_again", source_redacted(&again.stderr));
    bench.ok(&[
        "extract",
        &model("llama"),
        "-o",
        "out",
        "--quant",
        "q8_0",
        "--force",
    ]);
    assert!(bench.ok(&["dump", "out"]).stdout.contains("recipe  q8_0"));
}

#[test]
fn a_plan_writes_nothing() {
    let bench = Bench::new();
    let run = bench.ok(&[
        "extract",
        &model("qwen3_moe"),
        "-o",
        "out",
        "--quant",
        "q4k",
        "--plan",
        "--json",
    ]);
    let value: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert!(value["summary"]["n_parts"].as_u64().unwrap() > 2);
    assert!(value["plan"]["parts"][1]["tensors"][0]["name"].is_string());
    assert!(!bench.path("out").exists());
}

/// What each tensor is made of and how, for kinds that no plain family has.
#[test]
fn a_plan_says_where_every_tensor_comes_from() {
    let bench = Bench::new();
    for family in ["qwen3_5", "gemma4_moe", "gpt_oss"] {
        let plan = [
            "extract",
            &model(family),
            "-o",
            "out",
            "--quant",
            "q4k",
            "--plan",
        ];
        let run = bench.ok(&plan);
        let name = format!("plan_{family}");
        let (_, told) = run.stdout.split_once('\n').unwrap();
        insta::assert_snapshot!(name, told);
    }
}

#[test]
fn usage_is_refused_with_status_2() {
    let bench = Bench::new();
    for args in [
        &["extract", "m", "-o", "out", "--quant", "q5"][..],
        &[
            "publish",
            "out",
            "--repo",
            "a/b",
            "--slices",
            "full,expert-server",
        ],
        &["publish", "out", "--repo", "no-owner", "--slices", "none"],
        &["pull", "a", "-o", "out"],
        &[],
    ] {
        let run = bench.run(args);
        assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{args:?}");
        assert!(
            run.stderr.contains("Usage") || run.stderr.contains("--help"),
            "{}",
            run.stderr
        );
    }
    assert_eq!(
        bench.run(&["--version"]).stdout,
        concat!("larql ", env!("CARGO_PKG_VERSION"), "\n")
    );
    assert!(
        bench
            .ok(&["completions", "bash"])
            .stdout
            .contains("complete")
    );
}

#[test]
fn a_model_that_is_nowhere_is_said_so() {
    let bench = Bench::new();
    let run = bench.run(&["extract", "no such dir", "-o", "out", "--quant", "q4k"]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("there is no directory no such dir"),
        "{}",
        run.stderr
    );
    let run = bench.run(&["extract", "nobody/nothing", "-o", "out", "--quant", "q4k"]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("no repository nobody/nothing"),
        "{}",
        run.stderr
    );
    let run = bench.run(&[
        "extract",
        &model("llama"),
        "-o",
        "out",
        "--quant",
        "q4k",
        "--revision",
        "main",
    ]);
    assert!(
        run.stderr.contains("which has no revision main"),
        "{}",
        run.stderr
    );
    assert!(!bench.path("out").exists());
}

#[test]
fn a_damaged_checkpoint_names_its_file() {
    let bench = Bench::new();
    let source = bench.path("source");
    copy(&model("llama"), &source);
    let weights = source.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    let run = bench.run(&["extract", "source", "-o", "out", "--quant", "q4k"]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("model.safetensors"), "{}", run.stderr);
    assert!(!bench.path("out/index.json").exists());
}

#[test]
fn a_damaged_part_is_named_by_verify() {
    let bench = Bench::with_vindex(&model("mixtral"), "q8_0");
    let part = names(&bench.path("out"))
        .into_iter()
        .rfind(|name| name.ends_with(".gguf"))
        .unwrap();
    let path = bench.path("out").join(&part);
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 40;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    let run = bench.run(&["verify", "out"]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains(&part) && run.stderr.contains("ffn"),
        "{}",
        run.stderr
    );
    let run = bench.run(&[
        "publish",
        "out",
        "--repo",
        "acme/broken",
        "--slices",
        "none",
    ]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("not intact"), "{}", run.stderr);
    assert_eq!(
        bench
            .registry
            .stats()
            .sum("POST /api/repos/create")
            .n_requests,
        0
    );
}

#[test]
fn a_killed_extraction_is_gone_on_from() {
    let bench = Bench::new();
    bench.ok(&["extract", &kjv(), "-o", "whole", "--quant", "q4k"]);
    let expected = bench.verified("whole").unwrap();
    let mut n_killed = 0;
    for i in 0..24u64 {
        let args = [
            "extract",
            &kjv(),
            "-o",
            "out",
            "--quant",
            "q4k",
            "--threads",
            "1",
        ];
        n_killed += u32::from(bench.kill_after(&args, Duration::from_millis(i * 7 % 120)));
        if bench.path("out/index.json").exists() && !bench.path("out/extract.journal").exists() {
            assert_eq!(
                bench.verified("out").as_ref(),
                Some(&expected),
                "after kill {i}"
            );
        } else if bench.path("out").exists() {
            bench.ok(&args);
            assert_eq!(
                bench.verified("out").as_ref(),
                Some(&expected),
                "after kill {i}"
            );
        }
        if bench.path("out").exists() {
            fs::remove_dir_all(bench.path("out")).unwrap();
        }
    }
    assert!(n_killed > 0, "no run was killed in time");
}

#[cfg(unix)]
#[test]
fn an_unwritable_output_is_said_so() {
    let bench = Bench::new();
    fs::write(bench.path("file"), "x").unwrap();
    let run = bench.run(&[
        "extract",
        &model("llama"),
        "-o",
        "file/out",
        "--quant",
        "q4k",
    ]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("file/out"), "{}", run.stderr);
}

fn source_redacted(text: &str) -> String {
    text.replace(&model("llama"), "[MODEL]")
}
