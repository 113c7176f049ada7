//! What `skulk plan` foresees for this machine, beside what was measured on it: the formula of `docs/plan.md` against
//! real runs.
//!
//! Invariant: the prediction is that of the program that users run, for the bandwidth and the round trips that were
//! measured in the same run as the tokens/s. Leaves out other machines, and several streams.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::build::{self, Done, output};

/// A run that was measured.
pub(crate) struct Measured<'a> {
    pub(crate) name: &'a str,
    /// Tokens/s.
    pub(crate) decode: f64,
    /// Tokens in the cache, on average.
    pub(crate) context: usize,
    /// Of an empty question to the weight server; `None`: there is none.
    pub(crate) round_trip_us: Option<f64>,
}

/// Prints measured and predicted tokens/s of `runs` on a machine that reads `bandwidth` GB/s. `kernels` is how much of
/// it the kernels reach, in GB/s of weights of a run that is unsplit and has little in its cache; the last two columns
/// foresee the others by that.
pub(crate) fn table(
    skulk: &Path,
    vindex: &Path,
    bandwidth: f64,
    kernels: f64,
    runs: &[Measured<'_>],
) -> Done {
    println!();
    println!(
        "| | context | measured tok/s | predicted, {bandwidth:.1} GB/s | ratio | predicted, {kernels:.1} GB/s of the kernels | ratio |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|");
    for run in runs {
        let by = |gb_s: f64| predict(skulk, vindex, gb_s, run);
        let (machine, kernels) = (by(bandwidth)?, by(kernels)?);
        println!(
            "| {} | {} | {:.1} | {machine:.1} | {:.2} | {kernels:.1} | {:.2} |",
            run.name,
            run.context,
            run.decode,
            run.decode / machine,
            run.decode / kernels
        );
    }
    let mut told = "";
    for run in runs {
        if let (Some(us), true) = (run.round_trip_us, run.name != told) {
            println!("an empty round trip {}: {us:.1} us", run.name);
            told = run.name;
        }
    }
    Ok(())
}

/// Tokens/s of one stream, by `skulk plan`.
fn predict(skulk: &Path, vindex: &Path, gb_s: f64, run: &Measured<'_>) -> Done<f64> {
    let mut nodes =
        format!("nodes:\n- {{name: node, role: attention, memory: 1TB, bandwidth: {gb_s}}}\n");
    if let Some(round_trip_us) = run.round_trip_us {
        // Rows between two processes of one machine travel as fast as memory is read.
        nodes += &format!(
            "- {{name: weights, role: ffn, memory: 1TB, bandwidth: {gb_s}, link: {{round_trip_us: {round_trip_us}, bandwidth: {}}}}}\n",
            8.0 * gb_s
        );
    }
    let file = build::workspace("bench")?.join("nodes.yaml");
    std::fs::write(&file, nodes)
        .map_err(|error| format!("cannot write {}: {error}", file.display()))?;
    let told = output(
        Command::new(skulk)
            .args(["plan", "--json"])
            .arg(vindex)
            .arg("--nodes")
            .arg(&file)
            .args(["--context", &run.context.to_string()]),
    )?;
    let told: Value = serde_json::from_slice(&told)
        .map_err(|error| format!("skulk plan told no JSON: {error}"))?;
    told["tokens_per_second"]
        .as_f64()
        .ok_or_else(|| format!("skulk plan told no tokens/s: {told}"))
}
