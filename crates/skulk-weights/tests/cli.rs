//! What a user of the catalog sees: the real program in a directory of its own, its words held as snapshots.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// A working directory with files, and variables for the program.
struct Bench {
    dir: tempfile::TempDir,
    vars: Vec<(&'static str, String)>,
    stdin: &'static str,
}

impl Bench {
    fn new(files: &[(&str, &str)]) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join("cwd").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        std::fs::create_dir_all(dir.path().join("cwd")).unwrap();
        std::fs::create_dir_all(dir.path().join("home")).unwrap();
        Bench {
            dir,
            vars: Vec::new(),
            stdin: "",
        }
    }

    fn var(mut self, name: &'static str, value: impl Into<String>) -> Bench {
        self.vars.push((name, value.into()));
        self
    }

    fn stdin(mut self, text: &'static str) -> Bench {
        self.stdin = text;
        self
    }

    fn cwd(&self) -> std::path::PathBuf {
        self.dir.path().join("cwd")
    }

    /// Runs the program and tells what was seen, with the temporary directory as `[DIR]`.
    fn run(&self, line: &str) -> String {
        let mut child = Command::new(env!("CARGO_BIN_EXE_skulk-weights"))
            .args(line.split_whitespace())
            .current_dir(self.cwd())
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.dir.path().join("home"))
            .env("HF_ENDPOINT", "http://127.0.0.1:9")
            .envs(self.vars.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A program that never reads its input may have ended already.
        let _ = child.stdin.take().unwrap().write_all(self.stdin.as_bytes());
        let out = child.wait_with_output().unwrap();
        let mut seen = format!(
            "$ skulk-weights {line}\nexit {}\n",
            out.status.code().unwrap()
        );
        for (name, bytes) in [("stdout", &out.stdout), ("stderr", &out.stderr)] {
            if !bytes.is_empty() {
                write!(seen, "-- {name}\n{}", String::from_utf8_lossy(bytes)).unwrap();
            }
        }
        let real = self.dir.path().canonicalize().unwrap();
        seen.replace(real.to_str().unwrap(), "[DIR]")
            .replace(self.dir.path().to_str().unwrap(), "[DIR]")
    }
}

const OPERATOR: &str = "\
catalogs:
- path: ./models.yaml
  namespace: acme
  hf_owner: acme
  hf_collection: acme/vindexes-1
";

const MODELS: &str = "\
models:
- key: local-7b-full-q4-k
  source_model: acme/Local-7B-Instruct
  quant: q4k
  tier: smoke
  slices: [full]
  output_name: local-7b-full-q4-k.vindex
  hf_repo: acme/local-7b-full-q4-k-vindex
  vision_source_repo: third/local-7b-vision
  vision_sidecar_repo: acme/local-7b-vision
";

const BROKEN: &str = "\
models:
- key: model_a
  source_model: https://huggingface.co/owner/model-a
  quant: Q4K
  tier: large
  slices: [expert-server, expert-server]
  output_name: a/b.vindex
  hf_repo: acme/x
  mtp_sidecar_rep: a/b
- kee: b
  source_model: o/m
  quant: yes
- key: c
  source_model: o/m
  quant: q4k
  tier: moe
  slices: full
  output_name: C.vindex
  hf_repo: Acme/X
  mtp_source_repo: o/a
";

#[test]
fn validate_tells_everything_that_is_wrong() {
    let bench = Bench::new(&[("m.yaml", BROKEN), ("bad.yaml", "models:\n\t- key: a\n")]);
    insta::assert_snapshot!(bench.run("--manifest m.yaml catalog validate"));
    insta::assert_snapshot!(bench.run("--manifest bad.yaml catalog validate"));
    insta::assert_snapshot!(bench.run("--manifest gone.yaml catalog validate --json"));
}

#[test]
fn an_operator_adds_to_the_builtin_catalog() {
    let bench = Bench::new(&[("skulk-weights.yaml", OPERATOR), ("models.yaml", MODELS)]);
    let lines = [
        "catalog validate",
        "catalog sources",
        "catalog list --tier smoke",
        "catalog sources --json",
    ];
    insta::assert_snapshot!(lines.map(|line| bench.run(line)).join("\n"));
}

#[test]
fn entries_are_shown_and_found() {
    let bench = Bench::new(&[]);
    let lines = [
        "catalog show foxlight/gemma-4-31b-full-q4-k",
        "catalog show gemma-4-31b-full-q4-k",
        "catalog find https://huggingface.co/google/gemma-4-26b-a4b-it/tree/main",
        "catalog find google/gemma-3-4b",
        "catalog find https://huggingface.co/google",
        "catalogue list --tier moe",
    ];
    insta::assert_snapshot!(lines.map(|line| bench.run(line)).join("\n"));
}

