//! llama.cpp as a second reader: opens vindexes of the kjv model in it, holds what it writes against
//! `models/kjv/prompts.json`, our perplexities against its own, and our calibration against its own. Not part of CI.
//! Invariant: both read the same directory.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::build::{self, Done, output, run};
use crate::{calibration, llama_cpp};

/// Windows of the perplexities, in tokens.
const WINDOW: usize = 256;
/// How far our perplexity may be from llama.cpp's on the same directory.
const PERPLEXITY_RATIO_MAX: f64 = 0.005;

/// Extracts kjv and its sister with f32 and q4k; lets llama.cpp continue every prompt of kjv and compares; compares
/// the perplexity of two texts in llama.cpp and in our own forward pass; quantises kjv by statistics of a text, here and there.
pub(crate) fn run_peers() -> Done {
    let tools = llama_cpp::programs(&[
        "llama-completion",
        "llama-imatrix",
        "llama-perplexity",
        "llama-quantize",
    ])?;
    let larql = build::programs()?.larql;
    let model = build::root().join("models/kjv");
    let folder = build::workspace("peers")?;
    let texts = [model.join("heldout.txt"), build::root().join("LICENSE")];
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
        let first_part = llama_cpp::first_part(&target)?;
        let (n_equal, n_prompts) = compare_prompts(&tools, &first_part, &model)?;
        println!(
            "kjv {recipe}: llama.cpp continues {n_equal} of {n_prompts} prompts as prompts.json"
        );
        // Only unquantised weights must repeat the reference; q4k is a figure.
        if recipe == "f32" && n_equal != n_prompts {
            wrong.push(format!(
                "{} of {n_prompts} continuations differ with {recipe}",
                n_prompts - n_equal
            ));
        }
        for text in &texts {
            let theirs = llama_cpp::perplexity(&tools, &first_part, text, WINDOW)?;
            let ours = our_perplexity(&larql, &target, text, WINDOW)?;
            let name = text
                .file_name()
                .map(OsStr::to_string_lossy)
                .unwrap_or_default();
            let off = ours / theirs - 1.0;
            println!(
                "kjv {recipe}: perplexity of {name} {ours:.4} here, {theirs:.4} in llama.cpp ({:+.2} %)",
                100.0 * off
            );
            if off.is_nan() || off.abs() > PERPLEXITY_RATIO_MAX {
                wrong.push(format!(
                    "perplexity of {name} with {recipe} is {ours}, llama.cpp says {theirs}"
                ));
            }
        }
    }
    wrong.extend(calibration::compare(&tools, &larql, &model, &folder)?);
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("; "))
    }
}

/// Perplexity of a text in our own forward pass, with the windows of llama.cpp's program.
pub(crate) fn our_perplexity(larql: &Path, vindex: &Path, text: &Path, window: usize) -> Done<f64> {
    let told = output(
        Command::new(larql)
            .args(["perplexity", "--json"])
            .arg(vindex)
            .arg("--text")
            .arg(text)
            .args(["--window", &window.to_string()]),
    )?;
    let told: Value = serde_json::from_slice(&told)
        .map_err(|error| format!("larql perplexity told no JSON: {error}"))?;
    told["perplexity"]
        .as_f64()
        .ok_or_else(|| format!("larql perplexity told no figure: {told}"))
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
