//! A publication from end to end: the real programs against a real registry over real HTTP, what they print, what the
//! repository holds afterwards, and what is left to do after each step has failed or was killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use hub::{Addition, CommitRequest, Content, Hub, RepoId, Settings, Snapshot, Token};
use registry::{Options, Running};

const TOKEN: &str = "hf_test_secret";
const TARGET: &str = "acme/model-vindex";

/// A registry with a source model and a collection, and a working directory with a manifest.
struct Bench {
    dir: tempfile::TempDir,
    registry: Running,
    runtime: tokio::runtime::Runtime,
    hub: Hub,
    collection: String,
}

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Bench {
    /// The source repository `owner/model` is a fixture's copy.
    fn new(model: &Path) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            token: Some(TOKEN.to_owned()),
            ..Options::default()
        };
        let registry = registry::spawn(&dir.path().join("registry"), options).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let settings = Settings {
            endpoint: registry.url().to_owned(),
            token: Token::new(TOKEN),
            ..Settings::default()
        };
        let hub = Hub::new(settings).unwrap();
        let collection = runtime.block_on(async {
            let repo: RepoId = "owner/model".parse().unwrap();
            let card = "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.org/tiny\n---\n# m\n";
            let mut additions = vec![Addition {
                path: "README.md".into(),
                size_bytes: card.len() as u64,
                sha256: None,
                content: Content::Bytes(card.into()),
            }];
            for entry in fs::read_dir(model).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                if name != "README.md" {
                    let size_bytes = fs::metadata(&path).unwrap().len();
                    additions.push(Addition { path: name, size_bytes, sha256: None, content: Content::File(path) });
                }
            }
            hub.create_repo(&repo, false).await.unwrap();
            let request = CommitRequest { summary: "Add".into(), additions, deletions: Vec::new() };
            hub.commit(&repo, &request, &|_| {}).await.unwrap();
            hub.create_collection("acme", "Vindexes", None, false).await.unwrap().slug
        });
        let bench = Bench {
            dir,
            registry,
            runtime,
            hub,
            collection,
        };
        bench.manifest("  slices: [full]\n");
        bench
    }

    /// Writes the manifest of one model with these lines added.
    fn manifest(&self, lines: &str) {
        let text = format!(
            "models:\n- key: model\n  source_model: owner/model\n  quant: q4k\n  tier: smoke\n  output_name: model.vindex\n  hf_repo: {TARGET}\n  hf_collection: {}\n{lines}",
            self.collection
        );
        fs::write(self.path("m.yaml"), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn out(&self) -> PathBuf {
        self.path(".scratch/model.vindex")
    }

    /// A program that stands in for larql.
    fn script(&self, text: &str) -> String {
        use std::os::unix::fs::PermissionsExt;
        let path = self.path("larql.sh");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    }

    fn command(&self, args: &[&str], vars: &[(&str, &str)]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_skulk-weights"));
        command
            .args(["--manifest", "m.yaml", "publish", "--model", "model"])
            .args(args);
        command
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .env_clear()
            .env("PATH", "/usr/bin:/bin");
        command
            .env("HOME", self.path("home"))
            .env("HF_ENDPOINT", self.registry.url())
            .env("HF_TOKEN", TOKEN);
        command
            .env("SKULK_WEIGHTS_LARQL", larql())
            .envs(vars.iter().copied());
        command
    }

    fn run(&self, args: &[&str], vars: &[(&str, &str)]) -> Run {
        let output = self.command(args, vars).output().unwrap();
        let text = |bytes: Vec<u8>| self.redact(&String::from_utf8(bytes).unwrap());
        Run {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    fn ok(&self, args: &[&str]) -> Run {
        let run = self.run(args, &[]);
        assert_eq!(run.code, Some(0), "{}{}", run.stdout, run.stderr);
        run
    }

    /// What the target holds; `None` when it is not there.
    fn target(&self) -> Option<Snapshot> {
        self.runtime
            .block_on(self.hub.snapshot(&TARGET.parse().unwrap(), None))
            .ok()
    }

    fn text(&self, path: &str) -> String {
        let bytes = self
            .runtime
            .block_on(self.target().unwrap().read_file(path, 1 << 20))
            .unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    fn filed(&self) -> Vec<String> {
        self.runtime
            .block_on(self.hub.collection(&self.collection))
            .unwrap()
            .items
    }

    /// Whether what the target shows is a whole vindex, by pulling it.
    fn is_whole(&self) -> bool {
        let out = self.path("pulled");
        let _ = fs::remove_dir_all(&out);
        let pull = Command::new(larql())
            .args(["pull", TARGET, "-o"])
            .arg(&out)
            .env("HF_ENDPOINT", self.registry.url())
            .env("HF_TOKEN", TOKEN)
            .env("HF_HOME", self.path("hf"))
            .output()
            .unwrap();
        pull.status.success() && vindex::verify(&out, &|_| {}).is_ok()
    }

    /// What changes from run to run has a name instead.
    fn redact(&self, text: &str) -> String {
        assert!(!text.contains(TOKEN), "the token was printed:\n{text}");
        let larql = larql().display().to_string();
        let text = text
            .replace(&larql, "[LARQL]")
            .replace(&self.dir.path().display().to_string(), "[DIR]");
        let text = text
            .replace(self.registry.url(), "[HUB]")
            .replace(&self.collection, "[COLLECTION]");
        let mut out = String::new();
        for line in text.lines().filter(|line| !line.starts_with("wrote ")) {
            let line = match (
                line.split_once(" needed, "),
                line.split_once("time estimate:"),
            ) {
                (Some((needed, _)), _) => format!("{needed} needed, [FREE] free"),
                (_, Some(_)) => "time estimate: [TIME]".to_owned(),
                _ => line.to_owned(),
            };
            let words = line
                .split_inclusive(|c: char| !c.is_ascii_alphanumeric())
                .map(|word| {
                    let hex = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
                    let is_hex = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                    match hex.len() {
                        40 if is_hex => word.replace(hex, "[COMMIT]"),
                        64 if is_hex => word.replace(hex, "[SHA256]"),
                        _ => word.to_owned(),
                    }
                });
            out.extend(words);
            out.push('\n');
        }
        out
    }
}

/// The larql of this build, which `cargo test --workspace` and `cargo build -p larql` put beside our own program.
fn larql() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_skulk-weights"))
        .with_file_name(format!("larql{}", std::env::consts::EXE_SUFFIX));
    assert!(
        path.is_file(),
        "{} is missing; build it with `cargo build --release -p larql`",
        path.display()
    );
    path
}

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures/models")
        .join(name)
}

fn kjv() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/kjv")
}

#[test]
fn what_an_operator_sees_and_the_hub_holds() {
    let bench = Bench::new(&model("llama"));
    let dry = bench.ok(&["--artifact", "vindex", "--dry-run", "--inspect"]);
    insta::assert_snapshot!("inspected", dry.stdout);
    assert!(
        bench.target().is_none() && !bench.path(".scratch").exists(),
        "a dry run left something"
    );
    insta::assert_snapshot!("published", bench.ok(&["--artifact", "vindex"]).stdout);
    assert!(bench.is_whole());
    assert_eq!(bench.filed(), [TARGET]);
    assert!(!bench.out().exists());
    assert_eq!(fs::read_dir(bench.path(".scratch")).unwrap().count(), 0);
    let card = bench.text("README.md");
    let generated = card
        .lines()
        .find(|line| line.contains("generated_at"))
        .unwrap()
        .split('"')
        .nth(1)
        .unwrap()
        .to_owned();
    insta::assert_snapshot!("card", bench.redact(&card.replace(&generated, "[TIME]")));

    let head = bench.target().unwrap().commit().to_string();
    bench.ok(&["--artifact", "vindex"]);
    assert_eq!(
        bench.target().unwrap().commit().as_str(),
        head,
        "publishing the same again made a commit"
    );
}

#[test]
fn a_slice_is_what_the_named_repository_receives() {
    let bench = Bench::new(&model("qwen3_moe"));
    bench.manifest("  slices: [expert-server]\n");
    bench.ok(&["--artifact", "vindex"]);
    assert!(bench.is_whole());
    assert!(bench.text("slice.json").contains("expert-server"));
    assert!(bench.text("README.md").contains("slice: expert-server"));
    assert_eq!(
        bench
            .registry
            .stats()
            .sum("POST /api/repos/create")
            .n_requests,
        2,
        "source and target"
    );
}

#[test]
fn a_larql_of_others_is_served_and_its_card_added() {
    let bench = Bench::new(&model("llama"));
    let larql = bench
        .script("[ \"$1\" = extract ] && mkdir -p \"$4\" && echo '{}' > \"$4/index.json\"; exit 0");
    let run = bench.run(
        &["--artifact", "vindex"],
        &[("SKULK_WEIGHTS_LARQL", &larql)],
    );
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(
        run.stderr.contains("no vindex of ours") && run.stderr.contains("did not publish the card"),
        "{}",
        run.stderr
    );
    let card = bench.text("README.md");
    assert!(
        card.contains("license_name: tiny") && !card.contains("vindex_id"),
        "{card}"
    );
    assert_eq!(bench.filed(), [TARGET]);
}

#[test]
fn a_failed_extraction_is_not_published_and_the_next_run_goes_on() {
    let bench = Bench::new(&model("llama"));
    let failing =
        bench.script("echo \"$@\" >> larql.log; [ \"$1\" = extract ] && mkdir -p \"$4\"; exit 3");
    let run = bench.run(
        &["--artifact", "vindex"],
        &[("SKULK_WEIGHTS_LARQL", &failing)],
    );
    assert_eq!(run.code, Some(1));
    insta::assert_snapshot!("extract_failed", run.stderr);
    assert!(
        !fs::read_to_string(bench.path("larql.log"))
            .unwrap()
            .contains("publish")
    );
    assert!(bench.target().is_none());
    bench.ok(&["--artifact", "vindex"]);
    assert!(bench.is_whole());
}

#[test]
fn a_failed_publication_does_not_extract_again() {
    let bench = Bench::new(&model("llama"));
    let larql = larql().display().to_string();
    let script = bench.script(&format!(
        "echo \"$@\" >> larql.log; [ \"$1\" = publish ] && exit 1; exec {larql} \"$@\""
    ));
    let run = bench.run(
        &["--artifact", "vindex"],
        &[("SKULK_WEIGHTS_LARQL", &script)],
    );
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("larql publish failed")
            && run.stderr.contains("without extracting again"),
        "{}",
        run.stderr
    );
    let script = bench.script(&format!(
        "[ \"$1\" = extract ] && exit 9; exec {larql} \"$@\""
    ));
    let run = bench.run(
        &["--artifact", "vindex"],
        &[("SKULK_WEIGHTS_LARQL", &script)],
    );
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(bench.is_whole());
}

