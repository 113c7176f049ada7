//! A directory to work in, a registry, and runs of the program with what they printed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use registry::{Options, Running};

pub(crate) const TOKEN: &str = "hf_test_secret";

/// A place to run the program in.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) registry: Running,
}

/// A run that has ended.
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            token: Some(TOKEN.to_owned()),
            ..Options::default()
        };
        let registry = registry::spawn(&dir.path().join("registry"), options).unwrap();
        Bench { dir, registry }
    }

    /// With a vindex in `out`, of this checkpoint.
    pub(crate) fn with_vindex(checkpoint: &str, quant: &str) -> Bench {
        let bench = Bench::new();
        bench.ok(&["extract", checkpoint, "-o", "out", "--quant", quant]);
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The program with these arguments, with the registry as its Hub.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_larql"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
            .env_clear()
            .env("HF_ENDPOINT", self.registry.url())
            .env("HF_TOKEN", TOKEN);
        command
            .env("HF_HOME", self.path("hf"))
            .env("NO_PROXY", "127.0.0.1");
        command
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Run {
        self.run_with(args, &[])
    }

    pub(crate) fn run_with(&self, args: &[&str], vars: &[(&str, &str)]) -> Run {
        let output = self
            .command(args)
            .envs(vars.iter().copied())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| self.redact(&String::from_utf8(bytes).unwrap());
        Run {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    /// Runs the program, which must succeed.
    pub(crate) fn ok(&self, args: &[&str]) -> Run {
        let run = self.run(args);
        assert_eq!(run.code, Some(0), "{args:?}\n{}{}", run.stdout, run.stderr);
        run
    }

    /// Starts the program and kills it after `delay`; whether it was still running.
    pub(crate) fn kill_after(&self, args: &[&str], delay: Duration) -> bool {
        let mut child = self
            .command(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(delay);
        let was_running = child.try_wait().unwrap().is_none();
        child.kill().unwrap();
        child.wait().unwrap();
        was_running
    }

    /// The identity of the vindex in a directory, as `verify` tells it; `None` when it is not intact.
    pub(crate) fn verified(&self, dir: &str) -> Option<String> {
        let run = self.command(&["verify", dir, "--json"]).output().unwrap();
        let value: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
        run.status
            .success()
            .then(|| value["vindex"].as_str().unwrap().to_owned())
    }

    /// What changes from run to run has a name instead.
    fn redact(&self, text: &str) -> String {
        assert!(!text.contains(TOKEN), "the token was printed:\n{text}");
        let text = text
            .replace(&self.dir.path().display().to_string(), "[DIR]")
            .replace(self.registry.url(), "[HUB]");
        words(&text)
    }
}

/// Replaces hashes by `[COMMIT]` and `[SHA256]`, and seconds by `[TIME]`.
fn words(text: &str) -> String {
    let is_hex = |word: &str| word.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let mut out = String::new();
    let mut word = String::new();
    let flush = |word: &mut String, out: &mut String| {
        match word.len() {
            40 if is_hex(word) => out.push_str("[COMMIT]"),
            64 if is_hex(word) => out.push_str("[SHA256]"),
            12 if is_hex(word) => out.push_str("[ID]"),
            _ => out.push_str(word),
        }
        word.clear();
    };
    for c in text.chars() {
        if c.is_ascii_alphanumeric() {
            word.push(c);
        } else {
            flush(&mut word, &mut out);
            out.push(c);
        }
    }
    flush(&mut word, &mut out);
    match (
        out.find("MB in ").or_else(|| out.find("kB in ")),
        out.find(" s\n"),
    ) {
        (Some(start), Some(end)) if start < end && !out[start + 6..end].contains('\n') => {
            format!("{}[TIME]{}", &out[..start + 6], &out[end..])
        }
        _ => out,
    }
}

/// A model of the fixtures.
pub(crate) fn model(name: &str) -> String {
    format!(
        "{}/../../fixtures/models/{name}",
        env!("CARGO_MANIFEST_DIR")
    )
}

/// The trained model of the repository, large enough to be killed in the middle.
pub(crate) fn kjv() -> String {
    format!("{}/../../models/kjv", env!("CARGO_MANIFEST_DIR"))
}

/// Names of the files in a directory, in order.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A copy of a model that may be damaged.
pub(crate) fn copy(from: &str, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for name in names(Path::new(from)) {
        std::fs::copy(Path::new(from).join(&name), to.join(&name)).unwrap();
    }
}
