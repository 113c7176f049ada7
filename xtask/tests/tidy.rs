//! Holds the house to what its documents say: the diagram, the licences, where `unsafe` and async may live, how a
//! file begins and how long it may be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file longer than this usually holds a second noun.
const LINES_MAX: usize = 700;

#[test]
fn the_diagram_is_what_cargo_builds() {
    let said = depends_block(&read(&root().join("ARCHITECTURE.md")));
    let members = members();
    let names: BTreeSet<&String> = members.keys().collect();
    let built: BTreeMap<String, BTreeSet<String>> = members
        .iter()
        .map(|(name, manifest)| {
            let own = |dependency: &&String| names.contains(dependency);
            (
                name.clone(),
                dependencies(manifest).iter().filter(own).cloned().collect(),
            )
        })
        .collect();
    assert_eq!(
        said, built,
        "ARCHITECTURE.md (left) and the Cargo.toml files (right) differ"
    );
}

#[test]
fn async_and_http_stay_at_the_edge() {
    for (name, manifest) in members() {
        if name == "quant" || name == "vindex" {
            let forbidden = ["tokio", "reqwest", "axum", "hyper", "futures", "hf-xet"];
            let found: Vec<_> = dependencies(&manifest)
                .into_iter()
                .filter(|d| forbidden.contains(&d.as_str()))
                .collect();
            assert!(found.is_empty(), "{name} depends on {found:?}");
        }
    }
}

#[test]
fn dependencies_are_named_once_in_the_workspace() {
    for (name, manifest) in members() {
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(table) = manifest.get(section).and_then(toml::Value::as_table) else {
                continue;
            };
            for (dependency, value) in table {
                let inherits = value.get("workspace").and_then(toml::Value::as_bool) == Some(true);
                assert!(
                    inherits,
                    "{name}: {dependency} does not inherit from the workspace"
                );
            }
        }
        let lints = manifest
            .get("lints")
            .and_then(|lints| lints.get("workspace"))
            .and_then(toml::Value::as_bool);
        assert_eq!(lints, Some(true), "{name} has lints of its own");
    }
}

#[test]
fn every_licence_is_allowed() {
    let deny: toml::Value =
        toml::from_str(&read(&root().join("deny.toml"))).expect("deny.toml is TOML");
    let words = |value: &toml::Value| -> Vec<String> {
        let list = value.as_array().expect("a list of licences");
        list.iter()
            .filter_map(|word| word.as_str().map(str::to_owned))
            .collect()
    };
    let allowed = words(&deny["licenses"]["allow"]);
    let exceptions: BTreeMap<String, Vec<String>> = deny["licenses"]["exceptions"]
        .as_array()
        .expect("a list of exceptions")
        .iter()
        .map(|exception| {
            (
                exception["crate"].as_str().expect("a crate").to_owned(),
                words(&exception["allow"]),
            )
        })
        .collect();

    let output = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(["metadata", "--format-version", "1", "--locked"])
        .output()
        .expect("cargo metadata runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    assert!(
        packages.len() > 50,
        "cargo metadata names the dependencies too"
    );
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        let licence = package["license"].as_str().unwrap_or("(none)");
        let own = exceptions.get(name).map(Vec::as_slice).unwrap_or_default();
        let is_allowed = |word: &str| allowed.iter().chain(own).any(|allowed| allowed == word);
        assert!(
            satisfied(licence, &is_allowed),
            "{name} is under {licence}; deny.toml does not allow that"
        );
    }
}

/// Whether an SPDX expression (with the old `/` for OR) can be met with allowed licences only.
fn satisfied(expression: &str, is_allowed: &dyn Fn(&str) -> bool) -> bool {
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = any_of(&words, &mut at, is_allowed);
    met && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize, is_allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut met = all_of(words, at, is_allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= all_of(words, at, is_allowed);
    }
    met
}