#[test]
fn a_failed_filing_is_all_that_remains() {
    let bench = Bench::new(&model("llama"));
    let missing = (
        "SKULK_WEIGHTS_COLLECTION",
        "acme/missing-0123456789abcdef01234567",
    );
    let run = bench.run(&["--artifact", "vindex"], &[missing]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("is published, but it cannot be filed"),
        "{}",
        run.stderr
    );
    assert!(bench.is_whole() && !bench.out().exists());
    let never = bench.script("[ \"$1\" = --version ] && exit 0; exit 9");
    let run = bench.run(
        &["--artifact", "vindex"],
        &[("SKULK_WEIGHTS_LARQL", &never)],
    );
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert_eq!(bench.filed(), [TARGET]);
}

#[test]
fn after_a_failed_sidecar_the_vindex_is_not_made_again() {
    let bench = Bench::new(&model("llama"));
    bench.manifest(
        "  slices: [full]\n  mtp_source_repo: owner/base\n  mtp_sidecar_repo: acme/base-mtp\n",
    );
    let run = bench.run(&[], &[]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("cannot read the source owner/base"),
        "{}",
        run.stderr
    );
    assert!(bench.is_whole());
    assert_eq!(bench.filed(), [TARGET]);

    let header = r#"{"mtp.fc.weight":{"dtype":"BF16","shape":[2,4],"data_offsets":[0,16]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend([1; 16]);
    let heads = Addition {
        path: "model.safetensors".into(),
        size_bytes: file.len() as u64,
        sha256: None,
        content: Content::Bytes(file),
    };
    bench.runtime.block_on(async {
        let base: RepoId = "owner/base".parse().unwrap();
        bench.hub.create_repo(&base, false).await.unwrap();
        let request = CommitRequest {
            summary: "Add".into(),
            additions: vec![heads],
            deletions: Vec::new(),
        };
        bench.hub.commit(&base, &request, &|_| {}).await.unwrap();
    });
    let never = bench.script("[ \"$1\" = --version ] && exit 0; exit 9");
    let run = bench.run(&[], &[("SKULK_WEIGHTS_LARQL", &never)]);
    assert_eq!(run.code, Some(0), "{}{}", run.stdout, run.stderr);
    assert!(
        run.stdout
            .contains("already published hf://acme/model-vindex")
            && run.stdout.contains("published hf://acme/base-mtp"),
        "{}",
        run.stdout
    );
    assert_eq!(fs::read_dir(bench.path(".scratch")).unwrap().count(), 0);
}

