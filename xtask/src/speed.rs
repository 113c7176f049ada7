//! Decoding and prefill against llama.cpp on the same GGUF files in the same run, what the split costs (a weight server in
//! another process over a Unix socket and over loopback TCP), and what streams side by side gain.
//! Invariant: both sides have the same number of threads and as many tokens before those that are decoded; the
//! measurements take turns and the best of the runs counts for either. Leaves out machines that are not this one (`skulk
//! plan`).

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::bench::{N_RUNS, N_THREADS, extract};
use crate::build::{self, Done, output};
use crate::predicted::{self, Measured};
use crate::{checkpoint, llama_cpp};

pub(crate) const N_PROMPT: usize = 512;
const N_TOKENS: usize = 64;
const N_STREAMS: usize = 8;

/// Tokens a second.
#[derive(Clone, Copy, Default)]
pub(crate) struct Speed {
    /// Decoding from the beginning of a text.
    pub(crate) early: f64,
    /// Decoding after [`N_PROMPT`] tokens.
    pub(crate) late: f64,
    pub(crate) prefill: f64,
}

impl Speed {
    pub(crate) fn best(self, other: Speed) -> Speed {
        Speed {
            early: self.early.max(other.early),
            late: self.late.max(other.late),
            prefill: self.prefill.max(other.prefill),
        }
    }
}

/// Runs the bench and prints the table of `BENCHMARKS.md`.
pub(crate) fn run() -> Done {
    let peer = llama_cpp::programs(&["llama-bench"])?.join("llama-bench");
    let build::Programs { larql, skulk } = build::programs()?;
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
    let ours = |more: &[&str]| our_speed(&larql, &vindex, more);
    let [mut theirs, mut alone, mut by_unix, mut by_tcp] = [Speed::default(); 4];
    let mut side_by_side: f64 = 0.0;
    for turn in 1..=N_RUNS {
        theirs = theirs.best(peer_speed(&peer, &first_part)?);
        alone = alone.best(ours(&[])?);
        by_unix = by_unix.best(ours(&["--ffn", &over_unix.address])?);
        by_tcp = by_tcp.best(ours(&["--ffn", &over_tcp.address])?);
        let streams = N_STREAMS.to_string();
        let told = measure(&larql, &vindex, N_PROMPT, &["--streams", &streams])?;
        side_by_side = side_by_side.max(number(&told, "decode_tok_s")?);
        eprintln!("run {turn} of {N_RUNS} done");
    }
    let told = measure(&larql, &vindex, 1, &[])?;
    let bandwidth = number(&told, "bandwidth_gb_s")?;
    let bytes_per_token = number(&told, "bytes_per_token")?;
    let gb_s = |tokens: f64| tokens * bytes_per_token / 1e9;

    println!(
        "| Qwen3-0.6B shape, q4k, {N_THREADS} threads | decode tok/s, empty context | GB/s of weights | decode tok/s after \
         {N_PROMPT} tokens | prefill tok/s |"
    );
    println!("|---|---:|---:|---:|---:|");
    for (name, speed) in [
        ("llama.cpp (llama-bench)", theirs),
        ("larql, unsplit", alone),
        ("larql, split over a Unix socket", by_unix),
        ("larql, split over loopback TCP", by_tcp),
    ] {
        let Speed {
            early,
            late,
            prefill,
        } = speed;
        println!(
            "| {name} | {early:.1} | {:.1} | {late:.1} | {prefill:.0} |",
            gb_s(early)
        );
    }
    println!();
    println!("measured read bandwidth, {N_THREADS} threads: {bandwidth:.1} GB/s");
    println!(
        "decode against the bandwidth: {:.0} %, llama.cpp {:.0} %",
        100.0 * gb_s(alone.early) / bandwidth,
        100.0 * gb_s(theirs.early) / bandwidth
    );
    for (name, a, b) in [
        ("llama.cpp", alone, theirs),
        ("unsplit: over a Unix socket", by_unix, alone),
        ("unsplit: over loopback TCP", by_tcp, alone),
    ] {
        println!(
            "against {name}: decode {:.2} x, after {N_PROMPT} tokens {:.2} x, prefill {:.2} x",
            a.early / b.early,
            a.late / b.late,
            a.prefill / b.prefill
        );
    }
    println!(
        "{N_STREAMS} streams side by side after {N_PROMPT} tokens: {side_by_side:.1} tok/s, {:.2} x of one",
        side_by_side / alone.late
    );
    let round_trip = |server: &WeightServer| {
        let told = measure(&larql, &vindex, 1, &["--ffn", &server.address])?;
        number(&told, "round_trip_us").map(Some)
    };
    let mut runs = Vec::new();
    for (name, speed, round_trip_us) in [
        ("unsplit", alone, None),
        ("over a Unix socket", by_unix, round_trip(&over_unix)?),
        ("over loopback TCP", by_tcp, round_trip(&over_tcp)?),
    ] {
        for (decode, n_before) in [(speed.early, 1), (speed.late, N_PROMPT)] {
            runs.push(Measured {
                name,
                decode,
                context: n_before + N_TOKENS / 2,
                round_trip_us,
            });
        }
    }
    predicted::table(&skulk, &vindex, bandwidth, gb_s(alone.early), &runs)
}

/// Our speed, with `more` options.
pub(crate) fn our_speed(larql: &Path, vindex: &Path, more: &[&str]) -> Done<Speed> {
    let early = measure(larql, vindex, 1, more)?;
    let late = measure(larql, vindex, N_PROMPT, more)?;
    Ok(Speed {
        early: number(&early, "decode_tok_s")?,
        late: number(&late, "decode_tok_s")?,
        prefill: number(&late, "prefill_tok_s")?,
    })
}

/// What `larql bench` tells.
pub(crate) fn measure(larql: &Path, vindex: &Path, n_prompt: usize, more: &[&str]) -> Done<Value> {
    let told = output(
        Command::new(larql)
            .args(["bench", "--json"])
            .arg(vindex)
            .args(["--threads", &N_THREADS.to_string()])
            .args([
                "--prompt",
                &n_prompt.to_string(),
                "--tokens",
                &N_TOKENS.to_string(),
            ])
            .args(more),
    )?;
    serde_json::from_slice(&told).map_err(|error| format!("larql bench told no JSON: {error}"))
}

pub(crate) fn number(told: &Value, key: &str) -> Done<f64> {
    told[key]
        .as_f64()
        .ok_or_else(|| format!("there is no number {key} in {told}"))
}

/// llama-bench on the same files.
pub(crate) fn peer_speed(peer: &Path, first_part: &Path) -> Done<Speed> {
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
                "--n-depth",
                &format!("0,{N_PROMPT}"),
            ])
            .args(["--output", "json"])
            .stderr(Stdio::null()),
    )?;
    let rows: Vec<Value> = serde_json::from_slice(&told)
        .map_err(|error| format!("llama-bench told no JSON: {error}"))?;
    let of = |key: &str, depth: usize| {
        let row = rows
            .iter()
            .find(|row| row[key].as_u64().is_some_and(|n| n > 0) && row["n_depth"] == depth as u64);
        let row = row.ok_or_else(|| format!("llama-bench measured no {key} at depth {depth}"))?;
        number(row, "avg_ts")
    };
    Ok(Speed {
        early: of("n_gen", 0)?,
        late: of("n_gen", N_PROMPT)?,
        prefill: of("n_prompt", 0)?,
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
