//! llama.cpp, the peer: built from the source package of `llama-cpp-python` on PyPI, with the native flags of this machine.
//! Invariant: the peer gets our parts as they are; nothing is converted for it. Leaves out what is compared.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::build::{self, Done, run};

/// The source package that is built.
const PACKAGE: &str = "llama-cpp-python==0.3.36";

/// The folder of llama.cpp's programs; builds `tools` where they are not there.
pub(crate) fn programs(tools: &[&str]) -> Done<PathBuf> {
    let folder = build::workspace("peers")?;
    let bin = folder.join("llama.cpp/bin");
    if tools.iter().all(|tool| bin.join(tool).exists()) {
        return Ok(bin);
    }
    let python = folder.join("venv/bin/python");
    if !python.exists() {
        run(Command::new("python3")
            .args(["-m", "venv"])
            .arg(folder.join("venv")))?;
    }
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "cmake", "ninja"]))?;
    run(Command::new(&python)
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            // Only the package itself as source: what builds it comes as wheels.
            "llama-cpp-python",
            "--dest",
        ])
        .arg(&folder)
        .arg(PACKAGE))?;
    let name = PACKAGE
        .replace("==", "-")
        .replace("llama-cpp-python", "llama_cpp_python");
    run(Command::new("tar")
        .arg("xzf")
        .arg(folder.join(format!("{name}.tar.gz")))
        .arg("-C")
        .arg(&folder))?;
    let cmake = folder.join("venv/bin/cmake");
    let build = folder.join("llama.cpp");
    run(Command::new(&cmake)
        .args(["-G", "Ninja", "-S"])
        .arg(folder.join(&name).join("vendor/llama.cpp"))
        .arg("-B")
        .arg(&build)
        .arg(format!(
            "-DCMAKE_MAKE_PROGRAM={}",
            folder.join("venv/bin/ninja").display()
        ))
        .args([
            "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_SHARED_LIBS=OFF",
            "-DLLAMA_OPENSSL=OFF",
        ])
        .args([
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_SERVER=OFF",
            "-DLLAMA_BUILD_APP=OFF",
        ]))?;
    run(Command::new(&cmake)
        .arg("--build")
        .arg(&build)
        .arg("--target")
        .args(tools))?;
    Ok(bin)
}

/// The GGUF parts of a vindex, in order.
fn parts(vindex: &Path) -> Done<Vec<PathBuf>> {
    let listing = std::fs::read_dir(vindex)
        .map_err(|error| format!("cannot list {}: {error}", vindex.display()))?;
    let mut parts: Vec<PathBuf> = listing
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "gguf")
        })
        .collect();
    parts.sort();
    Ok(parts)
}

/// Bytes of all parts of a vindex.
pub(crate) fn size_bytes(vindex: &Path) -> Done<u64> {
    let of = |part: &PathBuf| {
        let metadata = std::fs::metadata(part);
        metadata.map_err(|error| format!("cannot read {}: {error}", part.display()))
    };
    let sizes = parts(vindex)?
        .iter()
        .map(|part| Ok(of(part)?.len()))
        .collect::<Done<Vec<u64>>>()?;
    Ok(sizes.iter().sum())
}

/// The part by which llama.cpp opens a vindex.
pub(crate) fn first_part(vindex: &Path) -> Done<PathBuf> {
    parts(vindex)?
        .into_iter()
        .next()
        .ok_or_else(|| format!("{} has no part", vindex.display()))
}

/// Perplexity of a text in llama.cpp, windows of `window` tokens, of which the second half counts.
pub(crate) fn perplexity(tools: &Path, first_part: &Path, text: &Path, window: usize) -> Done<f64> {
    let mut said = String::new();
    // What llama-perplexity writes last, its figure, is sometimes lost when it ends.
    for _ in 0..5 {
        let result = Command::new(tools.join("llama-perplexity"))
            .arg("--model")
            .arg(first_part)
            .arg("--file")
            .arg(text)
            .args([
                "--ctx-size",
                &window.to_string(),
                "--threads",
                "2",
                "--no-warmup",
            ])
            .output()
            .map_err(|error| format!("cannot run llama-perplexity: {error}"))?;
        said = String::from_utf8_lossy(&result.stdout).into_owned()
            + &String::from_utf8_lossy(&result.stderr);
        if !result.status.success() {
            return Err(format!("llama-perplexity: {}\n{said}", result.status));
        }
        let figure = said
            .lines()
            .find_map(|line| line.split_once("PPL = "))
            .and_then(|(_, figure)| figure.split_whitespace().next()?.parse().ok());
        if let Some(figure) = figure {
            return Ok(figure);
        }
    }
    Err(format!("llama-perplexity gave no figure:\n{said}"))
}
