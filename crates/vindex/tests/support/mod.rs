//! What the tests of the storing half share: the checkpoints in `fixtures/models` and directories to extract into.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses some of it"
)]

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use vindex::{
    Error, ExtractOptions, LocalDir, Plan, Progress, Recipe, Source, VindexId, extract, plan,
};

pub mod goldens;

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

pub fn checkpoint_dir(family: &str) -> PathBuf {
    fixtures().join("models").join(family)
}

/// A copy that a test may damage.
pub fn copy_of(family: &str, to: &Path) -> PathBuf {
    let target = to.join(family);
    copy_dir(&checkpoint_dir(family), &target);
    target
}

pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

pub const OPTIONS: ExtractOptions = ExtractOptions {
    threads: 2,
    allow_nonfinite: false,
};

/// Plans and extracts, and returns what was told on the way.
pub fn run(
    source: &dyn Source,
    recipe: Recipe,
    out: &Path,
    options: &ExtractOptions,
) -> (Result<VindexId, Error>, Vec<Progress>) {
    let plan = plan(source, recipe).unwrap();
    run_plan(source, &plan, out, options)
}

pub fn run_plan(
    source: &dyn Source,
    plan: &Plan,
    out: &Path,
    options: &ExtractOptions,
) -> (Result<VindexId, Error>, Vec<Progress>) {
    let told = Mutex::new(Vec::new());
    let result = extract(source, plan, out, options, &|progress| {
        told.lock().unwrap().push(progress)
    });
    (result, told.into_inner().unwrap())
}

/// A finished vindex of a fixture.
pub fn extracted(family: &str, recipe: Recipe, out: &Path) -> VindexId {
    extracted_from(&checkpoint_dir(family), recipe, out)
}

/// A finished vindex of a checkpoint.
pub fn extracted_from(checkpoint: &Path, recipe: Recipe, out: &Path) -> VindexId {
    let source = LocalDir::open(checkpoint).unwrap();
    run(&source, recipe, out, &OPTIONS).0.unwrap()
}

/// Names in a directory, sorted.
pub fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The error and its causes, one after another.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Overwrites bytes in the middle of a file.
pub fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(bytes).unwrap();
}

/// Flips one bit of the byte at `at`.
pub fn flip(path: &Path, at: u64) {
    let mut byte = [0];
    let mut file = File::open(path).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.read_exact(&mut byte).unwrap();
    overwrite(path, at, &[byte[0] ^ 1]);
}
