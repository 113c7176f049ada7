//! llama.cpp as a second reader: builds it from the source package of `llama-cpp-python` on PyPI, opens a vindex
//! of the kjv model in it and holds what it writes against `models/kjv/prompts.json`. Not part of CI.
//! Invariant: the peer gets our parts as they are; nothing is converted for it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::build::{self, Done, output, run};

/// The source package that is built.
const PACKAGE: &str = "llama-cpp-python==0.3.36";
const TOOLS: [&str; 3] = ["llama-quantize", "llama-completion", "llama-perplexity"];

/// Extracts kjv with f32 and q4k, lets llama.cpp continue every prompt and compares.
pub(crate) fn run_peers() -> Done {
    let tools = llama_cpp()?;
    let larql = build::programs()?.larql;
    let model = build::root().join("models/kjv");
    let folder = build::workspace("peers")?;
    let mut wrong = Vec::new();
    for recipe in ["f32", "q4k"] {
        let target = folder.join(format!("kjv-{recipe}.vindex"));
        if target.exists() {
            std::fs::remove_dir_all(&target)
                .map_err(|error| format!("cannot remove {}: {error}", target.display()))?;
        }
        run(Command::new(&larql)
            .arg("extract")
            .arg(&model)
            .arg("-o")
            .arg(&target)
            .args(["--quant", recipe]))?;
        let parts = parts(&target)?;
        let first_part = parts.first().ok_or("the vindex has no part")?;
        let (n_equal, n_prompts) = compare_prompts(&tools, first_part, &model)?;
        let perplexity = perplexity(&tools, first_part, &model)?;
        println!(
            "kjv {recipe}: {n_equal} of {n_prompts} continuations as in prompts.json; perplexity of heldout.txt in llama.cpp {perplexity}"
        );
        // Only unquantised weights must repeat the reference; q4k is a figure.
        if recipe == "f32" && n_equal != n_prompts {
            wrong.push(format!(
                "{} of {n_prompts} continuations differ with {recipe}",
                n_prompts - n_equal
            ));
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("; "))
    }
}

/// The folder of llama.cpp's programs; builds them when they are not there.
pub(crate) fn llama_cpp() -> Done<PathBuf> {
    let folder = build::workspace("peers")?;
    let tools = folder.join("llama.cpp/bin");
    if TOOLS.iter().all(|tool| tools.join(tool).exists()) {
        return Ok(tools);
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
            ":all:",
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
        .args(TOOLS))?;
    Ok(tools)
}

/// The GGUF parts of a vindex, in order.
pub(crate) fn parts(vindex: &Path) -> Done<Vec<PathBuf>> {
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

/// How many of the prompts are continued by the recorded 64 tokens, and how many prompts there are.
fn compare_prompts(tools: &Path, first_part: &Path, model: &Path) -> Done<(usize, usize)> {
    let vocabulary = Vocabulary::read(&model.join("tokenizer.json"))?;
    let recorded = read_json(&model.join("prompts.json"))?;
    let prompts = recorded["prompts"]
        .as_array()
        .ok_or("prompts.json has no prompts")?;
    let mut n_equal = 0;
    for prompt in prompts {
        // The bare text: the recorded continuations are those of a prompt without the token that opens a document.
        let text = prompt["prompt"]
            .as_str()
            .ok_or("a prompt of prompts.json has no text")?;
        let expected = vocabulary.decode(&prompt["greedy_ids"])?;
        // Four tokens more than are compared: what llama-completion writes last is sometimes lost when it ends.
        let written = output(
            Command::new(tools.join("llama-completion"))
                .arg("--model")
                .arg(first_part)
                .args([
                    "--prompt",
                    text,
                    "--predict",
                    "68",
                    "--temp",
                    "0",
                    "--ctx-size",
                    "512",
                    "--threads",
                    "2",
                ])
                .args([
                    "--cache-type-k",
                    "f32",
                    "--cache-type-v",
                    "f32",
                    "--flash-attn",
                    "off",
                ])
                .args([
                    "--no-display-prompt",
                    "--no-conversation",
                    "--simple-io",
                    "--no-warmup",
                    "--ignore-eos",
                ]),
        )?;
        let written = String::from_utf8_lossy(&written);
        if written.starts_with(&expected) {
            n_equal += 1;
        } else {
            eprintln!(
                "prompt {text:?}\n  recorded {expected:?}\n  written  {:?}",
                written.trim_end()
            );
        }
    }
    Ok((n_equal, prompts.len()))
}

/// llama.cpp's own figure for `heldout.txt`, windows of 256.
fn perplexity(tools: &Path, first_part: &Path, model: &Path) -> Done<String> {
    let result = Command::new(tools.join("llama-perplexity"))
        .arg("--model")
        .arg(first_part)
        .arg("--file")
        .arg(model.join("heldout.txt"))
        .args(["--ctx-size", "256", "--threads", "2", "--no-warmup"])
        .output()
        .map_err(|error| format!("cannot run llama-perplexity: {error}"))?;
    let said = String::from_utf8_lossy(&result.stdout).into_owned()
        + &String::from_utf8_lossy(&result.stderr);
    said.lines()
        .find_map(|line| {
            line.split_once("PPL = ")
                .map(|(_, figure)| figure.trim().to_owned())
        })
        .ok_or_else(|| format!("llama-perplexity gave no figure:\n{said}"))
}

/// Byte-level BPE, the way back: id to bytes.
struct Vocabulary {
    tokens: HashMap<u64, String>,
    byte_of: HashMap<char, u8>,
}

impl Vocabulary {
    fn read(path: &Path) -> Done<Self> {
        let tokenizer = read_json(path)?;
        let vocabulary = tokenizer["model"]["vocab"]
            .as_object()
            .ok_or("tokenizer.json has no vocabulary")?;
        let tokens = vocabulary
            .iter()
            .filter_map(|(token, id)| Some((id.as_u64()?, token.clone())))
            .collect();
        // GPT-2's table: printable bytes stand for themselves, the others follow from U+0100 on, in order.
        let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let others = (0..=255)
            .filter(|&byte| !printable(byte))
            .zip('\u{100}'..)
            .map(|(byte, letter)| (letter, byte));
        let byte_of = (0..=255)
            .filter(|&byte| printable(byte))
            .map(|byte| (char::from(byte), byte))
            .chain(others)
            .collect();
        Ok(Self { tokens, byte_of })
    }

    fn decode(&self, ids: &Value) -> Done<String> {
        let mut bytes = Vec::new();
        for id in ids.as_array().ok_or("ids are not a list")? {
            let token = id
                .as_u64()
                .and_then(|id| self.tokens.get(&id))
                .ok_or_else(|| format!("unknown token {id}"))?;
            bytes.extend(token.chars().filter_map(|letter| self.byte_of.get(&letter)));
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn read_json(path: &Path) -> Done<Value> {
    let text =
        std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    serde_json::from_slice(&text)
        .map_err(|error| format!("{} is not JSON: {error}", path.display()))
}