fn all_of(words: &[&str], at: &mut usize, is_allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut met = one(words, at, is_allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, is_allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, is_allowed: &dyn Fn(&str) -> bool) -> bool {
    match words.get(*at) {
        Some(&"(") => {
            *at += 1;
            let met = any_of(words, at, is_allowed);
            *at += 1;
            met
        }
        Some(&licence) => {
            *at += 1;
            let mut licence = licence.to_owned();
            if words.get(*at) == Some(&"WITH") {
                licence = format!(
                    "{licence} WITH {}",
                    words.get(*at + 1).copied().unwrap_or_default()
                );
                *at += 2;
            }
            is_allowed(&licence)
        }
        None => false,
    }
}

#[test]
fn licence_expressions_are_read_as_spdx() {
    let allowed = |word: &str| word == "MIT" || word == "Apache-2.0 WITH LLVM-exception";
    assert!(satisfied("MIT OR GPL-3.0", &allowed));
    assert!(satisfied("GPL-3.0/MIT", &allowed));
    assert!(satisfied(
        "(GPL-3.0 OR MIT) AND Apache-2.0 WITH LLVM-exception",
        &allowed
    ));
    assert!(!satisfied("MIT AND GPL-3.0", &allowed));
    assert!(!satisfied("Apache-2.0", &allowed));
    assert!(!satisfied("(none)", &allowed));
}

#[test]
fn modules_say_what_they_answer_and_stay_short() {
    for path in sources() {
        let text = read(&path);
        assert!(
            text.starts_with("//!"),
            "{} does not open with //!",
            path.display()
        );
        let n_lines = text.lines().count();
        assert!(
            n_lines <= LINES_MAX,
            "{} has {n_lines} lines; {LINES_MAX} are the limit",
            path.display()
        );
    }
}

#[test]
fn unsafe_lives_in_four_rooms() {
    for path in sources() {
        let inside = path.strip_prefix(root()).expect("a path below the root");
        let is_room = inside.starts_with("crates/quant/src/arch")
            || inside == Path::new("crates/quant/src/product/columns.rs")
            || inside == Path::new("crates/vindex/src/open.rs")
            || inside == Path::new("crates/engine/src/threads.rs");
        let uses = read(&path).lines().any(|line| {
            let code = line.split("//").next().unwrap_or_default();
            code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
        });
        assert!(is_room || !uses, "{} has unsafe code", inside.display());
    }
}

#[test]
fn nothing_is_left_open_and_no_machine_is_named() {
    // Put together here, so that this file does not find itself.
    let words = [
        ["to", "do!("].concat(),
        ["unimpl", "emented!("].concat(),
        ["TO", "DO"].concat(),
        ["FIX", "ME"].concat(),
        ["#[ig", "nore"].concat(),
        ["/wo", "rk/"].concat(),
        ["/ro", "ot/"].concat(),
    ];
    for path in tracked() {
        let Ok(text) = fs::read_to_string(root().join(&path)) else {
            continue;
        };
        if path.ends_with("Cargo.lock")
            || path.starts_with("fixtures")
            || path.starts_with("models")
        {
            continue;
        }
        for word in &words {
            assert!(
                !text.contains(word.as_str()),
                "{} contains {word}",
                path.display()
            );
        }
    }
}

/// The `depends` block: `crate: dependency dependency`.
fn depends_block(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let (_, after) = text
        .split_once("```depends\n")
        .expect("ARCHITECTURE.md has a depends block");
    let (block, _) = after.split_once("```").expect("the depends block ends");
    block
        .lines()
        .map(|line| {
            let (name, dependencies) = line
                .split_once(':')
                .expect("a line is `crate: dependencies`");
            (
                name.to_owned(),
                dependencies.split_whitespace().map(str::to_owned).collect(),
            )
        })
        .collect()
}

/// Manifests of the workspace by crate name.
fn members() -> BTreeMap<String, toml::Value> {
    let listing = fs::read_dir(root().join("crates")).expect("crates/ is there");
    let folders = listing
        .map(|entry| entry.expect("a crate").path())
        .chain([root().join("xtask")]);
    folders
        .map(|folder| {
            let manifest: toml::Value =
                toml::from_str(&read(&folder.join("Cargo.toml"))).expect("a manifest is TOML");
            (
                manifest["package"]["name"]
                    .as_str()
                    .expect("a name")
                    .to_owned(),
                manifest,
            )
        })
        .collect()
}

fn dependencies(manifest: &toml::Value) -> BTreeSet<String> {
    let table = manifest.get("dependencies").and_then(toml::Value::as_table);
    table
        .map(|table| table.keys().cloned().collect())
        .unwrap_or_default()
}

/// Our own Rust sources, tests left out.
fn sources() -> Vec<PathBuf> {
    let found: Vec<PathBuf> = tracked()
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .filter(|path| path.components().any(|part| part.as_os_str() == "src"))
        .map(|path| root().join(path))
        .collect();
    assert!(found.len() > 10, "git lists the sources");
    found
}

/// Files that git knows, relative to the root.
fn tracked() -> Vec<PathBuf> {
    let output = Command::new("git")
        .current_dir(root())
        .arg("ls-files")
        .output()
        .expect("git runs");
    assert!(
        output.status.success(),
        "git ls-files failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let listing = String::from_utf8(output.stdout).expect("paths are UTF-8");
    listing
        .lines()
        .map(PathBuf::from)
        .filter(|path| root().join(path).exists())
        .collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .to_owned()
}
