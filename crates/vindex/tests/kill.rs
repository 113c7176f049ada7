//! Processes that end in the middle: killed at any moment, or refused by the kernel when they write.
//!
//! Each test runs itself again as a child process, which sees the job in its environment and extracts.
#![cfg(unix)]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use support::{OPTIONS, chain, checkpoint_dir, extracted, listing};
use vindex::{Error, LocalDir, Recipe, Vindex, extract, plan, verify};

const OUT: &str = "VINDEX_TEST_CHILD_OUT";
const DIE_AT: &str = "VINDEX_TEST_CHILD_DIES_AT";
const FAMILY: &str = "qwen3_moe";
const RECIPE: Recipe = Recipe::Q4k;

/// In a child: extracts, dies if told to, prints the error if there is one. Returns whether this is a child.
fn is_child() -> bool {
    let Some(out) = std::env::var_os(OUT) else {
        return false;
    };
    let die_at: usize = std::env::var(DIE_AT)
        .ok()
        .map_or(usize::MAX, |n| n.parse().unwrap());
    let n_events = AtomicUsize::new(0);
    let source = LocalDir::open(&checkpoint_dir(FAMILY)).unwrap();
    let plan = plan(&source, RECIPE).unwrap();
    let result = extract(&source, &plan, Path::new(&out), &OPTIONS, &|_| {
        if n_events.fetch_add(1, Ordering::SeqCst) == die_at {
            // Nothing is dropped, flushed or unwound.
            std::process::abort();
        }
    });
    match result {
        Ok(id) => println!("\nRESULT {id}"),
        Err(error) => println!("\nRESULT {}", chain(&error)),
    }
    true
}

/// This test binary again, running only `test` as a child that extracts into `out`.
fn child(test: &str, out: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(OUT, out);
    command
}

/// What a child that ran to its end printed.
fn result_of(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let result = text.lines().find_map(|line| line.strip_prefix("RESULT "));
    result
        .unwrap_or_else(|| {
            panic!(
                "{} {text} {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            )
        })
        .to_owned()
}

/// A directory after a crash is either nothing that opens, or whole.
fn assert_nothing_half_published(out: &Path, id: &str) {
    match Vindex::open(out) {
        Ok(vindex) => {
            assert_eq!(vindex.id().to_string(), id);
            assert_eq!(verify(out, &|_| ()).unwrap().id.to_string(), id);
        }
        Err(error) => assert!(matches!(error, Error::NotAVindex { .. }), "{error}"),
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// kill -9 after a random time, again and again into the same directory until one run comes through; ten times over.
#[test]
fn killed_at_random_moments() {
    if is_child() {
        return;
    }
    let test = "killed_at_random_moments";
    let tmp = tempfile::tempdir().unwrap();
    let id = extracted(FAMILY, RECIPE, &tmp.path().join("whole")).to_string();
    let started = Instant::now();
    assert_eq!(result_of(child(test, &tmp.path().join("unharmed"))), id);
    let whole_run_us = started.elapsed().as_micros() as u64;
    let mut random = Random(0x5eed_1e55);
    let mut n_killed = 0;
    for round in 0..10 {
        let out: PathBuf = tmp.path().join(format!("round-{round}"));
        for _ in 0..8 {
            let mut process: Child = child(test, &out)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_micros(random.below(whole_run_us)));
            process.kill().unwrap();
            n_killed += usize::from(!process.wait().unwrap().success());
            assert_nothing_half_published(&out, &id);
            if Vindex::open(&out).is_ok() {
                break;
            }
        }
        if Vindex::open(&out).is_err() {
            assert_eq!(result_of(child(test, &out)), id);
        }
        assert_nothing_half_published(&out, &id);
        assert_eq!(verify(&out, &|_| ()).unwrap().id.to_string(), id);
        assert!(
            !listing(&out).iter().any(|name| name.ends_with(".partial")),
            "{:?}",
            listing(&out)
        );
    }
    assert!(n_killed > 0, "no child was killed before its end");
}

/// Death at each event of an extraction in turn, from the first byte to the last part.
#[test]
fn dead_at_each_step() {
    if is_child() {
        return;
    }
    let test = "dead_at_each_step";
    let tmp = tempfile::tempdir().unwrap();
    let id = extracted(FAMILY, RECIPE, &tmp.path().join("whole")).to_string();
    let mut n_died = 0;
    loop {
        let out = tmp.path().join(n_died.to_string());
        let mut dying = child(test, &out);
        let status = dying
            .env(DIE_AT, n_died.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if status.unwrap().success() {
            break;
        }
        assert!(matches!(Vindex::open(&out), Err(Error::NotAVindex { .. })));
        assert_eq!(result_of(child(test, &out)), id);
        assert_nothing_half_published(&out, &id);
        assert!(!out.join("extract.journal").exists());
        n_died += 1;
    }
    assert!(n_died > 10, "{n_died}");
}

/// A write that the kernel refuses (here by the limit of a file's size, as on a full disk) ends with the path and the
/// cause; with more room the next run goes on.
#[test]
fn a_refused_write_names_the_file() {
    if is_child() {
        return;
    }
    let test = "a_refused_write_names_the_file";
    let tmp = tempfile::tempdir().unwrap();
    let id = extracted(FAMILY, RECIPE, &tmp.path().join("whole")).to_string();
    let out = tmp.path().join("out");
    let inner = child(test, &out);
    let mut limited = Command::new("sh");
    // Blocks of 512 or 1024 bytes, by shell; some part is larger than 300 of either.
    limited.args(["-c", "trap '' XFSZ; ulimit -f 300 && exec \"$@\"", "sh"]);
    limited.arg(inner.get_program()).args(inner.get_args());
    limited.envs(
        inner
            .get_envs()
            .filter_map(|(key, value)| Some((key, value?))),
    );
    let result = result_of(limited);
    // Which part it is depends on the shell's blocks.
    let (begin, end) = (
        format!("cannot write {}/{FAMILY}-{RECIPE}-0", out.display()),
        ".gguf.partial: File too large",
    );
    assert!(
        result.starts_with(&begin) && result.contains(end),
        "{result}"
    );
    assert!(matches!(Vindex::open(&out), Err(Error::NotAVindex { .. })));
    assert!(
        !listing(&out).iter().any(|name| name.ends_with(".partial")),
        "{:?}",
        listing(&out)
    );
    assert_eq!(result_of(child(test, &out)), id);
    assert_nothing_half_published(&out, &id);
}
