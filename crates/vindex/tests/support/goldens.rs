//! Which models the golden tests run: the families in `fixtures/`, and all in the folder that `SKULK_GOLDENS` names.
//!
//! That folder has `models/FAMILY` (a checkpoint with `golden.npz` and `tokenize.json`) and `gguf/FAMILY.json`, as `.ci/run` sets it. Invariant:
//! when it is set and something of a family is missing there, the test fails; when it is not, only the fixtures run. Other
//! crates take this file in with `#[path]`, so that all have the same families.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses some of it"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A model and what others make of it.
#[derive(Clone, Debug)]
pub struct Golden {
    pub family: String,
    /// Its checkpoint.
    pub model: PathBuf,
    /// What llama.cpp's converter writes.
    pub gguf: PathBuf,
    /// What `transformers` computes.
    pub npz: PathBuf,
    /// What the `tokenizers` library makes of some texts.
    pub tokenize: PathBuf,
}

/// Every family, by name.
pub fn goldens() -> Vec<Golden> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let mut all = BTreeMap::new();
    for family in folders(&fixtures.join("models")) {
        let golden = Golden {
            model: fixtures.join("models").join(&family),
            gguf: fixtures.join("gguf").join(format!("{family}.json")),
            npz: fixtures.join("goldens").join(format!("{family}.npz")),
            tokenize: fixtures.join("tokenize").join(format!("{family}.json")),
            family,
        };
        all.insert(golden.family.clone(), golden);
    }
    if let Some(folder) = std::env::var_os("SKULK_GOLDENS") {
        let folder = PathBuf::from(folder);
        for family in folders(&folder.join("models")) {
            let model = folder.join("models").join(&family);
            let golden = Golden {
                gguf: folder.join("gguf").join(format!("{family}.json")),
                npz: model.join("golden.npz"),
                tokenize: model.join("tokenize.json"),
                model,
                family,
            };
            all.insert(golden.family.clone(), golden);
        }
    }
    for golden in all.values() {
        for path in [&golden.model, &golden.gguf, &golden.npz, &golden.tokenize] {
            assert!(path.exists(), "{} is missing", path.display());
        }
    }
    all.into_values().collect()
}

/// Checkpoints whose weights are codes with scales, of `mlx` and `fp8`; converters to GGUF have made nothing of them.
pub fn coded() -> Vec<Golden> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let roots = std::env::var_os("SKULK_GOLDENS").map(PathBuf::from);
    let mut all = BTreeMap::new();
    for root in [fixtures].into_iter().chain(roots) {
        for kind in ["mlx", "fp8"] {
            for name in folders(&root.join(kind)) {
                let model = root.join(kind).join(&name);
                let golden = Golden {
                    family: format!("{kind}/{name}"),
                    gguf: PathBuf::new(),
                    tokenize: PathBuf::new(),
                    npz: model.join("golden.npz"),
                    model,
                };
                all.insert(golden.family.clone(), golden);
            }
        }
    }
    all.into_values().collect()
}

/// One family, when it is in the fixtures or `SKULK_GOLDENS` is set.
///
/// # Panics
/// When `SKULK_GOLDENS` is set and has no such family.
pub fn golden(family: &str) -> Option<Golden> {
    let found = goldens().into_iter().find(|g| g.family == family);
    let must_be = std::env::var_os("SKULK_GOLDENS").is_some();
    assert!(found.is_some() || !must_be, "SKULK_GOLDENS has no {family}");
    found
}

fn folders(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap())
        .filter(|e| e.path().is_dir())
        .map(|e| e.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(!names.is_empty(), "{} holds nothing", dir.display());
    names
}
