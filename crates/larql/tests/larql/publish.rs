//! `publish`: what is sent, what others see, and what is left after a kill.

use std::fs;
use std::time::Duration;

use crate::bench::{Bench, kjv, model};

const CARD: &str = "---\nlicense: mit\ntags:\n- vindex\n---\n\n# a card\n";

fn with_card(bench: &Bench) {
    fs::write(bench.path("card.md"), CARD).unwrap();
}

#[test]
fn what_an_operator_sees() {
    let bench = Bench::new();
    with_card(&bench);
    bench.ok(&["extract", &model("mixtral"), "-o", "out", "--quant", "q4k"]);
    let args = [
        "publish",
        "out",
        "--repo",
        "acme/mixtral",
        "--slices",
        "none",
        "--card",
        "card.md",
    ];
    let dry = bench.ok(&[&args[..], &["--dry-run"]].concat());
    insta::assert_snapshot!("publish_dry_run", dry.stdout);
    assert_eq!(
        bench.registry.stats().sum("POST ").n_requests,
        0,
        "a dry run wrote"
    );
    insta::assert_snapshot!("publish", bench.ok(&args).stdout);
    insta::assert_snapshot!("publish_again", bench.ok(&args).stdout);
    bench.ok(&[
        "extract",
        &model("mixtral"),
        "-o",
        "out",
        "--quant",
        "q8_0",
        "--force",
    ]);
    insta::assert_snapshot!(
        "publish_other",
        bench.ok(&[&args[..], &["--dry-run"]].concat()).stdout
    );
    bench.ok(&args);
    bench.ok(&["pull", "acme/mixtral", "-o", "pulled"]);
    assert_eq!(bench.verified("pulled"), bench.verified("out"));
    insta::assert_snapshot!(
        "publish_other_again",
        bench.ok(&[&args[..], &["--dry-run"]].concat()).stdout
    );
}

#[test]
fn a_slice_goes_into_the_named_repository_and_nothing_else() {
    let bench = Bench::with_vindex(&model("qwen3_moe"), "q4k");
    bench.ok(&[
        "publish",
        "out",
        "--repo",
        "acme/experts",
        "--slices",
        "expert-server",
    ]);
    assert_eq!(
        bench
            .registry
            .stats()
            .sum("POST /api/repos/create")
            .n_requests,
        1
    );
    assert_eq!(
        bench
            .registry
            .stats()
            .sum("POST /api/collections")
            .n_requests,
        0
    );
    let refused = bench.run(&["pull", "acme/experts", "-o", "full", "--slice", "full"]);
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.stderr.contains("it holds the slice expert-server"),
        "{}",
        refused.stderr
    );
    bench.ok(&["pull", "acme/experts", "-o", "experts"]);
    assert_eq!(bench.verified("experts"), bench.verified("out"));
    let refused = bench.run(&[
        "publish",
        "experts",
        "--repo",
        "acme/full",
        "--slices",
        "full",
    ]);
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.stderr.contains("expert-server"),
        "{}",
        refused.stderr
    );
    bench.ok(&["publish", "out", "--repo", "acme/full", "--slices", "full"]);
    let refused = bench.run(&[
        "publish",
        "out",
        "--repo",
        "acme/full",
        "--slices",
        "expert-server",
    ]);
    assert!(
        refused.stderr.contains("a repository of its own"),
        "{}",
        refused.stderr
    );
}

#[test]
fn publishing_needs_a_token_and_says_so_before_any_work() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    let run = bench.run_with(
        &["publish", "out", "--repo", "acme/x", "--slices", "none"],
        &[("HF_TOKEN", "")],
    );
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("HF_TOKEN"), "{}", run.stderr);
    assert_eq!(bench.registry.stats().sum("").n_requests, 0);
    let run = bench.run_with(
        &["publish", "out", "--repo", "acme/x", "--slices", "none"],
        &[("HF_TOKEN", "wrong")],
    );
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("not authorised") && run.stderr.contains("HF_TOKEN"),
        "{}",
        run.stderr
    );
}

#[test]
fn a_killed_publication_leaves_the_old_vindex_or_the_new_one() {
    let bench = Bench::new();
    with_card(&bench);
    bench.ok(&["extract", &kjv(), "-o", "old", "--quant", "q8_0"]);
    bench.ok(&["extract", &kjv(), "-o", "new", "--quant", "q4k"]);
    let (old, new) = (
        bench.verified("old").unwrap(),
        bench.verified("new").unwrap(),
    );
    let publish = |dir| {
        [
            "publish", dir, "--repo", "acme/kjv", "--slices", "none", "--card", "card.md",
        ]
    };
    bench.ok(&publish("old"));
    let (mut n_killed, mut n_old) = (0, 0);
    for i in 0..20u64 {
        n_killed +=
            u32::from(bench.kill_after(&publish("new"), Duration::from_millis(5 + i * 11 % 140)));
        bench.ok(&["pull", "acme/kjv", "-o", "seen", "--force"]);
        let seen = bench.verified("seen").unwrap();
        assert!(seen == old || seen == new, "after kill {i}");
        n_old += u32::from(seen == old);
        if seen == new {
            bench.ok(&publish("old"));
        }
    }
    assert!(
        n_killed > 0 && n_old > 0,
        "{n_killed} killed, {n_old} before the commit"
    );
    bench.ok(&publish("new"));
    bench.ok(&["pull", "acme/kjv", "-o", "seen", "--force"]);
    assert_eq!(bench.verified("seen").as_deref(), Some(new.as_str()));
}