#[test]
fn init_writes_once() {
    let bench = Bench::new(&[]);
    let lines = [
        "catalog init",
        "catalog init",
        "catalog init --force",
        "catalog validate",
        "catalog init --output no/such.yaml",
    ];
    insta::assert_snapshot!(lines.map(|line| bench.run(line)).join("\n"));
}

#[test]
fn a_dry_run_prints_the_plan_and_makes_nothing() {
    let bench = Bench::new(&[("skulk-weights.yaml", OPERATOR), ("models.yaml", MODELS)]);
    let lines = [
        "publish --model acme/local-7b-full-q4-k --dry-run",
        "publish --model foxlight/qwen3-5-9b-full-q4-k --dry-run --scratch s --force",
        "publish --model foxlight/mixtral-8x7b-expert-server-q4-k --artifact mtp --dry-run",
        "publish --model foxlight/mixtral-8x7b-expert-server-q4-k --dry-run --json",
    ];
    insta::assert_snapshot!(lines.map(|line| bench.run(line)).join("\n"));
    assert!(!bench.cwd().join(".scratch").exists() && !bench.cwd().join("s").exists());
}

#[test]
fn the_collection_can_be_replaced_or_switched_off() {
    let line = "publish --model foxlight/gemma-3-4b-full-q4-k --dry-run";
    let run = |value: &str| {
        Bench::new(&[])
            .var("SKULK_WEIGHTS_COLLECTION", value)
            .run(line)
    };
    assert!(
        run(" acme/mine-1 ")
            .contains("vindex collection: https://huggingface.co/collections/acme/mine-1\n")
    );
    assert!(run("OFF").contains("collection: disabled\n"));
    insta::assert_snapshot!(run("bad slug"));
}

#[test]
fn publishing_is_refused_before_any_work() {
    let bench = Bench::new(&[]);
    let with_token = Bench::new(&[]).var("HF_TOKEN", "hf_secretvalue123");
    let gemma = "publish --model foxlight/gemma-3-4b-full-q4-k";
    let seen = [
        bench.run(gemma),
        with_token.run(gemma),
        with_token.run(&format!("{gemma} --artifact mtp")),
        with_token.run(&format!("{gemma} --artifact vision")),
        with_token.run("publish --model gemma-3-4b-full-q4-k"),
        with_token.run("publish --model foxlight/gemma-3-4b-ful-q4-k"),
    ]
    .join("\n");
    assert!(!seen.contains("secretvalue"));
    insta::assert_snapshot!(seen);
}

#[test]
fn doctor_without_publish_is_offline_and_silent_about_larql() {
    let bench = Bench::new(&[("m.yaml", MODELS), ("file", "x")]);
    let blocked = Bench::new(&[("file", "x")]).var("SKULK_WEIGHTS_SCRATCH", "file/sub");
    let seen = [
        bench.run("doctor"),
        bench.run("--manifest m.yaml doctor"),
        bench.run("--config gone.yaml doctor --json"),
        blocked.run("doctor"),
    ];
    insta::assert_snapshot!(seen.join("\n"));
}

#[test]
fn doctor_names_all_that_publishing_lacks() {
    let seen = Bench::new(&[]).run("doctor --publish");
    for words in [
        "exit 1\n",
        "\nmissing command: larql (",
        "\nHF_TOKEN is not set; publication will fail",
        "\nHub not reachable: http://127.0.0.1:9: ",
        "\nscratch root writable: ",
        "\ncatalog valid: 12 entries",
    ] {
        assert!(seen.contains(words), "{words}: {seen}");
    }
}

#[cfg(unix)]
#[test]
fn doctor_holds_the_token_against_the_plan() {
    use std::os::unix::fs::PermissionsExt;

    let root = tempfile::tempdir().unwrap();
    let token = "hf_secretvalue123";
    let options = registry::Options {
        token: Some(token.to_owned()),
        user: "me".to_owned(),
        ..registry::Options::default()
    };
    let hub = registry::spawn(root.path(), options).unwrap();
    let bench = |token: &str| {
        let bench = Bench::new(&[
            ("skulk-weights.yaml", OPERATOR),
            ("models.yaml", MODELS),
            ("larql", "#!/bin/sh\necho larql 9.9\n"),
        ]);
        let larql = bench.cwd().join("larql");
        std::fs::set_permissions(larql, PermissionsExt::from_mode(0o755)).unwrap();
        bench
            .var("HF_ENDPOINT", hub.url())
            .var("HF_TOKEN", token)
            .var("SKULK_WEIGHTS_LARQL", "./larql")
    };
    let seen = bench(token).run("doctor --publish --model acme/local-7b-full-q4-k");
    for words in [
        "exit 0\n",
        "/larql), larql 9.9\n",
        "\nHF_TOKEN is set\n",
        "\nHub reachable: http://127.0.0.1:",
        "\ntoken of me may write to acme\n",
        "\nfree space: ",
        "\ndoctor checks passed\n",
    ] {
        assert!(seen.contains(words), "{words}: {seen}");
    }
    assert!(!seen.contains(token));

    let seen = bench(token).run("doctor --publish --model foxlight/gemma-3-4b-full-q4-k");
    assert!(
        seen.contains("token of me may write to FoxlightAI"),
        "{seen}"
    );
    let seen = bench("hf_otherwrongone").run("doctor --publish");
    assert!(
        seen.contains("exit 1\n") && seen.contains("token is refused: "),
        "{seen}"
    );
    assert!(!seen.contains("hf_otherwrongone"));
    let seen = bench(token).run("doctor --publish --model acme/none");
    assert!(
        seen.contains("exit 1\n") && seen.contains("catalog key not found: acme/none"),
        "{seen}"
    );
}

