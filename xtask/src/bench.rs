//! Extraction to q4k against `llama-quantize … Q4_K_M` from the same weights, on this machine, in the same run.
//! Invariant: both read a warm page cache and use the same number of threads; the best of three runs counts for
//! either. Leaves out anything remote.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::build::{self, Done};
use crate::{checkpoint, llama_cpp};

pub(crate) const N_RUNS: usize = 3;
pub(crate) const N_THREADS: usize = 2;

/// Runs the bench and prints the table of `BENCHMARKS.md`.
pub(crate) fn run() -> Done {
    let quantize = llama_cpp::programs(&["llama-quantize"])?.join("llama-quantize");
    let larql = build::programs()?.larql;
    let folder = build::workspace("bench")?;
    let source = folder.join("Qwen3-0.6B-shape");
    eprintln!("writing a random checkpoint of the shape of Qwen3-0.6B");
    let n_weights = checkpoint::qwen3_0_6b(&source)?;

    let bf16 = folder.join("bf16.vindex");
    extract(&larql, &source, &bf16, "bf16")?;
    let first_part = llama_cpp::first_part(&bf16)?;
    let q4k = folder.join("q4k.vindex");
    let peer = folder.join("peer.gguf");
    let (mut ours, mut theirs, mut rss_anon_kib) = (Duration::MAX, Duration::MAX, 0);
    for turn in 1..=N_RUNS {
        let measured = extract(&larql, &source, &q4k, "q4k")?;
        ours = ours.min(measured.wall);
        rss_anon_kib = rss_anon_kib.max(measured.rss_anon_kib_max);
        let begun = Instant::now();
        build::output(
            Command::new(&quantize)
                .args([&first_part, &peer])
                .args(["Q4_K_M", &N_THREADS.to_string()]),
        )?;
        theirs = theirs.min(begun.elapsed());
        eprintln!("run {turn} of {N_RUNS} done");
    }
    let bandwidth = read_bandwidth_gb_s();
    let source_gb = 2.0 * n_weights as f64 / 1e9;
    println!(
        "| {n_weights} weights, bf16 to q4k, {N_THREADS} threads | seconds | weights/s | source GB/s |"
    );
    println!("|---|---|---|---|");
    for (name, wall) in [
        ("larql extract --quant q4k", ours),
        ("llama-quantize Q4_K_M", theirs),
    ] {
        let seconds = wall.as_secs_f64();
        println!(
            "| {name} | {seconds:.2} | {:.0} M | {:.2} |",
            n_weights as f64 / seconds / 1e6,
            source_gb / seconds
        );
    }
    println!();
    println!(
        "ratio: {:.2} x as fast",
        theirs.as_secs_f64() / ours.as_secs_f64()
    );
    println!(
        "anonymous memory of larql at its peak: {} MiB",
        rss_anon_kib / 1024
    );
    println!("memory bandwidth of this machine, {N_THREADS} threads reading: {bandwidth:.1} GB/s");
    Ok(())
}

pub(crate) struct Measured {
    wall: Duration,
    rss_anon_kib_max: u64,
}

/// Extracts `source` anew and watches the anonymous memory of the process while it runs.
pub(crate) fn extract(larql: &Path, source: &Path, target: &Path, recipe: &str) -> Done<Measured> {
    if target.exists() {
        std::fs::remove_dir_all(target)
            .map_err(|error| format!("cannot remove {}: {error}", target.display()))?;
    }
    let begun = Instant::now();
    let mut child = Command::new(larql)
        .arg("extract")
        .arg(source)
        .arg("-o")
        .arg(target)
        .args(["--quant", recipe, "--threads", &N_THREADS.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot run {}: {error}", larql.display()))?;
    let status_file = format!("/proc/{}/status", child.id());
    let mut rss_anon_kib_max = 0;
    loop {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            if !status.success() {
                return Err(format!(
                    "larql extract --quant {recipe} ended with {status}; run it by hand to see why"
                ));
            }
            return Ok(Measured {
                wall: begun.elapsed(),
                rss_anon_kib_max,
            });
        }
        if let Ok(status) = std::fs::read_to_string(&status_file) {
            let kib = status
                .lines()
                .find_map(|line| line.strip_prefix("RssAnon:"))
                .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
            rss_anon_kib_max = rss_anon_kib_max.max(kib.unwrap_or(0));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Bytes read a second when each thread sums its own gibibyte, best of three.
fn read_bandwidth_gb_s() -> f64 {
    let n_words = (1 << 30) / 8;
    let blocks: Vec<Vec<u64>> = (0..N_THREADS)
        .map(|block| vec![block as u64; n_words])
        .collect();
    let best = (0..N_RUNS)
        .map(|_| {
            let begun = Instant::now();
            std::thread::scope(|scope| {
                for block in &blocks {
                    scope.spawn(|| {
                        std::hint::black_box(
                            block
                                .iter()
                                .fold(0, |sum: u64, &word| sum.wrapping_add(word)),
                        )
                    });
                }
            });
            begun.elapsed()
        })
        .min()
        .unwrap_or(Duration::MAX);
    (N_THREADS * n_words * 8) as f64 / best.as_secs_f64() / 1e9
}