#[test]
fn an_output_that_is_not_ours_is_kept_unless_forced() {
    let bench = Bench::new(&model("llama"));
    fs::create_dir_all(bench.out()).unwrap();
    fs::write(bench.out().join("old"), "x").unwrap();
    let run = bench.run(&["--artifact", "vindex"], &[]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("output path already exists") && run.stderr.contains("--force"),
        "{}",
        run.stderr
    );
    assert!(bench.out().join("old").exists());
    bench.ok(&["--artifact", "vindex", "--force"]);
    assert!(bench.is_whole());
}

#[test]
fn a_token_that_is_not_accepted_ends_the_run_before_any_extraction() {
    let bench = Bench::new(&model("llama"));
    let run = bench.run(&["--artifact", "vindex"], &[("HF_TOKEN", "wrong")]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("not authorised") && run.stderr.contains("nothing was extracted"),
        "{}",
        run.stderr
    );
    assert!(!bench.path(".scratch").exists());
}

#[test]
fn two_runs_on_one_output_do_not_meet() {
    let bench = Bench::new(&model("llama"));
    fs::create_dir_all(bench.path(".scratch")).unwrap();
    let held = fs::File::create(bench.path(".scratch/.model.vindex.journal")).unwrap();
    held.lock().unwrap();
    let run = bench.run(&["--artifact", "vindex"], &[]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains("another run is publishing"),
        "{}",
        run.stderr
    );
}