#[test]
fn scratch_is_deleted_only_when_it_is_one() {
    let files = [
        (".scratch/a/b.bin", "x"),
        ("keep.txt", "k"),
        ("repo/.git/HEAD", "x"),
    ];
    let bench = Bench::new(&files);
    let lines = [
        "scratch clean",
        "scratch clean --scratch .",
        "scratch clean --scratch ..",
        "scratch clean --scratch /usr/lib/x",
        "scratch clean --scratch repo -y",
        "scratch clean --scratch keep.txt -y",
        "scratch clean --scratch gone",
    ];
    insta::assert_snapshot!(lines.map(|line| bench.run(line)).join("\n"));
    assert!(
        bench.cwd().join(".scratch/a/b.bin").exists()
            && bench.cwd().join("repo/.git/HEAD").exists()
    );
    let bench = bench.stdin(" Y \n");
    insta::assert_snapshot!(bench.run("scratch clean"));
    assert!(!bench.cwd().join(".scratch").exists() && bench.cwd().join("keep.txt").exists());
}

#[cfg(unix)]
#[test]
fn a_scratch_that_is_a_link_keeps_its_target() {
    let bench = Bench::new(&[("real/data", "x"), (".scratch/inner", "x")]);
    std::os::unix::fs::symlink("real", bench.cwd().join("link")).unwrap();
    std::os::unix::fs::symlink("../real", bench.cwd().join(".scratch/l")).unwrap();
    insta::assert_snapshot!(bench.run("scratch clean --yes --scratch link"));
    assert!(
        bench
            .run("scratch clean --yes")
            .starts_with("$ skulk-weights scratch clean --yes\nexit 0\n")
    );
    assert!(bench.cwd().join("real/data").exists());
}

#[test]
fn usage_errors_exit_with_2_and_name_the_argument() {
    let bench = Bench::new(&[]);
    for (line, word) in [
        ("catalog", "Usage"),
        ("scratch", "Usage"),
        ("catalog validate --frob", "--frob"),
        ("publish --dry-run", "--model"),
        ("publish --model x --artifact MTP", "MTP"),
        ("publish --model x --inspect", "--dry-run"),
        ("catalog list --tier big", "big"),
        ("--config a --manifest b catalog list", "--manifest"),
        ("--config a catalog list --manifest b", "--manifest"),
    ] {
        let seen = bench.run(line);
        assert!(seen.contains("\nexit 2\n") && seen.contains(word), "{seen}");
    }
    assert!(
        bench
            .run("publish --mod foxlight/gemma-3-4b-full-q4-k --dry")
            .contains("\nexit 0\n")
    );
    assert!(
        bench
            .run("--version")
            .contains(concat!("skulk-weights ", env!("CARGO_PKG_VERSION")))
    );
    assert!(bench.run("completions bash").contains("complete -F"));
    assert!(
        bench
            .run("catalog list --tier smoke --tier moe")
            .contains("mixtral"),
        "the last of a repeated option counts"
    );
}

#[test]
fn the_workflow_uses_no_input_inside_a_script() {
    let workflows = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.github/workflows");
    for name in ["validate.yml", "publish.yml"] {
        let text = std::fs::read_to_string(workflows.join(name)).unwrap();
        let scripts = text
            .lines()
            .filter(|line| line.contains("${{") && !line.trim_start().starts_with("group:"));
        for line in scripts {
            let (variable, value) = line.trim().split_once(": ").unwrap();
            assert!(
                variable.chars().all(|c| c.is_ascii_uppercase() || c == '_'),
                "{name}: {line}"
            );
            assert!(
                value.starts_with("${{ ") && value.ends_with(" }}"),
                "{name}: {line}"
            );
        }
    }
}
