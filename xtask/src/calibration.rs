//! Quantisation by statistics of a text, ours against llama.cpp's: llama-imatrix and llama-quantize make their Q4_K_M of the same
//! weights with the same text, and llama-perplexity reads the files of both over another text.
//!
//! Invariant: nothing is calibrated on the text that it is measured on. Leaves out how fast either is.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::build::{Done, run};
use crate::llama_cpp;
use crate::peers::our_perplexity;

/// Tokens in a window of the perplexities; the second half of each is scored.
const WINDOW: usize = 256;
/// How much larger our files may be than theirs.
const SIZE_RATIO_MAX: f64 = 1.05;

/// One way to store the model.
struct Row {
    name: &'static str,
    size_bytes: u64,
    in_llama_cpp: f64,
    /// Where we can read it.
    here: Option<f64>,
}

/// Prints the table of `BENCHMARKS.md`, and gives what is not as it should be.
pub(crate) fn compare(
    tools: &Path,
    larql: &Path,
    model: &Path,
    folder: &Path,
) -> Done<Vec<String>> {
    let folder = folder.join("calibration");
    std::fs::create_dir_all(&folder)
        .map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    let [seen, unseen] = halves(&model.join("heldout.txt"), &folder)?;
    let extract = |name: &str, recipe: &str, more: &[&Path]| {
        let target = folder.join(name);
        run(Command::new(larql)
            .arg("extract")
            .arg(model)
            .arg("-o")
            .arg(&target)
            .args(["--force", "--quant", recipe])
            .args(more))?;
        Done::Ok(target)
    };
    let exact = extract("f32.vindex", "f32", &[])?;
    let exact_part = llama_cpp::first_part(&exact)?;
    let statistics = folder.join("llama-imatrix.gguf");
    run(Command::new(tools.join("llama-imatrix"))
        .arg("--model")
        .arg(&exact_part)
        .arg("--file")
        .arg(&seen)
        .arg("-o")
        .arg(&statistics)
        .args(["--ctx-size", "512", "--threads", "2", "--no-ppl"]))?;
    let quantize = |name: &str, more: &[&Path]| {
        let target = folder.join(name);
        run(Command::new(tools.join("llama-quantize"))
            .args(more)
            .arg(&exact_part)
            .arg(&target)
            .args(["Q4_K_M", "2"]))?;
        Done::Ok(target)
    };
    let (by_text, by_file) = (Path::new("--calibrate"), Path::new("--imatrix"));
    let ours = |name, vindex: PathBuf| {
        let part = llama_cpp::first_part(&vindex)?;
        Done::Ok(Row {
            name,
            size_bytes: llama_cpp::size_bytes(&vindex)?,
            in_llama_cpp: llama_cpp::perplexity(tools, &part, &unseen, WINDOW)?,
            here: Some(our_perplexity(larql, &vindex, &unseen, WINDOW)?),
        })
    };
    let theirs = |name, file: PathBuf| {
        let metadata = std::fs::metadata(&file)
            .map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        Done::Ok(Row {
            name,
            size_bytes: metadata.len(),
            in_llama_cpp: llama_cpp::perplexity(tools, &file, &unseen, WINDOW)?,
            here: None,
        })
    };
    let rows = [
        ours("larql f32", exact.clone())?,
        ours("larql q4k", extract("q4k.vindex", "q4k", &[])?)?,
        ours(
            "larql q4k --calibrate",
            extract("calibrated.vindex", "q4k", &[by_text, &seen])?,
        )?,
        ours(
            "larql q4k --imatrix, llama-imatrix's file",
            extract("by-file.vindex", "q4k", &[by_file, &statistics])?,
        )?,
        theirs("llama-quantize Q4_K_M", quantize("plain.gguf", &[])?)?,
        theirs(
            "llama-quantize Q4_K_M --imatrix",
            quantize("weighed.gguf", &[by_file, &statistics])?,
        )?,
    ];
    let [_, plain, calibrated, _, _, peer] = &rows;
    println!("| kjv | bytes | against Q4_K_M | perplexity in llama.cpp | here |");
    println!("|---|---:|---:|---:|---:|");
    for row in &rows {
        let here = row.here.map_or("".to_owned(), |here| format!("{here:.4}"));
        println!(
            "| {} | {} | {:.3} | {:.4} | {here} |",
            row.name,
            row.size_bytes,
            ratio(row, peer),
            row.in_llama_cpp
        );
    }
    let mut wrong = Vec::new();
    if ratio(calibrated, peer) > SIZE_RATIO_MAX {
        wrong.push(format!(
            "calibrated files are {} bytes",
            calibrated.size_bytes
        ));
    }
    for (name, other) in [("without statistics", plain), ("llama.cpp's", peer)] {
        if calibrated.in_llama_cpp > other.in_llama_cpp {
            wrong.push(format!(
                "perplexity of the calibrated model is {}, {name} {}",
                calibrated.in_llama_cpp, other.in_llama_cpp
            ));
        }
    }
    Ok(wrong)
}

fn ratio(row: &Row, peer: &Row) -> f64 {
    row.size_bytes as f64 / peer.size_bytes as f64
}

/// A text in two, at the end of a line near its middle: one to calibrate with, one to measure with.
fn halves(text: &Path, folder: &Path) -> Done<[PathBuf; 2]> {
    let whole = std::fs::read_to_string(text)
        .map_err(|error| format!("cannot read {}: {error}", text.display()))?;
    let middle = whole.char_indices().nth(whole.chars().count() / 2);
    let before = &whole[..middle.map_or(0, |(at, _)| at)];
    let (seen, unseen) = whole.split_at(before.rfind('\n').map_or(0, |at| at + 1));
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text)
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        Done::Ok(path)
    };
    Ok([write("seen.txt", seen)?, write("unseen.txt", unseen)?])
}
