//! From text to tokens and back over extracted vindexes.

mod grammar;
mod tokenizer;

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vindex::{ExtractOptions, LocalDir, Recipe, Vindex};

/// A file or directory of the repository.
fn in_repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// The vindex of a checkpoint in the repository; its directory lives as long as the first value.
fn extracted(checkpoint: &str) -> (TempDir, Vindex) {
    let source = LocalDir::open(&in_repository(checkpoint)).unwrap();
    let plan = vindex::plan(&source, Recipe::F32).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let options = ExtractOptions {
        threads: 1,
        allow_nonfinite: false,
    };
    vindex::extract(&source, &plan, dir.path(), &options, &|_| {}).unwrap();
    let vindex = Vindex::open(dir.path()).unwrap();
    (dir, vindex)
}
