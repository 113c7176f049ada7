//! Decoding and prefill against llama.cpp on the same GGUF files in the same run, and what the split costs: a weight
//! server in another process over a Unix socket and over loopback TCP.
//! Invariant: both sides have the same number of threads; the measurements take turns and the best of the runs counts
//! for either. Leaves out machines that are not this one (`skulk plan`).

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::bench::{N_RUNS, N_THREADS, extract};
use crate::build::{self, Done, output};
use crate::{checkpoint, llama_cpp};

const N_PROMPT: usize = 512;
const N_TOKENS: usize = 64;

/// Tokens a second.
#[derive(Clone, Copy, Default)]
struct Speed {
    decode: f64,
    prefill: f64,
}

impl Speed {
    fn best(self, other: Speed) -> Speed {
        Speed {
            decode: self.decode.max(other.decode),
            prefill: self.prefill.max(other.prefill),
        }
    }
}

/// Runs the bench and prints the table of `BENCHMARKS.md`.
pub(crate) fn run() -> Done {
    let peer = llama_cpp::programs()?.join("llama-bench");
    let larql = build::programs()?.larql;
    let folder = build::workspace("bench")?;
    let source = folder.join("Qwen3-0.6B-shape");
    checkpoint::qwen3_0_6b(&source)?;
    let vindex = folder.join("speed-q4k.vindex");
    if !vindex.join("index.json").exists() {
        extract(&larql, &source, &vindex, "q4k")?;
    }
    let first_part = llama_cpp::first_part(&vindex)?;

    let socket = folder.join("bench.sock");
    let over_unix = WeightServer::start(&larql, &vindex, &format!("unix:{}", socket.display()))?;
    let over_tcp = WeightServer::start(&larql, &vindex, "127.0.0.1:0")?;
    let ours = |more: &[&str]| measure(&larql, &vindex, more);
    let (mut theirs, mut alone, mut by_unix, mut by_tcp) = (
        Speed::default(),
        Speed::default(),
        Speed::default(),
        Speed::default(),
    );
    let mut last = Value::Null;
    for turn in 1..=N_RUNS {
        theirs = theirs.best(peer_speed(&peer, &first_part)?);
        let told = ours(&[])?;
        alone = alone.best(speed(&told)?);
        last = told;
        by_unix = by_unix.best(speed(&ours(&["--ffn", &over_unix.address])?)?);
        by_tcp = by_tcp.best(speed(&ours(&["--ffn", &over_tcp.address])?)?);
        eprintln!("run {turn} of {N_RUNS} done");
    }

    let bandwidth = number(&last, "bandwidth_gb_s")?;
    let bytes_per_token = number(&last, "bytes_per_token")?;
    let gb_s = |tokens: f64| tokens * bytes_per_token / 1e9;
    println!(
        "| Qwen3-0.6B shape, q4k, {N_THREADS} threads | decode tok/s | GB/s of weights | prefill tok/s |"
    );
    println!("|---|---:|---:|---:|");
    for (name, speed) in [
        ("llama.cpp (llama-bench)", theirs),
        ("larql, unsplit", alone),
        ("larql, split over a Unix socket", by_unix),
        ("larql, split over loopback TCP", by_tcp),
    ] {
        println!(
            "| {name} | {:.1} | {:.1} | {:.0} |",
            speed.decode,
            gb_s(speed.decode),
            speed.prefill
        );
    }
    println!();
    println!("measured read bandwidth, {N_THREADS} threads: {bandwidth:.1} GB/s");
    println!(
        "decode against llama.cpp: {:.2} x",
        alone.decode / theirs.decode
    );
    println!(
        "decode against the bandwidth: {:.0} %",
        100.0 * gb_s(alone.decode) / bandwidth
    );
    println!(
        "prefill against llama.cpp: {:.2} x",
        alone.prefill / theirs.prefill
    );
    println!(
        "split over a Unix socket against unsplit: {:.2} x",
        by_unix.decode / alone.decode
    );
    println!(
        "split over loopback TCP against unsplit: {:.2} x",
        by_tcp.decode / alone.decode
    );
    Ok(())
}

/// What `larql bench` tells.
fn measure(larql: &Path, vindex: &Path, more: &[&str]) -> Done<Value> {
    let told = output(
        Command::new(larql)
            .args(["bench", "--json"])
            .arg(vindex)
            .args(["--threads", &N_THREADS.to_string()])
            .args([
                "--prompt",
                &N_PROMPT.to_string(),
                "--tokens",
                &N_TOKENS.to_string(),
            ])
            .args(more),
    )?;
    serde_json::from_slice(&told).map_err(|error| format!("larql bench told no JSON: {error}"))
}

fn speed(told: &Value) -> Done<Speed> {
    Ok(Speed {
        decode: number(told, "decode_tok_s")?,
        prefill: number(told, "prefill_tok_s")?,
    })
}

fn number(told: &Value, key: &str) -> Done<f64> {
    told[key]
        .as_f64()
        .ok_or_else(|| format!("there is no number {key} in {told}"))
}

/// llama-bench on the same files.
fn peer_speed(peer: &Path, first_part: &Path) -> Done<Speed> {
    let told = output(
        Command::new(peer)
            .arg("--model")
            .arg(first_part)
            .args(["--threads", &N_THREADS.to_string(), "--repetitions", "1"])
            .args([
                "--n-prompt",
                &N_PROMPT.to_string(),
                "--n-gen",
                &N_TOKENS.to_string(),
            ])
            .args(["--output", "json"])
            .stderr(Stdio::null()),
    )?;
    let rows: Vec<Value> = serde_json::from_slice(&told)
        .map_err(|error| format!("llama-bench told no JSON: {error}"))?;
    let of = |key: &str| {
        let row = rows
            .iter()
            .find(|row| row[key].as_u64().is_some_and(|n| n > 0));
        number(
            row.ok_or_else(|| format!("llama-bench measured no {key}"))?,
            "avg_ts",
        )
    };
    Ok(Speed {
        decode: of("n_gen")?,
        prefill: of("n_prompt")?,
    })
}

/// A weight server of the bench's vindex; ends with the bench.
struct WeightServer {
    child: Child,
    address: String,
}

impl WeightServer {
    fn start(larql: &Path, vindex: &Path, listen: &str) -> Done<WeightServer> {
        let mut child = Command::new(larql)
            .args(["serve", "--json"])
            .arg(vindex)
            .args(["--listen", listen, "--threads", &N_THREADS.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot run {}: {error}", larql.display()))?;
        let mut line = String::new();
        let read = match child.stdout.take() {
            Some(stdout) => BufReader::new(stdout).read_line(&mut line),
            None => Ok(0),
        };
        let mut server = WeightServer {
            child,
            address: String::new(),
        };
        read.map_err(|error| format!("larql serve said nothing: {error}"))?;
        let told: Value = serde_json::from_str(&line)
            .map_err(|error| format!("larql serve told no JSON line ({error}): {line:?}"))?;
        server.address = told["listen"]
            .as_str()
            .ok_or_else(|| format!("larql serve told no address: {line}"))?
            .to_owned();
        Ok(server)
    }
}

impl Drop for WeightServer {
    fn drop(&mut self) {
        // It may have ended by itself; nothing is left to be done then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