#[test]
fn a_source_in_a_directory_has_no_commit() {
    let bench = Bench::new(&model("llama"));
    fs::create_dir_all(bench.path("owner/model")).unwrap();
    for entry in fs::read_dir(model("llama")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(
            &path,
            bench.path("owner/model").join(path.file_name().unwrap()),
        )
        .unwrap();
    }
    let run = bench.ok(&["--artifact", "vindex"]);
    assert!(
        run.stdout.contains("none (a directory here)"),
        "{}",
        run.stdout
    );
    assert!(!bench.text("README.md").contains("source_revision"));
}

#[test]
fn an_interrupt_is_passed_on_and_waited_for() {
    let bench = Bench::new(&model("llama"));
    let larql = bench.script(
        "[ \"$1\" = --version ] && exit 0\ntrap 'echo ended > ended; exit 130' INT\necho begun > begun\nwhile :; do sleep 0.05; done",
    );
    let mut child = bench
        .command(
            &["--artifact", "vindex"],
            &[("SKULK_WEIGHTS_LARQL", &larql)],
        )
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    while !bench.path("begun").exists() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before larql began"
        );
        thread::sleep(Duration::from_millis(10));
    }
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(bench.path("ended").exists(), "larql was not waited for");
    bench.ok(&["--artifact", "vindex"]);
}

