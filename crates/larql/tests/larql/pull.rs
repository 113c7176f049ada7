//! `pull`: what is fetched, what is kept, what is refused; and extraction straight from the Hub.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::bench::{Bench, kjv, model, names};

#[test]
fn an_expert_server_fetches_its_own_parts_and_no_others() {
    let bench = Bench::new();
    bench.ok(&[
        "extract",
        &model("qwen3_moe"),
        "-o",
        "out",
        "--quant",
        "q8_0",
    ]);
    bench.ok(&["publish", "out", "--repo", "acme/moe", "--slices", "none"]);
    let sent = || bench.registry.stats().sum("/resolve/").sent_bytes;
    let before = sent();
    let run = bench.ok(&[
        "pull",
        "acme/moe",
        "-o",
        "experts",
        "--slice",
        "expert-server",
    ]);
    insta::assert_snapshot!("pull_experts", run.stdout);
    let size = |name: &String| {
        fs::metadata(bench.path("experts").join(name))
            .unwrap()
            .len()
    };
    let all: u64 = names(&bench.path("experts")).iter().map(size).sum();
    assert!(
        sent() - before <= all,
        "{} bytes were sent for {all}",
        sent() - before
    );
    let full: u64 = names(&bench.path("out"))
        .iter()
        .map(|name| fs::metadata(bench.path("out").join(name)).unwrap().len())
        .sum();
    assert!(all < full);
    assert_eq!(bench.verified("experts"), bench.verified("out"));

    let before = sent();
    bench.ok(&["pull", "acme/moe", "-o", "experts"]);
    assert!(sent() - before < full, "what was here was fetched again");
    assert_eq!(bench.verified("experts"), bench.verified("out"));
    assert!(
        fs::read_to_string(bench.path("experts/slice.json"))
            .unwrap()
            .contains("full")
    );
    let back = bench.ok(&[
        "pull",
        "acme/moe",
        "-o",
        "experts",
        "--slice",
        "expert-server",
    ]);
    assert!(back.stdout.contains("0 parts fetched"), "{}", back.stdout);
    assert!(
        fs::read_to_string(bench.path("experts/slice.json"))
            .unwrap()
            .contains("full")
    );
}

#[test]
fn another_vindex_is_not_overwritten_unasked() {
    let bench = Bench::new();
    bench.ok(&["extract", &model("llama"), "-o", "mine", "--quant", "q8_0"]);
    bench.ok(&["extract", &model("qwen2"), "-o", "out", "--quant", "q8_0"]);
    bench.ok(&["publish", "out", "--repo", "acme/q", "--slices", "none"]);
    fs::write(bench.path("mine/notes.txt"), "keep me").unwrap();
    let mine = bench.verified("mine");
    let run = bench.run(&["pull", "acme/q", "-o", "mine"]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("another vindex") && run.stderr.contains("--force"),
        "{}",
        run.stderr
    );
    assert_eq!(bench.verified("mine"), mine);
    bench.ok(&["pull", "acme/q", "-o", "mine", "--force"]);
    assert_eq!(bench.verified("mine"), bench.verified("out"));
    assert_eq!(
        fs::read_to_string(bench.path("mine/notes.txt")).unwrap(),
        "keep me"
    );
    let parts = |dir: &str| {
        names(&bench.path(dir))
            .into_iter()
            .filter(|name| name.ends_with(".gguf"))
            .collect::<Vec<_>>()
    };
    assert_eq!(parts("mine"), parts("out"));
}

#[test]
fn a_killed_pull_is_gone_on_from() {
    let bench = Bench::new();
    bench.ok(&["extract", &kjv(), "-o", "out", "--quant", "q8_0"]);
    bench.ok(&["publish", "out", "--repo", "acme/kjv", "--slices", "none"]);
    for i in 0..12u64 {
        bench.kill_after(
            &["pull", "acme/kjv", "-o", "pulled"],
            Duration::from_millis(5 + i * 9),
        );
        if bench.path("pulled/index.json").exists() {
            assert_eq!(bench.verified("pulled"), bench.verified("out"));
        }
    }
    bench.ok(&["pull", "acme/kjv", "-o", "pulled"]);
    assert_eq!(bench.verified("pulled"), bench.verified("out"));
    assert!(
        names(&bench.path("pulled"))
            .iter()
            .all(|name| !name.contains("incomplete") && !name.contains("partial"))
    );
}

#[cfg(unix)]
#[test]
fn a_disk_that_is_full_is_told_and_gone_on_from() {
    let bench = Bench::new();
    bench.ok(&["extract", &kjv(), "-o", "out", "--quant", "q8_0"]);
    bench.ok(&["publish", "out", "--repo", "acme/kjv", "--slices", "none"]);
    // A limit on the length of files fails a write as a full disk does.
    let pull = bench.command(&["pull", "acme/kjv", "-o", "pulled"]);
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "trap '' XFSZ; ulimit -f 700 && exec \"$@\"", "sh"]);
    shell.arg(pull.get_program()).args(pull.get_args());
    shell.current_dir(bench.dir.path()).env_clear();
    shell.envs(
        pull.get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    let run = shell.output().unwrap();
    let stderr = String::from_utf8(run.stderr).unwrap();
    assert_eq!(run.status.code(), Some(1), "{stderr}");
    for word in [
        "cannot pull kjv-q8_0-0000",
        "pulled/kjv-q8_0-0000",
        "File too large",
        "goes on after it",
    ] {
        assert!(stderr.contains(word), "{word}\n{stderr}");
    }
    assert!(!bench.path("pulled/index.json").exists());
    bench.ok(&["pull", "acme/kjv", "-o", "pulled"]);
    assert_eq!(bench.verified("pulled"), bench.verified("out"));
}

#[test]
fn a_repository_without_a_vindex_is_said_to_be_one() {
    let bench = Bench::new();
    bench.ok(&["extract", &model("llama"), "-o", "out", "--quant", "q8_0"]);
    bench.ok(&["publish", "out", "--repo", "acme/x", "--slices", "none"]);
    let run = bench.run(&["pull", "acme/x@nowhere", "-o", "pulled"]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("nowhere"), "{}", run.stderr);
    let run = bench.run(&["pull", "acme/none", "-o", "pulled"]);
    assert!(
        run.stderr.contains("no repository acme/none"),
        "{}",
        run.stderr
    );
    assert!(!bench.path("pulled").exists());
}
