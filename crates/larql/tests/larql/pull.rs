//! `pull`: what is fetched, what is kept, what is refused; and extraction straight from the Hub.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::bench::{Bench, kjv, model, names};

#[test]
fn an_expert_server_fetches_its_own_parts_and_no_others() {
    let bench = Bench::with_vindex(&model("qwen3_moe"), "q8_0");
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
fn the_record_of_a_part_that_is_whole_does_not_stay() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    bench.ok(&["publish", "out", "--repo", "acme/m", "--slices", "none"]);
    bench.ok(&["pull", "acme/m", "-o", "pulled"]);
    // As after a kill between the part's renaming and the removal of its record.
    let listed = names(&bench.path("pulled"));
    let part = listed.iter().find(|name| name.ends_with(".gguf")).unwrap();
    let record = bench.path(&format!("pulled/{part}.incomplete.json"));
    fs::write(&record, "{}").unwrap();
    bench.ok(&["pull", "acme/m", "-o", "pulled"]);
    assert!(!record.exists());
    assert_eq!(names(&bench.path("pulled")), listed);
}

#[test]
fn a_killed_pull_is_gone_on_from() {
    let bench = Bench::with_vindex(&kjv(), "q8_0");
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
    let bench = Bench::with_vindex(&kjv(), "q8_0");
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
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
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

#[test]
fn a_range_of_experts_fetches_its_bytes_and_no_others() {
    let bench = Bench::with_vindex(&model("qwen3_moe"), "f32");
    bench.ok(&[
        "publish",
        "out",
        "--repo",
        "acme/moe",
        "--slices",
        "expert-server",
    ]);
    let sent = || bench.registry.stats().sum("/resolve/").sent_bytes;
    let before = sent();
    let run = bench.ok(&["pull", "acme/moe", "-o", "some", "--experts", "1..3"]);
    insta::assert_snapshot!("pull_range", run.stdout);
    let held = held_bytes(&bench, "some");
    let beside: u64 = ["index.json", "provenance.json"]
        .iter()
        .map(|name| fs::metadata(bench.path("some").join(name)).unwrap().len())
        .sum();
    assert_eq!(sent() - before, held + beside);
    let full: u64 = held_bytes(&bench, "out");
    assert!(held * 10 < full * 6, "{held} of {full} bytes");
    assert_eq!(bench.verified("some"), bench.verified("out"));
    let text = |name: &str| fs::read_to_string(bench.path(name)).unwrap();
    assert_eq!(
        text("some/slice.json"),
        "{\"slice\":\"expert-server\",\"experts\":[1,3]}\n"
    );
    assert_eq!(text("some/index.json"), text("out/index.json"));
    let dump = bench.ok(&["dump", "some"]).stdout;
    assert!(
        dump.contains("slice   expert-server of experts 1..3"),
        "{dump}"
    );

    // All of it is here, and a smaller range of it.
    for experts in ["1..3", "2..3"] {
        let before = sent();
        let again = bench.ok(&["pull", "acme/moe", "-o", "some", "--experts", experts]);
        assert!(again.stdout.contains("0 parts fetched"), "{}", again.stdout);
        assert_eq!(sent() - before, beside);
        assert!(text("some/slice.json").contains("[1,3]"));
    }
    // More of it would take the place of what is here.
    let more = bench.run(&["pull", "acme/moe", "-o", "some", "--experts", "0..2"]);
    assert_eq!(more.code, Some(1));
    assert!(
        more.stderr
            .contains("some holds expert-server of experts 1..3 of the same vindex")
            && more.stderr.contains("--force"),
        "{}",
        more.stderr
    );
    assert_eq!(bench.verified("some"), bench.verified("out"));
    bench.ok(&[
        "pull",
        "acme/moe",
        "-o",
        "some",
        "--experts",
        "0..2",
        "--force",
    ]);
    assert!(bench.verified("some").is_some() && text("some/slice.json").contains("[0,2]"));
}

/// What `verify` finds to be held, in bytes.
fn held_bytes(bench: &Bench, dir: &str) -> u64 {
    let run = bench.ok(&["verify", dir, "--json"]);
    let value: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    value["size_bytes"].as_u64().unwrap()
}

#[test]
fn a_range_of_layers_and_the_attention_are_fewer_parts() {
    let bench = Bench::with_vindex(&model("llama"), "q8_0");
    bench.ok(&["publish", "out", "--repo", "acme/full", "--slices", "none"]);
    bench.ok(&[
        "publish",
        "out",
        "--repo",
        "acme/node",
        "--slices",
        "attention",
    ]);
    let parts = |dir: &str| -> Vec<String> {
        let names = names(&bench.path(dir)).into_iter();
        names
            .filter(|name| name.ends_with(".gguf"))
            .map(|name| name[11..16].to_owned())
            .collect()
    };
    bench.ok(&[
        "pull",
        "acme/full",
        "-o",
        "layer",
        "--slice",
        "expert-server",
        "--layers",
        "1..2",
    ]);
    assert_eq!(parts("layer"), ["00001", "00006"]);
    bench.ok(&["pull", "acme/full", "-o", "node", "--slice", "attention"]);
    bench.ok(&["pull", "acme/node", "-o", "same"]);
    for dir in ["node", "same"] {
        assert_eq!(parts(dir), ["00001", "00002", "00003", "00005"]);
        assert!(
            fs::read_to_string(bench.path(dir).join("slice.json"))
                .unwrap()
                .contains("attention")
        );
    }
    for dir in ["layer", "node", "same"] {
        assert_eq!(bench.verified(dir), bench.verified("out"), "{dir}");
    }
    let rest = bench.run(&["pull", "acme/node", "-o", "x", "--slice", "expert-server"]);
    assert_eq!(rest.code, Some(1));
    assert!(
        rest.stderr
            .contains("does not hold the slice expert-server")
            && rest.stderr.contains("hint: it holds the slice attention"),
        "{}",
        rest.stderr
    );
    assert!(!bench.path("x").exists());

    for (args, words) in [
        (
            &["--layers", "1..3"][..],
            "layers 1..3 are not all in the model, which has layers 0..2",
        ),
        (&["--experts", "1..2"], "the model is dense"),
        (
            &["--slice", "attention", "--layers", "0..1"],
            "the slice attention has no ranges",
        ),
    ] {
        let run = bench.run(&[&["pull", "acme/full", "-o", "x"], args].concat());
        assert_eq!(run.code, Some(1), "{args:?}");
        assert!(run.stderr.contains(words), "{args:?}\n{}", run.stderr);
        assert!(!bench.path("x").exists());
    }
    let run = bench.run(&["pull", "acme/full", "-o", "x", "--layers", "0..=1"]);
    assert_eq!(run.code, Some(2));
    assert!(
        run.stderr.contains("write 0..4 for 0, 1, 2 and 3"),
        "{}",
        run.stderr
    );
}

#[test]
fn a_killed_pull_of_a_range_is_gone_on_from() {
    let bench = Bench::with_vindex(&model("qwen3_moe"), "f32");
    bench.ok(&["publish", "out", "--repo", "acme/moe", "--slices", "none"]);
    let pull = ["pull", "acme/moe", "-o", "some", "--experts", "1..4"];
    for i in 0..12u64 {
        bench.kill_after(&pull, Duration::from_millis(5 + i * 5));
        if bench.path("some/index.json").exists() {
            assert_eq!(bench.verified("some"), bench.verified("out"));
        }
    }
    bench.ok(&pull);
    assert_eq!(bench.verified("some"), bench.verified("out"));
    assert!(
        names(&bench.path("some"))
            .iter()
            .all(|name| !name.contains("incomplete") && !name.contains("partial"))
    );
}

/// Of a part that was begun, only what is missing is fetched; what is damaged is fetched again, by expert.
#[test]
fn a_range_that_was_begun_is_not_fetched_twice() {
    let bench = Bench::with_vindex(&model("qwen3_moe"), "f32");
    bench.ok(&["publish", "out", "--repo", "acme/moe", "--slices", "none"]);
    let sent = || bench.registry.stats().sum("/resolve/").sent_bytes;
    let before = sent();
    bench.ok(&["pull", "acme/moe", "-o", "two", "--experts", "1..3"]);
    let of_two = sent() - before;
    // As a pull leaves it that was killed before its last part had its name.
    let parts: Vec<String> = names(&bench.path("two"))
        .into_iter()
        .filter(|name| name.ends_with(".gguf"))
        .collect();
    let last = parts.last().unwrap();
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(bench.path("two/index.json")).unwrap()).unwrap();
    let (mut done, mut n_bytes_of_expert) = (Vec::new(), 0);
    let parts_indexed = index["parts"].as_array().unwrap();
    let number = parts_indexed
        .iter()
        .position(|part| part["file"] == last.as_str())
        .unwrap();
    for tensor in index["tensors"].as_array().unwrap() {
        if tensor["part"] == number {
            let (at, size) = (
                tensor["offset_bytes"].as_u64().unwrap(),
                tensor["size_bytes"].as_u64().unwrap() / 4,
            );
            done.push((at + size, at + 3 * size));
            n_bytes_of_expert += size;
        }
    }
    assert_eq!(done.len(), 3);
    fs::remove_file(bench.path("two/index.json")).unwrap();
    fs::rename(
        bench.path("two").join(last),
        bench.path("two").join(format!("{last}.incomplete")),
    )
    .unwrap();
    let state = serde_json::json!({
        "content": format!("sha256:{}", parts_indexed[number]["sha256"].as_str().unwrap()),
        "size_bytes": parts_indexed[number]["size_bytes"], "done": done,
    });
    let record = bench.path("two").join(format!("{last}.incomplete.json"));
    fs::write(&record, state.to_string()).unwrap();
    let before = sent();
    bench.ok(&["pull", "acme/moe", "-o", "two", "--experts", "1..4"]);
    let beside = fs::metadata(bench.path("two/index.json")).unwrap().len()
        + fs::metadata(bench.path("two/provenance.json"))
            .unwrap()
            .len();
    assert_eq!(sent() - before, n_bytes_of_expert + beside);
    assert!(sent() - before < of_two);
    assert_eq!(bench.verified("two"), bench.verified("out"));
    assert!(
        fs::read_to_string(bench.path("two/slice.json"))
            .unwrap()
            .contains("[1,4]")
    );

    // A record that lies: one expert is not there.
    fs::remove_file(bench.path("two/index.json")).unwrap();
    fs::rename(
        bench.path("two").join(last),
        bench.path("two").join(format!("{last}.incomplete")),
    )
    .unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(bench.path("two").join(format!("{last}.incomplete")))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 64], done[1].0).unwrap();
    fs::write(&record, state.to_string()).unwrap();
    let run = bench.run(&["pull", "acme/moe", "-o", "two", "--experts", "1..3"]);
    assert_eq!(run.code, Some(1), "{}", run.stdout);
    assert!(
        run.stderr.contains("expert 1 of blk.0.ffn_") && run.stderr.contains("has the hash"),
        "{}",
        run.stderr
    );
    assert!(!bench.path("two/index.json").exists());
    let before = sent();
    bench.ok(&["pull", "acme/moe", "-o", "two", "--experts", "1..3"]);
    assert_eq!(
        sent() - before,
        n_bytes_of_expert / 3 + beside,
        "only that expert is fetched again"
    );
    assert_eq!(bench.verified("two"), bench.verified("out"));
}