#[cfg(target_os = "linux")]
#[test]
fn larql_ends_with_the_run_that_it_is_a_step_of() {
    use std::io::Read;
    let bench = Bench::new(&model("llama"));
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let larql = bench.script(&format!(
        "[ \"$1\" = --version ] && exit 0\nHF_ENDPOINT=http://{} HF_HUB_ETAG_TIMEOUT=600 exec {} pull acme/x -o pulled",
        silent.local_addr().unwrap(),
        larql().display()
    ));
    let mut child = bench
        .command(
            &["--artifact", "vindex"],
            &[("SKULK_WEIGHTS_LARQL", &larql)],
        )
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // It waits ten minutes for an answer that nobody gives; its end is the end of what it sends.
    let (mut asked, _) = silent.accept().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    asked
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let ended = asked.read_to_end(&mut Vec::new());
    assert!(ended.is_ok(), "larql lives on: {ended:?}");
    bench.ok(&["--artifact", "vindex"]);
}

#[test]
fn a_source_that_moved_is_told_from_the_work_that_was_begun() {
    let bench = Bench::new(&model("llama"));
    let larql = larql().display().to_string();
    let script = bench.script(&format!(
        "[ \"$1\" = publish ] && exit 1; exec {larql} \"$@\""
    ));
    let vars = [("SKULK_WEIGHTS_LARQL", script.as_str())];
    assert_eq!(bench.run(&["--artifact", "vindex"], &vars).code, Some(1));
    let request = CommitRequest {
        summary: "Move".into(),
        additions: vec![Addition {
            path: "notes.txt".into(),
            size_bytes: 1,
            sha256: None,
            content: Content::Bytes(b"x".to_vec()),
        }],
        deletions: Vec::new(),
    };
    let source = "owner/model".parse().unwrap();
    bench
        .runtime
        .block_on(bench.hub.commit(&source, &request, &|_| {}))
        .unwrap();
    let run = bench.run(&["--artifact", "vindex"], &[]);
    assert_eq!(run.code, Some(1));
    insta::assert_snapshot!("source_moved", run.stderr);
    bench.ok(&["--artifact", "vindex", "--force"]);
    assert!(bench.is_whole());
}

#[test]
fn a_run_that_nobody_reads_does_its_work() {
    let bench = Bench::new(&model("llama"));
    let mut child = bench
        .command(&["--artifact", "vindex"], &[])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(bench.is_whole());
}

#[test]
fn a_killed_publication_is_gone_on_from_and_shows_nothing_half() {
    use std::os::unix::process::CommandExt;
    let bench = Bench::new(&kjv());
    let mut n_killed = 0;
    for i in 0..16u64 {
        let mut command = bench.command(&["--artifact", "vindex"], &[]);
        let mut child = command
            .process_group(0)
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(20 + i * 23 % 300));
        n_killed += u32::from(child.try_wait().unwrap().is_none());
        let group = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        // It may have ended by itself.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        child.wait().unwrap();
        if bench.target().is_some_and(|target| {
            !target
                .files()
                .iter()
                .all(|file| file.path == ".gitattributes")
        }) {
            assert!(bench.is_whole(), "after kill {i}");
        }
    }
    assert!(n_killed > 0, "no run was killed in time");
    bench.ok(&["--artifact", "vindex"]);
    assert!(bench.is_whole() && !bench.out().exists());
    assert_eq!(bench.filed(), [TARGET]);
}
